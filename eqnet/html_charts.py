"""Charts of training, accuracy and distributions as Vega-Lite specifications: plain dicts, colours left to the page.

Names that come from files are data in a specification, never names of its fields or parts of its expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eqnet.run_files import UniformFacts
from eqnet.training.losses import UNIFORM_KURTOSIS

Spec = dict[str, Any]
Row = dict[str, Any]
MAX_POINTS = 400  # of one line; longer ones are thinned


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: above it.
        spec: Vega-Lite, without width.
        note: below it.
        wide: takes the whole width of the page.
    """

    title: str
    spec: Spec
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a chart: its label and its points (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, lines: Sequence[Line], x: str, y: str, *, note: str = "", ordinal: bool = False) -> Chart:
    """Lines over a common axis; the values at the x under the pointer are shown.

    Args:
        title: of the chart.
        lines: in the order of the legend.
        x: title of the axis, with the unit.
        y: title of the axis, with the unit.
        note: below the chart.
        ordinal: colours in an order, for bit-widths.
    """
    labels = [line.label for line in lines]
    rows: list[Row] = []
    for i, line in enumerate(lines):
        every = -(-len(line.points) // MAX_POINTS)
        rows += [{"x": px, "y": py, "key": f"s{i}", "series": line.label} for px, py in line.points[::every]]
    values = [row["y"] for row in rows]
    x_axis = {"field": "x", "type": "quantitative", "title": x, "scale": {"zero": False, "nice": False}}
    color = {
        "field": "series",
        "type": "ordinal" if ordinal else "nominal",
        "sort": labels,
        "title": None,
        "legend": None if len(labels) == 1 else {"orient": "top", "columns": 4},
    }
    tooltip = [{"field": "x", "type": "quantitative", "title": x, "format": ",~r"}]
    tooltip += [
        {"field": f"s{i}", "type": "quantitative", "title": label, "format": ".4~g"} for i, label in enumerate(labels)
    ]
    few = max(len(line.points) for line in lines) <= 20
    mark = {"type": "line", "strokeWidth": 2, "point": few, "clip": True}
    hover = {"type": "point", "fields": ["x"], "nearest": True, "on": "pointerover", "clear": "pointerout"}
    spec = {
        "height": 240,
        "data": {"values": rows},
        "layer": [
            {
                "mark": mark,
                "encoding": {
                    "x": x_axis,
                    "y": {
                        "field": "y",
                        "type": "quantitative",
                        "title": y,
                        "scale": value_scale(values),
                        "axis": {"tickCount": 5},
                    },
                    "color": color,
                },
            },
            {
                "transform": [{"pivot": "key", "value": "y", "groupby": ["x"]}],
                "mark": {"type": "rule", "style": "cursor"},
                "params": [{"name": "hover", "select": hover}],
                "encoding": {
                    "x": x_axis,
                    "opacity": {"condition": {"param": "hover", "empty": False, "value": 0.6}, "value": 0},
                    "tooltip": tooltip,
                },
            },
        ],
    }
    return Chart(title, spec, note)


# -- parts ------------------------------------------------------------------------------------------------------------


def choice(name: str, value: str, options: Sequence[str], label: str | None = None) -> Spec:
    """Radio buttons that set the parameter `name` of a specification."""
    return {"name": name, "value": value, "bind": {"input": "radio", "options": list(options), "name": label or name}}


def value_scale(values: Sequence[float]) -> Spec:
    """Logarithmic where values are positive and differ by more than a factor of 30."""
    return {"type": "log"} if 0 < min(values) < max(values) / 30 else {"zero": False}


def layer_axis(rows: Sequence[Row]) -> Spec:
    """The vertical axis of layers in the order of the network."""
    order = list(dict.fromkeys(row["layer"] for row in rows))
    return {
        "field": "layer",
        "type": "nominal",
        "title": None,
        "sort": order,
        "axis": {"labelLimit": 130, "grid": True},
    }


def layer_height(rows: Sequence[Row], each: int = 16) -> int:
    """Height of a chart with `layer_axis`, in pixels."""
    return each * len({row["layer"] for row in rows})


def by_kind(field: str, domain: Sequence[str], shown: Sequence[str] | None = None) -> Spec:
    """Colours or shapes by kind: a kind of the domain looks the same whichever others are shown."""
    legend = {"orient": "top", "values": list(shown or domain)}
    return {"field": field, "type": "nominal", "title": None, "scale": {"domain": list(domain)}, "legend": legend}


def tooltip(*text: str, numbers: Sequence[str] = ()) -> list[Spec]:
    """What is shown of a mark under the pointer: fields of text, then numbers."""
    shown: list[Spec] = [{"field": name, "type": "nominal"} for name in text]
    return shown + [{"field": name, "type": "quantitative", "format": ".4~g"} for name in numbers]


# -- training ---------------------------------------------------------------------------------------------------------


def metric_lines(metrics: Sequence[Mapping[str, float]], pattern: str) -> list[Line]:
    """A line for each key that matches; the first group is the label. Roles and bit-widths are in their order."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        for key, value in row.items():
            match = re.fullmatch(pattern, key)
            if match:
                points.setdefault(match[1], []).append((row["step"], value))

    def order(label: str) -> tuple[int, int, str]:
        number = re.search(r"\d+", label)
        return {"largest": 0, "smallest": 2}.get(label, 1), int(number[0]) if number else 0, label

    return [Line(label, points[label]) for label in sorted(points, key=order)]


def training_charts(metrics: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Losses by phase and role, accuracies by bit-width and learning rates over optimizer steps; only what was logged."""
    step = "optimizer step"
    wanted = [
        ("Loss of the float network", r"pretrain/(task)", "cross entropy", False, ""),
        ("Task loss by role", r"supernet/task/(\w+)", "cross entropy", False, ""),
        (
            "Guidance by role",
            r"supernet/guidance/(\w+)",
            "divergence from the larger subnet",
            False,
            "Kullback-Leibler divergence of each subnet from the one before it.",
        ),
        ("Task loss by bit-width (MetaMix)", r"select/task/(\d+)bit", "cross entropy", True, ""),
        ("Task loss with selected activation bits", r"act/task/(\w+)", "cross entropy", False, ""),
        (
            "Regularisation of weight distributions",
            r"supernet/(kurtosis|skewness)",
            "mean square",
            False,
            "Kurtosis from its target, skewness from 0; unweighted.",
        ),
        ("Validation accuracy of the subnet", r"validation/(subnet)", "accuracy [%]", False, ""),
        ("Learning rates", r"\w+/(lr|step_size_lr)", "learning rate", False, ""),
    ]
    charts = []
    for title, pattern, y, ordinal, note in wanted:
        lines = metric_lines(metrics, pattern)
        if lines:
            charts.append(line_chart(title, lines, step, y, note=note, ordinal=ordinal))
    forms = dict.fromkeys(
        m[1] for row in metrics for key in row if (m := re.fullmatch(r"validation/([\w-]+)/\d+bit", key))
    )
    for form in forms:
        lines = [
            Line(f"{line.label} bit", line.points) for line in metric_lines(metrics, rf"validation/{form}/(\d+)bit")
        ]
        note = "Every few epochs, while training."
        chart = line_chart(f"Validation accuracy, {form}", lines, step, "accuracy [%]", note=note, ordinal=True)
        charts.append(chart)
    return charts


# -- accuracy ---------------------------------------------------------------------------------------------------------


def heat_map(uniform: Sequence[UniformFacts]) -> Chart:
    """Accuracy of every uniform config, bits by form, on a split to choose.

    Args:
        uniform: at least one.
    """
    rows: list[Row] = []
    for split in ("test", "validation"):
        by_bits: dict[int, list[float]] = {}
        for u in uniform:
            accuracy = u.test if split == "test" else u.validation
            rows.append({"form": u.form, "bits": u.bits, "split": split, "accuracy": accuracy})
            by_bits.setdefault(u.bits, []).append(accuracy)
        for bits, found in by_bits.items():
            rows.append({"form": "mean over forms", "bits": bits, "split": split, "accuracy": float(np.mean(found))})
    values = np.array([row["accuracy"] for row in rows])
    low, high = np.percentile(values, [10, 100])  # one collapsed config must not hide the rest
    for row in rows:
        row["light"] = bool(row["accuracy"] > (low + high) / 2)
    forms = list(dict.fromkeys(row["form"] for row in rows if row["form"] != "mean over forms"))
    shared = {
        "x": {
            "field": "bits",
            "type": "ordinal",
            "title": "weight bits",
            "axis": {"labelAngle": 0},
        },
        "y": {"field": "form", "type": "nominal", "title": None, "sort": [*forms, "mean over forms"]},
        "tooltip": tooltip("form", "split", numbers=("bits", "accuracy")),
    }
    color = {
        "field": "accuracy",
        "type": "quantitative",
        "title": "accuracy [%]",
        "scale": {"scheme": "cividis", "domain": [float(low), float(max(high, low + 1e-9))], "clamp": True},
        "legend": {"orient": "top", "gradientLength": 160, "format": ".1f", "tickCount": 3},
    }
    number = {"field": "accuracy", "type": "quantitative"}
    spec = {
        "height": 26 * (len(forms) + 1),
        "data": {"values": rows},
        "params": [choice("split", "test", ["test", "validation"])],
        "transform": [{"filter": "datum.split == split"}],
        "encoding": shared,
        "layer": [
            {"mark": "rect", "encoding": {"color": color}},
            {
                "mark": {"type": "text", "fontSize": 10, "style": "cell"},
                "encoding": {
                    "text": {
                        "condition": {"test": "bandwidth('x') < 36", **number, "format": ".0f"},
                        **number,
                        "format": ".2f",
                    },
                    "color": {"condition": {"test": "datum.light", "value": "#101010"}, "value": "#ffffff"},
                },
            },
        ],
    }
    note = (
        "Activations have the same bits, or the nearest that the space has. Form: granularity of the weights, symmetry of the "
        "weights, symmetry of the activations."
    )
    return Chart("Accuracy [%] of every uniform bit-width by form", spec, note, wide=True)


# -- distributions ----------------------------------------------------------------------------------------------------


def moment_charts(moments: Sequence[Row]) -> list[Chart]:
    """Kurtosis and skewness of the weights of each layer, before and after training."""
    charts = []
    for field, target, note in (
        ("kurtosis", UNIFORM_KURTOSIS, "1.8 is a uniform distribution (the line), 3 a normal one."),
        ("skewness", 0.0, "0 is a symmetric distribution (the line)."),
    ):
        x = {"field": field, "type": "quantitative", "title": f"{field} of the weights", "scale": {"zero": False}}
        y = layer_axis(moments)
        color = by_kind("when", ["before", "after"])
        ends = [
            {"aggregate": "min", "field": field, "type": "quantitative"},
            {"aggregate": "max", "field": field, "type": "quantitative"},
        ]
        spec = {
            "height": layer_height(moments),
            "data": {"values": list(moments)},
            "layer": [
                {
                    "mark": {"type": "rule", "style": "reference"},
                    "data": {"values": [{field: target}]},
                    "encoding": {"x": x},
                },
                {"mark": {"type": "rule", "style": "cursor"}, "encoding": {"x": {**ends[0], "title": x["title"]}, "x2": ends[1], "y": y}},
                {
                    "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
                    "encoding": {
                        "x": x,
                        "y": y,
                        "color": color,
                        "shape": color,
                        "tooltip": tooltip("layer", "when", numbers=("kurtosis", "skewness")),
                    },
                },
            ],
        }  # fmt: skip
        charts.append(Chart(f"{field.capitalize()} of each layer", spec, f"Before and after supernet training. {note}"))
    return charts


def step_size_charts(steps: Sequence[Row]) -> list[Chart]:
    """Trained step sizes of each layer by bit-width, of a format to choose."""
    charts = []
    for slot in dict.fromkeys(row["slot"] for row in steps):
        rows = [row for row in steps if row["slot"] == slot]
        params, filters = [], []
        for field in ("granularity", "symmetry"):
            options = list(dict.fromkeys(row[field] for row in rows))
            if len(options) > 1:
                params.append(choice(field, options[0], options))
                filters.append({"filter": f"datum.{field} == {field}"})
        spec = {
            "height": layer_height(rows),
            "data": {"values": rows},
            "params": params,
            "transform": filters,
            "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
            "encoding": {
                "x": {
                    "field": "step",
                    "type": "quantitative",
                    "title": f"step size of the {slot}",
                    "scale": {"type": "log", "base": 2, "nice": False},
                    "axis": {"tickCount": 6, "format": ".1~e"},
                },
                "y": layer_axis(rows),
                "color": {
                    "field": "bits",
                    "type": "ordinal",
                    "title": "bits",
                    "legend": {"orient": "top", "direction": "horizontal"},
                },
                "tooltip": tooltip("layer", "granularity", "symmetry", numbers=("bits", "step", "low", "high")),
            },
        }
        note = "Logarithmic. Per channel: the median; hovering shows the smallest and the largest."
        charts.append(Chart(f"Step sizes of {slot} by bits", spec, note))
    return charts
