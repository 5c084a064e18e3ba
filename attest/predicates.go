package attest

// link/v1's Go type is deprecated along with everything else in its package.
//lint:file-ignore SA1019 for that reason

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"
	"unicode"

	linkv0 "github.com/in-toto/attestation/go/predicates/link/v0"
	releasev0 "github.com/in-toto/attestation/go/predicates/release/v0"
	releasev02 "github.com/in-toto/attestation/go/predicates/release/v02"
	testresultv0 "github.com/in-toto/attestation/go/predicates/test_result/v0"
	vulnsv02 "github.com/in-toto/attestation/go/predicates/vulns/v02"
	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/in-toto/in-toto-golang/in_toto"
	"github.com/package-url/packageurl-go"
	"golang.org/x/text/unicode/norm"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// Bounds of a predicate that a caller has signed. A statement adds one level of
// nesting around it.
const (
	MaxPredicateDepth = 128
	maxPredicateType  = 512 // bytes
)

// MaxEvidenceName bounds the name of other evidence, in bytes.
const MaxEvidenceName = 128

// CheckPredicate accepts a predicate that a caller may have signed: of a type that
// is a URI in its one canonical spelling and not Reserved, at most MaxPredicate bytes,
// one strict JSON object, and what its type's schema demands if this service knows it
// (docs/predicates). RESERVED_PREDICATE, BAD_REQUEST for the type's form, TOO_LARGE,
// BAD_JSON, or PREDICATE_INVALID with the JSON path of what is wrong.
func CheckPredicate(predicateType string, raw []byte) error {
	if Reserved(predicateType) {
		return Errorf(ReservedPredicate, "predicate type %q is the service's own: it signs such statements only from facts that it has verified", clip(predicateType))
	}
	if why := notCanonical(predicateType); why != "" {
		return Errorf(BadRequest, "predicate type %q %s: give the URI as its specification writes it", clip(predicateType), why)
	}
	if len(raw) > MaxPredicate {
		return Errorf(TooLarge, "the predicate has %d bytes: at most %d", len(raw), MaxPredicate)
	}
	if err := StrictJSON(raw, MaxPredicateDepth); err != nil {
		return err
	}
	if !bytes.HasPrefix(bytes.TrimLeft(raw, " \t\r\n"), []byte("{")) {
		return Errorf(PredicateInvalid, "$ is not an object").With("path", "$")
	}
	for _, known := range knownPredicates {
		if version, ok := known.covers(predicateType); ok {
			return known.check(raw, version)
		}
	}
	return nil
}

// CheckEvidenceName accepts a name that tells evidence of one type apart, or "".
func CheckEvidenceName(name string) error {
	if len(name) > MaxEvidenceName {
		return Errorf(BadRequest, "the name of the evidence has more than %d bytes", MaxEvidenceName)
	}
	for _, r := range name {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return Errorf(BadRequest, "the name of the evidence has the control or unprintable character %U", r)
		}
	}
	return nil
}

// reservedFamilies are host and path of the predicate types that only the service
// signs; what follows them is some version.
var reservedFamilies = []string{
	"slsa.dev/provenance", "slsa.dev/verification_summary", "sigstore.dev/cosign/sign", "cosign.sigstore.dev/attestation",
	"in-toto.io/provenance", // what SLSA's was called before
	strings.TrimSuffix(strings.TrimPrefix(hallmarkPredicates, "https://"), "/"),
}

// Reserved reports whether only the service itself may sign this predicate
// type, in any version and spelling: a caller's predicate that a verifier could
// take for the service's own would be a lie in its name (attacks D01).
func Reserved(predicateType string) bool {
	t := strings.TrimPrefix(plainest(predicateType), "www.")
	for _, family := range reservedFamilies {
		if strings.HasPrefix(t, family) {
			return true
		}
	}
	return opaquelyReserved(predicateType)
}

// opaquelyReserved reports whether a URI without "//", such as a urn or a tag, names
// the owner of a reserved family: it has no path that could be compared.
func opaquelyReserved(uri string) bool {
	if strings.Contains(uri, "://") {
		return false
	}
	for _, owner := range []string{"slsa.dev", "sigstore.dev", "hallmarkd"} {
		if strings.Contains(strings.ToLower(uri), owner) {
			return true
		}
	}
	return false
}

