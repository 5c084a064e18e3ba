package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/hallmarkd/hallmark/attest"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// newREST returns the REST API: grpc-gateway before in-memory connections to
// the gRPC servers, so that the same interceptors run for it.
func (s *Server) newREST() (http.Handler, error) {
	conn, closeConn, err := gatewayConn(s.grpc)
	if err != nil {
		return nil, err
	}
	largeConn, closeLarge, err := gatewayConn(s.grpcLarge)
	if err != nil {
		return nil, errors.Join(err, closeConn())
	}
	s.closeREST = func() error { return errors.Join(closeConn(), closeLarge()) }
	gateway := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, &strictJSON{runtime.JSONPb{
			MarshalOptions: protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true},
		}}),
		runtime.WithIncomingHeaderMatcher(noHeader), runtime.WithOutgoingHeaderMatcher(noHeader), runtime.WithOutgoingTrailerMatcher(noHeader),
		runtime.WithMetadata(handleOf),
		runtime.WithErrorHandler(gatewayError),
		runtime.WithDisablePathLengthFallback(), // a POSTed form is never a GET
		runtime.WithDisableHTTPMethodOverride(), // nor is a header a method
	)
	ctx := context.Background() // the handlers below close nothing; s.close does
	for _, register := range []func(context.Context, *runtime.ServeMux, *grpc.ClientConn) error{
		pb.RegisterPromotionServiceHandler, pb.RegisterAuditServiceHandler, pb.RegisterTrustServiceHandler,
	} {
		if err := register(ctx, gateway, conn); err != nil {
			return nil, errors.Join(fmt.Errorf("registering the gateway: %w", err), s.closeREST())
		}
	}
	// How large its requests may be, restRoute has seen to.
	if err := pb.RegisterSigningServiceHandler(ctx, gateway, largeConn); err != nil {
		return nil, errors.Join(fmt.Errorf("registering the gateway: %w", err), s.closeREST())
	}
	return s.restRoutes(gateway)
}

// gatewayConn returns an in-memory connection to a gRPC server.
func gatewayConn(g *grpc.Server) (*grpc.ClientConn, func() error, error) {
	pipe := bufconn.Listen(1 << 20)
	conn, err := grpc.NewClient("passthrough:///gateway",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // it never leaves the process
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, nil, fmt.Errorf("connecting the gateway: %w", err)
	}
	go g.Serve(pipe) // returns when the server stops
	return conn, func() error { return errors.Join(conn.Close(), pipe.Close()) }, nil
}

func noHeader(string) (string, bool) { return "", false }

// restRoutes returns a handler that lets a request through to the gateway when
// it has an identity, or its method needs none, and says nothing that its method
// has no field for. The routes are those of the OpenAPI document.
func (s *Server) restRoutes(gateway http.Handler) (http.Handler, error) {
	var doc struct {
		Paths map[string]map[string]struct {
			OperationID string `json:"operationId"`
			Parameters  []struct {
				Name string `json:"name"`
				In   string `json:"in"`
			} `json:"parameters"`
		} `json:"paths"`
	}
	if err := json.Unmarshal(pb.OpenAPI, &doc); err != nil {
		return nil, fmt.Errorf("reading the OpenAPI document: %w", err)
	}
	mux := http.NewServeMux()
	for path, operations := range doc.Paths {
		for verb, op := range operations {
			service, method, _ := strings.Cut(op.OperationID, "_")
			var query []string
			for _, p := range op.Parameters {
				if p.In == "query" {
					query = append(query, p.Name)
				}
			}
			mux.Handle(strings.ToUpper(verb)+" "+path, s.restRoute("/hallmark.v1."+service+"/"+method, query, gateway))
		}
		mux.HandleFunc(path, noMethod)
	}
	mux.HandleFunc("/", noPath)
	return mux, nil
}

// restRoute guards one method. Of the request's headers none goes on but what its
// body is: no REST caller can set gRPC metadata (attacks I06).
func (s *Server) restRoute(method string, query []string, gateway http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := credentialOf(r)
		var a admission
		if err == nil {
			a = s.admit(r.Context(), method, c)
			err = a.err
		}
		if err == nil && !a.anonymous {
			var leave func()
			if leave, err = s.callers.enter(a.identity.Quota()); err == nil {
				defer leave()
			}
		}
		if err == nil {
			err = knownQuery(r, query)
		}
		most := int64(maxBody)
		if err == nil && bringsEvidence[method] && r.ContentLength > maxBody {
			var leave func()
			if leave, err = s.admitLarge(a.identity, r.ContentLength); err == nil {
				defer leave()
				most = r.ContentLength
			}
		}
		if err != nil {
			refused := refuse(err)
			s.logRefusal(method, a.identity, refused, err, 0)
			writeStatus(w, 0, refused.status())
			return
		}
		ctx, done := s.handOver(r.Context(), method, a)
		defer done()
		r = r.WithContext(ctx)
		r.Header = http.Header{"Content-Type": r.Header["Content-Type"]}
		r.Body = http.MaxBytesReader(w, r.Body, most)
		gateway.ServeHTTP(w, r)
	})
}

