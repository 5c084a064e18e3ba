package ledger_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

// A process that is to be stopped is this test binary, started again with an
// order on its standard input.
const orderVariable = "HALLMARK_LEDGER_TEST_ORDER"

// order is what such a process does.
type order struct {
	Do      string // a key of orders
	Dir     string // data directory
	Key     []byte // log key, PKCS #8
	Stop    string // exit at the Nth time that this step is taken
	N       int
	Entries []ledger.Entry
}

const stopped = 3 // exit code of a process that was stopped at a step

// orders run in the other process; what they print is judged by the test.
var orders = map[string]func(context.Context, order, ledger.Config) error{
	"init":    func(ctx context.Context, _ order, cfg ledger.Config) error { return ledger.Init(ctx, cfg) },
	"rebuild": func(ctx context.Context, _ order, cfg ledger.Config) error { return ledger.Rebuild(ctx, cfg) },
	"append":  runAppend,
	"load":    runLoad,
	"full":    runFull,
	"open":    runOpen,
}

func TestMain(m *testing.M) {
	ledger.RouteLibraryLogs(slog.New(slog.DiscardHandler))
	if _, ok := os.LookupEnv(orderVariable); !ok {
		os.Exit(m.Run())
	}
	if err := obey(os.Stdin); err != nil {
		fmt.Println("error", attest.ReasonOf(err), err)
		os.Exit(1)
	}
}

func obey(in io.Reader) error {
	var o order
	if err := json.NewDecoder(in).Decode(&o); err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(o.Key)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	taken := 0
	cfg := ledger.Config{Dir: o.Dir, Origin: origin, LogKey: key.(*ecdsa.PrivateKey), Step: func(step string) {
		mu.Lock()
		defer mu.Unlock()
		if step == o.Stop {
			if taken++; taken == o.N {
				os.Exit(stopped)
			}
		}
	}}
	return orders[o.Do](context.Background(), o, cfg)
}

// run starts the other process and returns its exit code and what it printed.
func (k *kit) run(o order) (int, string) {
	k.tb.Helper()
	cmd := k.command(o)
	cmd.Stderr = k.tb.Output()
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		k.tb.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func (k *kit) command(o order) *exec.Cmd {
	k.tb.Helper()
	o.Dir = k.cfg.Dir
	var err error
	if o.Key, err = x509.MarshalPKCS8PrivateKey(k.log); err != nil {
		k.tb.Fatal(err)
	}
	text, err := json.Marshal(o)
	if err != nil {
		k.tb.Fatal(err)
	}
	cmd := exec.CommandContext(k.tb.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), orderVariable+"=1")
	cmd.Stdin = bytes.NewReader(text)
	return cmd
}

// stop runs an order that must be stopped at its step.
func (k *kit) stop(o order) {
	k.tb.Helper()
	if code, out := k.run(o); code != stopped {
		k.tb.Fatalf("%s did not stop at %s: exit code %d, %s", o.Do, o.Stop, code, out)
	}
}

func runAppend(ctx context.Context, o order, cfg ledger.Config) error {
	l, err := ledger.Open(ctx, cfg)
	if err != nil {
		return err
	}
	if _, err := l.Append(ctx, o.Entries...); err != nil {
		return err
	}
	return l.Close(ctx)
}

// The process is stopped between any two durable steps of an Append, and the
// next start repairs what that left, alone.
func TestStopAtEachStep(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"stored", "added", "integrated", "published", "synced"} {
		t.Run(step, func(t *testing.T) {
			k := newKit(t)
			entries := k.signing(k.credential("1"), 1, "1")
			k.stop(order{Do: "append", Stop: step, N: 1, Entries: entries})
			// Nothing that the stop left is a problem.
			left := k.fsck(nil)
			if left.Envelopes != 3 {
				t.Errorf("%d envelopes are stored: a request is stored whole, before anything else", left.Envelopes)
			}
			l := k.open()
			if l.Size() != 3 {
				t.Errorf("after the start the log has %d entries, want 3: it completes the request", l.Size())
			}
			before, err := l.Find(t.Context(), ledger.Query{Ascending: true})
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range k.append(l, entries...) {
				if r.ID != before[i].ID || r.Index != before[i].Index {
					t.Errorf("the repeated request has another record %d", i)
				}
				verify(t, r)
			}
			if r := k.fsck(l); r.Records != 3 || r.Envelopes != 3 || r.Unlogged != 0 {
				t.Errorf("fsck: %+v", r)
			}
		})
	}
}

