package ledger_test

import (
	"testing"

	"bytes"
	"encoding/base64"
	"github.com/hallmarkd/hallmark/attest"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
)

func TestAppendGivesRecordsWithProofs(t *testing.T) {
	k := newKit(t)
	l := k.open()
	c := k.credential("9912")
	records := k.append(l, k.signing(c, 1, "9912")...)
	for i, r := range records {
		if r.Index != uint64(i) {
			t.Errorf("record %d has index %d: the order of an Append is that of the log", i, r.Index)
		}
		root, err := base64.StdEncoding.DecodeString(string(bytes.Split(r.Checkpoint, []byte("\n"))[2]))
		if err != nil {
			t.Fatal(err)
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, r.Index, r.TreeSize, r.ID[:], r.Proof, root); err != nil {
			t.Error(err)
		}
	}
	for i, want := range []attest.RecordKind{attest.KindPrecertificate, attest.KindSignature, attest.KindProvenance} {
		if records[i].Kind != want {
			t.Errorf("record %d is a %s, want %s", i, records[i].Kind, want)
		}
	}
	k.fsck(l)
}
