"""Costs against closed forms, brute force and the published figures; budgets: grammar, feasibility, repair."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eqnet.space import (
    ALL_FORMS,
    COSTS,
    BoundBudget,
    Budget,
    CostModel,
    Form,
    LayerConfig,
    LayerInfo,
    MeanBitsSampler,
    QuantConfig,
    QuantFormat,
    QuantSpace,
    act_bits,
    act_compression,
    bitops,
    model_size,
    weight_bits,
    weight_compression,
)
from eqnet.space.cost import CostTable

NETS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")


@pytest.fixture(scope="module")
def imagenet_spaces() -> dict[str, QuantSpace]:
    """2-8 bit spaces of the four networks of the paper at 224 x 224, traced on the meta device."""
    return {name: QuantSpace.from_layers(trace(name)) for name in NETS}


def trace(name: str) -> list[LayerInfo]:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    layers: list[LayerInfo] = []

    def record(name: str, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        kind = "conv" if isinstance(module, torch.nn.Conv2d) else "linear"
        macs = output.numel() * module.weight[0].numel()
        layers.append(LayerInfo(name, kind, tuple(module.weight.shape), macs, inputs[0].numel()))

    for layer_name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda *args, n=layer_name: record(n, *args))
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    return layers


def make_layers() -> list[LayerInfo]:
    """Four layers; `c` is read directly, so its input stays in floating point."""
    return [
        LayerInfo("a", "conv", (16, 8, 3, 3), macs=16 * 8 * 9 * 100, act_numel=8 * 100),
        LayerInfo("b", "conv_transpose", (16, 4, 2, 2), macs=16 * 4 * 4 * 100, act_numel=16 * 100),
        LayerInfo("c", "linear", (5, 7), macs=35, act_numel=0, calls=0),
        LayerInfo("d", "linear", (10, 9), macs=90, act_numel=9),
    ]


def make_config(weight: QuantFormat, act: QuantFormat) -> QuantConfig:
    return QuantConfig({i.name: LayerConfig(weight, act if i.calls else None) for i in make_layers()})


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_size_of_known_layers():
    space = QuantSpace.from_layers(make_layers(), fixed="none", float_numel=16)
    size = model_size(space)
    config = make_config(QuantFormat(3, False, "channel"), QuantFormat(5, False))
    codes = 1152 * 3 // 8 + 256 * 3 // 8 + math.ceil(35 * 3 / 8) + math.ceil(90 * 3 / 8)
    channels = 16 + 4 + 5 + 10  # output channels, also of the transposed convolution
    assert size.of(config) == codes + 5 * channels + 3 * 5 + 4 * 16
    config = make_config(QuantFormat(3, True, "channel"), QuantFormat(5, True))
    assert size.of(config) == codes + 4 * channels + 3 * 4 + 4 * 16
    config = make_config(QuantFormat(3, True, "tensor"), QuantFormat(5, True))
    assert size.of(config) == codes + 4 * 4 + 3 * 4 + 4 * 16
    assert size.unit == "bytes"


def test_bitops_of_known_layers_with_float_inputs_at_32():
    space = QuantSpace.from_layers(make_layers(), fixed="none")
    config = make_config(QuantFormat(3), QuantFormat(5))
    macs = {i.name: i.macs for i in make_layers()}
    assert bitops(space).of(config) == 15 * (macs["a"] + macs["b"] + macs["d"]) + 3 * 32 * macs["c"]
    config = config.replace({"a": LayerConfig(QuantFormat(8), QuantFormat(2))})
    assert bitops(space).of(config) == 16 * macs["a"] + 15 * (macs["b"] + macs["d"]) + 3 * 32 * macs["c"]


def test_mean_bits_of_known_layers():
    space = QuantSpace.from_layers(make_layers(), fixed="none")
    config = make_config(QuantFormat(2), QuantFormat(4)).replace({"b": LayerConfig(QuantFormat(8), QuantFormat(7))})
    assert weight_bits(space).of(config) == pytest.approx((2 * (1152 + 35 + 90) + 8 * 256) / 1533)
    assert act_bits(space).of(config) == pytest.approx((4 * (800 + 9) + 7 * 1600) / 2409)


@given(st.integers(2, 8), st.integers(2, 8), st.sampled_from(ALL_FORMS))
def test_b_bits_everywhere_cost_exactly_b(w: int, a: int, form: Form):
    """EQ-Net fact 21; exactly, so that the budget "3" admits the uniform 3-bit config."""
    for fixed in ("first_last_8bit", "none"):
        space = QuantSpace.from_layers(make_layers(), fixed=fixed)
        config = space.uniform(w, form, act_bits=a)
        assert (weight_bits(space).of(config), act_bits(space).of(config)) == (w, a)


def test_a_space_of_fixed_layers_counts_them_all():
    space = QuantSpace.from_layers(make_layers()[::3])
    assert (weight_bits(space).of(space.largest()), act_bits(space).of(space.largest())) == (8, 8)


def test_spaces_without_quantized_inputs_have_no_mean_activation_bits():
    space = QuantSpace.from_layers(make_layers()[2:3], fixed="none")
    assert weight_bits(space).minimum == 2
    with pytest.raises(ValueError, match="quantized act"):
        act_bits(space)


def test_tied_layers_cost_as_much_as_untied_ones():
    layers = make_layers()
    free = QuantSpace.from_layers(layers, fixed="none", float_numel=3)
    tied = QuantSpace.from_layers(layers, fixed="none", float_numel=3, ties=[("a", "c"), ("b", "d")])
    rng = np.random.default_rng(0)
    for config in [tied.sample(rng) for _ in range(50)]:
        for name, build in COSTS.items():
            assert build(tied).of(config) == build(free).of(config), name


@pytest.mark.parametrize("name", COSTS)
def test_layers_add_up(name: str):
    space = QuantSpace.from_layers(make_layers(), float_numel=7, ties=[("b", "c")])
    cost = COSTS[name](space)
    genomes = space.random_genomes(np.random.default_rng(0), 10_000)
    parts = cost.per_layer(genomes)
    assert parts.shape == (10_000, 4)
    np.testing.assert_allclose(parts.sum(1) + (28 if name == "size" else 0), cost(genomes))
    if name in "wa":
        assert (parts[:, [0, 3]] == 0).all()  # the pinned ends do not count
    assert (cost(genomes[:7]) == cost(genomes)[:7]).all()
    assert cost(genomes[:0]).shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_costs_looked_up_together_are_the_same(count: int):
    space = QuantSpace.from_layers(make_layers(), float_numel=7, ties=[("b", "c")])
    costs = [build(space) for build in COSTS.values()][:count]
    genomes = space.random_genomes(np.random.default_rng(0), 3000)
    values = CostTable(costs)(genomes)
    assert values.shape == (3000, count)
    assert (values == np.stack([cost(genomes) for cost in costs], 1)).all()
    assert CostTable(costs)(genomes[:0]).shape == (0, count)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("fixed", ["first_last_8bit", "none"])
def test_the_minimum_is_the_brute_force_minimum(name: str, fixed: str):
    space = QuantSpace.from_layers(make_layers(), bits=(2, 5), act_bits=(3,), fixed=fixed, ties=[("b", "c")])
    every = np.array(list(itertools.product(*(range(n) for n in space.num_formats))))
    cost = COSTS[name](space)
    assert cost.minimum == cost(every).min()


def test_costs_of_foreign_configs_are_refused():
    space = QuantSpace.from_layers(make_layers())
    with pytest.raises(ValueError, match="'a'"):
        bitops(space).of(make_config(QuantFormat(3), QuantFormat(5)))


def test_costs_print_with_units():
    space = QuantSpace.from_layers(make_layers())
    assert weight_bits(space).format(2.3149) == "2.31 bits"
    assert bitops(space).format(3.5e8) == "350 MBitOps"
    assert bitops(space).format(1.25e9) == "1.25 GBitOps"
    assert [model_size(space).format(v) for v in (12, 180.2 * 1024, 3 * 2**20)] == ["12.0 B", "180.2 KiB", "3.0 MiB"]


# -- published figures (EQ-Net facts 21 and 25, Table 2) --------------------------------------------------------------


@pytest.mark.parametrize(("net", "count"), list(zip(NETS, (21, 54, 53, 82), strict=True)))
def test_layer_counts(imagenet_spaces: dict[str, QuantSpace], net: str, count: int):
    assert len(imagenet_spaces[net].layers) == count


@pytest.mark.parametrize(
    ("net", "bits", "weight", "act"),
    [
        ("resnet18", 2, 14.11, 13.25),
        ("resnet18", 3, 9.93, 9.56),
        ("resnet50", 2, 12.88, 15.34),
        ("resnet50", 3, 9.40, 10.42),
        ("mobilenet_v2", 4, 5.84, 7.82),
        ("efficientnet_b0", 4, 6.43, 7.83),
    ],
)
def test_compression(imagenet_spaces: dict[str, QuantSpace], net: str, bits: int, weight: float, act: float):
    space = imagenet_spaces[net]
    genomes = space.encode_all([space.uniform(bits, form) for form in ALL_FORMS])
    np.testing.assert_allclose(weight_compression(space, genomes), weight, atol=0.005)
    np.testing.assert_allclose(act_compression(space, genomes), act, atol=0.005)


@pytest.mark.parametrize(
    ("net", "gmacs", "gbitops"),
    [
        ("resnet18", 1.814, (14.37, 22.85, 34.71)),
        ("resnet50", 4.089, (23.56, 43.41, 71.19)),
        ("mobilenet_v2", 0.3008, (1.93, 3.37, 5.39)),
        ("efficientnet_b0", 0.3858, (2.27, 4.14, 6.75)),
    ],
)
def test_bitops_of_uniform_configs(imagenet_spaces: dict[str, QuantSpace], net: str, gmacs: float, gbitops: tuple):
    space = imagenet_spaces[net]
    assert sum(layer.macs for layer in space.layers) / 1e9 == pytest.approx(gmacs, abs=5e-4)
    genomes = space.encode_all([space.uniform(bits, ALL_FORMS[0]) for bits in (2, 3, 4)])
    np.testing.assert_allclose(bitops(space)(genomes) / 1e9, gbitops, atol=0.005)
    assert weight_bits(space)(genomes).tolist() == act_bits(space)(genomes).tolist() == [2, 3, 4]


# -- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limits", "canonical"),
    [
        ("4", {"w": 4, "a": 4}, "w=4,a=4"),
        ("2.9", {"w": 2.9, "a": 2.9}, "w=2.9,a=2.9"),
        ("w=3", {"w": 3}, "w=3"),
        ("a=4, w=3", {"w": 3, "a": 4}, "w=3,a=4"),
        (" size = 180 KiB ", {"size": 180 * 1024}, "size=180KiB"),
        ("size=1MB", {"size": 1e6}, "size=1MB"),
        ("size=1.5mib", {"size": 1.5 * 2**20}, "size=1.5MiB"),
        ("size=77B", {"size": 77}, "size=77B"),
        ("size=2GiB", {"size": 2**31}, "size=2GiB"),
        ("size=3KB", {"size": 3000}, "size=3KB"),
        ("bitops=1.2G", {"bitops": 1.2e9}, "bitops=1.2G"),
        ("bitops=1200000000", {"bitops": 1.2e9}, "bitops=1.2G"),
        ("bitops=1.2e9", {"bitops": 1.2e9}, "bitops=1.2G"),
        ("bitops=3T,4", {"w": 4, "a": 4, "bitops": 3e12}, "w=4,a=4,bitops=3T"),
        ("latency=2.5ms", {"latency": 2.5}, "latency=2.5ms"),
        ("latency=80us", {"latency": 0.08}, "latency=80us"),
    ],
)
def test_budgets_parse(text: str, limits: dict[str, float], canonical: str):
    budget = Budget.parse(text)
    assert dict(budget.limits) == pytest.approx(limits, rel=1e-15)
    assert str(budget) == canonical
    assert Budget.parse(canonical) == budget


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a number"),
        ("4,", "not a number"),
        ("w=", "not a number"),
        ("w=3=4", "not a number"),
        ("four", "not a number"),
        ("nan", "not a number"),
        ("bitops=inf", "not a number"),
        ("bitop=1G", "did you mean 'bitops'"),
        ("Size=1MB", "did you mean 'size'"),
        ("flops=1G", "unknown limit 'flops'"),
        ("=4", "unknown limit ''"),
        ("w=-3", "positive"),
        ("w=0", "positive"),
        ("size=1e999MB", "positive finite"),
        ("w=3,w=4", "'w' is given twice"),
        ("4,a=3", "'a' is given twice"),
        ("size=180", "has no unit"),
        ("size=180G", "unit G"),
        ("bitops=1.2GiB", "unit GiB"),
        ("w=3bits", "unit bits"),
        ("latency=2", "has no unit"),
        ("w=٣", "not a number"),
    ],
)
def test_wrong_budgets_are_refused_with_an_example(text: str, problem: str):
    with pytest.raises(ValueError, match=problem) as error:
        Budget.parse(text)
    assert "size=180KiB" in str(error.value)
    assert "\n" not in str(error.value)


fragments = st.sampled_from(
    ["w", "a", "size", "bitops", "latency", "=", ",", "3", "4.5", "-", "e", "1e400", " ", "KiB", "G", "ms"]
)


@given(st.text() | st.lists(fragments, max_size=12).map("".join))
def test_parsing_gives_a_budget_or_a_value_error(text: str):
    try:
        budget = Budget.parse(text)
    except ValueError:
        return
    assert budget.limits
    assert all(0 < limit < math.inf for _, limit in budget.limits)


@given(
    st.dictionaries(
        st.sampled_from(["w", "a", "size", "bitops", "latency"]),
        st.floats(1e-9, 1e18, allow_subnormal=False),
        min_size=1,
    )
)
def test_every_budget_parses_back_from_its_own_text(limits: dict[str, float]):
    names = ("w", "a", "size", "bitops", "latency")
    budget = Budget(tuple((name, limits[name]) for name in names if name in limits))
    assert Budget.parse(str(budget)) == budget


# -- feasibility ------------------------------------------------------------------------------------------------------


@st.composite
def spaces(draw: st.DrawFn) -> QuantSpace:
    """Small product spaces, tied and untied, with and without layers whose input stays in floating point."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=3, max_size=5))
    layers = [
        LayerInfo(f"l{i}", "linear", shape, draw(st.integers(1, 9999)), draw(st.integers(1, 999)), calls=int(i != 1))
        for i, shape in enumerate(shapes)
    ]
    return QuantSpace.from_layers(
        layers,
        bits=draw(st.sets(st.integers(2, 8), min_size=2)),
        act_bits=draw(st.sets(st.integers(2, 8), min_size=1)),
        symmetric=draw(st.sampled_from([(True,), (False,), (True, False)])),
        granularity=draw(st.sampled_from([("tensor",), ("channel",), ("tensor", "channel")])),
        fixed="none",
        ties=draw(st.sampled_from([(), (("l0", "l2"),)])),
        float_numel=draw(st.integers(0, 50)),
    )


