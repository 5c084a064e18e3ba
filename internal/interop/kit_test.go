//go:build linux

package interop_test

import (
	"bufio"
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/registry"
	"github.com/hallmarkd/hallmark/signer"
)

// world is a running service beside one registry, with what its users signed
// and promoted there, and what a verifier elsewhere has: files.
type world struct {
	*testkit.Stack
	host    string // of the registry
	root    string // file: trusted_root.json, from "hallmark trust-root"
	gateKey string // file: gate.pub, from "hallmark trust-root --gate-key"
	job     attest.Identity

	img      v1.Image
	image    signed
	index    signed
	children []attest.Digest // of index
}

// signed is an image and the bundles that the service returned for it.
type signed struct {
	attest.ImageRef
	signature, provenance []byte
}

// kinds are the registries that the tests run against: the built-in one with the
// referrers API, and Debian's without, where referrers are listed under a tag.
// Each starts a service beside the registry and returns the registry's host:port.
var kinds = map[string]func(testing.TB) (*testkit.Stack, string){
	withAPI: func(t testing.TB) (*testkit.Stack, string) {
		s := testkit.NewStack(t, testkit.Options{})
		return s, s.Registry.Host()
	},
	withTag: func(t testing.TB) (*testkit.Stack, string) {
		host := debianRegistry(t)
		return testkit.NewStack(t, testkit.Options{
			Policy: testkit.DefaultPolicy(host), Hosts: []registry.Host{{Host: host, PlainHTTP: true}},
		}), host
	},
}

const withAPI, withTag = "referrers API", "fallback tag"

// newWorld starts a service and has an image and an index of two platforms
// signed through its API.
func newWorld(t *testing.T, kind string) *world {
	t.Helper()
	s, host := kinds[kind](t)
	w := &world{Stack: s, host: host, job: s.Identity(s.Token(nil))}
	dir := t.TempDir()
	w.root, w.gateKey = filepath.Join(dir, "trusted_root.json"), filepath.Join(dir, "gate.pub")
	w.hallmark(t, 0, "--server", s.URL, "trust-root", "--out-file", w.root)
	w.hallmark(t, 0, "--server", s.URL, "trust-root", "--gate-key", "--out-file", w.gateKey)

	base := w.push(t, "base/debian", testkit.RandomImage(t))
	w.img = on(t, base)
	ref := w.push(t, "acme/api", w.img)
	w.image = w.sign(t, w.Token(nil), ref.ImageRef, string(base.Repository)+"@"+base.Digest.String())
	idx, children := twoPlatforms(t)
	w.children = children
	w.index = w.sign(t, w.Token(nil), w.pushIndex(t, "acme/multi", idx), "")
	return w
}

