package identity

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

const (
	publicBuildkite       = "https://agent.buildkite.com"
	publicBuildkiteServer = "https://buildkite.com"
)

var (
	uuid          = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	buildkiteSlug = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,254}$`)
)

// buildkiteSources are the values of build_source that Buildkite documents. The
// token does not tell a pull request's webhook from a push's: see docs/identity.
var buildkiteSources = []string{"ui", "api", "webhook", "trigger_job", "schedule"}

// checkBuildkite checks what only the provider buildkite has.
func (i *issuer) checkBuildkite() error {
	iss := strings.TrimSuffix(i.Issuer.Issuer, "/")
	switch {
	case i.Kind != attest.Workload:
		return fmt.Errorf("kind: provider buildkite names jobs, not persons")
	case iss == publicBuildkite && i.ServerURL != "" && i.ServerURL != publicBuildkiteServer:
		return fmt.Errorf("server_url: jobs of %s run for %s", iss, publicBuildkiteServer)
	case iss != publicBuildkite && !loopbackURL(iss) && (i.ServerURL == "" || slices.Contains(publicServers, i.ServerURL)):
		return fmt.Errorf("server_url: give the base URL of the server that %s issues for", iss)
	case len(i.Pipelines) == 0:
		return fmt.Errorf("pipelines: a token does not name the repository: list the pipelines whose jobs you accept, with theirs")
	}
	i.ServerURL = cmp.Or(i.ServerURL, publicBuildkiteServer)
	i.Pipelines = maps.Clone(i.Pipelines)
	for _, id := range slices.Sorted(maps.Keys(i.Pipelines)) {
		if err := i.checkPipeline(id, i.Pipelines[id]); err != nil {
			return fmt.Errorf("pipelines: %s: %w", clip(id), err)
		}
	}
	return nil
}

func (i *issuer) checkPipeline(id string, p Pipeline) error {
	u, err := url.Parse(p.Repository)
	switch {
	case !uuid.MatchString(id):
		return fmt.Errorf("it is not a pipeline's UUID: a slug can be given to another pipeline (the pipeline's settings show the UUID)")
	case err != nil || checkURL(p.Repository, i.PlainHTTP) != nil:
		return fmt.Errorf("repository: %q is not the https URI of a repository, such as https://github.com/acme/api", p.Repository)
	case u.Path == "" || !cleanPath(strings.TrimPrefix(u.Path, "/")):
		return fmt.Errorf("repository: %q has no path, or one with a slash at its end", p.Repository)
	case p.RepositoryID != "" && checkPrintable(p.RepositoryID) != nil:
		return fmt.Errorf("repository_id: %w", checkPrintable(p.RepositoryID))
	}
	return nil
}

// stepClaims are the claims of a Buildkite job that are kept (buildkite docs
// agent/cli/reference/oidc). organization_id and pipeline_id are there when they
// were asked for.
type stepClaims struct {
	Organization, OrganizationID, Pipeline, PipelineID     string
	Number, Branch, Tag, Commit, JobID, Runner, BuildEvent string
}

func parseStep(c claims) (stepClaims, error) {
	var s stepClaims
	for _, name := range []string{"organization_id", "pipeline_id"} {
		if c[name] == nil {
			return s, attest.Errorf(attest.TokenClaims, "the token has no claim %q, and slugs can be given to others: request it with buildkite-agent oidc request-token --claim organization_id,pipeline_id", name)
		}
	}
	err := c.read([]claimField{
		{"organization_id", &s.OrganizationID, c.required},
		{"pipeline_id", &s.PipelineID, c.required},
		{"organization_slug", &s.Organization, c.required},
		{"pipeline_slug", &s.Pipeline, c.required},
		{"build_number", &s.Number, c.requiredScalar},
		{"build_branch", &s.Branch, c.required},
		{"build_tag", &s.Tag, c.optional},
		{"build_commit", &s.Commit, c.optional},
		{"job_id", &s.JobID, c.required},
		{"runner_environment", &s.Runner, c.optional},
		{"build_source", &s.BuildEvent, c.required},
	})
	if err != nil {
		return stepClaims{}, err
	}
	return s, checkForms([]claimForm{
		{"organization_id", uuid.MatchString(s.OrganizationID), "a UUID in lower case"},
		{"pipeline_id", uuid.MatchString(s.PipelineID), "a UUID in lower case"},
		{"job_id", uuid.MatchString(s.JobID), "a UUID in lower case"},
		{"organization_slug", buildkiteSlug.MatchString(s.Organization), "a slug"},
		{"pipeline_slug", buildkiteSlug.MatchString(s.Pipeline), "a slug"},
		{"build_number", numericID.MatchString(s.Number), "a number"},
		{"build_branch", cleanPath(s.Branch), "the name of a branch"},
		{"build_tag", s.Tag == "" || cleanPath(s.Tag), "the name of a tag"},
		{"build_source", eventName.MatchString(s.BuildEvent), "the name of a source"},
	})
}

// readBuildkite fills in what a Buildkite token says about its job, and what the
// configuration says about its pipeline. sub is not read: jobs choose its format
// (attacks B02).
func (i *issuer) readBuildkite(c claims, id *attest.Identity) error {
	s, err := parseStep(c)
	if err != nil {
		return err
	}
	if err := i.checkOwner(s.OrganizationID); err != nil {
		return err
	}
	pipeline, ok := i.Pipelines[s.PipelineID]
	if !ok {
		return attest.Errorf(attest.SourceNotAllowed, "the token is from pipeline %s (%s/%s), which issuer %q does not list: ask the operator to add it to pipelines", s.PipelineID, s.Organization, s.Pipeline, i.Name)
	}
	id.SAN = i.ServerURL + "/" + s.Organization + "/" + s.Pipeline
	id.Unaccepted = s.unaccepted()
	id.Build = attest.Build{
		SourceURI: pipeline.Repository, Repository: pathOf(pipeline.Repository), RepositoryID: pipeline.RepositoryID,
		OwnerID: s.OrganizationID,
		Ref:     s.ref(), WorkflowName: s.Pipeline, Event: s.BuildEvent,
		RunURI: id.SAN + "/builds/" + s.Number + "#" + s.JobID, RunID: s.Number, JobID: s.JobID, Runner: s.Runner,
	}
	// A build that somebody starts by hand has the commit "HEAD": that is no fact
	// about what was built (attacks B09).
	if attest.CommitPattern.MatchString(s.Commit) {
		id.Build.Commit = s.Commit
	}
	return nil
}

func pathOf(uri string) string {
	_, rest, _ := strings.Cut(uri, "://")
	_, path, _ := strings.Cut(rest, "/")
	return path
}

func (s stepClaims) ref() string {
	if s.Tag != "" {
		return "refs/tags/" + s.Tag
	}
	return "refs/heads/" + s.Branch
}

var buildkitePull = regexp.MustCompile(`^(?:pull|merge-requests)/[0-9]+(?:/|$)`)

// unaccepted says why the job may run what nobody has accepted, as far as the token
// tells, or "".
func (s stepClaims) unaccepted() string {
	switch {
	case !slices.Contains(buildkiteSources, s.BuildEvent):
		return fmt.Sprintf("a build of source %q may run code that nobody has accepted. Sign in a build of source %s", s.BuildEvent, strings.Join(buildkiteSources, ", "))
	case strings.Contains(s.Branch, ":"):
		return fmt.Sprintf("branch %q is a fork's: no branch has a colon in its name", clip(s.Branch))
	case buildkitePull.MatchString(s.Branch) || strings.HasPrefix(s.Branch, "refs/"):
		return fmt.Sprintf("%q is a pull request, not a branch", clip(s.Branch))
	}
	return ""
}
