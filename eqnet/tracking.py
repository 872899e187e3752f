"""Where the figures of a run go: `metrics.jsonl` always, wandb if asked for; main process only.

wandb runs offline unless a key is at hand, never prompts, and a resumed run continues under the same id.
"""

from __future__ import annotations

import json
import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqnet.checkpoint import atomic_write_text


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
        run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
        atomic_write_text(id_file, run_id + "\n")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        self._wandb = wandb.init(
            project=project,
            id=run_id,
            name=folder.name,
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._wandb.define_metric("optimizer_step", hidden=True)
        self._wandb.define_metric("*", step_metric="optimizer_step")

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
        """Drops rows after `step`, so that a resumed run leaves no duplicates."""
        if self.enabled:
            kept = [json.dumps(row) + "\n" for row in self._rows() if row["step"] <= step]
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

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Sends a table to wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Table(columns=list(columns), data=rows)})

    def image(self, name: str, path: Path) -> None:
        """Sends a picture to wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))})

    def close(self) -> None:
        """Ends the wandb run."""
        if self._wandb is not None:
            self._wandb.finish()
