package ledger

import (
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/hallmarkd/hallmark/attest"
)

// Get returns a record with an inclusion proof in its own checkpoint, the first
// one that covered it: the same bytes for ever. RECORD_NOT_FOUND.
func (l *Ledger) Get(ctx context.Context, id attest.RecordID) (attest.Record, error) {
	return l.get(ctx, `leaf = $1`, id[:], "record "+id.String())
}

// At returns the record at a log index. RECORD_NOT_FOUND, also for an entry that
// repeats an earlier one.
func (l *Ledger) At(ctx context.Context, index uint64) (attest.Record, error) {
	return l.get(ctx, `idx = $1`, int64(index), fmt.Sprintf("record %d", index))
}

func (l *Ledger) get(ctx context.Context, where string, arg any, name string) (attest.Record, error) {
	if err := l.ready(); err != nil {
		return attest.Record{}, err
	}
	var r attest.Record
	var leaf []byte
	var at int64
	err := l.index.row(ctx, `SELECT idx, leaf, time, tree_size FROM records WHERE `+where, []any{arg}, &r.Index, &leaf, &at, &r.TreeSize)
	if errors.Is(err, sql.ErrNoRows) || err == nil && len(leaf) != len(r.ID) {
		return attest.Record{}, attest.Errorf(attest.RecordNotFound, "there is no %s", name)
	}
	if err != nil {
		return attest.Record{}, unavailable("reading "+name, err)
	}
	r.ID = attest.RecordID(leaf)
	if err := l.complement(ctx, &r); err != nil {
		l.suspect(r.Index, err)
		return attest.Record{}, unavailable("reading "+name, err)
	}
	return r, nil
}

// complement reads the rest of a record: its envelope, which says what it is,
// and its place in the log. Nothing is taken from the index on trust.
func (l *Ledger) complement(ctx context.Context, r *attest.Record) (err error) {
	if r.Envelope, _, _, err = l.index.envelope(ctx, r.ID, r.Index); err != nil {
		return err
	}
	if r.Facts, err = attest.Describe(r.Envelope); err != nil {
		return attest.Errorf(attest.LedgerIncomplete, "the envelope of record %d cannot be read: restore the database: %w", r.Index, err)
	}
	cp, ok := l.checkpoints.Get(r.TreeSize)
	if !ok {
		if cp, err = l.state.stored(ctx, r.TreeSize); err != nil {
			return err
		}
		l.checkpoints.Add(r.TreeSize, cp)
	}
	proofs, err := l.files.prove(ctx, cp, []uint64{r.Index}, []attest.RecordID{r.ID})
	if err != nil {
		return err
	}
	r.Checkpoint, r.Proof = cp.note, proofs[0]
	return nil
}

// EnvelopeSize returns how many bytes the envelope of a record takes in memory, without
// reading it: what is stored says so at its beginning. RECORD_NOT_FOUND.
func (l *Ledger) EnvelopeSize(ctx context.Context, id attest.RecordID) (int64, error) {
	if err := l.ready(); err != nil {
		return 0, err
	}
	var head []byte
	err := l.index.row(ctx, `SELECT substr(content, 1, $1) FROM envelopes WHERE leaf = $2`, []any{zstd.HeaderMaxSize, id[:]}, &head)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, attest.Errorf(attest.RecordNotFound, "there is no record %s", id)
	}
	if err != nil {
		return 0, unavailable("reading the size of record "+id.String(), err)
	}
	var h zstd.Header
	if err := h.Decode(head); err != nil || !h.HasFCS || h.FrameContentSize > maxContent {
		return maxContent, nil // it cannot be more
	}
	return int64(h.FrameContentSize), nil
}

