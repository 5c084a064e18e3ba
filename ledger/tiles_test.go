package ledger_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

// tiled returns a ledger of 600 entries: two full tiles, a partial one of 88 and
// one above them.
func tiled(tb testing.TB) (*kit, *ledger.Ledger) {
	tb.Helper()
	k := newKit(tb)
	l := k.open()
	batch := make([]ledger.Entry, 200)
	for n := range 3 {
		for i := range batch {
			batch[i] = k.signed(n*1000 + i)
		}
		k.append(l, batch...)
	}
	return k, l
}

// bad paths: all but the one canonical spelling of what exists (C2SP tlog-tiles).
var badPaths = []string{
	"", "/", "checkpoint/", "/checkpoint", "./checkpoint", "Checkpoint", "checkpoint\x00", "checkpoint\n",
	"tile", "tile/", "tile/0", "tile/0/", "tile//000", "tile/00/000", "tile/+0/000", "tile/-1/000", "tile/6/000", "tile/63/000", "tile/64/000", "tile/x/000",
	"tile/0/0", "tile/0/00", "tile/0/0000", "tile/0/x000/000", "tile/0/x001/000", "tile/0/000/", "tile/0/000/000", "tile/0/x000", "tile/0/ 00", "tile/0/000 ",
	"tile/0/002", "tile/0/003", "tile/0/999", "tile/1/000", "tile/2/000.p/1",
	"tile/0/002.p/89", "tile/0/002.p/255", "tile/0/002.p/256", "tile/0/002.p/0", "tile/0/002.p/-1", "tile/0/002.p/088", "tile/0/002.p/", "tile/0/002.p", "tile/0/002.p/88/", "tile/0/002.p/88.p/1",
	"tile/1/000.p/3", "tile/entries/002", "tile/entries/002.p/89", "tile/entries/3", "tile/entries/x000/000", "tile/entries", "tile/entries/",
	"tile/entries/000/../001", "tile/0/../0/000", "tile/../checkpoint", "tile/entries/../../../hallmark.db", "../hallmark.db", "..", ".state/treeState", "tile/0/..%2f000",
	`tile\0\000`, "tile/0/000\x00", "tile/0/x999/x999/x999/x999/x999/x999/999", "tile/0/x018/x446/x744/x073/x709/x551/615",
	"tile/data/000", "tile/names/000", "issuer/00", "lock",
}

func TestRead(t *testing.T) {
	t.Parallel()
	k, l := tiled(t)
	for _, path := range badPaths {
		_, err := l.Read(t.Context(), path)
		wantReason(t, "G14 path "+path, err, attest.RecordNotFound)
	}

	// The log is read as any client reads it, by other code than ours.
	read := func(path string) []byte {
		t.Helper()
		b, err := l.Read(t.Context(), path)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return b
	}
	var hashes []byte
	for _, path := range []string{"tile/0/000", "tile/0/001", "tile/0/002.p/88"} {
		hashes = append(hashes, read(path)...)
	}
	var leaves int
	for _, path := range []string{"tile/entries/000", "tile/entries/001", "tile/entries/002.p/88"} {
		var b api.EntryBundle
		if err := b.UnmarshalText(read(path)); err != nil {
			t.Fatal(err)
		}
		for _, e := range b.Entries {
			if !bytes.Equal(rfc6962.DefaultHasher.HashLeaf(e), hashes[32*leaves:32*leaves+32]) {
				t.Fatalf("entry %d and its hash differ", leaves)
			}
			leaves++
		}
	}
	if leaves != 600 {
		t.Fatalf("%d entries", leaves)
	}
	nodes, err := client.FetchRangeNodes(t.Context(), 600, func(ctx context.Context, level, index uint64, p uint8) ([]byte, error) {
		return l.Read(ctx, layout.TilePath(level, index, p))
	})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewRange(0, 600, nodes)
	if err != nil {
		t.Fatal(err)
	}
	root, err := tree.GetRootHash(nil)
	lines := strings.Split(string(read("checkpoint")), "\n")
	if err != nil || lines[1] != "600" || lines[2] != base64.StdEncoding.EncodeToString(root) {
		t.Errorf("the tiles have the root %x, %v; the checkpoint says %q", root, err, lines)
	}

	// Every width of a resource that exists is a resource, also when its file is
	// gone because a wider one is there.
	for _, dir := range []string{"tile/0/000.p", "tile/entries/000.p"} {
		if err := os.RemoveAll(filepath.Join(k.cfg.Dir, "log", filepath.FromSlash(dir))); err != nil {
			t.Fatal(err)
		}
	}
	k.close(l)
	l = k.open()
	if got := read("tile/0/000.p/5"); !bytes.Equal(got, hashes[:5*32]) {
		t.Errorf("tile/0/000.p/5 has %d bytes", len(got))
	}
	if got := read("tile/0/002.p/3"); !bytes.Equal(got, hashes[512*32:515*32]) {
		t.Errorf("tile/0/002.p/3 has %d bytes", len(got))
	}
	whole, part := read("tile/entries/000"), read("tile/entries/000.p/1")
	if n := 2 + int(binary.BigEndian.Uint16(whole)); !bytes.Equal(part, whole[:n]) {
		t.Errorf("tile/entries/000.p/1 has %d bytes, want %d", len(part), n)
	}
	if len(read("tile/1/000.p/2")) != 64 {
		t.Error("tile/1/000.p/2 is not two hashes")
	}
	k.fsck(l)
}