// sign has an image signed over gRPC.
func (w *world) sign(t *testing.T, token string, ref attest.ImageRef, base string) signed {
	t.Helper()
	resp, err := pb.NewSigningServiceClient(w.Dial(token)).SignImages(t.Context(), &pb.SignImagesRequest{
		Images: []*pb.SignImage{{Image: ref.String(), Base: base}},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := resp.GetResults()[0]
	if got.GetRefusal() != nil || got.GetAttachState() != pb.AttachState_ATTACH_STATE_ATTACHED {
		t.Fatalf("signing %s: %v, %v", ref, got.GetRefusal(), got.GetAttachState())
	}
	return signed{ref, got.GetSignatureBundle(), got.GetProvenanceBundle()}
}

// promote moves a stage to an image over gRPC and returns the answer.
func (w *world) promote(t *testing.T, ref attest.ImageRef, stage string) *pb.PromoteResponse {
	t.Helper()
	resp, err := pb.NewPromotionServiceClient(w.Dial(w.PromoterToken())).Promote(t.Context(), &pb.PromoteRequest{
		Image: ref.String(), ToStage: stage, Version: "1.0.0",
	})
	if err != nil {
		t.Fatal(err)
	}
	if !resp.GetDecision().GetAllowed() || resp.GetEffect() != "DONE" {
		t.Fatalf("promoting to %s: %v %s", stage, resp.GetDecision(), resp.GetEffect())
	}
	return resp
}

// stranger writes the trust root and the gate key of another service of the
// same name: only its keys differ.
func (w *world) stranger(t *testing.T) (root, gateKey string) {
	t.Helper()
	cfg := signer.Config{Dir: filepath.Join(t.TempDir(), "keys"), Service: w.URL}
	check(t, signer.Init(cfg))
	s := must(signer.Open(cfg))(t)
	defer s.Close()
	return file(t, "trusted_root.json", s.TrustedRoot()), file(t, "gate.pub", s.GateKeyPEM())
}

// The flags by which cosign is told what to trust and whom to expect.
func (w *world) trusting(root string) []string {
	return []string{"--trusted-root", root, "--use-signed-timestamps"}
}

func (w *world) byJob() []string { return by(w.job.SAN, w.job.Issuer) }

func (w *world) byGate() []string { return by(w.URL+"/gate", w.URL) }

func by(san, issuer string) []string {
	return []string{"--certificate-identity", san, "--certificate-oidc-issuer", issuer}
}

// about tells cosign's blob commands which digest a statement must be about.
func about(d attest.Digest) []string { return []string{"--digest", d.Hex(), "--digestAlg", "sha256"} }

// cosign is one of the stock binaries.
type cosign struct {
	name string // "v2" or "v3"
	path string
}

// cosigns returns both, after a look at what they were built from: the versions
// that tools.mk names, and nothing replaced.
func cosigns(t *testing.T) []cosign {
	t.Helper()
	pins := must(os.ReadFile(filepath.Join(root, "tools.mk")))(t)
	var out []cosign
	for _, line := range []string{"v2", "v3"} {
		c := cosign{line, must(filepath.Abs(filepath.Join(root, ".tools", "cosign-"+line, "cosign")))(t)}
		info, err := buildinfo.ReadFile(c.path)
		if err != nil {
			t.Fatalf("stock cosign %s is needed for this test; run: make tools (%v)", line, err)
		}
		want := info.Main.Path + "/cmd/cosign@" + info.Main.Version
		if !bytes.Contains(pins, []byte(" "+want+"\n")) || info.Main.Replace != nil {
			t.Fatalf("%s is built from %s, which tools.mk does not name; run: make tools", c.path, want)
		}
		out = append(out, c)
	}
	return out
}

// accepts runs cosign and reports whether it ended well, with all that it said.
// An end that is no verdict, by a signal or for an unknown flag, ends the test.
func (c cosign) accepts(t *testing.T, args ...string) (bool, string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), c.path, args...)
	// Nothing of the machine's own configuration, and nowhere to keep a cache.
	cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || !exit.Exited()) {
		t.Fatalf("cosign %s %s: %v\n%s", c.name, strings.Join(args, " "), err, out)
	}
	for _, vain := range []string{"unknown flag", "unknown command", "connection refused", "HTTP response to HTTPS", "MANIFEST_UNKNOWN", "accepts 1 arg"} {
		if strings.Contains(string(out), vain) {
			t.Fatalf("cosign %s %s did not come to judge: %s", c.name, strings.Join(args, " "), out)
		}
	}
	return err == nil, string(out)
}

// want runs cosign and checks its verdict.
func (c cosign) want(t *testing.T, ok bool, args ...string) string {
	t.Helper()
	got, out := c.accepts(t, args...)
	if got != ok {
		t.Errorf("cosign %s accepts: %v, want %v\ncosign %s\n%s", c.name, got, ok, strings.Join(args, " "), out)
	}
	return out
}

// hallmark runs the client, checks its exit code and returns its output.
func (w *world) hallmark(t *testing.T, code int, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program(t, "hallmark"), args...)
	cmd.Env = []string{"HOME=" + t.TempDir()}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("running hallmark: %v", err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("hallmark %s ended with %d, want %d\n%s%s", strings.Join(args, " "), got, code, out, stderr.String())
	}
	return string(out)
}

// offline has the client judge a bundle in a file, and returns the reason of its
// denial, "" when it accepts.
func (w *world) offline(t *testing.T, ref attest.ImageRef, bundle []byte, root string, expect ...string) attest.Reason {
	t.Helper()
	args := append([]string{"--output", "json", "verify", ref.String(), "--offline", "--trusted-root", root,
		"--bundle", file(t, "bundle.sigstore.json", bundle)}, expect...)
	cmd := exec.CommandContext(t.Context(), program(t, "hallmark"), args...)
	cmd.Env = []string{"HOME=" + t.TempDir()}
	out, err := cmd.Output()
	var said struct {
		Allowed bool `json:"allowed"`
		Results []struct {
			Reason attest.Reason `json:"reason"`
		} `json:"results"`
	}
	if e := json.Unmarshal(out, &said); e != nil || len(said.Results) != 1 {
		t.Fatalf("hallmark %s said %q, %v, %v", strings.Join(args, " "), out, e, err)
	}
	code, reason := cmd.ProcessState.ExitCode(), said.Results[0].Reason
	if said.Allowed != (code == 0) || said.Allowed != (reason == "") || code != 0 && code != 20 {
		t.Fatalf("hallmark ended with %d and said %s", code, out)
	}
	return reason
}

