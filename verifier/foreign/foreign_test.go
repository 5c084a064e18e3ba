package foreign_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/sigstore-go/pkg/root"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

var (
	image = attest.Hash([]byte("image"))
	other = attest.Hash([]byte("other"))
)

const provenance = "https://slsa.dev/provenance/v1"

// open opens one root called vendor over the file's bytes.
func open(t testing.TB, root foreign.Root, file []byte) (*foreign.Roots, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "root")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	if root.Name == "" {
		root.Name = "vendor"
	}
	if root.Key != "" {
		root.Key = path
	} else {
		root.TrustedRoot = path
	}
	return foreign.Open([]foreign.Root{root})
}

func mustOpen(t testing.TB, root foreign.Root, file []byte) *foreign.Roots {
	t.Helper()
	r, err := open(t, root, file)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Roots as they are configured: VirtualSigstore keeps no certificate log.
var (
	logged  = foreign.Root{CertificateLog: foreign.None}
	stamped = foreign.Root{CertificateLog: foreign.None, Log: foreign.None}
	byKey   = foreign.Root{Key: "vendor.pub"}
)

// world is two foreign Sigstores and two vendors: one that is trusted, and one of
// the same kind that is not.
type world struct {
	ours, theirs     *abroad.Sigstore
	vendor, stranger *abroad.Vendor

	logged, stamped, key *foreign.Roots
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{abroad.New(t), abroad.New(t), abroad.NewVendor(t), abroad.NewVendor(t), nil, nil, nil}
	w.logged = mustOpen(t, logged, w.ours.TrustedRoot())
	w.stamped = mustOpen(t, stamped, w.ours.TrustedRoot("log"))
	w.key = mustOpen(t, byKey, w.vendor.PEM)
	return w
}

func say(t testing.TB, digests ...attest.Digest) []byte {
	t.Helper()
	return abroad.Statement(t, provenance, nil, digests...)
}

func TestVerify(t *testing.T) {
	w := newWorld(t)
	person := attest.Foreigner{SAN: abroad.SAN, Issuer: abroad.Issuer}
	vendor := attest.Foreigner{Key: w.vendor.KeyID}
	simple := abroad.Simple(image.String())
	for _, row := range []struct {
		name     string
		roots    *foreign.Roots
		form     string
		content  []byte
		who      attest.Foreigner
		says     string
		unproved bool // when it was signed
	}{
		{"bundle 0.3 with a log entry", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{}), person, provenance, false},
		{"bundle 0.3 with the log's time only", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{NoStamp: true}), person, provenance, false},
		{"bundle 0.2", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{Version: "0.2"}), person, provenance, false},
		{"bundle 0.1", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{Version: "0.1"}), person, provenance, false},
		{"GitHub: a timestamp and no log", w.stamped, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{NoLog: true}), person, provenance, false},
		{"a log entry that nobody asked for", w.stamped, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{}), person, provenance, false},
		{"image signature of cosign 3", w.logged, attest.FormBundle,
			w.ours.Bundle(abroad.Statement(t, attest.PredicateSignature, nil, image), abroad.Parts{}), person, attest.PredicateSignature, false},
		{"index with its platforms", w.logged, attest.FormBundle, w.ours.Bundle(say(t, other, image), abroad.Parts{}), person, provenance, false},
		{"statement 0.1", w.logged, attest.FormBundle,
			w.ours.Bundle(abroad.Statement(t, provenance, map[string]any{"_type": "https://in-toto.io/Statement/v0.1"}, image), abroad.Parts{}), person, provenance, false},
		{"legacy signature", w.logged, attest.FormSignature, abroad.JSON(t, w.ours.Signature(simple, time.Time{})), person, attest.PredicateSignature, false},
		{"legacy signature with a timestamp and no log", w.stamped, attest.FormSignature,
			abroad.JSON(t, lacking(w.ours.Signature(simple, time.Time{}), "bundle")), person, attest.PredicateSignature, false},
		{"legacy attestation", w.logged, attest.FormEnvelope, abroad.JSON(t, w.ours.Attestation(say(t, image))), person, provenance, false},
		{"legacy attestation with a timestamp and no log", w.stamped, attest.FormEnvelope,
			abroad.JSON(t, lacking(w.ours.Attestation(say(t, image)), "bundle")), person, provenance, false},
		{"bundle by a key", w.key, attest.FormBundle, w.vendor.Bundle(say(t, image)), vendor, provenance, true},
		{"legacy signature by a key", w.key, attest.FormSignature, abroad.JSON(t, w.vendor.Signature(simple)), vendor, attest.PredicateSignature, true},
		{"legacy attestation by a key", w.key, attest.FormEnvelope, abroad.JSON(t, w.vendor.Attestation(say(t, image))), vendor, provenance, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := row.roots.Verify(t.Context(), row.form, row.content, image)
			if err != nil {
				t.Fatal(err)
			}
			want := attest.Import{
				Root: "vendor", RootDigest: row.roots.Describe()[0].Digest, Form: row.form, Digest: attest.Hash(row.content),
				Content: row.content, Signer: row.who, PredicateType: row.says, SignedAt: got.SignedAt,
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
			at, err := time.Parse(time.RFC3339, got.SignedAt)
			if row.unproved != (got.SignedAt == "") || !row.unproved && (err != nil || time.Since(at).Abs() > 6*time.Minute) {
				t.Errorf("signed at %q", got.SignedAt)
			}
			// Nobody else's root vouches for it.
			for name, roots := range map[string]*foreign.Roots{
				"D13 another Sigstore": mustOpen(t, logged, w.theirs.TrustedRoot()), "another Sigstore without a log": mustOpen(t, stamped, w.theirs.TrustedRoot("log")),
				"another key": mustOpen(t, byKey, w.stranger.PEM), "no root": nil,
			} {
				if got, err := roots.Verify(t.Context(), row.form, row.content, image); attest.ReasonOf(err) != attest.RootMismatch || !cmp.Equal(got, attest.Import{}) {
					t.Errorf("%s: %v, %+v", name, err, got)
				}
			}
			// Nor is it about another image (attacks D06).
			if _, err := row.roots.Verify(t.Context(), row.form, row.content, attest.Hash([]byte("third"))); attest.ReasonOf(err) != attest.SubjectMismatch {
				t.Errorf("about a third image: %v", err)
			}
		})
	}
}

