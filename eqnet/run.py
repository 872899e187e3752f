"""The folder of a run: settings, data split, checkpoints, the trained supernet, and everything later built from it.

    runs/<name>/  settings.yaml  split.json  metrics.jsonl  float.safetensors  supernet.safetensors  supernet.json
                  checkpoints/<phase>-<step>/   evaluation.json|png   used.json   table/  predictor.*  search/<budget>/  latency/<target>.json

Nothing that exists is overwritten by another run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from timm.data import resolve_data_config
from torch import nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from eqnet.checkpoint import (
    atomic_write_text,
    load_float_weights,
    load_tensors,
    read_object,
    save_tensors,
    write_json,
)
from eqnet.data import DataSplits, load_data
from eqnet.lock import LOCK_FILE, claimed, locked, take_lock
from eqnet.nn.supernet import Supernet
from eqnet.run_checkpoints import Checkpoints
from eqnet.settings import ModelSettings, Settings, SpaceSettings, dump_settings, load_settings
from eqnet.space import LayerInfo, QuantFormat, QuantSpace, Slot
from eqnet.space.hardware import load_target
from eqnet.usage import Usage

LATEST = Path("runs") / ".latest"  # holds the name of the run in `runs/` that was started last


class Run:
    """One run's folder."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.usage = Usage(path)
        self._search: FileLock | None = None

    # -- finding and making -------------------------------------------------------------------------------------------

    @staticmethod
    def create(settings: Settings, accelerator: Accelerator) -> Run:
        """Makes the folder `settings.output`, or a new one below `runs/`; all processes get the same.

        Raises:
            ValueError: the folder already holds something, or cannot be written.
        """
        answer: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                answer = [Run._make_folder(settings)]
            except (ValueError, OSError) as error:
                answer = [error]
        broadcast_object_list(answer)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        if isinstance(answer[0], OSError):
            raise ValueError(f"cannot make the run's folder: {answer[0]}.") from answer[0]
        return Run(Path(answer[0]), settings)

    @staticmethod
    def _make_folder(settings: Settings) -> str:
        if settings.output is None:
            path = Run._unused_folder(settings)
        else:
            path = Path(settings.output)
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} already exists and is a file; give another output=.")
            path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            # of a run that was killed while it began
            leftovers = {path / LOCK_FILE, *path.glob(".settings.yaml.*.tmp")}
            if any(p not in leftovers for p in path.iterdir()):
                raise ValueError(f"{path} already exists; continue that run with --resume or give another output=.")
            atomic_write_text(path / "settings.yaml", dump_settings(settings))
        if path.parent == Path("runs"):
            atomic_write_text(LATEST, path.name)
        return str(path)

    @staticmethod
    def _unused_folder(settings: Settings) -> Path:
        stem = re.sub(r"[^\w.-]+", "-", f"{Path(settings.data.name).stem}-{settings.model.name}")
        for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
            path = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}{suffix}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return path
        raise AssertionError("a thousand runs in one second")

    @staticmethod
    def unsaved(settings: Settings) -> Run:
        """A run without a folder yet, for checks that must pass before one is made."""
        return Run(Path(os.devnull), settings)

    @staticmethod
    def open(path: str | Path | None) -> Run:
        """An existing run: a folder, or None for the one in `runs/` that was started last.

        Raises:
            ValueError: there is no run.
        """
        if path is None:
            found = [p.parent for p in Path("runs").glob("*/settings.yaml")]
            if not found:
                raise ValueError("there is no run below runs/; train one with `accelerate launch train.py` first.")
            noted = LATEST.parent / LATEST.read_text().strip() if LATEST.is_file() else None  # times follow the clock
            path = max(found, key=lambda p: (p == noted, (p / "settings.yaml").stat().st_mtime, p.name))
        path = Path(path)
        if not (path / "settings.yaml").is_file():
            raise ValueError(f"{path} is not the folder of a run (it has no settings.yaml).")
        return Run(path, load_settings([str(path / "settings.yaml")]))

    @staticmethod
    def resume(arguments: Sequence[str], output: str | None) -> Run:
        """The run to continue: in `output`, or the latest. Settings in `arguments` must be those it was started with.

        Raises:
            ValueError: there is no run, or a setting differs (named).
        """
        run = Run.open(output)
        old = flatten_settings(run.settings.model_dump())
        new = flatten_settings(load_settings(arguments, run.settings.model_dump()).model_dump())
        for key in new:
            if key != "output" and new[key] != old[key]:
                raise ValueError(
                    f"{run.path} was started with {key}={old[key]}; a resumed run keeps its settings (got {new[key]})."
                )
        return run

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other commands out of the run while this one writes there; called by all processes.

        Raises:
            ValueError: another command works on it, or its folder cannot be written.
        """
        with claimed(self.path):
            if PartialState().is_main_process:  # the only one that writes: another could remove what it is writing now
                for leftover in self.path.glob(".*.tmp"):  # of a write that was killed
                    leftover.unlink(missing_ok=True)
            yield

    def new_search_folder(self, budget: str, target: str | None, form: str | None) -> Path:
        """A new folder below `search/`, for this process alone; earlier results stay, what a killed search left is used again."""
        stem = "-".join(part for part in (budget.replace("=", "").replace(",", "-"), target, form) if part)
        for number in range(1, 10_000):
            folder = self.path / "search" / (stem if number == 1 else f"{stem}-{number}")
            folder.parent.mkdir(exist_ok=True)
            lock = take_lock(folder.with_name(f".{folder.name}{LOCK_FILE}"))
            if lock is not None and not (folder / "subnet.json").exists():
                folder.mkdir(exist_ok=True)
                self._search = lock  # held until the process ends
                return folder
            if lock is not None:
                lock.release()
        raise ValueError(f"{self.path / 'search'} holds ten thousand searches for {budget}; clear it.")

    # -- data split ---------------------------------------------------------------------------------------------------

    def store_split(self, data: DataSplits, accelerator: Accelerator) -> None:
        """Writes `split.json` once: the numbers of the images of each split, and a fingerprint."""
        path = self.path / "split.json"
        if accelerator.is_main_process and not path.exists():
            write_json(path, {"fingerprint": data.fingerprint, "indices": data.indices})
        accelerator.wait_for_everyone()

    # -- the trained supernet -----------------------------------------------------------------------------------------

    def save_supernet(self, supernet: Supernet, facts: Mapping[str, Any]) -> None:
        """Writes `supernet.safetensors` and `supernet.json` (space, classes, input); the JSON marks completion."""
        save_tensors(self.path / "supernet.safetensors", supernet.model.state_dict())
        header = {**facts, "space": supernet.space.to_json(), "uncovered": supernet.uncovered, "versions": versions()}
        write_json(self.path / "supernet.json", header)

    def load_supernet(self) -> tuple[Supernet, dict[str, Any]]:
        """The trained supernet in eval mode, and the facts it was saved with.

        Raises:
            ValueError: training has not finished, or the files are damaged or belong to another model.
        """
        if not (self.path / "supernet.json").exists():
            raise ValueError(
                f"{self.path} has no trained supernet yet; finish it with `accelerate launch train.py --resume`."
            )
        header = read_object(self.path / "supernet.json", "space", "num_classes", "input_size")
        space, classes, size = QuantSpace.from_json(header["space"]), header["num_classes"], header["input_size"]
        supernet = Supernet(create_float_model(self.settings.model, classes, size[0], weights=False), space)
        load_supernet_weights(supernet, self.path / "supernet.safetensors")
        return supernet.eval(), header


def open_data(run: Run, indices: Mapping[str, Sequence[int]] | None = None) -> DataSplits:
    """The data of a run, split as stored if it has been split before, there or in the run that its subnet comes from.

    Args:
        run: its settings say which data.
        indices: another split instead, as in `DataSplits.indices`.

    Raises:
        ValueError: the data cannot be read, or are not those of the run's split.
    """
    s = run.settings
    folders = [run.path, *([] if s.supernet is None else [Path(s.supernet)])]
    folder = next((f for f in folders if (f / "split.json").exists()), None)
    stored = (
        None if folder is None or indices is not None else read_object(folder / "split.json", "fingerprint", "indices")
    )
    config = timm.models.get_pretrained_cfg(s.model.name) if timm.is_model(s.model.name) else None
    data_config = None if config is None else resolve_data_config(pretrained_cfg=config.to_dict())
    data = load_data(s.data, s.seed, data_config, indices=stored["indices"] if stored else indices)
    if stored and stored["fingerprint"] != data.fingerprint:
        raise ValueError(f"the images or labels of {s.data.name} are not those that {folder} was trained on.")
    return data


def load_supernet_weights(supernet: Supernet, path: Path) -> None:
    """Loads a supernet's tensors strictly.

    Raises:
        ValueError: the file is damaged, or of another model or space.
    """
    tensors = load_tensors(path)
    own = supernet.model.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        listed = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"{path} belongs to another model or space; these keys do not fit: {listed}.")
    supernet.model.load_state_dict(tensors)
    if odd := [name for name, quantizer in supernet.quantizers() if not quantizer.has_integer_zero_points()]:
        raise ValueError(f"{path} is damaged: zero points of {odd[0]} are no codes; train again or restore the file.")


def create_float_model(settings: ModelSettings, num_classes: int, in_chans: int, *, weights: bool = True) -> nn.Module:
    """The float network of the settings.

    Args:
        settings: which model, and where its weights come from.
        num_classes: outputs.
        in_chans: channels of the images.
        weights: load pretrained or given weights; False leaves them random (they will be loaded from the run).

    Raises:
        ValueError: unknown model, arguments it does not take, weights that cannot be had or do not fit.
    """
    pretrained = settings.pretrained and weights
    try:
        model: nn.Module = timm.create_model(
            settings.name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **settings.arguments
        )
    except (RuntimeError, TypeError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot create the model {settings.name!r}: {reason}.") from error
    if weights and settings.weights is not None:
        source = Path(settings.weights)
        load_float_weights(model, source / "float.safetensors" if source.is_dir() else source)
    return model


def target_spaces(space: QuantSpace, targets: Sequence[str]) -> list[QuantSpace]:
    """What each of the targets `space.targets` of the settings runs of a space.

    Raises:
        ValueError: an unknown target, or one that runs nothing of some layer.
    """
    try:
        return [load_target(name).restrict(space) for name in dict.fromkeys(targets)]
    except ValueError as error:
        raise ValueError(f"space.targets: {error}") from error


def training_space(settings: SpaceSettings, layers: Sequence[LayerInfo], float_numel: int) -> QuantSpace:
    """The space of the settings; with targets, the formats that at least one of them runs.

    Raises:
        ValueError: empty choices, unknown layers, and as `target_spaces`.
    """
    space = QuantSpace.from_layers(layers, **settings.model_dump(exclude={"targets"}), float_numel=float_numel)
    parts = target_spaces(space, settings.targets)

    def runs_somewhere(layer: LayerInfo, slot: Slot, fmt: QuantFormat) -> bool:
        return any(fmt in part.choices(layer.name, slot) for part in parts)

    return space.restrict(runs_somewhere) if parts else space


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("eqnet", "torch", "timm", "numpy")}


def flatten_settings(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as one dict with dotted keys, e.g. {"train.lr": 0.001}; the arguments of the model stay together."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and key != "arguments":
            flat.update(flatten_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
