package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// peer is who the client talks to in the tests of its own rendering and exit
// codes: a gRPC server on loopback that answers what a script tells it to. What
// it signs is signed by the real signer, so that the client's verification is
// the real one. It decides nothing; the real server is tested with the client
// elsewhere, end to end.
type peer struct {
	notary *testkit.Notary
	url    string

	mu      sync.Mutex
	answers map[string][][]byte // by method: what to answer, in order; the last one stays
	calls   []string            // methods, with "+token" when one came along
	token   string              // the newest one that came along
	records map[string][]*hallmarkv1.ArtifactRecord
	attach  hallmarkv1.AttachState // that SignImages answers
	tamper  func([]byte) []byte    // of every bundle on its way out
	alter   func(*hallmarkv1.SignedImage)
	replace func([]byte) []byte // of every predicate before it is signed
	retype  string              // signs evidence as of this type
	rename  string              // signs evidence under this name
	// answerDigests are those that Attest says the statement is about.
	answerDigests []string
}

// startPeer serves on loopback until the test ends; with TLS when config is set.
func startPeer(t testing.TB, config *tls.Config) *peer {
	t.Helper()
	p := &peer{
		notary: testkit.NewNotary(t), answers: map[string][][]byte{},
		records: map[string][]*hallmarkv1.ArtifactRecord{}, attach: hallmarkv1.AttachState_ATTACH_STATE_ATTACHED,
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	options := []grpc.ServerOption{grpc.UnaryInterceptor(p.intercept), grpc.MaxRecvMsgSize(maxRequest)}
	p.url = "http://" + l.Addr().String()
	if config != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(config)))
		p.url = "https://" + l.Addr().String()
	}
	s := grpc.NewServer(options...)
	hallmarkv1.RegisterTrustServiceServer(s, trustPeer{p: p})
	hallmarkv1.RegisterSigningServiceServer(s, signingPeer{p: p, t: t})
	hallmarkv1.RegisterAuditServiceServer(s, auditPeer{p: p})
	hallmarkv1.RegisterPromotionServiceServer(s, hallmarkv1.UnimplementedPromotionServiceServer{})
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return p
}

// answer sets what a method answers, in order, the last one for ever: the
// response as protobuf JSON, or {"error": {"code", "reason", "message", "metadata"}}.
func (p *peer) answer(method string, raw ...[]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers[method] = raw
}

// called returns the calls since the last time it was asked.
func (p *peer) called() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := p.calls
	p.calls = nil
	return calls
}

// intercept notes the call and answers it from the script, if there is one.
func (p *peer) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	p.mu.Lock()
	call := method
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("authorization"); len(v) > 0 {
		call, p.token = call+"+token", strings.TrimPrefix(v[0], "Bearer ")
	}
	p.calls = append(p.calls, call)
	var raw []byte
	if queue := p.answers[method]; len(queue) > 0 {
		raw = queue[0]
		if len(queue) > 1 {
			p.answers[method] = queue[1:]
		}
	}
	p.mu.Unlock()
	if raw == nil {
		return next(ctx, req)
	}
	return scripted(info.FullMethod, raw)
}

func scripted(fullMethod string, raw []byte) (proto.Message, error) {
	var failure struct {
		Error *struct {
			Code     codes.Code
			Reason   string
			Domain   string
			Message  string
			Metadata map[string]string
		}
	}
	if err := json.Unmarshal(raw, &failure); err != nil {
		return nil, err
	}
	if e := failure.Error; e != nil {
		s := status.New(e.Code, e.Message)
		if e.Reason != "" {
			s, _ = s.WithDetails(&errdetails.ErrorInfo{Reason: e.Reason, Domain: orElse(e.Domain, "hallmark"), Metadata: e.Metadata})
		}
		return nil, s.Err()
	}
	name := strings.ReplaceAll(strings.TrimPrefix(fullMethod, "/"), "/", ".")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil, err
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(d.(protoreflect.MethodDescriptor).Output().FullName())
	if err != nil {
		return nil, err
	}
	m := kind.New().Interface()
	return m, protojson.Unmarshal(raw, m)
}

type trustPeer struct {
	hallmarkv1.UnimplementedTrustServiceServer
	p *peer
}

func (s trustPeer) GetTrustedRoot(context.Context, *hallmarkv1.GetTrustedRootRequest) (*hallmarkv1.GetTrustedRootResponse, error) {
	n := s.p.notary.Signer
	return &hallmarkv1.GetTrustedRootResponse{TrustedRoot: n.TrustedRoot(), Sha256: n.Fingerprint(), PublicUrl: testkit.Service}, nil
}

