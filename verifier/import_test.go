package verifier_test

import (
	"strings"
	"testing"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/notary"
)

// What was imported is the gate's word, about content that is there and is left out
// of what stays in memory.
func TestImport(t *testing.T) {
	n := notary.New(t)
	ref := attest.ImageRef{Repository: "registry.example.com/acme/api", Digest: attest.Hash([]byte("image"))}
	content := []byte(strings.Repeat("evidence", 1000))
	said := attest.Import{
		Root: "vendor", RootDigest: attest.Hash([]byte("root")), Form: attest.FormBundle, Digest: attest.Hash(content), Content: content,
		Signer:        attest.Foreigner{SAN: notary.Service + "/gate", Issuer: notary.Service}, // whatever it says
		PredicateType: attest.PredicateVSA, ImportedAt: attest.Time(time.Now()),
	}
	record := func(in attest.Import) attest.Envelope {
		t.Helper()
		statement, err := attest.ImportStatement(ref, in)
		if err != nil {
			t.Fatal(err)
		}
		env, err := n.Signer.SignGate(statement)
		if err != nil {
			t.Fatal(err)
		}
		return env
	}
	ev, err := n.Verifier.Record(n.Record(t, record(said)))
	if err != nil {
		t.Fatal(err)
	}
	got, ok := ev.Imported()
	if !ok || got.Root != "vendor" || got.Digest != said.Digest || got.Signer != said.Signer || ev.Kind() != attest.KindImport || !ev.Covers(ref.Digest) {
		t.Errorf("imported %+v", got)
	}
	if len(got.Content) > 0 || len(ev.Statement().Predicate) > 0 {
		t.Error("the evidence keeps the content in memory")
	}
	if _, isProvenance := ev.Provenance(); isProvenance {
		t.Error("an import is taken for a provenance")
	}

	for name, change := range map[string]func(*attest.Import){
		"other content":   func(i *attest.Import) { i.Content = []byte("other") },
		"no content":      func(i *attest.Import) { i.Content = nil },
		"no foreign root": func(i *attest.Import) { i.Root = "" },
	} {
		bad := said
		change(&bad)
		if err := n.Verifier.Envelope(record(bad)); attest.ReasonOf(err) != attest.StatementMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
	// D01: a job may not say what was verified under a foreign root.
	job := attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload, Issuer: "https://token.actions.githubusercontent.com", Subject: "s",
		SAN: "https://github.com/acme/api/.github/workflows/release.yml@refs/heads/main", TokenID: strings.Repeat("a", 64), Expires: time.Now().Add(time.Hour),
	}
	cred, err := n.Signer.Credential(job)
	if err != nil {
		t.Fatal(err)
	}
	statement, err := attest.ImportStatement(ref, said)
	if err != nil {
		t.Fatal(err)
	}
	env, err := n.Signer.Sign(cred, statement)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Verifier.Envelope(env); attest.ReasonOf(err) != attest.SignerMismatch {
		t.Errorf("an import by a job: %v", err)
	}
}
