#!/usr/bin/env bash
# breaking.sh [REF]: fails when the .proto files break callers of the API as it was
# at REF. Without REF that is the last state before the change at hand: HEAD when
# the work tree differs from it, else where the branch left origin/main, else the
# commit before HEAD. It reads the old files with git archive, which works in
# shallow clones too.
set -euo pipefail

commit() { git rev-parse --quiet --verify "$1^{commit}" 2>/dev/null; }

previous() {
  if ! git diff --quiet HEAD -- proto buf.yaml; then
    commit HEAD
    return
  fi
  local base
  if base=$(git merge-base HEAD origin/main 2>/dev/null) && [ "$base" != "$(commit HEAD)" ]; then
    echo "$base"
    return
  fi
  commit HEAD~1
}

if [ $# -gt 0 ]; then
  base=$(commit "$1") || { echo "breaking.sh: no commit $1" >&2; exit 1; }
elif ! base=$(previous) || ! git cat-file -e "$base:buf.yaml" 2>/dev/null; then
  echo "breaking.sh: no earlier API in this clone to compare with"
  exit 0
fi

old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
git archive "$base" buf.yaml proto | tar -x -C "$old"
buf breaking --against "$old"
