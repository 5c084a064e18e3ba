package testkit

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
)

// Example is a token that docs/identity documents, with the configuration that
// reads it.
type Example struct {
	Name   string          // the heading in lower case with dashes: "github-com", unique
	File   string          // of docs/identity
	Issuer identity.Issuer // as documented: the keys are the real issuer's, see ExampleKeys
	Claims map[string]any  // as documented: times are long ago or far ahead, see At
}

var (
	exampleBlock = regexp.MustCompile("(?ms)^```(yaml|json)\n(.*?)^```$")
	notInName    = regexp.MustCompile(`[^a-z0-9]+`)
)

// Examples returns the examples of every page of docs/identity: each section under
// one heading that has a JSON block, which holds the claims; the first YAML block
// before or after it is the issuer's entry in the configuration, decoded strictly.
func Examples(t testing.TB) []Example {
	t.Helper()
	dir := filepath.Join(moduleRoot(t), "docs", "identity")
	pages := must(filepath.Glob(filepath.Join(dir, "*.md")))(t)
	var out []Example
	for _, page := range pages {
		text := string(must(os.ReadFile(page))(t))
		for _, section := range sections(text) {
			e, ok, err := example(section)
			if err != nil {
				t.Fatalf("%s: %v", page, err)
			}
			if !ok {
				continue
			}
			if slices.ContainsFunc(out, func(o Example) bool { return o.Name == e.Name }) {
				t.Fatalf("%s: a second example is called %q", page, e.Name)
			}
			e.File = filepath.Base(page)
			out = append(out, e)
		}
	}
	if len(out) == 0 {
		t.Fatalf("no examples in %s", dir)
	}
	return out
}

// sections cuts a page at its headings. A "#" within a block is none.
func sections(page string) []string {
	out, inBlock := []string{""}, false
	for line := range strings.Lines(page) {
		if strings.HasPrefix(line, "```") {
			inBlock = !inBlock
		}
		if heading := strings.TrimLeft(line, "#"); !inBlock && heading != line {
			out = append(out, strings.TrimSpace(heading)+"\n")
			continue
		}
		out[len(out)-1] += line
	}
	return out
}

func example(section string) (Example, bool, error) {
	heading, body, _ := strings.Cut(section, "\n")
	heading = strings.TrimPrefix(strings.ToLower(heading), "example: ")
	e := Example{Name: strings.Trim(notInName.ReplaceAllString(heading, "-"), "-")}
	blocks := map[string]string{}
	for _, m := range exampleBlock.FindAllStringSubmatch(body, -1) {
		if _, ok := blocks[m[1]]; !ok {
			blocks[m[1]] = m[2]
		}
	}
	if blocks["json"] == "" {
		return Example{}, false, nil
	}
	d := json.NewDecoder(strings.NewReader(blocks["json"]))
	d.UseNumber()
	if err := d.Decode(&e.Claims); err != nil {
		return Example{}, false, fmt.Errorf("%s: claims: %w", heading, err)
	}
	var entries []identity.Issuer
	y := yaml.NewDecoder(strings.NewReader(blocks["yaml"]))
	y.KnownFields(true)
	if err := y.Decode(&entries); err != nil || len(entries) != 1 {
		return Example{}, false, fmt.Errorf("%s: the configuration is no list of one issuer: %v", heading, err)
	}
	if err := y.Decode(new(any)); err != io.EOF {
		return Example{}, false, fmt.Errorf("%s: the configuration has a second document", heading)
	}
	e.Issuer = entries[0]
	return e, true, nil
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir := must(os.Getwd())(t)
	for dir != filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	t.Fatal("the test does not run within the module")
	return ""
}

// At returns the claims as of now, with the lifetime that is documented, for
// ExampleKeys.Mint. The audience is the service's unless the configuration has one
// of its own. What is not documented, such as a jti, is not added.
func (e Example) At(t testing.TB, now time.Time, service string) map[string]any {
	t.Helper()
	out := map[string]any{"nbf": nil, "jti": nil, "iat": nil, "iss": nil}
	for name, v := range e.Claims {
		out[name] = v
	}
	start := now
	if iat, ok := e.Claims["iat"]; ok {
		start = seconds(t, iat)
	}
	for _, name := range []string{"iat", "nbf", "exp"} {
		if v, ok := e.Claims[name]; ok {
			out[name] = now.Add(seconds(t, v).Sub(start)).Unix()
		}
	}
	out["aud"] = service
	if e.Issuer.Audience != "" {
		out["aud"] = e.Issuer.Audience
	}
	return out
}

func seconds(t testing.TB, v any) time.Time {
	t.Helper()
	n, ok := v.(json.Number)
	if !ok {
		t.Fatalf("%v is no time", v)
	}
	return time.Unix(must(n.Int64())(t), 0)
}

// ExampleKeys signs the examples' tokens in place of the issuers that they name.
type ExampleKeys struct {
	*dev.Issuer
	uri, caFile, dir string
}

// StartExampleKeys serves keys for RS256 over TLS on loopback until the test ends.
func StartExampleKeys(t testing.TB, now func() time.Time) *ExampleKeys {
	t.Helper()
	srv := httptest.NewUnstartedServer(nil)
	url := "https://" + srv.Listener.Addr().String()
	i := must(dev.NewIssuer(dev.IssuerConfig{URL: url, Now: now}))(t)
	srv.Config.Handler = i
	srv.StartTLS()
	t.Cleanup(srv.Close)
	k := &ExampleKeys{Issuer: i, uri: url + "/.well-known/jwks", dir: t.TempDir()}
	k.caFile = filepath.Join(k.dir, "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	check(t, os.WriteFile(k.caFile, block, 0o600))
	return k
}

// Trusted returns the documented issuer with these keys in place of its own, by the
// way in which it gets them. No cluster is there to review tokens.
func (k *ExampleKeys) Trusted(t testing.TB, i identity.Issuer) identity.Issuer {
	t.Helper()
	set := must(json.Marshal(k.Keys()))(t)
	switch {
	case i.BundleFile != "":
		i.BundleFile = k.write(t, "bundle.json", bytes.ReplaceAll(set, []byte(`"use":"sig"`), []byte(`"use":"jwt-svid"`)))
	case i.JWKSFile != "":
		i.JWKSFile = k.write(t, "jwks.json", set)
	default:
		i.JWKSURI, i.CAFile = k.uri, k.caFile
	}
	i.TokenReview = nil
	return i
}

func (k *ExampleKeys) write(t testing.TB, name string, text []byte) string {
	t.Helper()
	file := filepath.Join(k.dir, name)
	check(t, os.WriteFile(file, text, 0o600))
	return file
}
