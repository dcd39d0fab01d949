"""Frames: the examples of docs/PROTOCOL.md byte for byte, round trips, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from unetd import frames
from unetd.errors import RemoteError

PROTOCOL = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text()


def document_frames() -> list[bytes]:
    """The two hexadecimal dumps of the document, request and answer."""
    section = PROTOCOL.split("\n## Example\n")[1].split("\n## ")[0]
    dumps = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    return [bytes.fromhex("".join(line[6:53] for line in dump.splitlines())) for dump in dumps]


def test_the_request_of_the_document_is_encoded_byte_for_byte() -> None:
    request, _ = document_frames()
    tensors = {
        "x": torch.tensor([1, -1, 0.5, 2], dtype=torch.float16).reshape(1, 4, 1, 1),
        "timesteps": torch.tensor([999.0]),
        "context": torch.tensor([[[0.25, -0.5]]]),
    }
    message = {"id": "7", "op": "forward", "model": "toy.safetensors"}
    assert frames.encode(message, tensors) == request


def test_the_answer_of_the_document_is_decoded() -> None:
    _, answer = document_frames()
    message, tensors = frames.decode(answer)
    assert message["id"] == "7"
    assert message["timing"] == {"queueMs": 0.2, "gpuMs": 1.5, "batch": 1, "batchedRequests": 1}
    assert list(tensors) == ["out"]
    expected = torch.tensor([1, 0, 0, -2], dtype=torch.float16).reshape(1, 4, 1, 1)
    assert tensors["out"].dtype is torch.float16 and torch.equal(tensors["out"], expected)


def test_the_digest_of_the_document() -> None:
    stated = re.search(r"`([0-9a-f]{64})`", PROTOCOL)
    assert stated is not None
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[0.5]], dtype=torch.float16)}
    assert frames.digest(tensors) == stated[1]


@pytest.mark.parametrize("name", sorted(frames.DTYPES))
def test_every_dtype_comes_back_bit_for_bit(name: str) -> None:
    dtype = frames.DTYPES[name]
    raw = torch.randint(0, 2 if name == "BOOL" else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(2, 3)
    message, back = frames.decode(frames.encode({"id": "1"}, {"t": tensor}), "req")
    assert message == {"id": "1"}
    assert back["t"].dtype is dtype and back["t"].shape == (2, 3)
    assert torch.equal(back["t"].contiguous().view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(2, 0, 3),
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(10.0)[::3],
        torch.arange(10.0)[4:5],
        torch.as_strided(torch.arange(10.0), (1,), (5,), 7),
        torch.ones(3, requires_grad=True),
        torch.ones(1, 1).expand(4, 5),
    ],
    ids=["scalar", "empty", "permuted", "strided", "slice", "odd stride", "gradient", "expanded"],
)
def test_a_tensor_comes_back_whatever_its_memory_looks_like(tensor: torch.Tensor) -> None:
    _, back = frames.decode(frames.encode({}, {"t": tensor}), "req")
    assert back["t"].shape == tensor.shape and torch.equal(back["t"], tensor)


def test_many_tensors_of_mixed_sizes_come_back_under_their_names() -> None:
    tensors = {f"ü{i}": torch.full((i,), i).to(torch.int8 if i % 2 else torch.float64) for i in range(9)}
    _, back = frames.decode(frames.encode({}, tensors), "req")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_decoded_tensors_can_be_written_and_do_not_share_the_frame() -> None:
    frame = frames.encode({}, {"t": torch.zeros(4)})
    _, back = frames.decode(frame, "req")
    back["t"] += 1
    assert torch.equal(frames.decode(frame, "req")[1]["t"], torch.zeros(4))


def test_content_keys_tell_values_dtypes_and_shapes_apart() -> None:
    zeros = torch.zeros(2, 4)
    others = [torch.zeros(4, 2), torch.zeros(2, 4, dtype=torch.int32), -zeros, torch.eye(2, 4)]
    keys = [frames.content_key(tensor) for tensor in [zeros, *others]]
    assert len(set(keys)) == len(keys)
    assert frames.content_key(torch.zeros(4, 2).T) == keys[0]
    assert all(len(key) <= 256 for key in keys)


def test_a_dtype_that_files_do_not_have_is_refused() -> None:
    with pytest.raises(RemoteError, match=r"complex64.*convert it") as caught:
        frames.encode({}, {"t": torch.zeros(2, dtype=torch.complex64)})
    assert caught.value.code == "ERR_BAD_DTYPE"


def test_no_damaged_frame_is_taken_or_crashes_the_reader() -> None:
    whole = frames.encode({"id": "1", "ok": True}, {"out": torch.arange(8.0)}, "res")
    damaged = [whole[:size] for size in range(0, len(whole), 3)]
    damaged += [
        whole.replace(b'"F32"', b'"F33"'),
        whole.replace(b"[8]", b"[9]"),
        whole.replace(b"[0,32]", b"[8,40]"),
        whole.replace(b"res", b"req"),
        whole.replace(b'"shape"', b'"shepa"'),
        (1 << 62).to_bytes(8, "little") + whole[8:],
    ]
    for frame in damaged:
        with pytest.raises(RemoteError) as caught:
            frames.decode(frame)
        assert caught.value.code == "ERR_BAD_FRAME"
