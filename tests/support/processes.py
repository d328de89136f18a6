"""A script in several processes of torch's launcher, which talk by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def launch(source: str, num_processes: int, folder: Path) -> list[dict]:
    """Run a script in so many processes; return what each of them wrote as JSON.

    Args:
        source: of the script, which writes to the path in sys.argv[1] with its rank behind it.
        num_processes: how many.
        folder: a new one, for its files.
    """
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(source)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    done = subprocess.run(
        [sys.executable, *words, str(script), str(folder / "rank")],
        cwd=TESTS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(num_processes)]
