"""Hardware targets: facts of each stack, schema, restricted spaces, costs in containers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets with timm
from eqnet.nn.supernet import trace_layers
from eqnet.space import COSTS, LayerConfig, LayerInfo, QuantConfig, QuantFormat, QuantSpace, bitops, model_size
from eqnet.space.hardware import HardwareTarget, load_target, op_kind, target_names
from eqnet.space.target_cost import act_memory, container_bitops, container_size, target_costs

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "eqnet" / "space" / "targets"
NAMES = [
    "cmsis-nn",
    "coreml",
    "executorch-arm",
    "executorch-xnnpack",
    "generic",
    "imx500",
    "litert",
    "onnxruntime-arm",
    "onnxruntime-x86",
    "openvino-cpu",
    "qualcomm-dsp",
    "qualcomm-htp",
    "tensorrt",
    "vitis-ai",
]
LAYERS = {
    layer.name: layer
    for layer in (
        LayerInfo("conv", "conv", (32, 3, 3, 3), 32 * 27 * 64, 3 * 64, reads_images=True),
        LayerInfo("depthwise", "conv", (32, 1, 3, 3), 32 * 9 * 64, 32 * 64, signed_input=False),
        LayerInfo("pointwise", "conv", (64, 32, 1, 1), 64 * 32 * 64, 32 * 64, signed_input=False),
        LayerInfo("strided", "conv", (64, 64, 1, 1), 64 * 64 * 16, 64 * 64, signed_input=False),
        LayerInfo("conv_transpose", "conv_transpose", (64, 16, 2, 2), 64 * 16 * 16 * 4, 64 * 16, signed_input=False),
        LayerInfo("read", "linear", (16, 16), 16 * 16, 0, calls=0),
        LayerInfo("linear", "linear", (40, 64), 40 * 64, 64, signed_input=False),
    )
}


def parse(text: str) -> QuantFormat:
    """'4 asym channel' -> format."""
    bits, symmetry, granularity = text.split()
    return QuantFormat(int(bits), symmetry == "sym", granularity)  # type: ignore[arg-type]


def space_of(**choices: Any) -> QuantSpace:
    return QuantSpace.from_layers(list(LAYERS.values()), **{"fixed": "none", **choices})


@pytest.fixture
def own_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a copy of a built-in target after a change of its data, and returns the path."""

    def write(change: Callable[[Any], Any], name: str = "litert") -> str:
        data = yaml.safe_load((FILES / f"{name}.yaml").read_text())
        change(data)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(data))
        return str(path)

    return write


# -- facts ------------------------------------------------------------------------------------------------------------


def test_the_built_in_targets_are_complete() -> None:
    assert target_names() == NAMES
    for name in NAMES:
        target = load_target(name)
        assert target.name == name
        assert target == load_target(str(FILES / f"{name}.yaml"))
        assert hash(target) == hash(load_target(name))


