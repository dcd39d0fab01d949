"""What tests of the patcher have in common: a remote model, prompts, and a short sampling."""

from __future__ import annotations

from typing import Any

import real_comfyui  # noqa: F401  # isort: skip
import nodes as comfy_nodes
import torch
from torch_server import TorchServer

from unetd import skeleton
from unetd.client import Patience
from unetd.nodes import UnetdLoadCheckpoint
from unetd.patcher import RemoteModelPatcher

MODEL = "tiny.safetensors"
ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def loaded(server: TorchServer) -> RemoteModelPatcher:
    where = skeleton.Remote(server, MODEL, Patience("error"))  # type: ignore[arg-type]
    return UnetdLoadCheckpoint()._load_remote(where, "auto")


def prompt(seed: int, tokens: int = 77, **extra: Any) -> list[Any]:
    return [[torch.randn(1, tokens, 768, generator=torch.Generator().manual_seed(seed)), extra]]


def sampled(
    model: Any,
    positive: Any = None,
    negative: Any = None,
    sampler: str = "euler",
    cfg: float = 7.0,
    size: tuple[int, int] = (8, 8),
    batch: int = 1,
    steps: int = 3,
    **extra: Any,
) -> torch.Tensor:
    latent = {"samples": torch.zeros(batch, 4, *size), **extra}
    (result,) = comfy_nodes.common_ksampler(
        model, 5, steps, cfg, sampler, "normal", positive or prompt(1), negative or prompt(2), latent
    )
    out: torch.Tensor = result["samples"]
    return out
