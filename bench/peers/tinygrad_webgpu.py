"""The contender tinygrad on WebGPU, by the Dawn of dawn-python, in float32: kernels as its own API has them, jitted."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# The package names its library by the processor, where tinygrad would not find it.
DAWN = Path(find_spec("pydawn").origin).parent / "lib" / f"libwebgpu_dawn_{platform.machine()}.so"
os.environ |= {"DEV": "WEBGPU", "WEBGPU_PATH": str(DAWN)}

from contend import Job, Loaded, Values, contend, tensors_of  # noqa: E402
from tinygrad import Tensor, TinyJit  # noqa: E402

Compute = Callable[..., Tensor]

KEPT = ("w", "bias", "gamma", "beta")
#: In the order that kernels take them.
FED = ("x", "q", "k", "v")


def kernel(job: Job, t: dict[str, Tensor]) -> Compute:
    def split(x: Tensor) -> Tensor:
        return x.reshape(1, x.shape[1], job["heads"], -1).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = split(q).scaled_dot_product_attention(split(k), split(v))
        return out.transpose(1, 2).reshape(q.shape)

    def group_norm(x: Tensor) -> Tensor:
        # As its nn.GroupNorm computes it.
        normed = x.reshape(1, 32, -1).layernorm(eps=1e-5).reshape(x.shape)
        return normed * t["gamma"].reshape(1, -1, 1, 1) + t["beta"].reshape(1, -1, 1, 1)

    computes: dict[str, Compute] = {
        "gemm": lambda x: x @ t["w"],
        "conv": lambda x: x.conv2d(t["w"], t["bias"], padding=1),
        "attention": attention,
        "group norm": group_norm,
    }
    return computes[job["op"]]


def load(job: Job) -> Loaded:
    t = tensors_of(job)
    kept = {name: Tensor(t[name]).realize() for name in KEPT if name in t}
    inputs = [t[name] for name in FED if name in t]
    compute = TinyJit(lambda *tensors: kernel(job, kept)(*tensors).realize())

    def run() -> Values:
        tensors = [Tensor(values).realize() for values in inputs]
        for _ in range(job["repeats"] - 1):
            compute(*tensors)
        return compute(*tensors).numpy()

    # The first runs as it is, the second is captured.
    run()
    run()
    return run


contend(load)
