package registry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/images"
	"github.com/hallmarkd/hallmark/registry"
)

const (
	provenanceV1  = "https://slsa.dev/provenance/v1"
	provenanceV02 = "https://slsa.dev/provenance/v0.2"
)

// layers returns a layer for each "name:packing", gzip where none is given.
func layers(t testing.TB, names ...string) []v1.Layer {
	var out []v1.Layer
	for _, n := range names {
		name, packed, ok := strings.Cut(n, ":")
		if !ok {
			packed = "gzip"
		}
		out = append(out, images.Layer(t, name, packed))
	}
	return out
}

func amd(t testing.TB, names ...string) v1.Image {
	return images.Image(t, "linux/amd64", layers(t, names...)...)
}

// both returns an index of two platforms whose layers differ.
func both(t testing.TB, names ...string) v1.ImageIndex {
	var arm []string
	for _, n := range names {
		arm = append(arm, "arm-"+n)
	}
	return images.Index(t, map[string]v1.Image{"linux/amd64": amd(t, names...), "linux/arm64": images.Image(t, "linux/arm64", layers(t, arm...)...)})
}

// built returns idx with BuildKit's provenance of every platform.
func built(t testing.TB, idx v1.ImageIndex, kind string, dependencies ...string) v1.ImageIndex {
	return images.WithBuildKit(t, idx, kind, func(of v1.Hash) []byte {
		return images.BuildKitProvenance(t, kind, of, dependencies...)
	})
}

func labels(t testing.TB, img v1.Image, pairs ...string) v1.Image {
	return images.WithConfig(t, img, func(c *v1.ConfigFile) {
		c.Config.Labels = map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			c.Config.Labels[pairs[i]] = pairs[i+1]
		}
	})
}

// following answers as the service's own tables do.
func following(bases ...registry.FollowedBase) registry.Followed {
	return func(_ context.Context, prefixes []attest.Digest) ([]registry.FollowedBase, error) {
		var out []registry.FollowedBase
		for _, b := range bases {
			for _, p := range prefixes {
				if p == b.Prefix {
					out = append(out, b)
				}
			}
		}
		return out, nil
	}
}

func follow(t testing.TB, c *registry.Client, repo, tag string) []registry.FollowedBase {
	t.Helper()
	out, err := c.Follow(t.Context(), attest.Repository(repo), tag)
	want(t, err, "")
	return out
}

// told is a claim as a row writes it.
type told struct{ From, Name, Result, Detail string }

func toldOf(b attest.Base) []told {
	var out []told
	for _, k := range b.Claims {
		out = append(out, told{k.From, k.Name, string(k.Result), k.Detail})
	}
	return out
}

func equivalents(b attest.Base) []string {
	var out []string
	for _, e := range b.Equivalents {
		out = append(out, e.String())
	}
	return out
}

