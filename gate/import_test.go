package gate_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// importing is a policy whose stage live takes images that a vendor has signed, by
// an imported signature, and whose provenance is that of this service. Of what is
// imported the stage twin asks another root.
func importing(version int) string {
	text := `version: 1
roles:
  signers:
  - {issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE'"}
  importers:
  - {issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE'"}
  promoters:
  - {issuer: github, images: ["REGISTRY/acme/*"], when: "id.repository_id == 'SOURCE' && id.environment == 'release'"}
  auditors:
  - {issuer: corp, images: ["**"], when: "'audit' in id.groups"}
tracks:
- name: acme
  images: ["REGISTRY/acme/*"]
  stages:
  - name: live
    rules:
    - signed_by: {root: vendor, when: "id.san == '` + abroad.SAN + `' && id.issuer_url == '` + abroad.Issuer + `'"}
    - provenance: {source_id: "SOURCE"}
  - name: twin
    rules:
    - signed_by: {root: other, when: "has(id.key)"}
    - provenance: {source_id: "SOURCE"}
  - name: ours
    rules:
    - signed_by: {issuer: github, when: "id.repository_id == 'SOURCE'"}
    - provenance: {source_id: "SOURCE"}
`
	return strings.ReplaceAll(strings.Replace(text, "version: 1", "version: "+string(rune('0'+version)), 1), "SOURCE", dev.GitHubID(testkit.Source))
}

// abroadStack is a service that trusts a foreign Sigstore, "vendor", and a key, "other".
type abroadStack struct {
	*testkit.Stack
	vendor *abroad.Sigstore
	key    *abroad.Vendor
	job    attest.Identity
	img    attest.ImageRef
}

func newAbroad(t *testing.T) *abroadStack {
	t.Helper()
	a := &abroadStack{vendor: abroad.New(t), key: abroad.NewVendor(t)}
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a.Stack = testkit.NewStack(t, testkit.Options{Policy: importing(1), Foreign: []foreign.Root{
		{Name: "vendor", TrustedRoot: file("root.json", a.vendor.TrustedRoot()), CertificateLog: foreign.None},
		{Name: "other", Key: file("key.pub", a.key.PEM)},
	}})
	a.job, a.img = a.Identity(a.Token(nil)), a.PushApp("acme/api").ImageRef
	return a
}

func (a *abroadStack) signature(t testing.TB) []byte {
	t.Helper()
	return a.vendor.Bundle(abroad.Statement(t, attest.PredicateSignature, nil, a.img.Digest), abroad.Parts{})
}

func (a *abroadStack) refer(t testing.TB, bundle []byte) attest.Digest {
	t.Helper()
	return abroad.Refer(t, a.img, a.img.Digest, abroad.BundleType, bundle)
}

