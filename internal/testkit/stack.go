// Package testkit runs the whole service for tests, from real parts: a server on
// loopback over a real ledger, with a token issuer and a registry beside it.
package testkit

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
	"github.com/hallmarkd/hallmark/server"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
	"github.com/hallmarkd/hallmark/verifier/foreign"
	"github.com/hallmarkd/hallmark/web"
)

// Options say how a stack differs from the usual one. The zero value is a plain
// HTTP server with DefaultPolicy.
type Options struct {
	Dir    string                   // data directory; "" is a temporary one. One that holds data is opened, not initialised
	TLS    bool                     // serve TLS with a certificate of Stack.CAFile
	Policy string                   // text of the policy, in which REGISTRY stands for the registry's host:port; "" is DefaultPolicy
	Hosts  []registry.Host          // registries beside the stack's own
	Mirror string                   // what base/ in the stack's registry mirrors: HOST/PATH; "" is nothing
	Step   func(step string)        // called between durable steps of ledger and gate
	Now    func() time.Time         // clock of everything; nil is time.Now
	Server func(*server.Config)     // changes the server's configuration
	Gate   func(*gate.Config)       // changes the gate's
	Logger *slog.Logger             // nil writes to the test's output
	Ledger func(*ledger.Config)     // changes the ledger's
	Issue  func(*[]identity.Issuer) // changes the configured issuers
	// Foreign are the roots under which evidence that was signed elsewhere is imported.
	Foreign []foreign.Root
	// Around is given when another process has the stack's address, issuers and
	// registry; Stack.Issuer, People and Registry are nil then.
	Around *Around
}

func (s *Stack) mirrors() []registry.Mirror {
	if s.opts.Mirror == "" {
		return nil
	}
	return []registry.Mirror{{From: s.around.Registry + "/base", To: s.opts.Mirror}}
}

// Around is what a stack needs around it, as addresses: a child process that is
// given the same opens what the test's own stack would.
type Around struct {
	Addr     string // host:port that the service listens on
	Issuer   string // URL
	People   string // URL
	Registry string // host:port
}

// Stack is a running service with what it needs around it. The issuers and the
// registry outlive a Restart.
type Stack struct {
	t      testing.TB
	opts   Options
	around Around
	stop   func() error // of the running service; nil when it is stopped

	DataDir  string
	URL      string      // of the server, without a trailing slash; also its public_url and tokens' audience
	Addr     string      // host:port of the server
	CAFile   string      // PEM; "" without TLS
	Issuer   *dev.Issuer // of CI jobs: "github", owner acme
	People   *dev.Issuer // of persons: "corp", with groups
	Registry *dev.Registry

	Signer   *signer.Signer
	Ledger   *ledger.Ledger
	Verifier *verifier.Verifier
	Images   *registry.Client
	Policy   *policy.Policy
	Gate     *gate.Gate
	Auth     *identity.Authenticator
	Pages    *web.Handler
}

// Source is the repository whose jobs DefaultPolicy lets sign and promote.
const Source = "acme/api"

// Commit is the commit that its jobs build unless a test says otherwise.
const Commit = "4be1d0c7a1b2c3d4e5f60718293a4b5c6d7e8f90"

// DefaultPolicy has the track "acme" with the stages test, staging and prod for
// HOST/acme/*. Jobs of Source on main sign, its jobs in the environment release
// promote, and people of the group audit ask.
func DefaultPolicy(host string) string {
	job := "id.repository_id == '" + dev.GitHubID(Source) + "' && id.ref == 'refs/heads/main' && id.workflow_path == '.github/workflows/release.yml'"
	return `version: 1
roles:
  signers:
  - {issuer: github, images: ["` + host + `/acme/*"], when: "` + job + `"}
  promoters:
  - {issuer: github, images: ["` + host + `/acme/*"], when: "id.repository_id == '` + dev.GitHubID(Source) + `' && id.environment == 'release'"}
  auditors:
  - {issuer: corp, images: ["**"], when: "'audit' in id.groups"}
tracks:
- name: acme
  images: ["` + host + `/acme/*"]
  stages:
  - name: test
    rules:
    - signed_by: {issuer: github, when: "` + job + `"}
    - provenance: {source_id: "` + dev.GitHubID(Source) + `", source: "https://github.com/` + Source + `", refs: ["refs/heads/main"], min_level: 2, min_grade: claim}
  - name: staging
    after: test
    rules:
    - base_image: {allowed: ["` + host + `/base/*"], proof: layers}
  - name: prod
    after: staging
    target: "` + host + `/prod/{name}:{version}"
    rules:
    - cel: {expr: "provenance.runner == 'github-hosted'", message: "only images built on hosted runners go to prod"}
`
}

