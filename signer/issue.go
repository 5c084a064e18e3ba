package signer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"
	"unicode/utf8"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/sigstore/fulcio/pkg/certificate"
	"github.com/sigstore/sigstore/pkg/cryptoutils"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	certificateLifetime = 10 * time.Minute
	// certificateBackdated keeps the timestamp, which has whole seconds, inside.
	certificateBackdated = 5 * time.Second
	// reuseMargin is the least that must remain of a certificate for its key to
	// be handed out again.
	reuseMargin = time.Minute
	// maxCertificate bounds what a caller's claims can make of a certificate: a
	// log entry must stay under 64 KiB (attacks F13).
	maxCertificate = 16 << 10
)

var (
	oidPoison = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 3} // RFC 6962 section 3.1
	oidSCT    = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2} // RFC 6962 section 3.3
)

// Credential is a key that signs in the name of one identity for a few minutes.
// The key exists in this process's memory only.
type Credential struct {
	Certificate []byte // DER of the leaf, with its SCT
	// Precertificate is what the SCT promises to log. It must be durable in the
	// ledger before Certificate or any signature by it leaves the process.
	Precertificate attest.Envelope
	NotAfter       time.Time // the end of Certificate

	notBefore time.Time

	mu  sync.RWMutex
	key *ecdsa.PrivateKey // nil once wiped
}

// Credential returns the credential of id, made at the first call for its token
// and reused until a minute before its certificate ends. Concurrent calls make
// one. A token never gets another token's key (attacks B13).
func (s *Signer) Credential(id attest.Identity) (*Credential, error) {
	if err := s.mayCertify(id); err != nil {
		return nil, err
	}
	key, err := credentialKey(id)
	if err != nil {
		return nil, err
	}
	c, err, _ := s.issuing.Do(key, func() (any, error) {
		if c, err := s.cached(key); c != nil || err != nil {
			return c, err
		}
		c, err := s.issue(id)
		if err != nil {
			return nil, err
		}
		return c, s.keep(key, c)
	})
	if err != nil {
		return nil, err
	}
	return c.(*Credential), nil
}

// mayCertify refuses identities without a name, and those that take the gate's:
// no issuer's claims may ever make somebody the gate.
func (s *Signer) mayCertify(id attest.Identity) error {
	if id.TokenID == "" || id.Issuer == "" || id.SAN == "" {
		return attest.Errorf(attest.TokenClaims, "the identity has no token, issuer or name to certify")
	}
	gate := attest.GateIdentity(s.service)
	isGate := id.Kind == attest.Service && id.SAN == gate.SAN && id.Issuer == gate.Issuer && id.TokenID == gate.TokenID && id.Build == attest.Build{}
	if takesGate := id.Kind == attest.Service || id.SAN == gate.SAN || id.Issuer == gate.Issuer; takesGate && !isGate {
		return attest.Errorf(attest.IssuerNotAllowed, "an identity of issuer %q may not bear a name of this service", id.Issuer)
	}
	return nil
}

// credentialKey names the token and all that its certificate will say, so that
// an issuer that repeats token ids cannot mix two jobs up.
func credentialKey(id attest.Identity) (string, error) {
	build, err := json.Marshal(id.Build)
	if err != nil {
		return "", fmt.Errorf("naming the credential: %w", err)
	}
	return attest.Key(id.TokenID, id.Issuer, id.Subject, id.SAN, id.Provider, string(id.Kind), string(build)), nil
}

// cached returns the credential under key when enough of it remains, else nil.
func (s *Signer) cached(key string) (*Credential, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed()
	}
	c, ok := s.credentials.Get(key)
	if !ok {
		return nil, nil
	}
	now := s.now()
	if now.Before(c.notBefore) || now.Add(reuseMargin).After(c.NotAfter) {
		s.credentials.Remove(key) // a call may still be using its key: left to it
		return nil, nil
	}
	return c, nil
}

