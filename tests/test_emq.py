"""Evolved proxies: typed trees, formulas, files, and an evolution that is deterministic, resumable and finds what was planted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import one_sentence
from conftest import Eqnet
from PIL import Image
from scipy.stats import spearmanr
from test_exact import QUICK as SEARCH

from eqnet.checkpoint import write_json
from eqnet.scoring.emq import EvolutionSettings, evolve
from eqnet.scoring.emq_trees import (
    INPUTS,
    OPERATIONS,
    EvolvedProxy,
    canonical,
    find_proxy,
    infix,
    is_additive,
    latex,
    names_of,
    parse,
)
from eqnet.scoring.emq_variation import MAX_NODES, Grower, crossed
from eqnet.scoring.layer_statistics import NUMBER_NAMES, SAMPLE_NAMES, LayerStatistics
from eqnet.scoring.mqbench import Benchmark, benchmark_genomes, search_half
from eqnet.scoring.proxies import PROXIES
from eqnet.scoring.scores import SCORES
from eqnet.space import LayerInfo, QuantSpace

LAYERS = [LayerInfo(f"layer{i}", "conv", (8, 8, 3, 3), 1000 * (i + 1), 100) for i in range(8)]
SPACE = QuantSpace.from_layers(LAYERS, [2, 3, 4], [4, 8], (True,), ("channel",), fixed="none")
SMALL = EvolutionSettings(evaluations=60, population=12)
TRACE_TIMES_ERROR = ["sum_over_layers", "mul", "mean_w", "H_w", "mean_w", "square_w", "E_w"]


def synthetic(seed: int = 0) -> LayerStatistics:
    """Statistics of eight layers that differ by orders of magnitude; errors shrink with bits."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-1, 1, size=(8, 1, 1))
    samples = {name: scale * rng.normal(size=(8, 1, 256)) for name in SAMPLE_NAMES}
    samples["weight_hessian"] = 10.0 ** rng.uniform(-1, 1, size=(8, 1, 1)) * rng.random((8, 1, 256))
    for slot in ("weight", "act"):
        bits = np.array([2, 3, 4] if slot == "weight" else [4, 8])
        samples[f"{slot}_error"] = scale * 2.0 ** -bits[:, None] * rng.normal(size=(8, 1, 256))
    numbers = {name: rng.random(8) for name in NUMBER_NAMES}
    losses = {name: (rng.random((8, 3)), rng.random((8, 2))) for name in SCORES}
    return LayerStatistics(SPACE, samples, numbers, losses)


def planted(statistics: LayerStatistics, names: list[str], size: int = 200) -> Benchmark:
    """A table whose accuracies fall with an expression."""
    genomes, drawn = benchmark_genomes(SPACE, size, 0)
    accuracy = -EvolvedProxy(parse(names)).scores(statistics, genomes)
    return Benchmark(SPACE, genomes, accuracy, search_half(size, 0), drawn, {})


# -- trees ------------------------------------------------------------------------------------------------------------


def test_a_tree_computes_its_formula() -> None:
    statistics = synthetic()
    genomes = SPACE.random_genomes(np.random.default_rng(1), 20)
    s = statistics.samples
    for genome, score in zip(genomes, EvolvedProxy(parse(TRACE_TIMES_ERROR)).scores(statistics, genomes), strict=True):
        config, expected = SPACE.decode(genome), 0.0
        for i, layer in enumerate(LAYERS):
            f = SPACE.choices(layer.name, "weight").index(config[layer.name].weight)
            expected += s["weight_hessian"][i, 0].mean() * (s["weight_error"][i, f] ** 2).mean()
        assert score == pytest.approx(expected, rel=1e-12)
    inputs = ["maximum_over_layers", "sub", "largest_a", "E_a", "b_a"]
    for genome, score in zip(genomes, EvolvedProxy(parse(inputs), -1).scores(statistics, genomes), strict=True):
        config, values = SPACE.decode(genome), []
        for i, layer in enumerate(LAYERS):
            act = config[layer.name].act
            assert act is not None
            f = SPACE.choices(layer.name, "act").index(act)
            values.append(np.abs(s["act_error"][i, f]).max() - act.bits)
        assert score == pytest.approx(-max(values), rel=1e-12)


