package server_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"unicode"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/server"
)

const someImage = "registry.example.com/acme/api@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

// I05: every method of every service that the server names needs an identity,
// but for a list that is written out here once more.
func TestI05DefaultDeny(t *testing.T) {
	public := map[string]bool{
		"hallmark.v1.TrustService.GetTrustedRoot": true, "hallmark.v1.TrustService.GetGateKey": true, "hallmark.v1.TrustService.GetCheckpoint": true,
		"grpc.health.v1.Health.Check": true, "grpc.health.v1.Health.List": true, "grpc.health.v1.Health.Watch": true,
		"grpc.reflection.v1.ServerReflection.ServerReflectionInfo":      true,
		"grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": true,
	}
	s := testkit.NewStack(t, testkit.Options{})
	conn := s.Dial("")
	seen := 0
	for _, service := range services(t, conn) {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			m := methods.Get(i)
			if public[string(m.FullName())] {
				continue
			}
			seen++
			err := conn.Invoke(t.Context(), "/"+service+"/"+string(m.Name()), &emptypb.Empty{}, &emptypb.Empty{})
			t.Run("I05 "+string(m.FullName()), func(t *testing.T) {
				wantReason(t, err, codes.Unauthenticated, attest.TokenMissing)
			})
		}
	}
	if seen < 8 {
		t.Errorf("only %d methods need an identity", seen)
	}
	if _, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health is public: %v", err)
	}
	if _, err := pb.NewTrustServiceClient(conn).GetCheckpoint(t.Context(), &pb.GetCheckpointRequest{}); err != nil {
		t.Errorf("the checkpoint is public: %v", err)
	}
}

// services asks the server what it serves.
func services(t *testing.T, conn *grpc.ClientConn) []string {
	t.Helper()
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, s := range resp.GetListServicesResponse().GetService() {
		out = append(out, s.GetName())
	}
	return out
}

// I01: a path that is not exactly a method's is no method, with an identity and
// without.
func TestI01Paths(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	for _, token := range []string{"", s.Token(nil)} {
		conn := s.Dial(token)
		for _, path := range []string{
			"/hallmark.v1.SigningService/signImages", "/hallmark.v1.signingservice/SignImages",
			"/hallmark.v1.SigningService/SignImages/", "//hallmark.v1.SigningService/SignImages",
			"/hallmark.v1.TrustService/GetCheckpoint/../WhoAmI", "/hallmark.v1.TrustService/", "/x/y",
		} {
			t.Run("I01 "+path, func(t *testing.T) {
				err := conn.Invoke(t.Context(), path, &pb.WhoAmIRequest{}, &pb.WhoAmIResponse{})
				wantReason(t, err, codes.Unimplemented, attest.MethodUnknown)
			})
		}
	}
	// An escaped slash names the same method, and needs the same identity.
	err := s.Dial("").Invoke(t.Context(), "/hallmark.v1.TrustService%2FWhoAmI", &pb.WhoAmIRequest{}, &pb.WhoAmIResponse{})
	wantReason(t, err, codes.Unauthenticated, attest.TokenMissing)

	t.Run("I01 no leading slash", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		c.request(1, "hallmark.v1.SigningService/SignImages", false)
		for {
			switch f := c.next().(type) {
			case *http2.RSTStreamFrame, *http2.GoAwayFrame:
				return
			case *http2.MetaHeadersFrame:
				if f.PseudoValue("status") == "200" {
					t.Errorf("answered: %v", f.Fields)
				}
				return
			case nil:
				return
			}
		}
	})
}

// frames speaks HTTP/2 as no client library would.
type frames struct {
	t *testing.T
	*http2.Framer
	conn net.Conn
	enc  *hpack.Encoder
	buf  bytes.Buffer
}

func dialFrames(t *testing.T, addr string) *frames {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f := &frames{t: t, conn: conn, Framer: http2.NewFramer(conn, conn)}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.enc = hpack.NewEncoder(&f.buf)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return f
}

// block encodes the header of a gRPC request.
func (f *frames) block(path string, more ...hpack.HeaderField) []byte {
	f.buf.Reset()
	for _, h := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "x"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, more...) {
		if err := f.enc.WriteField(h); err != nil {
			f.t.Fatal(err)
		}
	}
	return bytes.Clone(f.buf.Bytes())
}

