"""`python -m benchmarks` runs, and `docs/performance.md` and `docs/scale.md` show what it printed."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import fill

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "performance.md": (
        "training_step",
        "training_memory",
        "calibration_speed",
        "evaluation_speed",
        "processes",
        "search_speed",
    ),
    "scale.md": ("work_sharing", "input_pipeline", "estimate"),
}
TOPICS = [topic for topics in PAGES.values() for topic in topics]


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_runs_on_tiny_nets_and_measures_something(topic, tmp_path):
    command = [sys.executable, "-m", "benchmarks", topic, "--short", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / f"{topic}.json").read_text())
    found = numbers(data["rows"])
    assert len(found) >= 4
    assert all(math.isfinite(n) for n in found)
    assert {"cpu", "threads", "torch", "date"} <= set(data["machine"])
    assert topic in done.stdout


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_show_the_committed_measurements(name):
    page = (ROOT / "docs" / name).read_text()
    for topic in PAGES[name]:
        assert f"<!-- {topic} -->" in page
    assert fill(page, ROOT / "docs" / "data" / "performance") == page


@pytest.mark.parametrize("page", ["proxies", "results", "tuning"])
def test_pages_show_the_committed_results(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert fill(text, ROOT / "docs" / "data" / "results") == text
    for name in re.findall(r"<!-- (\w+) -->", text):
        assert name == "end" or (ROOT / "docs" / "data" / "results" / f"{name}.json").is_file()


def test_a_page_is_filled_between_its_marks(tmp_path):
    rows = {"net": {"float": {"seconds": 2.0}, "ours": {"seconds": 3.0, "ratio": 1.5}}, "count": 7}
    content = {"machine": {"cores": 2}, "seconds": 1.0, "rows": rows}
    (tmp_path / "topic.json").write_text(json.dumps(content))
    page = fill("a\n<!-- topic -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert page.startswith("a\n<!-- topic -->\n")
    assert page.endswith("\n<!-- end -->\nb\n")
    assert "| ours | 3 | 1.5 |" in page
    assert "| count | 7 |" in page
    assert "old" not in page
    assert fill(page, tmp_path) == page
