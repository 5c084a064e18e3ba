package gate_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	provenancev1 "github.com/in-toto/attestation/go/predicates/provenance/v1"
	statementv1 "github.com/in-toto/attestation/go/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

func TestSign(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	base := s.PushBase("debian", "12")
	img := s.PushOn(base, "12", "acme/api")
	got := sign(t, s, s.Token(nil), img.ImageRef)

	if got.Attach != gate.Attached || got.Repeated || got.Ref != img.ImageRef || got.Builder != s.URL+"/builders/github/hosted/v1" {
		t.Errorf("attach %s, repeated %t, builder %s", got.Attach, got.Repeated, got.Builder)
	}
	if got.Build.Commit != testkit.Commit || got.Image.Base.Result != attest.ProvenLayers || got.Image.Base.Digest != base.Digest {
		t.Errorf("commit %s, base %s %s", got.Build.Commit, got.Image.Base.Result, got.Image.Base)
	}
	for name, bundle := range map[string][]byte{attest.PredicateSignature: got.SignatureBundle, attest.PredicateProvenance: got.ProvenanceBundle} {
		ev, err := s.Verifier.Bundle(bundle, img.Digest)
		if err != nil {
			t.Fatalf("%s does not verify: %v", name, err)
		}
		if ev.PredicateType() != name || ev.Signer().Build.Commit != testkit.Commit || ev.Signer().Issuer != s.Issuer.URL() {
			t.Errorf("%s: %s by %+v", name, ev.PredicateType(), ev.Signer())
		}
	}
	// The precertificate stands in the log before what was signed with its key.
	pre := find(t, s, attest.KindPrecertificate)
	if len(pre) != 1 || pre[0].Index >= got.Signature.Index || got.Signature.Index >= got.Provenance.Index {
		t.Errorf("precertificates %v before %d and %d", pre, got.Signature.Index, got.Provenance.Index)
	}
	wantAttached(t, s, img.ImageRef, got.SignatureBundle, got.ProvenanceBundle)

	checkProvenance(t, s, got.Provenance, img, base)
	fsck(t, s)
}

