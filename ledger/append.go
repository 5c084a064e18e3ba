package ledger

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/transparency-dev/tessera"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	// groupEntries is how many entries are stored in one transaction and given to
	// the log as one batch, and so the most that one Append may have.
	groupEntries = 256
	// lineLength is how many Appends may wait to be stored.
	lineLength = 1024
	// maxEntry is the size of the largest log entry (C2SP tlog-tiles: a 16-bit
	// length stands before each entry of a bundle).
	maxEntry = 65535
)

// Entry is an envelope to be recorded.
type Entry struct {
	attest.Envelope
	Attach bool // make a task per subject that attaches the record's bundle to it
}

// flight is an envelope on its way to becoming a record. Appends of the same
// envelope share one flight.
type flight struct {
	entry Entry
	id    attest.RecordID
	body  []byte // log entry
	facts attest.Facts
	seq   int64 // owned by the writer until done is closed

	signer  attest.Digest // names der
	der     []byte        // certificate or public key, packed
	content []byte        // the rest of the envelope, packed

	// Set before done is closed.
	done    chan struct{}
	index   uint64
	covered checkpoint
	known   bool // it was a record before; read it
	err     error
}

// request is one Append in the line: the flights that it starts, in order, and
// those of others that it relies on, which stand in the line before it.
type request struct {
	own  []*flight
	deps []*flight
}

// queue is the line of Appends before the writer, and every flight under way.
type queue struct {
	slots   chan struct{} // bounds the line
	drained chan struct{} // closed when it is closed and nothing is under way
	added   chan struct{} // the line is not empty, or it was closed
	closed  atomic.Bool

	mu      sync.Mutex
	line    []*request
	flights map[attest.RecordID]*flight
}

func (q *queue) init() {
	q.slots, q.drained = make(chan struct{}, lineLength), make(chan struct{})
	q.added, q.flights = make(chan struct{}, 1), map[attest.RecordID]*flight{}
}

// close refuses new Appends; false when that was done before.
func (q *queue) close() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed.Swap(true) {
		return false
	}
	q.drain()
	signal(q.added)
	return true
}

// drain closes drained when it is time. q.mu is held.
func (q *queue) drain() {
	if q.closed.Load() && len(q.flights) == 0 {
		select {
		case <-q.drained:
		default:
			close(q.drained)
		}
	}
}

// signal leaves a value in a channel of length one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// join puts flights for the prepared envelopes into the line, as one request,
// and returns for each the flight that will answer: its own, or one that is
// under way already. The order of the line is the order of the log, so a flight
// that is joined here is in the log before those that rely on it.
func (q *queue) join(prepared []*flight) ([]*flight, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed.Load() {
		<-q.slots
		return nil, attest.Errorf(attest.ShuttingDown, "the ledger is closed: repeat the request")
	}
	r := &request{}
	out := make([]*flight, len(prepared))
	for i, f := range prepared {
		if other, ok := q.flights[f.id]; ok {
			out[i] = other
			r.deps = append(r.deps, other)
			continue
		}
		out[i] = f
		q.flights[f.id] = f
		r.own = append(r.own, f)
	}
	if len(r.own) > 0 {
		q.line = append(q.line, r)
		signal(q.added)
	} else {
		<-q.slots // nothing to store
	}
	return out, nil
}

// take returns the next requests, at most groupEntries entries of them.
func (q *queue) take() (group []*request, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for len(q.line) > 0 && n+len(q.line[0].own) <= groupEntries {
		n += len(q.line[0].own)
		group = append(group, q.line[0])
		q.line = q.line[1:]
		<-q.slots
	}
	return group, q.closed.Load()
}

// find returns the flight of a leaf, nil when there is none.
func (q *queue) find(id attest.RecordID) *flight {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.flights[id]
}

// end answers a flight by way of set, unless it was answered before.
func (q *queue) end(f *flight, set func(*flight)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.flights[f.id] != f {
		return
	}
	delete(q.flights, f.id)
	set(f)
	close(f.done)
	q.drain()
}

// fail answers every flight with err.
func (q *queue) fail(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for id, f := range q.flights {
		delete(q.flights, id)
		f.err = err
		close(f.done)
	}
	q.drain()
}