@st.composite
def budgets(draw: st.DrawFn, space: QuantSpace) -> Budget:
    """One to three limits around the reachable range of each cost."""
    names = draw(st.lists(st.sampled_from(list(COSTS)), min_size=1, max_size=3, unique=True))
    limits = []
    for name in names:
        cost = COSTS[name](space)
        high = cost(space.encode_all([space.largest(space.forms[-1])]))[0]
        limits.append((name, cost.minimum + draw(st.floats(-0.2, 1.1)) * (high - cost.minimum)))
    assume(all(limit > 0 for _, limit in limits))
    return Budget(tuple(limits))


@given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from([None, 0.5]))
@settings(max_examples=150)
def test_repair_meets_the_budget_or_bind_says_it_cannot(data: st.DataObject, seed: int, band: float | None):
    space = data.draw(spaces())
    budget = data.draw(budgets(space))
    if any(COSTS[name](space).minimum > limit for name, limit in budget.limits):
        with pytest.raises(ValueError, match="smallest reachable"):
            budget.bind(space, band)
        return
    bound = budget.bind(space, band)
    rng = np.random.default_rng(seed)
    shared = MeanBitsSampler(space).sample(rng, 20)
    mixed = space.random_genomes(rng, 20)
    for genomes in (shared, mixed):
        before = genomes.copy()
        repaired = bound.repair(genomes, rng)
        assert (genomes == before).all()
        assert repaired.dtype == np.int16
        assert ((repaired >= 0) & (repaired < space.num_formats)).all()
        assert bound.feasible(repaired).all()
        assert (bound.violation(repaired) == 0).all()
        assert ((bound.violation(genomes) > 0) == ~bound.feasible(genomes)).all()
        fine = bound.feasible(genomes) & (bound.values(genomes) > bound.lowers).all(1)
        assert (repaired[fine] == genomes[fine]).all()
        filled = bound.fill(repaired, rng)
        assert bound.feasible(filled).all()
        assert (bound.values(filled) >= bound.values(repaired)).all()
    assert (space.form_of(bound.repair(shared, rng)) >= 0).all()


