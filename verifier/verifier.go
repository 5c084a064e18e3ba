// Package verifier turns envelopes, records and bundles into Evidence, offline.
// sigstore-go has the final word on everything that it can read; the checks of
// this package come on top, so that nothing is accepted here that stock tools
// refuse.
package verifier

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/url"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	sumdb "golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	"github.com/hallmarkd/hallmark/attest"
)

// Limits, checked before anything is parsed (attacks C03, C23).
const (
	MaxBundle      = 32 << 20 // bytes of a bundle's JSON
	maxPayload     = 23 << 20 // attest.MaxPredicate, in base64 when it was imported
	maxSignature   = 128      // an ECDSA P-256 signature has at most 72
	maxCertificate = 16 << 10
	maxTimestamp   = 16 << 10
	maxCheckpoint  = 16 << 10
	maxProof       = 64   // hashes: a log of 2^64 entries
	maxSubjects    = 1024 // sigstore-go's limit
)

// cachedLeaves bounds how many certificates are remembered as good.
const cachedLeaves = 4096

// Verifier checks against one trust root. It is safe for concurrent use, reads
// no clock and opens no connection. One that New did not make accepts nothing.
type Verifier struct {
	service string
	cas     []*root.FulcioCertificateAuthority
	tsas    []*root.SigstoreTimestampingAuthority
	logs    []logKey
	gate    *gateKey // nil: no statement of the gate key is accepted

	material      root.TrustedMaterial
	byCertificate *verify.Verifier
	byKey         *verify.Verifier

	leaves *lru.Cache[[sha256.Size]byte, *leaf]
}

type logKey struct {
	id       []byte
	origin   string
	verifier sumdb.Verifier
}

type gateKey struct {
	public *ecdsa.PublicKey
	der    []byte
	hint   string
	from   time.Time // trusted from here on
}

// New returns a verifier for a service (its public_url) with its trusted_root.json
// and, unless gateKeyPEM is empty, its gate key. It returns BAD_CONFIG when they
// cannot be used.
func New(trustedRoot, gateKeyPEM []byte, service string) (*Verifier, error) {
	tr, err := root.NewTrustedRootFromJSON(trustedRoot)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "reading the trust root: %w", err)
	}
	v := &Verifier{service: service, material: tr}
	if err := v.read(tr); err != nil {
		return nil, err
	}
	if len(gateKeyPEM) > 0 {
		if v.gate, err = readGateKey(gateKeyPEM, v.cas); err != nil {
			return nil, err
		}
		key, err := signature.LoadDefaultVerifier(v.gate.public)
		if err != nil {
			return nil, attest.Errorf(attest.BadConfig, "reading the gate key: %w", err)
		}
		v.material = root.TrustedMaterialCollection{tr, root.NewTrustedPublicKeyMaterialFromMapping(map[string]*root.ExpiringKey{
			v.gate.hint: root.NewExpiringKey(key, v.gate.from, time.Time{}),
		})}
	}
	if v.byKey, err = verify.NewVerifier(v.material, verify.WithTransparencyLog(1), verify.WithSignedTimestamps(1)); err != nil {
		return nil, fmt.Errorf("making a verifier for keys: %w", err)
	}
	if v.byCertificate, err = verify.NewVerifier(v.material, verify.WithTransparencyLog(1), verify.WithSignedTimestamps(1), verify.WithSignedCertificateTimestamps(1)); err != nil {
		return nil, fmt.Errorf("making a verifier for certificates: %w", err)
	}
	v.leaves, err = lru.New[[sha256.Size]byte, *leaf](cachedLeaves)
	return v, err
}

