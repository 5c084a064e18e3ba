package registry

import (
	"context"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/semaphore"

	"github.com/hallmarkd/hallmark/attest"
)

// What all calls together hold of documents that others wrote (attacks G19). The
// sizes are those of the documents; parsed they take about five times as much.
//
// A call takes its room in the order of these fields, and all that it needs of one
// field at once: it never waits for room while it has some of the same field, so that
// no two calls wait for each other.
type room struct {
	images *semaphore.Weighted // images that are looked at, with all their manifests
	bases  *semaphore.Weighted // what they are compared with, one base of each image at a time
	single *semaphore.Weighted // what is read and dropped: a configuration, provenance
	parse  *semaphore.Weighted // manifests that are being parsed, by number
}

const (
	roomImages = 16 << 20
	roomBases  = 16 << 20
	roomSingle = 8 << 20
	// roomParse is small because parsing takes several times a document's size for a
	// moment, and no longer than its processors.
	roomParse = 2

	firstGuess = 256 << 10 // bytes of a document whose size nobody has said
	maxValues  = 1 << 16   // of a manifest or index, about
	maxLayers  = 4096      // of a manifest; runtimes stack 500 at most
)

// The largest need fits, so that everybody's turn comes.
const _ = uint(min(roomImages, roomBases)-maxManifest-maxManifests) + uint(roomSingle-maxManifest-maxProvenance)

func newRoom() room {
	return room{
		images: semaphore.NewWeighted(roomImages), bases: semaphore.NewWeighted(roomBases),
		single: semaphore.NewWeighted(roomSingle), parse: semaphore.NewWeighted(roomParse),
	}
}

// take waits for n of a pool. free gives it back.
func take(ctx context.Context, pool *semaphore.Weighted, n int64) (free func(), err error) {
	if err := pool.Acquire(ctx, n); err != nil {
		return nil, &attest.Error{Reason: attest.RegistryUnavailable, Message: "too many large images are being read: try again later", Err: err}
	}
	return func() { pool.Release(n) }, nil
}

// gather fetches what reference, a digest or a tag, names and what list names of it,
// within a pool. The caller calls free when it holds none of it any longer; with an
// error there is nothing to free.
func (c *Client) gather(ctx context.Context, pool *semaphore.Weighted, repo attest.Repository, reference string,
	list func(*document) ([]v1.Descriptor, error)) (doc *document, docs []*document, free func(), err error) {
	doc, listed, n, err := c.reserve(ctx, pool, repo, reference, list)
	if err != nil {
		return nil, nil, nil, err
	}
	free = func() { pool.Release(n) }
	if docs, err = c.children(ctx, repo, listed); err != nil {
		free()
		return nil, nil, nil, err
	}
	return doc, docs, free, nil
}

// reserve fetches a document and takes the room for it and all that is listed of it.
// When there is not enough it lets go of everything, waits for the whole, and starts
// again: at most three times, for then all sizes are known.
func (c *Client) reserve(ctx context.Context, pool *semaphore.Weighted, repo attest.Repository, reference string,
	list func(*document) ([]v1.Descriptor, error)) (*document, []v1.Descriptor, int64, error) {
	for n := int64(firstGuess); ; {
		if _, err := take(ctx, pool, n); err != nil {
			return nil, nil, 0, err
		}
		doc, listed, need, err := c.measure(ctx, repo, reference, min(n, maxManifest), list)
		switch {
		case attest.ReasonOf(err) == attest.TooLarge && n < maxManifest:
			pool.Release(n)
			n = maxManifest
			continue
		case err != nil:
			pool.Release(n)
			return nil, nil, 0, err
		case need <= n:
			pool.Release(n - need)
			return doc, listed, need, nil
		case pool.TryAcquire(need - n):
			return doc, listed, need, nil
		}
		pool.Release(n)
		n, reference = need, doc.digest.String()
	}
}

// measure fetches a document of at most limit bytes and says how much room it takes
// with what is listed of it.
func (c *Client) measure(ctx context.Context, repo attest.Repository, reference string, limit int64,
	list func(*document) ([]v1.Descriptor, error)) (*document, []v1.Descriptor, int64, error) {
	var doc *document
	d, err := attest.ParseDigest(reference)
	if err == nil {
		doc, err = c.documentOf(ctx, repo, d, limit)
	} else {
		doc, err = c.getOf(ctx, repo, reference, limit)
	}
	if err != nil {
		return nil, nil, 0, err
	}
	listed, err := list(doc)
	if err != nil {
		return nil, nil, 0, err
	}
	size, err := sizeOf(listed)
	return doc, listed, int64(len(doc.raw)) + size, err
}

// sizeOf returns how many bytes the manifests of an index have.
func sizeOf(list []v1.Descriptor) (int64, error) {
	total := int64(0)
	for _, d := range list {
		if total += min(d.Size, maxManifest+1); total > maxManifests {
			return 0, attest.Errorf(attest.TooLarge, "the manifests that the index lists have more than %d bytes together", int64(maxManifests))
		}
	}
	return total, nil
}

// alone lists nothing of a document.
func alone(*document) ([]v1.Descriptor, error) { return nil, nil }

// tooMany reports whether a document has more values than any that is meant to be
// read: parsed, an empty one takes fifty times its bytes. It counts the commas between
// values, so that it allocates nothing.
func tooMany(raw []byte) bool {
	n, quoted := 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted:
			n++
		}
	}
	return n > maxValues
}
