package policy_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/verifier"
)

// byReusable is a job that a listed reusable workflow of another repository runs.
func byReusable(with ...func(*attest.Identity)) attest.Identity {
	id := job(append(with, token("reusable"))...)
	id.Reusable = "acme/builders/.github/workflows/image.yml"
	id.Build.SignerURI = "https://github.com/" + id.Reusable + "@refs/tags/v1"
	id.Build.SignerDigest = strings.Repeat("b", 40)
	id.SAN = id.Build.SignerURI
	return id
}

// Level 3 is for listed reusable workflows only, whatever else a provenance says.
func TestLevels(t *testing.T) {
	n := notary.New(t)
	f := facts{n, image(api, "level", proven(base))}
	hosted, self, listed := f.sign(t, job()), f.sign(t, job(selfHosted, token("self"))), f.sign(t, byReusable())
	unlisted := byReusable()
	unlisted.Reusable = ""
	// says has id sign a provenance that names another builder than its own.
	says := func(id attest.Identity, builder string) []*verifier.Evidence {
		own := attest.BuilderID(notary.Service, id)
		text := notary.ProvenanceStatement(t, id, f.img)
		other := bytes.Replace(text, []byte(`"`+own+`"`), []byte(`"`+builder+`"`), 1)
		if bytes.Equal(text, other) {
			t.Fatalf("the provenance does not name %s", own)
		}
		return []*verifier.Evidence{n.Signature(t, id, f.img), n.Evidence(t, id, other)}
	}
	reusable := notary.Service + "/builders/github/reusable/acme/builders/.github/workflows/image.yml"
	rule := func(more string) string { return one(`source_id: "1296269", `+more, "") }
	low, wrong := []string{"provenance: LEVEL_TOO_LOW"}, []string{"provenance: SOURCE_MISMATCH"}
	for _, row := range []struct {
		name, text string
		evidence   []*verifier.Evidence
		want       []string
		level      int
	}{
		{"listed reusable workflow counts 3", rule("min_level: 3"), listed, nil, 3},
		{"hosted counts 2", rule("min_level: 2"), hosted, nil, 2},
		{"self-hosted counts 1", rule("min_level: 1"), self, nil, 1},
		{"B08 hosted is not 3", rule("min_level: 3"), hosted, low, 0},
		{"B08 self-hosted is not 2", rule("min_level: 2"), self, low, 0},
		{"B08 self-hosted is not 3", rule("min_level: 3"), self, low, 0},
		{"B04 reusable workflow that is not listed", rule("min_level: 3"), f.sign(t, unlisted), low, 0},
		{"D10 hosted that says reusable", rule("min_level: 3"), says(job(), reusable), wrong, 0},
		{"D10 self-hosted that says hosted", rule("min_level: 2"), says(job(selfHosted, token("x")), notary.Service+"/builders/github/hosted/v1"), wrong, 0},
		{"D10 reusable that says another workflow", rule("min_level: 3"), says(byReusable(), strings.Replace(reusable, "image.yml", "other.yml", 1)), wrong, 0},
		{"D10 reusable on a self-hosted runner", rule("min_level: 3"), f.sign(t, byReusable(selfHosted)), wrong, 0},
		{"D10 builder of another service", rule("min_level: 1"), says(job(), "https://other.example.com/builders/github/hosted/v1"), wrong, 0},
		{"D10 GitHub's own builder", rule("min_level: 1"), says(job(), "https://github.com/actions/runner/github-hosted"), wrong, 0},
		{"D10 no builder, and no level asked", rule(`refs: ["refs/heads/main"]`), says(job(), ""), wrong, 0},
		// Each provenance meets one half of the rule: none meets it.
		{"D13 level of one, ref of another", rule(`min_level: 3, refs: ["refs/heads/main"]`), append(f.sign(t, byReusable(ref("refs/heads/dev"))), hosted...), low, 0},
		{"D13 level of one, builder of another", rule(`min_level: 2, builders: ["` + notary.Service + `/builders/github/self-hosted/v1"]`), append(hosted[:2:2], self...), low, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := stage(t, row.text, "test").Decide(policy.Request{Ref: f.img.Ref, Evidence: row.evidence, Caller: job(release), Now: today})
			if d := cmp.Diff(row.want, reasons(v)); d != "" {
				t.Errorf("denials (-want +got):\n%s", d)
			}
			if v.Allowed != (row.want == nil) || v.Level != row.level {
				t.Errorf("allowed %v at level %d, want level %d", v.Allowed, v.Level, row.level)
			}
		})
	}
}
