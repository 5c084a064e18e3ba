package gate_test

import (
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// Every method refuses who holds no role, or one that is not for it. Only
// WhoAmI, Trust and the public part of the log are for everybody.
func TestRoles(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	img := s.PushApp("acme/api")
	signed := sign(t, s, s.Token(nil), img.ImageRef)
	promoted := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})

	nobody := s.Identity(s.PersonToken("n-1", "sales"))
	signer := s.Identity(s.Token(nil))
	promoter := s.Identity(s.PromoterToken()) // may sign too: the same repository
	all := auditor(s)
	ours := s.Identity(s.PersonToken("a-2", "acme"))
	theirs := s.Identity(s.PersonToken("a-3", "other"))
	stranger := s.Identity(s.Token(map[string]any{"repository_id": "1"}))

	type callers map[string]attest.Identity
	for _, row := range []struct {
		name    string
		call    func(attest.Identity) error
		refused map[attest.Reason]callers
		allowed callers
	}{
		{"Sign", func(id attest.Identity) error {
			out, err := s.Gate.Sign(t.Context(), id, gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}})
			if err != nil {
				return err
			}
			return out[0].Err
		}, map[attest.Reason]callers{
			attest.SourceNotAllowed: {"nobody": nobody, "auditor": all, "stranger": stranger},
		}, callers{"signer": signer}}, // the promoter is another job, so its signature would be another record
		{"Verify", func(id attest.Identity) error {
			_, err := s.Gate.Verify(t.Context(), id, gate.VerifyRequest{Ref: img.ImageRef, Stage: "live"})
			return err
		}, map[attest.Reason]callers{
			attest.SourceNotAllowed: {"nobody": nobody, "another auditor": theirs, "stranger": stranger},
		}, callers{"signer": signer, "promoter": promoter, "auditor": all, "our auditor": ours}},
		{"Promote", func(id attest.Identity) error {
			_, err := s.Gate.Promote(t.Context(), id, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
			return err
		}, map[attest.Reason]callers{
			attest.RoleMissing:      {"nobody": nobody, "auditor": all},
			attest.SourceNotAllowed: {"signer": signer, "stranger": stranger},
		}, callers{"promoter": promoter}},
		{"Promote dry run", func(id attest.Identity) error {
			_, err := s.Gate.Promote(t.Context(), id, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1", DryRun: true})
			return err
		}, map[attest.Reason]callers{
			attest.RoleMissing:      {"nobody": nobody, "auditor": all},
			attest.SourceNotAllowed: {"signer": signer},
		}, callers{"promoter": promoter}},
		{"Decision", func(id attest.Identity) error {
			_, err := s.Gate.Decision(t.Context(), id, promoted.Number)
			return err
		}, map[attest.Reason]callers{
			attest.RecordNotFound: {"nobody": nobody, "signer": signer, "another auditor": theirs, "stranger": stranger},
		}, callers{"promoter": promoter, "auditor": all, "our auditor": ours}},
		{"Record", func(id attest.Identity) error {
			_, err := s.Gate.Record(t.Context(), id, signed.Provenance.ID)
			return err
		}, map[attest.Reason]callers{
			attest.RecordNotFound: {"nobody": nobody, "signer": signer, "promoter": promoter, "another auditor": theirs},
		}, callers{"auditor": all, "our auditor": ours}},
		{"Record of a precertificate", func(id attest.Identity) error {
			_, err := s.Gate.Record(t.Context(), id, find(t, s, attest.KindPrecertificate)[0].ID)
			return err
		}, map[attest.Reason]callers{
			attest.RecordNotFound: {"our auditor": ours, "signer": signer},
		}, callers{"auditor": all}},
		{"Record of the policy", func(id attest.Identity) error {
			_, err := s.Gate.Record(t.Context(), id, find(t, s, attest.KindPolicy)[0].ID)
			return err
		}, map[attest.Reason]callers{
			attest.RecordNotFound: {"our auditor": ours, "signer": signer},
		}, callers{"auditor": all}},
		{"Artifact", func(id attest.Identity) error {
			_, err := s.Gate.Artifact(t.Context(), id, img.ImageRef)
			return err
		}, map[attest.Reason]callers{
			attest.RoleMissing:      {"nobody": nobody, "another auditor": theirs},
			attest.SourceNotAllowed: {"signer": signer},
		}, callers{"promoter": promoter, "auditor": all, "our auditor": ours}},
		{"Records", func(id attest.Identity) error {
			_, err := s.Gate.Records(t.Context(), id, gate.RecordsQuery{})
			return err
		}, map[attest.Reason]callers{
			attest.RoleMissing: {"nobody": nobody, "signer": signer, "promoter": promoter},
		}, callers{"auditor": all, "our auditor": ours, "another auditor": theirs}},
		{"LogFile entries", func(id attest.Identity) error {
			_, err := s.Gate.LogFile(t.Context(), &id, "tile/entries/000.p/1")
			return err
		}, map[attest.Reason]callers{
			attest.RoleMissing:      {"signer": signer, "promoter": promoter},
			attest.SourceNotAllowed: {"nobody": nobody, "our auditor": ours}, // persons, as the auditors of everything are
		}, callers{"auditor": all}},
		{"WhoAmI", func(id attest.Identity) error {
			_, err := s.Gate.WhoAmI(t.Context(), id, img.Repository)
			return err
		}, nil, callers{"nobody": nobody, "stranger": stranger}},
	} {
		t.Run(row.name, func(t *testing.T) {
			size := s.Ledger.Size()
			for want, who := range row.refused {
				for name, id := range who {
					if got := attest.ReasonOf(row.call(id)); got != want {
						t.Errorf("%s is answered %q, want %s", name, got, want)
					}
				}
			}
			for name, id := range row.allowed {
				if err := row.call(id); err != nil {
					t.Errorf("%s is refused: %v", name, err)
				}
			}
			if s.Ledger.Size() != size {
				t.Error("something was recorded")
			}
		})
	}
	if _, err := s.Gate.LogFile(t.Context(), nil, "tile/entries/000.p/1"); attest.ReasonOf(err) != attest.TokenMissing {
		t.Errorf("an anonymous caller's entry bundle: %v", err)
	}
	if _, err := s.Gate.LogFile(t.Context(), nil, "checkpoint"); err != nil {
		t.Errorf("the checkpoint is public: %v", err)
	}
}

