package registry

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hallmarkd/hallmark/attest"
)

// ProveLayers reports whether an image with the layers image is built on one
// with the layers base: all of the base's, at least one, are the image's first.
// Layers are compared by digest, so this is a proof without reading any of them
// (facts/ci-identity 3.2 step 4).
func ProveLayers(image, base []attest.Digest) bool {
	return len(base) > 0 && len(base) <= len(image) && slices.Equal(image[:len(base)], base)
}

// maxCandidates bounds how many claims about a base are looked up for one image.
const maxCandidates = 8

// Annotations that name a base (image-spec annotations.md).
const (
	annotationBaseName   = "org.opencontainers.image.base.name"
	annotationBaseDigest = "org.opencontainers.image.base.digest"
)

// candidate is a claim about the base with what it takes to check it.
type candidate struct {
	claim   attest.BaseClaim
	repo    attest.Repository // where it was named; "" when it names none
	tag     string
	digest  attest.Digest // as claimed, then as found
	about   []int         // the parts it speaks of
	proof   []attest.BasePart
	trouble string // why it cannot be looked up
}

func (k *candidate) settle(result attest.BaseResult, detail string) {
	k.claim.Result, k.claim.Detail, k.claim.Digest = result, detail, k.digest
}

func (k *candidate) size() int {
	n := 0
	for _, p := range k.proof {
		n += p.Layers
	}
	return n
}

// base collects the claims about an image's base and checks each.
func (c *Client) base(ctx context.Context, doc *document, parts []part, hint *candidate, followed Followed) (attest.Base, error) {
	candidates := annotated(doc, parts)
	if hint != nil {
		hint.about = everything(parts)
		// The caller's comes first so that no number of annotations crowds it out.
		candidates = append([]*candidate{hint}, candidates...)
	}
	found, err := c.matched(ctx, followed, parts)
	if err != nil {
		return attest.Base{}, err
	}
	if len(candidates)+len(found) == 0 {
		return attest.Base{Result: attest.Unclaimed}, nil
	}
	for i, k := range candidates {
		if i >= maxCandidates {
			k.settle(attest.Claimed, "not looked up: the image names too many bases")
			continue
		}
		if err := c.judge(ctx, k, doc, parts); err != nil {
			return attest.Base{}, err
		}
	}
	return c.choose(append(candidates, found...)), nil
}

// choose picks the claim that stands for the base and keeps the others behind
// it. Of several proved ones the longest prefix is the immediate base, and an
// annotation is preferred to the caller's word.
func (c *Client) choose(candidates []*candidate) attest.Base {
	rank := map[attest.BaseResult]int{attest.ProvenLayers: 0, attest.Matched: 0, attest.Contradicted: 1, attest.Claimed: 2}
	slices.SortStableFunc(candidates, func(a, b *candidate) int {
		annotation := func(k *candidate) int {
			if k.claim.From == attest.BaseFromAnnotation {
				return 0
			}
			return 1
		}
		return cmp.Or(
			cmp.Compare(rank[a.claim.Result], rank[b.claim.Result]),
			cmp.Compare(b.size(), a.size()),
			cmp.Compare(annotation(a), annotation(b)),
		)
	})
	first := candidates[0]
	base := attest.Base{Result: first.claim.Result, Repository: c.canonical(first.repo), Tag: first.tag, Digest: first.digest}
	if first.claim.Result.Proven() {
		base.Platforms = first.proof
	}
	if base.Repository == "" {
		base.Digest = attest.Digest{} // a digest in no repository is only a claim
	}
	for _, k := range candidates {
		base.Claims = append(base.Claims, k.claim)
	}
	return base
}

// canonical returns the name under which a repository is recorded: that of the
// registry it mirrors, by the longest prefix that is configured.
func (c *Client) canonical(repo attest.Repository) attest.Repository {
	best, out := -1, repo
	for _, m := range c.mirrors {
		rest, ok := strings.CutPrefix(string(repo), m.From+"/")
		if ok && len(m.From) > best {
			best, out = len(m.From), attest.Repository(m.To+"/"+rest)
		}
	}
	return out
}

func everything(parts []part) []int {
	out := make([]int, len(parts))
	for i := range out {
		out[i] = i
	}
	return out
}

// annotated returns the claims in the annotations of the index and of each
// platform's manifest. Labels in the image's config are not asked: builders
// inherit them, so that they often describe the base's base.
func annotated(doc *document, parts []part) []*candidate {
	var out []*candidate
	add := func(annotations map[string]string, about []int) {
		name, digest := annotations[annotationBaseName], annotations[annotationBaseDigest]
		if name == "" && digest == "" {
			return
		}
		k := annotation(name, digest)
		for _, other := range out {
			if other.claim == k.claim && other.digest == k.digest {
				for _, p := range about {
					if !slices.Contains(other.about, p) {
						other.about = append(other.about, p)
					}
				}
				return
			}
		}
		k.about = about
		out = append(out, k)
	}
	if doc.index != nil {
		add(doc.index.Annotations, everything(parts))
	}
	for i, p := range parts {
		add(p.doc.image.Annotations, []int{i})
	}
	return out
}

