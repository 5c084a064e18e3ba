package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/titanous/rocacheck"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	defaultFetchTimeout = 10 * time.Second

	maxDocument = 1 << 20
	maxKeys     = 100
	minRSABits  = 2048

	// Keys are read again when they are this old, or as Cache-Control says within
	// the two bounds: a key that the issuer removed is believed no longer than that
	// while the issuer can be reached (attacks A07).
	defaultFresh = 5 * time.Minute
	minFresh     = time.Minute
	maxFresh     = 15 * time.Minute
	// maxStale is for how long the last good keys are used while it cannot.
	maxStale = time.Hour
	// seekEvery is how often a kid that we do not know makes us read again
	// (attacks A05); retryEvery, how often an issuer that failed is asked again.
	seekEvery  = time.Minute
	retryEvery = 5 * time.Second
)

var errRedirect = errors.New("a redirect, which is refused: configure the final URL as jwks_uri")

// keySource is where an issuer's public keys are: a keySet on the network or a keyFile.
type keySource interface {
	// find returns the public key that kid names, fit for alg. TOKEN_KEY_UNKNOWN when
	// the issuer has none, TOKEN_ALGORITHM when it is of another type or curve,
	// ISSUER_KEYS_UNAVAILABLE when the keys cannot be had just now.
	find(ctx context.Context, kid string, alg jose.SignatureAlgorithm) (crypto.PublicKey, error)
}

// keySet holds the keys of one issuer. They are read when somebody needs them:
// nothing runs while nobody calls.
type keySet struct {
	name    string // of the issuer, for messages
	issuer  string
	use     []string // what use a key may have; "" is none given
	jwksURI string   // "": ask the discovery document
	client  *http.Client
	timeout time.Duration // of one reading: discovery and keys
	now     func() time.Time
	log     *slog.Logger

	mu      sync.Mutex
	keys    []key         // last good answer, whole: keys never accumulate
	fetched time.Time     // when it was read
	fresh   time.Time     // until when it need not be read again
	tried   time.Time     // last attempt
	failed  error         // why that failed; nil when it did not
	sought  time.Time     // last attempt on behalf of an unknown kid
	reading chan struct{} // closed when the attempt under way ends; nil when there is none
}

// key is one member of a JWK set, also an unusable one: then the error says why.
type key struct {
	kid     string
	alg     string
	use     string
	public  crypto.PublicKey
	problem string
}

// find implements keySource.
func (s *keySet) find(ctx context.Context, kid string, alg jose.SignatureAlgorithm) (crypto.PublicKey, error) {
	keys, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	k, known := choose(keys, kid)
	if !known && kid != "" {
		if keys, err = s.seek(ctx); err != nil {
			return nil, err
		}
		k, known = choose(keys, kid)
	}
	if !known {
		return nil, unknownKey(s.name, kid, len(keys))
	}
	return k.fit(alg)
}

// choose returns the only key of that kid. Without a kid there must be no choice.
func choose(keys []key, kid string) (key, bool) {
	if kid == "" {
		if len(keys) != 1 {
			return key{}, false
		}
		return keys[0], true
	}
	var found []key
	for _, k := range keys {
		if k.kid == kid {
			found = append(found, k)
		}
	}
	if len(found) == 0 {
		return key{}, false
	}
	if len(found) > 1 {
		return key{kid: kid, problem: "shares its kid with another key"}, true
	}
	return found[0], true
}

func unknownKey(issuer, kid string, n int) error {
	if kid == "" {
		return attest.Errorf(attest.TokenKeyUnknown, "the token names no key (kid), and issuer %q has %d", issuer, n)
	}
	return attest.Errorf(attest.TokenKeyUnknown, "issuer %q has no key with the token's kid: get a new token; after a key change this service looks again within %v", issuer, seekEvery)
}

// fit returns the key when it may verify alg (attacks A02, A26, A27, A28).
func (k key) fit(alg jose.SignatureAlgorithm) (crypto.PublicKey, error) {
	if k.problem != "" {
		return nil, attest.Errorf(attest.TokenKeyUnknown, "the issuer's key that the token names %s", k.problem)
	}
	if k.alg != "" && k.alg != string(alg) {
		return nil, attest.Errorf(attest.TokenAlgorithm, "the issuer's key is for %s only, the token says %s", clip(k.alg), alg)
	}
	if !fits(k.public, alg) {
		return nil, attest.Errorf(attest.TokenAlgorithm, "the issuer's key is not of the type and curve that %s needs", alg)
	}
	return k.public, nil
}

