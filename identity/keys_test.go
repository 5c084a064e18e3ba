package identity_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
)

// serve answers every request with body and returns the server's URL.
func serve(t *testing.T, body string) string {
	t.Helper()
	return serveFunc(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) })
}

func serveFunc(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// front is a host before the development issuer: it counts requests for keys and
// can fail or be changed.
type front struct {
	*dev.Issuer
	fetches atomic.Int32
	handler atomic.Pointer[http.HandlerFunc] // in place of the issuer when not nil
	cache   atomic.Pointer[string]           // Cache-Control, when not nil
}

func newFront(t *testing.T, c *clock) *front {
	t.Helper()
	f := &front{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "jwks") {
			f.fetches.Add(1)
		}
		if h := f.handler.Load(); h != nil {
			(*h)(w, r)
			return
		}
		if cache := f.cache.Load(); cache != nil {
			w = overridden{w, *cache}
		}
		f.Issuer.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	var err error
	if f.Issuer, err = dev.NewIssuer(dev.IssuerConfig{URL: s.URL, Now: c.Now}); err != nil {
		t.Fatal(err)
	}
	none := ""
	f.cache.Store(&none)
	return f
}

type overridden struct {
	http.ResponseWriter
	cache string
}

func (o overridden) WriteHeader(code int) { o.ResponseWriter.WriteHeader(code) }

func (o overridden) Write(b []byte) (int, error) {
	o.Header().Set("Cache-Control", o.cache)
	return o.ResponseWriter.Write(b)
}

func (f *front) setCache(s string) { f.cache.Store(&s) }

func (f *front) replace(h http.HandlerFunc) {
	if h == nil {
		f.handler.Store(nil)
		return
	}
	f.handler.Store(&h)
}

func down(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }

func TestA07RemovedKeysLeave(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	a := newAuth(t, c, gitHubIssuer(f.Issuer))
	old, err := f.MintRaw(nil, mustJSON(t, job(map[string]any{
		"iss": f.URL(), "iat": c.Now().Unix(), "nbf": c.Now().Unix(), "exp": c.Now().Add(50 * time.Minute).Unix(),
	})))
	if err != nil {
		t.Fatal(err)
	}
	accepted(t, a, old)
	if err := f.RotateKey(); err != nil {
		t.Fatal(err)
	}
	// The cache may still know the key, but not for longer than its age.
	c.Add(5*time.Minute - time.Second)
	accepted(t, a, old)
	c.Add(time.Second)
	refused(t, a, old, attest.TokenKeyUnknown)
	accepted(t, a, mint(t, f.Issuer, job(nil)))
}

// An issuer that withdraws every key is obeyed, not taken for a failure.
func TestA07EmptyKeySet(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	a := newAuth(t, c, gitHubIssuer(f.Issuer))
	accepted(t, a, mint(t, f.Issuer, job(nil)))
	conf := gitHubIssuer(f.Issuer)
	f.replace(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "jwks") {
			fmt.Fprint(w, `{"keys":[]}`)
			return
		}
		f.Issuer.ServeHTTP(w, r)
	})
	c.Add(5 * time.Minute)
	refused(t, a, mint(t, f.Issuer, job(nil)), attest.TokenKeyUnknown)
	refused(t, newAuth(t, c, conf), mint(t, f.Issuer, job(nil)), attest.TokenKeyUnknown)
}

func TestCacheAge(t *testing.T) {
	for _, row := range []struct {
		cache string
		want  time.Duration
	}{
		{"", 5 * time.Minute},
		{"public", 5 * time.Minute},
		{"public, max-age=120", 2 * time.Minute},
		{"MAX-AGE=120", 2 * time.Minute},
		{"max-age=0", time.Minute},
		{"no-store, max-age=600", time.Minute},
		{"no-cache", time.Minute},
		{"max-age=86400", 15 * time.Minute},
		{"max-age=9223372036854775807", 15 * time.Minute},
		{"max-age=99999999999999999999", 5 * time.Minute},
		{"max-age=-1", 5 * time.Minute},
		{"max-age=x", 5 * time.Minute},
	} {
		t.Run("cache "+row.cache, func(t *testing.T) {
			c := newClock()
			f := newFront(t, c)
			f.setCache(row.cache)
			a := newAuth(t, c, gitHubIssuer(f.Issuer))
			for _, step := range []struct {
				wait time.Duration
				want int32
			}{{0, 1}, {row.want - time.Second, 1}, {time.Second, 2}} {
				c.Add(step.wait)
				accepted(t, a, mint(t, f.Issuer, job(nil)))
				if got := f.fetches.Load(); got != step.want {
					t.Fatalf("%d readings after %v more, want %d", got, step.wait, step.want)
				}
			}
		})
	}
}

