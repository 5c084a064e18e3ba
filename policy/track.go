package policy

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/cyberphone/json-canonicalization/go/src/webpki.org/jsoncanonicalizer"
	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// Track is a promotion path for a set of repositories.
type Track struct {
	Name         string
	Reproducible bool // several provenances of one digest may name different commits
	images       []placed
	stages       []*Stage
	where        pos
}

// Stage is one step of a track.
type Stage struct {
	Name      string
	After     string // the stage that a digest must be in first; "" for none
	track     *Track
	policy    *Policy
	after     *Stage
	target    *target
	own       []placedRule
	effective []placedRule // own, and those of the stages before that are judged again
	digest    attest.Digest
	where     pos
}

// placedRule is a rule with the stage and the line that ask for it.
type placedRule struct {
	rule
	stage string
	where pos
}

// Images returns the patterns of the track's repositories.
func (t *Track) Images() []Pattern {
	out := make([]Pattern, len(t.images))
	for i, p := range t.images {
		out[i] = p.Pattern
	}
	return out
}

// Stages returns the track's stages in their order.
func (t *Track) Stages() []*Stage { return slices.Clone(t.stages) }

// Covers reports whether the track governs repo.
func (t *Track) Covers(repo attest.Repository) bool {
	_, ok := t.match(repo)
	return ok
}

// Stage returns the named stage, or STAGE_UNKNOWN with the names there are.
func (t *Track) Stage(name string) (*Stage, error) {
	var all []string
	for _, s := range t.stages {
		if s.Name == name {
			return s, nil
		}
		all = append(all, s.Name)
	}
	return nil, attest.Errorf(attest.StageUnknown, "track %q has no stage %q: its stages are %s", t.Name, clip(name), strings.Join(all, ", "))
}

// match returns what {name} stands for in repo.
func (t *Track) match(repo attest.Repository) (string, bool) {
	for _, p := range t.images {
		if name, ok := p.match(repo); ok {
			return name, true
		}
	}
	return "", false
}

// Digest returns the digest of the stage's effective rules and of the roles they
// use: it changes exactly when a decision on the same facts could.
func (s *Stage) Digest() attest.Digest { return s.digest }

// NeedsVersion reports whether the stage's target cannot be named without a
// version.
func (s *Stage) NeedsVersion() bool {
	return s.target != nil && strings.Contains(s.target.tag, "{version}")
}

// Target returns the repository and tag that a promotion of an image of repo
// writes; both are "" when the stage has no target. version is needed when the
// tag is made from it, and must be one (BAD_REQUEST).
func (s *Stage) Target(repo attest.Repository, version string) (attest.Repository, string, error) {
	if s.target == nil {
		return "", "", nil
	}
	into, err := s.target.repository(s.track, repo)
	if err != nil {
		return "", "", err
	}
	if version == "" && strings.Contains(s.target.tag, "{version}") {
		return "", "", attest.Errorf(attest.BadRequest, "the target of stage %q is %s: give --version, or build from a tag refs/tags/v…", s.Name, s.target.text)
	}
	tag := strings.ReplaceAll(s.target.tag, "{version}", version)
	if !tagPattern.MatchString(tag) {
		return "", "", attest.Errorf(attest.BadRequest, "version %q makes no tag: a tag has letters, digits and . _ -, at most 128, and starts with none of . -", clip(version))
	}
	if digestTag.MatchString(tag) {
		return "", "", attest.Errorf(attest.BadRequest, "version %q makes the tag under which a registry keeps the signatures of an image", clip(version))
	}
	return into, tag, nil
}

// Resource returns the repository that consumers of the stage pull from: that of
// its target, else repo itself.
func (s *Stage) Resource(repo attest.Repository) (attest.Repository, error) {
	if s.target == nil {
		return repo, nil
	}
	return s.target.repository(s.track, repo)
}

