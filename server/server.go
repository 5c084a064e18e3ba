// Package server is the edge: one listener for gRPC, REST, pages and the log's
// tiles. It authenticates, bounds and translates, and decides nothing.
package server

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/identity"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// Limits of one connection and of one call. Defaults of the libraries are not
// safe ones (attacks I02, I03, I08).
const (
	maxBody    = 4 << 20   // bytes of a request, after decompression; of some more, see maxLarge
	maxAnswer  = 128 << 20 // bytes of an answer that the gateway takes over
	maxHeader  = 64 << 10  // bytes of a request's header
	maxStreams = 250       // concurrent requests of one HTTP/2 connection

	headerTimeout = 10 * time.Second // to send a request's header
	readTimeout   = 30 * time.Second // to send a whole request
	idleTimeout   = 2 * time.Minute  // without a request
	callTimeout   = time.Minute      // of a call whose caller sets no earlier deadline
	slowTimeout   = 2 * time.Minute  // of one that writes to registries
	writeTimeout  = slowTimeout + readTimeout
	abandonAfter  = 2 * time.Second // for a handler whose connection was closed
)

// slow names the methods that write to registries or read much of them.
var slow = map[string]bool{
	"/hallmark.v1.SigningService/SignImages": true,
	"/hallmark.v1.SigningService/Attest":     true,
	"/hallmark.v1.SigningService/Import":     true,
	"/hallmark.v1.PromotionService/Promote":  true,
}

// Config is what a server is made of. Gate, Auth, Pages and Logger are required.
type Config struct {
	Gate  *gate.Gate
	Auth  *identity.Authenticator
	Pages http.Handler // what is not gRPC, REST, log or OpenAPI
	// CertFile and KeyFile hold the PEM certificate chain and key for TLS. They
	// are read again when they change. Without them only a loopback address is
	// served, or proxies.
	CertFile, KeyFile string
	// BehindProxy are the addresses of reverse proxies that end TLS. Without
	// CertFile and off loopback, connections from elsewhere are closed.
	BehindProxy []netip.Prefix
	Logger      *slog.Logger
	Now         func() time.Time // nil is time.Now

	MaxInFlight          int           // requests at once; 0 is 1024
	MaxInFlightPerCaller int           // calls at once of one owner (attest.Identity.Quota); 0 is 256
	ShutdownTimeout      time.Duration // to finish what is in flight; 0 is 20 s
}

// Server serves one gate. Make it with New.
type Server struct {
	gate      *gate.Gate
	logger    *slog.Logger
	cfg       Config
	verified  verified
	methods   map[string]bool // every method that is served: "/package.Service/Method"
	streaming map[string]bool // those whose requests may have several messages
	grpc      *grpc.Server
	grpcLarge *grpc.Server // for requests of more than maxBody
	large     large
	mux       *http.ServeMux
	callers   callers
	inFlight  chan struct{}
	open      chan struct{} // of inFlight, what requests may take that need no identity
	probes    chan struct{} // health checks, beside inFlight
	working   work          // handlers: waited for before the gate may be closed
	handed    sync.Map      // handover by handle: what restRoute found, for the interceptor

	closeREST func() error
}

// New returns a server that is not listening yet. BAD_CONFIG.
func New(cfg Config) (*Server, error) {
	if (cfg.CertFile == "") != (cfg.KeyFile == "") {
		return nil, attest.Errorf(attest.BadConfig, "tls needs both cert_file and key_file")
	}
	cfg.MaxInFlight = orDefault(cfg.MaxInFlight, 1024)
	cfg.MaxInFlightPerCaller = orDefault(cfg.MaxInFlightPerCaller, 256)
	cfg.ShutdownTimeout = orDefault(cfg.ShutdownTimeout, 20*time.Second)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Server{
		gate: cfg.Gate, logger: cfg.Logger, cfg: cfg,
		verified: verified{auth: cfg.Auth, now: cfg.Now, tokens: map[[sha256.Size]byte]remembered{}},
		methods:  map[string]bool{}, streaming: map[string]bool{},
		inFlight: make(chan struct{}, cfg.MaxInFlight),
		open:     make(chan struct{}, max(1, cfg.MaxInFlight/4)),
		probes:   make(chan struct{}, cfg.MaxInFlight),
		callers:  callers{most: cfg.MaxInFlightPerCaller, inFlight: map[string]int{}},
	}
	s.grpc, s.grpcLarge = s.newGRPC(), s.newLargeGRPC()
	rest, err := s.newREST()
	if err != nil {
		return nil, err
	}
	s.mux = http.NewServeMux()
	s.mux.Handle("/v1/", rest)
	s.mux.HandleFunc("GET /log/{path...}", s.serveLog)
	s.mux.HandleFunc("GET /openapi.json", serveOpenAPI)
	s.mux.Handle("/", cfg.Pages)
	return s, nil
}

