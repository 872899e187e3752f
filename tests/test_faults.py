"""What survives what: kills, full disks, damaged files, diverging losses, a second command, a clock that jumps."""

from __future__ import annotations

import errno
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from benchmarks.kills import JOBS, survive
from eqnet.checkpoint import load_tensors
from eqnet.command import run_command
from eqnet.deploy.export import SCHEMA, check_output
from eqnet.lock import LOCK_FILE, locked
from eqnet.run import Run, open_data
from eqnet.settings import load_settings
from eqnet.tracking import Tracker
from eqnet.training.loop import DivergedError, Loop, Phase

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[..., tuple[int, str, str]]
TINY = [
    "tracking=none", "pretrain.epochs=1", "train.epochs=1", "train.evaluate_epochs=0", "train.log_steps=1",
    "train.checkpoint_steps=2", "train.calibration_images=32", "data.max_images=200", "data.batch_size=32",
    "model.arguments={width: 4}", "space.bits=[4, 8]", "space.symmetric=[true]", "space.granularity=[tensor]",
    "search.bn_images=32",
]  # fmt: skip

# -- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_kills_at_random_moments_change_no_result(job: str, tmp_path: Path) -> None:
    assert survive([job], kills=6, seed=1, folder=tmp_path)[job]["kills"] == 6


def test_an_export_that_was_killed_between_its_files_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    description = Path(f"{path}.json")
    description.write_text(json.dumps({"schema": SCHEMA}))
    check_output(path)
    path.touch()
    with pytest.raises(ValueError, match=r"net\.onnx already exists"):
        check_output(path)
    path.unlink()
    description.write_text('{"schema": "mine"}')
    with pytest.raises(ValueError, match=r"net\.onnx\.json already exists"):
        check_output(path)


# -- a second command -------------------------------------------------------------------------------------------------

HOLD = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"


def test_a_second_command_in_a_folder_is_refused_until_the_first_is_dead(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        code, _, err = call("train", f"output={folder}", *TINY)
        assert (code, err) == (2, f"error: another command is working on {folder}; wait for its end, or stop it.\n")
        assert [p.name for p in folder.iterdir()] == [LOCK_FILE]
        first.kill()
    code, _, err = call("train", f"output={folder}", *TINY)
    assert (code, err) == (0, "")
    with locked(folder / "checkpoints"), locked(folder):
        (folder / "evaluation.json").unlink()
        code, _, err = call("train", f"output={folder}", "--resume")
        assert code == 2
        assert "another command is working" in err
    assert call("train", f"output={folder}", "--resume")[0] == 0


# -- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [30_000, 70_000])
def test_a_full_disk_ends_training_in_a_sentence_and_it_goes_on_later(call: Call, tmp_path: Path, limit: int) -> None:
    folder = tmp_path / "run"
    with small_disk(limit):
        code, _, err = call("train", f"output={folder}", *TINY)
    assert code == 2
    assert err.startswith("error: cannot write")
    assert len(err.splitlines()) == 1
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("*.partial"))
    assert call("train", f"output={folder}", "--resume")[0] == 0
    assert (folder / "evaluation.json").exists()


def test_a_full_device_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: cannot write: {os.strerror(errno.ENOSPC)}; what was finished is kept.\n"


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder that this process cannot write, also if root runs the tests."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_a_sentence() -> None:
    accelerator = Accelerator(cpu=True)
    with read_only() as folder:
        with pytest.raises(ValueError, match=r"^cannot make the run's folder: .*Permission denied"):
            Run.create(load_settings([f"output={folder}/run"]), accelerator)
        with pytest.raises(ValueError, match=rf"^cannot write in {folder}: Permission denied\.$"):
            Run.create(load_settings([f"output={folder}"]), accelerator)


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> Run:
    """Two checkpoints of a small network."""
    run, accelerator = Run(folder, load_settings([])), Accelerator(cpu=True)
    model = nn.Linear(4, 4)
    accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    for step in (3, 6):
        run.checkpoints.save(accelerator, "supernet", step)
    return run


def test_a_damaged_bit_or_a_cut_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run = checkpoints(tmp_path)
    newest, notes = run.checkpoints.newest()
    assert newest is not None
    assert (newest.step, notes) == (6, [])
    names = sorted(p.name for p in newest.path.iterdir())

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        path = newest.path / data.draw(st.sampled_from(names))
        content = path.read_bytes()
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            changed = bytearray(content)
            changed[position] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(changed)
        else:
            path.write_bytes(content[:position])
        found, notes = run.checkpoints.newest()
        path.write_bytes(content)
        if path.name == "state.json" and found is not None and found.step == 6:
            return  # a change of its other facts, or of white space
        assert found is not None
        assert found.step == 3
        assert notes == [note for note in notes if str(newest.path) in note and "using an earlier one" in note] != []

    damage()


# -- losses that are not finite ---------------------------------------------------------------------------------------


