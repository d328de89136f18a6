"""What of a learner survives a restart: its state dict, whole, also of an epoch that is stopped within."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

# What torch calls the entry of a state dict that is no parameter or buffer.
EXTRA = "_extra_state"


@dataclass(frozen=True)
class Stage:
    """A part of training with its own trainable parameters and optimizer."""

    name: str
    epochs: int
    first_selectable: int = 0  # model selection looks at epochs from this one on


class ResumableModule(nn.Module):
    """A module whose state dict is all that its training goes on from.

    Besides parameters and buffers that is an entry `_extra_state`: what `extra_state` gives, and the stage
    where there are several. A module that has neither has no such entry. Predictions need none of it, so a
    state dict without it is loaded as one that is whole.
    """

    stage: Stage
    start_stage: Callable[[Stage], None]
    start_epoch: Callable[[int, Any], Any]

    def _has_stages(self) -> bool:
        """Whether there may be more stages than one."""
        return False

    def extra_state(self) -> dict[str, Any]:
        """Return state of training that is no parameter or buffer, as tensors and plain values."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave; the module's own parameters and buffers are back by then."""

    def resume_epoch(self, epoch: int, train: Any) -> Any:
        """Return the data set of an epoch that goes on from where it was stopped within.

        Called in place of `start_epoch`, once the state dict of that moment is loaded. The base calls
        `start_epoch` and puts the state dict back, for what an epoch begins with would be found anew with
        the weights of its middle, or be reset. Override it where that takes long, or where the data set
        depends on more than the state dict.
        """
        kept = copy.deepcopy(self.state_dict())
        entries = self.start_epoch(epoch, train)
        self.load_state_dict(kept)
        return entries

    # What torch calls for a state dict

    def get_extra_state(self) -> dict[str, Any]:
        """Return the entry `_extra_state`; methods override `extra_state`."""
        state: dict[str, Any] = {}
        if extra := self.extra_state():
            state["method"] = extra
        if self._has_stages():
            state["stage"] = list(astuple(self.stage))
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_extra_state` gave; one that is in another stage enters that of then."""
        if "stage" in state:
            stage, mode = Stage(*state["stage"]), self.training
            if stage.name != self.stage.name or self.stage.epochs == 0:
                self.start_stage(stage)
                self.train(mode)
        if "method" in state:
            self.load_extra_state(state["method"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not destination[prefix + EXTRA]:
            del destination[prefix + EXTRA]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.setdefault(prefix + EXTRA, {})
        super()._load_from_state_dict(state_dict, prefix, *others)
