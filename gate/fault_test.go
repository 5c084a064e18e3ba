package gate_test

import (
	"context"
	"database/sql"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/signer"
)

// openDB opens the ledger's database beside the service, as somebody would who
// can write the disk.
func openDB(t testing.TB, s *testkit.Stack) *sql.DB {
	t.Helper()
	at := url.URL{Scheme: "file", OmitHost: true, Path: filepath.Join(s.DataDir, "hallmark.db"), RawQuery: "_pragma=busy_timeout(10000)"}
	db, err := sql.Open("sqlite", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func execute(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.ExecContext(context.WithoutCancel(t.Context()), query, args...); err != nil {
		t.Errorf("%s: %v", query, err)
	}
}

// hook is a Step function that a test can exchange.
type hook struct{ at atomic.Pointer[func(string)] }

func (h *hook) set(f func(string)) { h.at.Store(&f) }
func (h *hook) step(name string) {
	if f := h.at.Load(); f != nil {
		(*f)(name)
	}
}

// at runs f when a step is taken, once.
func (h *hook) once(name string, f func()) {
	var done atomic.Bool
	h.set(func(step string) {
		if step == name && !done.Swap(true) {
			f()
		}
	})
}

// F10: what cannot be recorded is not released: neither to the caller nor to the
// registry, and when the ledger is well again the same request signs it.
func TestF10UnrecordedSignatureStaysInside(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		step   string // when it goes wrong
		fail   func(*testing.T, *testkit.Stack)
		repair func(*testing.T, *testkit.Stack)
		want   attest.Reason
	}{
		{
			"F10 the ledger is closed", "signed",
			func(t *testing.T, s *testkit.Stack) {
				if err := s.Ledger.Close(context.WithoutCancel(t.Context())); err != nil {
					t.Error(err)
				}
			},
			func(_ *testing.T, s *testkit.Stack) { s.Restart() },
			attest.ShuttingDown,
		},
		{
			"F10 envelopes cannot be stored", "signed",
			func(t *testing.T, s *testkit.Stack) { execute(t, openDB(t, s), `ALTER TABLE envelopes RENAME TO gone`) },
			func(t *testing.T, s *testkit.Stack) { execute(t, openDB(t, s), `ALTER TABLE gone RENAME TO envelopes`) },
			attest.LedgerUnavailable,
		},
		{
			"F10 the index cannot be written", "added",
			func(t *testing.T, s *testkit.Stack) { execute(t, openDB(t, s), `ALTER TABLE records RENAME TO gone`) },
			func(t *testing.T, s *testkit.Stack) { execute(t, openDB(t, s), `ALTER TABLE gone RENAME TO records`) },
			attest.LedgerUnavailable,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var h hook
			s := testkit.NewStack(t, testkit.Options{Step: h.step})
			img := s.PushApp("acme/api")
			h.once(row.step, func() { row.fail(t, s) })
			got, err := trySign(t, s, s.Token(nil), gate.SignImage{Ref: img.ImageRef})
			wantReason(t, err, row.want)
			if len(got.SignatureBundle)+len(got.ProvenanceBundle)+len(got.Signature.Envelope.Signature)+len(got.Provenance.Certificate) > 0 {
				t.Error("a signature escaped")
			}
			wantAttached(t, s, img.ImageRef)
			row.repair(t, s)
			again := sign(t, s, s.Token(nil), img.ImageRef)
			sameAnswer(t, again, sign(t, s, s.Token(nil), img.ImageRef))
			if again.Attach != gate.Attached {
				t.Errorf("attach %s", again.Attach)
			}
			fsck(t, s)
		})
	}
}

// F09: the record was made, but its caller never learnt. The same request again
// is answered by that record.
func TestF09LostAnswer(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		step string
	}{
		{"F09 the caller goes away while it is stored", "stored"},
		{"F09 the caller goes away while it is logged", "added"},
		{"F09 the caller goes away while it is indexed", "published"},
		{"F09 the caller goes away before the answer", "recorded"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var h hook
			s := testkit.NewStack(t, testkit.Options{Step: h.step})
			img := s.PushApp("acme/api")
			id := s.Identity(s.Token(nil))
			ctx, cancel := context.WithCancel(t.Context())
			h.once(row.step, cancel)
			// Whatever it answers, nobody hears it.
			_, _ = s.Gate.Sign(ctx, id, gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})
			if ctx.Err() == nil {
				t.Fatalf("the step %s was never taken", row.step)
			}
			again := sign(t, s, s.Token(nil), img.ImageRef)
			sameAnswer(t, again, sign(t, s, s.Token(nil), img.ImageRef))
			if n := len(find(t, s, attest.KindProvenance)); n != 1 {
				t.Errorf("%d provenance records", n)
			}
			wantAttached(t, s, img.ImageRef, again.SignatureBundle, again.ProvenanceBundle)
			fsck(t, s)
		})
	}
}

// F09: the log has the entry, and yet the caller was told LEDGER_UNAVAILABLE.
// Whoever repeats the request at once gets the record that is first in the log,
// and so does everybody after.
func TestF09ErrorThoughPersisted(t *testing.T) {
	t.Parallel()
	var h hook
	s := testkit.NewStack(t, testkit.Options{Step: h.step})
	img := s.PushApp("acme/api")
	db := openDB(t, s)
	h.once("added", func() { execute(t, db, `ALTER TABLE records RENAME TO gone`) })
	_, err := trySign(t, s, s.Token(nil), gate.SignImage{Ref: img.ImageRef})
	wantReason(t, err, attest.LedgerUnavailable)
	execute(t, db, `ALTER TABLE gone RENAME TO records`)
	again := sign(t, s, s.Token(nil), img.ImageRef)
	if all := find(t, s, attest.KindProvenance); len(all) != 1 || all[0].ID != again.Provenance.ID {
		t.Errorf("the request has %d records, and is answered with %d", len(all), again.Provenance.Index)
	}
	s.Restart()
	sameAnswer(t, again, sign(t, s, s.Token(nil), img.ImageRef))
	fsck(t, s)
}

