"""Configs are measured alike by both paths, and what is reported belongs to what is exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.special import rel_entr
from torch import Tensor, nn

from eqnet.checkpoint import read_json, write_json
from eqnet.nn.integer import kernels_available
from eqnet.nn.supernet import Supernet
from eqnet.scoring.evaluation import (
    DIVERGENCE,
    Evaluator,
    Integer,
    UniformAccuracy,
    accuracy,
    evaluate_uniform,
    uniform_configs,
)
from eqnet.scoring.table import build_table, expected_accuracy, like_table
from eqnet.space import QuantConfig

needs_kernels = pytest.mark.skipif(not kernels_available(), reason="this CPU has no integer kernels")
Images = Callable[..., Tensor]


@pytest.fixture
def supernet(cnn: nn.Sequential, images: Images) -> Supernet:
    net = Supernet.from_model(cnn, (3, 8, 8), bits=[2, 3, 4], fixed={})
    net.calibrate(images(16))
    return net


@pytest.fixture
def evaluator(supernet: Supernet, images: Images) -> Callable[[Integer], Evaluator]:
    """Splits are labelled by the largest subnet, so that accuracies differ between configs."""
    bn = [images(16, seed=1), images(16, seed=2)]
    supernet.eval().recalibrate_bn(bn)

    def split(seed: int) -> list[tuple[Tensor, Tensor]]:
        x = images(64, seed=seed)
        with torch.no_grad():
            return [(x, supernet(x).argmax(1))]

    splits = {"validation": split(3), "test": split(4)}
    return lambda integer: Evaluator(supernet, bn, splits, integer)


def statistics(supernet: Supernet) -> list[Tensor]:
    return [m.running_var.clone() for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]  # type: ignore[union-attr]


@needs_kernels
def test_both_paths_measure_the_same(supernet: Supernet, evaluator: Callable[[Integer], Evaluator]) -> None:
    integer, simulation = evaluator("on"), evaluator("off")
    assert (integer.arithmetic, simulation.arithmetic) == ("integer", "simulation")
    assert evaluator("auto").arithmetic == "integer"
    rng = np.random.default_rng(0)
    configs = [supernet.space.sample(rng) for _ in range(8)]
    a = np.array([integer.measure(c, "validation")[0] for c in configs])
    b = np.array([simulation.measure(c, "validation")[0] for c in configs])
    assert len(set(b)) > 2
    assert (np.abs(a - b) <= 100 / 64).all()  # one image


@needs_kernels
def test_test_accuracies_and_statistics_are_those_of_the_simulation(
    supernet: Supernet, evaluator: Callable[[Integer], Evaluator]
) -> None:
    integer, simulation = evaluator("on"), evaluator("off")
    config = supernet.space.sample(np.random.default_rng(1))
    expected = simulation.measure(config, "validation", "test")
    stored = statistics(supernet)
    integer.measure(supernet.space.largest(), "validation")
    assert integer.measure(config, "validation", "test") == expected
    assert all(torch.equal(a, b) for a, b in zip(statistics(supernet), stored, strict=True))
    assert accuracy(supernet.extract(), integer.splits["test"]) == expected[1]


def test_auto_measures_as_the_table_was_measured(tmp_path: Path, evaluator: Callable[[Integer], Evaluator]) -> None:
    """Where it says simulation, so that tables from elsewhere serve a CPU with integer kernels."""
    assert like_table(tmp_path, "auto") == "auto"
    build_table(evaluator("off"), tmp_path, 3, 0, Accelerator())
    assert [like_table(tmp_path, choice) for choice in ("auto", "on", "off")] == ["off", "on", "off"]
    header = read_json(tmp_path / "header.json")
    write_json(tmp_path / "header.json", {**header, "arithmetic": "integer"})
    assert like_table(tmp_path, "auto") == "auto"


def test_a_table_is_measured_one_way(tmp_path: Path, evaluator: Callable[[Integer], Evaluator]) -> None:
    simulation, accelerator = evaluator("off"), Accelerator()
    table = build_table(simulation, tmp_path, 3, 0, accelerator)
    header = read_json(tmp_path / "header.json")
    assert header["arithmetic"] == "simulation"
    assert len(table) == 3
    del header["arithmetic"]  # as written before there was a choice
    write_json(tmp_path / "header.json", header)
    assert np.array_equal(build_table(simulation, tmp_path, 3, 0, accelerator).accuracy, table.accuracy)
    with pytest.raises(ValueError, match="measured otherwise"):
        build_table(simulation, tmp_path, 3, 1, accelerator)
    if kernels_available():
        with pytest.raises(ValueError, match=r"search\.integer=off"):
            build_table(evaluator("on"), tmp_path, 4, 0, accelerator)
        other = tmp_path / "other"
        build_table(evaluator("on"), other, 3, 0, accelerator)
        with pytest.raises(ValueError, match=r"search\.integer=on"):
            build_table(simulation, other, 3, 0, accelerator)


def test_rows_without_a_divergence_are_measured_again(
    tmp_path: Path, evaluator: Callable[[Integer], Evaluator]
) -> None:
    simulation, accelerator = evaluator("off"), Accelerator()
    table = build_table(simulation, tmp_path, 3, 0, accelerator)
    (path,) = tmp_path.glob("rows-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("divergence") for row in rows[:2]] == table.divergence[:2].tolist()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = build_table(simulation, tmp_path, 3, 0, accelerator)
    assert len([line for line in path.read_text().splitlines() if line]) == 5
    assert np.array_equal(again.accuracy, table.accuracy)
    assert np.array_equal(again.divergence, table.divergence)


def test_the_divergence_is_that_of_the_probabilities_from_those_of_the_largest_subnet(
    supernet: Supernet, evaluator: Callable[[Integer], Evaluator]
) -> None:
    simulation, rng = evaluator("off"), np.random.default_rng(0)
    ((images, labels),) = simulation.splits["validation"]

    def probabilities(config: QuantConfig) -> np.ndarray:
        supernet.set_config(config)
        supernet.recalibrate_bn(simulation.bn_batches)
        with torch.no_grad():
            return supernet(images).double().softmax(1).numpy()

    largest = probabilities(supernet.space.largest())
    for config in (supernet.space.sample(rng) for _ in range(3)):
        measured, right = simulation.measure(config, DIVERGENCE, "validation")
        found = probabilities(config)
        assert measured == pytest.approx(rel_entr(largest, found).sum(1).mean(), rel=1e-4)
        assert right == 100 * (found.argmax(1) == labels.numpy()).mean()
        assert measured > 1e-4
    assert simulation.measure(supernet.space.largest(), DIVERGENCE) == [0.0]


def test_divergences_on_a_target_are_from_the_largest_subnet_as_it_was_trained(
    supernet: Supernet, evaluator: Callable[[Integer], Evaluator]
) -> None:
    trained, coarse = evaluator("off"), copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1)  # weights, clipped by steps that stay as they are
    assert trained.of(coarse).measure(supernet.space.largest(), DIVERGENCE)[0] > 1e-3


def test_expected_accuracies_fall_with_the_divergence_and_are_nearer_to_the_truth_than_those_measured() -> None:
    rng = np.random.default_rng(0)
    divergence = rng.uniform(0, 0.3, 200) ** 2
    truth = 92 - 40 * (1 - np.exp(-5 * divergence))
    measured = truth + rng.normal(0, 0.5, 200)
    expected = expected_accuracy(divergence, measured)
    order = divergence.argsort()
    assert (np.diff(expected[order]) < 0).all()
    assert np.abs(expected - truth).mean() < 0.25 * np.abs(measured - truth).mean()
    constant = expected_accuracy(divergence, np.full(200, 90.0))
    assert (np.diff(constant[order]) < 0).all()
    assert np.abs(constant - 90).max() < 0.02


def test_uniform_configs_are_not_measured_twice(evaluator: Callable[[Integer], Evaluator]) -> None:
    simulation, accelerator, splits = evaluator("off"), Accelerator(), ["validation", "test"]
    rows = evaluate_uniform(simulation, splits, accelerator)
    simulation.learn_uniform(
        [UniformAccuracy(r.bits, r.form, {s: v + 200 for s, v in r.accuracy.items()}) for r in rows]
    )
    configs = [config for _, _, config in uniform_configs(simulation.supernet.space)]
    other = simulation.supernet.space.sample(np.random.default_rng(0))
    ticks: list[None] = []
    values = simulation.measure_all([other, *configs], splits, accelerator, lambda: ticks.append(None))
    assert values[1:].tolist() == [[200 + r.accuracy[s] for s in splits] for r in rows]
    assert values[0].tolist() == simulation.measure(other, *splits)
    assert len(ticks) == len(configs) + 1


@needs_kernels
def test_validation_accuracies_of_the_simulation_are_not_taken_for_those_of_integers(
    evaluator: Callable[[Integer], Evaluator],
) -> None:
    integer, (bits, form, config) = evaluator("on"), uniform_configs(evaluator("on").supernet.space)[0]
    integer.learn_uniform([UniformAccuracy(bits, form, {"validation": 200.0, "test": 300.0})])
    assert integer.measure_all([config], ["test"], Accelerator()).tolist() == [[300.0]]
    assert integer.measure_all([config], ["validation"], Accelerator()).max() <= 100


def test_integers_where_there_are_none_are_refused(supernet: Supernet, images: Images) -> None:
    supernet.to("meta")
    batches = {"validation": [(images(2), torch.zeros(2))]}
    assert Evaluator(supernet, [], batches, "auto").arithmetic == "simulation"
    with pytest.raises(ValueError, match=r"search\.integer=off"):
        Evaluator(supernet, [], batches, "on")