// ByKey returns the record that answers a request with this natural key, hex as
// in attest.Facts: the first one in the log, for a promotion the one that won
// and did not fail. After a failure the index may lack what the log has: then it
// waits for the index rather than say that there is none, or a repeated request
// would be recorded twice (attacks F09).
func (l *Ledger) ByKey(ctx context.Context, key string) (attest.RecordID, bool, error) {
	if err := l.ready(); err != nil {
		return attest.RecordID{}, false, err
	}
	raw, err := hex.DecodeString(key)
	if err != nil || len(raw) == 0 {
		return attest.RecordID{}, false, attest.Errorf(attest.BadRequest, "%q is not a natural key", clip(key))
	}
	failing := l.failing() // asked first: what recovers meanwhile is looked up again
	id, found, err := l.byKey(ctx, raw)
	if err != nil || found || !failing {
		return id, found, err
	}
	if err := l.settle(ctx); err != nil {
		return attest.RecordID{}, false, err
	}
	return l.byKey(ctx, raw)
}

// failing reports whether the last attempt to add to the log or to take it in went
// wrong.
func (l *Ledger) failing() bool {
	last := l.looked.Load()
	return l.recover.Load() || last != nil && *last != nil
}

func (l *Ledger) byKey(ctx context.Context, key []byte) (attest.RecordID, bool, error) {
	var leaf []byte
	err := l.index.row(ctx, `SELECT r.leaf FROM requests q JOIN records r ON r.idx = q.idx WHERE q.key = $1`, []any{key}, &leaf)
	if errors.Is(err, sql.ErrNoRows) || err == nil && len(leaf) != len(attest.RecordID{}) {
		return attest.RecordID{}, false, nil
	}
	if err != nil {
		return attest.RecordID{}, false, unavailable("looking for a request", err)
	}
	return attest.RecordID(leaf), true, nil
}

// Query selects records. Its zero value is all of them, the newest first.
type Query struct {
	Kind      attest.RecordKind // "": any
	Facets    []attest.Facet    // all of them must hold
	Before    uint64            // only records below this index; 0: no bound
	After     uint64            // only records above this index; 0: no bound
	Limit     int               // at most this many; 0: 100
	Ascending bool              // oldest first
}

// Meta is what a list says of a record.
type Meta struct {
	ID    attest.RecordID
	Index uint64
	attest.Facts
}

const (
	defaultLimit = 100
	maxLimit     = 1000
)

// Find returns the records that match, in log order, without reading any other:
// every facet is indexed. BAD_REQUEST for a limit above 1000.
func (l *Ledger) Find(ctx context.Context, q Query) ([]Meta, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	if q.Limit == 0 {
		q.Limit = defaultLimit
	}
	if q.Limit < 0 || q.Limit > maxLimit {
		return nil, attest.Errorf(attest.BadRequest, "limit %d: at most %d", q.Limit, maxLimit)
	}
	indexes, err := l.matches(ctx, q)
	if err != nil {
		return nil, unavailable("looking for records", err)
	}
	out := make([]Meta, len(indexes))
	for i, index := range indexes {
		if out[i], err = l.meta(ctx, index); err != nil {
			return nil, unavailable("reading a list", err)
		}
	}
	return out, nil
}

