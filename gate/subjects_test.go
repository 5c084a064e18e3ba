package gate_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/internal/testkit/images"
)

// D16: other tools take what they sign from what a build wrote (Tekton's results
// called IMAGE_URL and IMAGE_DIGEST, labels, an attestation in the index). A build
// that names somebody else's image in all these places has only its own signed.
func TestSubjectsAreNotTheBuilds(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	victim := s.Push("acme/api", "", testkit.RandomImage(t))
	idx, platforms := hostileIndex(t, s, victim)

	out, err := trySign(t, s, s.Token(nil), gate.SignImage{
		Ref:   idx,
		Facts: map[string]string{"image-digests": victim.Digest.String(), "also.images": victim.ImageRef.String()},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := append([]attest.Digest{idx.Digest}, platforms...)
	for _, rec := range []attest.Record{out.Signature, out.Provenance} {
		ev, err := s.Verifier.Record(rec)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, ev.Digests()); d != "" {
			t.Errorf("D16 the subjects of %s (-want +got):\n%s", ev.PredicateType(), d)
		}
		if strings.Count(string(rec.Payload), victim.Digest.Hex()) > 0 && ev.Kind() != attest.KindProvenance {
			t.Errorf("D16 %s names the image that was only spoken of", ev.PredicateType())
		}
	}
	if found := find(t, s, attest.KindProvenance, attest.Facet{Name: attest.FacetDigest, Value: victim.Digest.String()}); len(found) > 0 {
		t.Errorf("D16 the index lists %d provenances of an image that was only spoken of", len(found))
	}
	d, err := s.Gate.Verify(t.Context(), auditor(s), gate.VerifyRequest{Ref: victim.ImageRef})
	if err != nil {
		t.Fatal(err)
	}
	wantDenied(t, d, attest.NotSigned)
}

// D16: nor can a caller add a subject by asking for it.
func TestSubjectsAreNotTheCallers(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	own, foreign := s.PushApp("acme/api"), s.PushApp("prod/api")
	for _, row := range []struct {
		name string
		img  gate.SignImage
		want attest.Reason
	}{
		{"D16 fact called subject", gate.SignImage{Ref: own.ImageRef, Facts: map[string]string{"subject": foreign.ImageRef.String()}}, attest.CallerFactsRefused},
		{"D16 fact called digest", gate.SignImage{Ref: own.ImageRef, Facts: map[string]string{"digest": foreign.Digest.String()}}, attest.CallerFactsRefused},
		{"D16 an image of another's repository", gate.SignImage{Ref: foreign.ImageRef}, attest.RoleMissing},
		{"D16 another's digest in its own repository", gate.SignImage{Ref: attest.ImageRef{Repository: own.Repository, Digest: attest.Hash([]byte("elsewhere"))}}, attest.SubjectNotFound},
	} {
		t.Run(row.name, func(t *testing.T) {
			out, err := trySign(t, s, s.Token(nil), row.img)
			wantReason(t, err, row.want)
			if !out.Provenance.ID.IsZero() || len(out.ProvenanceBundle) > 0 {
				t.Error("something was signed")
			}
		})
	}
	if found := find(t, s, attest.KindProvenance); len(found) > 0 {
		t.Errorf("%d provenances are recorded", len(found))
	}
}

// hostileIndex pushes an index of two platforms that names victim wherever a build
// can, and returns it with its platforms' digests.
func hostileIndex(t *testing.T, s *testkit.Stack, victim testkit.Pushed) (attest.ImageRef, []attest.Digest) {
	t.Helper()
	says := map[string]string{
		"IMAGE_URL": string(victim.Repository), "IMAGE_DIGEST": victim.Digest.String(), "IMAGES": victim.ImageRef.String(),
		"org.opencontainers.image.ref.name": victim.ImageRef.String(), "vnd.docker.reference.digest": victim.Digest.String(),
	}
	byPlatform := map[string]v1.Image{}
	var digests []attest.Digest
	platforms := []string{"linux/amd64", "linux/arm64"}
	for _, p := range platforms {
		img := images.WithConfig(t, images.Image(t, p, images.Layer(t, p, "gzip")), func(c *v1.ConfigFile) { c.Config.Labels = says })
		byPlatform[p] = mutate.Annotations(img, says).(v1.Image)
		d, err := byPlatform[p].Digest()
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, digestOf(t, d))
	}
	idx := images.WithBuildKit(t, images.Index(t, byPlatform), attest.PredicateProvenance, func(v1.Hash) []byte {
		return images.BuildKitProvenance(t, attest.PredicateProvenance, v1.Hash{Algorithm: "sha256", Hex: victim.Digest.Hex()})
	})
	idx = mutate.Annotations(idx, says).(v1.ImageIndex)
	h, err := idx.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref := attest.ImageRef{Repository: victim.Repository, Digest: digestOf(t, h)}
	at, err := name.NewDigest(ref.String(), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(at, idx, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	return ref, slices.Clip(digests)
}

func digestOf(t *testing.T, h v1.Hash) attest.Digest {
	t.Helper()
	d, err := attest.ParseDigest(h.String())
	if err != nil {
		t.Fatal(err)
	}
	return d
}
