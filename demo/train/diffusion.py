"""Noise schedule, training loss and a sampler for checking by eye.

What it is: Stable Diffusion's scaled-linear schedule, eps-prediction, DPM++ 2M on sigmas.
What it is not: the demo's sampler; that runs in the TypeScript client (`demo/sampler.ts`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, 0).float()
SIGMAS = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()


def loss(model: Callable[[Tensor, Tensor, Tensor], Tensor], clean: Tensor, context: Tensor) -> Tensor:
    """eps-prediction error with min-SNR weighting, gamma 5 (Hang et al. 2023, arXiv:2303.09556)."""
    # One stratum of the timesteps for each row: less variance than independent draws.
    rows = clean.shape[0]
    t = ((torch.arange(rows) + torch.rand(rows)) * (STEPS / rows)).long().clamp_max(STEPS - 1)
    bar = ALPHA_BAR[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(bar.sqrt() * clean + (1 - bar).sqrt() * noise, t, context)
    snr = ALPHA_BAR[t] / (1 - ALPHA_BAR[t])
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    return (error * snr.clamp_max(5) / snr).mean()


def schedule(steps: int) -> tuple[Tensor, Tensor]:
    """(timesteps [steps], sigmas [steps + 1] ending in 0): evenly spaced in t, 999 to 0."""
    t = torch.linspace(STEPS - 1, 0, steps).round()
    return t, torch.cat([SIGMAS[t.long()], torch.zeros(1)])


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    empty: Tensor,
    seed: int,
    steps: int = 20,
    guidance: float = 3.0,
    size: int = 32,
) -> Tensor:
    """context [N, T, D], empty [T, D] -> pictures [N, 3, size, size] in [-1, 1]; DPM++ 2M (arXiv:2211.01095)."""
    rows = context.shape[0]
    timesteps, sigmas = schedule(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, size, size, generator=generator) * sigmas[0]
    both = torch.cat([context, empty.expand_as(context)])
    previous: Tensor | None = None
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        scaled = x / (sigma**2 + 1).sqrt()
        eps = model(torch.cat([scaled, scaled]), timesteps[i].expand(2 * rows), both)
        conditional, free = eps.chunk(2)
        clean = x - sigma * (free + guidance * (conditional - free))
        clean = clean.clamp(-1.5, 1.5)
        if following == 0:
            return clean.clamp(-1, 1)
        h = (sigma / following).log()
        slope = clean
        if previous is not None:
            ratio = (sigmas[i - 1] / sigma).log() / h
            slope = (1 + 1 / (2 * ratio)) * clean - previous / (2 * ratio)
        x = following / sigma * x - torch.expm1(-h) * slope
        previous = clean
    return x
