package policy

import (
	"errors"
	"fmt"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

// signedByRule asks for an image signature by an identity: one that this service
// has signed for a job of a configured issuer, or one that was made elsewhere and
// imported under a foreign root.
type signedByRule struct {
	issuer string // name in the configuration; "" when root is given
	url    string // its iss
	root   string // name of a foreign root in the configuration; "" when issuer is given
	when   *condition
}

func (l *loader) signedBy(n *yaml.Node, _ *Stage) rule {
	r := &signedByRule{}
	var when *yaml.Node
	var text string
	given := func(key string) bool {
		for i := 0; n.Kind == yaml.MappingNode && i < len(n.Content); i += 2 {
			if n.Content[i].Value == key {
				return true
			}
		}
		return false
	}
	switch {
	case n.Kind != yaml.MappingNode: // noted below
	case given("issuer") && given("root"):
		l.fail(n, "signed_by has both issuer, for what this service signs, and root, for what was imported: write a rule for each")
	case !given("issuer") && !given("root"):
		l.fail(n, `signed_by has no "issuer", and no "root" in its place`)
	}
	ok := l.mapping(n, kindSignedBy, fields{
		"issuer": l.issuer(&r.issuer),
		"root":   l.root(&r.root),
		"when":   func(n *yaml.Node) { when = n; l.text("when", &text)(n) },
	}, "when")
	if !ok || given("issuer") == given("root") {
		return nil
	}
	env := l.cond.signer
	if given("root") {
		env = l.cond.foreign
	}
	if r.when = l.condition(env, when, text); r.when == nil {
		return nil
	}
	r.url = l.known.IssuerURLs[r.issuer]
	return r
}

// root reads the name of a configured foreign root.
func (l *loader) root(into *string) func(*yaml.Node) {
	return func(n *yaml.Node) {
		var s string
		if l.text("root", &s)(n); s == "" {
			return
		}
		if !l.known.Roots[s] {
			l.fail(n, "foreign root %q is not configured%s", clip(s), suggest(s, l.known.Roots))
			return
		}
		*into = s
	}
}

func (r *signedByRule) kind() string  { return kindSignedBy }
func (r *signedByRule) carried() bool { return true }

func (r *signedByRule) spec() any {
	return struct {
		Issuer string `json:"issuer"`
		URL    string `json:"issuer_url"`
		Root   string `json:"root,omitempty"`
		When   string `json:"when"`
	}{r.issuer, r.url, r.root, r.when.text}
}

// judge passes when one signature over the digest is by the issuer and its
// certificate meets the condition.
func (r *signedByRule) judge(q *inquiry) attest.RuleResult {
	if r.root != "" {
		return r.judgeForeign(q)
	}
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
	out.Found = "a signature by " + few(found)
	out.Next = "sign it in the job that the rule names, or correct the rule"
	return out
}

func (r *signedByRule) admits(issuer string, vars map[string]any) error {
	if issuer != r.url {
		return errors.New("another issuer")
	}
	return r.when.holds(vars)
}

// few joins what was found, of many the newest.
func few(found []string) string {
	const most = 3
	if n := len(found); n > most {
		found = append(found[:most:most], fmt.Sprintf("and %d more", n-most))
	}
	return strings.Join(found, "; ")
}

// imported is an image signature that was made elsewhere.
type imported struct {
	*verifier.Evidence
	said attest.Import
}

// whose renders the signer for people.
func (i *imported) whose() string {
	return i.said.Signer.Under(i.said.Root)
}

// judgeForeign passes when one imported signature verified under the rule's root and
// its signer meets the condition. Other roots vouch for nothing here: a name that one
// of them certifies may be anybody under another (attacks D13).
func (r *signedByRule) judgeForeign(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Outcome: attest.OK, Required: "an imported signature under root " + r.root + " where " + r.when.text}
	var found, others []string
	for _, i := range q.imports {
		if i.said.Root != r.root {
			others = append(others, i.whose())
			continue
		}
		vars := map[string]any{"id": foreignVars(i.said.Signer)}
		if r.when.holds(vars) == nil {
			out.Found, out.Record = i.whose(), i.ID()
			q.use(i.Evidence)
			return out
		}
		_, got := r.when.unmet(vars, q.policy.types)
		found = append(found, i.whose()+" ("+orNothing(got)+")")
	}
	out.Outcome = attest.Fail
	out.Next = "have it signed there and import it: hallmark import " + q.request.Ref.String()
	switch {
	case len(found) > 0:
		out.Reason, out.Found = attest.SignerMismatch, "an imported signature by "+few(found)
	case len(others) > 0:
		out.Reason, out.Found = attest.RootMismatch, "an imported signature by "+few(others)
	default:
		out.Reason, out.Found = attest.NotSigned, "no imported signature over this digest"
	}
	if len(q.imports) > 0 {
		out.Record = q.imports[0].ID()
	}
	return out
}