# target, layer, slot, format, container bits or None where it does not run
FACTS = [
    # TensorRT: symmetric only; W2-W7 as codes inside INT8; INT4 is weight-only
    ("tensorrt", "conv", "weight", "8 sym channel", 8),
    ("tensorrt", "linear", "weight", "4 sym tensor", 8),
    ("tensorrt", "conv", "weight", "8 asym channel", None),
    ("tensorrt", "conv", "act", "8 sym tensor", 8),
    ("tensorrt", "conv", "act", "8 asym tensor", None),
    # ONNX Runtime x86: asymmetric weights keep the int8 kernel, codes of 2-8 bits run as int8
    ("onnxruntime-x86", "conv", "weight", "8 asym channel", 8),
    ("onnxruntime-x86", "conv", "weight", "4 sym channel", 8),
    ("onnxruntime-x86", "conv", "weight", "2 sym tensor", 8),
    ("onnxruntime-x86", "linear", "act", "8 asym tensor", 8),
    ("onnxruntime-x86", "linear", "act", "4 asym tensor", 8),
    # ONNX Runtime Arm: symmetric weights
    ("onnxruntime-arm", "conv", "weight", "8 sym channel", 8),
    ("onnxruntime-arm", "conv", "weight", "8 asym channel", None),
    # OpenVINO: any weight zero point falls back to float; transposed convolutions take no activation zero point
    ("openvino-cpu", "conv", "weight", "8 sym channel", 8),
    ("openvino-cpu", "conv", "weight", "8 asym tensor", None),
    ("openvino-cpu", "conv", "act", "8 asym tensor", 8),
    ("openvino-cpu", "conv_transpose", "act", "8 asym tensor", None),
    ("openvino-cpu", "conv_transpose", "act", "8 sym tensor", 8),
    # LiteRT: int4 for FULLY_CONNECTED and CONV_2D only
    ("litert", "linear", "weight", "4 sym channel", 4),
    ("litert", "conv", "weight", "3 sym channel", 4),
    ("litert", "conv", "weight", "5 sym channel", 8),
    ("litert", "depthwise", "weight", "4 sym channel", 8),
    ("litert", "conv_transpose", "weight", "4 sym channel", 8),
    ("litert", "conv", "weight", "8 asym channel", None),
    ("litert", "conv", "act", "8 asym tensor", 8),
    # ExecuTorch XNNPACK: int4 only with dynamic activations
    ("executorch-xnnpack", "linear", "weight", "4 sym channel", 8),
    ("executorch-xnnpack", "conv", "act", "8 asym tensor", 8),
    ("executorch-xnnpack", "conv", "weight", "8 asym tensor", None),
    # Ethos-U: Vela takes 8-bit weights only
    ("executorch-arm", "conv", "weight", "4 sym channel", 8),
    ("executorch-arm", "conv", "act", "8 asym tensor", 8),
    # CMSIS-NN: int4 weights for conv and depthwise, transposed convolutions int8 only
    ("cmsis-nn", "conv", "weight", "4 sym channel", 4),
    ("cmsis-nn", "depthwise", "weight", "4 sym channel", 4),
    ("cmsis-nn", "linear", "weight", "4 sym channel", 8),
    ("cmsis-nn", "conv_transpose", "weight", "4 sym channel", 8),
    ("cmsis-nn", "conv", "act", "8 asym tensor", 8),
    # HTP v68: per channel for conv and deconv, not for gemm; int4 pays on 1x1 stride-1 with more than 32 outputs
    ("qualcomm-htp", "conv", "weight", "8 sym channel", 8),
    ("qualcomm-htp", "conv_transpose", "weight", "8 sym channel", 8),
    ("qualcomm-htp", "linear", "weight", "8 sym channel", None),
    ("qualcomm-htp", "linear", "weight", "8 sym tensor", 8),
    ("qualcomm-htp", "linear", "weight", "4 sym tensor", 4),
    ("qualcomm-htp", "pointwise", "weight", "4 sym channel", 4),
    ("qualcomm-htp", "strided", "weight", "4 sym channel", 8),
    ("qualcomm-htp", "conv", "weight", "4 sym channel", 8),
    ("qualcomm-htp", "conv", "act", "8 asym tensor", 8),
    # DSP: weights per tensor, asymmetric activations
    ("qualcomm-dsp", "conv", "weight", "8 sym channel", None),
    ("qualcomm-dsp", "conv", "weight", "8 sym tensor", 8),
    ("qualcomm-dsp", "conv", "act", "8 asym tensor", 8),
    # Core ML: W8A8
    ("coreml", "conv", "weight", "8 sym tensor", 8),
    ("coreml", "conv", "weight", "8 asym tensor", None),
    ("coreml", "conv", "act", "8 sym tensor", 8),
    # Vitis AI: per tensor, symmetric on both sides
    ("vitis-ai", "conv", "weight", "8 sym channel", None),
    ("vitis-ai", "conv", "weight", "8 sym tensor", 8),
    ("vitis-ai", "conv", "act", "8 asym tensor", None),
    # IMX500: 8, 4 and 2 bit containers, symmetric activations
    ("imx500", "conv", "weight", "2 sym channel", 2),
    ("imx500", "conv", "weight", "3 sym channel", 4),
    ("imx500", "conv", "weight", "4 sym channel", 4),
    ("imx500", "conv", "weight", "5 sym channel", 8),
    ("imx500", "conv", "act", "8 asym tensor", None),
    # generic: everything, as wide as it is
    ("generic", "depthwise", "weight", "3 asym channel", 3),
    ("generic", "conv_transpose", "act", "5 asym tensor", 5),
]


