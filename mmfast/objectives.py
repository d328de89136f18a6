"""What a model is trained to predict, and what it loses where it does not: task, loss, targets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.distributed import sum_over_processes
from mmfast.errors import check_one_of, describe

# By task, the targets it takes.
TARGETS = {
    "multiclass": "classes [N] in [0, C), or probabilities of them [N, C]",
    "multilabel": "0 and 1 for each of C labels, [N, C]",
    "regression": "numbers [N], or [N, K]",
}
TASKS = tuple(TARGETS)
# The label of a sample that counts in no loss and no figure, as in torch's cross-entropy.
IGNORED = -100
# By how much probabilities may miss a sum of 1, as those of float16 do.
_SLACK = 1e-2
_EXPECTED = {
    "multiclass": "an integer, or probabilities [C] = [{}]",
    "multilabel": "0 and 1 for each of C labels, [C] = [{}]",
    "regression": "a number, or numbers [K] = [{}]",
}

Loss = Callable[[Tensor, Tensor], Tensor]  # [N, C] in float32 and targets -> [N]


class Objective:
    """A task with its loss; every method takes it wherever its paper writes a cross-entropy.

    Args:
        task: "multiclass": one of C classes, cross-entropy; targets [N] integers, or [N, C] probabilities.
            "multilabel": any of C labels, binary cross-entropy, mean over labels; targets [N, C] of 0 and 1.
            "regression": K numbers, squared error, mean over them; targets [N] where K = 1, or [N, K].
        loss: in place of that loss: a callable of outputs [N, C] in float32 and targets that gives [N]. For
            targets [N] of regression the outputs are [N], too.
        class_weights: [C] positive numbers by which the cross-entropy counts the samples of a class, its mean
            being weighted, as torch's `weight`; or "balanced": N / (C n_c) for a class of n_c training
            samples, which `Trainer.fit` finds.
        label_smoothing: of the cross-entropy, as torch defines it.

    A class of -100 leaves its sample out of the loss, whichever it is, and out of all figures.

    Raises:
        TypeError, ValueError: an unknown task, a loss that cannot be called, weights or smoothing beside a
            loss of one's own or another task than "multiclass", or out of range.
    """

    def __init__(
        self,
        task: str = "multiclass",
        *,
        loss: Loss | None = None,
        class_weights: Sequence[float] | Tensor | str | None = None,  # [C]
        label_smoothing: float = 0.0,
    ) -> None:
        check_one_of("task", task, TASKS, suggest=True)
        if isinstance(loss, type) or not (loss is None or callable(loss)):
            hint = f": give an instance, {loss.__name__}(...)" if isinstance(loss, type) else ""
            raise TypeError(f"loss must be a callable of outputs and targets, got {describe(loss)}{hint}")
        for name, value in (("class_weights", class_weights), ("label_smoothing", label_smoothing or None)):
            if value is not None and (loss is not None or task != "multiclass"):
                other = "with a loss of your own" if loss is not None else f"with task={task!r}"
                raise ValueError(
                    f"{name} must not be given {other}, as it is that of the cross-entropy, "
                    f"got {describe(value)}"
                )
        if not (isinstance(label_smoothing, int | float) and 0 <= label_smoothing < 1):
            raise ValueError(f"label_smoothing must lie in [0, 1), got {describe(label_smoothing)}")
        self.task = task
        self.loss = loss
        self.class_weights = _checked_weights(class_weights)  # [C], or "balanced"
        self.label_smoothing = label_smoothing
        # Whether a label may be IGNORED; a trainer that has seen all of them knows better.
        self.may_ignore = True
        self._on_device: dict[torch.device, Tensor] = {}

    @property
    def is_plain(self) -> bool:
        """Whether this is the cross-entropy of classes and nothing else."""
        plain = self.loss is None and self.class_weights is None and not self.label_smoothing
        return plain and self.task == "multiclass"

    def config(self) -> dict[str, Any]:
        """Return what checkpoints and results say of it, as plain values."""
        weights = self.class_weights
        name = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        return {
            "task": self.task,
            "loss": None if self.loss is None else name,
            "class_weights": weights.tolist() if isinstance(weights, Tensor) else weights,
            "label_smoothing": self.label_smoothing,
        }

    def for_data(self, labels: Tensor | None, num_classes: int) -> Objective:
        """Return the objective of a training set, its balanced weights and left-out labels known.

        Args:
            labels: of all samples; None where the data set does not tell.
            num_classes: C.

        Raises:
            ValueError: balanced weights without labels; weights of another number of classes.
        """
        weights = self.class_weights
        if isinstance(weights, str):
            if labels is None:
                raise ValueError(
                    'class_weights="balanced" needs the labels of all training samples: give the data set an '
                    "attribute labels, or give the weights"
                )
            counts = torch.bincount(self.classes(labels[self.counted(labels)]), minlength=num_classes)
            weights = counts.sum() / (num_classes * counts.float())
        elif weights is not None and len(weights) != num_classes:
            raise ValueError(f"class_weights must have shape [C] = [{num_classes}], got [{len(weights)}]")
        found = Objective(
            self.task, loss=self.loss, class_weights=weights, label_smoothing=self.label_smoothing
        )
        found.may_ignore = labels is None or not bool(self.counted(labels).all())
        return found

    @contextlib.contextmanager
    def for_any_labels(self) -> Iterator[None]:
        """Take labels of other data than those of training within this context: any may be IGNORED."""
        before, self.may_ignore = self.may_ignore, True
        try:
            yield
        finally:
            self.may_ignore = before

    def to(self, device: torch.device) -> None:
        """Move what a loss that is a module holds to a device."""
        if isinstance(self.loss, nn.Module):
            self.loss.to(device)

    # Losses

    def losses(
        self,
        outputs: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N]
        """Return the loss of each sample, 0 where its label is IGNORED; class weights are in it.

        Raises:
            TypeError, ValueError: a loss of one's own does not give one number a sample.
        """
        outputs = outputs.float()
        if self.loss is not None:
            return self._own_losses(outputs, target)
        if self.task == "multiclass":
            weight = self._weights_on(outputs.device)
            smoothing = self.label_smoothing
            return F.cross_entropy(outputs, target, weight, reduction="none", label_smoothing=smoothing)
        target = target.float()
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(outputs, target, reduction="none").mean(1)
        return F.mse_loss(outputs, target.view_as(outputs), reduction="none").mean(1)

    def stacked_losses(
        self,
        outputs: Tensor,  # [M, N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [M, N]
        """Return `losses` of the outputs of each of M predictors of the same samples."""
        if self.loss is not None:
            # Which may be of a batch as it is read, and no larger.
            return torch.stack([self.losses(own, target) for own in outputs])
        repeated = target.repeat(len(outputs), *[1] * (target.ndim - 1))
        return self.losses(outputs.flatten(0, 1), repeated).view(outputs.shape[:2])

    def _own_losses(
        self,
        outputs: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N]
        assert self.loss is not None
        outputs = self.like_target(outputs, target)
        counted = self.counted(target)
        found = self.loss(outputs, self.for_functions(target))
        if not isinstance(found, Tensor):
            raise TypeError(f"loss must return a tensor [N] = [{len(outputs)}], got {describe(found)}")
        if found.shape != counted.shape:
            got = "a scalar" if found.ndim == 0 else str(list(found.shape))
            hint = ": reduction='none' gives one number a sample" if found.ndim == 0 else ""
            raise ValueError(f"loss must return one number a sample, [N] = [{len(outputs)}], got {got}{hint}")
        return found.float().masked_fill(~counted, 0.0) if self.may_ignore else found.float()

    def for_functions(
        self,
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # same shape
        """Return the targets as functions of one's own get them: float32 where they are no classes.

        A class is 0 where it is IGNORED, and what the function gives for it counts nowhere.
        """
        if not self._are_classes(target):
            return target.float()
        # What looks up a class would look up that of -100.
        return target.masked_fill(~self.counted(target), 0) if self.may_ignore else target

    def like_target(
        self,
        outputs: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N] or [N, C]
        """Return the outputs in the form of the targets: of one number [N], where targets are [N]."""
        return outputs.flatten() if self.task == "regression" and target.ndim == 1 else outputs

    def mean_loss(
        self,
        outputs: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # scalar
        """Return the weighted mean of the losses, as `mean` does."""
        if not (self.is_plain and self._are_classes(target)):
            return self.mean(self.losses(outputs, target), target)
        # Torch adds up its own mean in another order than that of a tensor, with other last digits.
        mean = F.cross_entropy(outputs.float(), target, reduction="sum") / len(target)
        return mean if self._counts_all(target) else mean / self._share(self.weights(target))

    def sums(
        self,
        outputs: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
        counted: Tensor,  # bool [N]
    ) -> Tensor:  # [2]
        """Return the sums of losses and of weights over the samples that count."""
        if self.is_plain and self._are_classes(target):
            shown = target.masked_fill(~counted, IGNORED)
            loss = F.cross_entropy(outputs.float(), shown, reduction="sum")
            return torch.stack([loss, counted.sum().to(loss)])
        pair = torch.stack([self.losses(outputs, target), self.weights(target)])
        # Not 0 times what it is where a sample does not count: that may be NaN.
        return pair.masked_fill(~counted, 0.0).sum(1)

    def weights(
        self,
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N] float32
        """Return by how much each sample counts in a mean loss."""
        counted = self.counted(target)
        weight = self._weights_on(target.device)
        if weight is None or not self._are_classes(target):
            return counted.float()
        return weight[target.masked_fill(~counted, 0)] * counted

    def mean(
        self,
        losses: Tensor,  # [..., N]
        target: Tensor,  # [N] or [N, C]
        present: Tensor | None = None,  # bool [..., N]
    ) -> Tensor:  # [...]
        """Return the weighted mean of losses over the samples present, 0 where there is none.

        Of several processes, each returns what makes their mean that of the whole batch.
        """
        if present is not None:
            losses = losses * present
        if self._counts_all(target):
            if present is None:
                return losses.mean(-1)
            weights = present.float()
        else:
            weights = self.weights(target)
            weights = weights.expand_as(losses) if present is None else weights * present
        return losses.mean(-1) / self._share(weights)

    def _share(
        self,
        weights: Tensor,  # [..., N]
    ) -> Tensor:  # [...]
        """Return the mean weight over all processes' samples; where that is 0, something to divide 0 by."""
        samples = torch.full_like(weights[..., 0], weights.shape[-1])
        total, all_samples = sum_over_processes(torch.stack([weights.sum(-1), samples]))
        return total.masked_fill(total == 0, 1.0) / all_samples

    def _counts_all(self, target: Tensor) -> bool:
        """Whether every sample of a target counts, and as much as any other."""
        return not self._are_classes(target) or not (self.may_ignore or self.class_weights is not None)

    def _are_classes(self, target: Tensor) -> bool:
        # A utility may be of numbers where the model is of classes.
        return self.task == "multiclass" and target.ndim == 1 and not target.is_floating_point()

    # Targets

    def counted(
        self,
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # bool [N]
        """Return which samples have a label."""
        if self._are_classes(target):
            return target != IGNORED
        return torch.ones(len(target), dtype=torch.bool, device=target.device)

    def classes(
        self,
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N]
        """Return the class of each sample, of probabilities the likeliest one; IGNORED stays."""
        return target if self._are_classes(target) else target.argmax(1)

    def _weights_on(self, device: torch.device) -> Tensor | None:  # [C]
        if self.class_weights is None:
            return None
        if not isinstance(self.class_weights, Tensor):
            raise ValueError('class_weights="balanced" must be found from data first: Trainer.fit does it')
        if device not in self._on_device:
            self._on_device[device] = self.class_weights.to(device)
        return self._on_device[device]


def _checked_weights(
    weights: Sequence[float] | Tensor | str | None,  # [C]
) -> Tensor | str | None:  # float32 [C] on the CPU
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f'class_weights must be "balanced" or C numbers, got {weights!r}')
        return weights
    try:
        found = torch.as_tensor(weights, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f'class_weights must be "balanced" or C numbers, got {describe(weights)}') from None
    if found.ndim != 1:
        raise ValueError(f"class_weights must have shape [C], got {list(found.shape)}")
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError(f"class_weights must be finite and not negative, got {describe(weights)}")
    if not bool(found.any()):
        raise ValueError(f"class_weights must not all be 0, got {describe(weights)}")
    return found


