package identity_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

func TestCircleCIRefused(t *testing.T) {
	d := documented(t, "circleci", nil)
	const p = "oidc.circleci.com/"
	d.refuses(t,
		refusal{"B13 a shell in the job", p + "ssh-rerun", true, attest.SourceNotAllowed},
		refusal{"B13 a shell in the job, as text", p + "ssh-rerun", "true", attest.SourceNotAllowed},
		refusal{"A23 nothing about a shell", p + "ssh-rerun", nil, attest.SourceNotAllowed},
		refusal{"A23 null about a shell", p + "ssh-rerun", json.RawMessage("null"), attest.SourceNotAllowed},
		refusal{"A21 number for a boolean", p + "ssh-rerun", 0, attest.SourceNotAllowed},
		refusal{"list for a boolean", p + "ssh-rerun", []bool{false}, attest.TokenClaims},
		refusal{"B05 fork", p + "vcs-origin", "github.com/stranger/api", attest.SourceNotAllowed},
		refusal{"B05 fork within a longer name", p + "vcs-origin", "github.com/acme/api2", attest.SourceNotAllowed},
		refusal{"B11 prefix", p + "vcs-origin", "evil.example/github.com/acme/api", attest.SourceNotAllowed},
		refusal{"B12 other case", p + "vcs-origin", "github.com/Acme/api", attest.SourceNotAllowed},
		refusal{"A23 custom webhook", p + "vcs-origin", nil, attest.SourceNotAllowed},
		refusal{"B03 other organization", p + "org-id", "0d8b1f7c-3f8e-4d0a-9f0e-2b6f0c6a7e12", attest.OwnerNotAllowed},
		refusal{"A23 no project", p + "project-id", nil, attest.TokenClaims},
		refusal{"A14 default audience", "aud", "0d8b1f7c-3f8e-4d0a-9f0e-2b6f0c6a7e11", attest.TokenAudience},
		refusal{"B12 parent for a job", p + "job-id", "..", attest.TokenClaims},
	)
	for _, ref := range []string{"refs/pull/7/head", "main", "pull/7"} {
		d.maySign(t, map[string]any{p + "vcs-ref": ref}, attest.EventNotAllowed)
	}
	id := d.maySign(t, nil, "")
	if id.Build.HasSource() {
		t.Error("a source without a commit")
	}
}

func TestForgejo(t *testing.T) {
	d := documented(t, "forgejo", nil)
	for _, event := range []string{"push", "create", "release", "workflow_dispatch", "schedule"} {
		d.maySign(t, map[string]any{"event_name": event}, "")
	}
	for _, event := range []any{"pull_request", "pull_request_target", "issue_comment", "PUSH", "", nil} {
		d.maySign(t, map[string]any{"event_name": event}, attest.EventNotAllowed)
	}
	d.maySign(t, map[string]any{"ref": "refs/pull/7/head"}, attest.EventNotAllowed)
	d.refuses(t,
		refusal{"B03 other owner", "repository_owner_id", "123457", attest.OwnerNotAllowed},
		refusal{"B03 old version without ids", "repository_owner_id", nil, attest.OwnerNotAllowed},
		refusal{"B12 parent", "repository", "acme/..", attest.TokenClaims},
		refusal{"B12 parent in workflow", "workflow_ref", "acme/api/../../evil/x.yml@refs/heads/main", attest.TokenClaims},
		refusal{"B12 parent for an attempt", "run_attempt", "..", attest.TokenClaims},
		refusal{"A23 no repository", "repository", nil, attest.TokenClaims},
		refusal{"A21 exponent", "run_id", json.RawMessage("3.7e6"), attest.TokenClaims},
	)
	// B12: only the first part of a URI may be a path.
	one := accepted(t, d.auth, d.token(t, map[string]any{"run_id": "1/attempts/2", "run_attempt": "3"})).Build.RunURI
	two := accepted(t, d.auth, d.token(t, map[string]any{"run_id": "1", "run_attempt": "2/attempts/3"})).Build.RunURI
	if one == two || one != "https://codeberg.org/acme/api/actions/runs/1%2Fattempts%2F2/attempts/3" {
		t.Errorf("runs %s and %s", one, two)
	}
	// B04: the path of another repository's workflow is none of this one.
	for _, file := range []string{"evil/api/.forgejo/workflows/image.yml@refs/heads/main", "acme/api/.forgejo/workflows/image.yml@refs/heads/x"} {
		if b := accepted(t, d.auth, d.token(t, map[string]any{"workflow_ref": file})).Build; b.WorkflowPath != "" {
			t.Errorf("workflow path %q of %s", b.WorkflowPath, file)
		}
	}
}