// read takes from the trust root what this package's own checks need, and
// refuses a root that leaves any of it out: nothing would ever be accepted.
func (v *Verifier) read(tr *root.TrustedRoot) error {
	for _, ca := range tr.FulcioCertificateAuthorities() {
		fulcio, ok := ca.(*root.FulcioCertificateAuthority)
		if !ok || len(fulcio.Intermediates) == 0 {
			return attest.Errorf(attest.BadConfig, "a certificate authority of the trust root has no intermediate")
		}
		v.cas = append(v.cas, fulcio)
	}
	for _, tsa := range tr.TimestampingAuthorities() {
		stamper, ok := tsa.(*root.SigstoreTimestampingAuthority)
		if !ok || stamper.Leaf == nil || stamper.Root == nil {
			return attest.Errorf(attest.BadConfig, "a timestamp authority of the trust root lacks its certificate or root")
		}
		if err := chains(stamper); err != nil {
			return attest.Errorf(attest.BadConfig, "a timestamp authority of the trust root is not certified by its root: %w", err)
		}
		v.tsas = append(v.tsas, stamper)
	}
	for _, l := range tr.RekorLogs() {
		u, err := url.Parse(l.BaseURL)
		if err != nil {
			return attest.Errorf(attest.BadConfig, "reading the log's address in the trust root: %w", err)
		}
		key, err := signature.LoadVerifier(l.PublicKey, l.SignatureHashFunc)
		if err != nil {
			return attest.Errorf(attest.BadConfig, "reading the log's key in the trust root: %w", err)
		}
		checkpoints, err := note.NewNoteVerifier(u.Hostname(), key)
		if err != nil {
			return attest.Errorf(attest.BadConfig, "reading the log's name in the trust root: %w", err)
		}
		v.logs = append(v.logs, logKey{l.ID, u.Hostname(), checkpoints})
	}
	if len(v.cas) == 0 || len(v.tsas) == 0 || len(v.logs) == 0 || len(tr.CTLogs()) == 0 {
		return attest.Errorf(attest.BadConfig, "the trust root lacks a certificate authority, a timestamp authority, a log or a certificate log")
	}
	return nil
}

// readGateKey reads the gate's public key. It counts from when the first
// certificate authority does, because both are made at once (attacks C05).
func readGateKey(text []byte, cas []*root.FulcioCertificateAuthority) (*gateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, attest.Errorf(attest.BadConfig, "the gate key is not PEM of type PUBLIC KEY")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "reading the gate key: %w", err)
	}
	public, ok := key.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, attest.Errorf(attest.BadConfig, "the gate key is not an ECDSA P-256 key")
	}
	sum := sha256.Sum256(block.Bytes)
	g := &gateKey{public: public, der: block.Bytes, hint: base64.StdEncoding.EncodeToString(sum[:]), from: cas[0].ValidityPeriodStart}
	for _, ca := range cas[1:] {
		if ca.ValidityPeriodStart.Before(g.from) {
			g.from = ca.ValidityPeriodStart
		}
	}
	return g, nil
}

// Envelope checks what was just signed, before it is recorded: signature,
// certificate with its SCT, timestamp, statement, and that this signer may say
// it. It does not look at the log, and takes precertificates too.
func (v *Verifier) Envelope(e attest.Envelope) (err error) {
	defer denyPanic(&err)
	if e.PayloadType == attest.PrecertificatePayload {
		return v.precertificate(e)
	}
	_, err = v.envelope(e)
	return err
}

// Record checks everything about a record of the ledger: the envelope as
// Envelope does, that it is the one that was logged, its inclusion under a
// checkpoint of the log, and the whole once more by sigstore-go. The record's
// Facts are not believed. A precertificate is no evidence: PAYLOAD_TYPE.
func (v *Verifier) Record(r attest.Record) (ev *Evidence, err error) {
	defer denyPanic(&err)
	c, err := v.envelope(r.Envelope)
	if err != nil {
		return nil, err
	}
	if r.ID != r.Envelope.ID() {
		return nil, attest.Errorf(attest.LogEntryMismatch, "record %s is not the leaf of its envelope", r.ID)
	}
	l, _, err := v.inclusion(r)
	if err != nil {
		return nil, err
	}
	raw, err := r.Bundle(l.id)
	if err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "%w", err)
	}
	b, err := load(raw)
	if err != nil {
		return nil, err
	}
	if err := v.confirm(b, c, c.digests); err != nil {
		return nil, err
	}
	return c.evidence(r)
}

