package verifier_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/digitorus/pkcs7"
	"github.com/digitorus/timestamp"

	"github.com/hallmarkd/hallmark/attest"
)

// Each row alters one thing of a good bundle. Plain sigstore-go judges the same
// bytes: what it refuses must never pass here, and where only this service
// refuses (stricter), the row says so.
func TestTamperedBundle(t *testing.T) {
	w := newWorld(t)
	id := identity()
	good := w.log(w.by(id, provenance(t, id, image)))
	raw := w.bundle(good)
	other := w.bundle(w.log(w.by(id, must(attest.SignatureStatement(image, "r"))(t))))
	byGate := w.bundle(w.log(w.gate(must(attest.DenialStatement(image.Ref, attest.Denial{}))(t))))
	if _, err := w.verifier.Bundle(raw, image.Ref.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := w.verifier.Bundle(byGate, image.Ref.Digest); err != nil {
		t.Fatal(err)
	}
	var theirs map[string]any
	must0(t, json.Unmarshal(other, &theirs))
	type m = map[string]any
	for _, row := range []struct {
		name     string
		alter    func(b m)
		want     attest.Reason
		stricter bool
	}{
		// What was signed, and by what.
		{"C01 payload altered", func(b m) { flip(t, envelopeOf(b), "payload", 40) }, attest.SignatureInvalid, false},
		{"C01 signature altered", func(b m) { flip(t, envelopeOf(b)["signatures"].([]any)[0].(m), "sig", -3) }, attest.SignatureInvalid, false},
		{"C01 signature of another bundle", func(b m) { envelopeOf(b)["signatures"] = envelopeOf(theirs)["signatures"] }, attest.SignatureInvalid, false},
		{"C01 payload of another bundle", func(b m) { envelopeOf(b)["payload"] = envelopeOf(theirs)["payload"] }, attest.SignatureInvalid, false},
		{"C20 payload normalised", func(b m) {
			var v any
			must0(t, json.Unmarshal(unbase64(t, envelopeOf(b)["payload"].(string)), &v))
			envelopeOf(b)["payload"] = b64(must(json.Marshal(v))(t))
		}, attest.SignatureInvalid, false},
		{"C08 two signatures", func(b m) {
			s := envelopeOf(b)["signatures"].([]any)
			envelopeOf(b)["signatures"] = append(s, s[0])
		}, attest.SignatureCount, false},
		{"C08 no signature", func(b m) { envelopeOf(b)["signatures"] = []any{} }, attest.SignatureCount, false},
		{"C09 other payload type", func(b m) { envelopeOf(b)["payloadType"] = "text/plain" }, attest.PayloadType, false},
		{"C09 payload type in other case", func(b m) { envelopeOf(b)["payloadType"] = "Application/vnd.in-toto+json" }, attest.PayloadType, false},
		{"C07 message instead of envelope", func(b m) {
			delete(b, "dsseEnvelope")
			b["messageSignature"] = m{"messageDigest": m{"algorithm": "SHA2_256", "digest": b64(image.Ref.Digest[:])}, "signature": "AAAA"}
		}, attest.PayloadType, false},
		{"C22 no content at all", func(b m) { delete(b, "dsseEnvelope") }, attest.PayloadType, false},
		{"key id is set", func(b m) { envelopeOf(b)["signatures"].([]any)[0].(m)["keyid"] = "k" }, attest.BundleMalformed, false},

		// Who.
		{"C01 certificate altered", func(b m) { flip(t, material(b)["certificate"].(m), "rawBytes", -6) }, attest.CertificateInvalid, false},
		{"J01 certificate cut", func(b m) { c := material(b)["certificate"].(m); c["rawBytes"] = c["rawBytes"].(string)[:400] }, attest.CertificateInvalid, false},
		{"C16 certificate replaced by the gate key", func(b m) {
			delete(material(b), "certificate")
			material(b)["publicKey"] = m{"hint": hint(t, &w.keys["gate"].PublicKey)}
		}, attest.SignatureInvalid, false},
		{"C16 certificate replaced by its own key", func(b m) {
			c := must(x509.ParseCertificate(good.Certificate))(t)
			delete(material(b), "certificate")
			material(b)["publicKey"] = m{"hint": hint(t, c.PublicKey.(*ecdsa.PublicKey))}
		}, attest.SignerMismatch, false},
		{"C16 certificate and key", func(b m) { material(b)["publicKey"] = m{"hint": hint(t, &w.keys["gate"].PublicKey)} }, attest.BundleMalformed, false},
		{"C16 neither certificate nor key", func(b m) { delete(material(b), "certificate") }, attest.BundleMalformed, false},
		{"C18 chain of certificates", func(b m) {
			material(b)["x509CertificateChain"] = m{"certificates": []any{material(b)["certificate"], m{"rawBytes": b64(w.ca.Raw)}}}
			delete(material(b), "certificate")
		}, attest.BundleMalformed, false},
		{"C03 certificate too long", func(b m) { material(b)["certificate"].(m)["rawBytes"] = b64(make([]byte, 20<<10)) }, attest.TooLarge, false},

		// When.
		{"C12 no timestamp", func(b m) { delete(material(b), "timestampVerificationData") }, attest.TimestampInvalid, false},
		{"C02 the same timestamp twice", func(b m) {
			d := material(b)["timestampVerificationData"].(m)
			d["rfc3161Timestamps"] = append(d["rfc3161Timestamps"].([]any), d["rfc3161Timestamps"].([]any)[0])
		}, attest.TimestampInvalid, true},
		{"E04 a broken timestamp beside a good one", func(b m) {
			d := material(b)["timestampVerificationData"].(m)
			d["rfc3161Timestamps"] = append(d["rfc3161Timestamps"].([]any), m{"signedTimestamp": "AAAA"})
		}, attest.TimestampInvalid, true},
		{"E01 timestamp over another signature", func(b m) {
			material(b)["timestampVerificationData"] = material(theirs)["timestampVerificationData"]
		}, attest.TimestampInvalid, false},
		{"E01 timestamp altered", func(b m) {
			flip(t, in(material(b), "timestampVerificationData", "rfc3161Timestamps", 0).(m), "signedTimestamp", -6)
		}, attest.TimestampInvalid, false},
		{"J01 timestamp is no DER", func(b m) {
			in(material(b), "timestampVerificationData", "rfc3161Timestamps", 0).(m)["signedTimestamp"] = "AAAA"
		}, attest.TimestampInvalid, false},
		{"C03 timestamp too long", func(b m) {
			in(material(b), "timestampVerificationData", "rfc3161Timestamps", 0).(m)["signedTimestamp"] = b64(make([]byte, 20<<10))
		}, attest.TooLarge, false},

		// The log entry.
		{"C12 no log entry", func(b m) { delete(material(b), "tlogEntries") }, attest.LogEntryMismatch, false},
		{"C02 the same log entry twice", func(b m) {
			material(b)["tlogEntries"] = []any{entryOf(b), entryOf(b)}
		}, attest.LogEntryMismatch, false},
		{"C01 log entry of another bundle", func(b m) { material(b)["tlogEntries"] = material(theirs)["tlogEntries"] }, attest.LogEntryMismatch, false},
		{"C01 body of another entry", func(b m) { entryOf(b)["canonicalizedBody"] = entryOf(theirs)["canonicalizedBody"] }, attest.LogEntryMismatch, true},
		{"C17 other key details in the body", func(b m) {
			body := unbase64(t, entryOf(b)["canonicalizedBody"].(string))
			entryOf(b)["canonicalizedBody"] = b64(bytes.Replace(body, []byte("PKIX_ECDSA_P256_SHA_256"), []byte("PKIX_ECDSA_P384_SHA_384"), 1))
		}, attest.LogEntryMismatch, true},
		{"C18 other entry version", func(b m) { entryOf(b)["kindVersion"] = m{"kind": "hashedrekord", "version": "0.0.1"} }, attest.LogEntryMismatch, true},
		{"C18 other entry kind", func(b m) { entryOf(b)["kindVersion"] = m{"kind": "dsse", "version": "0.0.2"} }, attest.LogEntryMismatch, true},
		{"E05 a time of the log's own", func(b m) { entryOf(b)["integratedTime"] = "1795194000" }, attest.LogEntryMismatch, false},
		{"E05 a promise", func(b m) { entryOf(b)["inclusionPromise"] = m{"signedEntryTimestamp": ""} }, attest.LogEntryMismatch, true},
		{"F06 other log id", func(b m) { flip(t, entryOf(b)["logId"].(m), "keyId", 0) }, attest.CheckpointInvalid, false},
		{"F06 no log id", func(b m) { delete(entryOf(b), "logId") }, attest.CheckpointInvalid, false},

		// The proof.
		{"F08 no proof", func(b m) { delete(entryOf(b), "inclusionProof") }, attest.LogProofInvalid, false},
		{"F08 proof cut", func(b m) { proofOf(b)["hashes"] = proofOf(b)["hashes"].([]any)[1:] }, attest.LogProofInvalid, false},
		{"F08 proof empty", func(b m) { delete(proofOf(b), "hashes") }, attest.LogProofInvalid, false},
		{"F08 proof longer", func(b m) {
			h := proofOf(b)["hashes"].([]any)
			proofOf(b)["hashes"] = append(h, h[0])
		}, attest.LogProofInvalid, false},
		{"F08 proof in other order", func(b m) { slices.Reverse(proofOf(b)["hashes"].([]any)) }, attest.LogProofInvalid, false},
		{"F08 proof with half a hash", func(b m) { proofOf(b)["hashes"].([]any)[0] = b64(make([]byte, 16)) }, attest.LogProofInvalid, false},
		{"C03 endless proof", func(b m) {
			proofOf(b)["hashes"] = slices.Repeat(proofOf(b)["hashes"].([]any), 100)
		}, attest.TooLarge, false},
		{"F08 other index", func(b m) { entryOf(b)["logIndex"], proofOf(b)["logIndex"] = "0", "0" }, attest.LogProofInvalid, false},
		{"F08 index beyond the log", func(b m) { entryOf(b)["logIndex"], proofOf(b)["logIndex"] = "4096", "4096" }, attest.LogProofInvalid, false},
		{"F08 index said twice, differently", func(b m) { proofOf(b)["logIndex"] = "0" }, attest.LogProofInvalid, true},
		{"J05 negative index", func(b m) { entryOf(b)["logIndex"], proofOf(b)["logIndex"] = "-1", "-1" }, attest.BundleMalformed, false},
		{"J05 index beyond int64", func(b m) { entryOf(b)["logIndex"] = "9223372036854775808" }, attest.BundleMalformed, false},
		{"J05 index with a leading zero", func(b m) { entryOf(b)["logIndex"] = "0" + entryOf(b)["logIndex"].(string) }, attest.BundleMalformed, false},
		{"J05 index as a float", func(b m) { entryOf(b)["logIndex"] = json.Number("5e0") }, attest.BundleMalformed, true},

		// The checkpoint.
		{"F06 no checkpoint", func(b m) { delete(proofOf(b), "checkpoint") }, attest.CheckpointInvalid, false},
		{"F06 size altered in the text", func(b m) { note(b, func(s string) string { return strings.Replace(s, "\n", "\n1", 1) }) }, attest.CheckpointInvalid, false},
		{"F06 root altered in the text", func(b m) { rootLine(b) }, attest.CheckpointInvalid, false},
		{"F06 origin altered in the text", func(b m) { note(b, func(s string) string { return "x" + s }) }, attest.CheckpointInvalid, false},
		{"F06 signature altered", func(b m) { note(b, func(s string) string { return s[:len(s)-12] + "AAAA" + s[len(s)-8:] }) }, attest.CheckpointInvalid, false},
		{"F06 not signed", func(b m) { note(b, func(s string) string { head, _, _ := strings.Cut(s, "\n\n"); return head + "\n" }) }, attest.CheckpointInvalid, false},
		{"F06 cut", func(b m) { note(b, func(s string) string { return s[:len(s)-1] }) }, attest.CheckpointInvalid, false},
		{"F02 text before the note", func(b m) { note(b, func(s string) string { return "\n" + s }) }, attest.CheckpointInvalid, false},
		{"F06 carriage returns", func(b m) { note(b, func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }) }, attest.CheckpointInvalid, false},
		{"H05 signed by the gate key", func(b m) {
			note(b, func(string) string {
				return string(w.checkpoint("gate", w.signer.Origin(), good.TreeSize, w.tree.HashAt(good.TreeSize)))
			})
		}, attest.CheckpointInvalid, false},
		{"F06 of another log by the same key", func(b m) {
			note(b, func(string) string {
				return string(w.checkpoint("log", "other.example.com", good.TreeSize, w.tree.HashAt(good.TreeSize)))
			})
		}, attest.CheckpointInvalid, false},
		{"F06 with half a root", func(b m) {
			note(b, func(string) string {
				return string(w.checkpoint("log", w.signer.Origin(), good.TreeSize, make([]byte, 16)))
			})
		}, attest.CheckpointInvalid, false},
		{"F06 with a tree id as in Rekor v1", func(b m) {
			note(b, func(string) string {
				return string(w.checkpoint("log", w.signer.Origin()+" - 1", good.TreeSize, w.tree.HashAt(good.TreeSize)))
			})
		}, attest.CheckpointInvalid, true},
		{"F06 of another size", func(b m) {
			note(b, func(string) string { return string(w.checkpoint("log", w.signer.Origin(), 3, w.tree.HashAt(3))) })
		}, attest.CheckpointInvalid, false},
		{"F06 of another size, said so", func(b m) {
			note(b, func(string) string { return string(w.checkpoint("log", w.signer.Origin(), 3, w.tree.HashAt(3))) })
			proofOf(b)["treeSize"] = "3"
		}, attest.LogProofInvalid, false},
		{"F06 size said twice, differently", func(b m) { proofOf(b)["treeSize"] = "4096" }, attest.CheckpointInvalid, true},
		{"F06 root said twice, differently", func(b m) { flip(t, proofOf(b), "rootHash", 0) }, attest.CheckpointInvalid, true},
		{"C03 checkpoint too long", func(b m) { note(b, func(s string) string { return s + strings.Repeat("— x AAAA\n", 4096) }) }, attest.TooLarge, false},

		// The bundle itself.
		{"C18 version 0.1", func(b m) { b["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.1" }, attest.BundleVersion, false},
		{"C18 version 0.2", func(b m) { b["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.2" }, attest.BundleVersion, true},
		{"C18 version 0.3 spelt the old way", func(b m) { b["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.3" }, attest.BundleVersion, true},
		{"C18 version 0.3.1", func(b m) { b["mediaType"] = "application/vnd.dev.sigstore.bundle.v0.3.1+json" }, attest.BundleVersion, true},
		{"C18 version 0.4", func(b m) { b["mediaType"] = "application/vnd.dev.sigstore.bundle.v0.4+json" }, attest.BundleVersion, false},
		{"C18 no version", func(b m) { delete(b, "mediaType") }, attest.BundleVersion, false},
		{"C16 certificate beside a chain", func(b m) { material(b)["x509CertificateChain"] = m{} }, attest.BundleMalformed, false},
		{"C07 envelope beside a message", func(b m) { b["messageSignature"] = m{} }, attest.BundleMalformed, false},
		{"unknown field", func(b m) { b["extra"] = 1 }, attest.BundleMalformed, false},
		{"unknown field below", func(b m) { proofOf(b)["extra"] = 1 }, attest.BundleMalformed, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			w.refused(t, edit(t, raw, row.alter), image.Ref.Digest, row.want, row.stricter)
		})
	}
	for _, row := range []struct {
		name     string
		raw      []byte
		want     attest.Digest
		reason   attest.Reason
		stricter bool
	}{
		{"C06 no digest asked for", raw, attest.Digest{}, attest.BadDigest, false},
		{"C11 another digest asked for", raw, attest.Hash([]byte("other")), attest.SubjectMismatch, false},
		{"C03 33 MiB", append(bytes.Repeat([]byte(" "), 33<<20), raw...), image.Ref.Digest, attest.TooLarge, true},
		{"C03 nested endlessly", bytes.Repeat([]byte("["), 1<<20), image.Ref.Digest, attest.BundleMalformed, false},
		{"D04 trailing data", append(slices.Clone(raw), "{}"...), image.Ref.Digest, attest.BundleMalformed, false},
		{"D04 empty", nil, image.Ref.Digest, attest.BundleMalformed, false},
		{"D04 null", []byte("null"), image.Ref.Digest, attest.BundleVersion, false},
		{"D03 key twice", []byte(`{"mediaType":"x",` + string(raw[1:])), image.Ref.Digest, attest.BundleMalformed, false},
		{"D03 key in other case", []byte(`{"MediaType":"x",` + string(raw[1:])), image.Ref.Digest, attest.BundleMalformed, false},
		{"D03 key by its protobuf name", bytes.Replace(raw, []byte("mediaType"), []byte("media_type"), 1), image.Ref.Digest, attest.BundleMalformed, true},
		{"D03 key in other case only", bytes.Replace(raw, []byte("mediaType"), []byte("MediaType"), 1), image.Ref.Digest, attest.BundleMalformed, false},
	} {
		t.Run(row.name, func(t *testing.T) { w.refused(t, row.raw, row.want, row.reason, row.stricter) })
	}
}

// refused checks the reason, and that sigstore-go agrees unless this service is
// stricter on purpose.
func (w *world) refused(t *testing.T, raw []byte, want attest.Digest, reason attest.Reason, stricter bool) {
	t.Helper()
	ev, err := w.verifier.Bundle(raw, want)
	if got := attest.ReasonOf(err); got != reason || ev != nil {
		t.Errorf("evidence %v, %v, want %q", ev, err, reason)
	}
	if got := w.accepts(raw, want); got != stricter {
		t.Errorf("plain sigstore-go accepts it: %v, want %v", got, stricter)
	}
}

// D05: base64 has one spelling. protojson takes all of these for the same.
func TestBase64Spellings(t *testing.T) {
	w := newWorld(t)
	raw := w.bundle(w.log(w.by(identity(), provenance(t, identity(), image))))
	set := func(change func(string) string) []byte {
		return edit(t, raw, func(b map[string]any) {
			c := material(b)["certificate"].(map[string]any)
			before := c["rawBytes"].(string)
			if c["rawBytes"] = change(before); c["rawBytes"] == before {
				t.Fatal("nothing was altered")
			}
		})
	}
	root := func(change func(string) string) []byte {
		return edit(t, raw, func(b map[string]any) { proofOf(b)["rootHash"] = change(proofOf(b)["rootHash"].(string)) })
	}
	for _, row := range []struct {
		name     string
		raw      []byte
		stricter bool
	}{
		{"D05 URL alphabet", set(func(s string) string { return strings.NewReplacer("+", "-", "/", "_").Replace(s) }), true},
		{"D05 not padded", root(func(s string) string { return strings.TrimRight(s, "=") }), true},
		{"D05 unused bits set", root(func(s string) string { return s[:42] + string(s[42]+1) + "=" }), true},
		{"D05 line breaks", root(func(s string) string { return s[:8] + "\n\n\n\n" + s[8:] }), true},
		{"D05 carriage returns at the end", root(func(s string) string { return s + "\r\r\r\r" }), true},
		{"D05 padded too much", root(func(s string) string { return s + "=" }), false},
		{"D05 space", root(func(s string) string { return s[:8] + "    " + s[8:] }), false},
	} {
		t.Run(row.name, func(t *testing.T) {
			w.refused(t, row.raw, image.Ref.Digest, attest.BundleMalformed, row.stricter)
		})
	}
}

// What a stolen or misused key could sign. All of these are in the log.
func TestForged(t *testing.T) {
	w := newWorld(t)
	payload := statementOf("https://example.com/x/v1", "{}")
	if _, err := w.verifier.Bundle(w.bundle(w.log(w.forge(forged{}, payload))), image.Ref.Digest); err != nil {
		t.Fatalf("the forger's tools are broken: %v", err)
	}
	at := func(d time.Duration) func(*timestamp.Timestamp) {
		return func(ts *timestamp.Timestamp) { ts.Time = ts.Time.Add(d) }
	}
	for _, row := range []struct {
		name     string
		f        forged
		want     attest.Reason
		stricter bool
	}{
		{"C04 signed after the certificate's end", forged{stamp: at(11 * time.Minute)}, attest.CertificateInvalid, false},
		{"C04 signed before its beginning", forged{stamp: at(-time.Minute)}, attest.CertificateInvalid, false},
		{"C04 certificate outlives its authority", forged{certificate: func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = w.ca.NotAfter.Add(time.Hour), w.ca.NotAfter.Add(2*time.Hour)
		}}, attest.CertificateInvalid, false},
		{"C14 no SCT", forged{sct: "none"}, attest.CertificateInvalid, false},
		{"C14 SCT by another key", forged{sct: "log"}, attest.CertificateInvalid, false},
		{"H05 certified by the gate key", forged{issuer: "gate"}, attest.CertificateInvalid, false},
		{"H05 certified by the log key", forged{issuer: "log"}, attest.CertificateInvalid, false},
		{"H05 stamped by the certificate log's key", forged{tsa: "ct"}, attest.TimestampInvalid, false},
		{"E01 stamped by the root key", forged{tsa: "root"}, attest.TimestampInvalid, false},
		{"E01 time from before the authority", forged{stamp: at(-24 * time.Hour)}, attest.TimestampInvalid, false},
		{"E11 time from after the authority's certificate", forged{stamp: at(11 * 365 * 24 * time.Hour)}, attest.TimestampInvalid, false},
		{"E01 imprint by another hash", forged{stamp: func(ts *timestamp.Timestamp) { ts.HashAlgorithm = crypto.SHA384 }}, attest.TimestampInvalid, false},
		{"E01 imprint of something else", forged{stamp: func(ts *timestamp.Timestamp) { ts.HashedMessage = make([]byte, 32) }}, attest.TimestampInvalid, false},
		{"C17 P-384", forged{curve: elliptic.P384()}, attest.CertificateInvalid, false},
		{"C09 signed as another payload type", forged{payloadType: "application/json"}, attest.PayloadType, false},
		{"A24 for TLS servers too", forged{certificate: func(c *x509.Certificate) {
			c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		}}, attest.CertificateInvalid, true},
		{"A24 for no use", forged{certificate: func(c *x509.Certificate) { c.ExtKeyUsage = nil }}, attest.CertificateInvalid, true},
		{"A24 for unknown uses too", forged{certificate: func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}}
		}}, attest.CertificateInvalid, true},
		{"A24 to encrypt", forged{certificate: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }}, attest.CertificateInvalid, true},
		{"A24 an authority", forged{certificate: func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid = true, true
		}}, attest.CertificateInvalid, true},
		{"A24 two names", forged{certificate: func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "https", Host: "x"})
		}}, attest.CertificateInvalid, true},
		{"A24 a mail address too", forged{certificate: func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.com"} }}, attest.CertificateInvalid, true},
		{"A24 an address too", forged{certificate: func(c *x509.Certificate) { c.IPAddresses = []net.IP{{127, 0, 0, 1}} }}, attest.CertificateInvalid, true},
		{"A23 no issuer", forged{noExt: true}, attest.CertificateInvalid, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := w.forge(row.f, payload)
			r := w.log(e)
			r.PayloadType = attest.InTotoPayload // no other is rendered as a bundle
			raw := edit(t, w.bundle(r), func(b map[string]any) {
				envelopeOf(b)["payloadType"], entryOf(b)["canonicalizedBody"] = e.PayloadType, b64(e.LogEntry())
			})
			w.refused(t, raw, image.Ref.Digest, row.want, row.stricter)
		})
	}
}

