// Package policy decides: it reads the policy file, says which caller holds
// which role for which repository, and judges verified evidence about a digest
// by the rules of a stage. It does no I/O but reading the policy, and it takes
// evidence only as the verifier makes it.
package policy

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/hallmarkd/hallmark/attest"
)

// maxPolicy bounds the text of a policy, all files together, in bytes
// (attacks J03).
const maxPolicy = 1 << 20

// Known is what the policy may refer to.
type Known struct {
	Issuers    map[string]attest.Kind // by name in the configuration
	IssuerURLs map[string]string      // name -> iss, byte for byte
	Roots      map[string]bool        // names of the configured foreign roots
	Service    string                 // public_url, which names the builders
	Now        func() time.Time       // for role entries that end; time.Now when nil
}

// Policy is a loaded and checked policy. It does not change and is safe for
// concurrent use.
type Policy struct {
	version int
	text    string
	roles   map[Role][]*entry
	tracks  []*Track
	known   Known
	types   structs
	// issuerURLs are those of Known, for evidence.
	issuerURLs []string
}

// Load reads a policy file, or a directory whose *.yaml and *.yml files are read
// in the order of their names as one policy: version stands in exactly one,
// lists are joined. Anything unknown, missing, ambiguous or without effect is
// BAD_POLICY; its message has a line "FILE:LINE: what is wrong" for each problem
// (at most 20) and its metadata has the first file and line.
func Load(path string, known Known) (*Policy, error) {
	files, err := read(path)
	if err != nil {
		return nil, err
	}
	if known.Now == nil {
		known.Now = time.Now
	}
	cond, err := newEnvironments()
	if err != nil {
		return nil, err
	}
	l := &loader{known: known, cond: cond}
	p := &Policy{text: canonical(files), roles: map[Role][]*entry{}, known: known, types: cond.types, issuerURLs: slices.Collect(maps.Values(known.IssuerURLs))}
	var versions []pos
	for _, f := range files {
		l.file = f.name
		if root := l.parse(f.text); root != nil {
			l.top(root, p, &versions)
		}
	}
	l.file = files[0].name
	l.whole(p, versions)
	if err := l.err(); err != nil {
		return nil, err
	}
	p.seal()
	return p, nil
}

// Version returns the policy's number, 1 or more.
func (p *Policy) Version() int { return p.version }

// Text returns the policy as it is recorded: of a file its bytes; of a directory
// each file in the order of names, under a line "# === NAME".
func (p *Policy) Text() string { return p.text }

// Digest returns the SHA-256 of Text.
func (p *Policy) Digest() attest.Digest { return attest.Hash([]byte(p.text)) }

// Stages returns the digest of every stage's effective rules by "track/stage".
func (p *Policy) Stages() map[string]attest.Digest {
	out := map[string]attest.Digest{}
	for _, t := range p.tracks {
		for _, s := range t.stages {
			out[t.Name+"/"+s.Name] = s.digest
		}
	}
	return out
}

// source is one file of a policy.
type source struct {
	name string
	text []byte
}

func read(path string) ([]source, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, attest.Errorf(attest.BadPolicy, "reading policy: %w", err)
	}
	paths := []string{path}
	if info.IsDir() {
		if paths, err = list(path); err != nil {
			return nil, err
		}
	}
	var out []source
	left := int64(maxPolicy)
	for _, p := range paths {
		text, err := readFile(p, left)
		if err != nil {
			return nil, err
		}
		left -= int64(len(text))
		out = append(out, source{filepath.Base(p), text})
	}
	return out, nil
}

// list returns the policy files of a directory. Hidden names are left out: of a
// mounted Kubernetes volume they are the same files once more.
func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, attest.Errorf(attest.BadPolicy, "reading policy: %w", err)
	}
	var out []string
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if !strings.HasPrefix(e.Name(), ".") && !e.IsDir() && (ext == ".yaml" || ext == ".yml") {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	if len(out) == 0 {
		return nil, attest.Errorf(attest.BadPolicy, "no *.yaml or *.yml file in the policy directory %s", dir)
	}
	return out, nil
}

