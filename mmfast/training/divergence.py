"""The end of a run whose loss is NaN or infinite: noticed without waiting for a GPU, and explained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.coalitions import present_key, rows_key
from mmfast.data.reader import Reader, model_place
from mmfast.models import MultimodalModel
from mmfast.nests import mapped, tensors
from mmfast.training.optimization import Optimization

# Steps between looks at losses that lie on a GPU, each taken while the device works on.
_EVERY = 64
_SHOWN = 5
# In place of a weight that is no longer finite.
_SOME_WEIGHT = 0.02


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
    batch: Mapping[str, Any],  # <name>: [N, ...], or a nest of such; of its rows alone, where it has them
    samples: Sequence[int],  # the N indices in the data set
    names: Sequence[str],
) -> dict[str, list[int]]:
    """Return, by modality, the samples of a batch that hold NaN or infinite elements."""
    found = {}
    for name in names:
        # Of a sample that lacks the modality nothing is read.
        present, rows = batch.get(present_key(name)), batch.get(rows_key(name))
        bad = [_not_finite(value) for value in tensors(batch.get(name)) if value.is_floating_point()]
        if not bad:
            continue
        held = torch.arange(len(samples), device=bad[0].device) if rows is None else rows
        blamed = held[torch.stack(bad).any(0) & (present is None or present[held])]
        if len(blamed):
            found[name] = [samples[row] for row in blamed.tolist()]
    return found


def _not_finite(
    value: Tensor,  # [n, ...]
) -> Tensor:  # bool [n]
    finite = value.isfinite()
    return ~(finite.flatten(1).all(1) if value.ndim > 1 else finite)


def bad_inputs_of(dataset: Any, names: Sequence[str], reader: Reader | None = None) -> dict[str, list[int]]:
    """Return, by modality, the samples of a data set that hold NaN or infinite elements."""
    found: dict[str, list[int]] = {}
    reader = reader or Reader()
    batches = torch.arange(len(dataset), device="cpu").split(reader.batch_size)
    read = reader.read(dataset, batches, names, torch.device("cpu"), plain=True)
    for samples, batch in zip(batches, read, strict=True):
        for name, bad in bad_inputs(batch, samples.tolist(), names).items():
            found.setdefault(name, []).extend(bad)
    return found


def spoilt_by_absence(model: MultimodalModel, dataset: Any, reader: Reader) -> list[str]:
    """Return the modalities of whose absence an encoder makes NaN, which its gradient brings to the weights.

    An encoder sees zeros in place of a modality that a sample lacks, unless rows leave the sample out.
    """
    asked, found = {name for name in model.modalities if _is_trained(model.encoders[name])}, []
    batches = torch.arange(len(dataset), device="cpu").split(reader.batch_size)
    device, dtype = model_place(model)
    for batch in reader.read(dataset, batches, model.modalities, device, dtype=dtype, plain=True):
        asked &= {name for name in asked if present_key(name) in batch}
        if not asked:
            break
        for name in sorted(asked):
            present, rows = batch[present_key(name)], batch.get(rows_key(name))
            if name in batch and not bool((present if rows is None else present[rows]).all()):
                asked.remove(name)
                found += [name] * _makes_nan(model.encoders[name], batch[name])
    return found


def _is_trained(encoder: nn.Module) -> bool:
    return any(p.requires_grad for p in encoder.parameters())


@torch.no_grad()
def _makes_nan(
    encoder: nn.Module,
    nest: Any,  # tensors [N, ...]
) -> bool:
    """Whether an encoder with finite weights makes NaN or infinite features of zeros."""
    encoder = copy.deepcopy(encoder).eval()
    for value in itertools.chain(encoder.parameters(), encoder.buffers()):
        # It may have its NaN by now.
        value.copy_(value.nan_to_num(_SOME_WEIGHT, _SOME_WEIGHT, _SOME_WEIGHT))
    return not bool(encoder(mapped(torch.zeros_like, nest)).isfinite().all())


def absence_text(names: Sequence[str]) -> str:
    """Return the sentence about encoders that make NaN of what stands for absence."""
    text = " and ".join(names)
    return (
        f"the encoder of {text} makes NaN of the zeros that it sees in place of samples without {text}: let "
        "it divide by mask.sum(1).clamp(min=1), or let collate_fn=mmfast.data.pad leave these samples out"
    )


def input_text(part: str, bad: Mapping[str, Sequence[int]]) -> str:
    """Return the sentence about samples that hold NaN or infinite elements."""
    each = []
    for name, samples in bad.items():
        shown = ", ".join(map(str, samples[:_SHOWN]))
        more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
        each.append(f"{name} of sample{'s' * (len(samples) > 1)} {shown}{more}")
    return f"NaN or infinite numbers in {part}: {'; '.join(each)}"


def has_finite_weights(module: nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(p.isfinite().all()) for p in module.parameters())


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
