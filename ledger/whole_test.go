package ledger_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	tilesnote "github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

// filled returns a ledger with seven records: a precertificate, then three times
// a signature and a provenance.
func filled(t *testing.T) (*kit, *ledger.Ledger, []attest.Record) {
	t.Helper()
	k := newKit(t)
	l := k.open()
	c := k.credential("1")
	out := k.append(l, ledger.Entry{Envelope: c.precertificate})
	for n := range 3 {
		out = append(out, k.append(l, k.signing(c, n, "1")[1:]...)...)
	}
	return k, l, out
}

// takeAside copies a table, so that damage to it can be undone.
func (k *kit) takeAside(table string) (restore func()) {
	k.tb.Helper()
	k.sqlAny("CREATE TABLE aside AS SELECT * FROM " + table)
	return func() {
		k.tb.Helper()
		k.sql("INSERT OR REPLACE INTO " + table + " SELECT * FROM aside")
	}
}

// K09: whatever is done to the stored envelopes behind the service's back is
// found while it runs, everything is refused until it is undone, and then the
// ledger answers again by itself.
func TestDamageIsFoundAndRepaired(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, table, damage string }{
		{"K09 envelope deleted", "envelopes", `DELETE FROM envelopes WHERE leaf = $1`},
		{"K09 all envelopes deleted", "envelopes", `DELETE FROM envelopes WHERE length(leaf) = length($1)`},
		{"K09 envelope exchanged", "envelopes", `UPDATE envelopes SET content = (SELECT o.content FROM envelopes o WHERE o.seq = 2) WHERE leaf = $1`},
		{"K09 envelope is none", "envelopes", `UPDATE envelopes SET content = x'00' WHERE leaf = $1`},
		{"K09 packed in an unknown way", "envelopes", `UPDATE envelopes SET packing = 2 WHERE leaf = $1`},
		{"K09 key for certificate", "envelopes", `UPDATE envelopes SET certified = 0 WHERE leaf = $1`},
		{"K09 envelope under another leaf", "envelopes", `UPDATE envelopes SET leaf = x'00' WHERE leaf = $1`},
		{"K09 deleted, and a stranger put in", "envelopes", `UPDATE envelopes SET leaf = randomblob(32), seq = seq + 1000 WHERE leaf = $1`},
		{"K09 certificate deleted", "signers", `DELETE FROM signers WHERE id = (SELECT signer FROM envelopes WHERE leaf = $1)`},
		{"K09 certificate exchanged", "signers", `UPDATE signers SET der = (SELECT o.der FROM signers o WHERE o.id <> signers.id) WHERE id = (SELECT signer FROM envelopes WHERE leaf = $1)`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			k, l, records := filled(t)
			victim := records[4]
			k.append(l, k.policy(1, 1))
			if _, ok := l.Policy(); !ok {
				t.Fatal("no policy: the test shows nothing")
			}
			restore := k.takeAside(row.table)
			k.sql(row.damage, victim.ID[:])
			await(t, l, attest.LedgerIncomplete) // the check finds it, unasked
			for name, err := range refusals(t, l, victim) {
				wantReason(t, name, err, attest.LedgerIncomplete)
			}
			if _, ok := l.Policy(); ok {
				t.Error("Policy answers")
			}
			restore()
			await(t, l, "")
			if got, err := l.Get(t.Context(), victim.ID); err != nil || !bytes.Equal(got.Payload, victim.Payload) {
				t.Errorf("after the repair: %v", err)
			}
			k.append(l, k.signed(99))
			k.close(l)
			k.sqlAny(`DELETE FROM envelopes WHERE seq > 1000`)
			k.fsck(nil)
		})
	}
}

