"""What the worker processes of a data loader do about signals."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

# Seconds that a worker goes on after SIGTERM.
_GRACE = 20


def outlive_sigterm(worker: int) -> None:
    """Let a worker, as its `worker_init_fn`, serve on for a while after SIGTERM.

    A cluster sends it to all processes of a job. A worker that ended at once would end the training process
    by an error, before that has finished its step and written a checkpoint.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, _end_later)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def held_sigterm() -> Iterator[None]:
    """Let SIGTERM wait while workers start, which inherit that, until each knows what to do about it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_later(number: int, frame: Any) -> None:
    # By itself, for the loader waits for the end of a worker; and a second time at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_GRACE)
