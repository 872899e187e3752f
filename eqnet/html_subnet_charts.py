"""Charts of measured configs, found subnets and several runs as Vega-Lite specifications, with the parts of `html_charts`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import scipy.stats

from eqnet.html_charts import (
    Chart,
    Line,
    Row,
    by_kind,
    choice,
    layer_axis,
    layer_height,
    line_chart,
    metric_lines,
    tooltip,
    value_scale,
)
from eqnet.run_record import Measured, RunRecord, Search
from eqnet.scoring.predictor import HeldOut
from eqnet.space import Budget

KINDS = ["table", "uniform", "searched"]
COST_AXES = {
    "w": (1.0, "mean weight bits"),
    "a": (1.0, "mean activation bits"),
    "size": (1024.0, "model size [KiB]"),
    "bitops": (1e6, "MBitOps"),
    "latency": (1.0, "latency [ms]"),
}


# -- predictor and measured configs -----------------------------------------------------------------------------------


def predictor_charts(held_out: HeldOut) -> list[Chart]:
    """Predicted against measured accuracy of held-out configs, and the same of their ranks."""
    charts = []
    accuracies = (held_out.predicted, held_out.measured)
    ranks = tuple(scipy.stats.rankdata(values) for values in accuracies)
    for title, pairs, unit in (
        ("Predicted against measured accuracy", accuracies, "accuracy [%]"),
        ("Predicted against measured rank", ranks, "rank"),
    ):
        rows = [
            {"predicted": float(p), "measured": float(m), "predicted rank": float(pr), "measured rank": float(mr)}
            for p, m, pr, mr in zip(*accuracies, *ranks, strict=True)
        ]
        fields = ("measured", "predicted") if unit != "rank" else ("measured rank", "predicted rank")
        ends = [float(min(v.min() for v in pairs)), float(max(v.max() for v in pairs))]
        x, y = (
            {"field": f, "type": "quantitative", "title": f"{name} {unit}", "scale": {"zero": False}}
            for f, name in zip(fields, ("measured", "predicted"), strict=True)
        )
        spec = {
            "height": 280,
            "layer": [
                {
                    "data": {"values": [{fields[0]: end, fields[1]: end} for end in ends]},
                    "mark": {"type": "line", "style": "reference"},
                    "encoding": {"x": x, "y": y},
                },
                {
                    "data": {"values": rows},
                    "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.7},
                    "encoding": {
                        "x": x,
                        "y": y,
                        "tooltip": tooltip(numbers=("measured", "predicted", "measured rank", "predicted rank")),
                    },
                },
            ],
        }
        note = "Configs that the predictor had not seen; on the line a prediction is exact."
        charts.append(Chart(title, spec, note))
    return charts


def cost_charts(measured: Sequence[Measured], costs: Iterable[str] = ("w", "size", "bitops")) -> list[Chart]:
    """Measured accuracy against each cost: the accuracy table, uniform and searched configs, and the front of them all."""
    charts = []
    for name in costs:
        unit, label = COST_AXES[name]
        points = [m for m in measured if name in m.cost]
        rows: list[Row] = [
            {
                "config": m.name,
                "kind": m.kind,
                "cost": m.cost[name] / unit,
                "validation": m.validation,
                "test": "not measured" if m.test is None else f"{m.test:.2f}",
            }
            for m in points
        ]
        front: list[Row] = []
        for row in sorted(rows, key=lambda r: (r["cost"], -r["validation"])):
            if not front or row["validation"] > front[-1]["validation"]:
                front.append(row)
        charts.append(
            _front_chart(
                f"Measured accuracy against {label}",
                front,
                rows,
                (label, "validation accuracy [%]", "validation"),
                "The line is the Pareto front of everything that was measured.",
            )
        )
    return charts


def pareto_chart(search: Search, measured: Sequence[Measured]) -> Chart:
    """The front of a search with `--pareto`: predicted accuracy (or the loss of its score) against its cost, the result on it.

    Args:
        search: with a front.
        measured: uniform configs are drawn as predicted, on fronts of accuracies without a target only.
    """
    first = next(iter(search.front[0]))
    limits = [] if search.facts.budget is None else [name for name, _ in Budget.parse(search.facts.budget).limits]
    cost = limits[0] if len(limits) == 1 and limits[0] in search.front[0] else "bitops"
    unit, label = COST_AXES[cost]
    front = [
        {"config": "front", "kind": "front", "cost": row[cost] / unit, "value": row[first]} for row in search.front
    ]
    rows: list[Row] = []
    if first == "predicted" and search.facts.target is None:
        uniform = [m for m in measured if m.kind == "uniform" and m.predicted is not None]
        rows += [
            {"config": m.name, "kind": "uniform", "cost": m.cost[cost] / unit, "value": m.predicted} for m in uniform
        ]
    facts = search.facts
    if "predicted" in facts.accuracy and cost in facts.cost:
        value = facts.accuracy["predicted"] * (1 if first == "predicted" else -1)
        rows.append({"config": search.name, "kind": "searched", "cost": facts.cost[cost] / unit, "value": value})
    title = "predicted accuracy [%]" if first == "predicted" else first
    note = "All as predicted; predictions may exceed 100 %." if first == "predicted" else "Less is better."
    return _front_chart(f"Pareto front against {label}", front, rows, (label, title, "value"), note)


def _front_chart(title: str, front: list[Row], rows: list[Row], axes: tuple[str, str, str], note: str) -> Chart:
    """Points by kind over a stepped front; `axes` are the titles of x and y and the field of y."""
    x = {"field": "cost", "type": "quantitative", "title": axes[0], "scale": {"zero": False}}
    scale = value_scale([row[axes[2]] for row in [*front, *rows]])
    y = {"field": axes[2], "type": "quantitative", "title": axes[1], "scale": scale}
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    size = {"condition": {"test": "datum.kind == 'searched'", "value": 130}, "value": 40}
    tested = ["test"] if any("test" in row for row in rows) else []
    shown = tooltip("config", "kind", *tested, numbers=("cost", axes[2]))
    kind = by_kind("kind", KINDS, kinds)
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True},
        "encoding": {
            "x": x,
            "y": y,
            "color": kind,
            "shape": kind | {"scale": {"domain": KINDS, "range": ["circle", "cross", "diamond"]}},
            "size": size,
            "opacity": {"condition": {"test": "datum.kind == 'table'", "value": 0.35}, "value": 1},
            "tooltip": shown,
        },
    }
    line = {
        "data": {"values": front},
        "mark": {
            "type": "line",
            "interpolate": "step-after",
            "style": "front",
            "point": {"size": 25, "style": "front"},
        },
        "encoding": {"x": x, "y": y, "tooltip": tooltip("config", numbers=("cost", axes[2]))},
    }
    return Chart(title, {"height": 280, "layer": [line, points] if rows else [line]}, note)


# -- subnets ----------------------------------------------------------------------------------------------------------


def bits_chart(search: Search, fixed: frozenset[str]) -> Chart:
    """Weight and activation bits of every layer; layers whose bits are fixed are pale."""
    rows = []
    for name, layer in search.config.items():
        for slot, fmt in (("weights", layer.weight), ("activations", layer.act)):
            if fmt is not None:
                rows.append({"layer": name, "slot": slot, "bits": fmt.bits, "fixed": "yes" if name in fixed else "no"})
    spec = {
        "height": layer_height(rows, 20),
        "data": {"values": rows},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {
                "field": "bits",
                "type": "quantitative",
                "title": "bits",
                "scale": {"domain": [0, 8]},
                "axis": {"tickCount": 8, "format": "d"},
            },
            "y": layer_axis(rows),
            "yOffset": {"field": "slot", "type": "nominal", "sort": ["weights", "activations"]},
            "color": by_kind("slot", ["weights", "activations"]),
            "opacity": {"condition": {"test": "datum.fixed == 'yes'", "value": 0.45}, "value": 1},
            "tooltip": tooltip("layer", "slot", "fixed", numbers=("bits",)),
        },
    }
    return Chart("Bits of each layer", spec, "Pale: bits that the space fixes.")


def cost_share_chart(rows: Sequence[Row]) -> Chart:
    """What each layer costs, as a share of the whole network.

    Args:
        rows: {"layer", "measure", "share", "amount"}; shares in percent, amounts as text with their unit.
    """
    options = list(dict.fromkeys(row["measure"] for row in rows))
    spec = {
        "height": layer_height(rows),
        "data": {"values": list(rows)},
        "params": [choice("shown", options[-1], options, "cost")],
        "transform": [{"filter": "datum.measure == shown"}],
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "share", "type": "quantitative", "title": "share of the network [%]"},
            "y": layer_axis(rows),
            "tooltip": tooltip("layer", "measure", "amount", numbers=("share",)),
        },
    }
    return Chart("Cost of each layer", spec, "Biases, normalisation and overhead are the rest of the network.")


# -- several runs -----------------------------------------------------------------------------------------------------


def comparison_charts(records: Mapping[str, RunRecord]) -> list[Chart]:
    """Accuracy by bits, losses and found subnets of several runs, by their names."""
    charts, lines, losses, found = [], [], [], []
    for name, record in records.items():
        by_bits: dict[int, list[float]] = {}
        for u in [] if record.evaluation is None else record.evaluation.uniform:
            by_bits.setdefault(u.bits, []).append(u.test)
        if by_bits:
            lines.append(Line(name, [(b, float(np.mean(values))) for b, values in sorted(by_bits.items())]))
        losses += [Line(name, line.points) for line in metric_lines(record.metrics, r"supernet/task/(smallest)")]
        for m in record.measured:
            if m.kind == "searched":
                found.append(
                    {"run": name, "config": m.name, "cost": m.cost["bitops"] / 1e6, "validation": m.validation}
                )
    if lines:
        note = "Mean over the forms of each run."
        charts.append(line_chart("Test accuracy by bit-width", lines, "bits", "test accuracy [%]", note=note))
    if losses:
        charts.append(line_chart("Task loss of the smallest subnet", losses, "optimizer step", "cross entropy"))
    if found:
        x, y = (
            {"field": f, "type": "quantitative", "title": title, "scale": {"zero": False}}
            for f, title in (("cost", "MBitOps"), ("validation", "validation accuracy [%]"))
        )
        spec = {
            "height": 240,
            "data": {"values": found},
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0.9},
            "encoding": {
                "x": x,
                "y": y,
                "color": by_kind("run", list(records)),
                "shape": by_kind("run", list(records)),
                "tooltip": tooltip("run", "config", numbers=("cost", "validation")),
            },
        }
        charts.append(Chart("Searched subnets", spec))
    return charts
