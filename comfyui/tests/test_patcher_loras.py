"""LoRAs in ComfyUI's sampling over a UNet in PyTorch: latents must be those of ComfyUI alone."""

from __future__ import annotations

from typing import Any

import pytest

import real_comfyui  # noqa: F401  # isort: skip
import comfy.hooks
import comfy.sd
import comfy.weight_adapter
import torch
from lora_setting import KINDS, file_of, lora_file, random, with_lora
from patcher_setting import ATTENTION, prompt, sampled
from torch_server import TorchServer

from unetd.errors import RemoteError
from unetd.patcher import RemoteModelPatcher

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_arrives_as_it_was_loaded(
    local: Any, remote: Any, torch_server: TorchServer, kind: str
) -> None:
    expected = sampled(with_lora(local, file_of(kind), -0.7), steps=1)
    assert torch.equal(sampled(with_lora(remote, file_of(kind), -0.7), steps=1), expected)
    assert not torch.equal(expected, sampled(local, steps=1))
    assert len(torch_server.uploads) == 1


def test_a_stack_is_applied_in_the_order_of_its_nodes(
    local: Any, remote: Any, torch_server: TorchServer
) -> None:
    files = [(lora_file(1), 0.8), (file_of("dora"), 0.5), (lora_file(2), -0.4), (file_of("oft"), 0.6)]

    def stacked(model: Any) -> torch.Tensor:
        for tensors, strength in files:
            model = with_lora(model, tensors, strength)
        return sampled(model, steps=2)

    assert torch.equal(stacked(remote), stacked(local))
    assert [strength for _, strength in torch_server.sent[0]] == [0.8, 0.5, -0.4, 0.6]


def test_a_new_strength_uploads_nothing_and_the_same_file_twice_is_one_upload(
    remote: Any, torch_server: TorchServer
) -> None:
    tensors = lora_file()
    sampled(with_lora(remote, tensors, 1.0), steps=1)
    assert len(torch_server.uploads) == 1
    sampled(with_lora(remote, tensors, 0.3), steps=1)
    again = {name: tensor.clone() for name, tensor in tensors.items()}
    sampled(with_lora(with_lora(remote, tensors, 0.5), again, 0.25), steps=1)
    assert len(torch_server.uploads) == 1
    digest = torch_server.uploads[0]
    assert torch_server.sent[1:] == [[(digest, 0.3)], [(digest, 0.5), (digest, 0.25)]]


def test_strength_0_and_a_lora_for_the_text_encoder_alone_send_no_adapter(
    remote: Any, torch_server: TorchServer
) -> None:
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3072, 1)}
    sampled(with_lora(with_lora(remote, lora_file(), 0.0), text, 1.0), steps=1)
    assert torch_server.sent == [[]]
    assert torch_server.loads == []


def test_a_clone_is_a_remote_model_with_the_same_stack_and_leaves_the_original_alone(
    remote: Any, torch_server: TorchServer
) -> None:
    patched = with_lora(remote, lora_file(), 1.0)
    clone = patched.clone()
    assert type(clone) is RemoteModelPatcher
    assert clone.model_size() == clone.get_ram_usage() == clone.size == 0
    sampled(clone, steps=1)
    sampled(remote, steps=1)
    assert [len(stack) for stack in torch_server.sent] == [1, 0]


def test_patches_that_a_node_wrote_by_itself_are_sent_too(
    local: Any, remote: Any, torch_server: TorchServer
) -> None:
    def patched(model: Any) -> Any:
        model = with_lora(model, lora_file(1), 0.5).clone()
        key = f"diffusion_model.{ATTENTION}.weight"
        model.patches[key] = [*model.patches[key], (0.5, ("diff", (random(320, 320),)), 1.0, None, None)]
        return with_lora(model, lora_file(2), 0.7)

    assert torch.equal(sampled(patched(remote), steps=1), sampled(patched(local), steps=1))
    assert len(torch_server.sent[0]) == 3


def hooked(strength: float, schedule: list[tuple[float, float]], seed: int = 3) -> comfy.hooks.HookGroup:
    group = comfy.hooks.create_hook_lora(lora_file(seed), strength, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for start, factor in schedule:
        frames.add(comfy.hooks.HookKeyframe(strength=factor, start_percent=start))
    group.set_keyframes_on_hooks(frames)
    return group


def test_hooks_on_one_prompt_with_a_schedule_give_the_same_latents(
    local: Any, remote: Any, torch_server: TorchServer
) -> None:
    def run(model: Any) -> torch.Tensor:
        hooks = hooked(0.8, [(0.0, 1.0), (0.4, 0.0), (0.7, 0.5)])
        positive = comfy.hooks.set_hooks_for_conditioning(prompt(1), hooks)
        return sampled(with_lora(model, lora_file(1), 0.5), positive, steps=5)

    expected = run(local)
    assert torch.equal(run(remote), expected)
    assert {len(stack) for stack in torch_server.sent} == {1, 2}
    assert len(torch_server.uploads) == 2
    again = len(torch_server.uploads)
    run(remote)
    assert len(torch_server.uploads) == again


def test_two_prompts_with_masks_areas_and_different_hooks_give_the_same_latents(
    local: Any, remote: Any
) -> None:
    def run(model: Any) -> torch.Tensor:
        left = comfy.hooks.set_hooks_for_conditioning(prompt(1, area=(4, 8, 0, 0)), hooked(0.8, [(0.0, 1.0)]))
        right = comfy.hooks.set_hooks_for_conditioning(
            prompt(3, mask=torch.ones(1, 8, 8) * 0.5), hooked(0.4, [(0.0, 0.5), (0.5, 1.0)], seed=4)
        )
        return sampled(model, left + right + prompt(4), steps=4)

    assert torch.equal(run(remote), run(local))


def test_an_adapter_that_the_server_refuses_ends_the_run_before_a_forward(
    remote: Any, torch_server: TorchServer
) -> None:
    torch_server.refused = "rank 5000 is too much"
    with pytest.raises(RemoteError, match=r"LoRA \"[0-9a-f]{12} .*rank 5000"):
        sampled(with_lora(remote, lora_file(), 1.0))
    lora_name = "style.safetensors"  # as the variable of LoraLoader is called
    named = with_lora(remote, lora_file(), 1.0)
    with pytest.raises(RemoteError, match=f'LoRA "{lora_name}"'):
        sampled(named)
    assert torch_server.sent == []