// C21, E01: a token that the right authority signed, and somebody else or nobody
// besides. sigstore-go wants one signer too.
func TestTokenSigners(t *testing.T) {
	w := newWorld(t)
	e := w.forge(forged{}, statementOf("https://example.com/x/v1", "{}"))
	token := must(pkcs7.Parse(must(timestamp.ParseResponse(e.Timestamp))(t).RawToken))(t)
	for signers, want := range map[int]attest.Reason{0: attest.TimestampInvalid, 1: "", 2: attest.TimestampInvalid} {
		t.Run(strconv.Itoa(signers)+" signers", func(t *testing.T) {
			signed := must(pkcs7.NewSignedData(token.Content))(t)
			signed.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
			signed.SetContentType(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4})
			for range signers {
				must0(t, signed.AddSigner(w.tsa, w.keys["tsa"], pkcs7.SignerInfoConfig{SkipCertificates: true}))
			}
			e.Timestamp = must(asn1.Marshal(struct {
				Status struct{ Status int }
				Token  asn1.RawValue
			}{Token: asn1.RawValue{FullBytes: must(signed.Finish())(t)}}))(t)
			if got := attest.ReasonOf(w.verifier.Envelope(e)); got != want {
				t.Errorf("Envelope: %q, want %q", got, want)
			}
			if got := w.accepts(w.bundle(w.log(e)), image.Ref.Digest); got != (want == "") {
				t.Errorf("plain sigstore-go accepts it: %v", got)
			}
		})
	}
}

