"""ComfyUI's own UNetModel with generated weights, on the CPU: the reference forward pass and its captures.

Imports the ComfyUI 0.3.75 that setup.sh unpacks. Decides no cases and writes no files.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weights import generate

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("REFERENCE_COMFYUI", ROOT / ".cache/reference-env/comfyui-0.3.75"))


def _import_comfy() -> None:
    """ComfyUI parses sys.argv on import: give it its own."""
    if not COMFYUI.is_dir():
        raise SystemExit(f"no ComfyUI at {COMFYUI}: run test/reference/setup.sh, or set REFERENCE_COMFYUI")
    sys.path.insert(0, str(COMFYUI))
    argv, sys.argv = sys.argv, ["reference", "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora  # pulls in the rest while argv is ComfyUI's

    sys.argv = argv
    logging.getLogger().setLevel(logging.WARNING)


_import_comfy()
import comfy.ldm.modules.attention as comfy_attention  # noqa: E402
import comfy.lora as comfy_lora  # noqa: E402, F401  (for adapters.py)
import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

# The plain formula: softmax(q k^T / sqrt(d)) v, no fused kernel.
comfy_attention.optimized_attention = comfy_attention.attention_basic
comfy_attention.optimized_attention_masked = comfy_attention.attention_basic

torch.set_grad_enabled(False)

Manifest = dict[str, tuple[int, ...]]
Control = dict[str, list[torch.Tensor | None]]


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(generate(name, shape)).to(dtype)


def build(arguments: Mapping[str, Any]) -> UNetModel:
    """The model on the meta device: names and shapes, no weights."""
    return UNetModel(
        **arguments, dtype=torch.float32, device=torch.device("meta"), operations=comfy.ops.disable_weight_init
    ).eval()


def manifest_of(model: UNetModel) -> Manifest:
    """Every tensor's name and shape, in state_dict order."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def place(model: UNetModel, name: str, value: torch.Tensor) -> None:
    """Replaces one parameter (meta or not) without a copy."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))


def fill(model: UNetModel, names: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
    for name, shape in names.items():
        place(model, name, tensor(name, tuple(shape), dtype))


class Captures:
    """Forward hooks that copy outputs (ComfyUI adds residuals in place); ids are LDM paths, plus `emb`."""

    def __init__(self, model: UNetModel, *, modules: bool, deep: bool) -> None:
        self.values: dict[str, torch.Tensor] = {}
        #: id -> the id that holds the value: the last module of a block is the block's output.
        self.alias: dict[str, str] = {}
        self._handles: list[Any] = []
        self._inside: set[str] = set()
        blocks = [(f"input_blocks.{i}", block) for i, block in enumerate(model.input_blocks)]
        if model.middle_block is not None:
            blocks.append(("middle_block", model.middle_block))
        blocks += [(f"output_blocks.{i}", block) for i, block in enumerate(model.output_blocks)]
        for path, block in blocks:
            # Blocks are iterated, never called (forward_timestep_embed): their last module's output is theirs.
            self._keep(path, block[-1])
            last = len(block) - 1
            for j, module in enumerate(block):
                if j == last:
                    self.alias[f"{path}.{j}"] = path
                elif modules:
                    self._keep(f"{path}.{j}", module)
        first = next(module for module in model.modules() if type(module).__name__ == "ResBlock")
        self._handles.append(first.register_forward_pre_hook(lambda _m, args: self._put("emb", args[1])))
        if deep:
            self._deep(model)

    def _deep(self, model: UNetModel) -> None:
        """Inside the first ResBlock and the first transformer."""
        for kind, inner in (
            ("ResBlock", ("in_layers", "emb_layers", "out_layers")),
            (
                "SpatialTransformer",
                (
                    "norm",
                    "proj_in",
                    "transformer_blocks.0.attn1",
                    "transformer_blocks.0.attn2",
                    "transformer_blocks.0.ff",
                    "transformer_blocks.0",
                ),
            ),
        ):
            path, module = next((p, m) for p, m in model.named_modules() if type(m).__name__ == kind)
            for name in inner:
                self._keep(f"{path}.{name}", module.get_submodule(name))

    def _put(self, path: str, value: torch.Tensor) -> None:
        self.values[path] = value.detach().clone()

    def _keep(self, path: str, module: torch.nn.Module) -> None:
        hook: Callable[..., None] = lambda _m, _args, output: self._put(path, output)  # noqa: E731
        self._handles.append(module.register_forward_hook(hook))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def forward(
    model: UNetModel,
    x: torch.Tensor,
    timesteps: list[float],
    context: torch.Tensor,
    y: torch.Tensor | None,
    control: Control | None,
) -> torch.Tensor:
    """One forward pass. ComfyUI pops `control` from the ends of its lists (openaimodel.py): copied here."""
    lists = None if control is None else {name: list(values) for name, values in control.items()}
    times = torch.tensor(timesteps, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    output = model(x, timesteps=times, context=context, y=y, control=lists, transformer_options={})
    if not torch.isfinite(output).all():
        raise AssertionError("the reference output is not finite")
    return output


def diffusers_names(arguments: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """LDM name -> diffusers name, from ComfyUI's own table; label_emb is `add_embedding`, as in SDXL."""
    table = comfy.utils.unet_to_diffusers(dict(arguments))
    names = {ldm: name for name, ldm in table.items() if ldm in manifest and not name.startswith("class_embedding")}
    missing = [name for name in manifest if name not in names]
    if missing:
        raise AssertionError(f"no diffusers name for {missing}")
    return {ldm: names[ldm] for ldm in manifest}
