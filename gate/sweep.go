package gate

import (
	"cmp"
	"context"
	"errors"
	"maps"
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
	// restAway is how long what was asked in vain is left alone, and a registry of
	// which restAfter different things were in a row; maxRest bounds what a registry may
	// ask for, and how rarely one thing is asked that never answers.
	restAway  = time.Minute
	restAfter = 3
	maxRest   = time.Hour
	// manyRests is how many rests are kept before those that are over are forgotten.
	manyRests = 1000
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

	resting sync.Mutex                 // guards what follows
	until   map[string]time.Time       // by registry and by sweepItem.key
	vain    map[string]map[string]bool // keys that a registry did not answer since it last answered one
}

// sweepItem is one thing to look at.
type sweepItem struct {
	follow attest.BaseName // a followed tag, or
	base   attest.Base     // the base of an image that a stage holds
	vain   int             // how often it was asked in vain while others were answered
}

func (i sweepItem) host() string {
	return cmp.Or(i.follow.Repository, i.base.Repository).Host()
}

// key names the item; no registry is called so.
func (i sweepItem) key() string {
	if i.follow.Repository != "" {
		return followKey(i.follow)
	}
	return freshnessKey(i.base)
}

func followKey(tag attest.BaseName) string { return attest.Key("follow", tag.String()) }

