package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
)

const (
	trustDomain = "prod.example.org"
	workload    = "spiffe://prod.example.org/ci/image-builder"
)

// authority is one that issues X.509-SVIDs.
type authority struct {
	key   crypto.Signer
	cert  *x509.Certificate
	clock *clock
}

func newAuthority(t *testing.T, c *clock, id string) *authority {
	t.Helper()
	return authorityOf(t, c, id, newKey(t))
}

func authorityOf(t *testing.T, c *clock, id string, key crypto.Signer) *authority {
	t.Helper()
	a := &authority{key: key, clock: c}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: c.Now().Add(-time.Hour), NotAfter: c.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{parseURL(t, id)},
	}
	a.cert = certify(t, template, template, a.key.Public(), a.key)
	return a
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func parseURL(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func certify(t *testing.T, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// svid issues the X.509-SVID of workload, as SPIRE does, with a change of the
// template.
func (a *authority) svid(t *testing.T, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	return a.issue(t, newKey(t).Public(), change)
}

func (a *authority) issue(t *testing.T, public crypto.PublicKey, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: a.clock.Now().Add(-10 * time.Second), NotAfter: a.clock.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{parseURL(t, workload)},
	}
	if change != nil {
		change(template)
	}
	return certify(t, template, a.cert, public, a.key)
}

// sub issues the certificate of an authority below a.
func (a *authority) sub(t *testing.T, change func(*x509.Certificate)) *authority {
	t.Helper()
	below := &authority{key: newKey(t), clock: a.clock}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(3), NotBefore: a.clock.Now().Add(-time.Minute), NotAfter: a.clock.Now().Add(2 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{parseURL(t, "spiffe://"+trustDomain)},
	}
	if change != nil {
		change(template)
	}
	below.cert = certify(t, template, a.cert, below.key.Public(), a.key)
	return below
}

// bundleOf returns a SPIFFE bundle with the keys of an issuer of JWT-SVIDs and with
// authorities of X.509-SVIDs.
func bundleOf(t *testing.T, jwt *dev.Issuer, authorities ...*authority) []byte {
	t.Helper()
	var keys []any
	if jwt != nil {
		for _, k := range jwt.Keys().Keys {
			k.Use = "jwt-svid"
			keys = append(keys, k)
		}
	}
	for _, a := range authorities {
		public := a.cert.PublicKey.(*ecdsa.PublicKey)
		raw, err := public.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, map[string]any{
			"kty": "EC", "crv": "P-256", "use": "x509-svid", "x": b64(raw[1:33]), "y": b64(raw[33:]),
			"x5c": []string{base64.StdEncoding.EncodeToString(a.cert.Raw)},
		})
	}
	return mustJSON(t, map[string]any{"keys": keys, "spiffe_sequence": 1, "spiffe_refresh_hint": 300})
}

// newDomain returns the configuration of a trust domain whose bundle is in a file.
func newDomain(t *testing.T, jwt *dev.Issuer, authorities ...*authority) identity.Issuer {
	t.Helper()
	conf := identity.Issuer{
		Name: "mesh", Provider: "spiffe", Issuer: "spiffe://" + trustDomain, TrustDomain: trustDomain,
		BundleFile: filepath.Join(t.TempDir(), "bundle.json"), X509SVID: len(authorities) > 0,
	}
	writeFile(t, conf.BundleFile, bundleOf(t, jwt, authorities...))
	return conf
}

// svidClaims are those of a JWT-SVID, with changes; nil leaves one out.
func svidClaims(changes map[string]any) map[string]any {
	all := map[string]any{"iss": nil, "nbf": nil, "jti": nil, "aud": []string{service}, "sub": workload}
	maps.Copy(all, changes)
	return all
}

func TestJWTSVID(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	a := newAuth(t, c, newDomain(t, i))
	token := mint(t, i, svidClaims(nil))
	sum := sha256.Sum256([]byte(token[:strings.LastIndexByte(token, '.')]))
	want := attest.Identity{
		IssuerName: "mesh", Provider: "spiffe", Kind: attest.Workload, Issuer: "spiffe://" + trustDomain,
		Subject: workload, SAN: workload, TokenID: hex.EncodeToString(sum[:]), Expires: c.Now().Add(5 * time.Minute),
	}
	if diff := cmp.Diff(want, accepted(t, a, token)); diff != "" {
		t.Fatalf("identity (-want +got):\n%s", diff)
	}
	// iat is optional, and so is typ.
	accepted(t, a, mint(t, i, svidClaims(map[string]any{"iat": nil})))
	payload := mustJSON(t, map[string]any{"aud": service, "sub": workload, "exp": c.Now().Add(time.Minute).Unix()})
	for _, typ := range []any{nil, "JWT", "JOSE"} {
		token, err := i.MintRaw(map[string]any{"typ": typ}, payload)
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, a, token)
	}
}