func noPath(w http.ResponseWriter, _ *http.Request) {
	writeStatus(w, http.StatusNotFound, refusal{Reason: attest.MethodUnknown, Message: "there is nothing at this path: /openapi.json says what there is"}.status())
}

func noMethod(w http.ResponseWriter, r *http.Request) {
	writeStatus(w, http.StatusMethodNotAllowed, refusal{Reason: attest.MethodUnknown, Message: "this path has no method " + printable(r.Method) + ": /openapi.json says what it has"}.status())
}

// knownQuery refuses query parameters that the method does not have: the gateway
// would drop them in silence.
func knownQuery(r *http.Request, known []string) error {
	for name, values := range r.URL.Query() {
		if !slices.Contains(known, name) {
			return attest.Errorf(attest.CallerFactsRefused, "there is no parameter %q here", name).With("field", name)
		}
		if len(values) > 1 {
			return attest.Errorf(attest.BadRequest, "parameter %q is given %d times", name, len(values)).With("field", name)
		}
	}
	return nil
}

// strictJSON reads one JSON value and nothing else: unknown and repeated fields,
// trailing data and invalid UTF-8 are errors (protojson sees to that), and
// nesting ends where the API's own messages end (attacks I07).
type strictJSON struct{ runtime.JSONPb }

// NewDecoder is the one way in which the gateway reads a body.
func (j *strictJSON) NewDecoder(r io.Reader) runtime.Decoder {
	return runtime.DecoderFunc(func(v any) error {
		body, err := io.ReadAll(r)
		var tooLarge *http.MaxBytesError
		switch {
		case errors.As(err, &tooLarge):
			return attest.Errorf(attest.TooLarge, "the request is larger than %d bytes", tooLarge.Limit)
		case err != nil:
			return attest.Errorf(attest.BadJSON, "the request ended early")
		}
		m, ok := v.(proto.Message)
		if !ok {
			return attest.Errorf(attest.BadJSON, "the request is not a message")
		}
		err = protojson.UnmarshalOptions{RecursionLimit: 32}.Unmarshal(body, m)
		switch {
		case err == nil:
			return nil
		case strings.Contains(err.Error(), "unknown field"):
			return attest.Errorf(attest.CallerFactsRefused, "%s: what is signed comes from the token and the registry", readable(err))
		}
		return attest.Errorf(attest.BadJSON, "%s", readable(err))
	})
}

// readable returns what protojson says without the no-break spaces that it puts
// into its errors at random.
func readable(err error) string { return strings.ReplaceAll(err.Error(), "\u00a0", " ") }

// gatewayError writes the status of a call. The gateway's own refusals (a body
// that is no JSON, a path that nobody serves) get their ErrorInfo here; the text
// of strictJSON begins with its reason.
func gatewayError(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, _ *http.Request, err error) {
	st := status.Convert(err)
	if len(st.Details()) > 0 {
		writeStatus(w, 0, st)
		return
	}
	r := gatewayRefusal(st)
	code := 0
	if r.Reason == attest.TooLarge {
		code = http.StatusRequestEntityTooLarge // trying again later would not help
	}
	writeStatus(w, code, r.status())
}

func gatewayRefusal(st *status.Status) refusal {
	switch st.Code() {
	case codes.InvalidArgument:
		for _, r := range []attest.Reason{attest.TooLarge, attest.BadJSON, attest.CallerFactsRefused} {
			if text, ok := strings.CutPrefix(st.Message(), string(r)+": "); ok {
				return refusal{Reason: r, Message: printable(text)}
			}
		}
		return refusal{Reason: attest.BadRequest, Message: printable(st.Message())}
	case codes.NotFound, codes.Unimplemented:
		return refusal{Reason: attest.MethodUnknown, Message: "there is nothing at this path: /openapi.json says what there is"}
	case codes.ResourceExhausted:
		return refusal{Reason: attest.TooLarge, Message: printable(st.Message())}
	case codes.Canceled:
		return refusal{Reason: attest.Cancelled, Message: "the call was cancelled"}
	case codes.DeadlineExceeded:
		return refusal{Reason: attest.DeadlineExceeded, Message: "the call took longer than it may; repeating it is safe"}
	case codes.Unavailable:
		return refusal{Reason: attest.ShuttingDown, Message: "the service is stopping; repeating the call is safe"}
	}
	return refuse(st.Err())
}

// writeStatus writes a google.rpc.Status as JSON, as the OpenAPI document says.
// An HTTP code of 0 is that of the status.
func writeStatus(w http.ResponseWriter, code int, st *status.Status) {
	body, err := protojson.Marshal(st.Proto())
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	if code == 0 {
		code = runtime.HTTPStatusFromCode(st.Code())
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	if code == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	if code == http.StatusServiceUnavailable || code == http.StatusTooManyRequests {
		h.Set("Retry-After", fmt.Sprint(int(retryAfter.Seconds())))
	}
	w.WriteHeader(code)
	w.Write(body) // a caller that went away cannot be told
}
