"""The models that servers hold: ComfyUI asks for them all the time, servers are asked every few seconds.

Keeps the last list of each server while it is away. Knows no nodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .client import Client, Patience
from .errors import RemoteError
from .settings import Settings

#: Longest time that ComfyUI may stand still because no server answers, in seconds.
TIMEOUT_S = 1.0
KEEP_S = 5.0


@dataclass(frozen=True)
class Known:
    """`models`: name -> entry of the last list there was. `problem`: why there is no newer one, or None."""

    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problem: str | None = None
    asked_at: float = -KEEP_S


class Listing:
    """The lists of all servers that were ever asked for. Any thread may ask; one at a time does."""

    def __init__(self) -> None:
        self._known: dict[Settings, Known] = {}
        self._lock = threading.Lock()

    def of(self, settings: Settings, fresh: bool = False) -> Known:
        """At most KEEP_S old, or new where `fresh`. Raises for no server, takes no longer than TIMEOUT_S."""
        with self._lock:
            known = self._known.get(settings, Known())
            if fresh or time.monotonic() - known.asked_at >= KEEP_S:
                known = self._known[settings] = _ask(settings, known)
            return known


def _ask(settings: Settings, last: Known) -> Known:
    try:
        client = Client.shared(settings.urls, settings.token)
        models = client.models(Patience("error"), TIMEOUT_S)
    except RemoteError as error:
        return Known(last.models, error.message, time.monotonic())
    return Known({entry["name"]: entry for entry in models}, None, time.monotonic())
