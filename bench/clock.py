"""Time and peak memory of a call, on the CPU or on a CUDA device."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# From malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# Of a GPU's cycles, at most so many make a second. A queue of launches holds a thousand or so, of 5 us each.
_CYCLES, _QUEUED = 2e9, 2e-3


class Clock:
    """Times calls on one device: by the processor's clock, or by CUDA events on the current stream.

    On a GPU that is the time of the device alone: it begins when the calls are queued. What a call costs the
    host, which binds small calls, `mmfast bench --host` tells.
    """

    def __init__(self, device: torch.device, fresh_memory: bool = False) -> None:
        self.on_gpu = device.type == "cuda"
        self._host: dict[Callable[[], Any], float] = {}
        if not self.on_gpu and not fresh_memory:
            _keep_freed_memory()

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Return the mean seconds of `repeats` calls."""
        if self.on_gpu:
            return self._seconds_of_device(call, repeats)
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begun) / repeats

    def _seconds_of_device(self, call: Callable[[], Any], repeats: int) -> float:
        """Let the device wait until calls are queued, once their first turn has told how long that takes."""
        host = self._host.get(call)
        most = repeats if host is None else max(1, int(_QUEUED / host))
        total = 0.0
        for done in range(0, repeats, most):
            number = min(most, repeats - done)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if host is not None:
                torch.cuda._sleep(int(_CYCLES * (1.3 * number * host + 2e-5)))
            begin.record()
            begun = time.perf_counter()
            for _ in range(number):
                call()
            self._host.setdefault(call, max(1e-6, (time.perf_counter() - begun) / number))
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        return total / repeats

    def first_call(self, call: Callable[[], Any]) -> tuple[Any, float, int | None]:
        """Return the result of one call, its seconds, and the most bytes allocated beyond those before it."""
        results = []

        def keep() -> None:
            results.append(call())

        measure_peak = self._peak_on_gpu if self.on_gpu else self._peak_on_cpu
        seconds, peak = measure_peak(lambda: self.seconds(keep, 1))
        if self.on_gpu:
            self._host[call] = self._host.pop(keep)
        return results[0], seconds, peak

    @staticmethod
    def _peak_on_gpu(call: Callable[[], float]) -> tuple[float, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = call()
        return seconds, torch.cuda.max_memory_allocated() - before

    @staticmethod
    def _peak_on_cpu(call: Callable[[], float]) -> tuple[float, int | None]:
        """Return the seconds, and by how much the process grew; None where the system does not tell."""
        try:
            # What was freed goes back to the system: a call that took it again would seem to need nothing.
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR.write_text("5")
            before = _resident("VmRSS")
        except (OSError, AttributeError, TypeError):
            return call(), None
        seconds = call()
        return seconds, max(0, _resident("VmHWM") - before)


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep what is freed, as torch does on GPUs.

    Otherwise it hands large blocks back at once and takes them anew page by page: with results of 64 MB these
    page faults are four fifths of a call's time, whoever computes them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _resident(key: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[key].split()[0]) * 1024
