package server_test

import (
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/server"
)

// What the REST side found about a caller holds for the one method that it was
// asked for, and for one call.
func TestI06HandedOver(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	srv, err := server.New(server.Config{Gate: s.Gate, Auth: s.Auth, Pages: http.NotFoundHandler(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis.Close()
	defer srv.Serve(t.Context(), lis) // ends what New began
	who := s.Identity(s.Token(nil))
	found, err, late := srv.HandedOver(t.Context(), who, pb.TrustService_WhoAmI_FullMethodName, pb.TrustService_WhoAmI_FullMethodName)
	if err != nil || found.Key() != who.Key() {
		t.Errorf("the same method finds %v, %v", found.Subject, err)
	}
	if attest.ReasonOf(late) != attest.TokenMissing {
		t.Errorf("I06: after the call the handle finds %v", late)
	}
	found, err, _ = srv.HandedOver(t.Context(), who, pb.TrustService_WhoAmI_FullMethodName, pb.AuditService_ListRecords_FullMethodName)
	if attest.ReasonOf(err) != attest.TokenMissing || found.Subject != "" {
		t.Errorf("I06: another method finds %v, %v", found.Subject, err)
	}
}

// later is a clock that a test sets ahead.
type later struct {
	mu sync.Mutex
	t  time.Time
}

func (l *later) Now() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.t
}

func (l *later) Add(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t = l.t.Add(d)
}

// A30: what a verified token is remembered by is who it names. What that one may do
// is judged anew at every call: a role that has ended, or was taken away, is gone
// though the token was used a moment ago.
func TestA30RolesAreNotRemembered(t *testing.T) {
	clock := &later{t: time.Date(2026, 11, 18, 23, 59, 50, 0, time.UTC)}
	policy := strings.ReplaceAll(testkit.DefaultPolicy("REGISTRY"), `images: ["**"], when: "'audit' in id.groups"}`, `images: ["**"], when: "'audit' in id.groups", until: 2026-11-18}`)
	policy = strings.Replace(policy, `signers:
  - {issuer: github, `, `signers:
  - {until: 2026-11-18, issuer: github, `, 1)
	owners := []string{dev.GitHubID("acme")}
	s := testkit.NewStack(t, testkit.Options{Now: clock.Now, Policy: policy, Issue: func(all *[]identity.Issuer) { (*all)[0].Owners = owners }})
	auditor, job := s.PersonToken("a-1", "audit"), s.Token(nil)
	list := func() error {
		_, err := pb.NewAuditServiceClient(s.Dial(auditor)).ListRecords(t.Context(), &pb.ListRecordsRequest{})
		return err
	}
	sign := func(image attest.ImageRef) attest.Reason {
		t.Helper()
		resp, err := pb.NewSigningServiceClient(s.Dial(job)).SignImages(t.Context(), &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: image.String()}}})
		if err != nil {
			return reasonOf(status.Convert(err))
		}
		return attest.Reason(resp.GetResults()[0].GetRefusal().GetReason())
	}
	if err := list(); err != nil {
		t.Fatal(err)
	}
	if got := sign(s.PushApp("acme/api").ImageRef); got != "" {
		t.Fatal(got)
	}
	next, size := s.PushApp("acme/web").ImageRef, s.Ledger.Size()

	// 1. The roles end while both tokens are remembered.
	clock.Add(5 * time.Second)
	if err := list(); err != nil {
		t.Fatal(err)
	}
	clock.Add(5 * time.Second)
	wantReason(t, list(), codes.PermissionDenied, attest.RoleMissing)
	if got := sign(next); got != attest.RoleMissing {
		t.Errorf("A30: signing after the role ended: %q", got)
	}
	if s.Ledger.Size() != size {
		t.Error("A30: something was recorded")
	}
	// 2. A new policy gives one back and not the other. It needs a restart.
	s.SetPolicy(strings.Replace(strings.Replace(policy, "version: 1", "version: 2", 1), "until: 2026-11-18, issuer: github", "until: 2026-12-31, issuer: github", 1))
	s.Restart()
	wantReason(t, list(), codes.PermissionDenied, attest.RoleMissing)
	if got := sign(next); got != "" {
		t.Error(got)
	}
	// 3. The owner is taken out of the configuration: its jobs are unknown.
	owners = []string{dev.GitHubID("other")}
	s.Restart()
	if got := sign(next); got != attest.OwnerNotAllowed {
		t.Errorf("A30: signing after the owner was removed: %q", got)
	}
}

