package gate_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/internal/testkit"
	"github.com/hallmarkd/hallmark/registry"
)

// I11: one tenant's registry that takes no uploads does not hold up the
// promotions of all others.
func TestI11HangingRegistryHoldsUpNoPromotion(t *testing.T) {
	t.Parallel()
	other, err := dev.StartRegistry(context.WithoutCancel(t.Context()), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	hang := make(chan struct{})
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: other.Host()})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead && r.Header.Get("X-Setup") == "" {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			return
		}
		forward.ServeHTTP(w, r)
	}))
	host := strings.TrimPrefix(front.URL, "http://")
	text := strings.Replace(policyOf(1, looseSigners, oneStage), "  signers:\n", "  signers:\n  - {issuer: github, images: [\""+host+"/**\"], when: \"id.kind == 'workload'\"}\n", 1)
	s := testkit.NewStack(t, testkit.Options{Policy: text, Hosts: []registry.Host{{Host: host, PlainHTTP: true}}})
	t.Cleanup(front.Close)
	t.Cleanup(func() { close(hang) }) // before the stack is closed: its worker waits for its tasks

	good := s.PushApp("acme/api")
	byClient := func(ref testkit.Pushed) {
		t.Helper()
		out, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), gate.SignRequest{Images: []gate.SignImage{{Ref: ref.ImageRef}}, AttachByClient: true})
		if err != nil || out[0].Err != nil {
			t.Fatal(err, out[0].Err)
		}
	}
	byClient(good)

	var req gate.SignRequest
	for range 8 {
		req.Images = append(req.Images, gate.SignImage{Ref: pushAround(t, other.Host(), host)})
	}
	hurry, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	out, err := s.Gate.Sign(hurry, s.Identity(s.Token(nil)), req)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range out {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
	}
	p := promote(t, s, gate.PromoteRequest{Ref: good.ImageRef, ToStage: "live", Version: "1"})
	if p.Effect != "DONE" {
		t.Errorf("the promotion is %s after %v: the worker waits for another tenant's registry", p.Effect, 30*time.Second)
	}
}

// pushAround pushes an image past the proxy and returns its name at the proxy.
func pushAround(t *testing.T, real, front string) attest.ImageRef {
	t.Helper()
	img := testkit.RandomImage(t)
	tag, err := name.NewTag(real+"/slow/app:x", name.StrictValidation)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Push(tag, img); err != nil {
		t.Fatal(err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	return attest.ImageRef{Repository: attest.Repository(front + "/slow/app"), Digest: attest.Hash(raw)}
}
