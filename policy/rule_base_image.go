package policy

import (
	"cmp"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// How a base must be known.
const (
	proofLayers   = "layers"   // its layers are the image's first layers: the default
	proofAttested = "attested" // that, or provenance by one of the named foreign signers names it
	proofClaimed  = "claimed"  // somebody says so, and nothing contradicts it
)

// baseImageRule asks which image an image was built on.
type baseImageRule struct {
	allowed []placed
	proof   string
	words   []word // whose attestation counts
	scratch bool   // also admit an image that is said to be built from nothing
}

func (l *loader) baseImage(n *yaml.Node, _ *Stage) rule {
	r := &baseImageRule{proof: proofLayers}
	ok := l.mapping(n, kindBaseImage, fields{
		"allowed":       l.patterns(&r.allowed, false),
		"proof":         l.oneOf("proof", &r.proof, proofLayers, proofAttested, proofClaimed),
		"attested_by":   l.words(&r.words),
		"allow_scratch": l.flag("allow_scratch", &r.scratch),
	}, "allowed")
	switch {
	case !ok:
		return nil
	case r.proof == proofAttested && len(r.words) == 0:
		// What was signed elsewhere counts for rules that name its signer, and for no other.
		l.fail(n, "base_image with proof: attested needs attested_by: a list of {root, when} that says whose provenance counts")
		return nil
	case r.proof != proofAttested && len(r.words) > 0:
		l.fail(n, "base_image has attested_by, which only proof: attested heeds")
		return nil
	}
	return r
}

// word is whose attestation of a base counts. A root alone is nobody: public ones
// certify whoever asks (attacks D13).
type word struct {
	root string // name of a foreign root in the configuration
	when *condition
}

// words reads a list of at least one word.
func (l *loader) words(into *[]word) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
			l.fail(n, "attested_by is empty")
			return
		}
		l.list(n, "attested_by", func(n *yaml.Node) {
			var w word
			var when *yaml.Node
			var text string
			ok := l.mapping(n, "an entry of attested_by", fields{
				"root": l.root(&w.root),
				"when": func(n *yaml.Node) { when = n; l.text("when", &text)(n) },
			}, "root", "when")
			if !ok {
				return
			}
			if w.when = l.condition(l.cond.foreign, when, text); w.when != nil {
				*into = append(*into, w)
			}
		})
	}
}

func (w word) String() string { return "under root " + w.root + " where " + w.when.text }

// admits reports whether an attestation under a root by a signer counts.
func (w word) admits(root string, signer attest.Foreigner) bool {
	return w.root == root && w.when.holds(map[string]any{"id": foreignVars(signer)}) == nil
}

func (r *baseImageRule) kind() string  { return kindBaseImage }
func (r *baseImageRule) carried() bool { return true }

func (r *baseImageRule) spec() any {
	type attester struct {
		Root string `json:"root"`
		When string `json:"when"`
	}
	var by []attester
	for _, w := range r.words {
		by = append(by, attester{w.root, w.when.text})
	}
	return struct {
		Allowed    []string   `json:"allowed"`
		Proof      string     `json:"proof"`
		AttestedBy []attester `json:"attested_by,omitempty"`
		Scratch    bool       `json:"allow_scratch"`
	}{texts(r.allowed), r.proof, by, r.scratch}
}

// judge takes the newest accepted provenance that says anything of a base: one
// that says nothing takes nothing back. What an annotation claims is the pusher's
// word and proves nothing (attacks D12).
func (r *baseImageRule) judge(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Outcome: attest.Fail, Reason: attest.BaseUnproven, Required: r.required()}
	for i, c := range q.accepted {
		base := c.inner.Base
		if base.Result == attest.Unclaimed {
			continue
		}
		// A contradiction is taken back by a proof and not by somebody's word.
		if older := slices.IndexFunc(q.accepted[i:], shown); older > 0 && q.accepted[i+older].inner.Base.Result == attest.Contradicted {
			c = q.accepted[i+older]
			base = c.inner.Base
		}
		out.Record = c.ID()
		if out.Reason, out.Found, out.Next = r.weigh(q, base); out.Reason == "" {
			out.Outcome = attest.OK
			q.use(c.Evidence)
		}
		return out
	}
	if len(q.accepted) == 0 {
		out.Found = "no accepted provenance that could name the base"
		out.Next = "mend what the provenance rule says first"
		return out
	}
	out.Found, out.Record = "no base that anybody names", q.accepted[0].ID()
	out.Next = nameIt(q, r.scratch)
	return out
}

