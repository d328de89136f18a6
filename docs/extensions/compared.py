"""The directive `compared`: accuracies beside joint training's, of bench/results/comparisons.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "comparisons.md"
_SECTION = re.compile(r"^## (?P<name>\w+)(?P<about>[:,].*)\n(?P<text>(?:(?!^## ).*\n)*)", flags=re.M)
JOINT = "Joint"


def accuracies() -> dict[str, dict[str, list[str]]]:
    """Return {data set: {title of the method: [accuracy as given, tuned]}}."""
    found = {}
    for section in _SECTION.finditer(RESULTS.read_text()):
        lines = [line for line in section["text"].splitlines() if line.startswith("|")]
        # After the heading and its rule.
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        found[section["name"]] = {row[0]: row[1:3] for row in rows}
    return {name: rows for name, rows in found.items() if JOINT in rows}


class Compared(SphinxDirective):
    """`{compared} <title of a method>`: its accuracies and joint training's."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = False

    def run(self) -> list[nodes.Node]:
        title = self.arguments[0]
        lines = []
        for data, rows in accuracies().items():
            if title not in rows:
                raise self.error(f"{RESULTS.name} has no {title!r} for {data}")
            lines.append("| " + " | ".join([data, *rows[JOINT], *rows[title]]) + " |")
        header = ["data set", "Joint", "tuned", title, "tuned"]
        if title == JOINT:
            header, lines = header[:3], ["|".join(line.split("|")[:4]) + "|" for line in lines]
        rule = "| --- |" + " ---: |" * (len(header) - 1)
        text = "\n".join(["| " + " | ".join(header) + " |", rule, *lines])
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("compared", Compared)
    return {"parallel_read_safe": True}
