package identity_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/c2sp/wycheproof"
	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/identity"
)

// vectors is a file of JOSE vectors of Project Wycheproof.
type vectors struct {
	Groups []vectorGroup `json:"testGroups"`
}

type vectorGroup struct {
	Comment string          `json:"comment"`
	Private json.RawMessage `json:"private"`
	Public  json.RawMessage `json:"public"` // none of a secret
	Tests   []struct {
		ID      int             `json:"tcId"`
		Comment string          `json:"comment"`
		JWS     json.RawMessage `json:"jws"` // a text, or an object in JSON serialisation
		JWE     json.RawMessage `json:"jwe"`
		Result  string          `json:"result"`
	} `json:"tests"`
}

// keys returns the JWK set that a verifier of the group is given.
func (g vectorGroup) keys() []byte {
	key := g.Public
	if key == nil {
		key = g.Private
	}
	if strings.Contains(string(key), `"keys"`) {
		return key
	}
	return []byte(fmt.Sprintf(`{"keys":[%s]}`, key))
}

// A01, A18, A26, A27, A28, H06: no invalid vector of Project Wycheproof is accepted,
// and each is refused by what comes before the claims are read: their payloads are
// no claims, which would refuse them anyway. The valid ones show that this is not
// because everything is refused. Those of them that are refused are signed with a
// secret (HS256, JWE), have an empty payload or characters outside of the alphabet, or
// a key that is, by its alg, for another algorithm.
func TestWycheproof(t *testing.T) {
	for file, want := range map[string]map[string]int{
		"json_web_signature_test.json": {
			"invalid TOKEN_ALGORITHM": 11, "invalid TOKEN_HEADER": 1, "invalid TOKEN_KEY_UNKNOWN": 6, "invalid TOKEN_MALFORMED": 44,
			"invalid TOKEN_MISSING": 3, "invalid TOKEN_SIGNATURE": 290,
			"valid": 26, "valid TOKEN_ALGORITHM": 12, "valid TOKEN_MALFORMED": 8,
		},
		"json_web_key_test.json": {
			"invalid TOKEN_ALGORITHM": 13, "invalid TOKEN_KEY_UNKNOWN": 6, "invalid TOKEN_MALFORMED": 2,
			"valid": 1, "valid TOKEN_ALGORITHM": 4,
		},
		"json_web_crypto_test.json": {
			"invalid TOKEN_ALGORITHM": 6, "invalid TOKEN_HEADER": 1, "invalid TOKEN_KEY_UNKNOWN": 3, "invalid TOKEN_MALFORMED": 60,
			"invalid TOKEN_MISSING": 3, "invalid TOKEN_SIGNATURE": 4,
			"valid": 2, "valid TOKEN_ALGORITHM": 2, "valid TOKEN_MALFORMED": 2,
		},
	} {
		t.Run(file, func(t *testing.T) {
			raw, err := fs.ReadFile(wycheproof.TestVectors, file)
			if err != nil {
				t.Fatal(err)
			}
			var v vectors
			if err := json.Unmarshal(raw, &v); err != nil {
				t.Fatal(err)
			}
			got := map[string]int{}
			for _, g := range v.Groups {
				for _, tc := range g.Tests {
					raw := append(tc.JWS, tc.JWE...) // one of them is there
					text := string(raw)
					if strings.HasPrefix(text, `"`) {
						if err := json.Unmarshal(raw, &text); err != nil {
							t.Fatal(err)
						}
					}
					_, err := identity.VerifyJWS(text, g.keys())
					got[strings.TrimSpace(tc.Result+" "+string(attest.ReasonOf(err)))]++
					if err == nil && tc.Result != "valid" {
						t.Errorf("accepted vector %d (%s: %s)", tc.ID, g.Comment, tc.Comment)
					}
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("results (-want +got):\n%s", diff)
			}
		})
	}
}
