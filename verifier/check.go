package verifier

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"math"
	"slices"
	"time"

	"github.com/digitorus/pkcs7"
	"github.com/digitorus/timestamp"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	flog "github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/hallmarkd/hallmark/attest"
)

// checked is an envelope whose signature, signer, time and statement are good.
type checked struct {
	statement  attest.Statement
	digests    []attest.Digest
	signer     Signer
	byKey      bool
	time       time.Time
	kind       attest.RecordKind
	provenance attest.Provenance // of kind provenance
	imported   attest.Import     // of kind import
}

func (c *checked) covers(d attest.Digest) bool { return slices.Contains(c.digests, d) }

// window is when a signer's word counts, both ends included.
type window struct{ from, to time.Time }

func (w window) holds(t time.Time) bool {
	return !t.Before(w.from) && (w.to.IsZero() || !t.After(w.to))
}

func (w *window) narrow(from, to time.Time) {
	if from.After(w.from) {
		w.from = from
	}
	if !to.IsZero() && (w.to.IsZero() || to.Before(w.to)) {
		w.to = to
	}
}

// envelope is every check that needs no log, in the order in which a failure of
// one would make the next meaningless.
func (v *Verifier) envelope(e attest.Envelope) (*checked, error) {
	// 1. Sizes and form.
	if err := form(e); err != nil {
		return nil, err
	}
	// 2. Whose key it is.
	key, valid, c, err := v.signer(e)
	if err != nil {
		return nil, err
	}
	// 3. The signature, over the bytes as they are (DSSE protocol.md: verify
	// before parsing).
	signed := e.Signed()
	if !ecdsa.VerifyASN1(key, signed[:], e.Signature) {
		return nil, attest.Errorf(attest.SignatureInvalid, "the signature does not fit payload and key")
	}
	// 4. When it was made, and that the key counted then.
	if c.time, err = v.timestamp(e.Timestamp, e.Signature); err != nil {
		return nil, err
	}
	if !valid.holds(c.time) {
		return nil, attest.Errorf(attest.CertificateInvalid, "signed at %s, when the certificate or key was not valid", attest.Time(c.time))
	}
	// 5. What was said, and whether this signer may say it.
	if c.statement, c.digests, err = statement(e.Payload); err != nil {
		return nil, err
	}
	c.kind = attest.KindOf(c.statement.PredicateType)
	return c, c.allowed()
}

// form bounds every part before it is parsed.
func form(e attest.Envelope) error {
	if e.PayloadType != attest.InTotoPayload {
		return attest.Errorf(attest.PayloadType, "the payload is %q, not %s", clip(e.PayloadType), attest.InTotoPayload)
	}
	for _, part := range []struct {
		name string
		len  int
		most int
	}{
		{"payload", len(e.Payload), maxPayload}, {"signature", len(e.Signature), maxSignature},
		{"certificate", len(e.Certificate), maxCertificate}, {"public key", len(e.PublicKey), maxCertificate},
		{"timestamp", len(e.Timestamp), maxTimestamp},
	} {
		if part.len > part.most {
			return attest.Errorf(attest.TooLarge, "the %s has %d bytes, more than %d", part.name, part.len, part.most)
		}
	}
	if (len(e.Certificate) == 0) == (len(e.PublicKey) == 0) {
		return attest.Errorf(attest.BundleMalformed, "an envelope has either a certificate or a public key")
	}
	return nil
}

// signer returns the key that must have signed e, and when it counts.
func (v *Verifier) signer(e attest.Envelope) (*ecdsa.PublicKey, window, *checked, error) {
	if len(e.Certificate) > 0 {
		l, err := v.leaf(e.Certificate)
		if err != nil {
			return nil, window{}, nil, err
		}
		return l.key, l.valid, &checked{signer: l.signer}, nil
	}
	if v.gate == nil || !bytes.Equal(e.PublicKey, v.gate.der) {
		return nil, window{}, nil, attest.Errorf(attest.SignerMismatch, "signed by a key that is not the gate's")
	}
	c := &checked{byKey: true, signer: Signer{Gate: true, SAN: v.service + "/gate", Issuer: v.service}}
	return v.gate.public, window{from: v.gate.from}, c, nil
}

