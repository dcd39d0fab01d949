"""The client against the real server: numbers, answers, threads and processes, engines that fail, cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from client_setting import (
    Connect,
    Serve,
    dead_port,
)
from conftest import ERROR, MODEL, ROOT, WAIT, Reference, Server
from safetensors.torch import save_file

from unetd.client import Client
from unetd.errors import RemoteError, RequestFailed

# Numbers


@pytest.mark.parametrize("name", ["base", "odd", "control", "lora/peft", "lora/stack"])
def test_forwards_give_the_reference_output(client: Client, reference: Reference, name: str) -> None:
    case = reference.case(name)
    assert case.error_of(case.run(client)) < 1e-4


def test_a_forward_of_half_precision_answers_in_half_precision(client: Client, reference: Reference) -> None:
    case = reference.case("base")
    out, timing = client.forward(
        MODEL, [], case.x.half(), case.timesteps.to(torch.int64), case.context.half(), None, None, ERROR
    )
    assert out.dtype is torch.float16
    assert case.error_of(out) < 2e-3
    assert timing["batch"] == 1 and timing["batchedRequests"] == 1
    assert timing["gpuMs"] > 0 and timing["queueMs"] >= 0


def test_control_lists_keep_their_length_where_they_end_in_none(client: Client, reference: Reference) -> None:
    case = reference.case("control")
    assert case.control is not None
    shorter = replace(case.control, output=[*case.control.output[1:]])
    longer = replace(case.control, output=[None, *case.control.output[1:]])
    # The last entry belongs to block 0: a list that lost its first entry is the one with None there.
    one = replace(case, control=shorter).run(client)
    other = replace(case, control=longer).run(client)
    assert torch.equal(one, other)
    shifted = replace(case, control=replace(case.control, middle=[*case.control.middle, None]))
    with pytest.raises(RequestFailed, match="middle") as caught:
        shifted.run(client)
    assert caught.value.code == "ERR_UNEXPECTED_TENSOR"


# What a server tells


def test_the_server_introduces_itself(server: Server, client: Client) -> None:
    assert client.endpoint() is None
    hello = client.hello(ERROR)
    assert client.endpoint() == server.url
    assert hello["protocol"] == 1 and hello["limits"]["maxInFlight"] >= 1
    assert client.stats(ERROR)["server"] == hello["server"]


def test_the_models_of_its_folders_and_their_headers(client: Client, reference: Reference) -> None:
    client.load(MODEL, "f32", ERROR)
    (model,) = client.models(ERROR)
    assert model["name"] == MODEL and model["loaded"] and model["config"]["contextDim"] == 48
    name = "model.diffusion_model.out.2.bias"
    header = client.header(MODEL, [name], ERROR)
    weights = reference.weights()
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    assert header.tensors[name].dtype == "F32"
    assert list(header.values) == [name] and torch.equal(header.values[name], weights[name])


def test_loading_reports_progress_to_the_thread_that_asks(serve: Serve, connect: Connect) -> None:
    client = connect(serve().url)
    seen: list[tuple[str, int, int]] = []
    threads = set()

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        threads.add(threading.current_thread())

    result = client.load(MODEL, "f16", ERROR, progress)
    assert result["dtype"] == "f16" and result["config"]["contextDim"] == 48
    assert (
        seen
        and seen[-1][1] == seen[-1][2]
        and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    )
    assert threads == {threading.current_thread()}


def test_errors_of_the_server_arrive_with_code_message_and_details(
    client: Client, reference: Reference
) -> None:
    with pytest.raises(RequestFailed, match=r"nowhere\.safetensors") as caught:
        client.load("nowhere.safetensors", "auto", ERROR)
    assert caught.value.code == "ERR_UNKNOWN_MODEL" and "(ERR_UNKNOWN_MODEL)" in str(caught.value)
    case = reference.case("base")
    with pytest.raises(RequestFailed) as caught:
        replace(case, context=case.context[:, :, :40]).run(client)
    assert caught.value.code == "ERR_BAD_SHAPE" and caught.value.details
    with pytest.raises(RemoteError, match="finite") as refused:
        replace(case, loras=[(reference.lora("peft"), float("nan"))]).run(client)
    assert refused.value.code == "ERR_BAD_STRENGTH"
    assert case.error_of(case.run(client)) < 1e-4


def test_a_request_that_no_server_would_take_is_refused_before_it_is_sent(client: Client) -> None:
    client.hello(ERROR)
    x = torch.zeros(1, 1, 1, 1).expand(1, 4, 4096, 4097)
    with pytest.raises(RemoteError, match="accepts 268435456") as caught:
        client.forward(MODEL, [], x, torch.zeros(1), torch.zeros(1, 1, 48), None, None, ERROR)
    assert caught.value.code == "ERR_TOO_LARGE"


# Threads and processes


def test_three_threads_at_once_get_their_own_results(client: Client, reference: Reference) -> None:
    cases = [reference.case(name) for name in ("base", "lora/peft", "odd")]
    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            outs = list(threads.map(lambda case: case.run(client), cases))
            assert all(case.error_of(out) < 1e-4 for case, out in zip(cases, outs, strict=True))


def test_one_client_is_shared_by_all_that_name_the_same_servers(server: Server) -> None:
    one = Client.shared([server.url], None)
    assert Client.shared((server.url,), None) is one
    assert Client.shared([server.url], "token") is not one
    assert Client.shared([server.url, dead_port()], None) is not one


SCRIPT = """
import os, sys, threading, time
from unetd.client import Client, Patience
client = Client.shared([sys.argv[1]], None)
assert client.models(Patience("error"))
if sys.argv[2] == "fork":
    child = os.fork()
    assert client.models(Patience("error"))
    if child:
        assert os.waitpid(child, 0)[1] == 0
