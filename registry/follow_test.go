package registry_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/images"
	"github.com/hallmarkd/hallmark/registry"
)

// These hashes are kept in tables: others would find nothing there any more.
func TestPrefixHashes(t *testing.T) {
	a, b := attest.Hash([]byte("a")), attest.Hash([]byte("b"))
	got := registry.PrefixHashes([]attest.Digest{a, b})
	golden := []string{
		"sha256:0585fd0760e7359cf58f7532c0068d685070f7ecc8cb97d4a3691f514328aebf",
		"sha256:c21eb13f2628c60c38ff53dec6718c628176316d46fb5d0cb6deab5158d941aa",
	}
	if diff := cmp.Diff(golden, []string{got[0].String(), got[1].String()}); diff != "" {
		t.Error(diff)
	}
	if one := registry.PrefixHashes([]attest.Digest{a}); one[0] != got[0] {
		t.Error("a prefix has another hash by itself")
	}
	if swapped := registry.PrefixHashes([]attest.Digest{b, a}); swapped[1] == got[1] {
		t.Error("the order of the layers is not in the hash")
	}
	if got[0] == a || len(registry.PrefixHashes(nil)) != 0 {
		t.Error("a hash of layers is not told from a layer's")
	}
}

func TestFollow(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host), Mirrors: []registry.Mirror{{From: host + "/hub", To: "docker.io"}}})
	of := func(img v1.Image) attest.Digest {
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		var out []attest.Digest
		for _, l := range m.Layers {
			d, err := attest.ParseDigest(l.Digest.String())
			want(t, err, "")
			out = append(out, d)
		}
		hashes := registry.PrefixHashes(out)
		return hashes[len(hashes)-1]
	}
	amd64, arm64 := amd(t, "r", "b"), images.Image(t, "linux/arm64", layers(t, "q")...)
	blob, err := mutate.Append(amd64, mutate.Addendum{Layer: images.Layer(t, "x", "none"), MediaType: "application/vnd.example"})
	if err != nil {
		t.Fatal(err)
	}
	several := images.Index(t, map[string]v1.Image{
		"linux/amd64": amd64, "linux/arm64": arm64, "linux/s390x": blob, "linux/riscv64": images.Image(t, "linux/riscv64"),
	})
	ref := push(t, host+"/hub/library/debian", "12", built(t, several, provenanceV1))
	one := push(t, host+"/base/one", "1", amd64)
	name := attest.BaseName{Repository: "docker.io/library/debian", Tag: "12", Digest: ref.Digest}
	expect := []registry.FollowedBase{
		{BaseName: name, Platform: "linux/amd64", Manifest: digestOf(t, amd64), Prefix: of(amd64), Layers: 2},
		{BaseName: name, Platform: "linux/arm64", Manifest: digestOf(t, arm64), Prefix: of(arm64), Layers: 1},
	}
	for _, repo := range []string{"docker.io/library/debian", host + "/hub/library/debian"} {
		if diff := cmp.Diff(expect, follow(t, c, repo, "12")); diff != "" {
			t.Errorf("%s: %s", repo, diff)
		}
	}
	single := []registry.FollowedBase{{BaseName: attest.BaseName{Repository: one.Repository, Tag: "1", Digest: one.Digest}, Manifest: one.Digest, Prefix: of(amd64), Layers: 2}}
	if diff := cmp.Diff(single, follow(t, c, string(one.Repository), "1")); diff != "" {
		t.Error(diff)
	}
	_, err = c.Follow(t.Context(), one.Repository, "gone")
	want(t, err, attest.SubjectNotFound)
	_, err = c.Follow(t.Context(), one.Repository, "../x")
	want(t, err, attest.BadReference)
	_, err = c.Follow(t.Context(), "ghcr.io/a/b", "1")
	want(t, err, attest.HostNotAllowed)
}

