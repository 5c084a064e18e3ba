package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier"
)

// Bounds of one request, which the server has as well: asking it for more would
// only cost the upload.
const (
	maxEvidence      = 16
	maxEvidenceBytes = 64 << 20 // each predicate counted once for every image that it is about
)

// predicateWords are the short names of predicate types: cosign's where it has one,
// with the in-toto types behind link and vuln, whose content is checked.
var predicateWords = map[string]string{
	"spdx": attest.PredicateSPDX, "spdxjson": attest.PredicateSPDX, "cyclonedx": attest.PredicateCycloneDX,
	"openvex": attest.PredicateOpenVEX, "vuln": attest.PredicateVulns, "link": attest.PredicateLink,
	"test-result": attest.PredicateTestResult, "release": attest.PredicateRelease,
}

// predicateList is the words for a mistake's message and for --help.
func predicateList() string { return strings.Join(slices.Sorted(maps.Keys(predicateWords)), ", ") }

// predicateWord returns the short name of a type for people and file names, "" when
// it has none.
func predicateWord(uri string) string {
	for _, word := range slices.Sorted(maps.Keys(predicateWords)) {
		if predicateWords[word] == uri {
			return word
		}
	}
	return ""
}

// predicateType reads a TYPE: a short word or a URI. Those that the service alone
// writes are refused before anything is sent (attacks D01).
func predicateType(arg string) (string, error) {
	uri, known := predicateWords[arg]
	switch {
	case known:
		return uri, nil
	case strings.HasPrefix(arg, "slsaprovenance"), attest.Reserved(arg):
		return "", attest.Errorf(attest.ReservedPredicate, "%s: what the service says itself is not signed for a caller. Provenance is written by hallmark sign, from the job's verified token", arg)
	case arg == "custom":
		return "", usagef("custom names no type: give the URI of yours, for example https://example.com/review/v1")
	case !strings.Contains(arg, ":"): // what is a URI is for attest.CheckPredicate
		return "", usagef("%q is no predicate type: give a URI, or one of %s", arg, predicateList())
	}
	return arg, nil
}

// namePattern is what may be called a name of evidence: it becomes part of file
// names too.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)

// checkPredicate is what the server checks too, so that a mistake is told at once.
func checkPredicate(from, uri string, predicate []byte) error {
	if err := attest.CheckPredicate(uri, predicate); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return nil
}

// readInput reads FILE, or standard input for "-", up to the size of a predicate.
func (a *app) readInput(path string) ([]byte, error) {
	in := a.stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, attest.MaxPredicate+1))
	if err == nil && len(raw) > attest.MaxPredicate {
		err = attest.Errorf(attest.TooLarge, "%s has more than %d bytes", path, attest.MaxPredicate)
	}
	return raw, err
}

type attestCmd struct {
	Image     string `arg:"" placeholder:"REPO@DIGEST" help:"The image: HOST/PATH@sha256:…"`
	Type      string `required:"" placeholder:"TYPE" help:"Predicate type: a URI, or one of ${types}."`
	Predicate string `required:"" placeholder:"FILE" help:"JSON object to sign, at most 16 MiB; - is standard input."`
	Name      string `placeholder:"NAME" help:"Tells evidence of one type apart. Of one type, name and signer, the newest counts."`
	Attach    string `enum:"server,client" default:"server" help:"Who attaches the bundle to the image: the server, or the client with this job's docker configuration."`
	BundleOut string `name:"bundle-out" placeholder:"DIR" help:"Also write the bundle into this directory."`
	registryFlags
}

// evidenceInfo is the JSON of one signed predicate: of "hallmark attest", and of
// each image in that of "hallmark sign".
type evidenceInfo struct {
	Image         string          `json:"image,omitempty"` // HOST/PATH@sha256:HEX; left out where it stands beside
	PredicateType string          `json:"predicate_type"`  // URI
	Name          string          `json:"name,omitempty"`
	Refusal       *refusalInfo    `json:"refusal,omitempty"` // instead of all that follows
	Digests       []string        `json:"digests,omitempty"` // the index and its platforms, or the one manifest
	Record        *recordInfo     `json:"record,omitempty"`
	Bundle        json.RawMessage `json:"bundle,omitempty"`   // Sigstore bundle v0.3, where the server returned it
	Attached      string          `json:"attached,omitempty"` // server, client, pending
	Repeated      bool            `json:"repeated,omitempty"` // the record was there before this call
	Files         []string        `json:"files,omitempty"`    // written by --bundle-out
}

