package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// file is one entry of a layer: a symbolic link when link is set.
type file struct {
	path, link string
	data       []byte
}

// busyboxPath is where Debian's busybox-static puts it.
const busyboxPath = "/bin/busybox"

// baseImage returns an image with a static busybox and its shell.
func baseImage() (v1.Image, error) {
	busybox, err := os.ReadFile(busyboxPath)
	if err != nil {
		return nil, fmt.Errorf("the base image is made from busybox-static, which make demo installs: %w", err)
	}
	l, err := layer([]file{
		{path: "bin/busybox", data: busybox}, {path: "bin/sh", link: "busybox"}, {path: "bin/ls", link: "busybox"},
		{path: "etc/passwd", data: []byte("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
	})
	if err != nil {
		return nil, err
	}
	return imageOn(oci(empty.Image), l, nil)
}

// appImage returns the image of Hallmark itself on a base.
func appImage(base v1.Image, baseName, commit, bin string) (v1.Image, error) {
	var files []file
	for _, b := range []string{"hallmark", "hallmarkd"} {
		data, err := os.ReadFile(filepath.Join(bin, b))
		if err != nil {
			return nil, err
		}
		files = append(files, file{path: "usr/bin/" + b, data: data})
	}
	l, err := layer(files)
	if err != nil {
		return nil, err
	}
	digest, err := base.Digest()
	if err != nil {
		return nil, err
	}
	return imageOn(base, l, map[string]string{
		"org.opencontainers.image.base.name":   baseName,
		"org.opencontainers.image.base.digest": digest.String(),
		"org.opencontainers.image.revision":    commit,
	})
}

func oci(img v1.Image) v1.Image {
	return mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
}

// imageOn adds a layer and annotations to an image.
func imageOn(base v1.Image, l v1.Layer, annotations map[string]string) (v1.Image, error) {
	img, err := mutate.Append(base, mutate.Addendum{Layer: l, MediaType: types.OCILayer})
	if err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Config.Entrypoint = []string{"/usr/bin/hallmarkd"}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return nil, err
	}
	if annotations == nil {
		return img, nil
	}
	return mutate.Annotations(img, annotations).(v1.Image), nil
}

// layer returns a layer with the files, without times so that the same files are
// the same digest.
func layer(files []file) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.path, Mode: 0o755, Size: int64(len(f.data)), Typeflag: tar.TypeReg, Format: tar.FormatPAX}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
}

// push writes an image under a tag and returns REPO@DIGEST.
func (d *demo) push(repo, tag string, img v1.Image) (string, error) {
	ref, err := name.NewTag(d.env.Registry+"/"+repo+":"+tag, name.Insecure)
	if err != nil {
		return "", err
	}
	if err := remote.Write(ref, img, remote.WithContext(d.ctx)); err != nil {
		return "", fmt.Errorf("pushing %s: %w", ref, err)
	}
	digest, err := img.Digest()
	if err != nil {
		return "", err
	}
	return ref.Repository.Name() + "@" + digest.String(), nil
}

// headCommit returns the commit of this checkout.
func headCommit() (string, error) {
	out, err := exec.Command("git", "rev-parse", "HEAD").Output()
	if err != nil {
		return "", fmt.Errorf("the demo signs the image of this checkout's HEAD: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
