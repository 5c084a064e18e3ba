package verifier_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

// What the service signs is evidence, by record and by bundle, and plain
// sigstore-go agrees (H11 of the important direction: never more than it).
func TestRoundTrip(t *testing.T) {
	w := newWorld(t)
	img := image
	img.Platforms = []attest.Platform{{Name: "linux/amd64", Digest: attest.Hash([]byte("amd64"))}, {Name: "linux/arm64", Digest: attest.Hash([]byte("arm64"))}}
	id := identity()
	ci := verifier.Signer{SAN: id.SAN, Issuer: id.Issuer, Build: id.Build}
	gate := verifier.Signer{Gate: true, SAN: service + "/gate", Issuer: service}
	promotion := must(attest.PromotionStatement(img, attest.Promotion{Decided: attest.Decided{Track: "payments", Stage: "test"}}))(t)
	denial := must(attest.DenialStatement(img.Ref, attest.Denial{}))(t)
	effect := must(attest.EffectStatement(img.Ref, attest.Effect{}))(t)
	policy := must(attest.PolicyStatement(attest.PolicyChange{Version: 1, Digest: img.Ref.Digest}))(t)
	vsa := must(attest.VSAStatement(service, img, attest.Promotion{}))(t)
	for _, row := range []struct {
		name     string
		envelope attest.Envelope
		kind     attest.RecordKind
		signer   verifier.Signer
		covers   []attest.Digest
	}{
		{"signature", w.by(id, must(attest.SignatureStatement(img, "r"))(t)), attest.KindSignature, ci, img.Digests()},
		{"provenance", w.by(id, provenance(t, id, img)), attest.KindProvenance, ci, img.Digests()},
		{"summary by certificate", w.by(attest.GateIdentity(service), vsa), attest.KindVSA, gate, img.Digests()},
		{"summary by key", w.gate(vsa), attest.KindVSA, gate, img.Digests()},
		{"promotion", w.gate(promotion), attest.KindPromotion, gate, img.Digests()},
		{"denial", w.gate(denial), attest.KindDenial, gate, []attest.Digest{img.Ref.Digest}},
		{"effect", w.gate(effect), attest.KindEffect, gate, []attest.Digest{img.Ref.Digest}},
		{"policy", w.gate(policy), attest.KindPolicy, gate, []attest.Digest{img.Ref.Digest}},
		{"other evidence", w.by(id, statementOf("https://example.com/test/v1", `{"ok":true}`)), attest.KindEvidence, ci, []attest.Digest{image.Ref.Digest}},
	} {
		t.Run(row.name, func(t *testing.T) {
			must0(t, w.verifier.Envelope(row.envelope))
			r := w.log(row.envelope)
			byRecord := must(w.verifier.Record(r))(t)
			raw := w.bundle(r)
			for _, d := range row.covers {
				byBundle := must(w.verifier.Bundle(raw, d))(t)
				if !w.accepts(raw, d) {
					t.Fatalf("plain sigstore-go refuses what was accepted for %s", d)
				}
				if !byBundle.Covers(d) || byBundle.ID() != byRecord.ID() || byBundle.EnvelopeDigest() != byRecord.EnvelopeDigest() {
					t.Fatalf("bundle and record are not the same evidence")
				}
			}
			want := must(r.DSSE())(t)
			if byRecord.ID() != r.ID || byRecord.Index() != r.Index || byRecord.Kind() != row.kind || byRecord.EnvelopeDigest() != attest.Hash(want) || !byRecord.Time().Equal(w.now) {
				t.Errorf("evidence %s %d %s %s", byRecord.ID(), byRecord.Index(), byRecord.Kind(), byRecord.Time())
			}
			if diff := cmp.Diff(row.signer, byRecord.Signer()); diff != "" {
				t.Errorf("signer (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(row.covers, byRecord.Digests()); diff != "" {
				t.Errorf("digests (-want +got):\n%s", diff)
			}
			if byRecord.Covers(attest.Hash([]byte("other"))) || len(byRecord.Names()) != len(row.covers) {
				t.Errorf("covers too much, or names %q", byRecord.Names())
			}
			p, ok := byRecord.Provenance()
			if _, _, commit := p.Source(); ok != (row.kind == attest.KindProvenance) || (ok && commit != id.Build.Commit) {
				t.Errorf("provenance %v, commit %q", ok, commit)
			}
		})
	}
}

// The gate's name in a certificate of another issuer is not the gate.
func TestGateIsNotOnlyAName(t *testing.T) {
	w := newWorld(t)
	must0(t, w.verifier.Envelope(w.forge(forged{}, statementOf("https://example.com/x", "{}"))))
	e := w.forge(forged{certificate: name(service + "/gate")}, must(attest.VSAStatement(service, image, attest.Promotion{}))(t))
	if got := attest.ReasonOf(w.verifier.Envelope(e)); got != attest.SignerMismatch {
		t.Fatalf("a summary by a stranger with the gate's name: %q", got)
	}
	e = w.forge(forged{vouches: service}, must(attest.VSAStatement(service, image, attest.Promotion{}))(t))
	if got := attest.ReasonOf(w.verifier.Envelope(e)); got != attest.SignerMismatch {
		t.Fatalf("a summary by somebody else whom the service vouches for: %q", got)
	}
	must0(t, w.verifier.Envelope(w.forge(forged{vouches: service, certificate: name(service + "/gate")}, e.Payload)))
}

// One image under two names is one image.
func TestDigestsAreListedOnce(t *testing.T) {
	w := newWorld(t)
	payload := must(attest.SignatureStatement(image, "r"))(t)
	var s attest.Statement
	must0(t, json.Unmarshal(payload, &s))
	s.Subject = append(s.Subject, attest.Subject{Name: "other", Digest: s.Subject[0].Digest})
	ev := must(w.verifier.Record(w.log(w.by(identity(), must(json.Marshal(s))(t)))))(t)
	if len(ev.Digests()) != 1 || len(ev.Names()) != 2 {
		t.Fatalf("digests %v, names %q", ev.Digests(), ev.Names())
	}
}

func TestNoFalseDerivations(t *testing.T) {
	w := newWorld(t)
	id := identity()
	id.Provider, id.Build.WorkflowName = "generic", ""
	id.Build.ConfigURI = "https://github.com/evil/api/.github/workflows/release.yml@refs/heads/main"
	id.Build.RunURI = "https://github.com/acme/api/actions/runs/9912/attempts/1?x=2"
	s := must(w.verifier.Record(w.log(w.by(id, must(attest.SignatureStatement(image, "r"))(t)))))(t).Signer()
	if s.Build.WorkflowPath != "" || s.Build.RunID != "" || s.Build.RunAttempt != "" || s.Build.Repository != "acme/api" {
		t.Fatalf("derived %+v", s.Build)
	}
}

// What a certificate's URIs say is what the claims said, for every provider that
// names a file or a run.
func TestDerivations(t *testing.T) {
	const commit, job = "4be1d0c7a2f6b8d9e0f1a2b3c4d5e6f708192a3b", "0184990a-477b-4fa8-9968-496074483cee"
	w := newWorld(t)
	for _, row := range []struct {
		name  string
		build attest.Build
	}{
		{"gitlab", attest.Build{
			SourceURI: "https://gitlab.com/acme/shop/api", Repository: "acme/shop/api", Commit: commit, Ref: "refs/heads/a@b",
			ConfigURI: "https://gitlab.com/acme/shop/api//ci/release.yml@refs/heads/a@b", WorkflowPath: "ci/release.yml",
			RunURI: "https://gitlab.com/acme/shop/api/-/jobs/9123456789", JobID: "9123456789",
		}},
		{"gitlab, shared configuration", attest.Build{
			SourceURI: "https://gitlab.com/acme/shop/api", Repository: "acme/shop/api", Commit: commit, Ref: "refs/heads/main",
			RunURI: "https://gitlab.com/acme/shop/api/-/jobs/9123456789", JobID: "9123456789",
		}},
		{"B04 gitlab, another project's file", attest.Build{
			SourceURI: "https://gitlab.com/acme/shop/api", Repository: "acme/shop/api", Commit: commit, Ref: "refs/heads/main",
			ConfigURI: "https://gitlab.com/acme/shop/api-evil//ci.yml@refs/heads/main",
		}},
		{"B12 gitlab, another project's job", attest.Build{
			SourceURI: "https://gitlab.com/acme/shop/api", Repository: "acme/shop/api", Commit: commit,
			RunURI: "https://gitlab.com/acme/shop/api2/-/jobs/7",
		}},
		{"buildkite", attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", Commit: commit, Ref: "refs/heads/main",
			RunURI: "https://buildkite.com/acme-inc/app/builds/1234567#" + job, RunID: "1234567", JobID: job,
		}},
		{"B12 buildkite, more after the job", attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", Commit: commit,
			RunURI: "https://buildkite.com/acme-inc/app/builds/1234567#" + job + "x",
		}},
		{"B12 buildkite, a float", attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", Commit: commit,
			RunURI: "https://buildkite.com/acme-inc/app/builds/1.234567e+06#" + job,
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			id := identity()
			id.Provider, id.Build = "generic", row.build
			s := must(w.verifier.Record(w.log(w.by(id, must(attest.SignatureStatement(image, "r"))(t)))))(t).Signer()
			if diff := cmp.Diff(row.build, s.Build); diff != "" {
				t.Fatalf("build (-claims +certificate):\n%s", diff)
			}
		})
	}
}

