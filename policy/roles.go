package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// Role is what a caller may be allowed to do.
type Role string

// The roles. By default nobody holds any.
const (
	Signers   Role = "signers"   // sign images of the repositories
	Promoters Role = "promoters" // promote them
	Auditors  Role = "auditors"  // read their records
	Attesters Role = "attesters" // sign other evidence about them
	Importers Role = "importers" // record evidence that was signed elsewhere
)

// allRoles lists every role there is.
func allRoles() []Role { return []Role{Signers, Promoters, Auditors, Attesters, Importers} }

// entry is one line of a role: who, for which repositories.
type entry struct {
	role   Role
	name   string // for people; may be ""
	issuer string
	images []placed
	when   *condition
	signer *condition // of a signer: when over SignerVars; nil when it needs more
	until  time.Time  // the entry's first moment without effect; zero: none
	date   string     // until as written
	where  pos
}

// placed is a pattern with its place in the file.
type placed struct {
	Pattern
	where pos
}

func (l *loader) roles(n *yaml.Node, p *Policy) {
	f := fields{}
	for _, role := range allRoles() {
		f[string(role)] = func(n *yaml.Node) {
			l.list(n, string(role), func(c *yaml.Node) {
				if e := l.entry(c, role); e != nil {
					p.roles[role] = append(p.roles[role], e)
				}
			})
		}
	}
	l.mapping(n, "roles", f)
}

func (l *loader) entry(n *yaml.Node, role Role) *entry {
	e := &entry{role: role, where: l.at(n)}
	what := "an entry of " + string(role)
	ok := l.mapping(n, what, fields{
		"name":   l.text("name", &e.name),
		"issuer": l.issuer(&e.issuer),
		"images": l.patterns(&e.images, true),
		"when": func(n *yaml.Node) {
			var text string
			l.text("when", &text)(n)
			e.when = l.condition(l.cond.caller, n, text)
		},
		"until": func(n *yaml.Node) { e.until, e.date = l.date(n), n.Value },
	}, "issuer", "images", "when")
	if ok && role == Signers && l.known.Issuers[e.issuer] != attest.Workload {
		l.fail(n, "issuer %q is of kind %s: only workloads sign images", e.issuer, l.known.Issuers[e.issuer])
	}
	if !ok {
		return nil
	}
	if role == Signers {
		// Not a problem if it cannot be: then claims are asked instead.
		quiet := &loader{known: l.known, cond: l.cond, file: l.file}
		e.signer = quiet.condition(l.cond.signer, n, e.when.text)
	}
	return e
}

// issuer reads the name of a configured issuer.
func (l *loader) issuer(into *string) func(*yaml.Node) {
	return func(n *yaml.Node) {
		var s string
		if l.text("issuer", &s)(n); s == "" {
			return
		}
		if _, ok := l.known.Issuers[s]; !ok {
			l.fail(n, "issuer %q is not configured%s", clip(s), suggest(s, l.known.Issuers))
			return
		}
		*into = s
	}
}

// patterns reads a list of patterns; all admits that of every repository.
func (l *loader) patterns(into *[]placed, all bool) func(*yaml.Node) {
	return l.texts("images", func(n *yaml.Node, s string) {
		p, err := ParsePattern(s)
		if err == nil && s == everywhere && !all {
			err = fmt.Errorf("pattern %q must name the registry host: only roles may cover every repository", s)
		}
		if err != nil {
			l.fail(n, "%s", err)
			return
		}
		*into = append(*into, placed{p, l.at(n)})
	})
}

// date reads a day, which is included, in UTC.
func (l *loader) date(n *yaml.Node) time.Time {
	day, err := time.Parse(time.DateOnly, n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		l.fail(n, "until must be a day such as 2027-03-31, not %s", kindOf(n))
		return time.Time{}
	}
	return day.AddDate(0, 0, 1)
}

func (e *entry) covers(repo attest.Repository) bool {
	for _, p := range e.images {
		if p.Matches(repo) {
			return true
		}
	}
	return false
}

func (e *entry) expired(now time.Time) bool { return !e.until.IsZero() && !now.Before(e.until) }

// Allow is nil when id holds the role for repo: an entry of the role names its
// issuer, covers repo, has not ended, and its condition is true. Else
// ROLE_MISSING when no entry for the caller's issuer covers repo, or
// SOURCE_NOT_ALLOWED with what was wanted (the condition and its place) and what
// the caller's token says of the same claims. Entries for other issuers and
// repositories are never told.
func (p *Policy) Allow(role Role, id attest.Identity, repo attest.Repository) error {
	return p.allow(role, id, string(repo), func(e *entry) bool { return e.covers(repo) })
}

