"""What a run's folder says, read for a report: figures, accuracies, searches, certificates, distributions of weights.

Everything is optional but the settings: a run may be unfinished, unsearched or not exported. A file that is there but is not
what eqnet writes is a `ValueError` that names it.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqnet.checkpoint import load_tensors, read_json
from eqnet.nn.quantizer import ElasticQuantizer
from eqnet.run import Run
from eqnet.run_files import (
    CertificateFacts,
    Evaluation,
    SplitFacts,
    SubnetFacts,
    SupernetFacts,
    TableHeader,
    read_facts,
)
from eqnet.scoring.evaluation import uniform_configs
from eqnet.scoring.predictor import AccuracyPredictor, HeldOut
from eqnet.scoring.table import read_rows, table_genomes
from eqnet.search.scope import read_target_subnet
from eqnet.settings import Settings
from eqnet.space import COSTS, Genomes, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.space.target_cost import target_costs
from eqnet.training.losses import kurtosis, skewness


@dataclass(frozen=True)
class Measured:
    """One measured config.

    Attributes:
        kind: "table", "uniform" or "searched".
        name: bits and form, number of the row, or name of the search.
        validation: accuracy in percent.
        test: likewise; None where it was not measured.
        cost: by name, in the units of `eqnet.space.cost`.
        predicted: accuracy in percent of a uniform config by the predictor of the run, if it has one.
    """

    kind: str
    name: str
    validation: float
    test: float | None
    cost: dict[str, float]
    predicted: float | None = None


@dataclass(frozen=True)
class Search:
    """One found subnet.

    Attributes:
        name: of its folder; "subnet" for the one subnet of a run that trained it.
        facts: what `subnet.json` says.
        config: the subnet.
        space: what was searched: the space of the supernet, or what its target runs of it.
        costs: what the names of costs mean for it: those of its target, if it has one.
        front: rows of `pareto.csv`, numbers by column; empty without one.
    """

    name: str
    facts: SubnetFacts
    config: QuantConfig
    space: QuantSpace
    costs: Costs
    front: list[dict[str, float]]


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report of a run shows.

    Attributes:
        path: the folder.
        settings: of the run.
        header: of `supernet.json`; None until training is complete.
        space: of the supernet; None likewise.
        splits: number of images of each split.
        metrics: rows of `metrics.jsonl`.
        evaluation: of `evaluation.json`; None until it was written.
        measured: rows of the accuracy table, uniform configs and results of searches.
        held_out: predicted and measured accuracies that the predictor did not see.
        moments: {"layer", "when": "before" or "after", "kurtosis", "skewness"}, one for each layer and moment in time.
        steps: {"layer", "slot", "bits", "symmetry", "granularity", "step", "low", "high"}: median and range of the trained step
            sizes of each format.
        searches: by time.
        certificates: of exported files, by path within the run's folder.
        times: (what was finished, seconds since 1970), as the files say.
    """

    path: Path
    settings: Settings
    header: SupernetFacts | None
    space: QuantSpace | None
    splits: dict[str, int]
    metrics: list[dict[str, float]]
    evaluation: Evaluation | None
    measured: list[Measured]
    held_out: HeldOut | None
    moments: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    searches: list[Search]
    certificates: dict[str, CertificateFacts]
    times: list[tuple[str, float]]


