package attest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
)

// Documents as the specifications' own examples have them, by predicate type.
var examples = map[string]string{
	attest.PredicateTestResult: `{"result":"PASSED","configuration":[{"name":".github/workflows/ci.yml",` +
		`"downloadLocation":"https://github.com/in-toto/in-toto/blob/d20ace7968ba43c0219f62d71334c1095bab1602/.github/workflows/ci.yml",` +
		`"digest":{"gitBlob":"ebe4add40f63c3c98bc9b32ff1e736f04120b023"}}],"url":"https://github.com/in-toto/in-toto/actions/runs/4425592351",` +
		`"passedTests":["build (3.7, ubuntu-latest, py)"],"warnedTests":[],"failedTests":[]}`,
	attest.PredicateVulns: `{"scanner":{"uri":"pkg:github/aquasecurity/trivy@244fd47e07d1004f0aed9","version":"0.19.2",` +
		`"db":{"uri":"pkg:github/aquasecurity/trivy-db/commit/4c76bb580b2736d67751410fa4ab66d2b6b9b27d","version":"v1-2021080612","lastUpdate":"2021-08-06T17:45:50.52Z"},` +
		`"result":[{"id":"CVE-123","severity":[{"method":"nvd","score":"medium"},{"method":"cvss_score","score":"5.2"}],"annotations":[{"fixed":["1.2"]}]}]},` +
		`"metadata":{"scanStartedOn":"2021-08-06T17:45:50.52Z","scanFinishedOn":"2021-08-06T17:50:50.52Z"}}`,
	attest.PredicateVulnsV01: `{"invocation":{"parameters":[],"uri":"https://github.com/developer-guy/alpine/actions/runs/1071875574","event_id":"1071875574","builder.id":"GitHub Actions"},` +
		`"scanner":{"uri":"pkg:github/aquasecurity/trivy@244fd47e07d1004f0aed9","db":{"lastUpdate":"2021-08-06T17:45:50.52Z"},"result":[{"vulnerability":{"id":"CVE-123","severity":[]}}]},` +
		`"metadata":{"scanStartedOn":"2021-08-06T17:45:50.52Z","scanFinishedOn":"2021-08-06T17:50:50.52Z"}}`,
	attest.PredicateRelease:    `{"purl":"pkg:npm/@angular/http@7.2.16","packageId":"1234567890"}`,
	attest.PredicateReleaseV01: `{"purl":"pkg:oci/my-image@sha256%3Afedcba09?repository_url=registry.example.com/my-project/my-image&tag=v1.2.3","packageId":"1"}`,
	attest.PredicateLink: `{"name":"build","command":["make"],"materials":[{"name":"a.c","digest":{"sha256":"` + hex64 + `"}}],` +
		`"byproducts":{"return-value":0},"environment":{}}`,
	"https://in-toto.io/Link/v1": `{"_type":"link","name":"build","materials":{"a.c":{"sha256":"` + hex64 + `"}},"products":{},"byproducts":{"stdout":""},"command":["make"],"environment":{}}`,
	attest.PredicateSPDX: `{"spdxVersion":"SPDX-2.3","dataLicense":"CC0-1.0","SPDXID":"SPDXRef-DOCUMENT","name":"api","documentNamespace":"https://example.com/api-1",` +
		`"creationInfo":{"created":"2026-03-01T12:00:00Z","creators":["Tool: syft-1.20.0"]},` +
		`"packages":[{"name":"musl","SPDXID":"SPDXRef-Package-apk-musl-0a1b","versionInfo":"1.2.5","downloadLocation":"NOASSERTION","filesAnalyzed":false}],` +
		`"files":[{"SPDXID":"SPDXRef-File-1","fileName":"/bin/a","checksums":[]}],` +
		`"relationships":[{"spdxElementId":"SPDXRef-DOCUMENT","relationshipType":"DESCRIBES","relatedSpdxElement":"SPDXRef-Package-apk-musl-0a1b"}]}`,
	attest.PredicateSPDX + "/v3": `{"@context":"https://spdx.org/rdf/3.0.1/spdx-context.jsonld","@graph":[` +
		`{"type":"CreationInfo","@id":"_:creationinfo","specVersion":"3.0.1","created":"2026-03-01T12:00:00Z","createdBy":["https://example.com/tool"]},` +
		`{"type":"SpdxDocument","spdxId":"https://example.com/doc","creationInfo":"_:creationinfo","rootElement":["https://example.com/p"]},` +
		`{"type":"software_Package","spdxId":"https://example.com/p","creationInfo":"_:creationinfo","name":"musl"}]}`,
	attest.PredicateCycloneDX: `{"$schema":"http://cyclonedx.org/schema/bom-1.6.schema.json","bomFormat":"CycloneDX","specVersion":"1.6","serialNumber":"urn:uuid:3e671687-395b-41f5-a30f-b58921a69b79","version":1,` +
		`"metadata":{"timestamp":"2026-03-01T12:00:00Z","component":{"type":"container","name":"api"},"tools":{"components":[{"type":"application","name":"trivy"}]}},` +
		`"components":[{"type":"library","name":"acme","version":"1.0.0","bom-ref":"pkg:npm/acme@1.0.0","purl":"pkg:npm/acme@1.0.0","hashes":[{"alg":"SHA-256","content":"` + hex64 + `"}],"components":[{"type":"file","name":"x"}]}],` +
		`"dependencies":[{"ref":"pkg:npm/acme@1.0.0","dependsOn":[]}],"vulnerabilities":[{"id":"CVE-1","affects":[{"ref":"pkg:npm/acme@1.0.0"}]}]}`,
	attest.PredicateOpenVEX: `{"@context":"https://openvex.dev/ns/v0.2.0","@id":"https://openvex.dev/docs/example/vex-1","author":"Wolfi J Inkinson","role":"Document Creator","timestamp":"2023-01-08T18:02:03.647787998-06:00","version":1,` +
		`"statements":[{"vulnerability":{"name":"CVE-2023-12345"},"products":[{"@id":"pkg:oci/api"}],"status":"not_affected","justification":"component_not_present"},` +
		`{"vulnerability":{"name":"CVE-2023-2"},"status":"affected","action_statement":"update"},{"vulnerability":{"name":"CVE-2023-3"},"status":"fixed"}]}`,
	"https://example.com/our-scan/v1": `{"anything":["goes",{"here":null}]}`,
}