def test_hand_made_proxies_are_trees() -> None:
    statistics, genomes = synthetic(), SPACE.random_genomes(np.random.default_rng(1), 20)
    for name, names in (
        ("bit_sum", ["sum_over_layers", "add", "b_w", "b_a"]),
        ("bparams", ["sum_over_layers", "mul", "b_w", "parameters"]),
        ("synflow", ["sum_over_layers", "mul", "synflow", "add", "b_a", "b_w"]),
        ("kl", ["sum_over_layers", "neg", "add", "kl_w", "kl_a"]),
    ):
        tree = EvolvedProxy(parse(names))
        np.testing.assert_allclose(
            tree.scores(statistics, genomes), PROXIES[name].scores(statistics, genomes), rtol=1e-9
        )


def test_sums_over_layers_are_detected_and_have_cells() -> None:
    statistics, genomes = synthetic(), SPACE.random_genomes(np.random.default_rng(1), 20)
    for names, additive in (
        (TRACE_TIMES_ERROR, True),
        (["sub_scores", *TRACE_TIMES_ERROR, "sum_over_layers", "b_a"], True),
        (["mul_scores", *TRACE_TIMES_ERROR, "sum_over_layers", "b_a"], False),
        (["neighbours_over_layers", "b_w"], False),
    ):
        proxy = EvolvedProxy(parse(names), -1)
        assert proxy.additive == additive == is_additive(proxy.tree)
        if not additive:
            with pytest.raises(ValueError, match="not a sum over layers"):
                proxy.cells(statistics)
            continue
        cells, scores = proxy.cells(statistics), proxy.scores(statistics, genomes)
        w, a = genomes[:, ::2], genomes[:, 1::2]
        np.testing.assert_allclose(cells[np.arange(8), w, a].sum(1), scores, rtol=1e-9)


def test_random_trees_are_typed_bounded_and_survive_their_names() -> None:
    rng, statistics = np.random.default_rng(0), synthetic()
    grower = Grower(statistics)
    trees = [grower.grow(rng) for _ in range(200)]
    for _ in range(200):
        first, second = (trees[i] for i in rng.integers(len(trees), size=2))
        trees += [crossed(first, second, rng), grower.mutated(first, rng)]
    for tree in trees:
        assert len(tree) <= MAX_NODES
        assert names_of(parse(names_of(tree))) == names_of(tree)  # parse checks the types
        assert infix(tree)
        assert latex(tree).count("{") == latex(tree).count("}")
        assert EvolvedProxy(tree).scores(statistics, SPACE.random_genomes(rng, 5)).shape == (5,)
    used = {node.name for tree in trees for node in tree}
    assert len(used & set(OPERATIONS)) > 0.8 * len(OPERATIONS)
    assert len(used & set(INPUTS)) > 0.8 * len(INPUTS)


def test_inputs_that_were_not_gathered_or_wanted_are_not_drawn() -> None:
    rng, full = np.random.default_rng(0), synthetic()
    bare = LayerStatistics(SPACE, full.samples, full.numbers, {})
    for grower in (Grower(bare), Grower(full, scores=False)):
        assert not any(INPUTS[n.name].score for _ in range(300) for n in grower.grow(rng) if n.arity == 0)
    with pytest.raises(ValueError, match="needs the scores kl, which were not gathered"):
        EvolvedProxy(parse(["sum_over_layers", "kl_w"])).scores(bare, SPACE.random_genomes(rng, 2))


