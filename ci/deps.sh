#!/usr/bin/env bash
# deps.sh PACKAGE...: makes sure that these Debian packages are there. Nothing is
# asked of apt when they are; otherwise they are installed when the caller is root
# or may become it, and named in an error when not.
set -euo pipefail

# present PACKAGE: whether what the package is wanted for can be used. A system
# without dpkg may have it under another name, so the program itself counts too.
present() {
  case $1 in
    gcc | libc6-dev) echo '#include <stdlib.h>
int main(void) { return EXIT_SUCCESS; }' | gcc -x c - -o /dev/null 2>/dev/null ;;
    busybox-static) installed "$1" || static "$(command -v busybox || true)" ;;
    *) command -v "$1" >/dev/null || installed "$1" ;;
  esac
}

# installed PACKAGE: whether dpkg has it unpacked and set up; a removed package
# whose configuration was left behind is not.
installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# static FILE: whether an ELF program asks for no dynamic loader.
static() { [ -n "$1" ] && ! LC_ALL=C grep -aq '/ld-[a-z0-9.-]*\.so' "$1"; }

missing=()
for package in "$@"; do
  present "$package" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "deps.sh: these Debian packages are needed and there is no apt-get here; install the like of: ${missing[*]}" >&2
  exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
  root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  root=(sudo -n)
else
  echo "deps.sh: not root and sudo asks for a password. Run: apt-get install ${missing[*]}" >&2
  exit 1
fi

echo "installing ${missing[*]}"
apt() { "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null; }
# The package lists of a fresh machine are empty or stale, so the first attempt may fail.
apt install -y --no-install-recommends "${missing[@]}" 2>/dev/null || {
  apt update
  apt install -y --no-install-recommends "${missing[@]}"
}
