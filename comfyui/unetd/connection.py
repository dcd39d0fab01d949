"""One WebSocket to a server on a background event loop: requests matched to answers, progress, cancellation.

Knows the frames of docs/PROTOCOL.md but no operation; does not reconnect. All sockets of the process live on
one daemon thread, so that answers and pings are taken while the threads that ask compute something else.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import itertools
import json
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

import aiohttp
import torch

from . import frames
from .errors import RemoteError, RequestFailed

SUBPROTOCOL = "unetd.v1"
PROTOCOL = 1
#: Seconds until a server must have said hello.
CONNECT_S = 5.0
#: Seconds without a sign of life that end a connection: the server pings every 20 s, two pings may be late.
SILENCE_S = 50.0
#: Seconds that a polite end of a connection may take.
CLOSE_S = 1.0

#: HTTP statuses of a refused upgrade that waiting cannot cure: protocol, token, Host header.
_LASTING = {400: "ERR_BAD_REQUEST", 401: "ERR_UNAUTHORIZED", 403: "ERR_UNAUTHORIZED"}

Value = TypeVar("Value")
Progress = Callable[[str, int, int], None]


class Answer(NamedTuple):
    """`message` is the text frame, or `res` of the binary one; a text frame has no tensors."""

    message: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class ConnectFailed(Exception):
    """Why one endpoint cannot be used. `lasting` is an error code where waiting cannot cure it."""

    def __init__(self, reason: str, lasting: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


class Connection:
    """An open WebSocket. `request` may be called from any thread, all else belongs to the event loop."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        socket: aiohttp.ClientWebSocketResponse[Any],
        hello: dict[str, Any],
    ) -> None:
        self.url = url
        self.hello = hello
        self.max_message_bytes: int = hello["limits"]["maxMessageBytes"]
        self._session = session
        self._socket = socket
        self._ids = itertools.count(1)
        self._pending: dict[str, _Pending] = {}
        # One place of the server's window is left to a request that was cancelled and not yet answered so.
        self._window = asyncio.Semaphore(max(1, hello["limits"]["maxInFlight"] - 1))
        self._ended: RequestFailed | None = None
        self._retired = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = self._start(self._read())
        _connections.add(self)

    @staticmethod
    async def open(url: str, token: str | None) -> Connection:
        """Connects and waits for the server's hello. ConnectFailed."""
        session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=aiohttp.ClientTimeout(total=None),
            raise_for_status=_check_upgrade,
        )
        try:
            return await asyncio.wait_for(_greet(url, session), CONNECT_S)
        except BaseException as error:
            await session.close()
            if isinstance(error, asyncio.TimeoutError):
                raise ConnectFailed(f"no answer within {CONNECT_S:g} s") from None
            if isinstance(error, (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError)):
                raise ConnectFailed(_reason_of(error)) from None
            raise

    @property
    def is_open(self) -> bool:
        return self._ended is None

    def request(
        self,
        op: str,
        fields: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> concurrent.futures.Future[Answer]:
        """Sends a request, in a binary frame where `tensors` is given.

        The future fails with RequestFailed; cancelling it cancels the request on the server.
        ERR_TOO_LARGE where the server would not take the frame.
        `progress` is called on the event loop.
        """
        id = str(next(self._ids))
        message = {"id": id, "op": op, **fields}
        frame = json.dumps(message).encode() if tensors is None else frames.encode(message, tensors)
        if len(frame) > self.max_message_bytes:
            raise RemoteError(
                "ERR_TOO_LARGE",
                f"The {op} request takes {len(frame)} bytes, {self.url} accepts {self.max_message_bytes}; "
                "send fewer or smaller images.",
            )
        return submit(self._exchange(id, frame, tensors is not None, progress))

    async def retire(self) -> None:
        """Closes the connection as soon as its open requests are answered."""
        self._retired = True
        if not self._pending:
            await self.close()

    async def close(self) -> None:
        """Open requests fail with ERR_DISCONNECTED."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def abandon(self) -> None:
        """Closes the connection and leaves those who wait waiting: their threads end with the interpreter."""
        self._pending.clear()
        await self.close()

    async def _exchange(self, id: str, frame: bytes, binary: bool, progress: Progress | None) -> Answer:
        async with self._window:
            if self._ended is not None:
                raise self._ended
            pending = self._pending[id] = _Pending(asyncio.get_running_loop().create_future(), progress)
            try:
                await (self._socket.send_bytes(frame) if binary else self._socket.send_str(frame.decode()))
                outcome = await pending.outcome
            except asyncio.CancelledError:
                # A frame without compression is written in one go: the request is out, the cancel follows it.
                self._start(self._cancel(id))
                raise
            except (aiohttp.ClientError, OSError) as error:
                raise self._end(f"the connection failed ({_reason_of(error)})") from None
            finally:
                self._pending.pop(id, None)
                if self._retired and not self._pending:
                    self._reader.cancel()
        if isinstance(outcome, RequestFailed):
            raise outcome
        return outcome

    async def _cancel(self, id: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await self._socket.send_json({"id": f"cancel {id}", "op": "cancel", "target": id})

    async def _read(self) -> None:
        reason = "it was closed by this client"
        try:
            reason = await self._take_all()
        except asyncio.TimeoutError:
            reason = f"nothing came from the server for {SILENCE_S:g} s"
        except Exception as error:
            reason = f"the server sent an unreadable frame ({error})"
        finally:
            self._end(reason)
            await self._socket.close()
            await self._session.close()

    async def _take_all(self) -> str:
        """Takes frames until the connection ends; why it did."""
        while True:
            frame = await self._socket.receive()
            if frame.type is aiohttp.WSMsgType.TEXT:
                self._take(Answer(json.loads(frame.data), {}))
            elif frame.type is aiohttp.WSMsgType.BINARY:
                self._take(Answer(*frames.decode(frame.data)))
            elif frame.type is aiohttp.WSMsgType.CLOSE:
                return f"the server closed the connection ({frame.data}: {frame.extra or 'no reason given'})"
            else:
                return "the connection was lost"

    def _take(self, answer: Answer) -> None:
        message = answer.message
        pending = self._pending.get(str(message.get("id")))
        if message.get("event") == "progress":
            if pending is not None and pending.progress is not None:
                pending.progress(message["stage"], message["done"], message["total"])
        elif message.get("ok") is True:
            if pending is not None:
                pending.settle(answer)
        elif message.get("ok") is False:
            stated = message["error"]
            error = RequestFailed(stated["code"], stated["message"], stated.get("details"))
            if message["id"] is None:
                pending = self._pending.get(str(error.details.get("id")))
            if pending is not None:
                pending.settle(error)
            elif message["id"] is None:
                # Nobody can tell which request was meant: none can be trusted to be answered.
                self._fail_all(error)

    def _end(self, reason: str) -> RequestFailed:
        if self._ended is None:
            details = {"endpoints": {self.url: reason}}
            self._ended = RequestFailed("ERR_DISCONNECTED", f"{self.url}: {reason}.", details)
            self._fail_all(self._ended)
        return self._ended

    def _fail_all(self, error: RequestFailed) -> None:
        for pending in self._pending.values():
            pending.settle(error)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is held until it is done: the loop itself holds tasks only weakly."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Pending(NamedTuple):
    """An open request. An error is a result here: asyncio warns of exceptions that nobody awaits."""

    outcome: asyncio.Future[Answer | RequestFailed]
    progress: Progress | None

    def settle(self, outcome: Answer | RequestFailed) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


async def _greet(url: str, session: aiohttp.ClientSession) -> Connection:
    socket = await session.ws_connect(
        url,
        protocols=(SUBPROTOCOL,),
        compress=0,
        max_msg_size=0,
        timeout=aiohttp.ClientWSTimeout(ws_receive=SILENCE_S, ws_close=CLOSE_S),
    )
    first = await socket.receive()
    hello = json.loads(first.data) if first.type is aiohttp.WSMsgType.TEXT else {}
    if hello.get("event") != "hello":
        raise ConnectFailed("it is no unetd server: its first message is no hello")
    if hello.get("protocol") != PROTOCOL:
        versions = f"version {hello.get('protocol')} of the protocol, this client version {PROTOCOL}"
        raise ConnectFailed(f"the server speaks {versions}", "ERR_BAD_REQUEST")
    return Connection(url, session, socket, hello)


async def _check_upgrade(response: aiohttp.ClientResponse) -> None:
    """Reads why an upgrade is refused: aiohttp's own error gives the status only."""
    if response.status != 101:
        text = (await response.text(errors="replace")).strip()[:1000]
        raise ConnectFailed(f"refused with {response.status}: {text}", _LASTING.get(response.status))


def _reason_of(error: BaseException) -> str:
    """The system's words for an error, without the address, which the caller names."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    number = getattr(cause, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


_loop: asyncio.AbstractEventLoop | None = None
_starting = threading.Lock()
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def submit(work: Coroutine[Any, Any, Value]) -> concurrent.futures.Future[Value]:
    """Runs a coroutine on the background event loop, which the first call starts."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="unetd", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(work, _loop)


def _forget() -> None:
    """In a forked child: the thread did not come along, and the sockets are the parent's."""
    global _loop, _starting
    _loop = None
    _starting = threading.Lock()
    _connections.clear()


@atexit.register
def _stop() -> None:
    """Ends the connections, so that nothing is printed about them while the interpreter ends."""
    if _loop is not None:
        with contextlib.suppress(Exception):
            submit(_abandon_all()).result(2 * CLOSE_S)


async def _abandon_all() -> None:
    await asyncio.gather(*(connection.abandon() for connection in _connections))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