// fits ties every algorithm to one key type and curve (RFC 7518, section 3.1).
func fits(public crypto.PublicKey, alg jose.SignatureAlgorithm) bool {
	switch k := public.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(string(alg), "RS") || strings.HasPrefix(string(alg), "PS")
	case *ecdsa.PublicKey:
		return map[jose.SignatureAlgorithm]elliptic.Curve{
			jose.ES256: elliptic.P256(), jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521(),
		}[alg] == k.Curve
	case ed25519.PublicKey:
		return alg == jose.EdDSA
	}
	return false
}

// current returns fresh keys, or the last good ones while they may be used.
func (s *keySet) current(ctx context.Context) ([]key, error) {
	if err := s.read(ctx, func(now time.Time) bool {
		return !now.Before(s.fresh) && (s.failed == nil || now.Sub(s.tried) >= retryEvery)
	}); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.keys == nil || (s.failed != nil && now.Sub(s.fetched) > maxStale) {
		return nil, s.failed
	}
	return s.keys, nil
}

// seek reads again for a kid that is not among the keys, at most once a minute.
// When the last attempt failed, the key may well exist: that is not the caller's
// fault.
func (s *keySet) seek(ctx context.Context) ([]key, error) {
	if err := s.read(ctx, func(now time.Time) bool {
		if !s.sought.IsZero() && now.Sub(s.sought) < seekEvery {
			return false
		}
		s.sought = now
		return true
	}); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys, s.failed
}

// read reads the keys if want says so, or waits for a reading that is under way:
// so that there is at most one, and want's answer and the start of it are one step
// (x/sync/singleflight would leave a gap between them). It fails only when ctx
// ends; how the reading went is in s. want is called with s.mu held.
func (s *keySet) read(ctx context.Context, want func(now time.Time) bool) error {
	s.mu.Lock()
	if s.reading == nil {
		now := s.now()
		if !want(now) {
			s.mu.Unlock()
			return nil
		}
		s.tried, s.reading = now, make(chan struct{})
		// Others wait for the same answer: it must not end with this caller. It
		// ends with s.timeout.
		go s.refresh(context.WithoutCancel(ctx))
	}
	done := s.reading
	s.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return keysUnavailable(s.name, ctx.Err())
	}
}

func (s *keySet) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	keys, fresh, err := s.fetch(ctx)
	if err != nil {
		s.log.WarnContext(ctx, "reading issuer keys failed", "issuer", s.name, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.reading)
	s.reading = nil
	if s.failed = s.judge(err); err != nil {
		return
	}
	now := s.now()
	s.keys, s.fetched, s.fresh = keys, now, now.Add(fresh)
}

// errUntrusted marks answers that are not a failure of the network but point to
// keys of somebody else.
var errUntrusted = errors.New("not trusted")

// judge turns the cause into what callers may know: the cause itself, which
// names hosts and addresses, is for the service's log.
func (s *keySet) judge(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errRedirect), errors.Is(err, errUntrusted):
		return &attest.Error{
			Reason:  attest.TokenKeyUnknown,
			Message: fmt.Sprintf("issuer %q leads to keys that are not its own, so no token of it is accepted: the operator finds the cause in the service's log", s.name),
			Err:     err,
		}
	}
	return keysUnavailable(s.name, err)
}

func keysUnavailable(issuer string, err error) error {
	return &attest.Error{
		Reason:  attest.KeysUnavailable,
		Message: fmt.Sprintf("the keys of issuer %q cannot be read just now: try again; if it lasts, the operator finds the cause in the service's log", issuer),
		Err:     err,
	}
}

// fetch reads the JWK set and says for how long it is fresh.
func (s *keySet) fetch(ctx context.Context) ([]key, time.Duration, error) {
	uri := s.jwksURI
	if uri == "" {
		var err error
		if uri, err = s.discover(ctx); err != nil {
			return nil, 0, fmt.Errorf("reading discovery document: %w", err)
		}
	}
	body, header, err := s.get(ctx, uri)
	if err != nil {
		return nil, 0, fmt.Errorf("reading key set: %w", err)
	}
	keys, err := parseKeys(body, s.use)
	if err != nil {
		return nil, 0, fmt.Errorf("reading key set of %s: %w", uri, err)
	}
	return keys, freshness(header), nil
}

