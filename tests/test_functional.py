"""Fake quantization: the facts of LSQ, EQ-Net and ONNX that every other part relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eqnet.nn.functional import code_range, fake_quantize, quantize

BITS = range(2, 9)


def bounds(bits: int, signed: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    qmin, qmax = code_range(bits, signed)
    return torch.tensor(float(qmin), dtype=dtype), torch.tensor(float(qmax), dtype=dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


grids = st.fixed_dictionaries(
    {
        "scale": st.floats(2**-13, 100, width=32),
        "zero": st.floats(0, 1),  # where in the code range the zero point is
        "bits": st.integers(2, 8),
        "signed": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def values_and_grid(grid: dict) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sorted inputs well beyond the range on both sides, and (scale, zero point, qmin, qmax)."""
    scale = torch.tensor([grid["scale"]])
    x = (normal(500, seed=grid["seed"]) * 2 ** grid["bits"] * scale).sort().values
    qmin, qmax = bounds(grid["bits"], grid["signed"])
    return x, scale, (qmin + grid["zero"] * (qmax - qmin)).round().view(1), qmin, qmax


@pytest.mark.parametrize("bits", BITS)
def test_code_ranges(bits):
    assert code_range(bits, True) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert code_range(bits, False) == (0, 2**bits - 1)


@given(grids)
def test_has_at_most_two_to_the_bits_levels(grid):
    x, *qparams = values_and_grid(grid)
    assert len(fake_quantize(x, *qparams).unique()) <= 2 ** grid["bits"]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_reaches_every_level(bits, signed):
    x = torch.linspace(-300, 300, 6001)
    levels = fake_quantize(x, torch.ones(1), torch.ones(1), *bounds(bits, signed)).unique()
    qmin, qmax = code_range(bits, signed)
    assert levels.tolist() == [float(c - 1) for c in range(qmin, qmax + 1)]


@given(grids)
def test_is_a_projection(grid):
    x, *qparams = values_and_grid(grid)
    once = fake_quantize(x, *qparams)
    assert torch.equal(fake_quantize(once, *qparams), once)


@given(grids)
def test_is_monotone(grid):
    x, *qparams = values_and_grid(grid)
    assert (fake_quantize(x, *qparams).diff() >= 0).all()


@given(grids)
def test_error_is_at_most_half_a_step_inside_the_range(grid):
    x, scale, z, qmin, qmax = values_and_grid(grid)
    inside = (x >= (qmin - z) * scale) & (x <= (qmax - z) * scale)
    error = (fake_quantize(x, scale, z, qmin, qmax) - x).abs()[inside]
    assert (error <= scale * 0.5001).all()


@given(grids)
def test_zero_is_exact_and_its_code_is_the_zero_point(grid):
    _, scale, z, qmin, qmax = values_and_grid(grid)
    x = torch.zeros(1)
    assert fake_quantize(x, scale, z, qmin, qmax).item() == 0.0
    codes, _, zero = quantize(x, scale, z, qmin, qmax)
    assert codes.item() == zero.item() == z.item()


@given(grids)
def test_integers_give_the_same_values_bit_for_bit(grid):
    x, *qparams = values_and_grid(grid)
    codes, scale, zero = quantize(x, *qparams)
    qmin, qmax = code_range(grid["bits"], grid["signed"])
    assert codes.dtype == zero.dtype == (torch.int8 if grid["signed"] else torch.uint8)
    assert qmin <= codes.min() <= codes.max() <= qmax
    assert torch.equal((codes.float() - zero.float()) * scale, fake_quantize(x, *qparams))


@given(grids, st.floats(1e-6, 1e6))
def test_value_does_not_depend_on_the_gradient_scale(grid, g):
    x, *qparams = values_and_grid(grid)
    assert torch.equal(fake_quantize(x, *qparams, torch.tensor([g])), fake_quantize(x, *qparams))


def test_bounds_count_as_inside():
    one = torch.ones(1, requires_grad=True)
    x = torch.tensor([-2.0, 1.0, -2.001, 1.001], requires_grad=True)
    fake_quantize(x, one, torch.zeros(1), *bounds(2, True)).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert x.grad.tolist() == [1.0, 10.0, 0.0, 0.0]
    assert one.grad.item() == -2 * 100 + 1 * 1000  # at the bounds r - v = 0


