package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/policy"
)

const (
	api     attest.Repository = "registry.example.com/payments/api"
	billing attest.Repository = "registry.example.com/billing/api"
)

// job is a hosted GitHub job of acme/api that the policy admits; with changes
// it.
func job(with ...func(*attest.Identity)) attest.Identity {
	id := attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload, Issuer: gitHubURL,
		Subject: "repo:acme/api:ref:refs/heads/main", TokenID: "job", Expires: today.AddDate(10, 0, 0),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", RepositoryID: "1296269",
			OwnerURI: "https://github.com/acme", OwnerID: "9919", Visibility: "private",
			Commit: strings.Repeat("4be1d0c2", 5), Ref: "refs/heads/main", WorkflowPath: ".github/workflows/release.yml",
			Event: "push", RunID: "9912", RunAttempt: "1", Runner: "github-hosted",
		},
	}
	for _, w := range with {
		w(&id)
	}
	b := &id.Build
	b.ConfigURI = b.SourceURI + "/" + b.WorkflowPath + "@" + b.Ref
	b.SignerURI, b.ConfigDigest, b.SignerDigest = b.ConfigURI, b.Commit, b.Commit
	b.RunURI = b.SourceURI + "/actions/runs/" + b.RunID + "/attempts/" + b.RunAttempt
	id.SAN = b.SignerURI
	id.TokenID = attest.Key(id.TokenID, b.RunURI, b.Commit, b.Ref, id.Issuer, b.Runner, b.RepositoryID)
	return id
}

func ref(s string) func(*attest.Identity)   { return func(id *attest.Identity) { id.Build.Ref = s } }
func token(s string) func(*attest.Identity) { return func(id *attest.Identity) { id.TokenID = s } }
func release(id *attest.Identity)           { id.Build.Environment = "release" }
func selfHosted(id *attest.Identity)        { id.Build.Runner = "self-hosted" }

func source(uri, repositoryID string) func(*attest.Identity) {
	return func(id *attest.Identity) {
		id.Build.SourceURI, id.Build.RepositoryID = uri, repositoryID
		id.Build.Repository = strings.TrimPrefix(uri, "https://github.com/")
	}
}

func commit(c string) func(*attest.Identity) {
	return func(id *attest.Identity) { id.Build.Commit = strings.Repeat(c, 40/len(c)) }
}

func person(groups ...string) attest.Identity {
	return attest.Identity{
		IssuerName: "corp", Provider: "generic", Kind: attest.Person, Issuer: "https://sso.example.com",
		Subject: "a-1", SAN: "https://hallmark.example.com/people/x", TokenID: "p", Groups: groups,
	}
}

func TestAllow(t *testing.T) {
	p := mustLoad(t, payments)
	for _, row := range []struct {
		name string
		role policy.Role
		id   attest.Identity
		repo attest.Repository
		want attest.Reason
		text string
	}{
		{"signer", policy.Signers, job(), api, "", ""},
		{"default nobody", policy.Role("approvers"), job(), api, attest.RoleMissing, "does not hold the role approvers"},
		{"C10 repository not covered", policy.Signers, job(), billing, attest.RoleMissing, `does not hold the role signers for registry.example.com/billing/api: nobody does unless the policy says so. Ask for an entry under roles.signers that covers it`},
		{"another issuer's entry", policy.Auditors, job(), api, attest.RoleMissing, "does not hold the role auditors"},
		{"one claim differs", policy.Signers, job(ref("refs/heads/dev")), api, attest.SourceNotAllowed,
			`the role signers for registry.example.com/payments/api wants id.ref == "refs/heads/main" (policy.yaml:4); the token has id.ref = "refs/heads/dev"`},
		{"B11 a longer ref", policy.Signers, job(ref("refs/heads/main-evil")), api, attest.SourceNotAllowed, `id.ref = "refs/heads/main-evil"`},
		{"B12 case", policy.Signers, job(ref("refs/heads/Main")), api, attest.SourceNotAllowed, `id.ref = "refs/heads/Main"`},
		{"A23 claim not there", policy.Promoters, job(), api, attest.SourceNotAllowed, `wants id.environment == "release" (policy.yaml:6); the token has id.environment = absent`},
		{"J04 claim with control characters", policy.Signers, job(ref("refs/heads/\x1b[2Jx")), api, attest.SourceNotAllowed, `id.ref = "refs/heads/\x1b[2Jx"`},
		{"promoter", policy.Promoters, job(release), billing, "", ""},
		{"auditor", policy.Auditors, person("dev", "audit"), billing, "", ""},
		{"not in the group", policy.Auditors, person("dev"), api, attest.SourceNotAllowed, `wants "audit" in id.groups (policy.yaml:8); the token has id.groups = ["dev"]`},
		{"in no group", policy.Auditors, person(), api, attest.SourceNotAllowed, `id.groups = `},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := p.Allow(row.role, row.id, row.repo)
			if attest.ReasonOf(err) != row.want {
				t.Fatalf("%v, want %q", err, row.want)
			}
			if err != nil && !strings.Contains(err.Error(), row.text) {
				t.Errorf("got  %s\nwant %s", err, row.text)
			}
			if grants := p.Grants(row.id); (err == nil) != holds(grants, row.role, row.repo) {
				t.Errorf("Allow says %v, Grants %v", err, grants)
			}
		})
	}
}

