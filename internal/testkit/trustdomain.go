package testkit

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/identity"
)

// TrustDomain is a SPIFFE trust domain that issues X.509-SVIDs, with its bundle in
// a file.
type TrustDomain struct {
	t          testing.TB
	Name       string
	BundleFile string

	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// NewTrustDomain returns one with an authority that is valid from now for a day.
func NewTrustDomain(t testing.TB, name string) *TrustDomain {
	t.Helper()
	d := &TrustDomain{t: t, Name: name, BundleFile: filepath.Join(t.TempDir(), "bundle.json")}
	d.Renew()
	return d
}

// Renew replaces the authority and the bundle: what it issued before counts no more.
func (d *TrustDomain) Renew() {
	t := d.t
	t.Helper()
	d.key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)))(t),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: d.Name}},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, d.key.Public(), d.key))(t)
	d.cert = must(x509.ParseCertificate(der))(t)
	point := must(d.key.PublicKey.Bytes())(t)
	b64 := base64.RawURLEncoding.EncodeToString
	bundle := must(json.Marshal(map[string]any{"keys": []any{map[string]any{
		"kty": "EC", "crv": "P-256", "use": "x509-svid", "x": b64(point[1:33]), "y": b64(point[33:]),
		"x5c": []string{base64.StdEncoding.EncodeToString(der)},
	}}}))(t)
	check(t, os.WriteFile(d.BundleFile+".new", bundle, 0o600))
	check(t, os.Rename(d.BundleFile+".new", d.BundleFile))
}

// Issuer returns the entry "mesh" of the configuration that believes it.
func (d *TrustDomain) Issuer() identity.Issuer {
	return identity.Issuer{
		Name: "mesh", Provider: "spiffe", Issuer: "spiffe://" + d.Name, TrustDomain: d.Name, BundleFile: d.BundleFile, X509SVID: true,
	}
}

// SVID issues the X.509-SVID of the workload at path ("/ci") for an hour.
func (d *TrustDomain) SVID(path string) tls.Certificate {
	t := d.t
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)))(t),
		NotBefore:    time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: d.Name, Path: path}},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, d.cert, key.Public(), d.key))(t)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// WriteSVID writes a certificate and its key as PEM files.
func WriteSVID(t testing.TB, svid tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid.key")
	pkcs8 := must(x509.MarshalPKCS8PrivateKey(svid.PrivateKey))(t)
	check(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.Certificate[0]}), 0o600))
	check(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	return certFile, keyFile
}