func (s trustPeer) GetGateKey(context.Context, *hallmarkv1.GetGateKeyRequest) (*hallmarkv1.GetGateKeyResponse, error) {
	return &hallmarkv1.GetGateKeyResponse{Pem: string(s.p.notary.Signer.GateKeyPEM())}, nil
}

// job is the CI job in whose name the peer signs.
var job = attest.Identity{
	IssuerName: "github", Provider: "github", Kind: attest.Workload,
	Issuer:  "https://token.actions.githubusercontent.com",
	Subject: "repo:acme/payments:ref:refs/heads/main",
	SAN:     "https://github.com/acme/payments/.github/workflows/release.yml@refs/heads/main",
	TokenID: strings.Repeat("a1", 32),
	Build: attest.Build{
		SourceURI: "https://github.com/acme/payments", Repository: "acme/payments", RepositoryID: "1296269",
		OwnerURI: "https://github.com/acme", OwnerID: "9919", Visibility: "private",
		Commit: "4be1d0c5b8f2a6f0c1d2e3f4a5b6c7d8e9f0a1b2", Ref: "refs/heads/main",
		WorkflowPath: ".github/workflows/release.yml", WorkflowName: "release",
		ConfigURI:    "https://github.com/acme/payments/.github/workflows/release.yml@refs/heads/main",
		ConfigDigest: "4be1d0c5b8f2a6f0c1d2e3f4a5b6c7d8e9f0a1b2",
		SignerURI:    "https://github.com/acme/payments/.github/workflows/release.yml@refs/heads/main",
		SignerDigest: "4be1d0c5b8f2a6f0c1d2e3f4a5b6c7d8e9f0a1b2",
		Event:        "push", RunURI: "https://github.com/acme/payments/actions/runs/9912/attempts/1",
		RunID: "9912", RunAttempt: "1", Runner: "github-hosted", Actor: "robin", ActorID: "583231",
	},
}

type signingPeer struct {
	hallmarkv1.UnimplementedSigningServiceServer
	p *peer
	t testing.TB
}

func (s signingPeer) SignImages(_ context.Context, req *hallmarkv1.SignImagesRequest) (*hallmarkv1.SignImagesResponse, error) {
	resp := &hallmarkv1.SignImagesResponse{}
	for _, in := range req.GetImages() {
		ref, err := attest.ParseImageRef(in.GetImage())
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		resp.Results = append(resp.Results, s.p.sign(s.t, ref, in, req))
	}
	return resp, nil
}

func (s signingPeer) Attest(_ context.Context, req *hallmarkv1.AttestRequest) (*hallmarkv1.AttestResponse, error) {
	ref, err := attest.ParseImageRef(req.GetImage())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	rec, raw := s.p.attestation(s.t, ref, req.GetPredicateType(), req.GetName(), req.GetPredicate())
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	digests := []string{ref.Digest.String()}
	if s.p.answerDigests != nil {
		digests = s.p.answerDigests
	}
	return &hallmarkv1.AttestResponse{Record: rec, Bundle: raw, AttachState: s.p.attach, Digests: digests}, nil
}

// attestation signs and logs other evidence as the service does.
func (p *peer) attestation(t testing.TB, ref attest.ImageRef, predicateType, name string, predicate []byte) (*hallmarkv1.Record, []byte) {
	p.mu.Lock()
	if p.replace != nil {
		predicate = p.replace(predicate)
	}
	predicateType, name = orElse(p.retype, predicateType), orElse(p.rename, name)
	p.mu.Unlock()
	statement, err := attest.EvidenceStatement(attest.EvidenceInput{
		Image: attest.Image{Ref: ref}, PredicateType: predicateType, Predicate: predicate, Name: name, Signer: job,
		Request: attest.EvidenceKey(ref, job, predicateType, name, predicate),
	})
	if err != nil {
		t.Fatal(err)
	}
	return p.record(t, ref, statement, &job)
}

