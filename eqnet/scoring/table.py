"""The accuracy table: what the predictor learns from.

Configs with mean bits spread over the whole range, measured on the validation split. A row is one appended line, so a killed
build loses at most the rows in flight. Both paths of an `Evaluator` give slightly different figures, so a table is measured by one.

Shape legend: `N` configs, `G` genes, `F` figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from eqnet.checkpoint import read_object, write_json
from eqnet.lock import claimed
from eqnet.scoring.evaluation import DIVERGENCE, VALIDATION, Evaluator, Integer, num_images
from eqnet.scoring.work import Advance, shared
from eqnet.settings import Measure
from eqnet.space import Genomes, MeanBitsSampler, QuantSpace

KEYS = {VALIDATION: "accuracy", DIVERGENCE: "divergence"}  # figures of a row by their names in its file


@dataclass(frozen=True)
class AccuracyTable:
    """Configs as genomes int16 [N, G] of the training space, with figures of the validation split, float64 [N].

    Attributes:
        genomes: the configs.
        accuracy: in percent.
        divergence: from the largest subnet, in nats.
    """

    genomes: Genomes
    accuracy: NDArray[np.float64]
    divergence: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.genomes)

    def joined(self, other: AccuracyTable) -> AccuracyTable:
        """The rows of this table, then those of another."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return AccuracyTable(*(np.concatenate(pair) for pair in pairs))

    def labels(self, measure: Measure) -> NDArray[np.float64]:
        """What a predictor learns, in percent [N]: the accuracies, or those that the divergences let expect."""
        return self.accuracy if measure == "accuracy" else expected_accuracy(self.divergence, self.accuracy)