func TestExamplesPass(t *testing.T) {
	for predicateType, doc := range examples {
		t.Run(predicateType, func(t *testing.T) {
			if err := attest.CheckPredicate(predicateType, []byte(doc)); err != nil {
				t.Error(err)
			}
			// Every member that is there once is of the kind that the schema says, so
			// another kind of value is refused for most; for all of a type that is
			// not known.
			if err := attest.CheckPredicate("https://example.com/other", []byte(doc)); err != nil {
				t.Errorf("as an unknown type: %v", err)
			}
		})
	}
	for _, row := range []struct{ name, predicateType, old, new string }{
		{"SPDX 2.3 by its version", attest.PredicateSPDX + "/v2.3", "", ""},
		{"SPDX 2.3 as 2", attest.PredicateSPDX + "/v2", "", ""},
		{"SPDX 2.2", attest.PredicateSPDX, "SPDX-2.3", "SPDX-2.2"},
		{"CycloneDX 1.4", attest.PredicateCycloneDX + "/v1.4", `"specVersion":"1.6"`, `"specVersion":"1.4"`},
		{"CycloneDX 1.7", attest.PredicateCycloneDX, `"specVersion":"1.6"`, `"specVersion":"1.7"`},
		{"OpenVEX by its version", attest.PredicateOpenVEX + "/v0.2.0", "", ""},
		{"OpenVEX before 0.2", attest.PredicateOpenVEX, `{"name":"CVE-2023-12345"}`, `"CVE-2023-12345"`},
		{"a release with the older name", attest.PredicateReleaseV01, "packageId", "releaseId"},
		{"a vulnerability beside its object", attest.PredicateVulnsV01, `{"vulnerability":{"id":"CVE-123","severity":[]}}`, `{"id":"CVE-123","severity":[]}`},
	} {
		t.Run(row.name, func(t *testing.T) {
			family := row.predicateType
			for examples[family] == "" {
				family = family[:strings.LastIndexByte(family, '/')]
			}
			if err := attest.CheckPredicate(row.predicateType, []byte(strings.Replace(examples[family], row.old, row.new, 1))); err != nil {
				t.Error(err)
			}
		})
	}
}

