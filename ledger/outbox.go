package ledger

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// TaskKind says what is to be done.
type TaskKind string

// The kinds of task.
const (
	TaskAttach  TaskKind = "attach"  // attach Record's bundle to Ref
	TaskPromote TaskKind = "promote" // bring the promotion Record into effect
)

// Task is work outside this process that a record asks for. Tasks are made with
// the record, in the same transaction, and stay until TaskDone; doing one twice
// must be harmless.
type Task struct {
	Kind      TaskKind
	Record    attest.RecordID
	Ref       attest.ImageRef
	Attempts  int       // that failed so far
	NotBefore time.Time // of the next attempt, UTC, in seconds
	LastError string
}

const taskColumns = `kind, leaf, repository, digest, attempts, not_before, last_error`

// addTask makes a task, once.
func (t *txn) addTask(kind TaskKind, id attest.RecordID, ref attest.ImageRef) error {
	_, err := t.exec(`INSERT INTO tasks (`+taskColumns+`) VALUES ($1, $2, $3, $4, 0, 0, '') ON CONFLICT (leaf, kind, repository, digest) DO NOTHING`,
		string(kind), id[:], string(ref.Repository), ref.Digest[:])
	return err
}

// Tasks returns the tasks of a kind, "" for any, that are due at now, the longest
// waiting first.
func (l *Ledger) Tasks(ctx context.Context, kind TaskKind, now time.Time, limit int) ([]Task, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	var out []Task
	err := l.index.each(ctx, `SELECT `+taskColumns+` FROM tasks WHERE not_before <= $1 AND ($2 = '' OR kind = $2)
		ORDER BY not_before, leaf, kind, repository, digest LIMIT $3`, []any{now.Unix(), string(kind), limit}, func(scan func(...any) error) error {
		var task Task
		var kind, repo string
		var leaf, digest []byte
		var at int64
		if err := scan(&kind, &leaf, &repo, &digest, &task.Attempts, &at, &task.LastError); err != nil {
			return err
		}
		if len(leaf) != len(task.Record) || len(digest) != len(task.Ref.Digest) {
			return fmt.Errorf("task of kind %s has a key of %d and %d bytes", kind, len(leaf), len(digest))
		}
		task.Kind, task.Record, task.NotBefore = TaskKind(kind), attest.RecordID(leaf), time.Unix(at, 0).UTC()
		task.Ref = attest.ImageRef{Repository: attest.Repository(repo), Digest: attest.Digest(digest)}
		out = append(out, task)
		return nil
	})
	return out, unavailable("reading tasks", err)
}

// TaskDone forgets a task. A task that is gone already is no error.
func (l *Ledger) TaskDone(ctx context.Context, task Task) error {
	if err := l.ready(); err != nil {
		return err
	}
	return unavailable("ending a task", l.index.update(ctx, func(t *txn) error {
		_, err := t.exec(`DELETE FROM tasks WHERE leaf = $1 AND kind = $2 AND repository = $3 AND digest = $4`,
			task.Record[:], string(task.Kind), string(task.Ref.Repository), task.Ref.Digest[:])
		return err
	}))
}

// TaskLater counts a failed attempt: the task is due again at the given time.
// why is shown to operators and must hold no secret.
func (l *Ledger) TaskLater(ctx context.Context, task Task, at time.Time, why string) error {
	if err := l.ready(); err != nil {
		return err
	}
	return unavailable("postponing a task", l.index.update(ctx, func(t *txn) error {
		_, err := t.exec(`UPDATE tasks SET attempts = attempts + 1, not_before = $1, last_error = $2
			WHERE leaf = $3 AND kind = $4 AND repository = $5 AND digest = $6`,
			at.Unix(), clipTo(why, 500), task.Record[:], string(task.Kind), string(task.Ref.Repository), task.Ref.Digest[:])
		return err
	}))
}

// TaskPending returns the number of tasks of a record that are not done.
func (l *Ledger) TaskPending(ctx context.Context, id attest.RecordID) (int, error) {
	if err := l.ready(); err != nil {
		return 0, err
	}
	var n int
	err := l.index.row(ctx, `SELECT count(*) FROM tasks WHERE leaf = $1`, []any{id[:]}, &n)
	return n, unavailable("counting tasks", err)
}

// Wake receives a value when new tasks were made since it was last received
// from. Tasks that are due later, or were there before Open, send none.
func (l *Ledger) Wake() <-chan struct{} { return l.wake }

// attachRefs returns the images that a statement is attached to: its subjects, by
// their names. Subjects that are no image, such as a policy, are left out, and so
// are those of a verification summary, which have no name: the gate attaches it
// once its promotion took effect.
func attachRefs(e attest.Envelope) []attest.ImageRef {
	var st attest.Statement
	if e.PayloadType != attest.InTotoPayload || json.Unmarshal(e.Payload, &st) != nil {
		return nil
	}
	var out []attest.ImageRef
	for _, sub := range st.Subject {
		repo, err := attest.ParseRepository(sub.Name)
		if err != nil {
			continue
		}
		d, err := attest.ParseHex(sub.Digest["sha256"])
		if err != nil {
			continue
		}
		out = append(out, attest.ImageRef{Repository: repo, Digest: d})
	}
	return out
}

func clipTo(s string, most int) string {
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
