"""Runs over several processes and machines: worlds, strategies, and that no process outlives a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

from lightning_fabric.strategies import (
    DataParallelStrategy,
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from typer.testing import CliRunner

import mmfast
from mmfast import data
from mmfast.cli.commands import app
from mmfast.training import launchers, strategies
from support.files import write_npz

FOLDER = Path(__file__).parent
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train.sh"}
OWN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}
KNOWN = {*TORCHRUN, *SRUN, *OWN, "LOCAL_RANK", "RANK", "SLURM_PROCID"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the variables that launchers set, of which none is there before."""
    for key in KNOWN:
        monkeypatch.delenv(key, raising=False)
    return lambda values: [monkeypatch.setenv(key, value) for key, value in values.items()]


# Worlds


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_the_nodes_of_a_launcher_are_adopted_or_refused(launcher, environment):
    environment(launcher)
    for num_nodes in (1, 2):
        assert launchers.fit(1, num_nodes) == (2, 2)
        assert launchers.fit("2", num_nodes) == ("2", 2)
    name = "torchrun" if launcher is TORCHRUN else "srun"
    with pytest.raises(
        ValueError, match=f"num_nodes must be 2, the nodes on which {name} has started processes, got 3"
    ):
        launchers.fit(1, 3)


def test_one_process_of_a_launcher_is_a_world_too(environment):
    environment(TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    assert launchers.fit("auto") == (1, 1)
    with pytest.raises(ValueError, match="devices must be 1, the processes that torchrun has started here"):
        launchers.fit(2)
    with pytest.raises(ValueError, match="num_nodes must be 1, the nodes on which torchrun has"):
        launchers.fit(1, 2)


def test_nodes_of_unequal_numbers_of_processes_are_refused(environment):
    environment(SRUN | {"SLURM_NTASKS": "3"})
    with pytest.raises(ValueError, match="srun must start as many processes on each node, got 3 on 2"):
        launchers.fit(1)


def test_a_slurm_job_without_srun_starts_one_process(environment):
    environment({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"})
    assert launchers.fit(1) == (1, 1)
    for devices, num_nodes in ((2, 1), ("auto", 1), ([0, 1], 1), (1, 2)):
        with pytest.raises(ValueError, match=r"a SLURM job must start several processes by srun or torchrun"):
            launchers.fit(devices, num_nodes)


def test_without_a_launcher_each_node_must_know_of_the_others(environment):
    assert launchers.fit(2) == (2, 1)
    with pytest.raises(
        ValueError, match=r"needs MASTER_ADDR and MASTER_PORT and NODE_RANK in the .*torchrun --nnodes 2"
    ):
        launchers.fit(1, 2)
    environment(OWN)
    assert launchers.fit(3, 2) == (3, 2)
    environment({"NODE_RANK": "2"})
    with pytest.raises(ValueError, match=r"NODE_RANK must lie in \[0, num_nodes\) = \[0, 2\), got '2'"):
        launchers.fit(1, 2)
    environment({"NODE_RANK": "0", "MASTER_PORT": "http"})
    with pytest.raises(ValueError, match="MASTER_PORT must be a number, got 'http'"):
        launchers.fit(1, 2)


@pytest.mark.parametrize("num_nodes", [0, -1, True, 1.0, "2", None], ids=repr)
def test_num_nodes_is_a_number(num_nodes, environment):
    with pytest.raises(ValueError, match="num_nodes must be an integer of at least 1, got"):
        mmfast.Trainer("joint", num_nodes=num_nodes)


@pytest.mark.parametrize(
    ("values", "num_nodes", "expected"),
    [
        ({}, 1, True),
        ({"LOCAL_RANK": "1"}, 1, False),
        ({"NODE_RANK": "1"}, 1, True),
        ({"NODE_RANK": "1"}, 2, False),
        (OWN | {"NODE_RANK": "0", "LOCAL_RANK": "0"}, 2, True),
        (TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}, 1, False),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, 1, True),
        (SRUN | {"SLURM_PROCID": "2"}, 1, False),
        (SRUN | {"SLURM_PROCID": "0"}, 2, True),
    ],
)
def test_the_first_process_is_known_before_they_meet(values, num_nodes, expected):
    assert launchers.is_first(num_nodes, values) == expected


def test_a_comparison_trains_on_one_machine(tmp_path, environment):
    words = [
        "compare",
        "--num-nodes",
        "2",
        "--out",
        str(tmp_path),
        "--methods",
        "joint",
        "--accelerator",
        "cpu",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "num_nodes must be 1, as mmfast compare starts the processes of its runs itself" in result.output
    assert list(tmp_path.iterdir()) == []


# Strategies


@pytest.mark.parametrize("name", ["auto", "ddp", "DDP", "ddp_find_unused_parameters_true"])
def test_data_parallel_training_looks_for_unused_parameters(name, environment):
    strategy = mmfast.Trainer("joint", accelerator="cpu", devices=2, strategy=name).fabric.strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True


def test_a_strategy_that_says_nothing_of_unused_parameters_is_told(environment):
    given = DDPStrategy(gradient_as_bucket_view=True)
    strategy = mmfast.Trainer("joint", accelerator="cpu", devices=2, strategy=given).fabric.strategy
    assert strategy is given
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "find_unused_parameters": True}


def test_one_process_needs_no_strategy(environment):
    assert isinstance(mmfast.Trainer("joint", accelerator="cpu").fabric.strategy, SingleDeviceStrategy)
    given = SingleDeviceStrategy("cpu")
    assert mmfast.Trainer("joint", accelerator="cpu", strategy=given).fabric.strategy is given


SPLIT = "which splits parameters, gradients or what the optimizer keeps over processes"
FUNCTION = "which starts processes from a function"
REFUSED = {
    "fsdp": ("fsdp", f"'fsdp', {SPLIT}.*take 'ddp'"),
    "FSDP of other spelling": ("FSDP", f"'FSDP', {SPLIT}"),
    "fsdp offloaded": ("fsdp_cpu_offload", SPLIT),
    "deepspeed": ("deepspeed", SPLIT),
    "deepspeed stage 3": ("deepspeed_stage_3_offload", SPLIT),
    "xla_fsdp": ("xla_fsdp", SPLIT),
    "FSDPStrategy": (FSDPStrategy, f"FSDPStrategy, {SPLIT}"),
    "ModelParallelStrategy": (lambda: ModelParallelStrategy(lambda model, mesh: model), SPLIT),
    "dp": ("dp", "which copies the learner at each step"),
    "DataParallelStrategy": (DataParallelStrategy, "which copies the learner at each step"),
    "xla": ("xla", FUNCTION),
    "spawn": ("ddp_spawn", FUNCTION),
    "fork": ("ddp_fork", FUNCTION),
    "notebook": ("ddp_notebook", FUNCTION),
    "DDPStrategy of spawn": (lambda: DDPStrategy(start_method="spawn"), FUNCTION),
    "no unused": (
        lambda: DDPStrategy(find_unused_parameters=False),
        r"DDPStrategy\(find_unused_parameters=False\), as a method's step may leave parts of the learner out",
    ),
    "static graph": (
        lambda: DDPStrategy(static_graph=True),
        r"DDPStrategy\(static_graph=True\), as a method's",
    ),
    "single": (lambda: SingleDeviceStrategy("cpu"), "strategy must be 'ddp' for several processes"),
    "unknown": ("dpp", "strategy must be 'auto', 'ddp' or a DDPStrategy, got 'dpp'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_strategies_are_refused_with_the_reason(case, environment):
    given, message = REFUSED[case]
    strategy = given if isinstance(given, str) else given()
    with pytest.raises(ValueError, match=message):
        mmfast.Trainer("mla", accelerator="cpu", devices=2, strategy=strategy)


def test_what_is_no_strategy_is_refused(environment):
    with pytest.raises(TypeError, match="strategy must be a name or a strategy of Lightning Fabric, got 3"):
        strategies.fitting(3, 1, 1)


# Two machines, which are one here


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    splits = data.synthetic(120, 3, dims={"a": 6, "b": 6}, unique={"a": 0.3, "b": 0.1}, seed=0)
    return write_npz(tmp_path_factory.mktemp("data") / "small.npz", splits)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def torchrun(node: int, port: str) -> tuple[list[str], dict[str, str]]:
    words = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
    words += ["--master-addr", "127.0.0.1", "--master-port", port]
    return ["-m", "torch.distributed.run", *words, "-m", "mmfast"], {}


def by_itself(node: int, port: str) -> tuple[list[str], dict[str, str]]:
    return ["-m", "mmfast"], OWN | {"MASTER_PORT": port, "NODE_RANK": str(node)}


@pytest.mark.parametrize("launcher", [torchrun, by_itself])
def test_two_nodes_train_one_model(launcher, npz, tmp_path):
    words = [
        "train",
        "--data",
        str(npz),
        "--method",
        "mla",
        "--epochs",
        "2",
        "--dim",
        "8",
        "--accelerator",
        "cpu",
    ]
    port, nodes = free_port(), []
    for node in range(2):
        command, values = launcher(node, port)
        nodes.append(
            subprocess.Popen(
                [sys.executable, *command, *words, "--num-nodes", "2", "--out", str(tmp_path / "two")],
                env=_clean() | values,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
        )
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    # The second node prints nothing.
    assert [out.count("test accuracy") for out, _ in said] == [1, 0]
    alone = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert (one["devices"], two["devices"]) == (1, 2)
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)
    assert two["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=1e-6)


def _clean() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in KNOWN}
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


# Killed processes


TRAINING = """
import os, pathlib, sys
import test_trainer as t
def note(name):
    pathlib.Path(sys.argv[1], name).write_text(str(os.getpid()))
options = {"accelerator": "cpu", "devices": 2, "max_epochs": 10**6}
trainer = t.make_trainer("joint", on_epoch=lambda entry: note("epoch"), **options)
note(str(trainer.fabric.global_rank))
trainer.fit(t.make_model(), t.SPLITS.train, t.SPLITS.val)
"""
# Every process hangs, as in a collective of NCCL: nothing but a look at the others tells that one is gone.
HANGING = """
import ctypes, os, pathlib, sys
import mmfast
from mmfast.training import launchers
launchers._GRACE = 0.5
trainer = mmfast.Trainer("joint", accelerator="cpu", devices=2)
launchers.launch(trainer.fabric)
rank = trainer.fabric.global_rank
pathlib.Path(sys.argv[1], str(rank)).write_text(str(os.getpid()))
trainer.fabric.barrier()
pathlib.Path(sys.argv[1], "epoch").touch()
ctypes.CDLL(None).sleep(300)
"""


@contextlib.contextmanager
def running(program: str, folder: Path, *launcher: str) -> Iterator[dict[str, int]]:
    """Yield the numbers of a program's processes, by rank and of the one started here, in mid-training."""
    script = folder / "program.py"
    script.write_text(program)
    begun = subprocess.Popen(
        [sys.executable, *launcher, str(script), str(folder)],
        env=_clean(),
        stderr=(folder / "said").open("w"),
        cwd=folder,
    )
    pids = {"launcher": begun.pid}
    try:
        limit = time.monotonic() + 90
        while not all((folder / name).exists() for name in ("0", "1", "epoch")):
            assert begun.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < limit
            time.sleep(0.05)
        pids |= {rank: int((folder / rank).read_text()) for rank in "01"}
        yield pids
    finally:
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        begun.wait()


def wait_until_gone(pids: list[int], most: float) -> None:
    begun = time.monotonic()
    while any(map(_is_alive, pids)):
        assert time.monotonic() < begun + most, "a process outlives another"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@needs_proc
def test_a_killed_process_of_torchrun_ends_the_others(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with running(TRAINING, tmp_path, *launcher) as pids:
        os.kill(pids["1"], signal.SIGKILL)
        wait_until_gone(list(pids.values()), 20)


@needs_proc
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_process_ends_the_others_that_hang(victim, tmp_path):
    with running(HANGING, tmp_path) as pids:
        os.kill(pids[victim], signal.SIGKILL)
        wait_until_gone(list(pids.values()), 20)
    if victim == "0":
        assert (
            f"mmfast: process {pids['0']}, which had started this one, {pids['1']}, is gone"
            in (tmp_path / "said").read_text()
        )


def test_programs_started_for_other_ends_live_on(environment, monkeypatch):
    fabric = mmfast.Trainer("joint", accelerator="cpu", devices=2).fabric
    seen = []
    monkeypatch.setattr(type(fabric), "launch", lambda self: seen.append(os.environ[launchers._STARTER]))
    launchers.launch(fabric)
    assert seen == [str(os.getpid())]
    assert launchers._STARTER not in os.environ
