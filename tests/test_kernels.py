"""The fused quantizer: equal to plain autograd, equal to itself compiled, one compilation for all formats."""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from eqnet.nn import compiled
from eqnet.nn.compiled import compiled_kernels
from eqnet.nn.functional import fake_quantize_active
from eqnet.nn.kernels import EAGER, from_rows, to_rows
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.nn.supernet import Supernet
from eqnet.space import QuantFormat, SandwichSampler
from eqnet.training.losses import weight_distribution_loss

FORMATS = [
    QuantFormat(bits, symmetric, granularity)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for granularity in ("tensor", "channel")
]
IMPLEMENTATIONS = {"eager": lambda: EAGER, "compiled": compiled_kernels}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(x: Tensor, scale: Tensor, zero: Tensor, qmin: float, qmax: float, g: float) -> Tensor:
    """Textbook LSQ with a zero point, by detaching: differentiated by autograd itself."""
    scale = scale * g + (scale - scale * g).detach()
    v = x / scale
    low, high = qmin - zero, qmax - zero
    rounded = v + (v.round() - v).detach()
    return scale * torch.where(v < low, low, torch.where(v > high, high, rounded))


def quantizer(axis: int | None, channels: int, ndim: int, numel: int | None, dtype: torch.dtype) -> ElasticQuantizer:
    formats = FORMATS if axis is not None else [f for f in FORMATS if f.granularity == "tensor"]
    made = ElasticQuantizer(formats, channels, axis, ndim, numel).to(dtype)
    generator, other = (torch.Generator().manual_seed(s) for s in (1, 2))
    with torch.no_grad():
        for row, fmt in enumerate(made.formats):
            step = 3.0 / 2**fmt.bits
            made.scale[made.index[row]] = step * (1 + torch.rand(channels, generator=generator)).to(dtype)
            if not fmt.symmetric:
                half = 2 ** (fmt.bits - 1)
                zeros = torch.randint(-half, half, (channels,), generator=other)
                made.zero_point[made.index[row]] = zeros.to(dtype)
    return made


