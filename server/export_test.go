package server

import (
	"context"

	"google.golang.org/grpc/metadata"

	"github.com/hallmarkd/hallmark/attest"
)

// Printable is printable, for its fuzz test.
var Printable = printable

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
