package signer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	commonpb "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rootpb "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hallmarkd/hallmark/attest"
)

// Files in Config.Dir. Keys are PKCS#8 PEM.
const (
	keyRoot         = "root.key" // signs intermediate and TSA certificates; not opened to serve
	keyIntermediate = "intermediate.key"
	keyTSA          = "tsa.key"
	keyCT           = "ct.key"
	keyLog          = "log.key"
	keyGate         = "gate.key"
	trustedRootFile = "trusted_root.json"
	gateKeyFile     = "gate.pub"
)

const (
	trustedRootMediaType = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"

	rootLifetime = 20 * 365 * 24 * time.Hour
	caLifetime   = 10 * 365 * 24 * time.Hour
	// backdated is how long before Init everything is valid: timestamps have
	// whole seconds and clocks differ.
	backdated = time.Hour
)

// Init makes the keys, their certificates and the trust root in cfg.Dir, which
// must not exist or be empty (else ALREADY_INITIALISED). A crash leaves either
// all of it or nothing that Open accepts.
//
// root.key is needed only to sign a new intermediate or TSA certificate. The
// service never opens it: move it off this machine.
func Init(cfg Config) error {
	origin, err := originOf(cfg.Service)
	if err != nil {
		return err
	}
	// 1. Refuse to replace keys: whatever they have signed would be orphaned.
	if entries, err := os.ReadDir(cfg.Dir); err == nil && len(entries) > 0 {
		return attest.Errorf(attest.AlreadyExists, "%s already holds keys: they are made once. Give an empty directory", cfg.Dir)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking for keys: %w", err)
	}
	// 2. Write everything beside the final place.
	parent := filepath.Dir(filepath.Clean(cfg.Dir))
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return fmt.Errorf("making the directory of keys: %w", err)
	}
	tmp, err := os.MkdirTemp(parent, ".keys-*") // mode 0700
	if err != nil {
		return fmt.Errorf("making the directory of keys: %w", err)
	}
	defer os.RemoveAll(tmp) // gone by then when all went well
	root, err := create(tmp, cfg.Service, origin, cfg.now()().UTC().Truncate(time.Second))
	if err != nil {
		return fmt.Errorf("making keys: %w", err)
	}
	if err := syncDir(tmp); err != nil {
		return fmt.Errorf("making keys durable: %w", err)
	}
	// If the process dies here, the keys are in a directory that nobody opens.
	// 3. Move it into place at once. Remove takes an empty directory only.
	if err := os.Remove(cfg.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("putting keys into place: %w", err)
	}
	if err := os.Rename(tmp, cfg.Dir); err != nil {
		return fmt.Errorf("putting keys into place: %w", err)
	}
	if err := syncDir(parent); err != nil {
		return fmt.Errorf("making keys durable: %w", err)
	}
	if cfg.Logger != nil {
		cfg.Logger.Info("keys created; move the root key offline, serving does not need it",
			"dir", cfg.Dir, "root_key", keyRoot, "trust_root_sha256", fingerprint(root))
	}
	return nil
}

// create writes all files into dir and returns the trust root.
func create(dir, service, origin string, now time.Time) ([]byte, error) {
	keys := map[string]*ecdsa.PrivateKey{}
	for _, name := range []string{keyRoot, keyIntermediate, keyTSA, keyCT, keyLog, keyGate} {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if err := writeKey(dir, name, k); err != nil {
			return nil, err
		}
		keys[name] = k
	}
	certs, err := certify(keys, origin, now.Add(-backdated))
	if err != nil {
		return nil, err
	}
	root, err := trustedRoot(service, origin, now.Add(-backdated), certs, keys[keyLog].Public(), keys[keyCT].Public())
	if err != nil {
		return nil, err
	}
	gate, err := x509.MarshalPKIXPublicKey(keys[keyGate].Public())
	if err != nil {
		return nil, err
	}
	if err := writeFile(filepath.Join(dir, gateKeyFile), publicPEM(gate), 0o644); err != nil {
		return nil, err
	}
	return root, writeFile(filepath.Join(dir, trustedRootFile), root, 0o644)
}

