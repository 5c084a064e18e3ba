package gate_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/registry"
)

func TestPromoteThroughAllStages(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	var last gate.Promoted
	for _, stage := range []string{"test", "staging", "prod"} {
		last = done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: stage, Version: "1.4.0", Reason: "release", Ticket: "REL-7"})
		if last.Stage != stage || last.Track != "acme" || len(last.Now) != 1 || last.Now[0].Digest != img.Digest {
			t.Errorf("%s: %+v", stage, last.Decision)
		}
		checkSummary(t, s, last, img)
	}
	prod := attest.Repository(s.Registry.Host() + "/prod/api")
	if last.Target != string(prod)+":1.4.0" {
		t.Errorf("target %s", last.Target)
	}
	now, err := s.Images.Resolve(t.Context(), prod, "1.4.0")
	if err != nil || now != img.Digest {
		t.Errorf("the target is %s (%v), want %s", now, err, img.Digest)
	}
	// Whoever pulls from the target finds the signature, the provenance and the
	// summary there.
	eventually(t, "the summary is attached in the target", func() bool {
		got, err := s.Images.Attached(t.Context(), attest.ImageRef{Repository: prod, Digest: img.Digest})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range got {
			if bytes.Equal(b, last.VSABundle) {
				return true
			}
		}
		return false
	})
	status, _, err := s.Gate.Stages(t.Context(), auditor(s), gate.StagesQuery{})
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range status {
		if st.Current == nil || st.Current.Digest != img.Digest || st.Current.State != string(ledger.Done) {
			t.Errorf("stage %s: %+v", st.Stage, st.Current)
		}
	}
	if len(status) != 3 {
		t.Errorf("%d stages", len(status))
	}
	// The decision can be read again by its number, also after a restart.
	s.Restart()
	again, err := s.Gate.Decision(t.Context(), auditor(s), last.Number)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(last.Decision, again); d != "" {
		t.Errorf("the decision changed (-first +again):\n%s", d)
	}
	fsck(t, s)
}

// checkSummary holds a summary against slsa.dev/spec/v1.2, verification_summary,
// letter by letter.
func checkSummary(t *testing.T, s *testkit.Stack, p gate.Promoted, img testkit.Pushed) {
	t.Helper()
	ev, err := s.Verifier.Bundle(p.VSABundle, img.Digest)
	if err != nil {
		t.Fatalf("the summary does not verify: %v", err)
	}
	if sig := ev.Signer(); !sig.Gate || sig.SAN != s.URL+"/gate" {
		t.Errorf("signed by %+v", sig)
	}
	type envelope struct {
		Payload     string           `json:"payload"`
		PayloadType string           `json:"payloadType"`
		Signatures  []map[string]any `json:"signatures"`
	}
	var plain envelope
	var bundle struct {
		DSSE envelope `json:"dsseEnvelope"`
	}
	for b, into := range map[*[]byte]any{&p.VSABundle: &bundle, &p.VSAEnvelope: &plain} {
		if err := json.Unmarshal(*b, into); err != nil {
			t.Fatal(err)
		}
	}
	for form, e := range map[string]envelope{"bundle": bundle.DSSE, "plain": plain} {
		if e.Payload != plain.Payload || e.PayloadType != "application/vnd.in-toto+json" || len(e.Signatures) != 1 {
			t.Errorf("%s: another payload, type %s, %d signatures", form, e.PayloadType, len(e.Signatures))
		}
		if id, ok := e.Signatures[0]["keyid"]; ok && id != "" {
			t.Errorf("%s: keyid %v", form, id)
		}
	}
	payload, err := base64.StdEncoding.DecodeString(plain.Payload)
	if err != nil {
		t.Fatal(err)
	}
	// What the log has of the decision says what must be in the summary.
	rec, err := s.Ledger.Get(t.Context(), p.RecordID)
	if err != nil {
		t.Fatal(err)
	}
	var promotion attest.Promotion
	statement(t, rec, &promotion)
	var inputs []any
	kinds := map[attest.RecordKind]bool{}
	for _, e := range promotion.Evidence {
		used, err := s.Ledger.Get(t.Context(), e.Record)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := used.DSSE()
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(raw)
		kinds[used.Kind] = true
		inputs = append(inputs, map[string]any{
			"uri": s.URL + "/v1/records/" + e.Record.String(), "digest": map[string]any{"sha256": hex.EncodeToString(sum[:])},
		})
	}
	if !kinds[attest.KindSignature] || !kinds[attest.KindProvenance] || len(inputs) != 2 {
		t.Errorf("the decision rests on %v", promotion.Evidence)
	}
	resource := "oci://" + string(img.Repository)
	if p.Stage == "prod" {
		resource = "oci://" + s.Registry.Host() + "/prod/api"
	}
	want := map[string]any{
		"_type":         "https://in-toto.io/Statement/v1",
		"subject":       []any{map[string]any{"digest": map[string]any{"sha256": img.Digest.Hex()}}},
		"predicateType": "https://slsa.dev/verification_summary/v1",
		"predicate": map[string]any{
			"verifier":     map[string]any{"id": s.URL + "/gate"},
			"timeVerified": promotion.DecidedAt,
			"resourceUri":  resource,
			"policy": map[string]any{
				"uri": s.URL + "/policy/acme", "digest": map[string]any{"sha256": s.Policy.Digest().Hex()},
			},
			"inputAttestations":  inputs,
			"verificationResult": "PASSED",
			"verifiedLevels":     []any{"SLSA_BUILD_LEVEL_2", "HALLMARK_ACME_" + strings.ToUpper(p.Stage)},
			"slsaVersion":        "1.2",
		},
	}
	var got map[string]any
	if err := json.Unmarshal(payload, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("summary (-want +got):\n%s", d)
	}
	if at, err := time.Parse(time.RFC3339, promotion.DecidedAt); err != nil || at.Location() != time.UTC || time.Since(at).Abs() > time.Minute {
		t.Errorf("timeVerified %s: %v", promotion.DecidedAt, err)
	}
	recs := find(t, s, attest.KindVSA, about(img.Digest), attest.Facet{Name: attest.FacetRepository, Value: strings.TrimPrefix(resource, "oci://")})
	if p.Stage == "prod" && len(recs) != 2 {
		t.Errorf("%d summaries recorded, want the two forms", len(recs))
	}
}

