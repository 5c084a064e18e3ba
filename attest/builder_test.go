package attest_test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	reusable  = "acme/builders/.github/workflows/image.yml"
	listedAt  = "https://github.com/" + reusable + "@refs/tags/v1"
	builders  = service + "/builders/"
	reusableB = builders + "github/reusable/" + reusable
)

// onReusable is a job that a listed reusable workflow runs.
func onReusable(id *attest.Identity) {
	id.Reusable, id.Build.SignerURI, id.Build.SignerDigest = reusable, listedAt, strings.Repeat("b", 40)
}

// Each mode of different trust has its own builder id, and the id alone says the
// level (SLSA build-provenance, builder.id).
func TestBuilderLevels(t *testing.T) {
	runner := func(provider, runner string) attest.Identity {
		return attest.Identity{Provider: provider, Build: attest.Build{Runner: runner}}
	}
	for _, row := range []struct {
		name  string
		id    attest.Identity
		want  string
		level int
	}{
		{"GitHub hosted", gitHub(), "github/hosted/v1", 2},
		{"GitLab hosted", runner("gitlab", "gitlab-hosted"), "gitlab/hosted/v1", 2},
		{"Buildkite hosted", runner("buildkite", "buildkite-hosted"), "buildkite/hosted/v1", 2},
		{"listed reusable workflow", with(gitHub(), onReusable), "github/reusable/" + reusable, 3},
		{"B08 self-hosted", runner("github", "self-hosted"), "github/self-hosted/v1", 1},
		{"B08 runner of another provider", runner("gitlab", "github-hosted"), "gitlab/self-hosted/v1", 1},
		{"B08 runner in another case", runner("github", "GitHub-Hosted"), "github/self-hosted/v1", 1},
		{"B08 no runner", runner("github", ""), "github/self-hosted/v1", 1},
		{"B08 provider without hosted runners", runner("generic", "github-hosted"), "generic/self-hosted/v1", 1},
		{"B08 Kubernetes", runner("kubernetes", ""), "kubernetes/self-hosted/v1", 1},
		{"B08 SPIFFE", runner("spiffe", ""), "spiffe/self-hosted/v1", 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := attest.BuilderID(service, row.id)
			if got != builders+row.want || attest.BuildLevel(service, got) != row.level {
				t.Errorf("builder %s of level %d, want %s of level %d", got, attest.BuildLevel(service, got), row.want, row.level)
			}
			if !attest.BuilderFits(service, got, row.id.Provider, row.id.Build) {
				t.Errorf("%s does not fit the job that it was given to", got)
			}
			_, p := read(t, write(t, input(with(row.id, func(id *attest.Identity) { id.TokenID = attest.Key("t") }), single)))
			if p.RunDetails.Builder.ID != got {
				t.Errorf("the provenance says builder %s", p.RunDetails.Builder.ID)
			}
		})
	}
	for _, row := range []struct{ name, id string }{
		{"empty", ""},
		{"another service", "https://other.example.com/builders/github/hosted/v1"},
		{"a service whose name begins alike", service + ".evil.example/builders/github/hosted/v1"},
		{"GitHub's own", listedAt},
		{"no version", builders + "github/hosted"},
		{"another version", builders + "github/hosted/v2"},
		{"another mode", builders + "github/any/v1"},
		{"reusable workflow without a path", builders + "github/reusable/acme/builders"},
		{"reusable workflow of another service", "https://other.example.com/builders/github/reusable/" + reusable},
		{"more behind it", builders + "github/hosted/v1/reusable"},
	} {
		t.Run("level 0, "+row.name, func(t *testing.T) {
			if got := attest.BuildLevel(service, row.id); got != 0 {
				t.Errorf("%q counts %d", row.id, got)
			}
		})
	}
}

