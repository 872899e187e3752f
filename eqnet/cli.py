"""The command line: `eqnet targets list | show NAME | check NAME SUBNET`, `eqnet export SUBNET --target NAME`,
`eqnet verify FILE`, `eqnet plan export | import | schema`, `eqnet benchmark latency --target NAME`, `eqnet report RUN`,
`eqnet dashboard RUN`, `eqnet doctor`; `proxy_commands` has the
others of `benchmark`, and `proxies`.

The user's mistakes end in one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import enum
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from eqnet.command import make_console, progress_bar, run_command
from eqnet.proxy_commands import add_benchmark_commands, proxies
from eqnet.space import QuantConfig, QuantFormat, QuantSpace, Slot
from eqnet.space.hardware import HardwareTarget, load_target, target_names

SLOTS: tuple[Slot, ...] = ("weight", "act")
TargetName = Annotated[str, typer.Argument(metavar="NAME", help="a built-in target, or the path of a target file")]


class FileFormat(enum.StrEnum):
    """Kinds of exported files."""

    onnx = "onnx"
    torch = "torch"
    packed = "packed"


SUFFIXES = {FileFormat.onnx: ".onnx", FileFormat.torch: ".pt2", FileFormat.packed: ".safetensors"}


class LabelledSplit(enum.StrEnum):
    """Splits that a file may be verified on; the test split is for reports."""

    validation = "validation"
    test = "test"


class PlanFormat(enum.StrEnum):
    """Plans of other tools; see `eqnet.deploy.interchange`."""

    aimet = "aimet"
    aimet_061 = "aimet-0.6.1"
    modelopt = "modelopt"


app = typer.Typer(help="Elastic quantization supernets.", pretty_exceptions_enable=False)
targets = typer.Typer(help="Hardware targets: what devices execute.")
app.add_typer(targets, name="targets")
plan = typer.Typer(help="Plans: formats of every layer, to and from other tools.")
app.add_typer(plan, name="plan")
benchmark = typer.Typer(help="Measurements on this machine.")
app.add_typer(benchmark, name="benchmark")
add_benchmark_commands(benchmark)
app.add_typer(proxies, name="proxies")


@app.callback()
def _eqnet() -> None:
    """Elastic quantization supernets: one training, a subnet for every budget and device."""


@targets.command("list")
def list_targets() -> None:
    """The built-in targets."""
    table = Table("name", "weights", "activations", "notes", show_lines=True)
    for name in target_names():
        target = load_target(name)
        weights, acts = (target.describe(slot).replace("; ", "\n") for slot in SLOTS)
        table.add_row(*map(Text, (name, weights, acts, target.title)))
    make_console().print(table)


@targets.command("show")
def show_target(name: TargetName) -> None:
    """All rules of a target, with their sources."""
    target = load_target(name)
    console = make_console()
    console.print(f"{target.name}: {target.title}", markup=False)
    table = Table(show_header=False)
    for fact, text in _facts(target):
        table.add_row(fact, Text(text))
    console.print(table)


@targets.command("check")
def check_target(
    name: TargetName,
    subnet: Annotated[Path, typer.Argument(help="a subnet.json of a search")],
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: the one that holds the subnet)")] = None,
) -> None:
    """Whether a target runs a subnet; lists what it does not run and exits with 2."""
    target = load_target(name)
    config, space = _read_subnet(subnet, run)
    violations = target.check(config, space.layers)
    console = make_console()
    if not violations:
        return console.print(f"{target.name} runs all {len(space.layers)} layers of {subnet}", markup=False)
    for violation in violations:
        console.print(violation, markup=False, soft_wrap=True)
    raise typer.Exit(2)


@app.command("export")
def export_subnet(
    subnet: Annotated[Path, typer.Argument(help="a subnet.json of a search")],
    target: Annotated[str, typer.Option(help="a built-in target, or the path of a target file")],
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: the one that holds the subnet)")] = None,
    output: Annotated[Path | None, typer.Option(help="file to write (default: TARGET.onnx beside the subnet)")] = None,
    file_format: Annotated[FileFormat, typer.Option("--format", help="kind of file")] = FileFormat.onnx,
    batch: Annotated[int | None, typer.Option(min=1, help="images per call (default: any number)")] = None,
    images: Annotated[int, typer.Option(min=1, help="training images that calibrate added quantizers")] = 256,
) -> None:
    """Writes a subnet as an ONNX file for a target, with a description beside it.

    Or as a torch.export program, or with its weights packed to their bits.
    """
    from eqnet.deploy.export import check_output, export_onnx, export_torch  # imports torch
    from eqnet.deploy.packed import save_packed
    from eqnet.deploy.subnet import load_subnet

    hardware = load_target(target)
    suffix = SUFFIXES[file_format]
    path = output or subnet.with_name(f"{'packed' if file_format is FileFormat.packed else hardware.name}{suffix}")
    check_output(path, suffix)
    saved, console = load_subnet(subnet, _run_folder(subnet, run)), make_console()
    if file_format is FileFormat.torch:
        export_torch(saved.module, path, input_size=saved.input_size, batch=batch)
        console.print(f"saved {path}", markup=False, soft_wrap=True)
        return
    if file_format is FileFormat.packed:
        size = save_packed(saved.module, saved.config, saved.layers, path)
        text = f"saved {path}: {size.tensors} bytes of tensors, {size.header} of names and formats"
        console.print(text, markup=False, soft_wrap=True)
        return
    description = export_onnx(
        saved.module,
        saved.config,
        saved.layers,
        hardware,
        path,
        input_size=saved.input_size,
        images=saved.training_images(images),
        batch=batch,
        pixels={name: saved.facts.get(name) for name in ("mean", "std")},
        source=saved.source,
    )
    layers, added = description["layers"], description["quantizers"]
    in_float = [f"{name} ({facts['reason']})" for name, facts in layers.items() if facts["kernel"] == "float"]
    console.print(f"saved {path} and {path.name}.json", markup=False, soft_wrap=True)
    console.print(
        f"{len(layers)} layers, {len(added)} outputs quantized besides, {len(in_float)} layers in floating point"
    )
    for name in in_float:
        console.print(f"in floating point: {name}", markup=False, soft_wrap=True)


@app.command("verify")
def verify_file(
    file: Annotated[Path, typer.Argument(help="a file of `eqnet export`")],
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: the one of the description)")] = None,
    images: Annotated[int, typer.Option(min=1, help="labelled images")] = 256,
    split: Annotated[LabelledSplit, typer.Option(help="where they come from")] = LabelledSplit.validation,
    target: Annotated[str | None, typer.Option(help="target file, if the target is not a built-in one")] = None,
    rounds: Annotated[int, typer.Option(min=0, help="measurements of the latency; 0 for none")] = 30,
) -> None:
    """Verifies that a file computes what was trained, and writes a certificate beside it; exits with 2 on an error."""
    from eqnet.deploy.certificate import write_certificate  # imports torch
    from eqnet.deploy.exported import Exported, find_subnet
    from eqnet.deploy.subnet import load_subnet
    from eqnet.deploy.verify import verify_export

    exported = Exported.read(file)
    hardware = load_target(target or exported.sidecar["target"])
    saved = load_subnet(*find_subnet(exported, run))
    pictures, labels = saved.labelled_images(images, split.value)
    console = make_console()
    with progress_bar(console, f"verification on {len(labels)} images", 4) as advance:
        certificate = verify_export(
            exported, saved.module, saved.layers, hardware, pictures, labels, rounds=rounds, progress=advance
        )
    certificate.facts["split"] = split.value
    table = Table("step", "verdict", "layer", "statement")
    for line in certificate.lines:
        table.add_row(*map(Text, (line.step, line.verdict, line.layer or "", line.text)))
    console.print(table)
    path, errors = write_certificate(certificate, file), len(certificate.errors)
    verdict = f"{errors} error{'s' * (errors != 1)}" if errors else "verified"
    console.print(f"{verdict}; certificate: {path}", markup=False, soft_wrap=True)
    if errors:
        raise typer.Exit(2)


@plan.command("export")
def export_plan(
    subnet: Annotated[Path, typer.Argument(help="a subnet.json of a search")],
    plan_format: Annotated[PlanFormat, typer.Option("--format", help="of the file to write")],
    output: Annotated[Path, typer.Option(help="file to write: .json, or .yaml")],
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: the one that holds the subnet)")] = None,
) -> None:
    """Writes the formats of a subnet for another tool: AIMET encodings (with step sizes), or a recipe of ModelOpt."""
    from eqnet.deploy.interchange import config_to_aimet, config_to_modelopt, write_plan  # imports torch
    from eqnet.deploy.subnet import load_subnet

    if plan_format is PlanFormat.modelopt:
        config, space = _read_subnet(subnet, run)
        document = config_to_modelopt(config, space.layers)
    else:
        saved = load_subnet(subnet, _run_folder(subnet, run))
        document = config_to_aimet(saved.config, saved.layers, saved.module, plan_format.value)
    write_plan(output, document)
    make_console().print(f"saved {output}", markup=False, soft_wrap=True)


@plan.command("import")
def import_plan(
    file: Annotated[Path, typer.Argument(help="AIMET encodings, or a recipe of ModelOpt")],
    plan_format: Annotated[PlanFormat, typer.Option("--format", help="of the file")],
    run: Annotated[Path, typer.Option(help="folder of the run whose supernet the plan is for")],
    output: Annotated[Path, typer.Option(help="the subnet.json to write")],
    unnamed_inputs: Annotated[
        str | None, typer.Option(help="format of inputs that encodings do not name, e.g. 8-asym")
    ] = None,
) -> None:
    """Reads the formats of another tool's plan as a subnet of a run, for `search.py --subnet` and `train.py subnet=`."""
    from eqnet.deploy.interchange import read_plan, write_plan  # imports torch
    from eqnet.subnet import describe_subnet

    space = _read_space(_run_folder(file, run))
    unnamed = None if unnamed_inputs is None else _act_format(unnamed_inputs)
    config = read_plan(file, space, plan_format.value, unnamed)
    source = {"file": str(file), "format": plan_format.value}
    write_plan(output, {"source": source, **describe_subnet(config, space, {})})
    make_console().print(f"saved {output}", markup=False, soft_wrap=True)


