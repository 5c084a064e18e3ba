package attest

import "encoding/json"

// Predicate types of other evidence whose content is checked before it is signed
// (CheckPredicate).
const (
	PredicateTestResult = "https://in-toto.io/attestation/test-result/v0.1"
	PredicateVulns      = "https://in-toto.io/attestation/vulns/v0.2"
	PredicateVulnsV01   = "https://in-toto.io/attestation/vulns/v0.1"
	PredicateRelease    = "https://in-toto.io/attestation/release/v0.2"
	PredicateReleaseV01 = "https://in-toto.io/attestation/release/v0.1" // what the examples of v0.2 print
	PredicateLink       = "https://in-toto.io/attestation/link/v0.3"
	PredicateSPDX       = "https://spdx.dev/Document" // also with /v2.3 or /v3 behind it
	PredicateCycloneDX  = "https://cyclonedx.org/bom" // also with a version behind it
	PredicateOpenVEX    = "https://openvex.dev/ns"    // also with a version behind it
)

// MaxPredicate bounds one predicate that a caller has signed, in bytes.
const MaxPredicate = 16 << 20

// EvidenceInput is what a statement of other evidence is made from.
type EvidenceInput struct {
	Image         Image
	PredicateType string          // not Reserved
	Predicate     json.RawMessage // CheckPredicate has passed it
	Name          string          // tells evidence of one type apart: "unit", "e2e"; "" is one
	Signer        Identity        //
	Request       string          // natural key, EvidenceKey
	Use           string          // as in ProvenanceInput
}

// Annotations of the first subject, the only place that a statement has beside a
// predicate which is the caller's.
const (
	tokenAnnotation = "hallmark_token"
	useAnnotation   = "hallmark_use"
	nameAnnotation  = "hallmark_name"
)

// EvidenceStatement returns a statement with the caller's predicate about the image
// and all its platforms.
func EvidenceStatement(in EvidenceInput) ([]byte, error) {
	s := subjects(in.Image.Ref.Repository, in.Image.Digests())
	s[0].Annotations = map[string]string{requestAnnotation: in.Request, tokenAnnotation: in.Signer.TokenID}
	if in.Name != "" {
		s[0].Annotations[nameAnnotation] = in.Name
	}
	if in.Use != "" {
		s[0].Annotations[useAnnotation] = in.Use
	}
	return marshal(in.PredicateType, s, in.Predicate)
}

// MayAttest refuses a job that may run code which nobody has accepted into the
// repository (EVENT_NOT_ALLOWED), and the service itself (SOURCE_NOT_ALLOWED). A
// person may: somebody has to sign what was tested by hand.
func (id Identity) MayAttest() error {
	if id.Kind != Workload && id.Kind != Person {
		return Errorf(SourceNotAllowed, "%s is a %s: only CI jobs and persons sign evidence", id.SAN, id.Kind)
	}
	return id.MayChange("sign")
}

// EvidenceKey is the natural key of an Attest request (design section 5): repository,
// digest, type, content and identity, with the name and the token's run, so that a
// later run that finds the same is newer evidence. Jobs of one run in other
// environments are other callers, as for SignKey.
func EvidenceKey(ref ImageRef, id Identity, predicateType, name string, predicate []byte) string {
	return Key("attest", string(ref.Repository), ref.Digest.String(), predicateType, name, Hash(predicate).String(),
		id.Issuer, id.Subject, id.SAN, id.Run(), id.Build.Environment)
}

// EvidenceName returns the name that a statement of other evidence bears, or "".
func (s Statement) EvidenceName() string {
	if len(s.Subject) == 0 {
		return ""
	}
	return s.Subject[0].Annotations[nameAnnotation]
}

// TokenUse returns the id of the token that a statement of other evidence was signed
// with, and the key of the request that it is good for ("" when for several).
func (s Statement) TokenUse() (token, use string) {
	if len(s.Subject) == 0 {
		return "", ""
	}
	a := s.Subject[0].Annotations
	return a[tokenAnnotation], a[useAnnotation]
}
