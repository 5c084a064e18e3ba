package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// This file is the only one that knows both the API's messages and the gate's
// types. What comes in is parsed once, here: after it there are no strings where
// a digest or a reference is meant.

// Bounds of what a request may say, in bytes and entries.
const (
	maxName     = 128  // of a stage, a track or a version
	maxText     = 1000 // of a reason or a ticket
	maxFilter   = 2000
	maxPage     = 1000
	defaultPage = 100
)

func badField(field, format string, args ...any) error {
	return attest.Errorf(attest.BadRequest, "%s: %s", field, fmt.Sprintf(format, args...)).With("field", field)
}

// at names the field that an error is about.
func at(field string, err error) error {
	if err == nil {
		return nil
	}
	var e *attest.Error
	if !errors.As(err, &e) {
		return badField(field, "%v", err)
	}
	named := *e
	named.Message = field + ": " + e.Message
	return named.With("field", field)
}

// readText returns s if a person could have typed it on one line (attacks J04).
func readText(field, s string, most int) (string, error) {
	switch {
	case len(s) > most:
		return "", badField(field, "longer than %d bytes", most)
	case !utf8.ValidString(s):
		return "", badField(field, "not UTF-8")
	}
	for i, r := range s {
		if !unicode.IsPrint(r) {
			return "", badField(field, "has the control or formatting character %U at byte %d", r, i)
		}
	}
	return s, nil
}

func readRequired(field, s string, most int) (string, error) {
	if s == "" {
		return "", badField(field, "is missing")
	}
	return readText(field, s, most)
}

func readImage(field, s string) (attest.ImageRef, error) {
	if s == "" {
		return attest.ImageRef{}, badField(field, "is missing: give HOST/PATH@sha256:…")
	}
	ref, err := attest.ParseImageRef(s)
	return ref, at(field, err)
}

// readRepository returns "" for "".
func readRepository(field, s string) (attest.Repository, error) {
	if s == "" {
		return "", nil
	}
	repo, err := attest.ParseRepository(s)
	return repo, at(field, err)
}

func readRecordID(s string) (attest.RecordID, error) {
	d, err := attest.ParseHex(s)
	return attest.RecordID(d), at("id", err)
}

// readPage returns how many entries a page shall have: too many are fewer
// (AIP-158).
func readPage(size int32) (int, error) {
	switch {
	case size < 0:
		return 0, badField("page_size", "is negative")
	case size == 0:
		return defaultPage, nil
	}
	return min(int(size), maxPage), nil
}

func readSign(in *pb.SignImagesRequest) (gate.SignRequest, error) {
	var out gate.SignRequest
	if n := len(in.GetImages()); n == 0 || n > gate.MaxImages {
		return out, badField("images", "has %d entries: one request signs 1 to %d images", n, gate.MaxImages)
	}
	var err error
	if out.AttachByClient, err = readAttach(in.GetAttach()); err != nil {
		return out, err
	}
	for i, img := range in.GetImages() {
		ref, err := readImage(fmt.Sprintf("images[%d].image", i), img.GetImage())
		if err != nil {
			return out, err
		}
		base, err := readText(fmt.Sprintf("images[%d].base", i), img.GetBase(), maxText)
		if err != nil {
			return out, err
		}
		out.Images = append(out.Images, gate.SignImage{Ref: ref, Base: base, Facts: img.GetFacts()})
	}
	for i, e := range in.GetEvidence() {
		one := gate.Evidence{PredicateType: e.GetPredicateType(), Predicate: e.GetPredicate(), Name: e.GetName()}
		for j, img := range e.GetImages() {
			ref, err := readImage(fmt.Sprintf("evidence[%d].images[%d]", i, j), img)
			if err != nil {
				return out, err
			}
			one.Images = append(one.Images, ref)
		}
		out.Evidence = append(out.Evidence, one)
	}
	return out, nil
}

// readAttach reports whether the caller attaches.
func readAttach(a pb.Attach) (byClient bool, err error) {
	switch a {
	case pb.Attach_ATTACH_UNSPECIFIED, pb.Attach_ATTACH_SERVER:
		return false, nil
	case pb.Attach_ATTACH_CLIENT:
		return true, nil
	}
	return false, badField("attach", "has no value %d", a)
}

