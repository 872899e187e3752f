"""The shape of the library: import direction, lean import, settings files, lint and types."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

from eqnet.augment import image_transforms
from eqnet.nn.supernet import Supernet
from eqnet.settings import Settings, dump_settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ["space", "nn", "training", "scoring", "search", "deploy"]
MODULES = sorted((ROOT / "eqnet").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of eqnet modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n for n in names if n.split(".")[0] == "eqnet"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_earlier_chapters(path: Path) -> None:
    parts = path.relative_to(ROOT / "eqnet").parts
    if parts[0] not in CHAPTERS:
        return
    here = CHAPTERS.index(parts[0])
    for name in imported(path):
        chapter = name.split(".")[1] if "." in name else ""
        assert chapter not in CHAPTERS or CHAPTERS.index(chapter) <= here, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module starts with its purpose"
    assert len(text.splitlines()) <= 500


def test_the_space_needs_no_torch() -> None:
    code = "import sys, eqnet.space; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_eqnet_is_lean() -> None:
    code = (
        "import sys, eqnet; heavy = {'deap', 'wandb', 'onnx', 'matplotlib', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    import eqnet

    for name in eqnet.__all__:
        assert getattr(eqnet, name) is not None
    assert len(eqnet.__all__) <= 30
    with pytest.raises(AttributeError):
        _ = eqnet.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_settings_file_loads_and_differs_from_the_defaults(path: Path) -> None:
    assert load_settings([str(path)]) != Settings()


def test_imagenet_recipes_fit_their_models() -> None:
    """The bits of a recipe are in the space of its model, and its transform is one of timm's; random weights, no images."""
    paths = sorted((ROOT / "configs" / "train").glob("imagenet_*.yaml"))
    assert len(paths) == 5
    for path in paths:
        settings = load_settings([str(path)])
        with torch.device("meta"):
            model = timm.create_model(settings.model.name, num_classes=1000)
        config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
        size = config["input_size"]
        supernet = Supernet.from_model(model, size, **settings.space.model_dump(exclude={"targets"}))
        assert supernet.uncovered in ([], ["pos_embed"])
        assert {f.bits for g in supernet.space.genes for f in g.formats} == {8, *settings.space.bits}
        training, evaluation = image_transforms(size, config["mean"], config["std"], config, settings.data.transform)
        image = Image.fromarray(np.zeros((300, 400, 3), np.uint8))
        assert training(image).shape == evaluation(image).shape == size
        assert settings.train.precision == "bf16"
        assert settings.model.pretrained


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = load_settings(["train.epochs=7", "space.bits=[2, 4]", "model.arguments={shortcut: B}", "train.lr=1e-4"])
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert load_settings([str(tmp_path / "settings.yaml")]) == settings
    assert settings.train.lr == 1e-4


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_lint_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
