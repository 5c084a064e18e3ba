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

const publicGitLab = "https://gitlab.com"

// gitLabPath is the full path of a project: groups, then its name. ASCII only
// (attacks B12).
var gitLabPath = regexp.MustCompile(`^[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)+$`)

// gitLabSources are the pipeline sources whose jobs may sign. Merge requests build
// what nobody has accepted yet; what GitLab adds later is not among them until it
// was looked at (attacks B01).
var gitLabSources = []string{"push", "web", "api", "trigger", "schedule", "pipeline", "parent_pipeline", "chat"}

// checkGitLab checks what only the provider gitlab has.
func (i *issuer) checkGitLab() error {
	iss := strings.TrimSuffix(i.Issuer.Issuer, "/")
	i.ServerURL = cmp.Or(i.ServerURL, iss)
	switch {
	case i.Kind != attest.Workload:
		return fmt.Errorf("kind: provider gitlab names jobs, not persons")
	case iss == publicGitLab && i.ServerURL != publicGitLab:
		return fmt.Errorf("server_url: jobs of %s run for %s", iss, publicGitLab)
	case iss != publicGitLab && slices.Contains(publicServers, i.ServerURL) && !loopbackURL(iss):
		return fmt.Errorf("server_url: %s does not speak for %s: give your server's own URL", iss, i.ServerURL)
	}
	return nil
}

// pipelineClaims are the claims of a GitLab job that are kept (gitlab
// lib/gitlab/ci/jwt.rb and jwt_v2.rb). The first group must be there. Ids are texts
// or numbers, booleans are texts, and null stands for what is not known.
type pipelineClaims struct {
	Project, ProjectID, Namespace, NamespaceID   string
	SHA, Ref, RefType, Source, PipelineID, JobID string

	RefPath, RefProtected, Config, ConfigSHA string
	Visibility, Runner, Environment          string
	User, UserID                             string
}

func parsePipeline(c claims) (pipelineClaims, error) {
	var p pipelineClaims
	err := c.read([]claimField{
		{"project_path", &p.Project, c.required},
		{"project_id", &p.ProjectID, c.requiredScalar},
		{"namespace_path", &p.Namespace, c.required},
		{"namespace_id", &p.NamespaceID, c.requiredScalar},
		{"sha", &p.SHA, c.required},
		{"ref", &p.Ref, c.required},
		{"ref_type", &p.RefType, c.required},
		{"pipeline_source", &p.Source, c.required},
		{"pipeline_id", &p.PipelineID, c.requiredScalar},
		{"job_id", &p.JobID, c.requiredScalar},
		{"ref_path", &p.RefPath, c.optional},
		{"ref_protected", &p.RefProtected, c.scalar},
		{"ci_config_ref_uri", &p.Config, c.optional},
		{"ci_config_sha", &p.ConfigSHA, c.optional},
		{"project_visibility", &p.Visibility, c.optional},
		{"runner_environment", &p.Runner, c.optional},
		{"environment", &p.Environment, c.optional},
		{"user_login", &p.User, c.optional},
		{"user_id", &p.UserID, c.scalar},
	})
	if err != nil {
		return pipelineClaims{}, err
	}
	return p, p.check()
}

// check refuses values of a form that GitLab does not issue.
func (p pipelineClaims) check() error {
	name, inNamespace := strings.CutPrefix(p.Project, p.Namespace+"/")
	return checkForms([]claimForm{
		// "-" is where GitLab's own routes begin: no project is called so.
		{"project_path", gitLabPath.MatchString(p.Project) && cleanPath(p.Project) && !slices.Contains(strings.Split(p.Project, "/"), "-"), "a path of names"},
		{"namespace_path", inNamespace && !strings.Contains(name, "/"), "what precedes the name in project_path"},
		{"project_id", numericID.MatchString(p.ProjectID), "a number"},
		{"namespace_id", numericID.MatchString(p.NamespaceID), "a number"},
		{"pipeline_id", numericID.MatchString(p.PipelineID), "a number"},
		{"job_id", numericID.MatchString(p.JobID), "a number"},
		{"user_id", p.UserID == "" || numericID.MatchString(p.UserID), "a number"},
		{"sha", attest.CommitPattern.MatchString(p.SHA), "a full commit in lower case"},
		{"ci_config_sha", p.ConfigSHA == "" || attest.CommitPattern.MatchString(p.ConfigSHA), "a full commit in lower case"},
		{"ref", cleanPath(p.Ref), "the name of a branch or tag"},
		{"ref_path", p.RefPath == "" || strings.HasPrefix(p.RefPath, "refs/") && cleanPath(p.RefPath), "a full ref: refs/…"},
		{"ref_protected", slices.Contains([]string{"", "true", "false"}, p.RefProtected), "true or false"},
		{"pipeline_source", eventName.MatchString(p.Source), "the name of a source"},
	})
}