// A builder id that is not what the claims give is refused, whatever it promises.
func TestBuilderFits(t *testing.T) {
	nothing := func(*attest.Identity) {}
	for _, row := range []struct {
		name, builder, provider string
		change                  func(*attest.Identity)
		want                    bool
	}{
		{"hosted", builders + "github/hosted/v1", "github", nothing, true},
		{"reusable", reusableB, "github", onReusable, true},
		{"D10 hosted of a self-hosted runner", builders + "github/hosted/v1", "github", func(id *attest.Identity) { id.Build.Runner = "self-hosted" }, false},
		{"D10 of another provider", builders + "gitlab/hosted/v1", "github", nothing, false},
		{"D10 of another service", "https://other.example.com/builders/github/hosted/v1", "github", nothing, false},
		{"D10 none", "", "github", nothing, false},
		{"D10 with more behind it", builders + "github/hosted/v1/", "github", nothing, false},
		{"B08 reusable workflow on a self-hosted runner", reusableB, "github", func(id *attest.Identity) { onReusable(id); id.Build.Runner = "self-hosted" }, false},
		{"B04 reusable workflow that did not run the job", reusableB, "github", nothing, false},
		{"B04 another workflow of that repository", builders + "github/reusable/acme/builders/.github/workflows/other.yml", "github", onReusable, false},
		{"B04 workflow whose path begins alike", builders + "github/reusable/acme/builders/.github/workflows/image", "github", onReusable, false},
		{"B04 workflow with its ref", reusableB + "@refs/tags/v1", "github", onReusable, false},
		{"B04 only its repository", builders + "github/reusable/acme/builders", "github", onReusable, false},
		{"B04 no workflow", builders + "github/reusable/", "github", onReusable, false},
		{"D10 reusable workflow on another server", reusableB, "github", func(id *attest.Identity) {
			onReusable(id)
			id.Build.SignerURI = "https://ghes.example.com/" + reusable + "@refs/tags/v1"
		}, false},
		{"D10 reusable workflow, server unknown", reusableB, "github", func(id *attest.Identity) { onReusable(id); id.Build.OwnerURI = "" }, false},
		{"D10 reusable workflow, names without a server", reusableB, "github", func(id *attest.Identity) {
			onReusable(id)
			id.Build.OwnerURI, id.Build.SignerURI = "", reusable+"@refs/tags/v1"
		}, false},
		{"B04 reusable workflow at no commit", reusableB, "github", func(id *attest.Identity) { onReusable(id); id.Build.SignerDigest = "" }, false},
		{"B09 reusable workflow at a short commit", reusableB, "github", func(id *attest.Identity) { onReusable(id); id.Build.SignerDigest = "bbbbbbb" }, false},
		{"B09 reusable workflow at a tag", reusableB, "github", func(id *attest.Identity) { onReusable(id); id.Build.SignerDigest = "v1" }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			id := with(gitHub(), row.change)
			if got := attest.BuilderFits(service, row.builder, row.provider, id.Build); got != row.want {
				t.Errorf("fits: %v, want %v", got, row.want)
			}
		})
	}
}

