package gate

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// maxVouchers bounds how many imported provenances under a root are read for one
// signing, one at a time. Each may have 16 MiB.
const maxVouchers = 16

// provenanceTypes are those of provenance that names what an image was built from.
var provenanceTypes = []string{attest.PredicateProvenance, "https://slsa.dev/provenance/v0.2"}

// attestedBase returns the base of an image, ATTESTED instead of CLAIMED when imported
// provenance under a root that is still configured names it: by digest and canonical
// repository, and as the one image that the build read. Of several nobody could tell
// which is the base and which only helped to build, and the pusher would choose.
//
// There is one claim for each signer under each root: whose word counts is for the
// rules to say, under a public root it may be anybody's. Provenance that cannot be
// read neither counts nor stands in the way.
func (g *Gate) attestedBase(ctx context.Context, img attest.Image) (attest.Base, error) {
	base := img.Base
	if base.Result != attest.Claimed || base.Repository == "" || base.Digest.IsZero() {
		return base, nil
	}
	var claims []attest.BaseClaim
	for _, root := range g.Foreign.Names() {
		vouchers, err := g.vouchers(ctx, img.Ref, root)
		if err != nil {
			return base, err
		}
		for _, m := range vouchers {
			said, named, err := g.vouches(ctx, m.ID, img)
			if err != nil {
				return base, err
			}
			known := func(c attest.BaseClaim) bool { return c.Root == said.Root && c.Signer == said.Signer }
			if !named || said.Root != root || slices.ContainsFunc(claims, known) {
				continue
			}
			claims = append(claims, attest.BaseClaim{
				From: attest.BaseFromAttestation, Name: attest.BaseName{Repository: base.Repository, Digest: base.Digest}.String(), Digest: base.Digest,
				Result: attest.Attested, Root: root, Signer: said.Signer,
				Detail: "named by the provenance of " + said.Signer.Under(root) + ", record " + m.ID.String(),
			})
		}
	}
	if len(claims) > 0 {
		base.Result, base.Claims = attest.Attested, append(claims, base.Claims...)
	}
	return base, nil
}

// vouchers returns imported provenances of an image under a root, those that are to
// be read: the oldest of every name that signed any, then the second of each, and so
// on. Whatever somebody adds later hides none that is there.
func (g *Gate) vouchers(ctx context.Context, ref attest.ImageRef, root string) ([]ledger.Meta, error) {
	var all []ledger.Meta
	for _, kind := range provenanceTypes {
		found, err := g.Ledger.Find(ctx, ledger.Query{Kind: attest.KindImport, Ascending: true, Limit: maxPage, Facets: []attest.Facet{
			{Name: attest.FacetDigest, Value: ref.Digest.String()}, {Name: attest.FacetRepository, Value: string(ref.Repository)},
			{Name: attest.FacetSays, Value: kind}, {Name: attest.FacetRoot, Value: root},
		}})
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	byIndex := func(a, b ledger.Meta) int { return cmp.Compare(a.Index, b.Index) }
	slices.SortFunc(all, byIndex)
	before := map[string]int{} // those of a name
	turn := map[uint64]int{}   // of a record
	for _, m := range all {
		who := m.Get(attest.FacetForeign)
		turn[m.Index], before[who] = before[who], before[who]+1
	}
	slices.SortFunc(all, func(a, b ledger.Meta) int {
		return cmp.Or(cmp.Compare(turn[a.Index], turn[b.Index]), byIndex(a, b))
	})
	return all[:min(len(all), maxVouchers)], nil
}

// vouches returns an import without its content and reports whether the one image that
// this provenance names is the base of img.
func (g *Gate) vouches(ctx context.Context, id attest.RecordID, img attest.Image) (attest.Import, bool, error) {
	size, err := g.Ledger.EnvelopeSize(ctx, id)
	if err != nil {
		return attest.Import{}, false, err
	}
	done, err := weigh(ctx, g.signing, size)
	if err != nil {
		return attest.Import{}, false, err
	}
	defer done()
	rec, err := g.Ledger.Get(ctx, id)
	if err != nil {
		return attest.Import{}, false, err
	}
	e, err := g.Verifier.Record(rec)
	if err != nil {
		return attest.Import{}, false, err // the service wrote it: something was tampered with
	}
	if _, ok := e.Imported(); !ok || !e.Covers(img.Ref.Digest) {
		return attest.Import{}, false, nil
	}
	s, err := statementOf(rec)
	if err != nil {
		return attest.Import{}, false, err
	}
	var said attest.Import
	if err := json.Unmarshal(s.Predicate, &said); err != nil {
		return attest.Import{}, false, fmt.Errorf("record %s holds no import: %w", rec.ID, err)
	}
	statement, err := foreign.Payload(said.Form, said.Content, img.Ref.Digest)
	said.Content = nil
	if err != nil {
		return said, false, nil
	}
	from, err := g.Registry.Dependencies(statement, img.Ref.Digest)
	want := attest.BaseName{Repository: img.Base.Repository, Digest: img.Base.Digest}
	return said, err == nil && len(from) == 1 && from[0] == want, nil
}