@pytest.mark.parametrize(("name", "layer", "slot", "text", "container"), FACTS)
def test_what_runs_in_which_container(name: str, layer: str, slot: Any, text: str, container: int | None) -> None:
    target, info, fmt = load_target(name), LAYERS[layer], parse(text)
    reason = target.allows(info, slot, fmt)
    assert (reason is None) == (container is not None)
    if container is None:
        assert reason is not None
        assert reason.startswith(f"layer '{layer}': {name} does not run ")
        with pytest.raises(ValueError, match=re.escape(reason)):
            target.container_bits(info, slot, fmt)
    else:
        assert target.container_bits(info, slot, fmt) == container


def runs(name: str, slot: Any, fmt: QuantFormat) -> bool:
    return load_target(name).allows(LAYERS["conv"], slot, fmt) is None


def test_only_onnxruntime_on_x86_runs_weight_zero_points() -> None:
    assert [n for n in NAMES if runs(n, "weight", QuantFormat(8, False, "tensor"))] == ["generic", "onnxruntime-x86"]


def test_power_of_two_stacks_and_tensorrt_have_no_activation_zero_point() -> None:
    assert [n for n in NAMES if not runs(n, "act", QuantFormat(8, False))] == ["imx500", "tensorrt", "vitis-ai"]


def test_every_target_runs_symmetric_w8a8_and_takes_low_bit_weights() -> None:
    for name in NAMES:
        assert runs(name, "act", QuantFormat(8))
        assert all(runs(name, "weight", QuantFormat(bits)) for bits in range(2, 9))


def test_activations_narrower_than_8_bits_run_where_a_clip_was_measured() -> None:
    narrow = [n for n in NAMES if runs(n, "act", QuantFormat(4))]
    assert narrow == ["generic", "onnxruntime-arm", "onnxruntime-x86", "openvino-cpu"]


def test_power_of_two_scales() -> None:
    conv, fmt = LAYERS["conv"], QuantFormat(8)
    assert [n for n in NAMES if load_target(n).act_rule(conv, fmt).power_of_two] == ["imx500", "vitis-ai"]
    assert [n for n in NAMES if load_target(n).weight_rule(conv, fmt).power_of_two] == ["vitis-ai"]


@pytest.mark.parametrize(
    ("name", "layer", "fmt", "expected"),
    [
        ("litert", "conv", "8 sym channel", (-127, 127)),
        ("litert", "conv", "4 sym channel", (-7, 7)),  # in an int4 container
        ("litert", "depthwise", "4 sym channel", (-8, 7)),  # in an int8 container, which holds -8
        ("qualcomm-htp", "linear", "4 sym tensor", (-7, 7)),
        ("executorch-arm", "conv", "8 sym channel", (-127, 127)),
        ("executorch-xnnpack", "conv", "8 sym channel", (-127, 127)),
        ("openvino-cpu", "conv", "8 sym channel", (-127, 127)),
        ("tensorrt", "conv", "8 sym channel", (-128, 127)),
        ("onnxruntime-x86", "conv", "8 asym channel", (-128, 127)),
        ("imx500", "conv", "2 sym channel", (-2, 1)),
        ("generic", "conv", "5 asym channel", (-16, 15)),
    ],
)
def test_ranges_of_weight_codes(name: str, layer: str, fmt: str, expected: tuple[int, int]) -> None:
    assert load_target(name).code_range(LAYERS[layer], "weight", parse(fmt)) == expected


