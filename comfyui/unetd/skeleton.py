"""A stock BaseModel of ComfyUI around a UNet that is not there, from the names and shapes of a model file.

What ComfyUI decides by the class and configuration of a model (sampling, latent format, vector conditioning,
inpainting) is left to its own detection. Only `diffusion_model` is ours: it has no parameters, its forward is
a request. Which adapters go with the request is the patcher's business (patcher.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from . import frames
from .client import Client, Control, Patience, TensorInfo
from .refusals import WAY_OUT, CannotRunRemotely, refuse

WIRE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.float16}

#: Tensors whose values, not only shapes, decide how ComfyUI samples: of the whole file, and of the UNet.
_PROBED = ("edm_vpred.sigma_max", "edm_vpred.sigma_min")
_PROBED_IN_UNET = ("output_blocks.11.1.transformer_blocks.0.norm1.bias",)


@dataclass(frozen=True)
class Remote:
    """Where the UNet is, and how to wait for it."""

    client: Client
    model: str
    patience: Patience


@dataclass(frozen=True)
class Recognised:
    """What ComfyUI's detection says about a model file.

    `tensors`: name in ComfyUI's layout -> meta tensor; those of the UNet begin with `prefix`. `probes`: names
    of those whose value is needed -> their names in the file.
    """

    config: Any
    tensors: dict[str, torch.Tensor]
    prefix: str
    probes: dict[str, str]


def recognise(model: str, header: Mapping[str, TensorInfo], as_checkpoint: bool) -> Recognised:
    """Detects the model as "Load Checkpoint" does (`as_checkpoint`), or as "Load Diffusion Model" does.

    Raises CannotRunRemotely for a file in which ComfyUI finds no UNet, or one that needs more than a UNet.
    """
    tensors = {
        name: torch.empty(info.shape, dtype=frames.DTYPES.get(info.dtype, torch.float32), device="meta")
        for name, info in header.items()
    }
    names = {id(tensor): name for name, tensor in tensors.items()}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    config = comfy.model_detection.model_config_from_unet(tensors, prefix) if as_checkpoint else None
    if config is None:
        config, tensors = _recognise_bare(tensors, prefix)
        prefix = ""
    _check_family(model, config)
    probed = [*_PROBED, *(prefix + name for name in _PROBED_IN_UNET)]
    return Recognised(
        config, tensors, prefix, {key: names[id(tensors[key])] for key in probed if key in tensors}
    )


def build(
    recognised: Recognised, values: Mapping[str, torch.Tensor], dtype: torch.dtype, remote: Remote
) -> Any:
    """The BaseModel. `values`: name in the file -> value, of the probes; `dtype`: what the server stores."""
    config, prefix = recognised.config, recognised.prefix
    # No cast beside the server's own: what arrives there is in `dtype`.
    config.set_inference_dtype(dtype, None)
    config.unet_config["disable_unet_model_creation"] = True
    probed = {key: values[name] for key, name in recognised.probes.items()}
    model = config.get_model({**recognised.tensors, **probed}, prefix)
    # ComfyUI's estimate becomes 0: cond and uncond are always one batch, and nothing is unloaded for it.
    model.memory_usage_factor = 0.0
    unet = {
        key[len(prefix) :]: tensor for key, tensor in recognised.tensors.items() if key.startswith(prefix)
    }
    shapes = {key: tensor.shape for key, tensor in config.process_unet_state_dict(unet).items()}
    model.diffusion_model = RemoteUNet(remote, shapes, dtype, model)
    return model.eval()


def _recognise_bare(tensors: dict[str, torch.Tensor], prefix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """From a UNet alone, or the UNet of a checkpoint, in LDM or diffusers layout: tensors in LDM layout."""
    bare = comfy.utils.state_dict_prefix_replace(tensors, {prefix: ""}, filter_keys=True) or tensors
    config = comfy.model_detection.model_config_from_unet(bare, "")
    if config is None and "conv_in.weight" in bare:
        config = comfy.model_detection.model_config_from_diffusers_unet(bare)
        if config is not None:
            names = comfy.utils.unet_to_diffusers(config.unet_config)
            bare = {ours: bare[theirs] for theirs, ours in names.items() if theirs in bare}
    return config, bare


def _check_family(model: str, config: Any) -> None:
    family = type(config).__name__
    unet = {} if config is None else config.unet_config
    faults = (
        (config is None, "ComfyUI recognises no diffusion model in it"),
        (
            "num_res_blocks" not in unet,
            f"it is a {family} model, and the server runs UNets (SD 1.x, SD 2.x, SDXL)",
        ),
        (unet.get("use_temporal_attention"), f"it is a video model ({family})"),
        (getattr(config, "required_keys", None), f"{family} needs weights beside the UNet"),
        (getattr(config, "scaled_fp8", None) is not None, "its weights are fp8 with scales beside them"),
    )
    for is_fault, fault in faults:
        if is_fault:
            raise CannotRunRemotely(f'"{model}" cannot be used from the server: {fault}. {WAY_OUT}')


class RemoteWeight(torch.Tensor):
    """Shape and dtype of a weight on the server. Computing with it is an error, never a wrong number."""

    _SHAPE_ONLY = frozenset(
        {"size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous", "__get__", "__repr__"}
    )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.__name__ in cls._SHAPE_ONLY:
            return super().__torch_function__(func, types, args, dict(kwargs or {}))  # type: ignore[no-untyped-call]
        raise CannotRunRemotely(f"A weight of the UNet is needed here, and it is on the server. {WAY_OUT}")


class RemoteUNet(torch.nn.Module):
    """Stands where the UNet would: same forward, same names and shapes in `state_dict`, nothing inside."""

    def __init__(
        self, remote: Remote, shapes: Mapping[str, torch.Size], dtype: torch.dtype, model: torch.nn.Module
    ) -> None:
        super().__init__()
        self.remote = remote
        self.dtype = dtype
        self._weights = {
            key: torch.empty(shape, dtype=dtype, device="meta").as_subclass(RemoteWeight)
            for key, shape in shapes.items()
        }
        # A reference back would keep ComfyUI from noticing that the model is no longer used.
        self._model = weakref.ref(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f'The UNet has no "{name}" here, because it is on the server: '
                f"a node that reaches into the UNet cannot work with it. {WAY_OUT}"
            ) from None

    def state_dict(self, *_: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Names and shapes, for ComfyUI's maps of LoRA keys. Who asks this module alone wants the weights."""
        if prefix == "":
            raise CannotRunRemotely(
                "The weights of the UNet are needed here (to save it, or for a Control-LoRA), and they are "
                f"on the server. {WAY_OUT}"
            )
        destination = {} if destination is None else destination
        destination.update({prefix + key: weight for key, weight in self._weights.items()})
        return destination

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Mapping[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - the signature of ComfyUI's UNet
        **kwargs: Any,
    ) -> torch.Tensor:
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        # By position, because the wrappers of EasyCache count on it.
        out: torch.Tensor = executor.execute(x, timesteps, context, y, control, transformer_options, **kwargs)
        return out

    def _forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Mapping[str, Any] | None = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> torch.Tensor:
        refuse(transformer_options=transformer_options, arguments=kwargs)
        patcher = getattr(self._model(), "current_patcher", None)
        if patcher is None:
            raise CannotRunRemotely(
                "The UNet was called outside of ComfyUI's sampling, so its LoRAs are not known. "
                "Use KSampler or SamplerCustom."
            )
        if timesteps is None or context is None:
            raise CannotRunRemotely(
                "The UNet was called without timesteps or without a prompt; the server needs both."
            )
        out, _ = self.remote.client.forward(
            self.remote.model,
            patcher.adapters(),
            x,
            timesteps,
            _sendable(context),
            None if y is None else _sendable(y),
            _control(control),
            self.remote.patience,
        )
        return out


def _control(control: Mapping[str, Any] | None) -> Control | None:
    """ComfyUI's residuals, or None where there are none."""
    if control is None or all(entry is None for entries in control.values() for entry in entries or ()):
        return None
    further = [
        name for name, entries in control.items() if entries and name not in ("input", "middle", "output")
    ]
    if further:
        raise CannotRunRemotely(
            f"A ControlNet gave residuals for {', '.join(further)}, which a UNet does not have."
        )
    lists = {
        name: [None if entry is None else _sendable(entry) for entry in control.get(name) or ()]
        for name in ("input", "middle", "output")
    }
    return Control(**lists)


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that requests may have. ControlNets may compute in bfloat16, whatever the UNet does."""
    return tensor if tensor.dtype in WIRE_DTYPES.values() else tensor.float()
