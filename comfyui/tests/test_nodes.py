"""The nodes on the real ComfyUI with the real server and engine: lists, loading, latents, absence."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import real_comfyui  # noqa: F401  # isort: skip
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from conftest import Server
from lora_setting import KINDS, file_of, lora_file, with_lora
from patcher_setting import sampled
from safetensors.torch import save_file
from torch_server import SD1, local_model, names_and_shapes, random_weights

from unetd import nodes
from unetd.errors import ServerAway
from unetd.listing import TIMEOUT_S, Listing
from unetd.nodes import UnetdLoadCheckpoint, UnetdLoadDiffusionModel, UnetdServerStatus
from unetd.patcher import RemoteModelPatcher

MODEL = "tiny.safetensors"
#: Nothing listens on the port for "discard".
NOWHERE = "127.0.0.1:9"


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nodes, "_listing", Listing())
    monkeypatch.delenv("UNETD_URL", raising=False)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(names_and_shapes(SD1))


@pytest.fixture(scope="module")
def far(
    serve: Callable[..., Server], weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """A server with the model as a checkpoint, and as a bare UNet."""
    folder = tmp_path_factory.mktemp("models")
    save_file(weights, folder / MODEL)
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in weights.items()}
    save_file(bare, folder / "bare.safetensors")
    return serve(models=folder)


def test_the_dropdown_lists_the_servers_models_and_asks_once(
    far: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNETD_URL", far.url)
    asked = sum(far.requests("models.list").values())
    for loader in (UnetdLoadCheckpoint, UnetdLoadDiffusionModel) * 3:
        assert loader.INPUT_TYPES()["required"]["model"][0] == ["bare.safetensors", MODEL]
    assert sum(far.requests("models.list").values()) == asked + 1


def test_an_absent_server_costs_comfyui_at_most_a_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("UNETD_URL", address)
        begin = time.monotonic()
        (reason,) = UnetdLoadCheckpoint.INPUT_TYPES()["required"]["model"][0]
        assert TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + 0.5
        assert address in reason
        begin = time.monotonic()
        for _ in range(20):
            UnetdLoadCheckpoint.INPUT_TYPES()
            assert UnetdLoadCheckpoint.VALIDATE_INPUTS("any.safetensors", "") is True
        assert time.monotonic() - begin < 0.5
        assert "choose one" in str(UnetdLoadCheckpoint.VALIDATE_INPUTS(reason, ""))


def test_settings_that_make_no_sense_are_told_in_the_dropdown_and_on_validation(tmp_path: Path) -> None:
    assert "gpu box" in str(UnetdLoadCheckpoint.VALIDATE_INPUTS(MODEL, "gpu box"))
    (tmp_path / "unetd.json").write_text("{")
    (reason,) = UnetdLoadCheckpoint.INPUT_TYPES()["required"]["model"][0]
    assert "unetd.json" in reason


def test_validation_knows_the_models_of_the_server_that_the_node_names(far: Server) -> None:
    assert UnetdLoadCheckpoint.VALIDATE_INPUTS(MODEL, far.url) is True
    assert UnetdLoadCheckpoint.VALIDATE_INPUTS(None, far.url) is True
    assert UnetdLoadCheckpoint.VALIDATE_INPUTS(MODEL, None) is True
    refusal = UnetdLoadCheckpoint.VALIDATE_INPUTS("other.safetensors", far.url)
    assert f'no model "other.safetensors". It has: bare.safetensors, {MODEL}' in str(refusal)
    known = UnetdLoadCheckpoint.IS_CHANGED(MODEL, far.url)
    assert known == UnetdLoadCheckpoint.IS_CHANGED(MODEL, far.url, when_away="wait", dtype="f32")
    assert known != UnetdLoadCheckpoint.IS_CHANGED("other.safetensors", far.url)


@pytest.mark.parametrize(
    ("loader", "model"), [(UnetdLoadCheckpoint, MODEL), (UnetdLoadDiffusionModel, "bare.safetensors")]
)
def test_latents_of_the_server_are_those_of_the_local_model_with_and_without_a_lora(
    far: Server, weights: dict[str, torch.Tensor], loader: Any, model: str
) -> None:
    remote, *_ = loader().load(model, far.url)
    local = local_model(weights)
    base = sampled(local)
    for strength in (0.0, 0.8, -0.5):
        expected = sampled(with_lora(local, lora_file(), strength))
        out = sampled(with_lora(remote, lora_file(), strength))
        assert float((out - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        assert torch.equal(expected, base) == (strength == 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_applied_by_the_server_as_by_comfyui(
    far: Server, weights: dict[str, torch.Tensor], kind: str
) -> None:
    remote, *_ = UnetdLoadCheckpoint().load(MODEL, far.url, dtype="f32")
    local = local_model(weights)
    for strength in (1.0, -0.6):
        expected = sampled(with_lora(local, file_of(kind), strength), steps=1)
        out = sampled(with_lora(remote, file_of(kind), strength), steps=1)
        assert float((out - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_loading_shows_progress_and_is_interrupted_by_the_user(far: Server) -> None:
    shown: list[tuple[int, int]] = []

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        shown.append((value, total))

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        UnetdLoadCheckpoint().load(MODEL, far.url, dtype="f16")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert shown and all(0 <= value <= total for value, total in shown)
    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            UnetdLoadCheckpoint().load(MODEL, NOWHERE, when_away="wait")
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_f16_on_the_server_makes_requests_f16(far: Server, weights: dict[str, torch.Tensor]) -> None:
    remote, *_ = UnetdLoadCheckpoint().load(MODEL, far.url, dtype="f16")
    assert remote.model_dtype() == torch.float16
    expected = sampled(local_model(weights))
    assert float((sampled(remote) - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


@pytest.fixture
def own_folder(weights: dict[str, torch.Tensor], tmp_path: Path) -> Iterator[Path]:
    """Where ComfyUI itself finds the model."""
    held = {name: entry for name, entry in folder_paths.folder_names_and_paths.items()}
    save_file(weights, tmp_path / MODEL)
    for name in ("checkpoints", "diffusion_models"):
        folder_paths.folder_names_and_paths[name] = ([str(tmp_path)], {".safetensors"})
    yield tmp_path
    folder_paths.folder_names_and_paths.update(held)


def test_local_is_chosen_only_where_asked_for_and_said_aloud(
    own_folder: Path, weights: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    for loader in (UnetdLoadCheckpoint, UnetdLoadDiffusionModel):
        with pytest.raises(ServerAway, match=NOWHERE):
            loader().load(MODEL, NOWHERE)
        caplog.clear()
        model, *_ = loader().load(MODEL, NOWHERE, when_away="local")
        assert not isinstance(model, RemoteModelPatcher)
        assert f'"{MODEL}" is loaded locally, from {own_folder / MODEL}' in caplog.text
        assert torch.equal(sampled(model), sampled(local_model(weights)))
        with pytest.raises(
            FileNotFoundError, match=rf"(?s){NOWHERE}.*no local \"other.safetensors\".*{own_folder}"
        ):
            loader().load("other.safetensors", NOWHERE, when_away="local")


def test_a_server_lost_while_sampling_is_an_error_even_with_local(
    serve: Callable[..., Server], far: Server
) -> None:
    lost = serve(models=far._models)
    remote, *_ = UnetdLoadCheckpoint().load(MODEL, lost.url, when_away="local")
    lost.kill()
    with pytest.raises(ServerAway):
        sampled(remote)


def test_the_status_tells_the_device_and_the_models_or_that_the_server_is_away(far: Server) -> None:
    UnetdLoadCheckpoint().load(MODEL, far.url, dtype="f32")
    answer = UnetdServerStatus().status(far.url)
    (text,) = answer["result"]
    assert answer["ui"] == {"text": [text]}
    for part in ("device:", "memory:", "queue: 0 waiting", f"{MODEL}: f32"):
        assert part in text
    assert "No server can be reached" in UnetdServerStatus().status(NOWHERE)["result"][0]
    changed = UnetdServerStatus.IS_CHANGED(server=far.url)
    assert changed != changed