func holds(grants []policy.Grant, role policy.Role, repo attest.Repository) bool {
	for _, g := range grants {
		if g.Role == role && g.Covers(repo) {
			return true
		}
	}
	return false
}

// A role may demand that the code host protects the ref; a token that does not say so
// meets no such condition (attacks A23).
func TestAllowProtectedRefs(t *testing.T) {
	p := mustLoad(t, `version: 1
roles:
  signers: [{issuer: github, images: ["registry.example.com/payments/*"], when: "id.ref_protected == 'true'"}]
`)
	for protected, want := range map[string]attest.Reason{"true": "", "false": attest.SourceNotAllowed, "": attest.SourceNotAllowed} {
		id := job(func(id *attest.Identity) { id.Build.RefProtected = protected })
		if got := attest.ReasonOf(p.Allow(policy.Signers, id, api)); got != want {
			t.Errorf("ref_protected %q: %q, want %q", protected, got, want)
		}
	}
}

func TestAllowTellsWantedAndGot(t *testing.T) {
	err := mustLoad(t, payments).Allow(policy.Signers, job(ref("refs/heads/dev")), api)
	e, ok := err.(*attest.Error)
	if !ok {
		t.Fatalf("%v", err)
	}
	want := map[string]string{
		"role":   "signers",
		"wanted": "id.repository_id == '1296269' && id.ref == 'refs/heads/main' && id.workflow_path == '.github/workflows/release.yml' (policy.yaml:4)",
		"got":    `id.repository_id = "1296269", id.ref = "refs/heads/dev", id.workflow_path = ".github/workflows/release.yml"`,
		"claims": `[{"wanted":"id.repository_id == \"1296269\"","got":"id.repository_id = \"1296269\"","met":true},` +
			`{"wanted":"id.ref == \"refs/heads/main\"","got":"id.ref = \"refs/heads/dev\"","met":false},` +
			`{"wanted":"id.workflow_path == \".github/workflows/release.yml\"","got":"id.workflow_path = \".github/workflows/release.yml\"","met":true}]`,
	}
	if d := cmp.Diff(want, e.Metadata); d != "" {
		t.Error(d)
	}
}

// Attesters are of either kind and sign no images; signers are jobs, and none of their
// entries makes an attester: the gate asks for both roles.
func TestAttesters(t *testing.T) {
	p := mustLoad(t, `version: 1
roles:
  signers:
  - {issuer: github, images: ["registry.example.com/payments/*"], when: "id.ref == 'refs/heads/main'"}
  attesters:
  - {issuer: github, images: ["registry.example.com/payments/*"], when: "id.ref == 'refs/heads/scan'"}
  - {issuer: corp, images: ["registry.example.com/payments/*"], when: "'qa' in id.groups"}
`)
	for _, row := range []struct {
		name             string
		id               attest.Identity
		signer, attester attest.Reason
	}{
		{"a signer", job(), "", attest.SourceNotAllowed},
		{"an attester", job(ref("refs/heads/scan")), attest.SourceNotAllowed, ""},
		{"a person", person("qa"), attest.RoleMissing, ""},
		{"another person", person("dev"), attest.RoleMissing, attest.SourceNotAllowed},
	} {
		t.Run(row.name, func(t *testing.T) {
			for role, want := range map[policy.Role]attest.Reason{policy.Signers: row.signer, policy.Attesters: row.attester} {
				if got := attest.ReasonOf(p.Allow(role, row.id, api)); got != want {
					t.Errorf("%s: %q, want %q", role, got, want)
				}
			}
			wantRoleMissing(t, p, row.id)
		})
	}
}

