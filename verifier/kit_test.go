package verifier_test

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/digitorus/timestamp"
	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/sigstore/fulcio/pkg/certificate"
	rekornote "github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	flog "github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/merkle/testonly"
	sumdb "golang.org/x/mod/sumdb/note"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
)

const service = "https://hallmark.example.com:8443"

// world is a service with a log in memory, and everything that an attacker who
// stole one key or the other could use.
type world struct {
	tb       testing.TB
	now      time.Time
	signer   *signer.Signer
	verifier *verifier.Verifier
	keys     map[string]*ecdsa.PrivateKey
	ca, tsa  *x509.Certificate
	root     *x509.Certificate
	tree     *testonly.Tree

	byCertificate, byKey *verify.Verifier // plain sigstore-go
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	w := &world{tb: tb, now: time.Now().Truncate(time.Second), tree: testonly.New(rfc6962.DefaultHasher), keys: map[string]*ecdsa.PrivateKey{}}
	cfg := signer.Config{Dir: filepath.Join(tb.TempDir(), "keys"), Service: service, Now: func() time.Time { return w.now }}
	must0(tb, signer.Init(cfg))
	w.signer = must(signer.Open(cfg))(tb)
	tb.Cleanup(w.signer.Close)
	w.verifier = must(verifier.New(w.signer.TrustedRoot(), w.signer.GateKeyPEM(), service))(tb)
	for _, name := range []string{"root", "intermediate", "tsa", "ct", "log", "gate"} {
		block, _ := pem.Decode(must(os.ReadFile(filepath.Join(cfg.Dir, name+".key")))(tb))
		w.keys[name] = must(x509.ParsePKCS8PrivateKey(block.Bytes))(tb).(*ecdsa.PrivateKey)
	}
	tr := must(root.NewTrustedRootFromJSON(w.signer.TrustedRoot()))(tb)
	fulcio := tr.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	w.ca, w.root = fulcio.Intermediates[0], fulcio.Root
	w.tsa = tr.TimestampingAuthorities()[0].(*root.SigstoreTimestampingAuthority).Leaf
	w.byCertificate, w.byKey = plain(tb, tr, &w.keys["gate"].PublicKey)
	// The log is not empty, so that proofs have something in them.
	for i := range 5 {
		w.tree.AppendData([]byte{byte(i)})
	}
	return w
}

// plain returns sigstore-go as anybody would configure it.
func plain(tb testing.TB, tr *root.TrustedRoot, gate *ecdsa.PublicKey) (byCertificate, byKey *verify.Verifier) {
	hint := sha256.Sum256(spki(tb, gate))
	key := root.NewTrustedPublicKeyMaterialFromMapping(map[string]*root.ExpiringKey{
		base64.StdEncoding.EncodeToString(hint[:]): root.NewExpiringKey(must(signature.LoadDefaultVerifier(gate))(tb), time.Time{}, time.Time{}),
	})
	material := root.TrustedMaterialCollection{tr, key}
	byCertificate = must(verify.NewVerifier(material, verify.WithTransparencyLog(1), verify.WithSignedTimestamps(1), verify.WithSignedCertificateTimestamps(1)))(tb)
	byKey = must(verify.NewVerifier(material, verify.WithTransparencyLog(1), verify.WithSignedTimestamps(1)))(tb)
	return byCertificate, byKey
}

// accepts reports whether plain sigstore-go takes the bundle for want.
func (w *world) accepts(raw []byte, want attest.Digest) (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	var b bundle.Bundle
	if b.UnmarshalJSON(raw) != nil {
		return false
	}
	artifact := verify.WithArtifactDigest("sha256", want[:])
	if _, err := w.byCertificate.Verify(&b, verify.NewPolicy(artifact, verify.WithoutIdentitiesUnsafe())); err == nil {
		return true
	}
	_, err := w.byKey.Verify(&b, verify.NewPolicy(artifact, verify.WithKey()))
	return err == nil
}

// identity is a job on GitHub.
func identity() attest.Identity {
	return attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload,
		Issuer: "https://token.actions.githubusercontent.com", Subject: "repo:acme/api:ref:refs/heads/main",
		SAN:     "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main",
		TokenID: attest.Key("token"), Expires: time.Now().Add(time.Hour),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", RepositoryID: "1296269",
			OwnerURI: "https://github.com/acme", OwnerID: "9919", Visibility: "private",
			Commit: "4be1d0c9a5b1f7a2c3d4e5f60718293a4b5c6d7e", Ref: "refs/heads/main",
			WorkflowPath: ".github/workflows/release.yml", WorkflowName: "release",
			ConfigURI:    "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main",
			ConfigDigest: "4be1d0c9a5b1f7a2c3d4e5f60718293a4b5c6d7e",
			SignerURI:    "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main",
			SignerDigest: "4be1d0c9a5b1f7a2c3d4e5f60718293a4b5c6d7e",
			Event:        "push", RunURI: "https://github.com/acme/api/actions/runs/9912/attempts/1", RunID: "9912", RunAttempt: "1",
			Runner: "github-hosted", Environment: "release",
		},
	}
}

