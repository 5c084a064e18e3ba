// Package dev holds what "hallmarkd dev" runs beside the service so that it can
// be tried on one machine, and what tests use in place of the outside world. It
// is real, but trusts whoever can reach it: it serves loopback only.
package dev

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"
)

// IssuerConfig says how an issuer is set up. The zero value is an RS256 issuer
// on a free loopback port with its key in memory.
type IssuerConfig struct {
	Addr      string           // for StartIssuer: loopback host:port, default 127.0.0.1:0
	URL       string           // for NewIssuer: where the handler will be reached; no trailing slash
	Dir       string           // keeps key and access file (both mode 0600) here; "" keeps the key in memory
	Algorithm string           // RS256 (default) or ES256
	Now       func() time.Time // default time.Now
}

// Issuer is an OpenID Connect issuer: discovery document, key set and signed
// tokens with any claims. Its methods may be called concurrently.
type Issuer struct {
	url     string
	alg     jose.SignatureAlgorithm
	dir     string
	now     func() time.Time
	secret  string
	handler http.Handler
	server  *http.Server // nil when mounted on another's listener
	stop    func() bool

	mu    sync.Mutex
	key   crypto.Signer
	kid   string
	extra []jose.JSONWebKey
}

const (
	issuerKeyFile = "issuer.key"
	accessFile    = "issuer.json"
	lifetime      = 5 * time.Minute // as GitHub's
	maxClaims     = 64 << 10
)

// access is what another process of the same user needs to ask for a token.
type access struct {
	URL    string `json:"url"`
	Secret string `json:"secret"`
}

// StartIssuer serves an issuer on its own loopback listener until Close is
// called or ctx ends.
func StartIssuer(ctx context.Context, c IssuerConfig) (*Issuer, error) {
	addr := cmp.Or(c.Addr, "127.0.0.1:0")
	if host, _, err := net.SplitHostPort(addr); err != nil || !loopback(host) {
		return nil, fmt.Errorf("development issuer address %q is not a loopback host:port: it signs whatever it is asked to", addr)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening for the development issuer: %w", err)
	}
	c.URL = "http://" + l.Addr().String()
	i, err := NewIssuer(c)
	if err != nil {
		l.Close()
		return nil, err
	}
	i.server = &http.Server{Handler: i, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	go i.server.Serve(l) //nolint:errcheck // it ends with ErrServerClosed when Close is called
	i.stop = context.AfterFunc(ctx, func() { i.server.Close() })
	return i, nil
}

// NewIssuer returns an issuer that the caller mounts as an http.Handler at
// c.URL, which must be on loopback.
func NewIssuer(c IssuerConfig) (*Issuer, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme == "" || !loopback(u.Hostname()) {
		return nil, fmt.Errorf("development issuer URL %q is not an absolute loopback URL", c.URL)
	}
	i := &Issuer{
		url: strings.TrimSuffix(c.URL, "/"), dir: c.Dir, now: c.Now, secret: rand.Text(),
		alg: jose.SignatureAlgorithm(cmp.Or(c.Algorithm, string(jose.RS256))),
	}
	if i.now == nil {
		i.now = time.Now
	}
	if err := i.loadKey(); err != nil {
		return nil, err
	}
	if err := i.writeAccess(); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	prefix := strings.TrimSuffix(u.Path, "/")
	mux.HandleFunc("GET "+prefix+"/.well-known/openid-configuration", i.serveDiscovery)
	mux.HandleFunc("GET "+prefix+"/.well-known/jwks", i.serveKeys)
	mux.HandleFunc("POST "+prefix+"/token", i.serveToken)
	i.handler = mux
	return i, nil
}

// URL returns the issuer's URL: the iss of its tokens.
func (i *Issuer) URL() string { return i.url }

// ServeHTTP implements http.Handler.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) { i.handler.ServeHTTP(w, r) }

// Close stops the listener that StartIssuer opened and removes the access file.
func (i *Issuer) Close() error {
	if i.dir != "" {
		if err := os.Remove(filepath.Join(i.dir, accessFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the issuer's access file: %w", err)
		}
	}
	if i.server == nil {
		return nil
	}
	i.stop()
	return i.server.Close()
}

// Mint returns a token with the given claims. iss, iat, nbf (as GitHub does, ten
// minutes back), exp (five minutes ahead) and a random jti are added unless they
// are given; a claim whose value is nil is left out.
func (i *Issuer) Mint(claims map[string]any) (string, error) {
	now := i.now()
	all := map[string]any{
		"iss": i.url, "iat": now.Unix(), "nbf": now.Add(-10 * time.Minute).Unix(), "exp": now.Add(lifetime).Unix(), "jti": rand.Text(),
	}
	maps.Copy(all, claims)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	payload, err := json.Marshal(all)
	if err != nil {
		return "", fmt.Errorf("encoding claims: %w", err)
	}
	return i.MintRaw(nil, payload)
}

// MintRaw signs any payload under any header with the current key, for tests of
// those who must refuse it. A nil header is the usual one; given members are
// laid over it, and a nil member is left out. The signature is always of the
// issuer's own algorithm, whatever the header says.
func (i *Issuer) MintRaw(header map[string]any, payload []byte) (string, error) {
	i.mu.Lock()
	key, kid := i.key, i.kid
	i.mu.Unlock()
	h := map[string]any{"alg": i.alg, "kid": kid, "typ": "JWT"}
	maps.Copy(h, header)
	maps.DeleteFunc(h, func(_ string, v any) bool { return v == nil })
	raw, err := json.Marshal(h)
	if err != nil {
		return "", fmt.Errorf("encoding header: %w", err)
	}
	return signCompact(key, raw, payload)
}

// MintBytes is MintRaw with the header as bytes, for headers that no encoder
// writes.
func (i *Issuer) MintBytes(header, payload []byte) (string, error) {
	i.mu.Lock()
	key := i.key
	i.mu.Unlock()
	return signCompact(key, header, payload)
}

// KeyID returns the kid of the current key.
func (i *Issuer) KeyID() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.kid
}

// RotateKey replaces the key at once: the old one leaves the key set.
func (i *Issuer) RotateKey() error {
	key, err := generate(i.alg)
	if err != nil {
		return err
	}
	if err := i.saveKey(key); err != nil {
		return err
	}
	return i.use(key)
}

// PublishAlso adds keys to the key set, instead of those added before.
func (i *Issuer) PublishAlso(keys ...jose.JSONWebKey) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.extra = keys
}