// underway is the number of flights.
func (q *queue) underway() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.flights)
}

// Append records envelopes, in this order in the log and all in one transaction,
// and returns their records with proofs. When it returns, each is durable,
// covered by a published checkpoint and in the index: a signature must not leave
// the process before that. An envelope that is a record already, or is being
// recorded by another call, is not added again; its record is returned.
//
// TOO_LARGE for more than 256 envelopes or one whose log entry is above the
// log's limit, BAD_REQUEST for one that cannot be read back: nothing was stored.
// LEDGER_UNAVAILABLE when the disk failed or ctx ended: it may become a record
// nevertheless, and the same Append repeated returns it.
func (l *Ledger) Append(ctx context.Context, entries ...Entry) ([]attest.Record, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, nil
	}
	prepared, err := l.index.packer.prepare(entries)
	if err != nil {
		return nil, err
	}
	select {
	case l.line.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, attest.Errorf(attest.LedgerUnavailable, "waiting to be stored: %w", ctx.Err())
	}
	flights, err := l.line.join(prepared)
	if err != nil {
		return nil, err
	}
	for _, f := range flights {
		select {
		case <-f.done:
			if f.err != nil {
				return nil, f.err
			}
		case <-ctx.Done():
			// The flight goes on: who repeats the request finds its record.
			return nil, attest.Errorf(attest.LedgerUnavailable, "waiting for the log: %w", ctx.Err())
		}
	}
	return l.landed(ctx, flights)
}

// prepare does, outside the writer, all that depends on the envelopes alone, and
// refuses those that sync could not take in: it would stop there for ever.
func (p *packer) prepare(entries []Entry) ([]*flight, error) {
	if len(entries) > groupEntries {
		return nil, attest.Errorf(attest.TooLarge, "%d envelopes in one request: at most %d", len(entries), groupEntries)
	}
	out := make([]*flight, len(entries))
	for i, e := range entries {
		body := e.LogEntry()
		if len(body) > maxEntry {
			return nil, attest.Errorf(attest.TooLarge, "the log entry of envelope %d has %d bytes: at most %d", i, len(body), maxEntry)
		}
		if n := len(e.Payload) + len(e.Signature) + len(e.Timestamp); n > maxContent-1024 {
			return nil, attest.Errorf(attest.TooLarge, "envelope %d has %d bytes: at most %d", i, n, maxContent-1024)
		}
		if len(e.Certificate) == 0 == (len(e.PublicKey) == 0) {
			return nil, attest.Errorf(attest.BadRequest, "envelope %d needs either a certificate or a public key", i)
		}
		facts, err := attest.Describe(e.Envelope)
		if err != nil {
			return nil, attest.Errorf(attest.BadRequest, "envelope %d cannot be read: %w", i, err)
		}
		der := e.PublicKey
		if len(e.Certificate) > 0 {
			der = e.Certificate
		}
		out[i] = &flight{
			entry: e, id: attest.LeafHash(body), body: body, facts: facts, done: make(chan struct{}),
			signer: attest.Hash(der), der: p.pack(der), content: p.packEnvelope(e.Envelope),
		}
		nothing := func(attest.RecordID) (*Promotion, error) { return nil, nil }
		if err := newFold().step(nothing).apply(out[i].id, 0, facts, e.Envelope); err != nil {
			return nil, attest.Errorf(attest.BadRequest, "envelope %d cannot be read: %w", i, err)
		}
	}
	return out, nil
}

// landed returns the records of flights that have ended well.
func (l *Ledger) landed(ctx context.Context, flights []*flight) ([]attest.Record, error) {
	out := make([]attest.Record, len(flights))
	byTree := map[uint64][]int{} // tree size -> positions, to share the reading of tiles
	for i, f := range flights {
		if f.known {
			r, err := l.Get(ctx, f.id)
			if err != nil {
				return nil, err
			}
			out[i] = r
			continue
		}
		out[i] = attest.Record{
			Envelope: f.entry.Envelope, Facts: f.facts, ID: f.id,
			Index: f.index, TreeSize: f.covered.size, Checkpoint: f.covered.note,
		}
		byTree[f.covered.size] = append(byTree[f.covered.size], i)
	}
	for _, at := range byTree {
		indexes, leaves := make([]uint64, len(at)), make([]attest.RecordID, len(at))
		for j, i := range at {
			indexes[j], leaves[j] = out[i].Index, out[i].ID
		}
		proofs, err := l.files.prove(ctx, flights[at[0]].covered, indexes, leaves)
		if err != nil {
			return nil, unavailable("proving inclusion", err)
		}
		for j, i := range at {
			out[i].Proof = proofs[j]
		}
	}
	return out, nil
}