// AllowAll is Allow for every repository there may be: only entries for "**" count.
func (p *Policy) AllowAll(role Role, id attest.Identity) error {
	return p.allow(role, id, "all repositories", func(e *entry) bool {
		return slices.ContainsFunc(e.images, func(i placed) bool { return i.text == everywhere })
	})
}

func (p *Policy) allow(role Role, id attest.Identity, what string, covers func(*entry) bool) error {
	vars := map[string]any{"id": callerVars(id)}
	var near, ended *entry
	for _, e := range p.roles[role] {
		if e.issuer != id.IssuerName || !covers(e) {
			continue
		}
		met := e.when.holds(vars) == nil
		switch {
		case e.expired(p.known.Now()):
			if met {
				ended = e
			}
		case met:
			return nil
		case near == nil || e.when.met(vars) > near.when.met(vars):
			near = e
		}
	}
	switch {
	case ended != nil:
		return attest.Errorf(attest.RoleMissing, "the role %s for %s ended after %s (%s): ask for a new date in the policy", role, what, ended.date, ended.where)
	case near != nil:
		return p.notAllowed(role, near, what, vars)
	}
	return attest.Errorf(attest.RoleMissing, "%s of issuer %q does not hold the role %s for %s: nobody does unless the policy says so. Ask for an entry under roles.%s that covers it",
		display(id), id.IssuerName, role, what, role)
}

func display(id attest.Identity) string {
	if id.SAN != "" {
		return id.SAN
	}
	return fmt.Sprintf("%q", clip(id.Subject))
}

func (p *Policy) notAllowed(role Role, e *entry, what string, vars map[string]any) error {
	wanted, got := e.when.unmet(vars, p.types)
	return attest.Errorf(attest.SourceNotAllowed, "the role %s for %s wants %s (%s); the token has %s", role, what, wanted, e.when.where, orNothing(got)).
		With("wanted", e.when.text+" ("+e.when.where.String()+")").
		With("got", e.when.mentioned(vars, p.types)).
		With("claims", e.when.checks(vars, p.types)).
		With("role", string(role))
}

func orNothing(s string) string {
	if s == "" {
		return "nothing that would change it"
	}
	return s
}

// Grant is a role that a caller holds, and the patterns of the repositories that
// it holds it for.
type Grant struct {
	Role   Role
	Images []Pattern
}

// Covers reports whether the grant covers repo.
func (g Grant) Covers(repo attest.Repository) bool {
	return slices.ContainsFunc(g.Images, func(p Pattern) bool { return p.Matches(repo) })
}

// Grants returns the roles that id holds, each once, in the order of allRoles.
func (p *Policy) Grants(id attest.Identity) []Grant {
	vars := map[string]any{"id": callerVars(id)}
	var out []Grant
	for _, role := range allRoles() {
		g := Grant{Role: role}
		for _, e := range p.roles[role] {
			if e.issuer != id.IssuerName || e.expired(p.known.Now()) || e.when.holds(vars) != nil {
				continue
			}
			for _, i := range e.images {
				g.Images = append(g.Images, i.Pattern)
			}
		}
		if len(g.Images) > 0 {
			out = append(out, g)
		}
	}
	return out
}

// When returns a condition that admits exactly the workflow or person behind id
// and nothing else of its issuer, for people to put into a policy. It is "" when
// the token says too little for one.
func When(id attest.Identity) string {
	v := callerVars(id)
	claims := [][2]string{{"repository_id", v.RepositoryID}, {"ref", v.Ref}, {"workflow_path", v.WorkflowPath}}
	if v.RepositoryID == "" {
		claims[0] = [2]string{"source", v.Source}
	}
	if id.Kind == attest.Person || claims[0][1] == "" {
		claims = [][2]string{{"subject", v.Subject}}
	}
	var out []string
	for _, c := range claims {
		if c[1] != "" {
			out = append(out, fmt.Sprintf("id.%s == %s", c[0], quoteCEL(c[1])))
		}
	}
	return strings.Join(out, " && ")
}

// quoteCEL writes a CEL string literal that holds s, whatever it is: a claim
// must never become code (attacks K04).
func quoteCEL(s string) string {
	var b strings.Builder
	b.WriteByte('\'')
	for _, r := range s {
		switch {
		case r == '\'' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('\'')
	return b.String()
}
