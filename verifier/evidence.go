package verifier

import (
	"crypto/x509"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/sigstore/fulcio/pkg/certificate"

	"github.com/hallmarkd/hallmark/attest"
)

// Evidence is a statement about images that was verified completely. Only a
// Verifier makes one, so whoever holds one need not ask again. What its methods
// return must not be changed.
type Evidence struct {
	id       attest.RecordID
	index    uint64
	c        checked
	envelope attest.Digest
}

func (c *checked) evidence(r attest.Record) (*Evidence, error) {
	raw, err := r.DSSE()
	if err != nil {
		return nil, attest.Errorf(attest.BundleMalformed, "%w", err)
	}
	return &Evidence{id: r.ID, index: r.Index, c: *c, envelope: attest.Hash(raw)}, nil
}

// ID returns the record's id, which is its leaf hash in the log.
func (e *Evidence) ID() attest.RecordID { return e.id }

// Index returns the record's index in the log.
func (e *Evidence) Index() uint64 { return e.index }

// Kind returns what the record is, derived from its predicate type.
func (e *Evidence) Kind() attest.RecordKind { return e.c.kind }

// PredicateType returns the statement's predicate type.
func (e *Evidence) PredicateType() string { return e.c.statement.PredicateType }

// Statement returns the statement as signed; of an import without its predicate,
// which Imported returns.
func (e *Evidence) Statement() attest.Statement { return e.c.statement }

// Digests returns the images that the statement is about, each once, at least one.
func (e *Evidence) Digests() []attest.Digest { return e.c.digests }

// Names returns the names of the statement's subjects in its order, "" where a
// subject has none. They are labels: only digests are verified.
func (e *Evidence) Names() []string {
	out := make([]string, len(e.c.statement.Subject))
	for i, s := range e.c.statement.Subject {
		out[i] = s.Name
	}
	return out
}

// Covers reports whether the statement is about the image d.
func (e *Evidence) Covers(d attest.Digest) bool { return e.c.covers(d) }

// Signer returns who signed.
func (e *Evidence) Signer() Signer { return e.c.signer }

// Time returns when it was signed, by the timestamp authority, in whole seconds UTC.
func (e *Evidence) Time() time.Time { return e.c.time.UTC() }

// Provenance returns the predicate of a provenance, and false for other kinds.
func (e *Evidence) Provenance() (attest.Provenance, bool) {
	return e.c.provenance, e.c.kind == attest.KindProvenance
}

// Imported returns the predicate of an import, and false for other kinds: what was
// signed elsewhere, and under which foreign root this service verified it then. Its
// Content was checked and is left out.
func (e *Evidence) Imported() (attest.Import, bool) {
	return e.c.imported, e.c.kind == attest.KindImport
}

// EnvelopeDigest returns the SHA-256 of the envelope as DSSE JSON
// (attest.Envelope.DSSE), by which a VSA names its inputs.
func (e *Evidence) EnvelopeDigest() attest.Digest { return e.envelope }

// Signer is who signed a statement, as far as the certificate or the key says.
type Signer struct {
	// Gate is true for the service itself: its gate key, or a certificate with
	// the gate's name that was issued to the service.
	Gate   bool
	SAN    string // URI in the certificate's subject alternative name
	Issuer string // OIDC issuer of that identity
	// Build is what the certificate's extensions say; what they do not hold
	// (Actor, ActorID, RefProtected, GitLab's RunID) is empty.
	Build attest.Build
}

// signerOf reads who a certificate was issued to. The certificate is verified.
func (v *Verifier) signerOf(cert *x509.Certificate) (Signer, error) {
	issuer, build, err := Certified(cert)
	if err != nil {
		return Signer{}, err
	}
	if issuer == "" {
		return Signer{}, attest.Errorf(attest.CertificateInvalid, "the certificate does not say who vouched for its holder")
	}
	s := Signer{SAN: cert.URIs[0].String(), Issuer: issuer, Build: build}
	s.Gate = s.SAN == v.service+"/gate" && s.Issuer == v.service
	return s, nil
}

// Certified reads what a certificate's Fulcio extensions say: the OIDC issuer of its
// holder, "" without one, and the build. It does not verify the certificate. Errors:
// CERTIFICATE_INVALID.
func Certified(cert *x509.Certificate) (issuer string, build attest.Build, err error) {
	ext, err := certificate.ParseExtensions(cert.Extensions)
	if err != nil {
		return "", attest.Build{}, attest.Errorf(attest.CertificateInvalid, "the certificate's extensions cannot be read: %w", err)
	}
	build = attest.Build{
		SourceURI: ext.SourceRepositoryURI, RepositoryID: ext.SourceRepositoryIdentifier,
		OwnerURI: ext.SourceRepositoryOwnerURI, OwnerID: ext.SourceRepositoryOwnerIdentifier,
		Visibility: ext.SourceRepositoryVisibilityAtSigning, Commit: ext.SourceRepositoryDigest, Ref: ext.SourceRepositoryRef,
		WorkflowName: ext.GithubWorkflowName, ConfigURI: ext.BuildConfigURI, ConfigDigest: ext.BuildConfigDigest,
		SignerURI: ext.BuildSignerURI, SignerDigest: ext.BuildSignerDigest, Event: ext.BuildTrigger,
		RunURI: ext.RunInvocationURI, Runner: ext.RunnerEnvironment, Environment: ext.DeploymentEnvironment,
	}
	derive(&build)
	return ext.Issuer, build, nil
}

// derive fills in what follows from the URIs, and leaves empty what does not
// follow exactly.
func derive(b *attest.Build) {
	if u, err := url.Parse(b.SourceURI); err == nil {
		b.Repository = strings.Trim(u.Path, "/")
	}
	if b.SourceURI == "" {
		return
	}
	b.WorkflowPath = attest.WorkflowPath(b.SourceURI, b.ConfigURI, b.Ref)
	if rest, ok := strings.CutPrefix(b.RunURI, b.SourceURI+"/actions/runs/"); ok {
		if id, attempt, ok := strings.Cut(rest, "/attempts/"); ok && digits(id) && digits(attempt) {
			b.RunID, b.RunAttempt = id, attempt
		}
	}
	if id, ok := strings.CutPrefix(b.RunURI, b.SourceURI+"/-/jobs/"); ok && digits(id) {
		b.JobID = id // GitLab's URI names the job alone
	}
	if m := buildkiteRun.FindStringSubmatch(b.RunURI); m != nil {
		b.RunID, b.JobID = m[1], m[2]
	}
}

// buildkiteRun is the URI of a job in a build of a pipeline, which is not below the
// source's: SERVER/ORGANIZATION/PIPELINE/builds/NUMBER#JOB.
var buildkiteRun = regexp.MustCompile(`^https?://[^/#?]+/[^/#?]+/[^/#?]+/builds/([0-9]+)#([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)

func digits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// certified keeps of a build what a certificate holds as it is.
func certified(b attest.Build) attest.Build {
	b.Repository, b.WorkflowPath, b.WorkflowName, b.RunID, b.RunAttempt, b.JobID = "", "", "", "", "", ""
	b.RefProtected, b.Actor, b.ActorID = "", "", ""
	return b
}
