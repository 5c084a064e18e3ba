package registry_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit/images"
	"github.com/hallmarkd/hallmark/registry"
)

var (
	someDigest = attest.Hash([]byte("x"))
	someHex    = someDigest.Hex()
)

// Package URLs as BuildKit, the specification and liars write them.
func TestDependency(t *testing.T) {
	ref := func(name string) string { return name + "@" + someDigest.String() }
	for _, row := range []struct {
		uri, hex string
		want     registry.Claim
	}{
		{"pkg:docker/alpine@3.17?platform=linux%2Famd64", someHex, registry.Claim{Name: ref("docker.io/library/alpine:3.17"), Repository: "docker.io/library/alpine", Tag: "3.17", Digest: someDigest}},
		{"pkg:docker/alpine@3.17?digest=" + someDigest.String() + "&platform=linux%2Famd64", someHex, registry.Claim{Name: ref("docker.io/library/alpine:3.17"), Repository: "docker.io/library/alpine", Tag: "3.17", Digest: someDigest}},
		{"pkg:docker/docker/dockerfile@1", someHex, registry.Claim{Name: ref("docker.io/docker/dockerfile:1"), Repository: "docker.io/docker/dockerfile", Tag: "1", Digest: someDigest}},
		{"pkg:docker/ghcr.io/acme/base@1", someHex, registry.Claim{Name: ref("ghcr.io/acme/base:1"), Repository: "ghcr.io/acme/base", Tag: "1", Digest: someDigest}},
		{"pkg:docker/localhost%3A5000/base@1", someHex, registry.Claim{Name: ref("localhost:5000/base:1"), Repository: "localhost:5000/base", Tag: "1", Digest: someDigest}},
		{"pkg:docker/cassandra@sha256%3A" + someHex, "", registry.Claim{Name: ref("docker.io/library/cassandra"), Repository: "docker.io/library/cassandra", Digest: someDigest}},
		{"pkg:docker/customer/image@1?repository_url=gcr.io", someHex, registry.Claim{Name: ref("gcr.io/customer/image:1"), Repository: "gcr.io/customer/image", Tag: "1", Digest: someDigest}},
		{"pkg:oci/debian@sha256%3A" + someHex + "?repository_url=docker.io%2Flibrary%2Fdebian&tag=12", someHex, registry.Claim{Name: ref("docker.io/library/debian:12"), Repository: "docker.io/library/debian", Tag: "12", Digest: someDigest}},
		{"pkg:oci/debian@sha256%3A" + someHex + "?repository_url=ghcr.io", someHex, registry.Claim{Name: ref("ghcr.io/debian"), Repository: "ghcr.io/debian", Digest: someDigest}},
		{"pkg:docker/alpine@3", "", registry.Claim{Name: "docker.io/library/alpine:3", Repository: "docker.io/library/alpine", Tag: "3"}},
		{"oci://quay.io/base/debian", someHex, registry.Claim{Name: ref("quay.io/base/debian"), Repository: "quay.io/base/debian", Digest: someDigest}},
		{"OCI://quay.io/base/debian:12@" + someDigest.String(), "", registry.Claim{Name: ref("quay.io/base/debian:12"), Repository: "quay.io/base/debian", Tag: "12", Digest: someDigest}},
		{"pkg:/Docker/alpine@3", someHex, registry.Claim{Name: ref("docker.io/library/alpine:3"), Repository: "docker.io/library/alpine", Tag: "3", Digest: someDigest}},

		{"oci://debian", someHex, registry.Claim{Name: "oci://debian", Trouble: "the URI names no repository"}},
		{"oci://quay.io/base/debian\n", someHex, registry.Claim{Name: "oci://quay.io/base/debian?", Trouble: "the URI names no repository"}},
		{"oci://", someHex, registry.Claim{Name: "oci://", Trouble: "the package URL cannot be read"}},
		{"oci://quay.io/base/debian", "abc", registry.Claim{Name: "oci://quay.io/base/debian", Repository: "quay.io/base/debian", Trouble: "its digest is no sha256 digest"}},
		{"oci://quay.io/base/debian@sha256:" + strings.Repeat("1", 64), someHex, registry.Claim{Name: "oci://quay.io/base/debian@sha256:" + strings.Repeat("1", 64), Repository: "quay.io/base/debian", Digest: someDigest, Trouble: "the provenance gives two different digests of it"}},
		{"pkg:oci/debian@sha256%3A" + someHex, someHex, registry.Claim{Name: "pkg:oci/debian@sha256%3A" + someHex, Digest: someDigest, Trouble: "the package URL names no repository"}},
		{"pkg:docker/alpine@3?digest=sha256%3A" + strings.Repeat("1", 64), someHex, registry.Claim{Name: "pkg:docker/alpine@3?digest=sha256%3A" + strings.Repeat("1", 64), Repository: "docker.io/library/alpine", Tag: "3", Digest: someDigest, Trouble: "the provenance gives two different digests of it"}},
		{"pkg:docker/alpine@3", "abc", registry.Claim{Name: "pkg:docker/alpine@3", Repository: "docker.io/library/alpine", Tag: "3", Trouble: "the digest in the package URL is no sha256 digest"}},
		{"pkg:docker/alpine@sha512%3Aabc", "", registry.Claim{Name: "pkg:docker/alpine@sha512%3Aabc", Repository: "docker.io/library/alpine", Trouble: "the digest in the package URL is no sha256 digest"}},
		{"pkg:docker/a@..%2Fx", someHex, registry.Claim{Name: "pkg:docker/a@..%2Fx", Repository: "docker.io/library/a", Digest: someDigest, Trouble: "the tag in the package URL is no tag"}},
		{"pkg:docker/..%2F..%2Fx@1", someHex, registry.Claim{Name: "pkg:docker/..%2F..%2Fx@1", Tag: "1", Digest: someDigest, Trouble: "the package URL names no repository"}},
		{"pkg:docker/a%40sha256%3A" + someHex + "@1", someHex, registry.Claim{Name: "pkg:docker/a%40sha256%3A" + someHex + "@1", Tag: "1", Digest: someDigest, Trouble: "the package URL names no repository"}},
		{"pkg:docker/a%zz", someHex, registry.Claim{Name: "pkg:docker/a%zz", Trouble: "the package URL cannot be read"}},
	} {
		t.Run(row.uri, func(t *testing.T) {
			if diff := cmp.Diff([]registry.Claim{row.want}, registry.Dependency(row.uri, row.hex)); diff != "" {
				t.Error(diff)
			}
		})
	}
	for _, uri := range []string{"", "https://github.com/acme/app#main", "git+https://github.com/acme/app", "pkg:golang/x/y@1", "pkg:docker"} {
		if got := registry.Dependency(uri, someHex); got != nil {
			t.Errorf("%q is taken for an image: %v", uri, got)
		}
	}
}

