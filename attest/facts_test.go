package attest_test

import (
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
)

// B07: what a caller says of its own is called like nothing that is verified.
func TestCheckCallerFacts(t *testing.T) {
	for _, row := range []struct {
		name, value string
		want        attest.Reason
	}{
		{"team", "platform", ""},
		{"ticket", "PAY-7", ""},
		{"build_flags", "-trimpath", ""},
		{"go.version", "1.26.8", ""},
		{"reference-data", "2026-11", ""}, // "ref" is a word, not a beginning
		{"commit", "x", attest.CallerFactsRefused},
		{"commit_sha", "x", attest.CallerFactsRefused},
		{"git_sha", "x", attest.CallerFactsRefused},
		{"source_commit", "x", attest.CallerFactsRefused},
		{"builder", "x", attest.CallerFactsRefused},
		{"builder_url", "x", attest.CallerFactsRefused},
		{"build_id", "x", attest.CallerFactsRefused},
		{"run", "x", attest.CallerFactsRefused},
		{"run_url", "x", attest.CallerFactsRefused},
		{"run-id", "x", attest.CallerFactsRefused},
		{"branch", "x", attest.CallerFactsRefused},
		{"git_ref", "x", attest.CallerFactsRefused},
		{"repo", "x", attest.CallerFactsRefused},
		{"slsa_build_level", "3", attest.CallerFactsRefused},
		{"verified", "true", attest.CallerFactsRefused},
		{"approved_by", "x", attest.CallerFactsRefused},
		{"base_image_digest", "x", attest.CallerFactsRefused},
		{"job_workflow_ref", "x", attest.CallerFactsRefused},
		{"repository_id", "x", attest.CallerFactsRefused},
		{"hallmark_note", "x", attest.CallerFactsRefused},
		{"Team", "x", attest.BadRequest},
		{"", "x", attest.BadRequest},
		{"team", "", attest.BadRequest},
		{"team", strings.Repeat("x", 1025), attest.BadRequest},
		{"team", "a\nb", attest.BadRequest},
		{"team", "a\u202eb", attest.BadRequest},
	} {
		err := attest.CheckCallerFacts(map[string]string{row.name: row.value})
		if got := attest.ReasonOf(err); got != row.want {
			t.Errorf("%q: %q (%v), want %q", row.name, got, err, row.want)
		}
	}
	many := map[string]string{}
	for i := range 33 {
		many["n"+strings.Repeat("x", i)] = "x"
	}
	if got := attest.ReasonOf(attest.CheckCallerFacts(many)); got != attest.BadRequest {
		t.Errorf("33 facts: %q", got)
	}
}

// Jobs of one run in other environments are other callers: none is answered with what
// another has signed.
func TestEvidenceKey(t *testing.T) {
	id := attest.Identity{Issuer: "https://ci.example.com", Subject: "s", SAN: "https://ci.example.com/w", Build: attest.Build{RunURI: "https://ci.example.com/1"}}
	release := id
	release.Build.Environment = "release"
	ref := attest.ImageRef{Repository: "registry.example.com/acme/api", Digest: attest.Hash([]byte("x"))}
	if attest.EvidenceKey(ref, id, "t", "", nil) == attest.EvidenceKey(ref, release, "t", "", nil) {
		t.Error("one key for two environments")
	}
}
