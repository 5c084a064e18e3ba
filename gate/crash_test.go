package gate_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
)

// A stop between two steps: the test's own stack does a request once and writes
// down every step that ledger and gate take. For each of them a child process
// opens the same data, does a request like it and ends at that step. Then the
// stack is started again, as an operator would, and must be whole by that alone.

// order is what a child process is told to do.
type order struct {
	Dir    string
	Around testkit.Around
	Policy string
	Token  string
	Image  string
	Stage  string // to promote to; "" signs
	Step   string // where to stop
	Nth    int    // at which time that the step is taken, from 1
	Early  bool   // stop while the service starts, before any request
	Attest bool   // instead of signing
}

const (
	orderVariable = "HALLMARK_TEST_ORDER"
	stopped       = 3 // exit code of a child that stopped where it was told to
)

// obey does what the parent ordered, in the child process.
func obey(t *testing.T, text string) {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	ref, err := attest.ParseImageRef(o.Image)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	taken := 0
	end := func(step string) {
		mu.Lock()
		defer mu.Unlock()
		if step != o.Step {
			return
		}
		if taken++; taken == o.Nth {
			os.Exit(stopped) // nothing is flushed, closed or answered
		}
	}
	var h hook
	if o.Early {
		h.set(end)
	}
	s := testkit.NewStack(t, testkit.Options{Dir: o.Dir, Around: &o.Around, Policy: o.Policy, Step: h.step})
	id := s.Identity(o.Token)
	h.set(end)
	if o.Attest {
		actAttest(t, s, id, ref)
	} else {
		act(t, s, id, ref, o.Stage)
	}
	idle(t, s)
}

// act is the request that is stopped.
func act(t *testing.T, s *testkit.Stack, id attest.Identity, ref attest.ImageRef, stage string) {
	t.Helper()
	if stage == "" {
		out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: []gate.SignImage{{Ref: ref}}})
		if err != nil || out[0].Err != nil {
			t.Fatal(err, out)
		}
		return
	}
	out, err := s.Gate.Promote(t.Context(), id, gate.PromoteRequest{Ref: ref, ToStage: stage, Version: "stable"})
	if err != nil || out.Verdict != gate.Allowed || out.Effect != string(ledger.Done) {
		t.Fatalf("%v: %s %s %s: %+v", err, out.Verdict, out.Effect, out.EffectDetail, out.Results)
	}
}

// idle waits until the worker has nothing left to do.
func idle(t *testing.T, s *testkit.Stack) {
	t.Helper()
	eventually(t, "no task is left", func() bool {
		tasks, err := s.Ledger.Tasks(t.Context(), "", time.Now().Add(time.Hour), 1)
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks) == 0
	})
}

// send runs a child process with an order and wants it to stop where it was told.
func send(t *testing.T, test string, o order) {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+test+"$", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), orderVariable+"="+string(text))
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != stopped {
		t.Fatalf("the child did not stop there: %v\n%s", err, out)
	}
}

// stop is the nth time that a step is taken.
type stop struct {
	step string
	nth  int
}

// rehearse does a request and returns all steps that it takes, with those of the
// work that it leaves to the worker.
func rehearse(t *testing.T, s *testkit.Stack, h *hook, do func()) []stop {
	t.Helper()
	var mu sync.Mutex
	var all []stop
	count := map[string]int{}
	h.set(func(step string) {
		mu.Lock()
		defer mu.Unlock()
		count[step]++
		all = append(all, stop{step, count[step]})
	})
	do()
	idle(t, s)
	h.at.Store(nil)
	return all
}

func wantSteps(t *testing.T, got []stop, want ...string) {
	t.Helper()
	for _, name := range want {
		if !slices.ContainsFunc(got, func(s stop) bool { return s.step == name }) {
			t.Errorf("the step %s was never taken: %v", name, got)
		}
	}
}

var ledgerSteps = []string{"stored", "added", "integrated", "published", "synced"}

