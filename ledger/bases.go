package ledger

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// sideVersion is that of sideTables. Tables of another version are dropped.
const sideVersion = 1

// sideTables remember what registries said of base images when they were asked.
// They follow from no record and no decision rests on them alone: what they helped
// to find is in the provenance that was signed then. They may be lost (design
// promise 6): the next sweep fills them again, without the times before it.
const sideTables = `
-- source is the reference that is followed, as configured: perhaps a mirror's.
CREATE TABLE followed (
	prefix BLOB NOT NULL, source TEXT NOT NULL, repository TEXT NOT NULL, tag TEXT NOT NULL, digest BLOB NOT NULL, manifest BLOB NOT NULL,
	platform TEXT NOT NULL, layers INTEGER NOT NULL, first_seen INTEGER NOT NULL, last_current INTEGER NOT NULL,
	PRIMARY KEY (prefix, source, repository, tag, digest, manifest, platform)) WITHOUT ROWID;
CREATE INDEX followed_source ON followed (source, last_current);

CREATE TABLE base_states (
	repository TEXT NOT NULL, tag TEXT NOT NULL, digest BLOB NOT NULL, manifests BLOB NOT NULL,
	state TEXT NOT NULL, current BLOB NOT NULL, checked INTEGER NOT NULL, since INTEGER NOT NULL,
	PRIMARY KEY (repository, tag, digest, manifests)) WITHOUT ROWID;
CREATE INDEX base_states_checked ON base_states (checked);
`

var sideNames = []string{"followed", "base_states"}

// Bounds of the side tables.
const (
	maxFollowedVersions = 200     // of one tag: digests that it named, the newest
	maxBaseStates       = 100_000 // rows
	maxFoundBases       = 4096    // answers to one question
	maxPrefixes         = 1 << 15 // of one question: 64 platforms with 512 layers
)

// metaSide is the name in the table meta of sideVersion.
const metaSide = "side_version"

