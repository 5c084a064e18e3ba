package gate

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
)

const (
	// signWorkers bounds how many images of one request are signed at once.
	signWorkers = 8
	// flowTimeout bounds work that several callers share: none of them may end
	// it for the others by going away.
	flowTimeout = time.Minute
	// attachWait is how long an answer waits for the bundles to reach the
	// registry. The worker goes on after it.
	attachWait = 15 * time.Second
)

// Sign signs each image for the calling job, records its provenance and signs the
// evidence about it. An image that is refused has its own error, and so has its
// evidence; the error of Sign itself refuses them all. Repeating a request returns
// the records of the first.
func (g *Gate) Sign(ctx context.Context, id attest.Identity, req SignRequest) ([]Signed, error) {
	if err := g.Ready(); err != nil {
		return nil, err
	}
	// 1. Nothing is signed of a request that is malformed anywhere, and nobody
	// who may sign nothing has anything read.
	if err := req.form(); err != nil {
		return nil, err
	}
	out := make([]Signed, len(req.Images))
	allowed := 0
	for i, img := range req.Images {
		out[i] = Signed{Ref: img.Ref, Err: g.maySign(id, img.Ref.Repository)}
		if out[i].Err == nil {
			allowed++
		}
	}
	if allowed > 0 {
		if err := g.checkAll(ctx, req.Evidence); err != nil {
			return nil, err
		}
		// 2. A token that is good for one request is this one's from here on.
		use, end, err := g.bind(ctx, id, req.use)
		if err != nil {
			return nil, err
		}
		defer end()
		// 3. Each image stands alone.
		var group errgroup.Group
		group.SetLimit(signWorkers)
		for i, img := range req.Images {
			if out[i].Err != nil {
				continue
			}
			group.Go(func() error {
				s, err := g.signOne(ctx, id, img, use, req.AttachByClient)
				if err == nil {
					s.Evidence = g.attestAll(ctx, id, s.Image, req.about(img.Ref), use, req.AttachByClient)
					g.settle(ctx, &s, req.AttachByClient)
				}
				s.Ref, s.Err = img.Ref, err
				out[i] = s
				return nil
			})
		}
		_ = group.Wait() // no function returns an error
	}
	for i := range out {
		out[i].refuseEvidence(req.about(out[i].Ref))
	}
	return out, nil
}

// form checks what needs no predicate to be read.
func (r SignRequest) form() error {
	if n := len(r.Images); n == 0 || n > MaxImages {
		return attest.Errorf(attest.BadRequest, "%d images: give 1 to %d", n, MaxImages)
	}
	for i, img := range r.Images {
		if err := attest.CheckCallerFacts(img.Facts); err != nil {
			return inField(err, "images[%d].facts", i)
		}
	}
	return r.evidenceForm()
}

// maySign admits a job that holds the role signers for a repository.
func (g *Gate) maySign(id attest.Identity, repo attest.Repository) error {
	if err := id.MaySign(); err != nil {
		return err
	}
	return g.Policy.Allow(policy.Signers, id, repo)
}

// use names a request by all that it asks for but who attaches: what a token that is
// good for one request is good for.
func (r SignRequest) use() string {
	parts := []string{"sign"}
	for _, img := range r.Images {
		parts = append(parts, "image", img.Ref.String(), img.Base)
		for _, name := range slices.Sorted(maps.Keys(img.Facts)) {
			parts = append(parts, name, img.Facts[name])
		}
	}
	for _, e := range r.Evidence {
		parts = append(parts, "evidence", e.PredicateType, e.Name, attest.Hash(e.Predicate).String())
		for _, ref := range e.Images {
			parts = append(parts, ref.String())
		}
	}
	return attest.Key(parts...)
}

// bind reserves the token of an identity that may use it for one request only, and
// returns the key under which records say so: "" for any other identity. end is
// called when the request is over.
func (g *Gate) bind(ctx context.Context, id attest.Identity, request func() string) (use string, end func(), err error) {
	if !id.Once {
		return "", func() {}, nil
	}
	use = request()
	end, err = g.tokens.bind(id, use, g.signedWith(ctx, id.TokenID))
	return use, end, err
}

func (g *Gate) signOne(ctx context.Context, id attest.Identity, img SignImage, use string, byClient bool) (Signed, error) {
	key := attest.SignKey(img.Ref, id, img.Base, img.Facts)
	return share(ctx, g, key, func(ctx context.Context) (Signed, error) {
		return g.signOnce(ctx, id, img, key, use, byClient)
	})
}