func TestStopBetweenStepsOfSigning(t *testing.T) {
	t.Parallel()
	if text := os.Getenv(orderVariable); text != "" {
		obey(t, text)
		return
	}
	var h hook
	o := order{Dir: t.TempDir(), Policy: policyOf(1, looseSigners, oneStage)}
	s := testkit.NewStack(t, testkit.Options{Dir: o.Dir, Policy: o.Policy, Step: h.step})
	o.Around = s.Around()
	img := s.PushApp("acme/api")
	token := s.Token(nil)
	steps := rehearse(t, s, &h, func() { act(t, s, s.Identity(token), img.ImageRef, "") })
	wantSteps(t, steps, append(ledgerSteps, "fetched", "signed", "recorded", "attach")...)

	for _, at := range steps {
		t.Run(fmt.Sprintf("after %s %d", at.step, at.nth), func(t *testing.T) {
			s.Close()
			img := s.PushApp("acme/api")
			token := s.Token(nil)
			o := o
			o.Token, o.Image, o.Step, o.Nth = token, img.String(), at.step, at.nth
			send(t, "TestStopBetweenStepsOfSigning", o)

			// The next start alone repairs it: what was on its way is a record or
			// never was.
			s.Restart()
			want := 1
			if at.step == "fetched" || at.step == "signed" {
				want = 0 // nothing was stored
			}
			before := find(t, s, attest.KindProvenance, about(img.Digest))
			if len(before) != want {
				t.Errorf("%d provenance records before the request is repeated, want %d", len(before), want)
			}
			idle(t, s)
			stored, err := s.Images.Attached(t.Context(), img.ImageRef)
			if err != nil || len(stored) != 2*len(before) {
				t.Errorf("%d bundles are attached, %d requests are recorded: %v", len(stored), len(before), err)
			}
			got := sign(t, s, token, img.ImageRef)
			if got.Repeated != (len(before) == 1) || got.Repeated && before[0].ID != got.Provenance.ID {
				t.Errorf("the answer is record %s, repeated %t; before %v", got.Provenance.ID, got.Repeated, before)
			}
			for kind, want := range map[attest.RecordKind]int{attest.KindProvenance: 1, attest.KindSignature: 1} {
				if n := len(find(t, s, kind, about(img.Digest))); n != want {
					t.Errorf("%d records of kind %s", n, kind)
				}
			}
			wantAttached(t, s, img.ImageRef, got.SignatureBundle, got.ProvenanceBundle)
			if report := fsck(t, s); report.Unlogged != 0 {
				t.Errorf("%d envelopes were left out of the log", report.Unlogged)
			}
		})
	}
}

// The repair may be stopped as well.
func TestStopWhileRepairing(t *testing.T) {
	t.Parallel()
	if text := os.Getenv(orderVariable); text != "" {
		obey(t, text)
		return
	}
	o := order{Dir: t.TempDir(), Policy: policyOf(1, looseSigners, oneStage)}
	s := testkit.NewStack(t, testkit.Options{Dir: o.Dir, Policy: o.Policy})
	o.Around = s.Around()
	for _, step := range []string{"added", "integrated", "published", "synced"} {
		t.Run("after "+step, func(t *testing.T) {
			s.Close()
			img := s.PushApp("acme/api")
			o := o
			o.Token, o.Image, o.Step, o.Nth = s.Token(nil), img.String(), "stored", 1
			send(t, "TestStopWhileRepairing", o)
			o.Step, o.Early = step, true
			send(t, "TestStopWhileRepairing", o)
			s.Restart()
			got := sign(t, s, o.Token, img.ImageRef)
			if n := len(find(t, s, attest.KindProvenance, about(img.Digest))); n != 1 || !got.Repeated {
				t.Errorf("%d provenance records, repeated %t", n, got.Repeated)
			}
			if report := fsck(t, s); report.Unlogged != 0 {
				t.Errorf("%d envelopes were left out of the log", report.Unlogged)
			}
		})
	}
}

