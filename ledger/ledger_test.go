package ledger_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

func TestAppendGivesRecordsWithProofs(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	records := k.append(l, k.signing(k.credential("9912"), 1, "9912")...)
	kinds := []attest.RecordKind{attest.KindPrecertificate, attest.KindSignature, attest.KindProvenance}
	for i, r := range records {
		if r.Index != uint64(i) || r.Kind != kinds[i] {
			t.Errorf("record %d is a %s at index %d: the order of an Append is that of the log", i, r.Kind, r.Index)
		}
		verify(t, r)
		got, err := l.Get(t.Context(), r.ID)
		if diff := cmp.Diff(r, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("Get: %v: differs from what Append answered:\n%s", err, diff)
		}
		at, err := l.At(t.Context(), r.Index)
		if err != nil || at.ID != r.ID {
			t.Errorf("At(%d) = %s, %v", i, at.ID, err)
		}
	}
	if l.Size() != 3 || !l.NewestTime().Equal(start) {
		t.Errorf("size %d, newest %s", l.Size(), l.NewestTime())
	}
	if r := k.fsck(l); r.Size != 3 || r.Records != 3 || r.Envelopes != 3 || r.Unlogged != 0 {
		t.Errorf("fsck: %+v", r)
	}
}

// F08: what a record proves is checked here by other means than it was made.
func verify(tb testing.TB, r attest.Record) {
	tb.Helper()
	lines := strings.Split(string(r.Checkpoint), "\n")
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil {
		tb.Fatal(err)
	}
	if lines[0] != origin || lines[1] != fmt.Sprint(r.TreeSize) {
		tb.Errorf("record %d has the checkpoint %q, tree size %d", r.Index, lines[:2], r.TreeSize)
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, r.Index, r.TreeSize, r.ID[:], r.Proof, root); err != nil {
		tb.Errorf("F08 record %d: %v", r.Index, err)
	}
}

// A bundle is the same bytes for ever, so a record keeps its first checkpoint.
func TestRecordKeepsItsFirstCheckpoint(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	first := k.append(l, k.signed(1))[0]
	var last attest.Record
	for i := range 300 { // beyond a full tile
		if i%100 == 0 {
			last = k.append(l, k.signed(1000+i))[0]
			continue
		}
	}
	batch := make([]ledger.Entry, 256)
	for i := range batch {
		batch[i] = k.signed(2000 + i)
	}
	k.append(l, batch...)
	if last.TreeSize == first.TreeSize {
		t.Fatal("the log did not grow: the test shows nothing")
	}
	again := k.append(l, ledger.Entry{Envelope: first.Envelope})[0]
	if diff := cmp.Diff(first, again, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the record changed:\n%s", diff)
	}
	k.close(l)
	l = k.open()
	again, err := l.Get(t.Context(), first.ID)
	if diff := cmp.Diff(first, again, cmpopts.EquateEmpty()); err != nil || diff != "" {
		t.Errorf("the record changed with a restart: %v\n%s", err, diff)
	}
	k.fsck(l)
}

