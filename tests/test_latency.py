"""Latency tables: files, look-up, costs and budgets in milliseconds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eqnet.space import BoundBudget, Budget, LayerInfo, QuantFormat, QuantSpace
from eqnet.space.hardware import load_target
from eqnet.space.latency import COLUMNS, LatencyTable, LayerShape, latency_cost, read_latency_table
from eqnet.space.target_cost import target_costs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "targets.md"
LAYERS = [
    LayerInfo("conv1", "conv", (8, 3, 3, 3), 8 * 27 * 64, 3 * 64, reads_images=True),
    LayerInfo("conv2", "conv", (8, 8, 3, 3), 8 * 72 * 64, 8 * 64, signed_input=False),
    LayerInfo("conv3", "conv", (8, 8, 3, 3), 8 * 72 * 64, 8 * 64, signed_input=False),
    LayerInfo("table", "linear", (4, 4), 0, 0, calls=0),
    LayerInfo("fc", "linear", (10, 8), 80, 8, signed_input=False),
]


def space_of(**choices: Any) -> QuantSpace:
    return QuantSpace.from_layers(LAYERS, **{"fixed": "none", "granularity": ["channel"], **choices})


def full_table(bits: Sequence[int] = range(2, 9), overhead: float = 0.25) -> LatencyTable:
    """A made-up time for every format of every shape: longer for more MACs, bits and zero points."""
    entries = {
        (LayerShape.of(x), QuantFormat(w, ws, "channel"), QuantFormat(a, as_)): x.macs * (w + a + 3 - ws - as_) / 1e6
        for x in LAYERS
        if x.macs
        for w in bits
        for ws in (True, False)
        for a in bits
        for as_ in (True, False)
    }
    return LatencyTable(entries, overhead, {"target": "made up"})


def row(**changes: str) -> str:
    cells = {
        "kind": "conv",
        "weight_shape": "8x8x3x3",
        "act_numel": "512",
        "macs": "36864",
        "weight_bits": "8",
        "weight_symmetric": "true",
        "weight_granularity": "channel",
        "act_bits": "8",
        "act_symmetric": "false",
        "ms": "0.5",
    }
    return ",".join({**cells, **changes}.values())


def csv_of(*rows: str) -> str:
    return "\n".join([",".join(COLUMNS), *rows]) + "\n"


# -- costs ------------------------------------------------------------------------------------------------------------


def test_latency_is_the_sum_of_entries_and_overhead() -> None:
    space, table = space_of(), full_table()
    cost = latency_cost(space, table)
    assert (cost.name, cost.unit) == ("latency", "ms")
    genomes = space.random_genomes(np.random.default_rng(0), 20)
    for genome, value in zip(genomes, cost(genomes), strict=True):
        config = space.decode(genome)
        entries = [table.ms(x, config[x.name].weight, config[x.name].act) for x in LAYERS if x.macs]
        assert value == pytest.approx(0.25 + sum(entries), rel=1e-12)
    assert cost.format(1.234) == "1.23 ms"


def test_a_budget_in_milliseconds_is_hard() -> None:
    target, space = load_target("generic"), space_of()
    cost = latency_cost(space, full_table(), target)
    limit = (cost.minimum + cost.of(space.largest())) / 2
    budget = Budget.parse(f"latency={limit:.6f}ms").bind(space, costs=target_costs(target, full_table()))
    rng = np.random.default_rng(0)
    repaired = budget.repair(space.random_genomes(rng, 50), rng)
    assert (cost(repaired) <= limit).all()
    with pytest.raises(ValueError, match="smallest reachable"):
        Budget.parse("latency=1us").bind(space, costs=target_costs(target, full_table()))


def test_a_target_looks_up_containers() -> None:
    target = load_target("onnxruntime-x86")
    space = target.restrict(space_of())
    cost = latency_cost(space, full_table(bits=[8]), target)
    form = space.forms[0]
    assert cost.of(space.uniform(2, form)) == cost.of(space.uniform(8, form)) == cost.minimum
    with pytest.raises(ValueError, match="no entry for layer 'conv1'"):
        latency_cost(space, full_table(bits=[8]))
    generic = load_target("generic")
    with pytest.raises(ValueError, match="no entry for layer 'conv1'"):  # time follows codes
        latency_cost(space, full_table(bits=[8]), generic)


def test_a_missing_entry_names_layer_and_formats() -> None:
    space = space_of(bits=[4, 8])
    with pytest.raises(ValueError) as error:
        latency_cost(space, full_table(bits=[8]))
    assert str(error.value).startswith(
        "the latency table has no entry for layer 'conv1' (conv 8x3x3x3, 192 input elements, 13824 MACs) with 4-bit symmetric "
        "weights per channel and 4-bit symmetric activations; it has 8-bit symmetric weights per channel and 8-bit symmetric "
        "activations; "
    )
    with pytest.raises(
        ValueError, match=r"8-bit asymmetric weights per channel and inputs in floating point; it has none of"
    ):
        LatencyTable({}).ms(LAYERS[0], QuantFormat(8, False, "channel"), None)


def test_budgets_in_milliseconds_hold() -> None:
    target, table = load_target("generic"), full_table()
    space = space_of()
    cost = target_costs(target, table)["latency"](space)
    genomes = space.random_genomes(np.random.default_rng(0), 50)
    limit = (cost.minimum + cost(genomes).min()) / 2
    bound = BoundBudget(space, [cost], np.array([limit]), np.array([-np.inf]))
    assert not bound.feasible(genomes).any()
    assert (cost(bound.repair(genomes, np.random.default_rng(1))) <= limit).all()


# -- files ------------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path: Path) -> None:
    shape = LayerShape("linear", (4, 4), 0, 16)
    table = LatencyTable({**full_table([2, 8]).entries, (shape, QuantFormat(8), None): 0.125}, 0.5, {"threads": "1"})
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json()))
    assert read_latency_table(path) == table


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        csv_of(row(), row(act_bits="float", act_symmetric="", ms="2"), "overhead" + "," * 8 + ",0.75", "").replace(
            "\n", "\r\n"
        )
    )
    table = read_latency_table(path)
    weight = QuantFormat(8, True, "channel")
    assert table.overhead_ms == 0.75
    assert table.ms(LAYERS[1], weight, QuantFormat(8, False)) == 0.5
    assert table.ms(LAYERS[2], weight, None) == 2.0
    assert len(table.entries) == 2


def test_csv_columns_may_come_in_any_order_with_others(tmp_path: Path) -> None:
    names, cells = ["std", *reversed(COLUMNS)], ["0.01", *reversed(row().split(","))]
    path = tmp_path / "table.csv"
    path.write_text("﻿" + ", ".join(names) + "\n" + ", ".join(cells) + "\n", encoding="utf-8")
    assert list(read_latency_table(path).entries.values()) == [0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (csv_of(row(ms="fast")), "line 2: ms must be a number; got 'fast'"),
        (csv_of(row(ms="0")), "line 2: ms must be a positive number; got 0.0"),
        (csv_of(row(ms="nan")), "line 2: ms must be a positive number; got nan"),
        (csv_of(row(), row(weight_bits="9")), "line 3: bits must be a whole number from 2 to 8; got 9"),
        (csv_of(row(weight_bits="")), "line 2: weight_bits must be a whole number; got ''"),
        (csv_of(row(weight_symmetric="yes")), "line 2: weight_symmetric must be true or false; got 'yes'"),
        (csv_of(row(weight_granularity="group")), "line 2: granularity must be 'tensor' or 'channel'; got 'group'"),
        (csv_of(row(weight_shape="8*8")), r"line 2: weight_shape is written like 32x16x3x3; got '8\*8'"),
        (csv_of(row(kind="pool")), "line 2: kind must be conv, linear, conv_transpose or overhead; got 'pool'"),
        (csv_of(row(macs="-1")), "line 2: .*must not be negative"),
        (csv_of(row(), row(ms="0.6")), r"line 3: conv 8x8x3x3, .* is given twice \(first: line 2\)"),
        (csv_of(*["overhead" + "," * 8 + ",1"] * 2), r"line 3: the overhead is given twice \(first: line 2\)"),
        (csv_of("overhead" + "," * 8 + ",x"), "line 2: ms must be a number; got 'x'"),
        ("kind,ms\nconv,1\n", "line 1: the columns weight_shape, .*act_symmetric are missing"),
        ("", "line 1: the columns kind, .* are missing"),
        (csv_of("conv"), "line 2: weight_shape is written like"),
    ],
)
def test_wrong_csv_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_latency_table(path)
    assert str(error.value).startswith(f"{path}: ")


def broken(**changes: Any) -> dict[str, Any]:
    """JSON of a table whose only entry has other values; None removes a key."""
    data = LatencyTable({(LayerShape.of(LAYERS[1]), QuantFormat(8), QuantFormat(8)): 1.0}).to_json()
    entry = {**data["entries"][0], **changes}
    return {**data, "entries": [{k: v for k, v in entry.items() if k == "act" or v is not None}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the key 'schema' must be 'eqnet latency table 1'"),
        ({"schema": "eqnet latency table 1"}, "not a latency table: 'entries'"),
        (broken(ms=None), "entry 0: 'ms' is missing"),
        (broken(ms=-1.0), "entry 0: ms must be a positive number; got -1.0"),
        (broken(macs=1.5), "entry 0: weight_shape, act_numel and macs must be whole numbers"),
        (broken(weight={"bits": 4}), "entry 0: a format needs exactly the keys bits, symmetric and granularity"),
        (broken(weight_shape=[]), "entry 0: weight_shape must hold positive sizes"),
    ],
)
def test_wrong_json_files(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_latency_table(path)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a latency table is a \.json or \.csv file; got table\.txt"):
        read_latency_table("table.txt")
    with pytest.raises(ValueError, match=r"cannot read the latency table .*none\.csv: No such file"):
        read_latency_table(tmp_path / "none.csv")
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(ValueError, match=r"cut\.json is not a JSON file"):
        read_latency_table(tmp_path / "cut.json")


def test_the_table_of_the_page_is_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```csv\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "table.csv"
    path.write_text(block)
    table = read_latency_table(path)
    assert len(table.entries) >= 2
    assert table.overhead_ms > 0
