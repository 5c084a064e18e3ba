package main

import (
	"bytes"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	ocireg "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/registry"
)

const review = "https://example.com/review/v1"

// file writes a file for the test and returns its path.
func file(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// M03: what the server signed has to be what it was given.
func TestAttestChecksTheAnswer(t *testing.T) {
	predicate := file(t, "p.json", `{"approved": true, "n": 1.0}`)
	for _, row := range []struct {
		name   string
		change func(*peer)
		want   attest.Reason
	}{
		{"M03 another predicate", func(p *peer) { p.replace = func([]byte) []byte { return []byte(`{"approved": false, "n": 1.0}`) } }, attest.StatementMalformed},
		{"M03 a number that is written otherwise", func(p *peer) { p.replace = func([]byte) []byte { return []byte(`{"approved": true, "n": 1}`) } }, attest.StatementMalformed},
		{"C01 a bundle that does not verify", func(p *peer) {
			p.tamper = func(b []byte) []byte { return bytes.Replace(b, []byte(`"treeSize":"`), []byte(`"treeSize":"1`), 1) }
		}, attest.CheckpointInvalid},
		{"M03 another type", func(p *peer) { p.retype = "https://example.com/other/v1" }, attest.PredicateType},
		{"M03 another name", func(p *peer) { p.rename = "e2e" }, attest.StatementMalformed},
		{"M03 another image", func(p *peer) { p.answerDigests = []string{attest.Hash([]byte("x")).String()} }, attest.SubjectMismatch},
		{"G05 a platform that it is not about", func(p *peer) {
			p.answerDigests = []string{image[strings.IndexByte(image, '@')+1:], attest.Hash([]byte("x")).String()}
		}, attest.SubjectMismatch},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := startPeer(t, nil)
			row.change(p)
			code, stdout, stderr := run1(t, &app{}, "--server", p.url, "attest", image, "--type", review, "--predicate", predicate, "--name", "unit")
			if code != refusalExit(row.want) || stdout != "" || !strings.Contains(stderr, "["+string(row.want)+"]") {
				t.Errorf("exit %d\n%s%s", code, stdout, stderr)
			}
		})
	}
}

// One piece of evidence that is refused does not undo the signing, and the exit code
// tells of it.
func TestSignTellsOfRefusedEvidence(t *testing.T) {
	p := startPeer(t, nil)
	p.alter = func(s *hallmarkv1.SignedImage) {
		s.Evidence[1] = &hallmarkv1.SignedEvidence{PredicateType: review, Refusal: &hallmarkv1.Refusal{Reason: string(attest.RoleMissing), Message: "you are no attester"}}
	}
	report, predicate := file(t, "unit.xml", `<testsuite><testcase name="a"/></testsuite>`), file(t, "p.json", `{}`)
	outputs := filepath.Join(t.TempDir(), "outputs")
	code, stdout, _ := run1(t, &app{}, "--server", p.url, "sign", image, "--test-results", report, "--evidence", review+"="+predicate, "--outputs", outputs)
	if code != exitNotPermitted || !strings.Contains(stdout, "SIGNED  "+image) || !strings.Contains(stdout, "evidence   test-result, record 2") ||
		!strings.Contains(stdout, "x "+review+"  you are no attester [ROLE_MISSING]") {
		t.Errorf("exit %d\n%s", code, stdout)
	}
	if _, err := os.Stat(outputs); err == nil {
		t.Error("a job that did not get all has outputs as if it had")
	}
}

// M03: evidence is answered for piece by piece.
func TestSignChecksEvidence(t *testing.T) {
	for _, row := range []struct {
		name  string
		alter func(*hallmarkv1.SignedImage)
		want  string
	}{
		{"M03 left out", func(s *hallmarkv1.SignedImage) { s.Evidence = nil }, "about 0 pieces of evidence, not about 1"},
		{"M03 another type", func(s *hallmarkv1.SignedImage) { s.Evidence[0].PredicateType = "https://example.com/x" }, "instead of"},
		{"M03 another name", func(s *hallmarkv1.SignedImage) { s.Evidence[0].Name = "e2e" }, "instead of"},
		{"M03 no record", func(s *hallmarkv1.SignedImage) { s.Evidence[0].Record = nil }, "instead of"},
		{"C13 no bundle to attach", func(s *hallmarkv1.SignedImage) { s.Evidence[0].Bundle = nil }, string(attest.BundleMalformed)},
		{"M03 the bundle of the provenance", func(s *hallmarkv1.SignedImage) { s.Evidence[0].Bundle = s.ProvenanceBundle }, string(attest.LogEntryMismatch)},
		{"M03 the provenance as evidence", func(s *hallmarkv1.SignedImage) {
			s.Evidence[0].Bundle, s.Evidence[0].Record = s.ProvenanceBundle, s.Provenance
		}, string(attest.LogEntryMismatch)},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := startPeer(t, nil)
			p.attach, p.alter = hallmarkv1.AttachState_ATTACH_STATE_CLIENT, row.alter
			code, stdout, _ := run1(t, &app{}, "--server", p.url, "sign", image, "--attach=client", "--registry-plain-http", "--evidence", review+"="+file(t, "p.json", `{}`))
			if code == exitOK || !strings.Contains(stdout, "REFUSED") || !strings.Contains(stdout, row.want) {
				t.Errorf("exit %d\n%s", code, stdout)
			}
		})
	}
}

