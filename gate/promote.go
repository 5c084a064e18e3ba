package gate

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
)

const (
	// effectWait is how long an answer waits for the target to be written. The
	// worker goes on after it.
	effectWait = 30 * time.Second
	// effectAttempts is after how many failures of a target that may recover the
	// promotion is given up and its predecessor is the stage's head again.
	effectAttempts = 12
	// deniedAttempts is the same for a registry that refuses our credentials: about
	// fifteen seconds, in case they were just exchanged.
	deniedAttempts = 6
	// maxNote bounds reason and ticket, in bytes.
	maxNote = 2048
)

// Promote decides whether a digest may go to a stage and moves the stage there.
// A denial is an answer, recorded and without an error. The caller needs the role
// promoters.
func (g *Gate) Promote(ctx context.Context, id attest.Identity, req PromoteRequest) (Promoted, error) {
	if err := g.Ready(); err != nil {
		return Promoted{}, err
	}
	if err := g.Policy.Allow(policy.Promoters, id, req.Ref.Repository); err != nil {
		return Promoted{}, err
	}
	if !req.DryRun {
		if err := id.MayChange("promote"); err != nil {
			return Promoted{}, err
		}
	}
	if len(req.Reason) > maxNote || len(req.Ticket) > maxNote {
		return Promoted{}, attest.Errorf(attest.TooLarge, "reason and ticket may have %d bytes each", maxNote)
	}
	if err := g.current(); err != nil {
		return Promoted{}, err
	}
	a, err := g.ask(ctx, id, req)
	if err != nil {
		return Promoted{}, err
	}
	switch {
	case a.head != nil && a.head.Ref.Digest == req.Ref.Digest && !req.DryRun && !a.renames():
		// The stage already holds it or is moving to it: a repeated request.
		return g.promoted(ctx, a.head.ID)
	case a.head != nil && a.head.State == ledger.Pending && !req.DryRun:
		return g.aborted(ctx, a, fmt.Sprintf("decision %d is moving %s to sha256:%s at this moment", a.head.Index, req.ToStage, a.head.Ref.Digest.Short()))
	}
	if err := g.decide(ctx, &a); err != nil {
		return Promoted{}, err
	}
	g.Step("decided")
	switch {
	case req.DryRun:
		err := g.fill(ctx, &a.decision)
		return Promoted{Decision: a.decision}, err
	case a.decision.Verdict == Denied:
		return g.deny(ctx, a)
	}
	return g.move(ctx, a)
}

// asked is a promotion on its way through the steps of Promote.
type asked struct {
	req      PromoteRequest
	caller   attest.Identity
	stage    *policy.Stage
	head     *ledger.Promotion // of the stage, at decision.LogSize
	decision Decision
	verdict  policy.Verdict
}

// renames reports whether the request asks for another target than the stage's head
// has, or for an impossible one: the same digest under a new version is a promotion
// of its own, to be decided.
func (a asked) renames() bool {
	repo, tag, err := a.stage.Target(a.req.Ref.Repository, a.req.Version)
	return a.req.Version != "" && (err != nil || repo != "" && string(repo)+":"+tag != a.head.Target)
}

// ask resolves the request against policy and ledger as they are now.
func (g *Gate) ask(ctx context.Context, id attest.Identity, req PromoteRequest) (asked, error) {
	now, err := g.clock()
	if err != nil {
		return asked{}, err
	}
	track, err := g.Policy.Track(req.Ref.Repository, req.Track)
	if err != nil {
		return asked{}, err
	}
	stage, err := track.Stage(req.ToStage)
	if err != nil {
		return asked{}, err
	}
	size := g.Ledger.Size() // before the stage is read: the head may be newer, never older
	st, err := g.Ledger.Stage(ctx, track.Name, stage.Name, req.Ref.Repository)
	if err != nil {
		return asked{}, err
	}
	return asked{req: req, caller: id, stage: stage, head: st.Head, decision: Decision{
		Track: track.Name, Stage: stage.Name, Ref: req.Ref, Time: now,
		Policy: g.policyFor(track.Name), LogSize: size,
	}}, nil
}

// decide judges the evidence in the log at its size by the stage's rules: step 1.
func (g *Gate) decide(ctx context.Context, a *asked) error {
	evidence, err := g.evidence.about(ctx, a.req.Ref, a.decision.LogSize)
	if err != nil {
		return err
	}
	var before policy.Before
	if a.stage.After != "" {
		p, err := g.running(ctx, a.decision.Track, a.stage.After, a.req.Ref.Repository)
		if err != nil {
			return err
		}
		if p != nil {
			before = policy.Before{Digest: p.Ref.Digest, Record: p.ID, Since: p.Since}
		}
	}
	a.verdict = a.stage.Decide(policy.Request{
		Ref: a.req.Ref, Evidence: evidence, Caller: a.caller, Before: before, Now: a.decision.Time, Version: a.req.Version,
	})
	a.decision.Results, a.decision.Summary = a.verdict.Results, a.verdict.Summary
	a.decision.Verdict = verdict(a.verdict.Allowed)
	return nil
}

