package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hallmarkd/hallmark/attest"
)

// svidAlgorithms are those that a JWT-SVID may have (SPIFFE JWT-SVID, section 2.1).
var svidAlgorithms = []string{
	string(jose.RS256), string(jose.RS384), string(jose.RS512), string(jose.ES256), string(jose.ES384),
	string(jose.ES512), string(jose.PS256), string(jose.PS384), string(jose.PS512),
}

// What the keys of a SPIFFE bundle are for (SPIFFE Trust Domain and Bundle, 4.2.2).
const (
	useX509SVID = "x509-svid"
	useJWTSVID  = "jwt-svid"
)

const spiffeScheme = "spiffe://"

// maxChain is the number of certificates that a caller may send: the leaf and three
// authorities.
const maxChain = 4

// domain is a trust domain whose members are known.
type domain struct {
	name   spiffeid.TrustDomain
	bundle *watched[bundle] // nil: its JWT keys are on the network
}

// bundle is what a SPIFFE bundle holds.
type bundle struct {
	keys []key                // of JWT-SVIDs
	x509 *spiffebundle.Bundle // the authorities of X.509-SVIDs
}

// withoutIss reports whether the issuer's tokens have no iss: then the trust
// domain of sub selects it, and issuer is that domain's SPIFFE ID.
func (i *issuer) withoutIss() bool {
	return i.Provider == spiffe && i.Issuer.Issuer == spiffeScheme+i.TrustDomain
}

// keyUse says what use a key in the issuer's JWK set may have (RFC 7517, section
// 4.2). That of a trust domain is a bundle, or comes from OpenID discovery.
func (i *issuer) keyUse() []string {
	if i.Provider == spiffe {
		return []string{"", "sig", useJWTSVID}
	}
	return []string{"", "sig"}
}

// checkSPIFFE checks what only the provider spiffe has.
func (i *issuer) checkSPIFFE() error {
	if err := i.checkFixedMapping(); err != nil {
		return err
	}
	td, err := spiffeid.TrustDomainFromString(i.TrustDomain)
	if err != nil || td.Name() != i.TrustDomain {
		return fmt.Errorf("trust_domain: %q is not the name of a trust domain, such as example.org", i.TrustDomain)
	}
	for _, alg := range i.Algorithms {
		if !slices.Contains(svidAlgorithms, alg) {
			return fmt.Errorf("algorithms: %q is none that a JWT-SVID may have", alg)
		}
	}
	switch {
	case strings.HasPrefix(i.Issuer.Issuer, spiffeScheme) && !i.withoutIss():
		return fmt.Errorf("issuer: %q is not %s, nor the https URL that tokens of the trust domain have as iss", i.Issuer.Issuer, spiffeScheme+i.TrustDomain)
	case i.withoutIss() && i.BundleFile == "" && i.JWKSURI == "":
		return errors.New("bundle_file: give the trust domain's bundle, or the jwks_uri of its bundle endpoint")
	case i.X509SVID && i.BundleFile == "":
		return errors.New("x509_svid: give the bundle_file with the authorities that certificates must come from")
	}
	i.domain = &domain{name: td}
	return nil
}

// checkBundle refuses a bundle that nobody could call with.
func (i *issuer) checkBundle(b bundle) error {
	switch {
	case i.X509SVID && len(b.x509.X509Authorities()) == 0:
		return errors.New("x509_svid: bundle_file holds no X.509 authority (use x509-svid)")
	case !i.X509SVID && len(b.keys) == 0:
		return errors.New("bundle_file: it holds no key of JWT-SVIDs (use jwt-svid), and x509_svid is not set")
	}
	return nil
}

// parseBundle reads a SPIFFE bundle. It is JSON of the strict kind, and its JWT
// keys are held to the same rules as any issuer's.
func (d *domain) parseBundle(body []byte) (bundle, error) {
	all, err := parseKeys(body, []string{useJWTSVID})
	if err != nil {
		return bundle{}, err
	}
	x509, err := spiffebundle.Parse(d.name, body)
	if err != nil {
		return bundle{}, err
	}
	// What is for something else must be ignored.
	other := func(k key) bool { return k.use != useJWTSVID }
	return bundle{keys: slices.DeleteFunc(all, other), x509: x509}, nil
}

