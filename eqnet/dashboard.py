"""What wandb shows of a run besides its figures: tables of configs, charts, artifacts with their lineage, and the saved view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eqnet.deploy.certificate import certificate_path
from eqnet.run import Run
from eqnet.run_files import CertificateFacts, read_facts
from eqnet.scoring.predictor import AccuracyPredictor
from eqnet.search import Found, ParetoFront
from eqnet.space import CostModel, QuantConfig, QuantSpace
from eqnet.space.cost import Costs
from eqnet.tracking import Tracker, has_wandb_key

VIEW = "eqnet"
EXPORTS = ("*.onnx", "*.pt2", "*.safetensors")


def track_training(tracker: Tracker, run: Run) -> None:
    """The trained networks and the newest checkpoint of a run as artifacts."""
    names = ("settings.yaml", "float.safetensors", "supernet.safetensors", "supernet.json", "evaluation.json")
    facts = {"model": run.settings.model.name, "data": run.settings.data.name, "seed": run.settings.seed}
    tracker.artifact("supernet", "model", [run.path / name for name in names], facts=facts, copy=False)
    checkpoint, _ = run.checkpoints.newest()
    if checkpoint is not None:
        facts = {"phase": checkpoint.phase, "step": checkpoint.step}
        tracker.artifact("checkpoint", "checkpoint", sorted(checkpoint.path.iterdir()), facts=facts, copy=False)


def track_predictor(tracker: Tracker, run: Run, predictor: AccuracyPredictor) -> None:
    """A fitted predictor: predicted against measured accuracy, itself and its table as artifacts."""
    assert predictor.held_out is not None
    points = list(zip(predictor.held_out.measured.tolist(), predictor.held_out.predicted.tolist(), strict=True))
    tracker.scatter("predictor/held_out", "Held-out configs", ("measured [%]", "predicted [%]"), points)
    tracker.artifact("table", "table", sorted((run.path / "table").iterdir()), made_from=["supernet"])
    files = [run.path / "predictor.safetensors"]
    tracker.artifact("predictor", "predictor", files, facts=predictor.metrics, made_from=["table"])


def track_search(
    tracker: Tracker,
    found: Found,
    tests: Mapping[QuantConfig, float],
    space: QuantSpace,
    costs: Costs,
    axis: CostModel,
) -> None:
    """Every config that a search measured as a table, the best as a table of layers, and the measured fronts as a chart.

    Args:
        tracker: of the run.
        found: what was measured.
        tests: accuracies on the test split in percent, of the configs that were measured there.
        space: what was searched.
        costs: columns of the table.
        axis: the cost of the chart.
    """
    models = [build(space) for build in costs.values()]
    rows, series = [], {}
    for kind, candidates in (("searched", found.searched), ("uniform", found.uniform)):
        for c in candidates:
            figures = [c.predicted, c.validation, tests.get(c.config), c.divergence]
            rows.append([kind, space.form_name(c.config), *figures, *(model.of(c.config) for model in models)])
        if candidates:
            series[kind] = _front([(axis.of(c.config), c.validation) for c in candidates])
    tracker.table("search/configs", ["kind", "form", "predicted", "validation", "test", "divergence", *costs], rows)
    tracker.lines("search/measured", "Best measured configs", (axis.name, "validation [%]"), series)
    bits = [[name, c.weight.bits, None if c.act is None else c.act.bits] for name, c in found.best.config.items()]
    tracker.table("search/subnet", ["layer", "weight bits", "activation bits"], bits)


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, score) that no cheaper one reaches, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def track_front(
    tracker: Tracker,
    front: ParetoFront,
    uniform: list[tuple[float, float]],
    chosen: tuple[float, float],
    axes: tuple[str, str],
) -> None:
    """A Pareto front as a table, and as a chart with the uniform configs and the chosen one.

    Args:
        tracker: of the run.
        front: the front.
        uniform: (cost, score) of the uniform configs.
        chosen: (cost, score) of the result.
        axes: titles of cost and score.
    """
    points = list(zip(front.costs.tolist(), front.scores.tolist(), strict=True))
    tracker.table("search/front", list(axes), points)
    series = {"front": points, "uniform": _front(uniform), "chosen": [chosen]}
    tracker.lines("search/front_chart", "Pareto front", axes, series)


def track_exports(tracker: Tracker, run: Run) -> list[Path]:
    """Exported files below `search/`, each with its description and certificate, as artifacts made from their subnets.

    Returns:
        The files.
    """
    folders = (run.path / "search").glob("*/")
    found = [p for f in folders for pattern in EXPORTS for p in f.glob(pattern) if p.name != "subnet.safetensors"]
    for path in sorted(found):
        certificate = read_facts(certificate_path(path), CertificateFacts)
        facts: dict[str, Any] = {} if certificate is None else certificate.model_dump(exclude={"lines"})
        files = [path, Path(f"{path}.json"), certificate_path(path)]
        source = f"subnet-{path.parent.name}"
        tracker.artifact(f"export-{path.parent.name}-{path.name}", "export", files, facts=facts, made_from=[source])
    return sorted(found)


# -- the saved view ---------------------------------------------------------------------------------------------------


def check_account() -> None:
    """Raises ValueError if no account of wandb can be reached, or the library for saved views is missing."""
    if not has_wandb_key():
        raise ValueError("a saved view lives in a wandb account and no key is set; run `wandb login` first.")
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ValueError("a saved view needs wandb-workspaces; pip install 'eqnet[dashboards]'.") from error


def build_view(entity: str, project: str) -> Any:
    """The workspace of wandb-workspaces for the runs of a project: losses, accuracies, predictor, search."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    step = "optimizer_step"

    def line(title: str, pattern: str, y: str, log: bool = False) -> Any:
        return panels.LinePlot(title=title, x=step, metric_regex=pattern, title_y=y, log_y=log)

    searched = [
        panels.ScatterPlot(
            title=f"Subnets: test accuracy against {title}",
            x=panels.SummaryMetric(f"search/{cost}"),
            y=panels.SummaryMetric("search/test"),
        )
        for cost, title in (("size", "bytes"), ("bitops", "BitOps"))
    ]
    sections = {
        "Accuracy": [
            line("Validation accuracy while training", r"validation/.*", "accuracy [%]"),
            panels.BarPlot(title="Test accuracy, mean over forms", metrics=[f"test/mean/{b}bit" for b in range(2, 9)]),
            panels.MediaBrowser(title="Uniform configs", media_keys=["evaluation/heat_map"]),
        ],
        "Search": [
            *searched,
            panels.MediaBrowser(title="Bits of each layer", media_keys=["search/bits"]),
            panels.MediaBrowser(title="Pareto front", media_keys=["search/pareto"]),
        ],
        "Predictor": [
            panels.ScalarChart(title="Kendall's tau", metric=panels.SummaryMetric("predictor/kendall")),
            panels.MediaBrowser(title="Predicted against measured", media_keys=["predictor/picture"]),
        ],
        "Training": [
            line("Task loss by role", r"supernet/task/.*", "cross entropy", log=True),
            line("Guidance by role", r"supernet/guidance/.*", "divergence", log=True),
            line("Weight distributions", r"supernet/(kurtosis|skewness)", "mean square", log=True),
            line("Float network", r"pretrain/task", "cross entropy", log=True),
            line("Learning rates", r".*/(lr|step_size_lr)", "learning rate", log=True),
        ],
    }
    shown = [workspaces.Section(name=name, panels=list(found), is_open=True) for name, found in sections.items()]
    return workspaces.Workspace(entity=entity, project=project, name=VIEW, sections=shown)


def save_view(project: str) -> str:
    """Saves the view in the account whose key is set; returns its address.

    Raises:
        ValueError: no key is set, a library is missing, or the account refuses.
    """
    check_account()
    import wandb

    try:
        entity = wandb.Api().default_entity
        if entity is None:
            raise ValueError("the account of this wandb key has no default entity; set one in its settings.")
        return str(build_view(entity, project).save().url)
    except (wandb.Error, OSError, RuntimeError) as error:
        raise ValueError(f"wandb did not save the view: {str(error).splitlines()[0]}") from error
