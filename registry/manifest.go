package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/hallmarkd/hallmark/attest"
)

// accepted are the only documents that have a meaning here.
var accepted = []string{
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2),
	string(types.OCIImageIndex), string(types.DockerManifestList),
}

// document is a manifest or an index whose bytes were hashed here.
type document struct {
	raw       []byte
	digest    attest.Digest
	mediaType types.MediaType
	image     *v1.Manifest // one of the two is set
	index     *v1.IndexManifest
}

// document fetches a manifest or index by digest. The bytes hash to it or the
// answer is DIGEST_MISMATCH, whatever the registry's headers say (G02, G03).
func (c *Client) document(ctx context.Context, repo attest.Repository, d attest.Digest) (*document, error) {
	return c.documentOf(ctx, repo, d, maxManifest)
}

// documentOf is document for one of at most limit bytes. A larger one is TOO_LARGE.
func (c *Client) documentOf(ctx context.Context, repo attest.Repository, d attest.Digest, limit int64) (*document, error) {
	doc, err := c.getOf(ctx, repo, d.String(), limit)
	if err != nil {
		return nil, err
	}
	if doc.digest != d {
		return nil, attest.Errorf(attest.DigestMismatch, "registry %s answers for %s@%s with bytes of %s", repo.Host(), repo, d, doc.digest)
	}
	return doc, nil
}

// get fetches what reference, a digest or a tag, names.
func (c *Client) get(ctx context.Context, repo attest.Repository, reference string) (*document, error) {
	return c.getOf(ctx, repo, reference, maxManifest)
}

func (c *Client) getOf(ctx context.Context, repo attest.Repository, reference string, limit int64) (*document, error) {
	s, err := c.session(ctx, repo, transport.PullScope)
	if err != nil {
		return nil, err
	}
	// An answer that says why not has its room too: it must not pass for a large document.
	a, err := s.do(ctx, http.MethodGet, "manifests/"+reference, nil, max(limit, maxReferrer), "Accept", strings.Join(accepted, ","))
	if err != nil {
		return nil, err
	}
	if a.status == http.StatusNotFound {
		return nil, attest.Errorf(attest.SubjectNotFound, "%s has no manifest %s: push the image before it is named here", repo, reference)
	}
	if a.status != http.StatusOK {
		return nil, s.host.refusal(a.status, a.body)
	}
	if int64(len(a.body)) > limit {
		return nil, attest.Errorf(attest.TooLarge, "registry %s answers for %s with more than %d bytes", repo.Host(), repo, limit)
	}
	digest := attest.Hash(a.body)
	if says := a.header.Get("Docker-Content-Digest"); strings.HasPrefix(says, "sha256:") && says != digest.String() {
		return nil, attest.Errorf(attest.DigestMismatch, "registry %s answers for %s with a digest that is not that of its bytes", repo.Host(), repo)
	}
	free, err := take(ctx, c.room.parse, 1)
	if err != nil {
		return nil, err
	}
	doc, err := parse(a.body, a.header.Get("Content-Type"))
	free()
	if err != nil {
		return nil, err
	}
	doc.digest = digest
	return doc, nil
}

// parse reads a manifest or an index so that no other tool can read it as
// something else: its media type, that of the answer and its shape agree, and it
// is no manifest and index at once (CVE-2021-41190, image-spec manifest.md).
func parse(raw []byte, contentType string) (*document, error) {
	if tooMany(raw) {
		return nil, attest.Errorf(attest.TooLarge, "manifest has more than %d values", maxValues)
	}
	if err := attest.StrictJSON(raw, 16); err != nil {
		return nil, err
	}
	var shape map[string]any
	if json.Unmarshal(raw, &shape) != nil || shape == nil {
		return nil, attest.Errorf(attest.ManifestAmbiguous, "manifest is not a JSON object")
	}
	if err := canonicalKeys(shape); err != nil {
		return nil, err
	}
	mt, err := agreedType(shape, contentType)
	if err != nil {
		return nil, err
	}
	doc := &document{raw: raw, mediaType: mt}
	var into any
	var needs, forbids []string
	if mt.IsIndex() {
		doc.index = new(v1.IndexManifest)
		into, needs, forbids = doc.index, []string{"manifests"}, []string{"config", "layers", "fsLayers", "history", "blobs"}
	} else {
		doc.image = new(v1.Manifest)
		into, needs, forbids = doc.image, []string{"config", "layers"}, []string{"manifests", "fsLayers", "history", "blobs"}
	}
	for _, k := range needs {
		if shape[k] == nil {
			return nil, attest.Errorf(attest.ManifestAmbiguous, "document of type %s has no %s", mt, k)
		}
	}
	for _, k := range forbids {
		if _, ok := shape[k]; ok {
			return nil, attest.Errorf(attest.ManifestAmbiguous, "document of type %s also has %s: it could be read as two different things", mt, k)
		}
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return nil, &attest.Error{Reason: attest.ManifestAmbiguous, Message: "manifest does not have the fields of its type", Err: err}
	}
	return doc, doc.check()
}

