package gate_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
)

const provenanceV02 = "https://slsa.dev/provenance/v0.2"

// attestedStages ask for a base that a vendor's provenance names.
const attestedStages = `  - name: vendor
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE"}
    - base_image: {allowed: ["quay.io/base/*"], proof: attested, attested_by: [{root: vendor, when: "id.san == 'SAN' && id.issuer_url == 'ISSUER'"}]}
  - name: other
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE"}
    - base_image: {allowed: ["quay.io/base/*"], proof: attested, attested_by: [{root: other, when: "has(id.key)"}]}
  - name: layers
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE"}
    - base_image: {allowed: ["quay.io/base/*"]}
`

func attested() string {
	return strings.NewReplacer("SOURCE", dev.GitHubID(testkit.Source), "SAN", abroad.SAN, "ISSUER", abroad.Issuer).Replace(attestedStages)
}

// A base that the layers cannot show is attested when a vendor's imported provenance
// names it as what the image was built from, and by nothing less.
func TestAttestedBase(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	policy := strings.Replace(importing(2), "  - name: live\n", attested()+"  - name: live\n", 1)
	a.SetPolicy(policy)
	a.Restart()

	base := a.PushBase("debian", "12")
	base.Repository = "quay.io/base/debian" // where nobody can compare layers
	golang := attest.Hash([]byte("golang"))
	sha := func(d attest.Digest) map[string]string { return map[string]string{"sha256": d.Hex()} }
	dep := func(uri string, d attest.Digest) map[string]any { return map[string]any{"uri": uri, "digest": sha(d)} }
	named := dep("pkg:docker/quay.io/base/debian@12?platform=linux%2Famd64", base.Digest)
	v1 := func(deps ...any) map[string]any {
		return map[string]any{"predicate": map[string]any{"buildDefinition": map[string]any{"resolvedDependencies": deps}}}
	}
	v02 := func(deps ...any) map[string]any {
		return map[string]any{"predicate": map[string]any{"materials": deps}}
	}
	for i, row := range []struct {
		name, kind string
		said       map[string]any
		key        bool // signed by the root "other", a key
		want       attest.BaseResult
		root       string
	}{
		{"v1", attest.PredicateProvenance, v1(dep("git+https://github.com/x/y", attest.Hash(nil)), named), false, attest.Attested, "vendor"},
		{"v0.2", provenanceV02, v02(named), false, attest.Attested, "vendor"},
		{"by a key", attest.PredicateProvenance, v1(named), true, attest.Attested, "other"},
		{"of Tekton", attest.PredicateProvenance, v1(dep("git+https://github.com/x/y", attest.Hash(nil)), dep("oci://quay.io/base/debian", base.Digest)), false, attest.Attested, "vendor"},
		{"D12 of Tekton: the image of a step beside it", attest.PredicateProvenance, v1(named, dep("oci://ghcr.io/tekton/step", golang)), false, attest.Claimed, ""},
		{"with the Dockerfile's frontend", provenanceV02, v02(dep("pkg:docker/docker/dockerfile@1", golang), named), false, attest.Attested, "vendor"},
		{"D12 another digest", attest.PredicateProvenance, v1(dep("pkg:docker/quay.io/base/debian@12", golang)), false, attest.Claimed, ""},
		{"D12 another repository", attest.PredicateProvenance, v1(dep("pkg:docker/quay.io/evil/debian@12", base.Digest)), false, attest.Claimed, ""},
		{"D12 one of two images: the other may be the base", attest.PredicateProvenance, v1(named, dep("pkg:docker/golang@1", golang)), false, attest.Claimed, ""},
		{"D12 beside one that cannot be read", attest.PredicateProvenance, v1(named, dep("pkg:docker/%zz@1", golang)), false, attest.Claimed, ""},
		{"D12 two digests of it", provenanceV02, v02(dep("pkg:docker/quay.io/base/debian@12?digest="+strings.Replace(golang.String(), ":", "%3A", 1), base.Digest)), false, attest.Claimed, ""},
		{"D12 where v0.2 has it, said to be v1", attest.PredicateProvenance, v02(named), false, attest.Claimed, ""},
		{"D01 another predicate type", "https://example.com/provenance", v1(named), false, attest.Claimed, ""},
		{"materials that are no list", provenanceV02, map[string]any{"predicate": map[string]any{"materials": 1}}, false, attest.Claimed, ""},
		{"no dependencies", provenanceV02, v02(), false, attest.Claimed, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			app := a.PushOn(base, "12", "acme/api")
			statement := abroad.Statement(t, row.kind, row.said, app.Digest)
			bundle := a.vendor.Bundle(statement, abroad.Parts{})
			if row.key {
				bundle = a.key.Bundle(statement)
			}
			if i%2 == 1 && !row.key { // the legacy form says the same
				abroad.Legacy(t, app.ImageRef, ".att", a.vendor.Attestation(statement))
			} else {
				abroad.Refer(t, app.ImageRef, app.Digest, abroad.BundleType, bundle)
			}
			out, err := a.Gate.Import(t.Context(), a.job, app.ImageRef)
			if err != nil || len(out.Imported) != 1 {
				t.Fatalf("%v: %+v", err, out)
			}
			got := sign(t, a.Stack, a.Token(nil), app.ImageRef).Image.Base
			if got.Result != row.want || got.Digest != base.Digest || got.Repository != base.Repository {
				t.Fatalf("%+v", got)
			}
			if first := got.Claims[0]; row.root != "" && (first.From != attest.BaseFromAttestation || first.Root != row.root || got.Result.Grade() != attest.GradeAttested) {
				t.Errorf("%+v", got)
			}
			for _, stage := range []string{"vendor", "other", "layers"} {
				d := promote(t, a.Stack, gate.PromoteRequest{Ref: app.ImageRef, ToStage: stage, DryRun: true}).Decision
				if (d.Verdict == gate.Allowed) != (stage == row.root) {
					t.Errorf("to %s: %s %+v", stage, d.Verdict, d.Results)
				}
			}
		})
	}

	// What was imported about another image, or by nobody, says nothing of this one.
	t.Run("without an import", func(t *testing.T) {
		if got := sign(t, a.Stack, a.Token(nil), a.PushOn(base, "12", "acme/api").ImageRef).Image.Base; got.Result != attest.Claimed {
			t.Errorf("%+v", got)
		}
	})
	// A contradiction stays one, whoever attests.
	t.Run("D12 contradicted and attested", func(t *testing.T) {
		liar := a.PushBase("liar", "1")
		img := a.PushOn(testkit.Pushed{ImageRef: liar.ImageRef, Image: base.Image}, "1", "acme/api")
		abroad.Refer(t, img.ImageRef, img.Digest, abroad.BundleType, a.vendor.Bundle(abroad.Statement(t, provenanceV02,
			v02(dep("pkg:docker/"+string(liar.Repository)+"@1", liar.Digest)), img.Digest), abroad.Parts{}))
		if out, err := a.Gate.Import(t.Context(), a.job, img.ImageRef); err != nil || len(out.Imported) != 1 {
			t.Fatalf("%v: %+v", err, out)
		}
		if got := sign(t, a.Stack, a.Token(nil), img.ImageRef).Image.Base; got.Result != attest.Contradicted {
			t.Errorf("%+v", got)
		}
	})
	fsck(t, a.Stack)
}

