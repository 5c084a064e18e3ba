package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// provenanceRule asks where a digest was built from, and how well that is known.
type provenanceRule struct {
	sourceID string   // id of the source repository, "" for any
	source   string   // its URI, may hold {name}; "" for any
	refs     []string // exact, or ending in /* (one segment) or /** (any); none for any
	builders []string // exact builder ids; none for any
	minLevel int      // SLSA build level; 0 for any
	minGrade attest.Grade
}

func (l *loader) provenance(n *yaml.Node, s *Stage) rule {
	r := &provenanceRule{}
	var grade string
	ok := l.mapping(n, kindProvenance, fields{
		"source_id": l.text("source_id", &r.sourceID),
		"source": func(n *yaml.Node) {
			l.text("source", &r.source)(n)
			l.checkSource(n, r.source, s)
		},
		"refs": l.texts("refs", func(n *yaml.Node, ref string) {
			l.checkRef(n, ref)
			r.refs = append(r.refs, ref)
		}),
		"builders":  l.texts("builders", func(_ *yaml.Node, id string) { r.builders = append(r.builders, id) }),
		"min_level": l.number("min_level", 1, 3, &r.minLevel),
		"min_grade": l.oneOf("min_grade", &grade,
			string(attest.GradeCaller), string(attest.GradeAttested), string(attest.GradeSource), string(attest.GradeRegistry), string(attest.GradeClaim)),
	})
	if !ok {
		return nil
	}
	if r.sourceID == "" && r.source == "" {
		l.fail(n, "provenance needs source_id or source: without them any repository's build would pass")
		return nil
	}
	r.minGrade = attest.Grade(grade)
	return r
}

// checkSource demands a URI as claims spell it: names are compared letter by
// letter (attacks B12).
func (l *loader) checkSource(n *yaml.Node, source string, s *Stage) {
	rest := strings.ReplaceAll(source, "{name}", "x")
	switch {
	case source == "":
		return // noted where it was read
	case !strings.HasPrefix(source, "https://") || strings.ContainsAny(rest, "{}*%@?# ") || strings.HasSuffix(source, "/") || strings.HasSuffix(source, ".git"):
		l.fail(n, "source %q must be the repository's https URL as the token has it, for example https://github.com/acme/{name}", clip(source))
	case strings.Contains(source, "{name}"):
		for _, p := range s.track.images {
			if err := p.named(); err != nil {
				l.fail(n, "source %q: %s", clip(source), err)
			}
		}
	}
}

func (l *loader) checkRef(n *yaml.Node, ref string) {
	body := strings.TrimSuffix(strings.TrimSuffix(ref, "/**"), "/*")
	if !strings.HasPrefix(ref, "refs/") || strings.ContainsAny(body, "*?[\\ ") {
		l.fail(n, "ref %q must be a full name such as refs/heads/main, or end in /* for one segment or /** for any", clip(ref))
	}
}

func (r *provenanceRule) kind() string  { return kindProvenance }
func (r *provenanceRule) carried() bool { return true }

func (r *provenanceRule) spec() any {
	return struct {
		SourceID string       `json:"source_id"`
		Source   string       `json:"source"`
		Refs     []string     `json:"refs"`
		Builders []string     `json:"builders"`
		MinLevel int          `json:"min_level"`
		MinGrade attest.Grade `json:"min_grade"`
	}{r.sourceID, r.source, r.refs, r.builders, r.minLevel, r.minGrade}
}

func (r *provenanceRule) judge(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Outcome: attest.Fail, Required: r.required(q.name)}
	if len(q.provenances) == 0 {
		out.Reason, out.Found = attest.NoProvenance, "no provenance of this digest"
		out.Next = "sign it in the CI job that builds it: hallmark sign " + q.request.Ref.String()
		return out
	}
	if q.conflict != "" {
		out.Reason, out.Found = attest.ProvenanceConflict, "provenances that disagree: "+q.conflict
		out.Record = q.provenances[0].ID()
		out.Next = "find out which build is wrong; a build that is bit-for-bit reproducible may say reproducible: true in its track"
		return out
	}
	if len(q.accepted) > 0 {
		best := q.accepted[0]
		q.use(best.Evidence)
		out.Outcome, out.Found, out.Record = attest.OK, best.summary(), best.ID()
		return out
	}
	return r.refuse(q, out)
}

// refuse says what the newest provenance lacks.
func (r *provenanceRule) refuse(q *inquiry, out attest.RuleResult) attest.RuleResult {
	for _, c := range q.provenances {
		lack := r.meets(q, c)
		if lack == nil {
			continue
		}
		out.Reason, out.Found, out.Record = lack.reason, lack.found, c.ID()
		out.Next = "build and sign it where the rule asks, or correct the rule"
		if lack.next != "" {
			out.Next = lack.next
		}
		return out
	}
	out.Reason, out.Found = attest.SourceMismatch, "no single provenance that meets all provenance rules of the stage"
	out.Next = "build and sign it once in a way that all of them admit"
	return out
}

// lack is what a provenance has instead of what was asked.
type lack struct {
	reason      attest.Reason
	found, next string
}

