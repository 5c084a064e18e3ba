package registry

import (
	"slices"

	"github.com/hallmarkd/hallmark/attest"
)

// dockerfileFrontends are images that read a Dockerfile (its line "# syntax="). BuildKit
// lists them with those that a build was made of.
var dockerfileFrontends = []attest.Repository{dockerHub + "/docker/dockerfile", dockerHub + "/docker/dockerfile-upstream"}

// Dependencies returns the images that a provenance, SLSA v0.2 or v1, names among what
// the image of was built from, each once and by its canonical name. It is for
// statements whose signature was verified. One that names an image in a way that
// cannot be read, or says two things of it, is an error: what it rests on is then not
// known.
func (c *Client) Dependencies(statement []byte, of attest.Digest) ([]attest.BaseName, error) {
	found, err := parseProvenance(statement, provenanceV1, of)
	if attest.ReasonOf(err) == attest.PredicateType {
		found, err = parseProvenance(statement, provenanceV02, of)
	}
	if err != nil {
		return nil, err
	}
	var out []attest.BaseName
	for _, k := range found {
		if k.trouble != "" || k.digest.IsZero() {
			return nil, attest.Errorf(attest.StatementMalformed, "the provenance names %s, which cannot be read as an image with a digest", k.claim.Name)
		}
		n := attest.BaseName{Repository: c.canonical(k.repo), Digest: k.digest}
		if !slices.Contains(dockerfileFrontends, n.Repository) && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out, nil
}
