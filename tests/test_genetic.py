"""Genetic search and NSGA-II against brute force, a bound, and the facts the paper states about its search."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eqnet.nn.supernet import trace_layers
from eqnet.search import front, genetic_search, pareto_search
from eqnet.space import (
    ALL_FORMS,
    COSTS,
    Budget,
    CostModel,
    Form,
    Genomes,
    LayerConfig,
    LayerInfo,
    QuantFormat,
    QuantSpace,
)

Floats = NDArray[np.float64]
FORMS = (Form.parse("tensor-sym-sym"), Form.parse("tensor-sym-asym"))


def make_space(widths: list[int], **kwargs: object) -> QuantSpace:
    layers = [LayerInfo(f"l{i}", "conv", (w, w, 3, 3), 9 * w * w * 16, w * 16) for i, w in enumerate(widths)]
    return QuantSpace.from_layers(layers, **kwargs)  # type: ignore[arg-type]


class Truth:
    """A known score: noise per gene that falls with bits, differs by form, and interacts between neighbours."""

    def __init__(self, space: QuantSpace, seed: int = 0, interaction: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        self.space, self.interaction = space, interaction
        falls = np.exp(rng.normal(size=(space.num_genes, 1))) * 3.0 ** -(space.bits - 2.0)
        self.noise = falls * rng.uniform(0.5, 1, space.bits.shape) * space.elastic[:, None]  # [G, F]

    def __call__(self, genomes: Genomes) -> Floats:
        noise = self.noise[np.arange(self.space.num_genes), genomes]
        return 70 - noise.sum(1) - self.interaction * np.sqrt(noise[:, 1:] * noise[:, :-1]).sum(1)


@pytest.fixture(scope="module")
def small() -> QuantSpace:
    """4 layers, 3 bit-widths, two forms: 2 * 3^8 = 13122 configs."""
    return make_space([8, 4, 6, 5], bits=[2, 4, 8], granularity=["tensor"], fixed="none").restrict(
        lambda layer, slot, fmt: slot == "act" or fmt.symmetric
    )


@pytest.fixture(scope="module")
def everything(small: QuantSpace) -> Genomes:
    """All configs of `small` that have one form."""
    by_form = []
    for form in FORMS:
        choices = [np.flatnonzero(allowed) for allowed in small.formats_in(form)]
        by_form.append(np.array(list(itertools.product(*choices)), np.int16))
    return np.concatenate(by_form)


@pytest.fixture(scope="module")
def nets() -> dict[str, QuantSpace]:
    """The four networks of the paper, with their bit-widths."""
    spaces = {}
    for name, lowest in {"resnet18": 2, "resnet50": 2, "mobilenet_v2": 3, "efficientnet_b0": 3}.items():
        with torch.device("meta"):
            model = getattr(torchvision.models, name)()
        spaces[name] = QuantSpace.from_layers(trace_layers(model, (3, 224, 224)), bits=range(lowest, 9))
    return spaces


def test_the_small_space_is_what_the_tests_take_it_for(small: QuantSpace, everything: Genomes) -> None:
    assert small.forms == FORMS
    assert len(np.unique(everything, axis=0)) == 2 * 3**8


@pytest.mark.parametrize("text", ["4", "w=3", "a=5.5", "w=2.6,a=6", "size=600B", "bitops=180K", "w=5,bitops=300K"])
@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_optimum_of_brute_force(small: QuantSpace, everything: Genomes, text: str, seed: int) -> None:
    score, budget = Truth(small, seed), Budget.parse(text).bind(small)
    feasible = everything[budget.feasible(everything)]
    assert 50 < len(feasible) < len(everything)
    ranked = np.sort(score(feasible))[::-1]
    result = genetic_search(small, score, budget, seed=seed, generations=60, top_k=3)
    assert result.scores[0] == pytest.approx(ranked[0], abs=1e-9)
    np.testing.assert_allclose(result.scores, score(result.genomes), atol=1e-9)
    assert budget.feasible(result.genomes).all()


def test_comes_close_to_the_bound_on_a_deep_network() -> None:
    space = make_space([16 * 2 ** (i // 14) for i in range(54)])
    score = Truth(space, interaction=0.0)
    form = FORMS[0]
    budget = Budget.parse("w=3").bind(space)
    uniform = score(space.encode_all([space.uniform(3, form)]))[0]
    # No config within the budget scores above a Lagrangian relaxation: each gene takes its best format for a price of bits.
    allowed = space.formats_in(form)
    sizes = np.array([space.info(g.layers[0]).weight_numel if g.slot == "weight" else 0 for g in space.genes])
    shares = np.where(space.elastic, sizes, 0) / sizes[space.elastic].sum()
    best = [
        np.where(allowed, -score.noise - price * shares[:, None] * space.bits, -np.inf).max(1).sum() + price * 3
        for price in np.geomspace(0.1, 1000, 400)
    ]
    bound = 70 + min(best)
    result = genetic_search(space, score, budget, seed=0, generations=100, forms=[form])
    assert result.scores[0] <= bound + 1e-9
    assert bound - result.scores[0] < 0.05 * (bound - uniform)


@pytest.mark.parametrize("net", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
def test_every_config_of_the_search_is_in_the_band_of_the_paper(nets: dict[str, QuantSpace], net: str) -> None:
    space = nets[net]
    lowest = int(space.bit_levels.min())
    assert len(space.layers) == {"resnet18": 21, "resnet50": 54, "mobilenet_v2": 53, "efficientnet_b0": 82}[net]
    score = Truth(space)
    for limit in (lowest, lowest + 0.1, 4.0, 6.5, 8.0):
        budget = Budget.parse(str(limit)).bind(space, band=0.5)
        seen: list[Genomes] = []

        def recorded(genomes: Genomes, seen: list[Genomes] = seen) -> Floats:
            seen.append(genomes)
            return score(genomes)

        result = genetic_search(space, recorded, budget, seed=1, population=40, generations=20)
        every = np.concatenate(seen)
        means = np.stack([COSTS["w"](space)(every), COSTS["a"](space)(every)])
        assert (means <= limit).all()
        assert (means > limit - 0.5).all()
        assert result.evaluations == len(every)
        # Only formats of the space, hence of the bits the supernet was trained for, and one form for each config.
        assert (every >= 0).all()
        assert (every < space.num_formats).all()
        assert set(np.unique(space.bits[np.arange(space.num_genes), every])) <= {*range(lowest, 9)}
        assert (space.form_of(every) >= 0).all()


def test_the_best_score_never_falls_and_the_history_is_complete(small: QuantSpace) -> None:
    calls: list[tuple[int, int, float]] = []
    result = genetic_search(
        small,
        Truth(small),
        Budget.parse("4").bind(small),
        seed=0,
        generations=15,
        population=12,
        progress=lambda *call: calls.append(call),
    )
    best = [entry[1] for entry in result.history]
    assert best == sorted(best)
    assert best[-1] == result.scores[0]
    assert [entry[0] for entry in result.history] == list(range(16))
    assert all(mean <= top for _, top, mean in result.history)
    assert calls == [(generation, 15, top) for generation, top, _ in result.history]


def test_winners_are_distinct_and_sorted(small: QuantSpace) -> None:
    result = genetic_search(small, Truth(small), Budget.parse("4").bind(small), seed=0, generations=30, top_k=25)
    assert len(np.unique(result.genomes, axis=0)) == len(result.genomes) == 25
    assert (np.diff(result.scores) <= 0).all()


@pytest.mark.parametrize("search", ["genetic", "pareto"])
def test_no_config_is_scored_twice(small: QuantSpace, search: str) -> None:
    score, budget = Truth(small), Budget.parse("4").bind(small)
    seen: list[Genomes] = []

    def recorded(genomes: Genomes) -> Floats:
        seen.append(genomes)
        return score(genomes)

    if search == "genetic":
        result = genetic_search(small, recorded, budget, seed=0, generations=30, top_k=40)
        every = np.concatenate(seen)
        assert result.evaluations == len(every)
        np.testing.assert_allclose(result.scores[0], score(every).max())
        np.testing.assert_allclose(result.scores, score(result.genomes))
    else:
        found = pareto_search(small, recorded, budget.costs[0], seed=0, population=40, generations=30)
        every = np.concatenate(seen)
        exact = front(every, score(every), budget.costs[0](every))
        np.testing.assert_array_equal(found.scores, exact.scores)
    assert len(np.unique(every, axis=0)) == len(every)
    assert min(map(len, seen)) > 0


@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_of_bits_improves_the_result(small: QuantSpace, seed: int) -> None:
    score, budget = Truth(small), Budget.parse("w=4,a=5").bind(small)
    result = genetic_search(small, score, budget, seed=seed, population=4, generations=1)
    best = result.genomes[0]
    for i, j in itertools.product(range(small.num_genes), repeat=2):
        changed = best.copy()
        if i != j and small.step_up[i, best[i]] >= 0 and small.step_down[j, best[j]] >= 0:
            changed[i], changed[j] = small.step_up[i, best[i]], small.step_down[j, best[j]]
            if budget.feasible(changed[None])[0]:
                assert score(changed[None])[0] <= result.scores[0]


def test_a_space_that_is_soon_seen_whole() -> None:
    space = make_space(
        [8, 4, 6], bits=[2, 4], symmetric=[True], granularity=["tensor"]
    )  # 4 configs: the ends are fixed
    for budget, count in (("4", 4), ("w=2", 2)):
        bound = Budget.parse(budget).bind(space)
        result = genetic_search(space, Truth(space), bound, seed=0, population=4, generations=20, top_k=9)
        assert result.evaluations == len(result.genomes) == count
        assert len(result.history) == 21
        assert (np.diff(result.scores) < 0).all()
    found = pareto_search(space, Truth(space), COSTS["size"](space), seed=0, population=4, generations=5)
    check_front(found, Truth(space), COSTS["size"](space))


@pytest.mark.parametrize("search", ["genetic", "pareto"])
def test_a_seed_says_it_all_and_global_state_is_left_alone(small: QuantSpace, search: str) -> None:
    score, budget = Truth(small), Budget.parse("4").bind(small)

    def run(global_seed: int, seed: int) -> list[float]:
        random.seed(global_seed)
        np.random.seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
        if search == "genetic":
            result = genetic_search(small, score, budget, seed=seed, population=20, generations=5)
            found = [*result.genomes.ravel(), *result.scores, *itertools.chain(*result.history)]
        else:
            found = np.concatenate(
                [
                    a.ravel()
                    for a in pareto_search(small, score, budget.costs[0], seed=seed, population=20, generations=5)
                ]
            ).tolist()
        assert before[0] == random.getstate()
        assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
        return found

    assert run(1, seed=3) == run(2, seed=3)
    assert run(1, seed=3) != run(1, seed=4)


def test_the_better_form_is_found(small: QuantSpace) -> None:
    columns = np.arange(small.num_genes)
    for wanted in (0, 1):

        def score(genomes: Genomes, wanted: int = wanted) -> Floats:
            bits = small.bits[columns, genomes].sum(1)
            in_form = small.symmetric[columns, genomes][:, ~small.is_weight].all(1) == (wanted == 0)
            return bits + 100.0 * in_form

        result = genetic_search(small, score, Budget.parse("4").bind(small), seed=0, generations=5, top_k=1)
        assert ALL_FORMS[int(small.form_of(result.genomes)[0])] == FORMS[wanted]


def test_only_the_forms_asked_for_are_searched(small: QuantSpace) -> None:
    seen: list[Genomes] = []

    def score(genomes: Genomes) -> Floats:
        seen.append(genomes)
        return Truth(small)(genomes)

    genetic_search(small, score, Budget.parse("3").bind(small), seed=0, generations=10, forms=[FORMS[1]])
    assert set(small.form_of(np.concatenate(seen)).tolist()) == {ALL_FORMS.index(FORMS[1])}
    with pytest.raises(ValueError, match=r"l0.*channel-sym-sym"):
        genetic_search(
            small, score, Budget.parse("3").bind(small), seed=0, forms=[Form.parse("channel-sym-sym")], generations=1
        )


def test_forms_that_cannot_meet_the_budget_are_left_out() -> None:
    space = make_space([8, 4, 6, 5], bits=[2, 4], fixed="none")
    costs = COSTS["size"](space)
    per_channel = Form.parse("channel-asym-asym")
    limit = int(costs.of(space.smallest(per_channel))) - 1  # tables of step sizes alone exceed it
    budget = Budget.parse(f"size={limit}B").bind(space)
    result = genetic_search(space, Truth(space), budget, seed=0, generations=10, top_k=50)
    assert budget.feasible(result.genomes).all()
    assert per_channel not in {ALL_FORMS[i] for i in space.form_of(result.genomes)}
    with pytest.raises(ValueError, match="none of the forms channel-asym-asym can meet the budget"):
        genetic_search(space, Truth(space), budget, seed=0, forms=[per_channel])


def test_formats_that_differ_between_forms_do_not_stop_the_search() -> None:
    # A device with 4-bit weights only where they are symmetric, as many have.
    space = make_space([8, 4, 6, 5], bits=[2, 4, 8], granularity=["tensor"], fixed="none").restrict(
        lambda layer, slot, fmt: fmt.symmetric or fmt.bits == 8
    )
    assert len(space.forms) == 4
    result = genetic_search(space, Truth(space), Budget.parse("w=5").bind(space), seed=0, generations=20, top_k=20)
    assert (space.form_of(result.genomes) >= 0).all()
    assert (COSTS["w"](space)(result.genomes) <= 5).all()


def test_a_space_without_a_common_form_is_searched() -> None:
    fixed = {
        "l0": LayerConfig(QuantFormat(8, True, "tensor"), QuantFormat(8)),
        "l3": LayerConfig(QuantFormat(8, False, "tensor"), QuantFormat(8)),
    }
    space = make_space([8, 4, 6, 5], bits=[2, 4, 8], granularity=["tensor"], fixed=fixed)
    assert space.forms == ()
    budget = Budget.parse("4").bind(space)
    result = genetic_search(space, Truth(space), budget, seed=0, generations=10)
    assert budget.feasible(result.genomes).all()


def test_initial_configs_take_part(small: QuantSpace, everything: Genomes) -> None:
    budget, score = Budget.parse("4").bind(small), Truth(small)
    feasible = everything[budget.feasible(everything)]
    best = feasible[[score(feasible).argmax()]]
    result = genetic_search(small, score, budget, seed=0, population=4, generations=0, initial=best)
    assert result.scores[0] == pytest.approx(score(best)[0])
    too_big = small.encode_all([small.largest(FORMS[0])])
    assert budget.feasible(genetic_search(small, score, budget, seed=0, generations=2, initial=too_big).genomes).all()


def test_initial_configs_that_do_not_fit_are_refused(small: QuantSpace) -> None:
    budget, score = Budget.parse("4").bind(small), Truth(small)
    sym, asym = (small.encode_all([small.smallest(form)]) for form in FORMS)
    mixed = np.where(np.arange(small.num_genes) < 4, sym, asym)
    for initial, message in (
        (mixed, "config 0 has none of the forms"),
        (sym[:, :3], "shape"),
        (sym + 99, "outside the space"),
    ):
        with pytest.raises(ValueError, match=message):
            genetic_search(small, score, budget, seed=0, generations=1, initial=initial)


def test_unreachable_budgets_name_what_can_be_reached(small: QuantSpace) -> None:
    with pytest.raises(ValueError, match=r"smallest reachable is w=2"):
        Budget.parse("1.9").bind(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 3}, "population"),
        ({"generations": -1}, "generations"),
        ({"parent_ratio": 0.0}, "parent_ratio"),
        ({"top_k": 0}, "top_k"),
        ({"mutation_ratio": 1.5}, "mutation_ratio"),
        ({"mutation_probability": 0.0}, "mutation_probability"),
        ({"forms": []}, "no form"),
    ],
)
def test_wrong_settings_are_refused(small: QuantSpace, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        genetic_search(small, Truth(small), Budget.parse("4").bind(small), seed=0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda g: np.full(len(g), np.nan), "finite"),
        (lambda g: np.zeros((len(g), 1)), "shape"),
        (lambda g: 1.0, "shape"),
    ],
)
def test_wrong_scores_are_refused(small: QuantSpace, score: Callable[[Genomes], Floats], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        genetic_search(small, score, Budget.parse("4").bind(small), seed=0)


def test_costs_and_budgets_of_another_space_are_refused(small: QuantSpace) -> None:
    other = make_space([8, 4, 6, 5], bits=[2, 4, 8], fixed="none")
    with pytest.raises(ValueError, match="bound to another space"):
        genetic_search(small, Truth(small), Budget.parse("4").bind(other), seed=0)
    with pytest.raises(ValueError, match="cost belongs to another space"):
        pareto_search(small, Truth(small), COSTS["size"](other), seed=0)


def hypervolume(scores: Floats, costs: Floats, cost_limit: float, floor: float) -> float:
    """Area between a front (cheapest first) and the corner (cost_limit, floor)."""
    return float(((scores - floor) * np.diff(np.append(costs, cost_limit))).sum())


@pytest.mark.parametrize("name", ["size", "bitops", "w"])
def test_the_front_is_that_of_brute_force(small: QuantSpace, everything: Genomes, name: str) -> None:
    score, cost = Truth(small), COSTS[name](small)
    exact = front(everything, score(everything), cost(everything))
    found = pareto_search(small, score, cost, seed=0, generations=100)
    corner = float(cost(everything).max()) + 1, float(score(everything).min())
    assert hypervolume(found.scores, found.costs, *corner) >= 0.999 * hypervolume(exact.scores, exact.costs, *corner)
    on_it = np.isclose(found.scores[:, None], exact.scores).any(0)
    assert on_it.mean() > 0.8
    assert found.costs[0] == cost.minimum
    assert found.scores[-1] == pytest.approx(score(everything).max())


def check_front(found: tuple[Genomes, Floats, Floats], score: Callable[[Genomes], Floats], cost: CostModel) -> None:
    genomes, scores, costs = found
    assert (np.diff(costs) > 0).all()
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(score(genomes), scores)
    np.testing.assert_array_equal(cost(genomes), costs)


def test_the_front_spans_all_costs_of_a_network(nets: dict[str, QuantSpace]) -> None:
    space = nets["resnet18"]
    score, cost = Truth(space), COSTS["bitops"](space)
    found = pareto_search(space, score, cost, seed=0, population=60, generations=30)
    check_front(found, score, cost)
    assert found.costs[0] == cost.minimum
    uniform = space.encode_all([space.uniform(b, form) for b in range(2, 9) for form in space.forms])
    for value, limit in zip(score(uniform), cost(uniform), strict=True):  # no uniform config beats the front
        assert found.scores[found.costs <= limit].max() >= value


def test_the_front_keeps_a_budget_and_its_forms(small: QuantSpace) -> None:
    score, cost = Truth(small), COSTS["bitops"](small)
    budget = Budget.parse("w=4,size=700B").bind(small)
    seen: list[Genomes] = []

    def recorded(genomes: Genomes) -> Floats:
        seen.append(genomes)
        return score(genomes)

    calls: list[int] = []
    found = pareto_search(
        small,
        recorded,
        cost,
        budget,
        seed=0,
        population=20,
        generations=10,
        forms=[FORMS[0]],
        progress=lambda *c: calls.append(c[0]),
    )
    every = np.concatenate(seen)
    assert budget.feasible(every).all()
    assert set(small.form_of(every).tolist()) == {ALL_FORMS.index(FORMS[0])}
    check_front(found, score, cost)
    assert calls == list(range(11))
    np.testing.assert_array_equal(found.scores, front(every, score(every), cost(every)).scores)  # nothing seen is lost


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@settings(max_examples=100)
@given(points)
def test_front_keeps_exactly_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    scores, costs = np.array(pairs, float).reshape(-1, 2).T
    kept = front(np.arange(len(pairs), dtype=np.int16)[:, None], scores, costs)
    beaten = [any((s >= score and c <= cost) and (s, c) != (score, cost) for s, c in pairs) for score, cost in pairs]
    expected = sorted({(c, s) for (s, c), lost in zip(pairs, beaten, strict=True) if not lost})
    assert list(zip(kept.costs, kept.scores, strict=True)) == expected
    assert [pairs[i] for i in kept.genomes[:, 0]] == [(s, c) for c, s in expected]
    assert all(pairs.index(pairs[i]) == i for i in kept.genomes[:, 0])
