"""Folders that several processes write to, that were cut off or damaged: nothing is lost without a word."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

import torch
import typer
from test_divergence import npz
from test_trainer import SPLITS, Killed, fitted, make_model, make_trainer, without_times
from typer.testing import CliRunner

from mmfast import files
from mmfast.cli.commands import app
from mmfast.cli.flags import plain_errors
from mmfast.experiments.results import METRICS, RESULTS
from mmfast.files import locked, replacing
from mmfast.training import checkpoint, launchers

__all__ = ["npz"]
SHORT = ["--epochs", "2", "--dim", "8", "--batch-size", "32", "--accelerator", "cpu", "--seeds", "2"]


def words(npz, out, methods, *more) -> list[str]:
    return ["compare", "--data", str(npz), "--out", str(out), *SHORT, "--methods", methods, *more]


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mmfast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def runs(out: Path) -> dict:
    found = json.loads((out / RESULTS).read_text())["runs"]
    return {(run["method"], run["seed"]): run["metrics"] for run in found}


@pytest.fixture(scope="module")
def alone(npz, tmp_path_factory) -> Path:
    """A finished comparison that no other process has touched."""
    out = tmp_path_factory.mktemp("alone") / "out"
    result = CliRunner().invoke(app, words(npz, out, "joint,unimodal,mla"))
    assert result.exit_code == 0, result.output
    return out


def test_comparisons_of_different_methods_at_once_keep_both(npz, alone, tmp_path):
    processes = [start(words(npz, tmp_path, methods)) for methods in ("joint,unimodal", "mla")]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert runs(tmp_path) == runs(alone)
    assert set(json.loads((tmp_path / RESULTS).read_text())["configuration"]["methods"]) == {
        "joint",
        "unimodal",
        "mla",
    }
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_comparison_twice_at_once_shares_the_work(npz, alone, tmp_path):
    processes = [start(words(npz, tmp_path, "joint,unimodal,mla")) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert runs(tmp_path) == runs(alone)
    assert all("6/6 " in out or "6 of 6 runs: already in" in out for out, _ in printed)


def test_a_killed_process_gives_its_lock_back(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom mmfast.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(100)\n"
    )
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="another process holds"), locked(path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    waited: list[str] = []
    with locked(path, wait=lambda: waited.append("")):
        pass
    process.stdout.close()


def test_two_trainers_do_not_write_into_one_folder(tmp_path):
    inner: list[BaseException] = []

    def train_there_too(entry):
        if not inner:
            with pytest.raises(BlockingIOError) as found:
                make_trainer("joint", out_dir=tmp_path).fit(make_model(), SPLITS.train, SPLITS.val)
            inner.append(found.value)

    fitted("joint", out_dir=tmp_path, on_epoch=train_there_too)
    assert str(inner[0]).startswith(f"another process trains in {tmp_path}: wait")
    fitted("joint", out_dir=tmp_path)


def test_a_comparison_killed_at_any_time_goes_on(npz, alone, tmp_path):
    for number, seconds in enumerate((2.5, 4.0, 5.5)):
        process = start(words(npz, tmp_path, "joint,unimodal,mla"))
        time.sleep(seconds + number / 10)
        process.kill()
        process.communicate()
    result = CliRunner().invoke(app, words(npz, tmp_path, "joint,unimodal,mla"))
    assert result.exit_code == 0, result.output
    assert runs(tmp_path) == runs(alone)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_results_that_cannot_be_read_are_rebuilt_from_their_runs(npz, alone, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    path, whole = out / RESULTS, (alone / RESULTS).read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(whole[:1000] if damage == "truncated" else "")
    before = path.read_bytes() if path.exists() else None
    result = CliRunner().invoke(app, words(npz, out, "joint,unimodal,mla"))
    assert result.exit_code == 0, result.output
    assert "6 of 6 runs: already in" in result.stdout
    assert "has been rebuilt from 6 runs under" in result.stderr
    assert json.loads(path.read_text())["runs"] == json.loads(whole)["runs"]
    if before is not None:
        assert (out / f"{RESULTS}.damaged").read_bytes() == before
    # What is of other settings is not taken for one of these.
    path.unlink()
    other = CliRunner().invoke(app, [*words(npz, out, "joint"), "--lr", "0.01", "--overwrite"])
    assert other.exit_code == 0
    assert "rebuilt" not in other.stderr
    path.unlink()
    back = CliRunner().invoke(app, [*words(npz, out, "mla")])
    assert "rebuilt from 2 runs" not in back.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"metrics"', '"metrixs"', 1),
        lambda text: text.replace('"accuracy": 0.', '"accuracy": 0.1', 1),
        lambda text: text.replace('"data": {', '"data": 3, "x": {', 1),
        lambda text: json.dumps({"format": 1, "data": {}, "configuration": {}, "runs": [{}]}),
    ],
    ids=["key", "figure", "part", "empty"],
)
def test_results_that_were_changed_are_rebuilt(npz, alone, tmp_path, change):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    whole = (out / RESULTS).read_text()
    (out / RESULTS).write_text(change(whole))
    result = CliRunner().invoke(app, words(npz, out, "joint,unimodal,mla"))
    assert result.exit_code == 0, result.output
    assert "rebuilt from 6 runs" in result.stderr
    assert (out / RESULTS).read_text() == whole


def test_overwriting_waits_for_nothing_and_breaks_nothing(npz, alone, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    with locked(out / "runs" / ".mla-seed0.lock"):
        result = CliRunner().invoke(app, words(npz, out, "joint", "--overwrite"))
    assert result.exit_code == 2
    assert "another process makes a run in" in result.stderr
    assert runs(out) == runs(alone)
    run = out / "runs" / "joint-seed0"
    before = sorted(path.name for path in run.iterdir())
    train = [
        "train",
        "--data",
        str(npz),
        "--out",
        str(run),
        "--overwrite",
        "--epochs",
        "1",
        "--accelerator",
        "cpu",
    ]
    with locked(run / ".lock"):
        result = CliRunner().invoke(app, train)
    assert "another process trains in" in result.stderr
    result = CliRunner().invoke(app, [word if word != str(npz) else "nowhere.npz" for word in train])
    assert result.exit_code == 2
    assert sorted(path.name for path in run.iterdir()) == before
    # And leaves no picture of what it replaces.
    wild = ["--overwrite", "--lr", "1e30", "--optimizer", "sgd"]
    assert CliRunner().invoke(app, words(npz, out, "joint", *wild)).exit_code == 3
    assert not list(out.glob("*.png"))


def test_a_file_is_no_folder(npz, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    result = CliRunner().invoke(app, words(npz, path, "joint"))
    assert result.exit_code == 2
    assert f"out must be a folder, {path} is a file" in result.stderr


def test_results_without_a_run_block_nothing(npz, tmp_path):
    tmp_path.joinpath(RESULTS).write_text(
        json.dumps({"format": 1, "data": {"name": "other"}, "configuration": {"methods": {}}, "runs": []})
    )
    result = CliRunner().invoke(app, words(npz, tmp_path, "joint"))
    assert result.exit_code == 0, result.output


def test_a_failed_run_leaves_no_results_behind(npz, tmp_path, monkeypatch):
    monkeypatch.setattr("mmfast.experiments.comparison.make_run", lambda *_, **__: 1 / 0)
    result = CliRunner().invoke(app, words(npz, tmp_path, "joint"))
    assert isinstance(result.exception, ZeroDivisionError)
    assert not (tmp_path / RESULTS).exists()


def test_a_run_says_what_it_was_made_on(alone):
    for run in json.loads((alone / RESULTS).read_text())["runs"]:
        assert (run["devices"], run["accelerator"]) == (1, "cpu")
    assert checkpoint.load(alone / "runs" / "mla-seed0" / "model.ckpt")["devices"] == 1
    assert (alone / "runs" / "mla-seed0" / METRICS).exists()


def test_flipped_bits_are_noticed(tmp_path):
    path, draw = tmp_path / "model.ckpt", torch.Generator().manual_seed(0)
    state = {
        "learner": {f"w{i}": torch.randn(50, 30, generator=draw) for i in range(4)},
        "history": [0.25] * 9,
    }
    checkpoint.save(path, state)
    whole, noticed = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (2,), generator=draw).tolist():
            damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=draw))
        path.write_bytes(damaged)
        try:
            found = checkpoint.load(path)
        except ValueError as error:
            noticed += str(path) in str(error)
            continue
        # The padding between parts holds nothing.
        assert found["history"] == state["history"]
        assert all(torch.equal(found["learner"][key], value) for key, value in state["learner"].items())
    assert noticed > 280
    damaged = bytearray(whole)
    place = whole.find(state["learner"]["w2"].numpy().tobytes())
    damaged[place : place + 64] = bytes(64)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is damaged, the checksum of .* take a copy of the file"):
        checkpoint.load(path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    path = tmp_path / RESULTS
    files.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(typer.Exit) as found, plain_errors(False):
        files.write_json(path, {"a": 2})
    assert found.value.exit_code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == [RESULTS]


def test_a_disk_that_fills_up_within_a_checkpoint_is_named(tmp_path, monkeypatch):
    """torch's writer raises an error of its own over that of the file."""
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"value": 1})

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(files, "open", lambda path, mode: Full(path, "w"), raising=False)
    with pytest.raises(OSError, match=r"No space left on device; .*last\.ckpt is as it was: make room"):
        checkpoint.save(path, {"value": torch.zeros(10_000)})
    monkeypatch.undo()
    assert checkpoint.load(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_drafts_have_names_of_their_own(tmp_path):
    path = tmp_path / "file"
    with replacing(path, "w") as one, replacing(path, "w") as other:
        one.write("one")
        other.write("other")
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["joint", "mla", "di-mml", "diagnose-relearn"])
def test_runs_in_other_precisions_are_resumed(name, precision, tmp_path):
    options = {"precision": precision, "accelerator": "cpu"}
    whole, _ = fitted(name, **options)

    def stop(entry, seen=[]):  # noqa: B006  one list per definition is what counts the calls
        seen.append(entry)
        if len(seen) > 2:
            raise Killed

    with pytest.raises(Killed):
        fitted(name, out_dir=tmp_path, on_epoch=stop, **options)
    resumed, _ = fitted(name, out_dir=tmp_path, resume=True, **options)
    assert without_times(resumed.history) == without_times(whole.history)


