package server

import (
	"encoding/binary"
	"errors"
	"io"
)

// Whoever needs no identity says little: what a message may have, and how many one
// stream may bring.
const (
	maxOpenMessage    = 64 << 10
	maxStreamMessages = 32
)

// messages is the body of a gRPC request, of which no more goes on than was counted.
// grpc-go reads ahead of what it is asked for, and keeps a whole buffer for every read,
// however little it brought. So a read here waits until its buffer is full or its
// message at an end: what is kept is what was sent (attacks I03, I08).
type messages struct {
	io.Closer
	body io.Reader
	most int64 // bytes that a message may have
	left int   // messages that may still begin
	rest int64 // bytes of this message that are still to come
	err  error // of all reads from now on
}

// Read fills p, which has room for a prefix, or as much of it as ends the message.
func (m *messages) Read(p []byte) (n int, err error) {
	if m.err != nil {
		return 0, m.err
	}
	if m.rest > 0 {
		n, err = m.fill(p)
	} else {
		n, err = m.begin(p)
	}
	m.err = err
	return n, err
}

// fill goes on with a message.
func (m *messages) fill(p []byte) (int, error) {
	n, err := io.ReadFull(m.body, p[:min(int64(len(p)), m.rest)])
	if m.rest -= int64(n); err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// begin reads the prefix of the next message, and the end after the last. Of one that
// is too large only the prefix goes on, for gRPC to refuse.
func (m *messages) begin(p []byte) (int, error) {
	if m.left == 0 {
		if n, err := io.ReadFull(m.body, make([]byte, 1)); n == 0 {
			return 0, err
		}
		return 0, errors.New("the request has more messages than it may have")
	}
	if len(p) < prefix {
		return 0, io.ErrShortBuffer
	}
	m.left--
	n, err := io.ReadFull(m.body, p[:prefix])
	if err != nil {
		return n, err
	}
	m.rest = int64(binary.BigEndian.Uint32(p[1:prefix]))
	if m.rest > m.most {
		// It may be less than what the gRPC server takes of others.
		binary.BigEndian.PutUint32(p[1:prefix], 1<<32-1)
		return n, io.ErrUnexpectedEOF
	}
	return n, nil
}
