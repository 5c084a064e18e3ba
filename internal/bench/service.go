package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/ledger"
	"github.com/hallmarkd/hallmark/policy"
	"github.com/hallmarkd/hallmark/registry"
	"github.com/hallmarkd/hallmark/signer"
	"github.com/hallmarkd/hallmark/verifier"
)

const (
	service = "https://bench.example.com"
	issuer  = "https://ci.example.com"
	repo    = attest.Repository("registry.example.com/bench/app")
	rules   = `version: 1
roles:
  signers: [{issuer: ci, images: ["registry.example.com/bench/*"], when: "id.repository_id == '1'"}]
  promoters: [{issuer: ci, images: ["registry.example.com/bench/*"], when: "id.repository_id == '1'"}]
tracks:
- name: bench
  images: ["registry.example.com/bench/*"]
  stages:
  - name: test
    rules:
    - signed_by: {issuer: ci, when: "id.repository_id == '1'"}
    - provenance: {source_id: "1", source: "https://github.com/acme/app", refs: ["refs/heads/main"], min_level: 2, min_grade: claim}
    - base_image: {allowed: ["registry.example.com/base/*"], proof: layers}
`
)

// instance is a gate over a real ledger in a folder of its own.
type instance struct {
	dir    string
	ledger *ledger.Ledger
	signer *signer.Signer
	gate   *gate.Gate

	signings int64 // done so far
}

func openInstance(ctx context.Context, dir string) (*instance, error) {
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	keys := signer.Config{Dir: filepath.Join(dir, "keys"), Service: service, Now: time.Now, Logger: quiet}
	fresh := signer.Init(keys)
	if fresh != nil && attest.ReasonOf(fresh) != attest.AlreadyExists {
		return nil, fresh
	}
	s, err := signer.Open(keys)
	if err != nil {
		return nil, err
	}
	cfg := ledger.Config{Dir: dir, Origin: s.Origin(), LogKey: s.LogKey(), Logger: quiet}
	if fresh == nil {
		if err := ledger.Init(ctx, cfg); err != nil {
			return nil, err
		}
	}
	l, err := ledger.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	check, err := verifier.New(s.TrustedRoot(), s.GateKeyPEM(), service)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "policy.yaml")
	if err := os.WriteFile(path, []byte(rules), 0o600); err != nil {
		return nil, err
	}
	p, err := policy.Load(path, policy.Known{
		Issuers: map[string]attest.Kind{"ci": attest.Workload}, IssuerURLs: map[string]string{"ci": issuer}, Service: service,
	})
	if err != nil {
		return nil, err
	}
	reg, err := registry.New(registry.Config{Logger: quiet})
	if err != nil {
		return nil, err
	}
	g, err := gate.Open(ctx, gate.Config{
		Service: service, Ledger: l, Signer: s, Verifier: check, Registry: reg, Policy: p,
		Configuration: []byte("{}"), Now: time.Now, Logger: quiet, Images: image,
	})
	if err != nil {
		return nil, err
	}
	return &instance{dir: dir, ledger: l, signer: s, gate: g}, nil
}

func (in *instance) close() error {
	defer in.signer.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return in.ledger.Close(ctx)
}

// image answers as the registry would for an image on a proved base.
func image(_ context.Context, ref attest.ImageRef, _ string, _ func(attest.Repository) bool) (attest.Image, error) {
	base := attest.Hash([]byte("base"))
	return attest.Image{Ref: ref, MediaType: "application/vnd.oci.image.manifest.v1+json", Base: attest.Base{
		Result: attest.ProvenLayers, Repository: "registry.example.com/base/debian", Tag: "12", Digest: base,
		Platforms: []attest.BasePart{{Image: ref.Digest, Base: base, Layers: 1}},
		Claims:    []attest.BaseClaim{{From: attest.BaseFromAnnotation, Name: "registry.example.com/base/debian:12", Digest: base, Result: attest.ProvenLayers}},
	}}, nil
}

// job is the identity of one CI run.
func job(run int64) attest.Identity {
	n := strconv.FormatInt(run, 10)
	uri := "https://github.com/acme/app/.github/workflows/release.yml@refs/heads/main"
	commit := fmt.Sprintf("%x", sha256.Sum256([]byte(n)))[:40]
	return attest.Identity{
		IssuerName: "ci", Provider: "github", Kind: attest.Workload, Issuer: issuer, Subject: "repo:acme/app:ref:refs/heads/main",
		SAN: uri, TokenID: fmt.Sprintf("%x", sha256.Sum256([]byte("token"+n))), Expires: time.Now().Add(5 * time.Minute),
		Build: attest.Build{
			SourceURI: "https://github.com/acme/app", Repository: "acme/app", RepositoryID: "1", OwnerURI: "https://github.com/acme", OwnerID: "2",
			Visibility: "private", Commit: commit, Ref: "refs/heads/main", WorkflowPath: ".github/workflows/release.yml", WorkflowName: "release",
			ConfigURI: uri, ConfigDigest: commit, SignerURI: uri, SignerDigest: commit, Event: "push",
			RunURI: "https://github.com/acme/app/actions/runs/" + n + "/attempts/1", RunID: n, RunAttempt: "1", Runner: "github-hosted",
			Actor: "somebody", ActorID: "583231",
		},
	}
}

