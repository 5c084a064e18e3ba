// Package ledger is the append-only record of everything that Hallmark signs: a
// Tessera transparency log, the envelopes that its entries are about, and an
// index that is derived from both.
//
// The log is the truth. An envelope is stored before its entry is added to the
// log, and an answer is given only when a published checkpoint covers the entry
// and the index has taken it in. What the index holds follows from the log by
// one function, deriver.advance, at every append, start, recovery and rebuild.
package ledger

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"k8s.io/klog/v2"

	"github.com/hallmarkd/hallmark/attest"
)

// Config says where a ledger lives and who signs its checkpoints.
type Config struct {
	Dir    string        // data directory, local disk only: the log lives in Dir/log, the database is Dir/hallmark.db
	Origin string        // of the log: the host name of the service's public_url, without port (trust-formats 4.12)
	LogKey crypto.Signer // ECDSA P-256; signs checkpoints
	// BatchAge is how long an entry waits for others to share its disk writes;
	// 0: 10 ms. CheckpointInterval is the least time between two checkpoints; 0:
	// 100 ms, which is also Tessera's minimum.
	BatchAge, CheckpointInterval time.Duration
	// CheckInterval is how often the stored envelopes are counted and a few of
	// them rebuilt; 0: 5 s.
	CheckInterval time.Duration
	// Step is called between any two durable steps, with the name of the one
	// that was just taken. Tests stop the process there; nil otherwise.
	Step   func(step string)
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.BatchAge == 0 {
		c.BatchAge = 10 * time.Millisecond
	}
	if c.CheckpointInterval == 0 {
		c.CheckpointInterval = 100 * time.Millisecond
	}
	if c.CheckInterval == 0 {
		c.CheckInterval = 5 * time.Second
	}
	if c.Step == nil {
		c.Step = func(string) {}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) logDir() string   { return filepath.Join(c.Dir, "log") }
func (c Config) database() string { return filepath.Join(c.Dir, "hallmark.db") }

// Ledger is an open ledger. All methods may be called concurrently. While Err is
// not nil they all refuse with it.
type Ledger struct {
	cfg   Config
	log   *slog.Logger
	files *logFiles
	index *index
	state *deriver
	wake  chan struct{}

	ctx     context.Context // of everything in the background
	stop    context.CancelFunc
	running sync.WaitGroup
	unlock  func() error

	add        tessera.AddFn
	shutdown   func(context.Context) error
	integrated func(context.Context) (uint64, error) // size of the tree, published or not

	line queue

	kick    chan struct{}         // look for a new checkpoint now
	moved   broadcast             // a look was taken
	looked  atomic.Pointer[error] // what came of the last look
	waiting atomic.Int64          // who waits for one
	check   chan struct{}         // check the envelopes now
	trouble troubles              // why everything is refused
	raw     []byte                // the published checkpoint last read; owned by sync
	head    checkpoint            // parsed from raw; owned by sync
	syncing sync.Mutex            // one sync at a time
	recover atomic.Bool           // envelopes may be stored that the log does not have
	pending sync.WaitGroup        // futures of the appender

	checkpoints *lru.Cache[uint64, checkpoint] // verified, by size

	scrub    sync.Mutex // guards what follows
	scrubbed uint64     // index at which the next check goes on
	suspects map[uint64]struct{}
}

// RouteLibraryLogs sends what Tessera logs to logger instead of standard error.
// Tessera logs through a process-wide logger, so a program calls this once,
// before any Open; nothing in this package does.
func RouteLibraryLogs(logger *slog.Logger) { klog.SetSlogLogger(logger) }

// Init creates an empty ledger in cfg.Dir. It fails with ALREADY_INITIALISED if
// there is one, and repairs an Init that was interrupted.
func Init(ctx context.Context, cfg Config) error {
	cfg = cfg.withDefaults()
	key, err := newLogKey(cfg.Origin, cfg.LogKey)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return attest.Errorf(attest.LedgerUnavailable, "creating the data directory: %w", err)
	}
	unlock, err := lock(cfg.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	x, err := openIndex(ctx, cfg.database(), "rwc")
	if err != nil {
		return unavailable("creating the database", err)
	}
	defer x.close()
	if done, err := x.created(ctx); err != nil {
		return unavailable("reading the database", err)
	} else if done {
		return attest.Errorf(attest.AlreadyExists, "%s already holds a ledger: serve it, or choose another directory", cfg.Dir)
	}
	if err := initLog(ctx, cfg, key); err != nil {
		return err
	}
	cfg.Step("log")
	// If the process dies here, there is an empty log and no tables: Open says
	// NOT_INITIALISED and the next Init goes on.
	if err := x.create(ctx); err != nil {
		return unavailable("creating the index", err)
	}
	cfg.Step("index")
	return unavailable("syncing the data directory", syncDir(cfg.Dir))
}

// initLog makes the log with its first, empty checkpoint. A log that has entries
// already is a ledger whose database was lost.
func initLog(ctx context.Context, cfg Config, key *logKey) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if _, _, _, err := openLog(ctx, cfg, key); err != nil {
		return unavailable("creating the log", err)
	}
	raw, err := os.ReadFile(filepath.Join(cfg.logDir(), "checkpoint"))
	if err != nil {
		return unavailable("reading the checkpoint", err)
	}
	cp, err := key.parse(raw)
	if err != nil {
		return err
	}
	if cp.size > 0 {
		return attest.Errorf(attest.AlreadyExists, "%s has a log of %d entries but no database: restore the database", cfg.Dir, cp.size)
	}
	return nil
}

