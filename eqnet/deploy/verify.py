"""Verification of an exported file: what runs is what was trained, step by step, with a written certificate.

    rules        the graph is what its description and its target say (`rules.py`)
    integers     the simulation computes the integers of the file: weight codes, input codes and accumulators of every layer
    unoptimized  ONNX Runtime without optimizations computes the values of the integer reference, to float rounding
    runtime      the target's runtime: which kernel each layer gets, how far its codes are off, accuracy, latency

Layers are compared one by one: each starts from the codes that the other side has there (`IntegerReference.run(forced=...)`),
so a difference is reported where it arises and not where it ends. Exported and simulated networks may differ by what the
target asks for and nothing else: quantizers added for it, and biases rounded to integers; the certificate lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eqnet.deploy.certificate import Certificate
from eqnet.deploy.exported import Exported, LocalDifference, add_differences, compare_codes
from eqnet.deploy.reference import along
from eqnet.deploy.rules import check_graph
from eqnet.deploy.runtime import (
    RUNTIMES,
    Kernel,
    Runtime,
    Session,
    installed_version,
    median_latency,
    runtime_of,
    sums_are_exact,
    without_quantizers,
)
from eqnet.deploy.simulation import FoldedLayer, SimulatedCall, folded_layer, following_norms, observe_layers
from eqnet.nn.layers import QuantizedLayer
from eqnet.space import LayerInfo
from eqnet.space.hardware import HardwareTarget

Array = NDArray[Any]
EXACT_MACS = 4e9  # of the images whose layers are compared one by one; both sides sum in float64
TIE_MARGIN = 0.01  # steps; float32 sums of two orders differ by less
SCALE_TOLERANCE = 2.0**-22  # two roundings to float32
FLOAT_TOLERANCE = 1e-4  # of the largest output


def verify_export(
    exported: Exported,
    subnet: nn.Module,
    layers: Sequence[LayerInfo],
    target: HardwareTarget,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    rounds: int = 30,
    progress: Callable[[], None] = lambda: None,
) -> Certificate:
    """Verifies an exported file against the subnet that it was made of.

    Args:
        exported: from `Exported.read`.
        subnet: from `Supernet.extract`, with its BN statistics.
        layers: facts about its layers.
        target: the target that it was exported for.
        images: [N, C, H, W], normalised as in training.
        labels: int64 [N], for accuracies.
        rounds: measurements of the latency; 0 for none.
        progress: called after each of the four steps.

    Raises:
        ValueError: the runtime is missing or too old, refuses the file, or the subnet has other layers.
    """
    subnet = subnet.eval()
    modules = {name: m for name, m in subnet.named_modules() if isinstance(m, QuantizedLayer)}
    wrong = sorted(set(modules) ^ set(exported.sidecar["layers"]))
    if wrong:
        raise ValueError(f"{exported.path} was made of another subnet: {', '.join(wrong[:5])} on one side only.")
    runtime = runtime_of(target)
    certificate = Certificate({"file": exported.path.name, "sha256": exported.sidecar["sha256"], "target": target.name})
    macs = max(sum(layer.macs for layer in layers), 1)
    if len(images) < exported.batch:
        raise ValueError(f"{exported.path} takes {exported.batch} images at a time; give at least as many.")
    count = min(max(int(EXACT_MACS / macs), 2, exported.batch), len(images)) // exported.batch * exported.batch
    few = images[:count]
    certificate.facts |= {"images": len(images), "images_layer_by_layer": count}
    for layer, problems in check_graph(exported.model, exported.reference, exported.sidecar, layers, target).items():
        for problem in problems:
            certificate.add("rules", "error", f"{problem}.", layer)
    if not certificate.errors:
        certificate.add("rules", "pass", f"{len(layers)} layers are as {target.name} and the description say.")
    _list_permitted(certificate, exported)
    progress()
    check_integers(certificate, exported, subnet, modules, few)
    progress()
    check_unoptimized(certificate, exported, few)
    progress()
    if runtime is None:
        certificate.add("runtime", "note", f"{target.name} does not run here; its rules were checked on the graph.")
    else:
        check_runtime(certificate, exported, subnet, runtime, target, images, labels, count, rounds)
    progress()
    return certificate


def _list_permitted(certificate: Certificate, exported: Exported) -> None:
    """What the target asks to be other than simulated, with bounds."""
    biases = {n: f["bias"]["error"] for n, f in exported.sidecar["layers"].items() if f["bias"] and f["bias"]["error"]}
    added = {name: grid["scale"] / 2 for name, grid in exported.sidecar["quantizers"].items()}
    certificate.results["permitted"] = {"bias_rounding": biases, "added_quantizers": added}
    if biases:
        certificate.add("rules", "note", f"{len(biases)} biases are integers, off by up to {max(biases.values()):.2g}.")
    if added:
        worst = max(added.values())
        certificate.add(
            "rules",
            "note",
            f"{len(added)} quantizers were added, each off by up to {worst:.2g} (half a step) in its range.",
        )


# -- step 1: the simulation is the integer reference ------------------------------------------------------------------


def check_integers(
    certificate: Certificate, exported: Exported, subnet: nn.Module, modules: Mapping[str, Any], images: Tensor
) -> None:
    """Compares weight codes, step sizes, biases, input codes and accumulators of every layer, what is between them, the logits."""
    before = len(certificate.errors)
    norms, folded = following_norms(subnet, images[:1]), {}
    for node, (name, _) in exported.calls().items():
        norm = norms.get(name) if exported.sidecar["layers"][name]["batch_norm"] == "folded" else None
        shift = int(exported.sidecar["layers"][name]["weight"].get("shift", 0))
        folded[name] = folded_layer(modules[name], norm, name, shift)
        certificate.layers.setdefault(name, {})
        for problem in _constant_problems(exported, node, folded[name]):
            certificate.add("integers", "error", problem, name)
    nodes = {call: node for node, call in exported.calls().items()}
    totals = {"input codes": 0, "accumulators": 0}
    codes: dict[str, Array] = {}

    def compare(call: SimulatedCall) -> None:
        layer = exported.reference.layers.get(nodes.get((call.name, call.number), ""))
        if layer is None or layer.act is None:
            return  # an error of the rules if the description has it
        codes[layer.codes] = layer.act.from_centred(call.centred)
        centred = layer.act.centred(layer.act.codes(call.inputs))
        try:
            own = layer.sums(centred)
        except ValueError as error:
            certificate.add("integers", "error", str(error), call.name)
            return
        sums = np.rint(call.sums)
        channels, axis = folded[call.name].factor, -1 if isinstance(modules[call.name], nn.Linear) else 1
        sums = sums * along(np.tile(channels, sums.shape[axis] // channels.size), axis, sums.ndim)
        figures = {"input codes": (centred != call.centred), "accumulators": own.reshape(sums.shape) != sums}
        for what, differs in figures.items():
            number = int(differs.sum())
            totals[what] += differs.size
            key = f"{what.replace(' ', '_')}_differ"
            certificate.layers[call.name][key] = certificate.layers[call.name].get(key, 0) + number
            if number:
                text = f"{number} of {differs.size} {what} differ from the simulation."
                certificate.add("integers", "error", text, call.name)

    between, simulated, found = LocalDifference({}), [], []
    try:
        for x in exported.chunks(images.numpy()):
            codes.clear()
            simulated.append(observe_layers(subnet, torch.from_numpy(x), compare))
            add_differences(between, exported, x, {**codes, exported.output: simulated[-1]})
            found.append(exported.reference.run({exported.input: x})[exported.output])
    except ValueError as error:
        certificate.add("integers", "error", str(error))
        return
    difference = _compare(np.concatenate(simulated), np.concatenate(found))
    certificate.results["simulation_and_reference"] = difference | {"layer_by_layer": between.to_json()}
    if len(certificate.errors) == before:
        counted = " and ".join(f"{number} {what}" for what, number in totals.items())
        certificate.add("integers", "pass", f"weight codes, {counted} equal those of the simulation.")
    _check_between(certificate, exported, between)
    certificate.add("integers", "note", f"end to end, integer reference against simulation: {_words(difference)}.")


def _check_between(certificate: Certificate, exported: Exported, between: LocalDifference) -> None:
    """What stands between two layers: from the codes of the simulation to its next codes. Only permitted roundings move them."""
    text = (
        f"{between.differing} of {between.total} input codes differ when each layer starts from the simulation's codes"
    )
    permitted = certificate.results["permitted"]
    if permitted["bias_rounding"] or permitted["added_quantizers"]:
        reason = "by integer biases and added quantizers"
        certificate.add("integers", "note", f"{text}, by up to {between.largest} steps, {reason}.")
        return
    off = {name: d for name, d in between.codes.items() if d.largest > 1 or d.margin > TIE_MARGIN}
    for name, d in off.items():
        problem = f"input codes differ from the simulation's by up to {d.largest}, not only at ties."
        certificate.add("integers", "error", problem, exported.layer_of(name))
    if not off:
        certificate.add("integers", "pass", f"{text}, all at ties.")


def _constant_problems(exported: Exported, node: str, expected: FoldedLayer) -> list[str]:
    """How weight codes, step sizes and bias of a node differ from the trained ones with BN folded."""
    layer = exported.reference.layers.get(node)
    if layer is None:
        return []
    problems = []
    stored = layer.weight.integers
    if layer.node.op_type == "MatMul":
        stored = stored.T
    different = int((stored != expected.codes).sum()) if stored.shape == expected.codes.shape else stored.size
    if different:
        problems.append(f"{different} of {stored.size} weight codes differ from the trained ones.")
    alive = expected.factor != 0
    ratio = np.abs(layer.weight.scale.reshape(-1) / np.where(alive, expected.scale, 1) - 1)[alive]
    if ratio.size and float(ratio.max()) > SCALE_TOLERANCE:
        problems.append(
            f"step sizes of its weight differ from the trained ones by up to {100 * float(ratio.max()):.2g} %."
        )
    name = exported.reference.bias_of(layer.node)
    stored_bias = exported.reference.constant(name) if name else None
    on_grid = exported.reference.on_grid(name) if name else None
    found = np.zeros(1) if stored_bias is None else stored_bias.astype(np.float64)
    wanted = np.zeros(1) if expected.bias is None else expected.bias
    step = np.zeros(1) if on_grid is None else on_grid.scale.reshape(-1).astype(np.float64)
    bound = step / 2 + SCALE_TOLERANCE * np.maximum(np.abs(wanted), step)
    if bool((np.abs(found - wanted) > bound).any()):
        problems.append(f"its bias differs from the trained one by up to {float(np.abs(found - wanted).max()):.2g}.")
    return problems


# -- step 2: the integer reference is the runtime as written ----------------------------------------------------------


def check_unoptimized(certificate: Certificate, exported: Exported, images: Tensor) -> None:
    """Compares ONNX Runtime without optimizations with the reference, operation by operation."""
    codes = list(exported.reference.quantizers)
    session = RUNTIMES["onnxruntime"].load(exported.model, optimized=False, outputs=codes)
    local = compare_codes(exported, session, images.numpy())
    certificate.results["reference_and_unoptimized"] = local.to_json()
    off = {name: d for name, d in local.codes.items() if d.largest > 1 or d.margin > TIE_MARGIN}
    for name, found in off.items():
        text = f"codes differ from those of the integer reference by up to {found.largest}, not only at ties."
        certificate.add("unoptimized", "error", text, exported.layer_of(name))
    if local.error > FLOAT_TOLERANCE:
        text = f"outputs differ from the integer reference by {local.error:.2g} of the largest."
        certificate.add("unoptimized", "error", text)
    if not off and local.error <= FLOAT_TOLERANCE:
        text = f"{local.differing} of {local.total} codes differ, all at ties; outputs by {local.error:.1g} of the largest."
        certificate.add("unoptimized", "pass", text)


# -- step 3: the target's runtime -------------------------------------------------------------------------------------


def check_runtime(
    certificate: Certificate,
    exported: Exported,
    subnet: nn.Module,
    runtime: Runtime,
    target: HardwareTarget,
    images: Tensor,
    labels: Tensor | None,
    exact: int,
    rounds: int,
) -> None:
    """Kernels, codes, accuracy and latency of the optimized graph."""
    certificate.facts["runtime"] = f"{runtime.name} {installed_version(runtime.name)}"
    session = runtime.load(exported.model)
    kernels = session.kernels()
    _check_kernels(certificate, exported, kernels)
    _check_codes(certificate, exported, runtime, kernels, images[:exact].numpy())
    whole = images[: len(images) // exported.batch * exported.batch]
    found = _in_chunks(exported, whole.numpy(), session.run)[exported.output]
    with torch.inference_mode():
        simulated = torch.cat([subnet(part) for part in whole.split(64)]).numpy()
    difference = _compare(simulated, found)
    certificate.results["simulation_and_runtime"] = difference
    certificate.add("runtime", "note", f"end to end, {runtime.name} against simulation: {_words(difference)}.")
    if labels is not None:
        truth = labels[: len(whole)].numpy()
        right = {"simulation": simulated, "runtime": found}
        accuracies = {name: 100.0 * float((logits.argmax(1) == truth).mean()) for name, logits in right.items()}
        certificate.results["accuracy"] = accuracies
        text = f"accuracy {accuracies['runtime']:.2f} %, simulated {accuracies['simulation']:.2f} %."
        certificate.add("runtime", "note", text)
    if rounds:
        _measure_latency(certificate, exported, runtime, session, images[: exported.batch].numpy(), rounds)


def _check_kernels(certificate: Certificate, exported: Exported, kernels: Mapping[str, Kernel]) -> None:
    counts: dict[str, int] = {}
    before = len(certificate.errors)
    for name, facts in exported.sidecar["layers"].items():
        for node in facts["nodes"]:
            kernel = kernels.get(node)
            certificate.layers.setdefault(name, {})["kernel"] = None if kernel is None else kernel.name
            if kernel is not None:
                counts[kernel.name] = counts.get(kernel.name, 0) + 1
            if facts["kernel"] != "integer":
                continue
            if kernel is None:
                certificate.add("runtime", "error", "its kernel was not found in the optimized graph.", name)
            elif not kernel.integer:
                text = f"it runs in floating point ({kernel.name}); the target says integer."
                certificate.add("runtime", "error", text, name)
    listed = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    if len(certificate.errors) == before:
        certificate.add("runtime", "pass", f"every layer has the kernel that the target says: {listed}.")


def _check_codes(
    certificate: Certificate, exported: Exported, runtime: Runtime, kernels: Mapping[str, Kernel], images: Array
) -> None:
    """Compares the codes of the optimized graph, if they can be read without changing its kernels."""
    session = runtime.load(exported.model, outputs=list(exported.reference.quantizers))
    if session.kernels() != kernels:
        certificate.add("runtime", "note", "codes cannot be read without changing kernels; only outputs were compared.")
        return
    local = compare_codes(exported, session, images)
    certificate.results["reference_and_runtime"] = local.to_json()
    text = (
        f"{local.differing} of {local.total} codes differ from the integer reference, by up to {local.largest} steps."
    )
    if local.largest <= 1:
        certificate.add("runtime", "pass", text)
        return
    exact = sums_are_exact(runtime)
    for name, found in local.codes.items():
        layer = exported.layer_of(name)
        if found.largest > 1 and exact:
            certificate.add("runtime", "error", f"codes are off by up to {found.largest} steps.", layer)
    if not exact:
        reason = "Sums of 8-bit products saturate on this CPU, which has no VNNI instructions; verify on one that has."
        certificate.add("runtime", "warning", f"{text} {reason}")


def _measure_latency(
    certificate: Certificate, exported: Exported, runtime: Runtime, session: Session, images: Array, rounds: int
) -> None:
    plain = runtime.load(without_quantizers(exported.model))
    calls = {runtime.name: lambda: session.run(images), "float": lambda: plain.run(images)}
    ms = median_latency(calls, rounds)
    ratio = ms["float"] / ms[runtime.name]
    certificate.results["latency_ms"] = {"runtime": ms[runtime.name], "float": ms["float"]}
    text = f"{ms[runtime.name]:.3g} ms for {len(images)} image(s) on 1 thread, {ms['float']:.3g} ms in floating point"
    certificate.add("runtime", "note", f"{text}: {ratio:.2f} x as fast.")


# -- small things -----------------------------------------------------------------------------------------------------


def _in_chunks(exported: Exported, images: Array, run: Callable[[Array], Mapping[str, Array]]) -> dict[str, Array]:
    """The output of the network for any number of images."""
    name = exported.output
    return {name: np.concatenate([run(x)[name] for x in exported.chunks(images)])}


def _compare(first: Array, second: Array) -> dict[str, float]:
    """Figures of two sets of logits [N, C]."""
    return {
        "images": len(first),
        "top1_agreement": 100.0 * float((first.argmax(1) == second.argmax(1)).mean()),
        "largest_difference": float(np.abs(first - second).max()),
        "largest_logit": float(np.abs(first).max()),
    }


def _words(difference: Mapping[str, float]) -> str:
    return (
        f"top-1 agreement {difference['top1_agreement']:.2f} % of {difference['images']} images, largest difference of an "
        f"output {difference['largest_difference']:.2g} (largest output {difference['largest_logit']:.3g})"
    )
