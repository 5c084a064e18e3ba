package main

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// Every reason that the vocabulary has must have an exit code on purpose.
func TestEveryReasonHasAnExitCode(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../../attest/errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		kind, named := spec.Type.(*ast.Ident)
		text, literal := spec.Values[0].(*ast.BasicLit)
		if !named || !literal || kind.Name != "Reason" {
			return true
		}
		reason, err := strconv.Unquote(text.Value)
		if err != nil {
			t.Fatal(err)
		}
		n++
		if _, ok := reasonExits[attest.Reason(reason)]; !ok {
			t.Errorf("reason %s has no exit code", reason)
		}
		return true
	})
	if n != len(reasonExits) || n < 80 {
		t.Errorf("read %d reasons, the table has %d", n, len(reasonExits))
	}
}

func rpcError(code codes.Code, reason attest.Reason, domain string) error {
	s := status.New(code, "message")
	if reason != "" {
		s, _ = s.WithDetails(&errdetails.ErrorInfo{Reason: string(reason), Domain: domain})
	}
	return fromRPC("https://hallmark.example.com", s.Err())
}

func TestExitCode(t *testing.T) {
	for _, row := range []struct {
		name string
		err  error
		want int
	}{
		{"yes", nil, 0},
		{"other", errors.New("disk full"), 1},
		{"usage", usagef("no"), 2},
		{"wrapped usage", fmt.Errorf("x: %w", usagef("no")), 2},
		{"local reason", attest.Errorf(attest.TagRefused, "x"), 2},
		{"local reason wrapped", fmt.Errorf("x: %w", attest.Errorf(attest.SignatureInvalid, "x")), 20},
		{"local reason unknown", attest.Errorf("SOMETHING_NEW", "x"), 1},
		{"not signed in", attest.Errorf(attest.TokenMissing, "x"), 3},
		{"timeout", timedOut{time.Second}, 5},
		{"answer", answer(23), 23},
		{"unauthenticated", rpcError(codes.Unauthenticated, attest.TokenExpired, "hallmark"), 3},
		{"permission", rpcError(codes.PermissionDenied, attest.RoleMissing, "hallmark"), 3},
		{"not there, as a precondition", rpcError(codes.FailedPrecondition, attest.SubjectNotFound, "hallmark"), 4},
		{"verdict, as a precondition", rpcError(codes.FailedPrecondition, attest.BaseContradicted, "hallmark"), 20},
		{"operator has to act", rpcError(codes.FailedPrecondition, attest.LedgerIncomplete, "hallmark"), 1},
		{"stage moved", rpcError(codes.Aborted, attest.StageMoved, "hallmark"), 22},
		{"rate limit", rpcError(codes.ResourceExhausted, attest.RateLimited, "hallmark"), 5},
		{"too large", rpcError(codes.ResourceExhausted, attest.TooLarge, "hallmark"), 2},
		{"reason of a newer server", rpcError(codes.NotFound, "SOMETHING_NEW", "hallmark"), 4},
		{"reason of another domain", rpcError(codes.Internal, attest.TagRefused, "elsewhere"), 1},
		{"code only: unavailable", rpcError(codes.Unavailable, "", ""), 5},
		{"code only: deadline", rpcError(codes.DeadlineExceeded, "", ""), 5},
		{"code only: invalid", rpcError(codes.InvalidArgument, "", ""), 2},
		{"code only: unimplemented", rpcError(codes.Unimplemented, "", ""), 1},
		{"code only: data loss", rpcError(codes.DataLoss, "", ""), 1},
		{"guide", &guideError{attest.Errorf(attest.TokenMissing, "x"), []string{"do this"}}, 3},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := exitCode(row.err); got != row.want {
				t.Errorf("exit code of %v is %d, want %d", row.err, got, row.want)
			}
		})
	}
}

func TestDecisionExit(t *testing.T) {
	rule := func(name string, o attest.Outcome) *hallmarkv1.RuleResult {
		return &hallmarkv1.RuleResult{Rule: name, Outcome: string(o)}
	}
	for _, row := range []struct {
		name    string
		verdict string
		results []*hallmarkv1.RuleResult
		want    int
	}{
		{"allowed", verdictAllowed, []*hallmarkv1.RuleResult{rule("a", attest.OK)}, 0},
		{"aborted", verdictAborted, nil, 22},
		{"denied for no reason", verdictDenied, nil, 20},
		{"denied by a rule", verdictDenied, []*hallmarkv1.RuleResult{rule("signed_by", attest.Fail)}, 20},
		{"approvals", verdictDenied, []*hallmarkv1.RuleResult{rule("signed_by", attest.OK), rule("approvals", attest.Fail)}, 21},
		{"soak", verdictDenied, []*hallmarkv1.RuleResult{rule("soak", attest.Fail), rule("base_image", attest.Warn)}, 23},
		{"freeze", verdictDenied, []*hallmarkv1.RuleResult{rule("freeze", attest.Fail)}, 23},
		{"soak and approvals", verdictDenied, []*hallmarkv1.RuleResult{rule("soak", attest.Fail), rule("approvals", attest.Fail)}, 21},
		{"approvals and soak", verdictDenied, []*hallmarkv1.RuleResult{rule("approvals", attest.Fail), rule("soak", attest.Fail)}, 21},
		{"soak and another rule", verdictDenied, []*hallmarkv1.RuleResult{rule("soak", attest.Fail), rule("signed_by", attest.Fail)}, 20},
		{"K05 approvals could not be judged", verdictDenied, []*hallmarkv1.RuleResult{rule("approvals", attest.Errored)}, 20},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := decisionExit(&hallmarkv1.Decision{Verdict: row.verdict, Results: row.results}); got != row.want {
				t.Errorf("exit code %d, want %d", got, row.want)
			}
		})
	}
}

func TestWorse(t *testing.T) {
	for _, row := range []struct {
		name       string
		a, b, want int
	}{
		{"both good", 0, 0, 0},
		{"second refused", 0, 20, 20},
		{"first refused", 20, 0, 20},
		{"first stays", 20, 3, 20},
		{"unavailable gives way", 5, 20, 20},
		{"unavailable does not replace", 20, 5, 20},
		{"unavailable alone", 5, 0, 5},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := worse(row.a, row.b); got != row.want {
				t.Errorf("worse(%d, %d) = %d, want %d", row.a, row.b, got, row.want)
			}
		})
	}
}

// What ended the context is the reason, not what broke because of it.
func TestBecause(t *testing.T) {
	err := because(timedOut{time.Minute}, errors.New("rpc error"))
	if got := exitCode(err); got != exitUnavailable || err.Error() != "no answer within 1m0s (--timeout): repeating the command is safe" {
		t.Errorf("%v, exit %d", err, got)
	}
	if err := because(context.Canceled, errors.New("rpc error")); exitCode(err) != exitFailure {
		t.Errorf("an interrupted command exits with %d", exitCode(err))
	}
}
