package signer_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/digitorus/timestamp"
	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/ctutil"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"
	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/fulcio/pkg/certificate"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/signer"
)

const service = "https://hallmark.example.com:8443"

// clock is a time that tests move.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Now().UTC()} }

func (c *clock) now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.t }

func (c *clock) add(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.t = c.t.Add(d) }

func setUp(tb testing.TB) (*signer.Signer, signer.Config, *clock) {
	tb.Helper()
	c := newClock()
	cfg := signer.Config{Dir: filepath.Join(tb.TempDir(), "keys"), Service: service, Now: c.now}
	if err := signer.Init(cfg); err != nil {
		tb.Fatal(err)
	}
	return open(tb, cfg), cfg, c
}

func open(tb testing.TB, cfg signer.Config) *signer.Signer {
	tb.Helper()
	s, err := signer.Open(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.Close)
	return s
}

func identity(token string) attest.Identity {
	return attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload,
		Issuer: "https://token.actions.githubusercontent.com", Subject: "repo:acme/api:ref:refs/heads/main",
		SAN:     "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main",
		TokenID: attest.Key(token),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", RepositoryID: "1296269",
			OwnerURI: "https://github.com/acme", OwnerID: "9919", Visibility: "private", Commit: strings.Repeat("4b", 20),
			Ref: "refs/heads/main", WorkflowName: "release", ConfigURI: "config", ConfigDigest: "config digest",
			SignerURI: "signer", SignerDigest: "signer digest", Event: "push", RunURI: "run", Runner: "github-hosted", Environment: "prod",
			Actor: "a person", ActorID: "583231",
		},
	}
}

