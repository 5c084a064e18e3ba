package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// The verdicts of a decision.
const (
	verdictAllowed = "allowed"
	verdictDenied  = "denied"
	verdictAborted = "aborted" // the stage moved meanwhile
)

// decisionInfo is the JSON of a decision: of verify, promote and decision.
type decisionInfo struct {
	Verdict    string       `json:"verdict"`            // allowed, denied, aborted
	Allowed    bool         `json:"allowed"`            //
	DryRun     bool         `json:"dry_run,omitempty"`  //
	Image      string       `json:"image"`              // HOST/PATH@sha256:HEX
	Track      string       `json:"track,omitempty"`    //
	Stage      string       `json:"stage,omitempty"`    // empty: signature and provenance only
	Decision   int64        `json:"decision,omitempty"` // number; none when nothing was recorded
	Record     string       `json:"record,omitempty"`   // id of the record, hex
	URL        string       `json:"url,omitempty"`      // page of the decision
	Time       string       `json:"time,omitempty"`     // RFC 3339, UTC
	Results    []ruleInfo   `json:"results"`            // one for each rule, in the policy's order
	Now        []entryInfo  `json:"now"`                // what the stage holds
	Safe       []entryInfo  `json:"safe_to_return_to"`  // newest first
	Provenance string       `json:"provenance,omitempty"`
	Policy     *policyInfo  `json:"policy,omitempty"`
	LogSize    int64        `json:"log_size"` // decided on the records before this index
	Promotion  *effectsInfo `json:"promotion,omitempty"`
}

type ruleInfo struct {
	Rule     string `json:"rule"`
	Outcome  string `json:"outcome"`            // ok, warn, fail, error
	Reason   string `json:"reason,omitempty"`   // stable code
	Required string `json:"required,omitempty"` //
	Found    string `json:"found,omitempty"`    //
	Record   string `json:"record,omitempty"`   // id of the record that proves it
	Next     string `json:"next,omitempty"`     // what to do
}

type entryInfo struct {
	Digest   string `json:"digest"`
	Since    string `json:"since,omitempty"`    // RFC 3339, UTC
	State    string `json:"state,omitempty"`    // PENDING, DONE, FAILED, VOID
	Decision int64  `json:"decision,omitempty"` //
	Target   string `json:"target,omitempty"`   // HOST/PATH:TAG
}

type policyInfo struct {
	Version int64  `json:"version"`
	Digest  string `json:"digest"`
	URI     string `json:"uri"`
}

// checkDecision refuses an answer that is not about the question or contradicts
// itself: a confused answer is no yes.
func checkDecision(d *hallmarkv1.Decision, image, stage string) error {
	switch v := d.GetVerdict(); {
	case d == nil:
		return fmt.Errorf("the server answered without a decision")
	case image != "" && d.GetImage() != image:
		return fmt.Errorf("the server decided about %q, not about %s", d.GetImage(), image)
	case stage != "" && d.GetStage() != stage:
		return fmt.Errorf("the server decided about stage %q, not about %s", d.GetStage(), stage)
	case v != verdictAllowed && v != verdictDenied && v != verdictAborted:
		return fmt.Errorf("the server's verdict %q is not known to this client", v)
	case d.GetAllowed() != (v == verdictAllowed):
		return fmt.Errorf("the server's decision contradicts itself: allowed is %t and the verdict %s", d.GetAllowed(), v)
	case d.GetAllowed() && len(d.GetResults()) == 0:
		return fmt.Errorf("the server allowed without having judged any rule")
	}
	for _, r := range d.GetResults() {
		if o := attest.Outcome(r.GetOutcome()); d.GetAllowed() && o != attest.OK && o != attest.Warn {
			return fmt.Errorf("the server's decision contradicts itself: allowed although rule %s is %q", r.GetRule(), o)
		}
	}
	return nil
}

// question says how a decision is worded.
type question struct {
	verb    string // promote, verify or decision
	offline bool   // nobody knows what the stage holds
	dryRun  bool
	explain bool // every rule on a line of its own, with reason and record
}