// An index is promoted with its platforms: each of them may run.
func TestPromoteIndex(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img, children := s.PushIndex("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	first := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	ev, err := s.Verifier.Bundle(first.VSABundle, children[1])
	if err != nil || len(ev.Digests()) != 3 {
		t.Errorf("the summary for a platform: %v", err)
	}
	verify := func(d attest.Digest) gate.Decision {
		t.Helper()
		out, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: attest.ImageRef{Repository: img.Repository, Digest: d}, Stage: "test"})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, d := range append(children, img.Digest) {
		if out := verify(d); out.Verdict != gate.Allowed {
			t.Errorf("%s: %+v", d, out.Results)
		}
	}
	next := s.PushApp("acme/api")
	sign(t, s, s.Token(map[string]any{"run_id": "9913"}), next.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: next.ImageRef, ToStage: "test"})
	for _, d := range append(children, img.Digest) {
		wantDenied(t, verify(d), attest.Superseded)
	}
}

// A digest that was replaced long ago is still one that was there.
func TestVerifyStage(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	ask := func(ref attest.ImageRef) gate.Decision {
		t.Helper()
		size := s.Ledger.Size()
		out, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: ref, Stage: "test"})
		if err != nil {
			t.Fatal(err)
		}
		if s.Ledger.Size() != size {
			t.Error("a question was recorded")
		}
		return out
	}
	var images []attest.ImageRef
	for n := range 8 {
		img := s.Push("acme/api", "", testkit.RandomImage(t))
		wantDenied(t, ask(img.ImageRef), attest.NotPromoted)
		sign(t, s, s.Token(nil), img.ImageRef)
		wantDenied(t, ask(img.ImageRef), attest.NotPromoted)
		done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test", Version: fmt.Sprint(n)})
		if out := ask(img.ImageRef); out.Verdict != gate.Allowed || len(out.Now) != 1 || out.Now[0].Digest != img.Digest {
			t.Errorf("%+v", out)
		}
		for _, old := range images {
			wantDenied(t, ask(old), attest.Superseded)
		}
		images = append(images, img.ImageRef)
	}
	// Back to an old one: it is in the stage again.
	done(t, s, gate.PromoteRequest{Ref: images[1], ToStage: "test"})
	if out := ask(images[1]); out.Verdict != gate.Allowed {
		t.Errorf("%+v", out)
	}
	wantDenied(t, ask(images[7]), attest.Superseded)

	for _, row := range []struct {
		name  string
		track string
		stage string
		want  attest.Reason
	}{
		{"unknown stage", "", "live", attest.StageUnknown},
		{"unknown track", "other", "test", attest.TrackUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: images[1], Track: row.track, Stage: row.stage})
			wantReason(t, err, row.want)
			_, err = s.Gate.Promote(t.Context(), s.Identity(s.PromoterToken()), gate.PromoteRequest{Ref: images[1], Track: row.track, ToStage: row.stage})
			wantReason(t, err, row.want)
		})
	}
}

