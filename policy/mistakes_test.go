package policy_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/policy"
)

func TestHonestMistakes(t *testing.T) {
	two := func(a, b, c, d string) string {
		return "version: 1\ntracks:\n- {name: " + a + ", images: [\"r.io/a/*\"], stages: [{name: " + b + ", rules: " + full + "}]}\n- {name: " + c + ", images: [\"r.io/b/*\"], stages: [{name: " + d + ", rules: " + full + "}]}\n"
	}
	for _, row := range []struct {
		name, text string
		ok         bool
	}{
		{"M02 two stages of one level", two("pay", "eu-prod", "pay-eu", "prod"), false},
		{"two levels", two("pay", "prod", "ship", "prod"), true},
		{"B11 half an owner", role("id.source.startsWith('https://github.com/acme')"), false},
		{"B11 half a repository", role("id.repository.endsWith('api')"), false},
		{"whole parts", role("id.source.startsWith('https://github.com/acme/') && id.ref.startsWith('refs/tags/v')"), true},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "policy.yaml")
			if err := os.WriteFile(path, []byte(row.text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := policy.Load(path, policy.Known{
				Issuers: map[string]attest.Kind{"github": attest.Workload}, IssuerURLs: map[string]string{"github": "https://token.example.com"}, Service: "https://h.example.com",
			})
			if (err == nil) != row.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A version names no tag that a registry or cosign keeps for another image.
func TestVersionIsNoReferrersTag(t *testing.T) {
	text := strings.Replace(one(`source_id: "1296269"`, ""), "{name: test,", `{name: test, target: "registry.example.com/prod/{name}:{version}",`, 1)
	s := stage(t, text, "test")
	for _, suffix := range []string{"", ".sig", ".att"} {
		_, tag, err := s.Target(api, "sha256-"+attest.Hash([]byte("another image")).Hex()+suffix)
		if attest.ReasonOf(err) != attest.BadRequest {
			t.Errorf("tag %q, %v", tag, err)
		}
	}
}