// decided is what both outcomes record.
func (a asked) decided() attest.Decided {
	d := attest.Decided{
		Track: a.decision.Track, Stage: a.decision.Stage, After: a.stage.After, Policy: a.decision.Policy,
		StageDigest: a.stage.Digest(), LogSize: a.decision.LogSize, Caller: attest.CallerOf(a.caller),
		Version: a.req.Version, Reason: a.req.Reason, Ticket: a.req.Ticket,
		Results: a.decision.Results, Evidence: []attest.EvidenceRef{}, DecidedAt: attest.Time(a.decision.Time),
	}
	for _, e := range a.verdict.Used {
		d.Evidence = append(d.Evidence, attest.EvidenceRef{Record: e.ID(), PredicateType: e.PredicateType(), Digest: e.EnvelopeDigest()})
	}
	return d
}

// deny records the denial, once for the same question on the same inputs.
func (g *Gate) deny(ctx context.Context, a asked) (Promoted, error) {
	d := a.decided()
	denial := attest.Denial{Decided: d}
	if a.head != nil {
		denial.Now = a.head.Ref.Digest
	}
	rec, err := g.once(ctx, attest.DenialKey(a.req.Ref, denial), func(ctx context.Context) (attest.Record, error) {
		if err := g.denials.take(d.Caller.Key, a.req.Ref.Repository); err != nil {
			return attest.Record{}, err
		}
		payload, err := attest.DenialStatement(a.req.Ref, denial)
		if err != nil {
			return attest.Record{}, err
		}
		return g.appendGate(ctx, payload)
	})
	if err != nil {
		return Promoted{}, err
	}
	a.decision.Number, a.decision.RecordID = rec.Index, rec.ID
	err = g.fill(ctx, &a.decision)
	return Promoted{Decision: a.decision}, err
}

// move appends the promotion and, if it won its place in the log, sees it through:
// steps 2 to 6.
func (g *Gate) move(ctx context.Context, a asked) (Promoted, error) {
	d := a.decided()
	resource, err := a.stage.Resource(a.req.Ref.Repository)
	if err != nil {
		return Promoted{}, err
	}
	p := attest.Promotion{Decided: d, Target: a.verdict.Target, ResourceURI: "oci://" + string(resource), Level: a.verdict.Level}
	if a.head != nil {
		p.Replaces = a.head.ID
	}
	payload, err := attest.PromotionStatement(subjectsOf(a), p)
	if err != nil {
		return Promoted{}, err
	}
	// 2. If the process dies before Append has returned, the next start either
	// completes the promotion or finds nothing of it.
	rec, err := g.once(ctx, attest.PromoteKey(a.req.Ref, d.Track, d.Stage, p.Replaces), func(ctx context.Context) (attest.Record, error) {
		return g.appendGate(ctx, payload)
	})
	if err != nil {
		return Promoted{}, err
	}
	g.Step("promotion")
	// 3. Whether it won is the fold's to say: it alone sees the log in order.
	won, err := g.Ledger.Promotion(ctx, rec.ID)
	if err != nil {
		return Promoted{}, err
	}
	if won.State == ledger.Void {
		a.decision.Number, a.decision.RecordID = rec.Index, rec.ID
		return g.aborted(ctx, a, won.Why)
	}
	if won.Target != a.verdict.Target { // the same digest under another version came first
		return g.aborted(ctx, a, fmt.Sprintf("decision %d moved %s to %s first", won.Index, d.Stage, won.Target))
	}
	return g.promoted(ctx, rec.ID)
}

// once makes the record of a natural key, or returns the one that is there.
func (g *Gate) once(ctx context.Context, key string, record func(context.Context) (attest.Record, error)) (attest.Record, error) {
	return share(ctx, g, key, func(ctx context.Context) (attest.Record, error) {
		id, found, err := g.Ledger.ByKey(ctx, key)
		if err != nil {
			return attest.Record{}, err
		}
		if found {
			return g.Ledger.Get(ctx, id)
		}
		rec, err := record(ctx)
		if err != nil {
			return attest.Record{}, err
		}
		// An attempt that failed earlier may have come to stand before this one in
		// the log: the first record answers (attacks F09).
		if id, found, err := g.Ledger.ByKey(ctx, key); err != nil {
			return attest.Record{}, err
		} else if found && id != rec.ID {
			return g.Ledger.Get(ctx, id)
		}
		return rec, nil
	})
}

