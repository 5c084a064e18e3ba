package attest

// The types that replace these are protobuf, which marshals in no stable order.
//lint:file-ignore SA1019 for that reason

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/common"
	slsa "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v1"
)

// Build types: what a reader of the provenance may expect in it.
const (
	// BuildTypeGitHub is GitHub's own, used for exactly the events that it
	// covers and with exactly its parameters (actions/buildtypes workflow/v1).
	BuildTypeGitHub = "https://actions.github.io/buildtypes/workflow/v1"
	// BuildTypeOIDC is ours, for every other verified token: docs/buildtypes/oidc-v1.md.
	BuildTypeOIDC = "https://github.com/hallmarkd/hallmark/buildtypes/oidc/v1"
)

// Grade says how a provenance field is known (design promise 2).
type Grade string

// The grades. Only the last one is the caller's word.
const (
	GradeClaim    Grade = "claim"    // a verified token said so
	GradeRegistry Grade = "registry" // read from the registry and verified by digest
	GradeSource   Grade = "source"   // read from the source repository
	GradeAttested Grade = "attested" // a signed attestation said so
	GradeCaller   Grade = "caller"   // the caller said so; nothing verifies it
)

// Rank orders grades: a policy's min_grade admits a field of at least its rank.
func (g Grade) Rank() int {
	return slices.Index([]Grade{"", GradeCaller, GradeAttested, GradeSource, GradeRegistry, GradeClaim}, g)
}

// hostedRunners are the values of Build.Runner by which a provider says that the
// runner is its own. Of another provider's runners nothing is known.
var hostedRunners = map[string]string{"github": "github-hosted", "gitlab": "gitlab-hosted", "buildkite": "buildkite-hosted"}

// gitHubEvents are those that GitHub's build type covers. The sha claim is then
// the commit that was built.
var gitHubEvents = []string{"create", "push", "release", "workflow_dispatch"}

// CommitPattern is what counts as a commit: a full SHA-1 or SHA-256 object name.
var CommitPattern = regexp.MustCompile(`^(?:[0-9a-f]{40}|[0-9a-f]{64})$`)

// MaySign refuses whoever is no CI job (SOURCE_NOT_ALLOWED), and a job that may run
// code which nobody has accepted into the repository (EVENT_NOT_ALLOWED): a pull
// request's token has the same repository claims (attacks B01).
func (id Identity) MaySign() error {
	if id.Kind != Workload {
		return Errorf(SourceNotAllowed, "%s is a %s: only a CI job signs images", id.SAN, id.Kind)
	}
	return id.MayChange("sign")
}

// MayChange refuses a job that may run code which nobody has accepted
// (EVENT_NOT_ALLOWED): it may ask, and change nothing. what completes "may not".
func (id Identity) MayChange(what string) error {
	if id.Unaccepted != "" {
		return Errorf(EventNotAllowed, "%s may not %s: %s", id.SAN, what, id.Unaccepted)
	}
	return nil
}

// BuilderID returns the builder id for the job behind id (design section 6):
// each mode of different trust has its own.
func BuilderID(service string, id Identity) string {
	if id.Reusable != "" {
		return reusablePrefix(service, id.Provider) + id.Reusable
	}
	return service + "/builders/" + id.Provider + "/" + hosting(id.Provider, id.Build) + "/v1"
}

func reusablePrefix(service, provider string) string {
	return service + "/builders/" + provider + "/reusable/"
}

func hosting(provider string, b Build) string {
	if hosted := hostedRunners[provider]; hosted != "" && b.Runner == hosted {
		return "hosted"
	}
	// A runner of which the token says nothing is nobody's hosted platform.
	return "self-hosted"
}

// BuilderFits reports whether a builder id is the one that this service gives to a
// job with these claims. Which reusable workflows are listed is asked when signing;
// here the workflow that the id names must be the one that ran the job, pinned to a
// commit and on a hosted runner (attacks B04, B08, D10).
func BuilderFits(service, builderID, provider string, b Build) bool {
	workflow, ok := strings.CutPrefix(builderID, reusablePrefix(service, provider))
	if !ok {
		return builderID == BuilderID(service, Identity{Provider: provider, Build: b})
	}
	server := b.OwnerURI[:strings.LastIndexByte(b.OwnerURI, '/')+1]
	return workflow != "" && server != "" && strings.HasPrefix(b.SignerURI, server+workflow+"@") &&
		CommitPattern.MatchString(b.SignerDigest) && hosting(provider, b) == "hosted"
}

