package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/hallmarkd/hallmark/attest"
)

const maxRedirects = 3

// guard is the innermost transport: whatever go-containerregistry decides to
// request, only what passes here goes out. It belongs to one registry.
type guard struct {
	host   string   // the registry's API
	plain  bool     // it speaks http
	realms []string // hosts that tokens may come from; holds host
	blobs  []string // hosts that blobs may be redirected to; holds host
	inner  http.RoundTripper
}

// RoundTrip implements http.RoundTripper. It follows redirects itself, so that
// no layer above it ever sees one.
func (g *guard) RoundTrip(in *http.Request) (*http.Response, error) {
	req := in.Clone(in.Context())
	if err := g.admit(req); err != nil {
		closeBody(in)
		return nil, err
	}
	// A request that is sent again after its token expired has had its body read.
	if in.GetBody != nil {
		closeBody(in)
		body, err := in.GetBody()
		if err != nil {
			return nil, err
		}
		req.Body = body
	}
	for hop := 0; ; hop++ {
		resp, err := g.inner.RoundTrip(req)
		if err != nil {
			return nil, g.explain(err)
		}
		if wait := retryAfter(resp); wait > 0 {
			resp.Body.Close()
			return nil, attest.Errorf(attest.RegistryUnavailable, "registry %s answers %d: it takes no more requests for %v", g.host, resp.StatusCode, wait).
				With("retry_after", strconv.Itoa(int(wait.Seconds())))
		}
		if !isRedirect(resp.StatusCode) {
			resp.Body = &bounded{ReadCloser: resp.Body, left: limitFor(req)}
			return resp, nil
		}
		resp.Body.Close()
		if req, err = g.follow(req, resp, hop); err != nil {
			return nil, err
		}
	}
}

// admit decides whether a request may go out, and by which scheme.
// go-containerregistry guesses http for private addresses, localhost and *.local
// (name.Registry.Scheme); here only the configuration decides (G15).
func (g *guard) admit(req *http.Request) error {
	if req.URL.Host == g.host && (req.Host == "" || req.Host == g.host) {
		req.URL.Scheme = g.scheme()
		return nil
	}
	// Of other hosts go-containerregistry asks for tokens only; an upload that
	// the registry wants elsewhere is a PATCH or PUT (G13).
	asks := req.Method == http.MethodGet || req.Method == http.MethodPost
	if !asks {
		return attest.Errorf(attest.HostNotAllowed, "registry %s sends an upload to %s, which is not configured", g.host, clip(req.URL.Host))
	}
	if err := g.checkRealm(req.URL); err != nil {
		return err
	}
	if strings.HasPrefix(req.URL.Path, "/v2/") {
		return attest.Errorf(attest.HostNotAllowed, "registry %s sends a request to %s", g.host, clip(req.URL.Host))
	}
	return nil
}

func (g *guard) scheme() string {
	if g.plain {
		return "http"
	}
	return "https"
}

// checkRealm refuses a token server that the configuration does not name: it
// would be sent the registry's credentials (G10).
func (g *guard) checkRealm(u *url.URL) error {
	if !slices.Contains(g.realms, u.Host) {
		return attest.Errorf(attest.RealmRefused, "registry %s wants tokens to be fetched from %s: list that host under token_hosts if it is trusted with the credentials", g.host, clip(u.Host))
	}
	if u.Scheme != "https" && !g.plainAllowed(u) {
		return attest.Errorf(attest.RealmRefused, "registry %s wants tokens to be fetched over %s", g.host, clip(u.Scheme))
	}
	if u.User != nil {
		return attest.Errorf(attest.RealmRefused, "registry %s names a token server with a user name in it", g.host)
	}
	return nil
}

// plainAllowed reports whether u is http on this machine for a registry that was
// configured so.
func (g *guard) plainAllowed(u *url.URL) bool {
	return g.plain && u.Scheme == "http" && loopback(u.Host)
}

func (h *host) checkRealm(realm string) error {
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" {
		return attest.Errorf(attest.RealmRefused, "registry %s names no usable token server", h.name)
	}
	g := guard{host: h.name, plain: h.plain, realms: h.realms}
	return g.checkRealm(u)
}

// maxRetryAfter bounds for how long a registry may send its callers away.
const maxRetryAfter = 24 * time.Hour

