package ledger_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

// scene is a ledger to which statements of the gate are appended one by one.
type scene struct {
	*kit
	l *ledger.Ledger
}

// add records one entry a minute after the one before.
func (s *scene) add(e ledger.Entry) attest.RecordID {
	s.tb.Helper()
	return s.append(s.l, e)[0].ID
}

// promote records a promotion of image n to stage test, decided now.
func (s *scene) promote(n int, replaces attest.RecordID) attest.RecordID {
	s.tb.Helper()
	s.now = s.now.Add(time.Minute)
	return s.add(s.promotion(n, "test", 1, replaces, s.l.Size()))
}

func (s *scene) end(n int, p attest.RecordID, state string) {
	s.tb.Helper()
	s.now = s.now.Add(time.Minute)
	s.add(s.effect(n, p, "test", state))
}

// want checks the state of a promotion and that Why says why, in words of ours.
func (s *scene) want(p attest.RecordID, state ledger.State, why string) ledger.Promotion {
	s.tb.Helper()
	got, err := s.l.Promotion(s.tb.Context(), p)
	if err != nil {
		s.tb.Fatal(err)
	}
	if got.State != state || !strings.Contains(got.Why, why) || (why == "") != (got.Why == "") {
		s.tb.Errorf("promotion %d is %s because %q, want %s because %q", got.Index, got.State, got.Why, state, why)
	}
	_, answers, err := s.l.ByKey(s.tb.Context(), got.Key)
	if live := state == ledger.Pending || state == ledger.Done; err != nil || answers != live {
		s.tb.Errorf("promotion %d in state %s answers its request: %v, %v", got.Index, got.State, answers, err)
	}
	return got
}

// holds checks what stage test holds; the zero id is nothing.
func (s *scene) holds(want attest.RecordID) {
	s.tb.Helper()
	st, err := s.l.Stage(s.tb.Context(), "payments", "test", repo)
	var got attest.RecordID
	if st.Head != nil {
		got = st.Head.ID
	}
	if err != nil || got != want {
		s.tb.Errorf("stage test holds %.8s, %v, want %.8s", got, err, want)
	}
}