// leaf is a certificate that chains to the trust root and has an SCT.
type leaf struct {
	key    *ecdsa.PublicKey
	valid  window
	signer Signer
}

// leaf checks a signing certificate, or remembers that it did: one certificate
// signs two statements of each image of a job. Only good ones are remembered.
func (v *Verifier) leaf(der []byte) (*leaf, error) {
	id := sha256.Sum256(der)
	if l, ok := v.leaves.Get(id); ok {
		return l, nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, attest.Errorf(attest.CertificateInvalid, "the certificate cannot be parsed: %w", err)
	}
	key, err := leafForm(cert)
	if err != nil {
		return nil, err
	}
	l := &leaf{key: key}
	if l.valid, err = v.chain(cert); err != nil {
		return nil, err
	}
	if l.signer, err = v.signerOf(cert); err != nil {
		return nil, err
	}
	v.leaves.Add(id, l)
	return l, nil
}

// leafForm checks that a certificate is for signing statements and nothing else
// (trust-formats 2.5).
func leafForm(cert *x509.Certificate) (*ecdsa.PublicKey, error) {
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || key.Curve != elliptic.P256():
		return nil, attest.Errorf(attest.CertificateInvalid, "the certificate's key is not ECDSA P-256")
	case cert.IsCA:
		return nil, attest.Errorf(attest.CertificateInvalid, "the certificate is that of an authority")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature, len(cert.UnknownExtKeyUsage) > 0,
		len(cert.ExtKeyUsage) != 1 || cert.ExtKeyUsage[0] != x509.ExtKeyUsageCodeSigning:
		return nil, attest.Errorf(attest.CertificateInvalid, "the certificate is not for code signing only")
	case len(cert.URIs) != 1, len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses) > 0:
		return nil, attest.Errorf(attest.CertificateInvalid, "the certificate must have one URI as its only name")
	}
	return key, nil
}

// chain verifies cert to an authority of the trust root at its first moment, and
// the SCT in it, and returns when every certificate of the chain is valid. Each
// condition holds for an interval, so all of them hold in the intersection.
func (v *Verifier) chain(cert *x509.Certificate) (window, error) {
	for _, ca := range v.cas {
		chains, err := ca.Verify(cert, cert.NotBefore)
		if err != nil || len(chains) == 0 {
			continue
		}
		if err := verify.VerifySignedCertificateTimestamp(chains, 1, v.material); err != nil {
			return window{}, attest.Errorf(attest.CertificateInvalid, "the certificate has no good SCT: %w", err)
		}
		w := window{ca.ValidityPeriodStart, ca.ValidityPeriodEnd}
		for _, c := range chains[0] {
			w.narrow(c.NotBefore, c.NotAfter)
		}
		return w, nil
	}
	return window{}, attest.Errorf(attest.CertificateInvalid, "the certificate was not issued by an authority of the trust root")
}

// chains verifies a timestamp authority's certificate to its root, once.
func chains(tsa *root.SigstoreTimestampingAuthority) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(tsa.Root)
	for _, c := range tsa.Intermediates {
		intermediates.AddCert(c)
	}
	_, err := tsa.Leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: tsa.Leaf.NotBefore,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping},
	})
	return err
}

// timestamp checks an RFC 3161 response over sig and returns its time.
func (v *Verifier) timestamp(raw, sig []byte) (time.Time, error) {
	ts, err := timestamp.ParseResponse(raw)
	if err != nil {
		return time.Time{}, attest.Errorf(attest.TimestampInvalid, "the timestamp cannot be read: %w", err)
	}
	imprint := sha256.Sum256(sig)
	if ts.HashAlgorithm != crypto.SHA256 || !bytes.Equal(ts.HashedMessage, imprint[:]) {
		return time.Time{}, attest.Errorf(attest.TimestampInvalid, "the timestamp is over another signature")
	}
	token, err := pkcs7.Parse(ts.RawToken)
	if err != nil || len(token.Signers) != 1 {
		return time.Time{}, attest.Errorf(attest.TimestampInvalid, "the timestamp is not signed once")
	}
	for _, tsa := range v.tsas {
		// Only the trust root's certificate may have signed it, whatever others
		// the token brings along (attacks C21, E01).
		token.Certificates = []*x509.Certificate{tsa.Leaf}
		if token.Verify() != nil {
			continue
		}
		w := window{tsa.ValidityPeriodStart, tsa.ValidityPeriodEnd}
		w.narrow(tsa.Leaf.NotBefore, tsa.Leaf.NotAfter)
		if w.holds(ts.Time) {
			return ts.Time, nil
		}
	}
	return time.Time{}, attest.Errorf(attest.TimestampInvalid, "the timestamp is not by an authority that the trust root names for its time")
}

