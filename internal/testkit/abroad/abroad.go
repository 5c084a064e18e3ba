// Package abroad gives tests what others sign: a Sigstore that is not ours, and a
// vendor with a long-lived key. Nothing of it is made with the product's own code.
package abroad

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"maps"
	"testing"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	bundlev1 "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonv1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	dssev1 "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	rekorv1 "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
)

// Who signs, unless a test says otherwise.
const (
	SAN    = "release@vendor.example"
	Issuer = "https://accounts.vendor.example"
)

// Sigstore is a foreign one, as sigstore-go's own tests have it: a certificate
// authority without certificate log, a timestamp authority and a Rekor v1 log.
type Sigstore struct {
	tb testing.TB
	*ca.VirtualSigstore
}

// New makes one with keys of its own.
func New(tb testing.TB) *Sigstore {
	tb.Helper()
	return &Sigstore{tb, must(ca.NewVirtualSigstore())(tb)}
}

// TrustedRoot returns its trusted_root.json; parts that are named, of "log" and "tsa", are left out.
func (s *Sigstore) TrustedRoot(without ...string) []byte {
	s.tb.Helper()
	logs, stampers := map[string]*root.TransparencyLog{}, s.TimestampingAuthorities()
	for id, l := range s.RekorLogs() {
		own := *l
		own.ID = must(hex.DecodeString(id))(s.tb)
		logs[id] = &own
	}
	for _, part := range without {
		switch part {
		case "log":
			logs = nil
		case "tsa":
			stampers = nil
		}
	}
	tr := must(root.NewTrustedRoot(root.TrustedRootMediaType01, s.FulcioCertificateAuthorities(), nil, stampers, logs))(s.tb)
	return must(tr.MarshalJSON())(s.tb)
}

// Parts say how a bundle differs from the usual one.
type Parts struct {
	Version  string    // of the bundle: "0.1", "0.2" or "0.3", which is the default
	NoLog    bool      // no log entry: as GitHub's own Sigstore
	NoStamp  bool      // no signed timestamp
	LoggedAt time.Time // when the log took the entry; zero is five minutes from now
}

// Bundle signs a statement in the name of SAN and returns a Sigstore bundle.
func (s *Sigstore) Bundle(statement []byte, p Parts) []byte {
	s.tb.Helper()
	return s.BundleBy(SAN, Issuer, statement, p)
}

// BundleBy is Bundle for another signer.
func (s *Sigstore) BundleBy(san, issuer string, statement []byte, p Parts) []byte {
	s.tb.Helper()
	e := s.attest(san, issuer, statement, p.LoggedAt)
	cert := certificateOf(s.tb, e)
	m := &bundlev1.VerificationMaterial{}
	if p.Version == "" || p.Version == "0.3" {
		m.Content = &bundlev1.VerificationMaterial_Certificate{Certificate: &commonv1.X509Certificate{RawBytes: cert.Raw}}
	} else {
		m.Content = &bundlev1.VerificationMaterial_X509CertificateChain{X509CertificateChain: &commonv1.X509CertificateChain{
			Certificates: []*commonv1.X509Certificate{{RawBytes: cert.Raw}},
		}}
	}
	if !p.NoStamp {
		m.TimestampVerificationData = &bundlev1.TimestampVerificationData{}
		for _, raw := range must(e.Timestamps())(s.tb) {
			m.TimestampVerificationData.Rfc3161Timestamps = append(m.TimestampVerificationData.Rfc3161Timestamps,
				&commonv1.RFC3161SignedTimestamp{SignedTimestamp: raw})
		}
	}
	if !p.NoLog {
		m.TlogEntries = []*rekorv1.TransparencyLogEntry{s.entry(e)}
	}
	return encode(s.tb, p.Version, m, envelopeOf(s.tb, e))
}

func (s *Sigstore) attest(san, issuer string, statement []byte, at time.Time) *ca.TestEntity {
	s.tb.Helper()
	return must(s.AttestAtTime(san, issuer, statement, within(at), true))(s.tb)
}

// within returns at, or a moment within the certificate's ten minutes.
func within(at time.Time) time.Time {
	if at.IsZero() {
		return time.Now().Add(5 * time.Minute)
	}
	return at
}

