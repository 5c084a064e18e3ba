package policy

import (
	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

// DecideSigned judges without a stage: whether the digest has a signature and a
// provenance by a configured signer, one that an entry of the signers role admits
// for the repository at req.Now.
func (p *Policy) DecideSigned(req Request) Verdict {
	q := p.newInquiry(req)
	for _, c := range q.provenances {
		if p.bound(c) == nil && p.admits(q, c.Evidence, c) {
			q.accepted = append(q.accepted, c)
		}
	}
	if t, err := p.Track(req.Ref.Repository, ""); err != nil || !t.Reproducible {
		q.conflict = q.conflicting()
	}
	return q.verdict([]attest.RuleResult{p.judgeSignature(q), p.judgeProvenance(q)})
}

const configuredSigner = "by a signer that roles.signers admits for this repository"

func (p *Policy) judgeSignature(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Rule: kindSignedBy, Outcome: attest.OK, Required: "a signature " + configuredSigner}
	for _, e := range q.signatures {
		if p.admits(q, e, q.sameSigner(e)) {
			out.Found, out.Record = printable(whose(e.Signer())), e.ID()
			q.use(e)
			return out
		}
	}
	out.Outcome, out.Reason, out.Found = attest.Fail, attest.NotSigned, "no signature over this digest"
	out.Next = "sign it in the CI job that builds it: hallmark sign " + q.request.Ref.String()
	if len(q.signatures) > 0 {
		out.Reason, out.Record = attest.SignerMismatch, q.signatures[0].ID()
		out.Found = printable("a signature by " + whose(q.signatures[0].Signer()))
		out.Next = "sign it in a job that the policy admits, or add an entry under roles.signers"
	}
	return out
}

func (p *Policy) judgeProvenance(q *inquiry) attest.RuleResult {
	out := attest.RuleResult{Rule: kindProvenance, Outcome: attest.Fail, Required: "a provenance " + configuredSigner}
	switch {
	case len(q.provenances) == 0:
		out.Reason, out.Found = attest.NoProvenance, "no provenance of this digest"
		out.Next = "sign it in the CI job that builds it: hallmark sign " + q.request.Ref.String()
	case q.conflict != "":
		out.Reason, out.Found, out.Record = attest.ProvenanceConflict, "provenances that disagree: "+q.conflict, q.provenances[0].ID()
		out.Next = "find out which build is wrong"
	case len(q.accepted) == 0:
		out.Reason, out.Record = attest.SignerMismatch, q.provenances[0].ID()
		out.Found = printable("a provenance by " + whose(q.provenances[0].Signer()))
		out.Next = "sign it in a job that the policy admits, or add an entry under roles.signers"
	default:
		best := q.accepted[0]
		q.use(best.Evidence)
		out.Outcome, out.Found, out.Record = attest.OK, best.summary(), best.ID()
	}
	return out
}

// sameSigner returns a provenance by the signer of e: the statement that says
// what a certificate cannot carry.
func (q *inquiry) sameSigner(e *verifier.Evidence) *claimed {
	for _, c := range q.provenances {
		if c.Signer() == e.Signer() && q.policy.bound(c) == nil {
			return c
		}
	}
	return nil
}

// admits reports whether an entry of the signers role admits the signer of e. An
// entry whose condition needs more than a certificate carries is judged on the
// claims in c, a provenance bound to the same signer; without one it admits
// nothing.
func (p *Policy) admits(q *inquiry, e *verifier.Evidence, c *claimed) bool {
	signer := e.Signer()
	for _, entry := range p.roles[Signers] {
		if p.known.IssuerURLs[entry.issuer] != signer.Issuer || !entry.covers(q.request.Ref.Repository) || entry.expired(p.now(q.request)) {
			continue
		}
		if entry.signer != nil {
			if entry.signer.holds(map[string]any{"id": signerVars(entry.issuer, signer)}) == nil {
				return true
			}
			continue
		}
		if c != nil && entry.when.holds(map[string]any{"id": p.claimVars(entry.issuer, signer, c)}) == nil {
			return true
		}
	}
	return false
}

// claimVars are the variables of the caller that a provenance describes.
func (p *Policy) claimVars(issuer string, s verifier.Signer, c *claimed) *CallerVars {
	return callerVars(attest.Identity{
		IssuerName: issuer, Provider: c.inner.Token.Provider, Kind: p.known.Issuers[issuer],
		Issuer: c.inner.Token.Issuer, Subject: c.inner.Token.Subject, SAN: s.SAN, Build: c.inner.Claims,
	})
}