def has_room(bound: BoundBudget, genome: np.ndarray) -> bool:
    """Whether some step up of one gene keeps all limits."""
    steps = bound.space.step_up[np.arange(bound.space.num_genes), genome]
    more = np.where(np.eye(len(genome), dtype=bool), steps, genome)[steps >= 0]
    return bool(bound.feasible(more).any())


@given(st.data())
@settings(max_examples=60)
def test_filled_genomes_have_no_room_for_one_more_step(data: st.DataObject):
    space = data.draw(spaces())
    names = data.draw(st.lists(st.sampled_from(list(COSTS)), min_size=1, max_size=3, unique=True))
    costs = [COSTS[name](space) for name in names]
    largest = space.largest(space.forms[-1])
    bound = Budget(tuple((cost.name, (cost.minimum + cost.of(largest)) / 2) for cost in costs)).bind(space)
    rng = np.random.default_rng(0)
    filled = bound.fill(bound.repair(space.random_genomes(rng, 5), rng), rng)
    assert bound.feasible(filled).all()
    assert not any(has_room(bound, genome) for genome in filled)


def test_filling_visits_all_groups_of_a_deep_network(imagenet_spaces: dict[str, QuantSpace]):
    space = imagenet_spaces["efficientnet_b0"]
    form = ALL_FORMS[0]
    bound = Budget.parse("3,bitops=5G").bind(space)
    rng = np.random.default_rng(0)
    start = np.repeat(space.encode_all([space.smallest(form)]), 10, 0)
    filled = bound.fill(start, rng)
    assert bound.feasible(filled).all()
    assert not any(has_room(bound, genome) for genome in filled)
    assert len(np.unique(filled, axis=0)) == 10
    assert (space.form_of(filled) == 0).all()
    everything = Budget.parse("8").bind(space).fill(start, rng)
    assert (everything == space.encode(space.largest(form))).all()


