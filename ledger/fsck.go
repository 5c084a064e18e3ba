package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/tessera/api/layout"

	"github.com/hallmarkd/hallmark/attest"
)

// Report is what Fsck found.
type Report struct {
	Size      uint64   // entries in the published log
	Records   int      // distinct ones
	Envelopes int      // stored
	Unlogged  int      // stored and not in the log: the next Open adds them. No problem
	Problems  []string // for people; empty when the ledger is whole
}

// maxProblems bounds a report: a thousand lines say no more than a hundred.
const maxProblems = 100

// Fsck checks a ledger that no process has open, and changes nothing:
//
//   - the checkpoint is the log's own, and entries, tiles and its root agree;
//   - every entry has the envelope that it is about;
//   - every checkpoint that was given out is signed and is of this tree, and each
//     record is proved to be in its own;
//   - the index is what follows from all that, when it is made again from nothing;
//   - every short-lived certificate was logged before it was used.
//
// An error means that it could not check. It needs about a minute and 200 MB per
// million records.
func Fsck(ctx context.Context, cfg Config) (Report, error) {
	cfg = cfg.withDefaults()
	key, err := newLogKey(cfg.Origin, cfg.LogKey)
	if err != nil {
		return Report{}, err
	}
	if _, err := os.Stat(cfg.database()); errors.Is(err, fs.ErrNotExist) {
		return Report{}, attest.Errorf(attest.NotInitialised, "%s holds no ledger", cfg.Dir)
	}
	unlock, err := lock(cfg.Dir)
	if err != nil {
		return Report{}, err
	}
	defer unlock()
	files, err := newLogFiles(cfg.logDir())
	if err != nil {
		return Report{}, err
	}
	x, err := openIndex(ctx, cfg.database(), "ro")
	if err != nil {
		return Report{}, unavailable("opening the database", err)
	}
	defer x.close()
	c := &checker{cfg: cfg, files: files, key: key, index: x, seen: map[attest.RecordID]bool{}, serials: map[string]bool{}}
	if err := c.run(ctx); err != nil {
		return Report{}, err
	}
	return c.report, nil
}

type checker struct {
	cfg     Config
	files   *logFiles
	key     *logKey
	index   *index
	report  Report
	seen    map[attest.RecordID]bool // leaves in the log
	serials map[string]bool          // of precertificates logged so far
}

func (c *checker) problem(format string, args ...any) {
	if len(c.report.Problems) < maxProblems {
		c.report.Problems = append(c.report.Problems, fmt.Sprintf(format, args...))
	}
}

func (c *checker) run(ctx context.Context) error {
	raw, err := c.files.checkpoint()
	if err != nil {
		return attest.Errorf(attest.LedgerUnavailable, "reading the checkpoint: %w", err)
	}
	cp, err := c.key.parse(raw)
	if err != nil {
		c.problem("checkpoint: %v", err)
		return nil
	}
	c.files.newest.Store(cp.size)
	c.report.Size = cp.size
	if err := c.log(ctx, cp); err != nil {
		return err
	}
	if err := c.counts(ctx); err != nil {
		return err
	}
	synced, err := c.index.meta(ctx, metaSynced)
	if err != nil {
		return err
	}
	if uint64(synced) > cp.size {
		c.problem("the index has taken in %d entries, the log has %d: the log was rolled back", synced, cp.size)
	}
	if len(c.report.Problems) > 0 {
		c.problem("the index was not compared: repair what stands above first")
		return nil
	}
	if err := c.derive(ctx, uint64(synced)); err != nil || len(c.report.Problems) > 0 {
		return err
	}
	return c.proofs(ctx)
}

// log walks the entries and rebuilds the tree over them.
func (c *checker) log(ctx context.Context, cp checkpoint) error {
	tree := treeFactory.NewEmptyRange(0)
	tiles := map[tileKey][]byte{} // rebuilt, not yet full
	visit := func(id compact.NodeID, hash []byte) {
		if id.Level%layout.TileHeight != 0 {
			return
		}
		k := tileKey{uint64(id.Level / layout.TileHeight), id.Index / layout.TileWidth}
		tiles[k] = append(tiles[k], hash...)
		if len(tiles[k]) == layout.TileWidth*len(hash) {
			c.tile(ctx, k, 0, tiles[k])
			delete(tiles, k)
		}
	}
	for i := uint64(0); i < cp.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		entries, err := c.files.entries(i/layout.EntryBundleWidth, cp.size)
		if err != nil {
			c.problem("entries from %d on: %v", i, err)
			return nil
		}
		for _, e := range entries {
			id := attest.LeafHash(e)
			if err := tree.Append(id[:], visit); err != nil {
				return err
			}
			if err := c.entry(ctx, i, id); err != nil {
				return err
			}
			i++
		}
	}
	for k, hashes := range tiles {
		c.tile(ctx, k, layout.PartialTileSize(k.level, k.index, cp.size), hashes)
	}
	if root, err := rootOf(tree); err != nil || !bytes.Equal(root, cp.root) {
		c.problem("the entries do not hash to the root that the checkpoint of size %d signs", cp.size)
	}
	return nil
}

