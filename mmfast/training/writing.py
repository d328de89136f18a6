"""Checkpoints written while training goes on: a copy is taken, and a thread writes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.training import checkpoint
from mmfast.training.checkpoint import Parted
from mmfast.training.stopping import Stopped

# Bytes of a state up to which it is written at once: a thread and training, which take turns with Python's
# lock, hinder each other for longer than that takes. With 0.2 MB an epoch of 30 ms took 45.
_SMALL = 4 * 2**20
# Seconds between two writes: an epoch of 16 small steps took 30 ms, and its checkpoint 9.
_BETWEEN = 1.0


class Writer:
    """Context: writes one checkpoint over the other, each whole, in the order they are given.

    The end of the context waits for the last one, however it comes, so that no thread is left behind. A
    write that fails raises at the next one or at the end, where an error that is on its way takes it along.

    Args:
        path: of the checkpoint; None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        # A copy of the latest state while it is not written, and when one was.
        self._held: dict[str, Any] | None = None
        self._written = -_BETWEEN

    def save(self, state: dict[str, Any], told: Mapping[str, Any] | None = None) -> None:
        """Take a copy of a state and let it be written; where the one before is not yet, wait for that.

        A small one is written at once. Within a second of another write the copy is held instead,
        and written at the end of the context if no later one was: a process that is killed loses the epochs
        of such a time, and trains them again to the same weights.

        Args:
            state: what training changes.
            told: further entries, plain values that nobody changes any more.

        Raises:
            OSError: it, or the one before, could not be written.
        """
        if self.path is None:
            return
        self.wait()
        self._held = None
        if time.monotonic() - self._written < _BETWEEN:
            self._held = {**(told or {}), **snapshot(state)}
            return
        self._written = time.monotonic()
        if _bytes_of(state) <= _SMALL:
            checkpoint.save(self.path, {**(told or {}), **state})
            return
        arguments = self.path, {**(told or {}), **snapshot(state)}
        # No daemon: even a program that ends at once ends with it written.
        self._thread = threading.Thread(target=self._write, args=arguments, name="mmfast checkpoint")
        del arguments
        self._thread.start()

    def wait(self) -> None:
        """Wait until no thread writes.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        try:
            checkpoint.save(path, state)
        except Exception as error:
            self._error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
            if self.path is not None and self._held is not None:
                checkpoint.save(self.path, self._held)
        except Exception as failed:
            # Who is told that a run was stopped relies on its checkpoint.
            if error is None or isinstance(error, Stopped):
                raise
            error.add_note(f"Besides, the last checkpoint could not be written: {failed}")


def snapshot(value: Any) -> Any:
    """Return a copy, on the CPU, of tensors and plain values in lists and dicts; what is fixed is no copy.

    Tensors that are the same memory are one in the copy, too.
    """
    return _copied(value, {})


def _copied(value: Any, copies: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.numel() == 0:
            return value.detach().to("cpu", copy=True)
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(value, Parted):
        if value.fixed:
            return value
        return Parted(_copied(value.entries, copies), value.groups, fixed=True)
    if isinstance(value, Mapping):
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, copies) for item in value]
    return tuple(_copied(item, copies) for item in value) if isinstance(value, tuple) else value


def _bytes_of(value: Any) -> int:
    """Return the bytes of the tensors in a state."""
    if isinstance(value, Parted):
        value = value.entries
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes_of(item) for item in value)
    return value.nbytes if isinstance(value, Tensor) else 0