// lacking returns a layer without one of cosign's annotations.
func lacking(l attest.Layer, part string) attest.Layer { return with(l, part, "") }

// with returns a layer with another value for one of cosign's annotations, none for "".
func with(l attest.Layer, part, value string) attest.Layer {
	l.Annotations = maps.Clone(l.Annotations)
	key := "dev.sigstore.cosign/" + part
	if part == "signature" {
		key = "dev.cosignproject.cosign/" + part
	}
	if l.Annotations[key] = value; value == "" {
		delete(l.Annotations, key)
	}
	return l
}

// What a foreign service with every part of a Sigstore vouches for: another Hallmark.
func TestAnotherHallmark(t *testing.T) {
	abroad := notary.New(t)
	img := attest.Image{Ref: attest.ImageRef{Repository: "registry.example.com/acme/api", Digest: image}}
	id := attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload, Issuer: "https://token.actions.githubusercontent.com", Subject: "s",
		SAN: "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main", TokenID: strings.Repeat("a", 64), Expires: time.Now().Add(time.Hour),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", RepositoryID: "1296269", Ref: "refs/heads/main",
			Commit: strings.Repeat("4", 40), Runner: "github-hosted", RunURI: "https://github.com/acme/api/actions/runs/1/attempts/1",
		},
	}
	statement, err := attest.SignatureStatement(img, attest.SignKey(img.Ref, id, "", nil))
	if err != nil {
		t.Fatal(err)
	}
	cred, err := abroad.Signer.Credential(id)
	if err != nil {
		t.Fatal(err)
	}
	env, err := abroad.Signer.Sign(cred, statement)
	if err != nil {
		t.Fatal(err)
	}
	content, err := abroad.Record(t, env).Bundle(abroad.Signer.LogID())
	if err != nil {
		t.Fatal(err)
	}
	roots := mustOpen(t, foreign.Root{}, abroad.Signer.TrustedRoot())
	got, err := roots.Verify(t.Context(), attest.FormBundle, content, image)
	if err != nil {
		t.Fatal(err)
	}
	if got.Signer.SAN != id.SAN || got.Signer.Issuer != id.Issuer || got.Signer.Build.Commit != id.Build.Commit || got.Signer.Build.RepositoryID != "1296269" {
		t.Errorf("signer %+v", got.Signer)
	}
	if _, err := mustOpen(t, foreign.Root{}, notary.New(t).Signer.TrustedRoot()).Verify(t.Context(), attest.FormBundle, content, image); attest.ReasonOf(err) != attest.RootMismatch {
		t.Errorf("a third service vouches for it: %v", err)
	}
}

