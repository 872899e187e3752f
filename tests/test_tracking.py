"""Figures of a run: rows in metrics.jsonl, and what wandb stores offline, read back from its files."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import FAST, TINY
from conftest import ROOT, Eqnet
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from eqnet.checkpoint import write_json
from eqnet.dashboard import build_view
from eqnet.settings import load_settings
from eqnet.tracking import Tracker

HEADER = b":W&B"
BLOCK = 32 * 1024  # a .wandb file is a LevelDB log: blocks of records, each with checksum, length and type


@pytest.fixture(autouse=True)
def _stranger(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a wandb key and without wandb settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))


def quiet(folder: Path, enabled: bool = True) -> Tracker:
    return Tracker(folder, "none", "eqnet", {}, enabled)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records(path: Path) -> list[Record]:
    """All records of a .wandb file; wandb's service completes it a moment after the run is closed."""
    deadline = time.monotonic() + 60
    while not (found := complete_records(path)) or not found[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return found


def complete_records(path: Path) -> list[Record]:
    """The records that are in a .wandb file now."""
    data, found, parts = path.read_bytes(), [], []
    assert HEADER.startswith(data[:4])  # it may be empty at first
    position = 7  # after magic and version
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # padding at the end of a block
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind in (1, 2, 3, 4)  # whole, first, middle, last
        if position + 7 + length > len(data):
            break
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def history(stored: list[Record]) -> dict[str, list[Any]]:
    """Logged values by name, in order; media as the dicts that describe them."""
    values: dict[str, list[Any]] = {}
    for record in stored:
        row: dict[str, Any] = {}
        for item in record.history.item:
            name, *parts = [item.key] if item.key else item.nested_key
            if parts:
                row.setdefault(name, {})[".".join(parts)] = json.loads(item.value_json)
            else:
                row[name] = json.loads(item.value_json)
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return values


def offline_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def contents(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*"))


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_every_call_of_log_is_one_row(tmp_path: Path) -> None:
    tracker = quiet(tmp_path)
    tracker.log({"train/loss": np.float32(0.5), "train/lr": 1}, 10)
    tracker.log({"train/loss": 0.25}, 20)
    tracker.close()
    assert rows(tmp_path) == [{"step": 10, "train/loss": 0.5, "train/lr": 1.0}, {"step": 20, "train/loss": 0.25}]
    assert tracker.last_step == 20
    assert contents(tmp_path) == [Path("metrics.jsonl")]


def test_rewinding_leaves_no_duplicates_and_drops_a_cut_line(tmp_path: Path) -> None:
    before = quiet(tmp_path)
    for step in (1, 2, 3, 4):
        before.log({"loss": step / 10}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    after = quiet(tmp_path)
    assert after.last_step == 4
    after.rewind(2)
    assert after.last_step == 2
    assert rows(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    for step in (3, 4, 5):
        after.log({"loss": step / 10}, step)
    assert rows(tmp_path) == [{"step": step, "loss": step / 10} for step in (1, 2, 3, 4, 5)]


def test_rewinding_before_the_first_row_starts_anew(tmp_path: Path) -> None:
    first = quiet(tmp_path)
    first.log({"loss": 0.1}, 1)
    again = quiet(tmp_path)
    again.rewind(0)
    again.log({"loss": 0.1}, 1)
    assert rows(tmp_path) == [{"step": 1, "loss": 0.1}]


def test_a_later_command_goes_on_at_the_last_step(tmp_path: Path) -> None:
    quiet(tmp_path).log({"loss": 0.1}, 70)
    search = quiet(tmp_path)
    search.log({"search/test": 90.0}, search.last_step)
    assert rows(tmp_path)[-1] == {"step": 70, "search/test": 90.0}


@pytest.mark.parametrize("backend", ["none", "wandb"])
def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path, backend: str) -> None:
    tracker = Tracker(tmp_path, backend, "eqnet", {}, enabled=False)
    tracker.log({"loss": 0.1}, 1)
    tracker.rewind(0)
    tracker.histograms({"step_size/conv1": np.arange(4.0)}, 1)
    tracker.table("uniform", ["bits"], [[2]])
    tracker.image("evaluation", tmp_path / "missing.png")
    tracker.scatter("predictor/held_out", "held out", ("x", "y"), [(1.0, 2.0)])
    tracker.lines("search/front", "front", ("x", "y"), {"front": [(1.0, 2.0)]})
    tracker.artifact("supernet", "model", [tmp_path / "missing"])
    tracker.close()
    assert contents(tmp_path) == []


def test_without_wandb_it_is_not_even_imported(tmp_path: Path) -> None:
    script = """
import sys
import time
from pathlib import Path
from eqnet.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), "none", "eqnet", {})
tracker.log({"loss": 0.1}, 1)
tracker.histograms({"step_size/conv1": [1.0]}, 1)
tracker.table("uniform", ["bits"], [[2]])
tracker.image("evaluation", Path("missing.png"))
tracker.close()
print("wandb" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"


# -- wandb ------------------------------------------------------------------------------------------------------------


def test_wandb_offline_stores_everything_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("wandb asked a question")

    monkeypatch.setattr("builtins.input", refuse)
    folder = tmp_path / "digits"
    folder.mkdir()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(folder / "evaluation.png")
    tracker = Tracker(folder, "wandb", "eqnet-tests", {"seed": 3, "model": {"name": "cifar_resnet20"}})
    for step in (10, 20):
        tracker.log({"supernet/task/largest": 1 / step, "supernet/lr": 0.001}, step)
    tracker.histograms({"step_size/conv1.weight": np.array([0.0, 0.0, 0.0, 1.0])}, 20)
    tracker.table("uniform", ["form", "bits", "test"], [["tensor-sym-sym", 2, 91.5], ["tensor-sym-sym", 8, 97.0]])
    tracker.image("evaluation", folder / "evaluation.png")
    tracker.close()
    assert capfd.readouterr().out == ""
    assert [row["step"] for row in rows(folder)] == [10, 20]

    (run_folder,) = offline_folders(folder)
    run_id = (folder / "wandb_id.txt").read_text().strip()
    stored = records(run_folder / f"run-{run_id}.wandb")
    (run,) = [r.run for r in stored if r.HasField("run")]
    assert (run.run_id, run.project, run.display_name) == (run_id, "eqnet-tests", "digits")
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["seed"] == 3
    assert config["model"] == {"name": "cifar_resnet20"}

    values = history(stored)
    assert values["supernet/task/largest"] == [0.1, 0.05]
    assert values["optimizer_step"] == [10, 20, 20, 20, 20]
    (histogram,) = values["step_size/conv1.weight"]
    assert histogram["_type"] == "histogram"
    assert (histogram["values"][0], histogram["values"][-1]) == (3, 1)
    (stored_table,) = values["uniform"]
    assert stored_table["_type"] == "table-file"
    table = json.loads((run_folder / "files" / stored_table["path"]).read_text())
    assert table["columns"] == ["form", "bits", "test"]
    assert table["data"] == [["tensor-sym-sym", 2, 91.5], ["tensor-sym-sym", 8, 97.0]]
    (stored_image,) = values["evaluation"]
    assert stored_image["_type"] == "image-file"
    picture = Image.open(run_folder / "files" / stored_image["path"]).convert("RGB")
    assert picture.size == (8, 6)
    assert picture.getpixel((0, 0)) == (200, 30, 30)


def artifacts(stored: list[Record]) -> dict[str, Any]:
    """Artifacts that were logged by kind and name; those that wandb makes of tables are left out."""
    found = [r.artifact for r in stored if r.HasField("artifact") and r.artifact.type != "run_table"]
    return {artifact.name: artifact for artifact in found}


def chart(stored: list[Record], name: str) -> dict[str, Any]:
    """The settings of a custom chart."""
    for record in stored:
        for update in record.config.update:
            if list(update.nested_key) == ["_wandb", "visualize", name]:
                return json.loads(update.value_json)
    raise AssertionError(f"no chart {name}")


def shown(panel: Any, logged: set[str]) -> bool:
    """Whether a panel of a saved view finds something among the logged names."""
    from wandb_workspaces.reports import v2 as panels

    match panel:
        case panels.MediaBrowser():
            return set(panel.media_keys) <= logged
        case panels.LinePlot():
            return panel.x == "optimizer_step" and any(re.fullmatch(panel.metric_regex, name) for name in logged)
        case panels.ScatterPlot():
            return {panel.x.name, panel.y.name} <= logged
        case panels.BarPlot():
            return bool({metric.name if hasattr(metric, "name") else metric for metric in panel.metrics} & logged)
    return panel.metric.name in logged


def test_charts_and_artifacts_wait_offline(tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"w" * 100)
    tracker = Tracker(tmp_path, "wandb", "eqnet-tests", {})
    tracker.scatter("predictor/held_out", "Held out", ("measured [%]", "predicted [%]"), [(90.0, 89.5), (92.0, 93.0)])
    tracker.lines(
        "search/front", "Front", ("bitops", "predicted [%]"), {"front": [(1.0, 90.0)], "chosen": [(1.0, 91.0)]}
    )
    tracker.artifact("supernet", "model", [weights, tmp_path / "missing"], facts={"seed": 3}, copy=False)
    tracker.artifact("subnet-w=4", "subnet", [weights], made_from=["supernet"])
    tracker.close()
    (folder,) = offline_folders(tmp_path)
    stored = records(next(folder.glob("*.wandb")))
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    kept = artifacts(stored)
    assert {name: a.type for name, a in kept.items()} == {
        f"supernet-{run_id}": "model",
        f"subnet-w-4-{run_id}": "subnet",
    }
    assert json.loads(kept[f"supernet-{run_id}"].metadata) == {"seed": 3, "made_from": []}
    assert json.loads(kept[f"subnet-w-4-{run_id}"].metadata) == {"made_from": [f"supernet-{run_id}"]}
    (entry,) = kept[f"supernet-{run_id}"].manifest.contents
    assert (entry.path, entry.size) == ("weights.bin", 100)
    panel = chart(stored, "predictor/held_out")["panel_config"]
    assert panel["panelDefId"] == "wandb/scatter/v0"
    assert panel["fieldSettings"] == {"x": "measured [%]", "y": "predicted [%]"}
    assert chart(stored, "search/front")["panel_config"]["panelDefId"] == "wandb/lineseries/v0"
    (table,) = history(stored)["search/front_table"]
    assert {row[1] for row in json.loads((folder / "files" / table["path"]).read_text())["data"]} == {"front", "chosen"}


def test_the_agent_of_a_sweep_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "given123")
    Tracker(tmp_path, "wandb", "eqnet-tests", {}).close()
    assert (tmp_path / "wandb_id.txt").read_text() == "given123\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb_workspaces is written for an older pydantic
def test_a_run_and_its_search_are_all_in_wandb(call, eqnet: Eqnet, tmp_path: Path) -> None:
    code, _, err = call("train", "output=run", *TINY, "tracking=wandb")
    assert code == 0, err
    search = [*FAST, "tracking=wandb"]
    code, _, err = call("search", "--budget", "5", "--run", "run", "--pareto", *search)
    assert code == 0, err
    exported = tmp_path / "run" / "search" / "w5-a5" / "generic.onnx"
    exported.write_bytes(b"onnx")
    write_json(Path(f"{exported}.certificate.json"), {"verdict": "pass", "lines": []})
    code, out, err = eqnet("dashboard", "run")
    assert (code, err) == (0, "")
    assert "1 exported files of run recorded" in out
    assert "no key is set; run `wandb login` first" in out

    train, searched, dashboard = offline_folders(tmp_path / "run")
    stored = [records(next(folder.glob("*.wandb"))) for folder in (train, searched, dashboard)]
    values = history([record for part in stored for record in part])
    groups = {name.split("/")[0] for name in values if not name.startswith("_") and name != "optimizer_step"}
    assert groups == {"pretrain", "supernet", "validation", "test", "evaluation", "step_size", "predictor", "search"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row if key != "step"} <= set(values)
    (table,) = values["search/configs"]
    data = json.loads((searched / "files" / table["path"]).read_text())
    columns = ["kind", "form", "predicted", "validation", "test", "divergence", "w", "a", "size", "bitops"]
    assert data["columns"] == columns
    assert {row[0] for row in data["data"]} == {"searched", "uniform"}
    assert all(row[columns.index("w")] <= 5 for row in data["data"])
    for name in ("evaluation/heat_map", "predictor/picture", "search/bits", "search/pareto"):
        assert values[name][0]["_type"] == "image-file"
    assert {"predictor/held_out_table", "search/measured_table", "search/front_chart_table", "search/subnet"} <= set(
        values
    )
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    kept = {name.removesuffix(f"-{run_id}"): a for part in stored for name, a in artifacts(part).items()}
    made_from = {
        name: [source.removesuffix(f"-{run_id}") for source in json.loads(a.metadata)["made_from"]]
        for name, a in kept.items()
    }
    assert made_from == {
        "supernet": [],
        "checkpoint": [],
        "table": ["supernet"],
        "predictor": ["table"],
        "subnet-w5-a5": ["supernet", "predictor"],
        "export-w5-a5-generic.onnx": ["subnet-w5-a5"],
    }
    for section in build_view("someone", "eqnet").sections:
        for panel in section.panels:
            assert shown(panel, set(values)), (section.name, panel.title)
    names = {entry.path for entry in kept["supernet"].manifest.contents}
    assert {"float.safetensors", "supernet.safetensors", "supernet.json"} <= names
    assert json.loads(kept["export-w5-a5-generic.onnx"].metadata)["verdict"] == "pass"
    assert {entry.path for entry in kept["subnet-w5-a5"].manifest.contents} == {"subnet.json", "subnet.safetensors"}


# -- the sweep -------------------------------------------------------------------------------------------------------


def test_the_sweep_sets_settings_and_names_its_figure() -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweep" / "digits.yaml").read_text())
    for name, choice in sweep["parameters"].items():
        for value in choice.get("values") or [choice.get("value", choice.get("min")), choice.get("max")]:
            if value is not None:
                load_settings([f"{name}={value}"])
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": "validation/mean", "goal": "maximize"}


def test_a_reopened_run_keeps_its_id(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = Tracker(tmp_path, "wandb", "eqnet-tests", {})
        tracker.log({"loss": 0.1}, step)
        tracker.close()
        if step == 1:
            first = (tmp_path / "wandb_id.txt").read_text()
    assert (tmp_path / "wandb_id.txt").read_text() == first
    logs = [path for folder in offline_folders(tmp_path) for path in folder.glob("*.wandb")]
    assert {path.name for path in logs} == {f"run-{first.strip()}.wandb"}
    assert {r.run.run_id for path in logs for r in records(path) if r.HasField("run")} == {first.strip()}
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    other = tmp_path / "other"
    other.mkdir()
    Tracker(other, "wandb", "eqnet-tests", {}).close()
    assert (other / "wandb_id.txt").read_text() != first
