package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// StatementType is the _type of every statement (in-toto attestation
// spec/v1/statement.md).
const StatementType = "https://in-toto.io/Statement/v1"

// Predicate types. Those of Hallmark are permanent names (design section 6).
const (
	PredicateSignature  = "https://sigstore.dev/cosign/sign/v1"
	PredicateProvenance = "https://slsa.dev/provenance/v1"
	PredicateVSA        = "https://slsa.dev/verification_summary/v1"

	hallmarkPredicates  = "https://github.com/hallmarkd/hallmark/predicates/"
	PredicatePromotion  = hallmarkPredicates + "promotion/v1"
	PredicateDenial     = hallmarkPredicates + "denial/v1"
	PredicateEffect     = hallmarkPredicates + "effect/v1"
	PredicatePolicy     = hallmarkPredicates + "policy/v1"
	PredicateApproval   = hallmarkPredicates + "approval/v1"
	PredicateRevocation = hallmarkPredicates + "revocation/v1"
	PredicateImport     = hallmarkPredicates + "import/v1"
)

// Subject is one artifact that a statement is about. It is matched by digest
// alone; the name is for people and for the index.
type Subject struct {
	Name        string            `json:"name,omitempty"`
	Digest      map[string]string `json:"digest"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Statement is an in-toto statement v1. Its fields stand in the order in which
// they are signed; no others are allowed outside the predicate.
type Statement struct {
	Type          string          `json:"_type"`
	Subject       []Subject       `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

// marshal returns the one byte string that is signed and stored.
func marshal(predicateType string, subjects []Subject, predicate any) ([]byte, error) {
	body, isJSON := predicate.(json.RawMessage)
	if !isJSON { // what is JSON already stays as it is, but for the spaces between
		var err error
		if body, err = json.Marshal(predicate); err != nil {
			return nil, fmt.Errorf("marshalling %s: %w", predicateType, err)
		}
	}
	var out bytes.Buffer
	out.Grow(len(body) + 1024)
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(Statement{StatementType, subjects, predicateType, body}); err != nil {
		return nil, fmt.Errorf("marshalling statement: %w", err)
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// Image is what the registry verifiably holds under a digest.
type Image struct {
	Ref       ImageRef
	MediaType string
	Platforms []Platform // of an index: its platform manifests, in its order; else empty
	Base      Base
}

// Platform is one child of an index.
type Platform struct {
	Name   string `json:"platform"` // os/arch[/variant]
	Digest Digest `json:"digest"`
}

// Digests returns the image's own digest and those of its platforms, each once:
// the subjects of every statement about it (in-toto/attestation issue 105).
func (i Image) Digests() []Digest {
	out := []Digest{i.Ref.Digest}
	seen := map[Digest]bool{i.Ref.Digest: true}
	for _, p := range i.Platforms {
		if !seen[p.Digest] {
			seen[p.Digest] = true
			out = append(out, p.Digest)
		}
	}
	return out
}

func subjects(repo Repository, digests []Digest) []Subject {
	out := make([]Subject, len(digests))
	for i, d := range digests {
		out[i] = Subject{Name: string(repo), Digest: map[string]string{"sha256": d.Hex()}}
	}
	return out
}

// Image returns the image that a statement of this service is about, the inverse of
// how its subjects were written: the first is the image, the others are its
// platforms, whose names are not in it. A verification summary names no repository
// and has no image to return.
func (s Statement) Image() (Image, error) {
	var img Image
	for i, sub := range s.Subject {
		d, err := ParseHex(sub.Digest["sha256"])
		if err != nil {
			return Image{}, err
		}
		if i > 0 {
			img.Platforms = append(img.Platforms, Platform{Digest: d})
			continue
		}
		repo, err := ParseRepository(sub.Name)
		if err != nil {
			return Image{}, err
		}
		img.Ref = ImageRef{repo, d}
	}
	if len(s.Subject) == 0 {
		return Image{}, fmt.Errorf("statement has no subject")
	}
	return img, nil
}

// requestAnnotation names the natural key in a signature statement, which has
// no other place for it: cosign keeps a signature's annotations there too.
const requestAnnotation = "hallmark_request"

// SignatureStatement returns the statement by which cosign recognises an image
// signature. request is the natural key.
func SignatureStatement(img Image, request string) ([]byte, error) {
	s := subjects(img.Ref.Repository, img.Digests())
	s[0].Annotations = map[string]string{requestAnnotation: request}
	return marshal(PredicateSignature, s, struct{}{})
}

// Key returns the hex SHA-256 of the parts of a natural key, each preceded by
// its length so that no two lists share a key.
func Key(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// SignKey is the natural key of a Sign request (design section 5). Jobs of one run
// share its URI and are yet other callers: none is answered with what another,
// perhaps one that a rule does not admit, has signed.
func SignKey(ref ImageRef, id Identity, baseHint string, facts map[string]string) string {
	parts := []string{
		"sign", string(ref.Repository), ref.Digest.String(), id.Issuer, id.Run(), baseHint,
		id.Subject, id.SAN, id.Build.Environment,
	}
	for _, name := range slices.Sorted(maps.Keys(facts)) {
		parts = append(parts, name, facts[name])
	}
	return Key(parts...)
}

// Time renders t as statements carry it: UTC, whole seconds.
func Time(t time.Time) string { return t.UTC().Truncate(time.Second).Format(time.RFC3339) }

// SignatureKey is the natural key of the signature record that belongs to a Sign
// request; the request's own key is that of its provenance.
func SignatureKey(request string) string { return Key("signature", request) }