// wantAttached compares what the registry holds beside an image, in any order.
func wantAttached(t *testing.T, s *testkit.Stack, ref attest.ImageRef, want ...[]byte) {
	t.Helper()
	got, err := s.Images.Attached(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(got, bytes.Compare)
	slices.SortFunc(want, bytes.Compare)
	if !slices.EqualFunc(want, got, bytes.Equal) {
		t.Errorf("%d bundles are attached to %s, want these %d and no other", len(got), ref, len(want))
	}
}

// checkProvenance holds the statement against slsa.dev/spec/v1.2 and
// actions/buildtypes workflow/v1, by other people's code where there is some.
func checkProvenance(t *testing.T, s *testkit.Stack, rec attest.Record, img, base testkit.Pushed) {
	t.Helper()
	var st statementv1.Statement
	if err := protojson.Unmarshal(rec.Payload, &st); err != nil {
		t.Fatalf("in-toto does not read the statement: %v", err)
	}
	if err := st.Validate(); err != nil {
		t.Errorf("in-toto refuses the statement: %v", err)
	}
	var raw struct {
		Predicate json.RawMessage `json:"predicate"`
	}
	if err := json.Unmarshal(rec.Payload, &raw); err != nil {
		t.Fatal(err)
	}
	var p provenancev1.Provenance
	if err := protojson.Unmarshal(raw.Predicate, &p); err != nil { // refuses fields it does not know
		t.Fatalf("in-toto does not read the predicate: %v", err)
	}
	if err := p.Validate(); err != nil {
		t.Errorf("in-toto refuses the predicate: %v", err)
	}
	def := p.GetBuildDefinition()
	if def.GetBuildType() != "https://actions.github.io/buildtypes/workflow/v1" {
		t.Errorf("buildType %s", def.GetBuildType())
	}
	source := "https://github.com/" + testkit.Source
	want := map[string]any{"workflow": map[string]any{"ref": "refs/heads/main", "repository": source, "path": ".github/workflows/release.yml"}}
	if d := cmp.Diff(want, def.GetExternalParameters().AsMap()); d != "" {
		t.Errorf("externalParameters (-want +got):\n%s", d)
	}
	claims := s.Claims(nil)
	github := map[string]any{
		"event_name": "push", "repository_id": claims["repository_id"], "repository_owner_id": claims["repository_owner_id"], "runner_environment": "github-hosted",
	}
	if d := cmp.Diff(github, def.GetInternalParameters().AsMap()["github"]); d != "" {
		t.Errorf("internalParameters.github (-want +got):\n%s", d)
	}
	var deps []string
	for _, r := range def.GetResolvedDependencies() {
		for alg, d := range r.GetDigest() {
			deps = append(deps, strings.Join([]string{r.GetName(), r.GetUri(), alg, d}, " "))
		}
	}
	wantDeps := []string{
		" git+" + source + "@refs/heads/main gitCommit " + testkit.Commit,
		" git+" + source + " gitCommit " + testkit.Commit,
		"build-workflow git+" + source + "/.github/workflows/release.yml@refs/heads/main gitCommit " + testkit.Commit,
		"base-image pkg:oci/debian@sha256%3A" + base.Digest.Hex() + "?repository_url=" + strings.ReplaceAll(strings.ReplaceAll(string(base.Repository), "/", "%2F"), ":", "%3A") + " sha256 " + base.Digest.Hex(),
	}
	if d := cmp.Diff(wantDeps, deps); d != "" {
		t.Errorf("resolvedDependencies (-want +got):\n%s", d)
	}
	run := p.GetRunDetails()
	if run.GetBuilder().GetId() != s.URL+"/builders/github/hosted/v1" || run.GetMetadata().GetInvocationId() != source+"/actions/runs/9912/attempts/1" {
		t.Errorf("builder %s, invocation %s", run.GetBuilder().GetId(), run.GetMetadata().GetInvocationId())
	}
	if at := run.GetMetadata().GetFinishedOn(); !at.IsValid() || time.Since(at.AsTime()).Abs() > time.Minute {
		t.Errorf("finishedOn %v", at)
	}
	if st.GetSubject()[0].GetName() != string(img.Repository) || st.GetSubject()[0].GetDigest()["sha256"] != img.Digest.Hex() {
		t.Errorf("subject %v", st.GetSubject())
	}
	got, err := attest.ParseProvenance(raw.Predicate)
	if err != nil {
		t.Fatal(err)
	}
	const build = "/predicate/buildDefinition"
	for pointer, grade := range map[string]attest.Grade{
		"/subject": attest.GradeCaller, // that this job built this digest is its word
		build + "/externalParameters/workflow/ref":      attest.GradeClaim,
		build + "/resolvedDependencies/0":               attest.GradeClaim,
		build + "/resolvedDependencies/2":               attest.GradeClaim,
		build + "/resolvedDependencies/3":               attest.GradeRegistry,
		build + "/internalParameters/hallmark_base":     attest.GradeRegistry,
		"/predicate/runDetails/builder/id":              attest.GradeClaim,
		"/predicate/runDetails/metadata/invocationId":   attest.GradeClaim,
		build + "/internalParameters/github/event_name": attest.GradeClaim,
	} {
		if got.Grade(pointer) != grade {
			t.Errorf("%s is graded %q, want %q", pointer, got.Grade(pointer), grade)
		}
	}
}

// An index and its platforms are one statement, attached to each of them.
func TestSignIndex(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img, children := s.PushIndex("acme/api")
	got := sign(t, s, s.Token(nil), img.ImageRef)
	want := append([]attest.Digest{img.Digest}, children...)
	for _, rec := range []attest.Record{got.Signature, got.Provenance} {
		var subjects []attest.Digest
		for _, sub := range statement(t, rec, nil).Subject {
			d, err := attest.ParseHex(sub.Digest["sha256"])
			if err != nil || sub.Name != string(img.Repository) {
				t.Errorf("subject %s: %v", sub.Name, err)
			}
			subjects = append(subjects, d)
		}
		if d := cmp.Diff(want, subjects); d != "" {
			t.Errorf("%s: subjects (-want +got):\n%s", rec.Kind, d)
		}
	}
	for _, d := range want {
		wantAttached(t, s, attest.ImageRef{Repository: img.Repository, Digest: d}, got.SignatureBundle, got.ProvenanceBundle)
		for _, b := range [][]byte{got.SignatureBundle, got.ProvenanceBundle} {
			if _, err := s.Verifier.Bundle(b, d); err != nil {
				t.Errorf("the bundle does not verify for %s: %v", d, err)
			}
		}
	}
}

// sameAnswer compares what a caller gets, but for whether it was there before.
func sameAnswer(t testing.TB, first, again gate.Signed) {
	t.Helper()
	if first.Signature.ID != again.Signature.ID || first.Provenance.ID != again.Provenance.ID {
		t.Errorf("records %s %s became %s %s", first.Signature.ID, first.Provenance.ID, again.Signature.ID, again.Provenance.ID)
	}
	if !bytes.Equal(first.SignatureBundle, again.SignatureBundle) || !bytes.Equal(first.ProvenanceBundle, again.ProvenanceBundle) {
		t.Error("the same records are other bundles")
	}
}

// A repeated request is answered by the records of the first, also by another
// token of the same run and after a restart.
func TestRepeatedSign(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	first := sign(t, s, s.Token(nil), img.ImageRef)
	again := sign(t, s, s.Token(nil), img.ImageRef)
	sameAnswer(t, first, again)
	s.Restart()
	after := sign(t, s, s.Token(nil), img.ImageRef)
	sameAnswer(t, first, after)
	if first.Repeated || !again.Repeated || !after.Repeated {
		t.Errorf("repeated: %t %t %t", first.Repeated, again.Repeated, after.Repeated)
	}
	if n := len(find(t, s, attest.KindProvenance)); n != 1 {
		t.Errorf("%d provenance records", n)
	}
}

// What the first request left to its caller is attached for a second one that
// does not.
func TestRepeatedSignAttaches(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img, _ := s.PushIndex("acme/api")
	req := gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}, AttachByClient: true}
	out, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), req)
	if err != nil || out[0].Err != nil {
		t.Fatal(err, out[0].Err)
	}
	if out[0].Attach != gate.AttachByClient {
		t.Errorf("attach %s", out[0].Attach)
	}
	wantAttached(t, s, img.ImageRef)
	again := sign(t, s, s.Token(nil), img.ImageRef)
	sameAnswer(t, out[0], again)
	if again.Attach != gate.Attached {
		t.Errorf("attach %s", again.Attach)
	}
	for _, d := range again.Image.Digests() {
		wantAttached(t, s, attest.ImageRef{Repository: img.Repository, Digest: d}, again.SignatureBundle, again.ProvenanceBundle)
	}
}

