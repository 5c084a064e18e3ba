package identity_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
)

// defaultCluster is the iss of every cluster that was not given one.
const defaultCluster = "https://kubernetes.default.svc.cluster.local"

const (
	accountUID = "0b8a4c5e-6d0f-4b7e-9f53-0f6a1c2d3e4f"
	podUID     = "5e9d1a2b-3c4d-4e5f-8a6b-7c8d9e0f1a2b"
)

// cluster is a Kubernetes cluster as far as tokens go: a key, and its key set in a
// file.
type cluster struct {
	*dev.Issuer
	keys string
}

func newCluster(t *testing.T, c *clock) *cluster {
	t.Helper()
	k := &cluster{startIssuer(t, c, ""), filepath.Join(t.TempDir(), "cluster.jwks")}
	k.publish(t)
	return k
}

// publish writes the key set as it is now.
func (k *cluster) publish(t *testing.T) { writeFile(t, k.keys, mustJSON(t, k.Keys())) }

// writeFile replaces a file as a renewal does: by another one.
func writeFile(t *testing.T, path string, body []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", body, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func (k *cluster) issuer(name string) identity.Issuer {
	return identity.Issuer{
		Name: name, Provider: "kubernetes", Issuer: defaultCluster, KnownAs: "https://" + name + ".k8s.example.com", JWKSFile: k.keys,
	}
}

// bound returns the claims of a projected service-account token, with changes laid
// over the top level and over the claim kubernetes.io.
func bound(changes, inner map[string]any) map[string]any {
	k := map[string]any{
		"namespace":      "ci",
		"node":           map[string]any{"name": "node-1", "uid": "1f1e1d1c-1b1a-4019-8817-161514131211"},
		"pod":            map[string]any{"name": "build-api-7d4f9-x2x8p", "uid": podUID},
		"serviceaccount": map[string]any{"name": "image-builder", "uid": accountUID},
	}
	maps.Copy(k, inner)
	maps.DeleteFunc(k, func(_ string, v any) bool { return v == nil })
	all := map[string]any{
		"iss": defaultCluster, "aud": []string{service}, "sub": "system:serviceaccount:ci:image-builder", "kubernetes.io": k,
	}
	maps.Copy(all, changes)
	return all
}

