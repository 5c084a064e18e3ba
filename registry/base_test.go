package registry_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

func TestProveLayers(t *testing.T) {
	digests := func(s string) []attest.Digest {
		var out []attest.Digest
		for _, f := range strings.Fields(s) {
			out = append(out, attest.Hash([]byte(f)))
		}
		return out
	}
	for _, row := range []struct {
		name, image, base string
		want              bool
	}{
		{"first of three", "a b c", "a", true},
		{"first two of three", "a b c", "a b", true},
		{"all: only the config differs", "a b", "a b", true},
		{"base without layers", "a b", "", false},
		{"nothing on nothing", "", "", false},
		{"base is longer", "a", "a b", false},
		{"last", "a b", "b", false},
		{"in other order", "a b c", "b a", false},
		{"with a gap", "a b c", "a c", false},
		{"same layer twice", "a a b", "a a", true},
		{"other first layer", "a b c", "x b", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := registry.ProveLayers(digests(row.image), digests(row.base)); got != row.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

const (
	baseName   = "org.opencontainers.image.base.name"
	baseDigest = "org.opencontainers.image.base.digest"
)

func TestBase(t *testing.T) {
	host := devRegistry(t)
	down := newFake(t, nil)
	down.Close()
	denies := newFake(t, map[string]page{"/v2/": {status: 403}})
	evil := newFake(t, nil)
	c := newClient(t, registry.Config{
		Hosts:   plain(host, down.host(), denies.host(), evil.host()),
		Mirrors: []registry.Mirror{{From: host + "/hub/corp", To: "corp.example.com/images"}, {From: host + "/hub", To: "docker.io"}},
	})
	at := func(path string) string { return host + "/" + path }

	root := image(t, "r1")
	base := image(t, "r1", "b1")
	other := image(t, "o1")
	none := image(t)
	baseARM := image(t, "ra", "ba")
	multi := index(t, map[string]v1.Image{"linux/amd64": base, "linux/arm64/v8": baseARM})
	multiRoot := index(t, map[string]v1.Image{"linux/amd64": root, "linux/arm64": image(t, "ra")})
	amdOnly := index(t, map[string]v1.Image{"linux/amd64": base})

	refRoot := push(t, at("base/root"), "1", root)
	refBase := push(t, at("base/app"), "1", base)
	refOther := push(t, at("base/other"), "1", other)
	refNone := push(t, at("base/none"), "1", none)
	refMulti := push(t, at("base/multi"), "1", multi)
	refMultiRoot := push(t, at("base/multiroot"), "1", multiRoot)
	refAMD := push(t, at("base/amd"), "1", amdOnly)
	refHub := push(t, at("hub/library/debian"), "12", base)
	refCorp := push(t, at("hub/corp/jdk"), "21", base)
	evilBase := attest.Hash([]byte("evil"))
	evil.set("/v2/base/app/manifests/"+evilBase.String(), page{header: map[string]string{"Content-Type": ociManifest}, body: manifest("")})

	app := image(t, "r1", "b1", "a1")
	appARM := image(t, "ra", "ba", "aa")
	apps := func(pairs ...string) v1.ImageIndex {
		return annotate(index(t, map[string]v1.Image{"linux/amd64": app, "linux/arm64": appARM}), pairs...)
	}
	single := func(pairs ...string) v1.Image { return annotate(app, pairs...) }
	unknown := strings.Repeat("1", 64)

	type claim struct{ from, name, result, detail string }
	for _, row := range []struct {
		name   string
		image  interface{ RawManifest() ([]byte, error) }
		hint   string
		result attest.BaseResult
		base   string // repository[:tag]@digest, where known
		layers []int
		claims []claim
		reason attest.Reason
	}{
		{name: "nobody says anything", image: app, result: attest.Unclaimed},

		{name: "annotation with name and digest", image: single(baseName, at("base/app:1"), baseDigest, refBase.Digest.String()),
			result: attest.ProvenLayers, base: at("base/app:1@") + refBase.Digest.String(), layers: []int{2},
			claims: []claim{{"annotation", at("base/app:1"), "PROVEN_LAYERS", ""}}},
		{name: "annotation with the digest in the name", image: single(baseName, refBase.String()),
			result: attest.ProvenLayers, base: refBase.String(), layers: []int{2},
			claims: []claim{{"annotation", refBase.String(), "PROVEN_LAYERS", ""}}},
		{name: "annotation with tag only", image: single(baseName, at("base/app:1")),
			result: attest.ProvenLayers, base: at("base/app:1@") + refBase.Digest.String(), layers: []int{2},
			claims: []claim{{"annotation", at("base/app:1"), "PROVEN_LAYERS", ""}}},
		{name: "annotation with a tag that has moved on", image: single(baseName, at("base/other:1")),
			result: attest.Claimed, base: at("base/other:1"),
			claims: []claim{{"annotation", at("base/other:1"), "CLAIMED", "the tag now names an image with other layers"}}},
		{name: "annotation contradicted", image: single(baseName, at("base/other:1"), baseDigest, refOther.Digest.String()),
			result: attest.Contradicted, base: at("base/other:1@") + refOther.Digest.String(),
			claims: []claim{{"annotation", at("base/other:1"), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},
		{name: "annotation of a missing digest", image: single(baseName, at("base/app:1"), baseDigest, "sha256:"+unknown),
			result: attest.Claimed, base: at("base/app:1@sha256:") + unknown,
			claims: []claim{{"annotation", at("base/app:1"), "CLAIMED", "the base cannot be fetched: SUBJECT_NOT_FOUND"}}},
		{name: "annotation without name", image: single(baseDigest, refBase.Digest.String()), result: attest.Claimed,
			claims: []claim{{"annotation", "", "CLAIMED", "the annotation gives a digest but no repository"}}},
		{name: "annotation with neither tag nor digest", image: single(baseName, at("base/app")), result: attest.Claimed, base: at("base/app"),
			claims: []claim{{"annotation", at("base/app"), "CLAIMED", "the annotation gives neither tag nor digest"}}},
		{name: "annotation of Docker Hub's short name", image: single(baseName, "debian:12"), result: attest.ProvenLayers, base: "docker.io/library/debian:12@" + refHub.Digest.String(), layers: []int{2},
			claims: []claim{{"annotation", "debian:12", "PROVEN_LAYERS", ""}}},
		{name: "annotation of Docker Hub's API name", image: single(baseName, "index.docker.io/library/debian:12"), result: attest.ProvenLayers, base: "docker.io/library/debian:12@" + refHub.Digest.String(), layers: []int{2},
			claims: []claim{{"annotation", "index.docker.io/library/debian:12", "PROVEN_LAYERS", ""}}},
		{name: "annotation of a registry without a mirror", image: single(baseName, "ghcr.io/corp/debian:12"), result: attest.Claimed, base: "ghcr.io/corp/debian:12",
			claims: []claim{{"annotation", "ghcr.io/corp/debian:12", "CLAIMED", "registry ghcr.io is not configured"}}},
		{name: "annotation of a name whose place in the mirror belongs to another", image: single(baseName, "corp/jdk:21"), result: attest.Claimed, base: "docker.io/corp/jdk:21",
			claims: []claim{{"annotation", "corp/jdk:21", "CLAIMED", "registry docker.io is not configured"}}},
		{name: "G13 annotation of a host that is not configured", image: single(baseName, "169.254.169.254/latest/meta:1"), result: attest.Claimed, base: "169.254.169.254/latest/meta:1",
			claims: []claim{{"annotation", "169.254.169.254/latest/meta:1", "CLAIMED", "registry 169.254.169.254 is not configured"}}},
		{name: "annotation that is no reference", image: single(baseName, "no \x1b[31m reference"), result: attest.Claimed,
			claims: []claim{{"annotation", "no ?[31m reference", "CLAIMED", "the annotation is no image reference"}}},
		{name: "annotation with a digest of another algorithm", image: single(baseName, at("base/app:1"), baseDigest, "sha512:"+unknown), result: attest.Claimed, base: at("base/app:1"),
			claims: []claim{{"annotation", at("base/app:1"), "CLAIMED", "the digest in the annotation is no sha256 digest"}}},
		{name: "annotations of two digests", image: single(baseName, refBase.String(), baseDigest, refOther.Digest.String()), result: attest.Claimed, base: at("base/app@") + refOther.Digest.String(),
			claims: []claim{{"annotation", refBase.String(), "CLAIMED", "the annotation names two different digests"}}},
		{name: "base without layers", image: single(baseName, refNone.String()), result: attest.Claimed, base: refNone.String(),
			claims: []claim{{"annotation", refNone.String(), "CLAIMED", "the base has no layers that could prove it"}}},
		{name: "registry refuses", image: single(baseName, denies.host()+"/base/app:1"), result: attest.Claimed, base: denies.host() + "/base/app:1",
			claims: []claim{{"annotation", denies.host() + "/base/app:1", "CLAIMED", "the base cannot be fetched: REGISTRY_DENIED"}}},
		{name: "registry lies", image: single(baseName, evil.host()+"/base/app@"+evilBase.String()), result: attest.Claimed, base: evil.host() + "/base/app@" + evilBase.String(),
			claims: []claim{{"annotation", evil.host() + "/base/app@" + evilBase.String(), "CLAIMED", "the base cannot be fetched: DIGEST_MISMATCH"}}},
		{name: "registry down", image: single(baseName, down.host()+"/base/app:1"), reason: attest.RegistryUnavailable},
		{name: "registry of the hint down", image: app, hint: down.host() + "/base/app:1", reason: attest.RegistryUnavailable},

		{name: "hint by digest", image: app, hint: refBase.String(), result: attest.ProvenLayers, base: refBase.String(), layers: []int{2},
			claims: []claim{{"caller", refBase.String(), "PROVEN_LAYERS", ""}}},
		{name: "hint by tag", image: app, hint: at("base/app:1"), result: attest.ProvenLayers, base: at("base/app:1@") + refBase.Digest.String(), layers: []int{2},
			claims: []claim{{"caller", at("base/app:1"), "PROVEN_LAYERS", ""}}},
		{name: "hint by tag and digest", image: app, hint: at("base/other:1@") + refBase.Digest.String(), result: attest.Claimed, base: at("base/other:1@") + refBase.Digest.String(),
			claims: []claim{{"caller", at("base/other:1@") + refBase.Digest.String(), "CLAIMED", "the base cannot be fetched: SUBJECT_NOT_FOUND"}}},
		{name: "hint contradicted by digest", image: app, hint: refOther.String(), result: attest.Contradicted, base: refOther.String(),
			claims: []claim{{"caller", refOther.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},
		{name: "hint contradicted by tag", image: app, hint: at("base/other:1"), result: attest.Contradicted, base: at("base/other:1@") + refOther.Digest.String(),
			claims: []claim{{"caller", at("base/other:1"), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},
		{name: "hint contradicted, annotation proved", image: single(baseName, refBase.String()), hint: refOther.String(),
			result: attest.ProvenLayers, base: refBase.String(), layers: []int{2},
			claims: []claim{{"annotation", refBase.String(), "PROVEN_LAYERS", ""}, {"caller", refOther.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},
		{name: "hint proved, annotation contradicted", image: single(baseName, refOther.String()), hint: refBase.String(),
			result: attest.ProvenLayers, base: refBase.String(), layers: []int{2},
			claims: []claim{{"caller", refBase.String(), "PROVEN_LAYERS", ""}, {"annotation", refOther.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}}},
		{name: "hint claimed, annotation contradicted", image: single(baseName, refOther.String()), hint: "registry.example.com/base:1",
			result: attest.Contradicted, base: refOther.String(),
			claims: []claim{{"annotation", refOther.String(), "CONTRADICTED", "the base's layers are not the first layers of the image"}, {"caller", "registry.example.com/base:1", "CLAIMED", "registry registry.example.com is not configured"}}},
		{name: "an image as its own base", image: app, hint: at("team/app@") + digestOf(t, app).String(), result: attest.Contradicted, base: at("team/app@") + digestOf(t, app).String(),
			claims: []claim{{"caller", at("team/app@") + digestOf(t, app).String(), "CONTRADICTED", "an image is not its own base"}}},
		{name: "an index as its own base", image: apps(), hint: at("team/app@") + digestOf(t, apps()).String(), result: attest.Contradicted, base: at("team/app@") + digestOf(t, apps()).String(),
			claims: []claim{{"caller", at("team/app@") + digestOf(t, apps()).String(), "CONTRADICTED", "an image is not its own base"}}},
		{name: "hint without host", image: app, hint: "debian:12", reason: attest.BadReference},
		{name: "hint without tag and digest", image: app, hint: at("base/app"), reason: attest.BadReference},
		{name: "hint with a bad digest", image: app, hint: at("base/app@sha256:abc"), reason: attest.BadDigest},
		{name: "hint with tag and the zero digest", image: app, hint: at("base/app:1@sha256:") + strings.Repeat("0", 64), reason: attest.BadDigest},
		{name: "annotation with the zero digest", image: single(baseName, at("base/app:1"), baseDigest, "sha256:"+strings.Repeat("0", 64)), result: attest.Claimed, base: at("base/app:1"),
			claims: []claim{{"annotation", at("base/app:1"), "CLAIMED", "the digest in the annotation is no sha256 digest"}}},
		{name: "hint with a bad tag", image: app, hint: at("base/app:..x"), reason: attest.BadReference},

		{name: "base of a base: longest wins", image: single(baseName, refRoot.String()), hint: refBase.String(),
			result: attest.ProvenLayers, base: refBase.String(), layers: []int{2},
			claims: []claim{{"caller", refBase.String(), "PROVEN_LAYERS", ""}, {"annotation", refRoot.String(), "PROVEN_LAYERS", ""}}},
		{name: "equally long: the annotation is preferred", image: single(baseName, at("base/app:1")), hint: refBase.String(),
			result: attest.ProvenLayers, base: at("base/app:1@") + refBase.Digest.String(), layers: []int{2},
			claims: []claim{{"annotation", at("base/app:1"), "PROVEN_LAYERS", ""}, {"caller", refBase.String(), "PROVEN_LAYERS", ""}}},
		{name: "image that is no index on a base that is one", image: single(baseName, refMulti.String()),
			result: attest.ProvenLayers, base: refMulti.String(), layers: []int{2},
			claims: []claim{{"annotation", refMulti.String(), "PROVEN_LAYERS", ""}}},

		{name: "index on an index", image: apps(baseName, at("base/multi:1"), baseDigest, refMulti.Digest.String()),
			result: attest.ProvenLayers, base: at("base/multi:1@") + refMulti.Digest.String(), layers: []int{2, 2},
			claims: []claim{{"annotation", at("base/multi:1"), "PROVEN_LAYERS", ""}}},
		{name: "index on an index, longest wins", image: apps(baseName, refMultiRoot.String()), hint: refMulti.String(),
			result: attest.ProvenLayers, base: refMulti.String(), layers: []int{2, 2},
			claims: []claim{{"caller", refMulti.String(), "PROVEN_LAYERS", ""}, {"annotation", refMultiRoot.String(), "PROVEN_LAYERS", ""}}},
		{name: "index on a base without one of its platforms", image: apps(), hint: refAMD.String(), result: attest.Contradicted, base: refAMD.String(),
			claims: []claim{{"caller", refAMD.String(), "CONTRADICTED", "the base's layers are not the first layers of linux/arm64"}}},
		{name: "index on one platform's manifest", image: apps(), hint: refBase.String(), result: attest.Contradicted, base: refBase.String(),
			claims: []claim{{"caller", refBase.String(), "CONTRADICTED", "the base's layers are not the first layers of linux/arm64"}}},
		{name: "platforms that agree", image: index(t, map[string]v1.Image{"linux/amd64": annotate(app, baseName, refMulti.String()), "linux/arm64": annotate(appARM, baseName, refMulti.String())}),
			result: attest.ProvenLayers, base: refMulti.String(), layers: []int{2, 2},
			claims: []claim{{"annotation", refMulti.String(), "PROVEN_LAYERS", ""}}},
		{name: "only one platform claims", image: index(t, map[string]v1.Image{"linux/amd64": annotate(app, baseName, refMulti.String()), "linux/arm64": appARM}),
			result: attest.Claimed, base: refMulti.String(),
			claims: []claim{{"annotation", refMulti.String(), "CLAIMED", "claimed and proved for some platforms only"}}},
		{name: "platforms swapped in the base", image: index(t, map[string]v1.Image{"linux/arm64": app, "linux/amd64": appARM}), hint: refMulti.String(),
			result: attest.Contradicted, base: refMulti.String(),
			claims: []claim{{"caller", refMulti.String(), "CONTRADICTED", "the base's layers are not the first layers of linux/amd64, linux/arm64"}}},

		{name: "mirror is recorded by the canonical name", image: single(baseName, at("hub/library/debian:12")),
			result: attest.ProvenLayers, base: "docker.io/library/debian:12@" + refHub.Digest.String(), layers: []int{2},
			claims: []claim{{"annotation", at("hub/library/debian:12"), "PROVEN_LAYERS", ""}}},
		{name: "mirror by the longest prefix", image: app, hint: refCorp.String(),
			result: attest.ProvenLayers, base: "corp.example.com/images/jdk@" + refCorp.Digest.String(), layers: []int{2},
			claims: []claim{{"caller", refCorp.String(), "PROVEN_LAYERS", ""}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			ref := push(t, at("team/app"), "1", row.image)
			got, err := c.Image(t.Context(), ref, row.hint, nil, anywhere)
			want(t, err, row.reason)
			if err != nil {
				return
			}
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
			var claims []claim
			for _, k := range got.Base.Claims {
				claims = append(claims, claim{k.From, k.Name, string(k.Result), k.Detail})
			}
			if diff := cmp.Diff(row.layers, layers); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(row.claims, claims, cmp.AllowUnexported(claim{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// written writes what is known of a base.
func written(b attest.Base) string {
	s := string(b.Repository)
	if b.Tag != "" {
		s += ":" + b.Tag
	}
	if !b.Digest.IsZero() {
		s += "@" + b.Digest.String()
	}
	return s
}

// The proof names which manifest lies under which.
func TestBaseParts(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	amd, arm := image(t, "b"), image(t, "c")
	base := push(t, host+"/base/multi", "1", index(t, map[string]v1.Image{"linux/amd64": amd, "linux/arm64/v8": arm}))
	appAMD, appARM := image(t, "b", "x"), image(t, "c", "x", "y")
	ref := push(t, host+"/team/app", "1", index(t, map[string]v1.Image{"linux/amd64": appAMD, "linux/arm64": appARM}))
	got, err := c.Image(t.Context(), ref, base.String(), nil, anywhere)
	want(t, err, "")
	parts := []attest.BasePart{
		{Platform: "linux/amd64", Image: digestOf(t, appAMD), Base: digestOf(t, amd), Layers: 1},
		{Platform: "linux/arm64", Image: digestOf(t, appARM), Base: digestOf(t, arm), Layers: 1},
	}
	if diff := cmp.Diff(parts, got.Base.Platforms, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
}

// An image that names more bases than are looked up does not hide the caller's.
func TestBaseFlood(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base := push(t, host+"/base/app", "1", image(t, "b"))
	images := map[string]v1.Image{}
	for _, p := range strings.Fields("amd64 arm64 arm 386 ppc64le s390x riscv64 mips64le mips loong64") {
		images["linux/"+p] = annotate(image(t, "b", p), baseName, host+"/base/"+p+"@"+base.Digest.String())
	}
	got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", index(t, images)), base.String(), nil, anywhere)
	want(t, err, "")
	if got.Base.Result != attest.ProvenLayers || len(got.Base.Claims) != 11 {
		t.Errorf("got %+v", got.Base)
	}
	skipped := 0
	for _, k := range got.Base.Claims {
		if strings.Contains(k.Detail, "too many") {
			skipped++
		}
	}
	if skipped != 3 {
		t.Errorf("%d claims were not looked up, want 3", skipped)
	}
}