func wantRoleMissing(t *testing.T, p *policy.Policy, id attest.Identity) {
	t.Helper()
	for _, role := range []policy.Role{policy.Signers, policy.Attesters} {
		if got := attest.ReasonOf(p.Allow(role, id, billing)); got != attest.RoleMissing {
			t.Errorf("%s elsewhere: %q", role, got)
		}
	}
}

// Of several entries the nearest is told, and nothing of those for others.
func TestAllowTellsTheNearestEntryOnly(t *testing.T) {
	p := mustLoad(t, `version: 1
roles:
  signers:
  - {issuer: generic, images: ["r.io/a"], when: "id.subject == 'secret-one'"}
  - {issuer: github, images: ["r.io/b"], when: "id.repository_id == 'secret-two'"}
  - {issuer: github, images: ["r.io/a"], when: "id.repository_id == '7' && id.ref == 'refs/heads/main'"}
  - {issuer: github, images: ["r.io/a"], when: "id.repository_id == '1296269' && id.event == 'push' && id.ref == 'refs/heads/release'"}
`)
	err := p.Allow(policy.Signers, job(), "r.io/a")
	if attest.ReasonOf(err) != attest.SourceNotAllowed || !strings.Contains(err.Error(), `wants id.ref == "refs/heads/release" (policy.yaml:7)`) {
		t.Errorf("%v", err)
	}
	if strings.Contains(err.Error(), "secret") || strings.Contains(err.(*attest.Error).Metadata["wanted"], "secret") {
		t.Errorf("tells of another's entry: %v", err)
	}
	if err := p.Allow(policy.Signers, job(), "r.io/c"); strings.Contains(err.Error(), "secret") || attest.ReasonOf(err) != attest.RoleMissing {
		t.Errorf("%v", err)
	}
}

func TestRolesEnd(t *testing.T) {
	entry := func(until string) *policy.Policy {
		return mustLoad(t, "version: 1\nroles: {auditors: [{issuer: corp, images: [\"**\"], when: \"'audit' in id.groups\", until: "+until+"}]}")
	}
	if err := entry("2026-11-20").Allow(policy.Auditors, person("audit"), api); err != nil {
		t.Errorf("on its last day: %v", err)
	}
	err := entry("2026-11-19").Allow(policy.Auditors, person("audit"), api)
	if attest.ReasonOf(err) != attest.RoleMissing || !strings.Contains(err.Error(), "ended after 2026-11-19 (policy.yaml:2)") {
		t.Errorf("on the day after: %v", err)
	}
	err = entry("2026-11-19").Allow(policy.Auditors, person("dev"), api)
	if attest.ReasonOf(err) != attest.RoleMissing || strings.Contains(err.Error(), "ended") {
		t.Errorf("tells a stranger of an ended entry: %v", err)
	}
	if g := entry("2026-11-19").Grants(person("audit")); len(g) != 0 {
		t.Errorf("grants of an ended entry: %v", g)
	}
}

func TestGrantsAreTheIssuers(t *testing.T) {
	id := job(release)
	id.IssuerName = "generic"
	if g := mustLoad(t, payments).Grants(id); len(g) != 0 {
		t.Errorf("A06 another issuer's caller with the same claims holds %v", g)
	}
}

func TestAllowAll(t *testing.T) {
	p := mustLoad(t, payments)
	if err := p.AllowAll(policy.Auditors, person("audit")); err != nil {
		t.Error(err)
	}
	if err := p.AllowAll(policy.Auditors, person("dev")); attest.ReasonOf(err) != attest.SourceNotAllowed {
		t.Errorf("%v", err)
	}
	if err := p.AllowAll(policy.Signers, job()); attest.ReasonOf(err) != attest.RoleMissing {
		t.Errorf("a role for some repositories is one for all: %v", err)
	}
}

