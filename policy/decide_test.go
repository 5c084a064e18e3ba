package policy_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/verifier"
)

const base attest.Repository = "registry.example.com/base/busybox"

// image returns an image of repo; what makes its digest.
func image(repo attest.Repository, what string, b attest.Base) attest.Image {
	return attest.Image{Ref: attest.ImageRef{Repository: repo, Digest: attest.Hash([]byte(what))}, Base: b}
}

func proven(repo attest.Repository) attest.Base {
	return attest.Base{Result: attest.ProvenLayers, Repository: repo, Tag: "1", Digest: attest.Hash([]byte(repo))}
}

// facts is the evidence that tests choose from: all about one digest, in the
// order of the log.
type facts struct {
	n   *notary.Notary
	img attest.Image
}

func (f facts) sign(t testing.TB, id attest.Identity) []*verifier.Evidence {
	t.Helper()
	return []*verifier.Evidence{f.n.Signature(t, id, f.img), f.n.Provenance(t, id, f.img)}
}

func stage(t testing.TB, text, name string) *policy.Stage {
	t.Helper()
	s, err := mustLoad(t, text).Tracks()[0].Stage(name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// reasons returns "rule: REASON" for every result that denies.
func reasons(v policy.Verdict) []string {
	var out []string
	for _, r := range v.Results {
		if r.Outcome != attest.OK {
			out = append(out, r.Rule+": "+string(r.Reason))
		}
	}
	return out
}

func result(t testing.TB, v policy.Verdict, rule string) attest.RuleResult {
	t.Helper()
	for _, r := range v.Results {
		if r.Rule == rule {
			return r
		}
	}
	t.Fatalf("no result of rule %s in %+v", rule, v.Results)
	return attest.RuleResult{}
}

func TestDecideAllows(t *testing.T) {
	f := facts{notary.New(t), image(api, "good", proven(base))}
	ev := f.sign(t, job())
	before := policy.Before{Digest: f.img.Ref.Digest, Since: today}
	for _, name := range []string{"test", "staging", "prod"} {
		v := stage(t, payments, name).Decide(policy.Request{
			Ref: f.img.Ref, Evidence: ev, Caller: job(release), Before: before, Version: "1.2", Now: today,
		})
		if !v.Allowed || v.Level != 2 || v.Summary != "acme/api main 4be1d0c run 9912" || len(v.Used) != 2 {
			t.Errorf("%s: allowed %v, level %d, summary %q, %d used: %v", name, v.Allowed, v.Level, v.Summary, len(v.Used), reasons(v))
		}
		for _, r := range v.Results {
			if r.Outcome != attest.OK || r.Required == "" || r.Reason != "" {
				t.Errorf("%s: %+v", name, r)
			}
		}
	}
	v := stage(t, payments, "prod").Decide(policy.Request{Ref: f.img.Ref, Evidence: ev, Caller: job(release), Before: before, Version: "1.2", Now: today})
	if v.Target != "registry.example.com/prod/api:1.2" {
		t.Errorf("target %q", v.Target)
	}
	var rules []string
	for _, r := range v.Results {
		rules = append(rules, r.Rule)
	}
	if d := cmp.Diff([]string{"after", "signed_by", "provenance", "base_image", "cel"}, rules); d != "" {
		t.Errorf("a stage applies the rules of those before it: %s", d)
	}
}

// one returns a policy whose only stage has a signature and a provenance rule
// and what is given; line 7 is extra's.
func one(provenance, extra string) string {
	return `version: 1
tracks:
- name: payments
  images: ["registry.example.com/payments/*"]
  stages:
  - {name: test, rules: [{signed_by: {issuer: github, when: "id.repository_id == '1296269'"}}, {provenance: {` + provenance + `}},
     ` + extra + `]}
`
}

func TestDecideDenies(t *testing.T) {
	n := notary.New(t)
	good := facts{n, image(api, "good", proven(base))}
	ev := good.sign(t, job())
	fork := good.sign(t, job(source("https://github.com/evil/api", "666"), token("fork")))
	self := good.sign(t, job(selfHosted, token("self")))
	branch := good.sign(t, job(ref("refs/heads/main-evil"), token("branch")))
	cased := good.sign(t, job(source("https://github.com/Acme/api", "1296269"), token("cased")))
	deep := good.sign(t, job(ref("refs/heads/release/1/x"), token("deep")))
	ends := good.sign(t, job(ref("refs/heads/release/"), token("ends")))
	vague := good.sign(t, job(func(id *attest.Identity) { id.Build.Commit = "" }, token("vague")))
	foreign := good.sign(t, job(func(id *attest.Identity) { id.Issuer = "https://other.example.com" }, token("foreign")))
	twin := good.sign(t, job(func(id *attest.Identity) { id.Issuer, id.IssuerName = "https://ci.example.com", "generic" }, token("twin")))
	lies := n.Evidence(t, job(selfHosted, token("lies")), bytes.Replace(
		notary.ProvenanceStatement(t, job(selfHosted, token("lies")), good.img),
		[]byte("/builders/github/self-hosted/v1"), []byte("/builders/github/hosted/v1"), 1))
	borrowed := n.Evidence(t, job(token("borrowed"), func(id *attest.Identity) { id.Issuer = "https://ci.example.com" }), bytes.Replace(
		notary.ProvenanceStatement(t, job(token("borrowed"), func(id *attest.Identity) { id.Issuer = "https://ci.example.com" }), good.img),
		[]byte(`"issuer":"https://ci.example.com"`), []byte(`"issuer":"`+gitHubURL+`"`), 1))
	other := facts{n, image(api, "other", proven(base))}
	otherEv := other.sign(t, job())
	sbom := n.Evidence(t, job(), statement(t, good.img, "https://spdx.dev/Document/v2.3"))
	gate := gateEvidence(t, n, good.img)

	id := `source_id: "1296269"`
	for _, row := range []struct {
		name, text string
		evidence   []*verifier.Evidence
		want       []string
		found      string // part of what the first denying rule found, or of what comes next
	}{
		{"nothing", one(id, ""), nil, []string{"signed_by: NOT_SIGNED", "provenance: NO_PROVENANCE"}, "no signature over this digest"},
		{"nil evidence", one(id, ""), []*verifier.Evidence{nil}, []string{"signed_by: NOT_SIGNED", "provenance: NO_PROVENANCE"}, ""},
		{"D06 another digest's", one(id, ""), otherEv, []string{"signed_by: NOT_SIGNED", "provenance: NO_PROVENANCE"}, ""},
		{"D01 provenance is no signature", one(id, ""), ev[1:], []string{"signed_by: NOT_SIGNED"}, ""},
		{"D01 signature is no provenance", one(id, ""), ev[:1], []string{"provenance: NO_PROVENANCE"}, ""},
		{"D01 another predicate by the signer", one(id, ""), []*verifier.Evidence{sbom}, []string{"signed_by: NOT_SIGNED", "provenance: NO_PROVENANCE"}, ""},
		{"D01 the gate's statements", one(id, ""), gate, []string{"signed_by: NOT_SIGNED", "provenance: NO_PROVENANCE"}, ""},
		{"signed by a fork", one(id, ""), fork, []string{"signed_by: SIGNER_MISMATCH", "provenance: SOURCE_MISMATCH"}, `id.repository_id = "666"`},
		{"A06 the same claims by another issuer", one(id, ""), twin, []string{"signed_by: SIGNER_MISMATCH"}, "by issuer https://ci.example.com (another issuer)"},
		{"A06 an issuer that is not configured", one(id, ""), foreign, []string{"signed_by: SIGNER_MISMATCH", "provenance: SOURCE_MISMATCH"}, "another issuer"},
		{"source id", one(`source_id: "7"`, ""), ev, []string{"provenance: SOURCE_MISMATCH"}, "source_id 1296269 (https://github.com/acme/api)"},
		{"source", one(`source: "https://github.com/acme/other"`, ""), ev, []string{"provenance: SOURCE_MISMATCH"}, "source https://github.com/acme/api"},
		{"B11 source is a prefix", one(`source: "https://github.com/acme/ap"`, ""), ev, []string{"provenance: SOURCE_MISMATCH"}, ""},
		{"B12 source in another case", one(`source: "https://github.com/acme/{name}"`, ""), cased, []string{"provenance: SOURCE_MISMATCH"}, "differ only in case"},
		{"B11 ref is a prefix", one(id+", refs: [refs/heads/main]", ""), branch, []string{"provenance: SOURCE_MISMATCH"}, "ref refs/heads/main-evil"},
		{"B11 * is one segment", one(id+", refs: [refs/heads/release/*]", ""), deep, []string{"provenance: SOURCE_MISMATCH"}, "ref refs/heads/release/1/x"},
		{"B11 * is not none", one(id+", refs: [refs/heads/release/*]", ""), ends, []string{"provenance: SOURCE_MISMATCH"}, ""},
		{"B11 ** is not none", one(id+", refs: [refs/heads/release/**]", ""), ends, []string{"provenance: SOURCE_MISMATCH"}, ""},
		{"builder", one(id+`, builders: ["https://hallmark.example.com/builders/github/hosted/v2"]`, ""), ev, []string{"provenance: SOURCE_MISMATCH"}, "builder https://hallmark.example.com/builders/github/hosted/v1"},
		{"B08 self-hosted counts 1", one(id+", min_level: 2", ""), self, []string{"provenance: LEVEL_TOO_LOW"}, "SLSA build level 1 by https://hallmark.example.com/builders/github/self-hosted/v1"},
		{"B08 hosted counts 2, not 3", one(id+", min_level: 3", ""), ev, []string{"provenance: LEVEL_TOO_LOW"}, "SLSA build level 2"},
		{"D10 builder id is not the signer's", one(id, ""), append(self[:1:1], lies), []string{"provenance: SOURCE_MISMATCH"}, "it says builder https://hallmark.example.com/builders/github/hosted/v1, which is not that of"},
		{"D10 issuer is not the signer's", one(id, ""), append(ev[:1:1], borrowed), []string{"provenance: SOURCE_MISMATCH"}, "it says issuer https://token.actions.githubusercontent.com, its signer's certificate says https://ci.example.com"},
		{"D10 issuer is not configured", one(id, ""), append(ev[:1:1], foreign[1]), []string{"provenance: SOURCE_MISMATCH"}, "its signer's issuer https://other.example.com is not configured"},
		{"a commit nobody knows", one(id+", min_grade: caller", ""), vague, []string{"provenance: SOURCE_MISMATCH"}, "source UNKNOWN"},
		{"two rules that no provenance meets", one(id+", refs: [refs/heads/main]", `{provenance: {source_id: "1296269", min_level: 3}}`), ev, []string{"provenance: SOURCE_MISMATCH", "provenance: LEVEL_TOO_LOW"}, "no single provenance that meets all provenance rules"},
		{"cel false", one(id, `{cel: {expr: "provenance.level >= 3", message: "level 3 only"}}`), ev, []string{"cel: RULE_FAILED"}, "provenance.level = 2"},
		{"K05 cel error", one(id, `{cel: {expr: "provenance.environment == 'release'", message: "m"}}`), ev, []string{"cel: RULE_ERROR"}, "environment is absent"},
		{"K05 cel without provenance", one(id, `{cel: {expr: "provenance.source_id != 'x'", message: "m"}}`), ev[:1], []string{"provenance: NO_PROVENANCE", "cel: RULE_ERROR"}, ""},
		{"cel without a caller", one(id, `{cel: {expr: "caller.kind != 'x'", message: "m"}}`), ev, []string{"cel: RULE_ERROR"}, "kind is absent"},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := stage(t, row.text, "test").Decide(policy.Request{Ref: good.img.Ref, Evidence: row.evidence, Now: today})
			if v.Allowed {
				t.Fatal("allowed")
			}
			if d := cmp.Diff(row.want, reasons(v)); d != "" {
				t.Error(d)
			}
			for _, r := range v.Results {
				if r.Outcome == attest.OK {
					continue
				}
				if !strings.Contains(r.Found+" "+r.Next, row.found) {
					t.Errorf("%s found %q, next %q; want %q", r.Rule, r.Found, r.Next, row.found)
				}
				if r.Required == "" || r.Found == "" || r.Next == "" || !strings.Contains(r.Required, "policy.yaml:") {
					t.Errorf("a person cannot act on %+v", r)
				}
				break
			}
		})
	}
	for _, row := range []struct {
		name, provenance, extra string
		evidence                []*verifier.Evidence
	}{
		{"source with a name", `source: "https://github.com/acme/{name}"`, "", ev},
		{"ref by *", id + ", refs: [refs/tags/x, refs/heads/*]", "", ev},
		{"ref by **", id + ", refs: [refs/heads/**]", "", deep},
		{"builder", id + `, builders: ["https://hallmark.example.com/builders/github/hosted/v1"]`, "", ev},
		{"self-hosted at level 1", id + ", min_level: 1", "", self},
		{"grade", id + ", min_grade: claim", "", ev},
		{"another's provenance of the same commit beside it", id + ", min_level: 2", "", append(self[:2:2], ev...)},
		{"cel", id, `{cel: {expr: "image.name == 'api' && image.repository == 'registry.example.com/payments/api' && stage == 'test' && track == 'payments' && provenance.base_result == 'PROVEN_LAYERS' && provenance.base_repository == 'registry.example.com/base/busybox' && provenance.base_digest.startsWith('sha256:') && provenance.workflow_path == '.github/workflows/release.yml'", message: m}}`, ev},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := stage(t, one(row.provenance, row.extra), "test").Decide(policy.Request{Ref: good.img.Ref, Evidence: row.evidence, Now: today})
			if !v.Allowed {
				t.Errorf("denied: %+v", v.Results)
			}
		})
	}
}

