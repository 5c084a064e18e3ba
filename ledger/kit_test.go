package ledger_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/asn1"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/digitorus/timestamp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

const (
	origin  = "hallmark.example.com"
	service = "https://hallmark.example.com"
	repo    = attest.Repository("registry.example.com/payments/api")
)

// zero is the id of no record.
var zero attest.RecordID

// start is when everything in these tests happens.
var start = time.Date(2026, 11, 20, 9, 0, 0, 0, time.UTC)

// issuer holds the keys of a service, as package signer would.
type issuer struct {
	tb                   testing.TB
	log, gate, ca, tsa   *ecdsa.PrivateKey
	caCert, tsaCert      *x509.Certificate
	gatePublic, caPublic []byte
	now                  time.Time
	serial               int64
}

func newIssuer(tb testing.TB) *issuer {
	tb.Helper()
	s := &issuer{tb: tb, log: newKey(tb), gate: newKey(tb), ca: newKey(tb), tsa: newKey(tb), now: start}
	s.caCert = s.certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, s.ca, s.ca)
	s.tsaCert = s.certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test TSA"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping}, KeyUsage: x509.KeyUsageDigitalSignature,
	}, s.caCert, s.tsa, s.ca)
	s.gatePublic, s.caPublic = publicKey(tb, s.gate), publicKey(tb, s.ca)
	return s
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func publicKey(tb testing.TB, k *ecdsa.PrivateKey) []byte {
	tb.Helper()
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func (s *issuer) certificate(template, parent *x509.Certificate, subject, signer *ecdsa.PrivateKey) *x509.Certificate {
	s.tb.Helper()
	if template.SerialNumber == nil {
		s.serial++
		template.SerialNumber = big.NewInt(s.serial)
	}
	template.NotBefore, template.NotAfter = start.Add(-time.Hour), start.AddDate(10, 0, 0)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, subject.Public(), signer)
	if err != nil {
		s.tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		s.tb.Fatal(err)
	}
	return c
}

// credential is a short-lived certificate with its logged precertificate.
type credential struct {
	key            *ecdsa.PrivateKey
	der            []byte
	precertificate attest.Envelope
}

func (s *issuer) credential(run string) *credential {
	s.tb.Helper()
	key := newKey(s.tb)
	s.serial++
	uri, err := url.Parse("https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main")
	if err != nil {
		s.tb.Fatal(err)
	}
	extensions := []pkix.Extension{
		fulcio(s.tb, 8, "https://token.actions.githubusercontent.com"), fulcio(s.tb, 12, "https://github.com/acme/api"),
		fulcio(s.tb, 13, "4be1d0c0a1b2c3d4e5f60718293a4b5c6d7e8f90"), fulcio(s.tb, 21, "https://github.com/acme/api/actions/runs/"+run+"/attempts/1"),
	}
	template := func() *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(1_000_000 + s.serial), URIs: []*url.URL{uri}, ExtraExtensions: extensions,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}}
	}
	pre := s.certificate(template(), s.caCert, key, s.ca)
	c := &credential{key: key, der: s.certificate(template(), s.caCert, key, s.ca).Raw}
	c.precertificate = attest.Envelope{PayloadType: attest.PrecertificatePayload, Payload: pre.Raw, PublicKey: s.caPublic}
	c.precertificate.Signature = s.signature(s.ca, c.precertificate)
	return c
}

// fulcio returns a certificate extension of Fulcio (oid-info.md).
func fulcio(tb testing.TB, n int, value string) pkix.Extension {
	tb.Helper()
	der, err := asn1.MarshalWithParams(value, "utf8")
	if err != nil {
		tb.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, n}, Value: der}
}

func (s *issuer) signature(k *ecdsa.PrivateKey, e attest.Envelope) []byte {
	s.tb.Helper()
	h := e.Signed()
	sig, err := ecdsa.SignASN1(rand.Reader, k, h[:])
	if err != nil {
		s.tb.Fatal(err)
	}
	return sig
}

