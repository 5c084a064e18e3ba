package gate

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
)

// Page sizes of lists (AIP-158).
const (
	defaultPage = 100
	maxPage     = 1000
	maxArtifact = 200 // records with their bundles, about 10 KiB each

	maxArtifactBytes = 8 << 20 // of their envelopes
)

// Decision returns a recorded decision by its number, for auditors and promoters
// of its repository.
func (g *Gate) Decision(ctx context.Context, id attest.Identity, index uint64) (Decision, error) {
	if err := g.Ready(); err != nil {
		return Decision{}, err
	}
	notFound := attest.Errorf(attest.RecordNotFound, "decision %d does not exist, or you may not see it", index)
	rec, err := g.Ledger.At(ctx, index)
	if err != nil {
		if attest.ReasonOf(err) == attest.RecordNotFound {
			return Decision{}, notFound
		}
		return Decision{}, err
	}
	if rec.Kind != attest.KindPromotion && rec.Kind != attest.KindDenial {
		return Decision{}, notFound
	}
	if g.mayRead(id, rec.Facts, policy.Auditors, policy.Promoters) != nil {
		return Decision{}, notFound // whether it exists is not a stranger's to know
	}
	return g.decisionOf(ctx, rec)
}

// decisionOf renders the record of a decision.
func (g *Gate) decisionOf(ctx context.Context, rec attest.Record) (Decision, error) {
	s, err := statementOf(rec)
	if err != nil {
		return Decision{}, err
	}
	var p struct {
		attest.Decided
	}
	if err := json.Unmarshal(s.Predicate, &p); err != nil {
		return Decision{}, fmt.Errorf("parsing decision %d: %w", rec.Index, err)
	}
	img, err := s.Image()
	if err != nil {
		return Decision{}, err
	}
	d := Decision{
		Number: rec.Index, RecordID: rec.ID, Verdict: Denied, Track: p.Track, Stage: p.Stage,
		Ref: img.Ref, Results: p.Results, Time: rec.Time, Policy: p.Policy, LogSize: p.LogSize,
	}
	if rec.Kind == attest.KindPromotion {
		d.Verdict = Allowed
		state, err := g.Ledger.Promotion(ctx, rec.ID)
		if err != nil {
			return Decision{}, err
		}
		if state.State == ledger.Void {
			d.Verdict = Aborted
			d.Results = append(slices.Clone(d.Results), stageMoved(d.Stage, state.Why))
		}
	}
	if d.Summary, err = g.summaryLine(ctx, p.Evidence); err != nil {
		return Decision{}, err
	}
	return d, g.fill(ctx, &d)
}

// summaryLine names the source of the provenance that a decision rests on.
func (g *Gate) summaryLine(ctx context.Context, evidence []attest.EvidenceRef) (string, error) {
	for _, e := range evidence {
		if e.PredicateType != attest.PredicateProvenance {
			continue
		}
		rec, err := g.Ledger.Get(ctx, e.Record)
		if err != nil {
			return "", err
		}
		s, err := statementOf(rec)
		if err != nil {
			return "", err
		}
		p, err := attest.ParseProvenance(s.Predicate)
		if err != nil {
			return "", err
		}
		return p.Summary(), nil
	}
	return "", nil
}

// mayRead admits a holder of one of the roles for every repository that a record
// is about. A record about none — a policy, a precertificate — is for those whose
// role covers everything.
func (g *Gate) mayRead(id attest.Identity, f attest.Facts, roles ...policy.Role) error {
	repos := f.All(attest.FacetRepository)
	if len(repos) == 0 {
		return g.Policy.AllowAll(policy.Auditors, id)
	}
	for _, repo := range repos {
		if err := g.mayReadRepository(id, attest.Repository(repo), roles...); err != nil {
			return err
		}
	}
	return nil
}

func (g *Gate) mayReadRepository(id attest.Identity, repo attest.Repository, roles ...policy.Role) error {
	var err error
	for _, role := range roles {
		if err = g.Policy.Allow(role, id, repo); err == nil {
			return nil
		}
	}
	return err
}

