package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// A workload signs in with its X.509-SVID: no token goes along, not even one that
// the environment has.
func TestClientCertificate(t *testing.T) {
	d := testkit.NewTrustDomain(t, "prod.example.org")
	s := testkit.NewStack(t, testkit.Options{TLS: true, Issue: func(all *[]identity.Issuer) { *all = append(*all, d.Issuer()) }})
	cert, key := testkit.WriteSVID(t, d.SVID("/ci/image-builder"))
	stranger, strangersKey := testkit.WriteSVID(t, testkit.NewTrustDomain(t, "prod.example.org").SVID("/ci/image-builder"))
	dir := t.TempDir()
	for _, row := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"signed in", []string{"--client-cert", cert, "--client-key", key}, exitOK, "spiffe://prod.example.org/ci/image-builder"},
		{"A24 not of the trust domain", []string{"--client-cert", stranger, "--client-key", strangersKey}, exitNotPermitted, "does not verify"},
		{"certificate without key", []string{"--client-cert", cert}, exitUsage, "--client-key"},
		{"key without certificate", []string{"--client-key", key}, exitUsage, "--client-cert"},
		{"A25 certificate and token", []string{"--client-cert", cert, "--client-key", key, "--identity-token", key}, exitUsage, "--identity-token"},
		{"key of another", []string{"--client-cert", cert, "--client-key", strangersKey}, exitFailure, "--client-cert"},
		{"no file", []string{"--client-cert", filepath.Join(dir, "none"), "--client-key", key}, exitFailure, "--client-cert"},
		{"without TLS", []string{"--client-cert", cert, "--client-key", key, "--server", "http://127.0.0.1:1"}, exitUsage, "https://"},
	} {
		t.Run(row.name, func(t *testing.T) {
			a := &app{getenv: func(k string) string {
				return map[string]string{"XDG_CONFIG_HOME": dir, "HALLMARK_IDENTITY_TOKEN": s.Token(nil)}[k]
			}}
			code, stdout, stderr := run1(t, a, append([]string{"--server", s.URL, "--ca-file", s.CAFile, "whoami"}, row.args...)...)
			if code != row.code || !strings.Contains(stdout+stderr, row.says) {
				t.Errorf("exit %d, want %d with %q\n%s\n%s", code, row.code, row.says, stdout, stderr)
			}
		})
	}
}