// agreedType returns the one type that the answer and the document name.
func agreedType(shape map[string]any, contentType string) (types.MediaType, error) {
	t, _, err := mime.ParseMediaType(contentType)
	mt := types.MediaType(t)
	if err != nil || !mt.IsImage() && !mt.IsIndex() {
		return "", attest.Errorf(attest.ManifestAmbiguous, "registry answers with type %q, which is no image manifest or index of OCI or Docker v2", clip(contentType))
	}
	own, named := shape["mediaType"]
	// Only OCI lets a document leave its own type out.
	if named && own != t || !named && mt != types.OCIManifestSchema1 && mt != types.OCIImageIndex {
		return "", attest.Errorf(attest.ManifestAmbiguous, "registry answers with type %s, the document says %q", mt, clip(fmt.Sprint(own)))
	}
	if shape["schemaVersion"] != float64(2) {
		return "", attest.Errorf(attest.ManifestAmbiguous, "manifest's schemaVersion is not 2")
	}
	return mt, nil
}

// keys are the fields that decide what a document means.
var keys = []string{
	"schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "subject", "annotations",
	"digest", "size", "urls", "data", "platform", "architecture", "os", "os.version", "variant", "fsLayers", "history", "blobs",
}

// canonicalKeys refuses a known field in other case: encoding/json would take
// it for the field, other parsers would not see it.
func canonicalKeys(v any) error {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			if err := canonicalKeys(e); err != nil {
				return err
			}
		}
	case map[string]any:
		for k, e := range v {
			for _, known := range keys {
				if k != known && strings.EqualFold(k, known) {
					return attest.Errorf(attest.BadJSON, "manifest writes %q for %q", clip(k), known)
				}
			}
			if k == "annotations" {
				continue // its keys are anybody's
			}
			if err := canonicalKeys(e); err != nil {
				return err
			}
		}
	}
	return nil
}

// descriptors returns all that the document refers to.
func (d *document) descriptors() []v1.Descriptor {
	var out []v1.Descriptor
	var subject *v1.Descriptor
	if d.index != nil {
		out, subject = append(out, d.index.Manifests...), d.index.Subject
	} else {
		out, subject = append(append(out, d.image.Config), d.image.Layers...), d.image.Subject
	}
	if subject != nil {
		out = append(out, *subject)
	}
	return out
}

// check bounds the document and looks at every descriptor in it.
func (d *document) check() error {
	if d.index != nil && len(d.index.Manifests) > maxPlatforms {
		return attest.Errorf(attest.TooLarge, "index lists %d manifests; at most %d are supported", len(d.index.Manifests), maxPlatforms)
	}
	if d.image != nil && len(d.image.Layers) > maxLayers {
		return attest.Errorf(attest.TooLarge, "manifest lists %d layers; at most %d are supported", len(d.image.Layers), maxLayers)
	}
	for _, e := range d.descriptors() {
		// Other algorithms would let one image go by two names (G17).
		digest, err := attest.ParseDigest(e.Digest.String())
		if err != nil {
			return attest.Errorf(attest.BadDigest, "manifest refers to something by a digest that is not sha256")
		}
		if e.Size < 0 {
			return attest.Errorf(attest.ManifestAmbiguous, "manifest gives %s the size %d", digest, e.Size)
		}
		if e.Data != nil && (attest.Hash(e.Data) != digest || int64(len(e.Data)) != e.Size) {
			return attest.Errorf(attest.DigestMismatch, "manifest embeds data for %s that does not have that digest and size", digest)
		}
	}
	return nil
}

