"""Files survive a kill, damaged files are named, float weights load in their usual wrappings or not at all."""

import collections
import errno
import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eqnet.checkpoint import (
    atomic_write_bytes,
    atomic_write_text,
    load_float_weights,
    load_tensors,
    read_json,
    read_weights,
    save_tensors,
    write_json,
)

OLD = b"old content"


def small_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    model[1].running_mean.fill_(seed + 1)
    return model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def cuts(size: int) -> list[int]:
    """Lengths to truncate a file to: all near both ends, and some between."""
    return sorted({*range(min(size, 20)), *range(0, size, max(1, size // 60)), *range(max(0, size - 20), size)})


# --- atomic writes ----------------------------------------------------------------------------------------------------


def test_text_and_bytes_are_written_as_given(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "größe\r\n1\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\r\n1\n".encode()
    atomic_write_bytes(str(tmp_path / "a.txt"), b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic_write_bytes(tmp_path / "atomic", b"")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


WRITES = {
    "bytes": lambda path: atomic_write_bytes(path, b"new"),
    "text": lambda path: atomic_write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "tensors": lambda path: save_tensors(path, {"new": torch.ones(3)}),
}


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("write", WRITES)
def test_old_file_remains_if_writing_raises(tmp_path, monkeypatch, write, function):
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def disk_full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, disk_full)
    with pytest.raises(OSError, match="No space"):
        WRITES[write](path)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_old_file_remains_if_the_process_is_killed_while_writing(tmp_path, function):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    script = f"""
import os, signal, sys
from eqnet.checkpoint import atomic_write_bytes
os.{function} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
atomic_write_bytes(sys.argv[1], b"new" * 1000)
"""
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == OLD
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("data", [{"a": {1, 2}}, {"a": float("nan")}, {"a": float("inf")}])
def test_data_that_json_lacks_leaves_the_old_file(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(OLD)
    with pytest.raises((TypeError, ValueError)):
        write_json(path, data)
    assert path.read_bytes() == OLD


def test_missing_directory_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write_bytes(tmp_path / "nowhere" / "a", b"")


# --- JSON -------------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(data=JSON_VALUES)
def test_json_round_trip(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, data)
    assert read_json(path) == data


def test_json_keeps_the_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]


def test_truncated_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"layers": {"conv1": [8, 8, "größe"]}, "seed": 1.5, "done": True})
    data = path.read_bytes().rstrip()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"config\.json"):
            read_json(path)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"PK\x03\x04", b"{'a': 1}", b"[" * 100_000, b"", b"\x00" * 40])
