//go:build linux

package interop_test

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	adapter "github.com/sigstore/sigstore/pkg/signature/dsse"

	"github.com/hallmarkd/hallmark/attest"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// What the gate says of a promotion verifies with both stock binaries: as a
// bundle by the gate's certificate where consumers of the stage look for it, as a
// bundle by its key, and as plain DSSE.
func TestPromoted(t *testing.T) {
	t.Parallel()
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, kind)
			first := w.promote(t, w.image.ImageRef, "test")
			w.promote(t, w.image.ImageRef, "staging")
			last := w.promote(t, w.image.ImageRef, "prod")
			w.promote(t, w.index.ImageRef, "test")
			prod := attest.ImageRef{Repository: attest.Repository(w.host + "/prod/api"), Digest: w.image.Digest}
			tagged := must(remote.Head(must(name.NewTag(string(prod.Repository)+":1.0.0", name.Insecure))(t)))(t)
			if tagged.Digest.String() != prod.Digest.String() {
				t.Fatalf("the target names %s", tagged.Digest)
			}
			for _, ref := range []attest.ImageRef{w.image.ImageRef, prod, w.index.ImageRef, {Repository: w.index.Repository, Digest: w.children[1]}} {
				w.hasSummary(t, ref)
			}
			w.plain(t, first)
			w.plain(t, last)
			for _, c := range cosigns(t) {
				for name, ref := range map[string]attest.ImageRef{
					"image": w.image.ImageRef, "image in prod": prod, "index": w.index.ImageRef,
					"child": {Repository: w.index.Repository, Digest: w.children[1]},
				} {
					t.Run(c.name+" "+name, func(t *testing.T) { t.Parallel(); w.summarised(t, c, ref) })
				}
				t.Run(c.name+" in prod as signed", func(t *testing.T) { t.Parallel(); w.verified(t, c, prod) })
				t.Run(c.name+" files", func(t *testing.T) { t.Parallel(); w.summaries(t, c, first) })
			}
			t.Run("hallmark verify --offline", func(t *testing.T) { t.Parallel(); w.offlineSummaries(t, first) })
		})
	}
}

// hasSummary checks that a summary is attached to ref by the time the promotion
// has answered.
func (w *world) hasSummary(t *testing.T, ref attest.ImageRef) {
	t.Helper()
	bundles, err := w.Images.Attached(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, b := range bundles {
		kind := must(w.Verifier.Bundle(b, ref.Digest))(t).Kind()
		if kind == attest.KindVSA {
			return
		}
		found = append(found, string(kind))
	}
	t.Fatalf("%s has no summary, only %v", ref, found)
}

// summarised checks that cosign finds the gate's summary on ref, and nobody else's.
func (w *world) summarised(t *testing.T, c cosign, ref attest.ImageRef) {
	strangeRoot, _ := w.stranger(t)
	for _, row := range []struct {
		name string
		root string
		who  []string
		kind string
		ok   bool
	}{
		{"by the gate", w.root, w.byGate(), attest.PredicateVSA, true},
		{"by the job", w.root, w.byJob(), attest.PredicateVSA, false},
		{"by the gate of another issuer", w.root, by(w.URL+"/gate", w.job.Issuer), attest.PredicateVSA, false},
		{"trust root of another service", strangeRoot, w.byGate(), attest.PredicateVSA, false},
		{"provenance by the gate", w.root, w.byGate(), "slsaprovenance1", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			c.want(t, row.ok, slices.Concat([]string{"verify-attestation", "--type", row.kind}, w.trusting(row.root), row.who, []string{ref.String()})...)
		})
	}
}

// plain checks the DSSE form with the gate key and a library that knows nothing
// of Sigstore.
func (w *world) plain(t *testing.T, promoted *pb.PromoteResponse) {
	t.Helper()
	_, strangeKey := w.stranger(t)
	var env dsse.Envelope
	check(t, json.Unmarshal(promoted.GetVsaEnvelope(), &env))
	payload := must(env.DecodeB64Payload())(t)
	if _, err := byKey(t, w.gateKey).Verify(t.Context(), &env); err != nil {
		t.Errorf("the gate key does not verify the plain summary: %v", err)
	}
	if _, err := byKey(t, strangeKey).Verify(t.Context(), &env); err == nil {
		t.Error("another service's gate key verifies the summary")
	}
	var said struct {
		Predicate attest.VSA `json:"predicate"`
	}
	check(t, json.Unmarshal(payload, &said))
	level := attest.StageLevel(promoted.GetDecision().GetTrack(), promoted.GetDecision().GetStage())
	if said.Predicate.Verifier.ID != w.URL+"/gate" || !slices.Contains(said.Predicate.VerifiedLevels, level) {
		t.Errorf("summary %+v", said.Predicate)
	}
	// The same bytes were signed twice.
	var bundle struct {
		Envelope dsse.Envelope `json:"dsseEnvelope"`
	}
	check(t, json.Unmarshal(promoted.GetVsaBundle(), &bundle))
	if diff := cmp.Diff(payload, must(bundle.Envelope.DecodeB64Payload())(t)); diff != "" {
		t.Errorf("bundle and DSSE differ:\n%s", diff)
	}
	payload[len(payload)-3] ^= 1
	env.Payload = base64.StdEncoding.EncodeToString(payload)
	if _, err := byKey(t, w.gateKey).Verify(t.Context(), &env); err == nil {
		t.Error("an altered summary verifies")
	}
}

