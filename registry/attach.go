package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/hallmarkd/hallmark/attest"
)

// What a bundle is stored as: the layout that cosign v3 writes and cosign v2.6
// reads (facts/trust-formats 2.6).
const (
	bundleType = types.MediaType("application/vnd.dev.sigstore.bundle.v0.3+json")

	annotationContent   = "dev.sigstore.bundle.content"
	annotationPredicate = "dev.sigstore.bundle.predicateType"
	annotationCreated   = "org.opencontainers.image.created"
)

var emptyConfig = []byte("{}")

// How often Attach looks whether its referrer is listed, and how long it waits
// between: about two seconds in all. After that the worker tries again.
const (
	listTries   = 8
	listWait    = 60 * time.Millisecond // times the try, with jitter
	uploadTries = 3
)

// listingAge is how long a repository is taken to lack the referrers API.
const listingAge = 5 * time.Minute

// subject is what a referrer says about the manifest that it refers to.
type subject struct {
	mediaType types.MediaType
	size      int64
}

// referrer is a manifest with the blobs that it needs.
type referrer struct {
	descriptor v1.Descriptor // as it is listed: with artifactType and all annotations
	raw        []byte
	blobs      []v1.Layer
}

// Attach stores a bundle as an OCI 1.1 referrer of ref and returns when the
// registry lists it: by the referrers API, or where that is missing by the tag
// sha256-<hex>. The same arguments make the same bytes, so repeating it is safe
// and adds nothing; created must be the time that was recorded, not that of the
// attempt.
//
// Many callers in this process lose nothing to each other. Another process that
// writes the tag at the same moment may, which Attach sees and repairs unless it
// happens after the last look; then that process's writer, or the next Attach of
// the subject, has to add the entry again. Errors: those of Image, TOO_LARGE, and
// REGISTRY_UNAVAILABLE when it is stored but not listed.
func (c *Client) Attach(ctx context.Context, ref attest.ImageRef, bundle []byte, predicateType string, created time.Time) error {
	ctx, cancel := c.within(ctx)
	defer cancel()
	if len(bundle) > maxBundle {
		return attest.Errorf(attest.TooLarge, "bundle has %d bytes; at most %d are attached", len(bundle), maxBundle)
	}
	about, err := c.subject(ctx, ref)
	if err != nil {
		return err
	}
	r, err := newReferrer(ref.Digest, about, bundle, predicateType, created)
	if err != nil {
		return err
	}
	return c.attach(ctx, ref, r)
}

// subject returns type and size of what ref names. Both are fixed by the digest,
// so they are remembered.
func (c *Client) subject(ctx context.Context, ref attest.ImageRef) (subject, error) {
	c.mu.Lock()
	known, ok := c.subjects[ref]
	c.mu.Unlock()
	if ok {
		return known, nil
	}
	doc, _, free, err := c.gather(ctx, c.room.single, ref.Repository, ref.Digest.String(), alone)
	if err != nil {
		return subject{}, err
	}
	defer free()
	known = subject{doc.mediaType, int64(len(doc.raw))}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.subjects) >= maxSessions {
		clear(c.subjects)
	}
	c.subjects[ref] = known
	return known, nil
}

// newReferrer builds the manifest. It is a pure function of its arguments.
func newReferrer(to attest.Digest, about subject, bundle []byte, predicateType string, created time.Time) (referrer, error) {
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  string(bundleType),
		Config:        v1.Descriptor{MediaType: types.OCIEmptyJSON, ArtifactType: string(bundleType), Digest: hashOf(attest.Hash(emptyConfig)), Size: int64(len(emptyConfig))},
		Layers:        []v1.Descriptor{{MediaType: bundleType, Digest: hashOf(attest.Hash(bundle)), Size: int64(len(bundle))}},
		Subject:       &v1.Descriptor{MediaType: about.mediaType, Digest: hashOf(to), Size: about.size},
		Annotations: map[string]string{
			annotationContent:   "dsse-envelope",
			annotationPredicate: predicateType,
			annotationCreated:   attest.Time(created),
		},
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return referrer{}, fmt.Errorf("marshalling a referrer: %w", err)
	}
	return describe(m, raw, bundle), nil
}

