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

var (
	placeholder = regexp.MustCompile(`\{([a-z_]+)\}`)
	// claimPlaceholder is of a claim, whose name may have dots, slashes and dashes:
	// {oidc.circleci.com/project-id}.
	claimPlaceholder = regexp.MustCompile(`\{([^{}]+)\}`)
	bracedUUID       = regexp.MustCompile(`^\{([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\}$`)
)

// uriFields are the fields that become URIs in certificates and provenance.
var uriFields = []string{"config_uri", "owner_uri", "run_uri", "signer_uri", "source_uri"}

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
		if err := checkMapping(field, i.Claims[field]); err != nil {
			return fmt.Errorf("claims: %s: %w", field, err)
		}
		if i.Kind == attest.Person && field != groupsField {
			return fmt.Errorf("claims: %s: a person's token describes no build: map groups only", field)
		}
	}
	switch {
	case len(i.Events) > 0 && i.Claims["event"] == "":
		return fmt.Errorf("events: map the claim of the event: claims: {event: …}")
	case i.Kind == attest.Person && len(i.Events) > 0:
		return fmt.Errorf("events: a person's token has no event: leave it out")
	case len(i.Owners) > 0 && i.Claims["owner_id"] == "":
		return fmt.Errorf("owners: map the claim of the owner's id: claims: {owner_id: …}")
	case i.ServerURL != "" && (i.Claims["repository"] == "" || i.Claims["source_uri"] != ""):
		return fmt.Errorf("server_url: it makes a source_uri of repository: map repository, and not source_uri")
	}
	i.Owners = unbraced(i.Owners)
	i.Events = slices.Clone(i.Events)
	if err := i.checkRequire(); err != nil {
		return fmt.Errorf("require: %w", err)
	}
	return i.checkSAN()
}

// checkMapping accepts the name of a claim, or a template in which every value
// can be told from the text around it.
func checkMapping(field, mapping string) error {
	if err := checkPrintable(mapping); err != nil {
		return fmt.Errorf("the name of the claim: %w", err)
	}
	if !isTemplate(mapping) {
		return nil
	}
	found := len(claimPlaceholder.FindAllString(mapping, -1))
	if rest := claimPlaceholder.ReplaceAllString(mapping, ""); found == 0 || isTemplate(rest) {
		return fmt.Errorf("%q is not a template such as https://{claim}", mapping)
	}
	if field == groupsField {
		return fmt.Errorf("groups are a list: give the name of its claim")
	}
	if !slices.Contains(uriFields, field) {
		if found > 1 {
			return fmt.Errorf("%q names several claims: only URIs may", mapping)
		}
		return nil
	}
	if u, err := url.Parse(claimPlaceholder.ReplaceAllString(mapping, "x")); err != nil || u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("%q is not an https URI", mapping)
	}
	if strings.Contains(mapping, "#") {
		return fmt.Errorf("%q has a fragment: leave it out", mapping)
	}
	for _, segment := range strings.Split(mapping, "/") {
		if len(claimPlaceholder.FindAllString(segment, -1)) > 1 {
			return fmt.Errorf("%q: write at most one {claim} between two slashes", mapping)
		}
	}
	return nil
}

func isTemplate(mapping string) bool { return strings.ContainsAny(mapping, "{}") }

// unbraced takes UUIDs out of the braces in which Bitbucket and Azure DevOps write
// them, so that each has one spelling. Other texts stay as they are.
func unbraced(values []string) []string {
	out := make([]string, len(values))
	for n, v := range values {
		out[n] = bracedUUID.ReplaceAllString(v, "$1")
	}
	return out
}

