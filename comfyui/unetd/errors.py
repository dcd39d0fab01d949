"""Errors about servers. Callers match on codes (docs/ERRORS.md), people read messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RemoteError(Exception):
    """What a server answered, or what kept a request from being sent or answered.

    `code` is one of docs/ERRORS.md; `details` holds the facts of `message` for programs.
    """

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class RequestFailed(RemoteError):
    """A server's error answer to a request, or ERR_DISCONNECTED where the connection ended before it."""


class ServerAway(RemoteError):
    """No endpoint can be used now, or an answer did not come in time. It may pass by itself."""

    def __init__(self, message: str, endpoints: Mapping[str, str]) -> None:
        """`endpoints`: URL -> why it cannot be used."""
        super().__init__("ERR_DISCONNECTED", message, {"endpoints": dict(endpoints)})


class AccessRefused(RemoteError):
    """Every endpoint refuses this client (its token, its address, its protocol): waiting cures nothing."""
