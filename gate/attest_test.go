package gate_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	statementv1 "github.com/in-toto/attestation/go/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

const (
	passed  = `{"result":"PASSED","configuration":[{"name":"ci.yml"}],"failedTests":[]}`
	failed  = `{"result":"FAILED","configuration":[{"name":"ci.yml"}],"failedTests":["a <b> & c"]}`
	bom     = `{"bomFormat":"CycloneDX","specVersion":"1.6","version":1,"components":[{"type":"library","name":"acme"}]}`
	ourType = "https://example.com/our-scan/v1"
)

// attesting is policyOf with attesters: the jobs of another repository, and people of
// the group qa.
func attesting(stages string) string {
	return strings.ReplaceAll(strings.Replace(policyOf(1, looseSigners, stages), "  auditors:\n", `  attesters:
  - {issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SCANNER'"}
  - {issuer: corp, images: ["REGISTRY/acme/*"], when: "'qa' in id.groups"}
  auditors:
`, 1), "SCANNER", dev.GitHubID("acme/scanner"))
}

// scannerToken is that of a job that may attest and not sign.
func scannerToken(s *testkit.Stack, changes map[string]any) string {
	c := dev.GitHubClaims("acme/scanner", testkit.Commit, "refs/heads/main")
	c["aud"] = s.URL
	for k, v := range changes {
		c[k] = v
	}
	return s.Token(c)
}

func attestTo(t testing.TB, s *testkit.Stack, token string, req gate.AttestRequest) gate.SignedEvidence {
	t.Helper()
	out, err := s.Gate.Attest(t.Context(), s.Identity(token), req)
	if err != nil {
		t.Fatalf("attesting %s: %v", req.PredicateType, err)
	}
	return out
}

func TestAttest(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	index, children := s.PushIndex("acme/multi")
	for _, row := range []struct {
		name, token, san string
		issuer           string
		req              gate.AttestRequest
	}{
		{"an attester", scannerToken(s, nil), "https://github.com/acme/scanner/.github/workflows/release.yml@refs/heads/main", s.Issuer.URL(),
			gate.AttestRequest{PredicateType: attest.PredicateTestResult, Predicate: []byte(failed), Name: "e2e"}},
		{"a signer", s.Token(nil), "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main", s.Issuer.URL(),
			gate.AttestRequest{PredicateType: attest.PredicateCycloneDX, Predicate: []byte(bom)}},
		{"a person", s.PersonToken("q-1", "qa"), s.Identity(s.PersonToken("q-1", "qa")).SAN, s.People.URL(),
			gate.AttestRequest{PredicateType: attest.PredicateTestResult, Predicate: []byte(passed), Name: "by hand"}},
		{"a type that nobody knows", s.Token(nil), "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main", s.Issuer.URL(),
			gate.AttestRequest{PredicateType: ourType, Predicate: []byte(`{"a": [1.0]}`)}},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.req.Ref = index.ImageRef
			got := attestTo(t, s, row.token, row.req)
			if got.Attach != gate.Attached || got.Repeated || got.PredicateType != row.req.PredicateType || got.Name != row.req.Name || got.Record.Kind != attest.KindEvidence {
				t.Errorf("%+v", got)
			}
			// About the index and each of its platforms, and nobody needs the others
			// to ask about one.
			if want := append([]attest.Digest{index.Digest}, children...); !slices.Equal(got.Image.Digests(), want) {
				t.Errorf("about %v, want %v", got.Image.Digests(), want)
			}
			for _, d := range got.Image.Digests() {
				ev, err := s.Verifier.Bundle(got.Bundle, d)
				if err != nil {
					t.Fatal(err)
				}
				if ev.Signer().SAN != row.san || ev.Signer().Issuer != row.issuer || ev.PredicateType() != row.req.PredicateType || ev.Statement().EvidenceName() != row.req.Name {
					t.Errorf("evidence %s %q by %+v", ev.PredicateType(), ev.Statement().EvidenceName(), ev.Signer())
				}
				wantAmongAttached(t, s, attest.ImageRef{Repository: index.Repository, Digest: d}, got.Bundle)
			}
			var st statementv1.Statement
			if err := protojson.Unmarshal(statementOf(t, s, got), &st); err != nil {
				t.Fatal(err)
			}
			if err := st.Validate(); err != nil {
				t.Errorf("in-toto refuses the statement: %v", err)
			}
			var compact bytes.Buffer
			if err := json.Compact(&compact, row.req.Predicate); err != nil {
				t.Fatal(err)
			}
			if p := statement(t, attest.Record{Envelope: attest.Envelope{Payload: statementOf(t, s, got)}}, nil).Predicate; !bytes.Equal(p, compact.Bytes()) {
				t.Errorf("the predicate is %s, not %s", p, compact.Bytes())
			}
			// The same again is the same record.
			if again := attestTo(t, s, row.token, row.req); !again.Repeated || again.Record.ID != got.Record.ID || !bytes.Equal(again.Bundle, got.Bundle) {
				t.Errorf("repeated: %t, record %s", again.Repeated, again.Record.ID)
			}
		})
	}
	for _, m := range find(t, s, attest.KindEvidence) {
		if rec, err := s.Ledger.Get(t.Context(), m.ID); err != nil || strings.Contains(string(rec.Payload), "q-1") {
			t.Errorf("the record names a person: %v", err)
		}
	}
	fsck(t, s)
}

