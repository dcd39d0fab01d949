"""The contender PyTorch: python torch_peer.py cpu|cuda [compiled].

On the CPU in float32, an SDXL UNet in bfloat16. On a card in float16, images and weights of convolutions as
channels_last; whole UNets by way of torch.compile as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from contend import Job, Loaded, Values, contend, tensors_of

torch.set_grad_enabled(False)

DEVICE = torch.device(sys.argv[1])
COMPILED = "compiled" in sys.argv[2:]

Compute = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def placed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    layout = torch.channels_last if DEVICE.type == "cuda" and values.dim() == 4 else torch.preserve_format
    return values.to(DEVICE, dtype).contiguous(memory_format=layout)


def kernel(job: Job) -> Compute:
    heads = job["heads"]

    def split(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attention(t: dict[str, torch.Tensor]) -> torch.Tensor:
        out = F.scaled_dot_product_attention(split(t["q"]), split(t["k"]), split(t["v"]))
        return out.transpose(1, 2).flatten(2)

    computes: dict[str, Compute] = {
        "gemm": lambda t: t["x"] @ t["w"],
        "conv": lambda t: F.conv2d(t["x"], t["w"], t["bias"], padding=1),
        "attention": attention,
        "group norm": lambda t: F.group_norm(t["x"], 32, t["gamma"], t["beta"]),
    }
    return computes[job["op"]]


def unet(job: Job, dtype: torch.dtype) -> Compute:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "test/reference"))
    import comfy_unet
    from architectures import FULL
    from safetensors import safe_open

    comfy_unet.comfy_attention.optimized_attention = comfy_unet.comfy_attention.attention_pytorch
    comfy_unet.comfy_attention.optimized_attention_masked = comfy_unet.comfy_attention.attention_pytorch
    model = comfy_unet.build(next(one.arguments for one in FULL if one.name == job["full"]["model"]))
    with safe_open(job["checkpoint"], "pt") as file:
        for key in file.keys():
            comfy_unet.place(model, key, placed(file.get_tensor(key), dtype))
    forward = torch.compile(model) if COMPILED else model

    def compute(t: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: t.get(name) for name in ("timesteps", "context", "y")}
        return forward(t["x"], **inputs, control=None, transformer_options={})

    return compute


def load(job: Job) -> Loaded:
    is_unet = job["op"] == "unet"
    is_sdxl = is_unet and job["full"]["model"] == "sdxl"
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16 if is_sdxl else torch.float32
    compute = unet(job, dtype) if is_unet else kernel(job)
    tensors = {name: torch.from_numpy(values) for name, values in tensors_of(job).items()}
    # What a model keeps lies where it computes; the rest is brought there at each run.
    kept = {name: placed(tensors.pop(name), dtype) for name in ("w", "bias", "gamma", "beta") if name in tensors}
    inputs = {name: values if name == "timesteps" else values.to(dtype) for name, values in tensors.items()}

    def run() -> Values:
        t = kept | {name: placed(values, values.dtype) for name, values in inputs.items()}
        for _ in range(job["repeats"] - 1):
            compute(t)
        return compute(t).float().cpu().numpy()

    # Compiles, chooses algorithms, warms up.
    for _ in range(3 if DEVICE.type == "cuda" else 0):
        run()
    return run


contend(load)
