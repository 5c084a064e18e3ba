//go:build linux

package interop_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	sigroot "github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	sumdb "golang.org/x/mod/sumdb/note"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

type object = map[string]any

// row is one alteration of the real provenance of the real image.
type row struct {
	name  string
	alter func(b object)
	want  attest.Reason // of the verifier; "" when it accepts
	// Who else accepts, where this service refuses more than it must: "g" for
	// sigstore-go, "2" and "3" for the cosigns. Those who do are named so that an
	// alteration which nobody reads is not taken for one that was found out.
	stock string
}

// rows returns the table. In it theirs is the signature of the same image by the
// same certificate, and foreign the provenance of another image by the next token
// of the same job.
func (w *world) rows(t *testing.T) []row {
	var theirs, foreign object
	check(t, json.Unmarshal(w.image.signature, &theirs))
	next := w.push(t, "acme/api", on(t, w.push(t, "base/debian", w.img)))
	second := w.sign(t, w.Token(object{"run_id": "9913"}), next.ImageRef, "")
	check(t, json.Unmarshal(second.provenance, &foreign))
	if fmt.Sprint(material(foreign)["certificate"]) == fmt.Sprint(material(theirs)["certificate"]) {
		t.Fatal("both tokens were given one certificate")
	}
	text := func(change func(string) string) func(object) {
		return func(b object) {
			c := proof(b)["checkpoint"].(object)
			c["envelope"] = change(c["envelope"].(string))
		}
	}
	line := func(n int, change func(string) string) func(object) {
		return text(func(s string) string {
			lines := strings.SplitAfter(s, "\n")
			lines[n] = change(lines[n])
			return strings.Join(lines, "")
		})
	}
	stamps := func(b object) object { return material(b)["timestampVerificationData"].(object) }
	stamp := func(b object) object { return stamps(b)["rfc3161Timestamps"].([]any)[0].(object) }
	sig := func(b object) object { return envelope(b)["signatures"].([]any)[0].(object) }
	return []row{
		// The same procedure with nothing altered is accepted by all.
		{"nothing", func(object) {}, "", "g23"},

		// What was signed.
		{"C01 payload altered", func(b object) { flip(t, envelope(b), "payload", 40) }, attest.SignatureInvalid, ""},
		{"C01 payload names another digest", func(b object) {
			p := unbase64(t, envelope(b)["payload"])
			envelope(b)["payload"] = base64.StdEncoding.EncodeToString(bytes.ReplaceAll(p, []byte(w.image.Digest.Hex()), []byte(next.Digest.Hex())))
		}, attest.SignatureInvalid, ""},
		{"C01 payload names another commit", func(b object) {
			p := unbase64(t, envelope(b)["payload"])
			envelope(b)["payload"] = base64.StdEncoding.EncodeToString(bytes.ReplaceAll(p, []byte("4be1d0c7"), []byte("00000000")))
		}, attest.SignatureInvalid, ""},
		{"C01 payload of the signature", func(b object) { envelope(b)["payload"] = envelope(theirs)["payload"] }, attest.SignatureInvalid, ""},
		{"C01 signature altered", func(b object) { flip(t, sig(b), "sig", -3) }, attest.SignatureInvalid, ""},
		{"C01 signature of another statement", func(b object) { sig(b)["sig"] = sig(theirs)["sig"] }, attest.SignatureInvalid, ""},
		{"C08 signature removed", func(b object) { envelope(b)["signatures"] = []any{} }, attest.SignatureCount, ""},
		{"C08 signature twice", func(b object) { envelope(b)["signatures"] = []any{sig(b), sig(b)} }, attest.SignatureCount, ""},
		{"C09 other payload type", func(b object) { envelope(b)["payloadType"] = "text/plain" }, attest.PayloadType, ""},
		{"C11 statement about another image", func(b object) { clear(b); maps.Copy(b, foreign) }, attest.SubjectMismatch, ""},
		{"key id is set", func(b object) { sig(b)["keyid"] = "k" }, attest.BundleMalformed, ""},

		// By whom.
		{"C01 certificate altered", func(b object) { flip(t, material(b)["certificate"].(object), "rawBytes", -6) }, attest.CertificateInvalid, ""},
		{"C01 certificate of the same job's next token", func(b object) { material(b)["certificate"] = material(foreign)["certificate"] }, attest.SignatureInvalid, ""},
		{"C16 certificate swapped for the gate key", func(b object) {
			delete(material(b), "certificate")
			material(b)["publicKey"] = object{"hint": w.hint(t)}
		}, attest.SignatureInvalid, ""},
		{"C16 certificate removed", func(b object) { delete(material(b), "certificate") }, attest.BundleMalformed, ""},

		// When.
		{"C12 timestamp removed", func(b object) { delete(material(b), "timestampVerificationData") }, attest.TimestampInvalid, ""},
		{"E01 timestamp over another signature", func(b object) { stamp(b)["signedTimestamp"] = stamp(theirs)["signedTimestamp"] }, attest.TimestampInvalid, ""},
		{"E01 timestamp altered", func(b object) { flip(t, stamp(b), "signedTimestamp", -6) }, attest.TimestampInvalid, ""},
		{"C02 timestamp twice", func(b object) { stamps(b)["rfc3161Timestamps"] = []any{stamp(b), stamp(b)} }, attest.TimestampInvalid, "g23"},

		// The checkpoint.
		{"F06 checkpoint of another size", line(1, func(s string) string { return "1" + s }), attest.CheckpointInvalid, ""},
		{"F06 checkpoint of another root", line(2, other), attest.CheckpointInvalid, ""},
		{"F06 checkpoint of another log", line(0, func(s string) string { return "x" + s }), attest.CheckpointInvalid, ""},
		{"F06 checkpoint with another signature", line(4, func(s string) string { return s[:len(s)-12] + other(s[len(s)-12:]) }), attest.CheckpointInvalid, ""},
		{"F06 checkpoint not signed", text(func(s string) string { head, _, _ := strings.Cut(s, "\n\n"); return head + "\n\n" }), attest.CheckpointInvalid, ""},
		{"F06 checkpoint signed by a stranger", text(func(s string) string { return w.resign(t, s) }), attest.CheckpointInvalid, ""},
		{"F06 checkpoint of another entry", func(b object) { proof(b)["checkpoint"] = proof(foreign)["checkpoint"] }, attest.CheckpointInvalid, ""},
		{"F06 checkpoint removed", func(b object) { delete(proof(b), "checkpoint") }, attest.CheckpointInvalid, ""},
		{"F06 size beside the checkpoint", func(b object) { proof(b)["treeSize"] = "4096" }, attest.CheckpointInvalid, "g23"},
		{"F06 root beside the checkpoint", func(b object) { flip(t, proof(b), "rootHash", 0) }, attest.CheckpointInvalid, "g23"},

		// The inclusion proof.
		{"F08 proof altered", func(b object) { flip(t, proof(b)["hashes"], 0, 0) }, attest.LogProofInvalid, ""},
		{"F08 proof cut", func(b object) { proof(b)["hashes"] = proof(b)["hashes"].([]any)[1:] }, attest.LogProofInvalid, ""},
		{"F08 proof longer", func(b object) { h := proof(b)["hashes"].([]any); proof(b)["hashes"] = append(h, h[0]) }, attest.LogProofInvalid, ""},
		{"F08 proof of another entry", func(b object) { entry(b)["inclusionProof"] = entry(theirs)["inclusionProof"] }, attest.LogProofInvalid, ""},
		{"F08 proof removed", func(b object) { delete(entry(b), "inclusionProof") }, attest.LogProofInvalid, ""},
		{"F08 another index", func(b object) { entry(b)["logIndex"], proof(b)["logIndex"] = "0", "0" }, attest.LogProofInvalid, ""},
		{"F08 another index in the proof", func(b object) { proof(b)["logIndex"] = "0" }, attest.LogProofInvalid, "g23"},

		// The entry.
		{"C12 entry removed", func(b object) { delete(material(b), "tlogEntries") }, attest.LogEntryMismatch, ""},
		{"C02 entry twice", func(b object) { material(b)["tlogEntries"] = []any{entry(b), entry(b)} }, attest.LogEntryMismatch, ""},
		{"C01 entry of another statement", func(b object) { material(b)["tlogEntries"] = material(theirs)["tlogEntries"] }, attest.LogEntryMismatch, ""},
		{"C01 body of another entry", func(b object) { entry(b)["canonicalizedBody"] = entry(theirs)["canonicalizedBody"] }, attest.LogEntryMismatch, "g3"},
		{"C18 other entry version", func(b object) { entry(b)["kindVersion"].(object)["version"] = "0.0.1" }, attest.LogEntryMismatch, "g23"},
		{"F06 entry of another log", func(b object) { flip(t, entry(b)["logId"].(object), "keyId", 0) }, attest.CheckpointInvalid, ""},
		{"E05 a time of the log's own", func(b object) { entry(b)["integratedTime"] = "1795194000" }, attest.LogEntryMismatch, ""},

		// The form.
		{"C18 bundle v0.1", func(b object) { b["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.1" }, attest.BundleVersion, ""},
		{"C18 no version", func(b object) { delete(b, "mediaType") }, attest.BundleVersion, ""},
		{"D03 unknown field", func(b object) { b["extra"] = "1" }, attest.BundleMalformed, ""},
		{"D05 base64 in the URL alphabet", func(b object) {
			c := material(b)["certificate"].(object)
			c["rawBytes"] = strings.NewReplacer("+", "-", "/", "_").Replace(c["rawBytes"].(string))
		}, attest.BundleMalformed, "g23"},
	}
}

// Each altered bundle as a file: what the verifier accepts sigstore-go accepts,
// and what it refuses the stock tools refuse too, unless the row says otherwise.
func TestAlteredFiles(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withAPI)
	tools := cosigns(t)
	// The client is given no gate key when it is asked about a job.
	client := must(verifier.New(must(os.ReadFile(w.root))(t), nil, w.URL))(t)
	for _, row := range w.rows(t) {
		raw := alter(t, w.image.provenance, row.alter)
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			ev, err := w.Verifier.Bundle(raw, w.image.Digest)
			if got := attest.ReasonOf(err); got != row.want || (ev == nil) == (row.want == "") {
				t.Errorf("verifier: %v, want %q", err, row.want)
			}
			_, err = client.Bundle(raw, w.image.Digest)
			if got := w.offline(t, w.image.ImageRef, raw, w.root, w.byJob()...); got != attest.ReasonOf(err) {
				t.Errorf("hallmark verify --offline: %q, want %q", got, attest.ReasonOf(err))
			}
			if got := w.stock(t, tools, raw, question{w.image.Digest, attest.PredicateProvenance, "job"}); got != row.stock {
				t.Errorf("accepted by %q, want %q", got, row.stock)
			}
		})
	}
}

