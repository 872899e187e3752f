"""Checkpoints of a run: written whole, verified by checksums, loaded without running what they hold.

    checkpoints/<phase>-<step>/  model.safetensors  optimizer.bin  random_states_<rank>.pkl  ...  state.json

A folder appears by one rename when it is complete. `state.json` has the checksum of each file and names no others, so a cut-off or
damaged checkpoint is never taken for a good one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from eqnet.checkpoint import load_tensors, read_object, save_tensors, write_json

PHASES = ("pretrain", "select", "act", "supernet")
KEPT_CHECKPOINTS = 2
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have their own for a full disk
_READ_ERRORS = (RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the state after `step` optimizer steps of `phase`."""

    phase: str
    step: int
    path: Path


class Checkpoints:
    """Those of one run.

    Args:
        folder: `checkpoints` in the folder of the run; made by the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self, accelerator: Accelerator, phase: str, step: int, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Saves everything needed to continue bit for bit; called by all processes.

        Args:
            accelerator: holds model, optimizer and generators.
            phase: of the checkpoint's name.
            step: optimizer steps of the phase.
            modules: further ones by name, which accelerate would pickle.
        """
        final = self.folder / f"{phase}-{step:08d}"
        if final.exists() and not _damaged(final):
            return
        partial = self.folder / f".{final.name}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial), safe_serialization=True)
            if accelerator.is_main_process:
                for name, module in (modules or {}).items():
                    save_tensors(partial / f"{name}.safetensors", module.state_dict())
        except _WRITE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(
                f"cannot write the checkpoint {final} ({str(error).splitlines()[0]}); the one before it is kept: make room "
                "and continue with --resume."
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sums = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
            write_json(partial / "state.json", {"phase": phase, "step": step, "sha256": sums})
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            partial.rename(final)
            for old in self._all()[KEPT_CHECKPOINTS:]:
                shutil.rmtree(old.path)
        accelerator.wait_for_everyone()

    def _all(self) -> list[Checkpoint]:
        """Newest first; names only, not verified."""
        found = []
        for path in self.folder.glob("*-*"):
            phase, _, step = path.name.partition("-")
            if phase in PHASES and step.isdigit():
                found.append(Checkpoint(phase, int(step), path))
        return sorted(found, key=lambda c: (PHASES.index(c.phase), c.step), reverse=True)

    def load(
        self, accelerator: Accelerator, checkpoint: Checkpoint, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Restores what `save` saved; called by all processes. Nothing is unpickled but tensors and plain values.

        Raises:
            ValueError: the checkpoint belongs to another model or space.
        """
        try:
            accelerator.load_state(str(checkpoint.path))
            for name, module in (modules or {}).items():
                module.load_state_dict(load_tensors(checkpoint.path / f"{name}.safetensors"))
        except _READ_ERRORS as error:
            raise ValueError(
                f"{checkpoint.path} belongs to another model or space: {str(error).splitlines()[0]}"
            ) from error

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose checksums hold, and a sentence about each damaged one that was passed over."""
        notes: list[str] = []
        for checkpoint in self._all():
            damaged = _damaged(checkpoint.path)
            if not damaged:
                return checkpoint, notes
            notes.append(f"checkpoint {checkpoint.path} is damaged ({', '.join(damaged)}); using an earlier one.")
        return None, notes


def _damaged(checkpoint: Path) -> list[str]:
    """Files of a checkpoint whose checksums do not hold, that are missing, or that the list of checksums does not name."""
    try:
        sums = read_object(checkpoint / "state.json", "sha256")["sha256"]
        found = {path.name for path in checkpoint.iterdir()} - {"state.json"}
        foreign = set(sums) ^ found  # names in the list that are no plain names are never opened
        return sorted(foreign | {name for name in found - foreign if _sha256(checkpoint / name) != sums[name]})
    except (ValueError, OSError, TypeError):
        return ["state.json"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
