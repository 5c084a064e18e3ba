package attest

import (
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// BaseResult says how well the base image of an image is known (ci-identity
// section 3.2).
type BaseResult string

// The results.
const (
	ProvenLayers  BaseResult = "PROVEN_LAYERS"  // the base's layers are the image's first layers, on every platform
	ProvenDiffIDs BaseResult = "PROVEN_DIFFIDS" // the same of their uncompressed content, hashed here: the compression differs
	Matched       BaseResult = "MATCHED"        // nobody names it; the layers are those of a base that this service follows
	Attested      BaseResult = "ATTESTED"       // an attestation that somebody signed under a configured root names it; layers cannot show it
	Scratch       BaseResult = "SCRATCH"        // said to be built from nothing, and no followed base is in it
	Claimed       BaseResult = "CLAIMED"        // somebody says so and it cannot be checked
	Unclaimed     BaseResult = "UNKNOWN"        // nobody says anything
	Contradicted  BaseResult = "CONTRADICTED"   // somebody says so and the layers say otherwise
)

// Proven reports whether the layers show the base.
func (r BaseResult) Proven() bool { return r == ProvenLayers || r == ProvenDiffIDs || r == Matched }

// Grade says how a base with this result is known.
func (r BaseResult) Grade() Grade {
	switch {
	case r.Proven(), r == Contradicted:
		return GradeRegistry
	case r == Attested:
		return GradeAttested
	case r == Claimed, r == Scratch:
		return GradeCaller
	}
	return ""
}

// Where a claim about a base came from. All but the last two are the word of
// whoever pushed the image.
const (
	BaseFromBuildKit    = "buildkit"    // an image dependency in BuildKit's unsigned provenance in the index
	BaseFromAnnotation  = "annotation"  // of the manifest or index
	BaseFromLabel       = "label"       // of the image's config: .NET, buildpacks
	BaseFromCaller      = "caller"      // of the signing request
	BaseFromFollowed    = "followed"    // found among the bases that this service follows
	BaseFromAttestation = "attestation" // signed under a configured foreign root
)

// Base is the base image of an image, as far as the registry proves it.
type Base struct {
	Result     BaseResult `json:"result"`
	Repository Repository `json:"repository,omitempty"` // under its canonical name, not a mirror's
	Tag        string     `json:"tag,omitempty"`        // under which it was claimed; a hint, tags move
	Digest     Digest     `json:"digest,omitzero"`      // of the index if it has one, else of the manifest
	Platforms  []BasePart `json:"platforms,omitempty"`
	// Equivalents are other bases with the very same layers: nothing tells them apart.
	Equivalents []BaseName `json:"equivalents,omitempty"`
	// Claims holds every candidate with its own result, the chosen one first.
	Claims []BaseClaim `json:"claims,omitempty"`
}

// BaseName names a base image.
type BaseName struct {
	Repository Repository `json:"repository"`
	Tag        string     `json:"tag,omitempty"`
	Digest     Digest     `json:"digest"`
}

// BasePart is the proof for one platform of the image.
type BasePart struct {
	Platform string `json:"platform,omitempty"` // of the image; "" when it is no index
	Image    Digest `json:"image"`              // the image's manifest
	Base     Digest `json:"base"`               // the base's manifest
	Layers   int    `json:"layers"`             // how many leading layers they share: all that the base has
}

// BaseClaim is one candidate and what became of it.
type BaseClaim struct {
	From   string     `json:"from"` // see BaseFrom…
	Name   string     `json:"name"` // as claimed: a reference with a tag, a digest or both
	Digest Digest     `json:"digest,omitzero"`
	Result BaseResult `json:"result"`
	Detail string     `json:"detail,omitempty"`
	Root   string     `json:"root,omitempty"` // foreign root that a claim from an attestation verified under
	// Signer is who signed that attestation: under a root that certifies everybody, its
	// word is worth what its signer's is.
	Signer Foreigner `json:"signer,omitzero"`
}

// Freshness says whether the base that an image was built on is still what its
// tag names. It was asked of a registry, where tags move.
type Freshness string

// The freshness of a base.
const (
	Fresh            Freshness = "FRESH"             // the tag names the same index or manifest
	StaleIndexOnly   Freshness = "STALE_INDEX_ONLY"  // another index, the same manifest for the image's platforms
	StaleConfigOnly  Freshness = "STALE_CONFIG_ONLY" // another manifest, the same layers
	StaleLayers      Freshness = "STALE_LAYERS"      // other layers: there is something newer to build on
	FreshnessUnknown Freshness = "FRESHNESS_UNKNOWN" // no tag to compare with, or it could not be read
)

// BaseState is a base's freshness at a moment.
type BaseState struct {
	Freshness Freshness
	Current   Digest    // what the tag names now
	Checked   time.Time // when the registry was asked
	Since     time.Time // since when it has been seen as it is: the first check that said so
	Detail    string    // why it is not known
}

// String returns "HOST/PATH:TAG@DIGEST", for people.
func (b Base) String() string {
	if b.Repository == "" {
		return string(b.Result)
	}
	return BaseName{b.Repository, b.Tag, b.Digest}.String()
}

// String returns "HOST/PATH:TAG@DIGEST".
func (n BaseName) String() string {
	s := string(n.Repository)
	if n.Tag != "" {
		s += ":" + n.Tag
	}
	if !n.Digest.IsZero() {
		s += "@" + n.Digest.String()
	}
	return s
}

// tagPattern is that of the distribution-spec, "Pulling manifests".
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)

// ParseBaseTag reads HOST/PATH:TAG, the name of a base image that moves. Anything
// else, also with a digest, is BAD_REFERENCE.
func ParseBaseTag(s string) (BaseName, error) {
	i := strings.LastIndexByte(s, ':')
	if strings.Contains(s, "@") || i <= strings.LastIndexByte(s, '/') {
		return BaseName{}, Errorf(BadReference, "%q is not HOST/PATH:TAG", clip(s))
	}
	repo, err := ParseRepository(s[:i])
	if err != nil {
		return BaseName{}, err
	}
	if !tagPattern.MatchString(s[i+1:]) {
		return BaseName{}, Errorf(BadReference, "%q is not a tag: letters, digits, '.', '_' and '-', at most 128", clip(s[i+1:]))
	}
	return BaseName{Repository: repo, Tag: s[i+1:]}, nil
}

// PackageURL returns the base as a package URL of type oci (purl-spec,
// types-doc/oci): the name is the last path segment, lower case, the version
// the digest. The tag is in it only where the service itself found the base under it:
// any other is somebody's word, and the whole URL is graded as one.
func (b Base) PackageURL() string {
	q := "repository_url=" + url.QueryEscape(string(b.Repository))
	if b.Tag != "" && b.Result == Matched {
		q += "&tag=" + url.QueryEscape(b.Tag)
	}
	return "pkg:oci/" + strings.ToLower(b.Repository.Name()) + "@sha256%3A" + b.Digest.Hex() + "?" + q
}

// layers sums up the proof for the dependency's annotations.
func (b Base) layers() string {
	n := 0
	for _, p := range b.Platforms {
		n = max(n, p.Layers)
	}
	return strconv.Itoa(n)
}
