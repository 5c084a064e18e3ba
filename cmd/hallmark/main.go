// Command hallmark is the client of the Hallmark signing and promotion service.
// CI jobs sign and promote with it, people and auditors ask with it. Results go
// to standard output and everything else to standard error; the exit codes are
// those of exit.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "devel"

// cli is the command line. Every flag without a command belongs to all of them.
type cli struct {
	Server          string        `env:"HALLMARK_SERVER" placeholder:"URL" help:"Service to talk to: https://HOST[:PORT], or http:// on this machine only."`
	CAFile          string        `name:"ca-file" placeholder:"FILE" help:"PEM file with the only certificate authorities to accept from the server."`
	TrustRootSHA256 string        `name:"trust-root-sha256" env:"HALLMARK_TRUST_ROOT_SHA256" placeholder:"HEX" help:"Fingerprint that the service's trust root must have. Without it the first one seen is remembered."`
	IdentityToken   string        `name:"identity-token" xor:"caller" placeholder:"FILE" help:"File with the identity token, or - for standard input. Without it: HALLMARK_IDENTITY_TOKEN, then the token of the CI job."`
	ClientCert      string        `name:"client-cert" xor:"caller" and:"svid" placeholder:"FILE" help:"PEM file with an X.509-SVID to sign in with, in place of a token; it is read again for every connection."`
	ClientKey       string        `name:"client-key" and:"svid" placeholder:"FILE" help:"PEM file with the key of --client-cert."`
	Output          string        `enum:"text,json,md" default:"text" help:"Form of the result: text, json or md; md is also appended to $$GITHUB_STEP_SUMMARY."`
	Timeout         time.Duration `default:"3m" help:"Give up after this long, repetitions included."`
	Verbose         bool          `short:"v" help:"Say more on standard error."`

	Sign       signCmd       `cmd:"" help:"Sign image digests that this CI job has pushed, and attach their provenance."`
	Attest     attestCmd     `cmd:"" help:"Have other evidence about an image signed with this caller's identity."`
	Import     importCmd     `cmd:"" help:"Record what others have signed about an image, as far as the service trusts them."`
	Verify     verifyCmd     `cmd:"" help:"Ask whether a digest is signed, or may run in a stage now. Nothing is recorded."`
	Promote    promoteCmd    `cmd:"" help:"Ask the gate to move a stage to a digest."`
	Provenance provenanceCmd `cmd:"" help:"Show what an image was built from, by whom, and how each field is known."`
	Base       baseCmd       `cmd:"" help:"Explain which base images an image is built on, and how that is known."`
	History    historyCmd    `cmd:"" help:"List records, newest first."`
	Decision   decisionCmd   `cmd:"" help:"Show a recorded decision."`
	Stages     stagesCmd     `cmd:"" help:"Show what is in the stages now."`
	Whoami     whoamiCmd     `cmd:"" help:"Show who the service takes this caller for, and its roles."`
	TrustRoot  trustRootCmd  `cmd:"" name:"trust-root" help:"Print the trust root with which everything is verified offline."`
	Version    versionCmd    `cmd:"" help:"Print the version of this program."`
}

// app is one run of the command: the parsed flags and the surroundings.
type app struct {
	cli
	stdin          io.Reader
	stdout, stderr io.Writer
	stdoutTerminal bool
	stderrTerminal bool
	getenv         func(string) string
	now            func() time.Time
	backoff        backoff // between repetitions of a call

	mu   sync.Mutex // guards stderr, which progress shares
	last string     // guarded by mu: why the newest attempt of a call failed
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, &app{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		stdoutTerminal: term.IsTerminal(int(os.Stdout.Fd())),
		stderrTerminal: term.IsTerminal(int(os.Stderr.Fd())),
		getenv:         os.Getenv,
		now:            time.Now,
		backoff:        backoff{attempts: 5, initial: "0.5s", most: "5s"},
	}, os.Args[1:])
	stop()
	os.Exit(code)
}

// run parses the arguments, runs the command and returns the exit code.
func run(ctx context.Context, a *app, args []string) int {
	helped := false
	parser, err := kong.New(&a.cli, kong.Name("hallmark"),
		kong.Description("Sign image digests, prove where they come from, promote them from stage to stage."),
		kong.Vars{"kinds": kindList(), "types": predicateList()},
		kong.Writers(a.stdout, a.stderr),
		// --help asks to exit; with what it returns, parsing would fail for want
		// of a command, so that the wish is only noted here.
		kong.Exit(func(int) { helped = true }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}))
	if err != nil {
		return a.fail(fmt.Errorf("building the command line: %w", err))
	}
	kctx, err := parser.Parse(args)
	if helped {
		return exitOK
	}
	if err != nil {
		return a.fail(usageError{err.Error() + " (hallmark " + commandOf(kctx, err) + "--help tells more)"})
	}
	if a.Timeout <= 0 {
		return a.fail(usageError{"--timeout must be longer than nothing"})
	}
	ctx, cancel := context.WithTimeoutCause(ctx, a.Timeout, timedOut{a.Timeout})
	defer cancel()
	kctx.BindTo(ctx, (*context.Context)(nil))
	err = kctx.Run(a)
	// The server knows the deadline too, and its answer may overtake the clock here.
	var remote *remoteError
	if deadline, ok := ctx.Deadline(); ok && errors.As(err, &remote) && remote.code == codes.DeadlineExceeded && time.Until(deadline) < time.Second {
		<-ctx.Done()
	}
	// Whatever the call says, an answer that did not come in time or was no
	// longer wanted has that as its reason.
	if cause := context.Cause(ctx); err != nil && cause != nil && ctx.Err() != nil && !errors.As(err, new(verdictError)) {
		err = because(cause, err)
	}
	return a.fail(err)
}

// commandOf names the command whose arguments did not parse, for the hint.
func commandOf(kctx *kong.Context, err error) string {
	var parse *kong.ParseError
	if kctx == nil && errors.As(err, &parse) {
		kctx = parse.Context
	}
	if kctx == nil || kctx.Selected() == nil {
		return ""
	}
	return kctx.Selected().Name + " "
}

// fail reports err on standard error, unless the result has already said all,
// and returns its exit code.
func (a *app) fail(err error) int {
	code := exitCode(err)
	var verdict verdictError
	if err == nil || errors.As(err, &verdict) && verdict.error == nil {
		return code
	}
	for i, l := range strings.Split(message(err), "\n") {
		if i == 0 {
			l = "hallmark: " + l
		}
		a.note("%s", l)
	}
	return code
}

// note writes one line to standard error.
func (a *app) note(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fmt.Fprintln(a.stderr, plain(fmt.Sprintf(format, args...)))
}

// detail writes one line to standard error when -v asks for it.
func (a *app) detail(format string, args ...any) {
	if a.Verbose {
		a.note(format, args...)
	}
}

type versionCmd struct{}

// versionInfo is the JSON of "hallmark version".
type versionInfo struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// Run prints the version; no server is needed.
func (versionCmd) Run(a *app) error {
	v := versionInfo{version, runtime.Version(), runtime.GOOS, runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok && v.Version == "devel" && info.Main.Version != "" && info.Main.Version != "(devel)" {
		v.Version = info.Main.Version // installed by "go install module@version"
	}
	r := result{title: "hallmark version", data: v}
	r.add("hallmark %s (%s %s/%s)", v.Version, v.Go, v.OS, v.Arch)
	return a.print(r)
}
