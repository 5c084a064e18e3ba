package web

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"sync"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// Cookie names. With TLS the prefix makes browsers refuse one that was set for
// a wider domain or without Secure (RFC 6265bis section 4.1.3).
const (
	cookieTLS   = "__Host-hallmark-session"
	cookiePlain = "hallmark-session"
)

// Bounds of what is kept in memory.
const (
	maxSessions = 4096
	maxSession  = 12 * time.Hour
	codeLife    = 10 * time.Minute
)

// HasSession reports whether a request's header has a page session, good or not.
func HasSession(h http.Header) bool {
	if len(h["Cookie"]) == 0 {
		return false // as with nearly every call
	}
	r := http.Request{Header: h}
	for _, name := range []string{cookieTLS, cookiePlain} {
		if _, err := r.Cookie(name); err == nil {
			return true
		}
	}
	return false
}

// holder is whom a secret stands for, and until when.
type holder struct {
	id  attest.Identity
	end time.Time
}

// secrets maps random 256-bit values to identities. Only their hashes are kept:
// looking one up takes no time that depends on how much of it was guessed
// (attacks L05), and a memory dump signs nobody in.
type secrets struct {
	now func() time.Time

	mu   sync.Mutex
	held map[[sha256.Size]byte]holder
}

// add returns a new secret for id that is good until end.
func (s *secrets) add(id attest.Identity, end time.Time) string {
	var raw [32]byte
	rand.Read(raw[:]) // never fails (crypto/rand)
	secret := base64.RawURLEncoding.EncodeToString(raw[:])
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.held) >= maxSessions {
		s.makeRoom()
	}
	s.held[sha256.Sum256([]byte(secret))] = holder{id, end}
	return secret
}

// makeRoom removes what has ended, and if nothing has, what ends first.
func (s *secrets) makeRoom() {
	var first [sha256.Size]byte
	var end time.Time
	for k, h := range s.held {
		if !s.now().Before(h.end) {
			delete(s.held, k)
			continue
		}
		if end.IsZero() || h.end.Before(end) {
			first, end = k, h.end
		}
	}
	if len(s.held) >= maxSessions {
		delete(s.held, first)
	}
}

// find returns whom a secret stands for.
func (s *secrets) find(secret string) (holder, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, ok := s.held[sha256.Sum256([]byte(secret))]
	return h, ok && s.now().Before(h.end)
}

// take is find for a secret that is good once.
func (s *secrets) take(secret string) (holder, bool) {
	h, ok := s.find(secret)
	s.drop(secret)
	return h, ok
}

func (s *secrets) drop(secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, sha256.Sum256([]byte(secret)))
}
