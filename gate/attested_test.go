package gate_test

import (
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
    - base_image: {allowed: ["quay.io/base/*"], proof: attested, roots: [vendor]}
  - name: other
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE"}
    - base_image: {allowed: ["quay.io/base/*"], proof: attested, roots: [other]}
  - name: layers
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE"}
    - base_image: {allowed: ["quay.io/base/*"]}
`

// A base that the layers cannot show is attested when a vendor's imported provenance
// names it as what the image was built from, and by nothing less.
func TestAttestedBase(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	policy := strings.Replace(importing(2), "  - name: live\n", strings.ReplaceAll(attestedStages, "SOURCE", dev.GitHubID(testkit.Source))+"  - name: live\n", 1)
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