// Run has one predicate signed with this caller's identity.
func (c *attestCmd) Run(ctx context.Context, a *app) error {
	uri, err := predicateType(c.Type)
	if err != nil {
		return err
	}
	if c.Name != "" && !namePattern.MatchString(c.Name) {
		return usagef("--name %q: a name is letters, digits, '_', '.' and '-', at most 63", c.Name)
	}
	predicate, err := a.readInput(c.Predicate)
	if err != nil {
		return fmt.Errorf("reading --predicate: %w", err)
	}
	if err := checkPredicate("--predicate "+c.Predicate, uri, predicate); err != nil {
		return err
	}
	ref, err := c.image(ctx, a, c.Image)
	if err != nil {
		return err
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewSigningServiceClient(s).Attest, &hallmarkv1.AttestRequest{
		Image: ref.String(), PredicateType: uri, Predicate: predicate, Name: c.Name, Attach: attachBy(c.Attach),
	})
	if err != nil {
		return err
	}
	info := evidenceInfo{
		Image: ref.String(), PredicateType: uri, Name: c.Name, Digests: resp.GetDigests(), Record: newRecordInfo(resp.GetRecord()),
		Bundle: rawJSON(resp.GetBundle()), Attached: attachedBy(resp.GetAttachState()), Repeated: resp.GetRepeatedRequest(),
	}
	b := bundle{evidenceFile(uri, c.Name, resp.GetRecord()), attest.KindEvidence, uri, resp.GetRecord(), resp.GetBundle()}
	if err := c.finish(ctx, s, ref, b, predicate, &info); err != nil {
		return err
	}
	r := result{title: "hallmark attest", data: info}
	r.mark(good, "SIGNED  %s%s", info.Image, map[bool]string{true: "  (recorded before)"}[info.Repeated])
	if n := len(info.Digests); n > 1 {
		r.field("platforms", "%d, attested with the index", n-1)
	}
	r.field("type", "%s", info.PredicateType)
	r.field("name", "%s", info.Name)
	r.field("record", "%s", number(info.Record))
	r.field("attached", "%s", attachedWords[info.Attached])
	for _, f := range info.Files {
		r.field("bundle", "%s", f)
	}
	return a.print(r)
}

// finish checks what the server returned, attaches it and writes it as asked.
func (c *attestCmd) finish(ctx context.Context, s *session, ref attest.ImageRef, b bundle, predicate []byte, info *evidenceInfo) error {
	digests, err := parseDigests(ref, info.Digests)
	if err != nil {
		return err
	}
	v, err := s.verifier()
	if err != nil {
		return err
	}
	if err := b.check(v, digests); err != nil {
		return err
	}
	if err := b.says(v, digests[0], c.Name, predicate); err != nil {
		return err
	}
	if info.Attached == "client" {
		if err := c.attach(ctx, s.app, ref, digests, []bundle{b}); err != nil {
			return fmt.Errorf("signed and recorded as %s, but not attached: %w", number(info.Record), err)
		}
	}
	if c.BundleOut != "" {
		info.Files, err = writeBundles(c.BundleOut, ref.Digest, []bundle{b})
	}
	return err
}

// says refuses a statement that is not the one that was asked for, however well it
// is signed (attacks M03).
func (b bundle) says(v *verifier.Verifier, d attest.Digest, name string, predicate []byte) error {
	ev, err := v.Bundle(b.raw, d)
	if err != nil {
		return err
	}
	s := ev.Statement()
	switch {
	case s.PredicateType != b.predicateType:
		return attest.Errorf(attest.PredicateType, "the server signed a statement of type %s instead of %s", s.PredicateType, b.predicateType)
	case s.EvidenceName() != name:
		return attest.Errorf(attest.StatementMalformed, "the server signed evidence of the name %q instead of %q", s.EvidenceName(), name)
	case !sameJSON(s.Predicate, predicate):
		return attest.Errorf(attest.StatementMalformed, "the server signed another predicate than the one that was sent")
	}
	return nil
}

// sameJSON compares two values that StrictJSON has passed, numbers as written.
func sameJSON(a, b []byte) bool {
	decode := func(raw []byte) (v any, err error) {
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		err = d.Decode(&v)
		return v, err
	}
	x, xerr := decode(a)
	y, yerr := decode(b)
	return xerr == nil && yerr == nil && reflect.DeepEqual(x, y)
}

