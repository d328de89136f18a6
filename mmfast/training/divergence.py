"""The end of a run whose loss is NaN or infinite: noticed without waiting for a GPU, and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.coalitions import present_key
from mmfast.data.batches import iterate
from mmfast.training.optimization import Optimization

# Steps between looks at losses that lie on a GPU, each taken while the device works on.
_EVERY = 64
_SHOWN = 5


# How the error's text begins.
LOSS, PREDICTIONS = "the loss is NaN or infinite", "predictions are NaN"


class DivergedError(RuntimeError):
    """A loss is NaN or infinite, so the run has no result.

    Attributes:
        epoch: of the run's stage, from 0.
        batch: in the epoch, from 0; None where validation found it.
        samples: indices in the data set of the samples whose input is to blame, if one is.
    """

    def __init__(self, text: str, *, epoch: int, batch: int | None = None, samples: Sequence[int] = ()):
        super().__init__(text)
        self.epoch = epoch
        self.batch = batch
        self.samples = list(samples)


class Losses:
    """The losses of an epoch's steps, kept where they are computed.

    Args:
        num_steps: of the epoch.
        device: of the losses.
        is_alone: whether this process may stop by itself; several stop together, at the epoch's end.
        first: step to begin with, of an epoch that was stopped within.
    """

    def __init__(self, num_steps: int, device: torch.device, is_alone: bool, first: int = 0) -> None:
        # Whatever the default dtype is: in float16 a loss of 70,000 would be infinite.
        self.values = torch.zeros(num_steps, device=device, dtype=torch.float32)
        self.is_alone = is_alone
        self._on_its_way: tuple[Tensor, Any] | None = None
        self._count = first

    def add(self, loss: Tensor) -> int | None:
        """Keep a loss, a scalar; return the first step known to have one that is not finite."""
        self.values[self._count] = loss.detach()
        self._count += 1
        if not self.is_alone:
            return None
        if self.values.device.type == "cpu":
            return None if bool(self.values[self._count - 1].isfinite()) else self._count - 1
        return self._look() if self._count % _EVERY == 0 else None

    def first_bad(self) -> int | None:
        """Return the first step whose loss is not finite; this waits for the device."""
        bad = (~self.values[: self._count].isfinite()).nonzero()
        return int(bad[0]) if len(bad) else None

    def _look(self) -> int | None:
        """Look at what was sent to the host at the look before, and send anew; this waits for nothing."""
        if self._on_its_way is not None:
            flag, sent = self._on_its_way
            if not sent.query():
                return None
            if bool(flag):
                return self.first_bad()
        if self.values.device.type != "cuda":
            # Of other devices no event tells; the epoch's end does.
            return None
        flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        flag.copy_((~self.values[: self._count].isfinite()).any(), non_blocking=True)
        sent = torch.cuda.Event()
        sent.record()
        self._on_its_way = flag, sent
        return None


def bad_inputs(
    batch: Mapping[str, Any],  # <name>: [N, ...]
    samples: Sequence[int],  # the N indices in the data set
    names: Sequence[str],
) -> dict[str, list[int]]:
    """Return, by modality, the samples of a batch that hold NaN or infinite elements."""
    found = {}
    for name in names:
        values = torch.as_tensor(batch[name])
        if values.is_floating_point():
            rows = ~values.flatten(1).isfinite().all(1) if values.ndim > 1 else ~values.isfinite()
            # Of a sample that lacks the modality nothing is read.
            rows = rows & batch.get(present_key(name), torch.ones_like(rows))
            if bool(rows.any()):
                found[name] = [samples[row] for row in rows.nonzero().flatten().tolist()]
    return found


def bad_inputs_of(dataset: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Return, by modality, the samples of a data set that hold NaN or infinite elements."""
    found: dict[str, list[int]] = {}
    plain, size = getattr(dataset, "evaluation", dataset), 256
    for number, batch in enumerate(iterate(plain, size, torch.device("cpu"))):
        samples = range(number * size, number * size + len(batch["label"]))
        for name, bad in bad_inputs(batch, samples, names).items():
            found.setdefault(name, []).extend(bad)
    return found


def input_text(part: str, bad: Mapping[str, Sequence[int]]) -> str:
    """Return the sentence about samples that hold NaN or infinite elements."""
    each = []
    for name, samples in bad.items():
        shown = ", ".join(map(str, samples[:_SHOWN]))
        more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
        each.append(f"{name} of sample{'s' * (len(samples) > 1)} {shown}{more}")
    return f"NaN or infinite numbers in {part}: {'; '.join(each)}"


def check_weights(module: nn.Module) -> None:
    """Raise ValueError if a model's weights are NaN or infinite before it is trained."""
    bad = [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]
    if bad:
        raise ValueError(
            f"model must have finite weights, got NaN or infinite numbers in {bad[0]}"
            + (f" and {len(bad) - 1} more parameters" if len(bad) > 1 else "")
            + ": build it anew, as after a run that has diverged"
        )


def cause_text(*, lr: float, precision: str, has_stepped: bool) -> str:
    """Return the likely causes where the inputs are finite."""
    if not has_stepped:
        return (
            "the inputs are finite and no step has been taken, so the weights, the inputs or an option of "
            "the method are too large: build the model anew, standardise the data, or lower the option"
        )
    also = f" (the default is {Optimization().lr:g})" if lr > Optimization().lr else ""
    if "16" in precision and "bf16" not in precision:
        also += f", or float16 has overflowed: try bf16-mixed or 32-true instead of {precision}"
    return f"the inputs are finite, so training has diverged: try a lower learning rate than {lr:g}{also}"