// writeLoop is the writer: the one place that stores envelopes and adds entries.
// While the log writes one group, the next one is stored.
func (l *Ledger) writeLoop() {
	before := make(chan struct{}) // closed when the log has answered for the group before
	close(before)
	for {
		select {
		case <-l.line.added:
		case <-l.ctx.Done():
			return
		}
		for {
			group, closed := l.line.take()
			if len(group) == 0 {
				if closed {
					return
				}
				break
			}
			before = l.write(group, before)
		}
	}
}

// write records one group. The order of entries in the log is that of the line,
// so that a precertificate precedes what was signed with its certificate: a
// group is added only when the one before has its answer, and after an error
// everything that was stored is added in the order of storing.
func (l *Ledger) write(group []*request, before chan struct{}) chan struct{} {
	// 1. Store the envelopes under their leaf hashes.
	flights := runnable(group, &l.line)
	added, err := l.store(flights)
	if err != nil {
		for _, f := range flights {
			l.line.end(f, failure("storing the envelope", err))
		}
		return before
	}
	l.cfg.Step("stored")
	// If the process dies here, the next Open adds them to the log.

	// 2. Add their entries to the log.
	select {
	case <-before:
	case <-l.ctx.Done(): // closed in a hurry; the next Open adds them
		return before
	}
	after := make(chan struct{})
	if l.recover.Load() {
		if err := l.complete(l.ctx); err != nil {
			for _, f := range added {
				l.line.end(f, failure("repairing the log", err))
			}
		}
		close(after)
		return after
	}
	futures := make([]tessera.IndexFuture, len(added))
	for i, f := range added {
		futures[i] = l.add(l.ctx, tessera.NewEntry(f.body))
	}
	l.cfg.Step("added")
	// If the process dies here, the log has them or not, and the next Open adds
	// those that it lacks.

	// 3. The log answers when they are on disk. sync, not this answer, decides
	// what their indexes are.
	l.pending.Go(func() {
		defer close(after)
		l.await(futures, added)
		l.cfg.Step("integrated")
		// If the process dies here, the log publishes a checkpoint at the next
		// Open and sync takes them in.
		signal(l.kick)
	})
	return after
}

// runnable returns the flights of the requests whose dependencies have not
// failed; a statement whose precertificate was not stored must not be stored.
func runnable(group []*request, q *queue) []*flight {
	var out []*flight
	for _, r := range group {
		var failed error
		for _, d := range r.deps {
			select {
			case <-d.done:
				failed = errors.Join(failed, d.err)
			default:
			}
		}
		for _, f := range r.own {
			if failed != nil {
				q.end(f, failure("relying on an earlier envelope", failed))
				continue
			}
			out = append(out, f)
		}
	}
	return out
}

func failure(doing string, err error) func(*flight) {
	return func(f *flight) {
		f.err = attest.Errorf(attest.LedgerUnavailable, "%s: %w", doing, err)
	}
}