// byKey returns a DSSE verifier with one key and nothing else.
func byKey(t *testing.T, path string) *dsse.EnvelopeVerifier {
	t.Helper()
	key := must(cryptoutils.UnmarshalPEMToPublicKey(must(os.ReadFile(path))(t)))(t)
	return must(dsse.NewEnvelopeVerifier(&adapter.VerifierAdapter{SignatureVerifier: must(signature.LoadDefaultVerifier(key))(t)}))(t)
}

// summaries checks the bundles of a promotion as files.
func (w *world) summaries(t *testing.T, c cosign, promoted *pb.PromoteResponse) {
	strangeRoot, strangeKey := w.stranger(t)
	other := attest.Hash([]byte("another image"))
	byCertificate := promoted.GetVsaBundle()
	summaryByKey := w.recorded(t, attest.KindVSA, "publicKey")
	promotion := w.recorded(t, attest.KindPromotion, "publicKey")
	key := func(path string) []string { return []string{"--key", path} }
	for _, row := range []struct {
		name   string
		bundle []byte
		root   string
		who    []string
		kind   string
		about  attest.Digest
		ok     bool
	}{
		{"by certificate", byCertificate, w.root, w.byGate(), attest.PredicateVSA, w.image.Digest, true},
		{"by key", summaryByKey, w.root, key(w.gateKey), attest.PredicateVSA, w.image.Digest, true},
		{"promotion", promotion, w.root, key(w.gateKey), attest.PredicatePromotion, w.image.Digest, true},
		{"by certificate, asked for the key", byCertificate, w.root, key(w.gateKey), attest.PredicateVSA, w.image.Digest, false},
		{"by key, asked for the certificate", summaryByKey, w.root, w.byGate(), attest.PredicateVSA, w.image.Digest, false},
		{"wrong key", summaryByKey, w.root, key(strangeKey), attest.PredicateVSA, w.image.Digest, false},
		{"trust root of another service", summaryByKey, strangeRoot, key(w.gateKey), attest.PredicateVSA, w.image.Digest, false},
		{"another digest", byCertificate, w.root, w.byGate(), attest.PredicateVSA, other, false},
		{"another digest, by key", summaryByKey, w.root, key(w.gateKey), attest.PredicateVSA, other, false},
		{"another predicate", promotion, w.root, key(w.gateKey), attest.PredicateVSA, w.image.Digest, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := file(t, "bundle.sigstore.json", row.bundle)
			c.want(t, row.ok, slices.Concat([]string{"verify-blob-attestation", "--bundle", path, "--type", row.kind}, about(row.about), w.trusting(row.root), row.who)...)
		})
	}
}

// offlineSummaries asks the client about the same files: it accepts those that
// cosign accepts, and only for the stage and the repository that they are about.
func (w *world) offlineSummaries(t *testing.T, promoted *pb.PromoteResponse) {
	strangeRoot, strangeKey := w.stranger(t)
	byCertificate := promoted.GetVsaBundle()
	summaryByKey := w.recorded(t, attest.KindVSA, "publicKey")
	elsewhere := attest.ImageRef{Repository: w.image.Repository + "2", Digest: w.image.Digest}
	another := attest.ImageRef{Repository: w.image.Repository, Digest: attest.Hash([]byte("another image"))}
	for _, row := range []struct {
		name   string
		bundle []byte
		root   string
		key    string
		ref    attest.ImageRef
		stage  string
		want   attest.Reason // "": accepted
	}{
		{"by certificate", byCertificate, w.root, "", w.image.ImageRef, "test", ""},
		{"by key", summaryByKey, w.root, w.gateKey, w.image.ImageRef, "test", ""},
		{"by key that is not given", summaryByKey, w.root, "", w.image.ImageRef, "test", attest.SignerMismatch},
		{"wrong key", summaryByKey, w.root, strangeKey, w.image.ImageRef, "test", attest.SignerMismatch},
		{"trust root of another service", byCertificate, strangeRoot, "", w.image.ImageRef, "test", attest.CertificateInvalid},
		{"another digest", byCertificate, w.root, "", another, "test", attest.SubjectMismatch},
		{"another repository", byCertificate, w.root, "", elsewhere, "test", attest.SubjectMismatch},
		{"another stage", byCertificate, w.root, "", w.image.ImageRef, "staging", attest.NotPromoted},
		{"promotion", w.recorded(t, attest.KindPromotion, "publicKey"), w.root, w.gateKey, w.image.ImageRef, "test", attest.PredicateType},
		{"provenance", w.image.provenance, w.root, "", w.image.ImageRef, "test", attest.PredicateType},
	} {
		t.Run(row.name, func(t *testing.T) {
			args := []string{"--stage", row.stage, "--track", "acme"}
			if row.key != "" {
				args = append(args, "--gate-key", row.key)
			}
			if got := w.offline(t, row.ref, row.bundle, row.root, args...); got != row.want {
				t.Errorf("reason %q, want %q", got, row.want)
			}
		})
	}
}

// recorded returns the bundle of the oldest record of a kind about the image
// whose signer is given as how, "publicKey" or "certificate".
func (w *world) recorded(t *testing.T, kind attest.RecordKind, how string) []byte {
	t.Helper()
	resp, err := pb.NewAuditServiceClient(w.Dial(w.PromoterToken())).GetArtifact(t.Context(), &pb.GetArtifactRequest{Image: w.image.String()})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range resp.GetRecords() {
		var b struct {
			Material map[string]json.RawMessage `json:"verificationMaterial"`
		}
		check(t, json.Unmarshal(r.GetBundle(), &b))
		if _, ok := b.Material[how]; ok && r.GetRecord().GetKind() == string(kind) {
			return r.GetBundle()
		}
	}
	t.Fatalf("no %s by %s is recorded", kind, how)
	return nil
}
