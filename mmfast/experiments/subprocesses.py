"""Runs on several devices, each by a command line in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmfast.experiments.results import METRICS
from mmfast.experiments.runs import PlannedRun
from mmfast.experiments.setup import Setup
from mmfast.methods.base import format_value
from mmfast.training.divergence import LOSS, PREDICTIONS, DivergedError
from mmfast.training.optimization import Optimization
from mmfast.training.stopping import STATUS, Stopped, listening

# Exit status of a run whose loss is NaN or infinite.
DIVERGED = 3
# How the command's errors begin.
_SAYS = "mmfast: "


def run_in_subprocess(setup: Setup, planned: PlannedRun, folder: Path) -> dict[str, Any]:
    """Make a run on several devices in processes of its own: Fabric launches them once per program.

    Raises:
        DivergedError, Stopped: as `Trainer.fit` in those processes.
        ValueError, RuntimeError: they failed.
    """
    command = [sys.executable, "-m", "mmfast", *train_arguments(setup, planned, folder)]
    done = run_to_its_end(command)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # Of several processes' lines, the one that says what is wrong.
        said = next((line for line in reversed(lines) if line.startswith(_SAYS)), done.stderr.strip())
        said = said.removeprefix(_SAYS)
        # The status may be another: when one process has ended, Fabric ends the others.
        if done.returncode == DIVERGED or said.startswith((LOSS, PREDICTIONS)):
            raise DivergedError(said, epoch=-1)
        kind = ValueError if done.returncode == 2 else RuntimeError
        raise kind(f"{planned.method.name} with seed {planned.seed} failed: {said}")
    return json.loads((folder / METRICS).read_text())


def run_to_its_end(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command whose stderr is wanted; SIGTERM is passed on to it, and waits for its end.

    Raises:
        Stopped: it was stopped so.
    """
    process: subprocess.Popen[str] | None = None

    def pass_on() -> None:
        if process is not None:
            process.terminate()

    with listening(pass_on) as stop:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if stop.asked:
            # It came before there was anyone to pass it on to.
            pass_on()
        try:
            _, said = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if stop.asked or process.returncode == STATUS:
        raise Stopped("the run was stopped by SIGTERM")
    return subprocess.CompletedProcess(command, process.returncode, stderr=said)


def train_arguments(setup: Setup, planned: PlannedRun, folder: Path) -> list[str]:
    """Return the arguments of `mmfast` that make a run and leave its entry in `folder`/metrics.json."""
    optimization = setup.optimization
    arguments = {
        "data": setup.source,
        "split-seed": setup.splits.split_seed or 0,
        "method": planned.method.name,
        "seed": planned.seed,
        "out": folder,
        **_told(optimization),
        "dim": setup.dim,
        "fusion": setup.fusion,
        "accelerator": setup.accelerator,
        "devices": setup.devices,
        "num-nodes": setup.num_nodes,
        "precision": setup.precision,
        "num-workers": setup.num_workers,
        "eval-batch-size": setup.eval_batch_size,
        "data-on-device": setup.data_on_device,
    }
    words = ["train", "--resume"]
    words += ["--probe"] * setup.probe + ["--skip-unreadable"] * setup.skip_unreadable
    words += ["--compile"] * setup.compile + ["--deterministic"] * setup.deterministic
    words += ["--no-decay-norms-and-biases"] * optimization.no_decay_norms_and_biases
    words += [f"--lr-scale={name}={factor}" for name, factor in optimization.lr_scale.items()]
    words += [f"--freeze={name}" for name in optimization.freeze]
    words += [f"--{key}={value}" for key, value in arguments.items()]
    words += [f"--{key.replace('_', '-')}={format_value(value)}" for key, value in setup.learning.items()]
    words += [f"--encoder={name}={kind}" for name, kind in setup.encoders.items()]
    if setup.modalities is not None:
        words.append(f"--modalities={','.join(setup.modalities)}")
    return words + [f"--set={key}={format_value(value)}" for key, value in planned.method.config().items()]


def _told(optimization: Optimization) -> dict[str, Any]:
    """Return the settings with one value each, by the option that sets them."""
    others = ("max_epochs", "no_decay_norms_and_biases", "lr_scale", "freeze")
    told = {key: value for key, value in optimization.told().items() if key not in others}
    return {"epochs": optimization.max_epochs} | {key.replace("_", "-"): told[key] for key in told}
