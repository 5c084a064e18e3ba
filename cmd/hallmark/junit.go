package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/hallmarkd/hallmark/attest"
)

// Bounds of a JUnit report.
const (
	maxSuites   = 32   // one inside another
	maxTestName = 1024 // bytes
)

const byteOrderMark = "\ufeff" // before UTF-8, as Windows writes it

// testResult is the predicate test-result v0.1 (in-toto attestation
// spec/predicates/test-result.md) that a JUnit report is turned into. Passed tests
// are counted, not named: a report may have a hundred thousand of them.
type testResult struct {
	Result        string         `json:"result"`        // PASSED, FAILED
	Configuration []reportSource `json:"configuration"` // the report that this was made from
	FailedTests   []string       `json:"failedTests"`   // sorted, each once
}

// reportSource is an in-toto resource descriptor (spec/v1/resource_descriptor.md).
type reportSource struct {
	Name        string            `json:"name"`
	Digest      map[string]string `json:"digest"`
	MediaType   string            `json:"mediaType"`
	Annotations testCounts        `json:"annotations"`
}

type testCounts struct {
	Tests   int `json:"tests"`
	Failed  int `json:"failed"`
	Skipped int `json:"skipped"`
}

// fromJUnit turns a JUnit XML report into a test-result predicate. The format has
// no standard, only a common core, and of that just this is read: <testsuites> and
// <testsuite> hold <testcase>s, which failed when they hold a <failure> or an
// <error>, and were not run when they hold <skipped>. A suite that says it had
// failures or errors without naming them counts as failed too: what cannot be told
// is no pass. A report without a test that ran is refused for the same reason.
func fromJUnit(name string, report []byte) ([]byte, error) {
	r := junitReader{dec: xml.NewDecoder(bytes.NewReader(bytes.TrimPrefix(report, []byte(byteOrderMark))))}
	if err := r.document(); err != nil {
		return nil, attest.Errorf(attest.PredicateInvalid, "%s: %w", name, err)
	}
	if r.count.Tests == r.count.Skipped && !r.failed {
		return nil, attest.Errorf(attest.PredicateInvalid, "%s: no test was run, so that nothing passed", name)
	}
	slices.Sort(r.names)
	out := testResult{Result: "PASSED", FailedTests: append([]string{}, slices.Compact(r.names)...), Configuration: []reportSource{{
		Name: name, Digest: map[string]string{"sha256": attest.Hash(report).Hex()}, MediaType: "application/xml", Annotations: r.count,
	}}}
	if r.failed {
		out.Result = "FAILED"
	}
	return json.Marshal(out)
}

// junitReader reads one report, element by element.
type junitReader struct {
	dec    *xml.Decoder
	count  testCounts
	failed bool
	names  []string // of failed tests
}

// document reads the one root element with nothing but white space and comments
// beside it. A document type is refused: it could define what the text means.
func (r *junitReader) document() error {
	root := false
	for {
		t, err := r.dec.Token()
		if errors.Is(err, io.EOF) {
			if !root {
				return errors.New("no JUnit report: it has no root element")
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("no well-formed XML: %w", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			if root || t.Name.Local != "testsuites" && t.Name.Local != "testsuite" {
				return fmt.Errorf("no JUnit report: <%.40s> stands where one <testsuites> or <testsuite> is expected", t.Name.Local)
			}
			root = true
			if err := r.suite(t, 1); err != nil {
				return err
			}
		case xml.Directive:
			return errors.New("it has a document type declaration: JUnit reports need none")
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return errors.New("no JUnit report: text stands outside its root element")
			}
		}
	}
}

// suite reads what is in a <testsuites> or <testsuite>.
func (r *junitReader) suite(start xml.StartElement, depth int) error {
	if depth > maxSuites {
		return fmt.Errorf("suites inside suites, more than %d deep", maxSuites)
	}
	attrs, err := attributes(start)
	if err != nil {
		return err
	}
	for _, a := range []string{"failures", "errors"} {
		if n := attrs[a]; n != "" && n != "0" {
			r.failed = true
		}
	}
	return r.children(func(t xml.StartElement) error {
		switch t.Name.Local {
		case "testsuite":
			return r.suite(t, depth+1)
		case "testcase":
			return r.test(t)
		case "failure", "error": // of the suite as a whole
			r.failed = true
		}
		return r.dec.Skip()
	})
}

// test reads one <testcase>.
func (r *junitReader) test(start xml.StartElement) error {
	attrs, err := attributes(start)
	if err != nil {
		return err
	}
	name := attrs["name"]
	if name == "" {
		return errors.New("a <testcase> has no name")
	}
	if class := attrs["classname"]; class != "" {
		name = class + "." + name
	}
	if len(name) > maxTestName {
		return fmt.Errorf("a test's name has more than %d bytes", maxTestName)
	}
	failed, skipped := false, false
	err = r.children(func(t xml.StartElement) error {
		switch t.Name.Local {
		case "failure", "error":
			failed = true
		case "skipped":
			skipped = true
		}
		return r.dec.Skip()
	})
	r.count.Tests++
	switch {
	case failed:
		r.count.Failed++
		r.failed = true
		r.names = append(r.names, name)
	case skipped:
		r.count.Skipped++
	}
	return err
}

// children calls each for every element up to the end of the one that is open;
// each reads its element to the end.
func (r *junitReader) children(each func(xml.StartElement) error) error {
	for {
		t, err := r.dec.Token()
		if err != nil {
			return fmt.Errorf("no well-formed XML: %w", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			if err := each(t); err != nil {
				return err
			}
		case xml.EndElement:
			return nil
		case xml.Directive:
			return errors.New("it has a declaration inside an element")
		}
	}
}

// attributes returns those of an element by name. Two of one name are refused: XML
// forbids them, Go's decoder does not, and readers would differ.
func attributes(t xml.StartElement) (map[string]string, error) {
	out, seen := map[string]string{}, map[xml.Name]bool{}
	for _, a := range t.Attr {
		if seen[a.Name] {
			return nil, fmt.Errorf("<%s> has the attribute %.40q twice", t.Name.Local, a.Name.Local)
		}
		seen[a.Name] = true
		if a.Name.Space == "" {
			out[a.Name.Local] = a.Value
		}
	}
	return out, nil
}