def expected_accuracy(divergence: NDArray[np.float64], accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracies in percent as a falling function of the divergences, fitted to those measured; both float64 [N].

    It is a sum of a constant and of `exp(-divergence / scale)` for some scales, with weights that are not negative (least squares).
    Configs keep the order of their divergences; the chance in their accuracies is averaged out.
    """
    import scipy.optimize  # takes as long to import as half of torch

    scales = np.geomspace(1e-2, 1e2, 13) * max(float(np.median(divergence)), 1e-9)
    falls = 1 - np.exp(-divergence[:, None] / scales)
    weights, _ = scipy.optimize.nnls(np.column_stack([np.ones(len(falls)), -falls]), accuracy)
    # the last term orders configs where accuracies do not show it
    expected: NDArray[np.float64] = weights[0] - falls @ weights[1:] - 0.01 * divergence / divergence.max(initial=1e-9)
    return expected


def table_genomes(space: QuantSpace, size: int, seed: int, accelerator: Accelerator | None = None) -> Genomes:
    """The configs of a table, int16 [size, G]: mean bits spread over the whole range, forms mixed (EQ-Net section 3.4).

    Row `i` depends on (seed, i) only, so a larger table begins with the rows of a smaller one.

    Args:
        space: of the configs.
        size: number of rows.
        seed: of the rows.
        accelerator: its processes draw a share each, and all get everything.
    """
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    sampler, genomes = MeanBitsSampler(space), np.empty((size, space.num_genes), np.int16)
    for i in range(rank, size, world):
        genomes[i] = sampler.sample(np.random.default_rng((seed, 1, i)), 1)[0]
    if world > 1:
        for start, share in enumerate(gather_object([genomes[rank::world]])):
            genomes[start::world] = share
    return genomes


def build_table(
    evaluator: Evaluator, folder: Path, size: int, seed: int, accelerator: Accelerator, advance: Advance | None = None
) -> AccuracyTable:
    """Measures the rows that `folder` lacks and returns the table of `size` rows of the supernet's space.

    A later call with more rows measures only what is missing.

    Raises:
        ValueError: the folder holds a table of another seed, space or measurement.
    """
    space = evaluator.supernet.space
    genomes, figures = table_genomes(space, size, seed, accelerator), (VALIDATION, DIVERGENCE)
    rows = measure_rows(evaluator, folder, space, genomes, figures, {"seed": seed}, accelerator, advance)
    return AccuracyTable(genomes, *rows.T)


def like_table(folder: Path, integer: Integer) -> Integer:
    """The choice `integer` of arithmetic; "auto" becomes "off" if the table in `folder` was measured by simulation."""
    header = folder / "header.json"
    if integer != "auto" or not header.exists():
        return integer
    return "off" if read_object(header).get("arithmetic", "simulation") == "simulation" else "auto"


def measure_rows(
    evaluator: Evaluator,
    folder: Path,
    space: QuantSpace,
    genomes: Genomes,
    figures: Sequence[str],
    facts: Mapping[str, Any],
    accelerator: Accelerator,
    advance: Advance | None = None,
) -> NDArray[np.float64]:
    """Figures [N, F] of the rows of a table; measures those that `folder` lacks.

    Each process appends to its own `rows-<rank>.jsonl`; a later call may have another number of processes.

    Args:
        evaluator: measures.
        folder: of the header and the rows; made if it is missing.
        space: that of the genomes, the evaluator's or a restriction of it.
        genomes: int16 [N, G]; row `i` of a folder is always the same config, which `facts` must ensure.
        figures: of the validation split, as for `Evaluator.measure`; a row that lacks one is measured again.
        facts: what the rows are made of, besides the space and the images.
        accelerator: rows are shared by its processes.
        advance: called once per row, whichever process measures it.

    Raises:
        ValueError: the folder holds a table of other facts, of another space or measurement, or another command measures it.
    """
    header = {
        **facts,
        "bn_images": sum(len(b) for b in evaluator.bn_batches),
        "validation_images": num_images(evaluator.splits["validation"]),
        "arithmetic": evaluator.arithmetic,
        "genes": [[gene.slot, *gene.layers, len(gene.formats)] for gene in space.genes],
    }
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    with claimed(folder):
        return _measure_missing(evaluator, folder, space, genomes, figures, header, accelerator, advance)


def _measure_missing(
    evaluator: Evaluator,
    folder: Path,
    space: QuantSpace,
    genomes: Genomes,
    figures: Sequence[str],
    header: Mapping[str, Any],
    accelerator: Accelerator,
    advance: Advance | None,
) -> NDArray[np.float64]:
    """`measure_rows` in a folder that no other command works in."""
    if accelerator.is_main_process and not (folder / "header.json").exists():
        write_json(folder / "header.json", header)
    accelerator.wait_for_everyone()
    _check_header({"arithmetic": "simulation", **read_object(folder / "header.json")}, header, folder)
    # one process reads what is there: a network file system may show the others an older state
    rows = dict(read_rows(folder, figures)) if accelerator.is_main_process else {}
    missing = [[i for i in range(len(genomes)) if i not in rows]]
    broadcast_object_list(missing)
    for _ in range(len(genomes) - len(missing[0])):
        if advance is not None:
            advance()
    measured = []
    with (folder / f"rows-{accelerator.process_index}.jsonl").open("a") as file:
        if file.tell():
            file.write("\n")  # ends a line that a kill cut short
        for unit in shared(len(missing[0]), accelerator, advance):
            i = missing[0][unit]
            values = evaluator.measure(space.decode(genomes[i]), *figures)
            row = {KEYS[name]: value for name, value in zip(figures, values, strict=True)}
            file.write(json.dumps({"index": i, **row}) + "\n")
            file.flush()
            measured.append((i, values))
    everything = [rows | dict(gather_object(measured))]
    broadcast_object_list(everything)
    return np.array([everything[0][i] for i in range(len(genomes))])


def _check_header(stored: Mapping[str, Any], header: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError if the rows of a folder were measured otherwise."""
    if stored == header:
        return
    arithmetic = stored["arithmetic"]
    if stored == {**header, "arithmetic": arithmetic}:
        raise ValueError(
            f"{folder} was measured by {arithmetic} and this search measures by {header['arithmetic']}; set "
            f"search.integer={'on' if arithmetic == 'integer' else 'off'} to use it, or move it away."
        )
    raise ValueError(
        f"{folder} holds a table measured otherwise (seed, space or images); move it away to build a new one."
    )


def read_rows(folder: Path, figures: Sequence[str] = (VALIDATION,)) -> Iterator[tuple[int, list[float]]]:
    """Complete rows of all processes, as index and figures; a line cut short by a kill is skipped and measured again."""
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                yield int(row["index"]), [float(row[KEYS[name]]) for name in figures]
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                continue
