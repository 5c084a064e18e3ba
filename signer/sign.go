package signer

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"
	"time"

	"github.com/digitorus/timestamp"

	"github.com/hallmarkd/hallmark/attest"
)

// timestampPolicy is RFC 3161's TSA policy; verifiers take any. It is that of
// Sigstore's own timestamp authority.
var timestampPolicy = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 2}

// Sign signs a statement in the name of c's identity and stamps the signature
// with the time. The envelope must be durable in the ledger, and covered by a
// checkpoint, before it leaves the process.
func (s *Signer) Sign(c *Credential, payload []byte) (attest.Envelope, error) {
	if err := s.open(); err != nil {
		return attest.Envelope{}, err
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.key == nil {
		return attest.Envelope{}, errClosed()
	}
	now := s.now()
	if now.Before(c.notBefore) {
		return attest.Envelope{}, attest.Errorf(attest.ClockSkew, "the clock went back to before the certificate began: check it and repeat the request")
	}
	if !now.Before(c.NotAfter) {
		return attest.Envelope{}, attest.Errorf(attest.CertificateInvalid, "the certificate ended at %s while signing: repeat the request", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return s.seal(attest.Envelope{PayloadType: attest.InTotoPayload, Payload: payload, Certificate: c.Certificate}, c.key, now)
}

// SignGate signs a statement with the long-lived gate key and stamps the
// signature with the time. Sign's rule about releasing it holds.
func (s *Signer) SignGate(payload []byte) (attest.Envelope, error) {
	if err := s.open(); err != nil {
		return attest.Envelope{}, err
	}
	return s.seal(attest.Envelope{PayloadType: attest.InTotoPayload, Payload: payload, PublicKey: s.gateKey}, s.gate, s.now())
}

// seal adds signature (DSSE protocol.md) and timestamp.
func (s *Signer) seal(e attest.Envelope, key crypto.Signer, now time.Time) (attest.Envelope, error) {
	signed := e.Signed()
	var err error
	if e.Signature, err = key.Sign(rand.Reader, signed[:], crypto.SHA256); err != nil {
		return attest.Envelope{}, fmt.Errorf("signing statement: %w", err)
	}
	if e.Timestamp, err = s.timestamp(e.Signature, now); err != nil {
		return attest.Envelope{}, fmt.Errorf("stamping signature: %w", err)
	}
	return e, nil
}

// timestamp returns a TimeStampResp over SHA-256(data) in whole seconds (RFC
// 3161 section 2.4.2). The TSA's certificate is not in it: the trust root has
// it, and every record would carry the same 600 bytes.
func (s *Signer) timestamp(data []byte, now time.Time) ([]byte, error) {
	imprint := sha256.Sum256(data)
	t := timestamp.Timestamp{
		HashAlgorithm: crypto.SHA256, HashedMessage: imprint[:],
		Time: now.UTC().Truncate(time.Second), Policy: timestampPolicy,
	}
	return t.CreateResponseWithOpts(s.stamp, s.tsa, crypto.SHA256)
}