// quiet keeps the log library's own log, which is one for the whole process, out
// of the tests' output.
var quiet sync.Once

// NewStack starts a stack that ends with the test.
func NewStack(t testing.TB, o Options) *Stack {
	t.Helper()
	s := &Stack{t: t, opts: o, DataDir: o.Dir}
	if s.DataDir == "" {
		s.DataDir = t.TempDir()
	}
	if s.opts.Logger == nil {
		s.opts.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	quiet.Do(func() { ledger.RouteLibraryLogs(slog.New(slog.DiscardHandler)) })
	if s.opts.Now == nil {
		s.opts.Now = time.Now
	}
	if o.Around != nil {
		s.around = *o.Around
	} else {
		s.surround()
	}
	t.Cleanup(s.Close)
	s.start()
	return s
}

// surround starts what is around the service.
func (s *Stack) surround() {
	t := s.t
	t.Helper()
	// Not the test's context: that ends before its cleanups run.
	ctx := context.WithoutCancel(t.Context())
	s.Issuer = must(dev.StartIssuer(ctx, dev.IssuerConfig{Now: s.opts.Now}))(t)
	t.Cleanup(func() { s.Issuer.Close() })
	s.People = must(dev.StartIssuer(ctx, dev.IssuerConfig{Now: s.opts.Now, Algorithm: "ES256"}))(t)
	t.Cleanup(func() { s.People.Close() })
	s.Registry = must(dev.StartRegistry(ctx, "127.0.0.1:0"))(t)
	t.Cleanup(func() { s.Registry.Close() })
	s.around = Around{FreeAddr(t), s.Issuer.URL(), s.People.URL(), s.Registry.Host()}
}

// FreeAddr returns a loopback address that is free now and that no client will
// take while a service is restarted there: its port is below those that the
// kernel gives to outgoing connections.
func FreeAddr(t testing.TB) string {
	t.Helper()
	var err error
	for range 100 {
		var lis net.Listener
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(10_000+mathrand.IntN(20_000)))
		if lis, err = net.Listen("tcp", addr); err == nil {
			check(t, lis.Close())
			return addr
		}
	}
	t.Fatalf("no free port: %v", err)
	return ""
}

// Around returns the addresses of what is around the stack, for a child process.
func (s *Stack) Around() Around { return s.around }

// Restart stops the service and opens it again on the same data and address: what
// the next start of the process would do.
func (s *Stack) Restart() {
	s.t.Helper()
	s.Close()
	s.start()
}

// Close stops the service and closes its ledger. It may be called again.
func (s *Stack) Close() {
	s.t.Helper()
	if s.stop == nil {
		return
	}
	stop := s.stop
	s.stop = nil
	if err := stop(); err != nil {
		s.t.Errorf("stopping the stack: %v", err)
	}
}

// start opens everything in the order in which hallmarkd does.
func (s *Stack) start() {
	t := s.t
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	lis := must(net.Listen("tcp", s.around.Addr))(t)
	s.Addr = lis.Addr().String()
	s.URL = "http://" + s.Addr
	if s.opts.TLS {
		s.URL = "https://" + s.Addr
	}
	s.open(ctx)
	cfg := server.Config{Gate: s.Gate, Auth: s.Auth, Pages: s.Pages, Logger: s.opts.Logger, Now: s.opts.Now}
	if s.opts.TLS {
		cfg.CertFile, cfg.KeyFile = s.certificate()
	}
	if s.opts.Server != nil {
		s.opts.Server(&cfg)
	}
	srv := must(server.New(cfg))(t)

	serving, stopServing := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(serving, lis) }()
	working, stopWorking := context.WithCancel(ctx)
	worked := make(chan struct{})
	go func() { defer close(worked); s.Gate.Run(working) }()
	s.stop = func() error {
		stopServing()
		err := <-served
		stopWorking()
		<-worked
		s.Signer.Close()
		if e := s.Ledger.Close(ctx); err == nil {
			err = e
		}
		return err
	}
}