func (s *Signer) keep(key string, c *Credential) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.wipe()
		return errClosed()
	}
	s.credentials.Add(key, c)
	return nil
}

// issue makes a key and certifies it: precertificate, SCT over it, certificate
// with the SCT (RFC 6962 section 3).
func (s *Signer) issue(id attest.Identity) (*Credential, error) {
	// 1. A fresh key.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	template, err := s.template(id, key.Public())
	if err != nil {
		return nil, err
	}
	extensions := template.ExtraExtensions
	// 2. The precertificate: the certificate with a critical extension that no
	// verifier accepts.
	template.ExtraExtensions = append(extensions[:len(extensions):len(extensions)], pkix.Extension{Id: oidPoison, Critical: true, Value: asn1.NullBytes})
	pre, err := x509.CreateCertificate(rand.Reader, template, s.ca, key.Public(), s.intermediate)
	if err != nil {
		return nil, attest.Errorf(attest.TokenClaims, "the identity's claims do not fit a certificate: %w", err)
	}
	if len(pre) > maxCertificate {
		return nil, attest.Errorf(attest.TokenClaims, "the identity's claims are too long for a certificate")
	}
	logged, err := s.precertificate(pre)
	if err != nil {
		return nil, err
	}
	// 3. The promise to log it.
	sct, err := s.sct(pre)
	if err != nil {
		return nil, err
	}
	// 4. The same certificate with the promise instead of the poison.
	template.ExtraExtensions = append(extensions[:len(extensions):len(extensions)], sct)
	cert, err := x509.CreateCertificate(rand.Reader, template, s.ca, key.Public(), s.intermediate)
	if err != nil {
		return nil, fmt.Errorf("signing certificate: %w", err)
	}
	return &Credential{
		Certificate: cert, Precertificate: logged,
		NotAfter: template.NotAfter, notBefore: template.NotBefore, key: key,
	}, nil
}

// template is the certificate without poison and SCT (trust-formats 2.5). Its
// subject is empty, which makes the alternative name critical.
func (s *Signer) template(id attest.Identity, key crypto.PublicKey) (*x509.Certificate, error) {
	san, err := url.Parse(id.SAN)
	if err != nil || san.String() != id.SAN || san.Scheme == "" {
		return nil, attest.Errorf(attest.TokenClaims, "the identity's name is not a URI that a certificate can carry")
	}
	extensions, err := renderExtensions(id)
	if err != nil {
		return nil, attest.Errorf(attest.TokenClaims, "the identity's claims do not fit a certificate: %w", err)
	}
	serial, err := cryptoutils.GenerateSerialNumber()
	if err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	ski, err := cryptoutils.SKID(key)
	if err != nil {
		return nil, fmt.Errorf("naming the key: %w", err)
	}
	from := s.now().UTC().Truncate(time.Second).Add(-certificateBackdated)
	return &x509.Certificate{
		SerialNumber: serial, NotBefore: from, NotAfter: from.Add(certificateLifetime),
		URIs: []*url.URL{san}, SubjectKeyId: ski,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		ExtraExtensions: extensions,
	}, nil
}