// layers returns the digests of the layers in order.
func (d *document) layers() []attest.Digest {
	out := make([]attest.Digest, len(d.image.Layers))
	for i, l := range d.image.Layers {
		out[i] = digestOf(l)
	}
	return out
}

// dockerZstd is a layer type that runtimes unpack and the library does not list.
const dockerZstd types.MediaType = "application/vnd.docker.image.rootfs.diff.tar.zstd"

// onlyLayers reports whether every blob is a layer. One of another type is in the
// manifest and not in what runs: runtimes leave it out when they unpack the image
// (containerd getLayers), so that such a manifest proves nothing.
func (d *document) onlyLayers() bool {
	return !slices.ContainsFunc(d.image.Layers, func(l v1.Descriptor) bool { return !l.MediaType.IsLayer() && l.MediaType != dockerZstd })
}

// digestOf returns the digest of a descriptor that check has passed.
func digestOf(d v1.Descriptor) attest.Digest {
	out, err := attest.ParseDigest(d.Digest.String())
	if err != nil {
		panic("registry: descriptor was not checked: " + err.Error())
	}
	return out
}

// part is one platform of an image; an image without an index has one part with
// no platform.
type part struct {
	name     string // os/arch[/variant]
	platform *v1.Platform
	doc      *document
	config   imageConfig // read when its base is looked for
}

// Image fetches ref by its digest, with its platforms when it is an index, and
// proves which base image it is built on. baseHint is the caller's claim about
// the base, "HOST/PATH[:TAG][@DIGEST]" or empty; a hint that the layers disprove
// is no error but a claim with the result CONTRADICTED, which the gate refuses.
// The hint "scratch" says that it is built on none. followed finds bases that
// nobody names; it may be nil, and its errors are returned as they are.
//
// mayRead says of which repositories the caller may learn what is in them, nil of
// none. Of any other one the answer says nothing about what a tag names there, or
// whether it exists, unless the layers prove that the image is built on it: the
// client's credentials may read more than the caller (attacks G24, K07).
//
// Errors: SUBJECT_NOT_FOUND, DIGEST_MISMATCH, MANIFEST_AMBIGUOUS, BAD_JSON,
// BAD_DIGEST, TOO_MANY_LEVELS, TOO_LARGE for what is found; BAD_REFERENCE for the
// hint; REGISTRY_NOT_ALLOWED, REGISTRY_DENIED, REGISTRY_UNAVAILABLE,
// REDIRECT_REFUSED, TOKEN_REALM_REFUSED, PLAIN_HTTP_REFUSED.
func (c *Client) Image(ctx context.Context, ref attest.ImageRef, baseHint string, followed Followed, mayRead func(attest.Repository) bool) (attest.Image, error) {
	ctx, cancel := c.within(ctx)
	defer cancel()
	hint, err := parseHint(baseHint)
	if err != nil {
		return attest.Image{}, err
	}
	img, doc, parts, free, err := c.look(ctx, ref)
	if err != nil {
		return attest.Image{}, err
	}
	defer free()
	q := &inquiry{Client: c, repo: ref.Repository, doc: doc, parts: parts, budget: newBudget(), mayRead: mayRead}
	img.Base, err = q.base(ctx, hint, followed)
	if err != nil {
		return attest.Image{}, err
	}
	return img, nil
}

// Subjects is Image without the base: what statements about ref are about.
func (c *Client) Subjects(ctx context.Context, ref attest.ImageRef) (attest.Image, error) {
	ctx, cancel := c.within(ctx)
	defer cancel()
	img, _, _, free, err := c.look(ctx, ref)
	if err != nil {
		return attest.Image{}, err
	}
	free()
	return img, nil
}

