"""Samplers: the sandwich of a training step, and configs around target mean bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqnet.space import (
    ALL_FORMS,
    Form,
    LayerConfig,
    LayerInfo,
    MeanBitsSampler,
    QuantConfig,
    QuantFormat,
    QuantSpace,
    SandwichSampler,
    act_bits,
    weight_bits,
)

ENDS = ("l0", "l6")


def make_layers(count: int = 7) -> list[LayerInfo]:
    """Layers whose sizes spread over two orders of magnitude, as in real networks."""
    return [
        LayerInfo(f"l{i}", "conv", (8 * (i + 1), 8 * i + 3, 3, 3), 10_000, act_numel=20_000 // (i + 1) ** 2)
        for i in range(count)
    ]


def make_space(**arguments: object) -> QuantSpace:
    return QuantSpace.from_layers(make_layers(), **arguments)


# -- sandwich (EQ-Net fact 17) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form_per", ["layer", "net"])
@given(seed=st.integers(0, 2**32 - 1), num_random=st.integers(0, 3))
def test_sandwich_is_largest_random_smallest_with_ends_at_8(form_per: str, seed: int, num_random: int):
    space = make_space(bits=(3, 4, 6), act_bits=(2, 5))
    configs = SandwichSampler(space, num_random, form_per).sample(np.random.default_rng(seed))
    assert len(configs) == num_random + 2
    inner = [name for name in space.decode(np.zeros(space.num_genes, int)) if name not in ENDS]
    assert all(c.weight.bits == 6 and c.act.bits == 5 for c in map(configs[0].__getitem__, inner))
    assert all(c.weight.bits == 3 and c.act.bits == 2 for c in map(configs[-1].__getitem__, inner))
    for config in configs:
        space.check(config)
        assert all(config[name].weight.bits == config[name].act.bits == 8 for name in ENDS)


def test_random_bits_of_a_sandwich_are_uniform_per_layer():
    space = make_space()
    sampler = SandwichSampler(space, num_random=1)
    rng = np.random.default_rng(0)
    bits = np.array([[c.weight.bits for n, c in sampler.sample(rng)[1].items() if n not in ENDS] for _ in range(700)])
    counts = np.stack([(bits == b).sum(0) for b in range(2, 9)])
    assert (np.abs(counts - 100) < 45).all()  # 4.9 standard deviations


def test_forms_are_per_layer_or_one_for_each_net():
    space = make_space()
    rng = np.random.default_rng(0)

    def forms(form_per: str) -> np.ndarray:
        sampler = SandwichSampler(space, form_per=form_per)
        return np.stack([space.form_of(space.encode_all(sampler.sample(rng))) for _ in range(60)])

    per_net, per_layer = forms("net"), forms("layer")
    assert all(set(column) == set(range(8)) for column in per_net.T)
    assert (per_net[:, 0] != per_net[:, 2]).any()
    assert (per_layer == -1).mean() > 0.9


def test_one_form_of_a_sandwich_uses_the_bits_that_form_has():
    space = make_space(fixed="none").restrict(lambda layer, slot, fmt: fmt.symmetric or 4 <= fmt.bits <= 6)
    sampler = SandwichSampler(space, form_per="net")
    rng = np.random.default_rng(0)
    for _ in range(40):
        configs = sampler.sample(rng)
        for config, sym_bits, asym_bits in ((configs[0], 8, 6), (configs[2], 2, 4)):
            assert space.form_of(space.encode_all([config]))[0] >= 0
            assert all(c.weight.bits == (sym_bits if c.weight.symmetric else asym_bits) for c in config.values())


def test_the_same_generator_gives_the_same_sandwich():
    sampler = SandwichSampler(make_space(), num_random=2)
    assert sampler.sample(np.random.default_rng((3, 7))) == sampler.sample(np.random.default_rng((3, 7)))
    assert sampler.sample(np.random.default_rng((3, 7))) != sampler.sample(np.random.default_rng((3, 8)))


def test_wrong_sandwiches_are_refused():
    with pytest.raises(ValueError, match="num_random"):
        SandwichSampler(make_space(), num_random=-1)
    with pytest.raises(ValueError, match="form_per"):
        SandwichSampler(make_space(), form_per="network")
    with pytest.raises(ValueError, match="no form"):
        SandwichSampler(formless_space(), form_per="net")


def formless_space() -> QuantSpace:
    """The pinned first layer is symmetric, all others are asymmetric."""
    pin = {"l0": LayerConfig(QuantFormat(8, True), QuantFormat(8, True))}
    return make_space(symmetric=(False,), fixed=pin)


# -- mean bits --------------------------------------------------------------------------------------------------------


def means(space: QuantSpace, genomes: np.ndarray) -> np.ndarray:
    return np.stack([weight_bits(space)(genomes), act_bits(space)(genomes)], 1)


@pytest.mark.parametrize("bits", [range(2, 9), range(3, 9), (2, 4, 8), (3,)])
def test_sampled_means_match_the_target_over_the_whole_range(bits: range):
    space = make_space(bits=bits)
    sampler = MeanBitsSampler(space)
    rng = np.random.default_rng(0)
    low, high, n = min(bits), max(bits), 3000
    for t in [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.97, 0.999, 1]:
        target_w, target_a = low + t * (high - low), high - t * (high - low)
        sampled = means(space, sampler.sample(rng, n, target_w, target_a))
        error = np.abs(sampled.mean(0) - [target_w, target_a])
        assert (error <= 4.5 * sampled.std(0) / np.sqrt(n) + 1e-3).all(), t


def test_both_ends_of_the_range_are_the_smallest_and_largest_config():
    space = make_space()
    sampler = MeanBitsSampler(space)
    genomes = sampler.sample(np.random.default_rng(0), 200, np.tile([2, 8], 100), 8, forms=space.forms[:1])
    for i, config in enumerate(map(space.decode, genomes)):
        expected = (space.smallest() if i % 2 == 0 else space.largest())["l3"].weight.bits
        assert all(c.weight.bits == expected and c.act.bits == 8 for n, c in config.items() if n not in ENDS)


def test_the_distribution_is_the_exponential_tilt():
    """One elastic layer: p(b) ~ q^b, with q from the target by bisection; independent of the module's own solution."""
    space = QuantSpace.from_layers(make_layers(3))
    target, n = 3.4, 40_000
    bits = np.arange(2, 9)
    low, high = 1e-6, 1e6
    for _ in range(200):
        q = np.sqrt(low * high)
        p = q**bits / (q**bits).sum()
        low, high = (q, high) if p @ bits < target else (low, q)
    genomes = MeanBitsSampler(space).sample(np.random.default_rng(0), n, target, 5)
    drawn = np.array([weight_bits(space)(genomes) == b for b in bits]).mean(1)
    np.testing.assert_allclose(drawn, p, atol=0.01)