func (i *issuer) checkRequire() error {
	i.Require = maps.Clone(i.Require)
	for _, claim := range slices.Sorted(maps.Keys(i.Require)) {
		i.Require[claim] = unbraced(i.Require[claim])
		if err := checkPrintable(claim); err != nil {
			return fmt.Errorf("the name of a claim: %w", err)
		}
		if len(i.Require[claim]) == 0 {
			return fmt.Errorf("%s: list the values that are accepted", claim)
		}
		for _, v := range i.Require[claim] {
			if err := checkPrintable(v); err != nil {
				return fmt.Errorf("%s: a value: %w", claim, err)
			}
		}
	}
	return nil
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
	if err := i.checkRequired(c); err != nil {
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
	id.Unaccepted = i.unaccepted(id.Build)
	var err error
	id.SAN, err = i.san(id)
	return err
}

// checkRequired compares whole values: the operator has listed what a claim must be
// (attacks B11, A23).
func (i *issuer) checkRequired(c claims) error {
	for _, claim := range slices.Sorted(maps.Keys(i.Require)) {
		got, err := c.value(claim)
		if err != nil {
			return err
		}
		if !slices.Contains(i.Require[claim], got) {
			return attest.Errorf(attest.SourceNotAllowed, "the token's claim %q is %q, issuer %q requires one of %q", claim, clip(got), i.Name, i.Require[claim])
		}
	}
	return nil
}

// value is scalar with a UUID out of its braces.
func (c claims) value(name string) (string, error) {
	s, err := c.scalar(name)
	return unbraced([]string{s})[0], err
}

// unaccepted says why the job may run what nobody has accepted, as far as the
// configuration and the ref tell, or "".
func (i *issuer) unaccepted(b attest.Build) string {
	switch {
	case len(i.Events) > 0 && !slices.Contains(i.Events, b.Event):
		return fmt.Sprintf("a job started by %q may run code that nobody has accepted. Sign in a job started by one of %s (events of issuer %q)",
			clip(b.Event), strings.Join(i.Events, ", "), i.Name)
	case b.Ref != "" && !isBranchOrTag(b.Ref):
		return fmt.Sprintf("ref %q is neither a branch, refs/heads/…, nor a tag, refs/tags/…: it may hold code that nobody has accepted", clip(b.Ref))
	case pullRequest.MatchString(shortName(b.Ref)):
		return fmt.Sprintf("ref %q is called as CI systems call pull requests and forks' branches: it may hold code that nobody has accepted", clip(b.Ref))
	}
	return ""
}

// pullRequest is how CI systems call what they build for a pull request, or a fork,
// where the name of a branch should be: PR-7-head (Jenkins), 7/merge (GitHub),
// pull/7/head, refs/pull/7/merge, pr/7 (CodeBuild), changes/34/1234/5 (Gerrit),
// fork:branch. The mapping refs/heads/{branch} makes a branch of each.
var pullRequest = regexp.MustCompile(`(?i)^(?:refs/|[pm]r[-/]?[0-9]|(?:pull|pulls|pull-requests|merge-requests|changes)/[0-9]+(?:/|$)|[0-9]+/(?:merge|head)$)|:`)

// shortName is ref, that of a branch or tag, without "refs/heads/" or "refs/tags/".
func shortName(ref string) string {
	if name, ok := strings.CutPrefix(ref, "refs/heads/"); ok {
		return name
	}
	return strings.TrimPrefix(ref, "refs/tags/")
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
	for field, mapping := range i.Claims {
		if field == groupsField {
			continue
		}
		var err error
		if *fields[field], err = c.mapped(field, mapping); err != nil {
			return err
		}
	}
	if b.Ref != "" && !cleanPath(b.Ref) {
		return attest.Errorf(attest.TokenClaims, "the token's claim for ref makes %q, which is no name of a ref", clip(b.Ref))
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
	if b.WorkflowPath == "" {
		b.WorkflowPath = attest.WorkflowPath(b.SourceURI, b.ConfigURI, b.Ref)
	}
	return i.checkURIs(b)
}

// mapped returns the value of a claim, or of a template whose claims are all
// there; else "": half a URI is none.
func (c claims) mapped(field, mapping string) (string, error) {
	if !isTemplate(mapping) {
		return c.value(mapping)
	}
	var problem error
	missing, first, isURI := false, true, slices.Contains(uriFields, field)
	n, inPath := 0, claimsInPath(mapping)
	out := claimPlaceholder.ReplaceAllStringFunc(mapping, func(p string) string {
		n++
		name := p[1 : len(p)-1]
		v, err := c.value(name)
		if err != nil {
			problem = err
		}
		missing = missing || v == ""
		if n > inPath && isURI {
			return url.QueryEscape(v)
		}
		if isURI && v != "" {
			// Only the first may be a path: the others' slashes are escaped, so that
			// two sets of values never make one URI (attacks B12).
			var ok bool
			if v, ok = escapePath(v, first); !ok {
				problem = attest.Errorf(attest.TokenClaims, "the token's claim %q cannot be part of a URI", name)
			}
		}
		first = false
		return v
	})
	if problem != nil || missing {
		return "", problem
	}
	return out, nil
}

// claimsInPath counts the claims of a template before its query. The name of a claim
// may have a question mark, too.
func claimsInPath(mapping string) int {
	text := claimPlaceholder.ReplaceAllString(mapping, "{}")
	path, _, _ := strings.Cut(text, "?")
	return strings.Count(path, "{}")
}

// escapePath escapes a value for the path of a URI, and says whether it names the
// same thing to whoever resolves "." and "..". With slashes, those in it stay.
func escapePath(v string, slashes bool) (string, bool) {
	segments := []string{v}
	if slashes {
		segments = strings.Split(v, "/")
	}
	ok := true
	for n, s := range segments {
		ok = ok && s != "" && s != "." && s != ".."
		segments[n] = url.PathEscape(s)
	}
	return strings.Join(segments, "/"), ok
}

// checkURIs refuses a mapped URI field that is no URI in its only spelling: it is
// compared, shown as a link and put into certificates and provenance.
func (i *issuer) checkURIs(b *attest.Build) error {
	fields := buildFields(b)
	for _, field := range uriFields {
		if uri := *fields[field]; uri != "" && !i.onlySpelling(field, uri) {
			return attest.Errorf(attest.TokenClaims, "the token's claim for %s is not an https URI in its only spelling: host in lower case, no user, fragment, \"..\" or needless escapes, a query only where the mapping has it", field)
		}
	}
	return nil
}

func (i *issuer) onlySpelling(field, uri string) bool {
	u, err := url.Parse(uri)
	if err != nil || u.String() != uri {
		return false
	}
	path := strings.TrimPrefix(u.Path, "/")
	if field == "run_uri" { // Jenkins ends the URLs of builds with a slash
		path = strings.TrimSuffix(path, "/")
	}
	switch {
	case u.Scheme != "https" && !(u.Scheme == "http" && i.PlainHTTP && loopback(u.Hostname())):
		return false
	case u.Hostname() == "" || u.User != nil || u.Host != strings.ToLower(u.Host) || strings.HasSuffix(u.Hostname(), "."):
		return false
	case strings.HasSuffix(u.Host, ":") || strings.HasPrefix(u.Port(), "0") || u.Port() == "443":
		return false
	case u.Path != "" && !cleanPath(path), strings.Contains(uri, "#"):
		return false
	case isTemplate(i.Claims[field]): // the query is the operator's, the escapes are ours
		return true
	}
	return u.RawPath == "" && !strings.Contains(uri, "?")
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
		escaped, clean := escapePath(*fields[field], keepSlashes)
		if !clean {
			bad, ok = field, false
		}
		return escaped
	})
	if u, err := url.Parse(san); !ok || err != nil || u.String() != san {
		return "", attest.Errorf(attest.TokenClaims, "the token's %s is empty or cannot be part of the URI that names the job", bad)
	}
	return san, nil
}