func readFile(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, attest.Errorf(attest.BadPolicy, "reading policy: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, attest.Errorf(attest.BadPolicy, "reading policy: %w", err)
	}
	if int64(len(text)) > most {
		return nil, attest.Errorf(attest.BadPolicy, "%s: the policy is larger than %d bytes", filepath.Base(path), maxPolicy)
	}
	return text, nil
}

func canonical(files []source) string {
	if len(files) == 1 {
		return string(files[0].text)
	}
	var b strings.Builder
	for _, f := range files {
		fmt.Fprintf(&b, "# === %s\n%s", f.name, f.text)
		if !strings.HasSuffix(string(f.text), "\n") {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// top reads one file.
func (l *loader) top(root *yaml.Node, p *Policy, versions *[]pos) {
	l.mapping(root, "the policy", fields{
		"version": func(n *yaml.Node) {
			*versions = append(*versions, l.at(n))
			l.number("version", 1, 1<<31-1, &p.version)(n)
		},
		"roles":  func(n *yaml.Node) { l.roles(n, p) },
		"tracks": func(n *yaml.Node) { l.list(n, "tracks", func(c *yaml.Node) { l.track(c, p) }) },
	})
}

// whole checks what only all files together can show.
func (l *loader) whole(p *Policy, versions []pos) {
	if len(versions) == 0 {
		l.failAt(pos{l.file, 1}, `the policy has no "version": a number from 1 that rises with every change`)
	}
	for _, v := range versions[min(1, len(versions)):] {
		l.failAt(v, "version stands already at %s", versions[0])
	}
	for i, t := range p.tracks {
		for _, u := range p.tracks[:i] {
			l.apart(t, u)
		}
	}
	l.levels(p)
	l.targets(p)
}

// levels notes two stages whose summaries would name the same level: that of one
// would pass for the other's (attacks M02).
func (l *loader) levels(p *Policy) {
	seen := map[string]*Stage{}
	for _, t := range p.tracks {
		for _, s := range t.stages {
			level := attest.StageLevel(t.Name, s.Name)
			if other := seen[level]; other != nil && other.track != t {
				l.failAt(s.where, "stage %s/%s has the level %s, as has %s/%s (%s): rename one", t.Name, s.Name, level, other.track.Name, other.Name, other.where)
			}
			seen[level] = s
		}
	}
}

// apart notes what two tracks must not share: a name, or an image.
func (l *loader) apart(t, u *Track) {
	if t.Name == u.Name && t.Name != "" {
		l.failAt(t.where, "track %q stands already at %s", t.Name, u.where)
	}
	for _, a := range t.images {
		for _, b := range u.images {
			if a.Overlaps(b.Pattern) {
				l.failAt(a.where, "images %q of track %q overlap with %q of track %q (%s): an image belongs to one track",
					a, t.Name, b, u.Name, b.where)
			}
		}
	}
}

// Track returns the track that governs repo; name may be empty, because there
// is never more than one. TRACK_UNKNOWN when there is none, or not of that name:
// which tracks exist for other images is not told.
func (p *Policy) Track(repo attest.Repository, name string) (*Track, error) {
	for _, t := range p.tracks {
		if _, ok := t.match(repo); !ok {
			continue
		}
		if name != "" && name != t.Name {
			return nil, attest.Errorf(attest.TrackUnknown, "%s is in track %q, not in %q: leave the track out or correct it", repo, t.Name, name)
		}
		return t, nil
	}
	return nil, attest.Errorf(attest.TrackUnknown, "no track of the policy covers %s: add its pattern to the images of a track", repo)
}

// Tracks returns all tracks in the order of the policy.
func (p *Policy) Tracks() []*Track { return slices.Clone(p.tracks) }

// now is the time of a request, or that of the clock.
func (p *Policy) now(req Request) time.Time {
	if req.Now.IsZero() {
		return p.known.Now()
	}
	return req.Now
}
