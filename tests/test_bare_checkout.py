"""A bare checkout never passes for the installed package: it says so, and tests and benchmarks leave it."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# As where no mmfast is installed but the one in $INSTALLED: an editable install is a finder, any other lies
# among packages that are needed, of which $OTHERS holds links to all but mmfast.
ALONE = """
import os, sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path[:] = [entry for entry in sys.path if not os.path.exists(os.path.join(entry, "mmfast", "kernels"))]
sys.path += filter(None, [os.environ["INSTALLED"], os.environ["OTHERS"]])
"""
CALLS = """
import warnings
import torch
from mmfast import backend, ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    table = torch.rand(3, 4, requires_grad=True)
    ops.shapley_values(table, backend="reference")
    with backend.preferring("reference"):
        ops.shapley_values(table)
    assert not caught
    values = ops.shapley_values(table)  # here
    backend.bare_checkout = None  # is not asked again
    values.sum().backward()
    ops.shapley_values(table)
    ops.entropy_fusion(torch.rand(2, 3, 4).double())
for found in caught:
    print(found.category.__name__, found.filename, found.lineno, found.message)
"""
# What an editable install adds to Python.
EDITABLE = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mmfast.kernels":
            return importlib.util.spec_from_file_location(name, os.environ["KERNELS"])
sys.meta_path.append(Finder)
"""


@functools.cache
def others() -> str:
    """Return a folder with links to all packages that lie beside an installed mmfast, or "" if none do."""
    folder = Path(tempfile.mkdtemp(prefix="mmfast-others-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for entry in sys.path:
        if Path(entry, "mmfast", "kernels").exists() and Path(entry).resolve() != ROOT:
            for path in Path(entry).iterdir():
                if not path.name.startswith("mmfast") and path.suffix != ".pth":
                    (folder / path.name).symlink_to(path)
    return str(folder) if any(folder.iterdir()) else ""


def start(
    code: str, *words: str, folder: Path, installed: Path | str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run `code` by a Python that is started in `folder` and finds no other mmfast than `installed`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-c", ALONE + code, *words],
        cwd=folder,
        env=inherited | {"INSTALLED": str(installed), "OTHERS": others()} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def clone(tmp_path) -> Path:
    """The sources of mmfast as a clone holds them."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "mmfast", tmp_path / "clone/mmfast", ignore=ignored)
    return tmp_path / "clone"


def package(folder: Path, *, has_kernels: bool) -> Path:
    """Make an mmfast with nothing in it; return the folder that has to be on Python's path."""
    names = ["mmfast", "mmfast/kernels"] if has_kernels else ["mmfast"]
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    return folder


@pytest.mark.parametrize("is_hiding", [False, True])
def test_auto_says_once_that_a_bare_checkout_runs_plain_torch(clone, tmp_path, is_hiding):
    site = package(tmp_path / "site", has_kernels=True) if is_hiding else ""
    done = start(CALLS, folder=clone, installed=site)
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    # The line that called the op, not one of ours.
    line = 1 + (ALONE + CALLS).splitlines().index("    values = ops.shapley_values(table)  # here")
    assert said.startswith(f"UserWarning <string> {line} plain torch runs in place of mmfast's kernels")
    if is_hiding:
        assert (
            f"the mmfast installed in {site} is hidden by the bare checkout {clone}, the folder Python was "
            "started in: leave the clone before you start Python, or run `pip install -e .` in it" in said
        )
    else:
        assert f"{clone} is a bare checkout without kernels: run `pip install -e .` in it" in said


@pytest.mark.parametrize("kind", ["editable", "without a compiler"])
def test_an_install_without_compiled_modules_says_nothing(clone, tmp_path, kind):
    kernels = package(tmp_path / "other", has_kernels=True) / "mmfast/kernels"
    if kind == "editable":
        done = start(EDITABLE + CALLS, folder=clone, KERNELS=str(kernels / "__init__.py"))
    else:
        shutil.copytree(kernels, clone / "mmfast/kernels")
        done = start(CALLS, folder=tmp_path, installed=clone)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_checkout_elsewhere_on_the_path_is_named_as_such(clone, tmp_path):
    site = package(tmp_path / "site", has_kernels=True)
    code = f"sys.path.insert(0, {str(clone)!r})\nimport mmfast.backend as b\nprint(b.why_not('cpu'))"
    done = start(code, folder=tmp_path, installed=site)
    assert f"is hidden by the bare checkout {clone}, which comes first on Python's path: " in done.stdout


def test_nothing_is_measured_in_a_bare_checkout(clone, tmp_path):
    pytest.importorskip("typer")
    site = package(tmp_path / "site", has_kernels=True)
    code = """
import runpy
sys.argv = ["mmfast", "bench", "--quick", "logit_fusion"]
runpy.run_module("mmfast", run_name="__main__")
"""
    done = start(code, folder=clone, installed=site)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mmfast: nothing is measured: the mmfast installed in {site} is hidden by")
    assert done.stderr.count("\n") == 1


PYTEST = """
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
# The latter does not look into the folder it is started in.
COMMANDS = {"python -m pytest": PYTEST, "pytest": "sys.path.remove('')" + PYTEST}
WHICH = """
import os
import mmfast
def test_which():
    assert mmfast.__file__ == os.path.join(os.environ["EXPECTED"], "mmfast", "__init__.py")
"""


@pytest.fixture
def tested_clone(tmp_path) -> Path:
    """A clone with one test and one benchmark, which look where mmfast comes from."""
    folder = package(tmp_path / "clone", has_kernels=False)
    for name in ("tests/test_which.py", "bench/bench_which.py"):
        (folder / name).parent.mkdir()
        (folder / name).write_text(WHICH)
    (folder / "bench/__init__.py").touch()
    (folder / "early.py").write_text("import mmfast")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize(
    ("command", "where", "words"),
    [
        ("python -m pytest", "clone", ()),
        ("python -m pytest", "clone", ("bench/bench_which.py",)),
        ("pytest", "clone", ("bench/bench_which.py",)),
        ("pytest", "clone", ("bench/bench_which.py", "tests")),
        ("python -m pytest", "clone", ("bench", "tests", "-n1")),
        ("python -m pytest", "clone/tests", ()),
        ("python -m pytest", "another", ("../clone/tests", "../clone/bench/bench_which.py")),
        ("python -m pytest", "clone", ("-p", "early", "tests")),
    ],
)
def test_tests_and_benchmarks_take_the_installed_package(tested_clone, tmp_path, command, where, words):
    if "-n1" in words:
        pytest.importorskip("xdist")
    site = package(tmp_path / "site", has_kernels=True)
    package(tmp_path / "another", has_kernels=False)
    code = COMMANDS[command]
    done = start(code, *words, folder=tmp_path / where, installed=site, EXPECTED=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("words", [("tests",), ("bench/bench_which.py",)])
def test_tests_and_benchmarks_refuse_a_bare_checkout(tested_clone, words):
    done = start(PYTEST, *words, folder=tested_clone, EXPECTED=str(tested_clone))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (said,) = done.stderr.splitlines()
    assert said.startswith("mmfast is not installed, or its bare sources were imported before pytest began: ")
    assert said.endswith(f'run pip install -e ".[test]" in {tested_clone}')
    assert "passed" not in done.stdout