// Under one root anybody may sign: whose word a base rests on is in the provenance, and
// the rule asks for somebody's. What others add hides nothing and shows nothing.
func TestAttestedByOthers(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	a.SetPolicy(strings.Replace(importing(2), "  - name: live\n", attested()+"  - name: live\n", 1))
	a.Restart()
	base := a.PushBase("debian", "12")
	base.Repository = "quay.io/base/debian"
	statement := func(app testkit.Pushed, d attest.Digest) []byte {
		return abroad.Statement(t, provenanceV02, map[string]any{"predicate": map[string]any{"materials": []any{
			map[string]any{"uri": "pkg:docker/quay.io/base/debian@12", "digest": map[string]string{"sha256": d.Hex()}},
		}}}, app.Digest)
	}
	refer := func(app testkit.Pushed, bundle []byte) {
		abroad.Refer(t, app.ImageRef, app.Digest, abroad.BundleType, bundle)
	}
	mallory := func(app testkit.Pushed, i int, d attest.Digest) []byte {
		return a.vendor.BundleBy(fmt.Sprintf("mallory%d@mail.example", i), abroad.Issuer, statement(app, d), abroad.Parts{})
	}
	all := func(app testkit.Pushed, want int) {
		t.Helper()
		if out, err := a.Gate.Import(t.Context(), a.job, app.ImageRef); err != nil || len(out.Imported) != want {
			t.Fatalf("%v: %+v", err, out)
		}
	}
	verdict := func(app testkit.Pushed) gate.Decision {
		t.Helper()
		return promote(t, a.Stack, gate.PromoteRequest{Ref: app.ImageRef, ToStage: "vendor", DryRun: true}).Decision
	}

	t.Run("D13 another signer under the root", func(t *testing.T) {
		app := a.PushOn(base, "12", "acme/api")
		refer(app, mallory(app, 0, base.Digest))
		all(app, 1)
		got := sign(t, a.Stack, a.Token(nil), app.ImageRef).Image.Base
		if c := got.Claims[0]; got.Result != attest.Attested || c.Signer.SAN != "mallory0@mail.example" || c.Signer.Issuer != abroad.Issuer {
			t.Errorf("%+v", got)
		}
		wantDenied(t, verdict(app), attest.BaseUnproven)
	})
	t.Run("D13 the certificate's issuer is another", func(t *testing.T) {
		app := a.PushOn(base, "12", "acme/api")
		refer(app, a.vendor.BundleBy(abroad.SAN, "https://accounts.mail.example", statement(app, base.Digest), abroad.Parts{}))
		all(app, 1)
		sign(t, a.Stack, a.Token(nil), app.ImageRef)
		wantDenied(t, verdict(app), attest.BaseUnproven)
	})
	for _, row := range []struct {
		name  string
		names attest.Digest // what the others say is the base
	}{
		{"D13 twenty others after the vendor, of another base", attest.Hash([]byte("golang"))},
		{"D13 twenty others after the vendor, of the same base", base.Digest},
	} {
		t.Run(row.name, func(t *testing.T) {
			app := a.PushOn(base, "12", "acme/api")
			refer(app, a.vendor.Bundle(statement(app, base.Digest), abroad.Parts{}))
			all(app, 1)
			for i := range 20 {
				refer(app, mallory(app, i, row.names))
			}
			all(app, 21)
			sign(t, a.Stack, a.Token(nil), app.ImageRef)
			if d := verdict(app); d.Verdict != gate.Allowed {
				t.Errorf("%+v", d.Results)
			}
		})
	}
	t.Run("D13 twenty by one other before the vendor", func(t *testing.T) {
		app := a.PushOn(base, "12", "acme/api")
		for range 20 {
			refer(app, mallory(app, 0, base.Digest))
		}
		all(app, 20)
		refer(app, a.vendor.Bundle(statement(app, base.Digest), abroad.Parts{}))
		all(app, 21)
		got := sign(t, a.Stack, a.Token(nil), app.ImageRef).Image.Base
		if n := len(got.Claims); n > 3 { // the vendor's, the other's, and the annotation
			t.Errorf("%d claims: one for each signer is enough: %+v", n, got.Claims)
		}
		if d := verdict(app); d.Verdict != gate.Allowed {
			t.Errorf("%+v", d.Results)
		}
	})
	fsck(t, a.Stack)
}
