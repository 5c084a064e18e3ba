package identity_test

import (
	"maps"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

// B04, B08: a build is at level 3 only when the listed workflow, at a listed commit,
// was called on a hosted runner and nothing that its caller set is missing from the
// token. Everything else is an ordinary job.
func TestReusableWorkflows(t *testing.T) {
	d := documented(t, "github-reusable-workflow", nil)
	const listed, at = "octo-org/pipelines/.github/workflows/image.yml", "9c1f2d3e4b5a69788796a5b4c3d2e1f00f1e2d3c"
	const own = "octo-org/hello/.github/workflows/release.yml@refs/tags/v1.4.0"
	noInputs := documented(t, "github-reusable-workflow", func(i *identity.Issuer) { i.ReusableWorkflows[0].Inputs = "none" })
	for _, row := range []struct {
		name    string
		changes map[string]any
		l3      bool // with any inputs
		l3none  bool // with inputs: none
	}{
		{"push", nil, true, true},
		{"release", map[string]any{"event_name": "release"}, true, true},
		{"create", map[string]any{"event_name": "create"}, true, true},
		{"at a commit", map[string]any{"job_workflow_ref": listed + "@" + at}, true, true},
		{"at a branch that moved, at the listed commit", map[string]any{"job_workflow_ref": listed + "@refs/heads/main"}, true, true},
		{"B04 inputs by hand", map[string]any{"event_name": "workflow_dispatch"}, false, true},
		{"B04 inputs by API", map[string]any{"event_name": "repository_dispatch"}, false, true},
		{"schedule", map[string]any{"event_name": "schedule"}, false, true},
		{"B01 pull request", map[string]any{"event_name": "pull_request_target"}, false, false},
		{"B08 self-hosted", map[string]any{"runner_environment": "self-hosted"}, false, false},
		{"B08 runner that begins alike", map[string]any{"runner_environment": "github-hosted-larger"}, false, false},
		{"B04 other commit", map[string]any{"job_workflow_sha": strings.Repeat("a", 40)}, false, false},
		{"B04 no commit", map[string]any{"job_workflow_sha": nil}, false, false},
		{"B04 commit of the source", map[string]any{"job_workflow_sha": "4be1d0c7a2f6b8d9e0f1a2b3c4d5e6f708192a3b"}, false, false},
		{"B11 path that begins alike", map[string]any{"job_workflow_ref": listed + ".evil.yml@refs/tags/v2"}, false, false},
		{"B11 path within", map[string]any{"job_workflow_ref": listed + "/x.yml@refs/tags/v2"}, false, false},
		{"B11 file with an at", map[string]any{"job_workflow_ref": listed + "@evil.yml@refs/tags/v2"}, false, false},
		{"B11 file called like a ref", map[string]any{"job_workflow_ref": listed + "@refs/heads/x.yml@refs/tags/v2"}, false, false},
		{"B11 repository that ends alike", map[string]any{"job_workflow_ref": "evil-" + listed + "@refs/tags/v2"}, false, false},
		{"B11 repository below", map[string]any{"job_workflow_ref": "evil/x/" + listed + "@refs/tags/v2"}, false, false},
		{"B12 other case", map[string]any{"job_workflow_ref": strings.ToUpper(listed[:8]) + listed[8:] + "@refs/tags/v2"}, false, false},
		{"B04 not called", map[string]any{"job_workflow_ref": own, "job_workflow_sha": at}, false, false},
		{"B04 listed but not called", map[string]any{"workflow_ref": listed + "@refs/tags/v2"}, false, false},
		{"B04 listed but not called, in another case", map[string]any{"workflow_ref": strings.ToUpper(listed) + "@refs/tags/v2"}, false, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, c := range []struct {
				d    documentedExample
				want bool
			}{{d, row.l3}, {noInputs, row.l3none}} {
				id := accepted(t, c.d.auth, c.d.token(t, row.changes))
				if got := id.Reusable != ""; got != c.want || got && id.Reusable != listed {
					t.Fatalf("reusable %q, want %v", id.Reusable, c.want)
				}
				builder := attest.BuilderID(service, id)
				if level := attest.BuildLevel(service, builder); (level == 3) != c.want {
					t.Errorf("level %d of %s", level, builder)
				}
				if !attest.BuilderFits(service, builder, id.Provider, id.Build) {
					t.Errorf("%s does not fit its own job", builder)
				}
			}
		})
	}
	t.Run("B04 nothing is listed", func(t *testing.T) {
		none := documented(t, "github-reusable-workflow", func(i *identity.Issuer) { i.ReusableWorkflows = nil })
		if id := accepted(t, none.auth, none.token(t, nil)); id.Reusable != "" {
			t.Fatalf("reusable %q", id.Reusable)
		}
	})
}