// Reading a record finds damage at once, and so does a start.
func TestDamageIsFoundByGetAndOpen(t *testing.T) {
	t.Parallel()
	k, l, records := filled(t)
	k.close(l)
	k.cfg.CheckInterval = 1 << 40 // never by itself
	l = k.open()
	restore := k.takeAside("envelopes")
	k.sql(`DELETE FROM envelopes WHERE leaf = $1`, records[2].ID[:])
	if err := l.Err(); err != nil {
		t.Fatalf("found before it was looked for: %v", err)
	}
	_, err := l.Get(t.Context(), records[2].ID)
	wantReason(t, "K09 Get", err, attest.LedgerIncomplete)
	if !strings.Contains(fmt.Sprint(err), "log entry 2 ") {
		t.Errorf("%v does not name the entry", err)
	}
	_, err = l.Get(t.Context(), records[1].ID)
	wantReason(t, "K09 Get of another record", err, attest.LedgerIncomplete)
	k.close(l)

	l = k.open()
	wantReason(t, "K09 after a start", l.Err(), attest.LedgerIncomplete)
	_, err = l.Append(t.Context(), k.signed(5))
	wantReason(t, "K09 Append after a start", err, attest.LedgerIncomplete)
	k.problems(l, "log entry 2 has no envelope")
	l = k.open()
	restore()
	await(t, l, "")
	k.append(l, k.signed(5))
	k.fsck(l)
}

// A start counts what is stored: it finds that something is missing, however
// far back, without reading it all.
func TestStartCounts(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	k.cfg.CheckInterval = 1 << 40
	l := k.open()
	batch := make([]ledger.Entry, 250)
	for i := range batch {
		batch[i] = k.signed(i)
	}
	k.append(l, batch...)
	records := k.append(l, k.signing(k.credential("1"), 1, "1")...)
	for table, damage := range map[string]string{
		"envelopes": `DELETE FROM envelopes WHERE leaf = $1`,
		"signers":   `DELETE FROM signers WHERE id = (SELECT signer FROM envelopes WHERE leaf = $1)`,
	} {
		k.close(l)
		k.sqlAny(`DROP TABLE IF EXISTS aside`)
		restore := k.takeAside(table)
		k.sql(damage, records[1].ID[:])
		l = k.open()
		wantReason(t, "K09 "+table, l.Err(), attest.LedgerIncomplete)
		if !strings.Contains(fmt.Sprint(l.Err()), "log entry 251 ") {
			t.Errorf("%v does not name the first entry", l.Err())
		}
		restore()
		await(t, l, "")
	}
	k.fsck(l)
}

// problems closes the ledger and expects fsck to find something that has text.
func (k *kit) problems(l *ledger.Ledger, text string) {
	k.tb.Helper()
	if l != nil {
		k.close(l)
	}
	r, err := ledger.Fsck(k.tb.Context(), k.cfg)
	if err != nil {
		k.tb.Fatal(err)
	}
	if all := strings.Join(r.Problems, "\n"); !strings.Contains(all, text) || all == "" {
		k.tb.Errorf("fsck finds %q, want %q", all, text)
	}
}

// A gap that sync meets stops it there; nothing but the envelope closes it.
func TestGapBeforeSync(t *testing.T) {
	t.Parallel()
	k, l, records := filled(t)
	k.close(l)
	restore := k.takeAside("envelopes")
	k.sql(`DELETE FROM envelopes WHERE leaf = $1`, records[4].ID[:])
	wantReason(t, "K09 rebuild over a gap", ledger.Rebuild(t.Context(), k.cfg), attest.LedgerIncomplete)
	l = k.open()
	wantReason(t, "K09 gap", l.Err(), attest.LedgerIncomplete)
	if l.Size() > 4 {
		t.Errorf("size %d: entries behind the gap were taken in", l.Size())
	}
	for name, err := range refusals(t, l, records[0]) {
		wantReason(t, name, err, attest.LedgerIncomplete)
	}
	restore()
	await(t, l, "")
	if l.Size() != 7 {
		t.Errorf("size %d, want 7", l.Size())
	}
	k.append(l, k.signed(7))
	k.fsck(l)
}

