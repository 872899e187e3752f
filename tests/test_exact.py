"""Searching on additive scores from the command line: methods, gaps, fronts, bad input."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import FAST, one_sentence
from PIL import Image
from test_genetic import make_space

from eqnet.run import Run
from eqnet.scoring.sensitivity import Sensitivity
from eqnet.search import exact_search
from eqnet.search.exact import METHODS, choose_method, linearised_gap
from eqnet.space import Budget, Genomes, QuantFormat

QUICK = [*FAST, "search.score_images=16"]


def test_integer_programming_plans_without_table_or_predictor(call, run: Path) -> None:
    code, out, err = call("search", "--budget", "w=4,a=5", "--method", "ilp", "--score", "fisher", "--run", run, *QUICK)
    assert code == 0, err
    assert re.search(r"smallest fisher loss within the budget: [0-9.e-]+, proven in", out)
    folder = run / "search" / "w4-a5-ilp-fisher"
    assert {p.name for p in folder.iterdir()} == {"subnet.json", "subnet.safetensors", "sensitivity.json", "bits.png"}
    assert not (run / "table").exists()
    subnet = json.loads((folder / "subnet.json").read_text())
    assert (subnet["method"], subnet["score"], subnet["gap"]) == ("ilp", "fisher", 0.0)
    assert subnet["cost"]["w"] <= 4
    assert subnet["cost"]["a"] <= 5
    searched = subnet["best_searched"]
    assert searched["accuracy"]["predicted"] == pytest.approx(-subnet["optimum"], rel=1e-9)
    assert searched["accuracy"]["predicted"] >= subnet["best_uniform"]["accuracy"]["predicted"]
    rows = json.loads((folder / "sensitivity.json").read_text())["table"]
    assert len(rows) == sum(len(g.formats) for g in Run.open(run).load_supernet()[0].space.genes)


def test_the_genetic_search_prints_its_gap(call, run: Path) -> None:
    arguments = ["--budget", "4", "--score", "squared_error", "--form", "channel-sym-asym", "--run", run, *QUICK]
    code, out, err = call("search", *arguments, "search.generations=40")
    assert code == 0, err
    gap = float(re.search(r"optimality gap of the genetic search: ([0-9.e-]+) %", out)[1])
    assert 0 <= gap < 5
    subnet = json.loads((run / "search" / "w4-a4-channel-sym-asym-genetic-squared_error" / "subnet.json").read_text())
    assert 100 * subnet["gap"] == pytest.approx(gap, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("method", ["lcpaq", "hawq-v2", "hawq-v3"])
def test_named_methods(method: str, call, run: Path) -> None:
    code, out, err = call(
        "search", "--budget", "bitops=1G", "--method", method, "--form", "tensor-sym-sym", "--run", run, *QUICK
    )
    assert code == 0, err
    folder = run / "search" / f"bitops1G-tensor-sym-sym-{method}-hessian"
    layers = json.loads((folder / "subnet.json").read_text())["best_searched"]["layers"]
    facts = json.loads((folder / "sensitivity.json").read_text())["facts"]
    assert set(facts) == {"trace_per_element", "standard_error", "products"}
    if method == "hawq-v3":
        assert all(c["weight"]["bits"] == c["act"]["bits"] for c in layers.values())
        assert {c["weight"]["bits"] for c in layers.values()} <= {4, 8}
        return
    assert np.asarray(Image.open(folder / "pareto.png")).std() > 5
    header, *rows = (folder / "pareto.csv").read_text().splitlines()
    assert header.startswith("hessian loss,w,a,size,bitops,form")
    losses, costs = ([float(row.split(",")[i]) for row in rows] for i in (0, 4))
    assert losses == sorted(losses, reverse=True)
    assert costs == sorted(costs)
    assert "exact front:" in out


def test_a_budget_limits_the_largest_input(call, run: Path) -> None:
    space = Run.open(run).load_supernet()[0].space
    sizes = {layer.name: layer.act_numel / layer.calls for layer in space.layers}
    limit = max(sizes[name] for name in space.fixed)  # at 8 bits; other layers may have to go lower
    limit = max(limit, max(sizes.values()) / 2)
    budget = f"w=5,max_act={limit:g}B"
    code, _, err = call(
        "search", "--budget", budget, "--method", "ilp", "--score", "squared_error", "--run", run, *QUICK
    )
    assert code == 0, err
    (folder,) = (run / "search").glob("w5-max_act*")
    subnet = json.loads((folder / "subnet.json").read_text())
    for config in (subnet, subnet["best_searched"]):
        assert max(sizes[name] * c["act"]["bits"] / 8 for name, c in config["layers"].items()) <= limit
    code, _, err = call("search", "--budget", "max_act=2B", "--method", "ilp", "--score", "kl", "--run", run)
    assert code == 2
    assert "cannot be met: the smallest reachable is max_act=" in one_sentence(err)


@pytest.mark.parametrize("budget", ["4", "size=20KiB,bitops=1G"])
def test_lcpaq_and_hawq_v2_minimise_the_same_loss(budget: str, run: Path) -> None:
    space = Run.open(run).load_supernet()[0].space
    rng = np.random.default_rng(0)
    tables = {key: {fmt: rng.random() / fmt.bits for fmt in space.choices(*key)} for key in space.gene_of}
    bound = Budget.parse(budget).bind(space)
    found = [
        exact_search(METHODS[name].loss(Sensitivity("hessian", tables), space), bound.costs, bound.limits)
        for name in ("lcpaq", "hawq-v2")
    ]
    assert (found[0].genome == found[1].genome).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ilp"], "--method ilp needs --score, one of squared_error"),
        (["--method", "ilp", "--score", "hesian"], "unknown score 'hesian'; the scores are"),
        (["--method", "lcpaq", "--score", "kl"], "--method lcpaq scores with hessian; use --method ilp --score kl"),
        (["--method", "ilp", "--score", "kl", "--budget", "1.5"], "cannot be met: the smallest reachable is w="),
        (["--method", "ilp", "--score", "kl", "--budget", "-3"], "not a positive finite number"),
        (["--method", "ilp", "--score", "kl", "search.score_images=0"], "score_images"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, call, run: Path) -> None:
    before = sorted(run.rglob("*"))
    budget = [] if "--budget" in arguments else ["--budget", "4"]
    code, _, err = call("search", *budget, *arguments, "--run", run)
    assert code == 2
    assert message in one_sentence(err)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("seed", range(3))
def test_the_linearised_gap_of_an_additive_score_is_its_gap(seed: int) -> None:
    space = make_space([8, 4, 6, 16], bits=[2, 3, 4, 8])
    noise = np.random.default_rng(seed).random(space.bits.shape) / (space.bits + 1.0)
    columns = np.arange(space.num_genes)

    def score(genomes: Genomes) -> np.ndarray:
        return -noise[columns, genomes].sum(1)

    budget = Budget.parse("w=4,a=4").bind(space)
    (genome,) = space.encode_all([space.uniform(3, space.forms[seed])])
    form = space.restrict_form(space.forms[seed])
    every = space.encode_all(form.decode(g) for g in itertools.product(*(range(n) for n in form.num_formats)))
    best = score(every[budget.feasible(every)]).max()
    gap = linearised_gap(score, genome, budget)
    assert gap.proven
    assert gap.gain == pytest.approx(best - score(genome[None])[0], rel=1e-9)
    assert gap.found == pytest.approx(gap.gain, rel=1e-9)
    optimum = every[budget.feasible(every)][score(every[budget.feasible(every)]).argmax()]
    assert linearised_gap(score, optimum, budget).gain == pytest.approx(0.0, abs=1e-12)


def test_a_search_on_the_predictor_prints_its_linearised_gap(call, run: Path) -> None:
    for budget in ("5", "2"):  # the only config within 2 bits is uniform, and nothing is left to search
        code, out, err = call("search", "--budget", budget, "--form", "tensor-sym-sym", "--run", run, *FAST)
        assert code == 0, err
        found = re.search(r"linearised around the\s+result: ([0-9.e-]+) %", out)
        assert found is not None, out
        assert float(found[1]) >= 0
    assert float(found[1]) == 0
    assert json.loads((run / "search" / "w2-a2-tensor-sym-sym" / "subnet.json").read_text())["best_searched"] is None


def test_every_method_that_has_a_score_names_a_registered_one() -> None:
    for name, method in METHODS.items():
        if method.score is not None:
            assert choose_method(name, None) == (method, method.score)
    with pytest.raises(ValueError, match="unknown method 'hawq'"):
        choose_method("hawq", None)


def test_a_method_needs_its_bit_widths(run: Path) -> None:
    space = Run.open(run).load_supernet()[0].space
    tables = {
        (layer.name, slot): dict.fromkeys(space.choices(layer.name, slot), 1.0)
        for layer in space.layers
        for slot in ("weight", "act")
    }
    low = space.restrict(lambda layer, slot, fmt: layer.name in space.fixed or fmt.bits == 2)
    with pytest.raises(ValueError, match="has no format that this method chooses among \\(4 or 8 bits"):
        METHODS["hawq-v3"].loss(Sensitivity("kl", tables), low)
    assert QuantFormat(2) in low.choices(low.groups[1][0], "weight")
