package web_test

import (
	"html"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// page is what a browser got.
type page struct {
	code   int
	header http.Header
	body   string
}

// browser keeps cookies as a browser does for one origin.
type browser struct {
	t       *testing.T
	s       *testkit.Stack
	c       *http.Client
	cookies map[string]*http.Cookie
}

func newBrowser(t *testing.T, s *testkit.Stack) *browser {
	return &browser{t, s, s.HTTP(), map[string]*http.Cookie{}}
}

func (b *browser) do(method, path string, form url.Values, header ...string) page {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.s.URL+path, strings.NewReader(form.Encode()))
	if err != nil {
		b.t.Fatal(err)
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Origin", b.s.URL)
	}
	for _, c := range b.cookies {
		req.AddCookie(c)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := b.c.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, c := range resp.Cookies() {
		b.cookies[c.Name] = c
		if c.MaxAge < 0 {
			delete(b.cookies, c.Name)
		}
	}
	return page{resp.StatusCode, resp.Header, string(body)}
}

func (b *browser) get(path string) page { b.t.Helper(); return b.do(http.MethodGet, path, nil) }

func (b *browser) signIn(token string) page {
	b.t.Helper()
	return b.do(http.MethodPost, "/signin", url.Values{"token": {token}})
}

func (p page) want(t *testing.T, code int, parts ...string) {
	t.Helper()
	if p.code != code {
		t.Errorf("HTTP %d, want %d: %s", p.code, code, p.body)
	}
	for _, part := range parts {
		if !strings.Contains(p.body, part) {
			t.Errorf("the page lacks %q: %s", part, p.body)
		}
	}
}

const signInHeading = "<h1>Sign in</h1>"

// Without a session there is the sign-in page and no data.
func TestNothingWithoutASession(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	b := newBrowser(t, s)
	for _, path := range []string{"/", "/d/1", "/d/999"} {
		b.get(path).want(t, http.StatusUnauthorized, signInHeading)
	}
	b.cookies["hallmark-session"] = &http.Cookie{Name: "hallmark-session", Value: strings.Repeat("A", 43)}
	b.get("/").want(t, http.StatusUnauthorized, signInHeading)
	b.do(http.MethodGet, "/", nil, "Authorization", "Bearer "+s.PersonToken("a", "audit")).want(t, http.StatusUnauthorized)
	b.get("/nowhere").want(t, http.StatusNotFound, "There is no page")
	b.do(http.MethodDelete, "/signin", nil, "Origin", s.URL).want(t, http.StatusMethodNotAllowed)
}

func TestSignInAndOut(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{TLS: true})
	b := newBrowser(t, s)
	b.signIn("nonsense").want(t, http.StatusUnauthorized, "TOKEN_MALFORMED")
	if len(b.cookies) != 0 {
		t.Fatalf("a bad token got cookies: %v", b.cookies)
	}
	p := b.signIn("  " + s.PersonToken("a-1", "audit") + "\n")
	if p.code != http.StatusSeeOther || p.header.Get("Location") != "/" {
		t.Fatalf("HTTP %d to %q: %s", p.code, p.header.Get("Location"), p.body)
	}
	c := b.cookies["__Host-hallmark-session"]
	if c == nil || !c.HttpOnly || !c.Secure || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Domain != "" || len(c.Value) != 43 {
		t.Fatalf("cookie %v", c)
	}
	b.get("/").want(t, http.StatusOK, "<h1>Stages</h1>", "Sign out")
	// Another sign-in ends the session before it.
	b.signIn(s.PersonToken("a-1", "audit"))
	if b.cookies["__Host-hallmark-session"].Value == c.Value {
		t.Error("the session kept its id")
	}
	old := newBrowser(t, s)
	old.cookies[c.Name] = c
	old.get("/").want(t, http.StatusUnauthorized, signInHeading)

	kept := *b.cookies[c.Name]
	if p := b.do(http.MethodPost, "/signout", nil); p.code != http.StatusSeeOther || len(b.cookies) != 0 {
		t.Errorf("signing out: HTTP %d, cookies %v", p.code, b.cookies)
	}
	b.cookies[c.Name] = &kept
	b.get("/").want(t, http.StatusUnauthorized, signInHeading)
}

