package attest_test

import (
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
)

func TestParseBaseTag(t *testing.T) {
	for text, want := range map[string]attest.BaseName{
		"registry.example.com/base/debian:12":                              {Repository: "registry.example.com/base/debian", Tag: "12"},
		"localhost:5000/base:1.0-rc_1":                                     {Repository: "localhost:5000/base", Tag: "1.0-rc_1"},
		"registry.example.com/base/debian":                                 {},
		"localhost:5000/base":                                              {},
		"registry.example.com/base/debian:":                                {},
		"registry.example.com/base/debian:-1":                              {},
		"registry.example.com/base/debian:a/b":                             {},
		"registry.example.com/base/debian:" + strings.Repeat("1", 129):     {},
		"registry.example.com/base/debian:12@" + attest.Hash(nil).String(): {},
		"registry.example.com/base/debian@" + attest.Hash(nil).String():    {},
		"debian:12": {},
		":12":       {},
		"":          {},
	} {
		got, err := attest.ParseBaseTag(text)
		if got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
		if reason := attest.ReasonOf(err); (want == attest.BaseName{}) != (reason == attest.BadReference) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// What is read is written back as it was.
func FuzzParseBaseTag(f *testing.F) {
	f.Add("registry.example.com/base/debian:12")
	f.Add("localhost:5000/a:b")
	f.Add("a/b:c@sha256:00")
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := attest.ParseBaseTag(text); err == nil && got.String() != text {
			t.Errorf("%q became %q", text, got)
		}
	})
}
