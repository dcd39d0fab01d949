"""Trains the demo's UNet, prompt table and three LoRAs, and writes `demo/assets`.

What it is: one command, CPU only, no network; see README.md beside it for the run that made the
files. What it is not: a general trainer.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import data
import diffusion
import lora
from unet import UNet, UNetConfig

TOKENS = 2
"""Context tokens per prompt word; a prompt is a subject word and a ground word, so T = 4."""

PREFIX = "model.diffusion_model."

ADAPTERS = {
    "ink": {"rank": 8, "alpha": 8.0, "convs": True},
    "neon": {"rank": 8, "alpha": 8.0, "convs": True},
    "terracotta": {"rank": 16, "alpha": 16.0, "convs": False},
}

METADATA = {
    "format": "pt",
    "license": "MIT",
    "attribution": "Trained on Fluent Emoji (flat), Copyright (c) Microsoft Corporation, MIT licence, "
    "https://github.com/microsoft/fluentui-emoji, as packaged in @iconify-json/fluent-emoji-flat 1.2.6.",
}


class Prompts(nn.Module):
    """The trained prompt table: what a text encoder would be in the full-size family."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.subject = nn.Parameter(torch.randn(len(data.SUBJECTS), TOKENS, dim))
        self.ground = nn.Parameter(torch.randn(len(data.GROUNDS), TOKENS, dim))
        self.empty = nn.Parameter(torch.randn(2 * TOKENS, dim))

    def forward(self, subject: Tensor, ground: Tensor, drop: Tensor) -> Tensor:
        """[N], [N], bool [N] -> context [N, 2 * TOKENS, dim]."""
        full = torch.cat([self.subject[subject], self.ground[ground]], dim=1)
        return torch.where(drop[:, None, None], self.empty, full)

    def to_file(self) -> dict[str, Tensor]:
        rows = {f"subject.{word}": self.subject[i] for i, word in enumerate(data.SUBJECTS)}
        rows |= {f"ground.{word}": self.ground[i] for i, word in enumerate(data.GROUNDS)}
        rows["empty"] = self.empty
        return {key: row.detach().half().contiguous() for key, row in rows.items()}


def save(path: Path, tensors: dict[str, Tensor], **extra: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, METADATA | extra)
    path.chmod(0o644)  # safetensors creates files that only their owner reads
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def fit(
    name: str,
    model: UNet,
    prompts: Prompts,
    parameters: list[nn.Parameter],
    pictures: Tensor,
    bank: data.Bank,
    args: argparse.Namespace,
    steps: int,
    rate: float,
    average: list[nn.Module],
) -> None:
    """AdamW with a warm-up and a cosine; `average` lists the modules whose EMA replaces them at the end."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, betas=(0.9, 0.98))
    shadow = [copy.deepcopy(module) for module in average]
    subject, ground = torch.from_numpy(bank.subject), torch.from_numpy(bank.ground)
    state_file = args.scratch / f"{name}.pt"
    first, running = 0, 0.0
    if args.resume and state_file.exists():
        state = torch.load(state_file)
        first, running = state["step"] + 1, state["running"]
        optimiser.load_state_dict(state["optimiser"])
        for key, modules in (("modules", average), ("shadow", shadow)):
            for module, values in zip(modules, state[key], strict=True):
                module.load_state_dict(values)
        print(f"  goes on at step {first}", flush=True)
    begun = time.monotonic()
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / 60)
        optimiser.param_groups[0]["lr"] = rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        rows = torch.randint(0, len(pictures), (args.batch,))
        context = prompts(subject[rows], ground[rows], torch.rand(args.batch) < 0.12)
        loss = diffusion.loss(model, pictures[rows], context)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        keep = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for module, slow in zip(average, shadow, strict=True):
                for new, old in zip(module.parameters(), slow.parameters(), strict=True):
                    old.lerp_(new, 1 - keep)
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}/{steps} loss {running:.4f} {time.monotonic() - begun:.0f} s", flush=True)
            both = {"modules": average, "shadow": shadow}
            states = {key: [module.state_dict() for module in modules] for key, modules in both.items()}
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(states | {"step": step, "running": running, "optimiser": optimiser.state_dict()}, state_file)
    for module, slow in zip(average, shadow, strict=True):
        module.load_state_dict(slow.state_dict())


def draw(model: UNet, prompts: Prompts, path: Path) -> None:
    """Every subject once, grounds in turn."""
    subject = torch.arange(len(data.SUBJECTS))
    with torch.no_grad():
        context = prompts(subject, subject % len(data.GROUNDS), torch.zeros(len(subject), dtype=torch.bool))
        pictures = diffusion.sample(model, context, prompts.empty, seed=7)
    tile(pictures, 8, path)


def tile(pictures: Tensor, columns: int, path: Path, zoom: int = 3) -> None:
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    grid = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    image = Image.fromarray(((grid + 1) * 127.5).clip(0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def rounded(module: nn.Module) -> None:
    """The weights as the F16 file will give them back."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--icons", type=Path, required=True, help="icons.json of @iconify-json/fluent-emoji-flat")
    parser.add_argument("--assets", type=Path, default=Path(__file__).parent.parent / "assets")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/tmp/unetd-train"), help="for pictures to look at, and for --resume"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state a cut-off run left")
    parser.add_argument("--steps", type=int, default=1450)
    parser.add_argument("--lora-steps", type=int, default=560)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--copies", type=int, default=48, help="augmentations per subject")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["base", *ADAPTERS], help="what to train; the rest is loaded")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    config = UNetConfig(channel_mult=(1, 1, 1))
    bank = data.build(args.icons, args.copies, args.seed)
    model, prompts = UNet(config), Prompts(config.context_dim)
    print(f"{len(bank.base)} pictures, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    checkpoint, table = args.assets / "models/emoji-unet.safetensors", args.assets / "prompts.safetensors"
    if "base" in args.only:
        both = [*model.parameters(), *prompts.parameters()]
        fit("base", model, prompts, both, torch.from_numpy(bank.base), bank, args, args.steps, 1.5e-3, [model, prompts])
        save(checkpoint, {PREFIX + k: v.half() for k, v in model.state_dict().items()}, prediction="eps")
        save(table, prompts.to_file())
    else:
        model.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in load_file(checkpoint).items()})
        rows = load_file(table)
        with torch.no_grad():
            prompts.subject.copy_(torch.stack([rows[f"subject.{word}"] for word in data.SUBJECTS]))
            prompts.ground.copy_(torch.stack([rows[f"ground.{word}"] for word in data.GROUNDS]))
            prompts.empty.copy_(rows["empty"])
    rounded(model)
    rounded(prompts)
    prompts.requires_grad_(False)
    if "base" in args.only:
        draw(model, prompts, args.scratch / "base.png")

    for name, shape in ADAPTERS.items():
        if name not in args.only:
            continue
        print(name, flush=True)
        pairs = lora.attach(model, **shape)
        trained = [p for pair in pairs.values() for p in pair.parameters()]
        styled = torch.from_numpy(bank.styled[name])
        fit(name, model, prompts, trained, styled, bank, args, args.lora_steps, 2e-3, list(pairs.values()))
        draw(model, prompts, args.scratch / f"{name}.png")
        save(args.assets / f"loras/{name}.safetensors", lora.to_file(pairs), ss_network_module="networks.lora")
        lora.detach(model, pairs)


if __name__ == "__main__":
    main()