// Every way in which a base is found or made up, on images that registries hold.
func TestProof(t *testing.T) {
	t.Parallel()
	registries(t, func(t *testing.T, host string) {
		c := newClient(t, registry.Config{
			Hosts: plain(host), Mirrors: []registry.Mirror{{From: host + "/hub", To: "docker.io"}},
		})
		at := func(path string) string { return host + "/" + path }
		root := push(t, at("base/root"), "1", both(t, "r"))
		base := push(t, at("base/debian"), "12", both(t, "r", "b"))
		single := push(t, at("base/single"), "1", amd(t, "r", "b"))
		other := push(t, at("base/other"), "1", both(t, "x", "y"))
		three := push(t, at("base/three"), "1", both(t, "r", "b", "c"))
		golang := push(t, at("hub/library/golang"), "1.26", both(t, "r", "go"))
		hub := push(t, at("hub/library/debian"), "12", both(t, "r", "b"))
		followed := following(append(follow(t, c, at("base/debian"), "12"), follow(t, c, at("base/root"), "1")...)...)

		app, apps := amd(t, "r", "b", "app"), both(t, "r", "b", "app")
		purl := func(repo, tag string) string {
			return "pkg:docker/" + strings.ReplaceAll(repo, ":", "%3A") + "@" + tag + "?platform=linux%2Famd64"
		}
		hex := func(r attest.ImageRef) string { return r.Digest.Hex() }
		const stage = "a build stage: its layers are not in the image"
		buildpack := func(r attest.ImageRef) string {
			return `{"runImage":{"topLayer":"sha256:` + strings.Repeat("1", 64) + `","reference":"` + r.String() + `","image":"` + string(r.Repository) + `"},"buildpacks":[]}`
		}
		golangName := "docker.io/library/golang:1.26@" + golang.Digest.String()

		for _, row := range []struct {
			name        string
			image       remote.Taggable
			hint        string
			followed    registry.Followed
			result      attest.BaseResult
			base        string
			layers      []int
			claims      []told
			equivalents []string
		}{
			{name: "single platform", image: annotate(app, baseName, at("base/single:1"), baseDigest, single.Digest.String()),
				result: attest.ProvenLayers, base: at("base/single:1@") + single.Digest.String(), layers: []int{2},
				claims: []told{{"annotation", at("base/single:1"), "PROVEN_LAYERS", ""}}},
			{name: "multi-platform", image: annotate(apps, baseName, base.String()), result: attest.ProvenLayers, base: base.String(), layers: []int{2, 2},
				claims: []told{{"annotation", base.String(), "PROVEN_LAYERS", ""}}},
			{name: "one platform of a base of several", image: app, hint: base.String(), result: attest.ProvenLayers, base: base.String(), layers: []int{2},
				claims: []told{{"caller", base.String(), "PROVEN_LAYERS", ""}}},

			{name: "base packed with zstd", image: amd(t, "r:zstd", "b:zstd", "app"), hint: single.String(), result: attest.ProvenDiffIDs, base: single.String(), layers: []int{2},
				claims: []told{{"caller", single.String(), "PROVEN_DIFFIDS", ""}}},
			{name: "base packed at another level", image: amd(t, "r:gzip-9", "b:gzip-9", "app"), hint: base.String(), result: attest.ProvenDiffIDs, base: base.String(), layers: []int{2},
				claims: []told{{"caller", base.String(), "PROVEN_DIFFIDS", ""}}},
			{name: "base not packed", image: amd(t, "r:none", "b:none", "app"), hint: single.String(), result: attest.ProvenDiffIDs, base: single.String(), layers: []int{2},
				claims: []told{{"caller", single.String(), "PROVEN_DIFFIDS", ""}}},
			{name: "one layer of the base packed otherwise", image: amd(t, "r", "b:zstd", "app"), hint: single.String(), result: attest.ProvenDiffIDs, base: single.String(), layers: []int{2},
				claims: []told{{"caller", single.String(), "PROVEN_DIFFIDS", ""}}},
			{name: "every platform of the base packed otherwise", image: both(t, "r:zstd", "b:zstd", "app"), hint: base.String(), result: attest.ProvenDiffIDs, base: base.String(), layers: []int{2, 2},
				claims: []told{{"caller", base.String(), "PROVEN_DIFFIDS", ""}}},
			{name: "one platform of the base packed otherwise", image: images.Index(t, map[string]v1.Image{"linux/amd64": amd(t, "r:zstd", "b", "app"), "linux/arm64": images.Image(t, "linux/arm64", layers(t, "arm-r", "arm-b", "arm-app")...)}),
				hint: base.String(), result: attest.ProvenDiffIDs, base: base.String(), layers: []int{2, 2},
				claims: []told{{"caller", base.String(), "PROVEN_DIFFIDS", ""}}},
			{name: "packed otherwise on one platform, another base on the other", image: images.Index(t, map[string]v1.Image{"linux/amd64": amd(t, "r:zstd", "b", "app"), "linux/arm64": images.Image(t, "linux/arm64", layers(t, "q", "w")...)}),
				hint: base.String(), result: attest.Contradicted, base: base.String(),
				claims: []told{{"caller", base.String(), "CONTRADICTED", "the base's layers are not the first layers of linux/arm64"}}},
			{name: "D12 a configuration that claims the base's contents over others", image: forged(t, app, layers(t, "evil", "b", "app")...), hint: single.String(),
				result: attest.Contradicted, base: single.String(),
				claims: []told{{"caller", single.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},

			{name: "squashed, annotated", image: annotate(images.Squashed(t, app), baseName, base.String()), result: attest.Claimed, base: base.String(),
				claims: []told{{"annotation", base.String(), "CLAIMED", "the layers of the image were squashed, so that they cannot show a base"}}},
			{name: "squashed, named by the caller", image: images.Squashed(t, app), hint: single.String(), result: attest.Claimed, base: single.String(),
				claims: []told{{"caller", single.String(), "CLAIMED", "the layers of the image were squashed, so that they cannot show a base"}}},
			{name: "one layer, on a base of one other layer", image: amd(t, "flat"), hint: root.String(), result: attest.Claimed, base: root.String(),
				claims: []told{{"caller", root.String(), "CLAIMED", "the layers of the image were squashed, so that they cannot show a base"}}},
			{name: "fewer layers than the base", image: amd(t, "flat", "app"), hint: three.String(), result: attest.Claimed, base: three.String(),
				claims: []told{{"caller", three.String(), "CLAIMED", "the layers of the image were squashed, so that they cannot show a base"}}},
			{name: "squashed on one platform only", image: images.Index(t, map[string]v1.Image{"linux/amd64": app, "linux/arm64": images.Image(t, "linux/arm64", layers(t, "flat")...)}),
				hint: base.String(), result: attest.Claimed, base: base.String(),
				claims: []told{{"caller", base.String(), "CLAIMED", "the layers of linux/arm64 were squashed, so that they cannot show a base"}}},

			{name: "base of a base: the longer one is the base", image: annotate(apps, baseName, root.String()), hint: base.String(),
				result: attest.ProvenLayers, base: base.String(), layers: []int{2, 2},
				claims: []told{{"caller", base.String(), "PROVEN_LAYERS", ""}, {"annotation", root.String(), "PROVEN_LAYERS", ""}}},
			{name: "inherited annotation, the base is followed", image: annotate(apps, baseName, root.String()), followed: followed,
				result: attest.Matched, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims: []told{{"followed", at("base/debian:12@") + base.Digest.String(), "MATCHED", ""}, {"annotation", root.String(), "PROVEN_LAYERS", ""}}},
			{name: "nobody names it, it is followed", image: app, followed: followed,
				result: attest.Matched, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2},
				claims: []told{{"followed", at("base/debian:12@") + base.Digest.String(), "MATCHED", ""}}},
			{name: "named by digest only and followed: its tag is known", image: app, hint: base.String(), followed: followed,
				result: attest.ProvenLayers, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2},
				claims: []told{{"caller", base.String(), "PROVEN_LAYERS", ""}}},
			{name: "shares one layer with a followed base", image: amd(t, "r", "else"), followed: following(follow(t, c, at("base/debian"), "12")...), result: attest.Unclaimed},
			{name: "followed under one platform only", image: images.Index(t, map[string]v1.Image{"linux/amd64": app, "linux/arm64": images.Image(t, "linux/arm64", layers(t, "q", "w")...)}),
				followed: followed, result: attest.Unclaimed},
			{name: "a followed base is not its own base", image: both(t, "r", "b"), followed: following(follow(t, c, at("base/debian"), "12")...), result: attest.Unclaimed},

			{name: "D12 lying annotation", image: annotate(apps, baseName, other.String()), result: attest.Contradicted, base: other.String(),
				claims: []told{{"annotation", other.String(), "CONTRADICTED", "the base's layers are not the first layers of linux/amd64, linux/arm64"}}},
			{name: "D12 lying annotation, a followed base", image: annotate(apps, baseName, other.String()), followed: followed,
				result: attest.Matched, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims: []told{{"followed", at("base/debian:12@") + base.Digest.String(), "MATCHED", ""}, {"annotation", other.String(), "CONTRADICTED", "the base's layers are not the first layers of linux/amd64, linux/arm64"}}},
			{name: "lying caller", image: app, hint: other.String(), result: attest.Contradicted, base: other.String(),
				claims: []told{{"caller", other.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},
			{name: "two candidates with the same layers", image: annotate(app, baseName, at("base/single:1")), hint: base.String(),
				result: attest.ProvenLayers, base: at("base/single:1@") + single.Digest.String(), layers: []int{2},
				claims:      []told{{"annotation", at("base/single:1"), "PROVEN_LAYERS", ""}, {"caller", base.String(), "PROVEN_LAYERS", ""}},
				equivalents: []string{base.String()}},
			{name: "equivalents among the followed bases", image: app, hint: single.String(),
				followed: following(append(follow(t, c, at("base/debian"), "12"), follow(t, c, "docker.io/library/debian", "12")...)...),
				result:   attest.ProvenLayers, base: single.String(), layers: []int{2},
				claims:      []told{{"caller", single.String(), "PROVEN_LAYERS", ""}},
				equivalents: []string{at("base/debian:12@") + base.Digest.String(), "docker.io/library/debian:12@" + hub.Digest.String()}},

			{name: "scratch", image: amd(t, "static"), hint: "scratch", followed: followed, result: attest.Scratch,
				claims: []told{{"caller", "scratch", "SCRATCH", ""}}},
			{name: "scratch, but a followed base is in it", image: app, hint: "scratch", followed: followed,
				result: attest.Matched, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2},
				claims: []told{{"followed", at("base/debian:12@") + base.Digest.String(), "MATCHED", ""}, {"caller", "scratch", "CONTRADICTED", "the image is built on " + at("base/debian:12@") + base.Digest.String()}}},
			{name: "scratch, but the annotation is proved", image: annotate(app, baseName, single.String()), hint: "scratch",
				result: attest.ProvenLayers, base: single.String(), layers: []int{2},
				claims: []told{{"annotation", single.String(), "PROVEN_LAYERS", ""}, {"caller", "scratch", "CONTRADICTED", "the image is built on " + single.String()}}},
			{name: "scratch, and an annotation that is disproved", image: annotate(app, baseName, other.String()), hint: "scratch",
				result: attest.Contradicted, base: other.String(),
				claims: []told{{"annotation", other.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}, {"caller", "scratch", "SCRATCH", ""}}},
			{name: "BuildKit used no image", image: built(t, both(t, "static"), provenanceV1, "https://github.com/acme/app#main", strings.Repeat("1", 64)),
				result: attest.Scratch, claims: []told{{"buildkit", "scratch", "SCRATCH", ""}}},
			{name: "BuildKit used no image, a followed base is in it", image: built(t, apps, provenanceV1), followed: followed,
				result: attest.Matched, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims: []told{{"followed", at("base/debian:12@") + base.Digest.String(), "MATCHED", ""}}},
			{name: "BuildKit's provenance of one platform only is not all", image: images.WithBuildKit(t, both(t, "static"), provenanceV1, func(of v1.Hash) []byte {
				return images.BuildKitProvenance(t, provenanceV1, v1.Hash{Algorithm: "sha256", Hex: digestOf(t, amd(t, "static")).Hex()})
			}), result: attest.Unclaimed},

			{name: "BuildKit's provenance v1", image: built(t, apps, provenanceV1, purl(at("base/debian"), "12"), hex(base)),
				result: attest.ProvenLayers, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims: []told{{"buildkit", at("base/debian:12@") + base.Digest.String(), "PROVEN_LAYERS", ""}}},
			{name: "BuildKit's provenance v0.2, through a mirror", image: built(t, apps, provenanceV02, purl("debian", "12"), hex(hub)),
				result: attest.ProvenLayers, base: "docker.io/library/debian:12@" + hub.Digest.String(), layers: []int{2, 2},
				claims: []told{{"buildkit", "docker.io/library/debian:12@" + hub.Digest.String(), "PROVEN_LAYERS", ""}}},
			{name: "a package URL of type oci", image: built(t, apps, provenanceV1, "pkg:oci/debian@sha256%3A"+hex(base)+"?repository_url="+strings.ReplaceAll(at("base/debian"), "/", "%2F")+"&tag=12", hex(base)),
				result: attest.ProvenLayers, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims: []told{{"buildkit", at("base/debian:12@") + base.Digest.String(), "PROVEN_LAYERS", ""}}},
			{name: "builder stage beside the base", image: built(t, apps, provenanceV1, purl("golang", "1.26"), hex(golang), purl(at("base/debian"), "12"), hex(base)),
				result: attest.ProvenLayers, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims: []told{{"buildkit", at("base/debian:12@") + base.Digest.String(), "PROVEN_LAYERS", ""}, {"buildkit", golangName, "CLAIMED", stage}}},
			{name: "builder stage only", image: built(t, both(t, "static"), provenanceV1, purl("golang", "1.26"), hex(golang)), result: attest.Unclaimed,
				claims: []told{{"buildkit", golangName, "CLAIMED", stage}}},
			{name: "builder stage, and the caller says scratch", image: built(t, both(t, "static"), provenanceV1, purl("golang", "1.26"), hex(golang)), hint: "scratch", result: attest.Scratch,
				claims: []told{{"caller", "scratch", "SCRATCH", ""}, {"buildkit", golangName, "CLAIMED", stage}}},
			{name: "two images that cannot be fetched: neither is the base", image: built(t, apps, provenanceV1, purl("ghcr.io/a/b", "1"), hex(base), purl("ghcr.io/a/c", "1"), hex(root)), result: attest.Claimed,
				claims: []told{{"buildkit", "ghcr.io/a/b:1@" + base.Digest.String(), "CLAIMED", "registry ghcr.io is not configured"}, {"buildkit", "ghcr.io/a/c:1@" + root.Digest.String(), "CLAIMED", "registry ghcr.io is not configured"}}},
			{name: "one that cannot be fetched may be the base", image: built(t, apps, provenanceV1, purl("ghcr.io/a/b", "1"), hex(base), purl("golang", "1.26"), hex(golang)), result: attest.Claimed, base: "ghcr.io/a/b:1@" + base.Digest.String(),
				claims: []told{{"buildkit", "ghcr.io/a/b:1@" + base.Digest.String(), "CLAIMED", "registry ghcr.io is not configured"}, {"buildkit", golangName, "CLAIMED", stage}}},
			{name: "BuildKit and the caller name the same layers", image: built(t, apps, provenanceV1, purl(at("base/debian"), "12"), hex(base)), hint: hub.String(),
				result: attest.ProvenLayers, base: at("base/debian:12@") + base.Digest.String(), layers: []int{2, 2},
				claims:      []told{{"buildkit", at("base/debian:12@") + base.Digest.String(), "PROVEN_LAYERS", ""}, {"caller", hub.String(), "PROVEN_LAYERS", ""}},
				equivalents: []string{"docker.io/library/debian@" + hub.Digest.String()}},

			{name: ".NET labels", image: labels(t, app, baseName, at("base/single:1"), baseDigest, single.Digest.String()),
				result: attest.ProvenLayers, base: at("base/single:1@") + single.Digest.String(), layers: []int{2},
				claims: []told{{"label", at("base/single:1"), "PROVEN_LAYERS", ""}}},
			{name: "inherited labels", image: labels(t, app, baseName, at("base/other:1"), baseDigest, other.Digest.String()),
				result: attest.Claimed, base: at("base/other:1@") + other.Digest.String(),
				claims: []told{{"label", at("base/other:1"), "CLAIMED", "an inherited label: the layers do not show it"}}},
			{name: "buildpacks", image: labels(t, app, "io.buildpacks.lifecycle.metadata", buildpack(single)), result: attest.ProvenLayers, base: single.String(), layers: []int{2},
				claims: []told{{"label", single.String(), "PROVEN_LAYERS", ""}}},
			{name: "buildpacks' label with two readings", image: labels(t, app, "io.buildpacks.lifecycle.metadata", `{"runImage":{"reference":"a/b"},"runimage":{}}`), result: attest.Claimed,
				claims: []told{{"label", "", "CLAIMED", "the label io.buildpacks.lifecycle.metadata is not read alike by all parsers of JSON"}}},
		} {
			t.Run(row.name, func(t *testing.T) {
				got, err := c.Image(t.Context(), push(t, at("team/app"), "1", row.image), row.hint, row.followed, anywhere)
				want(t, err, "")
				if got.Base.Result != row.result {
					t.Errorf("result %s, want %s", got.Base.Result, row.result)
				}
				if s := written(got.Base); s != row.base {
					t.Errorf("base %s, want %s", s, row.base)
				}
				var layers []int
				for _, p := range got.Base.Platforms {
					layers = append(layers, p.Layers)
				}
				if diff := cmp.Diff(row.layers, layers); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(row.claims, toldOf(got.Base)); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(row.equivalents, equivalents(got.Base)); diff != "" {
					t.Error(diff)
				}
			})
		}
	})
}

// forged returns an image with the configuration of another and these layers.
func forged(t testing.TB, of v1.Image, layers ...v1.Layer) v1.Image {
	t.Helper()
	config, err := of.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return images.WithConfig(t, images.Image(t, "linux/amd64", layers...), func(c *v1.ConfigFile) { *c = *config.DeepCopy() })
}

// packed is a layer of bytes that nobody packed.
func packed(content []byte, mt types.MediaType) v1.Layer { return static.NewLayer(content, mt) }

// What a layer may do to whoever unpacks it. The image's configuration always
// claims the base's contents, so that the layer is read; the claim then stays one
// and nothing fails.
func TestProofReadsNoHostileLayer(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base := push(t, host+"/base/debian", "12", amd(t, "r", "b"))
	honest := amd(t, "r", "b", "app")
	zeros := make([]byte, 64<<20)
	var gzipBomb bytes.Buffer
	w := gzip.NewWriter(&gzipBomb)
	w.Write(zeros)
	w.Close()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zstdBomb := enc.EncodeAll(zeros, nil)
	wide, err := zstd.NewWriter(nil, zstd.WithWindowSize(64<<20), zstd.WithSingleSegment(false))
	if err != nil {
		t.Fatal(err)
	}
	var wideFrame bytes.Buffer
	wide.Reset(&wideFrame)
	wide.Write(zeros[:40<<20])
	wide.Flush()
	wide.Write(zeros[:24<<20])
	wide.Close()
	good := images.Layer(t, "r", "gzip-9")
	trailing := append(compressed(t, good), "trailing"...)

	const cannot = "the contents of the layers could not be compared: "
	for _, row := range []struct {
		name   string
		layer  v1.Layer
		detail string // begins with
	}{
		{"G19 gzip bomb", packed(gzipBomb.Bytes(), types.OCILayer), "a layer unpacks to more than"},
		{"G19 zstd bomb", packed(zstdBomb, types.OCILayerZStd), "a layer unpacks to more than"},
		{"G19 zstd that needs much memory", packed(wideFrame.Bytes(), types.OCILayerZStd), "a layer needs more than 33554432 bytes of memory"},
		{"gzip that ends early", packed(compressed(t, good)[:500], types.OCILayer), "a layer cannot be unpacked: unexpected EOF"},
		{"gzip with something behind it", packed(trailing, types.OCILayer), "a layer cannot be unpacked: "},
		{"zstd with something behind it", packed(append(compressed(t, images.Layer(t, "r", "zstd")), "trailing"...), types.OCILayerZStd), "a layer cannot be unpacked: "},
		{"zstd called gzip", packed(compressed(t, images.Layer(t, "r", "zstd")), types.OCILayer), `a layer of type "application/vnd.oci.image.layer.v1.tar+gzip" is zstd`},
		{"gzip called an archive", packed(compressed(t, good), types.OCIUncompressedLayer), `a layer of type "application/vnd.oci.image.layer.v1.tar" is gzip`},
		{"an archive called gzip", packed([]byte("text"), types.OCILayer), `a layer of type "application/vnd.oci.image.layer.v1.tar+gzip" is tar`},
		{"G12 a foreign layer", packed(compressed(t, good), types.OCIRestrictedLayer), "layer sha256:"},
	} {
		t.Run(row.name, func(t *testing.T) {
			ref := push(t, host+"/team/app", "1", forged(t, honest, append([]v1.Layer{row.layer}, layers(t, "b", "app")...)...))
			got, err := c.Image(t.Context(), ref, base.String(), nil, anywhere)
			want(t, err, "")
			k := got.Base.Claims[0]
			if got.Base.Result != attest.Claimed || !strings.HasPrefix(k.Detail, cannot+row.detail) {
				t.Errorf("got %s %q", got.Base.Result, k.Detail)
			}
			if got.Base.Digest != base.Digest {
				t.Errorf("the claim lost its digest: %s", got.Base)
			}
		})
	}
}

func compressed(t testing.TB, l v1.Layer) []byte {
	t.Helper()
	r, err := l.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var out bytes.Buffer
	if _, err := out.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// What the registry may do with the layers and configurations that are read.
func TestProofOfWhatTheRegistryAnswers(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	base := push(t, host+"/base/debian", "12", amd(t, "r", "b"))
	img := amd(t, "r:zstd", "b", "app")
	ref := push(t, host+"/team/app", "1", img)
	first := digestOfLayer(t, img, 0)
	config, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	other := func(body string) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.Write([]byte(body)) }
	}
	status := func(code int) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.WriteHeader(code) }
	}
	// Its maker may have taken the image's configuration away, or given it another size.
	const lie = "the base's layers are not the first layers of the image"
	longer := string(compressed(t, images.Layer(t, "r", "zstd"))) + strings.Repeat("x", 1<<20)
	for _, row := range []struct {
		name, blob string
		answer     func(w http.ResponseWriter)
		reason     attest.Reason
		detail     string
	}{
		{"G02 a layer of other bytes", first, other("other"), "", `a layer of type "application/vnd.oci.image.layer.v1.tar+zstd" is tar`},
		{"G02 a layer of other bytes of its type", first, other(string(compressed(t, images.Layer(t, "evil", "zstd")))), "", "registry"},
		{"G19 a layer longer than said", first, other(longer), "", ""},
		{"a layer that is gone", first, status(404), "", "registry"},
		{"a layer that is denied", first, status(403), "", "registry"},
		{"a layer of a registry that is down", first, status(503), attest.RegistryUnavailable, ""},
		{"G11 a layer that is elsewhere", first, func(w http.ResponseWriter) {
			w.Header().Set("Location", "http://169.254.169.254/latest")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}, "", "registry"},
		{"D12 G02 a configuration of other bytes", config.String(), other(`{"rootfs":{}}`), "", lie},
		{"D12 G19 a configuration longer than said", config.String(), other(strings.Repeat(" ", 2<<20)), "", lie},
		{"D12 a configuration that is gone", config.String(), status(404), "", lie},
		{"a configuration of a registry that is down", config.String(), status(503), attest.RegistryUnavailable, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/team/app/blobs/"+row.blob) {
					return false
				}
				row.answer(w)
				return true
			})
			c := newClient(t, registry.Config{Hosts: plain(front)})
			at := attest.ImageRef{Repository: attest.Repository(front + "/team/app"), Digest: ref.Digest}
			got, err := c.Image(t.Context(), at, front+"/base/debian@"+base.Digest.String(), nil, anywhere)
			want(t, err, row.reason)
			if err != nil {
				return
			}
			k := got.Base.Claims[0]
			result, detail := attest.Claimed, "the contents of the layers could not be compared: "+row.detail
			if row.detail == lie {
				result, detail = attest.Contradicted, lie
			}
			if got.Base.Result != result || !strings.HasPrefix(k.Detail, detail) {
				t.Errorf("got %s %q", got.Base.Result, k.Detail)
			}
		})
	}
	t.Run("only layers that differ are read", func(t *testing.T) {
		var asked []string
		front := proxy(t, host, func(_ http.ResponseWriter, r *http.Request) bool {
			if _, blob, ok := strings.Cut(r.URL.Path, "/team/app/blobs/"); ok {
				asked = append(asked, blob)
			}
			return false
		})
		c := newClient(t, registry.Config{Hosts: plain(front)})
		got, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(front + "/team/app"), Digest: ref.Digest}, front+"/base/debian@"+base.Digest.String(), nil, anywhere)
		want(t, err, "")
		if diff := cmp.Diff([]string{config.String(), first}, asked); diff != "" || got.Base.Result != attest.ProvenDiffIDs {
			t.Errorf("%s %s", got.Base.Result, diff)
		}
	})
	t.Run("the layers are not read where the configurations differ", func(t *testing.T) {
		var asked atomic.Int64
		front := proxy(t, host, func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") && r.Method == http.MethodGet {
				asked.Add(1)
			}
			return false
		})
		c := newClient(t, registry.Config{Hosts: plain(front)})
		other := push(t, host+"/team/other", "1", amd(t, "x:zstd", "b", "app"))
		got, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(front + "/team/other"), Digest: other.Digest}, front+"/base/debian@"+base.Digest.String(), nil, anywhere)
		want(t, err, "")
		if got.Base.Result != attest.Contradicted || asked.Load() != 2 {
			t.Errorf("%s after %d blobs, want the two configurations only", got.Base.Result, asked.Load())
		}
	})
	t.Run("the tables of followed bases cannot be read", func(t *testing.T) {
		broken := errors.New("no disk")
		c := newClient(t, registry.Config{Hosts: plain(host)})
		_, err := c.Image(t.Context(), ref, "", func(context.Context, []attest.Digest) ([]registry.FollowedBase, error) { return nil, broken }, anywhere)
		if !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	})
}