// describe returns a referrer with the descriptor by which it is listed
// (distribution-spec, "Listing Referrers": artifactType and annotations are
// those of the manifest).
func describe(m v1.Manifest, raw, bundle []byte) referrer {
	return referrer{
		descriptor: v1.Descriptor{
			MediaType: m.MediaType, Digest: hashOf(attest.Hash(raw)), Size: int64(len(raw)),
			ArtifactType: m.ArtifactType, Annotations: m.Annotations,
		},
		raw:   raw,
		blobs: []v1.Layer{static.NewLayer(emptyConfig, types.OCIEmptyJSON), static.NewLayer(bundle, bundleType)},
	}
}

func hashOf(d attest.Digest) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: d.Hex()} }

// attach pushes a referrer by digest, then sees to it that it is listed. A
// process that dies between leaves a manifest that nobody finds; the worker's
// next try pushes the same bytes and lists them.
func (c *Client) attach(ctx context.Context, ref attest.ImageRef, r referrer) error {
	s, err := c.session(ctx, ref.Repository, transport.PushScope)
	if err != nil {
		return err
	}
	for _, b := range r.blobs {
		if err := c.upload(ctx, s, b); err != nil {
			return err
		}
	}
	if _, err := s.put(ctx, r.descriptor.Digest.String(), r.descriptor.MediaType, r.raw, ""); err != nil {
		return err
	}
	unlock, err := c.locks.lock(ctx, ref.String())
	if err != nil {
		return err
	}
	defer unlock()
	return c.list(ctx, s, ref, r.descriptor)
}

// upload stores a blob. Distribution answers DIGEST_INVALID to one of two uploads
// of the same bytes at the same moment, and one bundle is attached to an index
// and all of its platforms: in this process they wait for each other, and for
// other processes it is tried again, which its digest makes safe.
func (c *Client) upload(ctx context.Context, s *session, blob v1.Layer) error {
	digest, err := blob.Digest()
	if err != nil {
		return fmt.Errorf("hashing a blob: %w", err)
	}
	unlock, err := c.locks.lock(ctx, s.repo.Digest(digest.String()).String()+" blob")
	if err != nil {
		return err
	}
	defer unlock()
	for try := 1; ; try++ {
		err := remote.WriteLayer(s.repo, blob, s.options(ctx)...)
		var answered *transport.Error
		if err == nil {
			return nil
		}
		if try == uploadTries || !errors.As(err, &answered) || answered.StatusCode != http.StatusBadRequest {
			return s.host.failure(ctx, err)
		}
		if err := pause(ctx, try); err != nil {
			return s.host.failure(ctx, err)
		}
	}
}

// put writes a manifest under a digest or a tag. With match it asks the registry
// to write only over that version; false means that it refused to.
func (s *session) put(ctx context.Context, reference string, mt types.MediaType, raw []byte, match string) (bool, error) {
	header := []string{"Content-Type", string(mt)}
	if match != "" {
		header = append(header, "If-Match", match)
	}
	a, err := s.do(ctx, http.MethodPut, "manifests/"+reference, raw, maxOther, header...)
	if err != nil {
		return false, err
	}
	switch a.status {
	case http.StatusOK, http.StatusCreated, http.StatusAccepted:
		return true, nil
	case http.StatusPreconditionFailed:
		return false, nil
	}
	return false, s.host.refusal(a.status, a.body)
}

