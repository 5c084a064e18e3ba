package attest

import (
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
