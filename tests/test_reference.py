"""The integer reference: exact sums, and the codes that the simulation has at the input of every layer."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from deploy_nets import SmallNet, make_subnet, some_images, without_input_quantizers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401
from eqnet.deploy.codes import ActGrid, layer_codes, quantized_layers
from eqnet.deploy.fold import fold_graph
from eqnet.deploy.graph import trace
from eqnet.deploy.reference import (
    check_reference,
    integer_conv,
    integer_conv_transpose,
    integer_reference,
    quantize_to_codes,
)

SIZE = (3, 8, 8)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-255, 256, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_convolutions_are_exact(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    seed: int,
) -> None:
    """float64 is exact on these integers, so it must agree to the last one."""
    x, weight = integers((2, 2 * groups, 7, 8), seed), integers((3 * groups, 2, *kernel), seed + 1)
    mine = integer_conv(x, weight, stride, padding, padding, dilation, groups)
    assert mine.dtype == torch.int64
    assert torch.equal(mine.double(), F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups))
    weight = integers((2 * groups, 3, *kernel), seed + 2)
    extra = tuple(min(s, d) - 1 for s, d in zip(stride, dilation, strict=True))
    reach = tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    padding = tuple(min(p, r) for p, r in zip(padding, reach, strict=True))  # type: ignore[assignment]
    mine = integer_conv_transpose(x, weight, stride, padding, extra, dilation, groups)
    theirs = F.conv_transpose2d(x.double(), weight.double(), None, stride, padding, extra, groups, dilation)
    assert torch.equal(mine.double(), theirs)


def test_padding_may_differ_at_both_ends_and_there_may_be_one_dimension() -> None:
    x, weight = integers((2, 4, 9), 0), integers((6, 2, 3), 1)
    mine = integer_conv(x, weight, [2], [0], [3], [2], 2)
    assert torch.equal(mine.double(), F.conv1d(F.pad(x.double(), (0, 3)), weight.double(), None, 2, 0, 2, 2))


def test_sums_wider_than_a_float() -> None:
    """2^24 + 1 is not a float32; int64 has no such gaps."""
    x = torch.full((1, 2**17, 1, 1), 128)
    weight = torch.full((1, 2**17, 1, 1), 1)
    x[0, 0] += 1
    assert int(integer_conv(x, weight, [1, 1], [0, 0], [0, 0], [1, 1], 1)) == 2**24 + 1


@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(0, 255, 0), (0, 15, 5), (-128, 127, 0), (-2, 1, -2), (-8, 7, 7)])
def test_codes_are_those_of_the_formula(qmin: int, qmax: int, zero: int) -> None:
    """round_half_even(clip(x / s, qmin - z, qmax - z)) + z, at ties, at the ends and beyond them."""
    x = np.arange(-300, 600, dtype=np.float32) / 2 * np.float32(0.25)
    codes = quantize_to_codes(torch.from_numpy(x), ActGrid(0.25, zero, qmin, qmax))
    expected = np.clip(np.rint(x / np.float32(0.25)) + zero, qmin, qmax)
    assert np.array_equal(codes.numpy(), expected)
    assert (codes.min(), codes.max()) == (qmin, qmax)
    assert [ActGrid(0.25, zero, qmin, qmax).code(float(v)) for v in x] == expected.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_simulation_is_integer_arithmetic(seed: int) -> None:
    torch.manual_seed(seed)
    subnet, config = make_subnet(SmallNet(), seed=seed)
    check = check_reference(subnet, some_images(8, SIZE, 3))
    assert check.code_errors == 0
    assert check.accumulator_error < 1e-6, "in units of 1: the sums are the same integers"
    assert check.output_error < 1e-12
    assert check.layers == len(config)
    assert 8 < check.accumulator_bits <= 32


@pytest.mark.parametrize("seed", range(2))
def test_the_simulation_in_float32_too(seed: int) -> None:
    """Where float32 is exact, bit by bit; otherwise in all but the rare code at the edge of a step."""
    torch.manual_seed(seed)
    subnet, _ = make_subnet(SmallNet(), seed=seed, exact=True)
    x = some_images(8, SIZE, 3)
    assert torch.equal(integer_reference(trace(subnet, SIZE), x), subnet(x))
    subnet, _ = make_subnet(SmallNet(), seed=seed)
    difference = (integer_reference(trace(subnet, SIZE), x) - subnet(x)).abs().amax(1) / subnet(x).abs().max()
    assert (difference < 1e-5).double().mean() >= 0.75


def test_a_broken_subnet_is_noticed() -> None:
    """The check compares with what the module computes now, not with what it was traced as."""
    subnet, _ = make_subnet(SmallNet(), bits=[8])
    graph = trace(subnet, SIZE)
    subnet.down.weight_codes[0, 0, 0, 0] += 1 if subnet.down.weight_codes[0, 0, 0, 0] < 0 else -1
    check = check_reference(subnet, some_images(2, SIZE, 3), graph)
    assert check.accumulator_error >= 1
    subnet.down.weight_codes.copy_(torch.from_numpy(graph.layers["down"].codes))
    subnet.fc1.act_scale.mul_(1.25)
    assert check_reference(subnet, some_images(2, SIZE, 3), graph).output_error > 1e-6


def test_cifar_resnet20_of_mixed_bits() -> None:
    size = (3, 32, 32)
    subnet, config = make_subnet(timm.create_model("cifar_resnet20", width=4), size)
    check = check_reference(subnet, some_images(2, size, 3))
    assert (check.code_errors, check.layers) == (0, len(config))
    assert check.accumulator_error < 1e-6
    assert check.output_error < 1e-12


def test_observers_see_every_layer_in_order() -> None:
    subnet, _ = make_subnet(SmallNet())
    x, seen = some_images(2, SIZE, 3), []
    graph = trace(subnet, SIZE)
    integer_reference(graph, x, lambda name, codes, sums: seen.append((name, codes, sums)))
    assert [name for name, _, _ in seen] == ["stem", "depthwise", "pointwise", "down", "skip", "fc1", "fc2"]
    for name, codes, sums in seen:
        act = graph.layers[name].act
        assert act is not None
        assert codes.dtype == sums.dtype == torch.int64
        assert int(codes.min()) >= act.qmin
        assert int(codes.max()) <= act.qmax
    name, codes, sums = seen[0]
    layer = graph.layers["stem"]
    assert layer.act is not None
    r = (codes - layer.act.zero_point).double()
    assert torch.equal(sums.double(), F.conv2d(r, torch.from_numpy(layer.centred).double(), padding=1))


def test_folded_graphs_compute_the_same_function() -> None:
    """Folding changes the order of roundings only; biases in int32 are added as integers."""
    subnet, _ = make_subnet(SmallNet(), exact=True)
    x = some_images(4, SIZE, 3)
    graph = trace(subnet, SIZE)
    folded = fold_graph(graph, zero_points=True)
    assert set(folded.notes) == {"stem", "depthwise", "pointwise"}
    assert set(folded.notes.values()) == {"folded"}
    assert torch.equal(integer_reference(folded.graph, x), subnet(x))
    assert torch.equal(integer_reference(fold_graph(graph, fold="none").graph, x), subnet(x))
    rounded = fold_graph(graph, zero_points=True, bias="int32")
    for name, error in rounded.bias_errors.items():
        layer, before = rounded.graph.layers[name], folded.graph.layers[name]
        assert layer.bias_codes is not None
        assert before.bias is not None
        assert np.array_equal(layer.bias_codes, np.rint(before.bias / layer.bias_scale))
        assert error <= layer.bias_scale.max() / 2
    assert graph.layers["stem"].bias is None, "the graph itself is left alone"


def test_inputs_in_floating_point() -> None:
    subnet, config = make_subnet(SmallNet())
    without_input_quantizers(subnet, config)
    x = some_images(4, SIZE, 3).double()
    seen: list[str] = []
    outputs = integer_reference(trace(subnet, SIZE), x, lambda name, codes, sums: seen.append(name))
    torch.testing.assert_close(outputs, subnet.double()(x), rtol=1e-10, atol=1e-10)
    assert not seen


def test_weights_are_bit_identical_to_the_subnet() -> None:
    subnet, _ = make_subnet(SmallNet())
    for module in quantized_layers(subnet).values():
        assert np.array_equal(layer_codes(module).weight, module.weight.numpy())  # type: ignore[operator, union-attr]


def test_wrong_images() -> None:
    subnet, _ = make_subnet(SmallNet())
    with pytest.raises(ValueError, match=r"the graph is for images \[N, 3, 8, 8\]; got \[2, 3, 9, 8\]"):
        integer_reference(trace(subnet, SIZE), some_images(2, (3, 9, 8)))
    with pytest.raises(ValueError, match=r"the graph is for images \[1, 3, 8, 8\]; got \[2, 3, 8, 8\]"):
        integer_reference(trace(subnet, SIZE, batch=1), some_images(2, SIZE))
    with pytest.raises(ValueError, match="no quantized layer"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("mobilenetv2_100", {}),
        ("efficientnet_b0", {}),
        ("tf_efficientnet_b0", {}),
        ("deit_tiny_patch16_224", {"img_size": 64}),
        ("swinv2_cr_tiny_224", {"img_size": 64, "window_size": 2}),
    ],
)
def test_whole_models(name: str, arguments: dict[str, int]) -> None:
    size = (3, 64, 64)
    subnet, config = make_subnet(timm.create_model(name, **arguments), size)
    check = check_reference(subnet, some_images(2, size, 3))
    assert check.code_errors == 0
    assert check.accumulator_error < 1e-6
    assert check.output_error < 1e-9
    assert check.layers == len(config)
