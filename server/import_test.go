package server_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/internal/testkit/abroad"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// Import over gRPC and over REST tells of each piece what was found, and refuses
// callers and images as every call does.
func TestImport(t *testing.T) {
	t.Parallel()
	sigstore := abroad.New(t)
	path := filepath.Join(t.TempDir(), "trusted_root.json")
	if err := os.WriteFile(path, sigstore.TrustedRoot(), 0o600); err != nil {
		t.Fatal(err)
	}
	s := testkit.NewStack(t, testkit.Options{
		Policy:  strings.Replace(testkit.DefaultPolicy("REGISTRY"), "\n  promoters:", "\n  importers: [{issuer: corp, images: [\"REGISTRY/acme/*\"], when: \"'audit' in id.groups\"}]\n  promoters:", 1),
		Foreign: []foreign.Root{{Name: "elsewhere", TrustedRoot: path, CertificateLog: foreign.None}},
	})
	ref := s.PushApp("acme/api").ImageRef
	token := s.PersonToken("a-1", "audit")
	c := pb.NewSigningServiceClient(s.Dial(token))

	_, err := c.Import(t.Context(), &pb.ImportRequest{Image: ref.String()})
	wantReason(t, err, codes.NotFound, attest.NothingToImport)
	_, err = c.Import(t.Context(), &pb.ImportRequest{Image: string(ref.Repository) + ":latest"})
	wantReason(t, err, codes.InvalidArgument, attest.TagRefused)
	_, err = c.Import(t.Context(), &pb.ImportRequest{})
	wantReason(t, err, codes.InvalidArgument, attest.BadRequest)
	_, err = pb.NewSigningServiceClient(s.Dial(s.Token(nil))).Import(t.Context(), &pb.ImportRequest{Image: ref.String()})
	wantReason(t, err, codes.PermissionDenied, attest.RoleMissing)

	abroad.Refer(t, ref, ref.Digest, abroad.BundleType, sigstore.Bundle(abroad.Statement(t, attest.PredicateSignature, nil, ref.Digest), abroad.Parts{}))
	garbage := abroad.Refer(t, ref, ref.Digest, abroad.BundleType, []byte("garbage"))
	for _, repeated := range []bool{false, true} {
		a := do(t, s.HTTP(), http.MethodPost, s.URL+"/v1/images:import", `{"image":"`+ref.String()+`"}`, "authorization", "Bearer "+token)
		var got pb.ImportResponse
		if err := protojson.Unmarshal(a.body, &got); a.code != http.StatusOK || err != nil {
			t.Fatalf("%d %s, %v", a.code, a.body, err)
		}
		if len(got.GetImported()) != 1 || len(got.GetSkipped()) != 1 {
			t.Fatalf("%s", a.body)
		}
		i, k := got.GetImported()[0], got.GetSkipped()[0]
		if i.GetRoot() != "elsewhere" || i.GetForm() != attest.FormBundle || i.GetPredicateType() != attest.PredicateSignature || i.GetSigner() != abroad.SAN ||
			i.GetIssuer() != abroad.Issuer || i.GetKey() != "" || i.GetSignedAt() == "" || i.GetRepeatedRequest() != repeated || i.GetRecord().GetKind() != string(attest.KindImport) {
			t.Errorf("imported %v", i)
		}
		if k.GetPlace() != garbage.String() || k.GetReason() != string(attest.BundleMalformed) || k.GetMessage() == "" {
			t.Errorf("skipped %v", k)
		}
	}
}