// readAttest leaves type, name and predicate to the gate, which reads them anyway.
func readAttest(in *pb.AttestRequest) (out gate.AttestRequest, err error) {
	if out.Ref, err = readImage("image", in.GetImage()); err != nil {
		return out, err
	}
	out.PredicateType, out.Predicate, out.Name = in.GetPredicateType(), in.GetPredicate(), in.GetName()
	out.AttachByClient, err = readAttach(in.GetAttach())
	return out, err
}

func readVerify(in *pb.VerifyRequest) (out gate.VerifyRequest, err error) {
	if out.Ref, err = readImage("image", in.GetImage()); err != nil {
		return out, err
	}
	if out.Stage, err = readText("stage", in.GetStage(), maxName); err != nil {
		return out, err
	}
	out.Track, err = readText("track", in.GetTrack(), maxName)
	return out, err
}

func readPromote(in *pb.PromoteRequest) (out gate.PromoteRequest, err error) {
	if out.Ref, err = readImage("image", in.GetImage()); err != nil {
		return out, err
	}
	if out.ToStage, err = readRequired("to_stage", in.GetToStage(), maxName); err != nil {
		return out, err
	}
	for _, f := range []struct {
		to          *string
		field, text string
		most        int
	}{
		{&out.Track, "track", in.GetTrack(), maxName},
		{&out.Version, "version", in.GetVersion(), maxName},
		{&out.Reason, "reason", in.GetReason(), maxText},
		{&out.Ticket, "ticket", in.GetTicket(), maxText},
	} {
		if *f.to, err = readText(f.field, f.text, f.most); err != nil {
			return out, err
		}
	}
	out.DryRun = in.GetDryRun()
	return out, nil
}

func readStages(in *pb.ListStagesRequest) (out gate.StagesQuery, err error) {
	if out.Track, err = readText("track", in.GetTrack(), maxName); err != nil {
		return out, err
	}
	if out.Repository, err = readRepository("repository", in.GetRepository()); err != nil {
		return out, err
	}
	if out.PageSize, err = readPage(in.GetPageSize()); err != nil {
		return out, err
	}
	out.PageToken, err = readText("page_token", in.GetPageToken(), maxText)
	return out, err
}

func readRecords(in *pb.ListRecordsRequest) (out gate.RecordsQuery, err error) {
	if out.Filter, err = readText("filter", in.GetFilter(), maxFilter); err != nil {
		return out, err
	}
	if out.PageSize, err = readPage(in.GetPageSize()); err != nil {
		return out, err
	}
	out.PageToken, err = readText("page_token", in.GetPageToken(), maxText)
	return out, err
}

// each translates a list.
func each[A, B any](in []A, f func(A) B) []B {
	out := make([]B, len(in))
	for i, a := range in {
		out[i] = f(a)
	}
	return out
}

