"""From lists of patches to adapters: grouping, order, digests. test_patcher.py has ComfyUI's opinion."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from unetd import adapters, frames
from unetd.adapters import Source, mark, parts_of, stack_of
from unetd.refusals import CannotRunRemotely

KEY = "diffusion_model.middle_block.0.weight"
OTHER = "diffusion_model.out.2.weight"
Patches = dict[str, list[tuple[Any, ...]]]


def diff(value: float, strength: float = 1.0) -> tuple[Any, ...]:
    return (strength, ("diff", (torch.full((2, 2), value),)), 1.0, None, None)


def added(patches: Patches, entries: dict[str, tuple[Any, ...]], label: str | None = None) -> None:
    before = {key: len(held) for key, held in patches.items()}
    for key, entry in entries.items():
        patches.setdefault(key, []).append(entry)
    mark(patches, before, Source(label))


def values(patches: Patches) -> list[tuple[float, dict[str, float]]]:
    return [
        (
            layered.strength,
            {name: float(tensor.flatten()[0]) for name, tensor in layered.lora.tensors().items()},
        )
        for layered in stack_of(patches)
    ]


def test_one_call_is_one_adapter_in_the_order_of_the_calls() -> None:
    patches: Patches = {}
    added(patches, {OTHER: diff(1, 0.5)})
    added(patches, {KEY: diff(2), OTHER: diff(3)})
    stem, other = KEY.removesuffix(".weight"), OTHER.removesuffix(".weight")
    assert values(patches) == [(0.5, {f"{other}.diff": 1}), (1.0, {f"{stem}.diff": 2, f"{other}.diff": 3})]


def test_marked_patches_still_look_as_comfyui_wrote_them() -> None:
    patches: Patches = {}
    entry = diff(1, 0.5)
    added(patches, {KEY: entry})
    (marked,) = patches[KEY]
    strength, value, strength_model, offset, function = marked
    assert isinstance(marked, tuple) and marked == entry
    assert (strength, value, strength_model, offset, function) == entry


def test_unmarked_patches_keep_their_place_in_the_list_of_their_weight() -> None:
    patches: Patches = {}
    added(patches, {KEY: diff(1)})
    patches[KEY] += [diff(2), diff(3, 0.5)]
    added(patches, {KEY: diff(4)})
    patches[OTHER] = [diff(5)]
    order = [list(entries.values()) for _, entries in values(patches)]
    assert order == [[5], [1], [2], [3], [4]]


def test_the_same_call_twice_on_a_weight_is_applied_twice() -> None:
    patches: Patches = {}
    added(patches, {KEY: diff(1)})
    patches[KEY] = patches[KEY] * 2
    assert len(values(patches)) == 2


def test_equal_content_has_one_digest_and_alpha_is_part_of_it() -> None:
    class LoRAAdapter:
        name = "lora"

        def __init__(self, alpha: float | None) -> None:
            self.weights = (torch.ones(2, 1), torch.ones(1, 2), alpha, None, None, None)

    digests = []
    for alpha in (1.0, 1.0, 2.0, None):
        (layered,) = stack_of({KEY: [(0.3, LoRAAdapter(alpha), 1.0, None, None)]})
        digests.append(layered.lora.digest)
        assert frames.digest(layered.lora.tensors()) == layered.lora.digest
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_digest_is_computed_once_while_its_tensors_live(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    real = frames.digest
    monkeypatch.setattr(frames, "digest", lambda tensors: computed.append(1) or real(tensors))
    before = len(adapters._digests)
    tensor = torch.rand(3, 3)
    for strength in (0.1, 0.2):
        stack_of({KEY: [(strength, ("diff", (tensor,)), 1.0, None, None)]})
    assert len(computed) == 1
    assert len(adapters._digests) == before + 1
    del tensor
    gc.collect()
    assert len(adapters._digests) == before


def test_replaced_weights_have_no_strength() -> None:
    entry = (0.0, ("set", (torch.ones(2, 2),)), 1.0, None, None)
    (layered,) = stack_of({KEY: [entry]})
    assert (layered.strength, layered.scales) == (1.0, False)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        (KEY, ("diff", (torch.ones(1),)), "middle_block.0.diff"),
        ("diffusion_model.out.2.bias", ("diff", (torch.ones(1),)), "out.2.diff_b"),
        ("diffusion_model.out.2.bias", (torch.ones(1),), "out.2.diff_b"),
        ("diffusion_model.out.2.bias", ("set", (torch.ones(1),)), "out.2.bias.set_weight"),
    ],
)
def test_names_are_those_of_files_in_ldm_layout(key: str, value: Any, name: str) -> None:
    assert list(parts_of(key, (1.0, value, 1.0, None, None))) == [f"diffusion_model.{name}"]


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ((1.0, [(torch.ones(1), None)], 1.0, None, None), "merge"),
        ((1.0, ("diff", (torch.ones(1),)), 0.5, None, None), "merge"),
        ((1.0, ("diff", (torch.ones(1),)), 1.0, (0, 0, 1), None), "part of a weight"),
        ((1.0, ("diff", (torch.ones(1),)), 1.0, None, lambda a: a), "part of a weight"),
        ((1.0, ("model_as_lora", (torch.ones(1),)), 1.0, None, None), "model used as a LoRA"),
        ((1.0, ("fooocus", (torch.ones(1),)), 1.0, None, None), '"fooocus"'),
        ((1.0, object(), 1.0, None, None), '"object"'),
    ],
)
def test_what_is_no_adapter_is_refused_with_the_weight_named(patch: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(CannotRunRemotely, match=f"(?s){KEY}.*{reason}.*Load Checkpoint"):
        mark({KEY: [patch]}, {}, Source(None))
    with pytest.raises(CannotRunRemotely):
        stack_of({KEY: [patch]})