@given(st.data())
@settings(max_examples=40)
def test_repair_of_one_limit_goes_down_only_and_not_further_than_needed(data: st.DataObject):
    space = data.draw(spaces())
    cost = COSTS[data.draw(st.sampled_from(list(COSTS)))](space)
    limit = cost.minimum + data.draw(st.floats(0.1, 0.9)) * (cost.of(space.largest(space.forms[-1])) - cost.minimum)
    bound = Budget(((cost.name, limit),)).bind(space)
    rng = np.random.default_rng(0)
    genomes = MeanBitsSampler(space).sample(rng, 10)
    columns = np.arange(space.num_genes)
    for genome, repaired in zip(genomes, bound.repair(genomes, rng), strict=True):
        if space.form_of(genome[None]) != space.form_of(repaired[None]):
            continue  # no config of its form is cheap enough
        before, after = (space.bits[columns, g] for g in (genome, repaired))
        assert (after <= before).all()
        stepped = np.flatnonzero(after < before)
        back = np.where(np.eye(space.num_genes, dtype=bool), space.step_up[columns, repaired], repaired)[stepped]
        if len(stepped):  # undoing the largest step would exceed the limit
            assert cost(back).max() > limit


def test_costs_that_are_no_whole_numbers_keep_their_limits():
    """Seconds add up to slightly different sums in another order; a limit is a limit all the same."""
    space = QuantSpace.from_layers(make_layers(), fixed="none")
    latency = CostModel(space, "bitops", "bitops", lambda layer, weight, act: 1e-7 * layer.macs * weight.bits**0.5 / 3)
    rng = np.random.default_rng(0)
    genomes = space.random_genomes(rng, 300)
    for limit in latency(genomes[:40]):  # limits that are met exactly
        bound = BoundBudget(space, [latency], np.array([limit]), np.array([-np.inf]))
        filled = bound.fill(bound.repair(genomes, rng), rng)
        assert (latency(filled) <= limit).all()
        assert (bound.values(filled)[:, 0] == latency(filled)).all()


