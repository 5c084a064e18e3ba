package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

type baseCmd struct {
	Image string `arg:"" placeholder:"REPO@DIGEST" help:"The image: HOST/PATH@sha256:…"`
	registryFlags
}

// chainInfo is the JSON of "hallmark base".
type chainInfo struct {
	Chain   []linkInfo `json:"chain"`    // the image, its base, the base of that, as far as is known
	LogSize int64      `json:"log_size"` // the answer is about the records before this index
}

// linkInfo is one image of a chain of bases.
type linkInfo struct {
	Image      string     `json:"image"`                // HOST/PATH@sha256:HEX
	Base       *baseInfo  `json:"base,omitempty"`       // what it is built on
	KnownFrom  string     `json:"known_from,omitempty"` // record, registry
	Record     string     `json:"record,omitempty"`     // of the provenance that says so
	Signed     bool       `json:"signed"`               // and has provenance, by a configured signer
	Provenance string     `json:"provenance,omitempty"` // in one line
	Stages     []string   `json:"stages,omitempty"`     // TRACK/STAGE that hold it
	Freshness  *freshInfo `json:"freshness,omitempty"`  // of its base
}

// freshInfo compares a base with what its tag names now.
type freshInfo struct {
	State   string `json:"state"`             // FRESH, STALE_INDEX_ONLY, STALE_CONFIG_ONLY, STALE_LAYERS, FRESHNESS_UNKNOWN
	Current string `json:"current,omitempty"` // digest that the tag names now
	Checked string `json:"checked,omitempty"` // RFC 3339, UTC
	Since   string `json:"since,omitempty"`   // RFC 3339, UTC: the first check that found it so
	Detail  string `json:"detail,omitempty"`  // why it is not known
}

// baseInfo is the base image of an image.
type baseInfo struct {
	Result      string          `json:"result"` // PROVEN_LAYERS, PROVEN_DIFFIDS, MATCHED, ATTESTED, SCRATCH, CLAIMED, UNKNOWN, CONTRADICTED
	Grade       string          `json:"grade,omitempty"`
	Repository  string          `json:"repository,omitempty"`
	Tag         string          `json:"tag,omitempty"`
	Digest      string          `json:"digest,omitempty"`
	Layers      int32           `json:"layers,omitempty"`      // how many leading layers are the base's, at most
	Platforms   []basePartInfo  `json:"platforms,omitempty"`   // the proof for each platform
	Equivalents []string        `json:"equivalents,omitempty"` // HOST/PATH:TAG@DIGEST with the very same layers
	Claims      []baseClaimInfo `json:"claims,omitempty"`      // every candidate, the chosen one first
}

type basePartInfo struct {
	Platform string `json:"platform,omitempty"` // os/arch[/variant]; empty when the image is no index
	Image    string `json:"image"`              // digest of the image's manifest
	Base     string `json:"base"`               // digest of the base's manifest
	Layers   int32  `json:"layers"`
}

type baseClaimInfo struct {
	From   string `json:"from"` // buildkit, annotation, label, caller, followed, attestation
	Name   string `json:"name"` // as claimed
	Digest string `json:"digest,omitempty"`
	Result string `json:"result"`
	Detail string `json:"detail,omitempty"`
}

func newBaseInfo(b *hallmarkv1.BaseImage) *baseInfo {
	if b == nil {
		return nil
	}
	info := &baseInfo{
		Result: b.GetResult(), Grade: b.GetGrade(), Repository: b.GetRepository(), Tag: b.GetTag(), Digest: b.GetDigest(), Layers: b.GetLayers(),
	}
	for _, p := range b.GetPlatforms() {
		info.Platforms = append(info.Platforms, basePartInfo{p.GetPlatform(), p.GetImage(), p.GetBase(), p.GetLayers()})
	}
	for _, e := range b.GetEquivalents() {
		info.Equivalents = append(info.Equivalents, imageName(e.GetRepository(), e.GetTag(), e.GetDigest()))
	}
	for _, c := range b.GetClaims() {
		info.Claims = append(info.Claims, baseClaimInfo{c.GetFrom(), c.GetName(), c.GetDigest(), c.GetResult(), c.GetDetail()})
	}
	return info
}