// Each altered bundle as the only one at a copy of the image in a registry.
func TestAlteredReferrers(t *testing.T) {
	t.Parallel()
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, kind)
			tools := cosigns(t)
			for i, row := range w.rows(t) {
				raw := alter(t, w.image.provenance, row.alter)
				ref := w.attachCopy(t, fmt.Sprintf("altered/%d", i), raw)
				t.Run(row.name, func(t *testing.T) {
					t.Parallel()
					found, err := w.Images.Attached(t.Context(), ref)
					if err != nil || len(found) != 1 || !bytes.Equal(found[0], raw) {
						t.Fatalf("the registry has %d bundles, %v", len(found), err)
					}
					if _, err := w.Verifier.Bundle(found[0], ref.Digest); attest.ReasonOf(err) != row.want {
						t.Errorf("verifier: %v, want %q", err, row.want)
					}
					common := slices.Concat(w.trusting(w.root), w.byJob(), []string{ref.String()})
					for _, c := range tools {
						ok := strings.Contains(row.stock, c.name[1:])
						c.want(t, ok, append([]string{"verify"}, common...)...)
						c.want(t, ok, append([]string{"verify-attestation", "--type", "slsaprovenance1"}, common...)...)
					}
				})
			}
		})
	}
}

// Whatever the verifier accepts the stock tools accept: every bundle that the
// service returned, in other spellings of JSON, and with each of its values
// changed, removed or repeated.
func TestNeverMoreThanStock(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withAPI)
	tools := cosigns(t)
	w.promote(t, w.image.ImageRef, "test")
	for name, good := range map[string]struct {
		bundle []byte
		question
	}{
		"signature":              {w.image.signature, question{w.image.Digest, attest.PredicateSignature, "job"}},
		"provenance":             {w.image.provenance, question{w.image.Digest, attest.PredicateProvenance, "job"}},
		"provenance of an index": {w.index.provenance, question{w.index.Digest, attest.PredicateProvenance, "job"}},
		"provenance of a child":  {w.index.provenance, question{w.children[1], attest.PredicateProvenance, "job"}},
		"summary by certificate": {w.recorded(t, attest.KindVSA, "certificate"), question{w.image.Digest, attest.PredicateVSA, "gate"}},
		"summary by key":         {w.recorded(t, attest.KindVSA, "publicKey"), question{w.image.Digest, attest.PredicateVSA, "key"}},
		"promotion":              {w.recorded(t, attest.KindPromotion, "publicKey"), question{w.image.Digest, attest.PredicatePromotion, "key"}},
		"effect":                 {w.recorded(t, attest.KindEffect, "publicKey"), question{w.image.Digest, attest.PredicateEffect, "key"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for spelling, raw := range spellings(t, good.bundle) {
				if _, err := w.Verifier.Bundle(raw, good.about); err != nil {
					t.Errorf("%s: the verifier refuses: %v", spelling, err)
				}
				if got := w.stock(t, tools, raw, good.question); got != "g23" {
					t.Errorf("%s: accepted by %q, want all", spelling, got)
				}
			}
			tried := 0
			for change, raw := range changes(t, good.bundle) {
				tried++
				if _, err := w.Verifier.Bundle(raw, good.about); err != nil {
					continue
				}
				if got := w.stock(t, tools, raw, good.question); got != "g23" {
					t.Errorf("%s: the verifier accepts, of the stock tools only %q", change, got)
				}
			}
			if tried < 100 {
				t.Errorf("only %d changes were tried", tried)
			}
		})
	}
}