// D12: what says that it is BuildKit's provenance and is not about this image, or
// can be read as two things, says nothing.
func TestD12Provenance(t *testing.T) {
	of := v1.Hash{Algorithm: "sha256", Hex: someHex}
	honest := string(images.BuildKitProvenance(t, provenanceV1, of, "pkg:docker/alpine@3", someHex))
	for _, row := range []struct {
		name, body string
		reason     attest.Reason
	}{
		{"honest", honest, ""},
		{"about another image", strings.Replace(honest, `"subject":[{"digest":{"sha256":"`+someHex, `"subject":[{"digest":{"sha256":"`+strings.Repeat("1", 64), 1), attest.SubjectMismatch},
		{"about nothing", strings.Replace(honest, `"subject":[`, `"subjects":[`, 1), attest.SubjectMismatch},
		{"of another type than annotated", strings.Replace(honest, `"predicateType":"`+provenanceV1, `"predicateType":"`+provenanceV02, 1), attest.PredicateType},
		{"with two predicates", strings.Replace(honest, `{"_type"`, `{"predicate":{},"_type"`, 1), attest.BadJSON},
		{"with two predicates in other case", strings.Replace(honest, `{"_type"`, `{"Predicate":{},"_type"`, 1), attest.BadJSON},
		{"with a list for a statement", `[]`, attest.StatementMalformed},
		{"with something behind it", honest + "{}", attest.BadJSON},
		{"nested without end", strings.Repeat("[", 1000) + strings.Repeat("]", 1000), attest.BadJSON},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := registry.ParseProvenance([]byte(row.body), provenanceV1, someDigest)
			want(t, err, row.reason)
			if err == nil && len(got) != 1 {
				t.Errorf("got %v", got)
			}
		})
	}
}