func TestKubernetes(t *testing.T) {
	c := newClock()
	k := newCluster(t, c)
	conf := k.issuer("east")
	a := newAuth(t, c, conf)
	got := accepted(t, a, mint(t, k.Issuer, bound(map[string]any{"jti": "one"}, nil)))
	sum := sha256.Sum256([]byte(conf.KnownAs + "\none"))
	want := attest.Identity{
		IssuerName: "east", Provider: "kubernetes", Kind: attest.Workload, Issuer: "https://east.k8s.example.com",
		Subject: "system:serviceaccount:ci:image-builder",
		SAN:     "https://kubernetes.io/namespaces/ci/serviceaccounts/image-builder",
		TokenID: hex.EncodeToString(sum[:]), Expires: c.Now().Add(5 * time.Minute),
		Build: attest.Build{
			RunID:  podUID,
			RunURI: "https://east.k8s.example.com/namespaces/ci/pods/build-api-7d4f9-x2x8p/" + podUID,
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("identity (-want +got):\n%s", diff)
	}
	if got.Build.HasSource() {
		t.Error("a service-account token says nothing of a source")
	}
	if got := conf.KnownIssuer(); got != want.Issuer {
		t.Errorf("policies call the issuer %s, identities %s", got, want.Issuer)
	}
}

// A cluster with an iss of its own needs no other name.
func TestKubernetesOwnIssuer(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	conf := identity.Issuer{Name: "eks", Provider: "kubernetes", Issuer: i.URL(), PlainHTTP: true}
	got := accepted(t, newAuth(t, c, conf), mint(t, i, bound(map[string]any{"iss": i.URL()}, map[string]any{"node": nil})))
	if got.Issuer != i.URL() || !strings.HasPrefix(got.Build.RunURI, i.URL()+"/namespaces/ci/pods/") {
		t.Errorf("issuer %s, run %s: not of the cluster", got.Issuer, got.Build.RunURI)
	}
}

func TestKubernetesRefused(t *testing.T) {
	c := newClock()
	k := newCluster(t, c)
	a := newAuth(t, c, k.issuer("east"))
	accepted(t, a, mint(t, k.Issuer, bound(nil, nil)))
	account := func(name, uid any) map[string]any {
		return map[string]any{"serviceaccount": map[string]any{"name": name, "uid": uid}}
	}
	pod := func(name, uid any) map[string]any {
		return map[string]any{"pod": map[string]any{"name": name, "uid": uid}}
	}
	for _, row := range []struct {
		name           string
		changes, inner map[string]any
		want           attest.Reason
	}{
		{"B02 other namespace in sub", map[string]any{"sub": "system:serviceaccount:kube-system:image-builder"}, nil, attest.TokenClaims},
		{"B02 other account in sub", map[string]any{"sub": "system:serviceaccount:ci:admin"}, nil, attest.TokenClaims},
		{"B02 sub with more parts", map[string]any{"sub": "system:serviceaccount:ci:image-builder:x"}, nil, attest.TokenClaims},
		{"B02 sub of a user", map[string]any{"sub": "image-builder"}, nil, attest.TokenClaims},
		{"B02 other namespace in the object", nil, map[string]any{"namespace": "kube-system"}, attest.TokenClaims},
		{"B02 other account in the object", nil, account("admin", accountUID), attest.TokenClaims},
		{"B02 names that only together are equal", map[string]any{"sub": "system:serviceaccount:a:b:c"}, map[string]any{"namespace": "a:b", "serviceaccount": map[string]any{"name": "c", "uid": accountUID}}, attest.TokenClaims},

		{"A15 legacy token without end", map[string]any{"exp": nil}, nil, attest.TokenClaims},
		{"A15 legacy claims", map[string]any{"kubernetes.io/serviceaccount/namespace": "ci", "kubernetes.io/serviceaccount/secret.name": "builder-token"}, nil, attest.TokenClaims},
		{"A15 a year", map[string]any{"exp": c.Now().Add(365 * 24 * time.Hour).Unix()}, nil, attest.TokenLifetime},
		{"A19 bound to a secret", nil, map[string]any{"pod": nil, "secret": map[string]any{"name": "s", "uid": podUID}}, attest.TokenClaims},
		{"A19 bound to a node alone", nil, map[string]any{"pod": nil}, attest.TokenClaims},
		{"A19 bound to nothing", map[string]any{"kubernetes.io": nil}, nil, attest.TokenClaims},
		{"A14 audience of the API server", map[string]any{"aud": []string{defaultCluster}}, nil, attest.TokenAudience},
		{"A14 ours and the API server's", map[string]any{"aud": []string{service, defaultCluster}}, nil, attest.TokenAudience},

		{"A23 no account", nil, map[string]any{"serviceaccount": nil}, attest.TokenClaims},
		{"A23 no account uid", nil, account("image-builder", nil), attest.TokenClaims},
		{"A23 empty account uid", nil, account("image-builder", ""), attest.TokenClaims},
		{"A23 no pod uid", nil, pod("build", nil), attest.TokenClaims},
		{"A23 empty pod", nil, map[string]any{"pod": map[string]any{}}, attest.TokenClaims},
		{"A23 object as text", map[string]any{"kubernetes.io": `{"namespace":"ci"}`}, nil, attest.TokenClaims},
		{"A23 object as list", map[string]any{"kubernetes.io": []any{}}, nil, attest.TokenClaims},
		{"A23 pod as text", nil, map[string]any{"pod": "build"}, attest.TokenClaims},
		{"A21 uid as number", nil, account("image-builder", 1e19), attest.TokenClaims},
		{"B12 namespace in upper case", map[string]any{"sub": "system:serviceaccount:CI:image-builder"}, map[string]any{"namespace": "CI"}, attest.TokenClaims},
		{"B12 slash in the namespace", map[string]any{"sub": "system:serviceaccount:ci/x:image-builder"}, map[string]any{"namespace": "ci/x"}, attest.TokenClaims},
		{"B12 account of dots", map[string]any{"sub": "system:serviceaccount:ci:.."}, account("..", accountUID), attest.TokenClaims},
		{"B12 path in the pod's uid", nil, pod("build", "../../../x"), attest.TokenClaims},
		{"B12 path in the pod's name", nil, pod("a/../b", podUID), attest.TokenClaims},
		{"A10 other cluster's iss", map[string]any{"iss": "https://kubernetes.default.svc"}, nil, attest.IssuerNotAllowed},
		{"A10 known_as as iss", map[string]any{"iss": "https://east.k8s.example.com"}, nil, attest.IssuerNotAllowed},
	} {
		t.Run(row.name, func(t *testing.T) {
			refused(t, a, mint(t, k.Issuer, bound(row.changes, row.inner)), row.want)
		})
	}
}

// B06: clusters that share an iss are kept apart by what the operator calls them.
// Which keys are tried follows from the audience, never from which of them fit.
func TestB06ClustersApart(t *testing.T) {
	c := newClock()
	east, west := newCluster(t, c), newCluster(t, c)
	second := west.issuer("west")
	second.Audience = service + "/west"
	a := newAuth(t, c, east.issuer("east"), second)
	forWest := map[string]any{"aud": second.Audience, "jti": "one"}
	e := accepted(t, a, mint(t, east.Issuer, bound(map[string]any{"jti": "one"}, nil)))
	w := accepted(t, a, mint(t, west.Issuer, bound(forWest, nil)))

	if e.Subject != w.Subject || e.SAN != w.SAN {
		t.Fatal("the two accounts do not have the same name: the test proves nothing")
	}
	if e.Issuer == w.Issuer || e.IssuerName == w.IssuerName || e.Key() == w.Key() || e.TokenID == w.TokenID || e.Run() == w.Run() {
		t.Errorf("B06: accounts of two clusters share something:\n%+v\n%+v", e, w)
	}
	for _, row := range []struct {
		name   string
		from   *cluster
		aud    any
		want   attest.Reason
		header map[string]any
	}{
		{"B06 west's key with east's audience", west, service, attest.TokenKeyUnknown, nil},
		{"B06 east's key with west's audience", east, second.Audience, attest.TokenKeyUnknown, nil},
		{"B06 west's key under east's kid", west, service, attest.TokenSignature, map[string]any{"kid": east.KeyID()}},
		{"B06 east's key under west's kid", east, second.Audience, attest.TokenSignature, map[string]any{"kid": west.KeyID()}},
		{"B06 no kid", west, service, attest.TokenSignature, map[string]any{"kid": nil}},
		{"B06 nobody's audience", east, "https://other.example.com", attest.TokenAudience, nil},
		{"B06 both audiences", east, []string{service, second.Audience}, attest.TokenAudience, nil},
		{"B06 no audience", east, nil, attest.TokenAudience, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			now := c.Now().Unix()
			claims := bound(map[string]any{"aud": row.aud, "iat": now, "nbf": now, "exp": now + 60}, nil)
			token, err := row.from.MintRaw(row.header, mustJSON(t, claims))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, a, token, row.want)
		})
	}
}