// Rows that lie: hashes without their layers, other counts, other platforms.
func TestMatchedIsChecked(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base := push(t, host+"/base/debian", "12", both(t, "r", "b"))
	ref := push(t, host+"/team/app", "1", both(t, "r", "b", "app"))
	honest := follow(t, c, host+"/base/debian", "12")
	change := func(f func(*registry.FollowedBase)) []registry.FollowedBase {
		out := append([]registry.FollowedBase{}, honest...)
		f(&out[0])
		return out
	}
	for _, row := range []struct {
		name   string
		rows   []registry.FollowedBase
		result attest.BaseResult
	}{
		{"honest", honest, attest.Matched},
		{"none", nil, attest.Unclaimed},
		{"a count that is not the hash's", change(func(b *registry.FollowedBase) { b.Layers = 1 }), attest.Unclaimed},
		{"more layers than the image has", change(func(b *registry.FollowedBase) { b.Layers = 9 }), attest.Unclaimed},
		{"no layers", change(func(b *registry.FollowedBase) { b.Layers = 0 }), attest.Unclaimed},
		{"another platform", change(func(b *registry.FollowedBase) { b.Platform = "linux/s390x" }), attest.Unclaimed},
		{"one platform of another version of the base", change(func(b *registry.FollowedBase) { b.Digest = attest.Hash(nil) }), attest.Unclaimed},
		{"a base without an index", change(func(b *registry.FollowedBase) { b.Platform = "" }), attest.Matched},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := c.Image(t.Context(), ref, "", following(row.rows...), anywhere)
			want(t, err, "")
			if got.Base.Result != row.result || got.Base.Result == attest.Matched && got.Base.Digest != base.Digest {
				t.Errorf("got %s %s, want %s", got.Base.Result, got.Base, row.result)
			}
		})
	}
}

func TestFreshness(t *testing.T) {
	t.Parallel()
	registries(t, func(t *testing.T, host string) {
		c := newClient(t, registry.Config{Hosts: plain(host), Mirrors: []registry.Mirror{{From: host + "/hub", To: "docker.io"}}})
		repo := host + "/hub/library/debian"
		config := func(img v1.Image) v1.Image {
			return images.WithConfig(t, img, func(c *v1.ConfigFile) { c.Author = "rebuilt" })
		}
		amd64, arm64 := amd(t, "r", "b"), images.Image(t, "linux/arm64", layers(t, "q", "w")...)
		was := push(t, repo, "12", images.Index(t, map[string]v1.Image{"linux/amd64": amd64, "linux/arm64": arm64}))
		app := push(t, host+"/team/app", "1", both(t, "x"))
		both := []attest.BasePart{
			{Platform: "linux/amd64", Image: app.Digest, Base: digestOf(t, amd64), Layers: 2},
			{Platform: "linux/arm64/v8", Image: app.Digest, Base: digestOf(t, arm64), Layers: 2},
		}
		base := func(parts ...attest.BasePart) attest.Base {
			return attest.Base{Result: attest.ProvenLayers, Repository: "docker.io/library/debian", Tag: "12", Digest: was.Digest, Platforms: parts}
		}
		pinned := base(both[0])
		pinned.Digest = digestOf(t, amd64)
		unnamed := base(attest.BasePart{Base: digestOf(t, amd64), Layers: 2})
		gone := base(attest.BasePart{Platform: "linux/amd64", Base: attest.Hash([]byte("gone")), Layers: 2})
		lost := base()
		lost.Digest = attest.Hash([]byte("gone"))
		platforms := func(amd64, arm64 v1.Image) v1.ImageIndex {
			return images.Index(t, map[string]v1.Image{"linux/amd64": amd64, "linux/arm64": arm64, "linux/s390x": images.Image(t, "linux/s390x", layers(t, "s")...)})
		}
		newer := amd(t, "r", "fixed")
		for _, row := range []struct {
			name   string
			base   attest.Base
			now    remote.Taggable
			want   attest.Freshness
			detail string
		}{
			{"the same index", base(both...), images.Index(t, map[string]v1.Image{"linux/amd64": amd64, "linux/arm64": arm64}), attest.Fresh, ""},
			{"another index of the same manifests", base(both...), platforms(amd64, arm64), attest.StaleIndexOnly, ""},
			{"another index, asked of no platform", base(), platforms(amd64, arm64), attest.StaleIndexOnly, ""},
			{"pinned to the platform's manifest", pinned, platforms(amd64, arm64), attest.Fresh, ""},
			{"another configuration on one platform", base(both...), platforms(config(amd64), arm64), attest.StaleConfigOnly, ""},
			{"another configuration, platform not known", unnamed, platforms(config(amd64), arm64), attest.StaleConfigOnly, ""},
			{"another configuration, asked of no platform", base(), platforms(config(amd64), arm64), attest.StaleConfigOnly, ""},
			{"another configuration of the other platform", base(both[0]), platforms(amd64, config(arm64)), attest.StaleIndexOnly, ""},
			{"other layers on one platform", base(both...), platforms(newer, arm64), attest.StaleLayers, ""},
			{"other layers on one platform, another configuration on the other", base(both...), platforms(config(amd64), newer), attest.StaleLayers, ""},
			{"other layers of the other platform", base(both[1]), platforms(newer, arm64), attest.StaleIndexOnly, ""},
			{"the platform is gone", base(both...), images.Index(t, map[string]v1.Image{"linux/arm64": arm64}), attest.StaleLayers, ""},
			{"the platforms are swapped", base(both...), images.Index(t, map[string]v1.Image{"linux/amd64": config(arm64), "linux/arm64": config(amd64)}), attest.StaleLayers, ""},
			{"now one image without an index", unnamed, config(amd64), attest.StaleConfigOnly, ""},
			{"the base's manifest is gone", gone, platforms(newer, arm64), attest.FreshnessUnknown, "the tag cannot be compared: SUBJECT_NOT_FOUND"},
			{"the base is gone", lost, platforms(newer, arm64), attest.FreshnessUnknown, "the tag cannot be compared: SUBJECT_NOT_FOUND"},
		} {
			t.Run(row.name, func(t *testing.T) {
				now := push(t, repo, "12", row.now)
				before := time.Now()
				got, err := c.Freshness(t.Context(), row.base)
				want(t, err, "")
				if got.Freshness != row.want || got.Detail != row.detail {
					t.Errorf("got %s %q, want %s", got.Freshness, got.Detail, row.want)
				}
				if got.Current != now.Digest || got.Checked.Before(before) || !got.Since.IsZero() {
					t.Errorf("got %+v", got)
				}
			})
		}
		for _, row := range []struct {
			name   string
			base   attest.Base
			detail string
		}{
			{"no tag", attest.Base{Repository: "docker.io/library/debian", Digest: was.Digest}, "the base is known without a tag or a digest: there is nothing to compare"},
			{"no digest", attest.Base{Repository: "docker.io/library/debian", Tag: "12"}, "the base is known without a tag or a digest: there is nothing to compare"},
			{"no base", attest.Base{Result: attest.Scratch}, "the base is known without a tag or a digest: there is nothing to compare"},
			{"the tag is gone", attest.Base{Repository: "docker.io/library/debian", Tag: "11", Digest: was.Digest}, "the tag cannot be compared: SUBJECT_NOT_FOUND"},
			{"a tag that is none", attest.Base{Repository: "docker.io/library/debian", Tag: "../x", Digest: was.Digest}, "the tag cannot be compared: BAD_REFERENCE"},
			{"a registry that is not configured", attest.Base{Repository: "ghcr.io/a/b", Tag: "1", Digest: was.Digest}, "the tag cannot be compared: REGISTRY_NOT_ALLOWED"},
		} {
			t.Run(row.name, func(t *testing.T) {
				got, err := c.Freshness(t.Context(), row.base)
				want(t, err, "")
				if got.Freshness != attest.FreshnessUnknown || got.Detail != row.detail {
					t.Errorf("got %s %q", got.Freshness, got.Detail)
				}
			})
		}
	})
}