func digestOfLayer(t testing.TB, img v1.Image, i int) string {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m.Layers[i].Digest.String()
}

// G19: the manifest says that a layer is smaller, or larger, than it is.
func TestG19LayerSizes(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	c := newClient(t, registry.Config{Hosts: plain(f.host())})
	kept := compressed(t, images.Layer(t, "r", "zstd"))
	archive := layers(t, "r")[0]
	diffID, err := archive.DiffID()
	if err != nil {
		t.Fatal(err)
	}
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + diffID.String() + `"]}}`
	set := func(repo string, blobs ...string) {
		for _, b := range blobs {
			f.set("/v2/"+repo+"/blobs/"+attest.Hash([]byte(b)).String(), page{body: b})
		}
	}
	of := func(layer string) string {
		return `{"schemaVersion":2,"mediaType":"` + ociManifest + `","config":` + descriptor("application/vnd.oci.image.config.v1+json", config, "") + `,"layers":[` + layer + `]}`
	}
	set("base/debian", config)
	set("team/app", config, string(kept))
	base := f.serve("base/debian", ociManifest, of(descriptor("application/vnd.oci.image.layer.v1.tar+gzip", string(compressed(t, archive)), "")))
	honest := descriptor("application/vnd.oci.image.layer.v1.tar+zstd", string(kept), "")
	for _, row := range []struct {
		name   string
		size   int
		result attest.BaseResult
		detail string
	}{
		{"its size", len(kept), attest.ProvenDiffIDs, ""},
		{"smaller", len(kept) - 1, attest.Claimed, ""},
		{"larger", len(kept) + 1, attest.Claimed, ""},
		{"nothing", 0, attest.Claimed, ""},
		{"more than is read", 2 << 30, attest.Claimed, "the layers have more than 1073741824 bytes"},
	} {
		t.Run("G19 "+row.name, func(t *testing.T) {
			layer := strings.Replace(honest, `"size":`+itoa(len(kept)), `"size":`+itoa(row.size), 1)
			got, err := c.Image(t.Context(), f.serve("team/app", ociManifest, of(layer)), base.String(), nil, anywhere)
			want(t, err, "")
			if got.Base.Result != row.result || !strings.HasSuffix(got.Base.Claims[0].Detail, row.detail) {
				t.Errorf("got %s %v", got.Base.Result, got.Base.Claims)
			}
		})
	}
}