elif sys.argv[2] == "busy":
    import torch
    x, context = torch.zeros(1, 4, 48, 48), torch.zeros(1, 13, 48)
    ask = lambda: client.forward(sys.argv[3], [], x, torch.zeros(1), context, None, None, Patience("wait"))
    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.2)
"""


@pytest.mark.parametrize(
    "how",
    [
        "idle",
        "busy",
        pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")),
    ],
)
def test_a_process_ends_quietly_and_at_once(server: Server, how: str) -> None:
    command = [
        sys.executable,
        "-W",
        "error::ResourceWarning",
        "-X",
        "dev",
        "-c",
        SCRIPT,
        server.url,
        how,
        MODEL,
    ]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT / "comfyui")},
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# Engines that fail, and what a forward costs beside its computation


def no_gpu_server(serve: Serve, folder: Path, engine: str, adm_channels: int | None = None) -> Server:
    """A server whose engine is one of test/server, with a model of 4 channels and the context of SD 1.5."""
    config: dict[str, Any] = {
        **{"inChannels": 4, "outChannels": 4, "modelChannels": 8, "timeEmbedDim": 32, "contextDim": 768},
        **{"admChannels": adm_channels, "input": [], "middle": [], "output": []},
    }
    save_file({"w": torch.zeros(1)}, folder / MODEL, {"config": json.dumps(config)})
    return serve("--engine-module", (ROOT / "test" / "server" / engine).as_uri(), models=folder)


def test_a_request_that_ends_the_engine_each_time_is_an_error_in_the_end(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    server = no_gpu_server(serve, tmp_path, "stand-in-engine.ts")
    client = connect(server.url)
    # The stand-in engine kills itself at this number.
    context = torch.full((1, 1, 768), 6661.0)
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(RequestFailed, match="ended 2 times") as caught:
        client.forward(MODEL, [], x, torch.zeros(1), context, None, None, WAIT)
    assert caught.value.code == "ERR_ENGINE_DOWN"
    assert server.requests("forward") == {"ERR_ENGINE_DOWN": 2}
    out, _ = client.forward(MODEL, [], x + 1, torch.zeros(1), context * 0, None, None, WAIT)
    assert torch.equal(out, x + 1)


def test_a_vector_conditioning_is_sent_once_too(
    serve: Serve, connect: Connect, tmp_path: Path, sent: list[Any]
) -> None:
    client = connect(no_gpu_server(serve, tmp_path, "no-op-engine.ts", adm_channels=96).url)
    x, y = torch.ones(1, 4, 2, 2), torch.ones(1, 96)

    def ask(y: torch.Tensor | None) -> torch.Tensor:
        return client.forward(MODEL, [], x, torch.zeros(1), torch.zeros(1, 3, 768), y, None, ERROR)[0]

    with pytest.raises(RequestFailed, match='"y"'):
        ask(None)
    for _ in range(2):
        assert torch.equal(ask(y), x)
    assert [names for op, _, names in sent if op == "forward"] == [
        ["context", "timesteps", "x"],
        ["timesteps", "x", "y"],
        ["timesteps", "x"],
    ]
    with pytest.raises(RequestFailed) as caught:
        ask(torch.ones(1, 95))
    assert caught.value.code == "ERR_BAD_SHAPE"


def test_a_hundred_threads_stay_within_the_window(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    server = no_gpu_server(serve, tmp_path, "no-op-engine.ts")
    client = connect(server.url)
    steps = [torch.randn(2, 4, 64, 64) for _ in range(100)]
    context = torch.randn(2, 77, 768)
    times = torch.tensor([500.0, 500.0])

    def step(x: torch.Tensor) -> torch.Tensor:
        return client.forward(MODEL, [], x, times, context, None, None, ERROR)[0]

    with ThreadPoolExecutor(100) as threads:
        assert all(torch.equal(x, out) for x, out in zip(steps, threads.map(step, steps), strict=True))
    assert server.requests("forward") == {"ok": 100}