// BuildLevel returns the SLSA build level that a provenance with this builder
// id supports: 3 for a listed reusable workflow, whose steps the repository that is
// built cannot alter; 2 for a hosted platform whose signed claims were read directly;
// 1 for a runner that its tenant controls (ci-identity 2.2). A builder of another
// service supports 0.
func BuildLevel(service, builderID string) int {
	rest, ok := strings.CutPrefix(builderID, service+"/builders/")
	if !ok {
		return 0
	}
	switch parts := strings.Split(rest, "/"); {
	case len(parts) >= 5 && parts[1] == "reusable":
		return 3
	case len(parts) == 3 && parts[1] == "hosted" && parts[2] == "v1":
		return 2
	case len(parts) == 3 && parts[1] == "self-hosted" && parts[2] == "v1":
		return 1
	}
	return 0
}

// InternalParameters are the parts of a build definition that are ours, beside
// those of the build type: a prefixed name is how the specification lets producers extend it.
type InternalParameters struct {
	GitHub  *gitHubParameters `json:"github,omitempty"`
	Claims  Build             `json:"hallmark_claims"`
	Grades  map[string]Grade  `json:"hallmark_grades"`
	Caller  map[string]string `json:"hallmark_caller,omitempty"` // what the caller merely said; see CallerFacts
	Hints   *hints            `json:"hallmark_hints,omitempty"`
	Base    Base              `json:"hallmark_base"`
	Request string            `json:"hallmark_request"`
	Token   TokenUse          `json:"hallmark_token"`
}

type gitHubParameters struct {
	EventName         string `json:"event_name"`
	RepositoryID      string `json:"repository_id"`
	RepositoryOwnerID string `json:"repository_owner_id"`
	RunnerEnvironment string `json:"runner_environment"`
}

// hints are what the caller merely said.
type hints struct {
	Base string `json:"base,omitempty"`
}

// TokenUse records which token was used, so that its reuse can be counted after
// any loss of the index. It holds nothing that the token's signature protects.
type TokenUse struct {
	ID       string `json:"id"`
	Issuer   string `json:"issuer"`
	Subject  string `json:"subject"`
	Provider string `json:"provider"`
	Expires  string `json:"expires"`
	// Use is the key of the one request that a token of an issuer with replay:
	// once is good for; else "".
	Use string `json:"use,omitempty"`
}

type workflowParameters struct {
	Workflow struct {
		Ref        string `json:"ref"`
		Repository string `json:"repository"`
		Path       string `json:"path"`
	} `json:"workflow"`
}

type oidcParameters struct {
	Source string `json:"source"`
	Ref    string `json:"ref,omitempty"`
	Config string `json:"config,omitempty"`
}

// ProvenanceInput is what a provenance is made from: verified claims, registry
// facts, and the caller's hints.
type ProvenanceInput struct {
	Service  string            // the service's public_url
	Image    Image             //
	Builder  Identity          //
	BaseHint string            // the caller's --base, as given
	Facts    map[string]string // what the caller merely says; CallerFacts has passed them
	Request  string            // natural key
	Use      string            // key of the whole request, for a token that is good for one
	Finished time.Time         // when the digest was presented for signing
}

// ProvenanceStatement returns a SLSA provenance v1 statement (slsa.dev/spec/v1.2,
// build-provenance) about the image and all its platforms.
func ProvenanceStatement(in ProvenanceInput) ([]byte, error) {
	b := in.Builder.Build
	internal := InternalParameters{
		Claims: b, Base: in.Image.Base, Request: in.Request, Caller: in.Facts,
		Token: TokenUse{in.Builder.TokenID, in.Builder.Issuer, in.Builder.Subject, in.Builder.Provider, Time(in.Builder.Expires), in.Use},
	}
	if in.BaseHint != "" {
		internal.Hints = &hints{in.BaseHint}
	}
	def := slsa.ProvenanceBuildDefinition{BuildType: BuildTypeOIDC}
	switch {
	case in.Builder.Provider == "github" && slices.Contains(gitHubEvents, b.Event):
		def.BuildType = BuildTypeGitHub
		var ext workflowParameters
		ext.Workflow.Ref, ext.Workflow.Repository, ext.Workflow.Path = b.Ref, b.SourceURI, b.WorkflowPath
		def.ExternalParameters = ext
		internal.GitHub = &gitHubParameters{b.Event, b.RepositoryID, b.OwnerID, b.Runner}
	case b.HasSource():
		def.ExternalParameters = oidcParameters{Source: b.SourceURI, Ref: b.Ref, Config: b.ConfigURI}
	default:
		// A repository without a commit is no source that anybody could rebuild from.
		def.ExternalParameters = oidcParameters{Source: SourceUnknown}
	}
	var fromRegistry bool
	def.ResolvedDependencies, fromRegistry = dependencies(b, in.Image.Base)
	internal.Grades = grades(def, fromRegistry, in)
	def.InternalParameters = internal

	finished := in.Finished.UTC().Truncate(time.Second)
	return marshal(PredicateProvenance, subjects(in.Image.Ref.Repository, in.Image.Digests()), slsa.ProvenancePredicate{
		BuildDefinition: def,
		RunDetails: slsa.ProvenanceRunDetails{
			Builder: slsa.Builder{ID: BuilderID(in.Service, in.Builder)},
			BuildMetadata: slsa.BuildMetadata{
				InvocationID: in.Builder.Run(),
				// Conforma picks the newest of several provenances by this field.
				FinishedOn: &finished,
			},
		},
	})
}

