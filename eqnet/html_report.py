"""The report of one or several runs: one HTML file that needs no server and no network.

Text goes through Jinja's escaping, data into a JSON block, and a content security policy lets nothing run but the page's own
scripts, which are named by their hashes, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from eqnet.checkpoint import atomic_write_text
from eqnet.html_sections import Section, comparison_section, run_sections
from eqnet.run_record import RunRecord, read_run

GENERATOR = "eqnet report"


@dataclass(frozen=True)
class Part:
    """The sections of one run, or those that compare runs."""

    title: str
    sections: list[Section]


class MissingLibraryError(ValueError):
    """The libraries of the extra `report` are not installed."""


def write_report(runs: Sequence[Path | None], output: Path | None = None) -> Path:
    """Writes the report of runs, in place of an earlier report.

    Args:
        runs: folders; None is the latest below `runs/`.
        output: the file; None means `report.html` in the folder of a run, `comparison.html` in that of the first of several.

    Returns:
        The file.

    Raises:
        ValueError: not a run, a damaged file in it, libraries that are not installed, or an output that exists and is no
            report.
        OSError: the output cannot be written.
    """
    records = name_runs([read_run(path) for path in runs])
    first = next(iter(records.values()))
    path = output or first.path / ("report.html" if len(records) == 1 else "comparison.html")
    if path.suffix != ".html":
        raise ValueError(f"a report is an .html file; got --output {path}.")
    if path.exists() and f'content="{GENERATOR}"'.encode() not in path.read_bytes()[:1000]:
        raise ValueError(f"{path} exists and is not a report of eqnet; give another --output.")
    atomic_write_text(path, render(records))
    return path


def report_at_end(run: Path, console: Console) -> None:
    """Writes the report of a run when a command ends; what is in the way is said and is no error."""
    try:
        write_report([run])
    except (ValueError, OSError) as error:
        console.print(f"no report: {error}", style="yellow", markup=False, soft_wrap=True)


def name_runs(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Records by the names of their folders, or by whole paths where names are the same."""
    names = [record.path.resolve().name for record in records]
    named = {
        name if names.count(name) == 1 else str(record.path): record
        for name, record in zip(names, records, strict=True)
    }
    if len(named) < len(records):
        raise ValueError("the same run is given twice; name each run once.")
    return named


def render(records: Mapping[str, RunRecord]) -> str:
    """The page. Raises MissingLibraryError without the extra `report`."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise _missing(error) from error
    parts = [] if len(records) == 1 else [Part("Comparison", [comparison_section(records)])]
    parts += [Part(name, list(run_sections(record))) for name, record in records.items()]
    specs: list[Any] = []
    for i, part in enumerate(parts):
        for j, section in enumerate(part.sections):
            section.anchor = f"s{i}-{j}"
            section.charts = [(len(specs) + k, chart) for k, (_, chart) in enumerate(section.charts)]
            specs += [chart.spec for _, chart in section.charts]
    folder = files("eqnet") / "html"
    vega, script = vega_bundle(), (folder / "page.js").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((folder / "page.html").read_text()).render(
        generator=GENERATOR,
        title=" and ".join(records) if len(records) < 3 else f"{len(records)} runs",
        version=version("eqnet"),
        parts=parts,
        charts=json.loads(json.dumps(specs), parse_constant=lambda _: None),  # JSON has no NaN
        style=Markup((folder / "style.css").read_text()),
        vega=Markup(vega),
        script=Markup(script),
        script_hashes=Markup(" ".join(_hash(text) for text in (vega, script))),
    )


@functools.cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`; takes seconds."""
    try:
        import vl_convert
    except ImportError as error:
        raise _missing(error) from error
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _missing(error: ImportError) -> MissingLibraryError:
    return MissingLibraryError(f"a report needs {error.name}; install it with: pip install 'eqnet[report]'")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
