package archtest_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/internal/archtest"
)

const (
	module = "github.com/hallmarkd/hallmark"
	root   = "../.."
)

func TestModule(t *testing.T) {
	tree, err := archtest.Parse(root, module)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range tree.Check() {
		t.Error(v)
	}
}

// The client is downloaded in every CI job.
func TestClientLinksNoStorage(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "./cmd/hallmark")
	cmd.Dir = root
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("listing what the client links: %v\n%s", err, stderr.String())
	}
	deps := strings.Fields(string(out))
	if len(deps) < 100 {
		t.Fatalf("go list names only %d packages: this test would not see a forbidden one", len(deps))
	}
	for _, d := range archtest.ClientLinks(deps) {
		t.Errorf("cmd/hallmark links %s", d)
	}
}

func TestClientLinks(t *testing.T) {
	got := archtest.ClientLinks([]string{
		"crypto", "database/sql", "database/sql/driver", "modernc.org/sqlite/lib", "modernc.org/libc",
		"github.com/transparency-dev/tessera", "github.com/transparency-dev/merkle", "github.com/aws/aws-sdk-go-v2/aws",
		"github.com/awsome/x", "cloud.google.com/go/kms", "github.com/Azure/azure-sdk-for-go",
	})
	want := []string{
		"database/sql", "modernc.org/sqlite/lib", "github.com/transparency-dev/tessera",
		"github.com/aws/aws-sdk-go-v2/aws", "cloud.google.com/go/kms", "github.com/Azure/azure-sdk-for-go",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// Each row is a small module; want is "" for a tree that keeps every rule, else
// "file:line: rule" of the one violation.
func TestCheck(t *testing.T) {
	long := "package gate\n" + strings.Repeat("// A line.\n", 801)
	for _, row := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"clean", map[string]string{
			"attest/a.go": "package attest\n\nimport \"os\"\n\ntype Reason string\n\nconst A Reason = \"A_B\"\n\nvar Open = os.Open\n",
			"gate/g.go":   "package gate\n\nimport _ \"m/ledger\"\n",
			"ledger/l.go": "package ledger\n\nimport _ \"m/attest\"\n",
		}, ""},
		{"attest imports ours", one("attest/a.go", `import _ "m/policy"`), "attest/a.go:3: imports"},
		{"ledger imports signer", one("ledger/l.go", `import _ "m/signer"`), "ledger/l.go:3: imports"},
		{"policy imports ledger", one("policy/p.go", `import _ "m/ledger"`), "policy/p.go:3: imports"},
		{"gate imports server", one("gate/g.go", `import _ "m/server"`), "gate/g.go:3: imports"},
		{"gate imports proto", one("gate/g.go", `import _ "m/proto/hallmark/v1"`), "gate/g.go:3: imports"},
		{"server imports proto", one("server/s.go", `import _ "m/proto/hallmark/v1"`), ""},
		{"hallmarkd imports proto", one("cmd/hallmarkd/m.go", `import _ "m/proto/hallmark/v1"`), "cmd/hallmarkd/m.go:3: imports"},
		{"hallmark imports proto", one("cmd/hallmark/m.go", `import _ "m/proto/hallmark/v1"`), ""},
		{"hallmark imports ledger", one("cmd/hallmark/m.go", `import _ "m/ledger"`), "cmd/hallmark/m.go:3: imports"},
		{"sub-package has its parent's rules", one("ledger/sub/l.go", `import _ "m/signer"`), "ledger/sub/l.go:3: imports"},
		{"sub-package of its own", one("ledger/l.go", `import _ "m/ledger/sub"`), ""},
		{"layer of a similar name", one("ledger/l.go", `import _ "m/attestation"`), "ledger/l.go:3: imports"},
		{"new package", one("helpers/h.go", ``), "helpers/h.go:1: imports"},
		{"test kit in the product", one("server/s.go", `import _ "m/internal/testkit"`), "server/s.go:3: imports"},
		{"test kit in the benchmark", one("internal/bench/b.go", `import _ "m/internal/testkit"`), "internal/bench/b.go:3: imports"},
		{"test kit in a test", one("server/s_test.go", `import _ "m/internal/testkit"`), ""},
		{"test kit imports all", one("internal/testkit/k.go", `import _ "m/server"`), ""},

		{"os.Exit", one("gate/g.go", "import \"os\"\n\nfunc F() { os.Exit(1) }"), "gate/g.go:5: process"},
		{"os.Exit in main", one("cmd/hallmark/m.go", "import \"os\"\n\nfunc F() { os.Exit(1) }"), ""},
		{"os.Exit in a test", one("gate/g_test.go", "import \"os\"\n\nfunc F() { os.Exit(1) }"), ""},
		{"log.Fatalf", one("gate/g.go", "import \"log\"\n\nfunc F() { log.Fatalf(\"x\") }"), "gate/g.go:5: process"},
		{"environment under another name", one("gate/g.go", "import sys \"os\"\n\nvar F = sys.Getenv"), "gate/g.go:5: process"},
		{"dot import", one("gate/g.go", "import . \"os\"\n\nvar F = Getenv"), "gate/g.go:3: process"},
		{"signal.Notify", one("server/s.go", "import \"os/signal\"\n\nvar F = signal.Notify"), "server/s.go:5: process"},
		{"a field called os", one("gate/g.go", "func F(os struct{ Exit func() }) { os.Exit() }"), ""},
		{"init", one("gate/g.go", "func init() {}"), "gate/g.go:3: init"},
		{"method init", one("gate/g.go", "type T struct{}\n\nfunc (T) init() {}"), ""},

		{"t.Skip", one("gate/g_test.go", "import \"testing\"\n\nfunc TestF(t *testing.T) { t.Skip() }"), "gate/g_test.go:5: skip"},
		{"skip in a helper", one("gate/g_test.go", "import \"testing\"\n\nfunc f(x testing.TB) { x.Skipf(\"\") }"), "gate/g_test.go:5: skip"},
		{"skip in a subtest", one("gate/g_test.go", "import \"testing\"\n\nvar f = func(sub *testing.T) { sub.SkipNow() }"), "gate/g_test.go:5: skip"},
		{"short", one("gate/g_test.go", "import \"testing\"\n\nvar f = testing.Short"), "gate/g_test.go:5: skip"},
		{"another Skip", one("gate/g_test.go", "func f(r interface{ Skip() }) { r.Skip() }"), ""},

		{"unfinished", one("gate/g.go", "// TO"+"DO: all of it"), "gate/g.go:3: unfinished"},
		{"unfinished test", one("gate/g_test.go", "// FIX"+"ME"), "gate/g_test.go:3: unfinished"},
		{"unfinished context", one("gate/g.go", "import \"context\"\n\nvar F = context.TO"+"DO"), "gate/g.go:5: unfinished"},
		{"a longer word", one("gate/g.go", "// AUTO"+"DO, to"+"do"), ""},
		{"long file", map[string]string{"gate/g.go": long}, "gate/g.go:802: length"},
		{"long test", map[string]string{"gate/g_test.go": long}, ""},
		{"long generated file", map[string]string{"gate/g.go": "// Code generated by x. DO NOT EDIT.\n\n" + long}, ""},

		{"reason in lower case", one("attest/a.go", "type Reason string\n\nconst A Reason = \"a_b\""), "attest/a.go:5: reason"},
		{"reason with two underscores", one("attest/a.go", "type Reason string\n\nconst A Reason = \"A__B\""), "attest/a.go:5: reason"},
		{"reason twice", one("attest/a.go", "type Reason string\n\nconst (\n\tA Reason = \"A\"\n\tB Reason = \"A\"\n)"), "attest/a.go:7: reason"},
		{"ignored folders", map[string]string{"gate/testdata/g.go": "not go", ".x/g.go": "not go", "_x/g.go": "not go"}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			var got []string
			for _, v := range parse(t, row.files).Check() {
				got = append(got, v.At+": "+v.Rule)
			}
			if got := strings.Join(got, "\n"); got != row.want {
				t.Errorf("got %q, want %q", got, row.want)
			}
		})
	}
}

