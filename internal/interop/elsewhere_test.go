//go:build linux

package interop_test

// The types of in-toto-golang are what many verifiers parse provenance with.
//lint:file-ignore SA1019 for that reason

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	provenancev1 "github.com/in-toto/attestation/go/predicates/provenance/v1"
	statementv1 "github.com/in-toto/attestation/go/v1"
	"github.com/in-toto/in-toto-golang/in_toto"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/fulcio/certificate"
	sigroot "github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// What the service wrote is what others' parsers, validators and rules take for a
// provenance of that image, from that source.
func TestAcceptedElsewhere(t *testing.T) {
	t.Parallel()
	// Without the API the list of referrers is what the service wrote.
	w := newWorld(t, withTag)
	for name, s := range map[string]signed{"image": w.image, "index": w.index} {
		statement := payload(t, s.provenance)
		if err := readByInToto(statement); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if said := conforma(t, [][]byte{statement}, source{"https://github.com/" + testkit.Source, testkit.Commit}, w.URL+"/builders/github/hosted/v1", attest.BuildTypeGitHub); said != nil {
			t.Errorf("%s: Conforma's rules refuse it: %v", name, said)
		}
	}
	asked := ghQuestion{
		owner: "acme", repo: testkit.Source, issuer: w.job.Issuer, root: w.root, denySelfHosted: true,
		signerWorkflow: testkit.Source + "/.github/workflows/release.yml",
	}
	for name, s := range map[string]signed{"image": w.image, "index": w.index} {
		if err := w.ghVerify(t, s.ImageRef, asked); err != nil {
			t.Errorf("gh attestation verify would refuse the %s: %v", name, err)
		}
	}
	w.ghRefuses(t, asked)
	w.inTotoRefuses(t)
	w.conformaRefuses(t)
}

func payload(t testing.TB, raw []byte) []byte {
	t.Helper()
	return unbase64(t, at(alterable(t, raw), "dsseEnvelope", "payload"))
}

// readByInToto is in-toto's own reading: both Go libraries, with no field that they
// do not know, and the rules of the specifications of statement and predicate.
func readByInToto(statement []byte) error {
	var s statementv1.Statement
	if err := protojson.Unmarshal(statement, &s); err != nil {
		return fmt.Errorf("in-toto/attestation does not read the statement: %w", err)
	}
	if err := s.Validate(); err != nil {
		return fmt.Errorf("in-toto/attestation refuses the statement: %w", err)
	}
	var whole struct {
		Predicate json.RawMessage `json:"predicate"`
	}
	if err := json.Unmarshal(statement, &whole); err != nil {
		return err
	}
	var p provenancev1.Provenance
	if err := protojson.Unmarshal(whole.Predicate, &p); err != nil {
		return fmt.Errorf("in-toto/attestation does not read the predicate: %w", err)
	}
	if err := p.Validate(); err != nil {
		return fmt.Errorf("in-toto/attestation refuses the predicate: %w", err)
	}
	var other in_toto.ProvenanceStatementSLSA1
	dec := json.NewDecoder(bytes.NewReader(statement))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&other); err != nil {
		return fmt.Errorf("in-toto-golang does not read the statement: %w", err)
	}
	switch {
	case other.Type != in_toto.StatementInTotoV1, other.PredicateType != "https://slsa.dev/provenance/v1", len(other.Subject) != len(s.GetSubject()):
		return fmt.Errorf("in-toto-golang reads %s %s about %d subjects", other.Type, other.PredicateType, len(other.Subject))
	case other.Predicate.RunDetails.Builder.ID != p.GetRunDetails().GetBuilder().GetId(), other.Predicate.RunDetails.BuildMetadata.FinishedOn == nil:
		return fmt.Errorf("in-toto-golang reads builder %q, finished %v", other.Predicate.RunDetails.Builder.ID, other.Predicate.RunDetails.BuildMetadata.FinishedOn)
	case !slices.Equal(slices.Sorted(maps.Keys(other.Predicate.BuildDefinition.ExternalParameters.(object))), slices.Sorted(maps.Keys(p.GetBuildDefinition().GetExternalParameters().AsMap()))):
		return fmt.Errorf("the libraries read other external parameters: %v", other.Predicate.BuildDefinition.ExternalParameters)
	}
	return nil
}

