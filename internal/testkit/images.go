package testkit

import (
	"context"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
)

// Annotations by which an image says what it was built on (OCI image-spec
// annotations.md).
const (
	baseNameAnnotation   = "org.opencontainers.image.base.name"
	baseDigestAnnotation = "org.opencontainers.image.base.digest"
)

// Pushed is an image that a registry has.
type Pushed struct {
	attest.ImageRef
	Image v1.Image // nil of an index
}

// RandomImage returns an image with one random layer, as OCI media types.
func RandomImage(t testing.TB) v1.Image {
	t.Helper()
	layer := must(random.Layer(256, types.OCILayer))(t)
	img := must(mutate.AppendLayers(mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1), layer))(t)
	cfg := must(img.ConfigFile())(t).DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	return must(mutate.ConfigFile(img, cfg))(t)
}

// Push pushes img to a repository of the stack's registry, for example
// "acme/api", and under a tag when one is given.
func (s *Stack) Push(repository, tag string, img v1.Image) Pushed {
	s.t.Helper()
	repo := s.Registry.Host() + "/" + repository
	d := must(img.Digest())(s.t)
	check(s.t, remote.Write(must(name.NewDigest(repo+"@"+d.String(), name.Insecure))(s.t), img, remote.WithContext(s.context())))
	if tag != "" {
		check(s.t, remote.Tag(must(name.NewTag(repo+":"+tag, name.Insecure))(s.t), img, remote.WithContext(s.context())))
	}
	return Pushed{must(attest.ParseImageRef(repo + "@" + d.String()))(s.t), img}
}

// PushBase pushes a random image as base/REPOSITORY:TAG.
func (s *Stack) PushBase(repository, tag string) Pushed {
	s.t.Helper()
	return s.Push("base/"+repository, tag, RandomImage(s.t))
}

// PushOn pushes an image that is base with one more random layer and says so in
// its annotations.
func (s *Stack) PushOn(base Pushed, tag, repository string) Pushed {
	s.t.Helper()
	layer := must(random.Layer(256, types.OCILayer))(s.t)
	img := must(mutate.AppendLayers(base.Image, layer))(s.t)
	on := string(base.Repository)
	if tag != "" {
		on += ":" + tag
	}
	annotated := mutate.Annotations(img, map[string]string{
		baseNameAnnotation: on, baseDigestAnnotation: base.Digest.String(),
	}).(v1.Image)
	return s.Push(repository, "", annotated)
}

// PushApp pushes a new image on a new base base/debian:12 to a repository, for
// example "acme/api": what a build does.
func (s *Stack) PushApp(repository string) Pushed {
	s.t.Helper()
	return s.PushOn(s.PushBase("debian", "12"), "12", repository)
}

// PushIndex pushes an index of two random images for two platforms.
func (s *Stack) PushIndex(repository string) (Pushed, []attest.Digest) {
	s.t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var children []attest.Digest
	for _, arch := range []string{"amd64", "arm64"} {
		img := RandomImage(s.t)
		cfg := must(img.ConfigFile())(s.t).DeepCopy()
		cfg.Architecture = arch
		img = must(mutate.ConfigFile(img, cfg))(s.t)
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
		children = append(children, must(attest.ParseDigest(must(img.Digest())(s.t).String()))(s.t))
	}
	d := must(idx.Digest())(s.t)
	ref := s.Registry.Host() + "/" + repository + "@" + d.String()
	check(s.t, remote.WriteIndex(must(name.NewDigest(ref, name.Insecure))(s.t), idx, remote.WithContext(s.context())))
	return Pushed{ImageRef: must(attest.ParseImageRef(ref))(s.t)}, children
}

func (s *Stack) context() context.Context { return context.WithoutCancel(s.t.Context()) }
