package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/sigstore/sigstore-go/pkg/root"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
	"github.com/hallmarkd/hallmark/verifier"
)

type verifyCmd struct {
	Image   string `arg:"" placeholder:"REPO@DIGEST" help:"The image: HOST/PATH@sha256:…"`
	Stage   string `help:"Ask whether it may run in this stage now; without it, whether signature and provenance are by a configured signer."`
	Track   string `help:"Track of the stage; not needed online when the repository is in one."`
	Explain bool   `help:"Show every rule with its reason and record."`

	Offline     bool     `help:"Judge the bundles of --bundle here, without any server."`
	Bundles     []string `name:"bundle" placeholder:"FILE" sep:"none" help:"Sigstore bundle to judge; may be repeated. Needs --offline."`
	TrustedRoot string   `name:"trusted-root" placeholder:"FILE" help:"Trust root to judge by (hallmark trust-root prints it). Needs --offline."`
	Identity    string   `name:"certificate-identity" placeholder:"URI" help:"Who must have signed, exactly (hallmark whoami prints it). Needs --offline."`
	Issuer      string   `name:"certificate-oidc-issuer" placeholder:"URL" help:"Issuer of that identity, exactly. Needs --offline."`
	GateKey     string   `name:"gate-key" placeholder:"FILE" help:"Public key of the gate, for summaries that it signed without a certificate. Needs --offline and --stage."`
	registryFlags
}

// Run asks the server, or judges bundles with --offline.
func (c *verifyCmd) Run(ctx context.Context, a *app) error {
	if err := c.consistent(); err != nil {
		return err
	}
	ref, err := c.image(ctx, a, c.Image)
	if err != nil {
		return err
	}
	d, err := c.ask(ctx, a, ref)
	if err != nil {
		return err
	}
	if err := checkDecision(d, ref.String(), c.Stage); err != nil {
		return err
	}
	if err := a.print(a.decided(d, question{verb: "verify", explain: c.Explain, offline: c.Offline})); err != nil {
		return err
	}
	return answer(decisionExit(d))
}

// consistent refuses flags that would have no effect: a check that was asked
// for and not made looks like one that passed.
func (c *verifyCmd) consistent() error {
	offline := []struct {
		flag string
		set  bool
	}{{"--bundle", len(c.Bundles) > 0}, {"--trusted-root", c.TrustedRoot != ""}, {"--certificate-identity", c.Identity != ""}, {"--certificate-oidc-issuer", c.Issuer != ""}, {"--gate-key", c.GateKey != ""}}
	if !c.Offline {
		for _, f := range offline {
			if f.set {
				return usagef("%s works with --offline only: online, the server judges by its policy", f.flag)
			}
		}
		return nil
	}
	switch {
	case c.Resolve:
		return usagef("--resolve asks the registry, which --offline forbids: give the digest")
	case len(c.Bundles) == 0 || c.TrustedRoot == "":
		return usagef("--offline needs --bundle FILE and --trusted-root FILE")
	case c.Stage == "" && c.Identity == "" && c.Issuer == "":
		return usagef("--offline has to be told what to expect: --certificate-identity URI with --certificate-oidc-issuer URL, or --stage S with --track T")
	case c.Stage != "" && (c.Identity != "" || c.Issuer != ""):
		return usagef("--stage expects a summary signed by the gate, --certificate-identity something signed by a CI job: give one of them")
	case c.Stage != "" && c.Track == "":
		return usagef("--offline --stage needs --track: the summary names both")
	case c.Stage == "" && (c.Identity == "" || c.Issuer == ""):
		return usagef("--certificate-identity and --certificate-oidc-issuer belong together: the same name from another issuer is somebody else")
	case c.Stage == "" && (c.GateKey != "" || c.Track != ""):
		return usagef("--gate-key and --track need --stage")
	}
	return nil
}

func (c *verifyCmd) ask(ctx context.Context, a *app, ref attest.ImageRef) (*hallmarkv1.Decision, error) {
	if c.Offline {
		return c.judge(ref)
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewPromotionServiceClient(s).Verify, &hallmarkv1.VerifyRequest{Image: ref.String(), Stage: c.Stage, Track: c.Track})
	return resp.GetDecision(), err
}

// judge makes the decision from files alone. Every bundle that is given must
// pass, so that a bad one is never hidden by a good one.
func (c *verifyCmd) judge(ref attest.ImageRef) (*hallmarkv1.Decision, error) {
	v, service, err := c.verifier()
	if err != nil {
		return nil, err
	}
	d := &hallmarkv1.Decision{Image: ref.String(), Stage: c.Stage, Track: c.Track, Allowed: true, Verdict: verdictAllowed}
	for _, path := range c.Bundles {
		raw, err := readBounded(path, verifier.MaxBundle)
		if err != nil {
			return nil, fmt.Errorf("reading --bundle: %w", err)
		}
		r := c.bundle(v, service, ref, raw)
		if r.Outcome != attest.OK {
			d.Allowed, d.Verdict = false, verdictDenied
			r.Next = "the bundle is " + path
		}
		d.Results = append(d.Results, &hallmarkv1.RuleResult{
			Rule: r.Rule, Outcome: string(r.Outcome), Reason: string(r.Reason), Required: r.Required, Found: r.Found, Record: r.Record.String(), Next: r.Next,
		})
	}
	return d, nil
}