// The issuer of an OpenID discovery provider: iss is then there, and is its URL.
func TestJWTSVIDWithIss(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	conf := identity.Issuer{Name: "mesh", Provider: "spiffe", Issuer: i.URL(), TrustDomain: trustDomain, PlainHTTP: true}
	a := newAuth(t, c, conf)
	id := accepted(t, a, mint(t, i, svidClaims(map[string]any{"iss": i.URL()})))
	if id.Issuer != i.URL() || id.SAN != workload {
		t.Errorf("issuer %s, SAN %s", id.Issuer, id.SAN)
	}
	refused(t, a, mint(t, i, svidClaims(nil)), attest.TokenClaims)
	refused(t, a, mint(t, i, svidClaims(map[string]any{"iss": "spiffe://" + trustDomain})), attest.IssuerNotAllowed)
}

func TestJWTSVIDRefused(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	conf := newDomain(t, i)
	conf.MaxLifetime = 10 * time.Minute
	other := identity.Issuer{
		Name: "other", Provider: "spiffe", Issuer: "spiffe://other.example.org", TrustDomain: "other.example.org",
		BundleFile: filepath.Join(t.TempDir(), "other.json"),
	}
	writeFile(t, other.BundleFile, bundleOf(t, startIssuer(t, c, "ES256")))
	a := newAuth(t, c, conf, other)
	accepted(t, a, mint(t, i, svidClaims(nil)))
	now := c.Now().Unix()
	for _, row := range []struct {
		name    string
		changes map[string]any
		want    attest.Reason
	}{
		{"A06 other configured trust domain", map[string]any{"sub": "spiffe://other.example.org/ci"}, attest.TokenKeyUnknown},
		{"A10 unknown trust domain", map[string]any{"sub": "spiffe://unknown.example.org/ci"}, attest.TokenClaims},
		{"A10 trust domain as prefix", map[string]any{"sub": "spiffe://prod.example.org.evil.example/ci"}, attest.TokenClaims},
		{"A10 any iss", map[string]any{"iss": i.URL()}, attest.IssuerNotAllowed},
		{"A10 trust domain as iss", map[string]any{"iss": "spiffe://" + trustDomain}, attest.IssuerNotAllowed},
		{"A10 empty iss", map[string]any{"iss": ""}, attest.TokenClaims},
		{"A10 null iss", map[string]any{"iss": json.RawMessage("null")}, attest.TokenClaims},
		{"A23 no sub", map[string]any{"sub": nil}, attest.TokenClaims},
		{"A23 no path", map[string]any{"sub": "spiffe://" + trustDomain}, attest.TokenClaims},
		{"B12 no SPIFFE ID", map[string]any{"sub": "https://prod.example.org/ci"}, attest.TokenClaims},
		{"B12 trust domain in upper case", map[string]any{"sub": "spiffe://PROD.example.org/ci"}, attest.TokenClaims},
		{"B12 percent", map[string]any{"sub": "spiffe://prod.example.org/ci%2Fx"}, attest.TokenClaims},
		{"B12 parent", map[string]any{"sub": "spiffe://prod.example.org/ci/../admin"}, attest.TokenClaims},
		{"B12 empty segment", map[string]any{"sub": "spiffe://prod.example.org//ci"}, attest.TokenClaims},
		{"B12 trailing slash", map[string]any{"sub": workload + "/"}, attest.TokenClaims},
		{"B12 query", map[string]any{"sub": workload + "?x"}, attest.TokenClaims},
		{"B12 port", map[string]any{"sub": "spiffe://prod.example.org:8443/ci"}, attest.TokenClaims},
		{"A14 other", map[string]any{"aud": "https://other.example.com"}, attest.TokenAudience},
		{"A14 ours and another", map[string]any{"aud": []string{service, "https://other.example.com"}}, attest.TokenAudience},
		{"A14 missing", map[string]any{"aud": nil}, attest.TokenAudience},
		{"A15 no exp", map[string]any{"exp": nil}, attest.TokenClaims},
		{"A15 expired", map[string]any{"exp": now}, attest.TokenExpired},
		{"A15 too long", map[string]any{"exp": now + 601}, attest.TokenLifetime},
		{"A15 too long, without iat", map[string]any{"iat": nil, "exp": now + 601}, attest.TokenLifetime},
		{"A15 issued in the future", map[string]any{"iat": now + 31}, attest.TokenNotYetValid},
		{"A15 iat a text", map[string]any{"iat": "now"}, attest.TokenClaims},
		{"A15 not yet", map[string]any{"nbf": now + 31}, attest.TokenNotYetValid},
	} {
		t.Run(row.name, func(t *testing.T) { refused(t, a, mint(t, i, svidClaims(row.changes)), row.want) })
	}
	t.Run("typ of an access token", func(t *testing.T) {
		token, err := i.MintRaw(map[string]any{"typ": "at+jwt"}, mustJSON(t, map[string]any{"aud": service, "sub": workload, "iat": now, "exp": now + 60}))
		if err != nil {
			t.Fatal(err)
		}
		refused(t, a, token, attest.TokenHeader)
	})
	t.Run("A15 max_age needs an iat", func(t *testing.T) {
		conf := conf
		conf.MaxAge = time.Minute
		refused(t, newAuth(t, c, conf), mint(t, i, svidClaims(map[string]any{"iat": nil})), attest.TokenClaims)
	})
	t.Run("A06 iss of another domain's issuer", func(t *testing.T) {
		with := identity.Issuer{Name: "with", Provider: "spiffe", Issuer: i.URL(), TrustDomain: "third.example.org", PlainHTTP: true}
		refused(t, newAuth(t, c, conf, with), mint(t, i, svidClaims(map[string]any{"iss": i.URL()})), attest.IssuerNotAllowed)
	})
}

