"""The synchronous client that the nodes use: operations, resends, uploads, and tensors that a server keeps.

Knows what nodes ask of a server and nothing of ComfyUI. Sockets live on the event loop of `connection.py`;
decisions are made in the thread that calls, which is also where `Patience.poll` and progress are called.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch

from . import frames
from .connection import Answer, Progress
from .endpoints import Endpoints, Link, away
from .errors import RemoteError, RequestFailed
from .patience import Patience, pauses, sleep, wait_for
from .payloads import Control, Header, Lora, TensorInfo, parts_of, residuals

__all__ = ["Client", "Control", "Header", "Lora", "Patience", "TensorInfo"]

logger = logging.getLogger("unetd")

Value = TypeVar("Value")

#: How often a server is given again what it says it has lost.
MAX_REMINDERS = 2
#: Pause where ERR_BUSY does not say how long: the window of the connection is full, not the server's queue.
BUSY_MS = 100

#: Errors of a server that goes away, and those that another attempt may cure.
AWAY = frozenset({"ERR_DISCONNECTED", "ERR_SHUTTING_DOWN"})
CURABLE = AWAY | {"ERR_DEVICE_LOST", "ERR_ENGINE_DOWN"}


class Client:
    """All requests to interchangeable servers. Any thread may call; a call blocks until its answer.

    What asks a server raises ServerAway, AccessRefused, or RemoteError with the server's code and message.
    """

    _shared: ClassVar[dict[tuple[tuple[str, ...], str | None], Client]] = {}
    _sharing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, urls: Sequence[str], token: str | None) -> None:
        self._endpoints = Endpoints(urls, token)
        #: Model -> the dtype that `load` was asked for.
        self._dtypes: dict[str, str] = {}

    @staticmethod
    def shared(urls: Sequence[str], token: str | None) -> Client:
        """The one client of this process for these endpoints, `ws://HOST:PORT/v1` each."""
        key = (tuple(urls), token)
        with Client._sharing:
            if key not in Client._shared:
                Client._shared[key] = Client(urls, token)
            return Client._shared[key]

    def hello(self, patience: Patience) -> dict[str, Any]:
        """What the server in use said on connecting: `server`, `device`, `limits`."""
        return self._endpoints.reach(patience).connection.hello

    def endpoint(self) -> str | None:
        """URL of the server in use, or None while there is none."""
        link = self._endpoints.open
        return None if link is None else link.connection.url

    def models(self, patience: Patience, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """The models in the server's folders: `name`, `sizeBytes`, `loaded`, and `config` of loaded ones.

        ServerAway where that takes longer than `timeout_s`.
        """
        bounded = patience if timeout_s is None else self._bounded(patience, timeout_s)
        models: list[dict[str, Any]] = self._result("models.list", {}, bounded)["models"]
        return models

    def header(self, model: str, values: Sequence[str], patience: Patience) -> Header:
        """Names, dtypes and shapes of a model file, and the values of a few small tensors. Loads nothing."""
        fields = {"model": model, "values": list(values)}
        answer = self._persist(lambda link: self._ask(link, "model.header", fields, patience), patience)
        stated = answer.message["header"]
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]))
            for name, entry in stated["tensors"].items()
        }
        return Header(tensors, stated["metadata"], answer.tensors)

    def load(
        self, model: str, dtype: str, patience: Patience, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Loads a model, stored as `auto`, `f32` or `f16`: its `version`, `dtype`, `config` and `sizeBytes`.

        A server that later replaces this one, or has restarted, is asked for the same dtype before its first
        forward. `progress` takes stage, done and total.
        """
        self._dtypes[model] = dtype
        return self._persist(lambda link: self._load(link, model, dtype, patience, progress), patience)

    def stats(self, patience: Patience) -> dict[str, Any]:
        """The numbers of the server's monitor page."""
        return self._result("stats", {}, patience)

    def load_lora(self, lora: Lora, model: str, patience: Patience) -> dict[str, Any]:
        """Uploads an adapter where the server lacks it, and loads it for a model.

        `digest`, `format`, `rank`, `layers`, `matched`, `unmatched` (keys without a layer), `sizeBytes`.
        """
        fields = {"lora": lora.name, "model": model}

        def send(link: Link) -> Answer:
            return self._ask(link, "lora.load", fields, patience)

        answer = self._persist(lambda link: self._with_loras(link, model, [lora], send, patience), patience)
        result: dict[str, Any] = answer.message["result"]
        return result

    def forward(
        self,
        model: str,
        loras: Sequence[tuple[Lora, float]],
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None,
        control: Control | None,
        patience: Patience,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """One evaluation of the UNet: the result, [N, C_out, H, W] with dtype and device of `x`, and timing.

        `x` [N, C, H, W], `context` [N, T, D] and `y` [N, D_adm]: float32 or float16, on any device;
        `timesteps` [N]. The timing holds `queueMs`, `gpuMs`, `batch` (images) and `batchedRequests`.
        """
        for lora, strength in loras:
            if not math.isfinite(strength):
                message = f'LoRA "{lora.label}" has the strength {strength}; give a finite number.'
                raise RemoteError("ERR_BAD_STRENGTH", message)
        fields: dict[str, Any] = {
            "model": model,
            "loras": [{"lora": lora.name, "strength": float(strength)} for lora, strength in loras],
        }
        tensors = {"x": x.cpu(), "timesteps": timesteps.to("cpu", torch.float32)}
        if control is not None:
            lists = {"input": control.input, "middle": control.middle, "output": control.output}
            fields["control"] = {name: len(entries) for name, entries in lists.items()}
            tensors.update(residuals(lists))
        conditioning = {"context": context} if y is None else {"context": context, "y": y}
        # Fetched from its device once, for the key and for sending.
        fetched = {name: tensor.cpu() for name, tensor in conditioning.items()}
        keyed = {name: (frames.content_key(tensor), tensor) for name, tensor in fetched.items()}

        def send(link: Link) -> Answer:
            sent, sharing = link.share(keyed)
            request = link.connection.request("forward", {**fields, **sharing}, {**tensors, **sent})
            link.kept_now(keyed)
            return wait_for(request, patience.poll)

        used = [lora for lora, _ in loras]
        answer = self._persist(lambda link: self._with_loras(link, model, used, send, patience), patience)
        return answer.tensors["out"].to(x.device), answer.message["timing"]

    def close(self) -> None:
        """Ends the connection. The next request opens one again."""
        self._endpoints.close()

    def _persist(self, ask: Callable[[Link], Value], patience: Patience) -> Value:
        """Asks until there is an answer, or an error that no other attempt or endpoint can cure."""
        rests = pauses()
        resends = 0
        count = len(self._endpoints.urls)
        while True:
            link = self._endpoints.reach(patience)
            try:
                return ask(link)
            except RequestFailed as error:
                if error.code == "ERR_BUSY":
                    sleep(error.details.get("retryAfterMs", BUSY_MS) / 1000, patience.poll)
                    continue
                waits = patience.away == "wait" and error.code in AWAY
                if error.code not in CURABLE or (resends >= count and not waits):
                    if error.code not in AWAY:
                        raise
                    url = link.connection.url
                    raise away(error.details.get("endpoints", {url: error.message})) from error
                logger.warning("Sending a request again: %s", error)
                # Without another endpoint, a connection that works is worth keeping.
                if error.code in AWAY or count > 1:
                    self._endpoints.leave(link)
            resends += 1
            if resends % count == 0:
                sleep(next(rests), patience.poll)

    def _with_loras(
        self,
        link: Link,
        model: str,
        loras: Sequence[Lora],
        send: Callable[[Link], Answer],
        patience: Patience,
    ) -> Answer:
        """Gives the server the adapters and sends what needs them; gives again what it has lost meanwhile."""
        lost = {"ERR_NOT_KEPT"} | {"ERR_UNKNOWN_LORA" for lora in loras if lora.digest}
        for _ in range(MAX_REMINDERS):
            self._prepare(link, model, loras, patience)
            try:
                return send(link)
            except RequestFailed as error:
                if error.code not in lost:
                    raise
                link.forget(error.code)
        self._prepare(link, model, loras, patience)
        return send(link)

    def _prepare(self, link: Link, model: str, loras: Sequence[Lora], patience: Patience) -> None:
        """Sees to it that the model has the dtype that was asked for, and that the adapters are there."""
        dtype = self._dtypes.get(model, "auto")
        if dtype != "auto" and model not in link.models:
            self._load(link, model, dtype, patience)
        wanted = {lora.digest: lora for lora in loras if lora.digest and lora.digest not in link.loras}
        if not wanted:
            return
        answer = self._ask(link, "lora.has", {"digests": list(wanted)}, patience)
        for digest in answer.message["result"]["missing"]:
            self._upload(link, wanted[digest], patience)
        link.loras.update(wanted)

    def _load(
        self, link: Link, model: str, dtype: str, patience: Patience, progress: Progress | None = None
    ) -> dict[str, Any]:
        fields = {"model": model, "dtype": dtype}
        answer = self._ask(link, "model.load", fields, patience, progress=progress)
        link.models.add(model)
        result: dict[str, Any] = answer.message["result"]
        return result

    def _upload(self, link: Link, lora: Lora, patience: Patience) -> None:
        parts = list(parts_of(lora, link.connection.max_message_bytes))
        for part, tensors in enumerate(parts):
            fields = {"digest": lora.digest, "part": part, "parts": len(parts)}
            self._ask(link, "lora.put", fields, patience, tensors)
        logger.info('uploaded "%s" (%s) to %s', lora.label, lora.digest[:12], link.connection.url)

    def _result(self, op: str, fields: Mapping[str, Any], patience: Patience) -> dict[str, Any]:
        """`result` of a request without tensors."""
        answer = self._persist(lambda link: self._ask(link, op, fields, patience), patience)
        result: dict[str, Any] = answer.message["result"]
        return result

    def _ask(
        self,
        link: Link,
        op: str,
        fields: Mapping[str, Any],
        patience: Patience,
        tensors: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """One request over a link, sent once. RequestFailed."""
        if progress is None:
            return wait_for(link.connection.request(op, fields, tensors), patience.poll)
        events: deque[tuple[str, int, int]] = deque()

        def poll() -> None:
            while events:
                progress(*events.popleft())
            if patience.poll is not None:
                patience.poll()

        answer = wait_for(
            link.connection.request(op, fields, tensors, lambda *event: events.append(event)), poll
        )
        poll()
        return answer

    def _bounded(self, patience: Patience, timeout_s: float) -> Patience:
        """The same patience for `timeout_s` seconds from now; then ServerAway."""
        deadline = time.monotonic() + timeout_s

        def poll() -> None:
            if patience.poll is not None:
                patience.poll()
            if time.monotonic() > deadline:
                raise away({url: f"no answer within {timeout_s:g} s" for url in self._endpoints.urls})

        return replace(patience, poll=poll)