// K07: who may not see a record cannot tell it from one that does not exist.
func TestK07StrangersLearnNothing(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	img := s.PushApp("acme/api")
	signed := sign(t, s, s.Token(nil), img.ImageRef)
	promoted := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	stranger := s.Identity(s.PersonToken("a-3", "other"))

	_, there := s.Gate.Decision(t.Context(), stranger, promoted.Number)
	_, missing := s.Gate.Decision(t.Context(), stranger, 1<<40)
	wantReason(t, there, attest.RecordNotFound)
	sameText(t, missing, there, "1099511627776", strconv.FormatUint(promoted.Number, 10))

	none := attest.RecordID(attest.Hash([]byte("none")))
	_, there = s.Gate.Record(t.Context(), stranger, signed.Provenance.ID)
	_, missing = s.Gate.Record(t.Context(), stranger, none)
	wantReason(t, there, attest.RecordNotFound)
	sameText(t, missing, there, none.String(), signed.Provenance.ID.String())

	// A signature is no decision, whoever asks.
	_, err := s.Gate.Decision(t.Context(), auditor(s), signed.Signature.Index)
	wantReason(t, err, attest.RecordNotFound)

	page, err := s.Gate.Records(t.Context(), stranger, gate.RecordsQuery{})
	if err != nil || len(page.Records) != 0 {
		t.Errorf("a stranger lists %d records: %v", len(page.Records), err)
	}
	stages, _, err := s.Gate.Stages(t.Context(), stranger, gate.StagesQuery{})
	if err != nil || len(stages) != 0 {
		t.Errorf("a stranger lists %d stages: %v", len(stages), err)
	}
	// The same digest in a repository that is not the caller's.
	_, err = s.Gate.Artifact(t.Context(), stranger, attest.ImageRef{Repository: attest.Repository(s.Registry.Host() + "/other/api"), Digest: img.Digest})
	wantReason(t, err, attest.RecordNotFound)
}

func sameText(t *testing.T, a, b error, nameA, nameB string) {
	t.Helper()
	if x, y := strings.ReplaceAll(a.Error(), nameA, "X"), strings.ReplaceAll(b.Error(), nameB, "X"); x != y {
		t.Errorf("%q differs from %q", x, y)
	}
}

