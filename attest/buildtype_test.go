package attest_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/hallmarkd/hallmark/attest"
)

var update = flag.Bool("update", false, "write the examples of docs/buildtypes anew")

const (
	service    = "https://hallmark.example.com"
	buildTypes = "../docs/buildtypes"
	commit     = "4be1d0c9a5b1f7a2c3d4e5f60718293a4b5c6d7e"
	sha256git  = "4be1d0c9a5b1f7a2c3d4e5f60718293a4b5c6d7e0102030405060708090a0b0c"
)

var (
	api    = attest.ImageRef{Repository: "registry.example.com/acme/api", Digest: attest.Hash([]byte("image"))}
	single = attest.Image{Ref: api, Base: attest.Base{Result: attest.Unclaimed}}
)

// multi is an index of two platforms on a base that its layers prove.
func multi() attest.Image {
	amd, arm := attest.Hash([]byte("amd64")), attest.Hash([]byte("arm64"))
	base := attest.Hash([]byte("base"))
	name := attest.BaseName{Repository: "docker.io/library/debian", Tag: "12-slim", Digest: base}
	return attest.Image{
		Ref:       api,
		Platforms: []attest.Platform{{Name: "linux/amd64", Digest: amd}, {Name: "linux/arm64", Digest: arm}},
		Base: attest.Base{
			Result: attest.ProvenLayers, Repository: name.Repository, Tag: name.Tag, Digest: base,
			Platforms: []attest.BasePart{
				{Platform: "linux/amd64", Image: amd, Base: attest.Hash([]byte("base amd64")), Layers: 1},
				{Platform: "linux/arm64", Image: arm, Base: attest.Hash([]byte("base arm64")), Layers: 1},
			},
			Equivalents: []attest.BaseName{{Repository: name.Repository, Tag: "12.11-slim", Digest: attest.Hash([]byte("rebuilt"))}},
			Claims: []attest.BaseClaim{
				{From: attest.BaseFromAnnotation, Name: name.String(), Digest: base, Result: attest.ProvenLayers},
				{From: attest.BaseFromCaller, Name: "docker.io/library/debian:12", Result: attest.Claimed, Detail: "the registry does not answer"},
			},
		},
	}
}

func withBase(result attest.BaseResult) attest.Image {
	if result == attest.Scratch {
		return attest.Image{Ref: api, Base: attest.Base{
			Result: result, Claims: []attest.BaseClaim{{From: attest.BaseFromCaller, Name: "scratch", Result: result}},
		}}
	}
	img := multi()
	img.Base.Result = result
	img.Base.Claims[0].Result = result
	if result == attest.Attested {
		claim := img.Base.Claims[0]
		claim.From, claim.Root = attest.BaseFromAttestation, "vendor"
		img.Base.Claims = nil
		for _, who := range []attest.Foreigner{
			{SAN: gitHub().SAN, Issuer: gitHub().Issuer, Build: gitHub().Build},
			{SAN: gitLab().SAN, Issuer: gitLab().Issuer, Build: gitLab().Build},
			{Key: attest.Key("vendor")},
		} {
			claim.Signer = who
			img.Base.Claims = append(img.Base.Claims, claim)
		}
	}
	return img
}

// gitHub is a job on a hosted runner of GitHub.
func gitHub() attest.Identity {
	workflow := "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main"
	return attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload,
		Issuer: "https://token.actions.githubusercontent.com", Subject: "repo:acme/api:ref:refs/heads/main",
		SAN: workflow, TokenID: attest.Key("token"), Expires: time.Date(2026, 11, 20, 12, 5, 0, 0, time.UTC),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", RepositoryID: "1296269",
			OwnerURI: "https://github.com/acme", OwnerID: "9919", Visibility: "private",
			Commit: commit, Ref: "refs/heads/main",
			WorkflowPath: ".github/workflows/release.yml", WorkflowName: "release",
			ConfigURI: workflow, ConfigDigest: commit, SignerURI: workflow, SignerDigest: commit,
			Event: "push", RunURI: "https://github.com/acme/api/actions/runs/9912/attempts/1", RunID: "9912", RunAttempt: "1",
			Runner: "github-hosted", Environment: "release", Actor: "octocat", ActorID: "583231",
		},
	}
}

