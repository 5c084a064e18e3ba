package gate_test

import (
	"strings"
	"sync"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
)

// The same digest under two versions at once: whoever is told DONE got the target
// that it asked for.
func TestTwoVersionsAtOnce(t *testing.T) {
	t.Parallel()
	var both sync.WaitGroup
	both.Add(2)
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage), Step: func(step string) {
		if step == "decided" {
			both.Done()
			both.Wait()
		}
	}})
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	promoter := s.Identity(s.PromoterToken())
	var calls sync.WaitGroup
	versions := []string{"1", "2"}
	got := make([]gate.Promoted, len(versions))
	for i, v := range versions {
		calls.Go(func() {
			var err error
			if got[i], err = s.Gate.Promote(t.Context(), promoter, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: v}); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	allowed := 0
	for i, v := range versions {
		switch got[i].Verdict {
		case gate.Allowed:
			allowed++
			if !strings.HasSuffix(got[i].Target, ":"+v) || got[i].Effect != string(ledger.Done) {
				t.Errorf("version %s is answered with %s %s", v, got[i].Effect, got[i].Target)
			}
		case gate.Aborted:
			wantResult(t, got[i].Decision, attest.StageMoved)
		default:
			t.Errorf("version %s: %s", v, got[i].Verdict)
		}
	}
	if allowed != 1 {
		t.Errorf("%d of two were allowed", allowed)
	}
}

// A version that makes no tag is denied also when the stage holds the digest.
func TestImpossibleVersionOfTheHead(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	for _, v := range []string{"-bad tag", "sha256-" + strings.Repeat("a", 64)} {
		if got := promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: v}); got.Verdict != gate.Denied {
			t.Errorf("version %q: %s", v, got.Verdict)
		}
	}
	// Another good one is a promotion of its own, and the first repeated is not.
	second := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "2"})
	again := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "2"})
	if !strings.HasSuffix(second.Target, ":2") || again.Number != second.Number {
		t.Errorf("target %s, decisions %d and %d", second.Target, second.Number, again.Number)
	}
}