@pytest.mark.parametrize(
    ("name", "bits", "signed", "expected"),
    [
        ("onnxruntime-x86", 8, False, (0, 255)),
        ("onnxruntime-x86", 4, False, (0, 15)),
        ("litert", 8, False, (0, 255)),  # int8 with zero point -128
        ("tensorrt", 8, True, (-128, 127)),
        ("tensorrt", 8, False, (-128, 127)),  # no zero point to shift 0..255 into int8: half of the codes stays unused
        ("vitis-ai", 8, False, (-128, 127)),
        ("imx500", 8, False, (0, 255)),
    ],
)
def test_ranges_of_activation_codes(name: str, bits: int, signed: bool, expected: tuple[int, int]) -> None:
    assert load_target(name).code_range(LAYERS["conv"], "act", QuantFormat(bits), signed) == expected


def test_unsigned_codes_with_a_spare_bit_need_no_shift(own_file: Callable[..., str]) -> None:
    def narrow(data: Any) -> None:
        data["ops"]["conv"]["act"][0]["bits"] = [7, 8]

    target = load_target(own_file(narrow, "tensorrt"))
    assert target.code_range(LAYERS["conv"], "act", QuantFormat(7), signed=False) == (0, 127)


def test_transposed_convolutions_compute_in_floating_point_on_onnxruntime() -> None:
    float_kernels = {
        (name, kind)
        for name in NAMES
        for kind, rules in load_target(name).ops
        if rules is not None and rules.kernel == "float"
    }
    assert float_kernels == {("onnxruntime-x86", "conv_transpose"), ("onnxruntime-arm", "conv_transpose")}


def test_biases_rounding_and_fixed_outputs() -> None:
    bias = {name: load_target(name).rules(LAYERS["conv"]).bias for name in NAMES}  # type: ignore[union-attr]
    assert [n for n in NAMES if bias[n].dtype == "int8"] == ["vitis-ai"]
    assert {n for n in NAMES if bias[n].dtype == "float32"} == {
        "coreml",
        "generic",
        "imx500",
        "openvino-cpu",
        "tensorrt",
    }
    assert bias["litert"].scale == "weight_times_act"
    assert load_target("vitis-ai").rounding == "half_up"
    assert load_target("tensorrt").rounding == load_target("onnxruntime-x86").rounding == "half_even"
    fixed = {o.op: (o.scale, o.zero_point) for o in load_target("litert").fixed_outputs}
    assert fixed == {"softmax": (1 / 256, -128), "logistic": (1 / 256, -128), "tanh": (1 / 128, 0)}


@pytest.mark.parametrize(
    ("layer", "kind"), [(n, n if n in ("conv_transpose", "linear") else "conv") for n in LAYERS if n != "read"]
)
def test_kinds_of_operations(layer: str, kind: str) -> None:
    assert op_kind(LAYERS[layer]) == ("depthwise" if layer == "depthwise" else kind)


