package policy

import (
	"errors"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// celRule asks anything that the facts of a decision can answer.
type celRule struct {
	expr    *condition
	message string
}

func (l *loader) cel(n *yaml.Node, _ *Stage) rule {
	r := &celRule{}
	ok := l.mapping(n, kindCEL, fields{
		"expr": func(n *yaml.Node) {
			var text string
			l.text("expr", &text)(n)
			r.expr = l.condition(l.cond.decision, n, text)
		},
		"message": l.text("message", &r.message),
	}, "expr", "message")
	if !ok {
		return nil
	}
	return r
}

func (r *celRule) kind() string  { return kindCEL }
func (r *celRule) carried() bool { return false }

func (r *celRule) spec() any {
	return struct {
		Expr    string `json:"expr"`
		Message string `json:"message"`
	}{r.expr.text, r.message}
}

// judge evaluates the expression over values, never over text that was spliced
// together (attacks K04).
func (r *celRule) judge(q *inquiry) attest.RuleResult {
	vars := q.vars()
	out := attest.RuleResult{Outcome: attest.OK, Required: r.message + ": " + r.expr.text}
	if len(q.accepted) > 0 {
		out.Record = q.accepted[0].ID()
	}
	err := r.expr.holds(vars)
	if err == nil {
		if len(q.accepted) > 0 {
			q.use(q.accepted[0].Evidence)
		}
		return out
	}
	_, out.Found = r.expr.unmet(vars, q.policy.types)
	out.Outcome, out.Reason, out.Next = attest.Fail, attest.RuleFailed, r.message
	if !errors.Is(err, errFalse) {
		out.Outcome, out.Reason = attest.Errored, attest.RuleError
		out.Found, out.Next = err.Error()+": "+orNothing(out.Found), "an expression that cannot be evaluated denies: ask with has(…) for what may be absent"
	}
	return out
}

// vars are what cel rules see.
func (q *inquiry) vars() map[string]any {
	ref := q.request.Ref
	p := &ProvenanceVars{}
	if len(q.accepted) > 0 {
		c := q.accepted[0]
		b, base := &c.inner.Claims, &c.inner.Base
		*p = ProvenanceVars{
			Source: b.SourceURI, SourceID: b.RepositoryID, Ref: b.Ref, Commit: b.Commit, WorkflowPath: b.WorkflowPath,
			Event: b.Event, Runner: b.Runner, Level: int64(c.level), Builder: c.said.RunDetails.Builder.ID,
			Environment: b.Environment, BaseResult: string(base.Result), BaseRepository: string(base.Repository),
		}
		if !base.Digest.IsZero() {
			p.BaseDigest = base.Digest.String()
		}
	}
	return map[string]any{
		"image":      &ImageVars{string(ref.Repository), ref.Digest.String(), q.name},
		"provenance": p, "caller": callerVars(q.request.Caller), "stage": q.stage, "track": q.track,
	}
}