// readGitLab fills in what a GitLab ID token says about its job, in the terms of
// Fulcio's certificate extensions (ci-identity 1.5). sub is not read: projects
// choose its format (attacks B02).
func (i *issuer) readGitLab(c claims, id *attest.Identity) error {
	if err := refuseFork(c); err != nil {
		return err
	}
	p, err := parsePipeline(c)
	if err != nil {
		return err
	}
	if err := i.checkOwner(p.NamespaceID); err != nil {
		return err
	}
	ref, err := p.fullRef()
	if err != nil {
		return err
	}
	source := i.ServerURL + "/" + p.Project
	id.Build = attest.Build{
		SourceURI: source, Repository: p.Project, RepositoryID: p.ProjectID,
		OwnerURI: i.ServerURL + "/" + p.Namespace, OwnerID: p.NamespaceID, Visibility: p.Visibility,
		Commit: p.SHA, Ref: ref, RefProtected: p.RefProtected,
		Event: p.Source, RunID: p.PipelineID, JobID: p.JobID, RunURI: source + "/-/jobs/" + p.JobID,
		Runner: p.Runner, Environment: p.Environment, Actor: p.User, ActorID: p.UserID,
	}
	id.Unaccepted = p.unaccepted(ref)
	// Without a configuration of its own, the project and ref name the job: no
	// configuration's URI lacks the "//" between project and file.
	san := source + "@" + ref
	if p.Config != "" {
		if san, err = i.configURI(p.Config); err != nil {
			return err
		}
		b := &id.Build
		b.ConfigURI, b.ConfigDigest, b.SignerURI, b.SignerDigest = san, p.ConfigSHA, san, p.ConfigSHA
		b.WorkflowPath = attest.WorkflowPath(b.SourceURI, b.ConfigURI, b.Ref)
	}
	id.SAN, err = printedURI("ci_config_ref_uri or ref", san)
	return err
}

// fullRef returns the ref with its "refs/…", which old versions do not send.
func (p pipelineClaims) fullRef() (string, error) {
	ref := ""
	switch p.RefType {
	case "branch":
		ref = "refs/heads/" + p.Ref
	case "tag":
		ref = "refs/tags/" + p.Ref
	}
	switch {
	case ref != "" && (p.RefPath == "" || p.RefPath == ref):
		return ref, nil
	case p.RefPath != "" && !isBranchOrTag(p.RefPath):
		return p.RefPath, nil
	}
	return "", attest.Errorf(attest.TokenClaims, "the token's claims \"ref\", \"ref_type\" and \"ref_path\" name no ref, or different ones")
}

// isBranchOrTag says whether ref is one that only those who may push move.
func isBranchOrTag(ref string) bool {
	return strings.HasPrefix(ref, "refs/heads/") || strings.HasPrefix(ref, "refs/tags/")
}

// unaccepted says why the job may run what nobody has accepted, or "".
func (p pipelineClaims) unaccepted(ref string) string {
	switch {
	case !slices.Contains(gitLabSources, p.Source):
		return fmt.Sprintf("a pipeline of source %q may run code that nobody has accepted into %s. Sign in a pipeline of source %s",
			p.Source, p.Project, strings.Join(gitLabSources, ", "))
	case p.Source == "parent_pipeline" && p.RefProtected != "true":
		return "a child pipeline does not say whether its parent is a merge request's. Sign in the parent, or on a protected branch or tag"
	// A branch called refs/merge-requests/… is taken for what it looks like.
	case !isBranchOrTag(ref) || strings.HasPrefix(p.Ref, "refs/"):
		return fmt.Sprintf("%s is neither a branch nor a tag of %s: it may hold code that nobody has accepted", clip(ref), p.Project)
	}
	return ""
}

// configURI returns the URI of a pipeline's definition, HOST/PROJECT//FILE@REF. It
// must be on the issuer's own server: certificates are read by it.
func (i *issuer) configURI(claim string) (string, error) {
	_, host, _ := strings.Cut(i.ServerURL, "://")
	rest, ok := strings.CutPrefix(claim, host+"/")
	project, file, split := strings.Cut(rest, "//")
	path, ref, _ := strings.Cut(file, "@")
	if !ok || !split || path == "" || !gitLabPath.MatchString(project) || !cleanPath(rest[:len(project)]) || !cleanPath(file) || !strings.Contains("@"+ref, "@refs/") {
		return "", attest.Errorf(attest.TokenClaims, "the token's claim \"ci_config_ref_uri\" is not %s/PROJECT//FILE@refs/…: if that is another server, set server_url", host)
	}
	return i.ServerURL + "/" + rest, nil
}

func loopbackURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && loopback(u.Hostname())
}
