package policy_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
	"github.com/hallmarkd/hallmark/policy"
)

var today = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

const gitHubURL = "https://token.actions.githubusercontent.com"

func known() policy.Known {
	return policy.Known{
		Issuers:    map[string]attest.Kind{"github": attest.Workload, "generic": attest.Workload, "corp": attest.Person},
		IssuerURLs: map[string]string{"github": gitHubURL, "generic": "https://ci.example.com", "corp": "https://sso.example.com"},
		Roots:      map[string]bool{"vendor": true, "elsewhere": true},
		Service:    notary.Service,
		Now:        func() time.Time { return today },
	}
}

func load(t testing.TB, text string) (*policy.Policy, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return policy.Load(path, known())
}

func mustLoad(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, err := load(t, text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const payments = `version: 7
roles:
  signers:
  - {issuer: github, images: ["registry.example.com/payments/*"], when: "id.repository_id == '1296269' && id.ref == 'refs/heads/main' && id.workflow_path == '.github/workflows/release.yml'"}
  promoters:
  - {issuer: github, images: ["**"], when: "id.environment == 'release'"}
  auditors:
  - {name: audit, issuer: corp, images: ["**"], when: "'audit' in id.groups", until: 2027-03-31}
tracks:
- name: payments
  images: ["registry.example.com/payments/*"]
  stages:
  - name: test
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == '1296269'"}
    - provenance: {source_id: "1296269", source: "https://github.com/acme/{name}", refs: ["refs/heads/main", "refs/tags/*"], min_level: 2, min_grade: claim}
  - name: staging
    after: test
    rules:
    - base_image: {allowed: ["registry.example.com/base/*"], proof: layers, allow_scratch: false}
  - name: prod
    after: staging
    target: "registry.example.com/prod/{name}:{version}"
    rules:
    - cel: {expr: "provenance.runner == 'github-hosted' && caller.environment == 'release'", message: "only hosted builds, only by the release job"}
`

func TestLoad(t *testing.T) {
	p := mustLoad(t, payments)
	if p.Version() != 7 || p.Text() != payments || p.Digest() != attest.Hash([]byte(payments)) {
		t.Errorf("version %d, digest %s", p.Version(), p.Digest())
	}
	var got []string
	for _, track := range p.Tracks() {
		for _, s := range track.Stages() {
			got = append(got, track.Name+"/"+s.Name+" after "+s.After)
			if p.Stages()[track.Name+"/"+s.Name] != s.Digest() {
				t.Errorf("%s: Stages() and Digest() differ", s.Name)
			}
		}
	}
	if d := cmp.Diff([]string{"payments/test after ", "payments/staging after test", "payments/prod after staging"}, got); d != "" {
		t.Error(d)
	}
}

func TestExampleLoads(t *testing.T) {
	if _, err := policy.Load("../examples/config/policy.yaml", known()); err != nil {
		t.Error(err)
	}
}

// track returns a policy with these stages, which stand from line 5 on.
func track(stages string) string {
	return "version: 1\ntracks:\n- name: t\n  images: [\"r.io/a/*\"]\n  stages:\n" + stages
}

const full = `[{signed_by: {issuer: github, when: "true"}}, {provenance: {source_id: "1"}}]`

// role returns a policy with one signer whose condition is when, on line 3.
func role(when string) string {
	return fmt.Sprintf("version: 1\nroles: {signers: [\n{issuer: github, images: [r.io/a], when: %q}]}", when)
}

// rules returns a policy with one complete stage and one more rule on line 7.
func rules(extra string) string {
	return track("  - {name: s, rules: [{signed_by: {issuer: github, when: \"true\"}}, {provenance: {source_id: \"1\"}},\n    " + extra + "]}\n")
}

// Every fault is told with file, line and what would be right.
func TestLoadRefuses(t *testing.T) {
	for _, row := range []struct{ name, text, want string }{
		{"C06 empty", "", "policy.yaml:1: file is empty"},
		{"not YAML", "version: 1\nroles: [", "policy.yaml:2: not YAML: "},
		{"not a mapping", "- version: 1", "policy.yaml:1: the policy must be a mapping of keys to values, not a list"},
		{"not UTF-8", "version: \xff", "policy.yaml:1: file is not UTF-8 text"},
		{"B10 unknown key", "version: 1\ntrack: []", `policy.yaml:2: unknown key "track" in the policy: did you mean "tracks"?`},
		{"B10 unknown key, nothing near", "version: 1\npeople: []", `policy.yaml:2: unknown key "people" in the policy: known are roles, tracks, version`},
		{"B10 unknown role", "version: 1\nroles: {approvers: []}", `policy.yaml:2: unknown key "approvers" in roles: known are attesters, auditors, importers, promoters, signers`},
		{"B10 case", "Version: 1", `policy.yaml:1: unknown key "Version" in the policy: did you mean "version"?`},
		{"B10 unknown rule", rules("{soak: 24h}"), `policy.yaml:7: unknown key "soak" in a rule: known are base_image, cel, provenance, signed_by`},
		{"B10 unknown setting", rules(`{base_image: {allowed: [r.io/b], max_age: 720h}}`), `policy.yaml:7: unknown key "max_age" in base_image: known are allow_scratch, allowed, attested_by, proof`},
		{"B10 misspelt setting", rules(`{provenance: {source_id: "1", min_levl: 2}}`), `policy.yaml:7: unknown key "min_levl" in provenance: did you mean "min_level"?`},
		{"D03 duplicate key", "version: 1\nversion: 2", `policy.yaml:2: key "version" stands twice in the policy (first on line 1)`},
		{"wrong type", "version: one", `policy.yaml:1: version must be a whole number from 1 to 2147483647, not "one"`},
		{"quoted number", `version: "1"`, `policy.yaml:1: version must be a whole number`},
		{"version 0", "version: 0", `policy.yaml:1: version must be a whole number from 1 to 2147483647, not 0`},
		{"no version", "tracks: []", `policy.yaml:1: the policy has no "version": a number from 1 that rises with every change`},
		{"J03 alias", "version: 1\nroles: &a {}\ntracks: *a", "policy.yaml:2: anchors (&) and aliases (*) are not allowed: write the value out, in quotes if it starts with * or &"},
		{"J03 merge key", "version: 1\nroles:\n  <<: {signers: []}", `policy.yaml:3: unknown key "<<" in roles`},
		{"J03 tag", "version: !!int 1", "policy.yaml:1: tags (!) are not allowed"},
		{"J03 two documents", "version: 1\n---\nversion: 2", "policy.yaml:2: a second document starts here: write one document per file"},
		{"J03 deep", "version: 1\nroles: " + strings.Repeat("[", 20000), "policy.yaml:2: not YAML: "},

		{"unknown issuer", "version: 1\nroles: {signers: [{issuer: jenkins, images: [r.io/a], when: \"true\"}]}", `policy.yaml:2: issuer "jenkins" is not configured: known are corp, generic, github`},
		{"misspelt issuer", "version: 1\nroles: {signers: [{issuer: githb, images: [r.io/a], when: \"true\"}]}", `policy.yaml:2: issuer "githb" is not configured: did you mean "github"?`},
		{"role without issuer", "version: 1\nroles: {signers: [{images: [r.io/a], when: \"true\"}]}", `policy.yaml:2: an entry of signers has no "issuer"`},
		{"role without images", "version: 1\nroles: {signers: [{issuer: github, when: \"true\"}]}", `policy.yaml:2: an entry of signers has no "images"`},
		{"role with no images", "version: 1\nroles: {signers: [{issuer: github, images: [], when: \"true\"}]}", `policy.yaml:2: images is empty`},
		{"role without when", "version: 1\nroles: {promoters: [{issuer: github, images: [r.io/a]}]}", `policy.yaml:2: an entry of promoters has no "when"`},
		{"empty when", role(""), "policy.yaml:3: when is empty"},
		{"blank when", role("  "), "policy.yaml:3: when is empty"},
		{"a person signs", "version: 1\nroles: {signers: [{issuer: corp, images: [r.io/a], when: \"true\"}]}", `policy.yaml:2: issuer "corp" is of kind person: only workloads sign images`},
		{"until", "version: 1\nroles: {auditors: [{issuer: corp, images: [r.io/a], when: \"true\", until: soon}]}", `policy.yaml:2: until must be a day such as 2027-03-31, not "soon"`},
		{"D15 pattern", "version: 1\nroles: {auditors: [{issuer: corp, images: [\"r.io/a*\"], when: \"true\"}]}", `policy.yaml:2: pattern "r.io/a*": a wildcard must be a whole segment, not part of "a*"`},
		{"D15 everything in a track", strings.Replace(track("  - {name: s, rules: "+full+"}"), "r.io/a/*", "**", 1), `policy.yaml:4: pattern "**" must name the registry host: only roles may cover every repository`},

		{"A23 empty text", role("id.environment == ''"), `policy.yaml:3: expression "id.environment == ''": compares with the empty text: an absent claim equals nothing; write has(…) or !has(…) to ask whether it is there`},
		{"A23 empty text in a list", role("id.environment in ['release', '']"), "compares with the empty text"},
		{"A23 empty prefix", role("id.ref.startsWith('')"), "compares with the empty text"},
		{"A23 empty text in a cel rule", rules(`{cel: {expr: "provenance.environment != ''", message: m}}`), "policy.yaml:7: expression \"provenance.environment != ''\": compares with the empty text"},
		{"B10 unknown field", role("id.repo == 'x'"), `policy.yaml:3: expression "id.repo == 'x'": no field "repo": id has actor, actor_id, commit, environment, event, groups, issuer, issuer_url, kind, owner_id, ref, ref_protected, repository, repository_id, run_attempt, run_id, runner, san, signer_uri, source, subject, visibility, workflow_path`},
		{"B10 field that no certificate has", rules(`{signed_by: {issuer: github, when: "id.actor == 'x'"}}`), `policy.yaml:7: expression "id.actor == 'x'": no field "actor": id has commit, environment, event, issuer, issuer_url, owner_id, ref, repository_id, runner, san, signer_uri, source, visibility, workflow_path`},
		{"B10 unknown variable", role("caller.ref == 'x'"), `policy.yaml:3: expression "caller.ref == 'x'": "caller" is not known here: there are the variables id and the functions has, all, exists, in, size, startsWith, endsWith, matches`},
		{"B11 contains", role("id.ref.contains('main')"), `"contains" is not known here`},
		{"B11 unanchored", role("id.ref.matches('refs/heads/main')"), `policy.yaml:3: expression "id.ref.matches('refs/heads/main')": matches("refs/heads/main") would match a part: write ^(?:…)$ around it`},
		{"B11 half anchored", role("id.ref.matches('^a|b$')"), `would match a part`},
		{"B11 computed pattern", role("id.ref.matches(id.commit)"), `matches needs its pattern as a literal`},
		{"bad regular expression", role("id.ref.matches('^($')"), "policy.yaml:3: expression"},
		{"not a bool", role("id.ref"), `policy.yaml:3: expression "id.ref" must be true or false, not string`},
		{"syntax", role("id.ref =="), `policy.yaml:3: expression "id.ref ==": Syntax error`},
		{"types differ", role("id.ref == 1"), `policy.yaml:3: expression "id.ref == 1": found no matching overload`},
		{"K03 dynamic", role("dyn(id).ref == 'x'"), `"dyn" is not known here`},
		{"K03 mixed list", role("[id.ref, 1][0] == 'x'"), `expected type 'string' but found 'int'`},
		{"K03 object", role("policy.CallerVars{ref: 'x'}.ref == 'x'"), "an object cannot be made here"},
		{"K03 whole object", role("[id].exists(x, x.ref == 'a')"), "use a field of id, not the whole"},
		{"K03 null", role("[null].exists(x, x == id.ref)"), "policy.yaml:3: expression"},
		{"K03 field of nothing", role("[][0].ref == 'x'"), "mixes types"},
		{"K03 untyped", role("[][0] == [][0]"), "mixes types: what is compared must have one type that is known"},
		{"K03 nested loops", role("id.groups.all(a, id.groups.all(b, id.groups.all(c, a == b)))"), "comprehension exceeds nesting limit"},
		{"K03 cost", role("id.groups.all(a, id.ref.matches('^(?:[a-z]{1,9}/){1,9}$') && id.source.matches('^(?:[a-z]{1,9}/){1,9}$') && id.commit.matches('^(?:[a-z]{1,9}/){1,9}$') && id.actor.matches('^(?:[a-z]{1,9}/){1,9}$') && a.matches('^(?:[a-z]{1,9}/){1,9}$'))"), `costs too much to evaluate: simplify it`},
		{"K03 large regular expression", role("id.ref.matches('^[a-z]{1,900}[0-9]{1,900}$')"), `is too large`},
		{"K03 too long", role("true" + strings.Repeat(" || true", 2000)), "policy.yaml:3: expression"},
		{"K03 too deep", role(strings.Repeat("!(", 100) + "true" + strings.Repeat(")", 100)), "policy.yaml:3: expression"},

		{"empty rule", rules("{}"), "policy.yaml:7: a rule is one kind with its settings: this has 0"},
		{"two rules in one", rules(`{cel: {expr: "true", message: m}, base_image: {allowed: [r.io/b]}}`), "policy.yaml:7: a rule is one kind with its settings: this has 2"},
		{"rule without settings", rules("{signed_by: }"), "policy.yaml:7: signed_by must be a mapping of keys to values, not nothing"},
		{"C06 empty identity", rules("{signed_by: {}}"), `policy.yaml:7: signed_by has no "issuer"`},
		{"C06 identity without when", rules("{signed_by: {issuer: github}}"), `policy.yaml:7: signed_by has no "when"`},
		{"C06 identity without issuer", rules(`{signed_by: {when: "true"}}`), `policy.yaml:7: signed_by has no "issuer"`},
		{"provenance of anything", rules("{provenance: {min_level: 2}}"), "policy.yaml:7: provenance needs source_id or source: without them any repository's build would pass"},
		{"unquoted id", rules("{provenance: {source_id: 1296269}}"), "policy.yaml:7: source_id must be text, not 1296269: write it in quotes"},
		{"B11 ref glob", rules(`{provenance: {source_id: "1", refs: ["refs/heads/rel*"]}}`), `policy.yaml:7: ref "refs/heads/rel*" must be a full name such as refs/heads/main, or end in /* for one segment or /** for any`},
		{"B11 short ref", rules(`{provenance: {source_id: "1", refs: [main]}}`), `policy.yaml:7: ref "main" must be a full name`},
		{"no refs", rules(`{provenance: {source_id: "1", refs: []}}`), `policy.yaml:7: refs is empty`},
		{"B12 source with percent", rules(`{provenance: {source: "https://github.com/acme%2fapi"}}`), `policy.yaml:7: source "https://github.com/acme%2fapi" must be the repository's https URL`},
		{"B12 source with .git", rules(`{provenance: {source: "https://github.com/acme/api.git"}}`), `must be the repository's https URL`},
		{"level", rules(`{provenance: {source_id: "1", min_level: 4}}`), "policy.yaml:7: min_level must be a whole number from 1 to 3, not 4"},
		{"grade", rules(`{provenance: {source_id: "1", min_grade: gold}}`), `policy.yaml:7: min_grade must be one of caller, attested, source, registry, claim, not "gold"`},
		{"base of nothing", rules(`{base_image: {proof: layers}}`), `policy.yaml:7: base_image has no "allowed"`},
		{"base with no pattern", rules(`{base_image: {allowed: []}}`), `policy.yaml:7: images is empty`},
		{"proof", rules(`{base_image: {allowed: [r.io/b], proof: word}}`), `policy.yaml:7: proof must be one of layers, attested, claimed, not "word"`},
		{"attested by nobody", rules(`{base_image: {allowed: [r.io/b], proof: attested}}`), `policy.yaml:7: base_image with proof: attested needs attested_by: a list of {root, when} that says whose provenance counts`},
		{"attested by an empty list", rules(`{base_image: {allowed: [r.io/b], proof: attested, attested_by: []}}`), `policy.yaml:7: attested_by is empty`},
		{"D13 attested by anybody under a root", rules(`{base_image: {allowed: [r.io/b], proof: attested, attested_by: [{root: vendor}]}}`), `policy.yaml:7: an entry of attested_by has no "when"`},
		{"attested where nothing is said", rules(`{base_image: {allowed: [r.io/b], proof: attested, attested_by: [{root: vendor, when: ""}]}}`), `policy.yaml:7: when is empty`},
		{"attested under any root", rules(`{base_image: {allowed: [r.io/b], proof: attested, attested_by: [{when: "has(id.key)"}]}}`), `policy.yaml:7: an entry of attested_by has no "root"`},
		{"attested by what no foreign signer has", rules(`{base_image: {allowed: [r.io/b], proof: attested, attested_by: [{root: vendor, when: "id.groups == []"}]}}`), `policy.yaml:7: expression "id.groups == []"`},
		{"attested, as it was", rules(`{base_image: {allowed: [r.io/b], proof: attested, roots: [vendor]}}`), `policy.yaml:7: unknown key "roots" in base_image`},
		{"a root that nobody configured", rules(`{base_image: {allowed: [r.io/b], proof: attested, attested_by: [{root: vendro, when: "has(id.key)"}]}}`), `policy.yaml:7: foreign root "vendro" is not configured: did you mean "vendor"?`},
		{"attesters who count for nothing", rules(`{base_image: {allowed: [r.io/b], attested_by: [{root: vendor, when: "has(id.key)"}]}}`), `policy.yaml:7: base_image has attested_by, which only proof: attested heeds`},
		{"flag", rules(`{base_image: {allowed: [r.io/b], allow_scratch: yes}}`), `policy.yaml:7: allow_scratch must be true or false, not "yes"`},
		{"quoted flag", rules(`{base_image: {allowed: [r.io/b], allow_scratch: "true"}}`), `policy.yaml:7: allow_scratch must be true or false, not "true"`},
		{"cel without message", rules(`{cel: {expr: "true"}}`), `policy.yaml:7: cel has no "message"`},

		{"D08 no stages", "version: 1\ntracks: [{name: t, images: [r.io/a], stages: []}]", `policy.yaml:2: track "t" has no stages`},
		{"D08 no rules", track("  - {name: s}"), `policy.yaml:6: stage "s" has no signed_by rule, and no stage before it has one: anything would pass`},
		{"D08 empty rules", track("  - {name: s, rules: []}"), `policy.yaml:6: stage "s" has no signed_by rule`},
		{"D08 no provenance", track(`  - {name: s, rules: [{signed_by: {issuer: github, when: "true"}}]}`), `policy.yaml:6: stage "s" has no provenance rule, and no stage before it has one: anything would pass`},
		{"D08 beside, not before", track("  - {name: a, rules: " + full + "}\n  - {name: b, rules: []}"), `policy.yaml:7: stage "b" has no signed_by rule`},
		{"after a later stage", track("  - {name: a, after: b, rules: " + full + "}\n  - {name: b, rules: " + full + "}"), `policy.yaml:6: after names "b", which is no earlier stage of track "t"`},
		{"after itself", track("  - {name: a, after: a, rules: " + full + "}"), `policy.yaml:6: after names "a"`},
		{"duplicate stage", track("  - {name: a, rules: " + full + "}\n  - {name: a, rules: " + full + "}"), `policy.yaml:7: stage "a" stands already at policy.yaml:6`},
		{"stage name", track("  - {name: Prod_1, rules: " + full + "}"), `policy.yaml:6: stage name "Prod_1" must be lower-case letters, digits and -`},
		{"track without images", "version: 1\ntracks: [{name: t, stages: []}]", `policy.yaml:2: a track has no "images"`},

		{"target without tag", track(`  - {name: a, target: "r.io/p/{name}", rules: ` + full + "}"), `policy.yaml:6: target "r.io/p/{name}" has no tag`},
		{"target on a port, without tag", track(`  - {name: a, target: "r.io:5000/p/{name}", rules: ` + full + "}"), `has no tag`},
		{"target with another placeholder", track(`  - {name: a, target: "r.io/p/{nam}:1", rules: ` + full + "}"), `{name} must be a whole segment of the path, and nothing else may stand in braces`},
		{"target with part of a segment", track(`  - {name: a, target: "r.io/p/x-{name}:1", rules: ` + full + "}"), `{name} must be a whole segment`},
		{"target with a bad tag", track(`  - {name: a, target: "r.io/p/{name}:{digest}", rules: ` + full + "}"), `tag "{digest}" is not made of letters, digits and . _ -`},
		{"target in upper case", track(`  - {name: a, target: "r.io/Prod/{name}:1", rules: ` + full + "}"), `r.io/Prod/x is not HOST/PATH in lower case`},
		{"target without registry", track(`  - {name: a, target: "prod/{name}:1", rules: ` + full + "}"), `prod/x is not HOST/PATH`},
		{"target for all images", track(`  - {name: a, target: "r.io/p/x:1", rules: ` + full + "}"), `policy.yaml:6: target "r.io/p/x:1" of stage t/a has no {name}, and "r.io/a/*" selects many images: all would be written to one place`},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := load(t, row.text)
			if attest.ReasonOf(err) != attest.BadPolicy {
				t.Fatalf("reason %q, want BAD_POLICY: %v", attest.ReasonOf(err), err)
			}
			if first, _, _ := strings.Cut(strings.TrimPrefix(err.Error(), "BAD_POLICY: "), "\n"); !strings.Contains(first, row.want) {
				t.Errorf("got  %s\nwant %s", err, row.want)
			}
		})
	}
}

