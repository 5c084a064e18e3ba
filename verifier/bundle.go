package verifier

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/hallmarkd/hallmark/attest"
)

// wireBundle is the JSON of a Sigstore bundle v0.3 with the names that it may
// hold. Those that this service never writes are here so that such a bundle is
// refused for what it lacks; step 5 of Bundle refuses them beside the others.
type wireBundle struct {
	MediaType            string `json:"mediaType"`
	VerificationMaterial struct {
		Certificate *struct {
			RawBytes binary `json:"rawBytes"`
		} `json:"certificate"`
		PublicKey *struct {
			Hint string `json:"hint"`
		} `json:"publicKey"`
		Chain       json.RawMessage `json:"x509CertificateChain"`
		TlogEntries []wireEntry     `json:"tlogEntries"`
		Timestamps  struct {
			RFC3161 []struct {
				Signed binary `json:"signedTimestamp"`
			} `json:"rfc3161Timestamps"`
		} `json:"timestampVerificationData"`
	} `json:"verificationMaterial"`
	Envelope *struct {
		Payload     binary `json:"payload"`
		PayloadType string `json:"payloadType"`
		Signatures  []struct {
			KeyID string `json:"keyid"`
			Sig   binary `json:"sig"`
		} `json:"signatures"`
	} `json:"dsseEnvelope"`
	Message json.RawMessage `json:"messageSignature"`
}

type wireEntry struct {
	LogIndex decimal `json:"logIndex"`
	LogID    struct {
		KeyID binary `json:"keyId"`
	} `json:"logId"`
	KindVersion struct {
		Kind    string `json:"kind"`
		Version string `json:"version"`
	} `json:"kindVersion"`
	IntegratedTime json.RawMessage `json:"integratedTime"`
	Promise        json.RawMessage `json:"inclusionPromise"`
	Proof          *struct {
		LogIndex   decimal  `json:"logIndex"`
		RootHash   binary   `json:"rootHash"`
		TreeSize   decimal  `json:"treeSize"`
		Hashes     []binary `json:"hashes"`
		Checkpoint struct {
			Envelope string `json:"envelope"`
		} `json:"checkpoint"`
	} `json:"inclusionProof"`
	Body binary `json:"canonicalizedBody"`
}

// binary is base64 in its one canonical form: padded, standard alphabet, unused
// bits zero (attacks D05). Other spellings of the same bytes are refused.
type binary []byte

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *binary) UnmarshalText(text []byte) error {
	out, err := base64.StdEncoding.Strict().DecodeString(string(text))
	// Go's decoder skips line breaks wherever they stand.
	if err != nil || bytes.ContainsAny(text, "\r\n") {
		return fmt.Errorf("not canonical base64")
	}
	*b = out
	return nil
}

// decimal is a protobuf integer as JSON carries it: a string of digits.
type decimal uint64

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *decimal) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 10, 63)
	if err != nil {
		return fmt.Errorf("not a decimal number")
	}
	*d = decimal(n)
	return nil
}

// parsed is a bundle taken apart: the record that it is a copy of, and what it
// repeats beside that.
type parsed struct {
	record     attest.Record
	logID      []byte
	body       []byte // canonicalizedBody
	rootHash   []byte
	proofIndex uint64
}