// discover returns the jwks_uri of the issuer's metadata (OpenID Connect
// Discovery 1.0, section 4). It must speak for this issuer and stay on its host:
// otherwise whoever writes that document chooses the keys (attacks A09, A11).
func (s *keySet) discover(ctx context.Context) (string, error) {
	body, _, err := s.get(ctx, strings.TrimSuffix(s.issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return "", err
	}
	doc, err := parseObject(body)
	if err != nil {
		return "", err
	}
	if doc["issuer"] != s.issuer {
		return "", fmt.Errorf("it is of issuer %q, not %q: %w", doc["issuer"], s.issuer, errUntrusted)
	}
	uri, _ := doc["jwks_uri"].(string)
	want, err := url.Parse(s.issuer)
	if err != nil {
		return "", err
	}
	got, err := url.Parse(uri)
	if err != nil || got.Scheme != want.Scheme || got.Host != want.Host || got.User != nil {
		return "", fmt.Errorf("its jwks_uri %q is not on %s (if that is right, configure it as jwks_uri): %w", uri, want.Host, errUntrusted)
	}
	return uri, nil
}

// get reads one document of bounded size (attacks A08).
func (s *keySet) get(ctx context.Context, uri string) ([]byte, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s answers %s", uri, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return nil, nil, err
	}
	if len(body) > maxDocument {
		return nil, nil, fmt.Errorf("%s has more than %d bytes", uri, maxDocument)
	}
	return body, resp.Header, nil
}

func freshness(h http.Header) time.Duration {
	fresh := defaultFresh
	for directive := range strings.SplitSeq(h.Get("Cache-Control"), ",") {
		name, value, _ := strings.Cut(strings.ToLower(strings.TrimSpace(directive)), "=")
		switch name {
		case "no-store", "no-cache":
			return minFresh
		case "max-age":
			if n, err := strconv.Atoi(value); err == nil && n >= 0 {
				fresh = time.Duration(min(n, int(maxFresh/time.Second))) * time.Second
			}
		}
	}
	return min(max(fresh, minFresh), maxFresh)
}

// parseKeys reads a JWK set (RFC 7517). An empty one is an answer: the issuer
// has withdrawn its keys. Keys that have none of the uses stay in the list as
// unusable, except the X.509 authorities of a SPIFFE bundle, which are no keys of
// tokens at all.
func parseKeys(body []byte, use []string) ([]key, error) {
	if _, err := parseObject(body); err != nil {
		return nil, err
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, errors.New("its keys are not a list")
	}
	if set.Keys == nil {
		return nil, errors.New("it has no keys member")
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("it has %d keys, more than %d", len(set.Keys), maxKeys)
	}
	keys := make([]key, 0, len(set.Keys))
	for _, raw := range set.Keys {
		if k := parseKey(raw, use); k.use != useX509SVID {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// weakness says why an RSA key proves nothing: its private key can be computed.
// "" is none.
func weakness(k *rsa.PublicKey) string {
	switch {
	case k.N.BitLen() < minRSABits:
		return fmt.Sprintf("has %d bits, fewer than %d", k.N.BitLen(), minRSABits)
	case rocacheck.IsWeak(k):
		return "was made by a chip that makes weak ones (ROCA, CVE-2017-15361)"
	}
	return ""
}

// parseKey reads one JWK. What cannot be used stays in the list with the reason.
func parseKey(raw []byte, use []string) key {
	var meta struct {
		Kid string    `json:"kid"`
		Alg string    `json:"alg"`
		Use string    `json:"use"`
		Ops *[]string `json:"key_ops"`
	}
	if err := json.Unmarshal(raw, &meta); err != nil {
		return key{problem: "is not a JWK"}
	}
	k := key{kid: meta.Kid, alg: meta.Alg, use: meta.Use}
	var jwk jose.JSONWebKey
	switch err := jwk.UnmarshalJSON(raw); {
	case err != nil || !jwk.Valid():
		k.problem = "cannot be read"
	case !jwk.IsPublic():
		// A shared or leaked secret proves nothing.
		k.problem = "is not a public key"
	case !slices.Contains(use, meta.Use):
		k.problem = "is not for signatures (use)"
	case meta.Ops != nil && !slices.Contains(*meta.Ops, "verify"):
		k.problem = "is not for verifying (key_ops)"
	default:
		k.public = jwk.Key
	}
	// go-jose refuses moduli so large that verifying with them would be an attack.
	if rsaKey, ok := k.public.(*rsa.PublicKey); ok {
		k.problem = weakness(rsaKey)
	}
	return k
}
