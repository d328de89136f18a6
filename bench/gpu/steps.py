"""Steps that keep to their seconds: each a process with a limit, its result written as soon as it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What is left of a log in the archive, in a failure's report, and the most that one file may take.
LOG_BYTES, TAIL_LINES, FILE_BYTES = 2**18, 25, 2**24
# Kept free at the end for the archive and the table.
CLOSING = 6.0
RESULTS, STEPS, FAILURES, FACTS = "results.jsonl", "steps.jsonl", "failures.txt", "facts.json"
SUMMARY, LOGS = "summary.txt", "logs.tar.gz"
FILES = (RESULTS, STEPS, FAILURES, FACTS, SUMMARY, LOGS)
STATES = ("passed", "failed", "stopped", "not run")


@dataclass
class Step:
    """A command with a limit in seconds.

    Attributes:
        name: "group: what", as the table shows it.
        command: program and arguments.
        limit: seconds after which its process group is killed.
        environment: variables in addition to the run's.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    log: Path
    begun: float
    limit: float


class Run:
    """Runs steps one after the other or side by side, until its seconds are over.

    Files are appended to and flushed, so a run that is cut short from outside keeps what it found.
    """

    def __init__(
        self,
        folder: Path,
        logs: Path,
        seconds: float,
        environment: Mapping[str, str],
        *,
        rehearsal: bool = False,
        only: Sequence[str] = (),
    ):
        self.begun = time.monotonic()
        self.folder, self.logs, self.seconds = folder, logs, seconds
        self.rehearsal, self.only = rehearsal, only
        self.environment = {**os.environ, **environment, "MMFAST_GPU_RESULTS": str(folder / RESULTS)}
        folder.mkdir(parents=True, exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        # An earlier run's lines must not pass for this one's.
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        self.states: dict[str, str] = {}

    def passed(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.begun

    def left(self) -> float:
        """Return the seconds that steps may still take."""
        return self.seconds - CLOSING - self.passed()

    def step(self, step: Step) -> bool:
        """Run one step; return whether it passed."""
        self.together([step], workers=1)
        return self.states.get(step.name) == "passed"

    def together(self, steps: Sequence[Step], workers: int) -> None:
        """Run steps, at most `workers` at a time, in order."""
        waiting = [step for step in steps if self._is_chosen(step)]
        running: list[_Running] = []
        while waiting or running:
            while waiting and len(running) < workers and self.left() > 1:
                running.append(self._start(waiting.pop(0)))
            if waiting and not running:
                for step in waiting:
                    self._record(step, "not run", 0, "the time is over")
                return
            time.sleep(0.05)
            running = [one for one in running if not self._ended(one)]

    def close(self) -> bool:
        """Write the archive and the table, print the table; return whether nothing failed or was stopped."""
        text = self._table()
        (self.folder / SUMMARY).write_text(text)
        # The archive comes last: it is what can be missed.
        _archive(self.logs, self.folder / LOGS)
        for name in FILES:
            _shorten(self.folder / name)
        print(text, flush=True)
        return not {"failed", "stopped"} & set(self.states.values())

    def note(self, name: str, reason: str) -> None:
        """Record what does not run here, and why."""
        step = Step(name, (), 0)
        if self._is_chosen(step):
            self._record(step, "not run", 0, reason)

    def _is_chosen(self, step: Step) -> bool:
        return not self.only or any(part in step.name for part in self.only)

    def _start(self, step: Step) -> _Running:
        log = self.logs / ("".join(c if c.isalnum() or c in ".-" else "_" for c in step.name) + ".txt")
        with log.open("wb") as file:
            process = subprocess.Popen(
                step.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment | dict(step.environment) | {"MMFAST_GPU_STEP": step.name},
                start_new_session=True,
            )
        return _Running(step, process, log, time.monotonic(), min(step.limit, self.left()))

    def _ended(self, one: _Running) -> bool:
        seconds = time.monotonic() - one.begun
        code = one.process.poll()
        if code is None and seconds < one.limit:
            return False
        # What a step leaves behind it, a hanging grandchild for one, ends with it.
        _kill(one.process)
        if code is None:
            self._record(one.step, "stopped", seconds, f"not through after {one.limit:.0f} s", one.log)
        elif code:
            self._record(one.step, "failed", seconds, f"exit status {code}", one.log)
        else:
            self._record(one.step, "passed", seconds)
        return True

    def _record(self, step: Step, state: str, seconds: float, why: str = "", log: Path | None = None) -> None:
        self.states[step.name] = state
        entry = {"step": step.name, "state": state, "seconds": round(seconds, 1), "why": why}
        append(self.folder / STEPS, entry | {"at": round(self.passed(), 1), "rehearsal": self.rehearsal})
        line = f"{self.passed():5.0f} s  {state:8} {step.name}, {seconds:.1f} s" + (f": {why}" if why else "")
        print(line, flush=True)
        if log is not None:
            lines = _tail(log).splitlines()[-TAIL_LINES:]
            with (self.folder / FAILURES).open("a") as file:
                file.write("\n".join([line, *lines, "", ""]))

    def _table(self) -> str:
        groups: dict[str, dict[str, list[str]]] = {}
        for name, state in self.states.items():
            group, _, what = name.partition(": ")
            groups.setdefault(group, {}).setdefault(state, []).append(what or name)
        lines = [f"{'':24}" + "".join(f"{state:>9}" for state in STATES)]
        for group, found in groups.items():
            lines.append(f"{group:24}" + "".join(f"{len(found.get(state, [])):9}" for state in STATES))
        for group, found in groups.items():
            for state in STATES[1:]:
                if found.get(state):
                    lines.append(f"{state}: {group}: {', '.join(found[state])}")
        lines += self._wrong_results()
        if self.rehearsal:
            lines.insert(0, "REHEARSAL: no result was judged, and no figure means anything.")
        return (
            "\n".join([*lines, f"{self.passed():.0f} of {self.seconds:.0f} s; files in {self.folder}"]) + "\n"
        )

    def _wrong_results(self) -> list[str]:
        path = self.folder / RESULTS
        entries = read(path) if path.exists() else []
        checks = [entry for entry in entries if "ok" in entry]
        if not checks:
            return []
        wrong = [entry["check"] for entry in checks if not entry["ok"]]
        shown = "".join(f"\n  wrong: {name}" for name in wrong[:20])
        return [f"{len(checks)} checks, {len(wrong)} wrong{shown}"]


def append(path: Path, entry: Mapping) -> None:
    """Append one line of JSON in a single write, so that processes side by side do not mix theirs."""
    line = (json.dumps(entry) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict]:
    """Return the lines of a file that `append` wrote; the last may have been cut off."""
    entries = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return entries


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process stuck in the driver cannot be ended; nothing waits for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")


def _archive(logs: Path, path: Path) -> None:
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        for log in sorted(logs.iterdir()):
            content = _tail(log).encode()
            about = tarfile.TarInfo(log.name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def _shorten(path: Path) -> None:
    """Cut a file down to what may be sent; whole lines from the beginning stay."""
    if path.exists() and path.suffix != ".gz" and path.stat().st_size > FILE_BYTES:
        with path.open("rb+") as file:
            kept = file.read(FILE_BYTES)
            file.truncate(kept.rfind(b"\n") + 1)