// retryAfter returns for how long a registry wants to be left alone, in whole
// seconds, or 0 when it does not say (RFC 9110 section 10.2.3). Asking again
// within that time would only be counted against the caller, so such an answer is
// an error at once that the retries around this transport let pass.
func retryAfter(resp *http.Response) time.Duration {
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return 0
	}
	said := resp.Header.Get("Retry-After")
	wait := maxRetryAfter
	if at, err := http.ParseTime(said); err == nil {
		wait = time.Until(at)
	} else if n, err := strconv.ParseUint(said, 10, 31); err == nil {
		wait = time.Duration(n) * time.Second
	} else {
		return 0
	}
	return max(0, min(wait, maxRetryAfter).Round(time.Second))
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// follow returns the request for a redirect of a blob. Manifests, uploads, pings
// and tokens are never redirected (G11).
func (g *guard) follow(req *http.Request, resp *http.Response, hop int) (*http.Request, error) {
	reads := req.Method == http.MethodGet || req.Method == http.MethodHead
	if !reads || (hop == 0 && !strings.Contains(req.URL.Path, "/blobs/sha256:")) {
		return nil, attest.Errorf(attest.RedirectRefused, "registry %s redirects a %s of something that is no blob", g.host, req.Method)
	}
	if hop >= maxRedirects {
		return nil, attest.Errorf(attest.RedirectRefused, "registry %s redirects a blob more than %d times", g.host, maxRedirects)
	}
	u, err := req.URL.Parse(resp.Header.Get("Location"))
	if err != nil || u.Host == "" || u.User != nil {
		return nil, attest.Errorf(attest.RedirectRefused, "registry %s redirects a blob to no usable place", g.host)
	}
	if !slices.Contains(g.blobs, u.Host) {
		return nil, attest.Errorf(attest.RedirectRefused, "registry %s redirects a blob to %s: list that host under redirect_hosts if blobs live there", g.host, clip(u.Host))
	}
	if u.Scheme != "https" && !g.plainAllowed(u) {
		return nil, attest.Errorf(attest.RedirectRefused, "registry %s redirects a blob to %s, which is not https", g.host, clip(u.Host))
	}
	next, err := http.NewRequestWithContext(req.Context(), req.Method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, keep := range []string{"Accept", "User-Agent"} {
		if v := req.Header.Get(keep); v != "" {
			next.Header.Set(keep, v)
		}
	}
	// Credentials go to the registry itself only; dropped once on the way, they
	// stay dropped.
	if u.Host == g.host {
		if v := req.Header.Get("Authorization"); v != "" {
			next.Header.Set("Authorization", v)
		}
	}
	return next, nil
}

// explain names the one network error that is a misconfiguration.
func (g *guard) explain(err error) error {
	var record tls.RecordHeaderError
	if errors.As(err, &record) && string(record.RecordHeader[:]) == "HTTP/" {
		return attest.Errorf(attest.PlainHTTP, "registry %s speaks plain HTTP: only a loopback registry may, with plain_http", g.host)
	}
	return err
}

// limitFor bounds the body of an answer by what was asked for.
func limitFor(req *http.Request) int64 {
	switch path := req.URL.Path; {
	case strings.Contains(path, "/manifests/") || strings.Contains(path, "/referrers/"):
		return maxManifest
	case req.Method == http.MethodGet && !strings.HasPrefix(path, "/v2/") || strings.Contains(path, "/blobs/sha256:"):
		return maxBlob // a redirected blob has any path; readers bound it once more
	}
	return maxOther
}

// bounded fails a body that is longer than was agreed, however it is framed.
type bounded struct {
	io.ReadCloser
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, attest.Errorf(attest.TooLarge, "the registry answers with more than it may")
	}
	return n, err
}

// backoff is that of every retry: three tries within half a second. Longer
// outages are for the worker, which comes back.
var backoff = remote.Backoff{Duration: 100 * time.Millisecond, Factor: 3, Jitter: 0.2, Steps: 3}

// retrying repeats what only reads. Writes are repeated by their callers, who
// know that they are addressed by digest.
type retrying struct{ reads, writes http.RoundTripper }

func newRetry(g http.RoundTripper) http.RoundTripper {
	return &retrying{writes: g, reads: transport.NewRetry(g,
		transport.WithRetryBackoff(backoff),
		transport.WithRetryPredicate(temporary),
		transport.WithRetryStatusCodes(http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout))}
}

func (r *retrying) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		return r.reads.RoundTrip(req)
	}
	return r.writes.RoundTrip(req)
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return false
	}
	return errors.As(err, &t) && t.Temporary() || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// answer is a registry's answer, read whole.
type answer struct {
	status int
	header http.Header
	body   []byte
	url    *url.URL
}

func bodyReader(b []byte) io.Reader {
	if b == nil {
		return nil
	}
	return bytes.NewReader(b)
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		req.Body.Close()
	}
}

// cause says in one line what went wrong below HTTP. Nothing after a line break
// is kept: go-containerregistry puts answers of token servers there.
func cause(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return "it does not answer in time"
	}
	line, _, _ := strings.Cut(err.Error(), "\n")
	return clip(line)
}

// clip bounds and cleans what an error repeats of a registry's words.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) > 160 {
		s = strings.ToValidUTF8(s[:160], "") + "…"
	}
	return s
}
