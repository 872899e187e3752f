"""The kernels of the fused quantizer as compiled code: inductor on the formulas of `kernels.py`, without guards.

Everything that a config changes is a tensor, so one compilation serves every layer and every format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from eqnet.nn.kernels import (
    EAGER,
    Formats,
    Grid,
    Kernels,
    Moments,
    backward_pass,
    code_pass,
    forward_pass,
    moments,
    moments_gradient,
)

CompileMode = Literal["auto", "on", "off"]
_SIZE_HINT = 1024  # added to sizes while compiling


def _kind(leaf: Any) -> Any:
    """What compiled code depends on: everything but the sizes and values of a tensor."""
    return (leaf.dtype, leaf.device, *(n == 1 for n in leaf.shape)) if isinstance(leaf, Tensor) else leaf


def _compile(function: Callable[..., Any], leaves: Sequence[Any]) -> Callable[..., Sequence[Tensor]]:
    """Inductor's code for a function with arguments of a kind, for all sizes; takes the tensors among the arguments.

    The sizes here are only hints: large, so that the code is parallel, and equal only where those of the arguments are.
    """
    import torch._inductor  # slow imports
    from torch._functorch import config as functorch_config
    from torch.fx.experimental import _config as fx_config
    from torch.fx.experimental.proxy_tensor import make_fx

    def on_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        return tuple(function(*(next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves)))

    examples = [
        torch.empty([n if n == 1 else n + _SIZE_HINT for n in leaf.shape], dtype=leaf.dtype, device=leaf.device)
        for leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    device = examples[0].device.type
    with (
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        fx_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        functorch_config.patch(enable_autograd_cache=False),
    ):
        graph = make_fx(on_tensors, tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        for node in graph.graph.nodes:
            node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}  # the rest defeats inductor's cache
        options = {"eager_numerics.division_rounding": True}  # x / s as IEEE says, as in eager mode
        return torch._inductor.compile(graph, inputs, options=options)  # type: ignore[no-any-return]


def _compiled(function: Callable[..., Any]) -> Callable[..., Sequence[Tensor]]:
    """A function of tensors and constants through inductor, compiled once for each kind of arguments and number of threads.

    It is called as it is: the guards of `torch.compile` would take longer than a kernel on a small tensor.
    """
    variants: dict[Any, Callable[..., Sequence[Tensor]]] = {}

    def call(*leaves: Any) -> Sequence[Tensor]:
        kind = (torch.get_num_threads(), *map(_kind, leaves))
        run = variants.get(kind)
        if run is None:
            run = variants[kind] = _compile(function, leaves)
        return run(*(leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)))

    return call


@functools.cache
def compiled_kernels() -> Kernels:
    """The kernels through inductor: one generated loop each (C++ on CPU, Triton on CUDA), for all formats and shapes."""

    def flat_forward(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype, *formats: Tensor) -> Any:
        out, grid = forward_pass(x, scale, zero_point, Formats(*formats), dtype)
        return out, *grid

    def flat_codes(x: Tensor, scale: Tensor, zero_point: Tensor, *formats: Tensor) -> Any:
        out, grid = code_pass(x, scale, zero_point, Formats(*formats))
        return out, *grid

    def flat_backward(u: Tensor, x: Tensor, scale: Tensor, *rest: Tensor) -> Any:
        count = len(Formats._fields)
        return backward_pass(u, x, scale, Formats(*rest[:count]), Grid(*rest[count:]))

    def flat_moments_gradient(w: Tensor, *rest: Tensor) -> Any:
        return (moments_gradient(w, Moments(*rest[:-2]), *rest[-2:]),)

    run_forward, run_codes, run_backward = (_compiled(f) for f in (flat_forward, flat_codes, flat_backward))
    run_moments, run_moments_gradient = _compiled(moments), _compiled(flat_moments_gradient)

    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor, formats: Formats, dtype: torch.dtype
    ) -> tuple[Tensor, Grid]:
        out, *grid = run_forward(x, scale, zero_point, dtype, *formats)
        return out, Grid(*grid)

    def codes(x: Tensor, scale: Tensor, zero_point: Tensor, formats: Formats) -> tuple[Tensor, Grid]:
        out, *grid = run_codes(x, scale, zero_point, *formats)
        return out, Grid(*grid)

    def backward(u: Tensor, x: Tensor, scale: Tensor, formats: Formats, grid: Grid) -> tuple[Tensor, Tensor]:
        grad_x, grad_scale = run_backward(u, x, scale, *formats, *grid)
        return grad_x, grad_scale

    def of_moments(w: Tensor, m: Moments, grad_skewness: Tensor, grad_kurtosis: Tensor) -> Tensor:
        # float64 without dimensions would count as Python numbers, whose values are compiled in
        numbers = (number.reshape(1) for number in (*m, grad_skewness, grad_kurtosis))
        return run_moments_gradient(w, *numbers)[0]

    return Kernels(forward, codes, backward, lambda w: Moments(*run_moments(w)), of_moments)


def traced_kernels() -> Kernels:
    """The kernels for a network that is compiled as a whole: plain operations, so that they fuse with their neighbours."""
    return compiled_kernels()._replace(forward=forward_pass, backward=backward_pass)


def choose_kernels(mode: CompileMode, device: torch.device) -> Kernels:
    """The kernels for a device: compiled, eager, or compiled where that works.

    Args:
        mode: "on", "off" or "auto".
        device: where they will run; "on" and "auto" compile and run one of them there.

    Raises:
        ValueError: `mode` is "on" and there is no working compiler.
    """
    if mode == "off":
        return EAGER
    try:
        index, column = torch.zeros(5, 1, dtype=torch.int64, device=device), torch.ones(5, 1, device=device)
        formats = Formats(index, torch.ones(2, 5, 2, device=device), column, index[0], index[0])
        table = torch.ones(5, device=device)
        compiled_kernels().forward(torch.ones(3, 7, device=device), table, table, formats, table.dtype)
    except Exception as error:  # a compiler that is missing, too old or broken fails in many ways
        if mode == "on":
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"train.compile=on, but the quantizers cannot be compiled for {device.type} ({reason}); install a C++ "
                "compiler (CPU) or Triton (CUDA), or set train.compile=off."
            ) from error
        return EAGER
    return compiled_kernels()
