package server_test

import (
	"crypto/tls"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/server"
)

// A renewed certificate is served without a restart; a broken file does not
// replace a good one.
func TestCertificateIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	first := testkit.WriteCertificate(t, cert, key)
	s := testkit.NewStack(t, testkit.Options{Server: func(c *server.Config) { c.CertFile, c.KeyFile = cert, key }})
	served := func() *big.Int {
		t.Helper()
		conn, err := tls.Dial("tcp", s.Addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if v := conn.ConnectionState().Version; v < tls.VersionTLS12 {
			t.Errorf("TLS version %x", v)
		}
		return conn.ConnectionState().PeerCertificates[0].SerialNumber
	}
	if got := served(); got.Cmp(first) != 0 {
		t.Errorf("serves %v, want %v", got, first)
	}
	if err := os.WriteFile(cert, []byte("half written"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := served(); got.Cmp(first) != 0 {
		t.Errorf("with a broken file it serves %v, want %v", got, first)
	}
	second := testkit.WriteCertificate(t, cert, key)
	if got := served(); got.Cmp(second) != 0 {
		t.Errorf("after the renewal it serves %v, want %v", got, second)
	}
	if _, err := tls.Dial("tcp", s.Addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 was taken")
	}
}
