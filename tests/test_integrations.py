"""The loops of Lightning and of transformers beside the trainer's: two processes of each, and the table."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

from support.stems import ROOT

FOLDER = Path(__file__).parent
LOOPS = ("lightning", "transformers")
METHODS = ["frozen-unimodal", "sample-valuation", "mla"]

SCRIPT = f"""
import sys, warnings
sys.path.insert(0, {str(FOLDER)!r})
warnings.simplefilter("ignore")
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
import test_lightning as l
import test_transformers as t
from mmfast.integrations.lightning import MethodModule
from support.integrations import *

folder, names = sys.argv[1], sys.argv[2:]
DDP = {{"strategy": "ddp_find_unused_parameters_true", "devices": 2}}

def hold(kind, name, found, history):
    expected = trained(name, devices=2, **t.SAME)
    assert_same_weights(found, expected.learner)
    assert history == history_of(expected)
    Path(folder, f"{{kind}} {{name}} in {{dist.get_rank()}}").touch()

def hugging_face(name, **options):
    options |= {{"per_device_train_batch_size": SIZE // 2, "ddp_find_unused_parameters": True}}
    return t.new_trainer(name, f"{{folder}}/{{name}}", **options)

for name in names:
    module = l.new_module(name, **t.SAME)
    l.new_trainer(name, **DDP).fit(module)
    hold("lightning", name, module.learner, module.history)
    trainer = hugging_face(name)
    trainer.train()
    hold("transformers", name, trainer.learner, trainer.history)

# From within an epoch.
name = "sample-valuation"
keep = l.lightning.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=4)
try:
    l.new_trainer(name, callbacks=[keep, l.StopAfter(batches=9)], enable_checkpointing=True, **DDP).fit(
        l.new_module(name, **t.SAME)
    )
except Stop:
    module = l.new_module(name, **t.SAME)
    l.new_trainer(name, **DDP).fit(module, ckpt_path=f"{{folder}}/last.ckpt", weights_only=True)
    hold("lightning resumed", name, module.learner, module.history)
options = {{"save_strategy": "steps", "save_steps": 4}}
try:
    hugging_face(name, callbacks=[t.StopAt(9)], **options).train()
except Stop:
    trainer = hugging_face(name, **options)
    trainer.train(resume_from_checkpoint=True)
    hold("transformers resumed", name, trainer.learner, trainer.history)
# Threads of the group that run on while Python is taken down may abort the process.
dist.destroy_process_group()
"""


def launch(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # A process that is aborted tells what its threads did.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [*command, program, *words], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)
def test_two_processes_train_as_those_of_the_trainer(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    done = launch(str(program), str(tmp_path), *METHODS)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [*METHODS, "resumed sample-valuation"]
    wanted = {f"{loop} {case} in {rank}" for loop in LOOPS for case in cases for rank in range(2)}
    assert {path.name for path in tmp_path.glob("* in ?")} == wanted


def test_the_table_holds_each_loop_to_the_trainer(tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "integrations"))
    (row,) = tool["main"](["--methods", "di-mml", "--epochs", "2", "--json", str(tmp_path / "table.json")])
    assert row["difference"] == 0
    assert row["trainer"] == row["lightning"] == row["transformers"] > 0.1
    assert json.loads((tmp_path / "table.json").read_text()) == [row]
    accuracy = f"{100 * row['trainer']:.2f}"
    line = f"| di-mml | {accuracy} | {accuracy} | {accuracy} | 0 |"
    assert line in capsys.readouterr().out


def test_differences_are_found():
    tool = runpy.run_path(str(ROOT / "tools" / "integrations"))
    weights = {"a": torch.zeros(2), "b": torch.ones(1, dtype=torch.int64)}
    assert tool["largest_difference"](weights, {"a": torch.tensor([0, -0.5]), "b": torch.ones(1)}) == 0.5
