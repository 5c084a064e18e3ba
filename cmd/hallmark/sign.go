package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier"
)

type signCmd struct {
	Images    []string `arg:"" placeholder:"REPO@DIGEST" help:"Images to sign: HOST/PATH@sha256:…"`
	Base      string   `placeholder:"REF" help:"Base image of all of them: HOST/PATH[:TAG][@DIGEST], or scratch. It is checked against the layers."`
	Facts     []string `name:"fact" placeholder:"NAME=VALUE" sep:"none" help:"Say something of your own about all of them. It is recorded as the caller's word, apart from what is verified."`
	Attach    string   `enum:"server,client" default:"server" help:"Who attaches the bundles to the image: the server, or the client with this job's docker configuration."`
	BundleOut string   `name:"bundle-out" placeholder:"DIR" help:"Also write the bundles into this directory."`
	Outputs   string   `placeholder:"FILE" help:"Append NAME=VALUE lines for later steps to this file: $$GITHUB_OUTPUT, or a dotenv report of GitLab."`
	evidenceFlags
	registryFlags
}

// signInfo is the JSON of "hallmark sign": one entry for each image, in order.
type signInfo struct {
	Results []signedInfo `json:"results"`
}

type signedInfo struct {
	Image            string          `json:"image"`             // HOST/PATH@sha256:HEX
	Refusal          *refusalInfo    `json:"refusal,omitempty"` // instead of all that follows
	Digests          []string        `json:"digests,omitempty"` // the index and its platforms, or the one manifest
	Source           string          `json:"source,omitempty"`  // URI
	Ref              string          `json:"ref,omitempty"`
	Commit           string          `json:"commit,omitempty"`
	Run              string          `json:"run,omitempty"` // URI of run and attempt
	Builder          string          `json:"builder,omitempty"`
	Base             *baseInfo       `json:"base,omitempty"`
	Signature        *recordInfo     `json:"signature,omitempty"`
	Provenance       *recordInfo     `json:"provenance,omitempty"`
	SignatureBundle  json.RawMessage `json:"signature_bundle,omitempty"`  // Sigstore bundle v0.3
	ProvenanceBundle json.RawMessage `json:"provenance_bundle,omitempty"` // Sigstore bundle v0.3
	Attached         string          `json:"attached,omitempty"`          // server, client, pending
	Repeated         bool            `json:"repeated,omitempty"`          // the records were there before this call
	Evidence         []evidenceInfo  `json:"evidence,omitempty"`          // in the order of the request
	Files            []string        `json:"files,omitempty"`             // written by --bundle-out
}

