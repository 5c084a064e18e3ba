//go:build linux

package interop_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// Other evidence verifies with both stock binaries under the names that they have for
// it and under its URI, for every digest that it is about and for nobody else.
func TestEvidence(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withAPI)
	other := w.push(t, "acme/api", testkit.RandomImage(t)).ImageRef
	const deepest = attest.MaxPredicateDepth - 1
	large := `{"a":"` + strings.Repeat("x", attest.MaxPredicate-8) + `"}`
	type row struct{ name, predicateType, asks, predicate string }
	rows := []row{
		{"CycloneDX", attest.PredicateCycloneDX, "cyclonedx", `{"bomFormat":"CycloneDX","specVersion":"1.6","version":1,"components":[{"type":"library","name":"a <b> & c"}]}`},
		{"SPDX", attest.PredicateSPDX, "spdxjson", `{"spdxVersion":"SPDX-2.3","dataLicense":"CC0-1.0","SPDXID":"SPDXRef-DOCUMENT","name":"api","documentNamespace":"https://example.com/api-1",` +
			`"creationInfo":{"created":"2026-03-01T12:00:00Z","creators":["Tool: syft-1.20.0"]},"packages":[]}`},
		{"OpenVEX", attest.PredicateOpenVEX, "openvex", `{"@context":"https://openvex.dev/ns/v0.2.0","@id":"https://example.com/vex-1","author":"acme","timestamp":"2026-03-01T12:00:00Z","version":1,` +
			`"statements":[{"vulnerability":{"name":"CVE-2026-1"},"status":"not_affected","justification":"component_not_present"}]}`},
		{"tests", attest.PredicateTestResult, attest.PredicateTestResult, `{"result":"PASSED","configuration":[{"name":"ci.yml"}]}`},
		{"a type of our own", "https://example.com/our-scan/v1", "https://example.com/our-scan/v1", `{"a":[1.0,1e3,"\u00e4"]}`},
		{"the deepest", "https://example.com/deep/v1", "https://example.com/deep/v1", `{"a":` + strings.Repeat("[", deepest) + strings.Repeat("]", deepest) + `}`},
		{"the largest", "https://example.com/large/v1", "https://example.com/large/v1", large},
	}
	signing := pb.NewSigningServiceClient(w.Dial(w.Token(nil)))
	bundles := map[string][]byte{}
	for _, r := range rows {
		got, err := signing.Attest(t.Context(), &pb.AttestRequest{Image: w.index.String(), PredicateType: r.predicateType, Predicate: []byte(r.predicate), Name: r.name})
		if err != nil || got.GetAttachState() != pb.AttachState_ATTACH_STATE_ATTACHED {
			t.Fatalf("%s: %v, %s", r.name, err, got.GetAttachState())
		}
		bundles[r.name] = got.GetBundle()
	}
	child := attest.ImageRef{Repository: w.index.Repository, Digest: w.children[1]}
	for _, c := range cosigns(t) {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ask := func(t *testing.T, ok bool, kind string, who []string, ref attest.ImageRef) {
				t.Helper()
				c.want(t, ok, slices.Concat([]string{"verify-attestation", "--type", kind}, w.trusting(w.root), who, []string{ref.String()})...)
			}
			for _, r := range rows {
				t.Run(r.name, func(t *testing.T) {
					ask(t, true, r.asks, w.byJob(), w.index.ImageRef)
					ask(t, true, r.asks, w.byJob(), child)
				})
			}
			t.Run("refused", func(t *testing.T) {
				ask(t, false, "cyclonedx", by(w.job.SAN+"x", w.job.Issuer), child)
				ask(t, false, "cyclonedx", w.byGate(), child)
				ask(t, false, "cyclonedx", w.byJob(), other)
				ask(t, false, "https://example.com/our-scan/v2", w.byJob(), child)
			})
			for _, r := range []row{rows[0], rows[len(rows)-1]} {
				t.Run("as a file: "+r.name, func(t *testing.T) {
					c.want(t, true, slices.Concat([]string{"verify-blob-attestation", "--bundle", file(t, "bundle.json", bundles[r.name]), "--type", r.predicateType},
						about(child.Digest), w.trusting(w.root), w.byJob())...)
				})
			}
		})
	}
}
