package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier"
)

// maxAnswer bounds one answer of the server, in bytes.
const maxAnswer = 128 << 20 // bundles of all the evidence of a request, in base64

// maxRequest bounds one request, in bytes: all the evidence that it may carry, and
// what is around it.
const maxRequest = maxEvidenceBytes + 8<<20

// session is a connection to a service whose trust root is the pinned one.
type session struct {
	*grpc.ClientConn
	app         *app
	server      string // as given, canonical
	local       bool   // the connection does not leave this machine
	trustedRoot []byte // trusted_root.json
	fingerprint string // hex SHA-256 of trustedRoot
	service     string // public_url as the trust root names it: the audience of tokens
	options     []grpc.CallOption

	mu      sync.Mutex
	abort   context.CancelCauseFunc // guarded by mu: ends the call that is under way
	refused error                   // guarded by mu: why this server is not to be talked to
}

// connect dials the server and checks its trust root against the pin. No token
// is read before that: a stranger is never shown one.
func (a *app) connect(ctx context.Context) (*session, error) {
	t, err := a.target()
	if err != nil {
		return nil, err
	}
	s, err := a.dial(t)
	if err != nil {
		return nil, err
	}
	if err := s.meet(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// meet fetches the trust root and checks that it is the pinned one.
func (s *session) meet(ctx context.Context) error {
	root, err := call(ctx, s, hallmarkv1.NewTrustServiceClient(s).GetTrustedRoot, &hallmarkv1.GetTrustedRootRequest{})
	if err != nil {
		return err
	}
	s.trustedRoot = root.GetTrustedRoot()
	s.fingerprint = attest.Hash(s.trustedRoot).Hex()
	if s.fingerprint != root.GetSha256() {
		return fmt.Errorf("%s sent a trust root with the fingerprint %s and says that it is %s: it was altered on its way", s.server, s.fingerprint, root.GetSha256())
	}
	if err := s.app.pin(s.server, s.fingerprint); err != nil {
		return err
	}
	if s.service, err = serviceOf(s.trustedRoot); err != nil {
		return fmt.Errorf("the trust root of %s: %w", s.server, err)
	}
	if name := strings.TrimSuffix(root.GetPublicUrl(), "/"); name != "" && name != s.service {
		return fmt.Errorf("%s calls itself %s, and its trust root is of %s", s.server, name, s.service)
	}
	return nil
}

// verifier checks what the server answers by the pinned trust root. Statements
// of the gate key are none of it.
func (s *session) verifier() (*verifier.Verifier, error) {
	return verifier.New(s.trustedRoot, nil, s.service)
}

// call makes one call, with progress, and turns its error into one for people.
func call[Req, Resp any](ctx context.Context, s *session, method func(context.Context, *Req, ...grpc.CallOption) (*Resp, error), req *Req) (*Resp, error) {
	defer s.app.progress("waiting for " + s.server)()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.watch(cancel)
	resp, err := method(ctx, req, s.options...)
	if refused := s.watch(nil); refused != nil {
		return nil, refused
	}
	return resp, fromRPC(s.server, err)
}

// watch sets what a failed handshake ends, and returns why the last one failed.
func (s *session) watch(abort context.CancelCauseFunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.abort = abort
	if abort != nil && s.refused != nil {
		abort(s.refused)
	}
	return s.refused
}

// refuse ends the call that is under way: repeating does not mend a certificate.
func (s *session) refuse(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused = fmt.Errorf("not talking to %s: %w (--ca-file names the authority of a private certificate)", s.server, err)
	if s.abort != nil {
		s.abort(s.refused)
	}
}

// strictTLS reports handshakes that can never succeed. gRPC itself would go on
// trying them as it does an unreachable address.
type strictTLS struct {
	credentials.TransportCredentials
	refuse func(error)
}

func (c strictTLS) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, conn)
	var unverified *tls.CertificateVerificationError
	var noTLS tls.RecordHeaderError
	if errors.As(err, &unverified) || errors.As(err, &noTLS) {
		c.refuse(err)
	}
	return secured, info, err
}

func (c strictTLS) Clone() credentials.TransportCredentials {
	return strictTLS{c.TransportCredentials.Clone(), c.refuse}
}

// target is a parsed --server.
type target struct {
	url   string // canonical
	host  string // HOST:PORT to dial
	plain bool   // HTTP/2 without TLS, on this machine only
	local bool
}

// target reads --server. Plain HTTP is refused beyond this machine: it would
// show the token to the network.
func (a *app) target() (target, error) {
	if a.Server == "" {
		return target{}, usagef("no server: give --server URL or set HALLMARK_SERVER")
	}
	u, err := url.Parse(a.Server)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return target{}, usagef("--server %q is not https://HOST or https://HOST:PORT", a.Server)
	}
	t := target{url: strings.ToLower(u.Scheme + "://" + u.Host), local: loopback(u.Hostname())}
	port := u.Port()
	switch {
	case u.Scheme == "https":
		port = orElse(port, "443")
	case u.Scheme == "http" && t.local:
		t.plain, port = true, orElse(port, "80")
	case u.Scheme == "http":
		return target{}, usagef("--server %s is not encrypted and not on this machine: use https://", t.url)
	default:
		return target{}, usagef("--server %q is not https://HOST or https://HOST:PORT", a.Server)
	}
	t.host = net.JoinHostPort(u.Hostname(), port)
	return t, nil
}

func orElse(s, or string) string {
	if s == "" {
		return or
	}
	return s
}

