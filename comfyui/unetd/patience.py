"""Waiting for what runs on the event loop, in a thread that may lose patience. Knows no servers."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

Value = TypeVar("Value")
Poll = Callable[[], None]

#: Longest time between two calls of `Patience.poll`, in seconds.
POLL_S = 0.05
#: Pauses between attempts double from the first to the last, in seconds.
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 2.0


@dataclass(frozen=True)
class Patience:
    """How to behave while servers are away, and how to notice that the user lost patience.

    `error`: ServerAway as soon as every endpoint refused once (each gets 5 s to answer). `wait`: until one is
    back. `poll` is called at least every 50 ms while waiting; what it raises ends the wait, cancels the open
    request on the server, and propagates.
    """

    away: Literal["error", "wait"]
    poll: Poll | None = None


def wait_for(work: concurrent.futures.Future[Value], poll: Poll | None) -> Value:
    """The result of `work`. Where `poll` raises, or the thread is interrupted, the work is cancelled."""
    try:
        while not concurrent.futures.wait([work], POLL_S).done:
            if poll is not None:
                poll()
    except BaseException:
        work.cancel()
        raise
    return work.result()


def sleep(seconds: float, poll: Poll | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if poll is not None:
            poll()
        time.sleep(min(left, POLL_S))


def pauses() -> Iterator[float]:
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LAST_PAUSE_S)
