"""Which servers to ask, with which token: the first of node, environment and settings file counts.

Opens no connection. A token never comes from a workflow: workflows are shared, and saved into pictures.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_PORT = 8700
DEFAULT_URL = f"ws://127.0.0.1:{DEFAULT_PORT}/v1"
FILE_NAME = "unetd.json"

_SCHEMES = {"ws": "ws", "http": "ws", "wss": "wss", "https": "wss"}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_EXAMPLES = f'write for example "192.168.1.20:{DEFAULT_PORT}" or "{DEFAULT_URL}"'


class SettingsError(ValueError):
    """A setting that cannot be understood: which, where it came from, and how it should look."""


@dataclass(frozen=True)
class Settings:
    """URLs in the order in which they are tried, and the token that all of them take (None: no token)."""

    urls: tuple[str, ...]
    token: str | None


def read_settings(
    server: str = "", environ: Mapping[str, str] = os.environ, file: Path | None = None
) -> Settings:
    """Those for a node whose input `server` is this text; `file` need not exist. Raises SettingsError."""
    stated = _read_file(file) if file is not None else {}
    sources = (
        ("the node's input", server),
        ("the environment variable UNETD_URL", environ.get("UNETD_URL", "")),
        (f'"urls" of {file}', stated.get("urls", "")),
    )
    where, text = next(((where, text) for where, text in sources if text.strip()), ("", DEFAULT_URL))
    urls = tuple(normalise(part, where) for part in text.split(",") if part.strip())
    if not urls:
        raise SettingsError(f'"{text}" ({where}) names no server; {_EXAMPLES}.')
    token = environ.get("UNETD_TOKEN") or stated.get("token") or None
    return Settings(tuple(dict.fromkeys(urls)), token)


def normalise(text: str, where: str) -> str:
    """The WebSocket URL for `host`, `host:port`, or one of ws, wss, http or https.

    Without a scheme the port is 8700, with one it is that scheme's; without a path that is /v1. Raises
    SettingsError, which says `where` the text stood.
    """
    stated = text.strip()
    has_scheme = "://" in stated
    try:
        parts = urlsplit(stated if has_scheme else f"ws://{stated}")
        port = parts.port
        host = parts.hostname or ""
    except ValueError as error:
        raise SettingsError(f'"{stated}" ({where}) is no server address: {error}; {_EXAMPLES}.') from None
    scheme = _SCHEMES.get(parts.scheme)
    faults = (
        (scheme is None, f'"{parts.scheme}" is none of {", ".join(_SCHEMES)}'),
        (
            parts.username is not None or parts.fragment or parts.query,
            "a token belongs into UNETD_TOKEN or the settings file",
        ),
        (_HOST.fullmatch(host) is None, f'"{host}" is no host'),
        (port == 0, "the port is 0"),
    )
    for is_fault, fault in faults:
        if is_fault:
            raise SettingsError(f'"{stated}" ({where}) is no server address: {fault}; {_EXAMPLES}.')
    if port is None and not has_scheme:
        port = DEFAULT_PORT
    authority = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    return f"{scheme}://{authority}{parts.path.rstrip('/') or '/v1'}"


def _read_file(file: Path) -> dict[str, str]:
    """`urls` (joined by commas) and `token`, as far as the file states them; nothing without a file."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}.") from error
    expected = '{"urls": ["host:port", ...], "token": "..."}, each of them optional'
    try:
        content = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{file} is no JSON: {error}. It holds {expected}.") from error
    if not isinstance(content, dict) or not set(content) <= {"urls", "token"}:
        raise SettingsError(f"{file} must hold {expected}.")
    urls, token = content.get("urls", ""), content.get("token", "")
    if isinstance(urls, list) and all(isinstance(url, str) for url in urls):
        urls = ",".join(urls)
    if not isinstance(urls, str) or not isinstance(token, str):
        raise SettingsError(f"{file} must hold {expected}.")
    return {"urls": urls, "token": token}