@plan.command("schema")
def print_schema() -> None:
    """Prints the JSON Schema of subnet.json."""
    print((files("eqnet") / "subnet.schema.json").read_text(), end="")


@app.command("report")
def report_runs(
    runs: Annotated[list[Path] | None, typer.Argument(help="folders of runs (default: the latest below runs/)")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="file to write (default: report.html, of several runs comparison.html, in the first)"),
    ] = None,
) -> None:
    """Writes one HTML file about a run, or about several side by side; it needs no server and no network."""
    from eqnet.html_report import write_report  # imports torch

    make_console().print(f"saved {write_report(runs or [None], output)}", markup=False, soft_wrap=True)


@app.command("dashboard")
def save_dashboard(
    run: Annotated[Path | None, typer.Argument(help="folder of the run (default: the latest below runs/)")] = None,
) -> None:
    """Sends the exported files of a run to wandb, and saves a view of its project where the account allows."""
    from eqnet.dashboard import check_account, save_view, track_exports  # imports torch
    from eqnet.run import Run
    from eqnet.tracking import Tracker

    opened, console = Run.open(run), make_console()
    settings = opened.settings
    tracker = Tracker(opened.path, "wandb", settings.project, settings.model_dump())
    try:
        exported = track_exports(tracker, opened)
    finally:
        tracker.close()
    console.print(f"{len(exported)} exported files of {opened.path} recorded", markup=False, soft_wrap=True)
    try:
        check_account()
    except ValueError as problem:
        console.print(f"no view was saved: {problem}", markup=False, soft_wrap=True)
    else:
        console.print(f"saved the view {save_view(settings.project)}", markup=False, soft_wrap=True)