// request opens a stream; open leaves it waiting for its message.
func (f *frames) request(stream uint32, path string, open bool) error {
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: f.block(path), EndHeaders: true, EndStream: !open})
}

// next returns the next frame, nil when the connection has ended.
func (f *frames) next() http2.Frame {
	fr, err := f.ReadFrame()
	if err != nil {
		return nil
	}
	return fr
}

const checkpointMethod = "/hallmark.v1.TrustService/GetCheckpoint"

// I03: the HTTP/2 server that serves gRPC says what it takes, and takes no more.
func TestI03Limits(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	t.Run("I03 announced", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		for {
			f, ok := c.next().(*http2.SettingsFrame)
			if !ok {
				t.Fatal("no settings")
			}
			if f.IsAck() {
				continue
			}
			if v, ok := f.Value(http2.SettingMaxConcurrentStreams); !ok || v != 250 {
				t.Errorf("max concurrent streams %d, %v", v, ok)
			}
			if v, ok := f.Value(http2.SettingMaxHeaderListSize); !ok || v > 72<<10 {
				t.Errorf("max header list size %d, %v", v, ok)
			}
			return
		}
	})
	t.Run("I03 streams", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		for i := range uint32(251) {
			if err := c.request(2*i+1, checkpointMethod, true); err != nil {
				t.Fatal(err)
			}
		}
		for {
			switch f := c.next().(type) {
			case *http2.RSTStreamFrame:
				if f.StreamID != 2*250+1 {
					t.Errorf("stream %d was refused", f.StreamID)
				}
				return
			case *http2.GoAwayFrame:
				return
			case nil:
				t.Fatal("the connection ended without a refusal")
			}
		}
	})
	t.Run("I03 header", func(t *testing.T) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-big", strings.Repeat("a", 100<<10))
		if _, err := pb.NewTrustServiceClient(s.Dial("")).GetCheckpoint(ctx, &pb.GetCheckpointRequest{}); err == nil {
			t.Error("a header of 100 KiB was taken")
		}
	})
	t.Run("I03 message", func(t *testing.T) {
		_, err := pb.NewAuditServiceClient(s.Dial(s.Token(nil))).ListRecords(t.Context(), &pb.ListRecordsRequest{Filter: strings.Repeat("a", 5<<20)})
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a message of 5 MiB: %v", err)
		}
	})
	t.Run("I03 body", func(t *testing.T) {
		a := do(t, s.HTTP(), "POST", s.URL+"/v1/images:verify", `{"image":"`+strings.Repeat("a", 5<<20)+`"}`, auth(s.Token(nil))...)
		a.want(t, http.StatusRequestEntityTooLarge, attest.TooLarge)
		a = do(t, s.HTTP(), "POST", s.URL+"/v1/images:verify", strings.Repeat(" ", 5<<20)+`{"image":"`+someImage+`"}`, auth(s.Token(nil))...)
		a.want(t, http.StatusRequestEntityTooLarge, attest.TooLarge)
	})
	t.Run("I03 all callers together", func(t *testing.T) {
		busy := testkit.NewStack(t, testkit.Options{Server: func(c *server.Config) { c.MaxInFlight = 2 }})
		c := dialFrames(t, busy.Addr)
		for i := range uint32(8) {
			if err := c.request(2*i+1, checkpointMethod, true); err != nil {
				t.Fatal(err)
			}
		}
		for {
			f, ok := c.next().(*http2.MetaHeadersFrame)
			if !ok {
				continue
			}
			for _, h := range f.Fields {
				if h.Name == "grpc-status" && h.Value == "8" {
					do(t, busy.HTTP(), "GET", busy.URL+"/v1/trust/root", "").want(t, http.StatusTooManyRequests, attest.RateLimited)
					return
				}
			}
		}
	})
}

