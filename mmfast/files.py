"""Files written whole or not at all, JSON without NaN, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

_count = itertools.count()
# Of JSON, to which each item has a line: in results.json an epoch of a run's history is one.
_DEPTH = 4


@contextlib.contextmanager
def replacing(path: Path, mode: str, *, part_of: Path | None = None) -> Iterator[IO[Any]]:
    """Yield a file that takes the place of `path` when it is complete; a failure leaves `path` as it was.

    Args:
        path: of the file.
        mode: "w" or "wb".
        part_of: the file that the user knows, where `path` is a part of it; a full disk is told of that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(path.parent, re.escape(path.name))
    # A name of its own: two processes that write the same file must not write the same draft.
    draft = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_count)}.tmp")
    try:
        with open(draft, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except Exception as error:
        if (full := _full_disk(error)) is not None:
            known = part_of or path
            text = f"{full.strerror}; {known} is as it was: make room, and give the same command again"
            raise OSError(full.errno, text) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def _full_disk(error: BaseException | None) -> OSError | None:
    """Return the error of a full disk behind another one: torch covers it by one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def remove_drafts(folder: Path, names: str) -> None:
    """Remove drafts of files of these names, a pattern, by processes of this machine that were killed."""
    pattern = re.compile(f"(?:{names})" + re.escape(f".{socket.gethostname()}-") + r"(\d+)-\d+\.tmp")
    for draft in folder.glob("*.tmp"):
        found = pattern.fullmatch(draft.name)
        if found and not is_alive(int(found[1])):
            draft.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs, as far as that can be asked."""
    if os.name != "posix":
        # There the question itself would end the process.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def locked(path: Path, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock `path`, a file that stays; the system gives it back when a process is killed.

    Args:
        path: of the lock.
        wait: called once if another process holds it, before this one waits; None: do not wait.

    Raises:
        BlockingIOError: another process holds it, and `wait` is None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        # A file system without locks.
        yield
        return
    except Timeout:
        if wait is None:
            raise BlockingIOError(f"another process holds {path}") from None
        wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it: tuples as lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any, *, is_plain: bool = False) -> None:
    """Write JSON so that a reader sees the old file or the new.

    Args:
        path: of the file.
        value: dicts, lists and plain values.
        is_plain: `plain` has been at it.
    """
    with replacing(path, "w") as file:
        file.write(_json_text(value if is_plain else plain(value), _DEPTH))
        file.write("\n")


def _json_text(value: Any, depth: int, indent: str = "\n ") -> str:
    """Return JSON with a line for each item down to a depth; what lies deeper goes to the quick encoder."""
    if depth == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        texts = (_json_text(item, depth - 1, indent + " ") for item in value.values())
        items = [f"{json.dumps(key)}: {text}" for key, text in zip(value, texts)]
        opening, closing = "{}"
    else:
        items = [_json_text(item, depth - 1, indent + " ") for item in value]
        opening, closing = "[]"
    return opening + indent + f",{indent}".join(items) + indent[:-1] + closing
