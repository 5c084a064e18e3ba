// Command hallmarkd is the Hallmark server.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

// version is set by the linker.
var version = "dev"

type cli struct {
	Init    initCmd    `cmd:"" help:"Create keys and log, once. Prints the fingerprint of the trust root."`
	Serve   serveCmd   `cmd:"" help:"Run the service."`
	Dev     devCmd     `cmd:"" help:"Run the service with a built-in OIDC issuer, a built-in registry and a sample track, on loopback only."`
	Fsck    fsckCmd    `cmd:"" help:"Check log, envelopes and index against each other. The service must not be running."`
	Rebuild rebuildCmd `cmd:"" help:"Derive the index from log and envelopes again. The service must not be running."`
	Version versionCmd `cmd:"" help:"Print the version."`
}

type versionCmd struct{}

func (versionCmd) Run() error { fmt.Println(version); return nil }

func main() { os.Exit(run()) }

func run() int {
	// The database and the log hold what auditors need a role for, also in a data
	// directory that others may enter (attacks L06).
	syscall.Umask(0o077)
	collectLazily()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var c cli
	code := -1
	parser, err := kong.New(&c, kong.Name("hallmarkd"),
		kong.Description("Hallmark signs image digests, attaches provenance and gates promotion."),
		kong.Exit(func(n int) { code = n }), kong.BindTo(ctx, (*context.Context)(nil)), kong.UsageOnError())
	if err != nil {
		return fail(err)
	}
	args, err := parser.Parse(os.Args[1:])
	if code >= 0 { // help was printed
		return code
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "hallmarkd: %v\n", err)
		return 2
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ledger.RouteLibraryLogs(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err := args.Run(log); err != nil {
		return fail(err)
	}
	return 0
}

// collectLazily trades memory, which the service has, for the time that collecting
// garbage takes from signing: at most about four times what is live, and less near
// the limit. Who sets GOGC or GOMEMLIMIT decides otherwise.
func collectLazily() {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(300)
		debug.SetMemoryLimit(384 << 20)
	}
}

// fail prints one clear line. A wrong configuration is wrong usage.
func fail(err error) int {
	fmt.Fprintf(os.Stderr, "hallmarkd: %s\n", strings.TrimSpace(err.Error()))
	var e *attest.Error
	if errors.As(err, &e) && (e.Reason == attest.BadConfig || e.Reason == attest.BadPolicy) {
		return 2
	}
	return 1
}