def expected(task: str, num_classes: int) -> str:
    """Return what a label of a task is, as errors say it."""
    return _EXPECTED[task].format(num_classes)


def check_targets(
    task: str,
    num_classes: int,
    where: str,
    labels: Tensor,  # [N] or [N, C]
    of_row: Callable[[int], str],
) -> None:
    """Raise ValueError unless labels that are no class numbers have the shape and the values of their task.

    Args:
        task: one of TASKS.
        num_classes: C, or K numbers.
        where: what errors call the labels.
        labels: of the samples.
        of_row: what errors call the label of a sample.
    """
    is_one_number = task == "regression" and num_classes == 1
    if not (labels.shape[1:] == (num_classes,) or (is_one_number and labels.ndim == 1)):
        raise ValueError(
            f"{where} must be {expected(task, num_classes)} each, got shape {list(labels.shape[1:])}"
        )
    if task == "regression":
        bad, wanted = ~labels.isfinite(), "finite"
    elif task == "multilabel":
        bad, wanted = ~((labels == 0) | (labels == 1)), "0 or 1 for each label"
    else:
        sums_up = (labels.double().sum(1) - 1).abs() <= _SLACK
        bad = ~(labels.isfinite() & (labels >= 0) & sums_up[:, None])
        wanted = "probabilities that add up to 1"
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
        shown = labels[row].tolist() if labels[row].numel() <= 8 else describe(labels[row])
        raise ValueError(f"{of_row(row)} must be {wanted}, got {shown}")
