package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// The exit codes (design section 7). Scripts rely on them.
const (
	exitOK           = 0
	exitFailure      = 1  // any other failure
	exitUsage        = 2  // wrong usage
	exitNotPermitted = 3  // not signed in or not permitted
	exitNotFound     = 4  //
	exitUnavailable  = 5  // repeating is safe
	exitDenied       = 20 // denied by policy
	exitApproval     = 21 // needs approval
	exitMoved        = 22 // the stage moved meanwhile
	exitNotYet       = 23 // soak, freeze
)

// reasonExits maps every reason to its exit code. A reason that a newer server
// invents goes by its gRPC code instead (codeExits).
var reasonExits = map[attest.Reason]int{
	attest.BadRequest: exitUsage, attest.BadDigest: exitUsage, attest.BadReference: exitUsage,
	attest.TagRefused: exitUsage, attest.BadJSON: exitUsage, attest.BadConfig: exitUsage,
	attest.BadPolicy: exitUsage, attest.ReservedPredicate: exitUsage, attest.TooLarge: exitUsage,
	attest.TooManyLevels: exitUsage, attest.CallerFactsRefused: exitUsage, attest.PlainHTTP: exitUsage,
	attest.PredicateInvalid: exitUsage,

	attest.TokenMissing: exitNotPermitted, attest.TokenMalformed: exitNotPermitted,
	attest.TokenAlgorithm: exitNotPermitted, attest.TokenHeader: exitNotPermitted,
	attest.TokenKeyUnknown: exitNotPermitted, attest.TokenSignature: exitNotPermitted,
	attest.TokenExpired: exitNotPermitted, attest.TokenNotYetValid: exitNotPermitted,
	attest.TokenLifetime: exitNotPermitted, attest.TokenAudience: exitNotPermitted,
	attest.TokenClaims: exitNotPermitted, attest.IssuerNotAllowed: exitNotPermitted,
	attest.OwnerNotAllowed: exitNotPermitted, attest.TwoIdentities: exitNotPermitted,
	attest.RoleMissing: exitNotPermitted, attest.SourceNotAllowed: exitNotPermitted,
	attest.EventNotAllowed: exitNotPermitted, attest.HostNotAllowed: exitNotPermitted,
	attest.RedirectRefused: exitNotPermitted, attest.RealmRefused: exitNotPermitted,
	attest.ForeignLayer: exitNotPermitted, attest.RegistryDenied: exitNotPermitted,
	attest.TokenSpent: exitNotPermitted, attest.TokenReplayed: exitNotPermitted, // another token is needed
	attest.TokenRevoked: exitNotPermitted, attest.ClientCert: exitNotPermitted,

	attest.SubjectNotFound: exitNotFound, attest.RecordNotFound: exitNotFound,
	attest.StageUnknown: exitNotFound, attest.TrackUnknown: exitNotFound,
	attest.NothingToImport: exitNotFound,

	attest.KeysUnavailable: exitUnavailable, attest.RegistryUnavailable: exitUnavailable,
	attest.LedgerUnavailable: exitUnavailable, attest.ShuttingDown: exitUnavailable,
	attest.RateLimited: exitUnavailable, attest.ClockSkew: exitUnavailable,
	attest.PolicyOutdated:   exitUnavailable, // a replica that will catch up
	attest.DeadlineExceeded: exitUnavailable,

	attest.StageMoved: exitMoved,

	// An operator must act before repeating helps.
	attest.NotInitialised: exitFailure, attest.AlreadyExists: exitFailure,
	attest.LedgerIncomplete: exitFailure, attest.LedgerLocked: exitFailure,
	attest.LedgerBehind: exitFailure, attest.KeyPermissions: exitFailure,
	attest.PolicyRollback: exitFailure, attest.IdentityChanged: exitFailure,
	attest.Internal: exitFailure, attest.EffectFailed: exitFailure,
	attest.Cancelled: exitFailure, attest.MethodUnknown: exitFailure,

	attest.DigestMismatch: exitDenied, attest.ManifestAmbiguous: exitDenied,
	attest.BaseContradicted: exitDenied, attest.BaseNotAllowed: exitDenied,
	attest.BaseUnproven: exitDenied, attest.BundleMalformed: exitDenied,
	attest.BundleVersion: exitDenied, attest.SignatureInvalid: exitDenied,
	attest.SignatureCount: exitDenied, attest.CertificateInvalid: exitDenied,
	attest.TimestampInvalid: exitDenied, attest.LogEntryMismatch: exitDenied,
	attest.LogProofInvalid: exitDenied, attest.CheckpointInvalid: exitDenied,
	attest.PayloadType: exitDenied, attest.PredicateType: exitDenied,
	attest.StatementMalformed: exitDenied, attest.SubjectMissing: exitDenied,
	attest.SubjectMismatch: exitDenied, attest.NotSigned: exitDenied,
	attest.NoProvenance: exitDenied, attest.ProvenanceConflict: exitDenied,
	attest.SourceMismatch: exitDenied, attest.LevelTooLow: exitDenied,
	attest.GradeTooLow: exitDenied, attest.SignerMismatch: exitDenied, attest.RootMismatch: exitDenied,
	attest.StageSkipped: exitDenied, attest.NotPromoted: exitDenied,
	attest.Superseded: exitDenied, attest.RuleFailed: exitDenied, attest.RuleError: exitDenied,
}

