package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/verifier"
)

// vendorRule is a stage that takes what a vendor has signed, with this service's own
// provenance.
const vendorRule = `version: 1
tracks:
- name: payments
  images: ["registry.example.com/payments/*"]
  stages:
  - name: test
    rules:
    - signed_by: {root: vendor, when: "id.san == 'release@vendor.example' && id.issuer_url == 'https://accounts.vendor.example'"}
    - provenance: {source_id: "1296269"}
  - name: prod
    after: test
`

var vendor = attest.Foreigner{SAN: "release@vendor.example", Issuer: "https://accounts.vendor.example"}

// imported is what the service records of evidence about ref; changes are made to it.
func imported(t testing.TB, n *notary.Notary, ref attest.ImageRef, changes ...func(*attest.Import)) *verifier.Evidence {
	t.Helper()
	content := []byte("evidence")
	in := attest.Import{
		Root: "vendor", RootDigest: attest.Hash([]byte("root")), Form: attest.FormBundle, Digest: attest.Hash(content), Content: content,
		Signer: vendor, PredicateType: attest.PredicateSignature, ImportedAt: attest.Time(today),
	}
	for _, c := range changes {
		c(&in)
	}
	statement, err := attest.ImportStatement(ref, in)
	if err != nil {
		t.Fatal(err)
	}
	env, err := n.Signer.SignGate(statement)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := n.Verifier.Record(n.Record(t, env))
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

func TestDecideOnImports(t *testing.T) {
	n := notary.New(t)
	f := facts{n, image(api, "good", proven(base))}
	ref, own := f.img.Ref, f.sign(t, job())
	other := facts{n, image(api, "other", proven(base))}
	elsewhere := ref
	elsewhere.Repository = "registry.example.com/sandbox/api"
	with := func(changes ...func(*attest.Import)) []*verifier.Evidence {
		return append(own[:len(own):len(own)], imported(t, n, ref, changes...))
	}
	byKey := strings.Replace(vendorRule, "id.san == 'release@vendor.example' && id.issuer_url == 'https://accounts.vendor.example'", "id.key == 'abc'", 1)

	for _, row := range []struct {
		name, text string
		evidence   []*verifier.Evidence
		want       []string // nil: allowed
		found      string
	}{
		{"signed by the vendor", vendorRule, with(), nil, "release@vendor.example by issuer https://accounts.vendor.example under root vendor"},
		{"signed by the vendor's key", byKey, with(func(i *attest.Import) { i.Signer = attest.Foreigner{Key: "abc"} }), nil, "the key abc under root vendor"},
		{"the newest is by somebody else", vendorRule, append(with(), imported(t, n, ref, func(i *attest.Import) { i.Signer.SAN = "else@vendor.example" })), nil, ""},
		{"nothing imported", vendorRule, own, []string{"signed_by: NOT_SIGNED"}, "no imported signature"},
		{"D01 an attestation is no signature", vendorRule, with(func(i *attest.Import) { i.PredicateType = attest.PredicateProvenance }), []string{"signed_by: NOT_SIGNED"}, ""},
		{"D01 a predicate type that begins alike", vendorRule, with(func(i *attest.Import) { i.PredicateType = attest.PredicateSignature + "/x" }), []string{"signed_by: NOT_SIGNED"}, ""},
		{"D13 the same name under another root", vendorRule, with(func(i *attest.Import) { i.Root = "elsewhere" }), []string{"signed_by: FOREIGN_ROOT_MISMATCH"}, "under root elsewhere"},
		{"D13 a root whose name begins alike", vendorRule, with(func(i *attest.Import) { i.Root = "vendor-x" }), []string{"signed_by: FOREIGN_ROOT_MISMATCH"}, "under root vendor-x"},
		{"another signer under the root", vendorRule, with(func(i *attest.Import) { i.Signer.SAN = "intern@vendor.example" }), []string{"signed_by: SIGNER_MISMATCH"}, `id.san = "intern@vendor.example"`},
		{"D13 the name by another issuer", vendorRule, with(func(i *attest.Import) { i.Signer.Issuer = "https://evil.example" }), []string{"signed_by: SIGNER_MISMATCH"}, "https://evil.example"},
		{"A23 no issuer at all", vendorRule, with(func(i *attest.Import) { i.Signer.Issuer = "" }), []string{"signed_by: SIGNER_MISMATCH"}, "issuer unknown"},
		{"another key", byKey, with(func(i *attest.Import) { i.Signer = attest.Foreigner{Key: "abd"} }), []string{"signed_by: SIGNER_MISMATCH"}, "abd"},
		{"a name where a key is asked", byKey, with(), []string{"signed_by: SIGNER_MISMATCH"}, "id.key = absent"},
		{"D06 about another image", vendorRule, append(own[:len(own):len(own)], imported(t, n, other.img.Ref)), []string{"signed_by: NOT_SIGNED"}, ""},
		{"M03 for another repository", vendorRule, append(own[:len(own):len(own)], imported(t, n, elsewhere)), []string{"signed_by: NOT_SIGNED"}, ""},
		{"the service's own signature is no import", vendorRule, own, []string{"signed_by: NOT_SIGNED"}, ""},
		{"D08 an import is no provenance", vendorRule, append(with()[2:], imported(t, n, ref, func(i *attest.Import) { i.PredicateType = attest.PredicateProvenance })),
			[]string{"provenance: NO_PROVENANCE"}, "no provenance of this digest"},
		{"D01 an import is no signature of this service", one(`source_id: "1296269"`, ""), append(own[1:2:2], imported(t, n, ref)), []string{"signed_by: NOT_SIGNED"}, ""},
		{"the gate's name as a foreign signer's", one(`source_id: "1296269"`, ""), append(own[1:2:2], imported(t, n, ref, func(i *attest.Import) {
			i.Signer = attest.Foreigner{SAN: notary.Service + "/gate", Issuer: notary.Service}
		})), []string{"signed_by: NOT_SIGNED"}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			v := stage(t, row.text, "test").Decide(policy.Request{Ref: ref, Evidence: row.evidence, Now: today})
			if v.Allowed != (row.want == nil) {
				t.Errorf("allowed: %v", v.Allowed)
			}
			var want []string
			want = append(want, row.want...)
			if d := cmp.Diff(want, reasons(v)); d != "" {
				t.Error(d)
			}
			for _, r := range v.Results {
				if denied := r.Outcome != attest.OK; r.Rule != "signed_by" && !denied || denied != (row.want != nil) {
					continue
				}
				if !strings.Contains(r.Found, row.found) {
					t.Errorf("%s found %q, want %q", r.Rule, r.Found, row.found)
				}
				return
			}
		})
	}

	// It never raises a level, and a decision names it among what it rests on.
	v := stage(t, vendorRule, "test").Decide(policy.Request{Ref: ref, Evidence: with(), Now: today})
	if v.Level != 2 || len(v.Used) != 2 || v.Used[0].Kind() != attest.KindImport {
		t.Errorf("level %d, %d used", v.Level, len(v.Used))
	}
	// A later stage judges it again.
	before := policy.Before{Digest: ref.Digest, Since: today}
	v = stage(t, vendorRule, "prod").Decide(policy.Request{Ref: ref, Evidence: own, Before: before, Now: today})
	if d := cmp.Diff([]string{"signed_by: NOT_SIGNED"}, reasons(v)); d != "" {
		t.Error(d)
	}
	// Without a stage only this service's signers count.
	if v := mustLoad(t, payments).DecideSigned(policy.Request{Ref: ref, Evidence: with()[2:], Now: today}); v.Allowed {
		t.Error("an import passes for a signature by a configured signer")
	}
}