// A timestamp has bytes that its signature does not cover. Those that may be
// changed may be changed for everybody.
func TestEveryByteOfTimestamp(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withAPI)
	tools := cosigns(t)
	stamp := func(b object) object {
		return at(material(b), "timestampVerificationData", "rfc3161Timestamps", 0).(object)
	}
	length := len(unbase64(t, stamp(alterable(t, w.image.provenance))["signedTimestamp"]))
	for i := range length {
		raw := alter(t, w.image.provenance, func(b object) {
			changed := unbase64(t, stamp(b)["signedTimestamp"])
			changed[i] ^= 1 << (i % 8)
			stamp(b)["signedTimestamp"] = base64.StdEncoding.EncodeToString(changed)
		})
		if _, err := w.Verifier.Bundle(raw, w.image.Digest); err != nil {
			continue
		}
		if got := w.stock(t, tools, raw, question{w.image.Digest, attest.PredicateProvenance, "job"}); got != "g23" {
			t.Errorf("byte %d of %d: the verifier accepts, of the stock tools only %q", i, length, got)
		}
	}
}

// question is what a verifier is asked about a bundle.
type question struct {
	about attest.Digest
	kind  string // predicate type
	by    string // "job", "gate", or "key" for the gate key
}

// stock returns who of sigstore-go ("g") and the cosigns ("2", "3") accepts a bundle.
func (w *world) stock(t *testing.T, tools []cosign, raw []byte, q question) string {
	t.Helper()
	out := ""
	if w.sigstoreGo(t, raw, q) {
		out = "g"
	}
	who := map[string][]string{"job": w.byJob(), "gate": w.byGate(), "key": {"--key", w.gateKey}}[q.by]
	path := file(t, "bundle.sigstore.json", raw)
	for _, c := range tools {
		if ok, _ := c.accepts(t, slices.Concat([]string{"verify-blob-attestation", "--bundle", path, "--type", q.kind}, about(q.about), w.trusting(w.root), who)...); ok {
			out += c.name[1:]
		}
	}
	return out
}

