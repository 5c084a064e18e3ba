package main

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"text/template"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
)

type devCmd struct {
	Serve devServeCmd `cmd:"" default:"withargs" help:"Run it."`
	Token devTokenCmd `cmd:"" help:"Print a token of the built-in issuer of a running hallmarkd dev."`
}

type devServeCmd struct {
	Data   string `help:"Directory for keys, log and configuration. Without it a fresh one is made, and kept." placeholder:"DIR"`
	Listen string `default:"127.0.0.1:8443" help:"Loopback address; port 0 takes a free one." placeholder:"HOST:PORT"`
}

type devTokenCmd struct {
	Data   string `required:"" help:"The directory that hallmarkd dev printed." placeholder:"DIR"`
	Claims string `help:"JSON file with claims that replace those of the sample job." placeholder:"FILE" type:"existingfile"`
}

func (cmd devTokenCmd) Run(ctx context.Context) error {
	var claims map[string]any
	if cmd.Claims != "" {
		text, err := os.ReadFile(cmd.Claims)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, &claims); err != nil {
			return attest.Errorf(attest.BadConfig, "%s: %w", cmd.Claims, err)
		}
	}
	env, err := readDevEnvironment(cmd.Data)
	if err != nil {
		return err
	}
	all := env.claims()
	for k, v := range claims {
		all[k] = v
	}
	token, err := dev.RequestToken(ctx, cmd.Data, all)
	if err != nil {
		return err
	}
	fmt.Println(token)
	return nil
}

// The sample job and its track.
const (
	sampleRepository = "hallmarkd/hallmark"
	sampleWorkflow   = ".github/workflows/release.yml"
	sampleCommit     = "0123456789abcdef0123456789abcdef01234567"
	environmentFile  = "dev.json"
)

// devEnvironment is what a running hallmarkd dev tells other processes of the same
// user. It holds no secret.
type devEnvironment struct {
	Server       string `json:"server"`
	Registry     string `json:"registry"` // host:port
	Issuer       string `json:"issuer"`
	RepositoryID string `json:"repository_id"`
	OwnerID      string `json:"owner_id"`
	SignInLink   string `json:"sign_in_link"` // works once
}

// claims are those of the sample job: a push to main of the sample repository.
func (e devEnvironment) claims() map[string]any {
	c := dev.GitHubClaims(sampleRepository, sampleCommit, "refs/heads/main")
	c["aud"] = e.Server
	return c
}

func readDevEnvironment(dir string) (devEnvironment, error) {
	var e devEnvironment
	text, err := os.ReadFile(filepath.Join(dir, environmentFile))
	if err != nil {
		return e, attest.Errorf(attest.BadConfig, "%s holds no running hallmarkd dev: %w", dir, err)
	}
	return e, json.Unmarshal(text, &e)
}

//go:embed dev/hallmarkd.yaml dev/policy.yaml
var devFiles embed.FS

func (cmd devServeCmd) Run(ctx context.Context, log *slog.Logger) error {
	// 1. Loopback only: its issuer gives a token to whoever asks.
	host, _, err := net.SplitHostPort(cmd.Listen)
	if err != nil || !loopbackHost(host) {
		return attest.Errorf(attest.BadConfig, "--listen %s: hallmarkd dev serves loopback only, for example 127.0.0.1:8443", cmd.Listen)
	}
	ln, err := listen(config{Listen: cmd.Listen})
	if err != nil {
		return err
	}
	defer ln.Close()
	if cmd.Data == "" {
		if cmd.Data, err = os.MkdirTemp("", "hallmark-dev-"); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(cmd.Data, 0o700); err != nil {
		return attest.Errorf(attest.BadConfig, "creating the data directory: %w", err)
	}

	// 2. The registry and the issuer that a company would already have.
	issuer, err := dev.StartIssuer(ctx, dev.IssuerConfig{Dir: cmd.Data})
	if err != nil {
		return err
	}
	defer issuer.Close()
	images, err := dev.StartRegistry(ctx, "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer images.Close()
	env := devEnvironment{
		Server: "http://" + ln.Addr().String(), Registry: images.Host(), Issuer: issuer.URL(),
		RepositoryID: dev.GitHubID(sampleRepository), OwnerID: dev.GitHubID("hallmarkd"),
	}

	// 3. The same configuration files that a company would write.
	c, err := cmd.configure(env)
	if err != nil {
		return err
	}
	if _, err := initialise(ctx, c, log); err != nil && attest.ReasonOf(err) != attest.AlreadyExists {
		return err
	}
	return serve(ctx, c, ln, log, func(s stack) error { return cmd.announce(ctx, env, issuer, s) })
}

// configure writes configuration and policy and loads them as serve does.
func (cmd devServeCmd) configure(env devEnvironment) (config, error) {
	values := struct {
		devEnvironment
		Version                      int64
		SampleRepository, SampleFlow string
	}{env, time.Now().Unix(), sampleRepository, sampleWorkflow}
	files, err := template.ParseFS(devFiles, "dev/*.yaml")
	if err != nil {
		return config{}, err
	}
	for _, name := range []string{"hallmarkd.yaml", "policy.yaml"} {
		f, err := os.OpenFile(filepath.Join(cmd.Data, name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return config{}, attest.Errorf(attest.BadConfig, "writing the sample configuration: %w", err)
		}
		if err := files.ExecuteTemplate(f, name, values); err != nil {
			f.Close()
			return config{}, err
		}
		if err := f.Close(); err != nil {
			return config{}, err
		}
	}
	return loadConfig(filepath.Join(cmd.Data, "hallmarkd.yaml"))
}

// announce tells a person, and through a file other processes, what is running.
func (cmd devServeCmd) announce(ctx context.Context, env devEnvironment, issuer *dev.Issuer, s stack) error {
	auditor := env.claims()
	auditor["environment"] = "audit"
	token, err := issuer.Mint(auditor)
	if err != nil {
		return err
	}
	id, err := s.auth.Authenticate(ctx, token)
	if err != nil {
		return err
	}
	env.SignInLink = env.Server + s.pages.SignInLink(id)
	text, err := json.MarshalIndent(env, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(cmd.Data, environmentFile)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil { // readers see all of it or nothing
		return err
	}
	fmt.Printf(`
  hallmarkd dev: FOR TRYING OUT ONLY. Its issuer gives a token to whoever asks on this machine.

  server     %s
  registry   %s
  page       %s
  data       %s

  export HALLMARK_SERVER=%s
  export HALLMARK_IDENTITY_TOKEN=$(hallmarkd dev token --data %s)
  hallmark whoami %s/demo/app

`, env.Server, env.Registry, env.SignInLink, cmd.Data, env.Server, cmd.Data, env.Registry)
	return nil
}
