package dev_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/hallmarkd/hallmark/internal/dev"
)

func start(t *testing.T, c dev.IssuerConfig) *dev.Issuer {
	t.Helper()
	i, err := dev.StartIssuer(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Close() })
	return i
}

// get reads a document of the issuer over HTTP.
func get(t *testing.T, uri string, into any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, uri, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", uri, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatal(err)
	}
}

// claimsOf verifies a token by what the issuer publishes, as a stranger would.
func claimsOf(t *testing.T, issuer, token string) (map[string]any, error) {
	t.Helper()
	var doc struct {
		Issuer string                    `json:"issuer"`
		URI    string                    `json:"jwks_uri"`
		Algs   []jose.SignatureAlgorithm `json:"id_token_signing_alg_values_supported"`
	}
	get(t, issuer+"/.well-known/openid-configuration", &doc)
	if doc.Issuer != issuer {
		t.Fatalf("discovery is of %q, not %q", doc.Issuer, issuer)
	}
	var keys jose.JSONWebKeySet
	get(t, doc.URI, &keys)
	jws, err := jose.ParseSignedCompact(token, doc.Algs)
	if err != nil {
		return nil, err
	}
	payload, err := jws.Verify(keys)
	if err != nil {
		return nil, err
	}
	var claims map[string]any
	err = json.Unmarshal(payload, &claims)
	return claims, err
}

func TestIssuer(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	for _, alg := range []string{"RS256", "ES256"} {
		t.Run(alg, func(t *testing.T) {
			i := start(t, dev.IssuerConfig{Algorithm: alg, Now: func() time.Time { return now }})
			token, err := i.Mint(map[string]any{"aud": "x", "nbf": nil})
			if err != nil {
				t.Fatal(err)
			}
			claims, err := claimsOf(t, i.URL(), token)
			if err != nil {
				t.Fatal(err)
			}
			if jti, _ := claims["jti"].(string); jti == "" {
				t.Error("no jti")
			}
			delete(claims, "jti")
			got, _ := json.Marshal(claims)
			want := `{"aud":"x","exp":1795176300,"iat":1795176000,"iss":"` + i.URL() + `"}`
			if string(got) != want {
				t.Fatalf("claims %s, want %s", got, want)
			}
			if err := i.RotateKey(); err != nil {
				t.Fatal(err)
			}
			if _, err := claimsOf(t, i.URL(), token); err == nil {
				t.Fatal("a token of the old key verifies after the rotation")
			}
		})
	}
}

// Mounted below a path of somebody else's listener, as "hallmarkd dev" does.
func TestIssuerMounted(t *testing.T) {
	mux := http.NewServeMux()
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	i, err := dev.NewIssuer(dev.IssuerConfig{URL: s.URL + "/oidc/"})
	if err != nil {
		t.Fatal(err)
	}
	mux.Handle("/oidc/", i)
	token, err := i.Mint(dev.GitHubClaims("acme/api", strings.Repeat("a", 40), "refs/tags/v1"))
	if err != nil {
		t.Fatal(err)
	}
	claims, err := claimsOf(t, s.URL+"/oidc", token)
	if err != nil {
		t.Fatal(err)
	}
	if claims["ref_type"] != "tag" || claims["repository_id"] != dev.GitHubID("acme/api") || claims["repository_owner_id"] != dev.GitHubID("acme") {
		t.Fatalf("claims %v", claims)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestIssuerIsOnLoopbackOnly(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "127.0.0.1", "example.com:0"} {
		if i, err := dev.StartIssuer(t.Context(), dev.IssuerConfig{Addr: addr}); err == nil {
			i.Close()
			t.Errorf("it listens on %q", addr)
		}
	}
	for _, u := range []string{"", "https://hallmark.example.com", "127.0.0.1:80", "http://127.0.0.1.example.com"} {
		if _, err := dev.NewIssuer(dev.IssuerConfig{URL: u}); err == nil {
			t.Errorf("it can be mounted at %q", u)
		}
	}
	if _, err := dev.StartIssuer(t.Context(), dev.IssuerConfig{Algorithm: "none"}); err == nil {
		t.Error("it signs with algorithm none")
	}
}

func TestIssuerEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	i, err := dev.StartIssuer(ctx, dev.IssuerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	deadline, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		req, err := http.NewRequestWithContext(deadline, http.MethodGet, i.URL(), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			break
		}
		resp.Body.Close()
	}
	if deadline.Err() != nil {
		t.Fatal("it still answers after its context ended")
	}
}