// A tag that has not moved costs one HEAD, which large registries do not count.
func TestFreshnessAsksLittle(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	d := attest.Hash([]byte("x"))
	f.set("HEAD /v2/base/debian/manifests/12", page{header: map[string]string{"Docker-Content-Digest": d.String()}})
	got, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Freshness(t.Context(), attest.Base{Repository: f.repo("base/debian"), Tag: "12", Digest: d})
	want(t, err, "")
	if calls := f.calls(); got.Freshness != attest.Fresh || len(calls) != 1 || calls[0].request != "HEAD /v2/base/debian/manifests/12" {
		t.Errorf("got %s after %v", got.Freshness, calls)
	}
}

// Whoever sweeps over tags has to be able to wait for as long as it is told.
func TestRateLimits(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, after string
		status      int
		seconds     string
		asked       int
	}{
		{"seconds", "37", http.StatusTooManyRequests, "37", 1},
		{"unavailable for some seconds", "37", http.StatusServiceUnavailable, "37", 1},
		{"a date", time.Now().Add(90 * time.Second).UTC().Format(http.TimeFormat), http.StatusTooManyRequests, "", 1},
		{"for ever", "999999999", http.StatusTooManyRequests, "86400", 1},
		{"a date long ago", "Mon, 02 Jan 2006 15:04:05 GMT", http.StatusTooManyRequests, "", 3},
		{"nothing", "", http.StatusTooManyRequests, "", 3},
		{"negative", "-5", http.StatusTooManyRequests, "", 3},
		{"no number", "soon", http.StatusTooManyRequests, "", 3},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFake(t, nil)
			limited := page{status: row.status, header: map[string]string{"Retry-After": row.after}}
			f.set("/v2/base/debian/manifests/12", limited)
			c := newClient(t, registry.Config{Hosts: plain(f.host())})
			_, freshness := c.Freshness(t.Context(), attest.Base{Repository: f.repo("base/debian"), Tag: "12", Digest: attest.Hash(nil)})
			asked := len(f.calls())
			_, follow := c.Follow(t.Context(), f.repo("base/debian"), "12")
			for _, err := range []error{freshness, follow} {
				want(t, err, attest.RegistryUnavailable)
				var known *attest.Error
				errors.As(err, &known)
				seconds := known.Metadata["retry_after"]
				if row.name == "a date" {
					if !strings.HasPrefix(seconds, "8") && seconds != "90" {
						t.Errorf("told to wait %q seconds", seconds)
					}
				} else if seconds != row.seconds {
					t.Errorf("told to wait %q seconds, want %q", seconds, row.seconds)
				}
			}
			if asked != row.asked {
				t.Errorf("asked %d times, want %d", asked, row.asked)
			}
		})
	}
	t.Run("the registry is down", func(t *testing.T) {
		f := newFake(t, nil)
		f.Close()
		c := newClient(t, registry.Config{Hosts: plain(f.host())})
		_, err := c.Freshness(t.Context(), attest.Base{Repository: f.repo("base/debian"), Tag: "12", Digest: attest.Hash(nil)})
		want(t, err, attest.RegistryUnavailable)
		_, err = c.Follow(t.Context(), f.repo("base/debian"), "12")
		want(t, err, attest.RegistryUnavailable)
	})
}

