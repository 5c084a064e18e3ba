package registry_test

import (
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

// A runtime unpacks only descriptors of layer types (containerd getLayers), so
// the base's digests under another type are in the manifest and not in the image.
func TestBaseIsNotProvedByWhatNoRuntimeUnpacks(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	ref := push(t, host+"/base/debian", "12", image(t, "b1", "b2"))
	fake := image(t)
	for _, l := range []string{"b1", "b2"} {
		var err error
		if fake, err = mutate.Append(fake, mutate.Addendum{
			Layer: static.NewLayer([]byte(l), types.OCIUncompressedLayer), MediaType: "application/vnd.example.blob",
		}); err != nil {
			t.Fatal(err)
		}
	}
	fake, err := mutate.AppendLayers(fake, static.NewLayer([]byte("evil"), types.OCIUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	for name, img := range map[string]v1.Image{
		"image": fake,
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.Image(t.Context(), push(t, host+"/team/"+name, "1", img), string(ref.Repository)+"@"+ref.Digest.String(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if got.Base.Result == attest.ProvenLayers {
				t.Errorf("%s was proved by blobs that are no layers", got.Base)
			}
		})
	}
}

// Only the platform unknown/unknown keeps a runtime from choosing a manifest; an
// annotation does not.
func TestBaseIsProvedOfEveryPlatformThatCanRun(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base := push(t, host+"/base/debian", "12", image(t, "b1"))
	evil := image(t, "evil")
	idx := mutate.AppendManifests(index(t, map[string]v1.Image{"linux/amd64": image(t, "b1", "app")}),
		mutate.IndexAddendum{Add: evil, Descriptor: v1.Descriptor{
			Platform:    &v1.Platform{OS: "linux", Architecture: "arm64"},
			Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
		}})
	got, err := c.Image(t.Context(), push(t, host+"/team/many", "1", idx), string(base.Repository)+"@"+base.Digest.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Base.Result == attest.ProvenLayers {
		t.Errorf("%s was proved although linux/arm64 is not built on it", got.Base)
	}
	if len(got.Platforms) != 2 || got.Platforms[1].Digest != digestOf(t, evil) {
		t.Errorf("linux/arm64 is no subject: %v", got.Platforms)
	}
}

// G19: the manifests of an index are held at once, so their sum is bounded.
func TestG19IndexOfHugeManifests(t *testing.T) {
	f := newFake(t, nil)
	c := newClient(t, registry.Config{Hosts: plain(f.host())})
	var list []string
	for range 200 {
		list = append(list, `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"`+attest.Hash([]byte("x")).String()+`","size":4000000,"platform":{"os":"linux","architecture":"amd64"}}`)
	}
	ref := f.serve("team/app", string(types.OCIImageIndex), `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[`+strings.Join(list, ",")+`]}`)
	_, err := c.Image(t.Context(), ref, "", nil)
	want(t, err, attest.TooLarge)
}