func TestPrecertificate(t *testing.T) {
	w := newWorld(t)
	c := must(w.signer.Credential(identity()))(t)
	must0(t, w.verifier.Envelope(c.Precertificate))
	if _, err := w.verifier.Record(w.log(c.Precertificate)); attest.ReasonOf(err) != attest.PayloadType {
		t.Errorf("a precertificate as evidence: %v", err)
	}
	for _, row := range []struct {
		name  string
		alter func(*attest.Envelope)
		want  attest.Reason
	}{
		{"C14 the certificate itself", func(e *attest.Envelope) { e.Payload = c.Certificate }, attest.CertificateInvalid},
		{"signature altered", func(e *attest.Envelope) { e.Signature = mangled(e.Signature) }, attest.SignatureInvalid},
		{"altered", func(e *attest.Envelope) { e.Payload = mangled(e.Payload) }, attest.CertificateInvalid},
		{"J01 no DER", func(e *attest.Envelope) { e.Payload = []byte("x") }, attest.CertificateInvalid},
		{"H05 by the gate key", func(e *attest.Envelope) { e.PublicKey = spki(t, &w.keys["gate"].PublicKey) }, attest.CertificateInvalid},
		{"with a certificate", func(e *attest.Envelope) { e.Certificate = c.Certificate }, attest.BundleMalformed},
		{"C03 endless", func(e *attest.Envelope) { e.Payload = make([]byte, 20<<10) }, attest.TooLarge},
		{"C03 endless signature", func(e *attest.Envelope) { e.Signature = make([]byte, 200) }, attest.TooLarge},
		{"with a timestamp", func(e *attest.Envelope) { e.Timestamp = []byte{1} }, attest.BundleMalformed},
		{"an authority", func(e *attest.Envelope) { e.Payload = w.ca.Raw }, attest.CertificateInvalid},
		{"A24 of a certificate with two uses", func(e *attest.Envelope) {
			*e = w.precertificate(forged{certificate: func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }})
		}, attest.CertificateInvalid},
		{"of a good certificate", func(e *attest.Envelope) { *e = w.precertificate(forged{}) }, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := c.Precertificate
			row.alter(&e)
			if got := attest.ReasonOf(w.verifier.Envelope(e)); got != row.want {
				t.Errorf("reason %q, want %q", got, row.want)
			}
		})
	}
}

