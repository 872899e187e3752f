"""What one search looks at: the part of the training space that a target and a form leave, and what costs mean there.

One supernet, one accuracy table and one predictor serve all targets. Only the scope differs: a target restricts the space and
counts costs in its containers, and accuracies are measured on the supernet specialized to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eqnet.checkpoint import read_json
from eqnet.settings import Settings, load_settings
from eqnet.space import Budget, Form, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.space.hardware import HardwareTarget
from eqnet.space.latency import read_latency_table
from eqnet.space.target_cost import target_costs
from eqnet.subnet import read_subnet


@dataclass(frozen=True)
class Scope:
    """A restriction of the training space and the costs of its configs.

    Attributes:
        space: what is searched.
        costs: by name of a budget's limit; "latency" only where a table was read.
        target: None for the training space as it is.
        latency_table: the file that latencies are from.
    """

    space: QuantSpace
    costs: Costs
    target: HardwareTarget | None = None
    latency_table: Path | None = None

    def describe(self) -> str:
        """What is left, e.g. 'tensorrt: weights of 2-8, activations of 8 bits; forms tensor-sym-sym, channel-sym-sym'."""

        def bits(slot: str) -> str:
            found = {fmt.bits for gene in self.space.genes if gene.slot == slot for fmt in gene.formats}
            return f"{min(found)}-{max(found)}" if len(found) > 1 else f"{max(found)}" if found else "no"

        name = "the training space" if self.target is None else self.target.name
        forms = ", ".join(form.name for form in self.space.forms) or "none shared by all layers"
        text = f"{name}: weights of {bits('weight')}, activations of {bits('act')} bits; forms {forms}"
        return text if self.latency_table is None else f"{text}; latency from {self.latency_table}"


def open_scope(
    training: QuantSpace,
    run: Path,
    *,
    budget: Budget | None = None,
    target: HardwareTarget | None = None,
    form: str | None = None,
    latency_table: str | None = None,
) -> Scope:
    """The scope that a command asks for.

    Args:
        training: the space of the supernet.
        run: folder of the run, where tables of measured latency are looked for: `latency/<target>.json`.
        budget: a limit on latency needs a table.
        target: the hardware target.
        form: name of the only form to search.
        latency_table: a table's file; None means that of the run if the budget limits latency.

    Raises:
        ValueError: nothing is left of a layer (which, and by which rule or limit); a latency budget without a table; an unreadable table,
            or one that lacks a format of the space.
    """
    space = training if target is None else target.restrict(training)
    if form is not None:
        try:
            space = space.restrict_form(Form.parse(form))
        except ValueError as error:
            where = "the space" if target is None else f"what {target.name} runs of the space"
            raise ValueError(f"the form {form} is not part of {where}: {error}") from error
    if budget is not None:
        space = budget.restrict(
            space, None if target is None else lambda la, fmt: target.container_bits(la, "act", fmt)
        )
    path = _latency_path(run, budget, target, latency_table)
    table = None if path is None else read_latency_table(path)
    return Scope(space, target_costs(target, table), target, path)


def _latency_path(
    run: Path, budget: Budget | None, target: HardwareTarget | None, latency_table: str | None
) -> Path | None:
    if latency_table is not None:
        return Path(latency_table)
    limited = budget is not None and any(name == "latency" for name, _ in budget.limits)
    if not limited:
        return None
    if target is None:
        raise ValueError(
            f"budget {budget}: latency depends on the device; name it with --target, or give a table with --latency-table."
        )
    path = run / "latency" / f"{target.name}.json"
    if not path.is_file():
        raise ValueError(
            f"budget {budget}: there is no latency table {path}; measure one with `eqnet benchmark latency --target "
            f"{target.name} --run {run}`, or give another with --latency-table."
        )
    return path


def search_settings(base: Settings, overrides: list[str]) -> Settings:
    """Settings of the run with overrides; only those that do not touch training may change.

    Raises:
        ValueError: an override of model, data, space or training.
    """
    settings = load_settings(overrides, base.model_dump())
    for section in ("model", "data", "space", "pretrain", "train", "output"):
        if getattr(settings, section) != getattr(base, section):
            raise ValueError(
                f"{section} belongs to the trained run and cannot change in a search; set search.*, seed or tracking."
            )
    return settings


def target_header(target: HardwareTarget | None) -> dict[str, Any]:
    """What a subnet's file states about its target: the name and, so that it needs no other file, every rule."""
    if target is None:
        return {"target": None}
    return {"target": target.name, "target_rules": target.model_dump(mode="json")}


def read_target_subnet(
    path: str | Path, training: QuantSpace, target: HardwareTarget | None = None
) -> tuple[QuantConfig, HardwareTarget | None]:
    """The config of a `subnet.json`, and the target that it is meant for.

    Args:
        path: the file.
        training: the space of the supernet.
        target: the target; None means the one stored with the subnet, if any.

    Raises:
        ValueError: the file is missing or damaged, its layers and formats are not those of the space, or the target does not
            run it (layer, rule, what it would run).
    """
    config, rules = read_subnet(path, training), read_json(path).get("target_rules")
    if target is None and rules is not None:
        try:
            target = HardwareTarget.model_validate_json(json.dumps(rules))
        except ValidationError as error:
            raise ValueError(f"{path}: target_rules are not the rules of a target; name one with --target.") from error
    problems = [] if target is None else target.check(config, training.layers)
    if problems:
        others = f" (and {len(problems) - 1} more; `eqnet targets check` lists all)" if len(problems) > 1 else ""
        raise ValueError(f"{path}: {problems[0]}{others}")
    return config, target