// loopback reports whether a host name can only mean this machine.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// dial prepares the connection; the first call makes it.
func (a *app) dial(t target) (*session, error) {
	s := &session{app: a, server: t.url, local: t.local}
	options := []grpc.DialOption{
		grpc.WithUserAgent("hallmark/" + version),
		grpc.WithDefaultServiceConfig(a.backoff.serviceConfig()),
		grpc.WithMaxCallAttempts(a.backoff.attempts),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer), grpc.MaxCallSendMsgSize(maxRequest),
			// A call that is larger than this buffer is never repeated.
			grpc.MaxRetryRPCBufferSize(maxRequest)),
		grpc.WithStatsHandler(attempts{a}),
	}
	name := "dns:///" + t.host
	if a.ClientCert != "" {
		if t.plain {
			return nil, usagef("--client-cert is for https://: without TLS nothing shows it")
		}
		if _, err := a.svid(nil); err != nil {
			return nil, err
		}
	}
	if t.plain {
		// "localhost" is a name like any other to a resolver: what is dialled is
		// checked as well, and no proxy of the environment is asked.
		d := net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil || !ap.Addr().IsLoopback() {
				return fmt.Errorf("%s is not this machine, and http:// is for nothing else", address)
			}
			return nil
		}}
		name = "passthrough:///" + t.host
		options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				return d.DialContext(ctx, "tcp", address)
			}))
	} else {
		roots, err := a.roots()
		if err != nil {
			return nil, err
		}
		secure := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, GetClientCertificate: a.svid})
		options = append(options, grpc.WithTransportCredentials(strictTLS{secure, s.refuse}))
	}
	var err error
	if s.ClientConn, err = grpc.NewClient(name, options...); err != nil {
		return nil, fmt.Errorf("preparing the connection to %s: %w", t.url, err)
	}
	return s, nil
}

// svid reads --client-cert and --client-key: what replaces them while the command
// runs is used by the next connection. Without them the server gets none. It
// implements tls.Config.GetClientCertificate.
func (a *app) svid(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	if a.ClientCert == "" {
		return &tls.Certificate{}, nil
	}
	cert, err := tls.LoadX509KeyPair(a.ClientCert, a.ClientKey)
	if err != nil {
		return nil, fmt.Errorf("reading --client-cert and --client-key: %w", err)
	}
	return &cert, nil
}

// roots reads --ca-file; nil means those of the system.
func (a *app) roots() (*x509.CertPool, error) {
	if a.CAFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(a.CAFile)
	if err != nil {
		return nil, fmt.Errorf("reading --ca-file: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--ca-file %s holds no PEM certificate", a.CAFile)
	}
	return pool, nil
}

// backoff says how often and how fast a call is repeated.
type backoff struct {
	attempts      int    // gRPC allows at most five
	initial, most string // durations
}

// repeatable are the calls that may be repeated when no answer came, because the
// service answers a repetition from the record of the first (design section 5,
// natural keys) or only reads.
var repeatable = []string{
	hallmarkv1.SigningService_SignImages_FullMethodName,
	hallmarkv1.SigningService_Attest_FullMethodName,
	hallmarkv1.SigningService_Import_FullMethodName,
	hallmarkv1.PromotionService_Verify_FullMethodName,
	hallmarkv1.PromotionService_Promote_FullMethodName,
	hallmarkv1.PromotionService_ListStages_FullMethodName,
	hallmarkv1.AuditService_GetArtifact_FullMethodName,
	hallmarkv1.AuditService_GetBase_FullMethodName,
	hallmarkv1.AuditService_ListRecords_FullMethodName,
	hallmarkv1.AuditService_GetDecision_FullMethodName,
	hallmarkv1.TrustService_GetTrustedRoot_FullMethodName,
	hallmarkv1.TrustService_GetGateKey_FullMethodName,
	hallmarkv1.TrustService_WhoAmI_FullMethodName,
}

// serviceConfig has gRPC repeat calls on UNAVAILABLE only (AIP-194), with growing
// pauses (gRFC A6).
func (b backoff) serviceConfig() string {
	type name struct {
		Service string `json:"service"`
		Method  string `json:"method"`
	}
	var names []name
	for _, full := range repeatable {
		service, method, _ := strings.Cut(strings.TrimPrefix(full, "/"), "/")
		names = append(names, name{service, method})
	}
	raw, err := json.Marshal(map[string]any{"methodConfig": []any{map[string]any{
		"name": names,
		"retryPolicy": map[string]any{
			"maxAttempts": b.attempts, "initialBackoff": b.initial, "maxBackoff": b.most,
			"backoffMultiplier": 2, "retryableStatusCodes": []string{"UNAVAILABLE"},
		},
	}}})
	if err != nil {
		panic(err) // strings and numbers always marshal
	}
	return string(raw)
}

// attempts tells why an attempt of a call failed: in the line of progress, and
// with -v on a line of its own.
type attempts struct{ app *app }

func (attempts) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

func (attempts) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (attempts) HandleConn(context.Context, stats.ConnStats) {}

// HandleRPC implements stats.Handler; End is reported for every attempt.
func (h attempts) HandleRPC(_ context.Context, s stats.RPCStats) {
	end, ok := s.(*stats.End)
	if !ok || status.Code(end.Error) != codes.Unavailable {
		return
	}
	why := status.Convert(end.Error).Message()
	h.app.mu.Lock()
	h.app.last = why
	h.app.mu.Unlock()
	h.app.detail("unavailable: %s", why)
}