func TestVerifySigned(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	ask := func() gate.Decision {
		t.Helper()
		out, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: img.ImageRef})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	wantDenied(t, ask(), attest.NotSigned)
	sign(t, s, s.Token(nil), img.ImageRef)
	if out := ask(); out.Verdict != gate.Allowed || out.Number != 0 {
		t.Errorf("%+v", out)
	}
}

// A denial is recorded once for the same question on the same inputs.
func TestDenials(t *testing.T) {
	t.Parallel()
	now := newClock()
	// Jobs of any branch sign, and only those of main may go to the stage.
	stage := strings.Replace(oneStage, "min_level", `refs: ["refs/heads/main"], min_level`, 1)
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, stage), Now: now.Now})
	img := s.PushApp("acme/api")
	ask := func(ref attest.ImageRef) gate.Promoted {
		t.Helper()
		out := promote(t, s, gate.PromoteRequest{Ref: ref, ToStage: "live", Version: "1"})
		if out.Verdict != gate.Denied || out.Number == 0 {
			t.Fatalf("%s, number %d: %+v", out.Verdict, out.Number, out.Results)
		}
		return out
	}
	first := ask(img.ImageRef)
	wantResult(t, first.Decision, attest.NoProvenance)
	if again := ask(img.ImageRef); again.Number != first.Number || again.RecordID != first.RecordID {
		t.Errorf("the same question is decision %d and %d", first.Number, again.Number)
	}
	var denial attest.Denial
	rec, err := s.Ledger.Get(t.Context(), first.RecordID)
	if err != nil {
		t.Fatal(err)
	}
	statement(t, rec, &denial)
	if denial.LogSize > rec.Index || denial.Stage != "live" || denial.Caller.Name == "" || len(denial.Results) == 0 {
		t.Errorf("recorded %+v", denial)
	}
	// A changed input is another record: a provenance, and another one that is
	// refused for the same reason.
	seen := []uint64{first.Number}
	for n, run := range []string{"1", "2"} {
		sign(t, s, s.Token(map[string]any{"ref": "refs/heads/dev", "run_id": run}), img.ImageRef)
		got := ask(img.ImageRef)
		wantResult(t, got.Decision, attest.SourceMismatch)
		for _, number := range seen {
			if got.Number == number {
				t.Errorf("input %d is answered by decision %d, which rests on others", n+1, number)
			}
		}
		seen = append(seen, got.Number)
	}
	s.Restart()
	if again := ask(img.ImageRef); again.Number != seen[len(seen)-1] {
		t.Errorf("after a restart the same question is decision %d, was %d", again.Number, seen[len(seen)-1])
	}
	// Ten in a minute: the restart has forgotten those above.
	other := func(n int) gate.PromoteRequest {
		return gate.PromoteRequest{Ref: attest.ImageRef{Repository: img.Repository, Digest: attest.Hash([]byte{byte(n)})}, ToStage: "live", Version: "1"}
	}
	for n := range 10 {
		ask(other(n).Ref)
	}
	size := s.Ledger.Size()
	promoter := s.Identity(s.PromoterToken())
	_, err = s.Gate.Promote(t.Context(), promoter, other(10))
	wantReason(t, err, attest.RateLimited)
	if s.Ledger.Size() != size {
		t.Error("a denial above the limit was recorded")
	}
	if ask(other(3).Ref); s.Ledger.Size() != size {
		t.Error("a known denial was recorded again")
	}
	// The limit is the caller's own.
	tester := s.Identity(s.Token(map[string]any{"environment": "release", "sub": "repo:acme/api:environment:release"}))
	if out, err := s.Gate.Promote(t.Context(), tester, other(10)); err != nil || out.Verdict != gate.Denied {
		t.Errorf("another caller: %v", err)
	}
	now.add(61 * time.Second)
	if out, err := s.Gate.Promote(t.Context(), promoter, other(10)); err != nil || out.Verdict != gate.Denied {
		t.Errorf("a minute later: %v", err)
	}
	fsck(t, s)
}