func credential(tb testing.TB, s *signer.Signer, id attest.Identity) *signer.Credential {
	tb.Helper()
	c, err := s.Credential(id)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func parse(tb testing.TB, der []byte) *x509.Certificate {
	tb.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// The trust root has the form that stock tools take (trust-formats 2.4), and its
// bytes and hash never change.
func TestTrustedRoot(t *testing.T) {
	s, cfg, c := setUp(t)
	tr, err := root.NewTrustedRootFromJSON(s.TrustedRoot())
	if err != nil {
		t.Fatal(err)
	}
	logs, cts := tr.RekorLogs(), tr.CTLogs()
	l := logs[hex.EncodeToString(s.LogID())]
	if len(logs) != 1 || len(cts) != 1 || l == nil || l.BaseURL != "https://hallmark.example.com" || s.Origin() != "hallmark.example.com" {
		t.Fatalf("logs %v, certificate logs %v, origin %s", logs, cts, s.Origin())
	}
	if !s.LogKey().Public().(*ecdsa.PublicKey).Equal(l.PublicKey) {
		t.Error("the log key is not the published one")
	}
	ca := tr.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	if len(ca.Intermediates) != 1 || ca.URI != service || !ca.ValidityPeriodStart.Before(c.now().Add(-time.Minute)) {
		t.Errorf("authority %+v", ca)
	}
	tsa := tr.TimestampingAuthorities()[0].(*root.SigstoreTimestampingAuthority)
	if tsa.Leaf == nil || tsa.Leaf.IsCA || tsa.Leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("timestamp authority %+v", tsa.Leaf)
	}
	// A timestamp authority certified by the intermediate must be impossible.
	if ca.Intermediates[0].ExtKeyUsage[0] != x509.ExtKeyUsageCodeSigning || ca.Intermediates[0].MaxPathLen != 0 || !ca.Intermediates[0].MaxPathLenZero {
		t.Errorf("the intermediate may certify more than code signers")
	}
	sum := sha256.Sum256(s.TrustedRoot())
	again := open(t, cfg)
	if s.Fingerprint() != hex.EncodeToString(sum[:]) || again.Fingerprint() != s.Fingerprint() || !bytes.Equal(again.TrustedRoot(), s.TrustedRoot()) {
		t.Error("the fingerprint is not that of the same bytes")
	}
	file, err := os.ReadFile(filepath.Join(cfg.Dir, "gate.pub"))
	if err != nil || !bytes.Equal(file, s.GateKeyPEM()) {
		t.Errorf("gate.pub differs from GateKeyPEM: %v", err)
	}
	spoiled := s.TrustedRoot()
	clear(spoiled)
	if s.Fingerprint() != hex.EncodeToString(sum[:]) || len(bytes.Trim(s.TrustedRoot(), "\x00")) == 0 {
		t.Error("a caller can alter the trust root")
	}
}

// The leaf is what Fulcio issues (trust-formats 2.5), its SCT holds, and the
// precertificate is the same certificate with the poison.
func TestCertificate(t *testing.T) {
	s, _, clock := setUp(t)
	id := identity("1")
	c := credential(t, s, id)
	cert := parse(t, c.Certificate)
	if cert.Subject.String() != "" || len(cert.URIs) != 1 || cert.URIs[0].String() != id.SAN || cert.IsCA ||
		cert.KeyUsage != x509.KeyUsageDigitalSignature || len(cert.ExtKeyUsage) != 1 || cert.ExtKeyUsage[0] != x509.ExtKeyUsageCodeSigning {
		t.Errorf("certificate %+v", cert)
	}
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) && !ext.Critical {
			t.Error("the name is not critical")
		}
	}
	if d := cert.NotAfter.Sub(cert.NotBefore); d != 10*time.Minute || !c.NotAfter.Equal(cert.NotAfter) || !cert.NotBefore.Before(clock.now().Add(-4*time.Second)) {
		t.Errorf("valid %s from %s", d, cert.NotBefore)
	}
	ext, err := certificate.ParseExtensions(cert.Extensions)
	if err != nil {
		t.Fatal(err)
	}
	b := id.Build
	want := certificate.Extensions{
		Issuer: id.Issuer, Subject: id.Subject,
		GithubWorkflowTrigger: b.Event, GithubWorkflowSHA: b.Commit, GithubWorkflowName: b.WorkflowName, GithubWorkflowRepository: b.Repository, GithubWorkflowRef: b.Ref,
		BuildSignerURI: b.SignerURI, BuildSignerDigest: b.SignerDigest, RunnerEnvironment: b.Runner,
		SourceRepositoryURI: b.SourceURI, SourceRepositoryDigest: b.Commit, SourceRepositoryRef: b.Ref, SourceRepositoryIdentifier: b.RepositoryID,
		SourceRepositoryOwnerURI: b.OwnerURI, SourceRepositoryOwnerIdentifier: b.OwnerID, BuildConfigURI: b.ConfigURI, BuildConfigDigest: b.ConfigDigest,
		BuildTrigger: b.Event, RunInvocationURI: b.RunURI, SourceRepositoryVisibilityAtSigning: b.Visibility, DeploymentEnvironment: b.Environment,
	}
	if diff := cmp.Diff(want, ext); diff != "" {
		t.Errorf("extensions (-want +got):\n%s", diff)
	}
	if bytes.Contains(c.Certificate, []byte(b.Actor)) || bytes.Contains(c.Certificate, []byte(b.ActorID)) {
		t.Error("the actor is in a certificate, which is logged for ever")
	}
	tr, err := root.NewTrustedRootFromJSON(s.TrustedRoot())
	if err != nil {
		t.Fatal(err)
	}
	chains, err := verify.VerifyLeafCertificate(clock.now(), cert, tr)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify.VerifySignedCertificateTimestamp(chains, 1, tr); err != nil {
		t.Error(err)
	}
	checkPrecertificate(t, s, tr, c)
}

