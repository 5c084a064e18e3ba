// Package gate holds the flows of the service: sign, verify, promote, and the
// questions of auditors. Every flow takes the verified identity of its caller and
// authorises it before anything else, so that no handler can forget to.
package gate

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
	"github.com/hallmarkd/hallmark/verifier/foreign"
)

// Config is what a gate is made of. Every field but Bases, Foreign, Images and Step is required.
type Config struct {
	Service       string // public_url, without a trailing slash
	Ledger        *ledger.Ledger
	Signer        *signer.Signer
	Verifier      *verifier.Verifier
	Registry      *registry.Client
	Policy        *policy.Policy
	Configuration json.RawMessage // issuers and registries without secrets, recorded with the policy
	Now           func() time.Time
	Logger        *slog.Logger
	Bases         Bases // the zero value follows none
	// Images looks an image up and proves its base; nil is Registry.Image. The
	// benchmark measures signing without a registry through it.
	Images func(ctx context.Context, ref attest.ImageRef, baseHint string, mayRead func(attest.Repository) bool) (attest.Image, error)
	// Foreign vouches for evidence that was signed elsewhere; nil vouches for none.
	Foreign *foreign.Roots
	// Step is called between any two durable steps of a flow. Tests stop the
	// process there; otherwise it is nil.
	Step func(step string)
}

// Gate runs the flows. It is safe for concurrent use.
type Gate struct {
	Config
	// One request at a time for each natural key; the others share its answer.
	inflight singleflight.Group
	tokens   *tokenBudget
	evidence *evidenceCache
	denials  *denialLimit
	targets  *keyedLocks // one writer at a time for each target tag
	// Bytes of large envelopes that are worked on; see weigh.
	signing, attaching *semaphore.Weighted
	imports            chan struct{} // holds one element for each import under way

	progress progress // of the worker
	sweeper  sweeper
}

// Open returns a gate whose policy is the last one in the log: a new policy is
// recorded before its first use, and one older than the log's is refused
// (POLICY_ROLLBACK).
func Open(ctx context.Context, cfg Config) (*Gate, error) {
	if cfg.Step == nil {
		cfg.Step = func(string) {}
	}
	g := &Gate{
		Config: cfg, tokens: newTokenBudget(cfg.Now), denials: newDenialLimit(cfg.Now),
		evidence: newEvidenceCache(cfg.Ledger, cfg.Verifier), targets: newKeyedLocks(), imports: make(chan struct{}, maxImports),
		signing: semaphore.NewWeighted(atOnce), attaching: semaphore.NewWeighted(atOnce),
	}
	g.progress.changed = make(chan struct{})
	if g.Images == nil {
		g.Images = func(ctx context.Context, ref attest.ImageRef, baseHint string, mayRead func(attest.Repository) bool) (attest.Image, error) {
			return g.Registry.Image(ctx, ref, baseHint, g.followed, mayRead)
		}
	}
	if err := g.recordPolicy(ctx); err != nil {
		return nil, err
	}
	return g, nil
}

// recordPolicy appends the policy to the log unless it is there already.
func (g *Gate) recordPolicy(ctx context.Context) error {
	change := attest.PolicyChange{
		Version: g.Policy.Version(), Digest: g.Policy.Digest(), Text: g.Policy.Text(),
		Stages: g.Policy.Stages(), Configuration: g.Configuration,
	}
	if last, ok := g.Ledger.Policy(); ok {
		switch {
		case change.Version < last.Version:
			return attest.Errorf(attest.PolicyRollback, "policy version %d is older than version %d in the log: raise version above %d",
				change.Version, last.Version, last.Version)
		case change.Version == last.Version && change.Digest != last.Digest:
			return attest.Errorf(attest.PolicyRollback, "policy version %d differs from the version %d in the log: raise version to %d",
				change.Version, last.Version, last.Version+1)
		case change.Version == last.Version && maps.Equal(change.Stages, last.Stages) && sameJSON(change.Configuration, last.Configuration):
			return nil
		}
	}
	payload, err := attest.PolicyStatement(change)
	if err != nil {
		return err
	}
	if _, err := g.appendGate(ctx, payload); err != nil {
		return fmt.Errorf("recording policy version %d: %w", change.Version, err)
	}
	return nil
}