// matches returns the indexes of the records that Find returns.
func (l *Ledger) matches(ctx context.Context, q Query) ([]uint64, error) {
	terms, ok, err := l.terms(ctx, q.Facets)
	if err != nil || !ok {
		return nil, err
	}
	if q.Kind == "" && len(terms) == 0 {
		return l.indexes(ctx, q, `records t WHERE 1 = 1`)
	}
	// Facet rows are ordered by term, kind and index: each kind is one range.
	kinds, err := l.kinds(ctx, q.Kind)
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, kind := range kinds {
		from, args := `records t WHERE t.kind = $1`, []any{kind}
		if len(terms) > 0 {
			from, args = `facets t WHERE t.kind = $1 AND t.term = $2`, append(args, terms[0])
			for _, term := range terms[1:] {
				args = append(args, term)
				from += fmt.Sprintf(` AND EXISTS (SELECT 1 FROM facets o WHERE o.term = $%d AND o.kind = t.kind AND o.idx = t.idx)`, len(args))
			}
		}
		found, err := l.indexes(ctx, q, from, args...)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	slices.Sort(out)
	if !q.Ascending {
		slices.Reverse(out)
	}
	return out[:min(len(out), q.Limit)], nil
}

// indexes runs one range query with the bounds of q.
func (l *Ledger) indexes(ctx context.Context, q Query, from string, args ...any) ([]uint64, error) {
	bound := func(op string, v uint64) {
		if v > 0 {
			args = append(args, int64(min(v, 1<<62)))
			from += fmt.Sprintf(` AND t.idx %s $%d`, op, len(args))
		}
	}
	bound("<", q.Before)
	bound(">", q.After)
	order := "DESC"
	if q.Ascending {
		order = "ASC"
	}
	args = append(args, q.Limit)
	var out []uint64
	err := l.index.each(ctx, fmt.Sprintf(`SELECT t.idx FROM %s ORDER BY t.idx %s LIMIT $%d`, from, order, len(args)), args, func(scan func(...any) error) error {
		var index uint64
		err := scan(&index)
		out = append(out, index)
		return err
	})
	return out, err
}

// narrow orders facet names by how few records share a value of theirs: the
// first given one is read, the others are looked up.
var narrow = []string{
	attest.FacetSerial, attest.FacetPromotion, attest.FacetToken, attest.FacetTicket, attest.FacetRun, attest.FacetDigest,
	attest.FacetCommit, attest.FacetReason, attest.FacetBase, attest.FacetStage, attest.FacetRepository, attest.FacetCaller,
}

// terms returns the ids of facets, the narrowest first; false when no record has
// one of them.
func (l *Ledger) terms(ctx context.Context, facets []attest.Facet) ([]int64, bool, error) {
	rank := func(f attest.Facet) int {
		if i := slices.Index(narrow, f.Name); i >= 0 {
			return i
		}
		return len(narrow)
	}
	facets = slices.Clone(facets)
	slices.SortStableFunc(facets, func(a, b attest.Facet) int { return rank(a) - rank(b) })
	var out []int64
	for _, f := range facets {
		name, ok, err := l.index.lookup(ctx, termName, f.Name)
		if err != nil || !ok {
			return nil, false, err
		}
		id, ok, err := l.index.lookup(ctx, name, f.Value)
		if err != nil || !ok {
			return nil, false, err
		}
		out = append(out, id)
	}
	return out, true, nil
}

// allKinds are the kinds of record that there are.
var allKinds = []attest.RecordKind{
	attest.KindPrecertificate, attest.KindSignature, attest.KindProvenance, attest.KindVSA, attest.KindPromotion,
	attest.KindDenial, attest.KindEffect, attest.KindPolicy, attest.KindEvidence,
}

// kinds returns the terms of a kind, or of all kinds for "".
func (l *Ledger) kinds(ctx context.Context, kind attest.RecordKind) ([]int64, error) {
	list := []attest.RecordKind{kind}
	if kind == "" {
		list = allKinds
	}
	var out []int64
	for _, k := range list {
		id, ok, err := l.index.lookup(ctx, termName, string(k))
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, id)
		}
	}
	return out, nil
}

