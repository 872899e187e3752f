"""The certificate of an exported file: statements, each with a verdict, and the figures behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eqnet.checkpoint import write_json

SCHEMA = "eqnet certificate 1"
Step = Literal["rules", "integers", "unoptimized", "runtime"]
Verdict = Literal["pass", "note", "warning", "error"]


@dataclass(frozen=True)
class Line:
    """One statement of a certificate."""

    step: Step
    verdict: Verdict
    text: str
    layer: str | None = None


@dataclass
class Certificate:
    """What was found out about a file.

    Attributes:
        facts: file, checksum, target, images, versions.
        lines: statements in the order of the steps.
        layers: figures of each layer.
        results: figures of the whole network.
    """

    facts: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> list[Line]:
        """Lines that refuse the file."""
        return [line for line in self.lines if line.verdict == "error"]

    def add(self, step: Step, verdict: Verdict, text: str, layer: str | None = None) -> None:
        """Adds a statement."""
        self.lines.append(Line(step, verdict, text, layer))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "schema": SCHEMA,
            **self.facts,
            "verdict": "error" if self.errors else "pass",
            "lines": [vars(line) for line in self.lines],
            "layers": self.layers,
            "results": self.results,
        }


def certificate_path(path: str | Path) -> Path:
    """Where the certificate of a file is written."""
    return Path(f"{path}.certificate.json")


def write_certificate(certificate: Certificate, path: str | Path) -> Path:
    """Writes the certificate of the exported file `path` beside it, in place of an earlier one. Returns where."""
    write_json(certificate_path(path), certificate.to_json())
    return certificate_path(path)
