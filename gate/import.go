package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
)

const (
	// maxImports is how many imports are under way at once, each with at most one
	// piece of evidence and one batch in memory.
	maxImports = 4
	// What is recorded in one go: a batch shares one checkpoint.
	importBatch      = 32
	importBatchBytes = 8 << 20
)

// Import records the evidence beside an image that was signed elsewhere and that a
// configured foreign root vouches for. It needs the role importers. What no root
// vouches for, what is malformed and what this service has signed itself is listed
// as skipped: it neither counts nor stands in the way of the rest. Only the digest
// that is named is looked at, not the platforms of an index.
//
// Repeating it records nothing twice. Records of imports count for rules that name
// their root and for nothing else. Errors: NOTHING_TO_IMPORT when nothing at all is
// beside the image, those of the registry, and FOREIGN_ROOT_MISMATCH when no root is
// configured.
func (g *Gate) Import(ctx context.Context, id attest.Identity, ref attest.ImageRef) (Imports, error) {
	if err := g.Ready(); err != nil {
		return Imports{}, err
	}
	if err := id.MayChange("import"); err != nil {
		return Imports{}, err
	}
	if err := g.Policy.Allow(policy.Importers, id, ref.Repository); err != nil {
		return Imports{}, err
	}
	if len(g.Foreign.Names()) == 0 {
		return Imports{}, attest.Errorf(attest.RootMismatch, "this service trusts no foreign root: the operator configures them under foreign_roots")
	}
	return share(ctx, g, attest.Key("import", ref.String()), func(ctx context.Context) (Imports, error) {
		select {
		case g.imports <- struct{}{}:
			defer func() { <-g.imports }()
		case <-ctx.Done():
			return Imports{}, fmt.Errorf("waiting for other imports: %w", ctx.Err())
		}
		return g.importAll(ctx, id, ref)
	})
}

// importing is one import on its way.
type importing struct {
	*Gate
	ref  attest.ImageRef
	by   attest.Caller
	at   time.Time
	out  Imports
	seen map[string]bool // natural keys: the same bytes may be found in two places

	batch []Imported // without records yet
	keys  []string   // of batch
	texts [][]byte   // statements of batch
	bytes int        // of texts
}

func (g *Gate) importAll(ctx context.Context, id attest.Identity, ref attest.ImageRef) (Imports, error) {
	now, err := g.clock()
	if err != nil {
		return Imports{}, err
	}
	in := &importing{Gate: g, ref: ref, by: attest.CallerOf(id), at: now, seen: map[string]bool{}}
	if err := g.Registry.Foreign(ctx, ref, func(f registry.Found) error { return in.take(ctx, f) }); err != nil {
		return Imports{}, err
	}
	if err := in.record(ctx); err != nil {
		return Imports{}, err
	}
	if len(in.out.Imported)+len(in.out.Skipped) == 0 {
		return Imports{}, attest.Errorf(attest.NothingToImport, "nothing is beside %s: no Sigstore bundle refers to it, and it has no .sig or .att", ref)
	}
	return in.out, nil
}

// take judges one piece of evidence and puts it into the batch.
func (in *importing) take(ctx context.Context, f registry.Found) error {
	// 1. Whether it could be read, is ours, or is vouched for.
	if f.Err != nil {
		return in.skip(f.Place, f.Err)
	}
	if _, err := in.Verifier.Bundle(f.Content, in.ref.Digest); f.Form == attest.FormBundle && err == nil {
		return in.skip(f.Place, attest.Errorf(attest.NothingToImport, "signed by this service: it is recorded already"))
	}
	said, err := in.Foreign.Verify(ctx, f.Form, f.Content, in.ref.Digest)
	if err != nil {
		return in.skip(f.Place, err)
	}
	if in.ours(said.Signer) {
		return in.skip(f.Place, attest.Errorf(attest.SignerMismatch, "root %s vouches for a signer that bears this service's own name: that root is not the service", said.Root))
	}
	// 2. Whether it is recorded already.
	key := attest.ImportKey(in.ref, said.Root, said.Digest)
	if in.seen[key] {
		return nil
	}
	in.seen[key] = true
	if known, err := in.known(ctx, key); err != nil || known != nil {
		if known != nil {
			in.out.Imported = append(in.out.Imported, *known)
		}
		return err
	}
	// 3. Its statement.
	said.ImportedAt, said.Importer = attest.Time(in.at), in.by
	text, err := attest.ImportStatement(in.ref, said)
	if err != nil {
		return err
	}
	said.Content = nil
	in.batch, in.keys, in.texts = append(in.batch, Imported{Said: said}), append(in.keys, key), append(in.texts, text)
	if in.bytes += len(text); len(in.batch) >= importBatch || in.bytes >= importBatchBytes {
		return in.record(ctx)
	}
	return nil
}

// ours reports whether a foreign signer bears the service's own name. Nothing here
// believes such a name; people who read it would (attacks D13).
func (in *importing) ours(who attest.Foreigner) bool {
	return who.Issuer == in.Service || who.SAN == in.Service || strings.HasPrefix(who.SAN, in.Service+"/")
}

func (in *importing) skip(place string, err error) error {
	s := Skipped{Place: place, Reason: attest.ReasonOf(err)}
	var why *attest.Error
	if errors.As(err, &why) {
		s.Message = why.Message
	}
	in.out.Skipped = append(in.out.Skipped, s)
	return nil
}

// known returns the recorded import with a natural key, nil when there is none.
func (in *importing) known(ctx context.Context, key string) (*Imported, error) {
	first, found, err := in.Ledger.ByKey(ctx, key)
	if err != nil || !found {
		return nil, err
	}
	rec, err := in.Ledger.Get(ctx, first)
	if err != nil {
		return nil, err
	}
	st, err := statementOf(rec)
	if err != nil {
		return nil, err
	}
	out := &Imported{Record: rec, Repeated: true}
	if err := json.Unmarshal(st.Predicate, &out.Said); err != nil {
		return nil, fmt.Errorf("record %s holds no import: %w", rec.ID, err)
	}
	out.Record.Payload, out.Said.Content = nil, nil
	return out, nil
}

// record writes the batch to the log. A process that dies before has imported none of
// it; the next import finds what it did record by its natural keys.
func (in *importing) record(ctx context.Context) error {
	if len(in.batch) == 0 {
		return nil
	}
	recs, err := in.appendAll(ctx, in.texts)
	if err != nil {
		return fmt.Errorf("recording what was imported: %w", err)
	}
	for i, done := range in.batch {
		done.Record = recs[i]
		done.Record.Payload = nil // it may be large, and the answer has no use for it
		// An earlier attempt may be in the log although its caller was told that it
		// failed. The first record answers, now and ever after (attacks F09).
		if first, found, err := in.Ledger.ByKey(ctx, in.keys[i]); err != nil {
			return err
		} else if found && first != done.Record.ID {
			known, err := in.known(ctx, in.keys[i])
			if err != nil {
				return err
			}
			done = *known
		}
		in.out.Imported = append(in.out.Imported, done)
	}
	in.batch, in.keys, in.texts, in.bytes = nil, nil, nil, 0
	return nil
}
