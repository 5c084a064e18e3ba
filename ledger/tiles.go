package ledger

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	lru "github.com/hashicorp/golang-lru/v2"
	tilesnote "github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore/pkg/signature"
	flog "github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"

	"github.com/hallmarkd/hallmark/attest"
)

// checkpoint is a verified C2SP tlog-checkpoint.
type checkpoint struct {
	size uint64
	root []byte
	note []byte // as published
}

// logKey signs and verifies checkpoints. It is a note.Signer over any
// crypto.Signer, also one in hardware.
type logKey struct {
	origin   string
	hash     uint32
	signer   crypto.Signer
	verifier note.Verifier
}

func newLogKey(origin string, signer crypto.Signer) (*logKey, error) {
	if signer == nil {
		return nil, attest.Errorf(attest.BadConfig, "the ledger needs the log's key")
	}
	pub, ok := signer.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, attest.Errorf(attest.BadConfig, "the log's key must be ECDSA P-256")
	}
	hash, _, err := tilesnote.KeyHash(origin, pub)
	if err != nil {
		return nil, fmt.Errorf("hashing the log's key: %w", err)
	}
	v, err := signature.LoadVerifier(pub, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("loading the log's key: %w", err)
	}
	nv, err := tilesnote.NewNoteVerifier(origin, v)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "log origin %q: %w", origin, err)
	}
	return &logKey{origin, hash, signer, nv}, nil
}

// Name implements note.Signer.
func (k *logKey) Name() string { return k.origin }

// KeyHash implements note.Signer.
func (k *logKey) KeyHash() uint32 { return k.hash }

// Sign implements note.Signer. It checks its own signature: a published
// checkpoint that does not verify would stop the log (attacks H08).
func (k *logKey) Sign(msg []byte) ([]byte, error) {
	h := sha256.Sum256(msg)
	sig, err := k.signer.Sign(rand.Reader, h[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing checkpoint: %w", err)
	}
	if !k.verifier.Verify(msg, sig) {
		return nil, errors.New("the log's key made a signature that does not verify")
	}
	return sig, nil
}

// parse reads a checkpoint of this log and of no other: our origin, our
// signature and nothing else, canonical to the bit (C2SP tlog-checkpoint;
// attacks F02, F06).
func (k *logKey) parse(raw []byte) (checkpoint, error) {
	if origin, _, _ := strings.Cut(string(raw), "\n"); origin != k.origin {
		return checkpoint{}, attest.Errorf(attest.IdentityChanged,
			"the log in the data directory is that of %q, not of %q: public_url must stay what it was at init", clip(origin), k.origin)
	}
	cp, _, n, err := flog.ParseCheckpoint(raw, k.origin, k.verifier)
	if err != nil {
		return checkpoint{}, attest.Errorf(attest.CheckpointInvalid, "the checkpoint is not signed by the log's key, or was altered: %w", err)
	}
	if len(n.Sigs) != 1 || len(cp.Hash) != sha256.Size || n.Text != string(cp.Marshal()) ||
		string(raw) != n.Text+"\n— "+n.Sigs[0].Name+" "+n.Sigs[0].Base64+"\n" {
		return checkpoint{}, attest.Errorf(attest.CheckpointInvalid, "the checkpoint has more in it than this log writes")
	}
	return checkpoint{cp.Size, cp.Hash, raw}, nil
}

// logFiles reads the resources of the log (C2SP tlog-tiles) from its directory.
// Everything below a published checkpoint is immutable, except that partial
// resources vanish once the full one is there.
type logFiles struct {
	dir    string
	newest atomic.Uint64 // size of the newest checkpoint read
	tiles  *lru.Cache[tileKey, []byte]
}

type tileKey struct{ level, index uint64 }

func newLogFiles(dir string) (*logFiles, error) {
	tiles, err := lru.New[tileKey, []byte](1024) // at most 8 MiB
	if err != nil {
		return nil, err
	}
	return &logFiles{dir: dir, tiles: tiles}, nil
}

// checkpoint returns the published checkpoint as it is on disk.
func (f *logFiles) checkpoint() ([]byte, error) {
	return os.ReadFile(filepath.Join(f.dir, layout.CheckpointPath))
}

// tile returns a hash tile with at least the hashes of partial width p, all 256
// when p is 0. It is a client.TileFetcherFunc.
func (f *logFiles) tile(_ context.Context, level, index uint64, p uint8) ([]byte, error) {
	need := width(p) * sha256.Size
	if t, ok := f.tiles.Get(tileKey{level, index}); ok && len(t) >= need {
		return t, nil
	}
	t, err := f.read(level, index, p, layout.TilePath)
	if err != nil {
		return nil, err
	}
	if len(t) < need || len(t)%sha256.Size != 0 {
		return nil, fmt.Errorf("hash tile %s has %d bytes, needs %d", layout.TilePath(level, index, p), len(t), need)
	}
	f.tiles.Add(tileKey{level, index}, t)
	return t, nil
}

// entries returns the entries of bundle index in a log of the given size.
func (f *logFiles) entries(index, size uint64) ([][]byte, error) {
	p := layout.PartialTileSize(0, index, size)
	raw, err := f.read(0, index, p, func(_, n uint64, p uint8) string { return layout.EntriesPath(n, p) })
	if err != nil {
		return nil, err
	}
	var b api.EntryBundle
	if err := b.UnmarshalText(raw); err != nil {
		return nil, fmt.Errorf("parsing %s: %w", layout.EntriesPath(index, p), err)
	}
	if len(b.Entries) < width(p) {
		return nil, fmt.Errorf("%s has %d entries, needs %d", layout.EntriesPath(index, p), len(b.Entries), width(p))
	}
	return b.Entries[:width(p)], nil
}

// read returns a resource that begins with what is asked for: the newest one
// there is, since an old partial one may be gone and the full one not yet there.
func (f *logFiles) read(level, index uint64, p uint8, path func(level, n uint64, p uint8) string) ([]byte, error) {
	newest := layout.PartialTileSize(level, index, f.newest.Load())
	var err error
	for _, try := range []uint8{newest, p, 0} {
		if width(try) < width(p) {
			continue
		}
		var raw []byte
		raw, err = os.ReadFile(filepath.Join(f.dir, filepath.FromSlash(path(level, index, try))))
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return raw, err
		}
	}
	return nil, err
}