func TestSecurityHeaders(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{TLS: true})
	b := newBrowser(t, s)
	for _, path := range []string{"/", "/signin", "/nowhere", "/style.css"} {
		h := b.get(path).header
		csp := h.Get("Content-Security-Policy")
		if !strings.Contains(csp, "default-src 'none'") || !strings.Contains(csp, "style-src 'self'") || strings.Contains(csp, "unsafe") || strings.Contains(csp, "script") {
			t.Errorf("%s: CSP %q", path, csp)
		}
		if h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Referrer-Policy") != "no-referrer" || h.Get("Strict-Transport-Security") == "" {
			t.Errorf("%s: %v", path, h)
		}
		if path != "/style.css" && h.Get("Cache-Control") != "no-store" {
			t.Errorf("%s may be cached", path)
		}
	}
	body := b.get("/signin").body
	for _, foreign := range []string{"<script", "http://", "https://", " style=", "onclick"} {
		if strings.Contains(body, foreign) {
			t.Errorf("the page has %q", foreign)
		}
	}
	for _, part := range []string{`<html lang="en">`, `href="#main"`, `<label for="token">`} {
		if !strings.Contains(body, part) {
			t.Errorf("the page lacks %q", part)
		}
	}
}

// A form of another site does nothing, whether or not the browser sends cookies
// with it.
func TestForeignForms(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	b := newBrowser(t, s)
	token := s.PersonToken("a-1", "audit")
	for name, header := range map[string][]string{
		"foreign origin": {"Origin", "https://evil.example.com"},
		"opaque origin":  {"Origin", "null"},
		"fetch metadata": {"Sec-Fetch-Site", "cross-site"},
		"same site":      {"Sec-Fetch-Site", "same-site"},
	} {
		t.Run(name, func(t *testing.T) {
			b.do(http.MethodPost, "/signin", url.Values{"token": {token}}, header...).want(t, http.StatusForbidden)
			if len(b.cookies) != 0 {
				t.Error("it was signed in")
			}
		})
	}
	b.signIn(token)
	b.do(http.MethodPost, "/signout", nil, "Origin", "https://evil.example.com").want(t, http.StatusForbidden)
	b.get("/").want(t, http.StatusOK)
	b.do(http.MethodGet, "/signout", nil).want(t, http.StatusMethodNotAllowed)
	b.get("/").want(t, http.StatusOK)
}

// A session ends with the token that it was begun with.
func TestSessionEndsWithItsToken(t *testing.T) {
	var later atomic.Int64
	s := testkit.NewStack(t, testkit.Options{Now: func() time.Time { return time.Now().Add(time.Duration(later.Load())) }})
	b := newBrowser(t, s)
	b.signIn(s.PersonToken("a-1", "audit")) // five minutes
	later.Store(int64(4 * time.Minute))
	b.get("/").want(t, http.StatusOK)
	later.Store(int64(6 * time.Minute))
	b.get("/").want(t, http.StatusUnauthorized, signInHeading)
}

func TestSignInLink(t *testing.T) {
	var later atomic.Int64
	s := testkit.NewStack(t, testkit.Options{Now: func() time.Time { return time.Now().Add(time.Duration(later.Load())) }})
	id := s.Identity(s.PersonToken("a-1", "audit"))
	link := s.Pages.SignInLink(id)
	b := newBrowser(t, s)
	if p := b.get(link); p.code != http.StatusSeeOther {
		t.Fatalf("HTTP %d: %s", p.code, p.body)
	}
	b.get("/").want(t, http.StatusOK, html.EscapeString(id.SAN))
	newBrowser(t, s).get(link).want(t, http.StatusUnauthorized, "used before")

	link = s.Pages.SignInLink(id)
	later.Store(int64(11 * time.Minute))
	newBrowser(t, s).get(link).want(t, http.StatusUnauthorized, "too old")

	later.Store(0)
	first := s.Pages.SignInLink(id)
	last := ""
	for range 5000 { // more than are kept
		later.Add(1)
		last = s.Pages.SignInLink(id)
	}
	newBrowser(t, s).get(first).want(t, http.StatusUnauthorized)
	if p := newBrowser(t, s).get(last); p.code != http.StatusSeeOther {
		t.Errorf("the newest link: HTTP %d", p.code)
	}
}