// A26: a bundle says what each key is for.
func TestA26BundleUse(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	own := i.Keys().Keys[0]
	x509Key := newAuthority(t, c, "spiffe://"+trustDomain)
	for _, row := range []struct {
		name, use string
		want      attest.Reason
	}{
		{"jwt-svid", "jwt-svid", ""},
		{"A26 sig", "sig", attest.TokenKeyUnknown},
		{"A26 none", "", attest.TokenKeyUnknown},
		{"A26 wit-svid", "wit-svid", attest.TokenKeyUnknown},
		{"A26 other", "enc", attest.TokenKeyUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			conf := newDomain(t, startIssuer(t, c, "ES256"), x509Key)
			own.Use = row.use
			writeFile(t, conf.BundleFile, mustJSON(t, map[string]any{"keys": []any{own, json.RawMessage(
				strings.TrimSuffix(strings.TrimPrefix(string(mustJSON(t, json.RawMessage(bundleOf(t, nil, x509Key)))), `{"keys":[`), `],"spiffe_refresh_hint":300,"spiffe_sequence":1}`))}}))
			a := newAuth(t, c, conf)
			token := mint(t, i, svidClaims(nil))
			if row.want == "" {
				accepted(t, a, token)
				return
			}
			refused(t, a, token, row.want)
		})
	}
}

// What a bundle publishes for something else is as if it were not there, even under
// the kid of a key for tokens.
func TestA26BundleIgnoresOthers(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	own, other := i.Keys().Keys[0], startIssuer(t, c, "ES256").Keys().Keys[0]
	own.Use, other.Use, other.KeyID = "jwt-svid", "wit-svid", own.KeyID
	conf := newDomain(t, i)
	writeFile(t, conf.BundleFile, mustJSON(t, map[string]any{"keys": []any{other, own}}))
	a := newAuth(t, c, conf)
	accepted(t, a, mint(t, i, svidClaims(nil)))
	token, err := i.MintRaw(map[string]any{"kid": nil}, mustJSON(t, map[string]any{"aud": service, "sub": workload, "exp": c.Now().Add(time.Minute).Unix()}))
	if err != nil {
		t.Fatal(err)
	}
	accepted(t, a, token)
}

