package main

import (
	"context"
	"encoding/json"
	"slices"
	"strings"

	"github.com/buildkite/agent/v3/api"
	"github.com/buildkite/agent/v3/logger"
)

// ciSystem is a CI system as a job sees it: by its environment.
type ciSystem struct {
	name string
	// here reports whether this is a job of it.
	here func(env func(string) string) bool
	// fork says that the job runs for a change from somebody else's repository, which
	// gets no token that may sign; nil where nothing tells.
	fork func(env func(string) string) bool
	// help says, line by line, how a job of it gets a token for the audience.
	help func(audience string) []string
}

// is returns a test for a variable with exactly this value.
func is(name, value string) func(func(string) string) bool {
	return func(env func(string) string) bool { return env(name) == value }
}

// has returns a test for a variable with any value.
func has(name string) func(func(string) string) bool {
	return func(env func(string) string) bool { return env(name) != "" }
}

// ciSystems are those that are told apart, the more special ones first: Forgejo and
// Gitea call themselves GitHub Actions too.
var ciSystems = []ciSystem{
	{"Forgejo Actions", func(env func(string) string) bool {
		return env("FORGEJO_ACTIONS") == "true" || env("GITEA_ACTIONS") == "true"
	}, gitHubFork, func(string) []string {
		return []string{
			"  In Forgejo Actions the workflow needs:",
			"    enable-openid-connect: true",
		}
	}},
	{"GitHub Actions", is("GITHUB_ACTIONS", "true"), gitHubFork, func(string) []string {
		return []string{
			"  In GitHub Actions the job needs:",
			"    permissions:",
			"      contents: read",
			"      id-token: write",
			"  A reusable workflow needs it in the workflow that calls it, too.",
		}
	}},
	{"GitLab CI", is("GITLAB_CI", "true"), gitLabFork, func(audience string) []string {
		return []string{
			"  In GitLab CI the job needs:",
			"    id_tokens:",
			"      HALLMARK_IDENTITY_TOKEN:",
			"        aud: " + audience,
		}
	}},
	{"Buildkite", is("BUILDKITE", "true"), func(env func(string) string) bool {
		return env("BUILDKITE_PULL_REQUEST_REPO") != "" && env("BUILDKITE_PULL_REQUEST_REPO") != env("BUILDKITE_REPO")
	}, func(audience string) []string {
		return []string{
			"  In Buildkite the agent hands out tokens by itself; where the step runs without its environment, as in a container:",
			"    export HALLMARK_IDENTITY_TOKEN=\"$(buildkite-agent oidc request-token --audience '" + audience + "' --claim organization_id,pipeline_id)\"",
		}
	}},
	{"CircleCI", is("CIRCLECI", "true"), has("CIRCLE_PR_REPONAME"), func(audience string) []string {
		return []string{
			"  In CircleCI the token of the job is for another audience; ask for one of its own:",
			"    export HALLMARK_IDENTITY_TOKEN=\"$(circleci run oidc get --claims '{\"aud\": \"" + audience + "\"}')\"",
		}
	}},
	{"Bitbucket Pipelines", has("BITBUCKET_BUILD_NUMBER"), nil, func(audience string) []string {
		return []string{
			"  In Bitbucket Pipelines the step needs:",
			"    oidc:",
			"      audiences:",
			"        - " + audience,
		}
	}},
	{"Azure Pipelines", is("TF_BUILD", "True"), is("SYSTEM_PULLREQUEST_ISFORK", "True"), func(string) []string {
		return []string{
			"  In Azure Pipelines every token has the same audience, api://AzureADTokenExchange: an operator has to",
			"  accept it (docs/ci.md), and the step asks $SYSTEM_OIDCREQUESTURI for one and gives it in HALLMARK_IDENTITY_TOKEN.",
		}
	}},
	{"Jenkins", has("JENKINS_URL"), nil, func(audience string) []string {
		return []string{
			"  In Jenkins the job needs an OpenID Connect id token (plugin oidc-provider) with the audience " + audience + ":",
			"    withCredentials([string(credentialsId: 'hallmark', variable: 'HALLMARK_IDENTITY_TOKEN')]) { sh 'hallmark sign …' }",
		}
	}},
}