// usable fails for a claim that would be looked up under no proper name.
func usable(t *testing.T, list []registry.Claim) {
	t.Helper()
	for _, k := range list {
		if k.Trouble != "" {
			continue
		}
		if _, err := attest.ParseRepository(string(k.Repository)); err != nil {
			t.Errorf("%q would be looked up as %q", k.Name, k.Repository)
		}
		if strings.ContainsAny(k.Tag, "/?#@%") {
			t.Errorf("%q would be looked up by the tag %q", k.Name, k.Tag)
		}
	}
}

func reasoned(t *testing.T, err error) {
	t.Helper()
	if err != nil && attest.ReasonOf(err) == attest.Internal {
		t.Errorf("no reason: %v", err)
	}
}

func FuzzIndex(f *testing.F) {
	child := descriptor(ociManifest, "x", `,"platform":{"os":"linux","architecture":"amd64"}`)
	about := descriptor(ociManifest, "y", `,"platform":{"os":"unknown","architecture":"unknown"},"annotations":{"vnd.docker.reference.type":"attestation-manifest","vnd.docker.reference.digest":"`+someDigest.String()+`"}`)
	for _, list := range []string{child, child + "," + about, about, child + "," + child} {
		f.Add([]byte(`{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[` + list + `],"annotations":{"` + baseName + `":"debian:12"}}`))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		n, err := registry.ParseIndex(raw, ociIndex)
		reasoned(t, err)
		if n < 0 || n > 1 {
			t.Errorf("%d bases named by one index", n)
		}
	})
}

func FuzzProvenance(f *testing.F) {
	of := v1.Hash{Algorithm: "sha256", Hex: someHex}
	for _, kind := range []string{provenanceV1, provenanceV02} {
		f.Add(images.BuildKitProvenance(f, kind, of, "pkg:docker/alpine@3.17?platform=linux%2Famd64", someHex, "https://github.com/acme/app#main", "1234"), kind == provenanceV1)
	}
	f.Fuzz(func(t *testing.T, raw []byte, newer bool) {
		kind := provenanceV02
		if newer {
			kind = provenanceV1
		}
		got, err := registry.ParseProvenance(raw, kind, someDigest)
		reasoned(t, err)
		usable(t, got)
	})
}

func FuzzDependency(f *testing.F) {
	for _, uri := range []string{
		"pkg:docker/alpine@3.17?platform=linux%2Famd64", "pkg:oci/debian@sha256%3A" + someHex + "?repository_url=docker.io%2Flibrary%2Fdebian&tag=12",
		"pkg:docker/localhost%3A5000/a%2Fb@1#sub", "pkg:docker/@/?", "pkg:oci/%00", "oci://quay.io/base/debian:12@sha256:" + someHex,
	} {
		f.Add(uri, someHex)
	}
	f.Fuzz(func(t *testing.T, uri, hex string) { usable(t, registry.Dependency(uri, hex)) })
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + someDigest.String() + `"]},"config":{"Labels":{"` + baseName + `":"debian:12","` + baseDigest + `":"` + someDigest.String() + `"}}}`))
	f.Add([]byte(`{"config":{"Labels":{"io.buildpacks.lifecycle.metadata":"{\"runImage\":{\"topLayer\":\"sha256:1\",\"reference\":\"docker.io/a/b@` + someDigest.String() + `\"}}"}}}`))
	f.Add([]byte(`{"rootfs":{"diff_ids":["sha512:1"]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		_, bases, err := registry.ParseConfig(raw)
		reasoned(t, err)
		usable(t, bases)
	})
}

func FuzzLayer(f *testing.F) {
	for mt, packed := range map[string]string{"application/vnd.oci.image.layer.v1.tar": "none", "application/vnd.oci.image.layer.v1.tar+gzip": "gzip", "application/vnd.oci.image.layer.v1.tar+zstd": "zstd"} {
		f.Add(compressed(f, images.Packed(f, images.Tar(f, "a", []byte("text")), packed)), mt)
	}
	f.Fuzz(func(t *testing.T, layer []byte, mediaType string) {
		const most = 1 << 20
		_, n, err := registry.Decompressed(layer, mediaType, most)
		reasoned(t, err)
		if n > most {
			t.Errorf("%d bytes of at most %d", n, most)
		}
	})
}
