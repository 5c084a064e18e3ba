package identity_test

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

const (
	reviewPath = "/apis/authentication.k8s.io/v1/tokenreviews"
	ownToken   = "the.services.own"
)

// apiServer is an HTTPS server that speaks the TokenReview API: it answers with
// status, or as handler does.
type apiServer struct {
	*httptest.Server
	handler atomic.Pointer[http.HandlerFunc]
	asked   atomic.Int32
	last    atomic.Pointer[http.Request]
	body    atomic.Pointer[[]byte]
	ca, own string // files
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{own: filepath.Join(t.TempDir(), "token"), ca: filepath.Join(t.TempDir(), "ca.crt")}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		s.last.Store(r)
		s.body.Store(&body)
		(*s.handler.Load())(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that are to fail
	s.StartTLS()
	t.Cleanup(s.Close)
	writeFile(t, s.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	writeFile(t, s.own, []byte(ownToken+"\n"))
	s.says(http.StatusCreated, good)
	return s
}

// good is the status of an API server that knows the token of bound.
var good = map[string]any{
	"authenticated": true, "audiences": []string{service},
	"user": map[string]any{
		"username": "system:serviceaccount:ci:image-builder", "uid": accountUID,
		"groups": []string{"system:serviceaccounts"},
		"extra":  map[string]any{"authentication.kubernetes.io/pod-uid": []string{podUID}},
	},
}

func (s *apiServer) answers(h http.HandlerFunc) { s.handler.Store(&h) }

func (s *apiServer) says(code int, status any) {
	s.answers(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status})
	})
}

func (s *apiServer) review() *identity.TokenReview {
	return &identity.TokenReview{URL: s.URL + reviewPath, CAFile: s.ca, TokenFile: s.own}
}

// with returns good with changes of its members; nil leaves one out.
func with(changes map[string]any) map[string]any {
	all := map[string]any{}
	for k, v := range good {
		all[k] = v
	}
	for k, v := range changes {
		if all[k] = v; v == nil {
			delete(all, k)
		}
	}
	return all
}

func TestTokenReview(t *testing.T) {
	c := newClock()
	k, api := newCluster(t, c), newAPIServer(t)
	conf := k.issuer("east")
	conf.TokenReview = api.review()
	a := newAuth(t, c, conf)
	token := mint(t, k.Issuer, bound(nil, nil))
	accepted(t, a, token)

	r := api.last.Load()
	if r.Method != http.MethodPost || r.URL.Path != reviewPath || r.Header.Get("Authorization") != "Bearer "+ownToken || r.Header.Get("Content-Type") != "application/json" {
		t.Errorf("asked %s %s with %v", r.Method, r.URL, r.Header)
	}
	var asked struct {
		APIVersion, Kind string
		Spec             struct {
			Token     string
			Audiences []string
		}
	}
	if err := json.Unmarshal(*api.body.Load(), &asked); err != nil {
		t.Fatal(err)
	}
	if asked.APIVersion != "authentication.k8s.io/v1" || asked.Kind != "TokenReview" || asked.Spec.Token != token || len(asked.Spec.Audiences) != 1 || asked.Spec.Audiences[0] != service {
		t.Errorf("the question is %s", *api.body.Load())
	}
	// The service's own token is renewed by whoever mounts it.
	writeFile(t, api.own, []byte("renewed"))
	accepted(t, a, token)
	if got := api.last.Load().Header.Get("Authorization"); got != "Bearer renewed" {
		t.Errorf("asked with %q after the renewal", got)
	}
	// What this service refuses by itself is not worth a question.
	before := api.asked.Load()
	refused(t, a, mint(t, k.Issuer, bound(map[string]any{"exp": c.Now().Unix()}, nil)), attest.TokenExpired)
	refused(t, a, token[:len(token)-8]+"AAAAAAAA", attest.TokenSignature)
	if api.asked.Load() != before {
		t.Error("the cluster was asked about a token that was refused already")
	}
	// A server of before that does not send the pod.
	api.says(http.StatusOK, with(map[string]any{"user": map[string]any{"username": "system:serviceaccount:ci:image-builder"}}))
	accepted(t, a, token)
}

