package registry_test

import (
	"cmp"
	"net/http"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/images"
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
			got, err := c.Image(t.Context(), push(t, host+"/team/"+name, "1", img), string(ref.Repository)+"@"+ref.Digest.String(), nil, anywhere)
			if err != nil {
				t.Fatal(err)
			}
			if got.Base.Result == attest.ProvenLayers {
				t.Errorf("%s was proved by blobs that are no layers", got.Base)
			}
		})
	}
}

// The same of a base: what its manifest lists and no runtime unpacks is not in it.
func TestNothingIsProvedByABaseThatNoRuntimeUnpacks(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	fake, err := mutate.Append(image(t), mutate.Addendum{
		Layer: static.NewLayer([]byte("b1"), types.OCIUncompressedLayer), MediaType: "application/vnd.example.blob",
	})
	if err != nil {
		t.Fatal(err)
	}
	base := push(t, host+"/base/debian", "12", fake)
	got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", image(t, "b1", "app")), base.String(), nil, anywhere)
	want(t, err, "")
	if got.Base.Result.Proven() {
		t.Errorf("%s was proved by a base without layers", got.Base)
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
	got, err := c.Image(t.Context(), push(t, host+"/team/many", "1", idx), string(base.Repository)+"@"+base.Digest.String(), nil, anywhere)
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
	_, err := c.Image(t.Context(), ref, "", nil, anywhere)
	want(t, err, attest.TooLarge)
}

// What a base may be made of: the same rules as for an image, but a claim about
// it blocks nobody.
func TestHostileBase(t *testing.T) {
	f := newFake(t, nil)
	c := newClient(t, registry.Config{Hosts: plain(f.host())})
	image := f.serve("team/app", ociManifest, manifest(""))
	indexOf := func(list string) string {
		return `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + list + `]}`
	}
	child := f.serve("base/debian", ociManifest, manifest(`,"annotations":{"a":"b"}`))
	body := manifest(`,"annotations":{"a":"b"}`)
	entry := func(mediaType, more string) string {
		return strings.Replace(descriptor(mediaType, body, more), `"x"`, `"y"`, 1)
	}
	lie := attest.Hash([]byte("lie"))
	f.set("/v2/base/debian/manifests/"+lie.String(), page{header: map[string]string{"Content-Type": ociManifest}, body: body})
	for _, row := range []struct {
		name   string
		base   attest.ImageRef
		result attest.BaseResult
		detail string
	}{
		{"honest", f.serve("base/debian", ociIndex, indexOf(entry(ociManifest, ""))), attest.ProvenLayers, ""},
		{"G02 bytes of another digest", attest.ImageRef{Repository: child.Repository, Digest: lie}, attest.Claimed, "the base cannot be fetched: DIGEST_MISMATCH"},
		{"G04 an image and an index at once", f.serve("base/debian", ociManifest, manifest(`,"manifests":[]`)), attest.Claimed, "the base cannot be fetched: MANIFEST_AMBIGUOUS"},
		{"G05 an index that says another size of its platform", f.serve("base/debian", ociIndex, indexOf(strings.Replace(entry(ociManifest, ""), `"size":`, `"size":1`, 1))), attest.Claimed, "the base cannot be fetched: DIGEST_MISMATCH"},
		{"G05 an index that says another type of its platform", f.serve("base/debian", ociIndex, indexOf(entry(dockerImage, ""))), attest.Claimed, "the base cannot be fetched: MANIFEST_AMBIGUOUS"},
		{"G06 an index in an index", f.serve("base/debian", ociIndex, indexOf(entry(ociIndex, ""))), attest.Claimed, "the base cannot be fetched: TOO_MANY_LEVELS"},
		{"G17 a layer by another algorithm", f.serve("base/debian", ociManifest, strings.Replace(manifest(""), `"digest":"sha256:`, `"digest":"sha512:`+strings.Repeat("0", 64), 1)), attest.Claimed, "the base cannot be fetched: BAD_DIGEST"},
		{"G18 embedded data of another digest", f.serve("base/debian", ociIndex, indexOf(entry(ociManifest, `,"data":"AAAA"`))), attest.Claimed, "the base cannot be fetched: DIGEST_MISMATCH"},
		{"G19 more manifests than are read", f.serve("base/debian", ociIndex, indexOf(strings.TrimSuffix(strings.Repeat(entry(ociManifest, "")+",", 257), ","))), attest.Claimed, "the base cannot be fetched: TOO_LARGE"},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := c.Image(t.Context(), image, row.base.String(), nil, anywhere)
			want(t, err, "")
			if got.Base.Result != row.result || got.Base.Claims[0].Detail != row.detail {
				t.Errorf("got %s %q", got.Base.Result, got.Base.Claims[0].Detail)
			}
		})
	}
}

// A source with many claims crowds out no other, and what is not looked up is
// said.
func TestBaseFloodOfProvenance(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base := push(t, host+"/base/debian", "12", both(t, "r"))
	var many []string
	for i := range 40 {
		many = append(many, "pkg:docker/"+strings.Replace(host, ":", "%3A", 1)+"/base/n"+itoa(i)+"@1", base.Digest.Hex())
	}
	img := images.Index(t, map[string]v1.Image{
		"linux/amd64": labels(t, amd(t, "r", "app"), baseName, base.String()),
		"linux/arm64": labels(t, images.Image(t, "linux/arm64", layers(t, "arm-r", "arm-app")...), baseName, base.String()),
	})
	got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", built(t, img, provenanceV1, many...)), "", nil, anywhere)
	want(t, err, "")
	if got.Base.Result != attest.ProvenLayers || got.Base.Claims[0].From != attest.BaseFromLabel {
		t.Errorf("got %s from %v", got.Base.Result, got.Base.Claims[0])
	}
	skipped, more := 0, 0
	for _, k := range got.Base.Claims {
		if strings.HasPrefix(k.Detail, "not looked up: the image names too many bases") {
			skipped++
		}
		if strings.HasSuffix(k.Detail, "24 more are not listed") {
			more++
		}
	}
	if len(got.Base.Claims) != 17 || skipped != 9 || more != 1 {
		t.Errorf("%d claims, %d not looked up, %d that speak of more", len(got.Base.Claims), skipped, more)
	}
}

// G12, D12: BuildKit's documents are read from the registry by digest, bounded,
// and where one is not what it should be it says nothing: here that of one platform
// of two, so that the other's is no claim about the whole image.
func TestHostileProvenance(t *testing.T) {
	host := devRegistry(t)
	base := push(t, host+"/base/debian", "12", both(t, "r"))
	idx := built(t, both(t, "r", "app"), provenanceV1, "pkg:docker/"+strings.Replace(host, ":", "%3A", 1)+"/base/debian@12", base.Digest.Hex())
	ref := push(t, host+"/team/app", "1", idx)
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	attestation := m.Manifests[2].Digest
	statement := func() string {
		img, err := idx.Image(attestation)
		if err != nil {
			t.Fatal(err)
		}
		return digestOfLayer(t, img, 0)
	}()
	for _, row := range []struct {
		name, path string
		status     int
		body       string
		reason     attest.Reason
		result     attest.BaseResult
	}{
		{name: "honest", path: "-", result: attest.ProvenLayers},
		{name: "G02 another statement", path: "/blobs/" + statement, body: "{}"},
		{name: "G19 a statement longer than said", path: "/blobs/" + statement, body: strings.Repeat(" ", 5<<20)},
		{name: "a statement that is gone", path: "/blobs/" + statement, status: 404},
		{name: "the registry is down for the statement", path: "/blobs/" + statement, status: 500, reason: attest.RegistryUnavailable},
		{name: "a manifest that is gone", path: "/manifests/" + attestation.String(), status: 404},
		{name: "G02 another manifest", path: "/manifests/" + attestation.String(), body: manifest("")},
	} {
		t.Run(row.name, func(t *testing.T) {
			front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, row.path) || r.Method != http.MethodGet {
					return false
				}
				w.Header().Set("Content-Type", ociManifest)
				if row.status != 0 {
					w.WriteHeader(row.status)
				}
				w.Write([]byte(row.body))
				return true
			})
			c := newClient(t, registry.Config{Hosts: plain(front, host)})
			got, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(front + "/team/app"), Digest: ref.Digest}, "", nil, anywhere)
			want(t, err, row.reason)
			if err == nil && got.Base.Result != cmp.Or(row.result, attest.Claimed) {
				t.Errorf("got %s %v", got.Base.Result, got.Base.Claims)
			}
		})
	}
}