// Another process with the directory gets tokens; the key outlives the issuer.
func TestRequestToken(t *testing.T) {
	dir := t.TempDir()
	if _, err := dev.RequestToken(t.Context(), dir, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("without an issuer: %v", err)
	}
	i := start(t, dev.IssuerConfig{Dir: dir})
	for _, name := range []string{"issuer.key", "issuer.json"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("L06 %s: %v, %v", name, info, err)
		}
	}
	token, err := dev.RequestToken(t.Context(), dir, map[string]any{"sub": "me", "run": json.Number("9007199254740993")})
	if err != nil {
		t.Fatal(err)
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	if payload := string(jws.UnsafePayloadWithoutVerification()); !strings.Contains(payload, `"run":9007199254740993,`) {
		t.Fatalf("the number lost digits: %s", payload)
	}
	kid := i.KeyID()
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "issuer.json")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the access file is still there: %v", err)
	}
	again := start(t, dev.IssuerConfig{Dir: dir})
	if again.KeyID() != kid {
		t.Fatal("the key did not outlive the issuer")
	}
	if _, err := claimsOf(t, again.URL(), token); err != nil {
		t.Fatalf("a token of before the restart: %v", err)
	}
}

func TestTokenEndpointRefuses(t *testing.T) {
	dir := t.TempDir()
	i := start(t, dev.IssuerConfig{Dir: dir})
	raw, err := os.ReadFile(filepath.Join(dir, "issuer.json"))
	if err != nil {
		t.Fatal(err)
	}
	var access struct{ URL, Secret string }
	if err := json.Unmarshal(raw, &access); err != nil || access.URL != i.URL() || len(access.Secret) < 26 {
		t.Fatalf("access file %s: %v", raw, err)
	}
	for _, row := range []struct {
		name, secret, host, body, from string
		want                           int
	}{
		{"good", access.Secret, "127.0.0.1:1", `{}`, "127.0.0.1:9", http.StatusOK},
		{"IPv6", access.Secret, "[::1]:1", `{}`, "[::1]:9", http.StatusOK},
		{"host without port", access.Secret, "localhost", `{}`, "127.0.0.1:9", http.StatusOK},
		{"no secret", "", "127.0.0.1:1", `{}`, "127.0.0.1:9", http.StatusUnauthorized},
		{"half the secret", access.Secret[:13], "127.0.0.1:1", `{}`, "127.0.0.1:9", http.StatusUnauthorized},
		{"name rebound to loopback", access.Secret, "evil.example:1", `{}`, "127.0.0.1:9", http.StatusForbidden},
		{"from elsewhere", access.Secret, "127.0.0.1:1", `{}`, "192.0.2.1:9", http.StatusForbidden},
		{"no address", access.Secret, "127.0.0.1:1", `{}`, "", http.StatusForbidden},
		{"no JSON", access.Secret, "127.0.0.1:1", `x`, "127.0.0.1:9", http.StatusBadRequest},
		{"list", access.Secret, "127.0.0.1:1", `[]`, "127.0.0.1:9", http.StatusBadRequest},
		{"two objects", access.Secret, "127.0.0.1:1", `{}{}`, "127.0.0.1:9", http.StatusBadRequest},
		{"too large", access.Secret, "127.0.0.1:1", `{"a":"` + strings.Repeat("x", 64<<10) + `"}`, "127.0.0.1:9", http.StatusBadRequest},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/token", strings.NewReader(row.body))
			r.Host, r.RemoteAddr = row.host, row.from
			r.Header.Set("Authorization", "Bearer "+row.secret)
			w := httptest.NewRecorder()
			i.ServeHTTP(w, r)
			if w.Code != row.want {
				t.Fatalf("%d %s, want %d", w.Code, w.Body, row.want)
			}
			if body, _ := io.ReadAll(w.Body); row.want != http.StatusOK && strings.Contains(string(body), access.Secret) {
				t.Fatal("L01: the answer repeats the secret")
			}
		})
	}
}

func TestIssuerKeyFile(t *testing.T) {
	other := filepath.Join(t.TempDir(), "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	start(t, dev.IssuerConfig{Dir: other, Algorithm: "ES256"})
	ec, err := os.ReadFile(filepath.Join(other, "issuer.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(ec)
	if _, err := x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"no PEM": []byte("x"), "no key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), "key of another algorithm": ec,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "issuer.key"), content, 0o600); err != nil {
				t.Fatal(err)
			}
			if i, err := dev.StartIssuer(t.Context(), dev.IssuerConfig{Dir: dir}); err == nil {
				i.Close()
				t.Fatal("it starts with another key than the directory's")
			}
		})
	}
}