func checkPrecertificate(t *testing.T, s *signer.Signer, tr *root.TrustedRoot, c *signer.Credential) {
	t.Helper()
	e := c.Precertificate
	ca := tr.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority).Intermediates[0]
	signed := e.Signed()
	if e.PayloadType != attest.PrecertificatePayload || !bytes.Equal(e.PublicKey, ca.RawSubjectPublicKeyInfo) || e.Certificate != nil || e.Timestamp != nil ||
		signed != sha256.Sum256(e.Payload) || !ecdsa.VerifyASN1(ca.PublicKey.(*ecdsa.PublicKey), signed[:], e.Signature) {
		t.Errorf("precertificate envelope %+v", e)
	}
	pre, cert := parse(t, e.Payload), parse(t, c.Certificate)
	if len(pre.UnhandledCriticalExtensions) != 1 || pre.SerialNumber.Cmp(cert.SerialNumber) != 0 {
		t.Error("the precertificate is not marked, or another certificate's")
	}
	// What the SCT covers: both without poison and SCT (RFC 6962 section 3.2).
	left, err := ctx509.RemoveCTPoison(pre.RawTBSCertificate)
	if err != nil {
		t.Fatal(err)
	}
	right, err := ctx509.RemoveSCTList(cert.RawTBSCertificate)
	if err != nil || !bytes.Equal(left, right) {
		t.Errorf("the certificate is not the precertificate's: %v", err)
	}
	scts, err := x509util.ParseSCTsFromCertificate(cert.Raw)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs, %v", len(scts), err)
	}
	chain, err := ctx509.ParseCertificates(append(bytes.Clone(pre.Raw), ca.Raw...))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range tr.CTLogs() {
		if err := ctutil.VerifySCT(l.PublicKey, chain, scts[0], false); err != nil {
			t.Errorf("SCT over the precertificate: %v", err)
		}
		if ct.TimestampToTime(scts[0].Timestamp).IsZero() || l.PublicKey.(*ecdsa.PublicKey).Equal(s.LogKey().Public()) {
			t.Error("the SCT has no time, or the log's key")
		}
	}
}

// Other identities: no extensions of a GitHub job, nothing personal.
func TestOtherIdentities(t *testing.T) {
	s, _, _ := setUp(t)
	generic := identity("generic")
	generic.Provider, generic.Build = "generic", attest.Build{SourceURI: "https://git.example.com/acme/api"}
	person := attest.Identity{Kind: attest.Person, Provider: "generic", Issuer: "https://sso.example.com", Subject: "a-1@example.com", SAN: service + "/people/" + attest.Key("p"), TokenID: "t"}
	for name, row := range map[string]struct {
		id   attest.Identity
		want certificate.Extensions
	}{
		"generic": {generic, certificate.Extensions{Issuer: generic.Issuer, Subject: generic.Subject, SourceRepositoryURI: generic.Build.SourceURI}},
		"person":  {person, certificate.Extensions{Issuer: person.Issuer}},
		"gate":    {attest.GateIdentity(service), certificate.Extensions{Issuer: service}},
	} {
		t.Run(name, func(t *testing.T) {
			c := credential(t, s, row.id)
			ext, err := certificate.ParseExtensions(parse(t, c.Certificate).Extensions)
			if diff := cmp.Diff(row.want, ext); err != nil || diff != "" {
				t.Errorf("%v, extensions (-want +got):\n%s", err, diff)
			}
			if bytes.Contains(c.Certificate, []byte("a-1@example.com")) {
				t.Error("a person's subject is in the certificate")
			}
		})
	}
}

