package attest

import (
	"net/url"
	"strconv"
	"strings"
)

// BaseResult says how well the base image of an image is known (ci-identity
// section 3.2).
type BaseResult string

// The results, from proved to disproved.
const (
	ProvenLayers BaseResult = "PROVEN_LAYERS" // the base's layers are the image's first layers, on every platform
	Claimed      BaseResult = "CLAIMED"       // somebody says so and it cannot be checked
	Unclaimed    BaseResult = "UNKNOWN"       // nobody says anything
	Contradicted BaseResult = "CONTRADICTED"  // somebody says so and the layers say otherwise
)

// Where a claim about a base came from.
const (
	BaseFromAnnotation = "annotation"
	BaseFromCaller     = "caller"
)

// Base is the base image of an image, as far as the registry proves it.
type Base struct {
	Result     BaseResult `json:"result"`
	Repository Repository `json:"repository,omitempty"`
	Tag        string     `json:"tag,omitempty"`   // under which it was claimed; a hint, tags move
	Digest     Digest     `json:"digest,omitzero"` // of the index if it has one, else of the manifest
	Platforms  []BasePart `json:"platforms,omitempty"`
	// Claims holds every candidate with its own result, the chosen one first.
	Claims []BaseClaim `json:"claims,omitempty"`
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
	From   string     `json:"from"` // annotation, caller
	Name   string     `json:"name"` // as claimed: a reference with a tag, a digest or both
	Digest Digest     `json:"digest,omitzero"`
	Result BaseResult `json:"result"`
	Detail string     `json:"detail,omitempty"`
}

// String returns "HOST/PATH:TAG@DIGEST", for people.
func (b Base) String() string {
	if b.Repository == "" {
		return string(b.Result)
	}
	s := string(b.Repository)
	if b.Tag != "" {
		s += ":" + b.Tag
	}
	return s + "@" + b.Digest.String()
}

// PackageURL returns the base as a package URL of type oci (purl-spec,
// types-doc/oci): the name is the last path segment, lower case, the version
// the digest.
func (b Base) PackageURL() string {
	q := "repository_url=" + url.QueryEscape(string(b.Repository))
	if b.Tag != "" {
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