func TestConcurrentIdenticalSign(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	id := s.Identity(s.Token(nil))
	const callers = 100
	got := make([]gate.Signed, callers)
	start := make(chan struct{})
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			<-start
			out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})
			if err != nil {
				t.Error(err)
				return
			}
			got[i] = out[0]
		})
	}
	close(start)
	all.Wait()
	for _, g := range got {
		if g.Err != nil {
			t.Fatal(g.Err)
		}
		sameAnswer(t, got[0], g)
	}
	for kind, want := range map[attest.RecordKind]int{attest.KindSignature: 1, attest.KindProvenance: 1, attest.KindPrecertificate: 1} {
		if n := len(find(t, s, kind)); n != want {
			t.Errorf("%d records of kind %s, want %d", n, kind, want)
		}
	}
	fsck(t, s)
}

// Two identities that sign one digest leave both records.
func TestTwoIdentitiesSignOneDigest(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	img := s.PushApp("acme/api")
	other := "acme/api/.github/workflows/nightly.yml@refs/heads/main"
	tokens := []string{s.Token(nil), s.Token(map[string]any{"workflow_ref": other, "job_workflow_ref": other, "run_id": "9913"})}
	var got [2]gate.Signed
	var both sync.WaitGroup
	for i, token := range tokens {
		both.Go(func() { got[i] = sign(t, s, token, img.ImageRef) })
	}
	both.Wait()
	if got[0].Signature.ID == got[1].Signature.ID || got[0].Provenance.ID == got[1].Provenance.ID {
		t.Error("two identities share a record")
	}
	for kind, want := range map[attest.RecordKind]int{attest.KindSignature: 2, attest.KindProvenance: 2, attest.KindPrecertificate: 2} {
		if n := len(find(t, s, kind)); n != want {
			t.Errorf("%d records of kind %s, want %d", n, kind, want)
		}
	}
	fsck(t, s)
}

