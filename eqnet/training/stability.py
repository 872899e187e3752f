"""Activation instability: how much the inputs of BN layers change with the bit-width (MetaMix, arXiv 2311.06798, figures 1-2).

BN normalises with the statistics of the batch while they are taken, so what a layer shows is its own share.

Shape legend: `B` bit-widths, `L` BN layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eqnet.nn.supernet import BATCH_NORM_TYPES, Supernet, frozen_batch_norm
from eqnet.space import QuantConfig


@dataclass(frozen=True)
class Stability:
    """Statistics of BN inputs, averaged over channels.

    Attributes:
        bits: of the whole network.
        layers: names of the BN layers in the order of the network.
        mean: [B, L].
        variance: [B, L].
    """

    bits: list[int]
    layers: list[str]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    @property
    def instability(self) -> float:
        """Mean over layers of the standard deviation of the variance over bits, relative to its mean; 0 is stable."""
        level = np.maximum(self.variance.mean(0), np.finfo(float).tiny)
        return float((self.variance.std(0) / level).mean()) if self.layers else 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "instability": self.instability,
            "bits": self.bits,
            "layers": self.layers,
            "mean": self.mean.tolist(),
            "variance": self.variance.tolist(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Stability:
        """Inverse of `to_json`."""
        return Stability(data["bits"], data["layers"], np.array(data["mean"]), np.array(data["variance"]))


@torch.no_grad()
def measure_stability(supernet: Supernet, branches: Mapping[int, QuantConfig], images: Tensor) -> Stability:
    """Statistics of BN inputs in each of some configs.

    Args:
        supernet: its buffers and mode stay; its config is as before afterwards.
        branches: configs by bit-width, such as `metamix.branch_configs`.
        images: [N, C, H, W].
    """
    modules = {name: m for name, m in supernet.model.named_modules() if isinstance(m, BATCH_NORM_TYPES)}
    found: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            channels = args[0].detach().float().transpose(0, 1).flatten(1)
            found[name] = (float(channels.mean()), float(channels.var(1, correction=0).mean()))

        return note

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    before, training = supernet.config, supernet.training
    rows = []
    try:
        with frozen_batch_norm(supernet.eval()):
            for config in branches.values():
                supernet.set_config(config)
                supernet(images)
                rows.append([found[name] for name in modules if name in found])
    finally:
        for handle in handles:
            handle.remove()
        supernet.train(training)
        supernet.set_config(before)
    statistics = np.array(rows).reshape(len(rows), -1, 2)
    layers = [name for name in modules if name in found]
    return Stability(list(branches), layers, statistics[:, :, 0], statistics[:, :, 1])
