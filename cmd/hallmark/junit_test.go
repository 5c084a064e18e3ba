package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hallmarkd/hallmark/attest"
)

// What a JUnit report becomes is a predicate that the service takes.
func TestFromJUnit(t *testing.T) {
	for _, row := range []struct {
		name, report string
		result       string
		failed       []string
		counts       testCounts
	}{
		{"all passed", `<testsuites><testsuite><testcase classname="c" name="a"/><testcase name="b"/></testsuite></testsuites>`, "PASSED", []string{}, testCounts{Tests: 2}},
		{"one suite alone", `<testsuite><testcase name="a"/></testsuite>`, "PASSED", []string{}, testCounts{Tests: 1}},
		{"skipped is not failed", `<testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase></testsuite>`, "PASSED", []string{}, testCounts{Tests: 2, Skipped: 1}},
		{"failure", `<testsuite><testcase classname="c" name="b"><failure/></testcase><testcase name="a"/></testsuite>`, "FAILED", []string{"c.b"}, testCounts{Tests: 2, Failed: 1}},
		{"error", `<testsuite><testcase name="b"><error/></testcase></testsuite>`, "FAILED", []string{"b"}, testCounts{Tests: 1, Failed: 1}},
		{"the same name twice, one failed", `<testsuite><testcase name="b"/><testcase name="b"><error/></testcase><testcase name="a"><error/></testcase><testcase name="b"><failure/></testcase></testsuite>`, "FAILED", []string{"a", "b"}, testCounts{Tests: 4, Failed: 3}},
		{"failed and skipped", `<testsuite><testcase name="b"><skipped/><failure/></testcase></testsuite>`, "FAILED", []string{"b"}, testCounts{Tests: 1, Failed: 1}},
		{"suites in suites", `<testsuites><testsuite><testsuite><testcase name="b"><failure/></testcase></testsuite></testsuite></testsuites>`, "FAILED", []string{"b"}, testCounts{Tests: 1, Failed: 1}},
		{"a count without names", `<testsuite failures="1"><testcase name="a"/></testsuite>`, "FAILED", []string{}, testCounts{Tests: 1}},
		{"errors of the whole", `<testsuites errors="many"><testsuite><testcase name="a"/></testsuite></testsuites>`, "FAILED", []string{}, testCounts{Tests: 1}},
		{"a suite that broke", `<testsuite><error>no setup</error></testsuite>`, "FAILED", []string{}, testCounts{}},
		{"what is printed is no element", `<testsuite><testcase name="a"><system-out>&lt;failure/&gt;</system-out><properties><property name="failure" value="1"/></properties></testcase></testsuite>`, "PASSED", []string{}, testCounts{Tests: 1}},
		{"a failure deep in something else", `<testsuite><testcase name="a"><properties><failure/></properties></testcase></testsuite>`, "PASSED", []string{}, testCounts{Tests: 1}},
		{"byte order mark and comments", "\ufeff<?xml version=\"1.0\"?>\n<!-- x -->\n<testsuite failures=\"0\"><!-- y --><testcase name=\"a\"/></testsuite>\n", "PASSED", []string{}, testCounts{Tests: 1}},
		{"passed again after a failure", `<testsuite><testcase name="a"><flakyFailure/></testcase></testsuite>`, "PASSED", []string{}, testCounts{Tests: 1}},
	} {
		t.Run(row.name, func(t *testing.T) {
			raw, err := fromJUnit("unit.xml", []byte(row.report))
			if err != nil {
				t.Fatal(err)
			}
			var got testResult
			if err := json.Unmarshal(raw, &got); err != nil {
				t.Fatal(err)
			}
			want := testResult{row.result, []reportSource{{
				"unit.xml", map[string]string{"sha256": attest.Hash([]byte(row.report)).Hex()}, "application/xml", row.counts,
			}}, row.failed}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if err := attest.CheckPredicate(attest.PredicateTestResult, raw); err != nil {
				t.Errorf("the service would refuse it: %v", err)
			}
		})
	}
}

