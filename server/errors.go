package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"strconv"
	"strings"
	"time"
	"unicode"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hallmarkd/hallmark/attest"
)

// domain is that of every ErrorInfo (AIP-193).
const domain = "hallmark"

// codeOf is the one place where a reason becomes a code. A test compares it with
// the list of reasons in package attest. What a policy finds against a digest is
// an answer, not an error; where such a reason does end a call, for example when
// signing, it is a failed precondition.
var codeOf = map[attest.Reason]codes.Code{
	attest.BadRequest:         codes.InvalidArgument,
	attest.BadDigest:          codes.InvalidArgument,
	attest.BadReference:       codes.InvalidArgument,
	attest.TagRefused:         codes.InvalidArgument,
	attest.BadJSON:            codes.InvalidArgument,
	attest.BadConfig:          codes.InvalidArgument,
	attest.BadPolicy:          codes.InvalidArgument,
	attest.ReservedPredicate:  codes.InvalidArgument,
	attest.TooLarge:           codes.ResourceExhausted,
	attest.TooManyLevels:      codes.InvalidArgument,
	attest.CallerFactsRefused: codes.InvalidArgument,
	attest.PredicateInvalid:   codes.InvalidArgument,

	attest.TokenMissing:     codes.Unauthenticated,
	attest.TokenMalformed:   codes.Unauthenticated,
	attest.TokenAlgorithm:   codes.Unauthenticated,
	attest.TokenHeader:      codes.Unauthenticated,
	attest.TokenKeyUnknown:  codes.Unauthenticated,
	attest.TokenSignature:   codes.Unauthenticated,
	attest.TokenExpired:     codes.Unauthenticated,
	attest.TokenNotYetValid: codes.Unauthenticated,
	attest.TokenLifetime:    codes.Unauthenticated,
	attest.TokenAudience:    codes.Unauthenticated,
	attest.TokenClaims:      codes.Unauthenticated,
	attest.IssuerNotAllowed: codes.Unauthenticated,
	attest.OwnerNotAllowed:  codes.Unauthenticated,
	attest.KeysUnavailable:  codes.Unavailable, // the token may be good: A08
	attest.TwoIdentities:    codes.Unauthenticated,
	attest.TokenRevoked:     codes.Unauthenticated,
	attest.ClientCert:       codes.Unauthenticated,

	attest.RoleMissing:      codes.PermissionDenied,
	attest.SourceNotAllowed: codes.PermissionDenied,
	attest.EventNotAllowed:  codes.PermissionDenied,
	attest.HostNotAllowed:   codes.PermissionDenied,
	attest.RedirectRefused:  codes.PermissionDenied,
	attest.RealmRefused:     codes.PermissionDenied,
	attest.PlainHTTP:        codes.InvalidArgument,
	attest.ForeignLayer:     codes.PermissionDenied,
	attest.RegistryDenied:   codes.FailedPrecondition, // the service may not, whoever asks

	attest.TokenSpent:       codes.FailedPrecondition,
	attest.TokenReplayed:    codes.FailedPrecondition,
	attest.NotInitialised:   codes.FailedPrecondition,
	attest.AlreadyExists:    codes.FailedPrecondition,
	attest.LedgerIncomplete: codes.FailedPrecondition,
	attest.LedgerLocked:     codes.FailedPrecondition,
	attest.LedgerBehind:     codes.FailedPrecondition,
	attest.KeyPermissions:   codes.FailedPrecondition,
	attest.ClockSkew:        codes.FailedPrecondition,
	attest.PolicyRollback:   codes.FailedPrecondition,
	attest.PolicyOutdated:   codes.FailedPrecondition,
	attest.IdentityChanged:  codes.FailedPrecondition,
	attest.StageMoved:       codes.Aborted,

	attest.SubjectNotFound: codes.NotFound,
	attest.RecordNotFound:  codes.NotFound,
	attest.StageUnknown:    codes.NotFound,
	attest.TrackUnknown:    codes.NotFound,
	attest.NothingToImport: codes.NotFound,

	attest.RegistryUnavailable: codes.Unavailable,
	attest.LedgerUnavailable:   codes.Unavailable,
	attest.ShuttingDown:        codes.Unavailable,
	attest.RateLimited:         codes.ResourceExhausted,
	attest.Internal:            codes.Internal,
	attest.DeadlineExceeded:    codes.DeadlineExceeded,
	attest.Cancelled:           codes.Canceled,
	attest.MethodUnknown:       codes.Unimplemented,

	attest.DigestMismatch:     codes.FailedPrecondition,
	attest.ManifestAmbiguous:  codes.FailedPrecondition,
	attest.BaseContradicted:   codes.FailedPrecondition,
	attest.BaseNotAllowed:     codes.FailedPrecondition,
	attest.BaseUnproven:       codes.FailedPrecondition,
	attest.BundleMalformed:    codes.FailedPrecondition,
	attest.BundleVersion:      codes.FailedPrecondition,
	attest.SignatureInvalid:   codes.FailedPrecondition,
	attest.SignatureCount:     codes.FailedPrecondition,
	attest.CertificateInvalid: codes.FailedPrecondition,
	attest.TimestampInvalid:   codes.FailedPrecondition,
	attest.LogEntryMismatch:   codes.FailedPrecondition,
	attest.LogProofInvalid:    codes.FailedPrecondition,
	attest.CheckpointInvalid:  codes.FailedPrecondition,
	attest.PayloadType:        codes.FailedPrecondition,
	attest.PredicateType:      codes.FailedPrecondition,
	attest.StatementMalformed: codes.FailedPrecondition,
	attest.SubjectMissing:     codes.FailedPrecondition,
	attest.SubjectMismatch:    codes.FailedPrecondition,
	attest.NotSigned:          codes.FailedPrecondition,
	attest.NoProvenance:       codes.FailedPrecondition,
	attest.ProvenanceConflict: codes.FailedPrecondition,
	attest.SourceMismatch:     codes.FailedPrecondition,
	attest.LevelTooLow:        codes.FailedPrecondition,
	attest.RootMismatch:       codes.FailedPrecondition,
	attest.GradeTooLow:        codes.FailedPrecondition,
	attest.SignerMismatch:     codes.FailedPrecondition,
	attest.StageSkipped:       codes.FailedPrecondition,
	attest.NotPromoted:        codes.FailedPrecondition,
	attest.Superseded:         codes.FailedPrecondition,
	attest.RuleFailed:         codes.FailedPrecondition,
	attest.RuleError:          codes.FailedPrecondition,
	attest.EffectFailed:       codes.FailedPrecondition,
}