// clock can be set. It may be read while it is set.
type clock struct{ offset atomic.Int64 }

func newClock() *clock                { return &clock{} }
func (c *clock) Now() time.Time       { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) add(by time.Duration) { c.offset.Add(int64(by)) }

func TestDryRun(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	for _, want := range []gate.Verdict{gate.Denied, gate.Allowed} {
		size := s.Ledger.Size()
		out := promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test", DryRun: true})
		if out.Verdict != want || out.Number != 0 || !out.RecordID.IsZero() || out.VSABundle != nil || out.Effect != "" {
			t.Errorf("want %s: %+v", want, out)
		}
		if s.Ledger.Size() != size {
			t.Error("a dry run was recorded")
		}
		if want == gate.Denied {
			sign(t, s, s.Token(nil), img.ImageRef)
		}
	}
	st, err := s.Ledger.Stage(t.Context(), "acme", "test", img.Repository)
	if err != nil || st.Head != nil {
		t.Errorf("a dry run moved the stage: %+v %v", st.Head, err)
	}
}

// M04: a stage cannot be skipped, nor entered with a digest that was there once.
func TestM04SkippedStage(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img, next := s.PushApp("acme/api"), s.PushApp("acme/api")
	for _, i := range []testkit.Pushed{img, next} {
		sign(t, s, s.Token(nil), i.ImageRef)
	}
	wantDenied(t, promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "staging"}).Decision, attest.StageSkipped)
	done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	wantDenied(t, promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "prod", Version: "1"}).Decision, attest.StageSkipped)
	done(t, s, gate.PromoteRequest{Ref: next.ImageRef, ToStage: "test"})
	wantDenied(t, promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "staging"}).Decision, attest.StageSkipped)
}

// B08: what a self-hosted runner built counts as level 1.
func TestB08SelfHostedRunner(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	for _, row := range []struct {
		name   string
		runner any
	}{
		{"B08 self-hosted", "self-hosted"},
		{"B08 a runner of another name", "github-hosted-ish"},
	} {
		t.Run(row.name, func(t *testing.T) {
			img := s.PushApp("acme/api")
			got := sign(t, s, s.Token(map[string]any{"runner_environment": row.runner}), img.ImageRef)
			if got.Builder != s.URL+"/builders/github/self-hosted/v1" {
				t.Errorf("builder %s", got.Builder)
			}
			out := promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
			wantDenied(t, out.Decision, attest.LevelTooLow)
		})
	}
}

// A later provenance of the same digest from another commit is stored, and the
// digest is denied from then on.
func TestProvenanceConflict(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	first := sign(t, s, s.Token(nil), img.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	second := sign(t, s, s.Token(map[string]any{"sha": strings.Repeat("a", 40), "run_id": "9913"}), img.ImageRef)
	if first.Provenance.ID == second.Provenance.ID || second.Build.Commit != strings.Repeat("a", 40) {
		t.Errorf("the second provenance says commit %s", second.Build.Commit)
	}
	wantDenied(t, promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "staging"}).Decision, attest.ProvenanceConflict)
}

