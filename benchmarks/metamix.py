"""MetaMix, EQ-Net search, integer programming and the best uniform config at the same BitOps budgets and epochs.

    python -m benchmarks.metamix configs/train/metamix_digits.yaml --output runs/metamix_benchmark --seeds 3 [--json FILE] [key=value ...]

Every method starts from the same float model and space and trains `select + act + train` epochs for each budget:

- metamix: its phases; the settings file gives their lengths.
- eqnet: a supernet for the epochs of selection and activations by its own recipe, a search in it, and the subnet for the
  epochs of weights.
- ilp: bits from the float model (Fisher score, no training), then the subnet for all epochs.
- uniform: the uniform config within the budget that costs most, for all epochs.

Budgets lie at given shares of the way from the smallest to the largest config. Prints accuracy in percent, cost reached against
asked, and wall time. Two studies follow: the bit-search with weights fixed (MetaMix) and not fixed, where each step also trains
the selected network; and the instability of BN inputs after bit-meta and after training at one bit-width, as a part of that
before. Finished runs are kept, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from benchmarks.tables import save, show, statistics
from eqnet.checkpoint import read_json, write_json
from eqnet.data import Batches, calibration_batches
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model, open_data
from eqnet.settings import Settings
from eqnet.space import COSTS, Budget, QuantConfig, QuantSpace
from eqnet.training.finetune import build_supernet, complete_settings
from eqnet.training.loop import make_accelerator
from eqnet.training.metamix import (
    BitSelection,
    bind_budget,
    bit_meta_step,
    bit_search_step,
    branch_configs,
    logit_optimizer,
    weights_searched,
    within_budget,
)
from eqnet.training.optimizer import SupernetAdamW, parameter_groups
from eqnet.training.stability import measure_stability
from eqnet.training.step import accumulate_gradients
from eqnet.training.trainer import export_facts

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("metamix", "eqnet", "ilp", "uniform", "not fixed")
GUIDED = ("lr", "step_size_lr", "teacher", "kurtosis", "skewness")  # of `train`: the same for every subnet


def command(script: str, note: Path, *arguments: str) -> float:
    """Runs a command unless `note` says that it ran; the seconds that it took."""
    if not note.exists():
        start, words = time.perf_counter(), [sys.executable, str(ROOT / script), *arguments]
        if script == "train.py" and (note.parent / "settings.yaml").exists():
            words.append("--resume")
        result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(words)} failed:\n{result.stderr}")
        write_json(note, {"seconds": time.perf_counter() - start})
    return float(read_json(note)["seconds"])


class Bench:
    """The runs of one seed below `folder`."""

    def __init__(self, folder: Path, arguments: list[str], seed: int) -> None:
        self.folder = folder
        self.arguments = [*arguments, f"seed={seed}", "tracking=none"]
        self.settings = complete_settings(self.arguments)
        m = self.settings.metamix
        self.first, self.last = m.select_epochs + m.act_epochs, self.settings.train.epochs
        # the float model, and a supernet that was only calibrated
        command("train.py", self.base / "seconds.json", *self.train(self.base, "train.epochs=0", "metamix.budget=null"))
        self.space: QuantSpace = Run.open(self.base).load_supernet()[0].space

    @property
    def base(self) -> Path:
        """The run of the float model."""
        return self.folder / "base"

    def train(self, output: Path, *changes: str) -> list[str]:
        """Arguments of `train.py` for a run of its own; the form of MetaMix is written out, as not every run has a budget."""
        form = ["space.symmetric=[true]", "space.granularity=[channel]"]
        weights = [] if output == self.base else [f"model.weights={self.base}", "pretrain.epochs=0"]
        return [*self.arguments, *form, *weights, f"output={output}", *changes]

    @property
    def subnets(self) -> list[str]:
        """How every subnet is trained: as MetaMix does it."""
        return [f"train.{name}={getattr(self.settings.train, name)}" for name in GUIDED]

    def budget(self, share: float) -> str:
        """A BitOps budget at a share of the way from the smallest to the largest config."""
        cost = COSTS["bitops"](self.space)
        low, high = cost.of(self.space.smallest()), cost.of(self.space.largest())
        return f"bitops={round(low + share * (high - low))}"

    def search(self, run: Path, budget: str, *options: str) -> tuple[Path, float]:
        """The subnet that `search.py` finds, and seconds."""
        stem = "-".join([str(Budget.parse(budget)).replace("=", ""), *[o for o in options if not o.startswith("--")]])
        arguments = ["--run", str(run), "--budget", budget, "tracking=none", *options]
        note = run / f"searched-{stem}.json"
        seconds = command("search.py", note, *arguments)
        (found, *_) = sorted((run / "search").glob(f"{stem}*/subnet.json"))
        return found, seconds

    def finetune(self, name: str, subnet: Path, epochs: int, supernet: Path | None = None) -> tuple[Path, float]:
        """Trains a subnet, from a supernet or from the float model."""
        output = self.folder / name
        if supernet is None:
            arguments = [*self.train(output, "metamix.budget=null"), f"subnet={subnet}"]
        else:
            arguments = [f"subnet={subnet}", f"supernet={supernet}", f"output={output}"]
        arguments += [*self.subnets, f"train.epochs={epochs}", "tracking=none"]
        return output, command("train.py", output / "seconds.json", *arguments)

    def uniform(self, budget: str) -> QuantConfig:
        """The uniform config within a budget that costs most."""
        cost, limit = COSTS["bitops"](self.space), float(budget.partition("=")[2])
        form = self.space.forms[0]
        configs = [self.space.uniform(w, form, a) for w, a in self.space.uniform_pairs(form)]
        return max((c for c in configs if cost.of(c) <= limit), key=cost.of)

    def run(self, method: str, share: float) -> dict[str, float]:
        """Trains one method within one budget."""
        budget, total = self.budget(share), self.first + self.last
        name = f"{method.replace(' ', '-')}-{budget.partition('=')[2]}"
        if method == "metamix":
            folder, seconds = self.folder / name, 0.0
            seconds += command("train.py", folder / "seconds.json", *self.train(folder, f"metamix.budget={budget}"))
        elif method == "eqnet":
            source = self.folder / "elastic"
            changes = [f"train.epochs={self.first}", "train.teacher=float", "metamix.budget=null"]
            seconds = command("train.py", source / "seconds.json", *self.train(source, *changes))
            subnet, searching = self.search(source, budget)
            folder, tuning = self.finetune(name, subnet, self.last, source)
            seconds += searching + tuning
        elif method == "ilp":
            subnet, searching = self.search(self.base, budget, "--method", "ilp", "--score", "fisher")
            folder, tuning = self.finetune(name, subnet, total)
            seconds = searching + tuning
        elif method == "uniform":
            subnet = self.folder / f"{name}.json"
            write_json(subnet, {"layers": self.uniform(budget).to_json()})
            folder, seconds = self.finetune(name, subnet, total)
        else:
            source = self.folder / f"{name}-selection"
            searching = select_without_fixing(self, budget, source)
            folder, tuning = self.finetune(
                name, source / "subnet.json", self.first - self.settings.metamix.select_epochs + self.last, source
            )
            seconds = searching + tuning
        document = read_json(folder / "subnet.json")
        limit = float(budget.partition("=")[2])
        return {
            **{split: document["accuracy"][split] for split in ("validation", "test")},
            "asked": limit,
            "reached": document["cost"]["bitops"],
            "seconds": seconds,
        }


# -- studies of the selection -----------------------------------------------------------------------------------------


class Selecting:
    """The selection of a run step by step, for what the product does not offer."""

    def __init__(self, bench: Bench, budget: str) -> None:
        self.settings: Settings = complete_settings([*bench.train(bench.folder / "none"), f"metamix.budget={budget}"])
        self.run, s = Run.unsaved(self.settings), self.settings
        self.accelerator: Accelerator = make_accelerator(s)
        device = self.accelerator.device
        self.data = open_data(Run.open(bench.base))
        model = create_float_model(s.model, self.data.num_classes, self.data.input_size[0]).to(device)
        self.teacher = create_float_model(s.model, self.data.num_classes, self.data.input_size[0]).to(device).eval()
        self.supernet: Supernet = build_supernet(self.run, model, self.data.input_size)
        space = self.supernet.space
        self.weights = nullcontext if weights_searched(space) else self.supernet.float_weights
        self.branches = branch_configs(space)
        (self.images,) = calibration_batches(self.data, 256, 256, s.seed, device)
        with self.weights():
            self.supernet.calibrate(self.images)
        self.bound = bind_budget(self.run, space)
        self.selection = BitSelection(space, self.bound, s.seed).to(device)
        d = self.data
        self.batches = Batches(
            d.train,
            s.data.batch_size,
            seed=s.seed,
            device=device,
            train=True,
            augment=s.data.augment,
            mean=d.mean,
            std=d.std,
        )

    def train(self, branches: Mapping[int, QuantConfig], search: bool) -> None:
        """The epochs of the selection on some branches; a search that does not fix the weights, or none."""
        s, t, net = self.settings, self.settings.train, self.supernet.train()
        groups = parameter_groups(
            net, net.step_sizes(), lr=t.lr, step_size_lr=t.step_size_lr, weight_decay=t.weight_decay
        )
        optimizer, logits = SupernetAdamW(groups), logit_optimizer(self.selection, s.metamix.logit_lr)
        criterion = nn.CrossEntropyLoss()
        total, done = s.metamix.select_epochs * len(self.batches), 0
        for epoch in range(s.metamix.select_epochs):
            for images, labels in self.batches.epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * 0.5 * (1 + np.cos(np.pi * done / total))
                done += 1
                with self.weights():
                    common = (self.accelerator, net, net, images, labels)
                    bit_meta_step(*common, branches, criterion, t, self.teacher)
                    optimizer.step()
                    optimizer.zero_grad()
                    if not search or epoch < s.metamix.warmup_epochs:
                        continue
                    bit_search_step(
                        *(self.accelerator, net, self.selection, logits, images, labels, criterion, t), self.teacher
                    )
                    selected = {"selected": net.space.decode(self.selection.genome)}
                    accumulate_gradients(*common, selected, criterion, t, self.teacher)
                    optimizer.step()
                    optimizer.zero_grad()

    def instability(self) -> float:
        """Of BN inputs over all branches."""
        with self.weights():
            return measure_stability(self.supernet, self.branches, self.images).instability


def select_without_fixing(bench: Bench, budget: str, folder: Path) -> float:
    """Selects bits while the bit-search also trains the weights; writes a run with the supernet and `subnet.json`."""
    done = folder / "subnet.json"
    if done.exists():
        return float(read_json(folder / "seconds.json")["seconds"])
    start, job = time.perf_counter(), Selecting(bench, budget)
    job.train(job.branches, search=True)
    genome = within_budget(job.selection.probabilities.detach().cpu().numpy(), job.bound, np.random.default_rng(0))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("settings.yaml", "split.json", "float.safetensors"):
        (folder / name).write_bytes((bench.base / name).read_bytes())
    if not weights_searched(job.supernet.space):
        job.supernet.calibrate_weights()
    Run(folder, job.settings).save_supernet(job.supernet, export_facts(job.data, folder))
    write_json(folder / "seconds.json", {"seconds": time.perf_counter() - start})
    write_json(done, {"layers": job.supernet.space.decode(genome).to_json()})
    return time.perf_counter() - start


def instabilities(bench: Bench) -> dict[str, float]:
    """Before training, after bit-meta, and after the same epochs at the largest of the bit-widths alone."""
    path = bench.folder / "instability.json"
    if not path.exists():
        found: dict[str, float] = {}
        for name, count in (("bit-meta", None), ("single bit-width", 1)):
            job = Selecting(bench, bench.budget(0.5))
            found["before"] = job.instability()
            kept = list(job.branches.items())[-count:] if count else list(job.branches.items())
            job.train(dict(kept), search=False)
            found[name] = job.instability()
        write_json(path, found)
    result: dict[str, float] = read_json(path)
    return result


def main() -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="a settings file of MetaMix, and key=value overrides")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.15, 0.3, 0.5], help="of the way to the largest config"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    stability: list[dict[str, float]] = []
    console = Console(width=140, highlight=False)
    for seed in range(arguments.seeds):
        bench = Bench(arguments.output / f"seed{seed}", arguments.settings, seed)
        for share in arguments.shares:
            for method in arguments.methods:
                results.setdefault(bench.budget(share), {}).setdefault(method, []).append(bench.run(method, share))
        stability.append(instabilities(bench))
        console.print(f"seed {seed} done")
    rows: dict[str, Any] = {
        budget: {
            method: {
                "test %": statistics([row["test"] for row in found]),
                "validation %": statistics([row["validation"] for row in found]),
                "reached / asked": statistics([row["reached"] / row["asked"] for row in found], ".3f"),
                "seconds": float(np.mean([row["seconds"] for row in found])),
            }
            for method, found in methods.items()
        }
        for budget, methods in results.items()
    }
    rows["instability of BN inputs, as a part of that before"] = {
        f"after {name}": {"ratio": statistics([s[name] / s["before"] for s in stability])}
        for name in stability[0]
        if name != "before"
    }
    show(console, f"{arguments.seeds} seeds", rows)
    if arguments.json:
        save(arguments.json, rows, settings=Path(arguments.settings[0]).name, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
