package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// against returns how to run the command against a service with a token, and which
// exit code to expect; it answers what was printed.
func against(t *testing.T, s *testkit.Stack) func(want int, token string, args ...string) string {
	dir := t.TempDir()
	return func(want int, token string, args ...string) string {
		t.Helper()
		a := &app{getenv: func(k string) string {
			return map[string]string{"XDG_CONFIG_HOME": dir, "HALLMARK_IDENTITY_TOKEN": token}[k]
		}}
		code, stdout, stderr := run1(t, a, append([]string{"--server", s.URL}, args...)...)
		if code != want {
			t.Fatalf("hallmark %s: exit %d, want %d\n%s\n%s", strings.Join(args, " "), code, want, stdout, stderr)
		}
		if code != exitOK {
			return stdout + stderr
		}
		return stdout
	}
}

func containing(t *testing.T) func(got string, parts ...string) {
	return func(got string, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if !strings.Contains(got, part) {
				t.Errorf("no %q in\n%s", part, got)
			}
		}
	}
}

// The commands against the whole service: a job signs, the gate moves stages and
// refuses, an auditor asks, and the summary proves the stage without the service.
func TestAgainstTheService(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	pushed := s.PushOn(s.PushBase("static", "12"), "12", "acme/api")
	dir := t.TempDir()
	do, contains := against(t, s), containing(t)
	ref, job := pushed.String(), s.Token(nil)
	auditor := s.PersonToken("a-1", "audit")

	contains(do(exitOK, job, "whoami", string(pushed.Repository)), "signers for", "covers "+string(pushed.Repository))
	do(exitDenied, s.PromoterToken(), "promote", ref, "--to-stage", "test")
	contains(do(exitOK, job, "sign", ref), "SIGNED  "+ref, testkit.Commit, "proved: its one layer is the image's first", "by the server, read back")
	contains(do(exitOK, job, "verify", ref), "ALLOWED")
	do(exitDenied, job, "verify", ref, "--stage", "test")
	contains(do(exitDenied, s.PromoterToken(), "promote", ref, "--to-stage", "staging", "--dry-run"), "WOULD BE DENIED", "x after")
	do(exitNotPermitted, job, "promote", ref, "--to-stage", "test")
	for _, stage := range []string{"test", "staging", "prod"} {
		contains(do(exitOK, s.PromoterToken(), "promote", ref, "--to-stage", stage, "--version", "1.0.0"), "ALLOWED", "now in "+stage)
		contains(do(exitOK, job, "verify", ref, "--stage", stage), "ALLOWED")
	}
	contains(do(exitOK, auditor, "provenance", ref), testkit.Commit+"  (claim: from the CI system's signed token)", "proved: its one layer is the image's first", "(registry: read from the registry)")
	contains(do(exitOK, auditor, "history", ref), "signature", "provenance", "promotion", "denial")
	contains(do(exitOK, job, "stages"), ref[strings.Index(ref, "@")+1:], "DONE")
	do(exitNotFound, s.PromoterToken(), "promote", ref, "--to-stage", "nowhere")
	do(exitNotPermitted, job, "history", ref)

	// The denial of the beginning, by its number.
	var history historyInfo
	if err := json.Unmarshal([]byte(do(exitOK, auditor, "history", ref, "--kind", "denial", "--output", "json")), &history); err != nil {
		t.Fatal(err)
	}
	if len(history.Records) != 1 {
		t.Fatalf("%d denials are recorded, want one", len(history.Records))
	}
	number := strconv.FormatInt(history.Records[0].Number, 10)
	contains(do(exitOK, auditor, "decision", number), "DENIED", "decision "+number, s.URL+"/d/"+number)

	// The stage, proved by the summary alone. Asking again returns the same one.
	var promoted decisionInfo
	if err := json.Unmarshal([]byte(do(exitOK, s.PromoterToken(), "promote", ref, "--to-stage", "prod", "--version", "1.0.0", "--output", "json")), &promoted); err != nil {
		t.Fatal(err)
	}
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	vsa := file("vsa.json", promoted.Promotion.VSABundle)
	root := file("root.json", []byte(do(exitOK, "", "trust-root")))
	prod := promoted.Promotion.Target[:strings.LastIndexByte(promoted.Promotion.Target, ':')] + "@" + pushed.Digest.String()
	contains(do(exitOK, "", "verify", prod, "--offline", "--trusted-root", root, "--bundle", vsa, "--stage", "prod", "--track", "acme"), "ALLOWED", "ok summary")
	do(exitDenied, "", "verify", prod, "--offline", "--trusted-root", root, "--bundle", vsa, "--stage", "staging", "--track", "acme")
	do(exitDenied, "", "verify", ref, "--offline", "--trusted-root", root, "--bundle", vsa, "--stage", "prod", "--track", "acme")
}

