"""Plans of other tools: what is written can be read back and computes the same; files of the tools; bad input; the schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from conftest import Eqnet
from test_search_target import call, run  # noqa: F401
from torch import nn

from eqnet import cli
from eqnet.checkpoint import read_json, save_tensors, write_json
from eqnet.deploy.interchange import config_from_aimet, config_from_modelopt, config_to_aimet, config_to_modelopt
from eqnet.nn.supernet import Supernet
from eqnet.run import Run
from eqnet.space import LayerConfig, LayerInfo, QuantConfig, QuantFormat, QuantSpace

SCHEMA = read_json(Path(cli.__file__).with_name("subnet.schema.json"))


@pytest.fixture
def supernet(cnn: nn.Module, images: Callable[..., torch.Tensor]) -> Supernet:
    net = Supernet.from_model(cnn, (3, 8, 8), fixed="none")
    net.calibrate(images(32))
    return net.eval()


def sampled(supernet: Supernet, seed: int, **restriction: bool) -> QuantConfig:
    space = supernet.space.restrict(lambda layer, slot, fmt: all(getattr(fmt, k) == v for k, v in restriction.items()))
    return space.sample(np.random.default_rng(seed))


def store(run: Run, name: str, config: QuantConfig) -> Path:  # noqa: F811
    """A searched subnet in a run."""
    folder = run.path / "search" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        write_json(folder / "subnet.json", {"layers": config.to_json()})
        save_tensors(folder / "subnet.safetensors", run.load_supernet()[0].extract(config).state_dict())
    return folder / "subnet.json"


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_encodings_1_0_0_come_back_exactly(seed: int, supernet: Supernet) -> None:
    config = sampled(supernet, seed)
    document = json.loads(json.dumps(config_to_aimet(config, supernet.space.layers, supernet.extract(config))))
    assert document["version"] == "1.0.0"
    assert config_from_aimet(document, supernet.space) == config


@pytest.mark.parametrize("seed", range(5))
def test_encodings_0_6_1_come_back_as_the_same_grid(seed: int, supernet: Supernet) -> None:
    config = sampled(supernet, seed)
    subnet = supernet.extract(config)
    document = json.loads(json.dumps(config_to_aimet(config, supernet.space.layers, subnet, "aimet-0.6.1")))
    back = config_from_aimet(document, supernet.space)
    for name, layer in config.items():
        assert back[name].weight == layer.weight
        if back[name].act != layer.act:  # unsigned codes with zero point 0: the file has no word for symmetric
            assert document["activation_encodings"][name]["input"]["0"]["offset"] == 0
            assert layer.act is not None
            assert back[name].act == QuantFormat(layer.act.bits, True)
    symmetric = sampled(supernet, seed, symmetric=True)
    document = config_to_aimet(symmetric, supernet.space.layers, supernet.extract(symmetric), "aimet-0.6.1")
    assert config_from_aimet(document, supernet.space) == symmetric


@pytest.mark.parametrize("seed", range(5))
def test_recipes_come_back_exactly(seed: int, supernet: Supernet) -> None:
    config = sampled(supernet, seed, symmetric=True)
    text = yaml.safe_dump(config_to_modelopt(config, supernet.space.layers))
    assert config_from_modelopt(yaml.safe_load(text), supernet.space.layers) == config


def rows_of(document: dict[str, Any], layer: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return document["param_encodings"][f"{layer}.weight"], document["activation_encodings"][layer]["input"]["0"]


def assert_same_codes(x: torch.Tensor, rows: list[dict[str, Any]], expected: torch.Tensor) -> None:
    """AIMET's quantization from "min" and "max" of the rows gives `expected`; at ties (1e-5 steps) one code may differ."""
    shape = (len(rows), *[1] * (x.ndim - 1)) if len(rows) > 1 else ()
    low, high = (torch.tensor([row[key] for row in rows], dtype=torch.float64).view(shape) for key in ("min", "max"))
    steps = 2 ** rows[0]["bitwidth"] - 1
    scale = (high - low) / steps
    offset = (low / scale).round()
    found = (x.double() / scale).round().sub(offset).clamp(0, steps) + offset
    wrong = (found - expected.double() / scale).abs()
    tie = ((x.double() / scale).frac().abs() - 0.5).abs() < 1e-5
    assert wrong[~tie].max() < 1e-4
    assert wrong.max() < 1 + 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_encodings_compute_what_the_subnet_computes(seed: int, supernet: Supernet) -> None:
    config = sampled(supernet, seed)
    subnet = supernet.extract(config)
    document = config_to_aimet(config, supernet.space.layers, subnet, "aimet-0.6.1")
    for name, layer in supernet.layers.items():
        weights, act = rows_of(document, name)
        quantized: Any = subnet.get_submodule(name)
        assert_same_codes(layer.latent_weight.detach(), weights, quantized.weight)
        x = torch.randn(4, 500, generator=torch.Generator().manual_seed(seed)) * 3
        x = x if supernet.space.info(name).signed_input else x.abs()
        assert_same_codes(x, [act], quantized.quantize_input(x))
        for row in [*weights, act]:  # the numbers of a row agree with each other
            assert row["min"] == row["offset"] * row["scale"]
            assert row["max"] == (row["offset"] + 2 ** row["bitwidth"] - 1) * row["scale"]