// number returns n as the API's integer. Indexes and sizes of a log never reach
// its end; should one do so, it must not become negative (attacks J05).
func number(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

func when(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// text returns the canonical text of a digest or record id; "" for the zero one.
func text(v interface{ MarshalText() ([]byte, error) }) string {
	b, err := v.MarshalText()
	if err != nil {
		return ""
	}
	return string(b)
}

// writeSigned reports every image. One that was refused says no more than a
// refused call would, and is logged in the same way.
func (s *Server) writeSigned(ctx context.Context, results []gate.Signed) *pb.SignImagesResponse {
	return &pb.SignImagesResponse{Results: each(results, func(r gate.Signed) *pb.SignedImage {
		if r.Err != nil {
			why := s.writeRefusal(ctx, r.Err)
			return &pb.SignedImage{Image: r.Ref.String(), Refusal: why, Evidence: each(r.Evidence, func(e gate.SignedEvidence) *pb.SignedEvidence {
				return &pb.SignedEvidence{PredicateType: e.PredicateType, Name: e.Name, Refusal: why} // refused with its image, and logged with it
			})}
		}
		return &pb.SignedImage{
			Image: r.Ref.String(), Signature: writeRecord(r.Signature), Provenance: writeRecord(r.Provenance),
			SignatureBundle: r.SignatureBundle, ProvenanceBundle: r.ProvenanceBundle,
			Digests: each(r.Image.Digests(), attest.Digest.String), Base: writeBase(r.Image.Base),
			AttachState: attachStates[r.Attach], RepeatedRequest: r.Repeated,
			Source: r.Build.SourceURI, Ref: r.Build.Ref, Commit: r.Build.Commit, Run: r.Build.RunURI, Builder: r.Builder,
			Evidence: each(r.Evidence, func(e gate.SignedEvidence) *pb.SignedEvidence { return s.writeEvidence(ctx, e) }),
		}
	})}
}

// writeRefusal logs and renders why a part of a SignImages call was refused.
func (s *Server) writeRefusal(ctx context.Context, err error) *pb.Refusal {
	why := refuse(err)
	s.logRefusal(pb.SigningService_SignImages_FullMethodName, caller(ctx), why, err, 0)
	return &pb.Refusal{Reason: string(why.Reason), Message: why.Message, Metadata: why.Metadata}
}

func (s *Server) writeEvidence(ctx context.Context, e gate.SignedEvidence) *pb.SignedEvidence {
	out := &pb.SignedEvidence{PredicateType: e.PredicateType, Name: e.Name}
	if e.Err != nil {
		out.Refusal = s.writeRefusal(ctx, e.Err)
		return out
	}
	out.Record, out.Bundle, out.AttachState, out.RepeatedRequest = writeRecord(e.Record), e.Bundle, attachStates[e.Attach], e.Repeated
	return out
}

func writeAttested(e gate.SignedEvidence) *pb.AttestResponse {
	return &pb.AttestResponse{
		Record: writeRecord(e.Record), Bundle: e.Bundle, AttachState: attachStates[e.Attach], RepeatedRequest: e.Repeated,
		Digests: each(e.Image.Digests(), attest.Digest.String),
	}
}

var attachStates = map[gate.AttachState]pb.AttachState{
	gate.Attached:       pb.AttachState_ATTACH_STATE_ATTACHED,
	gate.AttachPending:  pb.AttachState_ATTACH_STATE_PENDING,
	gate.AttachByClient: pb.AttachState_ATTACH_STATE_CLIENT,
}

func writeImports(found gate.Imports) *pb.ImportResponse {
	return &pb.ImportResponse{
		Imported: each(found.Imported, func(i gate.Imported) *pb.ImportedEvidence {
			return &pb.ImportedEvidence{
				Record: writeRecord(i.Record), Root: i.Said.Root, Form: i.Said.Form, PredicateType: i.Said.PredicateType,
				Signer: i.Said.Signer.SAN, Issuer: i.Said.Signer.Issuer, Key: i.Said.Signer.Key,
				SignedAt: i.Said.SignedAt, RepeatedRequest: i.Repeated,
			}
		}),
		Skipped: each(found.Skipped, func(s gate.Skipped) *pb.SkippedEvidence {
			return &pb.SkippedEvidence{Place: s.Place, Reason: string(s.Reason), Message: printable(s.Message)}
		}),
	}
}

func writeBase(b attest.Base) *pb.BaseImage {
	layers := 0
	for _, p := range b.Platforms {
		layers = max(layers, p.Layers)
	}
	return &pb.BaseImage{
		Result: string(b.Result), Repository: string(b.Repository), Tag: b.Tag, Digest: text(b.Digest), Grade: string(b.Result.Grade()),
		Layers: writeLayers(layers),
		Claims: each(b.Claims, func(c attest.BaseClaim) *pb.BaseClaim {
			return &pb.BaseClaim{
				From: c.From, Name: c.Name, Digest: text(c.Digest), Result: string(c.Result), Detail: c.Detail,
				Root: c.Root, Signer: c.Signer.SAN, Issuer: c.Signer.Issuer, Key: c.Signer.Key,
			}
		}),
		Platforms: each(b.Platforms, func(p attest.BasePart) *pb.BasePart {
			return &pb.BasePart{Platform: p.Platform, Image: text(p.Image), Base: text(p.Base), Layers: writeLayers(p.Layers)}
		}),
		Equivalents: each(b.Equivalents, func(n attest.BaseName) *pb.BaseName {
			return &pb.BaseName{Repository: string(n.Repository), Tag: n.Tag, Digest: text(n.Digest)}
		}),
	}
}

func writeLayers(n int) int32 { return int32(min(n, math.MaxInt32)) }

func writeLink(l gate.BaseLink) *pb.BaseLink {
	return &pb.BaseLink{
		Image: l.Ref.String(), Base: writeBase(l.Base), KnownFrom: l.KnownFrom, Record: text(l.Record),
		Signed: l.Signed, ProvenanceSummary: l.Summary, Stages: l.Stages,
		Freshness: string(l.State.Freshness), Current: text(l.State.Current), Checked: when(l.State.Checked), Since: when(l.State.Since),
		FreshnessDetail: printable(l.State.Detail),
	}
}

func writeRecord(r attest.Record) *pb.Record {
	return writeSummary(gate.RecordSummary{ID: r.ID, Index: r.Index, Facts: r.Facts})
}

func writeSummary(r gate.RecordSummary) *pb.Record {
	return &pb.Record{
		Id: r.ID.String(), Index: number(r.Index), Kind: string(r.Kind), Time: when(r.Time),
		Facets: each(r.Facets, func(f attest.Facet) *pb.Facet { return &pb.Facet{Name: f.Name, Value: f.Value} }),
	}
}

func writeItem(i gate.Item) *pb.ArtifactRecord {
	out := &pb.ArtifactRecord{Record: writeRecord(i.Record), Bundle: i.Bundle}
	if i.Record.PayloadType == attest.InTotoPayload {
		out.Statement = i.Record.Payload
	}
	return out
}

func (s *Server) writeDecision(d gate.Decision) *pb.Decision {
	out := &pb.Decision{
		Id: number(d.Number), Allowed: d.Verdict == gate.Allowed, Verdict: string(d.Verdict),
		Track: d.Track, Stage: d.Stage, Image: d.Ref.String(),
		Results: each(d.Results, func(r attest.RuleResult) *pb.RuleResult {
			return &pb.RuleResult{
				Rule: r.Rule, Outcome: string(r.Outcome), Reason: string(r.Reason),
				Required: r.Required, Found: r.Found, Record: text(r.Record), Next: r.Next,
			}
		}),
		Now: each(d.Now, writeEntry), Safe: each(d.Safe, writeEntry),
		Time:     when(d.Time),
		Policy:   &pb.PolicyVersion{Version: int64(d.Policy.Version), Digest: text(d.Policy.Digest), Uri: d.Policy.URI},
		RecordId: text(d.RecordID), ProvenanceSummary: d.Summary, LogSize: number(d.LogSize),
	}
	if d.Number > 0 {
		out.Url = fmt.Sprintf("%s/d/%d", s.gate.Trust().Service, d.Number)
	}
	return out
}

func writeEntry(e gate.StageEntry) *pb.StageEntry {
	return &pb.StageEntry{
		Digest: text(e.Digest), Since: when(e.Since), State: e.State, Decision: number(e.Decision), Target: e.Target,
	}
}

func writeStage(st gate.StageStatus) *pb.Stage {
	out := &pb.Stage{Track: st.Track, Stage: st.Stage, Repository: string(st.Repository), After: st.After}
	if st.Current != nil {
		out.Current = writeEntry(*st.Current)
	}
	return out
}

func writeWho(w gate.Who) *pb.WhoAmIResponse {
	id := w.Identity
	mayNot := ""
	if err := id.MaySign(); err != nil {
		mayNot = refuse(err).Message
	}
	return &pb.WhoAmIResponse{
		MaySign: mayNot == "", MayNotSign: mayNot,
		IssuerName: id.IssuerName, Issuer: id.Issuer, Subject: id.Subject, Kind: string(id.Kind),
		CertificateIdentity: id.SAN, Claims: writeClaims(id), When: w.When, Expires: when(id.Expires),
		Roles: each(w.Roles, func(r gate.Role) *pb.RoleGrant {
			return &pb.RoleGrant{Role: r.Name, Images: r.Images, Covers: r.Covers}
		}),
	}
}

// writeClaims lists what the token verifiably says, under the names that a
// policy's conditions use.
func writeClaims(id attest.Identity) []*pb.Facet {
	var claims map[string]string
	if raw, err := json.Marshal(id.Build); err != nil || json.Unmarshal(raw, &claims) != nil {
		return nil // a struct of strings always marshals
	}
	var out []*pb.Facet
	for _, name := range slices.Sorted(maps.Keys(claims)) {
		out = append(out, &pb.Facet{Name: name, Value: claims[name]})
	}
	for _, g := range id.Groups {
		out = append(out, &pb.Facet{Name: "groups", Value: g})
	}
	return out
}