// K09: rows of the index that somebody has changed.
func TestRecordAltered(t *testing.T) {
	w := newWorld(t)
	good := w.log(w.by(identity(), provenance(t, identity(), image)))
	other := w.log(w.by(identity(), must(attest.SignatureStatement(image, "r"))(t)))
	must(w.verifier.Record(good))(t)
	for _, row := range []struct {
		name  string
		alter func(*attest.Record)
		want  attest.Reason
	}{
		{"id", func(r *attest.Record) { r.ID = other.ID }, attest.LogEntryMismatch},
		{"index", func(r *attest.Record) { r.Index++ }, attest.LogProofInvalid},
		{"huge index", func(r *attest.Record) { r.Index = 1 << 63 }, attest.LogProofInvalid},
		{"size", func(r *attest.Record) { r.TreeSize++ }, attest.CheckpointInvalid},
		{"proof", func(r *attest.Record) { r.Proof = other.Proof }, attest.LogProofInvalid},
		{"checkpoint", func(r *attest.Record) { r.Checkpoint = mangled(r.Checkpoint) }, attest.CheckpointInvalid},
		{"payload", func(r *attest.Record) { r.Payload = other.Payload }, attest.SignatureInvalid},
		{"whole envelope", func(r *attest.Record) { r.Envelope, r.ID = other.Envelope, other.ID }, attest.LogProofInvalid},
		{"C16 gate key beside the certificate", func(r *attest.Record) { r.PublicKey = spki(t, &w.keys["gate"].PublicKey) }, attest.BundleMalformed},
		{"neither certificate nor key", func(r *attest.Record) { r.Certificate = nil }, attest.BundleMalformed},
		{"C03 endless signature", func(r *attest.Record) { r.Signature = make([]byte, 200) }, attest.TooLarge},
		{"C03 endless key", func(r *attest.Record) { r.Certificate, r.PublicKey = nil, make([]byte, 20<<10) }, attest.TooLarge},
		{"J05 log of 2^63 entries", func(r *attest.Record) {
			root := r.ID[:]
			r.Index, r.TreeSize, r.Proof = 0, 1<<63, nil
			for range 63 {
				r.Proof = append(r.Proof, make([]byte, 32))
				root = rfc6962.DefaultHasher.HashChildren(root, make([]byte, 32))
			}
			r.Checkpoint = w.checkpoint("log", w.signer.Origin(), r.TreeSize, root)
		}, attest.CheckpointInvalid},
		{"C12 no timestamp", func(r *attest.Record) { r.Timestamp = nil }, attest.TimestampInvalid},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := good
			row.alter(&r)
			ev, err := w.verifier.Record(r)
			if got := attest.ReasonOf(err); got != row.want || ev != nil {
				t.Errorf("evidence %v, %v, want %q", ev, err, row.want)
			}
		})
	}
	lying := good
	lying.Facts = attest.Facts{Kind: attest.KindPromotion, Time: time.Unix(0, 0)}
	if ev := must(w.verifier.Record(lying))(t); ev.Kind() != attest.KindProvenance || !ev.Time().Equal(w.now) {
		t.Errorf("the index's word was taken: %s %s", ev.Kind(), ev.Time())
	}
}

