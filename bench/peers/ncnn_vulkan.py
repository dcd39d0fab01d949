"""The contender ncnn on Vulkan, for 3x3 convolutions: it has Winograd kernels for them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ncnn
import numpy as np
from contend import Job, Loaded, Values, contend, tensors_of

#: 3x3, stride 1, padding 1, with a bias.
PARAM = """7767517
2 2
Input in 0 1 in
Convolution conv 1 1 in out 0={channels} 1=3 3=1 4=1 5=1 6={weights}
"""


def load(job: Job) -> Loaded:
    t = tensors_of(job)
    net = ncnn.Net()
    net.opt.use_vulkan_compute = True
    # Stored as float16, computed in float32: its fastest on a software driver, which emulates arithmetic in float16.
    net.opt.use_fp16_arithmetic = False
    with tempfile.TemporaryDirectory() as folder:
        param, weights = Path(folder) / "conv.param", Path(folder) / "conv.bin"
        param.write_text(PARAM.format(channels=t["w"].shape[0], weights=t["w"].size))
        # Weights follow a tag; 0 is plain float32.
        weights.write_bytes(np.uint32(0).tobytes() + t["w"].tobytes() + t["bias"].tobytes())
        net.load_param(str(param))
        net.load_model(str(weights))
    x = ncnn.Mat(t["x"][0]).clone()

    def run() -> Values:
        with net.create_extractor() as extractor:
            extractor.input("in", x)
            status, out = extractor.extract("out")
            if status:
                raise RuntimeError(f"ncnn gave status {status}")
            return np.array(out)

    return run


contend(load)