def read_run(path: Path | None) -> RunRecord:
    """Reads the folder of a run; None is the latest below `runs/`.

    Raises:
        ValueError: it is not the folder of a run, or one of its files is damaged.
    """
    run = Run.open(path)
    folder = run.path
    header, space = read_facts(folder / "supernet.json", SupernetFacts), None
    if header is not None:
        with _reading(folder / "supernet.json"):
            space = QuantSpace.from_json(read_json(folder / "supernet.json")["space"])
    predictor = _read_predictor(folder / "predictor.safetensors", space)
    evaluation, splits = (
        read_facts(folder / "evaluation.json", Evaluation),
        read_facts(folder / "split.json", SplitFacts),
    )
    searches = [] if space is None else [_read_search(p, folder, space) for p in _subnet_files(run)]
    return RunRecord(
        path=folder,
        settings=run.settings,
        header=header,
        space=space,
        splits={} if splits is None else {name: len(images) for name, images in splits.indices.items()},
        metrics=read_metrics(folder / "metrics.jsonl"),
        evaluation=evaluation,
        measured=[] if space is None else _measured(folder, space, evaluation, predictor, searches),
        held_out=None if predictor is None else predictor.held_out,
        moments=[] if space is None else _moments(folder, space),
        steps=[] if space is None else _step_sizes(folder / "supernet.safetensors", space),
        searches=searches,
        certificates=_read_certificates(folder),
        times=_times(folder),
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`: finite numbers only, with their step; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append({key: value for key, value in row.items() if _is_number(value)})
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is wrong with the content of a file becomes a ValueError that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        text = problem if str(path) in problem else f"{path} is not what eqnet writes: {problem}"
        raise ValueError(f"{text}.") from error


def _subnet_files(run: Run) -> list[Path]:
    """Subnets of searches, oldest first; of a run that trained one subnet, that one."""
    found = [run.path / "subnet.json"] if run.settings.one_subnet else []
    searches = (run.path / "search").glob("*/subnet.json")
    return [p for p in [*found, *sorted(searches, key=lambda p: (p.stat().st_mtime, p))] if p.is_file()]


def _read_search(path: Path, run: Path, space: QuantSpace) -> Search:
    config, target = read_target_subnet(path, space)
    facts, costs = read_facts(path, SubnetFacts), target_costs(target)
    assert facts is not None
    name = "subnet" if path.parent == run else path.parent.name
    front = path.with_name("pareto.csv")
    rows = []
    with _reading(front):
        for row in csv.DictReader(front.read_text().splitlines()) if front.is_file() else []:
            first = next(iter(row))
            rows.append({key: float(row[key]) for key in (first, *costs)})
    return Search(name, facts, config, space if target is None else target.restrict(space), costs, rows)


def _measured(
    folder: Path,
    space: QuantSpace,
    evaluation: Evaluation | None,
    predictor: AccuracyPredictor | None,
    searches: Sequence[Search],
) -> list[Measured]:
    found = []
    genomes, accuracies = _read_table(folder / "table", space)
    for i, (accuracy, cost) in enumerate(zip(accuracies, _costs(space, genomes), strict=True)):
        found.append(Measured("table", f"row {i} of the table", accuracy, None, cost))
    configs = {(bits, form.name): config for bits, form, config in uniform_configs(space)}
    rows = [] if evaluation is None else [u for u in evaluation.uniform if (u.bits, u.form) in configs]
    uniform = space.encode_all([configs[u.bits, u.form] for u in rows])
    predicted = [None] * len(rows) if predictor is None else predictor.score(uniform).tolist()
    for u, cost, value in zip(rows, _costs(space, uniform), predicted, strict=True):
        found.append(Measured("uniform", f"{u.bits} bit, {u.form}", u.validation, u.test, cost, value))
    for search in searches:
        known = search.facts.accuracy
        if "validation" in known:
            (own,) = _costs(space, space.encode_all([search.config]))
            found.append(Measured("searched", search.name, known["validation"], known.get("test"), own))
    return found


def _costs(space: QuantSpace, genomes: Genomes) -> list[dict[str, float]]:
    has_acts = any(gene.slot == "act" for gene in space.genes)
    columns = {name: build(space)(genomes) for name, build in COSTS.items() if name != "a" or has_acts}
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(len(genomes))]


def _read_table(folder: Path, space: QuantSpace) -> tuple[Genomes, list[float]]:
    """The measured rows of an accuracy table up to the first that is missing; none if it is of another space."""
    header = read_facts(folder / "header.json", TableHeader)
    genes = [[gene.slot, *gene.layers, len(gene.formats)] for gene in space.genes]
    if header is None or header.genes != genes:
        return space.encode_all([]), []
    rows = dict(read_rows(folder))
    size = next(i for i in range(len(rows) + 1) if i not in rows)
    genomes = table_genomes(space, size, header.seed) if size else space.encode_all([])
    return genomes, [rows[i][0] for i in range(size)]


def _read_predictor(path: Path, space: QuantSpace | None) -> AccuracyPredictor | None:
    if space is None or not path.is_file():
        return None
    with _reading(path):
        return AccuracyPredictor.load(path, space)


def _moments(folder: Path, space: QuantSpace) -> list[dict[str, Any]]:
    rows = []
    for when, name in (("before", "float.safetensors"), ("after", "supernet.safetensors")):
        path = folder / name
        tensors = load_tensors(path) if path.is_file() else {}
        with _reading(path):
            for layer in space.layers if tensors else ():
                weight = tensors[f"{layer.name}.weight"]
                figures = {"kurtosis": float(kurtosis(weight)), "skewness": float(skewness(weight))}
                rows.append({"layer": layer.name, "when": when, **figures})
    return rows


def _step_sizes(path: Path, space: QuantSpace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tensors = load_tensors(path) if path.is_file() else {}
    with _reading(path):
        for layer in space.layers if tensors else ():
            weights = ElasticQuantizer(
                space.choices(layer.name, "weight"), layer.channels, layer.channel_axis, len(layer.weight_shape)
            )
            rows += _steps_of(layer.name, "weights", weights, tensors[f"{layer.name}.weight_quantizer.scale"])
            formats = space.choices(layer.name, "act")
            if formats:
                scale = tensors[f"{layer.name}.act_quantizer.scale"]
                rows += _steps_of(layer.name, "activations", ElasticQuantizer(formats), scale)
    return rows


def _steps_of(layer: str, slot: str, quantizer: ElasticQuantizer, scale: Tensor) -> list[dict[str, Any]]:
    rows = []
    for fmt, index in zip(quantizer.formats, quantizer.index, strict=True):
        sizes: NDArray[Any] = torch.abs(scale[index]).double().numpy()
        rows.append(
            {
                "layer": layer,
                "slot": slot,
                "bits": fmt.bits,
                "symmetry": "symmetric" if fmt.symmetric else "asymmetric",
                "granularity": f"per {fmt.granularity}",
                "step": float(np.median(sizes)),
                "low": float(sizes.min()),
                "high": float(sizes.max()),
            }
        )
    return rows


def _read_certificates(folder: Path) -> dict[str, CertificateFacts]:
    paths = [*folder.glob("*.certificate.json"), *folder.glob("search/*/*.certificate.json")]
    found = {str(p.relative_to(folder)): read_facts(p, CertificateFacts) for p in sorted(paths)}
    return {name: document for name, document in found.items() if document is not None}


def _times(folder: Path) -> list[tuple[str, float]]:
    """When the steps of a run wrote their files."""
    files = {
        "started": "settings.yaml",
        "float network": "float.safetensors",
        "supernet": "supernet.safetensors",
        "evaluation": "evaluation.json",
        "predictor": "predictor.safetensors",
    }
    times = [(what, (folder / name).stat().st_mtime) for what, name in files.items() if (folder / name).is_file()]
    times += [(f"search {p.parent.name}", p.stat().st_mtime) for p in folder.glob("search/*/subnet.json")]
    return sorted(times, key=lambda time: time[1])
