package dev

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Registry is an OCI registry in memory, with the referrers API and without
// authentication: what is pushed to it is gone when the process ends.
type Registry struct {
	handler http.Handler
	host    string
	server  *http.Server // nil when mounted on another's listener
	stop    func() bool
}

// NewRegistry returns a registry that the caller mounts as an http.Handler at the
// root of a loopback listener.
func NewRegistry() *Registry {
	return &Registry{handler: registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))}
}

// StartRegistry serves a registry over plain HTTP on its own loopback listener,
// for example "127.0.0.1:0", until Close is called or ctx ends.
func StartRegistry(ctx context.Context, addr string) (*Registry, error) {
	if host, _, err := net.SplitHostPort(addr); err != nil || !loopback(host) {
		return nil, fmt.Errorf("development registry address %q is not a loopback host:port: anybody may push to it", addr)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening for the development registry: %w", err)
	}
	r := NewRegistry()
	r.host = l.Addr().String()
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	go r.server.Serve(l) //nolint:errcheck // it ends with ErrServerClosed when Close is called
	r.stop = context.AfterFunc(ctx, func() { r.server.Close() })
	return r, nil
}

// Host returns the host:port that references name, "" when it has no listener of
// its own.
func (r *Registry) Host() string { return r.host }

// Close stops the listener that StartRegistry opened.
func (r *Registry) Close() error {
	if r.server == nil {
		return nil
	}
	r.stop()
	return r.server.Close()
}

// ServeHTTP implements http.Handler. A web page that points its own name at
// loopback must not get in.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	host := req.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if !loopback(host) {
		http.Error(w, "only loopback names are served", http.StatusForbidden)
		return
	}
	r.handler.ServeHTTP(w, req)
}
