package testkit

import (
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
)

// Service is the public_url of the services that the kit makes.
const Service = notary.Service

// Notary signs, logs and verifies as the service does, with a log in memory.
type Notary = notary.Notary

// NewNotary returns a notary with fresh keys that are gone with the test.
func NewNotary(t testing.TB) *Notary { return notary.New(t) }

// ProvenanceStatement returns the statement that the service writes for id.
func ProvenanceStatement(t testing.TB, id attest.Identity, img attest.Image) []byte {
	t.Helper()
	return notary.ProvenanceStatement(t, id, img)
}
