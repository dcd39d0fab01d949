"""What a server is sent only once, and again where it has lost it: conditioning and adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from client_setting import (
    Connect,
    own_lora,
)
from conftest import ERROR, MODEL, Reference, Server

from unetd import payloads
from unetd.client import Client, Lora
from unetd.errors import RemoteError, RequestFailed
from unetd.frames import digest


def test_context_is_sent_once_and_named_afterwards(
    client: Client, reference: Reference, sent: list[Any]
) -> None:
    case = reference.case("base")
    first = case.run(client)
    again = replace(case, context=case.context.clone()).run(client)
    other = replace(case, context=case.context + 1).run(client)
    back = case.run(client)
    assert torch.equal(first, again) and torch.equal(first, back) and not torch.equal(first, other)
    assert [tensors for op, _, tensors in sent if op == "forward"] == [
        ["context", "timesteps", "x"],
        ["timesteps", "x"],
        ["context", "timesteps", "x"],
        ["timesteps", "x"],
    ]


def test_a_context_that_the_server_lost_is_sent_again(
    server: Server, client: Client, reference: Reference, sent: list[Any]
) -> None:
    case = reference.case("base")
    expected = case.run(client)
    before = server.requests("forward").get("ERR_NOT_KEPT", 0)
    fresh = case.context + 2
    changed = replace(case, context=fresh).run(client)
    # A connection keeps up to 256 MiB: the client is made to believe in a tensor that was never kept there.
    other = Client([server.url], None)
    other.hello(ERROR)
    mine, theirs = client._endpoints.open, other._endpoints.open
    assert mine is not None and theirs is not None
    theirs.kept.update(mine.kept)
    assert torch.equal(replace(case, context=fresh).run(other), changed)
    assert torch.equal(case.run(other), expected)
    assert server.requests("forward")["ERR_NOT_KEPT"] == before + 1
    other.close()


def test_an_adapter_is_uploaded_once_whatever_its_strength_and_whoever_uses_it(
    server: Server, client: Client, connect: Connect, reference: Reference
) -> None:
    case = reference.case("base")
    lora = own_lora(reference, 7)
    before = server.requests("lora.put").get("ok", 0)
    result = client.load_lora(lora, MODEL, ERROR)
    assert result["digest"] == lora.digest and result["matched"] > 0 and result["unmatched"] == []
    outs = [replace(case, loras=[(lora, strength)]).run(client) for strength in (1.0, -0.5, 1.0)]
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])

    def never() -> dict[str, torch.Tensor]:
        raise AssertionError("the server has this adapter")

    other = connect(server.url)
    assert torch.equal(replace(case, loras=[(Lora(lora.digest, never, ""), 1.0)]).run(other), outs[0])
    assert server.requests("lora.put")["ok"] == before + 1


def test_a_large_adapter_is_uploaded_in_parts(
    server: Server, client: Client, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = reference.case("lora/style")
    # The same numbers in another dtype are another file.
    tensors = {name: tensor.half() for name, tensor in case.loras[0][0].tensors().items()}
    expected = case.run(client)
    before = server.requests("lora.put")["ok"]
    monkeypatch.setattr(payloads, "PART_BYTES", sum(tensor.nbytes for tensor in tensors.values()) // 4)
    out = replace(case, loras=[(Lora(digest(tensors), lambda: tensors, "half"), 1.0)]).run(client)
    assert server.requests("lora.put")["ok"] - before >= 4
    assert torch.equal(out, expected)


def test_an_adapter_that_the_server_lost_is_uploaded_again(
    server: Server, client: Client, reference: Reference
) -> None:
    case = reference.case("base")
    lora = own_lora(reference, 2)
    client.hello(ERROR)
    link = client._endpoints.open
    assert link is not None
    # What a server that dropped it for want of space looks like from here.
    link.loras.add(lora.digest)
    out = replace(case, loras=[(lora, 1.0)]).run(client)
    assert server.requests("forward")["ERR_UNKNOWN_LORA"] == 1
    assert torch.equal(out, replace(case, loras=[(lora, 1.0)]).run(client))
    unknown = Lora("", dict, "nowhere.safetensors")
    with pytest.raises(RequestFailed, match="nowhere") as caught:
        client.load_lora(unknown, MODEL, ERROR)
    assert caught.value.code == "ERR_UNKNOWN_LORA"
    assert server.requests("lora.load")["ERR_UNKNOWN_LORA"] == 1


def test_a_tensor_that_fits_no_frame_is_named(client: Client) -> None:
    large = torch.zeros(1).expand(70_000_000)
    lora = Lora("0" * 64, lambda: {"lora_unet_x.lora_up.weight": large}, "too large")
    with pytest.raises(RemoteError, match=r"lora_unet_x\.lora_up\.weight.*too large.*folder") as caught:
        client.load_lora(lora, MODEL, ERROR)
    assert caught.value.code == "ERR_TOO_LARGE"
