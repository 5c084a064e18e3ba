package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

var created = time.Date(2026, 11, 20, 18, 0, 0, 123456, time.FixedZone("CET", 3600))

const predicate = "https://slsa.dev/provenance/v1"

// registries are a registry with the referrers API and one without.
func registries(t *testing.T, f func(t *testing.T, host string)) {
	t.Run("referrers API", func(t *testing.T) { f(t, devRegistry(t)) })
	t.Run("fallback tag", func(t *testing.T) { f(t, debianRegistryOnDisk(t)) })
}

// listed returns how a stock client sees the referrers of ref, by digest.
func listed(t testing.TB, ref attest.ImageRef) map[string]v1.Descriptor {
	t.Helper()
	d, err := name.NewDigest(ref.String())
	if err != nil {
		t.Fatal(err)
	}
	idx, err := remote.Referrers(d)
	if err != nil {
		t.Fatal(err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]v1.Descriptor{}
	for _, e := range m.Manifests {
		if _, twice := out[e.Digest.String()]; twice {
			t.Errorf("%s is listed twice", e.Digest)
		}
		out[e.Digest.String()] = e
	}
	return out
}

func TestAttach(t *testing.T) {
	registries(t, func(t *testing.T, host string) {
		c := newClient(t, registry.Config{Hosts: plain(host)})
		ref := push(t, host+"/team/app", "1", image(t, "x"))
		none, err := c.Attached(t.Context(), ref)
		want(t, err, "")
		if len(none) != 0 {
			t.Errorf("got %q", none)
		}
		for range 2 { // repeating it adds nothing
			want(t, c.Attach(t.Context(), ref, []byte(`{"a":1}`), predicate, created), "")
		}
		want(t, c.Attach(t.Context(), ref, []byte(`{"a":2}`), predicate, created), "")
		got, err := c.Attached(t.Context(), ref)
		want(t, err, "")
		slices.SortFunc(got, bytes.Compare)
		if diff := cmp.Diff([][]byte{[]byte(`{"a":1}`), []byte(`{"a":2}`)}, got); diff != "" {
			t.Error(diff)
		}
		entries := listed(t, ref)
		if len(entries) != 2 {
			t.Errorf("listed %v", entries)
		}
		for _, e := range entries {
			if e.Annotations["dev.sigstore.bundle.predicateType"] != predicate || e.MediaType != types.OCIManifestSchema1 {
				t.Errorf("listed as %+v", e)
			}
		}
	})
}

// The manifest is byte for byte what facts/trust-formats 2.6 describes, and the
// fallback tag's entry has its artifactType and all annotations.
func TestAttachGolden(t *testing.T) {
	host := debianRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	img := image(t, "x")
	ref := push(t, host+"/team/app", "1", img)
	raw, _ := img.RawManifest()
	bundle := []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`)
	want(t, c.Attach(t.Context(), ref, bundle, predicate, created), "")

	annotations := `{"dev.sigstore.bundle.content":"dsse-envelope","dev.sigstore.bundle.predicateType":"https://slsa.dev/provenance/v1","org.opencontainers.image.created":"2026-11-20T17:00:00Z"}`
	golden := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"config":{"mediaType":"application/vnd.oci.empty.v1+json","size":2,"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","artifactType":"application/vnd.dev.sigstore.bundle.v0.3+json"},`+
		`"layers":[{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","size":%d,"digest":"%s"}],"annotations":%s,`+
		`"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":%d,"digest":"%s"},"artifactType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`,
		len(bundle), attest.Hash(bundle), annotations, len(raw), ref.Digest)
	if diff := cmp.Diff(golden, get(t, host, "team/app", attest.Hash([]byte(golden)).String(), ociManifest)); diff != "" {
		t.Error(diff)
	}
	list := fmt.Sprintf(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":%d,"digest":"%s","annotations":%s,"artifactType":"application/vnd.dev.sigstore.bundle.v0.3+json"}],`+
		`"mediaType":"application/vnd.oci.image.index.v1+json","schemaVersion":2}`, len(golden), attest.Hash([]byte(golden)), annotations)
	if diff := cmp.Diff(list, get(t, host, "team/app", "sha256-"+ref.Digest.Hex(), ociIndex)); diff != "" {
		t.Error(diff)
	}
}

