package identity_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

func TestBuildkiteRefused(t *testing.T) {
	d := documented(t, "buildkite", nil)
	d.maySign(t, nil, "")
	const other = "01849910-ffff-4fff-8fff-ffffffffffff"
	d.refuses(t,
		refusal{"B03 other organization with our slug", "organization_id", other, attest.OwnerNotAllowed},
		refusal{"B03 other pipeline with our slug", "pipeline_id", other, attest.SourceNotAllowed},
		refusal{"B03 id in another spelling", "pipeline_id", "0184990A-4782-42B5-AFC1-16715B10B1A0", attest.TokenClaims},
		refusal{"B03 slug for an id", "pipeline_id", "super-duper-app", attest.TokenClaims},
		refusal{"A21 float", "build_number", json.RawMessage("1.234567e+06"), attest.TokenClaims},
		refusal{"A21 fraction", "build_number", json.RawMessage("1234567.0"), attest.TokenClaims},
		refusal{"A21 negative", "build_number", -1, attest.TokenClaims},
		refusal{"B12 path in a slug", "pipeline_slug", "super/app", attest.TokenClaims},
		refusal{"B12 route in a slug", "organization_slug", "..", attest.TokenClaims},
		refusal{"B12 homoglyph", "organization_slug", "аcme-inc", attest.TokenClaims},
		refusal{"B12 fragment in a slug", "pipeline_slug", "app#1", attest.TokenClaims},
		refusal{"B12 fragment in the job", "job_id", "0184990a-477b-4fa8-9968-496074483cee#", attest.TokenClaims},
		refusal{"B12 parent in branch", "build_branch", "../tags/v1", attest.TokenClaims},
		refusal{"B12 parent in tag", "build_tag", "../heads/main", attest.TokenClaims},
		refusal{"B09 commit a number", "build_commit", 7, attest.TokenClaims},
		refusal{"A14 default audience", "aud", "https://buildkite.com/acme-inc", attest.TokenAudience},
		refusal{"A15 no nbf", "nbf", nil, attest.TokenClaims},
		refusal{"J04 source", "build_source", "ui x", attest.TokenClaims},
		refusal{"J04 branch", "build_branch", "main\x1b[2K", attest.TokenClaims},
	)
	for _, name := range []string{
		"organization_id", "organization_slug", "pipeline_id", "pipeline_slug", "build_number", "build_branch", "job_id", "build_source",
	} {
		d.refuses(t,
			refusal{"A23 no " + name, name, nil, attest.TokenClaims},
			refusal{"A23 null " + name, name, json.RawMessage("null"), attest.TokenClaims},
			refusal{"A23 empty " + name, name, "", attest.TokenClaims},
			refusal{"A23 list " + name, name, []string{"1"}, attest.TokenClaims})
	}
	// Whoever forgot to ask for the ids is told how.
	_, err := d.auth.Authenticate(t.Context(), d.token(t, map[string]any{"pipeline_id": nil}))
	if err == nil || !strings.Contains(err.Error(), "--claim organization_id,pipeline_id") {
		t.Errorf("no pipeline_id: %v", err)
	}
}

// B01: who may sign and who may only ask.
func TestBuildkiteSources(t *testing.T) {
	d := documented(t, "buildkite", nil)
	for _, source := range []string{"ui", "api", "webhook", "trigger_job", "schedule"} {
		d.maySign(t, map[string]any{"build_source": source}, "")
	}
	d.maySign(t, map[string]any{"build_source": "merge_queue"}, attest.EventNotAllowed)
	for _, branch := range []string{"stranger:main", "pull/7/head", "pull/7", "merge-requests/7/head", "refs/pull/7/head", "refs/heads/main"} {
		d.maySign(t, map[string]any{"build_branch": branch}, attest.EventNotAllowed)
	}
	for _, branch := range []string{"pull/x", "feature/pull/7", "a@b"} {
		id := d.maySign(t, map[string]any{"build_branch": branch}, "")
		if id.Build.Ref != "refs/heads/"+branch {
			t.Errorf("ref %q", id.Build.Ref)
		}
	}
}

// B09: what is no full commit is no fact, and so no source.
func TestB09BuildkiteCommit(t *testing.T) {
	d := documented(t, "buildkite", nil)
	for _, c := range []any{"HEAD", "9f3182061f1e", strings.Repeat("A", 40), "main", "", nil} {
		id := d.maySign(t, map[string]any{"build_commit": c}, "")
		if id.Build.Commit != "" || id.Build.HasSource() {
			t.Errorf("commit %v became %q", c, id.Build.Commit)
		}
	}
}

// The repository is the operator's word, by immutable id.
func TestBuildkitePipelines(t *testing.T) {
	const second = "01849910-1111-4111-8111-111111111111"
	pipelines := map[string]identity.Pipeline{second: {Repository: "https://git.example.com/group/sub/app", RepositoryID: "7"}}
	d := documented(t, "buildkite", func(i *identity.Issuer) { i.Pipelines = pipelines })
	pipelines[second] = identity.Pipeline{Repository: "https://git.example.com/evil"}
	refused(t, d.auth, d.token(t, nil), attest.SourceNotAllowed)
	b := accepted(t, d.auth, d.token(t, map[string]any{"pipeline_id": second})).Build
	if b.SourceURI != "https://git.example.com/group/sub/app" || b.Repository != "group/sub/app" || b.RepositoryID != "7" {
		t.Fatalf("build %+v", b)
	}
}