func TestJenkins(t *testing.T) {
	d := documented(t, "jenkins", nil)
	d.refuses(t,
		refusal{"A14 no audience", "aud", nil, attest.TokenAudience},
		refusal{"A14 empty audience", "aud", "", attest.TokenAudience},
		refusal{"A21 exponent", "build_number", json.RawMessage("4.17e2"), attest.TokenClaims},
		refusal{"B12 parent", "repository", "../evil", attest.TokenClaims},
	)
	// B01, B05: what the plugin says of a multibranch pull request, and what others do.
	for _, branch := range []string{"PR-7", "PR-7-head", "PR-7-merge", "pr-7", "MR-7", "MR-7-head", "7/merge", "7/head", "pull/7", "pull/7/head",
		"pulls/7", "pull-requests/7/from", "merge-requests/7/head", "changes/34/1234/5", "pr/7", "refs/pull/7/head", "refs/heads/main", "stranger:main"} {
		d.maySign(t, map[string]any{"branch": branch}, attest.EventNotAllowed)
	}
	for _, branch := range []string{"main", "release/7", "7/merged", "pull/x", "hotfix/PR-7", "fix/7/head", "APR-7", "7"} {
		d.maySign(t, map[string]any{"branch": branch}, "")
	}
	for _, branch := range []string{"../pull/7/merge", "../tags/v1.0.0", "..", "/main", "main/", "a//b", "a/./b", "/"} {
		d.refuses(t, refusal{"B12 branch " + branch, "branch", branch, attest.TokenClaims})
	}
	for _, repository := range []string{"shop/api#x", "shop/api?x=1", "shop/api%2Fx", "shop api"} {
		d.refuses(t, refusal{"B12 repository " + repository, "repository", repository, attest.TokenClaims})
	}
	if b := d.maySign(t, map[string]any{"branch": nil, "commit": "HEAD"}, "").Build; b.Ref != "" || b.Commit != "" || b.HasSource() {
		t.Errorf("B09 build %+v", b)
	}
	if b := d.maySign(t, map[string]any{"build_number": 12345678}, "").Build; b.RunID != "12345678" {
		t.Errorf("A21 run %q", b.RunID)
	}
}

func TestBitbucket(t *testing.T) {
	d := documented(t, "bitbucket", nil)
	d.refuses(t,
		refusal{"B03 other workspace", "workspaceUuid", "{2f9e8d7c-6b5a-4493-8271-605f4e3d2c1c}", attest.OwnerNotAllowed},
		refusal{"B12 braces around something else", "workspaceUuid", "{{2f9e8d7c-6b5a-4493-8271-605f4e3d2c1b}}", attest.OwnerNotAllowed},
		refusal{"A23 no repository", "repositoryUuid", nil, attest.TokenClaims},
	)
	// A tag has no branchName: the field is empty, not half a ref.
	if b := d.maySign(t, map[string]any{"branchName": nil}, "").Build; b.Ref != "" {
		t.Errorf("ref %q", b.Ref)
	}
	// Owners may be written as Bitbucket prints them.
	braced := documented(t, "bitbucket", func(i *identity.Issuer) { i.Owners = []string{"{2f9e8d7c-6b5a-4493-8271-605f4e3d2c1b}"} })
	accepted(t, braced.auth, braced.token(t, nil))
}