@pytest.mark.parametrize("net", NETS)
def test_repair_lands_in_the_band_of_the_paper(imagenet_spaces: dict[str, QuantSpace], net: str):
    """EQ-Net facts 22 and 23: c - 0.5 < mean bits <= c for weights and activations, for every feasible c, on every net."""
    space = imagenet_spaces[net].restrict_form(ALL_FORMS[4])
    rng = np.random.default_rng(0)
    for c in np.arange(2.5, 7.1, 0.5):
        bound = Budget.parse(f"{c}").bind(space, band=0.5)
        genomes = bound.repair(space.random_genomes(rng, 15), rng)
        assert ((bound.values(genomes) > c - 0.5) & (bound.values(genomes) <= c)).all(), c
        assert ((genomes >= 0) & (genomes < space.num_formats)).all()
        assert len(np.unique(genomes, axis=0)) == 15


def test_repair_reaches_the_smallest_config_and_stops_above_the_largest(imagenet_spaces: dict[str, QuantSpace]):
    space = imagenet_spaces["resnet18"]
    rng = np.random.default_rng(0)
    genomes = MeanBitsSampler(space).sample(rng, 10)
    low = Budget.parse("2").bind(space, band=0.5).repair(genomes, rng)
    assert (weight_bits(space)(low) == 2).all()
    assert (act_bits(space)(low) == 2).all()
    assert (space.form_of(low) == space.form_of(genomes)).all()
    high = Budget.parse("9").bind(space, band=0.5).repair(genomes, rng)
    assert (weight_bits(space)(high) == 8).all()
    assert (space.form_of(high) == space.form_of(genomes)).all()


