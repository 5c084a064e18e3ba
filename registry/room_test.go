package registry_test

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

// However many images are looked at, what is held of them all is bounded, and the
// others wait their turn (attacks G19).
func TestG19ManyLargeImagesAtATime(t *testing.T) {
	f := newFake(t, nil)
	c := newClient(t, registry.Config{Hosts: plain(f.host())})
	var list []string
	for i, arch := range []string{"amd64", "arm64"} {
		body := manifest(fmt.Sprintf(`,"annotations":{"n":"%d","a":%q}`, i, strings.Repeat("a", 3<<20)))
		d := f.serve("acme", ociManifest, body).Digest
		list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"platform":{"os":"linux","architecture":%q}}`, ociManifest, d, len(body), arch))
	}
	var held atomic.Int32
	var first sync.Once
	followed := func(ctx context.Context, _ []attest.Digest) ([]registry.FollowedBase, error) {
		// Two of these fit. The first one stays until another one waits.
		if n := held.Add(1); n > 2 {
			t.Errorf("%d images of 6 MiB are held", n)
		}
		first.Do(func() {
			for !c.Crowded() && held.Load() <= 2 && ctx.Err() == nil {
				runtime.Gosched()
			}
		})
		held.Add(-1)
		return nil, nil
	}
	var g errgroup.Group
	for i := range 8 {
		ref := f.serve("acme", ociIndex, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s],"annotations":{"n":"%d"}}`, ociIndex, strings.Join(list, ","), i))
		g.Go(func() error {
			_, err := c.Image(t.Context(), ref, "", followed, anywhere)
			return err
		})
	}
	want(t, g.Wait(), "")
	if c.Crowded() {
		t.Error("room was not given back")
	}
}

// A manifest of very many small things takes far more memory than its bytes (attacks G19).
func TestG19ManifestOfManyThings(t *testing.T) {
	layer := descriptor("application/vnd.oci.image.layer.v1.tar", "layer", "") + ","
	for name, row := range map[string]struct {
		body   string
		reason attest.Reason
	}{
		"4096 layers":           {strings.Repeat(layer, 4096), ""},
		"4097 layers":           {strings.Repeat(layer, 4097), attest.TooLarge},
		"a million empty ones":  {strings.Repeat("{},", 1_000_000), attest.TooLarge},
		"commas in a text":      {`{"mediaType":"` + strings.Repeat(`,\"`, 100_000) + `",` + layer[1:], ""},
		"quotes before a comma": {`{"mediaType":"\\",` + layer[1:] + strings.Repeat("{},", 70_000), attest.TooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			layers := strings.ReplaceAll(row.body, `"mediaType":"application/vnd.oci.image.layer.v1.tar",`, "")
			err := registry.Parse([]byte(`{"schemaVersion":2,"mediaType":"`+ociManifest+`","config":`+descriptor("application/vnd.oci.image.config.v1+json", "{}", "")+
				`,"layers":[`+strings.TrimSuffix(layers, ",")+`]}`), ociManifest)
			want(t, err, row.reason)
		})
	}
}
