"""How fast is it on a GPU? Each op in a process with a limit, what teaches most first, within 330 s."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import script
from script import Machine

import steps
from steps import Step

SECONDS = 330
HERE = Path(__file__).resolve().parent
# First those that are held against bandwidth and plain torch; the loss has had its headline by then.
OPS = (
    *("shapley_values", "class_separability", "additive_shapley", "logit_fusion", "partial_reinit"),
    *("gradient_projection", "kmeans", "sigmoid_loss", "duc_loss"),
)
PROFILED = ("duc_loss", "shapley_values")
COUNTERS = "ncu.csv"


def row_steps(program: list[str], options: list[str]) -> dict[str, list[Step]]:
    """Return the steps of each selection; rows are written one by one, a step that is stopped keeps its."""

    def ops(selection: str, limit: float) -> list[Step]:
        return [Step(f"{selection}: {op}", [*program, op, selection, *options], limit) for op in OPS]

    headline = Step("headline: duc_loss", [*program, "duc_loss", "headline", *options], 45)
    return {
        "headline": [headline],
        # Ours on both backends, beside eager torch: what "auto" takes is settled by these.
        "all": ops("all", 60),
        "compiled": ops("compiled", 30),
        "peers": ops("peers", 30),
    }


def host_step(python: str, folder: Path, rehearse: bool) -> Step:
    """Return what calls with few samples cost the host, eager torch beside both backends."""
    command = [python, "-P", "-m", "mmfast", "bench", "--host", "--device", "cuda", "--out", str(folder)]
    # Nothing is computed in a rehearsal, and k-means refuses what was never computed.
    named = [op for op in OPS if op != "kmeans"] + ["--quick"] if rehearse else []
    return Step("host: every op", [*command, *named], 60)


def counter_steps(python: str, file: Path) -> list[Step]:
    """Return a call of ncu for each main kernel; the clocks are not ours to lock."""
    sections = [
        f"--section={name}" for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
    ]
    found = []
    for op in PROFILED:
        ncu = [
            "ncu",
            "--clock-control",
            "none",
            "--target-processes",
            "all",
            *sections,
            "--print-details",
            "all",
        ]
        # Launches that prepare data are not ours.
        ncu += ["--kernel-name", "regex:shapley|duc|nce", "--csv"]
        program = [python, "-P", "-m", "mmfast.bench.profiled", op]
        command = ["bash", "-c", 'set -o pipefail; "${@:2}" | tee -a "$1"', "ncu", str(file), *ncu, *program]
        found.append(Step(f"ncu: {op}", command, 45))
    return found


def measure(machine: Machine) -> None:
    """Measure the machine's limits, then what teaches most first."""
    run, python, folder = machine.run, machine.python, machine.run.folder
    for old in (folder / COUNTERS, *folder.glob("*-host*.json")):
        old.unlink(missing_ok=True)
    limits = machine.work / "limits.json"
    options = ["--out", str(folder / steps.RESULTS), "--limits", str(limits)]
    options += ["--rehearse"] if machine.rehearse else []
    program = [python, "-P", str(HERE / "rows.py")]
    # Whatever is chosen, rows stand beside the limits of the same run.
    chosen, run.only = run.only, ()
    run.step(Step("limits: copy, read, matrix products", [*program, "limits", *options], 40))
    run.only = chosen
    selections = {}
    if limits.exists():
        machine.facts["run"] = json.loads(limits.read_text())
        machine.write_facts()
        selections = row_steps(program, options)
    run.together(selections.get("headline", []), workers=1)
    run.together(selections.get("all", []), workers=1)
    run.step(host_step(python, folder, machine.rehearse))
    if shutil.which("ncu"):
        run.together(counter_steps(python, folder / COUNTERS), workers=1)
    else:
        run.note("ncu", "ncu is not installed")
    for name in ("compiled", "peers"):
        run.together(selections.get(name, []), workers=1)


if __name__ == "__main__":
    raise SystemExit(script.main("measure", __doc__, SECONDS, measure))
