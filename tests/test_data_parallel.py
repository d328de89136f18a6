"""Two processes with half a batch each train as one process with the whole batch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
import test_trainer as t
torch.set_num_threads(1)
trainer, model = t.make_trainer({name!r}, accelerator="cpu", devices={devices}), t.make_model()
trainer.fit(model, t.SPLITS.train, t.SPLITS.val)
metrics = trainer.test(model, t.SPLITS.test)
if trainer.fabric.is_global_zero:
    with open({out!r}, "w") as file:
        figures = [metrics.loss, metrics.accuracy, metrics.macro_f1, *metrics.contribution.values()]
        json.dump([[entry["loss"] for entry in trainer.history], *figures], file)
"""


def run(name: str, devices: int, folder: Path) -> list:
    out, script = folder / f"{devices}.json", folder / f"{devices}.py"
    # A file, because each further process is started with the first one's command line.
    text = SCRIPT.format(tests=str(Path(__file__).parent), name=name, devices=devices, out=str(out))
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ["joint", "di-mml", "mla"])
def test_two_processes_reach_the_metrics_of_one(name, tmp_path):
    (losses, *figures), (other_losses, *other_figures) = (run(name, devices, tmp_path) for devices in (1, 2))
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert other_figures == pytest.approx(figures, rel=1e-5)
