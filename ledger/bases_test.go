package ledger_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

const (
	debian = attest.Repository("registry.example.com/base/debian")
	source = "mirror.example.com/debian:12" // under which it is followed
)

func digest(name string, n int) attest.Digest { return attest.Hash(fmt.Appendf(nil, "%s %d", name, n)) }

// followed returns one platform of the nth version of debian:12.
func followed(n int, platform string, layers int) ledger.FollowedBase {
	return ledger.FollowedBase{
		BaseName: attest.BaseName{Repository: debian, Tag: "12", Digest: digest("index", n)},
		Platform: platform, Manifest: digest(platform, n), Prefix: digest("prefix "+platform, n), Layers: layers,
	}
}

func names(bases []ledger.FollowedBase) (out []string) {
	for _, b := range bases {
		out = append(out, fmt.Sprintf("%s %s %d", b.BaseName, b.Platform, b.Layers))
	}
	return out
}

func TestFollowedBases(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	ask := func(prefixes ...attest.Digest) []ledger.FollowedBase {
		t.Helper()
		out, err := l.FollowedBases(t.Context(), prefixes)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	put := func(at time.Time, bases ...ledger.FollowedBase) {
		t.Helper()
		if err := l.PutFollowed(t.Context(), source, at, bases); err != nil {
			t.Fatal(err)
		}
	}
	amd, arm := followed(1, "linux/amd64", 1), followed(1, "linux/arm64", 2)
	if out := ask(amd.Prefix); out != nil {
		t.Errorf("nothing is followed yet: %v", out)
	}
	put(start, amd, arm)
	put(start.Add(time.Hour), amd, arm)

	amd.FirstSeen, amd.LastCurrent = start, start.Add(time.Hour)
	if diff := cmp.Diff([]ledger.FollowedBase{amd}, ask(digest("other", 1), amd.Prefix)); diff != "" {
		t.Errorf("one platform:\n%s", diff)
	}

	// The tag moves to an index with the same layers for amd64: both are answers,
	// the current one first.
	moved := followed(2, "linux/amd64", 1)
	moved.Prefix = amd.Prefix
	put(start.Add(2*time.Hour), moved)
	want := names([]ledger.FollowedBase{moved, arm, amd})
	if diff := cmp.Diff(want, names(ask(amd.Prefix, arm.Prefix))); diff != "" {
		t.Errorf("the newest, then the deepest first:\n%s", diff)
	}

	if now, err := l.NewestFollowed(t.Context(), source); err != nil || !cmp.Equal(names(now), names([]ledger.FollowedBase{moved})) {
		t.Errorf("the tag named last: %v %v", names(now), err)
	}
	if now, err := l.NewestFollowed(t.Context(), "other"); err != nil || now != nil {
		t.Errorf("what nobody follows named last: %v %v", names(now), err)
	}

	// More prefixes than one statement takes, and too many.
	var many []attest.Digest
	for i := range 1000 {
		many = append(many, digest("unknown", i))
	}
	if out := ask(append(many, arm.Prefix)...); len(out) != 1 {
		t.Errorf("among many prefixes: %v", names(out))
	}
	if _, err := l.FollowedBases(t.Context(), make([]attest.Digest, 1<<15+1)); attest.ReasonOf(err) != attest.TooLarge {
		t.Errorf("too many prefixes: %v", err)
	}

	// Followed under two names it is still one base.
	if err := l.PutFollowed(t.Context(), string(debian)+":12", start.Add(3*time.Hour), []ledger.FollowedBase{moved}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, names(ask(amd.Prefix, arm.Prefix))); diff != "" {
		t.Errorf("followed twice:\n%s", diff)
	}
	if err := l.Unfollow(t.Context(), []string{string(debian) + ":12"}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(names([]ledger.FollowedBase{moved}), names(ask(amd.Prefix, arm.Prefix))); diff != "" {
		t.Errorf("one of two is followed:\n%s", diff)
	}
	if err := l.Unfollow(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if out := ask(amd.Prefix, arm.Prefix); len(out) != 0 {
		t.Errorf("still followed: %v", names(out))
	}
	k.fsck(l)
}

// Of the digests that a tag named, the newest are kept.
func TestFollowedBasesAreBounded(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	var prefixes []attest.Digest
	for i := range 205 {
		b := followed(i, "linux/amd64", 1)
		prefixes = append(prefixes, b.Prefix)
		if err := l.PutFollowed(t.Context(), source, start.Add(time.Duration(i)*time.Hour), []ledger.FollowedBase{b}); err != nil {
			t.Fatal(err)
		}
	}
	out, err := l.FollowedBases(t.Context(), prefixes)
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != 200 || out[0].Digest != digest("index", 204) || out[199].Digest != digest("index", 5) {
		t.Errorf("%d versions are kept, from %v to %v", len(out), out[0].FirstSeen, out[len(out)-1].FirstSeen)
	}
}

func TestBaseStates(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	base := attest.Base{Repository: debian, Tag: "12", Digest: digest("index", 1), Platforms: []attest.BasePart{{Base: digest("amd", 1)}, {Base: digest("arm", 1)}}}
	put := func(b attest.Base, f attest.Freshness, after time.Duration) attest.BaseState {
		t.Helper()
		out, err := l.PutBaseState(t.Context(), b, attest.BaseState{Freshness: f, Current: digest("index", 2), Checked: start.Add(after)})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if _, found, err := l.BaseState(t.Context(), base); found || err != nil {
		t.Fatalf("nothing was checked: %v %v", found, err)
	}
	// What is not known interrupts nothing: it is the time of the first check that
	// said the same.
	for _, c := range []struct {
		after time.Duration
		state attest.Freshness
		since time.Duration
	}{
		{1, attest.Fresh, 1}, {2, attest.Fresh, 1}, {3, attest.StaleLayers, 3}, {4, attest.FreshnessUnknown, -1},
		{5, attest.StaleLayers, 3}, {6, attest.Fresh, 6}, {7, attest.StaleLayers, 7},
	} {
		got := put(base, c.state, c.after*time.Hour)
		want := start.Add(c.since * time.Hour)
		if c.since < 0 {
			want = time.Time{}
		}
		if !got.Since.Equal(want) {
			t.Errorf("%s after %d h: since %v, want %v", c.state, c.after, got.Since, want)
		}
	}
	want := attest.BaseState{Freshness: attest.StaleLayers, Current: digest("index", 2), Checked: start.Add(7 * time.Hour), Since: start.Add(7 * time.Hour)}
	swapped := base // an index lists its platforms in any order
	swapped.Platforms = []attest.BasePart{base.Platforms[1], base.Platforms[0]}
	got, found, err := l.BaseState(t.Context(), swapped)
	if diff := cmp.Diff(want, got); err != nil || !found || diff != "" {
		t.Errorf("%v %v\n%s", found, err, diff)
	}
	// An image on fewer of the base's platforms may be fresh while another is not.
	part := base
	part.Platforms = base.Platforms[:1]
	if _, found, _ := l.BaseState(t.Context(), part); found {
		t.Error("the state of other platforms was found")
	}
	put(part, attest.Fresh, 8*time.Hour)
	if got, _, _ := l.BaseState(t.Context(), base); got.Freshness != attest.StaleLayers {
		t.Errorf("the state of other platforms was changed: %v", got)
	}
	k.fsck(l)
}

// The side tables may go: the ledger opens without them, and makes them again.
func TestSideTablesMayBeLost(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(*kit){
		"one table": func(k *kit) { k.sqlAny(`DROP TABLE followed`) },
		"all":       func(k *kit) { k.sqlAny(`DROP TABLE followed`); k.sqlAny(`DROP TABLE base_states`) },
		"a database that never had them": func(k *kit) {
			k.sqlAny(`DROP TABLE followed`)
			k.sqlAny(`DROP TABLE base_states`)
			k.sql(`DELETE FROM meta WHERE name = 'side_version'`)
		},
		"tables of another version of them": func(k *kit) { k.sql(`UPDATE meta SET value = 0 WHERE name = 'side_version'`) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newKit(t)
			l := k.open()
			k.append(l, k.signing(k.credential("1"), 1, "1")...)
			b := followed(1, "linux/amd64", 1)
			if err := l.PutFollowed(t.Context(), source, start, []ledger.FollowedBase{b}); err != nil {
				t.Fatal(err)
			}
			before := snapshot(t, l)
			k.close(l)
			k.fsck(nil)
			lose(k)
			k.fsck(nil)
			l = k.open()
			if diff := cmp.Diff(before, snapshot(t, l)); diff != "" {
				t.Errorf("the ledger differs:\n%s", diff)
			}
			if out, err := l.FollowedBases(t.Context(), []attest.Digest{b.Prefix}); err != nil || len(out) != 0 {
				t.Errorf("%v %v", out, err)
			}
			if err := l.PutFollowed(t.Context(), source, start, []ledger.FollowedBase{b}); err != nil {
				t.Error(err)
			}
			k.fsck(l)
		})
	}
}
