"""The checklist of a release notices what is amiss; this checkout's version and citation agree."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import mmfast
from support.stems import ROOT

TOOL = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "release")))
CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2026-11-29

### Added
- Something.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project whose release 1.2.3 lacks nothing."""
    (tmp_path / "mmfast").mkdir()
    (tmp_path / "mmfast/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "All"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    return tmp_path


def problems(project: Path, version: str = "1.2.3") -> list[str | None]:
    of_version = (TOOL.check_version, TOOL.check_changelog, TOOL.check_citation, TOOL.check_tag)
    return [*(check(version, project) for check in of_version), TOOL.check_checkout(project)]


def test_a_whole_release_passes(project):
    assert problems(project) == [None] * 5


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("[1.2.3] - 2026-11-29", "[1.2.3]", "no heading '## [1.2.3] - <date>'"),
        ("2026-11-29", "soon", "'[1.2.3] - soon' has no date like 2026-11-29"),
        ("- Something.", "", "nothing stands under '[1.2.3] - 2026-11-29'"),
        ("## [Unreleased]\n", "## [Unreleased]\n\n- More.\n", "entries stand under [Unreleased] still"),
    ],
)
def test_a_changelog_that_is_not_ready(project, before, after, problem):
    path = project / "CHANGELOG.md"
    path.write_text(path.read_text().replace(before, after))
    assert TOOL.check_changelog("1.2.3", project) == problem
    assert TOOL.check_checkout(project) == "1 files are not committed: M CHANGELOG.md"


def test_another_version(project):
    version, changelog, citation, tag, _ = problems(project, "1.2.4")
    assert version == "mmfast/__init__.py says 1.2.3"
    assert changelog == "no heading '## [1.2.4] - <date>'"
    assert citation == "CITATION.cff says 1.2.3"
    assert tag is None
    assert TOOL.check_version("1.2", project) == "'1.2' is no version like 0.1.0 or 0.2.0rc1"


def test_a_tag_of_another_commit(project):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "tag", "v1.2.3"], cwd=project, check=True)
    assert TOOL.check_tag("1.2.3", project) is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "More"], cwd=project, check=True)
    assert "v1.2.3 is the tag of " in TOOL.check_tag("1.2.3", project)


def test_this_checkout_agrees_with_itself():
    assert TOOL.check_version(mmfast.__version__) is None
    assert TOOL.check_citation(mmfast.__version__) is None
    # Between two releases what is new stands under "Unreleased".
    problem = TOOL.check_changelog(mmfast.__version__)
    text = (ROOT / "CHANGELOG.md").read_text()
    is_going_on = re.search(r"^## \[Unreleased\]\s+(### .*\s+)?- ", text, flags=re.MULTILINE)
    assert problem is None or is_going_on, problem
