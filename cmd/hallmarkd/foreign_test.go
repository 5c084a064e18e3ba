package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
)

// foreignConfig writes a configuration with foreign_roots and the files that they
// name beside it, and reads it.
func foreignConfig(t *testing.T, roots string, files map[string][]byte) (config, error) {
	t.Helper()
	dir := t.TempDir()
	text := "public_url: http://127.0.0.1:8443\ndata: d\npolicy: p.yaml\nforeign_roots:\n" + roots
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "hallmarkd.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(path)
}

// The roots' files stand beside the configuration; policies may name them, and the
// log keeps the digests of what was read.
func TestForeignRoots(t *testing.T) {
	vendor, sigstore := abroad.NewVendor(t), abroad.New(t)
	c, err := foreignConfig(t, "- {name: vendor-x, key: vendor.pub}\n- {name: elsewhere, trusted_root: root.json, certificate_log: none}\n",
		map[string][]byte{"vendor.pub": vendor.PEM, "root.json": sigstore.TrustedRoot()})
	if err != nil {
		t.Fatal(err)
	}
	if c.foreign, err = c.foreignRoots(); err != nil {
		t.Fatal(err)
	}
	if known := c.known().Roots; len(known) != 2 || !known["vendor-x"] || !known["elsewhere"] {
		t.Errorf("the policy may name %v", known)
	}
	text, err := c.recorded()
	if err != nil {
		t.Fatal(err)
	}
	var recorded struct {
		Roots []map[string]string `json:"foreign_roots"`
	}
	if err := json.Unmarshal(text, &recorded); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"name": "vendor-x", "kind": "key", "sha256": attest.Hash(vendor.PEM).String()}
	if len(recorded.Roots) != 2 || len(recorded.Roots[0]) != len(want) || recorded.Roots[1]["log"] != "required" || recorded.Roots[1]["certificate_log"] != "none" {
		t.Fatalf("recorded %s", text)
	}
	for k, v := range want {
		if recorded.Roots[0][k] != v {
			t.Errorf("recorded %s: %q, want %q", k, recorded.Roots[0][k], v)
		}
	}
}

func TestForeignRootsRefuses(t *testing.T) {
	vendor := abroad.NewVendor(t)
	for _, row := range []struct{ name, roots, words string }{
		{"unknown key", "- {name: a, key: vendor.pub, tuf: https://example.com}\n", "5: unknown key tuf"},
		{"no file", "- {name: a, key: absent.pub}\n", "absent.pub"},
		{"no trusted root", "- {name: a, trusted_root: vendor.pub}\n", "trusted root"},
		{"name twice", "- {name: a, key: vendor.pub}\n- {name: a, key: vendor.pub}\n", "stands twice"},
	} {
		t.Run(row.name, func(t *testing.T) {
			c, err := foreignConfig(t, row.roots, map[string][]byte{"vendor.pub": vendor.PEM})
			if err == nil {
				_, err = c.foreignRoots()
			}
			if attest.ReasonOf(err) != attest.BadConfig || !strings.Contains(err.Error(), row.words) {
				t.Errorf("got %v, want BAD_CONFIG with %q", err, row.words)
			}
		})
	}
}