type refusalInfo struct {
	Reason   string            `json:"reason"` // stable code
	Message  string            `json:"message"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

type recordInfo struct {
	Number int64             `json:"number"` // index in the log
	ID     string            `json:"id"`     // RFC 6962 leaf hash, hex
	Kind   string            `json:"kind"`
	Time   string            `json:"time"` // RFC 3339, UTC
	Facets map[string]values `json:"facets,omitempty"`
	// Whether this client verified signature, time and log proof by the pinned
	// trust root.
	Checked bool `json:"checked,omitempty"`
}

// values are those of one facet, in order.
type values []string

// Run signs all images in one request. An image that is refused does not stop
// the others; the exit code tells of it.
func (c *signCmd) Run(ctx context.Context, a *app) error {
	facts, err := parseFacts(c.Facts)
	if err != nil {
		return err
	}
	req := &hallmarkv1.SignImagesRequest{Attach: attachBy(c.Attach)}
	var refs []attest.ImageRef
	for _, arg := range c.Images {
		ref, err := c.image(ctx, a, arg)
		if err != nil {
			return err
		}
		refs = append(refs, ref)
		req.Images = append(req.Images, &hallmarkv1.SignImage{Image: ref.String(), Base: c.Base, Facts: facts})
	}
	if req.Evidence, err = c.collect(a, refs); err != nil {
		return err
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewSigningServiceClient(s).SignImages, req)
	if err != nil {
		return err
	}
	if got := len(resp.GetResults()); got != len(refs) {
		return fmt.Errorf("the server answered about %d images, not about %d", got, len(refs))
	}
	r := result{title: "hallmark sign"}
	info, code := signInfo{}, exitOK
	for i, signed := range resp.GetResults() {
		one, err := c.finish(ctx, s, refs[i], req.GetEvidence(), signed)
		if err != nil {
			one.Refusal = refusalOf(err)
			code = worse(code, exitCode(err))
		}
		for _, e := range one.Evidence {
			if e.Refusal != nil {
				code = worse(code, refusalExit(attest.Reason(e.Refusal.Reason)))
			}
		}
		r.signed(one)
		info.Results = append(info.Results, one)
	}
	r.data = info
	if c.Outputs != "" && code == exitOK {
		if err := appendFile(c.Outputs, info.outputs()); err != nil {
			return fmt.Errorf("writing --outputs: %w", err)
		}
	}
	if err := a.print(r); err != nil {
		return err
	}
	return answer(code)
}

// parseFacts reads NAME=VALUE pairs. The rules are the server's: which names are
// taken by what it verifies is told before anything is signed (attacks B07).
func parseFacts(args []string) (map[string]string, error) {
	facts := map[string]string{}
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		if !ok {
			return nil, usagef("--fact %q is not NAME=VALUE", arg)
		}
		if _, twice := facts[name]; twice {
			return nil, usagef("--fact %s is given twice", name)
		}
		facts[name] = value
	}
	return facts, attest.CheckCallerFacts(facts)
}

// outputs are the results that later steps of a job use, a line each. Those of
// several images are separated by spaces, which none of them has except a path.
// No value can start another line, and the names are those that GitHub and GitLab
// both take.
func (info signInfo) outputs() []byte {
	var digests, signatures, provenances, builders, bundles []string
	for _, one := range info.Results {
		digests, builders = append(digests, one.Digests[0]), append(builders, one.Builder)
		signatures, provenances = append(signatures, one.Signature.ID), append(provenances, one.Provenance.ID)
		for _, f := range one.Files {
			if strings.HasSuffix(f, ".provenance"+bundleSuffix) {
				bundles = append(bundles, f)
			}
		}
	}
	var b bytes.Buffer
	for _, line := range []struct {
		name   string
		values []string
	}{{"digest", digests}, {"signature_record", signatures}, {"provenance_record", provenances}, {"builder", builders}, {"bundle_path", bundles}} {
		if len(line.values) > 0 {
			fmt.Fprintf(&b, "%s=%s\n", line.name, plain(strings.Join(line.values, " ")))
		}
	}
	return b.Bytes()
}

// attachBy reads --attach.
func attachBy(flag string) hallmarkv1.Attach {
	if flag == "client" {
		return hallmarkv1.Attach_ATTACH_CLIENT
	}
	return hallmarkv1.Attach_ATTACH_SERVER
}

// attachedBy is an attach state in JSON.
func attachedBy(s hallmarkv1.AttachState) string {
	return map[hallmarkv1.AttachState]string{
		hallmarkv1.AttachState_ATTACH_STATE_ATTACHED: "server",
		hallmarkv1.AttachState_ATTACH_STATE_PENDING:  "pending",
		hallmarkv1.AttachState_ATTACH_STATE_CLIENT:   "client",
	}[s]
}

// attachedWords are attach states for people.
var attachedWords = map[string]string{
	"server": "by the server, read back", "client": "by this job, read back",
	"pending": "not yet: the server goes on trying",
}

// worse returns the code to exit with when several images failed: the first that
// repeating does not mend.
func worse(a, b int) int {
	if a == exitOK || a == exitUnavailable && b != exitOK {
		return b
	}
	return a
}

// finish checks what the server returned about one image, attaches it and
// writes it to files as asked.
func (c *signCmd) finish(ctx context.Context, s *session, ref attest.ImageRef, sent []*hallmarkv1.Evidence, signed *hallmarkv1.SignedImage) (signedInfo, error) {
	info := signedInfo{Image: ref.String()}
	if f := signed.GetRefusal(); f != nil {
		return info, &attest.Error{Reason: attest.Reason(f.GetReason()), Message: f.GetMessage(), Metadata: f.GetMetadata()}
	}
	if signed.GetImage() != ref.String() {
		return info, fmt.Errorf("the server signed %q instead", signed.GetImage())
	}
	digests, err := parseDigests(ref, signed.GetDigests())
	if err != nil {
		return info, err
	}
	v, err := s.verifier()
	if err != nil {
		return info, err
	}
	bundles := []bundle{
		{"signature", attest.KindSignature, attest.PredicateSignature, signed.GetSignature(), signed.GetSignatureBundle()},
		{"provenance", attest.KindProvenance, attest.PredicateProvenance, signed.GetProvenance(), signed.GetProvenanceBundle()},
	}
	for _, b := range bundles {
		if err := b.check(v, digests); err != nil {
			return info, err
		}
	}
	evidence, more, err := c.evidence(v, ref, digests, sent, signed)
	if err != nil {
		return info, err
	}
	info = newSignedInfo(signed)
	info.Evidence, bundles = evidence, append(bundles, more...)
	if signed.GetAttachState() == hallmarkv1.AttachState_ATTACH_STATE_CLIENT {
		if err := c.attach(ctx, s.app, ref, digests, bundles); err != nil {
			return info, fmt.Errorf("signed and recorded, but not attached: %w", err)
		}
	}
	if c.BundleOut != "" {
		info.Files, err = writeBundles(c.BundleOut, ref.Digest, bundles)
	}
	return info, err
}

// parseDigests reads the digests that a statement covers; the image's own must
// be the first.
func parseDigests(ref attest.ImageRef, in []string) ([]attest.Digest, error) {
	out := make([]attest.Digest, 0, len(in))
	for _, text := range in {
		d, err := attest.ParseDigest(text)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	if len(out) == 0 || out[0] != ref.Digest {
		return nil, attest.Errorf(attest.SubjectMismatch, "the server's answer does not name %s first among what it signed", ref.Digest)
	}
	return out, nil
}

// bundle is one signed statement as the server returned it.
type bundle struct {
	name          string // in file names
	kind          attest.RecordKind
	predicateType string // URI
	record        *hallmarkv1.Record
	raw           []byte // Sigstore bundle v0.3, JSON
}

// check verifies a bundle before it is passed on: what this command reports as
// signed can be verified by anybody who has the trust root.
func (b bundle) check(v *verifier.Verifier, digests []attest.Digest) error {
	for _, d := range digests {
		ev, err := v.Bundle(b.raw, d)
		if err == nil {
			err = sameRecord(ev, b.kind, b.record)
		}
		if err != nil {
			return fmt.Errorf("the server's %s does not verify: %w", b.name, err)
		}
	}
	return nil
}

// attach writes the bundles to the registry with the job's own rights, to the
// index and to each of its platforms.
func (c registryFlags) attach(ctx context.Context, a *app, ref attest.ImageRef, digests []attest.Digest, bundles []bundle) error {
	client, err := c.client(ref.Repository)
	if err != nil {
		return err
	}
	defer a.progress("attaching to " + ref.String())()
	for _, d := range digests {
		for _, b := range bundles {
			to := attest.ImageRef{Repository: ref.Repository, Digest: d}
			if err := client.Attach(ctx, to, b.raw, b.predicateType, b.record.GetTime().AsTime()); err != nil {
				return fmt.Errorf("%s of %s: %w", b.name, to, err)
			}
		}
	}
	return nil
}

const bundleSuffix = ".sigstore.json"

// writeBundles writes DIR/<hex>.<name>.sigstore.json and returns the paths. A
// file with other content is left as it is and is an error.
func writeBundles(dir string, d attest.Digest, bundles []bundle) ([]string, error) {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, fmt.Errorf("writing bundles: %w", err)
	}
	var paths []string
	for _, b := range bundles {
		path := filepath.Join(dir, d.Hex()+"."+b.name+bundleSuffix)
		if err := writeOnce(path, b.raw); err != nil {
			return paths, fmt.Errorf("writing bundles: %w", err)
		}
		paths = append(paths, path)
	}
	return paths, nil
}

func writeOnce(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if errors.Is(err, fs.ErrExist) {
		old, err := os.ReadFile(path)
		if err == nil && !bytes.Equal(old, b) {
			err = fmt.Errorf("%s exists with other content", path)
		}
		return err
	}
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func newSignedInfo(s *hallmarkv1.SignedImage) signedInfo {
	info := signedInfo{
		Image: s.GetImage(), Digests: s.GetDigests(), Source: s.GetSource(), Ref: s.GetRef(), Commit: s.GetCommit(),
		Run: s.GetRun(), Builder: s.GetBuilder(), Base: newBaseInfo(s.GetBase()), Repeated: s.GetRepeatedRequest(),
		Signature: newRecordInfo(s.GetSignature()), Provenance: newRecordInfo(s.GetProvenance()),
		Attached: attachedBy(s.GetAttachState()), SignatureBundle: rawJSON(s.GetSignatureBundle()), ProvenanceBundle: rawJSON(s.GetProvenanceBundle()),
	}
	return info
}

func newRecordInfo(r *hallmarkv1.Record) *recordInfo {
	if r == nil {
		return nil
	}
	info := &recordInfo{Number: r.GetIndex(), ID: r.GetId(), Kind: r.GetKind(), Time: rfc3339(r.GetTime())}
	for _, f := range r.GetFacets() {
		if info.Facets == nil {
			info.Facets = map[string]values{}
		}
		info.Facets[f.GetName()] = append(info.Facets[f.GetName()], f.GetValue())
	}
	return info
}

func refusalOf(err error) *refusalInfo {
	var e *attest.Error
	if errors.As(err, &e) {
		return &refusalInfo{string(e.Reason), strings.Replace(err.Error(), string(e.Reason)+": ", "", 1), e.Metadata}
	}
	return &refusalInfo{string(attest.Internal), err.Error(), nil}
}

// signed renders what became of one image.
func (r *result) signed(s signedInfo) {
	if s.Refusal != nil {
		r.mark(bad, "REFUSED  %s", s.Image)
		r.add("  %s [%s]", s.Refusal.Message, s.Refusal.Reason)
		for _, line := range claimTable(s.Refusal.Metadata) {
			r.add("%s", line)
		}
		if s.Signature == nil {
			return
		}
	} else {
		r.mark(good, "SIGNED  %s%s", s.Image, map[bool]string{true: "  (recorded before)"}[s.Repeated])
	}
	if n := len(s.Digests); n > 1 {
		r.field("platforms", "%d, signed with the index", n-1)
	}
	r.field("commit", "%s", s.Commit)
	r.field("ref", "%s", s.Ref)
	r.field("source", "%s", s.Source)
	r.field("run", "%s", s.Run)
	r.field("builder", "%s", s.Builder)
	r.field("base", "%s", baseText(s.Base))
	r.field("records", "signature %s, provenance %s", number(s.Signature), number(s.Provenance))
	r.field("attached", "%s", attachedWords[s.Attached])
	for _, e := range s.Evidence {
		switch {
		case e.Refusal != nil:
			r.mark(bad, "  x %s  %s [%s]", e.label(), e.Refusal.Message, e.Refusal.Reason)
		case e.Attached == "pending":
			r.field("evidence", "%s, record %s, not attached yet", e.label(), number(e.Record))
		default:
			r.field("evidence", "%s, record %s%s", e.label(), number(e.Record), map[bool]string{true: " (recorded before)"}[e.Repeated])
		}
	}
	for _, f := range s.Files {
		r.field("bundle", "%s", f)
	}
}

func number(r *recordInfo) string {
	if r == nil {
		return "none"
	}
	return strconv.FormatInt(r.Number, 10)
}
