"""Programs that start many processes of one: torchrun, srun, mpirun; and what each is told of the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class World(NamedTuple):
    """How many processes a launcher has started for one program."""

    launcher: str
    processes: int
    on_this_node: int


def found(environment: Mapping[str, str] = os.environ) -> World | None:
    """Return the world of the launcher that started this process, or None where it is alone."""
    if "TORCHELASTIC_RUN_ID" in environment:
        world = World(
            "torchrun",
            int(environment.get("WORLD_SIZE", 1)),
            int(environment.get("LOCAL_WORLD_SIZE", 1)),
        )
    elif "SLURM_STEP_ID" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        processes, nodes = (int(environment.get(key, 1)) for key in ("SLURM_NTASKS", "SLURM_NNODES"))
        world = World("srun", processes, -(-processes // nodes))
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        sizes = (environment["OMPI_COMM_WORLD_SIZE"], environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
        world = World("mpirun", *map(int, sizes))
    else:
        return None
    return world if world.processes > 1 else None


def fit(devices: int | str | list[int]) -> tuple[int | str | list[int], int]:
    """Return devices and nodes of a run that uses all processes its launcher has started.

    One device, the default, becomes theirs: else each process would train a copy of its own into one folder.

    Raises:
        ValueError: another number is asked for than there are processes.
    """
    world = found()
    if world is None:
        return devices, 1
    if world.launcher == "mpirun":
        raise ValueError("processes that mpirun starts do not find each other: start them by torchrun")
    nodes = world.processes // world.on_this_node
    if devices in ("auto", "-1", -1, 1, "1"):
        return world.on_this_node, nodes
    count = len(devices) if isinstance(devices, list) else int(devices)
    if count != world.on_this_node:
        raise ValueError(
            f"devices must be {world.on_this_node}, the processes that {world.launcher} has started here, "
            f"got {devices}"
        )
    return devices, nodes


def refuse_launcher(what: str) -> None:
    """Raise ValueError if this process is one of several: each would do the whole of it."""
    if (world := found()) is not None:
        raise ValueError(
            f"{what} starts the processes of its runs itself: start it once, without {world.launcher}, "
            f"and give it --devices {world.processes}"
        )
