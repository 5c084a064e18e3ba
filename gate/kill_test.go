package gate_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/ledger"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
)

// The real server is killed without warning, again and again, while many callers
// sign and some promote. What they were told must be true ever after.
const (
	killRounds  = 50
	killSigners = 20
	killMovers  = 3
	killImages  = 16
	// killVerified is how many requests of a round have their bundles verified
	// once more. All of them are compared with what the server has.
	killVerified = 6
	mostLoad     = 800 * time.Millisecond // of one round
)

// server is hallmarkd as an operator runs it: a program, a configuration file and
// a data directory.
type server struct {
	t       *testing.T
	program string
	config  string
	dir     string
	addr    string
	cmd     *exec.Cmd
	output  bytes.Buffer
}

func (s *server) url() string { return "http://" + s.addr }

// build makes the server's program as it is released, without the race detector.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "hallmarkd")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-race=false", "-o", program, "./cmd/hallmarkd")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building hallmarkd: %v\n%s", err, out)
	}
	return program
}

// run runs a command of the program to its end.
func (s *server) run(args ...string) (string, error) {
	out, err := exec.CommandContext(s.t.Context(), s.program, args...).CombinedOutput()
	return string(out), err
}

// start starts the server. Its port is there when it has opened its data.
func (s *server) start() {
	s.t.Helper()
	s.output.Reset()
	s.cmd = exec.Command(s.program, "serve", "--config", s.config)
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "the server listens", func() bool {
		c, err := net.DialTimeout("tcp", s.addr, time.Second)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
}

// end sends a signal to the server that start started, and waits for its end.
func (s *server) end(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatalf("the server has ended by itself: %v\n%s", err, s.output.String())
	}
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if sig == syscall.SIGKILL && errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == sig {
		return
	}
	if err != nil {
		s.t.Fatalf("the server ended with %v\n%s", err, s.output.String())
	}
}

// fsck checks the data of a server that does not run.
func (s *server) fsck() {
	s.t.Helper()
	out, err := s.run("fsck", "--config", s.config)
	if err != nil || !strings.Contains(out, " 0 problems") {
		s.t.Errorf("fsck: %v\n%s", err, out)
	}
}

// signing is one request to sign, from its first attempt to its answer.
type signing struct {
	run    string // of the job; each request has its own
	image  string
	token  string
	tries  int
	answer *pb.SignedImage // nil until it is acknowledged
}

// moving is one request to promote.
type moving struct {
	image  string
	answer *pb.PromoteResponse
}

// load is what the callers did.
type load struct {
	mu      sync.Mutex
	waiting []*signing // not acknowledged yet
	signed  []*signing // acknowledged
	fresh   []*signing // acknowledged since the last check
	moved   []*moving
	runs    int
}

func (l *load) take(make func(run string) *signing) *signing {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.waiting); n > 0 {
		s := l.waiting[n-1]
		l.waiting = l.waiting[:n-1]
		return s
	}
	l.runs++
	return make(fmt.Sprint(1_000_000 + l.runs))
}

func (l *load) put(s *signing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.answer == nil {
		l.waiting = append(l.waiting, s)
		return
	}
	l.signed, l.fresh = append(l.signed, s), append(l.fresh, s)
}

type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (b bearer) RequireTransportSecurity() bool { return false }

func as(token string) grpc.CallOption { return grpc.PerRPCCredentials(bearer(token)) }

// interrupted reports whether an error is what a caller sees when the server
// dies; anything else is the server's answer.
func interrupted(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return true
	}
	return false
}

