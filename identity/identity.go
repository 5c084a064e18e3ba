// Package identity turns a bearer token into an attest.Identity. It believes a
// token only when a configured issuer signed it for this service a short while
// ago, and reads facts only from claims that the signature covers.
package identity

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/hallmarkd/hallmark/attest"
)

// Authenticator knows the configured issuers. It is safe for concurrent use
// and needs no closing.
type Authenticator struct {
	now     func() time.Time
	issuers map[string][]*issuer // by the exact iss: several have audiences of their own
	domains map[string]*issuer   // of provider spiffe, by trust domain
}

// Authenticate verifies a compact JWS that carries JWT claims (RFC 7515, 7519,
// 8725) and returns whom it names. With an error the Identity is zero, always
// (attacks A16, A17). The reasons are TOKEN_*, ISSUER_NOT_ALLOWED and
// OWNER_NOT_ALLOWED; SOURCE_NOT_ALLOWED for a fork's job; and
// ISSUER_KEYS_UNAVAILABLE, where repeating is safe.
func (a *Authenticator) Authenticate(ctx context.Context, token string) (attest.Identity, error) {
	// 1. The text: bounded and canonical. No key was touched and nothing fetched.
	t, err := parseToken(token)
	if err != nil {
		return attest.Identity{}, err
	}
	// 2. iss only selects among configured issuers. It is not believed yet.
	i, err := a.issuerOf(t)
	if err != nil {
		return attest.Identity{}, err
	}
	// 3. The algorithm and the key are the issuer's choice, not the token's.
	if !slices.Contains(i.Algorithms, string(t.alg)) {
		return attest.Identity{}, attest.Errorf(attest.TokenAlgorithm, "the token is signed with %s, issuer %q is configured for %s", t.alg, i.Name, strings.Join(i.Algorithms, ", "))
	}
	key, err := i.keys.find(ctx, t.kid, t.alg)
	if err != nil {
		return attest.Identity{}, err
	}
	// 4. From here on only the verified payload is read.
	payload, err := verify(t, key)
	if err != nil {
		return attest.Identity{}, attest.Errorf(attest.TokenSignature, "the token's signature does not verify with the key of issuer %q that it names", i.Name)
	}
	id, err := i.identity(t, payload, a.now())
	if err != nil {
		return attest.Identity{}, err
	}
	// 5. What has become of the caller since the token was made.
	if i.review != nil {
		if err := i.review.check(ctx, t.text, id); err != nil {
			return attest.Identity{}, err
		}
	}
	return id, nil
}

// issuerOf looks up the configured issuer of an unverified token. Comparing
// letter by letter is the point (attacks A06, A10, A11).
func (a *Authenticator) issuerOf(t token) (*issuer, error) {
	c, err := parseClaims(t.payload)
	if err != nil {
		return nil, err
	}
	if _, ok := c["iss"]; !ok {
		if i := a.domainOf(c); i != nil {
			return i, nil
		}
	}
	iss, err := c.required("iss")
	if err != nil {
		return nil, err
	}
	found := a.issuers[iss]
	if len(found) == 1 && !found[0].withoutIss() {
		return found[0], nil
	}
	// Clusters that share an iss: the audience says which one, and that one's keys
	// alone are asked (attacks B06).
	for _, i := range found {
		if !i.withoutIss() && i.checkAudience(c) == nil {
			return i, nil
		}
	}
	if len(found) > 1 {
		return nil, attest.Errorf(attest.TokenAudience, "several clusters have the token's issuer %q, and none of them has its audience: request a token with the audience of your cluster's entry in the configuration", clip(iss))
	}
	return nil, attest.Errorf(attest.IssuerNotAllowed, "the token's issuer %q is not configured here: ask the operator to add it, or use a token of a configured issuer", clip(iss))
}

