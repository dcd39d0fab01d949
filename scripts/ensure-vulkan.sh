#!/usr/bin/env bash
# Makes sure that this machine has a Vulkan adapter Dawn accepts, and says what it did.
# A GPU's own driver is left alone; on a machine without one, Mesa's software driver (lavapipe) is installed
# from Debian's packages. Not for other systems: there it only says what to install.
set -euo pipefail

say() { printf 'ensure-vulkan: %s\n' "$*"; }
fail() { printf 'ensure-vulkan: %s\n' "$*" >&2; exit 1; }

MIN_MESA=23.1   # Dawn refuses lavapipe before Mesa 23.1 (bookworm's own 22.3 is refused).

[ "$(uname -s)" = Linux ] || { say "$(uname -s) brings its own graphics driver: nothing to do"; exit 0; }

icds=$(ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json 2>/dev/null || true)
gpu=$(printf '%s\n' "$icds" | grep -vE 'lvp_icd|^$' || true)
loader=$(ldconfig -p | grep -m1 -o '/.*libvulkan\.so\.1' || true)
if [ -n "$loader" ] && [ -n "$gpu" ] && [ -e /dev/dri/renderD128 -o -e /dev/nvidia0 ]; then
  say "found a GPU driver ($(basename "$(printf '%s\n' "$gpu" | head -n1)")): nothing to do"
  exit 0
fi

# Version of the installed lavapipe package, empty when there is none.
mesa() { dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true; }
new_enough() { [ -n "$1" ] && dpkg --compare-versions "$1" ge "$MIN_MESA"; }

command -v dpkg >/dev/null || { [ -n "$loader" ] && [ -n "$icds" ] && { say 'found a Vulkan driver: nothing to do'; exit 0; }
  fail 'no Vulkan driver found; install one (your GPU vendor'"'"'s, or Mesa lavapipe 23.1 or later) and the Vulkan loader'; }

if [ -n "$loader" ] && new_enough "$(mesa)" && [ -e /usr/share/vulkan/icd.d/lvp_icd.json -o -e /usr/share/vulkan/icd.d/lvp_icd.x86_64.json ]; then
  say "found lavapipe $(mesa): nothing to do"
  exit 0
fi

SUDO=''
[ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && SUDO=sudo || fail 'no Vulkan driver; run this as root (or install sudo): apt-get install mesa-vulkan-drivers libvulkan1'; }
export DEBIAN_FRONTEND=noninteractive
apt() { $SUDO apt-get -y -qq -o Dpkg::Use-Pty=0 "$@" >/dev/null; }

say 'no Vulkan driver Dawn accepts: installing Mesa lavapipe (software)'
apt update
candidate=$(apt-cache policy mesa-vulkan-drivers | awk '/Candidate:/ {print $2}')
if new_enough "$candidate"; then
  apt install --no-install-recommends mesa-vulkan-drivers libvulkan1
else
  # The distribution's own is too old: take it from its backports suite, on the mirror apt already uses.
  . /etc/os-release
  repo=$(bash "$(dirname "$0")/apt-mirror.sh")
  [ -n "$repo" ] || fail "mesa-vulkan-drivers $candidate is too old (need $MIN_MESA) and apt has no mirror for $VERSION_CODENAME"
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s-backports main\n' "$repo" "$VERSION_CODENAME" |
    $SUDO tee /etc/apt/sources.list.d/unetd-backports.list >/dev/null
  apt update
  apt install --no-install-recommends -t "$VERSION_CODENAME-backports" mesa-vulkan-drivers libvulkan1
fi
new_enough "$(mesa)" || fail "installed mesa-vulkan-drivers $(mesa), but $MIN_MESA or later is needed"
say "installed lavapipe $(mesa)"
