"""The moving average of what trains, which is what is validated, selected and kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmfast.distributed import share_buffers
from mmfast.methods.base import Learner

# Names of the buffers that torch's norm layers keep, and those of libraries after them.
_STATISTICS = ("running_mean", "running_var")


class Average:
    """The exponential moving average of a stage: of parameters that train, and statistics of the model.

    Statistics are the running means and variances of norm layers, as those of the weights that train would
    not be those of the average. All other buffers are left alone: a model's may be constants, such as masks
    of minus infinity, and a method's are part of its training. Numbers of half precision are averaged in
    float32, in which small changes are not lost.

    Args:
        learner: in its stage.
        decay: d of average <- d average + (1 - d) weights.
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        self._learner = learner
        copies = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in self.parameters())
        self._model = AveragedModel(copies, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def _values(self) -> list[Tensor]:
        """Return the tensors of the learner that are averaged."""
        buffers = self._learner.model.named_buffers()
        statistics = [buffer for name, buffer in buffers if name.rpartition(".")[2] in _STATISTICS]
        return [*self._learner.trainable_parameters(), *statistics]

    # What AveragedModel asks of the module whose average it is

    def parameters(self) -> Iterator[Tensor]:
        """Yield what is averaged, in float32 at least."""
        for value in self._values():
            yield value.detach().to(torch.promote_types(value.dtype, torch.float32))

    def buffers(self) -> Iterator[Tensor]:
        """Yield nothing: what else there is stays the learner's alone."""
        yield from ()

    # What training calls

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self._model.update_parameters(self)  # type: ignore[arg-type]

    @torch.no_grad()
    def put(self) -> None:
        """Let the learner have the average; of several processes all get the first one's statistics."""
        for value, average in zip(self._values(), self._model.module.parameters(), strict=True):
            value.copy_(average)
        share_buffers(self._learner)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the learner have the average for a while; features that it keeps meanwhile are dropped."""
        training = [value.detach().clone() for value in self._values()]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(self._values(), training, strict=True):
                    value.copy_(before)
            if not self._learner.encodes_once:
                self._learner.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on."""
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._model.load_state_dict(state)
