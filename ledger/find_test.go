package ledger_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
)

func TestFind(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	a, b := k.credential("1"), k.credential("2")
	k.append(l, k.signing(a, 1, "1")...)            // 0 pre, 1 sig, 2 prov
	k.append(l, k.signing(b, 2, "2")...)            // 3, 4, 5
	k.append(l, k.signing(a, 3, "1")[1:]...)        // 6 sig, 7 prov
	k.append(l, k.policy(1, 1))                     // 8
	k.append(l, k.promotion(1, "test", 1, zero, 0)) // 9
	digest := func(n int) attest.Facet {
		return attest.Facet{Name: attest.FacetDigest, Value: image(n).Ref.Digest.String()}
	}
	run := func(n string) attest.Facet {
		return attest.Facet{Name: attest.FacetRun, Value: "https://github.com/acme/api/actions/runs/" + n + "/attempts/1"}
	}
	inRepo := attest.Facet{Name: attest.FacetRepository, Value: string(repo)}
	for _, row := range []struct {
		name string
		q    ledger.Query
		want []uint64
	}{
		{"everything, newest first", ledger.Query{}, []uint64{9, 8, 7, 6, 5, 4, 3, 2, 1, 0}},
		{"oldest first", ledger.Query{Ascending: true, Limit: 3}, []uint64{0, 1, 2}},
		{"after", ledger.Query{Ascending: true, After: 2, Limit: 2}, []uint64{3, 4}},
		{"before", ledger.Query{Before: 3, Limit: 2}, []uint64{2, 1}},
		{"between", ledger.Query{After: 2, Before: 5}, []uint64{4, 3}},
		{"kind", ledger.Query{Kind: attest.KindProvenance}, []uint64{7, 5, 2}},
		{"kind before", ledger.Query{Kind: attest.KindProvenance, Before: 7}, []uint64{5, 2}},
		{"kind that no record has", ledger.Query{Kind: attest.KindDenial}, nil},
		{"unknown kind", ledger.Query{Kind: "x"}, nil},
		{"digest, any kind", ledger.Query{Facets: []attest.Facet{digest(1)}}, []uint64{9, 2, 1}},
		{"digest and kind", ledger.Query{Kind: attest.KindSignature, Facets: []attest.Facet{digest(1)}}, []uint64{1}},
		{"run", ledger.Query{Facets: []attest.Facet{run("1")}}, []uint64{9, 7, 6, 2, 1, 0}},
		{"two facets", ledger.Query{Facets: []attest.Facet{inRepo, run("2")}}, []uint64{5, 4}},
		{"three facets, oldest first", ledger.Query{Ascending: true, Facets: []attest.Facet{inRepo, run("1"), digest(3)}}, []uint64{6, 7}},
		{"facets of two records", ledger.Query{Facets: []attest.Facet{digest(1), digest(2)}}, nil},
		{"a page over kinds", ledger.Query{Facets: []attest.Facet{inRepo}, Limit: 3}, []uint64{9, 7, 6}},
		{"the next page", ledger.Query{Facets: []attest.Facet{inRepo}, Limit: 3, Before: 6}, []uint64{5, 4, 2}},
		{"value of another facet", ledger.Query{Facets: []attest.Facet{{Name: attest.FacetCommit, Value: string(repo)}}}, nil},
		{"unknown facet", ledger.Query{Facets: []attest.Facet{{Name: "x", Value: "y"}}}, nil},
		{"K01 facet that is SQL", ledger.Query{Facets: []attest.Facet{{Name: "digest' OR 1=1 --", Value: "' OR ''='"}}}, nil},
		{"J05 bounds beyond all", ledger.Query{Before: 1<<64 - 1, Limit: 1}, []uint64{9}},
	} {
		t.Run(row.name, func(t *testing.T) {
			found, err := l.Find(t.Context(), row.q)
			if err != nil {
				t.Fatal(err)
			}
			var got []uint64
			for _, m := range found {
				got = append(got, m.Index)
				r, err := l.Get(t.Context(), m.ID)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(r.Facts, m.Facts); diff != "" || r.Index != m.Index {
					t.Errorf("record %d: the list says otherwise than the envelope:\n%s", m.Index, diff)
				}
			}
			if !slices.Equal(got, row.want) {
				t.Errorf("found %v, want %v", got, row.want)
			}
		})
	}
	for _, limit := range []int{-1, 1001} {
		_, err := l.Find(t.Context(), ledger.Query{Limit: limit})
		wantReason(t, fmt.Sprint("limit ", limit), err, attest.BadRequest)
	}
	k.fsck(l)
}

func TestNotFound(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	r := k.append(l, k.signed(1))[0]
	_, err := l.Get(t.Context(), attest.RecordID{1})
	wantReason(t, "Get", err, attest.RecordNotFound)
	for _, i := range []uint64{1, 1 << 63, 1<<64 - 1} {
		_, err = l.At(t.Context(), i)
		wantReason(t, fmt.Sprint("J05 At ", i), err, attest.RecordNotFound)
	}
	_, err = l.Promotion(t.Context(), r.ID)
	wantReason(t, "a signature as promotion", err, attest.RecordNotFound)
	if _, found, err := l.ByKey(t.Context(), attest.Key("nothing")); found || err != nil {
		t.Errorf("ByKey: %v, %v", found, err)
	}
	for _, key := range []string{"", "zz", "x' OR 1=1"} {
		_, _, err = l.ByKey(t.Context(), key)
		wantReason(t, "K01 key "+key, err, attest.BadRequest)
	}
	if s, err := l.Stage(t.Context(), "payments", "test", repo); err != nil || s.Head != nil {
		t.Errorf("a stage that nothing was promoted to: %+v, %v", s, err)
	}
	if _, ok := l.Policy(); ok {
		t.Error("a policy before the first")
	}
	k.fsck(l)
}

// The first record in the log answers a natural key.
func TestByKeyFirstWins(t *testing.T) {
	t.Parallel()
	k := newKit(t)
	l := k.open()
	c := k.credential("1")
	first := k.append(l, k.signing(c, 1, "1")...)
	second := k.append(l, k.signing(c, 1, "1")...)
	for i := 1; i < 3; i++ {
		if first[i].ID == second[i].ID || first[i].Key != second[i].Key {
			t.Fatal("two signatures with one natural key were expected: the test shows nothing")
		}
		if id, found, err := l.ByKey(t.Context(), first[i].Key); id != first[i].ID || !found || err != nil {
			t.Errorf("ByKey: %s, %v, %v", id, found, err)
		}
	}
	k.fsck(l)
}
