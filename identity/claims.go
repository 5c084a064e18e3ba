package identity

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	maxText  = 2 << 10 // bytes of any claim that is kept
	maxDepth = 16
	leeway   = 30 * time.Second // for iat and nbf: clocks differ
	lastTime = 253402300799     // the end of year 9999
)

// claims is a JWT claims set with its numbers as they were written (attacks A21).
type claims map[string]any

// parseClaims reads a claims set strictly: TOKEN_CLAIMS otherwise.
func parseClaims(raw []byte) (claims, error) {
	m, err := parseObject(raw)
	if err != nil {
		return nil, attest.Errorf(attest.TokenClaims, "the token's claims are not plain JSON: %w", err)
	}
	return m, nil
}

// parseObject reads one JSON object in which no two names are equal, or equal
// but for case, at any depth. encoding/json alone takes the last of them, so that
// this service and another could read different things (attacks A22).
func parseObject(raw []byte) (map[string]any, error) {
	if !utf8.Valid(raw) {
		return nil, errors.New("it is not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	v, err := parseValue(d, 0)
	if err != nil {
		return nil, err
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("it is not an object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	return m, nil
}

func parseValue(d *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("it is nested deeper than %d", maxDepth)
	}
	t, err := d.Token()
	if err != nil {
		return nil, errors.New("it is not valid JSON")
	}
	switch t {
	case json.Delim('{'):
		return parseMembers(d, depth)
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := parseValue(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = d.Token()
		return list, err
	}
	return t, nil
}

func parseMembers(d *json.Decoder, depth int) (map[string]any, error) {
	m, seen := map[string]any{}, map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, errors.New("it is not valid JSON")
		}
		name, ok := t.(string)
		if !ok {
			return nil, errors.New("a member has no name")
		}
		if seen[fold(name)] {
			return nil, fmt.Errorf("%q is there twice, or in two spellings", clip(name))
		}
		seen[fold(name)] = true
		if m[name], err = parseValue(d, depth+1); err != nil {
			return nil, err
		}
	}
	_, err := d.Token()
	return m, err
}

// fold maps every spelling that some JSON decoder takes for the same name to one
// of them, including the long s (U+017F) and the Kelvin sign.
func fold(s string) string {
	least := func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r {
				return unicode.ToLower(next)
			}
			r = next
		}
	}
	return strings.Map(least, s)
}

// required returns a claim that must be a text and not empty (attacks A23).
func (c claims) required(name string) (string, error) {
	s, ok := c[name].(string)
	if !ok {
		return "", attest.Errorf(attest.TokenClaims, "the token's claim %q must be a text, it is %s", name, describe(c, name))
	}
	if err := checkPrintable(s); err != nil {
		return "", attest.Errorf(attest.TokenClaims, "the token's claim %q is refused: %w", name, err)
	}
	return s, nil
}

// optional returns a claim that is a text, or "" when it is absent or null.
func (c claims) optional(name string) (string, error) {
	if v := c[name]; v == nil || v == "" {
		return "", nil
	}
	return c.required(name)
}

// scalar is optional that also takes whole numbers and booleans, as providers
// write ids in both ways (ci-identity 1.1). A number keeps its digits.
func (c claims) scalar(name string) (string, error) {
	switch v := c[name].(type) {
	case json.Number:
		if !wholeNumber.MatchString(v.String()) {
			return "", attest.Errorf(attest.TokenClaims, "the token's claim %q is a number that is not whole, or too large", name)
		}
		return v.String(), nil
	case bool:
		return strconv.FormatBool(v), nil
	}
	return c.optional(name)
}

// requiredScalar is scalar for a claim that must be there (attacks A23).
func (c claims) requiredScalar(name string) (string, error) {
	s, err := c.scalar(name)
	if err == nil && s == "" {
		err = attest.Errorf(attest.TokenClaims, "the token's claim %q must be a text or a number, it is %s", name, describe(c, name))
	}
	return s, err
}

// claimField says how a claim is read, and where to.
type claimField struct {
	name string
	into *string
	read func(string) (string, error)
}

// read fills in the fields; with an error some are filled in and must not be used.
func (c claims) read(fields []claimField) error {
	for _, f := range fields {
		var err error
		if *f.into, err = f.read(f.name); err != nil {
			return err
		}
	}
	return nil
}

// claimForm says whether a claim has the form in which its provider issues it.
type claimForm struct {
	claim string
	ok    bool
	want  string
}

func checkForms(forms []claimForm) error {
	for _, f := range forms {
		if !f.ok {
			return attest.Errorf(attest.TokenClaims, "the token's claim %q is not %s", f.claim, f.want)
		}
	}
	return nil
}

