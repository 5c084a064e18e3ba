package server_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

const (
	attestMethod = "/hallmark.v1.SigningService/Attest"
	ourType      = "https://example.com/our-scan/v1"
)

// predicateOf returns a predicate of n bytes.
func predicateOf(n int) []byte {
	const frame = len(`{"a":""}`)
	return []byte(`{"a":"` + strings.Repeat("x", n-frame) + `"}`)
}

// Evidence over both protocols: alone, and with the image that it is about.
func TestEvidence(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	token := s.Token(nil)
	signing := pb.NewSigningServiceClient(s.Dial(token))
	alone := &pb.AttestRequest{Image: img.String(), PredicateType: ourType, Predicate: []byte(`{"a":1}`), Name: "alone"}

	got, err := signing.Attest(t.Context(), alone)
	if err != nil {
		t.Fatal(err)
	}
	if got.GetAttachState() != pb.AttachState_ATTACH_STATE_ATTACHED || got.GetRepeatedRequest() || got.GetRecord().GetKind() != "evidence" || got.GetDigests()[0] != img.Digest.String() {
		t.Errorf("%v", got)
	}
	if ev, err := s.Verifier.Bundle(got.GetBundle(), img.Digest); err != nil || ev.ID().String() != got.GetRecord().GetId() || ev.PredicateType() != ourType {
		t.Errorf("the bundle: %v", err)
	}
	body, err := protojson.Marshal(alone)
	if err != nil {
		t.Fatal(err)
	}
	var rest pb.AttestResponse
	a := do(t, s.HTTP(), "POST", s.URL+"/v1/images:attest", string(body), auth(token)...)
	if err := protojson.Unmarshal(a.body, &rest); err != nil || !rest.GetRepeatedRequest() || rest.GetRecord().GetId() != got.GetRecord().GetId() {
		t.Errorf("the same over REST: HTTP %d %s: %v", a.code, a.body, err)
	}

	for attach, client := range map[pb.Attach]bool{pb.Attach_ATTACH_SERVER: false, pb.Attach_ATTACH_CLIENT: true} {
		resp, err := signing.SignImages(t.Context(), &pb.SignImagesRequest{
			Images:   []*pb.SignImage{{Image: img.String(), Facts: map[string]string{"ticket": "PAY-7"}}, {Image: "registry.example.com/x@" + img.Digest.String()}},
			Evidence: []*pb.Evidence{{PredicateType: ourType, Predicate: []byte(`{}`), Name: "with it"}}, Attach: attach,
		})
		if err != nil {
			t.Fatal(err)
		}
		one, refused := resp.GetResults()[0], resp.GetResults()[1]
		if e := one.GetEvidence()[0]; one.GetRefusal() != nil || e.GetRefusal() != nil || e.GetName() != "with it" || e.GetRecord().GetId() == "" || (len(e.GetBundle()) > 0) != client {
			t.Errorf("attach %s: %v", attach, one)
		}
		if e := refused.GetEvidence()[0]; refused.GetRefusal().GetReason() != string(attest.RoleMissing) || e.GetRefusal().GetReason() != string(attest.RoleMissing) || e.GetRecord() != nil {
			t.Errorf("the refused image: %v", refused)
		}
	}
}

