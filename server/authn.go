package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/web"
)

// public is every method that needs no identity; all others are denied without
// one (attacks I05). Names are compared whole, never by prefix (attacks I01).
var public = map[string]bool{
	"/hallmark.v1.TrustService/GetTrustedRoot": true,
	"/hallmark.v1.TrustService/GetGateKey":     true,
	"/hallmark.v1.TrustService/GetCheckpoint":  true,
	healthCheck:                    true,
	"/grpc.health.v1.Health/List":  true,
	"/grpc.health.v1.Health/Watch": true,
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      true,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": true,
}

const healthCheck = "/grpc.health.v1.Health/Check"

// admission is what authentication made of a request: an identity, anonymous or err.
// An identity beside err is the one that was refused.
type admission struct {
	identity  attest.Identity
	anonymous bool // the method is public, or nobody serves it
	err       error
}

type admissionKey struct{}

// admitted returns ctx with what authentication found, for the interceptor.
func admitted(ctx context.Context, a admission) context.Context {
	return context.WithValue(ctx, admissionKey{}, a)
}

// caller returns the identity that the interceptor admitted. Of a public method
// it is the zero identity, which holds no role.
func caller(ctx context.Context) attest.Identity {
	a, _ := ctx.Value(admissionKey{}).(admission)
	return a.identity
}

// admit authenticates a call of method from its credential. A method that nobody
// serves needs no identity: its caller learns just that.
func (s *Server) admit(ctx context.Context, method string, c credential) admission {
	if public[method] || !s.methods[method] {
		return admission{anonymous: true}
	}
	id, err := s.authenticate(ctx, c)
	if err != nil {
		return admission{err: err}
	}
	return admission{identity: id}
}

// authenticate verifies a credential. A certificate is verified for every call,
// not once for the connection, which may outlive it (attacks A24).
func (s *Server) authenticate(ctx context.Context, c credential) (attest.Identity, error) {
	if len(c.chain) > 0 {
		return s.verified.auth.AuthenticateCertificate(ctx, c.chain)
	}
	token, err := identity.Bearer(c.authorization)
	if err != nil {
		return attest.Identity{}, err
	}
	return s.verified.authenticate(ctx, token)
}

// admitRPC returns the admission of a call that reached the interceptor: the one
// made before its body was read, or, of a call that came through the gateway,
// the one that was handed over.
func (s *Server) admitRPC(ctx context.Context, method string) admission {
	if a, ok := ctx.Value(admissionKey{}).(admission); ok {
		return a
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if handle := md.Get(handoverKey); len(handle) == 1 {
		if h, ok := s.handed.Load(handle[0]); ok && h.(handover).method == method {
			return h.(handover).admission
		}
	}
	return s.admit(ctx, method, credential{})
}

// handover is an admission on its way through the gateway's in-memory connection.
// It is good for the method that it was made for: what the gateway makes of a
// path is not trusted to be what the route made of it.
type handover struct {
	method    string
	admission admission
}

const handoverKey = "hallmark-admission"

type handleKey struct{}

// handOver returns ctx for the gateway with an admission that admitRPC finds until
// done is called. The handle is a secret of this process, and nothing but the
// gateway reaches the connection on which it counts.
func (s *Server) handOver(ctx context.Context, method string, a admission) (_ context.Context, done func()) {
	handle := rand.Text()
	s.handed.Store(handle, handover{method, a})
	return context.WithValue(ctx, handleKey{}, handle), func() { s.handed.Delete(handle) }
}

// handleOf gives the gateway the metadata of a call.
func handleOf(ctx context.Context, _ *http.Request) metadata.MD {
	handle, _ := ctx.Value(handleKey{}).(string)
	return metadata.Pairs(handoverKey, handle)
}

// credential is what a request shows of its caller: authorization values, or the
// client certificate of its connection, whose key the handshake has proved. Nothing
// verified it yet. Headers in which proxies name certificates, users or addresses
// are never read (attacks A29).
type credential struct {
	authorization []string
	chain         []*x509.Certificate
}

// credentialOf returns the one credential of a request, an empty one when it has
// none. Two are refused, because different layers would pick different ones
// (attacks A25).
func credentialOf(r *http.Request) (credential, error) {
	c := credential{authorization: r.Header.Values("Authorization")}
	if r.TLS != nil {
		c.chain = r.TLS.PeerCertificates
	}
	shown := 0
	for _, has := range []bool{len(c.authorization) > 0, len(c.chain) > 0, web.HasSession(r.Header)} {
		if has {
			shown++
		}
	}
	if shown > 1 {
		return credential{}, attest.Errorf(attest.TwoIdentities, "the request has more than one of a token, a client certificate and a page session: send one of them")
	}
	return c, nil
}

func (c credential) none() bool { return len(c.authorization)+len(c.chain) == 0 }

// verified remembers for a moment which tokens were good: a job or an admission
// controller sends the same one with every call, and verifying it costs more than
// the whole rest of a decision. A refusal is never remembered.
type verified struct {
	auth *identity.Authenticator
	now  func() time.Time

	mu     sync.Mutex
	tokens map[[sha256.Size]byte]remembered
}

type remembered struct {
	id    attest.Identity
	until time.Time
}

// How long and how many. A key or an issuer that is withdrawn counts for at most
// so much longer (attacks A07).
const (
	rememberFor  = 10 * time.Second
	rememberMost = 4096
)

// authenticate is identity.Authenticator.Authenticate.
func (v *verified) authenticate(ctx context.Context, token string) (attest.Identity, error) {
	key := sha256.Sum256([]byte(token)) // of all of its bytes: another spelling is another token
	now := v.now()
	v.mu.Lock()
	known, ok := v.tokens[key]
	v.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.id, nil
	}
	id, err := v.auth.Authenticate(ctx, token)
	if err != nil {
		return attest.Identity{}, err
	}
	until := now.Add(rememberFor)
	if id.Expires.Before(until) {
		until = id.Expires
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.tokens) >= rememberMost {
		clear(v.tokens) // they are verified again, which is all that is lost
	}
	v.tokens[key] = remembered{id, until}
	return id, nil
}

// callers bounds how many calls each identity has in flight, so that one cannot
// starve the others (attacks I11).
type callers struct {
	most int

	mu       sync.Mutex
	inFlight map[string]int // by attest.Identity.Quota; entries at 0 are removed
}

// enter counts a call of the identity, or refuses it with RATE_LIMITED. The
// returned function ends the call.
func (c *callers) enter(key string) (leave func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inFlight[key] >= c.most {
		return nil, attest.Errorf(attest.RateLimited, "this identity has %d calls in flight, the most that one may have: wait for some to end", c.most)
	}
	c.inFlight[key]++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.inFlight[key]--; c.inFlight[key] == 0 {
			delete(c.inFlight, key)
		}
	}, nil
}