func TestStopBetweenStepsOfPromoting(t *testing.T) {
	t.Parallel()
	if text := os.Getenv(orderVariable); text != "" {
		obey(t, text)
		return
	}
	var h hook
	// The target is in the images' own repository, so that nothing waits for a
	// copy.
	o := order{Dir: t.TempDir(), Stage: "live", Policy: policyOf(1, looseSigners, sameRepository)}
	s := testkit.NewStack(t, testkit.Options{Dir: o.Dir, Policy: o.Policy, Step: h.step})
	o.Around = s.Around()
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	steps := rehearse(t, s, &h, func() { act(t, s, s.Identity(s.PromoterToken()), img.ImageRef, o.Stage) })
	wantSteps(t, steps, append(ledgerSteps, "decided", "promotion", "summary", "target", "effect", "attach")...)
	images := make([]testkit.Pushed, len(steps))
	for i := range images {
		images[i] = s.PushApp("acme/api")
		sign(t, s, s.Token(nil), images[i].ImageRef)
	}

	for i, at := range steps {
		t.Run(fmt.Sprintf("after %s %d", at.step, at.nth), func(t *testing.T) {
			s.Close()
			img := images[i]
			o := o
			o.Token, o.Image, o.Step, o.Nth = s.PromoterToken(), img.String(), at.step, at.nth
			send(t, "TestStopBetweenStepsOfPromoting", o)

			// The next start alone brings it to its end, or it never happened.
			s.Restart()
			idle(t, s)
			before := promotions(t, s, img)
			if at.step != "decided" {
				wantPromoted(t, s, img, before)
			} else if len(before) != 0 {
				t.Errorf("nothing was stored, and yet there is %+v", before)
			}
			got := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: o.Stage, Version: "stable"})
			idle(t, s)
			after := promotions(t, s, img)
			wantPromoted(t, s, img, after)
			if len(before) == 1 && before[0].ID != got.RecordID || after[0].ID != got.RecordID {
				t.Errorf("the answer is %s; before %+v, after %+v", got.RecordID, before, after)
			}
			checkBothForms(t, s, got, img)
			if report := fsck(t, s); report.Unlogged != 0 {
				t.Errorf("%d envelopes were left out of the log", report.Unlogged)
			}
		})
	}
}

// sameRepository is oneStage with its target beside the images.
var sameRepository = strings.Replace(oneStage, "REGISTRY/live", "REGISTRY/acme", 1)

// promotions returns those of one image to the stage "live".
func promotions(t *testing.T, s *testkit.Stack, img testkit.Pushed) []ledger.Promotion {
	t.Helper()
	all, err := s.Ledger.Promotions(t.Context(), "acme", "live", img.Repository, 0)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(p ledger.Promotion) bool { return p.Ref != img.ImageRef })
}

// wantPromoted wants one promotion that is complete: its effect, both forms of
// its summary, the tag, and what is attached.
func wantPromoted(t *testing.T, s *testkit.Stack, img testkit.Pushed, all []ledger.Promotion) {
	t.Helper()
	if len(all) != 1 || all[0].State != ledger.Done {
		t.Fatalf("promotions %+v", all)
	}
	promotion := attest.Facet{Name: attest.FacetPromotion, Value: all[0].ID.String()}
	if n := len(find(t, s, attest.KindEffect, promotion)); n != 1 {
		t.Errorf("%d effects", n)
	}
	summaries := find(t, s, attest.KindVSA, about(img.Digest))
	if len(summaries) != 2 {
		t.Errorf("%d summaries, want two forms", len(summaries))
	}
	now, err := s.Images.Resolve(t.Context(), img.Repository, "stable")
	if err != nil || now != img.Digest {
		t.Errorf("the tag is %s (%v), want %s", now, err, img.Digest)
	}
	bundles, err := s.Images.Attached(t.Context(), img.ImageRef)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, b := range bundles {
		ev, err := s.Verifier.Bundle(b, img.Digest)
		if err != nil {
			t.Errorf("an attached bundle does not verify: %v", err)
			continue
		}
		if ev.Kind() == attest.KindVSA {
			found++
		}
		if _, err := s.Ledger.Get(t.Context(), ev.ID()); err != nil {
			t.Errorf("an attached bundle is not in the log: %v", err)
		}
	}
	if found != 1 || len(bundles) != 3 {
		t.Errorf("%d bundles are attached, %d of them summaries", len(bundles), found)
	}
	out, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: img.ImageRef, Stage: "live"})
	if err != nil || out.Verdict != gate.Allowed {
		t.Errorf("it may not run in the stage: %v %+v", err, out.Results)
	}
}
