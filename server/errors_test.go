package server_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"testing"
	"unicode"

	"google.golang.org/grpc/codes"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/server"
)

// Every reason of package attest has a code of its own choosing: one that was
// forgotten would be an internal error to callers.
func TestEveryReasonHasACode(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../attest/errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Reason" {
			return true
		}
		text, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		found++
		r := attest.Reason(text)
		if got := server.CodeOf(r); (got == codes.Internal) != (r == attest.Internal) || got == codes.OK {
			t.Errorf("CodeOf(%s) = %v", r, got)
		}
		return true
	})
	if found < 80 {
		t.Errorf("found only %d reasons in attest/errors.go", found)
	}
}

func TestCodes(t *testing.T) {
	for r, want := range map[attest.Reason]codes.Code{
		attest.TagRefused: codes.InvalidArgument, attest.TokenExpired: codes.Unauthenticated,
		attest.RoleMissing: codes.PermissionDenied, attest.TokenSpent: codes.FailedPrecondition,
		attest.RecordNotFound: codes.NotFound, attest.RegistryUnavailable: codes.Unavailable,
		attest.RateLimited: codes.ResourceExhausted, attest.StageMoved: codes.Aborted,
		attest.KeysUnavailable: codes.Unavailable, "NO_SUCH_REASON": codes.Internal,
	} {
		if got := server.CodeOf(r); got != want {
			t.Errorf("CodeOf(%s) = %v, want %v", r, got, want)
		}
	}
}

// J04: whatever comes in, one printable line comes out, and printable text
// comes out as it was.
func FuzzPrintable(f *testing.F) {
	for _, s := range []string{"", "plain", "a\nb", "\x1b[2J", "\u202eabc", "\xff\xfe", "é 漢字", "\u200b\u2028"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out := server.Printable(s)
		for _, r := range out {
			if !unicode.IsPrint(r) {
				t.Errorf("J04 Printable(%q) has %U", s, r)
			}
		}
		if again := server.Printable(out); again != out {
			t.Errorf("Printable(%q) = %q, then %q", s, out, again)
		}
	})
}
