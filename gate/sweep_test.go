package gate_test

import (
	"context"
	"database/sql"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// sweeping returns another gate on the stack's ledger that follows tags and sweeps
// when it is told to.
func sweeping(t *testing.T, s *testkit.Stack, c *clock, every time.Duration, follow ...string) *gate.Gate {
	t.Helper()
	cfg := s.Gate.Config
	cfg.Now, cfg.Images, cfg.Bases = c.Now, nil, gate.Bases{Every: every}
	for _, f := range follow {
		b, err := attest.ParseBaseTag(f)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Bases.Follow = append(cfg.Bases.Follow, b)
	}
	g, err := gate.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// pushSilently pushes an image on base that names no base.
func pushSilently(t *testing.T, s *testkit.Stack, base testkit.Pushed, repository string) testkit.Pushed {
	t.Helper()
	layer, err := random.Layer(256, types.OCILayer)
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(base.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	return s.Push(repository, "", img)
}

// onBase is a stage that asks for a base, and another that anybody signed may enter.
const onBase = oneStage + `  - name: checked
    after: live
    rules:
    - base_image: {allowed: ["REGISTRY/base/*"]}
`

// What a tag names is found in images that nobody says it of, also after the tag has
// moved, and not before the first sweep. It is in the provenance then: whatever becomes
// of the side tables, decisions stay what they are.
func TestSweepFindsBasesThatNobodyNames(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, onBase)})
	tag := s.Registry.Host() + "/base/debian:12"
	c := newClock()
	g := sweeping(t, s, c, time.Hour, tag)
	debian := s.PushBase("debian", "12")
	before := sign(t, s, s.Token(nil), pushSilently(t, s, debian, "acme/api").ImageRef)
	if before.Image.Base.Result != attest.Unclaimed {
		t.Errorf("before anything is followed: %+v", before.Image.Base)
	}

	next := g.Sweep(t.Context())
	if wait := next.Sub(c.Now()); wait < 59*time.Minute || wait > time.Hour {
		t.Errorf("the next round is in %v", wait)
	}
	app := pushSilently(t, s, debian, "acme/api")
	_, err := trySign(t, s, s.Token(nil), gate.SignImage{Ref: app.ImageRef, Base: "scratch"})
	wantReason(t, err, attest.BaseContradicted)
	signed := sign(t, s, s.Token(nil), app.ImageRef)
	if b := signed.Image.Base; b.Result != attest.Matched || b.Digest != debian.Digest || b.Tag != "12" || b.Result.Grade() != attest.GradeRegistry {
		t.Errorf("followed: %+v", b)
	}

	moved := s.PushBase("debian", "12")
	c.add(time.Hour)
	g.Sweep(t.Context())
	for name, base := range map[string]testkit.Pushed{"the tag's digest": moved, "the one before": debian} {
		if b := sign(t, s, s.Token(nil), pushSilently(t, s, base, "acme/api").ImageRef).Image.Base; b.Result != attest.Matched || b.Digest != base.Digest {
			t.Errorf("%s: %+v", name, b)
		}
	}

	// Both are decided with the side tables and without.
	done(t, s, gate.PromoteRequest{Ref: app.ImageRef, ToStage: "live", Version: "1"})
	plain := chainOf(t, s, auditor(s), app.ImageRef)
	loseSideTables(t, s)
	if diff := strings.Join(story(chainOf(t, s, auditor(s), app.ImageRef)), "\n"); diff != strings.Join(story(plain), "\n") {
		t.Errorf("without the side tables the chain is\n%s", diff)
	}
	done(t, s, gate.PromoteRequest{Ref: app.ImageRef, ToStage: "checked"})
	if again := sign(t, s, s.Token(nil), app.ImageRef); !again.Repeated || again.Image.Base.Result != attest.Matched {
		t.Errorf("the request repeated: %+v", again.Image.Base)
	}
	d := promote(t, s, gate.PromoteRequest{Ref: before.Image.Ref, ToStage: "live", Version: "2"})
	if d.Verdict != gate.Allowed {
		t.Fatal(d.Results)
	}
	wantDenied(t, promote(t, s, gate.PromoteRequest{Ref: before.Image.Ref, ToStage: "checked"}).Decision, attest.BaseUnproven)
	fsck(t, s)
}