// A26: the network's set of a trust domain may be a bundle or an ordinary JWK set.
func TestA26BundleEndpoint(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	for use, want := range map[string]attest.Reason{"": "", "sig": "", "jwt-svid": "", "x509-svid": attest.TokenKeyUnknown, "enc": attest.TokenKeyUnknown} {
		t.Run("A26 use "+use, func(t *testing.T) {
			key := i.Keys().Keys[0]
			key.Use = use
			conf := identity.Issuer{
				Name: "mesh", Provider: "spiffe", Issuer: i.URL(), TrustDomain: trustDomain,
				JWKSURI: serve(t, string(mustJSON(t, map[string]any{"keys": []any{key}}))) + "/bundle", PlainHTTP: true,
			}
			a, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now})
			if err != nil {
				t.Fatal(err)
			}
			if token := mint(t, i, svidClaims(map[string]any{"iss": i.URL()})); want == "" {
				accepted(t, a, token)
			} else {
				refused(t, a, token, want)
			}
		})
	}
}

func TestSPIFFEConfig(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	ca := newAuthority(t, c, "spiffe://"+trustDomain)
	good := newDomain(t, i, ca)
	jwtOnly := newDomain(t, i)
	change := func(i identity.Issuer, f func(*identity.Issuer)) []identity.Issuer {
		f(&i)
		return []identity.Issuer{i}
	}
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "bundle")
		writeFile(t, path, []byte(text))
		return path
	}
	private := mustJSON(t, map[string]any{"keys": []any{map[string]any{"kty": "oct", "use": "jwt-svid", "kid": "a", "k": "c2VjcmV0"}}})
	for _, row := range []struct {
		name    string
		issuers []identity.Issuer
		want    string // what the error must name; "" is accepted
	}{
		{"both kinds", []identity.Issuer{good}, ""},
		{"tokens only", []identity.Issuer{jwtOnly}, ""},
		{"certificates only", []identity.Issuer{newDomain(t, nil, ca)}, ""},
		{"keys on the network", change(good, func(i *identity.Issuer) {
			i.BundleFile, i.JWKSURI, i.X509SVID = "", "https://spire.example.org/bundle", false
		}), ""},
		{"with iss", change(good, func(i *identity.Issuer) { i.Issuer = "https://oidc.example.org" }), ""},
		{"two domains", []identity.Issuer{good, func() identity.Issuer {
			i := jwtOnly
			i.Name, i.Issuer, i.TrustDomain = "b", "spiffe://b.example.org", "b.example.org"
			return i
		}()}, ""},

		{"no trust domain", change(good, func(i *identity.Issuer) { i.TrustDomain = "" }), "trust_domain:"},
		{"trust domain as ID", change(good, func(i *identity.Issuer) { i.TrustDomain = "spiffe://" + trustDomain }), "trust_domain:"},
		{"trust domain in upper case", change(good, func(i *identity.Issuer) { i.TrustDomain, i.Issuer = "PROD.example.org", "spiffe://PROD.example.org" }), "trust_domain:"},
		{"A10 pattern", change(good, func(i *identity.Issuer) { i.TrustDomain, i.Issuer = "*", "spiffe://*" }), "trust_domain:"},
		{"A10 another domain as issuer", change(good, func(i *identity.Issuer) { i.Issuer = "spiffe://other.example.org" }), "issuer:"},
		{"A10 a workload as issuer", change(good, func(i *identity.Issuer) { i.Issuer = workload }), "issuer:"},
		{"A06 one domain twice", []identity.Issuer{good, func() identity.Issuer { i := jwtOnly; i.Name, i.Issuer = "b", "https://oidc.example.org"; return i }()}, "trust_domain:"},
		{"no keys", change(good, func(i *identity.Issuer) { i.BundleFile, i.X509SVID = "", false }), "bundle_file:"},
		{"no authorities", change(good, func(i *identity.Issuer) { i.BundleFile, i.JWKSURI = "", "https://spire.example.org/bundle" }), "x509_svid:"},
		{"bundle without authorities", change(jwtOnly, func(i *identity.Issuer) { i.X509SVID = true }), "x509_svid:"},
		{"bundle without keys", change(newDomain(t, nil, ca), func(i *identity.Issuer) { i.X509SVID = false }), "bundle_file:"},
		{"empty bundle", change(jwtOnly, func(i *identity.Issuer) { i.BundleFile = file(`{"keys":[]}`) }), "bundle_file:"},
		{"no bundle", change(jwtOnly, func(i *identity.Issuer) { i.BundleFile = file(`{}`) }), "bundle_file:"},
		{"A22 two bundles", change(jwtOnly, func(i *identity.Issuer) { i.BundleFile = file(`{"keys":[],"Keys":[]}`) }), "bundle_file:"},
		{"missing file", change(jwtOnly, func(i *identity.Issuer) { i.BundleFile += ".none" }), "bundle_file:"},
		{"keys in two places", change(jwtOnly, func(i *identity.Issuer) { i.JWKSURI = "https://spire.example.org/bundle" }), "jwks_uri:"},
		{"keys in a plain file", change(jwtOnly, func(i *identity.Issuer) { i.BundleFile, i.JWKSFile = "", jwtOnly.BundleFile }), "jwks_file:"},
		{"EdDSA", change(good, func(i *identity.Issuer) { i.Algorithms = []string{"EdDSA"} }), "algorithms:"},
		{"persons", change(good, func(i *identity.Issuer) { i.Kind = attest.Person }), "kind:"},
		{"B10 owners", change(good, func(i *identity.Issuer) { i.Owners = []string{"ci"} }), "owners:"},
		{"B10 name of a cluster", change(good, func(i *identity.Issuer) { i.KnownAs = "https://x.example.org" }), "known_as:"},
		{"B10 certificates of another provider", []identity.Issuer{{Name: "ci", Provider: "generic", Issuer: "https://ci.example.com", X509SVID: true}}, "x509_svid:"},
		{"A10 trust domain of another provider", []identity.Issuer{{Name: "ci", Provider: "generic", Issuer: "spiffe://" + trustDomain}}, "issuer:"},
		{"A02 secret in the bundle", change(jwtOnly, func(i *identity.Issuer) { i.BundleFile = file(string(private)) }), ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := identity.New(identity.Config{Audience: service, Issuers: row.issuers, Now: c.Now})
			if row.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if attest.ReasonOf(err) != attest.BadConfig || !strings.Contains(err.Error(), row.want) {
				t.Fatalf("New: %v: want %s naming %q", err, attest.BadConfig, row.want)
			}
		})
	}
}