def test_large_layers_carry_the_tilt():
    space = make_space()
    genomes = MeanBitsSampler(space).sample(np.random.default_rng(0), 2000, 3.0, 5.0)
    mean_bits = {n: np.mean([space.decode(g)[n].weight.bits for g in genomes[:400]]) for n in ("l1", "l5")}
    assert mean_bits["l5"] < 3.0 < 4.0 < mean_bits["l1"]


def test_targets_of_their_own_cover_the_reachable_range():
    """Uniform targets from end to end: every tenth of the range is visited, the first and last included."""
    space = make_space()
    sampled = means(space, MeanBitsSampler(space).sample(np.random.default_rng(0), 4000))
    for slot in range(2):
        counts, _ = np.histogram(sampled[:, slot], np.linspace(2, 8, 11))
        assert counts.min() > 200
        assert counts.max() < 700
    assert abs(np.corrcoef(sampled.T)[0, 1]) < 0.1


def test_each_config_has_one_form_and_all_forms_are_equally_likely():
    space = make_space()
    genomes = MeanBitsSampler(space).sample(np.random.default_rng(0), 4000)
    counts = np.bincount(space.form_of(genomes), minlength=8)
    assert (np.abs(counts - 500) < 105).all()  # five standard deviations


def test_forms_can_be_chosen():
    space = make_space()
    wanted = [Form.parse("channel-sym-asym"), Form.parse("tensor-asym-asym")]
    genomes = MeanBitsSampler(space).sample(np.random.default_rng(0), 300, forms=wanted)
    assert {ALL_FORMS[i] for i in space.form_of(genomes)} == set(wanted)


def test_targets_may_differ_from_row_to_row():
    space = make_space()
    targets = np.repeat([2.2, 5.0, 7.8], 500)
    sampled = means(space, MeanBitsSampler(space).sample(np.random.default_rng(0), 1500, targets, targets[::-1]))
    np.testing.assert_allclose(sampled[:, 0].reshape(3, 500).mean(1), [2.2, 5.0, 7.8], atol=0.15)
    np.testing.assert_allclose(sampled[:, 1].reshape(3, 500).mean(1), [7.8, 5.0, 2.2], atol=0.15)


@given(st.integers(0, 2**32 - 1))
def test_samples_are_configs_of_the_space_with_ties_and_pins(seed: int):
    layers = make_layers()
    layers[2] = LayerInfo("l2", "linear", (10, 10), 100, act_numel=0, calls=0)
    pin = {"l3": LayerConfig(QuantFormat(7, True), QuantFormat(6, True))}
    space = QuantSpace.from_layers(layers, bits=(2, 5), act_bits=(3, 4), fixed=pin, ties=[("l4", "l5")])
    configs: list[QuantConfig] = [
        space.decode(g) for g in MeanBitsSampler(space).sample(np.random.default_rng(seed), 8)
    ]
    for config in configs:
        space.check(config)
        assert config["l3"] == pin["l3"]
        assert config["l4"] == config["l5"]
        assert config["l2"].act is None


