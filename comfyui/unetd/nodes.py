"""The nodes: a MODEL whose UNet is on a server, from a checkpoint or a bare UNet, and the state of a server.

Everything between the loader and the sampler stays ComfyUI's; so do CLIP and VAE.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from . import skeleton
from .client import Client, Patience
from .errors import RemoteError, ServerAway
from .listing import Listing
from .patcher import RemoteModelPatcher
from .settings import FILE_NAME, Settings, SettingsError, read_settings

logger = logging.getLogger("unetd")

SERVER_INPUT = (
    "STRING",
    {
        "default": "",
        "tooltip": "Address of the server, like 192.168.1.20:8700; several, separated by commas, are tried "
        f"in order. Empty: the environment variable UNETD_URL, else {FILE_NAME} in ComfyUI's user folder, "
        "else this machine.",
    },
)
_listing = Listing()


def _settings(server: str) -> Settings:
    return read_settings(server, file=Path(folder_paths.get_user_directory()) / FILE_NAME)


def _poll() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


class _Loader:
    """What both loaders have in common. `FOLDER`: ComfyUI's name for its own folders of such files."""

    FOLDER: str
    AS_CHECKPOINT: bool

    CATEGORY = "unetd"
    FUNCTION = "load"
    RETURN_TYPES: tuple[str, ...] = ("MODEL",)
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("Use it like any model. Its UNet stays on the server.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": (_model_names(), {"tooltip": "A file in the server's model folders."})},
            "optional": {
                "server": SERVER_INPUT,
                "when_away": (
                    ["error", "wait", "local"],
                    {
                        "default": "error",
                        "tooltip": "While no server can be reached: stop with an error, wait for one, or "
                        "load the file of the same name from ComfyUI's own folders. A server that is lost "
                        "later is waited for with wait only.",
                    },
                ),
                "dtype": (
                    ["auto", "f32", "f16", "q8_0"],
                    {
                        "default": "auto",
                        "tooltip": "How the server stores weights and activations; sums are always f32. "
                        "q8_0 is f16 with 8-bit weights, in little more than half the memory.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str | None, server: str | None = "") -> bool | str:
        """Takes the place of ComfyUI's check against the dropdown, which only knows the default server."""
        if model is None or server is None:
            return True
        try:
            settings = _settings(server)
        except SettingsError as error:
            return str(error)
        if not model.endswith(".safetensors") and not model.startswith("sha256:"):
            return f'"{model}" is no name of a model; choose one of the list (reload the page to renew it).'
        known = _listing.of(settings)
        if model.startswith("sha256:") or model in known.models or known.problem is not None:
            return True
        known = _listing.of(settings, fresh=True)
        if model in known.models or known.problem is not None:
            return True
        return f'The server has no model "{model}". It has: {", ".join(known.models) or "none"}.'

    @classmethod
    def IS_CHANGED(cls, model: str, server: str = "", **_: Any) -> str:
        """Changes with the file: another of that name runs the workflow again, an absent server does not."""
        entry = _listing.of(_settings(server or "")).models.get(model, {})
        return f"{entry.get('version', '')}:{entry.get('sizeBytes', '')}"

    def load(
        self, model: str, server: str = "", when_away: str = "error", dtype: str = "auto"
    ) -> tuple[Any, ...]:
        settings = _settings(server)
        client = Client.shared(settings.urls, settings.token)
        away: Literal["error", "wait"] = "wait" if when_away == "wait" else "error"
        remote = skeleton.Remote(client, model, Patience(away, _poll))
        try:
            return (self._load_remote(remote, dtype), *self._beside(model))
        except ServerAway as error:
            if when_away != "local":
                raise
            return self._load_locally(model, dtype, error)

    def _load_remote(self, remote: skeleton.Remote, dtype: str) -> RemoteModelPatcher:
        client, model, patience = remote.client, remote.model, remote.patience
        header = client.header(model, [], patience)
        recognised = skeleton.recognise(model, header.tensors, self.AS_CHECKPOINT)
        probes = list(recognised.probes.values())
        values = client.header(model, probes, patience).values if probes else {}
        loaded = client.load(model, dtype, patience, _progress())
        wire = skeleton.WIRE_DTYPES[loaded["dtype"]]
        logger.info('"%s" (%s) is used from %s', model, loaded["dtype"], client.endpoint())
        return RemoteModelPatcher(
            skeleton.build(recognised, values, wire, remote),
            comfy.model_management.get_torch_device(),
            comfy.model_management.unet_offload_device(),
        )

    def _load_locally(self, model: str, dtype: str, away: ServerAway) -> tuple[Any, ...]:
        path = folder_paths.get_full_path(self.FOLDER, model)
        if path is None:
            folders = ", ".join(folder_paths.get_folder_paths(self.FOLDER))
            raise FileNotFoundError(
                f'{away.message} And there is no local "{model}" either, in {folders}. '
                "Start the server, or put the file there."
            )
        logger.warning('%s "%s" is loaded locally, from %s', away.message, model, path)
        options = {} if dtype == "auto" else {"dtype": skeleton.WIRE_DTYPES[dtype]}
        return self._local(path, options)

    def _local(self, path: str, options: dict[str, torch.dtype]) -> tuple[Any, ...]:
        """All outputs by ComfyUI's own loader."""
        raise NotImplementedError

    def _beside(self, model: str) -> tuple[Any, ...]:
        """The outputs after MODEL, which are ComfyUI's own."""
        return ()


class UnetdLoadCheckpoint(_Loader):
    """As "Load Checkpoint": MODEL from a server, CLIP and VAE from ComfyUI's own copy of the file."""

    DESCRIPTION = (
        "A checkpoint whose UNet is run by an unetd server. CLIP and VAE are read from the file of the same "
        'name in ComfyUI\'s own checkpoints folder; where there is none, use "Load CLIP" and "Load VAE".'
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        *_Loader.OUTPUT_TOOLTIPS,
        "From the local file of the same name; nothing without it.",
        "From the local file of the same name; nothing without it.",
    )
    FOLDER = "checkpoints"
    AS_CHECKPOINT = True

    def _local(self, path: str, options: dict[str, torch.dtype]) -> tuple[Any, ...]:
        return _checkpoint(path, model_options=options)

    def _beside(self, model: str) -> tuple[Any, ...]:
        path = folder_paths.get_full_path(self.FOLDER, model)
        if path is not None:
            return _checkpoint(path, output_model=False)[1:]
        logger.info(
            'ComfyUI\'s own checkpoints folder has no "%s", so this loader gives no CLIP and VAE; '
            'use "Load CLIP" and "Load VAE"',
            model,
        )
        return (None, None)


class UnetdLoadDiffusionModel(_Loader):
    """As "Load Diffusion Model", from a server."""

    DESCRIPTION = "A UNet without CLIP and VAE, in LDM or diffusers layout, run by an unetd server."
    FOLDER = "diffusion_models"
    AS_CHECKPOINT = False

    def _local(self, path: str, options: dict[str, torch.dtype]) -> tuple[Any, ...]:
        return (comfy.sd.load_diffusion_model(path, model_options=options),)


class UnetdServerStatus:
    """What a server is doing, as text: shown on the node, and as an output."""

    CATEGORY = "unetd"
    DESCRIPTION = "Device, models, memory and queue of an unetd server."
    FUNCTION = "status"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": {"server": SERVER_INPUT}, "hidden": {"node_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        # Never equal to itself: asked again in every run.
        return float("nan")

    def status(self, server: str = "", node_id: str | None = None) -> dict[str, Any]:
        text = _status(_settings(server))
        comfyui = sys.modules.get("server")
        if comfyui is not None and node_id is not None:
            instance = comfyui.PromptServer.instance
            instance.send_progress_text(text, node_id, instance.client_id)
        return {"ui": {"text": [text]}, "result": (text,)}


def _checkpoint(path: str, **options: Any) -> tuple[Any, ...]:
    """MODEL, CLIP and VAE of a checkpoint, as "Load Checkpoint" reads them; None where not asked for."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    parts = comfy.sd.load_checkpoint_guess_config(path, embedding_directory=embeddings, **options)
    return tuple(parts[:3])


def _model_names() -> list[str]:
    """The dropdown: what the default servers hold, or the reason why that is not known."""
    try:
        known = _listing.of(_settings(""))
    except SettingsError as error:
        return [f"({error})"]
    return sorted(known.models) or [f"({known.problem or 'the server has no models'})"]


def _progress() -> Callable[[str, int, int], None]:
    bar = comfy.utils.ProgressBar(1)

    def show(_stage: str, done: int, total: int) -> None:
        bar.update_absolute(done, max(total, 1))

    return show


def _status(settings: Settings) -> str:
    client = Client.shared(settings.urls, settings.token)
    patience = Patience("error", _poll)
    try:
        hello, stats = client.hello(patience), client.stats(patience)
    except RemoteError as error:
        return error.message
    engine, queue, memory = stats["engine"], stats["queue"], stats["engine"]["memory"]
    used = memory["weightBytes"] + memory["adapterBytes"] + memory["arenaBytes"]
    models = [
        f"  {model['model']}: {model['dtype']}, {_mib(model['sizeBytes'])}, {len(model['adapters'])} LoRAs"
        for model in engine["models"]
    ]
    return "\n".join(
        [
            f"{client.endpoint()} ({hello['server']})",
            f"device: {hello['device']['name']} ({hello['device']['backend']})",
            f"memory: {_mib(used)} of {_mib(memory['budgetBytes'])}",
            f"queue: {queue['requests']} waiting, {queue['running']} running, at most {queue['limit']}",
            f"models: {len(models) or 'none'}",
            *models,
        ]
    )


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


NODE_CLASS_MAPPINGS = {
    "UnetdLoadCheckpoint": UnetdLoadCheckpoint,
    "UnetdLoadDiffusionModel": UnetdLoadDiffusionModel,
    "UnetdServerStatus": UnetdServerStatus,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "UnetdLoadCheckpoint": "Load Checkpoint (unetd UNet)",
    "UnetdLoadDiffusionModel": "Load Diffusion Model (unetd UNet)",
    "UnetdServerStatus": "unetd Server Status",
}