@app.command("doctor")
def examine_installation() -> None:
    """What this machine and installation have and lack: versions, devices, instruction sets, compiler, runtimes, extras."""
    from eqnet.doctor import show  # imports torch

    show(make_console())


@app.command("tune")
def tune_settings(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the job, e.g. configs/tune/digits.yaml")],
) -> None:
    """Ranks candidate settings of a training by short runs, trains the best fully; a rerun continues."""
    from eqnet.tune import TuneSettings, show, tune  # imports torch, which `targets` does not need

    job, console = TuneSettings.load(file), make_console()
    show(tune(job, console), console)
    console.print(f"saved {job.output}/best.yaml, tune.json", soft_wrap=True)
    console.print(f"next: python train.py {job.output}/best.yaml, with another seed=... for example", soft_wrap=True)


@benchmark.command("latency")
def measure_latency_table(
    target: Annotated[str, typer.Option(help="a built-in target, or the path of a target file")],
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: the latest below runs/)")] = None,
    configs: Annotated[int, typer.Option(min=2, help="random configs to check the sums with")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each network")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="threads of the runtime")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the measured configs")] = 0,
) -> None:
    """Measures the latency table of a run's layers into RUN/latency/TARGET.json, and checks that times add up."""
    from eqnet.deploy.latency import count_networks, measure_latency  # imports torch
    from eqnet.run import Run

    hardware, opened, console = load_target(target), Run.open(run), make_console()
    supernet, facts = opened.load_supernet()
    path = opened.path / "latency" / f"{hardware.name}.json"
    path.parent.mkdir(exist_ok=True)
    networks = 0 if path.exists() else count_networks(supernet, hardware, configs, seed)
    with progress_bar(console, f"latency on {hardware.name}", networks) as advance:
        table, check = measure_latency(
            supernet,
            hardware,
            facts["input_size"],
            path,
            configs=configs,
            rounds=rounds,
            threads=threads,
            seed=seed,
            progress=advance,
        )
    console.print(f"{len(table.entries)} entries, overhead {table.overhead_ms:.3f} ms: {path}", markup=False)
    console.print(check.describe(), soft_wrap=True)


