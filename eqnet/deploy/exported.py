"""An exported file, read back, and where a runtime's codes differ from those of its integers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqnet.deploy.export import read_sidecar, sidecar_path
from eqnet.deploy.reference import IntegerReference
from eqnet.deploy.runtime import Session, installed_version

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported file, read and understood."""

    path: Path
    model: Any
    sidecar: dict[str, Any]
    reference: IntegerReference

    @staticmethod
    def read(path: str | Path) -> Exported:
        """Reads a file and its description.

        Raises:
            ValueError: one is missing or damaged, they do not belong together, or the reference cannot run the graph.
        """
        installed_version("onnx")
        import onnx

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        sidecar = read_sidecar(path)
        try:
            model = onnx.load(path)
        except Exception as error:  # of many kinds
            raise ValueError(f"{path} is damaged or no ONNX file.") from error
        missing = [key for key in ("target", "config", "layers", "quantizers", "input", "output") if key not in sidecar]
        if missing:
            raise ValueError(f"{sidecar_path(path)} is incomplete: {', '.join(missing)} missing.")
        return Exported(path, model, sidecar, IntegerReference(model))

    @property
    def input(self) -> str:
        """Name of the input."""
        return str(self.sidecar["input"]["name"])

    @property
    def output(self) -> str:
        """Name of the output."""
        return str(self.sidecar["output"])

    @property
    def batch(self) -> int:
        """Images that a call must have; 1 if their number is open."""
        return int(self.sidecar.get("batch") or 1)

    def chunks(self, images: Array, size: int = 32) -> Iterator[Array]:
        """Images in parts that the file takes."""
        size = self.batch if self.sidecar.get("batch") else size
        for i in range(0, len(images), size):
            yield images[i : i + size]

    def layer_of(self, codes: str) -> str:
        """The layer that a tensor of codes belongs to, or the name of the quantizer."""
        name = self.reference.quantizers[codes].name
        readers = [n for n, layer in self.reference.layers.items() if layer.act is not None and layer.act.name == name]
        return readers[0] if readers else name

    def calls(self) -> dict[str, tuple[str, int]]:
        """(layer, number of the call) of every node of a quantized layer."""
        return {n: (layer, i) for layer, facts in self.sidecar["layers"].items() for i, n in enumerate(facts["nodes"])}


def find_subnet(exported: Exported, run: Path | None = None) -> tuple[Path, Path]:
    """The `subnet.json` that a file was made of, and the folder of its run.

    Looked for where the description says, beside the file, and anywhere in `run`; the checksum of the tensors decides.

    Raises:
        ValueError: it is in none of these places, or changed since.
    """
    source = exported.sidecar.get("source") or {}
    if "sha256" not in source:
        raise ValueError(f"{sidecar_path(exported.path)} does not say which subnet {exported.path} was made of.")
    if run is not None and not (run / "supernet.json").is_file():
        raise ValueError(f"{run} is not the folder of a trained run (there is no supernet.json).")
    places = [Path(source.get("subnet", "")), exported.path.with_name("subnet.json")]
    for place in places if run is None else sorted(run.rglob("subnet.json")):
        tensors = place.with_name("subnet.safetensors")
        if not place.is_file() or not tensors.is_file():
            continue
        folders = [f for f in (run, *place.resolve().parents) if f is not None and (f / "supernet.json").is_file()]
        if folders and hashlib.sha256(tensors.read_bytes()).hexdigest() == source["sha256"]:
            return place, folders[0]
    where = f"in {run}" if run is not None else "where its description says"
    raise ValueError(f"the subnet that {exported.path} was made of is not {where}; name its run with --run.")


@dataclass
class CodeDifference:
    """How codes of a quantizer differ: how many of how many, by how many steps, how far from a tie (steps)."""

    differing: int = 0
    total: int = 0
    largest: int = 0
    margin: float = 0.0


@dataclass
class LocalDifference:
    """Differences of a runtime from the reference where they arise.

    Attributes:
        codes: by the name of the tensor of codes.
        error: largest difference of an output over its largest value.
    """

    codes: dict[str, CodeDifference]
    error: float = 0.0

    @property
    def differing(self) -> int:
        """Codes that differ."""
        return sum(d.differing for d in self.codes.values())

    @property
    def total(self) -> int:
        """Codes that were compared."""
        return sum(d.total for d in self.codes.values())

    @property
    def largest(self) -> int:
        """Largest difference in steps."""
        return max((d.largest for d in self.codes.values()), default=0)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        share = self.differing / max(self.total, 1)
        return {
            "codes": self.total,
            "differing": self.differing,
            "share": share,
            "largest_step": self.largest,
            "output_error": self.error,
        }


def compare_codes(exported: Exported, session: Session, images: Array) -> LocalDifference:
    """Runs a session that returns codes, and the reference from these codes on.

    Args:
        exported: the file.
        session: of a runtime, loaded with codes as outputs.
        images: float32 [N, C, H, W].
    """
    found = LocalDifference({})
    for x in exported.chunks(images):
        add_differences(found, exported, x, session.run(x))
    return found


def add_differences(into: LocalDifference, exported: Exported, images: Array, theirs: Mapping[str, Array]) -> None:
    """Counts where codes differ from what the reference makes of the codes before them.

    Args:
        into: gets the counts.
        exported: the file.
        images: float32 [N, C, H, W].
        theirs: tensors of codes and the output for these images, by the names of the file.
    """
    reference, output = exported.reference, exported.output
    inputs = {node.output[0]: node.input[0] for node in reference.nodes if node.op_type == "QuantizeLinear"}
    codes = {name: theirs[name] for name in reference.quantizers if name in theirs}
    ours = reference.run({exported.input: images}, [*codes, *inputs.values(), output], codes)
    for name, other in codes.items():
        before = ours[inputs[name]] if name in inputs else None
        _count(
            into.codes.setdefault(name, CodeDifference()), ours[name], other, before, reference.quantizers[name].scale
        )
    error = float(np.abs(ours[output] - theirs[output]).max() / max(np.abs(ours[output]).max(), 1e-30))
    into.error = max(into.error, error)


def _count(into: CodeDifference, own: Array, other: Array, before: Array | None, scale: Array) -> None:
    steps = np.abs(own.astype(np.int64) - other.astype(np.int64))
    into.total += steps.size
    into.differing += int((steps > 0).sum())
    into.largest = max(into.largest, int(steps.max(initial=0)))
    if before is not None and scale.size == 1 and steps.any():
        position = before[steps > 0].astype(np.float64) / float(scale)
        into.margin = max(into.margin, float(np.abs(position - np.floor(position) - 0.5).max()))