def test_a_kernel_of_one_input_channel_is_not_always_depthwise() -> None:
    grayscale = LayerInfo("stem", "conv", (16, 1, 4, 4), 16 * 16 * 4, 64, reads_images=True)
    single = LayerInfo("mask", "conv", (8, 1, 3, 3), 8 * 9 * 64, 64)
    valid = LayerInfo("mask", "conv", (8, 1, 3, 3), 8 * 9 * 36, 64)
    assert [op_kind(layer) for layer in (grayscale, single, valid)] == ["conv"] * 3


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenetv2_100", (3, 64, 64)), ("cifar_resnet20", (1, 8, 8)), ("mixnet_s", (3, 64, 64))]
)
def test_depthwise_layers_of_real_networks_are_found(name: str, size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=size[0])
    groups = {n: m.groups for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for layer in trace_layers(model, size):
        depthwise = groups.get(layer.name, 1) > 1 and layer.weight_shape[1] == 1
        assert (op_kind(layer) == "depthwise") == depthwise, layer.name


# -- files ------------------------------------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="unknown target 'onnxruntime-x68'; did you mean 'onnxruntime-x86'"):
        load_target("onnxruntime-x68")
    with pytest.raises(ValueError, match=r"unknown target 'qqqq'; the built-in ones are cmsis-nn, .*, vitis-ai"):
        load_target("qqqq")
    with pytest.raises(ValueError, match=r"cannot read the target file missing\.yaml: No such file"):
        load_target("missing.yaml")


def conv_of(data: Any) -> Any:
    return data["ops"]["conv"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rounding"), r"'rounding' is missing\.$"),
        (lambda d: conv_of(d).pop("bias"), r"'bias' is missing in ops\.conv\.$"),
        (lambda d: d["ops"].pop("depthwise"), r"'depthwise' is missing in ops\.$"),
        (lambda d: conv_of(d)["weight"][0].pop("symmetric"), r"'symmetric' is missing in ops\.conv\.weight\.0\.$"),
        (lambda d: d.update(roundings="x"), "unknown key 'roundings'; did you mean 'rounding'"),
        (lambda d: conv_of(d)["act"][0].update(zeropoint="any"), r"unknown key 'zeropoint' in ops\.conv\.act\.0; did you mean 'zero_point'"),
        (lambda d: conv_of(d)["act"][0].update(bits=[9]), r"ops\.conv\.act\.0\.bits\.0: .*less than or equal to 8; got 9"),
        (lambda d: conv_of(d)["act"][0].update(bits=[]), r"ops\.conv\.act\.0\.bits: .*at least 1 item"),
        (lambda d: conv_of(d)["act"][0].update(bits=["8"]), r"ops\.conv\.act\.0\.bits\.0: .*valid integer; got '8'"),
        (lambda d: conv_of(d)["weight"][0].update(bits=[8], container="int4"), r"ops\.conv\.weight\.0: codes of 8 bits do not fit into the container int4"),
        (lambda d: conv_of(d)["weight"][0].update(container="int3"), r"ops\.conv\.weight\.0\.container: .*'int8', 'int4', 'int2' or 'packed'; got 'int3'"),
        (lambda d: conv_of(d)["act"][0].update(signed=["unsigned"], zero_point="zero"), "cannot hold negative values; add 'signed'"),
        (lambda d: conv_of(d)["bias"].update(dtype="float32"), "a float32 bias has no scale; write scale: null"),
        (lambda d: d.update(rounding="up"), "rounding: .*'half_even', 'half_up' or 'half_away'; got 'up'"),
        (lambda d: d.update(sources=[]), "sources: .*at least 1 item"),
        (lambda d: d.update(integer_add="yes"), "integer_add: .*valid boolean; got 'yes'"),
    ],
)  # fmt: skip
def test_wrong_files(change: Callable[[Any], Any], message: str, own_file: Callable[..., str]) -> None:
    path = own_file(change)
    with pytest.raises(ValueError, match=message) as error:
        load_target(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not a YAML file"), ("- a", "got a list"), ("", "got a NoneType"), ("a: \x00", "not a YAML")],
)
def test_files_that_are_no_target(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_target(str(path))


def test_an_operation_may_be_missing_on_a_device(own_file: Callable[..., str]) -> None:
    target = load_target(own_file(lambda d: d["ops"].update(conv_transpose=None)))
    assert target.allows(LAYERS["conv_transpose"], "weight", QuantFormat(8)) == (
        "layer 'conv_transpose': litert does not run transposed convolutions."
    )
    with pytest.raises(ValueError, match="litert does not run transposed convolutions; the space offers only 2-8 bits"):
        target.restrict(space_of())


# -- spaces and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fixed", ["first_last_8bit", "none"])
def test_a_restricted_space_holds_exactly_what_runs(name: str, fixed: str) -> None:
    target, space = load_target(name), space_of(fixed=fixed)
    restricted = target.restrict(space)
    assert restricted.fixed == space.fixed
    for layer in space.layers:
        for slot in ("weight", "act"):
            expected = [f for f in space.choices(layer.name, slot) if target.allows(layer, slot, f) is None]
            assert list(restricted.choices(layer.name, slot)) == expected
    assert restricted.choices("read", "act") == ()


@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1), st.booleans())
def test_configs_of_a_restricted_space_have_no_violation(name: str, seed: int, tied: bool) -> None:
    ties = [["pointwise", "strided"], ["conv", "linear"]] if tied else []
    space = load_target(name).restrict(space_of(ties=ties))
    config = space.sample(np.random.default_rng(seed))
    assert load_target(name).check(config, space.layers) == []


