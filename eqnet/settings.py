"""Typed settings of a run: strict YAML plus dotted `key=value` overrides, saved with the run.

Defaults live here and nowhere else; files in `configs/` hold only what differs, each line with its reason.
Defaults of the method follow EQ-Net (arXiv 2308.07650) and its released code where the paper is silent.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eqnet.documents import parse_yaml, read_yaml

Bits = list[int]
MAX_KEY_PARTS = 8
Granularity = Literal["tensor", "channel"]


def _word(value: Any) -> Any:
    """YAML 1.1 reads the words `on` and `off` as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _text(value: Any) -> Any:
    """A budget of mean bits may look like a number."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Measure = Literal["divergence", "accuracy"]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class ModelSettings(_Section):
    """Which network, and where its float weights come from."""

    name: str = "cifar_resnet20"  # any timm model, or cifar_resnet{20,32,44,56}
    arguments: dict[str, Any] = Field(default_factory=dict)  # passed to timm.create_model
    pretrained: bool = False  # timm's own weights
    weights: str | None = None  # a .pth/.th/.safetensors file, or the folder of an earlier run


class DataSettings(_Section):
    """Which images, how they are split, batched and augmented."""

    name: str = "digits"
    root: str = "data"
    download: bool = False
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    test_fraction: float = Field(0.2, gt=0, lt=1)
    max_images: int | None = Field(None, ge=1)
    batch_size: int = Field(128, ge=1)  # of all processes together
    evaluation_batch_size: int = Field(256, ge=1)  # of each process; small ones that fit the cache are faster on CPU
    workers: int = Field(0, ge=0)
    input_size: list[int] | None = None  # [C, H, W]
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: Literal["none", "shift", "shift_flip", "timm"] = "shift"
    transform: dict[str, Any] = Field(default_factory=dict)  # options of timm's create_transform, with augment "timm"


class SpaceSettings(_Section):
    """What may vary. One choice each gives static quantization-aware training (LSQ)."""

    bits: Bits = Field(default_factory=lambda: list(range(2, 9)))
    act_bits: Bits | None = None  # None: as `bits`
    symmetric: list[bool] = Field(default_factory=lambda: [True, False])
    granularity: list[Granularity] = Field(default_factory=lambda: list[Granularity](("tensor", "channel")))
    fixed: Literal["first_last_8bit", "none"] = "first_last_8bit"
    ties: list[list[str]] = Field(default_factory=list)  # groups of layers that share their formats
    targets: list[str] = Field(default_factory=list)  # hardware targets, one of which must run each sampled subnet

    @model_validator(mode="after")
    def _check(self) -> SpaceSettings:
        for name in ("bits", "act_bits", "symmetric", "granularity"):
            value = getattr(self, name)
            if value is not None and not value:
                raise ValueError(f"space.{name} is empty; give at least one choice")
        for name in ("bits", "act_bits"):
            for b in getattr(self, name) or []:
                if not 2 <= b <= 8:
                    raise ValueError(f"space.{name} has {b}; bit-widths go from 2 to 8")
        return self


class PretrainSettings(_Section):
    """Training in floating point before the supernet."""

    epochs: int | None = Field(None, ge=0)  # None: 30 for random weights, 0 for given ones
    lr: float = Field(4e-3, gt=0)


class TrainSettings(_Section):
    """The supernet: sandwich step with guidance (GPG-Loss) and weight distribution regularisation (WDR-Loss)."""

    epochs: int = Field(40, ge=0)
    lr: float = Field(1e-3, gt=0)
    step_size_lr: float = Field(1e-3, gt=0)  # step sizes have a group of their own, without weight decay
    weight_decay: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)
    clip_value: float | None = Field(1.0, gt=0)
    clip_norm: float | None = Field(None, gt=0)
    accumulation: int = Field(1, ge=1)  # micro-batches per optimizer step
    num_random: int = Field(1, ge=0)  # random subnets between largest and smallest
    form_per: Literal["layer", "net"] = "layer"
    guidance: float = Field(0.5, ge=0, le=1)  # lambda of GPG-Loss (official code)
    guided_by: Literal["previous", "largest"] = "previous"  # subnet of the same step
    temperature: float = Field(1.0, gt=0)
    teacher: Literal["none", "float"] = "none"  # "float": the largest subnet is guided by the float model
    kurtosis: float = Field(0.015, ge=0)  # weights of WDR-Loss in the official code; the paper implies 1 and 1
    skewness: float = Field(1.0, ge=0)
    kurtosis_target: float = 1.8
    wdr_first_layer: bool = False  # the official code leaves the first layer out, the paper takes all
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    # "on": the quantizers, "network": the whole network, "auto": the quantizers where it pays
    compile: Annotated[Literal["auto", "on", "off", "network"], BeforeValidator(_word)] = "auto"
    integer: Switch = "auto"  # forward passes on integers; auto: where the CPU has the kernels and precision is fp32
    cuda_graph: Switch = "auto"  # a step's gradients as one CUDA graph; auto: on one GPU, unless precision is fp16
    sync_bn: bool = False  # GPU only: BN statistics over all processes
    calibration_images: int = Field(256, ge=1)
    checkpoint_steps: int = Field(200, ge=1)
    log_steps: int = Field(10, ge=1)
    evaluate_epochs: int = Field(10, ge=0)  # 0: only at the end
    evaluate_bits: Bits = Field(default_factory=lambda: [2, 4, 8])  # the chosen few, in the first form of the space

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.precision == "fp16" and self.clip_value is not None and self.clip_norm is not None:
            raise ValueError("train.precision=fp16 clips once: set train.clip_value=null or train.clip_norm=null")
        return self


class MetaMixSettings(_Section):
    """MetaMix: bits are selected while training, within a budget; two phases before that of the supernet."""

    budget: Annotated[str | None, BeforeValidator(_text)] = None  # as in search.py; None: no selection
    latency_table: str | None = None  # times of layers on the device, for a budget that limits latency
    select_epochs: int = Field(10, ge=1)
    warmup_epochs: int = Field(2, ge=0)  # of the selection, bit-meta only
    logit_lr: float = Field(0.1, gt=0)
    act_epochs: int = Field(5, ge=0)  # activations quantized, weights in floating point


class SearchSettings(_Section):
    """Accuracy table, predictor (CQAP), genetic search."""

    table_size: int = Field(240, ge=10)
    bn_images: int = Field(512, ge=1)  # training images that recalibrate BN for each config
    max_validation_images: int | None = Field(None, ge=1)
    integer: Switch = "auto"  # integer kernels measure configs; auto: where the CPU has them
    population: int = Field(100, ge=4)
    generations: int = Field(100, ge=1)
    mutation_probability: float = Field(0.1, gt=0, le=1)
    band: float | None = Field(None, gt=0)  # paper: 0.5, mean bits must lie in (budget - band, budget]
    rounds: int = Field(
        3, ge=1
    )  # each searches, measures its winners on validation, and lets the next predictor learn them
    top_k: int = Field(10, ge=1)  # winners measured in each round
    measure: Measure = "divergence"  # what makes a config the best; from the largest subnet
    score_images: int = Field(64, ge=1)  # labelled training images of an additive score


class Settings(_Section):
    """Everything that defines a run."""

    seed: int = Field(0, ge=0, lt=2**32)
    output: str | None = None  # folder of the run; None: a new one below runs/
    subnet: str | None = None  # a subnet.json: this config alone is trained; None: the supernet
    supernet: str | None = (
        None  # the run whose supernet the subnet comes from; None: the one that holds the file, if any
    )
    tracking: Literal["wandb", "none"] = "wandb"
    project: str = "eqnet"
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    space: SpaceSettings = SpaceSettings()
    pretrain: PretrainSettings = PretrainSettings()
    metamix: MetaMixSettings = MetaMixSettings()
    train: TrainSettings = TrainSettings()
    search: SearchSettings = SearchSettings()

    @property
    def one_subnet(self) -> bool:
        """Whether the run ends with one trained subnet: it is given, or selected by MetaMix."""
        return self.subnet is not None or self.metamix.budget is not None

    @property
    def pretrain_epochs(self) -> int:
        """Epochs of the float phase."""
        if self.pretrain.epochs is not None:
            return self.pretrain.epochs
        return 0 if self.model.pretrained or self.model.weights is not None else 30


FINE_TUNE: dict[str, Any] = {  # what defaults to something else in a run with `subnet`
    "train": {
        "epochs": 10,
        "lr": 3e-4,
        "step_size_lr": 3e-4,
        "teacher": "float",
        "kurtosis": 0.0,  # the weights have found their distribution
        "skewness": 0.0,
    }
}

METAMIX: dict[str, Any] = {  # likewise in a run with `metamix.budget`
    "space": {"symmetric": [True], "granularity": ["channel"]},  # bits are selected, forms are not
    "train": {"lr": 5e-4, "step_size_lr": 3e-4, "teacher": "float", "kurtosis": 0.0, "skewness": 0.0},
}


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def _explain(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        options = list(_paths(Settings))
        near = difflib.get_close_matches(key, options, 1, 0.5) or [
            o for o in options if o.split(".")[-1] == key.split(".")[-1]
        ]
        return f"{source}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
    if first["type"] == "value_error":
        return f"{source}: {first['msg'].removeprefix('Value error, ')}."
    got = (
        ""
        if isinstance(first["input"], (dict, list)) and len(str(first["input"])) > 60
        else f"; got {first['input']!r}"
    )
    return f"{source}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}{got}."


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if (
            isinstance(value, Mapping)
            and isinstance(merged.get(key), Mapping)
            and key not in ("arguments", "transform")
        ):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "settings file")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold settings by name; got a {type(data).__name__}.")
    return data


def _parse_value(text: str) -> Any:
    value = parse_yaml(text, f"the value {text[:50]!r}")
    if isinstance(value, str):  # YAML 1.1 does not read 1e-3 as a number
        with contextlib.suppress(ValueError):
            number = float(value)
            return number if math.isfinite(number) else value
    return value


def load_settings(arguments: Sequence[str], base: Mapping[str, Any] | None = None) -> Settings:
    """Settings from YAML files and `key=value` overrides, later ones winning.

    Args:
        arguments: e.g. `["configs/train/cifar10.yaml", "train.epochs=2", "space.bits=[4]"]`.
        base: settings to start from (those of a run); None starts from the defaults.

    Raises:
        ValueError: one sentence naming the file or override, the key, and the nearest known key.
    """
    data: dict[str, Any] = dict(base or {})
    sources: list[str] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            changes, source = _read_yaml(Path(argument)), argument
        else:
            changes, source = {}, argument
            node = changes
            *parents, leaf = key.strip().split(".")
            if len(parents) > MAX_KEY_PARTS:
                raise ValueError(f"{argument[:50]!r}...: a key has at most {MAX_KEY_PARTS} dots.")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = _parse_value(text)
        data = _merge(data, changes)
        sources.append(source)
        try:
            Settings.model_validate(data)
        except ValidationError as error:
            raise ValueError(_explain(error, source)) from error
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ValueError(_explain(error, "settings")) from error


def dump_settings(settings: Settings) -> str:
    """YAML text that `load_settings` reads back."""
    text: str = yaml.safe_dump(settings.model_dump(), sort_keys=False)
    return text
