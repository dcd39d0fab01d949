"""A custom node of the tests alone: conditioning made of seeded noise, so that no text encoder need be loaded."""

from __future__ import annotations

from typing import Any

import torch


class TestConditioning:
    """CONDITIONING of `tokens` vectors of `width` numbers, and a pooled vector where `pooled` is its width."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "tokens": ("INT", {"default": 77, "min": 1, "max": 1024}),
                "width": ("INT", {"default": 768, "min": 1, "max": 4096}),
                "pooled": ("INT", {"default": 0, "min": 0, "max": 4096}),
            }
        }

    def make(self, seed: int, tokens: int, width: int, pooled: int) -> tuple[list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[context, extra]],)


NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning}
