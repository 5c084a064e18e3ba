//go:build linux

package interop_test

import (
	"bufio"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The demo prints commands for its readers: they work while it stays up, and it
// leaves nothing when it is interrupted.
func TestDemoKeptUp(t *testing.T) {
	t.Parallel()
	cmd, scratch := demo(t, "HALLMARK_DEMO_KEEP=1")
	stdout := must(cmd.StdoutPipe())(t)
	check(t, cmd.Start())
	said := &strings.Builder{}
	var commands [][]string
	server := ""
	for lines := bufio.NewScanner(io.TeeReader(stdout, said)); server == "" && lines.Scan(); {
		words := strings.Fields(lines.Text())
		switch {
		case len(words) > 0 && words[0] == "cosign":
			commands = append(commands, words[1:])
		case len(words) == 2 && words[0] == "server":
			server = words[1]
		}
	}
	if len(commands) != 2 || server == "" {
		t.Fatalf("the demo did not stay up and print two commands:\n%s", said)
	}
	for _, c := range cosigns(t) {
		for _, args := range commands {
			c.want(t, true, args...)
		}
	}
	addr := must(url.Parse(server))(t).Host
	conn := must(net.Dial("tcp", addr))(t)
	conn.Close()

	check(t, cmd.Process.Signal(os.Interrupt))
	rest := must(io.ReadAll(stdout))(t)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the interrupted demo ended with %v:\n%s%s", err, said, rest)
	}
	left(t, scratch, addr)
}

// Without a terminal the demo ends by itself when all went as told.
func TestDemoEnds(t *testing.T) {
	t.Parallel()
	cmd, scratch := demo(t)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("the demo ended with %v:\n%s", err, out)
	}
	m := regexp.MustCompile(`server http://(127\.0\.0\.1:\d+)`).FindSubmatch(out)
	if m == nil || !strings.Contains(string(out), "cosign verify-attestation") {
		t.Fatalf("the demo said:\n%s", out)
	}
	left(t, scratch, string(m[1]))
}

// demo returns the demo as make starts it, without a terminal, in a folder of its
// own, and the folder in which it may work.
func demo(t *testing.T, environment ...string) (*exec.Cmd, string) {
	t.Helper()
	dir, scratch := t.TempDir(), t.TempDir()
	check(t, os.Mkdir(filepath.Join(dir, "bin"), 0o755))
	for _, p := range []string{"hallmark", "hallmarkd"} {
		check(t, os.Symlink(program(t, p), filepath.Join(dir, "bin", p)))
	}
	// The demo signs this checkout's HEAD.
	git := exec.CommandContext(t.Context(), "git", "rev-parse", "--absolute-git-dir")
	git.Dir = root
	checkout := strings.TrimSpace(string(must(git.Output())(t)))
	cmd := exec.CommandContext(t.Context(), program(t, "demo"))
	cmd.Dir = dir
	cmd.Env = append([]string{"HOME=" + dir, "PATH=" + os.Getenv("PATH"), "TMPDIR=" + scratch, "GIT_DIR=" + checkout}, environment...)
	return cmd, scratch
}

// left checks that nothing is: no file, and no service at addr.
func left(t *testing.T, scratch, addr string) {
	t.Helper()
	files := must(os.ReadDir(scratch))(t)
	if len(files) > 0 {
		t.Errorf("the demo left %v", files)
	}
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		conn.Close()
		t.Errorf("the demo's service still answers at %s", addr)
	}
}
