package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// The wrappers for CI systems, run as those run them: their scripts are taken from
// the YAML, their expressions are replaced as the systems do, and they call this
// client against the whole service.

// readYAML reads every document of a file into the targets, refusing what they do
// not know.
func readYAML(t *testing.T, path string, into ...any) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	for _, v := range into {
		if err := d.Decode(v); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		t.Fatalf("%s has more documents than %d: %v", path, len(into), err)
	}
}

// recorded reads an environment that was recorded in a job, a variable a line.
func recorded(t *testing.T, name string) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata/ci", name))
	if err != nil {
		t.Fatal(err)
	}
	return assignments(t, string(raw))
}

func assignments(t *testing.T, text string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for line := range strings.Lines(text) {
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		if _, twice := out[name]; !ok || twice {
			t.Fatalf("not one assignment in a line: %q", line)
		}
		out[name] = value
	}
	return out
}

// shell runs a script in dir with exactly this environment, and returns its exit
// code and everything that it printed.
func shell(t *testing.T, dir, script string, env map[string]string, command ...string) (int, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script.sh")
	if err := os.WriteFile(path, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), command[0], append(command[1:], path)...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_CONFIG_HOME=" + filepath.Join(dir, "config")}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		cmd.Env = append(cmd.Env, name+"="+env[name])
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %s", err, out)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// action is the metadata of a composite action (docs.github.com, "Metadata syntax").
type action struct {
	Name, Description, Author string
	Branding                  struct{ Icon, Color string }
	Inputs                    map[string]struct {
		Description string
		Required    bool
		Default     string
	}
	Outputs map[string]struct{ Description, Value string }
	Runs    struct {
		Using string
		Steps []struct {
			Name, ID, Shell, Run string
			Env                  map[string]string
		}
	}
}

const actionFile = "../../ci/github/action.yml"

var expression = regexp.MustCompile(`\$\{\{ *(inputs|steps)\.([a-z0-9-]+)(?:\.outputs\.([a-z_]+))? *\}\}`)

// An expression in a script would make text of a caller part of the script. Every
// input is used, every name that is used is there.
func TestActionIsWellFormed(t *testing.T) {
	var a action
	readYAML(t, actionFile, &a)
	if a.Runs.Using != "composite" || a.Name == "" || a.Description == "" {
		t.Error("no composite action")
	}
	used, known := map[string]bool{}, map[string]string{}
	check := func(where, text string) {
		t.Helper()
		m := expression.FindStringSubmatch(text)
		switch {
		case m == nil || m[0] != text:
			t.Errorf("%s is no single expression: %q", where, text)
		case m[1] == "inputs":
			if _, ok := a.Inputs[m[2]]; !ok {
				t.Errorf("%s uses the input %s, which is not there", where, m[2])
			}
			used[m[2]] = true
		case !strings.Contains(known[m[2]], m[3]) && m[2] != "sign":
			t.Errorf("%s uses the output %s of the step %s, which does not write it before", where, m[3], m[2])
		}
	}
	for _, s := range a.Runs.Steps {
		if strings.Contains(s.Run, "${{") {
			t.Errorf("L04 step %q has an expression in its script", s.Name)
		}
		if s.Shell != "bash" || s.ID == "" || !strings.HasPrefix(s.Run, "set -euo pipefail\n") {
			t.Errorf("step %q does not stop at errors", s.Name)
		}
		for name, value := range s.Env {
			check("env "+name, value)
			if !strings.Contains(s.Run, "$"+name) && !strings.Contains(s.Run, "${"+name) {
				t.Errorf("step %q does not use %s", s.Name, name)
			}
		}
		known[s.ID] = s.Run
	}
	for name, o := range a.Outputs {
		check("output "+name, o.Value)
		if m := expression.FindStringSubmatch(o.Value); m != nil && known[m[2]] == "" {
			t.Errorf("output %s is of no step", name)
		}
	}
	for name, in := range a.Inputs {
		if !used[name] || in.Description == "" {
			t.Errorf("input %s is not used, or not explained", name)
		}
	}
}

// gitHub runs the action as GitHub's runner does.
type gitHub struct {
	env     map[string]string // of the job
	dir     string            // working directory
	summary string            // path of the job summary
}

func (g gitHub) run(t *testing.T, with map[string]string) (code int, log string, outputs map[string]string) {
	t.Helper()
	var a action
	readYAML(t, actionFile, &a)
	steps := map[string]map[string]string{}
	value := func(text string) string {
		return expression.ReplaceAllStringFunc(text, func(e string) string {
			m := expression.FindStringSubmatch(e)
			if m[1] == "steps" {
				return steps[m[2]][m[3]]
			}
			if v, given := with[m[2]]; given {
				return v
			}
			return a.Inputs[m[2]].Default
		})
	}
	for name := range with {
		if _, ok := a.Inputs[name]; !ok {
			t.Fatalf("the action has no input %s", name)
		}
	}
	for _, s := range a.Runs.Steps {
		env := maps.Clone(g.env)
		env["GITHUB_OUTPUT"] = filepath.Join(t.TempDir(), "output")
		env["GITHUB_STEP_SUMMARY"] = g.summary
		if err := os.WriteFile(env["GITHUB_OUTPUT"], nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for name, text := range s.Env {
			env[name] = value(text)
		}
		var out string
		code, out = shell(t, g.dir, s.Run, env, "bash", "--noprofile", "--norc", "-eo", "pipefail")
		log += out
		raw, err := os.ReadFile(env["GITHUB_OUTPUT"])
		if err != nil {
			t.Fatal(err)
		}
		steps[s.ID] = assignments(t, string(raw))
		if code != 0 {
			break
		}
	}
	outputs = map[string]string{}
	for name, o := range a.Outputs {
		outputs[name] = value(o.Value)
	}
	return code, log, outputs
}

// service is the whole service over TLS, and an image that a job of it has pushed.
func service(t *testing.T) (*testkit.Stack, attest.ImageRef) {
	t.Helper()
	s := testkit.NewStack(t, testkit.Options{TLS: true})
	return s, s.PushOn(s.PushBase("static", "12"), "12", "acme/api").ImageRef
}

// tokenEndpoint plays what hands tokens to the steps of a GitHub job: the claims are
// those of the stack's job, with changes, for the audience that was asked for.
func tokenEndpoint(t *testing.T, s *testkit.Stack, changes map[string]any) string {
	t.Helper()
	e := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "bearer request-token" || r.URL.Query().Get("api-version") != "2.0" {
			http.Error(w, `{}`, http.StatusUnauthorized)
			return
		}
		claims := s.Claims(changes)
		claims["aud"] = r.URL.Query().Get("audience")
		token, err := s.Issuer.Mint(claims)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		json.NewEncoder(w).Encode(map[string]any{"count": len(token), "value": token})
	}))
	t.Cleanup(e.Close)
	return e.URL + "/token?api-version=2.0"
}