// gitLab is a job on a runner of its own, on a self-managed instance.
func gitLab() attest.Identity {
	config := "https://git.example.com/acme/api//.gitlab-ci.yml@refs/tags/v1.2.0"
	return attest.Identity{
		IssuerName: "gitlab", Provider: "gitlab", Kind: attest.Workload,
		Issuer: "https://git.example.com", Subject: "project_path:acme/api:ref_type:tag:ref:v1.2.0",
		SAN: config, TokenID: attest.Key("token"), Expires: time.Date(2026, 11, 20, 12, 5, 0, 0, time.UTC),
		Build: attest.Build{
			SourceURI: "https://git.example.com/acme/api", Repository: "acme/api", RepositoryID: "42",
			OwnerURI: "https://git.example.com/acme", OwnerID: "7", Visibility: "internal",
			Commit: commit, Ref: "refs/tags/v1.2.0", RefProtected: "true",
			ConfigURI: config, ConfigDigest: commit, SignerURI: config, SignerDigest: commit,
			Event: "push", RunURI: "https://git.example.com/acme/api/-/jobs/1001", RunID: "501", JobID: "1001",
			Runner: "self-hosted", Environment: "production", Actor: "jane", ActorID: "11",
		},
	}
}

func with(id attest.Identity, change func(*attest.Identity)) attest.Identity {
	change(&id)
	return id
}

func input(id attest.Identity, img attest.Image) attest.ProvenanceInput {
	return attest.ProvenanceInput{
		Service: service, Image: img, Builder: id, Request: attest.SignKey(img.Ref, id, "", nil),
		Finished: time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC),
	}
}

// provenances are what the service writes for each provider and each kind of base.
func provenances() map[string]attest.ProvenanceInput {
	said := func(id attest.Identity) attest.ProvenanceInput {
		in := input(id, multi())
		in.BaseHint = "docker.io/library/debian:12"
		in.Facts = map[string]string{"compiler": "go1.26.8", "change": "CHG-1711"}
		in.Use = attest.Key("request")
		return in
	}
	bare := func(provider, issuer, san string) attest.Identity {
		return attest.Identity{
			IssuerName: provider, Provider: provider, Kind: attest.Workload, Issuer: issuer, Subject: "s",
			SAN: san, TokenID: attest.Key("token"), Expires: time.Date(2026, 11, 20, 12, 5, 0, 0, time.UTC),
		}
	}
	out := map[string]attest.ProvenanceInput{
		"github":             said(gitHub()),
		"github release":     input(with(gitHub(), func(id *attest.Identity) { id.Build.Event, id.Build.Ref = "release", "refs/tags/v1@2" }), single),
		"github schedule":    input(with(gitHub(), func(id *attest.Identity) { id.Build.Event = "schedule" }), single),
		"github self-hosted": input(with(gitHub(), func(id *attest.Identity) { id.Build.Runner = "self-hosted" }), single),
		"github reusable":    input(with(gitHub(), onReusable), single),
		"gitlab":             said(gitLab()),
		"gitlab hosted":      input(with(gitLab(), func(id *attest.Identity) { id.Build.Runner = "gitlab-hosted" }), single),
		"gitlab without its own configuration": input(with(gitLab(), func(id *attest.Identity) {
			id.Build.ConfigURI, id.Build.ConfigDigest, id.Build.SignerURI, id.Build.SignerDigest = "", "", "", ""
		}), single),
		"buildkite": input(with(bare("buildkite", "https://agent.buildkite.com", "https://buildkite.com/acme/api"), func(id *attest.Identity) {
			id.Build = attest.Build{
				SourceURI: "https://github.com/acme/api", RepositoryID: "018c", Commit: commit, Ref: "refs/heads/main", Event: "webhook",
				RunURI: "https://buildkite.com/acme/api/builds/1234567#018d", RunID: "1234567", JobID: "018d", Runner: "buildkite-hosted",
			}
		}), single),
		"kubernetes":        input(bare("kubernetes", "https://kubernetes.default.svc", "https://kubernetes.io/namespaces/ci/serviceaccounts/build"), single),
		"spiffe":            input(bare("spiffe", "https://oidc.example.com", "spiffe://example.com/ci/build"), single),
		"generic":           input(with(bare("generic", "https://ci.example.com", "https://ci.example.com/job/api"), func(id *attest.Identity) { id.Build.RunID = "17" }), single),
		"without a commit":  input(with(gitLab(), func(id *attest.Identity) { id.Build.Commit = "" }), single),
		"without a ref":     input(with(gitLab(), func(id *attest.Identity) { id.Build.Ref = "" }), single),
		"SHA-256 commit":    input(with(gitLab(), func(id *attest.Identity) { id.Build.Commit = sha256git }), single),
		"no source, hinted": said(bare("generic", "https://ci.example.com", "https://ci.example.com/job/api")),
	}
	for _, r := range []attest.BaseResult{
		attest.ProvenDiffIDs, attest.Matched, attest.Attested, attest.Scratch, attest.Claimed, attest.Contradicted,
	} {
		out["base "+string(r)] = input(gitHub(), withBase(r))
	}
	return out
}