// All problems are told at once, in the order of the file.
func TestLoadTellsEverything(t *testing.T) {
	_, err := load(t, `version: 1
roles:
  signers:
  - {issuer: githb, images: ["r.io/a*"], when: "id.rf == 'x'"}
trakcs: []
`)
	want := `BAD_POLICY: policy.yaml:4: issuer "githb" is not configured: did you mean "github"?
policy.yaml:4: pattern "r.io/a*": a wildcard must be a whole segment, not part of "a*"
policy.yaml:4: expression "id.rf == 'x'": no field "rf": id has actor, actor_id, commit, environment, event, groups, issuer, issuer_url, kind, owner_id, ref, ref_protected, repository, repository_id, run_attempt, run_id, runner, san, signer_uri, source, subject, visibility, workflow_path
policy.yaml:5: unknown key "trakcs" in the policy: did you mean "tracks"?`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestTracksAreApart(t *testing.T) {
	two := func(a, targetA, b, targetB string) string {
		target := func(s string) string {
			if s == "" {
				return ""
			}
			return fmt.Sprintf("target: %q, ", s)
		}
		return fmt.Sprintf("version: 1\ntracks:\n- {name: one, images: [%q], stages: [{name: s, %srules: %s}]}\n- {name: two, images: [%q], stages: [{name: s, %srules: %s}]}\n",
			a, target(targetA), full, b, target(targetB), full)
	}
	for _, row := range []struct{ name, text, want string }{
		{"apart", two("r.io/a/*", "r.io/p/a/{name}:1", "r.io/b/*", "r.io/p/b/{name}:1"), ""},
		{"other depth", two("r.io/a/*", "", "r.io/a/*/*", ""), ""},
		{"same images", two("r.io/a/*", "", "r.io/a/*", ""), `images "r.io/a/*" of track "two" overlap with "r.io/a/*" of track "one" (policy.yaml:3): an image belongs to one track`},
		{"one inside the other", two("r.io/**", "", "r.io/a/b/c", ""), "an image belongs to one track"},
		{"crossing", two("r.io/**/a", "", "r.io/b/**", ""), "an image belongs to one track"},
		{"same target", two("r.io/a/*", "r.io/p/{name}:1", "r.io/b/*", "r.io/p/{name}:1"), `target "r.io/p/{name}:1" of stage two/s for images "r.io/b/*" can be the same as "r.io/p/{name}:1" of stage one/s for images "r.io/a/*" (policy.yaml:3): two images would take turns there`},
		{"literal target inside a template", two("r.io/a/*", "r.io/p/{name}:1", "r.io/b/x", "r.io/p/y:1"), "two images would take turns there"},
		{"other tag", two("r.io/a/*", "r.io/p/{name}:one", "r.io/b/*", "r.io/p/{name}:two"), ""},
		{"a tag that a version can be", two("r.io/a/*", "r.io/p/{name}:prod-{version}", "r.io/b/*", "r.io/p/{name}:prod-1"), "two images would take turns there"},
		{"a tag that no version can be", two("r.io/a/*", "r.io/p/{name}:prod-{version}", "r.io/b/*", "r.io/p/{name}:test-1"), ""},
		{"deep names", two("r.io/a/**", "r.io/p/{name}:1", "r.io/b/x", "r.io/p/q/r/s:1"), "two images would take turns there"},
		{"two wildcards, one name", two("r.io/*/*", "r.io/p/{name}:1", "q.io/b", ""), `target "r.io/p/{name}:1" of stage one/s: "r.io/*/*" has several wildcards and {name} is only the last, so two images could get one name`},
		{"a name that can be empty", two("r.io/**/a", "r.io/p/{name}:1", "q.io/b", ""), "{name} could be empty"},
		{"a name without wildcard", two("r.io/a/b", "r.io/p/{name}:1", "q.io/b", ""), `"r.io/a/b" has no wildcard for {name} to stand for`},
		{"same name", strings.Replace(two("r.io/a", "", "r.io/b", ""), "name: two", "name: one", 1), `policy.yaml:4: track "one" stands already at policy.yaml:3`},
		{"one image twice in a track", strings.Replace(two("r.io/a/*", "", "r.io/b", ""), `["r.io/a/*"]`, `["r.io/a/*", "r.io/a/b"]`, 1), `policy.yaml:3: images "r.io/a/b" overlap with "r.io/a/*" (policy.yaml:3): {name} would have two meanings`},
		{"two patterns of one track with one target", strings.Replace(two("r.io/a/*", "r.io/p/{name}:1", "r.io/b", ""), `["r.io/a/*"]`, `["r.io/a/*", "r.io/c/*"]`, 1), "two images would take turns there"},
		{"two stages with one place for each image", track("  - {name: a, target: \"r.io/p/{name}:1\", rules: " + full + "}\n  - {name: b, after: a, target: \"r.io/p/{name}:1\"}\n"), ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := load(t, row.text)
			if row.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if attest.ReasonOf(err) != attest.BadPolicy || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got  %v\nwant %s", err, row.want)
			}
		})
	}
}

