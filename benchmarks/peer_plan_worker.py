"""One process of `benchmarks.peer_plans`: lets another library choose the bit-widths of a network's weights.

    PYTHON benchmarks/peer_plan_worker.py LIBRARY MODEL CHECKPOINT IMAGES BUDGET

Runs in the library's own environment. Builds the CIFAR ResNet MODEL with the float weights of CHECKPOINT (safetensors), reads
`images` float32 [N, 3, H, W] and `labels` int64 [N] of the .npz file IMAGES, and prints as its last line
`{"weight_bits": {layer: bits}, "version": ..., "cpu_s": ...}`: what the library takes for weights of BUDGET mean bits.

- modelopt: `mtq.auto_quantize` between INT8_DEFAULT_CFG and the same with 4-bit weights. It may leave layers in 16 bits,
  which counts into its budget; the plan has them at 8.
- mct: post-training mixed precision of the imx500 profile (weights 8, 4 or 2 bits) under a limit of weight memory.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
import time
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm

BATCH = 16
Batch = tuple[Tensor, Tensor]


def plan_modelopt(model: nn.Module, batches: list[Batch], mean_bits: float) -> dict[str, int]:
    """Gradient scores, then integer programming."""
    import modelopt.torch.quantization as mtq

    wide = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    narrow = copy.deepcopy(wide)
    for rule in narrow["quant_cfg"]:
        if rule.get("quantizer_name") == "*weight_quantizer":
            rule["cfg"]["num_bits"] = 4
    chosen, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": mean_bits},
        quantization_formats=[wide, narrow],
        data_loader=batches,
        forward_step=lambda net, batch: net(batch[0]),
        loss_func=lambda logits, batch: F.cross_entropy(logits, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    quantizers = {name: m.weight_quantizer for name, m in chosen.named_modules() if hasattr(m, "weight_quantizer")}
    return {name: int(q.num_bits) if q.is_enabled else 8 for name, q in quantizers.items()}


def plan_mct(model: nn.Module, batches: list[Batch], mean_bits: float) -> dict[str, int]:
    """Distances of activations, then integer programming."""
    import model_compression_toolkit as mct

    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    options = mct.core.MixedPrecisionQuantizationConfig(num_of_images=BATCH * len(batches))
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        model,
        lambda: ([images.numpy()] for images, _ in batches),
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=sum(weights.values()) * mean_bits / 8),
        core_config=mct.core.CoreConfig(mixed_precision_config=options),
        target_platform_capabilities=mct.get_target_platform_capabilities(tpc_version="1.0", device_type="imx500"),
    )
    found = {}
    for name, module in quantized.named_modules():
        if getattr(module, "weights_quantizers", None):
            found[name.removesuffix("_bn")] = int(module.weights_quantizers["weight"].num_bits)
    return {name: found[name.replace(".", "_")] for name in weights}


PLANNERS = {"modelopt": ("nvidia-modelopt", plan_modelopt), "mct": ("model-compression-toolkit", plan_mct)}


def main(library: str, name: str, checkpoint: str, images: str, budget: str) -> None:
    """Prints the plan."""
    package, planner = PLANNERS[library]
    torch.manual_seed(0)
    arrays: Any = np.load(images)
    x, y = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    model = timm.create_model(name, num_classes=10)
    model.load_state_dict(load_file(checkpoint))
    start = time.process_time()
    plan = planner(model.eval(), list(zip(x.split(BATCH), y.split(BATCH), strict=True)), float(budget))
    seconds = time.process_time() - start
    print(json.dumps({"weight_bits": plan, "version": importlib.metadata.version(package), "cpu_s": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