func write(t testing.TB, in attest.ProvenanceInput) []byte {
	t.Helper()
	statement, err := attest.ProvenanceStatement(in)
	if err != nil {
		t.Fatal(err)
	}
	return statement
}

// predicate returns the statement and the provenance in it.
func read(t testing.TB, statement []byte) (attest.Statement, attest.Provenance) {
	t.Helper()
	var s attest.Statement
	if err := json.Unmarshal(statement, &s); err != nil {
		t.Fatal(err)
	}
	p, err := attest.ParseProvenance(s.Predicate)
	if err != nil {
		t.Fatal(err)
	}
	return s, p
}

// The examples that people read are what the code writes, byte for byte.
func TestBuildTypeExamples(t *testing.T) {
	for file, in := range map[string]attest.ProvenanceInput{
		"oidc-v1.example.json": provenances()["gitlab"], "github-workflow-v1.example.json": provenances()["github"],
	} {
		var want bytes.Buffer
		if err := json.Indent(&want, write(t, in), "", "  "); err != nil {
			t.Fatal(err)
		}
		want.WriteByte('\n')
		path := filepath.Join(buildTypes, file)
		if *update {
			if err := os.WriteFile(path, want.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want.String(), string(got)); d != "" {
			t.Errorf("%s is not what is written; run: go test ./attest -run Examples -update (-want +got):\n%s", file, d)
		}
	}
}

// What is written is what the schema says, and the schema says nothing that is
// never written.
func TestBuildTypeSchema(t *testing.T) {
	path := filepath.Join(buildTypes, "oidc-v1.schema.json")
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	schema, err := compiler.Compile(path)
	if err != nil {
		t.Fatal(err)
	}
	if schema.DraftVersion != 2020 || schema.ID == "" {
		t.Errorf("draft %d, id %q", schema.DraftVersion, schema.ID)
	}
	var written []any
	for name, in := range provenances() {
		s, _ := read(t, write(t, in))
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(s.Predicate))
		if err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(doc); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		written = append(written, doc)
	}
	for _, unused := range unwritten(schema, written, "") {
		t.Errorf("the schema describes %s, which is never written", unused)
	}
}

// unwritten returns the pointers of properties that none of docs has.
func unwritten(s *jsonschema.Schema, docs []any, at string) []string {
	for s.Ref != nil {
		s = s.Ref
	}
	var out []string
	for name, property := range s.Properties {
		var values []any
		for _, d := range docs {
			if o, ok := d.(map[string]any); ok && o[name] != nil {
				values = append(values, o[name])
			}
		}
		if len(values) == 0 {
			out = append(out, at+"/"+name)
			continue
		}
		out = append(out, unwritten(property, values, at+"/"+name)...)
	}
	for _, variant := range s.OneOf {
		out = append(out, unwritten(variant, docs, at)...)
	}
	if items := s.Items2020; items != nil {
		var values []any
		for _, d := range docs {
			if list, ok := d.([]any); ok {
				values = append(values, list...)
			}
		}
		out = append(out, unwritten(items, values, at+"/*")...)
	}
	return out
}