// statement is one of predicate type kind about img.
func statement(t testing.TB, img attest.Image, kind string) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{
		"_type": attest.StatementType, "predicateType": kind, "predicate": map[string]any{"result": "PASSED"},
		"subject": []any{map[string]any{"name": img.Ref.Repository, "digest": map[string]string{"sha256": img.Ref.Digest.Hex()}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// gateEvidence is a promotion statement and a summary about img by the gate.
func gateEvidence(t testing.TB, n *notary.Notary, img attest.Image) []*verifier.Evidence {
	t.Helper()
	p := attest.Promotion{Decided: attest.Decided{Track: "payments", Stage: "test", DecidedAt: attest.Time(today)}, ResourceURI: "oci://" + string(api)}
	vsa, err := attest.VSAStatement(notary.Service, img, p)
	if err != nil {
		t.Fatal(err)
	}
	promotion, err := attest.PromotionStatement(img, p)
	if err != nil {
		t.Fatal(err)
	}
	e, err := n.Signer.SignGate(promotion)
	if err != nil {
		t.Fatal(err)
	}
	byKey, err := n.Verifier.Record(n.Record(t, e))
	if err != nil {
		t.Fatal(err)
	}
	return []*verifier.Evidence{byKey, n.Evidence(t, attest.GateIdentity(notary.Service), vsa)}
}

func TestDecideAfter(t *testing.T) {
	f := facts{notary.New(t), image(api, "good", proven(base))}
	ev := f.sign(t, job())
	for _, row := range []struct {
		name   string
		before policy.Before
		want   []string
		found  string
	}{
		{"there", policy.Before{Digest: f.img.Ref.Digest, Since: today}, nil, "in test since 2026-11-20T12:00:00Z"},
		{"M04 nothing there", policy.Before{}, []string{"after: STAGE_SKIPPED"}, "nothing there"},
		{"M04 another digest there", policy.Before{Digest: attest.Hash([]byte("x"))}, []string{"after: STAGE_SKIPPED"}, "sha256:2d711642b726… there"},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := stage(t, payments, "staging").Decide(policy.Request{Ref: f.img.Ref, Evidence: ev, Before: row.before, Now: today})
			if d := cmp.Diff(row.want, reasons(v)); d != "" || v.Allowed != (row.want == nil) {
				t.Errorf("allowed %v: %s", v.Allowed, d)
			}
			if r := result(t, v, "after"); r.Found != row.found {
				t.Errorf("found %q, want %q", r.Found, row.found)
			}
		})
	}
	// The zero digest is what an empty stage holds, and no image.
	v := stage(t, payments, "staging").Decide(policy.Request{Ref: attest.ImageRef{Repository: api}, Now: today})
	if r := result(t, v, "after"); r.Outcome != attest.Fail {
		t.Errorf("M04 zero digest: %+v", r)
	}
}

// A conflicting provenance stops every stage, also those whose rules were judged
// before it came.
func TestDecideConflicts(t *testing.T) {
	n := notary.New(t)
	f := facts{n, image(api, "good", proven(base))}
	first := f.sign(t, job())
	again := f.sign(t, job(token("again"), func(id *attest.Identity) { id.Build.RunID = "9913" }))
	moved := f.sign(t, job(source("https://github.com/acme/renamed", "1296269"), token("moved")))
	later := f.sign(t, job(commit("ab"), token("later")))
	fork := f.sign(t, job(source("https://github.com/evil/api", "666"), token("fork")))
	copied := facts{n, image("registry.example.com/evil/copy", "good", proven(base))}.sign(t, job(source("https://github.com/evil/api", "666"), token("copy")))
	before := policy.Before{Digest: f.img.Ref.Digest}

	const plain = `source_id: "1296269"`
	reproducible := strings.Replace(one(plain, ""), "  stages:", "  reproducible: true\n  stages:", 1)
	for _, row := range []struct {
		name, text string
		more       []*verifier.Evidence
		want       []string
	}{
		{"another run of the commit", one(plain, ""), again, nil},
		{"a renamed repository", one(plain, ""), moved, nil},
		{"D09 another commit, later", one(plain, ""), later, []string{"provenance: PROVENANCE_CONFLICT"}},
		{"D13 another source, for this repository", one(plain, ""), fork, []string{"provenance: PROVENANCE_CONFLICT"}},
		{"another source, for a copy elsewhere", one(plain, ""), copied, nil},
		{"another commit, reproducible", reproducible, later, nil},
		{"another source, reproducible", reproducible, fork, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, order := range [][]*verifier.Evidence{append(first[:2:2], row.more...), append(row.more[:2:2], first...)} {
				v := stage(t, row.text, "test").Decide(policy.Request{Ref: f.img.Ref, Evidence: order, Now: today})
				if d := cmp.Diff(row.want, reasons(v)); d != "" {
					t.Error(d)
				}
			}
		})
	}
	v := stage(t, payments, "staging").Decide(policy.Request{Ref: f.img.Ref, Evidence: append(first[:2:2], later...), Before: before, Now: today})
	if d := cmp.Diff([]string{"provenance: PROVENANCE_CONFLICT"}, reasons(v)); d != "" {
		t.Errorf("at a later stage: %s", d)
	}
	if r := result(t, v, "provenance"); !strings.Contains(r.Found, "repository 1296269 at commit abab") || !strings.Contains(r.Found, "at commit 4be1") {
		t.Errorf("found %q", r.Found)
	}
}

