"""Help for names that are spelled wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(
    word: str,
    known: Iterable[str],
) -> str:
    """Return "; did you mean x or y?" with the nearest known names, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""