// plainest returns host and path of a URI with everything taken away by which two
// spellings of one place may differ, and more than RFC 3986 section 6 says: what a
// careless reader would take for the same.
func plainest(uri string) string {
	s := uri
	for range 3 { // %2570 is p to whoever decodes twice
		decoded, err := url.PathUnescape(s)
		if err != nil {
			break
		}
		s = decoded
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\\':
			return '/'
		case r == '\u3002': // ideographic full stop, a dot of host names (UTS 46)
			return '.'
		case unicode.IsSpace(r), unicode.IsControl(r), unicode.Is(unicode.Cf, r):
			return -1
		}
		return r
	}, norm.NFKC.String(s))
	s = strings.ToLower(fold(s))
	if scheme, rest, ok := strings.Cut(s, ":"); ok && !strings.ContainsAny(scheme, "/.?#@") {
		s = rest
	}
	s, _, _ = strings.Cut(strings.TrimLeft(s, "/"), "#")
	s, _, _ = strings.Cut(s, "?")
	host, rest, _ := strings.Cut(s, "/")
	host = host[strings.LastIndexByte(host, '@')+1:]
	host, _, _ = strings.Cut(host, ":")
	return strings.TrimRight(host, ".") + path.Clean("/"+rest)
}

// notCanonical says why a predicate type is no URI in canonical spelling, or "":
// policies compare types letter by letter.
func notCanonical(predicateType string) string {
	switch {
	case predicateType == "":
		return "is missing"
	case len(predicateType) > maxPredicateType:
		return fmt.Sprintf("has more than %d bytes", maxPredicateType)
	case strings.ContainsFunc(predicateType, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return "has a character that no URI has"
	}
	u, err := url.Parse(predicateType)
	switch {
	case err != nil || u.Scheme == "" || u.Host == "" && u.Opaque == "":
		return "is no absolute URI"
	case !strings.HasPrefix(predicateType, u.Scheme+":") || u.Host != strings.ToLower(u.Host):
		return "has capital letters in its scheme or host"
	case u.User != nil:
		return "names a user"
	case u.Scheme == "https" && u.Port() == "443", u.Scheme == "http" && u.Port() == "80", strings.HasSuffix(u.Host, ":"), strings.HasSuffix(u.Hostname(), "."):
		return "has more in its host than its name"
	case u.Path != "" && path.Clean(u.Path) != strings.TrimSuffix(u.Path, "/") && u.Path != "/":
		return "has empty segments or dots in its path"
	case u.String() != predicateType || strings.Contains(u.EscapedPath(), "%"):
		return "is not spelled canonically"
	}
	return ""
}

// known is a predicate type whose content is checked.
type known struct {
	family    string
	versioned bool // "/v" and a version may stand behind it
	check     func(raw []byte, version string) error
}

// covers reports whether t is of the family, and the version in it.
func (k known) covers(t string) (version string, ok bool) {
	rest, ok := strings.CutPrefix(t, k.family)
	if !ok || rest == "" {
		return "", ok
	}
	version, ok = strings.CutPrefix(rest, "/v")
	return version, ok && k.versioned
}

var knownPredicates = []known{
	{PredicateTestResult, false, schema(testResult, strictly(func(m *testresultv0.TestResult) error {
		return descriptors("configuration", m.GetConfiguration())
	}))},
	{PredicateVulns, false, schema(vulns, strictly(func(*vulnsv02.Vulns) error { return nil }))},
	// The Go type of v0.1 has other names than its specification, which counts.
	{PredicateVulnsV01, false, schema(vulnsOld)},
	{PredicateRelease, false, schema(release("packageId"), strictly(func(*releasev02.Release) error { return nil }))},
	// Examples of v0.2 print v0.1 with the new name in it.
	{PredicateReleaseV01, false, schema(release("releaseId", "packageId"), func(raw []byte) error {
		if strictly(func(*releasev0.Release) error { return nil })(raw) == nil {
			return nil
		}
		return strictly(func(*releasev02.Release) error { return nil })(raw)
	})},
	{PredicateLink, false, schema(link, strictly(materials))},
	{in_toto.PredicateLinkV1, false, schema(linkOld, legacyLink)},
	{PredicateSPDX, true, spdx},
	{PredicateCycloneDX, true, cycloneDX},
	{PredicateOpenVEX, true, openVEX},
}

// schema checks a shape, and then more.
func schema(s *shape, more ...func(raw []byte) error) func([]byte, string) error {
	return func(raw []byte, _ string) error {
		if err := s.fits(raw); err != nil {
			return err
		}
		for _, check := range more {
			if err := check(raw); err != nil {
				return err
			}
		}
		return nil
	}
}

// strictly reads a predicate into the Go type that in-toto generates for it, which
// knows no other fields.
func strictly[T any, M interface {
	*T
	proto.Message
}](check func(M) error) func([]byte) error {
	return func(raw []byte) error {
		m := M(new(T))
		if err := protojson.Unmarshal(raw, m); err != nil {
			// protojson spaces its errors at random on purpose.
			return Errorf(PredicateInvalid, "%s", strings.ReplaceAll(err.Error(), "\u00a0", " ")).With("path", "$")
		}
		return check(m)
	}
}

// descriptors checks resource descriptors as in-toto does.
func descriptors(name string, list []*intoto.ResourceDescriptor) error {
	for i, d := range list {
		if err := d.Validate(); err != nil {
			at := jsonPath(name, i)
			return Errorf(PredicateInvalid, "%s: %s", at, err.Error()).With("path", at)
		}
	}
	return nil
}

// materials checks those of a link: each has a name of its own and a digest.
func materials(m *linkv0.Link) error {
	seen := map[string]bool{}
	for i, d := range m.GetMaterials() {
		if seen[d.GetName()] {
			at := jsonPath("materials", i, "name")
			return Errorf(PredicateInvalid, "%s is that of an earlier material", at).With("path", at)
		}
		seen[d.GetName()] = true
	}
	return descriptors("materials", m.GetMaterials())
}

// legacyLink checks a link of in-toto 0.9 as in-toto-golang does.
func legacyLink(raw []byte) error {
	var l in_toto.Link
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	err := d.Decode(&l)
	if err == nil {
		err = in_toto.ValidateMetablock(in_toto.Metablock{Signed: l, Signatures: []in_toto.Signature{}})
	}
	if err != nil {
		return Errorf(PredicateInvalid, "$: %s", err.Error()).With("path", "$")
	}
	return nil
}

var (
	timestampText = text(func(s string) string {
		if _, err := time.Parse(time.RFC3339, s); err != nil {
			return fmt.Sprintf("is %q, not a time such as 2026-03-01T12:00:00Z", clip(s))
		}
		return ""
	})
	texts      = list(text(nil))
	descriptor = map[string]*shape{
		"name": text(nil), "uri": text(nil), "digest": {is: anObject}, "content": text(nil),
		"downloadLocation": text(nil), "mediaType": text(nil), "annotations": {is: anObject},
	}

	// in-toto attestation spec/predicates/test-result.md.
	testResult = closed("result configuration", map[string]*shape{
		"result": text(oneOf("PASSED", "WARNED", "FAILED")), "configuration": list(closed("", descriptor)), "url": text(nil),
		"passedTests": texts, "warnedTests": texts, "failedTests": texts,
	})

	// spec/predicates/vulns_02.md.
	scanTimes = map[string]*shape{"scanStartedOn": timestampText, "scanFinishedOn": timestampText}
	database  = map[string]*shape{"uri": text(nil), "version": text(nil), "lastUpdate": timestampText}
	finding   = map[string]*shape{
		"id":          text(filled),
		"severity":    list(closed("method score", map[string]*shape{"method": text(filled), "score": text(nil)})),
		"annotations": list(&shape{is: anObject}),
	}
	vulns = closed("scanner metadata", map[string]*shape{
		"scanner": closed("uri db result", map[string]*shape{
			"uri": text(filled), "version": text(nil), "db": closed("lastUpdate", database), "result": list(closed("id severity", finding)),
		}),
		"metadata": closed("scanStartedOn scanFinishedOn", scanTimes),
	})

	// spec/predicates/vuln.md, whose example has more than its schema.
	vulnsOld = object("scanner metadata", map[string]*shape{
		"scanner": object("uri db result", map[string]*shape{
			"uri": text(filled), "version": text(nil), "db": object("lastUpdate", database),
			"result": list(object("", map[string]*shape{
				"id": finding["id"], "severity": finding["severity"], "vulnerability": object("id severity", finding),
			})),
		}),
		"metadata": object("scanStartedOn scanFinishedOn", scanTimes),
	})

	// spec/predicates/link.md.
	link = closed("name", map[string]*shape{
		"name": text(filled), "command": texts, "materials": list(closed("name digest", descriptor)),
		"byproducts": {is: anObject}, "environment": {is: anObject},
	})
	linkOld = closed("_type name", map[string]*shape{
		"_type": text(oneOf("link")), "name": text(filled), "command": texts, "materials": {is: anObject}, "products": {is: anObject},
		"byproducts": {is: anObject | aNull}, "environment": {is: anObject | aNull},
	})
)

// release is spec/predicates/release.md with the names that a version has for the id
// of the package.
func release(ids ...string) *shape {
	members := map[string]*shape{"purl": text(func(s string) string {
		purl, err := packageurl.FromString(s)
		switch {
		case err != nil:
			return fmt.Sprintf("is %q, not a package URL: %s", clip(s), err)
		case purl.Version == "":
			return "names no version of the package"
		}
		return ""
	})}
	for _, id := range ids {
		members[id] = text(nil)
	}
	return closed("purl", members)
}

// agrees reports whether the version that a document says of itself is that of its
// predicate type, which may have less of it: v3 is that of 3.0.1 too. No version in
// the type agrees with every one.
func agrees(typed, said string) bool {
	return typed == "" || said == typed || strings.HasPrefix(said, typed+".")
}

// versioned returns a shape's text check for a version in the document, and its
// agreement with that of the type.
func versioned(pattern *regexp.Regexp, like, typed string) func(string) string {
	return func(s string) string {
		m := pattern.FindStringSubmatch(s)
		if m == nil {
			return fmt.Sprintf("is %q: %s are checked here, no other", clip(s), like)
		}
		if !agrees(typed, m[1]) {
			return fmt.Sprintf("is %q, but the predicate type says version %s", clip(s), clip(typed))
		}
		return ""
	}
}

var (
	spdx2Version     = regexp.MustCompile(`^SPDX-(2\.[23])$`)
	spdx3Context     = regexp.MustCompile(`^https://spdx\.org/rdf/(3\.0(?:\.[0-9]{1,3})?)/spdx-context\.jsonld$`)
	spdx3Version     = regexp.MustCompile(`^(3\.0(?:\.[0-9]{1,3})?)$`)
	cycloneDXVersion = regexp.MustCompile(`^(1\.[4-7])$`)
	openVEXContext   = regexp.MustCompile(`^https://openvex\.dev/ns(?:/v(0\.[0-9]{1,3}\.[0-9]{1,3}))?$`)
)

// spdx checks an SPDX document as JSON: 2.2 and 2.3 (spdx-spec, clause 6 and the JSON
// schemas), 3.0 as JSON-LD (spdx-spec 3.0, "Serialization in JSON-LD").
func spdx(raw []byte, version string) error {
	var says struct {
		Context json.RawMessage `json:"@context"`
	}
	// StrictJSON has passed it; a name in other case is found wanting below.
	if err := json.Unmarshal(raw, &says); err != nil {
		return Errorf(BadJSON, "JSON cannot be read")
	}
	if says.Context != nil {
		return spdx3(version).fits(raw)
	}
	return spdx2(version).fits(raw)
}

func spdx2(version string) *shape {
	id := text(matching(`^(?:DocumentRef-[A-Za-z0-9.+-]+:)?SPDXRef-[A-Za-z0-9.+-]+$`, "SPDXRef-…"))
	return object("spdxVersion SPDXID name dataLicense documentNamespace creationInfo", map[string]*shape{
		"spdxVersion": text(versioned(spdx2Version, "SPDX-2.2 and SPDX-2.3", version)),
		"SPDXID":      text(oneOf("SPDXRef-DOCUMENT")), "name": text(filled), "dataLicense": text(filled), "documentNamespace": text(filled),
		"creationInfo": object("created creators", map[string]*shape{
			"created": timestampText, "creators": {is: aList, entries: text(filled), some: true},
		}),
		"packages": list(object("SPDXID name downloadLocation", map[string]*shape{
			"SPDXID": id, "name": text(filled), "downloadLocation": text(filled), "versionInfo": text(nil),
		})),
		"files": list(object("SPDXID fileName", map[string]*shape{"SPDXID": id, "fileName": text(filled)})),
		"relationships": list(object("spdxElementId relationshipType relatedSpdxElement", map[string]*shape{
			"spdxElementId": text(filled), "relationshipType": text(filled), "relatedSpdxElement": text(filled),
		})),
	})
}

func spdx3(version string) *shape {
	documents := 0
	element := object("type", map[string]*shape{
		"type": text(filled), "spdxId": text(filled), "@id": text(filled), "name": text(nil), "created": text(nil), "createdBy": {is: aList},
		"specVersion": text(nil),
	})
	element.whole = func(m map[string]string) string {
		switch m["type"] {
		case "SpdxDocument":
			documents++
		case "CreationInfo":
			for name, check := range map[string]func(string) string{
				"specVersion": versioned(spdx3Version, "versions 3.0.x", version), "created": timestampText.text,
			} {
				if why := check(m[name]); why != "" {
					return "has a " + name + " that " + why
				}
			}
			return ""
		}
		if m["spdxId"] == "" && m["@id"] == "" {
			return "has no spdxId"
		}
		return ""
	}
	out := object("@context @graph", map[string]*shape{
		"@context": text(versioned(spdx3Context, "contexts of SPDX 3.0", version)),
		"@graph":   {is: aList, entries: element, some: true},
	})
	out.whole = func(map[string]string) string {
		if documents != 1 {
			return fmt.Sprintf("has %d elements of type SpdxDocument, not one", documents)
		}
		return ""
	}
	return out
}

// cycloneDX checks a CycloneDX BOM as JSON, 1.4 to 1.7 (CycloneDX specification,
// schema/bom-1.x.schema.json).
func cycloneDX(raw []byte, version string) error {
	component := object("type name", map[string]*shape{
		"type": text(filled), "name": text(nil), "version": text(nil), "purl": text(nil), "bom-ref": text(filled),
		"licenses": {is: aList}, "hashes": list(object("alg content", map[string]*shape{"alg": text(filled), "content": text(matching(`^[a-fA-F0-9]{32,128}$`, "hex digits"))})),
	})
	component.members["components"] = list(component)
	service := object("name", map[string]*shape{"name": text(nil), "bom-ref": text(filled)})
	service.members["services"] = list(service)
	bom := object("bomFormat specVersion", map[string]*shape{
		"bomFormat": text(oneOf("CycloneDX")), "specVersion": text(versioned(cycloneDXVersion, "1.4 to 1.7", version)),
		"serialNumber": text(matching(`^urn:uuid:[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$`, "urn:uuid:…")),
		"version":      {is: aNumber, text: matching(`^[1-9][0-9]*$`, "1")},
		"metadata":     object("", map[string]*shape{"timestamp": timestampText, "component": component}),
		"components":   list(component), "services": list(service),
		"dependencies": list(object("ref", map[string]*shape{"ref": text(filled), "dependsOn": texts, "provides": texts})),
		"compositions": list(object("aggregate", map[string]*shape{"aggregate": text(filled)})),
		"vulnerabilities": list(object("", map[string]*shape{
			"id": text(nil), "affects": list(object("ref", map[string]*shape{"ref": text(filled)})),
		})),
	})
	bom.whole = func(m map[string]string) string {
		if m["specVersion"] == "1.4" && m["version"] == "" {
			return "has no version, which CycloneDX 1.4 demands"
		}
		return ""
	}
	return bom.fits(raw)
}

// openVEX checks an OpenVEX document (openvex/spec, OPENVEX-SPEC.md).
func openVEX(raw []byte, version string) error {
	statement := object("vulnerability status", map[string]*shape{
		// An object from 0.2.0 on.
		"vulnerability": {is: anObject | aText, members: map[string]*shape{"name": text(filled)}, need: []string{"name"}, text: filled},
		"status":        text(oneOf("not_affected", "affected", "fixed", "under_investigation")),
		"justification": text(oneOf("component_not_present", "vulnerable_code_not_present", "vulnerable_code_not_in_execute_path",
			"vulnerable_code_cannot_be_controlled_by_adversary", "inline_mitigations_already_exist")),
		"impact_statement": text(nil), "action_statement": text(nil), "timestamp": timestampText, "products": {is: aList},
	})
	statement.whole = func(m map[string]string) string {
		switch {
		case m["status"] == "not_affected" && m["justification"] == "" && m["impact_statement"] == "":
			return "is not_affected without justification or impact_statement"
		case m["status"] == "affected" && m["action_statement"] == "":
			return "is affected without action_statement"
		}
		return ""
	}
	return object("@context @id author timestamp version statements", map[string]*shape{
		"@context": text(versioned(openVEXContext, "contexts of OpenVEX", version)),
		"@id":      text(filled), "author": text(filled), "timestamp": timestampText, "last_updated": timestampText,
		"version":    {is: aNumber | aText, text: matching(`^[1-9][0-9]*$`, "1")},
		"statements": {is: aList, entries: statement, some: true},
	}).fits(raw)
}