// An absent claim equals nothing and differs from nothing, however it is asked.
func TestConditionsOnAbsentClaims(t *testing.T) {
	for _, row := range []struct {
		name, when string
		want       bool
	}{
		{"A23 differs", "id.environment != 'dev'", false},
		{"A23 not equal", "!(id.environment == 'dev')", false},
		{"A23 two absent claims", "id.environment == id.actor", false},
		{"A23 not in a list", "!(id.environment in ['dev'])", false},
		{"A23 short", "size(id.environment) == 0", false},
		{"A23 prefix", "!id.environment.startsWith('x')", false},
		{"A23 less", "id.environment < 'x'", false},
		{"A23 conditional", "id.environment == 'x' ? false : true", false},
		{"K05 an error in one of two", "id.environment == 'dev' || id.ref == 'refs/heads/dev'", false},
		{"true beside an error", "id.environment == 'dev' || id.ref == 'refs/heads/main'", true},
		{"asked for", "!has(id.environment) && id.ref == 'refs/heads/main'", true},
		{"asked for and there", "has(id.ref) && id.ref.startsWith('refs/heads/')", true},
		{"B11 whole match", "id.ref.matches('^refs/heads/(?:main|release)$')", true},
		{"K05 index out of range", "id.groups[0] == 'x'", false},
		{"no group", "id.groups.exists(g, g == 'x')", false},
		{"kind", "id.kind == 'workload' && id.issuer == 'github' && id.issuer_url == 'https://token.actions.githubusercontent.com'", true},
		{"everybody", "true", true},
		{"nobody", "false", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := mustLoad(t, role(row.when)).Allow(policy.Signers, job(), "r.io/a")
			if (err == nil) != row.want {
				t.Errorf("%s: %v", row.when, err)
			}
		})
	}
}

// A claim that is larger than any load reckons with runs into the cost limit, and
// that is a no.
func TestConditionsCostLimit(t *testing.T) {
	p := mustLoad(t, "version: 1\nroles: {auditors: [{issuer: corp, images: [\"**\"], when: \"id.groups.all(g, g.matches('^[a-z]*$'))\"}]}")
	if err := p.Allow(policy.Auditors, person("audit"), api); err != nil {
		t.Fatal(err)
	}
	groups := make([]string, 10_000)
	for i := range groups {
		groups[i] = strings.Repeat("a", 100)
	}
	if err := p.Allow(policy.Auditors, person(groups...), api); attest.ReasonOf(err) != attest.SourceNotAllowed {
		t.Errorf("K03 cost: %v", err)
	}
}

// What whoami suggests admits the caller and not its neighbours, whatever the
// claims hold.
func TestWhen(t *testing.T) {
	for _, row := range []struct {
		name string
		id   attest.Identity
		want string
	}{
		{"job", job(), "id.repository_id == '1296269' && id.ref == 'refs/heads/main' && id.workflow_path == '.github/workflows/release.yml'"},
		{"K04 a ref that is code", job(ref(`refs/heads/' || true || '\`)), `id.repository_id == '1296269' && id.ref == 'refs/heads/\' || true || \'\\' && id.workflow_path == '.github/workflows/release.yml'`},
		{"K04 control characters", job(ref("refs/heads/a\n\x7f")), `id.repository_id == '1296269' && id.ref == 'refs/heads/a\x0a\x7f' && id.workflow_path == '.github/workflows/release.yml'`},
		{"no repository id", job(source("https://github.com/acme/api", "")), "id.source == 'https://github.com/acme/api' && id.ref == 'refs/heads/main' && id.workflow_path == '.github/workflows/release.yml'"},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := policy.When(row.id)
			if got != row.want {
				t.Fatalf("got  %s\nwant %s", got, row.want)
			}
			p := mustLoad(t, role(got))
			if err := p.Allow(policy.Signers, row.id, "r.io/a"); err != nil {
				t.Error(err)
			}
			if err := p.Allow(policy.Signers, job(ref("refs/heads/other")), "r.io/a"); err == nil {
				t.Error("admits another ref")
			}
		})
	}
	if got := policy.When(person("x")); got != "id.subject == 'a-1'" {
		t.Errorf("person: %s", got)
	}
}
