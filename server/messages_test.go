package server_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/server"
)

// framed returns gRPC messages of the given sizes.
func framed(sizes ...int) []byte {
	var b []byte
	for i, n := range sizes {
		b = binary.BigEndian.AppendUint32(append(b, 0), uint32(n))
		b = append(b, bytes.Repeat([]byte{byte(i + 1)}, n)...)
	}
	return b
}

// I03, I08: however small the pieces in which a body comes, what reads ahead of the
// handlers is given few of them, and no more messages than a request may have.
func TestI03Messages(t *testing.T) {
	const buffer = 16 << 10 // of grpc-go, one for each read
	for _, row := range []struct {
		name  string
		body  []byte
		count int
		want  []byte
		reads int // that bring something
		err   string
	}{
		{"nothing", nil, 1, nil, 0, ""},
		{"an empty message", framed(0), 1, framed(0), 1, ""},
		{"I08 dripped", framed(60 << 10), 1, framed(60 << 10), 5, ""},
		{"I03 several", framed(1, 0, 2), 3, framed(1, 0, 2), 5, ""},
		{"I03 another message", framed(3, 3), 1, framed(3), 2, "more messages"},
		{"I03 more than a stream may have", framed(make([]int, 33)...), 32, framed(make([]int, 32)...), 32, "more messages"},
		{"I03 too large", framed(64<<10 + 1), 1, []byte{0, 255, 255, 255, 255}, 1, "unexpected EOF"},
		{"cut off in a message", framed(9)[:8], 1, framed(9)[:8], 2, "unexpected EOF"},
		{"cut off in a prefix", framed(9)[:3], 1, framed(9)[:3], 1, "unexpected EOF"},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := server.Messages(iotest.OneByteReader(bytes.NewReader(row.body)), 64<<10, row.count)
			var got []byte
			reads := 0
			for {
				p := make([]byte, buffer)
				n, err := m.Read(p)
				if n > 0 {
					reads++
				}
				got = append(got, p[:n]...)
				if err == nil {
					continue
				}
				if row.err == "" && err != io.EOF || !strings.Contains(err.Error(), row.err) {
					t.Errorf("it ends with %v, want %q", err, row.err)
				}
				if _, again := m.Read(p); again != err {
					t.Errorf("and then with %v", again)
				}
				break
			}
			if !bytes.Equal(got, row.want) || reads != row.reads {
				t.Errorf("%d bytes in %d reads, want %d in %d", len(got), reads, len(row.want), row.reads)
			}
		})
	}
}

// I03: of strangers the server takes small messages only.
func TestI03OpenMessages(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	for _, method := range []string{checkpointMethod, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"} {
		if got := codes.Code(<-stall(t, s, method, "x", 64<<10+1).status); got != codes.ResourceExhausted {
			t.Errorf("%s: a message of more than 64 KiB: %v", method, got)
		}
	}
}

// I08: health checks, with bodies that never come and answers that are never taken,
// keep out nobody.
func TestI08HealthChecks(t *testing.T) {
	const most = 8
	s := testkit.NewStack(t, testkit.Options{Server: func(c *server.Config) { c.MaxInFlight = most }})
	stuck := dialFrames(t, s.Addr)
	if err := stuck.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}); err != nil {
		t.Fatal(err)
	}
	silent := dialFrames(t, s.Addr)
	for _, c := range []*frames{stuck, silent} {
		for i := range uint32(2 * most) {
			if err := c.request(2*i+1, "/grpc.health.v1.Health/Check", true); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 * most { // each has its answer's header: one, or that there are too many
			for {
				f := c.next()
				if f == nil {
					t.Fatal("the connection ended")
				}
				if h, is := f.(*http2.MetaHeadersFrame); is && len(h.PseudoFields()) > 0 {
					break
				}
			}
		}
	}
	if a := do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", auth(s.Token(nil))...); a.code != http.StatusOK {
		t.Errorf("a caller with a good token gets HTTP %d", a.code)
	}
	if a := do(t, s.HTTP(), "GET", s.URL+"/v1/trust/root", ""); a.code != http.StatusOK {
		t.Errorf("a caller without one gets HTTP %d", a.code)
	}
}

