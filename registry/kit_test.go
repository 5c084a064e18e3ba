package registry_test

import (
	"bufio"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/registry"
)

// plain configures hosts that speak http on loopback.
func plain(hosts ...string) []registry.Host {
	var out []registry.Host
	for _, h := range hosts {
		out = append(out, registry.Host{Host: h, PlainHTTP: true})
	}
	return out
}

func newClient(t testing.TB, cfg registry.Config) *registry.Client {
	t.Helper()
	c, err := registry.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// anywhere is for a caller who may read every repository.
func anywhere(attest.Repository) bool { return true }

// devRegistry starts the built-in registry, which has the referrers API.
func devRegistry(t testing.TB) string {
	t.Helper()
	r, err := dev.StartRegistry(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r.Host()
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

// debianRegistry starts Debian's docker-registry, which has no referrers API, in
// memory.
func debianRegistry(t testing.TB) string {
	t.Helper()
	return startDebian(t, "inmemory: {}")
}

// debianRegistryOnDisk is as slow as the disk, and has the races of one.
func debianRegistryOnDisk(t testing.TB) string {
	t.Helper()
	return startDebian(t, fmt.Sprintf("filesystem: {rootdirectory: %q}", t.TempDir()))
}

func startDebian(t testing.TB, storage string) string {
	t.Helper()
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatalf("Debian's docker-registry is needed for this test (apt-get install docker-registry): %v", err)
	}
	config := filepath.Join(t.TempDir(), "config.yml")
	text := "version: 0.1\nstorage:\n  " + storage + "\n  delete: {enabled: true}\nhttp: {addr: \"127.0.0.1:0\"}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "serve", config)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			drained := make(chan struct{})
			go func() {
				defer close(drained)
				for lines.Scan() {
				}
			}()
			t.Cleanup(func() {
				cmd.Process.Kill()
				<-drained
				cmd.Wait()
			})
			return m[1]
		}
	}
	cmd.Wait()
	t.Fatalf("docker-registry did not start:\n%s", strings.Join(said, "\n"))
	return ""
}

// image returns an image with one layer for each text.
func image(t testing.TB, layers ...string) v1.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		if img, err = mutate.AppendLayers(img, static.NewLayer([]byte(l), types.OCIUncompressedLayer)); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// annotate returns what with annotations, given as name and value in turn.
func annotate[T partial.WithRawManifest](what T, pairs ...string) T {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return mutate.Annotations(what, m).(T)
}

// index returns an index of images by platform, "linux/arm64/v8".
func index(t testing.TB, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range sorted(maps.Keys(images)) {
		platform, err := v1.ParsePlatform(p)
		if err != nil {
			t.Fatal(err)
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: images[p], Descriptor: v1.Descriptor{Platform: platform}})
	}
	return idx
}

// push stores what under repo and tag and returns its reference by digest.
func push(t testing.TB, repo, tag string, what remote.Taggable) attest.ImageRef {
	t.Helper()
	n, err := name.NewTag(repo+":"+tag, name.StrictValidation)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Push(n, what); err != nil {
		t.Fatal(err)
	}
	raw, err := what.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	return attest.ImageRef{Repository: attest.Repository(repo), Digest: attest.Hash(raw)}
}

func digestOf(t testing.TB, what remote.Taggable) attest.Digest {
	t.Helper()
	raw, err := what.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	return attest.Hash(raw)
}

// want fails unless err carries the reason; "" means no error.
func want(t testing.TB, err error, reason attest.Reason) {
	t.Helper()
	if got := attest.ReasonOf(err); got != reason {
		t.Fatalf("got %q (%v), want %q", got, err, reason)
	}
}

// page is what a fake registry answers for one path.
type page struct {
	status int
	header map[string]string
	body   string
}

// fake is a registry that answers what it is told, and remembers what it was
// asked: "GET /v2/a/manifests/x" with the Authorization it came with.
type fake struct {
	*httptest.Server
	mu    sync.Mutex
	pages map[string]page
	log   []call
}

type call struct{ request, authorization string }

// newFake starts a fake. Keys are paths, or "METHOD path"; "/v2/" is answered
// with 200 unless told otherwise, everything else with 404.
func newFake(t testing.TB, pages map[string]page) *fake {
	t.Helper()
	f := &fake{pages: pages}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func newFakeTLS(t testing.TB, pages map[string]page) *fake {
	t.Helper()
	f := &fake{pages: pages}
	f.Server = httptest.NewTLSServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fake) host() string { return f.Listener.Addr().String() }

func (f *fake) repo(path string) attest.Repository { return attest.Repository(f.host() + "/" + path) }

func (f *fake) set(path string, p page) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pages == nil {
		f.pages = map[string]page{}
	}
	f.pages[path] = p
}

// serve stores a manifest with the headers an honest registry sends.
func (f *fake) serve(repo, mediaType, body string) attest.ImageRef {
	d := attest.Hash([]byte(body))
	f.set("/v2/"+repo+"/manifests/"+d.String(), page{header: map[string]string{"Content-Type": mediaType, "Docker-Content-Digest": d.String()}, body: body})
	return attest.ImageRef{Repository: f.repo(repo), Digest: d}
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.log = append(f.log, call{r.Method + " " + r.URL.Path, r.Header.Get("Authorization")})
	p, ok := f.pages[r.Method+" "+r.URL.Path]
	if !ok {
		p, ok = f.pages[r.URL.Path]
	}
	f.mu.Unlock()
	if !ok && r.URL.Path != "/v2/" {
		p.status = http.StatusNotFound
	}
	for k, v := range p.header {
		w.Header().Set(k, v)
	}
	if p.status != 0 {
		w.WriteHeader(p.status)
	}
	fmt.Fprint(w, p.body)
}

// calls returns what was asked, without the pings.
func (f *fake) calls() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []call
	for _, c := range f.log {
		if c.request != "GET /v2/" {
			out = append(out, c)
		}
	}
	return out
}

// untouched fails when anything was asked at all.
func (f *fake) untouched(t testing.TB) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.log) > 0 {
		t.Errorf("a host that must not be contacted was: %v", f.log)
	}
}

// caFile writes the certificate of a TLS fake.
func (f *fake) caFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// credentialsFile writes a docker config.json with one entry.
func credentialsFile(t testing.TB, host, user, password string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	writeCredentials(t, path, host, user, password)
	return path
}

func writeCredentials(t testing.TB, path, host, user, password string) {
	t.Helper()
	data, err := json.Marshal(map[string]any{"auths": map[string]any{host: map[string]string{"username": user, "password": password}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	dockerImage = "application/vnd.docker.distribution.manifest.v2+json"
	bundleType  = "application/vnd.dev.sigstore.bundle.v0.3+json"
)

// descriptor writes a descriptor of size 2 for text, with further members.
func descriptor(mediaType, text, more string) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d%s}`, mediaType, attest.Hash([]byte(text)), len(text), more)
}

// manifest writes a small image manifest, with further members.
func manifest(more string) string {
	return `{"schemaVersion":2,"mediaType":"` + ociManifest + `","config":` + descriptor("application/vnd.oci.image.config.v1+json", "{}", "") +
		`,"layers":[` + descriptor("application/vnd.oci.image.layer.v1.tar", "layer", "") + `]` + more + `}`
}

func itoa(n int) string { return strconv.Itoa(n) }