// SourceUnknown stands for the source of a build whose token names no commit.
const SourceUnknown = "UNKNOWN"

// dependencies lists the source with and without its ref (Conforma compares the
// URI without), the workflow that ran the job, and the base image; the flag says
// whether the last one is a base.
func dependencies(b Build, base Base) ([]slsa.ResourceDescriptor, bool) {
	var out []slsa.ResourceDescriptor
	if b.HasSource() {
		commit := common.DigestSet{"gitCommit": b.Commit}
		if b.Ref != "" {
			out = append(out, slsa.ResourceDescriptor{URI: "git+" + b.SourceURI + "@" + b.Ref, Digest: commit})
		}
		out = append(out, slsa.ResourceDescriptor{URI: "git+" + b.SourceURI, Digest: commit})
	}
	if b.SignerURI != "" && CommitPattern.MatchString(b.SignerDigest) {
		out = append(out, slsa.ResourceDescriptor{
			Name: "build-workflow", URI: "git+" + b.SignerURI, Digest: common.DigestSet{"gitCommit": b.SignerDigest},
		})
	}
	if base.Digest.IsZero() || base.Result == Contradicted {
		return out, false
	}
	return append(out, slsa.ResourceDescriptor{
		Name: "base-image", URI: base.PackageURL(),
		Digest: common.DigestSet{"sha256": base.Digest.Hex()},
		Annotations: map[string]any{
			"hallmark_result": string(base.Result),
			"hallmark_layers": base.layers(),
		},
	}), true
}

// grades says for each field how it is known, by JSON pointer into the statement.
// What has none is the service's own word: the build type, when it was finished, the
// key of the request, and these grades.
func grades(def slsa.ProvenanceBuildDefinition, fromRegistry bool, in ProvenanceInput) map[string]Grade {
	b := in.Builder.Build
	const d = "/predicate/buildDefinition"
	g := map[string]Grade{
		"/subject": GradeCaller, // that this job built this digest is the job's word
		d + "/internalParameters/hallmark_claims":     GradeClaim,
		"/predicate/runDetails/builder/id":            GradeClaim,
		"/predicate/runDetails/metadata/invocationId": GradeClaim,
	}
	if b.HasSource() {
		g[d+"/externalParameters"] = GradeClaim
	}
	if def.BuildType == BuildTypeGitHub {
		g[d+"/internalParameters/github"] = GradeClaim
	}
	// The key of the request stands beside the token's claims and is none.
	token := []string{""}
	if in.Use != "" {
		token = []string{"/id", "/issuer", "/subject", "/provider", "/expires"}
	}
	for _, field := range token {
		g[d+"/internalParameters/hallmark_token"+field] = GradeClaim
	}
	gradeBase(g, d+"/internalParameters/hallmark_base", in.Image.Base)
	if in.BaseHint != "" {
		g[d+"/internalParameters/hallmark_hints"] = GradeCaller
	}
	if len(in.Facts) > 0 {
		g[d+"/internalParameters/hallmark_caller"] = GradeCaller
	}
	for i := range def.ResolvedDependencies {
		g[d+"/resolvedDependencies/"+strconv.Itoa(i)] = GradeClaim
	}
	if fromRegistry {
		g[d+"/resolvedDependencies/"+strconv.Itoa(len(def.ResolvedDependencies)-1)] = in.Image.Base.Result.Grade()
	}
	return g
}

// gradeBase grades what is said of the base. Who claimed it, and under which tag,
// stays somebody's word even where the layers prove the base.
func gradeBase(g map[string]Grade, at string, b Base) {
	grade := b.Result.Grade()
	if grade == "" {
		return
	}
	g[at] = grade
	if grade == GradeCaller {
		return
	}
	if b.Tag != "" && b.Result != Matched {
		g[at+"/tag"] = GradeCaller
	}
	for i, e := range b.Equivalents {
		if e.Tag != "" {
			g[at+"/equivalents/"+strconv.Itoa(i)+"/tag"] = GradeCaller
		}
	}
	if len(b.Claims) > 0 {
		g[at+"/claims"] = GradeCaller
	}
}
