package attest

import (
	"errors"
	"fmt"
)

// Reason is a stable code that says why something was refused. Callers branch
// on it; its spelling never changes (google.rpc.ErrorInfo, AIP-193).
type Reason string

// The reasons, by the kind of answer they become at the edge.
const (
	// The request is malformed.
	BadRequest         Reason = "BAD_REQUEST"
	BadDigest          Reason = "BAD_DIGEST"
	BadReference       Reason = "BAD_REFERENCE"
	TagRefused         Reason = "TAG_REFUSED"
	BadJSON            Reason = "BAD_JSON"
	BadConfig          Reason = "BAD_CONFIG"
	BadPolicy          Reason = "BAD_POLICY"
	ReservedPredicate  Reason = "RESERVED_PREDICATE"
	TooLarge           Reason = "TOO_LARGE"
	TooManyLevels      Reason = "TOO_MANY_LEVELS"
	CallerFactsRefused Reason = "CALLER_FACTS_REFUSED"
	PredicateInvalid   Reason = "PREDICATE_INVALID" // not what its type's schema demands

	// The caller is not known.
	TokenMissing     Reason = "TOKEN_MISSING"
	TokenMalformed   Reason = "TOKEN_MALFORMED"
	TokenAlgorithm   Reason = "TOKEN_ALGORITHM"
	TokenHeader      Reason = "TOKEN_HEADER"
	TokenKeyUnknown  Reason = "TOKEN_KEY_UNKNOWN"
	TokenSignature   Reason = "TOKEN_SIGNATURE"
	TokenExpired     Reason = "TOKEN_EXPIRED"
	TokenNotYetValid Reason = "TOKEN_NOT_YET_VALID"
	TokenLifetime    Reason = "TOKEN_LIFETIME"
	TokenAudience    Reason = "TOKEN_AUDIENCE_MISMATCH"
	TokenClaims      Reason = "TOKEN_CLAIMS"
	IssuerNotAllowed Reason = "ISSUER_NOT_ALLOWED"
	OwnerNotAllowed  Reason = "OWNER_NOT_ALLOWED"
	KeysUnavailable  Reason = "ISSUER_KEYS_UNAVAILABLE"
	TwoIdentities    Reason = "TWO_IDENTITIES"
	TokenRevoked     Reason = "TOKEN_REVOKED"              // its issuer says that it no longer counts
	ClientCert       Reason = "CLIENT_CERTIFICATE_INVALID" // of a mutual TLS connection

	// The caller is known and may not.
	RoleMissing      Reason = "ROLE_MISSING"
	SourceNotAllowed Reason = "SOURCE_NOT_ALLOWED"
	EventNotAllowed  Reason = "EVENT_NOT_ALLOWED"
	HostNotAllowed   Reason = "REGISTRY_NOT_ALLOWED"
	RedirectRefused  Reason = "REDIRECT_REFUSED"
	RealmRefused     Reason = "TOKEN_REALM_REFUSED"
	PlainHTTP        Reason = "PLAIN_HTTP_REFUSED"
	ForeignLayer     Reason = "FOREIGN_LAYER"
	RegistryDenied   Reason = "REGISTRY_DENIED" // the registry refuses the service's own credentials or request

	// The state of things does not allow it.
	TokenSpent       Reason = "TOKEN_SPENT"
	TokenReplayed    Reason = "TOKEN_REPLAYED" // used again, where its issuer allows one request
	NotInitialised   Reason = "NOT_INITIALISED"
	AlreadyExists    Reason = "ALREADY_INITIALISED"
	LedgerIncomplete Reason = "LEDGER_INCOMPLETE"
	LedgerLocked     Reason = "LEDGER_LOCKED"
	LedgerBehind     Reason = "LEDGER_BEHIND_INDEX"
	KeyPermissions   Reason = "KEY_PERMISSIONS"
	ClockSkew        Reason = "CLOCK_SKEW"
	PolicyRollback   Reason = "POLICY_ROLLBACK"
	PolicyOutdated   Reason = "POLICY_OUTDATED"
	IdentityChanged  Reason = "SERVICE_IDENTITY_CHANGED"
	StageMoved       Reason = "STAGE_MOVED"

	// Something is not there.
	SubjectNotFound Reason = "SUBJECT_NOT_FOUND"
	RecordNotFound  Reason = "RECORD_NOT_FOUND"
	StageUnknown    Reason = "STAGE_UNKNOWN"
	TrackUnknown    Reason = "TRACK_UNKNOWN"
	NothingToImport Reason = "NOTHING_TO_IMPORT"

	// Trying again later is safe.
	RegistryUnavailable Reason = "REGISTRY_UNAVAILABLE"
	LedgerUnavailable   Reason = "LEDGER_UNAVAILABLE"
	ShuttingDown        Reason = "SHUTTING_DOWN"
	RateLimited         Reason = "RATE_LIMITED"
	Internal            Reason = "INTERNAL"

	// The call itself came to an end, or was none.
	DeadlineExceeded Reason = "DEADLINE_EXCEEDED"
	Cancelled        Reason = "CANCELLED"
	MethodUnknown    Reason = "METHOD_UNKNOWN"

	// A verdict on evidence: denied. The policy's own rules answer with these
	// as well, so that a denial has one vocabulary wherever it was found.
	DigestMismatch     Reason = "DIGEST_MISMATCH"
	ManifestAmbiguous  Reason = "MANIFEST_AMBIGUOUS"
	BaseContradicted   Reason = "BASE_CONTRADICTED"
	BaseNotAllowed     Reason = "BASE_NOT_ALLOWED"
	BaseUnproven       Reason = "BASE_UNPROVEN"
	BundleMalformed    Reason = "BUNDLE_MALFORMED"
	BundleVersion      Reason = "BUNDLE_VERSION"
	SignatureInvalid   Reason = "SIGNATURE_INVALID"
	SignatureCount     Reason = "SIGNATURE_COUNT"
	CertificateInvalid Reason = "CERTIFICATE_INVALID"
	TimestampInvalid   Reason = "TIMESTAMP_INVALID"
	LogEntryMismatch   Reason = "LOG_ENTRY_MISMATCH"
	LogProofInvalid    Reason = "LOG_PROOF_INVALID"
	CheckpointInvalid  Reason = "CHECKPOINT_INVALID"
	PayloadType        Reason = "PAYLOAD_TYPE"
	PredicateType      Reason = "PREDICATE_TYPE"
	StatementMalformed Reason = "STATEMENT_MALFORMED"
	SubjectMissing     Reason = "SUBJECT_MISSING"
	SubjectMismatch    Reason = "SUBJECT_MISMATCH"
	NotSigned          Reason = "NOT_SIGNED"
	NoProvenance       Reason = "NO_PROVENANCE"
	ProvenanceConflict Reason = "PROVENANCE_CONFLICT"
	SourceMismatch     Reason = "SOURCE_MISMATCH"
	LevelTooLow        Reason = "LEVEL_TOO_LOW"
	GradeTooLow        Reason = "GRADE_TOO_LOW"
	SignerMismatch     Reason = "SIGNER_MISMATCH"
	RootMismatch       Reason = "FOREIGN_ROOT_MISMATCH" // no configured foreign root vouches for it
	StageSkipped       Reason = "STAGE_SKIPPED"
	NotPromoted        Reason = "NOT_PROMOTED"
	Superseded         Reason = "SUPERSEDED"
	RuleFailed         Reason = "RULE_FAILED"
	RuleError          Reason = "RULE_ERROR"
	EffectFailed       Reason = "EFFECT_FAILED"
)

// Error carries a Reason from where it was found to the edge, where one map
// turns it into a gRPC code.
type Error struct {
	Reason   Reason
	Message  string            // for people: what was wrong and what to do next
	Metadata map[string]string // further facts for programs; never a secret
	Err      error             // the cause, for the service's own log; never sent to callers
}

// Errorf returns an Error. A trailing %w argument becomes its cause and its
// text stays in the message.
func Errorf(r Reason, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Reason: r, Message: err.Error(), Err: errors.Unwrap(err)}
}

// With returns e with one more metadata entry.
func (e *Error) With(key, value string) *Error {
	if e.Metadata == nil {
		e.Metadata = map[string]string{}
	}
	e.Metadata[key] = value
	return e
}

func (e *Error) Error() string { return string(e.Reason) + ": " + e.Message }

func (e *Error) Unwrap() error { return e.Err }

// ReasonOf returns the reason that err carries, INTERNAL when it carries none,
// and "" for nil.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return Internal
}
