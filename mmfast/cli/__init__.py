"""The console command `mmfast`, which tells what is missing where the extra [train] is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys

# What the command line itself is made of.
_NEEDED = ("typer", "rich")


def _leave_group() -> None:
    """End the threads of torch's process group, where a run has made one, while Python is whole.

    One of Gloo's that runs on while the interpreter is taken down can abort the process, and with it a run
    that has succeeded. Where a process has failed nothing is waited for: others may never answer.
    """
    # Not imported for it: most commands have no group.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def main() -> int | None:
    """Run `mmfast` with the arguments of this process."""
    # OpenMP's threads wait by spinning. On a machine with other work that made a run of small models up to
    # eight times longer (76 s for 9 s); asleep they cost a fifth where nothing else runs. Set before torch
    # is imported, which reads it once. Benchmarks measure what the user's own programs get: the default.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        from mmfast.cli.commands import app

        try:
            return app()
        except SystemExit as end:
            if not end.code:
                _leave_group()
            raise
    if sys.argv[1:] == ["info"]:
        from mmfast.cli import info

        print(info.text())
        return 0
    print(
        f"mmfast: the command line needs {' and '.join(missing)}, which the core package does not bring: "
        'pip install "mmfast[train]" (mmfast info works without).',
        file=sys.stderr,
    )
    return 2