// The job attaches evidence with its own rights too, beside signature and provenance.
func TestAttachEvidenceByClient(t *testing.T) {
	reg := httptest.NewServer(ocireg.New(ocireg.WithReferrersSupport(true), ocireg.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(reg.Close)
	img, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := attest.ParseImageRef(strings.TrimPrefix(reg.URL, "http://") + "/payments/api@" + h.String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := name.NewDigest(ref.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(d, img); err != nil {
		t.Fatal(err)
	}
	p := startPeer(t, nil)
	p.attach = hallmarkv1.AttachState_ATTACH_STATE_CLIENT
	predicate, out := file(t, "p.json", `{"a": 1}`), t.TempDir()
	code, stdout, stderr := run1(t, &app{}, "--server", p.url, "sign", ref.String(), "--attach=client", "--registry-plain-http", "--evidence", review+"=one="+predicate, "--bundle-out", out)
	if code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, stdout, stderr)
	}
	code, stdout, stderr = run1(t, &app{}, "--server", p.url, "attest", ref.String(), "--attach=client", "--registry-plain-http", "--type", review, "--name", "two", "--predicate", predicate)
	if code != exitOK || !strings.Contains(stdout, "by this job, read back") {
		t.Fatalf("exit %d\n%s%s", code, stdout, stderr)
	}
	c, err := registry.New(registry.Config{Hosts: []registry.Host{{Host: ref.Repository.Host(), PlainHTTP: true}}})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := c.Attached(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, raw := range bundles {
		ev, err := p.notary.Verifier.Bundle(raw, ref.Digest)
		if err != nil {
			t.Fatalf("what was attached does not verify: %v", err)
		}
		if ev.Kind() == attest.KindEvidence {
			names = append(names, ev.Statement().EvidenceName())
		}
	}
	slices.Sort(names)
	if len(bundles) != 4 || !slices.Equal(names, []string{"one", "two"}) {
		t.Errorf("%d bundles are attached, with the evidence %q", len(bundles), names)
	}
	if _, err := os.Stat(filepath.Join(out, ref.Digest.Hex()+".evidence-2-one.sigstore.json")); err != nil {
		t.Error(err)
	}
}

// C03: what is larger than the service takes is not sent.
func TestEvidenceIsBounded(t *testing.T) {
	p := startPeer(t, nil)
	large := file(t, "large.json", `{"a": "`+strings.Repeat("a", attest.MaxPredicate)+`"}`)
	half := file(t, "half.json", `{"a": "`+strings.Repeat("a", attest.MaxPredicate-100)+`"}`)
	small := file(t, "small.json", `{}`)
	var images, many []string
	for i := range 5 {
		images = append(images, "registry.example.com/a/b@"+attest.Hash([]byte{byte(i)}).String())
	}
	for i := range maxEvidence + 1 {
		many = append(many, "--evidence", review+"=n"+string(rune('a'+i))+"="+small)
	}
	for _, row := range []struct {
		name string
		args []string
		want string
	}{
		{"C03 one predicate", []string{"attest", image, "--type", review, "--predicate", large}, "more than 16777216 bytes [TOO_LARGE]"},
		{"C03 one of a set", []string{"sign", image, "--evidence", review + "=" + large}, "[TOO_LARGE]"},
		{"C03 for all images together", append([]string{"sign", "--evidence", review + "=" + half}, images...), "counted for each image that it is about, more than 67108864"},
		{"C03 how many", append([]string{"sign", image}, many...), "17 files of evidence: one request takes at most 16"},
	} {
		t.Run(row.name, func(t *testing.T) {
			code, _, stderr := run1(t, &app{}, append([]string{"--server", p.url}, row.args...)...)
			if code != exitUsage || !strings.Contains(stderr, row.want) || len(p.called()) > 0 {
				t.Errorf("exit %d, %s", code, stderr)
			}
		})
	}
	// A large one that is allowed passes, there and back.
	if code, _, stderr := run1(t, &app{}, "--server", p.url, "attest", image, "--type", review, "--predicate", half); code != exitOK {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// Where an argument ends and a file begins.
func TestEvidenceArguments(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for _, path := range []string{"a.json", "a=b.json"} {
		if err := os.WriteFile(path, []byte(`{"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ref, err := attest.ParseImageRef(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ name, arg, evidence, wantName, wantImage string }{
		{"file", "a.json", "", "", ""},
		{"name", "app=a.json", "", "app", ""},
		{"image", image + "=a.json", "", "", image},
		{"image and name", image + "=app=a.json", "", "app", image},
		{"file with a sign", "./a=b.json", "", "", ""},
		{"name and file with a sign", "app=a=b.json", "", "app", ""},
		{"type", "", review + "=a.json", "", ""},
		{"image, type, name", "", image + "=" + review + "=app=a.json", "app", image},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := evidenceFlags{}
			if row.arg != "" {
				f.SBOMs = []string{row.arg}
			} else {
				f.Evidence = []string{row.evidence}
			}
			got, err := f.collect(&app{}, []attest.ImageRef{ref})
			if err != nil {
				t.Fatal(err)
			}
			if e := got[0]; e.GetName() != row.wantName || strings.Join(e.GetImages(), " ") != row.wantImage {
				t.Errorf("name %q, images %q", e.GetName(), e.GetImages())
			}
		})
	}
}