// copyDir puts a copy of a directory in place of another.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Log and database of different backups.
func TestLogAndDatabaseOfDifferentTimes(t *testing.T) {
	t.Parallel()
	k, l, records := filled(t)
	k.close(l)
	then, now, fork := filepath.Join(t.TempDir(), "then"), filepath.Join(t.TempDir(), "now"), filepath.Join(t.TempDir(), "fork")
	copyDir(t, k.cfg.Dir, then)
	l = k.open()
	last := k.append(l, k.signed(50))[0]
	k.close(l)
	copyDir(t, k.cfg.Dir, now)
	// The old backup was taken into service and has grown past the other.
	copyDir(t, then, k.cfg.Dir)
	l = k.open()
	k.append(l, k.signed(51), k.signed(52))
	k.close(l)
	copyDir(t, k.cfg.Dir, fork)

	combine := func(log, database string) {
		t.Helper()
		copyDir(t, filepath.Join(log, "log"), filepath.Join(k.cfg.Dir, "log"))
		copyFile(t, filepath.Join(database, "hallmark.db"), filepath.Join(k.cfg.Dir, "hallmark.db"))
	}
	refused := func(name string, want attest.Reason) {
		t.Helper()
		before, err := os.ReadFile(filepath.Join(k.cfg.Dir, "log", "checkpoint"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = ledger.Open(t.Context(), k.cfg)
		wantReason(t, name, err, want)
		if after, err := os.ReadFile(filepath.Join(k.cfg.Dir, "log", "checkpoint")); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: the log was written to: %v", name, err)
		}
	}
	combine(then, now)
	refused("F04 the log was rolled back", attest.LedgerBehind)
	wantReason(t, "F04 rebuild", ledger.Rebuild(t.Context(), k.cfg), attest.LedgerBehind)
	combine(fork, now)
	refused("F04 the log was rolled back and has grown again", attest.LedgerBehind)
	combine(now, now)
	if err := os.RemoveAll(filepath.Join(k.cfg.Dir, "log")); err != nil {
		t.Fatal(err)
	}
	_, err := ledger.Open(t.Context(), k.cfg)
	wantReason(t, "F04 the log is gone", err, attest.LedgerBehind)

	// K10, F16: an entry whose envelope this database never had.
	combine(now, then)
	l = k.open()
	wantReason(t, "K10 the database is older than the log", l.Err(), attest.LedgerIncomplete)
	k.problems(l, "log entry 7 has no envelope")

	combine(now, now)
	l = k.open()
	for _, r := range append(records, last) {
		if got, err := l.Get(t.Context(), r.ID); err != nil || !bytes.Equal(got.Checkpoint, r.Checkpoint) {
			t.Errorf("after the restore: record %d: %v", r.Index, err)
		}
	}
	k.fsck(l)
}

// addToLog adds entries to the log without the ledger, as whoever holds the log
// key and the disk could, or a crash between the log's write and its answer.
func (k *kit) addToLog(bodies ...[]byte) {
	k.tb.Helper()
	s, err := signature.LoadECDSASigner(k.log, crypto.SHA256)
	if err != nil {
		k.tb.Fatal(err)
	}
	signer, err := tilesnote.NewNoteSigner(k.tb.Context(), origin, s)
	if err != nil {
		k.tb.Fatal(err)
	}
	driver, err := posix.New(k.tb.Context(), posix.Config{Path: filepath.Join(k.cfg.Dir, "log")})
	if err != nil {
		k.tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(k.tb.Context())
	defer cancel()
	appender, shutdown, _, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().WithCheckpointSigner(signer).
		WithBatching(1, time.Millisecond).WithCheckpointInterval(100*time.Millisecond).WithCheckpointRepublishInterval(0))
	if err != nil {
		k.tb.Fatal(err)
	}
	for _, b := range bodies {
		if _, err := appender.Add(ctx, tessera.NewEntry(b))(); err != nil {
			k.tb.Fatal(err)
		}
	}
	if err := shutdown(ctx); err != nil {
		k.tb.Fatal(err)
	}
}

// F11: an entry that is in the log twice is one record, the first.
func TestEntryTwiceInTheLog(t *testing.T) {
	t.Parallel()
	k, l, records := filled(t)
	k.append(l, k.policy(1, 1))
	p := k.append(l, k.promotion(1, "test", 1, zero, 0))[0]
	k.append(l, k.effect(1, p.ID, "test", attest.EffectFail))
	before := snapshot(t, l)
	k.close(l)
	// The promotion again: a second time it would win.
	k.addToLog(records[3].LogEntry(), p.LogEntry())
	l = k.open()
	if l.Size() != 12 {
		t.Fatalf("size %d, want 12", l.Size())
	}
	_, err := l.At(t.Context(), 10)
	wantReason(t, "F11 the second entry", err, attest.RecordNotFound)
	after := snapshot(t, l)
	after.Size = before.Size
	if diff := cmp.Diff(before, after, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("F11 the second entry changed:\n%s", diff)
	}
	k.append(l, k.signed(50))
	if r := k.fsck(l); r.Records != 11 || r.Size != 13 {
		t.Errorf("fsck: %+v", r)
	}
}

// F16: an entry that nobody asked this service for.
func TestForeignEntry(t *testing.T) {
	t.Parallel()
	k, l, _ := filled(t)
	k.close(l)
	stranger := k.signed(70)
	k.addToLog(stranger.LogEntry())
	l = k.open()
	wantReason(t, "F16", l.Err(), attest.LedgerIncomplete)
	if !strings.Contains(fmt.Sprint(l.Err()), "log entry 7 has no envelope") {
		t.Errorf("%v does not name the entry", l.Err())
	}
	k.problems(l, "log entry 7 has no envelope")
}

// sealed signs a checkpoint text with the log's key or another.
func sealed(t *testing.T, text string, key *ecdsa.PrivateKey, names ...string) string {
	t.Helper()
	var signers []note.Signer
	for _, name := range names {
		s, err := signature.LoadECDSASigner(key, crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		n, err := tilesnote.NewNoteSigner(t.Context(), name, s)
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, n)
	}
	out, err := note.Sign(&note.Note{Text: text}, signers...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// flip changes one base64 digit.
func flip(s string, at int) string {
	other := "A"
	if s[at] == 'A' {
		other = "B"
	}
	return s[:at] + other + s[at+1:]
}

func TestForgedCheckpoints(t *testing.T) {
	t.Parallel()
	k, l, _ := filled(t)
	good, err := l.Read(t.Context(), "checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	k.close(l)
	path := filepath.Join(k.cfg.Dir, "log", "checkpoint")
	text, sig, _ := strings.Cut(string(good), "\n\n")
	text += "\n"
	lines := strings.Split(text, "\n")
	other := newKey(t)
	for _, row := range []struct {
		name, note string
		want       attest.Reason
	}{
		{"F06 empty", "", attest.IdentityChanged},
		{"F06 no signature", text, attest.CheckpointInvalid},
		{"F06 no signature line", text + "\n", attest.CheckpointInvalid},
		{"F06 size altered", strings.Replace(string(good), "\n7\n", "\n8\n", 1), attest.CheckpointInvalid},
		{"F06 root altered", strings.Replace(string(good), lines[2], flip(lines[2], 3), 1), attest.CheckpointInvalid},
		{"F06 signature altered", text + "\n" + flip(sig, len(sig)/2), attest.CheckpointInvalid},
		{"F06 another key", sealed(t, text, other, origin), attest.CheckpointInvalid},
		{"F06 another origin, our key", sealed(t, strings.Replace(text, origin, "evil.example.com", 1), k.log, "evil.example.com"), attest.IdentityChanged},
		{"F06 another origin under our name", sealed(t, strings.Replace(text, origin, "evil.example.com", 1), k.log, origin), attest.IdentityChanged},
		{"F06 our origin under another name", sealed(t, text, k.log, "evil.example.com"), attest.CheckpointInvalid},
		{"F06 leading zero", sealed(t, strings.Replace(text, "\n7\n", "\n07\n", 1), k.log, origin), attest.CheckpointInvalid},
		{"F06 sign", sealed(t, strings.Replace(text, "\n7\n", "\n+7\n", 1), k.log, origin), attest.CheckpointInvalid},
		{"F06 short root", sealed(t, origin+"\n7\nAAAA\n", k.log, origin), attest.CheckpointInvalid},
		{"F06 root that is no base64", sealed(t, origin+"\n7\n!\n", k.log, origin), attest.CheckpointInvalid},
		{"F06 line too many", sealed(t, text+"more\n", k.log, origin), attest.CheckpointInvalid},
		{"F06 line too few", sealed(t, origin+"\n7\n", k.log, origin), attest.CheckpointInvalid},
		{"F02 unsigned line after the signature", string(good) + "more\n", attest.CheckpointInvalid},
		{"F02 a signature of nobody we know", string(good) + strings.SplitN(sealed(t, text, other, "witness.example.com"), "\n\n", 2)[1], attest.CheckpointInvalid},
		{"F02 our signature twice", string(good) + sig, attest.CheckpointInvalid},
		{"F06 CRLF", strings.ReplaceAll(string(good), "\n", "\r\n"), attest.IdentityChanged},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.note == string(good) {
				t.Fatal("the note was not altered: the row shows nothing")
			}
			if err := os.WriteFile(path, []byte(row.note), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := ledger.Open(t.Context(), k.cfg)
			wantReason(t, row.name, err, row.want)
			k.problems(nil, "checkpoint: "+string(row.want))
		})
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	// While it runs it is refused as well, until the log's own is back.
	l = k.open()
	if err := os.WriteFile(path, []byte(sealed(t, text, other, origin)), 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, l, attest.CheckpointInvalid)
	_, err = l.Append(t.Context(), k.signed(60))
	wantReason(t, "F06 Append under a forged checkpoint", err, attest.CheckpointInvalid)
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, l, "")
	k.fsck(l)
}

// F01, F05: bits that flip in the log's files.
func TestAlteredLogFiles(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	batch := make([]ledger.Entry, 256)
	for i := range batch {
		batch[i] = k.signed(i)
	}
	records := k.append(l, batch...)
	k.append(l, k.signed(300))
	k.close(l)
	alter := func(name string, at int) (restore func()) {
		t.Helper()
		path := filepath.Join(k.cfg.Dir, "log", filepath.FromSlash(name))
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		altered := bytes.Clone(data)
		altered[at] ^= 1
		if err := os.WriteFile(path, altered, 0o600); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}

	restore := alter("tile/0/000", 32*9)
	l = k.open()
	_, err := l.Get(t.Context(), records[8].ID) // its sibling is wrong
	wantReason(t, "F01 F08 tile altered", err, attest.LogProofInvalid)
	k.problems(l, "hash tile tile/0/000 does not follow from the entries")
	restore()

	restore = alter("tile/1/000.p/1", 3)
	_, err = ledger.Open(t.Context(), k.cfg)
	wantReason(t, "F01 upper tile altered", err, attest.LedgerBehind)
	k.problems(nil, "hash tile tile/1/000.p/1 does not follow from the entries")
	restore()

	// Entries that have their envelopes, in another order than was signed.
	restore = alter("tile/entries/000", 0)
	swapFirst(t, filepath.Join(k.cfg.Dir, "log", "tile", "entries", "000"))
	k.problems(nil, "the entries do not hash to the root")
	wantReason(t, "F05 rebuild from swapped entries", ledger.Rebuild(t.Context(), k.cfg), attest.LedgerIncomplete)
	restore()

	restore = alter("tile/entries/000", 1000)
	k.problems(nil, "has no envelope")
	wantReason(t, "F05 rebuild from altered entries", ledger.Rebuild(t.Context(), k.cfg), attest.LedgerIncomplete)
	restore()
	l = k.open()
	if err := l.Err(); err != nil {
		t.Errorf("after the restore: %v", err)
	}
	k.fsck(l)
}

// swapFirst exchanges the first two entries of a bundle whose first byte was
// altered.
func swapFirst(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[0] ^= 1
	one := 2 + int(data[0])<<8 + int(data[1])
	two := one + 2 + int(data[one])<<8 + int(data[one+1])
	out := slices.Concat(data[one:two], data[:one], data[two:])
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

// K09: rows of the index are never believed where the envelope can be asked, and
// fsck finds each that is not what follows from the log; rebuild repairs them.
func TestAlteredIndex(t *testing.T) {
	t.Parallel()
	k, l, records := filled(t)
	k.append(l, k.policy(1, 1))
	p := k.append(l, k.promotion(1, "test", 1, zero, 0))[0]
	k.append(l, k.effect(1, p.ID, "test", attest.EffectFail))
	k.fsck(l)
	for _, row := range []struct{ statement, finds string }{
		{`UPDATE records SET kind = (SELECT kind FROM records WHERE idx = 2) WHERE idx = 1`, "record 1 is in the index, but does not follow from the log"},
		{`UPDATE records SET time = time + 1 WHERE idx = 3`, "record 3 follows from the log, but is not in the index"},
		{`UPDATE records SET tree_size = 7 WHERE idx = 1`, "record 1 "},
		{`UPDATE records SET key = x'00' WHERE idx = 1`, "record 1 "},
		{`DELETE FROM records WHERE idx = 6`, "1 envelopes that no Append stored"},
		{`DELETE FROM facets WHERE idx = 2 AND term = (SELECT min(term) FROM facets WHERE idx = 2)`, "a facet of record 2 follows"},
		{`INSERT INTO facets SELECT term, kind, 0 FROM facets WHERE idx = 2`, "a facet of record 0 is in the index"},
		{`UPDATE terms SET value = value || 'x' WHERE id = (SELECT max(id) FROM terms)`, "the text "},
		{`UPDATE requests SET idx = 1 WHERE idx = 2`, "the natural key of record 1"},
		{`DELETE FROM requests WHERE idx = 4`, "the natural key of record 4 follows"},
		{`UPDATE promotions SET state = 'DONE'`, "promotion 8 "},
		{`UPDATE promotions SET why = ''`, "promotion 8 "},
		{`UPDATE stages SET head = (SELECT leaf FROM promotions)`, "payments/test of "},
		{`UPDATE meta SET value = value + 9 WHERE name = 'newest'`, "the value of newest"},
		{`UPDATE meta SET value = 0 WHERE name = 'policy'`, "the value of policy"},
		{`UPDATE meta SET value = 100 WHERE name = 'synced'`, "the log was rolled back"},
		{`INSERT INTO envelopes SELECT 99, x'00', signer, certified, attach, packing, content FROM envelopes WHERE seq = 1`, "1 envelopes that no Append stored"},
	} {
		t.Run(row.statement, func(t *testing.T) {
			aside := filepath.Join(t.TempDir(), "aside")
			copyFile(t, filepath.Join(k.cfg.Dir, "hallmark.db"), aside)
			k.sql(row.statement)
			k.problems(nil, row.finds)
			if strings.Contains(row.statement, "INTO envelopes") {
				k.sql(`DELETE FROM envelopes WHERE seq = 99`) // a rebuild deletes no envelope
			}
			if err := ledger.Rebuild(t.Context(), k.cfg); err != nil {
				t.Fatal(err)
			}
			k.fsck(nil)
			copyFile(t, aside, filepath.Join(k.cfg.Dir, "hallmark.db"))
		})
	}

	k.sql(`UPDATE records SET kind = (SELECT kind FROM records WHERE idx = 2), time = 0, facets = x'' WHERE idx = 1`)
	l = k.open()
	if r, err := l.Get(t.Context(), records[1].ID); err != nil || r.Kind != attest.KindSignature || len(r.Facets) == 0 {
		t.Errorf("K09 Get believes the index: %s, %v", r.Kind, err)
	}
	k.close(l)
	if err := ledger.Rebuild(t.Context(), k.cfg); err != nil {
		t.Fatal(err)
	}
	k.sql(`UPDATE checkpoints SET note = (SELECT o.note FROM checkpoints o WHERE o.size = $1) WHERE size = $2`, records[5].TreeSize, records[3].TreeSize)
	k.sql(`UPDATE checkpoints SET note = replace(note, 'example', 'elpmaxe') WHERE size = $1`, records[1].TreeSize)
	l = k.open()
	_, err := l.Get(t.Context(), records[1].ID)
	wantReason(t, "K09 stored checkpoint altered", err, attest.IdentityChanged)
	_, err = l.Get(t.Context(), records[3].ID)
	wantReason(t, "K09 stored checkpoint exchanged", err, attest.CheckpointInvalid)
	k.close(l)
}

// fsck is the oracle of the tests, so it is tested to see what it is to find.
func TestFsckFindsUnloggedCertificates(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	c := k.credential("1")
	work := k.signing(c, 1, "1")
	k.append(l, work[1]) // before its precertificate
	k.append(l, work[0])
	k.problems(l, "whose precertificate is not in the log before it")
}
