"""A small UNet of the Stable Diffusion 1.x family, in plain PyTorch.

What it is: the layer layout, the arithmetic and the checkpoint key names of the latent-diffusion
`UNetModel` (spatial transformers with 1x1-conv projections, eight heads, GEGLU), sized for a CPU.
What it is not: a general UNet. No `y`, no ControlNet inputs, no scale-shift norm, one transformer
block per attention layer.

Sources for the layout: Rombach et al. 2022 (arXiv:2112.10752), Ho et al. 2020 (arXiv:2006.11239).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """`attention_levels` are indices into `channel_mult`; the middle block always attends."""

    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: int = 1
    attention_levels: tuple[int, ...] = (1, 2)
    num_heads: int = 8
    context_dim: int = 64

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[N] -> [N, dim]: cosines first, then sines, as the latent-diffusion code orders them."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero(module: nn.Module) -> nn.Module:
    """A residual branch that starts as a no-op trains more calmly."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group norm as a layer norm over each group: the same numbers, and on a CPU four times as fast backwards."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(32, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        normal = F.layer_norm(groups, groups.shape[-1:], eps=self.eps).view_as(x)
        # In the input's dtype, or autocast would carry float32 from here on.
        scale, shift = (p.to(x.dtype)[:, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(shift, normal, scale)


class ResBlock(nn.Module):
    """x [N, C, H, W], emb [N, E] -> [N, C', H, W]."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(channels, 1e-5), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        # Index 2 is where the original has its dropout: the conv must be `out_layers.3`.
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels, 1e-5),
            nn.SiLU(),
            nn.Identity(),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """x [N, L, C] attends to context [N, T, D], or to itself when there is none."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        # Written out: PyTorch's fused CPU attention takes a third of a training step at these head widths.
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1, dtype=q.dtype)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (height, -1)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Block(nn.Sequential):
    """One numbered entry of `input_blocks` / `output_blocks`: hands each layer what it needs."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """x [N, C, H, W], timesteps [N], context [N, T, D] -> predicted noise [N, C, H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base = config.model_channels
        emb = base * 4

        def attend(level: int, channels: int) -> list[nn.Module]:
            if level not in config.attention_levels:
                return []
            return [SpatialTransformer(channels, config.context_dim, config.num_heads)]

        self.time_embed = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, base, 3, padding=1))])
        skips, channels = [base], base
        last = len(config.channel_mult) - 1
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                width = base * mult
                self.input_blocks.append(Block(ResBlock(channels, emb, width), *attend(level, width)))
                channels = width
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Block(
            ResBlock(channels, emb, channels),
            SpatialTransformer(channels, config.context_dim, config.num_heads),
            ResBlock(channels, emb, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                width = base * mult
                layers = [ResBlock(channels + skips.pop(), emb, width), *attend(level, width)]
                if level > 0 and index == config.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
                channels = width

        self.out = nn.Sequential(
            GroupNorm(channels, 1e-5),
            nn.SiLU(),
            zero(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels))
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)