CASES = {  # shape, axis, layout
    "activation": ((4, 6, 5, 7), None, torch.contiguous_format),
    "activation, channels_last": ((4, 6, 5, 7), None, torch.channels_last),
    "tokens": ((3, 9, 8), None, torch.contiguous_format),
    "features": ((16, 10), None, torch.contiguous_format),
    "convolution": ((6, 5, 3, 3), 0, torch.contiguous_format),
    "convolution, channels_last": ((6, 5, 3, 3), 0, torch.channels_last),
    "transposed convolution": ((5, 6, 3, 3), 1, torch.contiguous_format),
    "linear": ((6, 11), 0, torch.contiguous_format),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_plain_autograd(name, case, dtype):
    """Float64 to 1e-9, float32 to 1e-5 of the largest gradient; of a step size, of what its terms are together where they
    cancel."""
    shape, axis, layout = CASES[case]
    x = normal(*shape, dtype=dtype)
    x = (x.contiguous(memory_format=layout) if x.ndim == 4 else x).requires_grad_()
    u = normal(*shape, seed=2, dtype=dtype)
    channels = 1 if axis is None else shape[axis]
    q = quantizer(axis, channels, len(shape), None if axis is None else x.numel(), dtype)
    q.kernels = IMPLEMENTATIONS[name]()
    for fmt in q.formats[:: 3 if name == "compiled" else 1]:
        q.select(fmt)
        out = q(x)
        out.backward(u)
        found = (x.grad, q.scale.grad)
        x.grad = q.scale.grad = None
        scale, zero, qmin, qmax = q.qparams()
        scale.requires_grad_()
        shared = 1 if fmt.granularity == "tensor" else channels
        values = x[0].numel() if axis is None else x.numel() / shared
        factor = 1 / (qmax.item() * values) ** 0.5
        expected = plain(x, scale, zero, qmin.item(), qmax.item(), factor)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=0)
        grad_x, grad_scale = torch.autograd.grad(expected, (x, scale), u)
        table = torch.zeros_like(q.scale).index_add(0, q.index[q.rows[fmt]], grad_scale.flatten())
        for ours, theirs, size in zip(found, (grad_x, table), (0, factor * u.norm()), strict=True):
            assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * max(theirs.abs().max(), size)
            assert ours.stride() == theirs.stride() or ours is not found[0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_codes_are_those_behind_the_values(name):
    x, w = normal(8, 32, 14, 14) * 3, normal(16, 8, 3, 3)
    for q, tensor in (
        (quantizer(None, 1, 4, None, torch.float32), x),
        (quantizer(0, 16, 4, w.numel(), torch.float32), w),
    ):
        q.kernels = IMPLEMENTATIONS[name]()
        for fmt in q.formats:
            q.select(fmt)
            codes, grid = q.selected(tensor).codes(tensor, q.scale, q.zero_point)
            assert codes.dtype == torch.uint8
            low, s = (t.view(q.broadcast if q.axis is not None else 1) for t in (grid.low, grid.s))
            assert torch.equal((codes + low) * s, q(tensor))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_forward_equals_the_eager_one_bit_for_bit(layout):
    """What is trained compiled is exported by eager code; both must round alike."""
    x = normal(8, 32, 14, 14).contiguous(memory_format=layout) * 3
    q = quantizer(None, 1, 4, None, torch.float32)
    w = normal(16, 8, 3, 3).contiguous(memory_format=layout)
    qw = quantizer(0, 16, 4, w.numel(), torch.float32)
    for module, tensor in ((q, x), (qw, w)):
        for fmt in module.formats:
            module.select(fmt)
            module.kernels = EAGER
            eager = module(tensor)
            module.kernels = compiled_kernels()
            assert torch.equal(module(tensor), eager)
            codes, scale, zero = module.quantize(tensor)
            assert torch.equal((codes.float() - zero.float()) * scale, eager)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bf16_gradients_are_within_the_rounding_of_their_inputs(name):
    """Sums run in float32 over bf16 inputs: the table gradients agree to 1e-5 with float32 sums over the same numbers,
    the input gradient exactly."""
    x, u = (normal(4, 8, 16, 16, seed=s).bfloat16() for s in (0, 1))
    q = quantizer(None, 1, 4, None, torch.float32)
    q.kernels = IMPLEMENTATIONS[name]()
    for fmt in q.formats[::4]:
        q.select(fmt)
        found = torch.autograd.grad(q(x.requires_grad_()), (x, q.scale), u)
        q.kernels, before = EAGER, q.kernels
        wide = x.detach().float().requires_grad_()
        expected = torch.autograd.grad(q(wide), (wide, q.scale), u.float())
        q.kernels = before
        assert torch.equal(found[0].float(), expected[0])
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_moments_and_their_gradient_equal_the_eager_ones(dtype):
    weights = {
        "a": normal(16, 8, 3, 3, dtype=dtype).requires_grad_(),
        "b": normal(7, 5, dtype=dtype).exp().requires_grad_(),
    }
    parts = {}
    for name, made in IMPLEMENTATIONS.items():
        loss = weight_distribution_loss(weights, kernels=made())
        total = loss["kurtosis"] + loss["skewness"]
        parts[name] = [total, *torch.autograd.grad(total, list(weights.values()))]
    for ours, theirs in zip(parts["compiled"], parts["eager"], strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def test_sizes_that_agree_by_chance_do_not_tie_the_compiled_code_to_them():
    q = quantizer(0, 16, 2, 256, torch.float32)
    for shape in ((16, 16), (16, 33), (16, 4)):
        q.kernels = compiled_kernels()
        found = q(normal(*shape))
        q.kernels = EAGER
        assert torch.equal(found, q(normal(*shape)))


def test_under_autocast_the_result_has_the_precision_of_the_layer():
    q = quantizer(None, 1, 2, None, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert q(normal(3, 4)).dtype == torch.bfloat16
        assert q(normal(3, 4).double()).dtype == torch.float64
    assert q(normal(3, 4)).dtype == torch.float32


def compilations() -> int:
    """Graphs that were compiled in this process."""
    return torch._dynamo.utils.counters["aot_autograd"]["total"]


def test_changing_bits_granularity_or_symmetry_never_recompiles():
    model = timm.create_model("resnet18", num_classes=10)
    supernet = Supernet.from_model(model, (3, 32, 32)).to(memory_format=torch.channels_last)
    supernet.use_kernels(compiled_kernels())
    images = normal(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    supernet.calibrate(images)
    sampler = SandwichSampler(supernet.space)

    def steps(seeds: range) -> None:
        for seed in seeds:
            for config in sampler.sample(np.random.default_rng(seed)):
                supernet.set_config(config)
                supernet(images).square().sum().backward()

    steps(range(1))
    before = compilations()
    assert before > 0
    steps(range(1, 4))
    for form, bits in itertools.product(supernet.space.forms, (2, 5, 8)):
        supernet.set_config(supernet.space.uniform(bits, form))
        supernet(images).square().sum().backward()
    assert compilations() == before


def test_a_whole_network_compiles_and_no_config_recompiles_it():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
    supernet = Supernet.from_model(net, (3, 8, 8), fixed="none").eval()
    images = normal(4, 3, 8, 8)
    supernet.calibrate(images)
    compiled = torch.compile(supernet, fullgraph=True)
    with torch.no_grad():
        compiled(images)
        before = compilations()
        for form, bits in itertools.product(supernet.space.forms, (2, 5, 8)):
            supernet.set_config(supernet.space.uniform(bits, form))
            assert torch.allclose(compiled(images), supernet(images), atol=1e-5)
    assert compilations() == before


def test_a_config_may_be_selected_between_forward_and_backward():
    x = normal(4, 6).requires_grad_()
    q = quantizer(None, 1, 2, None, torch.float32)
    q.select(QuantFormat(2))
    (expected,) = torch.autograd.grad(q(x).sum(), q.scale)
    out = q(x)
    q.select(QuantFormat(8))
    (found,) = torch.autograd.grad(out.sum(), q.scale)
    assert torch.equal(found, expected)


SHAPES = [(4, 6, 5, 7), (4, 1, 5, 7), (3, 9, 8), (16, 10), (7,), (2, 3, 4, 5, 6), (1, 5000, 2, 2)]


@pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES for a in (None, 0, 1) if a is None or a < len(s)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_rows_are_inverted(shape, axis, layout):
    x = normal(*shape)
    if layout == "channels_last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x = torch.cat([x, x], -1)[..., ::2]
    rows = to_rows(x, axis)
    assert rows.ndim == 2
    if axis is not None:
        assert len(rows) == shape[axis]
        assert torch.equal(rows.sort(1).values, x.movedim(axis, 0).reshape(shape[axis], -1).sort(1).values)
    if layout != "strided":
        assert torch.equal(from_rows(rows, x, axis), x)
        assert axis == 1 or rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # no copy


def test_rows_of_activations_are_short_so_that_sums_stay_exact():
    x = torch.zeros(2, 64, 112, 112).contiguous(memory_format=torch.channels_last)
    assert to_rows(x, None).shape[1] <= max(4096, 64 * 112)
    # ten million ones with one step size: a running float32 sum would stop at 2^24
    ones = torch.ones(40, 64, 128, 128)
    q = ElasticQuantizer([QuantFormat(8)])
    with torch.no_grad():
        q.scale.fill_(0.001)
    out = q(ones)  # everything is above the range, so each value adds qmax
    (gradient,) = torch.autograd.grad(out.sum(), q.scale)
    assert gradient.item() == pytest.approx(127 * ones.numel() / (127 * ones[0].numel()) ** 0.5, rel=1e-6)


def test_copies_of_a_supernet_keep_their_kernels():
    supernet = Supernet.from_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (3,))
    supernet.use_kernels(compiled_kernels())
    twin = copy.deepcopy(supernet)
    assert twin.kernels == supernet.kernels == compiled_kernels()
    assert all(q.kernels == supernet.kernels for _, q in twin.quantizers())


def test_modes():
    cpu = torch.device("cpu")
    assert compiled.choose_kernels("off", cpu) is EAGER
    assert compiled.choose_kernels("on", cpu) is compiled_kernels()
    assert compiled.choose_kernels("auto", cpu) is compiled_kernels()


def test_without_a_compiler_auto_is_eager_and_on_is_refused():
    torch._dynamo.reset()
    compiled.compiled_kernels.cache_clear()
    try:
        # not pytest's monkeypatch, which hides these settings from whatever the process compiles afterwards
        with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
            assert compiled.choose_kernels("auto", torch.device("cpu")) is EAGER
            with pytest.raises(ValueError, match=r"train\.compile=on"):
                compiled.choose_kernels("on", torch.device("cpu"))
    finally:
        compiled.compiled_kernels.cache_clear()
        torch._dynamo.reset()


def test_fake_quantize_active_without_gradient_of_the_tables():
    """The step size of images is calibrated, not learned; nothing before it needs a gradient either."""
    q = ElasticQuantizer([QuantFormat(8)]).requires_grad_(False)
    assert not fake_quantize_active(normal(2, 3), q.scale, q.zero_point, q.selected(normal(2, 3))).requires_grad
