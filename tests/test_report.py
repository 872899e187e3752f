"""The report of a run as a reader meets it: one file in a real browser, everything drawn, nothing fetched."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Eqnet, needs_browser
from playwright.sync_api import Browser, Page

from eqnet.checkpoint import load_tensors, save_tensors, write_json
from eqnet.html_report import vega_bundle, write_report
from eqnet.nn.supernet import Supernet
from eqnet.run import Run, create_float_model
from eqnet.run_record import read_run
from eqnet.scoring.evaluation import uniform_configs
from eqnet.scoring.predictor import AccuracyPredictor
from eqnet.settings import Settings, dump_settings
from eqnet.space.sampling import MeanBitsSampler
from eqnet.subnet import describe_subnet
from eqnet.training.losses import kurtosis

EVIL = "</script><script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"
DRAWN = "html[data-state=drawn]"
MARKS = "path, line, text, rect"


def make_run(folder: Path, seed: int = 0) -> Path:
    """A run with every file that a report reads: figures of a model, made up rather than trained."""
    settings = Settings.model_validate(
        {"seed": seed, "model": {"arguments": {"width": 4}}, "train": {"epochs": 3}, "space": {"bits": [2, 4, 8]}}
    )
    run, rng = Run(folder, settings), np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(dump_settings(settings))
    write_json(folder / "split.json", {"indices": {"train": [0, 1], "validation": [2], "test": [3]}})
    torch.manual_seed(seed)
    model = create_float_model(settings.model, 10, 1)
    save_tensors(folder / "float.safetensors", model.state_dict())
    supernet = Supernet.from_model(model, (1, 8, 8), bits=[2, 4, 8])
    supernet.calibrate(torch.randn(16, 1, 8, 8))
    run.save_supernet(supernet, {"num_classes": 10, "input_size": [1, 8, 8], "versions": {"torch": "2"}})
    space = supernet.space
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, 110, 10):
            roles = {f"supernet/task/{r}": 9 / step for r in ("largest", "random_1", "smallest")}
            row = {"step": step, "pretrain/task": 5 / step, "supernet/kurtosis": float("nan"), **roles}
            file.write(json.dumps({**row, "validation/tensor-sym-sym/2bit": 80.0 + step / 10}) + "\n")
        file.write('{"step": 110, "pretr')
    uniform = [
        {"bits": b, "form": form.name, "validation": 80.0 + b, "test": 79.0 + b}
        for b, form, _ in uniform_configs(space)
    ]
    write_json(folder / "evaluation.json", {"float": {"validation": 91.0, "test": 90.25}, "uniform": uniform})
    genomes = MeanBitsSampler(space).sample(rng, 40)
    accuracy = 70 + space.bits[np.arange(space.num_genes), genomes].mean(1) + rng.normal(0, 0.1, 40)
    predictor = AccuracyPredictor(space)
    predictor.fit(genomes, accuracy, seed=0)
    predictor.save(folder / "predictor.safetensors")
    (folder / "table").mkdir()
    genes = [[gene.slot, *gene.layers, len(gene.formats)] for gene in space.genes]
    write_json(folder / "table" / "header.json", {"seed": seed, "genes": genes})
    rows = [json.dumps({"index": i, "accuracy": float(a)}) for i, a in enumerate(accuracy[:12])]
    (folder / "table" / "rows-0.jsonl").write_text("\n".join(rows) + "\n")
    config = space.decode(genomes[0])
    accuracies = {"predicted": 88.0, "validation": 87.5, "test": 86.75}
    search = folder / "search" / "w4-a4"
    search.mkdir(parents=True)
    entry = describe_subnet(config, space, accuracies)
    write_json(search / "subnet.json", {"budget": "w=4,a=4", "target": None, **entry, "best_searched": entry})
    header = "predicted,w,a,size,bitops,form\n"
    (search / "pareto.csv").write_text(header + "80,2,2,9000,1e6,mixed\n85,4,4,18000,4e6,mixed\n")
    statement = {"step": "rules", "verdict": "pass", "text": f"20 layers are right. {EVIL}", "layer": None}
    certificate = {"verdict": "pass", "target": "onnxruntime-x86", "images": 256, "lines": [statement]}
    write_json(search / "net.onnx.certificate.json", certificate)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return make_run(tmp_path_factory.mktemp("reports") / "digits")


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    """Its report."""
    return write_report([run])


def open_page(browser: Browser, path: Path, width: int = 1280, scheme: Any = "light") -> tuple[Page, list[str]]:
    """A drawn report, and what went wrong in it: console errors, exceptions, requests besides the file."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.locator(DRAWN).wait_for()
    return page, problems