// target is the place that a stage writes: HOST/PATH:TAG with {name} as a whole
// segment of the path and {version} in the tag.
type target struct {
	text string
	path []string // segments, the host first
	tag  string
}

// Tags are as distribution-spec has them ("Pulling manifests").
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)

// digestTag is a tag that belongs to another image: the list of its referrers
// (distribution-spec, "Referrers Tag Schema"), or what cosign keeps beside it.
var digestTag = regexp.MustCompile(`^sha256-[0-9a-f]{64}`)

func parseTarget(s string) (*target, error) {
	i := strings.LastIndexByte(s, ':')
	if i <= strings.LastIndexByte(s, '/') || i < 0 {
		return nil, fmt.Errorf("target %q has no tag: write HOST/PATH:TAG, for example registry.example.com/prod/{name}:{version}", clip(s))
	}
	t := &target{s, strings.Split(s[:i], "/"), s[i+1:]}
	names := 0
	for k, seg := range t.path {
		if seg == "{name}" && k > 0 {
			names++
		} else if strings.ContainsAny(seg, "{}*") {
			return nil, fmt.Errorf("target %q: {name} must be a whole segment of the path, and nothing else may stand in braces", clip(s))
		}
	}
	if names > 1 || strings.Count(t.tag, "{version}") > 1 {
		return nil, fmt.Errorf("target %q: {name} and {version} may stand only once", clip(s))
	}
	sample := strings.ReplaceAll(s[:i], "{name}", "x")
	if _, err := attest.ParseRepository(sample); err != nil {
		return nil, fmt.Errorf("target %q: %s is not HOST/PATH in lower case", clip(s), clip(sample))
	}
	if tag := strings.ReplaceAll(t.tag, "{version}", "1"); !tagPattern.MatchString(tag) {
		return nil, fmt.Errorf("target %q: tag %q is not made of letters, digits and . _ -", clip(s), clip(t.tag))
	}
	return t, nil
}

func (t *target) named() bool {
	for _, seg := range t.path {
		if seg == "{name}" {
			return true
		}
	}
	return false
}

func (t *target) repository(track *Track, repo attest.Repository) (attest.Repository, error) {
	name, ok := track.match(repo)
	if !ok {
		return "", attest.Errorf(attest.TrackUnknown, "%s is not in track %q", repo, track.Name)
	}
	return attest.ParseRepository(strings.ReplaceAll(strings.Join(t.path, "/"), "{name}", name))
}

// from returns the repositories that the target writes for images of p.
func (t *target) from(p Pattern) []tok {
	var out []tok
	for _, seg := range t.path {
		if seg != "{name}" {
			out = append(out, tok{literal, seg})
			continue
		}
		out = append(out, tok{one, ""})
		if p.last >= 0 && p.last+1 < len(p.toks) && p.toks[p.last+1].kind == many {
			out = append(out, tok{many, ""})
		}
	}
	return out
}

// sharesTag reports whether two targets may have one tag.
func (t *target) sharesTag(u *target) bool {
	a, b := t.tag, u.tag
	if !strings.Contains(a, "{version}") {
		a, b = b, a
	}
	pre, post, open := strings.Cut(a, "{version}")
	if !open {
		return a == b
	}
	if strings.Contains(b, "{version}") {
		return true // some pair of versions may do it
	}
	return len(b) > len(pre)+len(post) && strings.HasPrefix(b, pre) && strings.HasSuffix(b, post)
}