// newGitHub is a job on GitHub that may ask for tokens with these changes.
func newGitHub(t *testing.T, s *testkit.Stack, event string, changes map[string]any) gitHub {
	t.Helper()
	g := gitHub{env: recorded(t, "github.env"), dir: t.TempDir()}
	g.summary = filepath.Join(g.dir, "summary.md")
	path, err := filepath.Abs(filepath.Join("testdata/ci", event))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(g.env, map[string]string{
		"GITHUB_EVENT_PATH": path, "GITHUB_WORKSPACE": g.dir, "RUNNER_TEMP": t.TempDir(),
		"ACTIONS_ID_TOKEN_REQUEST_URL": tokenEndpoint(t, s, changes),
	})
	return g
}

// inputs are those that every use of the action has.
func inputs(s *testkit.Stack, ref attest.ImageRef, more map[string]string) map[string]string {
	in := map[string]string{
		"subject-name": string(ref.Repository), "subject-digest": ref.Digest.String(), "server": s.URL,
		"ca-file": s.CAFile, "trust-root-sha256": s.Signer.Fingerprint(),
	}
	maps.Copy(in, more)
	return in
}

// workspace puts files into the working directory of a job.
func workspace(t *testing.T, dir string) {
	t.Helper()
	for name, text := range map[string]string{
		"sbom.json": `{"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}`,
		"unit.xml":  `<testsuite><testcase name="a"/></testsuite>`,
		"e2e.xml":   `<testsuite><testcase name="b"/><testcase name="c"><failure/></testcase></testsuite>`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(raw)
}

// hostile is text that a shell which reads it as its own would obey.
const hostile = "$(touch pwned)`touch pwned`'; touch pwned; '\"; touch pwned; \" --server=https://mallory.example.com"

func TestGitHubAction(t *testing.T) {
	s, ref := service(t)
	g := newGitHub(t, s, "github-push.json", nil)
	workspace(t, g.dir)
	code, log, out := g.run(t, inputs(s, ref, map[string]string{
		"base": s.Registry.Host() + "/base/static:12", "sbom-path": "sbom.json", "test-results": "unit=unit.xml\r\n\ne2e=e2e.xml",
		"facts": "ticket=PAY-7\nnote=" + hostile,
	}))
	if code != 0 {
		t.Fatalf("exit %d\n%s", code, log)
	}
	ev, err := s.Verifier.Bundle([]byte(read(t, out["bundle-path"])), ref.Digest)
	if err != nil {
		t.Fatalf("output bundle-path %q: %v\n%s", out["bundle-path"], err, log)
	}
	p, ok := ev.Provenance()
	if !ok || ev.ID().String() != out["provenance-record"] || p.RunDetails.Builder.ID != out["builder"] || out["digest"] != ref.Digest.String() || len(out["signature-record"]) != 64 {
		t.Errorf("outputs %v", out)
	}
	if in := p.Internal(); in.Caller["ticket"] != "PAY-7" || in.Caller["note"] != hostile || in.Base.Result != attest.ProvenLayers || in.Claims.Commit != testkit.Commit {
		t.Errorf("the provenance says %+v", in)
	}
	if names, err := filepath.Glob(filepath.Join(out["bundle-dir"], "*.sigstore.json")); err != nil || len(names) < 2 {
		t.Errorf("bundle-dir has %v, %v", names, err)
	}
	if summary := read(t, g.summary); !strings.Contains(summary, "SIGNED  "+ref.String()) || strings.Count(summary, "evidence ") != 3 {
		t.Errorf("the job summary is\n%s", summary)
	}
	if read(t, filepath.Join(g.dir, "pwned")) != "" || strings.Contains(log, "::warning") {
		t.Errorf("%s", log)
	}

	// Again without a summary: the same records.
	os.Remove(g.summary)
	code, log, again := g.run(t, inputs(s, ref, map[string]string{
		"base": s.Registry.Host() + "/base/static:12", "facts": "ticket=PAY-7\nnote=" + hostile, "show-summary": "false",
	}))
	if code != 0 || again["provenance-record"] != out["provenance-record"] || read(t, g.summary) != "" {
		t.Errorf("exit %d, %v\n%s", code, again, log)
	}
}

func TestGitHubActionRefuses(t *testing.T) {
	s, ref := service(t)
	for _, row := range []struct {
		name  string
		job   func(*gitHub)
		event string         // "" is a push
		token map[string]any // changes of the job's claims
		with  map[string]string
		code  int
		want  string
	}{
		{name: "G01 a tag", with: map[string]string{"subject-digest": "1.4"}, code: 2, want: "::error title=hallmark::subject-digest has to be sha256:"},
		{name: "G17 another algorithm", with: map[string]string{"subject-digest": "sha512:" + strings.Repeat("ab", 64)}, code: 2, want: "subject-digest has to be"},
		{name: "G17 capital letters", with: map[string]string{"subject-digest": strings.ToUpper(ref.Digest.String())}, code: 2, want: "subject-digest has to be"},
		{name: "a digest with a second line", with: map[string]string{"subject-digest": ref.Digest.String() + "\nx"}, code: 2, want: "subject-digest has to be"},
		{name: "no digest", with: map[string]string{"subject-digest": ""}, code: 2, want: "subject-digest has to be"},
		{name: "a name that is a flag", with: map[string]string{"subject-name": "--server=https://mallory.example.com"}, code: 2, want: "subject-name has to be"},
		{name: "a name that is code", with: map[string]string{"subject-name": hostile}, code: 2, want: "subject-name has to be"},
		{name: "a base that is code", with: map[string]string{"base": hostile}, code: 2, want: "::error title=hallmark::the image was not signed"},
		{name: "a file that is code", with: map[string]string{"sbom-path": hostile}, code: 1, want: "::error"},
		{name: "attach by code", with: map[string]string{"attach": hostile}, code: 2, want: "--attach must be one of"},
		{name: "no server", with: map[string]string{"server": ""}, code: 2, want: "server has to name the Hallmark service"},
		{name: "show-summary", with: map[string]string{"show-summary": "yes"}, code: 2, want: "show-summary has to be true or false"},
		{name: "L04 a download that is not pinned", with: map[string]string{"download-url": "https://example.com/hallmark"}, code: 2, want: "what is not pinned is not run"},
		{name: "L04 a download in the open", with: map[string]string{"download-url": "http://example.com/hallmark", "sha256": strings.Repeat("ab", 32)}, code: 2, want: "download-url has to begin with https://"},
		{name: "no client", with: map[string]string{"hallmark": "./missing"}, code: 2, want: "there is no client"},
		{name: "B07 commit by the caller", with: map[string]string{"facts": "commit=" + testkit.Commit}, code: 2, want: "CALLER_FACTS_REFUSED"},
		{name: "H03 another trust root", with: map[string]string{"trust-root-sha256": strings.Repeat("ab", 32)}, code: 1, want: "no token was sent"},
		{name: "permission is missing", job: func(g *gitHub) {
			delete(g.env, "ACTIONS_ID_TOKEN_REQUEST_URL")
			delete(g.env, "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
		}, code: 3, want: "      id-token: write"},
		{name: "B01 a fork's pull request", event: "github-fork.json", job: func(g *gitHub) {
			g.env["GITHUB_EVENT_NAME"] = "pull_request"
			delete(g.env, "ACTIONS_ID_TOKEN_REQUEST_URL")
			delete(g.env, "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
		}, code: 3, want: "This is a pull request from a fork: it gets no token, by design"},
		{name: "B01 a pull request with a token", token: map[string]any{"event_name": "pull_request", "ref": "refs/pull/7/merge", "workflow_ref": "acme/api/.github/workflows/release.yml@refs/pull/7/merge", "job_workflow_ref": "acme/api/.github/workflows/release.yml@refs/pull/7/merge"}, code: 3, want: string(attest.EventNotAllowed)},
		{name: "B04 another workflow", token: map[string]any{"workflow_ref": "acme/api/.github/workflows/other.yml@refs/heads/main", "job_workflow_ref": "acme/api/.github/workflows/other.yml@refs/heads/main"}, code: 3, want: `x   id.workflow_path == ".github/workflows/release.yml"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := newGitHub(t, s, orElse(row.event, "github-push.json"), row.token)
			if row.job != nil {
				row.job(&g)
			}
			code, log, out := g.run(t, inputs(s, ref, row.with))
			if code != row.code || !strings.Contains(log, row.want) {
				t.Errorf("exit %d, want %d with %q\n%s", code, row.code, row.want, log)
			}
			if out["provenance-record"] != "" || out["bundle-path"] != "" || read(t, filepath.Join(g.dir, "pwned")) != "" {
				t.Errorf("outputs %v\n%s", out, log)
			}
		})
	}
}

// download serves a client that is the one on the PATH, and returns its URL, its
// SHA-256 and the file with the authority of the server.
func download(t *testing.T) (url, sum, ca string) {
	t.Helper()
	real, err := exec.LookPath("hallmark")
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Appendf(nil, "#!/bin/sh\necho this is the download >&2\nexec %s \"$@\"\n", quoted(real))
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(script) }))
	t.Cleanup(plain.Close)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/moved" {
			http.Redirect(w, r, plain.URL+"/hallmark", http.StatusFound)
			return
		}
		w.Write(script)
	}))
	t.Cleanup(s.Close)
	ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pemOf(s.Certificate().Raw), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.URL + "/hallmark", attest.Hash(script).Hex(), ca
}

// L04: a client that is downloaded is the one that was pinned, or is not run.
func TestGitHubActionDownloads(t *testing.T) {
	s, ref := service(t)
	url, sum, ca := download(t)
	g := newGitHub(t, s, "github-push.json", nil)
	g.env["CURL_CA_BUNDLE"] = ca
	code, log, out := g.run(t, inputs(s, ref, map[string]string{"download-url": url, "sha256": sum}))
	if code != 0 || !strings.Contains(log, "this is the download") || out["digest"] != ref.Digest.String() {
		t.Errorf("exit %d, %v\n%s", code, out, log)
	}
	for name, with := range map[string]map[string]string{
		"L04 another program": {"download-url": url, "sha256": strings.Repeat("ab", 32)},
		"L04 moved to http":   {"download-url": strings.TrimSuffix(url, "hallmark") + "moved", "sha256": sum},
	} {
		t.Run(name, func(t *testing.T) {
			code, log, _ := g.run(t, inputs(s, ref, with))
			if code != 2 || strings.Contains(log, "this is the download") {
				t.Errorf("exit %d\n%s", code, log)
			}
		})
	}
}

// component is a GitLab CI/CD component: a header, and what it includes
// (docs.gitlab.com, "CI/CD inputs" and "CI/CD YAML syntax").
type component struct {
	Spec struct{ Inputs map[string]input }
}

type input struct {
	Description, Regex, Type string
	Default                  any // string, or list of an array
}

type gitLabJob struct {
	Extends      string
	Stage        string
	IDTokens     map[string]struct{ Aud string } `yaml:"id_tokens"`
	Rules        []struct{ If, When string }
	Script       []string
	Dependencies []string
	Inherit      struct{ Variables *bool }
	Artifacts    struct {
		When    string
		Paths   []string
		Reports struct{ Dotenv string }
	}
}

const templateFile = "../../ci/gitlab/template.yml"

var interpolation = regexp.MustCompile(`\$\[\[ *inputs\.([a-z0-9-]+) *\]\]`)

// accepts reports whether GitLab takes a value for the input: it has a default
// checked as well, and finds that no regex matches what is blank.
func (in input) accepts(v string) bool {
	return in.Regex == "" || strings.TrimSpace(v) != "" && regexp.MustCompile(in.Regex).MatchString(v)
}

// template returns the header and the text of the template, inputs not in place.
func template(t *testing.T) (map[string]input, string) {
	t.Helper()
	top, body, ok := strings.Cut(read(t, templateFile), "\n---\n")
	var head component
	d := yaml.NewDecoder(strings.NewReader(top))
	d.KnownFields(true)
	if err := d.Decode(&head); err != nil || !ok {
		t.Fatalf("%s: %v", templateFile, err)
	}
	return head.Spec.Inputs, body
}

// include returns the jobs of the template as GitLab creates them: inputs are
// checked, and replaced in the text before it is read as YAML. An array is given
// as JSON. The error is GitLab's refusal of an input.
func include(t *testing.T, with map[string]string) (map[string]gitLabJob, error) {
	t.Helper()
	inputs, body := template(t)
	var refused error
	body = interpolation.ReplaceAllStringFunc(body, func(e string) string {
		name := interpolation.FindStringSubmatch(e)[1]
		in, known := inputs[name]
		v, given := with[name]
		switch {
		case !known || !given && in.Default == nil:
			t.Fatalf("there is no input %s, or it is required", name)
		case !given && in.Type == "array":
			raw, err := json.Marshal(in.Default)
			if err != nil {
				t.Fatal(err)
			}
			v = string(raw)
		case !given:
			v = in.Default.(string)
		}
		if !in.accepts(v) {
			refused = errors.Join(refused, fmt.Errorf("GitLab refuses %q as %s", v, name))
		}
		return v
	})
	if refused != nil {
		return nil, refused
	}
	jobs := map[string]gitLabJob{}
	d := yaml.NewDecoder(strings.NewReader(body))
	d.KnownFields(true)
	if err := d.Decode(&jobs); err != nil {
		t.Fatalf("with %v: %v", with, err)
	}
	return jobs, nil
}

// notCreated is the exit code of a job that GitLab does not create.
const notCreated = 255

// gitLab runs the template's script as a runner does, with the inputs in place.
func gitLab(t *testing.T, dir, sh string, env, with map[string]string) (code int, log, audience string) {
	t.Helper()
	jobs, err := include(t, with)
	if err != nil {
		return notCreated, err.Error(), ""
	}
	job := jobs[".hallmark"]
	code, log = shell(t, dir, "set -e\n"+strings.Join(job.Script, "\n"), env, strings.Fields(sh)...)
	return code, log, job.IDTokens["HALLMARK_IDENTITY_TOKEN"].Aud
}

// L04: what is interpolated cannot be anything but text in single quotes, for YAML
// as for the shell.
func TestTemplateIsWellFormed(t *testing.T) {
	inputs, body := template(t)
	if all, proper := strings.Count(body, "$[["), interpolation.FindAllStringIndex(body, -1); all != len(proper) {
		t.Errorf("%d interpolations, %d of inputs as they are", all, len(proper))
	}
	quoted := regexp.MustCompile(`'[^'\n]*'`)
	for line := range strings.Lines(body) {
		rest := quoted.ReplaceAllString(line, "")
		if m := interpolation.FindStringSubmatch(rest); m != nil && rest != "  dependencies: $[[ inputs.artifacts-from ]]\n" {
			t.Errorf("L04 input %s does not stand in single quotes: %s", m[1], line)
		}
		if strings.Contains(rest, "'") {
			t.Errorf("L04 a quote that is not closed in its line: %s", line)
		}
	}
	for name, in := range inputs {
		if !strings.Contains(body, "$[[ inputs."+name+" ]]") || in.Description == "" {
			t.Errorf("input %s is not used, or not explained", name)
		}
		if in.Type == "array" && name == "artifacts-from" {
			continue // GitLab writes arrays as JSON, which no shell sees
		}
		if in.Type != "" || !strings.HasPrefix(in.Regex, `\A`) || !strings.HasSuffix(in.Regex, `\z`) {
			t.Errorf("L04 input %s is not matched as a whole: %s", name, in.Regex)
			continue
		}
		if v, ok := in.Default.(string); in.Default != nil && (!ok || !in.accepts(v)) {
			t.Errorf("GitLab refuses the default of %s", name)
		}
	}
	jobs, err := include(t, map[string]string{"server": "https://hallmark.example.com", "subject-name": "a.example.com/b", "artifacts-from": `["build"]`})
	if err != nil {
		t.Fatal(err)
	}
	own := jobs["hallmark-sign"]
	if len(jobs) != 2 || own.Extends != ".hallmark" || len(own.Script) != 0 || len(own.Rules) != 2 || own.Rules[0].When != "never" || !strings.Contains(own.Rules[0].If, "merge_request_event") {
		t.Errorf("the job of its own runs for merge requests: %+v", own)
	}
	if !slices.Equal(own.Dependencies, []string{"build"}) || own.Inherit.Variables == nil || *own.Inherit.Variables {
		t.Errorf("L04 the job of its own gets what it does not need: %+v", own)
	}
	if jobs, err := include(t, map[string]string{"server": "https://hallmark.example.com", "subject-name": "a.example.com/b"}); err != nil || jobs["hallmark-sign"].Dependencies == nil || len(jobs["hallmark-sign"].Dependencies) != 0 {
		t.Errorf("L04 the job of its own gets the dotenv reports of all jobs: %v", err)
	}
}

// L04: no input takes what could end the quotes, its line, or mean anything to a shell.
func TestTemplateInputsAreText(t *testing.T) {
	inputs, _ := template(t)
	for name, in := range inputs {
		if in.Type == "array" {
			continue
		}
		sample, _ := in.Default.(string)
		switch name {
		case "server":
			sample = "https://hallmark.example.com"
		case "subject-name":
			sample = "registry.example.com/payments/api"
		}
		if !in.accepts(sample) {
			t.Errorf("%s refuses %q", name, sample)
		}
		for _, bad := range []string{"'", `"`, "$", `\`, "`", "\n", "\r", "\t", "\v", "\x00", "\u0085", "\u2028", "\u2029", "é", hostile} {
			for _, v := range []string{bad + sample, sample + bad, sample[:1] + bad + sample[1:], sample + "\n" + bad, bad + "\n" + sample} {
				if in.accepts(v) {
					t.Errorf("L04 %s takes %q", name, v)
				}
			}
		}
		if v := sample + " x"; name != "facts" && name != "job-name" && name != "stage" && in.accepts(v) {
			t.Errorf("L04 %s takes %q", name, v)
		}
	}
	for _, v := range []string{"https://hallmark.example.com/", "http://hallmark.example.com", "https://mallory@hallmark.example.com", "https://hallmark.example.com?x"} {
		if inputs["server"].accepts(v) {
			t.Errorf("the server's name is the audience, letter by letter: %s", v)
		}
	}
}

// L04: variables of a trigger, a schedule or an earlier job's dotenv report outrank
// those of a job. None of them chooses the program, the server or what is signed.
func TestGitLabTemplateIsNotTalkedInto(t *testing.T) {
	s, ref := service(t)
	dir := t.TempDir()
	evil := filepath.Join(dir, "evil")
	if err := os.WriteFile(evil, []byte("#!/bin/sh\nexit 66\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	env := recorded(t, "gitlab.env")
	with := map[string]string{
		"server": s.URL, "subject-name": string(ref.Repository), "subject-digest": ref.Digest.String(),
		"ca-file": s.CAFile, "trust-root-sha256": s.Signer.Fingerprint(), "facts": "ticket=PAY-7",
	}
	inputs, _ := template(t)
	names := []string{"client", "url", "name", "digest", "digest_file", "base", "ca_file", "trust_root", "newline", "each", "rest", "one", "flag", "hex", "got"}
	for name := range inputs {
		names = append(names, strings.ReplaceAll(name, "-", "_"), "INPUT_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_")))
	}
	for _, name := range names {
		env[name] = evil
	}
	maps.Copy(env, map[string]string{
		"HALLMARK_IDENTITY_TOKEN": s.Token(nil), "HALLMARK_SERVER": "https://mallory.example.com",
		"HALLMARK_TRUST_ROOT_SHA256": strings.Repeat("ab", 32),
		"INPUT_DOWNLOAD_URL":         "https://mallory.example.com/hallmark", "INPUT_SHA256": strings.Repeat("ab", 32),
	})
	code, log, audience := gitLab(t, dir, "sh", env, with)
	out := assignments(t, read(t, filepath.Join(dir, "hallmark.env")))
	if code != 0 || audience != s.URL || out["digest"] != ref.Digest.String() {
		t.Fatalf("exit %d, audience %s, %v\n%s", code, audience, out, log)
	}
	ev, err := s.Verifier.Bundle([]byte(read(t, filepath.Join(dir, out["bundle_path"]))), ref.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if p, _ := ev.Provenance(); len(p.Internal().Caller) != 1 || p.Internal().Caller["ticket"] != "PAY-7" {
		t.Errorf("facts %v", p.Internal().Caller)
	}
}

func TestGitLabTemplate(t *testing.T) {
	s, ref := service(t)
	const odd = "*  & (touch pwned); touch pwned | touch pwned # < ~ > {a} !x %y [z] ^"
	for _, sh := range []string{"sh", "bash", "busybox sh"} {
		t.Run(sh, func(t *testing.T) {
			dir := t.TempDir()
			workspace(t, dir)
			if err := os.WriteFile(filepath.Join(dir, "digest.txt"), []byte(ref.Digest.String()+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			env := recorded(t, "gitlab.env")
			env["HALLMARK_IDENTITY_TOKEN"] = s.Token(nil)
			code, log, audience := gitLab(t, dir, sh, env, map[string]string{
				"server": s.URL, "subject-name": string(ref.Repository), "ca-file": s.CAFile, "trust-root-sha256": s.Signer.Fingerprint(),
				"sbom-path": "sbom.json", "test-results": "unit=unit.xml,,e2e=e2e.xml,", "facts": "note=" + odd + ",shell=" + sh,
				"base": s.Registry.Host() + "/base/static:12",
			})
			if code != 0 || audience != s.URL || strings.Contains(log, "takes whatever trust root") {
				t.Fatalf("exit %d, audience %s\n%s", code, audience, log)
			}
			out := assignments(t, read(t, filepath.Join(dir, "hallmark.env")))
			ev, err := s.Verifier.Bundle([]byte(read(t, filepath.Join(dir, out["bundle_path"]))), ref.Digest)
			if err != nil {
				t.Fatalf("%v: %v", out, err)
			}
			p, _ := ev.Provenance()
			if in := p.Internal(); in.Caller["note"] != odd || in.Caller["shell"] != sh || ev.ID().String() != out["provenance_record"] || out["digest"] != ref.Digest.String() {
				t.Errorf("%v, %v", out, in.Caller)
			}
			if strings.Count(log, "  evidence ") != 3 || read(t, filepath.Join(dir, "pwned")) != "" {
				t.Errorf("%s", log)
			}
			for name := range out {
				if !regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`).MatchString(name) {
					t.Errorf("GitLab's dotenv reports have no variable %q", name)
				}
			}
		})
	}
}

func TestGitLabTemplateRefuses(t *testing.T) {
	s, ref := service(t)
	for _, row := range []struct {
		name string
		env  string // recorded environment; "" is that of a branch, with a token
		with map[string]string
		code int
		want string
	}{
		{name: "G01 a tag", with: map[string]string{"subject-digest": "1.4"}, code: notCreated, want: "as subject-digest"},
		{name: "G01 a tag in the file", with: map[string]string{"subject-digest": "-", "digest-file": "tag.txt"}, code: 2, want: "the digest has to be sha256:"},
		{name: "G17 capital letters", with: map[string]string{"subject-digest": strings.ToUpper(ref.Digest.String())}, code: notCreated, want: "as subject-digest"},
		{name: "G17 capital letters in the file", with: map[string]string{"subject-digest": "-", "digest-file": "upper.txt"}, code: 2, want: "the digest has to be"},
		{name: "short", with: map[string]string{"subject-digest": "-", "digest-file": "short.txt"}, code: 2, want: "the digest has to be"},
		{name: "a file with a second line", with: map[string]string{"subject-digest": "-", "digest-file": "two.txt"}, code: 2, want: "the digest has to be"},
		{name: "a file that is code", with: map[string]string{"subject-digest": "-", "digest-file": "hostile.txt"}, code: 2, want: "the digest has to be"},
		{name: "no digest", with: map[string]string{"subject-digest": "-"}, code: 2, want: "there is no file digest.txt with the digest"},
		{name: "an empty digest", with: map[string]string{"subject-digest": ""}, code: notCreated, want: "as subject-digest"},
		{name: "a name that is a flag", with: map[string]string{"subject-name": "--server=https://mallory.example.com"}, code: notCreated, want: "as subject-name"},
		{name: "a name that is code", with: map[string]string{"subject-name": hostile}, code: notCreated, want: "as subject-name"},
		{name: "a fact that is code", with: map[string]string{"facts": "note=" + hostile}, code: notCreated, want: "as facts"},
		{name: "L04 a download that is not pinned", with: map[string]string{"download-url": "https://example.com/hallmark"}, code: 2, want: "what is not pinned is not run"},
		{name: "L04 a download in the open", with: map[string]string{"download-url": "http://example.com/hallmark", "sha256": strings.Repeat("ab", 32)}, code: notCreated, want: "as download-url"},
		{name: "B07 builder by the caller", with: map[string]string{"facts": "builder=me"}, code: 2, want: "CALLER_FACTS_REFUSED"},
		{name: "B01 a fork's merge request", env: "gitlab-fork.env", code: 3, want: "This is a pull request from a fork"},
		{name: "no id_tokens", env: "gitlab.env", code: 3, want: "    id_tokens:\n      HALLMARK_IDENTITY_TOKEN:\n        aud: " + s.URL},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{
				"tag.txt": "1.4", "upper.txt": strings.ToUpper(ref.Digest.String()), "short.txt": "sha256:abc",
				"two.txt": ref.Digest.String() + "\nabc", "hostile.txt": hostile,
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			env := recorded(t, orElse(row.env, "gitlab.env"))
			if row.env == "" {
				env["HALLMARK_IDENTITY_TOKEN"] = s.Token(nil)
			}
			with := map[string]string{
				"server": s.URL, "subject-name": string(ref.Repository), "subject-digest": ref.Digest.String(),
				"ca-file": s.CAFile, "trust-root-sha256": s.Signer.Fingerprint(),
			}
			maps.Copy(with, row.with)
			code, log, _ := gitLab(t, dir, "sh", env, with)
			if code != row.code || !strings.Contains(log, row.want) || read(t, filepath.Join(dir, "hallmark.env")) != "" || read(t, filepath.Join(dir, "pwned")) != "" {
				t.Errorf("exit %d, want %d with %q\n%s", code, row.code, row.want, log)
			}
		})
	}
}

// L04: the same for GitLab's download.
func TestGitLabTemplateDownloads(t *testing.T) {
	s, ref := service(t)
	url, sum, ca := download(t)
	env := recorded(t, "gitlab.env")
	env["CURL_CA_BUNDLE"], env["HALLMARK_IDENTITY_TOKEN"] = ca, s.Token(nil)
	for _, row := range []struct {
		name, sum string
		code      int
	}{{"the pinned one", sum, 0}, {"L04 another program", strings.Repeat("ab", 32), 2}} {
		t.Run(row.name, func(t *testing.T) {
			code, log, _ := gitLab(t, t.TempDir(), "sh", env, map[string]string{
				"server": s.URL, "subject-name": string(ref.Repository), "subject-digest": ref.Digest.String(),
				"ca-file": s.CAFile, "trust-root-sha256": s.Signer.Fingerprint(), "download-url": url, "sha256": row.sum,
			})
			if code != row.code || strings.Contains(log, "this is the download") != (row.code == 0) {
				t.Errorf("exit %d\n%s", code, log)
			}
		})
	}
}
