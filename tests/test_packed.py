"""Packed subnets: every byte is accounted for, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from deploy_nets import SmallNet, make_subnet, some_images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import eqnet.nn.models  # noqa: F401
from eqnet.deploy.codes import layer_codes, quantized_layers
from eqnet.deploy.packed import load_packed, pack_codes, save_packed, unpack_codes
from eqnet.nn.supernet import Supernet
from eqnet.space import COSTS


@given(bits=st.integers(2, 8), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_packing_is_lossless_and_tight(bits: int, shape: list[int], seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, shape).astype(np.int8)
    packed = pack_codes(codes, bits)
    assert packed.nbytes == -(-codes.size * bits // 8)
    assert np.array_equal(unpack_codes(packed, bits, tuple(shape)), codes)


def test_the_order_of_bits() -> None:
    """Little end first, across bytes: three codes of 3 bits, 1, -1 and -4, are 001, 111 and 100."""
    assert pack_codes(np.array([1, -1, -4], np.int8), 3).tolist() == [0b00_111_001, 0b1]
    assert pack_codes(np.array([-128, 5], np.int8), 8).tolist() == [128, 5]


def supernet_of(model: nn.Module, size: tuple[int, ...], **choices: Any) -> Supernet:
    supernet = Supernet.from_model(model, size, **choices)
    supernet.calibrate(some_images(4, size))
    return supernet


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (SmallNet, (3, 8, 8)),
        (lambda: timm.create_model("cifar_resnet20", width=3), (3, 16, 16)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24), (3, 32, 32)),
        (lambda: timm.create_model("mobilenetv3_small_050", num_classes=7), (3, 32, 32)),
    ],
)
def test_the_payload_is_the_size_cost(make: Any, size: tuple[int, ...], tmp_path: Path) -> None:
    """To the byte, whatever the formats; the header comes on top."""
    supernet = supernet_of(make(), size)
    space, rng = supernet.space, np.random.default_rng(0)
    cost = COSTS["size"](space)
    configs = [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(4))]
    for i, config in enumerate(configs):
        subnet = supernet.extract(config)
        payload = save_packed(subnet, config, tmp_path / f"{i}.safetensors")
        assert payload == cost.of(config)
        with safetensors.safe_open(tmp_path / f"{i}.safetensors", "np") as file:
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) == payload  # noqa: SIM118
        assert (tmp_path / f"{i}.safetensors").stat().st_size > payload


def test_nothing_is_lost(tmp_path: Path) -> None:
    supernet = supernet_of(SmallNet(), (3, 8, 8))
    config = supernet.space.sample(np.random.default_rng(3))
    subnet = supernet.extract(config)
    save_packed(subnet, config, tmp_path / "net.safetensors")
    packed = load_packed(tmp_path / "net.safetensors")
    assert packed.config == config
    for name, module in quantized_layers(subnet).items():
        mine, theirs = packed.layers[name], layer_codes(module)
        assert (mine.kind, mine.axis, mine.act) == (theirs.kind, theirs.axis, theirs.act)
        for key in ("codes", "scale", "zero_point", "bias"):
            a, b = getattr(mine, key), getattr(theirs, key)
            assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
        assert np.array_equal(mine.weight, module.weight.numpy())  # type: ignore[operator, union-attr]
    state = subnet.state_dict()
    assert {"bn1.running_var", "fc1.bias"} <= set(packed.floats)
    for name, value in packed.floats.items():
        assert torch.equal(value, state[name])
    left = {k for k in state if k.rsplit(".", 1)[0] not in packed.layers and state[k].is_floating_point()}
    assert left <= set(packed.floats)


def test_wrong_files(tmp_path: Path) -> None:
    subnet, config = make_subnet(SmallNet())
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        load_packed(path)
    save_packed(subnet, config, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"exists; choose another name.*overwrite=True"):
        save_packed(subnet, config, path)
    assert path.read_bytes() == content
    save_packed(subnet, config, path, overwrite=True)
    assert load_packed(path).config == config
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not a packed subnet"):
        load_packed(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="truncated or not a packed subnet"):
        load_packed(path)
    other, wrong = make_subnet(SmallNet(), seed=5)
    with pytest.raises(ValueError, match="the config does not belong to this subnet"):
        save_packed(subnet, wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="no quantized layer"):
        save_packed(SmallNet(), config, tmp_path / "wrong.safetensors")
    assert not (tmp_path / "wrong.safetensors").exists()
    del other
