"""A second opinion: diffusers' UNet2DConditionModel with the fixtures' weights under their diffusers names.

Independent of ComfyUI: agrees with the stored outputs of sd1 and sdxl to f32 rounding, and proves the key map.
Writes nothing. Needs the fixtures and `pip install diffusers` (requirements.txt has it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from weights import generate

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LIMIT = 1e-5


class Whole(torch.nn.Module):
    """Takes the place of diffusers' size embedding: `y` comes whole, in `time_ids`."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y


def build(arguments: dict[str, Any]) -> UNet2DConditionModel:
    channels = [arguments["model_channels"] * mult for mult in arguments["channel_mult"]]
    depth = arguments["transformer_depth"][::2]
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)]
    config: dict[str, Any] = {
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": 2,
        "cross_attention_dim": arguments["context_dim"],
        "use_linear_projection": arguments["use_linear_in_transformer"],
        "down_block_types": down,
        "up_block_types": up,
        "transformer_layers_per_block": [max(d, 1) for d in depth],
        # What diffusers calls the head dim is the number of heads.
        "attention_head_dim": [c // 64 for c in channels] if arguments["use_linear_in_transformer"] else 8,
    }
    adm = arguments["adm_in_channels"]
    if adm is not None:
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": adm}
        config |= {"addition_time_embed_dim": 16}
    unet = UNet2DConditionModel(**config).eval()
    if adm is not None:
        unet.add_time_proj = Whole()
    return unet


@torch.no_grad()
def check(name: str) -> None:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["fixture"])
        unet = build(metadata["arguments"])
        names = metadata["diffusers"]
        weights = {names[n]: torch.from_numpy(generate(n, tuple(s))) for n, s in metadata["tensors"].items()}
        unet.load_state_dict(weights, strict=True)
        for case in metadata["cases"]:
            if case["adapters"] or case["control"]:
                continue
            given = {k: torch.from_numpy(generate(v["name"], tuple(v["shape"]))) for k, v in case["inputs"].items()}
            added: dict[str, torch.Tensor] | None = None
            if "y" in given:
                added = {"text_embeds": given["y"][:, :0], "time_ids": given["y"]}
            output = unet(given["x"], torch.tensor(case["timesteps"]), given["context"], added_cond_kwargs=added).sample
            want = file.get_tensor(case["output"])
            error = float((output - want).norm() / want.norm())
            print(f"{name:5} {case['name']:5} {error:.2e}")
            if error > LIMIT:
                raise AssertionError(f"{name} {case['name']}: diffusers differs by {error:.2e}")


if __name__ == "__main__":
    for architecture in ("sd1", "sdxl"):
        check(architecture)
