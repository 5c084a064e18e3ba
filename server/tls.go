package server

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// certificate is the server's certificate as the files have it.
type certificate struct {
	certFile, keyFile string
	logger            *slog.Logger

	mu     sync.Mutex
	cert   *tls.Certificate
	read   [2]stamp // of the files when cert was read
	failed [2]stamp // of files that could not be read, so that they are reported once
}

// stamp tells whether a file has changed.
type stamp struct {
	modified time.Time
	size     int64
}

// get returns the certificate, read again when a file has changed. Files that
// cannot be read, for example half written, do not replace a good certificate.
// It implements tls.Config.GetCertificate. BAD_CONFIG.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := [2]stamp{stampOf(c.certFile), stampOf(c.keyFile)}
	if c.cert != nil && (now == c.read || now == c.failed) {
		return c.cert, nil
	}
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	switch {
	case err == nil:
		c.cert, c.read = &cert, now
	case c.cert == nil:
		return nil, attest.Errorf(attest.BadConfig, "reading tls.cert_file and tls.key_file: %w", err)
	default:
		c.failed = now
		c.logger.Error("keeping the old certificate", "cert_file", c.certFile, "error", err)
	}
	return c.cert, nil
}

func stampOf(file string) stamp {
	info, err := os.Stat(file)
	if err != nil {
		return stamp{}
	}
	return stamp{info.ModTime(), info.Size()}
}

// tlsConfig is that of the listener. When callers may have X.509-SVIDs, a client
// certificate is asked for. The handshake proves that the caller holds its key and
// judges nothing else: authorities of a trust domain come and go, and a call needs
// them as they are then. No session is resumed, as that would skip the proof
// (attacks A24).
func (s *Server) tlsConfig(files *certificate) *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: files.get,
	}
	if s.cfg.Auth.TakesCertificates() {
		c.ClientAuth = tls.RequestClientCert
		c.SessionTicketsDisabled = true
		c.VerifyPeerCertificate = smallChain
	}
	return c
}

// How large a client's certificates may be: a connection holds them for as long as it
// is open, parsed, also when no call ever comes (attacks I03).
const (
	maxChain      = 4
	maxChainBytes = 32 << 10
)

// smallChain ends the handshake of a client that shows more, and judges nothing else.
func smallChain(raw [][]byte, _ [][]*x509.Certificate) error {
	n := 0
	for _, c := range raw {
		n += len(c)
	}
	if len(raw) > maxChain || n > maxChainBytes {
		return attest.Errorf(attest.ClientCert, "the client shows %d certificates of %d bytes, more than %d of %d", len(raw), n, maxChain, maxChainBytes)
	}
	return nil
}
