package gate

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/verifier"
)

// maxCachedDigests bounds the evidence kept in memory, about 10 KiB a digest.
const maxCachedDigests = 4096

// evidenceKinds are the kinds of record that rules judge.
var evidenceKinds = []attest.RecordKind{attest.KindSignature, attest.KindProvenance, attest.KindImport}

// evidenceCache keeps verified evidence by image. Records never change, so what
// was verified once stays verified; only newer records have to be added.
type evidenceCache struct {
	ledger   *ledger.Ledger
	verifier *verifier.Verifier

	mu      sync.Mutex
	entries map[attest.ImageRef]*evidenceEntry
}

type evidenceEntry struct {
	mu   sync.Mutex
	size uint64 // complete for the records before this index
	list []*verifier.Evidence
}

func newEvidenceCache(l *ledger.Ledger, v *verifier.Verifier) *evidenceCache {
	return &evidenceCache{ledger: l, verifier: v, entries: map[attest.ImageRef]*evidenceEntry{}}
}

// about returns all verified evidence about an image among the records before
// size, oldest first. What was signed about the digest for another repository is
// none of it: other callers may sign there, and as much as they like. An envelope
// that does not verify is an error and never passed over: the service wrote it, so
// something was tampered with.
func (c *evidenceCache) about(ctx context.Context, ref attest.ImageRef, size uint64) ([]*verifier.Evidence, error) {
	e := c.entry(ref)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.size < size {
		found, err := c.load(ctx, ref, e.size, size)
		if err != nil {
			return nil, err
		}
		e.list, e.size = append(e.list[:len(e.list):len(e.list)], found...), size
	}
	// A colleague may have read further already; what lies beyond size is not
	// part of this decision.
	n := len(e.list)
	for n > 0 && e.list[n-1].Index() >= size {
		n--
	}
	return e.list[:n:n], nil
}

func (c *evidenceCache) entry(ref attest.ImageRef) *evidenceEntry {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[ref]
	if e == nil {
		if len(c.entries) >= maxCachedDigests {
			for other := range c.entries { // any one: what is asked again is verified again
				delete(c.entries, other)
				break
			}
		}
		e = &evidenceEntry{}
		c.entries[ref] = e
	}
	return e
}

// load verifies the records about ref with from <= index < to, in log order.
func (c *evidenceCache) load(ctx context.Context, ref attest.ImageRef, from, to uint64) ([]*verifier.Evidence, error) {
	var metas []ledger.Meta
	for _, kind := range evidenceKinds {
		facets := []attest.Facet{
			{Name: attest.FacetDigest, Value: ref.Digest.String()}, {Name: attest.FacetRepository, Value: string(ref.Repository)},
		}
		if kind == attest.KindImport {
			// No rule asks for other imports, and they may be large.
			facets = append(facets, attest.Facet{Name: attest.FacetSays, Value: attest.PredicateSignature})
		}
		found, err := findAll(ctx, c.ledger, ledger.Query{
			Kind: kind, Facets: facets,
			After: max(from, 1) - 1, Before: to, // record 0 is a policy
		})
		if err != nil {
			return nil, err
		}
		metas = append(metas, found...)
	}
	slices.SortFunc(metas, func(a, b ledger.Meta) int { return cmp.Compare(a.Index, b.Index) })
	var out []*verifier.Evidence
	for _, m := range metas {
		rec, err := c.ledger.Get(ctx, m.ID)
		if err != nil {
			return nil, err
		}
		ev, err := c.verifier.Record(rec)
		if err != nil {
			return nil, err
		}
		out = append(out, ev)
	}
	return out, nil
}

// findAll returns every match, oldest first, however many pages it takes: a
// decision must not miss the record that contradicts the others.
func findAll(ctx context.Context, l *ledger.Ledger, q ledger.Query) ([]ledger.Meta, error) {
	q.Ascending, q.Limit = true, maxPage
	var out []ledger.Meta
	for {
		found, err := l.Find(ctx, q)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
		if len(found) < q.Limit {
			return out, nil
		}
		q.After = found[len(found)-1].Index
	}
}