func TestDecideBase(t *testing.T) {
	n := notary.New(t)
	const layers = `{base_image: {allowed: ["registry.example.com/base/*"]}}`
	const claimed = `{base_image: {allowed: ["registry.example.com/base/*"], proof: claimed}}`
	const scratch = `{base_image: {allowed: ["registry.example.com/base/*"], allow_scratch: true}}`
	with := func(r attest.BaseResult, repo attest.Repository) attest.Base {
		b := proven(repo)
		b.Result = r
		return b
	}
	const attested = `{base_image: {allowed: ["registry.example.com/base/*"], proof: attested, attested_by: [{root: vendor, when: "id.san == 'release@vendor.example' && id.issuer_url == 'https://accounts.vendor.example'"}, {root: elsewhere, when: "id.key == 'ab'"}]}}`
	const claimedScratch = `{base_image: {allowed: ["registry.example.com/base/*"], proof: claimed, allow_scratch: true}}`
	none := attest.Base{Result: attest.Unclaimed}
	empty := attest.Base{Result: attest.Scratch, Claims: []attest.BaseClaim{{From: attest.BaseFromCaller, Name: "scratch", Result: attest.Scratch}}}
	same := func(r attest.BaseResult, repos ...attest.Repository) attest.Base {
		b := with(r, "docker.io/library/busybox")
		for _, repo := range repos {
			b.Equivalents = append(b.Equivalents, attest.BaseName{Repository: repo, Tag: "1", Digest: attest.Hash([]byte(repo))})
		}
		return b
	}
	by := func(root string, about attest.Digest) attest.Base {
		b := with(attest.Attested, base)
		if about.IsZero() {
			about = b.Digest
		}
		b.Claims = []attest.BaseClaim{{From: attest.BaseFromAttestation, Digest: about, Result: attest.Attested, Root: root, Signer: vendor}}
		return b
	}
	said := func(claims ...attest.BaseClaim) attest.Base {
		b := by("", attest.Digest{})
		b.Claims = nil
		for _, c := range claims {
			c.Name, c.Digest = string(base), b.Digest
			b.Claims = append(b.Claims, c)
		}
		return b
	}
	word := func(root string, who attest.Foreigner) attest.BaseClaim {
		return attest.BaseClaim{From: attest.BaseFromAttestation, Result: attest.Attested, Root: root, Signer: who}
	}
	mallory := attest.Foreigner{SAN: "mallory@vendor.example", Issuer: vendor.Issuer}
	for _, row := range []struct {
		name, rule string
		bases      []attest.Base // one for each provenance, oldest first
		want       attest.Reason
	}{
		{"proven", layers, []attest.Base{proven(base)}, ""},
		{"proven, claimed asked", claimed, []attest.Base{proven(base)}, ""},
		{"another base", layers, []attest.Base{proven("docker.io/library/busybox")}, attest.BaseNotAllowed},
		{"B11 the allowed name inside another", layers, []attest.Base{proven("registry.example.com/base/x/evil")}, attest.BaseNotAllowed},
		{"D12 claimed only", layers, []attest.Base{with(attest.Claimed, base)}, attest.BaseUnproven},
		{"claimed, and that is enough", claimed, []attest.Base{with(attest.Claimed, base)}, ""},
		{"claimed another", claimed, []attest.Base{with(attest.Claimed, "r.io/x")}, attest.BaseNotAllowed},
		{"contradicted", layers, []attest.Base{with(attest.Contradicted, base)}, attest.BaseContradicted},
		{"contradicted, claimed asked", claimed, []attest.Base{with(attest.Contradicted, base)}, attest.BaseContradicted},
		{"contradicted, scratch allowed", scratch, []attest.Base{with(attest.Contradicted, base)}, attest.BaseContradicted},
		{"C06 unknown", layers, []attest.Base{none}, attest.BaseUnproven},
		{"unknown, claimed asked", claimed, []attest.Base{none}, attest.BaseUnproven},
		{"D12 unknown, scratch allowed", scratch, []attest.Base{none}, attest.BaseUnproven},
		{"D12 unknown, anything but a contradiction allowed", claimedScratch, []attest.Base{none}, attest.BaseUnproven},
		{"from scratch, allowed", scratch, []attest.Base{empty}, ""},
		{"D12 from scratch", layers, []attest.Base{empty}, attest.BaseUnproven},
		{"D12 from scratch, claimed asked", claimed, []attest.Base{empty}, attest.BaseUnproven},
		{"D12 from scratch after a contradiction", scratch, []attest.Base{with(attest.Contradicted, base), empty}, attest.BaseContradicted},
		{"D12 claimed after a contradiction", claimed, []attest.Base{with(attest.Contradicted, base), none, with(attest.Claimed, base)}, attest.BaseContradicted},
		{"claimed after a proof after a contradiction", claimed, []attest.Base{with(attest.Contradicted, base), proven(base), with(attest.Claimed, base)}, ""},
		{"proven by content", layers, []attest.Base{with(attest.ProvenDiffIDs, base)}, ""},
		{"matched", layers, []attest.Base{with(attest.Matched, base)}, ""},
		{"matched another", layers, []attest.Base{with(attest.Matched, "r.io/x")}, attest.BaseNotAllowed},
		{"layers that an allowed base has as well", layers, []attest.Base{same(attest.ProvenLayers, "r.io/x", base)}, ""},
		{"layers that other bases have as well", layers, []attest.Base{same(attest.ProvenLayers, "r.io/x", "r.io/y")}, attest.BaseNotAllowed},
		{"D12 a claim that an allowed base is the same", claimed, []attest.Base{same(attest.Claimed, base)}, attest.BaseNotAllowed},
		{"attested", attested, []attest.Base{by("vendor", attest.Digest{})}, ""},
		{"D12 attested, layers asked", layers, []attest.Base{by("vendor", attest.Digest{})}, attest.BaseUnproven},
		{"attested, claimed asked", claimed, []attest.Base{by("vendor", attest.Digest{})}, ""},
		{"attested under another root", attested, []attest.Base{by("elsewhere", attest.Digest{})}, attest.BaseUnproven},
		{"D13 attested by another signer under the root", attested, []attest.Base{said(word("vendor", mallory))}, attest.BaseUnproven},
		{"D13 the name, certified by another issuer", attested, []attest.Base{said(word("vendor", attest.Foreigner{SAN: vendor.SAN, Issuer: "https://accounts.evil.example"}))}, attest.BaseUnproven},
		{"D13 the name under another root, another signer under this one", attested, []attest.Base{said(word("other", vendor), word("vendor", mallory))}, attest.BaseUnproven},
		{"D13 by nobody, as before signers were recorded", attested, []attest.Base{said(word("vendor", attest.Foreigner{}))}, attest.BaseUnproven},
		{"D13 the right signer's claim of a pusher", attested, []attest.Base{said(attest.BaseClaim{From: attest.BaseFromLabel, Result: attest.Attested, Root: "vendor", Signer: vendor})}, attest.BaseUnproven},
		{"among claims of others", attested, []attest.Base{said(word("vendor", mallory), word("other", mallory), word("vendor", vendor))}, ""},
		{"by the key", attested, []attest.Base{said(word("elsewhere", attest.Foreigner{Key: "ab"}))}, ""},
		{"D13 by another key", attested, []attest.Base{said(word("elsewhere", attest.Foreigner{Key: "cd"}))}, attest.BaseUnproven},
		{"another base attested", attested, []attest.Base{by("vendor", attest.Hash(nil))}, attest.BaseUnproven},
		{"attested by no claim", attested, []attest.Base{with(attest.Attested, base)}, attest.BaseUnproven},
		{"D12 claimed, attested asked", attested, []attest.Base{with(attest.Claimed, base)}, attest.BaseUnproven},
		{"proven, attested asked", attested, []attest.Base{proven(base)}, ""},
		{"contradicted, attested asked", attested, []attest.Base{with(attest.Contradicted, base)}, attest.BaseContradicted},
		{"a result of a later version", claimed, []attest.Base{with("MAYBE", base)}, attest.BaseUnproven},
		{"proven, then nothing", layers, []attest.Base{proven(base), none}, ""},
		{"proven, then contradicted", layers, []attest.Base{proven(base), with(attest.Contradicted, base)}, attest.BaseContradicted},
		{"contradicted, then proven", layers, []attest.Base{with(attest.Contradicted, base), proven(base)}, ""},
		{"no provenance", layers, nil, attest.BaseUnproven},
	} {
		t.Run(row.name, func(t *testing.T) {
			img := image(api, row.name, attest.Base{})
			ev := []*verifier.Evidence{n.Signature(t, job(), img)}
			for _, b := range row.bases {
				img.Base = b
				ev = append(ev, n.Provenance(t, job(), img))
			}
			v := stage(t, one(`source_id: "1296269"`, row.rule), "test").Decide(policy.Request{Ref: img.Ref, Evidence: ev, Now: today})
			r := result(t, v, "base_image")
			if r.Reason != row.want || (r.Outcome == attest.OK) != (row.want == "") || v.Allowed != (row.want == "") {
				t.Errorf("%+v, want %q", r, row.want)
			}
		})
	}
}

