"""LoRA files of every adapter kind, for a few layers of each shape: which tensors, how large, under which names.

A tensor's values are `offset + 2^exponent * g`, g the generator's `@kinds/FILE/KEY` (uniform, standard deviation 1), or
the integers that are given. Runs nothing; kinds_reference.py does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from comfy_unet import Manifest
from weights import generate

#: How much a delta weighs beside the weight it changes, as standard deviations.
VISIBLE = 0.3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    key: str
    shape: Shape
    #: log2 of the standard deviation; None for a constant.
    exponent: int | None
    offset: float = 0.0
    integers: tuple[int, ...] | None = None

    def value(self, file: str) -> torch.Tensor:
        if self.integers is not None:
            return torch.tensor(self.integers)
        if self.exponent is None:
            return torch.full(self.shape, self.offset)
        return self.offset + 2.0**self.exponent * torch.from_numpy(generate(f"@kinds/{file}/{self.key}", self.shape))

    def describe(self) -> list[Any]:
        return [self.key, list(self.shape), self.exponent, self.offset, self.integers and list(self.integers)]


def near(std: float) -> int:
    """The exponent of the power of two next to `std`."""
    return round(math.log2(std))


@dataclass(frozen=True)
class Target:
    """A tensor of the model, `layer` without its leaf."""

    layer: str
    shape: Shape
    biased: bool

    @property
    def outs(self) -> int:
        return self.shape[0]

    @property
    def ins(self) -> int:
        return self.shape[1]

    @property
    def kernel(self) -> Shape:
        return self.shape[2:]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def ones(self) -> Shape:
        return (1,) * len(self.kernel)

    @property
    def delta(self) -> float:
        return VISIBLE / math.sqrt(self.columns)


#: What a kind writes for one target: (suffix, shape, exponent, offset), the prefix and its dot left out.
Part = tuple[str, Shape, int | None, float]
Kind = Callable[[Target], Iterator[Part]]


def alpha(value: float | None) -> Iterator[Part]:
    if value is not None:
        yield ("alpha", (), None, value)


def magnitude(t: Target, axis: str) -> Iterator[Part]:
    """About the norms of the weight: near 1 along rows, near sqrt(outs / ins) along columns."""
    if axis == "output":
        yield ("dora_scale", (t.outs, 1, *t.ones), -3, 1.0)
    if axis == "input":
        size = 2.0 ** near(math.sqrt(t.outs / t.ins))
        yield ("dora_scale", (1, t.ins, *t.ones), near(size / 8), size)


def lora(rank: int, value: float | None, *, mid: bool = False, dora: str = "", reshape: bool = False) -> Kind:
    def parts(t: Target) -> Iterator[Part]:
        if mid and t.kernel:
            yield ("lora_down.weight", (rank, t.ins, *t.ones), near(1 / math.sqrt(t.columns)), 0.0)
            yield ("lora_mid.weight", (rank, rank, *t.kernel), near(1 / math.sqrt(rank)), 0.0)
        else:
            yield ("lora_down.weight", (rank, *t.shape[1:]), near(1 / math.sqrt(t.columns)), 0.0)
        yield ("lora_up.weight", (t.outs, rank, *t.ones), near(VISIBLE / math.sqrt(rank)), 0.0)
        yield from alpha(value)
        yield from magnitude(t, dora)
        if reshape:
            yield ("reshape_weight", t.shape, None, 0.0)

    return parts


def loha(rank: int, value: float | None, *, tucker: bool = False, dora: str = "") -> Kind:
    def parts(t: Target) -> Iterator[Part]:
        for which, std in ((1, 1.0), (2, t.delta)):
            if tucker and t.kernel:
                yield (f"hada_w{which}_a", (rank, t.outs), 0, 0.0)
                yield (f"hada_w{which}_b", (rank + which, t.ins), 0, 0.0)
                core = (rank, rank + which, *t.kernel)
                yield (f"hada_t{which}", core, near(std / rank), 0.0)
            else:
                yield (f"hada_w{which}_a", (t.outs, rank), 0, 0.0)
                yield (f"hada_w{which}_b", (rank, t.columns), near(std / math.sqrt(rank)), 0.0)
        yield from alpha(value)
        yield from magnitude(t, dora)

    return parts


def lokr(first: int, second: int, value: float | None, *, tucker: bool = False, dora: str = "") -> Kind:
    """Ranks of w1 and w2, 0 for a whole one; w1 is 4 x 4."""

    def parts(t: Target) -> Iterator[Part]:
        outs, ins = t.outs // 4, t.ins // 4
        if first:
            yield ("lokr_w1_a", (4, first), 0, 0.0)
            yield ("lokr_w1_b", (first, 4), near(1 / math.sqrt(first)), 0.0)
        else:
            yield ("lokr_w1", (4, 4), 0, 0.0)
        if second and tucker and t.kernel:
            yield ("lokr_w2_a", (second, outs), 0, 0.0)
            yield ("lokr_w2_b", (second + 1, ins), 0, 0.0)
            yield ("lokr_t2", (second, second + 1, *t.kernel), near(t.delta / second), 0.0)
        elif second:
            yield ("lokr_w2_a", (outs, second), 0, 0.0)
            yield ("lokr_w2_b", (second, ins * math.prod(t.kernel)), near(t.delta / math.sqrt(second)), 0.0)
        else:
            yield ("lokr_w2", (outs, ins, *t.kernel), near(t.delta), 0.0)
        yield from alpha(value)
        yield from magnitude(t, dora)

    return parts


def glora(rank: int, value: float | None, *, old: bool = False, dora: str = "") -> Kind:
    def parts(t: Target) -> Iterator[Part]:
        thin, low = near(1 / math.sqrt(rank)), near(t.delta / math.sqrt(rank))
        if old:
            yield ("a1.weight", (rank, *t.shape[1:]), near(t.delta), 0.0)
            yield ("a2.weight", (t.columns, rank), thin, 0.0)
            yield ("b1.weight", (rank, *t.shape[1:]), low, 0.0)
            yield ("b2.weight", (t.outs, rank, *t.ones), 0, 0.0)
        else:
            yield ("a1.weight", (t.ins, rank, *t.ones), thin, 0.0)
            yield ("a2.weight", (rank, t.ins, *t.ones), near(t.delta), 0.0)
            yield ("b1.weight", (t.outs, rank, *t.ones), 0, 0.0)
            yield ("b2.weight", (rank, *t.shape[1:]), low, 0.0)
        yield from alpha(value)
        yield from magnitude(t, dora)

    return parts


def oft(value: float | None, *, stages: int = 0, rescale: bool = False, dora: str = "") -> Kind:
    """Blocks of 8 rows, or 4 where there are fewer; `stages` makes it a BOFT. alpha < 0: half the norm of Q."""

    def parts(t: Target) -> Iterator[Part]:
        size = 8 if t.outs % 8 == 0 else 4
        depth = min(stages, 1 + int(math.log2(t.outs // size)))
        exponent = near(VISIBLE / math.sqrt(2 * size) / max(1, depth))
        shape = (t.outs // size, size, size)
        yield ("oft_blocks", (depth, *shape) if stages else shape, exponent, 0.0)
        if rescale:
            yield ("rescale", (t.outs, *([1] * (len(t.shape) - 1))), -4, 1.0)
        if value is not None and value < 0:
            norm = 2.0**exponent * math.sqrt(2 * math.prod(shape) * max(1, depth))
            yield from alpha(2.0 ** near(norm / 2))
        else:
            yield from alpha(value)
        yield from magnitude(t, dora)

    return parts


def full(t: Target) -> Iterator[Part]:
    yield ("diff", t.shape, near(t.delta), 0.0)
    if t.biased:
        yield ("diff_b", (t.outs,), -5, 0.0)


def full_of_norm(t: Target) -> Iterator[Part]:
    yield ("w_norm", t.shape, -3, 0.0)
    yield ("b_norm", t.shape, -4, 0.0)


def full_by_tensor(t: Target) -> Iterator[Part]:
    """As the tensors themselves are called."""
    yield ("diff", t.shape, near(t.delta) if len(t.shape) > 1 else -3, 0.0)
    if t.biased:
        yield ("bias.diff", (t.outs,), -5, 0.0)


def replaced(t: Target) -> Iterator[Part]:
    if len(t.shape) > 1:
        yield ("set_weight", t.shape, near(1 / math.sqrt(t.columns)), 0.0)
    else:
        yield ("set_weight", t.shape, -3, 1.0)
    if t.biased:
        yield ("bias.set_weight", (t.outs,), -4, 0.0)


#: The first tensor that each names, so that every shape and place of a layer is there once.
LAYERS = (
    r"^input_blocks\.0\.0$",
    r"^time_embed\.2$",
    r"^label_emb\.0\.0$",
    r"\.in_layers\.2$",
    r"\.emb_layers\.1$",
    r"\.out_layers\.3$",
    r"\.proj_in$",
    r"\.proj_out$",
    r"attn1\.to_q$",
    r"attn1\.to_out\.0$",
    r"attn2\.to_k$",
    r"ff\.net\.0\.proj$",
    r"ff\.net\.2$",
    r"\.op$",
    r"^middle_block.*attn2\.to_v$",
    r"^output_blocks.*in_layers\.2$",
    r"^output_blocks.*skip_connection$",
    r"^output_blocks.*\.conv$",
    r"^out\.2$",
)
NORMS = (
    r"^out\.0$",
    r"\.in_layers\.0$",
    r"\.1\.norm$",
    r"\.norm1$",
    r"\.norm3$",
    r"^output_blocks.*out_layers\.0$",
)
FEW = (r"\.in_layers\.2$", r"attn2\.to_k$", r"^out\.2$")
REPLACED = (r"\.emb_layers\.1$", r"attn1\.to_out\.0$", r"^output_blocks.*skip_connection$", r"\.norm1$", r"^out\.0$")


def targets(manifest: Manifest, patterns: Sequence[str]) -> list[Target]:
    names = [name.removesuffix(".weight") for name in manifest if name.endswith(".weight")]
    found = [next((name for name in names if re.search(pattern, name)), None) for pattern in patterns]
    chosen = [name for name in found if name is not None]
    return [Target(name, manifest[f"{name}.weight"], f"{name}.bias" in manifest) for name in chosen]


#: Spelling -> the key's prefix for a layer, from its LDM and its diffusers name.
SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "kohya-ldm": lambda ldm, _: f"lora_unet_{ldm.replace('.', '_')}",
    "kohya-diffusers": lambda _, name: f"lora_unet_{name.replace('.', '_')}",
    "lycoris": lambda _, name: f"lycoris_{name.replace('.', '_')}",
    "ldm": lambda ldm, _: f"diffusion_model.{ldm}",
    "diffusers": lambda _, name: "unet." + re.sub(r"\.to_out\.0$", ".to_out", name).replace(".to_", ".processor.to_"),
}

#: (down, up) endings of a plain LoRA, all of which ComfyUI knows.
ENDINGS = (
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)


@dataclass(frozen=True)
class KindFile:
    name: str
    entries: tuple[Entry, ...]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {entry.key: entry.value(self.name) for entry in self.entries}


#: File -> (spelling, kind, layers)
FILES: dict[str, tuple[str, Kind, Sequence[str]]] = {
    "style": ("kohya-ldm", lora(5, 3.0), LAYERS),
    "fast": ("kohya-diffusers", lora(64, 64.0), LAYERS),
    "dora": ("kohya-ldm", lora(4, 3.0, dora="output"), LAYERS),
    "dora-in": ("kohya-diffusers", lora(9, 6.0, dora="input"), LAYERS),
    "locon-dora": ("ldm", lora(3, None, mid=True, dora="output"), LAYERS),
    "reshape": ("ldm", lora(2, 2.0, reshape=True), FEW),
    "loha": ("lycoris", loha(3, 2.0), LAYERS),
    "loha-wide": ("kohya-ldm", loha(9, 9.0), LAYERS),
    "loha-tucker": ("kohya-diffusers", loha(3, 3.0, tucker=True), LAYERS),
    "loha-wide-tucker": ("lycoris", loha(9, None, tucker=True), LAYERS),
    "loha-dora": ("ldm", loha(4, 3.0, dora="output"), LAYERS),
    "lokr": ("kohya-ldm", lokr(0, 2, 1.5), LAYERS),
    "lokr-whole": ("lycoris", lokr(0, 0, 8.0), LAYERS),
    "lokr-half": ("kohya-ldm", lokr(2, 0, 1.0), LAYERS),
    "lokr-both": ("kohya-diffusers", lokr(2, 3, 2.0), LAYERS),
    "lokr-wide": ("ldm", lokr(0, 20, 20.0), LAYERS),
    "lokr-tucker": ("lycoris", lokr(3, 5, 4.0, tucker=True), LAYERS),
    "lokr-wide-tucker": ("ldm", lokr(0, 17, 16.0, tucker=True), LAYERS),
    "lokr-dora": ("ldm", lokr(0, 2, 2.0, dora="input"), LAYERS),
    "glora": ("kohya-ldm", glora(4, 3.0), LAYERS),
    "glora-old": ("kohya-diffusers", glora(3, None, old=True), LAYERS),
    "glora-dora": ("ldm", glora(2, 1.5, dora="output"), LAYERS),
    "oft": ("kohya-ldm", oft(None, rescale=True), LAYERS),
    "oft-bound": ("lycoris", oft(-1.0), LAYERS),
    "oft-dora": ("ldm", oft(-1.0, dora="input"), LAYERS),
    "boft": ("kohya-diffusers", oft(0.0, stages=3, rescale=True), LAYERS),
    "boft-bound": ("kohya-ldm", oft(-1.0, stages=2), LAYERS),
    "boft-dora": ("ldm", oft(-1.0, stages=2, dora="output"), LAYERS),
    "full": ("kohya-diffusers", full, LAYERS),
    "full-ldm": ("ldm", full_by_tensor, (*LAYERS, *NORMS)),
    "norms": ("lycoris", full_of_norm, NORMS),
    "set": ("ldm", replaced, REPLACED),
}


def _entry(prefix: str, target: Target, part: Part) -> Entry:
    suffix, shape, exponent, offset = part
    key = f"{prefix}.{suffix}"
    if suffix == "reshape_weight":
        return Entry(key, (len(shape),), None, integers=shape)
    return Entry(key, shape, exponent, offset)


def _every_spelling(manifest: Manifest, names: Mapping[str, str]) -> Iterator[Entry]:
    """A plain LoRA whose layers, spread over the model, take all spellings and endings in turn."""
    layers = [n.removesuffix(".weight") for n, shape in manifest.items() if n.endswith(".weight") and len(shape) > 1]
    combinations = [(spell, endings) for spell in SPELLINGS.values() for endings in ENDINGS]
    for i, (spell, endings) in enumerate(combinations):
        layer = layers[i * len(layers) // len(combinations)]
        prefix = spell(layer, names[f"{layer}.weight"].removesuffix(".weight"))
        parts = lora(6, None)(Target(layer, manifest[f"{layer}.weight"], biased=False))
        for ending, (_, shape, exponent, offset) in zip(endings, parts, strict=True):
            yield Entry(prefix + ending, shape, exponent, offset)


def kind_files(manifest: Manifest, diffusers: Mapping[str, str]) -> dict[str, KindFile]:
    out: dict[str, KindFile] = {}
    for name, (spelling, kind, patterns) in FILES.items():
        entries = []
        for target in targets(manifest, patterns):
            named = diffusers[f"{target.layer}.weight"].removesuffix(".weight")
            prefix = SPELLINGS[spelling](target.layer, named)
            entries += [_entry(prefix, target, part) for part in kind(target)]
        out[name] = KindFile(name, tuple(entries))
    out["names"] = KindFile("names", tuple(_every_spelling(manifest, diffusers)))
    return out