// D12: an image that is said to be built from nothing is not when one of its platforms
// is built on a base, whatever else its index lists.
func TestD12ScratchWithABaseUnderOnePlatform(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	base := push(t, host+"/base/debian", "12", amd(t, "r", "b"))
	named := push(t, host+"/base/alpine", "3", amd(t, "alpine"))
	followed := following(follow(t, c, host+"/base/debian", "12")...)
	noLayer, err := mutate.Append(image(t), mutate.Addendum{
		Layer: static.NewLayer([]byte("b1"), types.OCIUncompressedLayer), MediaType: "application/vnd.example.blob",
	})
	if err != nil {
		t.Fatal(err)
	}
	beside := func(app, junk v1.Image) v1.ImageIndex {
		return index(t, map[string]v1.Image{"linux/amd64": app, "plan9/mips": junk})
	}
	debian, alpine := "a platform of the image is built on "+base.String(), "a platform of the image is built on "+named.String()
	debian = strings.Replace(debian, "@", ":12@", 1)
	for _, row := range []struct {
		name   string
		image  v1.ImageIndex
		hint   string
		result attest.BaseResult
		detail string
	}{
		{"a followed base and a platform that nobody has", beside(amd(t, "r", "b", "app"), amd(t, "junk")), "scratch", attest.Contradicted, debian},
		{"a followed base and a platform of no layers", beside(amd(t, "r", "b", "app"), noLayer), "scratch", attest.Contradicted, debian},
		{"an annotated base and a platform that nobody has",
			annotate(beside(amd(t, "alpine", "app"), amd(t, "junk", "more")), "org.opencontainers.image.base.name", named.String()), "scratch", attest.Contradicted, alpine},
		{"BuildKit's word", built(t, beside(amd(t, "r", "b", "app"), amd(t, "junk")), provenanceV1), "", attest.Contradicted, debian},
		{"nothing at all", beside(amd(t, "app"), amd(t, "junk")), "scratch", attest.Scratch, ""},
		{"nobody says so", beside(amd(t, "r", "b", "app"), amd(t, "junk")), "", attest.Unclaimed, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := c.Image(t.Context(), push(t, host+"/team/app", "1", row.image), row.hint, followed, anywhere)
			want(t, err, "")
			said := ""
			for _, k := range got.Base.Claims {
				if k.Name == "scratch" {
					said = k.Detail
				}
			}
			if got.Base.Result != row.result || said != row.detail {
				t.Errorf("got %+v, want %s %q", got.Base, row.result, row.detail)
			}
		})
	}
}