# -- what the tools write ----------------------------------------------------------------------------------------------

INT8_DEFAULT = [  # of ModelOpt 0.47, shortened
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    {"quantizer_name": "*lm_head*", "enable": False},
    {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
]


def test_patterns_of_modelopt_apply_in_order(supernet: Supernet) -> None:
    layers = supernet.space.layers
    plain = config_from_modelopt({"quant_cfg": INT8_DEFAULT, "algorithm": "max"}, layers)
    assert set(plain.values()) == {LayerConfig(QuantFormat(8, True, "channel"), QuantFormat(8))}
    later = [
        *INT8_DEFAULT,
        {"quantizer_name": "3.weight_quantizer", "cfg": {"num_bits": 4, "axis": None}},
        {"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": 6}},
        {"quantizer_name": "3.*", "enable": True},
        {"quantizer_name": "8.input_quantizer", "enable": False},
    ]
    config = config_from_modelopt({"quantize": {"quant_cfg": later}}, layers)
    assert config["3"] == LayerConfig(QuantFormat(4), QuantFormat(8))
    assert config["8"].act is None
    (fc,) = [info.name for info in layers if info.kind == "linear"]
    assert config[fc].act == QuantFormat(6)
    assert config["0"] == plain["0"]


def test_files_of_aimet_that_name_outputs_need_the_format_of_inputs(supernet: Supernet) -> None:
    config = sampled(supernet, 0)
    document = config_to_aimet(config, supernet.space.layers, supernet.extract(config), "aimet-0.6.1")
    first = supernet.space.layers[0].name
    acts = document["activation_encodings"]
    document["activation_encodings"] = {first: acts[first], "1": {"output": {"0": acts[first]["input"]["0"]}}}
    document["version"] = "1.0.0"  # as aimet_torch writes it
    document["param_encodings"]["4.weight"] = [{"dtype": "float", "bitwidth": 16}]  # a normalisation: no layer
    with pytest.raises(ValueError, match=r"do not name the input of layer '3'; give .* --unnamed-inputs"):
        config_from_aimet(document, supernet.space)
    back = config_from_aimet(document, supernet.space, QuantFormat(8, False))
    assert back[first] == config[first]
    assert all(
        back[name] == LayerConfig(config[name].weight, QuantFormat(8, False)) for name in config if name != first
    )


