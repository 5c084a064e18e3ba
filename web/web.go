// Package web serves the auditors' pages: what is in the stages, the last
// records, and decisions in the words that the client uses. Pages are made on
// the server, without scripts and without anything from elsewhere.
package web

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/identity"
)

//go:embed *.html style.css
var files embed.FS

// Config is what the pages are made of. Every field but Now is required.
type Config struct {
	Gate   *gate.Gate
	Auth   *identity.Authenticator
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger
}

// Handler serves the pages. Nothing but the sign-in page is shown without a
// session.
type Handler struct {
	cfg      Config
	secure   bool // browsers reach the pages over TLS, ended here or by a proxy
	pages    map[string]*template.Template
	style    []byte
	routes   http.Handler
	sessions secrets
	codes    secrets
}

// New returns the pages.
func New(cfg Config) (*Handler, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	h := &Handler{
		cfg: cfg, secure: strings.HasPrefix(cfg.Gate.Trust().Service, "https://"), pages: map[string]*template.Template{},
		sessions: secrets{now: cfg.Now, held: map[[32]byte]holder{}},
		codes:    secrets{now: cfg.Now, held: map[[32]byte]holder{}},
	}
	var err error
	if h.style, err = files.ReadFile("style.css"); err != nil {
		return nil, fmt.Errorf("reading the style sheet: %w", err)
	}
	for _, name := range []string{"board", "decision", "image", "signin", "message"} {
		t, err := template.New("layout.html").Funcs(words).ParseFS(files, "layout.html", name+".html")
		if err != nil {
			return nil, fmt.Errorf("parsing the page %s: %w", name, err)
		}
		h.pages[name] = t
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", h.signedIn(h.board))
	mux.HandleFunc("GET /d/{number}", h.signedIn(h.decision))
	mux.HandleFunc("GET /a", h.signedIn(h.image))
	mux.HandleFunc("GET /signin", h.signInPage)
	mux.HandleFunc("POST /signin", h.signIn)
	mux.HandleFunc("POST /signout", h.signOut)
	mux.HandleFunc("GET /style.css", h.styleSheet)
	for _, path := range []string{"/{$}", "/d/{number}", "/a", "/signin", "/signout", "/style.css"} {
		mux.HandleFunc(path, h.noMethod)
	}
	mux.HandleFunc("/", h.noPage)
	// Beside SameSite=Strict: a form of another origin changes nothing here, and
	// cannot sign a browser in as somebody else.
	cross := http.NewCrossOriginProtection()
	cross.SetDenyHandler(http.HandlerFunc(h.foreignForm))
	h.routes = cross.Handler(mux)
	return h, nil
}

// ServeHTTP serves a page with the headers that keep it what it is.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	head := w.Header()
	head.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
	head.Set("X-Content-Type-Options", "nosniff")
	head.Set("Referrer-Policy", "no-referrer")
	head.Set("Cross-Origin-Opener-Policy", "same-origin")
	head.Set("Cross-Origin-Resource-Policy", "same-origin")
	head.Set("Cache-Control", "no-store")
	if h.secure {
		head.Set("Strict-Transport-Security", "max-age=31536000")
	}
	r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
	h.routes.ServeHTTP(w, r)
}

// SignInLink returns the path and query of a link that signs a browser in as id,
// once, within ten minutes, from this machine. Only "hallmarkd dev" makes them:
// whoever can run it can mint that identity's tokens as well.
func (h *Handler) SignInLink(id attest.Identity) string {
	return "/signin?code=" + h.codes.add(id, h.cfg.Now().Add(codeLife))
}

// view is what every page is given.
type view struct {
	Title string
	Who   *attest.Identity // nil: nobody is signed in
	Data  any
}