// C13: a verifier that knows nothing panics inside and accepts nothing.
func TestZeroVerifierAcceptsNothing(t *testing.T) {
	w := newWorld(t)
	r := w.log(w.by(identity(), provenance(t, identity(), image)))
	for name, v := range map[string]*verifier.Verifier{"C13 zero": {}, "C13 nil": nil} {
		t.Run(name, func(t *testing.T) {
			if got := attest.ReasonOf(v.Envelope(r.Envelope)); got != attest.BundleMalformed {
				t.Errorf("Envelope: %q", got)
			}
			if ev, err := v.Record(r); attest.ReasonOf(err) != attest.BundleMalformed || ev != nil {
				t.Errorf("Record: %v, %v", ev, err)
			}
			if ev, err := v.Bundle(w.bundle(r), image.Ref.Digest); attest.ReasonOf(err) != attest.BundleMalformed || ev != nil {
				t.Errorf("Bundle: %v, %v", ev, err)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	w := newWorld(t)
	alter := func(change func(b map[string]any)) []byte { return edit(t, w.signer.TrustedRoot(), change) }
	without := func(name string) []byte { return alter(func(b map[string]any) { delete(b, name) }) }
	for _, row := range []struct {
		name       string
		root, gate []byte
	}{
		{"D08 no authority", without("certificateAuthorities"), nil},
		{"D08 no log", without("tlogs"), nil},
		{"C14 no certificate log", without("ctlogs"), nil},
		{"E02 no timestamp authority", without("timestampAuthorities"), nil},
		{"C18 other version", alter(func(b map[string]any) {
			b["mediaType"] = "application/vnd.dev.sigstore.trustedroot.v0.2+json"
		}), nil},
		{"E02 timestamp authority without its certificate", alter(func(b map[string]any) {
			chain := in(b, "timestampAuthorities", 0, "certChain").(map[string]any)
			chain["certificates"] = chain["certificates"].([]any)[1:]
		}), nil},
		{"E01 timestamp authority of another root", alter(func(b map[string]any) {
			in(b, "timestampAuthorities", 0, "certChain", "certificates", 1).(map[string]any)["rawBytes"] = b64(newWorld(t).root.Raw)
		}), nil},
		{"authority without intermediate", alter(func(b map[string]any) {
			chain := in(b, "certificateAuthorities", 0, "certChain").(map[string]any)
			chain["certificates"] = chain["certificates"].([]any)[1:]
		}), nil},
		{"log without address", alter(func(b map[string]any) { delete(in(b, "tlogs", 0).(map[string]any), "baseUrl") }), nil},
		{"no JSON", []byte("{"), nil},
		{"gate key is no PEM", w.signer.TrustedRoot(), []byte("x")},
		{"gate key is a certificate", w.signer.TrustedRoot(), []byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n")},
		{"H06 gate key is P-384", w.signer.TrustedRoot(), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki(t, &must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t).PublicKey)})},
		{"gate key is no key", w.signer.TrustedRoot(), []byte("-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n")},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := verifier.New(row.root, row.gate, service); attest.ReasonOf(err) != attest.BadConfig {
				t.Errorf("New = %v", err)
			}
		})
	}
}

