package ledger

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// State is what became of a promotion.
type State string

// The states of a promotion.
const (
	Pending State = "PENDING" // it is the stage's decision; its effect is not confirmed yet
	Done    State = "DONE"    // its effect is confirmed
	Failed  State = "FAILED"  // its effect failed; its predecessor counts again
	Void    State = "VOID"    // it lost: what it was decided on no longer held
)

// Promotion is one promotion record and what became of it. A Promotion is never
// changed once it was handed out, and must not be.
type Promotion struct {
	ID           attest.RecordID
	Index        uint64
	Ref          attest.ImageRef
	Track, Stage string
	Replaces     attest.RecordID // the promotion it was decided against; zero: none
	State        State
	Why          string    // of VOID and FAILED, for people
	Time         time.Time // when it was decided
	Since        time.Time // when State was reached
	Target       string    // HOST/PATH:TAG that its effect sets
	StageDigest  attest.Digest
	Digests      []attest.Digest // of the image and its platforms
	Key          string          // natural key
}

// StageState is what a stage of a track holds for one repository.
type StageState struct {
	Track, Stage string
	Repository   attest.Repository
	Head         *Promotion // PENDING or DONE; nil when nothing was ever promoted, or all of it failed
}

type stageKey struct {
	track, stage string
	repository   attest.Repository
}

// fold is the state that the records, read in log order, lead to. It is a pure
// function of them: whoever folds the same log has the same stages.
type fold struct {
	policy      *attest.PolicyChange
	policyIndex uint64
	heads       map[stageKey]*Promotion // a nil head: the stage is known and empty
}

func newFold() *fold { return &fold{heads: map[stageKey]*Promotion{}} }

// foldStep is the fold of some more records on top of a fold that it leaves
// alone, so that it can be thrown away when they cannot be stored.
type foldStep struct {
	base *fold
	load func(attest.RecordID) (*Promotion, error) // a promotion of an earlier step; nil when there is none

	policy      *attest.PolicyChange // changed; nil: not
	policyIndex uint64
	heads       map[stageKey]*Promotion
	promotions  map[attest.RecordID]*Promotion // new or changed
	requests    map[string]*uint64             // natural key of promotions -> index; nil: none answers it now
	won         []*Promotion
}

func (f *fold) step(load func(attest.RecordID) (*Promotion, error)) *foldStep {
	return &foldStep{
		base: f, load: load, heads: map[stageKey]*Promotion{},
		promotions: map[attest.RecordID]*Promotion{}, requests: map[string]*uint64{},
	}
}

// commit makes the step part of the fold.
func (s *foldStep) commit() {
	if s.policy != nil {
		s.base.policy, s.base.policyIndex = s.policy, s.policyIndex
	}
	for k, p := range s.heads {
		s.base.heads[k] = p
	}
}

// apply folds one record. Records that decide nothing pass through.
func (s *foldStep) apply(id attest.RecordID, index uint64, facts attest.Facts, e attest.Envelope) error {
	var st attest.Statement
	switch facts.Kind {
	case attest.KindPolicy, attest.KindPromotion, attest.KindEffect:
		if err := json.Unmarshal(e.Payload, &st); err != nil {
			return fmt.Errorf("parsing statement: %w", err)
		}
	}
	switch facts.Kind {
	case attest.KindPolicy:
		return s.change(index, st)
	case attest.KindPromotion:
		return s.promote(id, index, facts, st)
	case attest.KindEffect:
		return s.effect(facts, st)
	}
	return nil
}

// change takes a policy into force. An older one, or another text under the
// same version, never replaces a newer one, whatever order they came in
// (attacks M06); the same text with other settings does.
func (s *foldStep) change(index uint64, st attest.Statement) error {
	var p attest.PolicyChange
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return fmt.Errorf("parsing policy: %w", err)
	}
	if now := s.inForce(); now == nil || p.Version > now.Version || p.Version == now.Version && p.Digest == now.Digest {
		s.policy, s.policyIndex = &p, index
	}
	return nil
}

func (s *foldStep) inForce() *attest.PolicyChange {
	if s.policy != nil {
		return s.policy
	}
	return s.base.policy
}

func (s *foldStep) head(k stageKey) *Promotion {
	if p, ok := s.heads[k]; ok {
		return p
	}
	return s.base.heads[k]
}

