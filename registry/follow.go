package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/hallmarkd/hallmark/attest"
)

// Followed finds bases whose complete layers have one of these prefix hashes,
// which are those of every prefix of an image's layers (see PrefixHashes).
type Followed func(ctx context.Context, prefixes []attest.Digest) ([]FollowedBase, error)

// FollowedBase is one platform of a base image that the service follows, as it
// was under its tag at some time. Only a whole manifest of a configured
// repository is one, never some part of it: that an image begins with its layers
// says what it was built on, where sharing a few of them would say nothing.
type FollowedBase struct {
	attest.BaseName               // canonical repository, tag, digest of the index if it has one
	Platform        string        // os/arch[/variant]; "" for a base without an index
	Manifest        attest.Digest // of this platform
	Prefix          attest.Digest // the last of PrefixHashes of its layers
	Layers          int           // how many those are
}

// prefixDomain keeps these hashes apart from all others.
const prefixDomain = "hallmark: hash of an image's first layers, version 1\n"

// PrefixHashes returns the hashes of an image's first layers: element n-1 is that
// of layers[:n]. Each is made of the one before, so that all are made in one go.
func PrefixHashes(layers []attest.Digest) []attest.Digest {
	out := make([]attest.Digest, len(layers))
	last := attest.Hash([]byte(prefixDomain))
	for i, l := range layers {
		h := sha256.New()
		h.Write(last[:])
		h.Write(l[:])
		last = attest.Digest(h.Sum(nil))
		out[i] = last
	}
	return out
}

// Follow reads what a tag names now, one entry for each platform. The repository
// may be given by its canonical or a mirror's name; entries have the canonical
// one. A platform with blobs that are no layers, or without any, is left out: its
// layers can prove nothing.
//
// Errors are those of Image; REGISTRY_UNAVAILABLE has the metadata retry_after,
// in seconds, where the registry said when to come back.
func (c *Client) Follow(ctx context.Context, repo attest.Repository, tag string) ([]FollowedBase, error) {
	ctx, cancel := c.within(ctx)
	defer cancel()
	if err := checkTag(tag); err != nil {
		return nil, err
	}
	from := c.Readable(repo)
	doc, parts, free, err := c.parts(ctx, c.room.bases, from, tag)
	if err != nil {
		return nil, err
	}
	defer free()
	name := attest.BaseName{Repository: c.canonical(repo), Tag: tag, Digest: doc.digest}
	var out []FollowedBase
	for _, p := range parts {
		hashes := PrefixHashes(p.doc.layers())
		if len(hashes) == 0 || !p.doc.onlyLayers() {
			continue
		}
		out = append(out, FollowedBase{BaseName: name, Platform: p.name, Manifest: p.doc.digest, Prefix: hashes[len(hashes)-1], Layers: len(hashes)})
	}
	return out, nil
}

// Freshness compares a base with what its tag names now. Since is left for the
// caller, who knows what was said before. No tag, or one that cannot be read for
// another reason than an outage, is FRESHNESS_UNKNOWN with a detail.
//
// It answers REGISTRY_UNAVAILABLE, with the metadata retry_after in seconds where
// the registry said when to come back.
func (c *Client) Freshness(ctx context.Context, b attest.Base) (attest.BaseState, error) {
	ctx, cancel := c.within(ctx)
	defer cancel()
	state := attest.BaseState{Freshness: attest.FreshnessUnknown, Checked: time.Now()}
	if b.Tag == "" || b.Repository == "" || b.Digest.IsZero() {
		state.Detail = "the base is known without a tag or a digest: there is nothing to compare"
		return state, nil
	}
	err := c.compareTag(ctx, b, &state)
	if err == nil || outage(err) {
		return state, err
	}
	state.Freshness, state.Detail = attest.FreshnessUnknown, "the tag cannot be compared: "+string(attest.ReasonOf(err))
	return state, nil
}

// outage reports whether err says nothing about what was asked for.
func outage(err error) bool {
	var known *attest.Error
	return !errors.As(err, &known) || known.Reason == attest.RegistryUnavailable
}