def test_what_is_not_json_is_named(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_round_trip_with_type_shape_and_shared_memory(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {
        "float": base,
        "tied": base,
        "view": base[:, 1],
        "transposed": base.transpose(0, 2),
        "channels_last": torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "parameter": nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "int": torch.tensor([-(2**40)]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.25, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert same(load_tensors(tmp_path / "a.safetensors"), tensors)


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(4), "b": torch.zeros(2)})
    loaded = load_tensors(path)
    path.write_bytes(b"")
    loaded["a"].add_(1)
    assert loaded["a"].tolist() == [2, 2, 2, 2]
    assert loaded["b"].tolist() == [0, 0]


@pytest.mark.parametrize("load", [load_tensors, read_weights])
def test_truncated_tensors_are_named(tmp_path, load):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, small_model().state_dict())
    data = path.read_bytes()
    for size in cuts(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            load(path)


@pytest.mark.parametrize("load", [load_tensors, read_weights, read_json])
@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth", ""])
def test_missing_files_and_directories_are_named(tmp_path, load, name):
    with pytest.raises(ValueError, match=name or tmp_path.name):
        load(tmp_path / name)


# --- weights ----------------------------------------------------------------------------------------------------------

WRAPPINGS = {
    "plain": lambda weights: weights,
    "plain dict": dict,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights, "best_prec1": 91.7},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "state_dict_ema": lambda weights: {"state_dict_ema": weights},
    "averaged weights are preferred": lambda weights: {
        "state_dict": {k: v + 1 for k, v in weights.items()},
        "state_dict_ema": weights,
    },
    "no averaged weights": lambda weights: {"state_dict_ema": None, "state_dict": weights},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th"])
def test_weights_are_unwrapped(tmp_path, wrapping, prefix, suffix):
    weights = small_model().state_dict()
    prefixed = collections.OrderedDict((prefix + key, value) for key, value in weights.items())
    torch.save(WRAPPINGS[wrapping](prefixed), tmp_path / f"w{suffix}")
    assert same(read_weights(tmp_path / f"w{suffix}"), weights)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_weights_from_safetensors(tmp_path, prefix):
    weights = small_model().state_dict()
    safetensors.torch.save_file({prefix + k: v for k, v in weights.items()}, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), weights)


def test_prefix_that_only_some_keys_have_is_a_name(tmp_path):
    weights = {"module.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), weights)


def test_parameters_are_read_as_tensors_without_gradient(tmp_path):
    torch.save(dict(small_model().named_parameters()), tmp_path / "w.pth")
    assert not any(value.requires_grad for value in read_weights(tmp_path / "w.pth").values())


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_weights_are_named(tmp_path, zipped):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": small_model().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for size in cuts(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"w\.pth"):
            read_weights(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.binary(max_size=100))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_noise_is_named(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("noise") / f"w{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        read_weights(path)


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_code_runs_on_reading(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Payload(tmp_path / "touched")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "no dict"),
        ([torch.ones(3)], "no dict"),
        ({}, "no dict"),
        ({"state_dict": {}}, "no dict"),
        ({"a": torch.ones(1), "epoch": 3}, "epoch"),
        ({"net": {"a": torch.ones(1)}}, "net"),
        ({0: torch.ones(1)}, "0"),
        ({f"k{i}": i for i in range(9)}, "k0, k1, k2, k3, k4 and 4 more"),
    ],
)
def test_content_that_is_not_named_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_weights(tmp_path / "w.pth")
    assert "w.pth" in str(error.value)


def test_float_weights_load_by_name(tmp_path):
    source, model = small_model(1), small_model(2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.th")
    load_float_weights(model, tmp_path / "w.th")
    assert same(model.state_dict(), source.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_batch_counters_may_be_missing_and_half_precision_is_widened(tmp_path):
    source, model = small_model(1), small_model(2)
    weights = {k: v.half() for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_tensors(tmp_path / "w.safetensors", weights)
    load_float_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(model.state_dict()[k], v.float()) for k, v in weights.items())


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda w: w.pop("0.weight"), ["missing: 0.weight."]),
        (lambda w: w.update(other=torch.ones(1)), ["unexpected: other."]),
        (lambda w: w.update({"3.weight": torch.ones(3, 9)}), ["3.weight ([3, 9] in the file, [3, 8] in the model)"]),
        (
            lambda w: (w.pop("3.bias"), w.update(fc=torch.ones(1))),
            ["missing: 3.bias;", "unexpected: fc."],
        ),
        (
            lambda w: w.update({f"x{i}": torch.ones(1) for i in range(12)}),
            ["unexpected: x0, x1, x2, x3, x4 and 7 more."],
        ),
        (
            lambda w: [w.pop(k) for k in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean")],
            ["missing: 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean."],
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path, change, messages):
    weights = dict(small_model(1).state_dict())
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    model = small_model(2)
    with pytest.raises(ValueError) as error:
        load_float_weights(model, tmp_path / "w.pth")
    assert all(message in str(error.value) for message in ["w.pth", "Sequential", *messages])
    assert same(model.state_dict(), small_model(2).state_dict())


def test_unreadable_weights_leave_the_model(tmp_path):
    (tmp_path / "w.pth").write_bytes(json.dumps({"a": 1}).encode())
    model = small_model(2)
    with pytest.raises(ValueError, match=r"w\.pth"):
        load_float_weights(model, tmp_path / "w.pth")
    assert same(model.state_dict(), small_model(2).state_dict())