// A19: a token outlives its pod, unless the cluster is asked. What is no clear yes
// is none.
func TestA19TokenReviewRefuses(t *testing.T) {
	c := newClock()
	k, api := newCluster(t, c), newAPIServer(t)
	var logged bytes.Buffer
	conf := k.issuer("east")
	conf.TokenReview = api.review()
	a, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now, Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	if err != nil {
		t.Fatal(err)
	}
	token := mint(t, k.Issuer, bound(nil, nil))
	user := func(name string) map[string]any {
		return with(map[string]any{"user": map[string]any{"username": name}})
	}
	raw := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }
	}
	for _, row := range []struct {
		name   string
		code   int
		status any
		raw    http.HandlerFunc
		want   attest.Reason
	}{
		{name: "A19 pod is gone", code: 201, status: map[string]any{"user": map[string]any{}, "error": "[invalid bearer token, pod not found]"}, want: attest.TokenRevoked},
		{name: "A19 said in so many words", code: 201, status: with(map[string]any{"authenticated": false}), want: attest.TokenRevoked},
		{name: "A19 not said at all", code: 201, status: with(map[string]any{"authenticated": nil}), want: attest.TokenRevoked},
		{name: "A19 null", code: 201, status: with(map[string]any{"authenticated": json.RawMessage("null")}), want: attest.TokenRevoked},

		{name: "A19 another account", code: 201, status: user("system:serviceaccount:ci:other"), want: attest.KeysUnavailable},
		{name: "A19 nobody", code: 201, status: user(""), want: attest.KeysUnavailable},
		{name: "A19 another pod", code: 201, status: with(map[string]any{"user": map[string]any{
			"username": "system:serviceaccount:ci:image-builder", "extra": map[string]any{"authentication.kubernetes.io/pod-uid": []string{accountUID}},
		}}), want: attest.KeysUnavailable},
		{name: "A14 audience of another service", code: 201, status: with(map[string]any{"audiences": []string{"https://other.example.com"}}), want: attest.KeysUnavailable},
		{name: "A14 server that knows no audiences", code: 201, status: with(map[string]any{"audiences": nil}), want: attest.KeysUnavailable},
		{name: "no status", code: 201, status: nil, want: attest.KeysUnavailable},
		{name: "empty status", code: 201, status: map[string]any{}, want: attest.KeysUnavailable},
		{name: "authenticated as text", code: 201, status: with(map[string]any{"authenticated": "true"}), want: attest.KeysUnavailable},
		{name: "401 for this service", code: 401, status: good, want: attest.KeysUnavailable},
		{name: "403 for this service", code: 403, status: good, want: attest.KeysUnavailable},
		{name: "404", code: 404, status: good, want: attest.KeysUnavailable},
		{name: "503", code: 503, status: good, want: attest.KeysUnavailable},
		{name: "202", code: 202, status: good, want: attest.KeysUnavailable},
		{name: "other kind", raw: raw(string(mustJSON(t, map[string]any{"kind": "Status", "status": good}))), want: attest.KeysUnavailable},
		{name: "no JSON", raw: raw("ok"), want: attest.KeysUnavailable},
		{name: "empty", raw: raw(""), want: attest.KeysUnavailable},
		{name: "A22 two answers", raw: raw(`{"kind":"TokenReview","status":{"authenticated":false,"authenticated":true}}`), want: attest.KeysUnavailable},
		{name: "A22 two spellings", raw: raw(`{"kind":"TokenReview","status":{"authenticated":false,"Authenticated":true}}`), want: attest.KeysUnavailable},
		{name: "A08 oversize", raw: raw(string(mustJSON(t, map[string]any{"kind": "TokenReview", "status": good})) + strings.Repeat(" ", 1<<20)), want: attest.KeysUnavailable},
		{name: "A08 cut off", raw: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "999")
			fmt.Fprint(w, `{"kind":"TokenReview"`)
		}, want: attest.KeysUnavailable},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.raw != nil {
				api.answers(row.raw)
			} else {
				api.says(row.code, row.status)
			}
			refused(t, a, token, row.want)
		})
	}
	t.Run("A08 unreachable", func(t *testing.T) {
		api.CloseClientConnections()
		api.Server.Close()
		refused(t, a, token, attest.KeysUnavailable)
	})
	for _, secret := range []string{token, ownToken} {
		if strings.Contains(logged.String(), secret) {
			t.Error("L01: the log has a token in it")
		}
	}
}

