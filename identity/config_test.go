package identity_test

import (
	"encoding/json"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

func TestNew(t *testing.T) {
	github := identity.Issuer{Name: "github", Provider: "github", Issuer: "https://token.actions.githubusercontent.com", Owners: []string{"9919"}}
	corp := identity.Issuer{Name: "corp", Provider: "generic", Kind: attest.Person, Issuer: "https://sso.example.com/realms/a", Claims: map[string]string{"groups": "groups"}}
	ci := identity.Issuer{Name: "ci", Provider: "generic", Issuer: "https://ci.example.com", Claims: map[string]string{"repository": "repo", "owner_id": "org"}}
	gitlab := identity.Issuer{Name: "gitlab", Provider: "gitlab", Issuer: "https://gitlab.com", Owners: []string{"7221"}}
	const organization = "f892efa9-103e-4d28-97a1-3b8616a0994d"
	kite := identity.Issuer{
		Name: "kite", Provider: "buildkite", Issuer: "https://agent.buildkite.com", Owners: []string{organization},
		Pipelines: map[string]identity.Pipeline{"0184990a-4782-42b5-afc1-16715b10b1a0": {Repository: "https://github.com/acme/api"}},
	}
	reusable := identity.ReusableWorkflow{Workflow: "acme/pipelines/.github/workflows/image.yml", Commits: []string{commit}}
	noPEM := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(noPEM, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	change := func(i identity.Issuer, f func(*identity.Issuer)) []identity.Issuer {
		i.Claims = maps.Clone(i.Claims)
		f(&i)
		return []identity.Issuer{i}
	}
	for _, row := range []struct {
		name    string
		issuers []identity.Issuer
		want    string // what the error must name; "" is accepted
	}{
		{"none", nil, ""},
		{"one of each", []identity.Issuer{github, corp, ci}, ""},
		{"enterprise", change(github, func(i *identity.Issuer) { i.Issuer += "/acme"; i.Owners = nil }), ""},
		{"enterprise server", change(github, func(i *identity.Issuer) {
			i.Issuer, i.ServerURL = "https://git.example.com/_services/token", "https://git.example.com"
		}), ""},
		{"issuer with trailing slash", change(corp, func(i *identity.Issuer) { i.Issuer = "https://acme.auth.example.com/" }), ""},
		{"issuer on IPv6 loopback", change(ci, func(i *identity.Issuer) { i.Issuer, i.PlainHTTP = "http://[::1]:8080", true }), ""},
		{"own audience", change(ci, func(i *identity.Issuer) { i.Audience = service + "/ci" }), ""},
		{"audience that may be anybody's", change(ci, func(i *identity.Issuer) { i.Audience, i.MaxAge, i.Replay = "hallmark", time.Minute, "once" }), ""},
		{"client id of persons", change(corp, func(i *identity.Issuer) { i.Audience = "hallmark" }), ""},
		{"shared audience and age", change(ci, func(i *identity.Issuer) {
			i.Audience, i.MaxAge, i.Replay = "api://AzureADTokenExchange", 5*time.Minute, "once"
		}), ""},
		{"template", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/{repository}/-/{sub}" }), ""},

		{"no name", change(ci, func(i *identity.Issuer) { i.Name = "" }), "name:"},
		{"name", change(ci, func(i *identity.Issuer) { i.Name = "C I" }), "name:"},
		{"kind", change(ci, func(i *identity.Issuer) { i.Kind = "robot" }), "kind:"},
		{"the service's own kind", change(ci, func(i *identity.Issuer) { i.Kind = attest.Service }), "kind:"},
		{"provider", change(ci, func(i *identity.Issuer) { i.Provider = "gitlub" }), "provider:"},
		{"no provider", change(ci, func(i *identity.Issuer) { i.Provider = "" }), "provider:"},
		{"one name twice", []identity.Issuer{ci, func() identity.Issuer { i := corp; i.Name = "ci"; return i }()}, "twice"},
		{"B06 one issuer twice", []identity.Issuer{ci, func() identity.Issuer { i := ci; i.Name = "ci2"; return i }()}, "twice"},
		{"B06 one issuer twice, with slash", []identity.Issuer{ci, func() identity.Issuer { i := ci; i.Name, i.Issuer = "ci2", ci.Issuer+"/"; return i }()}, "twice"},

		{"A10 no issuer", change(ci, func(i *identity.Issuer) { i.Issuer = "" }), "issuer:"},
		{"A10 wildcard host", change(ci, func(i *identity.Issuer) { i.Issuer = "https://*.example.com" }), "pattern"},
		{"A10 wildcard path", change(ci, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com/*" }), "pattern"},
		{"A10 expression", change(ci, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com/(a|b)" }), "pattern"},
		{"A10 anchored expression", change(ci, func(i *identity.Issuer) { i.Issuer = "^https://ci.example.com$" }), "issuer:"},
		{"A10 character class", change(ci, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com/[a-z]" }), "pattern"},
		{"A10 query", change(ci, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com/?a" }), "query"},
		{"A10 empty query", change(ci, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com/?" }), "query"},
		{"A10 fragment", change(ci, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com/#" }), "fragment"},
		{"A10 user", change(ci, func(i *identity.Issuer) { i.Issuer = "https://a@ci.example.com" }), "user"},
		{"A10 upper case", change(ci, func(i *identity.Issuer) { i.Issuer = "https://CI.example.com" }), "canonical"},
		{"A10 scheme in upper case", change(ci, func(i *identity.Issuer) { i.Issuer = "HTTPS://ci.example.com" }), "canonical"},
		{"plain HTTP", change(ci, func(i *identity.Issuer) { i.Issuer = "http://ci.example.com" }), "https"},
		{"plain HTTP, allowed, not loopback", change(ci, func(i *identity.Issuer) { i.Issuer, i.PlainHTTP = "http://ci.example.com", true }), "https"},
		{"plain HTTP for keys alone", change(ci, func(i *identity.Issuer) { i.JWKSURI, i.PlainHTTP = "http://127.0.0.1/keys", true }), "plain_http:"},
		{"plain HTTP on loopback, not allowed", change(ci, func(i *identity.Issuer) { i.Issuer = "http://127.0.0.1:80" }), "plain_http"},
		{"name that only starts like loopback", change(ci, func(i *identity.Issuer) { i.Issuer, i.PlainHTTP = "http://127.0.0.1.evil.example", true }), "https"},
		{"keys without TLS", change(ci, func(i *identity.Issuer) { i.JWKSURI = "http://ci.example.com/keys" }), "jwks_uri:"},
		{"keys in a file", change(ci, func(i *identity.Issuer) { i.JWKSURI = "file:///keys" }), "jwks_uri:"},
		{"no CA file", change(ci, func(i *identity.Issuer) { i.CAFile = noPEM + ".none" }), "ca_file:"},
		{"CA file without certificate", change(ci, func(i *identity.Issuer) { i.CAFile = noPEM }), "ca_file:"},

		{"A01 none", change(ci, func(i *identity.Issuer) { i.Algorithms = []string{"none"} }), "algorithms:"},
		{"A02 HMAC", change(ci, func(i *identity.Issuer) { i.Algorithms = []string{"RS256", "HS256"} }), "algorithms:"},
		{"A01 other case", change(ci, func(i *identity.Issuer) { i.Algorithms = []string{"rs256"} }), "algorithms:"},
		{"A15 endless tokens", change(ci, func(i *identity.Issuer) { i.MaxLifetime = 25 * time.Hour }), "max_lifetime:"},
		{"A15 negative life", change(ci, func(i *identity.Issuer) { i.MaxLifetime = -time.Hour }), "max_lifetime:"},
		{"A15 negative age", change(ci, func(i *identity.Issuer) { i.MaxAge = -1 }), "max_age:"},
		{"A14 shared audience", change(ci, func(i *identity.Issuer) { i.Audience = "sts.amazonaws.com" }), "audience:"},
		{"A14 shared audience, long age", change(ci, func(i *identity.Issuer) { i.Audience, i.MaxAge = "sigstore", time.Hour }), "max_age"},
		{"A14 shared audience of persons", change(corp, func(i *identity.Issuer) { i.Audience = "sigstore" }), "max_age"},
		{"A14 audience of an organization", change(ci, func(i *identity.Issuer) { i.Audience = "0d8b1f7c-3f8e-4d0a-9f0e-2b6f0c6a7e11" }), "max_age"},
		{"A14 audience of a workspace", change(ci, func(i *identity.Issuer) {
			i.Audience, i.MaxAge = "ari:cloud:bitbucket::workspace/2f9e8d7c-6b5a-4493-8271-605f4e3d2c1b", time.Minute
		}), "replay: once"},
		{"A14 another service's URL", change(ci, func(i *identity.Issuer) { i.Audience = "https://vault.example.com" }), "max_age"},
		{"A14 URL that only starts like ours", change(ci, func(i *identity.Issuer) { i.Audience = service + ".evil.example" }), "max_age"},
		{"A14 audience with newline", change(ci, func(i *identity.Issuer) { i.Audience = "a\nb" }), "audience:"},

		{"B03 public GitHub without owners", change(github, func(i *identity.Issuer) { i.Owners = nil }), "owners:"},
		{"B03 owner by name", change(github, func(i *identity.Issuer) { i.Owners = []string{"acme"} }), "owners:"},
		{"B03 empty owner", change(github, func(i *identity.Issuer) { i.Owners = []string{""} }), "owners:"},
		{"B03 public CI without owners", change(ci, func(i *identity.Issuer) { i.Issuer = "https://oidc.codefresh.io" }), "owners:"},
		{"B03 public CI without owners, with slash", change(ci, func(i *identity.Issuer) { i.Issuer = "https://oidc.codefresh.io/" }), "owners:"},
		{"B03 owners that nothing checks", change(ci, func(i *identity.Issuer) { i.Owners = []string{"1"}; delete(i.Claims, "owner_id") }), "owners:"},
		{"owners of persons", change(corp, func(i *identity.Issuer) { i.Owners = []string{"1"}; i.Claims["owner_id"] = "org" }), "claims: owner_id:"},
		{"owners of persons, unmapped", change(corp, func(i *identity.Issuer) { i.Owners = []string{"1"} }), "owners:"},
		{"public GitHub as generic", change(github, func(i *identity.Issuer) {
			i.Provider, i.Claims = "generic", map[string]string{"owner_id": "repository_owner_id"}
		}), "provider:"},
		{"enterprise GitHub as generic", change(ci, func(i *identity.Issuer) { i.Issuer = github.Issuer + "/acme" }), "provider:"},
		{"GitHub persons", change(github, func(i *identity.Issuer) { i.Kind = attest.Person }), "kind:"},
		{"GitHub with mapping", change(github, func(i *identity.Issuer) { i.Claims = map[string]string{"commit": "x"} }), "claims:"},
		{"GitHub with template", change(github, func(i *identity.Issuer) { i.SAN = "https://x.example.com/{sub}" }), "san:"},
		{"GitHub for another server", change(github, func(i *identity.Issuer) { i.ServerURL = "https://git.example.com" }), "server_url:"},
		{"other server as GitHub", change(github, func(i *identity.Issuer) { i.Issuer, i.ServerURL = "https://git.example.com/t", "https://github.com" }), "server_url:"},
		{"other server without URL", change(github, func(i *identity.Issuer) { i.Issuer = "https://git.example.com/t" }), "server_url:"},
		{"server without TLS", change(github, func(i *identity.Issuer) {
			i.Issuer, i.ServerURL = "https://git.example.com/t", "http://git.example.com"
		}), "server_url:"},
		{"server URL that nothing uses", change(corp, func(i *identity.Issuer) { i.ServerURL = "https://git.example.com" }), "server_url:"},
		{"server URL beside a source", change(ci, func(i *identity.Issuer) { i.ServerURL = "https://git.example.com"; i.Claims["source_uri"] = "src" }), "server_url:"},

		{"GHES without URL", change(github, func(i *identity.Issuer) { i.Issuer = "https://git.example.com/_services/token"; i.Owners = nil }), ""},
		{"GHE.com", change(github, func(i *identity.Issuer) { i.Issuer = "https://token.actions.octocorp.ghe.com" }), ""},
		{"GHES for another server", change(github, func(i *identity.Issuer) {
			i.Issuer, i.ServerURL = "https://git.example.com/_services/token", "https://git2.example.com"
		}), "server_url:"},
		{"GHE.com for another tenant", change(github, func(i *identity.Issuer) {
			i.Issuer, i.ServerURL = "https://token.actions.octocorp.ghe.com", "https://acme.ghe.com"
		}), "server_url:"},
		{"A10 deeper than an enterprise", change(github, func(i *identity.Issuer) { i.Issuer += "/acme/x"; i.ServerURL = "https://github.com" }), "server_url:"},
		{"A10 GHE.com of two labels", change(github, func(i *identity.Issuer) { i.Issuer = "https://token.actions.a.b.ghe.com" }), "server_url:"},
		{"GHE.com as generic", change(ci, func(i *identity.Issuer) { i.Issuer = "https://token.actions.octocorp.ghe.com" }), "provider:"},
		{"other server as gitlab.com", change(github, func(i *identity.Issuer) { i.Issuer, i.ServerURL = "https://git.example.com/t", "https://gitlab.com" }), "server_url:"},

		{"reusable workflow", change(github, func(i *identity.Issuer) { i.ReusableWorkflows = []identity.ReusableWorkflow{reusable} }), ""},
		{"B04 reusable workflow of generic", change(ci, func(i *identity.Issuer) { i.ReusableWorkflows = []identity.ReusableWorkflow{reusable} }), "reusable_workflows:"},
		{"B04 reusable workflow of gitlab", change(gitlab, func(i *identity.Issuer) { i.ReusableWorkflows = []identity.ReusableWorkflow{reusable} }), "reusable_workflows:"},
		{"B04 reusable workflow without commits", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: reusable.Workflow}}
		}), "commits:"},
		{"B04 reusable workflow at a tag", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: reusable.Workflow, Commits: []string{"v1"}}}
		}), "commits:"},
		{"B04 reusable workflow at a short commit", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: reusable.Workflow, Commits: []string{commit[:12]}}}
		}), "commits:"},
		{"B04 reusable workflow with its ref", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: reusable.Workflow + "@refs/tags/v1", Commits: reusable.Commits}}
		}), "workflow:"},
		{"B11 pattern of reusable workflows", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: "acme/pipelines/.github/workflows/*", Commits: reusable.Commits}}
		}), "workflow:"},
		{"B11 repository for a reusable workflow", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: "acme/pipelines", Commits: reusable.Commits}}
		}), "workflow:"},
		{"B10 inputs of another word", change(github, func(i *identity.Issuer) {
			i.ReusableWorkflows = []identity.ReusableWorkflow{{Workflow: reusable.Workflow, Commits: reusable.Commits, Inputs: "some"}}
		}), "inputs:"},
		{"reusable workflow twice", change(github, func(i *identity.Issuer) { i.ReusableWorkflows = []identity.ReusableWorkflow{reusable, reusable} }), "twice"},

		{"gitlab", []identity.Issuer{gitlab}, ""},
		{"gitlab, self-managed", change(gitlab, func(i *identity.Issuer) { i.Issuer, i.Owners = "https://git.example.com", nil }), ""},
		{"B03 gitlab.com without owners", change(gitlab, func(i *identity.Issuer) { i.Owners = nil }), "owners:"},
		{"B03 GitLab owner by name", change(gitlab, func(i *identity.Issuer) { i.Owners = []string{"acme"} }), "owners:"},
		{"gitlab.com as generic", change(ci, func(i *identity.Issuer) { i.Issuer = "https://gitlab.com" }), "provider:"},
		{"gitlab.com as github", change(github, func(i *identity.Issuer) { i.Issuer = "https://gitlab.com" }), "provider:"},
		{"public GitHub as gitlab", change(gitlab, func(i *identity.Issuer) { i.Issuer = github.Issuer }), "provider:"},
		{"gitlab.com for another server", change(gitlab, func(i *identity.Issuer) { i.ServerURL = "https://git.example.com" }), "server_url:"},
		{"other server as gitlab.com, by gitlab", change(gitlab, func(i *identity.Issuer) { i.Issuer, i.ServerURL = "https://git.example.com", "https://gitlab.com" }), "server_url:"},
		{"GitLab speaks for GitHub", change(gitlab, func(i *identity.Issuer) { i.Issuer, i.ServerURL = "https://git.example.com", "https://github.com" }), "server_url:"},
		{"GitLab persons", change(gitlab, func(i *identity.Issuer) { i.Kind = attest.Person; i.Owners = nil }), "kind:"},
		{"GitLab with mapping", change(gitlab, func(i *identity.Issuer) { i.Claims = map[string]string{"commit": "x"} }), "claims:"},
		{"GitLab with template", change(gitlab, func(i *identity.Issuer) { i.SAN = "https://x.example.com/{sub}" }), "san:"},
		{"B10 GitLab with requirements", change(gitlab, func(i *identity.Issuer) { i.Require = map[string][]string{"ref_protected": {"true"}} }), "require:"},
		{"B10 GitLab with events", change(gitlab, func(i *identity.Issuer) { i.Events = []string{"push"} }), "events:"},

		{"buildkite", []identity.Issuer{kite}, ""},
		{"B03 Buildkite without owners", change(kite, func(i *identity.Issuer) { i.Owners = nil }), "owners:"},
		{"B03 Buildkite owner by slug", change(kite, func(i *identity.Issuer) { i.Owners = []string{"acme-inc"} }), "owners:"},
		{"Buildkite without pipelines", change(kite, func(i *identity.Issuer) { i.Pipelines = nil }), "pipelines:"},
		{"B03 pipeline by slug", change(kite, func(i *identity.Issuer) {
			i.Pipelines = map[string]identity.Pipeline{"app": {Repository: "https://github.com/acme/api"}}
		}), "UUID"},
		{"pipeline without repository", change(kite, func(i *identity.Issuer) { i.Pipelines = map[string]identity.Pipeline{organization: {}} }), "repository:"},
		{"pipeline of a host", change(kite, func(i *identity.Issuer) {
			i.Pipelines = map[string]identity.Pipeline{organization: {Repository: "https://github.com"}}
		}), "repository:"},
		{"pipeline with slash at the end", change(kite, func(i *identity.Issuer) {
			i.Pipelines = map[string]identity.Pipeline{organization: {Repository: "https://github.com/acme/api/"}}
		}), "repository:"},
		{"pipeline over ssh", change(kite, func(i *identity.Issuer) {
			i.Pipelines = map[string]identity.Pipeline{organization: {Repository: "git@github.com:acme/api.git"}}
		}), "repository:"},
		{"pipelines of github", change(github, func(i *identity.Issuer) { i.Pipelines = kite.Pipelines }), "pipelines:"},
		{"Buildkite as generic", change(ci, func(i *identity.Issuer) { i.Issuer = "https://agent.buildkite.com" }), "provider:"},
		{"Buildkite for another server", change(kite, func(i *identity.Issuer) { i.ServerURL = "https://ci.example.com" }), "server_url:"},
		{"another server as Buildkite", change(kite, func(i *identity.Issuer) { i.Issuer, i.ServerURL = "https://ci.example.com", "https://buildkite.com" }), "server_url:"},
		{"another Buildkite without URL", change(kite, func(i *identity.Issuer) { i.Issuer = "https://ci.example.com" }), "server_url:"},
		{"Buildkite persons", change(kite, func(i *identity.Issuer) { i.Kind = attest.Person; i.Owners = nil }), "kind:"},

		{"replay job", change(github, func(i *identity.Issuer) { i.Replay = "job" }), ""},
		{"replay once", change(github, func(i *identity.Issuer) { i.Replay = "once" }), ""},
		{"B13 replay of another word", change(github, func(i *identity.Issuer) { i.Replay = "never" }), "replay:"},
		{"B13 replay of persons", change(corp, func(i *identity.Issuer) { i.Replay = "once" }), "replay:"},
		{"B13 shared audience for any use", change(ci, func(i *identity.Issuer) { i.Audience, i.MaxAge = "api://AzureADTokenExchange", time.Minute }), "replay: once"},
		{"B13 shared audience for a job", change(ci, func(i *identity.Issuer) { i.Audience, i.MaxAge, i.Replay = "sigstore", time.Minute, "job" }), "replay: once"},

		{"requirement", change(ci, func(i *identity.Issuer) { i.Require = map[string][]string{"oidc.circleci.com/ssh-rerun": {"false"}} }), ""},
		{"A23 requirement of nothing", change(ci, func(i *identity.Issuer) { i.Require = map[string][]string{"x": nil} }), "require: x:"},
		{"A23 requirement of the empty text", change(ci, func(i *identity.Issuer) { i.Require = map[string][]string{"x": {""}} }), "require: x:"},
		{"A23 requirement of no claim", change(ci, func(i *identity.Issuer) { i.Require = map[string][]string{"": {"x"}} }), "require:"},
		{"B10 events that nothing maps", change(ci, func(i *identity.Issuer) { i.Events = []string{"push"} }), "events:"},
		{"B10 events of persons", change(corp, func(i *identity.Issuer) { i.Events = []string{"push"} }), "events:"},
		{"mapping by template", change(ci, func(i *identity.Issuer) {
			i.Claims["ref"], i.Claims["run_uri"] = "refs/heads/{b}", "https://ci.example.com/{a/b.c}/{d}"
		}), ""},
		{"mapping with an open brace", change(ci, func(i *identity.Issuer) { i.Claims["ref"] = "refs/heads/{b" }), "claims: ref:"},
		{"mapping with an empty brace", change(ci, func(i *identity.Issuer) { i.Claims["ref"] = "refs/heads/{}" }), "claims: ref:"},
		{"mapping with nested braces", change(ci, func(i *identity.Issuer) { i.Claims["ref"] = "refs/heads/{{b}}" }), "claims: ref:"},
		{"B12 mapping of two into a text", change(ci, func(i *identity.Issuer) { i.Claims["ref"] = "refs/{a}/{b}" }), "claims: ref:"},
		{"B12 mapping of two into a segment", change(ci, func(i *identity.Issuer) { i.Claims["run_uri"] = "https://ci.example.com/{a}-{b}" }), "claims: run_uri:"},
		{"mapping into a URI without TLS", change(ci, func(i *identity.Issuer) { i.Claims["run_uri"] = "http://{a}" }), "claims: run_uri:"},
		{"mapping into a fragment", change(ci, func(i *identity.Issuer) { i.Claims["run_uri"] = "https://ci.example.com/{a}#{b}" }), "claims: run_uri:"},
		{"mapping of the scheme", change(ci, func(i *identity.Issuer) { i.Claims["run_uri"] = "{a}://x" }), "claims: run_uri:"},
		{"mapping into groups", change(corp, func(i *identity.Issuer) { i.Claims["groups"] = "g-{a}" }), "claims: groups:"},

		{"B10 unknown field", change(ci, func(i *identity.Issuer) { i.Claims["comit"] = "sha" }), `"comit"`},
		{"B10 Go name of a field", change(ci, func(i *identity.Issuer) { i.Claims["Commit"] = "sha" }), `"Commit"`},
		{"A23 empty claim name", change(ci, func(i *identity.Issuer) { i.Claims["commit"] = "" }), "commit"},
		{"build of a person", change(corp, func(i *identity.Issuer) { i.Claims["commit"] = "sha" }), "commit"},
		{"template of a person", change(corp, func(i *identity.Issuer) { i.SAN = "https://sso.example.com/{sub}" }), "san:"},
		{"template without field", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/all" }), "san:"},
		{"template of an unmapped field", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/{commit}" }), "{commit}"},
		{"template of groups", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/{groups}"; i.Claims["groups"] = "g" }), "{groups}"},
		{"template of the host", change(ci, func(i *identity.Issuer) { i.SAN = "https://{repository}/x" }), "san:"},
		{"template of part of the host", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.{repository}.com/{sub}" }), "san:"},
		{"template of two in a segment", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/{repository}@{sub}" }), "san:"},
		{"template in the query", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/?r={repository}" }), "san:"},
		{"template without TLS", change(ci, func(i *identity.Issuer) { i.SAN = "http://ci.example.com/{repository}" }), "san:"},
		{"template with a broken field", change(ci, func(i *identity.Issuer) { i.SAN = "https://ci.example.com/{repository}/{Sub}" }), "san:"},
		{"template that names our people", change(ci, func(i *identity.Issuer) { i.SAN = service + "/people/{sub}" }), "san:"},
	} {
		t.Run(row.name, func(t *testing.T) {
			a, err := identity.New(identity.Config{Audience: service, Issuers: row.issuers})
			if row.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if attest.ReasonOf(err) != attest.BadConfig || a != nil || !strings.Contains(err.Error(), row.want) {
				t.Fatalf("New: %v: want %s naming %q", err, attest.BadConfig, row.want)
			}
			if n := len(row.issuers) - 1; !strings.Contains(err.Error(), row.issuers[n].Name) {
				t.Fatalf("the error does not name the issuer: %v", err)
			}
		})
	}
	for _, audience := range []string{"", "two words", "a\nb", " "} {
		if _, err := identity.New(identity.Config{Audience: audience}); attest.ReasonOf(err) != attest.BadConfig {
			t.Errorf("A14 audience %q: %v, want %s", audience, err, attest.BadConfig)
		}
	}
}

// What the caller changes after New changes nothing.
func TestConfigIsCopied(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	conf := gitHubIssuer(i)
	conf.Algorithms = []string{"RS256"}
	a := newAuth(t, c, conf)
	conf.Owners[0], conf.Algorithms[0] = "1", "ES256"
	accepted(t, a, mint(t, i, job(nil)))

	mapped := identity.Issuer{Name: "ci", Provider: "generic", Issuer: i.URL(), PlainHTTP: true, Claims: map[string]string{"commit": "sha"}}
	a = newAuth(t, c, mapped)
	mapped.Claims["commit"] = "workflow"
	if id := accepted(t, a, mint(t, i, job(nil))); id.Build.Commit != commit {
		t.Fatalf("commit %q: the mapping changed", id.Build.Commit)
	}
}

func TestNobodyIsKnown(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	refused(t, newAuth(t, c), mint(t, i, job(nil)), attest.IssuerNotAllowed)
}

func TestPerson(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	a := newAuth(t, c, identity.Issuer{
		Name: "corp", Provider: "generic", Kind: attest.Person, Issuer: i.URL(), PlainHTTP: true, Claims: map[string]string{"groups": "roles"},
	})
	person := func(changes map[string]any) map[string]any {
		all := map[string]any{"sub": "a-1", "aud": []string{service}, "jti": "x", "nbf": nil, "roles": []string{"release", "audit"}, "email": "a@example.com"}
		maps.Copy(all, changes)
		return all
	}
	got := accepted(t, a, mint(t, i, person(map[string]any{"exp": c.Now().Add(12 * time.Hour).Unix()})))
	want := attest.Identity{
		IssuerName: "corp", Provider: "generic", Kind: attest.Person, Issuer: i.URL(), Subject: "a-1",
		TokenID: got.TokenID, Expires: c.Now().Add(12 * time.Hour), Groups: []string{"release", "audit"},
	}
	want.SAN = service + "/people/" + want.Key()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("identity (-want +got):\n%s", diff)
	}
	refused(t, a, mint(t, i, person(map[string]any{"exp": c.Now().Add(12*time.Hour + time.Second).Unix()})), attest.TokenLifetime)
	for _, row := range []struct {
		name  string
		value any
		want  []string
		deny  bool
	}{
		{"one text is one group", "release audit,x", []string{"release audit,x"}, false},
		{"none", nil, nil, false},
		{"null", json.RawMessage("null"), nil, false},
		{"empty list", []string{}, []string{}, false},
		{"A23 empty group", []string{"release", ""}, nil, true},
		{"A23 empty text", "", nil, true},
		{"A21 number", []any{"release", 7}, nil, true},
		{"A21 number alone", 7, nil, true},
		{"object", map[string]any{"release": true}, nil, true},
		{"J04 control character", []string{"release\n"}, nil, true},
		{"A12 too many", strings.Split(strings.Repeat("g,", 1000)+"g", ","), nil, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			token := mint(t, i, person(map[string]any{"roles": row.value}))
			if row.deny {
				refused(t, a, token, attest.TokenClaims)
				return
			}
			if diff := cmp.Diff(row.want, accepted(t, a, token).Groups); diff != "" {
				t.Fatalf("groups (-want +got):\n%s", diff)
			}
		})
	}
}

// A GitLab-like issuer, by mapping alone.
func TestGeneric(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	conf := identity.Issuer{
		Name: "gitlab", Provider: "generic", Issuer: i.URL(), PlainHTTP: true, Owners: []string{"77"},
		ServerURL: "https://gitlab.example.com", SAN: "https://gitlab.example.com/{repository}",
		Claims: map[string]string{
			"repository": "project_path", "repository_id": "project_id", "owner_id": "namespace_id", "commit": "sha", "ref": "ref_path",
			"event": "pipeline_source", "run_id": "pipeline_id", "config_uri": "ci_config_ref_uri", "config_digest": "ci_config_sha", "runner": "runner_environment",
		},
	}
	a := newAuth(t, c, conf)
	claims := func(changes map[string]any) map[string]any {
		all := map[string]any{
			"sub": "project_path:group/sub/app:ref:main", "aud": service, "project_path": "group/sub/app", "project_id": 42, "namespace_id": "77",
			"sha": commit, "ref_path": ref, "pipeline_source": "push", "pipeline_id": json.Number("9007199254740993"),
			"ci_config_ref_uri": nil, "ci_config_sha": json.RawMessage("null"), "runner_environment": "self-hosted", "ref_protected": "true",
		}
		maps.Copy(all, changes)
		return all
	}
	got := accepted(t, a, mint(t, i, claims(nil)))
	want := attest.Identity{
		IssuerName: "gitlab", Provider: "generic", Kind: attest.Workload, Issuer: i.URL(), Subject: "project_path:group/sub/app:ref:main",
		SAN: "https://gitlab.example.com/group/sub/app", TokenID: got.TokenID, Expires: c.Now().Add(5 * time.Minute),
		Build: attest.Build{
			SourceURI: "https://gitlab.example.com/group/sub/app", Repository: "group/sub/app", RepositoryID: "42", OwnerID: "77",
			Commit: commit, Ref: ref, Event: "push", RunID: "9007199254740993", Runner: "self-hosted",
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("identity (-want +got):\n%s", diff)
	}
	for _, row := range []struct {
		name  string
		claim string
		value any
		want  attest.Reason
	}{
		{"B03 other owner", "namespace_id", "78", attest.OwnerNotAllowed},
		{"A23 no owner", "namespace_id", nil, attest.OwnerNotAllowed},
		{"A23 empty owner", "namespace_id", "", attest.OwnerNotAllowed},
		{"A21 float", "project_id", json.RawMessage("4.2e1"), attest.TokenClaims},
		{"A21 fraction", "project_id", json.RawMessage("42.0"), attest.TokenClaims},
		{"J05 too large", "pipeline_id", json.RawMessage("99999999999999999999"), attest.TokenClaims},
		{"list for a text", "pipeline_source", []string{"push"}, attest.TokenClaims},
		{"A23 no repository to be named by", "project_path", nil, attest.TokenClaims},
		{"B12 parent", "project_path", "group/../evil", attest.TokenClaims},
		{"B12 absolute", "project_path", "/group/app", attest.TokenClaims},
		{"J04 control character", "pipeline_source", "push\x7f", attest.TokenClaims},
		{"B05 fork", "job_project_id", 43, attest.SourceNotAllowed},
		{"B05 fork, as text", "job_project_id", "43", attest.SourceNotAllowed},
		{"B05 fork, as object", "job_project_id", map[string]any{}, attest.TokenClaims},
	} {
		t.Run(row.name, func(t *testing.T) {
			refused(t, a, mint(t, i, claims(map[string]any{row.claim: row.value})), row.want)
		})
	}
	conf.SAN = ""
	unnamed := newAuth(t, c, conf)
	refused(t, unnamed, mint(t, i, claims(map[string]any{"project_path": "group/../evil"})), attest.TokenClaims)
	if id := accepted(t, unnamed, mint(t, i, claims(map[string]any{"project_path": nil}))); id.Build.SourceURI != "" {
		t.Errorf("source %q of no repository", id.Build.SourceURI)
	}
	t.Run("own project", func(t *testing.T) {
		accepted(t, a, mint(t, i, claims(map[string]any{"job_project_id": "42"})))
	})
	for _, bad := range []any{"HEAD", commit[:39], strings.ToUpper(commit), "", nil} {
		if id := accepted(t, a, mint(t, i, claims(map[string]any{"sha": bad}))); id.Build.Commit != "" {
			t.Errorf("B09 commit %v became %q", bad, id.Build.Commit)
		}
	}
}

func TestGenericURIs(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, identity.Issuer{
		Name: "ci", Provider: "generic", Issuer: i.URL(), PlainHTTP: true,
		Claims: map[string]string{"source_uri": "src", "run_uri": "run", "owner_uri": "own", "environment": "dry"},
	})
	good := map[string]any{"sub": "s", "aud": service, "src": "https://git.example.com/a/b", "run": "https://ci.example.com/1", "dry": true}
	id := accepted(t, a, mint(t, i, good))
	if id.Build.SourceURI != good["src"] || id.Run() != good["run"] || id.Build.Environment != "true" {
		t.Fatalf("build %+v", id.Build)
	}
	for _, claim := range []string{"src", "run", "own"} {
		for _, bad := range []string{"git.example.com/a/b", "//git.example.com/a", "https://user:secret@git.example.com/a", "https://%zz"} {
			changed := maps.Clone(good)
			changed[claim] = bad
			refused(t, a, mint(t, i, changed), attest.TokenClaims)
		}
	}
}

// B12: no two subjects or repositories share a SAN, and each SAN is a URI as
// certificates print it.
func TestB12SAN(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	name := func(template string, claims map[string]any) (string, error) {
		a := newAuth(t, c, identity.Issuer{
			Name: "ci", Provider: "generic", Issuer: i.URL(), PlainHTTP: true, SAN: template,
			Claims: map[string]string{"repository": "repo", "environment": "env"},
		})
		all := map[string]any{"sub": "s", "aud": service}
		maps.Copy(all, claims)
		id, err := a.Authenticate(t.Context(), mint(t, i, all))
		if err == nil {
			if u, perr := url.Parse(id.SAN); perr != nil || u.String() != id.SAN || u.Host == "" {
				t.Errorf("SAN %q is not a URI that prints as itself", id.SAN)
			}
		}
		return id.SAN, err
	}
	const one, two = "https://ci.example.com/{repository}", "https://ci.example.com/{repository}/-/{environment}"
	for _, row := range []struct {
		name, template string
		claims         map[string]any
		want           string // "" is refused
	}{
		{"subject", "", map[string]any{"sub": "job:a/b c?d#e%2f"}, i.URL() + "/sub/job:a%2Fb%20c%3Fd%23e%252f"},
		{"subject in other letters", "", map[string]any{"sub": "jöb"}, i.URL() + "/sub/j%C3%B6b"},
		{"subject dot dot", "", map[string]any{"sub": ".."}, ""},
		{"one field keeps slashes", one, map[string]any{"repo": "a/b"}, "https://ci.example.com/a/b"},
		{"one field escapes", one, map[string]any{"repo": "a%2Fb"}, "https://ci.example.com/a%252Fb"},
		{"one field, query", one, map[string]any{"repo": "a?b#c"}, "https://ci.example.com/a%3Fb%23c"},
		{"two fields", two, map[string]any{"repo": "a/-/b", "env": "c"}, "https://ci.example.com/a%2F-%2Fb/-/c"},
		{"two fields, otherwise cut", two, map[string]any{"repo": "a", "env": "b/-/c"}, "https://ci.example.com/a/-/b%2F-%2Fc"},
		{"A23 empty", one, map[string]any{"repo": ""}, ""},
		{"A23 missing", two, map[string]any{"repo": "a"}, ""},
		{"parent", one, map[string]any{"repo": "a/../b"}, ""},
		{"parent of two", two, map[string]any{"repo": "..", "env": "b"}, ""},
		{"double slash", one, map[string]any{"repo": "a//b"}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := name(row.template, row.claims)
			if row.want == "" && attest.ReasonOf(err) != attest.TokenClaims {
				t.Fatalf("SAN %q, %v: want %s", got, err, attest.TokenClaims)
			}
			if row.want != "" && got != row.want {
				t.Fatalf("SAN %q, %v: want %q", got, err, row.want)
			}
		})
	}
}

// The workflow's file name may hold what a URI must escape: the SAN is then as
// certificates print it.
func TestGitHubSANIsPrintedForm(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	const file = "acme/api/.github/workflows/my release.yml@refs/heads/fü"
	id := accepted(t, a, mint(t, i, job(map[string]any{"job_workflow_ref": file})))
	const want = "https://github.com/acme/api/.github/workflows/my%20release.yml@refs/heads/f%C3%BC"
	if id.SAN != want || id.Build.SignerURI != "https://github.com/"+file {
		t.Fatalf("SAN %q, signer %q", id.SAN, id.Build.SignerURI)
	}
}