// sigstoreGo is what somebody would write with that library alone.
func (w *world) sigstoreGo(t *testing.T, raw []byte, q question) bool {
	t.Helper()
	var trusted sigroot.TrustedMaterial = must(sigroot.NewTrustedRootFromPath(w.root))(t)
	opts := []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithSignedTimestamps(1), verify.WithSignedCertificateTimestamps(1)}
	var who verify.PolicyOption
	switch q.by {
	case "job":
		who = verify.WithCertificateIdentity(must(verify.NewShortCertificateIdentity(w.job.Issuer, "", w.job.SAN, ""))(t))
	case "gate":
		who = verify.WithCertificateIdentity(must(verify.NewShortCertificateIdentity(w.URL, "", w.URL+"/gate", ""))(t))
	default:
		key := must(signature.LoadVerifierFromPEMFile(w.gateKey, crypto.SHA256))(t)
		trusted = sigroot.TrustedMaterialCollection{trusted, sigroot.NewTrustedPublicKeyMaterialFromMapping(map[string]*sigroot.ExpiringKey{
			w.hint(t): sigroot.NewExpiringKey(key, time.Time{}, time.Time{}),
		})}
		who, opts = verify.WithKey(), opts[:2]
	}
	var b bundle.Bundle
	if b.UnmarshalJSON(raw) != nil {
		return false
	}
	_, err := must(verify.NewVerifier(trusted, opts...))(t).Verify(&b, verify.NewPolicy(verify.WithArtifactDigest("sha256", q.about[:]), who))
	return err == nil
}

