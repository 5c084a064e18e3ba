package gate_test

import (
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// B01: a job that may run code which nobody has accepted changes nothing, whatever
// role its repository has. It may ask.
func TestUnacceptedJobsChangeNothing(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	for _, event := range []string{"pull_request", "pull_request_target", "issue_comment"} {
		t.Run("B01 "+event, func(t *testing.T) {
			id := s.Identity(s.Token(map[string]any{"environment": "release", "event_name": event}))
			size := s.Ledger.Size()
			_, err := s.Gate.Promote(t.Context(), id, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
			wantReason(t, err, attest.EventNotAllowed)
			if s.Ledger.Size() != size {
				t.Error("refused, and yet something was recorded")
			}
			dry, err := s.Gate.Promote(t.Context(), id, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test", DryRun: true})
			if err != nil || dry.Verdict != gate.Allowed {
				t.Errorf("asking: %s, %v", dry.Verdict, err)
			}
		})
	}
}
