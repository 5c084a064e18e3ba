package server_test

import (
	"net/http"
	"net/url"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/registry"
)

// What is known of a base comes out whole, over gRPC and REST, and to those only who
// may ask.
func TestGetBase(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{TLS: true})
	ctx := t.Context()
	debian := s.PushBase("debian", "12")
	img := s.PushOn(debian, "12", "acme/api")

	// Another name of the same base, which the service follows.
	layers, err := debian.Image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var digests []attest.Digest
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		d, err := attest.ParseDigest(h.String())
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d)
	}
	same := attest.BaseName{Repository: attest.Repository(s.Registry.Host() + "/base/same"), Tag: "1", Digest: attest.Hash([]byte("same"))}
	prefixes := registry.PrefixHashes(digests)
	err = s.Ledger.PutFollowed(ctx, same.Repository.Path(), time.Now(), []ledger.FollowedBase{{
		BaseName: same, Manifest: same.Digest, Prefix: prefixes[len(prefixes)-1], Layers: len(prefixes),
	}})
	if err != nil {
		t.Fatal(err)
	}

	ci := s.Dial(s.Token(nil))
	signed, err := pb.NewSigningServiceClient(ci).SignImages(ctx, &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: img.String()}}})
	if err != nil || signed.GetResults()[0].GetRefusal() != nil {
		t.Fatal(err, signed)
	}
	got, err := pb.NewAuditServiceClient(ci).GetBase(ctx, &pb.GetBaseRequest{Image: img.String()})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.GetChain()) != 3 || got.GetLogSize() == 0 {
		t.Fatalf("%v", got)
	}
	first := got.GetChain()[0]
	if !proto.Equal(first.GetBase(), signed.GetResults()[0].GetBase()) {
		t.Errorf("the chain says %v, signing said %v", first.GetBase(), signed.GetResults()[0].GetBase())
	}
	b := first.GetBase()
	if b.GetResult() != "PROVEN_LAYERS" || b.GetGrade() != "registry" || b.GetDigest() != debian.Digest.String() || b.GetLayers() != 1 || len(b.GetClaims()) == 0 {
		t.Errorf("base: %v", b)
	}
	if p := b.GetPlatforms(); len(p) != 1 || p[0].GetImage() != img.Digest.String() || p[0].GetBase() != debian.Digest.String() || p[0].GetLayers() != 1 {
		t.Errorf("platforms: %v", p)
	}
	if e := b.GetEquivalents(); len(e) != 1 || e[0].GetRepository() != string(same.Repository) || e[0].GetTag() != "1" || e[0].GetDigest() != same.Digest.String() {
		t.Errorf("equivalents: %v", e)
	}
	if first.GetImage() != img.String() || first.GetKnownFrom() != "record" || first.GetRecord() != signed.GetResults()[0].GetProvenance().GetId() ||
		!first.GetSigned() || first.GetProvenanceSummary() == "" || first.GetFreshness() != "FRESH" || first.GetCurrent() != debian.Digest.String() ||
		first.GetChecked() == nil || first.GetSince() == nil {
		t.Errorf("link: %v", first)
	}
	// The base has the very layers of the other one, which nobody pushed.
	if middle := got.GetChain()[1]; middle.GetKnownFrom() != "registry" || middle.GetSigned() || middle.GetRecord() != "" || middle.GetBase().GetResult() != "MATCHED" {
		t.Errorf("the base's own: %v", middle)
	}
	if last := got.GetChain()[2]; last.GetBase().GetResult() != "UNKNOWN" || last.GetFreshness() != "FRESHNESS_UNKNOWN" || last.GetFreshnessDetail() == "" || last.GetSince() != nil {
		t.Errorf("the end: %v", last)
	}

	c, at := s.HTTP(), s.URL+"/v1/base?image="
	a := do(t, c, "GET", at+url.QueryEscape(img.String()), "", auth(s.Token(nil))...)
	var rest pb.GetBaseResponse
	if err := protojson.Unmarshal(a.body, &rest); err != nil || a.code != http.StatusOK || !proto.Equal(rest.GetChain()[0].GetBase(), b) {
		t.Errorf("HTTP %d %v: %s", a.code, err, a.body)
	}
	do(t, c, "GET", at+url.QueryEscape(img.String()), "").want(t, http.StatusUnauthorized, attest.TokenMissing)
	do(t, c, "GET", at+url.QueryEscape(img.String()), "", auth(s.PersonToken("x"))...).want(t, http.StatusForbidden, attest.RoleMissing)
	do(t, c, "GET", at+url.QueryEscape(string(img.Repository)+":12"), "", auth(s.Token(nil))...).want(t, http.StatusBadRequest, attest.TagRefused)
	do(t, c, "GET", s.URL+"/v1/base", "", auth(s.Token(nil))...).want(t, http.StatusBadRequest, attest.BadRequest)
}
