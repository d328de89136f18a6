"""Tests and benchmarks take the mmfast that is installed, however pytest is started, or do not run.

`python -m pytest` puts the folder it is started in first on Python's path, and pytest itself the folder that
holds the package `bench`. Both are the clone, whose bare sources would be imported in place of the installed
package and run plain torch. This file is loaded before any other of the clone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def _is_bare(folder: str) -> bool:
    """Whether a folder of Python's path holds the sources of mmfast without what an install adds."""
    package = Path(folder or os.curdir, "mmfast")
    return (package / "__init__.py").exists() and not (package / "kernels").exists()


def _has_kernels() -> bool:
    """Whether the mmfast that is imported, or would be, is an install; an editable one has a finder."""
    return importlib.util.find_spec("mmfast") is not None and (
        importlib.util.find_spec("mmfast.kernels") is not None
    )


def _take_installed() -> None:
    """Import the installed mmfast, so that it stays whatever is put on the path later."""
    sys.path[:] = [folder for folder in sys.path if not _is_bare(folder)]
    importlib.invalidate_caches()
    # A plugin may have imported the sources before. Ops can be registered with torch once only.
    if "mmfast" in sys.modules and not _has_kernels() and "mmfast.ops" not in sys.modules:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mmfast"]:
            del sys.modules[name]
    if not _has_kernels():
        # pytest.exit would end the import of a conftest with a traceback.
        print(
            "mmfast is not installed, or its bare sources were imported before pytest began: "
            f'run pip install -e ".[test]" in {ROOT}',
            file=sys.stderr,
        )
        raise SystemExit(pytest.ExitCode.USAGE_ERROR)


_take_installed()
