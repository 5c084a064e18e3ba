package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/registry"
)

// proved is what a process that proved one base has measured of itself.
type proved struct {
	Result    attest.BaseResult `json:"result"`
	Milli     float64           `json:"milli"`       // median of the proof with a new client
	PeakMiB   float64           `json:"peak_mib"`    // of the whole process
	FloorMill float64           `json:"floor_milli"` // reading the same manifests one after the other
}

// bases measures the proof of a base over a loopback registry. Each is done by a
// process of its own, so that its memory is nobody else's.
func (b *bench) bases() error {
	reg, err := dev.StartRegistry(b.ctx, "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer reg.Close()
	for _, what := range []struct {
		name              string
		platforms, layers int
		packing           compression.Compression
		want              attest.BaseResult
	}{
		{"200 layers", 1, 200, compression.GZip, attest.ProvenLayers},
		{"64 platforms of 10 layers", 64, 10, compression.GZip, attest.ProvenLayers},
		{"200 layers, 100 of them repacked", 1, 200, compression.ZStd, attest.ProvenDiffIDs},
		{"64 platforms of 10 layers, 5 of them repacked", 64, 10, compression.ZStd, attest.ProvenDiffIDs},
	} {
		base, err := pushImage(b.ctx, reg.Host()+"/base", what.platforms, what.layers/2, 0, compression.GZip)
		if err != nil {
			return err
		}
		image, err := pushImage(b.ctx, reg.Host()+"/app", what.platforms, what.layers, what.layers/2, what.packing)
		if err != nil {
			return err
		}
		got, err := proveElsewhere(b.ctx, image, base)
		if err != nil {
			return err
		}
		if got.Result != what.want {
			return fmt.Errorf("the base of an image with %s is %s, not %s", what.name, got.Result, what.want)
		}
		b.add(row{Name: "base proof: " + what.name, Value: got.Milli, Unit: "ms", Reach: "<= 2000", Floor: got.FloorMill, FloorIs: "its manifests read one by one"})
		b.add(row{Name: "base proof: " + what.name + ", memory", Value: got.PeakMiB, Unit: "MiB", Reach: "<= 64"})
	}
	return nil
}

// pushImage pushes an image of layers whose contents depend on their place only,
// the first repacked of them packed so. With more than one platform it is an
// index.
func pushImage(ctx context.Context, repo string, platforms, layers, repacked int, packing compression.Compression) (string, error) {
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var only v1.Image
	for p := range platforms {
		img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
		var all []v1.Layer
		for i := range layers {
			opts := []tarball.LayerOption{tarball.WithMediaType(types.OCILayer)}
			if i < repacked && packing == compression.ZStd {
				opts = []tarball.LayerOption{tarball.WithMediaType(types.OCILayerZStd), tarball.WithCompression(packing)}
			}
			text := []byte(strings.Repeat(fmt.Sprintf("platform %d, layer %d\n", p, i), 2000))
			l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil }, opts...)
			if err != nil {
				return "", err
			}
			all = append(all, l)
		}
		arch := "arch" + strconv.Itoa(p)
		img, err := mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: arch, RootFS: v1.RootFS{Type: "layers"}})
		if err == nil {
			only, err = mutate.AppendLayers(img, all...)
		}
		if err != nil {
			return "", err
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: only, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	tag, err := name.NewTag(repo + ":" + strconv.Itoa(platforms) + "-" + strconv.Itoa(repacked))
	if err != nil {
		return "", err
	}
	var what remote.Taggable = only
	if platforms > 1 {
		what = idx
	}
	if err := remote.Push(tag, what, remote.WithContext(ctx)); err != nil {
		return "", err
	}
	raw, err := what.RawManifest()
	return repo + "@" + attest.Hash(raw).String(), err
}

// proveElsewhere runs this program once more to prove one base.
func proveElsewhere(ctx context.Context, image, base string) (proved, error) {
	self, err := os.Executable()
	if err != nil {
		return proved{}, err
	}
	cmd := exec.CommandContext(ctx, self, "-prove", image, "-base", base)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err != nil {
		return proved{}, fmt.Errorf("proving a base in another process: %w", err)
	}
	var out proved
	return out, json.Unmarshal(text, &out)
}

// prove is what that process does.
func prove(ctx context.Context, image, base string, to io.Writer) error {
	ref, err := attest.ParseImageRef(image)
	if err != nil {
		return err
	}
	var out proved
	var took []time.Duration
	for range 5 {
		c, err := registry.New(registry.Config{Hosts: []registry.Host{{Host: ref.Repository.Host(), PlainHTTP: true}}})
		if err != nil {
			return err
		}
		start := time.Now()
		img, err := c.Image(ctx, ref, base, nil, nil)
		if err != nil {
			return err
		}
		took = append(took, time.Since(start))
		out.Result = img.Base.Result
	}
	slices.Sort(took)
	out.Milli = float64(took[2].Microseconds()) / 1000
	if out.PeakMiB, err = peakMiB(); err != nil {
		return err
	}
	baseRef, err := attest.ParseImageRef(base)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := errors.Join(readAll(ctx, ref), readAll(ctx, baseRef)); err != nil {
		return err
	}
	out.FloorMill = float64(time.Since(start).Microseconds()) / 1000
	return json.NewEncoder(to).Encode(out)
}

// readAll reads a manifest, and what an index lists, one after the other.
func readAll(ctx context.Context, ref attest.ImageRef) error {
	host, path, _ := strings.Cut(string(ref.Repository), "/")
	read := func(digest string) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/v2/"+path+"/manifests/"+digest, nil)
		if err != nil {
			return nil, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		return io.ReadAll(resp.Body)
	}
	raw, err := read(ref.Digest.String())
	if err != nil {
		return err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(raw, &index); err != nil {
		return err
	}
	for _, m := range index.Manifests {
		if _, err := read(m.Digest.String()); err != nil {
			return err
		}
	}
	return nil
}

// peakMiB is the most memory that this process ever held.
func peakMiB() (float64, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kib, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, err := strconv.ParseFloat(kib, 64)
	return n / 1024, err
}
