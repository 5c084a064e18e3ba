package server_test

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/server"
)

const builder = "spiffe://prod.example.org/ci/image-builder"

// meshed is a stack that takes X.509-SVIDs of a trust domain, whose image-builder
// may sign.
func meshed(t *testing.T) (*testkit.Stack, *testkit.TrustDomain) {
	t.Helper()
	d := testkit.NewTrustDomain(t, "prod.example.org")
	return testkit.NewStack(t, testkit.Options{
		TLS:   true,
		Issue: func(all *[]identity.Issuer) { *all = append(*all, d.Issuer()) },
		Policy: strings.Replace(testkit.DefaultPolicy("REGISTRY"), "  signers:\n",
			"  signers:\n  - {issuer: mesh, images: [\"REGISTRY/acme/*\"], when: \"id.subject == '"+builder+"'\"}\n", 1),
	}), d
}

// dialSVID connects with a client certificate, and with a token unless that is "".
func dialSVID(s *testkit.Stack, svid tls.Certificate, token string) *grpc.ClientConn {
	conf := s.ClientTLS()
	conf.Certificates = []tls.Certificate{svid}
	return s.Dial(token, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
}

func httpSVID(t *testing.T, s *testkit.Stack, svid tls.Certificate) *http.Client {
	t.Helper()
	c := s.HTTP()
	c.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{svid}
	return c
}

// A workload signs with its X.509-SVID, over gRPC and over REST. The certificate
// names it, and no commit.
func TestX509SVIDSigns(t *testing.T) {
	s, d := meshed(t)
	svid := d.SVID("/ci/image-builder")
	img := s.PushApp("acme/api")
	resp, err := pb.NewSigningServiceClient(dialSVID(s, svid, "")).SignImages(t.Context(), &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: img.String()}}})
	if err != nil {
		t.Fatal(err)
	}
	signed := resp.GetResults()[0]
	if signed.GetRefusal() != nil || signed.GetCommit() != "" || signed.GetSource() != "" {
		t.Fatalf("signed: %v", signed)
	}
	for _, bundle := range [][]byte{signed.GetSignatureBundle(), signed.GetProvenanceBundle()} {
		ev, err := s.Verifier.Bundle(bundle, img.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if got := ev.Signer(); got.SAN != builder || got.Issuer != "spiffe://prod.example.org" || got.Build.HasSource() {
			t.Errorf("signed by %+v", got)
		}
	}
	c := httpSVID(t, s, svid)
	if a := do(t, c, "GET", s.URL+"/v1/whoami", ""); a.code != http.StatusOK || !strings.Contains(string(a.body), builder) {
		t.Errorf("whoami: HTTP %d %s", a.code, a.body)
	}
	second := s.PushApp("acme/web")
	if a := do(t, c, "POST", s.URL+"/v1/images:sign", `{"images":[{"image":"`+second.String()+`"}]}`); a.code != http.StatusOK || strings.Contains(string(a.body), `"reason"`) && !strings.Contains(string(a.body), second.Digest.String()) {
		t.Errorf("sign: HTTP %d %.300s", a.code, a.body)
	}
	// An identity without a role is one without a role.
	other := dialSVID(s, d.SVID("/ci/other"), "")
	_, err = pb.NewAuditServiceClient(other).ListRecords(t.Context(), &pb.ListRecordsRequest{})
	wantReason(t, err, codes.PermissionDenied, attest.RoleMissing)
	do(t, httpSVID(t, s, d.SVID("/ci/other")), "GET", s.URL+"/log/tile/entries/000.p/1", "").want(t, http.StatusForbidden, attest.RoleMissing)
	// Whoever shows no certificate has a token, as before.
	if _, err := pb.NewTrustServiceClient(s.Dial(s.Token(nil))).WhoAmI(t.Context(), &pb.WhoAmIRequest{}); err != nil {
		t.Errorf("with a token: %v", err)
	}
	_, err = pb.NewTrustServiceClient(s.Dial("")).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	wantReason(t, err, codes.Unauthenticated, attest.TokenMissing)
}

