package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

// Request is what a stage decides on.
type Request struct {
	Ref      attest.ImageRef
	Evidence []*verifier.Evidence // about the digest, in the order of the log; others are passed over
	Caller   attest.Identity      // who asks
	Before   Before               // what the stage named by After holds
	Version  string               // for the target's {version}; "" takes the verified tag
	Now      time.Time            // of the decision; for role entries that end
}

// Before is the newest DONE promotion of the stage that a digest must be in
// first; zero when there is none.
type Before struct {
	Digest attest.Digest
	Record attest.RecordID
	Since  time.Time
}

// Verdict is what the rules found. It is allowed only if there is at least one
// result and none of them denies.
type Verdict struct {
	Results []attest.RuleResult
	Allowed bool
	Level   int                  // SLSA build level of the accepted provenance; 0 without one
	Used    []*verifier.Evidence // what the passed rules rest on, each once
	Summary string               // source, ref, short commit and run of the accepted provenance; "" without one
	Target  string               // HOST/PATH:TAG that a promotion writes; "" for none
}

// rule is one line of a stage's rules.
type rule interface {
	kind() string                     // its key in the policy
	spec() any                        // all that its judgement depends on, for the stage digest
	carried() bool                    // whether later stages judge it again
	judge(*inquiry) attest.RuleResult // of which the caller fills in the rule's name
}

// The kinds of rule.
const (
	kindSignedBy   = "signed_by"
	kindProvenance = "provenance"
	kindBaseImage  = "base_image"
	kindCEL        = "cel"
)

// rule reads one rule of s: a mapping of its kind to its settings. A new rule is
// a file with its type, and a line here.
func (l *loader) rule(n *yaml.Node, s *Stage) {
	add := func(read func(*yaml.Node, *Stage) rule) func(*yaml.Node) {
		return func(v *yaml.Node) {
			if r := read(v, s); r != nil {
				s.own = append(s.own, placedRule{r, s.Name, l.at(n)})
			}
		}
	}
	if n.Kind == yaml.MappingNode && len(n.Content) != 2 {
		l.fail(n, "a rule is one kind with its settings: this has %d", len(n.Content)/2)
		return
	}
	l.mapping(n, "a rule", fields{
		kindSignedBy:   add(l.signedBy),
		kindProvenance: add(l.provenance),
		kindBaseImage:  add(l.baseImage),
		kindCEL:        add(l.cel),
	})
}

// inquiry is one decision on its way: what the rules share.
type inquiry struct {
	policy      *Policy
	track, name string // the track's name, and what {name} stands for
	stage       string
	request     Request
	signatures  []*verifier.Evidence // that cover the digest, newest first
	imports     []*imported          // signatures made elsewhere, the same
	provenances []*claimed           // the same
	accepted    []*claimed           // provenances that meet every provenance rule, newest first
	conflict    string               // what provenances disagree about; "" when they agree
	used        []*verifier.Evidence
}

// claimed is a provenance with what it says, read once.
type claimed struct {
	*verifier.Evidence
	said  attest.Provenance
	inner attest.InternalParameters // of said
	level int
}

// newInquiry sorts the evidence. What does not cover the digest does not count,
// nor what was signed for another repository, for which other callers may sign
// (attacks M03), and an image signature is exactly a statement of cosign's signature type: any
// other predicate by the same signer is none (attacks D01, D06).
func (p *Policy) newInquiry(req Request) *inquiry {
	q := &inquiry{policy: p, request: req}
	for _, e := range slices.Backward(req.Evidence) {
		if e == nil || !e.Covers(req.Ref.Digest) || !slices.Contains(e.Names(), string(req.Ref.Repository)) {
			continue
		}
		switch e.PredicateType() {
		case attest.PredicateSignature:
			q.signatures = append(q.signatures, e)
		case attest.PredicateImport:
			// Of what was imported only image signatures are asked for by any rule.
			if said, ok := e.Imported(); ok && said.PredicateType == attest.PredicateSignature {
				q.imports = append(q.imports, &imported{e, said})
			}
		case attest.PredicateProvenance:
			if said, ok := e.Provenance(); ok {
				level := attest.BuildLevel(p.known.Service, said.RunDetails.Builder.ID)
				q.provenances = append(q.provenances, &claimed{e, said, said.Internal(), level})
			}
		}
	}
	return q
}

// Decide judges whether the digest may be promoted to the stage. It applies the
// stage's effective rules: its own, and of every stage before it along After the
// signed_by, provenance and base_image rules once more, because evidence may have
// come since that contradicts what was decided then. A cel rule is judged at its
// own stage only. After itself demands that the digest is what the stage before
// holds. A rule that panics or cannot be evaluated denies.
func (s *Stage) Decide(req Request) Verdict {
	q := s.policy.newInquiry(req)
	q.track, q.stage = s.track.Name, s.Name
	name, ok := s.track.match(req.Ref.Repository)
	if !ok {
		return q.verdict([]attest.RuleResult{{
			Rule: "track", Outcome: attest.Fail, Reason: attest.TrackUnknown,
			Required: "an image of track " + s.track.Name, Found: string(req.Ref.Repository),
		}})
	}
	q.name = name
	q.accept(s)

	var results []attest.RuleResult
	if s.After != "" {
		results = append(results, s.judgeAfter(q))
	}
	for _, r := range s.effective {
		results = append(results, r.result(q))
	}
	v := q.verdict(results)
	return s.aim(v, q)
}

// accept finds the provenances that meet all provenance rules of s, and whether
// there are some that contradict each other.
func (q *inquiry) accept(s *Stage) {
	for _, c := range q.provenances {
		meets := true
		for _, r := range s.effective {
			if pr, ok := r.rule.(*provenanceRule); ok {
				meets = meets && pr.meets(q, c) == nil
			}
		}
		if meets {
			q.accepted = append(q.accepted, c)
		}
	}
	if !s.track.Reproducible {
		q.conflict = q.conflicting()
	}
}