// C21: a token that brings its own certificate, with the serial number and the
// issuer's name of the right one.
func TestTokenBringsItsCertificate(t *testing.T) {
	w := newWorld(t)
	e := w.forge(forged{}, statementOf("https://example.com/x/v1", "{}"))
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	fake := *w.root
	fake.PublicKey = key.Public()
	template := &x509.Certificate{
		SerialNumber: w.tsa.SerialNumber, Subject: w.tsa.Subject, NotBefore: w.tsa.NotBefore, NotAfter: w.tsa.NotAfter,
		KeyUsage: w.tsa.KeyUsage, ExtKeyUsage: w.tsa.ExtKeyUsage,
	}
	cert := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, &fake, key.Public(), key))(t)))(t)
	imprint := sha256.Sum256(e.Signature)
	ts := timestamp.Timestamp{HashAlgorithm: crypto.SHA256, HashedMessage: imprint[:], Time: w.now, Policy: asn1.ObjectIdentifier{1, 2, 3}, AddTSACertificate: true}
	e.Timestamp = must(ts.CreateResponseWithOpts(cert, key, crypto.SHA256))(t)
	if _, err := timestamp.ParseResponse(e.Timestamp); err != nil {
		t.Fatalf("the token does not even verify by itself: %v", err)
	}
	w.refused(t, w.bundle(w.log(e)), image.Ref.Digest, attest.TimestampInvalid, false)
}