func TestParseRefusesBrokenSource(t *testing.T) {
	if _, err := archtest.Parse(write(t, map[string]string{"gate/g.go": "package"}), "m"); err == nil {
		t.Error("a file that does not parse was passed over")
	}
}

func TestNamed(t *testing.T) {
	tree := parse(t, map[string]string{
		"identity/i_test.go": "package identity_test\n\n" +
			"var rows = []string{\"A01 alg none\", `(A02) key confusion`, \"CA05\", \"A061\"}\n\n// A07 is only a comment.\n\n" +
			"func TestA03(t int) {}\n\nfunc TestLogin_A04() {}\n",
		"identity/i.go": "package identity\n\nvar x = \"A08 no test\"\n",
	})
	got := tree.Named([]string{"A01", "A02", "A03", "A04", "A05", "A06", "A07", "A08"})
	if d := cmp.Diff([]string{"A05", "A06", "A07", "A08"}, got); d != "" {
		t.Error(d)
	}
}

// one is a tree of one file, whose body stands on line 3.
func one(name, body string) map[string]string {
	return map[string]string{name: "package x\n\n" + body + "\n"}
}

func parse(t *testing.T, files map[string]string) *archtest.Tree {
	t.Helper()
	tree, err := archtest.Parse(write(t, files), "m")
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		full := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