// What the caller changes after New lists nothing.
func TestReusableWorkflowsAreCopied(t *testing.T) {
	const listed, at = "octo-org/pipelines/.github/workflows/image.yml", "9c1f2d3e4b5a69788796a5b4c3d2e1f00f1e2d3c"
	conf := []identity.ReusableWorkflow{{Workflow: listed, Commits: []string{commit}}, {Workflow: "a/b/c.yml", Commits: []string{at}}}
	d := documented(t, "github-reusable-workflow", func(i *identity.Issuer) { i.ReusableWorkflows = conf })
	conf[0].Commits[0], conf[1].Workflow = at, listed
	if id := accepted(t, d.auth, d.token(t, nil)); id.Reusable != "" {
		t.Fatalf("reusable %q", id.Reusable)
	}
}

// B13: what a token is good for is the configuration's word, for every provider.
func TestB13Replay(t *testing.T) {
	for _, name := range []string{"github-com", "gitlab-com", "buildkite", "forgejo"} {
		for replay, want := range map[string]bool{"": false, "job": false, "once": true} {
			d := documented(t, name, func(i *identity.Issuer) { i.Replay = replay })
			if id := accepted(t, d.auth, d.token(t, nil)); id.Once != want {
				t.Errorf("%s, replay %q: once %v", name, replay, id.Once)
			}
		}
	}
}

// B13, A14: a token that another service may hold is used once, fresh, and says
// which it is.
func TestB13SharedAudience(t *testing.T) {
	d := documented(t, "azure-devops", nil)
	if id := d.maySign(t, nil, ""); !id.Once {
		t.Fatal("the token may be used again")
	}
	old := d.now.Unix() - 5*60 - 1
	d.refuses(t,
		refusal{"B13 no jti", "jti", nil, attest.TokenClaims},
		refusal{"B13 empty jti", "jti", "", attest.TokenClaims},
		refusal{"A15 old", "iat", old, attest.TokenExpired},
		refusal{"A14 our own audience", "aud", service, attest.TokenAudience},
		refusal{"A14 both audiences", "aud", []string{service, "api://AzureADTokenExchange"}, attest.TokenAudience},
		refusal{"B03 other organization", "org_id", "6c7f2a10-5b0e-4a67-9a51-3d0e8f4b2c18", attest.OwnerNotAllowed},
		refusal{"A23 a service connection's token", "rpo_id", nil, attest.TokenClaims},
		refusal{"A23 no pipeline", "def_id", nil, attest.TokenClaims},
		refusal{"B12 parent for a pipeline", "def_id", "..", attest.TokenClaims},
		refusal{"source that is no URI", "rpo_uri", "dev.azure.com/acme", attest.TokenClaims},
		refusal{"L01 source with a password", "rpo_uri", "https://x:y@dev.azure.com/acme", attest.TokenClaims},
	)
	d.maySign(t, map[string]any{"rpo_ref": "refs/pull/7/merge"}, attest.EventNotAllowed)
	if id := d.maySign(t, map[string]any{"rpo_ver": "C42"}, ""); id.Build.HasSource() { // a changeset of TFVC
		t.Errorf("B09 commit %q", id.Build.Commit)
	}
	braced := map[string]any{"rpo_id": "{d2c3b4a5-9687-4786-95a4-b3c2d1e0f901}", "org_id": "{6c7f2a10-5b0e-4a67-9a51-3d0e8f4b2c19}"}
	want, got := accepted(t, d.auth, d.token(t, nil)), accepted(t, d.auth, d.token(t, maps.Clone(braced)))
	if want.Build != got.Build || want.SAN != got.SAN {
		t.Errorf("with braces: %+v", got)
	}
}
