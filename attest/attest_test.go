package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/cyberphone/json-canonicalization/go/src/webpki.org/jsoncanonicalizer"
	commonpb "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rekorpb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	"github.com/sigstore/rekor-tiles/v2/pkg/types/hashedrekord"
	"github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
)

const hex64 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParseImageRef(t *testing.T) {
	for _, row := range []struct {
		name, in string
		want     attest.Reason // "" is accepted
	}{
		{"canonical", "registry.example.com/payments/api@sha256:" + hex64, ""},
		{"port", "127.0.0.1:5000/api@sha256:" + hex64, ""},
		{"ipv6", "[::1]:5000/api@sha256:" + hex64, ""},
		{"localhost", "localhost/api@sha256:" + hex64, ""},
		{"G01 tag", "registry.example.com/api:1.2.3", attest.TagRefused},
		{"G01 no digest", "registry.example.com/api", attest.TagRefused},
		{"G01 tag and digest", "registry.example.com/api:1@sha256:" + hex64, attest.TagRefused},
		{"no registry", "payments/api@sha256:" + hex64, attest.BadReference},
		{"G14 parent directory", "registry.example.com/../etc@sha256:" + hex64, attest.BadReference},
		{"G14 dot", "registry.example.com/./x@sha256:" + hex64, attest.BadReference},
		{"G14 absolute", "registry.example.com//x@sha256:" + hex64, attest.BadReference},
		{"G14 backslash", `registry.example.com/a\b@sha256:` + hex64, attest.BadReference},
		{"G14 percent", "registry.example.com/%2e%2e/x@sha256:" + hex64, attest.BadReference},
		{"G14 NUL", "registry.example.com/a\x00b@sha256:" + hex64, attest.BadReference},
		{"J04 newline", "registry.example.com/a\n@sha256:" + hex64, attest.BadReference},
		{"B12 upper case", "registry.example.com/API@sha256:" + hex64, attest.BadReference},
		{"B12 homoglyph", "registry.example.com/pаyments@sha256:" + hex64, attest.BadReference},
		{"user info", "user@registry.example.com/api@sha256:" + hex64, attest.BadReference},
		{"scheme", "http://registry.example.com/api@sha256:" + hex64, attest.BadReference},
		{"upper hex", "registry.example.com/api@sha256:" + strings.ToUpper(hex64), attest.BadDigest},
		{"short hex", "registry.example.com/api@sha256:" + hex64[1:], attest.BadDigest},
		{"other algorithm", "registry.example.com/api@sha512:" + hex64 + hex64, attest.BadDigest},
		{"C06 empty", "", attest.TagRefused},
		{"C06 empty digest", "registry.example.com/api@", attest.BadDigest},
	} {
		t.Run(row.name, func(t *testing.T) {
			ref, err := attest.ParseImageRef(row.in)
			if got := attest.ReasonOf(err); got != row.want {
				t.Fatalf("ParseImageRef(%q) = %v: reason %q, want %q", row.in, err, got, row.want)
			}
			if err == nil && ref.String() != row.in {
				t.Fatalf("ParseImageRef(%q) reads back as %q", row.in, ref)
			}
		})
	}
}

func FuzzParseImageRef(f *testing.F) {
	f.Add("registry.example.com/payments/api@sha256:" + hex64)
	f.Add("a:1/b@sha256:")
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := attest.ParseImageRef(s)
		if err == nil && ref.String() != s {
			t.Fatalf("%q reads back as %q: one image must have one spelling", s, ref)
		}
	})
}

// The log entry is written by hand for speed: it must be what rekor-tiles
// writes, to the bit, because verifiers rebuild it (trust-formats 2.2).
func TestLogEntryIsRekors(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	e := attest.Envelope{PayloadType: attest.InTotoPayload, Payload: []byte(`{"_type":"x"}`)}
	signed := e.Signed()
	if e.Signature, err = ecdsa.SignASN1(rand.Reader, key, signed[:]); err != nil {
		t.Fatal(err)
	}
	if e.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	algorithms, err := signature.NewAlgorithmRegistryConfig([]commonpb.PublicKeyDetails{commonpb.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256})
	if err != nil {
		t.Fatal(err)
	}
	entry, err := hashedrekord.ToLogEntry(&rekorpb.HashedRekordRequestV002{
		Digest: signed[:],
		Signature: &rekorpb.Signature{Content: e.Signature, Verifier: &rekorpb.Verifier{
			Verifier:   &rekorpb.Verifier_PublicKey{PublicKey: &rekorpb.PublicKey{RawBytes: e.PublicKey}},
			KeyDetails: commonpb.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256,
		}},
	}, algorithms)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := protojson.Marshal(entry)
	if err != nil {
		t.Fatal(err)
	}
	want, err := jsoncanonicalizer.Transform(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := e.LogEntry(); !bytes.Equal(got, want) {
		t.Fatalf("log entry\n%s\nwant\n%s", got, want)
	}
}

func TestErrorKeepsReasonAndCause(t *testing.T) {
	cause := errors.New("disk full")
	err := error(attest.Errorf(attest.LedgerUnavailable, "storing: %w", cause))
	if !errors.Is(err, cause) || attest.ReasonOf(err) != attest.LedgerUnavailable {
		t.Fatalf("%v lost its cause or reason", err)
	}
	if attest.ReasonOf(cause) != attest.Internal || attest.ReasonOf(nil) != "" {
		t.Fatal("an error without a reason must be INTERNAL, and no error none")
	}
}