// What is wrong with evidence is said with its field, over both protocols.
func TestEvidenceRefused(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	token := s.Token(nil)
	signing := pb.NewSigningServiceClient(s.Dial(token))
	host := s.Registry.Host()
	image := host + "/acme/api@" + attest.Hash(nil).String()
	for _, row := range []struct {
		name string
		req  *pb.AttestRequest
		code codes.Code
		want attest.Reason
	}{
		{"no image", &pb.AttestRequest{PredicateType: ourType, Predicate: []byte(`{}`)}, codes.InvalidArgument, attest.BadRequest},
		{"G01 a tag", &pb.AttestRequest{Image: host + "/acme/api:1", PredicateType: ourType, Predicate: []byte(`{}`)}, codes.InvalidArgument, attest.TagRefused},
		{"D01 provenance", &pb.AttestRequest{Image: image, PredicateType: "https://slsa.dev/provenance/v1", Predicate: []byte(`{}`)}, codes.InvalidArgument, attest.ReservedPredicate},
		{"D04 no JSON", &pb.AttestRequest{Image: image, PredicateType: ourType, Predicate: []byte(`{`)}, codes.InvalidArgument, attest.BadJSON},
		{"a schema", &pb.AttestRequest{Image: image, PredicateType: attest.PredicateTestResult, Predicate: []byte(`{}`)}, codes.InvalidArgument, attest.PredicateInvalid},
		{"J04 a name", &pb.AttestRequest{Image: image, PredicateType: ourType, Predicate: []byte(`{}`), Name: "a\x1b[2J"}, codes.InvalidArgument, attest.BadRequest},
		{"J05 attach", &pb.AttestRequest{Image: image, PredicateType: ourType, Predicate: []byte(`{}`), Attach: 9}, codes.InvalidArgument, attest.BadRequest},
		{"nothing there", &pb.AttestRequest{Image: image, PredicateType: ourType, Predicate: []byte(`{}`)}, codes.NotFound, attest.SubjectNotFound},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := signing.Attest(t.Context(), row.req)
			wantReason(t, err, row.code, row.want)
		})
	}
	for _, row := range []struct {
		name string
		req  *pb.SignImagesRequest
		want attest.Reason
	}{
		{"B07 a fact called commit", &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: image, Facts: map[string]string{"commit": testkit.Commit}}}}, attest.CallerFactsRefused},
		{"B07 a fact called builder_id", &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: image, Facts: map[string]string{"builder_id": "x"}}}}, attest.CallerFactsRefused},
		{"evidence about a tag", &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: image}}, Evidence: []*pb.Evidence{{PredicateType: ourType, Predicate: []byte(`{}`), Images: []string{host + "/acme/api:1"}}}}, attest.TagRefused},
		{"evidence about another image", &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: image}}, Evidence: []*pb.Evidence{{PredicateType: ourType, Predicate: []byte(`{}`), Images: []string{host + "/acme/x@" + attest.Hash(nil).String()}}}}, attest.BadRequest},
		{"D01 evidence that is provenance", &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: image}}, Evidence: []*pb.Evidence{{PredicateType: attest.PredicateVSA, Predicate: []byte(`{}`)}}}, attest.ReservedPredicate},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := signing.SignImages(t.Context(), row.req)
			wantReason(t, err, codes.InvalidArgument, row.want)
			body, err := protojson.Marshal(row.req)
			if err != nil {
				t.Fatal(err)
			}
			do(t, s.HTTP(), "POST", s.URL+"/v1/images:sign", string(body), auth(token)...).want(t, http.StatusBadRequest, row.want)
		})
	}
}

// The largest predicate goes through, over both protocols, and beside the image.
func TestLargestPredicate(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	token := s.Token(nil)
	got, err := pb.NewSigningServiceClient(s.Dial(token)).Attest(t.Context(), &pb.AttestRequest{Image: img.String(), PredicateType: ourType, Predicate: predicateOf(attest.MaxPredicate)})
	if err != nil {
		t.Fatal(err)
	}
	if got.GetAttachState() != pb.AttachState_ATTACH_STATE_ATTACHED {
		t.Errorf("%s", got.GetAttachState())
	}
	stored, err := s.Images.Attached(t.Context(), img.ImageRef)
	if err != nil || len(stored) != 1 || !bytes.Equal(stored[0], got.GetBundle()) {
		t.Errorf("%d bundles are attached: %v", len(stored), err)
	}
	body := `{"image":"` + img.String() + `","predicate_type":"` + ourType + `","attach":"ATTACH_CLIENT","predicate":"` + base64.StdEncoding.EncodeToString(predicateOf(5<<20)) + `"}`
	if a := do(t, s.HTTP(), "POST", s.URL+"/v1/images:attest", body, auth(token)...); a.code != http.StatusOK {
		t.Errorf("5 MiB over REST: HTTP %d %.300s", a.code, a.body)
	}
	// An answer about the image stays readable: it leaves the largest out, and one
	// record at a time has it.
	audit := pb.NewAuditServiceClient(s.Dial(s.PersonToken("a-1", "audit")))
	artifact, err := audit.GetArtifact(t.Context(), &pb.GetArtifactRequest{Image: img.String()})
	if err != nil {
		t.Fatal(err)
	}
	full := 0
	for _, r := range artifact.GetRecords() {
		if len(r.GetBundle()) > 0 {
			full++
		} else if r.GetRecord().GetId() == "" || len(r.GetRecord().GetFacets()) == 0 {
			t.Errorf("a record without a head: %v", r)
		}
	}
	if len(artifact.GetRecords()) != 2 || full != 1 {
		t.Errorf("%d records, %d with their bundles", len(artifact.GetRecords()), full)
	}
	one, err := audit.GetRecord(t.Context(), &pb.GetRecordRequest{Id: got.GetRecord().GetId()})
	if err != nil || !bytes.Equal(one.GetRecord().GetBundle(), got.GetBundle()) {
		t.Errorf("the record alone: %v", err)
	}
}

