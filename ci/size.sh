#!/usr/bin/env bash
# size.sh FILE BYTES: fails when FILE is larger. The client is downloaded in every
# CI job; what it must not link is checked by internal/archtest.
set -euo pipefail

size=$(wc -c <"$1")
echo "$1: $size bytes of at most $2"
[ "$size" -le "$2" ] || { echo "size.sh: $1 is larger than $2 bytes" >&2; exit 1; }