// domainOf returns the issuer of tokens without iss that the unverified sub
// selects; nil when there is none.
func (a *Authenticator) domainOf(c claims) *issuer {
	sub, _ := c["sub"].(string)
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return nil
	}
	if i := a.domains[id.TrustDomain().Name()]; i != nil && i.withoutIss() {
		return i
	}
	return nil
}

// checkType refuses what is a token for other providers and no JWT-SVID (SPIFFE
// JWT-SVID, section 2.3).
func (i *issuer) checkType(t token) error {
	if i.Provider == spiffe && !slices.Contains([]string{"", "jwt", "jose"}, t.typ) {
		return attest.Errorf(attest.TokenHeader, "the token's typ is %q: that of a JWT-SVID is JWT or JOSE", t.typ)
	}
	return nil
}

// readSPIFFE names the workload by its SPIFFE ID. An SVID says nothing of source,
// commit or run: the build stays empty.
func (i *issuer) readSPIFFE(_ claims, id *attest.Identity) error {
	sub, err := spiffeid.FromString(id.Subject)
	if err != nil {
		return attest.Errorf(attest.TokenClaims, "the token's sub is not a SPIFFE ID")
	}
	if err := i.domain.admits(sub); err != nil {
		return attest.Errorf(err.reason, "the token's sub %s", err.problem)
	}
	id.SAN = sub.String()
	return nil
}

// stranger says why a SPIFFE ID is not that of a known workload.
type stranger struct {
	reason  attest.Reason
	problem string
}

// admits returns nil for the ID of a workload of the domain. The domain's own ID
// names its authority, no workload.
func (d *domain) admits(id spiffeid.ID) *stranger {
	switch {
	case !id.MemberOf(d.name):
		return &stranger{attest.IssuerNotAllowed, fmt.Sprintf("is of the trust domain %q, not of %q", clip(id.TrustDomain().Name()), d.name.Name())}
	case id.Path() == "":
		return &stranger{attest.TokenClaims, "names the whole trust domain, not a workload in it"}
	}
	return nil
}

// TakesCertificates reports whether any issuer's members may call with an X.509-SVID:
// then servers have to ask for client certificates, and to leave the judgement to
// AuthenticateCertificate.
func (a *Authenticator) TakesCertificates() bool {
	for _, i := range a.domains {
		if i.X509SVID {
			return true
		}
	}
	return false
}

// AuthenticateCertificate verifies an X.509-SVID, the chain of a TLS client
// certificate, leaf first, whose key the caller has proved to hold (SPIFFE
// X509-SVID, section 5), and returns whom it names. It is to be called for every
// request: a connection may outlive its certificate and the authorities (attacks
// A24). With an error the Identity is zero. The reasons are
// CLIENT_CERTIFICATE_INVALID; ISSUER_NOT_ALLOWED for a trust domain that may not
// call so; and ISSUER_KEYS_UNAVAILABLE.
func (a *Authenticator) AuthenticateCertificate(ctx context.Context, chain []*x509.Certificate) (attest.Identity, error) {
	// 1. The leaf's ID only selects among configured trust domains.
	if len(chain) == 0 || len(chain) > maxChain {
		return attest.Identity{}, badCertificate("the client certificate comes as a chain of %d, want 1 to %d", len(chain), maxChain)
	}
	leaf := chain[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return attest.Identity{}, badCertificate("the client certificate has not exactly one URI name that is a SPIFFE ID")
	}
	i := a.domains[id.TrustDomain().Name()]
	if i == nil || !i.X509SVID {
		return attest.Identity{}, attest.Errorf(attest.IssuerNotAllowed, "the client certificate is of the trust domain %q, whose X.509-SVIDs are not accepted here: ask the operator to add it (x509_svid), or use a token", clip(id.TrustDomain().Name()))
	}
	if err := i.checkLeaf(leaf, id, a.now()); err != nil {
		return attest.Identity{}, err
	}
	// 2. The authorities are the configured ones, as the bundle has them now.
	authorities, err := i.domain.bundle.get(ctx)
	if err != nil {
		return attest.Identity{}, keysUnavailable(i.Name, err)
	}
	err = authorities.checkDown(chain)
	var verified [][]*x509.Certificate
	if err == nil {
		_, verified, err = x509svid.Verify(chain, authorities.x509, x509svid.WithTime(a.now()))
	}
	if err != nil {
		return attest.Identity{}, badCertificate("the client certificate does not verify with the authorities of the trust domain %q: get a new one, or ask the operator whether the bundle here is current", id.TrustDomain().Name())
	}
	if !slices.ContainsFunc(verified, forClients) {
		return attest.Identity{}, badCertificate("the client certificate, or one that issued it, is not for TLS clients (extended key usage)")
	}
	// 3. Verified: the leaf is the credential, whatever way its signature is written
	// in: whoever holds it can write another that verifies, too (attacks B13).
	sum := sha256.Sum256(leaf.RawTBSCertificate)
	return attest.Identity{
		IssuerName: i.Name, Provider: i.Provider, Kind: i.Kind, Issuer: i.KnownIssuer(), Subject: id.String(), SAN: id.String(),
		TokenID: hex.EncodeToString(sum[:]), Expires: leaf.NotAfter.UTC(), Once: i.Replay == replayOnce,
	}, nil
}