// annotation reads a claim. Builders write the name unqualified, too, and mean
// Docker Hub by that.
func annotation(name, digest string) *candidate {
	k := &candidate{claim: attest.BaseClaim{From: attest.BaseFromAnnotation, Name: clip(name)}}
	repo, tag, at, err := splitReference(name, true)
	switch {
	case name == "":
		k.trouble = "the annotation gives a digest but no repository"
	case err != nil:
		k.trouble = "the annotation is no image reference"
	}
	k.repo, k.tag, k.digest = repo, tag, at
	if digest == "" {
		return k
	}
	d, err := parseDigest(digest)
	if err != nil {
		k.trouble = "the annotated digest is no sha256 digest"
		return k
	}
	if !at.IsZero() && at != d {
		k.trouble = "the annotations name two different digests"
	}
	k.digest = d
	return k
}

// parseHint reads the caller's claim: nil for none, BAD_REFERENCE for one that
// is not HOST/PATH[:TAG][@DIGEST] with a tag or a digest.
func parseHint(hint string) (*candidate, error) {
	if hint == "" {
		return nil, nil
	}
	repo, tag, digest, err := splitReference(hint, false)
	if err != nil {
		return nil, err
	}
	if tag == "" && digest.IsZero() {
		return nil, attest.Errorf(attest.BadReference, "base %q needs a tag or a digest: write HOST/PATH:TAG or HOST/PATH@sha256:…", clip(hint))
	}
	return &candidate{claim: attest.BaseClaim{From: attest.BaseFromCaller, Name: hint}, repo: repo, tag: tag, digest: digest}, nil
}

// tagPattern is that of the distribution-spec, "Pulling manifests".
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)

// checkTag answers BAD_REFERENCE for what is no tag.
func checkTag(tag string) error {
	if !tagPattern.MatchString(tag) {
		return attest.Errorf(attest.BadReference, "%q is not a tag: letters, digits, '.', '_' and '-', at most 128", clip(tag))
	}
	return nil
}

// parseDigest is attest.ParseDigest without the zero digest, which stands for
// none here: a claim pinned to it must not be looked up by its tag.
func parseDigest(s string) (attest.Digest, error) {
	d, err := attest.ParseDigest(s)
	if err == nil && d.IsZero() {
		err = attest.Errorf(attest.BadDigest, "the digest is all zeros, which is that of nothing")
	}
	return d, err
}

// splitReference reads HOST/PATH[:TAG][@DIGEST]. With short, a name without a
// host is one of Docker Hub.
func splitReference(s string, short bool) (repo attest.Repository, tag string, d attest.Digest, err error) {
	name, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest {
		if d, err = parseDigest(digest); err != nil {
			return "", "", attest.Digest{}, err
		}
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name, tag = name[:i], name[i+1:]
		if err := checkTag(tag); err != nil {
			return "", "", attest.Digest{}, err
		}
	}
	repo, err = attest.ParseRepository(name)
	if err != nil && short {
		if !strings.Contains(name, "/") {
			name = "library/" + name
		}
		repo, err = attest.ParseRepository(dockerHub + "/" + name)
	}
	if err != nil {
		return "", "", attest.Digest{}, err
	}
	if path, ok := strings.CutPrefix(string(repo), dockerHubAPI+"/"); ok {
		repo = attest.Repository(dockerHub + "/" + path)
	}
	return repo, tag, d, nil
}

// judge looks a candidate up and settles it. Only a registry that should answer
// and does not is an error: to call that CLAIMED would let whoever can disturb
// the network turn a disproved base into an unproved one.
func (c *Client) judge(ctx context.Context, k *candidate, doc *document, parts []part) error {
	switch {
	case k.trouble != "":
		k.settle(attest.Claimed, k.trouble)
		return nil
	case c.hosts[k.repo.Host()] == nil:
		k.settle(attest.Claimed, "registry "+k.repo.Host()+" is not configured")
		return nil
	case k.tag == "" && k.digest.IsZero():
		k.settle(attest.Claimed, "the annotation gives neither tag nor digest")
		return nil
	}
	byTag := k.digest.IsZero()
	reference := k.digest.String()
	if byTag {
		reference = k.tag
	}
	found, err := c.get(ctx, k.repo, reference)
	if err == nil && !byTag && found.digest != k.digest {
		err = attest.Errorf(attest.DigestMismatch, "the registry answers with another digest")
	}
	var bases [][]*document
	if err == nil {
		k.digest = found.digest
		bases, err = c.basesFor(ctx, k, found, parts)
	}
	if err != nil {
		return k.unfetchable(err)
	}
	c.compare(k, byTag, doc, parts, bases)
	return nil
}

