package registry_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/dev"
	"github.com/hallmarkd/hallmark/registry"
)

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name string
		host registry.Host
	}{
		{"no host", registry.Host{}},
		{"host without dot", registry.Host{Host: "registry"}},
		{"host with path", registry.Host{Host: "registry.example.com/team"}},
		{"host with scheme", registry.Host{Host: "https://registry.example.com"}},
		{"host with user", registry.Host{Host: "user@registry.example.com"}},
		{"G15 plain HTTP to a name", registry.Host{Host: "registry.example.com", PlainHTTP: true}},
		{"G15 plain HTTP to a private address", registry.Host{Host: "10.0.0.1:5000", PlainHTTP: true}},
		{"G15 plain HTTP to a local name", registry.Host{Host: "registry.local", PlainHTTP: true}},
		{"G15 plain HTTP to a name that starts like loopback", registry.Host{Host: "127.0.0.1.example.com", PlainHTTP: true}},
		{"G15 plain HTTP to a legacy spelling", registry.Host{Host: "127.1:5000", PlainHTTP: true}},
		{"token host with scheme", registry.Host{Host: "registry.example.com", TokenHosts: []string{"https://auth.example.com"}}},
		{"redirect host with path", registry.Host{Host: "registry.example.com", RedirectHosts: []string{"cdn.example.com/x"}}},
		{"CA file missing", registry.Host{Host: "registry.example.com", CAFile: filepath.Join(dir, "none")}},
		{"CA file without certificate", registry.Host{Host: "registry.example.com", CAFile: file}},
		{"credentials file missing", registry.Host{Host: "registry.example.com", Credentials: registry.Credentials{File: filepath.Join(dir, "none")}}},
		{"credentials file malformed", registry.Host{Host: "registry.example.com", Credentials: registry.Credentials{File: file}}},
		{"G16 credentials file for another host", registry.Host{Host: "registry.example.com", Credentials: registry.Credentials{File: credentialsFile(t, "other.example.com", "u", "p")}}},
		{"file and helper", registry.Host{Host: "registry.example.com", Credentials: registry.Credentials{File: file, Helper: "/bin/true"}}},
		{"helper by relative path", registry.Host{Host: "registry.example.com", Credentials: registry.Credentials{Helper: "docker-credential-x"}}},
		{"helper not executable", registry.Host{Host: "registry.example.com", Credentials: registry.Credentials{Helper: file}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := registry.New(registry.Config{Hosts: []registry.Host{row.host}})
			want(t, err, attest.BadConfig)
		})
	}
	for _, row := range []struct {
		name string
		cfg  registry.Config
	}{
		{"host twice", registry.Config{Hosts: []registry.Host{{Host: "a.example.com"}, {Host: "a.example.com"}}}},
		{"mirror of nothing", registry.Config{Mirrors: []registry.Mirror{{From: "mirror.local/hub"}}}},
		{"mirror with scheme", registry.Config{Mirrors: []registry.Mirror{{From: "https://mirror.local", To: "docker.io"}}}},
		{"ambient and configured credentials", registry.Config{Ambient: true, Hosts: []registry.Host{{Host: "a.example.com", Credentials: registry.Credentials{Helper: "/bin/true"}}}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := registry.New(row.cfg)
			want(t, err, attest.BadConfig)
		})
	}
}

