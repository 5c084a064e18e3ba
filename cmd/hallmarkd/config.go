package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// config is the configuration file (docs/configuration.md). Secrets are never in
// it: it names the files that hold them. Relative paths are relative to the file.
type config struct {
	PublicURL  string            `yaml:"public_url"`
	Listen     string            `yaml:"listen"`
	TLS        tlsConfig         `yaml:"tls"`
	Data       string            `yaml:"data"`
	Issuers    []identity.Issuer `yaml:"issuers"`
	Registries []registryConfig  `yaml:"registries"`
	Mirrors    []mirrorConfig    `yaml:"mirrors"`
	Bases      *basesConfig      `yaml:"bases"`
	Policy     string            `yaml:"policy"`
	// Who else is believed about what they signed elsewhere.
	ForeignRoots []foreignRootConfig `yaml:"foreign_roots"`

	foreign *foreign.Roots // ForeignRoots as they were opened
}

type tlsConfig struct {
	CertFile    string   `yaml:"cert_file"`
	KeyFile     string   `yaml:"key_file"`
	BehindProxy []string `yaml:"behind_proxy"`
}

type registryConfig struct {
	Host          string            `yaml:"host"`
	Credentials   credentialsConfig `yaml:"credentials,omitempty"`
	CAFile        string            `yaml:"ca_file,omitempty"`
	PlainHTTP     bool              `yaml:"plain_http,omitempty"`
	TokenHosts    []string          `yaml:"token_hosts,omitempty"`
	RedirectHosts []string          `yaml:"redirect_hosts,omitempty"`
}

type credentialsConfig struct {
	File   string `yaml:"file,omitempty"`
	Helper string `yaml:"helper,omitempty"`
}

type foreignRootConfig struct {
	Name           string `yaml:"name"`
	TrustedRoot    string `yaml:"trusted_root,omitempty"`
	Key            string `yaml:"key,omitempty"`
	Log            string `yaml:"log,omitempty"`
	CertificateLog string `yaml:"certificate_log,omitempty"`
}

type mirrorConfig struct {
	From string `yaml:"from"`
	To   string `yaml:"to"`
}

var (
	yamlLine    = regexp.MustCompile(`^(?:yaml: )?line (\d+): `)
	yamlUnknown = regexp.MustCompile(`field (\S+) not found in type \S+`)
)

// loadConfig reads a configuration file strictly: an unknown key, a repeated key
// or a second document is an error that names file and line.
func loadConfig(path string) (config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return config{}, attest.Errorf(attest.BadConfig, "reading the configuration: %w", err)
	}
	if len(text) > 1<<20 {
		return config{}, attest.Errorf(attest.BadConfig, "%s: more than 1 MiB", path)
	}
	var c config
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return config{}, yamlError(path, err)
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return config{}, attest.Errorf(attest.BadConfig, "%s: holds a second document", path)
	}
	dir := filepath.Dir(path)
	for _, p := range []*string{&c.TLS.CertFile, &c.TLS.KeyFile, &c.Data, &c.Policy} {
		*p = beside(dir, *p)
	}
	for i := range c.Issuers {
		issuer := &c.Issuers[i]
		for _, p := range []*string{&issuer.CAFile, &issuer.JWKSFile, &issuer.BundleFile} {
			*p = beside(dir, *p)
		}
		if review := issuer.TokenReview; review != nil {
			review.CAFile, review.TokenFile = beside(dir, review.CAFile), beside(dir, review.TokenFile)
		}
	}
	for i := range c.Registries {
		r := &c.Registries[i]
		r.CAFile, r.Credentials.File = beside(dir, r.CAFile), beside(dir, r.Credentials.File)
	}
	for i := range c.ForeignRoots {
		r := &c.ForeignRoots[i]
		r.TrustedRoot, r.Key = beside(dir, r.TrustedRoot), beside(dir, r.Key)
	}
	if err := c.check(); err != nil {
		return config{}, attest.Errorf(attest.BadConfig, "%s: %w", path, err)
	}
	return c, nil
}

