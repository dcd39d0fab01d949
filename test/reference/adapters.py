"""The LoRA files of the references: which layers, under which names, at which rank; and merging them into weights.

Merging is this file's own formula in f64, W' = W + strength * alpha / rank * up @ down, and `check_against_comfyui`
compares both it and the key names with ComfyUI's loader. Runs no UNet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from comfy_unet import Manifest, comfy_lora, tensor

#: format -> suffixes of (down, up, mid)
SUFFIXES: dict[str, tuple[str, str, str]] = {
    "kohya-ldm": (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"),
    "kohya-diffusers": (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"),
    "ldm": (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight", ""),
    "processor": ("_lora.down.weight", "_lora.up.weight", ""),
}


@dataclass(frozen=True)
class Module:
    """One adapted layer. Key = prefix + suffix; the generator's name of a matrix is `#<file>/<key>`."""

    layer: str
    prefix: str
    rank: int
    alpha: float | None
    mid: bool


@dataclass(frozen=True)
class File:
    name: str
    format: str
    modules: tuple[Module, ...]
    manifest: Manifest

    def shapes(self, module: Module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """Shapes of down, up and mid. A convolution has a 1x1 up; with `mid` its down is 1x1 too."""
        weight = self.manifest[f"{module.layer}.weight"]
        rank, rest = module.rank, weight[1:]
        if len(weight) == 2:
            return (rank, *rest), (weight[0], rank), None
        if module.mid:
            return (rank, rest[0], 1, 1), (weight[0], rank, 1, 1), (rank, rank, *rest[1:])
        return (rank, *rest), (weight[0], rank, 1, 1), None

    def matrices(self, module: Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """down, up and mid, f32, exact."""
        suffixes = SUFFIXES[self.format]
        values = [
            None if shape is None else tensor(f"#{self.name}/{module.prefix}{suffix}", shape)
            for suffix, shape in zip(suffixes, self.shapes(module), strict=True)
        ]
        down, up, mid = values
        assert down is not None and up is not None
        return down, up, mid

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The file's tensors in file order: per module down, up, mid, alpha (a scalar)."""
        out: dict[str, torch.Tensor] = {}
        for module in self.modules:
            for suffix, value in zip(SUFFIXES[self.format], self.matrices(module), strict=True):
                if value is not None:
                    out[module.prefix + suffix] = value
            if module.alpha is not None:
                out[f"{module.prefix}.alpha"] = torch.tensor(module.alpha)
        return out

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for value in self.state_dict().values():
            digest.update(value.numpy().tobytes())
        down, up, mid = SUFFIXES[self.format]
        return {
            "format": self.format,
            "suffixes": {"down": down, "up": up, "mid": mid, "alpha": ".alpha"},
            "modules": [[m.layer, m.prefix, m.rank, m.alpha, m.mid] for m in self.modules],
            "sha256": digest.hexdigest(),
        }


def delta(file: File, module: Module) -> torch.Tensor:
    """alpha / rank * up @ down in f64, in the layer's shape."""
    down, up, mid = (None if m is None else m.double() for m in file.matrices(module))
    assert down is not None and up is not None
    scale = 1.0 if module.alpha is None else module.alpha / module.rank
    if mid is not None:
        down = torch.einsum("oikl,ic->ockl", mid, down.flatten(1))
    shape = file.manifest[f"{module.layer}.weight"]
    return (scale * (up.flatten(1) @ down.flatten(1))).reshape(shape)


def merged(
    weights: Callable[[str], torch.Tensor], stack: Sequence[tuple[File, float]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """W + sum of strength * delta in f64, rounded to f32: layer by layer, for the layers that the stack touches."""
    parts: dict[str, list[tuple[File, Module, float]]] = {}
    for file, strength in stack:
        for module in file.modules:
            parts.setdefault(f"{module.layer}.weight", []).append((file, module, strength))
    for name, entries in parts.items():
        value = weights(name).double()
        for file, module, strength in entries:
            value += strength * delta(file, module)
        yield name, value.float()


def _is(layer: str, *kinds: str) -> bool:
    tests = {
        "attention": ".attn1." in layer or ".attn2." in layer,
        "ff": ".ff.net." in layer,
        "projection": layer.endswith((".proj_in", ".proj_out")),
        "res": layer.endswith((".in_layers.2", ".out_layers.3", ".skip_connection")),
        "embedding": layer.startswith(("time_embed.", "label_emb.")) or layer.endswith(".emb_layers.1"),
        "sampling": layer.endswith((".op", ".conv")),
        "ends": layer in ("input_blocks.0.0", "out.2"),
    }
    return any(tests[kind] for kind in kinds)


def _prefix(form: str, layer: str, diffusers: Mapping[str, str]) -> str:
    if form == "kohya-ldm":
        return "lora_unet_" + layer.replace(".", "_")
    if form == "ldm":
        return f"diffusion_model.{layer}"
    name = diffusers[f"{layer}.weight"].removesuffix(".weight")
    if form == "kohya-diffusers":
        return "lora_unet_" + name.replace(".", "_")
    if form == "processor":
        return "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0")
    return f"unet.{name}"


def files(manifest: Manifest, diffusers: Mapping[str, str], only: tuple[str, ...] | None = None) -> dict[str, File]:
    """Every LoRA file for this manifest. `diffusers`: LDM name -> diffusers name."""
    layers = [n.removesuffix(".weight") for n, shape in manifest.items() if n.endswith(".weight") and len(shape) > 1]
    locon_alpha = (7.0, 3.5, None, 14.0)

    def locon(i: int, layer: str) -> tuple[int, float | None, bool]:
        rank = 3 if _is(layer, "embedding") else 7
        return rank, locon_alpha[i % 4] if rank == 7 else 3.0, layer.endswith(".out_layers.3")

    def fixed(rank: int, alpha: float | None) -> Callable[[int, str], tuple[int, float | None, bool]]:
        return lambda _i, _layer: (rank, alpha, False)

    table: dict[str, tuple[str, tuple[str, ...], Callable[[int, str], tuple[int, float | None, bool]]]] = {
        "style": ("kohya-ldm", ("attention", "ff", "projection"), fixed(4, 3.0)),
        "locon": ("kohya-ldm", ("res", "embedding", "sampling", "ends", "projection"), locon),
        "subject": ("kohya-diffusers", ("attention", "projection", "res", "sampling"), fixed(16, 8.0)),
        "peft": ("peft", ("attention", "ff", "projection"), fixed(7, None)),
        "processor": ("processor", ("attention",), fixed(1, None)),
        "generic": ("ldm", ("ff", "embedding", "ends"), fixed(1, 1.0)),
    }
    out: dict[str, File] = {}
    for name, (form, kinds, settings) in table.items():
        if only is not None and name not in only:
            continue
        chosen = [layer for layer in layers if _is(layer, *kinds)]
        modules = tuple(
            Module(layer, _prefix(form, layer, diffusers), *settings(i, layer)) for i, layer in enumerate(chosen)
        )
        out[name] = File(name, form, modules, manifest)
    return out


def check_against_comfyui(arguments: Mapping[str, Any], file: File, sample: int = 12) -> int:
    """How many of the file's modules ComfyUI's loader resolves; each must mean the same layer and the same weight."""
    names = {f"diffusion_model.{name}": None for name in file.manifest}
    model = SimpleNamespace(state_dict=lambda: names, model_config=SimpleNamespace(unet_config=dict(arguments)))
    patches = comfy_lora.load_lora(file.state_dict(), comfy_lora.model_lora_keys_unet(model, {}), log_missing=False)
    expected = {f"diffusion_model.{module.layer}.weight": module for module in file.modules}
    if not set(patches) <= set(expected):
        raise AssertionError(f"ComfyUI reads other layers from {file.name}: {set(patches) - set(expected)}")
    for key in list(patches)[:: max(1, math.ceil(len(patches) / sample))]:
        module = expected[key]
        zero = torch.zeros(file.manifest[f"{module.layer}.weight"], dtype=torch.float64)
        theirs = patches[key].calculate_weight(
            zero, key, 1.0, 1.0, None, lambda value: value, intermediate_dtype=torch.float64
        )
        torch.testing.assert_close(theirs, delta(file, module), rtol=1e-9, atol=1e-12)
    return len(patches)
