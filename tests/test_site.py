"""The site builds without a warning or the network, shows every public name, option and page, and works in a browser."""

from __future__ import annotations

import ast
import functools
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import needs_browser
from playwright.sync_api import Browser

from eqnet.cli import app

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("eqnet.cli", "eqnet.proxy_commands")  # shown as commands
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "eqnet").rglob("*.py"))
    if path.stem != "__init__"
}

pytestmark = pytest.mark.slow


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@functools.cache
def elements(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    """All elements of a page; the largest have more than 1 MB."""
    return Elements(path).found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where a local server shows it."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    addresses = [
        url
        for path in site.rglob("*.css")
        for url in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", path.read_text())
    ]
    for path in site.rglob("*.html"):
        for tag, attributes in elements(path):
            addresses += [attributes.get("src") or "", attributes.get("srcset") or ""]
            addresses += [attributes.get("href") or ""] if tag == "link" else []
    assert sum(".js" in url for url in addresses) >= 20
    assert [url for url in addresses if re.match(r"(https?:)?//", url)] == []


def test_every_page_is_in_the_navigation(site: Path) -> None:
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    shown = {a.get("href") for tag, a in elements(site / "index.html") if "md-nav__link" in (a.get("class") or "")}
    assert pages - shown == set()
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} < pages


@pytest.mark.parametrize("module", [name for name in MODULES if name not in COMMANDS])
def test_every_public_name_is_in_the_reference(site: Path, module: str) -> None:
    chapter = module.split(".")[1] if module.count(".") > 1 else "support"
    shown = {a.get("id") for _, a in elements(site / "api" / f"{chapter}.html")}
    definitions = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(MODULES[module].read_text()).body
    names = [node.name for node in body if isinstance(node, definitions) and not node.name.startswith("_")]
    assert {module, *(f"{module}.{name}" for name in names)} - shown == set()
    assert [i for i in shown if i and i.startswith(f"{module}._")] == []


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    def options(command: Any, name: str) -> Iterator[str]:
        yield name
        yield from (option for parameter in command.params for option in getattr(parameter, "opts", []))
        for sub, inner in getattr(command, "commands", {}).items():
            yield from options(inner, f"{name} {sub}")

    expected = {"eqnet": list(options(typer.main.get_command(app), "eqnet"))}
    for name in ("train", "search"):
        parser = runpy.run_path(str(ROOT / f"{name}.py"))["make_parser"]()
        expected[name] = [option for action in parser._actions for option in action.option_strings[-1:]]
    assert {"eqnet targets check", "--rounds"} < set(expected["eqnet"])
    for name, words in expected.items():
        text = re.sub(r"<[^>]+>", "", (site / "commands" / f"{name}.html").read_text())
        assert [word for word in words if word not in text] == []


@needs_browser
@pytest.mark.parametrize("page", ["index.html", "api/space.html", "commands/eqnet.html"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_pages_load_without_an_error(browser: Browser, address: str, page: str, width: int, scheme: Any) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else problems.append(r.url))
    tab.goto(address + page, wait_until="networkidle")
    assert problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("body").get_attribute("data-md-color-scheme") == {"light": "default", "dark": "slate"}[scheme]
    tab.close()


@needs_browser
def test_the_search_finds_a_class(browser: Browser, address: str) -> None:
    tab = browser.new_page()
    tab.goto(address)
    tab.get_by_placeholder("Search").click()
    tab.keyboard.type("QuantConfig")
    tab.locator(".md-search-result__link[href*='api/space.html']").first.wait_for()
    tab.close()
