"""Binary frames of the wire protocol (docs/PROTOCOL.md): a safetensors file whose metadata holds the message.

Converts between frames and dictionaries of tensors, and computes digests. Knows no sockets and no meaning of
any field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from .errors import RemoteError

#: Name in a file -> torch's name. Older versions of torch lack a few.
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, theirs) for name, theirs in _NAMES.items() if hasattr(torch, theirs)
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_ALIGNMENT = 8


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype as files call it. ERR_BAD_DTYPE where they cannot hold it."""
    name = _DTYPE_NAMES.get(tensor.dtype)
    if name is None:
        known = ", ".join(_NAMES.values())
        message = f"A tensor of {tensor.dtype} cannot be sent; convert it to one of {known}."
        raise RemoteError("ERR_BAD_DTYPE", message)
    return name


def data(tensor: torch.Tensor) -> memoryview:
    """The elements as bytes, row-major, little endian; of a dense tensor on the CPU without a copy."""
    dense = tensor.detach().to("cpu").contiguous()
    # A dimension of size 1 may have any stride, with which torch refuses to reinterpret.
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def encode(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], key: str = "req") -> bytes:
    """A frame with `message` as JSON under `key` of its metadata.

    Tensors are laid out by falling element size, then name, so that a reader finds each aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {key: _json(message)}}
    parts: list[memoryview] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        part = data(tensor)
        begin, end = end, end + part.nbytes
        dtype = dtype_name(tensor)
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts.append(part)
    header = _json(entries).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *parts])


def decode(frame: bytes, key: str = "res") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The message, and the tensors in memory of their own. ERR_BAD_FRAME where it contradicts itself."""
    try:
        start = _LENGTH_BYTES + int.from_bytes(frame[:_LENGTH_BYTES], "little")
        if start > len(frame):
            raise ValueError(f"its header ends at byte {start}, the frame at {len(frame)}")
        header = json.loads(frame[_LENGTH_BYTES:start])
        message = json.loads(header.pop("__metadata__")[key])
        if not isinstance(message, dict):
            raise ValueError(f'its "{key}" is no JSON object')
        whole = memoryview(frame)[start:]
        return message, {name: _read(whole, entry) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"A frame of {len(frame)} bytes cannot be read: {error!r}."
        raise RemoteError("ERR_BAD_FRAME", reason) from error


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Lower-case hex SHA-256 over the tensors in ascending order of name, as docs/PROTOCOL.md defines it."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(str(size) for size in tensor.shape)
        state.update(f"{name}\0{dtype_name(tensor)}\0{shape}\0".encode())
        state.update(data(tensor))
    return state.hexdigest()


def content_key(tensor: torch.Tensor) -> str:
    """A key that tensors share only if they are equal bit for bit, in dtype and shape too.

    SHA-1 takes 0.2 ms where SHA-256 takes 0.6 ms for the context of SD 1.5; nobody forges their own prompts.
    """
    state = hashlib.sha1(data(tensor), usedforsecurity=False)
    return f"{dtype_name(tensor)}{list(tensor.shape)}{state.hexdigest()}"


def _read(whole: memoryview, entry: Mapping[str, Any]) -> torch.Tensor:
    """One tensor of the data part. ValueError, LookupError or TypeError where its entry is wrong."""
    dtype = DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    taken = math.prod(shape) * dtype.itemsize
    if not 0 <= begin <= end <= len(whole) or end - begin != taken:
        raise ValueError(f"{entry} does not fit into data of {len(whole)} bytes")
    if taken == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(whole[begin:end]), dtype=dtype).reshape(shape)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