func TestKillUnderLoad(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	// 1. What is around the server lives here and survives it.
	outside := testkit.NewStack(t, testkit.Options{})
	outside.Close()
	s := &server{t: t, program: build(t), dir: t.TempDir(), addr: testkit.FreeAddr(t)}
	s.config = filepath.Join(s.dir, "hallmarkd.yaml")
	configure(t, s, outside)
	if out, err := s.run("init", "--config", s.config); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	images := make([]string, killImages)
	for i := range images {
		images[i] = outside.Push("acme/api", "", testkit.RandomImage(t)).String()
	}
	movable := make([]string, killMovers*4)
	for i := range movable {
		movable[i] = outside.Push(fmt.Sprintf("acme/moved-%d", i%killMovers), "", testkit.RandomImage(t)).String()
	}
	mint := func(claims map[string]any) string {
		c := outside.Claims(claims)
		c["aud"] = s.url()
		token, err := outside.Issuer.Mint(c)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	auditor, err := outside.People.Mint(map[string]any{"aud": s.url(), "sub": "a-1", "groups": []string{"audit"}})
	if err != nil {
		t.Fatal(err)
	}

	// 2. Rounds.
	var l load
	var check *verifier.Verifier
	for round := range killRounds {
		s.start()
		conns := dial(t, s.addr, 4)
		if check == nil {
			check = trust(t, conns[0], s.url())
		}
		l.check(t, conns, auditor, check)
		ctx, cancel := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		for i := range killSigners {
			callers.Go(func() {
				client := pb.NewSigningServiceClient(conns[i%len(conns)])
				for ctx.Err() == nil {
					r := l.take(func(run string) *signing {
						return &signing{run: run, image: images[(len(run)+i)%len(images)], token: mint(map[string]any{"run_id": run})}
					})
					r.sign(t, ctx, client)
					l.put(r)
					if r.answer == nil {
						return // the server is gone
					}
				}
			})
		}
		for i := range killMovers {
			image := movable[i+killMovers*(round%4)]
			callers.Go(func() { l.move(t, ctx, conns[i%len(conns)], image, mint) })
		}
		wait := time.NewTimer(time.Duration(random.Int64N(int64(mostLoad))))
		<-wait.C
		s.end(syscall.SIGKILL)
		cancel()
		callers.Wait()
		for _, c := range conns {
			c.Close()
		}
		if round%10 == 9 {
			s.fsck()
		}
		if t.Failed() {
			t.Fatalf("round %d:\n%s", round, s.output.String())
		}
	}

	// 3. Whatever was not acknowledged is asked once more, in peace.
	s.start()
	conns := dial(t, s.addr, 4)
	l.check(t, conns, auditor, check)
	waiting := len(l.waiting)
	var rest errgroup.Group
	rest.SetLimit(killSigners)
	for i, r := range l.waiting {
		rest.Go(func() error {
			r.sign(t, t.Context(), pb.NewSigningServiceClient(conns[i%len(conns)]))
			return nil
		})
	}
	_ = rest.Wait() // no function returns an error
	for _, r := range l.waiting {
		if r.answer == nil {
			t.Fatalf("run %s is not signed even now", r.run)
		}
		l.put(r)
	}
	l.check(t, conns, auditor, check)
	for _, m := range l.moved {
		got, err := pb.NewAuditServiceClient(conns[0]).GetDecision(t.Context(), &pb.GetDecisionRequest{Id: m.answer.GetDecision().GetId()}, as(auditor))
		if err != nil || !got.GetDecision().GetAllowed() {
			t.Errorf("decision %d of %s is gone: %v", m.answer.GetDecision().GetId(), m.image, err)
		}
	}
	s.end(syscall.SIGTERM)
	s.fsck()
	l.compare(t, s, outside)
	t.Logf("%d requests acknowledged, %d promotions, %d asked again at the end", len(l.signed), len(l.moved), waiting)
	if len(l.signed) < killRounds || len(l.moved) == 0 {
		t.Error("too little was under way when the server was killed: nothing was proved")
	}
}

// configure writes the files that an operator would.
func configure(t *testing.T, s *server, outside *testkit.Stack) {
	t.Helper()
	host := outside.Registry.Host()
	config := fmt.Sprintf(`public_url: %s
listen: %s
data: data
policy: policy.yaml
issuers:
- {name: github, provider: github, issuer: "%s", owners: ["%s"], plain_http: true}
- {name: corp, provider: generic, kind: person, issuer: "%s", plain_http: true, claims: {groups: groups}}
registries:
- {host: "%s", plain_http: true}
`, s.url(), s.addr, outside.Issuer.URL(), dev.GitHubID("acme"), outside.People.URL(), host)
	for name, text := range map[string]string{
		s.config:                            config,
		filepath.Join(s.dir, "policy.yaml"): strings.ReplaceAll(policyOf(1, looseSigners, oneStage), "REGISTRY", host),
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func dial(t *testing.T, addr string, n int) []*grpc.ClientConn {
	t.Helper()
	conns := make([]*grpc.ClientConn, n)
	for i := range conns {
		c, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c
	}
	return conns
}

// trust makes a verifier from what the server gives out to everybody.
func trust(t *testing.T, conn *grpc.ClientConn, service string) *verifier.Verifier {
	t.Helper()
	client := pb.NewTrustServiceClient(conn)
	root, err := client.GetTrustedRoot(t.Context(), &pb.GetTrustedRootRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	key, err := client.GetGateKey(t.Context(), &pb.GetGateKeyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	v, err := verifier.New(root.GetTrustedRoot(), []byte(key.GetPem()), service)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// sign asks once and keeps the answer when there is one.
func (r *signing) sign(t *testing.T, ctx context.Context, client pb.SigningServiceClient) {
	r.tries++
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := client.SignImages(ctx, &pb.SignImagesRequest{
		Images: []*pb.SignImage{{Image: r.image}}, Attach: pb.Attach_ATTACH_CLIENT,
	}, as(r.token))
	if err != nil {
		if !interrupted(err) {
			t.Errorf("signing run %s: %v", r.run, err)
		}
		return
	}
	got := out.GetResults()[0]
	switch refusal := got.GetRefusal(); {
	case refusal == nil:
		r.answer = got
	case refusal.GetReason() != string(attest.ShuttingDown):
		t.Errorf("run %s is refused: %v", r.run, refusal)
	}
	if r.answer != nil && r.tries == 1 && got.GetRepeatedRequest() {
		t.Errorf("run %s is answered by another's record", r.run)
	}
}

// move signs an image and promotes it, again and again until the server is gone.
func (l *load) move(t *testing.T, ctx context.Context, conn *grpc.ClientConn, image string, mint func(map[string]any) string) {
	r := &signing{run: "77", image: image, token: mint(map[string]any{"run_id": "77"}), tries: 1}
	if r.sign(t, ctx, pb.NewSigningServiceClient(conn)); r.answer == nil {
		return
	}
	out, err := pb.NewPromotionServiceClient(conn).Promote(ctx, &pb.PromoteRequest{Image: image, ToStage: "live", Version: "stable"},
		as(mint(map[string]any{"environment": "release"})))
	switch {
	case err != nil:
		if !interrupted(err) && reason(err) != attest.StageMoved {
			t.Errorf("promoting %s: %v", image, err)
		}
	case out.GetDecision().GetVerdict() == "aborted": // what was killed before is still on its way
	case !out.GetDecision().GetAllowed() || out.GetEffect() == string(ledger.Failed):
		t.Errorf("promoting %s: %s %v", image, out.GetEffectDetail(), out.GetDecision())
	default:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.moved = append(l.moved, &moving{image, out})
	}
}

func reason(err error) attest.Reason {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return attest.Reason(info.GetReason())
		}
	}
	return ""
}

// check wants everything that was acknowledged since the last check to be in the
// log, as it was given out.
func (l *load) check(t *testing.T, conns []*grpc.ClientConn, auditor string, v *verifier.Verifier) {
	t.Helper()
	fresh := l.fresh
	l.fresh = nil
	var work errgroup.Group
	work.SetLimit(8)
	for i, r := range fresh {
		work.Go(func() error {
			digest, err := attest.ParseDigest(r.image[strings.IndexByte(r.image, '@')+1:])
			if err != nil {
				return err
			}
			client := pb.NewAuditServiceClient(conns[i%len(conns)])
			for rec, bundle := range map[*pb.Record][]byte{r.answer.GetSignature(): r.answer.GetSignatureBundle(), r.answer.GetProvenance(): r.answer.GetProvenanceBundle()} {
				got, err := client.GetRecord(t.Context(), &pb.GetRecordRequest{Id: rec.GetId()}, as(auditor), grpc.WaitForReady(true))
				if err != nil {
					return fmt.Errorf("run %s was acknowledged as record %d: %w", r.run, rec.GetIndex(), err)
				}
				if !bytes.Equal(got.GetRecord().GetBundle(), bundle) || got.GetRecord().GetRecord().GetIndex() != rec.GetIndex() {
					return fmt.Errorf("run %s: record %d is not what was acknowledged", r.run, rec.GetIndex())
				}
				if i >= killVerified {
					continue
				}
				if _, err := v.Bundle(bundle, digest); err != nil {
					return fmt.Errorf("run %s: %w", r.run, err)
				}
			}
			return nil
		})
	}
	if err := work.Wait(); err != nil {
		t.Error(err)
	}
}

// compare reads the log itself: every acknowledged request has one record there,
// and it is the one that was acknowledged; every bundle in the registry is in the
// log.
func (l *load) compare(t *testing.T, s *server, outside *testkit.Stack) {
	t.Helper()
	data := filepath.Join(s.dir, "data")
	keys, err := signer.Open(signer.Config{Dir: filepath.Join(data, "keys"), Service: s.url(), Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	log, err := ledger.Open(t.Context(), ledger.Config{Dir: data, Origin: keys.Origin(), LogKey: keys.LogKey()})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close(context.WithoutCancel(t.Context()))
	byRun := map[string][]string{}
	for query := (ledger.Query{Kind: attest.KindProvenance, Ascending: true, Limit: 1000}); ; {
		metas, err := log.Find(t.Context(), query)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range metas {
			run := m.Get(attest.FacetRun) + " " + m.Get(attest.FacetDigest)
			byRun[run] = append(byRun[run], m.ID.String())
			query.After = m.Index
		}
		if len(metas) < query.Limit {
			break
		}
	}
	for run, ids := range byRun {
		if len(ids) != 1 {
			t.Errorf("%s has %d provenance records", run, len(ids))
		}
	}
	for _, r := range l.signed {
		run := fmt.Sprintf("https://github.com/%s/actions/runs/%s/attempts/1 %s", testkit.Source, r.run, r.image[strings.IndexByte(r.image, '@')+1:])
		if !slices.Equal(byRun[run], []string{r.answer.GetProvenance().GetId()}) {
			t.Errorf("%s: acknowledged %s, the log has %v", run, r.answer.GetProvenance().GetId(), byRun[run])
		}
	}
	for _, m := range l.moved {
		ref, err := attest.ParseImageRef(m.image)
		if err != nil {
			t.Fatal(err)
		}
		target := attest.ImageRef{Repository: attest.Repository(outside.Registry.Host() + "/live/" + ref.Repository.Name()), Digest: ref.Digest}
		for _, at := range []attest.ImageRef{ref, target} {
			bundles, err := outside.Images.Attached(t.Context(), at)
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range bundles {
				inLog(t, log, b)
			}
		}
	}
}

// inLog wants the entry that a bundle carries to be in the log.
func inLog(t *testing.T, log *ledger.Ledger, bundle []byte) {
	t.Helper()
	id, err := entryOf(bundle)
	if err == nil {
		_, err = log.Get(t.Context(), id)
	}
	if err != nil {
		t.Errorf("a bundle in the registry is not in the log: %v", err)
	}
}

// entryOf returns the leaf hash of the log entry that a bundle carries.
func entryOf(bundle []byte) (attest.RecordID, error) {
	var b struct {
		Material struct {
			Entries []struct {
				Body []byte `json:"canonicalizedBody"`
			} `json:"tlogEntries"`
		} `json:"verificationMaterial"`
	}
	if err := json.Unmarshal(bundle, &b); err != nil {
		return attest.RecordID{}, err
	}
	if len(b.Material.Entries) != 1 {
		return attest.RecordID{}, fmt.Errorf("%d log entries", len(b.Material.Entries))
	}
	return attest.LeafHash(b.Material.Entries[0].Body), nil
}
