"""Files of every kind of adapter for the small SD 1.5 UNet of the tests, as ComfyUI reads them."""

from __future__ import annotations

from typing import Any

import real_comfyui  # noqa: F401  # isort: skip
import comfy.sd
import torch
from patcher_setting import ATTENTION

CONV = "input_blocks.1.0.in_layers.2"


def lora_file(
    seed: int = 0, rank: int = 4, keys: tuple[str, ...] = (ATTENTION, CONV)
) -> dict[str, torch.Tensor]:
    """In kohya's naming, with an alpha. The first key is a linear layer, the second a convolution."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator) * 0.2  # noqa: E731
    tensors: dict[str, torch.Tensor] = {}
    for key in keys:
        name = "lora_unet_" + key.replace(".", "_")
        kernel = (3, 3) if key == CONV else ()
        tensors[f"{name}.lora_down.weight"] = random(rank, 320, *kernel)
        tensors[f"{name}.lora_up.weight"] = random(320, rank, *(1 for _ in kernel))
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    return tensors


def with_lora(model: Any, tensors: dict[str, torch.Tensor], strength: float) -> Any:
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)[0]


def random(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


KINDS: dict[str, dict[str, torch.Tensor]] = {
    "lora": {"lora_up.weight": random(320, 4), "lora_down.weight": random(4, 320)},
    "lora with mid": {
        "lora_up.weight": random(320, 4, 1, 1),
        "lora_down.weight": random(4, 320, 1, 1),
        "lora_mid.weight": random(4, 4, 3, 3),
        "alpha": torch.tensor(2.0),
    },
    "dora": {
        "lora_up.weight": random(320, 4),
        "lora_down.weight": random(4, 320),
        "dora_scale": random(320, 1).abs() + 1,
        "alpha": torch.tensor(2.0),
    },
    "loha": {
        **{f"hada_w{n}_a": random(320, 4, seed=n) for n in (1, 2)},
        **{f"hada_w{n}_b": random(4, 320, seed=9 + n) for n in (1, 2)},
        "alpha": torch.tensor(3.0),
    },
    "loha with tucker": {
        **{f"hada_w{n}_a": random(4, 320, seed=n) for n in (1, 2)},
        **{f"hada_w{n}_b": random(4, 320, seed=9 + n) for n in (1, 2)},
        **{f"hada_t{n}": random(4, 4, 3, 3, seed=20 + n) for n in (1, 2)},
    },
    "lokr": {"lokr_w1": random(16, 16), "lokr_w2": random(20, 20)},
    "lokr factored": {
        **{"lokr_w1_a": random(16, 2), "lokr_w1_b": random(2, 16)},
        **{"lokr_w2_a": random(20, 2), "lokr_w2_b": random(2, 20)},
        "alpha": torch.tensor(1.0),
    },
    "glora": {
        **{"a1.weight": random(320, 4), "a2.weight": random(4, 320)},
        **{"b1.weight": random(320, 4, seed=1), "b2.weight": random(4, 320, seed=2)},
        "alpha": torch.tensor(2.0),
    },
    "oft": {"oft_blocks": random(20, 16, 16), "rescale": torch.ones(320, 1), "alpha": torch.tensor(1e-2)},
    "boft": {"oft_blocks": random(2, 20, 16, 16), "alpha": torch.tensor(1e-2)},
    "diff": {"diff": random(320, 320), "diff_b": random(320)},
    "norm": {"w_norm": random(320), "b_norm": random(320, seed=3)},
    "set": {"set_weight": random(320, 320)},
}
#: The layer that each kind is tried on.
PLACES = {
    "lora with mid": CONV,
    "loha with tucker": CONV,
    "diff": "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "norm": "input_blocks.1.1.transformer_blocks.0.norm1",
}


def file_of(kind: str) -> dict[str, torch.Tensor]:
    stem = "lora_unet_" + PLACES.get(kind, ATTENTION).replace(".", "_")
    return {f"{stem}.{name}": tensor.clone() for name, tensor in KINDS[kind].items()}
