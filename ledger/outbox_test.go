package ledger_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

func TestTasks(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	img := image(1)
	img.Platforms = []attest.Platform{{Name: "linux/amd64", Digest: attest.Hash([]byte("amd64"))}, {Name: "linux/arm64", Digest: attest.Hash([]byte("arm64"))}}
	index, err := attest.SignatureStatement(img, "x")
	vsa, err2 := attest.VSAStatement(service, image(2), attest.Promotion{ResourceURI: "oci://registry.example.com/prod/api", Level: 2})
	if err2 != nil {
		t.Fatal(err2)
	}
	records := k.append(l,
		ledger.Entry{Envelope: k.sign(nil, index, err), Attach: true},
		ledger.Entry{Envelope: k.sign(nil, vsa, nil), Attach: true}, // names no repository
		k.signed(4), // not to be attached
		k.policy(1, 1),
		k.promotion(5, "test", 1, zero, 0),
		k.promotion(6, "test", 1, zero, 0), // loses
	)
	select {
	case <-l.Wake():
	default:
		t.Error("new tasks wake nobody")
	}
	ref := func(r attest.Repository, d attest.Digest) attest.ImageRef {
		return attest.ImageRef{Repository: r, Digest: d}
	}
	want := []ledger.Task{
		{Kind: ledger.TaskAttach, Record: records[0].ID, Ref: ref(repo, img.Ref.Digest)},
		{Kind: ledger.TaskAttach, Record: records[0].ID, Ref: ref(repo, img.Platforms[0].Digest)},
		{Kind: ledger.TaskAttach, Record: records[0].ID, Ref: ref(repo, img.Platforms[1].Digest)},
		{Kind: ledger.TaskPromote, Record: records[4].ID, Ref: image(5).Ref},
	}
	for i := range want {
		want[i].NotBefore = time.Unix(0, 0).UTC()
	}
	got := tasks(t, l, start)
	order := func(a, b ledger.Task) int {
		return strings.Compare(a.Record.String()+a.Ref.String(), b.Record.String()+b.Ref.String())
	}
	slices.SortFunc(got, order)
	slices.SortFunc(want, order)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("tasks:\n%s", diff)
	}

	if n, err := l.TaskPending(t.Context(), records[0].ID); n != 3 || err != nil {
		t.Errorf("%d open tasks, %v, want 3", n, err)
	}
	promote := got[slices.IndexFunc(got, func(t ledger.Task) bool { return t.Kind == ledger.TaskPromote })]
	if err := l.TaskLater(t.Context(), promote, start.Add(time.Minute), strings.Repeat("é", 400)); err != nil {
		t.Fatal(err)
	}
	for _, task := range got {
		if task.Kind == ledger.TaskAttach {
			if err := l.TaskDone(t.Context(), task); err != nil {
				t.Fatal(err)
			}
		}
	}
	if left := tasks(t, l, start); len(left) != 0 {
		t.Errorf("%v are due too early", left)
	}
	// Neither a restart nor a rebuild makes a task again, nor forgets one.
	k.fsck(l)
	if err := ledger.Rebuild(t.Context(), k.cfg); err != nil {
		t.Fatal(err)
	}
	l = k.open()
	left := tasks(t, l, start.Add(time.Minute))
	if len(left) != 1 || left[0].Kind != ledger.TaskPromote || left[0].Attempts != 1 || !left[0].NotBefore.Equal(start.Add(time.Minute)) || !strings.HasPrefix(left[0].LastError, "éé") {
		t.Errorf("left: %+v", left)
	}
	k.fsck(l)
}

func tasks(t *testing.T, l *ledger.Ledger, now time.Time) []ledger.Task {
	t.Helper()
	out, err := l.Tasks(t.Context(), "", now, 100)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
