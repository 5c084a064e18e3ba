package verifier_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/verifier"
)

type inner struct {
	Key  string `json:"key"`
	Many []struct {
		N json.Number `json:"n"`
	} `json:"many"`
}

type outer struct {
	inner                   // its fields are outer's in JSON
	Named  *inner           `json:"named"`
	Free   map[string]inner `json:"free"`
	Raw    json.RawMessage  `json:"raw"`
	Any    any              `json:"any"`
	Digest attest.Digest    `json:"digest"`
	Plain  int
	Skip   string `json:"-"`
}

func TestDecode(t *testing.T) {
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	for _, row := range []struct {
		name, in string
		want     attest.Reason
	}{
		{"empty object", `{}`, ""},
		{"every field", `{"key":"k","many":[{"n":1.5}],"named":{"key":"k"},"free":{"A":{"key":"x"},"b":{}},"raw":{"X":1},"any":{"Y":[1]},"digest":"sha256:` + hex64 + `","Plain":7}`, ""},
		{"null for all", `{"key":null,"many":null,"named":null,"free":null,"any":null,"Plain":null}`, ""},
		{"D04 depth 129", `{"raw":` + deep(128) + `}`, ""},
		{"D04 depth 130", `{"raw":` + deep(129) + `}`, attest.BadJSON},
		{"D03 name twice", `{"key":"a","key":"b"}`, attest.BadJSON},
		{"D03 name twice through an escape", `{"key":"a","\u006bey":"b"}`, attest.BadJSON},
		{"D03 name in two cases", `{"key":"a","KEY":"b"}`, attest.BadJSON},
		{"D03 name with a kelvin sign", `{"key":"a","\u212aey":"b"}`, attest.BadJSON},
		{"D03 name in other case only", `{"KEY":"b"}`, attest.BadJSON},
		{"D03 name with a kelvin sign only", `{"\u212aey":"b"}`, attest.BadJSON},
		{"D03 nested name in other case", `{"named":{"Key":"b"}}`, attest.BadJSON},
		{"D03 name in other case in a list", `{"many":[{"N":1}]}`, attest.BadJSON},
		{"D03 name in other case in a map", `{"free":{"a":{"Key":"b"}}}`, attest.BadJSON},
		{"D03 name twice in raw", `{"raw":{"a":{"b":1,"B":2}}}`, attest.BadJSON},
		{"D03 field by its Go name", `{"Named":{}}`, attest.BadJSON},
		{"skipped field", `{"Skip":"x"}`, attest.BadJSON},
		{"skipped field by dash", `{"-":"x"}`, attest.BadJSON},
		{"embedded struct by its name", `{"inner":{}}`, attest.BadJSON},
		{"unknown field", `{"x":1}`, attest.BadJSON},
		{"wrong type", `{"key":1}`, attest.BadJSON},
		{"list for an object", `{"named":[]}`, attest.BadJSON},
		{"object for a list", `{"many":{}}`, attest.BadJSON},
		{"refused by its own type", `{"digest":"sha256:x"}`, attest.BadJSON},
		{"number out of range", `{"raw":-1e999}`, attest.BadJSON},
		{"D04 trailing", `{}1`, attest.BadJSON},
		{"D04 nothing", ``, attest.BadJSON},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := outer{Plain: 1}
			got := before
			err := verifier.Decode([]byte(row.in), &got)
			if attest.ReasonOf(err) != row.want {
				t.Fatalf("Decode(%s) = %v, want %q", row.in, err, row.want)
			}
			if err != nil && !reflect.DeepEqual(got, before) {
				t.Fatalf("an error left %+v", got)
			}
			if err == nil && got.Plain == 1 {
				t.Fatal("what stood there before was kept")
			}
		})
	}
	if err := verifier.Decode([]byte(`{}`), outer{}); err == nil {
		t.Error("decoding into a value was accepted")
	}
	var numbers any
	must0(t, verifier.Decode([]byte(`[9007199254740993]`), &numbers))
	if n := numbers.([]any)[0]; n != json.Number("9007199254740993") {
		t.Errorf("a number lost digits: %v", n)
	}
}

const hex64 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// FuzzDecode: what is accepted is what encoding/json reads, has known names only
// and reads the same after it was written again.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"n","digest":{"sha256":"x"}}],"predicateType":"t","predicate":{"a":[1,{"b":null}]}}`))
	f.Add([]byte(`{"_type":"a","_TYPE":"b"}`))
	f.Add([]byte(`{"\u017fubject":[]}`))
	f.Add([]byte(`{"predicate":"\ud800"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s attest.Statement
		if verifier.Decode(data, &s) != nil {
			return
		}
		var lax attest.Statement
		if err := json.Unmarshal(data, &lax); err != nil || !reflect.DeepEqual(s, lax) {
			t.Fatalf("read %+v, encoding/json %+v, %v", s, lax, err)
		}
		var names map[string]json.RawMessage
		if json.Unmarshal(data, &names) == nil {
			for n := range names {
				if n != "_type" && n != "subject" && n != "predicateType" && n != "predicate" {
					t.Fatalf("name %q was accepted", n)
				}
			}
		}
	})
}