// refusedChain is refused for AuthenticateCertificate.
func refusedChain(t *testing.T, a *identity.Authenticator, chain []*x509.Certificate, want attest.Reason) {
	t.Helper()
	id, err := a.AuthenticateCertificate(t.Context(), chain)
	if got := attest.ReasonOf(err); got != want {
		t.Fatalf("AuthenticateCertificate: %v: reason %q, want %q", err, got, want)
	}
	if diff := cmp.Diff(attest.Identity{}, id); diff != "" {
		t.Fatalf("A17: an identity came with the error:\n%s", diff)
	}
}

func acceptedChain(t *testing.T, a *identity.Authenticator, chain ...*x509.Certificate) attest.Identity {
	t.Helper()
	id, err := a.AuthenticateCertificate(t.Context(), chain)
	if err != nil {
		t.Fatalf("AuthenticateCertificate: %v", err)
	}
	return id
}

func TestX509SVID(t *testing.T) {
	c := newClock()
	ca := newAuthority(t, c, "spiffe://"+trustDomain)
	a := newAuth(t, c, newDomain(t, nil, ca))
	if !a.TakesCertificates() || newAuth(t, c, newDomain(t, startIssuer(t, c, "ES256"))).TakesCertificates() {
		t.Error("TakesCertificates does not follow x509_svid")
	}
	leaf := ca.svid(t, nil)
	sum := sha256.Sum256(leaf.RawTBSCertificate)
	want := attest.Identity{
		IssuerName: "mesh", Provider: "spiffe", Kind: attest.Workload, Issuer: "spiffe://" + trustDomain,
		Subject: workload, SAN: workload, TokenID: hex.EncodeToString(sum[:]), Expires: c.Now().Add(time.Hour),
	}
	if diff := cmp.Diff(want, acceptedChain(t, a, leaf)); diff != "" {
		t.Fatalf("identity (-want +got):\n%s", diff)
	}
	// SPIRE's usual shape: an authority below the trust domain's, sent along; and
	// SVIDs without extended key usage, with DNS names, with other keys.
	below := ca.sub(t, nil)
	acceptedChain(t, a, below.svid(t, nil), below.cert)
	acceptedChain(t, a, ca.svid(t, func(x *x509.Certificate) { x.ExtKeyUsage = nil; x.DNSNames = []string{"builder.example.org"} }))
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	acceptedChain(t, a, ca.issue(t, edKey.Public(), nil))
}

