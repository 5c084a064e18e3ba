package identity_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

func TestGitLabRefused(t *testing.T) {
	d := documented(t, "gitlab-com", nil)
	d.maySign(t, nil, "")
	d.refuses(t,
		refusal{"B05 fork", "job_project_id", "51045", attest.SourceNotAllowed},
		refusal{"B05 fork, as number", "job_project_id", 51045, attest.SourceNotAllowed},
		refusal{"B05 fork's project", "project_id", "666", attest.SourceNotAllowed},
		refusal{"B05 fork, as object", "job_project_id", map[string]any{"id": "51044"}, attest.TokenClaims},
		refusal{"B05 fork of an old version: its owner", "namespace_id", "666", attest.OwnerNotAllowed},
		refusal{"B03 other owner as number", "namespace_id", 666, attest.OwnerNotAllowed},
		refusal{"B03 owner id in other spelling", "namespace_id", "07221", attest.TokenClaims},
		refusal{"A21 float", "namespace_id", json.RawMessage("7.221e3"), attest.TokenClaims},
		refusal{"A21 fraction", "pipeline_id", json.RawMessage("1187654321.0"), attest.TokenClaims},
		refusal{"A21 beyond every id", "job_id", json.RawMessage("99999999999999999999"), attest.TokenClaims},
		refusal{"A21 boolean id", "job_id", true, attest.TokenClaims},
		refusal{"B04 namespace that does not hold the project", "namespace_path", "acme", attest.TokenClaims},
		refusal{"B04 namespace that only begins alike", "namespace_path", "acme/sho", attest.TokenClaims},
		refusal{"B09 short commit", "sha", "714a629", attest.TokenClaims},
		refusal{"B09 name for a commit", "sha", "HEAD", attest.TokenClaims},
		refusal{"B09 upper case", "sha", strings.ToUpper("714a629c0b401fdce83e847fc9589983fc6f46bc"), attest.TokenClaims},
		refusal{"B09 name for the configuration's commit", "ci_config_sha", "main", attest.TokenClaims},
		refusal{"B09 another ref in ref_path", "ref_path", "refs/heads/release", attest.TokenClaims},
		refusal{"B09 tag for branch in ref_path", "ref_path", "refs/tags/main", attest.TokenClaims},
		refusal{"B09 ref_path without refs", "ref_path", "main", attest.TokenClaims},
		refusal{"B09 neither branch nor tag, on a branch", "ref_type", "stash", attest.TokenClaims},
		refusal{"ref_protected", "ref_protected", "yes", attest.TokenClaims},
		refusal{"B11 configuration of another server", "ci_config_ref_uri", "github.com/acme/shop//.gitlab-ci.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B11 server that begins alike", "ci_config_ref_uri", "gitlab.com.evil.example/acme/shop/api//.gitlab-ci.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B11 server in the user", "ci_config_ref_uri", "gitlab.com@evil.example/acme/shop/api//.gitlab-ci.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B04 one slash", "ci_config_ref_uri", "gitlab.com/acme/shop/api/.gitlab-ci.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B04 no file", "ci_config_ref_uri", "gitlab.com/acme/shop/api//@refs/heads/main", attest.TokenClaims},
		refusal{"B04 no ref", "ci_config_ref_uri", "gitlab.com/acme/shop/api//.gitlab-ci.yml", attest.TokenClaims},
		refusal{"B12 parent in the configuration", "ci_config_ref_uri", "gitlab.com/acme/shop/api//../evil.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B12 parent in its project", "ci_config_ref_uri", "gitlab.com/acme/../evil/api//ci.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B12 percent", "ci_config_ref_uri", "gitlab.com/acme/shop/api//a%20b.yml@refs/heads/main", attest.TokenClaims},
		refusal{"configuration's URI a number", "ci_config_ref_uri", 7, attest.TokenClaims},
		refusal{"B12 homoglyph", "project_path", "acme/shop/аpi", attest.TokenClaims},
		refusal{"B12 parent", "project_path", "acme/shop/..", attest.TokenClaims},
		refusal{"B12 route", "project_path", "acme/shop/-", attest.TokenClaims},
		refusal{"B12 parent in ref", "ref", "../tags/v1", attest.TokenClaims},
		refusal{"A15 no nbf", "nbf", nil, attest.TokenClaims},
		refusal{"A14 other audience", "aud", "https://gitlab.com", attest.TokenAudience},
		refusal{"J04 source", "pipeline_source", "push\n", attest.TokenClaims},
		refusal{"J04 environment", "environment", "prod\u202e", attest.TokenClaims},
	)
	for _, name := range []string{"project_path", "project_id", "namespace_path", "namespace_id", "sha", "ref", "ref_type", "pipeline_source", "pipeline_id", "job_id"} {
		want := attest.TokenClaims
		if name == "project_id" {
			want = attest.SourceNotAllowed // the job's project is then another
		}
		d.refuses(t,
			refusal{"A23 no " + name, name, nil, want},
			refusal{"A23 null " + name, name, json.RawMessage("null"), want},
			refusal{"A23 empty " + name, name, "", want},
			refusal{"A23 list " + name, name, []string{"1"}, attest.TokenClaims})
	}
}

// A23: whoever lacks a claim is told that it is missing.
func TestGitLabSaysWhatIsMissing(t *testing.T) {
	d := documented(t, "gitlab-com", nil)
	_, err := d.auth.Authenticate(t.Context(), d.token(t, map[string]any{"job_id": nil}))
	if err == nil || !strings.Contains(err.Error(), `"job_id" must be a text or a number, it is missing`) {
		t.Fatalf("no job_id: %v", err)
	}
}