def test_one_output_channel_takes_the_granularity_of_the_space() -> None:
    layer = LayerInfo("out", "conv", (1, 4, 1, 1), 4, 4)
    row = {"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "offset": -8}
    document = {"param_encodings": {"out.weight": [row]}, "activation_encodings": {"out": {"input": {"0": row}}}}
    for granularity in ("tensor", "channel"):
        space = QuantSpace.from_layers([layer], bits=[4], granularity=[granularity], fixed="none")  # type: ignore[list-item]
        assert config_from_aimet(document, space)["out"].weight.granularity == granularity


def test_channels_of_transposed_convolutions_lie_on_the_second_axis() -> None:
    layer = LayerInfo("up", "conv_transpose", (4, 6, 2, 2), 96, 64)
    config = QuantConfig({"up": LayerConfig(QuantFormat(3, True, "channel"), QuantFormat(8))})
    document = config_to_modelopt(config, [layer])
    assert document["quantize"]["quant_cfg"][1]["cfg"]["axis"] == 1
    assert config_from_modelopt(document, [layer]) == config


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan_format", "name"), [("aimet", "a.json"), ("aimet-0.6.1", "b.json"), ("modelopt", "c.yaml")]
)
def test_a_plan_goes_out_and_comes_back(plan_format: str, name: str, eqnet: Eqnet, run: Run, tmp_path: Path) -> None:  # noqa: F811
    space = run.load_supernet()[0].space
    symmetric = space.restrict(lambda layer, slot, fmt: fmt.symmetric)
    subnet = store(run, "symmetric", symmetric.sample(np.random.default_rng(0)))
    code, out, err = eqnet("plan", "export", subnet, "--format", plan_format, "--output", tmp_path / name)
    assert (code, err) == (0, "")
    assert out == f"saved {tmp_path / name}\n"
    back = tmp_path / "subnet.json"
    arguments = ["--format", plan_format, "--run", run.path, "--output", back]
    code, _, err = eqnet("plan", "import", tmp_path / name, *arguments)
    assert (code, err) == (0, "")
    assert read_json(back)["layers"] == read_json(subnet)["layers"]
    check(back)
    code, _, err = eqnet("plan", "import", tmp_path / name, *arguments)
    assert code == 2
    assert "already exists" in err


def test_an_imported_plan_can_be_measured(eqnet: Eqnet, call: Eqnet, run: Run, tmp_path: Path) -> None:  # noqa: F811
    write_json(tmp_path / "recipe.json", {"quant_cfg": INT8_DEFAULT})
    subnet = tmp_path / "subnet.json"
    code, _, err = eqnet(
        "plan", "import", tmp_path / "recipe.json", "--format", "modelopt", "--run", run.path, "--output", subnet
    )
    assert (code, err) == (0, "")
    code, out, err = call("--subnet", str(subnet))
    assert code == 0, err
    assert "validation" in out


