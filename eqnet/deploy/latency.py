"""Measured latency: the tables of `eqnet.space.latency`, from the real runtime.

What the time of a layer depends on was found by measuring: not on the bits of its codes, but on whether its weights have zero
points, and whether its input codes are clipped because they are narrower than their container (`HardwareTarget.timed`).
Each such class of formats of every layer is measured where it will run: in the exported network, between its neighbours. In
a few calibration configs every layer takes each of its classes once, at random places, so that n classes need n exported
networks and not one for each layer. The runtime's own profiler times the nodes; what belongs to a layer has its name
(`graph.py`): quantizers, clips and dequantizers included. Layers of one shape share their mean. What a whole network takes
besides its layers is the overhead, the mean over the calibration configs.

Times add up only as far as neighbours do not matter, so the sums are checked against whole networks of random configs.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from eqnet.checkpoint import read_json, write_json
from eqnet.deploy.export import export_onnx
from eqnet.deploy.runtime import ORT_SUFFIX, Runtime, compile_openvino, installed_version, runtime_of
from eqnet.deploy.trace import LOWEST_OPSET, trace_graph
from eqnet.nn.specialize import specialize
from eqnet.nn.supernet import Supernet
from eqnet.space import LayerInfo, QuantConfig, QuantFormat, QuantSpace
from eqnet.space.hardware import HardwareTarget
from eqnet.space.latency import Key, LatencyTable, LayerShape, latency_cost, read_latency_table

REPLICATES = 2  # networks in which every layer takes a class
ROUNDS, WARM_UP = 30, 5
PROGRESS_SCHEMA = "eqnet latency progress 1"
Class = tuple[bool, bool]  # of a format: symmetric weights; clipped activations


@dataclass(frozen=True)
class Additivity:
    """Sums of a table beside whole networks of random configs.

    Attributes:
        predicted: milliseconds, one for each config.
        measured: milliseconds.
        noise: mean relative difference between two halves of the measurements.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    noise: float

    @property
    def spearman(self) -> float:
        """Rank correlation; nan if all values are equal."""
        constant = min(map(len, map(set, (self.predicted, self.measured)))) == 1
        return math.nan if constant else float(spearmanr(self.predicted, self.measured).statistic)

    @property
    def mean_error(self) -> float:
        """Mean of |predicted - measured| / measured."""
        return statistics.fmean(abs(p - m) / m for p, m in zip(self.predicted, self.measured, strict=True))

    @property
    def spread(self) -> float:
        """Slowest config / fastest config - 1, as measured."""
        return max(self.measured) / min(self.measured) - 1

    def describe(self) -> str:
        """The check in words."""
        text = (
            f"sums against {len(self.measured)} networks of random configs: Spearman {self.spearman:.3f}, "
            f"mean error {100 * self.mean_error:.1f} %; latencies spread by {100 * self.spread:.1f} %, "
            f"noise {100 * self.noise:.1f} %"
        )
        return text + "; the spread is within the noise, so ranks say nothing" * (self.spread < 2 * self.noise)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; a correlation that is undefined is null."""
        rank = self.spearman if math.isfinite(self.spearman) else None
        return {
            "configs": len(self.measured),
            "spearman": rank,
            "mean_error": self.mean_error,
            "spread": self.spread,
            "noise": self.noise,
            "predicted_ms": list(self.predicted),
            "measured_ms": list(self.measured),
        }


def measure_latency(
    supernet: Supernet,
    target: HardwareTarget,
    input_size: Sequence[int],
    path: str | Path,
    *,
    configs: int = 5,
    rounds: int = ROUNDS,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> tuple[LatencyTable, Additivity]:
    """Measures the table of a supernet on a target that runs on this machine, and checks it.

    Every measured network is kept in `<path>.progress.json`, so a killed measurement continues. A finished file is read
    and not measured again.

    Args:
        supernet: calibrated.
        target: its runtime must be installed.
        input_size: `(C, H, W)` of one image.
        path: the `.json` file to write.
        configs: random configs to check the sums with, at least 2.
        rounds: runs of each network; the lower quartile counts.
        threads: of the runtime.
        seed: of the configs.
        progress: called after each of `count_networks` networks.

    Raises:
        ValueError: the target does not run here; the file was measured with other facts (which); the supernet has nothing
            that the target runs.
    """
    path = Path(path)
    runtime = runtime_of(target)
    if runtime is None or runtime.name not in _PROFILERS:
        raise ValueError(
            f"{target.name} does not run on this machine; import a table measured on it with --latency-table."
        )
    if configs < 2:
        raise ValueError(f"at least 2 configs are needed to check a latency table; got {configs}.")
    facts = {
        "target": target.name,
        "runtime": f"{runtime.name} {installed_version(runtime.name)}",
        "cpu": _cpu(),
        "threads": str(threads),
        "input_size": "x".join(map(str, input_size)),
    }
    if path.exists():
        return _read_finished(path, facts)
    supernet = specialize(supernet, target)
    space, partial = supernet.space, path.with_name(f"{path.name}.progress.json")
    plan = calibration_configs(space, target, seed)
    checks = random_configs(space, target, configs, seed)
    samples = _read_progress(partial, facts, seed, plan)
    build = _Exporter(supernet, target, runtime, input_size, threads)
    for number, config in enumerate(plan):
        if number >= len(samples):
            samples.append(build.sample(config, rounds))
            state = {"schema": PROGRESS_SCHEMA, "facts": facts, "seed": seed, "samples": samples}
            write_json(partial, {**state, "configs": [c.to_json() for c in plan]})
        progress()
    entries = _entries(space, target, plan, samples)
    whole, noise = build.time([*plan, *checks], rounds, progress)
    facts["date"] = date.today().isoformat()
    table = _calibrated(space, target, entries, plan, whole[: len(plan)], facts)
    cost = latency_cost(space, table, target)
    additivity = Additivity(tuple(cost.of(config) for config in checks), tuple(whole[len(plan) :]), noise)
    write_json(path, {**table.to_json(), "additivity": additivity.to_json()})
    partial.unlink()
    return table, additivity


def count_networks(supernet: Supernet, target: HardwareTarget, configs: int, seed: int = 0) -> int:
    """How many networks `measure_latency` exports."""
    space = target.restrict(supernet.space)
    return 2 * len(calibration_configs(space, target, seed)) + configs


# -- configs ----------------------------------------------------------------------------------------------------------


def calibration_configs(space: QuantSpace, target: HardwareTarget, seed: int = 0) -> list[QuantConfig]:
    """Configs in which every layer takes each class of its formats `REPLICATES` times, neighbours at random."""
    rng = np.random.default_rng((seed, 0))
    classes = [_classes(space, target, group) for group in space.groups]
    count = max(map(len, classes))
    genomes = []
    for _ in range(REPLICATES):
        orders = [rng.permutation(len(found)) for found in classes]
        for number in range(count):
            taken = [order[number % len(order)] for order in orders]
            genomes.append(_genome(space, classes, taken, rng))
    return [space.decode(genome) for genome in genomes]


def random_configs(space: QuantSpace, target: HardwareTarget, count: int, seed: int = 0) -> list[QuantConfig]:
    """Configs whose latencies spread: the shares of the classes are drawn first, then the class of every layer.

    Drawing every layer evenly would give about the same latency to all.
    """
    rng = np.random.default_rng((seed, 1))
    classes = [_classes(space, target, group) for group in space.groups]
    names = sorted({name for found in classes for name in found})
    configs = []
    for _ in range(count):
        share = dict(zip(names, rng.dirichlet(np.ones(len(names))), strict=True))
        taken = []
        for found in classes:
            weights = np.array([share[name] for name in found])
            taken.append(rng.choice(len(found), p=weights / weights.sum()))
        configs.append(space.decode(_genome(space, classes, taken, rng)))
    return configs


Choices = dict[Class, list[dict[int, int]]]  # by class, the alleles of the genes of a group that belong to it


def _classes(space: QuantSpace, target: HardwareTarget, group: Sequence[str]) -> Choices:
    """The classes of formats of a tied group, and the pairs of alleles that make them."""
    layer = space.info(group[0])
    weight_gene = space.gene_of[layer.name, "weight"]
    act_gene = next((space.gene_of[n, "act"] for n in group if (n, "act") in space.gene_of), None)
    reader = next((space.info(n) for n in group if (n, "act") in space.gene_of), layer)
    acts = (None,) if act_gene is None else space.genes[act_gene].formats
    found: Choices = {}
    for (w, weight), (a, act) in itertools.product(enumerate(space.genes[weight_gene].formats), enumerate(acts)):
        alleles = {weight_gene: w} if act_gene is None else {weight_gene: w, act_gene: a}
        found.setdefault(_class(target, reader, weight, act), []).append(alleles)
    return found


def _class(target: HardwareTarget, layer: LayerInfo, weight: QuantFormat, act: QuantFormat | None) -> Class:
    clipped = act is not None and target.timed(layer, "act", act) != target.executed(layer, "act", act)
    return weight.symmetric, clipped


def _genome(
    space: QuantSpace, classes: Sequence[Choices], taken: Sequence[Any], rng: np.random.Generator
) -> NDArray[Any]:
    """A genome with the given class in every group; the formats of a class are drawn."""
    genome = space.encode(space.largest()).copy()
    for found, number in zip(classes, taken, strict=True):
        alternatives = list(found.values())[int(number)]
        for gene, allele in alternatives[rng.integers(len(alternatives))].items():
            genome[gene] = allele
    return genome


# -- measuring --------------------------------------------------------------------------------------------------------


class _Exporter:
    """Exports configs and runs them."""

    def __init__(
        self, supernet: Supernet, target: HardwareTarget, runtime: Runtime, input_size: Sequence[int], threads: int
    ) -> None:
        self.supernet, self.target, self.runtime, self.threads = supernet, target, runtime, threads
        self.input_size = tuple(input_size)
        self._traced: Any = None  # the networks of all configs differ in their integers only
        self.images = torch.randn(1, *self.input_size, generator=torch.Generator().manual_seed(0))

    def export(self, config: QuantConfig) -> Any:
        """The `onnx.ModelProto` of a config."""
        import onnx

        subnet, layers = self.supernet.extract(config), self.supernet.space.layers
        if self._traced is None:
            opset = max(LOWEST_OPSET, self.target.opset or 0)  # both runtimes store codes in int8
            self._traced = trace_graph(subnet, self.input_size, opset, batch=1)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "subnet.onnx"
            export_onnx(
                subnet,
                config,
                layers,
                self.target,
                file,
                input_size=self.input_size,
                images=[self.images],
                batch=1,
                traced=self._traced,
            )
            return onnx.load(file)

    def call(self, model: Any) -> Callable[[], object]:
        """Runs a network on one image."""
        session, image = self.runtime.load(model, threads=self.threads), self.images.numpy()
        return lambda: session.run(image)

    def sample(self, config: QuantConfig, rounds: int) -> dict[str, float]:
        """Milliseconds of what belongs to each layer, by its name."""
        nodes = _PROFILERS[self.runtime.name](self.export(config), self.images.numpy(), rounds, self.threads)
        layers: dict[str, float] = defaultdict(float)
        for names, ms in nodes:
            owner = _owner(names, self.supernet.space.layers)
            if owner is not None:
                layers[owner] += ms
        return dict(layers)

    def time(
        self, configs: Sequence[QuantConfig], rounds: int, advance: Callable[[], None]
    ) -> tuple[list[float], float]:
        """Milliseconds of whole networks, and how far two halves of the measurements differ, relatively."""
        calls = {}
        for number, config in enumerate(configs):
            calls[str(number)] = self.call(self.export(config))
            advance()
        times = list(time_in_turns(calls, rounds, self.threads).values())
        halves = [(_typical(values[::2]), _typical(values[1::2])) for values in times]
        return [_typical(values) for values in times], statistics.fmean(abs(a - b) / max(a, b) for a, b in halves)


def _owner(names: Sequence[str], layers: Sequence[LayerInfo]) -> str | None:
    """The layer that a node belongs to, by the names of what was fused into it: that of its product, else of anything."""
    known = {layer.name for layer in layers}
    stems = [ORT_SUFFIX.sub("", name) for name in names]
    exact = (stem.split("#")[0] for stem in stems)
    around = (stem.split("/")[0].split("#")[0] for stem in stems)
    return next((name for name in itertools.chain(exact, around) if name in known), None)


def _profile_onnxruntime(model: Any, image: NDArray[Any], rounds: int, threads: int) -> list[tuple[list[str], float]]:
    """Typical milliseconds of every node of the optimized graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level, options.enable_profiling = 4, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: image}
        for _ in range(WARM_UP + rounds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1000)
    return [([name], _typical(values[WARM_UP:])) for name, values in times.items()]


