// Package attest holds the words that every other package of Hallmark speaks:
// digests, image references, identities, statements, envelopes and records. It
// builds the statements that the service signs and does no I/O.
package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

// Digest is the SHA-256 digest of an image manifest or index. Its text form is
// "sha256:" and 64 lower-case hex digits; no other algorithm and no other
// spelling is accepted (OCI image-spec descriptor.md, "Digests").
type Digest [sha256.Size]byte

// ParseDigest reads the canonical text form of a digest.
func ParseDigest(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok {
		return Digest{}, Errorf(BadDigest, "digest %q does not start with sha256:", clip(s))
	}
	d, err := ParseHex(h)
	if err != nil {
		return Digest{}, Errorf(BadDigest, "digest %q needs 64 lower-case hex digits after sha256:", clip(s))
	}
	return d, nil
}

// ParseHex reads the 64 lower-case hex digits of a digest as in-toto digest
// sets carry it.
func ParseHex(h string) (Digest, error) {
	var d Digest
	if len(h) != 2*len(d) || strings.ToLower(h) != h {
		return Digest{}, Errorf(BadDigest, "%q is not 64 lower-case hex digits", clip(h))
	}
	if _, err := hex.Decode(d[:], []byte(h)); err != nil {
		return Digest{}, Errorf(BadDigest, "%q is not 64 lower-case hex digits", clip(h))
	}
	return d, nil
}

// Hash returns the digest of b.
func Hash(b []byte) Digest { return sha256.Sum256(b) }

// String returns the canonical text form.
func (d Digest) String() string { return "sha256:" + d.Hex() }

// Hex returns the 64 hex digits without the algorithm.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// Short returns the first twelve hex digits, for people.
func (d Digest) Short() string { return d.Hex()[:12] }

// IsZero reports whether d was never set.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText implements encoding.TextMarshaler with the canonical form; the
// zero digest is the empty text.
func (d Digest) MarshalText() ([]byte, error) {
	if d.IsZero() {
		return nil, nil
	}
	return []byte(d.String()), nil
}

// UnmarshalText implements encoding.TextUnmarshaler, the inverse of MarshalText.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*d = Digest{}
		return nil
	}
	v, err := ParseDigest(string(b))
	*d = v
	return err
}

// Repository is a registry host with a path: "registry.example.com/team/app".
// The host is always written out, so that no default registry is ever implied.
type Repository string

// The grammar of repository names is that of the distribution-spec, "Pulling
// manifests"; the host is a DNS name, an IPv4 address or a bracketed IPv6
// address with an optional port. Names never become file paths, but "." and
// ".." cannot be written in it all the same.
var repositoryPattern = regexp.MustCompile(
	`^(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::[0-9]{1,5})?` +
		`(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)+$`)

// ParseRepository reads host and path. The host must contain a dot or a port,
// or be "localhost": everything else would be a short name of some default
// registry, and there is none.
func ParseRepository(s string) (Repository, error) {
	if len(s) > 255 || !repositoryPattern.MatchString(s) {
		return "", Errorf(BadReference, "repository %q is not HOST/PATH in lower case", clip(s))
	}
	r := Repository(s)
	if h := r.Host(); h != "localhost" && !strings.ContainsAny(h, ".:") {
		return "", Errorf(BadReference, "repository %q does not name its registry: write HOST/PATH, for example registry.example.com/%s", clip(s), clip(s))
	}
	return r, nil
}

// Host returns the registry with its port.
func (r Repository) Host() string { h, _, _ := strings.Cut(string(r), "/"); return h }

// Path returns what follows the host.
func (r Repository) Path() string { _, p, _ := strings.Cut(string(r), "/"); return p }

// Name returns the last path segment.
func (r Repository) Name() string { return string(r)[strings.LastIndexByte(string(r), '/')+1:] }

// ImageRef is one image for ever: a repository and a digest. A tag is not part
// of it.
type ImageRef struct {
	Repository Repository
	Digest     Digest
}

// ParseImageRef reads "HOST/PATH@sha256:HEX". A reference by tag is refused
// with TAG_REFUSED, because a tag may name another image a moment later
// (attacks G01).
func ParseImageRef(s string) (ImageRef, error) {
	name, digest, ok := strings.Cut(s, "@")
	if !ok {
		if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, '/') {
			return ImageRef{}, Errorf(TagRefused, "%q names a tag: tags move, digests do not. Give REPO@sha256:… (the client's --resolve looks it up)", clip(s))
		}
		return ImageRef{}, Errorf(TagRefused, "%q names no digest: give REPO@sha256:… (the client's --resolve looks it up)", clip(s))
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return ImageRef{}, Errorf(TagRefused, "%q has a tag and a digest: give only REPO@sha256:…", clip(s))
	}
	repo, err := ParseRepository(name)
	if err != nil {
		return ImageRef{}, err
	}
	d, err := ParseDigest(digest)
	if err != nil {
		return ImageRef{}, err
	}
	return ImageRef{repo, d}, nil
}

// String returns "HOST/PATH@sha256:HEX".
func (r ImageRef) String() string { return string(r.Repository) + "@" + r.Digest.String() }

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 120
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

var _ fmt.Stringer = ImageRef{}
