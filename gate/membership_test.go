package gate_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// A30: whoever lost a membership or a role has lost it at the next call. Nothing
// remembers that it was there: neither the answer to an earlier call nor a record.
func TestMembershipIsNotRemembered(t *testing.T) {
	t.Parallel()
	roles := func(version int, signer string) string {
		return policyOf(version, "id.repository_id == 'SOURCE' && id.ref == '"+signer+"'", oneStage)
	}
	s := testkit.NewStack(t, testkit.Options{Policy: roles(1, "refs/heads/main")})
	img := s.PushApp("acme/api")
	job := s.Token(nil)
	first := sign(t, s, job, img.ImageRef)

	ask := func(groups ...string) error {
		_, err := s.Gate.Verify(t.Context(), s.Identity(s.PersonToken("a-1", groups...)), gate.VerifyRequest{Ref: img.ImageRef})
		return err
	}
	if err := ask("audit"); err != nil {
		t.Fatalf("an auditor is refused: %v", err)
	}
	// The same person's next token no longer has the group.
	for name, groups := range map[string][]string{"A30 group withdrawn": nil, "A30 another group": {"auditors"}} {
		t.Run(name, func(t *testing.T) { wantReason(t, ask(groups...), attest.SourceNotAllowed) })
	}
	if err := ask("audit"); err != nil {
		t.Errorf("an auditor who is one again is refused: %v", err)
	}

	// The policy no longer lets the job sign: its token, which is good, does not get
	// even what was signed with it.
	s.SetPolicy(roles(2, "refs/heads/release"))
	s.Restart()
	t.Run("A30 role withdrawn", func(t *testing.T) {
		again, err := trySign(t, s, job, gate.SignImage{Ref: img.ImageRef})
		wantReason(t, err, attest.SourceNotAllowed)
		if len(again.ProvenanceBundle) > 0 || len(first.ProvenanceBundle) == 0 {
			t.Error("an answer from before the role was withdrawn")
		}
	})

	// A role that was given until a day ends with it, within the life of a process.
	var later atomic.Int64 // days
	start := time.Now()
	clock := func() time.Time { return start.AddDate(0, 0, int(later.Load())) }
	late := testkit.NewStack(t, testkit.Options{
		Policy: strings.Replace(roles(1, "refs/heads/main"), `when: "'audit' in id.groups"}`, `when: "'audit' in id.groups", until: `+start.AddDate(0, 0, 1).UTC().Format(time.DateOnly)+`}`, 1),
		Now:    clock,
	})
	other := late.PushApp("acme/api")
	asks := func() error {
		_, err := late.Gate.Verify(t.Context(), late.Identity(late.PersonToken("a-1", "audit")), gate.VerifyRequest{Ref: other.ImageRef})
		return err
	}
	if err := asks(); err != nil {
		t.Fatalf("before its end: %v", err)
	}
	later.Store(3)
	t.Run("A30 role ended", func(t *testing.T) { wantReason(t, asks(), attest.RoleMissing) })
}