func TestLoadDirectory(t *testing.T) {
	head, tail, _ := strings.Cut(payments, "tracks:")
	write := func(files map[string]string) string {
		dir := t.TempDir()
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	files := map[string]string{"10-roles.yaml": head, "20-tracks.yml": "tracks:" + tail, "notes.txt": "x", ".hidden.yaml": "x"}
	p, err := policy.Load(write(files), known())
	if err != nil {
		t.Fatal(err)
	}
	if want := "# === 10-roles.yaml\n" + head + "# === 20-tracks.yml\ntracks:" + tail; p.Text() != want {
		t.Errorf("text is\n%s", p.Text())
	}
	if d := cmp.Diff(mustLoad(t, payments).Stages(), p.Stages()); d != "" {
		t.Errorf("stages differ from those of one file: %s", d)
	}

	for _, row := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"two versions", map[string]string{"a.yaml": "version: 1", "b.yaml": "version: 1"}, "b.yaml:1: version stands already at a.yaml:1"},
		{"none", map[string]string{"a.txt": "version: 1"}, "no *.yaml or *.yml file"},
		{"no version", map[string]string{"a.yaml": "tracks: []", "b.yaml": "roles: {}"}, `a.yaml:1: the policy has no "version"`},
		{"the fault's own file", map[string]string{"a.yaml": "version: 1", "b.yaml": "\nrols: {}"}, `b.yaml:2: unknown key "rols"`},
		{"J03 too large together", map[string]string{"a.yaml": "version: 1", "b.yaml": strings.Repeat("# comment\n", 110_000)}, "larger than 1048576 bytes"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := policy.Load(write(row.files), known())
			if attest.ReasonOf(err) != attest.BadPolicy || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got %v, want %s", err, row.want)
			}
		})
	}
	if _, err := policy.Load(filepath.Join(t.TempDir(), "none.yaml"), known()); attest.ReasonOf(err) != attest.BadPolicy {
		t.Errorf("a file that is not there: %v", err)
	}
}

