package abroad

import (
	"encoding/json"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
)

// BundleType is the media type of a bundle v0.3.
const BundleType = attest.BundleMediaType

// Refer pushes a referrer of subject to the repository of ref with one layer for each
// content, all of the artifact type, in the way of cosign 3, and returns its digest.
func Refer(tb testing.TB, ref attest.ImageRef, subject attest.Digest, artifactType string, contents ...[]byte) attest.Digest {
	tb.Helper()
	repo := must(name.NewRepository(string(ref.Repository), name.Insecure))(tb)
	about := must(remote.Head(repo.Digest(ref.Digest.String())))(tb)
	config := static.NewLayer([]byte("{}"), types.OCIEmptyJSON)
	layers := []any{}
	push(tb, repo, config)
	for _, c := range contents {
		l := static.NewLayer(c, types.MediaType(artifactType))
		push(tb, repo, l)
		layers = append(layers, descriptor(tb, l))
	}
	raw := must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": types.OCIManifestSchema1, "artifactType": artifactType,
		"config": descriptor(tb, config), "layers": layers,
		"subject": map[string]any{"mediaType": about.MediaType, "size": about.Size, "digest": subject},
	}))(tb)
	d := attest.Hash(raw)
	if err := remote.Put(repo.Digest(d.String()), manifest(raw)); err != nil {
		tb.Fatal(err)
	}
	return d
}

// Legacy pushes layers as cosign's image of ref under a tag with the suffix .sig or
// .att, and returns the tag.
func Legacy(tb testing.TB, ref attest.ImageRef, suffix string, layers ...attest.Layer) string {
	tb.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, l := range layers {
		img = must(mutate.Append(img, mutate.Addendum{
			Layer: static.NewLayer(l.Payload, types.MediaType(l.MediaType)), Annotations: l.Annotations,
		}))(tb)
	}
	tag := "sha256-" + ref.Digest.Hex() + suffix
	if err := remote.Write(must(name.NewTag(string(ref.Repository)+":"+tag, name.Insecure))(tb), img); err != nil {
		tb.Fatal(err)
	}
	return tag
}

func push(tb testing.TB, repo name.Repository, l v1.Layer) {
	tb.Helper()
	if err := remote.WriteLayer(repo, l); err != nil {
		tb.Fatal(err)
	}
}

func descriptor(tb testing.TB, l v1.Layer) map[string]any {
	tb.Helper()
	return map[string]any{"mediaType": must(l.MediaType())(tb), "size": must(l.Size())(tb), "digest": must(l.Digest())(tb)}
}

// manifest is an OCI manifest as it is written.
type manifest []byte

func (m manifest) RawManifest() ([]byte, error)        { return m, nil }
func (m manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
