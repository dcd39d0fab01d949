"""The cases of an architecture: which inputs go in, which LoRA stack each row carries. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from architectures import Architecture

Stack = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Case:
    """Inputs are generated from the names `@<inputs>/x`, `/context`, `/y`, `/control/...`."""

    name: str
    inputs: str
    batch: int
    size: tuple[int, int]
    tokens: int
    timesteps: tuple[float, ...]
    control: bool = False
    #: One stack per row; empty where no row has a LoRA.
    adapters: tuple[Stack, ...] = ()
    captures: bool = False
    #: The case without LoRA that has the same inputs.
    base: str | None = None

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        arguments = arch.arguments
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.batch, arguments["in_channels"], *self.size),
            "context": (self.batch, self.tokens, arguments["context_dim"]),
        }
        if arguments["adm_in_channels"] is not None:
            shapes["y"] = (self.batch, arguments["adm_in_channels"])
        return shapes


STACK: Stack = (("style", 0.6), ("locon", -0.4), ("subject", 1.1))
ROWS: tuple[Stack, ...] = (
    (),
    (("peft", 1.0),),
    (("style", 1.5), ("processor", -0.75)),
    (("locon", 0.6), ("subject", 0.5), ("peft", -0.3), ("generic", 1.2)),
)
FEW_ROWS: tuple[Stack, ...] = ((), (("style", 1.5),), (("locon", -0.5),), STACK)
SINGLES: dict[str, float] = {
    "style": 1.0,
    "locon": 0.5,
    "subject": 1.0,
    "peft": -0.8,
    "processor": 1.5,
    "generic": 1.25,
}


def small_cases(arch: Architecture) -> list[Case]:
    base_size, odd_size, four_size = arch.sizes
    base = {"batch": 1, "size": base_size, "tokens": 13, "timesteps": (601.0,)}
    four = {"batch": 4, "size": four_size, "tokens": 77, "timesteps": (1.0, 250.0, 500.75, 999.0)}
    out = [
        Case("base", "base", captures=True, **base),
        Case("odd", "odd", 2, odd_size, 5, (981.25, 3.5)),
        Case("four", "four", **four),
    ]
    if arch.control:
        out.append(Case("control", "control", 2, base_size, 7, (700.0, 123.0), control=True))
    names = list(SINGLES) if arch.all_adapters else ["style", "locon"]
    for name in names:
        out.append(Case(f"lora/{name}", "base", adapters=(((name, SINGLES[name]),),), base="base", **base))
    out.append(Case("lora/stack", "base", adapters=(STACK,), base="base", **base))
    rows = ROWS if arch.all_adapters else FEW_ROWS
    out.append(Case("lora/rows", "four", adapters=rows, base="four", **four))
    return out


def full_cases(arch: Architecture) -> list[Case]:
    """One stack only, last: it is merged in place."""
    base_size, odd_size, _ = arch.sizes
    base = {"batch": 2, "size": base_size, "tokens": 77, "timesteps": (801.0, 37.5)}
    stack: Stack = (("style", 0.6), ("locon", -0.35))
    return [
        Case("base", "base", captures=True, **base),
        Case("odd", "odd", 2, odd_size, 77, (981.25, 3.5)),
        Case("lora/stack", "base", adapters=(stack, stack), base="base", **base),
    ]


def control_lists(case: Case, output_shapes: dict[str, tuple[int, ...]]) -> dict[str, list[dict[str, Any] | None]]:
    """ControlNet residuals as ComfyUI holds them: every list is consumed with pop(), from its end.

    So input[-1] is added to input_blocks.0's output, output[-1] to the first skip that output_blocks.0 takes (the last
    input block's), middle[-1] to the middle. Input lists of ComfyUI are normally empty beside output lists (T2I-Adapter
    fills input, ControlNet output and middle); here all three are filled, with holes.
    """
    inputs = sum(1 for path in output_shapes if path.startswith("input_blocks.") and path.count(".") == 1)

    def entry(kind: str, order: int, block: int, hole: bool) -> dict[str, Any] | None:
        shape = (case.batch, *output_shapes[f"input_blocks.{block}"][1:])
        return None if hole else {"name": f"@{case.inputs}/control/{kind}/{order}", "shape": list(shape)}

    # `order` counts in the order of consumption; the lists run the other way.
    into_input = [entry("input", i, i, i % 3 != 1) for i in range(inputs - 2)]
    into_output = [entry("output", i, inputs - 1 - i, i % 4 == 2) for i in range(inputs)]
    middle = [entry("middle", 0, inputs - 1, False)]
    return {"input": into_input[::-1], "middle": middle, "output": into_output[::-1]}
