package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	lru "github.com/hashicorp/golang-lru/v2"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

// schemaVersion is that of the tables below.
const schemaVersion = 1

// primaryTables hold what exists nowhere else. The log proves an envelope, it
// does not contain it; a checkpoint's signature is random, so the one that was
// handed out cannot be made again. A rebuild never touches these. Only the
// table definitions are SQLite's; every statement elsewhere is PostgreSQL's too.
const primaryTables = `
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;

-- Certificates and public keys, each once: the statements of a signing share one.
CREATE TABLE signers (id BLOB PRIMARY KEY, packing INTEGER NOT NULL, der BLOB NOT NULL);

-- seq is the order of storing, which is the order in which they enter the log.
-- content holds the rest of the envelope, see pack.go.
CREATE TABLE envelopes (
	seq INTEGER PRIMARY KEY, leaf BLOB NOT NULL UNIQUE, signer BLOB NOT NULL, certified INTEGER NOT NULL,
	attach INTEGER NOT NULL, packing INTEGER NOT NULL, content BLOB NOT NULL);

CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, note BLOB NOT NULL);

-- Work outside this process that a record asks for; a row goes when it is done.
CREATE TABLE tasks (
	kind TEXT NOT NULL, leaf BLOB NOT NULL, repository TEXT NOT NULL, digest BLOB NOT NULL,
	attempts INTEGER NOT NULL, not_before INTEGER NOT NULL, last_error TEXT NOT NULL,
	PRIMARY KEY (leaf, kind, repository, digest)) WITHOUT ROWID;
CREATE INDEX tasks_due ON tasks (not_before);
`

// derivedTables are a pure function of the log, the envelopes and the
// checkpoints. sync fills them, rebuild empties them, fsck compares them.
const derivedTables = `
-- Envelopes that are stored and that sync has not seen in the log.
CREATE TABLE unlogged (seq INTEGER PRIMARY KEY, leaf BLOB NOT NULL);

-- tree_size names the first checkpoint that covers the record; facets lists
-- terms as varints, in the order of the facets.
CREATE TABLE records (
	idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL UNIQUE, kind INTEGER NOT NULL, time INTEGER NOT NULL,
	key BLOB, tree_size INTEGER NOT NULL, facets BLOB NOT NULL);
CREATE INDEX records_kind ON records (kind, idx);

-- Every text that records are found by, once. name is the term that names the
-- facet; names and kinds are themselves terms under name 0.
CREATE TABLE terms (id INTEGER PRIMARY KEY, name INTEGER NOT NULL, value TEXT NOT NULL, UNIQUE (name, value));
CREATE TABLE facets (term INTEGER NOT NULL, kind INTEGER NOT NULL, idx INTEGER NOT NULL, PRIMARY KEY (term, kind, idx)) WITHOUT ROWID;

-- Natural key -> the record that answers it.
CREATE TABLE requests (key BLOB PRIMARY KEY, idx INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE promotions (
	idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL UNIQUE, track TEXT NOT NULL, stage TEXT NOT NULL, repository TEXT NOT NULL,
	digest BLOB NOT NULL, digests BLOB NOT NULL, stage_digest BLOB NOT NULL, replaces BLOB NOT NULL, target TEXT NOT NULL,
	key BLOB NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL, time INTEGER NOT NULL, since INTEGER NOT NULL);
CREATE INDEX promotions_stage ON promotions (track, stage, repository, idx);
CREATE TABLE stages (
	track TEXT NOT NULL, stage TEXT NOT NULL, repository TEXT NOT NULL, head BLOB NOT NULL,
	PRIMARY KEY (track, stage, repository)) WITHOUT ROWID;
`

// derivedNames are the tables of derivedTables.
var derivedNames = []string{"unlogged", "records", "terms", "facets", "requests", "promotions", "stages"}

