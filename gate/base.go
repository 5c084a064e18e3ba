package gate

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
)

const (
	maxChain = 8 // images of a chain of bases
	// freshFor is how long a base's freshness is answered without asking again.
	freshFor = time.Minute
	// freshTimeout bounds one look at a registry: the answer says that it is not
	// known then.
	freshTimeout = 15 * time.Second
)

// From where a base is known.
const (
	knownFromRecord   = "record"
	knownFromRegistry = "registry"
)

// Base returns an image, the base that it is built on, the base of that, and so on
// for at most eight images, with the size of the log that the answer is of. The
// caller needs the role auditors, promoters or signers for the image's repository.
//
// Of an image in a repository for which the caller has none of these roles only
// what the registry says is given, and only when the layers show that the image before
// is built on it: else anybody could name a base to have it looked up, also in
// provenance of their own (attacks K07).
//
// What cannot be found out is said in the link; it fails the whole only for the image
// that was asked about.
func (g *Gate) Base(ctx context.Context, id attest.Identity, ref attest.ImageRef) ([]BaseLink, uint64, error) {
	if err := g.Ready(); err != nil {
		return nil, 0, err
	}
	if err := g.mayReadRepository(id, ref.Repository, baseReaders...); err != nil {
		return nil, 0, err
	}
	if err := g.current(); err != nil {
		return nil, 0, err
	}
	size := g.Ledger.Size()
	chain, err := g.chain(ctx, id, ref, size)
	if err != nil {
		return nil, 0, err
	}
	g.freshen(ctx, id, chain)
	return chain, size, nil
}

// chain returns the links, each with a detail in State when something ends the
// chain there.
func (g *Gate) chain(ctx context.Context, id attest.Identity, ref attest.ImageRef, size uint64) ([]BaseLink, error) {
	var chain []BaseLink
	for next := ref; ; {
		link, away, err := g.baseLink(ctx, id, next, size)
		if err == nil && away != nil && len(chain) == 0 {
			err = away
		}
		if err != nil {
			return nil, err
		}
		if away != nil {
			link.Base, link.State.Detail = attest.Base{Result: attest.Unclaimed}, reasonFor(away)
		}
		chain = append(chain, link)
		next = attest.ImageRef{Repository: link.Base.Repository, Digest: link.Base.Digest}
		last := &chain[len(chain)-1].State
		switch {
		case !g.mayFollow(id, link.Base):
			return chain, nil
		case slices.ContainsFunc(chain, func(l BaseLink) bool { return l.Ref == next }):
			last.Detail = "the chain comes back to " + next.String()
			return chain, nil
		case len(chain) == maxChain:
			last.Detail = "the chain goes on: ask for the base of " + next.String()
			return chain, nil
		}
	}
}

var baseReaders = []policy.Role{policy.Auditors, policy.Promoters, policy.Signers}

func (g *Gate) mayReadBase(id attest.Identity, repo attest.Repository) bool {
	return g.mayReadRepository(id, repo, baseReaders...) == nil
}

// mayFollow reports whether a base is to be looked up for the caller.
func (g *Gate) mayFollow(id attest.Identity, b attest.Base) bool {
	switch {
	case b.Repository == "" || b.Digest.IsZero() || b.Result == attest.Contradicted:
		return false
	case b.Result.Proven():
		return true
	}
	return g.mayReadBase(id, b.Repository)
}

// reasonFor is what a person reads of an error of the registry.
func reasonFor(err error) string {
	var e *attest.Error
	if !errors.As(err, &e) {
		return string(attest.Internal)
	}
	return string(e.Reason) + ": " + e.Message
}

func notKnown(why string) attest.BaseState {
	return attest.BaseState{Freshness: attest.FreshnessUnknown, Detail: why}
}

// baseLink says what is known of one image, but not yet how fresh its base is. away
// says why the registry does not give the image.
func (g *Gate) baseLink(ctx context.Context, id attest.Identity, ref attest.ImageRef, size uint64) (l BaseLink, away, err error) {
	l.Ref = ref
	if g.mayReadBase(id, ref.Repository) {
		if err := g.describeLink(ctx, &l, size); err != nil || l.KnownFrom != "" {
			return l, nil, err
		}
	}
	ref.Repository = g.Registry.Readable(ref.Repository) // bases go by their canonical names
	img, away := g.Images(ctx, ref, "", g.tells(id))
	l.Base, l.KnownFrom = img.Base, knownFromRegistry
	return l, away, ctx.Err()
}

