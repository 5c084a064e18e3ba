package identity

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

var (
	numericID = regexp.MustCompile(`^(?:0|[1-9][0-9]{0,18})$`)
	// ASCII only: no homoglyph of a name, no percent-encoding (attacks B12).
	gitHubName  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,100}/[A-Za-z0-9._-]{1,100}$`)
	gitHubEvent = regexp.MustCompile(`^[a-z_]{1,64}$`)
)

// signingEvents are the events whose jobs may sign: those that GitHub's build type
// covers, whose sha claim is the commit that was built, and two that run what the
// default branch holds. Others can run code that nobody has accepted (attacks B01).
var signingEvents = []string{"create", "push", "release", "workflow_dispatch", "schedule", "repository_dispatch"}

// checkGitHub checks what only the provider github has.
func (i *issuer) checkGitHub() error {
	iss := i.Issuer.Issuer
	public := iss == publicGitHub || strings.HasPrefix(iss, publicGitHub+"/") // …/<enterprise>
	u, err := url.Parse(iss)
	if err != nil {
		return fmt.Errorf("issuer: %w", err)
	}
	switch {
	case i.Kind != attest.Workload:
		return fmt.Errorf("kind: provider github names jobs, not persons")
	case len(i.Claims) > 0:
		return fmt.Errorf("claims: provider github has its own mapping: leave it out, or use provider generic")
	case i.SAN != "":
		return fmt.Errorf("san: provider github names jobs by their workflow file: leave it out")
	case public && i.ServerURL != "" && i.ServerURL != publicGitHubServer:
		return fmt.Errorf("server_url: jobs of %s run for %s", iss, publicGitHubServer)
	case !public && i.ServerURL == publicGitHubServer && !loopback(u.Hostname()):
		return fmt.Errorf("server_url: %s does not speak for %s: give your server's own URL", iss, publicGitHubServer)
	case !public && i.ServerURL == "" && !loopback(u.Hostname()):
		return fmt.Errorf("server_url: give the base URL of the server that %s issues for", iss)
	case i.ServerURL == "":
		// Also for an issuer on loopback, which imitates the public one.
		i.ServerURL = publicGitHubServer
	}
	return nil
}

// jobClaims are the claims of a GitHub Actions job that are kept (github/docs
// reference/security/oidc.md). Those of the first group must be there, as
// actions/toolkit demands for its own provenance.
type jobClaims struct {
	Repository, RepositoryID, OwnerID, SHA, Ref, Event string
	WorkflowRef, JobWorkflowRef, RunID, RunAttempt     string
	Runner                                             string

	Owner, Visibility, Workflow, WorkflowSHA, JobWorkflowSHA, Environment, Actor, ActorID string
}

func parseJob(c claims) (jobClaims, error) {
	var j jobClaims
	for _, f := range []struct {
		name string
		into *string
		read func(string) (string, error)
	}{
		{"repository", &j.Repository, c.required},
		{"repository_id", &j.RepositoryID, c.required},
		{"repository_owner_id", &j.OwnerID, c.required},
		{"sha", &j.SHA, c.required},
		{"ref", &j.Ref, c.required},
		{"event_name", &j.Event, c.required},
		{"workflow_ref", &j.WorkflowRef, c.required},
		{"job_workflow_ref", &j.JobWorkflowRef, c.required},
		{"run_id", &j.RunID, c.required},
		{"run_attempt", &j.RunAttempt, c.required},
		{"runner_environment", &j.Runner, c.required},
		{"repository_owner", &j.Owner, c.optional},
		{"repository_visibility", &j.Visibility, c.optional},
		{"workflow", &j.Workflow, c.optional},
		{"workflow_sha", &j.WorkflowSHA, c.optional},
		{"job_workflow_sha", &j.JobWorkflowSHA, c.optional},
		{"environment", &j.Environment, c.optional},
		{"actor", &j.Actor, c.optional},
		{"actor_id", &j.ActorID, c.optional},
	} {
		var err error
		if *f.into, err = f.read(f.name); err != nil {
			return jobClaims{}, err
		}
	}
	return j, j.check()
}

// check refuses values of a form that GitHub does not issue: what follows builds
// URIs from them and compares them.
func (j jobClaims) check() error {
	owner, _, _ := strings.Cut(j.Repository, "/")
	for _, f := range []struct {
		claim string
		ok    bool
		want  string
	}{
		{"repository", gitHubName.MatchString(j.Repository) && cleanPath(j.Repository), "OWNER/NAME"},
		{"repository_owner", j.Owner == "" || j.Owner == owner, "the owner in repository"},
		{"repository_id", numericID.MatchString(j.RepositoryID), "a number"},
		{"repository_owner_id", numericID.MatchString(j.OwnerID), "a number"},
		{"run_id", numericID.MatchString(j.RunID), "a number"},
		{"run_attempt", numericID.MatchString(j.RunAttempt), "a number"},
		{"actor_id", j.ActorID == "" || numericID.MatchString(j.ActorID), "a number"},
		{"sha", attest.CommitPattern.MatchString(j.SHA), "a full commit in lower case"},
		{"workflow_sha", j.WorkflowSHA == "" || attest.CommitPattern.MatchString(j.WorkflowSHA), "a full commit in lower case"},
		{"job_workflow_sha", j.JobWorkflowSHA == "" || attest.CommitPattern.MatchString(j.JobWorkflowSHA), "a full commit in lower case"},
		{"ref", strings.HasPrefix(j.Ref, "refs/") && cleanPath(j.Ref), "a full ref: refs/…"},
		{"event_name", gitHubEvent.MatchString(j.Event), "the name of an event"},
		{"workflow_ref", isWorkflowRef(j.WorkflowRef), "OWNER/NAME/PATH@REF"},
		{"job_workflow_ref", isWorkflowRef(j.JobWorkflowRef), "OWNER/NAME/PATH@REF"},
	} {
		if !f.ok {
			return attest.Errorf(attest.TokenClaims, "the token's claim %q is not %s", f.claim, f.want)
		}
	}
	return nil
}

// isWorkflowRef says whether s has the form OWNER/NAME/PATH@REF. It does not
// split PATH from REF: both may contain "@".
func isWorkflowRef(s string) bool {
	parts := strings.SplitN(s, "/", 3)
	return len(parts) == 3 && gitHubName.MatchString(parts[0]+"/"+parts[1]) &&
		strings.Contains(strings.Trim(parts[2], "@"), "@") && cleanPath(s)
}

// cleanPath says whether s names the same thing to whoever resolves "." and "..".
func cleanPath(s string) bool {
	return !slices.ContainsFunc(strings.Split(s, "/"), func(seg string) bool { return seg == "" || seg == "." || seg == ".." })
}

// readGitHub fills in what a GitHub Actions token says about its job, in the
// terms of Fulcio's certificate extensions (ci-identity 1.5). sub is not read:
// its format is the customer's choice (attacks B02).
func (i *issuer) readGitHub(c claims, id *attest.Identity) error {
	j, err := parseJob(c)
	if err != nil {
		return err
	}
	if err := i.checkOwner(j.OwnerID); err != nil {
		return err
	}
	base := i.ServerURL + "/"
	owner, _, _ := strings.Cut(j.Repository, "/")
	// The certificate carries the URI as url.URL prints it. A percent sign is
	// refused: "a b" and "a%20b" would be printed alike (attacks B12).
	san, err := url.Parse(base + j.JobWorkflowRef)
	if err != nil || strings.Contains(j.JobWorkflowRef, "%") {
		return attest.Errorf(attest.TokenClaims, "the token's claim \"job_workflow_ref\" cannot be part of a URI: rename the workflow file or the branch")
	}
	id.SAN = san.String()
	if !slices.Contains(signingEvents, j.Event) {
		id.Unaccepted = fmt.Sprintf("a job started by %q may run code that nobody has accepted into %s. Sign in a job started by one of %s",
			j.Event, j.Repository, strings.Join(signingEvents, ", "))
	}
	id.Build = attest.Build{
		SourceURI: base + j.Repository, Repository: j.Repository, RepositoryID: j.RepositoryID,
		OwnerURI: base + owner, OwnerID: j.OwnerID, Visibility: j.Visibility,
		Commit: j.SHA, Ref: j.Ref,
		WorkflowPath: workflowPath(j), WorkflowName: j.Workflow,
		ConfigURI: base + j.WorkflowRef, ConfigDigest: j.WorkflowSHA,
		SignerURI: base + j.JobWorkflowRef, SignerDigest: j.JobWorkflowSHA,
		Event: j.Event, RunID: j.RunID, RunAttempt: j.RunAttempt,
		RunURI: base + j.Repository + "/actions/runs/" + j.RunID + "/attempts/" + j.RunAttempt,
		Runner: j.Runner, Environment: j.Environment, Actor: j.Actor, ActorID: j.ActorID,
	}
	return nil
}

// workflowPath strips what is known from both ends of workflow_ref: a path and a
// ref may contain "@" (ci-identity 1.3). The path of a workflow in another
// repository, or at another ref than the build's, is left empty, so that no rule
// about a path in this repository matches it (attacks B04).
func workflowPath(j jobClaims) string {
	rest, ok := strings.CutPrefix(j.WorkflowRef, j.Repository+"/")
	if !ok {
		return ""
	}
	path, ok := strings.CutSuffix(rest, "@"+j.Ref)
	if !ok {
		return ""
	}
	return path
}

// checkOwner compares ids: a name may belong to somebody else tomorrow (attacks B03).
func (i *issuer) checkOwner(id string) error {
	if len(i.Owners) == 0 || (id != "" && slices.Contains(i.Owners, id)) {
		return nil
	}
	return attest.Errorf(attest.OwnerNotAllowed, "the token is from owner id %q, which issuer %q does not accept: ask the operator to add it to owners", id, i.Name)
}