// tile compares a hash tile with the one that the entries make.
func (c *checker) tile(ctx context.Context, k tileKey, p uint8, want []byte) {
	got, err := c.files.tile(ctx, k.level, k.index, p)
	if err != nil {
		c.problem("hash tile: %v", err)
	} else if !bytes.Equal(got[:len(want)], want) {
		c.problem("hash tile %s does not follow from the entries", layout.TilePath(k.level, k.index, p))
	}
}

// entry checks the envelope of one entry.
func (c *checker) entry(ctx context.Context, index uint64, id attest.RecordID) error {
	if c.seen[id] {
		return nil
	}
	c.seen[id] = true
	c.report.Records++
	e, _, _, err := c.index.envelope(ctx, id, index)
	if attest.ReasonOf(err) == attest.Internal {
		return err
	}
	if err != nil {
		c.problem("%v", err)
		return nil
	}
	facts, err := attest.Describe(e)
	if err != nil {
		c.problem("entry %d: %v", index, err)
		return nil
	}
	serial := facts.Get(attest.FacetSerial)
	switch {
	case facts.Kind == attest.KindPrecertificate:
		c.serials[serial] = true
	case len(e.Certificate) > 0 && !c.serials[serial]:
		c.problem("entry %d was signed with certificate %s, whose precertificate is not in the log before it", index, serial)
	}
	return nil
}

// counts compares what is stored with what is in the log.
func (c *checker) counts(ctx context.Context) error {
	var signers, expected, strangers int
	err := c.index.row(ctx, `SELECT (SELECT count(*) FROM envelopes), (SELECT count(*) FROM signers), (SELECT value FROM meta WHERE name = $1),
		(SELECT count(*) FROM envelopes e WHERE NOT EXISTS (SELECT 1 FROM records r WHERE r.leaf = e.leaf)
		 AND NOT EXISTS (SELECT 1 FROM unlogged u WHERE u.seq = e.seq AND u.leaf = e.leaf))`,
		[]any{metaSigners}, &c.report.Envelopes, &signers, &expected, &strangers)
	if err != nil {
		return unavailable("counting envelopes", err)
	}
	if signers != expected {
		c.problem("the database has %d certificates and keys, it stored %d", signers, expected)
	}
	if strangers > 0 {
		c.problem("the database has %d envelopes that no Append stored", strangers)
	}
	return unavailable("reading what the log lacks", c.index.each(ctx, `SELECT leaf FROM unlogged`, nil, func(scan func(...any) error) error {
		var leaf []byte
		if err := scan(&leaf); err != nil {
			return err
		}
		if len(leaf) == len(attest.RecordID{}) && !c.seen[attest.RecordID(leaf)] {
			c.report.Unlogged++
		}
		return nil
	}))
}

// derive makes the index again, elsewhere, and compares.
func (c *checker) derive(ctx context.Context, synced uint64) error {
	dir, err := os.MkdirTemp("", "hallmark-fsck-")
	if err != nil {
		return unavailable("making a directory for the second index", err)
	}
	defer os.RemoveAll(dir)
	again, err := openIndex(ctx, filepath.Join(dir, "again.db"), "rwc")
	if err != nil {
		return unavailable("making the second index", err)
	}
	defer again.close()
	if err := again.create(ctx); err != nil {
		return unavailable("making the second index", err)
	}
	d := &deriver{files: c.files, key: c.key, source: c.index, index: again, step: func(string) {}}
	if err := d.load(ctx); err != nil {
		return unavailable("making the second index", err)
	}
	for d.last.size < synced {
		to, err := d.next(ctx, checkpoint{size: synced})
		if err == nil && (to.note == nil || to.size > synced) {
			err = attest.Errorf(attest.LedgerIncomplete, "the checkpoint of size %d is missing: restore the database", synced)
		}
		if err == nil {
			_, _, err = d.advance(ctx, to, nil)
		}
		if attest.ReasonOf(err) == attest.Internal {
			return fmt.Errorf("making the second index: %w", err)
		}
		if err != nil {
			c.problem("%v", err)
			return nil
		}
	}
	return c.compare(ctx, again)
}

