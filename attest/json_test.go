package attest_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
)

func TestStrictJSON(t *testing.T) {
	for _, row := range []struct {
		name, in string
		want     attest.Reason
	}{
		{"object", `{"a":1,"b":{"a":[{"a":null},{"a":true}]},"c":"a"}`, ""},
		{"scalar", `7`, ""},
		{"big number", `{"n":123456789012345678901234567890}`, ""},
		{"eight levels", strings.Repeat("[", 8) + strings.Repeat("]", 8), ""},
		{"nine levels", strings.Repeat("[", 9) + strings.Repeat("]", 9), attest.BadJSON},
		{"equal keys", `{"a":1,"a":1}`, attest.BadJSON},
		{"equal keys by escape", `{"a":1,"\u0061":1}`, attest.BadJSON},
		{"keys in other case", `{"digest":1,"Digest":1}`, attest.BadJSON},
		{"keys that fold to one", `{"ks":1,"\u212a\u017f":1}`, attest.BadJSON},
		{"equal keys after a nested object", `{"a":{"b":1},"a":2}`, attest.BadJSON},
		{"equal keys inside an array", `[{"a":1,"a":2}]`, attest.BadJSON},
		{"value equal to a key", `{"a":"b","b":"a"}`, ""},
		{"trailing value", `{} {}`, attest.BadJSON},
		{"trailing bytes", `{}x`, attest.BadJSON},
		{"nothing", ``, attest.BadJSON},
		{"cut", `{"a":`, attest.BadJSON},
		{"not UTF-8", "{\"a\":\"\xff\"}", attest.BadJSON},
		{"pair of escapes", `["\ud83d\ude00 \\ud83d"]`, ""},
		{"D04 high surrogate alone", `["\ud83d"]`, attest.BadJSON},
		{"D04 low surrogate alone", `["a\ude00"]`, attest.BadJSON},
		{"D04 two high surrogates", `["\ud83d\ud83d"]`, attest.BadJSON},
		{"D04 surrogate before another escape", `["\ud83d\n\ude00"]`, attest.BadJSON},
		{"D04 number out of range", `[1e400]`, attest.BadJSON},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := attest.ReasonOf(attest.StrictJSON([]byte(row.in), 8)); got != row.want {
				t.Errorf("StrictJSON(%q) = %q, want %q", row.in, got, row.want)
			}
		})
	}
}

// What passes is one value, and an object that passes keeps all of its keys.
func FuzzStrictJSON(f *testing.F) {
	f.Add([]byte(`{"a":1,"A":2}`))
	f.Add([]byte(`{"a":[{},[1,"x"]],"b":null}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if attest.StrictJSON(data, 8) != nil {
			return
		}
		var v any
		if err := json.Unmarshal(data, &v); err != nil {
			t.Fatalf("passed but cannot be read: %v", err)
		}
	})
}