func TestA24CertificateRefused(t *testing.T) {
	c := newClock()
	ca, stranger := newAuthority(t, c, "spiffe://"+trustDomain), newAuthority(t, c, "spiffe://"+trustDomain)
	noX509 := identity.Issuer{
		Name: "tokens", Provider: "spiffe", Issuer: "spiffe://tokens.example.org", TrustDomain: "tokens.example.org",
		BundleFile: filepath.Join(t.TempDir(), "tokens.json"),
	}
	writeFile(t, noX509.BundleFile, bundleOf(t, startIssuer(t, c, "ES256"), ca))
	otherCA := newAuthority(t, c, "spiffe://other.example.org")
	other := newDomain(t, nil, otherCA)
	other.Name, other.Issuer, other.TrustDomain = "other", "spiffe://other.example.org", "other.example.org"
	a := newAuth(t, c, newDomain(t, nil, ca), other, noX509)
	acceptedChain(t, a, ca.svid(t, nil))

	named := func(ids ...string) func(*x509.Certificate) {
		return func(x *x509.Certificate) {
			x.URIs = nil
			for _, id := range ids {
				x.URIs = append(x.URIs, parseURL(t, id))
			}
		}
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uses := func(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(x *x509.Certificate) { x.ExtKeyUsage = u }
	}
	below := ca.sub(t, nil)
	forServers := ca.sub(t, uses(x509.ExtKeyUsageServerAuth))
	narrow := ca.sub(t, func(x *x509.Certificate) {
		x.PermittedURIDomains = []string{"elsewhere.example.org"}
		x.PermittedDNSDomainsCritical = true
	})
	ended := ca.sub(t, func(x *x509.Certificate) { x.NotAfter = c.Now().Add(-time.Second) })
	fromLeaf := &authority{key: newKey(t), clock: c}
	fromLeaf.cert = ca.issue(t, fromLeaf.key.Public(), nil)
	// Each is in order, and there are too many.
	second := below.sub(t, nil)
	third := second.sub(t, nil)
	fourth := third.sub(t, nil)
	long := []*x509.Certificate{fourth.svid(t, nil), fourth.cert, third.cert, second.cert, below.cert}
	acceptedChain(t, a, third.svid(t, nil), third.cert, second.cert, below.cert)
	critical := pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}
	for _, row := range []struct {
		name  string
		chain []*x509.Certificate
		want  attest.Reason
	}{
		{"A24 none", nil, attest.ClientCert},
		{"A24 long chain", long, attest.ClientCert},
		{"A24 signed by a stranger of the same name", []*x509.Certificate{stranger.svid(t, nil)}, attest.ClientCert},
		{"A24 stranger brings its authority", []*x509.Certificate{stranger.svid(t, nil), stranger.cert}, attest.ClientCert},
		{"A24 intermediate is missing", []*x509.Certificate{below.svid(t, nil)}, attest.ClientCert},
		{"A24 signed by a leaf", []*x509.Certificate{fromLeaf.svid(t, nil), fromLeaf.cert}, attest.ClientCert},
		{"A24 good one in second place", []*x509.Certificate{stranger.svid(t, nil), ca.svid(t, nil)}, attest.ClientCert},

		{"A06 authority of another domain", []*x509.Certificate{otherCA.svid(t, nil)}, attest.ClientCert},
		{"A06 name in another domain", []*x509.Certificate{ca.svid(t, named("spiffe://other.example.org/ci"))}, attest.ClientCert},
		{"A10 unknown domain", []*x509.Certificate{ca.svid(t, named("spiffe://unknown.example.org/ci"))}, attest.IssuerNotAllowed},
		{"A10 domain as prefix", []*x509.Certificate{ca.svid(t, named("spiffe://prod.example.org.evil.example/ci"))}, attest.IssuerNotAllowed},
		{"A10 domain that has tokens only", []*x509.Certificate{ca.svid(t, named("spiffe://tokens.example.org/ci"))}, attest.IssuerNotAllowed},

		{"A24 no name", []*x509.Certificate{ca.svid(t, named())}, attest.ClientCert},
		{"A24 two names", []*x509.Certificate{ca.svid(t, named(workload, "spiffe://prod.example.org/admin"))}, attest.ClientCert},
		{"A24 one name twice", []*x509.Certificate{ca.svid(t, named(workload, workload))}, attest.ClientCert},
		{"A24 https name", []*x509.Certificate{ca.svid(t, named("https://prod.example.org/ci"))}, attest.ClientCert},
		{"A24 name in common name only", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) {
			x.URIs, x.Subject = nil, pkix.Name{CommonName: workload}
		})}, attest.ClientCert},
		{"A24 whole domain", []*x509.Certificate{ca.svid(t, named("spiffe://"+trustDomain))}, attest.ClientCert},
		{"B12 domain in upper case", []*x509.Certificate{ca.svid(t, named("spiffe://PROD.example.org/ci"))}, attest.ClientCert},
		{"B12 percent", []*x509.Certificate{ca.svid(t, named("spiffe://prod.example.org/ci%2Fx"))}, attest.ClientCert},
		{"B12 parent", []*x509.Certificate{ca.svid(t, named("spiffe://prod.example.org/ci/../x"))}, attest.ClientCert},
		{"B12 port", []*x509.Certificate{ca.svid(t, named("spiffe://prod.example.org:443/ci"))}, attest.ClientCert},

		{"A24 authority as leaf", []*x509.Certificate{ca.cert}, attest.ClientCert},
		{"A24 authority with a path as leaf", []*x509.Certificate{ca.sub(t, named(workload)).cert}, attest.ClientCert},
		{"A24 may sign certificates", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageCertSign })}, attest.ClientCert},
		{"A24 may sign revocation lists", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageCRLSign })}, attest.ClientCert},
		{"A24 not for signatures", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageKeyEncipherment })}, attest.ClientCert},
		{"A24 no key usage", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.KeyUsage = 0 })}, attest.ClientCert},
		{"A24 for servers", []*x509.Certificate{ca.svid(t, uses(x509.ExtKeyUsageServerAuth))}, attest.ClientCert},
		{"A24 for code", []*x509.Certificate{ca.svid(t, uses(x509.ExtKeyUsageCodeSigning))}, attest.ClientCert},
		{"A24 for anything", []*x509.Certificate{ca.svid(t, uses(x509.ExtKeyUsageAny))}, attest.ClientCert},
		{"A24 for something unknown", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) {
			x.ExtKeyUsage, x.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		})}, attest.ClientCert},
		{"A24 authority for servers", []*x509.Certificate{forServers.svid(t, nil), forServers.cert}, attest.ClientCert},
		{"A24 authority for other names", []*x509.Certificate{narrow.svid(t, nil), narrow.cert}, attest.ClientCert},
		{"A24 authority that ended", []*x509.Certificate{ended.svid(t, nil), ended.cert}, attest.ClientCert},
		{"A24 unknown critical extension", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.ExtraExtensions = []pkix.Extension{critical} })}, attest.ClientCert},

		{"A15 expired", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.NotAfter = c.Now() })}, attest.ClientCert},
		{"A15 not yet", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.NotBefore = c.Now().Add(time.Second) })}, attest.ClientCert},
		{"A15 too long", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) {
			x.NotBefore, x.NotAfter = c.Now(), c.Now().Add(time.Hour+31*time.Second)
		})}, attest.ClientCert},
		{"A15 backdated a day", []*x509.Certificate{ca.svid(t, func(x *x509.Certificate) { x.NotBefore = c.Now().Add(-24 * time.Hour) })}, attest.ClientCert},
		{"H06 RSA of 1024 bits", []*x509.Certificate{ca.issue(t, weak.Public(), nil)}, attest.ClientCert},
		{"H06 P-224", []*x509.Certificate{ca.issue(t, p224.Public(), nil)}, attest.ClientCert},
	} {
		t.Run(row.name, func(t *testing.T) { refusedChain(t, a, row.chain, row.want) })
	}
	// Nothing else about those authorities is wrong.
	acceptedChain(t, a, below.svid(t, nil), below.cert)
}

