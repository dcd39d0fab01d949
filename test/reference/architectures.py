"""The UNets that the references cover: plain arguments of ComfyUI's UNetModel. Builds and runs nothing.

Small models keep the structure of the real one (comfy/supported_models.py, comfy/model_detection.py of 0.3.75) and
shrink channels, context width and depth. Heads follow ComfyUI's detection: linear proj_in, 64-wide heads; convolutional
proj_in, 8 heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    name: str
    arguments: Arguments
    #: A case with control residuals.
    control: bool = False
    #: State the diffusers key map.
    diffusers: bool = False
    #: Every sub-module of every block rather than the blocks alone.
    modules: bool = True
    #: Latent sizes: base, odd, batch of four.
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((8, 8), (9, 7), (6, 10))
    #: A LoRA case per file and format rather than the first two alone.
    all_adapters: bool = True


def unet(
    *,
    in_channels: int = 4,
    model_channels: int,
    mult: list[int],
    res: list[int],
    depth: list[int],
    depth_out: list[int],
    middle: int,
    context: int,
    linear: bool,
    adm: int | None = None,
) -> Arguments:
    return {
        "image_size": 32,
        "in_channels": in_channels,
        "out_channels": 4,
        "model_channels": model_channels,
        "num_res_blocks": res,
        "channel_mult": mult,
        "transformer_depth": depth,
        "transformer_depth_output": depth_out,
        "transformer_depth_middle": middle,
        "context_dim": context,
        "use_linear_in_transformer": linear,
        "num_heads": -1 if linear else 8,
        "num_head_channels": 64 if linear else -1,
        "num_classes": None if adm is None else "sequential",
        "adm_in_channels": adm,
        "use_spatial_transformer": True,
        "use_checkpoint": False,
        "legacy": False,
    }


def _sd1(in_channels: int = 4, model_channels: int = 32, context: int = 48) -> Arguments:
    return unet(
        in_channels=in_channels,
        model_channels=model_channels,
        mult=[1, 2, 4, 4],
        res=[2, 2, 2, 2],
        depth=[1, 1, 1, 1, 1, 1, 0, 0],
        depth_out=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        middle=1,
        context=context,
        linear=False,
    )


def _xl(depth: list[int], depth_out: list[int], middle: int, res: int = 2, **size: Any) -> Arguments:  # noqa: ANN401
    small = {"model_channels": 64, "mult": [1, 2, 4], "context": 64, "adm": 96}
    return unet(res=[res] * 3, depth=depth, depth_out=depth_out, middle=middle, linear=True, **{**small, **size})


SMALL: tuple[Architecture, ...] = (
    Architecture("sd1", _sd1(), control=True, diffusers=True),
    Architecture("sd1-inpaint", _sd1(in_channels=9), modules=False, all_adapters=False),
    Architecture("sd1-instruct", _sd1(in_channels=8), modules=False, all_adapters=False),
    Architecture(
        "sd1-wide",  # the first level of the real one: heads 40 wide
        unet(
            model_channels=320,
            mult=[1],
            res=[1],
            depth=[1],
            depth_out=[1, 1],
            middle=1,
            context=64,
            linear=False,
        ),
        modules=False,
        sizes=((4, 4), (5, 3), (4, 6)),
        all_adapters=False,
    ),
    Architecture(
        "sd2",
        unet(
            model_channels=64,
            mult=[1, 2, 4],
            res=[2, 2, 2],
            depth=[1, 1, 1, 1, 0, 0],
            depth_out=[1, 1, 1, 1, 1, 1, 0, 0, 0],
            middle=1,
            context=64,
            linear=True,
        ),
        modules=False,
    ),
    Architecture(
        "sdxl",
        _xl([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], 2),
        control=True,
        diffusers=True,
    ),
    Architecture(
        "sdxl-refiner",
        unet(
            model_channels=64,
            mult=[1, 2, 4, 4],
            res=[2, 2, 2, 2],
            depth=[0, 0, 2, 2, 2, 2, 0, 0],
            depth_out=[0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0],
            middle=2,
            context=80,
            linear=True,
            adm=80,
        ),
        modules=False,
        all_adapters=False,
    ),
    Architecture("ssd1b", _xl([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 3, 2, 2], -1), modules=False, all_adapters=False),
    Architecture("koala-700m", _xl([0, 1, 2], [0, 0, 1, 1, 2, 2], -2, res=1), modules=False, all_adapters=False),
    Architecture("koala-1b", _xl([0, 1, 3], [0, 0, 1, 1, 3, 3], 3, res=1), modules=False, all_adapters=False),
)

FULL: tuple[Architecture, ...] = (
    Architecture(
        "sd15",
        _sd1(model_channels=320, context=768),
        diffusers=True,
        modules=False,
        sizes=((16, 16), (17, 13), (16, 16)),
    ),
    Architecture(
        "sdxl",
        _xl(
            [0, 0, 2, 2, 10, 10],
            [0, 0, 0, 2, 2, 2, 10, 10, 10],
            10,
            model_channels=320,
            context=2048,
            adm=2816,
        ),
        diffusers=True,
        modules=False,
        sizes=((16, 16), (17, 13), (16, 16)),
    ),
)