// The repair itself is stopped at each of its steps.
func TestStopDuringRepair(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	entries := k.signing(k.credential("1"), 1, "1")
	k.stop(order{Do: "append", Stop: "stored", N: 1, Entries: entries})
	if r := k.fsck(nil); r.Unlogged != 3 || r.Size != 0 {
		t.Errorf("fsck: %+v, want three envelopes that the log lacks", r)
	}
	for _, step := range []string{"added", "integrated", "published", "synced"} {
		// What was integrated by an earlier round leaves nothing to be added.
		if code, out := k.run(order{Do: "append", Stop: step, N: 1}); code != stopped && (code != 0 || step == "added") {
			t.Fatalf("repair stopped at %s: exit code %d, %s", step, code, out)
		}
		k.fsck(nil)
	}
	l := k.open()
	k.append(l, entries...)
	if r := k.fsck(l); r.Records != 3 || r.Unlogged != 0 {
		t.Errorf("fsck: %+v", r)
	}
}

func TestStopDuringInitAndRebuild(t *testing.T) {
	t.Parallel()
	k := &kit{issuer: newIssuer(t), tb: t}
	k.cfg = ledger.Config{Dir: filepath.Join(t.TempDir(), "data"), Origin: origin, LogKey: k.log}
	k.stop(order{Do: "init", Stop: "log", N: 1})
	_, err := ledger.Open(t.Context(), k.cfg)
	wantReason(t, "half an init", err, attest.NotInitialised)
	k.stop(order{Do: "init", Stop: "index", N: 1})
	wantReason(t, "a whole init", ledger.Init(t.Context(), k.cfg), attest.AlreadyExists)
	l := k.open()
	k.append(l, k.signing(k.credential("1"), 1, "1")...)
	k.append(l, k.policy(1, 1))
	before := snapshot(t, l)
	k.close(l)
	for _, step := range []string{"reset", "published", "synced"} {
		k.stop(order{Do: "rebuild", Stop: step, N: 1})
		k.fsck(nil)
	}
	l = k.open()
	if diff := cmp.Diff(before, snapshot(t, l), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("a rebuild that was stopped changed:\n%s", diff)
	}
	k.fsck(l)
}

// runLoad appends from many callers and prints each record that was answered.
func runLoad(ctx context.Context, o order, cfg ledger.Config) error {
	l, err := ledger.Open(ctx, cfg)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := i; n < len(o.Entries); n += 8 {
				records, err := l.Append(ctx, o.Entries[n])
				if err != nil {
					fmt.Println("error", err)
					return
				}
				fmt.Println("acknowledged", n, records[0].Index)
			}
		})
	}
	wg.Wait()
	fmt.Println("finished")
	return nil
}

// kill -9 under load: every record that was acknowledged is there, under the
// index that was told, and nothing is in the log without its envelope.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	acknowledged := map[int]string{}
	var all []ledger.Entry
	for round := range 4 {
		var entries []ledger.Entry
		for n := range 100 {
			entries = append(entries, k.signed(round*100+n))
		}
		all = append(all, entries...)
		cmd := k.command(order{Do: "load", Entries: entries})
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := 1 + rand.IntN(40)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			word := strings.Fields(lines.Text())
			if word[0] != "acknowledged" {
				t.Errorf("round %d: %s", round, lines.Text())
				continue
			}
			n, err := strconv.Atoi(word[1])
			if err != nil {
				t.Fatal(err)
			}
			acknowledged[round*100+n] = word[2]
			if after--; after == 0 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatalf("round %d ended before it was killed", round)
		}
		k.fsck(nil)
	}
	l := k.open()
	for n, index := range acknowledged {
		r, err := l.Get(t.Context(), all[n].ID())
		if err != nil || fmt.Sprint(r.Index) != index {
			t.Errorf("F09 acknowledged record %d of index %s is %d now, %v", n, index, r.Index, err)
		}
	}
	k.append(l, all[:256]...)
	k.append(l, all[256:]...)
	if r := k.fsck(l); r.Records != len(all) || r.Envelopes != len(all) {
		t.Errorf("fsck: %+v, want %d records", r, len(all))
	}
}