// I02: abuse of HTTP/2 ends the abuser's connection and nobody else's.
func TestI02HTTP2Abuse(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	alive := func(t *testing.T) {
		t.Helper()
		if _, err := healthpb.NewHealthClient(s.Dial("")).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Errorf("others are not served: %v", err)
		}
	}
	t.Run("I02 rapid reset", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		go io.Copy(io.Discard, c.conn)
		for i := range uint32(20000) {
			if c.request(2*i+1, checkpointMethod, true) != nil || c.WriteRSTStream(2*i+1, http2.ErrCodeCancel) != nil {
				break // it was thrown out
			}
		}
		alive(t)
	})
	t.Run("I02 continuation flood", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		ended := make(chan struct{})
		go func() { defer close(ended); io.Copy(io.Discard, c.conn) }()
		if err := c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.block(checkpointMethod)}); err != nil {
			t.Fatal(err)
		}
		junk := c.block(checkpointMethod, hpack.HeaderField{Name: "x-junk", Value: strings.Repeat("a", 8<<10)})
		for range 4096 { // 32 MiB, were they taken
			if c.WriteContinuation(1, false, junk) != nil {
				break
			}
		}
		<-ended // by the server: this side never closes it
		alive(t)
	})
	t.Run("I02 settings flood", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		for range 20000 { // their acknowledgements are never read
			if c.WriteSettings() != nil {
				break
			}
		}
		alive(t)
	})
	t.Run("I02 frame too large", func(t *testing.T) {
		c := dialFrames(t, s.Addr)
		if err := c.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20)); err != nil {
			return // it was closed meanwhile
		}
		for c.next() != nil {
		}
		alive(t)
	})
}

// I04: what a compressed message becomes counts, not what was sent.
func TestI04CompressedBomb(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	c := pb.NewAuditServiceClient(s.Dial(s.Token(nil)))
	_, err := c.ListRecords(t.Context(), &pb.ListRecordsRequest{Filter: strings.Repeat("a", 64<<20)}, grpc.UseCompressor(gzip.Name))
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("64 MiB in 64 KiB: %v", err)
	}
	// A small one is read like any other.
	_, err = c.ListRecords(t.Context(), &pb.ListRecordsRequest{Filter: "x"}, grpc.UseCompressor(gzip.Name))
	wantReason(t, err, codes.PermissionDenied, attest.RoleMissing)
}

// I06: nothing in a REST request but the authorization header, the path, the
// known parameters and the body reaches a method.
func TestI06Gateway(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	c := s.HTTP()
	token := s.Token(nil)
	whoami := s.URL + "/v1/whoami"
	t.Run("I06 metadata header", func(t *testing.T) {
		do(t, c, "GET", whoami, "", "Grpc-Metadata-Authorization", "Bearer "+token).want(t, http.StatusUnauthorized, attest.TokenMissing)
	})
	t.Run("I06 metadata header beside the real one", func(t *testing.T) {
		a := do(t, c, "GET", whoami, "", "Authorization", "Bearer "+token, "Grpc-Metadata-Authorization", "Bearer "+s.PersonToken("p"))
		if a.code != http.StatusOK || !strings.Contains(string(a.body), "repo:acme") {
			t.Errorf("HTTP %d %s", a.code, a.body)
		}
	})
	t.Run("I06 token as parameter", func(t *testing.T) {
		do(t, c, "GET", whoami+"?access_token="+token, "").want(t, http.StatusUnauthorized, attest.TokenMissing)
		do(t, c, "GET", whoami+"?access_token=x", "", auth(token)...).want(t, http.StatusBadRequest, attest.CallerFactsRefused)
	})
	t.Run("I06 parameter twice", func(t *testing.T) {
		do(t, c, "GET", whoami+"?repository=r.example.com/a&repository=r.example.com/b", "", auth(token)...).want(t, http.StatusBadRequest, attest.BadRequest)
	})
	t.Run("I06 method override", func(t *testing.T) {
		a := do(t, c, "POST", whoami, "repository=", "X-HTTP-Method-Override", "GET", "Content-Type", "application/x-www-form-urlencoded", "Authorization", "Bearer "+token)
		a.want(t, http.StatusMethodNotAllowed, attest.MethodUnknown)
	})
	t.Run("I06 form as GET", func(t *testing.T) {
		a := do(t, c, "POST", whoami, "repository=", "Content-Type", "application/x-www-form-urlencoded", "Authorization", "Bearer "+token)
		a.want(t, http.StatusMethodNotAllowed, attest.MethodUnknown)
	})
	t.Run("I06 timeout header", func(t *testing.T) {
		if a := do(t, c, "GET", whoami, "", "Grpc-Timeout", "1n", "Authorization", "Bearer "+token); a.code != http.StatusOK {
			t.Errorf("HTTP %d %s", a.code, a.body)
		}
	})
	t.Run("I06 public path as prefix", func(t *testing.T) {
		for _, path := range []string{"/v1/trust/root/../../whoami", "/v1/trust/root/%2e%2e/%2e%2e/whoami", "/v1//whoami", "/v1/trust/root;/whoami"} {
			if a := do(t, c, "GET", s.URL+path, ""); a.code == http.StatusOK {
				t.Errorf("%s was answered: %s", path, a.body)
			}
		}
	})
	t.Run("I06 gRPC beside gRPC", func(t *testing.T) {
		// HTTP/1.1 with gRPC's content type is not gRPC and has no way in.
		a := do(t, c, "POST", s.URL+"/hallmark.v1.TrustService/WhoAmI", "", "Content-Type", "application/grpc", "Authorization", "Bearer "+token)
		if a.code == http.StatusOK {
			t.Errorf("HTTP %d %s", a.code, a.body)
		}
	})
}

