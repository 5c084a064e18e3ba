package server

import (
	"bytes"
	"encoding/binary"
	"io"
	"sync"

	"github.com/hallmarkd/hallmark/attest"
)

// Requests that bring evidence may be larger than all others. A larger one says how
// large it is before it is read, comes from a caller whose evidence is signed
// somewhere, and counts against what is in flight (attacks C03, I03, I11).
const (
	maxLarge       = 70 << 20  // bytes of one request: gate.MaxEvidenceBytes, and what is around them
	maxLargeTotal  = 160 << 20 // of all that are larger than maxBody
	maxLargeCaller = 80 << 20  // of those of one identity
)

// bringsEvidence names the methods whose requests may have up to maxLarge bytes.
var bringsEvidence = map[string]bool{
	"/hallmark.v1.SigningService/SignImages": true,
	"/hallmark.v1.SigningService/Attest":     true,
}

// large counts the bytes of large requests in flight.
type large struct {
	mu     sync.Mutex
	taken  int64
	caller map[string]int64 // by attest.Identity.Quota; entries at 0 are removed
}

// admitLarge lets a request of n bytes in, more than maxBody, or refuses it before it
// is read: TOO_LARGE, ROLE_MISSING, RATE_LIMITED. leave ends it.
func (s *Server) admitLarge(id attest.Identity, n int64) (leave func(), err error) {
	if n > maxLarge {
		return nil, attest.Errorf(attest.TooLarge, "the request has %d bytes, more than %d: send its evidence in several", n, int64(maxLarge))
	}
	if err := s.gate.SendsEvidence(id); err != nil {
		return nil, err
	}
	return s.large.enter(id.Quota(), n)
}

func (l *large) enter(key string, n int64) (leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.caller[key]+n > maxLargeCaller {
		return nil, attest.Errorf(attest.RateLimited, "this identity's large requests have %d bytes in flight, and another %d are more than it may have: wait for some to end", l.caller[key], n)
	}
	if l.taken+n > maxLargeTotal {
		return nil, attest.Errorf(attest.RateLimited, "the service has %d bytes of large requests in flight and cannot take another %d: repeat the call a little later", l.taken, n)
	}
	if l.caller == nil {
		l.caller = map[string]int64{}
	}
	l.taken += n
	l.caller[key] += n
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.taken -= n
		if l.caller[key] -= n; l.caller[key] == 0 {
			delete(l.caller, key)
		}
	}, nil
}

// prefix is what stands before each gRPC message (PROTOCOL-HTTP2,
// Length-Prefixed-Message): a flag and four bytes of length.
const prefix = 5

// firstMessage returns how many bytes a gRPC body says that its first message has,
// and the body as it was. It is 0 when there is none, and when it is compressed: such
// a message is never large, for what becomes of it nobody can say before.
func firstMessage(body io.ReadCloser) (int64, io.ReadCloser) {
	head := make([]byte, prefix)
	n, err := io.ReadFull(body, head)
	whole := struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head[:n]), body), body}
	if err != nil || head[0] != 0 { // the gRPC server finds out for itself
		return 0, whole
	}
	return int64(binary.BigEndian.Uint32(head[1:])), whole
}
