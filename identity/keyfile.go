package identity

import (
	"context"
	"crypto"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/hallmarkd/hallmark/attest"
)

// openFiles reads the files that the issuer's keys are in. Without any, i.keys
// stays nil: its keys are on the network.
func (i *issuer) openFiles(c Config) (err error) {
	if i.TokenReview != nil {
		if i.review, err = i.newReviewer(c); err != nil {
			return err
		}
	}
	switch {
	case i.JWKSFile != "":
		f, err := openWatched(c, "jwks_file", i.JWKSFile, func(body []byte) ([]key, error) { return parseKeys(body, i.keyUse()) })
		if err != nil {
			return err
		}
		i.keys = keyFile{i.Name, f.get}
	case i.BundleFile != "":
		f, err := openWatched(c, "bundle_file", i.BundleFile, i.domain.parseBundle)
		if err != nil {
			return err
		}
		if err := i.checkBundle(f.value); err != nil {
			return err
		}
		i.domain.bundle = f
		i.keys = keyFile{i.Name, func(ctx context.Context) ([]key, error) {
			b, err := f.get(ctx)
			return b.keys, err
		}}
	}
	return nil
}

// keyFile is a keySource whose keys are in a file.
type keyFile struct {
	name string // of the issuer, for messages
	keys func(context.Context) ([]key, error)
}

// find implements keySource. A key that is put into the file or taken out of it
// counts so from the next call on (attacks A07).
func (f keyFile) find(ctx context.Context, kid string, alg jose.SignatureAlgorithm) (crypto.PublicKey, error) {
	keys, err := f.keys(ctx)
	if err != nil {
		return nil, keysUnavailable(f.name, err)
	}
	k, known := choose(keys, kid)
	switch {
	case known:
		return k.fit(alg)
	case kid == "":
		return nil, unknownKey(f.name, kid, len(keys))
	}
	return nil, attest.Errorf(attest.TokenKeyUnknown, "the file with the keys of issuer %q has none with the token's kid: get a new token; after a key change the operator has to renew the file", f.name)
}

// watched is what a file holds, read again when the file changes.
type watched[T any] struct {
	path  string
	parse func([]byte) (T, error)
	now   func() time.Time
	log   *slog.Logger

	mu     sync.Mutex
	value  T           // of the last good reading
	read   os.FileInfo // the file of that reading
	seen   time.Time   // when it was last seen to be still there
	failed os.FileInfo // a file that cannot be read, so that it is read and reported once
}

// openWatched reads the file for the first time. key is the name of its path in the
// configuration.
func openWatched[T any](c Config, key, path string, parse func([]byte) (T, error)) (*watched[T], error) {
	w := &watched[T]{path: path, parse: parse, now: c.Now, log: c.Logger}
	info, err := os.Stat(path)
	if err == nil {
		err = w.load(info)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return w, nil
}

// get returns what the file holds. One that is missing or cannot be read, for
// example half written, does not replace what was good, for as long as an issuer
// on the network may be away.
func (w *watched[T]) get(ctx context.Context) (T, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	info, err := os.Stat(w.path)
	switch {
	case err == nil && same(info, w.read):
		w.seen = w.now()
	case err == nil && same(info, w.failed):
		err = fmt.Errorf("%s is still not readable", w.path)
	case err == nil:
		if err = w.load(info); err != nil {
			w.failed = info
			w.log.ErrorContext(ctx, "keeping the keys that were read before", "file", w.path, "error", err)
		}
	}
	if err != nil && w.now().Sub(w.seen) > maxStale {
		var none T
		return none, err
	}
	return w.value, nil
}

// load reads the file. The caller looked at it before: if it changes meanwhile, the
// next caller sees another file and reads again.
func (w *watched[T]) load(info os.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", w.path)
	}
	f, err := os.Open(w.path)
	if err != nil {
		return err
	}
	defer f.Close()
	body, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return err
	}
	if len(body) > maxDocument {
		return fmt.Errorf("%s has more than %d bytes", w.path, maxDocument)
	}
	value, err := w.parse(body)
	if err != nil {
		return fmt.Errorf("%s: %w", w.path, err)
	}
	w.value, w.read, w.seen, w.failed = value, info, w.now(), nil
	return nil
}

func same(a, b os.FileInfo) bool {
	return b != nil && os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}
