"""The commands `eqnet benchmark build | rank` and `eqnet proxies list | evolve`: tables of measured configs, and what ranks them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from eqnet.command import make_console, progress_bar, start_cpu_processes
from eqnet.space import Form, QuantSpace

if TYPE_CHECKING:  # these import torch
    from eqnet.scoring.layer_statistics import LayerStatistics
    from eqnet.scoring.mqbench import Benchmark, Correlation

proxies = typer.Typer(help="Training-free proxies: scores of configs from statistics of one network.")
TableFile = Annotated[Path, typer.Argument(metavar="FILE", help="a table of `eqnet benchmark build`")]
RIDGE = "ridge"  # a reference line, not a proxy: it has seen the accuracies of the search half


def add_benchmark_commands(benchmark: typer.Typer) -> None:
    """Puts `build` and `rank` beside the other measurements."""
    benchmark.command("build")(build_table)
    benchmark.command("rank")(rank_scores)


def build_table(
    output: Annotated[Path, typer.Option(help="the table to write, FILE.csv; an interrupted one is continued")],
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: the latest below runs/)")] = None,
    configs: Annotated[int, typer.Option(min=10, help="configs to measure")] = 425,
    bits: Annotated[str | None, typer.Option(help="weight bits, e.g. 2,3,4 (default: all of the run)")] = None,
    act_bits: Annotated[str | None, typer.Option(help="activation bits, e.g. 8 (default: all of the run)")] = None,
    form: Annotated[str | None, typer.Option(help="one form, e.g. channel-sym-sym (default: all of the run)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the configs and of the halves")] = 0,
    settings: Annotated[
        list[str] | None, typer.Argument(help="overrides of search.*, e.g. search.bn_images=64")
    ] = None,
) -> None:
    """Measures many configs of a run, and gathers the statistics of its layers.

    A run with train.epochs=0 gives accuracies after post-training quantization, a trained supernet its own. Writes FILE.csv,
    FILE.safetensors (statistics) and, while it works, FILE.rows. Processes of `accelerate launch` share the work.
    """
    from accelerate import Accelerator

    from eqnet.run import Run, open_data
    from eqnet.scoring.evaluation import Evaluator
    from eqnet.scoring.mqbench import build_benchmark
    from eqnet.search.exact import score_batches
    from eqnet.search.scope import search_settings

    if output.suffix != ".csv":
        raise ValueError(f"a table is a .csv file; got --output {output}.")
    if output.exists():
        raise ValueError(f"{output} exists already; give another --output.")
    opened = Run.open(run)
    chosen = search_settings(opened.settings, list(settings or []))
    supernet, _ = opened.load_supernet()
    space = restricted(supernet.space, bits, act_bits, form)
    output.parent.mkdir(parents=True, exist_ok=True)
    start_cpu_processes()
    accelerator, console = Accelerator(), make_console()
    data = open_data(opened)
    evaluator = Evaluator.from_data(supernet.to(accelerator.device), data, chosen, accelerator.device)
    facts = _facts(opened, data.fingerprint)
    with progress_bar(console, "benchmark", configs) as advance:
        benchmark = build_benchmark(
            evaluator, space, output.with_suffix(".rows"), configs, seed, facts, accelerator, advance
        )
    batches = score_batches(data, chosen, accelerator.device)
    statistics = _gathered(evaluator, space, batches, accelerator)
    if accelerator.is_main_process:
        statistics.save(output.with_suffix(".safetensors"))
        benchmark.save(output)
    low, high = benchmark.accuracy.min(), benchmark.accuracy.max()
    console.print(f"{len(benchmark)} configs, {low:.2f} to {high:.2f} % validation accuracy", highlight=False)
    console.print(f"saved {output} and {output.with_suffix('.safetensors')}", markup=False, soft_wrap=True)
    console.print(f"next: eqnet benchmark rank {output}", markup=False, soft_wrap=True)


def restricted(space: QuantSpace, bits: str | None, act_bits: str | None, form: str | None) -> QuantSpace:
    """What is left of a space with bit-widths such as "2,3,4", in one form. Fixed layers keep their bits.

    Raises:
        ValueError: not whole numbers, or nothing left of a layer.
    """
    allowed: dict[str, list[int] | None] = {}
    for slot, name, text in (("weight", "bits", bits), ("act", "act-bits", act_bits)):
        try:
            allowed[slot] = None if text is None else [int(word) for word in text.split(",")]
        except ValueError:
            raise ValueError(f"--{name} is a list of whole numbers, e.g. 2,3,4; got {text!r}.") from None
    left = space.restrict(
        lambda layer, slot, fmt: layer.name in space.fixed or allowed[slot] is None or fmt.bits in (allowed[slot] or [])
    )
    return left if form is None else left.restrict_form(Form.parse(form))


def _facts(run: Any, fingerprint: str) -> dict[str, Any]:
    """What the header of a table says about the run."""
    import hashlib

    from eqnet.run import versions

    with (run.path / "supernet.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    model, data = run.settings.model, run.settings.data
    return {
        "model": model.name,
        "weights_sha256": weights,
        "data": Path(data.name).name,
        "split": "validation",
        "data_fingerprint": fingerprint,
        "quantizer": "post-training" if run.settings.train.epochs == 0 else "trained supernet",
        "versions": versions(),
    }


def _gathered(evaluator: Any, space: QuantSpace, batches: Sequence[Any], accelerator: Any) -> LayerStatistics:
    from eqnet.scoring.layer_statistics import gather
    from eqnet.scoring.scores import SCORES

    supernet, console = evaluator.supernet, make_console()
    evaluator.recalibrate_float()
    with progress_bar(console, "statistics of the layers", len(SCORES) + 1) as advance:
        return gather(supernet, space, batches, accelerator, advance)


# -- rank -------------------------------------------------------------------------------------------------------------


def rank_scores(
    file: TableFile,
    score: Annotated[str | None, typer.Option(help="names and emq:FILE, comma-joined (default: all hand-made)")] = None,
    layers: Annotated[str | None, typer.Option(help="for a pickle of MQ-Bench-101: its layers, comma-joined")] = None,
    picture: Annotated[Path | None, typer.Option(help="scatter plots to write, FILE.png")] = None,
    json: Annotated[Path | None, typer.Option(help="figures to write")] = None,
) -> None:
    """Rank correlations of scores with measured accuracy on the held-out half, with 95 % intervals of a bootstrap.

    The score `ridge` is ridge regression on one-hot bits, fitted on the search half: what a sum over layers can reach.
    """
    from eqnet.checkpoint import write_json
    from eqnet.report import plot_ranks
    from eqnet.scoring.mqbench import rank

    for option, output in (("--json", json), ("--picture", picture)):
        if output is not None and output.exists():
            raise ValueError(f"{output} exists already; give another {option}.")
    benchmark, statistics = open_benchmark(file, layers)
    names = [*default_scores(), RIDGE] if score is None else score.split(",")
    found = {name: scored(name, benchmark, statistics) for name in names}
    held_out = ~benchmark.search
    accuracy = benchmark.accuracy[held_out]
    ranked = {name: rank(values[held_out], accuracy) for name, (values, _) in found.items()}
    names.sort(key=lambda name: -ranked[name][100]["spearman"].value)
    console = make_console()
    console.print(rank_table({n: ranked[n] for n in names}, {n: found[n][1] for n in names}, len(accuracy), file.name))
    if json is not None:
        write_json(json, {name: _figures(ranked[name], found[name][1]) for name in names})
    if picture is not None:
        titles = {n: f"{n}: {ranked[n][100]['spearman'].value:+.3f}" for n in names}
        plot_ranks({n: found[n][0][held_out] for n in names}, accuracy, titles, picture)
        console.print(f"saved {picture}", markup=False, soft_wrap=True)


def default_scores() -> list[str]:
    """All hand-made proxies."""
    from eqnet.scoring.proxies import PROXIES

    return list(PROXIES)


def open_benchmark(file: Path, layers: str | None = None) -> tuple[Benchmark, LayerStatistics]:
    """A table and the statistics beside it; a pickle of MQ-Bench-101 has none, which leaves `bit_sum` and `ridge`.

    Raises:
        ValueError: a file is missing or damaged, or layer names are missing.
    """
    from eqnet.scoring.layer_statistics import LayerStatistics
    from eqnet.scoring.mqbench import Benchmark
    from eqnet.scoring.mqbench101 import read_mqbench101

    if file.suffix != ".pkl":
        benchmark = Benchmark.load(file)
        return benchmark, LayerStatistics.load(file.with_suffix(".safetensors"), benchmark.space)
    if layers is None:
        raise ValueError(f"{file} names no layers; give them with --layers conv1,layer1.0.conv1,..., in its order.")
    benchmark = read_mqbench101(file, layers.split(","))
    return benchmark, LayerStatistics(benchmark.space, {}, {}, {})


def scored(name: str, benchmark: Benchmark, statistics: LayerStatistics) -> tuple[Any, float | None]:
    """Scores of all configs of a table, and the seconds that 1,000 configs take (None for the reference line)."""
    from eqnet.scoring.emq_trees import find_proxy
    from eqnet.scoring.mqbench import ridge_scores

    if name == RIDGE:
        return ridge_scores(benchmark), None
    proxy, many = find_proxy(name), benchmark.space.random_genomes(np.random.default_rng(0), 10_000)
    start = time.perf_counter()
    proxy.scores(statistics, many)
    seconds = (time.perf_counter() - start) / 10
    return proxy.scores(statistics, benchmark.genomes), seconds


def rank_table(
    ranked: dict[str, dict[int, dict[str, Correlation]]], seconds: dict[str, float | None], count: int, title: str
) -> Table:
    """One row per score: correlations on all held-out configs, and Spearman's on the best 50 and 20 %."""
    title = f"{title}: {count} held-out configs, 95 % intervals; top: Spearman of the best; s: per 1,000"
    table = Table(title=title, title_justify="left", padding=(0, 0))
    table.add_column("score", no_wrap=True, min_width=16)
    for column in ("Spearman", "Kendall", "Pearson", "top 50 %", "top 20 %", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, by_top in ranked.items():
        cells = [str(by_top[100][metric]) for metric in ("spearman", "kendall", "pearson")]
        cells += [f"{by_top[top]['spearman'].value:+.3f}" for top in (50, 20)]
        spent = seconds[name]
        shown = f"emq:{Path(name.removeprefix('emq:')).stem}" if name.startswith("emq:") else name
        table.add_row(Text(shown), *map(Text, cells), "" if spent is None else f"{spent:.1g}")
    return table


def _figures(by_top: dict[int, dict[str, Correlation]], seconds: float | None) -> dict[str, Any]:
    tops = {
        f"top {top} %": {metric: [c.value, c.low, c.high] for metric, c in found.items()}
        for top, found in by_top.items()
    }
    return {**tops, "seconds per 1000 configs": seconds}


# -- proxies ----------------------------------------------------------------------------------------------------------


@proxies.command("list")
def list_proxies() -> None:
    """The hand-made proxies."""
    from eqnet.scoring.proxies import PROXIES

    table = Table("proxy", "adds for every layer", title="scores are sums over layers, higher is better")
    for proxy in PROXIES.values():
        table.add_row(Text(proxy.name), Text(proxy.formula))
    make_console().print(table)


@proxies.command("evolve")
def evolve_proxies(
    file: TableFile,
    output: Annotated[Path, typer.Option(help="the proxy to write, FILE.json; an interrupted evolution is continued")],
    evaluations: Annotated[int, typer.Option(min=10, help="proxies to evaluate, for each seed")] = 1000,
    population: Annotated[int, typer.Option(min=4, help="proxies that live at a time")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="evolutions; the best of all wins")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="of the first evolution; the others count up")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="that share the seeds")] = 1,
    scores: Annotated[bool, typer.Option(help="additive scores (kl, fisher, ...) may be inputs")] = True,
    screening: Annotated[bool, typer.Option(help="compatibility screening")] = True,
    diversity: Annotated[bool, typer.Option(help="diversity-prompting selection")] = True,
    priority: Annotated[bool, typer.Option(help="operation sampling prioritisation")] = True,
) -> None:
    """Breeds a proxy on the search half of a table, and ranks it once on the held-out half.

    Writes FILE.json (use it as emq:FILE.json), FILE.png (its tree) and, while it works, FILE.evolution.
    """
    from dataclasses import asdict

    from eqnet.checkpoint import write_json
    from eqnet.report import plot_tree
    from eqnet.scoring.emq import EvolutionSettings, evolve_seeds
    from eqnet.scoring.mqbench import rank

    if output.suffix != ".json":
        raise ValueError(f"a proxy is a .json file; got --output {output}.")
    folder, picture = output.with_suffix(".evolution"), output.with_suffix(".png")
    for existing in (output, picture):
        if existing.exists() and not (existing == picture and folder.exists()):  # of an evolution that was killed
            raise ValueError(f"{existing} exists already; give another --output.")
    benchmark, statistics = open_benchmark(file)
    settings = EvolutionSettings(
        evaluations, population, screening=screening, diversity=diversity, priority=priority, scores=scores
    )
    console = make_console()
    start = time.perf_counter()
    with progress_bar(console, "evolution", evaluations * seeds) as advance:
        chosen = range(seed, seed + seeds)
        found = evolve_seeds(benchmark, statistics, settings, chosen, folder, processes, advance)
    seconds = time.perf_counter() - start
    members = [(number, run, i) for number, run in found.items() for i in range(len(run.population))]
    members.sort(key=lambda member: -member[1].population[member[2]].fitness)
    number, best, _ = members[0]
    proxy = best.proxy()
    genomes, accuracy = benchmark.half(search=False)
    held_out = rank(proxy.scores(statistics, genomes), accuracy)[100]
    hall = [{**run.proxy(i).to_json(), **run.population[i].to_json(), "seed": n} for n, run, i in members[:10]]
    runs = {
        n: {"evaluations": r.evaluations, "wasted": r.wasted, "rejected": r.rejected, "history": r.history}
        for n, r in found.items()
    }
    document = {
        **proxy.to_json(),
        "seed": number,
        "search half": {"spearman": abs(best.best.spearman), "configs": int(benchmark.search.sum())},
        "held-out half": {metric: [c.value, c.low, c.high] for metric, c in held_out.items()},
        "table": {"file": file.name, **{k: v for k, v in benchmark.header.items() if k in ("model", "weights_sha256")}},
        "settings": asdict(settings),
        "hall of fame": hall,
        "evolutions": runs,
    }
    parents = [-1] * len(proxy.tree)
    waiting: list[int] = []
    for i, node in enumerate(proxy.tree):
        parents[i] = waiting.pop() if i else -1
        waiting += [i] * node.arity
    plot_tree([node.name for node in proxy.tree], parents, picture)
    write_json(output, document)
    rejected = {reason: sum(r.rejected[reason] for r in found.values()) for reason in best.rejected}
    console.print(document["formula"], markup=False, soft_wrap=True)
    console.print("a sum over layers" if proxy.additive else "not a sum over layers")
    text = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    console.print(f"{evaluations * seeds} evaluations in {seconds:.0f} s; rejected unevaluated: {text}", soft_wrap=True)
    console.print(f"Spearman: search half {abs(best.best.spearman):.3f}, held-out half {held_out['spearman']}")
    console.print(f"saved {output}, {picture}", markup=False, soft_wrap=True)