// K09: an envelope that is gone is noticed, and everything is refused until it
// is back, also after a restart.
func TestK09DeletedEnvelope(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{
		Policy: policyOf(1, looseSigners, oneStage),
		Ledger: func(c *ledger.Config) { c.CheckInterval = 20 * time.Millisecond },
	})
	img, next := s.PushApp("acme/api"), s.PushApp("acme/api")
	signed := sign(t, s, s.Token(nil), img.ImageRef)
	promoted := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	db := openDB(t, s)
	signer, promoter, all := s.Identity(s.Token(nil)), s.Identity(s.PromoterToken()), auditor(s)

	calls := map[string]func(*gate.Gate) error{
		"Sign": func(g *gate.Gate) error {
			out, err := g.Sign(t.Context(), signer, gate.SignRequest{Images: []gate.SignImage{{Ref: next.ImageRef}}})
			if err == nil {
				err = out[0].Err
			}
			return err
		},
		"Attest": func(g *gate.Gate) error {
			_, err := g.Attest(t.Context(), signer, gate.AttestRequest{Ref: img.ImageRef, PredicateType: ourType, Predicate: []byte(`{}`)})
			return err
		},
		"Verify": func(g *gate.Gate) error {
			_, err := g.Verify(t.Context(), all, gate.VerifyRequest{Ref: img.ImageRef})
			return err
		},
		"Verify stage": func(g *gate.Gate) error {
			_, err := g.Verify(t.Context(), all, gate.VerifyRequest{Ref: img.ImageRef, Stage: "live"})
			return err
		},
		"Promote": func(g *gate.Gate) error {
			_, err := g.Promote(t.Context(), promoter, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
			return err
		},
		"Decision": func(g *gate.Gate) error { _, err := g.Decision(t.Context(), all, promoted.Number); return err },
		"Record":   func(g *gate.Gate) error { _, err := g.Record(t.Context(), all, signed.Signature.ID); return err },
		"Records":  func(g *gate.Gate) error { _, err := g.Records(t.Context(), all, gate.RecordsQuery{}); return err },
		"Artifact": func(g *gate.Gate) error { _, err := g.Artifact(t.Context(), all, img.ImageRef); return err },
		"Stages":   func(g *gate.Gate) error { _, _, err := g.Stages(t.Context(), all, gate.StagesQuery{}); return err },
	}
	everything := func(t *testing.T, g *gate.Gate, want attest.Reason) {
		t.Helper()
		for name, call := range calls {
			if got := attest.ReasonOf(call(g)); got != want {
				t.Errorf("%s is answered %q, want %q", name, got, want)
			}
		}
	}
	for _, row := range []struct {
		name string
		id   attest.RecordID
	}{
		{"K09 a provenance", signed.Provenance.ID},
		{"K09 a precertificate", find(t, s, attest.KindPrecertificate)[0].ID},
		{"K09 the policy", find(t, s, attest.KindPolicy)[0].ID},
	} {
		t.Run(row.name, func(t *testing.T) {
			everything(t, s.Gate, "")
			back := take(t, db, row.id)
			eventually(t, "the gap is noticed", func() bool { return s.Ledger.Err() != nil })
			everything(t, s.Gate, attest.LedgerIncomplete)
			if msg := s.Ledger.Err().Error(); !strings.Contains(msg, row.id.String()) {
				t.Errorf("it does not say which record is gone: %s", msg)
			}
			// The next start says so too, and serves nothing.
			s.Close()
			refusedToOpen(t, s)
			back()
			s.Restart()
			everything(t, s.Gate, "")

			back = take(t, db, row.id)
			eventually(t, "the gap is noticed", func() bool { return s.Ledger.Err() != nil })
			back()
			eventually(t, "the envelope is back", func() bool { return s.Ledger.Err() == nil })
			everything(t, s.Gate, "")
		})
	}
	fsck(t, s)
}

// take deletes an envelope and returns how to put it back.
func take(t *testing.T, db *sql.DB, id attest.RecordID) (back func()) {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), `SELECT * FROM envelopes WHERE leaf = $1`, id[:])
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil || !rows.Next() {
		t.Fatalf("no envelope of %s: %v", id, err)
	}
	values, into := make([]any, len(columns)), make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	if err := rows.Scan(into...); err != nil {
		t.Fatal(err)
	}
	rows.Close()
	execute(t, db, `DELETE FROM envelopes WHERE leaf = $1`, id[:])
	return func() {
		t.Helper()
		marks := strings.TrimSuffix(strings.Repeat("?,", len(columns)), ",")
		execute(t, db, `INSERT INTO envelopes (`+strings.Join(columns, ",")+`) VALUES (`+marks+`)`, values...)
	}
}

// refusedToOpen starts what is below the server on the stack's data.
func refusedToOpen(t *testing.T, s *testkit.Stack) {
	t.Helper()
	keys, err := signer.Open(signer.Config{Dir: filepath.Join(s.DataDir, "keys"), Service: s.URL, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	l, err := ledger.Open(t.Context(), ledger.Config{Dir: s.DataDir, Origin: keys.Origin(), LogKey: keys.LogKey()})
	if err != nil {
		wantReason(t, err, attest.LedgerIncomplete)
		return
	}
	defer l.Close(t.Context())
	cfg := s.Gate.Config
	cfg.Ledger, cfg.Signer = l, keys
	_, err = gate.Open(t.Context(), cfg)
	wantReason(t, err, attest.LedgerIncomplete)
}
