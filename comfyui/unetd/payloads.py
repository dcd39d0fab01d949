"""What a client sends and is given beside single tensors: adapters, residuals, headers of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .errors import RemoteError

#: An upload is cut into frames of about this size, so that a lost connection loses little.
PART_BYTES = 32 * 1024 * 1024
#: Room that a frame's header takes, generously: by itself, and for each tensor.
HEADER_BYTES = 1024
HEADER_BYTES_PER_TENSOR = 256


@dataclass(frozen=True)
class Lora:
    """An adapter that the server can be given: its digest, and its tensors for when the server lacks it.

    `digest` is that of docs/PROTOCOL.md in hex, or "" for a file in the server's own folders: then `label` is
    its name there. `tensors` is called only to upload, in the thread that asks.
    """

    digest: str
    tensors: Callable[[], Mapping[str, torch.Tensor]]
    label: str

    @property
    def name(self) -> str:
        """As requests name it."""
        return f"sha256:{self.digest}" if self.digest else self.label


@dataclass(frozen=True)
class Control:
    """Residuals of ControlNets and T2I-Adapters, [N, C, H, W] each, in ComfyUI's lists; None where absent."""

    input: Sequence[torch.Tensor | None]
    middle: Sequence[torch.Tensor | None]
    output: Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class TensorInfo:
    """What a model file states about a tensor, `dtype` as in safetensors."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Of a model file: its tensors, its own metadata, and the values of those tensors that were asked for."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    values: dict[str, torch.Tensor]


def residuals(
    lists: Mapping[str, Sequence[torch.Tensor | None]],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, entries in lists.items():
        for index, tensor in enumerate(entries):
            if tensor is not None:
                yield f"control.{name}.{index}", tensor.cpu()


def parts_of(lora: Lora, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Parts of whole tensors, in order of name. ERR_TOO_LARGE for a tensor that fits no frame."""
    part: dict[str, torch.Tensor] = {}
    used = HEADER_BYTES
    for name, tensor in sorted(lora.tensors().items()):
        size = tensor.numel() * tensor.element_size() + HEADER_BYTES_PER_TENSOR + 6 * len(name)
        if HEADER_BYTES + size > max_bytes:
            raise RemoteError(
                "ERR_TOO_LARGE",
                f'Tensor "{name}" of "{lora.label}" takes {size} bytes, a frame at most {max_bytes}; '
                "put the file into a LoRA folder of the server instead.",
            )
        if part and used + size > min(PART_BYTES, max_bytes):
            yield part
            part, used = {}, HEADER_BYTES
        part[name] = tensor
        used += size
    yield part
