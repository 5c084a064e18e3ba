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

// maxVouchers bounds how many imported provenances of a type are read for one
// signing, the newest first. Each may have 16 MiB.
const maxVouchers = 4

// provenanceTypes are those of provenance that names what an image was built from.
var provenanceTypes = []string{attest.PredicateProvenance, "https://slsa.dev/provenance/v0.2"}

// attestedBase returns the base of an image, ATTESTED instead of CLAIMED when imported
// provenance under a root that is still configured names it: by digest and canonical
// repository, and as the one image that the build was made of. Of several nobody could
// tell which is the base and which only helped to build, and the pusher would choose.
//
// Provenance that cannot be read neither counts nor stands in the way.
func (g *Gate) attestedBase(ctx context.Context, img attest.Image) (attest.Base, error) {
	base := img.Base
	if base.Result != attest.Claimed || base.Repository == "" || base.Digest.IsZero() || len(g.Foreign.Names()) == 0 {
		return base, nil
	}
	vouchers, err := g.vouchers(ctx, img.Ref)
	if err != nil {
		return base, err
	}
	var claims []attest.BaseClaim
	for _, m := range vouchers {
		root := m.Get(attest.FacetRoot)
		if !slices.Contains(g.Foreign.Names(), root) || slices.ContainsFunc(claims, func(c attest.BaseClaim) bool { return c.Root == root }) {
			continue
		}
		named, err := g.vouches(ctx, m.ID, img)
		if err != nil {
			return base, err
		}
		if named {
			claims = append(claims, attest.BaseClaim{
				From: attest.BaseFromAttestation, Name: attest.BaseName{Repository: base.Repository, Digest: base.Digest}.String(), Digest: base.Digest,
				Result: attest.Attested, Root: root, Detail: "named by provenance under foreign root " + root + ", record " + m.ID.String(),
			})
		}
	}
	if len(claims) > 0 {
		base.Result, base.Claims = attest.Attested, append(claims, base.Claims...)
	}
	return base, nil
}

// vouchers returns the newest imported provenances of an image, the newest first.
func (g *Gate) vouchers(ctx context.Context, ref attest.ImageRef) ([]ledger.Meta, error) {
	var out []ledger.Meta
	for _, kind := range provenanceTypes {
		found, err := g.Ledger.Find(ctx, ledger.Query{Kind: attest.KindImport, Limit: maxVouchers, Facets: []attest.Facet{
			{Name: attest.FacetDigest, Value: ref.Digest.String()}, {Name: attest.FacetRepository, Value: string(ref.Repository)},
			{Name: attest.FacetSays, Value: kind},
		}})
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	slices.SortFunc(out, func(a, b ledger.Meta) int { return cmp.Compare(b.Index, a.Index) })
	return out, nil
}

// vouches reports whether the one image that an imported provenance names is the base
// of img.
func (g *Gate) vouches(ctx context.Context, id attest.RecordID, img attest.Image) (bool, error) {
	rec, err := g.Ledger.Get(ctx, id)
	if err != nil {
		return false, err
	}
	e, err := g.Verifier.Record(rec)
	if err != nil {
		return false, err // the service wrote it: something was tampered with
	}
	if _, ok := e.Imported(); !ok || !e.Covers(img.Ref.Digest) {
		return false, nil
	}
	s, err := statementOf(rec)
	if err != nil {
		return false, err
	}
	var said attest.Import
	if err := json.Unmarshal(s.Predicate, &said); err != nil {
		return false, fmt.Errorf("record %s holds no import: %w", rec.ID, err)
	}
	statement, err := foreign.Payload(said.Form, said.Content, img.Ref.Digest)
	if err != nil {
		return false, nil
	}
	from, err := g.Registry.Dependencies(statement, img.Ref.Digest)
	want := attest.BaseName{Repository: img.Base.Repository, Digest: img.Base.Digest}
	return err == nil && len(from) == 1 && from[0] == want, nil
}
