#!/usr/bin/env bash
# Builds FOLDER/libsd_unet.so from stable-diffusion.cpp, as the source package of its Python bindings brings it, with the Vulkan
# backend. Takes some ten minutes on two cores: build.sh FOLDER PIP...
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
shift

PACKAGE=0.4.7
# What it is written against; older headers lack some of the types it names.
MIN_HEADERS=301
SUITE=trixie

for tool in cmake g++ glslc; do
  command -v "$tool" >/dev/null || { echo "it is built with cmake, g++ and glslc, and there is no $tool" >&2; exit 1; }
done
mkdir -p "$folder"
cd "$folder"

"$@" download --quiet --disable-pip-version-check --no-deps --no-binary :all: "stable-diffusion-cpp-python==$PACKAGE"
tar -xzf "stable_diffusion_cpp_python-$PACKAGE.tar.gz"

include=/usr/include
version() { awk '/#define VK_HEADER_VERSION / {print $3}' "$1/vulkan/vulkan_core.h" 2>/dev/null || echo 0; }
if [ "$(version $include)" -lt $MIN_HEADERS ]; then
  # From a newer suite of the distribution, on the mirror apt already uses; unpacked here, not installed.
  repo=$(bash "$here/../../../scripts/apt-mirror.sh")
  mkdir -p apt/lists/partial apt/archives/partial
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$repo" "$SUITE" >apt/sources.list
  apt=(apt-get -qq -o "Dir::Etc::SourceList=$PWD/apt/sources.list" -o Dir::Etc::SourceParts=-
    -o "Dir::State::Lists=$PWD/apt/lists" -o "Dir::Cache=$PWD/apt")
  "${apt[@]}" update
  (cd apt && "${apt[@]}" download libvulkan-dev && dpkg -x libvulkan-dev_*.deb .)
  include=$PWD/apt/usr/include
fi
library=$(ldconfig -p | awk '/libvulkan\.so\.1 / {print $NF; exit}')
[ -n "$library" ] || { echo 'there is no libvulkan.so.1' >&2; exit 1; }

cmake -S "$here" -B build -DCMAKE_BUILD_TYPE=Release -DVulkan_INCLUDE_DIR="$include" -DVulkan_LIBRARY="$library" \
  -DSD_CPP="$PWD/stable_diffusion_cpp_python-$PACKAGE/vendor/stable-diffusion.cpp"
cmake --build build --parallel "$(nproc)" --target sd_unet
cp build/libsd_unet.so .
