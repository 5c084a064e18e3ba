package attest

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// Caller names who asked, in statements of the gate. A person is named by a
// pseudonym (design section 6).
type Caller struct {
	Issuer string `json:"issuer"`
	Name   string `json:"name"` // the URI that names the identity in certificates
	Run    string `json:"run,omitempty"`
	Key    string `json:"key"` // hex SHA-256(iss LF sub)
}

// CallerOf names id in a statement.
func CallerOf(id Identity) Caller {
	return Caller{Issuer: id.Issuer, Name: id.SAN, Run: id.Build.RunURI, Key: id.Key()}
}

// PolicyRef names the policy that a decision applied.
type PolicyRef struct {
	URI     string `json:"uri"` // {public_url}/policy/{track}
	Version int    `json:"version"`
	Digest  Digest `json:"digest"` // of the policy text
}

// Outcome is what one rule found.
type Outcome string

// The outcomes of a rule. Only Fail and Error deny.
const (
	OK      Outcome = "ok"
	Fail    Outcome = "fail"
	Errored Outcome = "error" // the rule could not be evaluated; as good as failed
	Warn    Outcome = "warn"  // failed, but only warns
)

// RuleResult is one rule's part of a decision, in words for people and with the
// reason for programs.
type RuleResult struct {
	Rule     string   `json:"rule"`
	Outcome  Outcome  `json:"outcome"`
	Reason   Reason   `json:"reason,omitempty"`
	Required string   `json:"required,omitempty"` // what the policy asks
	Found    string   `json:"found,omitempty"`    // what the evidence says
	Record   RecordID `json:"record,omitzero"`    // which record proves it
	Next     string   `json:"next,omitempty"`     // what to do next
}

// EvidenceRef names one attestation that a decision rests on.
type EvidenceRef struct {
	Record        RecordID `json:"record"`
	PredicateType string   `json:"predicateType"`
	Digest        Digest   `json:"digest"` // of the stored envelope as DSSE JSON
}

// Decided is what promotion and denial statements share.
type Decided struct {
	Track       string        `json:"track"`
	Stage       string        `json:"stage"`
	After       string        `json:"after,omitempty"` // the stage it must come from
	Policy      PolicyRef     `json:"policy"`
	StageDigest Digest        `json:"stageDigest"` // of the stage's effective rules
	LogSize     uint64        `json:"logSize"`     // decided on the records before this index
	Caller      Caller        `json:"caller"`
	Version     string        `json:"version,omitempty"`
	Reason      string        `json:"reason,omitempty"`
	Ticket      string        `json:"ticket,omitempty"`
	Results     []RuleResult  `json:"results"`
	Evidence    []EvidenceRef `json:"evidence"`
	DecidedAt   string        `json:"decidedAt"` // RFC 3339, UTC
}

// Promotion is the predicate of an allowed decision that asks to move a stage.
// It takes effect only if, in the log, Replaces is still the stage's head.
type Promotion struct {
	Decided
	Replaces    RecordID `json:"replaces,omitzero"` // the promotion now at the head; zero: none
	Target      string   `json:"target,omitempty"`  // HOST/PATH:TAG that is set in effect; "" sets none
	ResourceURI string   `json:"resourceUri"`       // oci://HOST/PATH that consumers of the stage pull from
	Level       int      `json:"level"`             // SLSA build level that was verified
}

// Denial is the predicate of a refused decision.
type Denial struct {
	Decided
	Now Digest `json:"now,omitzero"` // what the stage held at that moment
}

// Effect is the predicate that ends a promotion: DONE, or FAILED so that its
// predecessor is the stage's head again.
type Effect struct {
	Promotion RecordID `json:"promotion"`
	State     string   `json:"state"`
	Track     string   `json:"track"`
	Stage     string   `json:"stage"`
	Target    string   `json:"target,omitempty"`
	Detail    string   `json:"detail,omitempty"`
	At        string   `json:"at"` // RFC 3339, UTC
}

// The states of an effect.
const (
	EffectDone = "DONE"
	EffectFail = "FAILED"
)

// PolicyChange is the predicate that records a policy before its first use.
type PolicyChange struct {
	Version       int               `json:"version"`
	Digest        Digest            `json:"digest"`        // of the text
	Text          string            `json:"text"`          // as loaded
	Stages        map[string]Digest `json:"stages"`        // "track/stage" -> stage digest
	Configuration json.RawMessage   `json:"configuration"` // issuers and registries, without secrets
}

// PromotionStatement returns the statement of a promotion of img.
func PromotionStatement(img Image, p Promotion) ([]byte, error) {
	return marshal(PredicatePromotion, subjects(img.Ref.Repository, img.Digests()), p)
}

