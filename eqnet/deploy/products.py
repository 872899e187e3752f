"""The operations of quantized layers on arrays: convolutions and matrix products as ONNX defines them, exact on whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # what a quantized layer is in the graph
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute of a node, or its default; texts as str."""
    from onnx import helper

    for a in node.attribute:
        if a.name == name:
            value = helper.get_attribute_value(a)
            return value.decode() if isinstance(value, bytes) else value
    return default


def channel_axis(node: Any, ndim: int) -> int:
    """Axis of the output channels of a weight."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return ndim - 1 if node.op_type == "MatMul" else 1


def product(node: Any, x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """The operation of a node without bias on float64 numbers; exact on integers."""
    if node.op_type == "MatMul":
        return np.asarray(np.matmul(x, w))
    if node.op_type == "Gemm":
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            raise ValueError(f"node {node.name!r}: the integer reference has no Gemm with alpha, beta or transA.")
        return np.asarray(x @ (w.T if attribute(node, "transB", 0) else w))
    dims = x.ndim - 2
    stride, dilation = (list(attribute(node, a, [1] * dims)) for a in ("strides", "dilations"))
    group = attribute(node, "group", 1)
    images, kernel = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, w))
    if node.op_type == "Conv":
        begin, end = padding(node, x.shape[2:], w.shape[2:], stride, dilation)
        if begin != end:
            images = F.pad(images, [p for pair in zip(begin[::-1], end[::-1], strict=True) for p in pair])
            begin = [0] * dims
        return _CONV[dims](images, kernel, None, stride, begin, dilation, group).numpy()
    if attribute(node, "output_shape", None) or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        raise ValueError(f"node {node.name!r}: the integer reference needs explicit pads of a ConvTranspose.")
    pads = list(attribute(node, "pads", [0] * 2 * dims))
    extra = list(attribute(node, "output_padding", [0] * dims))
    full = _CONV_TRANSPOSE[dims](images, kernel, None, stride, 0, extra, group, dilation).numpy()
    cut = [slice(pads[d], full.shape[2 + d] - pads[dims + d]) for d in range(dims)]
    return np.asarray(full[(slice(None), slice(None), *cut)])


def padding(
    node: Any, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding at the beginning and the end of each dimension."""
    dims, auto = len(size), attribute(node, "auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = list(attribute(node, "pads", [0] * 2 * dims)) if auto == "NOTSET" else [0] * 2 * dims
        return pads[:dims], pads[dims:]
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    small = [t // 2 for t in total]
    large = [t - s for t, s in zip(total, small, strict=True)]
    return (small, large) if auto == "SAME_UPPER" else (large, small)
