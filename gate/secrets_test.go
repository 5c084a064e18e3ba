package gate_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/status"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/registry"
)

// journal collects what is said, by the service's log and to its callers.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// told notes an error as a caller sees it, with all details.
func (j *journal) told(err error) {
	if err != nil {
		io.WriteString(j, err.Error()+"\n"+status.Convert(err).Proto().String()+"\n")
	}
}

// L01: no token, no key, no password and no payload is in a log line or in an
// error, whatever goes wrong.
func TestL01NoSecretIsTold(t *testing.T) {
	t.Parallel()
	const password = "correct-horse-battery-staple"
	guarded := startFaulty(t)
	guarded.demand("robot", password)
	file := filepath.Join(t.TempDir(), "reg.json")
	login := base64.StdEncoding.EncodeToString([]byte("robot:" + password))
	if err := os.WriteFile(file, []byte(`{"auths":{"`+guarded.host+`":{"auth":"`+login+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	var j journal
	s := testkit.NewStack(t, testkit.Options{
		Policy: policyOf(1, looseSigners, liveOn(guarded.host)),
		Hosts:  []registry.Host{{Host: guarded.host, PlainHTTP: true, Credentials: registry.Credentials{File: file}}},
		Logger: slog.New(slog.NewJSONHandler(&j, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	img := s.PushApp("acme/api")
	good, promoter := s.Token(nil), s.PromoterToken()
	tokens := []string{
		good, promoter, s.PersonToken("a-1", "audit"),
		good[:len(good)-6] + "AAAAAA", // another signature
		s.Token(map[string]any{"aud": "https://elsewhere.example.com"}),
		s.Token(map[string]any{"exp": 1}),
		s.Token(map[string]any{"repository_owner_id": "1"}),
		s.Token(map[string]any{"event_name": "pull_request"}),
		s.Token(map[string]any{"repository_id": "1"}),
		s.Token(map[string]any{"sha": "not a commit"}),
	}
	ctx := t.Context()
	for _, token := range tokens {
		conn := s.Dial(token)
		signing, promotion, audit := pb.NewSigningServiceClient(conn), pb.NewPromotionServiceClient(conn), pb.NewAuditServiceClient(conn)
		out, err := signing.SignImages(ctx, &pb.SignImagesRequest{Images: []*pb.SignImage{{Image: img.String()}, {Image: img.String(), Base: "nowhere.example.com/x:1"}, {Image: "acme/api:latest"}}})
		j.told(err)
		for _, r := range out.GetResults() {
			io.WriteString(&j, r.GetRefusal().String()+"\n")
		}
		_, err = promotion.Verify(ctx, &pb.VerifyRequest{Image: img.String(), Stage: "live"})
		j.told(err)
		_, err = promotion.Promote(ctx, &pb.PromoteRequest{Image: img.String(), ToStage: "nowhere"})
		j.told(err)
		_, err = audit.GetRecord(ctx, &pb.GetRecordRequest{Id: strings.Repeat("0", 64)})
		j.told(err)
		_, err = audit.ListRecords(ctx, &pb.ListRecordsRequest{Filter: "token=\"" + token + "\""})
		j.told(err)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/v1/records?page_token="+token, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := s.HTTP().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(&j, resp.Body); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	// The whole way, to a registry that wants the password and refuses it once.
	guarded.set(func(w http.ResponseWriter, r *http.Request) bool {
		guarded.set(func(http.ResponseWriter, *http.Request) bool { return false })
		w.WriteHeader(http.StatusForbidden)
		io.WriteString(w, r.Header.Get("Authorization")) // what a bad registry repeats
		return true
	})
	signed := sign(t, s, good, img.ImageRef)
	done(t, s, gate.PromoteRequest{Ref: img.ImageRef, ToStage: "live", Version: "1"})
	if err := s.Ledger.Close(context.WithoutCancel(ctx)); err != nil {
		t.Fatal(err)
	}
	_, err := trySign(t, s, good, gate.SignImage{Ref: img.ImageRef})
	wantReason(t, err, attest.ShuttingDown)
	j.told(err)
	s.Close()

	text := j.String()
	if !strings.Contains(text, "task failed") || !strings.Contains(text, string(attest.TokenSignature)) {
		t.Fatal("the scenario did not go wrong where it should have: nothing was proved")
	}
	secrets := map[string]string{"the password": password, "the login": login}
	for i, token := range tokens {
		parts := strings.Split(token, ".")
		secrets["the signature of token "+string(rune('0'+i))] = parts[2]
		secrets["the claims of token "+string(rune('0'+i))] = parts[1]
	}
	for _, rec := range []attest.Record{signed.Signature, signed.Provenance} {
		secrets["the payload of the "+string(rec.Kind)] = string(rec.Payload)
		secrets["the payload of the "+string(rec.Kind)+" in base64"] = base64.StdEncoding.EncodeToString(rec.Payload)
		secrets["the signature bytes of the "+string(rec.Kind)] = base64.StdEncoding.EncodeToString(rec.Envelope.Signature)
		quoted, err := json.Marshal(string(rec.Payload[:60]))
		if err != nil {
			t.Fatal(err)
		}
		secrets["the payload of the "+string(rec.Kind)+" as JSON"] = string(quoted[1 : len(quoted)-1])
	}
	keys, err := filepath.Glob(filepath.Join(s.DataDir, "keys", "*.key"))
	if err != nil || len(keys) < 4 {
		t.Fatalf("key files %v: %v", keys, err)
	}
	for _, path := range keys {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Fields(string(raw)) {
			if len(line) >= 24 && !strings.HasPrefix(line, "-----") {
				secrets["the key in "+filepath.Base(path)+" "+line[:4]] = line
			}
		}
	}
	for name, secret := range secrets {
		if i := strings.Index(text, secret); i >= 0 {
			t.Errorf("%s is told: …%s", name, text[max(0, i-120):i])
		}
	}
}
