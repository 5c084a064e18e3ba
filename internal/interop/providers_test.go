//go:build linux

package interop_test

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

var update = flag.Bool("update", false, "write testdata/providers anew")

// Nobody else is in the network of these tests, and these ports are below those that
// its other tests are given: names which stand in certificates and statements can be
// the same in every run.
const (
	fixedService  = "127.0.0.1:8443"
	fixedRegistry = "127.0.0.1:5000"
)

// noon is when everything in the golden files happens.
var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

const golden = "testdata/providers"

// Every token that docs/identity documents becomes the certificate and the
// provenance of the golden files, byte for byte, and stock cosign verifies them for
// the name and the issuer in the certificate and for no others.
func TestProviders(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	reg := must(dev.StartRegistry(ctx, fixedRegistry))(t)
	t.Cleanup(func() { reg.Close() })
	keys := testkit.StartExampleKeys(t, func() time.Time { return noon })
	schema := must(jsonschema.NewCompiler().Compile(filepath.Join(root, "docs/buildtypes/oidc-v1.schema.json")))(t)

	want := map[string]bool{}
	for _, e := range testkit.Examples(t) {
		if e.Issuer.Kind == attest.Person {
			continue // persons sign no images
		}
		want[e.Name+".cert.golden"], want[e.Name+".provenance.golden"] = true, true
		// One service after the other: all of them have the same address.
		got := signExample(t, keys, e)
		if *update {
			check(t, os.MkdirAll(golden, 0o755))
			check(t, os.WriteFile(filepath.Join(golden, e.Name+".cert.golden"), got.certificate, 0o644))
			check(t, os.WriteFile(filepath.Join(golden, e.Name+".provenance.golden"), got.provenance, 0o644))
		}
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			sameAsGolden(t, e.Name+".cert.golden", got.certificate)
			sameAsGolden(t, e.Name+".provenance.golden", got.provenance)
			got.accepted(t, schema)
		})
	}
	for _, f := range must(os.ReadDir(golden))(t) {
		if !want[f.Name()] {
			t.Errorf("%s is of no example in docs/identity", f.Name())
		}
	}
}

func sameAsGolden(t *testing.T, name string, got []byte) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(golden, name))
	if d := cmp.Diff(string(text), string(got)); err != nil || d != "" {
		t.Errorf("%s is not what is written; run: go test ./internal/interop -run Providers -update (-want +got):\n%s", name, d)
	}
}

// example is what a job of an example had signed, and what a verifier elsewhere has.
type example struct {
	signed
	root        string // file: trusted_root.json
	san, issuer string // of the certificate
	certificate []byte // its names and Fulcio extensions, as text
	provenance  []byte // the statement, indented
	statement   []byte
}

// signExample starts a service that is configured as the example says, and has its
// job sign an image.
func signExample(t *testing.T, keys *testkit.ExampleKeys, e testkit.Example) example {
	t.Helper()
	// An audience below the documented service is below this one.
	e.Issuer.Audience = strings.Replace(e.Issuer.Audience, "https://hallmark.example.com/", "http://"+fixedService+"/", 1)
	s := testkit.NewStack(t, testkit.Options{
		Around: &testkit.Around{Addr: fixedService, Registry: fixedRegistry, Issuer: keys.URL(), People: keys.URL()},
		Now:    func() time.Time { return noon },
		Issue:  func(all *[]identity.Issuer) { *all = []identity.Issuer{keys.Trusted(t, e.Issuer)} },
		Policy: examplePolicy(e.Issuer.Name),
	})
	defer s.Close()
	w := &world{Stack: s, host: fixedRegistry}
	base := w.push(t, "base/debian", fixedImage(t, empty.Image, "base"))
	img := mutate.Annotations(fixedImage(t, base.img, "app"), map[string]string{
		"org.opencontainers.image.base.name":   string(base.Repository) + ":12",
		"org.opencontainers.image.base.digest": base.Digest.String(),
	}).(v1.Image)
	ref := w.push(t, "acme/"+e.Name, img).ImageRef
	token := must(keys.Mint(e.At(t, noon, s.URL)))(t)
	id := s.Identity(token)

	out := example{signed: w.sign(t, token, ref, ""), root: file(t, "trusted_root.json", s.Signer.TrustedRoot())}
	out.statement = payload(t, out.signed.provenance)
	if !bytes.Equal(payloadSubject(t, out.signed.signature), payloadSubject(t, out.signed.provenance)) {
		t.Errorf("%s: signature and provenance are about other subjects", e.Name)
	}
	der := unbase64(t, at(alterable(t, out.signed.provenance), "verificationMaterial", "certificate", "rawBytes"))
	cert := must(x509.ParseCertificate(der))(t)
	out.san, out.issuer, out.certificate = rendered(t, cert)
	if out.san != id.SAN || out.issuer != id.Issuer {
		t.Errorf("%s: the certificate names %s of %s, the identity is %s of %s", e.Name, out.san, out.issuer, id.SAN, id.Issuer)
	}
	var text bytes.Buffer
	check(t, json.Indent(&text, out.statement, "", "  "))
	text.WriteByte('\n')
	out.provenance = text.Bytes()
	if _, ok := e.Claims["jti"]; !ok {
		// Without a jti a token is named by its signing input, in which the key's name
		// is another one in every run; so is what follows from it.
		request := at(alterable(t, out.statement), "predicate", "buildDefinition", "internalParameters", "hallmark_request").(string)
		out.provenance = bytes.ReplaceAll(out.provenance, []byte(id.TokenID), []byte("TOKEN"))
		if strings.HasPrefix(id.Run(), "token:") {
			out.provenance = bytes.ReplaceAll(out.provenance, []byte(request), []byte("REQUEST"))
		}
	}
	return out
}