def test_repair_is_deterministic(imagenet_spaces: dict[str, QuantSpace]):
    space = imagenet_spaces["resnet18"]
    bound = Budget.parse("3.5,bitops=25G").bind(space, band=0.5)
    genomes = space.random_genomes(np.random.default_rng(0), 10)
    first, second = (bound.repair(genomes, np.random.default_rng(1)) for _ in range(2))
    assert (first == second).all()


def test_a_form_that_does_not_fit_gives_way_to_the_cheapest_one():
    """Per-channel step sizes of these thin layers outweigh their codes, so only per-tensor configs are small enough."""
    layers = [LayerInfo(f"l{i}", "conv", (64, 1, 3, 3), 576, 64) for i in range(4)]
    space = QuantSpace.from_layers(layers, fixed="none")
    bound = Budget.parse("size=900B").bind(space)
    channel = [k for k, form in enumerate(ALL_FORMS) if form.granularity == "channel"]
    rng = np.random.default_rng(0)
    genomes = space.impose_form(space.random_genomes(rng, 40), np.repeat(channel, 10))
    assert bound.violation(genomes).min() > 0
    repaired = bound.repair(genomes, rng)
    assert bound.feasible(repaired).all()
    assert (space.form_of(repaired) == ALL_FORMS.index(Form.parse("tensor-sym-sym"))).all()
    assert len(np.unique(repaired, axis=0)) > 20  # bits come from the row, not from one fallback


def test_limits_that_want_different_formats_are_met_together():
    """4 bits exist only per channel and tensors start at 8 bits: few mean bits cost bytes, and the other way round.

    The pinned layer is symmetric and the others are not, so the layers share no form and may mix granularities.
    """
    layers = [
        LayerInfo("pinned", "linear", (1, 1), 1, 1),
        LayerInfo("thin", "conv", (64, 1, 1, 1), 64, 64),
        LayerInfo("thick", "linear", (8, 512), 4096, 512),
    ]
    pin = LayerConfig(QuantFormat(8), QuantFormat(8))
    space = QuantSpace.from_layers(layers, (4, 8), (8,), symmetric=(False,), fixed={"pinned": pin})
    space = space.restrict(
        lambda layer, slot, fmt: (
            slot == "act" or layer.name == "pinned" or (fmt.bits == 4) == (fmt.granularity == "channel")
        )
    )
    rng = np.random.default_rng(0)
    genomes = space.random_genomes(rng, 50)
    size = model_size(space)
    per_channel = space.decode(genomes[weight_bits(space)(genomes).argmin()])
    assert {per_channel[name].weight.bits for name in ("thin", "thick")} == {4}
    together = Budget((("w", 4.0), ("size", size.of(per_channel))))
    assert (together.bind(space).repair(genomes, rng) == space.encode(per_channel)).all()
    with pytest.raises(ValueError, match=r"budget w=4,size=.* cannot be met:.*together"):
        Budget((("w", 4.0), ("size", size.minimum))).bind(space)


