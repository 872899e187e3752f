"""The search for initial step sizes: against a scan of all candidates over all values, in float64."""

from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eqnet.nn.calibration import CALIBRATION_NORM, Histogram, choose_qparams, in_threads
from eqnet.nn.functional import code_range, fake_quantize
from eqnet.nn.supernet import Supernet

BITS = range(2, 9)
FORMATS = [(bits, symmetric) for symmetric in (True, False) for bits in BITS]


def bounds(bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    qmin, qmax = code_range(bits, signed)
    return torch.tensor(float(qmin)), torch.tensor(float(qmax))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def choose(x: Tensor, bits: int, symmetric: bool, signed: bool = True) -> tuple[Tensor, Tensor]:
    """(scale, zero point), [C] each."""
    scale, zero = choose_qparams(x, torch.tensor([bits]), torch.tensor([symmetric]), signed)
    return scale[0], zero[0]


def loss(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Mean |x - x_hat|^2.4 of each channel, [C], float64."""
    out = fake_quantize(x, scale.view(-1, 1), zero.view(-1, 1), *bounds(bits, signed))
    return (out.double() - x.double()).abs().pow(CALIBRATION_NORM).mean(1)


def candidates(x: np.ndarray, bits: int, symmetric: bool, signed: bool) -> list[tuple[float, int]]:
    """(scale, zero point) of the 80 shrunken ranges of one channel, i = 0 first; float64."""
    n, p = code_range(bits, signed)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    out = []
    for i in range(80):
        shrink = 1 - 0.01 * i
        if symmetric:
            span = 2 * max(-low, high) if signed else high
            out.append((span * shrink / (2**bits - 1), 0))
        else:
            s = (high - low) * shrink / (2**bits - 1)
            out.append((s, int(np.clip(np.rint(n - low * shrink / s), n, p))))
    return out


def brute_force(x: np.ndarray, bits: int, symmetric: bool, signed: bool) -> list[float]:
    """Loss of each candidate."""
    n, p = code_range(bits, signed)
    losses = []
    for s, z in candidates(x, bits, symmetric, signed):
        out = (np.clip(np.rint(x / s) + z, n, p) - z) * s
        losses.append(float((np.abs(out - x) ** 2.4).mean()))
    return losses


INPUTS = {
    "gaussian": lambda: normal(3, 1500) * 0.05,
    "skewed": lambda: normal(3, 1500).exp() - 1.3,
    "laplace": lambda: normal(3, 1500) * normal(3, 1500, seed=1) * 20,
    "negative": lambda: -normal(3, 1500).abs(),
    "positive": lambda: normal(3, 1500).abs() + 0.5,
    "outlier": lambda: torch.cat([normal(3, 1500), torch.full((3, 1), 40.0)], 1),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_the_best_of_80_shrunken_ranges_and_never_worse_than_min_max(name, bits, symmetric):
    x = INPUTS[name]()
    for signed in (True, False):
        if not signed and name in ("gaussian", "skewed", "laplace", "negative", "outlier"):
            x = x.abs()
        scale, zero = choose(x, bits, symmetric, signed)
        ours = loss(x, scale, zero, bits, signed)
        for c in range(3):
            losses = brute_force(x[c].double().numpy(), bits, symmetric, signed)
            assert ours[c].item() == pytest.approx(min(losses), rel=1e-3)
            assert ours[c].item() <= losses[0] * 1.001
    assert not symmetric or zero.eq(0).all()


@pytest.mark.parametrize(("bits", "step"), [(2, 0.057), (3, 0.032), (4, 0.018)])
def test_step_sizes_of_gaussian_weights_are_the_reference_ones(bits, step):
    """128 x 3 x 3 weights N(0, 0.05^2), symmetric, full grid: measured with an 80-point scan of the released code."""
    x = normal(128, 64 * 9) * 0.05
    per_tensor, _ = choose(x.view(1, -1), bits, symmetric=True)
    assert per_tensor.item() == pytest.approx(step, rel=0.1)
    per_channel, _ = choose(x, bits, symmetric=True)
    assert per_channel.mean().item() == pytest.approx(step, rel=0.1)


def test_negative_weights_have_a_positive_zero_point():
    """Uniform in [-1, 0]: the released code took the absolute value of the real offset and was off by 1."""
    x = -torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1] = -1.0, 0.0
    scale, zero = choose(x, 8, symmetric=False)
    assert scale.item() == pytest.approx(1 / 255, rel=0.02)
    assert zero.item() == 127
    out = fake_quantize(x, scale, zero, *bounds(8, True))
    assert (out - x).abs().max() <= 0.5001 * scale


@given(st.floats(2**-10, 2**10, width=32), st.integers(2, 8), st.booleans())
@settings(max_examples=20)
def test_scales_with_the_data(factor, bits, symmetric):
    x = normal(1, 500)
    scale, zero = choose(x, bits, symmetric)
    scaled, scaled_zero = choose(x * factor, bits, symmetric)
    ratio = loss(x * factor, scaled, scaled_zero, bits) / factor**CALIBRATION_NORM
    torch.testing.assert_close(ratio, loss(x, scale, zero, bits), rtol=2e-3, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_channels_are_finite_and_exact(symmetric, signed):
    x = torch.stack([torch.zeros(100), normal(100).abs()])
    for bits in BITS:
        scale, zero = choose(x, bits, symmetric, signed)
        assert scale.isfinite().all()
        assert zero.isfinite().all()
        assert (scale > 0).all()
        assert loss(x, scale, zero, bits, signed)[0] == 0


def test_formats_of_one_call_do_not_influence_each_other():
    x = normal(5, 300)
    bits = torch.tensor([2, 2, 5, 8])
    symmetric = torch.tensor([True, False, False, True])
    scale, zero = choose_qparams(x, bits, symmetric, True)
    assert scale.shape == zero.shape == (4, 5)
    for r in range(4):
        for c in range(5):
            alone = choose(x[c : c + 1], int(bits[r]), bool(symmetric[r]))
            torch.testing.assert_close((scale[r, c : c + 1], zero[r, c : c + 1]), alone, rtol=1e-6, atol=0)


def test_asymmetric_is_the_better_fit_of_skewed_data():
    x = normal(1, 2000).abs() + 1
    for bits in BITS:
        assert loss(x, *choose(x, bits, symmetric=False), bits) < loss(x, *choose(x, bits, symmetric=True), bits)


# -- what makes it fast changes nothing -------------------------------------------------------------------------------


def student(*shape: int, seed: int = 0) -> Tensor:
    """Student's t with 3 degrees of freedom: now and then a value far away from all others."""
    return normal(*shape, seed=seed) / normal(*shape, 3, seed=seed + 1).square().mean(-1).sqrt()


DISTRIBUTIONS = {
    "gaussian": lambda *shape: normal(*shape) * 0.05,
    "laplace": lambda *shape: normal(*shape) * normal(*shape, seed=1),
    "student": student,
    "skewed": lambda *shape: normal(*shape).exp() - 1.3,
    "rectified": lambda *shape: normal(*shape).relu(),
    "sparse": lambda *shape: normal(*shape) * (normal(*shape, seed=1) > 1),
    "outlier": lambda *shape: normal(*shape).index_fill(1, torch.tensor([0]), 30.0),
}


def all_errors(x: Tensor, bits: int, symmetric: bool, signed: bool) -> Tensor:
    """Mean |x - x_hat|^2.4 of the 80 candidates for each channel, float64 [80, C]."""
    n, p = code_range(bits, signed)
    x = x.double()
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    out = []
    for i in range(80):
        span = high - low
        if symmetric:
            span = 2 * torch.maximum(-low, high) if signed else high
        s = span * (1 - 0.01 * i) / (2**bits - 1)
        z = 0 * s if symmetric else (n - low * (1 - 0.01 * i) / s).round().clamp(n, p)
        grid = ((x / s[:, None]).round() + z[:, None]).clamp(n, p) - z[:, None]
        out.append((grid * s[:, None] - x).abs().pow(CALIBRATION_NORM).mean(1))
    return torch.stack(out)


def excess(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool, signed: bool) -> Tensor:
    """Error of a choice above that of the best of 80 candidates, relative, [C]."""
    return loss(x, scale, zero, bits, signed) / all_errors(x, bits, symmetric, signed).amin(0) - 1


@pytest.mark.parametrize("numel", [40, 600, 3000, 20000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_format_of_every_channel_is_as_good_as_the_scan(name, numel):
    """Sizes on all sides of the limits from which on bins stand for values."""
    x = DISTRIBUTIONS[name](12 if numel < 20000 else 2, numel)
    signed = name != "rectified"
    bits, symmetric = zip(*FORMATS, strict=True)
    scale, zero = choose_qparams(x, torch.tensor(bits), torch.tensor(symmetric), signed)
    found = torch.stack([excess(x, scale[r], zero[r], *FORMATS[r], signed) for r in range(len(FORMATS))])
    assert found.amax() < 5e-3
    assert found.mean() < 1e-4


@pytest.mark.parametrize("numel", [300, 30000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_histogram_is_as_good_as_the_values(name, numel):
    x = DISTRIBUTIONS[name](1, numel)
    signed = name != "rectified"
    histogram = Histogram()
    for part in x[0].split(7000):
        histogram.add(part)
    bits, symmetric = zip(*FORMATS, strict=True)
    scale, zero = choose_qparams(histogram, torch.tensor(bits), torch.tensor(symmetric), signed)
    found = torch.stack([excess(x, scale[r], zero[r], *FORMATS[r], signed) for r in range(len(FORMATS))])
    assert found.amax() < 5e-3
    assert found.mean() < 5e-4


def test_channels_do_not_influence_each_other(monkeypatch):
    """Neither in a block, nor where the channels are split into blocks."""
    x = torch.cat([normal(20, 700), 50 * student(20, 700)])
    bits, symmetric = torch.tensor([2, 5, 8]), torch.tensor([True, False, True])
    together = choose_qparams(x, bits, symmetric, True)
    monkeypatch.setattr("eqnet.nn.calibration._CHANNEL_BLOCK", 700 * 7)
    for ours, theirs in zip(choose_qparams(x, bits, symmetric, True), together, strict=True):
        assert torch.equal(ours, theirs)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(choose_qparams(x[order], bits, symmetric, True), together, strict=True):
        assert torch.equal(ours, theirs[:, order])


def test_the_number_of_threads_changes_nothing():
    x = student(30, 1500)
    bits, symmetric = torch.tensor([2, 5, 8]), torch.tensor([True, False, True])
    histogram = Histogram()
    histogram.add(x)
    alone = [*choose_qparams(x, bits, symmetric, True), *choose_qparams(histogram, bits, symmetric, True)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = [*choose_qparams(x, bits, symmetric, True), *choose_qparams(histogram, bits, symmetric, True)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_calls_run_side_by_side_on_one_thread_each():
    threads, seen, meeting = torch.get_num_threads(), [], Barrier(3, timeout=30)

    def meet(item: int) -> None:
        meeting.wait()  # passes only where three calls are under way
        seen.append((item, torch.get_num_threads()))

    try:
        torch.set_num_threads(3)
        in_threads(meet, [4, 5, 6])
        assert sorted(seen) == [(4, 1), (5, 1), (6, 1)]
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda item: 1 / item, [1, 0, 2])
        assert torch.get_num_threads() == 3
        fresh = Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert seen[-1] == 3
    finally:
        torch.set_num_threads(threads)


# -- histograms of a stream -------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.lists(st.integers(1, 59), max_size=5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_counts_depend_neither_on_batches_nor_on_their_order(values, cuts, random):
    whole, parts = Histogram(), Histogram()
    whole.add(torch.tensor(values))
    random.shuffle(values)
    for part in np.split(np.array(values, dtype=np.float32), sorted(c for c in cuts if c < len(values))):
        if len(part):
            parts.add(torch.from_numpy(part))
    assert whole.counts.sum() == len(values)
    assert (whole.low, whole.high) == (parts.low, parts.high) == (np.float32(min(values)), np.float32(max(values)))
    # a value on the edge of a bin may be rounded to either side
    assert (whole.counts - parts.counts).cumsum(0).abs().sum() <= len(values)


def test_counts_are_those_of_numpy():
    """Also after the range has doubled 50 times; R is the power of two above the largest value."""
    x = torch.cat([normal(5000) * 1e-9, normal(20000) * 1e6]).double().float()
    histogram = Histogram()
    for part in x.split(3000):
        histogram.add(part)
    limit = 2.0 ** np.ceil(np.log2(x.abs().max().item()))
    counts, _ = np.histogram(x.double().numpy(), bins=len(histogram.counts), range=(-limit, limit))
    moved = np.abs(np.cumsum(histogram.counts.numpy() - counts))
    moved[len(counts) // 2 - 1] = 0  # negative values next to zero may be rounded up to it
    assert moved.sum() <= 30
    assert histogram.counts.sum() == len(x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "bfloat16", "scalar"])
def test_any_layout_and_float_type_counts_every_value_once(layout):
    x = normal(4, 6, 5, 3).bfloat16().float()
    shaped = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "sliced": torch.cat([x, x], 1)[:, ::2],
        "bfloat16": x.bfloat16(),
        "scalar": x[0, 0, 0, 0],
    }[layout]
    a, b = Histogram(), Histogram()
    a.add(shaped)
    b.add(torch.tensor(shaped.float().flatten().tolist()))
    assert torch.equal(a.counts, b.counts)
    assert a.counts.sum() == shaped.numel()


def test_zeros_are_exact():
    """Half of ReLU's outputs: with 2 bits and one other value, the error is 0 wherever that value is on the grid."""
    histogram = Histogram()
    histogram.add(torch.tensor([0.0] * 1000 + [3.0]))
    scale, _ = choose_qparams(histogram, torch.tensor([2]), torch.tensor([True]), False)
    assert (3 / scale).round() * scale == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value):
    histogram = Histogram()
    histogram.add(torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        histogram.add(torch.tensor([1.0, value]))
    assert histogram.counts.sum() == 3
    with pytest.raises(ValueError, match="finite"):
        choose_qparams(torch.tensor([[1.0, value]]), torch.tensor([4]), torch.tensor([True]), True)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Histogram().add(torch.empty(0, 3))


# -- a supernet in several batches ------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """No BN: an image does not influence another one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))


def tables(supernet: Supernet) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in supernet.state_dict().items() if "quantizer" in k}


def test_batches_calibrate_like_all_images_together(images):
    x = images(64, (3, 4, 4))
    whole = Supernet.from_model(network(), (3, 4, 4), fixed="none")
    parts = Supernet.from_model(network(), (3, 4, 4), fixed="none")
    whole.calibrate(x)
    parts.calibrate(x.split(10))
    assert parts.calibrated
    ours, theirs = tables(parts), tables(whole)
    exact = [
        k for k in theirs if k.startswith("model.1.") or "weight_quantizer" in k
    ]  # the same input, the same weights
    assert all(torch.equal(ours[k], theirs[k]) for k in exact)
    # later inputs lie behind layers that ran with the step sizes of fewer images
    scales = [k for k in theirs if k.endswith("act_quantizer.scale")]
    difference = torch.cat([(ours[k] / theirs[k]).log().abs() for k in scales])
    assert difference.median() < 0.011
    assert difference.max() < 0.15
    again = Supernet.from_model(network(), (3, 4, 4), fixed="none")
    again.calibrate(batch for batch in x.split(10))
    assert all(torch.equal(v, ours[k]) for k, v in tables(again).items())


def test_a_negative_value_of_a_later_batch_makes_an_input_signed(images):
    x = images(8, (3, 4, 4))
    supernet = Supernet.from_model(network(), (3, 4, 4), fixed="none")
    quantizer = supernet.layers["1"].act_quantizer
    supernet.calibrate([x.abs(), x.abs()])
    assert not quantizer.signed.any()
    supernet.calibrate([x.abs(), x])
    assert quantizer.signed.all()
    late = tables(supernet)
    supernet.calibrate([x, x.abs()])
    assert all(torch.equal(v, late[k]) for k, v in tables(supernet).items() if k.startswith("model.1."))


def test_every_image_passes_once(images):
    supernet = Supernet.from_model(network(), (3, 4, 4), fixed="none")
    seen = []
    supernet.layers["5"].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    supernet.calibrate(images(10, (3, 4, 4)).split(4))
    assert seen == [4, 4, 2]


@pytest.mark.parametrize("case", ["no batch", "no image", "not finite", "wrong size"])
def test_a_calibration_that_fails_changes_nothing(case, images):
    x = images(6, (3, 4, 4))
    batches = {
        "no batch": [],
        "no image": [x[:0]],
        "not finite": [x, x.index_fill(0, torch.tensor([2]), torch.nan)],
        "wrong size": [x, images(6, (3, 5, 5))],
    }[case]
    for calibrated in (False, True):
        supernet = Supernet.from_model(network(), (3, 4, 4), bits=[2, 8], fixed="none")
        if calibrated:
            supernet.calibrate(x)
        supernet.set_config(supernet.space.smallest())
        before = tables(supernet)
        with torch.no_grad():
            for weight in supernet.latent_weights().values():
                weight.mul_(1.5)
        with pytest.raises(RuntimeError if case == "wrong size" else ValueError):
            supernet.calibrate(batches)
        assert all(torch.equal(v, before[k]) for k, v in tables(supernet).items())
        assert supernet.calibrated == calibrated
        assert supernet.config == supernet.space.smallest()
        assert not any(q.observing for _, q in supernet.quantizers())
