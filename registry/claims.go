package registry

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

// Annotations, and with some builders labels, that name a base (image-spec
// annotations.md).
const (
	annotationBaseName   = "org.opencontainers.image.base.name"
	annotationBaseDigest = "org.opencontainers.image.base.digest"
)

// buildpacks is the label in which the buildpacks lifecycle keeps what an image
// was made of (buildpacks spec, platform.md).
const buildpacks = "io.buildpacks.lifecycle.metadata"

// scratch is what Dockerfiles call no base at all.
const scratch = "scratch"

// scratch reports whether the caller says that there is no base.
func (k *candidate) scratch() bool { return k != nil && k.claim.Name == scratch }

// annotated returns the claims in the annotations of the index and of each
// platform's manifest.
func annotated(doc *document, parts []part) []*candidate {
	var out []*candidate
	add := func(annotations map[string]string, about []int) {
		name, digest := annotations[annotationBaseName], annotations[annotationBaseDigest]
		if name != "" || digest != "" {
			out = collect(out, named(attest.BaseFromAnnotation, name, digest), about)
		}
	}
	if doc.index != nil {
		add(doc.index.Annotations, everything(parts))
	}
	for i, p := range parts {
		add(p.doc.image.Annotations, []int{i})
	}
	return out
}

// labelled returns the claims in the labels of the platforms' configurations:
// those of the .NET SDK and of buildpacks. Builders pass the labels of a base on,
// so that they often speak of the base's base; such a claim is never a lie.
func labelled(parts []part) []*candidate {
	var out []*candidate
	for i, p := range parts {
		name, digest := p.config.labels[annotationBaseName], p.config.labels[annotationBaseDigest]
		if name != "" || digest != "" {
			out = collect(out, named(attest.BaseFromLabel, name, digest), []int{i})
		}
		if text := p.config.labels[buildpacks]; text != "" {
			out = collect(out, runImage(text), []int{i})
		}
	}
	return out
}

// runImage reads the label of the buildpacks lifecycle: runImage.reference is the
// image that the application runs on, by digest where the lifecycle read it from
// a registry.
func runImage(text string) *candidate {
	var label struct {
		RunImage struct {
			Reference string `json:"reference"`
			Image     string `json:"image"`
		} `json:"runImage"`
	}
	err := attest.StrictJSON([]byte(text), maxDepth)
	if err == nil {
		err = json.Unmarshal([]byte(text), &label)
	}
	reference := label.RunImage.Reference
	// A lifecycle that exports to a daemon writes the image's id there.
	if reference == "" || !strings.ContainsAny(reference, "/:@") {
		reference = label.RunImage.Image
	}
	k := named(attest.BaseFromLabel, reference, "")
	if err != nil {
		k.trouble = "the label " + buildpacks + " is not read alike by all parsers of JSON"
	}
	return k
}

// collect adds a claim about some parts, to an equal one if there is one.
func collect(list []*candidate, k *candidate, about []int) []*candidate {
	at := slices.IndexFunc(list, func(other *candidate) bool {
		return other.claim == k.claim && other.digest == k.digest && other.trouble == k.trouble
	})
	if at < 0 {
		list, at = append(list, k), len(list)
	}
	for _, p := range about {
		if !slices.Contains(list[at].about, p) {
			list[at].about = append(list[at].about, p)
		}
	}
	return list
}

// named reads a claim in an annotation or a label. Builders write the name
// unqualified, too, and mean Docker Hub by that.
func named(from, name, digest string) *candidate {
	k := &candidate{claim: attest.BaseClaim{From: from, Name: clip(name)}}
	repo, tag, at, err := splitReference(name, true)
	switch {
	case name == "":
		k.trouble = "the " + from + " gives a digest but no repository"
	case err != nil:
		k.trouble = "the " + from + " is no image reference"
	}
	k.repo, k.tag, k.digest = repo, tag, at
	if digest == "" {
		return k
	}
	d, err := parseDigest(digest)
	if err != nil {
		k.trouble = "the digest in the " + from + " is no sha256 digest"
		return k
	}
	if !at.IsZero() && at != d {
		k.trouble = "the " + from + " names two different digests"
	}
	k.digest = d
	return k
}

// parseHint reads the caller's claim: nil for none, BAD_REFERENCE for one that
// is neither "scratch" nor HOST/PATH[:TAG][@DIGEST] with a tag or a digest.
func parseHint(hint string) (*candidate, error) {
	k := &candidate{claim: attest.BaseClaim{From: attest.BaseFromCaller, Name: hint}}
	switch hint {
	case "":
		return nil, nil
	case scratch:
		return k, nil
	}
	var err error
	if k.repo, k.tag, k.digest, err = splitReference(hint, false); err != nil {
		return nil, err
	}
	if k.tag == "" && k.digest.IsZero() {
		return nil, attest.Errorf(attest.BadReference, "base %q needs a tag or a digest: write HOST/PATH:TAG or HOST/PATH@sha256:…, or %q for none", clip(hint), scratch)
	}
	return k, nil
}

// tagPattern is that of the distribution-spec, "Pulling manifests".
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)

// checkTag answers BAD_REFERENCE for what is no tag.
func checkTag(tag string) error {
	if !tagPattern.MatchString(tag) {
		return attest.Errorf(attest.BadReference, "%q is not a tag: letters, digits, '.', '_' and '-', at most 128", clip(tag))
	}
	return nil
}

// parseDigest is attest.ParseDigest without the zero digest, which stands for
// none here: a claim pinned to it must not be looked up by its tag.
func parseDigest(s string) (attest.Digest, error) {
	d, err := attest.ParseDigest(s)
	if err == nil && d.IsZero() {
		err = attest.Errorf(attest.BadDigest, "the digest is all zeros, which is that of nothing")
	}
	return d, err
}

// splitReference reads HOST/PATH[:TAG][@DIGEST]. With short, a name without a
// host is one of Docker Hub.
func splitReference(s string, short bool) (repo attest.Repository, tag string, d attest.Digest, err error) {
	name, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest {
		if d, err = parseDigest(digest); err != nil {
			return "", "", attest.Digest{}, err
		}
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name, tag = name[:i], name[i+1:]
		if err := checkTag(tag); err != nil {
			return "", "", attest.Digest{}, err
		}
	}
	repo, err = attest.ParseRepository(name)
	if err != nil && short {
		if !strings.Contains(name, "/") {
			name = "library/" + name
		}
		repo, err = attest.ParseRepository(dockerHub + "/" + name)
	}
	if err != nil {
		return "", "", attest.Digest{}, err
	}
	if path, ok := strings.CutPrefix(string(repo), dockerHubAPI+"/"); ok {
		repo = attest.Repository(dockerHub + "/" + path)
	}
	return repo, tag, d, nil
}