func (s *issuer) timestamp(sig []byte) []byte {
	s.tb.Helper()
	h := attest.Hash(sig)
	ts := timestamp.Timestamp{HashAlgorithm: crypto.SHA256, HashedMessage: h[:], Time: s.now, Policy: asn1.ObjectIdentifier{1, 2, 3}, AddTSACertificate: true}
	out, err := ts.CreateResponseWithOpts(s.tsaCert, s.tsa, crypto.SHA256)
	if err != nil {
		s.tb.Fatal(err)
	}
	return out
}

// sign signs a statement with a credential, or with the gate key for nil.
func (s *issuer) sign(c *credential, payload []byte, err error) attest.Envelope {
	s.tb.Helper()
	if err != nil {
		s.tb.Fatal(err)
	}
	e := attest.Envelope{PayloadType: attest.InTotoPayload, Payload: payload}
	if c == nil {
		e.PublicKey, e.Signature = s.gatePublic, s.signature(s.gate, e)
	} else {
		e.Certificate, e.Signature = c.der, s.signature(c.key, e)
	}
	e.Timestamp = s.timestamp(e.Signature)
	return e
}

// image returns the nth image.
func image(n int) attest.Image {
	d := attest.Hash(fmt.Appendf(nil, "image %d", n))
	return attest.Image{Ref: attest.ImageRef{Repository: repo, Digest: d}, MediaType: "application/vnd.oci.image.manifest.v1+json"}
}

func identity(run string) attest.Identity {
	return attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload, Issuer: "https://token.actions.githubusercontent.com",
		Subject: "repo:acme/api:ref:refs/heads/main", SAN: "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main",
		TokenID: attest.Key("token", run), Expires: start.Add(time.Hour),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/api", Repository: "acme/api", RepositoryID: "1296269", OwnerID: "9919", OwnerURI: "https://github.com/acme",
			Commit: "4be1d0c0a1b2c3d4e5f60718293a4b5c6d7e8f90", Ref: "refs/heads/main", WorkflowPath: ".github/workflows/release.yml",
			SignerURI: "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main", SignerDigest: "4be1d0c0a1b2c3d4e5f60718293a4b5c6d7e8f90",
			Event: "push", RunURI: "https://github.com/acme/api/actions/runs/" + run + "/attempts/1", RunID: run, RunAttempt: "1", Runner: "github-hosted",
		},
	}
}

// signing returns the three entries of a complete signing of the nth image.
func (s *issuer) signing(c *credential, n int, run string) []ledger.Entry {
	s.tb.Helper()
	img, id := image(n), identity(run)
	request := attest.SignKey(img.Ref, id, "", nil)
	sig, err := attest.SignatureStatement(img, request)
	signature := s.sign(c, sig, err)
	prov, err := attest.ProvenanceStatement(attest.ProvenanceInput{Service: service, Image: img, Builder: id, Request: request, Finished: s.now})
	return []ledger.Entry{{Envelope: c.precertificate}, {Envelope: signature, Attach: true}, {Envelope: s.sign(c, prov, err), Attach: true}}
}

// signed returns one signature statement by the gate key, for tests that need
// some envelope.
func (s *issuer) signed(n int) ledger.Entry {
	s.tb.Helper()
	payload, err := attest.SignatureStatement(image(n), fmt.Sprint(n))
	return ledger.Entry{Envelope: s.sign(nil, payload, err)}
}

func stageDigest(track, stage string, version int) attest.Digest {
	return attest.Hash(fmt.Appendf(nil, "%s/%s rules %d", track, stage, version))
}

// policy returns a policy change whose rules are those of the given version.
func (s *issuer) policy(version, rules int) ledger.Entry {
	s.tb.Helper()
	p := attest.PolicyChange{Version: version, Digest: attest.Hash(fmt.Append(nil, version, rules)), Text: "version: 1\n", Stages: map[string]attest.Digest{}, Configuration: []byte(`{}`)}
	for _, stage := range []string{"test", "prod"} {
		p.Stages["payments/"+stage] = stageDigest("payments", stage, rules)
	}
	payload, err := attest.PolicyStatement(p)
	return ledger.Entry{Envelope: s.sign(nil, payload, err)}
}

