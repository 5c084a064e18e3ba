package identity

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/hallmarkd/hallmark/attest"
)

// Config says whose tokens are believed, and what they must say.
type Config struct {
	// Audience is the one value that a token's aud must have: the service's
	// public_url, which no other service uses.
	Audience string
	// Service is the public_url that the identities of persons start with.
	// Default: Audience.
	Service string
	// Issuers may be empty: then nobody is known.
	Issuers []Issuer
	// Now is the clock that tokens and cached keys are judged by. Default: time.Now.
	Now    func() time.Time
	Logger *slog.Logger // default: slog.DiscardHandler
	// FetchTimeout bounds one reading of an issuer's keys. Default: 10 s.
	FetchTimeout time.Duration
	// Proxy is for reaching issuers (http.Transport.Proxy). Default: none.
	Proxy func(*http.Request) (*url.URL, error)
}

// Issuer is one trusted OpenID Connect issuer. Everything that decides whether
// a token is believed is here; nothing is taken from the token (attacks A03,
// A04, A10, A11).
type Issuer struct {
	// Name is what policies call the issuer.
	Name string `yaml:"name"`
	// Provider is the mapper that reads the claims: "github" or "generic".
	Provider string `yaml:"provider"`
	// Kind is attest.Workload (default) or attest.Person.
	Kind attest.Kind `yaml:"kind"`
	// Issuer is the exact value of iss: an https URL.
	Issuer string `yaml:"issuer"`
	// JWKSURI is where the keys are. Default: where the discovery document on the
	// issuer's own host says, if that is on the same host.
	JWKSURI string `yaml:"jwks_uri"`
	// CAFile is a PEM file of further authorities for the issuer's TLS.
	CAFile string `yaml:"ca_file"`
	// Owners are the owner ids whose jobs are known at all. Required for an issuer
	// from which anybody can get a token. A generic issuer must map owner_id.
	Owners []string `yaml:"owners"`
	// Algorithms are the JWS algorithms believed. Default: RS256 for github, RS256
	// and ES256 for generic.
	Algorithms []string `yaml:"algorithms"`
	// Claims maps our field names, the JSON names of attest.Build and "groups", to
	// names of claims. Provider generic only.
	Claims map[string]string `yaml:"claims"`
	// SAN is the template of the URI that names a workload of a generic issuer:
	// "https://ci.example.com/{repository}", with fields that Claims maps or "sub".
	// With several fields their slashes are escaped, so that two identities never
	// share a URI. Default: the issuer, "/sub/", and the escaped subject.
	SAN string `yaml:"san"`
	// ServerURL is what source URIs start with: the code host's base URL. Default:
	// https://github.com for github's public issuer. A generic issuer that maps
	// repository but not source_uri gets its source URI from it.
	ServerURL string `yaml:"server_url"`
	// Audience replaces Config.Audience for an issuer that cannot put ours into
	// its tokens. Any service with the same audience can then present the tokens
	// that it is sent here (attacks A14).
	Audience string `yaml:"audience"`
	// MaxLifetime bounds exp-iat. Default: 1 h for workloads, 12 h for persons; at
	// most 24 h.
	MaxLifetime time.Duration `yaml:"max_lifetime"`
	// MaxAge bounds now-iat. 0: only exp counts.
	MaxAge time.Duration `yaml:"max_age"`
	// PlainHTTP allows an http issuer on loopback: development only.
	PlainHTTP bool `yaml:"plain_http"`
}

// Providers of claims.
const (
	gitHub  = "github"
	generic = "generic"
)

const (
	publicGitHub       = "https://token.actions.githubusercontent.com"
	publicGitHubServer = "https://github.com"

	defaultWorkloadLifetime = time.Hour
	defaultPersonLifetime   = 12 * time.Hour
	mostLifetime            = 24 * time.Hour
	mostSharedAge           = 10 * time.Minute
)

// publicCI are hosted CI systems that sign tokens with any audience for
// everybody who has an account.
var publicCI = []string{publicGitHub, "https://gitlab.com", "https://agent.buildkite.com", "https://oidc.codefresh.io"}

// sharedAudiences are used by many services: each of them holds tokens that it
// could present to us.
var sharedAudiences = []string{"api://AzureADTokenExchange", "sts.amazonaws.com", "sigstore", "https://kubernetes.default.svc"}