// comparisons are the derived tables, with how to name a row. unlogged is
// compared by counts.
var comparisons = []struct{ table, columns, name string }{
	{"meta", "name, value", "'the value of ' || name"},
	{"records", "*", "'record ' || idx"},
	{"terms", "*", "'the text ' || id"},
	{"facets", "*", "'a facet of record ' || idx"},
	{"requests", "*", "'the natural key of record ' || idx"},
	{"promotions", "*", "'promotion ' || idx"},
	{"stages", "*", "track || '/' || stage || ' of ' || repository"},
}

func (c *checker) compare(ctx context.Context, again *index) error {
	abs, err := filepath.Abs(c.cfg.database())
	if err != nil {
		return err
	}
	stored := (&url.URL{Scheme: "file", OmitHost: true, Path: abs, RawQuery: "mode=ro"}).String()
	return unavailable("comparing the index", again.update(ctx, func(t *txn) error {
		// Attaching a database is not possible within a transaction.
		for _, statement := range []string{"COMMIT", "ATTACH DATABASE '" + stored + "' AS stored", "BEGIN"} {
			if err := t.script(statement); err != nil {
				return err
			}
		}
		for _, x := range comparisons {
			where := ""
			if x.table == "meta" {
				where = fmt.Sprintf(" WHERE name IN ('%s', '%s', '%s', '%s')", metaSynced, metaPolicy, metaNewest, metaFacts)
			}
			for _, side := range []struct{ has, lacks, text string }{
				{"stored", "main", "is in the index, but does not follow from the log"},
				{"main", "stored", "follows from the log, but is not in the index"},
			} {
				query := fmt.Sprintf("SELECT %s FROM (SELECT %s FROM %s.%s%s EXCEPT SELECT %s FROM %s.%s%s) LIMIT 10",
					x.name, x.columns, side.has, x.table, where, x.columns, side.lacks, x.table, where)
				if err := c.differences(t, query, side.text); err != nil {
					return fmt.Errorf("table %s: %w", x.table, err)
				}
			}
		}
		return nil
	}))
}

func (c *checker) differences(t *txn, query, text string) error {
	rows, err := t.x.conn.QueryContext(t.ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return err
		}
		c.problem("%s %s: run rebuild", name, text)
	}
	return rows.Err()
}

// proofs proves each record in the checkpoint that was given out with it.
func (c *checker) proofs(ctx context.Context) error {
	var size uint64
	var indexes []uint64
	var leaves []attest.RecordID
	flush := func() error {
		if len(indexes) == 0 {
			return nil
		}
		cp, err := (&deriver{key: c.key, source: c.index}).stored(ctx, size)
		if err == nil {
			_, err = c.files.prove(ctx, cp, indexes, leaves)
		}
		if err != nil {
			c.problem("records %d to %d: %v", indexes[0], indexes[len(indexes)-1], err)
		}
		indexes, leaves = indexes[:0], leaves[:0]
		return nil
	}
	err := c.index.each(ctx, `SELECT idx, leaf, tree_size FROM records ORDER BY idx`, nil, func(scan func(...any) error) error {
		var index, of uint64
		var leaf []byte
		if err := scan(&index, &leaf, &of); err != nil {
			return err
		}
		if of != size || len(indexes) >= 1024 {
			if err := flush(); err != nil {
				return err
			}
		}
		size, indexes, leaves = of, append(indexes, index), append(leaves, attest.RecordID(leaf))
		return nil
	})
	if err != nil {
		return unavailable("reading records", err)
	}
	return flush()
}

// Rebuild makes the index again from the log, the envelopes and the checkpoints,
// which it leaves as they are, together with the tasks that are not done. When
// it is interrupted, the next Open goes on.
func Rebuild(ctx context.Context, cfg Config) error {
	cfg = cfg.withDefaults()
	if err := empty(ctx, cfg); err != nil {
		return err
	}
	cfg.Step("reset")
	// If the process dies here, the next Open does what follows.
	l, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	return errors.Join(l.Err(), l.Close(ctx))
}

// empty empties the index, if the log can fill it again.
func empty(ctx context.Context, cfg Config) error {
	l, err := lockAndOpen(ctx, cfg)
	if err != nil {
		return err
	}
	published, err := l.published()
	if err == nil {
		err = l.index.within(ctx, published.size)
	}
	if err == nil {
		err = unavailable("emptying the index", l.index.reset(ctx))
	}
	return errors.Join(err, l.abandon())
}
