"""One architecture's references: runs its cases on ComfyUI's UNetModel and collects tensors and metadata.

Writes no files (generate.py does) and chooses no cases (cases.py does).
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters import File, check_against_comfyui, files, merged
from architectures import Architecture
from cases import Case, control_lists
from comfy_unet import (
    Captures,
    Control,
    Manifest,
    UNetModel,
    build,
    diffusers_names,
    forward,
    manifest_of,
    place,
    tensor,
)
from weights import generate

#: A LoRA case must change the output by a normalised difference within these.
VISIBLE = (0.05, 0.5)


@dataclass
class Result:
    arch: Architecture
    manifest: Manifest
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.manifest.values())


def normalised_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, 2-norms over all elements."""
    return float((got.double() - want.double()).norm() / want.double().norm())


class Reference:
    """Owns the model whose weights the LoRA cases replace and restore."""

    def __init__(self, arch: Architecture, *, restore: bool) -> None:
        """Without `restore` a LoRA case leaves its merged weights in place: half the memory, one such case at most."""
        self.arch = arch
        self.restore = restore
        self.model: UNetModel = build(arch.arguments)
        self.result = Result(arch, manifest_of(self.model))
        self.diffusers = diffusers_names(arch.arguments, self.result.manifest)
        self.files: dict[str, File] = {}
        self._capture_shapes: dict[str, tuple[int, ...]] = {}

    def fill(self) -> str:
        """Generates every weight; returns the SHA-256 of all of them, f32 little-endian, in manifest order."""
        digest = hashlib.sha256()
        start = time.monotonic()
        for name, shape in self.result.manifest.items():
            value = generate(name, shape)
            digest.update(value)
            place(self.model, name, torch.from_numpy(value))
        self.result.seconds["weights"] = time.monotonic() - start
        return digest.hexdigest()

    def inputs(self, case: Case) -> tuple[dict[str, torch.Tensor], Control | None, dict[str, Any] | None]:
        values = {key: tensor(f"@{case.inputs}/{key}", shape) for key, shape in case.shapes(self.arch).items()}
        if not case.control:
            return values, None, None
        lists = control_lists(case, self._capture_shapes)
        control: Control = {
            kind: [None if entry is None else tensor(entry["name"], tuple(entry["shape"])) for entry in entries]
            for kind, entries in lists.items()
        }
        return values, control, lists

    def run(self, case: Case) -> None:
        start = time.monotonic()
        values, control, lists = self.inputs(case)
        captures = Captures(self.model, modules=self.arch.modules, deep=True) if case.captures else None
        stacks = case.adapters
        if not stacks or all(stack == stacks[0] for stack in stacks):
            output = self._forward(case, values, control, stacks[0] if stacks else ())
        else:
            rows = [self._forward(case, values, None, stack, row) for row, stack in enumerate(stacks)]
            output = torch.cat(rows)
        self._record(case, output, captures, lists)
        self.result.seconds[case.name] = time.monotonic() - start

    def _forward(
        self,
        case: Case,
        values: dict[str, torch.Tensor],
        control: Control | None,
        stack: tuple[tuple[str, float], ...],
        row: int | None = None,
    ) -> torch.Tensor:
        rows = slice(None) if row is None else slice(row, row + 1)
        kept: dict[str, torch.Tensor] = {}
        if stack:
            entries = [(self.files[name], strength) for name, strength in stack]
            for name, value in merged(self.model.get_parameter, entries):
                if self.restore:
                    kept[name] = self.model.get_parameter(name).data
                place(self.model, name, value)
        y = values.get("y")
        output = forward(
            self.model,
            values["x"][rows],
            list(case.timesteps[rows]),
            values["context"][rows],
            None if y is None else y[rows],
            control,
        )
        for name, value in kept.items():
            place(self.model, name, value)
        return output

    def _record(
        self, case: Case, output: torch.Tensor, captures: Captures | None, lists: dict[str, Any] | None
    ) -> None:
        result = self.result
        result.tensors[f"{case.name}/output"] = output
        held: dict[str, str] = {}
        if captures is not None:
            captures.close()
            self._capture_shapes = {path: tuple(value.shape) for path, value in captures.values.items()}
            for path, value in captures.values.items():
                result.tensors[f"{case.name}/{path}"] = value
                held[path] = f"{case.name}/{path}"
            held |= {path: f"{case.name}/{target}" for path, target in captures.alias.items()}
        delta = None
        if case.base is not None:
            delta = normalised_error(output, result.tensors[f"{case.base}/output"])
            if not VISIBLE[0] <= delta <= VISIBLE[1]:
                raise AssertionError(f"{self.arch.name} {case.name}: the LoRA changes the output by {delta:.3f}")
        result.cases.append(
            {
                "name": case.name,
                "batch": case.batch,
                "height": case.size[0],
                "width": case.size[1],
                "tokens": case.tokens,
                "timesteps": list(case.timesteps),
                "inputs": {
                    key: {"name": f"@{case.inputs}/{key}", "shape": list(shape)}
                    for key, shape in case.shapes(self.arch).items()
                },
                "control": lists,
                "adapters": [[list(entry) for entry in stack] for stack in case.adapters],
                "output": f"{case.name}/output",
                "captures": held,
                "base": case.base,
                "delta": delta,
                "std": float(output.std()),
            }
        )

    def noise(self, case: Case, dtype: torch.dtype) -> float:
        """How far the same case in another dtype is from the f32 reference: a floor for tolerances."""
        values, control, _ = self.inputs(case)
        values = {key: value.to(dtype) for key, value in values.items()}
        kept = {name: self.model.get_parameter(name).data for name in self.result.manifest}
        for name, value in kept.items():
            place(self.model, name, value.to(dtype))
        y = values.get("y")
        output = forward(self.model, values["x"], list(case.timesteps), values["context"], y, control)
        for name, value in kept.items():
            place(self.model, name, value)
        return normalised_error(output, self.result.tensors[f"{case.name}/output"])

    def samples(self) -> list[dict[str, Any]]:
        """A few tensors by each rule of the generator: first values and SHA-256 of the f32 bytes."""
        picked: dict[str, tuple[int, ...]] = {}
        for suffix in (
            "time_embed.0.weight",
            "in_layers.0.weight",
            "in_layers.2.weight",
            "in_layers.2.bias",
            "to_q.weight",
            "attn2.to_v.weight",
            "ff.net.2.weight",
            "out.2.weight",
        ):
            name = next(name for name in self.result.manifest if name.endswith(suffix))
            picked[name] = self.result.manifest[name]
        picked["@base/x"] = (1, self.arch.arguments["in_channels"], *self.arch.sizes[0])
        for file in self.files.values():
            for index, suffix in enumerate(("down", "up")):
                module = file.modules[0]
                key = module.prefix + file.describe()["suffixes"][suffix]
                picked[f"#{file.name}/{key}"] = file.shapes(module)[index] or ()
        out = []
        for name, shape in picked.items():
            value = generate(name, shape)
            digest = hashlib.sha256(value).hexdigest()
            out.append({"name": name, "shape": list(shape), "first": value.ravel()[:4].tolist(), "sha256": digest})
        return out

    def adapters(self, only: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Makes the LoRA files and checks them against ComfyUI's loader; returns their descriptions."""
        self.files = files(self.result.manifest, self.diffusers, only)
        out: dict[str, Any] = {}
        for file in self.files.values():
            resolved = check_against_comfyui(self.arch.arguments, file)
            out[file.name] = {**file.describe(), "comfyui": resolved}
        return out