// J04, B12: what is compared and shown as a link has one spelling and leads where it
// says.
func TestB12URIsOfClaims(t *testing.T) {
	d := documented(t, "azure-devops", nil)
	for _, uri := range []string{
		"https://dev.azure.com/acme/shop/_git/x/../api", "https://dev.azure.com/acme/./api", "https://dev.azure.com/acme//api", "https://dev.azure.com/acme/api/",
		"https://dev.azure.com/acme/%2e%2e/api", "https://dev.azure.com/", "https://github.com/acme%2fapi", "https://github.com/acme%2Fapi", "https://github.com/%61cme/api",
		"https://github.com/acme/api#@evil", "https://github.com/acme/api#", "https://github.com/acme/api?x=1", "https://github.com/acme/api?",
		"https://GITHUB.com/acme/api", "HTTPS://github.com/acme/api", "https://github.com./acme/api", "https://github.com:443/acme/api", "https://github.com:/acme/api", "https://github.com:0443/acme/api",
		"http://github.com/acme/api", "javascript://github.com/%0aalert(1)", "ssh://github.com/acme/api", "https:///acme/api", "https://@github.com/acme/api",
		"https://github.com/acme api", "https://gïthub.com/acme/api", "https:github.com/acme/api",
	} {
		d.refuses(t, refusal{"B12 source " + uri, "rpo_uri", uri, attest.TokenClaims})
	}
	for _, uri := range []string{"https://dev.azure.com/acme/My%20Shop/_git/api", "https://git.example.com:8443/a/b.git", "https://git.example.com/~me/c++", "https://[2001:db8::1]/a"} {
		if got := d.maySign(t, map[string]any{"rpo_uri": uri}, "").Build.SourceURI; got != uri {
			t.Errorf("source %q, want %q", got, uri)
		}
	}
	// A query is what the mapping says: no claim adds to it, or begins one.
	const run = "https://dev.azure.com/acme/91f3b4c5-2d6e-4f70-8192-a3b4c5d6e7f8/_build/results?buildId="
	for id, want := range map[string]string{"1&buildId=2": run + "1%26buildId%3D2", "1#x": run + "1%23x", "1/../2": run + "1%2F..%2F2", "1+2 3": run + "1%2B2+3", "1%262": run + "1%25262"} {
		if got := d.maySign(t, map[string]any{"run_id": id}, "").Build.RunURI; got != want {
			t.Errorf("run %q: %s, want %s", id, got, want)
		}
	}
	if got := d.maySign(t, map[string]any{"prj_id": "a?buildId=1&x"}, "").Build.RunURI; !strings.HasPrefix(got, "https://dev.azure.com/acme/a%3FbuildId=1&x/_build/results?buildId=") {
		t.Errorf("run %s", got)
	}
	// Jenkins ends the URLs of its builds with a slash.
	jenkins := documented(t, "azure-devops", func(i *identity.Issuer) { delete(i.Claims, "source_uri"); i.Claims["run_uri"] = "rpo_uri" })
	jenkins.maySign(t, map[string]any{"rpo_uri": "https://jenkins.example.com/job/api/417/"}, "")
}

// A URI made of claims stays on a host that nobody can slip a user into.
func TestB12TemplateHosts(t *testing.T) {
	d := documented(t, "circleci", func(i *identity.Issuer) { delete(i.Require, "oidc.circleci.com/vcs-origin") })
	for _, origin := range []string{"me:secret@github.com/acme/api", "/acme/api", "github.com//api", "github.com/../x", "", "a b/c", "[::1/x"} {
		id, err := d.auth.Authenticate(t.Context(), d.token(t, map[string]any{"oidc.circleci.com/vcs-origin": origin}))
		if reason := attest.ReasonOf(err); reason != attest.TokenClaims && (origin != "" || id.Build.SourceURI != "") {
			t.Errorf("origin %q: source %q, %v", origin, id.Build.SourceURI, err)
		}
	}
}