// conflicting says which sources or commits the provenances of the digest
// disagree about, "" when all agree. Those that were signed for this repository
// count and those that are accepted; a provenance that somebody signed for a copy
// in a repository of theirs does not, or it could stop everybody's promotions.
func (q *inquiry) conflicting() string {
	var origins []string
	for _, c := range q.provenances {
		if !slices.Contains(c.Names(), string(q.request.Ref.Repository)) && !slices.Contains(q.accepted, c) {
			continue
		}
		if o := c.origin(); !slices.Contains(origins, o) {
			origins = append(origins, o)
		}
	}
	if len(origins) < 2 {
		return ""
	}
	return strings.Join(origins, "; ")
}

// origin names source and commit, by the id of the repository where there is one:
// a renamed repository is the same.
func (c *claimed) origin() string {
	b := &c.inner.Claims
	source := b.SourceURI
	if b.RepositoryID != "" {
		source = "repository " + b.RepositoryID
	}
	return printable(source + " at commit " + orUnknown(b.Commit))
}

// result judges one rule. A rule can fail in every way that code can, and none
// of them lets a digest through (attacks K05).
func (r placedRule) result(q *inquiry) (out attest.RuleResult) {
	defer func() {
		if p := recover(); p != nil {
			out = attest.RuleResult{
				Outcome: attest.Errored, Reason: attest.RuleError,
				Found: "the rule could not be evaluated", Next: "this is a fault of the service: report it with the decision's number",
			}
		}
		out.Rule = r.kind()
		if out.Required != "" {
			out.Required += " (" + r.where.String() + ")"
		}
		// Text from claims ends on terminals and pages (attacks J04).
		out.Required, out.Found, out.Next = printable(out.Required), printable(out.Found), printable(out.Next)
	}()
	return r.judge(q)
}

func (s *Stage) judgeAfter(q *inquiry) attest.RuleResult {
	r := attest.RuleResult{Rule: "after", Outcome: attest.OK, Required: "to be in " + s.After + " first (" + s.where.String() + ")"}
	b := q.request.Before
	if !b.Digest.IsZero() && b.Digest == q.request.Ref.Digest {
		r.Found, r.Record = "in "+s.After+" since "+attest.Time(b.Since), b.Record
		return r
	}
	r.Outcome, r.Reason = attest.Fail, attest.StageSkipped
	r.Found = "nothing there"
	if !b.Digest.IsZero() {
		r.Found, r.Record = "sha256:"+b.Digest.Short()+"… there", b.Record
	}
	r.Next = "hallmark promote " + q.request.Ref.String() + " --to-stage " + s.After
	return r
}

// verdict sums up results.
func (q *inquiry) verdict(results []attest.RuleResult) Verdict {
	v := Verdict{Results: results, Allowed: len(results) > 0, Used: q.used}
	for _, r := range results {
		if r.Outcome != attest.OK && r.Outcome != attest.Warn {
			v.Allowed = false
		}
	}
	if len(q.accepted) > 0 {
		v.Level, v.Summary = q.accepted[0].level, q.accepted[0].summary()
	}
	return v
}

// aim adds the target, or the reason why it cannot be named.
func (s *Stage) aim(v Verdict, q *inquiry) Verdict {
	into, tag, err := s.Target(q.request.Ref.Repository, s.version(q))
	if err == nil && into != "" {
		v.Target = string(into) + ":" + tag
	}
	if err != nil {
		v.Allowed = false
		v.Results = append(v.Results, attest.RuleResult{
			Rule: "target", Outcome: attest.Fail, Reason: attest.ReasonOf(err),
			Required: s.target.text + " (" + s.where.String() + ")", Found: message(err), Next: "hallmark promote … --version V",
		})
	}
	return v
}

// version is what was asked for, else the tag refs/tags/v… that the accepted
// provenance was built from.
func (s *Stage) version(q *inquiry) string {
	if q.request.Version != "" || len(q.accepted) == 0 {
		return q.request.Version
	}
	if tag, ok := strings.CutPrefix(q.accepted[0].inner.Claims.Ref, "refs/tags/"); ok && strings.HasPrefix(tag, "v") {
		return tag
	}
	return ""
}

// use notes that the verdict rests on e.
func (q *inquiry) use(e *verifier.Evidence) {
	if !slices.Contains(q.used, e) {
		q.used = append(q.used, e)
	}
}

// summary returns "acme/payments main 4be1d0c run 9912": for people.
func (c *claimed) summary() string {
	b := &c.inner.Claims
	source := b.Repository
	if source == "" {
		source = b.SourceURI
	}
	ref := strings.TrimPrefix(strings.TrimPrefix(b.Ref, "refs/heads/"), "refs/tags/")
	parts := []string{orUnknown(source), ref, b.Commit[:min(7, len(b.Commit))]}
	if b.RunID != "" {
		parts = append(parts, "run "+b.RunID)
	}
	return printable(strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " "))
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// message is the text of err for people, without its reason code.
func message(err error) string {
	var e *attest.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return err.Error()
}

// printable makes text safe to show on a terminal: bounded, one line, no control
// or invisible characters.
func printable(s string) string {
	const most = 2000
	if len(s) > most {
		s = s[:most] + "…"
	}
	if !strings.ContainsFunc(s, func(r rune) bool { return (r < ' ' || r > '~') && !unicode.IsPrint(r) }) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// whose renders a signer for people.
func whose(s verifier.Signer) string { return fmt.Sprintf("%s by issuer %s", s.SAN, s.Issuer) }