func wantAmongAttached(t *testing.T, s *testkit.Stack, ref attest.ImageRef, bundle []byte) {
	t.Helper()
	got, err := s.Images.Attached(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(got, func(b []byte) bool { return bytes.Equal(b, bundle) }) {
		t.Errorf("not attached to %s", ref)
	}
}

// Whose evidence is newest decides, so another run, another name and other content are
// each a record of its own.
func TestAttestKeys(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	img := s.PushApp("acme/api")
	req := gate.AttestRequest{Ref: img.ImageRef, PredicateType: attest.PredicateTestResult, Predicate: []byte(passed), AttachByClient: true}
	token := s.Token(nil)
	seen := map[attest.RecordID]string{attestTo(t, s, token, req).Record.ID: "the first"}
	for _, row := range []struct {
		name, token string
		change      func(*gate.AttestRequest)
		fresh       bool
	}{
		{"another token of the run", s.Token(nil), func(*gate.AttestRequest) {}, false},
		{"attached by the server", token, func(r *gate.AttestRequest) { r.AttachByClient = false }, false},
		{"another attempt", s.Token(map[string]any{"run_attempt": "2"}), func(*gate.AttestRequest) {}, true},
		{"another job", scannerToken(s, nil), func(*gate.AttestRequest) {}, true},
		{"another name", token, func(r *gate.AttestRequest) { r.Name = "unit" }, true},
		{"another content", token, func(r *gate.AttestRequest) { r.Predicate = []byte(failed) }, true},
		{"another type", token, func(r *gate.AttestRequest) { r.PredicateType = ourType }, true},
		{"a person", s.PersonToken("q-1", "qa"), func(*gate.AttestRequest) {}, true},
		{"another person", s.PersonToken("q-2", "qa"), func(*gate.AttestRequest) {}, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := req
			row.change(&r)
			got := attestTo(t, s, row.token, r)
			other, known := seen[got.Record.ID]
			if known == row.fresh || got.Repeated == row.fresh {
				t.Errorf("record %s is also that of %q; repeated %t", got.Record.ID, other, got.Repeated)
			}
			seen[got.Record.ID] = row.name
		})
	}
	if got := attestTo(t, s, token, req); got.Attach != gate.AttachByClient {
		t.Errorf("attach %s", got.Attach)
	}
}

