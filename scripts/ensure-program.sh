#!/usr/bin/env bash
# Makes sure that a program is there: ensure-program.sh PROGRAM [PACKAGE...]. What is on the PATH is left alone; on Debian the
# packages (the program's name unless told) are installed. Not for other systems: there it only says what is missing.
set -euo pipefail

program=$1
shift
packages=("${@:-$program}")

say() { printf 'ensure-program: %s\n' "$*"; }
fail() { printf 'ensure-program: %s\n' "$*" >&2; exit 1; }

if command -v "$program" >/dev/null; then say "found $program: nothing to do"; exit 0; fi
command -v apt-get >/dev/null || fail "$program is not on the PATH; install it with your system's packages"

SUDO=''
[ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && SUDO=sudo || fail "$program is missing; run this as root (or install sudo): apt-get install ${packages[*]}"; }
export DEBIAN_FRONTEND=noninteractive

say "installing ${packages[*]}"
$SUDO apt-get -y -qq -o Dpkg::Use-Pty=0 update >/dev/null
$SUDO apt-get -y -qq -o Dpkg::Use-Pty=0 install --no-install-recommends "${packages[@]}" >/dev/null
command -v "$program" >/dev/null || fail "installed ${packages[*]}, but $program is still not on the PATH"
say "installed $program"