// What the schema refuses: what a build type does not have, and what could be taken
// for verified.
func TestBuildTypeSchemaRefuses(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile(filepath.Join(buildTypes, "oidc-v1.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	definition := func(p map[string]any) map[string]any { return p["buildDefinition"].(map[string]any) }
	external := func(p map[string]any) map[string]any { return definition(p)["externalParameters"].(map[string]any) }
	internal := func(p map[string]any) map[string]any { return definition(p)["internalParameters"].(map[string]any) }
	for _, row := range []struct {
		name   string
		change func(p map[string]any)
	}{
		{"D11 unknown external parameter", func(p map[string]any) { external(p)["inputs"] = map[string]any{} }},
		{"external parameters of the other build type", func(p map[string]any) { definition(p)["buildType"] = attest.BuildTypeGitHub }},
		{"unknown build type", func(p map[string]any) { definition(p)["buildType"] = "https://example.com/x" }},
		{"no external parameters", func(p map[string]any) { delete(definition(p), "externalParameters") }},
		{"unknown internal parameter", func(p map[string]any) { internal(p)["hallmark_more"] = "x" }},
		{"unknown claim", func(p map[string]any) { internal(p)["hallmark_claims"].(map[string]any)["more"] = "x" }},
		{"unknown grade", func(p map[string]any) { internal(p)["hallmark_grades"].(map[string]any)["/subject"] = "sworn" }},
		{"B09 commit HEAD", func(p map[string]any) { internal(p)["hallmark_claims"].(map[string]any)["commit"] = "HEAD" }},
		{"no builder", func(p map[string]any) { p["runDetails"].(map[string]any)["builder"] = map[string]any{} }},
		{"no time of finishing", func(p map[string]any) {
			delete(p["runDetails"].(map[string]any)["metadata"].(map[string]any), "finishedOn")
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s, _ := read(t, write(t, provenances()["gitlab"]))
			var p map[string]any
			if err := json.Unmarshal(s.Predicate, &p); err != nil {
				t.Fatal(err)
			}
			row.change(p)
			if schema.Validate(p) == nil {
				t.Error("accepted")
			}
		})
	}
}

// ownWord is a line of the list of what has no grade.
var ownWord = regexp.MustCompile("(?m)^- `(/[^`]+)`(?:, only when it is `([A-Z]+)`)?")

// Every field says how it is known, or is on the documented list of the service's
// own words and has no grade.
func TestEveryFieldIsGraded(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(buildTypes, "oidc-v1.md"))
	if err != nil {
		t.Fatal(err)
	}
	lines := ownWord.FindAllStringSubmatch(string(text), -1)
	seen := map[string]bool{}
	own := func(pointer string, value any) bool {
		for _, l := range lines {
			if (pointer == l[1] || strings.HasPrefix(pointer, l[1]+"/")) && (l[2] == "" || l[2] == value) {
				seen[l[1]] = true
				return true
			}
		}
		return false
	}
	for name, in := range provenances() {
		t.Run(name, func(t *testing.T) {
			statement := write(t, in)
			_, p := read(t, statement)
			var doc map[string]any
			if err := json.Unmarshal(statement, &doc); err != nil {
				t.Fatal(err)
			}
			for _, top := range []string{"subject", "predicate"} {
				leaves("/"+top, doc[top], func(pointer string, value any) {
					grade := p.Grade(pointer)
					if own := own(pointer, value); own && grade != "" {
						t.Errorf("%s is the service's own word and has the grade %s", pointer, grade)
					} else if !own && grade.Rank() < 1 {
						t.Errorf("%s = %v has the grade %q and is not among the service's own words", pointer, value, grade)
					}
				})
			}
			for pointer := range p.Internal().Grades {
				if !exists(doc, pointer) {
					t.Errorf("%s has a grade and is not there", pointer)
				}
			}
		})
	}
	for _, l := range lines {
		if !seen[l[1]] {
			t.Errorf("%s is documented and never written", l[1])
		}
	}
}

// leaves calls f for everything that holds nothing, with its JSON pointer.
func leaves(at string, v any, f func(pointer string, value any)) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			leaves(at+"/"+strings.NewReplacer("~", "~0", "/", "~1").Replace(key), value, f)
		}
	case []any:
		for i, value := range v {
			leaves(at+"/"+strconv.Itoa(i), value, f)
		}
	default:
		f(at, v)
	}
}

