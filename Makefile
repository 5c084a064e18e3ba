# make demo   the whole story on this machine, from a signed image to its refusal
# make test   everything that CI checks
# The other targets are parts of these two, and bench.

.DEFAULT_GOAL := build
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Two rules may want one tool at the same time.
.NOTPARALLEL:

include tools.mk
export PATH := $(TOOLS):$(PATH)

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# One C-free static binary each, the same bytes wherever it is built.
BUILD := CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"
CLIENT_BYTES := 25000000

# What "make test" needs of Debian: a registry without the referrers API, a base
# image to build on, a C compiler for the race detector, and what the CI wrappers
# download with.
TEST_DEPS := docker-registry busybox-static gcc libc6-dev curl
DEMO_DEPS := busybox-static

.PHONY: build
build:
	$(BUILD) -o bin/ ./cmd/hallmark ./cmd/hallmarkd

.PHONY: demo
demo:
	@ci/deps.sh $(DEMO_DEPS)
	@$(MAKE) --no-print-directory build
	@go run ./internal/demo

.PHONY: test
test: deps lint tools build
	CGO_ENABLED=1 go test -race -timeout 30m ./...
	ci/fuzz.sh $(FUZZTIME)
	ci/size.sh bin/hallmark $(CLIENT_BYTES)

# Every fuzz test for a bounded time each: make fuzz FUZZTIME=5m looks harder.
FUZZTIME ?= 3s

.PHONY: fuzz
fuzz:
	ci/fuzz.sh $(FUZZTIME)

.PHONY: deps
deps:
	@ci/deps.sh $(TEST_DEPS)

.PHONY: lint
lint: tools-generate tools-lint
	ci/generated.sh
	buf lint
	ci/breaking.sh
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	go vet ./...
	staticcheck ./...

.PHONY: generate
generate: tools-generate
	buf generate

.PHONY: bench
bench:
	GOGC=300 GOMEMLIMIT=384MiB go run ./internal/bench   # as hallmarkd sets them for itself
