package server

import (
	"context"

	"github.com/hallmarkd/hallmark/attest"
	pb "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

// The four services. Each method reads its request, asks the gate on behalf of
// the caller, and writes the answer; the interceptor does everything else.

type signing struct {
	pb.UnimplementedSigningServiceServer
	s *Server
}

func (h signing) SignImages(ctx context.Context, in *pb.SignImagesRequest) (*pb.SignImagesResponse, error) {
	req, err := readSign(in)
	if err != nil {
		return nil, err
	}
	results, err := h.s.gate.Sign(ctx, caller(ctx), req)
	if err != nil {
		return nil, err
	}
	return h.s.writeSigned(ctx, results), nil
}

func (h signing) Import(ctx context.Context, in *pb.ImportRequest) (*pb.ImportResponse, error) {
	ref, err := readImage("image", in.GetImage())
	if err != nil {
		return nil, err
	}
	found, err := h.s.gate.Import(ctx, caller(ctx), ref)
	if err != nil {
		return nil, err
	}
	return writeImports(found), nil
}

func (h signing) Attest(ctx context.Context, in *pb.AttestRequest) (*pb.AttestResponse, error) {
	req, err := readAttest(in)
	if err != nil {
		return nil, err
	}
	signed, err := h.s.gate.Attest(ctx, caller(ctx), req)
	if err != nil {
		return nil, err
	}
	return writeAttested(signed), nil
}

type promotion struct {
	pb.UnimplementedPromotionServiceServer
	s *Server
}

func (h promotion) Verify(ctx context.Context, in *pb.VerifyRequest) (*pb.VerifyResponse, error) {
	req, err := readVerify(in)
	if err != nil {
		return nil, err
	}
	d, err := h.s.gate.Verify(ctx, caller(ctx), req)
	if err != nil {
		return nil, err
	}
	return &pb.VerifyResponse{Decision: h.s.writeDecision(d)}, nil
}

func (h promotion) Promote(ctx context.Context, in *pb.PromoteRequest) (*pb.PromoteResponse, error) {
	req, err := readPromote(in)
	if err != nil {
		return nil, err
	}
	p, err := h.s.gate.Promote(ctx, caller(ctx), req)
	if err != nil {
		return nil, err
	}
	return &pb.PromoteResponse{
		Decision: h.s.writeDecision(p.Decision), Effect: p.Effect, EffectDetail: p.EffectDetail, Target: p.Target,
		VsaBundle: p.VSABundle, VsaEnvelope: p.VSAEnvelope,
	}, nil
}

func (h promotion) ListStages(ctx context.Context, in *pb.ListStagesRequest) (*pb.ListStagesResponse, error) {
	q, err := readStages(in)
	if err != nil {
		return nil, err
	}
	stages, next, err := h.s.gate.Stages(ctx, caller(ctx), q)
	if err != nil {
		return nil, err
	}
	return &pb.ListStagesResponse{Stages: each(stages, writeStage), NextPageToken: next}, nil
}

type audit struct {
	pb.UnimplementedAuditServiceServer
	s *Server
}

func (h audit) GetArtifact(ctx context.Context, in *pb.GetArtifactRequest) (*pb.GetArtifactResponse, error) {
	ref, err := readImage("image", in.GetImage())
	if err != nil {
		return nil, err
	}
	items, err := h.s.gate.Artifact(ctx, caller(ctx), ref)
	if err != nil {
		return nil, err
	}
	return &pb.GetArtifactResponse{Records: each(items, writeItem)}, nil
}

func (h audit) ListRecords(ctx context.Context, in *pb.ListRecordsRequest) (*pb.ListRecordsResponse, error) {
	q, err := readRecords(in)
	if err != nil {
		return nil, err
	}
	page, err := h.s.gate.Records(ctx, caller(ctx), q)
	if err != nil {
		return nil, err
	}
	return &pb.ListRecordsResponse{
		Records: each(page.Records, writeSummary), NextPageToken: page.Next, LogSize: number(page.LogSize),
	}, nil
}

func (h audit) GetRecord(ctx context.Context, in *pb.GetRecordRequest) (*pb.GetRecordResponse, error) {
	id, err := readRecordID(in.GetId())
	if err != nil {
		return nil, err
	}
	item, err := h.s.gate.Record(ctx, caller(ctx), id)
	if err != nil {
		return nil, err
	}
	return &pb.GetRecordResponse{Record: writeItem(item), Checkpoint: string(item.Record.Checkpoint)}, nil
}

func (h audit) GetDecision(ctx context.Context, in *pb.GetDecisionRequest) (*pb.GetDecisionResponse, error) {
	if in.GetId() <= 0 {
		return nil, attest.Errorf(attest.BadRequest, "id %d is no decision: decisions are numbered from 1", in.GetId()).With("field", "id")
	}
	d, err := h.s.gate.Decision(ctx, caller(ctx), uint64(in.GetId()))
	if err != nil {
		return nil, err
	}
	return &pb.GetDecisionResponse{Decision: h.s.writeDecision(d)}, nil
}

func (h audit) GetBase(ctx context.Context, in *pb.GetBaseRequest) (*pb.GetBaseResponse, error) {
	ref, err := readImage("image", in.GetImage())
	if err != nil {
		return nil, err
	}
	chain, size, err := h.s.gate.Base(ctx, caller(ctx), ref)
	if err != nil {
		return nil, err
	}
	return &pb.GetBaseResponse{Chain: each(chain, writeLink), LogSize: number(size)}, nil
}

type trust struct {
	pb.UnimplementedTrustServiceServer
	s *Server
}

func (h trust) GetTrustedRoot(context.Context, *pb.GetTrustedRootRequest) (*pb.GetTrustedRootResponse, error) {
	t := h.s.gate.Trust()
	return &pb.GetTrustedRootResponse{TrustedRoot: t.TrustedRoot, Sha256: t.Fingerprint, PublicUrl: t.Service}, nil
}

func (h trust) GetGateKey(context.Context, *pb.GetGateKeyRequest) (*pb.GetGateKeyResponse, error) {
	return &pb.GetGateKeyResponse{Pem: string(h.s.gate.Trust().GateKeyPEM)}, nil
}

func (h trust) GetCheckpoint(ctx context.Context, _ *pb.GetCheckpointRequest) (*pb.GetCheckpointResponse, error) {
	note, err := h.s.gate.Checkpoint(ctx)
	if err != nil {
		return nil, err
	}
	return &pb.GetCheckpointResponse{Checkpoint: string(note)}, nil
}

func (h trust) WhoAmI(ctx context.Context, in *pb.WhoAmIRequest) (*pb.WhoAmIResponse, error) {
	repo, err := readRepository("repository", in.GetRepository())
	if err != nil {
		return nil, err
	}
	who, err := h.s.gate.WhoAmI(ctx, caller(ctx), repo)
	if err != nil {
		return nil, err
	}
	return writeWho(who), nil
}