// inTotoRefuses shows that the checks of readByInToto are ones.
func (w *world) inTotoRefuses(t *testing.T) {
	t.Helper()
	good := string(payload(t, w.image.provenance))
	for name, change := range map[string][2]string{
		"unknown field of the statement": {`"predicateType":`, `"more":1,"predicateType":`},
		"unknown field of the predicate": {`"runDetails":{`, `"more":1,"runDetails":{`},
		"unknown field of a dependency":  {`"resolvedDependencies":[{`, `"resolvedDependencies":[{"more":1,`},
		"commit HEAD":                    {`"digest":{"gitCommit":"` + testkit.Commit, `"digest":{"gitCommit":"HEAD`},
		"no builder":                     {`"builder":{"id":"` + w.URL + `/builders/github/hosted/v1"}`, `"builder":{}`},
	} {
		changed := strings.Replace(good, change[0], change[1], 1)
		if changed == good {
			t.Errorf("%s: nothing to change", name)
		}
		if readByInToto([]byte(changed)) == nil {
			t.Errorf("in-toto reads a provenance with %s", name)
		}
	}
}

// ghQuestion is what "gh attestation verify oci://IMAGE --bundle-from-oci
// --custom-trusted-root F" is asked.
type ghQuestion struct {
	owner, repo, issuer, signerWorkflow string
	root                                string // --custom-trusted-root
	denySelfHosted                      bool
}

// ghVerify checks what gh's documentation says that it checks, on what the registry
// lists beside the image, with the matchers of sigstore-go that gh uses: bundles are
// referrers whose artifact type begins with application/vnd.dev.sigstore.bundle, of
// predicate type SLSA provenance v1; the certificate's name is the workflow's URI; its
// issuer, source repository, owner and runner are those asked for.
func (w *world) ghVerify(t *testing.T, ref attest.ImageRef, q ghQuestion) error {
	t.Helper()
	trusted := must(sigroot.NewTrustedRootFromPath(q.root))(t)
	v := must(verify.NewVerifier(trusted, verify.WithSignedTimestamps(1), verify.WithTransparencyLog(1)))(t)
	san := must(verify.NewSANMatcher("", "(?i)^https://github.com/"+q.signerWorkflow))(t)
	extensions := certificate.Extensions{}
	if q.denySelfHosted {
		extensions.RunnerEnvironment = "github-hosted"
	}
	who := must(verify.NewCertificateIdentity(san, must(verify.NewIssuerMatcher(q.issuer, ""))(t), extensions))(t)
	found := 0
	for _, raw := range w.referrerBundles(t, ref) {
		var b bundle.Bundle
		check(t, b.UnmarshalJSON(raw))
		content := must(b.VerificationContent())(t)
		if leaf := content.Certificate(); leaf == nil || len(leaf.Issuer.Organization) != 1 {
			return fmt.Errorf("the certificate's issuer does not have exactly one organization")
		}
		result, err := v.Verify(&b, verify.NewPolicy(verify.WithArtifactDigest("sha256", ref.Digest[:]), verify.WithCertificateIdentity(who)))
		if err != nil {
			return err
		}
		if result.Statement.GetPredicateType() != "https://slsa.dev/provenance/v1" {
			continue
		}
		got := result.Signature.Certificate.Extensions
		for _, f := range []struct{ name, got, want string }{
			{"SourceRepositoryOwnerURI", got.SourceRepositoryOwnerURI, "https://github.com/" + q.owner},
			{"SourceRepositoryURI", got.SourceRepositoryURI, "https://github.com/" + q.repo},
			{"Issuer", got.Issuer, q.issuer},
		} {
			if !strings.EqualFold(f.got, f.want) {
				return fmt.Errorf("expected %s to be %s, got %s", f.name, f.want, f.got)
			}
		}
		found++
	}
	if found == 0 {
		return fmt.Errorf("no bundle with a SLSA provenance")
	}
	return nil
}

