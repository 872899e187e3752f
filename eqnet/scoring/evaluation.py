"""Measured accuracy of configs, and the accuracy table that the predictor learns from.

Every config is measured with BN statistics recalibrated from scratch on the same training images (EQ-Net section 3.5) and
on images that trained nothing (the official code labels with images its supernet has seen). Processes take configs one by one
(`eqnet.scoring.work`); a row is one appended line, so a killed build loses at most the rows in flight.

Configs are ranked with integer kernels where the CPU has them (`eqnet.nn.integer_supernet`). With the same BN statistics
both paths give the same top-1 class on all but about one image in a thousand. Recalibration amplifies rounding: statistics
of low-bit networks differ by up to a few percent between any two implementations of the same convolutions, two
of floating point included, and accuracies by a few tenths of a percent. Therefore a table is measured by one path, and
accuracies on the test split are those of the simulation, whose statistics an extracted subnet carries.

Shape legend: `N` configs, `G` genes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor

from eqnet.checkpoint import read_object, write_json
from eqnet.data import Batches, Data, DataSplits, bn_batches, random_subset
from eqnet.lock import claimed
from eqnet.nn.integer import kernels_available
from eqnet.nn.integer_supernet import IntegerSupernet
from eqnet.nn.kernels import choose_kernels
from eqnet.nn.supernet import Supernet
from eqnet.scoring.work import Advance, shared
from eqnet.settings import Settings
from eqnet.space import Form, Genomes, MeanBitsSampler, QuantConfig, QuantSpace

LabelledBatches = Iterable[tuple[Tensor, Tensor]]
Integer = Literal["auto", "on", "off"]
REPORTED = "test"  # the split whose accuracies are reported
COMPILE_PAYS = 1e10  # quantized inputs on CPU from which compiling, 10 to 20 s, saves more than it costs


@torch.inference_mode()
def accuracy(model: Callable[[Tensor], Tensor], batches: LabelledBatches) -> float:
    """Top-1 accuracy in percent of a model in eval mode on (images [N, C, H, W], labels [N])."""
    hits: list[Tensor] = []
    for images, labels in batches:
        hits.append(model(images).argmax(1) == labels)
    if not hits:
        raise ValueError("there is no image to measure accuracy on.")
    right = torch.cat(hits)
    return 100.0 * int(right.sum()) / len(right)


class Evaluator:
    """Measures configs of one supernet.

    Args:
        supernet: in eval mode; its config and BN statistics change.
        bn_batches: training images that recalibrate BN, the same for every config.
        splits: labelled images by split name, e.g. {"validation": [(images, labels), ...]}; iterated anew for each config.
        integer: whether integer kernels run the configs; "auto": where this machine has them.

    Attributes:
        arithmetic: "integer" or "simulation", what runs the configs on all but the test split.
        known: accuracies in percent by split of configs that `measure_all` need not measure again.

    Raises:
        ValueError: a split is empty, or integer kernels are asked for where there are none.
    """

    def __init__(
        self,
        supernet: Supernet,
        bn_batches: Sequence[Tensor],
        splits: Mapping[str, LabelledBatches],
        integer: Integer = "auto",
    ) -> None:
        for name, batches in splits.items():
            if not _num_images(batches):
                raise ValueError(f"the {name} split is empty; nothing can be measured on it.")
        self.supernet, self.bn_batches, self.splits = supernet.eval(), bn_batches, splits
        on_cpu = all(p.device.type == "cpu" for p in supernet.parameters())
        wanted = integer == "on" or (integer == "auto" and on_cpu and kernels_available())
        self._integer = IntegerSupernet(supernet) if wanted else None
        self.known: dict[QuantConfig, dict[str, float]] = {}

    def of(self, supernet: Supernet) -> Evaluator:
        """An evaluator of another supernet of the same model, on the same images and in the same arithmetic."""
        integer: Integer = "off" if self._integer is None else "on"
        return Evaluator(supernet, self.bn_batches, self.splits, integer)

    @property
    def arithmetic(self) -> Literal["integer", "simulation"]:
        """What runs the configs on all but the test split."""
        return "simulation" if self._integer is None else "integer"

    @staticmethod
    def from_data(supernet: Supernet, data: DataSplits, settings: Settings, device: torch.device) -> Evaluator:
        """The evaluator of a run: its validation and test images, BN recalibrated as its settings say."""
        s, size = settings.search, settings.data.evaluation_batch_size

        def batches(split: Data, limit: int | None) -> Batches:
            kept = split if limit is None else random_subset(split, limit, settings.seed)
            return Batches(
                kept,
                size,
                seed=settings.seed,
                device=device,
                train=False,
                mean=data.mean,
                std=data.std,
                workers=settings.data.workers,
            )

        d = settings.data
        bn = bn_batches(data, s.bn_images, size, settings.seed, device, d.augment, d.workers)
        splits = {"validation": batches(data.validation, s.max_validation_images), "test": batches(data.test, None)}
        return Evaluator(supernet, bn, splits, s.integer)

    def compile_for(self, configs: int) -> None:
        """Compiles the quantizers if so many configs will be measured by simulation that it saves time; same values."""
        images = sum(len(b) for b in self.bn_batches) + _num_images(self.splits["validation"])
        values = sum(layer.act_numel for layer in self.supernet.space.layers) * images * configs
        device = next(self.supernet.parameters()).device
        if self._integer is None and (device.type != "cpu" or values >= COMPILE_PAYS):
            self.supernet.use_kernels(choose_kernels("auto", device))

    def recalibrate_float(self) -> None:
        """Gives the supernet the BN statistics of its floating-point network; its config stays."""
        config = self.supernet.config
        try:
            self.supernet.set_config(None)
            self.supernet.recalibrate_bn(self.bn_batches)
        finally:
            self.supernet.set_config(config)

    def measure(self, config: QuantConfig, *splits: str) -> list[float]:
        """Accuracy in percent of a config on each named split, BN recalibrated first.

        If the test split is among them, all are simulated, and the supernet keeps the BN statistics of what was measured.
        """
        self.supernet.set_config(config)
        if self._integer is None or REPORTED in splits:
            self.supernet.recalibrate_bn(self.bn_batches)
            return [accuracy(self.supernet, self.splits[s]) for s in splits]
        self._integer.recalibrate_bn(self.bn_batches)
        network = self._integer.freeze()
        return [accuracy(network, self.splits[s]) for s in splits]

    def measure_all(
        self,
        configs: Sequence[QuantConfig],
        splits: Sequence[str],
        accelerator: Accelerator,
        advance: Advance | None = None,
    ) -> NDArray[np.float64]:
        """Accuracies [N, len(splits)] in percent; free processes take the next config, all get everything."""
        known = [self.known.get(config, {}) for config in configs]
        out = np.array([[row.get(s, np.nan) for s in splits] for row in known]).reshape(len(configs), len(splits))
        missing = [i for i, row in enumerate(known) if not row.keys() >= set(splits)]
        for _ in range(len(configs) - len(missing)):
            if advance is not None:
                advance()
        units = shared(len(missing), accelerator, advance)
        mine = [(missing[unit], self.measure(configs[missing[unit]], *splits)) for unit in units]
        for i, values in gather_object(mine):
            out[i] = values
        return out

    def learn_uniform(self, rows: Sequence[UniformAccuracy]) -> None:
        """Takes over what `evaluate_uniform` measured of this supernet, on the same images.

        It measures all splits by simulation; where integer kernels measure, only its test accuracies are the same.
        """
        found = {(row.bits, row.form): row.accuracy for row in rows}
        same = {REPORTED} if self.arithmetic == "integer" else set(self.splits)
        for bits, form, config in uniform_configs(self.supernet.space):
            accuracies = found.get((bits, form), {})
            self.known[config] = {split: value for split, value in accuracies.items() if split in same}


def _num_images(batches: LabelledBatches) -> int:
    return len(batches.data) if isinstance(batches, Batches) else sum(len(labels) for _, labels in batches)


@dataclass(frozen=True)
class UniformAccuracy:
    """Accuracy in percent of one uniform config by split."""

    bits: int
    form: Form
    accuracy: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"bits": self.bits, "form": self.form.name, **self.accuracy}


def uniform_configs(space: QuantSpace) -> list[tuple[int, Form, QuantConfig]]:
    """(weight bits, form, config) of every uniform bit-width in every form of the space: 7 x 8 = 56 for the full space.

    See `QuantSpace.uniform_pairs` for spaces whose weights and activations have different bits.
    """
    pairs = [(form, weight, act) for form in space.forms for weight, act in space.uniform_pairs(form)]
    return [(weight, form, space.uniform(weight, form, act)) for form, weight, act in pairs]


def evaluate_uniform(
    evaluator: Evaluator, splits: Sequence[str], accelerator: Accelerator, advance: Advance | None = None
) -> list[UniformAccuracy]:
    """Measures every uniform config on the given splits."""
    points = uniform_configs(evaluator.supernet.space)
    measured = evaluator.measure_all([c for _, _, c in points], splits, accelerator, advance)
    return [
        UniformAccuracy(bits, form, dict(zip(splits, row.tolist(), strict=True)))
        for (bits, form, _), row in zip(points, measured, strict=True)
    ]


# -- the accuracy table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccuracyTable:
    """Configs as genomes int16 [N, G] of the training space, and their validation accuracy in percent float64 [N]."""

    genomes: Genomes
    accuracy: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.genomes)


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
    genomes = table_genomes(space, size, seed, accelerator)
    return AccuracyTable(genomes, measure_rows(evaluator, folder, space, genomes, {"seed": seed}, accelerator, advance))


def measure_rows(
    evaluator: Evaluator,
    folder: Path,
    space: QuantSpace,
    genomes: Genomes,
    facts: Mapping[str, Any],
    accelerator: Accelerator,
    advance: Advance | None = None,
) -> NDArray[np.float64]:
    """Validation accuracies [N] in percent of the rows of a table; measures those that `folder` lacks.

    Each process appends to its own `rows-<rank>.jsonl`; a later call may have another number of processes.

    Args:
        evaluator: measures.
        folder: of the header and the rows; made if it is missing.
        space: that of the genomes, the evaluator's or a restriction of it.
        genomes: int16 [N, G]; row `i` of a folder is always the same config, which `facts` must ensure.
        facts: what the rows are made of, besides the space and the images.
        accelerator: rows are shared by its processes.
        advance: called once per row, whichever process measures it.

    Raises:
        ValueError: the folder holds a table of other facts, of another space or measurement, or another command measures it.
    """
    header = {
        **facts,
        "bn_images": sum(len(b) for b in evaluator.bn_batches),
        "validation_images": _num_images(evaluator.splits["validation"]),
        "arithmetic": evaluator.arithmetic,
        "genes": [[gene.slot, *gene.layers, len(gene.formats)] for gene in space.genes],
    }
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    with claimed(folder):
        return _measure_missing(evaluator, folder, space, genomes, header, accelerator, advance)


def _measure_missing(
    evaluator: Evaluator,
    folder: Path,
    space: QuantSpace,
    genomes: Genomes,
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
    rows = dict(read_rows(folder)) if accelerator.is_main_process else {}
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
            (value,) = evaluator.measure(space.decode(genomes[i]), "validation")
            file.write(json.dumps({"index": i, "accuracy": value}) + "\n")
            file.flush()
            measured.append((i, value))
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


def read_rows(folder: Path) -> Iterator[tuple[int, float]]:
    """Complete rows of all processes; a line cut short by a kill is skipped and measured again."""
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                yield int(row["index"]), float(row["accuracy"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                continue