// Each row alters one thing. The reason and the words say that it was this thing
// that was found.
func TestVerifyRefuses(t *testing.T) {
	w := newWorld(t)
	simple := abroad.Simple(image.String())
	late := time.Now().Add(30 * time.Minute)
	good := w.ours.Bundle(say(t, image), abroad.Parts{})
	sig, att := w.ours.Signature(simple, time.Time{}), w.ours.Attestation(say(t, image))
	keySig, keyAtt := w.vendor.Signature(simple), w.vendor.Attestation(say(t, image))
	vouched := func(l attest.Layer) []byte { return abroad.JSON(t, l) }
	signedBy := func(statement []byte) []byte { return w.ours.Bundle(statement, abroad.Parts{}) }
	changed := func(changes map[string]any, digests ...attest.Digest) []byte {
		return signedBy(abroad.Statement(t, provenance, changes, digests...))
	}
	payloadOf := func(l attest.Layer, payload []byte) attest.Layer { l.Payload = payload; return l }

	for _, row := range []struct {
		name    string
		roots   *foreign.Roots
		form    string
		content []byte
		reason  attest.Reason
		words   string
	}{
		// A bundle.
		{"altered payload", w.logged, attest.FormBundle, edit(t, good, func(m object) {
			m.in("dsseEnvelope")["payload"] = base64.StdEncoding.EncodeToString(abroad.Statement(t, provenance, map[string]any{"predicate": object{"x": 1}}, image))
		}), attest.RootMismatch, "vendor: "},
		{"altered signature", w.logged, attest.FormBundle, edit(t, good, func(m object) {
			m.in("dsseEnvelope")["signatures"] = []any{object{"sig": base64.StdEncoding.EncodeToString([]byte("signature"))}}
		}), attest.RootMismatch, "vendor: "},
		{"C04 certificate expired when the log took it", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{NoStamp: true, LoggedAt: late}), attest.RootMismatch, "outside certificate validity"},
		{"C04 certificate good at one of its times only", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{LoggedAt: late}), attest.RootMismatch, "outside certificate validity"},
		{"C12 timestamp and no log, where one is needed", w.logged, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{NoLog: true}), attest.RootMismatch, "log"},
		{"no proof of the time", w.stamped, attest.FormBundle, w.ours.Bundle(say(t, image), abroad.Parts{NoLog: true, NoStamp: true}), attest.RootMismatch, "timestamp"},
		{"C01 log entry of another signature", w.logged, attest.FormBundle, edit(t, good, func(m object) {
			m.in("verificationMaterial")["tlogEntries"] = decode(t, signedBy(say(t, image))).in("verificationMaterial")["tlogEntries"]
		}), attest.RootMismatch, "vendor: "},
		{"timestamp of another signature", w.stamped, attest.FormBundle, edit(t, good, func(m object) {
			m.in("verificationMaterial")["timestampVerificationData"] = decode(t, signedBy(say(t, image))).in("verificationMaterial")["timestampVerificationData"]
		}), attest.RootMismatch, "timestamp"},
		{"C08 no signature", w.logged, attest.FormBundle, edit(t, good, func(m object) { m.in("dsseEnvelope")["signatures"] = []any{} }), attest.SignatureCount, "0 signatures"},
		{"C08 two signatures", w.logged, attest.FormBundle, edit(t, good, func(m object) {
			sigs := m.in("dsseEnvelope")["signatures"].([]any)
			m.in("dsseEnvelope")["signatures"] = append(sigs, sigs[0])
		}), attest.SignatureCount, "2 signatures"},
		{"C09 another payload type", w.logged, attest.FormBundle, edit(t, good, func(m object) { m.in("dsseEnvelope")["payloadType"] = "text/plain" }), attest.PayloadType, "text/plain"},
		{"message signature", w.logged, attest.FormBundle, edit(t, good, func(m object) {
			delete(m, "dsseEnvelope")
			m["messageSignature"] = object{"messageDigest": object{"algorithm": "SHA2_256", "digest": base64.StdEncoding.EncodeToString(image[:])}, "signature": "AAAA"}
		}), attest.PayloadType, "no DSSE envelope"},
		{"C16 key where a certificate is needed", w.logged, attest.FormBundle, w.vendor.Bundle(say(t, image)), attest.RootMismatch, "vendor: "},
		{"C16 certificate where the key is needed", w.key, attest.FormBundle, good, attest.RootMismatch, "expected key signature"},
		{"C14 certificate in no certificate log", mustOpen(t, foreign.Root{}, withCertificateLog(t, w.ours)), attest.FormBundle, good, attest.RootMismatch, "signed certificate timestamp"},
		{"H03 bundle that brings its own authority", w.stamped, attest.FormBundle, edit(t, w.theirs.Bundle(say(t, image), abroad.Parts{Version: "0.2", NoLog: true}), func(m object) {
			chain := m.in("verificationMaterial")["x509CertificateChain"].(map[string]any)
			for rest := []byte(chainOf(w.theirs)); ; {
				var block *pem.Block
				if block, rest = pem.Decode(rest); block == nil {
					break
				}
				chain["certificates"] = append(chain["certificates"].([]any), object{"rawBytes": base64.StdEncoding.EncodeToString(block.Bytes)})
			}
		}), attest.RootMismatch, "vendor: "},
		{"C18 version 0.4", w.logged, attest.FormBundle, edit(t, good, func(m object) { m["mediaType"] = "application/vnd.dev.sigstore.bundle.v0.4+json" }), attest.BundleVersion, "v0.4"},
		{"truncated JSON", w.logged, attest.FormBundle, good[:len(good)/2], attest.BundleMalformed, "cannot be read"},
		{"empty", w.logged, attest.FormBundle, nil, attest.BundleMalformed, "cannot be read"},
		{"D03 key in two spellings", w.logged, attest.FormBundle, bytes.Replace(good, []byte(`{`), []byte(`{"MediaType":"x",`), 1), attest.BundleMalformed, "cannot be read"},
		{"D09 key twice", w.logged, attest.FormBundle, bytes.Replace(good, []byte(`{`), []byte(`{"mediaType":"x",`), 1), attest.BundleMalformed, "cannot be read"},
		{"C22 no verification material", w.logged, attest.FormBundle, edit(t, good, func(m object) { delete(m, "verificationMaterial") }), attest.BundleMalformed, "cannot be read"},
		{"C22 null everywhere", w.logged, attest.FormBundle, edit(t, good, func(m object) {
			m["dsseEnvelope"] = object{"payloadType": attest.InTotoPayload, "signatures": []any{object{}}}
		}), attest.StatementMalformed, "statement"},
		{"C23 too large", w.logged, attest.FormBundle, bytes.Repeat([]byte(" "), foreign.MaxContent+1), attest.TooLarge, "bytes"},

		// A statement.
		{"D06 subject of another image", w.logged, attest.FormBundle, signedBy(say(t, other)), attest.SubjectMismatch, image.String()},
		{"D06 many subjects, none of them it", w.logged, attest.FormBundle, signedBy(say(t, other, attest.Hash([]byte("third")))), attest.SubjectMismatch, image.String()},
		{"C10 no subject", w.logged, attest.FormBundle, signedBy(say(t)), attest.SubjectMissing, "0 subjects"},
		{"D07 second digest beside it", w.logged, attest.FormBundle, changed(map[string]any{"subject": []any{
			object{"digest": object{"sha256": image.Hex(), "sha512": strings.Repeat("0", 128)}},
		}}), attest.SubjectMismatch, image.String()},
		{"D07 digest in upper case", w.logged, attest.FormBundle, changed(map[string]any{"subject": []any{object{"digest": object{"sha256": strings.ToUpper(image.Hex())}}}}), attest.SubjectMismatch, image.String()},
		{"D07 under another algorithm's name", w.logged, attest.FormBundle, changed(map[string]any{"subject": []any{object{"digest": object{"sha1": image.Hex()}}}}), attest.SubjectMismatch, image.String()},
		{"D04 statement with a field of its own", w.logged, attest.FormBundle, changed(map[string]any{"extra": 1}, image), attest.StatementMalformed, "extra"},
		{"D13 field in another spelling", w.logged, attest.FormBundle, changed(map[string]any{"Subject": []any{}}, image), attest.StatementMalformed, "statement"},
		{"no in-toto statement", w.logged, attest.FormBundle, changed(map[string]any{"_type": "https://example.com/statement"}, image), attest.StatementMalformed, "example.com"},
		{"D01 no predicate type", w.logged, attest.FormBundle, changed(map[string]any{"predicateType": ""}, image), attest.PredicateType, "predicate type"},
		{"predicate type with a line break", w.logged, attest.FormBundle, changed(map[string]any{"predicateType": "https://a\nb"}, image), attest.PredicateType, "predicate type"},
		{"predicate type without end", w.logged, attest.FormBundle, changed(map[string]any{"predicateType": "https://" + strings.Repeat("a", 300)}, image), attest.PredicateType, "predicate type"},

		// A legacy signature.
		{"D02 payload that is no JSON", w.key, attest.FormSignature, vouched(w.vendor.Signature([]byte("not JSON"))), attest.StatementMalformed, "payload"},
		{"D02 payload without its digest", w.key, attest.FormSignature, vouched(w.vendor.Signature([]byte(`{"critical":{"type":"cosign container image signature"}}`))), attest.SubjectMismatch, image.String()},
		{"D02 empty payload", w.key, attest.FormSignature, vouched(w.vendor.Signature([]byte(`{}`))), attest.PredicateType, "container image signature"},
		{"D02 digest in another place", w.key, attest.FormSignature, vouched(w.vendor.Signature([]byte(
			`{"critical":{"type":"cosign container image signature"},"optional":{"docker-manifest-digest":"` + image.String() + `"}}`))), attest.SubjectMismatch, image.String()},
		{"D03 digest in two spellings", w.key, attest.FormSignature, vouched(w.vendor.Signature(bytes.Replace(simple, []byte(`"docker-manifest`), []byte(`"Docker-Manifest-Digest":"`+other.String()+`","docker-manifest`), 1))), attest.StatementMalformed, "payload"},
		{"signature over another image", w.key, attest.FormSignature, vouched(w.vendor.Signature(abroad.Simple(other.String()))), attest.SubjectMismatch, image.String()},
		{"payload of another type", w.key, attest.FormSignature, vouched(w.vendor.Signature(bytes.Replace(simple, []byte("cosign container"), []byte("atomic container"), 1))), attest.PredicateType, "atomic"},
		{"key signature over another payload", w.key, attest.FormSignature, vouched(payloadOf(w.vendor.Signature(abroad.Simple(other.String())), simple)), attest.RootMismatch, "vendor: "},
		{"C16 layer with a certificate where the key is needed", w.key, attest.FormSignature, vouched(sig), attest.RootMismatch, "signed the other way"},
		{"C16 layer with a key's signature and a certificate", w.key, attest.FormSignature, vouched(with(keySig, "certificate", sig.Annotations["dev.sigstore.cosign/certificate"])), attest.RootMismatch, "signed the other way"},
		{"C16 layer without a certificate where one is needed", w.logged, attest.FormSignature, vouched(keySig), attest.RootMismatch, "signed the other way"},
		{"no signature", w.key, attest.FormSignature, vouched(lacking(keySig, "signature")), attest.SignatureInvalid, "base64"},
		{"D05 signature in loose base64", w.key, attest.FormSignature, vouched(with(keySig, "signature", keySig.Annotations["dev.cosignproject.cosign/signature"]+"\n")), attest.SignatureInvalid, "base64"},
		{"layer without a log entry where one is needed", w.logged, attest.FormSignature, vouched(lacking(sig, "bundle")), attest.RootMismatch, "offline verification failed"},
		{"C01 log entry of another layer", w.logged, attest.FormSignature, vouched(with(sig, "bundle", w.ours.Signature(simple, time.Time{}).Annotations["dev.sigstore.cosign/bundle"])), attest.RootMismatch, "vendor: "},
		{"C12 no proof of the time, certificate still good", w.stamped, attest.FormSignature, vouched(lacking(lacking(sig, "bundle"), "rfc3161timestamp")), attest.RootMismatch, "nothing proves when"},
		{"C22 timestamp of another layer", w.stamped, attest.FormSignature, vouched(with(sig, "rfc3161timestamp", w.ours.Signature(simple, time.Time{}).Annotations["dev.sigstore.cosign/rfc3161timestamp"])), attest.RootMismatch, "vouches for its timestamp"},
		{"H03 layer that brings its own authority", w.logged, attest.FormSignature, vouched(with(w.theirs.Signature(simple, time.Time{}), "chain", chainOf(w.theirs))), attest.RootMismatch, "vendor: "},
		{"C04 layer whose certificate was expired", w.logged, attest.FormSignature, vouched(lacking(w.ours.Signature(simple, late), "rfc3161timestamp")), attest.RootMismatch, "expired"},
		{"C04 layer whose authority had ended", mustOpen(t, logged, ended(t, w.ours)), attest.FormSignature, vouched(sig), attest.RootMismatch, "leaf certificate verification failed"},
		{"C14 layer whose certificate is in no certificate log", mustOpen(t, foreign.Root{}, withCertificateLog(t, w.ours)), attest.FormSignature, vouched(sig), attest.RootMismatch, "SCT"},
		{"C22 log entry without a body", w.logged, attest.FormSignature, vouched(with(sig, "bundle", `{"SignedEntryTimestamp":"AA==","Payload":{"body":null}}`)), attest.LogEntryMismatch, "bundle"},
		{"C22 log entry that is no JSON", w.logged, attest.FormSignature, vouched(with(sig, "bundle", `{`)), attest.LogEntryMismatch, "bundle"},
		{"C22 timestamp that is no JSON", w.logged, attest.FormSignature, vouched(with(sig, "rfc3161timestamp", `[]`)), attest.TimestampInvalid, "rfc3161timestamp"},
		{"C21 two certificates", w.logged, attest.FormSignature, vouched(with(sig, "certificate", strings.Repeat(sig.Annotations["dev.sigstore.cosign/certificate"], 2))), attest.CertificateInvalid, "exactly one"},
		{"C23 endless certificate", w.logged, attest.FormSignature, vouched(with(sig, "certificate", strings.Repeat("a", 1<<20))), attest.TooLarge, "certificate"},
		{"signature as an attestation", w.logged, attest.FormEnvelope, vouched(sig), attest.PayloadType, "simplesigning"},
		{"layer that is no JSON", w.logged, attest.FormSignature, []byte("{"), attest.BundleMalformed, "layer"},
		{"form that there is not", w.logged, "sbom", vouched(sig), attest.BundleMalformed, "sbom"},

		// A legacy attestation.
		{"attestation of another image", w.key, attest.FormEnvelope, vouched(w.vendor.Attestation(say(t, other))), attest.SubjectMismatch, image.String()},
		{"attestation with another statement", w.key, attest.FormEnvelope, vouched(payloadOf(keyAtt, exchange(t, keyAtt.Payload, "payload", base64.StdEncoding.EncodeToString(
			abroad.Statement(t, provenance, map[string]any{"predicate": object{"x": 1}}, image))))), attest.RootMismatch, "vendor: "},
		{"C08 attestation with two signatures", w.key, attest.FormEnvelope, vouched(payloadOf(keyAtt, exchange(t, keyAtt.Payload, "signatures", []any{object{"sig": "AA=="}, object{"sig": "AA=="}}))), attest.SignatureCount, "2 signatures"},
		{"C09 attestation of another payload type", w.key, attest.FormEnvelope, vouched(payloadOf(keyAtt, exchange(t, keyAtt.Payload, "payloadType", "text/plain"))), attest.PayloadType, "text/plain"},
		{"D02 attestation that is no JSON", w.key, attest.FormEnvelope, vouched(payloadOf(keyAtt, []byte("{"))), attest.BundleMalformed, "envelope"},
		{"attestation with a signature beside it", w.key, attest.FormEnvelope, vouched(with(keyAtt, "signature", "AAAA")), attest.SignatureCount, "beside"},
		{"attestation as a signature", w.logged, attest.FormSignature, vouched(att), attest.PayloadType, "dsse"},
		{"C01 log entry of another attestation", w.logged, attest.FormEnvelope, vouched(with(att, "bundle", w.ours.Attestation(say(t, image)).Annotations["dev.sigstore.cosign/bundle"])), attest.RootMismatch, "vendor: "},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := row.roots.Verify(t.Context(), row.form, row.content, image)
			if attest.ReasonOf(err) != row.reason || !strings.Contains(err.Error(), row.words) || !cmp.Equal(got, attest.Import{}) {
				t.Errorf("got %v, want %s with %q", err, row.reason, row.words)
			}
		})
	}
	if _, err := w.logged.Verify(t.Context(), attest.FormBundle, good, attest.Digest{}); attest.ReasonOf(err) != attest.BadDigest {
		t.Errorf("C06 no digest: %v", err)
	}
}