func openLog(ctx context.Context, cfg Config, key *logKey) (tessera.AddFn, func(context.Context) error, tessera.LogReader, error) {
	driver, err := posix.New(ctx, posix.Config{Path: cfg.logDir()})
	if err != nil {
		return nil, nil, nil, err
	}
	opts := tessera.NewAppendOptions().
		WithCheckpointSigner(key).
		// A group of the writer is one batch: see append.go.
		WithBatching(groupEntries, cfg.BatchAge).
		WithCheckpointInterval(cfg.CheckpointInterval).
		// The same tree signed again would say nothing new.
		WithCheckpointRepublishInterval(0)
	appender, shutdown, reader, err := tessera.NewAppender(ctx, driver, opts)
	if err != nil {
		return nil, nil, nil, err
	}
	return appender.Add, shutdown, reader, nil
}

// lock makes this process the only one that writes to dir (attacks F14).
func lock(dir string) (func() error, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, attest.Errorf(attest.LedgerUnavailable, "the data directory cannot be written: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, attest.Errorf(attest.LedgerLocked, "another process uses %s: stop it first", dir)
	}
	return func() error {
		// Closing is not enough: a process that is just being started has a copy of
		// the file, and with it the lock, until it runs its own program.
		return errors.Join(syscall.Flock(int(f.Fd()), syscall.LOCK_UN), f.Close())
	}, nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Open opens the ledger in cfg.Dir and repairs what a crash left: entries that
// the log has and the index lacks, and envelopes that were stored and never
// reached the log. NOT_INITIALISED, LEDGER_LOCKED; LEDGER_BEHIND_INDEX when the
// log is older than the index or another one. A ledger with a gap opens, and
// refuses everything until the gap is closed: see Err.
func Open(ctx context.Context, cfg Config) (*Ledger, error) {
	l, err := open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := l.start(ctx); err != nil {
		return nil, errors.Join(err, l.abandon())
	}
	return l, nil
}

// open takes the lock and reads the state, and writes nothing to the log, so
// that one that is behind the index is left as it is.
func open(ctx context.Context, cfg Config) (*Ledger, error) {
	l, err := lockAndOpen(ctx, cfg.withDefaults())
	if err != nil {
		return nil, err
	}
	if err := l.read(ctx); err != nil {
		return nil, errors.Join(err, l.abandon())
	}
	return l, nil
}

// lockAndOpen makes a Ledger of which only files and database are open.
func lockAndOpen(ctx context.Context, cfg Config) (l *Ledger, err error) {
	key, err := newLogKey(cfg.Origin, cfg.LogKey)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(cfg.database()); errors.Is(err, fs.ErrNotExist) {
		return nil, attest.Errorf(attest.NotInitialised, "%s holds no ledger: run hallmarkd init", cfg.Dir)
	}
	l = &Ledger{
		cfg: cfg, log: cfg.Logger, suspects: map[uint64]struct{}{},
		wake: make(chan struct{}, 1), kick: make(chan struct{}, 1), check: make(chan struct{}, 1),
	}
	l.line.init()
	if l.checkpoints, err = lru.New[uint64, checkpoint](4096); err != nil {
		return nil, err
	}
	if l.files, err = newLogFiles(cfg.logDir()); err != nil {
		return nil, err
	}
	if l.unlock, err = lock(cfg.Dir); err != nil {
		return nil, err
	}
	l.ctx, l.stop = context.WithCancel(context.Background())
	if l.index, err = openIndex(ctx, cfg.database(), "rw"); err != nil {
		return nil, errors.Join(unavailable("opening the database", err), l.abandon())
	}
	if err := l.index.compatible(ctx); err != nil {
		return nil, errors.Join(err, l.abandon())
	}
	if err := l.index.side(ctx); err != nil {
		return nil, errors.Join(unavailable("making the side tables", err), l.abandon())
	}
	l.state = &deriver{files: l.files, key: key, source: l.index, index: l.index, step: cfg.Step}
	return l, nil
}

// read reads the state of log and index.
func (l *Ledger) read(ctx context.Context) error {
	published, err := l.published()
	if err != nil {
		return err
	}
	if err := l.index.within(ctx, published.size); err != nil {
		return err
	}
	if v, err := l.index.meta(ctx, metaFacts); err != nil {
		return unavailable("reading the database", err)
	} else if v != factsVersion {
		l.log.Info("rebuilding the index for a new version of its facts", "from", v, "to", factsVersion)
		if err := l.index.reset(ctx); err != nil {
			return unavailable("rebuilding the index", err)
		}
	}
	if err := l.state.load(ctx); err != nil {
		return unavailable("reading the index", err)
	}
	if published.size == 0 {
		l.state.last = published
	}
	return nil
}

// compatible checks that the database was made completely, and by this schema.
func (x *index) compatible(ctx context.Context) error {
	if done, err := x.created(ctx); err != nil {
		return unavailable("reading the database", err)
	} else if !done {
		return attest.Errorf(attest.NotInitialised, "the data directory was not initialised completely: run hallmarkd init again")
	}
	v, err := x.meta(ctx, metaSchema)
	if err != nil {
		return unavailable("reading the database", err)
	}
	if v != schemaVersion {
		return attest.Errorf(attest.LedgerUnavailable, "the database has schema %d, this program needs %d: run the program that made it", v, schemaVersion)
	}
	return nil
}

func behind(log, given uint64) error {
	return attest.Errorf(attest.LedgerBehind, "the log has %d entries, but a checkpoint of %d was given out: the log was rolled back. Restore its directory; what was signed since must not be forgotten", log, given)
}

// within returns LEDGER_BEHIND_INDEX when a checkpoint of a larger log was given
// out. Every size that the index was at has one.
func (x *index) within(ctx context.Context, size uint64) error {
	var given uint64
	if err := x.row(ctx, `SELECT coalesce(max(size), 0) FROM checkpoints`, nil, &given); err != nil {
		return unavailable("reading the database", err)
	}
	if given > size {
		return behind(size, given)
	}
	return nil
}

// start runs the background work and completes what a crash interrupted.
func (l *Ledger) start(ctx context.Context) error {
	var reader tessera.LogReader
	var err error
	if l.add, l.shutdown, reader, err = openLog(l.ctx, l.cfg, l.state.key); err != nil {
		return unavailable("opening the log", err)
	}
	l.integrated = reader.IntegratedSize
	// The log may have integrated entries without publishing them; it publishes
	// by itself, and sync takes them in.
	l.recover.Store(true)
	l.running.Go(l.syncLoop)
	if err := l.settle(ctx); err != nil && l.trouble.get() == nil {
		return err
	}
	if err := l.inspect(ctx); err != nil {
		l.trouble.set(fromCheck, err)
	}
	if l.trouble.get() == nil {
		if err := l.complete(ctx); err != nil && l.trouble.get() == nil {
			return err
		}
	}
	l.running.Go(l.writeLoop)
	l.running.Go(l.checkLoop)
	return nil
}

// Close waits for the appends that are under way, as long as ctx allows, and
// closes the ledger. What it does not wait for is completed by the next Open.
func (l *Ledger) Close(ctx context.Context) error {
	if !l.line.close() {
		return nil
	}
	var errs []error
	select {
	case <-l.line.drained:
		// Every future has its answer before the log goes.
		l.pending.Wait()
		if err := l.shutdown(ctx); err != nil {
			errs = append(errs, fmt.Errorf("closing the log: %w", err))
		}
	case <-ctx.Done():
		errs = append(errs, fmt.Errorf("waiting for appends: %w", ctx.Err()))
	}
	return errors.Join(append(errs, l.abandon())...)
}

// abandon stops everything at once.
func (l *Ledger) abandon() error {
	l.line.close()
	l.stop()
	l.running.Wait()
	l.line.fail(attest.Errorf(attest.ShuttingDown, "the ledger is closed: repeat the request"))
	var errs []error
	if l.index != nil {
		errs = append(errs, l.index.close())
	}
	return errors.Join(append(errs, l.unlock())...)
}

// ready returns why the ledger refuses to answer, nil when it does not.
func (l *Ledger) ready() error {
	if l.line.closed.Load() {
		return attest.Errorf(attest.ShuttingDown, "the ledger is closed: repeat the request")
	}
	return l.Err()
}

// Err returns why everything is refused, nil when it is not: LEDGER_INCOMPLETE
// when an entry of the log has no envelope or another one, LEDGER_BEHIND_INDEX
// when the log was rolled back. It clears by itself when the cause is repaired.
func (l *Ledger) Err() error { return l.trouble.get() }

// Size returns the number of log entries that every answer takes into account.
func (l *Ledger) Size() uint64 { return l.state.checkpoint().size }

// NewestTime returns the newest time of any record; the zero time when there is
// none. A clock behind it is wrong.
func (l *Ledger) NewestTime() time.Time {
	l.state.mu.RLock()
	defer l.state.mu.RUnlock()
	return l.state.newest
}

// Policy returns the policy change that is in force, false before the first and
// while everything is refused.
func (l *Ledger) Policy() (attest.PolicyChange, bool) {
	l.state.mu.RLock()
	defer l.state.mu.RUnlock()
	if l.state.fold.policy == nil || l.ready() != nil {
		return attest.PolicyChange{}, false
	}
	return *l.state.fold.policy, true
}

// unavailable wraps an error of the disk or the database. An error that has a
// reason already keeps it.
func unavailable(doing string, err error) error {
	var known *attest.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	return attest.Errorf(attest.LedgerUnavailable, "%s: %w", doing, err)
}
