package foreign

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

// bundle has sigstore-go verify a bundle under the root.
func (t *trusted) bundle(e *evidence, want attest.Digest) (who attest.Foreigner, at time.Time, err error) {
	how := verify.WithoutIdentitiesUnsafe() // who may say what is for policies
	if t.key != nil {
		how = verify.WithKey()
	}
	result, err := t.bundles.Verify(e.bundle, verify.NewPolicy(verify.WithArtifactDigest("sha256", want[:]), how))
	if err != nil {
		return who, at, err
	}
	// No result is not a success, nor is one about something else (attacks C11, C13).
	if result == nil || result.Signature == nil || result.Statement.GetPredicateType() != e.predicateType ||
		(t.key != nil) != (result.Signature.Certificate == nil) {
		return who, at, fmt.Errorf("sigstore-go read another bundle than this service did")
	}
	for _, proof := range result.VerifiedTimestamps {
		at = earlier(at, proof.Timestamp)
	}
	if t.key != nil {
		return attest.Foreigner{Key: t.keyID}, at, nil
	}
	content, err := e.bundle.VerificationContent()
	if err != nil {
		return who, at, err
	}
	if at.IsZero() {
		return who, at, fmt.Errorf("nothing proves when it was signed")
	}
	who, err = foreigner(content.Certificate())
	return who, at, err
}

// legacy has cosign verify a layer of a .sig or .att image under the root. cosign's
// own way of verifying several at once is not used: it verifies each in a goroutine
// of its own, where a panic ends the process (trust-formats pitfall 10).
func (t *trusted) legacy(ctx context.Context, e *evidence, want attest.Digest) (who attest.Foreigner, at time.Time, err error) {
	// 1. Key and certificate are two ways to sign, never both (attacks C16).
	if (t.key != nil) != (e.cert == nil) {
		return who, at, fmt.Errorf("it was signed the other way: a key root needs a key, a trusted root a certificate")
	}
	// 2. When it was signed. cosign takes the present time where nothing proves
	// another, and indexes an empty list for a timestamp that nobody vouches for.
	times, err := t.times(e)
	if err != nil {
		return who, at, err
	}
	// 3. cosign, offline: with IgnoreTlog or with the entry that came along.
	opts := &cosign.CheckOpts{
		SigVerifier: t.key, Offline: true, MaxWorkers: 1,
		IgnoreTlog: t.Log != Required, IgnoreSCT: t.CertificateLog != Required,
		UseSignedTimestamps: t.key == nil && e.timestamp != nil && len(t.material.TimestampingAuthorities()) > 0,
	}
	if t.key == nil {
		opts.TrustedMaterial = t.material
	}
	digest, logged := v1.Hash{Algorithm: "sha256", Hex: want.Hex()}, false
	if e.attested {
		opts.ClaimVerifier = cosign.IntotoSubjectClaimVerifier
		logged, err = cosign.VerifyBlobAttestation(ctx, e.signature, digest, opts)
	} else {
		opts.ClaimVerifier = cosign.SimpleClaimVerifier
		logged, err = cosign.VerifyImageSignature(ctx, e.signature, digest, opts)
	}
	if err != nil {
		return who, at, err
	}
	if t.key != nil {
		return attest.Foreigner{Key: t.keyID}, at, nil
	}
	// 4. The log's time counts once the log's signature is verified.
	if t.Log == Required {
		if !logged {
			return who, at, fmt.Errorf("no entry of the log came along")
		}
		times = append(times, time.Unix(e.rekor.Payload.IntegratedTime, 0))
	}
	if len(times) == 0 {
		return who, at, fmt.Errorf("nothing proves when it was signed")
	}
	// 5. The whole chain at every one of these times; cosign looks at the leaf alone
	// (attacks C04).
	for _, proved := range times {
		if _, err := verify.VerifyLeafCertificate(proved, e.cert, t.material); err != nil {
			return who, time.Time{}, fmt.Errorf("at %s: %w", attest.Time(proved), err)
		}
		at = earlier(at, proved)
	}
	who, err = foreigner(e.cert)
	return who, at, err
}

// times returns the time of a layer's timestamp under the root, none when it has none
// or the root names no authority for it.
func (t *trusted) times(e *evidence) ([]time.Time, error) {
	authorities := t.material.TimestampingAuthorities()
	if e.timestamp == nil || len(authorities) == 0 {
		return nil, nil
	}
	for _, tsa := range authorities {
		if stamp, err := tsa.Verify(e.timestamp, e.signed); err == nil && stamp != nil {
			return []time.Time{stamp.Time}, nil
		}
	}
	return nil, fmt.Errorf("no authority of the root vouches for its timestamp")
}

// foreigner reads who a verified certificate was issued to. It has one name: of two,
// each reader could take another (attacks D09).
func foreigner(cert *x509.Certificate) (attest.Foreigner, error) {
	var names []string
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	names = append(names, cert.EmailAddresses...)
	if len(names) != 1 || names[0] == "" || len(cert.DNSNames)+len(cert.IPAddresses) > 0 {
		return attest.Foreigner{}, fmt.Errorf("the certificate must have one e-mail address or URI as its only name")
	}
	issuer, build, err := verifier.Certified(cert)
	return attest.Foreigner{SAN: names[0], Issuer: issuer, Build: build}, err
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}
