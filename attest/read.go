package attest

import (
	"bytes"
	"encoding/json"
	"fmt"
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
		var said, want workflowParameters
		want.Workflow.Ref, want.Workflow.Repository, want.Workflow.Path = c.Ref, c.SourceURI, c.WorkflowPath
		return sameParameters(raw, &said, want)
	case BuildTypeOIDC:
		var said oidcParameters
		want := oidcParameters{Source: SourceUnknown}
		if c.HasSource() {
			want = oidcParameters{c.SourceURI, c.Ref, c.ConfigURI}
		}
		return sameParameters(raw, &said, want)
	}
	return Errorf(StatementMalformed, "build type %q is none that this service writes", clip(p.BuildDefinition.BuildType))
}

func sameParameters[T comparable](raw []byte, said *T, want T) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(said); err != nil {
		return Errorf(StatementMalformed, "external parameters are not those of the build type: %w", err)
	}
	if *said != want {
		return Errorf(StatementMalformed, "external parameters say something else than the verified claims")
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