// compareTag fills state in.
func (c *Client) compareTag(ctx context.Context, b attest.Base, state *attest.BaseState) error {
	if err := checkTag(b.Tag); err != nil {
		return err
	}
	repo := c.Readable(b.Repository)
	// 1. A HEAD does not count against the limits of the large registries, and
	// most tags do not move.
	d, err := c.head(ctx, repo, b.Tag)
	if err != nil {
		return err
	}
	if state.Current = d; d == b.Digest {
		state.Freshness = attest.Fresh
		return nil
	}
	// 2. What it names now, by its bytes.
	now, current, free, err := c.parts(ctx, c.room.bases, repo, b.Tag)
	if err != nil {
		return err
	}
	defer free()
	state.Current = now.digest
	names := func(d attest.Digest) bool {
		return slices.ContainsFunc(current, func(p part) bool { return p.doc.digest == d })
	}
	// A base that was pinned to its platform's manifest is still what the tag
	// gives to that platform.
	if now.digest == b.Digest || names(b.Digest) {
		state.Freshness = attest.Fresh
		return nil
	}
	// 3. The manifests that the image was built on, and their layers.
	was := b.Platforms
	if len(was) == 0 {
		if was, err = c.wholeBase(ctx, repo, b.Digest); err != nil {
			return err
		}
	}
	state.Freshness = attest.StaleIndexOnly
	for _, p := range was {
		if names(p.Base) {
			continue
		}
		same, err := c.sameLayers(ctx, repo, p, current)
		if err != nil {
			return err
		}
		if !same {
			state.Freshness = attest.StaleLayers
			return nil
		}
		state.Freshness = attest.StaleConfigOnly
	}
	return nil
}

// head returns the digest that the registry says a tag has; it is zero when the
// registry does not say so, and then has to be found from the bytes.
func (c *Client) head(ctx context.Context, repo attest.Repository, tag string) (attest.Digest, error) {
	s, err := c.session(ctx, repo, transport.PullScope)
	if err != nil {
		return attest.Digest{}, err
	}
	a, err := s.do(ctx, http.MethodHead, "manifests/"+tag, nil, maxOther, "Accept", strings.Join(accepted, ","))
	if err != nil {
		return attest.Digest{}, err
	}
	switch a.status {
	case http.StatusOK:
	case http.StatusNotFound:
		return attest.Digest{}, attest.Errorf(attest.SubjectNotFound, "%s has no tag %s", repo, tag)
	case http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return attest.Digest{}, nil
	default:
		return attest.Digest{}, s.host.refusal(a.status, nil)
	}
	d, err := attest.ParseDigest(a.header.Get("Docker-Content-Digest"))
	if err != nil {
		return attest.Digest{}, nil
	}
	return d, nil
}

// wholeBase returns all platforms of a base of which no proof says which of them
// were used.
func (c *Client) wholeBase(ctx context.Context, repo attest.Repository, d attest.Digest) ([]attest.BasePart, error) {
	doc, _, free, err := c.gather(ctx, c.room.single, repo, d.String(), alone)
	if err != nil {
		return nil, err
	}
	defer free()
	if doc.index == nil {
		return []attest.BasePart{{Base: d}}, nil
	}
	children, err := platforms(doc.index)
	if err != nil {
		return nil, err
	}
	var out []attest.BasePart
	for _, p := range children {
		out = append(out, attest.BasePart{Platform: platformName(p.Platform), Base: digestOf(p)})
	}
	return out, nil
}

// sameLayers reports whether a platform that the tag names now has the layers of
// the base's manifest p.
func (c *Client) sameLayers(ctx context.Context, repo attest.Repository, p attest.BasePart, current []part) (bool, error) {
	old, _, free, err := c.gather(ctx, c.room.single, repo, p.Base.String(), alone)
	if err != nil {
		return false, err
	}
	defer free()
	if old.image == nil {
		return false, attest.Errorf(attest.ManifestAmbiguous, "%s is recorded as a platform of a base and is an index", p.Base)
	}
	return slices.ContainsFunc(current, func(now part) bool {
		return samePlatform(namedPlatform(p.Platform), now.platform) && slices.Equal(now.doc.layers(), old.layers())
	}), nil
}