# Programs that start several processes


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train.sh"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_the_world_of_a_launcher_is_adopted_or_refused(environment, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for devices in (1, "1", "auto", 2, "2", [0, 1]):
        found = launchers.fit(devices)
        assert found == ((2, 2) if devices in (1, "1", "auto") else (devices, 2))
    with pytest.raises(
        ValueError, match=r"devices must be 2, the processes that (torchrun|srun) has started here, got 3"
    ):
        launchers.fit(3)
    with pytest.raises(
        ValueError, match=r"mmfast compare starts the processes of its runs itself.*--devices 4"
    ):
        launchers.refuse_launcher("mmfast compare")


def test_alone_nothing_is_adopted(monkeypatch):
    for environment in (
        {},
        TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        SRUN | {"SLURM_JOB_NAME": "bash"},
        {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"},
    ):
        assert launchers.found(environment) is None
    launchers.refuse_launcher("mmfast compare")
    assert launchers.fit(1) == (1, 1)
    for key, value in MPIRUN.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="start them by torchrun"):
        launchers.fit(1)


PROGRAM = """
import json, os, sys
import torch
import typer
import mmfast
import test_trainer as t
from mmfast.methods import sample_valuation

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
found = {}
# One device is asked for, as always; and each process would choose other copies.
real = sample_valuation.copy_counts
sample_valuation.copy_counts = lambda *a: real(*a) + (rank == 1)
trainer = t.make_trainer("sample-valuation", accelerator="cpu")
learner = trainer.fit(t.make_model(), t.SPLITS.train, t.SPLITS.val)
found["world"] = trainer.fabric.world_size
found["copies"] = learner.copies.tolist()
found["weights"] = float(sum(p.double().sum() for p in learner.parameters()))
train = t.SPLITS.train.subset(slice(0, len(t.SPLITS.train) - 40 * rank))
try:
    t.make_trainer("joint", accelerator="cpu").fit(t.make_model(), train, t.SPLITS.val)
except ValueError as error:
    found["error"] = str(error)
with open(sys.argv[1] + str(rank), "w") as file:
    json.dump(found, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_processes_of_torchrun_train_one_model_and_decide_once(tmp_path):
    script, folder = tmp_path / "script.py", Path(__file__).parent
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "rank")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert one["world"] == 2
    assert one == other
    assert sum(map(sum, one["copies"])) > 0
    size = len(SPLITS.train)
    assert one["error"].startswith(
        f"processes must agree on the number of samples of an epoch, got {size}, {size - 40}"
    )