// Evidence, bases and who is who against the whole service.
func TestEvidenceAgainstTheService(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	pushed := s.PushOn(s.PushBase("static", "12"), "12", "acme/api")
	ref := pushed.String()
	do, contains := against(t, s), containing(t)
	job, auditor := s.Token(nil), s.PersonToken("a-1", "audit")
	sbom := file(t, "sbom.json", `{"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}`)
	report := file(t, "unit.xml", `<testsuite><testcase classname="c" name="a"/><testcase name="b"><failure/></testcase></testsuite>`)

	got := do(exitOK, job, "sign", ref, "--sbom", sbom, "--test-results", "unit="+report, "--fact", "ticket=PAY-7", "--base", string(s.Registry.Host())+"/base/static:12")
	contains(got, "SIGNED  "+ref, "evidence   cyclonedx, record", "evidence   test-result unit, record")
	contains(do(exitOK, job, "sign", ref, "--sbom", sbom, "--test-results", "unit="+report, "--fact", "ticket=PAY-7", "--base", string(s.Registry.Host())+"/base/static:12"), "(recorded before)")
	contains(do(exitOK, auditor, "provenance", ref), "caller     ticket = PAY-7  (caller: ", "evidence   test-result unit, record", "evidence   cyclonedx, record")

	review := file(t, "review.json", `{"approved": true}`)
	contains(do(exitOK, job, "attest", ref, "--type", "https://example.com/review/v1", "--predicate", review), "SIGNED  "+ref, "by the server, read back")
	contains(do(exitOK, job, "attest", ref, "--type", "https://example.com/review/v1", "--predicate", review), "(recorded before)")
	contains(do(exitNotPermitted, auditor, "attest", ref, "--type", "https://example.com/review/v1", "--predicate", review), "[ROLE_MISSING]")
	contains(do(exitOK, auditor, "history", ref, "--kind", "evidence"), "evidence")

	contains(do(exitOK, auditor, "base", ref), ref, "base       "+string(s.Registry.Host())+"/base/static:12@", "proved: its one layer is the image's first [PROVEN_LAYERS]  (registry: ", "its provenance, record", "built on ")
	contains(do(exitNotPermitted, job, "import", ref), "[ROLE_MISSING]")

	// Who is who: a job that may sign, one that may not, and the claim that is wrong.
	contains(do(exitOK, job, "whoami", string(pushed.Repository)), "may sign   "+string(s.Registry.Host())+"/acme/*", `policy     when: "id.repository_id == `,
		"verify     cosign verify --certificate-identity https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main --certificate-oidc-issuer "+s.Issuer.URL())
	pull := s.Token(map[string]any{"event_name": "pull_request"})
	contains(do(exitOK, pull, "whoami"), "may sign   no: ")
	contains(do(exitOK, auditor, "whoami"), "may sign   no: ")
	branch := s.Token(map[string]any{
		"ref": "refs/heads/dev", "workflow_ref": "acme/api/.github/workflows/release.yml@refs/heads/dev", "job_workflow_ref": "acme/api/.github/workflows/release.yml@refs/heads/dev",
	})
	contains(do(exitNotPermitted, branch, "sign", ref), "[SOURCE_NOT_ALLOWED]", `x   id.ref == "refs/heads/main"`, `id.ref = "refs/heads/dev"`, "ok  id.repository_id == ")
}

// What a vendor has signed is imported under its configured key; the rest is told.
func TestImportAgainstTheService(t *testing.T) {
	vendor := abroad.NewVendor(t)
	job := "id.repository_id == '" + dev.GitHubID(testkit.Source) + "'"
	s := testkit.NewStack(t, testkit.Options{
		Foreign: []foreign.Root{{Name: "vendor", Key: file(t, "vendor.pub", string(vendor.PEM))}},
		Policy:  "version: 1\nroles:\n  importers:\n  - {issuer: github, images: [\"REGISTRY/acme/*\"], when: \"" + job + "\"}\n",
	})
	do, contains := against(t, s), containing(t)
	ref := s.PushApp("acme/api").ImageRef
	contains(do(exitNotFound, s.Token(nil), "import", ref.String()), "[NOTHING_TO_IMPORT]")
	stranger := abroad.Refer(t, ref, ref.Digest, abroad.BundleType, abroad.NewVendor(t).Bundle(abroad.Statement(t, attest.PredicateVulns, nil, ref.Digest)))
	contains(do(exitNotFound, s.Token(nil), "import", ref.String()), "SKIPPED  "+stranger.String(), "[NOTHING_TO_IMPORT]")
	abroad.Refer(t, ref, ref.Digest, abroad.BundleType, vendor.Bundle(abroad.Statement(t, attest.PredicateVulns, nil, ref.Digest)))
	contains(do(exitOK, s.Token(nil), "import", ref.String()), "IMPORTED  Sigstore bundle, vouched for by the root vendor\n", "type       "+attest.PredicateVulns, "signed by  the key ", "SKIPPED  "+stranger.String())
	contains(do(exitOK, s.Token(nil), "import", ref.String()), "(recorded before)")
}
