package registry

import (
	"context"
	"encoding/json"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/package-url/packageurl-go"
	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
)

// How BuildKit keeps provenance in an index (BuildKit
// docs/attestations/attestation-storage.md).
const (
	referenceType    = "vnd.docker.reference.type"
	referenceDigest  = "vnd.docker.reference.digest"
	attestationValue = "attestation-manifest"
	inTotoType       = "application/vnd.in-toto+json"
	predicateTypeKey = "in-toto.io/predicate-type"
	provenanceV02    = "https://slsa.dev/provenance/v0.2"
	provenanceV1     = "https://slsa.dev/provenance/v1"
)

const (
	maxProvenance  = 4 << 20  // bytes of one provenance document
	maxProvenances = 16 << 20 // bytes of all that one index lists
	maxDepth       = 64       // of JSON in documents that others wrote
)

// provenance is what BuildKit's unsigned documents in an index say.
type provenance struct {
	images   []*candidate
	complete bool // there is one for every platform
}

// buildkit reads BuildKit's provenance of each platform. It is unsigned: what it
// says is the pusher's word, and a document that cannot be read says nothing.
func (q *inquiry) buildkit(ctx context.Context) (provenance, error) {
	if q.doc.index == nil {
		return provenance{}, nil
	}
	listed := make([]*v1.Descriptor, len(q.parts))
	for i := range q.doc.index.Manifests {
		d := &q.doc.index.Manifests[i]
		if part := q.attests(d); part >= 0 && listed[part] == nil {
			listed[part] = d
		}
	}
	said := make([][]*candidate, len(q.parts))
	read := make([]bool, len(q.parts))
	left := limit(maxProvenances)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel / 2)
	for i, d := range listed {
		if d == nil {
			continue
		}
		g.Go(func() error {
			free, err := take(ctx, q.room.single, min(d.Size, maxManifest)+maxProvenance)
			if err != nil {
				return err
			}
			defer free()
			said[i], err = q.provenanceOf(ctx, *d, q.parts[i].doc.digest, &left)
			read[i] = err == nil
			if err != nil && outage(err) {
				return err
			}
			if err != nil {
				q.log.DebugContext(ctx, "provenance in an index is not used", "repository", q.repo, "manifest", d.Digest.String(), "error", err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return provenance{}, err
	}
	out := provenance{complete: !slices.Contains(read, false)}
	for i := range said {
		for _, k := range said[i] {
			out.images = collect(out.images, k, []int{i})
		}
	}
	return out, nil
}

// attests returns which part an entry of the index is BuildKit's attestation
// manifest of, or -1.
func (q *inquiry) attests(d *v1.Descriptor) int {
	unknown := d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
	if !unknown || d.Annotations[referenceType] != attestationValue || !d.MediaType.IsImage() {
		return -1
	}
	of, err := parseDigest(d.Annotations[referenceDigest])
	if err != nil {
		return -1
	}
	return slices.IndexFunc(q.parts, func(p part) bool { return p.doc.digest == of })
}

// provenanceOf returns the images that the provenance in an attestation manifest
// names for the manifest of.
func (q *inquiry) provenanceOf(ctx context.Context, d v1.Descriptor, of attest.Digest, left *limit) ([]*candidate, error) {
	if !left.take(min(d.Size, maxManifest+1)) {
		return nil, attest.Errorf(attest.TooLarge, "the index lists more provenance than is read")
	}
	docs, err := q.children(ctx, q.repo, []v1.Descriptor{d})
	if err != nil {
		return nil, err
	}
	for _, l := range docs[0].image.Layers {
		kind := l.Annotations[predicateTypeKey]
		if l.MediaType != inTotoType || kind != provenanceV02 && kind != provenanceV1 {
			continue
		}
		if l.Size > maxProvenance || !left.take(l.Size) {
			return nil, attest.Errorf(attest.TooLarge, "provenance has %d bytes", l.Size)
		}
		raw, err := q.blob(ctx, q.repo, l)
		if err != nil {
			return nil, err
		}
		return parseProvenance(raw, kind, of)
	}
	return nil, attest.Errorf(attest.NoProvenance, "the attestation manifest has no provenance")
}

// parseProvenance returns the images among the dependencies that an in-toto
// statement names for the manifest of. Everything else in it is left unread.
func parseProvenance(raw []byte, kind string, of attest.Digest) ([]*candidate, error) {
	if err := attest.StrictJSON(raw, maxDepth); err != nil {
		return nil, err
	}
	type resource struct {
		URI    string            `json:"uri"`
		Digest map[string]string `json:"digest"`
	}
	var statement struct {
		PredicateType string     `json:"predicateType"`
		Subject       []resource `json:"subject"`
		Predicate     struct {
			Materials       []resource `json:"materials"` // v0.2
			BuildDefinition struct {
				ResolvedDependencies []resource `json:"resolvedDependencies"`
			} `json:"buildDefinition"` // v1
		} `json:"predicate"`
	}
	if err := json.Unmarshal(raw, &statement); err != nil {
		return nil, attest.Errorf(attest.StatementMalformed, "provenance is no in-toto statement: %w", err)
	}
	if statement.PredicateType != kind {
		return nil, attest.Errorf(attest.PredicateType, "provenance is annotated as %s and says %q", kind, clip(statement.PredicateType))
	}
	if !slices.ContainsFunc(statement.Subject, func(s resource) bool { return s.Digest["sha256"] == of.Hex() }) {
		return nil, attest.Errorf(attest.SubjectMismatch, "provenance is not about %s", of)
	}
	dependencies := statement.Predicate.Materials
	if kind == provenanceV1 {
		dependencies = statement.Predicate.BuildDefinition.ResolvedDependencies
	}
	var out []*candidate
	for _, d := range dependencies {
		if k := dependency(d.URI, d.Digest["sha256"]); k != nil {
			out = collect(out, k, nil)
		}
	}
	return out, nil
}

// imageURI is what names an image, the last group of it the reference behind oci:// .
// Schemes and the types of package URLs have no case, and slashes before a type count
// for nothing: what names an image in a rare spelling is one all the same.
var imageURI = regexp.MustCompile(`(?is)^(?:pkg:/*(?:docker|oci)/|oci://(.*))`)

// dependency reads the URI of an image, with its digest in hex; nil for what is no
// image.
//
// BuildKit writes pkg:docker/NAME@TAG?platform=…, with digest=… where the FROM
// was pinned, and NAME as people write it: without docker.io and library. The
// specification's own pkg:oci has only the last path segment as its name, and
// the repository in repository_url. Tekton Chains writes oci://HOST/PATH.
func dependency(uri, hex string) *candidate {
	k := &candidate{claim: attest.BaseClaim{From: attest.BaseFromBuildKit, Name: clip(uri)}}
	m := imageURI.FindStringSubmatch(uri)
	switch {
	case m == nil:
		return nil
	case m[1] != "":
		return k.reference(m[1], hex)
	}
	p, err := packageurl.FromString(uri)
	if err != nil {
		k.trouble = "the package URL cannot be read"
		return k
	}
	q := p.Qualifiers.Map()
	tag, digests := q["tag"], []string{q["digest"]}
	if strings.Contains(p.Version, ":") {
		digests = append(digests, p.Version)
	} else if p.Version != "" {
		tag = p.Version
	}
	if hex != "" {
		digests = append(digests, "sha256:"+hex)
	}
	for _, s := range digests {
		if s == "" {
			continue
		}
		d, err := parseDigest(s)
		switch {
		case err != nil:
			k.trouble = "the digest in the package URL is no sha256 digest"
		case !k.digest.IsZero() && k.digest != d:
			k.trouble = "the provenance gives two different digests of it"
		}
		k.digest = d
	}
	if tag != "" && checkTag(tag) != nil {
		k.trouble, tag = "the tag in the package URL is no tag", ""
	}
	k.tag = tag
	name := p.Name
	if p.Namespace != "" {
		name = p.Namespace + "/" + name
	}
	at := strings.TrimSuffix(q["repository_url"], "/")
	switch {
	case at != "" && (at == name || strings.HasSuffix(strings.ToLower(at), "/"+name)):
		name = at
	case at != "":
		name = at + "/" + name
	case p.Type == packageurl.TypeOCI:
		k.trouble = "the package URL names no repository"
		return k
	}
	repo, none, pinned, err := splitReference(name, true)
	if err != nil || none != "" || !pinned.IsZero() {
		k.trouble = "the package URL names no repository"
		return k
	}
	k.repo = repo
	if k.trouble == "" {
		k.claim.Name = clip(attest.BaseName{Repository: repo, Tag: tag, Digest: k.digest}.String())
	}
	return k
}

// reference reads HOST/PATH[:TAG][@DIGEST] of an image whose digest stands beside it as
// well, in hex.
func (k *candidate) reference(name, hex string) *candidate {
	repo, tag, digest, err := splitReference(name, false)
	if err != nil {
		k.trouble = "the URI names no repository"
		return k
	}
	if hex != "" {
		d, err := parseDigest("sha256:" + hex)
		switch {
		case err != nil:
			k.trouble = "its digest is no sha256 digest"
		case !digest.IsZero() && digest != d:
			k.trouble = "the provenance gives two different digests of it"
		}
		digest = d
	}
	k.repo, k.tag, k.digest = repo, tag, digest
	if k.trouble == "" {
		k.claim.Name = clip(attest.BaseName{Repository: repo, Tag: tag, Digest: digest}.String())
	}
	return k
}
