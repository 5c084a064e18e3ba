package identity_test

import (
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

// strangers makes authorities with one name and one key, each of which could have
// issued each other: every order of them is a path.
func strangers(t *testing.T, c *clock, n int) (*authority, []*x509.Certificate) {
	t.Helper()
	a := &authority{key: newKey(t), clock: c}
	chain := make([]*x509.Certificate, n)
	for m := range chain {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(m + 10)), Subject: pkix.Name{CommonName: "x"}, NotBefore: c.Now().Add(-time.Hour), NotAfter: c.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		chain[m] = certify(t, template, template, a.key.Public(), a.key)
		a.cert = chain[m]
	}
	return a, chain
}

// A24: what strangers have issued is refused before paths through it are searched,
// one signature after the other from the authorities down.
func TestA24Strangers(t *testing.T) {
	c := newClock()
	ca := newAuthority(t, c, "spiffe://"+trustDomain)
	below := ca.sub(t, nil)
	a := newAuth(t, c, newDomain(t, nil, ca))
	bundle := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(trustDomain), []*x509.Certificate{ca.cert})
	stranger, seven := strangers(t, c, 7)
	bad, good := stranger.svid(t, nil), below.svid(t, nil)
	chain := func(first *x509.Certificate, rest ...*x509.Certificate) []*x509.Certificate {
		return append([]*x509.Certificate{first}, rest...)
	}
	for _, row := range []struct {
		name  string
		chain []*x509.Certificate
		found bool // a search for paths would find one
	}{
		{"A24 seven of one name", chain(bad, seven...), false},
		{"A24 three of one name", chain(bad, seven[:3]...), false},
		{"A24 six strangers before a known one", chain(bad, append(seven[:6:6], below.cert)...), false},
		{"A24 two strangers before a known one", chain(bad, seven[0], seven[1], below.cert), false},
		{"A24 two strangers before an authority", chain(bad, seven[0], seven[1], ca.cert), false},
		{"A24 a known one before strangers", chain(good, below.cert, seven[0]), true},
		{"A24 a stranger between", chain(good, seven[0], below.cert), true},
		{"A24 a known leaf as authority", chain(bad, good, below.cert), false},
		{"A24 authorities in the wrong order", chain(good, ca.cert, below.cert), true},
	} {
		t.Run(row.name, func(t *testing.T) {
			refusedChain(t, a, row.chain, attest.ClientCert)
			if identity.CheckDown(row.chain, ca.cert) == nil {
				t.Fatal("the search for paths is not prevented")
			}
			if _, _, err := x509svid.Verify(row.chain, bundle, x509svid.WithTime(c.Now())); (err == nil) != row.found {
				t.Fatalf("the search says %v", err)
			}
		})
	}
	acceptedChain(t, a, good, below.cert)
	acceptedChain(t, a, good, below.cert, ca.cert)
	acceptedChain(t, a, ca.svid(t, nil), ca.cert)
}

// A18, B13: a signature can be written in several ways that all verify, by anybody:
// s or n-s, and other unused bits at its end. The certificate stays one credential.
func TestB13OneCertificateOneCredential(t *testing.T) {
	c := newClock()
	ca := newAuthority(t, c, "spiffe://"+trustDomain)
	a := newAuth(t, c, newDomain(t, nil, ca))
	leaf := ca.svid(t, nil)
	want := acceptedChain(t, a, leaf).TokenID
	var parts struct {
		Signed, Algorithm asn1.RawValue
		Signature         asn1.BitString
	}
	if _, err := asn1.Unmarshal(leaf.Raw, &parts); err != nil {
		t.Fatal(err)
	}
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(parts.Signature.Bytes, &sig); err != nil {
		t.Fatal(err)
	}
	others := 0
	for _, s := range []*big.Int{sig.S, new(big.Int).Sub(elliptic.P256().Params().N, sig.S)} {
		sig.S = s
		der, err := asn1.Marshal(sig)
		if err != nil {
			t.Fatal(err)
		}
		for pad := range 8 {
			shifted := new(big.Int).Lsh(new(big.Int).SetBytes(der), uint(pad)).Bytes()
			parts.Signature = asn1.BitString{Bytes: shifted, BitLength: len(shifted)*8 - pad}
			raw, err := asn1.Marshal(parts)
			if err != nil {
				t.Fatal(err)
			}
			again, err := x509.ParseCertificate(raw)
			if err != nil || again.CheckSignatureFrom(ca.cert) != nil {
				continue
			}
			if !again.Equal(leaf) {
				others++
			}
			if got := acceptedChain(t, a, again).TokenID; got != want {
				t.Errorf("unused bits %d, s %v: credential %s, want %s", pad, s, got, want)
			}
		}
	}
	if others == 0 {
		t.Fatal("no other way to write the signature verifies: the test proves nothing")
	}
	if id := acceptedChain(t, a, ca.svid(t, nil)).TokenID; id == want {
		t.Fatal("two certificates are one credential")
	}
}