func (c *verifyCmd) verifier() (*verifier.Verifier, string, error) {
	trusted, err := readBounded(c.TrustedRoot, maxFile)
	if err != nil {
		return nil, "", fmt.Errorf("reading --trusted-root: %w", err)
	}
	service, err := serviceOf(trusted)
	if err != nil {
		return nil, "", fmt.Errorf("reading --trusted-root: %w", err)
	}
	var gate []byte
	if c.GateKey != "" {
		if gate, err = readBounded(c.GateKey, maxFile); err != nil {
			return nil, "", fmt.Errorf("reading --gate-key: %w", err)
		}
	}
	v, err := verifier.New(trusted, gate, service)
	return v, service, err
}

// maxFile bounds a trust root or key that is read, in bytes.
const maxFile = 1 << 20

func readBounded(path string, most int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > most {
		return nil, attest.Errorf(attest.TooLarge, "%s has %d bytes, more than %d", path, info.Size(), most)
	}
	return os.ReadFile(path)
}

// serviceOf returns the public_url of the service that a trust root is of: its
// certificate authorities name it.
func serviceOf(trustedRoot []byte) (string, error) {
	tr, err := root.NewTrustedRootFromJSON(trustedRoot)
	if err != nil {
		return "", attest.Errorf(attest.BadConfig, "this is no trust root: %w", err)
	}
	service := ""
	for _, ca := range tr.FulcioCertificateAuthorities() {
		f, ok := ca.(*root.FulcioCertificateAuthority)
		if !ok || f.URI == "" || service != "" && f.URI != service {
			return "", attest.Errorf(attest.BadConfig, "the trust root does not name one service in its certificate authorities")
		}
		service = f.URI
	}
	if service == "" {
		return "", attest.Errorf(attest.BadConfig, "the trust root names no certificate authority")
	}
	return service, nil
}

// bundle judges one bundle against what was asked.
func (c *verifyCmd) bundle(v *verifier.Verifier, service string, ref attest.ImageRef, raw []byte) attest.RuleResult {
	ev, err := v.Bundle(raw, ref.Digest)
	if err != nil {
		found := err.Error()
		var e *attest.Error
		if errors.As(err, &e) {
			found = e.Message
		}
		return failed("bundle", attest.ReasonOf(err), "a bundle that verifies for this digest", found)
	}
	if c.Stage != "" {
		return c.summary(ev, service, ref)
	}
	return c.signature(ev)
}

func failed(rule string, reason attest.Reason, required, found string) attest.RuleResult {
	return attest.RuleResult{Rule: rule, Outcome: attest.Fail, Reason: reason, Required: required, Found: found}
}

// signature accepts an image signature or provenance by the expected identity.
// A statement of another type says nothing about who built the image (attacks D01).
func (c *verifyCmd) signature(ev *verifier.Evidence) attest.RuleResult {
	rule := string(ev.Kind())
	if ev.Kind() != attest.KindSignature && ev.Kind() != attest.KindProvenance {
		return failed(rule, attest.PredicateType, "an image signature or provenance", ev.PredicateType())
	}
	if by := ev.Signer(); by.Gate || by.SAN != c.Identity || by.Issuer != c.Issuer {
		return failed(rule, attest.SignerMismatch, "a signature by "+c.Identity+" of "+c.Issuer, "one by "+by.SAN+" of "+by.Issuer)
	}
	return attest.RuleResult{Rule: rule, Outcome: attest.OK, Record: ev.ID()}
}

// summary does what SLSA asks of who relies on a verification summary
// (slsa.dev/spec/v1.2, verification_summary, "How to verify"); the first two of
// its steps, signature and subject, are done when ev exists (attacks D14, M02).
func (c *verifyCmd) summary(ev *verifier.Evidence, service string, ref attest.ImageRef) attest.RuleResult {
	const rule = "summary"
	// 3. The type, exactly.
	if ev.PredicateType() != attest.PredicateVSA {
		return failed(rule, attest.PredicateType, attest.PredicateVSA, ev.PredicateType())
	}
	var vsa attest.VSA
	if err := verifier.Decode(ev.Statement().Predicate, &vsa); err != nil {
		return failed(rule, attest.StatementMalformed, "a summary that can be read", err.Error())
	}
	// 4. Who verified, which must be whom the signing key belongs to.
	if !ev.Signer().Gate || vsa.Verifier.ID != service+"/gate" {
		return failed(rule, attest.SignerMismatch, "a summary by "+service+"/gate", "one by "+vsa.Verifier.ID+", signed by "+ev.Signer().SAN)
	}
	// 5. Where consumers of the stage get the image from.
	if want := "oci://" + string(ref.Repository); vsa.ResourceURI != want {
		return failed(rule, attest.SubjectMismatch, "a summary for "+want, "one for "+vsa.ResourceURI)
	}
	// 6. The result.
	if vsa.VerificationResult != "PASSED" {
		return failed(rule, attest.RuleFailed, "the result PASSED", vsa.VerificationResult)
	}
	// 7. The level that stands for the stage.
	if want := attest.StageLevel(c.Track, c.Stage); !slices.Contains(vsa.VerifiedLevels, want) {
		return failed(rule, attest.NotPromoted, "the level "+want, strings.Join(vsa.VerifiedLevels, ", "))
	}
	return attest.RuleResult{Rule: rule, Outcome: attest.OK, Record: ev.ID()}
}
