"""Fine-tuning one subnet: what it inherits, what it writes, exact resume without its source, bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from commands import ROOT, environment, one_sentence, train
from safetensors.torch import load_file

from eqnet.checkpoint import load_tensors
from eqnet.nn.supernet import Supernet
from eqnet.run import Run
from eqnet.space import COSTS, QuantConfig, QuantSpace
from eqnet.training.finetune import static_space

SUPERNET = [
    "tracking=none",
    "pretrain.epochs=6",
    "train.epochs=2",
    "train.calibration_images=64",
    "train.evaluate_epochs=0",
    "data.batch_size=64",
    "model.arguments={width: 4}",
    "space.bits=[2, 8]",
    "space.granularity=[tensor]",
    "search.bn_images=256",
]
SHORT = ["train.epochs=2", "train.checkpoint_steps=10", "train.evaluate_epochs=1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained supernet with a random config of its space in `search/mine/subnet.json`."""
    folder = tmp_path_factory.mktemp("finetune") / "source"
    done = train(folder, *SUPERNET)
    assert done.returncode == 0, done.stderr
    space = Run.open(folder).load_supernet()[0].space
    config = space.sample(np.random.default_rng(3))
    (folder / "search" / "mine").mkdir(parents=True)
    (folder / "search" / "mine" / "subnet.json").write_text(json.dumps({"layers": config.to_json()}))
    return folder


@pytest.fixture(scope="module")
def tuned(source: Path) -> Path:
    """That config, fine-tuned."""
    folder = source.parent / "tuned"
    done = train(folder, f"subnet={source}/search/mine/subnet.json", *SHORT)
    assert done.returncode == 0, done.stderr
    return folder


def config_of(folder: Path) -> QuantConfig:
    return QuantConfig.from_json(json.loads((folder / "subnet.json").read_text())["layers"])


def test_the_subnet_of_a_fine_tuned_run_follows_the_schema(tuned: Path) -> None:
    document = json.loads((tuned / "subnet.json").read_text())
    schema = json.loads((ROOT / "eqnet" / "subnet.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert set(document) <= set(schema["properties"])


def measured_on_test(call, subnet: Path, run: Path) -> float:
    """Test accuracy [%] of a subnet as `search.py` measures it; memory layouts round differently, by an image or two."""
    code, out, err = call("search", "--subnet", subnet, "--run", run)
    assert code == 0, err
    (found,) = re.findall(r"test (\d+\.\d+) %", out)
    return float(found)


def test_a_space_of_one_config_costs_the_same(source: Path) -> None:
    space = Run.open(source).load_supernet()[0].space
    config = config_of(source / "search" / "mine")
    one = static_space(space, config)
    assert [len(gene.formats) for gene in one.genes] == [1] * space.num_genes
    assert one.largest() == one.smallest() == config
    for build in COSTS.values():
        assert build(one).of(config) == build(space).of(config)
    with pytest.raises(ValueError, match="not in the space"):
        static_space(space.restrict_form(space.forms[0]), space.largest(space.forms[-1]))


def test_a_supernet_hands_its_rows_to_a_smaller_space(cnn, make_cnn, images) -> None:
    supernet = Supernet.from_model(cnn, (3, 8, 8), fixed="none")
    supernet.calibrate(images(32))
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    few = supernet.space.restrict(lambda layer, slot, fmt: fmt.bits in (3, 5))
    heir = Supernet(make_cnn(), few)
    heir.inherit(supernet)
    assert heir.calibrated
    for seed in range(5):
        config = few.sample(np.random.default_rng(seed))
        supernet.set_config(config)
        heir.set_config(config)
        assert torch.equal(heir.eval()(images(8)), supernet.eval()(images(8)))
    with pytest.raises(ValueError, match=r"no step sizes for the formats of 0\.weight"):
        heir.inherit(Supernet(make_cnn(), supernet.space.restrict(lambda layer, slot, fmt: fmt.bits == 3)))
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="the supernet"):
        heir.inherit(Supernet.from_model(other, (3, 8, 8), fixed="none"))


def test_without_training_the_subnet_is_that_of_the_supernet(call, source: Path, tmp_path: Path) -> None:
    subnet = source / "search" / "mine" / "subnet.json"
    code, _, err = call("train", "output=same", f"subnet={subnet}", "train.epochs=0")
    assert code == 0, err
    theirs, _ = Run.open(source).load_supernet()
    ours, _ = Run.open(tmp_path / "same").load_supernet()
    config = config_of(source / "search" / "mine")
    theirs.set_config(config)
    ours.set_config(config)
    images = torch.randn(8, 1, 8, 8)
    for supernet in (theirs, ours):
        supernet.recalibrate_bn([torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))])
    assert torch.equal(ours(images), theirs(images))
    accuracy = json.loads((tmp_path / "same" / "subnet.json").read_text())["accuracy"]
    assert measured_on_test(call, subnet, source) == pytest.approx(accuracy["test"], abs=1)
    assert accuracy["validation"] == accuracy["validation_before"]


