"""What cases of tests are made of: dtypes and their names, and how many examples a law gets."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

from mmfast import backend as _backend
from mmfast.errors import dtype_name

__all__ = ["DTYPES", "HALF", "dtype_name", "is_interpreted", "laws"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = DTYPES[2:]


def is_interpreted(backend: str) -> bool:
    """Return whether a backend's kernels run in Triton's interpreter, at 50 us an operation of any size."""
    return backend == "triton" and _backend.interpreting()


def laws(num_examples: int) -> settings:
    """Return hypothesis' settings of a test that takes fixtures, which all examples share."""
    return settings(
        max_examples=num_examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
