#!/usr/bin/env bash
# generated.sh: fails when the committed generated code is not what the .proto
# files generate, also when a file is missing or left over. It generates beside the
# tree, so that it never changes it.
set -euo pipefail

# sums DIR: one line for each generated file below DIR.
sums() { (cd "$1" && find . -name '*.pb.go' -o -name '*.pb.gw.go' -o -name '*.swagger.json' | LC_ALL=C sort | xargs sha256sum); }

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
buf generate -o "$out"
if ! diff <(sums proto) <(sums "$out/proto"); then
  echo "generated.sh: the generated code is not that of the .proto files; run: make generate" >&2
  exit 1
fi