// What is wrong with a predicate is said with its place.
func TestPredicatesRefused(t *testing.T) {
	for _, row := range []struct {
		name, predicateType, old, new string
		reason                        attest.Reason
		path                          string
	}{
		{"an unknown result", attest.PredicateTestResult, `"PASSED"`, `"GREEN"`, attest.PredicateInvalid, "$.result"},
		{"no configuration", attest.PredicateTestResult, `"configuration"`, `"Configuration"`, attest.PredicateInvalid, "$.Configuration"},
		{"a name in snake case", attest.PredicateTestResult, `"failedTests":[]`, `"failed_tests":["x"]`, attest.PredicateInvalid, "$.failed_tests"},
		{"a name that nobody knows", attest.PredicateTestResult, `"result"`, `"passed":true,"result"`, attest.PredicateInvalid, "$.passed"},
		{"a test that is no text", attest.PredicateTestResult, `"warnedTests":[]`, `"warnedTests":["a",1]`, attest.PredicateInvalid, "$.warnedTests[1]"},
		{"a digest that is none", attest.PredicateTestResult, `ebe4add40f63c3c98bc9b32ff1e736f04120b023`, `ebe4`, attest.PredicateInvalid, "$.configuration[0]"},
		{"a digest that is no text", attest.PredicateTestResult, `"ebe4add40f63c3c98bc9b32ff1e736f04120b023"`, `7`, attest.PredicateInvalid, "$"},
		{"an empty descriptor", attest.PredicateTestResult, `"configuration":[`, `"configuration":[{},`, attest.PredicateInvalid, "$.configuration[0]"},

		{"no database time", attest.PredicateVulns, `"lastUpdate"`, `"updated"`, attest.PredicateInvalid, "$.scanner.db.updated"},
		{"no database", attest.PredicateVulns, `"db"`, `"version2"`, attest.PredicateInvalid, "$.scanner.version2"},
		{"a time that is none", attest.PredicateVulns, `2021-08-06T17:50:50.52Z`, `yesterday`, attest.PredicateInvalid, "$.metadata.scanFinishedOn"},
		{"a finding without severity", attest.PredicateVulns, `"id":"CVE-123","severity":[{"method":"nvd","score":"medium"},{"method":"cvss_score","score":"5.2"}],`, `"id":"CVE-123",`, attest.PredicateInvalid, "$.scanner.result[0].severity"},
		{"a score that is a number", attest.PredicateVulns, `"score":"5.2"`, `"score":5.2`, attest.PredicateInvalid, "$.scanner.result[0].severity[1].score"},
		{"no result at all", attest.PredicateVulns, `"result"`, `"results"`, attest.PredicateInvalid, "$.scanner.results"},
		{"an annotation that is no object", attest.PredicateVulns, `{"fixed":["1.2"]}`, `"fixed"`, attest.PredicateInvalid, "$.scanner.result[0].annotations[0]"},
		{"v0.1 without metadata", attest.PredicateVulnsV01, `"metadata"`, `"meta"`, attest.PredicateInvalid, "$.metadata"},
		{"v0.1 with a nameless finding", attest.PredicateVulnsV01, `"id":"CVE-123"`, `"name":"CVE-123"`, attest.PredicateInvalid, "$.scanner.result[0].vulnerability.id"},

		{"no version of the package", attest.PredicateRelease, `http@7.2.16`, `http`, attest.PredicateInvalid, "$.purl"},
		{"no package URL", attest.PredicateRelease, `pkg:npm/@angular/http@7.2.16`, `https://npmjs.com/http@7`, attest.PredicateInvalid, "$.purl"},
		{"the older name in v0.2", attest.PredicateRelease, `packageId`, `releaseId`, attest.PredicateInvalid, "$.releaseId"},
		{"an id that is a number", attest.PredicateReleaseV01, `"packageId":"1"`, `"packageId":1`, attest.PredicateInvalid, "$.packageId"},
		{"both names of the id", attest.PredicateReleaseV01, `"packageId":"1"`, `"packageId":"1","releaseId":"2"`, attest.PredicateInvalid, "$"},

		{"a link without name", attest.PredicateLink, `"name":"build",`, ``, attest.PredicateInvalid, "$.name"},
		{"a material without digest", attest.PredicateLink, `,"digest":{"sha256":"` + hex64 + `"}`, ``, attest.PredicateInvalid, "$.materials[0].digest"},
		{"two materials of one name", attest.PredicateLink, `"materials":[`, `"materials":[{"name":"a.c","digest":{"sha1":"` + hex64[:40] + `"}},`, attest.PredicateInvalid, "$.materials[1].name"},
		{"a command as one text", attest.PredicateLink, `["make"]`, `"make"`, attest.PredicateInvalid, "$.command"},
		{"an old link of another type", "https://in-toto.io/Link/v1", `"_type":"link"`, `"_type":"layout"`, attest.PredicateInvalid, "$._type"},
		{"an old link's hash that is none", "https://in-toto.io/Link/v1", hex64, `not hex`, attest.PredicateInvalid, "$"},

		{"SPDX of a version to come", attest.PredicateSPDX, `SPDX-2.3`, `SPDX-2.4`, attest.PredicateInvalid, "$.spdxVersion"},
		{"SPDX 2.3 as 2.2", attest.PredicateSPDX + "/v2.2", ``, ``, attest.PredicateInvalid, "$.spdxVersion"},
		{"SPDX 2.3 as 3", attest.PredicateSPDX + "/v3", attest.PredicateSPDX, ``, attest.PredicateInvalid, "$.spdxVersion"},
		{"SPDX 2.3 as nonsense", attest.PredicateSPDX + "/vx", attest.PredicateSPDX, ``, attest.PredicateInvalid, "$.spdxVersion"},
		{"SPDX without its name", attest.PredicateSPDX, `"spdxVersion"`, `"SpdxVersion"`, attest.PredicateInvalid, "$.spdxVersion"},
		{"SPDX of nobody", attest.PredicateSPDX, `["Tool: syft-1.20.0"]`, `[]`, attest.PredicateInvalid, "$.creationInfo.creators"},
		{"SPDX with another id", attest.PredicateSPDX, `SPDXRef-DOCUMENT`, `SPDXRef-doc`, attest.PredicateInvalid, "$.SPDXID"},
		{"SPDX package without location", attest.PredicateSPDX, `"downloadLocation"`, `"location"`, attest.PredicateInvalid, "$.packages[0].downloadLocation"},
		{"SPDX package with a strange id", attest.PredicateSPDX, `"SPDXRef-Package-apk-musl-0a1b","versionInfo"`, `"musl","versionInfo"`, attest.PredicateInvalid, "$.packages[0].SPDXID"},
		{"SPDX relationship without end", attest.PredicateSPDX, `"relatedSpdxElement"`, `"related"`, attest.PredicateInvalid, "$.relationships[0].relatedSpdxElement"},
		{"SPDX 3 as 2.3", attest.PredicateSPDX + "/v2.3", attest.PredicateSPDX + "/v3", ``, attest.PredicateInvalid, "$[\"@context\"]"},
		{"SPDX 3 with an empty graph", attest.PredicateSPDX + "/v3", examples3("@graph"), `[]`, attest.PredicateInvalid, "$[\"@graph\"]"},
		{"SPDX 3 without a document", attest.PredicateSPDX + "/v3", `SpdxDocument`, `Bom`, attest.PredicateInvalid, "$"},
		{"SPDX 3 element without id", attest.PredicateSPDX + "/v3", `"spdxId":"https://example.com/p",`, ``, attest.PredicateInvalid, "$[\"@graph\"][2]"},
		{"SPDX 3 of another version inside", attest.PredicateSPDX + "/v3", `"specVersion":"3.0.1"`, `"specVersion":"2.3"`, attest.PredicateInvalid, "$[\"@graph\"][0]"},

		{"another BOM", attest.PredicateCycloneDX, `"CycloneDX"`, `"SPDX"`, attest.PredicateInvalid, "$.bomFormat"},
		{"CycloneDX 1.3", attest.PredicateCycloneDX, `"specVersion":"1.6"`, `"specVersion":"1.3"`, attest.PredicateInvalid, "$.specVersion"},
		{"CycloneDX 1.6 as 1.5", attest.PredicateCycloneDX + "/v1.5", ``, ``, attest.PredicateInvalid, "$.specVersion"},
		{"CycloneDX 1.4 without version", attest.PredicateCycloneDX + "/v1.4", `"specVersion":"1.6","serialNumber":"urn:uuid:3e671687-395b-41f5-a30f-b58921a69b79","version":1`, `"specVersion":"1.4"`, attest.PredicateInvalid, "$"},
		{"CycloneDX component without type", attest.PredicateCycloneDX, `{"type":"file","name":"x"}`, `{"name":"x"}`, attest.PredicateInvalid, "$.components[0].components[0].type"},
		{"CycloneDX serial number", attest.PredicateCycloneDX, `urn:uuid:3e671687`, `3e671687`, attest.PredicateInvalid, "$.serialNumber"},
		{"CycloneDX version 0", attest.PredicateCycloneDX, `"version":1,`, `"version":0,`, attest.PredicateInvalid, "$.version"},
		{"CycloneDX component list that is none", attest.PredicateCycloneDX, `"components":[{"type":"library"`, `"components":{"type":"library"`, attest.BadJSON, ""},

		{"OpenVEX of another context", attest.PredicateOpenVEX, `https://openvex.dev/ns/v0.2.0`, `https://evil.example/ns/v0.2.0`, attest.PredicateInvalid, "$[\"@context\"]"},
		{"OpenVEX 0.2.0 as 0.0.1", attest.PredicateOpenVEX + "/v0.0.1", ``, ``, attest.PredicateInvalid, "$[\"@context\"]"},
		{"OpenVEX status", attest.PredicateOpenVEX, `"status":"fixed"`, `"status":"ignored"`, attest.PredicateInvalid, "$.statements[2].status"},
		{"OpenVEX not affected for no reason", attest.PredicateOpenVEX, `,"justification":"component_not_present"`, ``, attest.PredicateInvalid, "$.statements[0]"},
		{"OpenVEX affected and nothing to do", attest.PredicateOpenVEX, `,"action_statement":"update"`, ``, attest.PredicateInvalid, "$.statements[1]"},
		{"OpenVEX without statements", attest.PredicateOpenVEX, `"statements"`, `"Statements"`, attest.PredicateInvalid, "$.statements"},
		{"OpenVEX about nothing", attest.PredicateOpenVEX, `{"name":"CVE-2023-2"}`, `{"id":"CVE-2023-2"}`, attest.PredicateInvalid, "$.statements[1].vulnerability.name"},

		{"D04 equal keys", "https://example.com/our-scan/v1", `{"anything"`, `{"anything":1,"anything"`, attest.BadJSON, ""},
		{"D04 keys in other case", attest.PredicateTestResult, `"result"`, `"Result":"FAILED","result"`, attest.BadJSON, ""},
		{"D04 trailing value", "https://example.com/our-scan/v1", `]}`, `]}{}`, attest.BadJSON, ""},
		{"D04 not UTF-8", "https://example.com/our-scan/v1", "goes", "\xff", attest.BadJSON, ""},
		{"D04 half a character", "https://example.com/our-scan/v1", "goes", `\ud800`, attest.BadJSON, ""},
		{"D04 number out of range", "https://example.com/our-scan/v1", "null", `1e999`, attest.BadJSON, ""},
		{"D04 a list", "https://example.com/our-scan/v1", `{"anything":["goes",{"here":null}]}`, `[{}]`, attest.PredicateInvalid, "$"},
		{"D04 a text", "https://example.com/our-scan/v1", `{"anything":["goes",{"here":null}]}`, `"{}"`, attest.PredicateInvalid, "$"},
		{"D04 null", "https://example.com/our-scan/v1", `{"anything":["goes",{"here":null}]}`, `null`, attest.PredicateInvalid, "$"},
		{"D04 nothing", "https://example.com/our-scan/v1", `{"anything":["goes",{"here":null}]}`, ``, attest.BadJSON, ""},
		{"D04 nested 129 deep", "https://example.com/our-scan/v1", `null`, strings.Repeat("[", 127) + strings.Repeat("]", 127), attest.BadJSON, ""},
		{"C03 more than 16 MiB", "https://example.com/our-scan/v1", `goes`, strings.Repeat("x", attest.MaxPredicate), attest.TooLarge, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			family := row.predicateType
			if examples[row.old] != "" {
				family, row.old = row.old, ""
			}
			for examples[family] == "" {
				family = family[:strings.LastIndexByte(family, '/')]
			}
			if !strings.Contains(examples[family], row.old) {
				t.Fatalf("the example has no %s", row.old)
			}
			err := attest.CheckPredicate(row.predicateType, []byte(strings.Replace(examples[family], row.old, row.new, 1)))
			if got := attest.ReasonOf(err); got != row.reason {
				t.Fatalf("got %q (%v), want %q", got, err, row.reason)
			}
			var e *attest.Error
			if errors.As(err, &e) && e.Metadata["path"] != row.path {
				t.Errorf("at %s, want %s: %v", e.Metadata["path"], row.path, err)
			}
		})
	}
}