def main() -> None:
    """The entry point of `eqnet`."""
    run_command(lambda: _run(sys.argv[1:] or ["--help"]))


def _run(arguments: list[str]) -> None:
    try:
        code = app(arguments, prog_name="eqnet", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = "eqnet" if context is None else context.command_path
        raise ValueError(f"{error.format_message().rstrip('.')}; see `{command} --help`.") from error
    if code:
        sys.exit(code)


def _facts(target: HardwareTarget) -> list[tuple[str, str]]:
    """Every fact of a target in words."""
    facts = [("weights", target.describe("weight")), ("activations", target.describe("act"))]
    scales = {"weight_times_act": ", weight x activation scale", "power_of_two": ", power-of-two scale", None: ""}
    for kind, rules in target.ops:
        if rules is not None:
            bias = rules.bias.dtype + scales[rules.bias.scale]
            outside = {"refuse": "refused", "float": "floating point"}[rules.fallback]
            facts.append((kind, f"{rules.kernel} kernel; bias {bias}; outside the rules: {outside}"))
    edges = "no rule" if target.first_last_bits is None else f"bits {', '.join(map(str, target.first_last_bits))}"
    versions = ("ONNX opset", target.opset), ("runtime", target.runtime), ("processor", target.processor)
    fixed = [f"{o.op}: scale {o.scale:g}, zero point {o.zero_point}" for o in target.fixed_outputs]
    return [
        *facts,
        ("first and last layer", edges),
        ("rounding", target.rounding or "not documented"),
        ("time follows", f"bits of the {target.latency_bits}"),
        ("file stores", {"container": "containers", "packed": "packed codes"}[target.storage_bits]),
        ("inputs of add, concat", "quantized" if target.integer_add else "may stay in floating point"),
        *(
            (name, text)
            for name, text in (("fused", ", ".join(target.fused)), ("fixed outputs", "\n".join(fixed)))
            if text
        ),
        *((name, str(value)) for name, value in versions if value),
        *(("note", note) for note in target.notes),
        *(("source", source) for source in target.sources),
        *(("verified", statement) for statement in target.verified),
        *(("unverified", statement) for statement in target.unverified),
    ]


def _run_folder(path: Path, run: Path | None) -> Path:
    """The folder of the trained run that holds a subnet, or the one that is named. Raises ValueError if there is none."""
    for folder in [run] if run is not None else path.resolve().parents:
        if (folder / "supernet.json").is_file():
            return folder
    where = f"{run} is not the folder of a trained run" if run else f"{path} does not lie in the folder of a run"
    raise ValueError(f"{where} (there is no supernet.json); name the run with --run.")


def _read_subnet(path: Path, run: Path | None) -> tuple[QuantConfig, QuantSpace]:
    """The config of a `subnet.json`, and the space of the run that it belongs to.

    Raises:
        ValueError: a file is missing or damaged, or the subnet is not a config of the run.
    """
    from eqnet.subnet import read_subnet  # imports torch, which the other commands do not need

    space = _read_space(_run_folder(path, run))
    return read_subnet(path, space), space


def _read_space(folder: Path) -> QuantSpace:
    """The space of a run. Raises ValueError if its file is missing or damaged."""
    from eqnet.checkpoint import read_json  # imports torch

    header: Any = read_json(folder / "supernet.json")
    try:
        return QuantSpace.from_json(header["space"])
    except (KeyError, TypeError, ValueError) as error:
        problem = str(error).rstrip(".")
        raise ValueError(f"{folder / 'supernet.json'} does not describe a supernet: {problem}.") from error


def _act_format(text: str) -> QuantFormat:
    """'8-asym' as a format. Raises ValueError for anything else."""
    bits, _, symmetry = text.partition("-")
    if not bits.isdecimal() or symmetry not in ("sym", "asym"):
        raise ValueError(f"{text!r} is not a format of inputs; write bits and symmetry, such as 8-asym or 4-sym.")
    return QuantFormat(int(bits), symmetry == "sym")


if __name__ == "__main__":
    main()