// Names in the table meta.
const (
	metaSchema  = "schema"        // schemaVersion
	metaFacts   = "facts_version" // attest.FactsVersion the derived tables were made by
	metaSynced  = "synced"        // log entries that sync has processed
	metaPolicy  = "policy"        // 1 + index of the policy record in force; 0: none
	metaNewest  = "newest"        // newest record time, Unix seconds
	metaTasked  = "tasked"        // entries below have had their tasks made, and survive a rebuild
	metaSigners = "signers"       // rows in signers
)

// termName is the name of terms that name facets and kinds.
const termName = 0

type term struct {
	name  int64
	value string
}

// index is the database: one connection that writes, many that read.
type index struct {
	packer   *packer
	reads    *sql.DB
	prepared sync.Map // query text -> *sql.Stmt of reads
	terms    *lru.Cache[term, int64]
	values   *lru.Cache[int64, term]

	mu       sync.Mutex // held for a write transaction; guards what follows
	writes   *sql.DB
	conn     *sql.Conn // nil when opened for reading only
	stmts    map[string]*sql.Stmt
	nextTerm int64
	nextSeq  int64
}

// openIndex opens the database at path. mode is rwc, rw or ro (SQLite's URI
// parameter). It is durable after each commit.
func openIndex(ctx context.Context, path, mode string) (*index, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("finding %s: %w", path, err)
	}
	dsn := func(more ...string) string {
		q := url.Values{"mode": {mode}, "_pragma": append([]string{"busy_timeout(10000)", "synchronous(FULL)"}, more...)}
		return (&url.URL{Scheme: "file", OmitHost: true, Path: abs, RawQuery: q.Encode()}).String()
	}
	x := &index{stmts: map[string]*sql.Stmt{}}
	if x.terms, err = lru.New[term, int64](1 << 15); err != nil {
		return nil, err
	}
	if x.values, err = lru.New[int64, term](1 << 13); err != nil {
		return nil, err
	}
	if x.packer, err = newPacker(); err != nil {
		return nil, err
	}
	if mode != "ro" {
		// The log of SQLite is cut to this size after a checkpoint, so that one
		// large transaction does not keep its space for ever.
		if x.writes, err = sql.Open("sqlite", dsn("journal_mode(WAL)", "journal_size_limit(16777216)")); err != nil {
			x.close()
			return nil, err
		}
		if x.conn, err = x.writes.Conn(ctx); err != nil {
			x.close()
			return nil, fmt.Errorf("opening %s: %w", path, err)
		}
	}
	if x.reads, err = sql.Open("sqlite", dsn("query_only(1)")); err != nil {
		x.close()
		return nil, err
	}
	x.reads.SetMaxOpenConns(4 + 2*runtime.NumCPU())
	x.reads.SetMaxIdleConns(4 + 2*runtime.NumCPU())
	if err := x.reads.PingContext(ctx); err != nil {
		x.close()
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	return x, nil
}

func (x *index) close() error {
	var errs []error
	x.mu.Lock()
	defer x.mu.Unlock()
	x.packer.close()
	if x.reads != nil {
		errs = append(errs, x.reads.Close())
	}
	for _, s := range x.stmts {
		errs = append(errs, s.Close())
	}
	if x.conn != nil {
		errs = append(errs, x.conn.Close())
	}
	if x.writes != nil {
		errs = append(errs, x.writes.Close()) // moves SQLite's own log into the database
	}
	return errors.Join(errs...)
}

// create makes all tables in one transaction: they are all there, or none is.
func (x *index) create(ctx context.Context) error {
	return x.update(ctx, func(t *txn) error {
		if err := t.script(primaryTables + derivedTables); err != nil {
			return err
		}
		for _, name := range []string{metaSynced, metaPolicy, metaNewest, metaTasked, metaSigners} {
			if err := t.set(name, 0); err != nil {
				return err
			}
		}
		if err := t.set(metaFacts, factsVersion); err != nil {
			return err
		}
		return t.set(metaSchema, schemaVersion)
	})
}

