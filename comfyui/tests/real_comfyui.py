"""The real ComfyUI, from the folder in COMFYUI_PATH, on the CPU. Without it, this skips the module."""

from __future__ import annotations

import os
import sys

import pytest

PATH = os.environ.get("COMFYUI_PATH", "")
if not PATH:
    pytest.skip("set COMFYUI_PATH to a folder of ComfyUI to run these", allow_module_level=True)

if PATH not in sys.path:
    sys.path.insert(0, PATH)
    import comfy.options

    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--fp32-unet"]
    import comfy.cli_args

    sys.argv = arguments
    # Importing its nodes puts its folder "comfy" in front of all others, which hides its package "utils".
    import utils.install_util  # noqa: F401
