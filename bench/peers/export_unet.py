"""A UNet as ComfyUI defines it as an ONNX graph: python export_unet.py CHECKPOINT ARCHITECTURE SIZE OUT.

The weights stay in the safetensors checkpoint: the graph points into it, so both engines read the same bytes and no
copy takes up the disk. Attention becomes onnxruntime's fused MultiHeadAttention, the fastest way it has. Measures
nothing.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "test/reference"))

import comfy_unet  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from architectures import FULL  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

OPSET = 17
PREFIX = "unet."


class FusedAttention(torch.autograd.Function):
    """q, k, v as [N, T, heads * D]."""

    @staticmethod
    def forward(ctx: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        return torch.empty_like(q)

    @staticmethod
    def symbolic(g: Any, q: Any, k: Any, v: Any, heads: int) -> Any:  # noqa: ANN401 - the exporter's own types
        out = g.op("com.microsoft::MultiHeadAttention", q, k, v, num_heads_i=heads)
        return out.setType(q.type())


class Fixed(torch.nn.Module):
    """The UNet with the arguments of its forward in order."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.unet(x, timesteps=timesteps, context=context, y=y, control=None, transformer_options={})


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *_: object, **__: object) -> torch.Tensor:
    return FusedAttention.apply(q, k, v, heads)


def dtype_of(architecture: str) -> torch.dtype:
    """SDXL in float32 would take 20 GB: once as the driver has it and once as onnxruntime keeps it."""
    return torch.float16 if architecture == "sdxl" else torch.float32


def export(architecture: str, size: int, path: Path) -> None:
    """The graph alone: weights are inputs called after their checkpoint keys."""
    comfy_unet.comfy_attention.optimized_attention = attention
    comfy_unet.comfy_attention.optimized_attention_masked = attention
    arguments = next(one.arguments for one in FULL if one.name == architecture)
    unet = comfy_unet.build(arguments)
    dtype = dtype_of(architecture)
    for i, (name, shape) in enumerate(comfy_unet.manifest_of(unet).items()):
        # Tracing runs the model. One number of many shapes takes no memory; equal numbers would become one weight.
        comfy_unet.place(unet, name, torch.full((1,), (i + 1) / 4096, dtype=dtype).expand(shape))
    inputs = {
        "x": torch.empty(1, arguments["in_channels"], size, size, dtype=dtype),
        "timesteps": torch.empty(1),
        "context": torch.empty(1, 77, arguments["context_dim"], dtype=dtype),
    }
    if arguments["adm_in_channels"]:
        inputs["y"] = torch.empty(1, arguments["adm_in_channels"], dtype=dtype)
    torch.onnx.export(
        Fixed(unet),
        tuple(inputs.values()),
        path,
        dynamo=False,
        export_params=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=["out"],
        custom_opsets={"com.microsoft": 1},
        do_constant_folding=False,
    )


def point_at(checkpoint: Path, path: Path, dtype: torch.dtype) -> None:
    """Makes the weights initializers in the checkpoint, f16 there; onnxruntime casts them when it loads."""
    to = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
    with checkpoint.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    model = onnx.load(path)
    graph = model.graph
    casts: list[onnx.NodeProto] = []
    for value in [value for value in graph.input if value.name.startswith(PREFIX)]:
        entry = header[value.name.removeprefix(PREFIX)]
        begin, end = entry["data_offsets"]
        stored = TensorProto(name=f"{value.name}.f16", data_type=TensorProto.FLOAT16, dims=entry["shape"])
        stored.data_location = TensorProto.EXTERNAL
        facts = {"location": checkpoint.name, "offset": 8 + length + begin, "length": end - begin}
        for key, fact in facts.items():
            stored.external_data.add(key=key, value=str(fact))
        graph.initializer.append(stored)
        casts.append(helper.make_node("Cast", [stored.name], [value.name], to=to))
        graph.input.remove(value)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


if __name__ == "__main__":
    _, checkpoint, architecture, size, out = sys.argv
    partial = Path(f"{out}.part")
    export(architecture, int(size), partial)
    point_at(Path(checkpoint), partial, dtype_of(architecture))
    partial.rename(out)