// loseSideTables restarts the service without them.
func loseSideTables(t *testing.T, s *testkit.Stack) {
	t.Helper()
	s.Close()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(s.DataDir, "hallmark.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, table := range []string{"followed", "base_states"} {
		if _, err := db.ExecContext(t.Context(), "DROP TABLE "+table); err != nil {
			t.Fatal(err)
		}
	}
	s.Restart()
}

// A busy registry is left alone for as long as it says, and keeps no other waiting. A
// tag that did not move costs one HEAD request.
func TestSweepLeavesBusyRegistriesAlone(t *testing.T) {
	s, f := flakyStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	c := newClock()
	debian := s.PushBase("debian", "12")
	other := s.PushBase("alpine", "3")
	g := sweeping(t, s, c, time.Hour, f.addr+"/base/debian:12", f.addr+"/base/alpine:3", s.Registry.Host()+"/base/alpine:3")

	f.answer(http.StatusTooManyRequests, "1200")
	if wait := g.Sweep(t.Context()).Sub(c.Now()); wait < 19*time.Minute || wait > 20*time.Minute {
		t.Errorf("it comes back in %v", wait)
	}
	if asked := f.take(); len(asked) != 0 {
		t.Errorf("it asked a registry that refused the first ping %v", asked)
	}
	if b := sign(t, s, s.Token(nil), pushSilently(t, s, other, "acme/api").ImageRef).Image.Base; b.Result != attest.Matched || b.Repository != other.Repository {
		t.Errorf("the other registry was not asked: %+v", b)
	}
	f.answer(0, "")
	c.add(19 * time.Minute)
	g.Sweep(t.Context())
	if asked := f.take(); len(asked) != 0 {
		t.Errorf("asked before it said: %v", asked)
	}
	c.add(2 * time.Minute)
	if wait := g.Sweep(t.Context()).Sub(c.Now()); wait < 38*time.Minute || wait > 40*time.Minute {
		t.Errorf("the next round is in %v", wait)
	}
	if asked := f.take(); !strings.Contains(strings.Join(asked, "\n"), "/base/debian/manifests/12") {
		t.Errorf("it asked %v", asked)
	}
	if b := sign(t, s, s.Token(nil), pushSilently(t, s, debian, "acme/api").ImageRef).Image.Base; b.Result != attest.Matched || string(b.Repository) != f.addr+"/base/debian" {
		t.Errorf("%+v", b)
	}

	// The next round: nothing moved.
	f.take()
	c.add(time.Hour)
	g.Sweep(t.Context())
	want := "HEAD /v2/base/debian/manifests/12\nHEAD /v2/base/alpine/manifests/3"
	if asked := strings.Join(f.take(), "\n"); asked != want {
		t.Errorf("tags that did not move cost\n%s\nwant\n%s", asked, want)
	}
	fsck(t, s)
}

// sweepFor sweeps as often as it wants to for some time, but not more often than every
// ten minutes, and calls each before every sweep with how much of the time is over.
func sweepFor(t *testing.T, g *gate.Gate, c *clock, d time.Duration, each func(time.Duration)) {
	t.Helper()
	begin := c.Now()
	for over := time.Duration(0); over < d; over = c.Now().Sub(begin) {
		each(over)
		c.add(max(g.Sweep(t.Context()).Sub(c.Now()), 10*time.Minute))
	}
}

// A registry that is away for days, with many tags or a single one, keeps no other from
// being looked at in every round, and is itself asked a little.
func TestSweepGoesOnWhileARegistryIsAway(t *testing.T) {
	for name, tags := range map[string]int{"one tag": 1, "more than a batch": 20} {
		t.Run(name, func(t *testing.T) {
			s, f := flakyStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
			c := newClock()
			s.PushBase("debian", "12")
			var follow []string
			for i := range tags {
				follow = append(follow, fmt.Sprintf("%s/away/debian:%d", f.addr, i))
			}
			g := sweeping(t, s, c, time.Hour, append(follow, s.Registry.Host()+"/base/debian:12")...)
			f.spoil("")
			var moved testkit.Pushed
			var at, found time.Duration
			sweepFor(t, g, c, 48*time.Hour, func(over time.Duration) {
				if at == 0 && over > 30*time.Hour {
					moved, at = s.PushBase("debian", "12"), over
				}
				if at == 0 || found != 0 {
					return
				}
				rows, err := s.Ledger.NewestFollowed(t.Context(), s.Registry.Host()+"/base/debian:12")
				if err != nil {
					t.Fatal(err)
				}
				if len(rows) > 0 && rows[0].Digest == moved.Digest {
					found = over
				}
			})
			if found == 0 || found-at > 70*time.Minute {
				t.Errorf("the tag moved after %v, which was found after %v", at, found)
			}
			f.mu.Lock()
			asked := len(f.asked)
			f.mu.Unlock()
			if asked < 24 || asked > 4000 {
				t.Errorf("the registry that is away was asked %d times", asked)
			}

			f.answer(0, "")
			f.take()
			sweepFor(t, g, c, 2*time.Hour, func(time.Duration) {})
			if got := len(f.take()); got < tags {
				t.Errorf("when it is back it is asked %d things", got)
			}
			fsck(t, s)
		})
	}
}

