package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

type historyCmd struct {
	Image  string `arg:"" optional:"" placeholder:"REPO[@DIGEST]" help:"Only records about this repository or image."`
	Kind   string `placeholder:"KIND" help:"Only records of this kind: ${kinds}."`
	Commit string `placeholder:"HEX" help:"Only records about this commit, given whole."`
	Limit  int    `default:"100" help:"At most so many."`
}

// historyInfo is the JSON of "hallmark history".
type historyInfo struct {
	Records []*recordInfo `json:"records"`  // newest first
	More    bool          `json:"more"`     // there are older ones than --limit
	LogSize int64         `json:"log_size"` // the answer is about the records before this index
}

// recordKinds are those that --kind knows.
var recordKinds = []attest.RecordKind{
	attest.KindPrecertificate, attest.KindSignature, attest.KindProvenance, attest.KindVSA,
	attest.KindPromotion, attest.KindDenial, attest.KindEffect, attest.KindPolicy, attest.KindEvidence,
}

// kindList is recordKinds for people.
func kindList() string {
	names := make([]string, len(recordKinds))
	for i, k := range recordKinds {
		names[i] = string(k)
	}
	return strings.Join(names, ", ")
}

// filter builds the filter of ListRecords. Every value in it has been parsed, so
// that none can add a condition.
func (c *historyCmd) filter() (string, error) {
	var terms []string
	add := func(name, value string) { terms = append(terms, name+`="`+value+`"`) }
	if c.Kind != "" {
		if !slices.Contains(recordKinds, attest.RecordKind(c.Kind)) {
			return "", usagef("--kind %q is none of %s", c.Kind, kindList())
		}
		add("kind", c.Kind)
	}
	if c.Commit != "" {
		if err := commit(c.Commit); err != nil {
			return "", err
		}
		add(attest.FacetCommit, c.Commit)
	}
	switch {
	case strings.Contains(c.Image, "@"):
		ref, err := attest.ParseImageRef(c.Image)
		if err != nil {
			return "", err
		}
		add(attest.FacetRepository, string(ref.Repository))
		add(attest.FacetDigest, ref.Digest.String())
	case c.Image != "":
		if i := strings.LastIndexByte(c.Image, ':'); i > strings.IndexByte(c.Image, '/') {
			_, err := attest.ParseImageRef(c.Image)
			return "", err
		}
		repo, err := attest.ParseRepository(c.Image)
		if err != nil {
			return "", err
		}
		add(attest.FacetRepository, string(repo))
	}
	return strings.Join(terms, " AND "), nil
}

const pageSize = 1000 // the server's most

// Run lists records, page by page up to the limit.
func (c *historyCmd) Run(ctx context.Context, a *app) error {
	filter, err := c.filter()
	if err != nil {
		return err
	}
	if c.Limit <= 0 {
		return usagef("--limit must be at least 1")
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	info := historyInfo{Records: []*recordInfo{}}
	r := result{title: "hallmark history"}
	var rows [][]string
	req := &hallmarkv1.ListRecordsRequest{Filter: filter}
	for {
		req.PageSize = int32(min(pageSize, c.Limit-len(info.Records)))
		page, err := call(ctx, s, hallmarkv1.NewAuditServiceClient(s).ListRecords, req)
		if err != nil {
			return err
		}
		info.LogSize = page.GetLogSize()
		for _, rec := range page.GetRecords() {
			info.Records = append(info.Records, newRecordInfo(rec))
			rows = append(rows, historyRow(newRecordInfo(rec)))
		}
		req.PageToken = page.GetNextPageToken()
		info.More = req.PageToken != ""
		if !info.More || len(info.Records) >= c.Limit || len(page.GetRecords()) == 0 {
			break
		}
	}
	r.table(rows)
	switch {
	case len(rows) == 0:
		r.add("no records")
	case info.More:
		r.add("older ones follow: --limit shows more")
	}
	r.data = info
	return a.print(r)
}

// historyRow shows the facets of a record that tell it from others of its kind.
func historyRow(r *recordInfo) []string {
	facet := func(name string) string { return strings.Join(r.Facets[name], ",") }
	image := facet(attest.FacetRepository)
	if d := r.Facets[attest.FacetDigest]; len(d) > 0 {
		image += "@" + clipped(d[0])
		if len(d) > 1 {
			image += fmt.Sprintf(" +%d", len(d)-1)
		}
	}
	var about []string
	for _, name := range []string{attest.FacetStage, attest.FacetReason, attest.FacetCommit, attest.FacetTicket, attest.FacetIdentity} {
		if v := facet(name); v != "" {
			about = append(about, v)
		}
	}
	return []string{strconv.FormatInt(r.Number, 10), r.Time, r.Kind, image, strings.Join(about, "  ")}
}

// clipped shortens a digest to what tells it from all others in a list.
func clipped(digest string) string {
	d, err := attest.ParseDigest(digest)
	if err != nil {
		return digest
	}
	return "sha256:" + d.Short() + "…"
}

type decisionCmd struct {
	ID      int64 `arg:"" placeholder:"NUMBER" help:"Number of the decision."`
	Explain bool  `help:"Show every rule with its reason and record."`
}

// Run shows a recorded decision. That it was a denial is the answer here, not a
// failure: the exit code is 0.
func (c *decisionCmd) Run(ctx context.Context, a *app) error {
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewAuditServiceClient(s).GetDecision, &hallmarkv1.GetDecisionRequest{Id: c.ID})
	if err != nil {
		return err
	}
	d := resp.GetDecision()
	if err := checkDecision(d, "", ""); err != nil {
		return err
	}
	if d.GetId() != c.ID {
		return fmt.Errorf("the server answered with decision %d, not %d", d.GetId(), c.ID)
	}
	r := a.decided(d, question{verb: "decision", explain: c.Explain})
	r.add("decided %s by policy version %d", rfc3339(d.GetTime()), d.GetPolicy().GetVersion())
	return a.print(r)
}