// rests returns until when a registry, and of it one thing, is left alone.
func (s *sweeper) rests(host, key string) time.Time {
	s.resting.Lock()
	defer s.resting.Unlock()
	return later(s.until[host], s.until[key])
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// rest leaves a registry, or one thing, alone until a moment.
func (s *sweeper) rest(name string, now, until time.Time) {
	s.resting.Lock()
	defer s.resting.Unlock()
	if s.until == nil {
		s.until = map[string]time.Time{}
	}
	if len(s.until) >= manyRests {
		maps.DeleteFunc(s.until, func(_ string, t time.Time) bool { return !now.Before(t) })
	}
	s.until[name] = later(until, s.until[name])
}

// asked notes the answer of a registry about one thing. When there was none that one
// thing is left alone, for whoever asks; the registry is only when it says so: one thing
// in it may be slow, and anybody may ask for that one.
func (s *sweeper) asked(host, key string, now time.Time, err error) {
	if !unanswered(err) {
		s.resting.Lock()
		defer s.resting.Unlock()
		delete(s.until, key)
		delete(s.vain, host)
		return
	}
	s.rest(key, now, now.Add(restAway))
	var e *attest.Error
	if errors.As(err, &e) {
		if asked, err := strconv.Atoi(e.Metadata["retry_after"]); err == nil && asked > 0 {
			s.rest(host, now, now.Add(time.Duration(min(asked, int(maxRest/time.Second)))*time.Second))
		}
	}
}

// unanswered reports whether err says that a registry did not answer. Any other is an
// answer: only this one thing cannot be had.
func unanswered(err error) bool {
	var e *attest.Error
	return err != nil && (!errors.As(err, &e) || e.Reason == attest.RegistryUnavailable)
}

// failed notes that the sweep has asked for an item in vain, and reports whether its
// registry is left alone for that.
func (s *sweeper) failed(item sweepItem, now time.Time) bool {
	host := item.host()
	s.resting.Lock()
	if s.vain == nil {
		s.vain = map[string]map[string]bool{}
	}
	if s.vain[host] == nil {
		s.vain[host] = map[string]bool{}
	}
	if len(s.vain[host]) < restAfter {
		s.vain[host][item.key()] = true
	}
	away := len(s.vain[host]) >= restAfter
	s.resting.Unlock()
	if away {
		s.rest(host, now, now.Add(restAway))
	}
	return away || now.Before(s.rests(host, host))
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
	// A clock that was set back begins a round as well. What is still to be asked waits
	// for nothing, and nothing waits for it: a registry may be away for days.
	if !now.Before(s.next) || s.next.Sub(now) > g.Bases.Every {
		items, err := g.round(ctx)
		if err != nil && ctx.Err() == nil {
			g.Logger.Warn("looking for bases to check", "error", err)
		}
		s.queue, s.next = merge(s.queue, items, err == nil), now.Add(g.Bases.Every)
	}

	// 1. What may be asked now: the first of the queue that do not rest.
	hosts := map[string][]sweepItem{}
	taken := 0
	rest := s.queue[:0:0]
	for _, item := range s.queue {
		if taken == sweepBatch || now.Before(s.rests(item.host(), item.key())) {
			rest = append(rest, item)
			continue
		}
		hosts[item.host()] = append(hosts[item.host()], item)
		taken++
	}

	// 2. Each registry by itself, so that a slow one keeps no other waiting for long.
	var mu sync.Mutex
	var unasked, again []sweepItem
	var wg sync.WaitGroup
	for host, items := range hosts {
		wg.Go(func() {
			left, failed := g.lookAll(ctx, host, items)
			mu.Lock()
			defer mu.Unlock()
			unasked, again = append(unasked, left...), append(again, failed...)
		})
	}
	wg.Wait()

	// 3. What failed goes behind all others.
	byHost := func(a, b sweepItem) int { return cmp.Compare(a.host(), b.host()) }
	slices.SortStableFunc(unasked, byHost)
	slices.SortStableFunc(again, byHost)
	s.queue = slices.Concat(unasked, rest, again)
	return g.nextSweep(s, now)
}

// lookAll looks at items of one registry, one after the other, and returns those that
// were not asked, because it is to be left alone or ctx has ended, and those that it
// did not answer.
func (g *Gate) lookAll(ctx context.Context, host string, items []sweepItem) (unasked, failed []sweepItem) {
	for i, item := range items {
		if ctx.Err() != nil {
			return items[i:], failed
		}
		if !unanswered(g.look(ctx, item)) {
			continue
		}
		if ctx.Err() != nil {
			return items[i:], failed
		}
		now := g.Now()
		if g.sweeper.failed(item, now) {
			g.Logger.Info("leaving a registry alone", "registry", host, "until", g.sweeper.rests(host, host), "waiting", len(items)-i)
			return items[i+1:], append(failed, item)
		}
		// Others of the registry are answered: this one is asked less and less often.
		g.sweeper.rest(item.key(), now, now.Add(min(restAway<<item.vain, maxRest)))
		item.vain = min(item.vain+1, 10)
		failed = append(failed, item)
	}
	return nil, failed
}

// merge adds the items of a round behind those that still wait, each once. When the
// round is complete, what is not in it any more is dropped.
func merge(queue, round []sweepItem, complete bool) []sweepItem {
	wanted, waiting := map[string]bool{}, map[string]bool{}
	for _, item := range round {
		wanted[item.key()] = true
	}
	var out []sweepItem
	for _, item := range queue {
		if wanted[item.key()] || !complete {
			out, waiting[item.key()] = append(out, item), true
		}
	}
	for _, item := range round {
		if key := item.key(); !waiting[key] {
			out, waiting[key] = append(out, item), true
		}
	}
	return out
}

// nextSweep returns when something can be done: at once, when something may be asked
// again, or when the next round begins.
func (g *Gate) nextSweep(s *sweeper, now time.Time) time.Time {
	next := s.next
	for _, item := range s.queue {
		if until := s.rests(item.host(), item.key()); until.Before(next) {
			next = until
		}
	}
	return later(next, now)
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

// look does one item. Its error is told already.
func (g *Gate) look(ctx context.Context, item sweepItem) error {
	var err error
	if item.follow.Repository != "" {
		err = g.follow(ctx, item.follow)
	} else if last, seen, _ := g.Ledger.BaseState(ctx, item.base); !seen || g.Now().Sub(last.Checked).Abs() >= g.Bases.Every/2 {
		_, err = g.checkBase(ctx, item.base)
	}
	if err != nil && ctx.Err() == nil {
		g.Logger.Warn("looking at a base", "base", cmp.Or(item.follow.String(), item.base.String()), "error", err)
	}
	return err
}

// follow notes what a followed tag names now. Of a tag that still names what it did,
// which is the rule, only that is asked: large registries do not count it.
func (g *Gate) follow(ctx context.Context, tag attest.BaseName) error {
	rows, err := g.Ledger.NewestFollowed(ctx, tag.String())
	if err != nil {
		return err
	}
	host, key := tag.Repository.Host(), followKey(tag)
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	same := false
	if len(rows) > 0 {
		state, err := g.Registry.Freshness(within, attest.Base{Repository: tag.Repository, Tag: tag.Tag, Digest: rows[0].Digest})
		if err != nil {
			g.sweeper.asked(host, key, g.Now(), err)
			return err
		}
		same = state.Freshness == attest.Fresh && state.Current == rows[0].Digest
	}
	if !same {
		found, err := g.Registry.Follow(within, tag.Repository, tag.Tag)
		if err != nil {
			g.sweeper.asked(host, key, g.Now(), err)
			return err
		}
		rows = nil
		for _, f := range found {
			rows = append(rows, ledger.FollowedBase{BaseName: f.BaseName, Platform: f.Platform, Manifest: f.Manifest, Prefix: f.Prefix, Layers: f.Layers})
		}
	}
	g.sweeper.asked(host, key, g.Now(), nil)
	return g.Ledger.PutFollowed(ctx, tag.String(), g.Now(), rows)
}
