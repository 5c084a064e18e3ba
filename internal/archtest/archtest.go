// Package archtest checks the rules of this module that no compiler and no
// linter knows: who may import whom, where a process may exit, what a test may
// not do. It reads the sources, so a rule holds for every platform and build tag
// at once; its tests run it on the module and on small trees that break each rule.
package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// Violation is one broken rule.
type Violation struct {
	Rule string // which one: "imports", "process", "skip", "unfinished", "length", "reason", "init"
	At   string // file:line, relative to the root of the tree
	What string // what was found and why it is wrong
}

func (v Violation) String() string { return v.At + ": " + v.Rule + ": " + v.What }

// Tree is the parsed Go sources of one module.
type Tree struct {
	Module string // its path, the prefix of its own imports
	fset   *token.FileSet
	files  []file
}

// file is one Go source.
type file struct {
	dir       string // slash-separated, relative to the root; "." for the root
	name      string // with dir
	text      []byte
	ast       *ast.File
	test      bool
	generated bool
}

// Parse reads every Go file of the module at root, those of all platforms. Like
// the go command it leaves out testdata and folders whose name starts with "."
// or "_". An error means that the tree could not be read or parsed.
func Parse(root, module string) (*Tree, error) {
	t := &Tree{Module: module, fset: token.NewFileSet()}
	err := fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && ignored(d.Name()):
			return fs.SkipDir
		case d.IsDir() || path.Ext(name) != ".go":
			return nil
		}
		return t.add(root, name)
	})
	if err != nil {
		return nil, fmt.Errorf("reading the sources below %s: %w", root, err)
	}
	return t, nil
}

func ignored(folder string) bool {
	return folder == "testdata" || folder == "vendor" || folder[0] == '.' || folder[0] == '_'
}

func (t *Tree) add(root, name string) error {
	text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
	if err != nil {
		return err
	}
	parsed, err := parser.ParseFile(t.fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	t.files = append(t.files, file{
		dir: path.Dir(name), name: name, text: text, ast: parsed,
		test: strings.HasSuffix(name, "_test.go"), generated: ast.IsGenerated(parsed),
	})
	return nil
}

// Check returns every violation of every rule, in the order of the files.
func (t *Tree) Check() []Violation {
	var out []Violation
	for _, f := range t.files {
		if f.generated {
			continue
		}
		out = append(out, t.unfinished(f)...)
		if f.test {
			out = append(out, t.skips(f)...)
			continue
		}
		out = append(out, t.imports(f)...)
		out = append(out, t.process(f)...)
		out = append(out, t.inits(f)...)
		out = append(out, t.length(f)...)
	}
	return append(out, t.reasons()...)
}

// inits finds init functions: importing a package must do nothing.
func (t *Tree) inits(f file) []Violation {
	var out []Violation
	for _, d := range f.ast.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
			out = append(out, Violation{"init", t.at(fn), "importing a package must do nothing"})
		}
	}
	return out
}

// maxLines is the length of a file that still reads as one concern.
const maxLines = 800

func (t *Tree) length(f file) []Violation {
	n := strings.Count(string(f.text), "\n")
	if n <= maxLines {
		return nil
	}
	return []Violation{{"length", f.name + ":" + strconv.Itoa(n), fmt.Sprintf("%d lines, at most %d: split it by concern", n, maxLines)}}
}

// marks are how unfinished work is usually marked. They are written in halves so
// that this file does not hold them itself.
var marks = []string{"TO" + "DO", "FIX" + "ME"}

func (t *Tree) unfinished(f file) []Violation {
	var out []Violation
	for i, line := range strings.Split(string(f.text), "\n") {
		for _, m := range marks {
			if containsWord(line, m) {
				out = append(out, Violation{"unfinished", f.name + ":" + strconv.Itoa(i+1), m + " marks work that is not done"})
			}
		}
	}
	return out
}

// containsWord reports whether w stands in s with no letter, digit or underscore
// on either side.
func containsWord(s, w string) bool {
	for from := 0; ; {
		i := strings.Index(s[from:], w)
		if i < 0 {
			return false
		}
		start, end := from+i, from+i+len(w)
		if (start == 0 || !wordByte(s[start-1])) && (end == len(s) || !wordByte(s[end])) {
			return true
		}
		from = end
	}
}

func wordByte(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// at returns file:line of a node.
func (t *Tree) at(n ast.Node) string {
	p := t.fset.Position(n.Pos())
	return p.Filename + ":" + strconv.Itoa(p.Line)
}
