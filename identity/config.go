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
	// Provider is the mapper that reads the claims: "github", "gitlab", "buildkite",
	// "kubernetes", "spiffe" or "generic".
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
	// Algorithms are the JWS algorithms believed. Default: RS256 for github, gitlab
	// and buildkite, RS256 and ES256 for generic.
	Algorithms []string `yaml:"algorithms"`
	// Claims maps our field names, the JSON names of attest.Build and "groups", to
	// names of claims, or to templates that name claims in braces:
	// "refs/heads/{branchName}". Provider generic only.
	Claims map[string]string `yaml:"claims"`
	// Require lists for a claim the values that it must have one of; a token in which
	// it has another one, or none, is refused. Provider generic only.
	Require map[string][]string `yaml:"require"`
	// Events are the values of the field event whose jobs may sign. Default: all.
	// Provider generic only, which must map event.
	Events []string `yaml:"events"`
	// SAN is the template of the URI that names a workload of a generic issuer:
	// "https://ci.example.com/{repository}", with fields that Claims maps or "sub".
	// With several fields their slashes are escaped, so that two identities never
	// share a URI. Default: the issuer, "/sub/", and the escaped subject.
	SAN string `yaml:"san"`
	// ServerURL is what source URIs start with: the code host's base URL. Default:
	// what the issuer's own URL says for github and gitlab, https://buildkite.com for
	// buildkite. A generic issuer that maps repository but not source_uri gets its
	// source URI from it.
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
	// Replay says what a workload's token is good for until it expires: "job", all
	// images that its identity may sign (default), or "once", one signing request and
	// its repetitions.
	Replay string `yaml:"replay"`
	// Pipelines are the pipelines whose jobs are known, by their pipeline_id: slugs
	// can be given to other pipelines. Provider buildkite only.
	Pipelines map[string]Pipeline `yaml:"pipelines"`
	// ReusableWorkflows are the workflows whose builds are at SLSA level 3. Provider
	// github only.
	ReusableWorkflows []ReusableWorkflow `yaml:"reusable_workflows"`
	// PlainHTTP allows an http issuer on loopback: development only.
	PlainHTTP bool `yaml:"plain_http"`
	// JWKSFile is a file with the issuer's JWK set, for issuers whose keys cannot be
	// fetched from here. It is read again when it changes. Not with JWKSURI.
	JWKSFile string `yaml:"jwks_file,omitempty"`
	// KnownAs is an https URL of the cluster in place of an iss that other clusters
	// have too: what identities, certificates and policies call the issuer. Provider
	// kubernetes only. Issuers with the same iss also need audiences of their own.
	KnownAs string `yaml:"known_as,omitempty"`
	// TokenReview asks the cluster whether a token still counts. Provider
	// kubernetes only.
	TokenReview *TokenReview `yaml:"token_review,omitempty"`
	// TrustDomain is the SPIFFE trust domain whose members are known. Provider
	// spiffe only.
	TrustDomain string `yaml:"trust_domain,omitempty"`
	// BundleFile is the trust domain's SPIFFE bundle. It is read again when it
	// changes. Provider spiffe only; not with JWKSURI or JWKSFile.
	BundleFile string `yaml:"bundle_file,omitempty"`
	// X509SVID says that members of the trust domain may call with an X.509-SVID as
	// TLS client certificate. Its authorities come from BundleFile.
	X509SVID bool `yaml:"x509_svid,omitempty"`
}

// Pipeline says what a pipeline builds, which its tokens do not say.
type Pipeline struct {
	// Repository is the https URI of the source repository: https://github.com/acme/api.
	Repository string `yaml:"repository"`
	// RepositoryID is the repository's immutable id at its code host. Default: none.
	RepositoryID string `yaml:"repository_id"`
}

