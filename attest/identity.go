package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"
)

// Kind says whether an identity is a machine or a person.
type Kind string

// The kinds of identity.
const (
	Workload Kind = "workload"
	Person   Kind = "person"
	Service  Kind = "service" // Hallmark itself
)

// Identity is a caller whose credential was verified. Only package identity
// makes one from a token.
type Identity struct {
	IssuerName string    // the name of the issuer in the configuration: "github"
	Provider   string    // the mapper that read the claims: github, gitlab, buildkite, kubernetes, spiffe, generic
	Kind       Kind      //
	Issuer     string    // the token's iss, byte for byte as configured
	Subject    string    // the token's sub; shown, never parsed (ci-identity 1.1)
	SAN        string    // the URI that names this identity in certificates
	TokenID    string    // hex SHA-256(iss LF jti), else of the JWS signing input
	Expires    time.Time // of the credential
	Groups     []string  // of a person
	// Once says that the token is good for one signing request and its repetitions
	// (the issuer's replay: once).
	Once bool
	// Unaccepted says why the job may run code that nobody has accepted into the
	// repository: a pull request, a fork. Such a job may ask, and change nothing. "" is none.
	Unaccepted string
	// Reusable is OWNER/REPO/PATH of the reusable workflow that runs the job, when
	// the operator has listed it at exactly this commit, the runner is hosted, and
	// nothing that its caller can set is missing from the token; else "".
	Reusable string
	Build    Build // of a workload; a zero Build has no verified source
}

// Key names the identity for as long as its issuer does: hex SHA-256(iss LF sub).
func (id Identity) Key() string {
	h := sha256.Sum256([]byte(id.Issuer + "\n" + id.Subject))
	return hex.EncodeToString(h[:])
}

// Quota names whom a bound on what is in flight is for: the owner of the code, else
// the repository, as their CI host has numbered them; else Key. A job chooses its
// subject, by an environment or a branch, and so may have any number of those.
func (id Identity) Quota() string {
	switch b := id.Build; {
	case b.OwnerID != "":
		return "owner:" + Identity{Issuer: id.Issuer, Subject: b.OwnerID}.Key()
	case b.RepositoryID != "":
		return "repository:" + Identity{Issuer: id.Issuer, Subject: b.RepositoryID}.Key()
	}
	return id.Key()
}

// Run names the CI run and attempt on whose behalf a workload calls, else its
// token: what may be repeated as one request (design section 5, natural keys).
func (id Identity) Run() string {
	if id.Build.RunURI != "" {
		return id.Build.RunURI
	}
	return "token:" + id.TokenID
}

// Build is what a CI token verifiably says about the job that holds it. Every
// field is empty when the token does not say it. The names are those of
// Fulcio's certificate extensions where it has one (fulcio docs/oid-info.md).
type Build struct {
	// Source.
	SourceURI    string `json:"source_uri,omitempty"`    // https://github.com/acme/api; without Commit it is no verified source
	Repository   string `json:"repository,omitempty"`    // acme/api: shown, never authorised on
	RepositoryID string `json:"repository_id,omitempty"` // immutable id of the repository
	OwnerURI     string `json:"owner_uri,omitempty"`     // https://github.com/acme
	OwnerID      string `json:"owner_id,omitempty"`      // immutable id of the owner
	Visibility   string `json:"visibility,omitempty"`    // public, private, internal
	Commit       string `json:"commit,omitempty"`        // 40 or 64 hex digits
	Ref          string `json:"ref,omitempty"`           // refs/heads/main
	RefProtected string `json:"ref_protected,omitempty"` // "true", "false": whether the code host protects it
	WorkflowPath string `json:"workflow_path,omitempty"` // .github/workflows/release.yml
	WorkflowName string `json:"workflow_name,omitempty"` // shown only
	ConfigURI    string `json:"config_uri,omitempty"`    // top-level workflow with its ref
	ConfigDigest string `json:"config_digest,omitempty"` // commit of the top-level workflow
	SignerURI    string `json:"signer_uri,omitempty"`    // workflow file that runs the job, with its ref
	SignerDigest string `json:"signer_digest,omitempty"` // commit of that file
	Event        string `json:"event,omitempty"`         // push, workflow_dispatch …
	RunURI       string `json:"run_uri,omitempty"`       // run and attempt, globally unique
	RunID        string `json:"run_id,omitempty"`        //
	RunAttempt   string `json:"run_attempt,omitempty"`   //
	JobID        string `json:"job_id,omitempty"`        // of the job within the run
	Runner       string `json:"runner,omitempty"`        // github-hosted, gitlab-hosted, buildkite-hosted, self-hosted
	Environment  string `json:"environment,omitempty"`   // deployment environment
	Actor        string `json:"actor,omitempty"`         // shown only
	ActorID      string `json:"actor_id,omitempty"`      // immutable id of who triggered the run
}

// HasSource reports whether the token says which commit of which repository the
// job was started for. Without both, the source of a build is UNKNOWN.
func (b Build) HasSource() bool { return b.SourceURI != "" && CommitPattern.MatchString(b.Commit) }

// WorkflowPath returns the file of a workflow in the repository that is built, at
// the ref that is built, and "" for any other: no rule about a path in this
// repository may match it (attacks B04). What is known is stripped from both ends, as
// path and ref may contain "@" (ci-identity 1.3). GitLab puts two slashes before
// the file.
func WorkflowPath(sourceURI, configURI, ref string) string {
	rest, ok := strings.CutPrefix(configURI, sourceURI+"/")
	path, atRef := strings.CutSuffix(rest, "@"+ref)
	if !ok || !atRef || sourceURI == "" || ref == "" {
		return ""
	}
	return strings.TrimPrefix(path, "/")
}
