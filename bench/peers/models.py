"""ONNX graphs of single kernels: python models.py OP DATA OUT REPEATS HEADS.

Weights come from the safetensors file DATA, and its other tensors are the inputs. REPEATS chains the kernel. Measures
nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from contend import tensors_of
from onnx import NodeProto, TensorProto, helper, numpy_helper

Build = Callable[[str, str], list[NodeProto]]
GROUPS = 32


def main(op: str, data: str, out: str, repeats: int, heads: int) -> None:
    tensors = tensors_of({"data": data})
    names = [name for name in ("w", "bias", "gamma", "beta") if name in tensors]
    weights: dict[str, npt.NDArray[Any]] = {name: tensors.pop(name) for name in names}
    first = "q" if op == "attention" else "x"
    shape = list(tensors[first].shape)
    if op == "gemm":
        shape[-1] = weights["w"].shape[1]
    if op == "group norm":
        # As PyTorch exports it: instance norm over the groups, then the affine.
        weights = {name: values.reshape(-1, 1, 1) for name, values in weights.items()}
        weights |= {"ones": np.ones(GROUPS, np.float32), "zeros": np.zeros(GROUPS, np.float32)}
        weights |= {"grouped": np.array([0, GROUPS, -1], np.int64), "whole": np.array(shape, np.int64)}

    def group_norm(x: str, y: str) -> list[NodeProto]:
        return [
            helper.make_node("Reshape", [x, "grouped"], [f"{y}.grouped"]),
            helper.make_node("InstanceNormalization", [f"{y}.grouped", "ones", "zeros"], [f"{y}.normed"], epsilon=1e-5),
            helper.make_node("Reshape", [f"{y}.normed", "whole"], [f"{y}.whole"]),
            helper.make_node("Mul", [f"{y}.whole", "gamma"], [f"{y}.scaled"]),
            helper.make_node("Add", [f"{y}.scaled", "beta"], [y]),
        ]

    builds: dict[str, Build] = {
        "gemm": lambda x, y: [helper.make_node("MatMul", [x, "w"], [y])],
        "conv": lambda x, y: [helper.make_node("Conv", [x, "w", "bias"], [y], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        "attention": lambda x, y: [
            helper.make_node("MultiHeadAttention", [x, "k", "v"], [y], domain="com.microsoft", num_heads=heads)
        ],
        "group norm": group_norm,
    }
    chain = [first, *(f"between.{i}" for i in range(1, repeats)), "out"]
    nodes = [node for x, y in itertools.pairwise(chain) for node in builds[op](x, y)]
    graph = helper.make_graph(
        nodes,
        op,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name, values in tensors.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), out)


if __name__ == "__main__":
    _, op, data, out, repeats, heads = sys.argv
    main(op, data, out, int(repeats), int(heads))