// namedPlatform is platformName's inverse; nil for none.
func namedPlatform(name string) *v1.Platform {
	p, err := v1.ParsePlatform(name)
	if name == "" || name == unspecified || err != nil {
		return nil
	}
	return p
}

// matched returns the followed bases that lie under every platform of an image,
// those of most layers first. That nobody named them makes the name an inference:
// the layers are proved all the same. partly is one that lies under some platform
// only: not the image's base, and yet nothing that an image from nothing has.
func (c *Client) matched(ctx context.Context, followed Followed, parts []part) (all []*candidate, partly *candidate, err error) {
	if followed == nil {
		return nil, nil, nil
	}
	hashes := make([][]attest.Digest, len(parts))
	var ask []attest.Digest
	asked := map[attest.Digest]bool{}
	for i, p := range parts {
		if !p.doc.onlyLayers() {
			continue // nothing is proved of this one
		}
		hashes[i] = PrefixHashes(p.doc.layers()[:min(len(p.doc.image.Layers), maxPrefixes)])
		for _, h := range hashes[i] {
			if !asked[h] {
				asked[h], ask = true, append(ask, h)
			}
		}
	}
	if len(ask) == 0 {
		return nil, nil, nil
	}
	found, err := followed(ctx, ask)
	if err != nil {
		return nil, nil, err
	}
	names := map[attest.BaseName][]FollowedBase{}
	for _, f := range found {
		names[f.BaseName] = append(names[f.BaseName], f)
	}
	for name, bases := range names {
		switch k := matching(name, bases, parts, hashes); {
		case len(k.proof) == len(parts):
			k.settle(attest.Matched, "")
			all = append(all, k)
		case k.under() && (partly == nil || k.claim.Name < partly.claim.Name):
			partly = k
		}
	}
	slices.SortFunc(all, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(b.size(), a.size()), cmp.Compare(a.claim.Name, b.claim.Name))
	})
	return all, partly, nil
}

// maxPrefixes is more layers than any runtime can stack (overlayfs takes 500, the
// engines 127).
const maxPrefixes = 512

// matching returns a candidate with the proof of each part that one followed base is
// under.
func matching(name attest.BaseName, bases []FollowedBase, parts []part, hashes [][]attest.Digest) *candidate {
	k := &candidate{
		claim: attest.BaseClaim{From: attest.BaseFromFollowed, Name: name.String()},
		repo:  name.Repository, tag: name.Tag, digest: name.Digest, about: everything(parts),
	}
	for i, p := range parts {
		var best FollowedBase
		for _, f := range bases {
			under := f.Layers > best.Layers && f.Layers <= len(hashes[i]) && hashes[i][f.Layers-1] == f.Prefix
			if under && f.Manifest != p.doc.digest && (f.Platform == "" || samePlatform(p.platform, namedPlatform(f.Platform))) {
				best = f
			}
		}
		if best.Layers == 0 {
			continue
		}
		k.proof = append(k.proof, attest.BasePart{Platform: p.name, Image: p.doc.digest, Base: best.Manifest, Layers: best.Layers})
	}
	return k
}

// Readable returns where a repository is read: itself when its registry is
// configured, else the mirror that is, by the longest prefix. It never answers
// with a place whose contents are recorded under another name.
func (c *Client) Readable(repo attest.Repository) attest.Repository {
	best, out := -1, repo
	if c.hosts[repo.Host()] != nil {
		return repo
	}
	for _, m := range c.mirrors {
		rest, ok := strings.CutPrefix(string(repo), m.To+"/")
		at := attest.Repository(m.From + "/" + rest)
		if ok && len(m.To) > best && c.hosts[at.Host()] != nil && c.canonical(at) == repo {
			best, out = len(m.To), at
		}
	}
	return out
}