// list returns when the registry lists add among the referrers of ref, and with
// it every entry that was seen on the way. Its caller holds the subject's lock.
func (c *Client) list(ctx context.Context, s *session, ref attest.ImageRef, add v1.Descriptor) error {
	entry, err := json.Marshal(add)
	if err != nil {
		return fmt.Errorf("marshalling a descriptor: %w", err)
	}
	seen := map[string]json.RawMessage{add.Digest.String(): entry}
	gone := map[string]bool{}
	for try := range listTries {
		if try > 0 {
			if err := pause(ctx, try); err != nil {
				return s.host.failure(ctx, err)
			}
		}
		l, err := c.referrers(ctx, s, ref, true)
		if err != nil {
			return err
		}
		missing := l.missing(seen)
		if len(missing) == 0 {
			return nil
		}
		if l.api {
			continue // the registry keeps the list itself, some with a delay
		}
		l.drop(gone)
		maps.Copy(seen, l.byDigest)
		if err := s.extend(ctx, ref.Digest, l, missing); err != nil {
			// Distribution refuses a list that names a manifest which was deleted.
			if more := s.deleted(ctx, l); len(more) > 0 {
				maps.Copy(gone, more)
				maps.DeleteFunc(seen, func(d string, _ json.RawMessage) bool { return gone[d] })
				continue
			}
			return err
		}
	}
	return attest.Errorf(attest.RegistryUnavailable, "registry %s has stored the bundle of %s but does not list it", s.host.name, ref)
}

