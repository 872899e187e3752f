"""Small networks that learn together: the recipe of an accuracy predictor, its training, and fast evaluation.

The K networks of an ensemble see the same inputs and differ in their initial weights. For evaluation the inputs disappear: they
are a sum over genes of what the format of each gene adds, so their standardization and the first layer fold into one table
with a row for each format of each gene. A prediction is a sum of G rows and the layers behind the first; it differs from
the networks by float32 rounding, below 1e-4 points (tested).

Shape legend: `N` configs, `G` genes, `R` formats of all genes, `I` inputs of the networks, `K` networks, `H` hidden units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_CHUNK = 512  # configs scored at a time, so that the hidden units stay in the cache
_PAIR_SHIFTS = 8  # partners of each row in one step of the ranking loss


@dataclass(frozen=True, slots=True)
class PredictorRecipe:
    """Architecture and training of a predictor.

    Attributes:
        hidden: units of each hidden layer.
        depth: number of hidden layers (Linear + ReLU); a linear output without bias follows.
        members: networks averaged; they differ in their initial weights.
        inputs: "onehot" feeds the features as they are, "smooth" three smooth functions of the bits of each layer.
        linear_path: adds a linear map from the inputs to the output of each network.
        standardize: inputs and targets to mean 0 and deviation 1; otherwise targets are accuracy / 100.
        epochs: passes over the table; the learning rate falls to 0 along a cosine.
        batch_size: rows of a step; None means all, where the number of steps acts as the regularizer.
        learning_rate: of Adam, at the first step.
        weight_decay: of Adam, as a gradient of the squared weights.
        ranking_weight: weight of a logistic loss on the order of random pairs, beside the SmoothL1 loss.
    """

    hidden: int = 64
    depth: int = 1
    members: int = 4
    inputs: Literal["smooth", "onehot"] = "smooth"
    linear_path: bool = True
    standardize: bool = True
    epochs: int = 200
    batch_size: int | None = None
    learning_rate: float = 4e-3
    weight_decay: float = 3e-3
    ranking_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "depth", "members", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"predictor.{name} must be at least 1; got {getattr(self, name)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"predictor.batch_size must be at least 1, or None for all rows; got {self.batch_size}.")
        if self.inputs not in ("smooth", "onehot"):
            raise ValueError(f"predictor.inputs must be 'smooth' or 'onehot'; got {self.inputs!r}.")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.ranking_weight < 0:
            raise ValueError(
                "predictor.learning_rate must be positive; its weight_decay and ranking_weight not negative."
            )


PAPER_RECIPE = PredictorRecipe(
    hidden=200,
    depth=7,
    members=1,
    inputs="onehot",
    linear_path=False,
    standardize=False,
    epochs=100,
    batch_size=256,
    learning_rate=4e-4,
    weight_decay=1e-5,
)
"""The official recipe (learning rate constant there); it wants the 6400 rows of the paper."""


class Ensemble:
    """K networks of the same shape, trained together.

    Attributes:
        tensors: "weight.i" [K, in, out], "bias.i" [K, 1, out], "linear" [K, I, 1] (maybe), and the standardization:
            "input" [2, I] (shift, scale), "target" [2] (mean, deviation), float64.
        depth: number of hidden layers.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.depth = sum(name.startswith("bias.") for name in tensors)

    @staticmethod
    def fit(inputs: Tensor, accuracy: Floats, recipe: PredictorRecipe, seed: int) -> Ensemble:
        """Trains on inputs [N, I] and accuracy [N]; independent of global random state and of the gradient mode."""
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.enable_grad(), _one_thread():
            ensemble = Ensemble._initial(inputs.clone(), accuracy, recipe, generator)
            ensemble._train(inputs.clone(), torch.from_numpy(accuracy), recipe, generator)
        return ensemble

    @staticmethod
    def _initial(inputs: Tensor, accuracy: Floats, recipe: PredictorRecipe, generator: torch.Generator) -> Ensemble:
        """Untrained networks with the initial weights of `torch.nn.Linear`, and the standardization."""
        sizes = [inputs.shape[1], *[recipe.hidden] * recipe.depth, 1]
        tensors: dict[str, Tensor] = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            shapes = {"weight": (recipe.members, fan_in, fan_out), "bias": (recipe.members, 1, fan_out)}
            for name in ("weight", "bias") if i < recipe.depth else ("weight",):
                uniform = torch.rand(shapes[name], generator=generator, device="cpu", dtype=torch.float32)
                tensors[f"{name}.{i}"] = (2 * uniform - 1) / math.sqrt(fan_in)
        if recipe.linear_path:
            tensors["linear"] = torch.zeros(recipe.members, sizes[0], 1)
        shift, scale = torch.zeros(sizes[0]), torch.ones(sizes[0])
        target = torch.tensor([0.0, 100.0], dtype=torch.float64)
        if recipe.standardize:
            shift, deviation = inputs.mean(0), inputs.std(0, correction=0)
            scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0)  # constant inputs say nothing
            target = torch.tensor([accuracy.mean(), max(accuracy.std(), 1e-6)], dtype=torch.float64)
        return Ensemble({**tensors, "input": torch.stack([shift, scale]), "target": target})

    def _train(self, inputs: Tensor, accuracy: Tensor, recipe: PredictorRecipe, generator: torch.Generator) -> None:
        parameters = [t.requires_grad_() for name, t in self.tensors.items() if name not in ("input", "target")]
        mean, deviation = self.tensors["target"]
        goal = ((accuracy - mean) / deviation).float()
        shift, scale = self.tensors["input"]
        standard = (inputs - shift) * scale
        rows = len(goal)
        batch = min(recipe.batch_size or rows, rows)
        steps = recipe.epochs * -(-rows // batch)
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(recipe.epochs):
            x, y = standard, goal
            if batch < rows:
                order = torch.randperm(rows, generator=generator, device="cpu")
                x, y = standard[order], goal[order]
            for part, targets in zip(x.split(batch), y.split(batch), strict=True):
                output = self._forward(part)  # [K, N]
                wanted = targets.expand_as(output)
                loss = torch.nn.functional.smooth_l1_loss(output, wanted)
                if recipe.ranking_weight:
                    loss = loss + recipe.ranking_weight * _ranking_loss(output, wanted, generator)
                optimizer.zero_grad()
                (loss * recipe.members).backward()  # each network gets the gradient it would get alone
                optimizer.step()
                schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _forward(self, standard: Tensor) -> Tensor:
        """Standardized accuracy by each network, [K, N], of standardized inputs [N, I]."""
        weight, bias = self.tensors["weight.0"], self.tensors["bias.0"]
        joined = torch.addmm(bias.flatten(), standard, weight.transpose(0, 1).flatten(1)).relu_()  # [N, K * H]
        hidden = joined.unflatten(1, (len(weight), -1)).transpose(0, 1)
        for i in range(1, self.depth):
            hidden = torch.baddbmm(self.tensors[f"bias.{i}"], hidden, self.tensors[f"weight.{i}"]).relu_()
        output: Tensor = (hidden @ self.tensors[f"weight.{self.depth}"])[..., 0]
        if "linear" in self.tensors:
            output = output + (standard @ self.tensors["linear"][..., 0].T).T
        return output


class FoldedEnsemble:
    """An ensemble for configs: a first layer that is a sum of table rows, one for each gene.

    Attributes:
        table: [R, K * H + 2], zero-padded; the two are the linear path and its negative, which add up behind the ReLU.
    """

    def __init__(self, ensemble: Ensemble, inputs: Tensor, counts: NDArray[np.int64]) -> None:
        """Folds the standardization and the first layer, in float64.

        Args:
            ensemble: trained.
            inputs: for every gene and each of its formats the inputs of the config that has this format there and format 0
                elsewhere, [R, I]; inputs must be sums over genes.
            counts: formats of each gene, [G].
        """
        tensors, self._depth = ensemble.tensors, ensemble.depth
        weight = tensors["weight.0"].double()
        self._shape = (len(weight), weight.shape[2])
        linear = tensors.get("linear", torch.zeros(len(weight), len(weight[0]), 1)).double().mean(0)
        shift, scale = tensors["input"].double()
        columns = torch.cat([weight.transpose(0, 1).flatten(1), linear, -linear], 1)
        first = (inputs.double() - shift) * scale @ columns  # [R, K * H + 2]
        # What a gene adds is centred, so that sums stay small; what is left over goes to all genes alike.
        gene = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        added = first - first[0]
        mean = torch.zeros(len(counts), first.shape[1], dtype=torch.float64).index_add_(0, gene, added)
        mean /= torch.from_numpy(counts)[:, None]
        bias = torch.cat([tensors["bias.0"].double().flatten(), torch.zeros(2)])
        rows = added - mean[gene] + (first[0] + bias + mean.sum(0)) / len(counts)
        units = rows.shape[1]
        self.table = torch.nn.functional.pad(rows, (0, -units % 16)).float()
        output = tensors[f"weight.{self._depth}"].flatten() / len(weight)
        self._output = torch.cat([output, torch.tensor([1.0, -1.0]), torch.zeros(self.table.shape[1] - units)])
        self._deep = [(tensors[f"bias.{i}"], tensors[f"weight.{i}"]) for i in range(1, self._depth)]
        self._mean, self._deviation = tensors["target"].tolist()
        self._offsets = (np.cumsum(counts) - counts).astype(np.int32)

    @torch.no_grad()
    def predict(self, genomes: NDArray[np.int16]) -> Floats:
        """Accuracy in percent, the mean of the networks, float64 [N], of genomes [N, G].

        With one hidden layer the prediction of a config does not depend on the others that it is predicted with.
        """
        out = np.empty(len(genomes))
        with _one_thread():
            for i in range(0, len(genomes), _CHUNK):
                rows = torch.from_numpy(np.add(genomes[i : i + _CHUNK], self._offsets, dtype=np.int32))
                hidden = torch.nn.functional.embedding_bag(rows, self.table, mode="sum").relu_()
                if self._deep:
                    hidden = self._behind(hidden)
                out[i : i + _CHUNK] = (hidden * self._output).sum(1).numpy()
        out *= self._deviation
        out += self._mean
        return out

    def _behind(self, hidden: Tensor) -> Tensor:
        """The last hidden layer from the first, both as in `table`."""
        members, units = self._shape
        deep = hidden[:, : members * units].unflatten(1, self._shape).transpose(0, 1)
        for bias, weight in self._deep:
            deep = torch.baddbmm(bias, deep, weight).relu_()
        return torch.cat([deep.transpose(0, 1).flatten(1), hidden[:, members * units :]], 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that a search does not depend on the number of threads; small networks lose nothing by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ranking_loss(output: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of log(1 + exp(-difference)) over random pairs, the difference in the wanted direction; both [K, N]."""
    rows = output.shape[1]
    shifts = torch.randint(rows, (_PAIR_SHIFTS, 1), generator=generator, device="cpu")
    partner = (torch.arange(rows) + shifts) % rows  # [shifts, N]
    sign = (wanted[:, None] - wanted[:, partner]).sign()
    wrong = -sign * (output[:, None] - output[:, partner])
    loss: Tensor = (torch.nn.functional.softplus(wrong) * sign.abs()).mean()
    return loss