// Whatever is wrong with tokens, issuers and clocks, the answer says so, nothing is
// signed and nothing is lost: afterwards the same image is signed.
func TestNothingIsSigned(t *testing.T) {
	clock := &later{t: time.Date(2026, 11, 19, 12, 0, 0, 0, time.UTC)}
	var ci *dev.Issuer
	var down atomic.Bool
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if down.Load() {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		ci.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	var err error
	if ci, err = dev.NewIssuer(dev.IssuerConfig{URL: front.URL, Now: clock.Now}); err != nil {
		t.Fatal(err)
	}
	s := testkit.NewStack(t, testkit.Options{Now: clock.Now, Issue: func(all *[]identity.Issuer) { (*all)[0].Issuer = front.URL }})
	img := s.PushApp("acme/api")
	sign := func(token string) error {
		_, err := pb.NewSigningServiceClient(s.Dial(token)).SignImages(t.Context(), &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: img.String()}}})
		return err
	}
	refuse := func(name, token string, code codes.Code, want attest.Reason) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			before := s.Ledger.Size()
			wantReason(t, sign(token), code, want)
			if s.Ledger.Size() != before {
				t.Error("something was recorded")
			}
		})
	}
	mint := func(changes map[string]any) string {
		t.Helper()
		token, err := ci.Mint(s.Claims(changes))
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	at := func(iat, exp time.Duration) map[string]any {
		now := clock.Now()
		return map[string]any{"iat": now.Add(iat).Unix(), "nbf": now.Add(iat).Unix(), "exp": now.Add(exp).Unix()}
	}

	refuse("A10 unknown issuer", s.Token(nil), codes.Unauthenticated, attest.IssuerNotAllowed)
	refuse("A15 issuer's clock is ahead", mint(at(31*time.Second, time.Minute)), codes.Unauthenticated, attest.TokenNotYetValid)
	refuse("A15 issuer's clock is behind", mint(at(-time.Hour, -time.Second)), codes.Unauthenticated, attest.TokenExpired)
	refuse("A15 long life", mint(at(0, 2*time.Hour)), codes.Unauthenticated, attest.TokenLifetime)
	refuse("A12 oversize token", mint(map[string]any{"x": strings.Repeat("x", 13<<10)}), codes.Unauthenticated, attest.TokenMalformed)
	refuse("A12 oversize claim", mint(map[string]any{"environment": strings.Repeat("x", 3<<10)}), codes.Unauthenticated, attest.TokenClaims)
	refuse("A14 other deployment", mint(map[string]any{"aud": s.URL + "/stage"}), codes.Unauthenticated, attest.TokenAudience)
	token := mint(nil)
	refuse("A16 another token's signature", token[:strings.LastIndexByte(token, '.')]+s.Token(nil)[strings.LastIndexByte(s.Token(nil), '.'):], codes.Unauthenticated, attest.TokenSignature)

	// The issuer changes its key: nobody knew the new one, so that it counts at once;
	// the old one counts for at most five minutes more.
	old := mint(at(0, 50*time.Minute))
	if err := ci.RotateKey(); err != nil {
		t.Fatal(err)
	}
	clock.Add(5*time.Minute + time.Second)
	refuse("A07 key that was replaced", old, codes.Unauthenticated, attest.TokenKeyUnknown)

	// The issuer is away for longer than its last keys are good. Others are not
	// affected.
	down.Store(true)
	clock.Add(2 * time.Hour)
	fresh := mint(nil)
	refuse("A08 unreachable keys", fresh, codes.Unavailable, attest.KeysUnavailable)
	if _, err := pb.NewAuditServiceClient(s.Dial(s.PersonToken("a-1", "audit"))).ListRecords(t.Context(), &pb.ListRecordsRequest{}); err != nil {
		t.Error(err)
	}

	// Nothing was lost: the same call with the same token succeeds when the issuer is
	// back, after the five seconds in which it is not asked again.
	down.Store(false)
	clock.Add(5 * time.Second)
	if err := sign(fresh); err != nil {
		t.Errorf("after all of it: %v", err)
	}
}

