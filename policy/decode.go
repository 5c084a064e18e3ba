package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// pos is where in the policy something stands, for people.
type pos struct {
	file string
	line int
}

func (p pos) String() string { return p.file + ":" + strconv.Itoa(p.line) }

// maxProblems bounds how many problems one load reports.
const maxProblems = 20

// loader reads the files of one policy and collects what is wrong with them, so
// that a person can mend everything at once. It is used by one goroutine.
type loader struct {
	known    Known
	cond     *environments
	file     string // being read
	problems []string
	first    pos
}

func (l *loader) at(n *yaml.Node) pos { return pos{l.file, n.Line} }

// fail notes a problem at n.
func (l *loader) fail(n *yaml.Node, format string, args ...any) {
	l.failAt(l.at(n), format, args...)
}

func (l *loader) failAt(p pos, format string, args ...any) {
	if len(l.problems) == 0 {
		l.first = p
	}
	if len(l.problems) < maxProblems {
		l.problems = append(l.problems, p.String()+": "+fmt.Sprintf(format, args...))
	}
}

// err returns BAD_POLICY with every problem, one on a line, or nil.
func (l *loader) err() error {
	if len(l.problems) == 0 {
		return nil
	}
	return attest.Errorf(attest.BadPolicy, "%s", strings.Join(l.problems, "\n")).
		With("file", l.first.file).With("line", strconv.Itoa(l.first.line))
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// parse returns the one mapping of a file, or nil after noting why not.
func (l *loader) parse(text []byte) *yaml.Node {
	top := &yaml.Node{Line: 1}
	if !utf8.Valid(text) {
		l.fail(top, "file is not UTF-8 text")
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		l.fail(top, "file is empty")
		return nil
	} else if err != nil {
		l.syntax(err)
		return nil
	}
	if err := dec.Decode(&more); err == nil {
		l.fail(&more, "a second document starts here: write one document per file")
		return nil
	} else if !errors.Is(err, io.EOF) {
		l.syntax(err)
		return nil
	}
	root := doc.Content[0]
	if !l.plain(root) {
		return nil
	}
	return root
}

func (l *loader) syntax(err error) {
	line := 1
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil && m[1] != "" {
		line, _ = strconv.Atoi(m[1]) // digits, by the pattern
	}
	l.fail(&yaml.Node{Line: line}, "not YAML: %s", yamlLine.ReplaceAllString(err.Error(), ""))
}

// plain refuses what could make a small file large or one text mean two things:
// anchors, aliases, merge keys and explicit tags (attacks J03).
func (l *loader) plain(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		l.fail(n, "anchors (&) and aliases (*) are not allowed: write the value out, in quotes if it starts with * or &")
	case n.Style&yaml.TaggedStyle != 0:
		l.fail(n, "tags (!) are not allowed")
	default:
		for _, c := range n.Content {
			if !l.plain(c) {
				return false
			}
		}
		return true
	}
	return false
}

// fields says how each key of a mapping is read.
type fields map[string]func(*yaml.Node)

// mapping reads n as a mapping with exactly these keys, each at most once and of
// which required ones must be there. It returns false after noting a problem.
func (l *loader) mapping(n *yaml.Node, what string, f fields, required ...string) bool {
	if n.Kind != yaml.MappingNode {
		l.fail(n, "%s must be a mapping of keys to values, not %s", what, kindOf(n))
		return false
	}
	before := len(l.problems)
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		read, ok := f[key.Value]
		if !ok {
			l.fail(key, "unknown key %q in %s%s", clip(key.Value), what, suggest(key.Value, f))
			continue
		}
		if line, twice := seen[key.Value]; twice {
			l.fail(key, "key %q stands twice in %s (first on line %d)", key.Value, what, line)
			continue
		}
		seen[key.Value] = key.Line
		read(value)
	}
	for _, r := range required {
		if _, ok := seen[r]; !ok {
			l.fail(n, "%s has no %q", what, r)
		}
	}
	return len(l.problems) == before
}

// list reads n as a list, which may be empty.
func (l *loader) list(n *yaml.Node, what string, each func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		l.fail(n, "%s must be a list, not %s", what, kindOf(n))
		return
	}
	for _, c := range n.Content {
		each(c)
	}
}

// text reads a string that is not empty: an empty expectation would match a claim
// that is not there (attacks A23).
func (l *loader) text(what string, into *string) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
			l.fail(n, "%s must be text, not %s: write it in quotes", what, kindOf(n))
			return
		}
		if strings.TrimSpace(n.Value) == "" {
			l.fail(n, "%s is empty", what)
			return
		}
		*into = n.Value
	}
}

// texts reads a list of at least one string.
func (l *loader) texts(what string, each func(*yaml.Node, string)) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
			l.fail(n, "%s is empty", what)
			return
		}
		l.list(n, what, func(c *yaml.Node) {
			var s string
			if l.text("an entry of "+what, &s)(c); s != "" {
				each(c, s)
			}
		})
	}
}

func (l *loader) number(what string, least, most int, into *int) func(*yaml.Node) {
	return func(n *yaml.Node) {
		v, err := strconv.Atoi(n.Value)
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil || v < least || v > most {
			l.fail(n, "%s must be a whole number from %d to %d, not %s", what, least, most, kindOf(n))
			return
		}
		*into = v
	}
}

func (l *loader) flag(what string, into *bool) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || n.Value != "true" && n.Value != "false" || n.ShortTag() != "!!bool" {
			l.fail(n, "%s must be true or false, not %s", what, kindOf(n))
			return
		}
		*into = n.Value == "true"
	}
}

// oneOf reads one of the given words.
func (l *loader) oneOf(what string, into *string, words ...string) func(*yaml.Node) {
	return func(n *yaml.Node) {
		var s string
		if l.text(what, &s)(n); s == "" {
			return
		}
		if !slices.Contains(words, s) {
			l.fail(n, "%s must be one of %s, not %q", what, strings.Join(words, ", "), clip(s))
			return
		}
		*into = s
	}
}

// kindOf describes a node in an error.
func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!null":
		return "nothing"
	case "!!str":
		return strconv.Quote(clip(n.Value))
	}
	return clip(n.Value)
}

// suggest returns what key may have been meant to be.
func suggest[T any](key string, known map[string]T) string {
	best, dist := "", 3
	names := make([]string, 0, len(known))
	for name := range known {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if d := distance(strings.ToLower(clip(key)), name); d < dist && d < len(name) {
			best, dist = name, d
		}
	}
	if best != "" {
		return fmt.Sprintf(": did you mean %q?", best)
	}
	return ": known are " + strings.Join(names, ", ")
}

// distance is the number of letters to insert, delete or replace.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			diagonal, row[j] = row[j], min(row[j]+1, row[j-1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
