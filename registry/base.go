package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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

const (
	maxCandidates  = 8  // claims about a base that are looked up for one image
	maxClaims      = 16 // claims of one source that are kept at all
	maxEquivalents = 32 // names of bases with the same layers that are kept
	maxBaseConfigs = 4  // configurations of a base that are read for one platform
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
	touches bool   // some platform at least is proved to be built on it
	aside   bool   // it was found not to be the base, without anybody having lied
}

func (k *candidate) settle(result attest.BaseResult, detail string) {
	k.claim.Result, k.claim.Detail, k.claim.Digest = result, clip(detail), k.digest
	if !result.Proven() {
		k.proof = nil
	}
}

// under reports whether some platform is built on the candidate, whatever is said of
// the others.
func (k *candidate) under() bool { return k.touches || len(k.proof) > 0 }

// size is how many layers of the image the candidate proves.
func (k *candidate) size() int {
	n := 0
	for _, p := range k.proof {
		n += p.Layers
	}
	return n
}

// inquiry is one search for the base of one image.
type inquiry struct {
	*Client
	repo   attest.Repository // the image's
	doc    *document
	parts  []part
	budget budget // of what is downloaded to compare contents

	mayRead func(attest.Repository) bool // nil: none
}

// base collects the claims about an image's base and checks each.
func (q *inquiry) base(ctx context.Context, hint *candidate, followed Followed) (attest.Base, error) {
	// 1. What is said, each source in the order in which it is preferred.
	if err := q.readConfigs(ctx); err != nil {
		return attest.Base{}, err
	}
	provenance, err := q.buildkit(ctx)
	if err != nil {
		return attest.Base{}, err
	}
	var caller []*candidate
	if hint != nil && !hint.scratch() {
		hint.about = everything(q.parts)
		caller = append(caller, hint)
	}
	candidates := interleave(caller, annotated(q.doc, q.parts), provenance.images, labelled(q.parts))
	// 2. What this service follows, which nobody has to name.
	matches, partly, err := q.matched(ctx, followed, q.parts)
	if err != nil {
		return attest.Base{}, err
	}
	// 3. Which of it is so.
	lookups := 0
	for _, k := range candidates {
		if !q.lookable(k) {
			continue
		}
		if lookups++; lookups > maxCandidates {
			k.settle(attest.Claimed, "not looked up: the image names too many bases")
			continue
		}
		if err := q.judge(ctx, k); err != nil {
			return attest.Base{}, err
		}
	}
	candidates = append(candidates, matches...)
	if k := fromNothing(hint, provenance, candidates, partly); k != nil {
		candidates = append(candidates, k)
	}
	return q.choose(candidates), nil
}

// interleave puts the first claim of each source before the second of any, so
// that no number of claims of one source crowds out another's.
func interleave(sources ...[]*candidate) []*candidate {
	var out []*candidate
	for i := range maxClaims {
		for _, s := range sources {
			if i < len(s) {
				out = append(out, s[i])
			}
		}
	}
	for _, s := range sources {
		if more := len(s) - maxClaims; more > 0 {
			last := s[maxClaims-1]
			last.trouble = fmt.Sprintf("not looked up: the image names too many bases, %d more are not listed", more)
		}
	}
	return out
}

// fromNothing returns the claim that an image has no base: the caller's word, or
// BuildKit's provenance that names no image where nothing else names one. One platform
// that is built on something shows that it is not so: a further one, for a machine that
// nobody has, hides no base.
func fromNothing(hint *candidate, provenance provenance, others []*candidate, partly *candidate) *candidate {
	switch {
	case hint.scratch():
	case provenance.complete && len(provenance.images)+len(others) == 0:
		hint = &candidate{claim: attest.BaseClaim{From: attest.BaseFromBuildKit, Name: scratch}}
	default:
		return nil
	}
	hint.settle(attest.Scratch, "")
	if partly != nil {
		others = append(slices.Clone(others), partly)
	}
	for _, k := range others {
		if k.claim.Result.Proven() {
			hint.settle(attest.Contradicted, "the image is built on "+attest.BaseName{Repository: k.repo, Tag: k.tag, Digest: k.digest}.String())
			break
		}
		if k.under() && hint.claim.Result == attest.Scratch {
			hint.settle(attest.Contradicted, "a platform of the image is built on "+k.claim.Name)
		}
	}
	return hint
}

