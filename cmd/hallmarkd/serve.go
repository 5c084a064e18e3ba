package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
	"github.com/hallmarkd/hallmark/server"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
	"github.com/hallmarkd/hallmark/web"
)

type initCmd struct {
	Config string `required:"" help:"Configuration file." placeholder:"FILE"`
}

func (cmd initCmd) Run(ctx context.Context, log *slog.Logger) error {
	c, err := loadConfig(cmd.Config)
	if err != nil {
		return err
	}
	fingerprint, err := initialise(ctx, c, log)
	if err != nil {
		return err
	}
	fmt.Printf("trust root sha256:%s\n", fingerprint)
	return nil
}

// keysDir is where the keys of a data directory are.
func keysDir(data string) string { return filepath.Join(data, "keys") }

// initialise creates keys, then the log that they sign. A crash between the two
// leaves keys without a log, which the same command completes.
func initialise(ctx context.Context, c config, log *slog.Logger) (fingerprint string, err error) {
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return "", attest.Errorf(attest.BadConfig, "creating the data directory: %w", err)
	}
	keys := signer.Config{Dir: keysDir(c.Data), Service: c.PublicURL, Now: time.Now, Logger: log}
	keysErr := signer.Init(keys)
	if keysErr != nil && attest.ReasonOf(keysErr) != attest.AlreadyExists {
		return "", keysErr
	}
	s, err := signer.Open(keys)
	if err != nil {
		return "", err
	}
	defer s.Close()
	if err := ledger.Init(ctx, ledgerConfig(c, s, log)); err != nil {
		return "", err
	}
	return s.Fingerprint(), nil
}

func ledgerConfig(c config, s *signer.Signer, log *slog.Logger) ledger.Config {
	return ledger.Config{Dir: c.Data, Origin: s.Origin(), LogKey: s.LogKey(), Logger: log}
}

type serveCmd struct {
	Config string `help:"Configuration file. Without one: loopback, and a fresh data directory is initialised." placeholder:"FILE"`
	Data   string `help:"Data directory; overrides the configuration." placeholder:"DIR"`
	Listen string `help:"Address; overrides the configuration." placeholder:"HOST:PORT"`
}

const defaultListen = "127.0.0.1:8443"

func (cmd serveCmd) Run(ctx context.Context, log *slog.Logger) error {
	c, err := cmd.config()
	if err != nil {
		return err
	}
	if cmd.Config == "" {
		if _, err := initialise(ctx, c, log); err != nil && attest.ReasonOf(err) != attest.AlreadyExists {
			return err
		}
	}
	ln, err := listen(c)
	if err != nil {
		return err
	}
	return serve(ctx, c, ln, log, nil)
}

// listen takes the port before anything is opened: a second server must not touch
// the data.
func listen(c config) (net.Listener, error) {
	if c.Listen == "" {
		c.Listen = defaultListen
	}
	ln, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "listening on %s: %w", c.Listen, err)
	}
	return ln, nil
}

// config returns the configuration of the file, or one for loopback that believes
// nobody until it is given a policy and issuers.
func (cmd serveCmd) config() (config, error) {
	if cmd.Config != "" {
		c, err := loadConfig(cmd.Config)
		if cmd.Data != "" {
			c.Data = cmd.Data
		}
		if cmd.Listen != "" {
			c.Listen = cmd.Listen
		}
		return c, err
	}
	c := config{Data: cmd.Data, Listen: cmd.Listen}
	if c.Data == "" {
		c.Data = "hallmark-data"
	}
	if c.Listen == "" {
		c.Listen = defaultListen
	}
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil || !loopbackHost(host) {
		return config{}, attest.Errorf(attest.BadConfig, "--listen %s: without --config only a loopback address is served", c.Listen)
	}
	c.PublicURL = "http://" + c.Listen
	c.Policy = filepath.Join(c.Data, "policy.yaml")
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return config{}, attest.Errorf(attest.BadConfig, "creating the data directory: %w", err)
	}
	if _, err := os.Stat(c.Policy); errors.Is(err, os.ErrNotExist) {
		// Nobody has a role: the service runs and can be looked at.
		if err := os.WriteFile(c.Policy, []byte("version: 1\n"), 0o600); err != nil {
			return config{}, attest.Errorf(attest.BadConfig, "writing a first policy: %w", err)
		}
	}
	return c, nil
}

// stack is everything that serves, in the order in which it was opened.
type stack struct {
	signer *signer.Signer
	ledger *ledger.Ledger
	gate   *gate.Gate
	auth   *identity.Authenticator
	pages  *web.Handler
}