// A24: a certificate is judged by what holds at the call, not at the handshake.
func TestA24CertificateAtEveryCall(t *testing.T) {
	c := newClock()
	ca, next := newAuthority(t, c, "spiffe://"+trustDomain), newAuthority(t, c, "spiffe://"+trustDomain)
	conf := newDomain(t, nil, ca)
	a := newAuth(t, c, conf)
	leaf := ca.svid(t, nil)
	acceptedChain(t, a, leaf)
	c.Add(time.Hour - time.Second)
	acceptedChain(t, a, leaf)
	c.Add(time.Second)
	refusedChain(t, a, []*x509.Certificate{leaf}, attest.ClientCert)

	// The trust domain changes its authority: the old one's word ends at once.
	leaf = ca.svid(t, nil)
	acceptedChain(t, a, leaf)
	writeFile(t, conf.BundleFile, bundleOf(t, nil, next))
	refusedChain(t, a, []*x509.Certificate{leaf}, attest.ClientCert)
	acceptedChain(t, a, next.svid(t, nil))
	// A bundle that cannot be read keeps what was, for an hour.
	writeFile(t, conf.BundleFile, []byte("{"))
	acceptedChain(t, a, next.svid(t, nil))
	c.Add(61 * time.Minute)
	refusedChain(t, a, []*x509.Certificate{next.svid(t, nil)}, attest.KeysUnavailable)
}

