package registry_test

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

func TestResolve(t *testing.T) {
	registries(t, func(t *testing.T, host string) {
		c := newClient(t, registry.Config{Hosts: plain(host)})
		ref := push(t, host+"/team/app", "v1", image(t, "x"))
		got, err := c.Resolve(t.Context(), ref.Repository, "v1")
		want(t, err, "")
		if got != ref.Digest {
			t.Errorf("got %s", got)
		}
		_, err = c.Resolve(t.Context(), ref.Repository, "v2")
		want(t, err, attest.SubjectNotFound)
	})
	t.Run("G02 header names another digest", func(t *testing.T) {
		f := newFake(t, map[string]page{"/v2/a/app/manifests/v1": {header: map[string]string{"Content-Type": ociManifest, "Docker-Content-Digest": attest.Hash(nil).String()}, body: manifest("")}})
		_, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Resolve(t.Context(), f.repo("a/app"), "v1")
		want(t, err, attest.DigestMismatch)
	})
}

func TestTagInOneRepository(t *testing.T) {
	registries(t, func(t *testing.T, host string) {
		c := newClient(t, registry.Config{Hosts: plain(host)})
		one := push(t, host+"/team/app", "1", image(t, "x"))
		two := push(t, host+"/team/app", "2", index(t, map[string]v1.Image{"linux/amd64": image(t, "x"), "linux/arm64": image(t, "y")}))
		for _, ref := range []attest.ImageRef{one, two, two, one} {
			want(t, c.Tag(t.Context(), ref, ref.Repository, "prod"), "")
			got, err := c.Resolve(t.Context(), ref.Repository, "prod")
			want(t, err, "")
			if got != ref.Digest {
				t.Errorf("the tag names %s, want %s", got, ref.Digest)
			}
		}
	})
}

// pullable fails unless a stock client finds a whole image with every byte as its
// digest says.
func pullable(t *testing.T, ref attest.ImageRef) {
	t.Helper()
	d, err := name.NewDigest(ref.String())
	if err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Get(d)
	if err != nil {
		t.Fatal(err)
	}
	if !desc.MediaType.IsIndex() {
		img, err := desc.Image()
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(img, validate.Fast); err != nil {
			t.Error(err)
		}
		return
	}
	idx, err := desc.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, child := range m.Manifests {
		pullable(t, attest.ImageRef{Repository: ref.Repository, Digest: parseDigest(t, child.Digest.String())})
	}
}

