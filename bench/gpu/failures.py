"""A pytest plugin for a machine with a GPU: what needs none is left out, failures are written at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import steps


def pytest_runtest_logreport(report: Any) -> None:
    """Write a failure's name and its last lines."""
    path = os.environ.get("MMFAST_GPU_RESULTS")
    # Of tests side by side, the process that gathers them writes.
    if report.failed and path and "PYTEST_XDIST_WORKER" not in os.environ:
        text, printed = str(report.longrepr)[-1500:], (report.capstdout + report.capstderr)[-1500:]
        line = {"test": report.nodeid, "when": report.when, "failed": text, "printed": printed}
        steps.append(Path(path), line)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what the CPU computes whatever the machine: a GPU's minutes are few."""
    kept: list[Any] = []
    left: list[Any] = []
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        (left if name in ("cpu", "reference", "cuda-emulated") else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
