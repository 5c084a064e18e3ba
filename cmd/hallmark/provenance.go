package main

import (
	"context"
	"fmt"
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
	Base     *baseInfo `json:"base"`
	BaseIs   graded    `json:"base_image"`
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
	info := provenanceInfo{Image: ref.String(), Builds: []buildInfo{}, Records: []*recordInfo{}, TrustRoot: s.fingerprint}
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

// examine verifies a record that a CI job's certificate signed. For those of the
// gate key it returns nil: that key came from the same server, so that verifying
// with it would prove nothing (attacks H03).
func examine(v *verifier.Verifier, ref attest.ImageRef, item *hallmarkv1.ArtifactRecord) (*verifier.Evidence, error) {
	kind := attest.RecordKind(item.GetRecord().GetKind())
	if kind != attest.KindSignature && kind != attest.KindProvenance {
		return nil, nil
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
	b := buildInfo{
		Record: int64(ev.Index()), SignedBy: ev.Signer().SAN, Issuer: ev.Signer().Issuer, SignedAt: attest.Time(ev.Time()),
		Built:  say("this job built this digest", "/subject"),
		Commit: claim(claims.Commit), Ref: claim(claims.Ref), Source: claim(claims.SourceURI),
		Pipeline: claim(orElse(claims.SignerURI, claims.ConfigURI)), Event: claim(claims.Event), Actor: claim(claims.Actor),
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
	return b
}

func baseOf(b attest.Base) *baseInfo {
	info := &baseInfo{Result: string(b.Result), Repository: string(b.Repository), Tag: b.Tag}
	if !b.Digest.IsZero() {
		info.Digest = b.Digest.String()
	}
	for _, part := range b.Platforms {
		info.Layers = max(info.Layers, int32(part.Layers))
	}
	return info
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
			{"actor", b.Actor}, {"run", b.Run}, {"builder", b.Builder}, {"built", b.Built}, {"base", b.BaseIs},
		} {
			if f.Value != "" {
				r.field(f.name, "%s  (%s)", f.Value, f.Known)
			}
		}
		r.field("signed by", "%s", b.SignedBy)
		r.field("", "vouched for by %s, %s", b.Issuer, b.SignedAt)
		r.field("record", "%d", b.Record)
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