// baseOf is newBaseInfo of what a verified provenance says.
func baseOf(b attest.Base) *baseInfo {
	info := &baseInfo{Result: string(b.Result), Grade: string(b.Result.Grade()), Repository: string(b.Repository), Tag: b.Tag, Digest: digestText(b.Digest)}
	for _, p := range b.Platforms {
		info.Layers = max(info.Layers, int32(p.Layers))
		info.Platforms = append(info.Platforms, basePartInfo{p.Platform, p.Image.String(), p.Base.String(), int32(p.Layers)})
	}
	for _, e := range b.Equivalents {
		info.Equivalents = append(info.Equivalents, e.String())
	}
	for _, c := range b.Claims {
		info.Claims = append(info.Claims, baseClaimInfo{c.From, c.Name, digestText(c.Digest), string(c.Result), c.Detail})
	}
	return info
}

func digestText(d attest.Digest) string {
	if d.IsZero() {
		return ""
	}
	return d.String()
}

// imageName returns HOST/PATH:TAG@DIGEST as far as it is known.
func imageName(repository, tag, digest string) string {
	if tag != "" {
		repository += ":" + tag
	}
	if digest != "" {
		repository += "@" + digest
	}
	return repository
}

// baseText says which base an image has and how that is known.
func baseText(b *baseInfo) string {
	if b == nil {
		return ""
	}
	return strings.TrimSpace(imageName(b.Repository, b.Tag, b.Digest) + "  " + b.how())
}

// how says what a result means, for people.
func (b *baseInfo) how() string {
	its, are, theirs := fmt.Sprintf("its %d layers", b.Layers), "are", "those"
	if b.Layers == 1 {
		its, are, theirs = "its one layer", "is", "that"
	}
	return orElse(map[attest.BaseResult]string{
		attest.ProvenLayers:  "proved: " + its + " " + are + " the image's first",
		attest.ProvenDiffIDs: "proved: unpacked, " + its + " " + are + " the image's first; only the compression differs",
		attest.Matched:       "found: nobody names it, but " + its + " " + are + " the image's first",
		attest.Attested:      "attested: a signed statement names it; the layers show neither it nor its contrary",
		attest.Scratch:       "said to be built from nothing, and no base that the service follows is in it",
		attest.Claimed:       "claimed, not proved",
		attest.Unclaimed:     "not known: nobody names one",
		attest.Contradicted:  "claimed, but the layers say otherwise: " + theirs + " of the image are not the base's",
	}[attest.BaseResult(b.Result)], b.Result)
}

// claimWords says who makes a claim about a base.
var claimWords = map[string]string{
	attest.BaseFromBuildKit:    "BuildKit's unsigned record in the index",
	attest.BaseFromAnnotation:  "the image's annotation",
	attest.BaseFromLabel:       "the image's label",
	attest.BaseFromCaller:      "the signing job (--base)",
	attest.BaseFromFollowed:    "the bases that the service follows",
	attest.BaseFromAttestation: "a signed attestation",
}

// claimResults says what became of a claim, in few words.
var claimResults = map[attest.BaseResult]string{
	attest.ProvenLayers: "proved by the layers", attest.ProvenDiffIDs: "proved by the layers' content", attest.Matched: "the layers match",
	attest.Attested: "attested", attest.Scratch: "nothing says otherwise", attest.Claimed: "could not be checked",
	attest.Unclaimed: "not known", attest.Contradicted: "contradicted by the layers",
}

// freshWords says what a freshness means for whoever builds on the base.
var freshWords = map[attest.Freshness]string{
	attest.Fresh:            "up to date: its tag still names it",
	attest.StaleIndexOnly:   "nothing to do: its tag names another index, with the same image for these platforms",
	attest.StaleConfigOnly:  "little to do: its tag names another image, with the same layers",
	attest.StaleLayers:      "outdated: its tag names an image with other layers. Build again",
	attest.FreshnessUnknown: "not known",
}

// Run explains on which bases an image is built, and how that is known.
func (c *baseCmd) Run(ctx context.Context, a *app) error {
	ref, err := c.image(ctx, a, c.Image)
	if err != nil {
		return err
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewAuditServiceClient(s).GetBase, &hallmarkv1.GetBaseRequest{Image: ref.String()})
	if err != nil {
		return err
	}
	if chain := resp.GetChain(); len(chain) == 0 || chain[0].GetImage() != ref.String() {
		return fmt.Errorf("the server answered about another image than %s", ref)
	}
	info := chainInfo{Chain: []linkInfo{}, LogSize: resp.GetLogSize()}
	r := result{title: "hallmark base"}
	for i, l := range resp.GetChain() {
		link := newLinkInfo(l)
		info.Chain = append(info.Chain, link)
		r.link1(i, link)
	}
	r.data = info
	return a.print(r)
}

