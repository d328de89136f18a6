"""Random draws that follow from a seed alone: those of torch on the CPU, of numpy and of Python's random."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

_MASK = 0x7FFFFFFFFFFFFFFF


def mixed(seed: int, *key: int) -> int:
    """Return a seed that depends on another one and a key, far from those of neighbouring keys."""
    state = seed & 0xFFFFFFFF
    for number in key:
        state = (state * 6364136223846793005 + number + 1442695040888963407) & _MASK
    return state


def seed_host(seed: int) -> None:
    """Seed what data sets draw from on the host; no device's generator."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  what data sets draw from, whoever wrote them
    random.seed(seed)


@contextlib.contextmanager
def kept_draws() -> Iterator[None]:
    """Give the host's generators their state back in the end."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