// pause waits longer with every try, and never as long as the other writer.
func pause(ctx context.Context, try int) error {
	wait := time.Duration(try) * listWait
	t := time.NewTimer(wait/2 + rand.N(wait))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// listing is what a registry lists as the referrers of a digest.
type listing struct {
	bytes    int                        // of all pages
	api      bool                       // by the referrers API; else by the fallback tag
	order    []string                   // digests, as listed
	byDigest map[string]json.RawMessage // their entries, as listed
	index    map[string]json.RawMessage // the fallback tag's document; nil when there is none
	etag     string
}

// missing returns the entries of seen that are not listed, in digest order.
func (l *listing) missing(seen map[string]json.RawMessage) []json.RawMessage {
	var out []json.RawMessage
	for _, d := range slices.Sorted(maps.Keys(seen)) {
		if _, ok := l.byDigest[d]; !ok {
			out = append(out, seen[d])
		}
	}
	return out
}

// drop takes entries out of the listing.
func (l *listing) drop(gone map[string]bool) {
	l.order = slices.DeleteFunc(l.order, func(d string) bool { return gone[d] })
	maps.DeleteFunc(l.byDigest, func(d string, _ json.RawMessage) bool { return gone[d] })
}

// deleted returns the listed manifests that the registry says it no longer has.
func (s *session) deleted(ctx context.Context, l *listing) map[string]bool {
	out := map[string]bool{}
	for _, d := range l.order {
		digest, err := attest.ParseDigest(d)
		if err != nil {
			continue
		}
		a, err := s.do(ctx, http.MethodHead, "manifests/"+digest.String(), nil, maxOther, "Accept", strings.Join(accepted, ","))
		if err == nil && a.status == http.StatusNotFound {
			out[d] = true
		}
	}
	return out
}

// referrers reads what is attached to ref. With learn, which needs ref to exist,
// it remembers that the registry has no referrers API: to some that do have it an
// unknown repository is as unknown as the API.
func (c *Client) referrers(ctx context.Context, s *session, ref attest.ImageRef, learn bool) (*listing, error) {
	c.mu.Lock()
	skip := time.Now().Before(c.noListing[ref.Repository])
	c.mu.Unlock()
	if !skip {
		l, err := s.referrersAPI(ctx, ref.Digest, string(bundleType))
		if l != nil || err != nil {
			return l, err
		}
	}
	if learn && !skip {
		c.mu.Lock()
		if len(c.noListing) >= maxSessions {
			clear(c.noListing)
		}
		c.noListing[ref.Repository] = time.Now().Add(listingAge)
		c.mu.Unlock()
	}
	return s.referrersTag(ctx, ref.Digest)
}

// referrersAPI asks the referrers API, page by page, for one artifact type or, with
// "", for all. It returns nil when the registry has none (distribution-spec: 404;
// others answer 400, 405, 406, 501).
func (s *session) referrersAPI(ctx context.Context, d attest.Digest, artifactType string) (*listing, error) {
	base := "referrers/" + d.String()
	path := base
	if artifactType != "" {
		path += "?artifactType=" + url.QueryEscape(artifactType)
	}
	l := &listing{api: true, byDigest: map[string]json.RawMessage{}}
	for page := 0; path != ""; page++ {
		a, err := s.do(ctx, http.MethodGet, path, nil, maxManifest, "Accept", string(types.OCIImageIndex))
		if err != nil {
			return nil, err
		}
		switch a.status {
		case http.StatusOK:
		case http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusNotImplemented:
			return nil, nil
		default:
			return nil, s.host.refusal(a.status, a.body)
		}
		if _, err := l.read(a); err != nil {
			return nil, err
		}
		if page >= maxPages {
			return nil, attest.Errorf(attest.TooLarge, "registry %s lists referrers of %s on too many pages", s.host.name, d)
		}
		if path, err = s.nextPage(a, base); err != nil {
			return nil, err
		}
	}
	return l, nil
}

var nextLink = regexp.MustCompile(`<([^<>]*)>\s*;[^,]*\brel="?next"?`)

// nextPage returns the path of the next page of a listing, "" after the last. A
// Link leads nowhere but to the same listing (G13).
func (s *session) nextPage(a *answer, base string) (string, error) {
	m := nextLink.FindStringSubmatch(a.header.Get("Link"))
	if m == nil {
		return "", nil
	}
	u, err := a.url.Parse(m[1])
	if err != nil || u.Host != a.url.Host || u.Path != a.url.Path || u.User != nil {
		return "", attest.Errorf(attest.HostNotAllowed, "registry %s continues a list of referrers somewhere else: %s", s.host.name, clip(m[1]))
	}
	return base + "?" + u.RawQuery, nil
}

// read adds the entries of an image index and returns the document's members.
// Entries are kept as they are: most are somebody else's.
func (l *listing) read(a *answer) (map[string]json.RawMessage, error) {
	if l.bytes += len(a.body); l.bytes > maxListing || tooMany(a.body) {
		return nil, attest.Errorf(attest.TooLarge, "the list of referrers has more than %d bytes or %d values", maxListing, maxValues)
	}
	if err := attest.StrictJSON(a.body, 16); err != nil {
		return nil, err
	}
	var index map[string]json.RawMessage
	var mt types.MediaType
	var entries []json.RawMessage
	if json.Unmarshal(a.body, &index) != nil || json.Unmarshal(index["manifests"], &entries) != nil {
		return nil, attest.Errorf(attest.ManifestAmbiguous, "the list of referrers is no image index")
	}
	// Both specifications let the document leave its type out.
	if t := index["mediaType"]; t != nil && (json.Unmarshal(t, &mt) != nil || mt != types.OCIImageIndex) {
		return nil, attest.Errorf(attest.ManifestAmbiguous, "the list of referrers is no image index")
	}
	for _, e := range entries {
		var d struct {
			Digest string `json:"digest"`
		}
		if json.Unmarshal(e, &d) != nil || d.Digest == "" {
			return nil, attest.Errorf(attest.ManifestAmbiguous, "the list of referrers has an entry without a digest")
		}
		if _, twice := l.byDigest[d.Digest]; !twice {
			l.order = append(l.order, d.Digest)
		}
		l.byDigest[d.Digest] = e
	}
	if len(l.order) > maxListed {
		return nil, attest.Errorf(attest.TooLarge, "more than %d referrers are listed for one digest", maxListed)
	}
	return index, nil
}

// fallbackTag is the tag that lists the referrers of d where there is no API
// (distribution-spec, "Referrers Tag Schema").
func fallbackTag(d attest.Digest) string { return "sha256-" + d.Hex() }

// referrersTag reads the fallback tag; a missing one lists nothing. Every type is
// asked for: to a narrower question a registry answers 404 when the tag names
// something else, and that must not be overwritten.
func (s *session) referrersTag(ctx context.Context, d attest.Digest) (*listing, error) {
	l := &listing{byDigest: map[string]json.RawMessage{}}
	a, err := s.do(ctx, http.MethodGet, "manifests/"+fallbackTag(d), nil, maxManifest, "Accept", strings.Join(accepted, ","))
	if err != nil {
		return nil, err
	}
	switch a.status {
	case http.StatusOK:
	case http.StatusNotFound:
		return l, nil
	default:
		return nil, s.host.refusal(a.status, a.body)
	}
	l.etag = a.header.Get("ETag")
	l.index, err = l.read(a)
	return l, err
}

// extend writes the fallback tag with further entries. Whether they are there is
// for the next look to say: registries ignore If-Match, and the last writer wins.
func (s *session) extend(ctx context.Context, d attest.Digest, l *listing, more []json.RawMessage) error {
	entries := make([]json.RawMessage, 0, len(l.order)+len(more))
	for _, digest := range l.order {
		entries = append(entries, l.byDigest[digest])
	}
	entries = append(entries, more...)
	list, err := json.Marshal(entries)
	if err != nil {
		return fmt.Errorf("marshalling a list of referrers: %w", err)
	}
	index := map[string]json.RawMessage{"schemaVersion": json.RawMessage("2"), "mediaType": json.RawMessage(`"` + types.OCIImageIndex + `"`)}
	maps.Copy(index, l.index) // annotations and whatever else others keep there
	index["manifests"] = list
	raw, err := json.Marshal(index)
	if err != nil {
		return fmt.Errorf("marshalling a list of referrers: %w", err)
	}
	if len(raw) > maxManifest || len(entries) > maxListed {
		return attest.Errorf(attest.TooLarge, "registry %s lists too many referrers of %s to add another", s.host.name, d)
	}
	_, err = s.put(ctx, fallbackTag(d), types.OCIImageIndex, raw, l.etag)
	return err
}

// Attached returns the bundles that are attached to ref, as they were stored, in
// the order of the registry's list. They are anybody's: only verifier can say
// what they are worth. A referrer that is not what it is listed as, or is about
// something else, is left out and logged (G08). Errors: those of Image for the
// registry, TOO_LARGE for more than 256 bundles or 64 MiB (G07).
func (c *Client) Attached(ctx context.Context, ref attest.ImageRef) ([][]byte, error) {
	ctx, cancel := c.within(ctx)
	defer cancel()
	found, err := c.attached(ctx, ref)
	if err != nil {
		return nil, err
	}
	out := make([][]byte, len(found))
	for i, f := range found {
		out[i] = f.bundle
	}
	return out, nil
}

// stored is an attached bundle with the manifest that holds it.
type stored struct {
	doc    *document
	bundle []byte
}

func (c *Client) attached(ctx context.Context, ref attest.ImageRef) ([]stored, error) {
	s, err := c.session(ctx, ref.Repository, transport.PullScope)
	if err != nil {
		return nil, err
	}
	l, err := c.referrers(ctx, s, ref, false)
	if err != nil {
		return nil, err
	}
	var digests []attest.Digest
	for _, d := range l.order {
		if digest, ok := mayBeBundle(l.byDigest[d]); ok {
			digests = append(digests, digest)
		}
	}
	if len(digests) > maxReferrers {
		return nil, attest.Errorf(attest.TooLarge, "%s has %d bundles attached; at most %d are read", ref, len(digests), maxReferrers)
	}
	return c.fetchBundles(ctx, s, ref, digests)
}

// mayBeBundle reports whether a listed referrer can be a bundle. Some registries
// list a manifest by its config's type instead of its artifactType, so the
// manifest itself decides in the end.
func mayBeBundle(entry json.RawMessage) (attest.Digest, bool) {
	var d v1.Descriptor
	if json.Unmarshal(entry, &d) != nil || d.MediaType != types.OCIManifestSchema1 {
		return attest.Digest{}, false
	}
	switch d.ArtifactType {
	case string(bundleType), string(types.OCIEmptyJSON), "":
		digest, err := attest.ParseDigest(d.Digest.String())
		return digest, err == nil
	}
	return attest.Digest{}, false
}

func (c *Client) fetchBundles(ctx context.Context, s *session, ref attest.ImageRef, digests []attest.Digest) ([]stored, error) {
	all := make([]stored, len(digests))
	var budget = bytesBudget{left: maxBundles}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, d := range digests {
		g.Go(func() error {
			b, err := c.fetchBundle(ctx, s, ref, d, &budget)
			switch attest.ReasonOf(err) {
			case "":
				all[i] = b
				return nil
			// What one writer stored wrongly must not hide what others stored.
			case attest.SubjectNotFound, attest.DigestMismatch, attest.ManifestAmbiguous, attest.BadJSON, attest.BadDigest, attest.SubjectMismatch:
				c.log.WarnContext(ctx, "skipping a referrer", "image", ref.String(), "referrer", d.String(), "error", err)
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(b stored) bool { return b.doc == nil }), nil
}

// fetchBundle returns one bundle, or a zero one for a referrer of another kind.
func (c *Client) fetchBundle(ctx context.Context, s *session, ref attest.ImageRef, d attest.Digest, budget *bytesBudget) (stored, error) {
	// The manifests of all are held, and anybody can write one.
	doc, err := c.documentOf(ctx, ref.Repository, d, maxReferrer)
	if attest.ReasonOf(err) == attest.TooLarge {
		return stored{}, attest.Errorf(attest.ManifestAmbiguous, "referrer %s is larger than any that holds a bundle: %w", d, err)
	}
	if err != nil {
		return stored{}, err
	}
	m := doc.image
	if m == nil || m.ArtifactType != string(bundleType) {
		return stored{}, nil
	}
	if m.Subject == nil || digestOf(*m.Subject) != ref.Digest {
		return stored{}, attest.Errorf(attest.SubjectMismatch, "referrer %s is about something else", d)
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != bundleType {
		return stored{}, attest.Errorf(attest.ManifestAmbiguous, "referrer %s does not hold exactly one bundle", d)
	}
	if err := checkForeign(m.Layers[0]); err != nil {
		return stored{}, err
	}
	if m.Layers[0].Size > maxBundle || !budget.take(m.Layers[0].Size) {
		return stored{}, attest.Errorf(attest.TooLarge, "the bundles attached to %s are larger than may be read", ref)
	}
	bundle, err := s.blob(ctx, m.Layers[0])
	return stored{doc, bundle}, err
}

// blob fetches a small blob and checks its digest and size.
func (s *session) blob(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	a, err := s.do(ctx, http.MethodGet, "blobs/"+d.Digest.String(), nil, maxBundle)
	if err != nil {
		return nil, err
	}
	if a.status != http.StatusOK {
		return nil, s.host.refusal(a.status, a.body)
	}
	if attest.Hash(a.body) != digestOf(d) || int64(len(a.body)) != d.Size {
		return nil, attest.Errorf(attest.DigestMismatch, "registry %s answers for blob %s with other bytes", s.host.name, d.Digest)
	}
	return a.body, nil
}

// bytesBudget bounds what one call reads in all.
type bytesBudget struct {
	mu   sync.Mutex
	left int64
}

func (b *bytesBudget) take(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left -= n
	return b.left >= 0
}

// locks holds one lock per name, for as long as somebody wants it. The zero
// value is ready.
type locks struct {
	mu sync.Mutex
	m  map[string]*namedLock
}

type namedLock struct {
	held chan struct{} // holds one element while locked
	want int           // guarded by locks.mu
}

// lock waits for the lock or the end of ctx.
func (l *locks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.m == nil {
		l.m = map[string]*namedLock{}
	}
	n := l.m[name]
	if n == nil {
		n = &namedLock{held: make(chan struct{}, 1)}
		l.m[name] = n
	}
	n.want++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.want--; n.want == 0 {
			delete(l.m, name)
		}
	}
	select {
	case n.held <- struct{}{}:
		return func() { <-n.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, attest.Errorf(attest.RegistryUnavailable, "waiting for another write of %s: %w", name, ctx.Err())
	}
}
