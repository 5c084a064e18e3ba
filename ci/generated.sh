#!/usr/bin/env bash
# generated.sh: fails when the committed generated code is not what the .proto
# files generate. It generates beside the tree, so that it never changes it.
set -euo pipefail

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
buf generate -o "$out"
if ! diff -r --brief --exclude='*.proto' --exclude='rest.yaml' proto "$out/proto"; then
  echo "generated.sh: the generated code is not that of the .proto files; run: make generate" >&2
  exit 1
fi
