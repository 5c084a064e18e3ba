package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
)

// Limits of what is looked at beside one image (attacks G07).
const (
	maxForeign      = 128       // referrers, and again layers of the legacy images
	maxForeignBytes = 64 << 20  // of what is fetched, manifests included
	maxReferrer     = 64 << 10  // bytes of a referrer's manifest: that of a bundle has less than 2 KiB
	maxAnnotations  = 256 << 10 // bytes of the annotations of a legacy layer
)

// bundleFamily begins the media types of Sigstore bundles of all versions.
const bundleFamily = "application/vnd.dev.sigstore.bundle"

// What cosign keeps beside an image under tags of its digest, before it knew
// referrers (facts/trust-formats 2.7).
var legacyTags = []struct{ suffix, form, layer string }{
	{".sig", attest.FormSignature, "application/vnd.dev.cosign.simplesigning.v1+json"},
	{".att", attest.FormEnvelope, "application/vnd.dsse.envelope.v1+json"},
}

// Found is a piece of evidence that somebody has put beside an image. It is
// anybody's: only a verifier can say what it is worth.
type Found struct {
	Place   string // digest of the referrer, or the tag
	Form    string // as attest names it; "" with Err
	Content []byte // the bundle; of the legacy forms an attest.Layer as JSON
	Err     error  // why it could not be read; it stands in nobody's way
}

// Foreign calls visit with each Sigstore bundle that refers to ref, whatever its
// version and artifact type, and with each layer of cosign's legacy .sig and .att
// images: one after the other, so that only one is in memory at a time. Referrers
// that hold something else are passed over. At most 128 referrers with manifests of
// at most 64 KiB, 128 layers, and 64 MiB in all are read; what is beyond that, and whatever is not as it should be, is
// visited with an Err and hides nothing else. Errors: those of Image for the
// registry, and visit's own, which ends it.
func (c *Client) Foreign(ctx context.Context, ref attest.ImageRef, visit func(Found) error) error {
	// 1. The image itself. Its digest alone says nothing of what a repository holds.
	_, _, free, err := c.gather(ctx, c.room.single, ref.Repository, ref.Digest.String(), alone)
	if err != nil {
		return err
	}
	free()
	s, err := c.session(ctx, ref.Repository, transport.PullScope)
	if err != nil {
		return err
	}
	b := &beside{client: c, session: s, ref: ref, visit: visit, left: bytesBudget{left: maxForeignBytes}}
	// 2. What refers to it.
	if err := b.referrers(ctx); err != nil {
		return err
	}
	// 3. What stands under tags that are made of its digest.
	for _, legacy := range legacyTags {
		if err := b.legacy(ctx, fallbackTag(ref.Digest)+legacy.suffix, legacy.form, legacy.layer); err != nil {
			return err
		}
	}
	return nil
}

// beside is one Foreign call.
type beside struct {
	client  *Client
	session *session
	ref     attest.ImageRef
	visit   func(Found) error
	left    bytesBudget
}

// bad reports what could not be read, or ends the call for what is nobody's fault
// but the registry's: an answer that did not come is not an answer that it holds
// nothing.
func (b *beside) bad(place string, err error) error {
	switch attest.ReasonOf(err) {
	case attest.RegistryUnavailable, attest.RegistryDenied, attest.HostNotAllowed, attest.RealmRefused, attest.Internal:
		return err
	}
	return b.visit(Found{Place: place, Err: err})
}

func (b *beside) referrers(ctx context.Context) error {
	l, err := b.list(ctx)
	if err != nil {
		return b.bad("referrers of "+b.ref.Digest.String(), err)
	}
	likely, possible, more := candidates(l)
	entries := append(likely, possible...)
	found := make([]referring, len(entries))
	errs := make([]error, len(entries))
	g, fetching := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, e := range entries {
		g.Go(func() error {
			found[i], errs[i] = b.manifest(fetching, e)
			return nil
		})
	}
	_ = g.Wait() // no function returns an error
	for i, e := range entries {
		if err := b.referrer(ctx, digestOf(e), found[i], errs[i]); err != nil {
			return err
		}
	}
	if more > 0 {
		return b.visit(Found{Place: "referrers of " + b.ref.Digest.String(), Err: attest.Errorf(attest.TooLarge,
			"%d further referrers were not looked at: at most %d are, those that say they are bundles first", more, maxForeign)})
	}
	return nil
}

// list returns all referrers of every type.
func (b *beside) list(ctx context.Context) (*listing, error) {
	l, err := b.session.referrersAPI(ctx, b.ref.Digest, "")
	if l != nil || err != nil {
		return l, err
	}
	return b.session.referrersTag(ctx, b.ref.Digest)
}

// candidates returns the referrers that may hold a bundle: those that say so first,
// so that others cannot crowd them out, then those whose type some registries hide.
// more counts those beyond the limit.
func candidates(l *listing) (likely, possible []v1.Descriptor, more int) {
	for _, d := range l.order {
		var entry v1.Descriptor
		if json.Unmarshal(l.byDigest[d], &entry) != nil || entry.MediaType != types.OCIManifestSchema1 {
			continue
		}
		if _, err := attest.ParseDigest(d); err != nil || entry.Digest.String() != d {
			continue
		}
		entry = v1.Descriptor{Digest: entry.Digest, Size: entry.Size, ArtifactType: entry.ArtifactType} // the rest may be large
		if strings.HasPrefix(entry.ArtifactType, bundleFamily) {
			likely = append(likely, entry)
		} else {
			possible = append(possible, entry)
		}
	}
	if n := len(likely) - maxForeign; n > 0 {
		likely, more = likely[:maxForeign], n
	}
	if n := len(likely) + len(possible) - maxForeign; n > 0 {
		possible, more = possible[:len(possible)-n], more+n
	}
	return likely, possible, more
}