var issuerName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

// New checks the whole configuration. Every error is BAD_CONFIG and names the
// issuer and the key that is wrong. No issuer is contacted.
func New(c Config) (*Authenticator, error) {
	if err := checkPrintable(c.Audience); err != nil || strings.ContainsAny(c.Audience, " \t") {
		return nil, attest.Errorf(attest.BadConfig, "audience %q is empty or has white space: give the service's public_url", c.Audience)
	}
	c.Service = strings.TrimSuffix(cmp.Or(c.Service, c.Audience), "/")
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.FetchTimeout <= 0 {
		c.FetchTimeout = defaultFetchTimeout
	}
	a := &Authenticator{now: c.Now, issuers: map[string]*issuer{}}
	names, urls := map[string]bool{}, map[string]bool{}
	for n, conf := range c.Issuers {
		where := fmt.Sprintf("issuers[%d] %q", n, conf.Name)
		i, err := newIssuer(conf, c)
		if err != nil {
			return nil, attest.Errorf(attest.BadConfig, "%s: %w", where, err)
		}
		// A trailing slash makes another issuer to the letter, and the same one
		// to whoever reads the configuration.
		plain := strings.TrimSuffix(conf.Issuer, "/")
		if names[conf.Name] || urls[plain] {
			return nil, attest.Errorf(attest.BadConfig, "%s: name or issuer %s is configured twice: one issuer is one trust", where, conf.Issuer)
		}
		names[conf.Name], urls[plain] = true, true
		a.issuers[conf.Issuer] = i
	}
	return a, nil
}

// issuer is a checked Issuer with its defaults filled in, and its keys.
type issuer struct {
	Issuer
	service string
	keys    *keySet
	read    func(claims, *attest.Identity) error // the provider's mapper
}

func newIssuer(conf Issuer, c Config) (*issuer, error) {
	i := &issuer{Issuer: conf, service: c.Service}
	i.Kind = cmp.Or(conf.Kind, attest.Workload)
	i.Audience = cmp.Or(conf.Audience, c.Audience)
	i.Owners, i.Algorithms = slices.Clone(conf.Owners), slices.Clone(conf.Algorithms)
	for _, check := range []func() error{i.checkName, i.checkURLs, i.checkAlgorithms, i.checkLimits, i.checkProvider, i.checkOwners} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	client, err := i.client(c)
	if err != nil {
		return nil, err
	}
	i.keys = &keySet{name: i.Name, issuer: i.Issuer.Issuer, jwksURI: i.JWKSURI, client: client, timeout: c.FetchTimeout, now: c.Now, log: c.Logger}
	return i, nil
}

func (i *issuer) checkName() error {
	if !issuerName.MatchString(i.Name) {
		return fmt.Errorf("name: %q is not a name of lower-case letters, digits, - and _", i.Name)
	}
	if i.Kind != attest.Workload && i.Kind != attest.Person {
		return fmt.Errorf("kind: %q is neither workload nor person", i.Kind)
	}
	return nil
}

func (i *issuer) checkURLs() error {
	iss := i.Issuer.Issuer
	if err := checkURL(iss, i.PlainHTTP); err != nil {
		return fmt.Errorf("issuer: %w", err)
	}
	if i.JWKSURI != "" {
		if err := checkURL(i.JWKSURI, i.PlainHTTP); err != nil {
			return fmt.Errorf("jwks_uri: %w", err)
		}
	}
	if i.ServerURL != "" {
		if err := checkURL(i.ServerURL, i.PlainHTTP); err != nil {
			return fmt.Errorf("server_url: %w", err)
		}
		i.ServerURL = strings.TrimSuffix(i.ServerURL, "/")
	}
	if u, err := url.Parse(iss); i.PlainHTTP && (err != nil || !loopback(u.Hostname())) {
		return fmt.Errorf("plain_http: only an issuer on loopback may be without TLS, %s is not", iss)
	}
	return nil
}