func payloadSubject(t testing.TB, raw []byte) []byte {
	t.Helper()
	subject := at(alterable(t, payload(t, raw)), "subject").([]any)
	for _, s := range subject {
		delete(s.(object), "annotations") // the signature's has the key of the request
	}
	return must(json.Marshal(subject))(t)
}

func examplePolicy(issuer string) string {
	return `version: 1
roles:
  signers:
  - {issuer: ` + issuer + `, images: ["REGISTRY/acme/*"], when: "id.issuer == '` + issuer + `'"}
tracks:
- name: acme
  images: ["REGISTRY/acme/*"]
  stages:
  - {name: test, rules: [{signed_by: {issuer: ` + issuer + `, when: "id.issuer == '` + issuer + `'"}}, {provenance: {source_id: "1", min_level: 1}}]}
`
}

// fixedImage is on with one more layer, the same bytes in every run.
func fixedImage(t testing.TB, on v1.Image, layer string) v1.Image {
	t.Helper()
	img := must(mutate.AppendLayers(on, static.NewLayer([]byte(layer), types.OCIUncompressedLayer)))(t)
	img = mutate.MediaType(mutate.ConfigMediaType(img, types.OCIConfigJSON), types.OCIManifestSchema1)
	cfg := must(img.ConfigFile())(t).DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	return must(mutate.ConfigFile(img, cfg))(t)
}

// rendered returns the name and the issuer in a certificate, and its names and
// extensions of Fulcio (docs/oid-info.md) as sorted text: values up to .6 are bytes
// as they are, those after it DER.
func rendered(t testing.TB, cert *x509.Certificate) (san, issuer string, text []byte) {
	t.Helper()
	if len(cert.URIs) != 1 || len(cert.EmailAddresses)+len(cert.DNSNames)+len(cert.IPAddresses) > 0 {
		t.Fatalf("the certificate has the names %v %v %v %v", cert.URIs, cert.EmailAddresses, cert.DNSNames, cert.IPAddresses)
	}
	san = cert.URIs[0].String()
	fulcio := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1}
	lines := map[int]string{}
	for _, ext := range cert.Extensions {
		if len(ext.Id) != len(fulcio)+1 || !slices.Equal(ext.Id[:len(fulcio)], fulcio) {
			continue
		}
		n, value := ext.Id[len(fulcio)], string(ext.Value)
		if n > 6 {
			rest := must(asn1.Unmarshal(ext.Value, &value))(t)
			if len(rest) > 0 {
				t.Fatalf("%s has more behind its value", ext.Id)
			}
		}
		if n == 8 {
			issuer = value
		}
		if _, twice := lines[n]; twice || value == "" {
			t.Fatalf("%s is there twice or empty", ext.Id)
		}
		lines[n] = value
	}
	out := "SAN=URI:" + san + "\n"
	for n := range 100 {
		if value, ok := lines[n]; ok {
			out += fulcio.String() + "." + strconv.Itoa(n) + "=" + value + "\n"
		}
	}
	return san, issuer, []byte(out)
}

// accepted checks an example with everything that others have.
func (e example) accepted(t *testing.T, schema *jsonschema.Schema) {
	predicate := at(alterable(t, e.statement), "predicate")
	if err := schema.Validate(predicate); err != nil {
		t.Errorf("docs/buildtypes: %v", err)
	}
	if err := readByInToto(e.statement); err != nil {
		t.Error(err)
	}
	claims := at(predicate, "buildDefinition", "internalParameters", "hallmark_claims").(object)
	builder := at(predicate, "runDetails", "builder", "id").(string)
	buildType := at(predicate, "buildDefinition", "buildType").(string)
	var refused []string
	if claims["commit"] == nil {
		refused = []string{"attested_source_code_reference"}
	}
	expected := source{fmt.Sprint(claims["source_uri"]), fmt.Sprint(claims["commit"])}
	if got := conforma(t, [][]byte{e.statement}, expected, builder, buildType); !slices.Equal(got, refused) {
		t.Errorf("Conforma: %v, want %v", got, refused)
	}
	w := &world{}
	for _, c := range cosigns(t) {
		for _, row := range []struct {
			name string
			who  []string
			ok   bool
		}{
			{"as signed", by(e.san, e.issuer), true},
			{"another identity", by(e.san+"x", e.issuer), false},
			{"another issuer", by(e.san, e.issuer+"/x"), false},
		} {
			t.Run(c.name+" "+row.name, func(t *testing.T) {
				common := slices.Concat(w.trusting(e.root), row.who, []string{e.ImageRef.String()})
				c.want(t, row.ok, append([]string{"verify"}, common...)...)
				c.want(t, row.ok, append([]string{"verify-attestation", "--type", "slsaprovenance1"}, common...)...)
			})
		}
	}
}