// The board shows what is where, and a decision in the words of the client.
func TestBoardAndDecision(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	ctx := t.Context()
	signed, err := s.Gate.Sign(ctx, s.Identity(s.Token(nil)), gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})
	if err != nil || signed[0].Err != nil {
		t.Fatal(err, signed)
	}
	promoter := s.Identity(s.PromoterToken())
	allowed, err := s.Gate.Promote(ctx, promoter, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	if err != nil || allowed.Verdict != gate.Allowed {
		t.Fatal(err, allowed)
	}
	denied, err := s.Gate.Promote(ctx, promoter, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "prod", Version: "1.0.0"})
	if err != nil || denied.Verdict != gate.Denied {
		t.Fatal(err, denied)
	}
	b := newBrowser(t, s)
	b.signIn(s.PersonToken("a-1", "audit"))
	number := func(d gate.Decision) string { return "/d/" + strconv.FormatUint(d.Number, 10) }
	b.get("/").want(t, http.StatusOK, "<h1>Stages</h1>", string(img.Repository), img.Digest.String(), "<td>DONE</td>",
		`href="`+number(allowed.Decision)+`"`, "nothing was promoted here yet", "promotion", "provenance")
	p := b.get(number(denied.Decision))
	p.want(t, http.StatusOK, ">DENIED</span>", "→ prod", img.String(), "now in prod")
	for _, r := range denied.Results {
		if r.Outcome != attest.OK {
			p.want(t, http.StatusOK, html.EscapeString("needs "+r.Required), string(r.Reason))
		}
	}
	b.get(number(allowed.Decision)).want(t, http.StatusOK, ">ALLOWED</span>", "provenance (", img.Digest.String())

	// The promoter may read its decision but has no list; a stranger has neither.
	job := newBrowser(t, s)
	job.signIn(s.PromoterToken())
	job.get("/").want(t, http.StatusOK, img.Digest.String(), "is for auditors")
	job.get(number(denied.Decision)).want(t, http.StatusOK, "DENIED")
	stranger := newBrowser(t, s)
	stranger.signIn(s.PersonToken("a-2"))
	stranger.get(number(denied.Decision)).want(t, http.StatusNotFound)
	if body := stranger.get("/").body; strings.Contains(body, img.Digest.Hex()) {
		t.Error("a stranger sees the stages")
	}
	for _, path := range []string{"/d/x", "/d/-1", "/d/01", "/d/99999999999999999999"} {
		b.get(path).want(t, http.StatusNotFound)
	}
}

// What others wrote is text on the page, whatever it looks like.
func TestEscaping(t *testing.T) {
	const evil = `<script>alert("x")</script>`
	s := testkit.NewStack(t, testkit.Options{})
	b := newBrowser(t, s)
	b.signIn(`<script>alert("x")</script>`).want(t, http.StatusUnauthorized)
	id := s.Identity(s.PersonToken("a-1", "audit"))
	id.SAN = evil
	if p := b.get(s.Pages.SignInLink(id)); p.code != http.StatusSeeOther {
		t.Fatalf("HTTP %d", p.code)
	}
	for _, path := range []string{"/", "/?page=" + url.QueryEscape(evil), "/d/" + url.PathEscape(evil), "/" + url.PathEscape(evil)} {
		if body := b.get(path).body; strings.Contains(body, "<script") || !strings.Contains(body, "&lt;script&gt;") {
			t.Errorf("%s: %s", path, body)
		}
	}
}