def test_limits_of_single_layers_in_another_form_do_not_mix_forms():
    """A network runs in one form: what only a mix of forms could reach is refused, naming what one form reaches."""
    layers = [LayerInfo("thin", "conv", (64, 1, 1, 1), 64, 64), LayerInfo("thick", "linear", (8, 512), 4096, 512)]
    space = QuantSpace.from_layers(layers, (4, 8), (8,), symmetric=(True,), fixed="none").restrict(
        lambda layer, slot, fmt: (
            slot == "act" or layer.name == "thin" or (fmt.bits == 4) == (fmt.granularity == "channel")
        )
    )
    size = model_size(space)
    smallest = min(size.of(space.smallest(form)) for form in space.forms)
    assert size.minimum < smallest
    with pytest.raises(ValueError, match="of one form"):
        Budget((("size", smallest - 1),)).bind(space)
    bound = Budget((("size", smallest),)).bind(space)
    rng = np.random.default_rng(0)
    assert (space.form_of(bound.repair(MeanBitsSampler(space).sample(rng, 20), rng)) >= 0).all()


def test_repair_meets_limits_on_costs_that_do_not_fall_with_the_bits():
    """On real devices fewer bits may be slower: here 8 bits are the fastest, 2 the slowest."""
    space = QuantSpace.from_layers(make_layers(), bits=(2, 4, 8), fixed="none")
    latency = CostModel(space, "bitops", "bitops", lambda layer, weight, act: layer.macs / weight.bits)
    bound = BoundBudget(space, [latency], np.array([latency.minimum * 1.1]), np.array([-np.inf]))
    rng = np.random.default_rng(0)
    genomes = space.random_genomes(rng, 30)
    assert bound.feasible(genomes).sum() < 15
    assert bound.feasible(bound.repair(genomes, rng)).all()


# -- infeasible budgets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["w=1.9", "a=1", "size=100KiB", "bitops=1M", "4,bitops=2G"])
def test_the_smallest_reachable_value_of_the_message_can_be_met(imagenet_spaces: dict[str, QuantSpace], text: str):
    space = imagenet_spaces["resnet18"]
    with pytest.raises(ValueError, match=r"^budget .* cannot be met: the smallest reachable is (\S+)\.$") as error:
        Budget.parse(text).bind(space)
    message = str(error.value)
    smallest = message.removesuffix(".").split()[-1]
    assert message.startswith(f"budget {smallest.split('=')[0]}=")
    bound = Budget.parse(smallest).bind(space)
    (_, limit), cost = Budget.parse(smallest).limits[0], bound.costs[0]
    assert cost.minimum <= limit <= cost.minimum * 1.001


def test_the_minimum_itself_is_feasible_and_one_less_is_not(imagenet_spaces: dict[str, QuantSpace]):
    space = imagenet_spaces["mobilenet_v2"]
    rng = np.random.default_rng(0)
    genomes = space.random_genomes(rng, 3)
    for name in ("size", "bitops"):
        minimum = COSTS[name](space).minimum
        bound = Budget(((name, minimum),)).bind(space)
        assert (bound.values(bound.repair(genomes, rng)) == minimum).all()
        with pytest.raises(ValueError, match="smallest reachable"):
            Budget(((name, minimum - 1),)).bind(space)


def test_latency_needs_a_table():
    with pytest.raises(ValueError, match=r"latency=2\.5ms: no latency table is available for this space"):
        Budget.parse("latency=2.5ms").bind(QuantSpace.from_layers(make_layers()))


@pytest.mark.parametrize("band", [0, -0.5, float("nan"), float("inf")])
def test_wrong_bands_are_refused(band: float):
    with pytest.raises(ValueError, match="band"):
        Budget.parse("4").bind(QuantSpace.from_layers(make_layers()), band)
