"""The datum and the space: round trips, restrictions, forms, ties, fixed layers, features, and what is refused."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqnet.space import (
    ALL_FORMS,
    Form,
    LayerConfig,
    LayerInfo,
    QuantConfig,
    QuantFormat,
    QuantSpace,
)


def make_layers(count: int = 5, unread: int | None = None) -> list[LayerInfo]:
    """A chain of `count` layers of different sizes; layer `unread` has its weight read directly (`calls` 0)."""
    return [
        LayerInfo(
            f"l{i}",
            "conv",
            (4 + i, 3 + i, 3, 3),
            macs=1000 * (i + 1),
            act_numel=0 if i == unread else 100 * (count - i),
            calls=int(i != unread),
        )
        for i in range(count)
    ]


@st.composite
def spaces(draw: st.DrawFn) -> QuantSpace:
    """Product spaces with every kind of fixed layers, ties and unread weights."""
    count = draw(st.integers(4, 6))
    bits = draw(st.sets(st.integers(2, 8), min_size=1))
    act_bits = draw(st.none() | st.sets(st.integers(2, 8), min_size=1))
    symmetric = draw(st.sampled_from([(True,), (False,), (True, False)]))
    granularity = draw(st.sampled_from([("tensor",), ("channel",), ("tensor", "channel")]))
    exact = {"l0": LayerConfig(QuantFormat(8, symmetric[0], granularity[0]), QuantFormat(7, symmetric[0]))}
    fixed = draw(st.sampled_from(["first_last_8bit", "none", exact]))
    ties = draw(st.sampled_from([(), (("l1", "l2"),)]))
    layers = make_layers(count, unread=draw(st.sampled_from([None, 1])))
    return QuantSpace.from_layers(layers, bits, act_bits, symmetric, granularity, fixed, ties, draw(st.integers(0, 99)))


seeds = st.integers(0, 2**32 - 1)


def random_config(space: QuantSpace, seed: int = 0) -> QuantConfig:
    return space.sample(np.random.default_rng(seed))


# -- the datum --------------------------------------------------------------------------------------------------------


def test_config_equality_and_hash_ignore_order():
    a, b = LayerConfig(QuantFormat(2), QuantFormat(3)), LayerConfig(QuantFormat(4), None)
    first, second = QuantConfig({"x": a, "y": b}), QuantConfig({"y": b, "x": a})
    assert first == second
    assert hash(first) == hash(second)
    assert {first: 1}[second] == 1
    assert first != QuantConfig({"x": a, "y": a})


def test_config_does_not_change_when_its_source_does():
    source = {"x": LayerConfig(QuantFormat(2), None)}
    config = QuantConfig(source)
    source["x"] = LayerConfig(QuantFormat(8), None)
    assert config["x"].weight.bits == 2
    assert config.replace({"x": LayerConfig(QuantFormat(4), None)})["x"].weight.bits == 4
    assert config["x"].weight.bits == 2


def test_replace_names_foreign_layers():
    with pytest.raises(ValueError, match="fc"):
        QuantConfig({}).replace({"fc": LayerConfig(QuantFormat(4), None)})


def test_a_pickled_config_is_found_in_another_process():
    """String hashes differ between processes; a config sent to another rank must still equal, and hash like, its own."""
    config = random_config(QuantSpace.from_layers(make_layers()))
    code = (
        "import pickle, sys; from eqnet.space import QuantConfig; c = pickle.load(sys.stdin.buffer);"
        "print({QuantConfig(dict(c)): 'found'}.get(c))"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True, env=environment, check=True
        )
        assert result.stdout.strip() == b"found"


@given(spaces(), seeds)
def test_config_json_round_trip(space: QuantSpace, seed: int):
    config = random_config(space, seed)
    text = json.dumps(config.to_json())
    assert QuantConfig.from_json(text) == config
    assert QuantConfig.from_json(json.loads(text)) == config


@pytest.mark.parametrize(
    "data",
    [
        "[]",
        "{",
        {"fc": {"weight": {"bits": 4, "symmetric": True, "granularity": "tensor"}}},
        {"fc": {"weight": {"bits": 4, "symmetric": True}, "act": None}},
        {"fc": {"weight": {"bits": 9, "symmetric": True, "granularity": "tensor"}, "act": None}},
        {"fc": {"weight": {"bits": 4, "symmetric": 1, "granularity": "tensor"}, "act": None}},
        {"fc": {"weight": {"bits": 4, "symmetric": True, "granularity": "group"}, "act": None}},
        {"fc": None},
    ],
)
def test_wrong_config_json_is_a_value_error(data: object):
    with pytest.raises(ValueError):
        QuantConfig.from_json(data)


def test_wrong_config_json_names_the_layer():
    with pytest.raises(ValueError, match="'fc'"):
        QuantConfig.from_json({"fc": {"weight": {"bits": 1, "symmetric": True, "granularity": "tensor"}, "act": None}})


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_outside_2_to_8_are_refused(bits: object):
    with pytest.raises(ValueError, match="2 to 8"):
        QuantFormat(bits)


def test_form_names_round_trip_and_unknown_ones_are_refused():
    assert len({form.name for form in ALL_FORMS}) == 8
    assert all(Form.parse(form.name) == form for form in ALL_FORMS)
    with pytest.raises(ValueError, match="channel-sym-asym"):
        Form.parse("per-channel")


# -- encode, decode, restrict, translate ------------------------------------------------------------------------------


@given(spaces(), seeds)
def test_decode_of_encode_is_the_config(space: QuantSpace, seed: int):
    config = random_config(space, seed)
    space.check(config)
    genome = space.encode(config)
    assert space.decode(genome) == config
    assert (space.encode_all([config, config]) == genome).all()


@given(spaces(), seeds)
def test_genomes_are_indices_into_the_choices(space: QuantSpace, seed: int):
    rng = np.random.default_rng(seed)
    genomes = np.concatenate(
        [
            space.random_genomes(rng, 50),
            space.extreme_genomes(rng, 50, "largest"),
            space.extreme_genomes(rng, 50, "smallest"),
        ]
    )
    assert ((genomes >= 0) & (genomes < space.num_formats)).all()
    assert (space.encode_all(map(space.decode, genomes)) == genomes).all()


@given(spaces(), seeds)
def test_space_json_round_trip(space: QuantSpace, seed: int):
    copy = QuantSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert copy == space
    assert copy.encode(random_config(space, seed)).tolist() == space.encode(random_config(space, seed)).tolist()


@pytest.mark.parametrize("data", [None, [], {}, {"layers": 3}, {"layers": [{"name": "x"}]}])
def test_wrong_space_json_is_a_value_error(data: object):
    with pytest.raises(ValueError, match="space"):
        QuantSpace.from_json(data)


@given(spaces(), seeds)
def test_a_restriction_is_a_subset_and_translates(space: QuantSpace, seed: int):
    rng = np.random.default_rng(seed)
    smallest = {name: min(f.bits for f in space.choices(name, "weight")) for name in (i.name for i in space.layers)}
    part = space.restrict(lambda layer, slot, fmt: slot == "act" or fmt.bits == smallest[layer.name])
    genomes = part.random_genomes(rng, 20)
    for genome, translated in zip(genomes, space.translate(genomes, part), strict=True):
        config = part.decode(genome)
        space.check(config)
        assert space.decode(translated) == config
        assert all(layer.weight.bits == smallest[name] for name, layer in config.items())
    assert part.fixed == space.fixed
    assert part.ties == space.ties
    assert part.float_numel == space.float_numel


def test_an_emptied_layer_is_named():
    space = QuantSpace.from_layers(make_layers())
    with pytest.raises(ValueError, match=r"l3.*act"):
        space.restrict(lambda layer, slot, fmt: layer.name != "l3" or slot == "weight")


# -- forms ------------------------------------------------------------------------------------------------------------


@given(spaces(), seeds)
def test_impose_form_keeps_bits_and_gives_every_layer_the_form(space: QuantSpace, seed: int):
    rng = np.random.default_rng(seed)
    genomes = space.random_genomes(rng, 20)
    forms = rng.choice([ALL_FORMS.index(form) for form in space.forms], 20)
    imposed = space.impose_form(genomes, forms)
    for genome, result, form in zip(genomes, imposed, forms, strict=True):
        before, after = space.decode(genome), space.decode(result)
        for name, layer in after.items():
            assert layer.weight == ALL_FORMS[form].weight_format(before[name].weight.bits)
            if layer.act is not None:
                assert layer.act == ALL_FORMS[form].act_format(before[name].act.bits)
    assert (space.impose_form(imposed, space.form_of(imposed)) == imposed).all()


def test_form_of_tells_shared_forms_from_mixed_ones():
    space = QuantSpace.from_layers(make_layers())
    shared = [space.encode(space.uniform(4, form)) for form in ALL_FORMS]
    assert space.form_of(np.stack(shared)).tolist() == list(range(8))
    mixed = shared[0].copy()
    mixed[2] = shared[7][2]
    assert space.form_of(mixed[None]).tolist() == [-1]


def test_restrict_form_leaves_one_form():
    space = QuantSpace.from_layers(make_layers())
    form = Form.parse("channel-asym-sym")
    part = space.restrict_form(form)
    assert part.forms == (form,)
    assert {ALL_FORMS[i] for i in part.form_of(part.random_genomes(np.random.default_rng(0), 20))} == {form}


def test_impose_form_names_a_layer_that_lacks_it():
    space = QuantSpace.from_layers(make_layers(), symmetric=(True,))
    asym = ALL_FORMS.index(Form.parse("tensor-asym-sym"))
    with pytest.raises(ValueError, match=r"l0.*tensor-asym-sym"):
        space.impose_form(space.random_genomes(np.random.default_rng(0), 1), np.array([asym]))


def test_largest_and_smallest_of_a_form_use_the_bits_that_form_has():
    space = QuantSpace.from_layers(make_layers(), fixed="none")
    space = space.restrict(lambda layer, slot, fmt: fmt.symmetric or 4 <= fmt.bits <= 6)
    asym = Form.parse("tensor-asym-asym")
    assert {c.weight.bits for c in space.smallest(asym).values()} == {4}
    assert {c.act.bits for c in space.largest(asym).values()} == {6}
    assert {c.weight.bits for c in space.smallest().values()} == {2}
    assert space.form_of(space.encode_all([space.smallest(asym), space.largest(asym)])).tolist() == [3, 3]


def test_a_pinned_layer_with_a_form_of_its_own_leaves_largest_and_smallest_defined():
    pin = {"l0": LayerConfig(QuantFormat(8, True), QuantFormat(8, True))}
    space = QuantSpace.from_layers(make_layers(), bits=(2, 4), symmetric=(False,), fixed=pin)
    assert space.forms == ()
    for config, bits in ((space.largest(), 4), (space.smallest(), 2)):
        space.check(config)
        assert config["l0"] == pin["l0"]
        assert {config[name].weight.bits for name in config if name != "l0"} == {bits}


# -- fixed layers and ties --------------------------------------------------------------------------------------------


@given(seeds)
def test_the_first_and_last_layer_stay_at_8_bits_in_any_form(seed: int):
    """EQ-Net fact 2: ends always 8/8, their form as elastic as any."""
    space = QuantSpace.from_layers(make_layers())
    config = random_config(space, seed)
    for name in ("l0", "l4"):
        assert (config[name].weight.bits, config[name].act.bits) == (8, 8)
        assert len({(f.symmetric, f.granularity) for f in space.choices(name, "weight")}) == 4
        assert len(space.choices(name, "act")) == 2


def test_first_and_last_ignore_layers_that_are_never_called():
    space = QuantSpace.from_layers(make_layers(4, unread=0))
    assert space.fixed == {"l1", "l3"}


def test_fixed_none_and_fixed_mapping():
    layers = make_layers()
    free = QuantSpace.from_layers(layers, bits=(2, 3), fixed="none")
    assert free.fixed == frozenset()
    assert all(c.weight.bits in (2, 3) for c in random_config(free).values())
    pin = LayerConfig(QuantFormat(5, True, "channel"), QuantFormat(6))
    pinned = QuantSpace.from_layers(layers, bits=(2, 3), fixed={"l2": pin})
    assert all(random_config(pinned, seed)["l2"] == pin for seed in range(10))
    assert random_config(pinned)["l0"].weight.bits in (2, 3)


def test_uniform_keeps_fixed_layers_and_names_what_it_cannot_take():
    space = QuantSpace.from_layers(make_layers(), bits=(2, 4))
    config = space.uniform(2, ALL_FORMS[5], act_bits=4)
    assert [config[n].weight.bits for n in config] == [8, 2, 2, 2, 8]
    assert [config[n].act.bits for n in config] == [8, 4, 4, 4, 8]
    with pytest.raises(ValueError, match=r"l1.*3-bit"):
        space.uniform(3, ALL_FORMS[0])


def test_unread_weights_have_no_activation_format():
    space = QuantSpace.from_layers(make_layers(4, unread=1))
    assert space.choices("l1", "act") == ()
    assert random_config(space)["l1"].act is None
    wrong = random_config(space)
    with pytest.raises(ValueError, match=r"l2.*floating point"):
        space.check(wrong.replace({"l2": LayerConfig(wrong["l2"].weight, None)}))


@given(seeds)
def test_tied_layers_always_agree(seed: int):
    space = QuantSpace.from_layers(make_layers(6), ties=[("l1", "l3"), ("l3", "l4")])
    config = random_config(space, seed)
    assert config["l1"] == config["l3"] == config["l4"]
    assert space.num_genes == 2 * 4
    other = LayerConfig(QuantFormat(2 if config["l1"].weight.bits != 2 else 3), config["l1"].act)
    with pytest.raises(ValueError, match="tied"):
        space.check(config.replace({"l1": other}))


def test_a_tie_offers_what_all_its_members_allow():
    pin = LayerConfig(QuantFormat(4), QuantFormat(4))
    space = QuantSpace.from_layers(make_layers(), fixed={"l1": pin}, ties=[("l1", "l2")])
    assert space.choices("l2", "weight") == (QuantFormat(4),)
    with pytest.raises(ValueError, match="l0, l1"):
        QuantSpace.from_layers(make_layers(), bits=(2, 4), ties=[("l0", "l1")])


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_foreign_and_missing_layers_are_named():
    space = QuantSpace.from_layers(make_layers())
    layers = dict(random_config(space))
    layers["head.fc"] = layers.pop("l2")
    with pytest.raises(ValueError, match=r"misses l2 and has foreign head\.fc"):
        space.encode(QuantConfig(layers))


def test_a_format_outside_the_space_names_layer_slot_and_choices():
    space = QuantSpace.from_layers(make_layers(), bits=(2, 4))
    config = random_config(space)
    with pytest.raises(ValueError, match=r"'l0': weight format \(4 bits.*\[8\]"):
        space.check(config.replace({"l0": LayerConfig(QuantFormat(4), config["l0"].act)}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": ()}, "bits is empty"),
        ({"act_bits": ()}, "act_bits is empty"),
        ({"symmetric": ()}, "symmetric is empty"),
        ({"granularity": ()}, "granularity is empty"),
        ({"bits": (1, 2)}, "2 to 8"),
        ({"act_bits": (4, 16)}, "2 to 8"),
        ({"fixed": "ends"}, "'ends'"),
        ({"fixed": {"fc": LayerConfig(QuantFormat(8), None)}}, "'fc'"),
        ({"ties": [("l1", "fc")]}, "'fc'"),
        ({"granularity": ("group",)}, "'group'"),
    ],
)
def test_wrong_spaces_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        QuantSpace.from_layers(make_layers(), **arguments)


def test_models_without_layers_or_with_one_name_twice_are_refused():
    with pytest.raises(ValueError, match="no quantizable layer"):
        QuantSpace.from_layers([])
    with pytest.raises(ValueError, match="one name"):
        QuantSpace.from_layers(make_layers()[:1] * 2)


# -- features (EQ-Net fact 20) ----------------------------------------------------------------------------------------


@given(st.integers(3, 8), seeds)
def test_features_are_one_hot_per_condition_and_inner_gene(count: int, seed: int):
    space = QuantSpace.from_layers(make_layers(count))
    rng = np.random.default_rng(seed)
    genomes = space.impose_form(space.random_genomes(rng, 30), rng.integers(0, 8, 30))
    features = space.features(genomes)
    assert features.shape == (30, 6 + 14 * count)
    assert features.dtype == np.float32
    assert set(np.unique(features)) <= {0.0, 1.0}
    assert (features[:, :6].reshape(30, 3, 2).sum(-1) == 1).all()
    genes = features[:, 6:].reshape(30, 2, count, 7).sum(-1)
    assert (genes[:, :, 1:-1] == 1).all()
    assert (genes[:, :, [0, -1]] == 0).all()


@given(seeds)
def test_features_are_injective_on_networks_of_one_form(seed: int):
    space = QuantSpace.from_layers(make_layers(3), bits=(2, 4, 8))
    rng = np.random.default_rng(seed)
    genomes = space.impose_form(space.random_genomes(rng, 200), rng.integers(0, 8, 200))
    assert len(np.unique(space.features(genomes), axis=0)) == len(np.unique(genomes, axis=0))


def test_feature_columns_say_what_they_claim():
    space = QuantSpace.from_layers(make_layers(3))
    features = space.features(space.encode_all([space.uniform(3, Form.parse("channel-asym-sym"), act_bits=7)]))[0]
    assert features[:6].tolist() == [0, 1, 0, 1, 1, 0]
    weight, act = features[6:].reshape(2, 3, 7)
    assert weight[1].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert act[1].tolist() == [0, 0, 0, 0, 0, 1, 0]


def test_conditions_of_mixed_networks_are_shares():
    space = QuantSpace.from_layers(make_layers(4))
    config = space.uniform(4, ALL_FORMS[0])
    config = config.replace({"l1": LayerConfig(QuantFormat(4, True, "channel"), config["l1"].act)})
    assert space.features(space.encode_all([config]))[0, :2].tolist() == [0.75, 0.25]


@settings(max_examples=30)
@given(spaces(), seeds)
def test_features_are_a_sum_over_genes(space: QuantSpace, seed: int):
    """What the predictor's table of formats rests on."""
    first = space.features(np.zeros((1, space.num_genes), np.int16))
    genome = space.random_genomes(np.random.default_rng(seed), 1)
    alone = np.where(np.eye(space.num_genes, dtype=bool), genome, 0).astype(np.int16)
    total = first + (space.features(alone) - first).sum(0, keepdims=True)
    np.testing.assert_allclose(space.features(genome), total, atol=1e-5)


# -- steps ------------------------------------------------------------------------------------------------------------


@given(spaces())
@settings(max_examples=30)
def test_steps_go_to_the_next_bits_of_the_same_form_and_back(space: QuantSpace):
    for g, gene in enumerate(space.genes):
        for i, fmt in enumerate(gene.formats):
            up = space.step_up[g, i]
            if up < 0:
                assert not any(
                    f.bits > fmt.bits and f.symmetric == fmt.symmetric and f.granularity == fmt.granularity
                    for f in gene.formats
                )
                continue
            assert space.step_down[g, up] == i
            upper = gene.formats[up]
            assert upper.bits > fmt.bits
            assert (upper.symmetric, upper.granularity) == (fmt.symmetric, fmt.granularity)
