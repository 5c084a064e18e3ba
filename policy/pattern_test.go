package policy_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/policy"
)

func TestPatternMatches(t *testing.T) {
	for _, row := range []struct {
		name, pattern, repo string
		want                bool
	}{
		{"literal", "r.io/a/b", "r.io/a/b", true},
		{"B11 a part of the path", "r.io/a/b", "r.io/a/b/c", false},
		{"B11 the path inside another", "r.io/a/b", "r.io/x/a/b", false},
		{"B11 the host as a suffix", "r.io/*", "evil-r.io/a", false},
		{"B11 the host as a prefix", "r.io/*", "r.io.evil.com/a", false},
		{"B12 the port counts", "r.io/*", "r.io:443/a", false},
		{"one segment", "r.io/a/*", "r.io/a/b", true},
		{"D15 * is not two segments", "r.io/a/*", "r.io/a/b/c", false},
		{"D15 * is not none", "r.io/a/*", "r.io/a", false},
		{"D15 a final ** is one or more", "r.io/a/**", "r.io/a", false},
		{"** one", "r.io/a/**", "r.io/a/b", true},
		{"** many", "r.io/a/**", "r.io/a/b/c/d", true},
		{"** none inside", "r.io/**/b", "r.io/b", true},
		{"** some inside", "r.io/**/b", "r.io/x/y/b", true},
		{"** then *", "r.io/**/*/z", "r.io/z", false},
		{"** then * with one", "r.io/**/*/z", "r.io/y/z", true},
		{"everything", "**", "other.example.com:5000/x", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			p, err := policy.ParsePattern(row.pattern)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Matches(attest.Repository(row.repo)); got != row.want {
				t.Errorf("%q matches %q: %v, want %v", row.pattern, row.repo, got, row.want)
			}
		})
	}
}

func TestPatternGrammar(t *testing.T) {
	for _, row := range []struct{ name, pattern, want string }{
		{"no host", "payments/*", "must be HOST/PATH"},
		{"B12 upper case", "r.io/Payments", "lower-case"},
		{"B12 homoglyph", "r.io/pаyments", "lower-case"},
		{"D15 wildcard host", "*/a", "must name the registry host"},
		{"D15 wildcard in the host", "*.r.io/a", "must name the registry host"},
		{"D15 part of a segment", "r.io/app-*", "whole segment"},
		{"D15 three stars", "r.io/***", "whole segment"},
		{"D15 two **", "r.io/**/a/**", "only once"},
		{"D15 question mark", "r.io/a?", "lower-case"},
		{"D15 brackets", "r.io/[ab]", "lower-case"},
		{"D15 braces", "r.io/{a,b}", "lower-case"},
		{"D15 parent", "r.io/../a", "lower-case"},
		{"D15 empty segment", "r.io//a", "lower-case"},
		{"D15 trailing slash", "r.io/a/", "lower-case"},
		{"D15 percent", "r.io/%2a", "lower-case"},
		{"only a host", "r.io", "must be HOST/PATH"},
		{"empty", "", "must be HOST/PATH"},
		{"tag", "r.io/a:1", "lower-case"},
		{"too deep", "r.io" + strings.Repeat("/a", 33), "more than 32"},
		{"too long", "r.io/" + strings.Repeat("a", 255), "longer than 255"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := policy.ParsePattern(row.pattern); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("ParsePattern(%q) = %v, want an error with %q", row.pattern, err, row.want)
			}
		})
	}
}

// Two patterns overlap exactly when some name over a small alphabet is matched by
// both: brute force over every such name up to five segments decides.
func TestOverlapsIsBruteForce(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	names := words(5)
	for range 3000 {
		a, b := randomPattern(rng), randomPattern(rng)
		want := false
		for _, n := range names {
			want = want || a.Matches(n) && b.Matches(n)
		}
		if got := a.Overlaps(b); got != want {
			t.Fatalf("%s overlaps %s: %v, brute force says %v", a, b, got, want)
		}
		if a.Overlaps(b) != b.Overlaps(a) {
			t.Fatalf("%s and %s: overlapping is not mutual", a, b)
		}
	}
}

// words returns every repository of r.io with 1 to most segments of a, b, c. The
// patterns name only a and b, so that c stands for every other name.
func words(most int) []attest.Repository {
	last := []string{"r.io"}
	var out []attest.Repository
	for range most {
		var next []string
		for _, w := range last {
			for _, s := range []string{"a", "b", "c"} {
				next = append(next, w+"/"+s)
				out = append(out, attest.Repository(w+"/"+s))
			}
		}
		last = next
	}
	return out
}

// randomPattern returns one of at most three segments, so that any overlap shows
// in names of five.
func randomPattern(rng *rand.Rand) policy.Pattern {
	for {
		s := "r.io"
		for range 1 + rng.IntN(3) {
			s += "/" + []string{"a", "b", "*", "**"}[rng.IntN(4)]
		}
		if p, err := policy.ParsePattern(s); err == nil {
			return p
		}
	}
}
