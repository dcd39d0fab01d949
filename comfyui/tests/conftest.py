"""The real server with the real engine, started through its command line, and a small SD 1.5-shaped model.

The model's numbers come from the generator of test/reference/weights.py, its reference outputs from
test/fixtures/sd1.safetensors. Nothing here stands in for a server or a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unetd.client import Client, Control, Lora, Patience
from unetd.connection import Connection
from unetd.frames import digest

ROOT = Path(__file__).parents[2]
MODEL = "sd1.safetensors"
START_S = 60
ERROR = Patience("error")
WAIT = Patience("wait")

_spec = importlib.util.spec_from_file_location("weights", ROOT / "test" / "reference" / "weights.py")
assert _spec is not None and _spec.loader is not None
_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_weights)


def generate(name: str, shape: list[int]) -> torch.Tensor:
    """A tensor of the reference, made from its name."""
    return torch.from_numpy(_weights.generate(name, tuple(shape)))


@dataclass(frozen=True)
class Case:
    """A stored forward of the reference: its inputs, and the output that PyTorch gave."""

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    control: Control | None
    loras: list[tuple[Lora, float]]
    expected: torch.Tensor

    def run(self, client: Client, patience: Patience = ERROR) -> torch.Tensor:
        out, _ = client.forward(
            MODEL, self.loras, self.x, self.timesteps, self.context, None, self.control, patience
        )
        return out

    def error_of(self, out: torch.Tensor) -> float:
        """Largest difference, in units of the expected output's largest value."""
        return float((out.float() - self.expected).abs().max() / self.expected.abs().max())


class Reference:
    """test/fixtures/sd1.safetensors."""

    def __init__(self) -> None:
        self._file = safe_open(ROOT / "test" / "fixtures" / "sd1.safetensors", "pt")
        self.fixture: dict[str, Any] = json.loads(self._file.metadata()["fixture"])  # type: ignore[no-untyped-call]

    def weights(self) -> dict[str, torch.Tensor]:
        """Under the names of a full checkpoint."""
        shapes = self.fixture["tensors"].items()
        return {f"model.diffusion_model.{name}": generate(name, shape) for name, shape in shapes}

    def lora(self, file: str) -> Lora:
        """A LoRA file of the fixture, as in test/fixtures/fixture.ts."""
        stated = self.fixture["loras"][file]
        suffixes = stated["suffixes"]
        tensors: dict[str, torch.Tensor] = {}
        for layer, prefix, rank, alpha, mid in stated["modules"]:
            outputs, inputs, *kernel = self.fixture["tensors"][f"{layer}.weight"]
            ones = [1] * len(kernel)
            shapes = {"down": [rank, inputs, *(ones if mid else kernel)], "up": [outputs, rank, *ones]}
            if mid:
                shapes["mid"] = [rank, rank, *kernel]
            for role, shape in shapes.items():
                key = prefix + suffixes[role]
                tensors[key] = generate(f"#{file}/{key}", shape)
            if alpha is not None:
                tensors[prefix + suffixes["alpha"]] = torch.tensor(float(alpha))
        return Lora(digest(tensors), lambda: tensors, file)

    def case(self, name: str) -> Case:
        stated = next(case for case in self.fixture["cases"] if case["name"] == name)
        inputs = {key: generate(of["name"], of["shape"]) for key, of in stated["inputs"].items()}
        lists = stated["control"]
        residuals = lists and {
            key: [entry and generate(entry["name"], entry["shape"]) for entry in entries]
            for key, entries in lists.items()
        }
        stack = stated["adapters"][0] if stated["adapters"] else []
        return Case(
            inputs["x"],
            torch.tensor(stated["timesteps"]),
            inputs["context"],
            Control(**residuals) if residuals else None,
            [(self.lora(file), strength) for file, strength in stack],
            self._file.get_tensor(stated["output"]),  # type: ignore[no-untyped-call]
        )


