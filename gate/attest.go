package gate

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/policy"
)

// attestWorkers bounds how many predicates about one image are signed at once.
const attestWorkers = 4

// Attest signs one predicate about one image with the caller's identity and records
// it. The caller holds the role attesters or signers for the repository; a person may
// be an attester. Repeating a request returns the record of the first.
func (g *Gate) Attest(ctx context.Context, id attest.Identity, req AttestRequest) (SignedEvidence, error) {
	if err := g.Ready(); err != nil {
		return SignedEvidence{}, err
	}
	if err := g.mayAttest(id, req.Ref.Repository); err != nil {
		return SignedEvidence{}, err
	}
	e := Evidence{PredicateType: req.PredicateType, Predicate: req.Predicate, Name: req.Name}
	if err := g.checkEvidence(ctx, e); err != nil {
		return SignedEvidence{}, err
	}
	use, end, err := g.bind(ctx, id, func() string {
		return attest.Key("attest", req.Ref.String(), req.PredicateType, req.Name, attest.Hash(req.Predicate).String())
	})
	if err != nil {
		return SignedEvidence{}, err
	}
	defer end()
	out, err := g.attestOne(ctx, id, req.Ref, e, use, req.AttachByClient, true, func(ctx context.Context) (attest.Image, error) {
		return g.Registry.Subjects(ctx, req.Ref)
	})
	if err != nil {
		return SignedEvidence{}, err
	}
	if req.AttachByClient {
		out.Attach = AttachByClient
		return out, nil
	}
	out.Attach = g.awaitAttached(ctx, out.Image, out.tasked, out.Record)
	return out, nil
}

// mayAttest admits holders of one of the roles whose word about an image is signed.
// Of two refusals the one that says what would change it is told.
func (g *Gate) mayAttest(id attest.Identity, repo attest.Repository) error {
	if err := id.MayAttest(); err != nil {
		return err
	}
	err := g.Policy.Allow(policy.Attesters, id, repo)
	if err == nil {
		return nil
	}
	asSigner := g.Policy.Allow(policy.Signers, id, repo)
	if asSigner != nil && attest.ReasonOf(err) == attest.SourceNotAllowed {
		return err
	}
	return asSigner
}

// SendsEvidence refuses whoever holds for no repository a role that signs: only the
// others may send a request of many megabytes. ROLE_MISSING.
func (g *Gate) SendsEvidence(id attest.Identity) error {
	for _, grant := range g.Policy.Grants(id) {
		if grant.Role == policy.Signers || grant.Role == policy.Attesters {
			return nil
		}
	}
	return attest.Errorf(attest.RoleMissing, "%s holds neither the role signers nor attesters: only those may send large requests", id.SAN)
}

// checkEvidence accepts a predicate that may be signed.
func (g *Gate) checkEvidence(ctx context.Context, e Evidence) error {
	done, err := weigh(ctx, g.signing, int64(len(e.Predicate)))
	if err != nil {
		return err
	}
	defer done()
	if err := attest.CheckEvidenceName(e.Name); err != nil {
		return inField(err, "name")
	}
	return attest.CheckPredicate(e.PredicateType, e.Predicate)
}

// evidenceForm checks the evidence of a request without reading a predicate.
func (r SignRequest) evidenceForm() error {
	if n := len(r.Evidence); n > MaxEvidence {
		return attest.Errorf(attest.BadRequest, "%d predicates: give at most %d", n, MaxEvidence)
	}
	total := 0
	type named struct {
		ref                 attest.ImageRef
		predicateType, name string
	}
	seen := map[named]int{}
	for i, e := range r.Evidence {
		images := 0
		for _, img := range r.Images {
			if !e.concerns(img.Ref) {
				continue
			}
			images++
			n := named{img.Ref, e.PredicateType, e.Name}
			if other, ok := seen[n]; ok && other != i {
				return inField(attest.Errorf(attest.BadRequest, "a second %s about %s under the same name: of such evidence the newest counts, so give each a name", e.PredicateType, img.Ref), "evidence[%d].name", i)
			}
			seen[n] = i
		}
		for j, ref := range e.Images {
			if !slices.ContainsFunc(r.Images, func(img SignImage) bool { return img.Ref == ref }) {
				return inField(attest.Errorf(attest.BadRequest, "%s is not among the images of the request", ref), "evidence[%d].images[%d]", i, j)
			}
		}
		if total += images * len(e.Predicate); total > MaxEvidenceBytes {
			return inField(attest.Errorf(attest.TooLarge, "the predicates, each once for every image that it is about, have more than %d bytes: give fewer in one request", MaxEvidenceBytes), "evidence[%d]", i)
		}
	}
	return nil
}

// checkAll checks the evidence of a request.
func (g *Gate) checkAll(ctx context.Context, evidence []Evidence) error {
	for i, e := range evidence {
		if err := g.checkEvidence(ctx, e); err != nil {
			return inField(err, "evidence[%d]", i)
		}
	}
	return nil
}

// concerns reports whether evidence of a request is about one of its images.
func (e Evidence) concerns(ref attest.ImageRef) bool {
	return len(e.Images) == 0 || slices.Contains(e.Images, ref)
}

