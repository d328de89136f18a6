"""`pytest bench/bench_duc_loss.py`: the quick cases of an op as tables of pytest-benchmark.

pytest-benchmark times one contestant to its end before the next, so what disturbs the machine for a while
disturbs only one of them: ratios that are reported come from `mmfast bench`, where contestants take turns.
Its own options serve for statistics of a call, profiles, and comparisons with stored runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmfast import backend

from .harness import OURS, Case, Options, ran, spelled
from .peers import Missing


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    """Give every `bench_<op>.py` the one test below."""
    if not module_path.name.startswith("bench_"):
        return None
    module = pytest.Module.from_parent(parent, path=module_path)
    module.obj.test_speed = test_speed
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every case and contestant."""
    if "contestant" not in metafunc.fixturenames:
        return
    pairs = [
        pytest.param(case, name, id=f"{case.name} {case.direction}-{name}")
        for case in metafunc.module.cases(Options(quick=True))
        for name in (OURS, *case.peers)
        if not case.once
    ]
    metafunc.parametrize(("case", "contestant"), pairs)


@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
def test_speed(benchmark: Any, case: Case, contestant: str) -> None:
    """Check ours, and time one contestant."""
    call = case.ours if contestant == OURS else case.peers[contestant]
    if isinstance(call, Missing):
        pytest.skip(str(call))
    benchmark.group = f"{case.name}, {case.direction}"
    benchmark.name = contestant
    if contestant == OURS:
        with backend.noting() as noted:
            result = call()
        case.check(result)
        benchmark.extra_info["backend"] = ran(noted)
        benchmark.name = f"{OURS}: {spelled(ran(noted))}"
    benchmark(call)
