"""The contender stable-diffusion.cpp on Vulkan, for whole forwards: python sd_cpp.py LIBRARY.

The library is what sd_cpp/build.sh makes. Weights as the checkpoint has them, float16; attention as it
comes, which is not its fused one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_bool, c_char_p, c_int64, c_void_p

# Without it the backend leaves drivers on the CPU out.
os.environ["GGML_VK_VISIBLE_DEVICES"] = "0"

import numpy as np
from contend import Job, Loaded, Values, contend, tensors_of

sd = ctypes.CDLL(sys.argv[1])
sd.unet_open.argtypes, sd.unet_open.restype = [c_char_p, c_bool], c_void_p
sd.unet_run.argtypes, sd.unet_run.restype = [c_void_p, *[c_int64] * 6, *[c_void_p] * 5], c_bool
sd.unet_close.argtypes, sd.unet_close.restype = [c_void_p], None


class Model:
    def __init__(self, path: str, is_sdxl: bool) -> None:
        self.handle = sd.unet_open(path.encode(), is_sdxl)
        if not self.handle:
            raise RuntimeError(f"cannot load {path}")

    def __del__(self) -> None:
        if self.handle:
            sd.unet_close(self.handle)


def load(job: Job) -> Loaded:
    t = tensors_of(job)
    model = Model(job["checkpoint"], job["full"]["model"] == "sdxl")
    images, channels, size, _ = t["x"].shape
    _, tokens, width = t["context"].shape
    y = t.get("y")
    inputs = [t["x"], t["timesteps"], t["context"]]

    def run() -> Values:
        out = np.empty_like(t["x"])
        adm = 0 if y is None else y.shape[1]
        pointers = [values.ctypes.data for values in inputs]
        last = None if y is None else y.ctypes.data
        if not sd.unet_run(model.handle, images, channels, size, tokens, width, adm, *pointers, last, out.ctypes.data):
            raise RuntimeError("the forward failed")
        return out

    return run


contend(load)