// Artifact shows an image's whole life, with bundles that verify.
func TestArtifact(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	img := s.PushApp("acme/api")
	denied := promote(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	wantDenied(t, denied.Decision, attest.NoProvenance)
	sign(t, s, s.Token(nil), img.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	items, err := s.Gate.Artifact(t.Context(), auditor(s), img.ImageRef)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []attest.RecordKind
	for _, it := range items {
		kinds = append(kinds, it.Record.Kind)
		if ev, err := s.Verifier.Bundle(it.Bundle, img.Digest); err != nil || ev.Kind() != it.Record.Kind {
			t.Errorf("the bundle of the %s does not verify: %v", it.Record.Kind, err)
		}
	}
	want := []attest.RecordKind{
		attest.KindDenial, attest.KindSignature, attest.KindProvenance, attest.KindPromotion, attest.KindVSA, attest.KindVSA, attest.KindEffect,
	}
	if d := cmp.Diff(want, kinds); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestRecordsFilter(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	base := s.PushBase("debian", "12")
	img := s.PushOn(base, "12", "acme/api")
	sign(t, s, s.Token(nil), img.ImageRef)
	promoted := done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1", Ticket: `a "quoted" ticket`})
	for _, row := range []struct {
		name   string
		filter string
		want   int // records; -1: BAD_REQUEST
	}{
		{"nothing", ``, int(s.Ledger.Size())},
		{"kind", `kind="provenance"`, 1},
		{"digest", `digest="` + img.Digest.String() + `"`, 6},
		{"two terms", `digest="` + img.Digest.String() + `" AND kind="signature"`, 1},
		{"much space", `  kind  =  "signature"   AND   commit = "` + testkit.Commit + `"  `, 1},
		{"commit", `commit="` + testkit.Commit + `"`, 3},
		{"base", `base="` + base.Digest.String() + `"`, 1},
		{"stage", `stage="acme/live"`, 2},
		{"promotion", `promotion="` + promoted.RecordID.String() + `"`, 1},
		{"ticket with quotes", `ticket="a \"quoted\" ticket"`, 1},
		{"a value that no record has", `run="https://example.com"`, 0},
		{"an unknown kind", `kind="sandwich"`, 0},
		{"contradictory terms", `digest="` + img.Digest.String() + `" AND digest="` + base.Digest.String() + `"`, 0},

		{"B09 short commit", `commit="4be1d0c"`, -1},
		{"B09 commit in upper case", `commit="` + strings.ToUpper(testkit.Commit) + `"`, -1},
		{"B09 a branch", `commit="main"`, -1},
		{"B09 41 digits", `commit="` + testkit.Commit + `0"`, -1},
		{"A23 empty value", `commit=""`, -1},
		{"A23 empty digest", `digest=""`, -1},
		{"unknown name", `colour="red"`, -1},
		{"token ids are not for lists", `token="x"`, -1},
		{"no value", `kind`, -1},
		{"no quotes", `kind=provenance`, -1},
		{"raw quotes", "kind=`provenance`", -1},
		{"single quotes", `kind='provenance'`, -1},
		{"an open quote", `kind="provenance`, -1},
		{"OR", `kind="provenance" OR kind="signature"`, -1},
		{"lower-case and", `kind="provenance" and digest="x"`, -1},
		{"nothing behind AND", `kind="provenance" AND `, -1},
		{"no AND", `kind="provenance" digest="x"`, -1},
		{"AND without a space", `kind="provenance"ANDdigest="x"`, -1},
		{"kind twice", `kind="provenance" AND kind="signature"`, -1},
		{"another operator", `kind!="provenance"`, -1},
		{"K01 a quote in the value", `kind="x' OR '1'='1"`, 0},
		{"too long", `kind="` + strings.Repeat("x", 2048) + `"`, -1},
	} {
		t.Run(row.name, func(t *testing.T) {
			page, err := s.Gate.Records(t.Context(), auditor(s), gate.RecordsQuery{Filter: row.filter})
			if row.want < 0 {
				wantReason(t, err, attest.BadRequest)
				return
			}
			if err != nil || len(page.Records) != row.want {
				t.Errorf("%d records (%v), want %d", len(page.Records), err, row.want)
			}
		})
	}
}

func TestRecordsPages(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{Policy: policyOf(1, looseSigners, oneStage)})
	for _, img := range pushMany(s, t, 3) {
		sign(t, s, s.Token(nil), img.Ref)
	}
	size := int(s.Ledger.Size())
	var want []uint64
	for i := size - 1; i >= 0; i-- {
		want = append(want, uint64(i))
	}
	for per := 1; per <= size+1; per++ {
		var got []uint64
		query := gate.RecordsQuery{PageSize: per}
		for pages := 0; ; pages++ {
			page, err := s.Gate.Records(t.Context(), auditor(s), query)
			if err != nil {
				t.Fatalf("%d per page, after %v: %v", per, got, err)
			}
			if page.LogSize != uint64(size) || len(page.Records) > per || pages > size {
				t.Fatalf("%d per page: page %d has %d records of %d", per, pages, len(page.Records), page.LogSize)
			}
			for _, r := range page.Records {
				got = append(got, r.Index)
			}
			if page.Next == "" {
				break
			}
			query.PageToken = page.Next
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%d per page (-want +got):\n%s", per, d)
		}
	}
	first, err := s.Gate.Records(t.Context(), auditor(s), gate.RecordsQuery{PageSize: 1, Filter: `kind="signature"`})
	if err != nil || first.Next == "" {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name  string
		query gate.RecordsQuery
	}{
		{"token of another filter", gate.RecordsQuery{PageToken: first.Next}},
		{"token of a similar filter", gate.RecordsQuery{PageToken: first.Next, Filter: `kind="provenance"`}},
		{"no token", gate.RecordsQuery{PageToken: "x"}},
		{"token without its binding", gate.RecordsQuery{PageToken: strings.Split(first.Next, ".")[0], Filter: `kind="signature"`}},
		{"J05 negative token", gate.RecordsQuery{PageToken: "-" + first.Next, Filter: `kind="signature"`}},
		{"J05 a token beyond 63 bits", gate.RecordsQuery{PageToken: "18446744073709551615." + strings.Split(first.Next, ".")[1], Filter: `kind="signature"`}},
		{"J05 negative page size", gate.RecordsQuery{PageSize: -1}},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := s.Gate.Records(t.Context(), auditor(s), row.query)
			wantReason(t, err, attest.BadRequest)
		})
	}
	if page, err := s.Gate.Records(t.Context(), auditor(s), gate.RecordsQuery{PageSize: 1 << 30}); err != nil || len(page.Records) != size {
		t.Errorf("J05 a huge page: %v", err)
	}
}