func (a *abroadStack) doImport(t testing.TB) gate.Imports {
	t.Helper()
	out, err := a.Gate.Import(t.Context(), a.job, a.img)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (a *abroadStack) verify(t testing.TB, stage string) gate.Decision {
	t.Helper()
	p, err := a.Gate.Promote(t.Context(), a.Identity(a.PromoterToken()), gate.PromoteRequest{Ref: a.img, ToStage: stage, DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	return p.Decision
}

// reasons returns why things were skipped, by place.
func reasons(out gate.Imports) map[string]attest.Reason {
	all := map[string]attest.Reason{}
	for _, s := range out.Skipped {
		all[s.Place] = s.Reason
	}
	return all
}

func TestImport(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	said := abroad.Statement(t, "https://slsa.dev/provenance/v1", nil, a.img.Digest)
	content := a.signature(t)
	a.refer(t, content)
	// The same bytes in another place are the same evidence.
	abroad.Refer(t, a.img, a.img.Digest, "application/vnd.dev.sigstore.bundle+json;version=0.3", content)
	a.refer(t, a.vendor.Bundle(said, abroad.Parts{}))
	abroad.Legacy(t, a.img, ".sig", a.vendor.Signature(abroad.Simple(a.img.Digest.String()), time.Time{}), a.key.Signature(abroad.Simple(a.img.Digest.String())))
	abroad.Legacy(t, a.img, ".att", a.vendor.Attestation(said))

	out := a.doImport(t)
	if len(out.Skipped) != 0 {
		t.Errorf("skipped %+v", out.Skipped)
	}
	got := map[string]int{}
	for _, i := range out.Imported {
		got[i.Said.Root+" "+i.Said.Form+" "+i.Said.PredicateType]++
		if i.Repeated || i.Record.Kind != attest.KindImport || len(i.Said.Content)+len(i.Record.Payload) > 0 {
			t.Errorf("imported %+v", i)
		}
		// What is recorded is the evidence itself, who signed it and who imported it.
		rec, err := a.Ledger.Get(t.Context(), i.Record.ID)
		if err != nil {
			t.Fatal(err)
		}
		var p attest.Import
		st := statement(t, rec, &p)
		if attest.Hash(p.Content) != p.Digest || p.Importer != attest.CallerOf(a.job) || p.ImportedAt == "" || p.Root != i.Said.Root ||
			len(st.Subject) != 1 || st.Subject[0].Name != string(a.img.Repository) || st.Subject[0].Digest["sha256"] != a.img.Digest.Hex() {
			t.Errorf("recorded %+v about %+v", p, st.Subject)
		}
		if _, err := a.Gate.Foreign.Verify(t.Context(), p.Form, p.Content, a.img.Digest); err != nil {
			t.Errorf("what is recorded does not verify: %v", err)
		}
	}
	want := map[string]int{
		"vendor bundle " + attest.PredicateSignature: 1, "vendor bundle https://slsa.dev/provenance/v1": 1,
		"vendor cosign-signature " + attest.PredicateSignature: 1, "other cosign-signature " + attest.PredicateSignature: 1,
		"vendor cosign-envelope https://slsa.dev/provenance/v1": 1,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}

	// A second time nothing is recorded, also after a restart, and by another caller.
	size := a.Ledger.Size()
	a.Restart()
	again := a.doImport(t)
	first := map[attest.RecordID]attest.Import{} // the registry's list has no order
	for _, i := range out.Imported {
		first[i.Record.ID] = i.Said
	}
	for _, r := range again.Imported {
		if !r.Repeated || r.Said.Digest != first[r.Record.ID].Digest || r.Said.Signer != first[r.Record.ID].Signer {
			t.Errorf("repeated %+v, first %+v", r, first[r.Record.ID])
		}
	}
	if len(again.Imported) != len(out.Imported) || a.Ledger.Size() != size {
		t.Errorf("%d records after %d", a.Ledger.Size(), size)
	}
	if report := fsck(t, a.Stack); report.Records == 0 {
		t.Error("fsck saw nothing")
	}
}

// Callers who import one image at the same time share one import.
func TestImportConcurrently(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	a.refer(t, a.signature(t))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if out, err := a.Gate.Import(t.Context(), a.job, a.img); err != nil || len(out.Imported) != 1 {
				t.Errorf("%v, %+v", err, out)
			}
		})
	}
	wg.Wait()
	if n := len(find(t, a.Stack, attest.KindImport)); n != 1 {
		t.Errorf("%d records", n)
	}
}

func TestImportRefuses(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	_, err := a.Gate.Import(t.Context(), a.job, a.img)
	wantReason(t, err, attest.NothingToImport)
	a.refer(t, a.signature(t))

	_, err = a.Gate.Import(t.Context(), a.Identity(a.PersonToken("p-1", "audit")), a.img)
	wantReason(t, err, attest.RoleMissing)
	t.Run("G23 the role is for a repository", func(t *testing.T) {
		_, err := a.Gate.Import(t.Context(), a.job, attest.ImageRef{Repository: attest.Repository(a.Registry.Host() + "/other/api"), Digest: a.img.Digest})
		wantReason(t, err, attest.RoleMissing)
	})
	_, err = a.Gate.Import(t.Context(), a.job, attest.ImageRef{Repository: a.img.Repository, Digest: attest.Hash([]byte("absent"))})
	wantReason(t, err, attest.SubjectNotFound)
	fork := a.job
	fork.Unaccepted = "a pull request"
	_, err = a.Gate.Import(t.Context(), fork, a.img)
	wantReason(t, err, attest.EventNotAllowed)

	plain := testkit.NewStack(t, testkit.Options{Policy: strings.NewReplacer("root: vendor", "issuer: github", "root: other", "issuer: github",
		"has(id.key)", "has(id.san)").Replace(importing(1))})
	_, err = plain.Gate.Import(t.Context(), plain.Identity(plain.Token(nil)), plain.PushApp("acme/api").ImageRef)
	wantReason(t, err, attest.RootMismatch)
	if n := len(find(t, a.Stack, attest.KindImport)); n != 0 {
		t.Errorf("%d records of what was refused", n)
	}
}

