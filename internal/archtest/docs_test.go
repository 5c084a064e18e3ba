package archtest_test

import (
	"encoding"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/policy"
)

// A predicate is a permanent name; its schema says what the code writes.
func TestPredicateSchemas(t *testing.T) {
	for name, predicate := range map[string]struct {
		uri string
		typ reflect.Type
	}{
		"promotion": {attest.PredicatePromotion, reflect.TypeFor[attest.Promotion]()},
		"denial":    {attest.PredicateDenial, reflect.TypeFor[attest.Denial]()},
		"effect":    {attest.PredicateEffect, reflect.TypeFor[attest.Effect]()},
		"policy":    {attest.PredicatePolicy, reflect.TypeFor[attest.PolicyChange]()},
		"import":    {attest.PredicateImport, reflect.TypeFor[attest.Import]()},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join(root, "docs/predicates", name+"-v1.schema.json"))
			if err != nil {
				t.Fatal(err)
			}
			var s schema
			if err := json.Unmarshal(text, &s); err != nil {
				t.Fatal(err)
			}
			if s.ID != predicate.uri {
				t.Errorf("$id is %s, want %s", s.ID, predicate.uri)
			}
			s.describes(t, s.Defs, name, predicate.typ)
		})
	}
}

// schema is what of a JSON Schema the test compares.
type schema struct {
	ID         string            `json:"$id"`
	Ref        string            `json:"$ref"`
	Type       any               `json:"type"`
	Required   []string          `json:"required"`
	Properties map[string]schema `json:"properties"`
	Items      *schema           `json:"items"`
	Additional *schema           `json:"additionalProperties"`
	Defs       map[string]schema `json:"$defs"`
}

// describes reports every difference between s and the JSON of a Go type.
func (s schema) describes(t *testing.T, defs map[string]schema, at string, typ reflect.Type) {
	t.Helper()
	if s.Ref != "" {
		def, ok := defs[strings.TrimPrefix(s.Ref, "#/$defs/")]
		if !ok {
			t.Errorf("%s refers to %s, which is not there", at, s.Ref)
			return
		}
		s = def
	}
	if want := jsonType(typ); !reflect.DeepEqual(s.Type, want) {
		t.Errorf("%s has type %v, want %v", at, s.Type, want)
		return
	}
	switch {
	case s.Type == "object":
		s.describesFields(t, defs, at, typ)
	case typ.Kind() == reflect.Map:
		s.Additional.describes(t, defs, at+"/*", typ.Elem())
	case s.Items != nil:
		s.Items.describes(t, defs, at+"[]", typ.Elem())
	}
}

func (s schema) describesFields(t *testing.T, defs map[string]schema, at string, typ reflect.Type) {
	t.Helper()
	fields := map[string]bool{}
	for _, f := range reflect.VisibleFields(typ) {
		if f.Anonymous {
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = true
		p, ok := s.Properties[name]
		if !ok {
			t.Errorf("%s does not describe %s", at, name)
			continue
		}
		if required := options == ""; slices.Contains(s.Required, name) != required {
			t.Errorf("%s/%s is required: %v, want %v", at, name, !required, required)
		}
		p.describes(t, defs, at+"/"+name, f.Type)
	}
	for name := range s.Properties {
		if !fields[name] {
			t.Errorf("%s describes %s, which is never written", at, name)
		}
	}
}

// jsonType returns the value of a schema's "type" for what encoding/json makes of
// a Go type: an empty slice or map may be null, raw JSON may be anything.
func jsonType(typ reflect.Type) any {
	switch {
	case typ == reflect.TypeFor[json.RawMessage]():
		return nil
	case typ.Implements(reflect.TypeFor[encoding.TextMarshaler]()), typ == reflect.TypeFor[[]byte]():
		return "string"
	}
	switch typ.Kind() {
	case reflect.Struct:
		return "object"
	case reflect.Slice:
		return []any{"array", "null"}
	case reflect.Map:
		return []any{"object", "null"}
	case reflect.Int, reflect.Uint64:
		return "integer"
	}
	return typ.Kind().String()
}

// People start from the example: it is a policy, for the issuers of the example
// configuration beside it.
func TestExamplePolicy(t *testing.T) {
	p, err := policy.Load(filepath.Join(root, "examples/config/policy.yaml"), policy.Known{
		Issuers: map[string]attest.Kind{"github": attest.Workload, "corp": attest.Person},
		IssuerURLs: map[string]string{
			"github": "https://token.actions.githubusercontent.com", "corp": "https://sso.example.com",
		},
		Service: "https://hallmark.example.com",
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(p.Stages()); n != 3 {
		t.Errorf("the example has %d stages, want 3", n)
	}
}

var yamlKey = regexp.MustCompile("yaml:\"([a-z_]+)[,\"]")

// Every key that the service reads is explained.
func TestConfigurationKeys(t *testing.T) {
	document, err := os.ReadFile(filepath.Join(root, "docs/configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"cmd/hallmarkd/config.go", "identity/config.go"} {
		text, err := os.ReadFile(filepath.Join(root, source))
		if err != nil {
			t.Fatal(err)
		}
		keys := yamlKey.FindAllStringSubmatch(string(text), -1)
		if len(keys) == 0 {
			t.Errorf("%s reads no keys: where are they now?", source)
		}
		for _, k := range keys {
			if !regexp.MustCompile("[`.{ ]" + k[1] + "[`.,}]").Match(document) {
				t.Errorf("docs/configuration.md does not explain %s of %s", k[1], source)
			}
		}
	}
}

var (
	markdownLink = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	// A path of the machine that somebody wrote the text on.
	machinePath = regexp.MustCompile(`(?:^|[\s"'(` + "`" + `])/(?:work|root|home/\w+)/`)
)

// Every relative link in the documents leads to a file, and no document names
// the machine of its author.
func TestDocuments(t *testing.T) {
	found := 0
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != root && strings.HasPrefix(d.Name(), "."):
			return fs.SkipDir
		case filepath.Ext(name) != ".md":
			return nil
		}
		found++
		return checkDocument(t, name)
	})
	if err != nil {
		t.Fatal(err)
	}
	if found < 10 {
		t.Errorf("only %d documents were found", found)
	}
}

func checkDocument(t *testing.T, name string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	for _, m := range markdownLink.FindAllStringSubmatch(string(text), -1) {
		target, _, _ := strings.Cut(m[1], "#")
		if target == "" || strings.Contains(target, "://") {
			continue
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(name), target)); err != nil {
			t.Errorf("%s links %s, which is not there", name, m[1])
		}
	}
	if m := machinePath.FindString(string(text)); m != "" {
		t.Errorf("%s names a path of somebody's machine: %q", name, m)
	}
	return nil
}
