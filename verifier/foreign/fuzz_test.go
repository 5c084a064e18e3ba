package foreign_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// recordedRoots trusts who made the evidence in testdata: a Sigstore as sigstore-go's
// kit has it, with its log and without, and a vendor's key. Nobody has these keys.
func recordedRoots(t testing.TB) *foreign.Roots {
	t.Helper()
	roots, err := foreign.Open([]foreign.Root{
		{Name: "logged", TrustedRoot: "testdata/trusted_root.json", CertificateLog: foreign.None},
		{Name: "stamped", TrustedRoot: "testdata/trusted_root.json", CertificateLog: foreign.None, Log: foreign.None},
		{Name: "vendor", Key: "testdata/vendor.pub"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

func recorded(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// formOf returns the form that a file of testdata is named for.
func formOf(name string) string {
	for _, form := range []string{attest.FormBundle, attest.FormSignature, attest.FormEnvelope} {
		if strings.HasPrefix(name, form) {
			return form
		}
	}
	return ""
}

// What was signed once still verifies, and to the same: every certificate of it has
// long expired, and its time is what a timestamp or the log says.
func TestRecordedEvidence(t *testing.T) {
	roots := recordedRoots(t)
	want := map[string]string{
		"bundle.json": "logged", "bundle-0.1.json": "logged", "bundle-stamped.json": "stamped", "bundle-key.json": "vendor",
		"cosign-signature.json": "logged", "cosign-signature-key.json": "vendor",
		"cosign-envelope.json": "logged", "cosign-envelope-key.json": "vendor",
	}
	files, err := filepath.Glob("testdata/*-*.json")
	if err != nil || len(files)+1 != len(want) {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for name, root := range want {
		got, err := roots.Verify(t.Context(), formOf(name), recorded(t, name), image)
		if err != nil || got.Root != root || (got.SignedAt == "") != (root == "vendor") || got.SignedAt != "" && !strings.HasPrefix(got.SignedAt, "2026-11-2") {
			t.Errorf("%s: %v under root %q, signed at %q, want %q", name, err, got.Root, got.SignedAt, root)
		}
	}
}

// FuzzVerify feeds any bytes as evidence of any form: nothing panics, and what is
// accepted is signed by those whom testdata has keys of, about the image.
func FuzzVerify(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, path := range files {
		if name := filepath.Base(path); formOf(name) != "" {
			f.Add(formOf(name), recorded(f, name))
		}
	}
	roots := recordedRoots(f)
	f.Fuzz(func(t *testing.T, form string, content []byte) {
		got, err := roots.Verify(t.Context(), form, content, image)
		if err != nil {
			if attest.ReasonOf(err) == attest.Internal {
				t.Errorf("a refusal without its reason: %v", err)
			}
			if strings.Contains(err.Error(), "could not be read at all") {
				t.Errorf("a panic: %v", err)
			}
			return
		}
		if got.Digest != attest.Hash(content) || got.Signer.SAN == "" && got.Signer.Key == "" {
			t.Errorf("accepted %+v", got)
		}
		if _, err := roots.Verify(t.Context(), form, content, other); err == nil {
			t.Error("it is about two images")
		}
	})
}
