"""The figures in docs/results.md are those in docs/data, which the commands beside them wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def test_predictor_curve() -> None:
    for recipe, points in data("predictor_cifar10.json")["curves"].items():
        for point in points:
            figures = [f"{point[key]:.3f}" for key in ("kendall", "spearman", "pearson", "rmse")]
            assert row(recipe, f"{point['rows']:.0f}") == figures


@pytest.mark.parametrize("bits", [3, 4])
def test_search_against_uniform_on_cifar10(bits: int) -> None:
    document = data(f"cifar10_subnet_w{bits}-a{bits}.json")
    assert max(document["cost"]["w"], document["cost"]["a"]) <= bits
    for name, key in (("searched", "best_searched"), ("best uniform", "best_uniform")):
        entry = document[key]
        figures = [f"{entry['accuracy'][s]:.2f}" for s in ("validation", "test")]
        assert row(str(bits), name, entry["form"]) == [*figures, f"{entry['cost']['bitops'] / 1e6:.0f} M"]