// unfetchable settles a claim whose base cannot be had.
func (k *candidate) unfetchable(err error) error {
	var known *attest.Error
	if !errors.As(err, &known) || known.Reason == attest.RegistryUnavailable {
		return err
	}
	k.settle(attest.Claimed, "the base cannot be fetched: "+string(known.Reason))
	return nil
}

// basesFor returns, for each part that the candidate speaks of, the manifests of
// the base that may lie under it: the base itself, or of an index those of equal
// platform. For an image without an index these are all: which platform it is
// for is written in its config only, and the layers decide anyway.
func (c *Client) basesFor(ctx context.Context, k *candidate, found *document, parts []part) ([][]*document, error) {
	out := make([][]*document, len(k.about))
	if found.index == nil {
		for i := range out {
			out[i] = []*document{found}
		}
		return out, nil
	}
	all, err := platforms(found.index)
	if err != nil {
		return nil, err
	}
	wanted := slices.DeleteFunc(all, func(d v1.Descriptor) bool {
		return !slices.ContainsFunc(k.about, func(i int) bool { return samePlatform(parts[i].platform, d.Platform) })
	})
	docs, err := c.children(ctx, k.repo, wanted)
	if err != nil {
		return nil, err
	}
	for i, p := range k.about {
		for j, d := range wanted {
			if samePlatform(parts[p].platform, d.Platform) {
				out[i] = append(out[i], docs[j])
			}
		}
	}
	return out, nil
}

// samePlatform compares os, architecture and variant; arm64 is arm64/v8 and arm
// is arm/v7. An image whose platform is not known fits any.
func samePlatform(image, base *v1.Platform) bool {
	if image == nil {
		return true
	}
	return base != nil && image.OS == base.OS && image.Architecture == base.Architecture && variant(image) == variant(base)
}

func variant(p *v1.Platform) string {
	usual := map[string]string{"arm64": "v8", "arm": "v7"}
	return cmp.Or(p.Variant, usual[p.Architecture])
}

// compare settles a candidate whose base was fetched.
func (c *Client) compare(k *candidate, byTag bool, doc *document, parts []part, bases [][]*document) {
	if k.digest == doc.digest || slices.ContainsFunc(parts, func(p part) bool { return p.doc.digest == k.digest }) {
		k.settle(attest.Contradicted, "an image is not its own base")
		return
	}
	var missing, empty []string
	for i, p := range k.about {
		if b := longest(parts[p].doc, bases[i]); b != nil {
			k.proof = append(k.proof, attest.BasePart{Platform: parts[p].name, Image: parts[p].doc.digest, Base: b.digest, Layers: len(b.image.Layers)})
			continue
		}
		missing = append(missing, cmp.Or(parts[p].name, "the image"))
		if slices.ContainsFunc(bases[i], func(b *document) bool { return len(b.image.Layers) == 0 }) {
			empty = append(empty, parts[p].name)
		}
	}
	switch {
	case len(missing) == 0 && len(k.about) == len(parts):
		k.settle(attest.ProvenLayers, "")
	case len(missing) == 0:
		k.settle(attest.Claimed, "claimed and proved for some platforms only")
		k.proof = nil
	case len(empty) == len(missing):
		k.settle(attest.Claimed, "the base has no layers that could prove it")
		k.proof = nil
	case byTag && k.claim.From == attest.BaseFromAnnotation:
		// Tags move: that it names other layers now disproves nothing about then.
		k.digest, k.proof = attest.Digest{}, nil
		k.settle(attest.Claimed, "the tag now names an image with other layers")
	default:
		k.proof = nil
		k.settle(attest.Contradicted, clip("the base's layers are not the first layers of "+strings.Join(missing, ", ")))
	}
}

// dockerZstd is a layer type that runtimes unpack and the library does not list.
const dockerZstd = "application/vnd.docker.image.rootfs.diff.tar.zstd"

// longest returns the manifest with most layers among those that prove it, or nil.
// A blob of another type proves nothing: runtimes leave it out when they unpack
// the image (containerd getLayers), so it is in the manifest and not in what runs.
func longest(image *document, bases []*document) *document {
	if !image.onlyLayers() {
		return nil
	}
	var best *document
	for _, b := range bases {
		if b.onlyLayers() && ProveLayers(image.layers(), b.layers()) && (best == nil || len(b.image.Layers) > len(best.image.Layers)) {
			best = b
		}
	}
	return best
}