func (h *Handler) show(w http.ResponseWriter, code int, page string, v view) {
	var out bytes.Buffer
	if err := h.pages[page].Execute(&out, v); err != nil {
		h.cfg.Logger.Error("making a page", "page", page, "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	out.WriteTo(w) // a reader that went away cannot be told
}

// signedIn runs a page for the identity of the session, and shows the sign-in
// page without one.
func (h *Handler) signedIn(page func(http.ResponseWriter, *http.Request, attest.Identity)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			h.message(w, http.StatusUnauthorized, nil, attest.TwoIdentities, "Pages take a session, not a token: the API takes the token.")
			return
		}
		id, ok := h.session(r)
		if !ok {
			h.show(w, http.StatusUnauthorized, "signin", view{Title: "Sign in"})
			return
		}
		page(w, r, id)
	}
}

func (h *Handler) session(r *http.Request) (attest.Identity, bool) {
	cookies := r.CookiesNamed(h.cookieName())
	if len(cookies) != 1 { // of two, one was planted
		return attest.Identity{}, false
	}
	s, ok := h.sessions.find(cookies[0].Value)
	return s.id, ok
}

func (h *Handler) cookieName() string {
	if h.secure {
		return cookieTLS
	}
	return cookiePlain
}

func (h *Handler) cookie(value string, maxAge int) *http.Cookie {
	return &http.Cookie{
		Name: h.cookieName(), Value: value, Path: "/", MaxAge: maxAge,
		HttpOnly: true, Secure: h.secure, SameSite: http.SameSiteStrictMode,
	}
}

func (h *Handler) signInPage(w http.ResponseWriter, r *http.Request) {
	code := r.URL.Query().Get("code")
	if code == "" {
		h.show(w, http.StatusOK, "signin", view{Title: "Sign in"})
		return
	}
	who, ok := h.codes.take(code)
	if !ok || !fromHere(r) {
		h.show(w, http.StatusUnauthorized, "signin", view{Title: "Sign in", Data: "This link was used before or is too old."})
		return
	}
	h.start(w, r, who.id, h.cfg.Now().Add(maxSession))
}

