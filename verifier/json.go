package verifier

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hallmarkd/hallmark/attest"
)

// maxDepth bounds how deep arrays and objects may be nested.
const maxDepth = 64

// Decode is a strict JSON decoder for bytes that somebody else wrote: it accepts
// only what every parser reads alike (attacks D03, D04, D09). It returns
// BAD_JSON on syntax errors, trailing data, invalid UTF-8, unpaired surrogates,
// nesting above 64, numbers beyond float64, on two names of one object that
// differ at most in case, and on names that into does not have, compared
// exactly. Names and numbers inside a json.RawMessage are checked too, except
// that any name may stand there. On an error into is not touched.
func Decode(data []byte, into any) error {
	target := reflect.ValueOf(into)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return fmt.Errorf("decoding into %T, which is no pointer", into)
	}
	if !utf8.Valid(data) {
		return attest.Errorf(attest.BadJSON, "the text is not valid UTF-8")
	}
	if !json.Valid(data) {
		return attest.Errorf(attest.BadJSON, "the text is not one JSON value")
	}
	if err := pairedSurrogates(data); err != nil {
		return err
	}
	w := walker{dec: json.NewDecoder(bytes.NewReader(data)), fields: map[reflect.Type]map[string]reflect.Type{}}
	w.dec.UseNumber()
	if err := w.value(target.Type(), 0); err != nil {
		return err
	}
	fresh := reflect.New(target.Type().Elem())
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	dec.UseNumber()
	if err := dec.Decode(fresh.Interface()); err != nil {
		return attest.Errorf(attest.BadJSON, "%w", err)
	}
	target.Elem().Set(fresh.Elem())
	return nil
}

// pairedSurrogates refuses \u escapes that are half a character: encoding/json
// replaces them silently. data is valid JSON, so a backslash starts an escape.
func pairedSurrogates(data []byte) error {
	for i := 0; i < len(data); i++ {
		if data[i] != '\\' {
			continue
		}
		i++
		if data[i] != 'u' {
			continue
		}
		r := hex4(data[i+1:])
		i += 4
		switch {
		case r < 0xd800 || r > 0xdfff:
		case r < 0xdc00 && bytes.HasPrefix(data[i+1:], []byte(`\u`)) && hex4(data[i+3:]) >= 0xdc00 && hex4(data[i+3:]) <= 0xdfff:
			i += 6
		default:
			return attest.Errorf(attest.BadJSON, "an escape names half a character (unpaired surrogate)")
		}
	}
	return nil
}

// hex4 reads the four digits that valid JSON has after \u.
func hex4(b []byte) uint64 {
	n, err := strconv.ParseUint(string(b[:4]), 16, 16)
	if err != nil {
		return 0
	}
	return n
}

// walker reads valid JSON beside the Go type that it is meant for.
type walker struct {
	dec    *json.Decoder
	fields map[reflect.Type]map[string]reflect.Type
}

// value checks the next value. A nil t says that nothing is known of its form.
func (w *walker) value(t reflect.Type, depth int) error {
	tok, err := w.dec.Token()
	if err != nil {
		return attest.Errorf(attest.BadJSON, "%w", err)
	}
	switch tok := tok.(type) {
	case json.Delim:
		if depth == maxDepth {
			return attest.Errorf(attest.BadJSON, "arrays and objects are nested more than %d deep", maxDepth)
		}
		if tok == '{' {
			return w.object(visible(t), depth+1)
		}
		return w.array(visible(t), depth+1)
	case json.Number:
		// A reader that takes numbers as float64 must not stumble over it.
		if _, err := strconv.ParseFloat(tok.String(), 64); err != nil {
			return attest.Errorf(attest.BadJSON, "number %s is out of range", clip(tok.String()))
		}
	}
	return nil
}

func (w *walker) array(t reflect.Type, depth int) error {
	var elem reflect.Type
	if t != nil && (t.Kind() == reflect.Slice || t.Kind() == reflect.Array) {
		elem = t.Elem()
	}
	for w.dec.More() {
		if err := w.value(elem, depth); err != nil {
			return err
		}
	}
	_, err := w.dec.Token()
	return err
}

func (w *walker) object(t reflect.Type, depth int) error {
	var known map[string]reflect.Type // nil: any name
	var elem reflect.Type
	switch {
	case t == nil:
	case t.Kind() == reflect.Struct:
		known = w.names(t)
	case t.Kind() == reflect.Map:
		elem = t.Elem()
	}
	seen := map[string]bool{}
	for w.dec.More() {
		tok, err := w.dec.Token()
		if err != nil {
			return attest.Errorf(attest.BadJSON, "%w", err)
		}
		name, _ := tok.(string)
		if f := fold(name); seen[f] {
			return attest.Errorf(attest.BadJSON, "name %q occurs twice in one object (case is ignored)", clip(name))
		} else {
			seen[f] = true
		}
		next := elem
		if known != nil {
			var ok bool
			if next, ok = known[name]; !ok {
				return attest.Errorf(attest.BadJSON, "name %q is not allowed here", clip(name))
			}
		}
		if err := w.value(next, depth); err != nil {
			return err
		}
	}
	_, err := w.dec.Token()
	return err
}

// names returns the JSON names of a struct's fields.
func (w *walker) names(t reflect.Type) map[string]reflect.Type {
	if n := w.fields[t]; n != nil {
		return n
	}
	n := map[string]reflect.Type{}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() || (f.Anonymous && name == "") {
			continue
		}
		if name == "" {
			name = f.Name
		}
		n[name] = f.Type
	}
	w.fields[t] = n
	return n
}

// visible returns the type whose form decides what JSON may say, or nil when t
// reads JSON itself or takes anything.
func visible(t reflect.Type) reflect.Type {
	for t != nil {
		p := reflect.PointerTo(t)
		if p.Implements(reflect.TypeFor[json.Unmarshaler]()) || p.Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
			return nil
		}
		if t.Kind() != reflect.Pointer {
			return t
		}
		t = t.Elem()
	}
	return nil
}

// fold maps names that encoding/json takes for one another to one: it compares
// by simple case folding, in which U+017F is an s and U+212A a k.
func fold(name string) string {
	return strings.Map(func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r {
				return next // the smallest of the orbit
			}
			r = next
		}
	}, name)
}

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 60
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