// What never answers is asked less and less often, and the others of its registry as
// ever.
func TestSweepPassesWhatNeverAnswers(t *testing.T) {
	s, f := flakyStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	c := newClock()
	s.PushBase("debian", "12")
	s.PushBase("alpine", "3")
	g := sweeping(t, s, c, time.Hour, f.addr+"/base/bad:1", f.addr+"/base/debian:12", f.addr+"/base/alpine:3")
	f.spoil("/base/bad/")
	g.Sweep(t.Context())
	asked := strings.Join(f.take(), "\n")
	for _, want := range []string{"/base/debian/manifests/12", "/base/alpine/manifests/3"} {
		if !strings.Contains(asked, want) {
			t.Errorf("%s was not asked for: %s", want, asked)
		}
	}
	g.Sweep(t.Context())
	if asked := f.take(); len(asked) != 0 {
		t.Errorf("at once it asked again for %v", asked)
	}
	c.add(2 * time.Minute)
	g.Sweep(t.Context())
	if asked := strings.Join(f.take(), "\n"); !strings.Contains(asked, "/base/bad/manifests/1") {
		t.Errorf("after two minutes it asked for %q", asked)
	}
	bad, good := 0, 0
	sweepFor(t, g, c, 24*time.Hour, func(time.Duration) {
		for _, a := range f.take() {
			switch {
			case strings.Contains(a, "/base/bad/"):
				bad++
			case a == "HEAD /v2/base/alpine/manifests/3":
				good++
			}
		}
	})
	if good < 22 || good > 25 {
		t.Errorf("in a day %d rounds asked for what does answer", good)
	}
	if bad < 20 || bad > 60 {
		t.Errorf("in a day what never answers was asked for %d times", bad)
	}
	fsck(t, s)
}

// K07: who asks for a base that does not answer makes the service leave that base alone,
// and no other.
func TestASlowBaseStopsNoOther(t *testing.T) {
	c := newClock()
	s, f := flakyStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage), Now: c.Now})
	slow := s.PushOn(f.at(s.PushBase("debian", "12")), "12", "acme/api")
	well := s.PushOn(f.at(s.PushBase("alpine", "3")), "3", "acme/api")
	for _, app := range []testkit.Pushed{slow, well} {
		sign(t, s, s.Token(nil), app.ImageRef)
	}
	f.spoil("/base/debian/")
	id := auditor(s)
	for _, row := range []struct {
		app   testkit.Pushed
		want  attest.Freshness
		asked bool
	}{{slow, attest.FreshnessUnknown, true}, {slow, attest.FreshnessUnknown, false}, {well, attest.Fresh, true}} {
		f.take()
		chain := chainOf(t, s, id, row.app.ImageRef)
		asked := strings.Contains(strings.Join(f.take(), "\n"), "HEAD ")
		if st := chain[0].State; st.Freshness != row.want || asked != row.asked {
			t.Errorf("%+v; the registry was asked: %v", st, asked)
		}
	}
	fsck(t, s)
}

// take returns the requests since the last call, without pings.
func (f *flaky) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, a := range f.asked {
		if !strings.HasSuffix(a, " /v2/") {
			out = append(out, a)
		}
	}
	f.asked = nil
	return out
}