func TestHostsAndNames(t *testing.T) {
	other := newFake(t, nil)
	f := newFake(t, nil)
	c := newClient(t, registry.Config{Hosts: plain(f.host())})
	d := attest.Hash([]byte("x"))
	for _, row := range []struct {
		name, repo string
		reason     attest.Reason
	}{
		{"G13 host that is not configured", other.host() + "/a/app", attest.HostNotAllowed},
		{"G13 metadata address", "169.254.169.254/a/app", attest.HostNotAllowed},
		{"G13 same host, other port", strings.Split(f.host(), ":")[0] + ":1/a/app", attest.HostNotAllowed},
		{"G14 parent directory", f.host() + "/a/../../v2/other", attest.BadReference},
		{"G14 encoded parent directory", f.host() + "/a/%2e%2e/b", attest.BadReference},
		{"G14 query", f.host() + "/a/app?x=", attest.BadReference},
		{"G14 fragment", f.host() + "/a/app#x", attest.BadReference},
		{"G14 user info", "user@" + f.host() + "/a/app", attest.BadReference},
		{"G14 nothing", "", attest.BadReference},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(row.repo), Digest: d}, "", nil, anywhere)
			want(t, err, row.reason)
		})
	}
	for _, tag := range []string{"", "a/b", "..", "a b", "sha256:" + strings.Repeat("a", 64), "a?b", strings.Repeat("a", 129)} {
		t.Run("G14 tag "+tag, func(t *testing.T) {
			_, err := c.Resolve(t.Context(), f.repo("a/app"), tag)
			want(t, err, attest.BadReference)
			want(t, c.Tag(t.Context(), attest.ImageRef{Repository: f.repo("a/app"), Digest: d}, f.repo("a/app"), tag), attest.BadReference)
		})
	}
	other.untouched(t)
	if calls := f.calls(); len(calls) > 0 {
		t.Errorf("asked %v", calls)
	}
}

// A client that is not told that a registry speaks http never speaks http to it,
// though go-containerregistry would (name.Registry.Scheme).
func TestG15SilentHTTP(t *testing.T) {
	f := newFake(t, nil)
	ref := f.serve("a/app", ociManifest, manifest(""))
	_, port, err := net.SplitHostPort(f.host())
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{f.host(), "localhost:" + port} {
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: host}}})
		ref.Repository = attest.Repository(host + "/a/app")
		_, err := c.Image(t.Context(), ref, "", nil, anywhere)
		want(t, err, attest.PlainHTTP)
	}
	f.untouched(t)
}

func TestHTTPS(t *testing.T) {
	f := newFakeTLS(t, nil)
	ref := f.serve("a/app", ociManifest, manifest(""))
	t.Run("with its CA", func(t *testing.T) {
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), CAFile: f.caFile(t)}}})
		_, err := c.Image(t.Context(), ref, "", nil, anywhere)
		want(t, err, "")
	})
	t.Run("with an unknown CA", func(t *testing.T) {
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host()}}})
		_, err := c.Image(t.Context(), ref, "", nil, anywhere)
		want(t, err, attest.RegistryUnavailable)
		if !strings.Contains(err.Error(), "certificate") {
			t.Errorf("the message does not say why: %v", err)
		}
	})
}

func bearer(realm string) page {
	return page{status: http.StatusUnauthorized, header: map[string]string{"WWW-Authenticate": `Bearer realm="` + realm + `",service="registry"`}}
}

func TestG10Realm(t *testing.T) {
	for _, row := range []struct {
		name  string
		realm func(f, other *fake) string
		tls   bool
	}{
		{"another host", func(_, other *fake) string { return other.URL + "/token" }, false},
		{"another host by name", func(_, other *fake) string { return strings.Replace(other.URL, "127.0.0.1", "localhost", 1) + "/token" }, false},
		{"the metadata address", func(_, _ *fake) string { return "http://169.254.169.254/token" }, false},
		{"another port of the host", func(_, _ *fake) string { return "https://127.0.0.1:1/token" }, false},
		{"the host in a user name", func(f, other *fake) string { return "http://" + f.host() + "@" + other.host() + "/token" }, false},
		{"a user name before the host", func(f, _ *fake) string { return "http://x:y@" + f.host() + "/token" }, false},
		{"no host", func(_, _ *fake) string { return "/token" }, false},
		{"a file", func(_, _ *fake) string { return "file:///etc/passwd" }, false},
		{"http of an https registry", func(f, _ *fake) string { return "http://" + f.host() + "/token" }, true},
	} {
		t.Run("G10 "+row.name, func(t *testing.T) {
			other, start := newFake(t, nil), newFake
			if row.tls {
				start = newFakeTLS
			}
			f := start(t, nil)
			f.set("/v2/", bearer(row.realm(f, other)))
			h := registry.Host{Host: f.host(), PlainHTTP: !row.tls, Credentials: registry.Credentials{File: credentialsFile(t, f.host(), "user", "secret")}}
			if row.tls {
				h.CAFile = f.caFile(t)
			}
			c := newClient(t, registry.Config{Hosts: []registry.Host{h}})
			_, err := c.Image(t.Context(), f.serve("a/app", ociManifest, manifest("")), "", nil, anywhere)
			want(t, err, attest.RealmRefused)
			other.untouched(t)
			for _, call := range f.calls() {
				t.Errorf("went on with %v", call)
			}
		})
	}
}