def test_forms_with_bits_of_their_own():
    space = make_space(fixed="none").restrict(lambda layer, slot, fmt: fmt.symmetric or 4 <= fmt.bits <= 6)
    sampler = MeanBitsSampler(space)
    asym = Form.parse("channel-asym-asym")
    genomes = sampler.sample(np.random.default_rng(0), 500, 5.0, forms=[asym])
    assert {c.weight.bits for c in (space.decode(g)["l6"] for g in genomes)} == {4, 5, 6}
    assert abs(weight_bits(space)(genomes).mean() - 5.0) < 0.1
    with pytest.raises(ValueError, match="give 4 to 6"):
        sampler.sample(np.random.default_rng(0), 1, 3.0, forms=[asym])


def test_layers_without_a_common_form_draw_their_own():
    space = formless_space()
    genomes = MeanBitsSampler(space).sample(np.random.default_rng(0), 2000, 3.0, 6.0)
    np.testing.assert_allclose(means(space, genomes).mean(0), [3.0, 6.0], atol=0.1)
    assert {space.decode(g)["l3"].weight.granularity for g in genomes[:50]} == {"tensor", "channel"}


def test_a_space_of_fixed_layers_has_one_config_per_form():
    space = QuantSpace.from_layers(make_layers(2))
    genomes = MeanBitsSampler(space).sample(np.random.default_rng(0), 100)
    assert (means(space, genomes) == 8).all()
    assert len(np.unique(genomes, axis=0)) == 8


@pytest.mark.parametrize("target", [1.9, 8.1, float("nan"), float("inf")])
def test_unreachable_targets_are_refused(target: float):
    sampler = MeanBitsSampler(make_space())
    with pytest.raises(ValueError, match=r"weight bits.*give 2 to 8"):
        sampler.sample(np.random.default_rng(0), 3, target)
    with pytest.raises(ValueError, match=r"act bits.*give 2 to 8"):
        sampler.sample(np.random.default_rng(0), 3, 4, target)


def test_foreign_forms_are_refused():
    sampler = MeanBitsSampler(make_space(symmetric=(True,)))
    with pytest.raises(ValueError, match="tensor-asym-asym"):
        sampler.sample(np.random.default_rng(0), 3, forms=[Form.parse("tensor-asym-asym")])
    with pytest.raises(ValueError, match="empty"):
        sampler.sample(np.random.default_rng(0), 3, forms=[])


# -- restrictions -----------------------------------------------------------------------------------------------------


def parts_of(space: QuantSpace) -> list[QuantSpace]:
    """Two devices: 8-bit inputs with any symmetric weight, and 4-bit weights with any input."""
    return [
        space.restrict(lambda _, slot, fmt: fmt.symmetric if slot == "weight" else fmt.bits == 8),
        space.restrict(lambda layer, slot, fmt: slot == "act" or fmt.bits == (8 if layer.name in ENDS else 4)),
    ]


@pytest.mark.parametrize("form_per", ["layer", "net"])
def test_each_subnet_of_a_sandwich_lies_in_one_restriction_and_at_its_ends(form_per: str):
    space = make_space()
    parts = parts_of(space)
    sampler, rng = SandwichSampler(space, 1, form_per, parts), np.random.default_rng(0)
    seen: dict[str, set[tuple[int, ...]]] = {"largest": set(), "random": set(), "smallest": set()}

    def bits(config: QuantConfig) -> tuple[float, float]:
        return float(weight_bits(space).of(config)), float(act_bits(space).of(config))

    ends = [{which: bits(getattr(part, which)()) for which in ("largest", "smallest")} for part in parts]
    for _ in range(60):
        for role, config in zip(seen, sampler.sample(rng), strict=True):
            inside = []
            for i, part in enumerate(parts):
                try:
                    part.check(config)
                except ValueError:
                    continue
                inside.append(i)
            assert inside
            if role != "random":
                assert bits(config) in [ends[i][role] for i in inside]
            seen[role].update(i for i in inside if len(inside) == 1)
    assert seen == {"largest": {0, 1}, "random": {0, 1}, "smallest": {0, 1}}


def test_one_restriction_to_everything_is_no_restriction():
    space = make_space()
    plain, within = SandwichSampler(space, 2), SandwichSampler(space, 2, within=[space])
    assert plain.sample(np.random.default_rng(5)) == within.sample(np.random.default_rng(5))