func TestKubernetesConfig(t *testing.T) {
	c := newClock()
	k := newCluster(t, c)
	own := identity.Issuer{Name: "eks", Provider: "kubernetes", Issuer: "https://oidc.eks.example.com/id/1A2B"}
	change := func(i identity.Issuer, f func(*identity.Issuer)) []identity.Issuer {
		f(&i)
		return []identity.Issuer{i}
	}
	two := func(f func(first, second *identity.Issuer)) []identity.Issuer {
		first, second := k.issuer("east"), k.issuer("west")
		second.Audience = service + "/west"
		f(&first, &second)
		return []identity.Issuer{first, second}
	}
	big := filepath.Join(t.TempDir(), "big")
	writeFile(t, big, []byte(`{"keys":[]}`+strings.Repeat(" ", 1<<20)))
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	odd := filepath.Join(t.TempDir(), "odd")
	writeFile(t, odd, []byte(`{"keys":[],"keys":[]}`))
	for _, row := range []struct {
		name    string
		issuers []identity.Issuer
		want    string // what the error must name; "" is accepted
	}{
		{"shared iss", change(k.issuer("east"), func(*identity.Issuer) {}), ""},
		{"own iss", []identity.Issuer{own}, ""},
		{"own iss, known as something else", change(own, func(i *identity.Issuer) { i.KnownAs = "https://prod.example.com" }), ""},
		{"two that share an iss", two(func(_, _ *identity.Issuer) {}), ""},
		{"keys in a file, any provider", []identity.Issuer{{Name: "ci", Provider: "generic", Issuer: "https://ci.example.com", JWKSFile: k.keys}}, ""},

		{"B06 shared iss without a name", change(k.issuer("east"), func(i *identity.Issuer) { i.KnownAs = "" }), "known_as:"},
		{"B06 short shared iss without a name", change(k.issuer("east"), func(i *identity.Issuer) { i.Issuer, i.KnownAs = "https://kubernetes.default.svc", "" }), "known_as:"},
		{"B06 shared iss of another cluster domain", change(k.issuer("east"), func(i *identity.Issuer) { i.Issuer, i.KnownAs = "https://kubernetes.default.svc.corp.example", "" }), "known_as:"},
		{"B06 shared iss whose keys are nowhere", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSFile = "" }), "jwks_file:"},
		{"B06 one name for two", two(func(a, b *identity.Issuer) { b.KnownAs = a.KnownAs }), "twice"},
		{"B06 one name for two, with slash", two(func(a, b *identity.Issuer) { b.KnownAs = a.KnownAs + "/" }), "twice"},
		{"B06 one audience for two", two(func(_, b *identity.Issuer) { b.Audience = "" }), "audience:"},
		{"B06 one of two without a name", []identity.Issuer{own, func() identity.Issuer {
			i := own
			i.Name, i.KnownAs, i.Audience = "b", "https://b.example.com", service+"/b"
			return i
		}()}, "twice"},
		{"B06 same, other order", []identity.Issuer{func() identity.Issuer {
			i := own
			i.Name, i.KnownAs, i.Audience = "b", "https://b.example.com", service+"/b"
			return i
		}(), own}, "twice"},
		{"B06 another issuer's iss as name", []identity.Issuer{own, func() identity.Issuer { i := k.issuer("b"); i.KnownAs = own.Issuer; return i }()}, "twice"},
		{"B06 another cluster's iss as name", []identity.Issuer{
			func() identity.Issuer { i := own; i.KnownAs = "https://prod.example.com"; return i }(),
			func() identity.Issuer { i := k.issuer("b"); i.KnownAs = own.Issuer; return i }(),
		}, "known_as:"},
		{"B06 same, other order, with slash", []identity.Issuer{
			func() identity.Issuer { i := k.issuer("b"); i.KnownAs = own.Issuer + "/"; return i }(),
			func() identity.Issuer { i := own; i.KnownAs = "https://prod.example.com"; return i }(),
		}, "known_as:"},
		{"B06 name of public CI", change(k.issuer("east"), func(i *identity.Issuer) { i.KnownAs = "https://token.actions.githubusercontent.com" }), "known_as:"},
		{"B06 name that clusters share", change(k.issuer("east"), func(i *identity.Issuer) { i.KnownAs = "https://kubernetes.default.svc" }), "known_as:"},
		{"B06 name of this service", change(k.issuer("east"), func(i *identity.Issuer) { i.KnownAs = service + "/people" }), "known_as:"},
		{"B06 name without TLS", change(k.issuer("east"), func(i *identity.Issuer) { i.KnownAs = "http://east.example.com" }), "known_as:"},
		{"B06 name for another provider", []identity.Issuer{{Name: "ci", Provider: "generic", Issuer: "https://ci.example.com", KnownAs: "https://x.example.com"}}, "known_as:"},

		{"A14 audience of the API server", change(k.issuer("east"), func(i *identity.Issuer) { i.Audience = i.Issuer }), "audience:"},
		{"A14 audience of any API server", change(own, func(i *identity.Issuer) { i.Audience = "https://kubernetes.default.svc.cluster.local" }), "audience:"},
		{"A14 audience that is not ours", change(own, func(i *identity.Issuer) { i.Audience = "hallmark" }), "audience:"},
		{"A14 audience that only starts like ours", change(own, func(i *identity.Issuer) { i.Audience = service + ".evil.example" }), "audience:"},
		{"own iss with an audience below ours", change(own, func(i *identity.Issuer) { i.Audience = service + "/eks" }), ""},
		{"B06 shared iss as generic", change(k.issuer("east"), func(i *identity.Issuer) { i.Provider, i.KnownAs = "generic", "" }), "provider:"},
		{"B06 short shared iss as generic", change(k.issuer("east"), func(i *identity.Issuer) {
			i.Provider, i.KnownAs, i.Issuer = "generic", "", "https://kubernetes.default.svc"
		}), "provider:"},
		{"persons", change(own, func(i *identity.Issuer) { i.Kind = attest.Person }), "kind:"},
		{"B10 owners", change(own, func(i *identity.Issuer) { i.Owners = []string{"ci"} }), "owners:"},
		{"B10 mapping", change(own, func(i *identity.Issuer) { i.Claims = map[string]string{"commit": "x"} }), "claims:"},
		{"B10 template", change(own, func(i *identity.Issuer) { i.SAN = "https://x.example.com/{sub}" }), "san:"},
		{"B10 code host", change(own, func(i *identity.Issuer) { i.ServerURL = "https://git.example.com" }), "server_url:"},
		{"B10 trust domain", change(own, func(i *identity.Issuer) { i.TrustDomain = "example.org" }), "trust_domain:"},
		{"B10 bundle", change(own, func(i *identity.Issuer) { i.BundleFile = k.keys }), "bundle_file:"},
		{"B10 review of another provider", []identity.Issuer{{Name: "ci", Provider: "generic", Issuer: "https://ci.example.com", TokenReview: &identity.TokenReview{}}}, "token_review:"},
		{"keys in two places", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSURI = "https://east.example.com/keys" }), "jwks_uri:"},
		{"authorities that nothing uses", change(k.issuer("east"), func(i *identity.Issuer) { i.CAFile = k.keys }), "ca_file:"},
		{"no key file", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSFile += ".none" }), "jwks_file:"},
		{"directory as key file", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSFile = filepath.Dir(k.keys) }), "jwks_file:"},
		{"A08 pipe that nobody writes to", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSFile = pipe }), "jwks_file:"},
		{"A08 oversize key file", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSFile = big }), "jwks_file:"},
		{"A22 two lists of keys", change(k.issuer("east"), func(i *identity.Issuer) { i.JWKSFile = odd }), "jwks_file:"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := identity.New(identity.Config{Audience: service, Issuers: row.issuers, Now: c.Now})
			if row.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if attest.ReasonOf(err) != attest.BadConfig || !strings.Contains(err.Error(), row.want) {
				t.Fatalf("New: %v: want %s naming %q", err, attest.BadConfig, row.want)
			}
		})
	}
}