func TestAttestRefused(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	img := s.PushApp("acme/api")
	elsewhere := s.PushApp("other/api")
	missing := attest.ImageRef{Repository: img.Repository, Digest: attest.Hash([]byte("missing"))}
	good := gate.AttestRequest{Ref: img.ImageRef, PredicateType: attest.PredicateTestResult, Predicate: []byte(passed)}
	with := func(change func(*gate.AttestRequest)) gate.AttestRequest {
		r := good
		change(&r)
		return r
	}
	for _, row := range []struct {
		name, token string
		req         gate.AttestRequest
		want        attest.Reason
	}{
		{"nobody", scannerToken(s, map[string]any{"repository_id": "1"}), good, attest.SourceNotAllowed},
		{"an auditor", s.PersonToken("a-1", "audit"), good, attest.SourceNotAllowed},
		{"an attester, elsewhere", scannerToken(s, nil), with(func(r *gate.AttestRequest) { r.Ref = elsewhere.ImageRef }), attest.RoleMissing},
		{"B01 an attester's pull request", scannerToken(s, map[string]any{"event_name": "pull_request"}), good, attest.EventNotAllowed},
		{"D01 provenance", s.Token(nil), with(func(r *gate.AttestRequest) { r.PredicateType = attest.PredicateProvenance }), attest.ReservedPredicate},
		{"D01 a signature", s.Token(nil), with(func(r *gate.AttestRequest) { r.PredicateType = attest.PredicateSignature }), attest.ReservedPredicate},
		{"D01 a promotion", s.Token(nil), with(func(r *gate.AttestRequest) { r.PredicateType = attest.PredicatePromotion }), attest.ReservedPredicate},
		{"D01 provenance, spelled otherwise", s.Token(nil), with(func(r *gate.AttestRequest) { r.PredicateType = "http://slsa.dev:80//%70rovenance/v1/" }), attest.ReservedPredicate},
		{"no type", s.Token(nil), with(func(r *gate.AttestRequest) { r.PredicateType = "" }), attest.BadRequest},
		{"J04 a name with a line end", s.Token(nil), with(func(r *gate.AttestRequest) { r.Name = "a\nb" }), attest.BadRequest},
		{"D04 equal keys", s.Token(nil), with(func(r *gate.AttestRequest) { r.Predicate = []byte(`{"result":"FAILED","result":"PASSED"}`) }), attest.BadJSON},
		{"D04 no predicate", s.Token(nil), with(func(r *gate.AttestRequest) { r.Predicate = nil }), attest.BadJSON},
		{"not what the type demands", s.Token(nil), with(func(r *gate.AttestRequest) { r.Predicate = []byte(`{"result":"GREEN","configuration":[]}`) }), attest.PredicateInvalid},
		{"C03 more than 16 MiB", s.Token(nil), with(func(r *gate.AttestRequest) { r.Predicate = bytes.Repeat([]byte(" "), attest.MaxPredicate+1) }), attest.TooLarge},
		{"nothing under the digest", s.Token(nil), with(func(r *gate.AttestRequest) { r.Ref = missing }), attest.SubjectNotFound},
	} {
		t.Run(row.name, func(t *testing.T) {
			size := s.Ledger.Size()
			got, err := s.Gate.Attest(t.Context(), s.Identity(row.token), row.req)
			wantReason(t, err, row.want)
			if len(got.Bundle) > 0 || len(got.Record.Signature) > 0 || s.Ledger.Size() != size {
				t.Error("refused, and yet something was signed or recorded")
			}
		})
	}
	t.Run("an attester signs no image", func(t *testing.T) {
		_, err := trySign(t, s, scannerToken(s, nil), gate.SignImage{Ref: img.ImageRef})
		wantReason(t, err, attest.SourceNotAllowed)
	})
	if n := len(find(t, s, attest.KindEvidence)); n != 0 {
		t.Errorf("%d records of evidence", n)
	}
}

// D01: whatever an attester says, it is no signature and no provenance.
func TestD01EvidenceIsNoProvenance(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	img := s.PushApp("acme/api")
	signed := sign(t, s, s.Token(nil), s.PushApp("acme/web").ImageRef)
	forged := statement(t, signed.Provenance, nil).Predicate
	attestTo(t, s, s.Token(nil), gate.AttestRequest{Ref: img.ImageRef, PredicateType: "https://slsa.example.com/provenance/v1", Predicate: forged})
	got := promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	wantDenied(t, got.Decision, attest.NotSigned)
	wantResult(t, got.Decision, attest.NoProvenance)
}

