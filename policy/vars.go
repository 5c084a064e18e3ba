package policy

import (
	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

// CallerVars is what an expression sees of a verified caller, as "id" in roles
// and as "caller" in cel rules. A field that the token does not carry is absent:
// an expression that reads it is in error, which is as good as false, so that an
// absent claim equals nothing and differs from nothing (attacks A23).
type CallerVars struct {
	Issuer       string   `cel:"issuer"`     // name in the configuration
	IssuerURL    string   `cel:"issuer_url"` // the token's iss
	Subject      string   `cel:"subject"`
	Kind         string   `cel:"kind"` // workload, person
	Repository   string   `cel:"repository"`
	RepositoryID string   `cel:"repository_id"`
	OwnerID      string   `cel:"owner_id"`
	Source       string   `cel:"source"` // URI
	Ref          string   `cel:"ref"`
	RefProtected string   `cel:"ref_protected"` // true, false: whether the code host protects ref
	Commit       string   `cel:"commit"`
	WorkflowPath string   `cel:"workflow_path"`
	Event        string   `cel:"event"`
	Environment  string   `cel:"environment"`
	Runner       string   `cel:"runner"`
	RunID        string   `cel:"run_id"`
	RunAttempt   string   `cel:"run_attempt"`
	Actor        string   `cel:"actor"`
	ActorID      string   `cel:"actor_id"`
	Visibility   string   `cel:"visibility"`
	SignerURI    string   `cel:"signer_uri"`
	SAN          string   `cel:"san"`
	Groups       []string `cel:"groups"` // empty when there are none
}

func callerVars(id attest.Identity) *CallerVars {
	v := buildVars(id.Build)
	v.Issuer, v.IssuerURL, v.Subject, v.Kind = id.IssuerName, id.Issuer, id.Subject, string(id.Kind)
	v.SAN, v.Groups = id.SAN, id.Groups
	return &v
}

func buildVars(b attest.Build) CallerVars {
	return CallerVars{
		Repository: b.Repository, RepositoryID: b.RepositoryID, OwnerID: b.OwnerID, Source: b.SourceURI,
		Ref: b.Ref, RefProtected: b.RefProtected, Commit: b.Commit, WorkflowPath: b.WorkflowPath, Event: b.Event, Environment: b.Environment,
		Runner: b.Runner, RunID: b.RunID, RunAttempt: b.RunAttempt, Actor: b.Actor, ActorID: b.ActorID,
		Visibility: b.Visibility, SignerURI: b.SignerURI,
	}
}

// SignerVars is what an expression sees of a signature's signer, as "id" in
// signed_by: the fields that a certificate carries and no others.
type SignerVars struct {
	Issuer       string `cel:"issuer"`     // name in the configuration
	IssuerURL    string `cel:"issuer_url"` // the certificate's issuer extension
	RepositoryID string `cel:"repository_id"`
	OwnerID      string `cel:"owner_id"`
	Source       string `cel:"source"`
	Ref          string `cel:"ref"`
	Commit       string `cel:"commit"`
	WorkflowPath string `cel:"workflow_path"`
	Event        string `cel:"event"`
	Environment  string `cel:"environment"`
	Runner       string `cel:"runner"`
	Visibility   string `cel:"visibility"`
	SignerURI    string `cel:"signer_uri"`
	SAN          string `cel:"san"`
}

func signerVars(issuer string, s verifier.Signer) *SignerVars {
	b := s.Build
	return &SignerVars{
		Issuer: issuer, IssuerURL: s.Issuer, RepositoryID: b.RepositoryID, OwnerID: b.OwnerID, Source: b.SourceURI,
		Ref: b.Ref, Commit: b.Commit, WorkflowPath: b.WorkflowPath, Event: b.Event, Environment: b.Environment,
		Runner: b.Runner, Visibility: b.Visibility, SignerURI: b.SignerURI, SAN: s.SAN,
	}
}

// ForeignVars is what an expression sees of who signed imported evidence, as "id" in
// a signed_by that names a root: what the foreign certificate carries, or the key.
// The names that this service gives to its own issuers are none of it.
type ForeignVars struct {
	IssuerURL    string `cel:"issuer_url"` // the certificate's issuer extension
	SAN          string `cel:"san"`        // e-mail or URI
	Key          string `cel:"key"`        // hex SHA-256 of the public key's PKIX DER
	RepositoryID string `cel:"repository_id"`
	OwnerID      string `cel:"owner_id"`
	Source       string `cel:"source"`
	Ref          string `cel:"ref"`
	Commit       string `cel:"commit"`
	WorkflowPath string `cel:"workflow_path"`
	Event        string `cel:"event"`
	Environment  string `cel:"environment"`
	Runner       string `cel:"runner"`
	Visibility   string `cel:"visibility"`
	SignerURI    string `cel:"signer_uri"`
}

func foreignVars(f attest.Foreigner) *ForeignVars {
	b := f.Build
	return &ForeignVars{
		IssuerURL: f.Issuer, SAN: f.SAN, Key: f.Key, RepositoryID: b.RepositoryID, OwnerID: b.OwnerID, Source: b.SourceURI,
		Ref: b.Ref, Commit: b.Commit, WorkflowPath: b.WorkflowPath, Event: b.Event, Environment: b.Environment,
		Runner: b.Runner, Visibility: b.Visibility, SignerURI: b.SignerURI,
	}
}

// ImageVars is "image" in cel rules.
type ImageVars struct {
	Repository string `cel:"repository"`
	Digest     string `cel:"digest"`
	Name       string `cel:"name"` // what the last wildcard of the track's pattern matched
}

// ProvenanceVars is "provenance" in cel rules: the provenance that the stage's
// provenance rules accepted. Without one every field is absent.
type ProvenanceVars struct {
	Source         string `cel:"source"`
	SourceID       string `cel:"source_id"`
	Ref            string `cel:"ref"`
	Commit         string `cel:"commit"`
	WorkflowPath   string `cel:"workflow_path"`
	Event          string `cel:"event"`
	Runner         string `cel:"runner"`
	Level          int64  `cel:"level"` // SLSA build level; 0 without a provenance
	Builder        string `cel:"builder"`
	Environment    string `cel:"environment"`
	BaseResult     string `cel:"base_result"`
	BaseRepository string `cel:"base_repository"`
	BaseDigest     string `cel:"base_digest"`
}