// examples3 returns a member of the SPDX 3 example as it is written there.
func examples3(name string) string {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal([]byte(examples[attest.PredicateSPDX+"/v3"]), &doc); err != nil {
		panic(err)
	}
	return string(doc[name])
}

// The deepest predicate that is signed is one that the verifier reads.
func TestDeepPredicate(t *testing.T) {
	deep := `{"a":` + strings.Repeat("[", attest.MaxPredicateDepth-1) + strings.Repeat("]", attest.MaxPredicateDepth-1) + `}`
	if err := attest.CheckPredicate("https://example.com/x", []byte(deep)); err != nil {
		t.Fatal(err)
	}
	if err := attest.StrictJSON(statementWith(t, "https://example.com/x", deep), attest.MaxPredicateDepth+1); err != nil {
		t.Error(err)
	}
}

func statementWith(t testing.TB, predicateType, predicate string) []byte {
	t.Helper()
	out, err := attest.EvidenceStatement(attest.EvidenceInput{
		Image:         attest.Image{Ref: attest.ImageRef{Repository: "registry.example.com/acme/api", Digest: attest.Hash(nil)}},
		PredicateType: predicateType, Predicate: json.RawMessage(predicate),
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// No spelling of a type that is the service's own gets signed.
func TestReserved(t *testing.T) {
	for _, row := range []struct {
		name, in string
		want     bool
	}{
		{"D01 provenance", "https://slsa.dev/provenance/v1", true},
		{"D01 another version", "https://slsa.dev/provenance/v0.2", true},
		{"D01 without version", "https://slsa.dev/provenance", true},
		{"D01 a summary", "https://slsa.dev/verification_summary/v1", true},
		{"D01 an image signature", "https://sigstore.dev/cosign/sign/v1", true},
		{"D01 cosign's own", "https://cosign.sigstore.dev/attestation/v1", true},
		{"D01 ours", attest.PredicatePromotion, true},
		{"D01 ours to come", "https://github.com/hallmarkd/hallmark/predicates/anything", true},
		{"D01 capitals", "HTTPS://SLSA.dev/Provenance/V1", true},
		{"D01 trailing slash", "https://slsa.dev/provenance/", true},
		{"D01 two trailing slashes", "https://slsa.dev/provenance/v1//", true},
		{"D01 percent", "https://slsa.dev/%70rovenance/v1", true},
		{"D01 percent in the host", "https://slsa%2Edev/provenance/v1", true},
		{"D01 percent twice", "https://slsa.dev/%2570rovenance/v1", true},
		{"D01 percent for the slash", "https://slsa.dev%2Fprovenance%2Fv1", true},
		{"D01 user", "https://user@slsa.dev/provenance/v1", true},
		{"D01 user and password", "https://user:pass@slsa.dev/provenance/v1", true},
		{"D01 port", "https://slsa.dev:443/provenance/v1", true},
		{"D01 empty port", "https://slsa.dev:/provenance/v1", true},
		{"D01 http", "http://slsa.dev/provenance/v1", true},
		{"D01 no scheme", "slsa.dev/provenance/v1", true},
		{"D01 only slashes", "//slsa.dev/provenance/v1", true},
		{"D01 one slash", "https:/slsa.dev/provenance/v1", true},
		{"D01 no slash", "https:slsa.dev/provenance/v1", true},
		{"D01 many slashes", "https:////slsa.dev//provenance/v1", true},
		{"D01 backslashes", `https:\\slsa.dev\provenance\v1`, true},
		{"D01 dots", "https://slsa.dev/./x/../provenance/v1", true},
		{"D01 dots above the root", "https://slsa.dev/../../provenance/v1", true},
		{"D01 query", "https://slsa.dev/provenance/v1?x=1", true},
		{"D01 query before the version", "https://slsa.dev/provenance?v1", true},
		{"D01 fragment", "https://slsa.dev/provenance/v1#x", true},
		{"D01 dot behind the host", "https://slsa.dev./provenance/v1", true},
		{"D01 full width", "https://ｓlsa.dev/provenance/v1", true},
		{"D01 full width stop", "https://slsa．dev/provenance/v1", true},
		{"D01 ideographic stop", "https://slsa｡dev/provenance/v1", true},
		{"D01 long s", "https://\u017flsa.dev/provenance/v1", true},
		{"D01 soft hyphen", "https://sl\u00adsa.dev/provenance/v1", true},
		{"D01 zero width", "https://slsa.dev/prov\u200benance/v1", true},
		{"D01 spaces", " https://slsa.dev/provenance/v1\n", true},
		{"D01 tab inside", "https://slsa.dev/prove\tnance/v1", true},
		{"D01 its former name", "https://in-toto.io/Provenance/v0.1", true},
		{"D01 www", "https://www.slsa.dev/provenance/v1", true},
		{"D01 urn", "urn:x:slsa.dev/provenance/v1", true},
		{"D01 tag", "tag:slsa.dev,2024:provenance/v1", true},

		{"another page of the site", "https://slsa.dev/spec", false},
		{"another site", "https://slsa.dev.example.com/provenance/v1", false},
		{"the site as a user", "https://slsa.dev@example.com/provenance/v1", false},
		{"the site in a path", "https://example.com/slsa.dev/provenance/v1", false},
		{"an SBOM", attest.PredicateSPDX, false},
		{"a urn of others", "urn:example:scan:v1", false},
		{"another repository of ours", "https://github.com/hallmarkd/hallmark-tools/predicates/x", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := attest.Reserved(row.in); got != row.want {
				t.Errorf("Reserved(%q) = %t", row.in, got)
			}
			if err := attest.CheckPredicate(row.in, []byte(`{}`)); row.want && attest.ReasonOf(err) != attest.ReservedPredicate {
				t.Errorf("CheckPredicate(%q): %v", row.in, err)
			}
		})
	}
}

func TestPredicateTypeForm(t *testing.T) {
	for _, row := range []struct {
		name, in string
		ok       bool
	}{
		{"https", "https://example.com/a/v1", true},
		{"a slash behind it", "https://example.com/a/", true},
		{"a host alone", "https://example.com", true},
		{"a port", "https://example.com:8443/a", true},
		{"a query", "https://example.com/a?b=c", true},
		{"a fragment", "https://example.com/a#b", true},
		{"urn", "urn:example:a", true},
		{"512 bytes", "https://example.com/" + strings.Repeat("a", 492), true},
		{"513 bytes", "https://example.com/" + strings.Repeat("a", 493), false},
		{"nothing", "", false},
		{"no scheme", "example.com/a", false},
		{"a short name", "cyclonedx", false},
		{"a path", "/a/b", false},
		{"no host", "https:///a", false},
		{"capitals in the host", "https://Example.com/a", false},
		{"capitals in the scheme", "Https://example.com/a", false},
		{"a user", "https://me@example.com/a", false},
		{"the default port", "https://example.com:443/a", false},
		{"a dot behind the host", "https://example.com./a", false},
		{"an empty segment", "https://example.com/a//b", false},
		{"dots", "https://example.com/a/../b", false},
		{"percent", "https://example.com/%61", false},
		{"J04 a line end", "https://example.com/a\nb", false},
		{"J04 an escape", "https://example.com/\x1b[2J", false},
		{"not ASCII", "https://example.com/ä", false},
		{"a space", "https://example.com/a b", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			want := attest.Reason("")
			if !row.ok {
				want = attest.BadRequest
			}
			if got := attest.ReasonOf(attest.CheckPredicate(row.in, []byte(`{}`))); got != want {
				t.Errorf("CheckPredicate(%q) = %q, want %q", row.in, got, want)
			}
		})
	}
}

// The statement holds the predicate as it came, but for the spaces: nothing is
// escaped that was not, and it never grows.
func TestEvidenceStatementKeepsThePredicate(t *testing.T) {
	payload := statementWith(t, "https://example.com/x", "{ \"a\": \"<&>\u2028\",\n \"b\": [1.0, 1e2] }")
	if want := "{\"a\":\"<&>\u2028\",\"b\":[1.0,1e2]}"; !strings.HasSuffix(string(payload), `"predicate":`+want+"}") {
		t.Errorf("the statement is %s", payload)
	}
}

func TestMayAttest(t *testing.T) {
	for _, row := range []struct {
		name string
		id   attest.Identity
		want attest.Reason
	}{
		{"a job", attest.Identity{Kind: attest.Workload}, ""},
		{"a person", attest.Identity{Kind: attest.Person}, ""},
		{"the service", attest.Identity{Kind: attest.Service}, attest.SourceNotAllowed},
		{"nobody", attest.Identity{}, attest.SourceNotAllowed},
		{"B01 a pull request", attest.Identity{Kind: attest.Workload, Unaccepted: "it is a pull request"}, attest.EventNotAllowed},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := attest.ReasonOf(row.id.MayAttest()); got != row.want {
				t.Errorf("got %q, want %q", got, row.want)
			}
		})
	}
}