// A job's whole set in one request: each image with what is about it, in the order of
// the request, under one identity.
func TestSignWithEvidence(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	a, b := s.PushApp("acme/a"), s.PushApp("acme/b")
	index, children := s.PushIndex("acme/multi")
	outside := s.PushApp("other/api")
	req := gate.SignRequest{
		Images: []gate.SignImage{{Ref: a.ImageRef, Facts: map[string]string{"ticket": "PAY-7"}}, {Ref: outside.ImageRef}, {Ref: index.ImageRef}, {Ref: b.ImageRef}},
		Evidence: []gate.Evidence{
			{PredicateType: attest.PredicateTestResult, Predicate: []byte(passed), Name: "unit"},
			{PredicateType: attest.PredicateCycloneDX, Predicate: []byte(bom), Images: []attest.ImageRef{a.ImageRef, outside.ImageRef}},
			{PredicateType: attest.PredicateTestResult, Predicate: []byte(failed), Name: "e2e", Images: []attest.ImageRef{b.ImageRef, index.ImageRef}},
		},
	}
	wants := [][]string{{"unit", ""}, {"unit", ""}, {"unit", "e2e"}, {"unit", "e2e"}}
	token := s.Token(nil)
	id := s.Identity(token)
	var first []gate.Signed
	for _, repeated := range []bool{false, true} {
		out, err := s.Gate.Sign(t.Context(), id, req)
		if err != nil {
			t.Fatal(err)
		}
		for i, o := range out {
			var names []string
			for _, e := range o.Evidence {
				names = append(names, e.Name)
			}
			if !slices.Equal(names, wants[i]) {
				t.Errorf("image %d has the evidence %q, want %q", i, names, wants[i])
			}
			if i == 1 { // not the job's to sign, nor to say anything about
				wantReason(t, o.Err, attest.RoleMissing)
				for _, e := range o.Evidence {
					wantReason(t, e.Err, attest.RoleMissing)
				}
				continue
			}
			if o.Err != nil || o.Repeated != repeated {
				t.Fatalf("image %d: %v, repeated %t", i, o.Err, o.Repeated)
			}
			for _, e := range o.Evidence {
				if e.Err != nil || e.Repeated != repeated || e.Attach != gate.Attached || len(e.Bundle) > 0 || e.Record.Index < o.Provenance.Index {
					t.Errorf("image %d, %s %q: %v, repeated %t, %s, bundle of %d bytes, index %d", i, e.PredicateType, e.Name, e.Err, e.Repeated, e.Attach, len(e.Bundle), e.Record.Index)
				}
				if !slices.Equal(e.Image.Digests(), o.Image.Digests()) {
					t.Errorf("image %d: evidence about %v", i, e.Image.Digests())
				}
			}
		}
		if !repeated {
			first = out
			continue
		}
		for i := range out {
			for j := range out[i].Evidence {
				if out[i].Evidence[j].Record.ID != first[i].Evidence[j].Record.ID {
					t.Errorf("image %d: evidence %d is another record", i, j)
				}
			}
		}
	}
	// One certificate for all of it: its key served one token.
	if pre := find(t, s, attest.KindPrecertificate); len(pre) != 1 {
		t.Errorf("%d certificates", len(pre))
	}
	var p attest.Provenance
	statement(t, first[0].Provenance, &p)
	if got := p.Internal().Caller["ticket"]; got != "PAY-7" || p.Grade("/predicate/buildDefinition/internalParameters/hallmark_caller") != attest.GradeCaller {
		t.Errorf("the caller's fact is %q, graded %q", got, p.Grade("/predicate/buildDefinition/internalParameters/hallmark_caller"))
	}
	for _, child := range children {
		stored, err := s.Images.Attached(t.Context(), attest.ImageRef{Repository: index.Repository, Digest: child})
		if err != nil || len(stored) != 4 {
			t.Errorf("%d bundles are attached to a platform, want 4: %v", len(stored), err)
		}
	}
	// What the first did not ask for is added to it.
	more := gate.SignRequest{Images: req.Images[:1], Evidence: []gate.Evidence{{PredicateType: ourType, Predicate: []byte(`{}`)}}, AttachByClient: true}
	out, err := s.Gate.Sign(t.Context(), id, more)
	if err != nil || out[0].Err != nil || !out[0].Repeated || out[0].Evidence[0].Repeated || len(out[0].Evidence[0].Bundle) == 0 || out[0].Evidence[0].Attach != gate.AttachByClient {
		t.Errorf("more evidence about it: %v %+v", err, out)
	}
	fsck(t, s)
}