func digestOf(n int64) attest.ImageRef {
	return attest.ImageRef{Repository: repo, Digest: attest.Hash([]byte("image" + strconv.FormatInt(n, 10)))}
}

// sign signs image n in run and reports a refusal as an error.
func (in *instance) sign(ctx context.Context, run, n int64) error {
	out, err := in.gate.Sign(ctx, job(run), gate.SignRequest{Images: []gate.SignImage{{Ref: digestOf(n)}}, AttachByClient: true})
	if err != nil {
		return err
	}
	return out[0].Err
}

func (b *bench) run() error {
	dir, err := os.MkdirTemp("", "hallmark-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := b.floors(); err != nil {
		return err
	}
	in, err := openInstance(b.ctx, dir)
	if err != nil {
		return err
	}
	err = errors.Join(b.signings(in), b.decisions(in), b.overGRPC(in), in.close())
	if err != nil {
		return err
	}
	return errors.Join(b.stored(in), b.start(dir), b.bases(), b.client())
}

// signings measures whole signings: certificate, two statements, two timestamps,
// log, checkpoint, index and bundles.
func (b *bench) signings(in *instance) error {
	debug.FreeOSMemory()
	b.add(row{Name: "memory idle", Value: residentMiB(), Unit: "MiB", Reach: "<= 100"})
	var n atomic.Int64
	// An idle log: the last checkpoint is older than its interval.
	_, lat, err := b.rate(1, func(int, int) error {
		time.Sleep(150 * time.Millisecond)
		k := n.Add(1)
		return in.sign(b.ctx, k, k)
	})
	if err != nil {
		return err
	}
	b.add(row{Name: "signing on an idle log, p50", Value: percentile(lat, 0.5) - 150, Unit: "ms", Reach: "<= 50"})

	each, lat, err := b.rate(b.callers, func(int, int) error { k := n.Add(1); return in.sign(b.ctx, k, k) })
	if err != nil {
		return err
	}
	b.add(row{Name: "signings, a certificate each", Value: each, Unit: "/s", Reach: ">= 600", Floor: b.crypto, FloorIs: "raw cryptography"})
	b.add(row{Name: "signings, a certificate each: beside the log", Value: each, Unit: "/s", Floor: b.log, FloorIs: "raw log"})
	b.add(row{Name: fmt.Sprintf("  p50 at %d callers", b.callers), Value: percentile(lat, 0.5), Unit: "ms", Reach: "<= 200"})
	b.add(row{Name: fmt.Sprintf("  p99 at %d callers", b.callers), Value: percentile(lat, 0.99), Unit: "ms"})
	b.add(row{Name: "  resident memory under load", Value: residentMiB(), Unit: "MiB", Reach: "<= 512"})

	ten, _, err := b.rate(b.callers, func(int, int) error { k := n.Add(1); return in.sign(b.ctx, 1_000_000_000+k/10, k) })
	if err != nil {
		return err
	}
	b.add(row{Name: "signings, ten a run", Value: ten, Unit: "/s", Reach: ">= 1000", Floor: b.log, FloorIs: "raw log"})
	in.signings = n.Load()
	return nil
}

// decisions measures the gate on evidence it has seen: the rules of a stage, in
// process.
func (b *bench) decisions(in *instance) error {
	first := time.Now()
	ask := func(n int64) error {
		p, err := in.gate.Promote(b.ctx, job(1), gate.PromoteRequest{Ref: digestOf(n), ToStage: "test", DryRun: true})
		if err == nil && p.Verdict != gate.Allowed {
			err = fmt.Errorf("denied: %+v", p.Results)
		}
		return err
	}
	if err := ask(1); err != nil {
		return err
	}
	b.add(row{Name: "first decision about a digest", Value: float64(time.Since(first).Microseconds()) / 1000, Unit: "ms", Reach: "<= 5"})
	perSecond, lat, err := b.rate(2*runtime.NumCPU(), func(caller, i int) error { return ask(int64(1 + i%100)) })
	if err != nil {
		return err
	}
	b.add(row{Name: "decisions on known evidence, in process", Value: perSecond, Unit: "/s", Reach: ">= 20000"})
	b.add(row{Name: "  p99", Value: percentile(lat, 0.99), Unit: "ms", Reach: "<= 5"})
	return nil
}

// stored measures what the signings left on disk, once the service is closed.
func (b *bench) stored(in *instance) error {
	log, err := diskBytes(filepath.Join(in.dir, "log"))
	if err != nil {
		return err
	}
	all, err := diskBytes(in.dir)
	if err != nil {
		return err
	}
	each := func(bytes int64) float64 { return float64(bytes) / float64(in.signings) / 1024 }
	b.add(row{Name: "stored a signing, log, envelopes and index", Value: each(all), Unit: "KiB", Reach: "<= 12"})
	b.add(row{Name: "  of it the log", Value: each(log), Unit: "KiB"})
	b.add(row{Name: "  of it the database: envelopes and index", Value: each(all - log), Unit: "KiB"})
	return nil
}

// start measures opening what the run has written.
func (b *bench) start(dir string) error {
	t := time.Now()
	in, err := openInstance(b.ctx, dir)
	if err != nil {
		return err
	}
	b.add(row{Name: fmt.Sprintf("start with %d records", in.ledger.Size()), Value: time.Since(t).Seconds(), Unit: "s", Reach: "<= 1 at 1M"})
	return in.close()
}
