// Package signer holds the service's keys and signs with them: it certifies
// callers, signs statements as DSSE, stamps signatures with the time, and
// publishes the trust root by which stock tools verify all of it.
package signer

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"

	"github.com/hallmarkd/hallmark/attest"
)

// Config says where the keys are and for whom they sign.
type Config struct {
	Dir     string           // directory of the keys; made by Init, readable by its owner only
	Service string           // public_url of the service: scheme and host, no trailing slash
	Now     func() time.Time // nil: time.Now
	Logger  *slog.Logger     // nil: none
}

func (c Config) now() func() time.Time {
	if c.Now == nil {
		return time.Now
	}
	return c.Now
}

// cachedCredentials bounds how many callers' keys are held at once. One that is
// pushed out is made again when its token comes back.
const cachedCredentials = 1024

// Signer signs for one service. It is safe for concurrent use.
type Signer struct {
	service string
	origin  string
	now     func() time.Time
	root    []byte // trusted_root.json
	gatePEM []byte
	gateKey []byte // PKIX DER
	logID   []byte

	// One key for one purpose (attacks H05): none can be talked into doing the
	// work of another.
	intermediate, tsa, ct, log, gate crypto.Signer

	ca    *x509.Certificate // of intermediate
	caKey []byte            // its PKIX DER
	stamp *x509.Certificate // of tsa
	ctID  [sha256.Size]byte

	issuing singleflight.Group

	mu          sync.Mutex
	closed      bool
	credentials *lru.Cache[string, *Credential]
}

// Open reads the keys and the trust root that Init made. The root key is not
// among them: it is needed to sign another intermediate only, and may be kept
// elsewhere. Open returns NOT_INITIALISED when there are none, KEY_PERMISSIONS
// when others can read one (attacks L06), SERVICE_IDENTITY_CHANGED when they were made
// for another Config.Service, and BAD_CONFIG when they do not belong together.
func Open(cfg Config) (*Signer, error) {
	origin, err := originOf(cfg.Service)
	if err != nil {
		return nil, err
	}
	s := &Signer{service: cfg.Service, origin: origin, now: cfg.now()}
	if s.root, err = readPublic(cfg.Dir, trustedRootFile); err != nil {
		return nil, err
	}
	if s.gatePEM, err = readPublic(cfg.Dir, gateKeyFile); err != nil {
		return nil, err
	}
	for _, k := range []struct {
		name string
		key  *crypto.Signer
	}{{keyIntermediate, &s.intermediate}, {keyTSA, &s.tsa}, {keyCT, &s.ct}, {keyLog, &s.log}, {keyGate, &s.gate}} {
		if *k.key, err = readKey(cfg.Dir, k.name); err != nil {
			return nil, err
		}
	}
	if err := s.match(); err != nil {
		return nil, err
	}
	s.credentials, err = lru.New[string, *Credential](cachedCredentials)
	return s, err
}

// match binds the keys to the trust root and derives what is published of them.
func (s *Signer) match() error {
	published, err := parseTrustedRoot(s.root)
	if err != nil {
		return err
	}
	if published.service != s.service {
		return attest.Errorf(attest.IdentityChanged,
			"the keys were made for %s, not for %s: public_url is fixed at init, because every signature names it", published.service, s.service)
	}
	s.ca, s.stamp = published.intermediate, published.tsa
	seen := map[string]string{}
	for _, row := range []struct {
		name      string
		key       crypto.Signer
		published []byte
		der       *[]byte
	}{
		{keyIntermediate, s.intermediate, s.ca.RawSubjectPublicKeyInfo, &s.caKey},
		{keyTSA, s.tsa, s.stamp.RawSubjectPublicKeyInfo, nil},
		{keyCT, s.ct, published.ct, nil},
		{keyLog, s.log, published.log, nil},
		{keyGate, s.gate, nil, &s.gateKey},
	} {
		der, err := x509.MarshalPKIXPublicKey(row.key.Public())
		if err != nil {
			return attest.Errorf(attest.BadConfig, "reading the public part of %s: %w", row.name, err)
		}
		if row.published != nil && !bytes.Equal(der, row.published) {
			return attest.Errorf(attest.BadConfig, "%s is not the key that %s names: restore both from one backup", row.name, trustedRootFile)
		}
		if other := seen[string(der)]; other != "" {
			return attest.Errorf(attest.BadConfig, "%s and %s are the same key: each key has one purpose", row.name, other)
		}
		seen[string(der)] = row.name
		if row.der != nil {
			*row.der = der
		}
	}
	if !bytes.Equal(s.gatePEM, publicPEM(s.gateKey)) {
		return attest.Errorf(attest.BadConfig, "%s is not the key in %s, which others rely on: restore both from one backup", keyGate, gateKeyFile)
	}
	s.logID, s.ctID = published.logID, sha256.Sum256(published.ct)
	return nil
}

// Close forgets every caller's key. It does not touch signatures that are being
// made; after it, nothing new is signed.
func (s *Signer) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, c := range s.credentials.Values() {
		c.wipe()
	}
	s.credentials.Purge()
}

// open returns SHUTTING_DOWN after Close.
func (s *Signer) open() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed()
	}
	return nil
}

func errClosed() error {
	return attest.Errorf(attest.ShuttingDown, "the service is shutting down: repeat the request")
}

// TrustedRoot returns trusted_root.json, the same bytes for as long as the keys
// live.
func (s *Signer) TrustedRoot() []byte { return bytes.Clone(s.root) }

// Fingerprint returns the hex SHA-256 of TrustedRoot: what users pin.
func (s *Signer) Fingerprint() string { return fingerprint(s.root) }

// GateKeyPEM returns the public gate key as PEM of type PUBLIC KEY.
func (s *Signer) GateKeyPEM() []byte { return bytes.Clone(s.gatePEM) }

// LogKey returns the key that signs the log's checkpoints.
func (s *Signer) LogKey() crypto.Signer { return s.log }

// LogID returns the log's id in bundles: SHA-256 of the log key's PKIX DER.
func (s *Signer) LogID() []byte { return bytes.Clone(s.logID) }

// Origin returns the log's origin: the host name of the service without port,
// which is where verifiers look for it (sigstore-go takes it from the host of
// the log's baseUrl).
func (s *Signer) Origin() string { return s.origin }

// originOf checks a public_url and returns its host name.
func originOf(service string) (string, error) {
	u, err := url.Parse(service)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "" || u.User != nil ||
		u.RawQuery != "" || u.Fragment != "" || strings.HasSuffix(service, "/") || u.String() != service {
		return "", attest.Errorf(attest.BadConfig, "public_url %q must be https://HOST[:PORT][/PATH] without a slash at the end", service)
	}
	// The name stands in signed notes, where neither may occur (C2SP signed-note).
	if strings.ContainsAny(u.Hostname(), " +%") || u.Hostname() != strings.ToLower(u.Hostname()) {
		return "", attest.Errorf(attest.BadConfig, "public_url %q must have a host name in lower case letters, digits, dots and dashes", service)
	}
	return u.Hostname(), nil
}

func fingerprint(root []byte) string {
	sum := sha256.Sum256(root)
	return hex.EncodeToString(sum[:])
}

// ServiceOf returns the public_url that the keys in a directory were made for, so
// that tools can open a data directory without its configuration. Errors are those
// of Open.
func ServiceOf(dir string) (string, error) {
	root, err := readPublic(dir, trustedRootFile)
	if err != nil {
		return "", err
	}
	published, err := parseTrustedRoot(root)
	if err != nil {
		return "", err
	}
	return published.service, nil
}
