package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// How often the published checkpoint is looked at. Reading it costs one small
// file; a signature is verified only when it has changed.
const (
	lookWaiting = 4 * time.Millisecond   // while somebody waits for it
	lookTrouble = 100 * time.Millisecond // while everything is refused
	lookIdle    = time.Second
)

// broadcast lets many wait for the next event.
type broadcast struct {
	mu sync.Mutex
	c  chan struct{}
}

// next returns a channel that is closed at the next event.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c == nil {
		b.c = make(chan struct{})
	}
	return b.c
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c != nil {
		close(b.c)
		b.c = nil
	}
}

// source says who found a trouble, and so who may say that it is over.
type source int

const (
	fromSync source = iota
	fromCheck
	sources
)

// troubles holds why everything is refused.
type troubles struct {
	mu    sync.Mutex
	by    [sources]error
	first atomic.Pointer[error]
}

func (t *troubles) set(s source, err error) (changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	changed = (t.by[s] == nil) != (err == nil)
	t.by[s] = err
	t.first.Store(nil)
	for _, e := range t.by {
		if e != nil {
			t.first.Store(&e)
			break
		}
	}
	return changed
}

func (t *troubles) get() error {
	if p := t.first.Load(); p != nil {
		return *p
	}
	return nil
}

// syncLoop takes in new checkpoints.
func (l *Ledger) syncLoop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-l.kick:
		case <-timer.C:
		}
		l.look(l.ctx)
		wait := lookIdle
		switch {
		case l.trouble.get() != nil:
			wait = lookTrouble
		case l.waiting.Load() > 0 || l.line.underway() > 0:
			wait = lookWaiting
		}
		timer.Reset(wait)
	}
}

// look runs sync once and judges its error: one that says the ledger is not
// whole refuses everything until it is; one of the disk is answered to those who
// wait, who may repeat.
func (l *Ledger) look(ctx context.Context) {
	err := l.sync(ctx)
	l.looked.Store(&err)
	defer l.moved.send()
	switch attest.ReasonOf(err) {
	case "":
		if l.trouble.set(fromSync, nil) {
			l.log.Info("the ledger is whole again", "size", l.Size())
		}
	case attest.LedgerIncomplete, attest.LedgerBehind, attest.CheckpointInvalid, attest.IdentityChanged:
		if l.trouble.set(fromSync, err) {
			l.log.Error("the ledger refuses everything", "error", err)
		}
		l.line.fail(err)
	default:
		if ctx.Err() != nil {
			return
		}
		l.log.Error("taking in the log", "error", err)
		l.line.fail(attest.Errorf(attest.LedgerUnavailable, "taking in the log: %w", err))
	}
}

// sync takes in everything that the log has published: the only way anything
// enters the index. It is idempotent; after a crash, the next sync is the repair.
func (l *Ledger) sync(ctx context.Context) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	published, err := l.published()
	if err != nil {
		return err
	}
	if l.state.dirty {
		if err := l.state.load(ctx); err != nil {
			return err
		}
	}
	if published.size < l.state.last.size {
		return behind(published.size, l.state.last.size)
	}
	for l.state.last.size < published.size {
		to, err := l.state.next(ctx, published)
		if err != nil {
			return err
		}
		batch, step, err := l.state.advance(ctx, to, l.line.find)
		if err != nil {
			return err
		}
		l.answer(batch, to, len(step.won) > 0)
	}
	return nil
}

// answer ends the flights of records that were taken in.
func (l *Ledger) answer(batch []*derived, to checkpoint, tasks bool) {
	for _, r := range batch {
		tasks = tasks || r.attach
		f := l.line.find(r.id)
		if f == nil {
			continue
		}
		l.line.end(f, func(f *flight) { f.index, f.covered, f.known = r.index, to, r.duplicate })
	}
	if tasks {
		signal(l.wake)
	}
}

// published reads and verifies the log's published checkpoint.
func (l *Ledger) published() (checkpoint, error) {
	raw, err := l.files.checkpoint()
	if errors.Is(err, fs.ErrNotExist) {
		return checkpoint{}, attest.Errorf(attest.LedgerBehind, "%s has no checkpoint: the log is gone, restore its directory", l.cfg.logDir())
	}
	if err != nil {
		return checkpoint{}, attest.Errorf(attest.LedgerUnavailable, "reading the checkpoint: %w", err)
	}
	if l.raw != nil && bytes.Equal(raw, l.raw) {
		return l.head, nil
	}
	cp, err := l.state.key.parse(raw)
	if err != nil {
		return checkpoint{}, err
	}
	l.raw, l.head = raw, cp
	l.files.newest.Store(cp.size)
	return cp, nil
}

// settleLimit is how long the log may take to publish what it has integrated.
const settleLimit = 20 * time.Second

// settle waits until everything that the log has integrated is in the index.
func (l *Ledger) settle(ctx context.Context) error {
	l.waiting.Add(1)
	defer l.waiting.Add(-1)
	ctx, cancel := context.WithTimeoutCause(ctx, settleLimit, errors.New("it publishes no checkpoint"))
	defer cancel()
	size, err := l.integrated(ctx)
	if err != nil {
		return unavailable("reading the log's size", err)
	}
	for {
		moved := l.moved.next()
		if err := l.trouble.get(); err != nil {
			return err
		}
		if l.Size() >= size {
			return nil
		}
		signal(l.kick)
		select {
		case <-moved:
			if err := *l.looked.Load(); err != nil {
				return unavailable("taking in the log", err)
			}
		case <-ctx.Done():
			return attest.Errorf(attest.LedgerUnavailable, "waiting for the log: %w", context.Cause(ctx))
		case <-l.ctx.Done():
			return attest.Errorf(attest.ShuttingDown, "the ledger is closed: repeat the request")
		}
	}
}

