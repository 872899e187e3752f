"""Latency tables from real runtimes: what they hold, how a measurement continues, what is refused. No time is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from eqnet import cli
from eqnet.checkpoint import read_json, write_json
from eqnet.deploy.latency import (
    Additivity,
    calibration_configs,
    count_networks,
    measure_latency,
    random_configs,
)
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model
from eqnet.settings import Settings, dump_settings
from eqnet.space.hardware import HardwareTarget, load_target
from eqnet.space.latency import latency_cost, read_latency_table

SIZE = (3, 8, 8)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 5),
    )
    net = Supernet.from_model(model, SIZE, bits=[2, 4, 8])
    net.calibrate(torch.randn(8, *SIZE))
    return net.eval()


@pytest.fixture
def target() -> HardwareTarget:
    return load_target("onnxruntime-x86")


def classes(target: HardwareTarget, net: Supernet, name: str, configs: list) -> list[tuple[bool, bool]]:
    info = net.space.info(name)
    found = []
    for config in configs:
        weight, act = config[name].weight, config[name].act
        assert act is not None
        found.append((weight.symmetric, target.timed(info, "act", act) != target.executed(info, "act", act)))
    return found


def test_every_layer_takes_every_class_equally_often(supernet: Supernet, target: HardwareTarget) -> None:
    plan = calibration_configs(supernet.space, target)
    assert plan == calibration_configs(supernet.space, target)
    for name, count in {"0": 2, "3": 4, "6": 4, "10": 2}.items():  # the ends are fixed at 8 bits: never clipped
        found = classes(target, supernet, name, plan)
        assert len(set(found)) == count
        assert {found.count(c) for c in set(found)} == {len(plan) // count}


def test_random_configs_differ_in_their_shares(supernet: Supernet, target: HardwareTarget) -> None:
    configs = random_configs(supernet.space, target, 40)
    assert configs == random_configs(supernet.space, target, 40)
    assert len(set(configs)) == 40
    assert not set(configs) & set(calibration_configs(supernet.space, target))
    assert len(set(classes(target, supernet, "3", configs))) == 4


@pytest.mark.parametrize("name", ["onnxruntime-x86", "openvino-cpu"])
def test_a_table_has_the_time_of_every_config(supernet: Supernet, name: str, tmp_path: Path) -> None:
    target, path, steps = load_target(name), tmp_path / "table.json", []
    table, check = measure_latency(supernet, target, SIZE, path, configs=3, rounds=4, progress=lambda: steps.append(1))
    assert len(steps) == count_networks(supernet, target, 3)
    assert read_latency_table(path) == table
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    assert table.facts["runtime"].startswith(f"{target.runtime.split()[0]} ")  # type: ignore[union-attr]
    assert {"target", "cpu", "threads", "date", "input_size"} <= set(table.facts)
    space = target.restrict(supernet.space)
    cost = latency_cost(space, table, target)  # an error for any format that is missing
    assert cost.minimum > 0
    configs = random_configs(space, target, 3)
    assert check.predicted == tuple(cost.of(config) for config in configs)
    assert len(check.measured) == 3
    clipped = {act.bits for _, _, act in table.entries if act is not None}
    assert clipped == {7, 8}
    third, sixth = space.info("3"), space.info("6")
    fmt = space.choices("3", "weight")[0], space.choices("3", "act")[0]
    executed = target.executed(third, "weight", fmt[0]), target.timed(third, "act", fmt[1])
    assert table.ms(third, *executed) == table.ms(sixth, *executed)  # one shape, one entry


def test_a_killed_measurement_continues(supernet: Supernet, target: HardwareTarget, tmp_path: Path) -> None:
    path, partial = tmp_path / "table.json", tmp_path / "table.json.progress.json"
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_latency(supernet, target, SIZE, path, configs=2, rounds=2, progress=stop)
    assert not path.exists()
    state = read_json(partial)
    assert len(state["samples"]) == 2
    state["samples"][0]["10"] = 1e6  # recognisable: were it measured again, it would be lost
    write_json(partial, state)
    table, _ = measure_latency(supernet, target, SIZE, path, configs=2, rounds=2)
    slowest = max(table.entries, key=lambda key: table.entries[key])
    assert slowest[0].kind == "linear"
    assert table.entries[slowest] > 0.9 * sum(set(table.entries.values()))
    assert not partial.exists()


def test_a_finished_table_is_not_measured_again(supernet: Supernet, target: HardwareTarget, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first = measure_latency(supernet, target, SIZE, path, configs=2, rounds=2)
    content = path.read_bytes()

    def fail() -> None:
        raise AssertionError("measured again")

    assert measure_latency(supernet, target, SIZE, path, configs=2, rounds=2, progress=fail) == first
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=r"measured with threads 1, here it is 2; remove it to measure again"):
        measure_latency(supernet, target, SIZE, path, threads=2)


def test_what_does_not_run_here_is_refused(supernet: Supernet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensorrt does not run on this machine; import a table"):
        measure_latency(supernet, load_target("tensorrt"), SIZE, tmp_path / "table.json")


def test_progress_of_another_measurement_is_refused(supernet: Supernet, target: HardwareTarget, tmp_path: Path) -> None:
    partial = tmp_path / "table.json.progress.json"
    partial.write_text("{")
    with pytest.raises(ValueError, match=r"progress\.json' is not a JSON file"):
        measure_latency(supernet, target, SIZE, tmp_path / "table.json")
    partial.write_text('{"schema": "x"}')
    with pytest.raises(ValueError, match="not the progress of a latency measurement"):
        measure_latency(supernet, target, SIZE, tmp_path / "table.json")


def test_the_check_has_its_closed_forms() -> None:
    check = Additivity((1.0, 2.0, 4.0), (2.0, 2.5, 5.0), 0.01)
    assert check.spearman == pytest.approx(1)
    assert check.mean_error == pytest.approx((0.5 + 0.2 + 0.2) / 3)
    assert check.spread == pytest.approx(1.5)
    assert "within the noise" not in check.describe()
    assert "within the noise" in Additivity((1.0, 2.0), (1.0, 1.01), 0.02).describe()
    assert json.loads(json.dumps(Additivity((1.0, 1.0), (1.0, 2.0), 0.1).to_json()))["spearman"] is None


def test_the_command_writes_the_table_into_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.model_validate({"model": {"name": "test_resnet"}})
    run = Run(tmp_path / "mine", settings)
    run.path.mkdir()
    (run.path / "settings.yaml").write_text(dump_settings(settings))
    net = Supernet.from_model(create_float_model(settings.model, 10, 1), (1, 32, 32), bits=[4, 8])
    net.calibrate(torch.randn(2, 1, 32, 32))
    run.save_supernet(net, {"num_classes": 10, "input_size": [1, 32, 32]})
    words = ["eqnet", "benchmark", "latency", "--target", "onnxruntime-x86", "--run", str(run.path)]
    monkeypatch.setattr(sys, "argv", [*words, "--configs", "2", "--rounds", "2"])
    cli.main()
    out = capsys.readouterr().out
    assert "sums against 2 networks of random configs: Spearman" in out
    table = read_latency_table(run.path / "latency" / "onnxruntime-x86.json")
    assert table.facts["input_size"] == "1x32x32"
    monkeypatch.setattr(sys, "argv", [*words[:4], "onnxruntime", *words[5:]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "unknown target 'onnxruntime'; did you mean" in capsys.readouterr().err