// evidenceFile is the part of a bundle's file name that tells evidence apart.
func evidenceFile(uri, name string, r *hallmarkv1.Record) string {
	file := orElse(predicateWord(uri), "evidence-"+number(newRecordInfo(r)))
	if name != "" {
		file += "-" + name
	}
	return file
}

// evidenceFlags are those of sign. Each is given as often as there are files:
// [REPO@DIGEST=][NAME=]FILE, without an image about all of the request.
type evidenceFlags struct {
	SBOMs    []string `name:"sbom" placeholder:"F" sep:"none" help:"SPDX or CycloneDX document in JSON: FILE, NAME=FILE, or REPO@DIGEST=FILE for one of several images."`
	Tests    []string `name:"test-results" placeholder:"F" sep:"none" help:"Test results: a test-result predicate in JSON, or a JUnit XML report. As with --sbom."`
	Evidence []string `placeholder:"TYPE=F" sep:"none" help:"Other evidence: TYPE is a URI or one of ${types}, F as with --sbom."`
}

// collect reads the files into the evidence of one request about the images.
func (f evidenceFlags) collect(a *app, images []attest.ImageRef) ([]*hallmarkv1.Evidence, error) {
	var out []*hallmarkv1.Evidence
	for _, kind := range []struct {
		flag string
		args []string
		read func(path string, raw []byte) (uri string, predicate []byte, err error)
	}{{"--sbom", f.SBOMs, readSBOM}, {"--test-results", f.Tests, readTestResults}, {"--evidence", f.Evidence, nil}} {
		for _, arg := range kind.args {
			e, err := collectOne(a, kind.flag, arg, images, kind.read)
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", kind.flag, arg, err)
			}
			out = append(out, e)
		}
	}
	return out, fits(out, images)
}

func collectOne(a *app, flag, arg string, images []attest.ImageRef, read func(string, []byte) (string, []byte, error)) (*hallmarkv1.Evidence, error) {
	e := &hallmarkv1.Evidence{}
	rest := arg
	if head, tail, ok := strings.Cut(rest, "="); ok && strings.Contains(head, "@") {
		ref, err := attest.ParseImageRef(head)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(images, ref) {
			return nil, usagef("%s is not among the images to sign", ref)
		}
		e.Images, rest = []string{ref.String()}, tail
	}
	if read == nil {
		head, tail, ok := strings.Cut(rest, "=")
		if !ok {
			return nil, usagef("give TYPE=FILE")
		}
		uri, err := predicateType(head)
		if err != nil {
			return nil, err
		}
		rest = tail
		read = func(_ string, raw []byte) (string, []byte, error) { return uri, raw, nil }
	}
	if head, tail, ok := strings.Cut(rest, "="); ok && namePattern.MatchString(head) {
		e.Name, rest = head, tail
	}
	raw, err := a.readInput(rest)
	if err != nil {
		return nil, err
	}
	if e.PredicateType, e.Predicate, err = read(rest, raw); err != nil {
		return nil, err
	}
	return e, checkPredicate(rest, e.PredicateType, e.Predicate)
}

// fits refuses more than one request holds, and two pieces of evidence of which the
// newer would hide the older: of one type and name about one image.
func fits(all []*hallmarkv1.Evidence, images []attest.ImageRef) error {
	if len(all) > maxEvidence {
		return usagef("%d files of evidence: one request takes at most %d", len(all), maxEvidence)
	}
	size, seen := 0, map[string]bool{}
	for _, e := range all {
		about := e.GetImages()
		if len(about) == 0 {
			for _, ref := range images {
				about = append(about, ref.String())
			}
		}
		size += len(e.GetPredicate()) * len(about)
		for _, image := range about {
			key := e.GetPredicateType() + "\n" + e.GetName() + "\n" + image
			if seen[key] {
				return usagef("two pieces of evidence of the type %s about %s have the same name, so that one would hide the other: tell them apart as NAME=FILE", e.GetPredicateType(), image)
			}
			seen[key] = true
		}
	}
	if size > maxEvidenceBytes {
		return attest.Errorf(attest.TooLarge, "the evidence has %d bytes, counted for each image that it is about, more than %d: sign fewer images at once", size, maxEvidenceBytes)
	}
	return nil
}

