// Package registry speaks to OCI registries: it fetches manifests by digest,
// proves which base image an image is built on, attaches and finds signed
// bundles, and moves tags. A registry is not trusted with anything but to keep
// bytes: every byte is hashed here, every answer is bounded, and no answer makes
// the client talk to a host that the configuration does not name.
package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/hallmarkd/hallmark/attest"
)

// Limits on what a registry may answer. What is larger is refused with
// TOO_LARGE before it is held in memory.
const (
	maxManifest  = 4 << 20  // bytes of a manifest, an index or a page of referrers
	maxManifests = 8 << 20  // bytes of all manifests that one index lists
	maxBundle    = 24 << 20 // bytes of one bundle: attest.MaxPredicate in base64
	maxBundles   = 64 << 20 // bytes of all bundles of one digest
	maxReferrers = 256      // bundles of one digest that are read
	maxListed    = 4096     // referrers of one digest that are looked at
	maxListing   = 16 << 20 // bytes of all pages of a list of referrers
	maxPages     = 64       // pages that a list of referrers may have
	maxPlatforms = 256      // entries of an index
	maxBlob      = 32 << 30 // bytes of a layer that is copied
	maxOther     = 1 << 20  // bytes of every other answer: tokens, pings, errors
	maxHeader    = 256 << 10
)

const (
	sessionAge  = 10 * time.Minute // how long a login is reused
	maxSessions = 1024
	parallel    = 8 // requests that one call has under way
)

// Config says which registries may be spoken to.
type Config struct {
	Hosts   []Host
	Mirrors []Mirror
	// Ambient takes credentials from the docker configuration of whoever runs
	// the process, and the proxy from its environment. It is for the command
	// line client in a CI job; the server must not set it.
	Ambient bool
	Timeout time.Duration // of one call; 0: one minute
	// CopyTimeout bounds one Tag between repositories; 0: 15 minutes.
	CopyTimeout time.Duration
	Logger      *slog.Logger // nil: none
}

// Host is one registry. No other host is contacted on its account.
type Host struct {
	Host        string // host or host:port, as references spell it; docker.io is Docker Hub
	Credentials Credentials
	CAFile      string // PEM certificates that replace the system's roots for this host
	PlainHTTP   bool   // http instead of https; only for loopback addresses and localhost
	// TokenHosts are further hosts that may issue this registry's bearer
	// tokens and are sent its credentials: names, not addresses.
	TokenHosts []string
	// RedirectHosts are further hosts that blobs may be fetched from when the
	// registry redirects there. They are sent no credentials.
	RedirectHosts []string
}

// Mirror says that repositories under From are copies of those under To: what is
// found in From is recorded by its name in To. Both are a host with an optional
// path.
type Mirror struct{ From, To string }

// Client speaks to the configured registries. Its methods may be called
// concurrently.
type Client struct {
	hosts       map[string]*host
	mirrors     []Mirror
	ambient     bool
	timeout     time.Duration
	copyTimeout time.Duration
	log         *slog.Logger
	locks       locks         // of subjects and blobs that are being written
	hashers     chan struct{} // holds one for each layer that is being hashed
	room        room

	mu        sync.Mutex // guards what follows
	sessions  map[sessionKey]*session
	noListing map[attest.Repository]time.Time // repositories without the referrers API, until when
	subjects  map[attest.ImageRef]subject
}

// host is a configured registry with its transport.
type host struct {
	name   string              // as references spell it
	auth   authn.Authenticator // nil: ambient
	rt     http.RoundTripper
	plain  bool
	realms []string // hosts that tokens may come from
}