// describeLink adds what is recorded of an image.
func (g *Gate) describeLink(ctx context.Context, l *BaseLink, size uint64) (err error) {
	var recorded bool
	if l.Base, l.Record, recorded, err = g.recordedBase(ctx, l.Ref); err != nil {
		return err
	}
	if recorded {
		l.KnownFrom = knownFromRecord
	}
	evidence, err := g.evidence.about(ctx, l.Ref, size)
	if err != nil {
		return err
	}
	v := g.Policy.DecideSigned(policy.Request{Ref: l.Ref, Evidence: evidence, Now: g.Now().UTC()})
	if l.Signed = v.Allowed; v.Allowed {
		l.Summary = v.Summary
	}
	l.Stages, err = g.holders(ctx, l.Ref)
	return err
}

// recordedBase returns the base that the newest provenance of an image names.
func (g *Gate) recordedBase(ctx context.Context, ref attest.ImageRef) (attest.Base, attest.RecordID, bool, error) {
	rec, p, found, err := g.newestProvenance(ctx, ref)
	return p.Internal().Base, rec.ID, found, err
}

func (g *Gate) newestProvenance(ctx context.Context, ref attest.ImageRef) (rec attest.Record, p attest.Provenance, found bool, err error) {
	metas, err := g.Ledger.Find(ctx, ledger.Query{Kind: attest.KindProvenance, Limit: 1, Facets: []attest.Facet{
		{Name: attest.FacetDigest, Value: ref.Digest.String()}, {Name: attest.FacetRepository, Value: string(ref.Repository)},
	}})
	if err != nil || len(metas) == 0 {
		return rec, p, false, err
	}
	if rec, err = g.Ledger.Get(ctx, metas[0].ID); err != nil {
		return rec, p, false, err
	}
	s, err := statementOf(rec)
	if err != nil {
		return rec, p, false, err
	}
	p, err = attest.ParseProvenance(s.Predicate)
	return rec, p, err == nil, err
}

// Provenance returns the newest provenance of an image, for auditors and promoters of
// its repository. RECORD_NOT_FOUND when there is none.
func (g *Gate) Provenance(ctx context.Context, id attest.Identity, ref attest.ImageRef) (attest.Record, attest.Provenance, error) {
	if err := g.Ready(); err != nil {
		return attest.Record{}, attest.Provenance{}, err
	}
	if err := g.mayReadRepository(id, ref.Repository, policy.Auditors, policy.Promoters); err != nil {
		return attest.Record{}, attest.Provenance{}, err
	}
	rec, p, found, err := g.newestProvenance(ctx, ref)
	if err == nil && !found {
		err = attest.Errorf(attest.RecordNotFound, "there is no provenance of %s: sign it in the CI job that builds it", ref)
	}
	return rec, p, err
}

// holders returns the stages, as TRACK/STAGE, whose consumers run the image now.
func (g *Gate) holders(ctx context.Context, ref attest.ImageRef) ([]string, error) {
	var out []string
	for _, track := range g.Policy.Tracks() {
		if !covers(track, ref.Repository) {
			continue
		}
		for _, stage := range track.Stages() {
			p, err := g.running(ctx, track.Name, stage.Name, ref.Repository)
			if err != nil {
				return nil, err
			}
			if p != nil && slices.Contains(p.Digests, ref.Digest) {
				out = append(out, track.Name+"/"+stage.Name)
			}
		}
	}
	return out, nil
}

// freshen adds to each link how fresh its base is. Registries are asked at the same
// time.
func (g *Gate) freshen(ctx context.Context, id attest.Identity, chain []BaseLink) {
	var group errgroup.Group
	for i := range chain {
		group.Go(func() error {
			l := &chain[i]
			ended := l.State.Detail
			if l.State = g.baseState(ctx, id, l.Base); ended != "" {
				l.State.Detail = ended // says more than that no base is known
			}
			return nil
		})
	}
	_ = group.Wait() // no function returns an error
}

