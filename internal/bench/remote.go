package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/server"
)

// overGRPC measures the same decisions through the server with TLS, a token
// verified on every call.
func (b *bench) overGRPC(in *instance) error {
	ctx, stop := context.WithCancel(b.ctx)
	defer stop()
	tokens, err := dev.StartIssuer(ctx, dev.IssuerConfig{})
	if err != nil {
		return err
	}
	defer tokens.Close()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	auth, err := identity.New(identity.Config{Audience: service, Logger: quiet, Issuers: []identity.Issuer{{
		Name: "ci", Provider: "github", Issuer: tokens.URL(), Owners: []string{"2"}, ServerURL: "https://github.com", PlainHTTP: true,
	}}})
	if err != nil {
		return err
	}
	claims := dev.GitHubClaims("acme/app", job(1).Build.Commit, "refs/heads/main")
	claims["aud"], claims["repository_id"], claims["repository_owner_id"] = service, "1", "2"
	token, err := tokens.Mint(claims)
	if err != nil {
		return err
	}
	certFile, keyFile, pool, err := certificate(in.dir)
	if err != nil {
		return err
	}
	srv, err := server.New(server.Config{
		Gate: in.gate, Auth: auth, Pages: http.NotFoundHandler(), CertFile: certFile, KeyFile: keyFile, Logger: quiet,
		MaxInFlightPerCaller: b.callers, // one identity makes all the load here
	})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, ln) }()
	err = b.callOver(ctx, ln.Addr().String(), pool, token)
	stop()
	if e := <-served; err == nil && !errors.Is(e, http.ErrServerClosed) {
		err = e
	}
	return err
}

func (b *bench) callOver(ctx context.Context, addr string, pool *x509.CertPool, token string) error {
	var clients []hallmarkv1.PromotionServiceClient
	for range 4 { // connections
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool})))
		if err != nil {
			return err
		}
		defer conn.Close()
		clients = append(clients, hallmarkv1.NewPromotionServiceClient(conn))
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	ask := func(caller, i int) error {
		resp, err := clients[caller%len(clients)].Promote(ctx, &hallmarkv1.PromoteRequest{
			Image: digestOf(int64(1 + i%100)).String(), ToStage: "test", DryRun: true,
		})
		if err == nil && !resp.GetDecision().GetAllowed() {
			err = fmt.Errorf("denied: %v", resp.GetDecision().GetResults())
		}
		return err
	}
	perSecond, _, err := b.rate(32, ask)
	if err != nil {
		return err
	}
	b.add(row{Name: "decisions over gRPC with TLS, callers on the same cores", Value: perSecond, Unit: "/s", Reach: ">= 8000"})
	_, lat, err := b.rate(2, ask)
	if err != nil {
		return err
	}
	b.add(row{Name: "  p99 with two callers", Value: percentile(lat, 0.99), Unit: "ms", Reach: "<= 5"})
	return nil
}

// certificate writes a certificate for 127.0.0.1 and its key.
func certificate(dir string) (certFile, keyFile string, pool *x509.CertPool, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}, &x509.Certificate{Subject: pkix.Name{CommonName: "bench"}}, key.Public(), key)
	if err != nil {
		return "", "", nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", nil, err
	}
	certFile, keyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return certFile, keyFile, pool, errors.Join(
		os.WriteFile(certFile, certPEM, 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
}

// client measures the size of the command line client.
func (b *bench) client() error {
	dir, err := os.MkdirTemp("", "hallmark-bench-bin-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "hallmark")
	cmd := exec.CommandContext(b.ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "./cmd/hallmark")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the client: %w\n%s", err, text)
	}
	info, err := os.Stat(out)
	if err != nil {
		return err
	}
	b.add(row{Name: "client, stripped", Value: float64(info.Size()) / 1e6, Unit: "MB", Reach: "<= 25"})
	return nil
}
