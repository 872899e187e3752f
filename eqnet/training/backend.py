"""How the steps of a run are computed: on which kernels, on integers or simulated, and as a CUDA graph or not."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from eqnet.nn.compiled import choose_kernels, traced_kernels
from eqnet.nn.integer import kernels_available
from eqnet.nn.kernels import Kernels
from eqnet.settings import TrainSettings

COMPILE_PAYS = 3e9  # quantized inputs of a whole run on CPU from which compiling, 10 to 20 s, saves more than it costs


def training_kernels(settings: TrainSettings, device: torch.device, quantized_inputs: int) -> Kernels:
    """The kernels of the quantizers.

    Args:
        settings: `compile` decides.
        device: where they run.
        quantized_inputs: values of activations that the whole run quantizes in this process.

    Raises:
        ValueError: they should be compiled, and cannot.
    """
    mode = settings.compile
    if mode == "auto" and device.type == "cpu" and quantized_inputs < COMPILE_PAYS:
        mode = "off"
    if mode == "network":
        choose_kernels("on", device)  # says so at once if nothing can be compiled
        return traced_kernels()
    return choose_kernels(mode, device)


def on_integers(settings: TrainSettings, device: torch.device) -> bool:
    """Whether forward passes of training run on integers.

    Raises:
        ValueError: they should, and cannot.
    """
    cpu = device.type == "cpu" and kernels_available()
    possible = cpu and settings.precision != "fp16" and settings.compile != "network"
    if settings.integer == "on" and not possible:
        raise ValueError(
            "train.integer=on needs a CPU with integer kernels (VNNI instructions), train.precision=fp32 or bf16, and "
            "train.compile other than network; set train.integer=off."
        )
    return possible and (settings.integer == "on" or (settings.integer == "auto" and settings.precision == "fp32"))


def as_cuda_graph(settings: TrainSettings, accelerator: Accelerator) -> bool:
    """Whether the gradients of a supernet step run as a CUDA graph.

    Raises:
        ValueError: they should, and cannot.
    """
    gpu = accelerator.device.type == "cuda"
    possible = gpu and accelerator.num_processes == 1 and settings.precision != "fp16"
    if settings.cuda_graph == "on" and not possible:
        raise ValueError(
            "train.cuda_graph=on needs a CUDA device, one process, and train.precision=fp32 or bf16; set train.cuda_graph=off."
        )
    return possible and settings.cuda_graph != "off"


def check_backend(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Raises ValueError for what the settings ask for and this machine, or this launch, does not have."""
    on_integers(settings, accelerator.device)
    as_cuda_graph(settings, accelerator)
