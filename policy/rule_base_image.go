package policy

import (
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// How a base must be known.
const (
	proofLayers  = "layers"  // its layers are the image's first layers: the default
	proofClaimed = "claimed" // somebody says so, and nothing contradicts it
)

// baseImageRule asks which image an image was built on.
type baseImageRule struct {
	allowed []placed
	proof   string
	scratch bool // also admit an image of which nobody names a base
}

func (l *loader) baseImage(n *yaml.Node, _ *Stage) rule {
	r := &baseImageRule{proof: proofLayers}
	ok := l.mapping(n, kindBaseImage, fields{
		"allowed":       l.patterns(&r.allowed, false),
		"proof":         l.oneOf("proof", &r.proof, proofLayers, proofClaimed),
		"allow_scratch": l.flag("allow_scratch", &r.scratch),
	}, "allowed")
	if !ok {
		return nil
	}
	return r
}

func (r *baseImageRule) kind() string  { return kindBaseImage }
func (r *baseImageRule) carried() bool { return true }

func (r *baseImageRule) spec() any {
	return struct {
		Allowed []string `json:"allowed"`
		Proof   string   `json:"proof"`
		Scratch bool     `json:"allow_scratch"`
	}{texts(r.allowed), r.proof, r.scratch}
}

// judge takes the newest accepted provenance that says anything of a base: one
// that says nothing takes nothing back. What an annotation claims is the pusher's
// word and proves nothing (attacks D12).
func (r *baseImageRule) judge(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Outcome: attest.Fail, Required: r.required()}
	for _, c := range q.accepted {
		base := c.inner.Base
		if base.Result == attest.Unclaimed {
			continue
		}
		out.Record, out.Found = c.ID(), base.String()+" ("+string(base.Result)+")"
		out.Reason, out.Next = r.against(base)
		if out.Reason == "" {
			out.Outcome = attest.OK
			q.use(c.Evidence)
		}
		return out
	}
	switch {
	case len(q.accepted) == 0:
		out.Reason, out.Found = attest.BaseUnproven, "no accepted provenance that could name the base"
		out.Next = "mend what the provenance rule says first"
	case r.scratch:
		out.Outcome, out.Found, out.Record = attest.OK, "no base that anybody names", q.accepted[0].ID()
		q.use(q.accepted[0].Evidence)
	default:
		out.Reason, out.Found, out.Record = attest.BaseUnproven, "no base that anybody names", q.accepted[0].ID()
		out.Next = "sign it again and name it: hallmark sign " + q.request.Ref.String() + " --base REF"
	}
	return out
}

// against says why base is not admitted, "" when it is.
func (r *baseImageRule) against(base attest.Base) (attest.Reason, string) {
	proven := base.Result == attest.ProvenLayers
	switch {
	case base.Result == attest.Contradicted:
		return attest.BaseContradicted, "the layers are not those of the base that is claimed: rebuild, or sign it again with the true --base"
	case !proven && (base.Result != attest.Claimed || r.proof != proofClaimed):
		return attest.BaseUnproven, "name a base in a registry that the service reads, so that its layers can be compared: hallmark sign … --base REF"
	case !r.allows(base.Repository):
		return attest.BaseNotAllowed, "build on an allowed base, or add this one to the rule"
	}
	return "", ""
}

func (r *baseImageRule) allows(repo attest.Repository) bool {
	for _, p := range r.allowed {
		if p.Matches(repo) {
			return true
		}
	}
	return false
}

func (r *baseImageRule) required() string {
	s := "a base from " + strings.Join(texts(r.allowed), " or ")
	if r.scratch {
		s += ", or none"
	}
	if r.proof == proofLayers {
		return s + ", proved by its layers"
	}
	return s + ", proved or claimed"
}
