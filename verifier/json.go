package verifier

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

// maxDepth bounds how deep arrays and objects may be nested: a statement with the
// deepest predicate that is signed.
const maxDepth = attest.MaxPredicateDepth + 1

// Decode is a strict JSON decoder for bytes that somebody else wrote: it accepts
// only what every parser reads alike (attest.StrictJSON; attacks D03, D04, D09),
// nested at most 129 deep, and only names that into has, compared exactly, where
// encoding/json ignores case. Inside a json.RawMessage any name may stand. It
// returns BAD_JSON, and then into is not touched.
func Decode(data []byte, into any) error {
	target := reflect.ValueOf(into)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return fmt.Errorf("decoding into %T, which is no pointer", into)
	}
	if err := attest.StrictJSON(data, maxDepth); err != nil {
		return err
	}
	w := walker{dec: json.NewDecoder(bytes.NewReader(data)), fields: map[reflect.Type]map[string]reflect.Type{}}
	w.dec.UseNumber()
	if err := w.value(target.Type()); err != nil {
		return err
	}
	fresh := reflect.New(target.Type().Elem())
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(fresh.Interface()); err != nil {
		return attest.Errorf(attest.BadJSON, "%w", err)
	}
	target.Elem().Set(fresh.Elem())
	return nil
}

// walker compares the names of JSON that StrictJSON has passed with those of the
// Go type that it is meant for.
type walker struct {
	dec    *json.Decoder
	fields map[reflect.Type]map[string]reflect.Type
}

// value checks the next value.
func (w *walker) value(t reflect.Type) error {
	t = visible(t)
	if t == nil {
		var skipped json.RawMessage
		return w.dec.Decode(&skipped)
	}
	tok, err := w.dec.Token()
	if err != nil {
		return attest.Errorf(attest.BadJSON, "%w", err)
	}
	switch tok {
	case json.Delim('{'):
		return w.object(t)
	case json.Delim('['):
		return w.array(t)
	}
	return nil
}

func (w *walker) array(t reflect.Type) error {
	elem := reflect.TypeFor[any]()
	if t.Kind() == reflect.Slice || t.Kind() == reflect.Array {
		elem = t.Elem()
	}
	for w.dec.More() {
		if err := w.value(elem); err != nil {
			return err
		}
	}
	_, err := w.dec.Token()
	return err
}

func (w *walker) object(t reflect.Type) error {
	var known map[string]reflect.Type // nil: any name
	next := reflect.TypeFor[any]()
	switch t.Kind() {
	case reflect.Struct:
		known = w.names(t)
	case reflect.Map:
		next = t.Elem()
	}
	for w.dec.More() {
		tok, err := w.dec.Token()
		if err != nil {
			return attest.Errorf(attest.BadJSON, "%w", err)
		}
		if known != nil {
			name, _ := tok.(string)
			var ok bool
			if next, ok = known[name]; !ok {
				return attest.Errorf(attest.BadJSON, "name %q is not allowed here", clip(name))
			}
		}
		if err := w.value(next); err != nil {
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
	for {
		p := reflect.PointerTo(t)
		if t.Kind() == reflect.Interface || p.Implements(reflect.TypeFor[json.Unmarshaler]()) || p.Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
			return nil
		}
		if t.Kind() != reflect.Pointer {
			return t
		}
		t = t.Elem()
	}
}

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 60
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