// about returns the evidence about one image of the request, in order.
func (r SignRequest) about(ref attest.ImageRef) []Evidence {
	var out []Evidence
	for _, e := range r.Evidence {
		if e.concerns(ref) {
			out = append(out, e)
		}
	}
	return out
}

// inField names the field of the request that an error is about.
func inField(err error, format string, args ...any) error {
	var e *attest.Error
	if !errors.As(err, &e) {
		return err
	}
	named := *e
	field := fmt.Sprintf(format, args...)
	named.Message = field + ": " + e.Message
	named.Metadata = map[string]string{}
	for k, v := range e.Metadata {
		named.Metadata[k] = v
	}
	return named.With("field", field)
}

// refuseEvidence answers for the evidence about an image that was refused.
func (s *Signed) refuseEvidence(evidence []Evidence) {
	if s.Err == nil {
		return
	}
	s.Evidence = nil
	for _, e := range evidence {
		s.Evidence = append(s.Evidence, SignedEvidence{PredicateType: e.PredicateType, Name: e.Name, Err: s.Err})
	}
}

// attestAll signs the evidence about an image that was signed. Each stands alone.
func (g *Gate) attestAll(ctx context.Context, id attest.Identity, img attest.Image, evidence []Evidence, use string, byClient bool) []SignedEvidence {
	out := make([]SignedEvidence, len(evidence))
	var group errgroup.Group
	group.SetLimit(attestWorkers)
	for i, e := range evidence {
		group.Go(func() error {
			s, err := g.attestOne(ctx, id, img.Ref, e, use, byClient, byClient, func(context.Context) (attest.Image, error) { return img, nil })
			s.PredicateType, s.Name, s.Err = e.PredicateType, e.Name, err
			out[i] = s
			return nil
		})
	}
	_ = group.Wait() // no function returns an error
	return out
}

// attestOne answers with the bundle if its caller reads it.
func (g *Gate) attestOne(ctx context.Context, id attest.Identity, ref attest.ImageRef, e Evidence, use string, byClient, bundle bool, look func(context.Context) (attest.Image, error)) (SignedEvidence, error) {
	key := attest.EvidenceKey(ref, id, e.PredicateType, e.Name, e.Predicate)
	out, err := share(ctx, g, key, func(ctx context.Context) (SignedEvidence, error) {
		return g.attestOnce(ctx, id, ref, e, key, use, byClient, look)
	})
	if err != nil {
		return SignedEvidence{}, err
	}
	if bundle {
		if out.Bundle, err = out.Record.Bundle(g.Signer.LogID()); err != nil {
			return SignedEvidence{}, err
		}
	}
	out.Record.Payload = nil
	return out, nil
}

// attestOnce returns the record that answers key, making it when there is none.
func (g *Gate) attestOnce(ctx context.Context, id attest.Identity, ref attest.ImageRef, e Evidence, key, use string, byClient bool, look func(context.Context) (attest.Image, error)) (SignedEvidence, error) {
	done, err := weigh(ctx, g.signing, int64(len(e.Predicate)))
	if err != nil {
		return SignedEvidence{}, err
	}
	defer done()
	if rec, found, err := g.Ledger.ByKey(ctx, key); err != nil {
		return SignedEvidence{}, err
	} else if found {
		return g.attestedBefore(ctx, rec)
	}
	counted, err := g.tokens.reserve(id, ref.Digest, key, use, g.signedWith(ctx, id.TokenID))
	if err != nil {
		return SignedEvidence{}, err
	}
	defer counted.end()

	// 1. What the registry holds: the statement is about that.
	if _, err := g.clock(); err != nil {
		return SignedEvidence{}, err
	}
	img, err := look(ctx)
	if err != nil {
		return SignedEvidence{}, err
	}
	g.Step("looked")

	// 2. The statement, marshalled once: these bytes are signed and stored.
	payload, err := attest.EvidenceStatement(attest.EvidenceInput{
		Image: img, PredicateType: e.PredicateType, Predicate: e.Predicate, Name: e.Name, Signer: id, Request: key, Use: use,
	})
	if err != nil {
		return SignedEvidence{}, err
	}

	// 3. Signed and recorded, or nothing of it.
	recs, err := g.record(ctx, id, counted, !byClient, payload)
	if err != nil {
		return SignedEvidence{}, err
	}
	// As in signOnce: the first record answers.
	if first, found, err := g.Ledger.ByKey(ctx, key); err != nil {
		return SignedEvidence{}, err
	} else if found && first != recs[0].ID {
		return g.attestedBefore(ctx, first)
	}
	out, err := evidenceAnswer(recs[0])
	out.tasked = !byClient
	return out, err
}

// attestedBefore answers a repeated request from its record.
func (g *Gate) attestedBefore(ctx context.Context, id attest.RecordID) (SignedEvidence, error) {
	rec, err := g.Ledger.Get(ctx, id)
	if err != nil {
		return SignedEvidence{}, err
	}
	out, err := evidenceAnswer(rec)
	out.Repeated = true
	return out, err
}

// evidenceAnswer renders what was recorded.
func evidenceAnswer(rec attest.Record) (SignedEvidence, error) {
	st, err := statementOf(rec)
	if err != nil {
		return SignedEvidence{}, err
	}
	out := SignedEvidence{PredicateType: st.PredicateType, Name: st.EvidenceName(), Record: rec}
	out.Image, err = st.Image()
	return out, err
}