func TestA05UnknownKeyFlood(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	a := newAuth(t, c, gitHubIssuer(f.Issuer))
	accepted(t, a, mint(t, f.Issuer, job(nil)))
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": f.URL(), "iat": now, "nbf": now, "exp": now + 3000}))
	flood := func(n int) {
		t.Helper()
		var wg sync.WaitGroup
		for n := range n {
			wg.Go(func() {
				token, err := f.MintRaw(map[string]any{"kid": fmt.Sprint("unknown-", n)}, payload)
				if err != nil {
					t.Error(err)
				}
				if _, err := a.Authenticate(t.Context(), token); attest.ReasonOf(err) != attest.TokenKeyUnknown {
					t.Errorf("%v: want %s", err, attest.TokenKeyUnknown)
				}
			})
		}
		wg.Wait()
	}
	for minute := range int32(3) {
		flood(50)
		if got := f.fetches.Load(); got != minute+2 {
			t.Fatalf("minute %d: %d readings in all, want %d", minute, got, minute+2)
		}
		c.Add(time.Minute)
	}
}

// A new key is found at once, by callers who all come at the same time.
func TestRotation(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	a := newAuth(t, c, gitHubIssuer(f.Issuer))
	accepted(t, a, mint(t, f.Issuer, job(nil)))
	if err := f.RotateKey(); err != nil {
		t.Fatal(err)
	}
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f.replace(func(w http.ResponseWriter, r *http.Request) {
		once.Do(func() { close(entered) })
		<-release
		f.Issuer.ServeHTTP(w, r)
	})
	token := mint(t, f.Issuer, job(nil))
	var wg sync.WaitGroup
	call := func() {
		if _, err := a.Authenticate(t.Context(), token); err != nil {
			t.Error(err)
		}
	}
	wg.Go(call)
	<-entered
	started := make(chan struct{}, 20)
	for range cap(started) {
		wg.Go(func() {
			started <- struct{}{}
			call()
		})
	}
	for range cap(started) {
		<-started
	}
	close(release)
	wg.Wait()
	if got := f.fetches.Load(); got != 2 {
		t.Fatalf("%d readings, want 2", got)
	}
}