// meets is nil when the provenance is bound to its signer and has all that the
// rule asks.
func (r *provenanceRule) meets(q *inquiry, c *claimed) *lack {
	if err := q.policy.bound(c); err != nil {
		return &lack{reason: attest.SourceMismatch, found: err.Error(), next: "do not trust this record: report it to the operator"}
	}
	b := &c.inner.Claims
	source := strings.ReplaceAll(r.source, "{name}", q.name)
	builder := c.said.RunDetails.Builder.ID
	switch {
	case !b.HasSource():
		return &lack{
			reason: attest.SourceMismatch, found: "source " + attest.SourceUnknown + ": the token names no commit",
			next: "sign in a job whose token names repository and commit: docs/identity says which do",
		}
	case r.sourceID != "" && b.RepositoryID != r.sourceID:
		return &lack{reason: attest.SourceMismatch, found: "source_id " + orUnknown(b.RepositoryID) + " (" + orUnknown(b.SourceURI) + ")"}
	case r.source != "" && b.SourceURI != source:
		return &lack{reason: attest.SourceMismatch, found: "source " + orUnknown(b.SourceURI), next: respell(b.SourceURI, source)}
	case len(r.refs) > 0 && !slices.ContainsFunc(r.refs, func(p string) bool { return matchRef(p, b.Ref) }):
		return &lack{reason: attest.SourceMismatch, found: "ref " + orUnknown(b.Ref)}
	case len(r.builders) > 0 && !slices.Contains(r.builders, builder):
		return &lack{reason: attest.SourceMismatch, found: "builder " + orUnknown(builder)}
	case c.level < r.minLevel:
		return &lack{reason: attest.LevelTooLow, found: fmt.Sprintf("SLSA build level %d by %s", c.level, orUnknown(builder)), next: "build on a hosted runner: a runner that its tenant controls counts as level 1"}
	case r.minGrade.Rank() > 0 && c.grade().Rank() < r.minGrade.Rank():
		return &lack{reason: attest.GradeTooLow, found: "the commit is known by " + orUnknown(string(c.grade()))}
	}
	return nil
}

func respell(got, want string) string {
	if strings.EqualFold(got, want) {
		return "the names differ only in case: write the source in the rule as " + got
	}
	return ""
}

// bound says whether a provenance was signed by whom it describes (attacks D10).
// The verifier makes no evidence of one whose claims are not those of its
// signer's certificate; here the signer's issuer must be one that is configured,
// the statement must name it, and the builder must be the one that this service
// gives to the certificate's runner.
func (p *Policy) bound(c *claimed) error {
	signer, said := c.Signer(), &c.inner
	if !slices.Contains(p.issuerURLs, signer.Issuer) {
		return fmt.Errorf("its signer's issuer %s is not configured", orUnknown(signer.Issuer))
	}
	if said.Token.Issuer != signer.Issuer {
		return fmt.Errorf("it says issuer %s, its signer's certificate says %s", orUnknown(said.Token.Issuer), signer.Issuer)
	}
	if got := c.said.RunDetails.Builder.ID; !attest.BuilderFits(p.known.Service, got, said.Token.Provider, said.Claims) {
		return fmt.Errorf("it says builder %s, which is not that of %s", orUnknown(got), orUnknown(signer.Build.SignerURI))
	}
	return nil
}

// grade is that of the git dependency that names the source and its commit; ""
// when there is none.
func (c *claimed) grade() attest.Grade {
	uri, commit := c.inner.Claims.SourceURI, c.inner.Claims.Commit
	if uri == "" || commit == "" {
		return ""
	}
	for i, d := range c.said.BuildDefinition.ResolvedDependencies {
		if d.URI == "git+"+uri && d.Digest["gitCommit"] == commit {
			return c.said.Grade("/predicate/buildDefinition/resolvedDependencies/" + strconv.Itoa(i))
		}
	}
	return ""
}

// matchRef matches the whole of a ref (attacks B11).
func matchRef(pattern, ref string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "**"); ok {
		return strings.HasPrefix(ref, prefix) && len(ref) > len(prefix)
	}
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		rest, ok := strings.CutPrefix(ref, prefix)
		return ok && rest != "" && !strings.Contains(rest, "/")
	}
	return pattern == ref
}

func (r *provenanceRule) required(name string) string {
	parts := []string{"a provenance"}
	if r.sourceID != "" {
		parts = append(parts, "from source_id "+r.sourceID)
	}
	if r.source != "" {
		parts = append(parts, "from "+strings.ReplaceAll(r.source, "{name}", name))
	}
	if len(r.refs) > 0 {
		parts = append(parts, "ref "+strings.Join(r.refs, " or "))
	}
	if len(r.builders) > 0 {
		parts = append(parts, "builder "+strings.Join(r.builders, " or "))
	}
	if r.minLevel > 0 {
		parts = append(parts, "SLSA build level "+strconv.Itoa(r.minLevel))
	}
	if r.minGrade != "" {
		parts = append(parts, "commit known by "+string(r.minGrade))
	}
	return strings.Join(parts, ", ")
}