// A base is named as a person needs it: which one admits the image, and how to say
// that there is none.
func TestDecideBaseSays(t *testing.T) {
	n := notary.New(t)
	equal := proven("docker.io/library/busybox")
	equal.Equivalents = []attest.BaseName{{Repository: base, Tag: "1", Digest: attest.Hash([]byte("equal"))}}
	for _, row := range []struct {
		name, rule  string
		base        attest.Base
		found, next string
	}{
		{"an equivalent", `{base_image: {allowed: ["registry.example.com/base/*"]}}`, equal,
			string(base) + ":1@" + attest.Hash([]byte("equal")).String() + ", whose layers are those of " + equal.String() + " (PROVEN_LAYERS)", ""},
		{"nothing said", `{base_image: {allowed: ["registry.example.com/base/*"]}}`, attest.Base{Result: attest.Unclaimed},
			"no base that anybody names", "--base REF"},
		{"nothing said, scratch allowed", `{base_image: {allowed: ["registry.example.com/base/*"], allow_scratch: true}}`, attest.Base{Result: attest.Unclaimed},
			"no base that anybody names", "--base REF, or --base scratch when it has none"},
		{"scratch", `{base_image: {allowed: ["registry.example.com/base/*"], allow_scratch: true}}`, attest.Base{Result: attest.Scratch},
			"built from nothing, by the word of its job (SCRATCH)", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			img := image(api, row.name, row.base)
			ev := []*verifier.Evidence{n.Signature(t, job(), img), n.Provenance(t, job(), img)}
			r := result(t, stage(t, one(`source_id: "1296269"`, row.rule), "test").Decide(policy.Request{Ref: img.Ref, Evidence: ev, Now: today}), "base_image")
			if r.Found != row.found || !strings.HasSuffix(r.Next, row.next) || (row.next == "") != (r.Next == "") {
				t.Errorf("found %q, next %q", r.Found, r.Next)
			}
		})
	}
}