func TestCredentialRefuses(t *testing.T) {
	s, _, _ := setUp(t)
	for _, row := range []struct {
		name  string
		alter func(*attest.Identity)
		want  attest.Reason
	}{
		{"A23 no token id", func(id *attest.Identity) { id.TokenID = "" }, attest.TokenClaims},
		{"A23 no issuer", func(id *attest.Identity) { id.Issuer = "" }, attest.TokenClaims},
		{"A23 no name", func(id *attest.Identity) { id.SAN = "" }, attest.TokenClaims},
		{"name is no URI", func(id *attest.Identity) { id.SAN = "release.yml" }, attest.TokenClaims},
		{"name is not canonical", func(id *attest.Identity) { id.SAN = "HTTPS://github.com/acme" }, attest.TokenClaims},
		{"B12 name is not ASCII", func(id *attest.Identity) { id.SAN = "https://github.com/асме" }, attest.TokenClaims},
		{"name with control characters", func(id *attest.Identity) { id.SAN = "https://github.com/a\x00b" }, attest.TokenClaims},
		{"claim is not UTF-8", func(id *attest.Identity) { id.Build.Ref = "\xff" }, attest.TokenClaims},
		{"F13 endless claim", func(id *attest.Identity) { id.Build.Ref = strings.Repeat("r", 20<<10) }, attest.TokenClaims},
		{"takes the gate's name", func(id *attest.Identity) { id.SAN = service + "/gate" }, attest.IssuerNotAllowed},
		{"takes the service's issuer", func(id *attest.Identity) { id.Issuer = service }, attest.IssuerNotAllowed},
		{"says it is the service", func(id *attest.Identity) { id.Kind = attest.Service }, attest.IssuerNotAllowed},
		{"the gate with a build", func(id *attest.Identity) {
			*id = attest.GateIdentity(service)
			id.Build.Commit = "x"
		}, attest.IssuerNotAllowed},
		{"the gate of another service", func(id *attest.Identity) { *id = attest.GateIdentity("https://other.example.com") }, attest.IssuerNotAllowed},
	} {
		t.Run(row.name, func(t *testing.T) {
			id := identity("1")
			row.alter(&id)
			if c, err := s.Credential(id); attest.ReasonOf(err) != row.want || c != nil {
				t.Errorf("Credential = %p, %v, want %q", c, err, row.want)
			}
		})
	}
}

// One token has one key, for as long as its certificate has a minute left, and
// no other token has it (attacks B13).
func TestCredentialReuse(t *testing.T) {
	s, _, clock := setUp(t)
	first := credential(t, s, identity("1"))
	same := func(id attest.Identity) bool { return credential(t, s, id) == first }
	if !same(identity("1")) {
		t.Error("the same token got another key")
	}
	if same(identity("2")) {
		t.Error("another token got the same key")
	}
	repeated := identity("1")
	repeated.Build.RunURI = "another run"
	if same(repeated) {
		t.Error("another job with a repeated token id got the same key")
	}
	clock.add(first.NotAfter.Sub(clock.now()) - time.Minute)
	if !same(identity("1")) {
		t.Error("a key with a minute left was dropped")
	}
	clock.add(time.Second)
	if same(identity("1")) {
		t.Error("a key with less than a minute left was handed out")
	}
	// Who still holds the old one may use it to its end, and not after.
	if _, err := s.Sign(first, []byte("{}")); err != nil {
		t.Errorf("signing in the last minute: %v", err)
	}
	clock.add(first.NotAfter.Sub(clock.now()))
	if _, err := s.Sign(first, []byte("{}")); attest.ReasonOf(err) != attest.CertificateInvalid {
		t.Errorf("C04 signing after the end: %v", err)
	}
	clock.add(-time.Hour)
	if _, err := s.Sign(first, []byte("{}")); attest.ReasonOf(err) != attest.ClockSkew {
		t.Errorf("signing before the beginning: %v", err)
	}
	if same(identity("1")) {
		t.Error("a key was handed out before its certificate begins")
	}
}

func TestConcurrentCallsMakeOneCredential(t *testing.T) {
	s, _, _ := setUp(t)
	const calls = 50
	var wg sync.WaitGroup
	got := make([]*signer.Credential, calls)
	for i := range calls {
		wg.Go(func() {
			c, err := s.Credential(identity("1"))
			if err == nil {
				_, err = s.Sign(c, []byte("{}"))
			}
			if err != nil {
				t.Error(err)
			}
			got[i] = c
		})
	}
	wg.Wait()
	for _, c := range got {
		if c != got[0] || c == nil {
			t.Fatal("one token has two keys")
		}
	}
}

