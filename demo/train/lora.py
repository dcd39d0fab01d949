"""Low-rank adapters on a frozen UNet: attach, train, save in the kohya file format, merge.

What it is: y = W x + (alpha / rank) * up(down(x)) for linears and convolutions (LoCon for 3x3).
What it is not: an inference path. Adapters here act on the weight, which is exact and, at this
size, cheapest; the server under test is the one that applies them without touching weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unet import ResBlock, SpatialTransformer, UNet


class LowRank(nn.Module):
    """down [r, in, ...kernel], up [out, r, 1...]; called with W, returns W plus its delta."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        point = (1,) * (weight.ndim - 2)
        self.down = nn.Parameter(torch.empty(rank, *weight.shape[1:]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *point))
        self.alpha = alpha
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + delta(self.down, self.up, self.alpha)


def delta(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """The full-size weight change of one pair."""
    flat = up.flatten(1) @ down.flatten(1)
    return flat.unflatten(1, down.shape[1:]) * (alpha / down.shape[0])


def targets(model: UNet, convs: bool) -> Iterator[tuple[str, nn.Module]]:
    """(checkpoint path, layer): every linear and projection of the transformers; with `convs` also
    the two 3x3 convolutions of each ResBlock."""
    for path, module in model.named_modules():
        if isinstance(module, SpatialTransformer):
            for inner, layer in module.named_modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    yield f"{path}.{inner}", layer
        elif convs and isinstance(module, ResBlock):
            yield f"{path}.in_layers.2", module.in_layers[2]
            yield f"{path}.out_layers.3", module.out_layers[3]


def attach(model: UNet, rank: int, alpha: float, convs: bool) -> dict[str, LowRank]:
    """Freezes `model` and hangs a trainable pair on each target; returns them by path."""
    model.requires_grad_(False)
    pairs: dict[str, LowRank] = {}
    for path, layer in list(targets(model, convs)):
        pairs[path] = LowRank(layer.weight, rank, alpha)
        parametrize.register_parametrization(layer, "weight", pairs[path])
    return pairs


def detach(model: UNet, pairs: dict[str, LowRank]) -> None:
    for path in pairs:
        parametrize.remove_parametrizations(model.get_submodule(path), "weight", leave_parametrized=False)


def to_file(pairs: dict[str, LowRank]) -> dict[str, Tensor]:
    """kohya keys: `lora_unet_` and the checkpoint path with underscores."""
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        stem = "lora_unet_" + path.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = pair.down.detach().half()
        tensors[f"{stem}.lora_up.weight"] = pair.up.detach().half()
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha).half()
    return tensors


def merged(base: dict[str, Tensor], stack: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """UNet tensors by path (no prefix), float32, with each adapter file added at its strength."""
    out = {path: tensor.float().clone() for path, tensor in base.items()}
    for file, strength in stack:
        left = {key.rsplit(".lora_down.weight", 1)[0] for key in file if key.endswith(".lora_down.weight")}
        for path in base:
            stem = "lora_unet_" + path.removesuffix(".weight").replace(".", "_")
            if not path.endswith(".weight") or stem not in left:
                continue
            left.remove(stem)
            down, up = file[f"{stem}.lora_down.weight"].float(), file[f"{stem}.lora_up.weight"].float()
            out[path] += strength * delta(down, up, float(file[f"{stem}.alpha"]))
        if left:
            raise KeyError(f"adapter layers without a weight in the base: {sorted(left)[:3]}")
    return out
