package gate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/hallmarkd/hallmark/attest"
)

// maxDenials is how many denials a minute are recorded for one caller and
// repository.
const maxDenials = 10

// denialLimit bounds how many denial records one caller can cause. Losing it in
// a restart costs at most one more minute's worth of records.
type denialLimit struct {
	now func() time.Time

	mu     sync.Mutex
	recent map[string][]time.Time
}

func newDenialLimit(now func() time.Time) *denialLimit {
	return &denialLimit{now: now, recent: map[string][]time.Time{}}
}

// take returns RATE_LIMITED when the caller has used up its minute.
func (l *denialLimit) take(caller string, repo attest.Repository) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	key, now := caller+" "+string(repo), l.now()
	kept := l.recent[key][:0]
	for _, t := range l.recent[key] {
		if now.Sub(t) < time.Minute {
			kept = append(kept, t)
		}
	}
	if len(kept) >= maxDenials {
		l.recent[key] = kept
		return attest.Errorf(attest.RateLimited, "%d denials for %s within a minute: this one was not recorded. Wait a minute before asking again", maxDenials, repo)
	}
	l.recent[key] = append(kept, now)
	if len(l.recent) > 10_000 {
		l.forget(now)
	}
	return nil
}

// forget drops callers whose minute is over.
func (l *denialLimit) forget(now time.Time) {
	for key, times := range l.recent {
		if now.Sub(times[len(times)-1]) >= time.Minute {
			delete(l.recent, key)
		}
	}
}

// tokenBudget counts what each token has signed, and binds a token that is good for
// one request to it. The records are the truth: what they say of a token is read when
// it is first seen.
type tokenBudget struct {
	now func() time.Time

	mu   sync.Mutex
	used map[string]*tokenCount
}

type tokenCount struct {
	expires time.Time

	mu       sync.Mutex // held while the records are read
	read     bool
	digests  map[attest.Digest]int // how many requests hold it
	requests map[string]bool       // natural keys: one digest may be signed with several hints
	bound    bool                  // to use
	use      string
	holders  int // requests under way that are bound to use
}

// tokenRecord is what a record says of the token that it was signed with.
type tokenRecord struct {
	digest attest.Digest
	key    string // natural
	use    string // "" of a token that was good for several requests
}

func newTokenBudget(now func() time.Time) *tokenBudget {
	return &tokenBudget{now: now, used: map[string]*tokenCount{}}
}

// of returns the count of a token, locked. recorded lists what the records show.
func (b *tokenBudget) of(id attest.Identity, recorded func() ([]tokenRecord, error)) (*tokenCount, error) {
	b.mu.Lock()
	c := b.used[id.TokenID]
	if c == nil {
		b.forget()
		c = &tokenCount{expires: id.Expires}
		b.used[id.TokenID] = c
	}
	b.mu.Unlock()
	c.mu.Lock()
	if c.read {
		return c, nil
	}
	records, err := recorded()
	if err != nil {
		c.mu.Unlock()
		return nil, err
	}
	c.digests, c.requests, c.read = map[attest.Digest]int{}, map[string]bool{}, true
	for _, r := range records {
		c.digests[r.digest]++
		c.requests[r.key] = true
		if c.bound && c.use != r.use {
			r.use = "" // it was good for several: no request is the one
		}
		c.bound, c.use = true, r.use
	}
	return c, nil
}

// bind reserves a token that is good for one request for the request named use, and
// for repetitions of it; "" is that of any other token. TOKEN_REPLAYED when it is
// another's. end is called when the request is over: one of which nothing was recorded
// gives the token back.
func (b *tokenBudget) bind(id attest.Identity, use string, recorded func() ([]tokenRecord, error)) (end func(), err error) {
	if use == "" {
		return func() {}, nil
	}
	c, err := b.of(id, recorded)
	if err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	if err := c.hold(use); err != nil {
		return nil, err
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.letGo(use)
	}, nil
}

