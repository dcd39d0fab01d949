"""References of adapter kinds: stacks merged by ComfyUI's own `load_lora_for_models`, then one forward of its UNet.

    kinds_reference.py           test/fixtures/kinds-{sd1,sdxl}.safetensors, on the weights of the fixtures sd1 and sdxl

Run with the environment of setup.sh. The metadata schema is that of test/fixtures/kinds.ts.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from safetensors.torch import save_file

from architectures import SMALL
from cases import Stack
from comfy_unet import ROOT, UNetModel, build, diffusers_names, fill, forward, manifest_of, tensor
from kinds import KindFile, kind_files

import comfy.model_patcher  # isort: skip  (comfy_unet puts it on the path)
import comfy.sd  # isort: skip

_kron = torch.kron


def _kron_of_any(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch 2.15 refuses what einsum makes of a Tucker core ("view size is not compatible"): ComfyUI would log that and
    leave the weight as it is. Its formula is taken at its word instead."""
    return _kron(a.contiguous(), b.contiguous())


torch.kron = _kron_of_any

#: A case must change the output by a normalised difference within these.
CHANGE = (0.01, 1.5)
SIZE = (8, 8)
TOKENS = 13
TIMESTEP = 601.0

#: Strengths of the files alone; 0.75 where none is stated. A replaced tensor ignores it, rotations take it as no other.
ALONE: dict[str, float] = {
    "dora": 1.0,
    "dora-in": -0.5,
    "glora": -0.6,
    "oft": 1.0,
    "boft": 1.0,
    "boft-dora": -0.5,
    "set": 1.0,
}

STACKS: dict[str, Stack] = {
    "lora, dora": (("style", 0.8), ("dora", 0.6)),
    "dora, lora": (("dora", 0.6), ("style", 0.8)),
    "lora, dora-in": (("style", -0.7), ("dora-in", 0.9)),
    "lora, glora": (("style", 0.8), ("glora", 0.7)),
    "glora, lora": (("glora", 0.7), ("style", 0.8)),
    "oft, lora, dora": (("oft", 0.8), ("style", 0.5), ("dora", 1.0)),
    "dora, boft, lora": (("dora", 0.5), ("boft", 0.7), ("style", -0.5)),
    "all sums": (("loha-wide", 0.5), ("lokr-wide", -0.6), ("full", 0.7), ("style", 0.4), ("loha", 0.3), ("lokr", 0.8)),
    "lora, set, lora": (("style", 0.8), ("set", 0.3), ("style", -0.4)),
    "dora, dora": (("dora", 0.8), ("dora", -0.4)),
    "glora, glora": (("glora", 0.5), ("glora", 0.5)),
    "norms, full": (("norms", 1.0), ("full-ldm", -0.5)),
    "everything": (
        ("style", 0.4),
        ("glora-dora", 0.3),
        ("lokr-dora", -0.4),
        ("oft-dora", 0.5),
        ("norms", 0.5),
        ("locon-dora", 0.4),
        ("boft-bound", 0.6),
        ("full-ldm", 0.3),
    ),
}


class Model(torch.nn.Module):
    """What the loader and the patcher see of a ComfyUI model."""

    def __init__(self, unet: UNetModel, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.diffusion_model = unet
        self.model_config = type("Config", (), {"unet_config": dict(arguments)})()
        self.current_weight_patches_uuid = None


class Refused(logging.Handler):
    """ComfyUI warns about keys that it leaves out, and about patches that fail: no reference may have any."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


def patched(model: Model, files: dict[str, KindFile], stack: Stack) -> comfy.model_patcher.ModelPatcher:
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    for name, strength in stack:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, files[name].state_dict(), strength, 0.0)
    for key in patcher.patches:
        patcher.patch_weight_to_device(key)
    return patcher


def make(name: str) -> None:
    arch = next(arch for arch in SMALL if arch.name == name)
    unet = build(arch.arguments)
    manifest = manifest_of(unet)
    fill(unet, manifest)
    model = Model(unet, arch.arguments)
    files = kind_files(manifest, diffusers_names(arch.arguments, manifest))
    x = tensor("@base/x", (1, arch.arguments["in_channels"], *SIZE))
    context = tensor("@base/context", (1, TOKENS, arch.arguments["context_dim"]))
    adm = arch.arguments["adm_in_channels"]
    y = None if adm is None else tensor("@base/y", (1, adm))
    base = forward(unet, x, [TIMESTEP], context, y, None)
    stacks = {file: ((file, ALONE.get(file, 0.75)),) for file in files} | STACKS
    outputs = {}
    for case, stack in stacks.items():
        patcher = patched(model, files, stack)
        out = forward(unet, x, [TIMESTEP], context, y, None)
        patcher.unpatch_model()
        change = float((out - base).norm() / base.norm())
        print(f"{name} {case}: changes the output by {change:.3f}")
        if not CHANGE[0] <= change <= CHANGE[1]:
            raise AssertionError(f"{case} changes the output by {change:.3f}")
        outputs[case] = out
    if not torch.equal(forward(unet, x, [TIMESTEP], context, y, None), base):
        raise AssertionError("the weights are not what they were")
    metadata = {
        "source": "comfy.sd.load_lora_for_models of ComfyUI 0.3.75, UNetModel on the CPU in f32, plain attention",
        "files": {file.name: [entry.describe() for entry in file.entries] for file in files.values()},
        "cases": {case: [list(use) for use in stack] for case, stack in stacks.items()},
    }
    path = ROOT / f"test/fixtures/kinds-{name}.safetensors"
    save_file(outputs, path, metadata={"kinds": json.dumps(metadata, separators=(",", ":"))})
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    logging.getLogger().addHandler(Refused(logging.WARNING))
    # Small matrices gain nothing from threads.
    torch.set_num_threads(1)
    for name in ("sd1", "sdxl"):
        make(name)


if __name__ == "__main__":
    main()