// Nothing of a request is signed when any of it is malformed.
func TestSignWithEvidenceRefused(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	a, b := s.PushApp("acme/a"), s.PushApp("acme/b")
	good := gate.Evidence{PredicateType: attest.PredicateTestResult, Predicate: []byte(passed)}
	large := gate.Evidence{PredicateType: ourType, Predicate: append([]byte(`{"a":"`), append(bytes.Repeat([]byte("x"), 12<<20), `"}`...)...)}
	named := func(e gate.Evidence, name string, images ...attest.ImageRef) gate.Evidence {
		e.Name, e.Images = name, images
		return e
	}
	many := make([]gate.Evidence, gate.MaxEvidence+1)
	for i := range many {
		many[i] = named(good, fmt.Sprint(i))
	}
	for _, row := range []struct {
		name     string
		facts    map[string]string
		evidence []gate.Evidence
		want     attest.Reason
		field    string
	}{
		{"B07 a fact called commit", map[string]string{"commit": testkit.Commit}, nil, attest.CallerFactsRefused, "images[1].facts"},
		{"B07 a fact called builder.id", map[string]string{"builder.id": "https://example.com"}, nil, attest.CallerFactsRefused, "images[1].facts"},
		{"B07 a fact called run", map[string]string{"run": "1"}, nil, attest.CallerFactsRefused, "images[1].facts"},
		{"J04 a fact with a line end", map[string]string{"note": "a\nb"}, nil, attest.BadRequest, "images[1].facts"},
		{"D01 provenance among the evidence", nil, []gate.Evidence{good, {PredicateType: attest.PredicateProvenance, Predicate: []byte(`{}`)}}, attest.ReservedPredicate, "evidence[1]"},
		{"D04 evidence that is no JSON", nil, []gate.Evidence{good, {PredicateType: ourType, Predicate: []byte(`{`)}}, attest.BadJSON, "evidence[1]"},
		{"evidence that its schema refuses", nil, []gate.Evidence{{PredicateType: attest.PredicateCycloneDX, Predicate: []byte(`{}`)}}, attest.PredicateInvalid, "evidence[0]"},
		{"two of one type without names", nil, []gate.Evidence{good, {PredicateType: good.PredicateType, Predicate: []byte(failed)}}, attest.BadRequest, "evidence[1].name"},
		{"evidence about another image", nil, []gate.Evidence{named(good, "", attest.ImageRef{Repository: a.Repository, Digest: b.Digest})}, attest.BadRequest, "evidence[0].images[0]"},
		{"C03 too many", nil, many, attest.BadRequest, ""},
		{"C03 too large for all images", nil, []gate.Evidence{named(large, "1"), named(large, "2"), named(large, "3")}, attest.TooLarge, "evidence[2]"},
	} {
		t.Run(row.name, func(t *testing.T) {
			size := s.Ledger.Size()
			_, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), gate.SignRequest{
				Images: []gate.SignImage{{Ref: a.ImageRef}, {Ref: b.ImageRef, Facts: row.facts}}, Evidence: row.evidence, AttachByClient: true,
			})
			wantReason(t, err, row.want)
			if s.Ledger.Size() != size {
				t.Error("refused, and yet something was recorded")
			}
			if field := metadata(err)["field"]; field != row.field {
				t.Errorf("field %q, want %q", field, row.field)
			}
		})
	}
	// Nobody has predicates read who may sign nothing.
	out, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(map[string]any{"repository_id": "1"})), gate.SignRequest{
		Images: []gate.SignImage{{Ref: a.ImageRef}}, Evidence: []gate.Evidence{{PredicateType: ourType, Predicate: []byte(`{`)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	wantReason(t, out[0].Err, attest.SourceNotAllowed)
	wantReason(t, out[0].Evidence[0].Err, attest.SourceNotAllowed)
}

func metadata(err error) map[string]string {
	if e, ok := err.(*attest.Error); ok {
		return e.Metadata
	}
	return nil
}

// Requests that are the same and come at once make one record.
func TestConcurrentIdenticalAttest(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	img := s.PushApp("acme/api")
	id := s.Identity(s.Token(nil))
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := s.Gate.Attest(t.Context(), id, gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(find(t, s, attest.KindEvidence, about(img.Digest))); n != 1 {
		t.Errorf("%d records", n)
	}
}

// F09: two gates on one ledger sign the same evidence at the same moment. The first
// record in the log answers both, now and ever after.
func TestF09AttestedTwice(t *testing.T) {
	t.Parallel()
	var h hook
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage), Step: h.step})
	other, err := openGate(t, s, attesting(oneStage))
	if err != nil {
		t.Fatal(err)
	}
	img := s.PushApp("acme/api")
	id := s.Identity(s.Token(nil))
	req := gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`), AttachByClient: true}
	var first gate.SignedEvidence
	h.once("looked", func() { // of the one gate; the other has no hook
		if first, err = other.Attest(t.Context(), id, req); err != nil {
			t.Error(err)
		}
	})
	got := attestTo(t, s, s.Token(nil), req)
	if got.Record.ID != first.Record.ID || !bytes.Equal(got.Bundle, first.Bundle) || !got.Repeated {
		t.Errorf("the answers are the records %s and %s", first.Record.ID, got.Record.ID)
	}
	if again := attestTo(t, s, s.Token(nil), req); again.Record.ID != first.Record.ID {
		t.Errorf("later it is record %s", again.Record.ID)
	}
	if n := len(find(t, s, attest.KindEvidence)); n != 2 {
		t.Errorf("%d records: the test made no two", n)
	}
}

// F09: the log has the entry, and yet the caller was told LEDGER_UNAVAILABLE.
func TestF09AttestErrorThoughPersisted(t *testing.T) {
	t.Parallel()
	var h hook
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage), Step: h.step})
	img := s.PushApp("acme/api")
	req := gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`)}
	db := openDB(t, s)
	h.once("added", func() { execute(t, db, `ALTER TABLE records RENAME TO gone`) })
	_, err := s.Gate.Attest(t.Context(), s.Identity(s.Token(nil)), req)
	wantReason(t, err, attest.LedgerUnavailable)
	wantAttached(t, s, img.ImageRef)
	execute(t, db, `ALTER TABLE gone RENAME TO records`)
	again := attestTo(t, s, s.Token(nil), req)
	if all := find(t, s, attest.KindEvidence); len(all) != 1 || all[0].ID != again.Record.ID || again.Attach != gate.Attached {
		t.Errorf("the request has %d records, and is answered with %d, %s", len(all), again.Record.Index, again.Attach)
	}
	fsck(t, s)
}

