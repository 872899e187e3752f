"""The pages keep their word: links lead somewhere, commands and settings are understood, settings are complete, code runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer.main
from accelerate.commands.launch import launch_command_parser
from pydantic import BaseModel

from eqnet import cli
from eqnet.checkpoint import save_tensors, write_json
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model
from eqnet.settings import Settings, dump_settings, load_settings
from eqnet.space import Budget

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Words of every shell command on a page."""
    found: list[list[str]] = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            found.append([])
            for word in shlex.split(line, comments=True):
                if word in ("&&", ";", "|"):
                    found.append([])
                else:
                    found[-1].append(word)
    return [words for words in found if words]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings that hold a value."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def value_of(settings: Settings, path: str) -> Any:
    value: Any = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


def script(name: str) -> ModuleType:
    """`train.py` or `search.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page} links to {target}, but {path.name} has no such heading"


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r"^ +- (\w+\.md)$", text_of("mkdocs.yml"), re.MULTILINE))
    assert listed == {Path(page).name for page in PAGES} - {"README.md"} | {"index.md"}


# -- settings ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_listed_once_with_its_default() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]*)` \| (.+) \|$", text_of("docs/settings.md"), re.MULTILINE)
    assert [path for path, _, _ in rows] == list(leaves(Settings))
    for path, default, _ in rows:
        assert value_of(load_settings([f"{path}={default}"]), path) == value_of(Settings(), path), path


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("docs/library.md", "docs/design.md")])
def test_settings_named_in_the_text_exist(page: str) -> None:
    sections = "|".join(Settings.model_fields)
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in shlex.split(span) if "=" in span else [span]:
            match = re.fullmatch(rf"((?:{sections})(?:\.\w+)*)(=.+)?", word)
            if match is None or Path(word).suffix in (".py", ".yaml", ".json", ".safetensors"):
                continue
            if match[2] is not None and match[2] != "=...":
                load_settings([word])
            elif "." in match[1]:
                assert match[1] in set(leaves(Settings)), f"{page}: {word}"


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            words = ["python", launched.training_script, *launched.training_script_args]
        if words[0] != "python" or words[1] not in ("train.py", "search.py"):
            continue
        monkeypatch.setattr(sys, "argv", words[1:])
        module = script(words[1].removesuffix(".py"))
        arguments = module.make_parser().parse_intermixed_args()
        load_settings(arguments.settings)
        if words[1] == "search.py":
            module.search_settings(Settings(), arguments.settings)
            assert arguments.subnet or Budget.parse(arguments.budget)


@pytest.mark.parametrize("page", PAGES)
def test_eqnet_commands_are_understood(page: str) -> None:
    for words in commands(page):
        if words[0] != "eqnet" or words[1].startswith("--"):
            continue
        command: Any = typer.main.get_command(cli.app)
        depth = 1
        while hasattr(command, "commands"):
            command, depth = command.commands[words[depth]], depth + 1
        command.make_context(" ".join(words[:depth]), words[depth:])  # raises for what it does not know


def test_there_are_commands_to_check() -> None:
    joined = [" ".join(words) for page in PAGES for words in commands(page)]
    assert sum(words.startswith("eqnet ") for words in joined) >= 20
    assert sum("train.py" in words for words in joined) >= 8
    assert sum("search.py" in words for words in joined) >= 6


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the run `runs/elastic`, untrained, and one searched subnet: what the pages speak of."""
    workspace = tmp_path_factory.mktemp("pages")
    settings = Settings.model_validate({"output": "runs/elastic", "model": {"arguments": {"width": 4}}})
    run = Run(workspace / "runs" / "elastic", settings)
    folder = run.path / "search" / "w4-a4"
    folder.mkdir(parents=True)
    (run.path / "settings.yaml").write_text(dump_settings(settings))
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 10, "supernet/total": 2.5}) + "\n")
    torch.manual_seed(0)
    supernet = Supernet.from_model(create_float_model(settings.model, 10, 1), (1, 8, 8))
    supernet.calibrate(torch.randn(16, 1, 8, 8))
    size = {"num_classes": 10, "input_size": [1, 8, 8]}
    run.save_supernet(
        supernet, {**size, "class_names": [str(i) for i in range(10)], "mean": [0.3], "std": [0.4], "run": "elastic"}
    )
    config = supernet.space.uniform(4, supernet.space.forms[0])
    write_json(folder / "subnet.json", {"layers": config.to_json()})
    save_tensors(folder / "subnet.safetensors", supernet.extract(config).state_dict())
    return workspace


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page: str, elastic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(elastic)
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def test_the_library_page_is_checked() -> None:
    assert len(blocks("docs/library.md", "python")) >= 5
