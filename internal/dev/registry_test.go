package dev_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hallmarkd/hallmark/internal/dev"
)

func TestRegistry(t *testing.T) {
	r, err := dev.StartRegistry(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(r.Host()+"/team/app:1", name.StrictValidation)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, empty.Image); err != nil {
		t.Fatal(err)
	}
	digest, err := empty.Image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	// Without the fallback this fails where the referrers API is missing.
	if _, err := remote.Referrers(tag.Digest(digest.String()), remote.WithReferrersTagFallback(false)); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := http.Get("http://" + r.Host() + "/v2/"); err == nil {
		t.Error("it still answers after Close")
	}
}

func TestRegistryServesLoopbackOnly(t *testing.T) {
	for _, addr := range []string{"", ":0", "0.0.0.0:0", "10.0.0.1:0", "example.com:0", "127.0.0.1"} {
		if r, err := dev.StartRegistry(t.Context(), addr); err == nil {
			r.Close()
			t.Errorf("listens on %q", addr)
		}
	}
	r := dev.NewRegistry()
	for host, want := range map[string]int{"127.0.0.1:5000": 200, "localhost": 200, "[::1]:5000": 200, "evil.example.com": 403, "evil.example.com:5000": 403} {
		w := httptest.NewRecorder()
		req := httptest.NewRequest(http.MethodGet, "/v2/", strings.NewReader(""))
		req.Host = host
		r.ServeHTTP(w, req)
		if w.Code != want {
			t.Errorf("Host %s: %d, want %d", host, w.Code, want)
		}
	}
}
