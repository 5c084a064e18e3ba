package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ocireg "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/registry"
)

// An address where nobody listens: one clear line, and the code that says that
// repeating is safe.
func TestUnreachable(t *testing.T) {
	code, stdout, stderr := run1(t, &app{}, "--server", "http://127.0.0.1:1", "whoami")
	if code != exitUnavailable || stdout != "" || !strings.HasPrefix(stderr, "hallmark: cannot reach http://127.0.0.1:1: ") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
}

func TestTimeout(t *testing.T) {
	a := &app{}
	p := startPeer(t, nil)
	p.answer("GetTrustedRoot", []byte(`{"error": {"code": 14, "message": "starting"}}`))
	code, _, stderr := run1(t, a, "--server", p.url, "--timeout", "1ms", "whoami")
	if code != exitUnavailable || !strings.Contains(stderr, "no answer within 1ms (--timeout)") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	p := startPeer(t, nil)
	a := &app{stdout: io.Discard, stderr: &out, now: time.Now, getenv: func(string) string { return "" }, backoff: backoff{2, "0.01s", "0.01s"}}
	if code := run(ctx, a, []string{"--server", p.url, "trust-root"}); code != exitFailure || !strings.Contains(out.String(), "interrupted") {
		t.Errorf("exit %d: %s", code, out.String())
	}
}

// The token that is sent is the one that was given, and it is in no output.
func TestTokenIsSentAndNotShown(t *testing.T) {
	p := startPeer(t, nil)
	token := jwt("x")
	dir := t.TempDir()
	for _, output := range []string{"text", "json", "md"} {
		a := &app{getenv: func(k string) string {
			return map[string]string{"XDG_CONFIG_HOME": dir, "HALLMARK_IDENTITY_TOKEN": token}[k]
		}}
		_, stdout, stderr := run1(t, a, "--server", p.url, "-v", "--output", output, "sign", image)
		if p.token != token {
			t.Fatalf("the server got %q", p.token)
		}
		for _, part := range append(strings.Split(token, "."), token) {
			if len(part) > 8 && strings.Contains(stdout+stderr, part) {
				t.Errorf("L01 the token is shown: %s%s", stdout, stderr)
			}
		}
	}
	shown := fmt.Sprintf("%v %+v %#v %s", bearer{secret(token), true}, bearer{secret(token), true}, secret(token), secret(token))
	if strings.Contains(shown, token) {
		t.Errorf("L01 a token formats as %s", shown)
	}
}

// L03: a token is for a connection that is encrypted, or does not leave the machine.
func TestTokenNeedsEncryption(t *testing.T) {
	if !(bearer{secret: "x"}).RequireTransportSecurity() {
		t.Error("a token may be sent unencrypted to another machine")
	}
	for _, row := range []struct {
		name, server string
		plain, local bool
		bad          bool
	}{
		{"https", "https://hallmark.example.com", false, false, false},
		{"https on this machine", "https://127.0.0.1:8443", false, true, false},
		{"http on this machine", "http://127.0.0.1:8080", true, true, false},
		{"http IPv6", "http://[::1]:8080", true, true, false},
		{"http localhost", "http://localhost:8080", true, true, false},
		{"L03 http elsewhere", "http://hallmark.example.com", false, false, true},
		{"L03 http private", "http://10.0.0.1", false, false, true},
		{"L03 http name of a loopback", "http://localhost.example.com", false, false, true},
		{"L03 http other spelling", "http://127.1", false, false, true},
		{"L03 http user", "http://localhost@evil.example.com", false, false, true},
		{"no scheme", "hallmark.example.com", false, false, true},
		{"other scheme", "ftp://hallmark.example.com", false, false, true},
		{"query", "https://hallmark.example.com?x=1", false, false, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			a := &app{}
			a.Server = row.server
			got, err := a.target()
			if (err != nil) != row.bad || err != nil && exitCode(err) != exitUsage {
				t.Fatalf("target(%s): %v", row.server, err)
			}
			if err == nil && (got.plain != row.plain || got.local != row.local) {
				t.Errorf("target(%s) = %+v", row.server, got)
			}
		})
	}
}

