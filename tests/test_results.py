"""The figures in docs/results.md are those in docs/data, which the commands beside them wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (DOCS / "results.md").read_text().splitlines()
    if line.startswith("|")
]


def data(name: str) -> Any:
    return json.loads((DOCS / "data" / name).read_text())


def row(*start: str, width: int | None = None) -> list[str]:
    """The cells after the first ones, of the only table row (of `width` cells) that starts so."""
    (found,) = [r for r in ROWS if r[: len(start)] == list(start) and width in (None, len(r))]
    return found[len(start) :]


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def test_elastic_against_static() -> None:
    result = data("elastic_vs_static.json")
    bits = [str(b) for b in range(2, 9)]
    means = {b: np.mean([form[b] for form in result["elastic"].values()], axis=0).tolist() for b in bits}
    static = {
        b: np.mean([form[b] for form in result["static"].values()], axis=0).tolist() for b in ("2", "3", "4", "8")
    }
    assert f"Float: {spread(result['float'])}." in (DOCS / "results.md").read_text()
    assert row("elastic, mean over 8 forms") == [spread(means[b]) for b in bits]
    assert row("elastic mean - static mean") == [
        f"{np.mean(means[b]) - np.mean(static[b]):+.2f}" if b in static else "" for b in bits
    ]
    assert row("elastic mean - float") == [f"{np.mean(means[b]) - np.mean(result['float']):+.2f}" for b in bits]
    for name, form in (("LSQ", "tensor-sym-sym"), ("LSQ+", "tensor-asym-asym")):
        assert row(f"elastic, {form}") == [spread(result["elastic"][form][b]) for b in bits]
        cells = row(f"static, {form} ({name})")
        assert cells == [spread(result["static"][name][b]) if b in static else "" for b in bits]


def test_predictor_curve() -> None:
    for recipe, points in data("predictor_cifar10.json")["curves"].items():
        for point in points:
            figures = [f"{point[key]:.3f}" for key in ("kendall", "spearman", "pearson", "rmse")]
            assert row(recipe, f"{point['rows']:.0f}") == figures


def test_search_against_uniform_on_digits() -> None:
    for budget, pairs in data("search_vs_uniform.json").items():
        for name in ("searched", "uniform"):
            means = [f"{np.mean([p[name]['accuracy'][s] for p in pairs]):.2f}" for s in ("validation", "test")]
            assert row(budget, name, width=5)[:2] == means
        gaps = [
            [p["searched"]["accuracy"][s] - p["uniform"]["accuracy"][s] for p in pairs] for s in ("validation", "test")
        ]
        better = sum(gap > 0 for gap in gaps[0])
        assert row(budget, f"difference ({better} better)")[:2] == [f"{np.mean(gap):+.2f}" for gap in gaps]


@pytest.mark.parametrize("bits", [3, 4])
def test_search_against_uniform_on_cifar10(bits: int) -> None:
    document = data(f"cifar10_subnet_w{bits}-a{bits}.json")
    assert max(document["cost"]["w"], document["cost"]["a"]) <= bits
    for name, key in (("searched", "best_searched"), ("best uniform", "best_uniform")):
        entry = document[key]
        figures = [f"{entry['accuracy'][s]:.2f}" for s in ("validation", "test")]
        assert row(str(bits), name, entry["form"]) == [*figures, f"{entry['cost']['bitops'] / 1e6:.0f} M"]