// store writes the envelopes in one transaction and returns those that the log
// must get. Those that are records already are answered.
func (l *Ledger) store(flights []*flight) (add []*flight, err error) {
	var known []*flight
	var stranded bool
	err = l.index.update(l.ctx, func(t *txn) error {
		add, known, stranded = nil, nil, false
		for _, f := range flights {
			fresh, err := t.store(f)
			if err != nil {
				return err
			}
			if fresh {
				add = append(add, f)
				continue
			}
			var n int
			if err := t.row(`SELECT count(*) FROM records WHERE leaf = $1`, []any{f.id[:]}, &n); err != nil {
				return err
			}
			if n > 0 {
				known = append(known, f)
				continue
			}
			// Stored before by an Append that failed later: perhaps in the log.
			add, stranded = append(add, f), true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if stranded {
		l.recover.Store(true)
	}
	for _, f := range known {
		l.line.end(f, func(f *flight) { f.known = true })
	}
	return add, nil
}

// store writes one envelope; false when its leaf is stored already.
func (t *txn) store(f *flight) (bool, error) {
	if t.seq == 0 {
		if err := t.row(`SELECT coalesce(max(seq), 0) + 1 FROM envelopes`, nil, &t.seq); err != nil {
			return false, err
		}
	}
	certified, attach := 0, 0
	if len(f.entry.Certificate) > 0 {
		certified = 1
	}
	if f.entry.Attach {
		attach = 1
	}
	n, err := t.exec(`INSERT INTO envelopes (seq, leaf, signer, certified, attach, packing, content) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (leaf) DO NOTHING`, t.seq, f.id[:], f.signer[:], certified, attach, packing1, f.content)
	if err != nil {
		return false, err
	}
	if n == 0 {
		err := t.row(`SELECT seq FROM envelopes WHERE leaf = $1`, []any{f.id[:]}, &f.seq)
		return false, err
	}
	f.seq = t.seq
	t.seq++
	if _, err := t.exec(`INSERT INTO unlogged (seq, leaf) VALUES ($1, $2)`, f.seq, f.id[:]); err != nil {
		return false, err
	}
	n, err = t.exec(`INSERT INTO signers (id, packing, der) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING`, f.signer[:], packing1, f.der)
	if err == nil && n > 0 {
		_, err = t.exec(`UPDATE meta SET value = value + 1 WHERE name = $1`, metaSigners)
	}
	return true, err
}

// await waits for the log's answers. After an error the log may nevertheless
// have the entry (attacks F09), and later ones must not overtake it: the next
// group is added by complete.
func (l *Ledger) await(futures []tessera.IndexFuture, flights []*flight) {
	for i, future := range futures {
		if _, err := future(); err != nil {
			l.recover.Store(true)
			l.log.Error("adding to the log", "record", flights[i].id.String(), "error", err)
			l.line.end(flights[i], failure("adding to the log", err))
		}
	}
}

// complete adds to the log what is stored and not in it, in the order of
// storing. It is called when nothing is on its way to the log.
func (l *Ledger) complete(ctx context.Context) error {
	// 1. All that the log has is taken in, so that nothing is added twice.
	if err := l.settle(ctx); err != nil {
		return err
	}
	// 2. What is unlogged now is not in the log.
	var ids []attest.RecordID
	err := l.index.each(ctx, `SELECT leaf FROM unlogged ORDER BY seq`, nil, func(scan func(...any) error) error {
		var leaf []byte
		if err := scan(&leaf); err != nil {
			return err
		}
		if len(leaf) != len(attest.RecordID{}) {
			return fmt.Errorf("a leaf hash of %d bytes", len(leaf))
		}
		ids = append(ids, attest.RecordID(leaf))
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading what the log lacks: %w", err)
	}
	// 3. Add it, a batch at a time: what follows a failed batch waits.
	for len(ids) > 0 {
		n := min(len(ids), groupEntries)
		if err := l.addStored(ctx, ids[:n]); err != nil {
			return err
		}
		ids = ids[n:]
	}
	l.recover.Store(false)
	// 4. Take it in.
	return l.settle(ctx)
}

// addStored adds the entries of stored envelopes and waits for the log.
func (l *Ledger) addStored(ctx context.Context, ids []attest.RecordID) error {
	var futures []tessera.IndexFuture
	for _, id := range ids {
		e, _, _, err := l.index.envelope(ctx, id, l.Size())
		if err != nil {
			return err
		}
		futures = append(futures, l.add(l.ctx, tessera.NewEntry(e.LogEntry())))
	}
	l.cfg.Step("added")
	for _, future := range futures {
		if _, err := future(); err != nil {
			return fmt.Errorf("adding to the log: %w", err)
		}
	}
	l.cfg.Step("integrated")
	return nil
}