// I07: JSON that is deep, doubled or trailed by more is refused.
func TestI07JSON(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	c := s.HTTP()
	token := auth(s.Token(nil))
	image := `"image":"` + someImage + `"`
	for name, row := range map[string]struct {
		body string
		want attest.Reason
	}{
		"I07 deep arrays":     {strings.Repeat("[", 1<<20), attest.BadJSON},
		"I07 deep objects":    {`{"images":` + strings.Repeat(`{"images":`, 1<<18), attest.BadJSON},
		"I07 deep in unknown": {`{"x":` + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20) + `}`, attest.CallerFactsRefused},
		"I07 duplicate":       {`{` + image + `,` + image + `}`, attest.BadJSON},
		"I07 both spellings":  {`{"to_stage":"a","toStage":"b"}`, attest.BadJSON},
		"I07 trailing data":   {`{` + image + `}{}`, attest.BadJSON},
		"I07 no UTF-8":        {"{\"image\":\"\xff\"}", attest.BadJSON},
		"I07 empty":           {``, attest.BadJSON},
		"I07 null":            {`null`, attest.BadJSON},
		"I07 cut off":         {`{` + image, attest.BadJSON},
	} {
		t.Run(name, func(t *testing.T) {
			path := "/v1/images:promote"
			if strings.Contains(row.body, "images") {
				path = "/v1/images:sign"
			}
			do(t, c, "POST", s.URL+path, row.body, token...).want(t, http.StatusBadRequest, row.want)
		})
	}
}

// B07: a caller that names a builder, a commit or anything else that the API has
// no word for learns that it was not taken.
func TestB07CallerFacts(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	token := s.Token(nil)
	unknown := protowire.AppendString(protowire.AppendTag(nil, 77, protowire.BytesType), "https://evil.example.com/builder")
	signing := pb.NewSigningServiceClient(s.Dial(token))

	outer := &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: someImage}}}
	outer.ProtoReflect().SetUnknown(unknown)
	_, err := signing.SignImages(t.Context(), outer)
	wantReason(t, err, codes.InvalidArgument, attest.CallerFactsRefused)

	inner := &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: someImage}, {Image: someImage}}}
	inner.Images[1].ProtoReflect().SetUnknown(unknown)
	_, err = signing.SignImages(t.Context(), inner)
	wantReason(t, err, codes.InvalidArgument, attest.CallerFactsRefused)

	c := s.HTTP()
	for _, body := range []string{
		`{"images":[{"image":"` + someImage + `","builder_id":"https://evil.example.com"}]}`,
		`{"images":[{"image":"` + someImage + `"}],"commit":"` + testkit.Commit + `"}`,
	} {
		do(t, c, "POST", s.URL+"/v1/images:sign", body, auth(token)...).want(t, http.StatusBadRequest, attest.CallerFactsRefused)
	}
	do(t, c, "POST", s.URL+"/v1/images:sign?builder_id=x", `{}`, auth(token)...).want(t, http.StatusBadRequest, attest.CallerFactsRefused)
}