// debianRegistry starts Debian's docker-registry and returns its host:port.
func debianRegistry(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatalf("Debian's docker-registry is needed for this test (apt-get install docker-registry): %v", err)
	}
	config := file(t, "config.yml", []byte("version: 0.1\nstorage: {inmemory: {}}\nhttp: {addr: \"127.0.0.1:0\"}\n"))
	cmd := exec.Command(path, "serve", config)
	stderr := must(cmd.StderrPipe())(t)
	check(t, cmd.Start())
	drained := make(chan struct{})
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-drained
		cmd.Wait()
	})
	listening := regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)
	lines, said := bufio.NewScanner(stderr), ""
	for lines.Scan() {
		said += lines.Text() + "\n"
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			go func() {
				defer close(drained)
				for lines.Scan() {
				}
			}()
			return m[1]
		}
	}
	close(drained)
	t.Fatalf("docker-registry did not start:\n%s", said)
	return ""
}

// pushed is an image that the registry has.
type pushed struct {
	attest.ImageRef
	img v1.Image
}

func (w *world) push(t testing.TB, repo string, img v1.Image) pushed {
	t.Helper()
	ref := w.ref(t, repo, must(img.Digest())(t))
	check(t, remote.Write(digest(t, ref), img, remote.WithContext(t.Context())))
	return pushed{ref, img}
}

func (w *world) pushIndex(t testing.TB, repo string, idx v1.ImageIndex) attest.ImageRef {
	t.Helper()
	ref := w.ref(t, repo, must(idx.Digest())(t))
	check(t, remote.WriteIndex(digest(t, ref), idx, remote.WithContext(t.Context())))
	return ref
}

func (w *world) ref(t testing.TB, repo string, h v1.Hash) attest.ImageRef {
	t.Helper()
	return must(attest.ParseImageRef(w.host + "/" + repo + "@" + h.String()))(t)
}

func digest(t testing.TB, ref attest.ImageRef) name.Digest {
	t.Helper()
	return must(name.NewDigest(ref.String(), name.Insecure))(t)
}

// on returns an image that is base with one more layer.
func on(t testing.TB, base pushed) v1.Image {
	t.Helper()
	return must(mutate.AppendLayers(base.img, must(random.Layer(256, types.OCILayer))(t)))(t)
}

// twoPlatforms returns an index of two images and their digests.
func twoPlatforms(t testing.TB) (v1.ImageIndex, []attest.Digest) {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var children []attest.Digest
	for _, arch := range []string{"amd64", "arm64"} {
		img := testkit.RandomImage(t)
		cfg := must(img.ConfigFile())(t).DeepCopy()
		cfg.Architecture = arch
		img = must(mutate.ConfigFile(img, cfg))(t)
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
		children = append(children, must(attest.ParseDigest(must(img.Digest())(t).String()))(t))
	}
	return idx, children
}

// attachCopy pushes a copy of the signed image to a repository of its own, where
// it has no referrers yet, attaches a bundle to it in the way of cosign 3, by
// go-containerregistry alone, and returns the copy.
func (w *world) attachCopy(t testing.TB, repo string, bundle []byte) attest.ImageRef {
	t.Helper()
	ref := w.push(t, repo, w.img).ImageRef
	subject := must(remote.Head(digest(t, ref), remote.WithContext(t.Context())))(t)
	layer := static.NewLayer(bundle, attest.BundleMediaType)
	config := static.NewLayer([]byte("{}"), "application/vnd.oci.empty.v1+json")
	for _, l := range []v1.Layer{layer, config} {
		check(t, remote.WriteLayer(digest(t, ref).Repository, l, remote.WithContext(t.Context())))
	}
	raw := must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": types.OCIManifestSchema1, "artifactType": attest.BundleMediaType,
		"config": descriptor(t, config), "layers": []any{descriptor(t, layer)},
		"subject": map[string]any{"mediaType": subject.MediaType, "size": subject.Size, "digest": subject.Digest},
		"annotations": map[string]string{
			"dev.sigstore.bundle.content": "dsse-envelope", "dev.sigstore.bundle.predicateType": attest.PredicateProvenance,
			"org.opencontainers.image.created": time.Now().UTC().Format(time.RFC3339),
		},
	}))(t)
	own := w.ref(t, repo, v1.Hash{Algorithm: "sha256", Hex: attest.Hash(raw).Hex()})
	check(t, remote.Put(digest(t, own), manifest(raw), remote.WithContext(t.Context())))
	return ref
}

func descriptor(t testing.TB, l v1.Layer) map[string]any {
	t.Helper()
	return map[string]any{"mediaType": must(l.MediaType())(t), "size": must(l.Size())(t), "digest": must(l.Digest())(t)}
}

// manifest is an OCI manifest as it is written.
type manifest []byte

func (m manifest) RawManifest() ([]byte, error)        { return m, nil }
func (m manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// hasReferrersAPI asks the registry itself.
func (w *world) hasReferrersAPI(t testing.TB) bool {
	t.Helper()
	resp := must(http.Get("http://" + w.host + "/v2/acme/api/referrers/" + w.image.Digest.String()))(t)
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// file writes data into a directory that is gone with the test.
func file(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	check(t, os.WriteFile(path, data, 0o600))
	return path
}

// must returns a function that ends the test when err is set: must(f())(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