// I11: large predicates take turns, however many come at once; small ones pass them.
func TestI11LargeEvidenceTakesTurns(t *testing.T) {
	t.Parallel()
	var h hook
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage), Step: h.step})
	img := s.PushApp("acme/api")
	large := []byte(`{"a":"` + strings.Repeat("x", 13<<20) + `"}`)
	id := s.Identity(s.Token(nil))
	say := func(name string, predicate []byte) {
		if _, err := s.Gate.Attest(t.Context(), id, gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: predicate, Name: name, AttachByClient: true}); err != nil {
			t.Error(err)
		}
	}
	reached, proceed := make(chan struct{}), make(chan struct{})
	h.once("looked", func() { close(reached); <-proceed })
	var wg sync.WaitGroup
	wg.Go(func() { say("first", large) })
	<-reached
	var looked atomic.Int32
	h.set(func(step string) {
		if step == "looked" {
			looked.Add(1)
		}
	})
	wg.Go(func() { say("second", large) })
	const small = 20 // as long as these take, the second could have come
	for n := range small {
		say(fmt.Sprint(n), []byte(`{}`))
	}
	if n := looked.Load(); n != small {
		t.Errorf("%d predicates went on while a large one was worked on, want %d", n, small)
	}
	close(proceed)
	wg.Wait()
	if n := looked.Load(); n != small+1 {
		t.Errorf("%d predicates went on in the end", n)
	}
}