// A07: a key counts from when it is in the file until it is not.
func TestA07KeyFileIsReadAgain(t *testing.T) {
	c := newClock()
	k := newCluster(t, c)
	a := newAuth(t, c, k.issuer("east"))
	token := func() string {
		t.Helper()
		return mint(t, k.Issuer, bound(map[string]any{"exp": c.Now().Add(time.Hour).Unix()}, nil))
	}
	old := token()
	accepted(t, a, old)
	if err := k.RotateKey(); err != nil {
		t.Fatal(err)
	}
	refused(t, a, token(), attest.TokenKeyUnknown)
	k.publish(t)
	accepted(t, a, token())
	refused(t, a, old, attest.TokenKeyUnknown)

	// A file that is half written or away is no answer: what was good stays so for
	// an hour, and no longer.
	fresh := token()
	whole := mustJSON(t, k.Keys())
	writeFile(t, k.keys, whole[:len(whole)/2])
	accepted(t, a, fresh)
	c.Add(30 * time.Minute)
	accepted(t, a, fresh)
	if err := os.Remove(k.keys); err != nil {
		t.Fatal(err)
	}
	c.Add(29 * time.Minute)
	accepted(t, a, fresh)
	c.Add(2 * time.Minute)
	refused(t, a, token(), attest.KeysUnavailable)
	writeFile(t, k.keys, whole)
	accepted(t, a, token())
	// A list without keys is an answer.
	writeFile(t, k.keys, []byte(`{"keys":[]}`))
	refused(t, a, token(), attest.TokenKeyUnknown)
}

// The claims survive a round trip through JSON as Kubernetes writes it.
func TestKubernetesWarnAfter(t *testing.T) {
	c := newClock()
	k := newCluster(t, c)
	a := newAuth(t, c, k.issuer("east"))
	accepted(t, a, mint(t, k.Issuer, bound(nil, map[string]any{"warnafter": json.Number("1795176060")})))
}