// A24: a certificate that is not good is refused as such, on every call that needs
// an identity, and never taken for no certificate.
func TestA24ClientCertificates(t *testing.T) {
	s, d := meshed(t)
	before := s.Ledger.Size()
	for name, row := range map[string]struct {
		svid tls.Certificate
		want attest.Reason
	}{
		"A24 authority of the same name": {testkit.NewTrustDomain(t, "prod.example.org").SVID("/ci/image-builder"), attest.ClientCert},
		"A24 other trust domain":         {testkit.NewTrustDomain(t, "evil.example.org").SVID("/ci/image-builder"), attest.IssuerNotAllowed},
		"A24 whole trust domain":         {d.SVID(""), attest.ClientCert},
		"A24 no SVID":                    {serverCertificate(t), attest.ClientCert},
	} {
		t.Run(name, func(t *testing.T) {
			conn, c := dialSVID(s, row.svid, ""), httpSVID(t, s, row.svid)
			_, err := pb.NewSigningServiceClient(conn).SignImages(t.Context(), &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: someImage}}})
			wantReason(t, err, codes.Unauthenticated, row.want)
			do(t, c, "GET", s.URL+"/v1/whoami", "").want(t, http.StatusUnauthorized, row.want)
			do(t, c, "GET", s.URL+"/log/checkpoint", "").want(t, http.StatusUnauthorized, row.want)
			// What is for everybody is for them as well.
			if _, err := pb.NewTrustServiceClient(conn).GetTrustedRoot(t.Context(), &pb.GetTrustedRootRequest{}); err != nil {
				t.Errorf("the trust root: %v", err)
			}
		})
	}
	if s.Ledger.Size() != before {
		t.Error("something was recorded")
	}
}

// serverCertificate returns the certificate of some TLS server.
func serverCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	cert, key := t.TempDir()+"/tls.crt", t.TempDir()+"/tls.key"
	testkit.WriteCertificate(t, cert, key)
	c, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A24: a connection lives on when its certificate counts no more; its calls do not.
func TestA24LongConnection(t *testing.T) {
	s, d := meshed(t)
	svid := d.SVID("/ci/image-builder")
	conn, c := dialSVID(s, svid, ""), httpSVID(t, s, svid)
	client := pb.NewTrustServiceClient(conn)
	if _, err := client.WhoAmI(t.Context(), &pb.WhoAmIRequest{}); err != nil {
		t.Fatal(err)
	}
	if a := do(t, c, "GET", s.URL+"/v1/whoami", ""); a.code != http.StatusOK {
		t.Fatalf("HTTP %d %s", a.code, a.body)
	}
	d.Renew()
	_, err := client.WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	wantReason(t, err, codes.Unauthenticated, attest.ClientCert)
	do(t, c, "GET", s.URL+"/v1/whoami", "").want(t, http.StatusUnauthorized, attest.ClientCert)
}

// A24: no session is resumed, which would skip the proof of the key. A server
// that takes no certificates does not ask for one.
func TestA24Sessions(t *testing.T) {
	s, d := meshed(t)
	svid := d.SVID("/ci/image-builder")
	asked := 0
	connect := func(s *testkit.Stack, version uint16, cache tls.ClientSessionCache) tls.ConnectionState {
		t.Helper()
		conf := s.ClientTLS()
		conf.NextProtos, conf.MaxVersion, conf.ClientSessionCache = []string{"http/1.1"}, version, cache
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { asked++; return &svid, nil }
		conn, err := tls.Dial("tcp", s.Addr, conf)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// A ticket of TLS 1.3 comes after the handshake: read an answer.
		if _, err := io.WriteString(conn, "GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatal(err)
		}
		return conn.ConnectionState()
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cache := tls.NewLRUClientSessionCache(1)
		for range 2 {
			if connect(s, version, cache).DidResume {
				t.Errorf("A24: a session of %s was resumed", tls.VersionName(version))
			}
		}
	}
	if asked != 4 {
		t.Errorf("of 4 connections %d were asked for a certificate", asked)
	}
	plain := testkit.NewStack(t, testkit.Options{TLS: true})
	asked = 0
	connect(plain, tls.VersionTLS13, nil)
	_, err := pb.NewTrustServiceClient(dialSVID(plain, svid, "")).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	wantReason(t, err, codes.Unauthenticated, attest.TokenMissing)
	if asked != 0 {
		t.Error("a server that takes no certificates asks for one")
	}
}

