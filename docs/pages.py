"""Pages of the site that are generated: home from README.md, examples, commands from their parsers, API from the modules.

A hook of MkDocs; see `mkdocs.yml`.
"""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import eqnet

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"cli", "proxy_commands"}  # modules that commands/eqnet.md shows


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"index.md": (ROOT / "README.md").read_text().replace("](docs/", "](")}
    for example in sorted(ROOT.glob("examples/*/README.md")):
        pages[str(example.relative_to(ROOT))] = example.read_text().replace("](../../docs/", "](../../")
    pages |= {f"commands/{name}.md": script_page(name) for name in ("train", "search")}
    pages |= {"commands/eqnet.md": eqnet_page(), "api/index.md": names_page()}
    for package in sorted(path.parent for path in ROOT.glob("eqnet/*/__init__.py")):
        pages[f"api/{package.name}.md"] = modules_page(
            f"eqnet.{package.name}", purpose(package / "__init__.py"), package
        )
    pages["api/support.md"] = modules_page("Support modules", "Data, runs, settings, reports.", ROOT / "eqnet")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Keeps the source code that the API pages show out of the search index."""
    return html.replace(
        '<details class="mkdocstrings-source"', '<details class="mkdocstrings-source" data-search-exclude'
    )


def script_page(name: str) -> str:
    """The command line of `train.py` or `search.py`."""
    parser = runpy.run_path(str(ROOT / f"{name}.py"))["make_parser"]()
    parser.prog = f"python {name}.py"
    usage = parser.format_usage().removeprefix("usage: ")
    parts = [f"# {name}.py", parser.description, "**Usage**:", f"```text\n{usage}```", "**Arguments and options**:"]
    rows = []
    for action in parser._actions:  # argparse has no public list of them
        value = "" if action.nargs == 0 else f" <{'|'.join(action.choices or [action.dest])}>"
        words = f"{action.option_strings[-1]}{value}" if action.option_strings else f"{action.dest} ..."
        text = (action.help or "").replace("<", "&lt;").replace("docs/settings.md", "[Settings](../settings.md)")
        rows.append(f"* `{words}`: {text}")
    return "\n\n".join([*parts, "\n".join(rows)])


def eqnet_page() -> str:
    """The command line of `eqnet`."""
    command = [sys.executable, "-m", "typer", "eqnet.cli", "utils", "docs", "--name", "eqnet"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    # the lists of subcommands are cut to 45 characters a line; the sections below them say it whole
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)


def names_page() -> str:
    """What `import eqnet` gives, with links to the pages of the modules."""
    rows = ["# eqnet", inspect.getdoc(eqnet) or "", "| Name | Purpose |\n|---|---|"]
    for name in eqnet.__all__:
        thing = getattr(eqnet, name)
        text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).replace("|", "\\|")
        rows[-1] += f"\n| [`{name}`][{thing.__module__}.{thing.__qualname__}] | {text} |"
    return "\n\n".join(rows)


def modules_page(title: str, text: str, folder: Path) -> str:
    """The public names of all modules of a folder."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem not in {"__init__", *COMMANDS})
    package = ".".join(folder.relative_to(ROOT).parts)
    return "\n\n".join([f"# {title}", text, *(f"::: {package}.{name}" for name in names)])


def purpose(path: Path) -> str:
    """The docstring of a module."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""