// choose picks the claim that stands for the base and keeps the others behind
// it. Of several proved ones the longest prefix is the immediate base.
func (c *Client) choose(candidates []*candidate) attest.Base {
	slices.SortStableFunc(candidates, func(a, b *candidate) int {
		return cmp.Or(
			cmp.Compare(rank(a), rank(b)),
			cmp.Compare(b.size(), a.size()),
			cmp.Compare(strength(a), strength(b)),
			cmp.Compare(preference(a), preference(b)),
		)
	})
	out := attest.Base{Result: attest.Unclaimed}
	if len(candidates) > 0 && !candidates[0].aside {
		out = c.standing(candidates)
	}
	for _, k := range candidates {
		// A followed base beside the one chosen is an equivalent or a base's base.
		if k.claim.From != attest.BaseFromFollowed || k == candidates[0] {
			out.Claims = append(out.Claims, k.claim)
		}
	}
	return out
}

// standing returns the base that the first of the candidates, in order, says.
func (c *Client) standing(candidates []*candidate) attest.Base {
	first := candidates[0]
	out := attest.Base{Result: first.claim.Result, Repository: c.canonical(first.repo), Tag: first.tag, Digest: first.digest}
	if first.claim.Result.Proven() {
		out.Platforms = first.proof
		out.Equivalents = c.equivalents(&out, candidates)
	}
	// BuildKit does not say which of the images that it lists is the base.
	unmarked := func(k *candidate) bool {
		return k.claim.From == attest.BaseFromBuildKit && k.claim.Result == attest.Claimed && !k.aside
	}
	if unmarked(first) && slices.ContainsFunc(candidates[1:], unmarked) {
		out.Repository, out.Tag = "", ""
	}
	if out.Repository == "" {
		out.Digest = attest.Digest{} // a digest in no repository is only a claim
	}
	return out
}

// equivalents returns the names of the other proved candidates that end at the
// same layers as the chosen one. A chosen base without a tag takes that of the
// same digest from them: it is what its freshness is asked of.
func (c *Client) equivalents(chosen *attest.Base, candidates []*candidate) []attest.BaseName {
	var out []attest.BaseName
	for _, k := range candidates[1:] {
		if !k.claim.Result.Proven() || !slices.EqualFunc(k.proof, candidates[0].proof, func(a, b attest.BasePart) bool { return a.Layers == b.Layers }) {
			continue
		}
		name := attest.BaseName{Repository: c.canonical(k.repo), Tag: k.tag, Digest: k.digest}
		same := name.Repository == chosen.Repository && name.Digest == chosen.Digest
		if same && chosen.Tag == "" {
			chosen.Tag = name.Tag
		}
		if same && (name.Tag == chosen.Tag || name.Tag == "") || slices.Contains(out, name) || len(out) == maxEquivalents {
			continue
		}
		out = append(out, name)
	}
	return out
}

// rank orders what candidates came to.
func rank(k *candidate) int {
	switch {
	case k.claim.Result.Proven():
		return 0
	case k.aside:
		return 4
	}
	return map[attest.BaseResult]int{attest.Contradicted: 1, attest.Scratch: 2, attest.Claimed: 3}[k.claim.Result]
}

// strength orders proofs of the same layers.
func strength(k *candidate) int {
	return slices.Index([]attest.BaseResult{attest.ProvenLayers, attest.ProvenDiffIDs, attest.Matched}, k.claim.Result)
}

