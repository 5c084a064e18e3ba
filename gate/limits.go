package gate

import (
	"sync"
	"time"

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

// tokenBudget counts what each token has signed. The records are the truth: the
// count of a token is read from them when it is first seen.
type tokenBudget struct {
	now func() time.Time

	mu   sync.Mutex
	used map[string]*tokenCount
}

type tokenCount struct {
	digests  map[attest.Digest]int // how many requests hold it
	requests map[string]bool       // natural keys: one digest may be signed with several hints
	expires  time.Time
}

func newTokenBudget(now func() time.Time) *tokenBudget {
	return &tokenBudget{now: now, used: map[string]*tokenCount{}}
}

// reserve counts a request for a digest against the token's budget and returns
// how to give it back when nothing was signed. recorded lists what the records
// show, digests and natural keys; it is asked once for each token.
func (b *tokenBudget) reserve(id attest.Identity, d attest.Digest, key string, recorded func() ([]attest.Digest, []string, error)) (release func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.used[id.TokenID]
	if c == nil {
		known, keys, err := recorded()
		if err != nil {
			return nil, err
		}
		c = &tokenCount{digests: map[attest.Digest]int{}, requests: map[string]bool{}, expires: id.Expires}
		for i, k := range known {
			c.digests[k]++
			c.requests[keys[i]] = true
		}
		b.forget()
		b.used[id.TokenID] = c
	}
	if c.digests[d] == 0 && len(c.digests) >= MaxTokenDigests {
		return nil, attest.Errorf(attest.TokenSpent, "this token has signed %d digests, the most that one may: request a new token", MaxTokenDigests)
	}
	if len(c.requests) >= MaxTokenRequests {
		return nil, attest.Errorf(attest.TokenSpent, "this token has signed %d times, the most that one may: request a new token", MaxTokenRequests)
	}
	c.digests[d]++
	c.requests[key] = true
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(c.requests, key)
		if c.digests[d]--; c.digests[d] == 0 {
			delete(c.digests, d)
		}
	}, nil
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
