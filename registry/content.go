package registry

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"hash"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
)

// Limits on what is read beside manifests to find the base of one image.
const (
	maxConfig  = 4 << 20  // bytes of an image's configuration
	maxConfigs = 16 << 20 // bytes of the configurations of one image's platforms

	// Layers are downloaded only where the configurations already say that the
	// contents are the same and the compression is not.
	maxDownload = 1 << 30 // bytes of layers, as they are kept
	maxContent  = 4 << 30 // bytes of layers, unpacked
	maxRatio    = 200     // how much larger than it is kept a layer may be, beyond 16 MiB
	maxHashing  = 20 * time.Second
	maxWindow   = 32 << 20 // bytes that a zstd layer may refer back to
	maxHashers  = 2        // layers that the process hashes at a time
)

// limit is what is left of an allowance that goroutines share.
type limit int64

// take reports whether n was left, and takes it.
func (l *limit) take(n int64) bool { return n >= 0 && atomic.AddInt64((*int64)(l), -n) >= 0 }

// budget bounds what one image may make this process download and hash.
type budget struct {
	download limit
	content  limit
	time     time.Duration
	hashed   map[attest.Digest]attest.Digest // contents by layer
}

func newBudget() budget {
	return budget{download: maxDownload, content: maxContent, time: maxHashing, hashed: map[attest.Digest]attest.Digest{}}
}

// imageConfig is what is read of an image's configuration. All of it is what the
// builder wrote: nothing here is proved.
type imageConfig struct {
	diffIDs  []attest.Digest
	labels   map[string]string // only those that name a base
	platform *v1.Platform
	err      error // why nothing is known
}

// readConfigs reads the configuration of every platform. One that cannot be read
// says nothing; only an outage is an error.
func (q *inquiry) readConfigs(ctx context.Context) error {
	left := limit(maxConfigs)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i := range q.parts {
		p := &q.parts[i]
		if !left.take(p.doc.image.Config.Size) {
			p.config.err = attest.Errorf(attest.TooLarge, "the configurations have more than %d bytes together", int64(maxConfigs))
			continue
		}
		g.Go(func() error {
			c, err := q.config(ctx, q.repo, p.doc)
			if err != nil && outage(err) {
				return err
			}
			p.config, p.config.err = c, err
			return nil
		})
	}
	return g.Wait()
}

// config reads the configuration that a manifest names, by its digest.
func (c *Client) config(ctx context.Context, repo attest.Repository, doc *document) (imageConfig, error) {
	d := doc.image.Config
	switch {
	case !d.MediaType.IsConfig():
		return imageConfig{}, attest.Errorf(attest.ManifestAmbiguous, "the configuration is of another type")
	case d.Size > maxConfig:
		return imageConfig{}, attest.Errorf(attest.TooLarge, "the configuration has %d bytes", d.Size)
	}
	free, err := take(ctx, c.room.single, d.Size)
	if err != nil {
		return imageConfig{}, err
	}
	defer free()
	raw, err := c.blob(ctx, repo, d)
	if err != nil {
		return imageConfig{}, err
	}
	return parseConfig(raw)
}