func parseDigest(t *testing.T, s string) attest.Digest {
	t.Helper()
	d, err := attest.ParseDigest(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTagInAnotherRepository(t *testing.T) {
	t.Parallel()
	hosts := []string{devRegistry(t), debianRegistry(t)}
	for _, from := range hosts {
		for _, to := range hosts {
			t.Run(fmt.Sprintf("from %d to %d", slices.Index(hosts, from), slices.Index(hosts, to)), func(t *testing.T) {
				c := newClient(t, registry.Config{Hosts: plain(hosts...)})
				amd, arm, sbom := image(t, "base", "amd64", from, to), image(t, "base", "arm64", from, to), image(t, "sbom")
				idx := mutate.AppendManifests(index(t, map[string]v1.Image{"linux/amd64": amd, "linux/arm64": arm}),
					mutate.IndexAddendum{Add: sbom, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
				ref := push(t, from+"/team/app", "1", idx)
				child := attest.ImageRef{Repository: ref.Repository, Digest: digestOf(t, amd)}
				for _, r := range []attest.ImageRef{ref, child} {
					want(t, c.Attach(t.Context(), r, []byte("signature"), predicate, created), "")
				}
				want(t, c.Attach(t.Context(), ref, []byte("provenance"), predicate, created), "")

				target := attest.Repository(to + "/prod/app-" + strings.ReplaceAll(from, ":", "-"))
				for range 2 { // a second time it is all there
					want(t, c.Tag(t.Context(), ref, target, "v1"), "")
				}
				got, err := c.Resolve(t.Context(), target, "v1")
				want(t, err, "")
				if got != ref.Digest {
					t.Errorf("the tag names %s", got)
				}
				copied := attest.ImageRef{Repository: target, Digest: ref.Digest}
				pullable(t, copied)
				for r, count := range map[attest.ImageRef]int{copied: 2, {Repository: target, Digest: child.Digest}: 1} {
					bundles, err := c.Attached(t.Context(), r)
					want(t, err, "")
					slices.SortFunc(bundles, bytes.Compare)
					expect := [][]byte{[]byte("provenance"), []byte("signature")}[2-count:]
					if diff := cmp.Diff(expect, bundles); diff != "" {
						t.Error(diff)
					}
					// Bit for bit: the same manifests are listed.
					here, there := listed(t, r), listed(t, attest.ImageRef{Repository: ref.Repository, Digest: r.Digest})
					for d := range there {
						if _, ok := here[d]; !ok {
							t.Errorf("referrer %s was not carried over", d)
						}
					}
				}
			})
		}
	}
}

func TestTagRefuses(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	t.Run("image is not there", func(t *testing.T) {
		want(t, c.Tag(t.Context(), attest.ImageRef{Repository: ref.Repository, Digest: attest.Hash(nil)}, ref.Repository, "v1"), attest.SubjectNotFound)
	})
	t.Run("G13 target is not configured", func(t *testing.T) {
		other := newFake(t, nil)
		want(t, c.Tag(t.Context(), ref, other.repo("prod/app"), "v1"), attest.HostNotAllowed)
		other.untouched(t)
	})
	t.Run("somebody else writes the tag", func(t *testing.T) {
		theirs := get(t, host, "team/app", push(t, host+"/team/app", "theirs", image(t, "theirs")).Digest.String(), ociManifest)
		front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPut || !strings.HasSuffix(r.URL.Path, "/manifests/prod") {
				return false
			}
			put(t, host, "team/app", "prod", ociManifest, theirs)
			w.WriteHeader(http.StatusCreated)
			return true
		})
		ref := attest.ImageRef{Repository: attest.Repository(front + "/team/app"), Digest: ref.Digest}
		want(t, newClient(t, registry.Config{Hosts: plain(front)}).Tag(t.Context(), ref, ref.Repository, "prod"), attest.EffectFailed)
	})
	t.Run("source lies about a layer", func(t *testing.T) {
		layer := attest.Hash([]byte("lie-x")).String()
		evilRef := push(t, host+"/evil/app", "1", image(t, "lie-x"))
		front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+layer) {
				return false
			}
			fmt.Fprint(w, "lie-y")
			return true
		})
		target := devRegistry(t)
		evilRef.Repository = attest.Repository(front + "/evil/app")
		err := newClient(t, registry.Config{Hosts: plain(front, target)}).Tag(t.Context(), evilRef, attest.Repository(target+"/prod/app"), "v1")
		want(t, err, attest.RegistryUnavailable)
		_, err = newClient(t, registry.Config{Hosts: plain(target)}).Resolve(t.Context(), attest.Repository(target+"/prod/app"), "v1")
		want(t, err, attest.SubjectNotFound)
	})
	for _, row := range []struct{ name, mediaType, more string }{
		{"with a URL", "application/vnd.oci.image.layer.v1.tar", `,"urls":["%s/layer"]`},
		{"of OCI's type", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", ""},
		{"of OCI's type with zstd", "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", ""},
		{"of docker's type", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", `,"urls":["%s/layer"]`},
	} {
		t.Run("G12 foreign layer "+row.name, func(t *testing.T) {
			elsewhere, f := newFake(t, map[string]page{"/layer": {body: "layer"}}), newFake(t, nil)
			more := row.more
			if more != "" {
				more = fmt.Sprintf(more, elsewhere.URL)
			}
			ref := f.serve("a/app", ociManifest, `{"schemaVersion":2,"mediaType":"`+ociManifest+`","config":`+descriptor("application/vnd.oci.image.config.v1+json", "{}", "")+
				`,"layers":[`+descriptor(row.mediaType, "layer", more)+`]}`)
			c := newClient(t, registry.Config{Hosts: plain(f.host(), host)})
			_, err := c.Image(t.Context(), ref, "", nil, anywhere) // signing needs no layer
			want(t, err, "")
			want(t, c.Tag(t.Context(), ref, attest.Repository(host+"/prod/app"), "v1"), attest.ForeignLayer)
			elsewhere.untouched(t)
		})
	}
	t.Run("G19 layer of another size than the manifest says", func(t *testing.T) {
		f := newFake(t, nil)
		for _, text := range []string{"{}", "layer"} {
			f.set("/v2/a/app/blobs/"+attest.Hash([]byte(text)).String(), page{body: text})
		}
		ref := f.serve("a/app", ociManifest, strings.Replace(manifest(""), `"size":5`, `"size":4`, 1))
		want(t, newClient(t, registry.Config{Hosts: plain(f.host(), host)}).Tag(t.Context(), ref, attest.Repository(host+"/prod/app"), "v1"), attest.DigestMismatch)
	})
	t.Run("G06 nested index", func(t *testing.T) {
		inner := index(t, map[string]v1.Image{"linux/amd64": image(t, "x")})
		outer := push(t, host+"/team/nested", "1", mutate.AppendManifests(inner, mutate.IndexAddendum{Add: inner}))
		want(t, c.Tag(t.Context(), outer, attest.Repository(host+"/prod/nested"), "v1"), attest.TooManyLevels)
	})
}
