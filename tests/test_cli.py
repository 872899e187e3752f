"""The command `eqnet`: what it prints, and how it ends."""

from __future__ import annotations

import configparser
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Eqnet

from eqnet import cli
from eqnet.space import LayerInfo, QuantConfig, QuantSpace
from eqnet.space.hardware import target_names

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    LayerInfo("conv", "conv", (8, 3, 3, 3), 8 * 27 * 64, 3 * 64, reads_images=True),
    LayerInfo("hidden", "conv", (8, 8, 3, 3), 8 * 72 * 64, 8 * 64, signed_input=False),
    LayerInfo("fc", "linear", (10, 8), 80, 8, signed_input=False),
]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run as far as `targets check` reads it, with three searched subnets."""
    space = QuantSpace.from_layers(LAYERS)
    folder = tmp_path / "runs" / "mine"
    uniform = {f.name: space.uniform(4, f) for f in space.forms}
    w4a8 = space.uniform(4, space.forms[0], act_bits=8)
    for name, config in {"sym": uniform["channel-sym-sym"], "asym": uniform["channel-asym-asym"], "w4a8": w4a8}.items():
        (folder / "search" / name).mkdir(parents=True)
        (folder / "search" / name / "subnet.json").write_text(json.dumps({"layers": config.to_json()}))
    (folder / "supernet.json").write_text(json.dumps({"space": space.to_json()}))
    return folder


def test_list_names_every_target(eqnet: Eqnet) -> None:
    code, out, err = eqnet("targets", "list")
    assert (code, err) == (0, "")
    assert [name for name in target_names() if name not in out] == []


@pytest.mark.parametrize("name", target_names())
def test_show_prints_rules_and_sources(eqnet: Eqnet, name: str) -> None:
    code, out, err = eqnet("targets", "show", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: ")
    for fact in ("weights", "activations", "conv_transpose", "rounding", "source"):
        assert f"│ {fact}" in out


def test_show_takes_files(eqnet: Eqnet) -> None:
    path = str(ROOT / "eqnet" / "space" / "targets" / "litert.yaml")
    assert eqnet("targets", "show", path) == eqnet("targets", "show", "litert")


def test_check_accepts_what_runs(eqnet: Eqnet, run_folder: Path) -> None:
    subnet = run_folder / "search" / "w4a8" / "subnet.json"
    code, out, err = eqnet("targets", "check", "litert", str(subnet))
    assert (code, err) == (0, "")
    assert "litert runs all 3 layers" in out


def test_check_lists_violations(eqnet: Eqnet, run_folder: Path) -> None:
    code, out, err = eqnet("targets", "check", "openvino-cpu", str(run_folder / "search" / "asym" / "subnet.json"))
    assert (code, err) == (2, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["layer 'conv'", "layer 'hidden'", "layer 'fc'"]
    assert "openvino-cpu does not run asymmetric weights in convolutions, only 2-8 bits in int8, symmetric" in lines[0]
    code, out, _ = eqnet("targets", "check", "tensorrt", str(run_folder / "search" / "sym" / "subnet.json"))
    assert (code, len(out.splitlines())) == (2, 1)  # inputs of 4 bits between the ends
    assert "layer 'hidden'" in out


def test_check_finds_the_run_by_option(eqnet: Eqnet, run_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "subnet.json"
    moved.write_text((run_folder / "search" / "w4a8" / "subnet.json").read_text())
    assert eqnet("targets", "check", "litert", str(moved), "--run", str(run_folder))[0] == 0


def wrong_subnets(folder: Path) -> list[tuple[list[str], str]]:
    """Arguments of `targets check`, and what its sentence must say."""
    outside, foreign, empty = folder.parent / "subnet.json", folder / "foreign.json", folder / "empty.json"
    outside.write_text((folder / "search" / "sym" / "subnet.json").read_text())
    foreign.write_text(json.dumps({"layers": QuantConfig({}).to_json()}))
    empty.write_text("{}")
    damaged = folder / "damaged.json"
    damaged.write_text('{"layers"')
    return [
        (
            ["litert", str(outside)],
            "does not lie in the folder of a run (there is no supernet.json); name the run with --run",
        ),
        (["litert", str(outside), "--run", str(folder / "search")], "is not the folder of a trained run"),
        (["litert", str(folder / "none.json")], "none.json"),
        (["litert", str(foreign)], "the config does not fit the model: it misses conv, fc, hidden"),
        (["litert", str(empty)], "empty.json is not a subnet: it has no layers"),
        (["litert", str(damaged)], "damaged.json"),
        (["litret", str(foreign)], "unknown target 'litret'; did you mean 'litert'?"),
    ]


def test_mistakes_are_one_sentence(eqnet: Eqnet, run_folder: Path) -> None:
    cases = [(["targets", "check", *arguments], message) for arguments, message in wrong_subnets(run_folder)]
    cases += [
        (["targets", "show", "tensor-rt"], "unknown target 'tensor-rt'; did you mean 'tensorrt'?"),
        (["targets", "show", "mine.yaml"], "cannot read the target file mine.yaml"),
        (["targets", "show"], "Missing argument"),
        (["targets", "shwo"], "see `eqnet targets --help`."),
        (["targets", "list", "--fast"], "see `eqnet targets list --help`."),
        (["targets"], "Missing command; see `eqnet targets --help`."),
    ]
    for arguments, message in cases:
        code, out, err = eqnet(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: "), arguments
        assert err.count("\n") == 1, arguments
        assert message in err


def test_help(eqnet: Eqnet) -> None:
    for arguments in ([], ["--help"], ["targets", "--help"], ["targets", "check", "--help"]):
        code, out, err = eqnet(*arguments)
        assert (code, err) == (0, "")
        assert "Usage: eqnet" in out


def test_listing_targets_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['eqnet', 'targets', 'list']; from eqnet.cli import main; main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_entry_point_and_the_files_are_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    module, _, name = setup["options.entry_points"]["console_scripts"].split("=")[1].strip().partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main
    patterns = setup["options.package_data"]["eqnet"].split()
    packaged = {path.stem for pattern in patterns for path in (ROOT / "eqnet").glob(pattern) if path.suffix == ".yaml"}
    assert packaged == set(target_names())