// The bases of what the stages hold are looked at in each round, one by one and a few
// at a time; who asks then is answered from that.
func TestSweepChecksTheBasesOfStages(t *testing.T) {
	c := newClock()
	s, f := flakyStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage), Now: c.Now})
	app := s.PushOn(f.at(s.PushBase("debian", "12")), "12", "acme/api")
	sign(t, s, s.Token(nil), app.ImageRef)
	idle := s.PushOn(f.at(s.PushBase("alpine", "3")), "3", "acme/idle") // in no stage
	sign(t, s, s.Token(nil), idle.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: app.ImageRef, ToStage: "live", Version: "1"})
	g := sweeping(t, s, c, time.Hour)
	id := auditor(s)

	f.take()
	g.Sweep(t.Context())
	if asked := strings.Join(f.take(), "\n"); asked != "HEAD /v2/base/debian/manifests/12" {
		t.Errorf("it asked\n%s", asked)
	}
	begin := c.Now()
	s.PushBase("debian", "12")
	c.add(time.Hour)
	g.Sweep(t.Context())
	f.take()
	chain := chainOf(t, s, id, app.ImageRef)
	if st := chain[0].State; st.Freshness != attest.StaleLayers || st.Since.Sub(begin.Add(time.Hour)).Abs() > time.Minute {
		t.Errorf("%+v", st)
	}
	if asked := f.requests("HEAD"); asked != 0 {
		t.Errorf("%d requests for what was looked at just now", asked)
	}
	// Without a round nothing is asked, and a clock that was set back begins one.
	c.add(10 * time.Minute)
	g.Sweep(t.Context())
	if asked := f.take(); len(asked) != 0 {
		t.Errorf("between two rounds it asked %v", asked)
	}
	c.add(-5 * time.Hour)
	g.Sweep(t.Context())
	if asked := f.take(); len(asked) == 0 {
		t.Error("after the clock was set back nothing is looked at")
	}
	fsck(t, s)
}

// A sweep is a few requests at a time, in the order of the configuration, and ends
// with its context.
func TestSweepIsBounded(t *testing.T) {
	s, f := flakyStack(t, testkit.Options{})
	base := s.PushBase("debian", "0")
	var tags []string
	for i := range 20 {
		s.Push("base/debian", fmt.Sprint(i), base.Image)
		tags = append(tags, fmt.Sprintf("%s/base/debian:%d", f.addr, i))
	}
	c := newClock()
	g := sweeping(t, s, c, time.Hour, tags...)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	g.Sweep(cancelled)
	if asked := f.take(); len(asked) != 0 {
		t.Errorf("after the end it asked %v", asked)
	}
	tagsOf := func(asked []string) (out []string) {
		for _, a := range asked {
			if _, tag, ok := strings.Cut(a, "/manifests/"); ok {
				out = append(out, tag)
			}
		}
		return out
	}
	if next := g.Sweep(t.Context()); next.After(c.Now()) {
		t.Errorf("there is more to do, but not before %v", next)
	}
	if got := strings.Join(tagsOf(f.take()), " "); got != "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15" {
		t.Errorf("the first batch: %s", got)
	}
	g.Sweep(t.Context())
	if got := strings.Join(tagsOf(f.take()), " "); got != "16 17 18 19" {
		t.Errorf("the second batch: %s", got)
	}
	fsck(t, s)
}

// Where the followed bases cannot be read nothing is signed: an image on one of them
// must not pass for one without a base. A repetition is safe.
func TestFollowedBasesThatCannotBeRead(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	db, err := sql.Open("sqlite", "file:"+filepath.Join(s.DataDir, "hallmark.db")+"?_pragma=busy_timeout(10000)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, table := range []string{"followed", "base_states"} {
		if _, err := db.ExecContext(t.Context(), "DROP TABLE "+table); err != nil {
			t.Fatal(err)
		}
	}
	app := s.PushApp("acme/api")
	_, err = trySign(t, s, s.Token(nil), gate.SignImage{Ref: app.ImageRef})
	wantReason(t, err, attest.LedgerUnavailable)
	s.Restart()
	sign(t, s, s.Token(nil), app.ImageRef)

	// How fresh a base is can be told without the table for it.
	if _, err := db.ExecContext(t.Context(), "DROP TABLE base_states"); err != nil {
		t.Fatal(err)
	}
	if st := chainOf(t, s, auditor(s), app.ImageRef)[0].State; st.Freshness != attest.Fresh {
		t.Errorf("%+v", st)
	}
	fsck(t, s)
}
