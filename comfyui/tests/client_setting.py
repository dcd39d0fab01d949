"""What tests of the client have in common: slow forwards, adapters of their own, ports that say nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import torch
from conftest import ERROR, MODEL, Reference, Server

from unetd.client import Client, Lora, Patience
from unetd.frames import digest

Serve = Callable[..., Server]
Connect = Callable[..., Client]

#: A forward of this many latent pixels takes lavapipe on two cores a second or more.
SLOW = 48


class LostPatience(Exception):
    """What ComfyUI's interrupt is to the client: an exception of somebody else."""


def slow_forward(
    client: Client, patience: Patience, loras: list[tuple[Lora, float]] | None = None
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 4, SLOW, SLOW, generator=generator)
    context = torch.randn(1, 13, 48, generator=generator)
    out, _ = client.forward(MODEL, loras or [], x, torch.tensor([400.0]), context, None, None, patience)
    return out


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def running(server: Server) -> bool:
    return bool(Client.shared([server.url], None).stats(ERROR)["queue"]["running"] > 0)


def own_lora(reference: Reference, alpha: float) -> Lora:
    """One that no other test has uploaded."""
    tensors = dict(reference.lora("style").tensors())
    name = next(name for name in tensors if name.endswith("alpha"))
    tensors[name] = torch.tensor(alpha)
    return Lora(digest(tensors), lambda: tensors, f"style {alpha}")


@contextlib.contextmanager
def deaf_port() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/v1"


def dead_port() -> str:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"ws://127.0.0.1:{listener.getsockname()[1]}/v1"
