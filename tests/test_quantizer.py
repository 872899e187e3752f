"""The elastic quantizer: independent rows, one active; what is stored, what is trained, how gradients are scaled."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eqnet.nn.functional import code_range, fake_quantize
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.space import QuantFormat

BITS = range(2, 9)
WEIGHT_FORMATS = [QuantFormat(b, s, g) for g in ("tensor", "channel") for s in (True, False) for b in BITS]
ACT_FORMATS = [QuantFormat(b, s) for s in (True, False) for b in BITS]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_quantizer(weight: Tensor, axis: int = 0) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(WEIGHT_FORMATS, weight.shape[axis], axis, weight.ndim, weight.numel())
    quantizer.calibrate(weight)
    return quantizer


def act_quantizer(x: Tensor) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(ACT_FORMATS)
    quantizer.calibrate(x)
    return quantizer


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return normal(6, 4, 3, 3) + 0.1


@pytest.fixture(scope="module")
def calibrated(weight: Tensor) -> ElasticQuantizer:
    return weight_quantizer(weight)


@pytest.fixture
def quantizer(calibrated: ElasticQuantizer) -> ElasticQuantizer:
    return copy.deepcopy(calibrated)


def entries(quantizer: ElasticQuantizer, fmt: QuantFormat) -> tuple[set[int], set[int]]:
    """Entries of (scale, zero point) that the outputs of a format depend on, found by changing them one at a time."""
    quantizer.select(fmt)
    x = normal(6, 4, 3, 3, seed=3) if quantizer.axis is not None else normal(2, 50, seed=3)
    before = quantizer(x).detach()
    found: tuple[set[int], set[int]] = (set(), set())
    for parameter, owned in zip((quantizer.scale, quantizer.zero_point), found, strict=True):
        for i in range(parameter.numel()):
            saved = parameter.data[i].clone()
            parameter.data[i] += 300  # all values become zero, or all are out of range
            if not torch.equal(quantizer(x), before):
                owned.add(i)
            parameter.data[i] = saved
    return found


def test_rows_are_independent_and_together_are_the_whole_table(quantizer):
    """Four weight slots x 7 bits; per-tensor steps are learned, not derived from per-channel ones (EQ-Net Table 4)."""
    scales: list[int] = []
    for fmt in WEIGHT_FORMATS:
        scale, zero = entries(quantizer, fmt)
        assert len(scale) == (6 if fmt.granularity == "channel" else 1)
        assert scale == zero
        scales += scale
    assert sorted(scales) == list(range(quantizer.scale.numel()))
    assert quantizer.scale.numel() == quantizer.zero_point.numel() == 7 * 2 * (6 + 1)


def test_inputs_have_two_slots_of_seven_bits():
    quantizer = act_quantizer(normal(2, 50))
    assert quantizer.scale.numel() == quantizer.zero_point.numel() == 14
    for fmt in ACT_FORMATS:
        scale, zero = entries(quantizer, fmt)
        assert len(scale) == 1
        assert scale == zero


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS, ids=str)
def test_output_is_that_of_its_row(quantizer, weight, fmt):
    quantizer.select(fmt)
    out = quantizer(weight)
    assert out.shape == weight.shape
    per_group = out.flatten(1) if fmt.granularity == "channel" else out.flatten()[None]
    for group in per_group:
        assert len(group.unique()) <= 2**fmt.bits
    scale, zero, qmin, qmax = quantizer.qparams()
    assert (qmin.item(), qmax.item()) == code_range(fmt.bits, signed=True)
    assert torch.equal(out, fake_quantize(weight, scale, zero, qmin, qmax))
    assert torch.equal(zero, zero.round().clamp(qmin, qmax))
    if fmt.symmetric:
        assert zero.eq(0).all()


def test_selecting_writes_only_the_row(quantizer):
    before = {k: v.clone() for k, v in quantizer.named_buffers()} | {
        k: v.clone() for k, v in quantizer.state_dict().items()
    }
    versions = {k: v._version for k, v in quantizer.named_parameters()}
    quantizer.select(QuantFormat(5, False, "channel"))
    assert quantizer.format == QuantFormat(5, False, "channel")
    after = {**dict(quantizer.named_buffers()), **quantizer.state_dict()}
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"row"}
    assert {k: v._version for k, v in quantizer.named_parameters()} == versions


def test_a_format_without_a_row_is_refused_and_changes_nothing():
    quantizer = ElasticQuantizer([QuantFormat(4), QuantFormat(8)])
    quantizer.select(QuantFormat(8))
    for fmt in (QuantFormat(3), QuantFormat(4, symmetric=False), QuantFormat(4, granularity="channel")):
        with pytest.raises(ValueError, match="row"):
            quantizer.select(fmt)
        assert quantizer.format == QuantFormat(8)


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS, ids=str)
def test_only_the_active_entries_have_a_gradient(quantizer, weight, fmt):
    scale, _ = entries(quantizer, fmt)
    quantizer(weight * 1.5).square().sum().backward()
    assert set(quantizer.scale.grad.nonzero().flatten().tolist()) == scale
    assert quantizer.zero_point.grad is None


def expected_scale_gradient(x: Tensor, quantizer: ElasticQuantizer, factor: float) -> Tensor:
    scale, zero, qmin, qmax = quantizer.qparams()
    scale.requires_grad_()
    fake_quantize(x, scale, zero, qmin, qmax, torch.tensor(factor)).sum().backward()
    return scale.grad.flatten()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3, 3), 0), ((8, 1, 3, 3), 0), ((4, 6, 3), 1), ((5, 7), 0)])
def test_gradient_scale_of_weights(shape, axis, bits):
    """1 / sqrt(qmax N): N = numel per tensor, numel / channels per channel (LSQ section 2.2)."""
    x = normal(*shape)
    quantizer = weight_quantizer(x, axis)
    for granularity, n in (("tensor", x.numel()), ("channel", x.numel() // shape[axis])):
        quantizer.select(QuantFormat(bits, True, granularity))
        quantizer.zero_grad()
        quantizer(x).sum().backward()
        factor = ((2 ** (bits - 1) - 1) * n) ** -0.5
        gradient = quantizer.scale.grad[quantizer.scale.grad != 0]
        expected = expected_scale_gradient(x, quantizer, factor)
        if granularity == "tensor":  # one step size serves all channels
            expected = expected.sum().view(1)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_gradient_scale_of_inputs_counts_the_features_of_one_image(batch, signed):
    image = normal(1, 3, 5, 5) if signed else normal(1, 3, 5, 5).abs()
    quantizer = act_quantizer(image)
    quantizer.select(QuantFormat(4))
    x = image.expand(batch, -1, -1, -1)
    quantizer(x).sum().backward()
    p = 7 if signed else 15
    expected = expected_scale_gradient(x, quantizer, (p * 75) ** -0.5)
    torch.testing.assert_close(quantizer.scale.grad[2:3], expected)
    once = expected_scale_gradient(image, quantizer, (p * 75) ** -0.5)
    torch.testing.assert_close(quantizer.scale.grad[2:3], batch * once)  # the factor itself does not see the batch


@pytest.mark.parametrize("minimum", [0.0, -1e-3])
def test_inputs_without_negative_values_use_unsigned_codes_in_both_symmetries(minimum):
    x = normal(4, 100).abs()
    x[0, 0] = minimum
    quantizer = act_quantizer(x)
    for fmt in ACT_FORMATS:
        quantizer.select(fmt)
        _, _, qmin, qmax = quantizer.qparams()
        assert (qmin.item(), qmax.item()) == code_range(fmt.bits, signed=minimum < 0)


def test_weights_are_always_signed():
    quantizer = weight_quantizer(normal(3, 4).abs())
    _, _, qmin, _ = quantizer.qparams()
    assert qmin.item() < 0


@pytest.mark.parametrize("positive", [True, False])
def test_a_stored_state_reproduces_the_outputs_without_calibration(positive):
    x = normal(3, 40).abs() if positive else normal(3, 40)
    source = act_quantizer(x)
    source.scale.data *= 1.3
    target = ElasticQuantizer(ACT_FORMATS)
    assert not target.calibrated
    target.load_state_dict(source.state_dict())
    assert target.calibrated
    for fmt in ACT_FORMATS:
        source.select(fmt)
        target.select(fmt)
        assert torch.equal(target(x - 0.2), source(x - 0.2))


def test_zero_points_that_are_no_codes_are_told(quantizer):
    assert quantizer.has_integer_zero_points()
    for fmt, zero, allowed in (
        (QuantFormat(3, False), 3, True),
        (QuantFormat(3, False), 4, False),
        (QuantFormat(3, False, "channel"), -4, True),
        (QuantFormat(3, False, "channel"), -5, False),
        (QuantFormat(3, False), 1.5, False),
        (QuantFormat(3, False), float("nan"), False),
        (QuantFormat(3, True), 1, False),
    ):
        entry = quantizer.index[quantizer.rows[fmt], -1]
        before = float(quantizer.zero_point[entry])
        quantizer.zero_point[entry] = zero
        assert quantizer.has_integer_zero_points() == allowed
        quantizer.zero_point[entry] = before


def test_the_stored_state_does_not_depend_on_the_active_row(quantizer):
    quantizer.select(WEIGHT_FORMATS[0])
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.select(WEIGHT_FORMATS[-1])
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    assert set(before) == {"scale", "zero_point", "signed", "calibrated"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_inputs_keep_their_dtype_and_the_table_its_own(dtype):
    x = normal(2, 30).to(dtype).requires_grad_()
    quantizer = act_quantizer(x)
    quantizer.select(QuantFormat(3, symmetric=False))
    out = quantizer(x)
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert quantizer.scale.grad.dtype == torch.float32


def test_a_disabled_quantizer_is_the_identity():
    quantizer = act_quantizer(normal(2, 30))
    quantizer.enabled = False
    x = normal(2, 30, seed=1)
    assert torch.equal(quantizer(x), x)


@given(st.sampled_from(WEIGHT_FORMATS), st.integers(0, 100))
def test_integer_codes_are_the_outputs(fmt, seed):
    x = normal(5, 2, 3, 3, seed=seed)
    quantizer = ElasticQuantizer(WEIGHT_FORMATS, 5, 0, 4, x.numel())
    quantizer.scale.data.uniform_(0.01, 1.0, generator=torch.Generator().manual_seed(seed))
    quantizer.select(fmt)
    qmin, qmax = code_range(fmt.bits, signed=True)
    if not fmt.symmetric:
        quantizer.zero_point.random_(qmin, qmax + 1, generator=torch.Generator().manual_seed(seed))
    codes, scale, zero = quantizer.quantize(x)
    assert codes.dtype == torch.int8
    assert torch.equal((codes.float() - zero.float()) * scale, quantizer(x))
    assert qmin <= codes.min()
    assert codes.max() <= qmax


def test_calibration_of_more_bits_is_never_worse(quantizer, weight):
    for granularity in ("tensor", "channel"):
        for symmetric in (True, False):
            errors = []
            for bits in BITS:
                quantizer.select(QuantFormat(bits, symmetric, granularity))
                errors.append((quantizer(weight) - weight).abs().pow(2.4).mean().item())
            assert errors == sorted(errors, reverse=True)


def test_per_channel_calibration_of_many_channels_equals_one_at_a_time():
    """Blocks of channels are an implementation detail: 130 channels need three of them."""
    x = normal(130, 20) * torch.linspace(0.01, 3, 130)[:, None]
    whole = weight_quantizer(x)
    for c in (0, 63, 64, 129):
        alone = weight_quantizer(x[c : c + 1])
        for fmt in WEIGHT_FORMATS[14:]:
            whole.select(fmt)
            alone.select(fmt)
            torch.testing.assert_close(whole(x)[c : c + 1], alone(x[c : c + 1]))


def test_channel_formats_beat_tensor_formats_where_channels_differ():
    x = normal(8, 50) * torch.logspace(-2, 1, 8)[:, None]
    quantizer = weight_quantizer(x)
    small = []
    for granularity in ("tensor", "channel"):
        quantizer.select(QuantFormat(4, True, granularity))
        small.append(((quantizer(x) - x)[0].square().mean() / x[0].square().mean()).item())
    assert small[0] == pytest.approx(1.0)  # the smallest channel is rounded away
    assert small[1] < 0.05