// parse reads a bundle and checks its form; nothing in it is verified yet.
func (v *Verifier) parse(data []byte) (parsed, error) {
	// 1. JSON that all parsers read alike, with known names only.
	var w wireBundle
	if err := Decode(data, &w); err != nil {
		return parsed{}, attest.Errorf(attest.BundleMalformed, "the bundle cannot be read: %w", err)
	}
	// 2. The one version that is written today.
	if w.MediaType != attest.BundleMediaType {
		return parsed{}, attest.Errorf(attest.BundleVersion, "the bundle is %q, not %q", clip(w.MediaType), attest.BundleMediaType)
	}
	// 3. One DSSE envelope with one signature.
	if w.Envelope == nil {
		return parsed{}, attest.Errorf(attest.PayloadType, "the bundle holds no DSSE envelope")
	}
	if n := len(w.Envelope.Signatures); n != 1 {
		return parsed{}, attest.Errorf(attest.SignatureCount, "the envelope has %d signatures, not one", n)
	}
	p := parsed{record: attest.Record{Envelope: attest.Envelope{
		PayloadType: w.Envelope.PayloadType, Payload: w.Envelope.Payload, Signature: w.Envelope.Signatures[0].Sig,
	}}}
	// 4. One certificate or the gate key.
	m := w.VerificationMaterial
	switch {
	case (m.Certificate == nil) == (m.PublicKey == nil):
		return parsed{}, attest.Errorf(attest.BundleMalformed, "the bundle must hold one certificate or one public key")
	case m.Certificate != nil:
		p.record.Certificate = m.Certificate.RawBytes
	case v.gate == nil || m.PublicKey.Hint != v.gate.hint:
		return parsed{}, attest.Errorf(attest.SignerMismatch, "the bundle is signed by a key that is not the gate's")
	default:
		p.record.PublicKey = v.gate.der
	}
	// 5. One timestamp and one log entry: several would raise the question which
	// of them counts (attacks C02, E04).
	if n := len(m.Timestamps.RFC3161); n != 1 {
		return parsed{}, attest.Errorf(attest.TimestampInvalid, "the bundle has %d timestamps, not one", n)
	}
	p.record.Timestamp = m.Timestamps.RFC3161[0].Signed
	if n := len(m.TlogEntries); n != 1 {
		return parsed{}, attest.Errorf(attest.LogEntryMismatch, "the bundle has %d log entries, not one", n)
	}
	return p, p.entry(m.TlogEntries[0])
}

func (p *parsed) entry(e wireEntry) error {
	if e.KindVersion.Kind != "hashedrekord" || e.KindVersion.Version != "0.0.2" {
		return attest.Errorf(attest.LogEntryMismatch, "the log entry is %s %s, not hashedrekord 0.0.2", clip(e.KindVersion.Kind), clip(e.KindVersion.Version))
	}
	if e.Promise != nil || e.IntegratedTime != nil {
		return attest.Errorf(attest.LogEntryMismatch, "the log entry carries a promise or a time of its own, which this log does not issue")
	}
	if e.Proof == nil {
		return attest.Errorf(attest.LogProofInvalid, "the log entry has no inclusion proof")
	}
	p.logID, p.body, p.rootHash, p.proofIndex = e.LogID.KeyID, e.Body, e.Proof.RootHash, uint64(e.Proof.LogIndex)
	p.record.Index, p.record.TreeSize = uint64(e.LogIndex), uint64(e.Proof.TreeSize)
	p.record.Checkpoint = []byte(e.Proof.Checkpoint.Envelope)
	for _, h := range e.Proof.Hashes {
		p.record.Proof = append(p.record.Proof, h)
	}
	p.record.ID = p.record.Envelope.ID()
	return nil
}

// logged checks the log's part of a bundle, including what the bundle says twice.
func (v *Verifier) logged(p parsed) (logKey, error) {
	if !bytes.Equal(p.body, p.record.LogEntry()) {
		return logKey{}, attest.Errorf(attest.LogEntryMismatch, "the log entry is about another signature, key or payload")
	}
	if p.proofIndex != p.record.Index {
		return logKey{}, attest.Errorf(attest.LogProofInvalid, "the proof is for index %d, the entry has %d", p.proofIndex, p.record.Index)
	}
	l, cp, err := v.inclusion(p.record)
	if err != nil {
		return logKey{}, err
	}
	// sigstore-go reads the root from the signed text and leaves this one alone.
	if !bytes.Equal(p.rootHash, cp.Hash) {
		return logKey{}, attest.Errorf(attest.CheckpointInvalid, "the proof names another root than its checkpoint does")
	}
	if !bytes.Equal(p.logID, l.id) {
		return logKey{}, attest.Errorf(attest.CheckpointInvalid, "the log entry names another log than its checkpoint does")
	}
	return l, nil
}
