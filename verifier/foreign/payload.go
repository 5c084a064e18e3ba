package foreign

import (
	"encoding/json"

	"github.com/hallmarkd/hallmark/attest"
)

// Payload returns the in-toto statement about want in evidence that Verify has
// accepted before, a bundle or a legacy attestation. A legacy signature holds none:
// PAYLOAD_TYPE.
func Payload(form string, content []byte, want attest.Digest) ([]byte, error) {
	e, err := parse(form, content, want)
	switch {
	case err != nil:
		return nil, err
	case e.bundle != nil:
		return e.bundle.GetDsseEnvelope().GetPayload(), nil
	case !e.attested:
		return nil, attest.Errorf(attest.PayloadType, "a signature over an image has no statement")
	}
	var env struct {
		Payload string `json:"payload"`
	}
	if err := json.Unmarshal(e.signed, &env); err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "the envelope cannot be read: %w", err)
	}
	return canonical(env.Payload)
}