def test_a_fine_tuned_run_is_a_run_with_a_subnet(call, source: Path, tuned: Path) -> None:
    assert json.loads((tuned / "split.json").read_text()) == json.loads((source / "split.json").read_text())
    document = json.loads((tuned / "subnet.json").read_text())
    assert config_of(tuned) == config_of(source / "search" / "mine")
    assert document["cost"]["w"] > 2
    assert json.loads((tuned / "evaluation.json").read_text())["subnet"] == document["accuracy"]
    supernet, _ = Run.open(tuned).load_supernet()
    assert supernet.space.largest() == config_of(tuned)
    subnet = supernet.extract(config_of(tuned))
    subnet.load_state_dict(load_tensors(tuned / "subnet.safetensors"))
    assert measured_on_test(call, tuned / "subnet.json", tuned) == pytest.approx(document["accuracy"]["test"], abs=1)
    code, _, err = call("search", "--budget", "4", "--run", tuned)
    assert code == 2
    assert "one subnet" in one_sentence(err)


def test_the_float_model_guides_and_weights_and_step_sizes_move(source: Path, tuned: Path) -> None:
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    before = json.loads((tuned / "subnet.json").read_text())["accuracy"]["validation_before"]
    assert rows[0] == {"step": 0, "validation/subnet": before}
    trained = [r for r in rows if "supernet/total" in r]
    assert all(r["supernet/guidance/largest"] > 0 for r in trained)
    assert not any("supernet/task/smallest" in r or "supernet/kurtosis" in r for r in trained)
    theirs, _ = Run.open(source).load_supernet()
    ours, _ = Run.open(tuned).load_supernet()
    for name, layer in ours.layers.items():
        assert not torch.equal(layer.latent_weight, theirs.layers[name].latent_weight), name
    assert torch.equal(*(load_file(f / "float.safetensors")["conv1.weight"] for f in (source, tuned)))


def test_two_bits_of_a_float_model_recover(call, source: Path, tmp_path: Path) -> None:
    space: QuantSpace = Run.open(source).load_supernet()[0].space
    config = space.uniform(2, space.forms[0])
    (tmp_path / "two.json").write_text(json.dumps({"layers": config.to_json(), "from": "another tool"}))
    arguments = [a for a in SUPERNET if not a.startswith(("pretrain", "train"))]
    weights = f"model.weights={source}"
    code, out, err = call("train", "output=two", "subnet=two.json", weights, *arguments, "train.epochs=4")
    assert code == 0, err
    evaluation = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert evaluation["subnet"]["validation"] > evaluation["subnet"]["validation_before"] + 5
    assert f"after {evaluation['subnet']['validation']:.2f}" in out


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_without_its_source(source: Path, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    folder, subnet = tmp_path / "killed", tmp_path / "source" / "search" / "mine" / "subnet.json"
    command = [sys.executable, str(ROOT / "train.py"), f"output={folder}", f"subnet={subnet}", *SHORT]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoints" / "supernet-00000010").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "evaluation.json").exists()
    shutil.rmtree(tmp_path / "source")
    resumed = train(folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("supernet.safetensors", "subnet.safetensors"):
        whole, continued = load_file(tuned / name), load_file(folder / name)
        assert whole.keys() == continued.keys()
        assert all(torch.equal(whole[k], continued[k]) for k in whole), name
    for name in ("metrics.jsonl", "evaluation.json", "split.json", "subnet.json"):
        assert (tuned / name).read_text() == (folder / name).read_text(), name


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["subnet=missing.json"], "missing.json"),
        (["subnet=cut.json", "supernet=SOURCE"], "cut.json"),
        (["subnet=foreign.json", "supernet=SOURCE"], "foreign ghost"),
        (["subnet=three.json", "supernet=SOURCE"], "not in the space"),
        (["subnet=MINE", "supernet=nowhere"], "nowhere"),
        (["subnet=MINE", "supernet=unfinished"], "no trained supernet"),
        (["supernet=SOURCE"], "subnet="),
        (["subnet=MINE", "supernet=SOURCE", "model.weights=w.pth"], "model belongs to the run"),
        (["subnet=MINE", "space.bits=[2, 4]"], "space belongs to the run"),
        (["subnet=MINE", "data.validation_fraction=0.3"], "data belongs to the run"),
        (["subnet=MINE", "model.name=cifar_resnet32"], "model belongs to the run"),
        (["subnet=MINE", "train.epoch=3"], "did you mean 'train.epochs'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    call, source: Path, tmp_path: Path, arguments: list[str], wanted: str
) -> None:
    mine = source / "search" / "mine" / "subnet.json"
    layers = json.loads(mine.read_text())["layers"]
    (tmp_path / "cut.json").write_text(mine.read_text()[:300])
    (tmp_path / "foreign.json").write_text(json.dumps({"layers": {**layers, "ghost": layers["linear"]}}))
    three = {"bits": 3, "symmetric": True, "granularity": "tensor"}
    changed = {**layers, "layer1.0.conv1": {**layers["layer1.0.conv1"], "weight": three}}
    (tmp_path / "three.json").write_text(json.dumps({"layers": changed}))
    (tmp_path / "unfinished").mkdir()
    shutil.copy(source / "settings.yaml", tmp_path / "unfinished")
    words = [a.replace("MINE", str(mine)).replace("SOURCE", str(source)) for a in arguments]
    code, _, err = call("train", *words)
    assert code == 2
    assert wanted in one_sentence(err)
    assert not (tmp_path / "runs").exists()