// runFull lets every write to a file fail, as on a full disk: before anything is
// stored, and after the envelopes were.
func runFull(ctx context.Context, o order, cfg ledger.Config) error {
	signal.Ignore(syscall.SIGXFSZ)
	var free syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &free); err != nil {
		return err
	}
	full := func() { check(syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 1, Max: free.Max})) }
	empty := func() { check(syscall.Setrlimit(syscall.RLIMIT_FSIZE, &free)) }
	var fillAt atomic.Value
	fillAt.Store("")
	cfg.Step = func(step string) {
		if step == fillAt.Load() {
			full()
		}
	}
	l, err := ledger.Open(ctx, cfg)
	if err != nil {
		return err
	}
	half := len(o.Entries) / 2
	for i, e := range o.Entries[:half] {
		at := []string{"", "stored", "published"}[i%3]
		if fillAt.Store(at); at == "" {
			full()
		}
		_, err := l.Append(ctx, e)
		empty()
		fillAt.Store("")
		fmt.Println("full", attest.ReasonOf(err), l.Err() == nil)
		if _, err := l.Get(ctx, o.Entries[0].ID()); i > 0 && err != nil {
			return fmt.Errorf("reading while the disk is full: %w", err)
		}
		// The next request brings along what was stored and did not reach the log.
		if i%3 == 1 {
			if _, err := l.Append(ctx, o.Entries[half+i]); err != nil {
				return err
			}
			r, err := l.Get(ctx, e.ID())
			if err != nil || r.Index != l.Size()-2 {
				return fmt.Errorf("what was stored first is record %d of %d: %w", r.Index, l.Size(), err)
			}
		}
		again, err := l.Append(ctx, e)
		if err != nil {
			return err
		}
		fmt.Println("again", again[0].ID == e.ID())
	}
	return l.Close(ctx)
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// F09, F10: a disk that is full answers LEDGER_UNAVAILABLE wherever it strikes,
// loses nothing, and the repeated request returns its record.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	var entries []ledger.Entry
	for n := range 12 {
		entries = append(entries, k.signed(n))
	}
	code, out := k.run(order{Do: "full", Entries: entries})
	want := strings.Repeat("full LEDGER_UNAVAILABLE true\nagain true\n", 6)
	if code != 0 || out != want {
		t.Errorf("F09 exit code %d, printed\n%swant\n%s", code, out, want)
	}
	if r := k.fsck(nil); r.Records != 8 || r.Size != 8 || r.Unlogged != 0 {
		t.Errorf("F11 fsck: %+v, want 8 records, each once in the log", r)
	}
}

// runOpen gives up the right to write anywhere, then opens.
func runOpen(ctx context.Context, _ order, cfg ledger.Config) error {
	if os.Getuid() == 0 {
		const nobody = 65534
		if err := syscall.Setuid(nobody); err != nil {
			return err
		}
	}
	l, err := ledger.Open(ctx, cfg)
	if err != nil {
		return err
	}
	return l.Close(ctx)
}

func TestReadOnlyDirectory(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	k.append(l, k.signed(1))
	k.close(l)
	for dir := k.cfg.Dir; dir != filepath.Clean(os.TempDir()) && len(dir) > 1; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o555); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Error(err)
			}
		})
	}
	code, out := k.run(order{Do: "open"})
	if code != 1 || !strings.HasPrefix(out, "error LEDGER_UNAVAILABLE") || strings.Count(out, "\n") != 1 {
		t.Errorf("exit code %d, %q: want one line that says LEDGER_UNAVAILABLE", code, out)
	}
	k.fsck(nil)
}