func TestIdenticalAppendsMakeOneRecord(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	entries := k.signing(k.credential("1"), 1, "1")
	const n = 100
	results := make([][]attest.Record, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var err error
			if results[i], err = l.Append(t.Context(), entries...); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, answer := range results {
		for i, r := range answer {
			if diff := cmp.Diff(sum(results[0][i]), sum(r)); diff != "" {
				t.Fatalf("two answers differ:\n%s", diff)
			}
		}
	}
	if twice := k.append(l, entries[1], entries[1]); twice[0].ID != twice[1].ID {
		t.Error("an envelope given twice became two records")
	}
	if r := k.fsck(l); r.Size != 3 {
		t.Errorf("%d log entries, want 3", r.Size)
	}
}

// F11: the record of one signer is never given for that of another.
func TestTwoSignersOfOneStatementAreTwoRecords(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	payload, err := attest.SignatureStatement(image(1), "x")
	a, b := k.credential("1"), k.credential("2")
	ea, eb := k.sign(a, payload, err), k.sign(b, payload, err)
	records := k.append(l, ledger.Entry{Envelope: a.precertificate}, ledger.Entry{Envelope: ea}, ledger.Entry{Envelope: b.precertificate}, ledger.Entry{Envelope: eb})
	if records[1].ID == records[3].ID || !bytes.Equal(records[3].Certificate, b.der) {
		t.Error("F11 two signatures share a record")
	}
	if r := k.fsck(l); r.Records != 4 {
		t.Errorf("%d records, want 4", r.Records)
	}
}

// Precertificates are joined by many Appends at once; none of their statements
// may stand before it in the log. fsck checks that.
func TestSharedPrecertificateComesFirst(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	var wg sync.WaitGroup
	for run := range 4 {
		c := k.credential(fmt.Sprint(run))
		for n := range 20 {
			work := k.signing(c, run*100+n, fmt.Sprint(run))
			wg.Go(func() {
				if _, err := l.Append(t.Context(), work...); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if r := k.fsck(l); r.Records != 4+4*20*2 {
		t.Errorf("%d records, want %d", r.Records, 4+4*20*2)
	}
}

func TestAppendRefuses(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	change := func(f func(*attest.Envelope)) []ledger.Entry {
		e := k.signed(1)
		f(&e.Envelope)
		return []ledger.Entry{e}
	}
	for _, row := range []struct {
		name    string
		entries []ledger.Entry
		want    attest.Reason
	}{
		{"F13 log entry above the log's limit", change(func(e *attest.Envelope) { e.PublicKey = make([]byte, 49_200) }), attest.TooLarge},
		{"envelope above the store's limit", change(func(e *attest.Envelope) { e.Payload = make([]byte, 33<<20) }), attest.TooLarge},
		{"more than a batch", make([]ledger.Entry, 257), attest.TooLarge},
		{"payload that is no statement", change(func(e *attest.Envelope) { e.Payload = []byte("x") }), attest.BadRequest},
		{"no timestamp", change(func(e *attest.Envelope) { e.Timestamp = nil }), attest.BadRequest},
		{"no signer", change(func(e *attest.Envelope) { e.PublicKey = nil }), attest.BadRequest},
		{"two signers", change(func(e *attest.Envelope) { e.Certificate = k.caCert.Raw }), attest.BadRequest},
		{"promotion with a subject that has no digest", []ledger.Entry{k.halfPromotion()}, attest.BadRequest},
		{"promotion that says nothing", change(func(e *attest.Envelope) {
			e.Payload = bytes.Replace(e.Payload, []byte(attest.PredicateSignature), []byte(attest.PredicatePromotion), 1)
			e.Payload = bytes.Replace(e.Payload, []byte(`"predicate":{}`), []byte(`"predicate":{"stageDigest":"x"}`), 1)
		}), attest.BadRequest},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := l.Append(t.Context(), row.entries...)
			wantReason(t, row.name, err, row.want)
		})
	}
	if out, err := l.Append(t.Context()); err != nil || len(out) > 0 {
		t.Errorf("an empty Append: %v, %v", out, err)
	}
	// One that is refused takes those beside it along: nothing was stored.
	_, err := l.Append(t.Context(), k.signed(7), change(func(e *attest.Envelope) { e.Timestamp = nil })[0])
	wantReason(t, "half a request", err, attest.BadRequest)
	if r := k.fsck(l); r.Envelopes != 0 {
		t.Errorf("%d envelopes were stored", r.Envelopes)
	}
}

// halfPromotion is one whose second subject names nothing: the index could list
// it, the fold could not take it in.
func (s *issuer) halfPromotion() ledger.Entry {
	s.tb.Helper()
	img := image(1)
	img.Platforms = []attest.Platform{{Name: "linux/amd64", Digest: attest.Hash([]byte("amd64"))}}
	payload, err := attest.PromotionStatement(img, attest.Promotion{Decided: attest.Decided{Track: "payments", Stage: "test"}})
	payload = bytes.Replace(payload, []byte(img.Platforms[0].Digest.Hex()), []byte("x"), 1)
	return ledger.Entry{Envelope: s.sign(nil, payload, err)}
}

// F13: the largest entry that the log takes is taken.
func TestLargestEntry(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	e := k.signed(1)
	for n := 48_000; ; n++ {
		e.PublicKey = make([]byte, n)
		if size := len(e.LogEntry()); size > 65535 {
			e.PublicKey = make([]byte, n-1)
			break
		}
	}
	k.append(l, e)
	k.fsck(l)
}

func TestCancelledWaiterLosesNothing(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	ctx, cancel := context.WithCancel(t.Context())
	k.cfg.Step = func(step string) {
		if step == "stored" {
			cancel()
		}
	}
	l := k.open()
	e := k.signed(1)
	_, err := l.Append(ctx, e)
	wantReason(t, "cancelled", err, attest.LedgerUnavailable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not say that it was cancelled", err)
	}
	again := k.append(l, e)[0]
	verify(t, again)
	if r := k.fsck(l); r.Records != 1 || r.Size != 1 {
		t.Errorf("fsck: %+v, want one record", r)
	}
}

func TestClosedLedgerRefuses(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	r := k.append(l, k.signed(1))[0]
	k.close(l)
	for name, err := range refusals(t, l, r) {
		wantReason(t, name, err, attest.ShuttingDown)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	k.fsck(nil)
}

// refusals calls every method that answers something.
func refusals(t *testing.T, l *ledger.Ledger, r attest.Record) map[string]error {
	t.Helper()
	ctx := t.Context()
	out := map[string]error{}
	_, out["Append"] = l.Append(ctx, ledger.Entry{Envelope: r.Envelope})
	_, out["Get"] = l.Get(ctx, r.ID)
	_, out["At"] = l.At(ctx, r.Index)
	_, _, out["ByKey"] = l.ByKey(ctx, r.Key)
	_, out["Find"] = l.Find(ctx, ledger.Query{})
	_, out["Stage"] = l.Stage(ctx, "payments", "test", repo)
	_, out["Stages"] = l.Stages(ctx, ledger.StageState{}, 0)
	_, out["Promotions"] = l.Promotions(ctx, "payments", "test", repo, 0)
	_, out["Promotion"] = l.Promotion(ctx, r.ID)
	_, out["Tasks"] = l.Tasks(ctx, "", start, 1)
	_, out["TaskPending"] = l.TaskPending(ctx, r.ID)
	out["TaskDone"] = l.TaskDone(ctx, ledger.Task{})
	out["TaskLater"] = l.TaskLater(ctx, ledger.Task{}, start, "")
	_, out["Read"] = l.Read(ctx, "checkpoint")
	return out
}

func TestInitAndOpenRefuse(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	wantReason(t, "init twice", ledger.Init(t.Context(), k.cfg), attest.AlreadyExists)
	l := k.open()
	k.append(l, k.signed(1))
	other := func(f func(*ledger.Config)) ledger.Config {
		c := k.cfg
		f(&c)
		return c
	}
	check := func(name string, cfg ledger.Config, want attest.Reason) {
		t.Helper()
		_, err := ledger.Open(t.Context(), cfg)
		wantReason(t, name, err, want)
	}
	// F14: one writer.
	check("F14 second opener", k.cfg, attest.LedgerLocked)
	wantReason(t, "F14 init of an open ledger", ledger.Init(t.Context(), k.cfg), attest.LedgerLocked)
	_, err := ledger.Fsck(t.Context(), k.cfg)
	wantReason(t, "F14 fsck of an open ledger", err, attest.LedgerLocked)
	wantReason(t, "F14 rebuild of an open ledger", ledger.Rebuild(t.Context(), k.cfg), attest.LedgerLocked)
	k.close(l)

	check("empty directory", other(func(c *ledger.Config) { c.Dir = t.TempDir() }), attest.NotInitialised)
	check("no directory", other(func(c *ledger.Config) { c.Dir = filepath.Join(t.TempDir(), "x") }), attest.NotInitialised)
	check("other origin", other(func(c *ledger.Config) { c.Origin = "other.example.com" }), attest.IdentityChanged)
	check("other key", other(func(c *ledger.Config) { c.LogKey = newKey(t) }), attest.CheckpointInvalid)
	check("no key", other(func(c *ledger.Config) { c.LogKey = nil }), attest.BadConfig)
	check("origin that no note can name", other(func(c *ledger.Config) { c.Origin = "a b" }), attest.BadConfig)
	_, err = ledger.Fsck(t.Context(), other(func(c *ledger.Config) { c.Dir = t.TempDir() }))
	wantReason(t, "fsck of nothing", err, attest.NotInitialised)
	wantReason(t, "rebuild of nothing", ledger.Rebuild(t.Context(), other(func(c *ledger.Config) { c.Dir = t.TempDir() })), attest.NotInitialised)

	// A log whose database was lost must be restored, not begun anew.
	if err := os.Remove(filepath.Join(k.cfg.Dir, "hallmark.db")); err != nil {
		t.Fatal(err)
	}
	wantReason(t, "init over a log with entries", ledger.Init(t.Context(), k.cfg), attest.AlreadyExists)
}

func TestRebuildEquals(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	c := k.credential("1")
	k.append(l, k.signing(c, 1, "1")...)
	k.append(l, k.policy(1, 1))
	p := k.append(l, k.promotion(1, "test", 1, zero, 2))[0]
	k.append(l, k.effect(1, p.ID, "test", attest.EffectDone))
	k.append(l, k.promotion(2, "test", 1, p.ID, 2), k.promotion(3, "test", 1, p.ID, 2))
	tasks, err := l.Tasks(t.Context(), "", start, 100)
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	if err := l.TaskDone(t.Context(), tasks[0]); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, l)
	k.fsck(l)
	if err := ledger.Rebuild(t.Context(), k.cfg); err != nil {
		t.Fatal(err)
	}
	l = k.open()
	if diff := cmp.Diff(before, snapshot(t, l), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("rebuild changed:\n%s", diff)
	}
	k.fsck(l)
}

// state is all that a ledger answers.
type state struct {
	Size    uint64
	Policy  attest.PolicyChange
	List    []ledger.Meta
	Records []sums
	Stages  []ledger.StageState
	History [][]ledger.Promotion
	Keys    []attest.RecordID
	Tasks   []ledger.Task
}

// sums stands for a record: comparing kilobytes of bytes one by one takes long.
type sums struct {
	ID, What, Where string
}

func sum(r attest.Record) sums {
	return sums{r.ID.String(), hash(r.Envelope, r.Facts), hash(r.Index, r.TreeSize, r.Checkpoint, r.Proof)}
}

func hash(v ...any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return attest.Hash(b).Short()
}

func snapshot(tb testing.TB, l *ledger.Ledger) state {
	tb.Helper()
	ctx := tb.Context()
	var s state
	var err error
	check := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	s.Size = l.Size()
	s.Policy, _ = l.Policy()
	s.List, err = l.Find(ctx, ledger.Query{Limit: 1000})
	check(err)
	for _, m := range s.List {
		r, err := l.Get(ctx, m.ID)
		check(err)
		s.Records = append(s.Records, sum(r))
		if m.Key != "" {
			id, _, err := l.ByKey(ctx, m.Key)
			check(err)
			s.Keys = append(s.Keys, id)
		}
	}
	s.Stages, err = l.Stages(ctx, ledger.StageState{}, 1000)
	check(err)
	for _, st := range s.Stages {
		h, err := l.Promotions(ctx, st.Track, st.Stage, st.Repository, 1000)
		check(err)
		s.History = append(s.History, h)
	}
	s.Tasks, err = l.Tasks(ctx, "", start, 1000)
	check(err)
	return s
}

// A new version of the facts rebuilds the index at the next start.
func TestIndexOfAnotherVersionIsRebuilt(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	k.append(l, k.signing(k.credential("1"), 1, "1")...)
	before := snapshot(t, l)
	k.close(l)
	k.sql(`UPDATE meta SET value = value - 1 WHERE name = 'facts_version'`)
	k.sql(`UPDATE records SET kind = 0`)
	l = k.open()
	if diff := cmp.Diff(before, snapshot(t, l), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the rebuilt index differs:\n%s", diff)
	}
	k.fsck(l)
}