@pytest.mark.parametrize("g", [None, 0.125])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_match_the_closed_form(bits, signed, g):
    """LSQ eq. 3 with a zero point z: d/dx = 1 inside; d/ds = round(v) - v inside, n - z or p - z outside, times g."""
    x = (2**bits * normal(64, 9, dtype=torch.float64)).requires_grad_()
    scale = torch.full((1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    n, p = code_range(bits, signed)
    z = min(3, p) if signed else 1
    u = normal(64, 9, seed=1, dtype=torch.float64)
    factor = None if g is None else torch.tensor(g, dtype=torch.float64)
    zero = torch.full((1, 1), z, dtype=torch.float64)
    fake_quantize(x, scale, zero, *bounds(bits, signed, torch.float64), factor).backward(u)

    xs, us = x.detach().numpy(), u.numpy()
    v = xs / 0.7
    inside = (v >= n - z) & (v <= p - z)
    ds = np.where(v < n - z, n - z, np.where(v > p - z, p - z, np.round(v) - v))
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(x.grad, us * inside, atol=1e-6)
    np.testing.assert_allclose(scale.grad.item(), (g or 1.0) * (us * ds).sum(), atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_match_finite_differences_of_the_surrogate(bits, signed):
    """The straight-through surrogate: clip in real numbers, with the rounding errors of the unperturbed point held fixed."""
    n, p = code_range(bits, signed)
    s, z = 0.3, 1
    x = 0.4 * 2**bits * normal(40, dtype=torch.float64).numpy()
    u = normal(40, seed=1, dtype=torch.float64).numpy()
    v = np.clip(x / s, n - z, p - z)
    rounding = np.round(v) - v

    def surrogate(x, s):
        return float((u * s * (np.clip(x / s, n - z, p - z) + rounding)).sum())

    tensors = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (x, [s])]
    zero = torch.tensor([z], dtype=torch.float64)
    fake_quantize(*tensors, zero, *bounds(bits, signed, torch.float64)).backward(torch.from_numpy(u))
    eps = 1e-6
    assert tensors[1].grad.item() == pytest.approx(
        (surrogate(x, s + eps) - surrogate(x, s - eps)) / (2 * eps), abs=1e-6
    )
    for i in range(len(x)):
        step = eps * np.eye(len(x))[i]
        difference = (surrogate(x + step, s) - surrogate(x - step, s)) / (2 * eps)
        assert tensors[0].grad[i].item() == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_broadcast_and_collect_their_own_gradients(axis):
    x = normal(4, 4, 3, 3)
    shape = [4 if d == axis else 1 for d in range(4)]
    scale = torch.tensor([0.05, 0.1, 0.2, 0.4]).view(shape).requires_grad_()
    zero = torch.tensor([0.0, -2.0, 3.0, 7.0]).view(shape)
    qparams = bounds(4, True)
    out = fake_quantize(x, scale, zero, *qparams)
    out.square().sum().backward()
    assert scale.grad.shape == scale.shape
    for c in range(4):
        s = scale.detach().flatten()[c].clone().view(1).requires_grad_()
        alone = fake_quantize(x.select(axis, c), s, zero.flatten()[c : c + 1], *qparams)
        alone.square().sum().backward()
        assert torch.equal(out.select(axis, c), alone)
        torch.testing.assert_close(scale.grad.flatten()[c : c + 1], s.grad)


def test_only_the_gradients_that_are_asked_for_are_computed():
    x, scale = normal(10), torch.full((1,), 0.2, requires_grad=True)
    out = fake_quantize(x, scale, torch.zeros(1), *bounds(4, True))
    out.sum().backward()
    assert scale.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-12])
def test_step_sizes_that_reach_zero_stay_finite_and_can_come_back(scale):
    x, s = normal(10), torch.tensor([scale], requires_grad=True)
    out = fake_quantize(x, s, torch.zeros(1), *bounds(4, True))
    (out - x).square().sum().backward()
    assert out.isfinite().all()
    assert s.grad.isfinite().all()
    assert s.grad.item() < 0  # a larger step fits better


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Inputs whose rounding does not hang on the last bit of a division."""
    v = x / scale
    return torch.where((v - v.floor() - 0.5).abs() < 1e-3, x + 0.01 * scale, x)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_torch_per_tensor(bits, signed):
    n, p = code_range(bits, signed)
    for zero in (n, n + 1, 0, p):
        scale = torch.tensor([0.037])
        x = away_from_ties(normal(5000) * 2**bits * scale, scale)
        expected = torch.fake_quantize_per_tensor_affine(x, 0.037, zero, n, p)
        found = fake_quantize(x, scale, torch.tensor([float(zero)]), *bounds(bits, signed))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_torch_per_channel(bits, axis):
    n, p = code_range(bits, True)
    zeros = torch.tensor([n, 0, 1, p], dtype=torch.int32)
    scales = torch.tensor([0.01, 0.037, 0.5, 3.0])
    shape = [4 if d == axis else 1 for d in range(4)]
    s = scales.view(shape)
    x = away_from_ties(normal(4, 4, 10, 10) * 2**bits * s, s)
    expected = torch.fake_quantize_per_channel_affine(x, scales, zeros, axis, n, p)
    ours = fake_quantize(x, s, zeros.float().view(shape), *bounds(bits, True))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def onnx_quantize_linear(x: np.ndarray, scale: float, zero: int, low: int, high: int) -> np.ndarray:
    """QuantizeLinear of the ONNX specification: saturate(round half to even(x / y_scale) + y_zero_point)."""
    return np.clip(np.rint(x / np.float32(scale)) + zero, low, high)


@pytest.mark.parametrize("zero", [0, 1, 2, 7])
def test_ties_round_to_even_before_the_zero_point_as_in_onnx(zero):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25
    codes, _, z = quantize(x, torch.tensor([0.25]), torch.tensor([float(zero)]), *bounds(4, False))
    assert z.item() == zero
    steps = np.clip(
        np.array([-2, -2, 0, 0, 2, 2]) + zero, 0, 15
    )  # adding an odd zero first would give -3, -1, -1, 1, ...
    assert codes.tolist() == steps.tolist() == onnx_quantize_linear(x.numpy(), 0.25, zero, 0, 15).tolist()
    out = fake_quantize(x, torch.tensor([0.25]), torch.tensor([float(zero)]), *bounds(4, False))
    assert out.tolist() == ((steps - zero) * 0.25).tolist()


@given(grids)
def test_codes_are_those_of_onnx_quantize_linear(grid):
    x, *qparams = values_and_grid(grid)
    codes, scale, zero = quantize(x, *qparams)
    low, high = code_range(grid["bits"], grid["signed"])
    assert codes.tolist() == onnx_quantize_linear(x.numpy(), scale.item(), zero.item(), low, high).tolist()


def test_bfloat16_inputs_are_rounded_in_float32():
    x = normal(1000).bfloat16()
    scale = torch.tensor([0.0371])
    out = fake_quantize(x, scale, torch.zeros(1), *bounds(8, True))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fake_quantize(x.float(), scale, torch.zeros(1), *bounds(8, True)).bfloat16())
