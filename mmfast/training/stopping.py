"""The end of a fit whose process gets SIGTERM, which clusters send some time before they kill."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmfast.distributed import max_over_processes, world

# Exit status of a process that SIGTERM has ended, as shells report it.
STATUS = 128 + signal.SIGTERM
# Seconds between two questions of several processes to each other, and batches at most. One is an all_reduce
# of two numbers that the host waits for: 0.8 ms of two processes on two busy cores, a thousandth of that.
_SECONDS, _MOST = 1.0, 1000


class Stopped(SystemExit):
    """A fit has ended before its end, after SIGTERM; its checkpoint is written, and `resume=True` goes on.

    It is no `Exception`, as KeyboardInterrupt is none: a script that does nothing about it ends with status
    143. Of several processes the first one's status is 143 and that of the others 0: launchers take another
    for a failure, and would kill the first one before it has ended.

    Attributes:
        status: that number.
    """

    def __init__(self, text: str, *, rank: int = 0) -> None:
        super().__init__(text)
        self.code = self.status = STATUS if rank == 0 else 0


class Stop:
    """Whether a fit is to stop.

    Attributes:
        listens: this process notes SIGTERM.
        asked: it has got it.
    """

    def __init__(self) -> None:
        self.listens = self.asked = False
        self._device: torch.device | None = None
        self._batches, self._interval = 0, 1
        self._since: float | None = None

    def agree(self, device: torch.device) -> None:
        """Let the processes of a run, on `device` here, ask each other from now on if any of them listens."""
        if world() is not None:
            anyone = max_over_processes(torch.tensor(float(self.listens), device=device))
            self._device = device if bool(anyone) else None

    def due(self, *, now: bool = False) -> bool:
        """Return whether to stop, the same in all processes; asked after every batch, in all of them.

        Args:
            now: let the processes ask each other, whenever they did so last.
        """
        if self._device is None:
            return self.asked
        if now:
            self._since = None
            return self._ask(0.0)[0]
        if self._since is None:
            # How long a batch takes is known after the next.
            self._since, self._batches = time.perf_counter(), 0
            return False
        self._batches += 1
        if self._batches < self._interval:
            return False
        asked, seconds = self._ask((time.perf_counter() - self._since) / self._batches)
        self._since, self._batches = time.perf_counter(), 0
        self._interval = min(max(1, int(_SECONDS / max(seconds, 1e-9))), _MOST)
        return asked

    def _ask(self, seconds: float) -> tuple[bool, float]:
        """Return whether any process was asked to stop, and the longest time of a batch."""
        found = torch.tensor([float(self.asked), seconds], device=self._device, dtype=torch.float32)
        asked, seconds = max_over_processes(found).tolist()
        return asked > 0, seconds


@contextlib.contextmanager
def listening(then: Callable[[], Any] | None = None, *, wanted: bool = True) -> Iterator[Stop]:
    """Note SIGTERM in place of ending by it, and call what the program itself has installed for it.

    Only a program's main thread can; and one that ignores SIGTERM goes on ignoring it.

    Args:
        then: called when it comes.
        wanted: False does nothing.
    """
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    # None is a handler that was not installed from Python, and could not be put back.
    if not wanted or not is_main or before in (None, signal.SIG_IGN):
        yield stop
        return

    def note(number: int, frame: Any) -> None:
        stop.asked = True
        if then is not None:
            then()
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, note)
    stop.listens = True
    try:
        yield stop
    finally:
        if signal.getsignal(signal.SIGTERM) is note:
            signal.signal(signal.SIGTERM, before)
