package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const clusters = `public_url: https://hallmark.example.com
data: data
policy: policy.yaml
issuers:
- {name: east, provider: kubernetes, issuer: "https://kubernetes.default.svc", known_as: "https://east.example.com", jwks_file: east.jwks,
   token_review: {url: "https://east.example.com/apis/authentication.k8s.io/v1/tokenreviews", ca_file: east-ca.crt, token_file: east.token}}
- {name: west, provider: kubernetes, issuer: "https://kubernetes.default.svc", known_as: "https://west.example.com", audience: "https://hallmark.example.com/west",
   jwks_uri: "https://west.example.com/jwks", ca_file: west-ca.crt}
- {name: mesh, provider: spiffe, issuer: "spiffe://example.org", trust_domain: example.org, bundle_file: /etc/bundle.json, x509_svid: true}
`

// Files of issuers lie beside the configuration, policies know an issuer by what
// certificates call it (attacks B06), and the log keeps what decides who is believed.
func TestIssuersOfTheConfiguration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hallmarkd.yaml")
	if err := os.WriteFile(path, []byte(clusters), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	east, west, mesh := c.Issuers[0], c.Issuers[1], c.Issuers[2]
	beside := func(name string) string { return filepath.Join(filepath.Dir(path), name) }
	got := []string{east.JWKSFile, east.TokenReview.CAFile, east.TokenReview.TokenFile, west.CAFile, mesh.BundleFile}
	want := []string{beside("east.jwks"), beside("east-ca.crt"), beside("east.token"), beside("west-ca.crt"), "/etc/bundle.json"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	urls := map[string]string{"east": "https://east.example.com", "west": "https://west.example.com", "mesh": "spiffe://example.org"}
	if diff := cmp.Diff(urls, c.known().IssuerURLs); diff != "" {
		t.Errorf("B06: issuers as policies know them (-want +got):\n%s", diff)
	}
	recorded, err := c.recorded()
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{`"known_as":"https://east.example.com"`, `"token_review":{`, `"trust_domain":"example.org"`, `"x509_svid":true`} {
		if !strings.Contains(string(recorded), part) {
			t.Errorf("the log does not keep %s: %s", part, recorded)
		}
	}
}