// sign signs and logs as the service does.
func (p *peer) sign(t testing.TB, ref attest.ImageRef, in *hallmarkv1.SignImage, req *hallmarkv1.SignImagesRequest) *hallmarkv1.SignedImage {
	hint := in.GetBase()
	img := attest.Image{Ref: ref, Base: attest.Base{Result: attest.Unclaimed}}
	out := &hallmarkv1.SignedImage{Image: ref.String(), Digests: []string{ref.Digest.String()}, Base: &hallmarkv1.BaseImage{Result: string(attest.Unclaimed)}}
	if hint != "" {
		base := attest.Hash([]byte("base"))
		img.Base = attest.Base{
			Result: attest.ProvenLayers, Repository: "registry.example.com/base/static", Tag: "12", Digest: base,
			Platforms: []attest.BasePart{{Image: ref.Digest, Base: base, Layers: 3}},
		}
		out.Base = &hallmarkv1.BaseImage{Result: string(attest.ProvenLayers), Repository: string(img.Base.Repository), Tag: "12", Digest: base.String(), Layers: 3}
	}
	statement, err := attest.SignatureStatement(img, attest.SignKey(ref, job, hint, nil))
	if err != nil {
		t.Fatal(err)
	}
	out.Signature, out.SignatureBundle = p.record(t, ref, statement, &job)
	provenance, err := attest.ProvenanceStatement(attest.ProvenanceInput{
		Service: testkit.Service, Image: img, Builder: job, BaseHint: hint, Facts: in.GetFacts(),
		Request: attest.SignKey(ref, job, hint, in.GetFacts()), Finished: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	out.Provenance, out.ProvenanceBundle = p.record(t, ref, provenance, &job)
	for _, e := range req.GetEvidence() {
		if len(e.GetImages()) > 0 && !slices.Contains(e.GetImages(), ref.String()) {
			continue
		}
		rec, raw := p.attestation(t, ref, e.GetPredicateType(), e.GetName(), e.GetPredicate())
		signed := &hallmarkv1.SignedEvidence{PredicateType: e.GetPredicateType(), Name: e.GetName(), Record: rec, AttachState: p.attach}
		if p.attach == hallmarkv1.AttachState_ATTACH_STATE_CLIENT {
			signed.Bundle = raw
		}
		out.Evidence = append(out.Evidence, signed)
	}
	b := job.Build
	out.Source, out.Ref, out.Commit, out.Run = b.SourceURI, b.Ref, b.Commit, b.RunURI
	out.Builder = attest.BuilderID(testkit.Service, job)
	p.mu.Lock()
	defer p.mu.Unlock()
	out.AttachState = p.attach
	if p.alter != nil {
		p.alter(out)
	}
	return out
}

// record signs and logs a statement, by the gate's key unless by names another,
// and keeps it for GetArtifact.
func (p *peer) record(t testing.TB, ref attest.ImageRef, statement []byte, by *attest.Identity) (*hallmarkv1.Record, []byte) {
	sign := func() (attest.Envelope, error) { return p.notary.Signer.SignGate(statement) }
	if by != nil {
		c, err := p.notary.Signer.Credential(*by)
		if err != nil {
			t.Fatal(err)
		}
		sign = func() (attest.Envelope, error) { return p.notary.Signer.Sign(c, statement) }
	}
	e, err := sign()
	if err != nil {
		t.Fatal(err)
	}
	rec := p.notary.Record(t, e)
	raw, err := rec.Bundle(p.notary.Signer.LogID())
	if err != nil {
		t.Fatal(err)
	}
	out := &hallmarkv1.Record{Id: rec.ID.String(), Index: int64(rec.Index), Kind: string(rec.Kind), Time: timestamppb.New(rec.Time)}
	for _, f := range rec.Facets {
		out.Facets = append(out.Facets, &hallmarkv1.Facet{Name: f.Name, Value: f.Value})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tamper != nil {
		raw = p.tamper(raw)
	}
	p.records[ref.String()] = append(p.records[ref.String()], &hallmarkv1.ArtifactRecord{Record: out, Statement: statement, Bundle: raw})
	return out, raw
}

type auditPeer struct {
	hallmarkv1.UnimplementedAuditServiceServer
	p *peer
}

func (s auditPeer) GetArtifact(_ context.Context, req *hallmarkv1.GetArtifactRequest) (*hallmarkv1.GetArtifactResponse, error) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	return &hallmarkv1.GetArtifactResponse{Records: slices.Clone(s.p.records[req.GetImage()])}, nil
}

// jwt returns a token in form; nobody verifies it here.
func jwt(audience string) string {
	part := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	return part(`{"alg":"RS256"}`) + "." + part(`{"aud":`+fmt.Sprintf("%q", audience)+`}`) + "." + part("signature")
}

// gitHubTokens plays the endpoint from which GitHub Actions hands tokens to a
// job: its URL already has a query, to which the audience is added.
func gitHubTokens(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "bearer request-token" {
			http.Error(w, `{}`, http.StatusUnauthorized)
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"value": jwt(r.URL.Query().Get("audience"))})
	}))
	t.Cleanup(s.Close)
	return s.URL + "/?api-version=1"
}

// authority returns a server's TLS configuration for 127.0.0.1 and the PEM of
// the authority that certified it.
func authority(t testing.TB) (*tls.Config, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func pemOf(certificate []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
}
