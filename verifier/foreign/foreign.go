// Package foreign verifies signatures and attestations that were made elsewhere,
// under trust roots that the operator has configured. It reads files when it is
// opened and nothing after that: no update of a root, no lookup in a log, no clock.
// What was signed by whom it reports; whose word counts is for policies.
package foreign

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/hallmarkd/hallmark/attest"
)

// MaxContent bounds one piece of evidence in bytes: what a record can hold.
const MaxContent = attest.MaxPredicate

const (
	maxFile  = 1 << 20 // bytes of a root's file
	maxRoots = 32
)

// Whether evidence under a root must be in a log.
const (
	Required = "required" // the default
	None     = "none"     // the root's service runs none, or it does not matter
)

// Root is a configured foreign root: either a service's trusted_root.json or one
// long-lived public key.
type Root struct {
	Name        string // lower-case letters, digits and -; what policies call it
	TrustedRoot string // path of a Sigstore trusted_root.json
	Key         string // path of a public key in PEM
	// Log says whether evidence needs an entry in a transparency log of the
	// trusted root. With None a signed timestamp must prove when it was signed.
	Log string
	// CertificateLog says whether certificates need a proof that a certificate
	// log of the trusted root has them (SCT).
	CertificateLog string
}

// Description is a root as it was opened.
type Description struct {
	Name           string        `json:"name"`
	Kind           string        `json:"kind"` // trusted_root, key
	Log            string        `json:"log,omitempty"`
	CertificateLog string        `json:"certificate_log,omitempty"`
	Digest         attest.Digest `json:"sha256"` // of the file
}

// Roots verifies against the configured roots, in their order. It is safe for
// concurrent use. A nil *Roots has no root and vouches for nothing.
type Roots struct{ all []*trusted }

// trusted is an opened root.
type trusted struct {
	Description
	material root.TrustedMaterial
	bundles  *verify.Verifier
	key      signature.Verifier // nil of a trusted_root.json
	keyID    string             // hex SHA-256 of the key's PKIX DER
}

