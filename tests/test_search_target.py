"""Searching for a hardware target: what is found runs there, is measured as it runs there, and costs what it costs there."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.target_accuracy import measure
from eqnet.checkpoint import load_tensors
from eqnet.command import run_command
from eqnet.nn.specialize import specialize
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model, open_data
from eqnet.scoring.evaluation import Evaluator
from eqnet.settings import load_settings
from eqnet.space import QuantConfig
from eqnet.space.hardware import HardwareTarget, load_target, target_names
from eqnet.space.latency import LatencyTable, LayerShape
from eqnet.space.target_cost import container_bitops, container_size
from eqnet.training.trainer import export_facts

ROOT = Path(__file__).resolve().parent.parent
FAST = ["tracking=none", "search.generations=8", "search.population=20", "search.top_k=2", "search.rounds=2"]
TINY = [
    "search.table_size=12",
    "search.bn_images=64",
    "search.max_validation_images=40",
    "data.max_images=300",
    "model.arguments={width: 4}",
    "space.bits=[2, 4, 7, 8]",
]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose supernet is calibrated, which is enough for a search to order configs."""
    torch.manual_seed(0)
    settings = load_settings([f"output={tmp_path_factory.mktemp('target') / 'run'}", *TINY])
    made = Run.create(settings, accelerator := Accelerator())
    data = open_data(made)
    made.store_split(data, accelerator)
    model = create_float_model(settings.model, data.num_classes, data.input_size[0])
    supernet = Supernet.from_model(model, data.input_size, **settings.space.model_dump(exclude={"targets"}))
    evaluator = Evaluator.from_data(supernet, data, settings, torch.device("cpu"))
    supernet.calibrate(evaluator.bn_batches)
    made.save_supernet(supernet, export_facts(data, made.path))
    return made


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Run, tmp_path: Path) -> Call:
    """Runs `search.py` on the run in this process; returns (exit code, stdout without line breaks, stderr)."""
    spec = importlib.util.spec_from_file_location("search", ROOT / "search.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their module
    spec.loader.exec_module(module)

    def run_it(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments), "--run", str(run.path), *FAST])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            run_command(module.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, " ".join(out.out.split()), out.err

    return run_it


def refused(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("name", ["openvino-cpu", "tensorrt", "vitis-ai"])
def test_what_is_found_runs_on_the_target_as_it_was_measured(call: Call, run: Run, name: str) -> None:
    target = load_target(name)
    budget = "w=4" if name != "openvino-cpu" else "4"
    code, out, err = call("--budget", budget, "--target", name)
    assert code == 0, err
    folder = run.path / "search" / (f"w4-{name}" if budget == "w=4" else f"w4-a4-{name}")
    document = json.loads((folder / "subnet.json").read_text())
    assert document["target"] == name
    assert HardwareTarget.model_validate_json(json.dumps(document["target_rules"])) == target
    assert f"{name}: weights of 2-8" in out
    supernet, _ = run.load_supernet()
    config = QuantConfig.from_json(document["layers"])
    assert target.check(config, supernet.space.layers) == []
    assert document["cost"]["w"] <= 4
    for rival in ("best_searched", "best_uniform"):
        assert target.check(QuantConfig.from_json(document[rival]["layers"]), supernet.space.layers) == []
        assert document["divergence"] <= document[rival]["divergence"]
    space = target.restrict(supernet.space)
    assert document["cost"]["bitops"] == container_bitops(space, target).of(config)
    if target.storage_bits == "container":
        assert document["cost"]["size"] == container_size(space, target).of(config)
    # the codes on disk are those of the supernet specialized to the target
    special = specialize(supernet, target)
    tensors = load_tensors(folder / "subnet.safetensors")
    for key, value in special.extract(config).state_dict().items():
        if key.endswith(("codes", "scale", "zero_point", "qmin", "qmax")):
            assert torch.equal(value, tensors[key]), key
    # and measure as reported, on the target that the file names
    code, out, err = call("--subnet", folder / "subnet.json")
    assert code == 0, err
    assert f"validation {document['accuracy']['validation']:.2f} %" in out or "test" in out
    assert f"test {document['accuracy']['test']:.2f} %" in out


def test_the_second_search_measures_no_table_and_fits_no_predictor(call: Call, run: Run) -> None:
    code, _, err = call("--budget", "w=5", "--target", "onnxruntime-arm")
    assert code == 0, err
    shards = {p: p.read_text() for p in (run.path / "table").glob("rows-*.jsonl")}
    written = (run.path / "predictor.safetensors").read_bytes()
    code, _, err = call("--budget", "w=3", "--target", "tensorrt")
    assert code == 0, err
    rows = [line for text in shards.values() for line in text.splitlines() if line]
    assert len(rows) == 12
    assert [line for p in shards for line in p.read_text().splitlines() if line] == rows
    assert (run.path / "predictor.safetensors").read_bytes() == written


def test_a_target_and_a_form_restrict_together(call: Call, run: Run) -> None:
    code, _, err = call("--budget", "w=4", "--target", "openvino-cpu", "--form", "channel-sym-asym")
    assert code == 0, err
    document = json.loads((run.path / "search" / "w4-openvino-cpu-channel-sym-asym" / "subnet.json").read_text())
    assert document["form"] == "channel-sym-asym"
    message = refused(call("--budget", "4", "--target", "tensorrt", "--form", "channel-asym-asym"))
    assert "channel-asym-asym is not part of what tensorrt runs" in message


def test_latency_budgets_use_the_table_of_the_run(call: Call, run: Run, tmp_path: Path) -> None:
    target = load_target("onnxruntime-x86")
    message = refused(call("--budget", "latency=2ms", "--target", target.name))
    assert f"eqnet benchmark latency --target {target.name}" in message
    assert "--target" in refused(call("--budget", "latency=2ms"))
    supernet, _ = run.load_supernet()
    space = target.restrict(supernet.space)
    entries = {}
    for info in space.layers:
        for weight in space.choices(info.name, "weight"):
            for act in space.choices(info.name, "act"):
                slow = 1.0 + (not weight.symmetric) + (weight.granularity == "channel")  # ms, by form only
                key = (LayerShape.of(info), target.executed(info, "weight", weight), target.executed(info, "act", act))
                entries[key] = slow
    path = run.path / "latency" / f"{target.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(LatencyTable(entries, 0.5).to_json()))
    limit = len(space.layers) * 1.0 + 0.5 + 3
    code, out, err = call("--budget", f"latency={limit}ms", "--target", target.name)
    assert code == 0, err
    assert f"latency/{target.name}.json" in out.replace(os.sep, "/").replace(" ", "")
    (folder,) = (run.path / "search").glob("latency*")
    document = json.loads((folder / "subnet.json").read_text())
    slower = sum(
        (not c["weight"]["symmetric"]) + (c["weight"]["granularity"] == "channel") for c in document["layers"].values()
    )
    assert document["cost"]["latency"] == pytest.approx(len(space.layers) + 0.5 + slower)
    assert document["cost"]["latency"] <= limit
    message = refused(call("--budget", "latency=1ms", "--target", target.name))
    assert f"latency={len(space.layers) + 0.5}ms" in message
    other = tmp_path / "other.json"
    other.write_text(json.dumps(LatencyTable({}, 0.5).to_json()))
    message = refused(call("--budget", "latency=9ms", "--target", target.name, "--latency-table", other))
    assert "no entry for layer 'conv1'" in message


def test_mistakes_are_one_sentence_and_write_nothing(call: Call, run: Run, tmp_path: Path) -> None:
    before = sorted((run.path / "search").glob("*")) if (run.path / "search").exists() else []
    assert "did you mean 'openvino-cpu'" in refused(call("--budget", "4", "--target", "openvino_cpu"))
    message = refused(call("--budget", "a=4", "--target", "tensorrt"))
    assert "a=8" in message
    board = tmp_path / "board.yaml"
    rules = load_target("tensorrt").model_dump(mode="json")
    for ops in rules["ops"].values():
        ops["act"][0]["bits"] = [5]
    board.write_text(json.dumps(rules | {"name": "board"}))
    message = refused(call("--budget", "4", "--target", board))
    assert message.startswith("error: layer 'conv1': board does not run")
    supernet, _ = run.load_supernet()
    subnet = tmp_path / "subnet.json"
    subnet.write_text(json.dumps({"layers": supernet.space.smallest().to_json()}))
    message = refused(call("--subnet", subnet, "--target", "tensorrt"))
    assert "tensorrt does not run 2-bit activations" in message
    assert "eqnet targets check" in message
    assert before == (sorted((run.path / "search").glob("*")) if (run.path / "search").exists() else [])


def test_exact_search_takes_a_target_too(call: Call, run: Run) -> None:
    code, _, err = call("--budget", "w=4", "--target", "tensorrt", "--method", "ilp", "--score", "fisher")
    assert code == 0, err
    (path,) = (run.path / "search").glob("w4-tensorrt-ilp-fisher/subnet.json")
    document = json.loads(path.read_text())
    supernet, _ = run.load_supernet()
    assert document["target"] == "tensorrt"
    assert load_target("tensorrt").check(QuantConfig.from_json(document["layers"]), supernet.space.layers) == []


def test_the_benchmark_of_forms_covers_every_target_and_costs_nothing_where_no_rule_is(run: Run) -> None:
    rows = measure(run)
    names = {name.partition(", ")[0] for name in rows}
    assert names == set(target_names())
    free = ("generic", "onnxruntime-arm", "onnxruntime-x86")
    for name, row in rows.items():
        target, weights, inputs = name.split(", ")
        assert weights in ("4-bit weights", "8-bit weights")
        assert inputs == "8-bit inputs" or target in (*free, "openvino-cpu")
        if target in free:
            assert row["test %"] == row["as trained, test %"]