var image = attest.Image{Ref: attest.ImageRef{Repository: "registry.example.com/payments/api", Digest: attest.Hash([]byte("image"))}}

// provenance is what the service says of a job.
func provenance(tb testing.TB, id attest.Identity, img attest.Image) []byte {
	return must(attest.ProvenanceStatement(attest.ProvenanceInput{
		Service: service, Image: img, Builder: id, Request: attest.Key("request"), Finished: time.Now(),
	}))(tb)
}

// by signs payload in the name of id.
func (w *world) by(id attest.Identity, payload []byte) attest.Envelope {
	w.tb.Helper()
	return must(w.signer.Sign(must(w.signer.Credential(id))(w.tb), payload))(w.tb)
}

func (w *world) gate(payload []byte) attest.Envelope {
	w.tb.Helper()
	return must(w.signer.SignGate(payload))(w.tb)
}

// log appends an entry and three more, and returns the record with its proof.
func (w *world) log(e attest.Envelope) attest.Record {
	w.tb.Helper()
	index := w.tree.Size()
	w.tree.AppendData(e.LogEntry())
	for i := range 3 {
		w.tree.AppendData([]byte{byte(i)})
	}
	return w.at(e, index, w.tree.Size())
}

func (w *world) at(e attest.Envelope, index, size uint64) attest.Record {
	return attest.Record{
		Envelope: e, ID: e.ID(), Index: index, TreeSize: size,
		Proof:      must(w.tree.InclusionProof(index, size))(w.tb),
		Checkpoint: w.checkpoint("log", w.signer.Origin(), size, w.tree.HashAt(size)),
	}
}

// checkpoint signs any text with any of the keys.
func (w *world) checkpoint(key, origin string, size uint64, hash []byte) []byte {
	w.tb.Helper()
	s := must(signature.LoadECDSASigner(w.keys[key], crypto.SHA256))(w.tb)
	by := must(rekornote.NewNoteSigner(w.tb.Context(), w.signer.Origin(), s))(w.tb)
	return must(sumdb.Sign(&sumdb.Note{Text: string(flog.Checkpoint{Origin: origin, Size: size, Hash: hash}.Marshal())}, by))(w.tb)
}

func (w *world) bundle(r attest.Record) []byte {
	w.tb.Helper()
	return must(r.Bundle(w.signer.LogID()))(w.tb)
}

// forged describes a signature that the service would not make; the zero value
// is like one of its own.
type forged struct {
	certificate func(*x509.Certificate) // changes the template
	curve       elliptic.Curve          // of the leaf key; nil: P-256
	issuer      string                  // key that certifies; "": intermediate
	sct         string                  // key that signs the SCT; "": ct; "none"; "poison": make the precertificate
	tsa         string                  // key that stamps; "": tsa
	stamp       func(*timestamp.Timestamp)
	payloadType string
	noExt       bool
	vouches     string // OIDC issuer in the certificate; "": identity's
}

// forge signs payload as f says, with the real keys.
func (w *world) forge(f forged, payload []byte) attest.Envelope {
	w.tb.Helper()
	if f.curve == nil {
		f.curve = elliptic.P256()
	}
	key := must(ecdsa.GenerateKey(f.curve, rand.Reader))(w.tb)
	e := attest.Envelope{PayloadType: attest.InTotoPayload, Payload: payload, Certificate: w.leaf(f, key)}
	if f.payloadType != "" {
		e.PayloadType = f.payloadType
	}
	signed := e.Signed()
	e.Signature = must(key.Sign(rand.Reader, signed[:], crypto.SHA256))(w.tb)
	e.Timestamp = w.stamp(f, e.Signature)
	return e
}

func (w *world) leaf(f forged, key *ecdsa.PrivateKey) []byte {
	w.tb.Helper()
	san := must(url.Parse(identity().SAN))(w.tb)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: w.now.Add(-time.Second), NotAfter: w.now.Add(10 * time.Minute),
		URIs: []*url.URL{san}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	if !f.noExt {
		template.ExtraExtensions = must(certificate.Extensions{Issuer: cmp.Or(f.vouches, identity().Issuer)}.Render())(w.tb)
	}
	if f.certificate != nil {
		f.certificate(template)
	}
	parent, issuer := *w.ca, w.keys["intermediate"]
	if f.issuer != "" {
		issuer = w.keys[f.issuer]
		parent.PublicKey = issuer.Public() // x509 signs only when they fit
	}
	extensions := template.ExtraExtensions
	if f.sct != "none" {
		template.ExtraExtensions = append(extensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 3}, Critical: true, Value: asn1.NullBytes})
		pre := must(x509.CreateCertificate(rand.Reader, template, &parent, key.Public(), issuer))(w.tb)
		by := w.keys["ct"]
		if f.sct == "poison" {
			return pre
		}
		if f.sct != "" {
			by = w.keys[f.sct]
		}
		template.ExtraExtensions = append(extensions, w.sct(pre, by))
	}
	return must(x509.CreateCertificate(rand.Reader, template, &parent, key.Public(), issuer))(w.tb)
}