// referrerBundles returns the bundles that the registry lists beside an image.
func (w *world) referrerBundles(t *testing.T, ref attest.ImageRef) [][]byte {
	t.Helper()
	list := must(must(remote.Referrers(digest(t, ref), remote.WithContext(t.Context())))(t).IndexManifest())(t)
	var out [][]byte
	for _, m := range list.Manifests {
		if !strings.HasPrefix(m.ArtifactType, "application/vnd.dev.sigstore.bundle") {
			continue
		}
		img := must(remote.Image(digest(t, w.ref(t, strings.TrimPrefix(string(ref.Repository), w.host+"/"), m.Digest)), remote.WithContext(t.Context())))(t)
		layers := must(img.Layers())(t)
		if len(layers) != 1 {
			t.Fatalf("referrer %s has %d layers", m.Digest, len(layers))
		}
		content := must(layers[0].Uncompressed())(t)
		var raw bytes.Buffer
		_ = must(raw.ReadFrom(content))(t)
		check(t, content.Close())
		out = append(out, raw.Bytes())
	}
	return out
}

func (w *world) ghRefuses(t *testing.T, good ghQuestion) {
	t.Helper()
	strangeRoot, _ := w.stranger(t)
	unsigned := w.push(t, "acme/api", testkit.RandomImage(t)).ImageRef
	for _, row := range []struct {
		name   string
		ref    attest.ImageRef
		change func(*ghQuestion)
		want   string
	}{
		{"another owner", w.image.ImageRef, func(q *ghQuestion) { q.owner = "evil" }, "SourceRepositoryOwnerURI"},
		{"another repository", w.image.ImageRef, func(q *ghQuestion) { q.repo = "acme/ap" }, "SourceRepositoryURI"},
		{"another issuer", w.image.ImageRef, func(q *ghQuestion) { q.issuer = "https://token.actions.githubusercontent.com" }, "issuer"},
		{"another workflow", w.image.ImageRef, func(q *ghQuestion) { q.signerWorkflow = "acme/api/.github/workflows/test.yml" }, "SAN"},
		{"another trust root", w.image.ImageRef, func(q *ghQuestion) { q.root = strangeRoot }, "failed to verify"},
		{"an unsigned image", unsigned, func(*ghQuestion) {}, "no bundle"},
	} {
		q := good
		row.change(&q)
		if err := w.ghVerify(t, row.ref, q); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("gh attestation verify, %s: %v, want an error about %s", row.name, err, row.want)
		}
	}
}

// source is what Conforma is told to expect: input.image.source.git.
type source struct{ url, revision string }

