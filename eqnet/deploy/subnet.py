"""A searched subnet read back from its run: the module with integer weights, its config, and where it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eqnet.checkpoint import load_tensors, read_json
from eqnet.data import Batches, calibration_batches, random_subset
from eqnet.run import Run, open_data
from eqnet.space import LayerInfo, QuantConfig

_BATCH = 64


@dataclass(frozen=True)
class SavedSubnet:
    """A `subnet.json` and the `subnet.safetensors` beside it.

    Attributes:
        module: as `Supernet.extract` gives it, BN recalibrated, in eval mode.
        config: its formats.
        layers: facts about its layers.
        run: the run that it was searched in.
        facts: of the run's supernet: "input_size", "num_classes", "mean", "std", ...
        source: "run", "subnet" and the "sha256" of the tensors.
    """

    module: nn.Module
    config: QuantConfig
    layers: tuple[LayerInfo, ...]
    run: Run
    facts: dict[str, Any]
    source: dict[str, str]

    @property
    def input_size(self) -> tuple[int, ...]:
        """`(C, H, W)` of one image."""
        return tuple(self.facts["input_size"])

    def training_images(self, num_images: int) -> Iterator[Tensor]:
        """Training images without augmentation; the data are opened when asked for."""
        settings = self.run.settings
        yield from calibration_batches(
            open_data(self.run), num_images, _BATCH, settings.seed, "cpu", settings.data.workers
        )

    def labelled_images(self, num_images: int, split: Literal["validation", "test"]) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] of a split, normalised, and their labels [N]; all if there are fewer."""
        data, settings = open_data(self.run), self.run.settings
        chosen = random_subset(data.validation if split == "validation" else data.test, num_images, settings.seed)
        batches = Batches(
            chosen, _BATCH, seed=settings.seed, device="cpu", train=False,
            mean=data.mean, std=data.std, workers=settings.data.workers,
        )  # fmt: skip
        images, labels = zip(*batches.epoch(0), strict=True)
        return torch.cat(images), torch.cat(labels)


def load_subnet(path: str | Path, run_folder: str | Path) -> SavedSubnet:
    """Reads a subnet of a run.

    Args:
        path: the `subnet.json`.
        run_folder: the folder of its run.

    Raises:
        ValueError: a file is missing or damaged, or the subnet is not one of the run.
    """
    path, run = Path(path), Run.open(run_folder)
    document = read_json(path)
    supernet, facts = run.load_supernet()
    try:
        config = QuantConfig.from_json(document["layers"])
        supernet.space.check(config)
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a subnet: it has no layers.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    weights = path.with_name("subnet.safetensors")
    tensors, module = load_tensors(weights), supernet.extract(config)
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise ValueError(f"{weights} does not belong to {path}; these keys do not fit: {', '.join(wrong[:5])}.")
    module.load_state_dict(tensors)
    source = {"run": str(run.path), "subnet": str(path), "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    return SavedSubnet(module, config, tuple(supernet.space.layers), run, facts, source)
