package attest

import (
	"reflect"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// Bounds of what a caller may say of its own.
const (
	maxCallerFacts = 32
	maxFactValue   = 1024 // bytes
)

var factName = regexp.MustCompile(`^[a-z][a-z0-9_.-]{0,62}$`)

// verifiedNames are what a caller's fact may not be called, beside the fields of
// Build: a reader could take it for something that this service verified.
var verifiedNames = []string{
	"actor", "base", "basedigest", "baseimage", "baseimagedigest", "buildid", "buildnumber", "buildtype", "buildurl", "identity",
	"image", "issuer", "san", "signer", "source", "sourceid", "sourceuri", "subject", "token",
}

// verifiedWords are not even part of a name: "git_sha" says commit as well.
var verifiedWords = []string{
	"approved", "approver", "attested", "branch", "builder", "commit", "digest", "gitcommit", "invocation", "level", "pipeline",
	"proven", "provenance", "ref", "repo", "repository", "revision", "run", "sha", "signed", "slsa", "stage", "verified", "workflow",
}

var wordBreak = regexp.MustCompile(`[_.-]+`)

// CheckCallerFacts accepts what a caller says of its own: at most 32 facts with
// short printable values, none named like a fact that tokens or the registry
// prove. CALLER_FACTS_REFUSED for a name that says commit, builder, run or another
// of those (design promise 2, attacks B07); BAD_REQUEST for the form.
func CheckCallerFacts(facts map[string]string) error {
	if len(facts) > maxCallerFacts {
		return Errorf(BadRequest, "%d facts: give at most %d", len(facts), maxCallerFacts)
	}
	for name, value := range facts {
		switch {
		case !factName.MatchString(name):
			return Errorf(BadRequest, "fact %q: a name is lower-case letters, digits, '_', '.' and '-', at most 63, beginning with a letter", clip(name))
		case reservedFact(name):
			return Errorf(CallerFactsRefused, "fact %q: that is taken from the verified token and the registry, not from the caller: leave it out, or call it something that no reader takes for verified", name)
		case value == "" || len(value) > maxFactValue:
			return Errorf(BadRequest, "fact %q: its value is empty or has more than %d bytes", name, maxFactValue)
		case strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }):
			return Errorf(BadRequest, "fact %q: its value has a control or unprintable character", name)
		}
	}
	return nil
}

func reservedFact(name string) bool {
	plain := func(s string) string { return wordBreak.ReplaceAllString(s, "") }
	if strings.HasPrefix(plain(name), "hallmark") || slices.Contains(verifiedNames, plain(name)) || slices.Contains(verifiedWords, plain(name)) {
		return true
	}
	for _, word := range wordBreak.Split(name, -1) {
		if slices.Contains(verifiedWords, word) {
			return true
		}
	}
	t := reflect.TypeFor[Build]()
	for i := range t.NumField() {
		field, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if plain(field) == plain(name) {
			return true
		}
	}
	return false
}