func orDefault[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// Serve serves lis until ctx ends, then lets what is in flight finish, at most
// for the shutdown time-out and two seconds, and returns nil. A server serves
// once. BAD_CONFIG when lis is neither
// loopback nor TLS nor behind a proxy.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	lis, err := s.secure(lis)
	if err != nil {
		return errors.Join(err, s.stop())
	}
	srv := s.httpServer()
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(lis) }()
	select {
	case err := <-ended: // the listener broke
		return errors.Join(fmt.Errorf("serving %s: %w", lis.Addr(), err), srv.Close(), s.stop())
	case <-ctx.Done():
	}
	// 1. No new connection, no new request; what runs may finish.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.ShutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		// 2. Its time is over: contexts end, connections close.
		s.logger.Warn("closing connections that are still in use", "after", s.cfg.ShutdownTimeout)
		if err := srv.Close(); err != nil {
			s.logger.Warn("closing connections", "error", err)
		}
	}
	// 3. Handlers whose connections are gone come to their end.
	return s.stop()
}

// stop ends the gRPC server and waits for the handlers. One that goes on although
// its caller is gone — a flow that other callers share is not cancelled with one
// of them — is left behind: the ledger takes all of an entry or nothing.
func (s *Server) stop() error {
	s.grpc.Stop()
	s.grpcLarge.Stop()
	if left := s.working.wait(abandonAfter); left > 0 {
		s.logger.Warn("leaving calls behind that have not ended", "calls", left)
	}
	return s.closeREST()
}

// work counts handlers that run.
type work struct {
	mu   sync.Mutex
	n    int
	idle chan struct{} // not nil while somebody waits
}

func (w *work) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
}

func (w *work) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n--; w.n == 0 && w.idle != nil {
		close(w.idle)
		w.idle = nil
	}
}

// wait waits until none runs, at most for the given time, and returns how many
// do then.
func (w *work) wait(most time.Duration) int {
	w.mu.Lock()
	if w.n == 0 {
		w.mu.Unlock()
		return 0
	}
	idle := make(chan struct{})
	w.idle = idle
	w.mu.Unlock()
	select {
	case <-idle:
		return 0
	case <-time.After(most):
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n
}

// httpServer returns the HTTP server with its limits. gRPC goes through it as
// well, so that they hold there too.
func (s *Server) httpServer() *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(s.cfg.CertFile == "") // secure has seen to it that this is no risk
	return &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		Protocols:         protocols,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          maxStreams,
			MaxReadFrameSize:              16 << 10,
			MaxReceiveBufferPerConnection: 1 << 20,
			MaxReceiveBufferPerStream:     256 << 10,
			SendPingTimeout:               time.Minute,
			PingTimeout:                   15 * time.Second,
			WriteByteTimeout:              30 * time.Second,
		},
		ErrorLog: slog.NewLogLogger(s.logger.Handler(), slog.LevelDebug), // mostly scanners
	}
}

// serve is where every request comes in.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	s.working.begin()
	defer s.working.end()
	isGRPC := r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
	slots := []chan struct{}{s.inFlight}
	switch {
	case isGRPC && r.URL.Path == healthCheck:
		// No crowd of strangers may make a healthy service look sick. A check waits
		// for no body, but for its answer to be taken: that keeps out no other call.
		slots = []chan struct{}{s.probes}
		if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(headerTimeout)); err != nil {
			s.logger.Debug("bounding a health check", "error", err)
		}
	case !s.guarded(r, isGRPC):
		// Whoever is unknown may be slow at no cost, and must not keep out the
		// others (attacks I08, I11).
		slots = append(slots, s.open)
	}
	for _, slot := range slots {
		select {
		case slot <- struct{}{}:
			defer func() { <-slot }()
		default:
			s.tooBusy(w, isGRPC)
			return
		}
	}
	if isGRPC {
		s.serveGRPC(w, r)
		return
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	s.mux.ServeHTTP(w, r)
}