// A stage digest changes exactly when a decision could.
func TestStageDigest(t *testing.T) {
	base := mustLoad(t, payments).Stages()
	changed := func(text string) []string {
		var out []string
		for name, d := range mustLoad(t, text).Stages() {
			if old, ok := base[name]; ok && old != d {
				out = append(out, strings.TrimPrefix(name, "payments/"))
			}
		}
		return out
	}
	other := "- {name: other, images: [r.io/x], stages: [{name: test, rules: " + full + "}]}\n"
	for _, row := range []struct {
		name, old, new string
		want           int // stages that change
	}{
		{"version", "version: 7", "version: 8", 0},
		{"comment and space", "tracks:", "# a comment\n\ntracks:", 0},
		{"another track", "tracks:\n", "tracks:\n" + other, 0},
		{"signers", "id.ref == 'refs/heads/main' && ", "", 0},
		{"auditors", "2027-03-31", "2028-03-31", 0},
		{"promoters of another repository", "  auditors:", "  - {issuer: github, images: [r.io/x], when: \"true\"}\n  auditors:", 0},
		{"promoters of these repositories", "  auditors:", "  - {issuer: github, images: [registry.example.com/payments/api], when: \"true\"}\n  auditors:", 3},
		{"promoters' condition", "'release'\"}", "'deploy'\"}", 3},
		{"first stage's rule", "min_level: 2", "min_level: 1", 3},
		{"second stage's rule", "allow_scratch: false", "allow_scratch: true", 2},
		{"last stage's rule", "'github-hosted'", "'self-hosted'", 1},
		{"target", "prod/{name}:{version}", "prod/{name}:{version}-x", 1},
		{"after", "after: staging", "after: test", 1},
		{"images", `images: ["registry.example.com/payments/*"]
  stages`, `images: ["registry.example.com/payments/*", "registry.example.com/pay/*"]
  reproducible: false
  stages`, 3},
		{"reproducible", "  stages:", "  reproducible: true\n  stages:", 3},
	} {
		t.Run(row.name, func(t *testing.T) {
			text := strings.Replace(payments, row.old, row.new, 1)
			if text == payments {
				t.Fatal("nothing was replaced")
			}
			if row.name == "images" { // two patterns would share one target
				text = strings.Replace(text, "prod/{name}:", "prod/{name}:", 1)
				text = strings.Replace(text, "    target: \"registry.example.com/prod/{name}:{version}\"\n", "", 1)
			}
			if got := changed(text); len(got) != row.want {
				t.Errorf("stages %v changed, want %d", got, row.want)
			}
		})
	}
	k := known()
	k.IssuerURLs["github"] = "https://other.example.com"
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(payments), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := policy.Load(path, k)
	if err != nil {
		t.Fatal(err)
	}
	for name, d := range p.Stages() {
		if d == base[name] {
			t.Errorf("%s: the issuer's address changed and the digest did not", name)
		}
	}
}