// ReusableWorkflow is a called workflow that the operator has read.
type ReusableWorkflow struct {
	// Workflow is OWNER/REPO/PATH, as in job_workflow_ref before the "@".
	Workflow string `yaml:"workflow"`
	// Commits are the full commits of the workflow's repository at which it was read.
	Commits []string `yaml:"commits"`
	// Inputs is "none" when the workflow takes no inputs, by which its caller could
	// change the build. Else only events without inputs of their own count.
	Inputs string `yaml:"inputs"`
}

// KnownIssuer is what identities, certificates and policies call the issuer: iss,
// unless KnownAs says otherwise.
func (i Issuer) KnownIssuer() string { return cmp.Or(i.KnownAs, i.Issuer) }

// Values of Issuer.Replay.
const (
	replayJob  = "job"
	replayOnce = "once"
)

// Providers of claims.
const (
	gitHub    = "github"
	gitLab    = "gitlab"
	buildkite = "buildkite"
	generic   = "generic"

	kubernetes = "kubernetes"
	spiffe     = "spiffe"
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
var publicCI = []string{publicGitHub, publicGitLab, publicBuildkite, "https://oidc.codefresh.io", "https://codeberg.org/api/actions"}

// publicServers are code hosts that only their own issuers speak for.
var publicServers = []string{publicGitHubServer, publicGitLab, publicBuildkiteServer}

// sharedAudiences are used by many services: each of them holds tokens that it
// could present to us. Tokens with them must have a jti.
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
	a := &Authenticator{now: c.Now, issuers: map[string][]*issuer{}, domains: map[string]*issuer{}}
	names, urls := map[string]bool{}, map[string]bool{}
	for n, conf := range c.Issuers {
		where := fmt.Sprintf("issuers[%d] %q", n, conf.Name)
		i, err := newIssuer(conf, c)
		if err != nil {
			return nil, attest.Errorf(attest.BadConfig, "%s: %w", where, err)
		}
		// A trailing slash makes another issuer to the letter, and the same one
		// to whoever reads the configuration.
		plain := strings.TrimSuffix(conf.KnownIssuer(), "/")
		if names[conf.Name] || urls[plain] {
			return nil, attest.Errorf(attest.BadConfig, "%s: name or issuer %s is configured twice: one issuer is one trust", where, conf.KnownIssuer())
		}
		names[conf.Name], urls[plain] = true, true
		if err := a.add(i); err != nil {
			return nil, attest.Errorf(attest.BadConfig, "%s: %w", where, err)
		}
	}
	return a, nil
}

// add makes i known, unless its tokens could be taken for another's (attacks B06).
func (a *Authenticator) add(i *issuer) error {
	if i.Provider == spiffe {
		if a.domains[i.TrustDomain] != nil {
			return fmt.Errorf("trust_domain: %s is configured twice: one trust domain is one trust", i.TrustDomain)
		}
		a.domains[i.TrustDomain] = i
	}
	// A trailing slash is no difference, nor is a name that another one has.
	plain := strings.TrimSuffix(i.Issuer.Issuer, "/")
	for iss, others := range a.issuers {
		for _, o := range others {
			switch {
			case i.KnownAs != "" && strings.TrimSuffix(i.KnownAs, "/") == strings.TrimSuffix(iss, "/"),
				o.KnownAs != "" && strings.TrimSuffix(o.KnownAs, "/") == plain:
				return fmt.Errorf("known_as: issuer %q has this URL as iss: one issuer is one trust", o.Name)
			case strings.TrimSuffix(iss, "/") != plain:
				continue
			case i.KnownAs == "" || o.KnownAs == "":
				return fmt.Errorf("issuer: %s is configured twice: give each of the clusters that share it a known_as of its own", iss)
			case i.Audience == o.Audience:
				return fmt.Errorf("audience: issuer %q has the same iss and the same audience: which keys are meant must not depend on which fit", o.Name)
			}
		}
	}
	a.issuers[i.Issuer.Issuer] = append(a.issuers[i.Issuer.Issuer], i)
	return nil
}

