package attest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// StrictJSON checks that data is exactly one JSON value that every parser reads
// alike: valid UTF-8, nothing after the value, no more than maxDepth objects and
// arrays inside one another, and in no object two keys that are equal or differ
// only in case, of which encoding/json would silently take the last. It answers
// BAD_JSON otherwise (RFC 8259 section 4: behaviour on equal names is
// unpredictable).
func StrictJSON(data []byte, maxDepth int) error {
	if !utf8.Valid(data) {
		return Errorf(BadJSON, "JSON is not valid UTF-8")
	}
	if !json.Valid(data) { // also refuses trailing data and what Token lets pass
		return Errorf(BadJSON, "not exactly one JSON value")
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