// promote decides whether a promotion wins: what it was decided on must still
// hold at its place in the log. Of two that replace the same head the first
// wins (attacks K08).
func (s *foldStep) promote(id attest.RecordID, index uint64, facts attest.Facts, st attest.Statement) error {
	p, decided, err := readPromotion(id, index, facts, st)
	if err != nil {
		return err
	}
	k := stageKey{p.Track, p.Stage, p.Ref.Repository}
	s.promotions[id] = p
	if p.Why = s.void(k, p, decided); p.Why != "" {
		p.State = Void
		return nil
	}
	s.heads[k] = p
	s.requests[p.Key] = &p.Index
	s.won = append(s.won, p)
	return nil
}

// void says why a promotion does not count, "" when it does.
func (s *foldStep) void(k stageKey, p *Promotion, decided attest.Decided) string {
	name := p.Track + "/" + p.Stage
	var now attest.RecordID
	if h := s.head(k); h != nil {
		now = h.ID
	}
	if p.Replaces != now {
		if now.IsZero() {
			return fmt.Sprintf("it was decided as the successor of promotion %.12s, which %s no longer holds: decide again", p.Replaces, name)
		}
		return fmt.Sprintf("promotion %.12s of %s reached %s first: decide again", now, s.head(k).Ref.Digest.Short(), name)
	}
	policy := s.inForce()
	switch {
	case policy == nil || policy.Stages[name].IsZero():
		return fmt.Sprintf("no recorded policy has the stage %s: record the policy, then decide again", name)
	case policy.Stages[name] != p.StageDigest:
		return fmt.Sprintf("the rules of %s changed to those of policy version %d after it was decided: decide again", name, policy.Version)
	case decided.LogSize > p.Index:
		return fmt.Sprintf("it claims to know %d records, but stands at %d itself: decide again", decided.LogSize, p.Index)
	}
	return ""
}

func readPromotion(id attest.RecordID, index uint64, facts attest.Facts, st attest.Statement) (*Promotion, attest.Decided, error) {
	var pred attest.Promotion
	if err := json.Unmarshal(st.Predicate, &pred); err != nil {
		return nil, attest.Decided{}, fmt.Errorf("parsing promotion: %w", err)
	}
	p := &Promotion{
		ID: id, Index: index, Track: pred.Track, Stage: pred.Stage, Replaces: pred.Replaces, State: Pending,
		Time: facts.Time, Since: facts.Time, Target: pred.Target, StageDigest: pred.StageDigest, Key: facts.Key,
	}
	for _, sub := range st.Subject {
		d, err := attest.ParseHex(sub.Digest["sha256"])
		if err != nil {
			return nil, attest.Decided{}, fmt.Errorf("reading subject: %w", err)
		}
		p.Digests = append(p.Digests, d)
	}
	if len(p.Digests) == 0 {
		return nil, attest.Decided{}, fmt.Errorf("promotion has no subject")
	}
	p.Ref = attest.ImageRef{Repository: attest.Repository(st.Subject[0].Name), Digest: p.Digests[0]}
	return p, pred.Decided, nil
}

// effect ends a promotion, once.
func (s *foldStep) effect(facts attest.Facts, st attest.Statement) error {
	var e attest.Effect
	if err := json.Unmarshal(st.Predicate, &e); err != nil {
		return fmt.Errorf("parsing effect: %w", err)
	}
	old, err := s.promotion(e.Promotion)
	if err != nil || old == nil || old.State != Pending {
		return err
	}
	p := *old
	p.Since = facts.Time
	switch e.State {
	case attest.EffectDone:
		p.State = Done
	case attest.EffectFail:
		p.State, p.Why = Failed, e.Detail
		// The same request may be made again: the failed one no longer answers it.
		s.requests[p.Key] = nil
	default:
		return nil
	}
	s.promotions[p.ID] = &p
	k := stageKey{p.Track, p.Stage, p.Ref.Repository}
	if h := s.head(k); h == nil || h.ID != p.ID {
		return nil
	}
	s.heads[k] = &p
	if p.State == Failed {
		s.heads[k], err = s.standing(&p)
	}
	return err
}

// standing returns the nearest predecessor of a failed promotion that did not
// fail, nil when there is none.
func (s *foldStep) standing(p *Promotion) (*Promotion, error) {
	for p != nil && p.State == Failed {
		if p.Replaces.IsZero() {
			return nil, nil
		}
		var err error
		if p, err = s.promotion(p.Replaces); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (s *foldStep) promotion(id attest.RecordID) (*Promotion, error) {
	if p, ok := s.promotions[id]; ok {
		return p, nil
	}
	return s.load(id)
}