// F11: no two requests share an answer.
func TestF11DifferentRequestsDifferentRecords(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	base := s.PushBase("debian", "12")
	img := s.PushOn(base, "12", "acme/api")
	copied := s.Push("acme/web", "", img.Image)
	token := s.Token(nil)
	first := sign(t, s, token, img.ImageRef)
	for _, row := range []struct {
		name  string
		token string
		img   gate.SignImage
	}{
		{"F11 another hint", token, gate.SignImage{Ref: img.ImageRef, Base: string(base.Repository) + ":12"}},
		{"F11 another repository", token, gate.SignImage{Ref: copied.ImageRef}},
		{"F11 another attempt", s.Token(map[string]any{"run_attempt": "2"}), gate.SignImage{Ref: img.ImageRef}},
		{"F11 another run", s.Token(map[string]any{"run_id": "9913"}), gate.SignImage{Ref: img.ImageRef}},
	} {
		t.Run(row.name, func(t *testing.T) {
			other, err := trySign(t, s, row.token, row.img)
			if err != nil {
				t.Fatal(err)
			}
			if other.Repeated || other.Provenance.ID == first.Provenance.ID || other.Signature.ID == first.Signature.ID || other.Provenance.Key == first.Provenance.Key {
				t.Error("two requests share an answer")
			}
			again, err := trySign(t, s, row.token, row.img)
			if err != nil {
				t.Fatal(err)
			}
			sameAnswer(t, other, again)
		})
	}
}

// pushMany pushes n small images.
func pushMany(s *testkit.Stack, t testing.TB, n int) []gate.SignImage {
	out := make([]gate.SignImage, n)
	for i := range out {
		out[i].Ref = s.Push("acme/api", "", testkit.RandomImage(t)).ImageRef
	}
	return out
}

// A token signs at most 64 digests, also when the service has forgotten which.
func TestTokenBudget(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	images := pushMany(s, t, gate.MaxTokenDigests+1)
	id := s.Identity(s.Token(nil))
	sign := func(t *testing.T, images ...gate.SignImage) []gate.Signed {
		t.Helper()
		out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: images, AttachByClient: true})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, o := range sign(t, images[:gate.MaxTokenDigests]...) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
	}
	for _, when := range []string{"running", "after a restart"} {
		t.Run(when, func(t *testing.T) {
			wantReason(t, sign(t, images[gate.MaxTokenDigests])[0].Err, attest.TokenSpent)
			again := sign(t, images[0])[0]
			if again.Err != nil || !again.Repeated {
				t.Errorf("the same request again: %v, repeated %t", again.Err, again.Repeated)
			}
			hinted := images[1]
			hinted.Base = "registry.example.com/base:" + strings.ReplaceAll(when, " ", "-")
			if o := sign(t, hinted)[0]; o.Err != nil || o.Repeated {
				t.Errorf("the same digest in another request: %v, repeated %t", o.Err, o.Repeated)
			}
			id2 := s.Identity(s.Token(nil))
			out, err := s.Gate.Sign(t.Context(), id2, gate.SignRequest{Images: []gate.SignImage{images[0]}, AttachByClient: true})
			if err != nil || out[0].Err != nil {
				t.Errorf("a new token: %v %v", err, out[0].Err)
			}
		})
		s.Restart()
	}
	if n := len(find(t, s, attest.KindProvenance, about(images[gate.MaxTokenDigests].Ref.Digest))); n != 0 {
		t.Errorf("%d records of what was refused", n)
	}
}

