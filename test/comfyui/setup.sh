#!/usr/bin/env bash
# What the tests on the real ComfyUI need, under .cache/: the Python environment, two versions of ComfyUI, and model files of
# random weights (3 GB). Prints what it does; running it again is quick.
set -euo pipefail
cd "$(dirname "$0")/../.."
bash test/reference/setup.sh
.cache/reference-env/venv/bin/python test/comfyui/models.py
