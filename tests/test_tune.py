"""Tuning by short runs: which candidates are drawn, successive halving, what is written, continuing after a kill, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import ROOT, environment, one_sentence
from rich.console import Console
from scipy.stats import spearmanr

from benchmarks.proxy_rank import summary
from eqnet.run import Run
from eqnet.settings import load_settings
from eqnet.tune import Tuned, TuneSettings, draw_candidates, tune

JOB = {
    "output": "tuned",
    "settings": [
        "tracking=none",
        "model.arguments={width: 4}",
        "pretrain.epochs=2",
        "train.epochs=3",
        "train.calibration_images=64",
        "space.bits=[2, 8]",
        "space.granularity=[tensor]",
        "space.symmetric=[true]",
        "data.max_images=300",
        "data.batch_size=32",
        "search.bn_images=64",
    ],
    "candidates": {"train.lr": [0.001, 0.003, 1e-8], "train.guidance": [0.5]},
    "rungs": [{"epochs": 1, "fraction": 0.25}, {"epochs": 2, "fraction": 0.5}],
    "reduction": 2,
}


def write(folder: Path, **changes: object) -> Path:
    """A job's file."""
    (folder / "job.yaml").write_text(yaml.safe_dump({**JOB, **changes}, sort_keys=False))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `job.yaml` was tuned into `tuned`."""
    folder = tmp_path_factory.mktemp("tune")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tune(TuneSettings.load(write(folder)), Console(quiet=True))
    finally:
        os.chdir(before)
    return folder


def score(folder: Path) -> float:
    value: float = json.loads((folder / "score.json").read_text())["validation"]
    return value


# -- candidates -------------------------------------------------------------------------------------------------------


def test_lists_are_combined(tmp_path: Path) -> None:
    spec = TuneSettings.load(write(tmp_path, candidates={"train.lr": [1e-3, 1e-2], "train.clip_value": [None, 1.0]}))
    assert draw_candidates(spec) == [
        {},
        {"train.lr": 1e-3, "train.clip_value": None},
        {"train.lr": 1e-3, "train.clip_value": 1.0},
        {"train.lr": 1e-2, "train.clip_value": None},
        {"train.lr": 1e-2, "train.clip_value": 1.0},
    ]


def test_ranges_are_covered_evenly_in_their_logarithm(tmp_path: Path) -> None:
    axes = {"train.lr": {"low": 1e-4, "high": 1e-1}, "train.guidance": {"low": 0.0, "high": 0.9, "log": False}}
    spec = TuneSettings.load(write(tmp_path, candidates={**axes, "train.weight_decay": [0.0, 0.1]}, trials=6))
    drawn = draw_candidates(spec)[1:]
    assert len(drawn) == 6
    for k in range(3):  # a Latin hypercube of six has two points in each third of every axis
        assert sum(1e-4 * 10**k <= d["train.lr"] < 1e-4 * 10 ** (k + 1) for d in drawn) == 2
        assert sum(0.3 * k <= d["train.guidance"] < 0.3 * (k + 1) for d in drawn) == 2
    assert sorted(d["train.weight_decay"] for d in drawn) == [0.0] * 3 + [0.1] * 3
    assert draw_candidates(spec)[1:] == drawn
    assert draw_candidates(spec.model_copy(update={"seed": 1}))[1:] != drawn


def test_the_job_of_the_repository_is_understood() -> None:
    for path in sorted((ROOT / "configs" / "tune").glob("*.yaml")):
        spec = TuneSettings.load(path)
        for values in draw_candidates(spec):
            load_settings([*spec.settings, *(f"{n}={json.dumps(v)}" for n, v in values.items())])


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_of_each_rung_the_best_go_on_and_one_is_trained_fully(workplace: Path) -> None:
    folder = workplace / "tuned"
    first = {p.name: score(p) for p in (folder / "rung1").iterdir()}
    second = {p.name: score(p) for p in (folder / "rung2").iterdir()}
    assert len(first) == 3  # the unchanged settings are among the combinations
    assert set(second) == set(sorted(first, key=lambda n: (-first[n], n))[:2])
    (full,) = (folder / "full").iterdir()
    assert full.name == min(second, key=lambda n: (-second[n], n))
    document = json.loads((folder / "tune.json").read_text())
    assert document["best"] == int(full.name)
    for i, row in enumerate(document["candidates"]):
        name = f"{i:03d}"
        assert row["rungs"] == [s[name] for s in (first, second) if name in s]
        assert row["full"] == (score(full) if name == full.name else None)


def test_rungs_train_on_their_share_and_share_everything_else(workplace: Path) -> None:
    folder = workplace / "tuned"
    splits = {
        stage: json.loads((next((folder / stage).iterdir()) / "split.json").read_text())["indices"]
        for stage in ("rung1", "rung2", "full")
    }
    whole = splits["full"]
    for stage, fraction in (("rung1", 0.25), ("rung2", 0.5)):
        assert len(splits[stage]["train"]) == round(fraction * len(whole["train"]))
        assert set(splits[stage]["train"]) < set(whole["train"])
        assert splits[stage]["validation"] == whole["validation"]
        assert splits[stage]["test"] == whole["test"]
    weights = {p.read_bytes() for p in folder.rglob("float.safetensors")}
    assert len(weights) == 1
    facts = [json.loads(p.read_text()) for p in folder.rglob("supernet.json")]
    assert len({str(f["mean"]) for f in facts}) == 1
    assert not list(folder.rglob("evaluation.json"))  # nothing was measured on the test split
    steps = {p.parent.parent.name: json.loads(p.read_text())["steps"] for p in folder.rglob("score.json")}
    assert (steps["rung1"], steps["rung2"], steps["full"]) == (2, 8, 27)
    ratio = json.loads((folder / "tune.json").read_text())["cost_ratio"]
    assert ratio == pytest.approx((3 * 2 + 2 * 8 + 27) / (3 * 27))


def test_the_best_settings_are_those_of_the_full_run(workplace: Path) -> None:
    folder = workplace / "tuned"
    (full,) = (folder / "full").iterdir()
    best = load_settings([str(folder / "best.yaml")])
    assert best.output is None
    assert best == load_settings([str(full / "settings.yaml"), "output=null"])
    assert best.train.lr != 1e-8


def test_the_full_run_is_evaluated_by_resuming_it(call, workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "tuned", tmp_path / "tuned")
    (full,) = (tmp_path / "tuned" / "full").iterdir()
    code, _, err = call("train", f"output={full}", "--resume")
    assert code == 0, err
    rows = json.loads((full / "evaluation.json").read_text())["uniform"]
    mean = sum(row["validation"] for row in rows if row["bits"] in (2, 4, 8)) / len(rows)
    assert mean == pytest.approx(score(full), abs=1)
    assert all("test" in row for row in rows)


@pytest.mark.slow
def test_a_killed_tuning_continues_and_ends_alike(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "eqnet.cli", "tune", str(write(tmp_path))]
    environ = {**environment(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "tuned" / "rung1" / "001" / "split.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "tuned").rglob("score.json")}
    assert 2 <= len(done) < 5
    tune(TuneSettings.load(tmp_path / "job.yaml"), Console(quiet=True))
    assert {p: p.stat().st_mtime_ns for p in done} == done
    for name in ("tune.json", "best.yaml"):
        assert (tmp_path / "tuned" / name).read_text() == (workplace / "tuned" / name).read_text()


def test_the_fine_tuning_of_a_subnet_is_tuned_as_well(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    (full,) = Path("tuned/full").iterdir()
    space = Run.open(full).load_supernet()[0].space
    (tmp_path / "subnet.json").write_text(json.dumps({"layers": space.smallest().to_json()}))
    settings = [f"subnet={tmp_path / 'subnet.json'}", f"supernet={full}", "train.epochs=1"]
    axes = {"train.lr": [1e-3]}
    job = write(tmp_path, output=str(tmp_path / "subnet"), settings=settings, candidates=axes, rungs=JOB["rungs"][:1])
    result = tune(TuneSettings.load(job), Console(quiet=True))
    assert len(result.full) == 1
    assert not (tmp_path / "subnet" / "float").exists()
    parts = [json.loads(p.read_text())["indices"] for p in (tmp_path / "subnet").rglob("split.json")]
    source = json.loads((full / "split.json").read_text())["indices"]
    assert all(part["test"] == source["test"] for part in parts)
    assert sorted(len(part["train"]) / len(source["train"]) for part in parts) == pytest.approx([0.25, 0.25, 1.0])
    best = load_settings([str(tmp_path / "subnet" / "best.yaml")])
    assert best.supernet == str(full)


# -- how good the ranking is ------------------------------------------------------------------------------------------


def test_all_candidates_trained_fully_show_how_well_the_rungs_rank(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    result = tune(TuneSettings.load(tmp_path / "job.yaml"), Console(quiet=True), all_fully=True)
    assert sorted(result.full) == [0, 1, 2]
    assert result.full == {i: score(tmp_path / "tuned" / "full" / f"{i:03d}") for i in range(3)}
    assert min(result.full, key=lambda i: result.full[i] or 0.0) == 2  # it hardly learns


def test_the_figures_of_the_benchmark() -> None:
    rungs: list[dict[int, float | None]] = [{0: 50.0, 1: 40.0, 2: 60.0, 3: None}, {0: 70.0, 2: 65.0}]
    result = Tuned([{}, {}, {}, {}], rungs, {0: 90.0, 1: 91.0, 2: 80.0, 3: None}, (30, 20))
    assert result.order == [0, 2, 1, 3]
    assert result.cost_ratio == pytest.approx((30 + 20) / (4 * 20))
    figures = summary(result)
    assert figures["spearman, first rung"][0] == pytest.approx(spearmanr([50, 40, 60], [90, 91, 80]).statistic)  # type: ignore[index]
    assert figures["spearman, order of the rungs"][0] == pytest.approx(spearmanr([3, 2, 1], [90, 80, 91]).statistic)  # type: ignore[index]
    assert figures["chosen - best [%]"] == -1
    assert figures["chosen - unchanged settings [%]"] == 0


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rung": []}, "rung"),
        ({"rungs": []}, "rungs"),
        ({"rungs": [{"epochs": 0, "fraction": 0.5}]}, "epochs"),
        ({"rungs": [{"epochs": 1, "fraction": 0.01}]}, "batch_size"),
        ({"candidates": {}}, "candidates"),
        ({"candidates": {"train.lr": []}}, "empty"),
        ({"candidates": {"train.lr": {"low": 0.1, "high": 1.0}}}, "trials"),
        ({"candidates": {"train.lr": {"low": 1.0, "high": 0.1}}, "trials": 3}, "low < high"),
        ({"candidates": {"train.lr": {"low": 0.1}}, "trials": 3}, "train.lr.high: Field required"),
        ({"candidates": {"train.lr": 0.1}}, "train.lr: Input should be a valid list"),
        ({"candidates": {"train.epochs": [1, 2]}}, "train.epochs"),
        ({"candidates": {"data.batch_size": [1, 2]}}, "data.batch_size"),
        ({"candidates": {"train.learning_rate": [1, 2]}}, "train.learning_rate"),
        ({"candidates": {"train.guidance": [7.0]}}, "guidance"),
        ({"settings": ["train.epoch=3"]}, "did you mean 'train.epochs'"),
        ({"settings": ["output=elsewhere"]}, "output=elsewhere"),
        ({"settings": ["data.name=no_such_folder"]}, "no_such_folder"),
        ({"output": "job.yaml"}, "job.yaml"),
    ],
)
def test_bad_jobs_are_one_sentence(eqnet, tmp_path: Path, changes: dict[str, object], wanted: str) -> None:
    code, _, err = eqnet("tune", str(write(tmp_path, **changes)))
    assert code == 2
    assert wanted in one_sentence(err)


def test_a_folder_of_another_job_is_left_alone(eqnet, workplace: Path, tmp_path: Path) -> None:
    tuned = workplace / "tuned"
    before = {p: p.stat().st_mtime_ns for p in tuned.rglob("*")}
    code, _, err = eqnet("tune", str(write(tmp_path, output=str(tuned), reduction=3)))
    assert code == 2
    assert "other settings" in one_sentence(err)
    assert {p: p.stat().st_mtime_ns for p in tuned.rglob("*")} == before
    code, _, err = eqnet("tune", str(tmp_path / "missing.yaml"))
    assert code == 2
    assert "missing.yaml" in one_sentence(err)


def test_candidates_that_diverge_are_ranked_last(eqnet, workplace: Path, tmp_path: Path) -> None:
    weights = f"model.weights={workplace / 'tuned' / 'float'}"
    settings = [a for a in JOB["settings"] if not a.startswith("pretrain")]  # type: ignore[attr-defined]
    diverging = [*settings, weights, "train.skewness=1e39"]
    changes = {"settings": diverging, "rungs": [{"epochs": 1, "fraction": 0.25}], "candidates": {"train.lr": [0.01]}}
    code, _, err = eqnet("tune", str(write(tmp_path, **changes)))
    assert code == 2
    assert "every candidate" in one_sentence(err)
    saved = {**changes, "output": "saved", "candidates": {"train.skewness": [1.0]}}
    code, _, err = eqnet("tune", str(write(tmp_path, **saved)))
    assert code == 0, err
    assert json.loads((tmp_path / "saved" / "tune.json").read_text())["best"] == 1
