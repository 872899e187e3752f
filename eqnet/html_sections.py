"""Sections of a report: what is said, drawn and tabulated about a run, or about several side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eqnet.html_charts import Chart, heat_map, moment_charts, step_size_charts, training_charts
from eqnet.html_subnet_charts import (
    bits_chart,
    comparison_charts,
    cost_charts,
    cost_share_chart,
    pareto_chart,
    predictor_charts,
)
from eqnet.run import flatten_settings
from eqnet.run_files import ConfigFacts, Evaluation, SupernetFacts
from eqnet.run_record import RunRecord, Search
from eqnet.settings import Settings

COST_TITLES = {
    "w": "mean weight bits",
    "a": "mean activation bits",
    "size": "model size",
    "bitops": "BitOps",
    "latency": "latency",
}


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and how numbers are shown; text without a format."""

    title: str
    format: str = ""

    def show(self, value: Any) -> str:
        """A cell as text; nothing for None."""
        return "" if value is None else format(value, self.format) if self.format else str(value)


@dataclass(frozen=True)
class Table:
    """A table that sorts.

    Attributes:
        title: above it.
        columns: one for each cell of a row.
        rows: cells; numbers where the column has a format.
        open: shown unfolded.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    open: bool = False

    def cells(self, row: Sequence[Any]) -> Iterable[tuple[Column, Any]]:
        """The cells of a row with their columns."""
        return zip(self.columns, row, strict=True)


@dataclass
class Section:
    """One heading of the page and what stands below it; `charts` carry their number on the page."""

    title: str
    texts: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    charts: list[tuple[int, Chart]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    anchor: str = ""


def _numbered(charts: Iterable[Chart]) -> list[tuple[int, Chart]]:
    return [(0, chart) for chart in charts]


# -- one run ----------------------------------------------------------------------------------------------------------


def run_sections(record: RunRecord) -> Iterator[Section]:
    """All sections of a run; what it lacks is one sentence that says what to run."""
    yield summary(record)
    yield settings_section(record.settings)
    charts = training_charts(record.metrics)
    yield (
        Section("Training", charts=_numbered(charts))
        if charts
        else _lacking("Training", f"Nothing was logged yet; train with: python train.py output={record.path} --resume")
    )
    yield accuracy_section(record)
    if record.moments or record.steps:
        columns = [Column("layer"), Column("when"), Column("kurtosis", ".3f"), Column("skewness", "+.3f")]
        rows = [[m["layer"], m["when"], m["kurtosis"], m["skewness"]] for m in record.moments]
        charts = [*moment_charts(record.moments)] if record.moments else []
        tables = [Table("Kurtosis and skewness", columns, rows)]
        yield Section("Weights", charts=_numbered([*charts, *step_size_charts(record.steps)]), tables=tables)
    if not record.settings.one_subnet:
        yield predictor_section(record)
    if any(m.kind != "uniform" for m in record.measured):
        costs = ("w", "size", "bitops")
        text = "Everything that was measured on the validation split."
        yield Section("Accuracy and cost", [text], charts=_numbered(cost_charts(record.measured, costs)))
    if record.searches:
        for search in record.searches:
            yield search_section(record, search)
    else:
        yield _lacking("Searches", f"No subnet yet; search one with: python search.py --run {record.path} --budget 4")
    yield certificate_section(record)


def _lacking(title: str, sentence: str) -> Section:
    return Section(title, [sentence])


def summary(record: RunRecord) -> Section:
    """What was trained on what, with which versions, and when."""
    s, figures = record.settings, []
    evaluation, header = record.evaluation or Evaluation(), record.header or SupernetFacts()
    if "test" in evaluation.float_network:
        figures.append(("float, test", f"{evaluation.float_network['test']:.2f} %"))
    for bits in sorted({u.bits for u in evaluation.uniform} & {2, 4, 8}):
        mean = np.mean([u.test for u in evaluation.uniform if u.bits == bits])
        figures.append((f"{bits} bit, test, mean over forms", f"{mean:.2f} %"))
    found = [m for m in record.measured if m.kind == "searched"]
    if found:
        best = max(found, key=lambda m: m.validation)
        figures.append((f"subnet {best.name}, validation", f"{best.validation:.2f} %"))
        if best.test is not None:
            figures.append((f"subnet {best.name}, test", f"{best.test:.2f} %"))
    facts = [("folder", str(record.path)), ("model", s.model.name), ("data", s.data.name), ("seed", str(s.seed))]
    facts += [(f"{name} images", f"{count}") for name, count in record.splits.items()]
    if record.space is not None:
        layers = record.space.layers
        facts += [
            ("classes", str(header.num_classes)),
            ("input", " x ".join(map(str, header.input_size))),
            ("quantized layers", str(len(layers))),
            ("quantized weights", f"{sum(layer.weight_numel for layer in layers):,}"),
            ("MACs per image", f"{sum(layer.macs for layer in layers):,}"),
            ("left in floating point", ", ".join(header.uncovered) or "nothing else"),
        ]
        facts += [(f"version of {name}", number) for name, number in header.versions.items()]
    tables = [Table("Facts", [Column("fact"), Column("value")], facts, open=True)]
    if record.times:
        start = record.times[0][1]
        rows = [
            [what, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)), (when - start) / 60]
            for what, when in record.times
        ]
        columns = [Column("finished"), Column("UTC"), Column("minutes after the start", ".1f")]
        tables.append(Table("Times (of the files)", columns, rows))
    texts = [] if record.header else [f"Training is not finished: python train.py output={record.path} --resume"]
    return Section("Summary", texts, figures, tables=tables)


def settings_section(settings: Settings) -> Section:
    """Settings that differ from the defaults."""
    own, default = (flatten_settings(s.model_dump()) for s in (settings, Settings()))
    rows = [[key, _text(value), _text(default.get(key))] for key, value in own.items() if value != default.get(key)]
    if not rows:
        return Section("Settings", ["All settings are the defaults."])
    columns = [Column("setting"), Column("value"), Column("default")]
    return Section("Settings", tables=[Table("Settings that differ from the defaults", columns, rows, open=True)])


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def accuracy_section(record: RunRecord) -> Section:
    """The heat map of uniform configs, or the accuracies of the one subnet."""
    if record.evaluation is None:
        return _lacking("Accuracy", f"Not evaluated yet; finish it with: python train.py output={record.path} --resume")
    uniform = record.evaluation.uniform
    if not uniform:
        found = {"float": record.evaluation.float_network, "subnet": record.evaluation.subnet}
        figures = [(f"{n}, {k.replace('_', ' ')}", f"{v:.2f} %") for n, by in found.items() for k, v in by.items()]
        return Section("Accuracy", figures=figures)
    columns = [Column("form"), Column("bits", "d"), Column("validation [%]", ".2f"), Column("test [%]", ".2f")]
    rows = [[u.form, u.bits, u.validation, u.test] for u in uniform]
    tables = [Table("Uniform configs", columns, rows)]
    return Section("Accuracy", charts=_numbered([heat_map(uniform)]), tables=tables)


def predictor_section(record: RunRecord) -> Section:
    """Predicted against measured accuracy of held-out configs."""
    if record.held_out is None or len(record.held_out.measured) < 2:
        text = f"No predictor yet; a search fits one: python search.py --run {record.path} --budget 4"
        return _lacking("Predictor", text)
    figures = [(name.replace("_", " "), f"{value:.3f}") for name, value in record.held_out.metrics().items()]
    return Section("Predictor", figures=figures, charts=_numbered(predictor_charts(record.held_out)))


def search_section(record: RunRecord, search: Search) -> Section:
    """One subnet: beside the best uniform config, its bits, its cost by layer, and the front if there is one."""
    facts = search.facts
    named = {"budget": facts.budget, "target": facts.target, "method": facts.method, "score": facts.score}
    text = "; ".join(f"{name} {value}" for name, value in named.items() if value is not None)
    title = "Subnet of this run" if search.name == "subnet" else f"Search {search.name}"
    table, shares = _layer_costs(search)
    charts = [bits_chart(search, search.space.fixed), cost_share_chart(shares)]
    if search.front:
        charts.append(pareto_chart(search, record.measured))
    return Section(title, [text] if text else [], charts=_numbered(charts), tables=[_rivals(search), table])


def _rivals(search: Search) -> Table:
    """Accuracies and costs of the subnet, of the best searched and of the best uniform config."""
    facts = search.facts
    entries = {"result": facts, "best searched": facts.best_searched, "best uniform": facts.best_uniform}
    found: dict[str, ConfigFacts] = {label: entry for label, entry in entries.items() if entry is not None}
    rows: list[list[Any]] = [["form", *(entry.form for entry in found.values())]]
    for name in dict.fromkeys(name for entry in found.values() for name in entry.accuracy):
        values = [entry.accuracy.get(name) for entry in found.values()]
        loss = name == "predicted" and facts.score is not None
        label = f"{facts.score} loss" if loss else f"{name.replace('_', ' ')} [%]"
        rows.append([label, *("" if value is None else f"{-value if loss else value:.4g}" for value in values)])
    values = [entry.divergence for entry in found.values()]
    if any(value is not None for value in values):
        rows.append(["divergence, nats", *("" if value is None else f"{value:.4f}" for value in values)])
    for name, build in search.costs.items():
        values = [entry.cost.get(name) for entry in found.values()]
        if any(value is not None for value in values):
            model = build(search.space)
            rows.append([COST_TITLES[name], *("" if value is None else model.format(value) for value in values)])
    return Table("Accuracies and costs", [Column(""), *map(Column, found)], rows, open=True)


def _layer_costs(search: Search) -> tuple[Table, list[dict[str, Any]]]:
    """Formats and costs of each layer as a table, and rows for the chart of shares."""
    space = search.space
    genomes = space.encode_all([search.config])
    models = {name: build(space) for name, build in search.costs.items() if name not in ("w", "a")}
    costs = {name: model.per_layer(genomes)[0] for name, model in models.items()}
    totals = {name: float(model(genomes)[0]) for name, model in models.items()}
    shares, rows = [], []
    for i, layer in enumerate(space.layers):
        config = search.config[layer.name]
        act = "float" if config.act is None else str(config.act.bits)
        symmetry = "-".join("sym" if f.symmetric else "asym" for f in (config.weight, config.act) if f is not None)
        shape = " x ".join(map(str, layer.weight_shape))
        formats = [config.weight.bits, act, f"{config.weight.granularity}-{symmetry}"]
        rows.append([layer.name, layer.kind, shape, *formats, layer.macs, *(float(c[i]) for c in costs.values())])
        for name, model in models.items():
            value = float(costs[name][i])
            share = 100 * value / totals[name] if totals[name] else 0.0
            row = {"layer": layer.name, "measure": COST_TITLES[name], "share": share, "amount": model.format(value)}
            shares.append(row)
    columns = [Column(title) for title in ("layer", "kind", "weight shape")]
    columns += [Column("weight bits", "d"), Column("activation bits"), Column("form"), Column("MACs", ",d")]
    columns += [Column(f"{COST_TITLES[name]} [{model.unit}]", ",.6g") for name, model in models.items()]
    return Table("Formats and costs of each layer", columns, rows), shares


# -- certificates -----------------------------------------------------------------------------------------------------


def certificate_section(record: RunRecord) -> Section:
    """Verdicts and statements about exported files."""
    if not record.certificates:
        text = "No exported file was verified yet: eqnet export SUBNET --target NAME, then eqnet verify FILE"
        return Section("Export", [text])
    section = Section("Export")
    for name, document in record.certificates.items():
        file = name.removesuffix(".certificate.json")
        facts = document.model_dump(include={"target", "runtime", "images", "split", "sha256"}, exclude_none=True)
        section.texts.append("; ".join([f"{file}: {document.verdict}", *(f"{k} {v}" for k, v in facts.items())]))
        rows = [[line.verdict, line.step, line.layer, line.text] for line in document.lines]
        columns = [Column(title) for title in ("verdict", "step", "layer", "statement")]
        section.tables.append(Table(f"Certificate of {file}", columns, rows, open=True))
    return section


# -- several runs -----------------------------------------------------------------------------------------------------


def comparison_section(records: Mapping[str, RunRecord]) -> Section:
    """Settings that differ, accuracies and found subnets of several runs side by side."""
    settings = [flatten_settings(record.settings.model_dump()) for record in records.values()]
    rows = [
        [key, *(_text(own.get(key)) for own in settings)]
        for key in settings[0]
        if len({_text(own.get(key)) for own in settings}) > 1
    ]
    differing = Table("Settings that differ", [Column("setting"), *map(Column, records)], rows, open=True)
    columns = [Column("run"), Column("config"), *(Column(f"{split} [%]", ".2f") for split in ("validation", "test"))]
    columns += [Column("weight bits", ".2f"), Column("activation bits", ".2f")]
    columns += [Column("size [KiB]", ",.1f"), Column("MBitOps", ",.2f")]
    found: list[list[Any]] = []
    for name, record in records.items():
        accuracy = {} if record.evaluation is None else record.evaluation.float_network
        if accuracy:
            found.append([name, "float", accuracy.get("validation"), accuracy.get("test"), None, None, None, None])
        for m in record.measured:
            if m.kind != "table":
                costs = [m.cost.get(key) for key in ("w", "a")]
                found.append(
                    [name, m.name, m.validation, m.test, *costs, m.cost["size"] / 1024, m.cost["bitops"] / 1e6]
                )
    texts = [] if rows else ["All settings are the same."]
    tables = [*([differing] if rows else []), Table("Measured configs", columns, found)]
    return Section("Side by side", texts, charts=_numbered(comparison_charts(records)), tables=tables)
