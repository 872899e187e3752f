"""By what a config should be measured: which figure on few images ranks configs as their accuracy on other images does.

    python -m benchmarks.ranking_measures --run runs/NAME [--budget 3] [--configs 24] [--json FILE]

Random configs around a number of mean bits. Each figure is taken on some validation images and its ranks are compared with those of
the accuracy on validation images that it has not seen (2,000 are set aside to measure on; means over 60 draws of images), or on
training images and compared with the accuracy on all validation images. The second figure is what choosing the first of the
configs gains over a random one, in percent of those images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.tables import save, show
from eqnet.command import keep_freed_memory
from eqnet.data import Batches, random_subset
from eqnet.nn.compiled import choose_kernels
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, open_data
from eqnet.scoring.evaluation import Evaluator
from eqnet.space.sampling import MeanBitsSampler

SET_ASIDE, TRAINING_IMAGES, DRAWS = 2000, 1000, 60
Figures = dict[str, NDArray[np.float64]]  # of each image


@torch.no_grad()
def classify(supernet: Supernet, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and labels [N]."""
    logits, labels = zip(*((supernet(images), labels) for images, labels in batches.epoch(0)), strict=True)
    return torch.cat(logits), torch.cat(labels)


def figures(logits: Tensor, labels: Tensor, largest: Tensor) -> Figures:
    """Figures of each image, higher is better; `largest` are the logits [N, classes] of the largest subnet."""
    log = logits.log_softmax(1)
    values = {
        "accuracy": (logits.argmax(1) == labels).float(),
        "cross-entropy": -F.nll_loss(log, labels, reduction="none"),
        "probability of the label": log.exp().gather(1, labels[:, None])[:, 0],
        "divergence from the largest subnet": -F.kl_div(log, largest.softmax(1), reduction="none").sum(1),
        "agreement with the largest subnet": (logits.argmax(1) == largest.argmax(1)).float(),
    }
    return {name: value.double().numpy() for name, value in values.items()}


def quality(figure: NDArray[np.float64], accuracy: NDArray[np.float64]) -> tuple[float, float]:
    """Spearman between two figures of each config, [N] both, and the gain of choosing by the first, in percent."""
    return float(spearmanr(figure, accuracy).statistic), 100 * float(accuracy[figure.argmax()] - accuracy.mean())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=3.0, help="mean bits of weights and activations")
    parser.add_argument("--configs", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    run, device = Run.open(arguments.run), torch.device("cpu")
    data, supernet = open_data(run), run.load_supernet()[0].to(memory_format=torch.channels_last)
    supernet.use_kernels(choose_kernels("auto", device))
    evaluator = Evaluator.from_data(supernet, data, run.settings, device)
    size, seed = run.settings.data.evaluation_batch_size, run.settings.seed
    splits = {
        name: Batches(part, size, seed=seed, device=device, train=False, mean=data.mean, std=data.std)
        for name, part in (
            ("validation", data.validation),
            ("training", random_subset(data.train, TRAINING_IMAGES, seed)),
        )
    }
    space, rng = supernet.space, np.random.default_rng(seed)
    genomes = MeanBitsSampler(space).sample(rng, arguments.configs, arguments.budget, arguments.budget)
    largest: dict[str, Tensor] = {}
    found: dict[str, list[Figures]] = {name: [] for name in splits}
    for config in [space.largest(space.forms[0]), *(space.decode(genome) for genome in genomes)]:
        supernet.set_config(config)
        supernet.recalibrate_bn(evaluator.bn_batches)
        for name, batches in splits.items():
            logits, labels = classify(supernet, batches)
            if name not in largest:
                largest[name] = logits
            else:
                found[name].append(figures(logits, labels, largest[name]))
    images = {name: {key: np.stack([f[key] for f in rows]) for key in rows[0]} for name, rows in found.items()}
    validation, training = images["validation"], images["training"]
    correct, rows = validation["accuracy"], {name: {} for name in validation}
    for count in (500, 1000, SET_ASIDE):
        for name, values in validation.items():
            pairs = []
            for _ in range(DRAWS):
                order = rng.permutation(values.shape[1])
                pairs.append(quality(values[:, order[:count]].mean(1), correct[:, order[SET_ASIDE:]].mean(1)))
            rows[name][f"{count} validation images"] = [float(value) for value in np.mean(pairs, axis=0)]
    for name, values in training.items():
        rows[name][f"{TRAINING_IMAGES} training images"] = list(quality(values.mean(1), correct.mean(1)))
    show(Console(width=150, highlight=False), "Spearman with accuracy on other images - gain of the first [%]", rows)
    if arguments.json:
        accuracy = 100 * correct.mean(1)
        spread = {"deviation of the accuracies": f"{accuracy.std():.2f}"}
        save(arguments.json, rows, configs=arguments.configs, best=f"{accuracy.max() - accuracy.mean():.2f}", **spread)


if __name__ == "__main__":
    main()