// open wires the packages. Nothing is reachable from outside until it returns.
func open(ctx context.Context, c config, log *slog.Logger) (s stack, err error) {
	defer func() {
		if err != nil {
			s.close(log)
		}
	}()
	if c.foreign, err = c.foreignRoots(); err != nil {
		return s, err
	}
	rules, err := policy.Load(c.Policy, c.known())
	if err != nil {
		return s, err
	}
	if s.auth, err = identity.New(identity.Config{Audience: c.PublicURL, Service: c.PublicURL, Issuers: c.Issuers, Logger: log}); err != nil {
		return s, err
	}
	images := c.registryConfig()
	images.Logger = log
	reg, err := registry.New(images)
	if err != nil {
		return s, err
	}
	if s.signer, err = signer.Open(signer.Config{Dir: keysDir(c.Data), Service: c.PublicURL, Now: time.Now, Logger: log}); err != nil {
		return s, err
	}
	check, err := verifier.New(s.signer.TrustedRoot(), s.signer.GateKeyPEM(), c.PublicURL)
	if err != nil {
		return s, err
	}
	if s.ledger, err = ledger.Open(ctx, ledgerConfig(c, s.signer, log)); err != nil {
		return s, err
	}
	recorded, err := c.recorded()
	if err != nil {
		return s, err
	}
	bases, err := c.bases()
	if err != nil {
		return s, err
	}
	s.gate, err = gate.Open(ctx, gate.Config{
		Service: c.PublicURL, Ledger: s.ledger, Signer: s.signer, Verifier: check, Registry: reg, Policy: rules,
		Configuration: recorded, Now: time.Now, Logger: log, Bases: bases, Foreign: c.foreign,
	})
	if err != nil {
		return s, err
	}
	s.pages, err = web.New(web.Config{Gate: s.gate, Auth: s.auth, Logger: log})
	return s, err
}

func (s stack) close(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if s.ledger != nil {
		if err := s.ledger.Close(ctx); err != nil {
			log.Error("closing the ledger", "error", err)
		}
	}
	if s.signer != nil {
		s.signer.Close()
	}
}

// serve runs the service on ln until ctx ends, and closes ln. ready, when given,
// is called once connections are accepted.
func serve(ctx context.Context, c config, ln net.Listener, log *slog.Logger, ready func(stack) error) error {
	defer ln.Close()
	proxies, err := c.proxies()
	if err != nil {
		return err
	}
	s, err := open(ctx, c, log)
	if err != nil {
		return err
	}
	defer s.close(log)
	srv, err := server.New(server.Config{
		Gate: s.gate, Auth: s.auth, Pages: s.pages, CertFile: c.TLS.CertFile, KeyFile: c.TLS.KeyFile,
		BehindProxy: proxies, Logger: log,
	})
	if err != nil {
		return err
	}
	// The worker outlives the listener, so that what was answered is attached.
	working, stopWorking := context.WithCancel(context.WithoutCancel(ctx))
	worked := make(chan struct{})
	go func() { defer close(worked); s.gate.Run(working) }()
	defer func() { stopWorking(); <-worked }()

	log.Info("serving", "address", ln.Addr().String(), "public_url", c.PublicURL, "trust_root_sha256", s.signer.Fingerprint(), "records", s.ledger.Size())
	if ready != nil {
		if err := ready(s); err != nil {
			return err
		}
	}
	if err := srv.Serve(ctx, ln); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	log.Info("stopped")
	return nil
}

type fsckCmd struct {
	Config string `help:"Configuration file." placeholder:"FILE" xor:"where" required:""`
	Data   string `help:"Data directory." placeholder:"DIR" xor:"where" required:""`
}

func (cmd fsckCmd) Run(ctx context.Context, log *slog.Logger) error {
	cfg, closeKeys, err := offline(cmd.Config, cmd.Data, log)
	if err != nil {
		return err
	}
	defer closeKeys()
	report, err := ledger.Fsck(ctx, cfg)
	if err != nil {
		return err
	}
	for _, p := range report.Problems {
		fmt.Println("problem: " + p)
	}
	fmt.Printf("%d records, %d envelopes, %d not yet in the log, %d problems\n", report.Records, report.Envelopes, report.Unlogged, len(report.Problems))
	if len(report.Problems) > 0 {
		return attest.Errorf(attest.LedgerIncomplete, "the ledger has %d problems", len(report.Problems))
	}
	return nil
}

type rebuildCmd fsckCmd

func (cmd rebuildCmd) Run(ctx context.Context, log *slog.Logger) error {
	cfg, closeKeys, err := offline(cmd.Config, cmd.Data, log)
	if err != nil {
		return err
	}
	defer closeKeys()
	if err := ledger.Rebuild(ctx, cfg); err != nil {
		return err
	}
	fmt.Println("index rebuilt from log and envelopes")
	return nil
}

// offline opens what fsck and rebuild need: the log's key, and no network.
func offline(path, data string, log *slog.Logger) (ledger.Config, func(), error) {
	c := config{Data: data}
	var err error
	if path != "" {
		c, err = loadConfig(path)
	} else {
		c.PublicURL, err = signer.ServiceOf(keysDir(data))
	}
	if err != nil {
		return ledger.Config{}, nil, err
	}
	s, err := signer.Open(signer.Config{Dir: keysDir(c.Data), Service: c.PublicURL, Now: time.Now, Logger: log})
	if err != nil {
		return ledger.Config{}, nil, err
	}
	return ledgerConfig(c, s, log), s.Close, nil
}