// CodeOf returns the gRPC code of a reason; Internal for one it does not know.
func CodeOf(r attest.Reason) codes.Code {
	if c, ok := codeOf[r]; ok {
		return c
	}
	return codes.Internal
}

// refusal is what may be told to a caller about an error.
type refusal struct {
	Reason   attest.Reason
	Message  string
	Metadata map[string]string
	// ID is set when the cause is kept from the caller: it stands in the message
	// and in the service's log.
	ID string
}

// refuse decides what a caller learns of err. Only an *attest.Error speaks to
// callers, and only its own message: what wraps it or lies beneath it may name
// files and hosts (attacks I10).
func refuse(err error) refusal {
	var e *attest.Error
	switch ok := errors.As(err, &e); {
	case ok && CodeOf(e.Reason) != codes.Internal:
		r := refusal{Reason: e.Reason, Message: printable(e.Message), Metadata: map[string]string{}}
		for k, v := range e.Metadata {
			r.Metadata[printable(k)] = printable(v)
		}
		return r
	case !ok && errors.Is(err, context.DeadlineExceeded):
		return refusal{Reason: attest.DeadlineExceeded, Message: "the call took longer than it may; repeating it is safe"}
	case !ok && errors.Is(err, context.Canceled):
		return refusal{Reason: attest.Cancelled, Message: "the caller went away"}
	case !ok && status.Code(err) == codes.Unimplemented:
		return refusal{Reason: attest.MethodUnknown, Message: printable(status.Convert(err).Message())}
	case !ok && status.Code(err) == codes.Canceled: // of a stream
		return refusal{Reason: attest.Cancelled, Message: "the caller went away"}
	}
	id := incident()
	return refusal{Reason: attest.Internal, ID: id, Message: "internal error; the service's log has the cause under incident " + id}
}

func incident() string {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// retryAfter is how long a caller should wait before repeating a call that was
// refused for want of capacity or of a dependency.
const retryAfter = time.Second

// status returns the gRPC status with its details, each type once (AIP-193).
func (r refusal) status() *status.Status {
	code := CodeOf(r.Reason)
	details := []protoadapt.MessageV1{
		protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: string(r.Reason), Domain: domain, Metadata: r.Metadata}),
	}
	if code == codes.Unavailable || r.Reason == attest.RateLimited {
		details = append(details, protoadapt.MessageV1Of(&errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)}))
	}
	st, err := status.New(code, r.Message).WithDetails(details...)
	if err != nil {
		return status.New(code, r.Message) // only for code OK, which no reason has
	}
	return st
}

// printable escapes what could move a terminal's cursor or forge a line of a
// log: control and formatting characters and invalid UTF-8 (attacks J04).
func printable(s string) string {
	bad := func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
	if !strings.ContainsFunc(s, bad) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if bad(r) {
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}
