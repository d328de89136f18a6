"""Fixtures of every op's tests: backends that can run here, memory that shows when it is read too early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import settings

# Side by side on one machine, threads must not wait for each other by spinning; OpenMP reads this once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Triton decides when a kernel is defined, so before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmfast import backend as _backend
from support import emulation, foreign, interpreter
from support.stems import EMULATED, FILES, has_file, op_of

# The same examples in every run: a failure belongs to the change that brought it.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

foreign.put_in_place()
interpreter.make_quicker()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests that take `backend` every backend for which the op of their file has a file."""
    if "backend" in metafunc.fixturenames:
        op = op_of(metafunc.module.__file__ or "")
        names = [name for name in (*FILES, EMULATED) if has_file(op, name)]
        if names:
            metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend with a kernel for the op; one that cannot run here is skipped and says why."""
    is_emulated = request.param == EMULATED
    name = "cuda" if is_emulated else request.param
    if is_emulated and not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    with emulation.emulated() if is_emulated else nullcontext():
        reason = _backend.why_not(name)
        dtype = request.node.callspec.params.get("dtype")
        op = op_of(request.node.module.__file__)
        if reason is None and dtype is not None and not _backend.supports(name, op, dtype):
            reason = f"its {op} kernel does not take {dtype} here"
        if reason is not None:
            pytest.skip(reason)
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str) -> torch.device:
    """The device whose tensors `backend` takes."""
    is_emulated = request.node.callspec.params["backend"] == EMULATED
    on_gpu = (backend == "cuda" and not is_emulated) or (backend == "triton" and not _backend.interpreting())
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def cpu_module() -> None:
    """Skip a test of the C++ kernels where they are not built."""
    if reason := _backend.why_not("cpu"):
        pytest.skip(reason)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Put torch's number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
