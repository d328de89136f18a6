"""Fixtures of every op's tests: backends that can run here, memory that shows when it is read too early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton decides when a kernel is defined, so before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmfast import backend as _backend


@pytest.fixture(params=_backend.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run the op of the test file test_<op>.py; the others are skipped and say why."""
    name, op = request.param, Path(request.path).stem.removeprefix("test_")
    reason = _backend.why_not(name)
    if reason is None and not _backend.implements(name, op):
        reason = f"there is no {name} kernel for {op} yet"
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device whose tensors `backend` takes."""
    on_gpu = backend == "cuda" or (backend == "triton" and not _backend.interpreting())
    return torch.device("cuda" if on_gpu else "cpu")


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
