package archtest

import (
	"slices"
	"strconv"
	"strings"
)

// The layers of the module (docs/design.md): which of our packages each may
// import. A folder that is not named here may import only what its nearest named
// parent may; a folder below no named one is an error, so that a new package is
// a decision.
var layers = map[string][]string{
	"attest":   {},
	"signer":   {"attest"},
	"verifier": {"attest"},
	"registry": {"attest"},
	"identity": {"attest"},
	"ledger":   {"attest"},
	"policy":   {"attest", "verifier"},
	"gate":     {"attest", "signer", "verifier", "registry", "identity", "ledger", "policy"},
	"server":   {"attest", "signer", "verifier", "registry", "identity", "ledger", "policy", "gate", "web", protoDir},
	"web":      {"attest", "signer", "verifier", "registry", "identity", "ledger", "policy", "gate", protoDir},
	protoDir:   {},

	// The client asks the server and checks the answer by itself. What it must
	// not link, also through others, is in forbiddenInClient.
	"cmd/hallmark":  {"attest", "verifier", "registry", "policy", protoDir, "internal"},
	"cmd/hallmarkd": {"attest", "signer", "verifier", "registry", "identity", "ledger", "policy", "gate", "server", "web", "internal"},

	// Programs that drive the product from outside, as its users do.
	"internal/demo":  {"attest", "verifier", "registry", "internal"},
	"internal/bench": {"attest", "signer", "verifier", "registry", "identity", "ledger", "policy", "gate", "server", protoDir, "internal"},
	// Only tests import it, so it may import everything.
	testkit:    {"attest", "signer", "verifier", "registry", "identity", "ledger", "policy", "gate", "server", "web", protoDir, "internal"},
	"internal": {"attest", "internal"},
}

const (
	protoDir = "proto/hallmark/v1"
	testkit  = "internal/testkit"
)

// imports checks a file that is no test against the layers.
func (t *Tree) imports(f file) []Violation {
	layer, ok := nearest(f.dir)
	if !ok {
		return []Violation{{"imports", f.name + ":1", "package " + f.dir + " stands in no layer: add it to internal/archtest/imports.go"}}
	}
	var out []Violation
	for _, spec := range f.ast.Imports {
		target, ours := t.own(spec.Path.Value)
		if !ours || within(target, layer) && layer != "internal" {
			continue
		}
		if why := refused(layer, target); why != "" {
			out = append(out, Violation{"imports", t.at(spec), f.dir + " imports " + target + ": " + why})
		}
	}
	return out
}

// own returns the folder of a quoted import path of this module.
func (t *Tree) own(quoted string) (string, bool) {
	p, err := strconv.Unquote(quoted)
	if err != nil {
		return "", false
	}
	if p == t.Module {
		return ".", true
	}
	return strings.CutPrefix(p, t.Module+"/")
}

// refused says why a package of layer may not import target, or "".
func refused(layer, target string) string {
	if within(target, testkit) {
		return "only tests import the test kit"
	}
	if slices.ContainsFunc(layers[layer], func(allowed string) bool { return within(target, allowed) }) {
		return ""
	}
	if within(target, protoDir) {
		return "only server, web and the client speak the wire format"
	}
	return "not below it; allowed are " + strings.Join(layers[layer], ", ")
}

// nearest returns dir itself or its nearest parent that is a layer.
func nearest(dir string) (string, bool) {
	for {
		if _, ok := layers[dir]; ok {
			return dir, true
		}
		i := strings.LastIndexByte(dir, '/')
		if i < 0 {
			return "", false
		}
		dir = dir[:i]
	}
}

// within reports whether dir is parent or a folder below it.
func within(dir, parent string) bool {
	return dir == parent || strings.HasPrefix(dir, parent+"/")
}

// forbiddenInClient are modules that the client must not link: it is downloaded
// in every CI job, and a storage engine or a cloud SDK has no use there.
var forbiddenInClient = []string{
	"modernc.org/sqlite", "github.com/jackc/pgx", "database/sql",
	"github.com/transparency-dev/tessera",
	"cloud.google.com/go", "google.golang.org/api", "gocloud.dev",
	"github.com/aws", "github.com/Azure",
	// Verifies under foreign roots, with most of cosign: the server's business.
	"github.com/hallmarkd/hallmark/verifier/foreign",
}

// ClientLinks returns those of deps, the packages that the client links, that it
// must not link.
func ClientLinks(deps []string) []string {
	var out []string
	for _, d := range deps {
		if slices.ContainsFunc(forbiddenInClient, func(m string) bool { return belongs(d, m) }) {
			out = append(out, d)
		}
	}
	return out
}

// belongs reports whether a package is m or of module m. Packages of the standard
// library stand alone: database/sql/driver is a handful of interfaces that UUIDs
// and dates implement, and brings no engine.
func belongs(pkg, m string) bool {
	return pkg == m || strings.Contains(m, ".") && within(pkg, m)
}