// parseConfig reads an image's configuration (image-spec config.md).
func parseConfig(raw []byte) (imageConfig, error) {
	if err := attest.StrictJSON(raw, maxDepth); err != nil {
		return imageConfig{}, err
	}
	var config struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
		RootFS       struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
		Config struct {
			Labels map[string]string `json:"Labels"`
		} `json:"config"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		return imageConfig{}, attest.Errorf(attest.BadJSON, "the configuration does not have the fields of its type")
	}
	if n := len(config.RootFS.DiffIDs); n > maxLayers {
		return imageConfig{}, attest.Errorf(attest.TooLarge, "the configuration lists %d layers", n)
	}
	out := imageConfig{labels: map[string]string{}}
	for _, s := range config.RootFS.DiffIDs {
		d, err := attest.ParseDigest(s)
		if err != nil {
			return imageConfig{}, attest.Errorf(attest.BadDigest, "the configuration names a layer by a digest that is not sha256")
		}
		out.diffIDs = append(out.diffIDs, d)
	}
	for _, name := range []string{annotationBaseName, annotationBaseDigest, buildpacks} {
		if v := config.Config.Labels[name]; v != "" {
			out.labels[name] = strings.Clone(v)
		}
	}
	if config.OS != "" && config.Architecture != "" {
		out.platform = &v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
	}
	return out, nil
}

// blob fetches a small blob, whose size the caller has bounded. Its bytes are
// those of its descriptor or the answer is DIGEST_MISMATCH.
func (c *Client) blob(ctx context.Context, repo attest.Repository, d v1.Descriptor) ([]byte, error) {
	s, err := c.session(ctx, repo, transport.PullScope)
	if err != nil {
		return nil, err
	}
	a, err := s.do(ctx, http.MethodGet, "blobs/"+d.Digest.String(), nil, max(d.Size, maxOther))
	if err != nil {
		return nil, err
	}
	if a.status != http.StatusOK {
		return nil, s.host.refusal(a.status, a.body)
	}
	if attest.Hash(a.body) != digestOf(d) || int64(len(a.body)) != d.Size {
		return nil, attest.Errorf(attest.DigestMismatch, "registry %s answers for %s with other bytes", repo.Host(), d.Digest)
	}
	return a.body, nil
}

// sameContent reports whether the first layers of a part have the contents of all
// the layers of b, which is a base in the repository at.
//
// The image's configuration says which contents its layers have, and it is the
// word of whoever made the image: the layers are downloaded and hashed here. The
// base's configuration says the same of the base. It is not recomputed: the
// base's digest covers it, so that it is the word of whoever made the base, who
// decides what the base is anyway; and no runtime unpacks a base whose
// configuration lies (facts/ci-identity 3.2 step 5).
func (q *inquiry) sameContent(ctx context.Context, at attest.Repository, p part, b *document) (bool, error) {
	n := len(b.image.Layers)
	if n == 0 || n > len(p.doc.image.Layers) || !p.doc.onlyLayers() || !b.onlyLayers() {
		return false, nil
	}
	// 1. What both configurations say. When that differs already, nothing is
	// downloaded: no image runs whose configuration lies about its layers.
	// Nor is it when the image's own cannot be used: whoever made the image could
	// turn a disproved base into an unproved one with it (attacks D12).
	if p.config.err != nil || len(p.config.diffIDs) != len(p.doc.image.Layers) {
		return false, nil
	}
	base, err := q.config(ctx, at, b)
	if err != nil {
		return false, err
	}
	if len(base.diffIDs) != n {
		return false, attest.Errorf(attest.ManifestAmbiguous, "the base's configuration does not list its layers")
	}
	for i, d := range base.diffIDs {
		if p.config.diffIDs[i] != d {
			return false, nil
		}
	}
	// 2. What is so. A layer of the same digest has the same content.
	for i, d := range base.diffIDs {
		l := p.doc.image.Layers[i]
		if digestOf(l) == digestOf(b.image.Layers[i]) {
			continue
		}
		content, err := q.content(ctx, l)
		if err != nil || content != d {
			return false, err
		}
	}
	return true, nil
}

// content returns the digest of what a layer unpacks to, its diff id.
func (q *inquiry) content(ctx context.Context, l v1.Descriptor) (attest.Digest, error) {
	if d, ok := q.budget.hashed[digestOf(l)]; ok {
		return d, nil
	}
	if err := checkForeign(l); err != nil {
		return attest.Digest{}, err
	}
	if q.budget.time <= 0 {
		return attest.Digest{}, tooSlow
	}
	if !q.budget.download.take(l.Size) {
		return attest.Digest{}, attest.Errorf(attest.TooLarge, "the layers have more than %d bytes", int64(maxDownload))
	}
	// One layer of a repository at a time, so that no repository keeps the others
	// waiting with what is pushed to it: those that wait take turns.
	done, err := q.locks.lock(ctx, "layers of "+string(q.repo))
	if err != nil {
		return attest.Digest{}, tooBusy(ctx)
	}
	defer done()
	select {
	case q.hashers <- struct{}{}:
		defer func() { <-q.hashers }()
	case <-ctx.Done():
		return attest.Digest{}, tooBusy(ctx)
	}
	started := time.Now()
	within, cancel := context.WithTimeout(ctx, q.budget.time)
	defer cancel()
	d, size, err := q.unpack(within, l)
	q.budget.time -= time.Since(started)
	if err != nil && ctx.Err() == nil && within.Err() != nil {
		err = tooSlow
	}
	if err != nil {
		return attest.Digest{}, err
	}
	q.budget.content -= limit(size)
	q.budget.hashed[digestOf(l)] = d
	return d, nil
}

func tooBusy(ctx context.Context) error {
	return &attest.Error{Reason: attest.RegistryUnavailable, Message: "the layers of too many images are being read: try again later", Err: ctx.Err()}
}

var tooSlow = attest.Errorf(attest.TooLarge, "reading the layers takes longer than %v", maxHashing)

// unpack downloads a layer, holding none of it, and returns the digest and size
// of its content.
func (q *inquiry) unpack(ctx context.Context, l v1.Descriptor) (attest.Digest, int64, error) {
	s, err := q.session(ctx, q.repo, transport.PullScope)
	if err != nil {
		return attest.Digest{}, 0, err
	}
	resp, err := s.send(ctx, http.MethodGet, "blobs/"+l.Digest.String(), nil)
	if err != nil {
		return attest.Digest{}, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return attest.Digest{}, 0, s.host.refusal(resp.StatusCode, nil)
	}
	kept := &reading{from: io.LimitReader(resp.Body, l.Size+1), hash: sha256.New()}
	most := min(int64(q.budget.content), maxRatio*l.Size+16<<20)
	content, size, err := decompressed(kept, l.MediaType, most)
	switch {
	case kept.failed != nil:
		return attest.Digest{}, 0, s.host.failure(ctx, kept.failed)
	case err != nil:
		return attest.Digest{}, 0, err
	}
	// A decompressor stops where its format ends; the layer ends there too or its
	// digest is another.
	if kept.n != l.Size || attest.Digest(kept.hash.Sum(nil)) != digestOf(l) {
		return attest.Digest{}, 0, attest.Errorf(attest.DigestMismatch, "registry %s answers for %s with other bytes", s.host.name, l.Digest)
	}
	return content, size, nil
}

// reading counts and hashes what is read, and tells a failure to read from one
// to decompress.
type reading struct {
	from   io.Reader
	hash   hash.Hash
	n      int64
	failed error
}

func (r *reading) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	r.n += int64(n)
	r.hash.Write(p[:n])
	if err != nil && err != io.EOF {
		r.failed = err
	}
	return n, err
}

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// decompressed hashes what r, a layer of the type mt, unpacks to: at most most
// bytes. Runtimes look at the bytes and not at the type (containerd
// archive/compression), so one that says something else is not read.
func decompressed(r io.Reader, mt types.MediaType, most int64) (attest.Digest, int64, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return attest.Digest{}, 0, err
	}
	kind := "tar"
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		kind = "gzip"
	case bytes.HasPrefix(magic, zstdMagic):
		kind = "zstd"
	}
	if s := string(mt); !strings.HasSuffix(s, kind) {
		return attest.Digest{}, 0, attest.Errorf(attest.ManifestAmbiguous, "a layer of type %q is %s", clip(s), kind)
	}
	var out io.Reader = in
	switch kind {
	case "gzip":
		z, err := gzip.NewReader(in)
		if err != nil {
			return attest.Digest{}, 0, corrupt(err)
		}
		out = z
	case "zstd":
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return attest.Digest{}, 0, corrupt(err)
		}
		defer z.Close()
		out = z
	}
	buffer := copyBuffers.Get().(*[64 << 10]byte)
	defer copyBuffers.Put(buffer)
	h := sha256.New()
	n, err := io.CopyBuffer(h, io.LimitReader(out, most+1), buffer[:])
	switch {
	case err != nil:
		return attest.Digest{}, 0, corrupt(err)
	case n > most:
		return attest.Digest{}, 0, attest.Errorf(attest.TooLarge, "a layer unpacks to more than %d bytes", most)
	}
	return attest.Digest(h.Sum(nil)), n, nil
}

var copyBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

func corrupt(err error) error {
	var known *attest.Error
	if errors.As(err, &known) {
		return known
	}
	if errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		return attest.Errorf(attest.TooLarge, "a layer needs more than %d bytes of memory to be unpacked", maxWindow)
	}
	return attest.Errorf(attest.ManifestAmbiguous, "a layer cannot be unpacked: %s", cause(err))
}