func TestEvidenceName(t *testing.T) {
	for name, want := range map[string]attest.Reason{
		"": "", "unit": "", "Ende zu Ende": "", "a\nb": attest.BadRequest, "a\u202eb": attest.BadRequest, "\xff": attest.BadRequest,
		strings.Repeat("x", 128): "", strings.Repeat("x", 129): attest.BadRequest,
	} {
		if got := attest.ReasonOf(attest.CheckEvidenceName(name)); got != want {
			t.Errorf("J04 CheckEvidenceName(%q) = %q, want %q", name, got, want)
		}
	}
}

// What passes can be signed and is read as it was written; what does not has one of
// the reasons that are documented.
func FuzzCheckPredicate(f *testing.F) {
	var types []string
	for predicateType := range examples {
		types = append(types, predicateType)
	}
	slices.Sort(types)
	for i, predicateType := range types {
		f.Add(i, predicateType, []byte(examples[predicateType]))
		f.Add(i, "https://SLSA.dev/%70rovenance", []byte(`{}`))
	}
	reasons := []attest.Reason{attest.ReservedPredicate, attest.BadRequest, attest.TooLarge, attest.BadJSON, attest.PredicateInvalid}
	f.Fuzz(func(t *testing.T, i int, other string, raw []byte) {
		for _, predicateType := range []string{types[uint(i)%uint(len(types))], other} {
			err := attest.CheckPredicate(predicateType, raw)
			if err != nil {
				if !slices.Contains(reasons, attest.ReasonOf(err)) {
					t.Fatalf("CheckPredicate(%q): %v", predicateType, err)
				}
				continue
			}
			if attest.Reserved(predicateType) {
				t.Fatalf("the reserved type %q passed", predicateType)
			}
			payload := statementWith(t, predicateType, string(raw))
			var st attest.Statement
			if err := json.Unmarshal(payload, &st); err != nil || st.PredicateType != predicateType {
				t.Fatalf("the statement cannot be read: %v\n%s", err, payload)
			}
			if err := attest.StrictJSON(payload, attest.MaxPredicateDepth+1); err != nil {
				t.Fatalf("the statement of a predicate that passed: %v", err)
			}
			if want := fmt.Sprint(tree(t, raw)); fmt.Sprint(tree(t, st.Predicate)) != want {
				t.Fatalf("the predicate says %s, not %s", st.Predicate, raw)
			}
		}
	})
}

func tree(t *testing.T, raw []byte) any {
	t.Helper()
	var v any
	d := json.NewDecoder(strings.NewReader(string(raw)))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}
