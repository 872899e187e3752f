"""Tables and pictures of a run: accuracy by bit-width and form, Pareto front, bits per layer, predicted against measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from eqnet.checkpoint import atomic_write_text
from eqnet.scoring.evaluation import UniformAccuracy
from eqnet.scoring.predictor import HeldOut
from eqnet.space import CostModel, Genomes, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.training.stability import Stability

WEIGHT_COLOR, ACT_COLOR, UNIFORM_COLOR, CHOSEN_COLOR = "#1f5fa8", "#e08a1e", "#7a7a7a", "#c0392b"


def _figure(width: float = 7.0, height: float = 4.2, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path


def uniform_table(results: Sequence[UniformAccuracy], split: str, float_accuracy: float | None) -> Table:
    """Accuracy in percent: one row per form, one column per bit-width, and the mean over forms."""
    bits = sorted({r.bits for r in results})
    title = f"{split} accuracy [%] of every uniform bit-width by form (granularity-weights-activations)"
    table = Table(
        title=title, title_justify="left", caption=None if float_accuracy is None else f"float: {float_accuracy:.2f}"
    )
    table.add_column("form")
    for b in bits:
        table.add_column(f"{b} bit", justify="right")
    by_form: dict[str, dict[int, float]] = {}
    for r in results:
        by_form.setdefault(r.form.name, {})[r.bits] = r.accuracy[split]
    for form, row in by_form.items():
        table.add_row(form, *(f"{row[b]:.2f}" for b in bits))
    table.add_section()
    table.add_row("mean over forms", *(f"{np.mean([row[b] for row in by_form.values()]):.2f}" for b in bits))
    return table


def comparison_table(
    columns: Mapping[str, Mapping[str, Any] | None], space: QuantSpace, costs: Costs, score: str | None = None
) -> Table:
    """The searched config beside the best uniform one within the budget: accuracies in percent, divergence and every cost.

    With the name of an additive score, what was predicted is its negative loss, not an accuracy.
    """
    table = Table(title="the searched subnet and the best uniform config within the budget", title_justify="left")
    table.add_column("")
    found = [entry for entry in columns.values() if entry is not None]
    for label, entry in columns.items():
        if entry is not None:
            table.add_column(label, justify="right")
    table.add_row("form", *(entry["form"] for entry in found))
    for split in ("test", "validation", *(["predicted"] if score is None else [])):
        table.add_row(f"{split} accuracy [%]", *(f"{entry['accuracy'][split]:.2f}" for entry in found))
    if score is not None:
        table.add_row(f"{score} loss", *(f"{-entry['accuracy']['predicted']:.4g}" for entry in found))
    table.add_row("divergence, nats", *(f"{entry['divergence']:.4f}" for entry in found))
    titles = {"w": "mean weight bits", "a": "mean activation bits", "size": "model size", "bitops": "BitOps"}
    titles["latency"] = "latency"
    for name, build in costs.items():
        table.add_row(titles[name], *(build(space).format(entry["cost"][name]) for entry in found))
    return table


def write_front(
    genomes: Genomes, scores: NDArray[Any], space: QuantSpace, costs: Costs, path: Path, score: str | None = None
) -> None:
    """A Pareto front as CSV: predicted accuracy, every cost, the form, then weight and activation bits of each layer.

    With the name of an additive score, the first column is its loss, the negative of `scores`.
    """
    configs = [space.decode(g) for g in genomes]
    values = {name: build(space)(genomes) for name, build in costs.items()}
    names = [layer.name for layer in space.layers]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "predicted" if score is None else f"{score} loss",
            *values,
            "form",
            *(f"{n}.weight" for n in names),
            *(f"{n}.act" for n in names),
        ]
    )
    for i, config in enumerate(configs):
        acts = [config[n].act for n in names]
        bits = [*(config[n].weight.bits for n in names), *("float" if a is None else a.bits for a in acts)]
        value = f"{scores[i]:.4f}" if score is None else f"{-scores[i]:.6g}"
        writer.writerow([value, *(f"{c[i]:.6g}" for c in values.values()), space.form_name(config), *bits])
    atomic_write_text(path, buffer.getvalue())


def plot_uniform(results: Sequence[UniformAccuracy], split: str, float_accuracy: float | None, path: Path) -> Path:
    """Heat map of accuracy: forms by bit-widths, and the mean over forms."""
    forms = list(dict.fromkeys(r.form for r in results))
    bits = sorted({r.bits for r in results})
    value = {(r.form, r.bits): r.accuracy[split] for r in results}
    grid = np.array([[value[form, b] for b in bits] for form in forms])
    grid = np.vstack([grid, grid.mean(0)])
    figure, axis = _figure(2.6 + 0.75 * len(bits), 1.2 + 0.36 * len(grid))
    low, high = np.percentile(grid, [10, 100])  # one collapsed config must not hide the rest
    axis.imshow(grid, cmap="Blues", vmin=low - 0.2 * (high - low), vmax=high + 0.4 * (high - low) + 1e-9, aspect="auto")
    for (row, column), number in np.ndenumerate(grid):
        axis.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=8)
    axis.axhline(len(forms) - 0.5, color="black", lw=0.8)
    axis.set_xticks(range(len(bits)), [f"{b} bit" for b in bits], fontsize=8)
    axis.set_yticks(range(len(grid)), [*(f.name for f in forms), "mean over forms"], fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    note = "" if float_accuracy is None else f", float {float_accuracy:.2f}"
    axis.set_title(f"{split} accuracy [%] by form (granularity-weights-activations){note}", fontsize=9, loc="left")
    return _save(figure, path)


Points = tuple[NDArray[Any], NDArray[Any]]
_AXES = {
    "bits": (1.0, "mean bits"),
    "bytes": (1024.0, "model size [KiB]"),
    "bitops": (1e6, "MBitOps"),
    "ms": (1.0, "latency [ms]"),
}


def plot_front(
    front: Points,
    uniform: Points,
    chosen: tuple[float, float],
    cost: CostModel,
    path: Path,
    *,
    score: str | None = None,
    genetic: Points | None = None,
) -> Path:
    """Predicted accuracy against cost: the front, the uniform configs, the chosen one.

    Args:
        front: (costs, predicted accuracies in percent).
        uniform: the same of the uniform configs.
        chosen: the same of the result.
        cost: names the axis.
        path: of the picture.
        score: name of an additive score; then `front` is exact, and all values are negative losses, drawn on a logarithmic axis.
        genetic: the front that the genetic search found on that score.
    """
    unit, label = _AXES[cost.unit]
    figure, axis = _figure()

    def draw(points: tuple[Any, Any], *style: str, **options: Any) -> None:
        values = np.asarray(points[1]) if score is None else -np.asarray(points[1])
        axis.plot(np.asarray(points[0]) / unit, values, *style, **options)

    kind = "predicted" if score is None else "exact"
    style = "-o" if score is None else "o"  # between exact points nothing is known
    draw(front, style, ms=3 if score is None else 5, color=WEIGHT_COLOR, label=f"Pareto front ({kind})")
    if genetic is not None:
        draw(genetic, ".", ms=4, color=ACT_COLOR, label="Pareto front (NSGA-II)")
    note = " (predicted)" if score is None else ""
    draw(uniform, "x", color=UNIFORM_COLOR, label=f"uniform configs{note}")
    draw(([chosen[0]], [chosen[1]]), "*", ms=14, color=CHOSEN_COLOR, label=f"chosen{note}")
    axis.set_xlabel(label)
    if score is None:
        axis.set_ylabel("predicted validation accuracy [%]")
    else:
        axis.set_yscale("log")
        axis.set_ylabel(f"{score} loss")
    axis.legend(fontsize=8, loc="lower right" if score is None else "upper right")
    return _save(figure, path)


def plot_bits(config: QuantConfig, space: QuantSpace, path: Path) -> Path:
    """Weight and activation bits of every layer as bars; fixed layers hatched."""
    names = [layer.name for layer in space.layers]
    figure, axis = _figure(max(7.0, 0.32 * len(names) + 1.5), 4.0)
    x = np.arange(len(names))
    for shift, color, label, slot in (
        (-0.2, WEIGHT_COLOR, "weights", "weight"),
        (0.2, ACT_COLOR, "activations", "act"),
    ):
        formats = [getattr(config[n], slot) for n in names]
        bars = axis.bar(x + shift, [0 if f is None else f.bits for f in formats], 0.4, color=color, label=label)
        for name, bar in zip(names, bars, strict=True):
            if name in space.fixed:
                bar.set_hatch("////")
                bar.set_edgecolor("white")
    axis.set_xticks(x, names, rotation=90, fontsize=7)
    axis.set_yticks(range(0, 9, 2))
    axis.set_ylabel("bits (hatched: fixed)")
    axis.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def plot_stability(found: Mapping[str, Stability], path: Path) -> Path:
    """Mean and variance of the inputs of BN layers, a line for each bit-width, one column for each measurement."""
    figure, axes = _figure(2.0 + 3.5 * len(found), 5.2, columns=len(found), rows=2)
    columns = np.reshape(axes, (2, -1)).T
    for column, (when, stability) in zip(columns, found.items(), strict=True):
        shades = np.linspace(0.25, 1.0, len(stability.bits))
        for axis, first, label, rows in zip(
            column, columns[0], ("mean", "variance"), (stability.mean, stability.variance), strict=True
        ):
            if axis is not first:
                axis.sharey(first)
            for bits, shade, row in zip(stability.bits, shades, rows, strict=True):
                axis.plot(range(len(row)), row, ".-", lw=1, ms=4, color=WEIGHT_COLOR, alpha=shade, label=f"{bits} bit")
            axis.set_ylabel(f"{label} of BN inputs")
            axis.xaxis.get_major_locator().set_params(integer=True)
        column[0].set_title(
            f"{when} bit-meta training: instability {stability.instability:.3f}", fontsize=9, loc="left"
        )
        column[1].set_yscale("log")
        column[1].set_xlabel("BN layer")
        column[1].legend(fontsize=8, loc="lower right")
    return _save(figure, path)


def plot_predictor(held_out: HeldOut, path: Path) -> Path:
    """Predicted against measured accuracy of held-out configs, with the rank correlations."""
    figure, axis = _figure(4.6, 4.4)
    predicted, measured, _ = held_out
    axis.plot(measured, predicted, ".", color=WEIGHT_COLOR, ms=5, alpha=0.7)
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axis.plot(ends, ends, ":", color="black", lw=0.8)
    text = "\n".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in held_out.metrics().items())
    axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=8)
    axis.set_xlabel("measured validation accuracy [%]")
    axis.set_ylabel("predicted [%] (held-out configs)")
    return _save(figure, path)


def plot_ranks(
    scores: Mapping[str, NDArray[Any]], accuracy: NDArray[Any], titles: Mapping[str, str], path: Path
) -> Path:
    """Measured accuracy against each score, one panel per score.

    Args:
        scores: by name, [N] each.
        accuracy: in percent, [N].
        titles: by name, what stands above a panel.
        path: of the picture.
    """
    columns = min(len(scores), 4)
    rows = -(-len(scores) // columns)
    figure, axes = _figure(2.6 * columns, 2.3 * rows, columns=columns, rows=rows)
    for axis in np.ravel(axes)[len(scores) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(np.ravel(axes), scores.items(), strict=False):
        axis.plot(values, accuracy, ".", color=WEIGHT_COLOR, ms=3, alpha=0.6)
        axis.set_title(titles[name], fontsize=8)
        axis.tick_params(labelsize=6)
        axis.xaxis.offsetText.set_fontsize(6)
    for axis in np.atleast_2d(axes)[:, 0]:
        axis.set_ylabel("accuracy [%]", fontsize=7)
    return _save(figure, path)


def plot_tree(labels: Sequence[str], parents: Sequence[int], path: Path) -> Path:
    """An expression as a tree: the root on top, inputs as leaves.

    Args:
        labels: of the nodes, in prefix order.
        parents: number of the node above each, -1 for the root.
        path: of the picture.
    """
    depth, across = [0] * len(labels), [0.0] * len(labels)
    for i, parent in enumerate(parents[1:], 1):
        depth[i] = depth[parent] + 1
    leaves = [i for i in range(len(labels)) if i not in parents]
    for i in reversed(range(len(labels))):
        below = [across[j] for j in range(len(labels)) if parents[j] == i]
        across[i] = sum(below) / len(below) if below else float(leaves.index(i))
    figure, axis = _figure(max(3.0, 1.1 * len(leaves) + 1), 0.6 * max(depth) + 1)
    for i, parent in enumerate(parents):
        if parent >= 0:
            axis.plot([across[i], across[parent]], [-depth[i], -depth[parent]], color=UNIFORM_COLOR, lw=0.8, zorder=1)
        color = ACT_COLOR if i in leaves else WEIGHT_COLOR
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": color}
        axis.text(across[i], -depth[i], labels[i], ha="center", va="center", fontsize=8, bbox=box)
    axis.set_xlim(-0.7, len(leaves) - 0.3)
    axis.set_ylim(-max(depth) - 0.5, 0.5)
    axis.axis("off")
    return _save(figure, path)
