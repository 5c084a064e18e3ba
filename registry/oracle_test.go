package registry_test

import (
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

// Whoever may push images may name any tag as their base. What the service's
// credentials find there must not be told to them: all tags look the same, whether
// they exist or not (attacks G24, K07).
func TestK07AClaimTellsNothingOfWhatTheCallerMayNotRead(t *testing.T) {
	host := devRegistry(t)
	c := newClient(t, registry.Config{Hosts: plain(host)})
	secret := host + "/secret/payroll"
	other := push(t, secret, "other", image(t, "s1", "s2"))
	push(t, secret, "squashed", image(t, "s1", "s2", "s3", "s4"))
	push(t, secret, "empty", image(t))
	push(t, secret, "index", index(t, map[string]v1.Image{"linux/arm64": image(t, "s1")}))
	mine := image(t, "m1", "m2", "m3")
	push(t, secret, "same", mine)
	push(t, secret, "base", image(t, "m1"))
	onlyMine := func(repo attest.Repository) bool { return repo == attest.Repository(host+"/mine/app") }

	tags := []string{"other", "squashed", "empty", "index", "missing"}
	for from, ask := range map[string]func(tag string) (v1.Image, string){
		attest.BaseFromCaller: func(tag string) (v1.Image, string) { return mine, secret + ":" + tag },
		attest.BaseFromAnnotation: func(tag string) (v1.Image, string) {
			return annotate(mine, "org.opencontainers.image.base.name", secret+":"+tag), ""
		},
		attest.BaseFromLabel: func(tag string) (v1.Image, string) {
			return labels(t, mine, "org.opencontainers.image.base.name", secret+":"+tag), ""
		},
	} {
		for _, tag := range tags {
			img, hint := ask(tag)
			got, err := c.Image(t.Context(), push(t, host+"/mine/app", "v1", img), hint, nil, onlyMine)
			want(t, err, "")
			name := attest.BaseName{Repository: attest.Repository(secret), Tag: tag}
			if diff := cmp.Diff(attest.Base{
				Result: attest.Claimed, Repository: name.Repository, Tag: tag,
				Claims: []attest.BaseClaim{{From: from, Name: got.Base.Claims[0].Name, Result: attest.Claimed, Detail: "it could not be shown to be the base"}},
			}, got.Base); diff != "" {
				t.Errorf("%s %s tells (-want +got):\n%s", from, tag, diff)
			}
		}
	}

	// What the layers prove is told, and so is what the caller knew: a digest.
	ref := push(t, host+"/mine/app", "v1", mine)
	got, err := c.Image(t.Context(), ref, secret+":base", nil, onlyMine)
	if want(t, err, ""); got.Base.Result != attest.ProvenLayers || got.Base.Digest.IsZero() {
		t.Errorf("a proved base: %+v", got.Base)
	}
	got, err = c.Image(t.Context(), ref, other.String(), nil, onlyMine)
	if want(t, err, ""); got.Base.Result != attest.Contradicted {
		t.Errorf("a digest that the layers contradict: %+v", got.Base)
	}
	got, err = c.Image(t.Context(), ref, secret+":same", nil, onlyMine)
	if want(t, err, ""); got.Base.Result != attest.Claimed || !got.Base.Claims[0].Digest.IsZero() {
		t.Errorf("a tag of the image itself: %+v", got.Base)
	}
	// Nobody is told anything by mistake, and who may read it is told everything.
	got, err = c.Image(t.Context(), ref, secret+":other", nil, nil)
	if want(t, err, ""); got.Base.Result != attest.Claimed || !got.Base.Claims[0].Digest.IsZero() {
		t.Errorf("without a say about who may read: %+v", got.Base)
	}
	got, err = c.Image(t.Context(), ref, secret+":other", nil, anywhere)
	if want(t, err, ""); got.Base.Result != attest.Contradicted || got.Base.Claims[0].Digest != other.Digest {
		t.Errorf("who may read it: %+v", got.Base)
	}
}

// A registry that refuses the service looks like one without the tag (attacks K07).
func TestK07ARefusalTellsNothing(t *testing.T) {
	f := newFake(t, map[string]page{"/v2/secret/manifests/denied": {status: http.StatusForbidden}})
	ref := f.serve("mine", ociManifest, manifest(""))
	c := newClient(t, registry.Config{Hosts: plain(f.host())})
	for _, tag := range []string{"denied", "missing"} {
		got, err := c.Image(t.Context(), ref, string(f.repo("secret"))+":"+tag, nil, nil)
		if want(t, err, ""); got.Base.Claims[0].Detail != "it could not be shown to be the base" {
			t.Errorf("%s: %+v", tag, got.Base)
		}
	}
}