// scrubRecords is how many records each check reads back. Counting finds that
// an envelope is missing within one interval; this finds in time that one was
// exchanged for another.
const scrubRecords = 200

// checkLoop looks for envelopes that were deleted or altered behind our back
// (attacks K09).
func (l *Ledger) checkLoop() {
	wait := l.cfg.CheckInterval
	if l.trouble.get() != nil {
		wait = lookTrouble
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-l.check:
		case <-timer.C:
		}
		start := time.Now()
		err := l.inspect(l.ctx)
		if l.ctx.Err() != nil {
			return
		}
		if attest.ReasonOf(err) == attest.Internal {
			l.log.Error("checking the envelopes", "error", err)
			err = nil
		}
		if l.trouble.set(fromCheck, err) {
			l.log.Info("the envelopes were checked", "error", err)
		}
		wait := max(l.cfg.CheckInterval, 50*time.Since(start)) // at most 2% of the time
		if err != nil {
			wait = lookTrouble
		}
		timer.Reset(wait)
	}
}

// inspect returns LEDGER_INCOMPLETE when a record has no envelope or another one.
func (l *Ledger) inspect(ctx context.Context) error {
	l.scrub.Lock()
	defer l.scrub.Unlock()
	// 1. Those that were found before.
	for index := range l.suspects {
		if _, err := l.intact(ctx, index, 1); err != nil {
			return err
		}
		delete(l.suspects, index)
	}
	// 2. There are as many envelopes as records and entries to be. One statement,
	// so that all is counted at one moment.
	var envelopes, records, unlogged, signers, expected int64
	err := l.index.row(ctx, `SELECT (SELECT count(*) FROM envelopes), (SELECT count(*) FROM records), (SELECT count(*) FROM unlogged),
		(SELECT count(*) FROM signers), (SELECT value FROM meta WHERE name = $1)`, []any{metaSigners}, &envelopes, &records, &unlogged, &signers, &expected)
	if err != nil {
		return fmt.Errorf("counting envelopes: %w", err)
	}
	if envelopes < records+unlogged || signers < expected {
		return l.missing(ctx, records+unlogged-envelopes, expected-signers)
	}
	// 3. A few more records are what they were.
	next, err := l.intact(ctx, l.scrubbed, scrubRecords)
	if err != nil {
		l.suspects[next] = struct{}{}
		return err
	}
	l.scrubbed = next
	return nil
}

// missing names an envelope that is gone. It reads everything, once.
func (l *Ledger) missing(ctx context.Context, envelopes, signers int64) error {
	var index uint64
	err := l.index.row(ctx, `SELECT r.idx FROM records r LEFT JOIN envelopes e ON e.leaf = r.leaf LEFT JOIN signers s ON s.id = e.signer
		WHERE s.id IS NULL ORDER BY r.idx LIMIT 1`, nil, &index)
	if errors.Is(err, sql.ErrNoRows) {
		return attest.Errorf(attest.LedgerIncomplete, "the database lacks %d envelopes and %d certificates that are not in the log yet: restore it; everything is refused until then", envelopes, signers)
	}
	if err != nil {
		return fmt.Errorf("looking for the missing envelope: %w", err)
	}
	l.suspects[index] = struct{}{}
	_, err = l.intact(ctx, index, 1)
	return err
}

// intact reads back the envelopes of records from an index on, and returns the
// index to go on at, or that of the one which is not what it was.
func (l *Ledger) intact(ctx context.Context, from uint64, limit int) (uint64, error) {
	type row struct {
		index uint64
		leaf  []byte
	}
	var rows []row
	err := l.index.each(ctx, `SELECT idx, leaf FROM records WHERE idx >= $1 ORDER BY idx LIMIT $2`, []any{from, limit}, func(scan func(...any) error) error {
		var r row
		err := scan(&r.index, &r.leaf)
		rows = append(rows, r)
		return err
	})
	if err != nil {
		return from, fmt.Errorf("reading records: %w", err)
	}
	for _, r := range rows {
		if len(r.leaf) != len(attest.RecordID{}) {
			return r.index, attest.Errorf(attest.LedgerIncomplete, "the index row of record %d was altered: stop the service and run rebuild", r.index)
		}
		if _, _, _, err := l.index.envelope(ctx, attest.RecordID(r.leaf), r.index); err != nil {
			return r.index, err
		}
	}
	if len(rows) < limit {
		return 0, nil
	}
	return rows[len(rows)-1].index + 1, nil
}

// suspect refuses everything because of what was found at a record.
func (l *Ledger) suspect(index uint64, err error) {
	if attest.ReasonOf(err) != attest.LedgerIncomplete {
		return
	}
	l.scrub.Lock()
	l.suspects[index] = struct{}{}
	l.scrub.Unlock()
	if l.trouble.set(fromCheck, err) {
		l.log.Error("the ledger refuses everything", "error", err)
	}
	signal(l.check)
}
