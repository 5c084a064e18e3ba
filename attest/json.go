package attest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// StrictJSON checks that data is exactly one JSON value that every parser reads
// alike: valid UTF-8, nothing after the value, no more than maxDepth objects and
// arrays inside one another, no escape that names half a character, no number
// beyond float64, and in no object two keys that are equal or differ only in
// case, of which encoding/json would silently take the last. It answers BAD_JSON
// otherwise (RFC 8259 section 4: behaviour on equal names is unpredictable;
// sections 6 and 8.2 say the same of such numbers and escapes).
func StrictJSON(data []byte, maxDepth int) error {
	if !utf8.Valid(data) {
		return Errorf(BadJSON, "JSON is not valid UTF-8")
	}
	if !json.Valid(data) { // also refuses trailing data and what Token lets pass
		return Errorf(BadJSON, "not exactly one JSON value")
	}
	if halfCharacter(data) {
		return Errorf(BadJSON, "JSON has an escape that names half a character")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var open []scope
	for {
		t, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return Errorf(BadJSON, "JSON cannot be read")
		}
		if open, err = step(open, t, maxDepth); err != nil {
			return err
		}
	}
}

// scope is an object or array that is not closed yet.
type scope struct {
	keys  map[string]bool // nil in an array
	value bool            // in an object: the next token belongs to a value
}

// step follows one token.
func step(open []scope, t json.Token, maxDepth int) ([]scope, error) {
	top := len(open) - 1
	if d, ok := t.(json.Delim); ok && (d == '}' || d == ']') {
		return open[:top], nil
	}
	if top >= 0 && open[top].keys != nil {
		if !open[top].value {
			key := fold(t.(string))
			if open[top].keys[key] {
				return nil, Errorf(BadJSON, "JSON object has the key %q twice, or once more in other case", clip(t.(string)))
			}
			open[top].keys[key] = true
			open[top].value = true
			return open, nil
		}
		open[top].value = false
	}
	if n, ok := t.(json.Number); ok {
		if _, err := strconv.ParseFloat(n.String(), 64); err != nil {
			return nil, Errorf(BadJSON, "JSON has the number %s, which is out of range", clip(n.String()))
		}
	}
	d, ok := t.(json.Delim)
	if !ok {
		return open, nil
	}
	if len(open) >= maxDepth {
		return nil, Errorf(BadJSON, "JSON is nested more than %d levels deep", maxDepth)
	}
	s := scope{}
	if d == '{' {
		s.keys = map[string]bool{}
	}
	return append(open, s), nil
}

// halfCharacter finds a \u escape of a surrogate without its partner, which
// encoding/json silently replaces. data is valid JSON: a backslash starts an
// escape, and four hex digits follow \u.
func halfCharacter(data []byte) bool {
	for i := bytes.IndexByte(data, '\\'); i >= 0 && i < len(data); i++ {
		if data[i] != '\\' {
			continue
		}
		i++
		if data[i] != 'u' {
			continue
		}
		r := escaped(data[i:])
		i += 4
		if !utf16.IsSurrogate(r) {
			continue
		}
		if data[i+1] != '\\' || data[i+2] != 'u' || utf16.DecodeRune(r, escaped(data[i+2:])) == unicode.ReplacementChar {
			return true
		}
		i += 6
	}
	return false
}

// escaped reads the digits after "u".
func escaped(u []byte) rune {
	n, err := strconv.ParseUint(string(u[1:5]), 16, 16)
	if err != nil {
		return unicode.ReplacementChar // not in valid JSON
	}
	return rune(n)
}

// fold maps every rune to the smallest one that encoding/json takes for the
// same when it matches a key with a field (U+017F is an s to it).
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r {
				return next
			}
			r = next
		}
	}, s)
}