// verify returns the payload that the signature covers.
func verify(t token, key crypto.PublicKey) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(t.text, []jose.SignatureAlgorithm{t.alg})
	if err != nil {
		return nil, err
	}
	payload, err := jws.Verify(key)
	if err != nil {
		return nil, err
	}
	// go-jose takes any salt length; RFC 7518, section 3.5 wants the hash's (attacks A27).
	if hash, ok := pssHash(t.alg); ok {
		h := hash.New()
		h.Write([]byte(t.input))
		opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
		if err := rsa.VerifyPSS(key.(*rsa.PublicKey), hash, h.Sum(nil), t.signature, opts); err != nil {
			return nil, err
		}
	}
	return payload, nil
}

func pssHash(alg jose.SignatureAlgorithm) (crypto.Hash, bool) {
	switch alg {
	case jose.PS256:
		return crypto.SHA256, true
	case jose.PS384:
		return crypto.SHA384, true
	case jose.PS512:
		return crypto.SHA512, true
	}
	return 0, false
}

// identity reads verified claims: what every token must say, then what the
// provider's tokens say.
func (i *issuer) identity(t token, payload []byte, now time.Time) (attest.Identity, error) {
	c, err := parseClaims(payload)
	if err != nil {
		return attest.Identity{}, err
	}
	if iss, ok := c["iss"]; ok == i.withoutIss() || ok && iss != i.Issuer.Issuer {
		return attest.Identity{}, attest.Errorf(attest.IssuerNotAllowed, "the verified claims name another issuer than the token did")
	}
	if err := i.checkType(t); err != nil {
		return attest.Identity{}, err
	}
	expires, err := i.checkTimes(c, now)
	if err != nil {
		return attest.Identity{}, err
	}
	if err := i.checkAudience(c); err != nil {
		return attest.Identity{}, err
	}
	sub, err := c.required("sub")
	if err != nil {
		return attest.Identity{}, err
	}
	tokenID, err := i.tokenID(t, c)
	if err != nil {
		return attest.Identity{}, err
	}
	id := attest.Identity{
		IssuerName: i.Name, Provider: i.Provider, Kind: i.Kind, Issuer: i.KnownIssuer(),
		Subject: sub, TokenID: tokenID, Expires: expires, Once: i.Replay == replayOnce,
	}
	if err := i.read(c, &id); err != nil {
		return attest.Identity{}, err
	}
	return id, nil
}

// tokenID names the token for replay detection (attacks B13). The signature is
// left out of it: one of ECDSA can be changed and still verify.
func (i *issuer) tokenID(t token, c claims) (string, error) {
	named := t.input
	// A token that others hold as well must say that it is one and the same.
	if _, ok := c["jti"]; ok || i.wellKnownAudience() {
		jti, err := c.required("jti")
		if err != nil {
			return "", err
		}
		named = i.KnownIssuer() + "\n" + jti
	}
	sum := sha256.Sum256([]byte(named))
	return hex.EncodeToString(sum[:]), nil
}

// Bearer returns the token of a call's authorization headers: TOKEN_MISSING when
// there is none, TWO_IDENTITIES when there are several, because different layers
// would pick different ones (attacks A25), TOKEN_MALFORMED for other schemes.
func Bearer(authorization []string) (string, error) {
	switch {
	case len(authorization) == 0:
		return "", attest.Errorf(attest.TokenMissing, "the call has no authorization header: send \"authorization: Bearer TOKEN\"")
	case len(authorization) > 1 || strings.Contains(authorization[0], ","):
		return "", attest.Errorf(attest.TwoIdentities, "the call has several authorization values: send exactly one")
	}
	scheme, token, _ := strings.Cut(authorization[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", attest.Errorf(attest.TokenMalformed, "the authorization header is not of the scheme Bearer")
	}
	if token == "" {
		return "", attest.Errorf(attest.TokenMissing, "the authorization header has no token after Bearer")
	}
	return token, nil
}

// clip bounds what an error repeats of a claim.
func clip(s string) string {
	const most = 120
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
