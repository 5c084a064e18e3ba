package identity_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// The defects of Fulcio's own mapping that were reproduced with its shipped
// configuration (ci-identity 1.6), each of which would be a lie in a certificate.

func TestFulcioBuildNumberKeepsItsDigits(t *testing.T) {
	d := documented(t, "buildkite", nil)
	for _, number := range []any{1234567, json.Number("9007199254740993"), "1234567890123456789"} {
		b := accepted(t, d.auth, d.token(t, map[string]any{"build_number": number})).Build
		digits := strings.Trim(string(mustJSON(t, number)), `"`)
		if b.RunID != digits || !strings.Contains(b.RunURI, "/builds/"+digits+"#") {
			t.Errorf("number %v became run %q, %s", number, b.RunID, b.RunURI)
		}
	}
}

func TestFulcioHeadIsNoCommit(t *testing.T) {
	d := documented(t, "buildkite-by-hand", nil)
	id := accepted(t, d.auth, d.token(t, nil))
	if id.Build.Commit != "" || id.Build.HasSource() {
		t.Fatalf("build %+v", id.Build)
	}
}

func TestFulcioCircleCIHasNoQuotesForNothing(t *testing.T) {
	d := documented(t, "circleci", nil)
	b := accepted(t, d.auth, d.token(t, nil)).Build
	if b.Runner != "" || b.SourceURI != "https://github.com/acme/api" || strings.Contains(strings.TrimPrefix(b.RunURI, "https://"), "//") {
		t.Fatalf("runner %q, source %q, run %q", b.Runner, b.SourceURI, b.RunURI)
	}
}

func TestFulcioNullIsNoText(t *testing.T) {
	for _, name := range []string{"gitlab-com", "gitlab-self-managed"} {
		d := documented(t, name, nil)
		for _, nothing := range []any{nil, json.RawMessage("null"), ""} {
			id := accepted(t, d.auth, d.token(t, map[string]any{"ci_config_ref_uri": nothing, "ci_config_sha": nothing, "environment": nothing}))
			if text := string(mustJSON(t, id)); strings.Contains(text, "nil") || strings.Contains(text, "null,") && id.Build.ConfigURI != "" || id.Build.SignerDigest != "" {
				t.Errorf("%s: identity %s", name, text)
			}
		}
	}
}

func TestFulcioSelfManagedIsNotGitLabCom(t *testing.T) {
	d := documented(t, "gitlab-self-managed", nil)
	if text := string(mustJSON(t, accepted(t, d.auth, d.token(t, nil)))); strings.Contains(text, "gitlab.com") {
		t.Fatalf("identity %s", text)
	}
}

// Claims of any name change nothing: templates and defaults are not among them.
func TestFulcioClaimsDoNotOverride(t *testing.T) {
	const evil = "https://evil.example"
	extra := map[string]any{
		"url": evil, "server_url": evil, "platform_url": evil, "api_url": evil, "base_url": evil, "source_uri": evil, "san": evil,
		"repository_uri": evil, "reusable": "evil/x/y.yml", "once": false, "unaccepted": "", "issuer": evil, "provider": "github", "kind": "service",
	}
	for _, e := range testkit.Examples(t) {
		if e.File == "kubernetes.md" || e.File == "spiffe.md" {
			continue // they name no server
		}
		d := documented(t, e.Name, nil)
		want, got := accepted(t, d.auth, d.token(t, nil)), accepted(t, d.auth, d.token(t, extra))
		want.TokenID, got.TokenID = "", ""
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-without +with):\n%s", e.Name, diff)
		}
	}
}

// B02: whatever sub says, the job is what the other claims say.
func TestB02SubjectOfEveryProvider(t *testing.T) {
	for _, name := range []string{"github-com", "gitlab-com", "buildkite", "azure-devops", "forgejo"} {
		d := documented(t, name, nil)
		want := accepted(t, d.auth, d.token(t, nil)).Build
		for _, sub := range []string{"repo:evil/x:ref:refs/heads/main", "project_path:evil/x:ref_type:branch:ref:main", "organization:evil:pipeline:x"} {
			id := accepted(t, d.auth, d.token(t, map[string]any{"sub": sub}))
			if diff := cmp.Diff(want, id.Build); diff != "" || id.Subject != sub {
				t.Errorf("%s: sub %q changed the build:\n%s", name, sub, diff)
			}
		}
		d.refuses(t, refusal{"A23 no sub", "sub", nil, attest.TokenClaims})
	}
}