// DenialStatement returns the statement of a denial of ref.
func DenialStatement(ref ImageRef, d Denial) ([]byte, error) {
	return marshal(PredicateDenial, subjects(ref.Repository, []Digest{ref.Digest}), d)
}

// EffectStatement returns the statement that ends a promotion of ref.
func EffectStatement(ref ImageRef, e Effect) ([]byte, error) {
	return marshal(PredicateEffect, subjects(ref.Repository, []Digest{ref.Digest}), e)
}

// PolicyStatement returns the statement that records a policy.
func PolicyStatement(p PolicyChange) ([]byte, error) {
	return marshal(PredicatePolicy, []Subject{{Name: "policy", Digest: map[string]string{"sha256": p.Digest.Hex()}}}, p)
}

// PromoteKey is the natural key of a promotion.
func PromoteKey(ref ImageRef, track, stage string, replaces RecordID) string {
	return Key("promotion", track, string(ref.Repository), stage, ref.Digest.String(), replaces.String())
}

// DenialKey is the natural key of a denial: the same question by the same caller
// on the same inputs is one record, and a changed input is another.
func DenialKey(ref ImageRef, d Denial) string {
	in := []string{d.StageDigest.String()}
	for _, e := range d.Evidence {
		in = append(in, e.Record.String())
	}
	for _, r := range d.Results {
		in = append(in, r.Rule, string(r.Outcome), string(r.Reason), r.Found, r.Record.String())
	}
	return Key("denial", d.Track, string(ref.Repository), d.Stage, ref.Digest.String(), d.Caller.Key, Key(in...))
}

// EffectKey is the natural key of an effect: a promotion ends once.
func EffectKey(promotion RecordID) string { return Key("effect", promotion.String()) }

// VSA is the predicate of a SLSA verification summary (slsa.dev/spec/v1.2,
// verification_summary).
type VSA struct {
	Verifier           VSAVerifier `json:"verifier"`
	TimeVerified       string      `json:"timeVerified"`
	ResourceURI        string      `json:"resourceUri"`
	Policy             VSAPolicy   `json:"policy"`
	InputAttestations  []VSAInput  `json:"inputAttestations"`
	VerificationResult string      `json:"verificationResult"`
	VerifiedLevels     []string    `json:"verifiedLevels"`
	SLSAVersion        string      `json:"slsaVersion"`
}

// VSAVerifier names who verified.
type VSAVerifier struct {
	ID string `json:"id"`
}

// VSAPolicy names the policy that was applied.
type VSAPolicy struct {
	URI    string            `json:"uri"`
	Digest map[string]string `json:"digest"`
}

// VSAInput names one attestation that was used; the list is complete.
type VSAInput struct {
	URI    string            `json:"uri"`
	Digest map[string]string `json:"digest"`
}

// VSAStatement returns the verification summary that a promotion earns: a pure
// function of the promotion, so that a retry issues the same one.
func VSAStatement(service string, img Image, p Promotion) ([]byte, error) {
	v := VSA{
		Verifier:           VSAVerifier{service + "/gate"},
		TimeVerified:       p.DecidedAt,
		ResourceURI:        p.ResourceURI,
		Policy:             VSAPolicy{p.Policy.URI, map[string]string{"sha256": p.Policy.Digest.Hex()}},
		VerificationResult: "PASSED",
		// At most one level per track, and none that slsa-verifier cannot parse.
		VerifiedLevels: []string{"SLSA_BUILD_LEVEL_" + strconv.Itoa(p.Level), StageLevel(p.Track, p.Stage)},
		SLSAVersion:    "1.2",
	}
	for _, e := range p.Evidence {
		v.InputAttestations = append(v.InputAttestations, VSAInput{
			service + "/v1/records/" + e.Record.String(), map[string]string{"sha256": e.Digest.Hex()},
		})
	}
	s := subjects("", img.Digests())
	return marshal(PredicateVSA, s, v)
}

// StageLevel is the custom level of a stage in a VSA; it must not start with
// SLSA_.
func StageLevel(track, stage string) string {
	up := func(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }
	return "HALLMARK_" + up(track) + "_" + up(stage)
}

// GateIdentity is the identity under which the gate signs summaries with a
// short-lived certificate.
func GateIdentity(service string) Identity {
	return Identity{
		IssuerName: "hallmark", Provider: "hallmark", Kind: Service, Issuer: service, Subject: service + "/gate",
		SAN: service + "/gate", TokenID: "gate", Expires: time.Time{},
	}
}

// SummaryKey is the natural key of a verification summary: its payload is a
// function of the promotion.
func SummaryKey(payload []byte) string { return Key("vsa", Hash(payload).String()) }
