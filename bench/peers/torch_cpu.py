"""The contender PyTorch on the CPU, in float32; an SDXL UNet in bfloat16."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from contend import Job, Loaded, Values, contend, tensors_of

torch.set_grad_enabled(False)

Compute = Callable[[], torch.Tensor]


def kernel(job: Job) -> Compute:
    t = {name: torch.from_numpy(values) for name, values in tensors_of(job).items()}

    def split(name: str) -> torch.Tensor:
        return t[name].unflatten(-1, (job["heads"], -1)).transpose(1, 2)

    def attention() -> torch.Tensor:
        return F.scaled_dot_product_attention(split("q"), split("k"), split("v")).transpose(1, 2).flatten(2)

    return {
        "gemm": lambda: t["x"] @ t["w"],
        "conv": lambda: F.conv2d(t["x"], t["w"], t["bias"], padding=1),
        "attention": attention,
        "group norm": lambda: F.group_norm(t["x"], 32, t["gamma"], t["beta"]),
    }[job["op"]]


def unet(job: Job) -> Compute:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "test/reference"))
    import comfy_unet
    from architectures import FULL
    from safetensors import safe_open

    comfy_unet.comfy_attention.optimized_attention = comfy_unet.comfy_attention.attention_pytorch
    comfy_unet.comfy_attention.optimized_attention_masked = comfy_unet.comfy_attention.attention_pytorch
    name = job["full"]["model"]
    dtype = torch.bfloat16 if name == "sdxl" else torch.float32
    model = comfy_unet.build(next(one.arguments for one in FULL if one.name == name))
    with safe_open(job["checkpoint"], "pt") as file:
        for key in file.keys():
            comfy_unet.place(model, key, file.get_tensor(key).to(dtype))
    t = {key: torch.from_numpy(values).to(dtype) for key, values in tensors_of(job).items()}
    times = torch.from_numpy(tensors_of(job)["timesteps"])
    return lambda: model(
        t["x"], timesteps=times, context=t["context"], y=t.get("y"), control=None, transformer_options={}
    )


def load(job: Job) -> Loaded:
    compute = unet(job) if job["op"] == "unet" else kernel(job)

    def run() -> Values:
        for _ in range(job["repeats"] - 1):
            compute()
        return compute().float().numpy()

    return run


contend(load)