// preference orders sources: what the build wrote into the image before what is
// said of it elsewhere. Without a proof BuildKit's list comes last, which does
// not say what each image was for.
func preference(k *candidate) int {
	order := []string{attest.BaseFromAnnotation, attest.BaseFromBuildKit, attest.BaseFromCaller, attest.BaseFromLabel, attest.BaseFromFollowed}
	if !k.claim.Result.Proven() {
		order = []string{attest.BaseFromAnnotation, attest.BaseFromCaller, attest.BaseFromLabel, attest.BaseFromBuildKit}
	}
	return slices.Index(order, k.claim.From)
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

// lookable settles a candidate that names nothing which could be fetched.
func (q *inquiry) lookable(k *candidate) bool {
	switch at := q.Readable(k.repo); {
	case k.trouble != "":
		k.settle(attest.Claimed, k.trouble)
	case q.hosts[at.Host()] == nil:
		k.settle(attest.Claimed, "registry "+k.repo.Host()+" is not configured")
	case k.tag == "" && k.digest.IsZero():
		k.settle(attest.Claimed, "the "+k.claim.From+" gives neither tag nor digest")
	default:
		return true
	}
	return false
}

// judge looks a candidate up and settles it. Only a registry that should answer
// and does not is an error: to call that CLAIMED would let whoever can disturb
// the network turn a disproved base into an unproved one.
func (q *inquiry) judge(ctx context.Context, k *candidate) error {
	at := q.Readable(k.repo)
	byTag := k.digest.IsZero()
	reference := k.digest.String()
	if byTag {
		reference = k.tag
	}
	bases, free, err := q.basesFor(ctx, k, at, reference)
	if err != nil {
		err = k.unfetchable(err)
	} else {
		defer free()
		err = q.compare(ctx, k, at, byTag, bases)
	}
	if err == nil && byTag && !k.claim.Result.Proven() && !q.tells(k.repo) {
		// Nothing of what was found: not which digest, not even that there is one.
		k.digest, k.aside = attest.Digest{}, false
		k.settle(attest.Claimed, "it could not be shown to be the base")
	}
	return err
}

// tells reports whether the caller may learn what a repository holds.
func (q *inquiry) tells(repo attest.Repository) bool {
	return q.mayRead != nil && (q.mayRead(repo) || q.mayRead(q.canonical(repo)))
}

// unfetchable settles a claim whose base cannot be had.
func (k *candidate) unfetchable(err error) error {
	if outage(err) {
		return err
	}
	k.settle(attest.Claimed, "the base cannot be fetched: "+string(attest.ReasonOf(err)))
	return nil
}

// basesFor returns, for each part that the candidate speaks of, the manifests of
// the base that may lie under it: the base itself, or of an index those of equal
// platform. For an image without an index, whose platform is written in its
// configuration only and may be anything, these are all where none is equal: the
// layers decide anyway.
func (q *inquiry) basesFor(ctx context.Context, k *candidate, at attest.Repository, reference string) ([][]*document, func(), error) {
	wanted := make([][]v1.Descriptor, len(k.about))
	var list []v1.Descriptor
	found, docs, free, err := q.gather(ctx, q.room.bases, at, reference, func(found *document) (_ []v1.Descriptor, err error) {
		// What is found is kept even when the rest of it cannot be had.
		k.digest, list = found.digest, nil
		if found.index == nil {
			return nil, nil
		}
		all, err := platforms(found.index)
		if err != nil {
			return nil, err
		}
		for i, p := range k.about {
			wanted[i] = q.parts[p].candidates(all)
			for _, d := range wanted[i] {
				if !slices.ContainsFunc(list, func(other v1.Descriptor) bool { return other.Digest == d.Digest }) {
					list = append(list, d)
				}
			}
		}
		return list, nil
	})
	if err != nil {
		return nil, nil, err
	}
	out := make([][]*document, len(k.about))
	for i := range out {
		if found.index == nil {
			out[i] = []*document{found}
		}
		for _, d := range wanted[i] {
			j := slices.IndexFunc(list, func(other v1.Descriptor) bool { return other.Digest == d.Digest })
			out[i] = append(out[i], docs[j])
		}
	}
	return out, free, nil
}

// candidates returns the entries of a base's index for a part's platform.
func (p part) candidates(all []v1.Descriptor) []v1.Descriptor {
	of := func(want *v1.Platform) []v1.Descriptor {
		return slices.DeleteFunc(slices.Clone(all), func(d v1.Descriptor) bool { return !samePlatform(want, d.Platform) })
	}
	if p.platform == nil && p.config.platform != nil {
		if out := of(p.config.platform); len(out) > 0 {
			return out
		}
	}
	return of(p.platform)
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
func (q *inquiry) compare(ctx context.Context, k *candidate, at attest.Repository, byTag bool, bases [][]*document) error {
	if k.digest == q.doc.digest || slices.ContainsFunc(q.parts, func(p part) bool { return p.doc.digest == k.digest }) {
		k.settle(attest.Contradicted, "an image is not its own base")
		return nil
	}
	result := attest.ProvenLayers
	var differ, empty, squashed []string // platforms
	var undecided string
	for i, p := range k.about {
		this := q.parts[p]
		name := cmp.Or(this.name, "the image")
		b, by, why, err := q.under(ctx, at, this, bases[i])
		switch {
		case err != nil:
			return err
		case b != nil:
			k.proof = append(k.proof, attest.BasePart{Platform: this.name, Image: this.doc.digest, Base: b.digest, Layers: len(b.image.Layers)})
			if by == attest.ProvenDiffIDs {
				result = by
			}
		case why != "":
			undecided = cmp.Or(undecided, why)
		case slices.ContainsFunc(bases[i], func(b *document) bool { return len(b.image.Layers) == 0 }):
			empty = append(empty, name)
		case flattened(this.doc, bases[i]):
			squashed = append(squashed, name)
		default:
			differ = append(differ, name)
		}
	}
	k.touches = len(k.proof) > 0
	switch {
	case len(differ) > 0:
		k.disproved(byTag, "the base's layers are not the first layers of "+strings.Join(differ, ", "))
	case len(k.proof) == len(q.parts):
		k.settle(result, "")
	case undecided != "":
		k.settle(attest.Claimed, undecided)
	case len(squashed) > 0 && k.claim.From == attest.BaseFromBuildKit:
		k.disproved(byTag, "")
	case len(squashed) > 0:
		k.settle(attest.Claimed, "the layers of "+strings.Join(squashed, ", ")+" were squashed, so that they cannot show a base")
	case len(empty) > 0:
		k.settle(attest.Claimed, "the base has no layers that could prove it")
	default:
		k.settle(attest.Claimed, "claimed and proved for some platforms only")
	}
	return nil
}

// disproved settles a candidate whose layers are not under the image, by who
// named it: only for some sources that is a lie.
func (k *candidate) disproved(byTag bool, detail string) {
	switch {
	case k.claim.From == attest.BaseFromBuildKit:
		// It lists every image that the build used, and marks none as the base.
		k.aside = true
		k.settle(attest.Claimed, "a build stage: its layers are not in the image")
	case k.claim.From == attest.BaseFromLabel:
		k.settle(attest.Claimed, "an inherited label: the layers do not show it")
	case byTag && k.claim.From == attest.BaseFromAnnotation:
		// Tags move: that it names other layers now disproves nothing about then.
		k.digest = attest.Digest{}
		k.settle(attest.Claimed, "the tag now names an image with other layers")
	default:
		k.settle(attest.Contradicted, detail)
	}
}

// flattened reports whether an image may have been squashed after it was built:
// it has one layer, or fewer than any of the bases.
func flattened(image *document, bases []*document) bool {
	n := len(image.image.Layers)
	return len(bases) > 0 && (n == 1 || !slices.ContainsFunc(bases, func(b *document) bool { return len(b.image.Layers) <= n }))
}

// under returns the manifest with most layers among those that are proved to lie
// under a part, and by what. It returns none and why when that cannot be decided.
func (q *inquiry) under(ctx context.Context, at attest.Repository, p part, bases []*document) (*document, attest.BaseResult, string, error) {
	if b := longest(p.doc, bases); b != nil {
		return b, attest.ProvenLayers, "", nil
	}
	// Of those that may be it by their number of layers the longest are compared. There
	// are more only for an image that names no platform, or one that the base does not
	// have: they count as other layers, for the image's maker decides that (attacks D12).
	fitting := slices.DeleteFunc(slices.Clone(bases), func(b *document) bool { return len(b.image.Layers) > len(p.doc.image.Layers) })
	slices.SortStableFunc(fitting, func(a, b *document) int { return cmp.Compare(len(b.image.Layers), len(a.image.Layers)) })
	var undecided string
	for _, b := range fitting[:min(len(fitting), maxBaseConfigs)] {
		same, err := q.sameContent(ctx, at, p, b)
		if err != nil {
			var known *attest.Error
			if outage(err) || !errors.As(err, &known) {
				return nil, "", "", err
			}
			undecided = cmp.Or(undecided, "the contents of the layers could not be compared: "+known.Message)
		}
		if same {
			return b, attest.ProvenDiffIDs, "", nil
		}
	}
	return nil, "", undecided, nil
}

// longest returns the manifest with most layers among those that prove it, or nil.
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