# -- in a browser -----------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_every_chart_is_drawn_without_an_error_or_a_request(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    page, problems = open_page(browser, report, width, scheme)
    marks = page.eval_on_selector_all(
        "[data-chart]", f"all => all.map(e => e.querySelectorAll('.role-mark :is({MARKS})').length)"
    )
    assert len(marks) >= 15
    assert min(marks) >= 2, marks
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "digits"  # text of files is text
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    page.close()


@needs_browser
def test_charts_follow_the_theme_of_the_reader(browser: Browser, report: Path) -> None:
    page, problems = open_page(browser, report)
    line = "[data-chart='0'] .mark-line path"
    light = page.locator(line).get_attribute("stroke")
    page.emulate_media(color_scheme="dark")
    page.locator(f"{line}:not([stroke='{light}'])").wait_for(state="attached")
    page.locator(DRAWN).wait_for()
    assert problems == []
    page.close()


@needs_browser
def test_hovering_shows_values(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    cell = page.locator("figure.wide .mark-rect path").first
    cell.scroll_into_view_if_needed()
    cell.hover(force=True)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "accuracy" in tip.inner_text()
    assert re.search(r"\b8[1-7]\b", tip.inner_text())
    page.close()


@needs_browser
def test_a_choice_changes_what_is_shown(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    heat_map = page.locator("figure.wide")
    assert "81.00" in heat_map.locator("svg").inner_html()  # 2 bit on test
    heat_map.get_by_label("validation").check()
    heat_map.locator("svg text", has_text="82.00").first.wait_for(state="attached")
    assert "81.00" not in heat_map.locator("svg").inner_html()
    page.close()


@needs_browser
def test_tables_sort_by_number_and_back(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    details = page.locator("details", has_text="Uniform configs").first
    details.locator("summary").click()
    head = details.locator("th", has_text="test")
    for expected in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == expected
        values = [float(text) for text in details.locator("tbody tr td:last-child").all_inner_texts()]
        assert values == sorted(values, reverse=expected == "descending")
        assert len(set(values)) == 3
    page.close()


@needs_browser
def test_several_runs_stand_side_by_side(browser: Browser, run: Path, tmp_path: Path, eqnet: Eqnet) -> None:
    other = make_run(tmp_path / "other", seed=1)
    code, out, err = eqnet("report", run, other, "--output", tmp_path / "both.html")
    assert (code, err) == (0, "")
    assert "both.html" in out
    page, problems = open_page(browser, tmp_path / "both.html")
    assert problems == []
    text = page.locator("section").first.inner_text()
    assert "Settings that differ" in text
    assert re.search(r"seed\s+0\s+1", text)
    assert {"digits", "other"} <= set(page.locator("h2.part").all_inner_texts())
    assert page.locator("section").first.locator("svg").count() == 3
    page.close()


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_small_and_holds_no_address_to_load(report: Path) -> None:
    text = report.read_text()
    assert len(text) < 2e6
    assert not re.search(
        r"<(script|link|img|iframe)[^>]+(src|href)=", re.sub(r"(<script).*?</script>", "", text, flags=re.S)
    )
    assert "default-src 'none'" in text


def test_text_of_files_is_escaped(report: Path) -> None:
    assert EVIL not in report.read_text()
    assert "20 layers are right. &lt;/script&gt;" in report.read_text()


def test_what_is_missing_is_a_sentence_that_says_what_to_run(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "settings.yaml", bare)
    text = write_report([bare]).read_text()
    for command in ("--resume", f"python search.py --run {bare} --budget 4", "eqnet verify FILE"):
        assert command in text
    assert "data-chart" not in text.split("<script")[0]


def test_a_later_report_replaces_the_earlier_one(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("search", "report.html"))
    assert "Search w4-a4" not in write_report([folder]).read_text()
    shutil.copytree(run / "search", folder / "search")
    assert "Search w4-a4" in write_report([folder]).read_text()


def test_distributions_are_those_of_the_weights(run: Path) -> None:
    record = read_run(run)
    tensors = load_tensors(run / "float.safetensors")
    before = {m["layer"]: m["kurtosis"] for m in record.moments if m["when"] == "before"}
    assert before["conv1"] == pytest.approx(float(kurtosis(tensors["conv1.weight"])))
    supernet, _ = Run.open(run).load_supernet()
    layer = next(la for la in supernet.space.layers if la.name not in supernet.space.fixed)
    config = supernet.space.uniform(4, supernet.space.forms[0])
    supernet.set_config(config)
    quantizer = dict(supernet.quantizers())[f"{layer.name}.weight"]
    fmt = config[layer.name].weight
    key = (layer.name, "weights", 4, "symmetric" if fmt.symmetric else "asymmetric", f"per {fmt.granularity}")
    found = {(s["layer"], s["slot"], s["bits"], s["symmetry"], s["granularity"]): s["step"] for s in record.steps}
    assert found[key] == pytest.approx(float(quantizer.qparams()[0].median()))


def test_costs_of_layers_add_up_to_the_network(run: Path) -> None:
    from eqnet.html_sections import search_section

    record = read_run(run)
    table = search_section(record, record.searches[0]).tables[-1]
    (column,) = [i for i, c in enumerate(table.columns) if c.title.startswith("BitOps")]
    assert sum(row[column] for row in table.rows) == pytest.approx(record.searches[0].facts.cost["bitops"])


def test_without_the_library_the_command_says_what_to_install(
    eqnet: Eqnet, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vega_bundle.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    code, _, err = eqnet("report", run, "--output", tmp_path / "page.html")
    assert code == 2
    assert "pip install 'eqnet[report]'" in err
    assert not (tmp_path / "page.html").exists()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation.json", '{"float": {"test": "high"}}'),
        ("evaluation.json", '{"uniform": [{"bits": 2}]}'),
        ("supernet.json", '{"space": 3}'),
        ("supernet.json", "[]"),
        ("split.json", '{"indices": 4}'),
        ("search/w4-a4/subnet.json", '{"layers": {}}'),
        ("search/w4-a4/pareto.csv", "predicted,w\n1,two\n"),
        ("search/w4-a4/net.onnx.certificate.json", '{"lines": 1}'),
        ("float.safetensors", "cut"),
        ("predictor.safetensors", "cut"),
        ("table/header.json", "{"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(
    eqnet: Eqnet, run: Path, tmp_path: Path, file: str, content: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("report.html"))
    (broken / file).write_text(content)
    code, _, err = eqnet("report", broken)
    assert code == 2
    assert str(broken / file) in err
    assert len(err.strip().splitlines()) == 1
    assert not (broken / "report.html").exists()


def test_a_file_of_someone_else_is_not_replaced(eqnet: Eqnet, run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    code, _, err = eqnet("report", run, "--output", mine)
    assert code == 2
    assert "mine.html" in err
    assert mine.read_text() == "<p>mine</p>"


@pytest.mark.parametrize("arguments", [["nowhere"], ["{run}", "{run}"], ["{run}", "--output", "report.pdf"]])
def test_mistakes_are_one_sentence(eqnet: Eqnet, run: Path, arguments: list[str]) -> None:
    code, _, err = eqnet("report", *(a.format(run=run) for a in arguments))
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