// A registry that first names an honest realm and then another one.
func TestG10RealmChanges(t *testing.T) {
	other := newFake(t, nil)
	var pings atomic.Int64
	var self string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		realm := "http://" + self + "/token"
		if pings.Add(1) > 1 {
			realm = strings.Replace(other.URL, "127.0.0.1", "localhost", 1) + "/token"
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	t.Cleanup(srv.Close)
	self = srv.Listener.Addr().String()
	c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: self, PlainHTTP: true, Credentials: registry.Credentials{File: credentialsFile(t, self, "user", "secret")}}}})
	_, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(self + "/a/app"), Digest: attest.Hash(nil)}, "", nil, anywhere)
	want(t, err, attest.RealmRefused)
	other.untouched(t)
}

func TestTokens(t *testing.T) {
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:secret"))
	t.Run("realm on the registry itself", func(t *testing.T) {
		f := newFake(t, nil)
		f.set("/v2/", bearer(f.URL+"/token"))
		f.set("/token", page{body: `{"token":"t0k3n"}`})
		ref := f.serve("a/app", ociManifest, manifest(""))
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, Credentials: registry.Credentials{File: credentialsFile(t, f.host(), "user", "secret")}}}})
		_, err := c.Image(t.Context(), ref, "", nil, anywhere)
		want(t, err, "")
		expect := []call{{"GET /token", basic}, {"GET /v2/a/app/manifests/" + ref.Digest.String(), "Bearer t0k3n"}, {"GET /v2/a/app/blobs/" + attest.Hash([]byte("{}")).String(), "Bearer t0k3n"}}
		if diff := cmp.Diff(expect, f.calls(), cmp.AllowUnexported(call{})); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("realm on a listed host gets the credentials, the registry only the token", func(t *testing.T) {
		tokens := newFake(t, map[string]page{"/token": {body: `{"token":"t0k3n"}`}})
		_, port, _ := net.SplitHostPort(tokens.host())
		f := newFake(t, map[string]page{"/v2/": bearer("http://localhost:" + port + "/token")})
		ref := f.serve("a/app", ociManifest, manifest(""))
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, TokenHosts: []string{"localhost:" + port},
			Credentials: registry.Credentials{File: credentialsFile(t, f.host(), "user", "secret")}}}})
		_, err := c.Image(t.Context(), ref, "", nil, anywhere)
		want(t, err, "")
		if diff := cmp.Diff([]call{{"GET /token", basic}}, tokens.calls(), cmp.AllowUnexported(call{})); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]call{{"GET /v2/a/app/manifests/" + ref.Digest.String(), "Bearer t0k3n"}, {"GET /v2/a/app/blobs/" + attest.Hash([]byte("{}")).String(), "Bearer t0k3n"}}, f.calls(), cmp.AllowUnexported(call{})); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("G11 token server redirects", func(t *testing.T) {
		other := newFake(t, nil)
		f := newFake(t, nil)
		f.set("/v2/", bearer(f.URL+"/token"))
		f.set("/token", page{status: http.StatusTemporaryRedirect, header: map[string]string{"Location": other.URL + "/token"}})
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, RedirectHosts: []string{other.host()},
			Credentials: registry.Credentials{File: credentialsFile(t, f.host(), "user", "secret")}}}})
		_, err := c.Image(t.Context(), f.serve("a/app", ociManifest, manifest("")), "", nil, anywhere)
		want(t, err, attest.RedirectRefused)
		other.untouched(t)
	})
	t.Run("answers of token servers stay out of messages", func(t *testing.T) {
		f := newFake(t, nil)
		f.set("/v2/", bearer(f.URL+"/token"))
		f.set("/token", page{body: `{"refresh_token":"s3cr3t"}`})
		c := newClient(t, registry.Config{Hosts: plain(f.host())})
		_, err := c.Image(t.Context(), f.serve("a/app", ociManifest, manifest("")), "", nil, anywhere)
		want(t, err, attest.RegistryUnavailable)
		if strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("message repeats a secret: %v", err)
		}
	})
}

