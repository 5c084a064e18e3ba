package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sigstore/cosign/v2/pkg/providers"
	_ "github.com/sigstore/cosign/v2/pkg/providers/envvar"
	_ "github.com/sigstore/cosign/v2/pkg/providers/filesystem"
	_ "github.com/sigstore/cosign/v2/pkg/providers/github"
	_ "github.com/sigstore/cosign/v2/pkg/providers/spiffe"
	"google.golang.org/grpc"

	"github.com/hallmarkd/hallmark/attest"
)

// ambient are the places where a CI system leaves or hands out tokens, in the
// order in which they are tried: cosign's, then the variables of further systems.
var ambient = []struct {
	what string
	ask  func(ctx context.Context, a *app, audience string) (string, error) // errNotHere elsewhere
}{
	{"SIGSTORE_ID_TOKEN", cosign("envvar")},
	{"/var/run/sigstore/cosign/oidc-token", cosign("filesystem")},
	{"GitHub Actions", cosign("github-actions")},
	{"the Buildkite agent", buildkite},
	{"the SPIFFE workload API", cosign("spiffe")},
	{"CIRCLE_OIDC_TOKEN_V2", variable("CIRCLE_OIDC_TOKEN_V2")},
	{"BITBUCKET_STEP_OIDC_TOKEN", variable("BITBUCKET_STEP_OIDC_TOKEN")},
}

// cosign returns one of cosign's providers.
func cosign(name string) func(context.Context, *app, string) (string, error) {
	return func(ctx context.Context, _ *app, audience string) (string, error) {
		p, err := providers.ProvideFrom(ctx, name)
		if err != nil {
			return "", err
		}
		if !p.Enabled(ctx) {
			return "", errNotHere
		}
		return p.Provide(ctx, audience)
	}
}

const (
	maxToken     = 16 << 10         // bytes
	providerWait = 20 * time.Second // for one ambient provider
)

// secret is an identity token. It formats as nothing that gives it away.
type secret string

func (secret) String() string   { return "[token]" }
func (secret) GoString() string { return "[token]" }

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (t bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(t.secret)}, nil
}

// RequireTransportSecurity makes gRPC itself refuse to send the token unencrypted,
// except where the connection cannot leave this machine.
func (t bearer) RequireTransportSecurity() bool { return !t.local }

// bearer is a token as credentials of a call.
type bearer struct {
	secret
	local bool
}

// signIn connects and finds the token that further calls carry. With a client
// certificate they carry none: two identities are refused.
func (a *app) signIn(ctx context.Context) (*session, error) {
	s, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	if a.ClientCert != "" {
		return s, nil
	}
	token, err := a.token(ctx, s)
	if err != nil {
		s.Close()
		return nil, err
	}
	s.options = []grpc.CallOption{grpc.PerRPCCredentials(bearer{token, s.local && strings.HasPrefix(s.server, "http://")})}
	return s, nil
}

// token returns the identity token: the one that is given, else the first
// ambient one whose audience is the service.
func (a *app) token(ctx context.Context, s *session) (secret, error) {
	switch given := a.getenv("HALLMARK_IDENTITY_TOKEN"); {
	case a.IdentityToken != "":
		raw, err := a.readToken()
		if err != nil {
			return "", err
		}
		return a.givenToken(s, raw, "--identity-token "+a.IdentityToken)
	case given != "":
		return a.givenToken(s, given, "HALLMARK_IDENTITY_TOKEN")
	}
	return a.ambientToken(ctx, s)
}

// givenToken checks a token that was given before it is shown to the service: who
// chooses the server must not be handed a token for another one (attack L03). One
// whose audience is no URL tells nothing of whom it is for: the operator may have
// configured that audience for an issuer that knows no other.
func (a *app) givenToken(s *session, raw, from string) (secret, error) {
	token, err := parseToken(raw, from)
	if err != nil {
		return "", err
	}
	named := audiences(token)
	switch {
	case slices.ContainsFunc(named, s.owns):
		if _, err := s.audience(); err != nil {
			return "", attest.Errorf(attest.TokenAudience, "the token in %s was not sent: %w", from, err)
		}
	case slices.ContainsFunc(named, isURL):
		return "", attest.Errorf(attest.TokenAudience, "the token in %s was not sent: it is for %s, and %s is %s. Check --server, or ask for a token with the audience %s", from, quotedList(named), s.server, s.service, s.service)
	default:
		a.note("the audience of the token in %s is not %s: whoever else is given such a token could present it there", from, s.service)
	}
	return token, nil
}

// owns reports whether an audience is the service's name or under it.
func (s *session) owns(audience string) bool {
	return s.service != "" && (audience == s.service || strings.HasPrefix(audience, s.service+"/"))
}

// isURL reports whether an audience names a host on the web.
func isURL(audience string) bool {
	scheme, _, ok := strings.Cut(strings.TrimSpace(audience), ":")
	return ok && (strings.EqualFold(scheme, "https") || strings.EqualFold(scheme, "http"))
}