def test_equal_trees_have_one_form() -> None:
    total = "sum_over_layers"
    same = [
        ([total, "add", "b_w", "b_a"], [total, "add", "b_a", "b_w"]),
        ([total, "mean_w", "abs_w", "neg_w", "E_w"], [total, "mean_w", "abs_w", "E_w"]),
        ([total, "square", "abs", "b_w"], [total, "square", "b_w"]),
        ([total, "neg", "neg", "b_w"], [total, "b_w"]),
        ([total, "neg", "b_w"], [total, "b_w"]),
        ([total, "abs", "std_w", "E_w"], [total, "std_w", "E_w"]),
        ([total, "mul", "add", "b_a", "b_w", "macs"], [total, "mul", "macs", "add", "b_w", "b_a"]),
    ]
    statistics, genomes = synthetic(), SPACE.random_genomes(np.random.default_rng(1), 30)
    for first, second in same:
        assert canonical(parse(first)) == canonical(parse(second))
        scores = [EvolvedProxy(parse(names)).scores(statistics, genomes) for names in (first, second)]
        assert abs(spearmanr(*scores).statistic) == pytest.approx(1)
    different = [[total, "sub", "b_w", "b_a"], [total, "sub", "b_a", "macs"], [total, "mean_w", "W"], [total, "b_w"]]
    assert len({canonical(parse(names)) for names in different}) == 4


def test_random_trees_of_one_form_order_configs_alike() -> None:
    rng, statistics = np.random.default_rng(0), synthetic()
    grower = Grower(statistics, priority=False)
    genomes = SPACE.random_genomes(rng, 40)
    forms: dict[str, np.ndarray] = {}
    pairs = 0
    for _ in range(3000):
        tree = grower.grow(rng, depth=3)
        scores = EvolvedProxy(tree).scores(statistics, genomes)
        if not np.isfinite(scores).all() or np.ptp(scores) <= 1e-9 * np.abs(scores).max():
            continue
        first = forms.setdefault(canonical(tree), scores)
        if first is not scores:
            pairs += 1
            assert abs(spearmanr(first, scores).statistic) > 0.999, canonical(tree)
    assert pairs > 20


def test_files(tmp_path: Path) -> None:
    statistics, genomes = synthetic(), SPACE.random_genomes(np.random.default_rng(1), 20)
    proxy = EvolvedProxy(parse(TRACE_TIMES_ERROR), -1)
    path = tmp_path / "p.json"
    write_json(path, proxy.to_json())
    again = find_proxy(f"emq:{path}")
    np.testing.assert_array_equal(again.scores(statistics, genomes), proxy.scores(statistics, genomes))
    assert json.loads(path.read_text())["formula"] == "-sum_l (mean(H_w) * mean((E_w)^2))"
    good = proxy.to_json()
    for changed, message in (
        ({"tree": ["sum_over_layers", "__import__('os')"]}, "unknown operations or inputs"),
        ({"tree": ["sum_over_layers", "W"]}, "not well typed at 'W'"),
        ({"tree": ["sum_over_layers", "add", "b_w"]}, "ends too early"),
        ({"tree": "b_w"}, "not a list of names"),
        ({"sign": 2}, "holds no evolved proxy"),
    ):
        write_json(path, good | changed)
        with pytest.raises(ValueError, match=message):
            find_proxy(f"emq:{path}")
    with pytest.raises(ValueError, match="No such file"):
        find_proxy(f"emq:{tmp_path / 'none.json'}")
    with pytest.raises(ValueError, match="unknown proxy 'hawk'; the proxies are bit_sum"):
        find_proxy("hawk")


# -- evolution --------------------------------------------------------------------------------------------------------


def test_an_evolution_is_deterministic_and_keeps_its_best() -> None:
    statistics = synthetic()
    table = planted(statistics, TRACE_TIMES_ERROR)
    found = evolve(table, statistics, SMALL, 3)
    again = evolve(table, statistics, SMALL, 3)
    assert [names_of(m.tree) for m in found.population] == [names_of(m.tree) for m in again.population]
    assert found.history == again.history
    assert found.evaluations == 60
    assert len(found.population) == 12
    fitness = [f for _, f in found.history]
    assert fitness == sorted(fitness)
    assert found.best.fitness == fitness[-1]
    assert names_of(evolve(table, statistics, SMALL, 4).best.tree) != names_of(found.best.tree)