func TestFromJUnitRefuses(t *testing.T) {
	for _, row := range []struct{ name, report, want string }{
		{"nothing", ``, "no root element"},
		{"another format", `<coverage/>`, "<coverage> stands where"},
		{"no test", `<testsuites/>`, "no test was run"},
		{"nothing but skipped", `<testsuite><testcase name="a"><skipped/></testcase></testsuite>`, "no test was run"},
		{"half a report", `<testsuite><testcase name="a"/>`, "no well-formed XML"},
		{"half a tag", `<testsuite><testcase name="a"`, "no well-formed XML"},
		{"crossed tags", `<testsuite><testcase name="a"></testsuite></testcase>`, "no well-formed XML"},
		{"two roots", `<testsuite><testcase name="a"/></testsuite><testsuite failures="1"/>`, "<testsuite> stands where one"},
		{"text behind", `<testsuite><testcase name="a"/></testsuite>PASSED`, "outside its root element"},
		{"document type", `<!DOCTYPE testsuite [<!ENTITY a "b">]><testsuite><testcase name="a"/></testsuite>`, "document type"},
		{"declaration inside", `<testsuite><!ENTITY a "b"><testcase name="a"/></testsuite>`, "declaration inside"},
		{"unknown entity", `<testsuite><testcase name="&a;"/></testsuite>`, "no well-formed XML"},
		{"D03 attribute twice", `<testsuite failures="1" failures="0"><testcase name="a"/></testsuite>`, `attribute "failures" twice`},
		{"D03 name twice", `<testsuite><testcase name="a" name="b"/></testsuite>`, `attribute "name" twice`},
		{"no name", `<testsuite><testcase classname="a"/></testsuite>`, "has no name"},
		{"long name", `<testsuite><testcase name="` + strings.Repeat("a", maxTestName+1) + `"/></testsuite>`, "more than 1024 bytes"},
		{"deep", strings.Repeat("<testsuite>", 40), "more than 32 deep"},
		{"another encoding", `<?xml version="1.0" encoding="ISO-8859-1"?><testsuite><testcase name="a"/></testsuite>`, "no well-formed XML"},
		{"not UTF-8", "<testsuite><testcase name=\"a\xff\"/></testsuite>", "no well-formed XML"},
	} {
		t.Run(row.name, func(t *testing.T) {
			raw, err := fromJUnit("unit.xml", []byte(row.report))
			if attest.ReasonOf(err) != attest.PredicateInvalid || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%s, %v; want %q", raw, err, row.want)
			}
		})
	}
}

// Whatever a report is, what is made of it is a predicate that the service takes,
// and a named failure is never lost.
func FuzzFromJUnit(f *testing.F) {
	f.Add([]byte(`<testsuites><testsuite name="s" failures="0"><testcase classname="c" name="a"><failure/></testcase></testsuite></testsuites>`))
	f.Add([]byte(`<testsuite><testcase name="a"><skipped/></testcase><testcase name="b"/></testsuite>`))
	f.Add([]byte("\ufeff<?xml version=\"1.0\"?><testsuite errors=\"1\"/>"))
	f.Fuzz(func(t *testing.T, report []byte) {
		raw, err := fromJUnit("report.xml", report)
		if err != nil {
			if attest.ReasonOf(err) != attest.PredicateInvalid {
				t.Errorf("reason %s", attest.ReasonOf(err))
			}
			return
		}
		if err := attest.CheckPredicate(attest.PredicateTestResult, raw); err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		var got testResult
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Fatal(err)
		}
		if n := got.Configuration[0].Annotations; got.Result == "PASSED" && (len(got.FailedTests) > 0 || n.Failed > 0 || n.Tests <= n.Skipped) {
			t.Errorf("passed with %+v", got)
		}
	})
}