// Many tokens do not fill the memory: the oldest keys go, and come back anew.
func TestCredentialsAreBounded(t *testing.T) {
	s, _, _ := setUp(t)
	first := credential(t, s, identity("first"))
	for i := range 1024 {
		credential(t, s, identity(string(rune('a'+i%26))+hex.EncodeToString([]byte{byte(i >> 8), byte(i)})))
	}
	if credential(t, s, identity("first")) == first {
		t.Fatal("more than 1024 keys are held")
	}
	if _, err := s.Sign(first, []byte("{}")); err != nil {
		t.Errorf("a key in use was destroyed when it left the cache: %v", err)
	}
	s.Close()
	if _, err := s.Sign(first, []byte("{}")); attest.ReasonOf(err) != attest.ShuttingDown {
		t.Errorf("a forgotten key signs after Close: %v", err)
	}
}

func TestSign(t *testing.T) {
	s, _, clock := setUp(t)
	c := credential(t, s, identity("1"))
	payload := []byte(`{"_type":"x"}`)
	byJob, err := s.Sign(c, payload)
	if err != nil {
		t.Fatal(err)
	}
	byGate, err := s.SignGate(payload)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(s.GateKeyPEM())
	gate, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(byJob.Certificate, c.Certificate) || byJob.PublicKey != nil || !bytes.Equal(byGate.PublicKey, block.Bytes) || byGate.Certificate != nil {
		t.Error("certificate and key are mixed up")
	}
	tr, err := root.NewTrustedRootFromJSON(s.TrustedRoot())
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		e   attest.Envelope
		key any
	}{"job": {byJob, parse(t, c.Certificate).PublicKey}, "gate": {byGate, gate}} {
		signed := sha256.Sum256(attest.PAE("application/vnd.in-toto+json", payload))
		if row.e.PayloadType != attest.InTotoPayload || !bytes.Equal(row.e.Payload, payload) || !ecdsa.VerifyASN1(row.key.(*ecdsa.PublicKey), signed[:], row.e.Signature) {
			t.Errorf("%s: signature does not verify", name)
		}
		at, err := tr.TimestampingAuthorities()[0].Verify(row.e.Timestamp, row.e.Signature)
		if err != nil || !at.Time.Equal(clock.now().Truncate(time.Second)) {
			t.Errorf("%s: timestamp %v, %v", name, at, err)
		}
		ts, err := timestamp.ParseResponse(row.e.Timestamp)
		if err != nil || ts.HashAlgorithm != crypto.SHA256 || len(ts.Certificates) != 0 {
			t.Errorf("%s: timestamp %+v, %v", name, ts, err)
		}
	}
}

// After Close nothing is signed and no key is left.
func TestClose(t *testing.T) {
	s, cfg, _ := setUp(t)
	c := credential(t, s, identity("1"))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				if _, err := s.Sign(c, []byte("{}")); err != nil {
					if attest.ReasonOf(err) != attest.ShuttingDown {
						t.Errorf("Sign while closing: %v", err)
					}
					return
				}
			}
		})
	}
	s.Close()
	s.Close()
	wg.Wait()
	if _, err := s.Credential(identity("2")); attest.ReasonOf(err) != attest.ShuttingDown {
		t.Errorf("Credential: %v", err)
	}
	if _, err := s.SignGate([]byte("{}")); attest.ReasonOf(err) != attest.ShuttingDown {
		t.Errorf("SignGate: %v", err)
	}
	// The key itself is gone, not only the door to it.
	if _, err := open(t, cfg).Sign(c, []byte("{}")); attest.ReasonOf(err) != attest.ShuttingDown {
		t.Errorf("Sign with a wiped key: %v", err)
	}
}

// A key that was being made while the service closed is not handed out.
func TestCloseWhileIssuing(t *testing.T) {
	_, cfg, clock := setUp(t)
	var s *signer.Signer
	cfg.Now = func() time.Time { s.Close(); return clock.now() }
	s = open(t, cfg)
	if c, err := s.Credential(identity("1")); attest.ReasonOf(err) != attest.ShuttingDown || c != nil {
		t.Fatalf("Credential = %p, %v", c, err)
	}
}