// External parameters are exactly those of the build type and say what the claims
// say; what nobody judged is refused.
func TestCheckParameters(t *testing.T) {
	for name, in := range provenances() {
		_, p := read(t, write(t, in))
		if err := p.CheckParameters(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	type object = map[string]any
	inWorkflow := func(d object) object { return d["externalParameters"].(object)["workflow"].(object) }
	external := func(d object) object { return d["externalParameters"].(object) }
	for _, row := range []struct {
		name, of string
		change   func(definition object)
	}{
		{"D11 unknown parameter", "gitlab", func(d object) { external(d)["inputs"] = object{"debug": "true"} }},
		{"D11 unknown parameter of GitHub", "github", func(d object) { external(d)["inputs"] = object{} }},
		{"D11 unknown parameter of the workflow", "github", func(d object) { inWorkflow(d)["job"] = "x" }},
		{"D11 unknown parameter that is null", "gitlab", func(d object) { external(d)["vars"] = nil }},
		{"D11 parameter in another case", "gitlab", func(d object) { external(d)["SOURCE"] = external(d)["source"]; delete(external(d), "source") }},
		{"D11 parameter with a long s", "gitlab", func(d object) { external(d)["\u017fource"] = external(d)["source"]; delete(external(d), "source") }},
		{"D11 workflow in another case", "github", func(d object) { external(d)["Workflow"] = external(d)["workflow"]; delete(external(d), "workflow") }},
		{"D03 parameter twice in other case", "gitlab", func(d object) { external(d)["Source"] = "https://git.example.com/evil/api" }},
		{"D11 no parameters", "gitlab", func(d object) { d["externalParameters"] = object{} }},
		{"D11 parameters null", "gitlab", func(d object) { d["externalParameters"] = nil }},
		{"D11 parameters missing", "github", func(d object) { delete(d, "externalParameters") }},
		{"D11 parameters are a list", "gitlab", func(d object) { d["externalParameters"] = []any{} }},
		{"D11 nested too deep", "gitlab", func(d object) {
			d["externalParameters"] = []any{[]any{[]any{[]any{[]any{[]any{[]any{[]any{[]any{}}}}}}}}}
		}},
		{"D11 parameters of the other build type", "github", func(d object) {
			d["externalParameters"] = object{"source": "https://github.com/acme/api", "ref": "refs/heads/main"}
		}},
		{"D10 another source than the claims", "gitlab", func(d object) { external(d)["source"] = "https://git.example.com/evil/api" }},
		{"D10 another ref than the claims", "gitlab", func(d object) { external(d)["ref"] = "refs/heads/main" }},
		{"D10 another workflow than the claims", "github", func(d object) { inWorkflow(d)["path"] = ".github/workflows/other.yml" }},
		{"D10 a source where the claims have no commit", "without a commit", func(d object) { external(d)["source"] = "https://git.example.com/acme/api" }},
		{"D10 no source where the claims have a commit", "gitlab", func(d object) { d["externalParameters"] = object{"source": attest.SourceUnknown} }},
		{"D11 GitHub's parameters missing", "github", func(d object) { delete(d["internalParameters"].(object), "github") }},
		{"D10 GitHub's repository id is another", "github", func(d object) { d["internalParameters"].(object)["github"].(object)["repository_id"] = "666" }},
		{"D11 an event that GitHub's build type does not cover", "github", func(d object) {
			internal := d["internalParameters"].(object)
			internal["github"].(object)["event_name"], internal["hallmark_claims"].(object)["event"] = "schedule", "schedule"
		}},
		{"D11 unknown build type", "gitlab", func(d object) {
			d["buildType"] = "https://slsa-framework.github.io/github-actions-buildtypes/workflow/v1"
		}},
		{"D11 build type with more behind it", "gitlab", func(d object) { d["buildType"] = attest.BuildTypeOIDC + "/" }},
		{"D11 no build type", "gitlab", func(d object) { delete(d, "buildType") }},
	} {
		t.Run(row.name, func(t *testing.T) {
			s, _ := read(t, write(t, provenances()[row.of]))
			var predicate object
			if err := json.Unmarshal(s.Predicate, &predicate); err != nil {
				t.Fatal(err)
			}
			row.change(predicate["buildDefinition"].(object))
			changed, err := json.Marshal(predicate)
			if err != nil {
				t.Fatal(err)
			}
			p, err := attest.ParseProvenance(changed)
			if err != nil {
				t.Fatal(err)
			}
			if got := attest.ReasonOf(p.CheckParameters()); got != attest.StatementMalformed {
				t.Errorf("%q, want %q", got, attest.StatementMalformed)
			}
		})
	}
}

// Of a parameter that is there twice, some readers take the first and some the last.
func TestCheckParametersTwice(t *testing.T) {
	s, _ := read(t, write(t, provenances()["gitlab"]))
	good := `"externalParameters":{"source":"https://git.example.com/acme/api"`
	twice := strings.Replace(string(s.Predicate), good, `"externalParameters":{"source":"https://git.example.com/evil/api","source":"https://git.example.com/acme/api"`, 1)
	if twice == string(s.Predicate) {
		t.Fatalf("nothing to change: %s", good)
	}
	p, err := attest.ParseProvenance(json.RawMessage(twice))
	if err != nil {
		t.Fatal(err)
	}
	if got := attest.ReasonOf(p.CheckParameters()); got != attest.StatementMalformed {
		t.Errorf("D09 parameter twice: %q, want %q", got, attest.StatementMalformed)
	}
}

// Nothing that the build controls adds a subject: neither a caller's word, nor what
// the image says of itself.
func TestSubjects(t *testing.T) {
	for _, name := range []string{"subject", "image", "digest", "IMAGE_DIGEST", "image_list.0", "images"} {
		want := attest.CallerFactsRefused
		switch name {
		case "IMAGE_DIGEST":
			want = attest.BadRequest // no name at all
		case "image_list.0", "images":
			want = "" // a name of the caller's own, in a place of its own
		}
		if got := attest.ReasonOf(attest.CheckCallerFacts(map[string]string{name: "sha256:" + hex64})); got != want {
			t.Errorf("D16 fact %q: %q, want %q", name, got, want)
		}
	}
	in := input(gitHub(), multi())
	in.Facts = map[string]string{"images": "registry.example.com/acme/evil@sha256:" + hex64, "image_list.0": "sha256:" + hex64}
	in.BaseHint = "registry.example.com/acme/evil@sha256:" + hex64
	s, p := read(t, write(t, in))
	var got []string
	for _, sub := range s.Subject {
		got = append(got, sub.Name+"@sha256:"+sub.Digest["sha256"])
		if len(sub.Digest) != 1 || len(sub.Annotations) != 0 {
			t.Errorf("D16 subject %v", sub)
		}
	}
	var want []string
	for _, d := range in.Image.Digests() {
		want = append(want, string(api.Repository)+"@"+d.String())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("D16 subjects %v, want %v", got, want)
	}
	for pointer, grade := range p.Internal().Grades {
		if strings.Contains(pointer, "hallmark_caller") && grade != attest.GradeCaller {
			t.Errorf("D16 %s has the grade %s", pointer, grade)
		}
	}
}

// The page that explains the builder ids knows each of them.
func TestBuildersPage(t *testing.T) {
	text, err := os.ReadFile("../docs/builders.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for name, in := range provenances() {
		id := strings.TrimPrefix(attest.BuilderID(service, in.Builder), builders)
		if in.Builder.Reusable != "" {
			id = strings.TrimSuffix(id, in.Builder.Reusable) + "{owner}/{repo}/{path}"
		}
		if seen[id] = true; !strings.Contains(string(text), "`{public_url}/builders/"+id+"`") {
			t.Errorf("docs/builders.md does not tell of %s (%s)", id, name)
		}
	}
	if len(seen) < 7 {
		t.Errorf("only these builder ids were looked for: %v", seen)
	}
}

// FuzzProvenance: a predicate that has the parameters of its build type says
// nothing else, and reading it never ends in a panic.
func FuzzProvenance(f *testing.F) {
	for _, in := range provenances() {
		s, _ := read(f, write(f, in))
		f.Add([]byte(s.Predicate))
	}
	f.Add([]byte(`{"buildDefinition":{"buildType":"` + attest.BuildTypeOIDC + `","externalParameters":{"source":"UNKNOWN"}}}`))
	f.Fuzz(func(t *testing.T, predicate []byte) {
		p, err := attest.ParseProvenance(predicate)
		if err != nil {
			return
		}
		p.Summary()
		p.Grade("/predicate/runDetails/builder/id")
		attest.BuildLevel(service, p.RunDetails.Builder.ID)
		attest.BuilderFits(service, p.RunDetails.Builder.ID, p.Internal().Token.Provider, p.Internal().Claims)
		if err := p.CheckParameters(); err != nil {
			if got := attest.ReasonOf(err); got != attest.StatementMalformed {
				t.Fatalf("reason %q", got)
			}
			return
		}
		var names map[string]json.RawMessage
		if err := json.Unmarshal(p.BuildDefinition.ExternalParameters, &names); err != nil {
			t.Fatalf("accepted external parameters %q", p.BuildDefinition.ExternalParameters)
		}
		for name := range names {
			if name != "source" && name != "ref" && name != "config" && name != "workflow" {
				t.Fatalf("accepted the external parameter %q", name)
			}
		}
	})
}
