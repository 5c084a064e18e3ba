package gate_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/signer"
)

// replaying starts a stack whose CI issuer has the mode that *mode says at each start.
func replaying(t *testing.T, mode *string, h *hook) *testkit.Stack {
	o := testkit.Options{Policy: attesting(oneStage), Issue: func(issuers *[]identity.Issuer) { (*issuers)[0].Replay = *mode }}
	if h != nil {
		o.Step = h.step
	}
	return testkit.NewStack(t, o)
}

// call is one request that a token may be used for.
type call struct {
	name string
	do   func(t testing.TB, s *testkit.Stack, id attest.Identity) (recs []attest.RecordID, repeated bool, err error)
}

func toSign(name string, req gate.SignRequest) call {
	return call{name, func(t testing.TB, s *testkit.Stack, id attest.Identity) (recs []attest.RecordID, repeated bool, err error) {
		out, err := s.Gate.Sign(context.WithoutCancel(t.Context()), id, req)
		if err != nil {
			return nil, false, err
		}
		for _, o := range out {
			if o.Err != nil {
				err = o.Err
				continue
			}
			recs, repeated = append(recs, o.Provenance.ID), o.Repeated
			for _, e := range o.Evidence {
				recs = append(recs, e.Record.ID)
				if e.Err != nil {
					err = e.Err
				}
			}
		}
		return recs, repeated, err
	}}
}

func toAttest(name string, req gate.AttestRequest) call {
	return call{name, func(t testing.TB, s *testkit.Stack, id attest.Identity) ([]attest.RecordID, bool, error) {
		out, err := s.Gate.Attest(context.WithoutCancel(t.Context()), id, req)
		return []attest.RecordID{out.Record.ID}, out.Repeated, err
	}}
}

