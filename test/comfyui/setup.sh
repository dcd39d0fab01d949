#!/usr/bin/env bash
# What the tests on the real ComfyUI need, under .cache/: the Python environment, two versions of ComfyUI, the front end of the
# newer one, and model files of random weights (4 GB). Prints what it does; running it again is quick.
set -euo pipefail
cd "$(dirname "$0")/../.."
bash test/reference/setup.sh
python=.cache/reference-env/venv/bin/python
# Outside of the environment, for the test that opens the front end; its Canny node needs kornia.
packages=.cache/comfyui/front-end
if [ ! -d "$packages" ]; then
  echo 'front-end: installing that of ComfyUI 0.3.75'
  rm -rf "$packages.part"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$packages.part" \
    comfyui-frontend-package==1.32.9 'kornia>=0.7.1' kornia_rs
  mv "$packages.part" "$packages"
fi
"$python" test/comfyui/models.py
