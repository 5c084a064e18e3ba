package registry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
	"github.com/hallmarkd/hallmark/registry"
)

// foreign returns what Foreign visits: "FORM CONTENT" or the reason why not, by place.
func foreign(t testing.TB, c *registry.Client, ref attest.ImageRef) (map[string]string, error) {
	t.Helper()
	out := map[string]string{}
	err := c.Foreign(t.Context(), ref, func(f registry.Found) error {
		if _, twice := out[f.Place]; twice {
			t.Errorf("%s is visited twice", f.Place)
		}
		if f.Err != nil {
			out[f.Place] = string(attest.ReasonOf(f.Err))
			return nil
		}
		out[f.Place] = f.Form + " " + string(f.Content)
		return nil
	})
	return out, err
}

const oldBundle = "application/vnd.dev.sigstore.bundle+json;version=0.1"

func TestForeign(t *testing.T) {
	for kind, start := range map[string]func(testing.TB) string{"referrers API": devRegistry, "fallback tag": debianRegistry} {
		t.Run(kind, func(t *testing.T) {
			host := start(t)
			ref := push(t, host+"/acme/api", "v1", image(t, "layer"))
			c := newClient(t, registry.Config{Hosts: plain(host)})
			if got, err := foreign(t, c, ref); err != nil || len(got) != 0 {
				t.Fatalf("beside a new image: %v, %v", got, err)
			}
			other := push(t, host+"/acme/api", "v2", image(t, "other"))

			want := map[string]string{}
			want[abroad.Refer(t, ref, ref.Digest, abroad.BundleType, []byte("a bundle")).String()] = "bundle a bundle"
			want[abroad.Refer(t, ref, ref.Digest, oldBundle, []byte("an old bundle")).String()] = "bundle an old bundle"
			want[abroad.Refer(t, ref, ref.Digest, abroad.BundleType, []byte("two"), []byte("bundles")).String()] = "MANIFEST_AMBIGUOUS"
			abroad.Refer(t, ref, ref.Digest, "application/spdx+json", []byte("an SBOM"))
			abroad.Refer(t, other, other.Digest, abroad.BundleType, []byte("another image's"))
			sig := abroad.Legacy(t, ref, ".sig", attest.Layer{
				MediaType: "application/vnd.dev.cosign.simplesigning.v1+json", Payload: []byte("payload"),
				Annotations: map[string]string{"dev.cosignproject.cosign/signature": "c2ln", "dev.sigstore.cosign/bundle": "{}", "org.example/ornament": "x"},
			}, attest.Layer{MediaType: "application/octet-stream", Payload: []byte("?")})
			att := abroad.Legacy(t, ref, ".att", attest.Layer{MediaType: "application/vnd.dsse.envelope.v1+json", Payload: []byte("{}")})
			// One signature is the same evidence whatever else is written on it.
			layer, err := json.Marshal(attest.Layer{
				MediaType: "application/vnd.dev.cosign.simplesigning.v1+json", Payload: []byte("payload"),
				Annotations: map[string]string{"dev.cosignproject.cosign/signature": "c2ln", "dev.sigstore.cosign/bundle": "{}"},
			})
			if err != nil {
				t.Fatal(err)
			}
			want[sig+"#0"], want[sig+"#1"] = "cosign-signature "+string(layer), "MANIFEST_AMBIGUOUS"
			want[att+"#0"] = `cosign-envelope {"mediaType":"application/vnd.dsse.envelope.v1+json","payload":"e30="}`

			got, err := foreign(t, c, ref)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestForeignRefuses(t *testing.T) {
	host := devRegistry(t)
	ref := push(t, host+"/acme/api", "v1", image(t, "layer"))
	c := newClient(t, registry.Config{Hosts: plain(host)})
	_, err := foreign(t, c, attest.ImageRef{Repository: ref.Repository, Digest: attest.Hash([]byte("absent"))})
	want(t, err, attest.SubjectNotFound)
	_, err = foreign(t, c, attest.ImageRef{Repository: "registry.example.com/acme/api", Digest: ref.Digest})
	want(t, err, attest.HostNotAllowed)

	// The visitor's own error ends it.
	abroad.Refer(t, ref, ref.Digest, abroad.BundleType, []byte("a bundle"))
	abroad.Refer(t, ref, ref.Digest, abroad.BundleType, []byte("another"))
	stop, visits := errors.New("stop"), 0
	if err := c.Foreign(t.Context(), ref, func(registry.Found) error { visits++; return stop }); !errors.Is(err, stop) || visits != 1 {
		t.Errorf("%d visits, %v", visits, err)
	}
}

// What a registry, or whoever may push to it, puts beside an image hides nothing else
// that is there. Each row is one lie beside a good signature under the tag .sig.
func TestForeignLies(t *testing.T) {
	text := func(layer string) string {
		return strings.Replace(manifest(""), `"layers":[`+descriptor("application/vnd.oci.image.layer.v1.tar", "layer", "")+`]`, `"layers":[`+layer+`]`, 1)
	}
	subject := func(d string) string {
		return `,"subject":{"mediaType":"` + ociManifest + `","digest":"` + d + `","size":2}`
	}
	for _, row := range []struct {
		name   string
		plant  func(f *fake, ref attest.ImageRef) (place string)
		reason string
	}{
		{"G08 refers to something else", func(f *fake, ref attest.ImageRef) string {
			body := strings.TrimSuffix(text(descriptor(bundleType, "bundle", "")), "}") + subject(attest.Hash([]byte("other")).String()) + "}"
			return list(f, ref, body)
		}, "SUBJECT_MISMATCH"},
		{"G08 refers to nothing", func(f *fake, ref attest.ImageRef) string {
			return list(f, ref, text(descriptor(bundleType, "bundle", "")))
		}, "SUBJECT_MISMATCH"},
		{"G02 other bytes than listed", func(f *fake, ref attest.ImageRef) string {
			place := list(f, ref, text(descriptor(bundleType, "bundle", "")))
			f.set("/v2/acme/manifests/"+place, page{header: map[string]string{"Content-Type": ociManifest}, body: manifest("")})
			return place
		}, "DIGEST_MISMATCH"},
		{"listed and gone", func(f *fake, ref attest.ImageRef) string {
			place := list(f, ref, manifest(`,"annotations":{"n":"1"}`))
			f.set("/v2/acme/manifests/"+place, page{status: http.StatusNotFound})
			return place
		}, "SUBJECT_NOT_FOUND"},
		{"G19 bundle of a terabyte", func(f *fake, ref attest.ImageRef) string {
			layer := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, bundleType, attest.Hash([]byte("bundle")), int64(1)<<40)
			return list(f, ref, strings.TrimSuffix(text(layer), "}")+subject(ref.Digest.String())+"}")
		}, "TOO_LARGE"},
		{"G12 layer from elsewhere", func(f *fake, ref attest.ImageRef) string {
			layer := descriptor(bundleType, "bundle", `,"urls":["https://evil.example/bundle"]`)
			return list(f, ref, strings.TrimSuffix(text(layer), "}")+subject(ref.Digest.String())+"}")
		}, "FOREIGN_LAYER"},
		{"G07 endless list", func(f *fake, ref attest.ImageRef) string {
			var entries []string
			for i := range 4097 {
				entries = append(entries, descriptor(ociManifest, fmt.Sprint(i), ""))
			}
			f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + strings.Join(entries, ",") + `]}`})
			return "referrers of " + ref.Digest.String()
		}, "TOO_LARGE"},
		{"list that is no index", func(f *fake, ref attest.ImageRef) string {
			f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: `{}`})
			return "referrers of " + ref.Digest.String()
		}, "MANIFEST_AMBIGUOUS"},
		{"tag .att that is an index", func(f *fake, ref attest.ImageRef) string {
			tag := "sha256-" + ref.Digest.Hex() + ".att"
			f.set("/v2/acme/manifests/"+tag, page{header: map[string]string{"Content-Type": ociIndex}, body: `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[]}`})
			return tag
		}, "MANIFEST_AMBIGUOUS"},
		{"C23 endless annotations", func(f *fake, ref attest.ImageRef) string {
			layer := descriptor("application/vnd.dsse.envelope.v1+json", "bundle", `,"annotations":{"dev.sigstore.cosign/chain":"`+strings.Repeat("a", 300<<10)+`"}`)
			tag := "sha256-" + ref.Digest.Hex() + ".att"
			f.set("/v2/acme/manifests/"+tag, page{header: map[string]string{"Content-Type": ociManifest}, body: text(layer)})
			return tag + "#0"
		}, "TOO_LARGE"},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFake(t, nil)
			ref := f.serve("acme", ociManifest, manifest(""))
			f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[]}`})
			good := "sha256-" + ref.Digest.Hex() + ".sig"
			f.set("/v2/acme/manifests/"+good, page{header: map[string]string{"Content-Type": ociManifest},
				body: text(descriptor("application/vnd.dev.cosign.simplesigning.v1+json", "payload", ""))})
			f.set("/v2/acme/blobs/"+attest.Hash([]byte("payload")).String(), page{body: "payload"})
			place := row.plant(f, ref)
			got, err := foreign(t, newClient(t, registry.Config{Hosts: plain(f.host())}), ref)
			if err != nil {
				t.Fatal(err)
			}
			if got[place] != row.reason {
				t.Errorf("%s: %q, want %s (%v)", place, got[place], row.reason, got)
			}
			if !strings.HasPrefix(got[good+"#0"], "cosign-signature ") || len(got) != 2 {
				t.Errorf("the good one is hidden: %v", got)
			}
		})
	}
}

// list serves a manifest and lists it as a bundle that refers to ref.
func list(f *fake, ref attest.ImageRef, body string) string {
	d := f.serve("acme", ociManifest, body).Digest.String()
	f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: fmt.Sprintf(
		`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"artifactType":%q,"digest":%q,"size":%d}]}`, ociIndex, ociManifest, bundleType, d, len(body))})
	return d
}

// A registry that does not answer has not said that there is nothing (attacks G09).
func TestG09ForeignRegistryFails(t *testing.T) {
	for _, path := range []string{"referrers/DIGEST", "manifests/sha256-HEX.sig", "manifests/sha256-HEX.att"} {
		f := newFake(t, nil)
		ref := f.serve("acme", ociManifest, manifest(""))
		f.set("/v2/acme/"+strings.NewReplacer("DIGEST", ref.Digest.String(), "HEX", ref.Digest.Hex()).Replace(path), page{status: http.StatusServiceUnavailable})
		_, err := foreign(t, newClient(t, registry.Config{Hosts: plain(f.host())}), ref)
		if attest.ReasonOf(err) != attest.RegistryUnavailable {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// However many referrers there are, the number that is fetched is bounded, and those
// that say they are bundles come first (attacks G07).
func TestG07Foreign(t *testing.T) {
	f := newFake(t, nil)
	ref := f.serve("acme", ociManifest, manifest(""))
	var entries []string
	for i := range 1000 {
		body := manifest(fmt.Sprintf(`,"annotations":{"n":"%d"}`, i))
		f.serve("acme", ociManifest, body)
		entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"artifactType":"text/plain","digest":%q,"size":%d}`, ociManifest, attest.Hash([]byte(body)), len(body)))
	}
	last := manifest(`,"annotations":{"n":"bundle"}`)
	f.serve("acme", ociManifest, last)
	entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"artifactType":%q,"digest":%q,"size":%d}`, ociManifest, bundleType, attest.Hash([]byte(last)), len(last)))
	f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + strings.Join(entries, ",") + `]}`})

	var why error
	err := newClient(t, registry.Config{Hosts: plain(f.host())}).Foreign(t.Context(), ref, func(found registry.Found) error { why = found.Err; return nil })
	if err != nil || attest.ReasonOf(why) != attest.TooLarge || !strings.Contains(why.Error(), "873 further") {
		t.Errorf("%v, skipped for %v", err, why)
	}
	asked := f.calls()
	first := "GET /v2/acme/manifests/" + attest.Hash([]byte(last)).String()
	found := false
	for _, c := range asked {
		found = found || c.request == first
	}
	if len(asked) > 135 || !found {
		t.Errorf("%d requests, the bundle among them: %v", len(asked), found)
	}
}

// Bundles crowd out nothing but bundles, layers nothing but layers, and all of it
// together has a bound in bytes (attacks G07, G19).
func TestG07ForeignBounds(t *testing.T) {
	f := newFake(t, nil)
	ref := f.serve("acme", ociManifest, manifest(""))
	tag := "sha256-" + ref.Digest.Hex()
	var entries, layers []string
	for i := range 200 {
		body := manifest(fmt.Sprintf(`,"annotations":{"n":"%d"}`, i))
		f.serve("acme", ociManifest, body)
		entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"artifactType":%q,"digest":%q,"size":%d}`, ociManifest, bundleType, attest.Hash([]byte(body)), len(body)))
		layers = append(layers, descriptor("application/vnd.dev.cosign.simplesigning.v1+json", "payload", ""))
	}
	layout := func(layers ...string) string {
		return `{"schemaVersion":2,"mediaType":"` + ociManifest + `","config":` + descriptor("application/vnd.oci.image.config.v1+json", "{}", "") + `,"layers":[` + strings.Join(layers, ",") + `]}`
	}
	f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + strings.Join(entries, ",") + `]}`})
	f.set("/v2/acme/manifests/"+tag+".sig", page{header: map[string]string{"Content-Type": ociManifest}, body: layout(layers...)})
	f.set("/v2/acme/blobs/"+attest.Hash([]byte("payload")).String(), page{body: "payload"})
	// Five layers of 15 MiB do not fit.
	big := strings.Repeat("x", 15<<20)
	part := descriptor("application/vnd.dsse.envelope.v1+json", big, "")
	f.set("/v2/acme/manifests/"+tag+".att", page{header: map[string]string{"Content-Type": ociManifest}, body: layout(part, part, part, part, part)})
	f.set("/v2/acme/blobs/"+attest.Hash([]byte(big)).String(), page{body: big})

	why, layersRead, bytesRead := map[string]string{}, 0, 0
	err := newClient(t, registry.Config{Hosts: plain(f.host())}).Foreign(t.Context(), ref, func(found registry.Found) error {
		if found.Err != nil {
			why[found.Place] = found.Err.Error()
		} else if found.Form == attest.FormSignature {
			layersRead++
		} else {
			bytesRead++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for place, words := range map[string]string{
		"referrers of " + ref.Digest.String(): "TOO_LARGE: 72 further referrers", tag + ".sig": "TOO_LARGE: 72 further layers", tag + ".att#4": "TOO_LARGE: what is beside",
	} {
		if !strings.HasPrefix(why[place], words) {
			t.Errorf("%s: %q, want %q", place, why[place], words)
		}
	}
	if layersRead != 128 || bytesRead != 4 || len(why) != 3 {
		t.Errorf("%d layers, %d large ones, %v", layersRead, bytesRead, why)
	}
}

// Manifests that are too large for a bundle's are not fetched, nor is one that hides
// its size read to its end, and when the allowance is used up nothing more is asked
// for (attacks G07, G19).
func TestG19ForeignManifestsAreBoundedBeforeTheyAreFetched(t *testing.T) {
	f := newFake(t, nil)
	ref := f.serve("acme", ociManifest, manifest(""))
	var entries []string
	entry := func(body string, size int) string {
		d := f.serve("acme", ociManifest, body).Digest.String()
		entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"artifactType":%q,"digest":%q,"size":%d}`, ociManifest, bundleType, d, size))
		return d
	}
	bundleOf := func(content, more string) string {
		return `{"schemaVersion":2,"mediaType":"` + ociManifest + `","config":` + descriptor("application/vnd.oci.image.config.v1+json", "{}", "") +
			`,"layers":[` + descriptor(bundleType, content, "") + `],"subject":` + fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":2}`, ociManifest, ref.Digest) + more + `}`
	}
	padding := fmt.Sprintf(`,"annotations":{"a":%q}`, strings.Repeat("a", 64<<10))
	honest, refused := map[string]bool{}, map[string]bool{}
	big := strings.Repeat("x", 15<<20)
	f.set("/v2/acme/blobs/"+attest.Hash([]byte(big)).String(), page{body: big})
	for i := range 6 { // 90 MiB of bundles
		body := bundleOf(big, fmt.Sprintf(`,"annotations":{"n":"%d"}`, i))
		honest[entry(body, len(body))] = true
	}
	for i := range 20 {
		body := bundleOf("small", fmt.Sprintf(`,"artifactType":"a/%d"`, i)+padding)
		refused[entry(body, len(body))] = true
	}
	negative := entry(bundleOf("small", `,"artifactType":"a/negative"`), -(1 << 40))
	refused[negative] = true
	liar := entry(bundleOf("small", `,"artifactType":"a/liar"`+padding), 700)
	f.set("/v2/acme/referrers/"+ref.Digest.String(), page{body: `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + strings.Join(entries, ",") + `]}`})

	read, why := 0, map[string]string{}
	err := newClient(t, registry.Config{Hosts: plain(f.host())}).Foreign(t.Context(), ref, func(found registry.Found) error {
		if found.Err != nil {
			if found.Content != nil {
				t.Errorf("%s has an error and its content", found.Place)
			}
			why[found.Place] = found.Err.Error()
		} else {
			read++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	asked := map[string]int{}
	for _, c := range f.calls() {
		asked[strings.TrimPrefix(c.request, "GET /v2/acme/")]++
	}
	for d := range refused {
		if asked["manifests/"+d] != 0 || !strings.HasPrefix(why[d], "TOO_LARGE: it is listed with") {
			t.Errorf("%s: asked for %d times, skipped for %q", d, asked["manifests/"+d], why[d])
		}
	}
	if asked["manifests/"+liar] != 1 || !strings.HasPrefix(why[liar], "TOO_LARGE: registry") {
		t.Errorf("one that is larger than listed: skipped for %q", why[liar])
	}
	if n := asked["blobs/"+attest.Hash([]byte(big)).String()]; n != 4 || read != 4 {
		t.Errorf("%d large bundles asked for, %d read, want 4", n, read)
	}
	tag := "sha256-" + ref.Digest.Hex()
	beyond := 0
	for place, words := range why {
		if strings.HasPrefix(words, "TOO_LARGE: what is beside") && (honest[place] || place == tag+".sig" || place == tag+".att") {
			beyond++
		}
	}
	if beyond != 4 || len(why) != 4+len(refused)+1 || asked["manifests/"+tag+".sig"]+asked["manifests/"+tag+".att"] != 0 {
		t.Errorf("skipped beyond the allowance: %d of %v; asked for %v", beyond, why, asked)
	}
}