func rebuild(t *testing.T, s *testkit.Stack) {
	t.Helper()
	s.Close()
	keys, err := signer.Open(signer.Config{Dir: filepath.Join(s.DataDir, "keys"), Service: s.URL, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	if err := ledger.Rebuild(t.Context(), ledger.Config{Dir: s.DataDir, Origin: keys.Origin(), LogKey: keys.LogKey()}); err != nil {
		t.Fatal(err)
	}
	s.Restart()
}

// B13: a token that is good for one request is good for that and its repetitions, and
// for no other, whatever the service has forgotten in between.
func TestB13ReplayOnce(t *testing.T) {
	t.Parallel()
	mode := "once"
	s := replaying(t, &mode, nil)
	a, b := s.PushApp("acme/a"), s.PushApp("acme/b")
	image := gate.SignImage{Ref: a.ImageRef}
	evidence := gate.Evidence{PredicateType: ourType, Predicate: []byte(`{}`)}
	one := gate.SignRequest{Images: []gate.SignImage{image}, Evidence: []gate.Evidence{evidence}}
	say := gate.AttestRequest{Ref: a.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`), Name: "alone"}
	change := func(f func(*gate.SignRequest)) gate.SignRequest {
		r := gate.SignRequest{Images: []gate.SignImage{image}, Evidence: []gate.Evidence{evidence}}
		f(&r)
		return r
	}
	again := func(f func(*gate.AttestRequest)) gate.AttestRequest {
		r := say
		f(&r)
		return r
	}
	all := []call{
		toSign("an image with its evidence", one),
		toSign("another image", change(func(r *gate.SignRequest) { r.Images[0].Ref = b.ImageRef })),
		toSign("one image more", change(func(r *gate.SignRequest) { r.Images = append(r.Images, gate.SignImage{Ref: b.ImageRef}) })),
		toSign("a fact more", change(func(r *gate.SignRequest) { r.Images[0].Facts = map[string]string{"ticket": "1"} })),
		toSign("another fact", change(func(r *gate.SignRequest) { r.Images[0].Facts = map[string]string{"ticket": "2"} })),
		toSign("a hint more", change(func(r *gate.SignRequest) { r.Images[0].Base = "registry.example.com/base:1" })),
		toSign("no evidence", change(func(r *gate.SignRequest) { r.Evidence = nil })),
		toSign("other evidence", change(func(r *gate.SignRequest) { r.Evidence[0].Predicate = []byte(`{"a":1}`) })),
		toSign("evidence of another type", change(func(r *gate.SignRequest) { r.Evidence[0].PredicateType += "/x" })),
		toSign("evidence of another name", change(func(r *gate.SignRequest) { r.Evidence[0].Name = "x" })),
		toSign("evidence that names its image", change(func(r *gate.SignRequest) { r.Evidence[0].Images = []attest.ImageRef{a.ImageRef} })),
		toAttest("evidence alone", say),
		toAttest("evidence alone about another image", again(func(r *gate.AttestRequest) { r.Ref = b.ImageRef })),
		toAttest("evidence alone of another type", again(func(r *gate.AttestRequest) { r.PredicateType += "/x" })),
		toAttest("other evidence alone", again(func(r *gate.AttestRequest) { r.Predicate = []byte(`{"a":1}`) })),
		toAttest("evidence alone of another name", again(func(r *gate.AttestRequest) { r.Name = "x" })),
	}
	// Each of them uses a token up, in a run of its own so that nothing is answered
	// from another's records.
	type used struct {
		id   attest.Identity
		recs []attest.RecordID
	}
	var tokens []used
	for i, c := range all {
		id := s.Identity(s.Token(map[string]any{"run_id": fmt.Sprint(1000 + i)}))
		recs, repeated, err := c.do(t, s, id)
		if err != nil || repeated {
			t.Fatalf("%s: %v, repeated %t", c.name, err, repeated)
		}
		tokens = append(tokens, used{id, recs})
	}
	size := s.Ledger.Size()
	for _, when := range []struct {
		name string
		come func()
	}{
		{"at once", func() {}},
		{"after a restart", s.Restart},
		{"after a rebuild", func() { rebuild(t, s) }},
	} {
		when.come()
		for i, u := range tokens {
			for j, c := range all {
				t.Run("B13 "+when.name+", token of: "+all[i].name+", used for: "+c.name, func(t *testing.T) {
					recs, repeated, err := c.do(t, s, u.id)
					if i != j {
						wantReason(t, err, attest.TokenReplayed)
						return
					}
					if err != nil || !repeated || fmt.Sprint(recs) != fmt.Sprint(u.recs) {
						t.Errorf("the same request again: %v, repeated %t, records %v, want %v", err, repeated, recs, u.recs)
					}
				})
			}
		}
	}
	if s.Ledger.Size() != size {
		t.Errorf("%d entries came from repetitions", s.Ledger.Size()-size)
	}
	// Who attaches is no other request.
	byClient := one
	byClient.AttachByClient = true
	if _, repeated, err := toSign("", byClient).do(t, s, tokens[0].id); err != nil || !repeated {
		t.Errorf("attached by the client: %v, repeated %t", err, repeated)
	}
	fsck(t, s)
}

// The default: any image that the identity may sign, until the token expires. Turned
// to once, a token that signed before is no longer good for anything new.
func TestReplayJob(t *testing.T) {
	t.Parallel()
	mode := "job"
	s := replaying(t, &mode, nil)
	a, b, c := s.PushApp("acme/a"), s.PushApp("acme/b"), s.PushApp("acme/c")
	token := s.Token(nil)
	for _, img := range []testkit.Pushed{a, b} {
		sign(t, s, token, img.ImageRef)
		attestTo(t, s, token, gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`)})
	}
	mode = "once"
	s.Restart()
	_, err := trySign(t, s, token, gate.SignImage{Ref: c.ImageRef})
	wantReason(t, err, attest.TokenReplayed)
	sign(t, s, s.Token(nil), c.ImageRef)

	// And one that was used in both ways is good for neither of its requests.
	both := s.Identity(s.Token(map[string]any{"run_id": "77"}))
	said := toAttest("", gate.AttestRequest{Ref: c.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`)})
	if _, _, err := said.do(t, s, both); err != nil {
		t.Fatal(err)
	}
	mode = "job"
	s.Restart()
	both.Once = false
	if _, _, err := toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: c.ImageRef}}}).do(t, s, both); err != nil {
		t.Fatal(err)
	}
	mode = "once"
	s.Restart()
	both.Once = true
	_, _, err = said.do(t, s, both)
	wantReason(t, err, attest.TokenReplayed)
}

// B13: of several requests with one token that come at once, one is signed.
func TestB13ReplayOnceConcurrently(t *testing.T) {
	t.Parallel()
	mode := "once"
	s := replaying(t, &mode, nil)
	images := pushMany(s, t, 8)
	id := s.Identity(s.Token(nil))
	var won atomic.Int32
	var wg sync.WaitGroup
	for i, img := range images {
		for range 2 { // and a repetition of each
			wg.Go(func() {
				c := toSign("", gate.SignRequest{Images: []gate.SignImage{img}, AttachByClient: true})
				if i%2 == 1 {
					c = toAttest("", gate.AttestRequest{Ref: img.Ref, PredicateType: ourType, Predicate: []byte(`{}`), AttachByClient: true})
				}
				_, _, err := c.do(t, s, id)
				if err == nil {
					won.Add(1)
					return
				}
				wantReason(t, err, attest.TokenReplayed)
			})
		}
	}
	wg.Wait()
	prov, ev := find(t, s, attest.KindProvenance), find(t, s, attest.KindEvidence)
	if len(prov)+len(ev) != 1 || won.Load() == 0 || won.Load() > 2 {
		t.Errorf("%d calls were answered, %d images and %d predicates signed; want one", won.Load(), len(prov), len(ev))
	}
}

// A request of which nothing was recorded gives the token back; one of which something
// was, or may have been, does not.
func TestReplayOnceAfterFailure(t *testing.T) {
	t.Parallel()
	mode := "once"
	var h hook
	s := replaying(t, &mode, &h)
	img, other := s.PushApp("acme/a"), s.PushApp("acme/b")
	missing := attest.ImageRef{Repository: img.Repository, Digest: attest.Hash([]byte("missing"))}
	good := toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})

	t.Run("nothing was there to sign", func(t *testing.T) {
		id := s.Identity(s.Token(map[string]any{"run_id": "1"}))
		_, _, err := toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: missing}}}).do(t, s, id)
		wantReason(t, err, attest.SubjectNotFound)
		_, _, err = toAttest("", gate.AttestRequest{Ref: missing, PredicateType: ourType, Predicate: []byte(`{}`)}).do(t, s, id)
		wantReason(t, err, attest.SubjectNotFound)
		if _, _, err := good.do(t, s, id); err != nil {
			t.Error(err)
		}
	})
	t.Run("something was", func(t *testing.T) {
		id := s.Identity(s.Token(map[string]any{"run_id": "2"}))
		half := toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: missing}, {Ref: img.ImageRef}}})
		recs, _, err := half.do(t, s, id)
		wantReason(t, err, attest.SubjectNotFound)
		if len(recs) != 1 {
			t.Fatalf("%d records", len(recs))
		}
		_, _, err = good.do(t, s, id)
		wantReason(t, err, attest.TokenReplayed)
		if _, repeated, err := half.do(t, s, id); !repeated {
			t.Errorf("the same request again: %v, repeated %t", err, repeated)
		}
	})
	t.Run("something may have been", func(t *testing.T) {
		id := s.Identity(s.Token(map[string]any{"run_id": "3"}))
		h.once("signed", func() { execute(t, openDB(t, s), `ALTER TABLE envelopes RENAME TO gone`) })
		_, _, err := good.do(t, s, id)
		wantReason(t, err, attest.LedgerUnavailable)
		execute(t, openDB(t, s), `ALTER TABLE gone RENAME TO envelopes`)
		_, _, err = toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: other.ImageRef}}}).do(t, s, id)
		wantReason(t, err, attest.TokenReplayed)
		if _, _, err := good.do(t, s, id); err != nil {
			t.Errorf("the same request again: %v", err)
		}
	})
	// Its caller is gone and the request goes on: the token is not given to another.
	t.Run("the caller went away", func(t *testing.T) {
		id := s.Identity(s.Token(map[string]any{"run_id": "4"}))
		ctx, cancel := context.WithCancel(t.Context())
		reached, proceed := make(chan struct{}), make(chan struct{})
		h.once("fetched", func() { close(reached); <-proceed })
		left := make(chan struct{})
		go func() {
			defer close(left)
			// Whatever it answers, nobody hears it.
			_, _ = s.Gate.Sign(ctx, id, gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})
		}()
		<-reached
		cancel()
		<-left
		_, _, err := toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: other.ImageRef}}}).do(t, s, id)
		wantReason(t, err, attest.TokenReplayed)
		close(proceed)
		if _, _, err := good.do(t, s, id); err != nil {
			t.Error(err)
		}
		if n := len(find(t, s, attest.KindProvenance, attest.Facet{Name: attest.FacetToken, Value: id.TokenID})); n != 1 {
			t.Errorf("%d records with the token", n)
		}
	})
}

// B13: a token counts nowhere else, not under another spelling, and not for ever.
func TestB13TokenElsewhere(t *testing.T) {
	t.Parallel()
	mode := "once"
	s := replaying(t, &mode, nil)
	parts := strings.Split(s.Token(nil), ".")
	sig, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		t.Fatal(err)
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	forged := base64.RawURLEncoding.EncodeToString(bytes.Replace(claims, []byte(`"sub":"repo:`), []byte(`"sub":"repo:x`), 1))
	// The last of 342 digits has four bits that no byte of the signature is made of.
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(parts[2]) - 1
	unused := parts[2][:last] + string(digits[strings.IndexByte(digits, parts[2][last])+1])
	past := time.Now().Add(-time.Hour)
	for _, row := range []struct {
		name, token string
		want        attest.Reason
	}{
		{"B13 another audience", s.Token(map[string]any{"aud": "sigstore"}), attest.TokenAudience},
		{"B13 another deployment", s.Token(map[string]any{"aud": "https://hallmark-staging.example.com"}), attest.TokenAudience},
		{"B13 this deployment and another", s.Token(map[string]any{"aud": []string{s.URL, "https://hallmark-staging.example.com"}}), attest.TokenAudience},
		{"B13 another subject", parts[0] + "." + forged + "." + parts[2], attest.TokenSignature},
		{"A18 padding", parts[0] + "." + parts[1] + "." + base64.URLEncoding.EncodeToString(sig) + "=", attest.TokenMalformed},
		{"A18 unused bits", parts[0] + "." + parts[1] + "." + unused, attest.TokenMalformed},
		{"A18 a line end", parts[0] + "." + parts[1] + "." + parts[2] + "\n", attest.TokenMalformed},
		{"B13 after its end", s.Token(map[string]any{"iat": past.Unix(), "nbf": past.Unix(), "exp": past.Add(5 * time.Minute).Unix()}), attest.TokenExpired},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := s.Auth.Authenticate(t.Context(), row.token)
			wantReason(t, err, row.want)
		})
	}
}

// What goes on after its caller went away holds the token until it has ended, and
// gives it back when nothing came of it.
func TestReplayOnceGivenBackLate(t *testing.T) {
	t.Parallel()
	mode := "once"
	s := replaying(t, &mode, nil)
	img, other := s.PushApp("acme/a"), s.PushApp("acme/b")
	reached, proceed := make(chan struct{}), make(chan struct{})
	s.SetGate(func(c *gate.Config) {
		c.Images = func(ctx context.Context, ref attest.ImageRef, hint string, mayRead func(attest.Repository) bool) (attest.Image, error) {
			if ref == img.ImageRef {
				close(reached)
				<-proceed
				return attest.Image{}, attest.Errorf(attest.SubjectNotFound, "it is gone")
			}
			return c.Registry.Image(ctx, ref, hint, nil, mayRead)
		}
	})
	s.Restart()
	id := s.Identity(s.Token(nil))
	another := toSign("", gate.SignRequest{Images: []gate.SignImage{{Ref: other.ImageRef}}, AttachByClient: true})
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan struct{})
	go func() {
		defer close(left)
		// Whatever it answers, nobody hears it.
		_, _ = s.Gate.Sign(ctx, id, gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})
	}()
	<-reached
	cancel()
	<-left
	_, _, err := another.do(t, s, id)
	wantReason(t, err, attest.TokenReplayed)
	close(proceed)
	eventually(t, "the token is given back", func() bool {
		_, _, err := another.do(t, s, id)
		return err == nil
	})
}