// side makes the side tables, unless they are there.
func (x *index) side(ctx context.Context) error {
	var v int64
	err := x.row(ctx, `SELECT value FROM meta WHERE name = $1`, []any{metaSide}, &v)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	var n int
	if err := x.reads.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('followed', 'base_states')`).Scan(&n); err != nil {
		return err
	}
	if v == sideVersion && n == len(sideNames) {
		return nil
	}
	return x.update(ctx, func(t *txn) error {
		for _, name := range sideNames {
			if err := t.script("DROP TABLE IF EXISTS " + name); err != nil {
				return err
			}
		}
		if err := t.script(sideTables); err != nil {
			return err
		}
		return t.set(metaSide, sideVersion)
	})
}

// FollowedBase is a platform of a base image that a followed tag named at some
// time.
type FollowedBase struct {
	attest.BaseName
	Platform    string        // os/arch[/variant]; "" when the base is no index
	Manifest    attest.Digest // of the platform
	Prefix      attest.Digest // hash over all its layers, in order
	Layers      int           // how many those are
	FirstSeen   time.Time     // when the tag was first found to name it
	LastCurrent time.Time     // and last
}

// PutFollowed notes what the reference source, which is followed, names at a time:
// one row for each platform. Of the digests that it named before, the newest 200 are
// kept.
func (l *Ledger) PutFollowed(ctx context.Context, source string, at time.Time, bases []FollowedBase) error {
	if err := l.ready(); err != nil {
		return err
	}
	return unavailable("noting a followed base", l.index.update(ctx, func(t *txn) error {
		for _, b := range bases {
			_, err := t.exec(`INSERT INTO followed (prefix, source, repository, tag, digest, manifest, platform, layers, first_seen, last_current)
				VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9)
				ON CONFLICT (prefix, source, repository, tag, digest, manifest, platform) DO UPDATE SET last_current = excluded.last_current`,
				b.Prefix[:], source, string(b.Repository), b.Tag, b.Digest[:], b.Manifest[:], b.Platform, b.Layers, at.Unix())
			if err != nil {
				return err
			}
		}
		_, err := t.exec(`DELETE FROM followed WHERE source = $1 AND digest NOT IN (
			SELECT digest FROM followed WHERE source = $1 GROUP BY digest ORDER BY max(last_current) DESC, digest LIMIT $2)`,
			source, maxFollowedVersions)
		return err
	}))
}

// NewestFollowed returns what source named last, one for each platform.
func (l *Ledger) NewestFollowed(ctx context.Context, source string) ([]FollowedBase, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	var out []FollowedBase
	err := l.index.each(ctx, `SELECT `+followedColumns+` FROM followed
		WHERE source = $1 AND last_current = (SELECT max(last_current) FROM followed WHERE source = $1)
		ORDER BY digest, platform, manifest, prefix`, []any{source}, func(scan func(...any) error) error {
		b, err := scanFollowed(scan)
		out = append(out, b)
		return err
	})
	return out, unavailable("reading followed bases", err)
}

// Unfollow forgets the bases of all references that are not among keep.
func (l *Ledger) Unfollow(ctx context.Context, keep []string) error {
	if err := l.ready(); err != nil {
		return err
	}
	var gone []string
	err := l.index.each(ctx, `SELECT DISTINCT source FROM followed`, nil, func(scan func(...any) error) error {
		var source string
		err := scan(&source)
		if !slices.Contains(keep, source) {
			gone = append(gone, source)
		}
		return err
	})
	if err != nil || len(gone) == 0 {
		return unavailable("reading followed bases", err)
	}
	return unavailable("forgetting followed bases", l.index.update(ctx, func(t *txn) error {
		for _, source := range gone {
			if _, err := t.exec(`DELETE FROM followed WHERE source = $1`, source); err != nil {
				return err
			}
		}
		return nil
	}))
}

// FollowedBases returns the followed bases whose layers hash to one of the
// prefixes: those that were current last first, of these the deepest; at most 4096.
func (l *Ledger) FollowedBases(ctx context.Context, prefixes []attest.Digest) ([]FollowedBase, error) {
	if err := l.ready(); err != nil {
		return nil, err
	}
	if len(prefixes) > maxPrefixes {
		return nil, attest.Errorf(attest.TooLarge, "%d layer prefixes: at most %d are looked up", len(prefixes), maxPrefixes)
	}
	var some int
	if err := l.index.row(ctx, `SELECT count(*) FROM (SELECT 1 FROM followed LIMIT 1) f`, nil, &some); err != nil || some == 0 {
		return nil, unavailable("reading followed bases", err)
	}
	var out []FollowedBase
	for chunk := range slices.Chunk(prefixes, prefixesAtOnce) {
		args := []any{maxFoundBases}
		for i := range prefixesAtOnce { // the last one again and again, so that there is one statement
			p := chunk[min(i, len(chunk)-1)]
			args = append(args, p[:])
		}
		err := l.index.each(ctx, findFollowed, args, func(scan func(...any) error) error {
			b, err := scanFollowed(scan)
			out = append(out, b)
			return err
		})
		if err != nil {
			return nil, unavailable("reading followed bases", err)
		}
	}
	slices.SortStableFunc(out, func(a, b FollowedBase) int {
		return cmp.Or(b.LastCurrent.Compare(a.LastCurrent), cmp.Compare(b.Layers, a.Layers))
	})
	seen := map[FollowedBase]bool{}
	out = slices.DeleteFunc(out, func(b FollowedBase) bool { // followed under two names
		b.FirstSeen, b.LastCurrent = time.Time{}, time.Time{}
		twice := seen[b]
		seen[b] = true
		return twice
	})
	return out[:min(len(out), maxFoundBases)], nil
}

const (
	prefixesAtOnce  = 64
	followedColumns = `prefix, repository, tag, digest, manifest, platform, layers, first_seen, last_current`
)

// findFollowed takes how many rows at most, then the prefixes.
var findFollowed = `SELECT ` + followedColumns + ` FROM followed
	WHERE prefix IN ` + strings.Replace(placeholders(1, prefixesAtOnce+1), "$1,", "", 1) + `
	ORDER BY last_current DESC, layers DESC, repository, tag, digest, manifest, platform LIMIT $1`

func scanFollowed(scan func(...any) error) (FollowedBase, error) {
	var b FollowedBase
	var prefix, digest, manifest []byte
	var first, last int64
	if err := scan(&prefix, (*string)(&b.Repository), &b.Tag, &digest, &manifest, &b.Platform, &b.Layers, &first, &last); err != nil {
		return b, err
	}
	for to, from := range map[*attest.Digest][]byte{&b.Prefix: prefix, &b.Digest: digest, &b.Manifest: manifest} {
		if len(from) != len(to) {
			return b, fmt.Errorf("a followed base has a digest of %d bytes", len(from))
		}
		*to = attest.Digest(from)
	}
	b.FirstSeen, b.LastCurrent = time.Unix(first, 0).UTC(), time.Unix(last, 0).UTC()
	return b, nil
}

// baseKey is what a base's freshness depends on: its name, and which of its
// manifests the image is built on.
func baseKey(b attest.Base) []any {
	manifests := make([][]byte, len(b.Platforms))
	for i, p := range b.Platforms {
		manifests[i] = p.Base[:]
	}
	slices.SortFunc(manifests, bytes.Compare)
	manifests = slices.CompactFunc(manifests, bytes.Equal)
	sum := attest.Hash(bytes.Join(manifests, nil))
	return []any{string(b.Repository), b.Tag, b.Digest[:], sum[:]}
}

// PutBaseState notes the freshness of a base and returns it with the time since
// which it has been so: that of the first check in a row that said the same. What
// is not known is not noted, and interrupts no row.
func (l *Ledger) PutBaseState(ctx context.Context, b attest.Base, s attest.BaseState) (attest.BaseState, error) {
	if err := l.ready(); err != nil {
		return s, err
	}
	if s.Freshness == attest.FreshnessUnknown || s.Freshness == "" {
		return s, nil
	}
	err := l.index.update(ctx, func(t *txn) error {
		var since int64
		err := t.row(`INSERT INTO base_states (repository, tag, digest, manifests, state, current, checked, since) VALUES ($1, $2, $3, $4, $5, $6, $7, $7)
			ON CONFLICT (repository, tag, digest, manifests) DO UPDATE SET
				since = CASE WHEN base_states.state = excluded.state THEN base_states.since ELSE excluded.since END,
				state = excluded.state, current = excluded.current, checked = excluded.checked
			RETURNING since`, append(baseKey(b), string(s.Freshness), s.Current[:], s.Checked.Unix()), &since)
		if err != nil {
			return err
		}
		s.Since = time.Unix(since, 0).UTC()
		var rows int
		if err := t.row(`SELECT count(*) FROM base_states`, nil, &rows); err != nil || rows <= maxBaseStates {
			return err
		}
		_, err = t.exec(`DELETE FROM base_states WHERE checked <= (SELECT checked FROM base_states ORDER BY checked LIMIT 1 OFFSET $1)`, rows-maxBaseStates)
		return err
	})
	return s, unavailable("noting the freshness of a base", err)
}

// BaseState returns the freshness of a base as it was last seen; false when it
// never was.
func (l *Ledger) BaseState(ctx context.Context, b attest.Base) (attest.BaseState, bool, error) {
	if err := l.ready(); err != nil {
		return attest.BaseState{}, false, err
	}
	var s attest.BaseState
	var current []byte
	var checked, since int64
	err := l.index.row(ctx, `SELECT state, current, checked, since FROM base_states WHERE repository = $1 AND tag = $2 AND digest = $3 AND manifests = $4`,
		baseKey(b), (*string)(&s.Freshness), &current, &checked, &since)
	if errors.Is(err, sql.ErrNoRows) || err == nil && len(current) != len(s.Current) {
		return attest.BaseState{}, false, nil
	}
	if err != nil {
		return attest.BaseState{}, false, unavailable("reading the freshness of a base", err)
	}
	s.Current, s.Checked, s.Since = attest.Digest(current), time.Unix(checked, 0).UTC(), time.Unix(since, 0).UTC()
	return s, true, nil
}