// A bundle that is attached in a fake registry which keeps its blobs elsewhere.
func redirecting(t *testing.T, f *fake, blobs page) attest.ImageRef {
	t.Helper()
	subject := f.serve("a/app", ociManifest, manifest(""))
	m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":%q,"config":%s,"layers":[%s],"subject":{"mediaType":%q,"digest":%q,"size":%d}}`,
		ociManifest, bundleType, descriptor("application/vnd.oci.empty.v1+json", "{}", ""), descriptor(bundleType, "bundle", ""),
		ociManifest, subject.Digest, len(manifest("")))
	r := f.serve("a/app", ociManifest, m)
	f.set("/v2/a/app/referrers/"+subject.Digest.String(), page{header: map[string]string{"Content-Type": ociIndex},
		body: fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"artifactType":%q}]}`, ociManifest, r.Digest, len(m), bundleType)})
	f.set("/v2/a/app/blobs/"+attest.Hash([]byte("bundle")).String(), blobs)
	return subject
}

func redirect(to string) page {
	return page{status: http.StatusTemporaryRedirect, header: map[string]string{"Location": to}}
}

func TestG11Redirects(t *testing.T) {
	credentials := func(t *testing.T, f *fake) registry.Credentials {
		return registry.Credentials{File: credentialsFile(t, f.host(), "user", "secret")}
	}
	challenge := page{status: http.StatusUnauthorized, header: map[string]string{"WWW-Authenticate": `Basic realm="x"`}}

	t.Run("G11 blob from a listed host, without credentials", func(t *testing.T) {
		cdn := newFake(t, map[string]page{"/bucket/x": {body: "bundle"}})
		f := newFake(t, map[string]page{"/v2/": challenge})
		ref := redirecting(t, f, redirect(cdn.URL+"/bucket/x?signature=1"))
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, RedirectHosts: []string{cdn.host()}, Credentials: credentials(t, f)}}})
		got, err := c.Attached(t.Context(), ref)
		want(t, err, "")
		if diff := cmp.Diff([][]byte{[]byte("bundle")}, got); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]call{{"GET /bucket/x", ""}}, cdn.calls(), cmp.AllowUnexported(call{})); diff != "" {
			t.Error(diff)
		}
		for _, call := range f.calls() {
			if !strings.HasPrefix(call.authorization, "Basic ") {
				t.Errorf("the registry itself was asked without credentials: %v", call)
			}
		}
	})
	t.Run("G11 credentials stay dropped on the way back", func(t *testing.T) {
		cdn := newFake(t, nil)
		f := newFake(t, map[string]page{"/v2/": challenge, "/back": {body: "bundle"}})
		cdn.set("/x", redirect(f.URL+"/back"))
		ref := redirecting(t, f, redirect(cdn.URL+"/x"))
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, RedirectHosts: []string{cdn.host()}, Credentials: credentials(t, f)}}})
		_, err := c.Attached(t.Context(), ref)
		want(t, err, "")
		if calls := f.calls(); !slices.Contains(calls, call{"GET /back", ""}) {
			t.Errorf("asked %v", calls)
		}
	})
	t.Run("G11 blob from a listed host that sends other bytes", func(t *testing.T) {
		cdn := newFake(t, map[string]page{"/x": {body: "bandle"}})
		f := newFake(t, nil)
		ref := redirecting(t, f, redirect(cdn.URL+"/x"))
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, RedirectHosts: []string{cdn.host()}}}})
		got, err := c.Attached(t.Context(), ref)
		want(t, err, "")
		if len(got) != 0 {
			t.Errorf("got %q", got)
		}
	})
	for _, row := range []struct {
		name string
		page func(f, other *fake) page
		list bool
	}{
		{"blob from a host that is not listed", func(_, other *fake) page { return redirect(other.URL + "/x") }, false},
		{"blob from the metadata address", func(_, _ *fake) page { return redirect("http://169.254.169.254/x") }, false},
		{"blob from another scheme", func(_, _ *fake) page { return redirect("file:///etc/passwd") }, false},
		{"blob from a listed host with a user name", func(_, other *fake) page { return redirect("http://u:p@" + other.host() + "/x") }, true},
		{"blob from nowhere", func(_, _ *fake) page { return page{status: http.StatusFound} }, false},
		{"blob in a circle", func(_, _ *fake) page { return redirect("?again") }, false},
	} {
		t.Run("G11 "+row.name, func(t *testing.T) {
			other, f := newFake(t, nil), newFake(t, nil)
			ref := redirecting(t, f, row.page(f, other))
			h := registry.Host{Host: f.host(), PlainHTTP: true, Credentials: credentials(t, f)}
			if row.list {
				h.RedirectHosts = []string{other.host()}
			}
			_, err := newClient(t, registry.Config{Hosts: []registry.Host{h}}).Attached(t.Context(), ref)
			want(t, err, attest.RedirectRefused)
			other.untouched(t)
		})
	}
	t.Run("G11 blob of an https registry from http", func(t *testing.T) {
		other, f := newFake(t, nil), newFakeTLS(t, nil)
		ref := redirecting(t, f, redirect(other.URL+"/x"))
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), CAFile: f.caFile(t), RedirectHosts: []string{other.host()}}}})
		_, err := c.Attached(t.Context(), ref)
		want(t, err, attest.RedirectRefused)
		other.untouched(t)
	})
	for _, path := range []string{"manifests", "ping", "upload", "referrers"} {
		t.Run("G11 "+path, func(t *testing.T) {
			other, f := newFake(t, nil), newFake(t, nil)
			ref := f.serve("a/app", ociManifest, manifest(""))
			to := redirect(other.URL + "/v2/a/app/manifests/" + ref.Digest.String())
			switch path {
			case "manifests":
				f.set("/v2/a/app/manifests/"+ref.Digest.String(), to)
			case "ping":
				f.set("/v2/", to)
			case "upload":
				f.set("/v2/a/app/blobs/uploads/", to)
			case "referrers":
				f.set("/v2/a/app/referrers/"+ref.Digest.String(), to)
			}
			c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: f.host(), PlainHTTP: true, RedirectHosts: []string{other.host()}, Credentials: credentials(t, f)}}})
			var err error
			switch path {
			case "upload":
				err = c.Attach(t.Context(), ref, []byte("bundle"), "type", time.Unix(0, 0))
			case "referrers":
				_, err = c.Attached(t.Context(), ref)
			default:
				_, err = c.Image(t.Context(), ref, "", nil, anywhere)
			}
			want(t, err, attest.RedirectRefused)
			other.untouched(t)
		})
	}
}

func TestG13(t *testing.T) {
	t.Run("G13 Link header", func(t *testing.T) {
		for _, link := range []string{"%s/v2/a/app/referrers/x", "//%s/x", "/v2/other/repo/referrers/x", "http://169.254.169.254/"} {
			other, f := newFake(t, nil), newFake(t, nil)
			ref := f.serve("a/app", ociManifest, manifest(""))
			if strings.Contains(link, "%s") {
				link = fmt.Sprintf(link, strings.TrimPrefix(other.URL, map[bool]string{true: "http://"}[strings.HasPrefix(link, "//")]))
			}
			f.set("/v2/a/app/referrers/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociIndex, "Link": "<" + link + `>; rel="next"`}, body: `{"schemaVersion":2,"manifests":[]}`})
			_, err := newClient(t, registry.Config{Hosts: plain(f.host(), other.host())}).Attached(t.Context(), ref)
			want(t, err, attest.HostNotAllowed)
			other.untouched(t)
		}
	})
	t.Run("G13 Link header without end", func(t *testing.T) {
		f := newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		f.set("/v2/a/app/referrers/"+ref.Digest.String(), page{header: map[string]string{"Content-Type": ociIndex, "Link": `<?n=1>; rel="next"`}, body: `{"schemaVersion":2,"manifests":[]}`})
		_, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attached(t.Context(), ref)
		want(t, err, attest.TooLarge)
	})
	t.Run("G13 upload location", func(t *testing.T) {
		other, f := newFake(t, nil), newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		// By name, since go-containerregistry itself refuses addresses.
		f.set("POST /v2/a/app/blobs/uploads/", page{status: http.StatusAccepted, header: map[string]string{"Location": strings.Replace(other.URL, "127.0.0.1", "localhost", 1) + "/x"}})
		err := newClient(t, registry.Config{Hosts: plain(f.host())}).Attach(t.Context(), ref, []byte("bundle"), "type", time.Unix(0, 0))
		want(t, err, attest.HostNotAllowed)
		other.untouched(t)
	})
}

func TestG20Misbehaviour(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		status int
		asked  int
		reason attest.Reason
	}{
		{http.StatusTooManyRequests, 3, attest.RegistryUnavailable},
		{http.StatusInternalServerError, 3, attest.RegistryUnavailable},
		{http.StatusServiceUnavailable, 3, attest.RegistryUnavailable},
		{http.StatusUnauthorized, 1, attest.RegistryDenied},
		{http.StatusForbidden, 1, attest.RegistryDenied},
		{http.StatusNotFound, 1, attest.SubjectNotFound},
		{http.StatusTeapot, 1, attest.RegistryDenied},
	} {
		t.Run(fmt.Sprintf("G20 %d", row.status), func(t *testing.T) {
			f := newFake(t, nil)
			ref := f.serve("a/app", ociManifest, manifest(""))
			f.set("/v2/a/app/manifests/"+ref.Digest.String(), page{status: row.status, body: "no\x1b[31m"})
			_, err := newClient(t, registry.Config{Hosts: plain(f.host())}).Image(t.Context(), ref, "", nil, anywhere)
			want(t, err, row.reason)
			if n := len(f.calls()); n != row.asked {
				t.Errorf("asked %d times, want %d", n, row.asked)
			}
			if strings.Contains(err.Error(), "\x1b") {
				t.Errorf("the registry's bytes are in the message: %q", err)
			}
		})
	}
	t.Run("the registry's error code is passed on, its words are not", func(t *testing.T) {
		f := newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		denied := page{status: http.StatusForbidden, body: `{"errors":[{"code":"DENIED","message":"s3cr3t"}]}`}
		f.set("POST /v2/a/app/blobs/uploads/", denied)
		f.set("/v2/a/b/manifests/"+ref.Digest.String(), denied)
		c := newClient(t, registry.Config{Hosts: plain(f.host())})
		_, read := c.Image(t.Context(), attest.ImageRef{Repository: f.repo("a/b"), Digest: ref.Digest}, "", nil, anywhere)
		for _, err := range []error{read, c.Attach(t.Context(), ref, []byte("b"), "type", time.Unix(0, 0))} {
			want(t, err, attest.RegistryDenied)
			if !strings.Contains(err.Error(), "403 DENIED") || strings.Contains(err.Error(), "s3cr3t") {
				t.Errorf("message: %v", err)
			}
		}
	})
	t.Run("G20 writes are not repeated blindly", func(t *testing.T) {
		f := newFake(t, nil)
		ref := f.serve("a/app", ociManifest, manifest(""))
		f.set("PUT /v2/a/app/manifests/latest", page{status: http.StatusInternalServerError})
		err := newClient(t, registry.Config{Hosts: plain(f.host())}).Tag(t.Context(), ref, ref.Repository, "latest")
		want(t, err, attest.RegistryUnavailable)
		if n := len(f.calls()); n != 2 {
			t.Errorf("asked %v", f.calls())
		}
	})
	t.Run("G20 no answer", func(t *testing.T) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		t.Cleanup(srv.Close)
		host := srv.Listener.Addr().String()
		c := newClient(t, registry.Config{Hosts: plain(host), Timeout: 50 * time.Millisecond})
		_, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(host + "/a/app")}, "", nil, anywhere)
		want(t, err, attest.RegistryUnavailable)
	})
	t.Run("G20 answer without end", func(t *testing.T) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v2/" {
				return
			}
			w.Header().Set("Content-Type", ociManifest)
			fmt.Fprint(w, "{")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}))
		t.Cleanup(srv.Close)
		host := srv.Listener.Addr().String()
		c := newClient(t, registry.Config{Hosts: plain(host), Timeout: 50 * time.Millisecond})
		_, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(host + "/a/app")}, "", nil, anywhere)
		want(t, err, attest.RegistryUnavailable)
	})
	for _, path := range []string{"/v2/", "/v2/a/app/manifests/"} {
		t.Run("G19 answer without end to "+path, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/v2/" && path != "/v2/" {
					return
				}
				w.Header().Set("Content-Type", ociManifest)
				chunk := bytes.Repeat([]byte(" "), 64<<10)
				for r.Context().Err() == nil {
					if _, err := w.Write(chunk); err != nil {
						return
					}
				}
			}))
			t.Cleanup(srv.Close)
			host := srv.Listener.Addr().String()
			c := newClient(t, registry.Config{Hosts: plain(host)})
			_, err := c.Image(t.Context(), attest.ImageRef{Repository: attest.Repository(host + "/a/app")}, "", nil, anywhere)
			want(t, err, attest.TooLarge)
		})
	}
	t.Run("G20 down", func(t *testing.T) {
		f := newFake(t, nil)
		f.Close()
		c := newClient(t, registry.Config{Hosts: plain(f.host())})
		_, err := c.Image(t.Context(), attest.ImageRef{Repository: f.repo("a/app")}, "", nil, anywhere)
		want(t, err, attest.RegistryUnavailable)
	})
	t.Run("not a registry", func(t *testing.T) {
		f := newFake(t, map[string]page{"/v2/": {status: http.StatusNotFound}})
		c := newClient(t, registry.Config{Hosts: plain(f.host())})
		_, err := c.Image(t.Context(), attest.ImageRef{Repository: f.repo("a/app")}, "", nil, anywhere)
		want(t, err, attest.RegistryUnavailable)
	})
}

// protected puts Basic authentication before the built-in registry and keeps the
// Authorization headers it saw.
func protected(t *testing.T, user, password string) (host string, seen func() []string) {
	t.Helper()
	inner := dev.NewRegistry()
	var mu sync.Mutex
	var sent []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if a := r.Header.Get("Authorization"); a != "" && !slices.Contains(sent, a) {
			sent = append(sent, a)
		}
		mu.Unlock()
		if u, p, ok := r.BasicAuth(); !ok || u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String(), func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(sent)
	}
}

func TestCredentials(t *testing.T) {
	basic := func(user, password string) string {
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	}
	missing := func(host string) attest.ImageRef {
		return attest.ImageRef{Repository: attest.Repository(host + "/a/app"), Digest: attest.Hash(nil)}
	}
	t.Run("G16 each registry gets its own", func(t *testing.T) {
		// One file holds both, as docker's does.
		a, seenA := protected(t, "a", "pa")
		b, seenB := protected(t, "b", "pb")
		file := filepath.Join(t.TempDir(), "config.json")
		text := fmt.Sprintf(`{"auths":{%q:{"username":"a","password":"pa"},"https://%s":{"auth":%q}}}`, a, b, base64.StdEncoding.EncodeToString([]byte("b:pb")))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, registry.Config{Hosts: []registry.Host{
			{Host: a, PlainHTTP: true, Credentials: registry.Credentials{File: file}}, {Host: b, PlainHTTP: true, Credentials: registry.Credentials{File: file}}}})
		for _, host := range []string{a, b} {
			_, err := c.Image(t.Context(), missing(host), "", nil, anywhere)
			want(t, err, attest.SubjectNotFound)
		}
		if diff := cmp.Diff([]string{basic("a", "pa")}, seenA()); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{basic("b", "pb")}, seenB()); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("file changes", func(t *testing.T) {
		host, _ := protected(t, "user", "new")
		file := credentialsFile(t, host, "user", "old-password")
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: host, PlainHTTP: true, Credentials: registry.Credentials{File: file}}}})
		_, err := c.Image(t.Context(), missing(host), "", nil, anywhere)
		want(t, err, attest.RegistryDenied)
		writeCredentials(t, file, host, "user", "new")
		_, err = c.Image(t.Context(), missing(host), "", nil, anywhere)
		want(t, err, attest.SubjectNotFound)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		_, err = c.Image(t.Context(), missing(host), "", nil, anywhere)
		want(t, err, attest.BadConfig)
	})
	t.Run("G16 nothing ambient on the server", func(t *testing.T) {
		host, seen := protected(t, "user", "secret")
		t.Setenv("HOME", t.TempDir())
		t.Setenv("DOCKER_CONFIG", filepath.Dir(credentialsFile(t, host, "user", "secret")))
		_, err := newClient(t, registry.Config{Hosts: plain(host)}).Image(t.Context(), missing(host), "", nil, anywhere)
		want(t, err, attest.RegistryDenied)
		if len(seen()) > 0 {
			t.Errorf("sent %v", seen())
		}
		_, err = newClient(t, registry.Config{Hosts: plain(host), Ambient: true}).Image(t.Context(), missing(host), "", nil, anywhere)
		want(t, err, attest.SubjectNotFound)
	})
	t.Run("helper", func(t *testing.T) {
		host, seen := protected(t, "user", "secret")
		dir := t.TempDir()
		helper := filepath.Join(dir, "docker-credential-test")
		script := "#!/bin/sh\necho x >> " + filepath.Join(dir, "asked") + "\n[ \"$1\" = get ] && [ \"$(cat)\" = '" + host + "' ] && echo '{\"Username\":\"user\",\"Secret\":\"secret\"}'\n"
		if err := os.WriteFile(helper, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: host, PlainHTTP: true, Credentials: registry.Credentials{Helper: helper}}}})
		for range 3 {
			_, err := c.Image(t.Context(), missing(host), "", nil, anywhere)
			want(t, err, attest.SubjectNotFound)
		}
		if diff := cmp.Diff([]string{basic("user", "secret")}, seen()); diff != "" {
			t.Error(diff)
		}
		if asked, err := os.ReadFile(filepath.Join(dir, "asked")); err != nil || string(asked) != "x\n" {
			t.Errorf("the helper was asked %q, %v: its answer is not reused", asked, err)
		}
	})
	t.Run("helper fails and its words stay unsaid", func(t *testing.T) {
		host, seen := protected(t, "user", "secret")
		helper := filepath.Join(t.TempDir(), "docker-credential-test")
		if err := os.WriteFile(helper, []byte("#!/bin/sh\necho s3cr3t\nexit 1\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: host, PlainHTTP: true, Credentials: registry.Credentials{Helper: helper}}}})
		_, err := c.Image(t.Context(), missing(host), "", nil, anywhere)
		want(t, err, attest.BadConfig)
		if strings.Contains(err.Error(), "s3cr3t") || len(seen()) > 0 {
			t.Errorf("%v, sent %v", err, seen())
		}
	})
}

// A token that expires in the middle of an upload: go-containerregistry sends the
// request again, whose body has been read. Over HTTP/1 net/http notices.
func TestUploadAfterTokenExpired(t *testing.T) {
	inner := dev.NewRegistry()
	var puts, tokens atomic.Int64
	var self string
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			fmt.Fprintf(w, `{"token":"t%d"}`, tokens.Add(1))
			return
		case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/"):
			if puts.Add(1) > 1 {
				break
			}
			io.Copy(io.Discard, r.Body)
			fallthrough
		case r.URL.Path == "/v2/":
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://`+self+`/token",service="x",scope="repository:a/app:push,pull"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	self = srv.Listener.Addr().String()
	// The image is pushed past the authentication.
	direct := httptest.NewServer(inner)
	t.Cleanup(direct.Close)
	ref := push(t, direct.Listener.Addr().String()+"/a/app", "1", image(t, "x"))
	ref.Repository = attest.Repository(self + "/a/app")
	f := &fake{Server: srv}
	c := newClient(t, registry.Config{Hosts: []registry.Host{{Host: self, CAFile: f.caFile(t)}}})
	want(t, c.Attach(t.Context(), ref, []byte("bundle"), "type", time.Unix(0, 0)), "")
	if puts.Load() < 2 {
		t.Error("no upload was refused: the test does not test")
	}
}

// proxy puts intercept before a registry; intercept answers by itself or returns
// false.
func proxy(t testing.TB, host string, intercept func(w http.ResponseWriter, r *http.Request) bool) string {
	t.Helper()
	p := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: host})
	p.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !intercept(w, r) {
			p.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}