// Many writers in one process lose nothing to each other, which go-containerregistry
// by itself does (ci-identity 4.4).
func TestAttachConcurrently(t *testing.T) {
	t.Parallel()
	registries(t, func(t *testing.T, host string) {
		c := newClient(t, registry.Config{Hosts: plain(host)})
		refs := []attest.ImageRef{push(t, host+"/team/app", "1", image(t, "x")), push(t, host+"/team/app", "2", image(t, "y"))}
		var wg sync.WaitGroup
		for i := range 20 {
			for _, ref := range refs {
				wg.Go(func() {
					if err := c.Attach(t.Context(), ref, fmt.Appendf(nil, `{"n":%d}`, i), predicate, created); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		for _, ref := range refs {
			if n := len(listed(t, ref)); n != 20 {
				t.Errorf("%d of 20 are listed", n)
			}
			if got, err := c.Attached(t.Context(), ref); err != nil || len(got) != 20 {
				t.Errorf("got %d bundles, %v", len(got), err)
			}
		}
	})
}

// What others keep under the fallback tag stays as it is.
func TestAttachKeepsForeignEntries(t *testing.T) {
	host := debianRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	sbom := push(t, host+"/team/app", "sbom", image(t, "sbom"))
	foreign := fmt.Sprintf(`{"artifactType":"application/spdx+json","annotations":{"a":"b"},"size":%d,"mediaType":%q,"digest":%q,"x-own":[1]}`, sizeOf(t, image(t, "sbom")), ociManifest, sbom.Digest)
	put(t, host, "team/app", "sha256-"+ref.Digest.Hex(), ociIndex, `{"schemaVersion":2,"mediaType":"`+ociIndex+`","annotations":{"kept":"yes"},"manifests":[`+foreign+`]}`)
	want(t, c.Attach(t.Context(), ref, []byte("{}x"), predicate, created), "")
	raw := get(t, host, "team/app", "sha256-"+ref.Digest.Hex(), ociIndex)
	if !strings.Contains(raw, foreign) || !strings.Contains(raw, `"kept":"yes"`) {
		t.Errorf("lost something: %s", raw)
	}
	if got, err := c.Attached(t.Context(), ref); err != nil || len(got) != 1 || string(got[0]) != "{}x" {
		t.Errorf("got %q, %v", got, err)
	}
}

// A foreign referrer that was deleted is still in the list, which Distribution
// then refuses to take.
func TestAttachAfterDeletion(t *testing.T) {
	host := debianRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	want(t, c.Attach(t.Context(), ref, []byte("kept"), predicate, created), "")
	want(t, c.Attach(t.Context(), ref, []byte("gone"), predicate, created), "")
	var gone string
	for d := range listed(t, ref) {
		if strings.Contains(get(t, host, "team/app", d, ociManifest), attest.Hash([]byte("gone")).String()) {
			gone = d
		}
	}
	req, err := http.NewRequest(http.MethodDelete, "http://"+host+"/v2/team/app/manifests/"+gone, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted {
		t.Fatalf("deleting %s: %d", gone, resp.StatusCode)
	}
	want(t, c.Attach(t.Context(), ref, []byte("new"), predicate, created), "")
	got, err := c.Attached(t.Context(), ref)
	want(t, err, "")
	slices.SortFunc(got, bytes.Compare)
	if diff := cmp.Diff([][]byte{[]byte("kept"), []byte("new")}, got); diff != "" {
		t.Error(diff)
	}
	if entries := listed(t, ref); len(entries) != 2 {
		t.Errorf("listed %v", entries)
	}
}

func sizeOf(t testing.TB, what remote.Taggable) int {
	t.Helper()
	raw, err := what.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	return len(raw)
}

func put(t testing.TB, host, repo, reference, mediaType, body string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, "http://"+host+"/v2/"+repo+"/manifests/"+reference, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("PUT %s: %d %s", reference, resp.StatusCode, b)
	}
}

func get(t testing.TB, host, repo, reference, accept string) string {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, "http://"+host+"/v2/"+repo+"/manifests/"+reference, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %d %v", reference, resp.StatusCode, err)
	}
	return string(body)
}

// Another process that writes the tag between our reading and writing it.
func TestAttachForeignWriter(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		loses   int64 // how often it overwrites ours
		reason  attest.Reason
		foreign bool // its entry has to be there in the end
	}{
		{"overwrites once", 1, "", true},
		{"overwrites twice", 2, "", true},
		{"overwrites always", 1 << 30, attest.RegistryUnavailable, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			host := debianRegistry(t)
			ref := push(t, host+"/team/app", "1", image(t, "x"))
			sbom := push(t, host+"/team/app", "sbom", image(t, "sbom"))
			theirs := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"size":%d,"digest":%q}]}`, ociIndex, ociManifest, sizeOf(t, image(t, "sbom")), sbom.Digest)
			// What was listed before and is lost by the other writer comes back too.
			want(t, newClient(t, registry.Config{Hosts: plain(host)}).Attach(t.Context(), ref, []byte("earlier"), predicate, created), "")
			var writes atomic.Int64
			front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodPut || !strings.HasSuffix(r.URL.Path, "/sha256-"+ref.Digest.Hex()) || writes.Add(1) > row.loses {
					return false
				}
				put(t, host, "team/app", "sha256-"+ref.Digest.Hex(), ociIndex, theirs)
				w.WriteHeader(http.StatusCreated)
				return true
			})
			ref.Repository = attest.Repository(front + "/team/app")
			c := newClient(t, registry.Config{Hosts: plain(front)})
			want(t, c.Attach(t.Context(), ref, []byte("ours"), predicate, created), row.reason)
			entries := listed(t, attest.ImageRef{Repository: attest.Repository(host + "/team/app"), Digest: ref.Digest})
			if _, ok := entries[sbom.Digest.String()]; !ok || row.foreign && len(entries) != 3 {
				t.Errorf("listed %v", entries)
			}
		})
	}
}

// A registry that honours If-Match refuses the write; the next look merges.
func TestAttachPreconditionFailed(t *testing.T) {
	t.Parallel()
	host := debianRegistry(t)
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	c0 := newClient(t, registry.Config{Hosts: plain(host)})
	want(t, c0.Attach(t.Context(), ref, []byte("first"), predicate, created), "")
	var conditional atomic.Int64
	front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/sha256-"+ref.Digest.Hex()) && r.Header.Get("If-Match") != "" && conditional.Add(1) == 1 {
			w.WriteHeader(http.StatusPreconditionFailed)
			return true
		}
		return false
	})
	c := newClient(t, registry.Config{Hosts: plain(front)})
	want(t, c.Attach(t.Context(), attest.ImageRef{Repository: attest.Repository(front + "/team/app"), Digest: ref.Digest}, []byte("second"), predicate, created), "")
	if n := len(listed(t, ref)); n != 2 || conditional.Load() < 2 {
		t.Errorf("%d listed, %d conditional writes", n, conditional.Load())
	}
}

// A registry with the API that never lists what was pushed.
func TestAttachNotListed(t *testing.T) {
	t.Parallel()
	host := devRegistry(t)
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	var asked atomic.Int64
	front := proxy(t, host, func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/referrers/") || asked.Add(1) > 3 && r.Header.Get("X-Never") == "" && strings.Contains(r.URL.Path, "/late/") {
			return false
		}
		w.Header().Set("Content-Type", ociIndex)
		fmt.Fprint(w, `{"schemaVersion":2,"mediaType":"`+ociIndex+`","manifests":[]}`)
		return true
	})
	c := newClient(t, registry.Config{Hosts: plain(front)})
	ref.Repository = attest.Repository(front + "/team/app")
	want(t, c.Attach(t.Context(), ref, []byte("ours"), predicate, created), attest.RegistryUnavailable)
	late := push(t, host+"/late/app", "1", image(t, "x"))
	late.Repository = attest.Repository(front + "/late/app")
	asked.Store(0)
	want(t, c.Attach(t.Context(), late, []byte("ours"), predicate, created), "")
	if asked.Load() < 4 {
		t.Error("the list was not read again")
	}
}

func TestAttachRefuses(t *testing.T) {
	host := debianRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	t.Run("G19 bundle too large", func(t *testing.T) {
		want(t, c.Attach(t.Context(), ref, make([]byte, 24<<20+1), predicate, created), attest.TooLarge)
	})
	t.Run("subject is not there", func(t *testing.T) {
		missing := attest.ImageRef{Repository: ref.Repository, Digest: attest.Hash([]byte("nothing"))}
		want(t, c.Attach(t.Context(), missing, []byte("b"), predicate, created), attest.SubjectNotFound)
	})
	t.Run("the fallback tag is no index", func(t *testing.T) {
		put(t, host, "team/app", "sha256-"+ref.Digest.Hex(), ociManifest, get(t, host, "team/app", ref.Digest.String(), ociManifest))
		want(t, c.Attach(t.Context(), ref, []byte("b"), predicate, created), attest.ManifestAmbiguous)
		_, err := c.Attached(t.Context(), ref)
		want(t, err, attest.ManifestAmbiguous)
	})
}

func TestAttached(t *testing.T) {
	t.Run("G07 more bundles than are read", func(t *testing.T) {
		f := newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		var entries []string
		for i := range 257 {
			entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"size":1,"digest":%q,"artifactType":%q}`, ociManifest, attest.Hash(fmt.Append(nil, i)), bundleType))
		}
		f.set("/v2/a/app/referrers/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociIndex}, body: `{"schemaVersion":2,"manifests":[` + strings.Join(entries, ",") + `]}`})
		_, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attached(t.Context(), ref)
		want(t, err, attest.TooLarge)
	})
	t.Run("G07 other referrers do not count", func(t *testing.T) {
		f := newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		var entries []string
		for i := range 257 {
			entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"size":1,"digest":%q,"artifactType":"application/spdx+json"}`, ociManifest, attest.Hash(fmt.Append(nil, i))))
		}
		f.set("/v2/a/app/referrers/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociIndex}, body: `{"schemaVersion":2,"manifests":[` + strings.Join(entries, ",") + `]}`})
		got, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attached(t.Context(), ref)
		want(t, err, "")
		if len(got) != 0 {
			t.Errorf("got %q", got)
		}
	})
	t.Run("G07 pages are followed", func(t *testing.T) {
		f := newFake(t, nil)
		ref := redirecting(t, f, page{body: "bundle"})
		path := "/v2/a/app/referrers/" + ref.Digest.String()
		full := f.pages[path].body
		var asked atomic.Int64
		front := proxy(t, f.host(), func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != path || asked.Add(1) > 1 {
				return false
			}
			w.Header().Set("Link", "<"+path+`?n=1&last=x>; rel="next"`)
			fmt.Fprint(w, `{"schemaVersion":2,"manifests":[]}`)
			return true
		})
		ref.Repository = attest.Repository(front + "/a/app")
		got, err := newClient(t, registry.Config{Hosts: plain(front)}).Attached(t.Context(), ref)
		want(t, err, "")
		if len(got) != 1 || asked.Load() != 2 || full == "" {
			t.Errorf("got %q after %d pages", got, asked.Load())
		}
	})

	// One bundle is there; another referrer is spoiled in some way. The first is
	// still found.
	good := `{"schemaVersion":2,"mediaType":"` + ociManifest + `","artifactType":"` + bundleType + `","config":` + descriptor("application/vnd.oci.empty.v1+json", "{}", "") + `,"layers":[%s],"subject":%s}`
	layer := descriptor(bundleType, "bundle", "")
	self := manifest("")
	subject := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ociManifest, attest.Hash([]byte(self)), len(self))
	for _, row := range []struct {
		name, body string
		blob       string
		count      int
		reason     attest.Reason
	}{
		{"two good ones", fmt.Sprintf(good, descriptor(bundleType, "other", ""), subject), "other", 2, ""},
		{"G08 listed for this image, about another", fmt.Sprintf(good, descriptor(bundleType, "other", ""), descriptor(ociManifest, "elsewhere", "")), "other", 1, ""},
		{"G08 about nothing", strings.Replace(fmt.Sprintf(good, descriptor(bundleType, "other", ""), subject), `"subject"`, `"x"`, 1), "other", 1, ""},
		{"G08 two layers", fmt.Sprintf(good, layer+","+descriptor(bundleType, "other", ""), subject), "other", 1, ""},
		{"G08 layer of another type", fmt.Sprintf(good, descriptor("application/x", "other", ""), subject), "other", 1, ""},
		{"G08 another artifact", strings.Replace(fmt.Sprintf(good, descriptor(bundleType, "other", ""), subject), `"artifactType":"`+bundleType, `"artifactType":"application/x`, 1), "other", 1, ""},
		{"G02 blob of other bytes", fmt.Sprintf(good, descriptor(bundleType, "other", ""), subject), "0ther", 1, ""},
		{"G19 blob longer than said", fmt.Sprintf(good, strings.Replace(descriptor(bundleType, "other", ""), `"size":5`, `"size":4`, 1), subject), "other", 1, ""},
		{"G02 blob missing", fmt.Sprintf(good, descriptor(bundleType, "other", ""), subject), "", 1, ""},
		{"G04 polyglot", strings.Replace(fmt.Sprintf(good, descriptor(bundleType, "other", ""), subject), `"layers"`, `"manifests":[],"layers"`, 1), "other", 1, ""},
		{"G12 bundle kept elsewhere", fmt.Sprintf(good, descriptor(bundleType, "other", `,"urls":["http://169.254.169.254/x"]`), subject), "other", 0, attest.ForeignLayer},
		{"G19 bundle said to be too large", fmt.Sprintf(good, strings.Replace(descriptor(bundleType, "other", ""), `"size":5`, `"size":99999999`, 1), subject), "other", 0, attest.TooLarge},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFake(t, nil)
			ref := redirecting(t, f, page{body: "bundle"})
			if row.blob != "" {
				f.set("/v2/a/app/blobs/"+attest.Hash([]byte("other")).String(), page{body: row.blob})
			}
			second := f.serve("a/app", ociManifest, row.body)
			path := "/v2/a/app/referrers/" + ref.Digest.String()
			f.set(path, page{header: map[string]string{"Content-Type": ociIndex}, body: strings.Replace(f.pages[path].body, `"manifests":[`,
				fmt.Sprintf(`"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"artifactType":%q},`, ociManifest, second.Digest, len(row.body), bundleType), 1)})
			got, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attached(t.Context(), ref)
			want(t, err, row.reason)
			if len(got) != row.count {
				t.Errorf("got %q", got)
			}
		})
	}
	t.Run("G19 blob without end", func(t *testing.T) {
		f := newFake(t, nil)
		ref := redirecting(t, f, page{})
		front := proxy(t, f.host(), func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			chunk := make([]byte, 1<<20)
			for r.Context().Err() == nil {
				if _, err := w.Write(chunk); err != nil {
					break
				}
			}
			return true
		})
		ref.Repository = attest.Repository(front + "/a/app")
		_, err := newClient(t, registry.Config{Hosts: plain(front)}).Attached(t.Context(), ref)
		want(t, err, attest.TooLarge)
	})
	t.Run("G20 registry fails on one", func(t *testing.T) {
		f := newFake(t, nil)
		ref := redirecting(t, f, page{status: http.StatusServiceUnavailable})
		_, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attached(t.Context(), ref)
		want(t, err, attest.RegistryUnavailable)
	})
	t.Run("BadJSON in the list", func(t *testing.T) {
		f := newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		f.set("/v2/a/app/referrers/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociIndex}, body: `{"manifests":[],"manifests":[]}`})
		_, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attached(t.Context(), ref)
		want(t, err, attest.BadJSON)
	})
}

// A listing's entries survive being merged whatever they hold.
func TestAttachedIsJSON(t *testing.T) {
	host := debianRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	ref := push(t, host+"/team/app", "1", image(t, "x"))
	want(t, c.Attach(t.Context(), ref, []byte("b"), `https://example.com/"<type>\`, created), "")
	var index v1.IndexManifest
	if err := json.Unmarshal([]byte(get(t, host, "team/app", "sha256-"+ref.Digest.Hex(), ociIndex)), &index); err != nil {
		t.Fatal(err)
	}
	if got := index.Manifests[0].Annotations["dev.sigstore.bundle.predicateType"]; got != `https://example.com/"<type>\` {
		t.Errorf("got %q", got)
	}
}