// baseState returns how fresh a base is, or why that is not known.
func (g *Gate) baseState(ctx context.Context, id attest.Identity, b attest.Base) attest.BaseState {
	switch {
	case b.Result == attest.Scratch:
		return notKnown("it is said to be built from nothing")
	case b.Result == attest.Contradicted:
		return notKnown("the layers are not those of the base that is claimed")
	case b.Result == attest.Unclaimed:
		return notKnown("no base is known")
	case b.Repository == "" || b.Digest.IsZero():
		return notKnown(whyUnchecked(b))
	case !g.mayFollow(id, b):
		return notKnown("nothing but somebody's word says that it is the base, and you hold no role for " + string(b.Repository))
	case b.Tag == "":
		return notKnown("the base is known without a tag: there is nothing to compare")
	}
	return g.freshness(ctx, b)
}

// whyUnchecked returns what stood in the way of proving a base.
func whyUnchecked(b attest.Base) string {
	if len(b.Claims) > 0 && b.Claims[0].Detail != "" {
		return b.Claims[0].Detail
	}
	return "the base is known without a digest: there is nothing to compare"
}

// freshness compares a base with what its tag names now, unless that was done within
// the last minute. It answers FRESHNESS_UNKNOWN, with what was last seen, when the
// registry cannot be asked.
func (g *Gate) freshness(ctx context.Context, b attest.Base) attest.BaseState {
	last, seen, err := g.Ledger.BaseState(ctx, b)
	if err != nil {
		g.Logger.Warn("reading the freshness of a base", "base", b.String(), "error", err)
	}
	if seen && g.Now().Sub(last.Checked).Abs() < freshFor {
		return last
	}
	state, err := share(ctx, g, freshnessKey(b), func(ctx context.Context) (attest.BaseState, error) { return g.checkBase(ctx, b) })
	if err == nil {
		return state
	}
	why := reasonFor(err)
	if seen {
		why += "; " + string(last.Freshness) + " on " + attest.Time(last.Checked)
	}
	return notKnown(why)
}

// freshnessKey is that of the look at a base's tag that several callers share.
func freshnessKey(b attest.Base) string {
	var manifests []string
	for _, p := range b.Platforms {
		manifests = append(manifests, p.Base.Hex())
	}
	slices.Sort(manifests)
	return attest.Key(append([]string{"freshness", b.String()}, slices.Compact(manifests)...)...)
}

// checkBase asks the registry how fresh a base is and remembers the answer. A
// registry that asked to be left alone is.
func (g *Gate) checkBase(ctx context.Context, b attest.Base) (attest.BaseState, error) {
	host, key := b.Repository.Host(), freshnessKey(b)
	if until := g.sweeper.rests(host, key); g.Now().Before(until) {
		return attest.BaseState{}, attest.Errorf(attest.RegistryUnavailable, "registry %s is not asked before %s: it was busy or away", host, attest.Time(until))
	}
	ctx, cancel := context.WithTimeout(ctx, freshTimeout)
	defer cancel()
	state, err := g.Registry.Freshness(ctx, b)
	g.sweeper.asked(host, key, g.Now(), err)
	if err != nil {
		return attest.BaseState{}, err
	}
	state.Checked = g.Now().UTC()
	noted, err := g.Ledger.PutBaseState(ctx, b, state)
	if err != nil {
		g.Logger.Warn("noting the freshness of a base", "base", b.String(), "error", err)
	}
	return noted, nil
}

// followed finds the bases that the service follows for package registry. That it
// cannot look is an error: an image on a followed base must not pass for one without.
func (g *Gate) followed(ctx context.Context, prefixes []attest.Digest) ([]registry.FollowedBase, error) {
	found, err := g.Ledger.FollowedBases(ctx, prefixes)
	if err != nil {
		return nil, err
	}
	out := make([]registry.FollowedBase, len(found))
	for i, f := range found {
		out[i] = registry.FollowedBase{BaseName: f.BaseName, Platform: f.Platform, Manifest: f.Manifest, Prefix: f.Prefix, Layers: f.Layers}
	}
	return out, nil
}