@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1))
def test_violations_are_the_layers_outside_the_restricted_space(name: str, seed: int) -> None:
    target, space = load_target(name), space_of()
    restricted = target.restrict(space)
    config = space.sample(np.random.default_rng(seed))
    outside = [
        (layer.name, slot)
        for layer in space.layers
        for slot, fmt in (("weight", config[layer.name].weight), ("act", config[layer.name].act))
        if fmt is not None and fmt not in restricted.choices(layer.name, slot)  # type: ignore[arg-type]
    ]
    found = target.check(config, space.layers)
    assert len(found) == len(outside)
    assert all(f"layer {layer!r}:" in sentence for (layer, _), sentence in zip(outside, found, strict=True))


def test_generic_restricts_nothing() -> None:
    assert load_target("generic").restrict(space_of()) == space_of()


def test_an_emptied_layer_is_explained() -> None:
    with pytest.raises(ValueError) as error:
        load_target("tensorrt").restrict(space_of(bits=[4, 8], symmetric=[False]))
    assert str(error.value) == (
        "layer 'conv': tensorrt does not run asymmetric weights in convolutions, only 2-8 bits in int8, symmetric, per "
        "tensor or channel; the space offers only 4, 8 bits asymmetric per tensor; 4, 8 bits asymmetric per channel."
    )
    with pytest.raises(
        ValueError, match=r"layer 'conv': litert does not run 4-bit activations in convolutions, only 8 bits"
    ):
        load_target("litert").restrict(space_of(bits=[4]))
    with pytest.raises(
        ValueError, match=r"'read': qualcomm-htp .* weights with one scale per channel in linear layers"
    ):
        load_target("qualcomm-htp").restrict(space_of(granularity=["channel"]))


def test_tied_layers_without_a_common_format_are_named() -> None:
    target = load_target("qualcomm-htp")
    with pytest.raises(ValueError, match=r"layer 'linear': .* \(tied: conv, linear\)\.$"):
        target.restrict(space_of(granularity=["channel"], ties=[["conv", "linear"]]))


def test_fixed_layers_are_restricted_in_their_forms() -> None:
    space = load_target("vitis-ai").restrict(space_of(fixed="first_last_8bit"))
    assert space.choices("conv", "weight") == (QuantFormat(8, True, "tensor"),)
    assert space.choices("conv", "act") == (QuantFormat(8),)
    pinned = {"linear": LayerConfig(QuantFormat(8, False), QuantFormat(8))}
    with pytest.raises(ValueError, match="layer 'linear': vitis-ai does not run asymmetric weights"):
        load_target("vitis-ai").restrict(space_of(fixed=pinned))


def test_first_and_last_layer_rule(own_file: Callable[..., str]) -> None:
    target = load_target(own_file(lambda d: d.update(first_last_bits=[8]), "onnxruntime-x86"))
    space = target.restrict(space_of())
    bits = {n: {f.bits for f in space.choices(n, "weight")} for n in ("conv", "depthwise", "linear")}
    assert bits == {"conv": {8}, "depthwise": set(range(2, 9)), "linear": {8}}
    config = space_of().uniform(4, space_of().forms[0])
    sentences = target.check(config, list(LAYERS.values()))
    assert [s.split(":")[0] for s in sentences] == ["layer 'conv'"] * 2 + ["layer 'linear'"] * 2
    assert "4-bit weights in the first and last layer" in sentences[0]
    with pytest.raises(
        ValueError, match=r"layer 'conv'.*\(8 bits in the first and last layer\).*the space offers only 4 bits"
    ):
        target.restrict(space_of(bits=[4]))


def test_inputs_left_in_floating_point_are_violations_where_the_layer_is_called() -> None:
    config = QuantConfig({name: LayerConfig(QuantFormat(8), None) for name in LAYERS})
    found = load_target("litert").check(config, list(LAYERS.values()))
    assert len(found) == len(LAYERS) - 1
    assert not any("'read'" in sentence for sentence in found)
    assert found[0] == (
        "layer 'conv': litert does not run inputs in floating point in convolutions, only 8 bits in int8, signed, any zero point."
    )


