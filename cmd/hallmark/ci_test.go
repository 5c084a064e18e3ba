package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// The Buildkite agent is asked for the ids that a token is refused without.
func TestBuildkiteToken(t *testing.T) {
	var path, access string
	var asked struct {
		Audience string
		Claims   []string
	}
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, access = r.Method+" "+r.URL.Path, r.Header.Get("Authorization")
		if access != "Token access-token" {
			http.Error(w, `{"message": "access-token is not known"}`, http.StatusUnauthorized)
			return
		}
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"token": jwt(asked.Audience)})
	}))
	t.Cleanup(agent.Close)
	p := startPeer(t, nil)
	p.answer("WhoAmI", []byte(`{"subject": "x"}`))
	env := map[string]string{
		"XDG_CONFIG_HOME": t.TempDir(), "BUILDKITE": "true", "BUILDKITE_AGENT_ACCESS_TOKEN": "access-token",
		"BUILDKITE_AGENT_ENDPOINT": agent.URL, "BUILDKITE_JOB_ID": "0184990a-477b-4fa8-9968-496074483cee",
	}
	a := &app{getenv: func(k string) string { return env[k] }}
	code, _, stderr := run1(t, a, "--server", p.url, "-v", "whoami")
	if code != exitOK || !strings.Contains(stderr, "signing in with the token of the Buildkite agent") || path != "POST /jobs/0184990a-477b-4fa8-9968-496074483cee/oidc/tokens" {
		t.Errorf("exit %d, %s\n%s", code, path, stderr)
	}
	if asked.Audience != testkit.Service || strings.Join(asked.Claims, ",") != "organization_id,pipeline_id" {
		t.Errorf("asked for %+v", asked)
	}
	// L01: an agent that refuses, and nothing of its token in what is said about it.
	env["BUILDKITE_AGENT_ACCESS_TOKEN"] = "wrong-secret"
	code, _, stderr = run1(t, &app{getenv: a.getenv}, "--server", p.url, "whoami")
	if code != exitNotPermitted || !strings.Contains(stderr, "the Buildkite agent: ") || strings.Contains(stderr, "wrong-secret") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

// A document is told by what it says, not by its name.
func TestReadSBOM(t *testing.T) {
	for _, row := range []struct{ name, text, want string }{
		{"SPDX 2", `{"spdxVersion": "SPDX-2.3", "SPDXID": "SPDXRef-DOCUMENT"}`, attest.PredicateSPDX},
		{"SPDX 3", `{"@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld", "@graph": []}`, attest.PredicateSPDX},
		{"CycloneDX", `{"bomFormat": "CycloneDX", "specVersion": "1.6"}`, attest.PredicateCycloneDX},
		{"both", `{"bomFormat": "CycloneDX", "spdxVersion": "SPDX-2.3"}`, ""},
		{"neither", `{"name": "SPDX-2.3 CycloneDX"}`, ""},
		{"a list", `[{"bomFormat": "CycloneDX"}]`, ""},
		{"a number for a name", `{"bomFormat": 1, "spdxVersion": "SPDX-2.3"}`, ""},
		{"another context", `{"@context": "https://schema.org", "@graph": []}`, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			uri, _, err := readSBOM("sbom.json", []byte(row.text))
			if uri != row.want || (row.want == "") != (attest.ReasonOf(err) == attest.PredicateInvalid) {
				t.Errorf("%q, %v", uri, err)
			}
		})
	}
	if _, _, err := readSBOM("sbom.json", []byte(`{"bomFormat": "CycloneDX", "BomFormat": "x"}`)); attest.ReasonOf(err) != attest.BadJSON {
		t.Errorf("D03 a member twice: %v", err)
	}
}

func TestQuoted(t *testing.T) {
	for _, row := range []struct{ name, in, want string }{
		{"plain", "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main", "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main"},
		{"nothing", "", "''"},
		{"J04 a command", "a; rm -rf /", "'a; rm -rf /'"},
		{"J04 substitution", "$(id)`id`", "'$(id)`id`'"},
		{"J04 quotes", `it's "it"`, `'it'\''s "it"'`},
		{"J04 home", "~root", "'~root'"},
		{"J04 pattern", "a*", "'a*'"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := quoted(row.in); got != row.want {
				t.Errorf("%s, want %s", got, row.want)
			}
			if _, out := shell(t, t.TempDir(), "printf '%s|' "+quoted(row.in), nil, "sh"); out != row.in+"|" {
				t.Errorf("a shell reads %q", out)
			}
		})
	}
}
