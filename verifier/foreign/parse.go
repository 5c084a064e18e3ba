package foreign

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"

	cbundle "github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	"github.com/sigstore/cosign/v2/pkg/oci"
	"github.com/sigstore/cosign/v2/pkg/oci/static"
	ctypes "github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore/pkg/cryptoutils"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

const (
	maxDepth       = 64        // of nested JSON
	maxPart        = 256 << 10 // bytes of a certificate, timestamp or log entry
	maxSubjects    = 1024      // sigstore-go's limit
	maxPredicateID = 256       // bytes of a predicate type
)

// Bundle media types that are read (protobuf-specs, sigstore_bundle.proto).
var bundleTypes = []string{
	"application/vnd.dev.sigstore.bundle+json;version=0.1",
	"application/vnd.dev.sigstore.bundle+json;version=0.2",
	"application/vnd.dev.sigstore.bundle+json;version=0.3",
	"application/vnd.dev.sigstore.bundle.v0.3+json",
}

// Types of an in-toto statement.
var statementTypes = []string{attest.StatementType, "https://in-toto.io/Statement/v0.1"}

// evidence is a piece of evidence taken apart. None of it is verified.
type evidence struct {
	bundle        *bundle.Bundle // of form bundle
	predicateType string

	// Of the legacy forms.
	signature oci.Signature
	attested  bool              // the signature is inside the payload, a DSSE envelope
	signed    []byte            // what a timestamp is over
	cert      *x509.Certificate // nil when it was signed with a key
	rekor     *cbundle.RekorBundle
	timestamp []byte // RFC 3161 response; nil without
}

// parse reads content strictly and refuses what is not about want, before anybody is
// asked to vouch for it.
func parse(form string, content []byte, want attest.Digest) (*evidence, error) {
	switch form {
	case attest.FormBundle:
		return parseBundle(content, want)
	case attest.FormSignature, attest.FormEnvelope:
		return parseLayer(form, content, want)
	}
	return nil, attest.Errorf(attest.BundleMalformed, "there is no evidence of form %q", form)
}

func parseBundle(content []byte, want attest.Digest) (*evidence, error) {
	// protojson below refuses names that stand twice or are unknown; here only the
	// version is read, to say which it is.
	var said struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(content, &said); err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "the bundle cannot be read: %w", err)
	}
	if !slices.Contains(bundleTypes, said.MediaType) {
		return nil, attest.Errorf(attest.BundleVersion, "it says that it is %q, which is no Sigstore bundle of version 0.1 to 0.3", clip(said.MediaType))
	}
	e := &evidence{bundle: new(bundle.Bundle)}
	if err := e.bundle.UnmarshalJSON(content); err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "the bundle cannot be read: %s", clip(err.Error()))
	}
	env := e.bundle.GetDsseEnvelope()
	if env == nil {
		return nil, attest.Errorf(attest.PayloadType, "the bundle holds no DSSE envelope: a signature over bytes says nothing of an image")
	}
	if n := len(env.GetSignatures()); n != 1 {
		return nil, attest.Errorf(attest.SignatureCount, "the envelope has %d signatures, not one", n)
	}
	if env.GetPayloadType() != attest.InTotoPayload {
		return nil, attest.Errorf(attest.PayloadType, "the payload is %q, not %s", clip(env.GetPayloadType()), attest.InTotoPayload)
	}
	var err error
	e.predicateType, err = statement(env.GetPayload(), want)
	return e, err
}

