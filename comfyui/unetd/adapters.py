"""From the patches that ComfyUI holds per weight to adapters the server can be given, named by their content.

ComfyUI keeps `weight -> [(strength_patch, value, strength_model, offset, function), ...]`. One call of
`add_patches` is one adapter here again: its tensors in their native form (factors, not expansions) under the
names of LDM layers, so that the algebra stays the server's, and its strength beside it. Equal content has an
equal digest, whichever call it came from. Imports nothing of ComfyUI, sends nothing.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import frames
from .client import Lora
from .refusals import WAY_OUT, CannotRunRemotely

#: Adapter kind, as ComfyUI names it -> the names in files of what `weights` holds, in its order.
PARTS: Mapping[str, Sequence[str]] = {
    "lora": "lora_up.weight lora_down.weight alpha lora_mid.weight dora_scale reshape_weight".split(),
    "loha": "hada_w1_a hada_w1_b alpha hada_w2_a hada_w2_b hada_t1 hada_t2 dora_scale".split(),
    "lokr": "lokr_w1 lokr_w2 alpha lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2 dora_scale".split(),
    "glora": "a1.weight a2.weight b1.weight b2.weight alpha dora_scale".split(),
    "oft": "oft_blocks rescale alpha dora_scale".split(),
    "boft": "oft_blocks rescale alpha dora_scale".split(),
}

#: A tensor, or a number or list of whole numbers that files hold as a tensor and ComfyUI has read.
Part = torch.Tensor | float | tuple[int, ...]
Patches = Mapping[str, Sequence[tuple[Any, ...]]]

_ordinals = itertools.count()


@dataclass(frozen=True)
class Source:
    """One call that added patches: its place among all calls, and its name for messages if that is known."""

    label: str | None
    ordinal: int = field(default_factory=lambda: next(_ordinals))


class Marked(tuple[Any, ...]):
    """A patch exactly as ComfyUI wrote it, which also knows its source."""

    source: Source


@dataclass(frozen=True)
class Layered:
    """An adapter of the stack. `scales`: whether hooks change its strength (replaced weights have none)."""

    lora: Lora
    strength: float
    scales: bool


def mark(patches: dict[str, list[tuple[Any, ...]]], before: Mapping[str, int], source: Source) -> None:
    """Marks what follows the first `before[key]` entries. CannotRunRemotely for what cannot be sent."""
    for key, entries in patches.items():
        for index in range(before.get(key, 0), len(entries)):
            parts_of(key, entries[index])  # Raises at the node that adds it, not only when it is sampled.
            marked = Marked(entries[index])
            marked.source = source
            entries[index] = marked


def stack_of(patches: Patches) -> list[Layered]:
    """The adapters in these patches, in the order in which ComfyUI applies them to each weight.

    Entries of one source and strength make one adapter. Entries that something else than `add_patches` wrote
    are grouped as well as can be: each follows what stands before it in the list of its weight.
    """
    groups: dict[tuple[int, int, float, bool], dict[str, Part]] = {}
    labels: dict[tuple[int, int, float, bool], str | None] = {}
    for key, entries in patches.items():
        ordinal, behind = -1, -1
        for entry in entries:
            source: Source | None = getattr(entry, "source", None)
            if source is not None and source.ordinal > ordinal:
                ordinal, behind = source.ordinal, 0
            else:
                behind += 1
            is_set = _is_set(entry[1])
            group = (ordinal, behind, 1.0 if is_set else float(entry[0]), not is_set)
            groups.setdefault(group, {}).update(parts_of(key, entry))
            labels.setdefault(group, None if source is None else source.label)
    return [
        Layered(_lora(parts, labels[group]), group[2], group[3])
        for group, parts in sorted(groups.items(), key=lambda item: item[0][:2])
    ]


def parts_of(key: str, patch: tuple[Any, ...]) -> dict[str, Part]:
    """What a LoRA file would hold for this patch of the weight `key`. CannotRunRemotely with the reason."""
    _, value, strength_model, offset, function = patch
    if isinstance(value, list) or strength_model != 1.0:
        raise _refusal(
            key, "a merge with another model", "that needs the weights of the UNet, which are on the server"
        )
    if offset is not None or function is not None:
        raise _refusal(key, "a patch of a part of a weight", "the server patches whole weights only")
    stem = key.removesuffix(".weight")
    names = PARTS.get(getattr(value, "name", ""))
    if names is not None:
        stated = zip(names, value.weights, strict=False)
        return {f"{stem}.{name}": _part(part) for name, part in stated if part is not None}
    kind, tensors = value if isinstance(value, tuple) and len(value) == 2 else ("diff", value)
    if kind == "diff" and isinstance(tensors, tuple) and isinstance(tensors[0], torch.Tensor):
        if key.endswith(".bias"):
            return {f"{key.removesuffix('.bias')}.diff_b": tensors[0]}
        return {f"{stem}.diff": tensors[0]}
    if kind == "set":
        return {f"{stem}.set_weight": tensors[0]}
    if kind == "model_as_lora":
        raise _refusal(
            key, "a model used as a LoRA", "that needs the weights of the UNet, which are on the server"
        )
    shown = kind if isinstance(kind, str) and kind != "diff" else type(value).__name__
    raise _refusal(
        key, f'a patch of the kind "{shown}"', f"the server knows {', '.join(PARTS)}, diff and set"
    )


def caller_lora_name() -> str | None:
    """The file that a loader node on the call stack is loading, for messages: ComfyUI does not pass it on."""
    frame = sys._getframe(1)
    for _ in range(8):
        if frame.f_back is None:
            break
        frame = frame.f_back
        name = frame.f_locals.get("lora_name")
        if isinstance(name, str):
            return name
    return None


def _is_set(value: object) -> bool:
    """ComfyUI replaces such weights whatever the strength."""
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "set"


def _part(stated: Any) -> Part:
    if isinstance(stated, torch.Tensor):
        return stated
    return tuple(stated) if isinstance(stated, (list, tuple)) else float(stated)


def _tensor(part: Part) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part
    return torch.tensor(part, dtype=torch.float32 if isinstance(part, float) else torch.int64)


def _refusal(key: str, what: str, because: str) -> CannotRunRemotely:
    return CannotRunRemotely(f'The weight "{key}" has {what}, but {because}. {WAY_OUT}')


def _lora(parts: Mapping[str, Part], label: str | None) -> Lora:
    digest = _digest(parts)
    first = min(parts)
    return Lora(
        digest,
        _tensors_of(parts),
        label or f"{digest[:12]} ({len(parts)} tensors, the first {first})",
    )


def _tensors_of(parts: Mapping[str, Part]) -> Callable[[], Mapping[str, torch.Tensor]]:
    return lambda: {name: _tensor(part) for name, part in parts.items()}


#: Identity of the parts -> their digest, and references that end the entry with the first tensor that ends,
#: before its identity can be another's. Loaders keep the tensors of a file, so a new strength hashes nothing.
_digests: dict[tuple[tuple[str, Any], ...], tuple[str, list[weakref.ref[torch.Tensor]]]] = {}


def _digest(parts: Mapping[str, Part]) -> str:
    """The digest of docs/PROTOCOL.md, computed once for the same tensor objects."""
    identity = tuple(
        (name, id(part) if isinstance(part, torch.Tensor) else (part,))
        for name, part in sorted(parts.items())
    )
    known = _digests.get(identity)
    if known is not None:
        return known[0]
    digest = frames.digest({name: _tensor(part) for name, part in parts.items()})

    def forget(_: weakref.ref[torch.Tensor]) -> None:
        _digests.pop(identity, None)

    references = [weakref.ref(part, forget) for part in parts.values() if isinstance(part, torch.Tensor)]
    _digests[identity] = (digest, references)
    return digest