// open opens what is below the server, after initialising an empty directory.
func (s *Stack) open(ctx context.Context) {
	t := s.t
	t.Helper()
	log, now := s.opts.Logger, s.opts.Now
	keys := signer.Config{Dir: filepath.Join(s.DataDir, "keys"), Service: s.URL, Now: now, Logger: log}
	fresh := signer.Init(keys)
	if fresh != nil && attest.ReasonOf(fresh) != attest.AlreadyExists {
		t.Fatal(fresh)
	}
	s.Signer = must(signer.Open(keys))(t)
	records := ledger.Config{Dir: s.DataDir, Origin: s.Signer.Origin(), LogKey: s.Signer.LogKey(), Step: s.opts.Step, Logger: log}
	if s.opts.Ledger != nil {
		s.opts.Ledger(&records)
	}
	if fresh == nil {
		check(t, ledger.Init(ctx, records))
	}
	s.Ledger = must(ledger.Open(ctx, records))(t)
	s.Verifier = must(verifier.New(s.Signer.TrustedRoot(), s.Signer.GateKeyPEM(), s.URL))(t)
	s.Images = must(registry.New(registry.Config{
		Hosts: append([]registry.Host{{Host: s.around.Registry, PlainHTTP: true}}, s.opts.Hosts...), Logger: log,
		Mirrors: s.mirrors(),
	}))(t)
	issuers := []identity.Issuer{
		{Name: "github", Provider: "github", Issuer: s.around.Issuer, PlainHTTP: true, Owners: []string{dev.GitHubID("acme")}, ServerURL: "https://github.com"},
		{Name: "corp", Provider: "generic", Kind: attest.Person, Issuer: s.around.People, PlainHTTP: true, Claims: map[string]string{"groups": "groups"}},
	}
	if s.opts.Issue != nil {
		s.opts.Issue(&issuers)
	}
	s.Auth = must(identity.New(identity.Config{Audience: s.URL, Service: s.URL, Issuers: issuers, Now: now, Logger: log}))(t)
	s.Policy = s.loadPolicy(issuers)
	cfg := gate.Config{
		Service: s.URL, Ledger: s.Ledger, Signer: s.Signer, Verifier: s.Verifier, Registry: s.Images, Policy: s.Policy,
		Configuration: []byte("{}"), Now: now, Logger: log, Step: s.opts.Step, Foreign: must(foreign.Open(s.opts.Foreign))(t),
	}
	if s.opts.Gate != nil {
		s.opts.Gate(&cfg)
	}
	s.Gate = must(gate.Open(ctx, cfg))(t)
	s.Pages = must(web.New(web.Config{Gate: s.Gate, Auth: s.Auth, Now: now, Logger: log}))(t)
}

func (s *Stack) loadPolicy(issuers []identity.Issuer) *policy.Policy {
	text := strings.ReplaceAll(s.opts.Policy, "REGISTRY", s.around.Registry)
	if text == "" {
		text = DefaultPolicy(s.around.Registry)
	}
	path := filepath.Join(s.DataDir, "policy.yaml")
	check(s.t, os.WriteFile(path, []byte(text), 0o600))
	known := policy.Known{Issuers: map[string]attest.Kind{}, IssuerURLs: map[string]string{}, Roots: map[string]bool{}, Service: s.URL, Now: s.opts.Now}
	for _, r := range s.opts.Foreign {
		known.Roots[r.Name] = true
	}
	for _, i := range issuers {
		known.Issuers[i.Name], known.IssuerURLs[i.Name] = i.Kind, i.KnownIssuer()
		if i.Kind == "" {
			known.Issuers[i.Name] = attest.Workload
		}
	}
	return must(policy.Load(path, known))(s.t)
}