def _profile_openvino(model: Any, image: NDArray[Any], rounds: int, threads: int) -> list[tuple[list[str], float]]:
    """Typical milliseconds of every node of the runtime's graph."""
    compiled = compile_openvino(model, threads, PERF_COUNT=True)
    originals = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        value: Any = op.get_rt_info()["originalLayersNames"]
        originals[op.get_friendly_name()] = str(value.astype(str) if hasattr(value, "astype") else value).split(",")
    request, times = compiled.create_infer_request(), defaultdict(list)
    for _ in range(WARM_UP + rounds):
        request.infer([image])
        for info in request.get_profiling_info():
            times[info.node_name].append(info.real_time.total_seconds() * 1000)
    typical = {name: _typical(values[WARM_UP:]) for name, values in times.items()}
    return [
        ([part.removesuffix("_original").removesuffix("/WithoutBiases") for part in originals.get(name, [name])], ms)
        for name, ms in typical.items()
    ]


_PROFILERS = {"onnxruntime": _profile_onnxruntime, "openvino": _profile_openvino}


def time_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, threads: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns so that all meet the same disturbances; each turn first warms the caches up.

    On one thread the processor time of this process counts: that is the latency on an idle machine, whatever else runs.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + rounds):
        for name, call in calls.items():
            call()
            start = clock()
            call()
            if i >= WARM_UP:
                times[name].append(1000 * (clock() - start))
    return times


