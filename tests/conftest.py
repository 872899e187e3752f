"""Fixtures that several test files share."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import TINY, train
from filelock import FileLock
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright
from torch import nn

from eqnet import cli
from eqnet.command import run_command

ROOT = Path(__file__).resolve().parent.parent
Eqnet = Callable[..., tuple[int, str, str]]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed (apt-get install chromium)")

torch.set_num_threads(1)
settings.register_profile("any speed", deadline=None)  # a busy machine fails no test
settings.load_profile("any speed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Models start from the same random weights whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    """Makes normally distributed images [n, C, H, W] of a seed."""

    def make(n: int = 4, size: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> torch.Tensor:
        return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))

    return make


def small_cnn() -> nn.Sequential:
    """Five quantizable layers (dense, depthwise, strided and pointwise convolutions, a linear), BN, both input signs."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


@pytest.fixture
def make_cnn() -> Callable[[], nn.Sequential]:
    """Makes `small_cnn`."""
    return small_cnn


@pytest.fixture
def cnn(make_cnn: Callable[[], nn.Sequential]) -> nn.Sequential:
    """One of them, for inputs of 3 x 8 x 8."""
    return make_cnn()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `train.py` or `search.py` in this process; returns (exit code, stdout, stderr)."""

    def run_it(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their module
        spec.loader.exec_module(module)
        code = 0
        try:
            run_command(module.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run_it


@pytest.fixture
def eqnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Eqnet:
    """Runs `eqnet ...` in an empty folder of this process; returns (exit code, stdout, stderr)."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eqnet", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        assert code is None or isinstance(code, int)
        return code or 0, *capsys.readouterr()

    return run_it


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """An uninterrupted tiny run, trained once for all workers; nothing writes there."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "finished" / "run"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            done = train(folder, *TINY)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished tiny run."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("commands") / "run")
