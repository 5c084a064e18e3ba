package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/server"
)

// wantReason checks the code, the ErrorInfo and its domain of a gRPC error.
func wantReason(t *testing.T, err error, code codes.Code, reason attest.Reason) {
	t.Helper()
	st := status.Convert(err)
	if got := reasonOf(st); st.Code() != code || got != reason {
		t.Errorf("got %v %q (%s), want %v %q", st.Code(), got, st.Message(), code, reason)
	}
}

func reasonOf(st *status.Status) attest.Reason {
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == "hallmark" {
			return attest.Reason(info.GetReason())
		}
	}
	return ""
}

// answer is what a REST request got.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

func do(t *testing.T, c *http.Client, method, url, body string, header ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, b}
}

// wantREST checks the HTTP code and the reason of a REST refusal.
func (a answer) want(t *testing.T, code int, reason attest.Reason) {
	t.Helper()
	var body struct {
		Details []struct {
			Type   string `json:"@type"`
			Reason string `json:"reason"`
			Domain string `json:"domain"`
		} `json:"details"`
	}
	if err := json.Unmarshal(a.body, &body); err != nil {
		t.Fatalf("HTTP %d with a body that is no JSON: %s", a.code, a.body)
	}
	got := ""
	for _, d := range body.Details {
		if strings.HasSuffix(d.Type, "ErrorInfo") && d.Domain == "hallmark" {
			got = d.Reason
		}
	}
	if a.code != code || got != string(reason) {
		t.Errorf("got HTTP %d %q, want %d %q: %s", a.code, got, code, reason, a.body)
	}
}

func auth(token string) []string { return []string{"Authorization", "Bearer " + token} }

// The main job over gRPC: sign, verify, promote, ask.
func TestMainJobOverGRPC(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{TLS: true})
	img := s.PushApp("acme/api")
	ctx := t.Context()

	ci := s.Dial(s.Token(nil))
	signed, err := pb.NewSigningServiceClient(ci).SignImages(ctx, &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: img.String()}}})
	if err != nil {
		t.Fatal(err)
	}
	got := signed.GetResults()[0]
	if got.GetRefusal() != nil {
		t.Fatalf("refused: %v", got.GetRefusal())
	}
	if got.GetCommit() != testkit.Commit || got.GetBase().GetResult() != "PROVEN_LAYERS" || got.GetAttachState() != pb.AttachState_ATTACH_STATE_ATTACHED {
		t.Errorf("signed: %v", got)
	}
	for _, bundle := range [][]byte{got.GetSignatureBundle(), got.GetProvenanceBundle()} {
		if _, err := s.Verifier.Bundle(bundle, img.Digest); err != nil {
			t.Errorf("a returned bundle does not verify: %v", err)
		}
	}

	gateway := pb.NewPromotionServiceClient(s.Dial(s.PromoterToken()))
	v, err := gateway.Verify(ctx, &pb.VerifyRequest{Image: img.String()})
	if err != nil {
		t.Fatal(err)
	}
	if !v.GetDecision().GetAllowed() || v.GetDecision().GetVerdict() != "allowed" {
		t.Errorf("verify: %v", v)
	}
	denied, err := gateway.Promote(ctx, &pb.PromoteRequest{Image: img.String(), ToStage: "prod", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	if denied.GetDecision().GetAllowed() || denied.GetDecision().GetId() <= 0 {
		t.Errorf("skipping stages: %v", denied)
	}
	promoted, err := gateway.Promote(ctx, &pb.PromoteRequest{Image: img.String(), ToStage: "test", Reason: "first"})
	if err != nil {
		t.Fatal(err)
	}
	d := promoted.GetDecision()
	if !d.GetAllowed() || promoted.GetEffect() != "DONE" || len(promoted.GetVsaBundle()) == 0 {
		t.Fatalf("promote: %v", promoted)
	}

	auditor := s.Dial(s.PersonToken("a-1", "audit"))
	asked, err := pb.NewAuditServiceClient(auditor).GetDecision(ctx, &pb.GetDecisionRequest{Id: d.GetId()})
	if err != nil {
		t.Fatal(err)
	}
	if asked.GetDecision().GetImage() != img.String() || asked.GetDecision().GetUrl() == "" || asked.GetDecision().GetUrl() != d.GetUrl() {
		t.Errorf("decision: %v", asked)
	}
	records, err := pb.NewAuditServiceClient(auditor).ListRecords(ctx, &pb.ListRecordsRequest{PageSize: 2})
	if err != nil {
		t.Fatal(err)
	}
	if len(records.GetRecords()) != 2 || records.GetNextPageToken() == "" || records.GetLogSize() == 0 {
		t.Errorf("records: %v", records)
	}
	one, err := pb.NewAuditServiceClient(auditor).GetRecord(ctx, &pb.GetRecordRequest{Id: got.GetProvenance().GetId()})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.GetRecord().GetBundle(), got.GetProvenanceBundle()) || one.GetCheckpoint() == "" {
		t.Error("the record's bundle is not the one that signing returned")
	}
}