// I08, I11: a call counts against its identity's bound before its body is read,
// over both protocols, and whatever environment or branch its jobs name.
func TestI11SlowBodies(t *testing.T) {
	const most = 2
	options := testkit.Options{Server: func(c *server.Config) { c.MaxInFlight, c.MaxInFlightPerCaller = 4*most, most }}
	another := map[string]any{"sub": "repo:acme/api:environment:x-1", "environment": "x-1"}
	refused := func(t *testing.T, s *testkit.Stack) {
		t.Helper()
		for _, token := range []string{s.Token(nil), s.Token(another), s.Token(map[string]any{"repository_id": "4711", "repository": "acme/other"})} {
			_, err := pb.NewTrustServiceClient(s.Dial(token)).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
			wantReason(t, err, codes.ResourceExhausted, attest.RateLimited)
			do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", auth(token)...).want(t, http.StatusTooManyRequests, attest.RateLimited)
		}
		if _, err := pb.NewTrustServiceClient(s.Dial(s.PersonToken("p"))).WhoAmI(t.Context(), &pb.WhoAmIRequest{}); err != nil {
			t.Errorf("another caller: %v", err)
		}
	}
	t.Run("I11 gRPC", func(t *testing.T) {
		s := testkit.NewStack(t, options)
		var held []*stalled
		for range 4 * most {
			held = append(held, stall(t, s, attestMethod, s.Token(another), 1000))
		}
		answers := make(chan int, len(held))
		for _, h := range held {
			go func() { answers <- <-h.status }()
		}
		for range 3 * most { // all that are too many are answered
			if code := codes.Code(<-answers); code != codes.ResourceExhausted {
				t.Errorf("a call too many: %v", code)
			}
		}
		refused(t, s)
		for _, h := range held {
			h.cancel()
		}
		for ended := false; !ended; { // they are given back
			_, err := pb.NewTrustServiceClient(s.Dial(s.Token(nil))).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
			if ended = err == nil; !ended && reasonOf(status.Convert(err)) != attest.RateLimited {
				t.Fatal(err)
			}
		}
	})
	t.Run("I11 REST", func(t *testing.T) {
		s := testkit.NewStack(t, options)
		for n := range 4 * most {
			conn, err := net.Dial("tcp", s.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "POST /v1/images:sign HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n", s.Addr, s.Token(another))
			var head [12]byte
			if _, err := io.ReadFull(conn, head[:]); err != nil {
				t.Fatal(err)
			}
			want := "HTTP/1.1 100"
			if n >= most {
				want = "HTTP/1.1 429"
			}
			if string(head[:]) != want {
				t.Errorf("call %d: %s, want %s", n, head, want)
			}
		}
		refused(t, s)
	})
}

// I03: a connection holds its client's certificates, so that they are small. One
// that nobody trusts is refused later, with a reason.
func TestI03ClientCertificates(t *testing.T) {
	s, _ := meshed(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := func(names int) []byte {
		template := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour)}
		for range names {
			template.DNSNames = append(template.DNSNames, "name.example.com")
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	small := leaf(1)
	for _, row := range []struct {
		name  string
		chain [][]byte
		taken bool
	}{
		{"four", [][]byte{small, small, small, small}, true},
		{"I03 five", [][]byte{small, small, small, small, small}, false},
		{"large", [][]byte{leaf(1500)}, true},
		{"I03 larger", [][]byte{leaf(2000)}, false},
		{"I03 large together", [][]byte{leaf(1000), leaf(1000)}, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			conf := s.ClientTLS()
			conf.MaxVersion = tls.VersionTLS12 // whose client learns of a refusal in the handshake
			conf.Certificates = []tls.Certificate{{Certificate: row.chain, PrivateKey: key}}
			conn, err := tls.Dial("tcp", s.Addr, conf)
			if err == nil {
				conn.Close()
			}
			if row.taken && err != nil || !row.taken && (err == nil || !strings.Contains(err.Error(), "bad certificate")) {
				t.Errorf("%v", err)
			}
		})
	}
}