func TestInit(t *testing.T) {
	_, cfg, _ := setUp(t)
	before := snapshot(t, cfg.Dir)
	if err := signer.Init(cfg); attest.ReasonOf(err) != attest.AlreadyExists {
		t.Errorf("Init over keys: %v", err)
	}
	if diff := cmp.Diff(before, snapshot(t, cfg.Dir)); diff != "" {
		t.Errorf("keys were altered:\n%s", diff)
	}
	info, err := os.Stat(cfg.Dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory mode %v, %v", info.Mode(), err)
	}
	for _, name := range []string{"root.key", "intermediate.key", "tsa.key", "ct.key", "log.key", "gate.key"} {
		info, err := os.Stat(filepath.Join(cfg.Dir, name))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("L06 %s: %v, %v", name, info, err)
		}
	}
	file := cfg
	file.Dir = filepath.Join(cfg.Dir, "gate.pub")
	if err := signer.Init(file); err == nil {
		t.Error("Init over a file")
	}
	// An empty directory is as good as none, and nothing is left beside it.
	parent := t.TempDir()
	cfg.Dir = filepath.Join(parent, "deep", "keys")
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	if err := signer.Init(cfg); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(cfg.Dir)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	if s := open(t, cfg); !strings.Contains(log.String(), s.Fingerprint()) || strings.Contains(log.String(), "PRIVATE") {
		t.Errorf("L01 log line %s", log.String())
	}
}

func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		raw, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(raw)
	}
	return out
}

// A crash at any moment of Init leaves nothing at the place of the keys: before
// the rename there is another directory beside it, which nobody opens.
func TestInitInterrupted(t *testing.T) {
	_, cfg, _ := setUp(t)
	parent := t.TempDir()
	half := filepath.Join(parent, ".keys-123")
	if err := os.Rename(cfg.Dir, half); err != nil {
		t.Fatal(err)
	}
	cfg.Dir = filepath.Join(parent, "keys")
	if _, err := signer.Open(cfg); attest.ReasonOf(err) != attest.NotInitialised {
		t.Fatalf("Open after a crash: %v", err)
	}
	if err := signer.Init(cfg); err != nil {
		t.Fatalf("Init after a crash: %v", err)
	}
	open(t, cfg)
}

