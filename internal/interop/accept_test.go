//go:build linux

package interop_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// What a job had signed verifies with both stock binaries, whichever digest of
// it is asked for, and for nobody else.
func TestSigned(t *testing.T) {
	t.Parallel()
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, kind)
			if w.hasReferrersAPI(t) != (kind == withAPI) {
				t.Fatalf("this registry is not what the test is about")
			}
			if !bytes.Equal(must(os.ReadFile(w.root))(t), w.Signer.TrustedRoot()) {
				t.Error("hallmark trust-root wrote another trust root than the service signs by")
			}
			digests := map[string]attest.ImageRef{
				"image": w.image.ImageRef, "index": w.index.ImageRef,
				"first child": {Repository: w.index.Repository, Digest: w.children[0]}, "second child": {Repository: w.index.Repository, Digest: w.children[1]},
			}
			for _, c := range cosigns(t) {
				for name, ref := range digests {
					t.Run(c.name+" "+name, func(t *testing.T) { t.Parallel(); w.verified(t, c, ref) })
				}
				t.Run(c.name+" expectations", func(t *testing.T) { t.Parallel(); w.expectations(t, c) })
			}
		})
	}
}

// verified checks that cosign accepts signature and provenance of ref.
func (w *world) verified(t *testing.T, c cosign, ref attest.ImageRef) {
	common := slices.Concat(w.trusting(w.root), w.byJob(), []string{ref.String()})
	c.want(t, true, append([]string{"verify"}, common...)...)
	out := c.want(t, true, append([]string{"verify-attestation", "--type", "slsaprovenance1"}, common...)...)
	var said struct {
		Payload []byte `json:"payload"`
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "{") {
			check(t, json.Unmarshal([]byte(line), &said))
		}
	}
	if !bytes.Contains(said.Payload, []byte(testkit.Commit)) || !bytes.Contains(said.Payload, []byte(ref.Digest.Hex())) {
		t.Errorf("cosign shows a provenance without the commit or the digest: %s", said.Payload)
	}
}

// expectations states what the verifier expects, rightly and wrongly.
func (w *world) expectations(t *testing.T, c cosign) {
	strangeRoot, _ := w.stranger(t)
	unsigned := w.push(t, "acme/api", testkit.RandomImage(t)).ImageRef
	image := w.image.ImageRef
	workflow := func(name, value string) []string {
		return append(w.byJob(), "--certificate-github-workflow-"+name, value)
	}
	for _, row := range []struct {
		name string
		root string
		who  []string
		ref  attest.ImageRef
		ok   bool
	}{
		{"as signed", w.root, w.byJob(), image, true},
		{"wrong identity", w.root, by(w.job.SAN+"x", w.job.Issuer), image, false},
		{"identity of another branch", w.root, by(strings.Replace(w.job.SAN, "heads/main", "heads/evil", 1), w.job.Issuer), image, false},
		{"wrong issuer", w.root, by(w.job.SAN, w.job.Issuer+"/x"), image, false},
		{"the gate instead", w.root, w.byGate(), image, false},
		{"trust root of another service", strangeRoot, w.byJob(), image, false},
		{"an unsigned image", w.root, w.byJob(), unsigned, false},
		{"the gate key", w.root, []string{"--key", w.gateKey}, image, false},
		{"repository", w.root, workflow("repository", testkit.Source), image, true},
		{"another repository", w.root, workflow("repository", "acme/web"), image, false},
		{"ref", w.root, workflow("ref", "refs/heads/main"), image, true},
		{"another ref", w.root, workflow("ref", "refs/heads/evil"), image, false},
		{"commit", w.root, workflow("sha", testkit.Commit), image, true},
		{"another commit", w.root, workflow("sha", strings.Repeat("0", 40)), image, false},
		{"trigger", w.root, workflow("trigger", "push"), image, true},
		{"another trigger", w.root, workflow("trigger", "pull_request"), image, false},
		{"workflow name", w.root, workflow("name", "release"), image, true},
		{"another workflow name", w.root, workflow("name", "test"), image, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			common := slices.Concat(w.trusting(row.root), row.who, []string{row.ref.String()})
			c.want(t, row.ok, append([]string{"verify"}, common...)...)
			c.want(t, row.ok, append([]string{"verify-attestation", "--type", "slsaprovenance1"}, common...)...)
		})
	}
	t.Run("another predicate", func(t *testing.T) {
		c.want(t, false, slices.Concat([]string{"verify-attestation", "--type", "spdxjson"}, w.trusting(w.root), w.byJob(), []string{image.String()})...)
	})
}

// The files that the client leaves for others verify with stock cosign, and the
// client offline agrees.
func TestExported(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withAPI)
	ref := w.push(t, "acme/api", testkit.RandomImage(t)).ImageRef
	another := attest.ImageRef{Repository: ref.Repository, Digest: attest.Hash([]byte("another image"))}
	dir := t.TempDir()
	w.hallmark(t, 0, "--server", w.URL, "--identity-token", file(t, "token", []byte(w.Token(nil))), "sign", ref.String(), "--bundle-out", dir)
	strangeRoot, _ := w.stranger(t)
	for name, kind := range map[string]string{"signature": attest.PredicateSignature, "provenance": attest.PredicateProvenance} {
		path := filepath.Join(dir, ref.Digest.Hex()+"."+name+".sigstore.json")
		raw := must(os.ReadFile(path))(t)
		for _, row := range []struct {
			name string
			root string
			who  []string
			ref  attest.ImageRef
			want attest.Reason
		}{
			{"as signed", w.root, w.byJob(), ref, ""},
			{"wrong identity", w.root, by(w.job.SAN+"x", w.job.Issuer), ref, attest.SignerMismatch},
			{"wrong issuer", w.root, by(w.job.SAN, w.job.Issuer+"/x"), ref, attest.SignerMismatch},
			{"another digest", w.root, w.byJob(), another, attest.SubjectMismatch},
			{"trust root of another service", strangeRoot, w.byJob(), ref, attest.CertificateInvalid},
		} {
			t.Run(name+" "+row.name, func(t *testing.T) {
				t.Parallel()
				if got := w.offline(t, row.ref, raw, row.root, row.who...); got != row.want {
					t.Errorf("hallmark verify --offline: %q, want %q", got, row.want)
				}
				for _, c := range cosigns(t) {
					c.want(t, row.want == "", slices.Concat([]string{"verify-blob-attestation", "--bundle", path, "--type", kind}, about(row.ref.Digest), w.trusting(row.root), row.who)...)
				}
			})
		}
	}
}