type stagesCmd struct {
	Track      string `help:"Only this track."`
	Repository string `placeholder:"REPO" help:"Only this repository."`
}

// stagesInfo is the JSON of "hallmark stages".
type stagesInfo struct {
	Stages []stageInfo `json:"stages"` // by track, repository and order of the stages
}

type stageInfo struct {
	Track      string     `json:"track"`
	Stage      string     `json:"stage"`
	Repository string     `json:"repository"`
	After      string     `json:"after,omitempty"`
	Current    *entryInfo `json:"current,omitempty"` // none: nothing was promoted there
}

// Run lists what is in the stages that the caller has a role for.
func (c *stagesCmd) Run(ctx context.Context, a *app) error {
	if c.Repository != "" {
		if _, err := attest.ParseRepository(c.Repository); err != nil {
			return err
		}
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	info := stagesInfo{Stages: []stageInfo{}}
	r := result{title: "hallmark stages"}
	var rows [][]string
	req := &hallmarkv1.ListStagesRequest{Track: c.Track, Repository: c.Repository, PageSize: pageSize}
	for {
		page, err := call(ctx, s, hallmarkv1.NewPromotionServiceClient(s).ListStages, req)
		if err != nil {
			return err
		}
		for _, st := range page.GetStages() {
			one := stageInfo{Track: st.GetTrack(), Stage: st.GetStage(), Repository: st.GetRepository(), After: st.GetAfter()}
			row := []string{one.Track, one.Stage, one.Repository, "nothing"}
			if e := st.GetCurrent(); e != nil {
				entry := newEntryInfo(e)
				one.Current = &entry
				row = append(row[:3], entry.Digest, "since "+entry.Since, entry.State, entry.Target)
			}
			info.Stages, rows = append(info.Stages, one), append(rows, row)
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" || len(page.GetStages()) == 0 {
			break
		}
	}
	r.table(rows)
	if len(rows) == 0 {
		r.add("no stages: the policy has none for what you may see (hallmark whoami shows your roles)")
	}
	r.data = info
	return a.print(r)
}

type trustRootCmd struct {
	Fingerprint bool   `xor:"what" help:"Print its fingerprint only, for --trust-root-sha256."`
	GateKey     bool   `name:"gate-key" xor:"what" help:"Print the public key of the gate as PEM instead."`
	File        string `short:"o" name:"out-file" placeholder:"FILE" help:"Write to this file instead of standard output."`
}

// trustRootInfo is the JSON of "hallmark trust-root".
type trustRootInfo struct {
	SHA256      string          `json:"sha256"` // hex, of trusted_root.json byte for byte
	Service     string          `json:"service"`
	TrustedRoot json.RawMessage `json:"trusted_root"`
	GateKey     string          `json:"gate_key"` // PEM
}

// Run prints the document byte for byte, so that its SHA-256 is the fingerprint.
func (c *trustRootCmd) Run(ctx context.Context, a *app) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	out := s.trustedRoot
	var gate string
	if c.GateKey || a.Output == "json" {
		resp, err := call(ctx, s, hallmarkv1.NewTrustServiceClient(s).GetGateKey, &hallmarkv1.GetGateKeyRequest{})
		if err != nil {
			return err
		}
		if gate, err = publicKey(resp.GetPem()); err != nil {
			return err
		}
	}
	switch {
	case c.Fingerprint:
		out = []byte(s.fingerprint + "\n")
	case c.GateKey:
		out = []byte(gate)
	case a.Output == "json":
		if out, err = encodeJSON(trustRootInfo{s.fingerprint, s.service, rawJSON(s.trustedRoot), gate}); err != nil {
			return err
		}
	}
	switch {
	case c.File != "":
	case a.Output == "md":
		r := result{title: "hallmark trust-root"}
		for l := range strings.Lines(string(out)) {
			r.add("%s", strings.TrimSuffix(l, "\n"))
		}
		return a.print(r)
	default:
		return a.write(out)
	}
	if err := os.WriteFile(filepath.Clean(c.File), out, 0o644); err != nil {
		return fmt.Errorf("writing the trust root: %w", err)
	}
	a.note("wrote %s, trust root %s", c.File, s.fingerprint)
	return nil
}

// publicKey reads a public key in PEM and writes it anew, so that nothing else of
// the server's text is shown or stored.
func publicKey(text string) (string, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return "", fmt.Errorf("the server's gate key is no PEM")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("reading the server's gate key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("reading the server's gate key: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}
