package main

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

type whoamiCmd struct {
	Repository string `arg:"" optional:"" placeholder:"REPO" help:"Say which roles cover this repository."`
}

// whoamiInfo is the JSON of "hallmark whoami".
type whoamiInfo struct {
	IssuerName          string            `json:"issuer_name"` // in the configuration
	Issuer              string            `json:"issuer"`      // URL
	Subject             string            `json:"subject"`
	Kind                string            `json:"kind"`                 // workload, person
	CertificateIdentity string            `json:"certificate_identity"` // for --certificate-identity
	Claims              map[string]values `json:"claims"`
	Roles               []roleInfo        `json:"roles"`
	When                string            `json:"when,omitempty"`    // policy condition that admits exactly this workflow
	Expires             string            `json:"expires,omitempty"` // RFC 3339, UTC
	Audience            string            `json:"audience"`          // that tokens for this service carry
	// MaySign says whether the service signs for a job like this one at all;
	// SignImages, for which repositories.
	MaySign    bool     `json:"may_sign"`
	MayNotSign string   `json:"may_not_sign,omitempty"` // why not
	SignImages []string `json:"sign_images"`            // patterns
	// CosignVerify is the start of a command that accepts what this caller signs.
	CosignVerify string `json:"cosign_verify,omitempty"`
}

type roleInfo struct {
	Role   string   `json:"role"`
	Images []string `json:"images"`
	Covers *bool    `json:"covers,omitempty"` // the repository that was asked about
}

// Run shows the caller as the server sees it.
func (c *whoamiCmd) Run(ctx context.Context, a *app) error {
	if c.Repository != "" {
		if _, err := attest.ParseRepository(c.Repository); err != nil {
			return err
		}
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	who, err := call(ctx, s, hallmarkv1.NewTrustServiceClient(s).WhoAmI, &hallmarkv1.WhoAmIRequest{Repository: c.Repository})
	if err != nil {
		return err
	}
	info := whoamiInfo{
		IssuerName: who.GetIssuerName(), Issuer: who.GetIssuer(), Subject: who.GetSubject(), Kind: who.GetKind(),
		CertificateIdentity: who.GetCertificateIdentity(), Claims: map[string]values{}, Roles: []roleInfo{},
		When: who.GetWhen(), Expires: rfc3339(who.GetExpires()), Audience: s.service,
		MaySign: who.GetMaySign(), MayNotSign: who.GetMayNotSign(), SignImages: []string{},
	}
	if info.CertificateIdentity != "" && info.Issuer != "" {
		info.CosignVerify = "cosign verify --certificate-identity " + quoted(info.CertificateIdentity) + " --certificate-oidc-issuer " + quoted(info.Issuer)
	}
	r := result{title: "hallmark whoami"}
	r.add("%s", info.CertificateIdentity)
	r.field("kind", "%s", info.Kind)
	r.field("subject", "%s", info.Subject)
	r.field("issuer", "%s (%s)", info.Issuer, info.IssuerName)
	r.field("expires", "%s", info.Expires)
	for _, f := range who.GetClaims() {
		info.Claims[f.GetName()] = append(info.Claims[f.GetName()], f.GetValue())
		r.field("claim", "%s = %s", f.GetName(), f.GetValue())
	}
	for _, g := range who.GetRoles() {
		role := roleInfo{Role: g.GetRole(), Images: g.GetImages()}
		covers := ""
		if c.Repository != "" {
			yes := g.GetCovers()
			role.Covers = &yes
			covers = map[bool]string{true: "  covers " + c.Repository, false: "  does not cover " + c.Repository}[yes]
		}
		info.Roles = append(info.Roles, role)
		if role.Role == "signers" {
			info.SignImages = append(info.SignImages, role.Images...)
		}
		r.field("role", "%s for %s%s", role.Role, strings.Join(role.Images, ", "), covers)
	}
	if len(info.Roles) == 0 {
		r.field("role", "none: an operator gives roles in the policy")
	}
	switch {
	case info.MayNotSign != "":
		r.field("may sign", "no: %s", info.MayNotSign)
	case !info.MaySign:
		r.field("may sign", "no")
	case len(info.SignImages) == 0:
		r.field("may sign", "nothing yet: no entry of roles.signers in the policy is for it")
	default:
		r.field("may sign", "%s", strings.Join(info.SignImages, ", "))
	}
	if info.When != "" {
		r.field("policy", "when: %s", yamlText(info.When))
	}
	if info.CosignVerify != "" {
		r.field("verify", "%s …", info.CosignVerify)
	}
	r.data = info
	return a.print(r)
}

// quoted is s as one word of a POSIX shell, whatever is in it.
func quoted(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !strings.ContainsRune(shellSafe, r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

const shellSafe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@%+=,"

// yamlText is s as a double-quoted scalar: JSON's strings are YAML's (yaml.org/spec
// 1.2.2, section 7.3.1).
func yamlText(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if e.Encode(s) != nil {
		return ""
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// claimCheck is one part of a policy's condition, as SOURCE_NOT_ALLOWED tells it.
type claimCheck struct {
	Wanted string `json:"wanted"` // the part as written
	Got    string `json:"got"`    // the claims that it reads, and what the token says
	Met    bool   `json:"met"`
}

// claimTable renders what a policy wanted and what the token had, claim by claim, as
// lines of a table; nil when the server told no such thing.
func claimTable(metadata map[string]string) []string {
	var checks []claimCheck
	if raw := metadata["claims"]; raw == "" || json.Unmarshal([]byte(raw), &checks) != nil || len(checks) == 0 {
		return nil
	}
	// What is not met comes first: it is the answer.
	slices.SortStableFunc(checks, func(a, b claimCheck) int {
		switch {
		case a.Met == b.Met:
			return 0
		case a.Met:
			return 1
		}
		return -1
	})
	rows := [][]string{{"  ", "wanted", "got"}}
	for _, c := range checks {
		rows = append(rows, []string{map[bool]string{true: "  ok", false: "  x"}[c.Met], c.Wanted, orElse(c.Got, "nothing")})
	}
	var r result
	r.table(rows)
	var lines []string
	for _, l := range r.lines {
		lines = append(lines, l.text)
	}
	return lines
}
