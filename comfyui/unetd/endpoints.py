"""Interchangeable servers, of which one is in use: which one, how to get to it, and how to leave it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .connection import ConnectFailed, Connection, submit
from .errors import AccessRefused, RemoteError, ServerAway
from .patience import Patience, pauses, sleep, wait_for

logger = logging.getLogger("unetd")

#: Keys that a connection is believed to keep: the prompts of a few workflows.
MAX_KEPT = 64


@dataclass
class Link:
    """An open connection, and what the server behind it was given over it."""

    connection: Connection
    #: Which of the endpoints it leads to.
    index: int
    #: Content keys of kept tensors, least recently used first.
    kept: OrderedDict[str, None] = field(default_factory=OrderedDict)
    #: Digests of adapters that the server has.
    loras: set[str] = field(default_factory=set)
    #: Models that are loaded in the dtype that was asked for.
    models: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def share(
        self, keyed: Mapping[str, tuple[str, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Of tensors with their content keys: those to send, and the fields `keep` and `reuse` for them."""
        with self.lock:
            known = {name for name, (key, _) in keyed.items() if key in self.kept}
        sent = {name: tensor for name, (_, tensor) in keyed.items() if name not in known}
        keep = {name: key for name, (key, _) in keyed.items() if name not in known}
        reuse = {name: key for name, (key, _) in keyed.items() if name in known}
        return sent, {"keep": keep, "reuse": reuse}

    def kept_now(self, keyed: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        """To be called once the request is on its way: a `reuse` of another thread must follow its `keep`."""
        with self.lock:
            for key, _ in keyed.values():
                self.kept[key] = None
                self.kept.move_to_end(key)
            while len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)

    def forget(self, code: str) -> None:
        """Drops what an error of that code proves wrong."""
        with self.lock:
            if code == "ERR_NOT_KEPT":
                self.kept.clear()
            elif code == "ERR_UNKNOWN_LORA":
                self.loras.clear()


class Endpoints:
    """Connects to the first endpoint that takes it, in order; after a loss, from the next one on."""

    def __init__(self, urls: Sequence[str], token: str | None) -> None:
        if not urls:
            raise ValueError("no endpoint is given, at least one is needed")
        self.urls = tuple(urls)
        self._token = token
        #: The endpoint to try first.
        self._first = 0
        self._link: Link | None = None
        self._connecting = asyncio.Lock()
        self._pid = os.getpid()

    @property
    def open(self) -> Link | None:
        """The link in use, if there is one."""
        if self._pid != os.getpid():
            # Forked: the connection and its event loop are the parent's.
            self._link, self._connecting, self._pid = None, asyncio.Lock(), os.getpid()
        link = self._link
        return link if link is not None and link.connection.is_open else None

    def reach(self, patience: Patience) -> Link:
        """The open link, or a new one, as patiently as asked. ServerAway, AccessRefused."""
        rests = pauses()
        told = False
        while True:
            if (link := self.open) is not None:
                return link
            try:
                return wait_for(submit(self._connect()), patience.poll)
            except ServerAway as error:
                if patience.away == "error":
                    raise
                if not told:
                    logger.warning("%s Waiting for one.", error.message)
                told = True
            sleep(next(rests), patience.poll)

    def leave(self, link: Link) -> None:
        """Sends the next request elsewhere; what is open on this link is still answered."""
        if self._link is link:
            self._link = None
            self._first = (link.index + 1) % len(self.urls)
            submit(link.connection.retire())

    def close(self) -> None:
        link, self._link = self.open, None
        if link is not None:
            submit(link.connection.close()).result()

    async def _connect(self) -> Link:
        """Tries each endpoint once. ServerAway, AccessRefused."""
        async with self._connecting:
            if (link := self.open) is not None:
                return link
            failures: dict[str, ConnectFailed] = {}
            count = len(self.urls)
            for index in [(self._first + offset) % count for offset in range(count)]:
                url = self.urls[index]
                try:
                    connection = await Connection.open(url, self._token)
                except ConnectFailed as failure:
                    failures[url] = failure
                    continue
                logger.info("connected to %s (%s)", url, connection.hello["server"])
                self._first = index
                self._link = link = Link(connection, index)
                return link
        raise _unreachable(failures)


def away(reasons: Mapping[str, str]) -> ServerAway:
    """`reasons`: URL -> why it cannot be used."""
    cure = "Start one with `unetd serve`, or correct the address."
    return ServerAway(f"No server can be reached: {_listed(reasons)}. {cure}", reasons)


def _unreachable(failures: Mapping[str, ConnectFailed]) -> RemoteError:
    reasons = {url: failure.reason for url, failure in failures.items()}
    codes = [failure.lasting for failure in failures.values() if failure.lasting is not None]
    if len(codes) < len(failures):
        return away(reasons)
    message = f"No server accepts this client: {_listed(reasons)}."
    return AccessRefused(codes[0], message, {"endpoints": reasons})


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{url}: {reason.rstrip('.')}" for url, reason in reasons.items())
