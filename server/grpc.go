package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip" // compressed requests are read, and bounded after decompression
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/hallmarkd/hallmark/attest"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// newGRPC returns the gRPC server with every service. It is reached in two ways:
// through net/http's HTTP/2 server, whose limits hold for it then, and through
// the gateway's in-memory connection.
func (s *Server) newGRPC() *grpc.Server {
	g := grpc.NewServer(s.grpcOptions(maxBody)...)
	pb.RegisterSigningServiceServer(g, signing{s: s})
	pb.RegisterPromotionServiceServer(g, promotion{s: s})
	pb.RegisterAuditServiceServer(g, audit{s: s})
	pb.RegisterTrustServiceServer(g, trust{s: s})
	healthpb.RegisterHealthServer(g, health{s: s})
	reflection.Register(g)

	for service, info := range g.GetServiceInfo() {
		for _, m := range info.Methods {
			s.methods["/"+service+"/"+m.Name] = true
			s.streaming["/"+service+"/"+m.Name] = m.IsClientStream
		}
	}
	return g
}

// newLargeGRPC returns the gRPC server for large requests. How large a message may be
// is one number for a whole server, also after decompression, so there are two.
func (s *Server) newLargeGRPC() *grpc.Server {
	g := grpc.NewServer(s.grpcOptions(maxLarge)...)
	pb.RegisterSigningServiceServer(g, signing{s: s})
	return g
}

func (s *Server) grpcOptions(maxMessage int) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.UnknownServiceHandler(unknownMethod),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeader),
	}
}

// serveGRPC hands a request of net/http to the gRPC server. The caller is
// authenticated before a byte of the message is read, so that nobody unknown can
// make the server hold one.
func (s *Server) serveGRPC(w http.ResponseWriter, r *http.Request) {
	var a admission
	if c, err := credentialOf(r); err != nil {
		a = admission{err: err}
	} else {
		a = s.admit(r.Context(), r.URL.Path, c)
	}
	if a.err == nil && !a.anonymous {
		// From here on the call counts, however slowly its message comes.
		var leave func()
		if leave, a.err = s.callers.enter(a.identity.Quota()); a.err == nil {
			defer leave()
		}
	}
	to, most := s.grpc, int64(maxBody)
	if a.err == nil && bringsEvidence[r.URL.Path] {
		var n int64
		if n, r.Body = firstMessage(r.Body); n > maxBody {
			var leave func()
			if leave, a.err = s.admitLarge(a.identity, n); a.err == nil {
				defer leave()
				to, most = s.grpcLarge, n
			}
		}
	}
	if a.err != nil || r.URL.Path == healthCheck {
		// The interceptor answers, or the health of the whole process: neither needs
		// more than one empty message, or waits for it.
		r.Body = io.NopCloser(bytes.NewReader(make([]byte, prefix)))
	}
	m := &messages{Closer: r.Body, body: r.Body, most: most, left: 1}
	if a.anonymous {
		m.most = maxOpenMessage
	}
	if s.streaming[r.URL.Path] {
		m.left = maxStreamMessages
	}
	r.Body = m
	to.ServeHTTP(w, r.WithContext(admitted(r.Context(), a)))
}

// unary runs around every call, from wherever it came.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	call := s.begin(info.FullMethod)
	defer func() { err = call.end(recover(), err) }()

	ctx, cancel := call.admit(ctx)
	defer cancel()
	if call.refused != nil {
		return nil, call.refused
	}
	if err := noUnknownFields(req.(proto.Message).ProtoReflect(), ""); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// stream is unary for streams: reflection, and methods that nobody serves.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	call := s.begin(info.FullMethod)
	defer func() { err = call.end(recover(), err) }()

	ctx, cancel := call.admit(ss.Context())
	defer cancel()
	if call.refused != nil {
		return call.refused
	}
	return handler(srv, boundStream{ss, ctx})
}

type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (b boundStream) Context() context.Context { return b.ctx }

// unknownMethod answers for every method that is not registered.
func unknownMethod(_ any, ss grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(ss)
	return attest.Errorf(attest.MethodUnknown, "there is no method %q", method)
}

// call is one call from admission to its answer.
type call struct {
	s       *Server
	method  string
	start   time.Time
	who     attest.Identity
	refused error
}

func (s *Server) begin(method string) *call {
	s.working.begin()
	return &call{s: s, method: method, start: time.Now()}
}

// admit finds who calls and sets the deadline. A refusal is in c.refused. An identity
// comes from serveGRPC or restRoute only, which have counted the call.
func (c *call) admit(ctx context.Context) (context.Context, context.CancelFunc) {
	a := c.s.admitRPC(ctx, c.method)
	c.who, c.refused = a.identity, a.err
	most := callTimeout
	if slow[c.method] {
		most = slowTimeout
	}
	return context.WithTimeout(admitted(ctx, a), most)
}

// end turns what happened into the status that the caller gets. It is the only
// place where an error is logged (style: handle an error once).
func (c *call) end(panicked any, err error) error {
	defer c.s.working.end()
	if panicked != nil {
		err = fmt.Errorf("panic: %v\n%s", panicked, debug.Stack())
	}
	if err == nil {
		return nil
	}
	r := refuse(err)
	c.s.logRefusal(c.method, c.who, r, err, time.Since(c.start))
	return r.status().Err()
}

// logRefusal writes one line. Only an internal error's cause is written: it may
// name files and hosts, never a token or a key.
func (s *Server) logRefusal(method string, who attest.Identity, r refusal, err error, took time.Duration) {
	attrs := []slog.Attr{
		slog.String("method", printable(method)), slog.String("reason", string(r.Reason)),
		slog.String("caller", printable(who.SAN)), slog.Duration("took", took),
	}
	level := slog.LevelInfo
	if CodeOf(r.Reason) == codes.Internal {
		level = slog.LevelError
		attrs = append(attrs, slog.String("incident", r.ID), slog.String("error", printable(err.Error())))
	}
	s.logger.LogAttrs(context.Background(), level, "refused", attrs...)
}

// noUnknownFields refuses a message that says more than the API has words for. A
// caller must not believe that a builder or a commit that it named was taken
// (attacks B07).
func noUnknownFields(m protoreflect.Message, path string) (err error) {
	if len(m.GetUnknown()) > 0 {
		return attest.Errorf(attest.CallerFactsRefused, "the request has fields that %s does not: what is signed comes from the token and the registry",
			m.Descriptor().FullName()).With("field", path)
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Message() == nil || f.IsMap() {
			return true
		}
		if !f.IsList() {
			err = noUnknownFields(v.Message(), string(f.Name()))
			return err == nil
		}
		for i := range v.List().Len() {
			if err = noUnknownFields(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", f.Name(), i)); err != nil {
				return false
			}
		}
		return true
	})
	return err
}

// health answers for the whole process; names of services are not told apart.
type health struct {
	healthpb.UnimplementedHealthServer
	s *Server
}

func (h health) Check(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if h.s.gate.Ready() != nil {
		return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_NOT_SERVING}, nil
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}