// B06: accounts of the same name in two clusters that share an issuer are two, for
// roles and in certificates.
func TestB06RolesOfClusters(t *testing.T) {
	const shared = "https://kubernetes.default.svc.cluster.local"
	clusters := map[string]*dev.Issuer{}
	var issuers []identity.Issuer
	for _, name := range []string{"east", "west"} {
		k, err := dev.NewIssuer(dev.IssuerConfig{URL: "http://127.0.0.1:1"})
		if err != nil {
			t.Fatal(err)
		}
		keys, err := json.Marshal(k.Keys())
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "jwks")
		if err := os.WriteFile(file, keys, 0o600); err != nil {
			t.Fatal(err)
		}
		clusters[name] = k
		issuers = append(issuers, identity.Issuer{
			Name: name, Provider: "kubernetes", Issuer: shared, KnownAs: "https://" + name + ".example.com", Audience: name, JWKSFile: file,
			MaxAge: time.Minute, Replay: "once", // the audience is not under the service's URL
		})
	}
	s := testkit.NewStack(t, testkit.Options{
		Issue: func(all *[]identity.Issuer) { *all = append(*all, issuers...) },
		Policy: strings.Replace(testkit.DefaultPolicy("REGISTRY"), "  signers:\n",
			"  signers:\n  - {issuer: east, images: [\"REGISTRY/acme/*\"], when: \"id.subject == 'system:serviceaccount:ci:builder'\"}\n", 1),
	})
	sign := func(from, audience string) *pb.SignedImage {
		t.Helper()
		token, err := clusters[from].Mint(map[string]any{
			"iss": shared, "aud": audience, "sub": "system:serviceaccount:ci:builder", "kubernetes.io": map[string]any{
				"namespace": "ci", "pod": map[string]any{"name": "b-1", "uid": "5e9d1a2b-3c4d"}, "serviceaccount": map[string]any{"name": "builder", "uid": "0b8a4c5e-6d0f"},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		resp, err := pb.NewSigningServiceClient(s.Dial(token)).SignImages(t.Context(), &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: s.PushApp("acme/api").String()}}})
		if err != nil {
			return &pb.SignedImage{Refusal: &pb.Refusal{Reason: string(reasonOf(status.Convert(err)))}}
		}
		return resp.GetResults()[0]
	}
	east := sign("east", "east")
	if east.GetRefusal() != nil || east.GetCommit() != "" {
		t.Fatalf("east: %v", east)
	}
	digest, err := attest.ParseDigest(east.GetImage()[strings.Index(east.GetImage(), "@")+1:])
	if err != nil {
		t.Fatal(err)
	}
	ev, err := s.Verifier.Bundle(east.GetProvenanceBundle(), digest)
	if err != nil {
		t.Fatal(err)
	}
	if got := ev.Signer(); got.Issuer != "https://east.example.com" || got.SAN != "https://kubernetes.io/namespaces/ci/serviceaccounts/builder" {
		t.Errorf("B06: signed by %s of %s", got.SAN, got.Issuer)
	}
	size := s.Ledger.Size()
	for _, row := range []struct {
		name, from, audience string
		want                 attest.Reason
	}{
		{"B06 same account of another cluster", "west", "west", attest.RoleMissing},
		{"B06 with the first one's audience", "west", "east", attest.TokenKeyUnknown},
		{"B06 first one's with its audience", "east", "west", attest.TokenKeyUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := sign(row.from, row.audience).GetRefusal().GetReason(); got != string(row.want) {
				t.Errorf("refused for %q, want %q", got, row.want)
			}
		})
	}
	if s.Ledger.Size() != size {
		t.Error("B06: something was recorded")
	}
}
