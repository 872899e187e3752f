"""Small ONNX graphs of QuantizeLinear and DequantizeLinear nodes for the tests of deployment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
ELEMENTS = {"int4": TensorProto.INT4, "int2": TensorProto.INT2}
NARROW = {"int4": ml_dtypes.int4, "int2": ml_dtypes.int2}


class Graph:
    """Collects nodes and initializers; every value has the name of the node that makes it."""

    def __init__(self, opset: int = 21) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, name: str, array: Array | float, container: str = "") -> str:
        if container in ELEMENTS:
            tensor = numpy_helper.from_array(np.asarray(array).astype(NARROW[container]), name)
        else:
            tensor = numpy_helper.from_array(np.asarray(array), name)
        self.initializers.append(tensor)
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def quantize(self, x: str, name: str, scale: float, zero: int, dtype: Any = np.uint8, clip: Any = None) -> str:
        """Q, (Clip,) DQ; the value of the DQ."""
        s, z = self.constant(f"{name}_s", np.float32(scale)), self.constant(f"{name}_z", np.array(zero, dtype))
        codes = self.node("QuantizeLinear", [x, s, z], f"{name}_q")
        if clip is not None:
            bounds = [self.constant(f"{name}_{end}", np.array(v, dtype)) for end, v in zip("lh", clip, strict=True)]
            codes = self.node("Clip", [codes, *bounds], f"{name}_c")
        return self.node("DequantizeLinear", [codes, s, z], f"{name}_dq")

    def weight(
        self,
        name: str,
        codes: Array,
        scale: Array | float,
        zero: Array | None = None,
        axis: int = 0,
        container: str = "",
    ) -> str:
        """Integer initializer, DQ; the value of the DQ."""
        c = self.constant(f"{name}_codes", codes, container)
        s = self.constant(f"{name}_s", np.asarray(scale, np.float32))
        inputs = [c, s]
        if zero is not None:
            inputs.append(self.constant(f"{name}_z", np.asarray(zero, codes.dtype), container))
        attributes = {"axis": axis} if np.size(scale) > 1 else {}
        return self.node("DequantizeLinear", inputs, f"{name}_dq", **attributes)

    def model(self, size: Sequence[Any], output: str, out_type: int = TensorProto.FLOAT) -> ModelProto:
        """The model with one input `x` of this size."""
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(size))],
            [helper.make_tensor_value_info(output, out_type, None)],
            self.initializers,
        )
        ir_version = {21: 10, 25: 13}.get(self.opset, 10)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)
