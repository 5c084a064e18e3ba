package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier"
)

type provenanceCmd struct {
	Image string `arg:"" placeholder:"REPO@DIGEST" help:"The image: HOST/PATH@sha256:…"`
	registryFlags
}

// provenanceInfo is the JSON of "hallmark provenance".
type provenanceInfo struct {
	Image     string        `json:"image"`      // HOST/PATH@sha256:HEX
	Builds    []buildInfo   `json:"builds"`     // one for each provenance, oldest first
	Conflict  bool          `json:"conflict"`   // provenances that name different commits
	Evidence  []statedInfo  `json:"evidence"`   // other evidence, oldest first
	Records   []*recordInfo `json:"records"`    // everything recorded about the image, oldest first
	TrustRoot string        `json:"trust_root"` // hex SHA-256 of the trust root by which records were checked here
}

// buildInfo is one provenance. Every field says how it is known.
type buildInfo struct {
	Record   int64     `json:"record"`    // number
	SignedBy string    `json:"signed_by"` // URI in the certificate
	Issuer   string    `json:"issuer"`    // that vouched for it
	SignedAt string    `json:"signed_at"` // RFC 3339, UTC, by the timestamp
	Built    graded    `json:"built"`     // that this job built this digest
	Commit   graded    `json:"commit"`
	Ref      graded    `json:"ref"`
	Source   graded    `json:"source"`
	Pipeline graded    `json:"pipeline"`
	Event    graded    `json:"event"`
	Run      graded    `json:"run"`
	Builder  graded    `json:"builder"`
	Actor    graded    `json:"actor"`
	Runner   graded    `json:"runner"`
	Base     *baseInfo `json:"base"`
	BaseIs   graded    `json:"base_image"`
	// Claims is all that the verified token said about the build, by its name in
	// policies.
	Claims map[string]graded `json:"claims"`
	// Caller is what the job merely said of its own: nothing verifies it. The base
	// image that it named is "base".
	Caller map[string]graded `json:"caller,omitempty"`
}

// statedInfo is other evidence: whose word it is, and of what kind.
type statedInfo struct {
	Record        int64  `json:"record"`         // number
	PredicateType string `json:"predicate_type"` // URI
	Name          string `json:"name,omitempty"`
	SignedBy      string `json:"signed_by"` // URI in the certificate
	Issuer        string `json:"issuer"`    // that vouched for it
	SignedAt      string `json:"signed_at"` // RFC 3339, UTC, by the timestamp
}

// graded is a value with how it is known.
type graded struct {
	Value string `json:"value"`
	Grade string `json:"grade,omitempty"` // claim, registry, source, attested, caller
	Known string `json:"known,omitempty"` // the grade in words
}

// gradeWords says what each grade means.
var gradeWords = map[attest.Grade]string{
	attest.GradeClaim:    "from the CI system's signed token",
	attest.GradeRegistry: "read from the registry",
	attest.GradeSource:   "read from the source repository",
	attest.GradeAttested: "from a signed attestation",
	attest.GradeCaller:   "the caller's word, not proved",
	"":                   "not said how it is known",
}

// Run shows the provenance. What it shows was verified here, against the pinned
// trust root: the server could leave records out, but not invent them.
func (c *provenanceCmd) Run(ctx context.Context, a *app) error {
	ref, err := c.image(ctx, a, c.Image)
	if err != nil {
		return err
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewAuditServiceClient(s).GetArtifact, &hallmarkv1.GetArtifactRequest{Image: ref.String()})
	if err != nil {
		return err
	}
	v, err := s.verifier()
	if err != nil {
		return err
	}
	info := provenanceInfo{Image: ref.String(), Builds: []buildInfo{}, Evidence: []statedInfo{}, Records: []*recordInfo{}, TrustRoot: s.fingerprint}
	for _, item := range resp.GetRecords() {
		rec := newRecordInfo(item.GetRecord())
		if rec == nil {
			return fmt.Errorf("the server answered with a record without its head")
		}
		ev, err := examine(v, ref, item)
		if err != nil {
			return fmt.Errorf("record %d does not verify: %w", rec.Number, err)
		}
		if ev != nil {
			rec.Checked = true
			if p, ok := ev.Provenance(); ok {
				info.Builds = append(info.Builds, newBuildInfo(ev, p))
			}
			if ev.Kind() == attest.KindEvidence {
				info.Evidence = append(info.Evidence, statedInfo{
					int64(ev.Index()), ev.PredicateType(), ev.Statement().EvidenceName(), ev.Signer().SAN, ev.Signer().Issuer, attest.Time(ev.Time()),
				})
			}
		}
		info.Records = append(info.Records, rec)
	}
	info.Conflict = slices.ContainsFunc(info.Builds, func(b buildInfo) bool { return b.Commit.Value != info.Builds[0].Commit.Value })
	if err := a.print(info.result()); err != nil {
		return err
	}
	if len(info.Builds) == 0 {
		return attest.Errorf(attest.RecordNotFound, "no provenance of %s is recorded", ref)
	}
	return nil
}

// gradeText is a grade with what it means.
func gradeText(g attest.Grade) string {
	words, ok := gradeWords[g]
	if g == "" || !ok {
		return gradeWords[""]
	}
	return string(g) + ": " + words
}

// examine verifies a record that a CI job's certificate signed. For those of the
// gate key it returns nil: that key came from the same server, so that verifying
// with it would prove nothing (attacks H03).
func examine(v *verifier.Verifier, ref attest.ImageRef, item *hallmarkv1.ArtifactRecord) (*verifier.Evidence, error) {
	kind := attest.RecordKind(item.GetRecord().GetKind())
	if kind != attest.KindSignature && kind != attest.KindProvenance && kind != attest.KindEvidence {
		return nil, nil
	}
	if kind == attest.KindEvidence && len(item.GetBundle()) == 0 {
		return nil, nil // too large for this answer: it is listed as not checked
	}
	ev, err := v.Bundle(item.GetBundle(), ref.Digest)
	if err != nil {
		return nil, err
	}
	if err := sameRecord(ev, kind, item.GetRecord()); err != nil {
		return nil, err
	}
	return ev, nil
}

