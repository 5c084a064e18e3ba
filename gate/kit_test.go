package gate_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/signer"
)

// looseSigners lets any job of the source repository sign, wherever it was started,
// so that the rules of a stage have something to refuse.
const looseSigners = "id.repository_id == 'SOURCE'"

// policyOf is a policy with one track for REGISTRY/acme/* whose stages are given
// as they stand in the file. SOURCE stands for the id of the source repository.
func policyOf(version int, signers, stages string) string {
	text := fmt.Sprintf(`version: %d
roles:
  signers:
  - {issuer: github, images: ["REGISTRY/acme/*"], when: "%s"}
  promoters:
  - {issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE' && id.environment == 'release'"}
  auditors:
  - {issuer: corp, images: ["**"], when: "'audit' in id.groups"}
  - {issuer: corp, images: ["REGISTRY/acme/*"], when: "'acme' in id.groups"}
  - {issuer: corp, images: ["REGISTRY/other/*"], when: "'other' in id.groups"}
tracks:
- name: acme
  images: ["REGISTRY/acme/*"]
  stages:
%s`, version, signers, stages)
	return strings.ReplaceAll(text, "SOURCE", dev.GitHubID(testkit.Source))
}

// oneStage is a stage "live" that asks for a signed provenance and tags its images.
const oneStage = `  - name: live
    target: "REGISTRY/live/{name}:{version}"
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE", min_level: 2, min_grade: claim}
`

func wantReason(t testing.TB, err error, want attest.Reason) {
	t.Helper()
	if got := attest.ReasonOf(err); got != want {
		t.Errorf("got %q (%v), want %q", got, err, want)
	}
}

// wantDenied checks the verdict and that the reason is among those of its rules.
func wantDenied(t testing.TB, d gate.Decision, want attest.Reason) {
	t.Helper()
	if d.Verdict != gate.Denied {
		t.Errorf("verdict %q, want denied: %+v", d.Verdict, d.Results)
	}
	wantResult(t, d, want)
}

func wantResult(t testing.TB, d gate.Decision, want attest.Reason) {
	t.Helper()
	for _, r := range d.Results {
		if r.Reason == want && (r.Outcome == attest.Fail || r.Outcome == attest.Errored) {
			return
		}
	}
	t.Errorf("no rule failed with %s: %+v", want, d.Results)
}

// trySign signs one image for the holder of a token.
func trySign(t testing.TB, s *testkit.Stack, token string, img gate.SignImage) (gate.Signed, error) {
	t.Helper()
	out, err := s.Gate.Sign(t.Context(), s.Identity(token), gate.SignRequest{Images: []gate.SignImage{img}})
	if err != nil {
		return gate.Signed{}, err
	}
	return out[0], out[0].Err
}

func sign(t testing.TB, s *testkit.Stack, token string, ref attest.ImageRef) gate.Signed {
	t.Helper()
	out, err := trySign(t, s, token, gate.SignImage{Ref: ref})
	if err != nil {
		t.Fatalf("signing %s: %v", ref, err)
	}
	return out
}

func promote(t testing.TB, s *testkit.Stack, req gate.PromoteRequest) gate.Promoted {
	t.Helper()
	out, err := s.Gate.Promote(t.Context(), s.Identity(s.PromoterToken()), req)
	if err != nil {
		t.Fatalf("promoting to %s: %v", req.ToStage, err)
	}
	return out
}

// done promotes and wants the stage to hold the image afterwards.
func done(t testing.TB, s *testkit.Stack, req gate.PromoteRequest) gate.Promoted {
	t.Helper()
	out := promote(t, s, req)
	if out.Verdict != gate.Allowed || out.Effect != string(ledger.Done) {
		t.Fatalf("promoting to %s: %s %s (%s): %+v", req.ToStage, out.Verdict, out.Effect, out.EffectDetail, out.Results)
	}
	return out
}

func auditor(s *testkit.Stack) attest.Identity { return s.Identity(s.PersonToken("a-1", "audit")) }

// find returns all records of a kind that have the facets, oldest first.
func find(t testing.TB, s *testkit.Stack, kind attest.RecordKind, facets ...attest.Facet) []ledger.Meta {
	t.Helper()
	out, err := s.Ledger.Find(t.Context(), ledger.Query{Kind: kind, Facets: facets, Limit: 1000, Ascending: true})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func about(d attest.Digest) attest.Facet {
	return attest.Facet{Name: attest.FacetDigest, Value: d.String()}
}

// statement decodes the statement of a record and its predicate into p.
func statement(t testing.TB, rec attest.Record, p any) attest.Statement {
	t.Helper()
	var st attest.Statement
	if err := json.Unmarshal(rec.Payload, &st); err != nil {
		t.Fatal(err)
	}
	if p != nil {
		if err := json.Unmarshal(st.Predicate, p); err != nil {
			t.Fatal(err)
		}
	}
	return st
}

// eventually waits for something that happens by itself.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// fsck stops the service and checks its ledger.
func fsck(t testing.TB, s *testkit.Stack) ledger.Report {
	t.Helper()
	s.Close()
	keys, err := signer.Open(signer.Config{Dir: filepath.Join(s.DataDir, "keys"), Service: s.URL, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	report, err := ledger.Fsck(t.Context(), ledger.Config{Dir: s.DataDir, Origin: keys.Origin(), LogKey: keys.LogKey()})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range report.Problems {
		t.Errorf("fsck: %s", p)
	}
	return report
}

// openGate opens another gate on the stack's ledger with another policy.
func openGate(t testing.TB, s *testkit.Stack, text string) (*gate.Gate, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	text = strings.ReplaceAll(text, "REGISTRY", s.Registry.Host())
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := policy.Load(path, policy.Known{
		Issuers:    map[string]attest.Kind{"github": attest.Workload, "corp": attest.Person},
		IssuerURLs: map[string]string{"github": s.Issuer.URL(), "corp": s.People.URL()}, Service: s.URL,
	})
	if err != nil {
		t.Fatal(err)
	}
	return gate.Open(t.Context(), gate.Config{
		Service: s.URL, Ledger: s.Ledger, Signer: s.Signer, Verifier: s.Verifier, Registry: s.Images, Policy: p,
		Configuration: []byte("{}"), Now: time.Now, Logger: s.Gate.Logger,
	})
}
