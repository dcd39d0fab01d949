"""Writes `demo/assets/reference.safetensors`: what PyTorch makes of the files beside it.

What it is: a small fixture, float32 arithmetic on the F16 values in the files, for checking another
implementation; and, with `--sheet`, a contact sheet of every style to look at.
What it is not: training. It reads only `demo/assets`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import data
import diffusion
import lora
from train import ADAPTERS, PREFIX, tile
from unet import UNet, UNetConfig

ASSETS = Path(__file__).parent.parent / "assets"

STACK = (("ink", 0.7), ("neon", -0.3))
"""The one stack in the fixture; its tensor is `out.stack`, its strengths are in the metadata."""

SHEET = (
    (), (("ink", 1.0),), (("neon", 1.0),), (("terracotta", 1.0),), (("ink", 0.5),),
    (("neon", 0.6), ("terracotta", 0.6)), STACK, (("terracotta", -0.6),),
)  # fmt: skip


def prompt(table: dict[str, Tensor], subject: str, ground: str) -> Tensor:
    """Context [T, D] of "subject on ground"."""
    return torch.cat([table[f"subject.{subject}"], table[f"ground.{ground}"]]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--sheet", type=Path, help="also sample every style and write this PNG")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    checkpoint = args.assets / "models/emoji-unet.safetensors"
    base = {key.removeprefix(PREFIX): value for key, value in load_file(checkpoint).items()}
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    table = load_file(args.assets / "prompts.safetensors")
    adapters = {name: load_file(args.assets / f"loras/{name}.safetensors") for name in ADAPTERS}

    def model(stack: tuple[tuple[str, float], ...]) -> UNet:
        unet = UNet(UNetConfig(channel_mult=(1, 1, 1))).requires_grad_(False)
        unet.load_state_dict(lora.merged(base, [(adapters[name], strength) for name, strength in stack]))
        return unet

    x = torch.randn(2, 3, data.SIZE, data.SIZE, generator=torch.Generator().manual_seed(5))
    timesteps = torch.tensor([601.0, 37.0])
    context = torch.stack([prompt(table, "rocket", "night"), prompt(table, "apple", "mint")])
    tensors = {"x": x, "timesteps": timesteps, "context": context, "out": model(())(x, timesteps, context)}
    for name in ADAPTERS:
        tensors[f"out.{name}"] = model(((name, 1.0),))(x, timesteps, context)
    tensors["out.stack"] = model(STACK)(x, timesteps, context)
    stack = ",".join(f"{name}:{strength}" for name, strength in STACK)
    fixture = args.assets / "reference.safetensors"
    save_file(tensors, fixture, {"stack": stack, "license": metadata["license"]})
    fixture.chmod(0o644)
    for name, tensor in tensors.items():
        apart = (tensor - tensors["out"]).square().mean().sqrt() if name.startswith("out") else None
        print(f"{name}: {list(tensor.shape)}" + (f", rms from base {apart:.4f}" if apart is not None else ""))

    if args.sheet:
        words = ["apple", "cat", "rocket", "sunflower", "penguin", "house", "fish", "heart", "mushroom", "car"]
        grounds = list(data.GROUNDS)
        contexts = torch.stack([prompt(table, w, grounds[i % len(grounds)]) for i, w in enumerate(words)])
        rows = [
            diffusion.sample(model(stack), contexts, table["empty"].float(), seed=11, guidance=args.guidance)
            for stack in SHEET
        ]
        tile(torch.cat(rows), len(words), args.sheet)


if __name__ == "__main__":
    main()
