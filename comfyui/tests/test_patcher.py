"""The patcher in ComfyUI's sampling, over a UNet in PyTorch: latents must be those of ComfyUI alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import real_comfyui  # noqa: F401  # isort: skip
import comfy.lora
import comfy.model_management
import torch
from patcher_setting import ATTENTION, loaded, prompt, sampled
from torch_server import PREFIX, TorchServer

from unetd.refusals import CannotRunRemotely

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(
    ("sampler", "cfg", "size", "batch", "tokens"),
    [
        ("euler", 7.0, (8, 8), 1, 77),
        ("dpmpp_2m_sde", 7.0, (8, 8), 2, 77),
        ("euler_ancestral", 1.0, (8, 8), 1, 231),
        ("euler", 4.0, (9, 7), 1, 77),
    ],
)
def test_samplers_sizes_batches_and_prompts_give_the_same_latents(
    local: Any, remote: Any, sampler: str, cfg: float, size: tuple[int, int], batch: int, tokens: int
) -> None:
    settings = {"sampler": sampler, "cfg": cfg, "size": size, "batch": batch, "positive": prompt(1, tokens)}
    assert torch.equal(sampled(remote, **settings), sampled(local, **settings))


def test_cond_and_uncond_are_one_forward(torch_server: TorchServer, remote: Any) -> None:
    sampled(remote, steps=2)
    assert len(torch_server.sent) == 2


def test_guidance_and_caches_around_the_unet_work(local: Any, remote: Any) -> None:
    rescale = comfy_nodes_extra("nodes_model_advanced", "RescaleCFG")

    def run(model: Any) -> torch.Tensor:
        (model,) = rescale().patch(model, 0.7)
        model.set_model_unet_function_wrapper(
            lambda apply, args: apply(args["input"], args["timestep"], **args["c"])
        )
        return sampled(model, noise_mask=torch.ones(1, 1, 8, 8))

    assert torch.equal(run(remote), run(local))


def comfy_nodes_extra(module: str, name: str) -> Any:
    return getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_control_residuals_are_sent_with_their_places(
    remote: Any, torch_server: TorchServer, dtype: torch.dtype
) -> None:
    residual = torch.ones(2, 320, 8, 8, dtype=dtype)

    class Control:
        previous_controlnet = None
        extra_hooks = None

        def get_control(self, *_: Any) -> dict[str, Any]:
            return {"input": [residual, None], "middle": [residual], "output": []}

        def get_models(self) -> list[Any]:
            return []

        def get_extra_hooks(self) -> list[Any]:
            return []

        def inference_memory_requirements(self, _: Any) -> int:
            return 0

        def pre_run(self, *_: Any) -> None:
            pass

        def cleanup(self) -> None:
            pass

    positive, negative = prompt(1), prompt(2)
    positive[0][1]["control"] = negative[0][1]["control"] = Control()
    sampled(remote, positive, negative, steps=1)
    control = torch_server.controls[0]
    assert control is not None
    assert [entry is None for entry in control.input] == [False, True]
    assert control.input[0].dtype == torch.float32  # type: ignore[union-attr]
    assert (len(control.middle), len(control.output)) == (1, 0)


def test_merging_with_another_model_is_refused_where_it_is_done(local: Any, remote: Any) -> None:
    merge = comfy_nodes_extra("nodes_model_merging", "ModelMergeSimple")()
    for first, second in ((remote, local), (local, remote)):
        with pytest.raises(CannotRunRemotely, match="Load Checkpoint"):
            merge.merge(first, second, 0.5)


def test_weights_are_refused_to_whoever_wants_to_compute_with_them(remote: Any) -> None:
    state = remote.model_state_dict()
    weight = state[f"diffusion_model.{ATTENTION}.weight"]
    assert weight.shape == (320, 320) and weight.dtype == torch.float32 and "meta" in repr(weight)
    for use in (lambda: weight + 1, lambda: torch.ones(320, 320).add_(weight), weight.cpu):
        with pytest.raises(CannotRunRemotely, match="on the server"):
            use()
    with pytest.raises(CannotRunRemotely, match="save"):
        remote.model.state_dict_for_saving()
    with pytest.raises(AttributeError, match=r"input_blocks.*on the server"):
        remote.model.diffusion_model.input_blocks  # noqa: B018


def test_calling_the_model_outside_of_sampling_is_refused(remote: Any, torch_server: TorchServer) -> None:
    with pytest.raises(CannotRunRemotely, match="outside of"):
        remote.model.apply_model(torch.zeros(1, 4, 8, 8), torch.ones(1), c_crossattn=prompt(1)[0][0])
    assert torch_server.sent == []


def test_a_model_that_is_no_longer_used_is_freed(torch_server: TorchServer) -> None:
    remote = loaded(torch_server)
    model = weakref.ref(remote.model)
    sampled(remote, steps=1)
    del remote
    comfy.model_management.unload_all_models()
    gc.collect()
    assert model() is None


def test_names_of_layers_are_those_of_the_local_model(local: Any, remote: Any) -> None:
    assert set(remote.model.state_dict()) == set(local.model.state_dict())
    keys = [comfy.lora.model_lora_keys_unet(model.model, {}) for model in (local, remote)]
    assert keys[0] == keys[1]
    assert not list(remote.model.diffusion_model.parameters())
    assert PREFIX not in "".join(keys[1])
