package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
)

// factsVersion decides whether the derived tables are rebuilt at Open.
const factsVersion = attest.FactsVersion

// deriver makes the derived tables and the state in memory from the log: the one
// code path of an append, a start, a recovery, a rebuild and a check. It is told
// a checkpoint and takes in the entries up to it, all or none.
type deriver struct {
	files  *logFiles
	key    *logKey
	source *index // has the envelopes and the checkpoints
	index  *index // gets what is derived; the same, except in Fsck
	step   func(string)

	// Owned by whoever calls load and advance, one at a time.
	tree  *compact.Range // over the leaves taken in
	dirty bool           // the index may be ahead of what follows: load again

	mu     sync.RWMutex // guards what follows; all of it is as of last.size
	last   checkpoint
	fold   *fold
	newest time.Time
}

var treeFactory = &compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}

func (d *deriver) checkpoint() checkpoint {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.last
}

// load reads the state as the index has it, and checks that the log still has
// the tree that the index was made from (attacks F04, K10): a log that was
// rolled back and has grown again is as wrong as one that is too short.
func (d *deriver) load(ctx context.Context) error {
	synced, err := d.index.meta(ctx, metaSynced)
	if err != nil {
		return err
	}
	newest, err := d.index.meta(ctx, metaNewest)
	if err != nil {
		return err
	}
	last := checkpoint{size: uint64(synced), root: rfc6962.DefaultHasher.EmptyRoot()}
	tree := treeFactory.NewEmptyRange(0)
	if synced > 0 {
		if last, err = d.stored(ctx, uint64(synced)); err != nil {
			return err
		}
		hashes, err := client.FetchRangeNodes(ctx, last.size, d.files.tile)
		if err != nil {
			return attest.Errorf(attest.LedgerBehind, "the log no longer has the %d entries that the index was made from: restore its directory: %w", last.size, err)
		}
		if tree, err = treeFactory.NewRange(0, last.size, hashes); err != nil {
			return fmt.Errorf("reading the tree: %w", err)
		}
	}
	if root, err := rootOf(tree); err != nil || !bytes.Equal(root, last.root) {
		return attest.Errorf(attest.LedgerBehind, "the log's first %d entries are not those that the index was made from: restore the log's directory and the database of one backup", last.size)
	}
	f, err := d.loadFold(ctx)
	if err != nil {
		return fmt.Errorf("reading the stages: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tree, d.last, d.fold, d.newest, d.dirty = tree, last, f, time.Unix(newest, 0).UTC(), false
	if newest == 0 {
		d.newest = time.Time{}
	}
	return nil
}

func rootOf(r *compact.Range) ([]byte, error) {
	if r.End() == 0 {
		return rfc6962.DefaultHasher.EmptyRoot(), nil
	}
	return r.GetRootHash(nil)
}

// stored returns the stored checkpoint of exactly this size.
func (d *deriver) stored(ctx context.Context, size uint64) (checkpoint, error) {
	var raw []byte
	err := d.source.row(ctx, `SELECT note FROM checkpoints WHERE size = $1`, []any{size}, &raw)
	if errors.Is(err, sql.ErrNoRows) {
		return checkpoint{}, attest.Errorf(attest.LedgerIncomplete, "the checkpoint of size %d is missing: restore the database", size)
	}
	if err != nil {
		return checkpoint{}, fmt.Errorf("reading checkpoint %d: %w", size, err)
	}
	cp, err := d.key.parse(raw)
	if err == nil && cp.size != size {
		err = attest.Errorf(attest.CheckpointInvalid, "the checkpoint stored for size %d is of size %d: restore the database", size, cp.size)
	}
	return cp, err
}

// next returns the checkpoint to advance to: the smallest stored one that has
// more than was taken in, so that a record keeps the checkpoint it was first
// given, else the published one.
func (d *deriver) next(ctx context.Context, published checkpoint) (checkpoint, error) {
	var size sql.NullInt64
	err := d.source.row(ctx, `SELECT min(size) FROM checkpoints WHERE size > $1`, []any{d.last.size}, &size)
	if err != nil {
		return checkpoint{}, fmt.Errorf("reading checkpoints: %w", err)
	}
	if !size.Valid {
		return published, nil
	}
	if uint64(size.Int64) > published.size {
		return checkpoint{}, behind(published.size, uint64(size.Int64))
	}
	return d.stored(ctx, uint64(size.Int64))
}

// derived is one log entry on its way into the index.
type derived struct {
	index     uint64
	id        attest.RecordID
	seq       int64
	attach    bool
	duplicate bool // an earlier entry has the same leaf
	facts     attest.Facts
	envelope  attest.Envelope
}

// advance takes in the log's entries up to a checkpoint. held gives envelopes
// that are known to be stored without reading them; it may be nil. On an error
// nothing was taken in, as far as is known.
func (d *deriver) advance(ctx context.Context, to checkpoint, held func(attest.RecordID) *flight) ([]*derived, *foldStep, error) {
	// 1. The leaves, checked as a whole: they hash to the checkpoint's root
	// together with all that was taken in before (attacks F01, F05).
	batch, tree, err := d.leaves(to)
	if err != nil {
		return nil, nil, err
	}
	// 2. Their envelopes. Every entry has one, because only this service writes
	// to its log; without one nothing behind the gap may be answered (K09).
	if err := d.envelopes(ctx, batch, held); err != nil {
		return nil, nil, err
	}
	d.step("published")
	// If the process dies here, the next start repeats everything above.
	// 3. What follows from them, in one transaction.
	d.dirty = true
	var fs *foldStep
	err = d.index.update(ctx, func(t *txn) (err error) {
		fs = d.fold.step(func(id attest.RecordID) (*Promotion, error) { return t.promotion(id) })
		return t.derive(batch, fs, to, d.newest)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("writing the index: %w", err)
	}
	d.step("synced")
	// If the process dies here, the next start reads it back from the index.
	d.mu.Lock()
	defer d.mu.Unlock()
	fs.commit()
	d.tree, d.last, d.dirty = tree, to, false
	for _, r := range batch {
		if r.facts.Time.After(d.newest) {
			d.newest = r.facts.Time
		}
	}
	return batch, fs, nil
}

// leaves reads the entries from the tree's end to the checkpoint.
func (d *deriver) leaves(to checkpoint) ([]*derived, *compact.Range, error) {
	tree, err := treeFactory.NewRange(0, d.tree.End(), slices.Clone(d.tree.Hashes()))
	if err != nil {
		return nil, nil, err
	}
	var batch []*derived
	for i := tree.End(); i < to.size; {
		bundle := i / layout.EntryBundleWidth
		entries, err := d.files.entries(bundle, to.size)
		if err != nil {
			return nil, nil, attest.Errorf(attest.LedgerIncomplete, "log entry %d cannot be read: restore the log's directory: %w", i, err)
		}
		for _, e := range entries[i%layout.EntryBundleWidth:] {
			r := &derived{index: i, id: attest.LeafHash(e)}
			if err := tree.Append(r.id[:], nil); err != nil {
				return nil, nil, err
			}
			batch = append(batch, r)
			i++
		}
	}
	if root, err := rootOf(tree); err != nil || !bytes.Equal(root, to.root) {
		return nil, nil, attest.Errorf(attest.LedgerIncomplete, "the log's entries %d to %d are not those that its checkpoint signs: restore the log's directory", d.tree.End(), to.size)
	}
	return batch, tree, nil
}

// envelopes finds the envelope and the facts of every entry.
func (d *deriver) envelopes(ctx context.Context, batch []*derived, held func(attest.RecordID) *flight) error {
	errs := make([]error, len(batch))
	var work errgroup.Group
	work.SetLimit(runtime.NumCPU())
	for i, r := range batch {
		if held != nil {
			if f := held(r.id); f != nil {
				r.seq, r.attach, r.facts, r.envelope = f.seq, f.entry.Attach, f.facts, f.entry.Envelope
				continue
			}
		}
		work.Go(func() error {
			errs[i] = d.envelope(ctx, r)
			return nil
		})
	}
	_ = work.Wait() // the errors are in errs, so that the first gap is named
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *deriver) envelope(ctx context.Context, r *derived) (err error) {
	r.envelope, r.seq, r.attach, err = d.source.envelope(ctx, r.id, r.index)
	if err != nil {
		return err
	}
	if r.facts, err = attest.Describe(r.envelope); err != nil {
		return attest.Errorf(attest.LedgerIncomplete, "the envelope of log entry %d (record %s) cannot be read: restore the database: %w", r.index, r.id, err)
	}
	return nil
}

// envelope reads an envelope and rebuilds its log entry: what is stored under a
// leaf hash must hash to it. LEDGER_INCOMPLETE names the log index otherwise.
func (x *index) envelope(ctx context.Context, id attest.RecordID, index uint64) (e attest.Envelope, seq int64, attach bool, err error) {
	var packed, content []byte
	var certified bool
	var packing, signerPacking int
	err = x.row(ctx, `SELECT e.seq, e.certified, e.attach, e.packing, e.content, s.packing, s.der
		FROM envelopes e JOIN signers s ON s.id = e.signer WHERE e.leaf = $1`, []any{id[:]},
		&seq, &certified, &attach, &packing, &content, &signerPacking, &packed)
	if errors.Is(err, sql.ErrNoRows) {
		return e, 0, false, attest.Errorf(attest.LedgerIncomplete, "log entry %d has no envelope (record %s): restore the database; everything is refused until it is back", index, id)
	}
	if err != nil {
		return e, 0, false, fmt.Errorf("reading the envelope of record %s: %w", id, err)
	}
	e, err = x.packer.unpackEnvelope(packing, content)
	der, err2 := x.packer.unpack(signerPacking, packed)
	if err = errors.Join(err, err2); err != nil {
		return e, 0, false, attest.Errorf(attest.LedgerIncomplete, "the envelope of log entry %d (record %s) was altered: restore the database; everything is refused until it is back: %w", index, id, err)
	}
	if certified {
		e.Certificate = der
	} else {
		e.PublicKey = der
	}
	if e.ID() != id {
		return e, 0, false, attest.Errorf(attest.LedgerIncomplete, "the envelope of log entry %d (record %s) was altered: restore the database; everything is refused until it is back", index, id)
	}
	return e, seq, attach, nil
}

// derive writes what follows from the entries of batch.
func (t *txn) derive(batch []*derived, fs *foldStep, to checkpoint, newest time.Time) error {
	tasked, err := t.meta(metaTasked)
	if err != nil {
		return err
	}
	var facets, requests []any
	for _, r := range batch {
		rows, err := t.record(r, to.size)
		if err != nil {
			return fmt.Errorf("entry %d: %w", r.index, err)
		}
		if _, err := t.exec(`DELETE FROM unlogged WHERE seq = $1`, r.seq); err != nil {
			return err
		}
		if r.duplicate {
			continue
		}
		facets = append(facets, rows...)
		if r.facts.Key != "" && r.facts.Kind != attest.KindPromotion {
			key, err := hex.DecodeString(r.facts.Key)
			if err != nil {
				return fmt.Errorf("entry %d: natural key: %w", r.index, err)
			}
			requests = append(requests, key, r.index)
		}
		if err := fs.apply(r.id, r.index, r.facts, r.envelope); err != nil {
			return fmt.Errorf("entry %d: %w", r.index, err)
		}
		if r.attach && r.index >= uint64(tasked) {
			for _, ref := range attachRefs(r.envelope) {
				if err := t.addTask(TaskAttach, r.id, ref); err != nil {
					return err
				}
			}
		}
		if r.facts.Time.After(newest) {
			newest = r.facts.Time
		}
	}
	if err := t.bulk(`INSERT INTO facets (term, kind, idx) VALUES `, 3, ``, facets); err != nil {
		return err
	}
	// The first record in the log answers a natural key for ever.
	if err := t.bulk(`INSERT INTO requests (key, idx) VALUES `, 2, ` ON CONFLICT (key) DO NOTHING`, requests); err != nil {
		return err
	}
	if err := t.folded(fs, uint64(tasked)); err != nil {
		return err
	}
	// Write-once: a checkpoint that was handed out is never replaced.
	if _, err := t.exec(`INSERT INTO checkpoints (size, note) VALUES ($1, $2) ON CONFLICT (size) DO NOTHING`, to.size, to.note); err != nil {
		return err
	}
	if !newest.IsZero() {
		if err := t.set(metaNewest, newest.Unix()); err != nil {
			return err
		}
	}
	if err := t.set(metaTasked, max(tasked, int64(to.size))); err != nil {
		return err
	}
	return t.set(metaSynced, int64(to.size))
}

func (t *txn) meta(name string) (v int64, err error) {
	err = t.row(`SELECT value FROM meta WHERE name = $1`, []any{name}, &v)
	return v, err
}

// record writes the row of one record and returns its facet rows.
func (t *txn) record(r *derived, treeSize uint64) ([]any, error) {
	kind, err := t.term(termName, string(r.facts.Kind))
	if err != nil {
		return nil, err
	}
	var rows []any
	var terms []byte
	for _, f := range r.facts.Facets {
		name, err := t.term(termName, f.Name)
		if err != nil {
			return nil, err
		}
		id, err := t.term(name, f.Value)
		if err != nil {
			return nil, err
		}
		terms = binary.AppendUvarint(terms, uint64(id))
		rows = append(rows, id, kind, r.index)
	}
	key, err := hex.DecodeString(r.facts.Key)
	if err != nil {
		return nil, fmt.Errorf("natural key: %w", err)
	}
	n, err := t.exec(`INSERT INTO records (idx, leaf, kind, time, key, tree_size, facets) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (leaf) DO NOTHING`,
		r.index, r.id[:], kind, r.facts.Time.Unix(), key, treeSize, terms)
	// An entry can be in the log twice after a crash between the log's write and
	// its answer. The first one is the record.
	r.duplicate = n == 0
	return rows, err
}

// folded writes what the fold changed.
func (t *txn) folded(fs *foldStep, tasked uint64) error {
	for _, p := range fs.promotions {
		if err := t.putPromotion(p); err != nil {
			return fmt.Errorf("promotion %s: %w", p.ID, err)
		}
	}
	for k, p := range fs.heads {
		head := []byte{}
		if p != nil {
			head = p.ID[:]
		}
		if _, err := t.exec(`INSERT INTO stages (track, stage, repository, head) VALUES ($1, $2, $3, $4)
			ON CONFLICT (track, stage, repository) DO UPDATE SET head = excluded.head`, k.track, k.stage, string(k.repository), head); err != nil {
			return err
		}
	}
	for text, index := range fs.requests {
		key, err := hex.DecodeString(text)
		if err != nil {
			return fmt.Errorf("natural key: %w", err)
		}
		if index == nil {
			_, err = t.exec(`DELETE FROM requests WHERE key = $1`, key)
		} else {
			_, err = t.exec(`INSERT INTO requests (key, idx) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET idx = excluded.idx`, key, *index)
		}
		if err != nil {
			return err
		}
	}
	for _, p := range fs.won {
		if p.Index < tasked {
			continue
		}
		if err := t.addTask(TaskPromote, p.ID, p.Ref); err != nil {
			return err
		}
	}
	if fs.policy != nil {
		return t.set(metaPolicy, int64(fs.policyIndex)+1)
	}
	return nil
}

const promotionColumns = `idx, leaf, track, stage, repository, digest, digests, stage_digest, replaces, target, key, state, why, time, since`

func (t *txn) putPromotion(p *Promotion) error {
	key, err := hex.DecodeString(p.Key)
	if err != nil {
		return err
	}
	var digests []byte
	for _, d := range p.Digests {
		digests = append(digests, d[:]...)
	}
	_, err = t.exec(`INSERT INTO promotions (`+promotionColumns+`) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
		ON CONFLICT (idx) DO UPDATE SET state = excluded.state, why = excluded.why, since = excluded.since`,
		p.Index, p.ID[:], p.Track, p.Stage, string(p.Ref.Repository), p.Ref.Digest[:], digests, p.StageDigest[:], p.Replaces[:],
		p.Target, key, string(p.State), p.Why, p.Time.Unix(), p.Since.Unix())
	return err
}

func scanPromotion(scan func(...any) error) (*Promotion, error) {
	var p Promotion
	var leaf, digest, digests, stageDigest, replaces, key []byte
	var repo, state string
	var at, since int64
	if err := scan(&p.Index, &leaf, &p.Track, &p.Stage, &repo, &digest, &digests, &stageDigest, &replaces, &p.Target, &key, &state, &p.Why, &at, &since); err != nil {
		return nil, err
	}
	const n = len(attest.Digest{})
	for _, b := range [][]byte{leaf, digest, stageDigest, replaces} {
		if len(b) != n || len(digests)%n != 0 {
			return nil, attest.Errorf(attest.LedgerIncomplete, "the index row of promotion %d was altered: stop the service and run rebuild", p.Index)
		}
	}
	p.ID, p.Replaces, p.StageDigest = attest.RecordID(leaf), attest.RecordID(replaces), attest.Digest(stageDigest)
	p.Ref = attest.ImageRef{Repository: attest.Repository(repo), Digest: attest.Digest(digest)}
	for b := range slices.Chunk(digests, n) {
		p.Digests = append(p.Digests, attest.Digest(b))
	}
	p.State, p.Key = State(state), hex.EncodeToString(key)
	p.Time, p.Since = time.Unix(at, 0).UTC(), time.Unix(since, 0).UTC()
	return &p, nil
}

// promotion returns a promotion as this transaction sees it, nil for none.
func (t *txn) promotion(id attest.RecordID) (*Promotion, error) {
	p, err := scanPromotion(func(into ...any) error {
		return t.row(`SELECT `+promotionColumns+` FROM promotions WHERE leaf = $1`, []any{id[:]}, into...)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return p, err
}

// loadFold reads the fold back from the index.
func (d *deriver) loadFold(ctx context.Context) (*fold, error) {
	f := newFold()
	err := d.index.each(ctx, `SELECT track, stage, repository FROM stages WHERE length(head) = 0`, nil, func(scan func(...any) error) error {
		var k stageKey
		err := scan(&k.track, &k.stage, &k.repository)
		f.heads[k] = nil
		return err
	})
	if err != nil {
		return nil, err
	}
	err = d.index.each(ctx, `SELECT `+prefixed("p.", promotionColumns)+` FROM stages s JOIN promotions p ON p.leaf = s.head`, nil, func(scan func(...any) error) error {
		p, err := scanPromotion(scan)
		if err == nil {
			f.heads[stageKey{p.Track, p.Stage, p.Ref.Repository}] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	at, err := d.index.meta(ctx, metaPolicy)
	if err != nil || at == 0 {
		return f, err
	}
	f.policyIndex = uint64(at - 1)
	f.policy, err = d.policy(ctx, f.policyIndex)
	return f, err
}

// policy reads the policy record at an index.
func (d *deriver) policy(ctx context.Context, index uint64) (*attest.PolicyChange, error) {
	var leaf []byte
	if err := d.index.row(ctx, `SELECT leaf FROM records WHERE idx = $1`, []any{index}, &leaf); err != nil {
		return nil, fmt.Errorf("reading policy record %d: %w", index, err)
	}
	if len(leaf) != len(attest.RecordID{}) {
		return nil, attest.Errorf(attest.LedgerIncomplete, "the index row of record %d was altered: stop the service and run rebuild", index)
	}
	e, _, _, err := d.source.envelope(ctx, attest.RecordID(leaf), index)
	if err != nil {
		return nil, err
	}
	facts, err := attest.Describe(e)
	if err != nil {
		return nil, fmt.Errorf("reading policy record %d: %w", index, err)
	}
	s := newFold().step(nil)
	if err := s.apply(attest.RecordID(leaf), index, facts, e); err != nil || s.policy == nil {
		return nil, attest.Errorf(attest.LedgerIncomplete, "record %d is not a policy: stop the service and run rebuild (%v)", index, err)
	}
	return s.policy, nil
}

func prefixed(prefix, columns string) string {
	return prefix + strings.ReplaceAll(columns, ", ", ", "+prefix)
}
