"""The two commands as a user meets them: the main job on digits, bad input, nothing overwritten."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import FAST, ROOT, TINY, launch, one_sentence
from PIL import Image
from safetensors.torch import load_file, save_file

# -- the main job -----------------------------------------------------------------------------------------------------


def test_search_writes_what_it_promises(call, run: Path) -> None:
    code, out, err = call("search", "--budget", "5", "--run", run, "--pareto", *FAST)
    assert code == 0, err
    folder = run / "search" / "w5-a5"
    assert {p.name for p in folder.iterdir()} == {
        "subnet.json", "subnet.safetensors", "pareto.csv", "pareto.png", "bits.png"
    }  # fmt: skip
    subnet = json.loads((folder / "subnet.json").read_text())
    assert subnet["cost"]["w"] <= 5
    assert subnet["cost"]["a"] <= 5
    for other in ("best_searched", "best_uniform"):
        assert subnet["divergence"] <= subnet[other]["divergence"]
        assert subnet[other]["cost"]["w"] <= 5
    for picture in ("bits.png", "pareto.png"):
        assert np.asarray(Image.open(folder / picture)).std() > 5
    assert (run / "predictor.png").exists()
    header, *rows = (folder / "pareto.csv").read_text().splitlines()
    assert header.startswith("predicted,w,a,size,bitops,form,conv1.weight")
    predicted = [float(r.split(",")[0]) for r in rows]
    costs = [float(r.split(",")[4]) for r in rows]
    assert predicted == sorted(predicted)
    assert costs == sorted(costs)
    # the stored config measures as it was reported, and a second search changes nothing of the first
    code, out, err = call("search", "--subnet", folder / "subnet.json", "--run", run, *FAST)
    assert code == 0, err
    assert f"test {subnet['accuracy']['test']:.2f} %" in out
    code, _, _ = call("search", "--budget", "5", "--run", run, *FAST)
    assert code == 0
    again = run / "search" / "w5-a5-2" / "subnet.json"
    assert again.read_bytes() == (folder / "subnet.json").read_bytes()


def test_a_search_by_accuracy_needs_no_other_table_and_returns_the_most_accurate(call, run: Path) -> None:
    def rows() -> list[list[bytes]]:
        return [path.read_bytes().split() for path in sorted((run / "table").glob("rows-*.jsonl"))]

    assert call("search", "--budget", "w=3", "--run", run, *FAST)[0] == 0
    before, predictor = rows(), (run / "predictor.safetensors").read_bytes()
    code, _, err = call("search", "--budget", "w=3", "--run", run, *FAST, "search.measure=accuracy")
    assert code == 0, err
    subnet = json.loads((run / "search" / "w3-2" / "subnet.json").read_text())
    for other in ("best_searched", "best_uniform"):
        assert subnet["accuracy"]["validation"] >= subnet[other]["accuracy"]["validation"]
    assert rows() == before
    assert (run / "predictor.safetensors").read_bytes() != predictor


def test_an_extracted_subnet_is_integer(call, run: Path) -> None:
    code, _, err = call("search", "--budget", "w=4", "--form", "tensor-sym-sym", "--run", run, *FAST)
    assert code == 0, err
    from eqnet.checkpoint import load_tensors

    folder = run / "search" / "w4-tensor-sym-sym"
    layers = json.loads((folder / "subnet.json").read_text())["layers"]
    tensors = load_tensors(folder / "subnet.safetensors")
    for name, layer in layers.items():
        codes, bits = tensors[f"{name}.weight_codes"], layer["weight"]["bits"]
        assert codes.dtype == torch.int8
        assert codes.int().min() >= -(2 ** (bits - 1))
        assert codes.int().max() < 2 ** (bits - 1)


@pytest.mark.slow
def test_the_table_is_sharded_without_loss_or_duplicates(call, run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(run, folder)
        shutil.rmtree(folder / "table", ignore_errors=True)
        shutil.rmtree(folder / "search", ignore_errors=True)
    code, _, err = call("search", "--budget", "5", "--run", one, *FAST)
    assert code == 0, err
    launch(2, str(ROOT / "search.py"), "--budget", "5", "--run", str(two), *FAST, cwd=tmp_path)

    def rows(folder: Path) -> list[tuple[int, float]]:
        lines = [line for p in folder.glob("table/rows-*.jsonl") for line in p.read_text().splitlines() if line]
        return sorted((r["index"], r["accuracy"]) for r in map(json.loads, lines))

    assert len(list(two.glob("table/rows-*.jsonl"))) == 2
    assert [i for i, _ in rows(two)] == list(range(20))
    assert rows(two) == rows(one)
    assert (one / "search/w5-a5/subnet.json").read_text() == (two / "search/w5-a5/subnet.json").read_text()


def test_a_table_continues_where_it_was_cut(call, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "search", ignore_errors=True)
    code, _, err = call("search", "--budget", "6", "--run", folder, *FAST)
    assert code == 0, err
    shard = folder / "table" / "rows-0.jsonl"
    whole = sorted(line for line in shard.read_text().splitlines() if line)
    text = "\n".join(whole[:7])
    shard.write_text(text + "\n" + whole[7][:12])  # killed in the middle of a line
    code, _, err = call("search", "--budget", "6", "--run", folder, *FAST)
    assert code == 0, err
    complete = [line for line in shard.read_text().splitlines() if line.endswith("}")]
    assert sorted(complete) == whole


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("train.epoch=2", "did you mean 'train.epochs'"),
        ("tracing=none", "did you mean 'tracking'"),
        ("train.epochs=many", "valid integer"),
        ("train.epochs=1.5", "valid integer"),
        ("space.bits=[1, 4]", "from 2 to 8"),
        ("space.bits=[9]", "from 2 to 8"),
        ("space.bits=[]", "empty"),
        ("space.symmetric=[]", "empty"),
        ("no_such_file.yaml", "no_such_file.yaml"),
        ("data.name=no_such_folder", "no_such_folder"),
        ("data.name=cifar10", "download"),
        ("model.name=no_such_model", "no_such_model"),
        ("model.arguments={colour: red}", "colour"),
        ("model.weights=missing.pth", "missing.pth"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(call, tmp_path: Path, argument: str, wanted: str) -> None:
    code, _, err = call("train", argument)
    assert code == 2
    assert wanted in one_sentence(err)
    assert not (tmp_path / "runs").exists()


def test_weights_that_do_not_fit_list_the_keys(call, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"module.conv1.weight": torch.zeros(3), "module.extra": torch.zeros(1)}}, tmp_path / "w.pth"
    )
    code, _, err = call("train", "model.weights=w.pth", *TINY)
    assert code == 2
    assert "extra" in one_sentence(err)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"train_labels": np.array([0, 1, 2, -1] * 10)}, "label"),
        (
            {"train_images": np.zeros((0, 8, 8, 1), np.uint8), "train_labels": np.zeros(0, np.int64)},
            "empty|no images|0",
        ),
        ({"train_images": np.zeros((40, 8, 8, 1), np.float32)}, "uint8"),
    ],
    ids=["labels", "empty", "dtype"],
)
def test_bad_arrays(call, tmp_path: Path, changes: dict, wanted: str) -> None:
    images, labels = np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "bad.npz", **{**arrays, **changes})
    code, _, err = call("train", "data.name=bad.npz", *TINY)
    assert code == 2
    assert re.search(wanted, one_sentence(err))


def test_an_unreadable_image_is_named(call, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
                if split == "train" and i > 8:
                    (folder / f"{i}.png").write_bytes(b"not an image")
    code, _, err = call("train", "data.name=images", "data.augment=none", "data.batch_size=4", *TINY[:-3])
    assert code == 2
    assert ".png" in one_sentence(err)


def test_a_model_without_quantizable_layers_is_refused() -> None:
    from eqnet.nn.supernet import trace_layers

    with pytest.raises(ValueError, match="no quantizable layer"):
        trace_layers(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), (3, 8, 8))


def test_an_existing_run_is_not_overwritten(call, run: Path) -> None:
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    code, _, err = call("train", f"output={run}", *TINY)
    assert code == 2
    assert "--resume" in one_sentence(err)
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_a_resumed_run_keeps_its_settings(call, run: Path) -> None:
    code, _, err = call("train", f"output={run}", *TINY, "train.epochs=9", "--resume")
    assert code == 2
    assert "train.epochs" in one_sentence(err)


def test_a_diverging_run_stops_and_names_the_part(call, tmp_path: Path) -> None:
    code, _, err = call("train", "output=diverged", *TINY, "pretrain.epochs=0", "train.skewness=1e39")
    assert code == 2
    assert re.search(r"loss part '[\w/]+' is not finite after \d+ steps", one_sentence(err))
    assert (tmp_path / "diverged" / "float.safetensors").exists()
    assert not (tmp_path / "diverged" / "supernet.json").exists()


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        ("1", "smallest reachable is w=2"),
        ("size=1KiB", "smallest reachable is size="),
        ("bitops=1", "smallest reachable is bitops="),
        ("four", "write for example"),
        ("wbits=3", "unknown limit"),
        ("size=3", "unit"),
        ("latency=2ms", "latency"),
        ("-3", "write for example"),
    ],
)
def test_bad_budgets(call, run: Path, budget: str, wanted: str) -> None:
    before = sorted(p.name for p in run.iterdir())
    code, _, err = call("search", f"--budget={budget}", "--run", run, *FAST)
    assert code == 2
    assert wanted in one_sentence(err)
    assert sorted(p.name for p in run.iterdir()) == before


def test_search_without_a_run(call, run: Path, tmp_path: Path) -> None:
    code, _, err = call("search", "--budget", "4")
    assert code == 2
    assert "train.py" in one_sentence(err)
    code, _, err = call("search", "--budget", "4", "--run", "nowhere")
    assert code == 2
    assert "nowhere" in one_sentence(err)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(run / "settings.yaml", tmp_path / "unfinished")
    code, _, err = call("search", "--budget", "4", "--run", "unfinished")
    assert code == 2
    assert "no trained supernet" in one_sentence(err)
    code, _, err = call("search", "--budget", "4", "--run", run, "train.epochs=3000")
    assert code == 2
    assert "train" in one_sentence(err)


def test_damaged_and_foreign_supernets(call, run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = (broken / "supernet.safetensors").read_bytes()
    (broken / "supernet.safetensors").write_bytes(weights[: len(weights) // 2])
    code, _, err = call("search", "--budget", "4", "--run", broken, *FAST)
    assert code == 2
    assert "truncated" in one_sentence(err)
    tensors = load_file(run / "supernet.safetensors")
    key = next(k for k in tensors if k.endswith("zero_point"))
    tensors[key][0] += 0.5
    save_file(tensors, broken / "supernet.safetensors")
    code, _, err = call("search", "--budget", "4", "--run", broken, *FAST)
    assert code == 2
    assert "zero points" in one_sentence(err)
    (broken / "supernet.safetensors").write_bytes(weights)
    text = (broken / "supernet.json").read_text()
    (broken / "supernet.json").write_text(text[: len(text) // 2])
    code, _, err = call("search", "--budget", "4", "--run", broken, *FAST)
    assert code == 2
    assert "supernet.json" in one_sentence(err)
    (broken / "supernet.json").write_text(text)
    settings = (broken / "settings.yaml").read_text()
    (broken / "settings.yaml").write_text(settings.replace("width: 4", "width: 6"))
    code, _, err = call("search", "--budget", "4", "--run", broken, *FAST)
    assert code == 2
    assert "does not belong to this model" in one_sentence(err)
    (broken / "settings.yaml").write_text(settings.replace("cifar_resnet20", "cifar_resnet32"))
    code, _, err = call("search", "--budget", "4", "--run", broken, *FAST)
    assert code == 2
    assert "does not belong to this model" in one_sentence(err)


def test_foreign_subnets(call, run: Path, tmp_path: Path) -> None:
    code, _, err = call("search", "--budget", "5", "--run", run, *FAST)
    assert code == 0, err
    document = json.loads((run / "search" / "w5-a5" / "subnet.json").read_text())
    layers = document["layers"]

    def refused(changed: object, wanted: str) -> None:
        (tmp_path / "subnet.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
        code, _, err = call("search", "--subnet", "subnet.json", "--run", run, *FAST)
        assert code == 2
        assert wanted in one_sentence(err)

    refused({**document, "layers": {k: v for k, v in layers.items() if k != "linear"}}, "misses linear")
    refused({**document, "layers": {**layers, "ghost": layers["linear"]}}, "foreign ghost")
    refused({**document, "layers": {**layers, "linear": {"weight": {"bits": 3}, "act": None}}}, "linear")
    refused({"budget": "5"}, "no layers")
    refused(json.dumps(document)[:200], "truncated")
    refused("[1, 2]", "no layers")
