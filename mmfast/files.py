"""Files written whole or not at all, and JSON without NaN."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO[Any]]:
    """Yield a file that takes the place of `path` when it is complete; a failure leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all drafts: what a killed process left is overwritten by the next one.
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with open(draft, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it: tuples as lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new."""
    with replacing(path, "w") as file:
        json.dump(plain(value), file, indent=1, allow_nan=False)
        file.write("\n")
