package identity

import (
	"encoding/base64"
	"slices"
	"strings"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	maxToken = 16 << 10
	maxKeyID = 256
)

// algorithms are those that an issuer may be configured for: signatures with a
// public key, and nothing else (attacks A01, A02).
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// refusedHeaders bring their own keys, name where to fetch them, or change what
// the other parts mean (attacks A03, A04, A13).
var refusedHeaders = []string{"jwk", "jku", "x5u", "x5c", "crit", "zip", "enc", "b64", "epk", "p2c", "p2s"}

// token is a compact JWS in canonical form. Nothing of it is verified.
type token struct {
	text      string // the whole token
	input     string // the JWS signing input: header "." payload
	alg       jose.SignatureAlgorithm
	kid       string // "" when the header has none
	typ       string // in lower case, without "application/"; "" when the header has none
	payload   []byte
	signature []byte
}

// parseToken takes a token apart. The work it does is linear in the size, and
// the size is bounded (attacks A12).
func parseToken(text string) (token, error) {
	if text == "" {
		return token{}, attest.Errorf(attest.TokenMissing, "the token is empty")
	}
	if len(text) > maxToken {
		return token{}, attest.Errorf(attest.TokenMalformed, "the token has %d bytes, more than the %d that any issuer needs", len(text), maxToken)
	}
	head, rest, _ := strings.Cut(text, ".")
	body, sig, three := strings.Cut(rest, ".")
	if !three || strings.Contains(sig, ".") {
		return token{}, attest.Errorf(attest.TokenMalformed, "the token has not the three parts of a signed JWT (an encrypted one has five)")
	}
	t := token{text: text, input: text[:len(head)+1+len(body)]}
	header, err := decode(head)
	if err != nil {
		return token{}, err
	}
	if t.payload, err = decode(body); err != nil {
		return token{}, err
	}
	if t.signature, err = decode(sig); err != nil {
		return token{}, err
	}
	return t, t.readHeader(header)
}

// decode reads base64url in its only spelling (RFC 7515, section 2): no padding,
// no line breaks, which Go's decoder would skip, and zero unused bits. One token
// must have one text (attacks A18).
func decode(part string) ([]byte, error) {
	if strings.ContainsAny(part, "\r\n") {
		return nil, attest.Errorf(attest.TokenMalformed, "the token has line breaks in it")
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil || len(b) == 0 {
		return nil, attest.Errorf(attest.TokenMalformed, "a part of the token is empty or not canonical base64url without padding")
	}
	return b, nil
}

// readHeader takes alg and kid; of all other members it only makes sure that
// they do no harm.
func (t *token) readHeader(raw []byte) error {
	h, err := parseObject(raw)
	if err != nil {
		return attest.Errorf(attest.TokenHeader, "the token's header is not plain JSON: %w", err)
	}
	for name := range h {
		if slices.Contains(refusedHeaders, fold(name)) {
			return attest.Errorf(attest.TokenHeader, "the token's header has %q, which is never accepted: keys come from the configured issuer only", name)
		}
	}
	if t.typ, err = readType(h); err != nil {
		return err
	}
	if kid, ok := h["kid"]; ok {
		if t.kid, ok = kid.(string); !ok || len(t.kid) > maxKeyID || checkPrintable(t.kid) != nil {
			return attest.Errorf(attest.TokenHeader, "the kid in the token's header is not a short text")
		}
	}
	alg, _ := h["alg"].(string)
	if t.alg = jose.SignatureAlgorithm(alg); !slices.Contains(algorithms, t.alg) {
		return attest.Errorf(attest.TokenAlgorithm, "the token's algorithm %q is not a signature with a public key", clip(alg))
	}
	return nil
}

// readType refuses tokens made for something else, such as logout tokens (RFC
// 8725, section 3.11). Access tokens (RFC 9068) with our audience are meant for us.
func readType(h map[string]any) (string, error) {
	v, ok := h["typ"]
	if !ok {
		return "", nil
	}
	typ, _ := v.(string)
	typ = strings.TrimPrefix(strings.ToLower(typ), "application/")
	if !slices.Contains([]string{"jwt", "jose", "at+jwt"}, typ) {
		return "", attest.Errorf(attest.TokenHeader, "the token's typ is %q, not JWT: it was made for another use", clip(typ))
	}
	return typ, nil
}