// A20: the service's own token goes to the configured server and nowhere else,
// whatever that server or a caller's token says.
func TestA20OwnTokenStays(t *testing.T) {
	c := newClock()
	k, api, evil := newCluster(t, c), newAPIServer(t), newAPIServer(t)
	conf := k.issuer("east")
	conf.TokenReview = api.review()
	a := newAuth(t, c, conf)
	for _, code := range []int{301, 302, 303, 307, 308} {
		t.Run(fmt.Sprintf("A20 redirect %d", code), func(t *testing.T) {
			api.answers(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, evil.URL+reviewPath, code) })
			refused(t, a, mint(t, k.Issuer, bound(nil, nil)), attest.KeysUnavailable)
		})
	}
	t.Run("A20 URL in the token", func(t *testing.T) {
		api.says(http.StatusCreated, good)
		accepted(t, a, mint(t, k.Issuer, bound(map[string]any{
			"url": evil.URL + reviewPath, "token_review": evil.URL + reviewPath, "aud": service,
		}, nil)))
	})
	t.Run("A20 iss of the other server", func(t *testing.T) {
		refused(t, a, mint(t, k.Issuer, bound(map[string]any{"iss": evil.URL}, nil)), attest.IssuerNotAllowed)
	})
	t.Run("A20 other certificate", func(t *testing.T) {
		// The configured authority is the only one: a certificate that others
		// trust, or that the machine trusts, is not enough.
		other := newCluster(t, c).issuer("west")
		other.JWKSFile = k.keys
		other.TokenReview = &identity.TokenReview{URL: evil.URL + reviewPath, CAFile: filepath.Join(t.TempDir(), "ca"), TokenFile: api.own}
		writeFile(t, other.TokenReview.CAFile, otherAuthority(t))
		refused(t, newAuth(t, c, other), mint(t, k.Issuer, bound(nil, nil)), attest.KeysUnavailable)
	})
	if n := evil.asked.Load(); n != 0 {
		t.Errorf("A20: another server was asked %d times", n)
	}
	t.Run("own token is away", func(t *testing.T) {
		before := api.asked.Load()
		for _, bad := range []string{"", " \n", "two words", "line\nbreak"} {
			writeFile(t, api.own, []byte(bad))
			refused(t, a, mint(t, k.Issuer, bound(nil, nil)), attest.KeysUnavailable)
		}
		if api.asked.Load() != before {
			t.Error("the cluster was asked without a token of the service's own")
		}
	})
}

// otherAuthority returns the PEM certificate of an authority that issued nothing.
func otherAuthority(t *testing.T) []byte {
	t.Helper()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: newAuthority(t, newClock(), "spiffe://other.example").cert.Raw})
}

func TestTokenReviewConfig(t *testing.T) {
	c := newClock()
	k, api := newCluster(t, c), newAPIServer(t)
	for _, row := range []struct {
		name   string
		change func(*identity.TokenReview)
		want   string
	}{
		{"good", func(*identity.TokenReview) {}, ""},
		{"authorities of the system", func(r *identity.TokenReview) { r.CAFile = "" }, ""},
		{"A20 no URL", func(r *identity.TokenReview) { r.URL = "" }, "url:"},
		{"A20 without TLS", func(r *identity.TokenReview) { r.URL = "http://127.0.0.1" + reviewPath }, "url:"},
		{"A20 pattern", func(r *identity.TokenReview) { r.URL = "https://*.example.com" + reviewPath }, "url:"},
		{"A20 user in it", func(r *identity.TokenReview) { r.URL = "https://a@k8s.example.com" + reviewPath }, "url:"},
		{"A20 another API", func(r *identity.TokenReview) { r.URL = api.URL + "/api/v1/secrets" }, "url:"},
		{"no token file", func(r *identity.TokenReview) { r.TokenFile = "" }, "token_file:"},
		{"empty token file", func(r *identity.TokenReview) {
			r.TokenFile = filepath.Join(t.TempDir(), "empty")
			writeFile(t, r.TokenFile, nil)
		}, "token_file:"},
		{"large token file", func(r *identity.TokenReview) {
			r.TokenFile = filepath.Join(t.TempDir(), "large")
			writeFile(t, r.TokenFile, bytes.Repeat([]byte("a"), 17<<10))
		}, "token_file:"},
		{"no authority", func(r *identity.TokenReview) { r.CAFile = api.own }, "ca_file:"},
	} {
		t.Run(row.name, func(t *testing.T) {
			conf := k.issuer("east")
			conf.TokenReview = api.review()
			row.change(conf.TokenReview)
			_, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now})
			if row.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if attest.ReasonOf(err) != attest.BadConfig || !strings.Contains(err.Error(), "token_review: "+row.want) {
				t.Fatalf("New: %v: want %s naming %q", err, attest.BadConfig, row.want)
			}
		})
	}
}
