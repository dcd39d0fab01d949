"""Servers that go away, fall silent or refuse, and users who lose patience with them."""

from __future__ import annotations

import itertools
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from client_setting import (
    Connect,
    LostPatience,
    Serve,
    dead_port,
    deaf_port,
    own_lora,
    running,
    slow_forward,
    until,
)
from conftest import ERROR, MODEL, WAIT, Reference, Server

from unetd import connection as connection_module
from unetd.client import Client, Patience
from unetd.errors import AccessRefused, RemoteError, ServerAway


def test_a_server_killed_in_mid_forward_and_started_again_gives_the_same_numbers(
    serve: Serve, connect: Connect, reference: Reference
) -> None:
    server = serve("--dtype", "f16")
    client = connect(server.url)
    loras = [(own_lora(reference, 3), 0.8)]
    # Only the client knows that f32 was asked for: the server's own choice is f16.
    assert client.load(MODEL, "f32", WAIT)["dtype"] == "f32"
    expected = slow_forward(client, WAIT, loras)
    with ThreadPoolExecutor() as threads:
        future = threads.submit(slow_forward, client, WAIT, loras)
        until(lambda: running(server), "the forward runs")
        server.kill()
        time.sleep(1)
        assert not future.done()
        server.start()
        assert torch.equal(future.result(60), expected)
    assert server.requests("lora.put") == {"ok": 1}
    assert server.requests("model.load") == {"ok": 1}
    server.stop()


def test_without_patience_a_lost_server_is_an_error_within_seconds(serve: Serve, connect: Connect) -> None:
    server = serve()
    client = connect(server.url)
    with ThreadPoolExecutor() as threads:
        future = threads.submit(slow_forward, client, ERROR)
        until(lambda: running(server), "the forward runs")
        server.kill()
        killed = time.monotonic()
        with pytest.raises(ServerAway, match=re.escape(server.url)):
            future.result(10)
        assert time.monotonic() - killed < 2


def test_another_server_takes_over_what_was_in_flight(serve: Serve, server: Server, connect: Connect) -> None:
    first = serve()
    client = connect(first.url, server.url)
    expected = slow_forward(client, ERROR)
    assert client.endpoint() == first.url
    with ThreadPoolExecutor() as threads:
        future = threads.submit(slow_forward, client, ERROR)
        until(lambda: running(first), "the forward runs")
        first.kill()
        assert torch.equal(future.result(60), expected)
    assert client.endpoint() == server.url
    assert connect(first.url, server.url).hello(ERROR) == client.hello(ERROR)


def test_a_server_that_shuts_down_answers_what_is_open_and_sends_the_rest_elsewhere(
    serve: Serve, server: Server, connect: Connect
) -> None:
    first = serve()
    client = connect(first.url, server.url)
    with ThreadPoolExecutor() as threads:
        open_one = threads.submit(slow_forward, client, ERROR)
        until(lambda: running(first), "the forward runs")
        stopping = threads.submit(first.stop)
        until(lambda: any("draining" in line for line in first.log), "the server drains")
        assert client.models(ERROR)[0]["name"] == MODEL
        assert client.endpoint() == server.url
        assert torch.equal(open_one.result(60), slow_forward(client, ERROR))
        assert stopping.result() == 0