def test_a_config_of_another_network_is_refused() -> None:
    config = QuantConfig({"other": LayerConfig(QuantFormat(8), None)})
    with pytest.raises(ValueError, match=r"does not belong to these layers: conv, .* on one side only"):
        load_target("litert").check(config, list(LAYERS.values()))


# -- costs ------------------------------------------------------------------------------------------------------------


def config_of(space: QuantSpace, weight: QuantFormat, act: QuantFormat) -> QuantConfig:
    return QuantConfig({x.name: LayerConfig(weight, act if x.calls else None) for x in space.layers})


def test_bit_serial_hardware_costs_what_the_codes_cost() -> None:
    target, space = load_target("generic"), space_of(float_numel=7)
    for ours, theirs in ((container_bitops, bitops), (container_size, model_size)):
        np.testing.assert_array_equal(ours(space, target).table, theirs(space).table)
    assert container_size(space, target).constant == 28


def test_containers_decide_the_cost_on_onnxruntime() -> None:
    target = load_target("onnxruntime-x86")
    space = target.restrict(space_of())
    size, compute = container_size(space, target), container_bitops(space, target)
    low, high = (config_of(space, QuantFormat(b), QuantFormat(b)) for b in (3, 8))
    assert compute.of(low) == compute.of(high)
    assert size.of(low) == size.of(high) == model_size(space).of(high)
    macs = sum(x.macs * {"read": 8 * 32, "conv_transpose": 32 * 32}.get(x.name, 64) for x in LAYERS.values())
    assert compute.of(low) == macs


def test_containers_of_the_imx500() -> None:
    target = load_target("imx500")
    space = target.restrict(space_of(act_bits=[8]))
    act, numel = QuantFormat(8), sum(x.weight_numel for x in LAYERS.values())
    for bits, container in ((2, 2), (3, 4), (4, 4), (6, 8), (8, 8)):
        config = config_of(space, QuantFormat(bits), act)
        steps = 4 * len(LAYERS) + 4 * (len(LAYERS) - 1)  # of weights and inputs
        assert container_size(space, target).of(config) == numel * container / 8 + steps


def test_act_memory_counts_containers() -> None:
    space = space_of(granularity=["tensor"])
    for name, bits, expected in (("generic", 4, 4), ("onnxruntime-x86", 4, 8)):
        target = load_target(name)
        cost = act_memory(target.restrict(space), target)
        config = config_of(space, QuantFormat(8), QuantFormat(bits))
        assert cost.of(config) == sum(x.act_numel for x in LAYERS.values()) * expected / 8


@pytest.mark.parametrize("cost", [container_size, container_bitops, act_memory])
def test_costs_need_a_restricted_space(cost: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"layer 'conv': vitis-ai does not run .* Restrict the space to vitis-ai first"
    ):
        cost(space_of(), load_target("vitis-ai"))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_a_budget_have_a_meaning_on_every_target(name: str) -> None:
    target = load_target(name)
    space = target.restrict(space_of())
    costs = target_costs(target)
    assert set(costs) == set(COSTS)
    assert [costs[key](space).name for key in costs] == list(costs)
    largest, smallest = space.largest(), space.smallest()
    for key in ("size", "bitops"):
        cost = costs[key](space)
        assert COSTS[key](space).of(smallest) <= cost.of(smallest) <= cost.of(largest)


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_lists_the_built_in_targets() -> None:
    text = (ROOT / "docs" / "targets.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    targets = [load_target(name) for name in NAMES]
    assert rows == [(t.name, t.title, t.describe("weight"), t.describe("act")) for t in targets]


def test_the_page_shows_a_target_file_that_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "targets.md").read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "board.yaml"
    path.write_text(block)
    target = load_target(str(path))
    assert isinstance(target, HardwareTarget)
    assert target.name not in NAMES
    assert target.restrict(space_of(act_bits=[8])).num_genes == space_of().num_genes