// quotedList shows what a token says, which may be anything.
func quotedList(values []string) string {
	var out []string
	for _, v := range values[:min(len(values), 3)] {
		out = append(out, fmt.Sprintf("%.100q", v))
	}
	return strings.Join(out, ", ")
}

// readToken reads --identity-token, a file or standard input.
func (a *app) readToken() (string, error) {
	in := a.stdin
	if a.IdentityToken != "-" {
		f, err := os.Open(a.IdentityToken)
		if err != nil {
			return "", fmt.Errorf("reading --identity-token: %w", err)
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("reading --identity-token: %w", err)
	}
	return string(raw), nil
}

// parseToken checks that raw has the form of a JWT, so that a file given by
// mistake is not sent anywhere. The error names where it came from and nothing
// of it.
func parseToken(raw, from string) (secret, error) {
	raw = strings.TrimSpace(raw)
	odd := strings.ContainsFunc(raw, func(r rune) bool {
		return !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.", r)
	})
	if len(raw) > maxToken || odd || strings.Count(raw, ".") != 2 {
		return "", attest.Errorf(attest.TokenMalformed, "%s holds no JWT", from)
	}
	return secret(raw), nil
}

// ambientToken asks the CI system for a token. A job may have several: one with
// another audience is for somebody else and is not shown to this service.
func (a *app) ambientToken(ctx context.Context, s *session) (secret, error) {
	audience, err := s.audience()
	if err != nil {
		return "", err
	}
	defer a.progress("waiting for an identity token")()
	var tried []string
	for _, place := range ambient {
		token, err := a.provide(ctx, place.ask, audience)
		switch {
		case errors.Is(err, errNotHere):
			continue
		case err != nil:
			tried = append(tried, fmt.Sprintf("  %s: %s", place.what, plain(err.Error())))
			continue
		}
		a.detail("signing in with the token of %s", place.what)
		return token, nil
	}
	return "", a.notSignedIn(audience, tried)
}

var errNotHere = errors.New("not in this environment")

// provide returns the token of one ambient place.
func (a *app) provide(ctx context.Context, ask func(context.Context, *app, string) (string, error), audience string) (secret, error) {
	ctx, cancel := context.WithTimeout(ctx, providerWait)
	defer cancel()
	raw, err := ask(ctx, a, audience)
	if err != nil {
		return "", err
	}
	token, err := parseToken(raw, "its answer")
	if err != nil {
		return "", err
	}
	if !slices.Contains(audiences(token), audience) {
		return "", fmt.Errorf("its token is not for %s", audience)
	}
	return token, nil
}

// audiences returns the aud claim, one or several, without verifying anything:
// the service does that. It is nil when the token cannot be read.
func audiences(t secret) []string {
	body, err := base64.RawURLEncoding.DecodeString(strings.Split(string(t), ".")[1])
	if err != nil {
		return nil
	}
	var claims struct {
		Audience json.RawMessage `json:"aud"`
	}
	if json.Unmarshal(body, &claims) != nil {
		return nil
	}
	var one string
	if json.Unmarshal(claims.Audience, &one) == nil {
		return []string{one}
	}
	var several []string
	if json.Unmarshal(claims.Audience, &several) != nil {
		return nil
	}
	return several
}

// audience returns the name in which a token is asked for: that of the service
// in the pinned trust root. A server must not make this job ask for a token that
// could be presented elsewhere (attacks B13, L03). So the name has to be the origin
// that --server names, with its port and without a path, unless the server is on
// this machine, or the trust root was told by its fingerprint rather than learnt
// from the server.
func (s *session) audience() (string, error) {
	u, err := url.Parse(s.service)
	server, serr := url.Parse(s.server)
	// The name goes into the URL of a request for the token as it is.
	odd := strings.ContainsFunc(s.service, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune("\"&<>\\^`{|}%", r) })
	if err != nil || serr != nil || odd || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("the trust root of %s is of %q, which is no URL to ask a token for", s.server, s.service)
	}
	if !s.local && s.app.TrustRootSHA256 == "" && origin(u) != origin(server) {
		return "", fmt.Errorf("%s calls itself %s: no token is used in that name. Give --server %s, or its fingerprint with --trust-root-sha256", s.server, s.service, s.service)
	}
	return s.service, nil
}

// origin is what RFC 6454 compares: scheme, host and port, where the scheme's own is the default.
func origin(u *url.URL) string {
	defaults := map[string]string{"https": "443", "http": "80"}
	return strings.ToLower(u.Scheme + "://" + net.JoinHostPort(u.Hostname(), orElse(u.Port(), defaults[u.Scheme])))
}

// notSignedIn says what to do in the CI system that this looks like.
func (a *app) notSignedIn(audience string, tried []string) error {
	lines := tried
	if len(lines) == 0 {
		lines = append(lines, "  There is none in --identity-token, HALLMARK_IDENTITY_TOKEN, SIGSTORE_ID_TOKEN, and no CI system offers one.")
	}
	return &guideError{attest.Errorf(attest.TokenMissing, "not signed in: no identity token for %s was found", audience), append(lines, a.advice(audience)...)}
}