// targets notes where two images could be written to one place, within a stage,
// and between stages and tracks.
func (l *loader) targets(p *Policy) {
	type place struct {
		s *Stage
		i placed
	}
	var all []place
	for _, t := range p.tracks {
		for _, s := range t.stages {
			if s.target == nil {
				continue
			}
			for _, i := range t.images {
				if !l.apartWithin(s, i) {
					return
				}
				all = append(all, place{s, i})
			}
		}
	}
	for k, a := range all {
		for _, b := range all[:k] {
			same := a.s.track == b.s.track && a.i.where == b.i.where && a.i.text == b.i.text
			if same && strings.Join(a.s.target.path, "/") == strings.Join(b.s.target.path, "/") {
				continue // one pattern, one template: different images, different places
			}
			if a.s.target.sharesTag(b.s.target) && intersects(a.s.target.from(a.i.Pattern), b.s.target.from(b.i.Pattern)) {
				l.failAt(a.s.where, "target %q of stage %s/%s for images %q can be the same as %q of stage %s/%s for images %q (%s): two images would take turns there",
					a.s.target.text, a.s.track.Name, a.s.Name, a.i, b.s.target.text, b.s.track.Name, b.s.Name, b.i, b.s.where)
				return
			}
		}
	}
}

// apartWithin reports whether different images of one pattern have different
// targets.
func (l *loader) apartWithin(s *Stage, i placed) bool {
	switch {
	case s.target.named():
		if err := i.named(); err != nil {
			l.failAt(s.where, "target %q of stage %s/%s: %s", s.target.text, s.track.Name, s.Name, err)
			return false
		}
	case i.last >= 0:
		l.failAt(s.where, "target %q of stage %s/%s has no {name}, and %q selects many images: all would be written to one place",
			s.target.text, s.track.Name, s.Name, i)
		return false
	}
	return true
}

