package server

import (
	"context"
	"io"

	"google.golang.org/grpc/metadata"

	"github.com/hallmarkd/hallmark/attest"
)

// Printable is printable, for its fuzz test.
var Printable = printable

// Messages is the body that a gRPC request goes on with: count messages of at most
// most bytes each.
func Messages(body io.Reader, most int64, count int) io.Reader {
	return &messages{Closer: io.NopCloser(body), body: body, most: most, left: count}
}

// HandedOver hands an identity over to a method as the REST side does, and returns
// whom the interceptor of another method, or of the same, then finds. After the call
// has ended the handle is tried once more: late is what it finds.
func (s *Server) HandedOver(ctx context.Context, id attest.Identity, to, by string) (found attest.Identity, err, late error) {
	ctx, done := s.handOver(ctx, to, admission{identity: id})
	ctx = metadata.NewIncomingContext(ctx, handleOf(ctx, nil))
	a := s.admitRPC(ctx, by)
	done()
	return a.identity, a.err, s.admitRPC(ctx, by).err
}