func TestM06PolicyRollback(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(3, looseSigners, oneStage)})
	for _, row := range []struct {
		name string
		text string
		want attest.Reason
	}{
		{"M06 the same", policyOf(3, looseSigners, oneStage), ""},
		{"M06 a lower version", policyOf(2, looseSigners, oneStage), attest.PolicyRollback},
		{"M06 a lower version with other rules", policyOf(2, "true", oneStage), attest.PolicyRollback},
		{"M06 the same version with other rules", policyOf(3, looseSigners+" && id.ref == 'refs/heads/main'", oneStage), attest.PolicyRollback},
		{"M06 the same version with another comment", policyOf(3, looseSigners, oneStage) + "# x\n", attest.PolicyRollback},
	} {
		t.Run(row.name, func(t *testing.T) {
			size := s.Ledger.Size()
			_, err := openGate(t, s, row.text)
			wantReason(t, err, row.want)
			if s.Ledger.Size() != size {
				t.Error("it was recorded")
			}
		})
	}
	// A newer one is recorded before its first use, and this gate is then behind.
	if _, err := openGate(t, s, policyOf(4, looseSigners, oneStage)); err != nil {
		t.Fatal(err)
	}
	if last, ok := s.Ledger.Policy(); !ok || last.Version != 4 {
		t.Errorf("policy in force: %d", last.Version)
	}
	img := s.PushApp("acme/api")
	_, err := s.Gate.Promote(t.Context(), s.Identity(s.PromoterToken()), gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	wantReason(t, err, attest.PolicyOutdated)
	_, err = s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: img.ImageRef})
	wantReason(t, err, attest.PolicyOutdated)
}

// M09: a clock that is behind the ledger signs nothing.
func TestM09ClockBehindLedger(t *testing.T) {
	t.Parallel()
	now := newClock()
	s := testkit.NewStack(t, testkit.Options{Now: now.Now})
	img, next := s.PushApp("acme/api"), s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	id, promoter := s.Identity(s.Token(nil)), s.Identity(s.PromoterToken())
	now.add(-time.Minute)
	out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: []gate.SignImage{{Ref: next.ImageRef}}})
	if err != nil {
		t.Fatal(err)
	}
	wantReason(t, out[0].Err, attest.ClockSkew)
	_, err = s.Gate.Promote(t.Context(), promoter, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	wantReason(t, err, attest.ClockSkew)
	now.add(time.Minute)
	sign(t, s, s.Token(nil), next.ImageRef)
}

// faulty is a registry whose manifest writes under tags can be made to go wrong.
type faulty struct {
	host  string
	login atomic.Pointer[[2]string]                                     // user and password that it asks for
	wrong atomic.Pointer[func(http.ResponseWriter, *http.Request) bool] // true: answered
}

func (f *faulty) set(wrong func(http.ResponseWriter, *http.Request) bool) { f.wrong.Store(&wrong) }

func (f *faulty) demand(user, password string) { f.login.Store(&[2]string{user, password}) }

func startFaulty(t *testing.T) *faulty {
	t.Helper()
	real, err := dev.StartRegistry(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { real.Close() })
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: real.Host()})
	f := &faulty{}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		if login := f.login.Load(); login != nil && *login != [2]string{user, password} {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		i := strings.Index(r.URL.Path, "/manifests/")
		tagged := r.Method == http.MethodPut && i > 0 && !strings.HasPrefix(r.URL.Path[i:], "/manifests/sha256")
		if wrong := f.wrong.Load(); tagged && wrong != nil && (*wrong)(w, r) {
			return
		}
		forward.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	f.host = strings.TrimPrefix(front.URL, "http://")
	return f
}

// liveOn is oneStage with its target in another registry.
func liveOn(host string) string {
	return strings.Replace(oneStage, "REGISTRY/live", host+"/live", 1)
}