// statement reads an in-toto statement and returns its predicate type. One of its
// subjects must be want, by its SHA-256 and by nothing else: a second digest could
// not be checked, and would let one subject be two things (attacks D06, D07).
func statement(payload []byte, want attest.Digest) (string, error) {
	var s struct {
		Type    string `json:"_type"`
		Subject []struct {
			Name        string            `json:"name"`
			URI         string            `json:"uri"`
			Digest      map[string]string `json:"digest"`
			Content     json.RawMessage   `json:"content"`
			Location    string            `json:"downloadLocation"`
			MediaType   string            `json:"mediaType"`
			Annotations json.RawMessage   `json:"annotations"`
		} `json:"subject"`
		PredicateType string          `json:"predicateType"`
		Predicate     json.RawMessage `json:"predicate"`
	}
	if err := verifier.Decode(payload, &s); err != nil {
		return "", attest.Errorf(attest.StatementMalformed, "the statement cannot be read: %w", err)
	}
	if !slices.Contains(statementTypes, s.Type) {
		return "", attest.Errorf(attest.StatementMalformed, "the statement is %q, which is no in-toto statement", clip(s.Type))
	}
	if !predicatePattern.MatchString(s.PredicateType) || len(s.PredicateType) > maxPredicateID {
		return "", attest.Errorf(attest.PredicateType, "the predicate type %q is no URI of at most %d characters", clip(s.PredicateType), maxPredicateID)
	}
	if n := len(s.Subject); n == 0 || n > maxSubjects {
		return "", attest.Errorf(attest.SubjectMissing, "the statement has %d subjects, not 1 to %d", n, maxSubjects)
	}
	for _, sub := range s.Subject {
		if sub.Digest["sha256"] == want.Hex() && len(sub.Digest) == 1 {
			return s.PredicateType, nil
		}
	}
	return "", attest.Errorf(attest.SubjectMismatch, "the statement is not about %s", want)
}

// predicatePattern is what a predicate type looks like: a URI, printable on one line.
var predicatePattern = regexp.MustCompile(`^[!-~]+$`)

// Annotations of cosign's legacy layers beside those that static names.
const (
	simpleSigning = string(ctypes.SimpleSigningMediaType)
	dsseLayer     = string(ctypes.DssePayloadType)
)

// parseLayer reads a layer of a .sig or .att image.
func parseLayer(form string, content []byte, want attest.Digest) (*evidence, error) {
	// 1. The layer.
	var l attest.Layer
	if err := verifier.Decode(content, &l); err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "the layer cannot be read: %w", err)
	}
	e := &evidence{attested: form == attest.FormEnvelope}
	b64, wantType := l.Annotations[static.SignatureAnnotationKey], simpleSigning
	if e.attested {
		wantType = dsseLayer
	}
	if l.MediaType != wantType {
		return nil, attest.Errorf(attest.PayloadType, "the layer is %q, not %s", clip(l.MediaType), wantType)
	}
	// 2. What was signed, and its signature.
	var err error
	if e.attested {
		if b64 != "" {
			return nil, attest.Errorf(attest.SignatureCount, "an attestation has its signature in its envelope, and this has another one beside it")
		}
		e.signed = l.Payload
		e.predicateType, err = envelope(l.Payload, want)
	} else {
		e.predicateType = attest.PredicateSignature
		if e.signed, err = canonical(b64); err != nil {
			return nil, attest.Errorf(attest.SignatureInvalid, "the signature is not canonical base64")
		}
		err = simple(l.Payload, want)
	}
	if err != nil {
		return nil, err
	}
	// 3. What came along to prove it.
	opts, err := e.material(l.Annotations)
	if err != nil {
		return nil, err
	}
	e.signature, err = static.NewSignature(l.Payload, b64, opts...)
	if err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "the layer cannot be read: %s", clip(err.Error()))
	}
	return e, nil
}