// A08: the issuer is down. The last good keys serve for an hour; then, or without
// them, the answer is that repeating is safe, never yes.
func TestA08Unreachable(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	f.replace(down)
	var logged bytes.Buffer
	a, err := identity.New(identity.Config{
		Audience: service, Issuers: []identity.Issuer{gitHubIssuer(f.Issuer)}, Now: c.Now,
		Logger: slog.New(slog.NewTextHandler(&logged, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	token := func() string { return mint(t, f.Issuer, job(nil)) }
	refused(t, a, token(), attest.KeysUnavailable)
	if s := logged.String(); !strings.Contains(s, "502") || strings.Contains(s, token()[:20]) {
		t.Fatalf("the log must name the cause and no token: %s", s)
	}
	f.replace(nil)
	refused(t, a, token(), attest.KeysUnavailable) // asked again only after five seconds
	c.Add(5 * time.Second)
	accepted(t, a, token())

	f.replace(down)
	c.Add(time.Hour)
	accepted(t, a, token())
	c.Add(time.Second)
	refused(t, a, token(), attest.KeysUnavailable)
	f.replace(nil)
	c.Add(5 * time.Second)
	accepted(t, a, token())

	// A new key cannot be looked up: that is not the caller's fault.
	if err := f.RotateKey(); err != nil {
		t.Fatal(err)
	}
	f.replace(down)
	refused(t, a, token(), attest.KeysUnavailable)
	f.replace(nil)
	c.Add(time.Minute)
	accepted(t, a, token())
}

func TestA08HostileAnswers(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	keys := string(mustJSON(t, i.Keys()))
	one := string(mustJSON(t, i.Keys().Keys[0]))
	token := mint(t, i, job(nil))
	for _, row := range []struct {
		name string
		h    http.HandlerFunc
		want attest.Reason
	}{
		{"good", write(keys), ""},
		{"unknown members", write(`{"keys":[` + one + `,{"kty":"new","kid":"n"}],"x":1}`), ""},
		{"100 keys", write(many(one, 100)), ""},
		{"A08 101 keys", write(many(one, 101)), attest.KeysUnavailable},
		{"A08 more than a mebibyte", write(keys + strings.Repeat(" ", 1<<20)), attest.KeysUnavailable},
		{"A08 endless", endless, attest.KeysUnavailable},
		{"A08 error page", down, attest.KeysUnavailable},
		{"A08 not found, with keys", status(404, keys), attest.KeysUnavailable},
		{"A08 no content", status(204, ""), attest.KeysUnavailable},
		{"A08 HTML", write("<html>"), attest.KeysUnavailable},
		{"A08 empty", write(""), attest.KeysUnavailable},
		{"A08 null", write("null"), attest.KeysUnavailable},
		{"A08 no keys member", write("{}"), attest.KeysUnavailable},
		{"A08 keys null", write(`{"keys":null}`), attest.KeysUnavailable},
		{"A08 keys an object", write(`{"keys":{}}`), attest.KeysUnavailable},
		{"A22 keys twice", write(`{"keys":[` + one + `],"keys":[]}`), attest.KeysUnavailable},
		{"A22 keys in two spellings", write(`{"Keys":[],"keys":[` + one + `]}`), attest.KeysUnavailable},
		{"A22 member of a key twice", write(`{"keys":[` + one[:len(one)-1] + `,"use":"sig"}]}`), attest.KeysUnavailable},
		{"A06 one kid twice", write(`{"keys":[` + one + `,` + one + `]}`), attest.TokenKeyUnknown},
		{"A08 key a text", write(`{"keys":["x"]}`), attest.TokenKeyUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			conf := gitHubIssuer(i)
			conf.JWKSURI = serveFunc(t, row.h) + "/keys"
			a := newAuth(t, c, conf)
			if row.want == "" {
				accepted(t, a, token)
				return
			}
			refused(t, a, token, row.want)
		})
	}
}

func write(body string) http.HandlerFunc { return status(http.StatusOK, body) }

func status(code int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		fmt.Fprint(w, body)
	}
}

// many returns a set of n keys, the first of them one.
func many(one string, n int) string {
	return `{"keys":[` + one + strings.Repeat(`,{"kty":"EC"}`, n-1) + `]}`
}

// oversize answers as h does, with a mebibyte of white space before.
func oversize(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "openid-configuration") {
			fmt.Fprint(w, strings.Repeat(" ", 1<<20))
		}
		h(w, r)
	}
}

func endless(w http.ResponseWriter, r *http.Request) {
	for r.Context().Err() == nil {
		if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
			return
		}
	}
}

// An endless answer is left, not read until the time is over: what the server can
// get rid of stays within the limit and the buffers of the connection.
func TestA08EndlessAnswerIsLeft(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	written := make(chan int, 1)
	conf := gitHubIssuer(i)
	conf.JWKSURI = serveFunc(t, func(w http.ResponseWriter, _ *http.Request) {
		n, sent := 0, 0
		var err error
		for chunk := bytes.Repeat([]byte(" "), 64<<10); err == nil && sent < 256<<20; sent += n {
			n, err = w.Write(chunk)
		}
		written <- sent
	}) + "/keys"
	refused(t, newAuth(t, c, conf), mint(t, i, job(nil)), attest.KeysUnavailable)
	if got := <-written; got > 64<<20 {
		t.Fatalf("the server could send %d bytes", got)
	}
}

