#!/usr/bin/env bash
# fuzz.sh TIME [REGEXP]: runs every fuzz test of the module whose name matches for
# TIME each, starting from its seeds and its committed corpus (testdata/fuzz). An
# input that fails is written to that folder and printed; commit it with its fix.
set -euo pipefail

time=$1 only=${2:-.}
module=$(go list -m)

# One line for each: PACKAGE NAME. "go test -list" prints the names of a package
# before the line that ends with the package. Only packages that have one are built.
folders=$(grep -rlE --include='*_test.go' '^func Fuzz' . | xargs -r dirname | sort -u)
targets=$([ -z "$folders" ] || go test -list '^Fuzz' $folders | awk '/^Fuzz/ { names[n++] = $1 } $1 == "ok" { for (i = 0; i < n; i++) print $2, names[i]; n = 0 }')
[ -n "$targets" ] || { echo "fuzz.sh: the module has no fuzz test" >&2; exit 1; }

# What was found interesting in earlier runs on this machine is no part of this one.
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
ran=0
while read -r package name; do
  [[ $name =~ $only ]] || continue
  echo "fuzz ${package#"$module"/} $name"
  go test "$package" -run '^$' -fuzz "^$name\$" -fuzztime "$time" -test.fuzzcachedir "$cache/$package" >"$cache/out" 2>&1 </dev/null || {
    cat "$cache/out" >&2
    echo "fuzz.sh: $package $name failed" >&2
    exit 1
  }
  ran=$((ran + 1))
done <<<"$targets"
[ "$ran" -gt 0 ] || { echo "fuzz.sh: no fuzz test matches $only" >&2; exit 1; }
echo "fuzz: $ran tests, $time each"