def _typical(times: Sequence[float]) -> float:
    """The lower quartile, the median of the faster half: other work on the machine only ever adds time."""
    return float(np.quantile(times, 0.25))


# -- the table --------------------------------------------------------------------------------------------------------


def _entries(
    space: QuantSpace,
    target: HardwareTarget,
    plan: Sequence[QuantConfig],
    samples: Sequence[Mapping[str, float]],
) -> dict[Key, float]:
    """Means by shape and class, written for every format of the class that a lookup may ask for."""
    times: dict[tuple[LayerShape, Class], list[float]] = defaultdict(list)
    for config, sample in zip(plan, samples, strict=True):
        for layer in space.layers:
            if layer.name in sample:
                chosen = config[layer.name]
                key = LayerShape.of(layer), _class(target, layer, chosen.weight, chosen.act)
                times[key].append(sample[layer.name])
    entries: dict[Key, float] = {}
    for layer in space.layers:
        shape, acts = LayerShape.of(layer), space.choices(layer.name, "act") or (None,)
        for weight, act in itertools.product(space.choices(layer.name, "weight"), acts):
            found = times.get((shape, _class(target, layer, weight, act)))
            if found and layer.macs:
                listed = None if act is None else target.timed(layer, "act", act)
                entries[shape, target.executed(layer, "weight", weight), listed] = max(statistics.fmean(found), 1e-6)
    return entries


