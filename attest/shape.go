package attest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// shape is what a JSON value has to look like. It is checked token by token: a
// predicate of many megabytes is never held as a tree. Names are compared exactly,
// where encoding/json would take them in other case too.
type shape struct {
	is      kind
	members map[string]*shape // of an object; those that are not named may be anything
	need    []string          // names that the object must have
	closed  bool              // it may have no others than members
	entries *shape            // of a list; nil: anything
	some    bool              // the list has at least one
	// text says what is wrong with a text or a number, whole with an object: "" is
	// nothing. whole is given the object's members; those that are no text, number or
	// boolean are "".
	text  func(string) string
	whole func(map[string]string) string
}

// kind is a kind of JSON value, or several of them.
type kind int

const (
	anObject kind = 1 << iota
	aList
	aText
	aNumber
	aBoolean
	aNull
	anything = anObject | aList | aText | aNumber | aBoolean | aNull
)

func (k kind) String() string {
	var names []string
	for i, name := range []string{"an object", "a list", "a text", "a number", "true or false", "null"} {
		if k&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, " or ")
}

var free = &shape{is: anything}

// fits checks a value that StrictJSON has passed. PREDICATE_INVALID names the place
// in it that is wrong.
func (s *shape) fits(data []byte) error {
	w := walk{dec: json.NewDecoder(bytes.NewReader(data))}
	w.dec.UseNumber()
	_, err := w.value(s)
	return err
}

// walk is where the checking of a value has arrived.
type walk struct {
	dec  *json.Decoder
	path []any // names of members and indexes of entries
}

// wrong says what is wrong here.
func (w *walk) wrong(format string, args ...any) error {
	return Errorf(PredicateInvalid, "%s %s", jsonPath(w.path...), fmt.Sprintf(format, args...)).With("path", jsonPath(w.path...))
}

var plainName = regexp.MustCompile(`^[A-Za-z_$][A-Za-z0-9_$]{0,63}$`)

// jsonPath renders a place in a JSON value (RFC 9535, normalized paths, with the
// short form for plain names).
func jsonPath(steps ...any) string {
	var b strings.Builder
	b.WriteByte('$')
	for _, step := range steps {
		switch s := step.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", s)
		case string:
			if plainName.MatchString(s) {
				b.WriteString("." + s)
				continue
			}
			b.WriteString("[" + strconv.QuoteToASCII(clip(s)) + "]")
		}
	}
	return b.String()
}

// value checks the next value and returns it as text if it is a scalar.
func (w *walk) value(s *shape) (string, error) {
	t, err := w.dec.Token()
	if err != nil {
		return "", Errorf(BadJSON, "JSON cannot be read")
	}
	is, text := kindOfToken(t)
	if s.is&is == 0 {
		return "", w.wrong("is %s, not %s", is, s.is)
	}
	switch is {
	case anObject:
		return "", w.object(s)
	case aList:
		return "", w.list(s)
	case aText, aNumber:
		if s.text == nil {
			break
		}
		if why := s.text(text); why != "" {
			return "", w.wrong("%s", why)
		}
	}
	return text, nil
}

func kindOfToken(t json.Token) (kind, string) {
	switch v := t.(type) {
	case json.Delim:
		if v == '{' {
			return anObject, ""
		}
		return aList, ""
	case string:
		return aText, v
	case json.Number:
		return aNumber, v.String()
	case bool:
		return aBoolean, strconv.FormatBool(v)
	}
	return aNull, ""
}

func (w *walk) list(s *shape) error {
	entry := s.entries
	if entry == nil {
		entry = free
	}
	n := 0
	for ; w.dec.More(); n++ {
		w.path = append(w.path, n)
		if _, err := w.value(entry); err != nil {
			return err
		}
		w.path = w.path[:len(w.path)-1]
	}
	if s.some && n == 0 {
		return w.wrong("is empty")
	}
	return w.close()
}

func (w *walk) object(s *shape) error {
	members := map[string]string{}
	for w.dec.More() {
		t, err := w.dec.Token()
		if err != nil {
			return Errorf(BadJSON, "JSON cannot be read")
		}
		name, _ := t.(string)
		w.path = append(w.path, name)
		member, known := s.members[name]
		switch {
		case known:
		case s.closed:
			return w.wrong("is not part of this predicate type")
		default:
			member = free
		}
		text, err := w.value(member)
		if err != nil {
			return err
		}
		if known {
			members[name] = text
		}
		w.path = w.path[:len(w.path)-1]
	}
	for _, name := range s.need {
		if _, ok := members[name]; !ok {
			w.path = append(w.path, name)
			return w.wrong("is missing")
		}
	}
	if s.whole != nil {
		if why := s.whole(members); why != "" {
			return w.wrong("%s", why)
		}
	}
	return w.close()
}

// close reads the end of an object or list.
func (w *walk) close() error {
	if _, err := w.dec.Token(); err != nil {
		return Errorf(BadJSON, "JSON cannot be read")
	}
	return nil
}

// What the schemas below are made of.

func object(need string, members map[string]*shape) *shape {
	return &shape{is: anObject, members: members, need: strings.Fields(need)}
}

func closed(need string, members map[string]*shape) *shape {
	s := object(need, members)
	s.closed = true
	return s
}

func list(entry *shape) *shape { return &shape{is: aList, entries: entry} }

func text(ok func(string) string) *shape { return &shape{is: aText, text: ok} }

func oneOf(values ...string) func(string) string {
	return func(s string) string {
		if slices.Contains(values, s) {
			return ""
		}
		return fmt.Sprintf("is %q, not one of %s", clip(s), strings.Join(values, ", "))
	}
}

func matching(pattern, like string) func(string) string {
	re := regexp.MustCompile(pattern)
	return func(s string) string {
		if re.MatchString(s) {
			return ""
		}
		return fmt.Sprintf("is %q, not like %s", clip(s), like)
	}
}

// filled accepts every text that is not empty.
func filled(s string) string {
	if s == "" {
		return "is empty"
	}
	return ""
}