// Artifact returns the first 200 records about a digest, oldest first and with
// their bundles, for auditors and promoters of its repository. Records lists all.
// Of other evidence and imports, what is beyond 8 MiB comes without envelope and
// bundle: Record has them.
func (g *Gate) Artifact(ctx context.Context, id attest.Identity, ref attest.ImageRef) ([]Item, error) {
	if err := g.Ready(); err != nil {
		return nil, err
	}
	if err := g.mayReadRepository(id, ref.Repository, policy.Auditors, policy.Promoters); err != nil {
		return nil, err
	}
	q := ledger.Query{
		Facets:    []attest.Facet{{Name: attest.FacetDigest, Value: ref.Digest.String()}},
		Ascending: true, Limit: maxPage,
	}
	var out []Item
	left := int64(maxArtifactBytes)
	for {
		metas, err := g.Ledger.Find(ctx, q)
		if err != nil {
			return nil, err
		}
		for _, m := range metas {
			if g.mayRead(id, m.Facts, policy.Auditors, policy.Promoters) != nil {
				continue // the same digest in a repository that is not the caller's, however often
			}
			size, err := g.Ledger.EnvelopeSize(ctx, m.ID)
			if err != nil {
				return nil, err
			}
			it := Item{Record: attest.Record{ID: m.ID, Index: m.Index, Facts: m.Facts}}
			mayBeLarge := m.Kind == attest.KindEvidence || m.Kind == attest.KindImport
			if !mayBeLarge || size <= left {
				left -= size
				if it, err = g.item(ctx, m.ID); err != nil {
					return nil, err
				}
			}
			if out = append(out, it); len(out) == maxArtifact {
				return out, nil
			}
		}
		if len(metas) < q.Limit {
			break
		}
		q.After = metas[len(metas)-1].Index
	}
	if len(out) == 0 {
		return nil, attest.Errorf(attest.RecordNotFound, "nothing is recorded about %s", ref)
	}
	return out, nil
}

func (g *Gate) item(ctx context.Context, id attest.RecordID) (Item, error) {
	rec, err := g.Ledger.Get(ctx, id)
	if err != nil {
		return Item{}, err
	}
	it := Item{Record: rec}
	if rec.Kind != attest.KindPrecertificate {
		it.Bundle, err = rec.Bundle(g.Signer.LogID())
	}
	return it, err
}

// Record returns one record, for auditors of every repository that it is about.
func (g *Gate) Record(ctx context.Context, id attest.Identity, rid attest.RecordID) (Item, error) {
	if err := g.Ready(); err != nil {
		return Item{}, err
	}
	notFound := attest.Errorf(attest.RecordNotFound, "record %s does not exist, or you may not see it", rid)
	it, err := g.item(ctx, rid)
	if attest.ReasonOf(err) == attest.RecordNotFound {
		return Item{}, notFound
	}
	if err != nil {
		return Item{}, err
	}
	if g.mayRead(id, it.Record.Facts, policy.Auditors) != nil {
		return Item{}, notFound
	}
	return it, nil
}

// Records lists the records that an auditor may see, newest first.
func (g *Gate) Records(ctx context.Context, id attest.Identity, q RecordsQuery) (RecordsPage, error) {
	if err := g.Ready(); err != nil {
		return RecordsPage{}, err
	}
	if !slices.ContainsFunc(g.Policy.Grants(id), func(gr policy.Grant) bool { return gr.Role == policy.Auditors }) {
		return RecordsPage{}, attest.Errorf(attest.RoleMissing, "lists are for the role auditors, which the policy does not give you")
	}
	find, err := parseFilter(q.Filter)
	if err != nil {
		return RecordsPage{}, err
	}
	size, err := pageSize(q.PageSize)
	if err != nil {
		return RecordsPage{}, err
	}
	page := RecordsPage{LogSize: g.Ledger.Size()}
	if find.Before, err = openToken(q.PageToken, q.Filter); err != nil {
		return RecordsPage{}, err
	}
	// Records that the caller may not see are passed over; the scan is bounded so
	// that one call costs at most so much, and the token goes on from there.
	for range 20 {
		find.Limit = size
		metas, err := g.Ledger.Find(ctx, find)
		if err != nil {
			return RecordsPage{}, err
		}
		for _, m := range metas {
			find.Before = m.Index
			if g.mayRead(id, m.Facts, policy.Auditors) == nil {
				page.Records = append(page.Records, RecordSummary{m.ID, m.Index, m.Facts})
			}
			if len(page.Records) == size {
				page.Next = sealToken(find.Before, q.Filter)
				return page, nil
			}
		}
		if len(metas) < size || find.Before == 0 {
			return page, nil
		}
	}
	page.Next = sealToken(find.Before, q.Filter)
	return page, nil
}

