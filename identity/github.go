package identity

import (
	"cmp"
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
	gitHubName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,100}/[A-Za-z0-9._-]{1,100}$`)
	eventName  = regexp.MustCompile(`^[a-z_]{1,64}$`)

	gitHubSlug   = regexp.MustCompile(`^[A-Za-z0-9-]{1,100}$`)
	gitHubTenant = regexp.MustCompile(`^https://token\.actions\.([a-z0-9-]+)\.ghe\.com$`)
)

// signingEvents are the events whose jobs may sign: those that GitHub's build type
// covers, whose sha claim is the commit that was built, and two that run what the
// default branch holds. Others can run code that nobody has accepted (attacks B01).
var signingEvents = []string{"create", "push", "release", "workflow_dispatch", "schedule", "repository_dispatch"}

// completeEvents are those that bring no inputs that no token names (ci-identity 2.2).
var completeEvents = []string{"create", "push", "release"}

// checkGitHub checks what only the provider github has.
func (i *issuer) checkGitHub() error {
	iss := i.Issuer.Issuer
	server, known := gitHubServer(iss)
	switch {
	case i.Kind != attest.Workload:
		return fmt.Errorf("kind: provider github names jobs, not persons")
	case known && i.ServerURL != "" && i.ServerURL != server:
		return fmt.Errorf("server_url: jobs of %s run for %s", iss, server)
	case !known && slices.Contains(publicServers, i.ServerURL) && !loopbackURL(iss):
		return fmt.Errorf("server_url: %s does not speak for %s: give your server's own URL", iss, i.ServerURL)
	case !known && i.ServerURL == "" && !loopbackURL(iss):
		return fmt.Errorf("server_url: give the base URL of the server that %s issues for", iss)
	}
	// An issuer on loopback imitates the public one.
	i.ServerURL = cmp.Or(i.ServerURL, server, publicGitHubServer)
	i.ReusableWorkflows = slices.Clone(i.ReusableWorkflows)
	for n, w := range i.ReusableWorkflows {
		if err := w.check(); err != nil {
			return fmt.Errorf("reusable_workflows[%d]: %w", n, err)
		}
		if slices.ContainsFunc(i.ReusableWorkflows[:n], func(o ReusableWorkflow) bool { return o.Workflow == w.Workflow }) {
			return fmt.Errorf("reusable_workflows[%d]: %s is listed twice", n, w.Workflow)
		}
		i.ReusableWorkflows[n].Commits = slices.Clone(w.Commits)
	}
	return nil
}

// gitHubServer returns the server whose jobs an issuer speaks for, where the
// issuer's own URL says it: github.com with or without an enterprise's slug,
// SUBDOMAIN.ghe.com, and a GitHub Enterprise Server (github/docs
// reference/security/oidc.md).
func gitHubServer(iss string) (string, bool) {
	slug, public := strings.CutPrefix(iss, publicGitHub+"/")
	if iss == publicGitHub || public && gitHubSlug.MatchString(slug) {
		return publicGitHubServer, true
	}
	if m := gitHubTenant.FindStringSubmatch(iss); m != nil {
		return "https://" + m[1] + ".ghe.com", true
	}
	server, own := strings.CutSuffix(iss, "/_services/token")
	if u, err := url.Parse(server); own && err == nil && u.Path == "" {
		return server, true
	}
	return "", false
}

// check refuses what could never match, and what would match more than one file.
func (w ReusableWorkflow) check() error {
	switch {
	case !isWorkflowRef(w.Workflow+"@ref") || strings.ContainsAny(w.Workflow, "@%*?"):
		return fmt.Errorf("workflow: %q is not OWNER/REPO/PATH, such as acme/pipelines/.github/workflows/image.yml", clip(w.Workflow))
	case len(w.Commits) == 0:
		return fmt.Errorf("commits: list the commits of %s that you have read: a branch or tag can be moved", w.Workflow)
	case w.Inputs != "" && w.Inputs != "none":
		return fmt.Errorf("inputs: %q: write none if the workflow takes no inputs, else leave it out", w.Inputs)
	}
	for _, c := range w.Commits {
		if !attest.CommitPattern.MatchString(c) {
			return fmt.Errorf("commits: %q is not a full commit in lower case", clip(c))
		}
	}
	return nil
}

