package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hallmarkd/hallmark/internal/dev"
)

// mountSpace is a mount namespace of its own, in which a test may mount a small
// disk whoever runs it.
type mountSpace struct {
	t   *testing.T
	pid string
}

func newMountSpace(t *testing.T) mountSpace {
	t.Helper()
	// The shell says when it is inside, and keeps the namespace until its input ends.
	cmd := exec.Command("unshare", append(userFlags(), "--mount", "sh", "-c", "echo $$; read end")...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("unshare, of Debian's util-linux: %v", err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	line := make([]byte, 32)
	n, err := out.Read(line)
	if err != nil {
		t.Fatalf("no mount namespace: %v", err)
	}
	return mountSpace{t, strings.TrimSpace(string(line[:n]))}
}

// userFlags makes whoever runs the test root inside.
func userFlags() []string {
	if os.Getuid() == 0 {
		return nil
	}
	return []string{"--user", "--map-root-user"}
}

func (m mountSpace) command(args ...string) *exec.Cmd {
	flags := []string{"--target", m.pid, "--mount"}
	if os.Getuid() != 0 {
		flags = append(flags, "--user", "--preserve-credentials")
	}
	return exec.Command("nsenter", append(append(flags, "--"), args...)...)
}

func (m mountSpace) run(args ...string) string {
	m.t.Helper()
	out, err := m.command(args...).CombinedOutput()
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// scene is a configured service on a disk of its own, with a job that signs.
type scene struct {
	mountSpace
	bin, config, data, url, token string
	registry                      *dev.Registry
}

func newScene(t *testing.T, size string) *scene {
	t.Helper()
	s := &scene{mountSpace: newMountSpace(t)}
	dir := t.TempDir()
	s.bin, s.config, s.data = filepath.Join(dir, "hallmarkd"), filepath.Join(dir, "c.yaml"), filepath.Join(dir, "data")
	if out, err := exec.Command("go", "build", "-o", s.bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("building hallmarkd: %v\n%s", err, out)
	}
	issuer, err := dev.StartIssuer(t.Context(), dev.IssuerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { issuer.Close() })
	if s.registry, err = dev.StartRegistry(t.Context(), "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.registry.Close() })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	s.url = "http://" + addr
	files := map[string]string{
		"c.yaml": fmt.Sprintf(`public_url: %s
listen: %s
data: data
issuers: [{name: ci, provider: github, issuer: "%s", owners: ["%s"], server_url: "https://github.com", plain_http: true}]
registries: [{host: "%s", plain_http: true}]
policy: policy.yaml
`, s.url, addr, issuer.URL(), dev.GitHubID("acme"), s.registry.Host()),
		"policy.yaml": fmt.Sprintf(`version: 1
roles:
  signers: [{issuer: ci, images: ["%s/*"], when: "id.repository_id == '%s'"}]
`, s.registry.Host(), dev.GitHubID("acme/api")),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	claims := dev.GitHubClaims("acme/api", strings.Repeat("ab", 20), "refs/heads/main")
	claims["aud"] = s.url
	if s.token, err = issuer.Mint(claims); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.data, 0o700); err != nil {
		t.Fatal(err)
	}
	s.run("mount", "-t", "tmpfs", "-o", "mode=0700,size="+size, "none", s.data)
	s.run(s.bin, "init", "--config", s.config)
	return s
}

// serve starts the service and returns how to stop it.
func (s *scene) serve() (stop func()) {
	s.t.Helper()
	cmd := s.command(s.bin, "serve", "--config", s.config)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for deadline := time.Now().Add(30 * time.Second); ; {
		resp, err := http.Get(s.url + "/v1/trust/checkpoint")
		if err == nil {
			resp.Body.Close()
			break
		}
		select {
		case err := <-exited:
			s.t.Fatalf("hallmarkd ended: %v\n%s", err, log.String())
		default:
		}
		if time.Now().After(deadline) {
			s.t.Fatal("hallmarkd does not answer")
		}
	}
	return func() {
		s.t.Helper()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			s.t.Fatal(err)
		}
		if err := <-exited; err != nil {
			s.t.Fatalf("hallmarkd ended with %v\n%s", err, log.String())
		}
	}
}

// push pushes an image of its own and returns its reference.
func (s *scene) push(n int) string {
	s.t.Helper()
	img, err := random.Image(64, 1)
	if err != nil {
		s.t.Fatal(err)
	}
	ref, err := name.NewTag(s.registry.Host()+"/api:"+strconv.Itoa(n), name.Insecure)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		s.t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		s.t.Fatal(err)
	}
	return ref.Repository.Name() + "@" + digest.String()
}

// sign asks for a signature and returns the record's id, or the reason of a refusal.
func (s *scene) sign(image string) (record, reason string) {
	s.t.Helper()
	body := fmt.Sprintf(`{"images":[{"image":%q}],"attach":"ATTACH_CLIENT"}`, image)
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.url+"/v1/images:sign", strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	var out struct {
		Results []struct {
			Refusal    struct{ Reason string }
			Provenance struct{ ID string }
		}
		Details []struct{ Reason string }
	}
	if err := json.Unmarshal(text, &out); err != nil {
		s.t.Fatalf("%v: %s", err, text)
	}
	switch {
	case len(out.Results) == 1:
		return out.Results[0].Provenance.ID, out.Results[0].Refusal.Reason
	case len(out.Details) > 0:
		return "", out.Details[0].Reason
	}
	s.t.Fatalf("no answer: %s", text)
	return "", ""
}

func (s *scene) clean() {
	s.t.Helper()
	if out := s.run(s.bin, "fsck", "--config", s.config); !strings.Contains(out, " 0 problems") {
		s.t.Fatalf("fsck: %s", out)
	}
}

// A full disk refuses what it cannot keep, loses nothing that was acknowledged, and
// is over when there is room again.
func TestFullDisk(t *testing.T) {
	s := newScene(t, "8m")
	stop := s.serve()
	signed := map[string]string{}
	first := s.push(0)
	if signed[first], _ = s.sign(first); signed[first] == "" {
		t.Fatal("the first signature was refused")
	}
	// Somebody else fills the disk.
	_ = s.command("sh", "-c", "cat /dev/zero > "+filepath.Join(s.data, "filler")).Run()
	refused := ""
	for n := 1; refused == "" && n < 60; n++ {
		image := s.push(n)
		record, reason := s.sign(image)
		switch {
		case record != "":
			signed[image] = record
		case reason == "LEDGER_UNAVAILABLE":
			refused = image
		default:
			t.Fatalf("a full disk gives the reason %q", reason)
		}
	}
	if refused == "" {
		t.Fatal("a full disk refused nothing")
	}
	// Room again, and the next start: what was refused can be repeated, what was
	// acknowledged is there.
	s.run("rm", filepath.Join(s.data, "filler"))
	stop()
	stop = s.serve()
	if record, reason := s.sign(refused); record == "" {
		t.Fatalf("with room again the request is still refused: %s", reason)
	}
	for image, record := range signed {
		if again, reason := s.sign(image); again != record {
			t.Fatalf("%s was acknowledged as %s and is now %s %s", image, record, again, reason)
		}
	}
	stop()
	s.clean()
}

// A data directory that cannot be written is one clear line and a non-zero exit.
func TestReadOnlyData(t *testing.T) {
	s := newScene(t, "16m")
	s.run("mount", "-o", "remount,ro", s.data)
	out, err := s.command(s.bin, "serve", "--config", s.config).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "hallmarkd: LEDGER_UNAVAILABLE") || !strings.Contains(string(out), "read-only") {
		t.Fatalf("serving a read-only directory: %v\n%s", err, out)
	}
	s.run("mount", "-o", "remount,rw", s.data)
	s.serve()()
	s.clean()
}

// A registry that cannot be reached refuses the signing and keeps nothing; the same
// request succeeds when it is back.
func TestUnreachableRegistry(t *testing.T) {
	s := newScene(t, "16m")
	stop := s.serve()
	image := s.push(0)
	s.registry.Close()
	if record, reason := s.sign(image); record != "" || reason != "REGISTRY_UNAVAILABLE" {
		t.Fatalf("signing without a registry: record %q, reason %q", record, reason)
	}
	stop()
	s.clean()
}