// Without a gate key nothing that it signed counts, and certificates still do.
func TestWithoutGateKey(t *testing.T) {
	w := newWorld(t)
	v := must(verifier.New(w.signer.TrustedRoot(), nil, service))(t)
	vsa := must(attest.VSAStatement(service, image, attest.Promotion{}))(t)
	must(v.Record(w.log(w.by(attest.GateIdentity(service), vsa))))(t)
	r := w.log(w.gate(vsa))
	if _, err := v.Record(r); attest.ReasonOf(err) != attest.SignerMismatch {
		t.Errorf("Record: %v", err)
	}
	if _, err := v.Bundle(w.bundle(r), image.Ref.Digest); attest.ReasonOf(err) != attest.SignerMismatch {
		t.Errorf("Bundle: %v", err)
	}
}

// C05: the gate key counts from when the trust root says.
func TestGateKeyWindow(t *testing.T) {
	w := newWorld(t)
	late := edit(t, w.signer.TrustedRoot(), func(b map[string]any) {
		in(b, "certificateAuthorities", 0, "validFor").(map[string]any)["start"] = w.now.Add(time.Minute).UTC().Format(time.RFC3339)
	})
	v := must(verifier.New(late, w.signer.GateKeyPEM(), service))(t)
	payload := must(attest.DenialStatement(image.Ref, attest.Denial{}))(t)
	if _, err := v.Record(w.log(w.gate(payload))); attest.ReasonOf(err) != attest.CertificateInvalid {
		t.Errorf("C05 before the window: %v", err)
	}
	// With an older authority beside it, the older one's beginning counts.
	both := edit(t, late, func(b map[string]any) {
		var old map[string]any
		must0(t, json.Unmarshal(w.signer.TrustedRoot(), &old))
		b["certificateAuthorities"] = append(b["certificateAuthorities"].([]any), old["certificateAuthorities"].([]any)...)
	})
	must(must(verifier.New(both, w.signer.GateKeyPEM(), service))(t).Record(w.log(w.gate(payload))))(t)
	w.now = w.now.Add(2 * time.Minute)
	must(v.Record(w.log(w.gate(payload))))(t)
}