// The roots are tried in their order, and a root that cannot read something hides
// nothing from the next.
func TestFirstRootThatVouches(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	roots, err := foreign.Open([]foreign.Root{
		{Name: "theirs", TrustedRoot: file("theirs", w.theirs.TrustedRoot()), CertificateLog: foreign.None},
		{Name: "key", Key: file("key", w.vendor.PEM)},
		{Name: "logged", TrustedRoot: file("ours", w.ours.TrustedRoot()), CertificateLog: foreign.None},
		{Name: "stamped", TrustedRoot: file("ours2", w.ours.TrustedRoot()), CertificateLog: foreign.None, Log: foreign.None},
	})
	if err != nil {
		t.Fatal(err)
	}
	for want, content := range map[string][]byte{
		"logged": w.ours.Bundle(say(t, image), abroad.Parts{}), "stamped": w.ours.Bundle(say(t, image), abroad.Parts{NoLog: true}),
		"theirs": w.theirs.Bundle(say(t, image), abroad.Parts{}), "key": w.vendor.Bundle(say(t, image)),
	} {
		if got, err := roots.Verify(t.Context(), attest.FormBundle, content, image); err != nil || got.Root != want {
			t.Errorf("root %q, %v, want %q", got.Root, err, want)
		}
	}
	_, err = roots.Verify(t.Context(), attest.FormBundle, w.stranger.Bundle(say(t, image)), image)
	for _, name := range roots.Names() {
		if attest.ReasonOf(err) != attest.RootMismatch || !strings.Contains(err.Error(), name+": ") {
			t.Errorf("the refusal does not tell of root %s: %v", name, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	w := newWorld(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	small, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := w.ours.TrustedRoot()
	for _, row := range []struct {
		name  string
		root  foreign.Root
		file  []byte
		words string
	}{
		{"H06 RSA of 1024 bits", byKey, publicPEM(t, weak.Public()), "too weak"},
		{"H06 P-224", byKey, publicPEM(t, small.Public()), "too weak"},
		{"no key", byKey, []byte("key"), "PUBLIC KEY"},
		{"two keys", byKey, append(bytes.Clone(w.vendor.PEM), w.stranger.PEM...), "exactly one"},
		{"key with a log", foreign.Root{Key: "k", Log: foreign.None}, w.vendor.PEM, "are for a trusted_root"},
		{"no trusted root", logged, []byte("{}"), "trusted root"},
		{"no JSON", logged, []byte("trusted root"), "trusted root"},
		{"log where there is none", logged, w.ours.TrustedRoot("log"), "no transparency log"},
		{"no log and no timestamps", stamped, w.ours.TrustedRoot("tsa"), "needs a timestamp authority"},
		{"certificate log where there is none", foreign.Root{}, root, "no certificate log"},
		{"log: maybe", foreign.Root{CertificateLog: foreign.None, Log: "maybe"}, root, `"maybe"`},
		{"certificate_log: off", foreign.Root{CertificateLog: "off"}, root, `"off"`},
		{"name in upper case", foreign.Root{Name: "Vendor", CertificateLog: foreign.None}, root, "lower-case"},
		{"endless file", logged, bytes.Repeat([]byte(" "), 1<<21), "bytes"},
		{"H06 authority with a weak key", logged, weakAuthority(t, root), "too weak"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := open(t, row.root, row.file); attest.ReasonOf(err) != attest.BadConfig || !strings.Contains(err.Error(), row.words) {
				t.Errorf("got %v, want BAD_CONFIG with %q", err, row.words)
			}
		})
	}
	for name, roots := range map[string][]foreign.Root{
		"neither file":      {{Name: "a"}},
		"both files":        {{Name: "a", TrustedRoot: "x", Key: "y"}},
		"no such file":      {{Name: "a", Key: filepath.Join(t.TempDir(), "absent")}},
		"endless list":      make([]foreign.Root, 33),
		"name stands twice": twice(t, w.vendor.PEM),
	} {
		if _, err := foreign.Open(roots); attest.ReasonOf(err) != attest.BadConfig {
			t.Errorf("%s: %v", name, err)
		}
	}
	if names := (*foreign.Roots)(nil).Names(); len(names) != 0 {
		t.Errorf("no roots have names: %v", names)
	}
}

func twice(t *testing.T, key []byte) []foreign.Root {
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, key, 0o600); err != nil {
		t.Fatal(err)
	}
	return []foreign.Root{{Name: "a", Key: path}, {Name: "a", Key: path}}
}

func publicPEM(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// object is a JSON object that a test changes.
type object map[string]any

func (o object) in(name string) object {
	m, _ := o[name].(map[string]any)
	return m
}

func decode(t testing.TB, raw []byte) object {
	t.Helper()
	var m object
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// edit returns JSON after a change.
func edit(t testing.TB, raw []byte, change func(object)) []byte {
	t.Helper()
	m := decode(t, raw)
	change(m)
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func exchange(t testing.TB, raw []byte, name string, value any) []byte {
	t.Helper()
	return edit(t, raw, func(m object) { m[name] = value })
}

// chainOf returns a Sigstore's own authorities in PEM.
func chainOf(s *abroad.Sigstore) string {
	var out []byte
	for _, authority := range s.FulcioCertificateAuthorities() {
		f := authority.(*root.FulcioCertificateAuthority)
		for _, c := range append(slices.Clone(f.Intermediates), f.Root) {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
	}
	return string(out)
}

// withCertificateLog adds the transparency log's key as that of a certificate log.
func withCertificateLog(t testing.TB, s *abroad.Sigstore) []byte {
	t.Helper()
	return edit(t, s.TrustedRoot(), func(m object) { m["ctlogs"] = m["tlogs"] })
}

// ended has the authority end before the log's time and after the certificates begin.
func ended(t testing.TB, s *abroad.Sigstore) []byte {
	t.Helper()
	return edit(t, s.TrustedRoot(), func(m object) {
		authority := object(m["certificateAuthorities"].([]any)[0].(map[string]any))
		authority.in("validFor")["end"] = time.Now().Add(time.Minute).UTC().Format(time.RFC3339)
	})
}

// A certificate names one holder, or nobody can say who signed (attacks D09).
func TestForeigner(t *testing.T) {
	uri, err := url.Parse("https://vendor.example/release")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name string
		cert x509.Certificate
		want string
	}{
		{"e-mail", x509.Certificate{EmailAddresses: []string{"a@vendor.example"}}, "a@vendor.example"},
		{"URI", x509.Certificate{URIs: []*url.URL{uri}}, "https://vendor.example/release"},
		{"D09 two e-mails", x509.Certificate{EmailAddresses: []string{"a@vendor.example", "b@vendor.example"}}, ""},
		{"D09 e-mail and URI", x509.Certificate{EmailAddresses: []string{"a@vendor.example"}, URIs: []*url.URL{uri}}, ""},
		{"D09 URI and host", x509.Certificate{DNSNames: []string{"vendor.example"}, URIs: []*url.URL{uri}}, ""},
		{"D09 e-mail and address", x509.Certificate{EmailAddresses: []string{"a@vendor.example"}, IPAddresses: []net.IP{net.IPv4zero}}, ""},
		{"host only", x509.Certificate{DNSNames: []string{"vendor.example"}}, ""},
		{"nobody", x509.Certificate{}, ""},
		{"empty e-mail", x509.Certificate{EmailAddresses: []string{""}}, ""},
	} {
		who, err := foreign.Foreigner(&row.cert)
		if (err == nil) != (row.want != "") || row.want != "" && who.SAN != row.want {
			t.Errorf("%s: %+v, %v", row.name, who, err)
		}
	}
}

// weakAuthority replaces the log's key by one of 1024 bits.
func weakAuthority(t testing.TB, root []byte) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(publicPEM(t, key.Public()))
	return edit(t, root, func(m object) {
		public := object(m["tlogs"].([]any)[0].(map[string]any)).in("publicKey")
		public["rawBytes"], public["keyDetails"] = base64.StdEncoding.EncodeToString(block.Bytes), "PKIX_RSA_PKCS1V15_2048_SHA256"
	})
}