// created reports whether create has run.
func (x *index) created(ctx context.Context) (bool, error) {
	var n int
	err := x.reads.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_master WHERE name = 'meta'`).Scan(&n)
	return n > 0, err
}

// reset empties the derived tables in one transaction, so that sync starts from
// entry 0. Every stored envelope counts as unlogged until sync finds it.
func (x *index) reset(ctx context.Context) error {
	defer x.forget()
	return x.update(ctx, func(t *txn) error {
		for _, name := range derivedNames {
			if _, err := t.exec("DROP TABLE IF EXISTS " + name); err != nil {
				return err
			}
		}
		if err := t.script(derivedTables); err != nil {
			return err
		}
		if _, err := t.exec(`INSERT INTO unlogged (seq, leaf) SELECT seq, leaf FROM envelopes`); err != nil {
			return err
		}
		for name, v := range map[string]int64{metaSynced: 0, metaPolicy: 0, metaNewest: 0, metaFacts: factsVersion} {
			if err := t.set(name, v); err != nil {
				return err
			}
		}
		return nil
	})
}

// forget drops what is remembered of the terms.
func (x *index) forget() {
	x.terms.Purge()
	x.values.Purge()
	x.mu.Lock()
	x.nextTerm, x.nextSeq = 0, 0
	x.mu.Unlock()
}

// meta returns a value of the table meta.
func (x *index) meta(ctx context.Context, name string) (int64, error) {
	var v int64
	err := x.row(ctx, `SELECT value FROM meta WHERE name = $1`, []any{name}, &v)
	if err != nil {
		return 0, fmt.Errorf("reading %s from the index: %w", name, err)
	}
	return v, nil
}

// stmt returns a prepared statement for reading.
func (x *index) stmt(ctx context.Context, query string) (*sql.Stmt, error) {
	if s, ok := x.prepared.Load(query); ok {
		return s.(*sql.Stmt), nil
	}
	s, err := x.reads.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	if old, ok := x.prepared.LoadOrStore(query, s); ok {
		s.Close()
		return old.(*sql.Stmt), nil
	}
	return s, nil
}

// row reads one row; sql.ErrNoRows when there is none.
func (x *index) row(ctx context.Context, query string, args []any, into ...any) error {
	s, err := x.stmt(ctx, query)
	if err != nil {
		return err
	}
	return s.QueryRowContext(ctx, args...).Scan(into...)
}

// each calls do for every row.
func (x *index) each(ctx context.Context, query string, args []any, do func(scan func(...any) error) error) error {
	s, err := x.stmt(ctx, query)
	if err != nil {
		return err
	}
	rows, err := s.QueryContext(ctx, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := do(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// txn is the one open write transaction.
type txn struct {
	x     *index
	ctx   context.Context
	fresh map[term]int64 // terms made in this transaction
	next  int64          // term id
	seq   int64          // envelope
}

// update runs do in a transaction, which is durable when update returns nil.
// When it returns an error the transaction may still have become durable (the
// disk can fail after the write and before the answer): callers must be able to
// repeat it.
func (x *index) update(ctx context.Context, do func(*txn) error) (err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	// Cancelling half a transaction would gain nothing, and a context that
	// cannot be cancelled spares the driver a watcher for each statement.
	t := &txn{x: x, ctx: context.WithoutCancel(ctx), fresh: map[term]int64{}, next: x.nextTerm, seq: x.nextSeq}
	if _, err := t.exec("BEGIN"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_, e := t.exec("ROLLBACK")
			_ = e // there is none when the commit itself failed
		}
	}()
	if err := do(t); err != nil {
		return err
	}
	if _, err := t.exec("COMMIT"); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	x.nextTerm, x.nextSeq = t.next, t.seq
	for k, id := range t.fresh {
		x.terms.Add(k, id)
	}
	return nil
}

func (t *txn) stmt(query string) (*sql.Stmt, error) {
	if s, ok := t.x.stmts[query]; ok {
		return s, nil
	}
	s, err := t.x.conn.PrepareContext(t.ctx, query)
	if err != nil {
		return nil, err
	}
	t.x.stmts[query] = s
	return s, nil
}

// exec runs a statement and returns the number of rows it changed.
func (t *txn) exec(query string, args ...any) (int64, error) {
	s, err := t.stmt(query)
	if err != nil {
		return 0, err
	}
	r, err := s.ExecContext(t.ctx, args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

// script runs table definitions, which are not worth preparing.
func (t *txn) script(text string) error {
	_, err := t.x.conn.ExecContext(t.ctx, text)
	return err
}

func (t *txn) row(query string, args []any, into ...any) error {
	s, err := t.stmt(query)
	if err != nil {
		return err
	}
	return s.QueryRowContext(t.ctx, args...).Scan(into...)
}

func (t *txn) set(name string, value int64) error {
	_, err := t.exec(`INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
	return err
}

