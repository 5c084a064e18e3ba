package verifier_test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/sigstore/sigstore-go/pkg/root"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

var update = flag.Bool("update", false, "write testdata anew, with new keys")

// The bundles in testdata were written once, by keys that are gone. They must
// verify for ever: somebody may keep one for ten years.
var golden = map[string]attest.RecordKind{
	"provenance.sigstore.json": attest.KindProvenance, "signature.sigstore.json": attest.KindSignature,
	"denial.sigstore.json": attest.KindDenial, "summary.sigstore.json": attest.KindVSA,
}

func TestGolden(t *testing.T) {
	if *update {
		writeGolden(t)
	}
	v, _ := goldenVerifier(t)
	for file, kind := range golden {
		ev, err := v.Bundle(testdata(t, file), image.Ref.Digest)
		if err != nil || ev.Kind() != kind {
			t.Errorf("%s: %v, %v", file, ev, err)
		}
	}
}

func writeGolden(t *testing.T) {
	w := newWorld(t)
	write := func(file string, data []byte) {
		must0(t, os.WriteFile(filepath.Join("testdata", file), data, 0o644))
	}
	must0(t, os.MkdirAll("testdata", 0o755))
	write("trusted_root.json", w.signer.TrustedRoot())
	write("gate.pub", w.signer.GateKeyPEM())
	for file, e := range map[string]attest.Envelope{
		"provenance.sigstore.json": w.by(identity(), provenance(t, identity(), image)),
		"signature.sigstore.json":  w.by(identity(), must(attest.SignatureStatement(image, "r"))(t)),
		"denial.sigstore.json":     w.gate(must(attest.DenialStatement(image.Ref, attest.Denial{}))(t)),
		"summary.sigstore.json":    w.by(attest.GateIdentity(service), must(attest.VSAStatement(service, image, attest.Promotion{}))(t)),
	} {
		write(file, w.bundle(w.log(e)))
	}
}

func testdata(tb testing.TB, file string) []byte {
	tb.Helper()
	return must(os.ReadFile(filepath.Join("testdata", file)))(tb)
}

// goldenVerifier returns ours and plain sigstore-go over the same files.
func goldenVerifier(tb testing.TB) (*verifier.Verifier, *world) {
	tb.Helper()
	tr, gate := testdata(tb, "trusted_root.json"), testdata(tb, "gate.pub")
	w := &world{tb: tb}
	w.byCertificate, w.byKey = plain(tb, must(root.NewTrustedRootFromJSON(tr))(tb), gateKey(tb, gate))
	return must(verifier.New(tr, gate, service))(tb), w
}

// FuzzBundle looks for bytes that are accepted here and not by sigstore-go. Its
// seeds are files because every fuzzing process has to know their keys.
func FuzzBundle(f *testing.F) {
	v, w := goldenVerifier(f)
	for file := range golden {
		f.Add(testdata(f, file))
	}
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ev, err := v.Bundle(raw, image.Ref.Digest)
		if (ev == nil) == (err == nil) {
			t.Fatalf("evidence %v with error %v", ev, err)
		}
		if err == nil && !w.accepts(raw, image.Ref.Digest) {
			t.Fatal("accepted here and refused by sigstore-go")
		}
	})
}