// However many records one digest has, the others are counted after a restart.
func TestTokenBudgetCountsOldRecords(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	images := pushMany(s, t, gate.MaxTokenDigests+1)
	id := s.Identity(s.Token(nil))
	sign := func(images ...gate.SignImage) (signed int, last error) {
		out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: images, AttachByClient: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range out {
			if o.Err == nil {
				signed++
			} else {
				last = o.Err
			}
		}
		return signed, last
	}
	sign(images[:2]...)
	hinted := make([]gate.SignImage, gate.MaxImages)
	for i := range hinted {
		hinted[i] = gate.SignImage{Ref: images[1].Ref, Base: fmt.Sprintf("registry.example.com/base:b%d", i)}
	}
	if signed, err := sign(hinted...); signed != len(hinted) {
		t.Fatalf("%d signed: %v", signed, err)
	}
	s.Restart()
	signed, err := sign(images[2:]...)
	wantReason(t, err, attest.TokenSpent)
	if signed != gate.MaxTokenDigests-2 {
		t.Errorf("%d more digests signed, want %d", signed, gate.MaxTokenDigests-2)
	}
}

func TestSignRefused(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, "id.repository_id == 'SOURCE' && id.ref == 'refs/heads/main'", oneStage)})
	base := s.PushBase("debian", "12")
	img := s.PushOn(base, "12", "acme/api")
	stranger := s.PushBase("alpine", "3")
	elsewhere := s.Push("other/api", "", testkit.RandomImage(t))
	missing := attest.ImageRef{Repository: img.Repository, Digest: attest.Hash([]byte("missing"))}
	claim := func(name string, value any) map[string]any { return map[string]any{name: value} }
	for _, row := range []struct {
		name   string
		claims map[string]any
		img    gate.SignImage
		want   attest.Reason
	}{
		{"B01 event pull_request", claim("event_name", "pull_request"), gate.SignImage{Ref: img.ImageRef}, attest.EventNotAllowed},
		{"B01 event pull_request_target", claim("event_name", "pull_request_target"), gate.SignImage{Ref: img.ImageRef}, attest.EventNotAllowed},
		{"B01 event workflow_run", claim("event_name", "workflow_run"), gate.SignImage{Ref: img.ImageRef}, attest.EventNotAllowed},
		{"B01 event issue_comment", claim("event_name", "issue_comment"), gate.SignImage{Ref: img.ImageRef}, attest.EventNotAllowed},
		{"another branch", claim("ref", "refs/heads/dev"), gate.SignImage{Ref: img.ImageRef}, attest.SourceNotAllowed},
		{"B03 another repository id", claim("repository_id", "1"), gate.SignImage{Ref: img.ImageRef}, attest.SourceNotAllowed},
		{"another repository to write to", nil, gate.SignImage{Ref: elsewhere.ImageRef}, attest.RoleMissing},
		{"nothing under the digest", nil, gate.SignImage{Ref: missing}, attest.SubjectNotFound},
		{"a base that the layers contradict", nil, gate.SignImage{Ref: img.ImageRef, Base: string(stranger.Repository) + "@" + stranger.Digest.String()}, attest.BaseContradicted},
	} {
		t.Run(row.name, func(t *testing.T) {
			size := s.Ledger.Size()
			got, err := trySign(t, s, s.Token(row.claims), row.img)
			wantReason(t, err, row.want)
			if len(got.SignatureBundle) > 0 || len(got.ProvenanceBundle) > 0 || len(got.Signature.Envelope.Signature) > 0 {
				t.Error("refused, and yet something was signed")
			}
			if s.Ledger.Size() != size {
				t.Error("refused, and yet something was recorded")
			}
		})
	}
	for n := range 2 {
		req := gate.SignRequest{Images: make([]gate.SignImage, n*(gate.MaxImages+1))}
		_, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), req)
		wantReason(t, err, attest.BadRequest)
	}
}

