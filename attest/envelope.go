package attest

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"strconv"

	"github.com/transparency-dev/merkle/rfc6962"
)

// Payload types of the envelopes in the ledger.
const (
	InTotoPayload = "application/vnd.in-toto+json" // in-toto envelope.md
	// A precertificate is logged as what it is: DER, signed as raw bytes, not
	// as DSSE (RFC 6962 section 3.1).
	PrecertificatePayload = "application/pkix-cert"
)

// Envelope is a payload with one signature by one key, the unit that the ledger
// stores. A statement is signed as DSSE over PAE(PayloadType, Payload); a
// precertificate over its DER.
type Envelope struct {
	PayloadType string
	Payload     []byte
	Signature   []byte // ECDSA P-256, ASN.1 DER
	Certificate []byte // DER of the short-lived leaf; empty when PublicKey signed
	PublicKey   []byte // PKIX DER of the long-lived key; empty when Certificate is set
	Timestamp   []byte // RFC 3161 TimeStampResp over Signature; empty for a precertificate
}

// PAE is the DSSE pre-authentication encoding (DSSE protocol.md, "Signature
// Definition").
func PAE(payloadType string, payload []byte) []byte {
	return append(paeHead(payloadType, payload), payload...)
}

// paeHead is what stands before the payload.
func paeHead(payloadType string, payload []byte) []byte {
	b := make([]byte, 0, len(payloadType)+40)
	b = append(b, "DSSEv1 "...)
	b = strconv.AppendInt(b, int64(len(payloadType)), 10)
	b = append(b, ' ')
	b = append(b, payloadType...)
	b = append(b, ' ')
	b = strconv.AppendInt(b, int64(len(payload)), 10)
	return append(b, ' ')
}

// Signed returns the SHA-256 of the bytes that the signature covers.
func (e Envelope) Signed() [sha256.Size]byte {
	if e.PayloadType == PrecertificatePayload {
		return sha256.Sum256(e.Payload)
	}
	h := sha256.New()
	h.Write(paeHead(e.PayloadType, e.Payload))
	h.Write(e.Payload) // of up to 16 MiB, which PAE would copy
	return [sha256.Size]byte(h.Sum(nil))
}

// The fields below stand in lexical order and hold only ASCII that JSON need
// not escape, so that encoding/json writes RFC 8785 canonical JSON. A test
// compares the result with rekor-tiles bit for bit.
type entryBytes struct {
	RawBytes string `json:"rawBytes"`
}

type entryVerifier struct {
	KeyDetails  string      `json:"keyDetails"`
	PublicKey   *entryBytes `json:"publicKey,omitempty"`
	Certificate *entryBytes `json:"x509Certificate,omitempty"`
}

type entryBody struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		HashedRekord struct {
			Data struct {
				Algorithm string `json:"algorithm"`
				Digest    string `json:"digest"`
			} `json:"data"`
			Signature struct {
				Content  string        `json:"content"`
				Verifier entryVerifier `json:"verifier"`
			} `json:"signature"`
		} `json:"hashedRekordV002"`
	} `json:"spec"`
}

// LogEntry returns the canonical body of e's transparency-log entry: a Rekor v2
// hashedrekord 0.0.2 (rekor-tiles, protobuf rekor/v2/hashedrekord.proto). It
// covers the signature and the key or certificate, so two signers of one
// statement have two entries.
func (e Envelope) LogEntry() []byte {
	b64 := base64.StdEncoding.EncodeToString
	signed := e.Signed()
	body := entryBody{APIVersion: "0.0.2", Kind: "hashedrekord"}
	rec := &body.Spec.HashedRekord
	rec.Data.Algorithm = "SHA2_256"
	rec.Data.Digest = b64(signed[:])
	rec.Signature.Content = b64(e.Signature)
	rec.Signature.Verifier.KeyDetails = "PKIX_ECDSA_P256_SHA_256"
	if len(e.Certificate) > 0 {
		rec.Signature.Verifier.Certificate = &entryBytes{b64(e.Certificate)}
	} else {
		rec.Signature.Verifier.PublicKey = &entryBytes{b64(e.PublicKey)}
	}
	out, err := json.Marshal(body)
	if err != nil {
		panic(err) // a struct of strings always marshals
	}
	return out
}

// RecordID names a record for ever: the RFC 6962 leaf hash of its log entry.
type RecordID [sha256.Size]byte

// ID returns the leaf hash of e's log entry.
func (e Envelope) ID() RecordID { return LeafHash(e.LogEntry()) }

// LeafHash returns the RFC 6962 leaf hash of a log entry.
func LeafHash(entry []byte) RecordID { return RecordID(rfc6962.DefaultHasher.HashLeaf(entry)) }

// String returns 64 hex digits.
func (id RecordID) String() string { return hex.EncodeToString(id[:]) }

// IsZero reports whether id names nothing.
func (id RecordID) IsZero() bool { return id == RecordID{} }

// MarshalText implements encoding.TextMarshaler; the zero id is the empty text.
func (id RecordID) MarshalText() ([]byte, error) {
	if id.IsZero() {
		return nil, nil
	}
	return []byte(id.String()), nil
}

// UnmarshalText is the inverse of MarshalText.
func (id *RecordID) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*id = RecordID{}
		return nil
	}
	d, err := ParseHex(string(b))
	*id = RecordID(d)
	return err
}
