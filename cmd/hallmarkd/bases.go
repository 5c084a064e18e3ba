package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
)

// basesConfig says which base images are followed, and how often.
type basesConfig struct {
	Follow []string      `yaml:"follow,omitempty"`
	Every  time.Duration `yaml:"every,omitempty"`
}

// Bounds of basesConfig. The default of every is an hour.
const (
	maxFollowed  = 500
	defaultEvery = time.Hour
	leastEvery   = time.Minute
	mostEvery    = 7 * 24 * time.Hour
)

// bases is the part for package gate. Without the key nothing is followed.
func (c config) bases() (gate.Bases, error) {
	if c.Bases == nil {
		return gate.Bases{}, nil
	}
	out := gate.Bases{Every: c.Bases.Every}
	if out.Every == 0 {
		out.Every = defaultEvery
	}
	if out.Every < leastEvery || out.Every > mostEvery {
		return out, fmt.Errorf("key bases.every: %s is not from %s to %s", out.Every, leastEvery, mostEvery)
	}
	if len(c.Bases.Follow) > maxFollowed {
		return out, fmt.Errorf("key bases.follow: has %d entries, at most %d are followed", len(c.Bases.Follow), maxFollowed)
	}
	for i, s := range c.Bases.Follow {
		b, err := attest.ParseBaseTag(s)
		switch {
		case err != nil:
			return out, fmt.Errorf("key bases.follow[%d]: write HOST/PATH:TAG: %w", i, err)
		case !c.reads(b.Repository):
			return out, fmt.Errorf("key bases.follow[%d]: registry %s stands neither under registries nor, as a mirror of it, under mirrors", i, b.Repository.Host())
		case slices.Contains(out.Follow, b):
			return out, fmt.Errorf("key bases.follow[%d]: %s stands twice", i, s)
		}
		out.Follow = append(out.Follow, b)
	}
	return out, nil
}

// reads reports whether a repository can be read: from its own registry or from a
// mirror of it.
func (c config) reads(repo attest.Repository) bool {
	configured := func(host string) bool {
		return slices.ContainsFunc(c.Registries, func(r registryConfig) bool { return r.Host == host })
	}
	return configured(repo.Host()) || slices.ContainsFunc(c.Mirrors, func(m mirrorConfig) bool {
		host, _, _ := strings.Cut(m.From, "/")
		return strings.HasPrefix(string(repo), m.To+"/") && configured(host)
	})
}