func TestLoadRoot(t *testing.T) {
	for _, row := range []struct{ name, rule, words string }{
		{"D08 root that is not configured", "{root: vendors, when: \"has(id.key)\"}", `foreign root "vendors" is not configured: did you mean "vendor"?`},
		{"root and issuer", "{root: vendor, issuer: github, when: \"has(id.san)\"}", "both issuer"},
		{"neither", "{when: \"has(id.san)\"}", `no "issuer"`},
		{"D08 no condition", "{root: vendor}", `no "when"`},
		{"D08 empty root", "{root: \"\", when: \"has(id.key)\"}", "root"},
		{"our own name of an issuer", "{root: vendor, when: \"id.issuer == 'github'\"}", `no field "issuer"`},
		{"what only a token says", "{root: vendor, when: \"id.actor_id == '1'\"}", `no field "actor_id"`},
		{"a key where there is none", "{issuer: github, when: \"has(id.key)\"}", `no field "key"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			text := strings.Replace(vendorRule, vendorRule[strings.Index(vendorRule, "{root"):strings.Index(vendorRule, "\n    - provenance")], row.rule, 1)
			_, err := load(t, text)
			if attest.ReasonOf(err) != attest.BadPolicy || !strings.Contains(err.Error(), row.words) {
				t.Errorf("got %v, want BAD_POLICY with %q", err, row.words)
			}
		})
	}
	// What a rule rests on is part of its stage's digest.
	a, b := mustLoad(t, vendorRule), mustLoad(t, strings.Replace(vendorRule, "root: vendor,", "root: elsewhere,", 1))
	if a.Stages()["payments/test"] == b.Stages()["payments/test"] {
		t.Error("another root, the same stage")
	}
}