// statement reads an in-toto statement v1 that has nothing but its four fields,
// and returns the images that it is about (attacks D06, D07).
func statement(payload []byte) (attest.Statement, []attest.Digest, error) {
	var s attest.Statement
	if err := Decode(payload, &s); err != nil {
		return s, nil, attest.Errorf(attest.StatementMalformed, "the statement cannot be read: %w", err)
	}
	if s.Type != attest.StatementType {
		return s, nil, attest.Errorf(attest.StatementMalformed, "the statement is %q, not %q", clip(s.Type), attest.StatementType)
	}
	if s.PredicateType == "" {
		return s, nil, attest.Errorf(attest.PredicateType, "the statement names no predicate type")
	}
	if !bytes.HasPrefix(s.Predicate, []byte("{")) {
		return s, nil, attest.Errorf(attest.StatementMalformed, "the statement's predicate is no object")
	}
	if len(s.Subject) == 0 {
		return s, nil, attest.Errorf(attest.SubjectMissing, "the statement is about nothing")
	}
	if len(s.Subject) > maxSubjects {
		return s, nil, attest.Errorf(attest.TooLarge, "the statement has %d subjects, more than %d", len(s.Subject), maxSubjects)
	}
	var digests []attest.Digest
	seen := map[attest.Digest]bool{}
	for _, sub := range s.Subject {
		hex, ok := sub.Digest["sha256"]
		if !ok {
			return s, nil, attest.Errorf(attest.SubjectMissing, "a subject of the statement has no sha256 digest")
		}
		d, err := attest.ParseHex(hex)
		// A second algorithm would let one subject be two images.
		if err != nil || len(sub.Digest) != 1 || d.IsZero() {
			return s, nil, attest.Errorf(attest.StatementMalformed, "a subject of the statement must have one digest: sha256 in 64 lower-case hex digits")
		}
		if !seen[d] {
			seen[d] = true
			digests = append(digests, d)
		}
	}
	return s, digests, nil
}

// allowed refuses a statement of a kind that this signer never makes, so that no
// CI identity can speak for the gate and the gate for no CI identity.
func (c *checked) allowed() error {
	var ok bool
	switch c.kind {
	case attest.KindPromotion, attest.KindDenial, attest.KindEffect, attest.KindPolicy:
		ok = c.byKey
	case attest.KindImport:
		if ok = c.byKey; ok {
			return c.foreign()
		}
	case attest.KindVSA:
		ok = c.signer.Gate
	case attest.KindSignature:
		ok = !c.signer.Gate
	case attest.KindProvenance:
		if ok = !c.signer.Gate; ok {
			return c.bound()
		}
	case attest.KindEvidence:
		ok = true // whose word counts is for policy
	}
	if !ok {
		return attest.Errorf(attest.SignerMismatch, "%s may not sign a %s", clip(c.signer.SAN), c.kind)
	}
	return nil
}

// foreign reads what was imported and checks that it is what was verified then.
func (c *checked) foreign() error {
	if err := json.Unmarshal(c.statement.Predicate, &c.imported); err != nil {
		return attest.Errorf(attest.StatementMalformed, "the import cannot be read: %w", err)
	}
	if c.imported.Root == "" || attest.Hash(c.imported.Content) != c.imported.Digest {
		return attest.Errorf(attest.StatementMalformed, "the import names no foreign root, or its content is not that of its digest")
	}
	// Evidence is kept in memory, and the content is of no use there any more.
	c.imported.Content, c.statement.Predicate = nil, nil
	return nil
}