// New checks the configuration and reads each credentials file once; it contacts
// nobody. It answers BAD_CONFIG.
func New(cfg Config) (*Client, error) {
	c := &Client{
		hosts: map[string]*host{}, ambient: cfg.Ambient,
		timeout: cfg.Timeout, copyTimeout: cfg.CopyTimeout, log: cfg.Logger,
		sessions: map[sessionKey]*session{}, noListing: map[attest.Repository]time.Time{},
		subjects: map[attest.ImageRef]subject{}, hashers: make(chan struct{}, maxHashers), room: newRoom(),
	}
	if c.timeout <= 0 {
		c.timeout = time.Minute
	}
	if c.copyTimeout <= 0 {
		c.copyTimeout = 15 * time.Minute
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	for _, h := range cfg.Hosts {
		if c.hosts[h.Host] != nil {
			return nil, attest.Errorf(attest.BadConfig, "registries: host %q is listed twice", h.Host)
		}
		checked, err := newHost(h, cfg.Ambient)
		if err != nil {
			return nil, err
		}
		c.hosts[h.Host] = checked
	}
	for _, m := range cfg.Mirrors {
		for _, prefix := range []string{m.From, m.To} {
			if _, err := attest.ParseRepository(prefix + "/name"); err != nil {
				return nil, attest.Errorf(attest.BadConfig, "mirrors: %q is not HOST or HOST/PATH", prefix)
			}
		}
	}
	c.mirrors = cfg.Mirrors
	return c, nil
}

// dockerHub is the one registry whose API, tokens and references live under
// three names.
const (
	dockerHub       = "docker.io"
	dockerHubAPI    = name.DefaultRegistry
	dockerHubTokens = "auth.docker.io"
)

func newHost(h Host, ambient bool) (*host, error) {
	repo, err := attest.ParseRepository(h.Host + "/name")
	if err != nil || repo.Host() != h.Host {
		return nil, attest.Errorf(attest.BadConfig, "registries: %q is not a host or host:port", h.Host)
	}
	if h.PlainHTTP && !loopback(h.Host) {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: plain HTTP is for loopback addresses only; give the registry a certificate and name its CA file", h.Host)
	}
	for _, other := range append(append([]string{}, h.TokenHosts...), h.RedirectHosts...) {
		if r, err := attest.ParseRepository(other + "/name"); err != nil || r.Host() != other {
			return nil, attest.Errorf(attest.BadConfig, "registries: %s: %q is not a host or host:port", h.Host, other)
		}
	}
	if ambient && h.Credentials != (Credentials{}) {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: ambient credentials and configured ones exclude each other", h.Host)
	}
	out := &host{name: h.Host, plain: h.PlainHTTP}
	api := h.Host
	if h.Host == dockerHub {
		api, out.realms = dockerHubAPI, []string{dockerHubTokens}
	}
	out.realms = append(append(out.realms, api), h.TokenHosts...)
	base, err := newTransport(h, ambient)
	if err != nil {
		return nil, err
	}
	out.rt = newRetry(&guard{host: api, plain: h.PlainHTTP, realms: out.realms, blobs: append([]string{api}, h.RedirectHosts...), inner: base})
	if !ambient {
		out.auth, err = h.Credentials.authenticator(api)
	}
	return out, err
}

// loopback reports whether a host:port can only be this machine. Legacy
// spellings of addresses are not understood, so they are not loopback.
func loopback(hostport string) bool {
	h := hostport
	if name, _, err := net.SplitHostPort(hostport); err == nil {
		h = name
	}
	if h == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(h, "[]"))
	return err == nil && addr.IsLoopback()
}

func newTransport(h Host, ambient bool) (*http.Transport, error) {
	t := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  30 * time.Second,
		IdleConnTimeout:        90 * time.Second,
		MaxIdleConnsPerHost:    parallel,
		MaxConnsPerHost:        8 * parallel,
		MaxResponseHeaderBytes: maxHeader,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // the bytes that are hashed are the bytes that were sent
	}
	if ambient {
		t.Proxy = http.ProxyFromEnvironment
	}
	if h.CAFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(h.CAFile)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: reading the CA file: %w", h.Host, err)
	}
	t.TLSClientConfig.RootCAs = x509.NewCertPool()
	if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: %s holds no PEM certificate", h.Host, filepath.Base(h.CAFile))
	}
	return t, nil
}

// within bounds one call.
func (c *Client) within(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, c.timeout)
}

// session is a login to one repository. The transport inside renews its token by
// itself.
type session struct {
	host *host
	repo name.Repository
	rt   http.RoundTripper
	born time.Time
}

type sessionKey struct {
	repo  attest.Repository
	scope string
}

// session returns a login to repo with the scope transport.PullScope or
// transport.PushScope.
func (c *Client) session(ctx context.Context, repo attest.Repository, scope string) (*session, error) {
	key := sessionKey{repo, scope}
	c.mu.Lock()
	s := c.sessions[key]
	c.mu.Unlock()
	if s != nil && time.Since(s.born) < sessionAge {
		return s, nil
	}
	s, err := c.login(ctx, repo, scope)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sessions) >= maxSessions {
		clear(c.sessions)
	}
	c.sessions[key] = s
	return s, nil
}