// promotion returns a promotion of the nth image to a stage of track payments.
func (s *issuer) promotion(n int, stage string, rules int, replaces attest.RecordID, size uint64) ledger.Entry {
	s.tb.Helper()
	payload, err := attest.PromotionStatement(image(n), attest.Promotion{
		Decided: attest.Decided{
			Track: "payments", Stage: stage, StageDigest: stageDigest("payments", stage, rules), LogSize: size,
			Caller: attest.CallerOf(identity("1")), Results: []attest.RuleResult{}, Evidence: []attest.EvidenceRef{}, DecidedAt: attest.Time(s.now),
		},
		Replaces: replaces, ResourceURI: "oci://" + string(repo), Target: string(repo) + ":" + stage, Level: 2,
	})
	return ledger.Entry{Envelope: s.sign(nil, payload, err)}
}

func (s *issuer) effect(n int, promotion attest.RecordID, stage, state string) ledger.Entry {
	s.tb.Helper()
	payload, err := attest.EffectStatement(image(n).Ref, attest.Effect{Promotion: promotion, State: state, Track: "payments", Stage: stage, Detail: "the registry said no", At: attest.Time(s.now)})
	return ledger.Entry{Envelope: s.sign(nil, payload, err)}
}

// kit is a ledger in a directory, with the keys that sign for it.
type kit struct {
	*issuer
	tb  testing.TB
	cfg ledger.Config
}

func newKit(tb testing.TB) *kit {
	tb.Helper()
	k := &kit{issuer: newIssuer(tb), tb: tb}
	k.cfg = ledger.Config{Dir: filepath.Join(tb.TempDir(), "data"), Origin: origin, LogKey: k.log, CheckInterval: 20 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)}
	if err := ledger.Init(tb.Context(), k.cfg); err != nil {
		tb.Fatal(err)
	}
	return k
}

func (k *kit) open() *ledger.Ledger {
	k.tb.Helper()
	l, err := ledger.Open(k.tb.Context(), k.cfg)
	if err != nil {
		k.tb.Fatal(err)
	}
	k.tb.Cleanup(func() {
		if err := l.Close(context.Background()); err != nil {
			k.tb.Error(err)
		}
	})
	return l
}

func (k *kit) close(l *ledger.Ledger) {
	k.tb.Helper()
	if err := l.Close(k.tb.Context()); err != nil {
		k.tb.Fatal(err)
	}
}

// fsck closes the ledger and expects it to be whole.
func (k *kit) fsck(l *ledger.Ledger) ledger.Report {
	k.tb.Helper()
	if l != nil {
		k.close(l)
	}
	r, err := ledger.Fsck(k.tb.Context(), k.cfg)
	if err != nil {
		k.tb.Fatal(err)
	}
	for _, p := range r.Problems {
		k.tb.Errorf("fsck: %s", p)
	}
	return r
}

func (k *kit) append(l *ledger.Ledger, entries ...ledger.Entry) []attest.Record {
	k.tb.Helper()
	out, err := l.Append(k.tb.Context(), entries...)
	if err != nil {
		k.tb.Fatal(err)
	}
	return out
}

// sql changes rows of the database behind the ledger's back.
func (k *kit) sql(statement string, args ...any) {
	k.tb.Helper()
	if k.sqlAny(statement, args...) == 0 {
		k.tb.Fatalf("%s changed nothing", statement)
	}
}

func (k *kit) sqlAny(statement string, args ...any) int64 {
	k.tb.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(k.cfg.Dir, "hallmark.db")+"?_pragma=busy_timeout(10000)")
	if err != nil {
		k.tb.Fatal(err)
	}
	defer db.Close()
	r, err := db.ExecContext(k.tb.Context(), statement, args...)
	if err != nil {
		k.tb.Fatal(err)
	}
	n, err := r.RowsAffected()
	if err != nil {
		k.tb.Fatal(err)
	}
	return n
}

// await waits until the ledger's trouble has the given reason; "" is none.
func await(tb testing.TB, l *ledger.Ledger, want attest.Reason) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for attest.ReasonOf(l.Err()) != want {
		select {
		case <-tick.C:
		case <-ctx.Done():
			tb.Fatalf("the ledger's trouble stays %v, want reason %q", l.Err(), want)
		}
	}
}

func wantReason(tb testing.TB, what string, err error, want attest.Reason) {
	tb.Helper()
	if got := attest.ReasonOf(err); got != want {
		tb.Errorf("%s: %v: reason %q, want %q", what, err, got, want)
	}
}
