# The tools that the project installs for itself, each at one version, written
# only here. cosign is there twice, as the two stock verifiers that the
# interoperability tests run: .tools/cosign-v2/cosign and .tools/cosign-v3/cosign.

TOOLS := $(CURDIR)/.tools

BUF                  := github.com/bufbuild/buf/cmd/buf@v1.70.0
PROTOC_GEN_GO        := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC   := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
PROTOC_GEN_GATEWAY   := github.com/grpc-ecosystem/grpc-gateway/v2/protoc-gen-grpc-gateway@v2.31.0
PROTOC_GEN_OPENAPI   := github.com/grpc-ecosystem/grpc-gateway/v2/protoc-gen-openapiv2@v2.31.0
STATICCHECK          := honnef.co/go/tools/cmd/staticcheck@v0.8.2
COSIGN_V2            := github.com/sigstore/cosign/v2/cmd/cosign@v2.6.5
COSIGN_V3            := github.com/sigstore/cosign/v3/cmd/cosign@v3.1.3

.PHONY: tools tools-generate tools-lint tools-interop
tools: tools-generate tools-lint tools-interop

tools-generate:
	@ci/tool.sh "$(TOOLS)" $(BUF)
	@ci/tool.sh "$(TOOLS)" $(PROTOC_GEN_GO)
	@ci/tool.sh "$(TOOLS)" $(PROTOC_GEN_GO_GRPC)
	@ci/tool.sh "$(TOOLS)" $(PROTOC_GEN_GATEWAY)
	@ci/tool.sh "$(TOOLS)" $(PROTOC_GEN_OPENAPI)

tools-lint:
	@ci/tool.sh "$(TOOLS)" $(BUF)
	@ci/tool.sh "$(TOOLS)" $(STATICCHECK)

tools-interop:
	@ci/tool.sh "$(TOOLS)/cosign-v2" $(COSIGN_V2)
	@ci/tool.sh "$(TOOLS)/cosign-v3" $(COSIGN_V3)