var namePattern = regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`)

// Open reads the roots' files. It answers BAD_CONFIG for a root under which nothing
// could ever be verified, or anything at all: a weak key, no authority.
func Open(roots []Root) (*Roots, error) {
	if len(roots) > maxRoots {
		return nil, attest.Errorf(attest.BadConfig, "foreign_roots: %d roots; at most %d", len(roots), maxRoots)
	}
	out := &Roots{}
	for _, r := range roots {
		if !namePattern.MatchString(r.Name) {
			return nil, attest.Errorf(attest.BadConfig, "foreign_roots: name %q must be lower-case letters, digits and -, start with a letter, and be at most 63 long", r.Name)
		}
		if slices.Contains(out.Names(), r.Name) {
			return nil, attest.Errorf(attest.BadConfig, "foreign_roots: name %q stands twice", r.Name)
		}
		t, err := open(r)
		if err != nil {
			return nil, attest.Errorf(attest.BadConfig, "foreign_roots: %s: %w", r.Name, err)
		}
		out.all = append(out.all, t)
	}
	return out, nil
}

func open(r Root) (*trusted, error) {
	if (r.TrustedRoot == "") == (r.Key == "") {
		return nil, fmt.Errorf("give either trusted_root or key")
	}
	path := r.TrustedRoot + r.Key
	text, err := read(path)
	if err != nil {
		return nil, err
	}
	t := &trusted{Description: Description{Name: r.Name, Digest: attest.Hash(text)}}
	if r.Key != "" {
		if r.Log != "" || r.CertificateLog != "" {
			return nil, fmt.Errorf("log and certificate_log are for a trusted_root: with a key there is no log to check against")
		}
		err = t.readKey(text)
	} else {
		err = t.readRoot(text, r)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return t, nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", filepath.Base(path), maxFile)
	}
	return text, err
}

// readKey makes a root of one public key. cosign signs with SHA-256 whatever the
// curve, so that is what is verified.
func (t *trusted) readKey(text []byte) error {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return fmt.Errorf("not exactly one PEM block of type PUBLIC KEY")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return fmt.Errorf("reading the public key: %w", err)
	}
	if err := strong(public); err != nil {
		return err
	}
	if t.key, err = signature.LoadVerifier(public, crypto.SHA256); err != nil {
		return fmt.Errorf("using the public key: %w", err)
	}
	sum := sha256.Sum256(block.Bytes)
	t.Kind, t.keyID = "key", hex.EncodeToString(sum[:])
	always := root.NewExpiringKey(t.key, time.Time{}, time.Time{})
	// The hint in a bundle is its maker's; there is one key, and it decides.
	t.material = root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) { return always, nil })
	t.bundles, err = verify.NewVerifier(t.material, verify.WithNoObserverTimestamps(), verify.WithoutStatementPredicate())
	return err
}

// strong refuses keys that are too short or of an unusual kind (attacks H06).
func strong(public crypto.PublicKey) error {
	//lint:ignore SA1019 it says which sizes and curves Sigstore admits, and no successor does
	if err := cryptoutils.ValidatePubKey(public); err != nil {
		return fmt.Errorf("the key is too weak or of an unknown kind: %w", err)
	}
	return nil
}

// readRoot makes a root of a trusted_root.json.
func (t *trusted) readRoot(text []byte, r Root) error {
	tr, err := root.NewTrustedRootFromJSON(text)
	if err != nil {
		return fmt.Errorf("reading the trusted root: %w", err)
	}
	t.Kind, t.material = "trusted_root", tr
	if t.Log, err = setting("log", r.Log); err != nil {
		return err
	}
	if t.CertificateLog, err = setting("certificate_log", r.CertificateLog); err != nil {
		return err
	}
	switch {
	case len(tr.FulcioCertificateAuthorities()) == 0:
		return fmt.Errorf("it names no certificate authority")
	case t.Log == Required && len(tr.RekorLogs()) == 0:
		return fmt.Errorf("it names no transparency log: say log: none to do with signed timestamps")
	case t.Log == None && len(tr.TimestampingAuthorities()) == 0:
		return fmt.Errorf("log: none needs a timestamp authority, and it names none: nothing would prove when something was signed")
	case t.CertificateLog == Required && len(tr.CTLogs()) == 0:
		return fmt.Errorf("it names no certificate log: say certificate_log: none if its authority keeps none")
	}
	if err := authorities(tr); err != nil {
		return err
	}
	// One proof of the time at least, by a timestamp or by the log.
	opts := []verify.VerifierOption{verify.WithoutStatementPredicate()}
	if t.Log == Required {
		opts = append(opts, verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1))
	} else {
		opts = append(opts, verify.WithSignedTimestamps(1))
	}
	if t.CertificateLog == Required {
		opts = append(opts, verify.WithSignedCertificateTimestamps(1))
	}
	t.bundles, err = verify.NewVerifier(tr, opts...)
	return err
}

func setting(key, value string) (string, error) {
	switch value {
	case "":
		return Required, nil
	case Required, None:
		return value, nil
	}
	return "", fmt.Errorf("%s: %q is neither %s nor %s", key, value, Required, None)
}

// authorities refuses a trusted root with a weak key in it.
func authorities(tr *root.TrustedRoot) error {
	var keys []crypto.PublicKey
	for _, ca := range tr.FulcioCertificateAuthorities() {
		if f, ok := ca.(*root.FulcioCertificateAuthority); ok {
			for _, c := range append([]*x509.Certificate{f.Root}, f.Intermediates...) {
				keys = append(keys, c.PublicKey)
			}
		}
	}
	for _, tsa := range tr.TimestampingAuthorities() {
		if s, ok := tsa.(*root.SigstoreTimestampingAuthority); ok {
			for _, c := range append([]*x509.Certificate{s.Root, s.Leaf}, s.Intermediates...) {
				if c != nil {
					keys = append(keys, c.PublicKey)
				}
			}
		}
	}
	for _, logs := range []map[string]*root.TransparencyLog{tr.RekorLogs(), tr.CTLogs()} {
		for _, l := range logs {
			keys = append(keys, l.PublicKey)
		}
	}
	for _, k := range keys {
		if err := strong(k); err != nil {
			return err
		}
	}
	return nil
}

// Names returns the names of the roots in their order.
func (r *Roots) Names() []string {
	var out []string
	for _, d := range r.Describe() {
		out = append(out, d.Name)
	}
	return out
}

// Describe returns the roots in their order, for the record of the configuration.
func (r *Roots) Describe() []Description {
	if r == nil {
		return nil
	}
	var out []Description
	for _, t := range r.all {
		out = append(out, t.Description)
	}
	return out
}

// Verify checks a piece of evidence about the image want, of a form that attest
// names, and returns what it is: by whom, under the first root that vouches for it.
// ImportedAt and Importer are left to the caller. What no root vouches for is
// FOREIGN_ROOT_MISMATCH; what is malformed or about another image has the reason of
// that, whoever signed it. A panic in a library is a refusal (attacks C13, C22).
func (r *Roots) Verify(ctx context.Context, form string, content []byte, want attest.Digest) (out attest.Import, err error) {
	defer func() {
		if p := recover(); p != nil {
			out, err = attest.Import{}, attest.Errorf(attest.BundleMalformed, "the evidence could not be read at all: %v", p)
		}
	}()
	// 1. Bounds, before anything is parsed (attacks C03, C23).
	if want.IsZero() {
		return out, attest.Errorf(attest.BadDigest, "no digest was given to verify")
	}
	if len(content) > MaxContent {
		return out, attest.Errorf(attest.TooLarge, "it has %d bytes, more than %d", len(content), MaxContent)
	}
	// 2. Its form, and that it claims to be about the image. Nothing is believed yet.
	e, err := parse(form, content, want)
	if err != nil {
		return out, err
	}
	// 3. Whether a root vouches for it.
	why := []string{"no foreign root is configured"}
	if r != nil && len(r.all) > 0 {
		why = nil
		for _, t := range r.all {
			signer, at, err := t.vouches(ctx, e, want)
			if err != nil {
				why = append(why, t.Name+": "+clip(err.Error()))
				continue
			}
			out = attest.Import{
				Root: t.Name, RootDigest: t.Digest, Form: form, Digest: attest.Hash(content), Content: content,
				Signer: signer, PredicateType: e.predicateType,
			}
			if !at.IsZero() {
				out.SignedAt = attest.Time(at)
			}
			return out, nil
		}
	}
	return out, attest.Errorf(attest.RootMismatch, "no configured foreign root vouches for it: %s", strings.Join(why, "; "))
}

// vouches is nil when the evidence verifies under the root, and then says who signed
// and when that is proved to have been, zero if it is not. A panic under one root is
// a refusal under this one.
func (t *trusted) vouches(ctx context.Context, e *evidence, want attest.Digest) (who attest.Foreigner, at time.Time, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("it could not be read at all: %v", p)
		}
	}()
	if e.bundle != nil {
		return t.bundle(e, want)
	}
	return t.legacy(ctx, e, want)
}

// clip bounds and cleans what an error repeats of a library's words, which repeat
// what somebody else wrote.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, s)
	if len(s) > 300 {
		return s[:300] + "..."
	}
	return s
}