// "localhost" that resolves to another machine is not dialled in the clear.
func TestPlainDialerChecksTheAddress(t *testing.T) {
	a := &app{stderr: io.Discard, now: time.Now, backoff: backoff{2, "0.01s", "0.01s"}}
	s, err := a.dial(target{url: "http://localhost", host: "192.0.2.1:80", plain: true, local: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.meet(t.Context()); err == nil || !strings.Contains(err.Error(), "is not this machine") {
		t.Errorf("L03: %v", err)
	}
}

// B13: a server cannot make a job ask for a token in somebody else's name.
func TestAudience(t *testing.T) {
	for _, row := range []struct {
		name, server, service, fingerprint string
		local, ok                          bool
	}{
		{"itself", "https://hallmark.example.com", "https://hallmark.example.com", "", false, true},
		{"default port given", "https://hallmark.example.com:443", "https://hallmark.example.com", "", false, true},
		{"default port in the name", "https://hallmark.example.com", "https://hallmark.example.com:443", "", false, true},
		{"another port of both", "https://hallmark.example.com:8443", "https://hallmark.example.com:8443", "", false, true},
		{"capital letters", "https://hallmark.example.com", "https://Hallmark.Example.com", "", false, true},
		{"IPv6", "https://[2001:db8::7]", "https://[2001:db8::7]:443", "", false, true},
		{"B13 another port of the host", "https://ci.example.com:9443", "https://ci.example.com", "", false, false},
		{"B13 no port of the host", "https://ci.example.com", "https://ci.example.com:9443", "", false, false},
		{"B13 a path of the host", "https://ci.example.com", "https://ci.example.com/vault", "", false, false},
		{"B13 a slash", "https://ci.example.com", "https://ci.example.com/", "", false, false},
		{"B13 a path, told by fingerprint", "https://ci.example.com", "https://ci.example.com/vault", "ab", false, false},
		{"B13 another scheme", "https://ci.example.com", "http://ci.example.com", "", false, false},
		{"B13 another scheme on the same port", "https://ci.example.com", "http://ci.example.com:443", "", false, false},
		{"on this machine", "http://127.0.0.1:8080", "https://hallmark.example.com", "", true, true},
		{"told by fingerprint", "https://10.0.0.7", "https://hallmark.example.com", "ab", false, true},
		{"B13 other host", "https://evil.example.com", "https://hallmark.example.com", "", false, false},
		{"B13 other service's audience", "https://evil.example.com", "sts.amazonaws.com", "", false, false},
		{"B13 audience with a parameter", "https://evil.example.com", "https://evil.example.com&audience=sts", "", false, false},
		{"B13 audience with a parameter, on this machine", "http://127.0.0.1", "https://hallmark.example.com&audience=sts", "", true, false},
		{"B13 audience with a query", "http://127.0.0.1", "https://127.0.0.1?audience=x", "", true, false},
		{"B13 audience with a fragment", "http://127.0.0.1", "https://127.0.0.1#x", "", true, false},
		{"no name", "http://127.0.0.1", "", "", true, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := &session{app: &app{}, server: row.server, service: row.service, local: row.local}
			s.app.TrustRootSHA256 = row.fingerprint
			got, err := s.audience()
			if (err == nil) != row.ok || err == nil && got != row.service {
				t.Errorf("audience %q, %v", got, err)
			}
		})
	}
}

// L03: a token that was given goes to the service that it is for, or to none.
func TestGivenToken(t *testing.T) {
	const service, own = "https://hallmark.example.com", "https://hallmark.example.com"
	token := func(claims string) string {
		return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".eA"
	}
	for _, row := range []struct {
		name, server, claims string
		fingerprint          string
		sent, noted          bool
	}{
		{"its own", own, `{"aud": "https://hallmark.example.com"}`, "", true, false},
		{"its own in a list", own, `{"aud": ["https://hallmark.example.com"]}`, "", true, false},
		{"under its name", own, `{"aud": "https://hallmark.example.com/east"}`, "", true, false},
		{"its own, told by fingerprint", "https://10.0.0.7", `{"aud": "https://hallmark.example.com"}`, "ab", true, false},
		{"no URL", own, `{"aud": "api://AzureADTokenExchange"}`, "", true, true},
		{"an id", own, `{"aud": ["2f9e8d7c"]}`, "", true, true},
		{"none", own, `{}`, "", true, true},
		{"L03 another service", own, `{"aud": "https://vault.example.com"}`, "", false, false},
		{"L03 another service, told by fingerprint", own, `{"aud": "https://vault.example.com"}`, "ab", false, false},
		{"L03 another service in a list", own, `{"aud": ["sts", "https://vault.example.com"]}`, "", false, false},
		{"L03 a longer name", own, `{"aud": "https://hallmark.example.com.evil.example"}`, "", false, false},
		{"L03 another port", own, `{"aud": "https://hallmark.example.com:8443"}`, "", false, false},
		{"L03 capital scheme", own, `{"aud": "HTTPS://vault.example.com"}`, "", false, false},
		{"L03 http", own, `{"aud": "http://vault.example.com"}`, "", false, false},
		{"L03 space before", own, `{"aud": " https://vault.example.com"}`, "", false, false},
		{"L03 a server that calls itself so", "https://evil.example.com", `{"aud": "https://hallmark.example.com"}`, "", false, false},
		{"L03 a port that calls itself so", "https://hallmark.example.com:9443", `{"aud": "https://hallmark.example.com"}`, "", false, false},
	} {
		for _, from := range []string{"HALLMARK_IDENTITY_TOKEN", "--identity-token"} {
			t.Run(row.name+" in "+from, func(t *testing.T) {
				var stderr bytes.Buffer
				raw := token(row.claims)
				a := &app{stderr: &stderr, stdin: strings.NewReader(raw), getenv: func(string) string { return "" }}
				a.TrustRootSHA256 = row.fingerprint
				if from == "--identity-token" {
					a.IdentityToken = "-"
				} else {
					a.getenv = func(name string) string { return map[string]string{from: raw}[name] }
				}
				got, err := a.token(t.Context(), &session{app: a, server: row.server, service: service})
				if row.sent != (err == nil && string(got) == raw) || !row.sent && (attest.ReasonOf(err) != attest.TokenAudience || got != "" || !strings.Contains(err.Error(), "was not sent")) {
					t.Errorf("%q, %v", string(got), err)
				}
				if row.noted != strings.Contains(stderr.String(), "is not https://hallmark.example.com") || strings.Contains(stderr.String(), raw) {
					t.Errorf("stderr %q", stderr.String())
				}
			})
		}
	}
}

// L03: the whole command ends before the token is on its way.
func TestGivenTokenOfAnotherServiceIsNotSent(t *testing.T) {
	p := startPeer(t, nil)
	dir := t.TempDir()
	a := &app{getenv: func(name string) string {
		return map[string]string{"XDG_CONFIG_HOME": dir, "HALLMARK_IDENTITY_TOKEN": jwt("https://vault.example.com")}[name]
	}}
	code, _, stderr := run1(t, a, "--server", p.url, "whoami")
	if calls := p.called(); code != exitNotPermitted || p.token != "" || !slices.Equal(calls, []string{"GetTrustedRoot"}) || !strings.Contains(stderr, string(attest.TokenAudience)) {
		t.Errorf("exit %d, calls %v: %s", code, calls, stderr)
	}
}

func TestAudiences(t *testing.T) {
	for _, row := range []struct {
		name, token string
		want        int
	}{
		{"one", jwt("a"), 1},
		{"several", "x.eyJhdWQiOlsiYSIsImIiXX0.y", 2},
		{"none", "x.e30.y", 0},
		{"number", "x.eyJhdWQiOjF9.y", 0},
		{"no JSON", "x.AAAA.y", 0},
		{"no base64", "x.%.y", 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := audiences(secret(row.token)); len(got) != row.want {
				t.Errorf("audiences %q, want %d", got, row.want)
			}
		})
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(jwt("a"))
	f.Add("a.b.c\n")
	f.Add("a b.c.d")
	f.Add("a\r\nx: y.c.d")
	f.Fuzz(func(t *testing.T, raw string) {
		token, err := parseToken(raw, "it")
		if err != nil {
			if err.Error() != "TOKEN_MALFORMED: it holds no JWT" {
				t.Errorf("the error shows more than where the token came from: %v", err)
			}
			return
		}
		if strings.ContainsAny(string(token), " \r\n\t") || len(token) > maxToken {
			t.Errorf("%q is no token for a header", string(token))
		}
		audiences(token)
	})
}

// The job attaches with its own rights, and looks tags up when it is asked to.
func TestAttachByClient(t *testing.T) {
	reg := httptest.NewServer(ocireg.New(ocireg.WithReferrersSupport(true), ocireg.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(reg.Close)
	host := strings.TrimPrefix(reg.URL, "http://")
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.ParseReference(host + "/payments/api:1.4")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := attest.ParseImageRef(host + "/payments/api@" + h.String())
	if err != nil {
		t.Fatal(err)
	}
	p := startPeer(t, nil)
	p.attach = hallmarkv1.AttachState_ATTACH_STATE_CLIENT

	// Plain HTTP is never assumed, not even here (attacks G15).
	if code, _, stderr := run1(t, &app{}, "--server", p.url, "sign", tag.String(), "--resolve"); code == exitOK {
		t.Fatalf("spoke plain HTTP unasked: %s", stderr)
	}
	code, stdout, stderr := run1(t, &app{}, "--server", p.url, "sign", tag.String(), "--resolve", "--attach=client", "--registry-plain-http")
	if code != exitOK || !strings.Contains(stdout, "by this job, read back") || !strings.Contains(stderr, tag.String()+" is "+ref.String()) {
		t.Fatalf("exit %d\n%s\n%s", code, stdout, stderr)
	}
	c, err := registry.New(registry.Config{Hosts: []registry.Host{{Host: host, PlainHTTP: true}}})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := c.Attached(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if len(bundles) != 2 {
		t.Fatalf("%d bundles are attached, want signature and provenance", len(bundles))
	}
	for _, raw := range bundles {
		if _, err := p.notary.Verifier.Bundle(raw, ref.Digest); err != nil {
			t.Errorf("what was attached does not verify: %v", err)
		}
	}

	// A tag that is not there.
	code, _, stderr = run1(t, &app{}, "--server", p.url, "verify", host+"/payments/api:9", "--resolve", "--registry-plain-http")
	if code != exitNotFound || !strings.Contains(stderr, string(attest.SubjectNotFound)) {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

// An image that is signed but cannot be attached is told as both.
func TestAttachFails(t *testing.T) {
	p := startPeer(t, nil)
	p.attach = hallmarkv1.AttachState_ATTACH_STATE_CLIENT
	reg := httptest.NewServer(ocireg.New(ocireg.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(reg.Close)
	missing := strings.TrimPrefix(reg.URL, "http://") + "/payments/api@sha256:" + strings.Repeat("ab", 32)
	code, stdout, _ := run1(t, &app{}, "--server", p.url, "sign", missing, "--attach=client", "--registry-plain-http")
	if code != exitNotFound || !strings.Contains(stdout, "signed and recorded, but not attached") || !strings.Contains(stdout, "records    signature 0, provenance 1") {
		t.Errorf("exit %d\n%s", code, stdout)
	}
}

// The audience of tokens is the name in the trust root, which is pinned: a server
// that calls itself otherwise is refused.
func TestServiceNameIsThatOfTheTrustRoot(t *testing.T) {
	p := startPeer(t, nil)
	n := p.notary.Signer
	answer, err := (trustPeer{p: p}).GetTrustedRoot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if answer.GetPublicUrl() != testkit.Service || answer.GetSha256() != n.Fingerprint() {
		t.Fatal("the peer does not play the service")
	}
	p.answer("GetTrustedRoot", fmt.Appendf(nil, `{"trusted_root": %q, "sha256": %q, "public_url": "https://elsewhere.example.com"}`, base64Of(n.TrustedRoot()), n.Fingerprint()))
	code, _, stderr := run1(t, &app{}, "--server", p.url, "trust-root")
	if code != exitFailure || !strings.Contains(stderr, "calls itself https://elsewhere.example.com, and its trust root is of https://hallmark.example.com") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	p = startPeer(t, nil)
	p.answer("GetTrustedRoot", fmt.Appendf(nil, `{"trusted_root": %q, "sha256": %q}`, base64Of(n.TrustedRoot()), strings.Repeat("0", 64)))
	code, _, stderr = run1(t, &app{}, "--server", p.url, "trust-root")
	if code != exitFailure || !strings.Contains(stderr, "was altered on its way") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

// M03: what the server returns has to be about what was asked, and be what it says.
func TestSignChecksTheAnswer(t *testing.T) {
	for _, row := range []struct {
		name  string
		alter func(*hallmarkv1.SignedImage)
		want  string
	}{
		{"M03 another image", func(s *hallmarkv1.SignedImage) { s.Image = strings.Replace(s.Image, "9f3c", "0000", 1) }, "the server signed"},
		{"M03 bundles swapped", func(s *hallmarkv1.SignedImage) {
			s.SignatureBundle, s.ProvenanceBundle = s.ProvenanceBundle, s.SignatureBundle
		}, string(attest.LogEntryMismatch)},
		{"M03 record of another number", func(s *hallmarkv1.SignedImage) { s.Signature.Index += 7 }, string(attest.LogEntryMismatch)},
		{"M03 record of another id", func(s *hallmarkv1.SignedImage) { s.Provenance.Id = strings.Repeat("0", 64) }, string(attest.LogEntryMismatch)},
		{"G05 a platform that was not signed", func(s *hallmarkv1.SignedImage) {
			s.Digests = append(s.Digests, attest.Hash([]byte("x")).String())
		}, string(attest.SubjectMismatch)},
		{"C13 no bundle", func(s *hallmarkv1.SignedImage) { s.ProvenanceBundle = nil }, string(attest.BundleMalformed)},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := startPeer(t, nil)
			p.alter = row.alter
			code, stdout, _ := run1(t, &app{}, "--server", p.url, "sign", image)
			if code == exitOK || !strings.Contains(stdout, "REFUSED") || !strings.Contains(stdout, row.want) {
				t.Errorf("exit %d\n%s", code, stdout)
			}
		})
	}
	p := startPeer(t, nil)
	p.answer("SignImages", []byte(`{}`))
	if code, stdout, stderr := run1(t, &app{}, "--server", p.url, "sign", image); code != exitFailure || stdout != "" || !strings.Contains(stderr, "about 0 images, not about 1") {
		t.Errorf("C13 no result: exit %d %q %q", code, stdout, stderr)
	}
}

// Two provenances that name different commits are shown as what they are.
func TestProvenanceConflictIsShown(t *testing.T) {
	p := startPeer(t, nil)
	ref, err := attest.ParseImageRef(image)
	if err != nil {
		t.Fatal(err)
	}
	other := job
	other.TokenID = strings.Repeat("b2", 32)
	other.Build.Commit = strings.Repeat("c", 40)
	for _, by := range []attest.Identity{job, other} {
		p.record(t, ref, testkit.ProvenanceStatement(t, by, attest.Image{Ref: ref, Base: attest.Base{Result: attest.Unclaimed}}), &by)
	}
	code, stdout, stderr := run1(t, &app{}, "--server", p.url, "provenance", image)
	if code != exitOK || !strings.Contains(stdout, "these provenances name different commits [PROVENANCE_CONFLICT]") {
		t.Errorf("exit %d\n%s%s", code, stdout, stderr)
	}
}

// A trust root of two services has no name that a summary could be expected from.
func TestServiceOf(t *testing.T) {
	root := testkit.NewNotary(t).Signer.TrustedRoot()
	if got, err := serviceOf(root); err != nil || got != testkit.Service {
		t.Fatalf("service %q, %v", got, err)
	}
	var doc map[string]any
	if err := json.Unmarshal(root, &doc); err != nil {
		t.Fatal(err)
	}
	authorities := doc["certificateAuthorities"].([]any)
	second := maps.Clone(authorities[0].(map[string]any))
	second["uri"] = "https://elsewhere.example.com"
	for _, row := range []struct {
		name string
		list []any
	}{{"two services", append(authorities, second)}, {"none", []any{}}} {
		t.Run(row.name, func(t *testing.T) {
			doc["certificateAuthorities"] = row.list
			raw, err := json.Marshal(doc)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := serviceOf(raw); attest.ReasonOf(err) != attest.BadConfig {
				t.Errorf("service %q, %v", got, err)
			}
		})
	}
}
