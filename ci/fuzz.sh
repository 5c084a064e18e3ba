#!/usr/bin/env bash
# fuzz.sh TIME [REGEXP]: runs every fuzz test of the module whose name matches for
# TIME each, starting from its seeds and its committed corpus (testdata/fuzz). An
# input that fails is written to that folder and printed; commit it with its fix.
set -euo pipefail

time=$1 only=${2:-.}
module=$(go list -m)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# in_time NAME: whether all that a run said against NAME is that its time was over
# just when an input was tried. Go before 1.27 fails for that now and then
# (go.dev/issue/75804); a failing input is always printed and written.
in_time() {
  grep -qx '    context deadline exceeded' "$work/said" &&
    ! grep -qvE "^(fuzz: elapsed: .*|--- FAIL: $1 \([0-9.]+s\)|    context deadline exceeded|FAIL)\$" "$work/said"
}

# What earlier runs on this machine found interesting is no part of this one.
mkdir "$work/found"
ran=0
for folder in $(grep -rlE --include='*_test.go' '^func Fuzz' . | xargs -r -n 1 dirname | sort -u); do
  # -fuzz has the compiler count which branches an input takes.
  go test -c -fuzz . -o "$work/test" "$folder"
  # The names come from the test binary: what does not run is not listed.
  names=$(cd "$folder" && "$work/test" -test.list '^Fuzz')
  for name in $names; do
    [[ $name == Fuzz* && $name =~ $only ]] || continue
    echo "fuzz ${folder#./} $name"
    (cd "$folder" && "$work/test" -test.run '^$' -test.fuzz "^$name\$" -test.fuzztime "$time" -test.fuzzcachedir "$work/found/${folder#./}") >"$work/said" 2>&1 </dev/null || in_time "$name" || {
      cat "$work/said" >&2
      echo "fuzz.sh: $module/${folder#./} $name failed" >&2
      exit 1
    }
    ran=$((ran + 1))
  done
done
[ "$ran" -gt 0 ] || { echo "fuzz.sh: no fuzz test matches $only" >&2; exit 1; }
echo "fuzz: $ran tests, $time each"