// Garbage neither passes nor blocks: each row is beside a good signature, and is
// skipped for its reason.
func TestImportSkips(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	stranger, other := abroad.New(t), attest.Hash([]byte("other"))
	bundle := func(s *abroad.Sigstore, d attest.Digest) []byte {
		return s.Bundle(abroad.Statement(t, attest.PredicateSignature, nil, d), abroad.Parts{})
	}
	good := a.signature(t)
	named := func(san, issuer string) []byte {
		return a.vendor.BundleBy(san, issuer, abroad.Statement(t, attest.PredicateSignature, nil, a.img.Digest), abroad.Parts{})
	}
	signed := sign(t, a.Stack, a.Token(nil), a.img)
	want := map[string]attest.Reason{}
	for _, row := range []struct {
		name    string
		content []byte
		reason  attest.Reason
	}{
		{"G08 another's root", bundle(stranger, a.img.Digest), attest.RootMismatch},
		{"G08 a copy of another image's", bundle(a.vendor, other), attest.SubjectMismatch},
		{"G08 unsigned", []byte(`{"mediaType":"` + abroad.BundleType + `"}`), attest.BundleMalformed},
		{"truncated", good[:len(good)/2], attest.BundleMalformed},
		{"D02 no JSON", []byte("signature"), attest.BundleMalformed},
		{"D13 the gate's own name", named(a.URL+"/gate", "https://elsewhere.example"), attest.SignerMismatch},
		{"D13 the service's own name as issuer", named("anybody@example.com", a.URL), attest.SignerMismatch},
	} {
		want[a.refer(t, row.content).String()] = row.reason
	}
	// Ours were attached when the image was signed.
	ours := 0
	want[abroad.Refer(t, a.img, a.img.Digest, abroad.BundleType, good, good).String()] = attest.ManifestAmbiguous
	abroad.Refer(t, a.img, a.img.Digest, "application/spdx+json", []byte("{}"))
	a.refer(t, good)
	tag := abroad.Legacy(t, a.img, ".sig", a.key.Signature([]byte("garbage")), attest.Layer{MediaType: "text/plain", Payload: []byte("x")}, a.key.Signature(abroad.Simple(a.img.Digest.String())))
	want[tag+"#0"], want[tag+"#1"] = attest.StatementMalformed, attest.ManifestAmbiguous

	out := a.doImport(t)
	got := reasons(out)
	for place, reason := range got {
		if reason == attest.NothingToImport {
			ours++
			delete(got, place)
		}
	}
	if d := cmp.Diff(want, got); d != "" || ours != 2 || len(out.Imported) != 2 {
		t.Errorf("%d of ours, %d imported\n%s", ours, len(out.Imported), d)
	}
	if signed.Attach != gate.Attached {
		t.Fatalf("attached: %s", signed.Attach)
	}
	wantResultOf(t, a.verify(t, "live"), "signed_by", "")
}

// A flood of referrers costs a bounded number of requests, and does not hide what is
// listed as a bundle (attacks G07).
func TestG07ReferrerFlood(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	for i := range 140 {
		abroad.Refer(t, a.img, a.img.Digest, "application/vnd.example.noise", []byte(strings.Repeat("x", i+1)))
	}
	a.refer(t, a.signature(t))
	out := a.doImport(t)
	if len(out.Imported) != 1 || len(out.Skipped) != 1 || out.Skipped[0].Reason != attest.TooLarge || !strings.Contains(out.Skipped[0].Message, "13 further") {
		t.Errorf("imported %d, skipped %+v", len(out.Imported), out.Skipped)
	}
}

