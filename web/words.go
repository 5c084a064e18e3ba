package web

import (
	"html/template"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
)

// words are what the templates say about values: those of the client's text
// (design section 7), so that a denial reads the same wherever it is read.
var words = template.FuncMap{
	"short":   func(d attest.Digest) string { return "sha256:" + d.Hex()[:4] + "…" },
	"when":    func(t time.Time) string { return t.UTC().Format("2 Jan 2006 15:04 UTC") },
	"machine": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"verdict": func(v gate.Verdict) string { return strings.ToUpper(string(v)) },
	"mark":    mark,
	"passed":  passed,
	"failed":  failed,
	"found":   found,
	"image":   func(r attest.ImageRef) string { return r.Repository.Path() + "@sha256:" + r.Digest.Hex()[:4] + "…" },
	"claimed": func(b attest.Base) bool { return b.Repository != "" },
	"graded":  func(b attest.Base) attest.Grade { return b.Result.Grade() },
	"signers": verdictOn,
	"facet":   func(f attest.Facts, name string) string { return f.Get(name) },
	"decided": func(k attest.RecordKind) bool { return k == attest.KindPromotion || k == attest.KindDenial },
}

// mark is how an outcome looks in the client's text.
func mark(o attest.Outcome) string {
	switch o {
	case attest.OK:
		return "ok"
	case attest.Warn:
		return "!"
	}
	return "x"
}

// found says what a rule needs and what there is, as the client does.
func found(r attest.RuleResult) string {
	switch {
	case r.Outcome == attest.Errored && r.Found == "":
		return "could not be judged"
	case r.Outcome == attest.Errored || r.Required == "":
		return r.Found
	case r.Found == "":
		return "needs " + r.Required
	}
	return "needs " + r.Required + ", has " + r.Found
}

func failed(d gate.Decision) []attest.RuleResult { return split(d, false) }

func passed(d gate.Decision) []attest.RuleResult { return split(d, true) }

func split(d gate.Decision, ok bool) []attest.RuleResult {
	var out []attest.RuleResult
	for _, r := range d.Results {
		if (r.Outcome == attest.OK) == ok {
			out = append(out, r)
		}
	}
	return out
}