// D12: a configuration that lists fewer contents, or more, than there are layers, or
// that cannot be read, proves nothing. The base's leaves the claim undecided; with the
// image's own its maker would decide that, so that the layers stand as they are.
func TestD12ConfigurationsThatDoNotListTheLayers(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base, app := amd(t, "r", "b"), amd(t, "r:zstd", "b", "app")
	listing := func(img v1.Image, n int) v1.Image {
		return images.WithConfig(t, img, func(c *v1.ConfigFile) {
			c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, c.RootFS.DiffIDs...)[:n]
		})
	}
	raw := func(config string, mt types.MediaType) v1.Image {
		m, err := app.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		m = m.DeepCopy()
		blob := static.NewLayer([]byte(config), mt)
		if m.Config.Digest, err = blob.Digest(); err != nil {
			t.Fatal(err)
		}
		m.Config.Size, m.Config.MediaType = int64(len(config)), mt
		all, err := app.Layers()
		if err != nil {
			t.Fatal(err)
		}
		return withoutConfig{Image: app, config: []byte(config), manifest: m, layers: all}
	}
	file, err := app.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	const lie = "the base's layers are not the first layers of the image"
	for _, row := range []struct {
		name      string
		base, app v1.Image
		detail    string
	}{
		{"the image's has a key twice", base, raw(`{"a":1,"a":2,`+string(file[1:]), types.OCIConfigJSON), lie},
		{"the image's is of another type", base, raw(string(file), "application/vnd.example.config"), lie},
		{"the image's is too large", base, raw(string(file)+strings.Repeat(" ", 4<<20), types.OCIConfigJSON), lie},
		{"the base's is empty", listing(base, 0), app, "the base's configuration does not list its layers"},
		{"the base's is too short", listing(base, 1), app, "the base's configuration does not list its layers"},
		{"the base's is too long", listing(base, 3), app, "the base's configuration does not list its layers"},
		{"the image's is empty", base, listing(app, 0), lie},
		{"the image's is too short", base, listing(app, 2), lie},
		{"the image's is too long", base, listing(app, 4), lie},
	} {
		t.Run(row.name, func(t *testing.T) {
			hint := push(t, host+"/base/debian", "12", row.base)
			got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", row.app), hint.String(), nil, anywhere)
			want(t, err, "")
			result := attest.Claimed
			if row.detail == lie {
				result = attest.Contradicted
			}
			if got.Base.Result != result || !strings.HasSuffix(got.Base.Claims[0].Detail, row.detail) {
				t.Errorf("got %s %q", got.Base.Result, got.Base.Claims[0].Detail)
			}
		})
	}
}