func pageSize(n int) (int, error) {
	switch {
	case n < 0:
		return 0, attest.Errorf(attest.BadRequest, "page_size %d is negative", n)
	case n == 0:
		return defaultPage, nil
	}
	return min(n, maxPage), nil
}

// A page token says where to go on and is bound to the filter it was made for.
// Behind record 0 there is nothing to go on with.
func sealToken(before uint64, filter string) string {
	if before == 0 {
		return ""
	}
	return number(before) + "." + attest.Key("page", filter)[:16]
}

func openToken(token, filter string) (uint64, error) {
	if token == "" {
		return 0, nil
	}
	n, bound, _ := strings.Cut(token, ".")
	before, err := strconv.ParseUint(n, 10, 63)
	if err != nil || before == 0 || bound != attest.Key("page", filter)[:16] {
		return 0, attest.Errorf(attest.BadRequest, "page_token does not belong to this list: repeat the call with the filter it was made for")
	}
	return before, nil
}

// filterNames are the names that a filter may use beside kind.
var filterNames = []string{
	attest.FacetDigest, attest.FacetRepository, attest.FacetPredicate, attest.FacetIdentity, attest.FacetIssuer,
	attest.FacetCommit, attest.FacetSource, attest.FacetRun, attest.FacetBuilder, attest.FacetBase,
	attest.FacetStage, attest.FacetCaller, attest.FacetPromotion, attest.FacetTicket, attest.FacetReason,
}

// parseFilter reads NAME="VALUE" joined by AND: the subset of AIP-160 that is
// answered from an index.
func parseFilter(filter string) (ledger.Query, error) {
	var q ledger.Query
	rest := strings.TrimSpace(filter)
	if len(rest) > 2048 {
		return q, attest.Errorf(attest.BadRequest, "filter has more than 2048 bytes")
	}
	for rest != "" {
		name, after, ok := strings.Cut(rest, "=")
		name = strings.TrimSpace(name)
		value, err := strconv.QuotedPrefix(strings.TrimSpace(after))
		if !ok || err != nil || !strings.HasPrefix(value, `"`) {
			return q, attest.Errorf(attest.BadRequest, "filter: at %q: write NAME=\"VALUE\" joined by AND", rest)
		}
		rest = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(after), value))
		text, err := strconv.Unquote(value)
		if err != nil {
			return q, attest.Errorf(attest.BadRequest, "filter: %s is not a quoted string", value)
		}
		if err := addTerm(&q, name, text); err != nil {
			return q, err
		}
		if rest == "" {
			break
		}
		if rest, ok = strings.CutPrefix(rest, "AND "); !ok || strings.TrimSpace(rest) == "" {
			return q, attest.Errorf(attest.BadRequest, "filter: expected AND and another term at %q", rest)
		}
	}
	return q, nil
}

func addTerm(q *ledger.Query, name, value string) error {
	switch {
	case value == "":
		return attest.Errorf(attest.BadRequest, "filter: %s is compared with an empty value, which would match what is absent", name)
	case name == "kind":
		if q.Kind != "" {
			return attest.Errorf(attest.BadRequest, "filter: kind stands twice, and no record has two")
		}
		q.Kind = attest.RecordKind(value)
		return nil
	case !slices.Contains(filterNames, name):
		return attest.Errorf(attest.BadRequest, "filter: unknown name %q: use kind, %s", name, strings.Join(filterNames, ", "))
	case name == attest.FacetCommit && !attest.CommitPattern.MatchString(value):
		return attest.Errorf(attest.BadRequest, "filter: commit %q is not a full object name of 40 or 64 lower-case hex digits: a short one may name several", value)
	}
	q.Facets = append(q.Facets, attest.Facet{Name: name, Value: value})
	return nil
}