func TestOpenRefuses(t *testing.T) {
	_, strange, _ := setUp(t)
	for _, row := range []struct {
		name  string
		alter func(t *testing.T, cfg *signer.Config)
		want  attest.Reason
	}{
		{"no directory", func(t *testing.T, cfg *signer.Config) { cfg.Dir += "x" }, attest.NotInitialised},
		{"empty directory", func(t *testing.T, cfg *signer.Config) { cfg.Dir = t.TempDir() }, attest.NotInitialised},
		{"key missing", func(t *testing.T, cfg *signer.Config) { remove(t, cfg, "ct.key") }, attest.NotInitialised},
		{"trust root missing", func(t *testing.T, cfg *signer.Config) { remove(t, cfg, "trusted_root.json") }, attest.NotInitialised},
		{"L06 group may read", chmod("gate.key", 0o640), attest.KeyPermissions},
		{"L06 all may read", chmod("tsa.key", 0o604), attest.KeyPermissions},
		{"L06 group may write", chmod("log.key", 0o620), attest.KeyPermissions},
		{"L06 all may do anything", chmod("intermediate.key", 0o777), attest.KeyPermissions},
		{"L06 a link to a readable file", func(t *testing.T, cfg *signer.Config) {
			target := filepath.Join(t.TempDir(), "k")
			write(t, target, read(t, cfg, "ct.key"), 0o644)
			remove(t, cfg, "ct.key")
			if err := os.Symlink(target, filepath.Join(cfg.Dir, "ct.key")); err != nil {
				t.Fatal(err)
			}
		}, attest.KeyPermissions},
		{"a directory for a key", func(t *testing.T, cfg *signer.Config) {
			remove(t, cfg, "ct.key")
			if err := os.Mkdir(filepath.Join(cfg.Dir, "ct.key"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, attest.KeyPermissions},
		{"H05 one key for two purposes", func(t *testing.T, cfg *signer.Config) { put(t, cfg, "gate.key", read(t, cfg, "log.key")) }, attest.BadConfig},
		{"H08 key of another service", func(t *testing.T, cfg *signer.Config) { put(t, cfg, "tsa.key", read(t, &strange, "tsa.key")) }, attest.BadConfig},
		{"gate key of another service", func(t *testing.T, cfg *signer.Config) { put(t, cfg, "gate.key", read(t, &strange, "gate.key")) }, attest.BadConfig},
		{"public gate key missing", func(t *testing.T, cfg *signer.Config) { remove(t, cfg, "gate.pub") }, attest.NotInitialised},
		{"log key of another service", func(t *testing.T, cfg *signer.Config) { put(t, cfg, "log.key", read(t, &strange, "log.key")) }, attest.BadConfig},
		{"trust root of another service", func(t *testing.T, cfg *signer.Config) {
			put(t, cfg, "trusted_root.json", read(t, &strange, "trusted_root.json"))
		}, attest.BadConfig},
		{"trust root cut", func(t *testing.T, cfg *signer.Config) {
			put(t, cfg, "trusted_root.json", read(t, cfg, "trusted_root.json")[:100])
		}, attest.BadConfig},
		{"trust root empty", func(t *testing.T, cfg *signer.Config) { put(t, cfg, "trusted_root.json", []byte("{}")) }, attest.BadConfig},
		{"intermediate certificate is none", func(t *testing.T, cfg *signer.Config) { spoil(t, cfg, "certificateAuthorities") }, attest.BadConfig},
		{"timestamp certificate is none", func(t *testing.T, cfg *signer.Config) { spoil(t, cfg, "timestampAuthorities") }, attest.BadConfig},
		{"key is no PEM", func(t *testing.T, cfg *signer.Config) { put(t, cfg, "log.key", []byte("x")) }, attest.BadConfig},
		{"two keys in a file", func(t *testing.T, cfg *signer.Config) {
			put(t, cfg, "log.key", append(read(t, cfg, "log.key"), read(t, cfg, "ct.key")...))
		}, attest.BadConfig},
		{"H06 P-384", func(t *testing.T, cfg *signer.Config) {
			k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(k)
			if err != nil {
				t.Fatal(err)
			}
			put(t, cfg, "gate.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		}, attest.BadConfig},
		{"other host", func(t *testing.T, cfg *signer.Config) { cfg.Service = "https://other.example.com:8443" }, attest.IdentityChanged},
		{"other port", func(t *testing.T, cfg *signer.Config) { cfg.Service = "https://hallmark.example.com" }, attest.IdentityChanged},
	} {
		t.Run(row.name, func(t *testing.T) {
			s, cfg, _ := setUp(t)
			s.Close()
			row.alter(t, &cfg)
			_, err := signer.Open(cfg)
			if got := attest.ReasonOf(err); got != row.want {
				t.Fatalf("Open = %v, want %q", err, row.want)
			}
			if strings.Contains(err.Error(), "BEGIN") {
				t.Errorf("L01 the error repeats a key: %v", err)
			}
		})
	}
}

func TestServiceOf(t *testing.T) {
	_, cfg, _ := setUp(t)
	if got, err := signer.ServiceOf(cfg.Dir); got != service || err != nil {
		t.Errorf("ServiceOf = %q, %v", got, err)
	}
	if _, err := signer.ServiceOf(t.TempDir()); attest.ReasonOf(err) != attest.NotInitialised {
		t.Errorf("ServiceOf nothing: %v", err)
	}
	put(t, &cfg, "trusted_root.json", []byte("{}"))
	if _, err := signer.ServiceOf(cfg.Dir); attest.ReasonOf(err) != attest.BadConfig {
		t.Errorf("ServiceOf another document: %v", err)
	}
}

// The root key may be anywhere else.
func TestOpenWithoutRootKey(t *testing.T) {
	_, cfg, _ := setUp(t)
	remove(t, &cfg, "root.key")
	credential(t, open(t, cfg), identity("1"))
}

func TestServiceNames(t *testing.T) {
	for _, row := range []struct {
		service, origin string // "" is refused
	}{
		{"https://hallmark.example.com", "hallmark.example.com"},
		{"https://hallmark.example.com:8443/sub", "hallmark.example.com"},
		{"http://127.0.0.1:8080", "127.0.0.1"},
		{"http://[::1]:8080", "::1"},
		{"https://hallmark.example.com/", ""},
		{"https://Hallmark.example.com", ""},
		{"hallmark.example.com", ""},
		{"ftp://hallmark.example.com", ""},
		{"https://user@hallmark.example.com", ""},
		{"https://hallmark.example.com?x=1", ""},
		{"https://hallmark.example.com#x", ""},
		{"https://a+b", ""},
		{"https://", ""},
		{"https://:8443", ""},
		{"", ""},
	} {
		t.Run(row.service, func(t *testing.T) {
			cfg := signer.Config{Dir: filepath.Join(t.TempDir(), "keys"), Service: row.service}
			err := signer.Init(cfg)
			if row.origin == "" {
				if attest.ReasonOf(err) != attest.BadConfig {
					t.Errorf("Init = %v", err)
				}
				if _, err := os.Stat(cfg.Dir); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("a refused Init left keys: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s := open(t, cfg); s.Origin() != row.origin {
				t.Errorf("origin %q, want %q", s.Origin(), row.origin)
			}
		})
	}
}

// FuzzKeyFile: no file makes Open panic, and none but the key is taken.
func FuzzKeyFile(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"))
	f.Add([]byte{})
	_, cfg, _ := setUp(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		put(t, &cfg, "gate.key", raw)
		if s, err := signer.Open(cfg); err == nil {
			s.Close()
			t.Fatal("another gate key was taken")
		} else if got := attest.ReasonOf(err); got != attest.BadConfig {
			t.Fatalf("Open = %v", err)
		}
	})
}

// spoil replaces the first certificate of an authority in the trust root.
func spoil(t *testing.T, cfg *signer.Config, authority string) {
	t.Helper()
	var tr map[string]any
	if err := json.Unmarshal(read(t, cfg, "trusted_root.json"), &tr); err != nil {
		t.Fatal(err)
	}
	chain := tr[authority].([]any)[0].(map[string]any)["certChain"].(map[string]any)
	chain["certificates"].([]any)[0].(map[string]any)["rawBytes"] = "AAAA"
	raw, err := json.Marshal(tr)
	if err != nil {
		t.Fatal(err)
	}
	put(t, cfg, "trusted_root.json", raw)
}

func chmod(name string, mode fs.FileMode) func(*testing.T, *signer.Config) {
	return func(t *testing.T, cfg *signer.Config) {
		if err := os.Chmod(filepath.Join(cfg.Dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
}

func remove(t *testing.T, cfg *signer.Config, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(cfg.Dir, name)); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, cfg *signer.Config, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(cfg.Dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func put(t *testing.T, cfg *signer.Config, name string, raw []byte) {
	t.Helper()
	write(t, filepath.Join(cfg.Dir, name), raw, 0o600)
}

func write(t *testing.T, path string, raw []byte, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, raw, mode); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkSign is what the cryptography of one signing costs: a certificate for
// a new token and two statements, each stamped.
func BenchmarkSign(b *testing.B) {
	s, _, _ := setUp(b)
	payload := bytes.Repeat([]byte("x"), 3000)
	var n uint64
	for b.Loop() {
		n++
		id := identity("")
		id.TokenID = attest.Key(hex.EncodeToString([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}))
		c := credential(b, s, id)
		for range 2 {
			if _, err := s.Sign(c, payload); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkStatement(b *testing.B) {
	s, _, _ := setUp(b)
	c := credential(b, s, identity("1"))
	payload := bytes.Repeat([]byte("x"), 3000)
	for b.Loop() {
		if _, err := s.Sign(c, payload); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFloor is one raw ECDSA signature and one verification, to read the
// other figures by.
func BenchmarkFloor(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	for b.Loop() {
		sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil || !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
			b.Fatal("floor")
		}
	}
}
