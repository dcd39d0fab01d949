"""ComfyUI's ModelPatcher over a UNet on a server: patches become adapters instead of changed weights.

Stock in all that other nodes see: patches, hooks, clones and wrappers are kept as ComfyUI keeps them. What
differs is that nothing is patched, nothing has a size, and what cannot be sent is refused.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .adapters import Layered, Source, caller_lora_name, mark, stack_of
from .client import Lora
from .errors import AccessRefused, RemoteError, ServerAway
from .refusals import WAY_OUT, CannotRunRemotely, refuse

logger = logging.getLogger("unetd")


class RemoteModelPatcher(ModelPatcher):  # type: ignore[misc]
    """A MODEL without weights. `model` is what `skeleton.build` made."""

    def __init__(
        self,
        model: Any,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "unetd", _refuse_before_sampling)
        #: While sampling: the static adapters under None, those of each hook under its reference.
        self._stacks: dict[Any, list[Layered]] | None = None

    def model_size(self) -> int:
        """0: nothing of it takes memory here. (ComfyUI would add up the shapes.)"""
        return 0

    def get_ram_usage(self) -> int:
        return 0

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        """As ComfyUI's; one call is one adapter. CannotRunRemotely for merges and unknown patches."""
        before = _lengths(self.patches)
        added = super().add_patches(patches, strength_patch, strength_model)
        mark(self.patches, before, Source(caller_lora_name()))
        return added

    def add_hook_patches(
        self, hook: Any, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> Any:
        """As `add_patches`, for patches that go with some of the prompts or some of the steps."""
        before = _lengths(self.hook_patches.get(hook.hook_ref, {}))
        added = super().add_hook_patches(hook, patches, strength_patch, strength_model)
        mark(self.hook_patches[hook.hook_ref], before, Source(None))
        return added

    def patch_hooks(self, hooks: Any) -> None:
        """Only notes which hooks the next forward is for: their strengths are read when it is sent."""
        self.current_hooks = hooks

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        raise CannotRunRemotely(
            f"Merging and extracting need the weights of the UNet, and those are on the server. {WAY_OUT}"
        )

    def pre_run(self) -> None:
        """Gives the server the adapters of all steps: one that it refuses ends the run before a step."""
        refuse(patcher=self, transformer_options=self.model_options["transformer_options"])
        hooks = {reference: stack_of(patches) for reference, patches in self.hook_patches.items()}
        self._stacks = {None: stack_of(self.patches), **hooks}
        remote = self.model.diffusion_model.remote
        for layered in itertools.chain(*self._stacks.values()):
            if layered.strength == 0:
                continue
            try:
                answer = remote.client.load_lora(layered.lora, remote.model, remote.patience)
            except (ServerAway, AccessRefused):
                raise
            except RemoteError as error:
                message = f'The server cannot apply the LoRA "{layered.lora.label}": {error.message}'
                raise RemoteError(error.code, message, error.details) from error
            logger.debug('LoRA "%s": %s', layered.lora.label, answer)
        super().pre_run()

    def cleanup(self) -> None:
        super().cleanup()
        self._stacks = None

    def adapters(self) -> list[tuple[Lora, float]]:
        """The stack for the forward that comes now, in order, with the strengths of this step."""
        if self._stacks is None:
            raise CannotRunRemotely("The UNet was called outside of sampling. Use KSampler or SamplerCustom.")
        stack = [(layered.lora, layered.strength) for layered in self._stacks[None]]
        for hook in () if self.current_hooks is None else self.current_hooks.hooks:
            for layered in self._stacks.get(hook.hook_ref, ()):
                factor = hook.strength if layered.scales else 1.0
                stack.append((layered.lora, layered.strength * factor))
        return [(lora, strength) for lora, strength in stack if strength != 0]


def _lengths(patches: Mapping[str, list[Any]]) -> dict[str, int]:
    return {key: len(entries) for key, entries in patches.items()}


def _refuse_before_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a guider's sampling: it alone knows all prompts, and the options that hooks add."""
    guider = executor.class_obj
    refuse(
        patcher=guider.model_patcher,
        model_options=guider.model_options,
        transformer_options=guider.model_options["transformer_options"],
        conditioning=guider.conds,
    )
    return executor(*args, **kwargs)