// sameRecord checks that a bundle is of the record that it was presented with.
func sameRecord(ev *verifier.Evidence, kind attest.RecordKind, r *hallmarkv1.Record) error {
	if ev.Kind() != kind || ev.ID().String() != r.GetId() || ev.Index() != uint64(r.GetIndex()) {
		return attest.Errorf(attest.LogEntryMismatch, "its bundle is record %d, a %s", ev.Index(), ev.Kind())
	}
	return nil
}

func newBuildInfo(ev *verifier.Evidence, p attest.Provenance) buildInfo {
	const definition = "/predicate/buildDefinition"
	claims := p.Internal().Claims
	say := func(value, pointer string) graded {
		if value == "" {
			return graded{}
		}
		g := p.Grade(pointer)
		return graded{value, string(g), orElse(gradeWords[g], gradeWords[""])}
	}
	claim := func(value string) graded {
		return say(value, definition+"/internalParameters/hallmark_claims")
	}
	source := claim(claims.SourceURI)
	if !claims.HasSource() {
		// A repository without a commit is no source that anybody could rebuild from.
		source = say(attest.SourceUnknown, definition+"/externalParameters")
	}
	b := buildInfo{
		Record: int64(ev.Index()), SignedBy: ev.Signer().SAN, Issuer: ev.Signer().Issuer, SignedAt: attest.Time(ev.Time()),
		Built:  say("this job built this digest", "/subject"),
		Commit: claim(claims.Commit), Ref: claim(claims.Ref), Source: source,
		Pipeline: claim(orElse(claims.SignerURI, claims.ConfigURI)), Event: claim(claims.Event), Actor: claim(claims.Actor), Runner: claim(claims.Runner),
		Run:     say(p.RunDetails.Metadata.InvocationID, "/predicate/runDetails/metadata/invocationId"),
		Builder: say(p.RunDetails.Builder.ID, "/predicate/runDetails/builder/id"),
		Base:    baseOf(p.Internal().Base),
	}
	// What kind of proof there is for a base stands with the dependency that
	// names it; that there is none is the registry's word.
	pointer := definition + "/internalParameters/hallmark_base"
	for i, dep := range p.BuildDefinition.ResolvedDependencies {
		if dep.Name == "base-image" {
			pointer = definition + "/resolvedDependencies/" + strconv.Itoa(i)
		}
	}
	b.BaseIs = say(baseText(b.Base), pointer)
	b.Claims = map[string]graded{}
	for name, value := range saidClaims(claims) {
		b.Claims[name] = claim(value)
	}
	b.Caller = callerFacts(p.Internal())
	return b
}

// saidClaims returns the claims that are there, by their names in JSON, which are
// those of a policy's conditions.
func saidClaims(b attest.Build) map[string]string {
	var out map[string]string
	if raw, err := json.Marshal(b); err != nil || json.Unmarshal(raw, &out) != nil {
		return nil // a struct of strings always marshals
	}
	return out
}

// callerFacts are what the job said of its own. Whatever grade the statement gives
// them, they are its word.
func callerFacts(in attest.InternalParameters) map[string]graded {
	out := map[string]graded{}
	for name, value := range in.Caller {
		out[name] = graded{value, string(attest.GradeCaller), gradeWords[attest.GradeCaller]}
	}
	if in.Hints != nil && in.Hints.Base != "" {
		out["base"] = graded{in.Hints.Base, string(attest.GradeCaller), gradeWords[attest.GradeCaller]}
	}
	return out
}

func (info provenanceInfo) result() result {
	r := result{title: "hallmark provenance", data: info}
	r.add("%s", info.Image)
	for _, b := range info.Builds {
		for _, f := range []struct {
			name string
			graded
		}{
			{"commit", b.Commit}, {"ref", b.Ref}, {"source", b.Source}, {"pipeline", b.Pipeline}, {"event", b.Event},
			{"actor", b.Actor}, {"run", b.Run}, {"runner", b.Runner}, {"builder", b.Builder}, {"built", b.Built}, {"base", b.BaseIs},
		} {
			if f.Value != "" {
				r.field(f.name, "%s  (%s)", f.Value, gradeText(attest.Grade(f.Grade)))
			}
		}
		for _, name := range slices.Sorted(maps.Keys(b.Caller)) {
			r.field("caller", "%s = %s  (%s)", name, b.Caller[name].Value, gradeText(attest.GradeCaller))
		}
		r.field("signed by", "%s", b.SignedBy)
		r.field("", "vouched for by %s, %s", b.Issuer, b.SignedAt)
		r.field("record", "%d", b.Record)
	}
	for _, e := range info.Evidence {
		r.field("evidence", "%s, record %d, by %s", evidenceInfo{PredicateType: e.PredicateType, Name: e.Name}.label(), e.Record, e.SignedBy)
	}
	if info.Conflict {
		r.mark(warned, "  ! these provenances name different commits [%s]", attest.ProvenanceConflict)
	}
	var list []string
	checked := 0
	for _, rec := range info.Records {
		list = append(list, fmt.Sprintf("%s %d", rec.Kind, rec.Number))
		if rec.Checked {
			checked++
		}
	}
	r.field("records", "%s", orElse(strings.Join(list, ", "), "none"))
	if checked > 0 {
		r.field("checked", "signature, time and log proof of %d records, here, by trust root %s…", checked, info.TrustRoot[:12])
	}
	return r
}
