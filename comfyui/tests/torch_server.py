"""A client whose server is PyTorch in this process: ComfyUI's UNet, with uploads merged by ComfyUI's loader.

So what the patcher sends can be compared, bit by bit, with what ComfyUI computes when nothing is remote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from unetd import frames
from unetd.client import Control, Header, Lora, TensorInfo
from unetd.errors import RemoteError

SD1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "num_heads": 8,
    "legacy": False,
}
SDXL = {
    **SD1,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 64,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
PREFIX = "model.diffusion_model."


def names_and_shapes(config: Mapping[str, Any], prefix: str = PREFIX) -> dict[str, TensorInfo]:
    """What a file with this UNet states."""
    unet = UNetModel(**config, device="meta", dtype=torch.float16)
    return {prefix + name: TensorInfo("F16", tuple(value.shape)) for name, value in unet.state_dict().items()}


def random_weights(header: Mapping[str, TensorInfo], seed: int = 0) -> dict[str, torch.Tensor]:
    """Numbers with which activations keep about their size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(info.shape, generator=generator) / max(1, torch.Size(info.shape[1:]).numel()) ** 0.5
        for name, info in header.items()
    }


def local_model(weights: Mapping[str, torch.Tensor]) -> Any:
    """The MODEL that "Load Checkpoint" makes of these weights."""
    model, *_ = comfy.sd.load_state_dict_guess_config(dict(weights), output_vae=False, output_clip=False)
    return model


class TorchServer:
    """What the nodes use of `Client`. `sent`: the stacks of all forwards; `uploads`: new digests."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: str = "f32") -> None:
        self._weights = dict(weights)
        self._dtype = dtype
        self.model = local_model(weights)
        self._loras: dict[str, dict[str, torch.Tensor]] = {}
        self.refused: str | None = None
        self.uploads: list[str] = []
        self.loads: list[str] = []
        self.sent: list[list[tuple[str, float]]] = []
        self.controls: list[Control | None] = []

    def endpoint(self) -> str:
        return "torch"

    def header(self, model: str, values: Sequence[str], patience: Any) -> Header:
        infos = {
            name: TensorInfo(frames.dtype_name(value), tuple(value.shape))
            for name, value in self._weights.items()
        }
        return Header(infos, {}, {name: self._weights[name] for name in values})

    def load(self, model: str, dtype: str, patience: Any, progress: Any = None) -> dict[str, Any]:
        if progress is not None:
            progress("upload", 1, 2)
        return {"model": model, "dtype": self._dtype, "version": "1"}

    def load_lora(self, lora: Lora, model: str, patience: Any) -> dict[str, Any]:
        if self.refused is not None:
            raise RemoteError("ERR_LORA_INVALID", self.refused)
        if lora.digest not in self._loras:
            tensors = dict(lora.tensors())
            assert frames.digest(tensors) == lora.digest
            self._loras[lora.digest] = tensors
            self.uploads.append(lora.digest)
        self.loads.append(lora.digest)
        return {"digest": lora.digest}

    def forward(
        self,
        model: str,
        loras: Sequence[tuple[Lora, float]],
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None,
        control: Control | None,
        patience: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        self.sent.append([(lora.digest, strength) for lora, strength in loras])
        self.controls.append(control)
        patcher = self.model.clone()
        keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
        for lora, strength in loras:
            patcher.add_patches(comfy.lora.load_lora(self._loras[lora.digest], keys), strength)
        lists = None if control is None else {name: list(entries) for name, entries in vars(control).items()}
        unet = patcher.patch_model().diffusion_model
        try:
            out = unet(x, timesteps, context=context, y=y, control=lists, transformer_options={})
        finally:
            patcher.unpatch_model()
        return out, {}
