package archtest

import (
	"go/ast"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Only a main decides when the process ends, what it reads from its environment
// and which signals it catches; a package that does so cannot be embedded or
// tested. By import path, the functions that are for mains.
var processCalls = map[string][]string{
	"os":        {"Exit", "Getenv", "LookupEnv", "Environ", "ExpandEnv", "Setenv", "Unsetenv"},
	"log":       {"Fatal", "Fatalf", "Fatalln", "Panic", "Panicf", "Panicln"},
	"os/signal": {"Notify", "NotifyContext", "Ignore"},
}

// mains are the folders whose programs may do so.
var mains = []string{"cmd", "internal/demo", "internal/bench"}

// process finds uses of processCalls outside the mains: calls, and functions
// passed on as values.
func (t *Tree) process(f file) []Violation {
	if slices.ContainsFunc(mains, func(m string) bool { return within(f.dir, m) }) {
		return nil
	}
	var out []Violation
	names := map[string]string{} // local package name -> import path
	for _, spec := range f.ast.Imports {
		p, _ := strconv.Unquote(spec.Path.Value)
		if processCalls[p] == nil {
			continue
		}
		switch {
		case spec.Name == nil:
			names[path.Base(p)] = p
		case spec.Name.Name == ".":
			out = append(out, Violation{"process", t.at(spec), "a dot import hides which functions of " + p + " are used"})
		default:
			names[spec.Name.Name] = p
		}
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		x, ok := sel.X.(*ast.Ident)
		if ok && slices.Contains(processCalls[names[x.Name]], sel.Sel.Name) {
			out = append(out, Violation{"process", t.at(sel), names[x.Name] + "." + sel.Sel.Name + " belongs in a main: pass the value in"})
		}
		return true
	})
	return out
}

// skips finds tests that can pass without having run.
func (t *Tree) skips(f file) []Violation {
	testers := testerNames(f.ast)
	var out []Violation
	ast.Inspect(f.ast, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		x, ok := sel.X.(*ast.Ident)
		switch {
		case !ok:
		case testers[x.Name] && slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name):
			out = append(out, Violation{"skip", t.at(sel), "a skipped test proves nothing: fail and say what is missing"})
		case x.Name == "testing" && sel.Sel.Name == "Short":
			out = append(out, Violation{"skip", t.at(sel), "there is one test run, not a short one"})
		}
		return true
	})
	return out
}

// testerNames returns the names of all parameters whose type is one of package
// testing: t, b, f, tb and whatever else a helper calls them.
func testerNames(f *ast.File) map[string]bool {
	names := map[string]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		fn, ok := n.(*ast.FuncType)
		if !ok {
			return true
		}
		for _, field := range fn.Params.List {
			if !isTester(field.Type) {
				continue
			}
			for _, id := range field.Names {
				names[id.Name] = true
			}
		}
		return true
	})
	return names
}

func isTester(e ast.Expr) bool {
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	sel, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := sel.X.(*ast.Ident)
	return ok && x.Name == "testing" && slices.Contains([]string{"T", "B", "F", "TB"}, sel.Sel.Name)
}

var upperSnake = regexp.MustCompile(`^[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*$`)

// reasons checks the constants of type Reason in package attest: programs branch
// on them (google.rpc.ErrorInfo, AIP-193), so each is UPPER_SNAKE_CASE and there
// once.
func (t *Tree) reasons() []Violation {
	var out []Violation
	seen := map[string]string{}
	for _, f := range t.files {
		if f.dir != "attest" || f.test {
			continue
		}
		for _, r := range reasonConstants(f.ast) {
			value, err := strconv.Unquote(r.Value)
			switch first := seen[value]; {
			case err != nil || !upperSnake.MatchString(value):
				out = append(out, Violation{"reason", t.at(r), r.Value + " is not UPPER_SNAKE_CASE"})
			case first != "":
				out = append(out, Violation{"reason", t.at(r), value + " is there already at " + first})
			default:
				seen[value] = t.at(r)
			}
		}
	}
	return out
}

// reasonConstants returns the values of constants that are declared of type Reason.
func reasonConstants(f *ast.File) []*ast.BasicLit {
	var out []*ast.BasicLit
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if id, ok := spec.Type.(*ast.Ident); !ok || id.Name != "Reason" {
			return true
		}
		for _, v := range spec.Values {
			if lit, ok := v.(*ast.BasicLit); ok {
				out = append(out, lit)
			}
		}
		return true
	})
	return out
}

// Named returns which of the wanted attack rows no test names in a string or in
// the name of a function. A comment does not count: it runs nothing.
func (t *Tree) Named(rows []string) (missing []string) {
	var names strings.Builder
	for _, f := range t.files {
		if !f.test || within(f.dir, "internal/archtest") {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BasicLit:
				names.WriteString(n.Value + "\n")
			case *ast.FuncDecl:
				names.WriteString(n.Name.Name + "\n")
			}
			return true
		})
	}
	for _, row := range rows {
		// "A01" stands alone in a name: "A01 alg none", "TestA01", "TestLogin_A01".
		if !regexp.MustCompile(`(?:^|[^A-Z0-9])` + row + `(?:[^0-9]|$)`).MatchString(names.String()) {
			missing = append(missing, row)
		}
	}
	return missing
}
