package gate_test

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/registry"
)

// basePolicy lets the jobs of the source repository sign and promote in acme and in
// other. People of the group acme may ask about acme, those of other about other.
func basePolicy(stages string) string {
	return strings.ReplaceAll(policyOf(1, looseSigners, stages), `roles:
  signers:
`, `roles:
  signers:
  - {issuer: github, images: ["REGISTRY/other/*"], when: "has(id.repository_id)"}
`)
}

// flaky is a second address of the stack's registry, which can be busy.
type flaky struct {
	addr  string
	mu    sync.Mutex
	busy  int           // status that is answered instead; 0: none
	after string        // Retry-After
	only  string        // in the paths that are answered so; "": all
	asked []string      // methods and paths
	to    func() string // host:port of the registry
}

func newFlaky(t *testing.T) *flaky {
	f := &flaky{}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	f.addr = strings.TrimPrefix(srv.URL, "http://")
	return f
}

func (f *flaky) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	busy, after := f.busy, f.after
	if !strings.Contains(r.URL.Path, f.only) {
		busy = 0
	}
	f.asked = append(f.asked, r.Method+" "+r.URL.Path)
	f.mu.Unlock()
	if busy != 0 {
		w.Header().Set("Retry-After", after)
		w.WriteHeader(busy)
		return
	}
	httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: f.to()}).ServeHTTP(w, r)
}

func (f *flaky) answer(status int, after string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.busy, f.after = status, after
}

// spoil answers as a broken registry to requests with part in their paths.
func (f *flaky) spoil(part string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.busy, f.only = http.StatusInsufficientStorage, part // which is not tried again at once
}

// requests returns how many there were for manifests since the last call.
func (f *flaky) requests(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, a := range f.asked {
		if strings.HasPrefix(a, method) && strings.Contains(a, "/manifests/") {
			n++
		}
	}
	f.asked = nil
	return n
}

// at is the same image by the flaky registry's name.
func (f *flaky) at(p testkit.Pushed) testkit.Pushed {
	p.Repository = attest.Repository(f.addr + "/" + p.Repository.Path())
	return p
}

func flakyStack(t *testing.T, o testkit.Options) (*testkit.Stack, *flaky) {
	f := newFlaky(t)
	o.Hosts = append(o.Hosts, registry.Host{Host: f.addr, PlainHTTP: true})
	s := testkit.NewStack(t, o)
	f.to = s.Registry.Host
	return s, f
}

func chainOf(t *testing.T, s *testkit.Stack, id attest.Identity, ref attest.ImageRef) []gate.BaseLink {
	t.Helper()
	chain, size, err := s.Gate.Base(t.Context(), id, ref)
	if err != nil {
		t.Fatal(err)
	}
	if size != s.Ledger.Size() {
		t.Errorf("answered for log size %d of %d", size, s.Ledger.Size())
	}
	return chain
}

// story renders a chain without times.
func story(chain []gate.BaseLink) (out []string) {
	for _, l := range chain {
		base := string(l.Base.Result)
		if l.Base.Repository != "" {
			base += " " + l.Base.Repository.Path() + ":" + l.Base.Tag
		}
		signed := "unsigned"
		if l.Signed {
			signed = "signed (" + l.Summary + ")"
		}
		out = append(out, strings.Join([]string{l.Ref.Repository.Path(), l.KnownFrom, base, signed, strings.Join(l.Stages, " "), string(l.State.Freshness)}, ", "))
	}
	return out
}

// The chain goes over what was signed here to what only the registry knows.
func TestBaseChain(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: basePolicy(oneStage)})
	debian := s.PushBase("debian", "12")
	middle := s.PushOn(debian, "12", "acme/runtime")
	s.Push("acme/runtime", "1", middle.Image)
	app := s.PushOn(middle, "1", "acme/api")
	first := sign(t, s, s.Token(nil), middle.ImageRef)
	sign(t, s, s.Token(nil), app.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: middle.ImageRef, ToStage: "live", Version: "1"})

	summary := first.Build.Repository + " main " + testkit.Commit[:7] + " run " + first.Build.RunID
	chain := chainOf(t, s, auditor(s), app.ImageRef)
	want := []string{
		"acme/api, record, PROVEN_LAYERS acme/runtime:1, signed (" + summary + "), , FRESH",
		"acme/runtime, record, PROVEN_LAYERS base/debian:12, signed (" + summary + "), acme/live, FRESH",
		"base/debian, registry, UNKNOWN, unsigned, , FRESHNESS_UNKNOWN",
	}
	if diff := cmp.Diff(want, story(chain)); diff != "" {
		t.Error(diff)
	}
	if chain[1].Record != first.Provenance.ID || chain[2].Ref != debian.ImageRef || chain[2].Record != (attest.RecordID{}) {
		t.Errorf("records and references: %+v", chain)
	}
	if st := chain[0].State; st.Current != middle.Digest || st.Since.IsZero() || st.Checked.Before(st.Since) {
		t.Errorf("freshness: %+v", st)
	}
	// The second stage of trust: what was signed is asked for by nobody without a role.
	_, _, err := s.Gate.Base(t.Context(), s.Identity(s.PersonToken("x")), app.ImageRef)
	wantReason(t, err, attest.RoleMissing)
	_, _, err = s.Gate.Base(t.Context(), auditor(s), attest.ImageRef{Repository: app.Repository, Digest: attest.Hash([]byte("nothing"))})
	wantReason(t, err, attest.SubjectNotFound)
	fsck(t, s)
}

