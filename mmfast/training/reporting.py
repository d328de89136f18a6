"""How a fit is reported while it goes on: loggers, and a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

LOGGERS = ("csv", "tensorboard")


def make_logger(kind: str, folder: Path) -> Any:
    """Return the logger of a name, which writes under a folder."""
    if kind == "csv":
        return CSVLogger(folder, name=kind, flush_logs_every_n_steps=1)
    return TensorBoardLogger(folder, name=kind)


@contextlib.contextmanager
def epoch_bar(title: str, num_epochs: int, *, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a bar by so many epochs, where one is wanted."""
    if not wanted:
        yield lambda epochs: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task(title, total=num_epochs)
        yield lambda epochs: progress.advance(task, epochs)


@contextlib.contextmanager
def finalizing(loggers: list[Any]) -> Iterator[None]:
    """Context: close loggers in the end, with the status that it brings."""
    status = "failed"
    try:
        yield
        status = "finished"
    finally:
        for logger in loggers:
            logger.finalize(status)


def flat(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return nested figures under one level of names, numbers only, as loggers take them."""
    found: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found