// Keys returns the published key set.
func (i *Issuer) Keys() jose.JSONWebKeySet {
	i.mu.Lock()
	defer i.mu.Unlock()
	own := jose.JSONWebKey{Key: i.key.Public(), KeyID: i.kid, Algorithm: string(i.alg), Use: "sig"}
	return jose.JSONWebKeySet{Keys: append([]jose.JSONWebKey{own}, i.extra...)}
}

func (i *Issuer) serveDiscovery(w http.ResponseWriter, _ *http.Request) {
	answer(w, map[string]any{
		"issuer": i.url, "jwks_uri": i.url + "/.well-known/jwks",
		"subject_types_supported": []string{"public"}, "response_types_supported": []string{"id_token"},
		"id_token_signing_alg_values_supported": []string{string(i.alg)},
	})
}

func (i *Issuer) serveKeys(w http.ResponseWriter, _ *http.Request) { answer(w, i.Keys()) }

// serveToken mints for whoever can read the access file. The host is checked as
// well: a web page that points its own name at loopback must not get in.
func (i *Issuer) serveToken(w http.ResponseWriter, r *http.Request) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	host := r.Host
	if h, _, splitErr := net.SplitHostPort(r.Host); splitErr == nil {
		host = h
	}
	if err != nil || !from.Addr().Unmap().IsLoopback() || !loopback(host) {
		http.Error(w, "only loopback callers get tokens", http.StatusForbidden)
		return
	}
	want := []byte("Bearer " + i.secret)
	if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), want) != 1 {
		http.Error(w, "the secret is in "+accessFile+" in the data directory", http.StatusUnauthorized)
		return
	}
	claims, err := decodeClaims(http.MaxBytesReader(w, r.Body, maxClaims))
	if err != nil {
		http.Error(w, "the body must be one JSON object of claims", http.StatusBadRequest)
		return
	}
	token, err := i.Mint(claims)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer(w, map[string]string{"token": token})
}

func decodeClaims(r io.Reader) (map[string]any, error) {
	d := json.NewDecoder(r)
	d.UseNumber() // ids beyond 2^53 must survive
	var claims map[string]any
	if err := d.Decode(&claims); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("more than one JSON value")
	}
	return claims, nil
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(v) //nolint:errcheck // the caller has gone
}

