"""What a process of `parallel.side_by_side` does: one call at a time, with its share of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmfast.methods import METHODS
from mmfast.training.stopping import Stopped

# In the folder of the calls: what all share, and what tells that none is to begin.
SHARED, STOP = "shared", "stop"
# Seconds between two looks at whether the parent lives.
_LOOK = 0.5
# Errors whose type tells the user something; others arrive as RuntimeError if they cannot be sent.
_KINDS = (BlockingIOError, FileNotFoundError, OSError, ImportError, TypeError, ValueError)

# Within a process: what was loaded last and its folder, its place among the jobs, and who computes.
_loaded: tuple[Path | None, Any] = (None, None)
_place: int | None = None
_alone = threading.Lock()


@dataclass(frozen=True)
class Share:
    """What of a machine each of its processes gets: jobs, threads and GPUs of one, and the GPUs of all."""

    jobs: int
    threads: int
    gpus: int
    visible: tuple[str, ...]


def gpus_of(place: int, count: int, visible: Sequence[str]) -> list[str]:
    """Return which of the GPUs that may be used are those of a job, by its place among the jobs from 0."""
    return [visible[(place * count + k) % len(visible)] for k in range(min(count, len(visible)))]


def call_here(
    scratch: Path, task: Any, index: int, call: tuple[Any, ...], share: Share | None
) -> tuple[int, str, Any]:
    """Return the call's number, and "done" with its result, "failed" with its error, or "stopped"."""
    # Threads of a worker take turns: seeds are the process's.
    with _alone, contextlib.ExitStack() as stack:
        if (scratch / STOP).exists():
            return index, "stopped", None
        try:
            if share is not None:
                _take_place(scratch, share)
                torch.set_num_threads(share.threads)
                stack.enter_context(_within_reach(scratch / f"{index}.pid"))
                if (scratch / STOP).exists():
                    # It came before there was a number to send the signal to.
                    return index, "stopped", None
            shared = _read(scratch)
            events = stack.enter_context(open(scratch / f"{index}.events", "a", buffering=1))

            def tell(event: Any) -> None:
                events.write(json.dumps(event) + "\n")

            return index, "done", task(shared, *call, tell)
        except (Stopped, KeyboardInterrupt):
            return index, "stopped", None
        except Exception as error:
            return index, "failed", _sendable(error)


def program_settings() -> dict[str, Any]:
    """Return what a program may have set for all it does, which other processes are to have, too."""
    return {
        # Those of the package are there anyhow.
        "methods": {
            name: kind for name, kind in METHODS.items() if not kind.__module__.startswith("mmfast.methods.")
        },
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _read(scratch: Path) -> Any:
    """Return what all calls share, loaded once in a process; its tensors are the file's."""
    global _loaded
    if _loaded[0] != scratch:
        if not (scratch / SHARED).exists():
            raise ValueError(
                f"folder must be one that all machines of joblib's backend see, got {scratch.parent}"
            )
        settings, shared = torch.load(scratch / SHARED, mmap=True, weights_only=False)
        METHODS.update(settings["methods"])
        torch.set_default_dtype(settings["dtype"])
        torch.set_float32_matmul_precision(settings["matmul"])
        torch.use_deterministic_algorithms(settings["deterministic"])
        _loaded = scratch, shared
    return _loaded[1]


def _take_place(scratch: Path, share: Share) -> None:
    """Take a place among the jobs, once in a process and before CUDA is asked for: it fixes the GPUs."""
    global _place
    if _place is not None:
        (scratch / f"{_place}.taken").touch()
        return
    for place in range(share.jobs):
        with contextlib.suppress(FileExistsError):
            (scratch / f"{place}.taken").touch(exist_ok=False)
            _place = place
            break
    # Where a process was lost another has its place.
    _place = _place or 0
    if share.gpus and share.visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(_place, share.gpus, share.visible))


@contextlib.contextmanager
def _within_reach(path: Path) -> Iterator[None]:
    """Let the parent send SIGTERM to this process, which gets it, too, when the parent is gone."""
    path.write_text(str(os.getpid()))
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="mmfast parent", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _sendable(error: Exception) -> Exception:
    """Return an error that can be sent to the parent, with where it comes from in a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
        sent = kind(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            sent.add_note(note)
        return sent