// A promotion whose effect fails does not count: its predecessor is the head
// again, and the same promotion can be asked for anew.
func TestFailedEffect(t *testing.T) {
	t.Parallel()
	target := startFaulty(t)
	// All within one second, so that the second attempt has the first one's
	// summary word for word.
	now := time.Now()
	s := testkit.NewStack(t, testkit.Options{
		Policy: policyOf(1, looseSigners, liveOn(target.host)), Hosts: []registry.Host{{Host: target.host, PlainHTTP: true}},
		Now: func() time.Time { return now },
	})
	first, next := s.PushApp("acme/api"), s.PushApp("acme/api")
	for _, i := range []testkit.Pushed{first, next} {
		sign(t, s, s.Token(nil), i.ImageRef)
	}
	before := done(t, s, gate.PromoteRequest{Ref: first.ImageRef, ToStage: "live", Version: "stable"})

	// Another writer takes the tag at the same moment: what is read back is not
	// what was written.
	target.set(func(w http.ResponseWriter, r *http.Request) bool {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		sum := sha256.Sum256(raw)
		w.Header().Set("Docker-Content-Digest", "sha256:"+hex.EncodeToString(sum[:]))
		w.WriteHeader(http.StatusCreated)
		return true
	})
	ask := gate.PromoteRequest{Ref: next.ImageRef, ToStage: "live", Version: "stable"}
	failed := promote(t, s, ask)
	if failed.Effect != string(ledger.Failed) || !strings.Contains(failed.EffectDetail, string(attest.EffectFailed)) {
		t.Fatalf("effect %s: %s", failed.Effect, failed.EffectDetail)
	}
	if len(failed.VSABundle)+len(failed.VSAEnvelope) > 0 {
		t.Error("a promotion that failed hands out its summary")
	}
	// Nor is it put beside the image that consumers pull.
	to, err := attest.ParseRepository(failed.Target[:strings.LastIndexByte(failed.Target, ':')])
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := s.Images.Attached(t.Context(), attest.ImageRef{Repository: to, Digest: next.Digest})
	if err != nil && attest.ReasonOf(err) != attest.SubjectNotFound {
		t.Fatal(err)
	}
	for _, b := range bundles {
		if ev, err := s.Verifier.Bundle(b, next.Digest); err != nil || ev.Kind() == attest.KindVSA {
			t.Errorf("a summary is attached after a failure, or what cannot be read (%v)", err)
		}
	}
	for range 2 {
		st, err := s.Ledger.Stage(t.Context(), "acme", "live", first.Repository)
		if err != nil || st.Head == nil || st.Head.ID != before.RecordID || st.Head.State != ledger.Done {
			t.Errorf("the head is %+v (%v)", st.Head, err)
		}
		out, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: first.ImageRef, Stage: "live"})
		if err != nil || out.Verdict != gate.Allowed {
			t.Errorf("the predecessor may not run: %v %+v", err, out.Results)
		}
		out, err = s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: next.ImageRef, Stage: "live"})
		if err != nil {
			t.Fatal(err)
		}
		wantDenied(t, out, attest.NotPromoted)
		s.Restart()
	}
	target.set(func(http.ResponseWriter, *http.Request) bool { return false })
	again := done(t, s, ask)
	if again.RecordID == failed.RecordID {
		t.Error("the failed promotion answers again")
	}
	checkBothForms(t, s, again, next)
	past, err := s.Ledger.Promotions(t.Context(), "acme", "live", first.Repository, 0)
	if err != nil {
		t.Fatal(err)
	}
	var states []ledger.State
	for _, p := range past {
		states = append(states, p.State)
		if p.State == ledger.Failed && p.Why == "" {
			t.Error("the log does not say why it failed")
		}
	}
	if d := cmp.Diff([]ledger.State{ledger.Done, ledger.Failed, ledger.Done}, states); d != "" {
		t.Error(d)
	}
	fsck(t, s)
}

// checkBothForms wants the answer to carry both forms of the summary.
func checkBothForms(t *testing.T, s *testkit.Stack, p gate.Promoted, img testkit.Pushed) {
	t.Helper()
	if len(p.VSAEnvelope) == 0 {
		t.Error("no plain summary")
	}
	if _, err := s.Verifier.Bundle(p.VSABundle, img.Digest); err != nil {
		t.Errorf("the summary does not verify: %v", err)
	}
}

// A target that refuses for a while is tried again by itself; the stage waits.
func TestEffectIsRetried(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusForbidden, http.StatusServiceUnavailable} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			t.Parallel()
			target := startFaulty(t)
			s := testkit.NewStack(t, testkit.Options{
				Policy: policyOf(1, looseSigners, liveOn(target.host)), Hosts: []registry.Host{{Host: target.host, PlainHTTP: true}},
			})
			img, other := s.PushApp("acme/api"), s.PushApp("acme/api")
			sign(t, s, s.Token(nil), img.ImageRef)
			sign(t, s, s.Token(nil), other.ImageRef)
			refused, heal := make(chan struct{}), make(chan struct{})
			var once sync.Once
			target.set(func(w http.ResponseWriter, r *http.Request) bool {
				once.Do(func() { close(refused) })
				select {
				case <-heal:
					return false
				default:
					w.WriteHeader(status)
					return true
				}
			})
			answers := make(chan gate.Promoted, 1)
			go func() {
				out, err := s.Gate.Promote(t.Context(), s.Identity(s.PromoterToken()), gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
				if err != nil {
					t.Error(err)
				}
				answers <- out
			}()
			<-refused
			// Meanwhile the stage is PENDING, and nobody overtakes.
			aborted := promote(t, s, gate.PromoteRequest{Ref: other.ImageRef, ToStage: "live", Version: "2"})
			if aborted.Verdict != gate.Aborted {
				t.Errorf("verdict %s", aborted.Verdict)
			}
			wantResult(t, aborted.Decision, attest.StageMoved)
			out, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: img.ImageRef, Stage: "live"})
			if err != nil {
				t.Fatal(err)
			}
			wantDenied(t, out, attest.NotPromoted)
			close(heal)
			if got := <-answers; got.Effect != string(ledger.Done) {
				t.Errorf("effect %s: %s", got.Effect, got.EffectDetail)
			}
		})
	}
}