// C15: the other signature of the same statement is valid, and another record.
func TestMalleatedSignature(t *testing.T) {
	w := newWorld(t)
	good := w.log(w.by(identity(), provenance(t, identity(), image)))
	bad := good
	bad.Signature = malleate(t, good.Signature)
	signed := good.Signed()
	c := must(x509.ParseCertificate(good.Certificate))(t)
	if bytes.Equal(bad.Signature, good.Signature) || !ecdsa.VerifyASN1(c.PublicKey.(*ecdsa.PublicKey), signed[:], bad.Signature) {
		t.Fatal("the other signature is not one")
	}
	w.refused(t, w.bundle(bad), image.Ref.Digest, attest.TimestampInvalid, false)
	bad.Timestamp = w.stamp(forged{}, bad.Signature)
	w.refused(t, w.bundle(bad), image.Ref.Digest, attest.LogProofInvalid, false)
}

func malleate(tb testing.TB, sig []byte) []byte {
	tb.Helper()
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(sig, &v); err != nil {
		tb.Fatal(err)
	}
	v.S = new(big.Int).Sub(elliptic.P256().Params().N, v.S)
	return must(asn1.Marshal(v))(tb)
}

// Statements that were signed and logged as they must be, and say something that
// is refused.
func TestStatements(t *testing.T) {
	w := newWorld(t)
	id := identity()
	hex := image.Ref.Digest.Hex()
	evil := attest.Hash([]byte("evil")).Hex()
	with := func(subjects string) string {
		return `{"_type":"https://in-toto.io/Statement/v1","subject":` + subjects + `,"predicateType":"https://example.com/x","predicate":{}}`
	}
	one := `[{"digest":{"sha256":"` + hex + `"}}]`
	theirs := id
	theirs.Build.Commit = "0000000000000000000000000000000000000000"
	for _, row := range []struct {
		name, payload string
		want          attest.Reason
		stricter      bool
	}{
		{"C10 no subjects", with(`[]`), attest.SubjectMissing, false},
		{"C10 subjects null", with(`null`), attest.SubjectMissing, false},
		{"C10 no subject field", strings.Replace(with(`[]`), `"subject":[],`, "", 1), attest.SubjectMissing, false},
		{"C22 a null subject", with(`[null,{"digest":{"sha256":"` + hex + `"}}]`), attest.SubjectMissing, false},
		{"D06 another subject without digest", with(`[{"digest":{"sha256":"` + hex + `"}},{"name":"x"}]`), attest.SubjectMissing, true},
		{"D06 another subject in upper case", with(`[{"digest":{"sha256":"` + hex + `"}},{"digest":{"sha256":"` + strings.ToUpper(evil) + `"}}]`), attest.StatementMalformed, true},
		{"D07 other algorithm only", with(`[{"digest":{"sha512":"` + hex + hex + `"}}]`), attest.SubjectMissing, false},
		{"D07 algorithm in other case", with(`[{"digest":{"SHA256":"` + hex + `"}}]`), attest.SubjectMissing, false},
		{"D07 upper-case hex", with(`[{"digest":{"sha256":"` + strings.ToUpper(hex) + `"}}]`), attest.StatementMalformed, true},
		{"D07 two algorithms", with(`[{"digest":{"sha256":"` + hex + `","sha512":"` + evil + evil + `"}}]`), attest.StatementMalformed, true},
		{"D07 prefix inside", with(`[{"digest":{"sha256":"sha256:` + hex + `"}}]`), attest.StatementMalformed, false},
		{"D07 cut", with(`[{"digest":{"sha256":"` + hex[:62] + `"}}]`), attest.StatementMalformed, false},
		{"D07 empty", with(`[{"digest":{"sha256":""}}]`), attest.StatementMalformed, false},
		{"D07 zero", with(`[{"digest":{"sha256":"` + strings.Repeat("0", 64) + `"}}]`), attest.StatementMalformed, false},
		{"C03 many subjects", with("[" + strings.Repeat(one[1:len(one)-1]+",", 1024) + one[1:]), attest.TooLarge, false},
		{"D03 subject twice", with(`[{"digest":{"sha256":"` + evil + `"}}],"subject":` + one), attest.StatementMalformed, false},
		{"D03 subject in other case", with(`[{"digest":{"sha256":"` + evil + `"}}],"Subject":` + one), attest.StatementMalformed, false},
		{"D03 subject with a long s", with(`[{"digest":{"sha256":"` + evil + `"}}],"\u017fubject":` + one), attest.StatementMalformed, false},
		{"D09 digest twice", with(`[{"digest":{"sha256":"` + evil + `","sha256":"` + hex + `"}}]`), attest.StatementMalformed, false},
		{"D03 inside the predicate", strings.Replace(with(one), `{}}`, `{"a":[{"b":1,"B":2}]}}`, 1), attest.StatementMalformed, true},
		{"D03 unknown field", strings.Replace(with(one), `"predicate":{}`, `"predicate":{},"x":1`, 1), attest.StatementMalformed, false},
		{"D03 field in other case only", strings.Replace(with(one), `"predicateType"`, `"PredicateType"`, 1), attest.StatementMalformed, false},
		{"D03 unknown field of a subject", with(`[{"uri":"x","digest":{"sha256":"` + hex + `"}}]`), attest.StatementMalformed, true},
		{"D04 trailing data", with(one) + `{}`, attest.StatementMalformed, false},
		{"D04 byte order mark", "\ufeff" + with(one), attest.StatementMalformed, false},
		{"D04 not UTF-8", strings.Replace(with(one), "example", "ex\xffmple", 1), attest.StatementMalformed, false},
		{"D04 half a character", strings.Replace(with(one), "example", `ex\ud800mple`, 1), attest.StatementMalformed, false},
		{"D04 number out of range", strings.Replace(with(one), `{}}`, `{"a":1e400}}`, 1), attest.StatementMalformed, false},
		{"D04 nested", strings.Replace(with(one), `{}}`, `{"a":`+strings.Repeat("[", 130)+strings.Repeat("]", 130)+`}}`, 1), attest.StatementMalformed, true},
		{"D04 empty", "", attest.StatementMalformed, false},
		{"D04 an array", `[]`, attest.StatementMalformed, false},
		{"D02 no predicate type", strings.Replace(with(one), "https://example.com/x", "", 1), attest.PredicateType, true},
		{"D02 predicate null", strings.Replace(with(one), `{}}`, `null}`, 1), attest.StatementMalformed, true},
		{"D02 predicate is a list", strings.Replace(with(one), `{}}`, `[]}`, 1), attest.StatementMalformed, false},
		{"C18 statement v0.1", strings.Replace(with(one), "Statement/v1", "Statement/v0.1", 1), attest.StatementMalformed, true},
		{"C18 no statement type", strings.Replace(with(one), "https://in-toto.io/Statement/v1", "", 1), attest.StatementMalformed, true},
		{"D02 provenance that is none", string(statementOf(attest.PredicateProvenance, `{"buildDefinition":[]}`)), attest.StatementMalformed, true},
		{"D10 provenance of another build", string(provenance(t, theirs, image)), attest.SignerMismatch, true},
		{"D10 provenance of no build", string(statementOf(attest.PredicateProvenance, `{}`)), attest.SignerMismatch, true},
		{"D01 summary by a job", string(must(attest.VSAStatement(service, image, attest.Promotion{}))(t)), attest.SignerMismatch, true},
		{"D01 promotion by a job", string(must(attest.PromotionStatement(image, attest.Promotion{}))(t)), attest.SignerMismatch, true},
		{"D01 denial by a job", string(must(attest.DenialStatement(image.Ref, attest.Denial{}))(t)), attest.SignerMismatch, true},
		{"D01 effect by a job", string(must(attest.EffectStatement(image.Ref, attest.Effect{}))(t)), attest.SignerMismatch, true},
		{"D01 policy by a job", string(must(attest.PolicyStatement(attest.PolicyChange{Digest: image.Ref.Digest}))(t)), attest.SignerMismatch, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := w.by(id, []byte(row.payload))
			if got := attest.ReasonOf(w.verifier.Envelope(e)); got != row.want {
				t.Errorf("self-check: %q, want %q", got, row.want)
			}
			w.refused(t, w.bundle(w.log(e)), image.Ref.Digest, row.want, row.stricter)
		})
	}
	for _, row := range []struct {
		name     string
		envelope attest.Envelope
	}{
		{"D01 provenance by the gate key", w.gate(provenance(t, id, image))},
		{"D01 provenance by the gate's certificate", w.by(attest.GateIdentity(service), provenance(t, id, image))},
		{"D01 signature by the gate key", w.gate(must(attest.SignatureStatement(image, "r"))(t))},
		{"D01 signature by the gate's certificate", w.by(attest.GateIdentity(service), must(attest.SignatureStatement(image, "r"))(t))},
		{"D01 promotion by the gate's certificate", w.by(attest.GateIdentity(service), must(attest.PromotionStatement(image, attest.Promotion{}))(t))},
	} {
		t.Run(row.name, func(t *testing.T) {
			w.refused(t, w.bundle(w.log(row.envelope)), image.Ref.Digest, attest.SignerMismatch, true)
		})
	}
	t.Run("C03 payload too long", func(t *testing.T) {
		e := w.by(id, statementOf("https://example.com/x", `{"a":"`+strings.Repeat("a", 24<<20)+`"}`))
		w.refused(t, w.bundle(w.log(e)), image.Ref.Digest, attest.TooLarge, true)
	})
	t.Run("H05 signed by the log key", func(t *testing.T) {
		e := w.gate(statementOf("https://example.com/x", "{}"))
		signed := e.Signed()
		e.Signature = must(w.keys["log"].Sign(rand.Reader, signed[:], nil))(t)
		e.PublicKey = spki(t, &w.keys["log"].PublicKey)
		e.Timestamp = w.stamp(forged{}, e.Signature)
		if got := attest.ReasonOf(w.verifier.Envelope(e)); got != attest.SignerMismatch {
			t.Errorf("Envelope: %q", got)
		}
		w.refused(t, w.bundle(w.log(e)), image.Ref.Digest, attest.SignerMismatch, false)
	})
}

