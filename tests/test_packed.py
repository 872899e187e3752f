"""Packed weights: as small as the size cost says, and the same subnet when read again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eqnet.nn.models  # noqa: F401  registers the CIFAR ResNets
from eqnet.deploy.packed import load_packed, pack_codes, packed_size, save_packed, unpack_codes
from eqnet.nn.supernet import Supernet
from eqnet.space import QuantConfig, QuantSpace, model_size

Images = Callable[..., Tensor]


def random_config(space: QuantSpace, seed: int) -> QuantConfig:
    return space.decode(space.random_genomes(np.random.default_rng(seed), 1)[0])


def build(model: nn.Module, images: Tensor, bits: Sequence[int] = range(2, 9)) -> Supernet:
    supernet = Supernet.from_model(model, images.shape[1:], bits=bits)
    supernet.calibrate(images)
    supernet.recalibrate_bn([images])
    return supernet.eval()


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packing_is_lossless_and_leaves_no_gaps(bits: int, values: list[int]) -> None:
    codes = torch.tensor([v % 2**bits for v in values])
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(len(codes) * bits / 8)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes.tolist()


def test_codes_fill_bytes_from_the_lowest_bit() -> None:
    codes = [5, 0, 7, 2, 1]
    number = sum(code << (3 * i) for i, code in enumerate(codes))
    assert bytes(pack_codes(torch.tensor(codes), 3).tolist()) == number.to_bytes(2, "little")


@pytest.mark.parametrize("seed", range(4))
def test_a_file_has_the_size_of_its_cost_and_the_outputs_of_its_subnet(
    make_cnn: Callable[[], nn.Module], images: Images, tmp_path: Path, seed: int
) -> None:
    supernet = build(make_cnn(), images(16))
    config = random_config(supernet.space, seed)
    supernet.set_config(config)
    supernet.recalibrate_bn([images(16)])
    subnet, x = supernet.extract(), images(5, seed=1)
    size = save_packed(subnet, config, supernet.space.layers, tmp_path / "net.safetensors")
    assert size.tensors == model_size(supernet.space).of(config)
    assert size == packed_size(tmp_path / "net.safetensors")
    assert size.tensors + size.header == (tmp_path / "net.safetensors").stat().st_size
    assert sum(t.nbytes for t in load_file(tmp_path / "net.safetensors").values()) == size.tensors
    loaded = load_packed(tmp_path / "net.safetensors", make_cnn())
    assert torch.equal(loaded(x), subnet(x))
    assert torch.equal(subnet(x), supernet(x))
    state = loaded.state_dict()
    for name, tensor in subnet.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(("name", "size"), [("cifar_resnet20", 8), ("test_vit", 160), ("test_nfnet", 64)])
def test_networks_of_timm(name: str, size: int, images: Images, tmp_path: Path) -> None:
    x = images(2, (3, size, size))
    supernet = build(timm.create_model(name, num_classes=7), x, bits=[3, 8])
    config = random_config(supernet.space, 3)
    subnet = supernet.extract(config)
    packed = save_packed(subnet, config, supernet.space.layers, tmp_path / "net.safetensors")
    assert packed.tensors == model_size(supernet.space).of(config)
    with torch.no_grad():
        assert torch.equal(
            load_packed(tmp_path / "net.safetensors", timm.create_model(name, num_classes=7))(x), subnet(x)
        )


def test_tensors_that_layers_share_are_stored_once(images: Images, tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        net[2].bias = net[1].bias
        return net

    supernet = build(make(), images())
    config = supernet.space.smallest()
    subnet = supernet.extract(config)
    size = save_packed(subnet, config, supernet.space.layers, tmp_path / "net.safetensors")
    assert size.tensors == model_size(supernet.space).of(config)
    assert torch.equal(load_packed(tmp_path / "net.safetensors", make())(images()), subnet(images()))


# -- what cannot be saved or read -------------------------------------------------------------------------------------


@pytest.fixture
def packed(make_cnn: Callable[[], nn.Module], images: Images, tmp_path: Path) -> tuple[Path, Supernet]:
    supernet = build(make_cnn(), images())
    config = supernet.space.uniform(3, supernet.space.forms[-1])
    save_packed(supernet.extract(config), config, supernet.space.layers, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors", supernet


def test_a_subnet_of_another_config_is_refused(packed: tuple[Path, Supernet], tmp_path: Path) -> None:
    _, supernet = packed
    space = supernet.space
    wide, narrow = space.uniform(8, space.forms[0]), space.uniform(2, space.forms[0])
    with pytest.raises(ValueError, match=r"layer '3': the subnet has weight codes of more than 2 bits"):
        save_packed(supernet.extract(wide), narrow, space.layers, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"layer '0' is not quantized"):
        save_packed(supernet.model, narrow, space.layers, tmp_path / "x.safetensors")
    per_channel = next(f for f in space.forms if f.granularity == "channel" and f.weight_symmetric)
    per_tensor = next(f for f in space.forms if f.granularity == "tensor" and f.weight_symmetric)
    subnet = supernet.extract(space.uniform(4, per_channel))
    with pytest.raises(ValueError, match="per channel, its format is per tensor"):
        save_packed(subnet, space.uniform(4, per_tensor), space.layers, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_integers_that_are_not_codes_are_refused(packed: tuple[Path, Supernet], tmp_path: Path) -> None:
    _, supernet = packed
    config = supernet.space.smallest()
    subnet = supernet.extract(config)
    subnet.register_buffer("table", torch.arange(3))
    with pytest.raises(ValueError, match=r"table is torch\.int64"):
        save_packed(subnet, config, supernet.space.layers, tmp_path / "x.safetensors")


def test_another_model_is_refused_and_left_alone(
    packed: tuple[Path, Supernet], make_cnn: Callable[[], nn.Module]
) -> None:
    path, _ = packed
    other = make_cnn()
    other[10] = nn.Linear(96, 6)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"belongs to another model; these tensors do not fit: 10\.bias, 10\.weight_codes"
    ):
        load_packed(path, other)
    assert type(other[0]) is nn.Conv2d
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())
    with pytest.raises(ValueError, match="layers 0, 3, 5, 8 are on one side only"):
        load_packed(path, nn.Sequential(*[nn.Identity()] * 10, nn.Linear(96, 5)))


def test_damaged_files_are_refused(
    packed: tuple[Path, Supernet], make_cnn: Callable[[], nn.Module], tmp_path: Path
) -> None:
    path, _ = packed
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.safetensors is damaged: .* checksum"):
        load_packed(bad, make_cnn())
    bad.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"bad\.safetensors' is truncated or not a safetensors file"):
        load_packed(bad, make_cnn())
    save_file({"a": torch.zeros(1)}, bad)
    with pytest.raises(ValueError, match="not a file of packed weights"):
        load_packed(bad, make_cnn())
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), bad, {**header, "config": json.dumps({"0": {"weight": 4}})})
    with pytest.raises(ValueError, match=r"header has no valid config \(layer '0'"):
        load_packed(bad, make_cnn())
    with pytest.raises(ValueError, match="there is no such file"):
        load_packed(tmp_path / "none.safetensors", make_cnn())
