package registry

import (
	"context"
	"fmt"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
)

// Resolve returns the digest that a tag names at this moment: the hash of the
// bytes, not what a header says. It answers SUBJECT_NOT_FOUND for no such tag,
// else as Image.
func (c *Client) Resolve(ctx context.Context, repo attest.Repository, tag string) (attest.Digest, error) {
	ctx, cancel := c.within(ctx)
	defer cancel()
	return c.resolve(ctx, repo, tag)
}

func (c *Client) resolve(ctx context.Context, repo attest.Repository, tag string) (attest.Digest, error) {
	if err := checkTag(tag); err != nil {
		return attest.Digest{}, err
	}
	doc, err := c.get(ctx, repo, tag)
	if err != nil {
		return attest.Digest{}, err
	}
	return doc.digest, nil
}

// Tag makes repo:tag name ref's digest. Where repo is another repository, of the
// same registry or another configured one, the image is copied there first with
// all its platforms and the bundles that are attached to them, bit for bit, so
// that the tag never names an image without its signatures. Repeating it is safe.
//
// OCI knows no compare-and-swap of tags: two writers of one tag do not notice
// each other, and the last one stays. The caller has to hold a lease on the tag;
// Tag reads it back after writing and answers EFFECT_FAILED when it names
// something else. Other errors are those of Image, and FOREIGN_LAYER for an image
// with layers that a registry may not hold.
func (c *Client) Tag(ctx context.Context, ref attest.ImageRef, repo attest.Repository, tag string) error {
	ctx, cancel := context.WithTimeout(ctx, c.copyTimeout)
	defer cancel()
	if err := checkTag(tag); err != nil {
		return err
	}
	// 1. The image, and that this client may write to the target at all.
	doc, err := c.document(ctx, ref.Repository, ref.Digest)
	if err != nil {
		return err
	}
	to, err := c.session(ctx, repo, transport.PushScope)
	if err != nil {
		return err
	}
	// 2. Everything by digest. A stop here leaves content that no tag names.
	if repo != ref.Repository {
		if err := c.copy(ctx, ref, doc, repo, to); err != nil {
			return err
		}
	}
	// 3. The tag. A stop here has done it; the next try writes the same.
	if _, err := to.put(ctx, tag, doc.mediaType, doc.raw, ""); err != nil {
		return err
	}
	now, err := c.resolve(ctx, repo, tag)
	if err != nil {
		return err
	}
	if now != ref.Digest {
		return attest.Errorf(attest.EffectFailed, "%s:%s was set to %s but names %s: somebody else writes this tag", repo, tag, ref.Digest, now)
	}
	return nil
}

// copy brings an image and its bundles to another repository, dependencies first.
func (c *Client) copy(ctx context.Context, ref attest.ImageRef, doc *document, repo attest.Repository, to *session) error {
	from, err := c.session(ctx, ref.Repository, transport.PullScope)
	if err != nil {
		return err
	}
	docs, err := c.tree(ctx, ref.Repository, doc)
	if err != nil {
		return err
	}
	if err := c.copyBlobs(ctx, from, to, docs); err != nil {
		return err
	}
	for _, d := range docs {
		if _, err := to.put(ctx, d.digest.String(), d.mediaType, d.raw, ""); err != nil {
			return err
		}
	}
	for _, d := range docs {
		bundles, err := c.attached(ctx, attest.ImageRef{Repository: ref.Repository, Digest: d.digest})
		if err != nil {
			return err
		}
		for _, b := range bundles {
			r := describe(*b.doc.image, b.doc.raw, b.bundle)
			if err := c.attach(ctx, attest.ImageRef{Repository: repo, Digest: d.digest}, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// tree returns the manifests of an image, an index after all that it lists:
// BuildKit's attestation manifests too, without which the index would not be
// accepted.
func (c *Client) tree(ctx context.Context, repo attest.Repository, doc *document) ([]*document, error) {
	if doc.index == nil {
		return []*document{doc}, nil
	}
	if _, err := platforms(doc.index); err != nil {
		return nil, err
	}
	docs, err := c.children(ctx, repo, doc.index.Manifests)
	if err != nil {
		return nil, err
	}
	return append(docs, doc), nil
}

// checkForeign refuses a layer that is to be fetched from elsewhere or may not be
// passed on. The places that a manifest names for it are never contacted (G12).
func checkForeign(d v1.Descriptor) error {
	if len(d.URLs) > 0 || !d.MediaType.IsDistributable() || d.MediaType == ociRestrictedZstd {
		return attest.Errorf(attest.ForeignLayer, "layer %s is kept outside the registry: build the image without foreign layers", d.Digest)
	}
	return nil
}

const ociRestrictedZstd types.MediaType = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"

// copyBlobs copies what manifests refer to, mounting it where both repositories
// are of one registry. The receiving registry and go-containerregistry both check
// the digests.
func (c *Client) copyBlobs(ctx context.Context, from, to *session, docs []*document) error {
	blobs := map[attest.Digest]v1.Descriptor{}
	for _, d := range docs {
		if d.image == nil {
			continue
		}
		for _, b := range append([]v1.Descriptor{d.image.Config}, d.image.Layers...) {
			if err := checkForeign(b); err != nil {
				return err
			}
			if b.Size > maxBlob {
				return attest.Errorf(attest.TooLarge, "layer %s has %d bytes; at most %d are copied", b.Digest, b.Size, int64(maxBlob))
			}
			blobs[digestOf(b)] = b
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, b := range blobs {
		g.Go(func() error { return c.copyBlob(ctx, from, to, b) })
	}
	return g.Wait()
}

func (c *Client) copyBlob(ctx context.Context, from, to *session, d v1.Descriptor) error {
	at := from.repo.Digest(d.Digest.String())
	layer, err := remote.Layer(at, from.options(ctx)...)
	if err != nil {
		return from.host.failure(ctx, err)
	}
	size, err := layer.Size()
	if err != nil {
		return from.host.failure(ctx, err)
	}
	if size != d.Size {
		return attest.Errorf(attest.DigestMismatch, "registry %s has %d bytes for %s, the manifest says %d", from.host.name, size, d.Digest, d.Size)
	}
	if from.host == to.host {
		layer = &remote.MountableLayer{Layer: layer, Reference: name.Reference(at)}
	}
	if err := c.upload(ctx, to, layer); err != nil {
		return fmt.Errorf("copying %s: %w", d.Digest, err)
	}
	return nil
}