// Stages lists the stages of the repositories that the caller has a role for,
// ordered by track, repository and the track's own order.
func (g *Gate) Stages(ctx context.Context, id attest.Identity, q StagesQuery) ([]StageStatus, string, error) {
	if err := g.Ready(); err != nil {
		return nil, "", err
	}
	size, err := pageSize(q.PageSize)
	if err != nil {
		return nil, "", err
	}
	bound := q.Track + " " + string(q.Repository)
	skip, err := openToken(q.PageToken, bound)
	if err != nil {
		return nil, "", err
	}
	repos, err := g.repositories(ctx)
	if err != nil {
		return nil, "", err
	}
	var out []StageStatus
	var seen uint64
	for _, track := range g.Policy.Tracks() {
		if q.Track != "" && q.Track != track.Name {
			continue
		}
		for _, repo := range repos {
			if (q.Repository != "" && q.Repository != repo) || !covers(track, repo) || g.mayAsk(id, repo) != nil {
				continue
			}
			for _, stage := range track.Stages() {
				if seen++; seen <= skip {
					continue
				}
				if len(out) == size {
					return out, sealToken(seen-1, bound), nil
				}
				s, err := g.stageStatus(ctx, track, stage, repo)
				if err != nil {
					return nil, "", err
				}
				out = append(out, s)
			}
		}
	}
	return out, "", nil
}

// repositories returns those for which something was promoted, in order.
func (g *Gate) repositories(ctx context.Context) ([]attest.Repository, error) {
	var out []attest.Repository
	var last ledger.StageState
	for {
		states, err := g.Ledger.Stages(ctx, last, maxPage)
		if err != nil {
			return nil, err
		}
		for _, s := range states {
			out = append(out, s.Repository)
		}
		if len(states) < maxPage {
			slices.Sort(out)
			return slices.Compact(out), nil
		}
		last = states[len(states)-1]
	}
}

func covers(t *policy.Track, repo attest.Repository) bool {
	return slices.ContainsFunc(t.Images(), func(p policy.Pattern) bool { return p.Matches(repo) })
}

func (g *Gate) stageStatus(ctx context.Context, track *policy.Track, stage *policy.Stage, repo attest.Repository) (StageStatus, error) {
	s := StageStatus{Track: track.Name, Stage: stage.Name, After: stage.After, Repository: repo}
	st, err := g.Ledger.Stage(ctx, track.Name, stage.Name, repo)
	if err != nil {
		return s, err
	}
	if st.Head != nil {
		e := entry(*st.Head)
		s.Current = &e
	}
	return s, nil
}

// WhoAmI returns the caller as the service sees it. It needs no role: it is how a
// caller without one finds out what to ask for.
func (g *Gate) WhoAmI(_ context.Context, id attest.Identity, repo attest.Repository) (Who, error) {
	w := Who{Identity: id, When: policy.When(id)}
	for _, gr := range g.Policy.Grants(id) {
		r := Role{Name: string(gr.Role), Covers: repo != "" && gr.Covers(repo)}
		for _, p := range gr.Images {
			r.Images = append(r.Images, p.String())
		}
		w.Roles = append(w.Roles, r)
	}
	return w, nil
}

// Trust returns what verifiers need.
func (g *Gate) Trust() Trust {
	return Trust{g.Service, g.Signer.TrustedRoot(), g.Signer.Fingerprint(), g.Signer.GateKeyPEM()}
}

// Checkpoint returns the newest published checkpoint: a C2SP signed note.
func (g *Gate) Checkpoint(ctx context.Context) ([]byte, error) {
	return g.Ledger.Read(ctx, "checkpoint")
}

// LogFile returns one resource of the log (C2SP tlog-tiles). Checkpoint and hash
// tiles are public. Entry bundles name every repository's certificates, so they
// are for auditors of everything; nil is an anonymous caller.
func (g *Gate) LogFile(ctx context.Context, id *attest.Identity, path string) ([]byte, error) {
	if strings.HasPrefix(path, "tile/entries/") {
		if id == nil {
			return nil, attest.Errorf(attest.TokenMissing, "entry bundles are for auditors: sign in")
		}
		if err := g.Policy.AllowAll(policy.Auditors, *id); err != nil {
			return nil, err
		}
	}
	return g.Ledger.Read(ctx, path)
}