type certificates struct{ root, intermediate, tsa []byte } // DER

// certify makes the three certificates that do not change (trust-formats 2.5).
func certify(keys map[string]*ecdsa.PrivateKey, origin string, from time.Time) (c certificates, err error) {
	name := func(cn string) pkix.Name { return pkix.Name{Organization: []string{origin}, CommonName: cn} }
	root := &x509.Certificate{
		Subject: name("Hallmark root"), NotBefore: from, NotAfter: from.Add(rootLifetime),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1,
	}
	if c.root, err = sign(root, root, keys[keyRoot], keys[keyRoot]); err != nil {
		return c, err
	}
	if root, err = x509.ParseCertificate(c.root); err != nil {
		return c, err
	}
	// The intermediate may certify code signers only, so that it can never make
	// itself a timestamp authority.
	intermediate := &x509.Certificate{
		Subject: name("Hallmark intermediate"), NotBefore: from, NotAfter: from.Add(caLifetime),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	if c.intermediate, err = sign(intermediate, root, keys[keyIntermediate], keys[keyRoot]); err != nil {
		return c, err
	}
	// RFC 3161 section 2.3: the extended key usage is critical and the only one.
	usage, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	if err != nil {
		return c, err
	}
	tsa := &x509.Certificate{
		Subject: name("Hallmark timestamps"), NotBefore: from, NotAfter: from.Add(caLifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: usage}},
	}
	c.tsa, err = sign(tsa, root, keys[keyTSA], keys[keyRoot])
	return c, err
}

func sign(template, parent *x509.Certificate, key, by *ecdsa.PrivateKey) ([]byte, error) {
	var err error
	if template.SerialNumber, err = cryptoutils.GenerateSerialNumber(); err != nil {
		return nil, err
	}
	if template.SubjectKeyId, err = cryptoutils.SKID(key.Public()); err != nil {
		return nil, err
	}
	return x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
}

// trustedRoot returns the document that stock tools take as --trusted-root
// (trust-formats 2.4). The authorities' uri holds the service's public_url.
func trustedRoot(service, origin string, from time.Time, c certificates, logKey, ctKey crypto.PublicKey) ([]byte, error) {
	host := origin
	if strings.Contains(host, ":") {
		host = "[" + host + "]" // an IPv6 address
	}
	validFor := &commonpb.TimeRange{Start: timestamppb.New(from)}
	instance := func(key crypto.PublicKey) (*rootpb.TransparencyLogInstance, error) {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, err
		}
		id := sha256.Sum256(der)
		return &rootpb.TransparencyLogInstance{
			BaseUrl: "https://" + host, HashAlgorithm: commonpb.HashAlgorithm_SHA2_256,
			PublicKey: &commonpb.PublicKey{RawBytes: der, KeyDetails: commonpb.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256, ValidFor: validFor},
			LogId:     &commonpb.LogId{KeyId: id[:]},
		}, nil
	}
	authority := func(name string, chain ...[]byte) *rootpb.CertificateAuthority {
		a := &rootpb.CertificateAuthority{
			Subject: &commonpb.DistinguishedName{Organization: origin, CommonName: name}, Uri: service,
			CertChain: &commonpb.X509CertificateChain{}, ValidFor: validFor,
		}
		for _, der := range chain {
			a.CertChain.Certificates = append(a.CertChain.Certificates, &commonpb.X509Certificate{RawBytes: der})
		}
		return a
	}
	tlog, err := instance(logKey)
	if err != nil {
		return nil, err
	}
	ctlog, err := instance(ctKey)
	if err != nil {
		return nil, err
	}
	raw, err := protojson.Marshal(&rootpb.TrustedRoot{
		MediaType: trustedRootMediaType, Tlogs: []*rootpb.TransparencyLogInstance{tlog}, Ctlogs: []*rootpb.TransparencyLogInstance{ctlog},
		CertificateAuthorities: []*rootpb.CertificateAuthority{authority("Hallmark intermediate", c.intermediate, c.root)},
		TimestampAuthorities:   []*rootpb.CertificateAuthority{authority("Hallmark timestamps", c.tsa, c.root)},
	})
	if err != nil {
		return nil, err
	}
	// Written once and pinned by its hash, so the layout may as well be readable.
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// published is what the trust root says about the keys.
type published struct {
	service           string
	intermediate, tsa *x509.Certificate
	ct, log, logID    []byte // PKIX DER of the keys, and the log's id
}

