"""What a report reads of the JSON files in a run's folder, checked: each file may hold more, none may hold something else."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from eqnet.checkpoint import read_json


class SupernetFacts(BaseModel):
    """Of `supernet.json`, besides the space."""

    num_classes: int | None = None
    input_size: list[int] = []
    uncovered: list[str] = []
    versions: dict[str, str] = {}


class UniformFacts(BaseModel):
    """A uniform config, its accuracies in percent, and its divergence from the largest subnet in nats if it was measured."""

    bits: int
    form: str
    validation: FiniteFloat
    test: FiniteFloat
    divergence: FiniteFloat | None = None


class Evaluation(BaseModel):
    """Of `evaluation.json`: accuracies in percent by split, of the uniform configs or of the one subnet of a run."""

    float_network: dict[str, FiniteFloat] = Field(default={}, alias="float")
    uniform: list[UniformFacts] = []
    subnet: dict[str, FiniteFloat] = {}


class ConfigFacts(BaseModel):
    """A config in `subnet.json`: form, costs in the units of `eqnet.space.cost`, accuracies in percent, divergence in nats."""

    form: str = ""
    cost: dict[str, FiniteFloat] = {}
    accuracy: dict[str, FiniteFloat] = {}
    divergence: FiniteFloat | None = None


class SubnetFacts(ConfigFacts):
    """Of `subnet.json`, besides the layers; `score` is the additive score that "predicted" is the negative loss of."""

    budget: str | None = None
    target: str | None = None
    method: str | None = None
    score: str | None = None
    best_searched: ConfigFacts | None = None
    best_uniform: ConfigFacts | None = None


class Statement(BaseModel):
    """One line of a certificate."""

    verdict: str
    step: str
    text: str
    layer: str | None = None


class CertificateFacts(BaseModel):
    """Of the certificate of an exported file."""

    verdict: str
    target: str | None = None
    runtime: str | None = None
    images: int | None = None
    split: str | None = None
    sha256: str | None = None
    lines: list[Statement] = []


class SplitFacts(BaseModel):
    """Of `split.json`: numbers of the images by split."""

    indices: dict[str, list[int]]


class TableHeader(BaseModel):
    """Of `table/header.json`: the seed of the configs, and the genes that they have values for."""

    seed: int
    genes: list[list[str | int]]


Facts = TypeVar("Facts", bound=BaseModel)


def read_facts(path: Path, kind: type[Facts]) -> Facts | None:
    """A JSON file as what it should be; None if there is no such file.

    Raises:
        ValueError: the file is damaged or of another kind; the sentence names the file and the place in it.
    """
    if not path.is_file():
        return None
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{path} is not what eqnet writes; {place}: {first['msg']}.") from error