// decided renders a decision. The text is the contract of design section 7: the
// pages show the same.
func (a *app) decided(d *hallmarkv1.Decision, q question) result {
	r := result{title: "hallmark " + q.verb + ": " + plain(d.GetVerdict()), link: d.GetUrl(), data: newDecisionInfo(d, q)}
	head, tone := strings.ToUpper(d.GetVerdict()), bad
	switch {
	case q.dryRun && d.GetAllowed():
		head, tone = "WOULD BE ALLOWED", good
	case q.dryRun:
		head = "WOULD BE DENIED"
	case d.GetAllowed():
		tone = good
	case d.GetVerdict() == verdictAborted:
		tone = warned
	}
	subject := shortImage(d.GetImage())
	switch {
	case d.GetStage() != "" && q.verb == "verify":
		subject += " in " + d.GetStage()
	case d.GetStage() != "":
		subject += " -> " + d.GetStage()
	}
	number := ""
	if d.GetId() != 0 {
		number = fmt.Sprintf("       decision %d  %s", d.GetId(), d.GetUrl())
	}
	r.mark(tone, "%s  %s%s", head, subject, number)
	if q.explain {
		r.explained(d)
	} else {
		r.rules(d)
	}
	if d.GetStage() != "" && !q.offline {
		r.add("%s", a.standing(d))
	}
	return r
}

// rules writes one aligned line for each rule that failed or warns, and one for
// all that are satisfied.
func (r *result) rules(d *hallmarkv1.Decision) {
	var names, texts int
	var passed []string
	for _, x := range d.GetResults() {
		if attest.Outcome(x.GetOutcome()) == attest.OK {
			passed = append(passed, passedRule(x, d.GetProvenanceSummary()))
			continue
		}
		names = max(names, utf8.RuneCountInString(plain(x.GetRule())))
		if n := utf8.RuneCountInString(plain(finding(x))); n <= 60 { // a long one does not push the others away
			texts = max(texts, n)
		}
	}
	for _, x := range d.GetResults() {
		mark, tone := "x", bad
		switch attest.Outcome(x.GetOutcome()) {
		case attest.OK:
			continue
		case attest.Warn:
			mark, tone = "!", warned
		}
		next := ""
		if x.GetNext() != "" {
			next = "  -> " + x.GetNext()
		}
		r.mark(tone, "  %s %s  %s%s", mark, pad(plain(x.GetRule()), names), pad(plain(finding(x)), texts), next)
	}
	if len(passed) > 0 {
		r.mark(good, "  ok %s", strings.Join(passed, ", "))
	}
}

func passedRule(x *hallmarkv1.RuleResult, summary string) string {
	if x.GetRule() == "provenance" && summary != "" {
		return "provenance (" + summary + ")"
	}
	return x.GetRule()
}

// finding says what a rule needs and what there is.
func finding(x *hallmarkv1.RuleResult) string {
	switch required, found := x.GetRequired(), x.GetFound(); {
	case attest.Outcome(x.GetOutcome()) == attest.Errored:
		return orElse(found, "could not be judged")
	case required == "":
		return found
	case found == "":
		return "needs " + required
	default:
		return "needs " + required + ", has " + found
	}
}

// explained writes every rule with all that is known of it.
func (r *result) explained(d *hallmarkv1.Decision) {
	marks := map[attest.Outcome]string{attest.OK: "ok", attest.Warn: "! ", attest.Fail: "x ", attest.Errored: "x "}
	tones := map[attest.Outcome]tone{attest.OK: good, attest.Warn: warned, attest.Fail: bad, attest.Errored: bad}
	for _, x := range d.GetResults() {
		o := attest.Outcome(x.GetOutcome())
		r.mark(tones[o], "  %s %s  %s", orElse(marks[o], "x "), x.GetRule(), x.GetReason())
		for _, f := range [][2]string{{"needs", x.GetRequired()}, {"has", x.GetFound()}, {"record", x.GetRecord()}, {"next", x.GetNext()}} {
			if f[1] != "" {
				r.add("       %s %s", pad(f[0], 6), f[1])
			}
		}
	}
	r.field("image", "%s", d.GetImage())
	for _, e := range d.GetNow() {
		r.field("now", "%s %s", e.GetDigest(), e.GetTarget())
	}
	for _, e := range d.GetSafe() {
		r.field("safe", "%s", e.GetDigest())
	}
	if p := d.GetPolicy(); p != nil {
		r.field("policy", "%s version %d, judged on the first %d records", p.GetUri(), p.GetVersion(), d.GetLogSize())
	}
}

