#!/usr/bin/env bash
# The numbers of the kernels for matrix units, without a GPU: Mesa's lavapipe of Debian sid imitates units of 8x8x8 halves. It
# runs in a chroot under .cache/matrix/ (1 GB, made once, about 90 s), whose mounts end with the process that made them.
# Units of 16x16x16 and of f32 it has none of: those variants are compiled by the null rung alone and skipped here, aloud. Sid changes
# daily: where no such chroot can be made, or no adapter opens in it, all runs on this machine's own adapter, which skips what it
# lacks. Once an adapter has opened, wrong numbers are a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
root=.cache/matrix/root
tests=(node_modules/vitest/vitest.mjs run --config vitest.matrix.config.ts)

say() { printf 'test-matrix: %s\n' "$*"; }
here() { say "no chroot: $*; this machine's own adapter it is"; exec node "${tests[@]}"; }

[ "$(id -u)" = 0 ] || here 'it takes root'
unshare --mount true 2>/dev/null || here 'mounting is not allowed'

if [ ! -d "$root" ]; then
  . /etc/os-release
  [ "$ID" = debian ] || here "debootstrap's mirror is known on Debian only, this is $ID"
  bash scripts/ensure-program.sh debootstrap || here 'debootstrap cannot be installed'
  mirror=$(bash scripts/apt-mirror.sh)
  [ -n "$mirror" ] || here "apt has no mirror for $VERSION_CODENAME"
  rm -rf "$root.part"
  mkdir -p "$root.part"
  say "making $root with debootstrap"
  timeout 300 debootstrap --variant=minbase --include=mesa-vulkan-drivers,libvulkan1,nodejs sid "$root.part" "$mirror" \
    >.cache/matrix/debootstrap.log 2>&1 || here 'debootstrap failed, see .cache/matrix/debootstrap.log'
  mkdir "$root.part/repo"
  mv "$root.part" "$root"
fi

# Runs node in the chroot.
inside() {
  unshare --mount bash -euc '
    mount --bind . "$0/repo"
    mount --rbind /dev "$0/dev"
    mount -t proc proc "$0/proc"
    exec chroot "$0" env -C /repo HOME=/tmp VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.json node "$@"
  ' "$root" "$@"
}

probe='const { Device } = await import("./src/gpu/device.ts");
  const device = await Device.open();
  console.log(`${device.adapter.name}, ${device.capabilities.matrices.length} shapes of matrix units, node ${process.version}`);
  device.close();'
adapter=$(inside --import tsx --input-type=module --eval "$probe" 2>.cache/matrix/adapter.log) ||
  here 'no adapter opens in it, see .cache/matrix/adapter.log'
say "in $root: $adapter"
inside "${tests[@]}"