// conforma applies Conforma's documented rules about provenance v1 to attestations of
// one image: slsa_source_correlated (attested_source_code_reference and
// expected_source_code_reference: URI and commit of an entry of resolvedDependencies
// are exactly those expected, give or take ".git" and a final slash; a ref in the URI
// is not taken off), slsa_build_build_service (builder.id is there and allowed), and
// the build type allowed. Of several it takes the one that finished last.
func conforma(t testing.TB, statements [][]byte, want source, builder, buildType string) (denied []string) {
	t.Helper()
	type provenance struct {
		Predicate struct {
			BuildDefinition struct {
				BuildType            string `json:"buildType"`
				ResolvedDependencies []struct {
					URI    string            `json:"uri"`
					Digest map[string]string `json:"digest"`
				} `json:"resolvedDependencies"`
			} `json:"buildDefinition"`
			RunDetails struct {
				Builder  struct{ ID string } `json:"builder"`
				Metadata struct {
					FinishedOn string `json:"finishedOn"`
				} `json:"metadata"`
			} `json:"runDetails"`
		} `json:"predicate"`
	}
	var latest provenance
	for _, raw := range statements {
		var p provenance
		check(t, json.Unmarshal(raw, &p))
		if p.Predicate.RunDetails.Metadata.FinishedOn == "" {
			return []string{"metadata.finishedOn is not set"}
		}
		if p.Predicate.RunDetails.Metadata.FinishedOn >= latest.Predicate.RunDetails.Metadata.FinishedOn {
			latest = p
		}
	}
	expected := map[string]bool{}
	uri := "git+" + want.url
	for _, u := range []string{uri, strings.TrimSuffix(uri, ".git"), uri + ".git", strings.TrimSuffix(uri, "/"), strings.TrimSuffix(uri, "/") + ".git"} {
		for _, algorithm := range []string{"sha1", "gitCommit"} {
			expected[u+"@"+algorithm+":"+want.revision] = true
		}
	}
	vcs := regexp.MustCompile(`^(git|hg|bzr|svn)\+`)
	attested, correlated := 0, false
	for _, d := range latest.Predicate.BuildDefinition.ResolvedDependencies {
		if !vcs.MatchString(d.URI) {
			continue
		}
		for algorithm, value := range d.Digest {
			attested++
			correlated = correlated || expected[d.URI+"@"+algorithm+":"+value]
		}
	}
	if attested == 0 {
		denied = append(denied, "attested_source_code_reference")
	} else if !correlated {
		denied = append(denied, "expected_source_code_reference")
	}
	if latest.Predicate.RunDetails.Builder.ID != builder {
		denied = append(denied, "slsa_builder_id_accepted")
	}
	if latest.Predicate.BuildDefinition.BuildType != buildType {
		denied = append(denied, "allowed_provenance_build_types")
	}
	return denied
}

func (w *world) conformaRefuses(t *testing.T) {
	t.Helper()
	statement := payload(t, w.image.provenance)
	good := source{"https://github.com/" + testkit.Source, testkit.Commit}
	builder := w.URL + "/builders/github/hosted/v1"
	onlyWithRef := bytes.Replace(statement, []byte(`{"uri":"git+`+good.url+`","digest":{"gitCommit":"`+testkit.Commit+`"}},`), nil, 1)
	if bytes.Equal(onlyWithRef, statement) {
		t.Fatal("the source is no dependency without its ref")
	}
	older := bytes.Replace(bytes.ReplaceAll(statement, []byte(testkit.Commit), []byte(strings.Repeat("0", 40))), []byte(`"finishedOn":"2`), []byte(`"finishedOn":"1`), 1)
	for _, row := range []struct {
		name       string
		statements [][]byte
		want       source
		builder    string
		denied     []string
	}{
		{"with .git", [][]byte{statement}, source{good.url + ".git", good.revision}, builder, nil},
		{"an older one of another commit beside it", [][]byte{statement, older}, good, builder, nil},
		{"another commit", [][]byte{statement}, source{good.url, strings.Repeat("0", 40)}, builder, []string{"expected_source_code_reference"}},
		{"a branch", [][]byte{statement}, source{good.url, "main"}, builder, []string{"expected_source_code_reference"}},
		{"another repository", [][]byte{statement}, source{good.url + "x", good.revision}, builder, []string{"expected_source_code_reference"}},
		{"only with its ref", [][]byte{onlyWithRef}, good, builder, []string{"expected_source_code_reference"}},
		{"another builder", [][]byte{statement}, good, "https://tekton.dev/chains/v2", []string{"slsa_builder_id_accepted"}},
	} {
		if got := conforma(t, row.statements, row.want, row.builder, attest.BuildTypeGitHub); !slices.Equal(got, row.denied) {
			t.Errorf("Conforma, %s: %v, want %v", row.name, got, row.denied)
		}
	}
}