// hold counts a holder of the token for a use. c.mu is held, as in letGo.
func (c *tokenCount) hold(use string) error {
	if use == "" {
		return nil
	}
	if c.bound && c.use != use {
		return attest.Errorf(attest.TokenReplayed, "this token was used for another request, and its issuer is configured with replay: once: request a new token for each call, or ask for everything in one")
	}
	c.bound, c.use = true, use
	c.holders++
	return nil
}

func (c *tokenCount) letGo(use string) {
	if use == "" {
		return
	}
	if c.holders--; c.holders == 0 && len(c.requests) == 0 {
		c.bound = false
	}
}

// reservation is a request that counts against its token's budget.
type reservation struct {
	count  *tokenCount
	digest attest.Digest
	key    string
	use    string
	mine   bool // nobody had counted it
	kept   bool
}

// reserve counts a request for a digest against the token's budget. It holds the
// token for its use as well: what its caller no longer waits for goes on, and must not
// be recorded with a token that was given to another request meanwhile.
func (b *tokenBudget) reserve(id attest.Identity, d attest.Digest, key, use string, recorded func() ([]tokenRecord, error)) (*reservation, error) {
	c, err := b.of(id, recorded)
	if err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	r := &reservation{count: c, digest: d, key: key, use: use, mine: !c.requests[key]}
	switch {
	case !r.mine: // an attempt that may have been recorded
	case c.digests[d] == 0 && len(c.digests) >= MaxTokenDigests:
		return nil, attest.Errorf(attest.TokenSpent, "this token has signed %d digests, the most that one may: request a new token", MaxTokenDigests)
	case len(c.requests) >= MaxTokenRequests:
		return nil, attest.Errorf(attest.TokenSpent, "this token has signed %d times, the most that one may: request a new token", MaxTokenRequests)
	}
	if err := c.hold(use); err != nil {
		return nil, err
	}
	if r.mine {
		c.digests[d]++
		c.requests[key] = true
	}
	return r, nil
}

// keep says that from here on something may be recorded, whatever is answered.
func (r *reservation) keep() { r.kept = true }

// end gives the reservation back unless it was kept.
func (r *reservation) end() {
	c := r.count
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.mine && !r.kept {
		delete(c.requests, r.key)
		if c.digests[r.digest]--; c.digests[r.digest] == 0 {
			delete(c.digests, r.digest)
		}
	}
	c.letGo(r.use)
}

// forget drops tokens that have expired: they are refused before they get here.
func (b *tokenBudget) forget() {
	if len(b.used) < 10_000 {
		return
	}
	for id, c := range b.used {
		if b.now().After(c.expires.Add(time.Minute)) {
			delete(b.used, id)
		}
	}
}

// Of large envelopes only so many bytes are worked on at once, those that are signed
// and those that are attached apart: each takes several times its size in memory.
const (
	small  = 1 << 20 // bytes of an envelope that waits for nobody
	atOnce = 24 << 20
)

// weigh waits until n bytes may be worked on, and returns how to end that.
func weigh(ctx context.Context, s *semaphore.Weighted, n int64) (end func(), err error) {
	if n <= small {
		return func() {}, nil
	}
	n = min(n, atOnce) // what is larger waits for all others
	if err := s.Acquire(ctx, n); err != nil {
		return nil, fmt.Errorf("waiting for other large evidence: %w", err)
	}
	return func() { s.Release(n) }, nil
}

// keyedLocks gives one lock for each key in use.
type keyedLocks struct {
	mu    sync.Mutex
	locks map[string]*keyedLock
}

type keyedLock struct {
	sync.Mutex
	users int
}

func newKeyedLocks() *keyedLocks { return &keyedLocks{locks: map[string]*keyedLock{}} }

// lock locks key and returns how to unlock it.
func (k *keyedLocks) lock(key string) (unlock func()) {
	k.mu.Lock()
	l := k.locks[key]
	if l == nil {
		l = &keyedLock{}
		k.locks[key] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.locks, key)
		}
	}
}