// codeExits maps the gRPC codes of errors whose reason is unknown. What is in
// neither table is exitFailure.
var codeExits = map[codes.Code]int{
	codes.InvalidArgument:   exitUsage,
	codes.OutOfRange:        exitUsage,
	codes.Unauthenticated:   exitNotPermitted,
	codes.PermissionDenied:  exitNotPermitted,
	codes.NotFound:          exitNotFound,
	codes.Unavailable:       exitUnavailable,
	codes.DeadlineExceeded:  exitUnavailable,
	codes.ResourceExhausted: exitUnavailable,
	codes.Aborted:           exitMoved,
}

// ruleExits are the rules that a denial can still outgrow: by a person's
// approval, or by waiting. A denial for any other rule too is exitDenied.
var ruleExits = map[string]int{"approvals": exitApproval, "soak": exitNotYet, "freeze": exitNotYet}

// decisionExit maps a decision that has passed checkDecision.
func decisionExit(d *hallmarkv1.Decision) int {
	switch d.GetVerdict() {
	case verdictAllowed:
		return exitOK
	case verdictAborted:
		return exitMoved
	}
	code := 0
	for _, r := range d.GetResults() {
		switch outcome := attest.Outcome(r.GetOutcome()); {
		case outcome == attest.Errored:
			return exitDenied
		case outcome != attest.Fail:
		case ruleExits[r.GetRule()] == 0:
			return exitDenied
		case code != exitApproval: // people are asked before anybody waits
			code = ruleExits[r.GetRule()]
		}
	}
	if code == 0 {
		return exitDenied
	}
	return code
}

// verdictError ends a command whose answer is a no. Its error, if any, is said
// on standard error as well as in the result.
type verdictError struct {
	code int
	error
}

func (e verdictError) Error() string {
	if e.error == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.error.Error()
}

func (e verdictError) Unwrap() error { return e.error }

// answer returns the error that makes a command exit with code, nil for 0.
func answer(code int) error {
	if code == exitOK {
		return nil
	}
	return verdictError{code: code}
}

// usageError is a mistake on the command line.
type usageError struct{ string }

func (e usageError) Error() string { return e.string }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// timedOut is the cause of a context that --timeout ended.
type timedOut struct{ after time.Duration }

func (e timedOut) Error() string {
	return fmt.Sprintf("no answer within %s (--timeout): repeating the command is safe", e.after)
}

// because puts the cause for which a context ended before what that broke.
func because(cause, err error) error {
	if errors.Is(err, cause) {
		return err
	}
	if errors.Is(cause, context.Canceled) {
		return errors.New("interrupted: repeating the command is safe")
	}
	return cause
}

// remoteError is an error that the server answered, or that kept its answer away.
type remoteError struct {
	code     codes.Code
	reason   attest.Reason // "" when the server named none
	message  string
	metadata map[string]string
}

func (e *remoteError) Error() string {
	if e.reason == "" {
		return e.message
	}
	return e.message + " [" + string(e.reason) + "]"
}

// fromRPC turns what a call returned into an error for people: the server's own
// sentence and reason, or that the server cannot be reached. Other errors pass.
func fromRPC(server string, err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	e := &remoteError{code: s.Code(), message: s.Message()}
	for _, d := range s.Details() {
		// A reason of somebody else's domain, such as a proxy's, is not ours.
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == "hallmark" {
			e.reason, e.metadata = attest.Reason(info.GetReason()), info.GetMetadata()
		}
	}
	switch {
	case e.reason != "":
	case e.code == codes.Unavailable:
		e.message = "cannot reach " + server + ": " + e.message
	case e.code == codes.Unimplemented:
		e.message = server + " does not know this call; is it an older Hallmark, or another service? " + e.message
	default:
		e.message = fmt.Sprintf("%s answered %s: %s", server, e.code, e.message)
	}
	return e
}

// exitCode is the one place where an error becomes an exit code.
func exitCode(err error) int {
	var verdict verdictError
	var usage usageError
	var late timedOut
	var remote *remoteError
	var local *attest.Error
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &verdict):
		return verdict.code
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &late):
		return exitUnavailable
	case errors.As(err, &remote):
		if code, ok := reasonExits[remote.reason]; ok {
			return code
		}
		if code, ok := codeExits[remote.code]; ok {
			return code
		}
	case errors.As(err, &local):
		return refusalExit(local.Reason)
	}
	return exitFailure
}

// refusalExit maps a reason that came without a gRPC code.
func refusalExit(r attest.Reason) int {
	if code, ok := reasonExits[r]; ok {
		return code
	}
	return exitFailure
}

// message renders err for people: what was wrong, its reason, and the server's
// further facts on lines of their own.
func message(err error) string {
	var guide *guideError
	var local *attest.Error
	var remote *remoteError
	switch {
	case errors.As(err, &guide):
		return message(guide.error) + "\n" + strings.Join(guide.lines, "\n")
	case errors.As(err, &remote):
		var b strings.Builder
		b.WriteString(plain(err.Error()))
		table := claimTable(remote.metadata)
		for _, line := range table {
			b.WriteString("\n" + line)
		}
		for _, k := range slices.Sorted(maps.Keys(remote.metadata)) {
			if table != nil && (k == "claims" || k == "wanted" || k == "got") {
				continue // the table says the same
			}
			b.WriteString("\n  " + plain(k) + ": " + plain(remote.metadata[k]))
		}
		return b.String()
	case errors.As(err, &local):
		// The reason stands behind, as in what the server answers.
		prefix := string(local.Reason) + ": "
		return plain(strings.Replace(err.Error(), prefix, "", 1)) + " [" + string(local.Reason) + "]"
	}
	return plain(err.Error())
}

// guideError adds lines that say what to do about an error. The lines are ours,
// never a server's: they are printed as they are.
type guideError struct {
	error
	lines []string
}

func (e *guideError) Unwrap() error { return e.error }