// E11: the authority of the trust root counts only in its own window.
func TestAuthorityWindow(t *testing.T) {
	w := newWorld(t)
	r := w.log(w.by(identity(), provenance(t, identity(), image)))
	for _, row := range []struct {
		authority, bound string
		at               time.Duration
		want             attest.Reason
	}{
		{"certificateAuthorities", "end", time.Hour, ""},
		{"certificateAuthorities", "end", -time.Second, attest.CertificateInvalid},
		{"certificateAuthorities", "start", time.Minute, attest.CertificateInvalid},
		{"timestampAuthorities", "end", time.Hour, ""},
		{"timestampAuthorities", "end", -time.Second, attest.TimestampInvalid},
		{"timestampAuthorities", "start", time.Minute, attest.TimestampInvalid},
	} {
		t.Run("E11 "+row.authority+" "+row.bound+" "+row.at.String(), func(t *testing.T) {
			tr := edit(t, w.signer.TrustedRoot(), func(b map[string]any) {
				in(b, row.authority, 0, "validFor").(map[string]any)[row.bound] = w.now.Add(row.at).UTC().Format(time.RFC3339)
			})
			_, err := must(verifier.New(tr, w.signer.GateKeyPEM(), service))(t).Record(r)
			if got := attest.ReasonOf(err); got != row.want {
				t.Errorf("%v, want %q", err, row.want)
			}
		})
	}
}

// E02: sigstore-go has the final word. It asks more of a timestamp authority's
// certificate than the checks before it do.
func TestSigstoreHasTheFinalWord(t *testing.T) {
	w := newWorld(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: w.tsa.Subject, NotBefore: w.tsa.NotBefore, NotAfter: w.tsa.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping}, // not critical
	}
	der := must(x509.CreateCertificate(rand.Reader, template, w.root, w.keys["tsa"].Public(), w.keys["root"]))(t)
	w.tsa = must(x509.ParseCertificate(der))(t)
	tr := edit(t, w.signer.TrustedRoot(), func(b map[string]any) {
		in(b, "timestampAuthorities", 0, "certChain", "certificates", 0).(map[string]any)["rawBytes"] = b64(der)
	})
	v := must(verifier.New(tr, w.signer.GateKeyPEM(), service))(t)
	r := w.log(w.forge(forged{}, statementOf("https://example.com/x", "{}")))
	must0(t, v.Envelope(r.Envelope))
	if ev, err := v.Record(r); attest.ReasonOf(err) != attest.SignatureInvalid || ev != nil {
		t.Errorf("E02 Record: %v, %v", ev, err)
	}
	if ev, err := v.Bundle(w.bundle(r), image.Ref.Digest); attest.ReasonOf(err) != attest.SignatureInvalid || ev != nil {
		t.Errorf("E02 Bundle: %v, %v", ev, err)
	}
}

// statementOf is a well-formed statement about image.
func statementOf(predicateType, predicate string) []byte {
	raw, err := json.Marshal(attest.Statement{
		Type:    attest.StatementType,
		Subject: []attest.Subject{{Name: "registry.example.com/payments/api", Digest: map[string]string{"sha256": image.Ref.Digest.Hex()}}}, PredicateType: predicateType,
		Predicate: json.RawMessage(predicate),
	})
	if err != nil {
		panic(err)
	}
	return raw
}

// mangled returns b with one bit altered near the end, where DER and PEM hold values.
func mangled(b []byte) []byte {
	out := append([]byte(nil), b...)
	out[len(out)-6] ^= 1
	return out
}

func BenchmarkEnvelope(b *testing.B) {
	w := newWorld(b)
	e := w.by(identity(), provenance(b, identity(), image))
	for b.Loop() {
		must0(b, w.verifier.Envelope(e))
	}
}

func BenchmarkEnvelopeNewCertificate(b *testing.B) {
	w := newWorld(b)
	payload := provenance(b, identity(), image)
	for b.Loop() {
		b.StopTimer()
		id := identity()
		id.TokenID = attest.Key(time.Now().String())
		e := w.by(id, payload)
		b.StartTimer()
		must0(b, w.verifier.Envelope(e))
	}
}

func BenchmarkRecord(b *testing.B) {
	w := newWorld(b)
	r := w.log(w.by(identity(), provenance(b, identity(), image)))
	for b.Loop() {
		must(w.verifier.Record(r))(b)
	}
}

func BenchmarkBundle(b *testing.B) {
	w := newWorld(b)
	raw := w.bundle(w.log(w.by(identity(), provenance(b, identity(), image))))
	for b.Loop() {
		must(w.verifier.Bundle(raw, image.Ref.Digest))(b)
	}
}