// An issuer that accepts the call and never answers holds nobody for ever.
func TestA08NeverAnswers(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	conf := gitHubIssuer(i)
	conf.JWKSURI = serveFunc(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }) + "/keys"
	a, err := identity.New(identity.Config{
		Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now, FetchTimeout: 50 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	refused(t, a, mint(t, i, job(nil)), attest.KeysUnavailable)
}

// A caller who gives up does not wait, and does not take the answer from others.
func TestCallerGivesUp(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f.replace(func(w http.ResponseWriter, r *http.Request) {
		once.Do(func() { close(entered) })
		<-release
		f.Issuer.ServeHTTP(w, r)
	})
	a := newAuth(t, c, gitHubIssuer(f.Issuer))
	token := mint(t, f.Issuer, job(nil))
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := a.Authenticate(ctx, token)
		left <- err
	}()
	<-entered
	cancel()
	if err := <-left; attest.ReasonOf(err) != attest.KeysUnavailable || !errors.Is(err, context.Canceled) {
		t.Fatalf("%v: want %s for a cancelled call", err, attest.KeysUnavailable)
	}
	close(release)
	accepted(t, a, token)
	if got := f.fetches.Load(); got != 1 {
		t.Fatalf("%d readings, want the first to have gone on", got)
	}
}

// A09, A11: who writes the discovery document, or redirects, does not choose keys.
func TestA09Discovery(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	keys := string(mustJSON(t, f.Keys()))
	evil := serve(t, keys)
	doc := func(issuer, uri string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "openid-configuration") {
				fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, issuer, uri)
				return
			}
			fmt.Fprint(w, keys)
		}
	}
	redirect := func(suffix, to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, suffix) {
				http.Redirect(w, r, to, http.StatusFound)
				return
			}
			f.Issuer.ServeHTTP(w, r)
		}
	}
	host := strings.TrimPrefix(f.URL(), "http://")
	for _, row := range []struct {
		name string
		h    http.HandlerFunc
		want attest.Reason
	}{
		{"good", doc(f.URL(), f.URL()+"/anywhere"), ""},
		{"A09 keys redirect to another host", redirect("jwks", evil), attest.TokenKeyUnknown},
		{"A09 keys redirect on the host", redirect("jwks", "/other"), attest.TokenKeyUnknown},
		{"A09 discovery redirects", redirect("openid-configuration", evil), attest.TokenKeyUnknown},
		{"A09 keys on another host", doc(f.URL(), evil+"/keys"), attest.TokenKeyUnknown},
		{"A09 keys on another port", doc(f.URL(), "http://127.0.0.1:1/keys"), attest.TokenKeyUnknown},
		{"A09 keys by another scheme", doc(f.URL(), "https://"+host+"/keys"), attest.TokenKeyUnknown},
		{"A09 keys in a file", doc(f.URL(), "file:///etc/keys"), attest.TokenKeyUnknown},
		{"A11 host as user", doc(f.URL(), "http://"+host+"@evil.example/keys"), attest.TokenKeyUnknown},
		{"A11 user before the host", doc(f.URL(), "http://evil@"+host+"/keys"), attest.TokenKeyUnknown},
		{"A09 no keys", doc(f.URL(), ""), attest.TokenKeyUnknown},
		{"A09 relative", doc(f.URL(), "/keys"), attest.TokenKeyUnknown},
		{"A09 of another issuer", doc("https://evil.example", f.URL()+"/keys"), attest.TokenKeyUnknown},
		{"A09 issuer with slash", doc(f.URL()+"/", f.URL()+"/keys"), attest.TokenKeyUnknown},
		{"A08 discovery of more than a mebibyte", oversize(doc(f.URL(), f.URL()+"/keys")), attest.KeysUnavailable},
		{"A08 endless discovery", endless, attest.KeysUnavailable},
		{"A08 discovery is down", down, attest.KeysUnavailable},
		{"A22 issuer twice", write(`{"issuer":"` + f.URL() + `","issuer":"` + f.URL() + `","jwks_uri":"` + f.URL() + `/keys"}`), attest.KeysUnavailable},
	} {
		t.Run(row.name, func(t *testing.T) {
			f.replace(row.h)
			a := newAuth(t, c, gitHubIssuer(f.Issuer))
			if row.want == "" {
				accepted(t, a, mint(t, f.Issuer, job(nil)))
				return
			}
			refused(t, a, mint(t, f.Issuer, job(nil)), row.want)
		})
	}
}