// readSBOM tells SPDX from CycloneDX by the member that each demands at the top.
func readSBOM(path string, raw []byte) (string, []byte, error) {
	if err := attest.StrictJSON(raw, attest.MaxPredicateDepth); err != nil {
		return "", nil, fmt.Errorf("%s: %w (SPDX and CycloneDX are taken as JSON)", path, err)
	}
	var top struct {
		SPDXVersion string          `json:"spdxVersion"` // SPDX 2, section 6.1
		Context     json.RawMessage `json:"@context"`    // SPDX 3, section "Serialization"
		BOMFormat   string          `json:"bomFormat"`   // CycloneDX 1.x
	}
	// Members of other types than these are another document's.
	err := json.Unmarshal(raw, &top)
	spdx := strings.HasPrefix(top.SPDXVersion, "SPDX-") || bytes.Contains(top.Context, []byte("https://spdx.org/rdf/3"))
	cyclone := top.BOMFormat == "CycloneDX"
	switch {
	case err != nil || spdx == cyclone:
		return "", nil, attest.Errorf(attest.PredicateInvalid, "%s is neither SPDX (spdxVersion, or @context of SPDX 3) nor CycloneDX (bomFormat) in JSON", path)
	case spdx:
		return attest.PredicateSPDX, raw, nil
	}
	return attest.PredicateCycloneDX, raw, nil
}

// readTestResults takes a predicate as it is and turns a JUnit report into one.
func readTestResults(path string, raw []byte) (string, []byte, error) {
	text := bytes.TrimLeft(bytes.TrimPrefix(raw, []byte(byteOrderMark)), " \t\r\n")
	if !bytes.HasPrefix(text, []byte("<")) {
		return attest.PredicateTestResult, raw, nil
	}
	predicate, err := fromJUnit(filepath.Base(path), raw)
	return attest.PredicateTestResult, predicate, err
}

// evidence checks what became of the evidence about one image: one result for each
// that was sent, in its order. Bundles come only when this job attaches them.
func (c *signCmd) evidence(v *verifier.Verifier, ref attest.ImageRef, digests []attest.Digest, sent []*hallmarkv1.Evidence, signed *hallmarkv1.SignedImage) ([]evidenceInfo, []bundle, error) {
	var about []*hallmarkv1.Evidence
	for _, e := range sent {
		if len(e.GetImages()) == 0 || slices.Contains(e.GetImages(), ref.String()) {
			about = append(about, e)
		}
	}
	if got := len(signed.GetEvidence()); got != len(about) {
		return nil, nil, fmt.Errorf("the server answered about %d pieces of evidence, not about %d", got, len(about))
	}
	var infos []evidenceInfo
	var bundles []bundle
	for i, got := range signed.GetEvidence() {
		want := about[i]
		info := evidenceInfo{PredicateType: want.GetPredicateType(), Name: want.GetName()}
		if f := got.GetRefusal(); f != nil {
			info.Refusal = &refusalInfo{f.GetReason(), f.GetMessage(), f.GetMetadata()}
			infos = append(infos, info)
			continue
		}
		if got.GetPredicateType() != want.GetPredicateType() || got.GetName() != want.GetName() || got.GetRecord() == nil {
			return infos, nil, fmt.Errorf("the server signed evidence of the type %q and the name %q instead of %q and %q", got.GetPredicateType(), got.GetName(), want.GetPredicateType(), want.GetName())
		}
		info.Record, info.Attached, info.Repeated = newRecordInfo(got.GetRecord()), attachedBy(got.GetAttachState()), got.GetRepeatedRequest()
		if len(got.GetBundle()) > 0 || c.Attach == "client" {
			b := bundle{evidenceFile(info.PredicateType, info.Name, got.GetRecord()), attest.KindEvidence, info.PredicateType, got.GetRecord(), got.GetBundle()}
			if err := b.check(v, digests); err != nil {
				return infos, nil, err
			}
			if err := b.says(v, digests[0], info.Name, want.GetPredicate()); err != nil {
				return infos, nil, err
			}
			info.Bundle = rawJSON(got.GetBundle())
			bundles = append(bundles, b)
		}
		infos = append(infos, info)
	}
	return infos, bundles, nil
}

// label names evidence for people: its short word, or its type, and its name.
func (e evidenceInfo) label() string {
	s := orElse(predicateWord(e.PredicateType), e.PredicateType)
	if e.Name != "" {
		s += " " + e.Name
	}
	return s
}