// issuer is a checked Issuer with its defaults filled in, and its keys.
type issuer struct {
	Issuer
	service string // our URL
	ours    string // our audience
	keys    keySource
	domain  *domain                              // of provider spiffe, else nil
	review  *reviewer                            // nil: a verified token is enough
	read    func(claims, *attest.Identity) error // the provider's mapper
}

func newIssuer(conf Issuer, c Config) (*issuer, error) {
	i := &issuer{Issuer: conf, service: c.Service, ours: c.Audience}
	i.Kind = cmp.Or(conf.Kind, attest.Workload)
	i.Audience = cmp.Or(conf.Audience, c.Audience)
	i.Owners, i.Algorithms = slices.Clone(conf.Owners), slices.Clone(conf.Algorithms)
	for _, check := range []func() error{i.checkName, i.checkURLs, i.checkAlgorithms, i.checkLimits, i.checkPlaces, i.checkSpeaker, i.checkProvider, i.checkKeys, i.checkOwners} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	client, err := i.client(c)
	if err != nil {
		return nil, err
	}
	if err := i.openFiles(c); err != nil {
		return nil, err
	}
	if i.keys != nil {
		return i, nil
	}
	i.keys = &keySet{use: i.keyUse(), name: i.Name, issuer: i.Issuer.Issuer, jwksURI: i.JWKSURI, client: client, timeout: c.FetchTimeout, now: c.Now, log: c.Logger}
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
	if err := checkURL(iss, i.PlainHTTP); err != nil && (i.Provider != spiffe || !strings.HasPrefix(iss, spiffeScheme)) {
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
		switch i.Provider {
		case generic, kubernetes:
			i.Algorithms = append(i.Algorithms, string(jose.ES256))
		case spiffe:
			i.Algorithms = slices.Clone(svidAlgorithms)
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
	if i.Replay != "" && i.Replay != replayJob && i.Replay != replayOnce {
		return fmt.Errorf("replay: %q is neither %s nor %s", i.Replay, replayJob, replayOnce)
	}
	if i.Replay != "" && i.Kind == attest.Person {
		return fmt.Errorf("replay: persons do not sign images: leave it out")
	}
	if i.sharedAudience() && (i.MaxAge == 0 || i.MaxAge > mostSharedAge) {
		return fmt.Errorf("audience: %q is not ours: other services may have it, too, and could replay tokens here. Use one under %s/, or set max_age to at most %v", i.Audience, i.service, mostSharedAge)
	}
	if i.sharedAudience() && i.Kind == attest.Workload && i.Replay != replayOnce {
		return fmt.Errorf("audience: %q is not ours: other services may have it, too, and could replay tokens here. Use one under %s/, or set replay: once", i.Audience, i.service)
	}
	return nil
}

// sharedAudience says whether services that are not ours may hold tokens with the
// issuer's audience: with any that is neither our own URL nor under it. In an ID token
// of a person it is the client's id, which is ours alone (OpenID Connect Core 2).
func (i *issuer) sharedAudience() bool {
	if i.Kind == attest.Person {
		return i.wellKnownAudience()
	}
	return i.Audience != i.ours && i.Audience != i.service && !strings.HasPrefix(i.Audience, i.service+"/")
}

func (i *issuer) wellKnownAudience() bool { return slices.Contains(sharedAudiences, i.Audience) }

// checkKeys refuses keys that the provider does not read: whoever wrote them relies
// on them (attacks B10).
func (i *issuer) checkKeys() error {
	for _, k := range []struct {
		key   string
		given bool
		of    string
	}{
		{"claims", len(i.Claims) > 0, generic},
		{"san", i.SAN != "", generic},
		{"require", len(i.Require) > 0, generic},
		{"events", len(i.Events) > 0, generic},
		{"pipelines", len(i.Pipelines) > 0, buildkite},
		{"reusable_workflows", len(i.ReusableWorkflows) > 0, gitHub},
		{"known_as", i.KnownAs != "", kubernetes},
		{"token_review", i.TokenReview != nil, kubernetes},
		{"trust_domain", i.TrustDomain != "", spiffe},
		{"bundle_file", i.BundleFile != "", spiffe},
		{"x509_svid", i.X509SVID, spiffe},
	} {
		if k.given && i.Provider != k.of {
			return fmt.Errorf("%s: only provider %s reads it, not %s: leave it out", k.key, k.of, i.Provider)
		}
	}
	return nil
}

// checkSpeaker makes sure that the claims of well-known issuers are read by the
// mapper that knows them: another one would believe what it does not check.
func (i *issuer) checkSpeaker() error {
	want := ""
	switch iss := strings.TrimSuffix(i.Issuer.Issuer, "/"); {
	case iss == publicGitHub || strings.HasPrefix(iss, publicGitHub+"/") || gitHubTenant.MatchString(iss):
		want = gitHub
	case iss == publicGitLab:
		want = gitLab
	case iss == publicBuildkite:
		want = buildkite
	case sharedClusterIssuer(iss):
		want = kubernetes
	}
	if want != "" && i.Provider != want {
		return fmt.Errorf("provider: use %s for %s, which checks its claims", want, i.Issuer.Issuer)
	}
	return nil
}

// checkPlaces refuses two places for one thing.
func (i *issuer) checkPlaces() error {
	places := 0
	for _, place := range []string{i.JWKSURI, i.JWKSFile, i.BundleFile} {
		if place != "" {
			places++
		}
	}
	switch {
	case places > 1:
		return fmt.Errorf("jwks_uri: the issuer's keys are in one place: give one of jwks_uri, jwks_file and bundle_file")
	case i.JWKSFile != "" && i.Provider == spiffe:
		return fmt.Errorf("jwks_file: give a trust domain's bundle_file")
	case i.CAFile != "" && i.JWKSFile+i.BundleFile != "":
		return fmt.Errorf("ca_file: the issuer's keys are in a file: nothing is fetched from it")
	}
	return nil
}

func (i *issuer) checkProvider() error {
	switch i.Provider {
	case gitHub:
		i.read = i.readGitHub
		return i.checkGitHub()
	case gitLab:
		i.read = i.readGitLab
		return i.checkGitLab()
	case buildkite:
		i.read = i.readBuildkite
		return i.checkBuildkite()
	case generic:
		i.read = i.readGeneric
		return i.checkGeneric()
	case kubernetes:
		i.read = i.readKubernetes
		return i.checkKubernetes()
	case spiffe:
		i.read = i.readSPIFFE
		return i.checkSPIFFE()
	}
	return fmt.Errorf("provider: %q is not one of %s", i.Provider, strings.Join([]string{gitHub, gitLab, buildkite, kubernetes, spiffe, generic}, ", "))
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
		if i.Provider == gitLab && !numericID.MatchString(o) {
			return fmt.Errorf("owners: %q is not the numeric id of a namespace: names can be registered again by others (the group's page shows the id)", o)
		}
		if i.Provider == buildkite && !uuid.MatchString(o) {
			return fmt.Errorf("owners: %q is not the UUID of an organization: slugs can be registered again by others (the organization's settings show the UUID)", o)
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
		var err error
		if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
			return nil, fmt.Errorf("ca_file: reading the system's authorities: %w", err)
		}
		if err := addAuthorities(conf.RootCAs, i.CAFile); err != nil {
			return nil, err
		}
	}
	return newClient(c, conf), nil
}

// addAuthorities adds the certificates of a PEM file to pool.
func addAuthorities(pool *x509.CertPool, file string) error {
	pem, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("ca_file: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("ca_file: %s holds no PEM certificate", file)
	}
	return nil
}

func newClient(c Config, conf *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy: c.Proxy, TLSClientConfig: conf, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10,
		},
		// A redirect could lead to keys of somebody else (attacks A09).
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
	}
}