// meta reads what the index knows of a record.
func (l *Ledger) meta(ctx context.Context, index uint64) (Meta, error) {
	m := Meta{Index: index}
	var leaf, key, facets []byte
	var kind, at int64
	err := l.index.row(ctx, `SELECT leaf, kind, time, key, facets FROM records WHERE idx = $1`, []any{index}, &leaf, &kind, &at, &key, &facets)
	if err != nil {
		return Meta{}, fmt.Errorf("reading record %d: %w", index, err)
	}
	altered := attest.Errorf(attest.LedgerIncomplete, "the index row of record %d was altered: stop the service and run rebuild", index)
	if len(leaf) != len(m.ID) {
		return Meta{}, altered
	}
	name, err := l.index.text(ctx, kind)
	if err != nil {
		return Meta{}, err
	}
	m.ID, m.Kind, m.Time, m.Key = attest.RecordID(leaf), attest.RecordKind(name.value), time.Unix(at, 0).UTC(), hex.EncodeToString(key)
	for len(facets) > 0 {
		id, n := binary.Uvarint(facets)
		if n <= 0 {
			return Meta{}, altered
		}
		facets = facets[n:]
		value, err := l.index.text(ctx, int64(id))
		if err != nil {
			return Meta{}, err
		}
		if name, err = l.index.text(ctx, value.name); err != nil {
			return Meta{}, err
		}
		m.Facets = append(m.Facets, attest.Facet{Name: name.value, Value: value.value})
	}
	return m, nil
}

// Stage returns what a stage of a track holds for a repository, from memory. A
// stage that nothing was ever promoted to has no head.
func (l *Ledger) Stage(_ context.Context, track, stage string, repo attest.Repository) (StageState, error) {
	if err := l.ready(); err != nil {
		return StageState{}, err
	}
	l.state.mu.RLock()
	defer l.state.mu.RUnlock()
	return StageState{track, stage, repo, l.state.fold.heads[stageKey{track, stage, repo}]}, nil
}

// Stages returns the stages that were ever promoted to, ordered by track, stage
// and repository, beginning behind after (whose head does not matter; the zero
// value is the beginning). limit 0 is 100.
func (l *Ledger) Stages(ctx context.Context, after StageState, limit int) ([]StageState, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	var out []StageState
	err := l.index.each(ctx, `SELECT track, stage, repository FROM stages WHERE (track, stage, repository) > ($1, $2, $3)
		ORDER BY track, stage, repository LIMIT $4`, []any{after.Track, after.Stage, string(after.Repository), orDefault(limit)}, func(scan func(...any) error) error {
		var s StageState
		err := scan(&s.Track, &s.Stage, &s.Repository)
		out = append(out, s)
		return err
	})
	if err != nil {
		return nil, unavailable("reading stages", err)
	}
	l.state.mu.RLock()
	defer l.state.mu.RUnlock()
	for i, s := range out {
		out[i].Head = l.state.fold.heads[stageKey{s.Track, s.Stage, s.Repository}]
	}
	return out, nil
}

func orDefault(limit int) int {
	if limit <= 0 || limit > maxLimit {
		return defaultLimit
	}
	return limit
}

// Promotions returns the promotions of a stage for a repository, the newest
// first, with those that are VOID and FAILED. limit 0 is 100.
func (l *Ledger) Promotions(ctx context.Context, track, stage string, repo attest.Repository, limit int) ([]Promotion, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	var out []Promotion
	err := l.index.each(ctx, `SELECT `+promotionColumns+` FROM promotions WHERE track = $1 AND stage = $2 AND repository = $3
		ORDER BY idx DESC LIMIT $4`, []any{track, stage, string(repo), orDefault(limit)}, func(scan func(...any) error) error {
		p, err := scanPromotion(scan)
		if err == nil {
			out = append(out, *p)
		}
		return err
	})
	return out, unavailable("reading promotions", err)
}

// Promotion returns one promotion. RECORD_NOT_FOUND.
func (l *Ledger) Promotion(ctx context.Context, id attest.RecordID) (Promotion, error) {
	if err := l.ready(); err != nil {
		return Promotion{}, err
	}
	p, err := scanPromotion(func(into ...any) error {
		return l.index.row(ctx, `SELECT `+promotionColumns+` FROM promotions WHERE leaf = $1`, []any{id[:]}, into...)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return Promotion{}, attest.Errorf(attest.RecordNotFound, "there is no promotion %s", id)
	}
	if err != nil {
		return Promotion{}, unavailable("reading a promotion", err)
	}
	return *p, nil
}
