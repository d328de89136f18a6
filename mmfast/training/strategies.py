"""Which of Lightning Fabric's strategies a run may take: those that keep a learner whole in each process."""

from __future__ import annotations

from typing import Any

from lightning_fabric.strategies import (
    STRATEGY_REGISTRY,
    DataParallelStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAFSDPStrategy,
    XLAStrategy,
)
from lightning_fabric.strategies.strategy import Strategy

from mmfast.errors import describe
from mmfast.training.launchers import number_of

_SPLIT = (
    "splits parameters, gradients or what the optimizer keeps over processes, and methods look into whole "
    "ones: MLA projects a gradient, diagnose-relearn pulls parameters back, selection copies a state"
)
_COPIED = "copies the learner at each step, and what a method keeps in it would be lost"
_FROM_FUNCTION = "starts processes from a function, and fit is called in the middle of a program"
# Why a strategy cannot be taken, as its sentence goes on; of a class the first that fits.
_REFUSED: dict[type[Strategy], str] = {
    FSDPStrategy: _SPLIT,
    DeepSpeedStrategy: _SPLIT,
    ModelParallelStrategy: _SPLIT,
    XLAFSDPStrategy: _SPLIT,
    DataParallelStrategy: _COPIED,
    XLAStrategy: _FROM_FUNCTION,
    SingleDeviceXLAStrategy: "is for TPUs, on which no method has run",
}
_INSTEAD = "take 'ddp'"


def fitting(
    strategy: Any,
    devices: int | str | list[int],
    num_nodes: int,
) -> Any:
    """Return the strategy of a run as Fabric takes it: data-parallel wherever there may be several processes.

    Data-parallel training looks for parameters without a gradient, as a method's step may leave parts of the
    learner out, such as the encoders of modalities that a batch has not. A DDPStrategy that says nothing of
    them is told so.

    Args:
        strategy: "auto", "ddp" or another name of Fabric's, or an object.
        devices, num_nodes: of the run.

    Raises:
        ValueError: it splits parameters, starts processes in another way, or would not look for parameters
            without a gradient.
    """
    if isinstance(strategy, str):
        return _named(strategy, devices, num_nodes)
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"strategy must be a name or a strategy of Lightning Fabric, got {describe(strategy)}"
        )
    name = type(strategy).__name__
    _refuse(name, type(strategy))
    if isinstance(strategy, DDPStrategy):
        if strategy._start_method != "popen":
            raise ValueError(
                f"strategy must not be {name}(start_method={strategy._start_method!r}), which "
                f"{_FROM_FUNCTION}: {_INSTEAD}"
            )
        options = strategy._ddp_kwargs
        for option, wrong in (("find_unused_parameters", False), ("static_graph", True)):
            if option in options and bool(options[option]) is wrong:
                raise ValueError(
                    f"strategy must not be {name}({option}={wrong}), as a method's step may leave parts of "
                    "the learner out, other ones each time"
                )
        options["find_unused_parameters"] = True
    elif isinstance(strategy, SingleDeviceStrategy) and ((number_of(devices) or 1) > 1 or num_nodes > 1):
        raise ValueError(
            f"strategy must be 'ddp' for several processes, got {name}, devices = {devices} and "
            f"num_nodes = {num_nodes}"
        )
    return strategy


def _named(strategy: str, devices: int | str | list[int], num_nodes: int) -> Any:
    name = strategy.lower()
    if name == "auto" and devices in (1, "1") and num_nodes == 1:
        return strategy
    if name in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        return DDPStrategy(find_unused_parameters=True)
    if name not in STRATEGY_REGISTRY:
        raise ValueError(f"strategy must be 'auto', 'ddp' or a DDPStrategy, got {strategy!r}")
    entry = STRATEGY_REGISTRY[name]
    _refuse(repr(strategy), entry["strategy"])
    if entry["init_params"].get("start_method", "popen") != "popen":
        raise ValueError(f"strategy must not be {strategy!r}, which {_FROM_FUNCTION}: {_INSTEAD}")
    return strategy


def _refuse(name: str, kind: type[Strategy]) -> None:
    for refused, reason in _REFUSED.items():
        if issubclass(kind, refused):
            raise ValueError(f"strategy must not be {name}, which {reason}: {_INSTEAD}")
