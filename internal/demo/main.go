// Command demo tells the whole story of Hallmark on real input: it builds the
// image of this very checkout, has it signed, promotes it from stage to stage and
// shows what is refused and why. It runs the two binaries as a user would.
//
// On a terminal, or with HALLMARK_DEMO_KEEP=1, the service stays up until Ctrl-C.
// Without one it exits 0 when every step went as told, and 1 otherwise.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// demo is the state of the story.
type demo struct {
	ctx    context.Context
	bin    string // folder with hallmark and hallmarkd
	work   string // scratch folder
	env    environment
	commit string // of this checkout
	ci     string // file with the token of the build job
	gate   string // file with the token of the release job
	app    string // REPO@DIGEST of the signed image
	base   string // REPO:TAG@DIGEST of its base
}

// environment is what a running hallmarkd dev says of itself in dev.json.
type environment struct {
	Server     string `json:"server"`
	Registry   string `json:"registry"`
	Issuer     string `json:"issuer"`
	SignInLink string `json:"sign_in_link"`
}

func run(ctx context.Context) (err error) {
	d := &demo{ctx: ctx, bin: "bin"}
	if d.work, err = os.MkdirTemp("", "hallmark-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(d.work)
	server, err := d.start()
	if err != nil {
		return err
	}
	defer stopServer(server)

	for _, chapter := range []func() error{d.build, d.sign, d.promote, d.ask, d.refusals, d.stock} {
		if err := chapter(); err != nil {
			return err
		}
	}
	if os.Getenv("HALLMARK_DEMO_KEEP") != "1" && !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil
	}
	title("The service stays up. Press Ctrl-C to end it.")
	fmt.Printf("  page     %s   (signs you in once)\n  server   %s\n  registry %s\n", d.env.SignInLink, d.env.Server, d.env.Registry)
	<-ctx.Done()
	return nil
}

// start runs hallmarkd dev on a free port and waits until it says where it is.
func (d *demo) start() (*exec.Cmd, error) {
	title("Starting hallmarkd dev: service, OIDC issuer and registry in one process, on loopback")
	data := filepath.Join(d.work, "data")
	log, err := os.Create(filepath.Join(d.work, "hallmarkd.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(d.bin, "hallmarkd"), "dev", "--data", data, "--listen", "127.0.0.1:0")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting hallmarkd: %w", err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	deadline := time.After(time.Minute)
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		if text, err := os.ReadFile(filepath.Join(data, "dev.json")); err == nil {
			if err := json.Unmarshal(text, &d.env); err != nil {
				return nil, err
			}
			fmt.Printf("  server %s, registry %s\n", d.env.Server, d.env.Registry)
			return cmd, nil
		}
		select {
		case <-tick.C:
		case <-exited:
			text, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("hallmarkd ended:\n%s", text)
		case <-deadline:
			return nil, errors.New("hallmarkd did not start within a minute")
		case <-d.ctx.Done():
			return nil, d.ctx.Err()
		}
	}
}

// stopServer ends the service as an operator would.
func stopServer(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	for range 100 {
		if cmd.Process.Signal(syscall.Signal(0)) != nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	_ = cmd.Process.Kill()
}

func title(format string, args ...any) {
	fmt.Printf("\n== "+format+"\n\n", args...)
}

// hallmark runs the client with a token file, shows what it prints and checks how
// it ends.
func (d *demo) hallmark(token string, wantCode int, wantText string, args ...string) (string, error) {
	fmt.Printf("$ hallmark %s\n", strings.Join(args, " "))
	all := append([]string{"--server", d.env.Server, "--identity-token", token}, args...)
	cmd := exec.CommandContext(d.ctx, filepath.Join(d.bin, "hallmark"), all...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+d.work, "GITHUB_STEP_SUMMARY=")
	var out, text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &text
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", fmt.Errorf("running hallmark: %w", err)
	}
	fmt.Println(indent(out.String() + text.String()))
	if code := cmd.ProcessState.ExitCode(); code != wantCode {
		return "", fmt.Errorf("hallmark %s ended with %d, expected %d", args[0], code, wantCode)
	}
	if !strings.Contains(out.String()+text.String(), wantText) {
		return "", fmt.Errorf("hallmark %s did not say %q", args[0], wantText)
	}
	return out.String(), nil
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n  ") + "\n"
}

// token asks the built-in issuer for a token, as the CI platform gives it to a job,
// and returns the file that holds it.
func (d *demo) token(name string, claims map[string]string) (string, error) {
	text, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	file := filepath.Join(d.work, name+".json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(d.ctx, filepath.Join(d.bin, "hallmarkd"), "dev", "token",
		"--data", filepath.Join(d.work, "data"), "--claims", file).Output()
	if err != nil {
		return "", fmt.Errorf("asking for a token: %w", err)
	}
	file = filepath.Join(d.work, name+".token")
	return file, os.WriteFile(file, bytes.TrimSpace(out), 0o600)
}
