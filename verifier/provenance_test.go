package verifier_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
)

// A provenance that was signed and logged as it must be, by the job that it is
// about, and yet is not what this service writes.
func TestProvenanceParameters(t *testing.T) {
	w := newWorld(t)
	nightly := identity()
	nightly.Build.Event = "schedule" // our own build type
	for _, row := range []struct {
		name, old, new string
		id             attest.Identity
		want           attest.Reason
	}{
		{"as written", ``, ``, identity(), ""},
		{"as written, our build type", ``, ``, nightly, ""},
		{"D11 unknown external parameter", `"externalParameters":{`, `"externalParameters":{"inputs":{"debug":"true"},`, identity(), attest.StatementMalformed},
		{"D11 unknown external parameter, our build type", `"externalParameters":{`, `"externalParameters":{"vars":{},`, nightly, attest.StatementMalformed},
		{"D11 external parameter in another case", `"externalParameters":{"source"`, `"externalParameters":{"Source"`, nightly, attest.StatementMalformed},
		{"D03 external parameter twice", `"externalParameters":{`, `"externalParameters":{"SOURCE":"https://github.com/evil/api",`, nightly, attest.StatementMalformed},
		{"D10 external source is another", `"externalParameters":{"source":"https://github.com/acme/api"`, `"externalParameters":{"source":"https://github.com/evil/api"`, nightly, attest.StatementMalformed},
		{"D10 external workflow is another", `"path":".github/workflows/release.yml"`, `"path":".github/workflows/other.yml"`, identity(), attest.StatementMalformed},
		{"D11 another build type", attest.BuildTypeOIDC, attest.BuildTypeGitHub, nightly, attest.StatementMalformed},
		{"D11 unknown build type", attest.BuildTypeOIDC, "https://example.com/x", nightly, attest.StatementMalformed},
		{"D02 build definition is a list", `"buildDefinition":{`, `"buildDefinition":[],"x":{`, identity(), attest.StatementMalformed},
		{"D02 claims are text", `"hallmark_claims":{`, `"hallmark_claims":"x","x":{`, identity(), attest.StatementMalformed},
	} {
		t.Run(row.name, func(t *testing.T) {
			text := provenance(t, row.id, image)
			if !bytes.Contains(text, []byte(row.old)) {
				t.Fatalf("nothing to change: %s", row.old)
			}
			if row.old != "" {
				text = bytes.Replace(text, []byte(row.old), []byte(row.new), 1)
			}
			e := w.by(row.id, text)
			if got := attest.ReasonOf(w.verifier.Envelope(e)); got != row.want {
				t.Errorf("self-check: %q, want %q", got, row.want)
			}
			r := w.log(e)
			ev, err := w.verifier.Bundle(w.bundle(r), image.Ref.Digest)
			if got := attest.ReasonOf(err); got != row.want || (ev == nil) != (row.want != "") {
				t.Errorf("bundle: %v, %q, want %q", ev, got, row.want)
			}
			if ev, err = w.verifier.Record(r); attest.ReasonOf(err) != row.want || (ev == nil) != (row.want != "") {
				t.Errorf("record: %v, %v, want %q", ev, err, row.want)
			}
		})
	}
}

// FuzzStatement signs any payload in the name of a job. What is accepted is about
// the image, read by the standard library alike, and as a provenance it says what
// its signer's certificate says.
func FuzzStatement(f *testing.F) {
	w := newWorld(f)
	id := identity()
	nightly := identity()
	nightly.Build.Event = "schedule"
	for _, seed := range [][]byte{
		provenance(f, id, image), provenance(f, nightly, image), must(attest.SignatureStatement(image, "r"))(f),
		must(attest.VSAStatement(service, image, attest.Promotion{}))(f),
		must(attest.EvidenceStatement(attest.EvidenceInput{Image: image, PredicateType: attest.PredicateSPDX, Predicate: json.RawMessage(`{}`), Name: "n"}))(f),
		[]byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"x"}}],"predicateType":"t","predicate":{}}`),
	} {
		f.Add(seed)
	}
	cred := must(w.signer.Credential(id))(f)
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := w.signer.Sign(cred, payload)
		if err != nil {
			t.Fatal(err)
		}
		err = w.verifier.Envelope(e)
		if err != nil {
			if attest.ReasonOf(err) == attest.Internal {
				t.Fatalf("no reason: %v", err)
			}
			return
		}
		var s attest.Statement
		if err := json.Unmarshal(payload, &s); err != nil || len(s.Subject) == 0 || s.Type != attest.StatementType {
			t.Fatalf("accepted %q, %v", payload, err)
		}
		if attest.KindOf(s.PredicateType) != attest.KindProvenance {
			return
		}
		p, err := attest.ParseProvenance(s.Predicate)
		if err != nil || p.CheckParameters() != nil || p.Internal().Claims.Commit != id.Build.Commit || p.Internal().Claims.SourceURI != id.Build.SourceURI {
			t.Fatalf("accepted a provenance of another build: %q", payload)
		}
	})
}
