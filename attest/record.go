package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	bundlepb "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonpb "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	dssepb "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	rekorpb "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

// BundleMediaType is that of the Sigstore bundles issued here, and the artifact
// type of the referrers that carry them.
const BundleMediaType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// Record is one envelope with its place in the log.
type Record struct {
	Envelope
	Facts
	ID         RecordID
	Index      uint64   // of the log entry
	TreeSize   uint64   // of Checkpoint: the first published one that covers Index
	Checkpoint []byte   // C2SP signed note
	Proof      [][]byte // RFC 6962 inclusion proof of Index in TreeSize
}

// Facts is what the index knows of a record: a pure function of its envelope
// (Describe).
type Facts struct {
	Kind   RecordKind
	Time   time.Time // of the timestamp, UTC, in seconds; of a precertificate its NotBefore
	Key    string    // natural key, hex SHA-256; "" when a repetition cannot be told
	Facets []Facet   // ordered by name, then value
}

// Facet is one property by which a record can be found.
type Facet struct{ Name, Value string }

// Get returns the first value of the named facet, or "".
func (f Facts) Get(name string) string {
	for _, x := range f.Facets {
		if x.Name == name {
			return x.Value
		}
	}
	return ""
}

// All returns every value of the named facet.
func (f Facts) All(name string) []string {
	var out []string
	for _, x := range f.Facets {
		if x.Name == name {
			out = append(out, x.Value)
		}
	}
	return out
}

// Bundle returns the Sigstore bundle v0.3 of the record as compact JSON: a pure
// function of the record, so that the same record is the same bytes for ever.
// logID is SHA-256 of the log key's PKIX DER.
func (r Record) Bundle(logID []byte) ([]byte, error) {
	if r.PayloadType != InTotoPayload {
		return nil, fmt.Errorf("record %s holds %s, which no bundle carries", r.ID, r.PayloadType)
	}
	material := &bundlepb.VerificationMaterial{
		TlogEntries: []*rekorpb.TransparencyLogEntry{{
			LogIndex:    int64(r.Index),
			LogId:       &commonpb.LogId{KeyId: logID},
			KindVersion: &rekorpb.KindVersion{Kind: "hashedrekord", Version: "0.0.2"},
			InclusionProof: &rekorpb.InclusionProof{
				LogIndex:   int64(r.Index),
				RootHash:   checkpointRoot(r.Checkpoint),
				TreeSize:   int64(r.TreeSize),
				Hashes:     r.Proof,
				Checkpoint: &rekorpb.Checkpoint{Envelope: string(r.Checkpoint)},
			},
			CanonicalizedBody: r.LogEntry(),
		}},
	}
	if len(r.Timestamp) > 0 {
		material.TimestampVerificationData = &bundlepb.TimestampVerificationData{
			Rfc3161Timestamps: []*commonpb.RFC3161SignedTimestamp{{SignedTimestamp: r.Timestamp}},
		}
	}
	if len(r.Certificate) > 0 {
		material.Content = &bundlepb.VerificationMaterial_Certificate{
			Certificate: &commonpb.X509Certificate{RawBytes: r.Certificate},
		}
	} else {
		hint := sha256.Sum256(r.PublicKey)
		material.Content = &bundlepb.VerificationMaterial_PublicKey{
			PublicKey: &commonpb.PublicKeyIdentifier{Hint: base64.StdEncoding.EncodeToString(hint[:])},
		}
	}
	b := &bundlepb.Bundle{
		MediaType:            BundleMediaType,
		VerificationMaterial: material,
		Content: &bundlepb.Bundle_DsseEnvelope{DsseEnvelope: &dssepb.Envelope{
			Payload:     r.Payload,
			PayloadType: r.PayloadType,
			// The key id stays empty: both cosigns refuse any other.
			Signatures: []*dssepb.Signature{{Sig: r.Signature}},
		}},
	}
	raw, err := protojson.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("marshalling bundle of record %s: %w", r.ID, err)
	}
	// protojson spaces its output at random on purpose; compacted it is stable.
	var out bytes.Buffer
	out.Grow(len(raw))
	if err := json.Compact(&out, raw); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// DSSE returns the envelope as plain DSSE JSON with an empty key id, the form
// that slsa-verifier reads (DSSE envelope.md).
func (e Envelope) DSSE() ([]byte, error) {
	type signature struct {
		KeyID string `json:"keyid"`
		Sig   []byte `json:"sig"`
	}
	return json.Marshal(struct {
		PayloadType string      `json:"payloadType"`
		Payload     []byte      `json:"payload"`
		Signatures  []signature `json:"signatures"`
	}{e.PayloadType, e.Payload, []signature{{Sig: e.Signature}}})
}

// checkpointRoot returns the root hash of a checkpoint that this service's own
// log wrote: the third line (C2SP tlog-checkpoint). It is nil when there is
// none; whoever reads the bundle checks it against the signed text.
func checkpointRoot(note []byte) []byte {
	lines := bytes.SplitN(note, []byte("\n"), 4)
	if len(lines) < 4 {
		return nil
	}
	root, err := base64.StdEncoding.DecodeString(string(lines[2]))
	if err != nil {
		return nil
	}
	return root
}