// C22: a null or an empty value anywhere is refused, not fatal.
func TestNullAnywhere(t *testing.T) {
	w := newWorld(t)
	raw := w.bundle(w.log(w.by(identity(), provenance(t, identity(), image))))
	var paths [][]any
	var walk func(v any, path []any)
	walk = func(v any, path []any) {
		if len(path) > 0 {
			paths = append(paths, slices.Clone(path))
		}
		switch v := v.(type) {
		case map[string]any:
			for k := range v {
				walk(v[k], append(path, k))
			}
		case []any:
			for i := range v {
				walk(v[i], append(path, i))
			}
		}
	}
	var whole any
	must0(t, json.Unmarshal(raw, &whole))
	walk(whole, nil)
	if len(paths) < 30 {
		t.Fatalf("only %d places", len(paths))
	}
	for _, path := range paths {
		for _, value := range []any{nil, "", map[string]any{}, []any{}, []any{nil}, json.Number("7")} {
			bad := edit(t, raw, func(b map[string]any) {
				switch last := path[len(path)-1].(type) {
				case string:
					in(b, path[:len(path)-1]...).(map[string]any)[last] = value
				case int:
					in(b, path[:len(path)-1]...).([]any)[last] = value
				}
			})
			if ev, err := w.verifier.Bundle(bad, image.Ref.Digest); err == nil || ev != nil {
				t.Errorf("C22 %v at %v is accepted", value, path)
			}
		}
	}
}

func name(san string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		u, err := url.Parse(san)
		if err != nil {
			panic(err)
		}
		c.URIs = []*url.URL{u}
	}
}

func hint(tb testing.TB, key *ecdsa.PublicKey) string {
	sum := sha256.Sum256(spki(tb, key))
	return b64(sum[:])
}

// note changes the checkpoint's text.
func note(b map[string]any, change func(string) string) {
	c := proofOf(b)["checkpoint"].(map[string]any)
	c["envelope"] = change(c["envelope"].(string))
}

// rootLine alters the root hash in the signed text.
func rootLine(b map[string]any) {
	note(b, func(s string) string {
		lines := strings.SplitN(s, "\n", 4)
		if lines[2][0] == 'A' {
			lines[2] = "B" + lines[2][1:]
		} else {
			lines[2] = "A" + lines[2][1:]
		}
		return strings.Join(lines, "\n")
	})
}
