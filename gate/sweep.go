package gate

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

const (
	// sweepBatch bounds how many tags and bases are looked at in one go, and
	// sweepPause is the time between two.
	sweepBatch = 16
	sweepPause = time.Second
	// maxSwept bounds the bases of one round. Those behind it are looked at on
	// demand only.
	maxSwept = 10_000
	// restAway is how long a registry that does not answer is left alone; maxRest
	// bounds what a registry may ask for.
	restAway = time.Minute
	maxRest  = time.Hour
)

// Bases says which base images are followed.
type Bases struct {
	Follow []attest.BaseName // repository and tag
	// Every is the time from one round of looking at them, and at the bases of what
	// the stages hold, to the next; 0 is never.
	Every time.Duration
}

// sweeper looks at registries from time to time. What it finds are hints: which tag
// named which layers, and which bases have a successor.
type sweeper struct {
	mu    sync.Mutex // one batch at a time; guards what follows
	queue []sweepItem
	next  time.Time // when the next round begins

	resting sync.Mutex // guards what follows
	until   map[string]time.Time
}

// sweepItem is one thing to look at.
type sweepItem struct {
	follow attest.BaseName // a followed tag, or
	base   attest.Base     // the base of an image that a stage holds
}

func (i sweepItem) host() string {
	return cmp.Or(i.follow.Repository, i.base.Repository).Host()
}

// rests returns until when a registry is left alone.
func (s *sweeper) rests(host string) time.Time {
	s.resting.Lock()
	defer s.resting.Unlock()
	return s.until[host]
}

// rest leaves a registry alone that was asked in vain, for as long as it says.
func (s *sweeper) rest(host string, now time.Time, err error) {
	wait := restAway
	var e *attest.Error
	if errors.As(err, &e) {
		if e.Reason != attest.RegistryUnavailable {
			return // it answered: only this one thing cannot be had
		}
		if asked, err := strconv.Atoi(e.Metadata["retry_after"]); err == nil && asked > 0 {
			wait = time.Duration(min(asked, int(maxRest/time.Second))) * time.Second
		}
	}
	s.resting.Lock()
	defer s.resting.Unlock()
	if s.until == nil {
		s.until = map[string]time.Time{}
	}
	if until := now.Add(wait); until.After(s.until[host]) {
		s.until[host] = until
	}
}

// wake forgets that a registry was asked in vain.
func (s *sweeper) wake(host string) {
	s.resting.Lock()
	defer s.resting.Unlock()
	delete(s.until, host)
}

// sweepLoop sweeps until ctx ends.
func (g *Gate) sweepLoop(ctx context.Context) {
	for ctx.Err() == nil {
		wait := g.Sweep(ctx).Sub(g.Now())
		select {
		case <-time.After(max(sweepPause, min(wait, time.Minute))): // the clock may be set meanwhile
		case <-ctx.Done():
		}
	}
}

// Sweep looks at a few of the followed tags and of the bases of what the stages hold,
// in a fixed order, and returns when to be called again. It asks one registry one
// thing at a time, and one that is busy not before it said. Run calls it when Bases
// has an interval. Nothing depends on it: what it does not find is asked on demand.
func (g *Gate) Sweep(ctx context.Context) time.Time {
	s := &g.sweeper
	s.mu.Lock()
	defer s.mu.Unlock()
	now := g.Now()
	// A clock that was set back begins a round as well.
	if len(s.queue) == 0 && (!now.Before(s.next) || s.next.Sub(now) > g.Bases.Every) {
		items, err := g.round(ctx)
		if err != nil && ctx.Err() == nil {
			g.Logger.Warn("looking for bases to check", "error", err)
		}
		s.queue, s.next = items, now.Add(g.Bases.Every)
	}

	// 1. What may be asked now: the first of the queue whose registries do not rest.
	hosts := map[string][]sweepItem{}
	taken := 0
	rest := s.queue[:0:0]
	for _, item := range s.queue {
		if taken == sweepBatch || now.Before(s.rests(item.host())) {
			rest = append(rest, item)
			continue
		}
		hosts[item.host()] = append(hosts[item.host()], item)
		taken++
	}

	// 2. Each registry by itself, so that a slow one keeps no other waiting.
	var mu sync.Mutex
	var again []sweepItem
	var wg sync.WaitGroup
	for host, items := range hosts {
		wg.Go(func() {
			for i, item := range items {
				if ctx.Err() == nil && g.look(ctx, item) {
					continue
				}
				g.Logger.Info("leaving a registry alone", "registry", host, "until", s.rests(host), "waiting", len(items)-i)
				mu.Lock()
				defer mu.Unlock()
				again = append(again, items[i:]...)
				return
			}
		})
	}
	wg.Wait()
	slices.SortStableFunc(again, func(a, b sweepItem) int { return cmp.Compare(a.host(), b.host()) })
	s.queue = append(again, rest...)
	return g.nextSweep(s, now)
}