func FuzzFilter(f *testing.F) {
	s := testkit.NewStack(f, testkit.Options{})
	id := auditor(s)
	for _, seed := range []string{``, `kind="provenance"`, `kind="a" AND digest="b"`, `commit="4be1d0c"`, "kind=`x`", `a="\u0000"`, `kind="x" AND`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, filter string) {
		page, err := s.Gate.Records(t.Context(), id, gate.RecordsQuery{Filter: filter})
		if err != nil && attest.ReasonOf(err) != attest.BadRequest {
			t.Fatalf("%q: %v", filter, err)
		}
		// Only an empty filter, or one that names the one record, may match it.
		if err == nil && len(page.Records) > 0 && strings.TrimSpace(filter) != "" && !strings.Contains(filter, "=") {
			t.Fatalf("%q matches", filter)
		}
	})
}

func TestStagesPages(t *testing.T) {
	t.Parallel()
	s := testkit.NewStack(t, testkit.Options{})
	for _, repo := range []string{"acme/api", "acme/web"} {
		img := s.Push(repo, "", testkit.RandomImage(t))
		sign(t, s, s.Token(nil), img.ImageRef)
		done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	}
	all, next, err := s.Gate.Stages(t.Context(), auditor(s), gate.StagesQuery{})
	if err != nil || len(all) != 6 || next != "" {
		t.Fatalf("%d stages, next %q: %v", len(all), next, err)
	}
	for per := 1; per <= 7; per++ {
		var got []gate.StageStatus
		query := gate.StagesQuery{PageSize: per}
		for {
			part, next, err := s.Gate.Stages(t.Context(), auditor(s), query)
			if err != nil || len(part) > per || len(got) > len(all) {
				t.Fatal(err)
			}
			got = append(got, part...)
			if next == "" {
				break
			}
			query.PageToken = next
		}
		if d := cmp.Diff(all, got); d != "" {
			t.Errorf("%d per page (-want +got):\n%s", per, d)
		}
	}
	_, next, err = s.Gate.Stages(t.Context(), auditor(s), gate.StagesQuery{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = s.Gate.Stages(t.Context(), auditor(s), gate.StagesQuery{PageToken: next, Track: "acme"})
	wantReason(t, err, attest.BadRequest)
}
