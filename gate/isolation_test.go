package gate_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// twoTeams lets any branch of the repository sign for sandbox/*, and main alone
// for acme/*.
func twoTeams() string {
	text := policyOf(1, "id.repository_id == 'SOURCE' && id.ref == 'refs/heads/main'", `  - name: test
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE", min_level: 2}
`)
	text = strings.Replace(text, "  signers:\n", "  signers:\n  - {issuer: github, images: [\"REGISTRY/sandbox/*\"], when: \"id.repository_id == 'SOURCE'\"}\n  - {issuer: github, images: [\"REGISTRY/other/*\"], when: \"id.repository == 'acme/other'\"}\n", 1)
	return strings.ReplaceAll(text, "SOURCE", dev.GitHubID(testkit.Source))
}

// Evidence that was signed for one repository says nothing about another: whoever
// may sign for sandbox/* may not thereby promote in acme/*.
func TestM03EvidenceOfAnotherRepository(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: twoTeams()})
	img := s.PushApp("sandbox/api")
	branch := s.Token(map[string]any{"ref": "refs/heads/evil", "workflow_ref": "acme/api/.github/workflows/release.yml@refs/heads/evil"})
	sign(t, s, branch, img.ImageRef)
	copied := s.Push("acme/api", "", img.Image)
	if _, err := trySign(t, s, branch, gate.SignImage{Ref: copied.ImageRef}); attest.ReasonOf(err) != attest.SourceNotAllowed {
		t.Fatalf("the branch may sign for acme/*: %v", err)
	}
	p := promote(t, s, gate.PromoteRequest{Ref: copied.ImageRef, ToStage: "test"})
	wantDenied(t, p.Decision, attest.NotSigned)
}

// K07: who may ask about one repository learns nothing about another's builds.
func TestK07VerifyTellsNothingOfAnotherRepository(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: twoTeams()})
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	stranger := s.Token(map[string]any{"repository": "acme/other", "repository_id": "77", "workflow_ref": "acme/other/.github/workflows/release.yml@refs/heads/main", "job_workflow_ref": "acme/other/.github/workflows/release.yml@refs/heads/main"})
	d, err := s.Gate.Verify(t.Context(), s.Identity(stranger), gate.VerifyRequest{
		Ref: attest.ImageRef{Repository: attest.Repository(s.Registry.Host() + "/other/x"), Digest: img.Digest},
	})
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%+v", d); strings.Contains(text, "acme/api") || strings.Contains(text, testkit.Commit[:7]) {
		t.Errorf("a job of acme/other is told of acme/api: %s", text)
	}
}

// Records of other repositories about the same digest do not crowd out those that
// an auditor may see.
func TestK07ArtifactBehindStrangersRecords(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: twoTeams()})
	img := s.PushApp("acme/api")
	copied := s.Push("sandbox/api", "", img.Image)
	for i := range 2 { // 102 requests, 204 records
		var req gate.SignRequest
		for j := range 51 {
			req.Images = append(req.Images, gate.SignImage{Ref: copied.ImageRef, Base: fmt.Sprintf("nowhere.example.com/x:%d-%d", i, j)})
		}
		req.AttachByClient = true
		all, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			if a.Err != nil {
				t.Fatal(a.Err)
			}
		}
	}
	sign(t, s, s.Token(nil), img.ImageRef)
	items, err := s.Gate.Artifact(t.Context(), s.Identity(s.PersonToken("b-1", "acme")), img.ImageRef)
	if err != nil {
		t.Fatal(err)
	}
	if len(items) != 2 {
		t.Errorf("%d records, want 2", len(items))
	}
}

// One token does not fill the log by signing one digest with ever other hints.
func TestTokenBudgetCountsRequests(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	token := s.Token(nil)
	var last error
	for i := range 5 {
		req := gate.SignRequest{AttachByClient: true}
		for j := range gate.MaxImages {
			req.Images = append(req.Images, gate.SignImage{Ref: img.ImageRef, Base: fmt.Sprintf("nowhere.example.com/x:%d-%d", i, j)})
		}
		all, err := s.Gate.Sign(t.Context(), s.Identity(token), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			if a.Err != nil {
				last = a.Err
			}
		}
	}
	wantReason(t, last, attest.TokenSpent)
}

// Two jobs of one run are two callers: the second is not answered with a
// signature by the first.
func TestF11JobsOfOneRun(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	release := s.Token(map[string]any{"environment": "release"})
	got := sign(t, s, release, img.ImageRef)
	if got.Repeated || got.Build.Environment != "release" {
		t.Errorf("the job in environment release got the record of another job: repeated %v, environment %q", got.Repeated, got.Build.Environment)
	}
}
