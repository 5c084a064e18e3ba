package registry

import (
	"bytes"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hallmarkd/hallmark/attest"
)

// Crowded reports whether a call waits for room for its image.
func (c *Client) Crowded() bool {
	if !c.room.images.TryAcquire(1) {
		return true
	}
	c.room.images.Release(1)
	return false
}

// Parse reads a manifest as an answer of this type would be read.
func Parse(raw []byte, contentType string) error { _, err := parse(raw, contentType); return err }

// ParseHint reads a caller's claim about a base.
func ParseHint(hint string) error { _, err := parseHint(hint); return err }

// ParseIndex reads an index and counts its platforms and the bases that it names.
func ParseIndex(raw []byte, contentType string) (int, error) {
	doc, err := parse(raw, contentType)
	if err != nil || doc.index == nil {
		return 0, err
	}
	list, err := platforms(doc.index)
	if err != nil {
		return 0, err
	}
	var parts []part
	for _, d := range list {
		parts = append(parts, part{name: platformName(d.Platform), platform: d.Platform, doc: &document{digest: digestOf(d), image: new(v1.Manifest)}})
	}
	q := &inquiry{doc: doc, parts: parts}
	for i := range doc.index.Manifests {
		if of := q.attests(&doc.index.Manifests[i]); of >= len(parts) {
			panic("an attestation of no part")
		}
	}
	return len(annotated(doc, parts)), nil
}

// Claim is what is read of a claim.
type Claim struct {
	Name       string
	Repository attest.Repository
	Tag        string
	Digest     attest.Digest
	Trouble    string
}

func claims(list []*candidate) []Claim {
	var out []Claim
	for _, k := range list {
		out = append(out, Claim{k.claim.Name, k.repo, k.tag, k.digest, k.trouble})
	}
	return out
}

// ParseProvenance reads BuildKit's provenance of a manifest.
func ParseProvenance(raw []byte, kind string, of attest.Digest) ([]Claim, error) {
	list, err := parseProvenance(raw, kind, of)
	return claims(list), err
}

// Dependency reads a package URL of an image; none for another.
func Dependency(uri, hex string) []Claim {
	k := dependency(uri, hex)
	if k == nil {
		return nil
	}
	return claims([]*candidate{k})
}

// ParseConfig reads a configuration and returns how many contents and which bases
// it names.
func ParseConfig(raw []byte) (diffIDs int, bases []Claim, err error) {
	c, err := parseConfig(raw)
	return len(c.diffIDs), claims(labelled([]part{{config: c}})), err
}

// Decompressed returns the digest and size of what a layer unpacks to.
func Decompressed(layer []byte, mediaType string, most int64) (attest.Digest, int64, error) {
	return decompressed(bytes.NewReader(layer), types.MediaType(mediaType), most)
}