// thisCI returns the CI system that the environment looks like, nil for none.
func (a *app) thisCI() *ciSystem {
	for i := range ciSystems {
		if ciSystems[i].here(a.getenv) {
			return &ciSystems[i]
		}
	}
	return nil
}

// maxEvent bounds the file that describes what started a workflow, in bytes.
const maxEvent = 32 << 20

// gitHubFork reads the event that started the workflow. A pull request's job has the
// token's permission taken away when the change comes from another repository; one
// whose repository is gone is of that kind too.
func gitHubFork(env func(string) string) bool {
	raw, err := readBounded(env("GITHUB_EVENT_PATH"), maxEvent)
	if err != nil {
		return false
	}
	type repository struct {
		FullName string `json:"full_name"`
		Fork     bool   `json:"fork"`
	}
	var event struct {
		PullRequest *struct {
			Head struct {
				Repo *repository `json:"repo"`
			} `json:"head"`
			Base struct {
				Repo *repository `json:"repo"`
			} `json:"base"`
		} `json:"pull_request"`
	}
	if json.Unmarshal(raw, &event) != nil || event.PullRequest == nil {
		return false
	}
	head, base := event.PullRequest.Head.Repo, event.PullRequest.Base.Repo
	switch {
	case head == nil:
		return true
	case base == nil || base.FullName == "" || head.FullName == "":
		return head.Fork
	}
	// Not the flag alone: a repository that is itself a fork has pull requests of
	// its own.
	return !strings.EqualFold(head.FullName, base.FullName)
}

// gitLabFork compares the project that a merge request comes from with the one in
// which the pipeline runs, and with the one it is for.
func gitLabFork(env func(string) string) bool {
	source := env("CI_MERGE_REQUEST_SOURCE_PROJECT_ID")
	target := env("CI_MERGE_REQUEST_PROJECT_ID")
	return source != "" && (source != env("CI_PROJECT_ID") || target != "" && source != target)
}

// forkHelp is what a job for a change from a fork is told, instead of how to get a
// token: it cannot.
var forkHelp = []string{
	"  This is a pull request from a fork: it gets no token, by design, because it runs what nobody has accepted yet.",
	"  Sign after the merge: run this step on push to the branch, not for pull requests of forks.",
}

// advice says what to do in the CI system that this looks like, or in the two most
// common ones.
func (a *app) advice(audience string) []string {
	switch ci := a.thisCI(); {
	case ci == nil:
		var lines []string
		for _, s := range ciSystems {
			if s.name == "GitHub Actions" || s.name == "GitLab CI" {
				lines = append(lines, s.help(audience)...)
			}
		}
		return append(lines, "  docs/ci.md has the other CI systems.")
	case ci.fork != nil && ci.fork(a.getenv):
		return slices.Clone(forkHelp)
	default:
		return ci.help(audience)
	}
}

// variable returns the source of a token that a CI system leaves in a variable.
func variable(name string) func(context.Context, *app, string) (string, error) {
	return func(_ context.Context, a *app, _ string) (string, error) {
		if v := a.getenv(name); v != "" {
			return v, nil
		}
		return "", errNotHere
	}
}

// buildkite asks the Buildkite agent's API for a token with the ids of organisation
// and pipeline, without which it is refused: their names can be given to others.
// cosign's provider cannot ask for them.
func buildkite(ctx context.Context, a *app, audience string) (string, error) {
	access := a.getenv("BUILDKITE_AGENT_ACCESS_TOKEN")
	if access == "" {
		return "", errNotHere
	}
	client := api.NewClient(logger.Discard, api.Config{
		Token: access, Endpoint: orElse(a.getenv("BUILDKITE_AGENT_ENDPOINT"), "https://agent.buildkite.com/v3"), UserAgent: "hallmark/" + version,
	})
	token, _, err := client.OIDCToken(ctx, &api.OIDCTokenRequest{
		Job: a.getenv("BUILDKITE_JOB_ID"), Audience: audience, Claims: []string{"organization_id", "pipeline_id"},
	})
	if err != nil {
		return "", err
	}
	return token.Token, nil
}