// material reads certificate, timestamp and log entry. The certificates of a chain
// annotation are not used: the root has its own.
func (e *evidence) material(a map[string]string) ([]static.Option, error) {
	for _, k := range []string{static.CertificateAnnotationKey, static.BundleAnnotationKey, static.RFC3161TimestampAnnotationKey} {
		if len(a[k]) > maxPart {
			return nil, attest.Errorf(attest.TooLarge, "annotation %s has %d bytes", k, len(a[k]))
		}
	}
	var opts []static.Option
	if text := a[static.CertificateAnnotationKey]; text != "" {
		certs, err := cryptoutils.UnmarshalCertificatesFromPEM([]byte(text))
		if err != nil || len(certs) != 1 {
			return nil, attest.Errorf(attest.CertificateInvalid, "annotation %s does not hold exactly one certificate", static.CertificateAnnotationKey)
		}
		e.cert = certs[0]
		opts = append(opts, static.WithCertChain([]byte(text), nil))
	}
	if text := a[static.RFC3161TimestampAnnotationKey]; text != "" {
		var t cbundle.RFC3161Timestamp
		if err := verifier.Decode([]byte(text), &t); err != nil || len(t.SignedRFC3161Timestamp) == 0 {
			return nil, attest.Errorf(attest.TimestampInvalid, "annotation %s cannot be read", static.RFC3161TimestampAnnotationKey)
		}
		e.timestamp = t.SignedRFC3161Timestamp
		opts = append(opts, static.WithRFC3161Timestamp(&t))
	}
	if text := a[static.BundleAnnotationKey]; text != "" {
		e.rekor = new(cbundle.RekorBundle)
		err := verifier.Decode([]byte(text), e.rekor)
		if body, ok := e.rekor.Payload.Body.(string); err != nil || !ok || body == "" {
			return nil, attest.Errorf(attest.LogEntryMismatch, "annotation %s cannot be read", static.BundleAnnotationKey)
		}
		opts = append(opts, static.WithBundle(e.rekor))
	}
	return opts, nil
}

// simple reads the payload of an image signature. What it cannot read it does not
// take for a match (attacks D02).
func simple(payload []byte, want attest.Digest) error {
	var p struct {
		Critical struct {
			Identity struct {
				Reference string `json:"docker-reference"`
			} `json:"identity"`
			Image struct {
				Digest string `json:"docker-manifest-digest"`
			} `json:"image"`
			Type string `json:"type"`
		} `json:"critical"`
		Optional json.RawMessage `json:"optional"`
	}
	if err := verifier.Decode(payload, &p); err != nil {
		return attest.Errorf(attest.StatementMalformed, "the signed payload cannot be read: %w", err)
	}
	if p.Critical.Type != "cosign container image signature" {
		return attest.Errorf(attest.PredicateType, "the payload is a %q, not a container image signature", clip(p.Critical.Type))
	}
	if p.Critical.Image.Digest != want.String() {
		return attest.Errorf(attest.SubjectMismatch, "the signature is not over %s", want)
	}
	return nil
}

// envelope reads the DSSE envelope of an attestation and returns its predicate type.
func envelope(raw []byte, want attest.Digest) (string, error) {
	var e struct {
		PayloadType string `json:"payloadType"`
		Payload     string `json:"payload"`
		Signatures  []struct {
			KeyID string `json:"keyid"`
			Sig   string `json:"sig"`
		} `json:"signatures"`
	}
	if err := verifier.Decode(raw, &e); err != nil {
		return "", attest.Errorf(attest.BundleMalformed, "the envelope cannot be read: %w", err)
	}
	if e.PayloadType != attest.InTotoPayload {
		return "", attest.Errorf(attest.PayloadType, "the payload is %q, not %s", clip(e.PayloadType), attest.InTotoPayload)
	}
	if n := len(e.Signatures); n != 1 {
		return "", attest.Errorf(attest.SignatureCount, "the envelope has %d signatures, not one", n)
	}
	if _, err := canonical(e.Signatures[0].Sig); err != nil {
		return "", attest.Errorf(attest.SignatureInvalid, "the signature is not canonical base64")
	}
	payload, err := canonical(e.Payload)
	if err != nil {
		return "", attest.Errorf(attest.StatementMalformed, "the payload is not canonical base64")
	}
	return statement(payload, want)
}

// canonical decodes base64 in its one canonical form (attacks D05).
func canonical(text string) ([]byte, error) {
	out, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(out) == 0 || bytes.ContainsAny([]byte(text), "\r\n") {
		return nil, fmt.Errorf("not canonical base64")
	}
	return out, nil
}