func TestDecideTargets(t *testing.T) {
	f := facts{notary.New(t), image(api, "good", proven(base))}
	text := strings.Replace(one(`source_id: "1296269"`, ""), "{name: test,", `{name: test, target: "registry.example.com/prod/{name}:{version}",`, 1)
	main := f.sign(t, job())
	tagged := f.sign(t, job(ref("refs/tags/v1.4.0"), token("tag")))
	other := f.sign(t, job(ref("refs/tags/nightly"), token("nightly")))
	for _, row := range []struct {
		name, version string
		evidence      []*verifier.Evidence
		want          string
		reasons       []string
	}{
		{"given", "2", main, "registry.example.com/prod/api:2", nil},
		{"from the verified tag", "", tagged, "registry.example.com/prod/api:v1.4.0", nil},
		{"given beside a tag", "2", tagged, "registry.example.com/prod/api:2", nil},
		{"from a branch", "", main, "", []string{"target: BAD_REQUEST"}},
		{"from a tag that is no version", "", other, "", []string{"target: BAD_REQUEST"}},
		{"no tag can be that", "a b", main, "", []string{"target: BAD_REQUEST"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := stage(t, text, "test").Decide(policy.Request{Ref: f.img.Ref, Evidence: row.evidence, Version: row.version, Now: today})
			if d := cmp.Diff(row.reasons, reasons(v)); d != "" || v.Target != row.want || v.Allowed != (row.reasons == nil) {
				t.Errorf("allowed %v, target %q, %s", v.Allowed, v.Target, d)
			}
		})
	}
}

