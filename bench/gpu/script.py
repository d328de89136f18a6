"""What check and measure have in common: options, an mmfast made ready, facts of the machine, the table."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import parts
import steps
from steps import Run


@dataclass
class Machine:
    """What a script's steps need.

    Attributes:
        run: runs the steps.
        python: the interpreter they run in.
        work: a folder that goes away with the script.
        facts: of the machine, as they stand in facts.json.
        rehearse: repeat little, judge nothing.
    """

    run: Run
    python: str
    work: Path
    facts: dict
    rehearse: bool

    def write_facts(self) -> None:
        """Write the facts as they are known by now."""
        (self.run.folder / steps.FACTS).write_text(json.dumps(self.facts, indent=1) + "\n")


def main(name: str, description: str | None, seconds: float, body: Callable[[Machine], None]) -> int:
    """Run `body` on the machine that is ready; return the exit status: 2 where nothing can be run."""
    parser = argparse.ArgumentParser(prog=f"bench/gpu/{name}", description=description)
    parser.add_argument("folder", nargs="?", default=f"mmfast-gpu/{name}", type=Path)
    parser.add_argument("--seconds", type=float, default=seconds, help="the whole keeps to these")
    parser.add_argument("--only", action="append", default=[], help="only steps whose name holds this text")
    parser.add_argument(
        "--rehearse", action="store_true", help="few small cases, repeat little, judge nothing"
    )
    given = parser.parse_args()
    python = os.environ.get("PYTHON") or sys.executable
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        options = {"rehearsal": given.rehearse, "only": given.only}
        run = Run(given.folder.resolve(), work / "logs", given.seconds, {}, **options)
        try:
            environment, origin = parts.install(python, work)
            facts = parts.facts_of(python, environment)
        except parts.NotReadyError as error:
            print(f"bench/gpu/{name}: {error}", file=sys.stderr)
            return 2
        run.environment |= environment
        if given.rehearse:
            # What was never computed is then zero at least, not whatever lay there.
            run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        facts |= {"mmfast": origin, "rehearsal": given.rehearse, "script": name}
        machine = Machine(run, python, work, facts, given.rehearse)
        machine.write_facts()
        print(json.dumps(facts), flush=True)
        body(machine)
        return 0 if run.close() else 1
