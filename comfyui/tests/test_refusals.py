"""What ComfyUI's own nodes do to a remote model: refused before anything is sent, by name, or let through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import real_comfyui  # noqa: F401  # isort: skip
import comfy.controlnet
import comfy.hooks
import nodes
import torch
from comfy.patcher_extension import PatcherInjection
from patcher_setting import loaded, prompt, sampled
from torch_server import SD1, TorchServer, names_and_shapes, random_weights

from unetd.refusals import CannotRunRemotely

Change = Callable[[Any], Any]


@pytest.fixture(scope="module", autouse=True)
def extras() -> None:
    """ComfyUI's further nodes, under the names that users see."""
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))


@pytest.fixture(scope="module")
def torch_server() -> TorchServer:
    return TorchServer(random_weights(names_and_shapes(SD1)))


pytestmark = pytest.mark.usefixtures("no_gradients")


def node(name: str, **inputs: Any) -> Change:
    """The node applied to a model, whichever style it is written in."""

    def change(model: Any) -> Any:
        cls = nodes.NODE_CLASS_MAPPINGS[name]
        is_old = "INPUT_TYPES" in vars(cls)
        function = getattr(cls(), cls.FUNCTION) if is_old else cls.execute
        return function(model=model, **inputs)[0]

    return change


def attention_override(model: Any) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *args: f(*args)
    return model


def object_patch(model: Any) -> Any:
    model = model.clone()
    model.add_object_patch("diffusion_model.input_blocks.1", torch.nn.Identity())
    return model


def weight_wrapper(model: Any) -> Any:
    model = model.clone()
    model.add_weight_wrapper("diffusion_model.out.2.weight", lambda weight: weight)
    return model


def injection(model: Any) -> Any:
    model = model.clone()
    model.set_injections("test", [PatcherInjection(lambda m: None, lambda m: None)])
    return model


REFUSED: dict[str, tuple[Change, str]] = {
    "FreeU": (node("FreeU", b1=1.1, b2=1.2, s1=0.9, s2=0.2), 'The node "FreeU".*"output_block_patch"'),
    "FreeU_V2": (node("FreeU_V2", b1=1.1, b2=1.2, s1=0.9, s2=0.2), 'The node "FreeU_V2"'),
    "PAG": (node("PerturbedAttentionGuidance", scale=3.0), 'The node "PerturbedAttentionGuidance".*guidance'),
    "SAG": (
        node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
        'The node "Self-Attention Guidance".*attn1',
    ),
    "HyperTile": (
        node("HyperTile", tile_size=256, swap_size=2, max_depth=0, scale_depth=False),
        'The node "HyperTile".*"attn1_patch"',
    ),
    "ToMe": (node("TomePatchModel", ratio=0.3), "The node .*attn1"),
    "DeepShrink": (
        node(
            "PatchModelAddDownscale",
            block_number=3,
            downscale_factor=2.0,
            start_percent=0.0,
            end_percent=0.35,
            downscale_after_skip=True,
            downscale_method="bicubic",
            upscale_method="bicubic",
        ),
        'The node "PatchModelAddDownscale.*"input_block_patch_after_skip"',
    ),
    "compute dtype": (
        node("ModelComputeDtype", dtype="fp16"),
        'The node "ModelComputeDtype".*choose "dtype"',
    ),
    "attention": (attention_override, "another attention function"),
    "object patch": (object_patch, '"diffusion_model.input_blocks.1"'),
    "weight wrapper": (weight_wrapper, 'the weight "diffusion_model.out.2.weight"'),
    "injection": (injection, 'the injection "test"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_layers_is_refused_before_anything_is_sent(
    torch_server: TorchServer, name: str
) -> None:
    change, message = REFUSED[name]
    model = change(loaded(torch_server))
    torch_server.sent.clear()
    with pytest.raises(CannotRunRemotely, match=f"(?s){message}.*Load Checkpoint"):
        sampled(model, steps=1)
    assert torch_server.sent == []


def gligen() -> Any:
    return prompt(1, gligen=("position", None, []))


def control_lora() -> Any:
    return prompt(1, control=comfy.controlnet.ControlLora({}))


def hooked_patch() -> Any:
    hook = comfy.hooks.TransformerOptionsHook({"patches": {"middle_patch": [lambda *_: None]}})
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return comfy.hooks.set_hooks_for_conditioning(prompt(1), group)


@pytest.mark.parametrize(
    ("positive", "message"),
    [(gligen, "GLIGEN"), (control_lora, "Control-LoRA"), (hooked_patch, '"middle_patch"')],
)
def test_prompts_that_need_the_layers_are_refused_too(
    torch_server: TorchServer, positive: Callable[[], Any], message: str
) -> None:
    torch_server.sent.clear()
    with pytest.raises(CannotRunRemotely, match=message):
        sampled(loaded(torch_server), positive(), steps=1)
    assert torch_server.sent == []


def test_a_patch_that_appears_while_sampling_is_refused_before_its_forward(torch_server: TorchServer) -> None:
    def patched(apply: Any, args: dict[str, Any]) -> Any:
        options = {**args["c"]["transformer_options"], "patches": {"attn2_patch": [patched]}}
        return apply(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})

    model = loaded(torch_server).clone()
    model.set_model_unet_function_wrapper(patched)
    torch_server.sent.clear()
    with pytest.raises(CannotRunRemotely, match='"attn2_patch"'):
        sampled(model, steps=1)
    assert torch_server.sent == []


def test_arguments_that_the_server_has_no_input_for_are_refused_by_name(torch_server: TorchServer) -> None:
    def more(**further: Any) -> Change:
        def change(model: Any) -> Any:
            model = model.clone()
            model.set_model_unet_function_wrapper(
                lambda apply, args: apply(args["input"], args["timestep"], **args["c"], **further)
            )
            return model

        return change

    sampled(more(crossattn_controlnet=torch.ones(1), guidance=None)(loaded(torch_server)), steps=1)
    with pytest.raises(CannotRunRemotely, match='The workflow sets the argument "guidance"'):
        sampled(more(guidance=torch.ones(1))(loaded(torch_server)), steps=1)


ALLOWED: dict[str, Change] = {
    "RescaleCFG": node("RescaleCFG", multiplier=0.7),
    "ModelSamplingDiscrete": node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True),
    "EasyCache": node("EasyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False),
    "LazyCache": node("LazyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False),
    "TCFG": node("TCFG"),
    "APG": node("APG", eta=1.0, norm_threshold=5.0, momentum=0.0),
    "compute dtype": node("ModelComputeDtype", dtype="fp32"),
    "compile": node("TorchCompileModel", backend="inductor"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_works_around_the_unet_gives_the_latents_of_the_local_model(
    torch_server: TorchServer, name: str
) -> None:
    change = ALLOWED[name]
    remote = sampled(change(loaded(torch_server)), steps=4)
    # Compiling the local model would take minutes and change its rounding.
    local = torch_server.model if name == "compile" else change(torch_server.model)
    assert torch.equal(remote, sampled(local, steps=4))
