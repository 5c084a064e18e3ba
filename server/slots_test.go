package server_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/server"
)

// I08, I11: clients without any credentials that send slowly leave the service to
// those who have some.
func TestI11AnonymousSlowClients(t *testing.T) {
	const most = 8
	s := testkit.NewStack(t, testkit.Options{Server: func(c *server.Config) { c.MaxInFlight = most }})
	for range 2 * most {
		conn, err := net.Dial("tcp", s.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// The handler runs from here on; the body never comes.
		fmt.Fprintf(conn, "POST /signin HTTP/1.1\r\nHost: %s\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n", s.Addr)
		// "100 Continue" says that its handler reads, any other answer that it was refused.
		var head [12]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			t.Fatal(err)
		}
	}
	a := do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", auth(s.Token(nil))...)
	if a.code != http.StatusOK {
		t.Errorf("a caller with a good token gets %d while %d anonymous requests hang", a.code, 2*most)
	}
}
