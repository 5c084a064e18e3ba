package policy

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

// Pattern selects repositories. It names the registry's host letter by letter;
// of the path, a segment "*" stands for exactly one segment and "**" for any
// number: at the end for one or more, elsewhere for none or more (as gitignore
// reads them). A wildcard is always a whole segment, there is at most one "**",
// case counts, and there are no other special characters, so that a pattern has
// one meaning wherever it is read (attacks D15). The pattern "**" alone, every
// repository of every registry, is allowed for roles only.
type Pattern struct {
	text string
	toks []tok
	last int // index of the last wildcard's token in toks, -1 without one
}

// tok is what one or more segments of a repository must be.
type tok struct {
	kind tokKind
	text string // of a literal
}

type tokKind byte

const (
	literal tokKind = iota
	one             // exactly one segment
	many            // none or more segments
)

// The grammar of one segment is that of attest.ParseRepository.
var segmentPattern = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)

const maxSegments = 32

// everywhere is the pattern of every repository.
const everywhere = "**"

// ParsePattern reads a pattern; its errors say what a pattern may be.
func ParsePattern(s string) (Pattern, error) {
	if s == everywhere {
		return Pattern{s, []tok{{one, ""}, {many, ""}}, 0}, nil
	}
	if len(s) > 255 {
		return Pattern{}, fmt.Errorf("pattern is longer than 255 characters")
	}
	host, path, ok := strings.Cut(s, "/")
	if strings.Contains(host, "*") {
		return Pattern{}, fmt.Errorf("pattern %q must name the registry host, without wildcards", s)
	}
	// The host is judged by the one parser of repositories there is.
	if _, err := attest.ParseRepository(host + "/x"); err != nil || !ok {
		return Pattern{}, fmt.Errorf("pattern %q must be HOST/PATH in lower case, for example registry.example.com/team/*", s)
	}
	p := Pattern{text: s, toks: []tok{{literal, host}}, last: -1}
	segments := strings.Split(path, "/")
	if len(segments) > maxSegments {
		return Pattern{}, fmt.Errorf("pattern %q has more than %d segments", s, maxSegments)
	}
	for i, seg := range segments {
		if err := p.add(seg, i == len(segments)-1); err != nil {
			return Pattern{}, fmt.Errorf("pattern %q: %w", s, err)
		}
	}
	return p, nil
}

func (p *Pattern) add(seg string, end bool) error {
	switch {
	case seg == "*":
		p.last = len(p.toks)
		p.toks = append(p.toks, tok{one, ""})
	case seg == "**":
		if p.deep() {
			return fmt.Errorf(`"**" may stand only once`)
		}
		p.last = len(p.toks)
		if end {
			p.toks = append(p.toks, tok{one, ""})
		}
		p.toks = append(p.toks, tok{many, ""})
	case strings.Contains(seg, "*"):
		return fmt.Errorf("a wildcard must be a whole segment, not part of %q", seg)
	case !segmentPattern.MatchString(seg):
		return fmt.Errorf("segment %q is not lower-case letters, digits and single separators", seg)
	default:
		p.toks = append(p.toks, tok{literal, seg})
	}
	return nil
}

func (p Pattern) deep() bool {
	for _, t := range p.toks {
		if t.kind == many {
			return true
		}
	}
	return false
}

// String returns the pattern as written.
func (p Pattern) String() string { return p.text }

// Matches reports whether repo is selected: the whole of it, never a part
// (attacks B11).
func (p Pattern) Matches(repo attest.Repository) bool {
	_, ok := p.match(repo)
	return ok
}

// match returns what the last wildcard stands for in repo, "" without one.
func (p Pattern) match(repo attest.Repository) (name string, ok bool) {
	segs := strings.Split(string(repo), "/")
	// One token stands for each segment but for the one "**", which takes what
	// the others leave: there is only one way to match.
	spare := len(segs) - len(p.toks)
	if p.deep() {
		spare++
	}
	if spare < 0 || spare > 0 && !p.deep() {
		return "", false
	}
	i := 0
	var from, to int
	for k, t := range p.toks {
		n := 1
		if t.kind == many {
			n = spare
		}
		if t.kind == literal && segs[i] != t.text {
			return "", false
		}
		if k == p.last {
			from, to = i, i+n
		} else if p.last >= 0 && k == p.last+1 && t.kind == many {
			to = i + n // a final "**" is two tokens: one, and none or more
		}
		i += n
	}
	return strings.Join(segs[from:to], "/"), true
}

// named reports whether the last wildcard always stands for something, and for
// something that tells the images of this pattern apart: there is exactly one.
func (p Pattern) named() error {
	wild := 0
	for seg := range strings.SplitSeq(p.text, "/") {
		if strings.HasPrefix(seg, "*") {
			wild++
		}
	}
	switch {
	case p.last < 0:
		return fmt.Errorf("%q has no wildcard for {name} to stand for", p.text)
	case p.toks[p.last].kind == many:
		return fmt.Errorf("the last wildcard of %q may stand for nothing, so {name} could be empty", p.text)
	case wild > 1:
		return fmt.Errorf("%q has several wildcards and {name} is only the last, so two images could get one name", p.text)
	}
	return nil
}

// Overlaps reports whether some repository is selected by both. It is exact for
// names of any length and errs only towards true where no repository can be long
// enough (255 characters).
func (p Pattern) Overlaps(q Pattern) bool { return intersects(p.toks, q.toks) }

// intersects decides whether two token lists share a word, by walking both at
// once and remembering the pairs that were walked: at most len(a)·len(b) steps.
func intersects(a, b []tok) bool {
	type pair struct{ i, j int }
	seen := map[pair]bool{}
	var walk func(i, j int) bool
	walk = func(i, j int) bool {
		if i == len(a) && j == len(b) {
			return true
		}
		if seen[pair{i, j}] {
			return false
		}
		seen[pair{i, j}] = true
		if i < len(a) && a[i].kind == many {
			return walk(i+1, j) || j < len(b) && walk(i, j+1)
		}
		if j < len(b) && b[j].kind == many {
			return walk(i, j+1) || i < len(a) && walk(i+1, j)
		}
		if i == len(a) || j == len(b) {
			return false
		}
		same := a[i].kind == one || b[j].kind == one || a[i].text == b[j].text
		return same && walk(i+1, j+1)
	}
	return walk(0, 0)
}
