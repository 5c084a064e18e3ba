// Package notary gives tests signed, logged and verified evidence. It stands apart
// from the rest of the kit so that what lies below the gate can use it.
package notary

import (
	"crypto"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore/pkg/signature"
	flog "github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/merkle/testonly"
	sumdb "golang.org/x/mod/sumdb/note"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
)

// Service is the public_url of the services that the kit makes.
const Service = "https://hallmark.example.com"

// Notary signs, logs and verifies as the service does, with a log in memory. It
// is safe for concurrent use.
type Notary struct {
	Signer   *signer.Signer
	Verifier *verifier.Verifier

	checkpoints sumdb.Signer

	mu  sync.Mutex // guards log
	log *testonly.Tree
}

// New returns a notary with fresh keys that are gone with the test.
func New(t testing.TB) *Notary {
	t.Helper()
	cfg := signer.Config{Dir: filepath.Join(t.TempDir(), "keys"), Service: Service}
	if err := signer.Init(cfg); err != nil {
		t.Fatal(err)
	}
	s, err := signer.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	v, err := verifier.New(s.TrustedRoot(), s.GateKeyPEM(), Service)
	if err != nil {
		t.Fatal(err)
	}
	key, err := signature.LoadSigner(s.LogKey(), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	checkpoints, err := note.NewNoteSigner(t.Context(), s.Origin(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &Notary{Signer: s, Verifier: v, checkpoints: checkpoints, log: testonly.New(rfc6962.DefaultHasher)}
}

// Record logs an envelope and returns its record, proved in a tree that ends
// with it.
func (n *Notary) Record(t testing.TB, e attest.Envelope) attest.Record {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log.AppendData(e.LogEntry())
	size := n.log.Size()
	checkpoint, err := sumdb.Sign(&sumdb.Note{
		Text: string(flog.Checkpoint{Origin: n.Signer.Origin(), Size: size, Hash: n.log.Hash()}.Marshal()),
	}, n.checkpoints)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := n.log.InclusionProof(size-1, size)
	if err != nil {
		t.Fatal(err)
	}
	facts, err := attest.Describe(e)
	if err != nil {
		t.Fatal(err)
	}
	return attest.Record{
		Envelope: e, Facts: facts, ID: e.ID(), Index: size - 1, TreeSize: size, Checkpoint: checkpoint, Proof: proof,
	}
}

// Evidence signs a statement in the name of id, logs it and verifies it.
func (n *Notary) Evidence(t testing.TB, id attest.Identity, statement []byte) *verifier.Evidence {
	t.Helper()
	c, err := n.Signer.Credential(id)
	if err != nil {
		t.Fatal(err)
	}
	e, err := n.Signer.Sign(c, statement)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := n.Verifier.Record(n.Record(t, e))
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

// Signature returns evidence of an image signature by id.
func (n *Notary) Signature(t testing.TB, id attest.Identity, img attest.Image) *verifier.Evidence {
	t.Helper()
	statement, err := attest.SignatureStatement(img, attest.SignKey(img.Ref, id, "", nil))
	if err != nil {
		t.Fatal(err)
	}
	return n.Evidence(t, id, statement)
}

// Provenance returns evidence of the provenance that the service writes for id.
func (n *Notary) Provenance(t testing.TB, id attest.Identity, img attest.Image) *verifier.Evidence {
	t.Helper()
	return n.Evidence(t, id, ProvenanceStatement(t, id, img))
}

// ProvenanceStatement returns the statement that the service writes for id.
func ProvenanceStatement(t testing.TB, id attest.Identity, img attest.Image) []byte {
	t.Helper()
	statement, err := attest.ProvenanceStatement(attest.ProvenanceInput{
		Service: Service, Image: img, Builder: id, Request: attest.SignKey(img.Ref, id, "", nil), Finished: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return statement
}