// FuzzCertificate feeds any certificate as a leaf: an identity comes only for an
// SVID of the trust domain.
func FuzzCertificate(f *testing.F) {
	t := &testing.T{}
	c := newClock()
	// The key is the same in every process: seeds and corpus are good in all of them.
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{7}, 32))
	if err != nil {
		f.Fatal(err)
	}
	ca := authorityOf(t, c, "spiffe://"+trustDomain, key)
	dir := f.TempDir()
	conf := identity.Issuer{
		Name: "mesh", Provider: "spiffe", Issuer: "spiffe://" + trustDomain, TrustDomain: trustDomain,
		BundleFile: filepath.Join(dir, "bundle.json"), X509SVID: true,
	}
	writeFile(t, conf.BundleFile, bundleOf(t, nil, ca))
	a, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ca.svid(t, nil).Raw)
	f.Add(ca.cert.Raw)
	f.Add(ca.svid(t, func(x *x509.Certificate) { x.ExtKeyUsage = nil; x.DNSNames = []string{"a.example"} }).Raw)
	f.Add(ca.svid(t, func(x *x509.Certificate) { x.URIs = append(x.URIs, x.URIs[0]) }).Raw)
	f.Add(newAuthority(t, c, "spiffe://other.example.org").svid(t, nil).Raw)
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			return // crypto/tls would not have let it in
		}
		id, err := a.AuthenticateCertificate(t.Context(), []*x509.Certificate{leaf})
		if err != nil {
			if got := attest.ReasonOf(err); got != attest.ClientCert && got != attest.IssuerNotAllowed {
				t.Fatalf("no reason of a certificate: %v", err)
			}
			if diff := cmp.Diff(attest.Identity{}, id); diff != "" {
				t.Fatalf("an identity came with the error:\n%s", diff)
			}
			return
		}
		if leaf.CheckSignatureFrom(ca.cert) != nil || !strings.HasPrefix(id.SAN, "spiffe://"+trustDomain+"/") || id.SAN != id.Subject || !id.Expires.After(c.Now()) {
			t.Fatalf("accepted with a hole: %+v", id)
		}
	})
}

// FuzzBundle feeds any file as a bundle: whatever is in it, only certificates that
// its own authorities signed are accepted, and a file that is refused changes
// nothing.
func FuzzBundle(f *testing.F) {
	t := &testing.T{}
	c := newClock()
	ca := newAuthority(t, c, "spiffe://"+trustDomain)
	leaf := newAuthority(t, c, "spiffe://"+trustDomain).svid(t, nil)
	f.Add(bundleOf(t, nil, ca))
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":["AA=="]}]}`))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kty":"RSA","kid":"a","n":"AQAB","e":"AQAB"}],"keys":null}`))
	f.Add([]byte(fmt.Sprintf(`{"keys":[%s1]}`, strings.Repeat("[", 100))))
	f.Fuzz(func(t *testing.T, body []byte) {
		keys, authorities, err := identity.ParseBundle(trustDomain, body)
		if err != nil {
			return
		}
		if !json.Valid(body) || keys < 0 || authorities < 0 {
			t.Fatalf("accepted what is not JSON: %q", body)
		}
		conf := identity.Issuer{
			Name: "mesh", Provider: "spiffe", Issuer: "spiffe://" + trustDomain, TrustDomain: trustDomain,
			BundleFile: filepath.Join(t.TempDir(), "bundle.json"), X509SVID: true,
		}
		writeFile(t, conf.BundleFile, body)
		a, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{conf}, Now: c.Now})
		if (err == nil) != (authorities > 0) {
			t.Fatalf("%d authorities, and New says %v", authorities, err)
		}
		if err == nil {
			refusedChain(t, a, []*x509.Certificate{leaf}, attest.ClientCert)
		}
	})
}