// stalled is a gRPC request over HTTP/2 that says how long its message is and sends no
// more of it than it is told to.
type stalled struct {
	status  chan int // the answer's gRPC status
	sent    atomic.Int64
	begun   chan struct{}
	written *io.PipeWriter
	cancel  context.CancelFunc
}

func stall(t *testing.T, s *testkit.Stack, method, token string, length uint32) *stalled {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	body, w := io.Pipe()
	r := &stalled{status: make(chan int, 1), begun: make(chan struct{}), written: w, cancel: cancel}
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+s.Addr+method, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	req.Header.Set("Authorization", "Bearer "+token)
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: protocols}
	t.Cleanup(tr.CloseIdleConnections)
	go func() {
		resp, err := tr.RoundTrip(req)
		if err != nil {
			r.status <- -1
			return
		}
		defer resp.Body.Close()
		// The end of the answer has the status.
		_, _ = io.Copy(io.Discard, resp.Body)
		code := -1
		if v := resp.Trailer.Get("Grpc-Status") + resp.Header.Get("Grpc-Status"); v != "" {
			fmt.Sscan(v, &code)
		}
		r.status <- code
	}()
	go func() {
		defer close(r.begun)
		head := binary.BigEndian.AppendUint32([]byte{0}, length)
		w.Write(head) // a server that has answered reads no more
	}()
	return r
}

// feed sends junk as long as somebody takes it.
func (r *stalled) feed(most int) {
	<-r.begun
	chunk := make([]byte, 64<<10)
	for range most / len(chunk) {
		n, err := r.written.Write(chunk)
		r.sent.Add(int64(n))
		if err != nil {
			return
		}
	}
	r.written.Close()
}

// I03: a large request is let in or refused before it is read.
func TestI03LargeRequests(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	signer, stranger := s.Token(nil), s.PersonToken("p-1")
	for _, row := range []struct {
		name, method, token string
		length              uint32
		want                codes.Code
	}{
		{"I03 more than a request may have", attestMethod, signer, 71 << 20, codes.ResourceExhausted},
		{"I03 as much as can be said", attestMethod, signer, 1<<32 - 1, codes.ResourceExhausted},
		{"I03 large, from somebody without a role", attestMethod, stranger, 5 << 20, codes.PermissionDenied},
		{"I03 large, to another method", "/hallmark.v1.PromotionService/Verify", signer, 5 << 20, codes.ResourceExhausted},
		{"I03 large, to another method of the service", "/hallmark.v1.SigningService/Import", signer, 5 << 20, codes.ResourceExhausted},
		{"I05 large, from nobody", attestMethod, "x", 5 << 20, codes.Unauthenticated},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := stall(t, s, row.method, row.token, row.length)
			fed := make(chan struct{})
			go func() { defer close(fed); r.feed(32 << 20) }()
			if got := <-r.status; got != int(row.want) {
				t.Errorf("status %d, want %d", got, row.want)
			}
			r.cancel()
			<-fed
			// What flow control lets the peer send before it is heard.
			if n := r.sent.Load(); n > 4<<20 {
				t.Errorf("%d bytes were taken", n)
			}
		})
	}
	signing := pb.NewSigningServiceClient(s.Dial(signer))
	t.Run("I03 the refusals have reasons", func(t *testing.T) {
		_, err := signing.Attest(t.Context(), &pb.AttestRequest{Image: someImage, PredicateType: ourType, Predicate: predicateOf(71 << 20)})
		wantReason(t, err, codes.ResourceExhausted, attest.TooLarge)
		_, err = signing.Attest(t.Context(), &pb.AttestRequest{Image: someImage, PredicateType: ourType, Predicate: predicateOf(attest.MaxPredicate + 1)})
		wantReason(t, err, codes.PermissionDenied, attest.RoleMissing) // the registry is not the signer's
		_, err = pb.NewSigningServiceClient(s.Dial(stranger)).Attest(t.Context(), &pb.AttestRequest{Image: someImage, PredicateType: ourType, Predicate: predicateOf(5 << 20)})
		wantReason(t, err, codes.PermissionDenied, attest.RoleMissing)
	})
	t.Run("I04 compressed", func(t *testing.T) {
		_, err := signing.Attest(t.Context(), &pb.AttestRequest{Image: someImage, PredicateType: ourType, Predicate: predicateOf(5 << 20)}, grpc.UseCompressor(gzip.Name))
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("5 MiB in 5 KiB: %v", err)
		}
		noise := make([]byte, 5<<20) // which nothing makes smaller
		rand.Read(noise)
		_, err = signing.Attest(t.Context(), &pb.AttestRequest{Image: someImage, PredicateType: ourType, Predicate: noise}, grpc.UseCompressor(gzip.Name))
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("5 MiB that are said to be compressed: %v", err)
		}
	})
	t.Run("REST", func(t *testing.T) {
		body := func(n int) string {
			b, err := json.Marshal(map[string]any{"image": someImage, "predicate_type": ourType, "predicate": predicateOf(n)})
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		url := s.URL + "/v1/images:attest"
		do(t, s.HTTP(), "POST", url, body(5<<20), auth(stranger)...).want(t, http.StatusForbidden, attest.RoleMissing)
		do(t, s.HTTP(), "POST", url, body(5<<20), auth(signer)...).want(t, http.StatusForbidden, attest.RoleMissing)
		do(t, s.HTTP(), "POST", s.URL+"/v1/images:import", body(5<<20), auth(signer)...).want(t, http.StatusRequestEntityTooLarge, attest.TooLarge)
		// Without a length it cannot be counted before it is read.
		req, err := http.NewRequestWithContext(t.Context(), "POST", url, io.MultiReader(strings.NewReader(body(5<<20))))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+signer)
		resp, err := s.HTTP().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		answer{resp.StatusCode, resp.Header, b}.want(t, http.StatusRequestEntityTooLarge, attest.TooLarge)
	})
}