// shown reports whether the layers say anything of the base.
func shown(c *claimed) bool {
	return c.inner.Base.Result.Proven() || c.inner.Base.Result == attest.Contradicted
}

// nameIt says how to sign an image again with its base.
func nameIt(q *inquiry, scratch bool) string {
	s := "sign it again and name it: hallmark sign " + q.request.Ref.String() + " --base REF"
	if scratch {
		s += ", or --base scratch when it has none"
	}
	return s
}

// weigh says why base is not admitted, "" when it is, what was found and what to do.
func (r *baseImageRule) weigh(q *inquiry, base attest.Base) (reason attest.Reason, found, next string) {
	found = base.String() + " (" + string(base.Result) + ")"
	switch {
	case base.Result == attest.Contradicted:
		return attest.BaseContradicted, found, "the layers are not those of the base that is claimed: rebuild, or sign it again with the true --base"
	case base.Result == attest.Scratch && r.scratch:
		return "", "built from nothing, by the word of its job (SCRATCH)", ""
	case base.Result == attest.Scratch:
		return attest.BaseUnproven, "built from nothing, by the word of its job (SCRATCH)", "build on an allowed base, or let the rule say allow_scratch: true"
	case base.Result == attest.Attested && r.proof == proofAttested && !r.vouched(base):
		return attest.BaseUnproven, found + ", by " + cmp.Or(few(attesters(base)), "nobody"), "nobody whom the rule names under attested_by attests it: import the provenance of somebody who is named before signing, or name a base whose layers prove it"
	case !r.enough(base):
		return attest.BaseUnproven, found, "name a base in a registry that the service reads, so that its layers can be compared: hallmark sign … --base REF"
	case r.allows(base.Repository):
		return "", found, ""
	}
	// Nothing tells bases with the same layers apart: one that is allowed is in the
	// image, whoever else publishes the same.
	if base.Result.Proven() {
		for _, e := range base.Equivalents {
			if r.allows(e.Repository) {
				return "", e.String() + ", whose layers are those of " + found, ""
			}
		}
	}
	return attest.BaseNotAllowed, found, "build on an allowed base, or add this one to the rule"
}

// enough reports whether the base is known as well as the rule asks.
func (r *baseImageRule) enough(base attest.Base) bool {
	switch base.Result {
	case attest.ProvenLayers, attest.ProvenDiffIDs, attest.Matched:
		return true
	case attest.Attested:
		// To whom proof: claimed is enough, a root's word is as well.
		return r.proof == proofAttested || r.proof == proofClaimed
	case attest.Claimed:
		return r.proof == proofClaimed
	}
	return false
}

// vouched reports whether somebody whom the rule names attests the base: root and
// signer of one and the same claim.
func (r *baseImageRule) vouched(base attest.Base) bool {
	return slices.ContainsFunc(base.Claims, func(c attest.BaseClaim) bool {
		return attests(c, base) && slices.ContainsFunc(r.words, func(w word) bool { return w.admits(c.Root, c.Signer) })
	})
}

func attests(c attest.BaseClaim, base attest.Base) bool {
	return c.From == attest.BaseFromAttestation && c.Result == attest.Attested && c.Digest == base.Digest
}

// attesters renders who attests the base, for people.
func attesters(base attest.Base) []string {
	var out []string
	for _, c := range base.Claims {
		if attests(c, base) {
			out = append(out, c.Signer.Under(c.Root))
		}
	}
	return out
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
	switch r.proof {
	case proofLayers:
		return s + ", proved by its layers"
	case proofAttested:
		words := make([]string, len(r.words))
		for i, w := range r.words {
			words[i] = w.String()
		}
		return s + ", proved by its layers or attested " + strings.Join(words, " or ")
	}
	return s + ", proved or claimed"
}