@pytest.mark.parametrize(
    ("plan_format", "change", "message"),
    [
        ("aimet", lambda d: d.pop("param_encodings"), "these are not AIMET encodings of version 1.0.0 or 0.6.1"),
        ("aimet", lambda d: d["param_encodings"].pop(0), "do not name 'conv1.weight'"),
        ("aimet", lambda d: d["param_encodings"][0].update(bw=16), "the weight of layer 'conv1' has 16 bits"),
        ("aimet", lambda d: d["param_encodings"][0].update(bw=5), "is not in the space"),
        ("aimet", lambda d: d["param_encodings"][0].update(enc_type="LPBQ"), "has the encoding LPBQ"),
        ("aimet", lambda d: d["param_encodings"][0].update(offset=[0, 0, 0]), "has 3 step sizes for 4 channels"),
        ("aimet", lambda d: d["param_encodings"][0].update(dtype="FLOAT"), "is in floating point in the encodings"),
        ("aimet", lambda d: d["activation_encodings"].pop(1), "do not name the input of layer"),
        ("modelopt", lambda d: d.pop("quantize"), "this is not a recipe of ModelOpt"),
        ("modelopt", lambda d: cfg_of(d).update(num_bits=[4, 3]), "the weight of layer 'conv1' has [4, 3] bits"),
        ("modelopt", lambda d: cfg_of(d).update(axis=1), "has step sizes along the axis 1"),
        ("modelopt", lambda d: cfg_of(d).update(axis=None, block_sizes={"-1": 32}), "has block_sizes in the recipe"),
        ("modelopt", lambda d: cfg_of(d).update(type="dynamic"), "quantized in a sequence, or dynamically"),
        ("modelopt", lambda d: d["quantize"]["quant_cfg"].pop(1), "layer 'conv1' has no weight quantizer"),
        ("modelopt", lambda d: d["quantize"]["quant_cfg"].append({"$import": "x"}), "resolve `$import` first"),
    ],
)
def test_what_no_config_can_be_is_one_sentence(
    plan_format: str,
    change: Callable[[Any], object],
    message: str,
    eqnet: Eqnet,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    space = run.load_supernet()[0].space
    config = space.restrict(lambda layer, slot, fmt: fmt.symmetric).sample(np.random.default_rng(0))
    subnet = run.load_supernet()[0].extract(config)
    aimet = config_to_aimet(config, space.layers, subnet)
    document = json.loads(json.dumps(aimet if plan_format == "aimet" else config_to_modelopt(config, space.layers)))
    change(document)
    write_json(tmp_path / "plan.json", document)
    arguments = ["--format", plan_format, "--run", run.path, "--output", tmp_path / "subnet.json"]
    code, _, err = eqnet("plan", "import", tmp_path / "plan.json", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert str(tmp_path / "plan.json") in err
    assert not (tmp_path / "subnet.json").exists()


def cfg_of(document: Any) -> dict[str, Any]:
    """The attributes of the first weight quantizer of a recipe."""
    cfg: dict[str, Any] = document["quantize"]["quant_cfg"][1]["cfg"]
    return cfg


def test_asymmetric_formats_do_not_go_to_modelopt(eqnet: Eqnet, run: Run, tmp_path: Path) -> None:  # noqa: F811
    space = run.load_supernet()[0].space.restrict(lambda layer, slot, fmt: fmt.symmetric == (slot == "weight"))
    subnet = store(run, "asymmetric", space.sample(np.random.default_rng(1)))
    output = tmp_path / "recipe.yaml"
    code, _, err = eqnet("plan", "export", subnet, "--format", "modelopt", "--output", output)
    assert code == 2
    assert "the input of layer 'conv1' is asymmetric" in err
    assert not output.exists()
    code, _, err = eqnet("plan", "export", subnet, "--format", "aimet", "--output", tmp_path / "no" / "plan.json")
    assert code == 2
    assert "folder of the output" in err


@pytest.mark.parametrize("text", ["8", "asym", "8-maybe", "12-sym"])
def test_formats_of_unnamed_inputs_are_checked(text: str, eqnet: Eqnet, run: Run, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["--format", "aimet", "--run", run.path, "--output", tmp_path / "s.json", "--unnamed-inputs", text]
    code, _, err = eqnet("plan", "import", tmp_path / "none.json", *arguments)
    assert code == 2
    assert "write bits and symmetry" in err or "whole number from 2 to 8" in err


# -- the schema --------------------------------------------------------------------------------------------------------


def check(path: Path) -> None:
    """A subnet's file follows the schema, and has no key that the schema does not describe."""
    document = read_json(path)
    jsonschema.validate(document, SCHEMA)
    assert set(document) <= set(SCHEMA["properties"])


def test_the_schema_is_printed_and_valid(eqnet: Eqnet) -> None:
    code, out, err = eqnet("plan", "schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    page = (Path(cli.__file__).parents[1] / "docs" / "interchange.md").read_text()
    jsonschema.validate(json.loads(page.split("```json")[1].split("```")[0]), SCHEMA)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--budget", "5", "--score", "squared_error", "--form", "channel-sym-sym"],
        ["--budget", "size=20KiB", "--method", "ilp", "--score", "squared_error", "--target", "tensorrt"],
    ],
)
def test_subnets_of_searches_follow_the_schema(arguments: list[str], call: Eqnet, run: Run) -> None:  # noqa: F811
    before = set(run.path.glob("search/*/subnet.json"))
    code, _, err = call(*arguments)
    assert code == 0, err
    (path,) = set(run.path.glob("search/*/subnet.json")) - before
    check(path)


@pytest.mark.parametrize(
    "layers",
    [
        None,
        {"conv": {"weight": {"bits": 9, "symmetric": True, "granularity": "tensor"}, "act": None}},
        {"conv": {"weight": {"bits": 4, "symmetric": True, "granularity": "row"}, "act": None}},
        {"conv": {"weight": {"bits": 4, "symmetric": True, "granularity": "tensor"}}},
    ],
)
def test_the_schema_refuses_what_cannot_be_read(layers: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"layers": layers}, SCHEMA)
    with pytest.raises((ValueError, TypeError)):
        QuantConfig.from_json(layers)
