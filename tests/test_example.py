"""The trained CIFAR-10 supernet in examples/cifar10 is what its files and README say, on real test images.

`data/cifar10_test.webp` holds the first 300 test images of CIFAR-10 (A. Krizhevsky, "Learning Multiple Layers of Features from
Tiny Images", 2009), lossless, 20 in a row.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau
from torch import Tensor

from eqnet import AccuracyPredictor, Budget
from eqnet.deploy.subnet import load_subnet
from eqnet.run import Run
from eqnet.scoring.evaluation import DIVERGENCE, VALIDATION
from eqnet.scoring.table import read_rows, table_genomes

DATA = Path(__file__).resolve().parent / "data"
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10"
SUBNETS = ("w2.5-a2.5", "w3-a3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("example") / "cifar10"))


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    sheet = np.asarray(Image.open(DATA / "cifar10_test.webp").convert("RGB"))
    tiles = sheet.reshape(15, 32, 20, 32, 3).swapaxes(1, 2).reshape(300, 32, 32, 3)
    labels = torch.tensor(json.loads((DATA / "cifar10_test_labels.json").read_text()))
    return torch.tensor(tiles).movedim(3, 1).float() / 255, labels


@pytest.mark.parametrize("name", SUBNETS)
def test_a_subnet_classifies_test_images_as_well_as_its_file_says(name, folder, images):
    path = folder / "search" / name / "subnet.json"
    document = json.loads(path.read_text())
    subnet = load_subnet(path, folder)
    mean, std = (torch.tensor(subnet.facts[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        right = subnet.module((images[0] - mean) / std).argmax(1) == images[1]
    stated = document["accuracy"]["test"] / 100
    assert abs(right.float().mean() - stated) < 3.5 * math.sqrt(stated * (1 - stated) / 300)
    space = Run.open(folder).load_supernet()[0].space
    assert Budget.parse(document["budget"]).bind(space).feasible(space.encode_all([subnet.config])).all()


def test_the_readme_states_what_the_subnets_have():
    text = (EXAMPLE.parent.parent / "README.md").read_text()
    for name in SUBNETS:
        document = json.loads((EXAMPLE / "search" / name / "subnet.json").read_text())
        for found in ("best_searched", "best_uniform"):
            assert f"{document[found]['accuracy']['test']:.2f} %" in text


def test_the_predictor_ranks_the_rows_of_the_table(folder):
    space = Run.open(folder).load_supernet()[0].space
    predictor = AccuracyPredictor.load(folder / "predictor.safetensors", space)
    rows = dict(read_rows(folder / "table", (VALIDATION, DIVERGENCE)))
    genomes = table_genomes(space, len(rows), json.loads((folder / "table" / "header.json").read_text())["seed"])
    accuracy, divergence = np.array([rows[i] for i in range(len(rows))]).T
    assert len(rows) >= 100
    assert kendalltau(predictor.score(genomes), -divergence).statistic > 0.9  # what it learned
    assert kendalltau(predictor.score(genomes), accuracy).statistic > 0.7