// reusable returns the listed workflow that runs the job, if nothing that its
// caller can set is missing from the token (ci-identity 2.2; attacks B04, B08).
// Else "": the job is one like others.
func (i *issuer) reusable(j jobClaims) string {
	// The top-level workflow is no called one, however its name is spelled.
	if j.Runner != "github-hosted" || strings.EqualFold(j.JobWorkflowRef, j.WorkflowRef) {
		return ""
	}
	for _, w := range i.ReusableWorkflows {
		ref, ok := strings.CutPrefix(j.JobWorkflowRef, w.Workflow+"@")
		// With another "@" the name could be of another file, "PATH@x.yml".
		if !ok || strings.Contains(ref, "@") || !slices.Contains(w.Commits, j.JobWorkflowSHA) {
			continue
		}
		if w.Inputs == "none" || slices.Contains(completeEvents, j.Event) {
			return w.Workflow
		}
	}
	return ""
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
	err := c.read([]claimField{
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
	})
	if err != nil {
		return jobClaims{}, err
	}
	return j, j.check()
}

// check refuses values of a form that GitHub does not issue: what follows builds
// URIs from them and compares them.
func (j jobClaims) check() error {
	owner, _, _ := strings.Cut(j.Repository, "/")
	return checkForms([]claimForm{
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
		{"event_name", eventName.MatchString(j.Event), "the name of an event"},
		{"workflow_ref", isWorkflowRef(j.WorkflowRef), "OWNER/NAME/PATH@REF"},
		{"job_workflow_ref", isWorkflowRef(j.JobWorkflowRef), "OWNER/NAME/PATH@REF"},
	})
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
	if id.SAN, err = printedURI("job_workflow_ref", base+j.JobWorkflowRef); err != nil {
		return err
	}
	if !slices.Contains(signingEvents, j.Event) {
		id.Unaccepted = fmt.Sprintf("a job started by %q may run code that nobody has accepted into %s. Sign in a job started by one of %s",
			j.Event, j.Repository, strings.Join(signingEvents, ", "))
	}
	if id.Unaccepted == "" {
		id.Reusable = i.reusable(j)
	}
	id.Build = attest.Build{
		SourceURI: base + j.Repository, Repository: j.Repository, RepositoryID: j.RepositoryID,
		OwnerURI: base + owner, OwnerID: j.OwnerID, Visibility: j.Visibility,
		Commit: j.SHA, Ref: j.Ref,
		WorkflowPath: attest.WorkflowPath(base+j.Repository, base+j.WorkflowRef, j.Ref), WorkflowName: j.Workflow,
		ConfigURI: base + j.WorkflowRef, ConfigDigest: j.WorkflowSHA,
		SignerURI: base + j.JobWorkflowRef, SignerDigest: j.JobWorkflowSHA,
		Event: j.Event, RunID: j.RunID, RunAttempt: j.RunAttempt,
		RunURI: base + j.Repository + "/actions/runs/" + j.RunID + "/attempts/" + j.RunAttempt,
		Runner: j.Runner, Environment: j.Environment, Actor: j.Actor, ActorID: j.ActorID,
	}
	return nil
}

// checkOwner compares ids: a name may belong to somebody else tomorrow (attacks B03).
func (i *issuer) checkOwner(id string) error {
	if len(i.Owners) == 0 || (id != "" && slices.Contains(i.Owners, id)) {
		return nil
	}
	return attest.Errorf(attest.OwnerNotAllowed, "the token is from owner id %q, which issuer %q does not accept: ask the operator to add it to owners", id, i.Name)
}