// width is the number of hashes or entries that a partial width stands for.
func width(p uint8) int {
	if p == 0 {
		return layout.TileWidth
	}
	return int(p)
}

// prove returns an inclusion proof of each leaf in the tree of cp, each verified
// against cp's root (attacks F01, F08).
func (f *logFiles) prove(ctx context.Context, cp checkpoint, indexes []uint64, leaves []attest.RecordID) ([][][]byte, error) {
	builder, err := client.NewProofBuilder(ctx, cp.size, f.tile)
	if err != nil {
		return nil, fmt.Errorf("preparing proofs at size %d: %w", cp.size, err)
	}
	out := make([][][]byte, len(indexes))
	for i, index := range indexes {
		if out[i], err = builder.InclusionProof(ctx, index); err != nil {
			return nil, fmt.Errorf("proving entry %d at size %d: %w", index, cp.size, err)
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, cp.size, leaves[i][:], out[i], cp.root); err != nil {
			return nil, attest.Errorf(attest.LogProofInvalid, "entry %d is not in the tree of size %d: the log's tiles were altered, restore them: %w", index, cp.size, err)
		}
	}
	return out, nil
}

// Read returns a public resource of the log by its C2SP tlog-tiles path:
// "checkpoint", "tile/0/000", "tile/0/x001/234.p/5", "tile/entries/000.p/5".
// It serves the log as of Size, so that whoever holds the checkpoint finds every
// tile below it. RECORD_NOT_FOUND for any other path: only the one canonical
// spelling of a resource that exists is a path at all.
func (l *Ledger) Read(ctx context.Context, path string) ([]byte, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	cp := l.state.checkpoint()
	if path == layout.CheckpointPath {
		return cp.note, nil
	}
	missing := attest.Errorf(attest.RecordNotFound, "the log has no resource %q", clip(path))
	rest, ok := strings.CutPrefix(path, "tile/")
	levelText, n, ok2 := strings.Cut(rest, "/")
	if !ok || !ok2 {
		return nil, missing
	}
	if levelText == "entries" {
		index, p, err := layout.ParseTileIndexPartial(n)
		if err != nil || layout.EntriesPath(index, p) != path || !covers(cp.size, 0, index, p) {
			return nil, missing
		}
		entries, err := l.files.entries(index, bundleEnd(index, p))
		if err != nil {
			return nil, attest.Errorf(attest.LedgerUnavailable, "reading the log: %w", err)
		}
		return marshalEntries(entries), nil
	}
	level, index, p, err := layout.ParseTileLevelIndexPartial(levelText, n)
	if err != nil || layout.TilePath(level, index, p) != path || !covers(cp.size, level, index, p) {
		return nil, missing
	}
	t, err := l.files.tile(ctx, level, index, p)
	if err != nil {
		return nil, attest.Errorf(attest.LedgerUnavailable, "reading the log: %w", err)
	}
	return bytes.Clone(t[:width(p)*sha256.Size]), nil
}

// covers reports whether a tree of the given size has that resource.
func covers(size, level, index uint64, p uint8) bool {
	nodes := size >> (level * layout.TileHeight)
	return index <= nodes/layout.TileWidth && index*layout.TileWidth+uint64(width(p)) <= nodes
}

// bundleEnd is the size of a log that ends with the given width of a bundle.
func bundleEnd(index uint64, p uint8) uint64 { return index*layout.EntryBundleWidth + uint64(width(p)) }

// marshalEntries is the inverse of api.EntryBundle.UnmarshalText.
func marshalEntries(entries [][]byte) []byte {
	var out []byte
	for _, e := range entries {
		out = binary.BigEndian.AppendUint16(out, uint16(len(e)))
		out = append(out, e...)
	}
	return out
}

// clip bounds what an error repeats of its input.
func clip(s string) string { return clipTo(s, 80) }
