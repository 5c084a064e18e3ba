package ledger_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"github.com/hallmarkd/hallmark/ledger"
)

const (
	callers = 256
	each    = 3 // entries per caller: a signing
)

// BenchmarkAppend records complete signings, with a certificate each, from 256
// callers at once. They are signed beforehand. One iteration is one signing.
func BenchmarkAppend(b *testing.B) {
	k := newKit(b)
	l := k.open()
	work := signings(k, b.N)
	b.ResetTimer()
	elapsed := parallel(b, len(work), func(i int) error {
		_, err := l.Append(b.Context(), work[i]...)
		return err
	})
	b.StopTimer()
	b.ReportMetric(float64(each*b.N)/elapsed.Seconds(), "entries/s")
	k.fsck(l)
	report := func(name string, size int64) { b.ReportMetric(float64(size)/float64(b.N), name+"-B/signing") }
	report("log", logBytes(b, filepath.Join(k.cfg.Dir, "log")))
	info, err := os.Stat(filepath.Join(k.cfg.Dir, "hallmark.db"))
	if err != nil {
		b.Fatal(err)
	}
	report("db", info.Size())
}

// BenchmarkAppendTesseraAlone adds the same entries to the same kind of log with
// nothing around it: the floor of BenchmarkAppend. A caller waits until its three
// entries are published.
func BenchmarkAppendTesseraAlone(b *testing.B) {
	k := newKit(b)
	work := signings(k, b.N)
	skey, _, err := note.GenerateKey(nil, origin)
	if err != nil {
		b.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		b.Fatal(err)
	}
	driver, err := posix.New(b.Context(), posix.Config{Path: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	opts := tessera.NewAppendOptions().WithCheckpointSigner(signer).WithBatching(256, 10*time.Millisecond).WithCheckpointInterval(100 * time.Millisecond)
	appender, shutdown, reader, err := tessera.NewAppender(b.Context(), driver, opts)
	if err != nil {
		b.Fatal(err)
	}
	awaiter := tessera.NewPublicationAwaiter(b.Context(), reader.ReadCheckpoint, 5*time.Millisecond)
	b.ResetTimer()
	elapsed := parallel(b, len(work), func(i int) error {
		var last tessera.IndexFuture
		for _, e := range work[i] {
			last = appender.Add(b.Context(), tessera.NewEntry(e.LogEntry()))
		}
		_, _, err := awaiter.Await(b.Context(), last)
		return err
	})
	b.StopTimer()
	b.ReportMetric(float64(each*b.N)/elapsed.Seconds(), "entries/s")
	if err := shutdown(b.Context()); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkStage asks what a stage holds, as the gate does for each decision.
func BenchmarkStage(b *testing.B) {
	k := newKit(b)
	l := k.open()
	k.append(l, k.policy(1, 1), k.promotion(1, "test", 1, zero, 0))
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if s, err := l.Stage(b.Context(), "payments", "test", repo); err != nil || s.Head == nil {
				b.Error(s, err)
				return
			}
		}
	})
}

// BenchmarkGet reads a record with its proof.
func BenchmarkGet(b *testing.B) {
	k := newKit(b)
	l := k.open()
	records := k.append(l, k.signing(k.credential("1"), 1, "1")...)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := l.Get(b.Context(), records[2].ID); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func signings(k *kit, n int) [][]ledger.Entry {
	work := make([][]ledger.Entry, n)
	for i := range work {
		run := fmt.Sprint(i)
		work[i] = k.signing(k.credential(run), i, run)
	}
	return work
}

// parallel calls do for each of n from 256 goroutines.
func parallel(b *testing.B, n int, do func(i int) error) time.Duration {
	var next atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range callers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				if err := do(int(i)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return time.Since(begin)
}

// logBytes is the size of the log's files without the partial ones, which go
// within minutes once a full one is there.
func logBytes(tb testing.TB, dir string) (size int64) {
	tb.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(path, ".p/") {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return size
}