// yamlError turns the library's words into "FILE:LINE: unknown key".
func yamlError(path string, err error) error {
	problems := []string{err.Error()}
	var typed *yaml.TypeError
	if errors.As(err, &typed) {
		problems = typed.Errors
	}
	for i, p := range problems {
		p = yamlUnknown.ReplaceAllString(p, "unknown key $1")
		problems[i] = path + ":" + yamlLine.ReplaceAllString(p, "$1: ")
	}
	return attest.Errorf(attest.BadConfig, "%s", strings.Join(problems, "; "))
}

func beside(dir, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// check refuses what no flag can mend. What the packages check themselves is
// left to them.
func (c config) check() error {
	for key, missing := range map[string]bool{
		"public_url": c.PublicURL == "", "data": c.Data == "", "policy": c.Policy == "",
	} {
		if missing {
			return fmt.Errorf("key %s is missing", key)
		}
	}
	u, err := url.Parse(c.PublicURL)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.HasSuffix(c.PublicURL, "/") {
		return fmt.Errorf("key public_url: %q is not a URL such as https://hallmark.example.com, without a slash at its end", c.PublicURL)
	}
	if u.Scheme != "https" && (u.Scheme != "http" || !loopbackHost(u.Hostname())) {
		return fmt.Errorf("key public_url: %q must begin with https://", c.PublicURL)
	}
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		return errors.New("key tls: cert_file and key_file belong together")
	}
	_, err = c.bases()
	return err
}

func loopbackHost(h string) bool {
	ip := net.ParseIP(h)
	return h == "localhost" || (ip != nil && ip.IsLoopback())
}

// registryConfig is the part for package registry.
func (c config) registryConfig() registry.Config {
	var out registry.Config
	for _, r := range c.Registries {
		out.Hosts = append(out.Hosts, registry.Host{
			Host: r.Host, Credentials: registry.Credentials{File: r.Credentials.File, Helper: r.Credentials.Helper},
			CAFile: r.CAFile, PlainHTTP: r.PlainHTTP, TokenHosts: r.TokenHosts, RedirectHosts: r.RedirectHosts,
		})
	}
	for _, m := range c.Mirrors {
		out.Mirrors = append(out.Mirrors, registry.Mirror{From: m.From, To: m.To})
	}
	return out
}

// foreignRoots opens the foreign roots.
func (c config) foreignRoots() (*foreign.Roots, error) {
	var out []foreign.Root
	for _, r := range c.ForeignRoots {
		out = append(out, foreign.Root{
			Name: r.Name, TrustedRoot: r.TrustedRoot, Key: r.Key, Log: r.Log, CertificateLog: r.CertificateLog,
		})
	}
	return foreign.Open(out)
}

// known is what the policy may refer to.
func (c config) known() policy.Known {
	k := policy.Known{Issuers: map[string]attest.Kind{}, IssuerURLs: map[string]string{}, Roots: map[string]bool{}, Service: c.PublicURL}
	for _, r := range c.ForeignRoots {
		k.Roots[r.Name] = true
	}
	for _, i := range c.Issuers {
		k.Issuers[i.Name], k.IssuerURLs[i.Name] = cmp.Or(i.Kind, attest.Workload), i.KnownIssuer()
	}
	return k
}

// recorded is what the log keeps of the configuration: who is believed and which
// registries are used, under the keys of the file. It holds no secret, for the
// file holds none.
func (c config) recorded() (json.RawMessage, error) {
	all := map[string]any{"public_url": c.PublicURL, "issuers": c.Issuers, "registries": c.Registries, "mirrors": c.Mirrors}
	if c.Bases != nil {
		all["bases"] = c.Bases
	}
	text, err := yaml.Marshal(all)
	if err != nil {
		return nil, err
	}
	var keys map[string]any
	if err := yaml.Unmarshal(text, &keys); err != nil {
		return nil, err
	}
	if roots := c.foreign.Describe(); len(roots) > 0 {
		keys["foreign_roots"] = roots // with the digests of their files
	}
	return json.Marshal(keys)
}

func (c config) proxies() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range c.TLS.BehindProxy {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, attest.Errorf(attest.BadConfig, "key tls.behind_proxy: %q is not a network such as 10.0.0.0/8", s)
		}
		out = append(out, p)
	}
	return out, nil
}
