package gate

import (
	"context"
	"encoding/json"
	"fmt"
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

// Sign signs each image for the calling job and records its provenance. An image
// that is refused has its own error; the error of Sign itself refuses them all.
// Repeating a request returns the records of the first.
func (g *Gate) Sign(ctx context.Context, id attest.Identity, req SignRequest) ([]Signed, error) {
	if err := g.Ready(); err != nil {
		return nil, err
	}
	if n := len(req.Images); n == 0 || n > MaxImages {
		return nil, attest.Errorf(attest.BadRequest, "%d images: give 1 to %d", n, MaxImages)
	}
	out := make([]Signed, len(req.Images))
	var group errgroup.Group
	group.SetLimit(signWorkers)
	for i, img := range req.Images {
		group.Go(func() error {
			s, err := g.signOne(ctx, id, img, req.AttachByClient)
			s.Ref, s.Err = img.Ref, err
			out[i] = s
			return nil
		})
	}
	_ = group.Wait() // no function returns an error
	return out, nil
}

func (g *Gate) signOne(ctx context.Context, id attest.Identity, img SignImage, byClient bool) (Signed, error) {
	if err := id.MaySign(); err != nil {
		return Signed{}, err
	}
	if err := g.Policy.Allow(policy.Signers, id, img.Ref.Repository); err != nil {
		return Signed{}, err
	}
	key := attest.SignKey(img.Ref, id, img.Base, img.Facts)
	s, err := share(ctx, g, key, func(ctx context.Context) (Signed, error) {
		return g.signOnce(ctx, id, img, key, byClient)
	})
	if err != nil {
		return Signed{}, err
	}
	if byClient {
		s.Attach = AttachByClient
		return s, nil
	}
	s.Attach = g.awaitAttached(ctx, key, s)
	return s, nil
}

// signOnce returns the records that answer key, making them when there are none.
func (g *Gate) signOnce(ctx context.Context, id attest.Identity, img SignImage, key string, byClient bool) (Signed, error) {
	if prov, found, err := g.Ledger.ByKey(ctx, key); err != nil {
		return Signed{}, err
	} else if found {
		return g.signedBefore(ctx, key, prov)
	}
	release, err := g.tokens.reserve(id, img.Ref.Digest, key, func() ([]attest.Digest, []string, error) { return g.signedWith(ctx, id.TokenID) })
	if err != nil {
		return Signed{}, err
	}
	s, err := g.sign(ctx, id, img, key, byClient)
	if err != nil {
		release()
		return Signed{}, err
	}
	return s, nil
}

// sign makes the two statements about an image, records them and returns them.
func (g *Gate) sign(ctx context.Context, id attest.Identity, img SignImage, key string, byClient bool) (Signed, error) {
	// 1. What the registry holds. Nothing is signed that is not there.
	now, err := g.clock()
	if err != nil {
		return Signed{}, err
	}
	image, err := g.Images(ctx, img.Ref, img.Base)
	if err != nil {
		return Signed{}, err
	}
	if err := callersBase(image.Base); err != nil {
		return Signed{}, err
	}
	g.Step("fetched")

	// 2. The statements, each marshalled once: these bytes are signed and stored.
	signature, err := attest.SignatureStatement(image, key)
	if err != nil {
		return Signed{}, err
	}
	provenance, err := attest.ProvenanceStatement(attest.ProvenanceInput{
		Service: g.Service, Image: image, Builder: id, BaseHint: img.Base, Facts: img.Facts, Request: key, Finished: now,
	})
	if err != nil {
		return Signed{}, err
	}

	// 3. A certificate that names the job, and both signatures. They exist only
	// in this process: if it dies here, nothing was signed.
	cred, err := g.Signer.Credential(id)
	if err != nil {
		return Signed{}, fmt.Errorf("issuing a certificate: %w", err)
	}
	entries := []ledger.Entry{{Envelope: cred.Precertificate}}
	for _, payload := range [][]byte{signature, provenance} {
		env, err := g.Signer.Sign(cred, payload)
		if err != nil {
			return Signed{}, fmt.Errorf("signing: %w", err)
		}
		if err := g.Verifier.Envelope(env); err != nil {
			return Signed{}, fmt.Errorf("checking our own signature: %w", err)
		}
		entries = append(entries, ledger.Entry{Envelope: env, Attach: !byClient})
	}
	g.Step("signed")

	// 4. Neither signature nor final certificate leaves the process before Append
	// has returned: then they are durable and a published checkpoint covers them,
	// the precertificate first. If the process dies in it, the next start either
	// finishes the record or finds nothing of it.
	recs, err := g.Ledger.Append(ctx, entries...)
	if err != nil {
		return Signed{}, err
	}
	g.Step("recorded")
	// An earlier attempt may be in the log although its caller was told that it
	// failed (attacks F09). The first record answers, now and ever after.
	if first, found, err := g.Ledger.ByKey(ctx, key); err != nil {
		return Signed{}, err
	} else if found && first != recs[2].ID {
		return g.signedBefore(ctx, key, first)
	}
	s, err := g.answer(recs[1], recs[2])
	s.tasked = !byClient
	return s, err
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

// signedWith returns the digests that the records say were signed with a token,
// and the natural key of each.
func (g *Gate) signedWith(ctx context.Context, token string) (digests []attest.Digest, keys []string, err error) {
	metas, err := findAll(ctx, g.Ledger, ledger.Query{
		Kind: attest.KindProvenance, Facets: []attest.Facet{{Name: attest.FacetToken, Value: token}},
	})
	if err != nil {
		return nil, nil, err
	}
	for _, m := range metas {
		rec, err := g.Ledger.Get(ctx, m.ID)
		if err != nil {
			return nil, nil, err
		}
		s, err := statementOf(rec)
		if err != nil {
			return nil, nil, err
		}
		img, err := s.Image()
		if err != nil {
			return nil, nil, err
		}
		digests, keys = append(digests, img.Ref.Digest), append(keys, m.Key)
	}
	return digests, keys, nil
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

// awaitAttached waits until the worker has attached both bundles everywhere. It
// attaches them itself when the records may be those of a request that left that
// to its caller: no task was made then.
func (g *Gate) awaitAttached(ctx context.Context, key string, s Signed) AttachState {
	done := func(ctx context.Context) (bool, error) {
		for _, id := range []attest.RecordID{s.Signature.ID, s.Provenance.ID} {
			if n, err := g.Ledger.TaskPending(ctx, id); err != nil || n > 0 {
				return false, err
			}
		}
		return true, nil
	}
	if !g.progress.await(ctx, attachWait, done) {
		return AttachPending
	}
	if s.tasked {
		return Attached
	}
	waiting, cancel := context.WithTimeout(ctx, attachWait)
	defer cancel()
	_, err := share(waiting, g, attest.Key("attach", key), func(ctx context.Context) (struct{}, error) {
		if err := g.attach(ctx, s.Signature, s.Image); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, g.attach(ctx, s.Provenance, s.Image)
	})
	if err != nil {
		g.Logger.Warn("attaching what a repeated request asks for", "record", s.Provenance.ID.String(), "error", err)
		return AttachPending
	}
	return Attached
}