// Evidence counts against the budget of its token, also when the service has
// forgotten which it was.
func TestEvidenceTokenBudget(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	images := pushMany(s, t, gate.MaxTokenDigests+1)
	id := s.Identity(s.Token(nil))
	say := func(img gate.SignImage, n int) error {
		_, err := s.Gate.Attest(t.Context(), id, gate.AttestRequest{Ref: img.Ref, PredicateType: ourType, Predicate: fmt.Appendf(nil, `{"n":%d}`, n), AttachByClient: true})
		return err
	}
	var group sync.WaitGroup
	for _, img := range images[:gate.MaxTokenDigests] {
		group.Go(func() {
			if err := say(img, 0); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	for _, when := range []string{"running", "after a restart"} {
		t.Run(when, func(t *testing.T) {
			last := images[gate.MaxTokenDigests]
			wantReason(t, say(last, 0), attest.TokenSpent)
			out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: []gate.SignImage{last}})
			if err != nil {
				t.Fatal(err)
			}
			wantReason(t, out[0].Err, attest.TokenSpent)
			if err := say(images[0], len(when)); err != nil {
				t.Errorf("more about a digest that it has: %v", err)
			}
		})
		s.Restart()
	}
	for n := 100; ; n++ { // 64 and 2 so far
		if err := say(images[n%gate.MaxTokenDigests], n); err != nil {
			wantReason(t, err, attest.TokenSpent)
			break
		}
		if n > 100+gate.MaxTokenRequests {
			t.Fatal("a token's requests have no end")
		}
	}
	if n := len(find(t, s, attest.KindEvidence)); n != gate.MaxTokenRequests {
		t.Errorf("%d records, want %d", n, gate.MaxTokenRequests)
	}
}

// What was recorded without a task is attached when a repetition asks for it.
func TestRepeatedAttestAttaches(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: attesting(oneStage)})
	img := s.PushApp("acme/api")
	req := gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`), AttachByClient: true}
	token := s.Token(nil)
	first := attestTo(t, s, token, req)
	wantAttached(t, s, img.ImageRef)
	req.AttachByClient = false
	if again := attestTo(t, s, token, req); again.Attach != gate.Attached || again.Record.ID != first.Record.ID {
		t.Errorf("%s, record %s", again.Attach, again.Record.ID)
	}
	wantAttached(t, s, img.ImageRef, first.Bundle)
}

func TestStopBetweenStepsOfAttesting(t *testing.T) {
	t.Parallel()
	if text := os.Getenv(orderVariable); text != "" {
		obey(t, text)
		return
	}
	var h hook
	o := order{Dir: t.TempDir(), Policy: attesting(oneStage), Attest: true}
	s := testkit.NewStack(t, testkit.Options{Dir: o.Dir, Policy: o.Policy, Step: h.step})
	o.Around = s.Around()
	img := s.PushApp("acme/api")
	steps := rehearse(t, s, &h, func() { actAttest(t, s, s.Identity(s.Token(nil)), img.ImageRef) })
	wantSteps(t, steps, append(ledgerSteps, "looked", "signed", "recorded", "attach")...)

	for _, at := range steps {
		t.Run(fmt.Sprintf("after %s %d", at.step, at.nth), func(t *testing.T) {
			s.Close()
			img := s.PushApp("acme/api")
			token := s.Token(nil)
			o := o
			o.Token, o.Image, o.Step, o.Nth = token, img.String(), at.step, at.nth
			send(t, "TestStopBetweenStepsOfAttesting", o)

			s.Restart()
			want := 1
			if at.step == "looked" || at.step == "signed" {
				want = 0 // nothing was stored
			}
			before := find(t, s, attest.KindEvidence, about(img.Digest))
			if len(before) != want {
				t.Errorf("%d records before the request is repeated, want %d", len(before), want)
			}
			idle(t, s)
			stored, err := s.Images.Attached(t.Context(), img.ImageRef)
			if err != nil || len(stored) != len(before) {
				t.Errorf("%d bundles are attached, %d requests are recorded: %v", len(stored), len(before), err)
			}
			got := attestTo(t, s, token, crashEvidence(img.ImageRef))
			if got.Repeated != (want == 1) || got.Repeated && before[0].ID != got.Record.ID {
				t.Errorf("the answer is record %s, repeated %t; before %v", got.Record.ID, got.Repeated, before)
			}
			if n := len(find(t, s, attest.KindEvidence, about(img.Digest))); n != 1 {
				t.Errorf("%d records", n)
			}
			wantAttached(t, s, img.ImageRef, got.Bundle)
			if report := fsck(t, s); report.Unlogged != 0 {
				t.Errorf("%d envelopes were left out of the log", report.Unlogged)
			}
		})
	}
}

func crashEvidence(ref attest.ImageRef) gate.AttestRequest {
	return gate.AttestRequest{Ref: ref, PredicateType: attest.PredicateTestResult, Predicate: []byte(passed), Name: "unit"}
}

// actAttest is the request that is stopped.
func actAttest(t *testing.T, s *testkit.Stack, id attest.Identity, ref attest.ImageRef) {
	t.Helper()
	if _, err := s.Gate.Attest(t.Context(), id, crashEvidence(ref)); err != nil {
		t.Fatal(err)
	}
}

// statementOf reads what was signed from the ledger: the answer has it in its bundle.
func statementOf(t testing.TB, s *testkit.Stack, e gate.SignedEvidence) []byte {
	t.Helper()
	rec, err := s.Ledger.Get(t.Context(), e.Record.ID)
	if err != nil {
		t.Fatal(err)
	}
	return rec.Payload
}
