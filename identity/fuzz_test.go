package identity_test

import (
	"bytes"
	"encoding/json"
	"net/url"
	"reflect"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// FuzzClaims gives any claims to a provider, as if its own issuer had signed them:
// nothing panics, an identity never comes with an error, and whoever is known
// has a name that prints as itself, of a configured issuer.
func FuzzClaims(f *testing.F) {
	c := newClock()
	keys := testkit.StartExampleKeys(f, c.Now)
	type provider struct {
		iss  any
		aud  string
		auth *identity.Authenticator
	}
	var providers []provider
	for _, e := range testkit.Examples(f) {
		a, err := identity.New(identity.Config{Audience: service, Issuers: []identity.Issuer{keys.Trusted(f, e.Issuer)}, Now: c.Now})
		if err != nil {
			f.Fatalf("%s: %v", e.Name, err)
		}
		claims := e.At(f, c.Now(), service)
		providers = append(providers, provider{claims["iss"], claims["aud"].(string), a})
		for name, v := range claims {
			if v == nil {
				delete(claims, name)
			}
		}
		seed, err := json.Marshal(claims)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(len(providers)-1), seed)
	}
	f.Add(byte(0), []byte(`{"sub":"a","sub":"b"}`))
	f.Add(byte(1), []byte(`{"sub":"x","exp":1e400,"iat":-0,"nbf":null}`))
	f.Add(byte(2), []byte(`[]`))
	f.Fuzz(func(t *testing.T, which byte, raw []byte) {
		p := providers[int(which)%len(providers)]
		for _, payload := range [][]byte{raw, withTimes(raw, p.iss, p.aud, c.Now().Unix())} {
			id, err := p.auth.ReadClaims(payload)
			if err != nil {
				if !reflect.DeepEqual(id, attest.Identity{}) || attest.ReasonOf(err) == attest.Internal {
					t.Fatalf("%+v with %v", id, err)
				}
				continue
			}
			u, err := url.Parse(id.SAN)
			if err != nil || u.String() != id.SAN || u.Host == "" || id.Subject == "" || id.TokenID == "" {
				t.Fatalf("identity %+v", id)
			}
			if b := id.Build; b.Commit != "" && !attest.CommitPattern.MatchString(b.Commit) {
				t.Fatalf("B09 commit %q", b.Commit)
			}
		}
	})
}

// withTimes lays what every token must say over claims that are an object, so that
// the provider's mapper reads the rest.
func withTimes(raw []byte, iss any, aud string, now int64) []byte {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var claims map[string]any
	if d.Decode(&claims) != nil || claims == nil {
		return raw
	}
	delete(claims, "iss")
	if iss != nil {
		claims["iss"] = iss
	}
	claims["aud"], claims["iat"], claims["nbf"], claims["exp"] = aud, now, now, now+60
	out, err := json.Marshal(claims)
	if err != nil {
		return raw
	}
	return out
}