// signOnce returns the records that answer key, making them when there are none.
func (g *Gate) signOnce(ctx context.Context, id attest.Identity, img SignImage, key, use string, byClient bool) (Signed, error) {
	if prov, found, err := g.Ledger.ByKey(ctx, key); err != nil {
		return Signed{}, err
	} else if found {
		return g.signedBefore(ctx, key, prov)
	}
	counted, err := g.tokens.reserve(id, img.Ref.Digest, key, use, g.signedWith(ctx, id.TokenID))
	if err != nil {
		return Signed{}, err
	}
	defer counted.end()

	// 1. What the registry holds. Nothing is signed that is not there.
	now, err := g.clock()
	if err != nil {
		return Signed{}, err
	}
	image, err := g.Images(ctx, img.Ref, img.Base, g.tells(id))
	if err != nil {
		return Signed{}, err
	}
	if err := callersBase(image.Base); err != nil {
		return Signed{}, err
	}
	if image.Base, err = g.attestedBase(ctx, image); err != nil {
		return Signed{}, err
	}
	g.Step("fetched")

	// 2. The statements, each marshalled once: these bytes are signed and stored.
	signature, err := attest.SignatureStatement(image, key)
	if err != nil {
		return Signed{}, err
	}
	provenance, err := attest.ProvenanceStatement(attest.ProvenanceInput{
		Service: g.Service, Image: image, Builder: id, BaseHint: img.Base, Facts: img.Facts, Request: key, Use: use, Finished: now,
	})
	if err != nil {
		return Signed{}, err
	}

	// 3. Signed and recorded, or nothing of it.
	recs, err := g.record(ctx, id, counted, !byClient, signature, provenance)
	if err != nil {
		return Signed{}, err
	}
	// An earlier attempt may be in the log although its caller was told that it
	// failed (attacks F09). The first record answers, now and ever after.
	if first, found, err := g.Ledger.ByKey(ctx, key); err != nil {
		return Signed{}, err
	} else if found && first != recs[1].ID {
		return g.signedBefore(ctx, key, first)
	}
	s, err := g.answer(recs[0], recs[1])
	s.tasked = !byClient
	return s, err
}

// record signs statements in the name of a caller and returns their records. It is
// the only way in which a caller's credential signs anything.
func (g *Gate) record(ctx context.Context, id attest.Identity, counted *reservation, attach bool, statements ...[]byte) ([]attest.Record, error) {
	// 1. A certificate that names the caller, and the signatures. They exist only
	// in this process: if it dies here, nothing was signed.
	cred, err := g.Signer.Credential(id)
	if err != nil {
		return nil, fmt.Errorf("issuing a certificate: %w", err)
	}
	entries := []ledger.Entry{{Envelope: cred.Precertificate}}
	for _, payload := range statements {
		env, err := g.Signer.Sign(cred, payload)
		if err != nil {
			return nil, fmt.Errorf("signing: %w", err)
		}
		if err := g.Verifier.Envelope(env); err != nil {
			return nil, fmt.Errorf("checking our own signature: %w", err)
		}
		entries = append(entries, ledger.Entry{Envelope: env, Attach: attach})
	}
	g.Step("signed")

	// 2. Neither a signature nor the final certificate leaves the process before
	// Append has returned: then they are durable and a published checkpoint covers
	// them, the precertificate first. If the process dies in it, or Append reports an
	// error, the next start either finishes the records or finds nothing of them: the
	// token counts as used.
	counted.keep()
	recs, err := g.Ledger.Append(ctx, entries...)
	if err != nil {
		return nil, err
	}
	g.Step("recorded")
	return recs[1:], nil
}

// tells returns of which repositories a caller may learn what they hold, from claims
// about bases that nothing proves: those for which they hold a role, and those that
// the service follows for everybody.
func (g *Gate) tells(id attest.Identity) func(attest.Repository) bool {
	return func(repo attest.Repository) bool {
		return slices.ContainsFunc(g.Bases.Follow, func(b attest.BaseName) bool { return b.Repository == repo }) || g.mayReadBase(id, repo)
	}
}

// callersBase refuses a base that the caller named and the layers contradict.
// An annotation that is contradicted is recorded and left to the policy: the
// caller need not have written it.
func callersBase(b attest.Base) error {
	for _, c := range b.Claims {
		if c.From == attest.BaseFromCaller && c.Result == attest.Contradicted {
			return attest.Errorf(attest.BaseContradicted, "the image is not built on %s: %s. Give the base it was built on, or none", c.Name, c.Detail)
		}
	}
	return nil
}

// signedWith returns a function that lists what the records say was signed with a
// token.
func (g *Gate) signedWith(ctx context.Context, token string) func() ([]tokenRecord, error) {
	return func() ([]tokenRecord, error) {
		var out []tokenRecord
		for _, kind := range []attest.RecordKind{attest.KindProvenance, attest.KindEvidence} {
			metas, err := findAll(ctx, g.Ledger, ledger.Query{
				Kind: kind, Facets: []attest.Facet{{Name: attest.FacetToken, Value: token}},
			})
			if err != nil {
				return nil, err
			}
			for _, m := range metas {
				r, err := g.tokenRecord(ctx, m)
				if err != nil {
					return nil, err
				}
				out = append(out, r)
			}
		}
		return out, nil
	}
}