// Signature returns what cosign's legacy .sig image holds for an image signature:
// certificate, log entry and timestamp. Payload is what was signed, loggedAt as in
// Parts.
func (s *Sigstore) Signature(payload []byte, loggedAt time.Time) attest.Layer {
	s.tb.Helper()
	e := must(s.SignAtTime(SAN, Issuer, payload, within(loggedAt)))(s.tb)
	content := must(e.SignatureContent())(s.tb)
	l := s.layer(e, "application/vnd.dev.cosign.simplesigning.v1+json", payload, must(e.Timestamps())(s.tb)[0])
	l.Annotations["dev.cosignproject.cosign/signature"] = base64.StdEncoding.EncodeToString(content.Signature())
	return l
}

// Attestation returns what cosign's legacy .att image holds for a statement.
func (s *Sigstore) Attestation(statement []byte) attest.Layer {
	s.tb.Helper()
	e := s.attest(SAN, Issuer, statement, time.Time{})
	raw := must(json.Marshal(envelopeOf(s.tb, e)))(s.tb)
	return s.layer(e, "application/vnd.dsse.envelope.v1+json", raw, must(s.TimestampResponse(raw))(s.tb))
}

func (s *Sigstore) layer(e *ca.TestEntity, mediaType string, payload, stamp []byte) attest.Layer {
	s.tb.Helper()
	entry := s.entry(e)
	rekor := must(json.Marshal(map[string]any{
		"SignedEntryTimestamp": entry.GetInclusionPromise().GetSignedEntryTimestamp(),
		"Payload": map[string]any{
			"body": base64.StdEncoding.EncodeToString(entry.GetCanonicalizedBody()), "integratedTime": entry.GetIntegratedTime(),
			"logIndex": entry.GetLogIndex(), "logID": hex.EncodeToString(entry.GetLogId().GetKeyId()),
		},
	}))(s.tb)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificateOf(s.tb, e).Raw})
	return attest.Layer{MediaType: mediaType, Payload: payload, Annotations: map[string]string{
		"dev.sigstore.cosign/certificate":      string(cert),
		"dev.sigstore.cosign/bundle":           string(rekor),
		"dev.sigstore.cosign/rfc3161timestamp": string(must(json.Marshal(map[string]any{"SignedRFC3161Timestamp": stamp}))(s.tb)),
	}}
}

// Vendor signs with a key that is published, and with nothing else.
type Vendor struct {
	tb     testing.TB
	signer signature.Signer
	PEM    []byte // the public key
	KeyID  string // hex SHA-256 of its PKIX DER
}

// NewVendor makes a vendor with a P-256 key.
func NewVendor(tb testing.TB) *Vendor {
	tb.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(tb)
	der := must(x509.MarshalPKIXPublicKey(key.Public()))(tb)
	return &Vendor{
		tb, must(signature.LoadSigner(key, crypto.SHA256))(tb),
		pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), attest.Hash(der).Hex(),
	}
}

// Bundle signs a statement and returns a Sigstore bundle v0.3.
func (v *Vendor) Bundle(statement []byte) []byte {
	v.tb.Helper()
	m := &bundlev1.VerificationMaterial{Content: &bundlev1.VerificationMaterial_PublicKey{PublicKey: &commonv1.PublicKeyIdentifier{Hint: "vendor"}}}
	return encode(v.tb, "", m, v.envelope(statement))
}

// Signature returns a layer of a .sig image without anything but the signature.
func (v *Vendor) Signature(payload []byte) attest.Layer {
	v.tb.Helper()
	return attest.Layer{MediaType: "application/vnd.dev.cosign.simplesigning.v1+json", Payload: payload, Annotations: map[string]string{
		"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(v.sign(payload)),
	}}
}

// Attestation returns a layer of an .att image.
func (v *Vendor) Attestation(statement []byte) attest.Layer {
	v.tb.Helper()
	return attest.Layer{
		MediaType: "application/vnd.dsse.envelope.v1+json", Payload: must(json.Marshal(v.envelope(statement)))(v.tb),
		Annotations: map[string]string{"dev.cosignproject.cosign/signature": ""},
	}
}

func (v *Vendor) sign(data []byte) []byte {
	v.tb.Helper()
	return must(v.signer.SignMessage(bytes.NewReader(data)))(v.tb)
}