// subjectsOf returns the digests that a promotion moves: those of the accepted
// provenance, so that an index moves with its platforms.
func subjectsOf(a asked) attest.Image {
	img := attest.Image{Ref: a.req.Ref}
	for _, e := range a.verdict.Used {
		if e.Kind() != attest.KindProvenance || len(e.Digests()) == 0 || e.Digests()[0] != a.req.Ref.Digest {
			continue
		}
		for _, d := range e.Digests()[1:] {
			img.Platforms = append(img.Platforms, attest.Platform{Digest: d})
		}
		break
	}
	return img
}

func (g *Gate) aborted(ctx context.Context, a asked, why string) (Promoted, error) {
	a.decision.Verdict = Aborted
	a.decision.Results = append(a.decision.Results, stageMoved(a.decision.Stage, why))
	err := g.fill(ctx, &a.decision)
	return Promoted{Decision: a.decision}, err
}

func stageMoved(stage, why string) attest.RuleResult {
	return attest.RuleResult{
		Rule: "stage", Outcome: attest.Fail, Reason: attest.StageMoved,
		Required: "nobody else moves " + stage + " meanwhile", Found: why, Next: "decide again: repeat the command",
	}
}

// promoted answers from the records of a promotion that won, once its effect is
// known or the answer has waited long enough.
func (g *Gate) promoted(ctx context.Context, id attest.RecordID) (Promoted, error) {
	// Done with the promotion is done with its summary too, so that who is told
	// DONE can verify it.
	g.progress.await(ctx, effectWait, func(ctx context.Context) (bool, error) {
		n, err := g.Ledger.TaskPending(ctx, id)
		return n == 0, err
	})
	state, err := g.Ledger.Promotion(ctx, id)
	if err != nil {
		return Promoted{}, err
	}
	rec, err := g.Ledger.Get(ctx, id)
	if err != nil {
		return Promoted{}, err
	}
	d, err := g.decisionOf(ctx, rec)
	if err != nil {
		return Promoted{}, err
	}
	out := Promoted{Decision: d, Effect: string(state.State), EffectDetail: state.Why, Target: state.Target}
	if state.State != ledger.Done {
		return out, nil // what took no effect earns nobody a summary
	}
	s, p, err := promotionOf(rec)
	if err != nil {
		return Promoted{}, err
	}
	vsas, err := g.summaries(ctx, s, p)
	if err != nil {
		return Promoted{}, err
	}
	for _, v := range vsas {
		switch byCertificate := len(v.Certificate) > 0; {
		case byCertificate && out.VSABundle == nil: // the first in the log answers
			out.VSABundle, err = v.Bundle(g.Signer.LogID())
		case !byCertificate && out.VSAEnvelope == nil:
			out.VSAEnvelope, err = v.DSSE()
		}
		if err != nil {
			return Promoted{}, err
		}
	}
	return out, nil
}

// finish carries a promotion that won to its effect, steps 4 to 6, and puts its
// summary beside the image. It may be repeated from the start at any point; its
// task stays open until all of it is done.
func (g *Gate) finish(ctx context.Context, t ledger.Task) error {
	state, err := g.Ledger.Promotion(ctx, t.Record)
	if err != nil {
		return err
	}
	rec, err := g.Ledger.Get(ctx, t.Record)
	if err != nil {
		return err
	}
	s, p, err := promotionOf(rec)
	if err != nil {
		return err
	}
	if state.State == ledger.Pending {
		if err := g.takeEffect(ctx, t, state, s, p); err != nil {
			return err
		}
		if state, err = g.Ledger.Promotion(ctx, t.Record); err != nil {
			return err
		}
	}
	if state.State != ledger.Done {
		return nil // consumers must not find the summary of what took no effect
	}
	// 7. The target holds the image only now, so this comes last.
	return g.attachSummary(ctx, s, p)
}

// takeEffect is steps 4 to 6.
func (g *Gate) takeEffect(ctx context.Context, t ledger.Task, state ledger.Promotion, s attest.Statement, p attest.Promotion) error {
	// 4. Only a winner gets a summary, both forms in one append. The payload is a
	// function of the promotion, so a retry finds what it made before.
	if err := g.summarise(ctx, s, p); err != nil {
		return err
	}
	g.Step("summary")
	// 5. The effect, under a lock for each target: OCI has no atomic swap.
	effect := attest.Effect{
		Promotion: t.Record, State: attest.EffectDone, Track: p.Track, Stage: p.Stage, Target: p.Target,
	}
	if err := g.setTarget(ctx, state, p); err != nil {
		if t.Attempts+1 < patience(err) {
			return err // the task is tried again
		}
		effect.State, effect.Detail = attest.EffectFail, err.Error()
	}
	g.Step("target")
	// 6. The effect record ends the promotion. If the process dies before it, the
	// next start writes the target again, which changes nothing.
	effect.At = attest.Time(g.Now())
	_, err := g.once(ctx, attest.EffectKey(t.Record), func(ctx context.Context) (attest.Record, error) {
		payload, err := attest.EffectStatement(state.Ref, effect)
		if err != nil {
			return attest.Record{}, err
		}
		return g.appendGate(ctx, payload)
	})
	g.Step("effect")
	return err
}