// precertificate is one as f says, signed for the log by the authority.
func (w *world) precertificate(f forged) attest.Envelope {
	w.tb.Helper()
	f.sct = "poison"
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(w.tb)
	e := attest.Envelope{PayloadType: attest.PrecertificatePayload, Payload: w.leaf(f, key), PublicKey: w.ca.RawSubjectPublicKeyInfo}
	signed := e.Signed()
	e.Signature = must(w.keys["intermediate"].Sign(rand.Reader, signed[:], crypto.SHA256))(w.tb)
	return e
}

// sct follows Fulcio's way, independent of the signer's.
func (w *world) sct(pre []byte, by *ecdsa.PrivateKey) pkix.Extension {
	w.tb.Helper()
	at := uint64(w.now.UnixMilli())
	chain := []ct.ASN1Cert{{Data: pre}, {Data: w.ca.Raw}, {Data: w.root.Raw}}
	leaf := must(ct.MerkleTreeLeafFromRawChain(chain, ct.PrecertLogEntryType, at))(w.tb)
	out := ct.SignedCertificateTimestamp{SCTVersion: ct.V1, LogID: ct.LogID{KeyID: sha256.Sum256(spki(w.tb, &w.keys["ct"].PublicKey))}, Timestamp: at}
	input := must(ct.SerializeSCTSignatureInput(out, ct.LogEntry{Leaf: *leaf}))(w.tb)
	signed := must(tls.CreateSignature(*by, tls.SHA256, input))(w.tb)
	out.Signature = ct.DigitallySigned(signed)
	list := ctx509.SignedCertificateTimestampList{SCTList: []ctx509.SerializedSCT{{Val: must(tls.Marshal(out))(w.tb)}}}
	return pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2}, Value: must(asn1.Marshal(must(tls.Marshal(list))(w.tb)))(w.tb)}
}

func (w *world) stamp(f forged, sig []byte) []byte {
	w.tb.Helper()
	imprint := sha256.Sum256(sig)
	ts := timestamp.Timestamp{HashAlgorithm: crypto.SHA256, HashedMessage: imprint[:], Time: w.now.UTC(), Policy: asn1.ObjectIdentifier{1, 2, 3}}
	if f.stamp != nil {
		f.stamp(&ts)
	}
	key := w.keys["tsa"]
	if f.tsa != "" {
		key = w.keys[f.tsa]
	}
	return must(ts.CreateResponseWithOpts(w.tsa, key, crypto.SHA256))(w.tb)
}

// edit changes the JSON of a bundle.
func edit(tb testing.TB, raw []byte, change func(b map[string]any)) []byte {
	tb.Helper()
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var b map[string]any
	must0(tb, dec.Decode(&b))
	change(b)
	return must(json.Marshal(b))(tb)
}

// in walks down names and indices.
func in(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			v = v.(map[string]any)[p]
		case int:
			v = v.([]any)[p]
		}
	}
	return v
}

func entryOf(b map[string]any) map[string]any {
	return in(b, "verificationMaterial", "tlogEntries", 0).(map[string]any)
}

func proofOf(b map[string]any) map[string]any { return entryOf(b)["inclusionProof"].(map[string]any) }

func envelopeOf(b map[string]any) map[string]any { return b["dsseEnvelope"].(map[string]any) }

func material(b map[string]any) map[string]any {
	return b["verificationMaterial"].(map[string]any)
}

// flip alters one bit of the base64 text at name.
func flip(tb testing.TB, m map[string]any, name string, at int) {
	tb.Helper()
	raw := unbase64(tb, m[name].(string))
	raw[(at+len(raw))%len(raw)] ^= 1
	m[name] = base64.StdEncoding.EncodeToString(raw)
}

func unbase64(tb testing.TB, s string) []byte {
	tb.Helper()
	return must(base64.StdEncoding.DecodeString(s))(tb)
}

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func spki(tb testing.TB, key *ecdsa.PublicKey) []byte {
	tb.Helper()
	return must(x509.MarshalPKIXPublicKey(key))(tb)
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(tb testing.TB) T {
		tb.Helper()
		must0(tb, err)
		return v
	}
}

func must0(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func gateKey(tb testing.TB, text []byte) *ecdsa.PublicKey {
	tb.Helper()
	block, _ := pem.Decode(text)
	return must(x509.ParsePKIXPublicKey(block.Bytes))(tb).(*ecdsa.PublicKey)
}