// K07: of what lies in repositories that are not the caller's, only what the registry
// says is told, and only along proved bases.
func TestBaseChainTellsNoSecrets(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: basePolicy(oneStage)})
	secret := s.PushOn(s.PushBase("debian", "12"), "12", "other/base")
	s.Push("other/base", "1", secret.Image)
	app := s.PushOn(secret, "1", "acme/api")
	sign(t, s, s.Token(nil), secret.ImageRef)
	sign(t, s, s.Token(nil), app.ImageRef)
	mine := s.Identity(s.PersonToken("a", "acme"))
	both := s.Identity(s.PersonToken("b", "acme", "other"))

	t.Run("K07 a proved base of others", func(t *testing.T) {
		chain := chainOf(t, s, mine, app.ImageRef)
		if l := chain[1]; len(chain) != 3 || l.Ref != secret.ImageRef || l.KnownFrom != "registry" || l.Signed || l.Summary != "" || l.Stages != nil || l.Record != (attest.RecordID{}) {
			t.Errorf("%+v", chain)
		}
		if l := chainOf(t, s, both, app.ImageRef)[1]; l.KnownFrom != "record" || !l.Signed || l.Summary == "" || l.Record == (attest.RecordID{}) {
			t.Errorf("with the role: %+v", l)
		}
	})
	t.Run("K07 a base that is only claimed", func(t *testing.T) {
		// The annotation names a digest that nobody has, so that it is a mere claim;
		// its tag exists and is others'.
		liar := secret
		liar.Digest = attest.Hash([]byte("nobody has it"))
		img := s.PushOn(liar, "1", "acme/liar")
		for name, id := range map[string]attest.Identity{"theirs": mine, "also mine": both} {
			chain := chainOf(t, s, id, img.ImageRef)
			if b := chain[0].Base; b.Result != attest.Claimed || b.Repository != secret.Repository {
				t.Fatalf("%s: %+v", name, b)
			}
			known := id.Subject == both.Subject
			if state := chain[0].State; (len(chain) > 1) != known || !known && (!state.Current.IsZero() || !strings.Contains(state.Detail, "no role")) {
				t.Errorf("%s: %+v", name, chain)
			}
		}
	})
	t.Run("K07 an image of others", func(t *testing.T) {
		_, _, err := s.Gate.Base(t.Context(), mine, secret.ImageRef)
		if err == nil {
			t.Error("it was told")
		}
	})
	fsck(t, s)
}

// A base that is recorded under its canonical name is read where it is mirrored.
func TestBaseChainThroughMirror(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: basePolicy(oneStage), Mirror: "quay.io/base"})
	debian := s.PushBase("debian", "12")
	middle := s.PushOn(debian, "12", "base/runtime")
	s.Push("base/runtime", "1", middle.Image)
	app := s.PushOn(middle, "1", "acme/api")
	var got []string
	for _, l := range chainOf(t, s, auditor(s), app.ImageRef) {
		got = append(got, string(l.Ref.Repository)+" on "+string(l.Base.Repository)+" "+string(l.State.Freshness))
	}
	want := []string{
		string(app.Repository) + " on quay.io/base/runtime FRESH",
		"quay.io/base/runtime on quay.io/base/debian FRESH",
		"quay.io/base/debian on  FRESHNESS_UNKNOWN",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A base in a registry that is not configured ends the chain and says so, and so does
// a chain that is longer than anybody's.
func TestBaseChainEnds(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: basePolicy(oneStage)})
	elsewhere := s.PushBase("debian", "12")
	elsewhere.Repository = "quay.io/base/debian"
	app := s.PushOn(elsewhere, "12", "acme/api")
	chain := chainOf(t, s, auditor(s), app.ImageRef)
	if last := chain[len(chain)-1]; last.Ref.Repository != elsewhere.Repository || last.Base.Result != attest.Unclaimed ||
		last.State.Freshness != attest.FreshnessUnknown || !strings.Contains(last.State.Detail, "quay.io") {
		t.Errorf("%+v", chain)
	}

	// What is not the base, as the layers show, is not looked at any further.
	other := s.PushBase("other", "1")
	lie := s.PushOn(testkit.Pushed{ImageRef: other.ImageRef, Image: s.PushBase("debian", "12").Image}, "1", "acme/api")
	chain = chainOf(t, s, auditor(s), lie.ImageRef)
	if st := chain[0].State; len(chain) != 1 || chain[0].Base.Result != attest.Contradicted || st.Freshness != attest.FreshnessUnknown || !st.Current.IsZero() {
		t.Errorf("%+v", chain)
	}

	img := s.PushBase("long", "0")
	for range 9 {
		img = s.PushOn(img, "", "acme/long")
	}
	chain = chainOf(t, s, auditor(s), img.ImageRef)
	if last := chain[len(chain)-1]; len(chain) != 8 || !strings.Contains(last.State.Detail, "goes on") || last.Base.Result != attest.ProvenLayers {
		t.Errorf("%d links: %+v", len(chain), last)
	}
}