// attachSummary puts the bundle of a promotion's summary beside the image and its
// platforms, in the repository that consumers pull from.
func (g *Gate) attachSummary(ctx context.Context, s attest.Statement, p attest.Promotion) error {
	img, err := s.Image()
	if err != nil {
		return err
	}
	if img.Ref.Repository, err = attest.ParseRepository(strings.TrimPrefix(p.ResourceURI, "oci://")); err != nil {
		return err
	}
	vsas, err := g.summaries(ctx, s, p)
	if err != nil {
		return err
	}
	for _, v := range vsas {
		if len(v.Certificate) == 0 {
			continue // plain DSSE is for those who ask for it: cosign reads bundles
		}
		if err := g.attach(ctx, v.ID, img); err != nil {
			return err
		}
	}
	return nil
}

// patience is how often the target is tried in all when it fails with err.
func patience(err error) int {
	switch attest.ReasonOf(err) {
	case attest.EffectFailed, attest.SubjectNotFound, attest.HostNotAllowed, attest.StageMoved, attest.BadReference, attest.DigestMismatch, attest.ManifestAmbiguous:
		return 1 // it will not go away by itself
	case attest.RegistryDenied:
		return deniedAttempts
	}
	return effectAttempts
}

// setTarget writes the target tag and reads it back, unless the stage has moved on.
func (g *Gate) setTarget(ctx context.Context, state ledger.Promotion, p attest.Promotion) error {
	if p.Target == "" {
		return nil
	}
	defer g.targets.lock(p.Target)()
	st, err := g.Ledger.Stage(ctx, p.Track, p.Stage, state.Ref.Repository)
	if err != nil {
		return err
	}
	if st.Head == nil || st.Head.ID != state.ID {
		return attest.Errorf(attest.StageMoved, "the stage was moved on before this promotion took effect")
	}
	i := strings.LastIndexByte(p.Target, ':')
	repo, err := attest.ParseRepository(p.Target[:i])
	if err != nil {
		return err
	}
	return g.Registry.Tag(ctx, state.Ref, repo, p.Target[i+1:])
}

// summarise records the verification summary of a promotion twice, under the
// gate's certificate and under its long-lived key, unless it is there.
func (g *Gate) summarise(ctx context.Context, s attest.Statement, p attest.Promotion) error {
	payload, err := g.summary(s, p)
	if err != nil {
		return err
	}
	_, err = g.once(ctx, attest.SummaryKey(payload), func(ctx context.Context) (attest.Record, error) {
		cred, err := g.Signer.Credential(attest.GateIdentity(g.Service))
		if err != nil {
			return attest.Record{}, err
		}
		byCertificate, err := g.Signer.Sign(cred, payload)
		if err != nil {
			return attest.Record{}, err
		}
		byKey, err := g.Signer.SignGate(payload)
		if err != nil {
			return attest.Record{}, err
		}
		if err := errors.Join(g.Verifier.Envelope(byCertificate), g.Verifier.Envelope(byKey)); err != nil {
			return attest.Record{}, fmt.Errorf("checking our own signature: %w", err)
		}
		recs, err := g.Ledger.Append(ctx,
			ledger.Entry{Envelope: cred.Precertificate},
			ledger.Entry{Envelope: byCertificate},
			ledger.Entry{Envelope: byKey})
		if err != nil {
			return attest.Record{}, err
		}
		return recs[1], nil
	})
	return err
}

func (g *Gate) summary(s attest.Statement, p attest.Promotion) ([]byte, error) {
	img, err := s.Image()
	if err != nil {
		return nil, err
	}
	return attest.VSAStatement(g.Service, img, p)
}

// summaries returns the recorded summaries of a promotion, none while it waits.
func (g *Gate) summaries(ctx context.Context, s attest.Statement, p attest.Promotion) ([]attest.Record, error) {
	payload, err := g.summary(s, p)
	if err != nil {
		return nil, err
	}
	key := attest.SummaryKey(payload)
	// Not only those behind the promotion in the log: one that failed within the
	// same second may have earned the same summary.
	metas, err := findAll(ctx, g.Ledger, ledger.Query{
		Kind:   attest.KindVSA,
		Facets: []attest.Facet{{Name: attest.FacetDigest, Value: "sha256:" + s.Subject[0].Digest["sha256"]}},
	})
	if err != nil {
		return nil, err
	}
	var out []attest.Record
	for _, m := range metas {
		if m.Key != key {
			continue
		}
		v, err := g.Ledger.Get(ctx, m.ID)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

func number(index uint64) string { return strconv.FormatUint(index, 10) }
