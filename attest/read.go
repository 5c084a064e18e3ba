package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/common"
)

// Provenance is the reader's view of a SLSA provenance v1 predicate that this
// service wrote.
type Provenance struct {
	BuildDefinition struct {
		BuildType            string             `json:"buildType"`
		ExternalParameters   json.RawMessage    `json:"externalParameters"`
		InternalParameters   InternalParameters `json:"internalParameters"`
		ResolvedDependencies []struct {
			Name   string           `json:"name"`
			URI    string           `json:"uri"`
			Digest common.DigestSet `json:"digest"`
		} `json:"resolvedDependencies"`
	} `json:"buildDefinition"`
	RunDetails struct {
		Builder struct {
			ID string `json:"id"`
		} `json:"builder"`
		Metadata struct {
			InvocationID string `json:"invocationId"`
			FinishedOn   string `json:"finishedOn"`
		} `json:"metadata"`
	} `json:"runDetails"`
}

// ParseProvenance reads a predicate that Hallmark signed. The bytes must come
// from a verified envelope.
func ParseProvenance(predicate json.RawMessage) (Provenance, error) {
	var p Provenance
	if err := json.Unmarshal(predicate, &p); err != nil {
		return Provenance{}, fmt.Errorf("parsing provenance: %w", err)
	}
	return p, nil
}

// Internal returns Hallmark's own part of the provenance.
func (p Provenance) Internal() InternalParameters { return p.BuildDefinition.InternalParameters }

// Source returns the repository URI, ref and commit that the token named.
func (p Provenance) Source() (uri, ref, commit string) {
	c := p.Internal().Claims
	return c.SourceURI, c.Ref, c.Commit
}

// Grade returns the grade of the field at a JSON pointer into the statement: its
// own, or that of the nearest enclosing field that has one.
func (p Provenance) Grade(pointer string) Grade {
	for {
		if g, ok := p.Internal().Grades[pointer]; ok {
			return g
		}
		i := strings.LastIndexByte(pointer, '/')
		if i <= 0 {
			return ""
		}
		pointer = pointer[:i]
	}
}

// CheckParameters refuses a provenance whose external parameters are not exactly those
// of its build type, or say something else than its verified claims: an unknown
// parameter is one that nobody judged (SLSA verifying-artifacts step 2, attacks D11).
// STATEMENT_MALFORMED.
func (p Provenance) CheckParameters() error {
	c := p.Internal().Claims
	raw := p.BuildDefinition.ExternalParameters
	if err := StrictJSON(raw, 8); err != nil {
		return Errorf(StatementMalformed, "external parameters: %w", err)
	}
	switch p.BuildDefinition.BuildType {
	case BuildTypeGitHub:
		// GitHub's reader finds some claims a second time, under GitHub's names.
		if g := p.Internal().GitHub; g == nil || !slices.Contains(gitHubEvents, c.Event) || *g != (gitHubParameters{c.Event, c.RepositoryID, c.OwnerID, c.Runner}) {
			return Errorf(StatementMalformed, "the build type is GitHub's and its internal parameters are not what the verified claims give")
		}
		var want workflowParameters
		want.Workflow.Ref, want.Workflow.Repository, want.Workflow.Path = c.Ref, c.SourceURI, c.WorkflowPath
		return sameParameters(raw, want)
	case BuildTypeOIDC:
		want := oidcParameters{Source: SourceUnknown}
		if c.HasSource() {
			want = oidcParameters{c.SourceURI, c.Ref, c.ConfigURI}
		}
		return sameParameters(raw, want)
	}
	return Errorf(StatementMalformed, "build type %q is none that this service writes", clip(p.BuildDefinition.BuildType))
}

// sameParameters compares names exactly, where decoding into a struct would take
// "SOURCE" for "source".
func sameParameters(raw []byte, want any) error {
	written, err := json.Marshal(want)
	if err != nil {
		return fmt.Errorf("marshalling external parameters: %w", err)
	}
	var said, expected any
	if err := errors.Join(json.Unmarshal(raw, &said), json.Unmarshal(written, &expected)); err != nil {
		return Errorf(StatementMalformed, "external parameters cannot be read: %w", err)
	}
	if !reflect.DeepEqual(said, expected) {
		return Errorf(StatementMalformed, "external parameters are not exactly what build type and verified claims give")
	}
	return nil
}

// Summary names the source in one line for people: repository, ref without its
// prefix, short commit and run.
func (p Provenance) Summary() string {
	c := p.Internal().Claims
	parts := []string{c.Repository}
	if c.Repository == "" {
		parts[0] = c.SourceURI
	}
	ref := strings.TrimPrefix(strings.TrimPrefix(c.Ref, "refs/heads/"), "refs/tags/")
	commit := c.Commit
	if len(commit) > 7 {
		commit = commit[:7]
	}
	parts = append(parts, ref, commit)
	if c.RunID != "" {
		parts = append(parts, "run "+c.RunID)
	}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " ")
}
