"""Calls side by side: in processes of this machine, or on the machines of joblib's Dask or Ray backend.

Each call runs alone in its process, as seeds are a process's own. What all share is written to a file once,
and processes map it into memory. Events go by files, too: no port is opened and no further process started.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmfast.errors import describe
from mmfast.experiments.worker import SHARED, STOP, Share, call_here, program_settings
from mmfast.files import is_alive
from mmfast.training.stopping import Stop, Stopped, listening

# Seconds between two looks at what calls tell.
_LOOK = 0.1
# How the folders of calls begin.
_SCRATCH = ".jobs-"


def side_by_side(
    task: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    jobs: int = 1,
    *,
    shared: Any = None,
    folder: Path | None = None,
    gpus: int = 0,
    on_event: Callable[[int, Any], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (i, result) of `task(shared, *calls[i], tell)` for each call, as they are done.

    With one job and no other backend of joblib all happens here, in order. Otherwise threads and GPUs are
    divided among `jobs` processes; under `joblib.parallel_config(backend="dask")` or "ray" that backend's
    workers take their place, with the threads and GPUs that they have.

    Args:
        task: a function of a module; what it takes and returns can be pickled.
        calls: arguments of each call.
        jobs: calls at a time.
        shared: of all calls, such as data; tensors in it are one memory for the processes of a machine.
        folder: for files of the time; machines of a backend must all see it. None: the system's.
        gpus: of a call, 0 where it takes none.
        on_event: gets i and what call i tells, from a thread.

    Raises:
        ValueError: a backend of threads, a folder that a machine does not see, what cannot be pickled.
        KeyboardInterrupt, Stopped: this process was told to end, and the calls have ended before, as a
            `Trainer.fit` does that gets SIGTERM. Those of another backend's workers end by themselves.
        Exception: the first that a call raises; those under way end as above.
    """
    if is_made_here(jobs):
        for i, call in enumerate(calls):
            yield i, task(shared, *call, _teller(i, on_event))
        return
    share = None
    if _backend() == "loky":
        threads = max(1, torch.get_num_threads() // jobs)
        share = Share(jobs, threads, gpus, _visible_gpus() if gpus else ())
    with _scratch(folder) as scratch:
        _write(shared, scratch / SHARED)
        group = _Group(scratch, on_event)
        with group.watching():
            yield from _results(group, task, calls, jobs if share else -1, share)


def is_made_here(jobs: int) -> bool:
    """Whether `side_by_side` makes so many calls at a time in this process."""
    kind = _backend()
    return kind == "here" or (kind == "loky" and jobs == 1)


def check_jobs(jobs: int, devices: int | str, num_gpus: int) -> None:
    """Raise ValueError where runs on some devices each cannot be side by side on this machine.

    Args:
        jobs: at a time.
        devices: of a run.
        num_gpus: that runs take; 0: they take the CPU.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs > 1 and _number(devices) is None:
        raise ValueError(f"devices must be a number with several jobs, got {describe(devices)}")
    each = _number(devices) or 1
    if jobs > 1 and each > 1 and 0 < num_gpus < jobs * each:
        raise ValueError(
            f"jobs must be at most {num_gpus // each} with devices = {each} on {num_gpus} GPUs, got {jobs}"
        )


def sensible_jobs(cores: int, num_gpus: int, devices: int | str, calls: int) -> int:
    """Return how many runs at a time suit a machine: one a core, or one for each GPU or group of them."""
    each = _number(devices) or max(1, num_gpus or cores)
    return max(1, min((num_gpus or cores) // each, calls))


def _number(devices: int | str) -> int | None:
    return int(devices) if str(devices).isdigit() else None


# In the parent


class _Group:
    """The calls of one `side_by_side`: what they tell, and their end.

    Args:
        scratch: folder of their files.
        on_event: as there.
    """

    def __init__(self, scratch: Path, on_event: Callable[[int, Any], None] | None) -> None:
        self.scratch = scratch
        self.on_event = on_event
        self._read: dict[Path, int] = {}
        self._looking = threading.Lock()
        self._over = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hand on what calls tell, while they do."""
        thread = threading.Thread(target=self._watch, name="mmfast jobs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK):
            self.look()

    def look(self) -> None:
        """Hand on what is new in the files of events: whole lines."""
        if self.on_event is None:
            return
        with self._looking:
            for path in sorted(self.scratch.glob("*.events")):
                begin = self._read.get(path, 0)
                with open(path, "rb") as file:
                    file.seek(begin)
                    text = file.read()
                whole = text[: text.rfind(b"\n") + 1]
                self._read[path] = begin + len(whole)
                for line in whole.splitlines():
                    self.on_event(int(path.stem), json.loads(line))

    def stop(self) -> None:
        """Let calls that have not begun not begin, and tell those under way on this machine to end."""
        (self.scratch / STOP).touch()
        for path in self.scratch.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)


def _results(
    group: _Group, task: Any, calls: Sequence[tuple[Any, ...]], jobs: int, share: Share | None
) -> Iterator[tuple[int, Any]]:
    """Start the calls, and yield what they return; whatever ends this early ends them first."""
    import joblib

    failed: BaseException | None = None
    can_yield = joblib.parallel.get_active_backend()[0].supports_return_generator
    with listening(group.stop) as stop, _interrupts(group.stop) as interrupt:
        with _ignored_interrupts():
            # Ctrl-C is for this process, which tells the others: they are born to ignore it.
            run = joblib.Parallel(
                n_jobs=jobs, batch_size=1, return_as="generator_unordered" if can_yield else "list"
            )
            calling = joblib.delayed(call_here)
            made = iter(run(calling(group.scratch, task, i, call, share) for i, call in enumerate(calls)))
        while True:
            try:
                index, state, value = next(made)
            except StopIteration:
                break
            except Exception as error:
                # A process was killed, such as for want of memory, and joblib has ended the others.
                if failed is None and not (stop.asked or interrupt.asked):
                    failed = _lost(error)
                break
            group.look()
            if state == "failed" and failed is None:
                failed = value
                group.stop()
            elif state == "done" and failed is None:
                try:
                    yield index, value
                except GeneratorExit:
                    group.stop()
                    # joblib ends its processes when all calls have come back, or one is lost.
                    with contextlib.suppress(Exception):
                        for _ in made:
                            pass
                    raise
    if stop.asked:
        raise Stopped("the runs were stopped by SIGTERM")
    if interrupt.asked:
        raise KeyboardInterrupt
    if failed is not None:
        raise failed


def _lost(error: Exception) -> Exception:
    # The first sentence: joblib goes on with advice about memory.
    text = str(error).strip().partition("\n")[0].partition(". ")[0]
    return OSError(
        f"a process of the jobs has ended before its run, perhaps for want of memory ({text}): give fewer "
        "jobs; the same command goes on"
    )


def _backend() -> str:
    """Return where joblib would compute: "loky", "here", or the class of another backend.

    Raises:
        ValueError: in threads.
    """
    import joblib

    found = type(joblib.parallel.get_active_backend()[0]).__name__
    if found == "ThreadingBackend":
        raise ValueError(
            "joblib's backend must not be 'threading', as seeds are a process's own: take 'loky', 'dask' or "
            "'ray'"
        )
    return {"LokyBackend": "loky", "SequentialBackend": "here"}.get(found, found)


def _write(shared: Any, path: Path) -> None:
    """Write what calls share; torch's files can be mapped into memory, by all processes the same one.

    Raises:
        ValueError: it cannot be pickled.
    """
    import cloudpickle

    try:
        torch.save((program_settings(), shared), path, pickle_module=cloudpickle)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"what runs share must be picklable for several jobs: {error}") from error


def _visible_gpus() -> tuple[str, ...]:
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(told.split(",")) if told else tuple(map(str, range(torch.cuda.device_count())))


def _teller(index: int, on_event: Callable[[int, Any], None] | None) -> Callable[[Any], None]:
    return lambda event: None if on_event is None else on_event(index, event)


def clear_scratch(folder: Path) -> None:
    """Remove what processes of this machine that were killed have left in a folder."""
    pattern = re.compile(re.escape(f"{_SCRATCH}{socket.gethostname()}-") + r"(\d+)-.*")
    for path in folder.glob(f"{_SCRATCH}*"):
        found = pattern.fullmatch(path.name)
        if found and not is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
    owner = f"{_SCRATCH}{socket.gethostname()}-{os.getpid()}-"
    path = Path(tempfile.mkdtemp(prefix=owner, dir=folder)).absolute()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _ignored_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interrupts(then: Callable[[], Any]) -> Iterator[Stop]:
    """Note the first Ctrl-C and call `then`; the second one is a KeyboardInterrupt."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        then()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
