package identity

import (
	"context"
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmarkd/hallmark/attest"
)

// ParseBundle reads a SPIFFE bundle and returns how many keys of JWT-SVIDs and how
// many X.509 authorities it has.
func ParseBundle(td string, body []byte) (keys, authorities int, err error) {
	d := &domain{name: spiffeid.RequireTrustDomainFromString(td)}
	b, err := d.parseBundle(body)
	if err != nil {
		return 0, 0, err
	}
	return len(b.keys), len(b.x509.X509Authorities()), nil
}

// CheckDown is what AuthenticateCertificate asks of a chain before crypto/x509 sees it.
func CheckDown(chain []*x509.Certificate, authorities ...*x509.Certificate) error {
	return bundle{x509: spiffebundle.FromX509Authorities(spiffeid.TrustDomain{}, authorities)}.checkDown(chain)
}

// VerifyJWS is the part of Authenticate that does not read claims: the text and the
// header of a token, the choice of a key from the issuer's JWK set, the signature.
// It returns the payload.
func VerifyJWS(text string, jwks []byte) ([]byte, error) {
	t, err := parseToken(text)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(jwks, []string{"", "sig"})
	if err != nil {
		return nil, keysUnavailable("test", err)
	}
	source := keyFile{"test", func(context.Context) ([]key, error) { return keys, nil }}
	public, err := source.find(context.Background(), t.kid, t.alg)
	if err != nil {
		return nil, err
	}
	payload, err := verify(t, public)
	if err != nil {
		return nil, attest.Errorf(attest.TokenSignature, "the signature does not verify")
	}
	return payload, nil
}

// ReadClaims is the part of Authenticate after the signature: what a verified
// payload says, read by the issuer that it names.
func (a *Authenticator) ReadClaims(payload []byte) (attest.Identity, error) {
	t := token{input: "header." + string(payload), payload: payload, typ: "jwt"}
	i, err := a.issuerOf(t)
	if err != nil {
		return attest.Identity{}, err
	}
	return i.identity(t, payload, a.now())
}