// The same over REST, with the same answers: it is the same API.
func TestMainJobOverREST(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{TLS: true})
	img := s.PushApp("acme/api")
	c := s.HTTP()

	a := do(t, c, "POST", s.URL+"/v1/images:sign", `{"images":[{"image":"`+img.String()+`"}]}`, auth(s.Token(nil))...)
	var signed pb.SignImagesResponse
	if err := protojson.Unmarshal(a.body, &signed); err != nil || a.code != http.StatusOK {
		t.Fatalf("HTTP %d %v: %s", a.code, err, a.body)
	}
	if signed.GetResults()[0].GetRefusal() != nil {
		t.Fatalf("refused: %v", &signed)
	}
	promoter := auth(s.PromoterToken())
	a = do(t, c, "POST", s.URL+"/v1/images:promote", `{"image":"`+img.String()+`","to_stage":"test"}`, promoter...)
	var promoted pb.PromoteResponse
	if err := protojson.Unmarshal(a.body, &promoted); err != nil || !promoted.GetDecision().GetAllowed() {
		t.Fatalf("HTTP %d %v: %s", a.code, err, a.body)
	}
	a = do(t, c, "GET", s.URL+"/v1/stages?track=acme", "", promoter...)
	if !strings.Contains(string(a.body), img.Digest.String()) {
		t.Errorf("stages: %s", a.body)
	}
	a = do(t, c, "GET", s.URL+"/v1/artifact?image="+img.String(), "", promoter...)
	if a.code != http.StatusOK || !strings.Contains(string(a.body), `"kind":"provenance"`) && !strings.Contains(string(a.body), `"kind": "provenance"`) {
		t.Errorf("artifact: HTTP %d %.300s", a.code, a.body)
	}
	// What went in over REST comes out over gRPC.
	v, err := pb.NewPromotionServiceClient(s.Dial(s.PromoterToken())).Verify(t.Context(), &pb.VerifyRequest{Image: img.String(), Stage: "test"})
	if err != nil || !v.GetDecision().GetAllowed() {
		t.Errorf("verify: %v %v", v, err)
	}
}

// What needs no identity: the trust root, the gate's key, the checkpoint, the
// tiles, the OpenAPI document and the state of health.
func TestPublic(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	c := s.HTTP()
	var root pb.GetTrustedRootResponse
	a := do(t, c, "GET", s.URL+"/v1/trust/root", "")
	if err := protojson.Unmarshal(a.body, &root); err != nil || !bytes.Equal(root.GetTrustedRoot(), s.Signer.TrustedRoot()) || root.GetPublicUrl() != s.URL {
		t.Errorf("trust root: HTTP %d %v", a.code, err)
	}
	if root.GetSha256() != s.Signer.Fingerprint() {
		t.Errorf("fingerprint %q", root.GetSha256())
	}
	if a := do(t, c, "GET", s.URL+"/v1/trust/gate-key", ""); !strings.Contains(string(a.body), "BEGIN PUBLIC KEY") {
		t.Errorf("gate key: %s", a.body)
	}
	for path, contentType := range map[string]string{
		"/log/checkpoint":     "text/plain; charset=utf-8",
		"/log/tile/0/000.p/1": "application/octet-stream",
		"/openapi.json":       "application/json",
	} {
		if a := do(t, c, "GET", s.URL+path, ""); a.code != http.StatusOK || a.header.Get("Content-Type") != contentType || len(a.body) == 0 {
			t.Errorf("%s: HTTP %d %s", path, a.code, a.header.Get("Content-Type"))
		}
	}
	if a := do(t, c, "GET", s.URL+"/log/checkpoint", ""); a.header.Get("Cache-Control") != "no-cache" {
		t.Errorf("the checkpoint may be cached: %q", a.header.Get("Cache-Control"))
	}
	do(t, c, "GET", s.URL+"/log/tile/9/9/9", "").want(t, http.StatusNotFound, attest.RecordNotFound)
}

func TestEntryBundlesNeedARole(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	c := s.HTTP()
	path := s.URL + "/log/tile/entries/000.p/1"
	do(t, c, "GET", path, "").want(t, http.StatusUnauthorized, attest.TokenMissing)
	do(t, c, "GET", path, "", auth(s.Token(nil))...).want(t, http.StatusForbidden, attest.RoleMissing)
	a := do(t, c, "GET", path, "", auth(s.PersonToken("a-1", "audit"))...)
	if a.code != http.StatusOK || len(a.body) == 0 || !strings.HasPrefix(a.header.Get("Cache-Control"), "private") {
		t.Errorf("auditor: HTTP %d, %q", a.code, a.header.Get("Cache-Control"))
	}
	// A bad token is not the same as none.
	do(t, c, "GET", s.URL+"/log/checkpoint", "", auth("nonsense")...).want(t, http.StatusUnauthorized, attest.TokenMalformed)
}