// Proofs of old checkpoints are made when the log has thrown its partial tiles
// away, as it does within minutes.
func TestProofsWithoutPartialTiles(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	first := k.append(l, k.signed(1), k.signed(2), k.signed(3))
	batch := make([]ledger.Entry, 256)
	for i := range batch {
		batch[i] = k.signed(1000 + i)
	}
	k.append(l, batch...)
	k.close(l)
	for _, dir := range []string{"tile/0/000.p", "tile/entries/000.p"} {
		if err := os.RemoveAll(filepath.Join(k.cfg.Dir, "log", filepath.FromSlash(dir))); err != nil {
			t.Fatal(err)
		}
	}
	l = k.open()
	for _, want := range first {
		got, err := l.Get(t.Context(), want.ID)
		if err != nil || got.TreeSize != 3 {
			t.Fatalf("tree size %d, %v", got.TreeSize, err)
		}
		verify(t, got)
	}
	k.fsck(l)
	if err := ledger.Rebuild(t.Context(), k.cfg); err != nil {
		t.Fatal(err)
	}
	k.fsck(nil)
}

func TestEmptyLog(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	if cp, err := l.Read(t.Context(), "checkpoint"); err != nil || !bytes.HasPrefix(cp, []byte(origin+"\n0\n")) {
		t.Errorf("checkpoint %q, %v", cp, err)
	}
	for _, path := range []string{"tile/0/000", "tile/0/000.p/1", "tile/entries/000.p/1"} {
		_, err := l.Read(t.Context(), path)
		wantReason(t, path, err, attest.RecordNotFound)
	}
	if r := k.fsck(l); r.Size != 0 {
		t.Errorf("fsck: %+v", r)
	}
}

// FuzzRead: no path reads anything but the resources of the log.
func FuzzRead(f *testing.F) {
	for _, p := range append(badPaths, "checkpoint", "tile/0/000", "tile/0/002.p/88", "tile/entries/002.p/7") {
		f.Add(p)
	}
	k := newKit(f)
	l := k.open()
	k.append(l, k.signed(1), k.signed(2))
	known := map[string]bool{"checkpoint": true, "tile/0/000.p/1": true, "tile/0/000.p/2": true, "tile/entries/000.p/1": true, "tile/entries/000.p/2": true}
	f.Fuzz(func(t *testing.T, path string) {
		b, err := l.Read(t.Context(), path)
		if known[path] != (err == nil) || (err == nil) != (len(b) > 0) {
			t.Errorf("Read(%q) = %d bytes, %v", path, len(b), err)
		}
	})
}