def test_each_form_is_evaluated_once() -> None:
    statistics = synthetic()
    table = planted(statistics, TRACE_TIMES_ERROR)
    found = evolve(table, statistics, EvolutionSettings(evaluations=150, population=12), 0)
    assert found.wasted == 0
    assert len(found.behaviours) == found.evaluations
    assert len({canonical(m.tree) for m in found.population}) == 12
    assert sum(found.rejected.values()) > 0
    blind = evolve(table, statistics, EvolutionSettings(evaluations=150, population=12, screening=False), 0)
    assert blind.wasted > 10
    assert sum(blind.rejected.values()) == 0


def test_an_interrupted_evolution_continues_exactly(tmp_path: Path) -> None:
    statistics = synthetic()
    table = planted(statistics, TRACE_TIMES_ERROR)
    whole = evolve(table, statistics, EvolutionSettings(evaluations=120, population=12), 1, tmp_path / "whole.json")
    state = tmp_path / "state.json"
    calls = 0

    class Killed(Exception):
        pass

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise Killed

    with pytest.raises(Killed):
        evolve(table, statistics, EvolutionSettings(evaluations=120, population=12), 1, state, kill)
    assert 0 < json.loads(state.read_text())["evaluations"] < 70
    evolve(table, statistics, EvolutionSettings(evaluations=120, population=12), 1, state)
    assert json.loads(state.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert whole.evaluations == 120
    with pytest.raises(ValueError, match="belongs to another evolution"):
        evolve(table, statistics, EvolutionSettings(evaluations=120, population=12), 2, state)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_optimum_is_recovered(seed: int) -> None:
    """Accuracy falls with trace x squared error; evolution on the search half orders the held-out half like it."""
    statistics = synthetic()
    table = planted(statistics, TRACE_TIMES_ERROR)
    settings = EvolutionSettings(evaluations=1000, population=40, scores=False)
    found = evolve(table, statistics, settings, seed)
    genomes, accuracy = table.half(search=False)
    rho = spearmanr(found.proxy().scores(statistics, genomes), accuracy).statistic
    bits = spearmanr(PROXIES["bit_sum"].scores(statistics, genomes), accuracy).statistic
    assert rho > 0.97
    assert rho > bits + 0.1


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="a population of at least 4"):
        EvolutionSettings(evaluations=10, population=20)
    statistics = synthetic()
    table = planted(statistics, TRACE_TIMES_ERROR, 40)
    flat = Benchmark(SPACE, table.genomes, np.ones(40), table.search, table.drawn, {})
    with pytest.raises(ValueError, match="all accuracies of the search half are equal"):
        evolve(flat, statistics, SMALL, 0)


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evolve_on_the_command_line(eqnet: Eqnet, tmp_path: Path) -> None:
    statistics = synthetic()
    planted(statistics, TRACE_TIMES_ERROR, 60).save(tmp_path / "t.csv")
    statistics.save(tmp_path / "t.safetensors")
    options = ["--evaluations", 60, "--population", 12, "--seeds", 2]
    code, out, err = eqnet("proxies", "evolve", "t.csv", "--output", "a.json", *options, "--processes", 2)
    assert code == 0, err
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["formula"] in " ".join(out.split("\n"))
    assert len(found["hall of fame"]) == 10
    assert [r["evaluations"] for r in found["evolutions"].values()] == [60, 60]
    fitness = [member["fitness"] for member in found["hall of fame"]]
    assert fitness == sorted(fitness, reverse=True)
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5
    proxy = EvolvedProxy.load(tmp_path / "a.json")
    table = Benchmark.load(tmp_path / "t.csv")
    genomes, accuracy = table.half(search=True)
    rho = spearmanr(proxy.scores(LayerStatistics.load(tmp_path / "t.safetensors", table.space), genomes), accuracy)
    assert rho.statistic == pytest.approx(found["search half"]["spearman"])
    code, _, err = eqnet("proxies", "evolve", "t.csv", "--output", "b.json", *options)  # one process: the same
    assert code == 0, err
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    code, out, err = eqnet("benchmark", "rank", "t.csv", "--score", "bit_sum,emq:a.json,ridge", "--json", "r.json")
    assert code == 0, err
    assert (
        json.loads((tmp_path / "r.json").read_text())["emq:a.json"]["top 100 %"]["spearman"]
        == found["held-out half"]["spearman"]
    )
    code, _, err = eqnet("proxies", "evolve", "t.csv", "--output", "a.json")
    assert code == 2
    assert "a.json exists already" in one_sentence(err)
    (tmp_path / "c.png").write_bytes(b"mine")
    code, _, err = eqnet("proxies", "evolve", "t.csv", "--output", "c.json")
    assert code == 2
    assert "c.png exists already" in one_sentence(err)
    assert (tmp_path / "c.png").read_bytes() == b"mine"