// A25: a certificate beside a token or a page session is a second identity.
func TestA25CertificateAndToken(t *testing.T) {
	s, d := meshed(t)
	svid, before := d.SVID("/ci/image-builder"), s.Ledger.Size()
	bad := testkit.NewTrustDomain(t, "prod.example.org").SVID("/ci/image-builder")
	token := "Bearer " + s.Token(nil)
	for name, row := range map[string]struct {
		svid   tls.Certificate
		header []string
	}{
		"A25 certificate and token":     {svid, []string{"authorization", token}},
		"A25 certificate and bad token": {svid, []string{"authorization", "Bearer x"}},
		"A25 bad certificate and token": {bad, []string{"authorization", token}},
		"A25 certificate and session":   {svid, []string{"cookie", "__Host-hallmark-session=x"}},
		"A25 certificate and no scheme": {svid, []string{"authorization", ""}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := metadata.AppendToOutgoingContext(t.Context(), row.header...)
			_, err := pb.NewSigningServiceClient(dialSVID(s, row.svid, "")).SignImages(ctx, &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: someImage}}})
			wantReason(t, err, codes.Unauthenticated, attest.TwoIdentities)
			c := httpSVID(t, s, row.svid)
			do(t, c, "GET", s.URL+"/v1/whoami", "", row.header...).want(t, http.StatusUnauthorized, attest.TwoIdentities)
			do(t, c, "GET", s.URL+"/log/checkpoint", "", row.header...).want(t, http.StatusUnauthorized, attest.TwoIdentities)
		})
	}
	if s.Ledger.Size() != before {
		t.Error("something was recorded")
	}
}

// forged are headers in which proxies and frameworks name identities, and the one
// by which this server hands a REST caller over to itself.
func forged(d *testkit.TrustDomain) []string {
	return []string{
		"x-forwarded-client-cert", "By=spiffe://prod.example.org/x;Hash=00;URI=" + builder, "x-forwarded-user", "admin", "x-forwarded-email", "a@example.com",
		"x-remote-user", "admin", "x-remote-group", "system:masters", "x-auth-request-user", "admin", "forwarded", "for=127.0.0.1;by=" + builder,
		"x-forwarded-for", "127.0.0.1", "x-real-ip", "127.0.0.1", "x-ssl-client-cert", "MII", "ssl-client-verify", "SUCCESS", "x-client-dn", "CN=admin",
		"x-spiffe-id", builder, "client-cert", ":MII=:", "hallmark-admission", "", "grpc-metadata-hallmark-admission", "x", "x-goog-iap-jwt-assertion", "a.b.c",
	}
}

// A29: no header but the authorization says who calls, from wherever it comes.
func TestA29ForwardedIdentities(t *testing.T) {
	over, d := meshed(t)
	proxied := testkit.NewStack(t, testkit.Options{Server: func(c *server.Config) {
		c.BehindProxy = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	}})
	for name, s := range map[string]*testkit.Stack{"A29 over TLS": over, "A29 behind a proxy": proxied} {
		t.Run(name, func(t *testing.T) {
			headers, token := forged(d), s.Token(nil)
			ctx := metadata.AppendToOutgoingContext(t.Context(), headers...)
			_, err := pb.NewTrustServiceClient(s.Dial("")).WhoAmI(ctx, &pb.WhoAmIRequest{})
			wantReason(t, err, codes.Unauthenticated, attest.TokenMissing)
			do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", headers...).want(t, http.StatusUnauthorized, attest.TokenMissing)
			do(t, s.HTTP(), "GET", s.URL+"/log/tile/entries/000.p/1", "", headers...).want(t, http.StatusUnauthorized, attest.TokenMissing)

			// Nor do they change who a token names.
			want, err := pb.NewTrustServiceClient(s.Dial(token)).WhoAmI(t.Context(), &pb.WhoAmIRequest{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := pb.NewTrustServiceClient(s.Dial(token)).WhoAmI(ctx, &pb.WhoAmIRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != want.String() {
				t.Errorf("A29: %v, without the headers %v", got, want)
			}
			a := do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", append(headers, auth(token)...)...)
			if b := do(t, s.HTTP(), "GET", s.URL+"/v1/whoami", "", auth(token)...); a.code != http.StatusOK || string(a.body) != string(b.body) {
				t.Errorf("A29: HTTP %d %s, without the headers %s", a.code, a.body, b.body)
			}
		})
	}
}
