#!/usr/bin/env bash
# tool.sh DIR PACKAGE@VERSION: installs a Go program into DIR unless the one that
# is there was built from exactly that version.
set -euo pipefail

dir=$1 package=${2%@*} version=${2##*@}
name=${package##*/}

# "go version -m" prints what a binary was built from: tab path P, tab mod M V.
built=$({ go version -m "$dir/$name" 2>/dev/null || true; } | awk '$1 == "path" { p = $2 } $1 == "mod" { v = $3 } END { print p "@" v }')
[ "$built" = "$package@$version" ] && exit 0

echo "installing $name $version (the first time this takes some minutes)"
mkdir -p "$dir"
# Without cgo a tool needs no C compiler and runs beside any libc.
CGO_ENABLED=0 GOBIN="$dir" go install "$package@$version"