func parseTrustedRoot(raw []byte) (published, error) {
	var tr rootpb.TrustedRoot
	if err := protojson.Unmarshal(raw, &tr); err != nil {
		return published{}, attest.Errorf(attest.BadConfig, "reading %s: %w", trustedRootFile, err)
	}
	cas, tsas := tr.GetCertificateAuthorities(), tr.GetTimestampAuthorities()
	if len(tr.GetTlogs()) != 1 || len(tr.GetCtlogs()) != 1 || len(cas) != 1 || len(tsas) != 1 ||
		len(cas[0].GetCertChain().GetCertificates()) != 2 || len(tsas[0].GetCertChain().GetCertificates()) != 2 {
		return published{}, attest.Errorf(attest.BadConfig, "%s is not one that init wrote: restore it from a backup", trustedRootFile)
	}
	p := published{
		service: cas[0].GetUri(),
		ct:      tr.Ctlogs[0].GetPublicKey().GetRawBytes(),
		log:     tr.Tlogs[0].GetPublicKey().GetRawBytes(),
		logID:   tr.Tlogs[0].GetLogId().GetKeyId(),
	}
	var err error
	if p.intermediate, err = x509.ParseCertificate(cas[0].CertChain.Certificates[0].GetRawBytes()); err != nil {
		return published{}, attest.Errorf(attest.BadConfig, "reading the intermediate certificate in %s: %w", trustedRootFile, err)
	}
	if p.tsa, err = x509.ParseCertificate(tsas[0].CertChain.Certificates[0].GetRawBytes()); err != nil {
		return published{}, attest.Errorf(attest.BadConfig, "reading the timestamp certificate in %s: %w", trustedRootFile, err)
	}
	return p, nil
}

func readPublic(dir, name string) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, attest.Errorf(attest.NotInitialised, "there is no %s in %s: run hallmarkd init, or restore it from a backup", name, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("reading what was published: %w", err)
	}
	return raw, nil
}

// maxKeyFile is far more than the PEM of a P-256 key.
const maxKeyFile = 4 << 10

// readKey reads one key after it has made sure that only the file's owner can.
func readKey(dir, name string) (crypto.Signer, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, attest.Errorf(attest.NotInitialised, "%s is missing in %s: restore it from a backup", name, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("opening key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat() // of what was opened: the name may be changed meanwhile
	if err != nil {
		return nil, fmt.Errorf("reading key permissions: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, attest.Errorf(attest.KeyPermissions, "%s in %s has mode %04o: others can use the key. Make it 0600, and replace the keys if anybody could have read it",
			name, dir, info.Mode().Perm())
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("reading key: %w", err)
	}
	return parseKey(name, raw)
}

// parseKey never repeats what it read.
func parseKey(name string, raw []byte) (crypto.Signer, error) {
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, attest.Errorf(attest.BadConfig, "%s is not one PEM block of type PRIVATE KEY (PKCS#8)", name)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "%s does not hold a PKCS#8 key", name)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, attest.Errorf(attest.BadConfig, "%s is not an ECDSA P-256 key", name)
	}
	return ec, nil
}

func writeKey(dir, name string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func writeFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func publicPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}