class Server:
    """One `unetd serve`. `start` after `kill` listens on the same port again."""

    def __init__(self, models: Path, *options: str) -> None:
        self._models = models
        self._command = ["serve", "--models", str(models), "--dtype", "f32", *options]
        self._port = 0
        self.log: list[str] = []
        self.start()

    def start(self) -> None:
        # A killed server leaves its uploads behind: they go where pytest cleans up.
        environment = {**os.environ, "TMPDIR": str(self._models.parent)}
        environment.pop("UNETD_TOKEN", None)
        self.url = ""
        node = shutil.which("node")
        assert node is not None, "the tests need Node.js and the packages of package.json (npm ci)"
        # Node itself and not the tsx command, which would survive in a process of its own.
        self._process = subprocess.Popen(
            [node, "--import", "tsx", "src/cli.ts", *self._command, "--port", str(self._port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        listening = threading.Event()
        threading.Thread(target=self._read, args=(listening,), daemon=True).start()
        listening.wait(START_S)
        assert self.url, f"the server did not start:\n{''.join(self.log)}"
        self._port = int(self.url.split(":")[2].split("/")[0])

    def kill(self) -> None:
        """As a crash or a power cut does it."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, where it still runs; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def requests(self, op: str) -> dict[str, int]:
        """Result -> how many requests of that operation were answered so."""
        with urllib.request.urlopen(self.url.replace("ws:", "http:").replace("/v1", "/metrics")) as page:
            text = page.read().decode()
        lines = re.findall(r'^unetd_requests_total\{op="(.+?)",result="(.+?)"\} (\d+)', text, re.MULTILINE)
        return {result: int(count) for of, result, count in lines if of == op}

    def _read(self, listening: threading.Event) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line)
            if match := re.search(r"listening on (ws:\S+)", line):
                self.url = match[1]
                listening.set()
        listening.set()


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="session")
def models(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model."""
    folder = tmp_path_factory.mktemp("models")
    save_file(reference.weights(), folder / MODEL)
    return folder


@pytest.fixture(scope="session")
def serve(models: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends those that still run."""
    servers: list[Server] = []

    def start(*options: str, models: Path = models) -> Server:
        servers.append(Server(models, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(serve: Callable[..., Server]) -> Server:
    """The server of all tests that leave it running."""
    return serve()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """Opens clients of their own, with connections of their own, and closes them."""
    clients: list[Client] = []

    def start(*urls: str, token: str | None = None) -> Client:
        clients.append(Client(urls, token))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(server: Server, connect: Callable[..., Client]) -> Client:
    return connect(server.url)


if sys.platform == "linux":
    # Mesa's software adapter where there is no GPU, as for the other tests of the project.
    _software = Path("/usr/share/vulkan/icd.d/lvp_icd.json")
    if _software.exists():
        os.environ.setdefault("VK_DRIVER_FILES", str(_software))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """As ComfyUI runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Every request that goes out: operation, fields, names of its tensors."""
    requests: list[tuple[str, dict[str, Any], list[str]]] = []
    real = Connection.request

    def record(
        self: Connection, op: str, fields: Any, tensors: Any = None, progress: Any = None
    ) -> Future[Any]:
        requests.append((op, dict(fields), sorted(tensors or {})))
        return real(self, op, fields, tensors, progress)

    monkeypatch.setattr(Connection, "request", record)
    return requests


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    # It needs ComfyUI, which only some tests do.
    import torch_server

    return torch_server.random_weights(torch_server.names_and_shapes(torch_server.SD1))


@pytest.fixture(scope="module")
def local(weights: dict[str, torch.Tensor]) -> Any:
    """ComfyUI's own patcher of the model."""
    import torch_server

    return torch_server.local_model(weights)


@pytest.fixture()
def torch_server(weights: dict[str, torch.Tensor]) -> Any:
    from torch_server import TorchServer

    return TorchServer(weights)


@pytest.fixture()
def remote(torch_server: Any) -> Any:
    """The same model as the node loads it from that server."""
    from patcher_setting import loaded

    return loaded(torch_server)
