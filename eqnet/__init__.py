"""eqnet: one weight-sharing supernet, elastic in bit-width, granularity and symmetry; a subnet for every budget.

Names are imported on first use, so `import eqnet` is cheap and touches no device.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "eqnet.space": [
        "Budget",
        "Form",
        "LayerConfig",
        "LayerInfo",
        "MeanBitsSampler",
        "QuantConfig",
        "QuantFormat",
        "QuantSpace",
        "SandwichSampler",
        "bitops",
        "model_size",
    ],
    "eqnet.nn.supernet": ["Supernet", "recalibrate_bn", "trace_layers"],
    "eqnet.training.losses": ["guidance_loss", "weight_distribution_loss"],
    "eqnet.scoring.evaluation": ["Evaluator", "accuracy"],
    "eqnet.scoring.predictor": ["AccuracyPredictor"],
    "eqnet.search": ["genetic_search", "pareto_search"],
    "eqnet.settings": ["Settings", "load_settings"],
    "eqnet.run": ["Run"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'eqnet' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