// SetPolicy gives the next Restart another policy.
func (s *Stack) SetPolicy(text string) { s.opts.Policy = text }

// SetGate changes the gate's configuration at the next Restart.
func (s *Stack) SetGate(change func(*gate.Config)) { s.opts.Gate = change }

// SetStep gives the next Restart another hook between durable steps.
func (s *Stack) SetStep(step func(string)) { s.opts.Step = step }

// certificate writes a fresh self-signed certificate for loopback and returns its
// files; CAFile is the same certificate.
func (s *Stack) certificate() (certFile, keyFile string) {
	s.t.Helper()
	dir := s.t.TempDir()
	s.CAFile = filepath.Join(dir, "tls.crt")
	WriteCertificate(s.t, s.CAFile, filepath.Join(dir, "tls.key"))
	return s.CAFile, filepath.Join(dir, "tls.key")
}

// WriteCertificate writes a new self-signed certificate for 127.0.0.1 with its
// key as PEM files, and returns its serial number.
func WriteCertificate(t testing.TB, certFile, keyFile string) *big.Int {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)))(t),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))(t)
	pkcs8 := must(x509.MarshalPKCS8PrivateKey(key))(t)
	check(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	return template.SerialNumber
}

// Claims returns those of a job of Source on main at Commit, laid over by
// changes; a nil value leaves a claim out.
func (s *Stack) Claims(changes map[string]any) map[string]any {
	c := dev.GitHubClaims(Source, Commit, "refs/heads/main")
	c["aud"] = s.URL
	maps.Copy(c, changes)
	return c
}

// Token mints the token of a CI job with Claims(changes).
func (s *Stack) Token(changes map[string]any) string {
	s.t.Helper()
	return must(s.Issuer.Mint(s.Claims(changes)))(s.t)
}

// PromoterToken mints the token of a job in the environment release.
func (s *Stack) PromoterToken() string {
	return s.Token(map[string]any{"environment": "release"})
}

// PersonToken mints the token of a person with groups; "audit" makes an auditor.
func (s *Stack) PersonToken(subject string, groups ...string) string {
	s.t.Helper()
	return must(s.People.Mint(map[string]any{"aud": s.URL, "sub": subject, "groups": groups}))(s.t)
}

// Identity returns whom a token names, as the service verifies it.
func (s *Stack) Identity(token string) attest.Identity {
	s.t.Helper()
	return must(s.Auth.Authenticate(s.context(), token))(s.t)
}

// Dial returns a gRPC connection whose calls carry the token; "" is none.
func (s *Stack) Dial(token string, more ...grpc.DialOption) *grpc.ClientConn {
	s.t.Helper()
	transport := insecure.NewCredentials()
	if s.CAFile != "" {
		transport = credentials.NewTLS(s.ClientTLS())
	}
	opts := append([]grpc.DialOption{
		grpc.WithTransportCredentials(transport), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20)),
	}, more...)
	if token != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(bearer(token)))
	}
	conn := must(grpc.NewClient(s.Addr, opts...))(s.t)
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity is false because tests speak to loopback.
func (b bearer) RequireTransportSecurity() bool { return false }

// ClientTLS trusts the stack's certificate and nothing else.
func (s *Stack) ClientTLS() *tls.Config {
	s.t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(must(os.ReadFile(s.CAFile))(s.t)) {
		s.t.Fatalf("no certificate in %s", s.CAFile)
	}
	return &tls.Config{RootCAs: pool, NextProtos: []string{"h2", "http/1.1"}}
}

// HTTP returns an HTTP client for the stack that follows no redirects.
func (s *Stack) HTTP() *http.Client {
	s.t.Helper()
	tr := &http.Transport{ForceAttemptHTTP2: true}
	if s.CAFile != "" {
		tr.TLSClientConfig = s.ClientTLS()
	}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// must returns a function that ends the test when err is set: must(f())(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
