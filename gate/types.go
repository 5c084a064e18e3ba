package gate

import (
	"encoding/json"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// SignRequest asks to sign images that the calling job has pushed.
type SignRequest struct {
	Images         []SignImage // 1 to MaxImages
	Evidence       []Evidence  // about them, signed in the same request; at most MaxEvidence
	AttachByClient bool        // the server then does not write to the registry
}

// Evidence is a predicate that the caller has made.
type Evidence struct {
	PredicateType string
	Predicate     json.RawMessage
	Name          string            // tells evidence of one type apart; may be ""
	Images        []attest.ImageRef // of the request, that it is about; none: all of them
}

// MaxEvidence bounds the predicates of one SignRequest.
const MaxEvidence = 16

// MaxEvidenceBytes bounds a SignRequest's predicates, each counted once for every
// image that it is about.
const MaxEvidenceBytes = 64 << 20

// SignImage is one image of a SignRequest.
type SignImage struct {
	Ref  attest.ImageRef
	Base string // the caller's hint: HOST/PATH[:TAG][@DIGEST], or "scratch"; "" is none
	// Facts are what the caller merely says; the provenance keeps them apart.
	Facts map[string]string
}

// MaxImages bounds one SignRequest.
const MaxImages = 64

// MaxTokenDigests is how many digests one token may sign until it expires.
const MaxTokenDigests = 64

// MaxTokenRequests is how often one token may sign: a digest once for each of its
// repositories and base hints, each of which makes records of its own.
const MaxTokenRequests = 4 * MaxTokenDigests

// AttachState says whether an image's bundles are in its registry.
type AttachState string

// The attach states.
const (
	Attached       AttachState = "ATTACHED" // written and read back
	AttachPending  AttachState = "PENDING"  // recorded; the worker, or a repetition of the request, goes on trying
	AttachByClient AttachState = "CLIENT"   // left to the caller
)

// Signed is what became of one image of a SignRequest.
type Signed struct {
	Ref              attest.ImageRef
	Err              error // nil when it was signed; the fields below are then set
	Image            attest.Image
	Signature        attest.Record
	Provenance       attest.Record
	SignatureBundle  []byte // Sigstore bundle v0.3 JSON
	ProvenanceBundle []byte
	Build            attest.Build // as recorded in the provenance
	Builder          string       // builder.id
	Attach           AttachState
	Repeated         bool // the records were there before this request
	Evidence         []SignedEvidence

	tasked bool // the worker was told to attach
}

// AttestRequest asks to sign one predicate about one image.
type AttestRequest struct {
	Ref            attest.ImageRef
	PredicateType  string
	Predicate      json.RawMessage
	Name           string
	AttachByClient bool
}

// SignedEvidence is what became of one predicate about one image.
type SignedEvidence struct {
	PredicateType, Name string
	Err                 error // nil when it was signed; the fields below are then set
	Image               attest.Image
	Record              attest.Record // without its payload, which may be large and is in Bundle
	Bundle              []byte        // Sigstore bundle v0.3 JSON; of Sign only when the caller attaches it
	Attach              AttachState
	Repeated            bool

	tasked bool // the worker was told to attach
}

// Imports is what an import found beside an image.
type Imports struct {
	Imported []Imported
	Skipped  []Skipped
}

// Imported is a piece of foreign evidence that is recorded.
type Imported struct {
	Record   attest.Record // without its payload, which may be large
	Said     attest.Import // without its content
	Repeated bool
}

// Skipped is one that no configured foreign root vouches for, or that could not be
// read. It neither counts nor stands in the way of the others.
type Skipped struct {
	Place   string // digest of a referrer, or a tag
	Reason  attest.Reason
	Message string
}

// BaseLink is one image of a chain of bases.
type BaseLink struct {
	Ref       attest.ImageRef
	Base      attest.Base      // that this image is built on
	KnownFrom string           // record, registry
	Record    attest.RecordID  // of the provenance that says so; zero when the registry was asked
	Signed    bool             // by a configured signer, with provenance
	Summary   string           // of that provenance
	Stages    []string         // TRACK/STAGE that hold it
	State     attest.BaseState // of Base
}

// Verdict is the outcome of a decision.
type Verdict string

// The verdicts.
const (
	Allowed Verdict = "allowed"
	Denied  Verdict = "denied"
	Aborted Verdict = "aborted" // the stage moved meanwhile: decide again
)

// Decision is what the gate decided, with everything that a person needs to
// understand it.
type Decision struct {
	Number   uint64          // index of the record; 0 when nothing was recorded
	RecordID attest.RecordID // zero when nothing was recorded
	Verdict  Verdict
	Track    string
	Stage    string
	Ref      attest.ImageRef
	Results  []attest.RuleResult
	Now      []StageEntry // what the stage holds: at most one
	Safe     []StageEntry // digests that were DONE in the stage, newest first
	Time     time.Time
	Policy   attest.PolicyRef
	Summary  string // source, ref, short commit and run of the accepted provenance
	LogSize  uint64 // decided on the records before this index
}

// StageEntry is a digest in a stage.
type StageEntry struct {
	Digest   attest.Digest
	Since    time.Time // when its effect was done; of a PENDING one when it was decided
	State    string    // PENDING, DONE, FAILED, VOID
	Decision uint64    // number of the decision that put it there
	Target   string    // HOST/PATH:TAG; "" when the stage sets none
}

// VerifyRequest asks whether a digest may run in a stage now; without a stage,
// whether it is signed and has provenance by a configured signer.
type VerifyRequest struct {
	Ref   attest.ImageRef
	Track string // "" is the one track of the repository
	Stage string
}

// PromoteRequest asks to move a stage to a digest.
type PromoteRequest struct {
	Ref     attest.ImageRef
	Track   string // "" is the one track of the repository
	ToStage string
	Version string // for the target's {version}; "" is the verified refs/tags/v…
	Reason  string
	Ticket  string
	DryRun  bool // decide only
}

// Promoted is the answer to a PromoteRequest. The fields after Decision are set
// only when it was allowed and no dry run.
type Promoted struct {
	Decision
	Effect       string // PENDING, DONE, FAILED
	EffectDetail string
	Target       string
	VSABundle    []byte // Sigstore bundle v0.3 JSON, signed with a certificate
	VSAEnvelope  []byte // plain DSSE JSON, signed with the gate key
}

// StageStatus is one stage of one repository.
type StageStatus struct {
	Track, Stage, After string
	Repository          attest.Repository
	Current             *StageEntry // nil when nothing was promoted there
}

// StagesQuery selects stages; empty fields select all.
type StagesQuery struct {
	Track      string
	Repository attest.Repository
	PageSize   int // 0 is 100, at most 1000
	PageToken  string
}

// RecordsQuery selects records.
type RecordsQuery struct {
	Filter    string // NAME="VALUE" joined by AND; NAME is kind or a facet
	PageSize  int    // 0 is 100, at most 1000
	PageToken string
}

// RecordSummary is what a list shows of a record.
type RecordSummary struct {
	ID    attest.RecordID
	Index uint64
	attest.Facts
}

// RecordsPage is one page of records, newest first.
type RecordsPage struct {
	Records []RecordSummary
	Next    string // page token; "" on the last page
	LogSize uint64
}

// Item is one record with its bundle; a precertificate has none.
type Item struct {
	Record attest.Record
	Bundle []byte
}

// Who is the caller as the service sees it.
type Who struct {
	Identity attest.Identity
	Roles    []Role
	When     string // a policy condition that admits exactly this workflow
}

// Role is a role that the caller holds.
type Role struct {
	Name   string
	Images []string
	Covers bool // the repository that was asked about
}

// Trust is what verifiers need; all of it is public.
type Trust struct {
	Service     string
	TrustedRoot []byte // trusted_root.json
	Fingerprint string // hex SHA-256 of TrustedRoot
	GateKeyPEM  []byte
}