// A11: no part of a token becomes part of a URL.
func TestA11TokenChoosesNoURL(t *testing.T) {
	c := newClock()
	f := newFront(t, c)
	var asked atomic.Int32
	evil := serveFunc(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	a := newAuth(t, c, gitHubIssuer(f.Issuer))
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": evil, "iat": now, "nbf": now, "exp": now + 60}))
	for _, header := range []map[string]any{{}, {"kid": evil}, {"jku": evil}, {"x5u": evil}} {
		token, err := f.MintRaw(header, payload)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Authenticate(t.Context(), token); err == nil {
			t.Fatal("accepted")
		}
	}
	token, err := f.MintRaw(map[string]any{"kid": evil}, mustJSON(t, job(map[string]any{"iss": f.URL()})))
	if err != nil {
		t.Fatal(err)
	}
	refused(t, a, token, attest.TokenKeyUnknown)
	if asked.Load() != 0 {
		t.Fatal("a URL of the token was fetched")
	}
}

// Without a kid there must be exactly one key.
func TestKidRequired(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	second := newRSA(t, 2048)
	i.PublishAlso(jose.JSONWebKey{Key: second.Public(), KeyID: "second"})
	a := newAuth(t, c, gitHubIssuer(i))
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60}))
	token, err := i.MintRaw(map[string]any{"kid": nil}, payload)
	if err != nil {
		t.Fatal(err)
	}
	refused(t, a, token, attest.TokenKeyUnknown)
	accepted(t, a, mint(t, i, job(nil)))
}

// Over TLS with an authority of the operator's own, and by the configured proxy.
func TestTLS(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	s := httptest.NewUnstartedServer(i)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // the refused handshake
	s.StartTLS()
	t.Cleanup(s.Close)
	conf := gitHubIssuer(i)
	conf.JWKSURI = s.URL + "/.well-known/jwks"
	refused(t, newAuth(t, c, conf), mint(t, i, job(nil)), attest.KeysUnavailable)

	conf.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(conf.CAFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	accepted(t, newAuth(t, c, conf), mint(t, i, job(nil)))

	var asked atomic.Int32
	a, err := identity.New(identity.Config{
		Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now,
		Proxy: func(*http.Request) (*url.URL, error) { asked.Add(1); return nil, errors.New("no way out") },
	})
	if err != nil {
		t.Fatal(err)
	}
	refused(t, a, mint(t, i, job(nil)), attest.KeysUnavailable)
	if asked.Load() != 1 {
		t.Fatalf("the proxy was asked for %d times, want 1", asked.Load())
	}
}

// FuzzKeys feeds any key set: no token verifies but with the key that signed it.
func FuzzKeys(f *testing.F) {
	c := newClock()
	i, err := dev.StartIssuer(context.Background(), dev.IssuerConfig{Now: c.Now})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { i.Close() })
	claims := dev.GitHubClaims("acme/api", commit, ref)
	claims["aud"] = service
	token, err := i.Mint(claims)
	if err != nil {
		f.Fatal(err)
	}
	set, err := json.Marshal(i.Keys())
	if err != nil {
		f.Fatal(err)
	}
	modulus := strings.Split(strings.SplitAfter(string(set), `"n":"`)[1], `"`)[0]
	f.Add(string(set))
	f.Add(`{"keys":[]}`)
	f.Add(`{"keys":[{"kty":"EC","crv":"P-256","x":"","y":""}]}`)
	f.Add(`{"keys":[{"kty":"RSA","n":"AA","e":"AA"}]}`)
	var body atomic.Pointer[string]
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, *body.Load()) }))
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, keys string) {
		body.Store(&keys)
		conf := gitHubIssuer(i)
		conf.JWKSURI = s.URL
		id, err := newAuth(t, c, conf).Authenticate(t.Context(), token)
		if err == nil && (id.Subject == "" || !strings.Contains(keys, modulus)) {
			t.Fatalf("accepted with keys %q", keys)
		}
	})
}