// bulk inserts rows of cols values each, many per statement: a statement costs
// more than a row. head ends with VALUES.
func (t *txn) bulk(head string, cols int, tail string, values []any) error {
	for _, rows := range []int{64, 8, 1} {
		query := ""
		for len(values) >= rows*cols {
			if query == "" {
				query = head + placeholders(rows, cols) + tail
			}
			if _, err := t.exec(query, values[:rows*cols]...); err != nil {
				return err
			}
			values = values[rows*cols:]
		}
	}
	return nil
}

// placeholders returns "($1,$2),($3,$4)" for two rows of two columns.
func placeholders(rows, cols int) string {
	var b strings.Builder
	for i := range rows * cols {
		switch {
		case i == 0:
			b.WriteByte('(')
		case i%cols == 0:
			b.WriteString("),(")
		default:
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "$%d", i+1)
	}
	return b.String() + ")"
}

// term returns the id of a text, and makes one when it is new. Ids are given in
// the order of the log, so that a rebuild gives the same ones.
func (t *txn) term(name int64, value string) (int64, error) {
	k := term{name, value}
	if id, ok := t.fresh[k]; ok {
		return id, nil
	}
	if id, ok := t.x.terms.Get(k); ok {
		return id, nil
	}
	if t.next == 0 {
		if err := t.row(`SELECT coalesce(max(id), 0) + 1 FROM terms`, nil, &t.next); err != nil {
			return 0, err
		}
	}
	n, err := t.exec(`INSERT INTO terms (id, name, value) VALUES ($1, $2, $3) ON CONFLICT (name, value) DO NOTHING`, t.next, name, value)
	if err != nil {
		return 0, err
	}
	id := t.next
	if n == 0 {
		if err := t.row(`SELECT id FROM terms WHERE name = $1 AND value = $2`, []any{name, value}, &id); err != nil {
			return 0, err
		}
	} else {
		t.next++
	}
	t.fresh[k] = id
	return id, nil
}

// lookup returns the id of a text, if any record has it.
func (x *index) lookup(ctx context.Context, name int64, value string) (int64, bool, error) {
	k := term{name, value}
	if id, ok := x.terms.Get(k); ok {
		return id, true, nil
	}
	var id int64
	err := x.row(ctx, `SELECT id FROM terms WHERE name = $1 AND value = $2`, []any{name, value}, &id)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	x.terms.Add(k, id)
	return id, true, nil
}

// text is the inverse of lookup.
func (x *index) text(ctx context.Context, id int64) (term, error) {
	if v, ok := x.values.Get(id); ok {
		return v, nil
	}
	var v term
	if err := x.row(ctx, `SELECT name, value FROM terms WHERE id = $1`, []any{id}, &v.name, &v.value); err != nil {
		return term{}, fmt.Errorf("reading term %d: %w", id, err)
	}
	x.values.Add(id, v)
	return v, nil
}