// checkURL accepts an https URL in its only spelling and no pattern of URLs
// (attacks A10); with plain, also an http URL on loopback.
func checkURL(s string, plain bool) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Hostname() == "" || u.Opaque != "" {
		return fmt.Errorf("%q is not an absolute URL", s)
	}
	switch {
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#"):
		return fmt.Errorf("%q has a user, query or fragment: give scheme, host and path only", s)
	case strings.ContainsAny(u.Host+u.Path, "*?^$|(){}\\+ ") || strings.ContainsAny(u.Path, "[]"):
		return fmt.Errorf("%q is a pattern: issuers are compared letter by letter, so give each one's exact URL", s)
	case u.String() != s || strings.ToLower(u.Host) != u.Host:
		return fmt.Errorf("%q is not in canonical form: write %s", s, strings.ToLower(u.Scheme+"://"+u.Host)+u.EscapedPath())
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && plain && loopback(u.Hostname()):
		return nil
	}
	return fmt.Errorf("%q is not an https URL: whoever can change its answers could sign in as anybody (plain_http allows loopback)", s)
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

func (i *issuer) checkAlgorithms() error {
	if len(i.Algorithms) == 0 {
		i.Algorithms = []string{string(jose.RS256)}
		if i.Provider == generic {
			i.Algorithms = append(i.Algorithms, string(jose.ES256))
		}
	}
	for _, alg := range i.Algorithms {
		if !slices.Contains(algorithms, jose.SignatureAlgorithm(alg)) {
			return fmt.Errorf("algorithms: %q is not one of %v", alg, algorithms)
		}
	}
	return nil
}

func (i *issuer) checkLimits() error {
	if i.MaxLifetime == 0 {
		i.MaxLifetime = defaultWorkloadLifetime
		if i.Kind == attest.Person {
			i.MaxLifetime = defaultPersonLifetime
		}
	}
	if i.MaxLifetime < time.Second || i.MaxLifetime > mostLifetime {
		return fmt.Errorf("max_lifetime: %v is not between 1s and %v", i.MaxLifetime, mostLifetime)
	}
	if i.MaxAge < 0 {
		return fmt.Errorf("max_age: %v is negative", i.MaxAge)
	}
	if err := checkPrintable(i.Audience); err != nil {
		return fmt.Errorf("audience: %w", err)
	}
	if slices.Contains(sharedAudiences, i.Audience) && (i.MaxAge == 0 || i.MaxAge > mostSharedAge) {
		return fmt.Errorf("audience: %q is shared with other services, which could replay tokens here: set max_age to at most %v", i.Audience, mostSharedAge)
	}
	return nil
}

func (i *issuer) checkProvider() error {
	switch i.Provider {
	case gitHub:
		i.read = i.readGitHub
		return i.checkGitHub()
	case generic:
		i.read = i.readGeneric
		return i.checkGeneric()
	}
	return fmt.Errorf("provider: %q is neither %s nor %s", i.Provider, gitHub, generic)
}

func (i *issuer) checkOwners() error {
	if i.Kind == attest.Person {
		if len(i.Owners) > 0 {
			return fmt.Errorf("owners: a person has no owner: use groups and roles")
		}
		return nil
	}
	if slices.Contains(publicCI, strings.TrimSuffix(i.Issuer.Issuer, "/")) && len(i.Owners) == 0 {
		return fmt.Errorf("owners: anybody can get a token from %s: list the ids of the owners whose jobs you accept", i.Issuer.Issuer)
	}
	for _, o := range i.Owners {
		if err := checkPrintable(o); err != nil {
			return fmt.Errorf("owners: %w", err)
		}
		if i.Provider == gitHub && !numericID.MatchString(o) {
			return fmt.Errorf("owners: %q is not a numeric id: names can be registered again by others (https://api.github.com/users/%s shows the id)", o, url.PathEscape(o))
		}
	}
	return nil
}

// client returns the HTTP client for one issuer. Nothing about it depends on a
// token. Its requests end with their context. Connections are not kept: keys
// are read every few minutes.
func (i *issuer) client(c Config) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if i.CAFile != "" {
		pem, err := os.ReadFile(i.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
			return nil, fmt.Errorf("ca_file: reading the system's authorities: %w", err)
		}
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file: %s holds no PEM certificate", i.CAFile)
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy: c.Proxy, TLSClientConfig: conf, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10,
		},
		// A redirect could lead to keys of somebody else (attacks A09).
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
	}, nil
}