// checkDown refuses a chain in which anything comes from a stranger, at the cost of
// one signature each, from the top down. crypto/x509 would search all paths through
// authorities that the caller has made itself (attacks A24).
func (b bundle) checkDown(chain []*x509.Certificate) error {
	top := chain[len(chain)-1]
	issued := func(by *x509.Certificate) bool {
		return bytes.Equal(top.RawIssuer, by.RawSubject) && top.CheckSignatureFrom(by) == nil
	}
	if !b.x509.HasX509Authority(top) && !slices.ContainsFunc(b.x509.X509Authorities(), issued) {
		return errors.New("its last certificate is of no authority")
	}
	for n := len(chain) - 2; n >= 0; n-- {
		if err := chain[n].CheckSignatureFrom(chain[n+1]); err != nil {
			return fmt.Errorf("certificate %d: %w", n, err)
		}
	}
	return nil
}

// checkLeaf judges what the leaf says of itself (SPIFFE X509-SVID, section 4).
// go-spiffe refuses authorities as leaves; the rest is ours.
func (i *issuer) checkLeaf(leaf *x509.Certificate, id spiffeid.ID, now time.Time) error {
	// An authority that backdates what it issues, so that clocks may differ, does
	// not make it live longer.
	life := leaf.NotAfter.Sub(leaf.NotBefore) - leeway
	switch {
	case id.Path() == "":
		return badCertificate("the client certificate names the whole trust domain, not a workload in it")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return badCertificate("the client certificate is not for signatures (key usage digitalSignature)")
	case !strong(leaf.PublicKey):
		return badCertificate("the client certificate's key is weak or of an unknown kind: want RSA of %d bits or more, ECDSA on P-256 to P-521 or Ed25519", minRSABits)
	case now.Before(leaf.NotBefore):
		return badCertificate("the client certificate is valid from %s, it is now %s: compare the clocks of its issuer and of this service", attest.Time(leaf.NotBefore), attest.Time(now))
	case !now.Before(leaf.NotAfter):
		return badCertificate("the client certificate expired at %s, it is now %s: connect again with a new one", attest.Time(leaf.NotAfter), attest.Time(now))
	case life > i.MaxLifetime:
		return badCertificate("the client certificate is valid for %v, issuer %q may issue for at most %v (max_lifetime)", leaf.NotAfter.Sub(leaf.NotBefore), i.Name, i.MaxLifetime)
	}
	return nil
}

func badCertificate(format string, args ...any) error {
	return attest.Errorf(attest.ClientCert, format, args...)
}

func strong(public any) bool {
	switch k := public.(type) {
	case *rsa.PublicKey:
		return weakness(k) == ""
	case *ecdsa.PublicKey:
		return k.Curve.Params().BitSize >= 256
	case ed25519.PublicKey:
		return true
	}
	return false
}

// forClients reports whether every certificate below the authority may be used by
// a TLS client. crypto/x509 is not asked, because go-spiffe lets it accept any use.
func forClients(chain []*x509.Certificate) bool {
	for _, c := range chain[:max(1, len(chain)-1)] {
		if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
			continue
		}
		if !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) && (!c.IsCA || !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)) {
			return false
		}
	}
	return true
}