func sameJSON(a, b json.RawMessage) bool {
	compact := func(m json.RawMessage) string {
		var v any
		if json.Unmarshal(m, &v) != nil {
			return string(m)
		}
		out, err := json.Marshal(v)
		if err != nil {
			return string(m)
		}
		return string(out)
	}
	return compact(a) == compact(b)
}

// share runs work once for all callers that ask with the same key at the same time.
// It goes on when a caller goes away, for the others and because what is begun is
// best finished; a caller who goes away does not wait for it.
func share[T any](ctx context.Context, g *Gate, key string, work func(context.Context) (T, error)) (T, error) {
	answer := g.inflight.DoChan(key, func() (v any, err error) {
		// A panic here would end the process and not only this request.
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic in a shared flow: %v\n%s", p, debug.Stack())
			}
		}()
		shared, cancel := context.WithTimeout(context.WithoutCancel(ctx), flowTimeout)
		defer cancel()
		return work(shared)
	})
	var none T
	select {
	case <-ctx.Done():
		return none, fmt.Errorf("waiting for the answer: %w", ctx.Err())
	case r := <-answer:
		if r.Err != nil {
			return none, r.Err
		}
		return r.Val.(T), nil
	}
}

// appendGate signs a statement with the gate key, checks it and records it.
func (g *Gate) appendGate(ctx context.Context, payload []byte) (attest.Record, error) {
	recs, err := g.appendAll(ctx, [][]byte{payload})
	if err != nil {
		return attest.Record{}, err
	}
	return recs[0], nil
}

// appendAll is appendGate for several statements, which share one checkpoint.
func (g *Gate) appendAll(ctx context.Context, payloads [][]byte) ([]attest.Record, error) {
	entries := make([]ledger.Entry, len(payloads))
	for i, payload := range payloads {
		env, err := g.Signer.SignGate(payload)
		if err != nil {
			return nil, fmt.Errorf("signing with the gate key: %w", err)
		}
		if err := g.Verifier.Envelope(env); err != nil {
			return nil, fmt.Errorf("checking our own signature: %w", err)
		}
		entries[i] = ledger.Entry{Envelope: env}
	}
	return g.Ledger.Append(ctx, entries...)
}

// Ready reports why the gate refuses everything, or nil.
func (g *Gate) Ready() error { return g.Ledger.Err() }

// clock returns the time, or CLOCK_SKEW when the ledger holds a later one: a
// statement signed now would then seem older than its predecessors.
func (g *Gate) clock() (time.Time, error) {
	now := g.Now().UTC()
	// Timestamps have whole seconds and the log is written in parallel.
	if newest := g.Ledger.NewestTime(); now.Add(2 * time.Second).Before(newest) {
		return time.Time{}, attest.Errorf(attest.ClockSkew, "the clock says %s, but the ledger has a record of %s: set the clock",
			now.Format(time.RFC3339), newest.Format(time.RFC3339))
	}
	return now, nil
}

// policyFor names the policy as decisions of a track cite it.
func (g *Gate) policyFor(track string) attest.PolicyRef {
	return attest.PolicyRef{URI: g.Service + "/policy/" + track, Version: g.Policy.Version(), Digest: g.Policy.Digest()}
}

// current refuses to decide under a policy that the log has left behind.
func (g *Gate) current() error {
	if last, ok := g.Ledger.Policy(); !ok || last.Version != g.Policy.Version() || last.Digest != g.Policy.Digest() {
		return attest.Errorf(attest.PolicyOutdated, "this server has policy version %d, the log has version %d: restart it with the newest policy", g.Policy.Version(), last.Version)
	}
	return nil
}