// fromHere reports whether the browser runs on this machine.
func fromHere(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// signIn verifies a token that was pasted into the form, in the same way as one
// that comes with a call, and forgets it.
func (h *Handler) signIn(w http.ResponseWriter, r *http.Request) {
	token := strings.TrimSpace(r.PostFormValue("token"))
	id, err := h.cfg.Auth.Authenticate(r.Context(), token)
	if err != nil {
		h.cfg.Logger.Info("refused", "method", "POST /signin", "reason", string(attest.ReasonOf(err)))
		h.show(w, http.StatusUnauthorized, "signin", view{Title: "Sign in", Data: h.tell(err)})
		return
	}
	end := h.cfg.Now().Add(maxSession)
	if id.Expires.Before(end) {
		end = id.Expires
	}
	h.start(w, r, id, end)
}

// start begins a session and shows the board. Whatever session the browser had
// ends.
func (h *Handler) start(w http.ResponseWriter, r *http.Request, id attest.Identity, end time.Time) {
	h.forget(r)
	secret := h.sessions.add(id, end)
	http.SetCookie(w, h.cookie(secret, max(1, int(end.Sub(h.cfg.Now()).Seconds()))))
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (h *Handler) signOut(w http.ResponseWriter, r *http.Request) {
	h.forget(r)
	http.SetCookie(w, h.cookie("", -1))
	http.Redirect(w, r, "/signin", http.StatusSeeOther)
}

func (h *Handler) forget(r *http.Request) {
	for _, c := range r.CookiesNamed(h.cookieName()) {
		h.sessions.drop(c.Value)
	}
}

// row is one repository of a track with its stages in order.
type row struct {
	Track      string
	Repository attest.Repository
	Stages     []gate.StageStatus
}

type boardData struct {
	Rows       []row
	Next       string // page token of further stages
	Records    []gate.RecordSummary
	NoRecords  string // why there are none
	LogSize    uint64
	Checkpoint string
}

// board is the first page: which digest is in which stage, and what happened last.
func (h *Handler) board(w http.ResponseWriter, r *http.Request, id attest.Identity) {
	var b boardData
	stages, next, err := h.cfg.Gate.Stages(r.Context(), id, gate.StagesQuery{PageSize: 300, PageToken: r.URL.Query().Get("page")})
	if err != nil {
		h.fail(w, r, &id, err)
		return
	}
	b.Rows, b.Next = rows(stages), next
	page, err := h.cfg.Gate.Records(r.Context(), id, gate.RecordsQuery{PageSize: 20})
	switch {
	case attest.ReasonOf(err) == attest.RoleMissing:
		b.NoRecords = "The list of records is for auditors; the policy does not give you that role."
	case err != nil:
		h.fail(w, r, &id, err)
		return
	}
	b.Records, b.LogSize = page.Records, page.LogSize
	h.show(w, http.StatusOK, "board", view{"Stages", &id, b})
}

// rows groups stages, which come ordered by track and repository.
func rows(stages []gate.StageStatus) []row {
	var out []row
	for _, s := range stages {
		if n := len(out); n == 0 || out[n-1].Track != s.Track || out[n-1].Repository != s.Repository {
			out = append(out, row{Track: s.Track, Repository: s.Repository})
		}
		out[len(out)-1].Stages = append(out[len(out)-1].Stages, s)
	}
	return out
}

func (h *Handler) decision(w http.ResponseWriter, r *http.Request, id attest.Identity) {
	number, err := strconv.ParseUint(r.PathValue("number"), 10, 63)
	if err != nil || r.PathValue("number") != strconv.FormatUint(number, 10) {
		h.noPage(w, r)
		return
	}
	d, err := h.cfg.Gate.Decision(r.Context(), id, number)
	if err != nil {
		h.fail(w, r, &id, err)
		return
	}
	h.show(w, http.StatusOK, "decision", view{fmt.Sprintf("Decision %d", d.Number), &id, d})
}

func (h *Handler) styleSheet(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/css; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=3600")
	w.Write(h.style)
}

// fail shows an error to a person. What is not meant for callers is logged and
// not shown.
func (h *Handler) fail(w http.ResponseWriter, r *http.Request, id *attest.Identity, err error) {
	reason := attest.ReasonOf(err)
	code := http.StatusInternalServerError
	switch reason {
	case attest.RecordNotFound, attest.SubjectNotFound, attest.StageUnknown, attest.TrackUnknown:
		code = http.StatusNotFound
	case attest.RoleMissing, attest.SourceNotAllowed:
		code = http.StatusForbidden
	case attest.BadRequest, attest.BadDigest, attest.BadReference, attest.TagRefused:
		code = http.StatusBadRequest
	case attest.LedgerIncomplete, attest.LedgerUnavailable, attest.ShuttingDown:
		code = http.StatusServiceUnavailable
	}
	if code == http.StatusInternalServerError && !errors.Is(err, context.Canceled) {
		h.cfg.Logger.Error("making a page", "path", r.Pattern, "reason", string(reason), "error", err)
	}
	h.message(w, code, id, reason, h.tell(err))
}

// tell returns what a person may read of an error.
func (h *Handler) tell(err error) string {
	var e *attest.Error
	if !errors.As(err, &e) || e.Reason == attest.Internal {
		return "Something went wrong here. The service's log has the cause."
	}
	return string(e.Reason) + ": " + e.Message
}

type messageData struct {
	Reason attest.Reason
	Text   string
}

func (h *Handler) message(w http.ResponseWriter, code int, id *attest.Identity, reason attest.Reason, text string) {
	h.show(w, code, "message", view{http.StatusText(code), id, messageData{reason, text}})
}

func (h *Handler) noPage(w http.ResponseWriter, r *http.Request) {
	h.message(w, http.StatusNotFound, h.who(r), attest.RecordNotFound, "There is no page at this address.")
}

func (h *Handler) noMethod(w http.ResponseWriter, r *http.Request) {
	h.message(w, http.StatusMethodNotAllowed, h.who(r), attest.BadRequest, "This address cannot be used in that way.")
}

func (h *Handler) foreignForm(w http.ResponseWriter, r *http.Request) {
	h.message(w, http.StatusForbidden, nil, attest.BadRequest, "This form was sent from another site. Nothing was done.")
}

func (h *Handler) who(r *http.Request) *attest.Identity {
	if id, ok := h.session(r); ok {
		return &id
	}
	return nil
}