func TestTargets(t *testing.T) {
	const at = "registry.example.com/payments/api"
	stage := func(target, images string) *policy.Stage {
		text := strings.Replace(track("  - {name: s, target: \""+target+"\", rules: "+full+"}"), "r.io/a/*", images, 1)
		s, err := mustLoad(t, text).Tracks()[0].Stage("s")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, row := range []struct {
		name, target, images, repo, version, want string
		reason                                    attest.Reason
	}{
		{"name and version", "registry.example.com/prod/{name}:{version}", "registry.example.com/payments/*", at, "1.2", "registry.example.com/prod/api:1.2", ""},
		{"literal tag", "registry.example.com/prod/{name}:prod", "registry.example.com/payments/*", at, "", "registry.example.com/prod/api:prod", ""},
		{"name in the middle", "registry.example.com/{name}/prod:x-{version}", "registry.example.com/payments/*", at, "v1", "registry.example.com/api/prod:x-v1", ""},
		{"deep name", "127.0.0.1:5000/p/{name}:1", "registry.example.com/**", at, "", "127.0.0.1:5000/p/payments/api:1", ""},
		{"no wildcard", "registry.example.com/prod/one:{version}", at, at, "1", "registry.example.com/prod/one:1", ""},
		{"no version", "registry.example.com/prod/{name}:{version}", "registry.example.com/payments/*", at, "", "", attest.BadRequest},
		{"no version inside a tag", "registry.example.com/prod/{name}:x-{version}", "registry.example.com/payments/*", at, "", "", attest.BadRequest},
		{"G14 a version that is a path", "registry.example.com/prod/{name}:{version}", "registry.example.com/payments/*", at, "../x", "", attest.BadRequest},
		{"a version that names a digest", "registry.example.com/prod/{name}:{version}", "registry.example.com/payments/*", at, "1@sha256", "", attest.BadRequest},
		{"a version that is too long", "registry.example.com/prod/{name}:{version}", "registry.example.com/payments/*", at, strings.Repeat("1", 129), "", attest.BadRequest},
		{"foreign image", "registry.example.com/prod/{name}:1", "registry.example.com/payments/*", "registry.example.com/other/api", "", "", attest.TrackUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			repo, tag, err := stage(row.target, row.images).Target(attest.Repository(row.repo), row.version)
			got := string(repo) + ":" + tag
			if attest.ReasonOf(err) != row.reason || err == nil && got != row.want {
				t.Errorf("got %s, %v; want %s %s", got, err, row.want, row.reason)
			}
		})
	}
	s, err := mustLoad(t, payments).Tracks()[0].Stage("test")
	if err != nil {
		t.Fatal(err)
	}
	if repo, tag, err := s.Target(at, "1"); repo != "" || tag != "" || err != nil {
		t.Errorf("a stage without target has %s:%s, %v", repo, tag, err)
	}
	if r, err := s.Resource(at); r != at || err != nil {
		t.Errorf("a stage without target is pulled from %s, %v", r, err)
	}
}