func (v *Vendor) envelope(statement []byte) *dsse.Envelope {
	v.tb.Helper()
	sig := v.sign(dsse.PAE(attest.InTotoPayload, statement))
	return &dsse.Envelope{
		PayloadType: attest.InTotoPayload, Payload: base64.StdEncoding.EncodeToString(statement),
		Signatures: []dsse.Signature{{Sig: base64.StdEncoding.EncodeToString(sig)}},
	}
}

// Statement returns an in-toto statement about digests, with more or other fields
// where changes say so.
func Statement(tb testing.TB, predicateType string, changes map[string]any, digests ...attest.Digest) []byte {
	tb.Helper()
	subjects := []any{}
	for _, d := range digests {
		subjects = append(subjects, map[string]any{"name": "image", "digest": map[string]string{"sha256": d.Hex()}})
	}
	s := map[string]any{"_type": attest.StatementType, "subject": subjects, "predicateType": predicateType, "predicate": map[string]any{}}
	maps.Copy(s, changes)
	return must(json.Marshal(s))(tb)
}

// Simple returns the payload of cosign's legacy image signature.
func Simple(digest string) []byte {
	return []byte(`{"critical":{"identity":{"docker-reference":"registry.example.com/acme/api"},"image":{"docker-manifest-digest":"` +
		digest + `"},"type":"cosign container image signature"},"optional":null}`)
}

// JSON returns the layer as evidence of a legacy form.
func JSON(tb testing.TB, l attest.Layer) []byte {
	tb.Helper()
	return must(json.Marshal(l))(tb)
}

// encode writes a bundle as JSON.
func encode(tb testing.TB, version string, m *bundlev1.VerificationMaterial, env *dsse.Envelope) []byte {
	tb.Helper()
	mediaType := "application/vnd.dev.sigstore.bundle.v0.3+json"
	if version != "" && version != "0.3" {
		mediaType = "application/vnd.dev.sigstore.bundle+json;version=" + version
	}
	out := &bundlev1.Bundle{MediaType: mediaType, VerificationMaterial: m, Content: &bundlev1.Bundle_DsseEnvelope{
		DsseEnvelope: &dssev1.Envelope{
			Payload: must(env.DecodeB64Payload())(tb), PayloadType: env.PayloadType,
			Signatures: []*dssev1.Signature{{Sig: must(base64.StdEncoding.DecodeString(env.Signatures[0].Sig))(tb)}},
		},
	}}
	return must(protojson.Marshal(out))(tb)
}

func envelopeOf(tb testing.TB, e *ca.TestEntity) *dsse.Envelope {
	tb.Helper()
	env, ok := must(e.SignatureContent())(tb).(*bundle.Envelope)
	if !ok {
		tb.Fatal("the entity holds no envelope")
	}
	return env.Envelope
}

func certificateOf(tb testing.TB, e verify.SignedEntity) *x509.Certificate {
	tb.Helper()
	return must(e.VerificationContent())(tb).Certificate()
}

// entry returns the log entry with what sigstore-go's kit leaves out of it: its kind
// and the promise that the log signs.
func (s *Sigstore) entry(e *ca.TestEntity) *rekorv1.TransparencyLogEntry {
	s.tb.Helper()
	out := must(e.TlogEntries())(s.tb)[0].TransparencyLogEntry()
	var body struct{ Kind, APIVersion string }
	if err := json.Unmarshal(out.GetCanonicalizedBody(), &body); err != nil {
		s.tb.Fatal(err)
	}
	out.KindVersion = &rekorv1.KindVersion{Kind: body.Kind, Version: body.APIVersion}
	out.InclusionPromise = &rekorv1.InclusionPromise{SignedEntryTimestamp: must(s.RekorSignPayload(tlog.RekorPayload{
		Body: base64.StdEncoding.EncodeToString(out.GetCanonicalizedBody()), IntegratedTime: out.GetIntegratedTime(),
		LogIndex: out.GetLogIndex(), LogID: hex.EncodeToString(out.GetLogId().GetKeyId()),
	}))(s.tb)}
	return out
}

// must returns a function that ends the test when err is set: must(f())(tb).
func must[T any](v T, err error) func(testing.TB) T {
	return func(tb testing.TB) T {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
		return v
	}
}
