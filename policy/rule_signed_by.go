package policy

import (
	"errors"
	"fmt"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// signedByRule asks for an image signature by an identity.
type signedByRule struct {
	issuer string // name in the configuration
	url    string // its iss
	when   *condition
}

func (l *loader) signedBy(n *yaml.Node, _ *Stage) rule {
	r := &signedByRule{}
	ok := l.mapping(n, kindSignedBy, fields{
		"issuer": l.issuer(&r.issuer),
		"when": func(n *yaml.Node) {
			var text string
			l.text("when", &text)(n)
			r.when = l.condition(l.cond.signer, n, text)
		},
	}, "issuer", "when")
	if !ok {
		return nil
	}
	r.url = l.known.IssuerURLs[r.issuer]
	return r
}

func (r *signedByRule) kind() string  { return kindSignedBy }
func (r *signedByRule) carried() bool { return true }

func (r *signedByRule) spec() any {
	return struct {
		Issuer string `json:"issuer"`
		URL    string `json:"issuer_url"`
		When   string `json:"when"`
	}{r.issuer, r.url, r.when.text}
}

// judge passes when one signature over the digest is by the issuer and its
// certificate meets the condition.
func (r *signedByRule) judge(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Outcome: attest.OK, Required: "a signature by issuer " + r.issuer + " where " + r.when.text}
	if len(q.signatures) == 0 {
		out.Outcome, out.Reason = attest.Fail, attest.NotSigned
		out.Found, out.Next = "no signature over this digest", "sign it in the CI job that builds it: hallmark sign "+q.request.Ref.String()
		return out
	}
	var found []string
	for _, e := range q.signatures {
		signer := e.Signer()
		vars := map[string]any{"id": signerVars(r.issuer, signer)}
		switch err := r.admits(signer.Issuer, vars); {
		case err == nil:
			out.Found, out.Record = whose(signer), e.ID()
			q.use(e)
			return out
		case signer.Issuer != r.url:
			found = append(found, whose(signer)+" ("+err.Error()+")")
		default:
			_, got := r.when.unmet(vars, q.policy.types)
			found = append(found, whose(signer)+" ("+orNothing(got)+")")
		}
	}
	out.Outcome, out.Reason, out.Record = attest.Fail, attest.SignerMismatch, q.signatures[0].ID()
	const most = 3
	if n := len(found); n > most {
		found = append(found[:most], fmt.Sprintf("and %d more", n-most))
	}
	out.Found = "a signature by " + strings.Join(found, "; ")
	out.Next = "sign it in the job that the rule names, or correct the rule"
	return out
}

func (r *signedByRule) admits(issuer string, vars map[string]any) error {
	if issuer != r.url {
		return errors.New("another issuer")
	}
	return r.when.holds(vars)
}