def test_the_error_names_every_endpoint_and_why(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_S", 0.5)
    refused, unknown = dead_port(), "ws://no-such-host.invalid:8700/v1"
    with deaf_port() as deaf:
        started = time.monotonic()
        with pytest.raises(ServerAway) as caught:
            connect(refused, deaf, unknown).models(ERROR)
        assert time.monotonic() - started < 5
        reasons = caught.value.details["endpoints"]
    assert reasons[refused] == "Connection refused"
    assert reasons[deaf] == "no answer within 0.5 s"
    assert set(reasons) == {refused, deaf, unknown} and reasons[unknown]
    assert all(f"{url}: {reason}" in caught.value.message for url, reason in reasons.items())


def test_something_else_than_a_server_is_said_to_be_that(server: Server, connect: Connect) -> None:
    with pytest.raises(ServerAway, match=r"refused with 404: The WebSocket is at /v1, not at /v2"):
        connect(server.url.replace("/v1", "/v2")).models(ERROR)


def test_a_list_of_models_is_not_waited_for_longer_than_told(connect: Connect) -> None:
    with deaf_port() as deaf:
        for patience in (ERROR, WAIT):
            started = time.monotonic()
            with pytest.raises(ServerAway, match=r"no answer within 0\.3 s"):
                connect(deaf).models(patience, timeout_s=0.3)
            assert time.monotonic() - started < 0.5


def test_a_server_that_falls_silent_is_left(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_S", 0.5)
    monkeypatch.setattr(connection_module, "SILENCE_S", 1)
    server = serve()
    client = connect(server.url)
    client.hello(ERROR)
    server._process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(ServerAway, match="no answer within"):
            client.models(ERROR)
        assert time.monotonic() - started < 4
    finally:
        server._process.send_signal(signal.SIGCONT)
    assert client.models(ERROR)[0]["name"] == MODEL


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Server:
    return serve("--token", "open-sesame", "--queue-limit", "1", "--max-batch", "1")


@pytest.mark.parametrize(
    ("token", "found"), [(None, "none was sent"), ("open-barley", "the one sent is wrong")]
)
@pytest.mark.parametrize("patience", [ERROR, WAIT], ids=["error", "wait"])
def test_a_wrong_token_is_an_error_at_once_even_with_patience(
    guarded: Server, connect: Connect, token: str | None, found: str, patience: Patience
) -> None:
    with pytest.raises(AccessRefused, match=rf"{guarded.url}: refused with 401: .*{found}") as caught:
        connect(guarded.url, token=token).models(patience)
    assert caught.value.code == "ERR_UNAUTHORIZED"


def test_a_busy_server_is_asked_again(guarded: Server, connect: Connect, reference: Reference) -> None:
    clients = [connect(guarded.url, token="open-sesame") for _ in range(5)]
    case = reference.case("base")
    assert case.error_of(case.run(clients[0])) < 1e-4
    with ThreadPoolExecutor() as threads:
        outs = list(threads.map(case.run, clients * 2))
    assert all(case.error_of(out) < 1e-4 for out in outs)
    metrics = clients[0].stats(ERROR)
    assert metrics["forwards"]["completed"] == 11 and metrics["forwards"]["failed"] > 0


# Lost patience


def test_a_forward_is_cancelled_on_the_server_when_poll_raises(server: Server, client: Client) -> None:
    client.load(MODEL, "f32", ERROR)
    before = server.requests("forward").get("ERR_CANCELLED", 0)
    raised: list[float] = []

    def poll() -> None:
        if running(server):
            raised.append(time.monotonic())
            raise LostPatience

    with pytest.raises(LostPatience):
        slow_forward(client, Patience("wait", poll))
    assert time.monotonic() - raised[0] < 0.1
    until(lambda: server.requests("forward").get("ERR_CANCELLED", 0) > before, "it is cancelled", 5)
    took = time.monotonic() - raised[0]
    assert took < 0.2, f"cancelled after {took:.3f} s"
    # The client goes on with the same connection.
    assert client.models(ERROR)[0]["name"] == MODEL


@pytest.mark.parametrize("error", [LostPatience(), ServerAway("mine", {}), KeyboardInterrupt()])
def test_poll_ends_the_wait_for_a_server(connect: Connect, error: BaseException) -> None:
    calls: list[float] = []

    def poll() -> None:
        calls.append(time.monotonic())
        if len(calls) == 30:
            raise error

    with pytest.raises(type(error)) as caught:
        connect(dead_port()).models(Patience("wait", poll))
    assert caught.value is error
    assert max(b - a for a, b in itertools.pairwise(calls)) < 0.15
    assert len(calls) == 30


def test_what_poll_raises_is_never_taken_for_an_answer(server: Server, client: Client) -> None:
    client.hello(ERROR)
    mine = RemoteError("ERR_BUSY", "mine", {"retryAfterMs": 1})

    def poll() -> None:
        raise mine

    with pytest.raises(RemoteError) as caught:
        slow_forward(client, Patience("wait", poll))
    assert caught.value is mine
