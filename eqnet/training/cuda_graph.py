"""The gradients of a supernet step as one CUDA graph: thousands of small kernels are started by one call.

On a GPU, the kernels of a small network take less time than their launches, and a supernet step has three subnets of them.
What differs from step to step is copied into tensors that stay where they are: images, targets, and the row that every
quantizer takes in every subnet. So one graph serves every config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from eqnet.nn.supernet import Supernet
from eqnet.space import QuantConfig

# (model, images, targets, configs or their rows) -> loss parts; accumulates the gradients of a step
Gradients = Callable[[nn.Module, Tensor, Tensor, Sequence[QuantConfig | Tensor]], dict[str, Tensor]]
WARM_UP_STEPS = 3  # in which libraries choose and compile their kernels, and allocate what they keep


class GraphedGradients:
    """Calls `compute` for the first steps, then records it, and from then on replays the record.

    Replaying does what the calls would do, kernel for kernel. Every step has images and targets of the same shapes.

    Args:
        supernet: on a CUDA device; its configs are switched.
        compute: launches kernels only: it never reads a value back, and starts from gradients that are None.
    """

    def __init__(self, supernet: Supernet, compute: Gradients) -> None:
        self.supernet, self.compute = supernet, compute
        self.steps = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, configs: Sequence[QuantConfig]
    ) -> dict[str, Tensor]:
        """As `compute`; the parts stay valid until the next call."""
        rows = torch.tensor([self.supernet.rows(config) for config in configs]).pin_memory()
        if self._graph is None:
            rows = rows.to(images.device, non_blocking=True)
            if self.steps < WARM_UP_STEPS:
                parts = self._warm_up(model, images, targets, rows)
                self.steps += 1
                self.supernet.config = configs[-1]
                return parts
            self._record(model, images, targets, rows)
        assert self._graph is not None
        for kept, new in zip(self._inputs, (images, targets, rows), strict=True):
            kept.copy_(new, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self.steps += 1
        self.supernet.config = configs[-1]
        return self._parts

    def _warm_up(self, model: nn.Module, images: Tensor, targets: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """A step as it is, on the side stream that graphs have to be recorded on."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            parts = self.compute(model, images, targets, list(rows))
        current.wait_stream(self._stream)
        return parts

    def _record(self, model: nn.Module, images: Tensor, targets: Tensor, rows: Tensor) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        self._inputs = [tensor.clone() for tensor in (images, targets, rows)]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            kept_images, kept_targets, kept_rows = self._inputs
            self._parts = self.compute(model, kept_images, kept_targets, list(kept_rows))
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
