package identity

import (
	"fmt"
	"maps"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

const maxGroups = 1000

// The fields that are not of attest.Build.
const (
	groupsField  = "groups"
	subjectField = "sub"
)

var placeholder = regexp.MustCompile(`\{([a-z_]+)\}`)

// buildFields returns the fields of b by their JSON names, which are the names
// that the configuration and policies use.
func buildFields(b *attest.Build) map[string]*string {
	v := reflect.ValueOf(b).Elem()
	fields := make(map[string]*string, v.NumField())
	for n := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(n).Tag.Get("json"), ",")
		fields[name] = v.Field(n).Addr().Interface().(*string)
	}
	return fields
}

// checkGeneric checks the mapping of claims and the template of the SAN.
func (i *issuer) checkGeneric() error {
	i.Claims = maps.Clone(i.Claims)
	known := buildFields(&attest.Build{})
	for _, field := range slices.Sorted(maps.Keys(i.Claims)) {
		if known[field] == nil && field != groupsField {
			return fmt.Errorf("claims: unknown field %q: known are groups, %s", field, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		if err := checkPrintable(i.Claims[field]); err != nil {
			return fmt.Errorf("claims: %s: the name of the claim: %w", field, err)
		}
		if i.Kind == attest.Person && field != groupsField {
			return fmt.Errorf("claims: %s: a person's token describes no build: map groups only", field)
		}
	}
	iss := i.Issuer.Issuer
	switch {
	case iss == publicGitHub || strings.HasPrefix(iss, publicGitHub+"/"):
		return fmt.Errorf("provider: use github for %s, which checks its claims", iss)
	case len(i.Owners) > 0 && i.Claims["owner_id"] == "":
		return fmt.Errorf("owners: map the claim of the owner's id: claims: {owner_id: …}")
	case i.ServerURL != "" && (i.Claims["repository"] == "" || i.Claims["source_uri"] != ""):
		return fmt.Errorf("server_url: it makes a source_uri of repository: map repository, and not source_uri")
	}
	return i.checkSAN()
}

// checkSAN makes sure that a template gives every identity its own URI, on a
// host that the operator wrote.
func (i *issuer) checkSAN() error {
	if i.SAN == "" {
		return nil
	}
	if i.Kind == attest.Person {
		return fmt.Errorf("san: persons are named by a hash of their subject: leave it out")
	}
	if err := checkURL(placeholder.ReplaceAllString(i.SAN, "x"), i.PlainHTTP); err != nil {
		return fmt.Errorf("san: %w", err)
	}
	if strings.HasPrefix(i.SAN, i.service+"/") {
		return fmt.Errorf("san: names under %s are this service's own", i.service)
	}
	segments := strings.Split(i.SAN, "/")
	for n, segment := range segments {
		found := placeholder.FindAllStringSubmatch(segment, -1)
		if n < 3 && len(found) > 0 || len(found) > 1 {
			return fmt.Errorf("san: %q: write scheme and host, and at most one {field} between two slashes", segment)
		}
		for _, f := range found {
			if f[1] != subjectField && (f[1] == groupsField || i.Claims[f[1]] == "") {
				return fmt.Errorf("san: {%s} is not a field that claims maps", f[1])
			}
		}
	}
	if !placeholder.MatchString(i.SAN) {
		return fmt.Errorf("san: %q has no {field}: all jobs would have one name", i.SAN)
	}
	return nil
}

// readGeneric fills in the fields that the operator has mapped.
func (i *issuer) readGeneric(c claims, id *attest.Identity) error {
	if err := refuseFork(c); err != nil {
		return err
	}
	if err := i.readBuild(c, &id.Build); err != nil {
		return err
	}
	if name := i.Claims[groupsField]; name != "" {
		var err error
		if id.Groups, err = c.list(name); err != nil {
			return err
		}
	}
	if i.Kind == attest.Person {
		// The log keeps no personal data (design section 6).
		id.SAN = i.service + "/people/" + id.Key()
		return nil
	}
	if err := i.checkOwner(id.Build.OwnerID); err != nil {
		return err
	}
	var err error
	id.SAN, err = i.san(id)
	return err
}

// refuseFork stops GitLab's trap: in a merge request from a fork the project
// claims are the fork's, and the job runs in another project (attacks B05).
func refuseFork(c claims) error {
	job, err := c.scalar("job_project_id")
	if err != nil {
		return err
	}
	source, err := c.scalar("project_id")
	if err != nil {
		return err
	}
	if job != "" && job != source {
		return attest.Errorf(attest.SourceNotAllowed, "the job runs in another project (job_project_id) than the one whose source it builds (project_id): a fork's merge request may not sign")
	}
	return nil
}

func (i *issuer) readBuild(c claims, b *attest.Build) error {
	fields := buildFields(b)
	for field, claim := range i.Claims {
		if field == groupsField {
			continue
		}
		var err error
		if *fields[field], err = c.scalar(claim); err != nil {
			return err
		}
	}
	// What is no commit is no fact: Buildkite says "HEAD" (attacks B09).
	if !attest.CommitPattern.MatchString(b.Commit) {
		b.Commit = ""
	}
	if i.ServerURL != "" && b.Repository != "" {
		if !cleanPath(b.Repository) {
			return attest.Errorf(attest.TokenClaims, "the token's claim %q is not a path of names", i.Claims["repository"])
		}
		b.SourceURI = i.ServerURL + "/" + b.Repository
	}
	return i.checkURIs(b)
}

// checkURIs refuses a mapped URI field that is none: it would become one in
// certificates and provenance.
func (i *issuer) checkURIs(b *attest.Build) error {
	for _, f := range []struct{ field, value string }{
		{"source_uri", b.SourceURI}, {"owner_uri", b.OwnerURI}, {"run_uri", b.RunURI},
	} {
		if f.value == "" {
			continue
		}
		if u, err := url.Parse(f.value); err != nil || u.Scheme == "" || u.User != nil {
			return attest.Errorf(attest.TokenClaims, "the token's claim for %s is not an absolute URI", f.field)
		}
	}
	return nil
}

// list returns a claim that is a list of texts, or one text. A text is never
// split: "a b" is one group.
func (c claims) list(name string) ([]string, error) {
	switch v := c[name].(type) {
	case nil:
		return nil, nil
	case string:
		s, err := c.required(name)
		return []string{s}, err
	case []any:
		if len(v) > maxGroups {
			return nil, attest.Errorf(attest.TokenClaims, "the token's claim %q lists %d values, more than %d", name, len(v), maxGroups)
		}
		out := make([]string, len(v))
		for n := range v {
			s, err := claims{name: v[n]}.required(name)
			if err != nil {
				return nil, err
			}
			out[n] = s
		}
		return out, nil
	}
	return nil, attest.Errorf(attest.TokenClaims, "the token's claim %q must be a list of texts, it is %s", name, describe(c, name))
}

// san names a workload. Values are escaped, and in a template of several fields
// their slashes too: "a" of "b/c" must not be "a/b" of "c".
func (i *issuer) san(id *attest.Identity) (string, error) {
	template := i.SAN
	if template == "" {
		template = strings.TrimSuffix(i.Issuer.Issuer, "/") + "/sub/{sub}"
	}
	fields := buildFields(&id.Build)
	fields[subjectField] = &id.Subject
	keepSlashes := i.SAN != "" && len(placeholder.FindAllString(template, -1)) == 1
	bad := subjectField
	ok := true
	san := placeholder.ReplaceAllStringFunc(template, func(p string) string {
		field := p[1 : len(p)-1]
		segments := []string{*fields[field]}
		if keepSlashes {
			segments = strings.Split(segments[0], "/")
		}
		for n, s := range segments {
			if s == "" || s == "." || s == ".." {
				bad, ok = field, false
			}
			segments[n] = url.PathEscape(s)
		}
		return strings.Join(segments, "/")
	})
	if u, err := url.Parse(san); !ok || err != nil || u.String() != san {
		return "", attest.Errorf(attest.TokenClaims, "the token's %s is empty or cannot be part of the URI that names the job", bad)
	}
	return san, nil
}