// Names are used in URIs, levels and facets.
var namePattern = regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`)

func (l *loader) word(what string, into *string) func(*yaml.Node) {
	return func(n *yaml.Node) {
		var s string
		if l.text(what, &s)(n); s == "" {
			return
		}
		if !namePattern.MatchString(s) {
			l.fail(n, "%s %q must be lower-case letters, digits and -, start with a letter, and be at most 63 long", what, clip(s))
			return
		}
		*into = s
	}
}

func (l *loader) track(n *yaml.Node, p *Policy) {
	t := &Track{where: l.at(n)}
	var stages *yaml.Node
	l.mapping(n, "a track", fields{
		"name":         l.word("track name", &t.Name),
		"images":       l.patterns(&t.images, false),
		"reproducible": l.flag("reproducible", &t.Reproducible),
		"stages":       func(n *yaml.Node) { stages = n },
	}, "name", "images", "stages")
	for i, a := range t.images {
		for _, b := range t.images[:i] {
			if a.Overlaps(b.Pattern) {
				l.failAt(a.where, "images %q overlap with %q (%s): {name} would have two meanings", a, b, b.where)
			}
		}
	}
	if stages != nil {
		l.list(stages, "stages", func(c *yaml.Node) { l.stage(c, t, p) })
		if stages.Kind == yaml.SequenceNode && len(stages.Content) == 0 {
			l.fail(stages, "track %q has no stages", t.Name)
		}
	}
	p.tracks = append(p.tracks, t)
}

func (l *loader) stage(n *yaml.Node, t *Track, p *Policy) {
	s := &Stage{track: t, policy: p, where: l.at(n)}
	good := l.mapping(n, "a stage", fields{
		"name": l.word("stage name", &s.Name),
		"after": func(n *yaml.Node) {
			if l.word("after", &s.After)(n); s.After != "" {
				l.after(n, s)
			}
		},
		"target": func(n *yaml.Node) {
			var text string
			if l.text("target", &text)(n); text == "" {
				return
			}
			var err error
			if s.target, err = parseTarget(text); err != nil {
				l.fail(n, "%s", err)
			}
		},
		"rules": func(n *yaml.Node) {
			l.list(n, "rules", func(c *yaml.Node) { l.rule(c, s) })
		},
	}, "name")
	for _, other := range t.stages {
		if other.Name == s.Name && s.Name != "" {
			l.fail(n, "stage %q stands already at %s", s.Name, other.where)
		}
	}
	s.effective = s.own
	for b := s.after; b != nil; b = b.after {
		s.effective = inherit(s.effective, b.own)
	}
	if good {
		l.complete(n, s)
	}
	t.stages = append(t.stages, s)
}

func (l *loader) after(n *yaml.Node, s *Stage) {
	known := map[string]bool{}
	for _, b := range s.track.stages {
		if b.Name == s.After {
			s.after = b
			return
		}
		known[b.Name] = true
	}
	l.fail(n, "after names %q, which is no earlier stage of track %q%s", s.After, s.track.Name, suggest(s.After, known))
}

// complete demands that nothing reaches a stage unsigned or without provenance:
// a stage, or one before it, asks for both (attacks D08).
func (l *loader) complete(n *yaml.Node, s *Stage) {
	for _, kind := range []string{kindSignedBy, kindProvenance} {
		asked := false
		for _, r := range s.effective {
			asked = asked || r.kind() == kind
		}
		if !asked {
			l.fail(n, "stage %q has no %s rule, and no stage before it has one: anything would pass", s.Name, kind)
		}
	}
}

// inherit puts the rules of an earlier stage that are judged again before rules,
// each once.
func inherit(rules, earlier []placedRule) []placedRule {
	var out []placedRule
	have := map[string]bool{}
	for _, r := range rules {
		have[fingerprint(r)] = true
	}
	for _, r := range earlier {
		if r.carried() && !have[fingerprint(r)] {
			out = append(out, r)
		}
	}
	return append(out, rules...)
}

func fingerprint(r rule) string {
	b, err := json.Marshal(r.spec())
	if err != nil {
		panic(err) // a struct of strings, numbers and lists always marshals
	}
	return r.kind() + string(b)
}

// seal computes the stage digests of a policy without faults.
func (p *Policy) seal() {
	for _, t := range p.tracks {
		for _, s := range t.stages {
			s.digest = s.fingerprint()
		}
	}
}

// fingerprint is the SHA-256 of the canonical JSON (RFC 8785) of all that a
// decision about this stage depends on: its effective rules, its place, its
// target, and who may promote its images (design section 5, natural keys).
func (s *Stage) fingerprint() attest.Digest {
	type ruleSpec struct {
		Stage string `json:"stage"`
		Kind  string `json:"kind"`
		Spec  any    `json:"spec"`
	}
	type who struct {
		Name   string   `json:"name"`
		Issuer string   `json:"issuer"`
		URL    string   `json:"issuer_url"`
		Images []string `json:"images"`
		When   string   `json:"when"`
		Until  string   `json:"until"`
	}
	v := struct {
		Track        string     `json:"track"`
		Stage        string     `json:"stage"`
		After        string     `json:"after"`
		Target       string     `json:"target"`
		Images       []string   `json:"images"`
		Reproducible bool       `json:"reproducible"`
		Rules        []ruleSpec `json:"rules"`
		Promoters    []who      `json:"promoters"`
	}{Track: s.track.Name, Stage: s.Name, After: s.After, Images: texts(s.track.images), Reproducible: s.track.Reproducible}
	if s.target != nil {
		v.Target = s.target.text
	}
	for _, r := range s.effective {
		v.Rules = append(v.Rules, ruleSpec{r.stage, r.kind(), r.spec()})
	}
	for _, e := range s.policy.roles[Promoters] {
		if reaches(e.images, s.track.images) {
			v.Promoters = append(v.Promoters, who{e.name, e.issuer, s.policy.known.IssuerURLs[e.issuer], texts(e.images), e.when.text, e.date})
		}
	}
	raw, err := json.Marshal(v)
	if err == nil {
		raw, err = jsoncanonicalizer.Transform(raw)
	}
	if err != nil {
		panic(err) // a struct of strings, numbers and lists always marshals
	}
	return attest.Hash(raw)
}

func reaches(a, b []placed) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y.Pattern) {
				return true
			}
		}
	}
	return false
}

func texts(patterns []placed) []string {
	out := make([]string, len(patterns))
	for i, p := range patterns {
		out[i] = p.text
	}
	return out
}