// renderExtensions states what is known of id in Fulcio's extensions (fulcio
// docs/oid-info.md). Empty values are left out.
func renderExtensions(id attest.Identity) ([]pkix.Extension, error) {
	b := id.Build
	// encoding/asn1 writes any bytes as UTF8String.
	if !utf8.ValidString(fmt.Sprint(id.Issuer, id.Subject, b)) {
		return nil, errors.New("a claim is not valid UTF-8")
	}
	ext := certificate.Extensions{
		Issuer:         id.Issuer,
		BuildSignerURI: b.SignerURI, BuildSignerDigest: b.SignerDigest, RunnerEnvironment: b.Runner,
		SourceRepositoryURI: b.SourceURI, SourceRepositoryDigest: b.Commit, SourceRepositoryRef: b.Ref,
		SourceRepositoryIdentifier: b.RepositoryID, SourceRepositoryOwnerURI: b.OwnerURI, SourceRepositoryOwnerIdentifier: b.OwnerID,
		BuildConfigURI: b.ConfigURI, BuildConfigDigest: b.ConfigDigest, BuildTrigger: b.Event, RunInvocationURI: b.RunURI,
		SourceRepositoryVisibilityAtSigning: b.Visibility, DeploymentEnvironment: b.Environment,
	}
	// A person's subject stays out of a certificate, which is logged for ever.
	if id.Kind == attest.Workload {
		ext.Subject = id.Subject
	}
	if id.Provider == "github" { // for cosign --certificate-github-workflow-*
		ext.GithubWorkflowTrigger, ext.GithubWorkflowSHA, ext.GithubWorkflowName = b.Event, b.Commit, b.WorkflowName
		ext.GithubWorkflowRepository, ext.GithubWorkflowRef = b.Repository, b.Ref
	}
	return ext.Render()
}

// precertificate wraps a precertificate for the ledger, signed by the authority
// that issued it.
func (s *Signer) precertificate(der []byte) (attest.Envelope, error) {
	e := attest.Envelope{PayloadType: attest.PrecertificatePayload, Payload: der, PublicKey: s.caKey}
	signed := e.Signed()
	sig, err := s.intermediate.Sign(rand.Reader, signed[:], crypto.SHA256)
	if err != nil {
		return attest.Envelope{}, fmt.Errorf("signing precertificate: %w", err)
	}
	e.Signature = sig
	return e, nil
}

// sct returns the SCT list extension with one SCT over the precertificate.
func (s *Signer) sct(pre []byte) (pkix.Extension, error) {
	parsed, err := x509.ParseCertificate(pre)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("parsing precertificate: %w", err)
	}
	tbs, err := ctx509.RemoveCTPoison(parsed.RawTBSCertificate)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("reading precertificate: %w", err)
	}
	sct := ct.SignedCertificateTimestamp{SCTVersion: ct.V1, LogID: ct.LogID{KeyID: s.ctID}, Timestamp: uint64(s.now().UnixMilli())}
	entry := ct.LogEntry{Leaf: ct.MerkleTreeLeaf{
		Version: ct.V1, LeafType: ct.TimestampedEntryLeafType,
		TimestampedEntry: &ct.TimestampedEntry{
			EntryType: ct.PrecertLogEntryType, Timestamp: sct.Timestamp,
			PrecertEntry: &ct.PreCert{IssuerKeyHash: sha256.Sum256(s.caKey), TBSCertificate: tbs},
		},
	}}
	input, err := ct.SerializeSCTSignatureInput(sct, entry)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("serialising SCT: %w", err)
	}
	digest := sha256.Sum256(input)
	sct.Signature.Algorithm = tls.SignatureAndHashAlgorithm{Hash: tls.SHA256, Signature: tls.ECDSA}
	if sct.Signature.Signature, err = s.ct.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		return pkix.Extension{}, fmt.Errorf("signing SCT: %w", err)
	}
	return sctExtension(sct)
}

func sctExtension(sct ct.SignedCertificateTimestamp) (pkix.Extension, error) {
	one, err := tls.Marshal(sct)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("serialising SCT: %w", err)
	}
	list, err := tls.Marshal(ctx509.SignedCertificateTimestampList{SCTList: []ctx509.SerializedSCT{{Val: one}}})
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("serialising SCT list: %w", err)
	}
	value, err := asn1.Marshal(list)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("serialising SCT list: %w", err)
	}
	return pkix.Extension{Id: oidSCT, Value: value}, nil
}

// wipe waits for signatures under way and forgets the key. The runtime may hold
// copies, so this is the best that can be done, not a guarantee.
func (c *Credential) wipe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.key == nil {
		return
	}
	//lint:ignore SA1019 the key is not used after its value is gone
	clear(c.key.D.Bits())
	c.key = nil
}