func TestFold(t *testing.T) {
	t.Parallel()
	for name, play := range map[string]func(*testing.T, *scene){
		"the first promotion wins and is done": func(t *testing.T, s *scene) {
			p := s.promote(1, zero)
			s.holds(p)
			if got := s.want(p, ledger.Pending, ""); got.Ref != image(1).Ref || len(got.Digests) != 1 || got.Target == "" || !got.Since.Equal(got.Time) {
				t.Errorf("%+v", got)
			}
			s.end(1, p, attest.EffectDone)
			if got := s.want(p, ledger.Done, ""); !got.Since.Equal(s.now) || !got.Time.Before(got.Since) {
				t.Errorf("done since %s, decided %s", got.Since, got.Time)
			}
			s.holds(p)
		},
		"K08 of two that replace one head the first in the log wins": func(t *testing.T, s *scene) {
			a, b := s.promote(1, zero), s.promote(2, zero)
			s.want(a, ledger.Pending, "")
			s.want(b, ledger.Void, "reached payments/test first")
			s.holds(a)
		},
		"a successor replaces the head": func(t *testing.T, s *scene) {
			a := s.promote(1, zero)
			b := s.promote(2, a)
			s.holds(b)
			s.end(1, a, attest.EffectDone) // late: it ends a, and moves nothing
			s.want(a, ledger.Done, "")
			s.holds(b)
		},
		"M01 a promotion decided against an older head is void": func(t *testing.T, s *scene) {
			a := s.promote(1, zero)
			b := s.promote(2, a)
			s.want(s.promote(3, a), ledger.Void, "first")
			s.want(s.promote(4, zero), ledger.Void, "first")
			s.holds(b)
		},
		"a promotion that replaces one which never was is void": func(t *testing.T, s *scene) {
			s.want(s.promote(1, attest.RecordID{1}), ledger.Void, "no longer holds")
			s.holds(zero)
		},
		"a failed effect brings the predecessor back": func(t *testing.T, s *scene) {
			a := s.promote(1, zero)
			s.end(1, a, attest.EffectDone)
			b := s.promote(2, a)
			s.end(2, b, attest.EffectFail)
			if got := s.want(b, ledger.Failed, "the registry said no"); !got.Since.Equal(s.now) {
				t.Errorf("failed since %s", got.Since)
			}
			s.holds(a)
			again := s.promote(2, a)
			s.want(again, ledger.Pending, "")
			s.holds(again)
		},
		"predecessors that failed are passed over": func(t *testing.T, s *scene) {
			a := s.promote(1, zero)
			b := s.promote(2, a)
			c := s.promote(3, b)
			s.end(2, b, attest.EffectFail) // not the head: the head stays
			s.holds(c)
			s.end(3, c, attest.EffectFail)
			s.holds(a)
			s.end(1, a, attest.EffectFail)
			s.holds(zero)
			d := s.promote(4, zero)
			s.holds(d)
		},
		"a promotion ends once": func(t *testing.T, s *scene) {
			a := s.promote(1, zero)
			s.end(1, a, attest.EffectDone)
			s.end(1, a, attest.EffectFail)
			s.want(a, ledger.Done, "")
			b := s.promote(2, a)
			s.end(2, b, attest.EffectFail)
			s.end(2, b, attest.EffectDone)
			s.want(b, ledger.Failed, "no")
			s.holds(a)
		},
		"an effect of nothing, of a loser or of another state changes nothing": func(t *testing.T, s *scene) {
			a, b := s.promote(1, zero), s.promote(2, zero)
			s.end(1, attest.RecordID{1}, attest.EffectDone)
			s.end(2, b, attest.EffectDone)
			s.end(1, a, "MAYBE")
			s.want(a, ledger.Pending, "")
			s.want(b, ledger.Void, "first")
			s.holds(a)
		},
		"rules that changed after the decision void it": func(t *testing.T, s *scene) {
			s.add(s.policy(2, 2))
			s.want(s.promote(1, zero), ledger.Void, "rules of payments/test changed to those of policy version 2")
			p := s.add(s.promotion(1, "test", 2, zero, s.l.Size()))
			s.want(p, ledger.Pending, "")
		},
		"an unrelated change of the policy voids nothing": func(t *testing.T, s *scene) {
			s.add(s.policy(2, 1))
			s.want(s.promote(1, zero), ledger.Pending, "")
		},
		"M06 an older policy never comes back": func(t *testing.T, s *scene) {
			s.add(s.policy(3, 3))
			s.add(s.policy(2, 2))
			s.add(s.policy(3, 4)) // the same version with other text
			if p, ok := s.l.Policy(); !ok || p.Version != 3 || p.Stages["payments/test"] != stageDigest("payments", "test", 3) {
				t.Errorf("policy in force: %+v", p)
			}
			s.want(s.promote(1, zero), ledger.Void, "policy version 3")
		},
		"M02 a stage that the policy lacks holds nothing": func(t *testing.T, s *scene) {
			s.want(s.add(s.promotion(1, "moon", 1, zero, 0)), ledger.Void, "no recorded policy has the stage payments/moon")
		},
		"M09 a decision cannot know records behind its own": func(t *testing.T, s *scene) {
			s.want(s.add(s.promotion(1, "test", 1, zero, s.l.Size()+1)), ledger.Void, "claims to know")
			s.holds(zero)
		},
		"stages and repositories do not touch each other": func(t *testing.T, s *scene) {
			a := s.promote(1, zero)
			b := s.add(s.promotion(2, "prod", 1, zero, 0))
			s.want(a, ledger.Pending, "")
			s.want(b, ledger.Pending, "")
			s.holds(a)
			if st, err := s.l.Stage(t.Context(), "payments", "test", repo+"x"); err != nil || st.Head != nil {
				t.Errorf("another repository holds %+v, %v", st.Head, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newKit(t)
			s := &scene{k, k.open()}
			s.add(s.policy(1, 1))
			play(t, s)
			before := snapshot(t, s.l)
			s.close(s.l)
			s.l = s.open() // the state is read back from the index
			if diff := cmp.Diff(before, snapshot(t, s.l), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("a restart changed:\n%s", diff)
			}
			s.fsck(s.l)
		})
	}
}

func TestNoPolicyNoPromotion(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	s := &scene{k, k.open()}
	s.want(s.promote(1, zero), ledger.Void, "no recorded policy")
	k.fsck(s.l)
}

// 100 promotions of two digests at once: one wins, and the log says why the
// others did not.
func TestConcurrentPromotionsHaveOneWinner(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	k.append(l, k.policy(1, 1))
	var entries []ledger.Entry
	for i := range 100 {
		entries = append(entries, k.promotion(i%2, "test", 1, zero, 1))
	}
	var wg sync.WaitGroup
	for _, e := range entries {
		wg.Go(func() {
			if _, err := l.Append(t.Context(), e); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	all, err := l.Promotions(t.Context(), "payments", "test", repo, 1000)
	if err != nil || len(all) != 100 {
		t.Fatalf("%d promotions, %v", len(all), err)
	}
	for i, p := range all {
		want := ledger.Void
		if i == len(all)-1 { // the newest stands first
			want = ledger.Pending
		}
		if p.State != want || (p.Why == "") != (want == ledger.Pending) {
			t.Errorf("promotion %d is %s because %q, want %s", p.Index, p.State, p.Why, want)
		}
	}
	st, err := l.Stage(t.Context(), "payments", "test", repo)
	if err != nil || st.Head == nil || st.Head.ID != all[99].ID {
		t.Errorf("the stage holds %+v, %v", st.Head, err)
	}
	k.fsck(l)
}

// model is the rules of the fold once more, as short as they can be written.
type model struct {
	version, rules int
	promotions     map[attest.RecordID]*ledger.Promotion
	order          []attest.RecordID
	head           map[string]attest.RecordID // by stage
}

func (m *model) promote(id attest.RecordID, stage string, rules int, replaces attest.RecordID) {
	p := &ledger.Promotion{ID: id, Stage: stage, Replaces: replaces, State: ledger.Void}
	m.promotions[id] = p
	m.order = append(m.order, id)
	if replaces == m.head[stage] && rules == m.rules {
		p.State = ledger.Pending
		m.head[stage] = id
	}
}

func (m *model) effect(id attest.RecordID, state string) {
	p := m.promotions[id]
	if p == nil || p.State != ledger.Pending {
		return
	}
	p.State = ledger.State(state)
	for m.head[p.Stage] != zero && m.promotions[m.head[p.Stage]].State == ledger.Failed {
		m.head[p.Stage] = m.promotions[m.head[p.Stage]].Replaces
	}
}

// Random histories, folded in one batch, in pieces, after a restart and after a
// rebuild, end as the model says and the same each time.
func TestFoldIsTheSameHoweverItIsCut(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	one, pieces := newKit(t), newKit(t)
	m := &model{promotions: map[attest.RecordID]*ledger.Promotion{}, head: map[string]attest.RecordID{}}
	entries := one.history(random, m, 150)

	a, b := one.open(), pieces.open()
	one.append(a, entries...)
	for rest := entries; len(rest) > 0; {
		n := min(len(rest), 1+random.IntN(40))
		pieces.append(b, rest[:n]...)
		if rest = rest[n:]; random.IntN(3) == 0 {
			pieces.close(b)
			b = pieces.open()
		}
	}
	want := snapshot(t, a)
	for _, h := range want.History {
		for _, p := range h {
			if p.State != m.promotions[p.ID].State {
				t.Errorf("promotion %d is %s, the model says %s", p.Index, p.State, m.promotions[p.ID].State)
			}
		}
	}
	for _, s := range want.Stages {
		var head attest.RecordID
		if s.Head != nil {
			head = s.Head.ID
		}
		if head != m.head[s.Stage] {
			t.Errorf("%s holds %.8s, the model says %.8s", s.Stage, head, m.head[s.Stage])
		}
	}
	same := func(how string, l *ledger.Ledger) {
		t.Helper()
		// The logs differ in key and checkpoints, and in nothing else.
		if diff := cmp.Diff(want, snapshot(t, l), cmpopts.EquateEmpty(), cmpopts.IgnoreFields(sums{}, "Where")); diff != "" {
			t.Errorf("%s it differs (seed %d):\n%s", how, seed, diff)
		}
	}
	same("in pieces", b)
	one.fsck(a)
	pieces.fsck(b)
	for _, k := range []*kit{one, pieces} {
		if err := ledger.Rebuild(t.Context(), k.cfg); err != nil {
			t.Fatal(err)
		}
		l := k.open()
		same("after a rebuild", l)
		k.fsck(l)
	}
}

// history makes n random statements, most of them such as a gate would make.
func (s *issuer) history(random *rand.Rand, m *model, n int) []ledger.Entry {
	entries := []ledger.Entry{s.policy(1, 1)}
	m.version, m.rules = 1, 1
	for i := 1; i < n; i++ {
		s.now = s.now.Add(time.Second)
		stage := []string{"test", "prod"}[random.IntN(2)]
		switch random.IntN(10) {
		case 0:
			version, rules := m.version-1+random.IntN(3), 1+random.IntN(2)
			entries = append(entries, s.policy(version, rules))
			if version > m.version {
				m.version, m.rules = version, rules
			}
		case 1, 2, 3, 4, 5:
			replaces, rules := m.head[stage], m.rules
			if len(m.order) > 0 && random.IntN(4) == 0 {
				replaces = m.order[random.IntN(len(m.order))]
			}
			if random.IntN(5) == 0 {
				rules = 3 - rules
			}
			e := s.promotion(i, stage, rules, replaces, uint64(i))
			entries = append(entries, e)
			m.promote(e.ID(), stage, rules, replaces)
		default:
			if len(m.order) == 0 {
				entries = append(entries, s.signed(i))
				continue
			}
			// Mostly of a recent one, which is likely to be pending.
			at := max(0, len(m.order)-1-random.IntN(1+random.IntN(4)))
			id, state := m.order[at], []string{attest.EffectDone, attest.EffectFail}[random.IntN(2)]
			entries = append(entries, s.effect(i, id, m.promotions[id].Stage, state))
			m.effect(id, state)
		}
	}
	return entries
}

func TestStagesAreOrderedAndPaged(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	k.append(l, k.policy(1, 1), k.promotion(1, "test", 1, zero, 0), k.promotion(1, "prod", 1, zero, 0))
	var got []string
	after := ledger.StageState{}
	for {
		page, err := l.Stages(t.Context(), after, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		after = page[0]
		got = append(got, fmt.Sprint(after.Track, after.Stage, after.Repository, after.Head.Ref.Digest == image(1).Ref.Digest))
	}
	if diff := cmp.Diff([]string{fmt.Sprint("payments", "prod", repo, true), fmt.Sprint("payments", "test", repo, true)}, got); diff != "" {
		t.Error(diff)
	}
	k.fsck(l)
}
