package identity_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/dev"
)

const (
	service = "https://hallmark.example.com"
	commit  = "4be1d0c7a2f6b8d9e0f1a2b3c4d5e6f708192a3b"
	ref     = "refs/heads/main"
)

var b64 = base64.RawURLEncoding.EncodeToString

// clock is the time that the issuer and the authenticator share.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

func startIssuer(t *testing.T, c *clock, alg string) *dev.Issuer {
	t.Helper()
	i, err := dev.StartIssuer(t.Context(), dev.IssuerConfig{Now: c.Now, Algorithm: alg})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Close() })
	return i
}

func gitHubIssuer(i *dev.Issuer) identity.Issuer {
	return identity.Issuer{
		Name: "github", Provider: "github", Issuer: i.URL(), PlainHTTP: true, Owners: []string{dev.GitHubID("acme")},
	}
}

func newAuth(t *testing.T, c *clock, issuers ...identity.Issuer) *identity.Authenticator {
	t.Helper()
	a, err := identity.New(identity.Config{Audience: service, Issuers: issuers, Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// job returns good claims with changes laid over them; nil leaves one out.
func job(changes map[string]any) map[string]any {
	all := dev.GitHubClaims("acme/api", commit, ref)
	all["aud"] = service
	maps.Copy(all, changes)
	return all
}

func mint(t *testing.T, i *dev.Issuer, claims map[string]any) string {
	t.Helper()
	token, err := i.Mint(claims)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// refused asserts the reason, that no identity came with it, and that the error
// repeats no part of the token.
func refused(t *testing.T, a *identity.Authenticator, token string, want attest.Reason) {
	t.Helper()
	id, err := a.Authenticate(t.Context(), token)
	if got := attest.ReasonOf(err); got != want {
		t.Fatalf("Authenticate: %v: reason %q, want %q", err, got, want)
	}
	if diff := cmp.Diff(attest.Identity{}, id); diff != "" {
		t.Fatalf("A17: an identity came with the error:\n%s", diff)
	}
	for part := range strings.SplitSeq(token, ".") {
		if len(part) > 8 && strings.Contains(err.Error(), part) {
			t.Fatalf("L01: the error repeats the token: %v", err)
		}
	}
}

func accepted(t *testing.T, a *identity.Authenticator, token string) attest.Identity {
	t.Helper()
	id, err := a.Authenticate(t.Context(), token)
	if err != nil {
		t.Fatalf("Authenticate: %v", err)
	}
	return id
}

func TestGitHub(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	got := accepted(t, a, mint(t, i, job(map[string]any{
		"jti": "one", "environment": "release", "nbf": c.Now().Unix(),
		// A called workflow of another repository runs the job.
		"job_workflow_ref": "acme/pipelines/.github/workflows/build@v2.yml@refs/tags/v2", "job_workflow_sha": strings.Repeat("ab", 20),
	})))
	sum := sha256.Sum256([]byte(i.URL() + "\none"))
	const repo, file = "https://github.com/acme/api", "/.github/workflows/release.yml"
	signer := "https://github.com/acme/pipelines/.github/workflows/build@v2.yml@refs/tags/v2"
	want := attest.Identity{
		IssuerName: "github", Provider: "github", Kind: attest.Workload, Issuer: i.URL(),
		Subject: "repo:acme@" + dev.GitHubID("acme") + "/api@" + dev.GitHubID("acme/api") + ":ref:refs/heads/main",
		SAN:     signer, TokenID: hex.EncodeToString(sum[:]), Expires: c.Now().Add(5 * time.Minute),
		Build: attest.Build{
			SourceURI: repo, Repository: "acme/api", RepositoryID: dev.GitHubID("acme/api"),
			OwnerURI: "https://github.com/acme", OwnerID: dev.GitHubID("acme"), Visibility: "private",
			Commit: commit, Ref: ref, WorkflowPath: file[1:], WorkflowName: "release",
			ConfigURI: repo + file + "@" + ref, ConfigDigest: commit,
			SignerURI: signer, SignerDigest: strings.Repeat("ab", 20),
			Event: "push", RunID: "9912", RunAttempt: "1", RunURI: repo + "/actions/runs/9912/attempts/1",
			Runner: "github-hosted", Environment: "release", Actor: "dev-one", ActorID: "583231",
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("identity (-want +got):\n%s", diff)
	}
}

func TestGitHubServer(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	conf := gitHubIssuer(i)
	conf.ServerURL = "https://git.example.com/"
	got := accepted(t, newAuth(t, c, conf), mint(t, i, job(nil)))
	if got.Build.SourceURI != "https://git.example.com/acme/api" || !strings.HasPrefix(got.SAN, "https://git.example.com/acme/api/.github/") {
		t.Fatalf("source %s, SAN %s: not of the configured server", got.Build.SourceURI, got.SAN)
	}
}

func TestWorkflowPath(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	for _, row := range []struct{ name, workflow, ref, want string }{
		{"plain", "acme/api/.github/workflows/release.yml@refs/heads/main", "refs/heads/main", ".github/workflows/release.yml"},
		{"at in path", "acme/api/.github/workflows/re@lease.yml@refs/heads/main", "refs/heads/main", ".github/workflows/re@lease.yml"},
		{"at in ref", "acme/api/.github/workflows/release.yml@refs/heads/a@b", "refs/heads/a@b", ".github/workflows/release.yml"},
		{"at in both", "acme/api/.github/workflows/x@refs/heads/y.yml@refs/heads/a@b", "refs/heads/a@b", ".github/workflows/x@refs/heads/y.yml"},
		{"B04 other repository", "evil/api/.github/workflows/release.yml@refs/heads/main", "refs/heads/main", ""},
		{"B04 repository with ours as prefix", "acme/api-evil/.github/workflows/release.yml@refs/heads/main", "refs/heads/main", ""},
		{"B04 other ref", "acme/api/.github/workflows/release.yml@refs/heads/evil", "refs/heads/main", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			id := accepted(t, a, mint(t, i, job(map[string]any{"workflow_ref": row.workflow, "ref": row.ref})))
			if id.Build.WorkflowPath != row.want {
				t.Fatalf("workflow path %q, want %q", id.Build.WorkflowPath, row.want)
			}
			if want := "https://github.com/" + row.workflow; id.Build.ConfigURI != want {
				t.Fatalf("config URI %q, want %q", id.Build.ConfigURI, want)
			}
		})
	}
}

// Claims that the issuer signed and that must be refused all the same.
func TestClaimsRefused(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	accepted(t, a, mint(t, i, job(nil)))
	now := c.Now().Unix()
	type row struct {
		name  string
		claim string
		value any
		want  attest.Reason
	}
	rows := []row{
		{"A06 no iss", "iss", nil, attest.TokenClaims},
		{"A10 issuer as prefix", "iss", i.URL() + ".evil.example", attest.IssuerNotAllowed},
		{"A10 issuer as suffix", "iss", "https://evil.example/?" + i.URL(), attest.IssuerNotAllowed},
		{"A10 trailing slash", "iss", i.URL() + "/", attest.IssuerNotAllowed},
		{"A11 user in issuer", "iss", strings.Replace(i.URL(), "://", "://x@", 1), attest.IssuerNotAllowed},
		{"A11 list of issuers", "iss", []string{i.URL()}, attest.TokenClaims},

		{"A14 missing", "aud", nil, attest.TokenAudience},
		{"A14 other", "aud", "https://other.example.com", attest.TokenAudience},
		{"A14 longer", "aud", service + ".evil.example", attest.TokenAudience},
		{"A14 shorter", "aud", service[:len(service)-1], attest.TokenAudience},
		{"A14 trailing slash", "aud", service + "/", attest.TokenAudience},
		{"A14 case", "aud", strings.ToUpper(service), attest.TokenAudience},
		{"A14 empty", "aud", "", attest.TokenAudience},
		{"A14 empty list", "aud", []string{}, attest.TokenAudience},
		{"A14 ours and another", "aud", []string{service, "https://other.example.com"}, attest.TokenAudience},
		{"A14 ours twice", "aud", []string{service, service}, attest.TokenAudience},
		{"A14 list of list", "aud", [][]string{{service}}, attest.TokenAudience},
		{"A14 object", "aud", map[string]string{service: service}, attest.TokenAudience},
		{"A14 null", "aud", json.RawMessage("null"), attest.TokenAudience},

		{"A15 expired", "exp", now, attest.TokenExpired},
		{"A15 no exp", "exp", nil, attest.TokenClaims},
		{"A15 no iat", "iat", nil, attest.TokenClaims},
		{"A15 no nbf", "nbf", nil, attest.TokenClaims},
		{"A15 not yet, nbf", "nbf", now + 31, attest.TokenNotYetValid},
		{"A15 not yet, iat", "iat", now + 31, attest.TokenNotYetValid},
		{"A15 too long", "exp", now + 3601, attest.TokenLifetime},
		{"A15 string", "exp", "2000000000", attest.TokenClaims},
		{"A15 null", "exp", json.RawMessage("null"), attest.TokenClaims},
		{"J05 float", "exp", json.RawMessage("1795176060.5"), attest.TokenClaims},
		{"J05 exponent", "exp", json.RawMessage("1.8e9"), attest.TokenClaims},
		{"J05 overflow", "exp", json.RawMessage("18446744073709551617"), attest.TokenClaims},
		{"J05 wraps to a good time", "iat", json.RawMessage("18446744075504728000"), attest.TokenClaims},
		{"J05 after year 9999", "exp", int64(253402300800), attest.TokenClaims},
		{"J05 negative", "iat", -5, attest.TokenClaims},
		{"J05 zero", "nbf", 0, attest.TokenClaims},

		{"A23 no sub", "sub", nil, attest.TokenClaims},
		{"A23 empty sub", "sub", "", attest.TokenClaims},
		{"A23 long sub", "sub", strings.Repeat("s", 2049), attest.TokenClaims},
		{"A23 empty jti", "jti", "", attest.TokenClaims},
		{"A23 jti a number", "jti", 7, attest.TokenClaims},
		{"A21 float id", "repository_id", json.RawMessage("1.2e+19"), attest.TokenClaims},
		{"A21 id as number", "repository_id", 1296269, attest.TokenClaims},
		{"A21 id not numeric", "repository_id", "12a", attest.TokenClaims},
		{"A21 id with leading zero", "repository_owner_id", "0" + dev.GitHubID("acme"), attest.TokenClaims},
		{"J05 id too long", "run_id", "99999999999999999999", attest.TokenClaims},
		{"J05 run id", "run_id", "9912/../1", attest.TokenClaims},
		{"J05 attempt", "run_attempt", "-1", attest.TokenClaims},
		{"J05 actor id", "actor_id", "me", attest.TokenClaims},

		{"B03 name kept, other owner", "repository_owner_id", "666", attest.OwnerNotAllowed},
		{"B03 owner not of the repository", "repository_owner", "other", attest.TokenClaims},
		{"B09 short commit", "sha", commit[:12], attest.TokenClaims},
		{"B09 name for a commit", "sha", "HEAD", attest.TokenClaims},
		{"B09 upper case", "sha", strings.ToUpper(commit), attest.TokenClaims},
		{"B09 zero padded", "sha", commit + " ", attest.TokenClaims},
		{"B09 workflow commit", "workflow_sha", "main", attest.TokenClaims},
		{"B09 called workflow commit", "job_workflow_sha", "main", attest.TokenClaims},
		{"B09 short ref", "ref", "main", attest.TokenClaims},
		{"B12 homoglyph", "repository", "аcme/api", attest.TokenClaims},
		{"B12 percent", "repository", "acme%2Fapi/x", attest.TokenClaims},
		{"B12 three segments", "repository", "acme/api/x", attest.TokenClaims},
		{"B12 parent", "repository", "acme/..", attest.TokenClaims},
		{"B12 white space", "repository", "acme/api ", attest.TokenClaims},
		{"B12 percent in workflow", "job_workflow_ref", "acme/api/.github/workflows/a%20b.yml@refs/heads/main", attest.TokenClaims},
		{"B12 parent in workflow", "job_workflow_ref", "acme/api/../../evil/api/x.yml@refs/heads/main", attest.TokenClaims},
		{"B12 parent in ref", "ref", "refs/heads/../tags/v1", attest.TokenClaims},
		{"B04 workflow without ref", "workflow_ref", "acme/api/.github/workflows/release.yml", attest.TokenClaims},
		{"B04 workflow without path", "job_workflow_ref", "acme/api@refs/heads/main", attest.TokenClaims},
		{"J04 event", "event_name", "push x", attest.TokenClaims},
		{"J04 newline", "sub", "a\nb", attest.TokenClaims},
		{"J04 escape", "workflow", "\x1b[31mred", attest.TokenClaims},
		{"J04 NUL", "actor", "a\x00", attest.TokenClaims},
		{"J04 C1 control", "actor", "a\u0085", attest.TokenClaims},
		{"J04 bidi", "environment", "release\u202e", attest.TokenClaims},
		{"J04 line separator", "environment", "release\u2028", attest.TokenClaims},
		{"J04 paragraph separator", "environment", "release\u2029", attest.TokenClaims},
		{"J04 lone surrogate", "environment", json.RawMessage(`"a\ud800"`), attest.TokenClaims},
		{"J04 jti", "jti", "a\nb", attest.TokenClaims},
		{"optional of another type", "environment", []string{"release"}, attest.TokenClaims},
		{"optional too long", "environment", strings.Repeat("e", 2049), attest.TokenClaims},
	}
	for _, name := range []string{
		"repository", "repository_id", "repository_owner_id", "sha", "ref", "event_name", "workflow_ref",
		"job_workflow_ref", "run_id", "run_attempt", "runner_environment",
	} {
		rows = append(rows, row{"A23 no " + name, name, nil, attest.TokenClaims},
			row{"A23 empty " + name, name, "", attest.TokenClaims},
			row{"A23 null " + name, name, json.RawMessage("null"), attest.TokenClaims},
			row{"A23 list " + name, name, []string{"1"}, attest.TokenClaims})
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			refused(t, a, mint(t, i, job(map[string]any{row.claim: row.value})), row.want)
		})
	}
}

// Times in seconds from now; the issuer allows ten minutes and an age of five.
func TestTimes(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	conf := gitHubIssuer(i)
	conf.MaxLifetime, conf.MaxAge = 10*time.Minute, 5*time.Minute
	a := newAuth(t, c, conf)
	for _, row := range []struct {
		name          string
		iat, nbf, exp int64
		want          attest.Reason
	}{
		{"good", 0, -600, 300, ""},
		{"last second", -299, -299, 1, ""},
		{"iat within the leeway", 30, 0, 300, ""},
		{"nbf within the leeway", 0, 30, 300, ""},
		{"longest life", 0, 0, 600, ""},
		{"oldest", -300, -300, 60, ""},
		{"A15 expired now", -60, -60, 0, attest.TokenExpired},
		{"A15 no leeway for exp", -60, -60, -1, attest.TokenExpired},
		{"A15 iat beyond the leeway", 31, 0, 300, attest.TokenNotYetValid},
		{"A15 nbf beyond the leeway", 0, 31, 300, attest.TokenNotYetValid},
		{"A15 lives too long", 0, 0, 601, attest.TokenLifetime},
		{"A15 lives too long since iat", -200, 0, 401, attest.TokenLifetime},
		{"A15 expires before it is issued", 20, 0, 20, attest.TokenLifetime},
		{"A15 too old", -301, -301, 60, attest.TokenExpired},
	} {
		t.Run(row.name, func(t *testing.T) {
			now := c.Now().Unix()
			token := mint(t, i, job(map[string]any{"iat": now + row.iat, "nbf": now + row.nbf, "exp": now + row.exp}))
			if row.want == "" {
				accepted(t, a, token)
				return
			}
			refused(t, a, token, row.want)
		})
	}
}

// A21, A22: payloads that no JSON encoder writes.
func TestPayloads(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	now := c.Now().Unix()
	good := string(mustJSON(t, job(map[string]any{"iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60})))
	with := func(more string) string { return good[:len(good)-1] + "," + more + "}" }
	for _, row := range []struct {
		name, payload string
		want          attest.Reason
	}{
		{"good", good, ""},
		{"white space", " " + good + "\n", ""},
		{"other claims", with(`"x":{"y":[1,2,{"z":null}],"repository":"evil/x"}`), ""},
		{"A22 duplicate", with(`"repository_id":"1"`), attest.TokenClaims},
		{"A22 duplicate, escaped", with(`"repository\u005fid":"1"`), attest.TokenClaims},
		{"A22 duplicate iss", with(`"iss":"https://evil.example"`), attest.TokenClaims},
		{"A22 other case", with(`"Repository_ID":"1"`), attest.TokenClaims},
		{"A22 long s", with(`"\u017fha":"1"`), attest.TokenClaims},
		{"A22 Kelvin sign", with(`"wor\u212aflow":"x"`), attest.TokenClaims},
		{"A22 duplicate within", with(`"x":{"y":1,"y":2}`), attest.TokenClaims},
		{"A22 duplicate within a list", with(`"x":[{"y":1,"Y":2}]`), attest.TokenClaims},
		{"A22 trailing object", good + good, attest.TokenClaims},
		{"A22 trailing text", good + "x", attest.TokenClaims},
		{"A22 comment", good + "//", attest.TokenClaims},
		{"A22 byte order mark", "\ufeff" + good, attest.TokenClaims},
		{"A22 bad UTF-8", with("\"x\":\"\xff\""), attest.TokenClaims},
		{"A22 list", "[" + good + "]", attest.TokenClaims},
		{"A22 null", "null", attest.TokenClaims},
		{"A22 text", `"x"`, attest.TokenClaims},
		{"A22 not JSON", "x", attest.TokenClaims},
		{"A22 half", good[:len(good)/2], attest.TokenClaims},
		{"A12 deep", with(`"x":` + strings.Repeat("[", 4000) + strings.Repeat("]", 4000)), attest.TokenClaims},
		{"A12 just too deep", with(`"x":` + strings.Repeat("[", 17) + strings.Repeat("]", 17)), attest.TokenClaims},
	} {
		t.Run(row.name, func(t *testing.T) {
			token, err := i.MintRaw(nil, []byte(row.payload))
			if err != nil {
				t.Fatal(err)
			}
			if row.want == "" {
				accepted(t, a, token)
				return
			}
			refused(t, a, token, row.want)
		})
	}
}

// Headers over a payload and signature that are good.
func TestHeaders(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60}))
	kid := `"kid":"` + i.KeyID() + `"`
	own := string(mustJSON(t, i.Keys().Keys[0]))
	for _, row := range []struct {
		name, header string
		want         attest.Reason
	}{
		{"good", `{"alg":"RS256",` + kid + `}`, ""},
		{"GitHub's thumbprint", `{"typ":"JWT","alg":"RS256","x5t":"abc",` + kid + `}`, ""},
		{"type of an access token", `{"typ":"application/at+JWT","alg":"RS256",` + kid + `}`, ""},
		{"no kid and one key", `{"alg":"RS256"}`, ""},
		{"A01 none", `{"alg":"none",` + kid + `}`, attest.TokenAlgorithm},
		{"A01 None", `{"alg":"None",` + kid + `}`, attest.TokenAlgorithm},
		{"A01 nOnE", `{"alg":"nOnE",` + kid + `}`, attest.TokenAlgorithm},
		{"A01 empty", `{"alg":"",` + kid + `}`, attest.TokenAlgorithm},
		{"A01 missing", `{` + kid + `}`, attest.TokenAlgorithm},
		{"A01 null", `{"alg":null,` + kid + `}`, attest.TokenAlgorithm},
		{"A01 list", `{"alg":["RS256"],` + kid + `}`, attest.TokenAlgorithm},
		{"A01 other case", `{"alg":"rs256",` + kid + `}`, attest.TokenAlgorithm},
		{"A02 HMAC", `{"alg":"HS256",` + kid + `}`, attest.TokenAlgorithm},
		{"A02 not configured", `{"alg":"ES256",` + kid + `}`, attest.TokenAlgorithm},
		{"A27 PSS not configured", `{"alg":"PS256",` + kid + `}`, attest.TokenAlgorithm},
		{"A03 jwk", `{"alg":"RS256",` + kid + `,"jwk":` + own + `}`, attest.TokenHeader},
		{"A03 jwk in upper case", `{"alg":"RS256",` + kid + `,"JWK":` + own + `}`, attest.TokenHeader},
		{"A03 jwk with a Kelvin sign", `{"alg":"RS256",` + kid + `,"jw\u212a":` + own + `}`, attest.TokenHeader},
		{"A03 x5c", `{"alg":"RS256",` + kid + `,"x5c":["MII"]}`, attest.TokenHeader},
		{"A03 null jwk", `{"alg":"RS256",` + kid + `,"jwk":null}`, attest.TokenHeader},
		{"A04 jku", `{"alg":"RS256",` + kid + `,"jku":"https://evil.example/keys"}`, attest.TokenHeader},
		{"A04 x5u", `{"alg":"RS256",` + kid + `,"x5u":"https://evil.example/cert"}`, attest.TokenHeader},
		{"A13 crit", `{"alg":"RS256",` + kid + `,"crit":["exp"]}`, attest.TokenHeader},
		{"A13 empty crit", `{"alg":"RS256",` + kid + `,"crit":[]}`, attest.TokenHeader},
		{"A13 b64", `{"alg":"RS256",` + kid + `,"b64":false}`, attest.TokenHeader},
		{"A13 zip", `{"alg":"RS256",` + kid + `,"zip":"DEF"}`, attest.TokenHeader},
		{"A13 enc", `{"alg":"RS256",` + kid + `,"enc":"A256GCM"}`, attest.TokenHeader},
		{"A13 PBES2", `{"alg":"PBES2-HS256+A128KW",` + kid + `,"p2c":2147483647,"p2s":"AA"}`, attest.TokenHeader},
		{"A22 two algs", `{"alg":"RS256","alg":"none",` + kid + `}`, attest.TokenHeader},
		{"A22 two spellings of alg", `{"alg":"RS256","Alg":"none",` + kid + `}`, attest.TokenHeader},
		{"A22 alg in another case", `{"ALG":"RS256",` + kid + `}`, attest.TokenAlgorithm},
		{"A22 two kids", `{"alg":"RS256",` + kid + `,"KID":"x"}`, attest.TokenHeader},
		{"A22 not an object", `["RS256"]`, attest.TokenHeader},
		{"A22 trailing", `{"alg":"RS256",` + kid + `}{}`, attest.TokenHeader},
		{"A22 not JSON", `alg=RS256`, attest.TokenHeader},
		{"other type", `{"typ":"logout+jwt","alg":"RS256",` + kid + `}`, attest.TokenHeader},
		{"type a number", `{"typ":1,"alg":"RS256",` + kid + `}`, attest.TokenHeader},
		{"A05 kid a number", `{"alg":"RS256","kid":1}`, attest.TokenHeader},
		{"A05 kid empty", `{"alg":"RS256","kid":""}`, attest.TokenHeader},
		{"A05 kid long", `{"alg":"RS256","kid":"` + strings.Repeat("k", 257) + `"}`, attest.TokenHeader},
		{"J04 kid with newline", `{"alg":"RS256","kid":"a\nb"}`, attest.TokenHeader},
		{"A11 kid as path", `{"alg":"RS256","kid":"../../etc/passwd"}`, attest.TokenKeyUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			token, err := i.MintBytes([]byte(row.header), payload)
			if err != nil {
				t.Fatal(err)
			}
			if row.want == "" {
				accepted(t, a, token)
				return
			}
			refused(t, a, token, row.want)
		})
	}
}

// The text of a token: one token has one text, and a hostile one costs little.
func TestText(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	good := mint(t, i, job(nil))
	accepted(t, a, good)
	parts := strings.Split(good, ".")
	head, body, sig := parts[0], parts[1], parts[2]
	// 256 bytes of RSA signature end in a character with four unused bits.
	unused := sig[:len(sig)-1] + string(nextInAlphabet(sig[len(sig)-1]))
	for _, row := range []struct {
		name, token string
		want        attest.Reason
	}{
		{"A12 empty", "", attest.TokenMissing},
		{"A12 one part", head, attest.TokenMalformed},
		{"A12 two parts", head + "." + body, attest.TokenMalformed},
		{"A12 four parts", good + ".", attest.TokenMalformed},
		{"A13 five parts of a JWE", good + ".x.y", attest.TokenMalformed},
		{"A12 dots", strings.Repeat(".", 16<<10), attest.TokenMalformed},
		{"A12 too large", good + strings.Repeat("A", 16<<10), attest.TokenMalformed},
		{"A12 far too large", strings.Repeat(".", 8<<20), attest.TokenMalformed},
		{"A01 no signature", head + "." + body + ".", attest.TokenMalformed},
		{"A01 no header", "." + body + "." + sig, attest.TokenMalformed},
		{"detached payload", head + ".." + sig, attest.TokenMalformed},
		{"A18 padded", good + "==", attest.TokenMalformed},
		{"A18 padded payload", head + "." + body + "=." + sig, attest.TokenMalformed},
		{"A18 unused bits", head + "." + body + "." + unused, attest.TokenMalformed},
		{"A18 line break", good + "\n", attest.TokenMalformed},
		{"A18 line break within", head + "." + body[:9] + "\r\n" + body[9:] + "." + sig, attest.TokenMalformed},
		{"A18 leading blank", " " + good, attest.TokenMalformed},
		{"A18 plain base64", strings.Replace(good, sig, strings.Repeat("+/", len(sig)/2), 1), attest.TokenMalformed},
		{"A25 two tokens", good + "," + good, attest.TokenMalformed},
		{"JSON serialisation", `{"payload":"` + body + `","protected":"` + head + `","signature":"` + sig + `"}`, attest.TokenMalformed},
		{"A16 cut signature", good[:len(good)-2], attest.TokenSignature},
		{"A16 other signature", head + "." + body + "." + b64(make([]byte, 256)), attest.TokenSignature},
		{"A16 other payload", head + "." + b64(mustJSON(t, job(map[string]any{"iss": i.URL(), "exp": 1}))) + "." + sig, attest.TokenSignature},
	} {
		t.Run(row.name, func(t *testing.T) { refused(t, a, row.token, row.want) })
	}
	// Who sends an encrypted token is told so.
	if _, err := a.Authenticate(t.Context(), good+".x.y"); !strings.Contains(err.Error(), "three parts") {
		t.Errorf("five parts: %v", err)
	}
	// What nobody may use is refused for itself, whatever the issuer.
	none := b64([]byte(`{"alg":"none"}`)) + "." + b64([]byte(`{"iss":"https://unknown.example"}`)) + "." + sig
	refused(t, a, none, attest.TokenAlgorithm)
}

// nextInAlphabet returns the character that differs from c in the lowest bit.
func nextInAlphabet(c byte) byte {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return alphabet[strings.IndexByte(alphabet, c)^1]
}

// A02: the issuer's public key, in every form that it is published in, as the
// secret of an HMAC.
func TestA02PublicKeyAsSecret(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	now := c.Now().Unix()
	public := i.Keys().Keys[0]
	der, err := x509.MarshalPKIXPublicKey(public.Key)
	if err != nil {
		t.Fatal(err)
	}
	input := b64([]byte(`{"alg":"HS256","kid":"`+i.KeyID()+`"}`)) + "." +
		b64(mustJSON(t, job(map[string]any{"iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60})))
	for name, secret := range map[string][]byte{
		"DER": der, "PEM": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), "JWK": mustJSON(t, public),
	} {
		t.Run(name, func(t *testing.T) {
			mac := hmac.New(sha256.New, secret)
			mac.Write([]byte(input))
			refused(t, a, input+"."+b64(mac.Sum(nil)), attest.TokenAlgorithm)
		})
	}
}

// A06: the key of one configured issuer says nothing for another, also under the
// other's kid.
func TestA06KeyOfAnotherIssuer(t *testing.T) {
	c := newClock()
	good, evil := startIssuer(t, c, ""), startIssuer(t, c, "")
	second := gitHubIssuer(evil)
	second.Name = "second"
	a := newAuth(t, c, gitHubIssuer(good), second)
	accepted(t, a, mint(t, good, job(nil)))
	accepted(t, a, mint(t, evil, job(nil)))
	refused(t, a, mint(t, evil, job(map[string]any{"iss": good.URL()})), attest.TokenKeyUnknown)
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": good.URL(), "iat": now, "nbf": now, "exp": now + 60}))
	for _, header := range []map[string]any{{"kid": good.KeyID()}, {"kid": nil}} {
		token, err := evil.MintRaw(header, payload)
		if err != nil {
			t.Fatal(err)
		}
		refused(t, a, token, attest.TokenSignature)
	}
}

// B02: whatever sub says, the build is what the other claims say.
func TestB02SubjectIsNotParsed(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	want := accepted(t, a, mint(t, i, job(nil))).Build
	for _, sub := range []string{
		"repo:evil/x:ref:refs/heads/main", "repo:acme/api:environment:release", "repository_id:1:workflow_ref:evil/x", "acme%3Aapi",
	} {
		id := accepted(t, a, mint(t, i, job(map[string]any{"sub": sub})))
		if diff := cmp.Diff(want, id.Build); diff != "" || id.Subject != sub {
			t.Fatalf("sub %q changed the build or was changed to %q:\n%s", sub, id.Subject, diff)
		}
	}
}

// B03: the same name under another owner's or repository's id is another thing.
func TestB03NamesAreNotIdentity(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	a := newAuth(t, c, gitHubIssuer(i))
	renamed := map[string]any{"repository": "acme-corp/api", "repository_owner": "acme-corp"}
	if id := accepted(t, a, mint(t, i, job(renamed))); id.Build.OwnerID != dev.GitHubID("acme") {
		t.Fatalf("owner id %q: a renamed owner keeps its id", id.Build.OwnerID)
	}
	refused(t, a, mint(t, i, job(map[string]any{"repository_owner_id": dev.GitHubID("squatter")})), attest.OwnerNotAllowed)
}

// B13, A18: the id by which a stolen token is recognised is of the token, not of
// its text or of its signature.
func TestB13TokenID(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "ES256")
	conf := gitHubIssuer(i)
	conf.Algorithms = []string{"ES256"}
	a := newAuth(t, c, conf)
	one := accepted(t, a, mint(t, i, job(map[string]any{"jti": "one"})))
	two := accepted(t, a, mint(t, i, job(map[string]any{"jti": "two"})))
	c.Add(time.Second)
	again := accepted(t, a, mint(t, i, job(map[string]any{"jti": "one"})))
	if one.TokenID == two.TokenID || one.TokenID != again.TokenID {
		t.Fatalf("token ids %s, %s, %s: want one per jti", one.TokenID, two.TokenID, again.TokenID)
	}
	token := mint(t, i, job(map[string]any{"jti": nil}))
	last := strings.LastIndexByte(token, '.')
	input, sig := token[:last], token[last+1:]
	sum := sha256.Sum256([]byte(input))
	if id := accepted(t, a, token); id.TokenID != hex.EncodeToString(sum[:]) {
		t.Fatalf("token id %s is not the hash of the signing input", id.TokenID)
	}
	// (r, n-s) verifies as well: it is the same token.
	raw, err := base64.RawURLEncoding.DecodeString(sig)
	if err != nil {
		t.Fatal(err)
	}
	other := new(big.Int).Sub(elliptic.P256().Params().N, new(big.Int).SetBytes(raw[32:]))
	other.FillBytes(raw[32:])
	if id := accepted(t, a, input+"."+b64(raw)); id.TokenID != hex.EncodeToString(sum[:]) {
		t.Fatalf("token id %s changes with the signature", id.TokenID)
	}
}

// A26, A27, A28: keys that the issuer publishes, and tokens that fit them badly.
func TestKeysFitTheAlgorithm(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	conf := gitHubIssuer(i)
	conf.Algorithms = []string{"RS256", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
	rsaKey, weak := newRSA(t, 2048), newRSA(t, 1024)
	p256, p384, p521 := newEC(t, elliptic.P256()), newEC(t, elliptic.P384()), newEC(t, elliptic.P521())
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := p256.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60}))
	for _, row := range []struct {
		name    string
		key     crypto.Signer
		alg     jose.SignatureAlgorithm
		publish func(m map[string]any) // changes the published JWK
		craft   func(input string) []byte
		want    attest.Reason
	}{
		{name: "RS256", key: rsaKey, alg: jose.RS256},
		{name: "PS256", key: rsaKey, alg: jose.PS256},
		{name: "PS384", key: rsaKey, alg: jose.PS384},
		{name: "PS512", key: rsaKey, alg: jose.PS512},
		{name: "ES256", key: p256, alg: jose.ES256},
		{name: "ES384", key: p384, alg: jose.ES384},
		{name: "ES512", key: p521, alg: jose.ES512},
		{name: "EdDSA", key: ed, alg: jose.EdDSA},
		{name: "for signatures", key: p256, alg: jose.ES256, publish: set("use", "sig")},
		{name: "for verifying", key: p256, alg: jose.ES256, publish: set("key_ops", []string{"sign", "verify"})},
		{name: "of the algorithm", key: p256, alg: jose.ES256, publish: set("alg", "ES256")},
		{name: "A26 for encryption", key: p256, alg: jose.ES256, publish: set("use", "enc"), want: attest.TokenKeyUnknown},
		{name: "A26 of another use", key: p256, alg: jose.ES256, publish: set("use", "SIG"), want: attest.TokenKeyUnknown},
		{name: "A26 not for verifying", key: p256, alg: jose.ES256, publish: set("key_ops", []string{"sign"}), want: attest.TokenKeyUnknown},
		{name: "A26 for nothing", key: p256, alg: jose.ES256, publish: set("key_ops", []string{}), want: attest.TokenKeyUnknown},
		{name: "A26 use not a text", key: p256, alg: jose.ES256, publish: set("use", 1), want: attest.TokenKeyUnknown},
		{name: "A27 key for PS256, token RS256", key: rsaKey, alg: jose.RS256, publish: set("alg", "PS256"), want: attest.TokenAlgorithm},
		{name: "A27 key for RS256, token PS256", key: rsaKey, alg: jose.PS256, publish: set("alg", "RS256"), want: attest.TokenAlgorithm},
		{name: "A27 short salt", key: rsaKey, alg: jose.PS256, craft: pss(t, rsaKey, 1), want: attest.TokenSignature},
		{name: "A27 long salt", key: rsaKey, alg: jose.PS256, craft: pss(t, rsaKey, 64), want: attest.TokenSignature},
		{name: "A27 right salt", key: rsaKey, alg: jose.PS256, craft: pss(t, rsaKey, 32)},
		{name: "A27 PSS under RS256", key: rsaKey, alg: jose.RS256, craft: pss(t, rsaKey, 32), want: attest.TokenSignature},
		{name: "A28 weak RSA", key: weak, alg: jose.RS256, want: attest.TokenKeyUnknown},
		{name: "A08 huge RSA", key: rsaKey, alg: jose.RS256, publish: set("n", b64(bytes.Repeat([]byte{0xff}, 4096))), craft: zeros(4096), want: attest.TokenKeyUnknown},
		{name: "A28 P-384 key for ES256", key: p384, alg: jose.ES256, craft: zeros(64), want: attest.TokenAlgorithm},
		{name: "A28 P-256 key for ES384", key: p256, alg: jose.ES384, craft: zeros(96), want: attest.TokenAlgorithm},
		{name: "A28 P-256 key for EdDSA", key: p256, alg: jose.EdDSA, craft: zeros(64), want: attest.TokenAlgorithm},
		{name: "A28 RSA key for ES256", key: rsaKey, alg: jose.ES256, craft: zeros(64), want: attest.TokenAlgorithm},
		{name: "A28 P-256 key for RS256", key: p256, alg: jose.RS256, craft: zeros(256), want: attest.TokenAlgorithm},
		{name: "A28 Ed25519 key for ES256", key: ed, alg: jose.ES256, craft: zeros(64), want: attest.TokenAlgorithm},
		{name: "A28 r and s zero", key: p256, alg: jose.ES256, craft: zeros(64), want: attest.TokenSignature},
		{name: "A28 short signature", key: p256, alg: jose.ES256, craft: zeros(63), want: attest.TokenSignature},
		{name: "A28 point not on the curve", key: p256, alg: jose.ES256, publish: set("x", b64(make([]byte, 32))), want: attest.TokenKeyUnknown},
		{name: "A02 shared secret published", key: p256, alg: jose.ES256, publish: set("kty", "oct"), want: attest.TokenKeyUnknown},
		{name: "A03 private key published", key: p256, alg: jose.ES256, publish: set("d", b64(scalar)), want: attest.TokenKeyUnknown},
	} {
		t.Run(row.name, func(t *testing.T) {
			raw := mustJSON(t, jose.JSONWebKey{Key: row.key.Public(), KeyID: "k"})
			var m map[string]any
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatal(err)
			}
			if row.publish != nil {
				row.publish(m)
			}
			conf := conf
			conf.JWKSURI = serve(t, string(mustJSON(t, map[string]any{"keys": []any{m}}))) + "/keys"
			a := newAuth(t, c, conf)
			var token string
			if row.craft == nil {
				token = sign(t, row.key, row.alg, payload)
			} else {
				input := b64([]byte(`{"alg":"`+string(row.alg)+`","kid":"k"}`)) + "." + b64(payload)
				token = input + "." + b64(row.craft(input))
			}
			if row.want == "" {
				accepted(t, a, token)
				return
			}
			refused(t, a, token, row.want)
		})
	}
}

// A02, A27: an algorithm that fits the key but is not configured for the issuer.
func TestAlgorithmNotConfigured(t *testing.T) {
	c := newClock()
	i := startIssuer(t, c, "")
	key := newRSA(t, 2048)
	conf := gitHubIssuer(i)
	set := mustJSON(t, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k"}}})
	conf.JWKSURI = serve(t, string(set))
	a := newAuth(t, c, conf)
	now := c.Now().Unix()
	payload := mustJSON(t, job(map[string]any{"iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60}))
	accepted(t, a, sign(t, key, jose.RS256, payload))
	for _, alg := range []jose.SignatureAlgorithm{jose.PS256, jose.RS384, jose.RS512} {
		refused(t, a, sign(t, key, alg, payload), attest.TokenAlgorithm)
	}
}

func set(name string, value any) func(map[string]any) {
	return func(m map[string]any) {
		if m[name] = value; value == "oct" {
			m["k"] = b64([]byte("secret of thirty-two bytes, more"))
		}
	}
}

func zeros(n int) func(string) []byte { return func(string) []byte { return make([]byte, n) } }

func pss(t *testing.T, key *rsa.PrivateKey, salt int) func(string) []byte {
	return func(input string) []byte {
		t.Helper()
		sum := sha256.Sum256([]byte(input))
		opts := &rsa.PSSOptions{SaltLength: salt}
		sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, sum[:], opts)
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
}

func newRSA(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	if bits < 2048 {
		t.Setenv("GODEBUG", "rsa1024min=0")
	}
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newEC(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sign makes a token by go-jose, under kid "k".
func sign(t *testing.T, key crypto.Signer, alg jose.SignatureAlgorithm, payload []byte) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := s.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestA25Bearer(t *testing.T) {
	for _, row := range []struct {
		name  string
		in    []string
		token string
		want  attest.Reason
	}{
		{"one", []string{"Bearer abc"}, "abc", ""},
		{"scheme in lower case", []string{"bearer abc"}, "abc", ""},
		{"none", nil, "", attest.TokenMissing},
		{"no token", []string{"Bearer "}, "", attest.TokenMissing},
		{"no blank", []string{"Bearer"}, "", attest.TokenMissing},
		{"empty", []string{""}, "", attest.TokenMalformed},
		{"basic", []string{"Basic abc"}, "", attest.TokenMalformed},
		{"A25 two headers", []string{"Bearer abc", "Bearer def"}, "", attest.TwoIdentities},
		{"A25 the same twice", []string{"Bearer abc", "Bearer abc"}, "", attest.TwoIdentities},
		{"A25 folded", []string{"Bearer abc, Bearer def"}, "", attest.TwoIdentities},
	} {
		t.Run(row.name, func(t *testing.T) {
			token, err := identity.Bearer(row.in)
			if got := attest.ReasonOf(err); got != row.want || token != row.token {
				t.Fatalf("Bearer(%q) = %q, %v: want %q, %q", row.in, token, err, row.token, row.want)
			}
		})
	}
}

// FuzzAuthenticate feeds any three parts, and any payload under a good signature:
// an identity comes only without an error, and only for a token that says so.
func FuzzAuthenticate(f *testing.F) {
	c := newClock()
	i, err := dev.StartIssuer(context.Background(), dev.IssuerConfig{Now: c.Now})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { i.Close() })
	a, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{gitHubIssuer(i)}, Now: c.Now})
	if err != nil {
		f.Fatal(err)
	}
	header := `{"alg":"RS256","kid":"` + i.KeyID() + `"}`
	good := dev.GitHubClaims("acme/api", commit, ref)
	now := c.Now().Unix()
	maps.Copy(good, map[string]any{"aud": service, "iss": i.URL(), "iat": now, "nbf": now, "exp": now + 60})
	raw, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(header, string(raw), "c2ln", true)
	f.Add(header, string(raw), "c2ln", false)
	f.Add(`{"alg":"none"}`, `{"iss":"x","iss":"y"}`, "", true)
	f.Add(header, `{"iss":"`+i.URL()+`","exp":1e400}`, "AA", true)
	f.Fuzz(func(t *testing.T, header, payload, sig string, sealed bool) {
		token := b64([]byte(header)) + "." + b64([]byte(payload)) + "." + sig
		if sealed {
			if token, err = i.MintBytes([]byte(header), []byte(payload)); err != nil {
				t.Fatal(err)
			}
		}
		id, err := a.Authenticate(t.Context(), token)
		if err != nil {
			if got := attest.ReasonOf(err); got == attest.Internal || got == attest.KeysUnavailable {
				t.Fatalf("no reason of a token: %v", err)
			}
			if diff := cmp.Diff(attest.Identity{}, id); diff != "" {
				t.Fatalf("an identity came with the error:\n%s", diff)
			}
			return
		}
		if !json.Valid([]byte(payload)) {
			t.Fatalf("accepted what is not JSON: %q", payload)
		}
		if !sealed || id.Subject == "" || id.SAN == "" || id.Issuer != i.URL() || id.Build.OwnerID != dev.GitHubID("acme") || !attest.CommitPattern.MatchString(id.Build.Commit) {
			t.Fatalf("accepted with a hole: %+v", id)
		}
	})
}
