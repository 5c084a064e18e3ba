package gate

import (
	"context"
	"slices"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
)

// Verify answers whether a digest may run in a stage now or, without a stage,
// whether it carries signature and provenance by a configured signer. It records
// nothing and judges no rule of promotion again: what is running stays allowed to
// restart. The caller needs any role for the repository.
func (g *Gate) Verify(ctx context.Context, id attest.Identity, req VerifyRequest) (Decision, error) {
	if err := g.Ready(); err != nil {
		return Decision{}, err
	}
	if err := g.mayAsk(id, req.Ref.Repository); err != nil {
		return Decision{}, err
	}
	if err := g.current(); err != nil {
		return Decision{}, err
	}
	d := Decision{Ref: req.Ref, Time: g.Now().UTC(), LogSize: g.Ledger.Size()}
	if req.Stage == "" {
		return g.verifySigned(ctx, d)
	}
	track, err := g.Policy.Track(req.Ref.Repository, req.Track)
	if err != nil {
		return Decision{}, err
	}
	if _, err := track.Stage(req.Stage); err != nil {
		return Decision{}, err
	}
	d.Track, d.Stage, d.Policy = track.Name, req.Stage, g.policyFor(track.Name)
	return g.verifyStage(ctx, d)
}

// mayAsk admits whoever holds any role for the repository, so that nobody else
// learns that it exists.
func (g *Gate) mayAsk(id attest.Identity, repo attest.Repository) error {
	var first error
	for _, role := range []policy.Role{policy.Promoters, policy.Auditors, policy.Signers} {
		err := g.Policy.Allow(role, id, repo)
		if err == nil {
			return nil
		}
		if first == nil || attest.ReasonOf(err) == attest.SourceNotAllowed {
			first = err
		}
	}
	return first
}

func (g *Gate) verifySigned(ctx context.Context, d Decision) (Decision, error) {
	evidence, err := g.evidence.about(ctx, d.Ref, d.LogSize)
	if err != nil {
		return Decision{}, err
	}
	v := g.Policy.DecideSigned(policy.Request{Ref: d.Ref, Evidence: evidence, Now: d.Time})
	d.Results, d.Summary, d.Verdict = v.Results, v.Summary, verdict(v.Allowed)
	return d, nil
}

func verdict(allowed bool) Verdict {
	if allowed {
		return Allowed
	}
	return Denied
}

// verifyStage asks the fold of the log alone. Decision.Safe stays empty on the
// way to yes: this is the hot path of admission.
func (g *Gate) verifyStage(ctx context.Context, d Decision) (Decision, error) {
	running, err := g.running(ctx, d.Track, d.Stage, d.Ref.Repository)
	if err != nil {
		return Decision{}, err
	}
	result := attest.RuleResult{Rule: "promoted", Outcome: attest.OK, Required: "to be what " + d.Stage + " holds now"}
	if running != nil && slices.Contains(running.Digests, d.Ref.Digest) {
		result.Record, result.Found = running.ID, "promoted there by decision "+number(running.Index)
		d.Verdict, d.Results, d.Now = Allowed, []attest.RuleResult{result}, []StageEntry{entry(*running)}
		return d, nil
	}
	if err := g.fill(ctx, &d); err != nil {
		return Decision{}, err
	}
	result.Outcome, result.Reason = attest.Fail, attest.NotPromoted
	result.Found = "never been promoted to " + d.Stage
	result.Next = "hallmark promote " + d.Ref.String() + " --to-stage " + d.Stage
	if was, err := g.wasIn(ctx, d); err != nil {
		return Decision{}, err
	} else if was {
		result.Reason, result.Found = attest.Superseded, "been replaced in "+d.Stage
	}
	d.Verdict, d.Results = Denied, []attest.RuleResult{result}
	return d, nil
}

// wasIn reports whether the stage ever held the digest, however long ago, as an
// image of its own or as a platform of one.
func (g *Gate) wasIn(ctx context.Context, d Decision) (bool, error) {
	metas, err := findAll(ctx, g.Ledger, ledger.Query{Kind: attest.KindPromotion, Facets: []attest.Facet{
		{Name: attest.FacetDigest, Value: d.Ref.Digest.String()},
		{Name: attest.FacetStage, Value: d.Track + "/" + d.Stage},
		{Name: attest.FacetRepository, Value: string(d.Ref.Repository)},
	}})
	if err != nil {
		return false, err
	}
	for _, m := range metas {
		p, err := g.Ledger.Promotion(ctx, m.ID)
		if err != nil {
			return false, err
		}
		if p.State == ledger.Done {
			return true, nil
		}
	}
	return false, nil
}

// running returns the promotion that a stage's consumers run: the newest DONE one
// on the way back from its head. nil is none.
func (g *Gate) running(ctx context.Context, track, stage string, repo attest.Repository) (*ledger.Promotion, error) {
	st, err := g.Ledger.Stage(ctx, track, stage, repo)
	if err != nil {
		return nil, err
	}
	for p := st.Head; p != nil; {
		if p.State == ledger.Done {
			return p, nil
		}
		if p.Replaces.IsZero() {
			break
		}
		before, err := g.Ledger.Promotion(ctx, p.Replaces)
		if err != nil {
			return nil, err
		}
		p = &before
	}
	return nil, nil
}

// maxSafe bounds how many digests a decision names as safe to return to.
const maxSafe = 5

// fill adds what the stage holds and what it held before.
func (g *Gate) fill(ctx context.Context, d *Decision) error {
	d.Now, d.Safe = nil, nil
	st, err := g.Ledger.Stage(ctx, d.Track, d.Stage, d.Ref.Repository)
	if err != nil || st.Head == nil { // without a head nothing was ever DONE there
		return err
	}
	past, err := g.Ledger.Promotions(ctx, d.Track, d.Stage, d.Ref.Repository, 50)
	if err != nil {
		return err
	}
	running, err := g.running(ctx, d.Track, d.Stage, d.Ref.Repository)
	if err != nil {
		return err
	}
	if running != nil {
		d.Now = []StageEntry{entry(*running)}
	}
	seen := map[attest.Digest]bool{}
	for _, p := range past {
		if p.State == ledger.Done && !seen[p.Ref.Digest] && len(d.Safe) < maxSafe {
			seen[p.Ref.Digest] = true
			d.Safe = append(d.Safe, entry(p))
		}
	}
	return nil
}

func entry(p ledger.Promotion) StageEntry {
	since := p.Since
	if since.IsZero() {
		since = p.Time
	}
	return StageEntry{Digest: p.Ref.Digest, Since: since, State: string(p.State), Decision: p.Index, Target: p.Target}
}
