"""What cannot work while the UNet is on a server, found before anything is sent: one table says what and why.

What ComfyUI does around the UNet (guidance, schedules, masks, areas, caches, ControlNets) is not in it:
that needs nothing of the UNet but its result.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WAY_OUT = (
    "Remove or bypass it, or run the model locally: load it with ComfyUI's own "
    '"Load Checkpoint" or "Load Diffusion Model".'
)

#: Further arguments of a UNet's forward that only video models read, which no server takes.
IGNORED_ARGUMENTS = frozenset(
    {"crossattn_controlnet", "num_video_frames", "image_only_indicator", "time_context"}
)

#: What was found, and what it was set by: a function, an object, a class type of a node, or None (not known).
Finding = tuple[str, object]


class CannotRunRemotely(RuntimeError):
    """The workflow needs what only a local UNet has. The message names node, patch and the way out."""


@dataclass(frozen=True)
class Rule:
    """`find` looks through `place`, an argument of `refuse`; `because` completes "…, but"."""

    place: str
    find: Callable[[Any], Iterator[Finding]]
    because: str


def refuse(**places: Any) -> None:
    """Raises CannotRunRemotely where a rule finds something.

    `patcher`: the ModelPatcher; `model_options`, `transformer_options`: ComfyUI's dictionaries of these
    names; `conditioning`: name -> conds, as a guider holds them; `arguments`: further ones of the forward.
    """
    found = [
        f"{node_of(by)} sets {what}, but {rule.because}."
        for rule in RULES
        if rule.place in places
        for what, by in rule.find(places[rule.place])
    ]
    if found:
        raise CannotRunRemotely("\n".join([*dict.fromkeys(found), WAY_OUT]))


def node_of(by: object) -> str:
    """The node whose code defines this function or object, as the user sees it; else the code itself."""
    if by is None:
        return "The workflow"
    nodes = sys.modules.get("nodes")
    classes: Mapping[str, type] = getattr(nodes, "NODE_CLASS_MAPPINGS", {})
    names: Mapping[str, str] = getattr(nodes, "NODE_DISPLAY_NAME_MAPPINGS", {})
    if isinstance(by, str):
        return f'The node "{names.get(by) or by}"'
    code = _defined_by(by)
    module, qualified = code.__module__, code.__qualname__
    beside = {name: node for name, node in classes.items() if node.__module__ == module}
    within = [name for name, node in beside.items() if f"{qualified}.".startswith(f"{node.__qualname__}.")]
    candidates = within or list(beside)
    if len(candidates) == 1:
        return f'The node "{names.get(candidates[0]) or candidates[0]}"'
    return f'A node (code "{qualified}" of {module})'


def _defined_by(by: object) -> Any:
    """What has a qualified name: the function, that of a method or partial, or the class of an object."""
    while isinstance(by, functools.partial):
        by = by.func
    by = getattr(by, "__func__", by)
    return by if hasattr(by, "__qualname__") else type(by)


def _patches(options: Mapping[str, Any]) -> Iterator[Finding]:
    for name, functions in options.get("patches", {}).items():
        yield from ((f'the patch "{name}"', function) for function in functions)


def _replacements(options: Mapping[str, Any]) -> Iterator[Finding]:
    for name, blocks in options.get("patches_replace", {}).items():
        yield from ((f'a replacement of "{name}"', function) for function in blocks.values())


def _attention(options: Mapping[str, Any]) -> Iterator[Finding]:
    override = options.get("optimized_attention_override")
    if override is not None:
        yield "another attention function", override


def _hooked(conditioning: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterator[Finding]:
    for cond in _conds(conditioning):
        for hook in getattr(cond.get("hooks"), "hooks", ()):
            options = getattr(hook, "transformers_dict", None) or {}
            yield from _patches(options)
            yield from _replacements(options)


def _guidance(options: Mapping[str, Any]) -> Iterator[Finding]:
    """Guidance by a second UNet with replaced layers calls ComfyUI's function that replaces them."""
    functions = (
        options.get(f"sampler_{name}_function") for name in ("cfg", "pre_cfg", "post_cfg", "calc_cond_batch")
    )
    for entry in functions:
        for function in entry if isinstance(entry, list) else [entry]:
            names = getattr(getattr(function, "__code__", None), "co_names", ())
            if "set_model_options_patch_replace" in names:
                yield "guidance by a UNet with replaced layers", function


def _object_patches(patcher: Any) -> Iterator[Finding]:
    for name, value in patcher.object_patches.items():
        if name.split(".")[0] == "diffusion_model":
            yield f'the object patch "{name}"', value


def _compute_dtype(patcher: Any) -> Iterator[Finding]:
    dtype = patcher.object_patches.get("manual_cast_dtype")
    if dtype not in (None, patcher.model_dtype()):
        yield (
            f"the dtype to compute in ({dtype}; the server has {patcher.model_dtype()})",
            "ModelComputeDtype",
        )


def _weight_wrappers(patcher: Any) -> Iterator[Finding]:
    for name, functions in patcher.weight_wrapper_patches.items():
        yield from ((f'a wrapper of the weight "{name}"', function) for function in functions)


def _injections(patcher: Any) -> Iterator[Finding]:
    for name, injections in patcher.injections.items():
        yield from ((f'the injection "{name}"', injection.inject) for injection in injections)


def _gligen(conditioning: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterator[Finding]:
    if any("gligen" in cond for cond in _conds(conditioning)):
        yield "boxes for GLIGEN", "GLIGENTextBoxApply"


def _control_loras(conditioning: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterator[Finding]:
    for cond in _conds(conditioning):
        control = cond.get("control")
        while control is not None:
            if any(base.__name__ == "ControlLora" for base in type(control).__mro__):
                yield "a Control-LoRA", "ControlNetLoader"
            control = control.previous_controlnet


def _conds(conditioning: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    for conds in conditioning.values():
        yield from conds


def _arguments(arguments: Mapping[str, Any]) -> Iterator[Finding]:
    for name, value in arguments.items():
        if value is not None and name not in IGNORED_ARGUMENTS:
            yield f'the argument "{name}" of the UNet', None


_LAYERS = "that is computed between the layers of the UNet, and those run on the server"
_WEIGHTS = "that changes weights of the UNet, and those are on the server"
RULES: tuple[Rule, ...] = (
    Rule("transformer_options", _patches, _LAYERS),
    Rule("transformer_options", _replacements, _LAYERS),
    Rule("transformer_options", _attention, _LAYERS),
    Rule("conditioning", _hooked, _LAYERS),
    Rule("conditioning", _gligen, _LAYERS),
    Rule("conditioning", _control_loras, "it is made of weights of the UNet, and those are on the server"),
    Rule("model_options", _guidance, _LAYERS),
    Rule("patcher", _object_patches, "that replaces a part of the UNet, which is on the server"),
    Rule("patcher", _weight_wrappers, _WEIGHTS),
    Rule("patcher", _injections, "what it puts into the UNet would not reach the server"),
    Rule(
        "patcher",
        _compute_dtype,
        'that is decided by the server: choose "dtype" in the node that loads the model',
    ),
    Rule("arguments", _arguments, "the server has no such input"),
)