// look fetches an image with its platforms, which the caller frees.
func (c *Client) look(ctx context.Context, ref attest.ImageRef) (attest.Image, *document, []part, func(), error) {
	doc, parts, free, err := c.parts(ctx, c.room.images, ref.Repository, ref.Digest.String())
	if err != nil {
		return attest.Image{}, nil, nil, nil, err
	}
	img := attest.Image{Ref: ref, MediaType: string(doc.mediaType)}
	if doc.index != nil {
		for _, p := range parts {
			img.Platforms = append(img.Platforms, attest.Platform{Name: p.name, Digest: p.doc.digest})
		}
	}
	return img, doc, parts, free, nil
}

// parts fetches an image and its platforms within a pool (see gather).
func (c *Client) parts(ctx context.Context, pool *semaphore.Weighted, repo attest.Repository, reference string) (*document, []part, func(), error) {
	var children []v1.Descriptor
	doc, docs, free, err := c.gather(ctx, pool, repo, reference, func(doc *document) (_ []v1.Descriptor, err error) {
		if children = nil; doc.index != nil {
			children, err = platforms(doc.index)
		}
		return children, err
	})
	if err != nil {
		return nil, nil, nil, err
	}
	if doc.index == nil {
		return doc, []part{{doc: doc}}, free, nil
	}
	out := make([]part, len(docs))
	for i, d := range docs {
		out[i] = part{name: platformName(children[i].Platform), platform: children[i].Platform, doc: d}
	}
	return doc, out, free, nil
}

// platforms returns the entries of an index that are images for some platform.
// BuildKit's attestation manifests are not: their platform is unknown/unknown
// (BuildKit docs/attestations/attestation-storage.md). Their annotation alone
// excuses nothing, for runtimes do not heed it when they choose what to run.
func platforms(index *v1.IndexManifest) ([]v1.Descriptor, error) {
	var out []v1.Descriptor
	for _, d := range index.Manifests {
		unknown := d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
		switch {
		case d.MediaType.IsIndex():
			return nil, attest.Errorf(attest.TooManyLevels, "index lists another index, %s: only an index of images is supported", d.Digest)
		case !d.MediaType.IsImage():
			return nil, attest.Errorf(attest.ManifestAmbiguous, "index lists %s of type %q, which is no image", d.Digest, clip(string(d.MediaType)))
		case unknown:
			continue
		}
		out = append(out, d)
	}
	if len(out) == 0 {
		return nil, attest.Errorf(attest.ManifestAmbiguous, "index lists no image for any platform")
	}
	return out, nil
}

// children fetches what descriptors of an index name, in their order. Each is
// what its descriptor says, by digest, size and type.
func (c *Client) children(ctx context.Context, repo attest.Repository, list []v1.Descriptor) ([]*document, error) {
	// All are held at once, so their sum is bounded before one is fetched (G19).
	if _, err := sizeOf(list); err != nil {
		return nil, err
	}
	out := make([]*document, len(list))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, d := range list {
		g.Go(func() error {
			// No more is parsed than there is room for.
			doc, err := c.documentOf(ctx, repo, digestOf(d), d.Size)
			if attest.ReasonOf(err) == attest.TooLarge {
				return attest.Errorf(attest.DigestMismatch, "index says that %s has %d bytes: %w", d.Digest, d.Size, err)
			}
			if err != nil {
				return err
			}
			if doc.mediaType != d.MediaType {
				return attest.Errorf(attest.ManifestAmbiguous, "index says that %s has type %s, the registry says %s", d.Digest, clip(string(d.MediaType)), doc.mediaType)
			}
			if int64(len(doc.raw)) != d.Size {
				return attest.Errorf(attest.DigestMismatch, "index says that %s has %d bytes, it has %d", d.Digest, d.Size, len(doc.raw))
			}
			out[i] = doc
			return nil
		})
	}
	return out, g.Wait()
}

// unspecified stands for a platform that an index does not name.
const unspecified = "unspecified"

// platformName returns os/arch[/variant], cleaned: an index may say anything.
func platformName(p *v1.Platform) string {
	if p == nil || p.OS == "" && p.Architecture == "" {
		return unspecified
	}
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	return clip(name)
}