class Parabola:
    """A phase that minimises (w - 1)^2 / 2; from the 13th step on its loss is not finite at rates above 0.5."""

    def __init__(self, folder: Path, rate: float, stop: int | None = None) -> None:
        """`stop` is the step before which the process is interrupted."""
        settings = load_settings(
            [
                f"output={folder}",
                "data.max_images=300",
                "data.batch_size=16",
                "train.clip_value=null",
                "train.checkpoint_steps=5",
                "train.log_steps=1",
            ]
        )
        folder.mkdir(exist_ok=True)
        self.run = Run(folder, settings)
        self.accelerator, self.output = Accelerator(cpu=True), Console(record=True, width=200, quiet=False)
        self.tracker = Tracker(folder, "none", "", {})
        self.loop = Loop(self.run, self.accelerator, open_data(self.run), self.tracker, self.output)
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 3.0)
        groups = [{"params": list(model.parameters()), "lr": rate, "peak_lr": rate}]
        self.model, optimizer = self.accelerator.prepare(model, torch.optim.SGD(groups))

        def compute(images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            loss = (self.model(torch.ones(1, 1)) - 1).square().sum() / 2
            if step >= 12 and optimizer.param_groups[0]["lr"] > 0.5:
                loss = loss * torch.nan
            self.accelerator.backward(loss)
            return {"task": loss.detach()}

        self.phase = Phase("pretrain", self.model, optimizer, 6, compute)

    def train(self) -> float:
        """Trains from the newest checkpoint, if any; the weight."""
        self.loop.train(self.phase, self.run.checkpoints.newest()[0])
        return float(self.model.weight.detach())


def test_a_diverging_loss_goes_back_once_and_on_with_a_lower_rate(tmp_path: Path) -> None:
    whole = Parabola(tmp_path / "whole", rate=1.0)
    weight = whole.train()
    assert abs(weight - 1) < 1e-3
    setback = json.loads((tmp_path / "whole" / "setback.json").read_text())
    assert setback["phase"] == "pretrain"
    assert setback["step"] % 5 == 0
    assert "'task' is not finite" in setback["reason"]
    assert f"back to step {setback['step']}, and on with 0.1 times" in whole.output.export_text()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    rates = {row["step"]: row["pretrain/lr"] for row in rows}
    assert rates[setback["step"] + 1] < 0.2 * rates[setback["step"]]
    interrupted = Parabola(tmp_path / "resumed", rate=1.0, stop=setback["step"] + 8)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert Parabola(tmp_path / "resumed", rate=1.0).train() == weight


def test_a_loss_that_diverges_again_stops_training_and_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    hopeless = Parabola(tmp_path, rate=100.0)
    for _ in range(2):  # a resumed run stops as well
        with pytest.raises(DivergedError, match="training stopped and the last checkpoint is kept: lower the learning"):
            hopeless.train()
        newest, notes = hopeless.run.checkpoints.newest()
        assert newest is not None
        assert notes == []
        assert all(torch.isfinite(t).all() for t in load_tensors(newest.path / "model.safetensors").values())


def test_a_hopeless_learning_rate_is_one_sentence(call: Call, tmp_path: Path) -> None:
    code, out, err = call("train", f"output={tmp_path / 'run'}", *TINY, "pretrain.lr=1e30", "train.clip_value=null")
    assert code == 2
    assert "back to step 0" in out
    assert err.startswith("error: the ")
    assert "lower the learning rate (train.lr, pretrain.lr)" in err
    assert len(err.splitlines()) == 1


# -- wandb ------------------------------------------------------------------------------------------------------------

RUN_FACTS = {
    "id": "aWQ=", "name": "run", "displayName": "run", "description": "", "config": "{}", "sweepName": None,
    "historyLineCount": 0, "project": {"id": "cA==", "name": "eqnet", "entity": {"id": "ZQ==", "name": "me"}},
}  # fmt: skip
ANSWERS = {
    "upsertBucket": {"upsertBucket": {"bucket": RUN_FACTS, "inserted": True}},
    "viewer": {"viewer": {"id": "dg==", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
    "serverInfo": {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}},
}


class WandbServer(http.server.BaseHTTPRequestHandler):
    """As much of a wandb server as a run needs to begin."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = json.loads(body)["query"] if self.path == "/graphql" else ""
        answer = json.dumps({"data": next((a for name, a in ANSWERS.items() if name in query), {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize("reachable", [True, False], ids=["lost in mid-run", "never there"])
def test_figures_are_kept_when_wandb_cannot_be_reached(
    reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), WandbServer) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "20" if reachable else "2")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if reachable:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        tracker = Tracker(tmp_path, "wandb", "eqnet", {})
        tracker.log({"supernet/total": 1.0}, 1)
        if reachable:
            server.shutdown()
            server.server_close()
        tracker.log({"supernet/total": 0.5}, 2)
        tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert list(tmp_path.glob("wandb/*run-*/*.wandb")), "nothing is left for `wandb sync`"
    assert ("wandb cannot be reached" in capfd.readouterr().err) != reachable


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_launch_ends_in_a_sentence_when_one_of_its_processes_dies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--cpu", "--num_processes", "2"]
    command = [*launch, str(ROOT / "train.py"), f"output={folder}", *TINY, "train.epochs=1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not list(folder.glob("checkpoints/supernet-*2")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        (second,) = [p for p in family if p.environ().get("LOCAL_RANK") == "1"]
        second.kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: process 1 ended by signal SIGKILL; the others were stopped" in errors
    assert "Traceback" not in errors
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_checkpoints_are_ordered_by_their_steps_whatever_the_clock_said(tmp_path: Path) -> None:
    run = checkpoints(tmp_path)
    newest, _ = run.checkpoints.newest()
    assert newest is not None
    for path in [newest.path, *newest.path.iterdir()]:
        os.utime(path, (0, 0))
    assert run.checkpoints.newest()[0] == newest


def test_the_latest_run_is_the_one_started_last_though_the_clock_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accelerator = Accelerator(cpu=True)
    runs = [Run.create(load_settings([f"output=runs/{name}"]), accelerator) for name in ("b", "a")]
    future: Any = (2**32, 2**32)
    os.utime(runs[0].path / "settings.yaml", future)
    assert Run.open(None).path == runs[1].path
    shutil.rmtree(runs[1].path)
    assert Run.open(None).path == runs[0].path
