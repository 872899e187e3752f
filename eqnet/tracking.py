"""Where the figures of a run go: `metrics.jsonl` always, wandb if asked for; main process only.

wandb runs offline unless a key is at hand, never prompts, and a resumed run continues under the same id. Names are
`group/name`: the groups are the sections of a wandb workspace.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eqnet.checkpoint import atomic_write_text


def has_wandb_key() -> bool:
    """Whether wandb can reach an account: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


FINISH_SECONDS = 60.0  # at the end of a run that wandb cannot be reached from; what is not sent stays on disk
FINAL = ("test/", "stability/")  # figures of the end of training, which is to come after a checkpoint


class Tracker:
    """Logs figures, tables, histograms and images of one run.

    Args:
        folder: the run's folder.
        backend: "wandb" or "none".
        project: wandb project.
        config: settings shown in wandb.
        enabled: False on all but the main process; every method then does nothing.
    """

    def __init__(
        self, folder: Path, backend: str, project: str, config: Mapping[str, Any], enabled: bool = True
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self.last_step = max((row["step"] for row in self._rows()), default=0)
        self._wandb: Any = None
        if not enabled or backend == "none":
            return
        import wandb

        id_file = folder / "wandb_id.txt"
        given = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]  # the agent of a sweep gives one
        run_id = id_file.read_text().strip() if id_file.exists() else given
        atomic_write_text(id_file, run_id + "\n")
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        options = wandb.Settings(silent=True, console="off")
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            options.finish_timeout = FINISH_SECONDS

        def start(mode: str) -> Any:
            return wandb.init(
                project=project,
                id=run_id,
                name=folder.name,
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                dir=str(folder.resolve()),  # its service may run elsewhere
                config=dict(config),
                settings=options,
            )

        try:
            self._wandb = start(mode)
        except wandb.errors.CommError:
            print("wandb cannot be reached; these figures are kept offline, for `wandb sync`.", file=sys.stderr)
            wandb.teardown()  # of the attempt, which holds the id
            self._wandb = start("offline")
        self._wandb.define_metric("optimizer_step", hidden=True)
        self._wandb.define_metric("*", step_metric="optimizer_step")
        for accuracies in ("validation/*", "test/*"):
            self._wandb.define_metric(accuracies, step_metric="optimizer_step", summary="last,max")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Appends one row to `metrics.jsonl` and sends it to wandb."""
        if not self.enabled:
            return
        self.last_step = max(self.last_step, step)
        row = {"step": step, **{k: float(v) for k, v in figures.items()}}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if k != "step"} | {"optimizer_step": step})

    def rewind(self, step: int) -> None:
        """Drops rows after `step` and those of the end of training, so that a resumed run leaves no duplicates."""
        if self.enabled:
            rows = (row for row in self._rows() if row["step"] <= step)
            kept = [json.dumps(row) + "\n" for row in rows if not any(name.startswith(FINAL) for name in row)]
            atomic_write_text(self.folder / "metrics.jsonl", "".join(kept))
            self.last_step = step

    def _rows(self) -> list[dict[str, Any]]:
        """Complete rows of `metrics.jsonl`; a line cut short by a kill is skipped."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
        return rows

    def histograms(self, values: Mapping[str, Any], step: int) -> None:
        """Sends histograms of arrays (step sizes by quantizer) to wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Histogram(v) for name, v in values.items()} | {"optimizer_step": step})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sends a table to wandb."""
        if self._wandb is not None:
            import wandb

            self._send(name, wandb.Table(columns=list(columns), data=[list(row) for row in rows]))

    def scatter(self, name: str, title: str, axes: tuple[str, str], points: Sequence[tuple[float, float]]) -> None:
        """Sends a chart of points (x, y) to wandb; `axes` are the titles of x and y."""
        if self._wandb is not None:
            import wandb

            table = wandb.Table(columns=list(axes), data=[list(point) for point in points])
            self._send(name, wandb.plot.scatter(table, *axes, title=title))

    def lines(
        self, name: str, title: str, axes: tuple[str, str], series: Mapping[str, Sequence[tuple[float, float]]]
    ) -> None:
        """Sends a chart of lines to wandb, each a list of points (x, y) by its label; `axes` are the titles of x and y."""
        if self._wandb is not None:
            import wandb

            xs, ys = ([[point[i] for point in points] for points in series.values()] for i in (0, 1))
            chart = wandb.plot.line_series(xs, ys, keys=list(series), title=title, xname=axes[0], split_table=False)
            self._send(name, chart)

    def image(self, name: str, path: Path) -> None:
        """Sends a picture to wandb."""
        if self._wandb is not None:
            import wandb

            self._send(name, wandb.Image(str(path.resolve())))

    def _send(self, name: str, value: Any) -> None:
        self._wandb.log({name: value, "optimizer_step": self.last_step})

    def artifact(
        self,
        name: str,
        kind: str,
        files: Iterable[Path],
        *,
        facts: Mapping[str, Any] | None = None,
        made_from: Sequence[str] = (),
        copy: bool = True,
    ) -> None:
        """Keeps files in wandb as a version of an artifact of the run, with what they were made from.

        Offline they wait for `wandb sync`, and the lineage is in the metadata only: wandb cannot look up artifacts offline.

        Args:
            name: unique in the run; the run's id is added.
            kind: "model", "checkpoint", "table", "predictor", "subnet" or "export".
            files: what to keep; those that do not exist are left out.
            facts: metadata.
            made_from: names of artifacts of the run.
            copy: False for large files that will not change: wandb then reads them where they are.
        """
        if self._wandb is None:
            return
        import wandb

        sources = [self._artifact_name(source) for source in made_from]
        if not self._wandb.offline:
            for source in sources:
                self._use(source)
        artifact = wandb.Artifact(
            self._artifact_name(name), type=kind, metadata={**(facts or {}), "made_from": sources}
        )
        for path in files:
            if path.is_file():
                artifact.add_file(str(path.resolve()), name=path.name, policy="mutable" if copy else "immutable")
        self._wandb.log_artifact(artifact)

    def _artifact_name(self, name: str) -> str:
        return re.sub(r"[^\w.-]+", "-", f"{name}-{self._wandb.id}")

    def _use(self, source: str) -> None:
        """Records that this run reads an artifact; nothing if it is not there, as where tracking was off before."""
        import wandb

        try:
            self._wandb.use_artifact(f"{source}:latest")
        except (wandb.Error, ValueError):
            return

    def close(self) -> None:
        """Ends the wandb run."""
        if self._wandb is not None:
            self._wandb.finish()