// A25: a call with two identities has none, however they are sent.
func TestA25TwoIdentities(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	one, two := "Bearer "+s.Token(nil), "Bearer "+s.PersonToken("p", "audit")
	trust := pb.NewTrustServiceClient(s.Dial(""))
	for name, pairs := range map[string][]string{
		"A25 two headers":       {"authorization", one, "authorization", two},
		"A25 twice the same":    {"authorization", one, "authorization", one},
		"A25 comma":             {"authorization", one + ", " + two},
		"A25 token and session": {"authorization", one, "cookie", "hallmark-session=x"},
		"A25 token and __Host-": {"authorization", one, "cookie", "a=b; __Host-hallmark-session=x"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := trust.WhoAmI(metadata.AppendToOutgoingContext(t.Context(), pairs...), &pb.WhoAmIRequest{})
			wantReason(t, err, codes.Unauthenticated, attest.TwoIdentities)
			do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", pairs...).want(t, http.StatusUnauthorized, attest.TwoIdentities)
			do(t, s.HTTP(), "GET", s.URL+"/log/checkpoint", "", pairs...).want(t, http.StatusUnauthorized, attest.TwoIdentities)
		})
	}
	// A session alone is for pages only.
	do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", "Cookie", "hallmark-session=x").want(t, http.StatusUnauthorized, attest.TokenMissing)
	do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", "Authorization", "Basic eDp5").want(t, http.StatusUnauthorized, attest.TokenMalformed)
}

// I10 and L01: a caller learns that something broke, the log learns what, and
// neither learns a token.
func TestI10InternalErrors(t *testing.T) {
	var log syncBuffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := testkit.NewStack(t, testkit.Options{Logger: logger})
	img := s.PushApp("acme/api")
	const secret = "the database at /var/lib/hallmark is on fire"
	s.SetStep(func(string) { panic(secret) })
	s.Restart()
	token := s.PromoterToken()
	promote := &pb.PromoteRequest{Image: img.String(), ToStage: "test"}
	_, err := pb.NewPromotionServiceClient(s.Dial(token)).Promote(t.Context(), promote)
	wantReason(t, err, codes.Internal, attest.Internal)
	if strings.Contains(status.Convert(err).Message(), "fire") {
		t.Errorf("the caller was told: %v", err)
	}
	a := do(t, s.HTTP(), "POST", s.URL+"/v1/images:promote", `{"image":"`+img.String()+`","to_stage":"test"}`, auth(token)...)
	a.want(t, http.StatusInternalServerError, attest.Internal)
	if strings.Contains(string(a.body), "fire") {
		t.Errorf("the caller was told: %s", a.body)
	}
	_, incident, _ := strings.Cut(status.Convert(err).Message(), "incident ")
	if n := strings.Count(log.String(), "incident="+incident); n != 1 || !strings.Contains(log.String(), secret) {
		t.Errorf("incident %q is in the log %d times", incident, n)
	}
	t.Run("L01 no token in the log", func(t *testing.T) {
		bad := token[:len(token)-8] + "AAAAAAAA"
		_, err := pb.NewTrustServiceClient(s.Dial(bad)).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
		wantReason(t, err, codes.Unauthenticated, attest.TokenSignature)
		for _, tok := range []string{token, bad} {
			for part := range strings.SplitSeq(tok, ".") {
				if strings.Contains(log.String(), part) {
					t.Error("a part of the token is in the log")
				}
			}
		}
	})
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// I11: one identity cannot take all of the service.
func TestI11Fairness(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{Server: func(c *server.Config) { c.MaxInFlightPerCaller = 1 }})
	started, release := blocked(s)
	img := s.PushApp("acme/api")
	token := s.Token(nil)
	conn := s.Dial(token)
	answered := make(chan error, 1)
	go func() {
		_, err := pb.NewSigningServiceClient(conn).SignImages(context.WithoutCancel(t.Context()),
			&pb.SignImagesRequest{Attach: pb.Attach_ATTACH_CLIENT, Images: []*pb.SignImage{{Image: img.String()}}})
		answered <- err
	}()
	<-started
	// Another token of the same subject is the same caller.
	_, err := pb.NewTrustServiceClient(s.Dial(s.Token(nil))).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	wantReason(t, err, codes.ResourceExhausted, attest.RateLimited)
	retry := false
	for _, d := range status.Convert(err).Details() {
		_, is := d.(*errdetails.RetryInfo)
		retry = retry || is
	}
	if !retry {
		t.Error("the refusal does not say when to try again")
	}
	if _, err := pb.NewTrustServiceClient(s.Dial(s.PersonToken("p"))).WhoAmI(t.Context(), &pb.WhoAmIRequest{}); err != nil {
		t.Errorf("another caller: %v", err)
	}
	release()
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if _, err := pb.NewTrustServiceClient(conn).WhoAmI(t.Context(), &pb.WhoAmIRequest{}); err != nil {
		t.Errorf("after the call had ended: %v", err)
	}
}

