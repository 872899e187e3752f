"""What may vary in a quantized network, and what it costs. numpy only."""

from eqnet.space.budget import BoundBudget, Budget
from eqnet.space.cost import (
    COSTS,
    CostModel,
    act_bits,
    act_compression,
    bitops,
    model_size,
    weight_bits,
    weight_compression,
)
from eqnet.space.qconfig import (
    ALL_FORMS,
    MAX_BITS,
    MIN_BITS,
    Form,
    Granularity,
    LayerConfig,
    LayerInfo,
    QuantConfig,
    QuantFormat,
)
from eqnet.space.sampling import MeanBitsSampler, SandwichSampler
from eqnet.space.space import Gene, Genomes, QuantSpace, Slot

__all__ = [
    "ALL_FORMS",
    "COSTS",
    "MAX_BITS",
    "MIN_BITS",
    "BoundBudget",
    "Budget",
    "CostModel",
    "Form",
    "Gene",
    "Genomes",
    "Granularity",
    "LayerConfig",
    "LayerInfo",
    "MeanBitsSampler",
    "QuantConfig",
    "QuantFormat",
    "QuantSpace",
    "SandwichSampler",
    "Slot",
    "act_bits",
    "act_compression",
    "bitops",
    "model_size",
    "weight_bits",
    "weight_compression",
]
