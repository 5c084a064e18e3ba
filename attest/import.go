package attest

import "cmp"

// Forms in which foreign evidence comes.
const (
	FormBundle    = "bundle"           // Sigstore bundle, of cosign or GitHub
	FormSignature = "cosign-signature" // a layer of cosign's legacy .sig image
	FormEnvelope  = "cosign-envelope"  // a layer of cosign's legacy .att image
)

// Import is the predicate by which the service records a signature or attestation
// that was made elsewhere and that verified under a configured foreign root. It
// says what was verified then; whose word it is worth is for policies that name
// the root.
type Import struct {
	Root       string    `json:"root"`       // name of the foreign root in the configuration
	RootDigest Digest    `json:"rootDigest"` // SHA-256 of the root's file as it was then
	Form       string    `json:"form"`       // see Form…
	Digest     Digest    `json:"digest"`     // SHA-256 of Content
	Content    []byte    `json:"content"`    // the bundle as found; of the legacy forms the layer with its annotations, as JSON
	Signer     Foreigner `json:"signer"`
	// Of an attestation; a cosign signature without one has PredicateSignature.
	PredicateType string `json:"predicateType"`
	SignedAt      string `json:"signedAt,omitempty"` // RFC 3339, proved by a timestamp or log; "" when nothing proves it
	ImportedAt    string `json:"importedAt"`         // RFC 3339, by the service's clock
	Importer      Caller `json:"importer"`
}

// Foreigner is who signed foreign evidence.
type Foreigner struct {
	SAN    string `json:"san,omitempty"`    // e-mail or URI of the certificate; "" for a key
	Issuer string `json:"issuer,omitempty"` // OIDC issuer
	Key    string `json:"key,omitempty"`    // hex SHA-256 of the public key's PKIX DER, for evidence without a certificate
	Build  Build  `json:"build,omitzero"`   // what the certificate's extensions say
}

// Under renders who signed under a root, for people.
func (f Foreigner) Under(root string) string {
	if f.Key != "" {
		return "the key " + f.Key + " under root " + root
	}
	return f.SAN + " by issuer " + cmp.Or(f.Issuer, "unknown") + " under root " + root
}

// Layer is a layer of cosign's legacy .sig or .att image with the annotations that
// make a signature of it. As JSON it is the Content of these forms.
type Layer struct {
	MediaType   string            `json:"mediaType"`
	Annotations map[string]string `json:"annotations,omitempty"` // those of cosign
	Payload     []byte            `json:"payload"`
}

// ImportStatement returns the record of foreign evidence about an image.
func ImportStatement(ref ImageRef, in Import) ([]byte, error) {
	return marshal(PredicateImport, subjects(ref.Repository, []Digest{ref.Digest}), in)
}

// ImportKey is the natural key of an imported piece of evidence: the same bytes under
// the same root are recorded once for an image.
func ImportKey(ref ImageRef, root string, content Digest) string {
	return Key("import", string(ref.Repository), ref.Digest.String(), root, content.String())
}