// J04 and J05: text that could forge lines and numbers beyond their range.
func TestJ04J05Fields(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	conn := s.Dial(s.PromoterToken())
	p, a := pb.NewPromotionServiceClient(conn), pb.NewAuditServiceClient(conn)
	sign := pb.NewSigningServiceClient(conn)
	ctx := t.Context()
	type row struct {
		name string
		call func() error
		want attest.Reason
	}
	promote := func(in *pb.PromoteRequest) func() error {
		return func() error { _, err := p.Promote(ctx, in); return err }
	}
	rows := []row{
		{"J04 newline in reason", promote(&pb.PromoteRequest{Image: someImage, ToStage: "test", Reason: "ok\nlevel=ERROR"}), attest.BadRequest},
		{"J04 escape in ticket", promote(&pb.PromoteRequest{Image: someImage, ToStage: "test", Ticket: "\x1b[2J"}), attest.BadRequest},
		{"J04 right-to-left override", promote(&pb.PromoteRequest{Image: someImage, ToStage: "te\u202est"}), attest.BadRequest},
		{"J04 zero-width in version", promote(&pb.PromoteRequest{Image: someImage, ToStage: "test", Version: "1\u200b"}), attest.BadRequest},
		{"J04 escape in image", promote(&pb.PromoteRequest{Image: "a.example.com/\x1b]0;x\x07@sha256:0", ToStage: "test"}), attest.BadReference},
		{"J04 long reason", promote(&pb.PromoteRequest{Image: someImage, ToStage: "test", Reason: strings.Repeat("a", 1001)}), attest.BadRequest},
		{"missing stage", promote(&pb.PromoteRequest{Image: someImage}), attest.BadRequest},
		{"missing image", promote(&pb.PromoteRequest{ToStage: "test"}), attest.BadRequest},
		{"G01 tag", promote(&pb.PromoteRequest{Image: "r.example.com/a:latest", ToStage: "test"}), attest.TagRefused},
		{"J05 page size", func() error { _, err := a.ListRecords(ctx, &pb.ListRecordsRequest{PageSize: -1}); return err }, attest.BadRequest},
		{"J05 decision -1", func() error { _, err := a.GetDecision(ctx, &pb.GetDecisionRequest{Id: -1}); return err }, attest.BadRequest},
		{"J05 decision 0", func() error { _, err := a.GetDecision(ctx, &pb.GetDecisionRequest{}); return err }, attest.BadRequest},
		{"J05 decision of no record", func() error { _, err := a.GetDecision(ctx, &pb.GetDecisionRequest{Id: 1<<63 - 1}); return err }, attest.RecordNotFound},
		{"J05 enum", func() error {
			_, err := sign.SignImages(ctx, &pb.SignImagesRequest{Attach: 99, Images: []*pb.SignImage{{Image: someImage}}})
			return err
		}, attest.BadRequest},
		{"J05 no images", func() error { _, err := sign.SignImages(ctx, &pb.SignImagesRequest{}); return err }, attest.BadRequest},
		{"J05 too many images", func() error {
			_, err := sign.SignImages(ctx, &pb.SignImagesRequest{Images: make([]*pb.SignImage, 65)})
			return err
		}, attest.BadRequest},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			err := r.call()
			wantReason(t, err, server.CodeOf(r.want), r.want)
			if msg := status.Convert(err).Message(); strings.ContainsFunc(msg, func(c rune) bool { return !unicode.IsPrint(c) }) {
				t.Errorf("J04 the message has control characters: %q", msg)
			}
		})
	}
	for _, id := range []string{"9223372036854775808", "-1", "1e3", "0x10", "x"} {
		t.Run("J05 REST decision "+id, func(t *testing.T) {
			do(t, s.HTTP(), "GET", s.URL+"/v1/decisions/"+id, "", auth(s.PromoterToken())...).want(t, http.StatusBadRequest, attest.BadRequest)
		})
	}
}