// C03: what goes on behind the message of a call ends the call.
func TestC03BodyWithoutEnd(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	msg, err := proto.Marshal(&pb.SignImagesRequest{Images: []*pb.SignImage{{Image: someImage}}})
	if err != nil {
		t.Fatal(err)
	}
	r := stall(t, s, "/hallmark.v1.SigningService/SignImages", s.Token(nil), uint32(len(msg)))
	<-r.begun
	if _, err := r.written.Write(msg); err != nil {
		t.Fatal(err)
	}
	fed := make(chan struct{})
	go func() { defer close(fed); r.feed(256 << 20) }()
	if got := codes.Code(<-r.status); got == codes.OK {
		t.Error("it was answered")
	}
	r.cancel()
	<-fed
	if n := r.sent.Load(); n > 8<<20 {
		t.Errorf("%d bytes were taken", n)
	}
}

// I11: large requests that are slow take neither all of the service's memory nor
// another caller's share, and small requests need none.
func TestI11LargeInFlight(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Issue: func(all *[]identity.Issuer) { (*all)[0].Owners = []string{"1", "2", "3"} }})
	job := func(n int) string { return s.Token(map[string]any{"repository_owner_id": fmt.Sprint(n)}) }
	const each = 60 << 20
	large, smaller := predicateOf(30<<20), predicateOf(5<<20)
	// ask is refused at once, or when its predicate was read; n tells callers apart.
	ask := func(n int, predicate []byte) error {
		_, err := pb.NewSigningServiceClient(s.Dial(job(n))).Attest(t.Context(), &pb.AttestRequest{Image: someImage, PredicateType: ourType, Predicate: predicate})
		return err
	}
	// A stalled request is let in when its caller may send no other.
	until := func(n int, want attest.Reason) {
		t.Helper()
		for ctx := t.Context(); ; {
			if got := reasonOf(status.Convert(ask(n, large))); got == want {
				return
			}
			if ctx.Err() != nil {
				t.Fatalf("caller %d was never told %s", n, want)
			}
		}
	}
	held := []*stalled{stall(t, s, attestMethod, job(1), each)}
	until(1, attest.RateLimited)
	wantReason(t, ask(2, smaller), codes.PermissionDenied, attest.RoleMissing) // it was read
	held = append(held, stall(t, s, attestMethod, job(2), each))
	until(2, attest.RateLimited)
	wantReason(t, ask(3, predicateOf(each)), codes.ResourceExhausted, attest.RateLimited)
	wantReason(t, ask(3, smaller), codes.PermissionDenied, attest.RoleMissing)
	wantReason(t, ask(1, predicateOf(1<<20)), codes.PermissionDenied, attest.RoleMissing)
	for _, h := range held {
		h.cancel()
	}
	until(1, attest.RoleMissing)
	until(2, attest.RoleMissing)
}