// Since is the first check in a row that said the same. An outage is told, and
// interrupts nothing.
func TestBaseFreshnessOverTime(t *testing.T) {
	c := newClock()
	s, f := flakyStack(t, testkit.Options{Policy: basePolicy(oneStage), Now: c.Now})
	debian := f.at(s.PushBase("debian", "12"))
	app := s.PushOn(debian, "12", "acme/api")
	sign(t, s, s.Token(nil), app.ImageRef)
	begin := c.Now()
	id := auditor(s)
	id.Expires = begin.AddDate(1, 0, 0)
	for _, step := range []struct {
		name   string
		after  time.Duration
		change func()
		want   attest.Freshness
		since  time.Duration // after begin; -1: not known
		asks   bool
		detail string
	}{
		{"first", 0, nil, attest.Fresh, 0, true, ""},
		{"within a minute, moved", 30 * time.Second, func() { s.PushBase("debian", "12") }, attest.Fresh, 0, false, ""},
		{"moved", time.Hour, nil, attest.StaleLayers, time.Hour + 30*time.Second, true, ""},
		{"later", 24 * time.Hour, func() { s.PushBase("debian", "12") }, attest.StaleLayers, time.Hour + 30*time.Second, true, ""},
		{"busy", time.Hour, func() { f.answer(http.StatusTooManyRequests, "1800") }, attest.FreshnessUnknown, -1, true, "STALE_LAYERS on "},
		{"left alone", 29 * time.Minute, func() { f.answer(0, "") }, attest.FreshnessUnknown, -1, false, "is not asked before"},
		{"back", 2 * time.Minute, nil, attest.StaleLayers, time.Hour + 30*time.Second, true, ""},
		{"away", time.Hour, func() { f.answer(http.StatusInternalServerError, "") }, attest.FreshnessUnknown, -1, true, "REGISTRY_UNAVAILABLE"},
		{"back again, as it was first", 2 * time.Minute, func() { f.answer(0, ""); s.Push("base/debian", "12", debian.Image) }, attest.Fresh, 27*time.Hour + 33*time.Minute + 30*time.Second, true, ""},
	} {
		c.add(step.after)
		if step.change != nil {
			step.change()
		}
		f.requests("")
		chain := chainOf(t, s, id, app.ImageRef)
		if n := f.requests("HEAD"); (n > 0) != step.asks {
			t.Errorf("%s: %d requests", step.name, n)
		}
		state := chain[0].State
		if state.Freshness != step.want || !strings.Contains(state.Detail, step.detail) {
			t.Errorf("%s: %+v", step.name, state)
		}
		if since := state.Since.Sub(begin.Add(step.since)); step.since >= 0 && since.Abs() > time.Minute || step.since < 0 && !state.Since.IsZero() {
			t.Errorf("%s: since %v after the beginning, want %v", step.name, state.Since.Sub(begin), step.since)
		}
	}
	fsck(t, s)
}

// Two bases with the same layers are each other's base, as far as layers say.
func TestBaseChainThatComesBack(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Policy: basePolicy(oneStage)})
	one := s.PushBase("one", "1")
	two := s.Push("base/two", "1", mutate.Annotations(one.Image, map[string]string{"made": "again"}).(v1.Image))
	c := newClock()
	g := sweeping(t, s, c, time.Hour, string(one.Repository)+":1", string(two.Repository)+":1")
	g.Sweep(t.Context())
	chain := chainOf(t, s, auditor(s), one.ImageRef)
	if len(chain) != 2 || chain[1].Ref != two.ImageRef || !strings.Contains(chain[1].State.Detail, "comes back to "+one.ImageRef.String()) {
		t.Errorf("%+v", chain)
	}
	fsck(t, s)
}