// J04: what another machine put into an error cannot move a terminal's cursor.
func TestJ04ErrorTexts(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	s.SetGate(func(c *gate.Config) {
		c.Images = func(context.Context, attest.ImageRef, string, func(attest.Repository) bool) (attest.Image, error) {
			return attest.Image{}, attest.Errorf(attest.RegistryDenied, "the registry says: \x1b[2J\nALLOWED \u202e\xff").With("said", "\x1b[0m")
		}
	})
	s.Restart()
	out, err := pb.NewSigningServiceClient(s.Dial(s.Token(nil))).SignImages(t.Context(),
		&pb.SignImagesRequest{Images: []*pb.SignImage{{Image: s.PushApp("acme/api").String()}}})
	if err != nil {
		t.Fatal(err)
	}
	r := out.GetResults()[0].GetRefusal()
	if r.GetReason() != string(attest.RegistryDenied) || r.GetMessage() != `the registry says: \x1b[2J\nALLOWED \u202e\ufffd` || r.GetMetadata()["said"] != `\x1b[0m` {
		t.Errorf("refusal %q", r)
	}
}

// L02: there is nothing to debug the service with from outside.
func TestL02NoDebugEndpoints(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	for _, path := range []string{"/metrics", "/debug/pprof/", "/debug/pprof/heap", "/debug/vars", "/debug/requests"} {
		if a := do(t, s.HTTP(), "GET", s.URL+path, ""); a.code != http.StatusNotFound {
			t.Errorf("L02 %s: HTTP %d", path, a.code)
		}
	}
}

// fakeListener lends a listener other addresses.
type fakeListener struct {
	net.Listener
	local, remote net.Addr
}

func (l fakeListener) Addr() net.Addr { return l.local }

func (l fakeListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return fakeConn{c, l.remote}, err
}

type fakeConn struct {
	net.Conn
	remote net.Addr
}

func (c fakeConn) RemoteAddr() net.Addr { return c.remote }

// Tokens travel in the clear only inside this host or from a named proxy.
func TestPlainHTTPOnlyWhereItIsSafe(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	outside := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 8443}
	serve := func(cfg server.Config, remote string) (string, func() error) {
		t.Helper()
		cfg.Gate, cfg.Auth, cfg.Pages, cfg.Logger = s.Gate, s.Auth, s.Pages, slog.New(slog.DiscardHandler)
		srv, err := server.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { lis.Close() })
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- srv.Serve(ctx, fakeListener{lis, outside, &net.TCPAddr{IP: net.ParseIP(remote), Port: 4711}})
		}()
		return "http://" + lis.Addr().String(), func() error { cancel(); return <-ended }
	}

	_, end := serve(server.Config{}, "192.0.2.9")
	if err := end(); attest.ReasonOf(err) != attest.BadConfig {
		t.Errorf("without TLS beyond loopback: %v", err)
	}
	proxies := server.Config{BehindProxy: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/29")}}
	url, end := serve(proxies, "192.0.2.3")
	if a := do(t, s.HTTP(), "GET", url+"/v1/trust/root", ""); a.code != http.StatusOK {
		t.Errorf("the proxy: HTTP %d", a.code)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	url, end = serve(proxies, "192.0.2.9")
	if resp, err := s.HTTP().Get(url + "/v1/trust/root"); err == nil {
		resp.Body.Close()
		t.Errorf("A29 one that is not the proxy: HTTP %d", resp.StatusCode)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if _, err := server.New(server.Config{CertFile: "tls.crt"}); attest.ReasonOf(err) != attest.BadConfig {
		t.Errorf("half of a TLS configuration: %v", err)
	}
	_, end = serve(server.Config{CertFile: "/nonexistent.crt", KeyFile: "/nonexistent.key"}, "192.0.2.3")
	if err := end(); attest.ReasonOf(err) != attest.BadConfig {
		t.Errorf("TLS files that are not there: %v", err)
	}
}