// printedURI returns a URI made of claims as certificates print it. A percent
// sign is refused: "a b" and "a%20b" would be printed alike (attacks B12).
func printedURI(claim, uri string) (string, error) {
	u, err := url.Parse(uri)
	if err != nil || strings.Contains(uri, "%") {
		return "", attest.Errorf(attest.TokenClaims, "the token's claim %q cannot be part of a URI: rename the workflow file or the branch", claim)
	}
	return u.String(), nil
}

var wholeNumber = regexp.MustCompile(`^-?(?:0|[1-9][0-9]{0,18})$`)

func describe(c claims, name string) string {
	v, ok := c[name]
	if !ok {
		return "missing"
	}
	switch v.(type) {
	case nil:
		return "null"
	case json.Number:
		return "a number"
	case bool:
		return "a boolean"
	case []any:
		return "a list"
	case map[string]any:
		return "an object"
	}
	return "a text"
}

// checkPrintable refuses what would break a line, a log or a reader's eye
// (attacks J04), and U+FFFD, which stands for something that could not be read.
func checkPrintable(s string) error {
	switch {
	case s == "":
		return errors.New("it is empty")
	case len(s) > maxText:
		return fmt.Errorf("it has %d bytes, more than %d", len(s), maxText)
	case !utf8.ValidString(s):
		return errors.New("it is not UTF-8")
	}
	for _, r := range s {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u2028' || r == '\u2029' || r == utf8.RuneError {
			return fmt.Errorf("it has the control character %U", r)
		}
	}
	return nil
}

// checkTimes judges exp, nbf and iat and returns exp. A clock that is a little
// wrong may be early, never late: an expired token stays expired (attacks A15).
func (i *issuer) checkTimes(c claims, now time.Time) (time.Time, error) {
	exp, err := c.date("exp")
	if err != nil {
		return time.Time{}, err
	}
	iat := now
	// Of a JWT-SVID iat is optional: what is left of its life is bounded then.
	if _, ok := c["iat"]; ok || i.Provider != spiffe || i.MaxAge > 0 {
		if iat, err = c.date("iat"); err != nil {
			return time.Time{}, err
		}
	}
	nbf := iat
	if _, ok := c["nbf"]; ok || slices.Contains([]string{gitHub, gitLab, buildkite}, i.Provider) {
		if nbf, err = c.date("nbf"); err != nil {
			return time.Time{}, err
		}
	}
	switch {
	case !now.Before(exp):
		return time.Time{}, attest.Errorf(attest.TokenExpired, "the token expired at %s, it is now %s: get a new one", attest.Time(exp), attest.Time(now))
	case now.Add(leeway).Before(iat) || now.Add(leeway).Before(nbf):
		return time.Time{}, attest.Errorf(attest.TokenNotYetValid, "the token is valid from %s, it is now %s: compare the clocks of the issuer and of this service", attest.Time(later(iat, nbf)), attest.Time(now))
	case !exp.After(iat) || exp.Sub(iat) > i.MaxLifetime:
		return time.Time{}, attest.Errorf(attest.TokenLifetime, "the token is valid for %v, issuer %q may issue for at most %v (max_lifetime)", exp.Sub(iat), i.Name, i.MaxLifetime)
	case i.MaxAge > 0 && now.Sub(iat) > i.MaxAge:
		return time.Time{}, attest.Errorf(attest.TokenExpired, "the token was issued at %s, more than %v ago (max_age): get a new one just before the call", attest.Time(iat), i.MaxAge)
	}
	return exp, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// date reads a NumericDate (RFC 7519, section 2) that is whole and within the
// years 1970 to 9999 (attacks J05).
func (c claims) date(name string) (time.Time, error) {
	n, ok := c[name].(json.Number)
	if !ok {
		return time.Time{}, attest.Errorf(attest.TokenClaims, "the token's claim %q must be a number of seconds, it is %s", name, describe(c, name))
	}
	s, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil || s <= 0 || s > lastTime {
		return time.Time{}, attest.Errorf(attest.TokenClaims, "the token's claim %q is not a whole number of seconds since 1970", name)
	}
	return time.Unix(s, 0).UTC(), nil
}

// checkAudience wants exactly one audience, ours (attacks A14). A token that is
// also for others could have been sent to us by one of them.
func (i *issuer) checkAudience(c claims) error {
	v := c["aud"]
	if list, ok := v.([]any); ok && len(list) == 1 {
		v = list[0]
	}
	aud, ok := v.(string)
	if !ok {
		return attest.Errorf(attest.TokenAudience, "the token's aud must be exactly %q, it is %s: request a token with this audience alone", i.Audience, describe(c, "aud"))
	}
	if aud != i.Audience {
		return attest.Errorf(attest.TokenAudience, "the token is for %q, not for this service: request one with audience %q", clip(aud), i.Audience)
	}
	return nil
}