// bound checks that a provenance and the certificate that signed it tell of the
// same build. The service writes both from one token.
func (c *checked) bound() error {
	var err error
	if c.provenance, err = attest.ParseProvenance(c.statement.Predicate); err != nil {
		return attest.Errorf(attest.StatementMalformed, "%w", err)
	}
	if certified(c.provenance.Internal().Claims) != certified(c.signer.Build) {
		return attest.Errorf(attest.SignerMismatch, "the provenance tells of another build than the certificate that signed it")
	}
	return c.provenance.CheckParameters()
}

// precertificate checks a precertificate before it is logged: signed by the
// authority that issued it, and unusable as a certificate.
func (v *Verifier) precertificate(e attest.Envelope) error {
	if len(e.Payload) > maxCertificate || len(e.Signature) > maxSignature {
		return attest.Errorf(attest.TooLarge, "the precertificate or its signature is too long")
	}
	if len(e.Certificate) > 0 || len(e.Timestamp) > 0 {
		return attest.Errorf(attest.BundleMalformed, "a precertificate comes with a signature and the key of its authority only")
	}
	cert, err := x509.ParseCertificate(e.Payload)
	if err != nil {
		return attest.Errorf(attest.CertificateInvalid, "the precertificate cannot be parsed: %w", err)
	}
	if _, err := leafForm(cert); err != nil {
		return err
	}
	poison := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 3} // RFC 6962 section 3.1
	if len(cert.UnhandledCriticalExtensions) != 1 || !cert.UnhandledCriticalExtensions[0].Equal(poison) {
		return attest.Errorf(attest.CertificateInvalid, "the precertificate is not marked as one")
	}
	signed := e.Signed()
	for _, ca := range v.cas {
		issuer := ca.Intermediates[0]
		key, ok := issuer.PublicKey.(*ecdsa.PublicKey)
		if !ok || !bytes.Equal(e.PublicKey, issuer.RawSubjectPublicKeyInfo) || cert.CheckSignatureFrom(issuer) != nil {
			continue
		}
		if !ecdsa.VerifyASN1(key, signed[:], e.Signature) {
			return attest.Errorf(attest.SignatureInvalid, "the precertificate's log signature is not by its authority")
		}
		return nil
	}
	return attest.Errorf(attest.CertificateInvalid, "the precertificate was not issued by an authority of the trust root")
}

// inclusion checks that r is in the log under its checkpoint, and returns which
// log that is with the checkpoint (C2SP tlog-checkpoint, RFC 6962 section 2.1.1).
func (v *Verifier) inclusion(r attest.Record) (logKey, *flog.Checkpoint, error) {
	if len(r.Checkpoint) > maxCheckpoint || len(r.Proof) > maxProof {
		return logKey{}, nil, attest.Errorf(attest.TooLarge, "the checkpoint or the inclusion proof is too long")
	}
	l, cp, err := v.checkpoint(r.Checkpoint)
	if err != nil {
		return logKey{}, nil, err
	}
	if cp.Size != r.TreeSize || len(cp.Hash) != sha256.Size || cp.Size > math.MaxInt64 {
		return logKey{}, nil, attest.Errorf(attest.CheckpointInvalid, "the checkpoint is for %d entries, the proof for %d", cp.Size, r.TreeSize)
	}
	id := r.Envelope.ID()
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, r.Index, cp.Size, id[:], r.Proof, cp.Hash); err != nil {
		return logKey{}, nil, attest.Errorf(attest.LogProofInvalid, "the entry is not in the log where it says: %w", err)
	}
	return l, cp, nil
}

// checkpoint opens a signed note by a log of the trust root.
func (v *Verifier) checkpoint(text []byte) (logKey, *flog.Checkpoint, error) {
	for _, l := range v.logs {
		if cp, _, _, err := flog.ParseCheckpoint(text, l.origin, l.verifier); err == nil {
			return l, cp, nil
		}
	}
	return logKey{}, nil, attest.Errorf(attest.CheckpointInvalid, "the checkpoint is not signed by a log of the trust root")
}
