package registry_test

import (
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

func sorted(seq iter.Seq[string]) []string { return slices.Sorted(seq) }

func TestImage(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	amd, arm := image(t, "base", "amd64"), image(t, "base", "arm64")
	attestation := image(t, "sbom")

	t.Run("single", func(t *testing.T) {
		ref := push(t, host+"/team/one", "1", amd)
		got, err := c.Image(t.Context(), ref, "", nil, anywhere)
		if err != nil {
			t.Fatal(err)
		}
		want := attest.Image{Ref: ref, MediaType: ociManifest, Base: attest.Base{Result: attest.Unclaimed}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("G05 index: it and its platforms, not BuildKit's attestations", func(t *testing.T) {
		idx := index(t, map[string]v1.Image{"linux/amd64": amd, "linux/arm64/v8": arm})
		idx = mutate.AppendManifests(idx,
			mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{
				Platform:    &v1.Platform{OS: "unknown", Architecture: "unknown"},
				Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
			}})
		ref := push(t, host+"/team/many", "1", idx)
		got, err := c.Image(t.Context(), ref, "", nil, anywhere)
		if err != nil {
			t.Fatal(err)
		}
		want := []attest.Platform{{Name: "linux/amd64", Digest: digestOf(t, amd)}, {Name: "linux/arm64/v8", Digest: digestOf(t, arm)}}
		if diff := cmp.Diff(want, got.Platforms); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]attest.Digest{ref.Digest, digestOf(t, amd), digestOf(t, arm)}, got.Digests()); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("docker's types", func(t *testing.T) {
		img := mutate.ConfigMediaType(mutate.MediaType(amd, types.DockerManifestSchema2), types.DockerConfigJSON)
		got, err := c.Image(t.Context(), push(t, host+"/team/docker", "1", img), "", nil, anywhere)
		if err != nil || got.MediaType != dockerImage {
			t.Errorf("got %q, %v", got.MediaType, err)
		}
	})
	t.Run("not there", func(t *testing.T) {
		_, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(host + "/team/one"), Digest: attest.Hash([]byte("x"))}, "", nil, anywhere)
		want(t, err, attest.SubjectNotFound)
	})
}

// A registry that lies about one manifest.
func TestImageOfEvilRegistry(t *testing.T) {
	good := manifest("")
	child := func(mt, body, more string) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d%s}`, mt, attest.Hash([]byte(body)), len(body), more)
	}
	list := func(children ...string) string {
		return `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + strings.Join(children, ",") + `]}`
	}
	linux := `,"platform":{"os":"linux","architecture":"amd64"}`
	for _, row := range []struct {
		name, contentType, body string
		change                  func(f *fake, ref attest.ImageRef)
		reason                  attest.Reason
	}{
		{"honest", ociManifest, good, nil, ""},
		{"G02 header names another digest", ociManifest, good, func(f *fake, ref attest.ImageRef) {
			f.set("/v2/a/app/manifests/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociManifest, "Docker-Content-Digest": attest.Hash([]byte("other")).String()}, body: good})
		}, attest.DigestMismatch},
		{"G02 header repeats the digest, bytes are others", ociManifest, good, func(f *fake, ref attest.ImageRef) {
			f.set("/v2/a/app/manifests/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociManifest, "Docker-Content-Digest": ref.Digest.String()}, body: good + " "})
		}, attest.DigestMismatch},
		{"G03 pinned digest ignored, header honest", ociManifest, good, func(f *fake, ref attest.ImageRef) {
			f.set("/v2/a/app/manifests/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociManifest, "Docker-Content-Digest": attest.Hash([]byte(good + "\n")).String()}, body: good + "\n"})
		}, attest.DigestMismatch},
		{"G03 pinned digest ignored, no header", ociManifest, good, func(f *fake, ref attest.ImageRef) {
			f.set("/v2/a/app/manifests/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociManifest}, body: good + "\n"})
		}, attest.DigestMismatch},
		{"G04 manifest with manifests", ociManifest, manifest(`,"manifests":[]`), nil, attest.ManifestAmbiguous},
		{"G04 index with layers", ociIndex, strings.Replace(list(), "}", `,"layers":[]}`, 1), nil, attest.ManifestAmbiguous},
		{"G04 index with config", ociIndex, strings.Replace(list(), "}", `,"config":null}`, 1), nil, attest.ManifestAmbiguous},
		{"G04 index served as a manifest", ociManifest, list(), nil, attest.ManifestAmbiguous},
		{"G04 manifest served as an index", ociIndex, good, nil, attest.ManifestAmbiguous},
		{"G04 docker's manifest served as OCI's", ociManifest, strings.Replace(good, ociManifest, dockerImage, 1), nil, attest.ManifestAmbiguous},
		{"G04 type is no string", ociManifest, strings.Replace(good, `"`+ociManifest+`"`, "1", 1), nil, attest.ManifestAmbiguous},
		{"G04 manifest of schema 1 inside", ociManifest, manifest(`,"fsLayers":[]`), nil, attest.ManifestAmbiguous},
		{"G04 no type, served as docker's", dockerImage, strings.Replace(good, `"mediaType":"`+ociManifest+`",`, "", 1), nil, attest.ManifestAmbiguous},
		{"no type, served as OCI", ociManifest, strings.Replace(good, `"mediaType":"`+ociManifest+`",`, "", 1), nil, ""},
		{"G04 schema 1", "application/vnd.docker.distribution.manifest.v1+prettyjws", good, nil, attest.ManifestAmbiguous},
		{"G04 no content type", "application/octet-stream", good, nil, attest.ManifestAmbiguous},
		{"G04 schemaVersion 1", ociManifest, strings.Replace(good, `"schemaVersion":2`, `"schemaVersion":1`, 1), nil, attest.ManifestAmbiguous},
		{"G04 layers twice", ociManifest, manifest(`,"layers":[]`), nil, attest.BadJSON},
		{"G04 layers in two cases", ociManifest, manifest(`,"Layers":[]`), nil, attest.BadJSON},
		{"G04 layers in other case only", ociManifest, strings.Replace(good, `"layers"`, `"Layers"`, 1), nil, attest.BadJSON},
		{"G04 digest in other case", ociManifest, strings.Replace(good, `"digest"`, `"dIgest"`, 1), nil, attest.BadJSON},
		{"other case in an annotation", ociManifest, manifest(`,"annotations":{"Digest":"x"}`), nil, ""},
		{"G04 no layers", ociManifest, `{"schemaVersion":2,"config":{}}`, nil, attest.ManifestAmbiguous},
		{"G04 layers is no list", ociManifest, strings.Replace(manifest(""), `"layers":[`, `"layers":"x","y":[`, 1), nil, attest.ManifestAmbiguous},
		{"G06 index in an index", ociIndex, list(child(ociIndex, "{}", linux)), nil, attest.TooManyLevels},
		{"G06 index in an index, called a manifest", ociIndex, list(child(ociManifest, list(), linux)), func(f *fake, _ attest.ImageRef) { f.serve("a/app", ociIndex, list()) }, attest.ManifestAmbiguous},
		{"G05 child of unknown type", ociIndex, list(child("application/x", "{}", linux)), nil, attest.ManifestAmbiguous},
		{"G05 child missing", ociIndex, list(child(ociManifest, good, linux)), nil, attest.SubjectNotFound},
		{"G05 child is there", ociIndex, list(child(ociManifest, good, linux)), func(f *fake, _ attest.ImageRef) { f.serve("a/app", ociManifest, good) }, ""},
		{"G05 child without platform", ociIndex, list(child(ociManifest, good, "")), func(f *fake, _ attest.ImageRef) { f.serve("a/app", ociManifest, good) }, ""},
		{"G05 index of attestations only", ociIndex, list(child(ociManifest, good, `,"platform":{"os":"unknown","architecture":"unknown"}`)), nil, attest.ManifestAmbiguous},
		{"G19 child of another size", ociIndex, list(strings.Replace(child(ociManifest, good, linux), `"size":`, `"size":1`, 1)), func(f *fake, _ attest.ImageRef) { f.serve("a/app", ociManifest, good) }, attest.DigestMismatch},
		{"G17 sha512 layer", ociManifest, manifest(`,"subject":{"mediaType":"x","size":1,"digest":"sha512:` + strings.Repeat("a", 128) + `"}`), nil, attest.BadDigest},
		{"G17 no digest", ociManifest, strings.Replace(good, `"digest"`, `"nodigest"`, 1), nil, attest.BadDigest},
		{"G18 embedded data of another digest", ociManifest, manifest(`,"subject":` + descriptor("x", "abc", `,"data":"YWJk"`)), nil, attest.DigestMismatch},
		{"G18 embedded data", ociManifest, manifest(`,"subject":` + descriptor("x", "abc", `,"data":"YWJj"`)), nil, ""},
		{"G19 negative size", ociManifest, strings.Replace(good, `"size":2`, `"size":-2`, 1), nil, attest.ManifestAmbiguous},
		{"G19 manifest too large", ociManifest, manifest(`,"annotations":{"x":"` + strings.Repeat("x", 4<<20) + `"}`), nil, attest.TooLarge},
		{"G19 index too long", ociIndex, list(slices.Repeat([]string{child(ociManifest, good, linux)}, 257)...), nil, attest.TooLarge},
		{"J04 deep JSON", ociManifest, manifest(`,"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100)), nil, attest.BadJSON},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFake(t, nil)
			ref := f.serve("a/app", row.contentType, row.body)
			if row.change != nil {
				row.change(f, ref)
			}
			c := newClient(t, registry.Config{Hosts: plain(f.host())})
			_, err := c.Image(t.Context(), ref, "", nil, anywhere)
			want(t, err, row.reason)
		})
	}
}

// What Parse accepts is one thing: no document is an image under one type and an
// index under another.
func FuzzParse(f *testing.F) {
	f.Add([]byte(manifest("")))
	f.Add([]byte(manifest(`,"manifests":[]`)))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[` + descriptor(ociManifest, "x", "") + `]}`))
	f.Add([]byte(`{"schemaVersion":2,"config":{},"layers":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		asImage, asIndex := registry.Parse(raw, ociManifest), registry.Parse(raw, ociIndex)
		if asImage == nil && asIndex == nil {
			t.Error("read as an image and as an index")
		}
		for _, err := range []error{asImage, asIndex} {
			if err != nil && attest.ReasonOf(err) == attest.Internal {
				t.Errorf("no reason: %v", err)
			}
		}
	})
}

func FuzzParseHint(f *testing.F) {
	for _, s := range []string{"", "registry.example.com/base:12", "registry.example.com/base@sha256:" + strings.Repeat("a", 64), "localhost:5000/a:b@", "x:y:z", "../.."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if err := registry.ParseHint(s); err != nil && attest.ReasonOf(err) == attest.Internal {
			t.Errorf("no reason: %v", err)
		}
	})
}