// exists reports whether a JSON pointer without escapes names something in doc.
func exists(doc any, pointer string) bool {
	for part := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		switch v := doc.(type) {
		case map[string]any:
			doc = v[part]
		case []any:
			i, err := strconv.Atoi(part)
			if err != nil || i >= len(v) {
				return false
			}
			doc = v[i]
		}
		if doc == nil {
			return false
		}
	}
	return true
}

// What is known by whom: the caller's word is never graded higher than it is.
func TestGrades(t *testing.T) {
	const internal = "/predicate/buildDefinition/internalParameters"
	const deps = "/predicate/buildDefinition/resolvedDependencies"
	for name, want := range map[string]map[string]attest.Grade{
		"github": {
			"/subject":                            attest.GradeCaller,
			internal + "/hallmark_claims/commit":  attest.GradeClaim,
			internal + "/hallmark_caller/change":  attest.GradeCaller,
			internal + "/hallmark_hints/base":     attest.GradeCaller,
			internal + "/hallmark_base/digest":    attest.GradeRegistry,
			internal + "/hallmark_base/tag":       attest.GradeCaller,
			internal + "/hallmark_base/claims/0":  attest.GradeCaller,
			internal + "/hallmark_token/id":       attest.GradeClaim,
			internal + "/hallmark_token/use":      "",
			internal + "/hallmark_request":        "",
			deps + "/0/digest/gitCommit":          attest.GradeClaim,
			deps + "/2/digest/gitCommit":          attest.GradeClaim,
			deps + "/3/digest/sha256":             attest.GradeRegistry,
			"/predicate/runDetails/builder/id":    attest.GradeClaim,
			"/predicate/buildDefinition":          "",
			"/predicate/runDetails/metadata":      "",
			"/predicate/buildDefinition/external": "",
		},
		"kubernetes":        {"/predicate/buildDefinition/externalParameters/source": "", internal + "/hallmark_base/result": ""},
		"base MATCHED":      {internal + "/hallmark_base/tag": attest.GradeRegistry},
		"base ATTESTED":     {internal + "/hallmark_base/digest": attest.GradeAttested, internal + "/hallmark_base/claims": attest.GradeCaller, deps + "/3": attest.GradeAttested},
		"base CLAIMED":      {internal + "/hallmark_base/digest": attest.GradeCaller, deps + "/3": attest.GradeCaller},
		"base SCRATCH":      {internal + "/hallmark_base/result": attest.GradeCaller},
		"base CONTRADICTED": {internal + "/hallmark_base/result": attest.GradeRegistry, deps + "/3": ""},
	} {
		_, p := read(t, write(t, provenances()[name]))
		for pointer, grade := range want {
			if got := p.Grade(pointer); got != grade {
				t.Errorf("%s: %s has the grade %q, want %q", name, pointer, got, grade)
			}
		}
	}
}

// Every claim that a token can prove is in the documents and in the schema.
func TestBuildTypeClaims(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(buildTypes, "oidc-v1.md"))
	if err != nil {
		t.Fatal(err)
	}
	schema, err := jsonschema.NewCompiler().Compile(filepath.Join(buildTypes, "oidc-v1.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	described := schema.Properties["buildDefinition"].Properties["internalParameters"].Properties["hallmark_claims"]
	for described.Ref != nil {
		described = described.Ref
	}
	var claims []string
	typ := reflect.TypeFor[attest.Build]()
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		claims = append(claims, name)
		if !strings.Contains(string(text), fmt.Sprintf("`%s`", name)) {
			t.Errorf("oidc-v1.md does not tell of %s", name)
		}
	}
	if got := slices.Sorted(maps.Keys(described.Properties)); !slices.Equal(got, slices.Sorted(slices.Values(claims))) {
		t.Errorf("the schema knows the claims %v, want %v", got, claims)
	}
}