// Bundle checks a Sigstore bundle that came from anywhere as evidence about
// want. It accepts only bundles that this service could have written: the same
// content in any JSON spelling that Decode accepts.
func (v *Verifier) Bundle(data []byte, want attest.Digest) (ev *Evidence, err error) {
	defer denyPanic(&err)
	// 1. Bound and read it.
	if want.IsZero() {
		return nil, attest.Errorf(attest.BadDigest, "no digest was given to verify")
	}
	if len(data) > MaxBundle {
		return nil, attest.Errorf(attest.TooLarge, "the bundle has %d bytes, more than %d", len(data), MaxBundle)
	}
	p, err := v.parse(data)
	if err != nil {
		return nil, err
	}
	// 2. The signature and who made it, then what was signed.
	c, err := v.envelope(p.record.Envelope)
	if err != nil {
		return nil, err
	}
	// 3. The log.
	l, err := v.logged(p)
	if err != nil {
		return nil, err
	}
	// 4. Whether it is about the image in question.
	if !c.covers(want) {
		return nil, attest.Errorf(attest.SubjectMismatch, "the statement is about %s, not about %s", c.digests[0], want)
	}
	// 5. sigstore-go on the bytes as they came, which must mean the same to it.
	b, err := load(data)
	if err != nil {
		return nil, err
	}
	if err := same(b, p.record, l.id); err != nil {
		return nil, err
	}
	if err := v.confirm(b, c, []attest.Digest{want}); err != nil {
		return nil, err
	}
	return c.evidence(p.record)
}

func load(raw []byte) (*bundle.Bundle, error) {
	var b bundle.Bundle
	if err := b.UnmarshalJSON(raw); err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "%w", err)
	}
	return &b, nil
}

// same refuses a bundle that holds more or other things than those that were
// checked: what is not rebuilt from the record was not verified.
func same(b *bundle.Bundle, r attest.Record, logID []byte) error {
	raw, err := r.Bundle(logID)
	if err != nil {
		return attest.Errorf(attest.BundleMalformed, "%w", err)
	}
	rebuilt, err := load(raw)
	if err != nil {
		return err
	}
	if !proto.Equal(b.Bundle, rebuilt.Bundle) {
		return attest.Errorf(attest.BundleMalformed, "the bundle holds something that this service does not write into bundles")
	}
	return nil
}

// confirm asks sigstore-go. Which identity may say what is for policy to decide,
// on what Evidence.Signer returns; here it is not asked.
func (v *Verifier) confirm(b *bundle.Bundle, c *checked, digests []attest.Digest) error {
	var want []verify.ArtifactDigest
	for _, d := range digests {
		want = append(want, verify.ArtifactDigest{Algorithm: "sha256", Digest: d[:]})
	}
	by, how := v.byCertificate, verify.WithoutIdentitiesUnsafe()
	if c.byKey {
		by, how = v.byKey, verify.WithKey()
	}
	result, err := by.Verify(b, verify.NewPolicy(verify.WithArtifactDigests(want), how))
	if err != nil {
		return attest.Errorf(attest.SignatureInvalid, "sigstore-go refuses the bundle: %w", err)
	}
	// No result is not a success, nor is one about less than was asked (attacks C13).
	if result == nil || result.Statement == nil || result.Signature == nil || len(result.VerifiedTimestamps) != 1 ||
		!result.VerifiedTimestamps[0].Timestamp.Equal(c.time) || c.byKey != (result.Signature.Certificate == nil) {
		return attest.Errorf(attest.SignatureInvalid, "sigstore-go read another bundle than this service did")
	}
	return nil
}

// denyPanic turns a panic of any parser below into a refusal (attacks C13, C22).
func denyPanic(err *error) {
	if p := recover(); p != nil {
		*err = attest.Errorf(attest.BundleMalformed, "the evidence could not be read at all: %v", p)
	}
}