// RequestToken asks the issuer that runs with this directory for a token. It is
// what "hallmarkd dev token" does.
func RequestToken(ctx context.Context, dir string, claims map[string]any) (string, error) {
	raw, err := os.ReadFile(filepath.Join(dir, accessFile))
	if err != nil {
		return "", fmt.Errorf("no development issuer runs with %s (start it with: hallmarkd dev --data %s): %w", dir, dir, err)
	}
	var a access
	if err := json.Unmarshal(raw, &a); err != nil {
		return "", fmt.Errorf("reading %s: %w", accessFile, err)
	}
	body, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("encoding claims: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.URL+"/token", bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("asking the development issuer: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+a.Secret)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("asking the development issuer: %w", err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(io.LimitReader(resp.Body, maxClaims*2))
	if err != nil {
		return "", fmt.Errorf("asking the development issuer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the development issuer answers %s: %s", resp.Status, strings.TrimSpace(string(out)))
	}
	var got struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(out, &got); err != nil {
		return "", fmt.Errorf("reading the development issuer's answer: %w", err)
	}
	return got.Token, nil
}

// GitHubClaims returns the full claim set of a GitHub Actions job that a push
// started: workflow .github/workflows/release.yml of repository ("acme/api") at
// sha, on a hosted runner. The caller adds aud and changes what it likes.
func GitHubClaims(repository, sha, ref string) map[string]any {
	owner, _, _ := strings.Cut(repository, "/")
	workflow := repository + "/.github/workflows/release.yml@" + ref
	refType := "branch"
	if strings.HasPrefix(ref, "refs/tags/") {
		refType = "tag"
	}
	ownerID, repositoryID := GitHubID(owner), GitHubID(repository)
	return map[string]any{
		// The immutable form, in use since July 2026 (ci-identity 1.1).
		"sub":        fmt.Sprintf("repo:%s@%s/%s@%s:ref:%s", owner, ownerID, strings.TrimPrefix(repository, owner+"/"), repositoryID, ref),
		"repository": repository, "repository_id": repositoryID, "repository_visibility": "private",
		"repository_owner": owner, "repository_owner_id": ownerID,
		"sha": sha, "ref": ref, "ref_type": refType, "ref_protected": "true", "base_ref": "", "head_ref": "",
		"event_name": "push", "workflow": "release", "workflow_ref": workflow, "workflow_sha": sha,
		"job_workflow_ref": workflow, "job_workflow_sha": sha,
		"run_id": "9912", "run_number": "17", "run_attempt": "1", "check_run_id": "30112",
		"runner_environment": "github-hosted", "actor": "dev-one", "actor_id": "583231",
	}
}

// GitHubID returns the numeric id that GitHubClaims gives a repository or owner:
// always the same for the same name.
func GitHubID(name string) string {
	h := fnv.New32a()
	h.Write([]byte(name))
	return strconv.FormatUint(uint64(h.Sum32()), 10)
}

func (i *Issuer) loadKey() error {
	raw, err := os.ReadFile(filepath.Join(i.dir, issuerKeyFile))
	if i.dir == "" || errors.Is(err, fs.ErrNotExist) {
		return i.RotateKey()
	}
	if err != nil {
		return fmt.Errorf("reading the issuer's key: %w", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return fmt.Errorf("%s holds no PEM block", issuerKeyFile)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return fmt.Errorf("parsing the issuer's key: %w", err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok || !fits(key, i.alg) {
		return fmt.Errorf("%s holds a %T, which cannot sign %s", issuerKeyFile, parsed, i.alg)
	}
	return i.use(key)
}

func fits(key crypto.Signer, alg jose.SignatureAlgorithm) bool {
	if _, isRSA := key.(*rsa.PrivateKey); isRSA {
		return alg == jose.RS256
	}
	k, isEC := key.(*ecdsa.PrivateKey)
	return isEC && k.Curve == elliptic.P256() && alg == jose.ES256
}

func (i *Issuer) saveKey(key crypto.Signer) error {
	if i.dir == "" {
		return nil
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding the issuer's key: %w", err)
	}
	return writeSecret(filepath.Join(i.dir, issuerKeyFile), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func (i *Issuer) writeAccess() error {
	if i.dir == "" {
		return nil
	}
	raw, err := json.Marshal(access{i.url, i.secret})
	if err != nil {
		return fmt.Errorf("encoding the issuer's access file: %w", err)
	}
	return writeSecret(filepath.Join(i.dir, accessFile), raw)
}

// writeSecret replaces a file by one that only its owner reads, also when the
// old one was open to others.
func writeSecret(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("writing %s: %w", filepath.Base(path), err)
	}
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(path), err)
	}
	return os.Rename(tmp, path)
}

func (i *Issuer) use(key crypto.Signer) error {
	thumb, err := (&jose.JSONWebKey{Key: key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		return fmt.Errorf("naming the issuer's key: %w", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key, i.kid = key, base64.RawURLEncoding.EncodeToString(thumb)
	return nil
}

func generate(alg jose.SignatureAlgorithm) (crypto.Signer, error) {
	switch alg {
	case jose.RS256:
		return rsa.GenerateKey(rand.Reader, 2048)
	case jose.ES256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return nil, fmt.Errorf("development issuer: algorithm %q is neither RS256 nor ES256", alg)
}

// signCompact writes a compact JWS by hand (RFC 7515, section 7.1): go-jose
// would refuse the headers that attacks need.
func signCompact(key crypto.Signer, header, payload []byte) (string, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	input := b64(header) + "." + b64(payload)
	hash := sha256.Sum256([]byte(input))
	var sig []byte
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, k, hash[:])
		if err != nil {
			return "", fmt.Errorf("signing token: %w", err)
		}
		sig = append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	default:
		var err error
		if sig, err = key.Sign(rand.Reader, hash[:], crypto.SHA256); err != nil {
			return "", fmt.Errorf("signing token: %w", err)
		}
	}
	return input + "." + b64(sig), nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && a.IsLoopback()
}