# -- search.py --------------------------------------------------------------------------------------------------------


def test_search_on_a_sum_over_layers_is_exact(call, run: Path, tmp_path: Path) -> None:
    proxy = EvolvedProxy(parse(["sum_over_layers", "mul", "mean_w", "abs_w", "G_w", "norm_w", "E_w"]), -1)
    write_json(tmp_path / "mine.json", proxy.to_json())
    arguments = ["--budget", "w=4,a=5", "--method", "emq", "--run", run, "--form", "channel-sym-sym", *SEARCH]
    code, out, err = call("search", *arguments, "--score", f"emq:{tmp_path / 'mine.json'}")
    assert code == 0, err
    assert "is a sum over layers: integer programming, proven" in " ".join(out.split())
    subnet = json.loads((run / "search" / "w4-a5-channel-sym-sym-emq-mine" / "subnet.json").read_text())
    assert subnet["cost"]["w"] <= 4
    assert subnet["cost"]["a"] <= 5
    assert subnet["best_searched"]["accuracy"]["predicted"] >= subnet["best_uniform"]["accuracy"]["predicted"]
    assert (subnet["method"], subnet["additive"]) == ("emq", True)


def test_search_on_any_other_proxy_is_genetic(call, run: Path, tmp_path: Path) -> None:
    proxy = EvolvedProxy(parse(["minimum_over_layers", "sub", "b_w", "norm_w", "E_w"]))
    write_json(tmp_path / "mine.json", proxy.to_json())
    arguments = ["--budget", "4", "--method", "emq", "--run", run, "--form", "tensor-sym-sym", *SEARCH]
    code, out, err = call("search", *arguments, "--score", f"emq:{tmp_path / 'mine.json'}")
    assert code == 0, err
    assert "is not a sum over layers: genetic search" in " ".join(out.split())
    subnet = json.loads((run / "search" / "w4-a4-tensor-sym-sym-emq-mine" / "subnet.json").read_text())
    assert max(subnet["cost"]["w"], subnet["cost"]["a"]) <= 4
    assert subnet["best_searched"]["accuracy"]["validation"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--method emq needs --score, one of bit_sum"),
        (["--score", "hawk"], "unknown proxy 'hawk'"),
        (["--score", "emq:none.json"], "cannot read 'none.json'"),
        (["--score", "snip", "--budget", "1.5"], "cannot be met: the smallest reachable is w="),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, call, run: Path) -> None:
    budget = [] if "--budget" in arguments else ["--budget", "4"]
    code, _, err = call("search", *budget, "--method", "emq", *arguments, "--run", run)
    assert code == 2
    assert message in one_sentence(err)