func (c *Client) login(ctx context.Context, repo attest.Repository, scope string) (*session, error) {
	// The type can hold any string; what becomes a URL is parsed here (G14).
	if _, err := attest.ParseRepository(string(repo)); err != nil {
		return nil, err
	}
	h := c.hosts[repo.Host()]
	if h == nil {
		return nil, attest.Errorf(attest.HostNotAllowed, "registry %s is not configured: add it under registries", repo.Host())
	}
	opts := []name.Option{name.StrictValidation}
	if h.plain {
		opts = append(opts, name.Insecure)
	}
	n, err := name.NewRepository(string(repo), opts...)
	if err != nil {
		return nil, attest.Errorf(attest.BadReference, "repository %q: %w", repo, err)
	}
	auth := h.auth
	if auth == nil {
		if auth, err = authn.Resolve(ctx, authn.DefaultKeychain, n); err != nil {
			return nil, attest.Errorf(attest.BadConfig, "reading the docker configuration for %s: %w", repo.Host(), err)
		}
	}
	// The realm is judged before anything is sent to it, so that the refusal has
	// a name; guard refuses the request itself once more (G10).
	challenge, err := transport.Ping(ctx, n.Registry, h.rt)
	if err != nil {
		return nil, h.loginFailure(ctx, err)
	}
	if strings.EqualFold(challenge.Scheme, "bearer") {
		if err := h.checkRealm(challenge.Parameters["realm"]); err != nil {
			return nil, err
		}
	}
	rt, err := transport.NewWithContext(ctx, n.Registry, auth, h.rt, []string{n.Scope(scope)})
	if err != nil {
		return nil, h.loginFailure(ctx, err)
	}
	return &session{host: h, repo: n, rt: rt, born: time.Now()}, nil
}

// options makes go-containerregistry use the session's login and nothing else.
func (s *session) options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(s.rt), remote.WithRetryBackoff(backoff), remote.WithJobs(parallel)}
}

// do sends one request below the repository's path and returns the answer's
// status, headers and whole body, which is at most limit bytes. Header holds
// pairs of name and value.
func (s *session) do(ctx context.Context, method, path string, body []byte, limit int64, header ...string) (*answer, error) {
	resp, err := s.send(ctx, method, path, body, header...)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, s.host.failure(ctx, err)
	}
	if int64(len(data)) > limit {
		return nil, attest.Errorf(attest.TooLarge, "registry %s answers %s %s with more than %d bytes", s.host.name, method, path, limit)
	}
	return &answer{status: resp.StatusCode, header: resp.Header, body: data, url: resp.Request.URL}, nil
}

// send is do without reading the answer, whose body the caller bounds and closes.
func (s *session) send(ctx context.Context, method, path string, body []byte, header ...string) (*http.Response, error) {
	scheme := "https"
	if s.host.plain {
		scheme = "http"
	}
	url := fmt.Sprintf("%s://%s/v2/%s/%s", scheme, s.repo.RegistryStr(), s.repo.RepositoryStr(), path)
	req, err := http.NewRequestWithContext(ctx, method, url, bodyReader(body))
	if err != nil {
		return nil, fmt.Errorf("making a request for %s: %w", s.repo, err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	client := http.Client{Transport: s.rt}
	resp, err := client.Do(req)
	if err != nil {
		return nil, s.host.failure(ctx, err)
	}
	return resp, nil
}

// failure gives an error of go-containerregistry or net/http its reason. The
// registry's own words stay out of the message: they are chosen by others and
// may hold anything.
func (h *host) failure(ctx context.Context, err error) error {
	var known *attest.Error
	if errors.As(err, &known) {
		return known
	}
	var answered *transport.Error
	if errors.As(err, &answered) {
		body, _ := json.Marshal(map[string]any{"errors": answered.Errors})
		return h.refusal(answered.StatusCode, body)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("asking registry %s: %w", h.name, context.Canceled)
	}
	return &attest.Error{Reason: attest.RegistryUnavailable, Message: fmt.Sprintf("registry %s cannot be used: %s", h.name, cause(err)), Err: err}
}

// loginFailure is failure for the first contact, where "not found" is about no
// image.
func (h *host) loginFailure(ctx context.Context, err error) error {
	var answered *transport.Error
	if errors.As(err, &answered) && answered.StatusCode == http.StatusNotFound {
		return attest.Errorf(attest.RegistryUnavailable, "%s does not answer as a registry: /v2/ is not found there", h.name)
	}
	return h.failure(ctx, err)
}

// refusal is the error for a status that is not what was hoped for. Of the
// answer only the code is repeated, which is one of a fixed form
// (distribution-spec, "Error Codes").
func (h *host) refusal(status int, body []byte) error {
	said := http.StatusText(status)
	var answer struct {
		Errors []struct {
			Code string `json:"code"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &answer) == nil && len(answer.Errors) > 0 && errorCode.MatchString(answer.Errors[0].Code) {
		said = answer.Errors[0].Code
	}
	switch {
	case status == http.StatusNotFound:
		return attest.Errorf(attest.SubjectNotFound, "registry %s does not have it (%s)", h.name, said)
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return attest.Errorf(attest.RegistryDenied, "registry %s refuses the service's credentials (%d %s): check registries.credentials and the account's rights", h.name, status, said)
	case status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status >= 500:
		return attest.Errorf(attest.RegistryUnavailable, "registry %s answers %d %s: try again later", h.name, status, said)
	}
	return attest.Errorf(attest.RegistryDenied, "registry %s answers %d %s", h.name, status, said)
}

var errorCode = regexp.MustCompile(`^[A-Z_]{1,40}$`)
