"""What `eqnet doctor` finds out about this machine and installation, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eqnet.nn.compiled import choose_kernels
from eqnet.nn.integer import kernels_available
from eqnet.tracking import has_wandb_key

# flags of /proc/cpuinfo, and what runs on them
INSTRUCTIONS = {
    "avx2": "fast float kernels",
    "avx_vnni": "integer kernels",
    "avx512_vnni": "integer kernels",
    "avx512_bf16": "train.precision=bf16",
    "amx_bf16": "train.precision=bf16",
    "amx_int8": "integer kernels",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do if something is missing (else empty)."""

    topic: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Versions, devices, instruction sets, compiler, runtimes, wandb, extras; each as soon as it is known."""
    yield Finding("system", f"{platform.platform()}, Python {platform.python_version()}")
    yield from _packages()
    yield from _devices()
    yield Finding("instruction sets", _instructions())
    exact = "exact: search.integer=auto measures configs with them"
    yield Finding(
        "integer kernels", exact if kernels_available() else "not exact here, the simulation measures configs"
    )
    yield _compiler()
    yield from _runtimes()
    yield _wandb()
    yield from extras()


def show(console: Console) -> None:
    """Prints a table of the findings, then what to do."""
    findings = list(examine())
    table = Table(show_header=False)
    for finding in findings:
        table.add_row(Text(finding.topic), Text(finding.found))
    console.print(table)
    for line in [f"{f.topic}: {f.advice}" for f in findings if f.advice] or ["nothing is missing"]:
        console.print(line, markup=False, soft_wrap=True)


def _packages() -> Iterator[Finding]:
    needed = [r for r in map(Requirement, requires("eqnet") or []) if r.marker is None]
    yield Finding("eqnet", version("eqnet"))
    yield Finding("packages", ", ".join(f"{r.name} {version(r.name)}" for r in needed if not _problem(r)))
    for requirement in filter(_problem, needed):
        yield Finding(requirement.name, _problem(requirement), f'pip install "{requirement}"')


def _problem(requirement: Requirement) -> str:
    """What is wrong with a required package; empty if nothing."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{found} is installed, {requirement.specifier} is needed"
    return ""


def _devices() -> Iterator[Finding]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield Finding("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {memory:.0f} GiB memory")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "none is visible to torch"
        yield Finding("GPU", f"none ({why})")


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    found = [f"{name} ({use})" for name, use in INSTRUCTIONS.items() if name in flags]
    return f"{', '.join(found) or 'not known'}; torch uses {torch.backends.cpu.get_cpu_capability()}"


def _compiler() -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose_kernels("on", device)
    except ValueError as error:
        return Finding("compiler", "train.compile=auto runs eager kernels", str(error))
    return Finding("compiler", f"works: train.compile is possible on {device.type}")


def _runtimes() -> Iterator[Finding]:
    try:
        import onnxruntime

        yield Finding("ONNX Runtime", f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}")
    except ImportError:
        yield Finding("ONNX Runtime", "missing", 'pip install "eqnet[export]"')
    try:
        import openvino

        yield Finding("OpenVINO", f"{version('openvino')}: {', '.join(openvino.Core().available_devices)}")
    except ImportError:
        yield Finding("OpenVINO", "missing", 'pip install "eqnet[openvino]"')


def _wandb() -> Finding:
    mode, key = os.environ.get("WANDB_MODE"), has_wandb_key()
    if mode:
        return Finding("wandb", f"{mode}, as WANDB_MODE says")
    if key:
        return Finding("wandb", "online, a key is at hand")
    return Finding("wandb", "offline, there is no key", "wandb login")


def extras() -> Iterator[Finding]:
    """Extras of the installation, and the command that completes each that is not complete."""
    for extra in metadata("eqnet").get_all("Provides-Extra") or []:
        needed = [
            r
            for r in map(Requirement, requires("eqnet") or [])
            if r.marker is not None and r.marker.evaluate({"extra": extra})
        ]
        missing = [f"{r.name} ({problem})" for r in needed if (problem := _problem(r))]
        advice = f'pip install "eqnet[{extra}]"' if missing else ""
        yield Finding(f"extra {extra}", ", ".join(missing) or "complete", advice)
