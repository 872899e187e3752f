"""The exact search equals brute force, keeps every limit, and reproduces HAWQ's published configs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from eqnet.search.genetic import front, genetic_search
from eqnet.search.hawq import read_instance
from eqnet.search.ilp import InfeasibleError, exact_front, exact_search
from eqnet.space import COSTS, Budget, CostModel, Genomes, LayerInfo, QuantFormat, QuantSpace

INSTANCE = Path(__file__).parent / "data" / "hawq_resnet18_ilp.json"


def random_space(rng: np.random.Generator, count: int, bits: list[int], *, acts: bool = False) -> QuantSpace:
    """`count` layers of random sizes; some tied; without activation genes unless `acts`."""
    layers = [
        LayerInfo(f"l{i}", "conv", (1, int(rng.integers(1, 400))), int(rng.integers(1, 9000)), 64 * acts, int(acts))
        for i in range(count)
    ]
    formats = [QuantFormat(b) for b in bits]
    ties = [("l0", f"l{count - 1}")] if count > 3 and rng.random() < 0.5 else []
    names = [layer.name for layer in layers]
    return QuantSpace(layers, dict.fromkeys(names, formats), dict.fromkeys(names, formats if acts else []), ties=ties)


def random_table(space: QuantSpace, rng: np.random.Generator, name: str, whole: bool) -> CostModel:
    """Random numbers for every layer and pair of formats."""

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        return float(rng.integers(0, 30)) if whole else float(rng.random())

    return CostModel(space, name, name, measure)


def every_genome(space: QuantSpace) -> Genomes:
    return np.array(list(itertools.product(*(range(n) for n in space.num_formats))), np.int16)


def mean_bits(space: QuantSpace) -> list[CostModel]:
    return [COSTS[name](space) for name in ("w", "size", "bitops")]


@pytest.mark.parametrize("seed", range(200))
def test_random_instances_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = random_space(rng, int(rng.integers(2, 11 if seed % 10 == 0 else 8)), [2, 4, 8])
    loss = random_table(space, rng, "loss", whole=seed % 3 == 0)  # whole numbers: many equal losses
    costs = mean_bits(space) if seed % 2 else [random_table(space, rng, f"c{i}", whole=seed % 4 == 0) for i in range(3)]
    genomes = every_genome(space)
    values = np.stack([cost(genomes) for cost in costs], 1)
    limits = np.maximum(values[rng.integers(len(genomes))], 1e-3)  # of one config: often exactly met
    feasible = (values <= limits).all(1)
    found = exact_search(loss, costs, limits)
    assert found.optimal
    assert (found.costs <= limits).all()
    assert found.loss == pytest.approx(loss(genomes[feasible]).min(), rel=1e-9, abs=1e-9)
    assert found.loss == loss(found.genome[None])[0]
    space.check(space.decode(found.genome))  # ties included


@pytest.mark.parametrize("seed", range(20))
def test_weights_and_inputs_are_chosen_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = random_space(rng, 4, [2, 4, 8], acts=True)
    loss, cost = random_table(space, rng, "loss", whole=False), COSTS["bitops"](space)
    genomes = every_genome(space)
    limit = float(np.quantile(cost(genomes), 0.2))
    found = exact_search(loss, [cost], [limit])
    assert found.loss == pytest.approx(loss(genomes[cost(genomes) <= limit]).min(), rel=1e-12)


def test_forms_restrict_the_config_as_in_the_genetic_search() -> None:
    rng = np.random.default_rng(0)
    layers = [LayerInfo(f"l{i}", "conv", (4, 10 * (i + 1)), 500 * (i + 1), 30) for i in range(3)]
    space = QuantSpace.from_layers(layers, bits=[2, 4], granularity=["tensor"], fixed="none")
    loss, budget = random_table(space, rng, "loss", whole=False), Budget.parse("w=3,a=3").bind(space)
    genomes = every_genome(space)
    inside = genomes[budget.feasible(genomes)]
    one_form = inside[space.form_of(inside) >= 0]
    exact = exact_search(loss, budget.costs, budget.limits, forms=space.forms)
    assert exact.loss == pytest.approx(loss(one_form).min(), rel=1e-12)
    mixed = exact_search(loss, budget.costs, budget.limits)
    assert mixed.loss == pytest.approx(loss(inside).min(), rel=1e-12)
    assert mixed.loss < exact.loss
    genetic = genetic_search(space, lambda g: -loss(g), budget, seed=0, population=40, generations=20)
    assert genetic.scores[0] == pytest.approx(-exact.loss, rel=1e-12)


def test_more_constraints_and_tighter_ones_never_lower_the_loss() -> None:
    rng = np.random.default_rng(3)
    space = random_space(rng, 9, [2, 3, 4, 8])
    loss = random_table(space, rng, "loss", whole=False)
    costs = mean_bits(space)
    highs = [cost.of(space.largest()) for cost in costs]
    losses = [exact_search(loss, costs, [share * high for high in highs]).loss for share in (0.5, 0.6, 0.8, 1.0)]
    assert losses == sorted(losses, reverse=True)
    free = exact_search(loss).loss
    for count in (1, 2, 3):
        constrained = exact_search(loss, costs[:count], [0.5 * high for high in highs[:count]]).loss
        assert constrained >= free - 1e-12
        free = constrained


@pytest.mark.parametrize("factor", [8, 2**20])
def test_the_unit_of_a_cost_does_not_matter(factor: int) -> None:
    rng = np.random.default_rng(4)
    space = random_space(rng, 8, [2, 4, 8])
    loss = random_table(space, rng, "loss", whole=False)
    small = CostModel(space, "c", "c", lambda layer, weight, act: layer.weight_numel * weight.bits)
    large = CostModel(space, "c", "c", lambda layer, weight, act: factor * layer.weight_numel * weight.bits)
    limit = 0.6 * small.of(space.largest())
    one, other = exact_search(loss, [small], [limit]), exact_search(loss, [large], [factor * limit])
    assert (one.genome == other.genome).all()


def test_forbidden_cells_are_not_chosen() -> None:
    rng = np.random.default_rng(5)
    space = random_space(rng, 4, [2, 4, 8], acts=True)

    def same_bits(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        assert act is not None
        return float(rng.random()) if weight.bits == act.bits else np.inf

    loss, cost = CostModel(space, "loss", "loss", same_bits), COSTS["bitops"](space)
    found = exact_search(loss, [cost], [0.4 * cost.of(space.largest())])
    genomes = every_genome(space)
    inside = genomes[cost(genomes) <= 0.4 * cost.of(space.largest())]
    assert found.loss == pytest.approx(loss(inside).min(), rel=1e-12)
    assert all(c.act is not None and c.act.bits == c.weight.bits for c in space.decode(found.genome).values())


def test_a_limit_on_the_largest_input_equals_brute_force() -> None:
    rng = np.random.default_rng(9)
    layers = [LayerInfo(f"l{i}", "conv", (1, 50), 5000, int(rng.integers(40, 400)), calls=1 + i % 2) for i in range(4)]
    space = QuantSpace.from_layers(layers, bits=[2, 4, 8], symmetric=[True], granularity=["tensor"], fixed="none")
    loss = random_table(space, rng, "loss", whole=False)
    genomes = every_genome(space)
    bits = {
        layer.name: space.bits[space.gene_of[layer.name, "act"], genomes[:, space.gene_of[layer.name, "act"]]]
        for layer in layers
    }
    largest = np.max([np.ceil(layer.act_numel / layer.calls * bits[layer.name] / 8) for layer in layers], axis=0)
    for limit in np.unique(largest)[::3].tolist():
        budget = Budget.parse(f"bitops=2M,max_act={limit}B")
        narrow = budget.restrict(space)
        bound = budget.bind(narrow)
        found = exact_search(loss_in(narrow, loss), bound.costs, bound.limits)
        inside = (largest <= limit) & (COSTS["bitops"](space)(genomes) <= 2e6)
        assert found.loss == pytest.approx(loss(genomes[inside]).min(), rel=1e-12)
    with pytest.raises(
        ValueError, match=r"budget max_act=1B cannot be met: the smallest reachable is max_act=\d+B, the input"
    ):
        Budget.parse("max_act=1B").restrict(space)
    tight = Budget.parse(f"max_act={np.sort(largest)[0]:g}B")
    with pytest.raises(ValueError, match=r"restrict it with Budget\.restrict first"):
        tight.bind(space)
    narrow = tight.restrict(space)  # no other limit
    assert tight.bind(narrow).feasible(narrow.random_genomes(rng, 20)).all()


def loss_in(narrow: QuantSpace, loss: CostModel) -> CostModel:
    """A loss on a restriction of its space."""

    def measure(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        gene, other = (loss.space.choices(layer.name, slot) for slot in ("weight", "act"))  # type: ignore[arg-type]
        part = dict(zip((x.name for x in loss.space.layers), loss._layer_tables, strict=True))[layer.name][1]
        assert act is not None
        return float(part[gene.index(weight) * len(other) + other.index(act)])

    return CostModel(narrow, "loss", "loss", measure)


# -- the front --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_front_lies_on_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = random_space(rng, 6, [2, 3, 4, 8])
    loss, cost = random_table(space, rng, "loss", whole=False), COSTS["size"](space)
    genomes = every_genome(space)
    true = front(genomes, -loss(genomes), cost(genomes))
    points = set(zip(true.costs.tolist(), true.scores.round(9).tolist(), strict=True))
    calls = []
    found = exact_front(loss, cost, points=15, progress=lambda: calls.append(1))
    assert len(calls) == 15
    assert len(found.costs) >= 4
    assert set(zip(found.costs.tolist(), found.scores.round(9).tolist(), strict=True)) <= points
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.scores) > 0).all()
    assert (found.costs[0], round(found.scores[0], 9)) == (true.costs[0], true.scores[0].round(9))
    assert (found.costs[-1], round(found.scores[-1], 9)) == (true.costs[-1], true.scores[-1].round(9))


def test_the_front_keeps_other_limits() -> None:
    rng = np.random.default_rng(6)
    space = random_space(rng, 7, [2, 4, 8])
    loss, cost, other = random_table(space, rng, "loss", whole=False), COSTS["size"](space), COSTS["bitops"](space)
    limit = 0.4 * other.of(space.largest())
    found = exact_front(loss, cost, [other], [limit], points=6)
    assert (other(found.genomes) <= limit).all()
    with pytest.raises(ValueError, match="at least 2 points"):
        exact_front(loss, cost, points=1)


# -- HAWQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimum", json.loads(INSTANCE.read_text())["optima"], ids=lambda o: o["constraint"])
def test_published_configs_of_hawq_come_out(optimum: dict) -> None:
    instance = read_instance(INSTANCE)
    found = instance.solve({optimum["constraint"]: optimum["t"]})
    assert found.optimal
    assert instance.bits(found) == optimum["bits"]
    assert instance.objective(found) == pytest.approx(optimum["objective"], abs=1e-6)


RELEASED = {  # bit_config.py of github.com/Zhen-Dong/HAWQ, bit_config_resnet18_<constraint>_<t>; convolutions in their order
    ("size", 0.75): "8888888888888488884",
    ("size", 0.5): "8888888888888884844",
    ("size", 0.25): "8888888888888844444",
    ("bops", 0.75): "8888888848888484884",
    ("bops", 0.5): "8884888848884444444",
    ("bops", 0.25): "8884848444444444444",
    ("latency", 0.75): "8888888848888484884",
    ("latency", 0.5): "8888848848884484844",
    ("latency", 0.25): "8884848444444444444",
}


@pytest.mark.parametrize(("constraint", "t"), RELEASED, ids=str)
def test_all_released_configs_of_hawq_come_out(constraint: str, t: float) -> None:
    instance = read_instance(INSTANCE)
    found = instance.solve({constraint: t})
    assert found.optimal
    assert instance.bits(found) == RELEASED[constraint, t]


def test_hawq_with_several_limits_equals_brute_force() -> None:
    instance = read_instance(INSTANCE)
    genomes = every_genome(instance.space)
    assert len(genomes) == 65536
    loss = instance.loss(genomes)
    values = {name: cost(genomes) for name, cost in instance.costs.items()}
    for names in (("size", "bops"), ("bops", "latency"), ("size", "bops", "latency")):
        for t in (0.25, 0.5, 0.75):
            within = np.all([values[name] <= instance.limit(name, t) for name in names], axis=0)
            found = instance.solve(dict.fromkeys(names, t))
            assert found.optimal
            assert found.loss == pytest.approx(loss[within].min(), rel=1e-12)


def test_limits_of_hawq_are_those_of_the_notebook() -> None:
    instance = read_instance(INSTANCE)
    assert instance.limit("bops", 0.5) / 1024 / 1e6 == pytest.approx(66.232320, abs=1e-6)
    found = instance.solve({"bops": 0.5})
    assert found.costs[0] / 1024 / 1e6 == pytest.approx(65.028096, abs=1e-6)
    with pytest.raises(ValueError, match="no cost 'energy'; it has size, bops, latency"):
        instance.limit("energy", 0.5)


def test_an_instance_of_52_layers_is_solved(tmp_path: Path) -> None:
    data, rng = json.loads(INSTANCE.read_text()), np.random.default_rng(0)
    lists = {key: values for key, values in data.items() if isinstance(values, list) and key not in ("ties", "optima")}
    large = {key: rng.choice(values, 52).tolist() for key, values in lists.items()} | {"ties": [[3, 5], [10, 12]]}
    (tmp_path / "resnet50.json").write_text(json.dumps(large))
    instance = read_instance(tmp_path / "resnet50.json")
    found = instance.solve({"size": 0.5, "bops": 0.5, "latency": 0.5})
    assert found.optimal
    bits = instance.bits(found)
    assert bits[3] == bits[5]
    assert bits[10] == bits[12]
    assert set(bits) == {"4", "8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": "many"}, "not an instance"),
        ({"parameters": [1, 2]}, "must hold 2 finite numbers"),
        ({"trace_per_parameter": [float("nan")] * 19}, "NaN is not a number of JSON"),
        ({"ties": [[0, 77]]}, "ties names '77'"),
    ],
)
def test_damaged_instances_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(json.loads(INSTANCE.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_instance(tmp_path / "bad.json")


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)  # HiGHS of scipy 1.17 prints a line while it solves this one
    layers = [
        LayerInfo(
            f"l{i}", "conv", (1, int(rng.integers(1e3, 1e6))), int(rng.integers(1e3, 1e7)), int(rng.integers(1e2, 1e5))
        )
        for i in range(24)
    ]
    space = QuantSpace.from_layers(layers, symmetric=[True], granularity=["tensor"], fixed="none")
    rng = np.random.default_rng(2)
    factors = {layer.name: np.exp(1.5 * rng.normal(size=2)) for layer in layers}

    def noise(layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> float:
        assert act is not None
        return float(factors[layer.name] @ [4.0 ** (2 - weight.bits), 4.0 ** (2 - act.bits)])

    budget = Budget.parse("w=4,a=5").bind(space)
    assert exact_search(CostModel(space, "loss", "loss", noise), budget.costs, budget.limits).optimal
    print("and afterwards everything is as before")
    out, err = capfd.readouterr()
    assert (out, err) == ("and afterwards everything is as before\n", "")


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_an_infeasible_budget_names_the_limit_and_the_smallest_value() -> None:
    rng = np.random.default_rng(7)
    space = random_space(rng, 6, [2, 4, 8])
    loss = random_table(space, rng, "loss", whole=False)
    with pytest.raises(InfeasibleError, match=r"budget w=1\.5 cannot be met: the smallest reachable is w=2\."):
        exact_search(loss, [COSTS["w"](space)], [1.5])


def test_limits_that_clash_name_what_each_can_reach() -> None:
    layers = [LayerInfo(n, "conv", (4, 100), 1000, act_numel=0, calls=0) for n in ("a", "b")]
    formats = {key: [QuantFormat(2), QuantFormat(4)] for key in ["a", "b"]}
    space = QuantSpace(layers, formats, {"a": [], "b": []})
    loss = CostModel(space, "loss", "loss", lambda layer, weight, act: 1.0 / weight.bits)

    def opposed(name: str, sign: int) -> CostModel:
        return CostModel(space, name, "", lambda layer, weight, act: 10.0 + sign * weight.bits)

    up, down = opposed("up", 1), opposed("down", -1)
    with pytest.raises(InfeasibleError) as error:
        exact_search(loss, [up, down], [25.0, 13.0])  # up + down is always 40
    assert "while the other limits hold is up=28 or down=16" in str(error.value)
    assert exact_search(loss, [up, down], [28.0, 13.0]).costs.tolist() == [28.0, 12.0]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_must_be_positive_numbers(limit: float) -> None:
    space = random_space(np.random.default_rng(0), 3, [2, 4])
    loss = random_table(space, np.random.default_rng(0), "loss", whole=False)
    with pytest.raises(ValueError, match="must be a positive finite number"):
        exact_search(loss, [COSTS["w"](space)], [limit])


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    space = random_space(np.random.default_rng(0), 3, [2, 4])
    with pytest.raises(ValueError, match="not numbers"):
        exact_search(CostModel(space, "kl", "loss", lambda *_: float("nan")))
    with pytest.raises(ValueError, match="1 costs and 2 limits"):
        exact_search(COSTS["w"](space), [COSTS["w"](space)], [1, 2])
    other = random_space(np.random.default_rng(1), 4, [2, 4])
    with pytest.raises(ValueError, match="another space"):
        exact_search(COSTS["w"](space), [COSTS["w"](other)], [3])


def test_a_search_that_runs_out_of_time_says_how_far_it_may_be_off() -> None:
    rng = np.random.default_rng(8)
    layers = [LayerInfo(f"l{i}", "conv", (1, int(rng.integers(1e3, 1e6))), 1, 0, 0) for i in range(200)]
    names = [layer.name for layer in layers]
    formats = [QuantFormat(b) for b in range(2, 9)]
    space = QuantSpace(layers, dict.fromkeys(names, formats), {n: [] for n in names})
    loss = random_table(space, rng, "loss", whole=False)
    costs = [random_table(space, rng, f"c{i}", whole=False) for i in range(8)]
    limits = [cost(space.random_genomes(rng, 50)).min() for cost in costs]
    found = exact_search(loss, costs, limits, time_limit=2.0)
    assert found.bound <= found.loss
    assert found.optimal == (found.gap == 0)
    assert found.gap >= 0
    assert (found.costs <= np.array(limits)).all()
