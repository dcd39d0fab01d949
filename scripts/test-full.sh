#!/usr/bin/env bash
# The full-size SD 1.5 and SDXL UNets against PyTorch. Makes the references first where they are missing: downloads PyTorch
# and ComfyUI's modules (5 GB) into .cache/. Needs 20 GB of memory, 20 GB of disk and, on two cores, about 15 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/ensure-vulkan.sh
missing=()
for name in sd15 sdxl; do [ -e ".cache/reference/$name.safetensors" ] || missing+=("$name"); done
if [ ${#missing[@]} -gt 0 ]; then
  bash test/reference/setup.sh
  .cache/reference-env/venv/bin/python test/reference/generate.py --full "${missing[@]}"
fi
npx vitest run --config vitest.full.config.ts