// What counts is an image signature, under the root that the rule names, by whom the
// rule names; an import never stands for the service's own signature or provenance.
func TestImportCountsForItsRootOnly(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	live := func(want attest.Reason) {
		t.Helper()
		wantResultOf(t, a.verify(t, "live"), "signed_by", want)
	}
	live(attest.NotSigned)

	// D01: an attestation is no signature, whatever it says, even a provenance.
	a.refer(t, a.vendor.Bundle(abroad.Statement(t, attest.PredicateProvenance, map[string]any{
		"predicate": map[string]any{"buildDefinition": map[string]any{"buildType": attest.BuildTypeGitHub}, "runDetails": map[string]any{"builder": map[string]any{"id": a.URL + "/builders/github/hosted/v1"}}},
	}, a.img.Digest), abroad.Parts{}))
	a.refer(t, a.vendor.Bundle(abroad.Statement(t, "https://sigstore.dev/cosign/sign/v1x", nil, a.img.Digest), abroad.Parts{}))
	if n := len(a.doImport(t).Imported); n != 2 {
		t.Fatalf("%d imported", n)
	}
	live(attest.NotSigned)
	wantResultOf(t, a.verify(t, "live"), "provenance", attest.NoProvenance)

	// D13: another root, another signer.
	abroad.Legacy(t, a.img, ".sig", a.key.Signature(abroad.Simple(a.img.Digest.String())))
	a.doImport(t)
	live(attest.RootMismatch)
	wantResultOf(t, a.verify(t, "twin"), "signed_by", "")
	a.refer(t, a.vendor.BundleBy("intern@vendor.example", abroad.Issuer, abroad.Statement(t, attest.PredicateSignature, nil, a.img.Digest), abroad.Parts{}))
	a.doImport(t)
	live(attest.SignerMismatch)

	// The signer that the rule names. Still no provenance: nothing is promoted.
	a.refer(t, a.signature(t))
	a.doImport(t)
	live("")
	d := a.verify(t, "live")
	wantDenied(t, d, attest.NoProvenance)
	wantResultOf(t, a.verify(t, "ours"), "signed_by", attest.NotSigned)
	check, err := a.Gate.Verify(t.Context(), auditor(a.Stack), gate.VerifyRequest{Ref: a.img})
	if err != nil {
		t.Fatal(err)
	}
	wantDenied(t, check, attest.NotSigned)

	// With the service's own provenance it is.
	sign(t, a.Stack, a.Token(nil), a.img)
	p := done(t, a.Stack, gate.PromoteRequest{Ref: a.img, ToStage: "live"})
	if p.Verdict != gate.Allowed {
		t.Errorf("%+v", p.Results)
	}
	// It is about this repository; a copy elsewhere starts with nothing.
	if n := len(find(t, a.Stack, attest.KindImport, about(a.img.Digest))); n != 5 {
		t.Errorf("%d records", n)
	}
	// And the summary names the import among what it rests on.
	var vsa struct {
		InputAttestations []struct {
			Digest map[string]string `json:"digest"`
		} `json:"inputAttestations"`
	}
	var env struct {
		DSSE struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(p.VSABundle, &env); err != nil {
		t.Fatal(err)
	}
	var st attest.Statement
	if err := json.Unmarshal(env.DSSE.Payload, &st); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(st.Predicate, &vsa); err != nil || len(vsa.InputAttestations) != 2 {
		t.Errorf("input attestations %+v, %v", vsa.InputAttestations, err)
	}
}

// wantResultOf checks the one result of a rule; "" is that it passed.
func wantResultOf(t testing.TB, d gate.Decision, rule string, want attest.Reason) {
	t.Helper()
	for _, r := range d.Results {
		if r.Rule == rule {
			if r.Reason != want || (r.Outcome == attest.OK) != (want == "") {
				t.Errorf("%s: %s %s (%s), want %q", rule, r.Outcome, r.Reason, r.Found, want)
			}
			return
		}
	}
	t.Errorf("no result of %s: %+v", rule, d.Results)
}

// The largest evidence that is taken fits into a record, its bundle and the ledger,
// and a decision does not read it: no rule asks for it.
func TestImportLarge(t *testing.T) {
	t.Parallel()
	a := newAbroad(t)
	a.refer(t, a.key.Bundle(abroad.Statement(t, "https://spdx.dev/Document/v2.3", map[string]any{
		"predicate": map[string]any{"text": strings.Repeat("a", 11<<20)}, // in base64 just below the limit
	}, a.img.Digest)))
	out := a.doImport(t)
	if len(out.Imported) != 1 {
		t.Fatalf("imported %d, skipped %+v", len(out.Imported), out.Skipped)
	}
	item, err := a.Gate.Record(t.Context(), auditor(a.Stack), out.Imported[0].Record.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Verifier.Bundle(item.Bundle, a.img.Digest); err != nil {
		t.Error(err)
	}
	wantResultOf(t, a.verify(t, "live"), "signed_by", attest.NotSigned)
}