func TestDecideFailsClosed(t *testing.T) {
	f := facts{notary.New(t), image(api, "good", proven(base))}
	req := policy.Request{Ref: f.img.Ref, Evidence: f.sign(t, job()), Now: today}
	s := stage(t, payments, "test")
	if v := s.Decide(req); !v.Allowed {
		t.Fatal(reasons(v))
	}
	foreign := req
	foreign.Ref.Repository = billing
	if v := s.Decide(foreign); v.Allowed || !cmp.Equal(reasons(v), []string{"track: TRACK_UNKNOWN"}) {
		t.Errorf("an image of no track: %v", reasons(v))
	}
	policy.AddPanickingRule(s)
	if v := s.Decide(req); v.Allowed || !cmp.Equal(reasons(v), []string{"cel: RULE_ERROR"}) {
		t.Errorf("K05 a rule that panics: %v", reasons(v))
	}
	policy.DropRules(s)
	if v := s.Decide(req); v.Allowed || len(v.Results) != 0 {
		t.Errorf("D08 no result at all: allowed %v, %v", v.Allowed, v.Results)
	}
}

func TestDecideSigned(t *testing.T) {
	n := notary.New(t)
	f := facts{n, image(api, "good", proven(base))}
	good := f.sign(t, job())
	fork := f.sign(t, job(source("https://github.com/evil/api", "666"), token("fork")))
	twin := f.sign(t, job(func(id *attest.Identity) { id.Issuer = "https://ci.example.com" }, token("twin")))
	foreign := f.sign(t, job(func(id *attest.Identity) { id.Issuer = "https://other.example.com" }, token("foreign")))
	acted := f.sign(t, job(token("acted"), func(id *attest.Identity) { id.Build.ActorID, id.Build.RunID = "42", "9914" }))
	actor := job(selfHosted, token("lies"), func(id *attest.Identity) { id.Build.ActorID = "42" })
	lies := f.sign(t, actor)
	lies[1] = n.Evidence(t, actor, bytes.Replace(notary.ProvenanceStatement(t, actor, f.img),
		[]byte("/builders/github/self-hosted/v1"), []byte("/builders/github/hosted/v1"), 1))
	entry := func(when, more string) string {
		return "version: 1\nroles: {signers: [{issuer: github, images: [\"registry.example.com/payments/*\"], when: \"" + when + "\"" + more + "}]}"
	}
	const admit = "id.repository_id == '1296269'"
	for _, row := range []struct {
		name, text string
		evidence   []*verifier.Evidence
		want       []string
	}{
		{"admitted", payments, good, nil},
		{"nothing", payments, nil, []string{"signed_by: NOT_SIGNED", "provenance: NO_PROVENANCE"}},
		{"signature only", payments, good[:1], []string{"provenance: NO_PROVENANCE"}},
		{"D01 provenance only", payments, good[1:], []string{"signed_by: NOT_SIGNED"}},
		{"not admitted", payments, fork, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"A06 another issuer with the same claims", payments, twin, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"A06 an issuer that is not configured", payments, foreign, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"no policy for it", "version: 1", good, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"another repository's entry", strings.Replace(entry(admit, ""), "payments/*", "billing/*", 1), good, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"an entry that ended", entry(admit, ", until: 2026-11-19"), good, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"an entry on its last day", entry(admit, ", until: 2026-11-20"), good, nil},
		{"D09 conflict", payments, append(fork[:2:2], good...), []string{"provenance: PROVENANCE_CONFLICT"}},
		{"D10 builder id is not the signer's", payments, lies, []string{"provenance: SIGNER_MISMATCH"}},
		{"D10 claims of such a provenance", entry("id.actor_id == '42'", ""), lies, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"a claim that no certificate has", entry("id.actor_id == '42'", ""), acted, nil},
		{"another value of it", entry("id.actor_id == '43'", ""), acted, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"a claim that is not there", entry("id.actor_id != '43'", ""), good, []string{"signed_by: SIGNER_MISMATCH", "provenance: SIGNER_MISMATCH"}},
		{"such a claim without a provenance", entry("id.actor_id == '42'", ""), acted[:1], []string{"signed_by: SIGNER_MISMATCH", "provenance: NO_PROVENANCE"}},
		{"such a claim of another signer", entry("id.actor_id == '42'", ""), append(good[:1:1], acted[1]), []string{"signed_by: SIGNER_MISMATCH"}},
		{"issuer's name and kind", entry("id.issuer == 'github' && id.kind == 'workload' && id.subject == 'repo:acme/api:ref:refs/heads/main'", ""), good, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := mustLoad(t, row.text).DecideSigned(policy.Request{Ref: f.img.Ref, Evidence: row.evidence, Now: today})
			if d := cmp.Diff(row.want, reasons(v)); d != "" || v.Allowed != (row.want == nil) || len(v.Results) != 2 {
				t.Errorf("allowed %v: %s", v.Allowed, d)
			}
		})
	}
	if v := mustLoad(t, payments).DecideSigned(policy.Request{Ref: f.img.Ref, Evidence: good, Now: today}); v.Summary != "acme/api main 4be1d0c run 9912" || v.Level != 2 || len(v.Used) != 2 {
		t.Errorf("summary %q, level %d, %d used", v.Summary, v.Level, len(v.Used))
	}
}

