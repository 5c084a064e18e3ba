package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

type promoteCmd struct {
	Image   string `arg:"" placeholder:"REPO@DIGEST" help:"The image: HOST/PATH@sha256:…"`
	ToStage string `name:"to-stage" required:"" placeholder:"STAGE" help:"Stage to move."`
	Track   string `help:"Track of the stage; not needed when the repository is in one."`
	Version string `help:"Version for the name of the target; default: the verified refs/tags/v…"`
	Reason  string `help:"Why, for the record."`
	Ticket  string `help:"Ticket, for the record."`
	DryRun  bool   `name:"dry-run" help:"Only decide: record nothing, move nothing."`
	registryFlags
}

// effectsInfo is the JSON of what an allowed promotion did.
type effectsInfo struct {
	Effect       string          `json:"effect"`                  // DONE, FAILED, PENDING
	EffectDetail string          `json:"effect_detail,omitempty"` //
	Target       string          `json:"target,omitempty"`        // HOST/PATH:TAG that was set
	VSABundle    json.RawMessage `json:"vsa_bundle,omitempty"`    // Sigstore bundle v0.3
	VSAEnvelope  json.RawMessage `json:"vsa_envelope,omitempty"`  // plain DSSE
}

// Run asks the gate to move the stage. Repeating it is safe: an allowed
// promotion is answered from its record, a denied one is decided again.
func (c *promoteCmd) Run(ctx context.Context, a *app) error {
	ref, err := c.image(ctx, a, c.Image)
	if err != nil {
		return err
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewPromotionServiceClient(s).Promote, &hallmarkv1.PromoteRequest{
		Image: ref.String(), ToStage: c.ToStage, Track: c.Track, Version: c.Version,
		Reason: c.Reason, Ticket: c.Ticket, DryRun: c.DryRun,
	})
	if err != nil {
		return err
	}
	d := resp.GetDecision()
	if err := checkDecision(d, ref.String(), c.ToStage); err != nil {
		return err
	}
	r := a.decided(d, question{verb: "promote", dryRun: c.DryRun})
	code := decisionExit(d)
	if d.GetAllowed() && !c.DryRun {
		code = r.effects(resp)
	}
	if err := a.print(r); err != nil {
		return err
	}
	return answer(code)
}

// effects adds what an allowed promotion did in the target registry, and returns
// the exit code: only a stage that has moved is a yes.
func (r *result) effects(resp *hallmarkv1.PromoteResponse) int {
	if info, ok := r.data.(*decisionInfo); ok {
		info.Promotion = &effectsInfo{
			resp.GetEffect(), resp.GetEffectDetail(), resp.GetTarget(),
			rawJSON(resp.GetVsaBundle()), rawJSON(resp.GetVsaEnvelope()),
		}
	}
	target, detail := resp.GetTarget(), ""
	if resp.GetEffectDetail() != "" {
		detail = ": " + resp.GetEffectDetail()
	}
	switch resp.GetEffect() {
	case attest.EffectDone:
		if target != "" {
			r.mark(good, "%s set and read back", target)
		}
		return exitOK
	case attest.EffectFail:
		r.mark(bad, "FAILED  the promotion was allowed, but %s could not be set%s", orElse(target, "its target"), detail)
		return exitFailure
	case "PENDING":
		r.mark(warned, "PENDING  the service goes on setting %s: repeat the command to see the end%s", orElse(target, "the target"), detail)
		return exitUnavailable
	}
	r.mark(bad, "FAILED  %s", fmt.Sprintf("the server answered an effect that this client does not know: %q", resp.GetEffect()))
	return exitFailure
}