def _calibrated(
    space: QuantSpace,
    target: HardwareTarget,
    entries: Mapping[Key, float],
    plan: Sequence[QuantConfig],
    whole: Sequence[float],
    facts: Mapping[str, str],
) -> LatencyTable:
    """Adds the overhead; where sums exceed the whole, because profiling takes time itself, entries shrink instead."""
    sums = latency_cost(space, LatencyTable(entries), target)
    rest = statistics.fmean(whole) - statistics.fmean(sums.of(config) for config in plan)
    if rest >= 0:
        return LatencyTable(entries, rest, facts)
    factor = statistics.fmean(whole) / statistics.fmean(sums.of(config) for config in plan)
    return LatencyTable({key: factor * ms for key, ms in entries.items()}, 0.0, facts)


# -- files ------------------------------------------------------------------------------------------------------------


def _read_finished(path: Path, facts: Mapping[str, str]) -> tuple[LatencyTable, Additivity]:
    table, check = read_latency_table(path), read_json(path).get("additivity")
    _same_facts(path, table.facts, facts)
    if not isinstance(check, Mapping):
        raise ValueError(f"{path} has no check of its sums; remove it to measure again.")
    return table, Additivity(tuple(check["predicted_ms"]), tuple(check["measured_ms"]), check["noise"])


def _read_progress(
    path: Path, facts: Mapping[str, str], seed: int, plan: Sequence[QuantConfig]
) -> list[dict[str, Any]]:
    """What an interrupted measurement has finished."""
    if not path.exists():
        return []
    state: Any = read_json(path)
    if not isinstance(state, dict) or state.get("schema") != PROGRESS_SCHEMA:
        raise ValueError(f"{path} is not the progress of a latency measurement; remove it.")
    _same_facts(path, state["facts"], facts)
    if state["seed"] != seed or state["configs"] != [config.to_json() for config in plan]:
        raise ValueError(f"{path} belongs to another space or seed; remove it to measure again.")
    samples: list[dict[str, float]] = state["samples"]
    return samples


def _same_facts(path: Path, found: Mapping[str, str], facts: Mapping[str, str]) -> None:
    for name, value in facts.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} was measured with {name} {found.get(name)}, here it is {value}; remove it to measure again."
            )


def _cpu() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
