"""CITATION.cff names this version, and the papers that the methods name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mmfast

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_version_is_that_of_the_package():
    assert CITATION["version"] == mmfast.__version__


def test_the_papers_are_those_of_the_methods():
    source = re.compile(r'Source: (\w+) et al\., "([^"]+)", ([\w ]+ \d{4})')
    texts = [re.sub(r"\s+", " ", path.read_text()) for path in (ROOT / "mmfast/methods").glob("*.py")]
    named = {found for text in texts for found in source.findall(text)}
    cited = {
        (paper["authors"][0]["family-names"], paper["title"], paper["conference"]["name"])
        for paper in CITATION["references"]
    }
    assert cited == named


def test_the_numbers_are_those_of_the_readme():
    readme = set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "README.md").read_text()))
    cited = {paper["identifiers"][0]["value"].removeprefix("arXiv:") for paper in CITATION["references"]}
    assert cited == readme
