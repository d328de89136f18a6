"""Programs that start many processes of one: torchrun, srun, mpirun, Fabric; what each knows of others."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from lightning_fabric import Fabric

from mmfast.errors import describe, either

# Names of SLURM jobs in which somebody types commands, as Fabric has them.
_INTERACTIVE = ("bash", "interactive")
# Without a launcher a process on each of several nodes learns of the others by these.
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# Tells processes that a program starts for a run whose they are: its number.
_STARTER = "MMFAST_STARTED_BY"
# Seconds between looks at the process that started this one, and those left to end by itself.
_LOOK, _GRACE = 1.0, 5.0


class World(NamedTuple):
    """How many processes a launcher has started for one program."""

    launcher: str
    processes: int
    on_this_node: int
    nodes: int


def found(environment: Mapping[str, str] = os.environ) -> World | None:
    """Return the world of the launcher that started this process, or None where it is alone."""
    world = _started(environment)
    return world if world is not None and world.processes > 1 else None


def _started(environment: Mapping[str, str]) -> World | None:
    """Return the world of the launcher that started this process, of one process, too."""
    if "TORCHELASTIC_RUN_ID" in environment:
        processes, here = (int(environment.get(key, 1)) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return World("torchrun", processes, here, max(1, processes // here))
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
        processes, nodes = (int(environment.get(key, 1)) for key in ("SLURM_NTASKS", "SLURM_NNODES"))
        return World("srun", processes, -(-processes // nodes), nodes)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        sizes = (environment["OMPI_COMM_WORLD_SIZE"], environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
        processes, here = map(int, sizes)
        return World("mpirun", processes, here, max(1, processes // here))
    return None


def fit(devices: int | str | list[int], num_nodes: int = 1) -> tuple[int | str | list[int], int]:
    """Return devices and nodes of a run that uses all processes its launcher has started.

    One device and one node, the defaults, become theirs: else each process would train a copy of its own into
    one folder.

    Raises:
        ValueError: another number is asked for than there are processes or nodes, or several nodes where
            nothing tells this process of the others.
    """
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ValueError(f"num_nodes must be an integer of at least 1, got {describe(num_nodes)}")
    world = _started(os.environ)
    if world is None or (world.launcher == "mpirun" and world.processes == 1):
        _check_alone(devices, num_nodes)
        return devices, num_nodes
    if world.launcher == "mpirun":
        raise ValueError("processes that mpirun starts do not find each other: start them by torchrun")
    if world.nodes * world.on_this_node != world.processes:
        raise ValueError(
            f"{world.launcher} must start as many processes on each node, got {world.processes} on "
            f"{world.nodes}"
        )
    if num_nodes not in (1, world.nodes):
        raise ValueError(
            f"num_nodes must be {world.nodes}, the nodes on which {world.launcher} has started processes, "
            f"got {num_nodes}"
        )
    if devices in ("auto", "-1", -1, 1, "1"):
        return world.on_this_node, world.nodes
    if number_of(devices) != world.on_this_node:
        raise ValueError(
            f"devices must be {world.on_this_node}, the processes that {world.launcher} has started here, "
            f"got {devices}"
        )
    return devices, world.nodes


def number_of(devices: int | str | list[int]) -> int | None:
    """Return how many devices are asked for, in any way that Fabric takes; None where that is its choice."""
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, list):
        return len(devices)
    return None if str(devices) in ("auto", "-1") or not str(devices).isdigit() else int(devices)


def _check_alone(devices: int | str | list[int], num_nodes: int) -> None:
    """Raise ValueError where a program that no launcher has started cannot get the processes asked for."""
    environment = os.environ
    is_job = "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE
    if is_job and (num_nodes > 1 or (number_of(devices) or int(environment["SLURM_NTASKS"])) > 1):
        # Fabric takes the job's tasks for processes that are there, and waits for them.
        raise ValueError(
            f"a SLURM job must start several processes by srun or torchrun, got devices = {devices} and "
            f"num_nodes = {num_nodes} in a program that neither has started"
        )
    if num_nodes == 1:
        return
    missing = [key for key in _ADDRESS if not environment.get(key)]
    if missing:
        raise ValueError(
            f"num_nodes = {num_nodes} needs {' and '.join(missing)} in the environment: start the program "
            f"by torchrun --nnodes {num_nodes} on each node, which sets all there is to know, or set "
            f"MASTER_ADDR and MASTER_PORT to the first node's address and a free port of it, and NODE_RANK "
            f"to 0 on the first node, to {either(map(str, range(1, num_nodes)))} on another"
        )
    if not environment["MASTER_PORT"].isdigit():
        raise ValueError(f"MASTER_PORT must be a number, got {environment['MASTER_PORT']!r}")
    if environment["NODE_RANK"] not in map(str, range(num_nodes)):
        raise ValueError(
            f"NODE_RANK must lie in [0, num_nodes) = [0, {num_nodes}), got {environment['NODE_RANK']!r}"
        )


def is_first(num_nodes: int = 1, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the first of its run, which prints and writes, before they have met."""
    world = _started(environment)
    if world is None or world.launcher == "mpirun":
        # NODE_RANK may be there for another program's sake.
        keys = ["LOCAL_RANK", "NODE_RANK"] if num_nodes > 1 else ["LOCAL_RANK"]
    else:
        keys = ["RANK"] if world.launcher == "torchrun" else ["SLURM_PROCID"]
    return all(int(environment.get(key, 0)) == 0 for key in keys)


def launch(fabric: Fabric) -> None:
    """Start the other processes of a run where no launcher has, and let none of them outlive this one.

    Of a group whose first process is gone one that waits on a GPU would wait for ever: nothing tells NCCL.
    A process that was started here for the run ends some seconds after the one that started it. The other
    way round Fabric looks: where one of those it has started fails, it ends all.
    """
    if fabric._launched:
        return
    starts = fabric.world_size > 1 and "LOCAL_RANK" not in os.environ and _started(os.environ) is None
    if os.environ.pop(_STARTER, None) == str(os.getppid()):
        threading.Thread(target=_end_after, args=(os.getppid(),), name="mmfast-starter", daemon=True).start()
    try:
        if starts:
            os.environ[_STARTER] = str(os.getpid())
        fabric.launch()
    finally:
        # Programs that this one starts for other ends live on.
        os.environ.pop(_STARTER, None)


def _end_after(starter: int) -> None:
    """Wait until the process that started this one is gone, then end this one, if it does not by itself."""
    while os.getppid() == starter:
        time.sleep(_LOOK)
    time.sleep(_GRACE)
    print(
        f"mmfast: process {starter}, which had started this one, {os.getpid()}, is gone",
        file=sys.stderr,
        flush=True,
    )
    # The main thread may hang in a collective, where no exception reaches it.
    os._exit(1)


def refuse_launcher(what: str, num_nodes: int = 1) -> None:
    """Raise ValueError if this process is one of several: each would do the whole of it.

    Args:
        what: refuses, as the sentence begins.
        num_nodes: as asked for, which must be 1.
    """
    if (world := found()) is not None:
        raise ValueError(
            f"{what} starts the processes of its runs itself: start it once, without {world.launcher}, "
            f"and give it --devices {world.processes}"
        )
    if num_nodes > 1:
        raise ValueError(
            f"num_nodes must be 1, as {what} starts the processes of its runs itself and on this machine, "
            f"got {num_nodes}: make each run by mmfast train --num-nodes {num_nodes} on all of them"
        )