// An image that lies about its base in an annotation is signed, and the record
// says that it lies: whoever signs need not have written the annotation.
func TestContradictedAnnotationIsRecorded(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	real, claimed := s.PushBase("debian", "12"), s.PushBase("debian", "13")
	claimed.Image, real.Image = real.Image, claimed.Image // layers of one, name of the other
	img := s.PushOn(claimed, "13", "acme/api")
	got := sign(t, s, s.Token(nil), img.ImageRef)
	var p attest.Provenance
	statement(t, got.Provenance, &p)
	if p.Internal().Base.Result != attest.Contradicted {
		t.Errorf("base %+v", p.Internal().Base)
	}
	for _, d := range p.BuildDefinition.ResolvedDependencies {
		if d.Name == "base-image" {
			t.Errorf("a base that is none stands among the dependencies: %s", d.URI)
		}
	}
	done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	out := promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "staging"})
	wantDenied(t, out.Decision, attest.BaseContradicted)
}

// Each image of a request stands alone.
func TestSignSomeRefused(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	images := pushMany(s, t, 2)
	bad := gate.SignImage{Ref: attest.ImageRef{Repository: images[0].Ref.Repository, Digest: attest.Hash([]byte("x"))}}
	out, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), gate.SignRequest{Images: []gate.SignImage{images[0], bad, images[1]}})
	if err != nil {
		t.Fatal(err)
	}
	wantReason(t, out[0].Err, "")
	wantReason(t, out[1].Err, attest.SubjectNotFound)
	wantReason(t, out[2].Err, "")
	if out[1].Ref != bad.Ref {
		t.Errorf("the refusal is about %s", out[1].Ref)
	}
}

// A signer learns nothing about the tags of a repository for which they have no role,
// by naming one as a base (attacks G24, K07).
func TestK07ABaseThatTheSignerMayNotRead(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, "id.repository_id == 'SOURCE' && id.ref == 'refs/heads/main'", oneStage)})
	secret := s.Push("other/payroll", "v9", testkit.RandomImage(t))
	own := s.Push("acme/tool", "v1", testkit.RandomImage(t))
	// Two layers: one alone might be a base that was squashed.
	twoLayers := func() v1.Image {
		img, err := random.Image(256, 2)
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	img := s.Push("acme/api", "", twoLayers())
	for _, tag := range []string{"v9", "none"} {
		got, err := trySign(t, s, s.Token(nil), gate.SignImage{Ref: img.ImageRef, Base: string(secret.Repository) + ":" + tag})
		if err != nil {
			t.Fatal(err)
		}
		b := got.Image.Base
		if b.Result != attest.Claimed || !b.Digest.IsZero() || len(b.Claims) != 1 || !b.Claims[0].Digest.IsZero() || b.Claims[0].Detail != "it could not be shown to be the base" {
			t.Errorf("%s tells %+v", tag, b)
		}
		if strings.Contains(string(got.Provenance.Payload), secret.Digest.Hex()) {
			t.Errorf("the provenance that names %s has its digest", tag)
		}
	}
	// Who has a role, and what is followed for everybody, is answered plainly.
	_, err := trySign(t, s, s.Token(nil), gate.SignImage{Ref: img.ImageRef, Base: string(own.Repository) + ":v1"})
	wantReason(t, err, attest.BaseContradicted)
	cfg := s.Gate.Config
	cfg.Images, cfg.Bases.Follow = nil, []attest.BaseName{{Repository: secret.Repository, Tag: "v9"}}
	g, err := gate.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	other := s.Push("acme/api", "", twoLayers())
	out, err := g.Sign(t.Context(), s.Identity(s.Token(nil)), gate.SignRequest{Images: []gate.SignImage{{Ref: other.ImageRef, Base: string(secret.Repository) + ":v9"}}})
	if err != nil {
		t.Fatal(err)
	}
	wantReason(t, out[0].Err, attest.BaseContradicted)
}
