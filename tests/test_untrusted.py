"""Files that somebody else wrote: bounded, never run, and refused in one sentence."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from eqnet.checkpoint import read_json
from eqnet.documents import MAX_DEPTH, MAX_YAML_BYTES, parse_json, parse_yaml, read_text, read_yaml
from eqnet.run import Run
from eqnet.settings import Settings, dump_settings, load_settings
from eqnet.sources import open_source
from eqnet.space import Budget, LayerInfo, QuantSpace
from eqnet.space.hardware import HardwareTarget, load_target
from eqnet.space.latency import read_latency_table
from eqnet.subnet import read_subnet

# -- fuzzing ----------------------------------------------------------------------------------------------------------

LAYERS = [LayerInfo("conv", "conv", (4, 3, 3, 3), 6912, 192), LayerInfo("fc", "linear", (5, 4), 20, 4)]
SPACE = QuantSpace.from_layers(LAYERS, bits=[2, 4, 8], fixed="none")
SUBNET = {"budget": "w=4", "layers": SPACE.decode(np.zeros(SPACE.num_genes, np.int16)).to_json()}
OP = {
    "weight": [{"bits": [8], "container": "int8", "symmetric": [True], "granularity": ["tensor"], "narrow_range": False}],
    "act": [{"bits": [8], "container": "int8", "signed": ["signed"], "zero_point": "any"}],
    "bias": {"dtype": "int32", "scale": "weight_times_act"},
    "fallback": "refuse",
}  # fmt: skip
TARGET = {
    "name": "mine", "title": "Mine", "ops": {"conv": OP, "depthwise": None, "linear": OP, "conv_transpose": None},
    "rounding": None, "latency_bits": "code", "storage_bits": "packed", "integer_add": False, "sources": ["a page"],
}  # fmt: skip
TABLE = {
    "schema": "eqnet latency table 1", "facts": {"runtime": "onnxruntime"}, "overhead_ms": 0.1,
    "entries": [{"kind": "linear", "weight_shape": [5, 4], "act_numel": 4, "macs": 20, "ms": 0.5, "act": None,
                 "weight": {"bits": 8, "symmetric": True, "granularity": "tensor"}}],
}  # fmt: skip

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 10),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["8", "tensor", "../x", "int8", "signed", "1e999", "\x00", "weight"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(data: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values of a document."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place, *(p for key, value in inner for p in places(value, (*place, key)))]


@st.composite
def changed(draw: Callable[..., Any], document: dict[str, Any]) -> Any:
    """A document with values replaced, removed and added."""
    data = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        *parents, last = draw(st.sampled_from(places(data)[1:] or [("none",)]))
        node = data
        for key in parents:
            node = node[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            node[last] = draw(VALUES)
        elif action == "remove" and last in (node if isinstance(node, dict) else range(len(node))):
            del node[last]
        elif isinstance(node, dict):
            node[draw(st.text(max_size=5))] = draw(VALUES)
    return data


@st.composite
def damaged(draw: Callable[..., Any], texts: st.SearchStrategy[str]) -> bytes:
    """Texts of which some have bytes cut off or exchanged."""
    data = bytearray(draw(texts).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 1, 4]))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.sampled_from([None, None, None, len(data) // 2]))])


NUMBERS = st.one_of(
    st.floats().map(str), st.integers().map(str), st.sampled_from(["", "4", "1e999", "1e-999", "٣", "0x8"])
)
LIMITS = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "w=", "a=", "size=", "bitops =", " latency=", "max_act=", "W=", "bits=", "="]),
        NUMBERS,
        st.sampled_from(["", "KiB", "kb", "G", "ms", " T", "B B", "\n", "%"]),
    ),
)
# a third are valid for certain
BUDGETS = st.integers(1, 99).map(str) | st.text() | st.lists(LIMITS, max_size=4).map(",".join)


def setting_names(section: Any = Settings, prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if hasattr(field.annotation, "model_fields"):
            names += setting_names(field.annotation, f"{prefix}{name}.")
    return names


YAML_TEXTS = st.one_of(
    VALUES.map(lambda value: json.dumps(value)),
    st.text(max_size=12),
    st.sampled_from(
        ["[", "{a: *b}", "&a [*a]", "!!python/object/apply:os.getcwd []", "2026-02-30", "0b", "1_0:99", "!!binary x", "? [a]"]
    ),
)  # fmt: skip
OVERRIDES = st.lists(
    st.builds(
        "{}={}".format,
        st.sampled_from(setting_names()) | st.text("abc.", max_size=6) | st.text(max_size=6),
        YAML_TEXTS,
    ),
    max_size=3,
)


def check_budget(text: str, folder: Path) -> None:
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget
    assert all(value > 0 for _, value in budget.limits)


def check_subnet(content: bytes, folder: Path) -> None:
    (folder / "subnet.json").write_bytes(content)
    SPACE.check(read_subnet(folder / "subnet.json", SPACE))


def check_target(content: bytes, folder: Path) -> None:
    (folder / "mine.yaml").write_bytes(content)
    target = load_target(str(folder / "mine.yaml"))
    assert isinstance(target, HardwareTarget)
    assert "/" not in target.name
    assert all(isinstance(sentence, str) for sentence in target.check(SPACE.largest(), LAYERS))


def check_overrides(overrides: list[str], folder: Path) -> None:
    found = load_settings(overrides)
    (folder / "settings.yaml").write_text(dump_settings(found))
    assert load_settings([str(folder / "settings.yaml")]) == found


def check_table(content: bytes, folder: Path) -> None:
    (folder / "table.json").write_bytes(content)
    assert all(ms > 0 for ms in read_latency_table(folder / "table.json").entries.values())


def check_space(content: bytes, folder: Path) -> None:
    (folder / "space.json").write_bytes(content)
    assert QuantSpace.from_json(read_json(folder / "space.json")).num_genes > 0


def documents(document: dict[str, Any]) -> st.SearchStrategy[bytes]:
    return damaged(changed(document).map(json.dumps))


SUBJECTS = {
    "budgets": (BUDGETS, check_budget),
    "subnets": (documents(SUBNET), check_subnet),
    "targets": (documents(TARGET), check_target),
    "overrides": (OVERRIDES, check_overrides),
    "latency tables": (documents(TABLE), check_table),
    "spaces": (documents(SPACE.to_json()), check_space),
}


@pytest.mark.parametrize("cases", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_whatever_is_read_is_valid_or_refused_in_one_sentence(subject: str, cases: int, tmp_path: Path) -> None:
    strategy, check = SUBJECTS[subject]

    refused = []

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def fuzz(case: Any) -> None:
        try:
            check(case, tmp_path)
        except ValueError as error:
            refused.append(str(error))

    fuzz()
    assert 0 < len(refused) < cases
    assert all(refused)


# -- limits of documents ----------------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_documents_are_bounded_in_depth_and_digits(parse: Callable[[str, str], Any]) -> None:
    assert parse(nested(MAX_DEPTH), "it") is not None
    for text in (nested(MAX_DEPTH + 1), nested(100_000), "9" * 400, "9" * 10_000):
        with pytest.raises(ValueError, match=r"^it "):
            parse(text, "it")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "[1e999]"])
def test_numbers_that_are_not_finite_are_not_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"^it "):
        parse_json(text, "it")


def test_aliases_that_multiply_are_refused_before_they_do() -> None:
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    merges = ["a0: &a0 {x: 1, y: 2}"]
    for i in range(1, 30):
        lists.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
        merges.append(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}")
    for lines in (lists, merges):
        with pytest.raises(ValueError, match="more than 200000 values"):
            parse_yaml("\n".join(lines), "it")
    with pytest.raises(ValueError, match="nested deeper"):
        parse_yaml("&a [*a]", "it")
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "it") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize("text", ["2026-01-31", "!!set {a}", "!!binary aGk=", "{1: a}", "!!python/name:os.system"])
def test_yaml_gives_plain_values_only(text: str) -> None:
    with pytest.raises(ValueError, match=r"^it "):
        parse_yaml(text, "it")


def test_files_without_an_end_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="it is not a file"):
            read_text(path)
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(MAX_YAML_BYTES + 1)
    with pytest.raises(ValueError, match="more than 1048576"):
        read_yaml(tmp_path / "large.yaml")


# -- nothing is run ---------------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Run, Callable[[], None]]:
    """A checkpoint with a moving average, and what loads the newest one."""
    run = Run(tmp_path / "run", Settings())
    model = nn.Linear(2, 2)
    accelerator, average = Accelerator(cpu=True), ModelEmaV3(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.checkpoints.save(accelerator, "supernet", 3, {"ema": average})

    def load() -> None:
        newest, notes = run.checkpoints.newest()
        assert newest is not None, notes
        run.checkpoints.load(accelerator, newest, {"ema": average})

    return run, load


def sign(folder: Path) -> None:
    """Gives a checkpoint the checksums of the files it has."""
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "state.json"}
    (folder / "state.json").write_text(json.dumps({"phase": "supernet", "step": 3, "sha256": sums}))


def test_no_file_of_a_checkpoint_runs_code(checkpoint: tuple[Run, Callable[[], None]], tmp_path: Path) -> None:
    run, load = checkpoint
    folder = run.path / "checkpoints" / "supernet-00000003"
    load()
    names = sorted(p.name for p in folder.iterdir() if p.name != "state.json")
    assert "ema.safetensors" in names
    touched = tmp_path / "touched"
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Payload(touched)))
        sign(folder)
        if name.startswith("random_states"):
            load()  # accelerate goes on with other random states
        else:
            with pytest.raises(ValueError, match="supernet-00000003 belongs to another model"):
                load()
        assert not touched.exists()
        (folder / name).write_bytes(content)


def test_the_checksums_of_a_checkpoint_name_its_files_and_no_others(
    checkpoint: tuple[Run, Callable[[], None]], tmp_path: Path
) -> None:
    run, _ = checkpoint
    state = run.path / "checkpoints" / "supernet-00000003" / "state.json"
    whole = json.loads(state.read_text())
    os.mkfifo(tmp_path / "outside")  # to open it would block
    unlisted = {k: v for k, v in whole["sha256"].items() if k != "optimizer.bin"}
    for sums in (unlisted, whole["sha256"] | {"../../../outside": "0" * 64}, {"/dev/zero": "0"}, [], {}, None, 3):
        state.write_text(json.dumps({**whole, "sha256": sums}))
        newest, (note,) = run.checkpoints.newest()
        assert newest is None
        assert "is damaged" in note


def test_settings_and_targets_run_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    code = f"!!python/object/apply:builtins.open [{touched}, w]"
    (tmp_path / "file.yaml").write_text(f"name: {code}")
    for read in (
        lambda: load_settings([f"output={code}"]),
        lambda: load_settings([str(tmp_path / "file.yaml")]),
        lambda: load_target(str(tmp_path / "file.yaml")),
    ):
        with pytest.raises(ValueError, match="is not a YAML file"):
            read()
    assert not touched.exists()


@pytest.mark.parametrize("name", ["../escape", "a/b", "/tmp/x", "", ".hidden", "a\nb"])
def test_a_target_cannot_name_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TARGET, "name": name}))
    with pytest.raises(ValueError, match="name"):
        load_target(str(tmp_path / "mine.yaml"))


# -- archives ---------------------------------------------------------------------------------------------------------


def arrays() -> dict[str, Any]:
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    classes = np.array([Payload(touched)], dtype=object)
    np.savez(tmp_path / "images.npz", **arrays(), classes=classes, allow_pickle=True)
    with pytest.raises(ValueError, match=r"images\.npz cannot be read as an \.npz file of plain arrays"):
        open_source(Settings().data.model_copy(update={"name": str(tmp_path / "images.npz")}))
    assert not touched.exists()


def test_archives_larger_than_memory_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("classes.npy", b"")
        archive.infolist()[-1].file_size = 2**50
    with pytest.raises(ValueError, match=r"take 1048576\.0 GiB and this machine has"):
        open_source(Settings().data.model_copy(update={"name": str(path)}))


@pytest.mark.parametrize("label", [-1, 10**12])
def test_labels_are_bounded(label: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", **{**arrays(), "test_labels": np.array([0, 1, 2, label])})
    with pytest.raises(ValueError, match="test_labels must be numbers from 0 to"):
        open_source(Settings().data.model_copy(update={"name": str(tmp_path / "images.npz")}))
