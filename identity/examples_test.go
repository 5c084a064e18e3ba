package identity_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

var update = flag.Bool("update", false, "write testdata/golden anew")

// What docs/identity documents is what the service does: every token there, read
// with the configuration beside it, names whom testdata/golden says.
func TestExamples(t *testing.T) {
	c := newClock()
	keys := testkit.StartExampleKeys(t, c.Now)
	seen := map[string]bool{}
	for _, e := range testkit.Examples(t) {
		seen[e.Name+".json"] = true
		t.Run(e.Name, func(t *testing.T) {
			claims := e.At(t, c.Now(), service)
			a := newAuth(t, c, keys.Trusted(t, e.Issuer))
			id := accepted(t, a, mint(t, keys.Issuer, claims))
			if claims["jti"] == nil {
				if len(id.TokenID) != 64 {
					t.Errorf("token id %q", id.TokenID)
				}
				id.TokenID = "" // of the signing input, in which the key's id is new every time
			}
			compareGolden(t, e.Name+".json", id)
		})
	}
	files, err := os.ReadDir(filepath.Join("testdata", "golden"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !seen[f.Name()] {
			t.Errorf("testdata/golden/%s is of no example in docs/identity", f.Name())
		}
	}
}

func compareGolden(t *testing.T, file string, id attest.Identity) {
	t.Helper()
	var got bytes.Buffer
	enc := json.NewEncoder(&got)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(id); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "golden", file)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", path, diff)
	}
}

// documented returns an example by name, with an authenticator that believes it.
func documented(t *testing.T, name string, change func(*identity.Issuer)) documentedExample {
	t.Helper()
	for _, e := range testkit.Examples(t) {
		if e.Name != name {
			continue
		}
		c := newClock()
		keys := testkit.StartExampleKeys(t, c.Now)
		conf := keys.Trusted(t, e.Issuer)
		if change != nil {
			change(&conf)
		}
		return documentedExample{Example: e, keys: keys, auth: newAuth(t, c, conf), now: c.Now()}
	}
	t.Fatalf("docs/identity has no example %q", name)
	return documentedExample{}
}

type documentedExample struct {
	testkit.Example
	keys *testkit.ExampleKeys
	auth *identity.Authenticator
	now  time.Time
}

// token mints the example's with changes; nil leaves a claim out.
func (d documentedExample) token(t *testing.T, changes map[string]any) string {
	t.Helper()
	claims := d.At(t, d.now, service)
	for name, v := range changes {
		claims[name] = v
	}
	return mint(t, d.keys.Issuer, claims)
}

// refusal is a change of a good token and why it is then refused.
type refusal struct {
	name   string
	claim  string
	value  any
	reason attest.Reason
}

func (d documentedExample) refuses(t *testing.T, rows ...refusal) {
	t.Helper()
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			refused(t, d.auth, d.token(t, map[string]any{row.claim: row.value}), row.reason)
		})
	}
}

// maySign asserts that the job is known, and whether it may sign.
func (d documentedExample) maySign(t *testing.T, changes map[string]any, want attest.Reason) attest.Identity {
	t.Helper()
	id := accepted(t, d.auth, d.token(t, changes))
	if err := id.MaySign(); attest.ReasonOf(err) != want {
		t.Fatalf("MaySign with %v: %v, want %q", changes, err, want)
	}
	return id
}