func (g *Gate) tokenRecord(ctx context.Context, m ledger.Meta) (tokenRecord, error) {
	rec, err := g.Ledger.Get(ctx, m.ID)
	if err != nil {
		return tokenRecord{}, err
	}
	s, err := statementOf(rec)
	if err != nil {
		return tokenRecord{}, err
	}
	img, err := s.Image()
	if err != nil {
		return tokenRecord{}, err
	}
	_, use := s.TokenUse()
	if m.Kind == attest.KindProvenance {
		p, err := attest.ParseProvenance(s.Predicate)
		if err != nil {
			return tokenRecord{}, err
		}
		use = p.Internal().Token.Use
	}
	return tokenRecord{img.Ref.Digest, m.Key, use}, nil
}

// signedBefore answers a repeated request from its records.
func (g *Gate) signedBefore(ctx context.Context, key string, prov attest.RecordID) (Signed, error) {
	provenance, err := g.Ledger.Get(ctx, prov)
	if err != nil {
		return Signed{}, err
	}
	sig, found, err := g.Ledger.ByKey(ctx, attest.SignatureKey(key))
	if err != nil {
		return Signed{}, err
	}
	if !found {
		// Both were stored in one transaction, so the log is still catching up.
		return Signed{}, attest.Errorf(attest.LedgerUnavailable, "the signature of this request is not recorded yet: try again")
	}
	signature, err := g.Ledger.Get(ctx, sig)
	if err != nil {
		return Signed{}, err
	}
	s, err := g.answer(signature, provenance)
	s.Repeated = true
	return s, err
}

// answer renders what was recorded: the same for the first request and for every
// repetition.
func (g *Gate) answer(signature, provenance attest.Record) (Signed, error) {
	st, err := statementOf(provenance)
	if err != nil {
		return Signed{}, err
	}
	p, err := attest.ParseProvenance(st.Predicate)
	if err != nil {
		return Signed{}, err
	}
	s := Signed{
		Signature: signature, Provenance: provenance,
		Build: p.Internal().Claims, Builder: p.RunDetails.Builder.ID,
	}
	if s.Image, err = st.Image(); err != nil {
		return Signed{}, err
	}
	s.Image.Base = p.Internal().Base
	if s.SignatureBundle, err = signature.Bundle(g.Signer.LogID()); err != nil {
		return Signed{}, err
	}
	s.ProvenanceBundle, err = provenance.Bundle(g.Signer.LogID())
	return s, err
}

// statementOf parses the statement of a record that the ledger returned.
func statementOf(rec attest.Record) (attest.Statement, error) {
	var s attest.Statement
	if err := json.Unmarshal(rec.Payload, &s); err != nil || len(s.Subject) == 0 {
		return s, fmt.Errorf("record %s holds no statement: %w", rec.ID, err)
	}
	return s, nil
}

// settle waits until the records about an image are attached, and says so in the
// answer.
func (g *Gate) settle(ctx context.Context, s *Signed, byClient bool) {
	if byClient {
		s.Attach = AttachByClient
		for i := range s.Evidence {
			s.Evidence[i].Attach = AttachByClient
		}
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.Attach = g.awaitAttached(ctx, s.Image, s.tasked, s.Signature, s.Provenance) })
	for i := range s.Evidence {
		if e := &s.Evidence[i]; e.Err == nil {
			wg.Go(func() { e.Attach = g.awaitAttached(ctx, e.Image, e.tasked, e.Record) })
		}
	}
	wg.Wait()
}

// awaitAttached waits until the worker has attached the bundles of records
// everywhere. It attaches them itself when the records may be those of a request that
// left that to its caller: no task was made then.
func (g *Gate) awaitAttached(ctx context.Context, img attest.Image, tasked bool, recs ...attest.Record) AttachState {
	done := func(ctx context.Context) (bool, error) {
		for _, r := range recs {
			if n, err := g.Ledger.TaskPending(ctx, r.ID); err != nil || n > 0 {
				return false, err
			}
		}
		return true, nil
	}
	if !g.progress.await(ctx, attachWait, done) {
		return AttachPending
	}
	if tasked {
		return Attached
	}
	waiting, cancel := context.WithTimeout(ctx, attachWait)
	defer cancel()
	for _, r := range recs {
		_, err := share(waiting, g, attest.Key("attach", r.ID.String()), func(ctx context.Context) (struct{}, error) {
			return struct{}{}, g.attach(ctx, r.ID, img)
		})
		if err != nil {
			g.Logger.Warn("attaching what a repeated request asks for", "record", r.ID.String(), "error", err)
			return AttachPending
		}
	}
	return Attached
}
