//go:build linux

package interop_test

import (
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// importer is a policy whose stage takes what vendor has signed, by its key.
const importer = `version: 1
roles:
  signers: [{issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE'"}]
  importers: [{issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE'"}]
  promoters: [{issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE'"}]
tracks:
- name: acme
  images: ["REGISTRY/acme/*"]
  stages:
  - name: live
    rules:
    - signed_by: {root: vendor, when: "id.key == 'KEY'"}
    - provenance: {source_id: "SOURCE"}
`

// keyPair has cosign make a key and returns its file, that of its public key, and
// the hex SHA-256 of that.
func (c cosign) keyPair(t *testing.T) (private, public, id string) {
	t.Helper()
	dir := t.TempDir()
	private, public = filepath.Join(dir, "cosign.key"), filepath.Join(dir, "cosign.pub")
	c.make(t, "generate-key-pair", "--output-key-prefix", filepath.Join(dir, "cosign"))
	block, _ := pem.Decode(must(os.ReadFile(public))(t))
	return private, public, attest.Hash(block.Bytes).Hex()
}

// make runs cosign to sign something.
func (c cosign) make(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), c.path, args...)
	cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH"), "COSIGN_PASSWORD="}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cosign %s %s: %v\n%s", c.name, strings.Join(args, " "), err, out)
	}
}

// What stock cosign signs with a key, in both of its layouts, is imported over the
// API and counts for the rule that names the key's root; with another key it is
// skipped.
func TestImportFromCosign(t *testing.T) {
	t.Parallel()
	tools := cosigns(t)
	private, public, id := tools[0].keyPair(t)
	strange, _, _ := tools[1].keyPair(t)
	predicate := file(t, "predicate.json", []byte(`{"scanned": true}`))
	noServices := file(t, "signing_config.json", []byte(`{"mediaType":"application/vnd.dev.sigstore.signingconfig.v0.2+json"}`))
	v2 := []string{"--yes", "--tlog-upload=false", "--allow-http-registry"}
	v3 := []string{"--yes", "--signing-config", noServices, "--allow-http-registry"}
	bundled := append([]string{"--new-bundle-format"}, v2...)

	for _, row := range []struct {
		name string
		by   cosign
		args []string
		want map[string]int // imported, by form and predicate type
	}{
		{"legacy layout of v2", tools[0], v2, map[string]int{
			attest.FormSignature + " " + attest.PredicateSignature: 1, attest.FormEnvelope + " https://example.com/scan/v1": 1,
		}},
		{"bundles of v2", tools[0], bundled, map[string]int{
			attest.FormBundle + " " + attest.PredicateSignature: 1, attest.FormBundle + " https://example.com/scan/v1": 1,
		}},
		{"bundles of v3", tools[1], v3, map[string]int{
			attest.FormBundle + " " + attest.PredicateSignature: 1, attest.FormBundle + " https://example.com/scan/v1": 1,
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := testkit.NewStack(t, testkit.Options{
				Policy:  strings.NewReplacer("SOURCE", dev.GitHubID(testkit.Source), "KEY", id).Replace(importer),
				Foreign: []foreign.Root{{Name: "vendor", Key: public}},
			})
			ref := s.PushApp("acme/api").ImageRef
			signers := pb.NewSigningServiceClient(s.Dial(s.Token(nil)))
			sign := func(key string) {
				row.by.make(t, append([]string{"sign", "--key", key, ref.String()}, row.args...)...)
				row.by.make(t, append([]string{"attest", "--key", key, "--predicate", predicate, "--type", "https://example.com/scan/v1", ref.String()}, row.args...)...)
			}
			sign(strange)
			got := must(signers.Import(t.Context(), &pb.ImportRequest{Image: ref.String()}))(t)
			if len(got.GetImported()) != 0 || len(got.GetSkipped()) != 2 {
				t.Fatalf("by a strange key: %v", got)
			}
			for _, skipped := range got.GetSkipped() {
				if skipped.GetReason() != string(attest.RootMismatch) {
					t.Errorf("skipped: %v", skipped)
				}
			}
			sign(private)
			got = must(signers.Import(t.Context(), &pb.ImportRequest{Image: ref.String()}))(t)
			have := map[string]int{}
			for _, i := range got.GetImported() {
				have[i.GetForm()+" "+i.GetPredicateType()]++
				if i.GetRoot() != "vendor" || i.GetKey() != id || i.GetSignedAt() != "" || i.GetSigner() != "" {
					t.Errorf("imported %v", i)
				}
			}
			for what, n := range row.want {
				if have[what] != n || len(got.GetImported()) != 2 {
					t.Errorf("%d imported: %v", have[what], got)
				}
			}

			resp := must(signers.SignImages(t.Context(), &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: ref.String()}}}))(t)
			if r := resp.GetResults()[0].GetRefusal(); r != nil {
				t.Fatal(r)
			}
			p := must(pb.NewPromotionServiceClient(s.Dial(s.Token(nil))).Promote(t.Context(), &pb.PromoteRequest{Image: ref.String(), ToStage: "live"}))(t)
			if !p.GetDecision().GetAllowed() || p.GetEffect() != "DONE" {
				t.Errorf("promoting: %v", p.GetDecision())
			}
		})
	}
}
