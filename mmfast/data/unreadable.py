"""Files of a folder that cannot be read: why, what helps, and one report of all of them."""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_SHOWN = 10
# What stands in place of a file whose content is kept elsewhere, and the command that brings it.
_POINTERS = {
    b"version https://git-lfs": ("a Git LFS pointer", "git lfs pull"),
    b"/annex/objects/": ("a git-annex pointer", "git annex get"),
}


class UnreadableFileError(ValueError):
    """A file that cannot be read; `reason` says why and what to do about it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def unreadable(path: Path, kind: str, error: Exception) -> UnreadableFileError:
    """Return the error to raise in place of what a decoder said about a file that should be `kind`."""
    return UnreadableFileError(path, _look_into(path, kind) or f"not a readable {kind}: {_detail(error)}")


def _look_into(path: Path, kind: str) -> str | None:
    """Return what is wrong with a file that is no media at all: decoders say nothing useful about those."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which does not exist; bring the file that it means"
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        return f"cannot be opened: {_detail(error)}"
    if not head:
        return "empty (0 bytes); copy or download it again"
    for start, (name, command) in _POINTERS.items():
        if head.startswith(start):
            return f"{name} in place of the {kind}; fetch the file with {command}"
    text = _as_text(head)
    if text is None:
        return None
    return f"text, not a {kind}, beginning with {' '.join(text.split())[:30]!r}; copy or download it again"


def _as_text(head: bytes) -> str | None:
    """Return the words a file begins with, None where it is binary."""
    try:
        # A character may be cut at the end of what was read.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    words = text.split()
    printable = all(word.isprintable() for word in words)
    # A single word may as well be the first letters of a format.
    return text if len(words) > 1 and printable else None


def _detail(error: Exception) -> str:
    # An operating system's message without the path, which the report names anyway.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().rstrip(".") or type(error).__name__


class Unreadable:
    """The files of `folder` that could not be read so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reasons: dict[Path, str] = {}

    def attempt(self, read: Callable[[Path], T], path: Path) -> T | None:
        """Return what `read` makes of a file, None where it cannot be read, now or before."""
        if path in self.reasons:
            return None
        try:
            return read(path)
        except UnreadableFileError as error:
            self.reasons[path] = error.reason
            return None

    def error(self, total: int, advice: str) -> ValueError:
        """Return the error that names the files, at most 10, by reason.

        Args:
            total: number of files there are.
            advice: what to do about them, the end of a sentence.
        """
        if len(self.reasons) == 1:
            ((path, reason),) = self.reasons.items()
            return ValueError(f"{path}: {reason}; {advice}")
        groups: dict[str, list[Path]] = defaultdict(list)
        ranked = []
        for path, reason in sorted(self.reasons.items()):
            ranked.append((len(groups[reason]), path))
            groups[reason].append(path)
        # The first file of every reason, then the second ones: a frequent reason hides no rare one.
        shown = {path for _, path in sorted(ranked)[:_SHOWN]}
        lines = [f"{self.folder}: {len(self.reasons):,} of {total:,} files cannot be read; {advice}:"]
        for reason, paths in groups.items():
            names = [path.relative_to(self.folder).as_posix() for path in paths if path in shown]
            count = f" ({len(paths):,} files)" if len(paths) > 1 else ""
            if names:
                lines.append(f"{reason}{count}: {', '.join(names)}")
        if len(self.reasons) > _SHOWN:
            lines.append(f"and {len(self.reasons) - _SHOWN:,} more")
        return ValueError("\n  ".join(lines))