// standing says what the stage holds and what is safe to return to.
func (a *app) standing(d *hallmarkv1.Decision) string {
	s := "now in " + d.GetStage() + ": "
	var now []string
	for _, e := range d.GetNow() {
		text := shortDigest(e.GetDigest())
		if e.GetSince() != nil {
			text += " since " + a.day(e.GetSince())
		}
		if e.GetState() != "" && e.GetState() != attest.EffectDone {
			text += " (" + e.GetState() + ")"
		}
		now = append(now, text)
	}
	s += orElse(strings.Join(now, ", "), "nothing")
	var safe []string
	for _, e := range d.GetSafe() {
		safe = append(safe, shortDigest(e.GetDigest()))
	}
	if len(safe) > 0 {
		s += "   safe to return to: " + strings.Join(safe, ", ")
	}
	return s
}

// day renders the date of t in UTC, with the year unless it is this one.
func (a *app) day(t *timestamppb.Timestamp) string {
	at := t.AsTime().UTC()
	if at.Year() == a.now().UTC().Year() {
		return at.Format("2 Jan")
	}
	return at.Format("2 Jan 2006")
}

// shortImage drops the registry's host and most of the digest; JSON and
// --explain have both.
func shortImage(image string) string {
	ref, err := attest.ParseImageRef(image)
	if err != nil {
		return image
	}
	return ref.Repository.Path() + "@" + shortDigest(ref.Digest.String())
}

func shortDigest(digest string) string {
	d, err := attest.ParseDigest(digest)
	if err != nil {
		return digest
	}
	return "sha256:" + d.Hex()[:4] + "…"
}

func newDecisionInfo(d *hallmarkv1.Decision, q question) *decisionInfo {
	info := &decisionInfo{
		Verdict: d.GetVerdict(), Allowed: d.GetAllowed(), DryRun: q.dryRun, Image: d.GetImage(),
		Track: d.GetTrack(), Stage: d.GetStage(), Decision: d.GetId(), Record: d.GetRecordId(),
		URL: d.GetUrl(), Time: rfc3339(d.GetTime()), Provenance: d.GetProvenanceSummary(), LogSize: d.GetLogSize(),
		Results: []ruleInfo{}, Now: entries(d.GetNow()), Safe: entries(d.GetSafe()),
	}
	for _, x := range d.GetResults() {
		info.Results = append(info.Results, ruleInfo{x.GetRule(), x.GetOutcome(), x.GetReason(), x.GetRequired(), x.GetFound(), x.GetRecord(), x.GetNext()})
	}
	if p := d.GetPolicy(); p != nil {
		info.Policy = &policyInfo{p.GetVersion(), p.GetDigest(), p.GetUri()}
	}
	return info
}

func entries(in []*hallmarkv1.StageEntry) []entryInfo {
	out := make([]entryInfo, 0, len(in))
	for _, e := range in {
		out = append(out, newEntryInfo(e))
	}
	return out
}

func newEntryInfo(e *hallmarkv1.StageEntry) entryInfo {
	return entryInfo{e.GetDigest(), rfc3339(e.GetSince()), e.GetState(), e.GetDecision(), e.GetTarget()}
}

// rfc3339 renders t in UTC and whole seconds; unset is "".
func rfc3339(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Truncate(time.Second).Format(time.RFC3339)
}
