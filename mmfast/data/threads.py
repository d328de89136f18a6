"""Fewer threads for small work: on a busy machine threads that wait for each other cost more than they save.

OpenMP's threads wait by spinning, for tenths of a second where another program holds the core that one of
them needs; a step of a small model then takes ten times as long, and alone it is no faster by them. How long
they spin is fixed when torch is imported, so what can be chosen here is their number. It follows from the
work alone, not from the load: the same seed gives the same result on a busy machine.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmfast.data.batches import Entries, evaluating
from mmfast.data.reader import Reader, evaluation_batches, reader_of

# Operations of a batch's forward pass up to which a second thread gains little: with 6 million, steps took
# 0.46 ms with one thread and 0.40 with two, with 25 million 1.1 and 0.76; with 1.6 million 0.29 and 0.33.
# Beside three programs of two spinning threads on two cores an epoch of 19,600 samples and 3 million
# operations a batch took 1.8 s in place of 8.0, evaluating them 0.4 in place of 0.7; alone 0.36 and 0.08 in
# place of 0.33 and 0.07. All timed by hand.
_SMALL = 16e6

_operations: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def fitting_threads(
    module: Any, dataset: Any, batch_size: int, reader: Reader | None = None
) -> Iterator[None]:
    """Let torch compute with one thread where batches of `module` are small; its own number comes back.

    Args:
        module: a learner, or a model.
        dataset: of whose samples the first are passed through it to count.
        batch_size: samples at a time.
        reader: of the data set; None takes the learner's.
    """
    before = torch.get_num_threads()
    first = next(module.parameters(), None)
    if before == 1 or first is None or first.device.type != "cpu":
        yield
        return
    if module not in _operations:
        _operations[module] = _count(module, dataset, reader or reader_of(module))
    if _operations[module] * batch_size > _SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(module: Any, dataset: Any, reader: Reader) -> float:
    """Return the operations that one sample takes in matrix products and convolutions."""
    plain = getattr(dataset, "evaluation", dataset)
    entries = Entries(plain, torch.arange(min(2, len(plain)), device="cpu"))
    # Of a learner the model alone: its own heads add little, and change from stage to stage.
    model = getattr(module, "model", module)
    # Two samples are not worth workers.
    here = replace(reader, num_workers=0)
    try:
        with evaluating(model), FlopCounterMode(display=False) as counter:
            for batch in evaluation_batches(model, entries, reader=here):
                model(batch)
    except Exception:
        # An encoder that cannot be counted, as a compiled one, keeps all threads.
        return math.inf
    return counter.get_total_flops() / max(1, len(entries))
