package gate

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

const (
	workers       = 8
	workBatch     = 64
	attachTimeout = 2 * time.Minute
	finishTimeout = 16 * time.Minute // more than the registry takes for a copy
	maxBackoff    = 5 * time.Minute
)

// progress tells waiters that the worker has done something.
type progress struct {
	mu      sync.Mutex
	changed chan struct{}
}

func (p *progress) broadcast() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.changed)
	p.changed = make(chan struct{})
}

// await reports whether done became true within the time.
func (p *progress) await(ctx context.Context, within time.Duration, done func(context.Context) (bool, error)) bool {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		// The channel was taken before asking, so no change is missed.
		if ok, err := done(ctx); err != nil || ok {
			return ok
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// Run does the work outside the ledger — attaching bundles, moving targets —
// until ctx ends. Every task is idempotent and stays in the table until it is
// done, so a crash at any point costs a repetition and nothing else. Each kind has
// workers of its own: one registry that is slow to take bundles, or one signer
// with many, holds up no promotion (attacks I11).
func (g *Gate) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var wakes []chan struct{}
	for _, kind := range []ledger.TaskKind{ledger.TaskPromote, ledger.TaskAttach} {
		wake := make(chan struct{}, 1)
		wakes = append(wakes, wake)
		wg.Go(func() { g.work(ctx, kind, wake) })
	}
	if g.Bases.Every > 0 {
		wg.Go(func() { g.sweepLoop(ctx) })
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.Ledger.Wake():
		}
		for _, wake := range wakes {
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}
}

// work does the tasks of one kind.
func (g *Gate) work(ctx context.Context, kind ledger.TaskKind, wake <-chan struct{}) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, workers)
	running := newRunning()
	for ctx.Err() == nil {
		tasks, err := g.Ledger.Tasks(ctx, kind, g.Now(), workBatch)
		if err != nil && ctx.Err() == nil {
			g.Logger.Error("reading tasks", "error", err)
		}
		started := 0
		for _, t := range tasks {
			if !running.start(keyOf(t)) {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			started++
			wg.Go(func() {
				defer func() { <-slots; running.end(keyOf(t)) }()
				g.do(ctx, t)
			})
		}
		if started > 0 {
			continue
		}
		select {
		case <-wake:
		case <-time.After(time.Second): // a retry may be due
		case <-ctx.Done():
		}
	}
}

// running keeps a task from being started twice by one worker.
type running struct {
	mu    sync.Mutex
	tasks map[taskKey]bool
}

type taskKey struct {
	kind   ledger.TaskKind
	record attest.RecordID
	ref    attest.ImageRef
}

func keyOf(t ledger.Task) taskKey { return taskKey{t.Kind, t.Record, t.Ref} }

func newRunning() *running { return &running{tasks: map[taskKey]bool{}} }

func (r *running) start(k taskKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tasks[k] {
		return false
	}
	r.tasks[k] = true
	return true
}

func (r *running) end(k taskKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tasks, k)
}

// do carries out one task and notes what became of it.
func (g *Gate) do(ctx context.Context, t ledger.Task) {
	within := attachTimeout
	if t.Kind == ledger.TaskPromote {
		within = finishTimeout
	}
	work, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var err error
	switch t.Kind {
	case ledger.TaskAttach:
		err = g.attachTask(work, t)
	case ledger.TaskPromote:
		err = g.finish(work, t)
	}
	if ctx.Err() != nil {
		return // shutting down: the task is still in the table
	}
	if err == nil {
		err = g.Ledger.TaskDone(ctx, t)
	} else {
		g.Logger.Warn("task failed", "kind", t.Kind, "record", t.Record.String(), "digest", t.Ref.Digest.String(), "attempt", t.Attempts+1, "error", err)
		err = g.Ledger.TaskLater(ctx, t, g.Now().Add(backoff(t.Attempts)), err.Error())
	}
	if err != nil {
		g.Logger.Error("noting a task's end", "record", t.Record.String(), "error", err)
	}
	g.progress.broadcast()
}

func backoff(attempts int) time.Duration {
	return min(maxBackoff, 500*time.Millisecond<<min(attempts, 20))
}

// attachTask attaches a record to the one image that a task names.
func (g *Gate) attachTask(ctx context.Context, t ledger.Task) error {
	return g.attach(ctx, t.Record, attest.Image{Ref: t.Ref})
}

// attach puts a record's bundle beside an image and its platforms in the registry.
func (g *Gate) attach(ctx context.Context, id attest.RecordID, img attest.Image) error {
	size, err := g.Ledger.EnvelopeSize(ctx, id)
	if err != nil {
		return err
	}
	done, err := weigh(ctx, g.attaching, size)
	if err != nil {
		return err
	}
	defer done()
	rec, err := g.Ledger.Get(ctx, id)
	if err != nil {
		return err
	}
	bundle, err := rec.Bundle(g.Signer.LogID())
	if err != nil {
		return err
	}
	for _, d := range img.Digests() {
		g.Step("attach")
		// The record's own time makes the referrer the same bytes on every attempt.
		ref := attest.ImageRef{Repository: img.Ref.Repository, Digest: d}
		if err := g.Registry.Attach(ctx, ref, bundle, rec.Get(attest.FacetPredicate), rec.Time); err != nil {
			return err
		}
	}
	return nil
}

// promotionOf reads a promotion record.
func promotionOf(rec attest.Record) (attest.Statement, attest.Promotion, error) {
	var p attest.Promotion
	s, err := statementOf(rec)
	if err != nil {
		return s, p, err
	}
	return s, p, json.Unmarshal(s.Predicate, &p)
}