// withoutConfig is an image with a configuration that is none.
type withoutConfig struct {
	v1.Image
	config   []byte
	manifest *v1.Manifest
	layers   []v1.Layer
}

func (i withoutConfig) RawConfigFile() ([]byte, error)  { return i.config, nil }
func (i withoutConfig) Manifest() (*v1.Manifest, error) { return i.manifest, nil }
func (i withoutConfig) RawManifest() ([]byte, error)    { return json.Marshal(i.manifest) }
func (i withoutConfig) ConfigName() (v1.Hash, error)    { return i.manifest.Config.Digest, nil }
func (i withoutConfig) Digest() (v1.Hash, error)        { return partial.Digest(i) }
func (i withoutConfig) Size() (int64, error)            { return partial.Size(i) }
func (i withoutConfig) Layers() ([]v1.Layer, error)     { return i.layers, nil }

// D12: an image whose configuration names a platform that the base does not have may
// stand on any of them; that these are many makes nothing undecided.
func TestD12APlatformThatTheBaseDoesNotHave(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	platforms := map[string]v1.Image{}
	for _, arch := range []string{"amd64", "arm64", "s390x", "ppc64le", "riscv64", "386"} {
		platforms["linux/"+arch] = images.Image(t, "linux/"+arch, layers(t, arch+"-r", arch+"-b")...)
	}
	platforms["linux/mips"] = images.Image(t, "linux/mips", layers(t, "1", "2", "3", "4", "5")...)
	base := push(t, host+"/base/debian", "12", images.Index(t, platforms))
	for name, row := range map[string]struct {
		layers []string
		want   attest.BaseResult
	}{
		"other layers":     {[]string{"x", "y", "app"}, attest.Contradicted},
		"layers of one":    {[]string{"riscv64-r", "riscv64-b", "app"}, attest.ProvenLayers},
		"the longest ones": {[]string{"1:zstd", "2", "3", "4", "5", "app"}, attest.Contradicted},
	} {
		app := images.WithConfig(t, images.Image(t, "plan9/vax", layers(t, row.layers...)...), func(c *v1.ConfigFile) {
			if name == "the longest ones" {
				c.RootFS.DiffIDs = c.RootFS.DiffIDs[:1]
			}
		})
		got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", app), base.String(), nil, anywhere)
		want(t, err, "")
		if got.Base.Result != row.want {
			t.Errorf("%s: %+v", name, got.Base)
		}
	}
}

// G12: where a manifest says that a layer is kept elsewhere, nobody is asked.
func TestG12ForeignLayerIsNotRead(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	elsewhere := newFake(t, nil)
	c := newClient(t, registry.Config{Hosts: plain(host, elsewhere.host())})
	base := push(t, host+"/base/debian", "12", amd(t, "r", "b"))
	foreign, err := mutate.Append(images.Image(t, "linux/amd64"), mutate.Addendum{
		Layer: images.Layer(t, "r", "zstd"), MediaType: types.OCILayerZStd, URLs: []string{elsewhere.URL + "/layer"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if foreign, err = mutate.AppendLayers(foreign, layers(t, "b", "app")...); err != nil {
		t.Fatal(err)
	}
	got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", foreign), base.String(), nil, anywhere)
	want(t, err, "")
	if got.Base.Result != attest.Claimed || !strings.Contains(got.Base.Claims[0].Detail, "kept outside the registry") {
		t.Errorf("got %s %v", got.Base.Result, got.Base.Claims)
	}
	elsewhere.untouched(t)
}