// A later stage judges signatures, provenances and bases of the stages before it
// again, each rule once, and a cel rule at its own stage only.
func TestEffectiveRules(t *testing.T) {
	const cel = `{cel: {expr: "stage == 'a'", message: m}}`
	text := track("  - {name: a, rules: " + strings.TrimSuffix(full, "]") + ", " + cel + "]}\n" +
		"  - {name: b, after: a}\n" +
		"  - {name: c, after: b, rules: " + strings.TrimSuffix(full, "]") + `, {signed_by: {issuer: github, when: "false"}}]}` + "\n")
	for name, want := range map[string][]string{
		"a": {"signed_by", "provenance", "cel"},
		"b": {"after", "signed_by", "provenance"},
		"c": {"after", "signed_by", "provenance", "signed_by"},
	} {
		var got []string
		for _, r := range stage(t, text, name).Decide(policy.Request{Ref: attest.ImageRef{Repository: "r.io/a/x"}, Now: today}).Results {
			got = append(got, r.Rule)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("stage %s: %s", name, d)
		}
	}
}

// A denial names rule, line, what was asked and what was found (golden).
func TestDenialText(t *testing.T) {
	f := facts{notary.New(t), image(api, "good", attest.Base{Result: attest.Claimed, Repository: base, Tag: "1", Digest: attest.Hash([]byte("b"))})}
	ev := f.sign(t, job(ref("refs/heads/dev"), selfHosted))
	v := stage(t, payments, "prod").Decide(policy.Request{Ref: f.img.Ref, Evidence: ev, Caller: job(), Version: "1", Now: today})
	var got []string
	for _, r := range v.Results {
		got = append(got, strings.Join([]string{string(r.Outcome), r.Rule, string(r.Reason), r.Required, r.Found, r.Next}, " | "))
	}
	want := []string{
		`fail | after | STAGE_SKIPPED | to be in staging first (policy.yaml:21) | nothing there | hallmark promote ` + f.img.Ref.String() + ` --to-stage staging`,
		`ok | signed_by |  | a signature by issuer github where id.repository_id == '1296269' (policy.yaml:15) | https://github.com/acme/api/.github/workflows/release.yml@refs/heads/dev by issuer https://token.actions.githubusercontent.com | `,
		`fail | provenance | SOURCE_MISMATCH | a provenance, from source_id 1296269, from https://github.com/acme/api, ref refs/heads/main or refs/tags/*, SLSA build level 2, commit known by claim (policy.yaml:16) | ref refs/heads/dev | build and sign it where the rule asks, or correct the rule`,
		`fail | base_image | BASE_UNPROVEN | a base from registry.example.com/base/*, proved by its layers (policy.yaml:20) | no accepted provenance that could name the base | mend what the provenance rule says first`,
		`error | cel | RULE_ERROR | only hosted builds, only by the release job: provenance.runner == 'github-hosted' && caller.environment == 'release' (policy.yaml:25) | runner is absent: provenance.runner = absent, caller.environment = absent | an expression that cannot be evaluated denies: ask with has(…) for what may be absent`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func BenchmarkDecide(b *testing.B) {
	f := facts{notary.New(b), image(api, "good", proven(base))}
	s := stage(b, payments, "prod")
	req := policy.Request{
		Ref: f.img.Ref, Evidence: f.sign(b, job()), Caller: job(release), Version: "1.2", Now: today,
		Before: policy.Before{Digest: f.img.Ref.Digest},
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if !s.Decide(req).Allowed {
				b.Error("denied")
			}
		}
	})
}
