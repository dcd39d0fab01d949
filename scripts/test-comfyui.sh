#!/usr/bin/env bash
# The ComfyUI node pack: its lint, types and unit tests, then whole workflows on the real ComfyUI, two versions of it, with a
# real server, and the examples in its front end. On a fresh machine this installs PyTorch and ComfyUI under .cache/ first
# (11 GB), and Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/ensure-vulkan.sh
bash scripts/ensure-program.sh chromium chromium fonts-dejavu-core
bash test/comfyui/setup.sh
bin=$PWD/.cache/reference-env/venv/bin
status=0
python=(comfyui test/comfyui test/reference bench)
{ "$bin/ruff" check "${python[@]}" && "$bin/ruff" format --check "${python[@]}"; } || status=1
(cd comfyui && "$bin/mypy") || status=1
# pytest VERSION FILE...
pytest() {
  local comfyui=$PWD/.cache/reference-env/comfyui-$1
  shift
  COMFYUI_PATH=$comfyui PYTHONPATH=test/comfyui "$bin/python" -m pytest -q -p tally "$@" || status=1
}
pytest 0.3.75 comfyui/tests
# Those that touch ComfyUI, on the other version too.
mapfile -t touching < <(grep -l real_comfyui comfyui/tests/test_*.py)
pytest 0.3.52 "${touching[@]}"
npx vitest run --config vitest.comfyui.config.ts "$@" || status=1
exit $status