// guarded reports whether a request may use any slot: one that is refused without
// an identity before a byte of its body is read.
func (s *Server) guarded(r *http.Request, isGRPC bool) bool {
	if isGRPC {
		return s.methods[r.URL.Path] && !public[r.URL.Path]
	}
	return strings.HasPrefix(r.URL.Path, "/v1/") && !strings.HasPrefix(r.URL.Path, "/v1/trust/")
}

// tooBusy refuses a request beyond the bound for all callers together.
func (s *Server) tooBusy(w http.ResponseWriter, isGRPC bool) {
	r := refusal{Reason: attest.RateLimited, Message: "the service has as many requests as it can take: repeat the call a little later"}
	s.logRefusal("", attest.Identity{}, r, nil, 0)
	if !isGRPC {
		writeStatus(w, 0, r.status())
		return
	}
	// A gRPC answer without a message (grpc PROTOCOL-HTTP2, "Trailers-Only"). No
	// handler runs that could write it.
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", fmt.Sprint(int(CodeOf(r.Reason))))
	w.Header().Set("Grpc-Message", r.Message)
	w.WriteHeader(http.StatusOK)
}

func serveOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Write(pb.OpenAPI) // a reader that went away cannot be told
}

// serveLog serves the log as static files (C2SP tlog-tiles). Checkpoint and hash
// tiles are public; for entry bundles the gate asks for a role.
func (s *Server) serveLog(w http.ResponseWriter, r *http.Request) {
	path := r.PathValue("path")
	id, err := s.optional(r)
	var body []byte
	if err == nil {
		body, err = s.gate.LogFile(r.Context(), id, path)
	}
	if err != nil {
		refused := refuse(err)
		s.logRefusal("GET /log/", attest.Identity{}, refused, err, 0)
		writeStatus(w, 0, refused.status())
		return
	}
	h := w.Header()
	switch {
	case path == "checkpoint":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		h.Set("Cache-Control", "no-cache")
	case id != nil: // what only some may read, no shared cache keeps
		h.Set("Content-Type", "application/octet-stream")
		h.Set("Cache-Control", "private, max-age=31536000, immutable")
	default:
		h.Set("Content-Type", "application/octet-stream")
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
	}
	w.Write(body)
}

// optional returns the caller of a request that may be anonymous: nil. A credential
// that is shown must be good all the same.
func (s *Server) optional(r *http.Request) (*attest.Identity, error) {
	c, err := credentialOf(r)
	if err != nil || c.none() {
		return nil, err
	}
	id, err := s.authenticate(r.Context(), c)
	if err != nil {
		return nil, err
	}
	return &id, nil
}

// secure wraps lis with TLS. Tokens are bearer secrets: in the clear they may
// travel only inside the host or between a proxy and here.
func (s *Server) secure(lis net.Listener) (net.Listener, error) {
	if s.cfg.CertFile != "" {
		files := &certificate{certFile: s.cfg.CertFile, keyFile: s.cfg.KeyFile, logger: s.logger}
		if _, err := files.get(nil); err != nil {
			return nil, err
		}
		return tls.NewListener(lis, s.tlsConfig(files)), nil
	}
	addr, ok := lis.Addr().(*net.TCPAddr)
	switch {
	case ok && addr.IP.IsLoopback():
		return lis, nil
	case len(s.cfg.BehindProxy) > 0:
		return proxyListener{lis, s.cfg.BehindProxy}, nil
	}
	return nil, attest.Errorf(attest.BadConfig,
		"%s is not a loopback address: set tls.cert_file and tls.key_file, or tls.behind_proxy if a proxy ends TLS", lis.Addr())
}

// proxyListener accepts connections from the proxies only.
type proxyListener struct {
	net.Listener
	from []netip.Prefix
}

func (l proxyListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.admits(conn.RemoteAddr()) {
			return conn, nil
		}
		conn.Close() // it has sent nothing that could be lost
	}
}

func (l proxyListener) admits(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return false
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	for _, p := range l.from {
		if p.Contains(ip) {
			return true
		}
	}
	return ip.IsLoopback()
}