// referring is what is kept of a referrer's manifest: the manifests of all referrers
// are read before the first bundle is.
type referring struct {
	to     attest.Digest // the subject; zero for none
	first  v1.Descriptor // layer
	layers int
}

// manifest fetches a referrer's manifest, which is paid for before it is asked for.
func (b *beside) manifest(ctx context.Context, d v1.Descriptor) (referring, error) {
	if d.Size < 0 || d.Size > maxReferrer {
		return referring{}, attest.Errorf(attest.TooLarge, "it is listed with %d bytes; the manifest of a bundle has at most %d", d.Size, maxReferrer)
	}
	if err := b.take(d.Size); err != nil {
		return referring{}, err
	}
	doc, err := b.client.documentOf(ctx, b.ref.Repository, digestOf(d), maxReferrer)
	if err != nil {
		return referring{}, err
	}
	m := doc.image
	if m == nil || len(m.Layers) == 0 {
		return referring{}, nil
	}
	out := referring{first: m.Layers[0], layers: len(m.Layers)}
	if m.Subject != nil {
		out.to = digestOf(*m.Subject)
	}
	return out, nil
}

func (b *beside) take(n int64) error {
	if !b.left.take(n) {
		return attest.Errorf(attest.TooLarge, "what is beside %s is larger than the %d bytes that are read", b.ref, maxForeignBytes)
	}
	return nil
}

// referrer visits the bundle of one referrer, if it holds one.
func (b *beside) referrer(ctx context.Context, d attest.Digest, r referring, err error) error {
	if err != nil {
		return b.bad(d.String(), err)
	}
	if r.layers == 0 || !strings.HasPrefix(string(r.first.MediaType), bundleFamily) {
		return nil // another kind of referrer
	}
	if r.to != b.ref.Digest {
		return b.bad(d.String(), attest.Errorf(attest.SubjectMismatch, "it is listed beside %s and refers to something else", b.ref.Digest))
	}
	if r.layers != 1 {
		return b.bad(d.String(), attest.Errorf(attest.ManifestAmbiguous, "it does not hold exactly one bundle"))
	}
	content, err := b.blob(ctx, r.first)
	if err != nil {
		return b.bad(d.String(), err)
	}
	return b.visit(Found{Place: d.String(), Form: attest.FormBundle, Content: content})
}

// blob fetches a layer, whose bytes hash to its digest.
func (b *beside) blob(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if err := checkForeign(d); err != nil {
		return nil, err
	}
	if d.Size > attest.MaxPredicate {
		return nil, attest.Errorf(attest.TooLarge, "it has %d bytes; at most %d are read", d.Size, attest.MaxPredicate)
	}
	if err := b.take(d.Size); err != nil {
		return nil, err
	}
	return b.session.blob(ctx, d)
}

// legacy visits the layers of one of cosign's images, if it is there.
func (b *beside) legacy(ctx context.Context, tag, form, layer string) error {
	if err := b.take(0); err != nil {
		return b.bad(tag, err)
	}
	doc, _, free, err := b.client.gather(ctx, b.client.room.single, b.ref.Repository, tag, alone)
	if err == nil {
		free() // visit may wait for room of its caller's; how many calls there are is for that one to bound
	}
	if attest.ReasonOf(err) == attest.SubjectNotFound {
		return nil
	}
	if err == nil {
		err = b.take(int64(len(doc.raw)))
	}
	if err == nil && doc.image == nil {
		err = attest.Errorf(attest.ManifestAmbiguous, "the tag names an index, not an image of cosign's")
	}
	if err != nil {
		return b.bad(tag, err)
	}
	for i, d := range doc.image.Layers {
		if i == maxForeign {
			return b.bad(tag, attest.Errorf(attest.TooLarge, "%d further layers were not looked at: at most %d are", len(doc.image.Layers)-i, maxForeign))
		}
		found := Found{Place: fmt.Sprintf("%s#%d", tag, i), Form: form}
		if found.Content, err = b.layer(ctx, d, layer); err != nil {
			if err := b.bad(found.Place, err); err != nil {
				return err
			}
			continue
		}
		if err := b.visit(found); err != nil {
			return err
		}
	}
	return nil
}

// layer fetches a layer and keeps of its annotations those that cosign reads, so
// that one signature with other ornaments is the same evidence.
func (b *beside) layer(ctx context.Context, d v1.Descriptor, want string) ([]byte, error) {
	if string(d.MediaType) != want {
		return nil, attest.Errorf(attest.ManifestAmbiguous, "a layer of type %q, not %s", clip(string(d.MediaType)), want)
	}
	out := attest.Layer{MediaType: want, Annotations: map[string]string{}}
	size := 0
	for k, v := range d.Annotations {
		if strings.HasPrefix(k, "dev.sigstore.cosign/") || k == "dev.cosignproject.cosign/signature" {
			out.Annotations[k] = v
			size += len(k) + len(v)
		}
	}
	if size > maxAnnotations {
		return nil, attest.Errorf(attest.TooLarge, "its annotations have %d bytes; at most %d are read", size, maxAnnotations)
	}
	var err error
	if out.Payload, err = b.blob(ctx, d); err != nil {
		return nil, err
	}
	content, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("marshalling a layer: %w", err)
	}
	return content, nil
}