func TestTrack(t *testing.T) {
	p := mustLoad(t, payments)
	const api attest.Repository = "registry.example.com/payments/api"
	for _, row := range []struct {
		name, track string
		repo        attest.Repository
		want        attest.Reason
	}{
		{"by image", "", api, ""},
		{"by name", "payments", api, ""},
		{"another name", "other", api, attest.TrackUnknown},
		{"another image", "", "registry.example.com/billing/api", attest.TrackUnknown},
		{"another image by name", "payments", "registry.example.com/billing/api", attest.TrackUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := p.Track(row.repo, row.track); attest.ReasonOf(err) != row.want {
				t.Errorf("%v, want %q", err, row.want)
			}
		})
	}
	track, err := p.Track(api, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = track.Stage("live")
	if attest.ReasonOf(err) != attest.StageUnknown || !strings.Contains(err.Error(), "its stages are test, staging, prod") {
		t.Errorf("%v", err)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(payments)
	f.Add(rules(`{cel: {expr: "has(provenance.ref) && [1,2].exists(x, x > 1)", message: m}}`))
	f.Add(role("id.ref.matches('^(?:a|b)$') ? id.kind in ['x'] : id.groups.all(g, g.startsWith('a'))"))
	f.Add("a: &x [*x]")
	f.Add("? {a: b}\n: c")
	f.Add("version: 1\ntracks:\n- {name: a, images: [r.io/**/x], stages: [{name: s, target: \"r.io/p:{version}\"}]}")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := load(t, text)
		if err != nil {
			if attest.ReasonOf(err) != attest.BadPolicy {
				t.Fatalf("an error without BAD_POLICY: %v", err)
			}
			return
		}
		// What loads is complete: no stage passes without any evidence.
		for _, track := range p.Tracks() {
			for _, s := range track.Stages() {
				if s.Decide(policy.Request{Ref: attest.ImageRef{Repository: "registry.example.com/payments/api"}}).Allowed {
					t.Fatal("a stage lets pass what has no evidence")
				}
			}
		}
		if len(p.Stages()) == 0 {
			p.Grants(attest.Identity{IssuerName: "github"})
		}
	})
}