// nextSweep returns when something can be done: at once, when a registry may be asked
// again, or when the next round begins.
func (g *Gate) nextSweep(s *sweeper, now time.Time) time.Time {
	if len(s.queue) == 0 {
		return s.next
	}
	next := s.rests(s.queue[0].host())
	for _, item := range s.queue {
		if until := s.rests(item.host()); until.Before(next) {
			next = until
		}
	}
	if next.Before(now) {
		return now
	}
	return next
}

// round returns what is to be looked at: the followed tags as they are configured,
// then the bases of what the stages hold.
func (g *Gate) round(ctx context.Context) ([]sweepItem, error) {
	var out []sweepItem
	var names []string
	for _, b := range g.Bases.Follow {
		out, names = append(out, sweepItem{follow: b}), append(names, b.String())
	}
	if err := g.Ledger.Unfollow(ctx, names); err != nil {
		return out, err
	}
	bases, err := g.heldBases(ctx)
	for _, b := range bases {
		out = append(out, sweepItem{base: b})
	}
	return out, err
}

// heldBases returns the bases with a tag of the images that the stages hold, each
// once and in order.
func (g *Gate) heldBases(ctx context.Context) ([]attest.Base, error) {
	found := map[string]attest.Base{}
	var after ledger.StageState
	for len(found) < maxSwept {
		states, err := g.Ledger.Stages(ctx, after, maxPage)
		if err != nil || len(states) == 0 {
			return ordered(found), err
		}
		for _, st := range states {
			b, err := g.heldBase(ctx, st)
			if err != nil {
				return ordered(found), err
			}
			if b.Tag != "" && b.Repository != "" && !b.Digest.IsZero() && b.Result != attest.Contradicted {
				found[freshnessKey(b)] = b
			}
		}
		after = states[len(states)-1]
	}
	g.Logger.Warn("too many bases: the others are checked on demand only", "most", maxSwept)
	return ordered(found), nil
}

// heldBase returns the base of what a stage holds; the zero value for none.
func (g *Gate) heldBase(ctx context.Context, st ledger.StageState) (attest.Base, error) {
	p, err := g.running(ctx, st.Track, st.Stage, st.Repository)
	if err != nil || p == nil {
		return attest.Base{}, err
	}
	b, _, _, err := g.recordedBase(ctx, p.Ref)
	return b, err
}

func ordered(found map[string]attest.Base) []attest.Base {
	out := make([]attest.Base, 0, len(found))
	for _, b := range found {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b attest.Base) int {
		return cmp.Or(cmp.Compare(a.String(), b.String()), cmp.Compare(freshnessKey(a), freshnessKey(b)))
	})
	return out
}

// look does one item. It returns false when the registry is to be left alone.
func (g *Gate) look(ctx context.Context, item sweepItem) bool {
	var err error
	if item.follow.Repository != "" {
		err = g.follow(ctx, item.follow)
	} else if last, seen, _ := g.Ledger.BaseState(ctx, item.base); !seen || g.Now().Sub(last.Checked).Abs() >= g.Bases.Every/2 {
		_, err = g.checkBase(ctx, item.base)
	}
	if err != nil && ctx.Err() == nil {
		g.Logger.Warn("looking at a base", "base", cmp.Or(item.follow.String(), item.base.String()), "error", err)
	}
	return err == nil || !g.Now().Before(g.sweeper.rests(item.host()))
}

// follow notes what a followed tag names now. Of a tag that still names what it did,
// which is the rule, only that is asked: large registries do not count it.
func (g *Gate) follow(ctx context.Context, tag attest.BaseName) error {
	rows, err := g.Ledger.NewestFollowed(ctx, tag.String())
	if err != nil {
		return err
	}
	host := tag.Repository.Host()
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	same := false
	if len(rows) > 0 {
		state, err := g.Registry.Freshness(within, attest.Base{Repository: tag.Repository, Tag: tag.Tag, Digest: rows[0].Digest})
		if err != nil {
			g.sweeper.rest(host, g.Now(), err)
			return err
		}
		same = state.Freshness == attest.Fresh && state.Current == rows[0].Digest
	}
	if !same {
		found, err := g.Registry.Follow(within, tag.Repository, tag.Tag)
		if err != nil {
			g.sweeper.rest(host, g.Now(), err)
			return err
		}
		rows = nil
		for _, f := range found {
			rows = append(rows, ledger.FollowedBase{BaseName: f.BaseName, Platform: f.Platform, Manifest: f.Manifest, Prefix: f.Prefix, Layers: f.Layers})
		}
	}
	g.sweeper.wake(host)
	return g.Ledger.PutFollowed(ctx, tag.String(), g.Now(), rows)
}