func TestRESTPaths(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	c := s.HTTP()
	token := auth(s.Token(nil))
	do(t, c, "GET", s.URL+"/v1/nothing", "", token...).want(t, http.StatusNotFound, attest.MethodUnknown)
	do(t, c, "GET", s.URL+"/v1/images:sign", "", token...).want(t, http.StatusMethodNotAllowed, attest.MethodUnknown)
	do(t, c, "GET", s.URL+"/v1/records%2Fabc", "", token...).want(t, http.StatusNotFound, attest.MethodUnknown)
	do(t, c, "GET", s.URL+"/v1/records/abc", "", token...).want(t, http.StatusBadRequest, attest.BadDigest)
	do(t, c, "GET", s.URL+"/v1/artifact?image=r.example.com/a:latest", "", token...).want(t, http.StatusBadRequest, attest.TagRefused)
	a := do(t, c, "GET", s.URL+"/v1/whoami", "")
	a.want(t, http.StatusUnauthorized, attest.TokenMissing)
	if a.header.Get("WWW-Authenticate") != "Bearer" {
		t.Errorf("WWW-Authenticate %q", a.header.Get("WWW-Authenticate"))
	}
}

// blocked restarts the stack so that every signing waits for the registry until
// release is called.
func blocked(s *testkit.Stack) (started <-chan struct{}, release func()) {
	began, released := make(chan struct{}, 16), make(chan struct{})
	s.SetGate(func(c *gate.Config) {
		c.Images = func(ctx context.Context, ref attest.ImageRef, hint string, mayRead func(attest.Repository) bool) (attest.Image, error) {
			began <- struct{}{}
			select {
			case <-released:
				return c.Registry.Image(ctx, ref, hint, nil, mayRead)
			case <-ctx.Done():
				return attest.Image{}, ctx.Err()
			}
		}
	})
	s.Restart()
	return began, sync.OnceFunc(func() { close(released) })
}

// A call in flight when the service is told to stop is answered, and what it did
// is there afterwards.
func TestGracefulShutdown(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	started, release := blocked(s)
	img := s.PushApp("acme/api")
	conn := s.Dial(s.Token(nil))
	type result struct {
		out *pb.SignImagesResponse
		err error
	}
	answered := make(chan result, 1)
	go func() {
		out, err := pb.NewSigningServiceClient(conn).SignImages(context.WithoutCancel(t.Context()),
			&pb.SignImagesRequest{Attach: pb.Attach_ATTACH_CLIENT, Images: []*pb.SignImage{{Image: img.String()}}})
		answered <- result{out, err}
	}()
	<-started
	closed := make(chan struct{})
	go func() { defer close(closed); s.Close() }()
	// It stops accepting before it has answered.
	for {
		r, err := http.Get(s.URL + "/openapi.json")
		if err != nil {
			break
		}
		r.Body.Close()
	}
	release()
	got := <-answered
	if got.err != nil || got.out.GetResults()[0].GetRefusal() != nil {
		t.Errorf("the call in flight got %v %v", got.out, got.err)
	}
	<-closed
}

// A call that does not end in time loses its connection. Serve waits a moment for
// what it still does, and no longer.
func TestShutdownTimeout(t *testing.T) {
	for _, ends := range []bool{true, false} {
		t.Run(map[bool]string{true: "it ends then", false: "it never ends"}[ends], func(t *testing.T) {
			s := testkit.NewStack(t, testkit.Options{Server: shortShutdown})
			started, release := blocked(s)
			img := s.PushApp("acme/api")
			conn := s.Dial(s.Token(nil), grpc.WithDisableRetry())
			answered := make(chan error, 1)
			go func() {
				_, err := pb.NewSigningServiceClient(conn).SignImages(context.WithoutCancel(t.Context()),
					&pb.SignImagesRequest{Attach: pb.Attach_ATTACH_CLIENT, Images: []*pb.SignImage{{Image: img.String()}}})
				answered <- err
			}()
			<-started
			begin := time.Now()
			closed := make(chan struct{})
			go func() { defer close(closed); s.Close() }()
			if err := <-answered; err == nil {
				t.Error("the call was answered")
			}
			if ends {
				release()
			}
			<-closed
			if took := time.Since(begin); took > 20*time.Second {
				t.Errorf("shutting down took %v", took)
			}
			// What the call had begun is either recorded whole or not at all, so the
			// next start answers the repeated request.
			release()
			s.Restart()
			out, err := pb.NewSigningServiceClient(s.Dial(s.Token(nil))).SignImages(t.Context(),
				&pb.SignImagesRequest{Attach: pb.Attach_ATTACH_CLIENT, Images: []*pb.SignImage{{Image: img.String()}}})
			if err != nil || out.GetResults()[0].GetRefusal() != nil {
				t.Errorf("after a restart: %v %v", out, err)
			}
		})
	}
}

func shortShutdown(c *server.Config) { c.ShutdownTimeout = 100 * time.Millisecond }