// hint names the gate key as bundles do.
func (w *world) hint(t *testing.T) string {
	t.Helper()
	block, _ := pem.Decode(must(os.ReadFile(w.gateKey))(t))
	sum := sha256.Sum256(block.Bytes)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// resign signs a checkpoint's text again, by a key of the same name that nobody trusts.
func (w *world) resign(t *testing.T, checkpoint string) string {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	by := must(note.NewNoteSigner(t.Context(), w.Signer.Origin(), must(signature.LoadECDSASigner(key, crypto.SHA256))(t)))(t)
	text, _, _ := strings.Cut(checkpoint, "\n\n")
	return string(must(sumdb.Sign(&sumdb.Note{Text: text + "\n"}, by))(t))
}

// spellings returns the same bundle in other JSON.
func spellings(t *testing.T, raw []byte) map[string][]byte {
	t.Helper()
	var indented bytes.Buffer
	check(t, json.Indent(&indented, raw, " ", "\t"))
	escaped := bytes.ReplaceAll(raw, []byte("application"), []byte(`\u0061pplicatio\u006E`))
	return map[string][]byte{
		"as returned": raw,
		"indented":    append([]byte("\r\n\t "), append(indented.Bytes(), '\n')...),
		"names sorted, slashes escaped, defaults spelt out": bytes.ReplaceAll(alter(t, escaped, func(b object) {
			sig := envelope(b)["signatures"].([]any)[0].(object)
			sig["keyid"] = ""
		}), []byte("/"), []byte(`\/`)),
	}
}

// changes returns the bundle with each value changed, each removed and each list
// entry repeated, by what was done. Bytes are changed at several places.
func changes(t *testing.T, raw []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	put := func(what string, path []any, change func(parent any, last any)) {
		out[fmt.Sprintf("%s %v", what, path)] = alter(t, raw, func(b object) {
			change(at(b, path[:len(path)-1]...), path[len(path)-1])
		})
	}
	var walk func(v any, path []any)
	walk = func(v any, path []any) {
		path = slices.Clip(path)
		switch v := v.(type) {
		case object:
			for name, below := range v {
				put("without", append(path, name), func(parent, last any) { delete(parent.(object), last.(string)) })
				walk(below, append(path, name))
			}
		case []any:
			if len(v) > 0 {
				put("repeated", path, func(parent, last any) {
					parent.(object)[last.(string)] = append(slices.Clone(v), v[len(v)-1])
				})
			}
			for i, below := range v {
				walk(below, append(path, i))
			}
		case string:
			for which, altered := range variants(v) {
				put("changed "+which, path, func(parent, last any) { set(parent, last, altered) })
			}
		}
	}
	walk(alterable(t, raw), nil)
	return out
}

// variants returns other values of a text, of base64 and of a number.
func variants(s string) map[string]string {
	out := map[string]string{"to nothing": "", "by a letter": s + "x"}
	if n, err := strconv.Atoi(s); err == nil {
		out["by one"] = strconv.Itoa(n + 1)
		return out
	}
	if raw, err := base64.StdEncoding.DecodeString(s); err == nil && len(raw) > 0 {
		for i := range 16 {
			changed := bytes.Clone(raw)
			changed[i*(len(raw)-1)/15] ^= 1 << (i % 8)
			out["at "+strconv.Itoa(i)+"/15"] = base64.StdEncoding.EncodeToString(changed)
		}
	}
	return out
}

// alter changes the JSON of a bundle.
func alter(t testing.TB, raw []byte, change func(b object)) []byte {
	t.Helper()
	b := alterable(t, raw)
	change(b)
	return must(json.Marshal(b))(t)
}

func alterable(t testing.TB, raw []byte) object {
	t.Helper()
	var b object
	check(t, json.Unmarshal(raw, &b))
	return b
}

// at walks down names and indices.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			v = v.(object)[p]
		case int:
			v = v.([]any)[p]
		}
	}
	return v
}

func set(parent, last, value any) {
	switch last := last.(type) {
	case string:
		parent.(object)[last] = value
	case int:
		parent.([]any)[last] = value
	}
}

func material(b object) object { return b["verificationMaterial"].(object) }

func envelope(b object) object { return b["dsseEnvelope"].(object) }

func entry(b object) object { return material(b)["tlogEntries"].([]any)[0].(object) }

func proof(b object) object { return entry(b)["inclusionProof"].(object) }

// flip alters one bit of the base64 text in parent.
func flip(t testing.TB, parent, last any, where int) {
	t.Helper()
	raw := unbase64(t, at(parent, last))
	raw[(where+len(raw))%len(raw)] ^= 1
	set(parent, last, base64.StdEncoding.EncodeToString(raw))
}

func unbase64(t testing.TB, text any) []byte {
	t.Helper()
	return must(base64.StdEncoding.DecodeString(text.(string)))(t)
}

// other returns base64 text whose first letter is another one.
func other(s string) string {
	if s[0] == 'A' {
		return "B" + s[1:]
	}
	return "A" + s[1:]
}
