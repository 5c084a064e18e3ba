// Package images makes container images for tests: what builders make of a base,
// and what liars do. It knows no registry and nothing of the service.
package images

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Layer returns a layer that holds one file of a few kilobytes, for which name
// stands. Its content depends on the name only: packed as "none", "gzip",
// "gzip-9" or "zstd" it has the same diff id and other digests.
func Layer(t testing.TB, name, packed string) v1.Layer {
	t.Helper()
	var content bytes.Buffer
	for i := range 200 {
		fmt.Fprintf(&content, "%s %d %x\n", name, i, sha256.Sum256(fmt.Append(nil, name, i)))
	}
	return Packed(t, Tar(t, name, content.Bytes()), packed)
}

// Tar returns an archive of one file.
func Tar(t testing.TB, name string, content []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	check(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Format: tar.FormatUSTAR}))
	must(w.Write(content))(t)
	check(t, w.Close())
	return out.Bytes()
}

// Packed returns a layer of an archive, packed as Layer says.
func Packed(t testing.TB, archive []byte, packed string) v1.Layer {
	t.Helper()
	if packed == "none" {
		return static.NewLayer(archive, types.OCIUncompressedLayer)
	}
	opts := map[string][]tarball.LayerOption{
		"gzip":   {tarball.WithMediaType(types.OCILayer)},
		"gzip-9": {tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(9)},
		"zstd":   {tarball.WithMediaType(types.OCILayerZStd), tarball.WithCompression(compression.ZStd)},
	}[packed]
	if opts == nil {
		t.Fatalf("a layer cannot be packed as %q", packed)
	}
	return must(tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil }, opts...))(t)
}

// Image returns an image for a platform, "linux/arm64", with these layers.
func Image(t testing.TB, platform string, layers ...v1.Layer) v1.Image {
	t.Helper()
	p := must(v1.ParsePlatform(platform))(t)
	img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	img = must(mutate.ConfigFile(img, &v1.ConfigFile{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, RootFS: v1.RootFS{Type: "layers"}}))(t)
	return must(mutate.AppendLayers(img, layers...))(t)
}

// WithConfig returns img with its configuration changed.
func WithConfig(t testing.TB, img v1.Image, change func(*v1.ConfigFile)) v1.Image {
	t.Helper()
	config := must(img.ConfigFile())(t).DeepCopy()
	change(config)
	return must(mutate.ConfigFile(img, config))(t)
}

// Index returns an index of images by platform.
func Index(t testing.TB, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range slices.Sorted(maps.Keys(images)) {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add: images[p], Descriptor: v1.Descriptor{Platform: must(v1.ParsePlatform(p))(t)},
		})
	}
	return idx
}

// Squashed returns img with all its layers made into one.
func Squashed(t testing.TB, img v1.Image) v1.Image {
	t.Helper()
	flat := mutate.Extract(img)
	defer flat.Close()
	archive := must(io.ReadAll(flat))(t)
	config := must(img.ConfigFile())(t)
	return Image(t, config.OS+"/"+config.Architecture, Packed(t, archive, "gzip"))
}

// WithBuildKit returns idx with an attestation manifest for each of its
// platforms, as BuildKit writes them (docs/attestations/attestation-storage.md).
// The statement is what provenance returns for the digest of a platform; its
// predicate type is SLSA provenance v0.2 or v1.
func WithBuildKit(t testing.TB, idx v1.ImageIndex, predicateType string, provenance func(of v1.Hash) []byte) v1.ImageIndex {
	t.Helper()
	for _, d := range must(idx.IndexManifest())(t).Manifests {
		img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
		img = must(mutate.Append(img, mutate.Addendum{
			Layer:       static.NewLayer(provenance(d.Digest), "application/vnd.in-toto+json"),
			MediaType:   "application/vnd.in-toto+json",
			Annotations: map[string]string{"in-toto.io/predicate-type": predicateType},
		}))(t)
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform:    &v1.Platform{OS: "unknown", Architecture: "unknown"},
			Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": d.Digest.String()},
		}})
	}
	return idx
}

// BuildKitProvenance returns a statement with the fields that BuildKit writes,
// whose dependencies are the given package URLs with their digests in turn.
func BuildKitProvenance(t testing.TB, predicateType string, of v1.Hash, dependencies ...string) []byte {
	t.Helper()
	resources := []map[string]any{}
	for i := 0; i < len(dependencies); i += 2 {
		resources = append(resources, map[string]any{"uri": dependencies[i], "digest": map[string]string{"sha256": dependencies[i+1]}})
	}
	predicate := map[string]any{
		"buildType": "https://mobyproject.org/buildkit@v1", "builder": map[string]string{"id": ""}, "materials": resources,
		"invocation": map[string]any{"configSource": map[string]any{"entryPoint": "Dockerfile"}},
	}
	if predicateType == "https://slsa.dev/provenance/v1" {
		predicate = map[string]any{
			"buildDefinition": map[string]any{
				"buildType":            "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md",
				"resolvedDependencies": resources,
			},
			"runDetails": map[string]any{"builder": map[string]string{"id": ""}},
		}
	}
	return must(json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v0.1", "predicateType": predicateType, "predicate": predicate,
		"subject": []map[string]any{{"name": "pkg:docker/team/app@1", "digest": map[string]string{"sha256": of.Hex}}},
	}))(t)
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
