package registry_test

import (
	"context"
	"fmt"
	"net/http"
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

// However many layers one repository has to be read, those of others are read too: a
// registry that never ends one keeps only its own repository waiting (attacks G19).
func TestG19OneRepositoryLeavesRoomForOthers(t *testing.T) {
	host := devRegistry(t)
	base := push(t, host+"/base/debian", "12", amd(t, "r", "b"))
	first := digestOfLayer(t, amd(t, "r:zstd"), 0)
	stuck, release := make(chan struct{}, 8), make(chan struct{})
	front := proxy(t, host, func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/greedy/app/blobs/"+first) {
			stuck <- struct{}{}
			<-release
		}
		return false
	})
	c := newClient(t, registry.Config{Hosts: plain(front)})
	prove := func(repo string, ref attest.ImageRef) error {
		got, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(front + repo), Digest: ref.Digest}, front+"/base/debian@"+base.Digest.String(), nil, anywhere)
		if err == nil && got.Base.Result != attest.ProvenDiffIDs {
			t.Errorf("%s: %+v", repo, got.Base)
		}
		return err
	}
	var g errgroup.Group
	for i := range 4 {
		ref := push(t, host+"/greedy/app", "v1", amd(t, "r:zstd", "b", fmt.Sprint("app", i)))
		g.Go(func() error { return prove("/greedy/app", ref) })
	}
	<-stuck
	want(t, prove("/team/app", push(t, host+"/team/app", "v1", amd(t, "r:zstd", "b", "app"))), "")
	if n := len(stuck); n != 0 {
		t.Errorf("%d further layers of one repository are read at the same time", n)
	}
	close(release)
	want(t, g.Wait(), "")
}