func newLinkInfo(l *hallmarkv1.BaseLink) linkInfo {
	info := linkInfo{
		Image: l.GetImage(), Base: newBaseInfo(l.GetBase()), KnownFrom: l.GetKnownFrom(), Record: l.GetRecord(),
		Signed: l.GetSigned(), Provenance: l.GetProvenanceSummary(), Stages: l.GetStages(),
	}
	if l.GetFreshness() != "" {
		info.Freshness = &freshInfo{l.GetFreshness(), l.GetCurrent(), rfc3339(l.GetChecked()), rfc3339(l.GetSince()), l.GetFreshnessDetail()}
	}
	return info
}

// link1 renders one image of the chain with the proof for its base.
func (r *result) link1(i int, l linkInfo) {
	if i == 0 {
		r.add("%s", l.Image)
	} else {
		r.add("built on %s", l.Image)
	}
	switch {
	case l.Signed:
		r.field("signed", "%s", orElse(l.Provenance, "yes, with provenance"))
	case l.Provenance == "" && len(l.Stages) == 0:
		r.field("signed", "not by a signer that is configured, or not for you to see")
	}
	r.field("stages", "%s", strings.Join(l.Stages, ", "))
	if l.Base == nil {
		return
	}
	known := ""
	if l.Base.Grade != "" {
		known = "  (" + gradeText(attest.Grade(l.Base.Grade)) + ")"
	}
	name := imageName(l.Base.Repository, l.Base.Tag, l.Base.Digest)
	if l.Base.Result == string(attest.Scratch) {
		name = "scratch"
	}
	r.field("base", "%s", orElse(name, "none that has a name"))
	r.mark(baseTones[attest.BaseResult(l.Base.Result)], "  %s %s [%s]%s", pad("how", 10), l.Base.how(), l.Base.Result, known)
	r.proof(l.Base)
	switch l.KnownFrom {
	case "record":
		r.field("known from", "its provenance, record %s", l.Record)
	case "registry":
		r.field("known from", "the registry, asked just now")
	}
	if f := l.Freshness; f != nil {
		r.freshness(f)
	}
}

func (r *result) freshness(f *freshInfo) {
	text := orElse(freshWords[attest.Freshness(f.State)], "a state that this client does not know")
	if f.Detail != "" {
		text += ": " + f.Detail
	}
	r.field("freshness", "%s [%s]", text, f.State)
	if f.State != string(attest.Fresh) {
		r.field("tag names", "%s", f.Current)
	}
	switch {
	case f.Since != "" && f.Checked != "":
		r.field("seen", "so since %s, last %s", f.Since, f.Checked)
	case f.Checked != "":
		r.field("seen", "%s", f.Checked)
	}
}

// baseTones say at which results a person should look twice.
var baseTones = map[attest.BaseResult]tone{
	attest.ProvenLayers: good, attest.ProvenDiffIDs: good, attest.Matched: good, attest.Attested: good,
	attest.Scratch: warned, attest.Claimed: warned, attest.Unclaimed: warned, attest.Contradicted: bad,
}

// proof lists platforms, candidates and equivalents.
func (r *result) proof(b *baseInfo) {
	for _, p := range b.Platforms {
		r.field("platform", "%s: the first %d layers of %s are those of %s", orElse(p.Platform, "the only one"), p.Layers, clipped(p.Image), clipped(p.Base))
	}
	for _, c := range b.Claims {
		name := c.Name
		if c.Digest != "" && !strings.Contains(name, "@") {
			name += "@" + c.Digest
		}
		detail := ""
		if c.Detail != "" {
			detail = " (" + c.Detail + ")"
		}
		r.field("candidate", "%s, named by %s: %s%s", name, orElse(claimWords[c.From], c.From), orElse(claimResults[attest.BaseResult(c.Result)], c.Result), detail)
	}
	for _, e := range b.Equivalents {
		r.field("same as", "%s, whose layers are the very same", e)
	}
}