// K08: of many promotions that were decided on the same head one wins, and the
// log says why the others did not.
func TestK08ConcurrentPromotions(t *testing.T) {
	t.Parallel()
	const callers = 100
	var decided atomic.Int32
	all := make(chan struct{})
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage), Step: func(step string) {
		if step != "decided" {
			return
		}
		// Nobody appends before everybody has decided.
		if decided.Add(1) == callers {
			close(all)
		}
		<-all
	}})
	images := []testkit.Pushed{s.PushApp("acme/api"), s.PushApp("acme/api")}
	for _, i := range images {
		sign(t, s, s.Token(nil), i.ImageRef)
	}
	promoter := s.Identity(s.PromoterToken())
	got := make([]gate.Promoted, callers)
	var calls sync.WaitGroup
	for i := range callers {
		calls.Go(func() {
			var err error
			got[i], err = s.Gate.Promote(t.Context(), promoter, gate.PromoteRequest{Ref: images[i%2].ImageRef, ToStage: "live", Version: "1"})
			if err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	st, err := s.Ledger.Stage(t.Context(), "acme", "live", images[0].Repository)
	if err != nil || st.Head == nil || st.Head.State != ledger.Done {
		t.Fatalf("head %+v: %v", st.Head, err)
	}
	winner := st.Head.Ref.Digest
	for _, g := range got {
		switch {
		case g.Ref.Digest == winner:
			if g.Verdict != gate.Allowed || g.RecordID != st.Head.ID || g.Effect != string(ledger.Done) {
				t.Errorf("a caller of the winner is told %s %s %s", g.Verdict, g.RecordID, g.Effect)
			}
		default:
			if g.Verdict != gate.Aborted {
				t.Errorf("a caller of the loser is told %s", g.Verdict)
			}
			wantResult(t, g.Decision, attest.StageMoved)
			if len(g.VSABundle)+len(g.VSAEnvelope) > 0 || g.Effect != "" {
				t.Errorf("the loser has a summary, or an effect: %q", g.Effect)
			}
		}
	}
	past, err := s.Ledger.Promotions(t.Context(), "acme", "live", images[0].Repository, 0)
	if err != nil {
		t.Fatal(err)
	}
	won, lost := 0, 0
	for _, p := range past {
		switch p.State {
		case ledger.Done:
			won++
		case ledger.Void:
			lost++
			if !strings.Contains(p.Why, "reached acme/live first") {
				t.Errorf("the log says of %s: %q", p.ID, p.Why)
			}
			d, err := s.Gate.Decision(t.Context(), auditor(s), p.Index)
			if err != nil || d.Verdict != gate.Aborted {
				t.Errorf("decision %d is %s: %v", p.Index, d.Verdict, err)
			}
		default:
			t.Errorf("promotion %s is %s", p.ID, p.State)
		}
	}
	if won != 1 || lost == 0 || lost > callers/2 {
		t.Errorf("%d won, %d are recorded as void", won, lost)
	}
	t.Logf("%d void promotions were recorded", lost)
	if n := len(find(t, s, attest.KindVSA)); n != 2 {
		t.Errorf("%d summaries, want both forms of one", n)
	}
	now, err := s.Images.Resolve(t.Context(), attest.Repository(s.Registry.Host()+"/live/api"), "1")
	if err != nil || now != winner {
		t.Errorf("the target is %s (%v), want %s", now, err, winner)
	}
	fsck(t, s)
}