// B01: who may sign and who may only ask. Old versions send no ref_path.
func TestGitLabSources(t *testing.T) {
	d := documented(t, "gitlab-com", nil)
	for _, source := range []string{"push", "web", "api", "trigger", "schedule", "pipeline", "parent_pipeline", "chat"} {
		d.maySign(t, map[string]any{"pipeline_source": source}, "")
	}
	for _, source := range []string{"merge_request_event", "external_pull_request_event", "external", "security_orchestration_policy", "new_in_next_version"} {
		d.maySign(t, map[string]any{"pipeline_source": source}, attest.EventNotAllowed)
	}
	for _, protected := range []any{"false", nil, ""} {
		d.maySign(t, map[string]any{"pipeline_source": "parent_pipeline", "ref_protected": protected}, attest.EventNotAllowed)
		d.maySign(t, map[string]any{"ref_protected": protected}, "")
	}
	for _, row := range []struct{ name, kind, path, want string }{
		{"refs/merge-requests/7/head", "branch", "refs/merge-requests/7/head", "refs/merge-requests/7/head"},
		{"refs/merge-requests/7/head", "branch", "", "refs/heads/refs/merge-requests/7/head"},
		{"w1", "workload", "refs/workloads/w1", "refs/workloads/w1"},
	} {
		id := d.maySign(t, map[string]any{"ref": row.name, "ref_type": row.kind, "ref_path": row.path}, attest.EventNotAllowed)
		if id.Build.Ref != row.want {
			t.Errorf("ref %q, want %q", id.Build.Ref, row.want)
		}
	}
	// A branch may be called like a full ref: it is not that ref.
	id := d.maySign(t, map[string]any{"ref": "refs/heads/main", "ref_path": nil}, attest.EventNotAllowed)
	if id.Build.Ref != "refs/heads/refs/heads/main" {
		t.Errorf("ref %q", id.Build.Ref)
	}
	id = d.maySign(t, map[string]any{"ref": "v1", "ref_type": "tag", "ref_path": nil}, "")
	if id.Build.Ref != "refs/tags/v1" || id.Build.WorkflowPath != "" {
		t.Errorf("ref %q, workflow %q of another ref", id.Build.Ref, id.Build.WorkflowPath)
	}
}

// GitLab writes ids as texts or numbers and booleans as texts or not: it is one job.
func TestGitLabTypes(t *testing.T) {
	d := documented(t, "gitlab-com", nil)
	want := accepted(t, d.auth, d.token(t, nil))
	got := accepted(t, d.auth, d.token(t, map[string]any{
		"project_id": 51044, "job_project_id": 51044, "namespace_id": 7221, "pipeline_id": 1187654321, "job_id": json.Number("9123456789"),
		"user_id": 90210, "ref_protected": true,
	}))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("identity (-texts +numbers):\n%s", diff)
	}
}

// A job without a configuration of its own has a name that no configuration has.
func TestGitLabNames(t *testing.T) {
	d := documented(t, "gitlab-com", nil)
	names := map[string]string{}
	for name, changes := range map[string]map[string]any{
		"own":                         nil,
		"none":                        {"ci_config_ref_uri": nil},
		"none, of the project within": {"ci_config_ref_uri": nil, "project_path": "acme/shop/api/ci", "namespace_path": "acme/shop/api"},
		"other file":                  {"ci_config_ref_uri": "gitlab.com/acme/shop/api//ci/release.yml@refs/heads/main"},
		"other project":               {"ci_config_ref_uri": "gitlab.com/acme/ci//.gitlab-ci.yml@refs/heads/main"},
		"other ref":                   {"ci_config_ref_uri": "gitlab.com/acme/shop/api//.gitlab-ci.yml@refs/heads/x"},
		"at in the file":              {"ci_config_ref_uri": "gitlab.com/acme/shop/api//a@refs/heads/main@refs/heads/main"},
	} {
		id := accepted(t, d.auth, d.token(t, changes))
		if other, ok := names[id.SAN]; ok {
			t.Errorf("%q and %q are both called %s", name, other, id.SAN)
		}
		names[id.SAN] = name
		if b := id.Build; (b.ConfigURI == "") != (changes["ci_config_ref_uri"] == nil && changes != nil) || b.SignerURI != b.ConfigURI {
			t.Errorf("%s: configuration %q, signer %q", name, b.ConfigURI, b.SignerURI)
		}
	}
	id := accepted(t, d.auth, d.token(t, map[string]any{"ci_config_ref_uri": nil}))
	if id.Build.ConfigDigest != "" || id.Build.SignerDigest != "" {
		t.Errorf("digests %q, %q of no configuration", id.Build.ConfigDigest, id.Build.SignerDigest)
	}
	file := accepted(t, d.auth, d.token(t, map[string]any{"ci_config_ref_uri": "gitlab.com/acme/ci//.gitlab-ci.yml@refs/heads/main"}))
	if file.Build.WorkflowPath != "" {
		t.Errorf("B04 workflow path %q of another project's file", file.Build.WorkflowPath)
	}
}

// The token's issuer may be another URL than the server's.
func TestGitLabServer(t *testing.T) {
	d := documented(t, "gitlab-self-managed", func(i *identity.Issuer) { i.ServerURL = "https://git.example.com/gitlab" })
	id := accepted(t, d.auth, d.token(t, map[string]any{
		"ci_config_ref_uri": "git.example.com/gitlab/platform/base-images//.gitlab-ci.yml@refs/tags/v2.1",
	}))
	const project = "https://git.example.com/gitlab/platform/base-images"
	if id.Build.SourceURI != project || id.SAN != project+"//.gitlab-ci.yml@refs/tags/v2.1" || id.Build.WorkflowPath != ".gitlab-ci.yml" {
		t.Fatalf("source %s, SAN %s, workflow %s", id.Build.SourceURI, id.SAN, id.Build.WorkflowPath)
	}
}
