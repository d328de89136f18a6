"""Per-sample contribution of each modality: exact Shapley values over all coalitions of modalities."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mmfast import coalitions, ops, utilities
from mmfast.contributions import Valuation as Valuation
from mmfast.contributions import mean_contributions as mean_contributions
from mmfast.data.batches import evaluating, marks_of, presence
from mmfast.data.devices import model_place
from mmfast.data.origins import check_standardized, keys_of_samples, names_of_classes
from mmfast.data.reader import Reader, evaluation_batches, no_labels, reader_of
from mmfast.data.samples import check_samples
from mmfast.data.threads import fitting_threads
from mmfast.distributed import gather_objects, gather_rows, rank_and_size, sum_over_processes
from mmfast.errors import describe
from mmfast.models._checks import nobody_waits_for
from mmfast.models.predictor import Predictor
from mmfast.objectives import Objective
from mmfast.utilities import UTILITIES as UTILITIES
from mmfast.utilities import Utility

# Of these, those that ask which class has the largest logit.
_COUNTING = ("cardinality", "correct")
# Logits of all coalitions are held for as many samples at a time as fit in this many elements (64 MB in
# float32).
_MAX_ELEMENTS = 2**24


def valuate(
    model: Predictor,
    dataset: Any,
    *,
    utility: str | Utility | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    num_workers: int | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    pin_memory: bool | str | None = None,
    prefetch: int | None = None,
    fabric: Any | None = None,
) -> Valuation:
    """Return each modality's contribution to each sample of a data set, exact over all 2^M coalitions.

    A modality outside a coalition has its features set to zero after the encoder. Where a sample lacks a
    modality, the others play without it and it gets 0. Logits are held for a bounded number of samples at a
    time.

    Args:
        model: a MultimodalModel, or a learner as `Trainer.learner`, whose prediction rule is then used.
        dataset: data set of {<modality>: [...], "label": int} samples, such as ArrayDataset; labels are what
            the learner's task takes.
        utility: what a coalition is worth to a sample: "cardinality", "correct", "probability",
            "log_probability" or "margin" of classes; "negative_loss", minus the learner's loss;
            "negative_squared_error" of numbers; "multilabel_f1"; or a function of the outputs of all
            coalitions [N, S, K], in the dtype of the model, and targets, which returns values [N, S]. None:
            "cardinality", in regression "negative_squared_error", of several labels "multilabel_f1".
        batch_size: samples encoded at a time; None: 256, or what the learner's trainer has.
        backend: of the ops underneath.
        num_workers, collate_fn, pin_memory, prefetch: how samples are read, as `mmfast.Trainer` takes them;
            None: as the learner's trainer reads them, for a model in this process.
        fabric: a launched Lightning Fabric whose processes share the work; each gets the whole result. None:
            this process does it alone, whether there are others or not.

    Raises:
        TypeError, ValueError: unknown utility, a data set that does not fit the model, or a model trained by
            a method that leaves its fusion head untrained: then give the learner.

    Source: Wei et al., "Enhancing multimodal cooperation via sample-level modality valuation", CVPR 2024.
    """
    module, objective = _checked(model, dataset), objective_of(model)
    worth = utilities.chosen(utility, objective)
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "collate_fn": collate_fn,
        "pin_memory": pin_memory,
        "prefetch": prefetch,
    }
    reader = replace(reader_of(module), **{key: value for key, value in given.items() if value is not None})
    task = utilities.task_of(utility, objective)
    # Of the labels, which a plain model may have for a utility of another task.
    told = objective if task in (None, objective.task) else Objective(task)
    check_samples(
        model.modalities, model.num_classes, "dataset", dataset, collate_fn=reader.collate_fn, task=task
    )
    check_standardized(model, dataset)
    autocast = contextlib.nullcontext if fabric is None else fabric.autocast
    # A callback may ask while the learner trains.
    with _evaluating(module, dataset, reader), autocast(), objective.for_any_labels():
        found = _valuated(module, dataset, worth, told, task, backend, reader, share=fabric is not None)
    return replace(found, utility=utilities.name_of(utility, objective))


def _valuated(
    module: Any,
    dataset: Any,
    utility: str | Utility,
    objective: Objective,
    task: str | None,  # of the labels
    backend: str,
    reader: Reader,
    *,
    share: bool,
) -> Valuation:
    every = coalitions.all_of(len(module.modalities))  # [S]
    sizes = coalitions.sizes(len(module.modalities))  # |s|, [S]
    rows = _Rows(module, dataset, share)
    answers = [torch.zeros(0, dtype=torch.int64, device=model_place(module)[0])]
    # Of each coalition what is right and what it is worth, and how many samples have a label.
    sums = torch.zeros(3, len(every), dtype=torch.float64, device=model_place(module)[0])
    for features, target, present in _encoded(module, dataset, reader, share):
        found, counted = [], objective.counted(target)
        for part in _parts(len(target), len(every) * module.num_classes):
            logits = module.coalition_logits([h[part] for h in features], every)  # [n, S, C]
            right = torch.zeros_like(logits[..., 0])
            if task == "multiclass":
                answers.append(_answers(logits, None if present is None else present[:, part]))
                right = _utilities(logits, target[part], "correct", objective, backend)  # [n, S]
            if utility == "correct":
                values = right
            elif utility == "cardinality":
                values = right * sizes.to(right)
            else:
                values = _utilities(logits, target[part], utility, objective, backend)
            if present is not None:
                rest = coalitions.among_present(present[:, part])  # v(S) becomes v(S and present)
                values, right = values.gather(1, rest), right.gather(1, rest)
            phi = ops.shapley_values(values, backend=backend).float()
            unknown = ~counted[part, None]
            found.append(phi.masked_fill(unknown, torch.nan))
            both = torch.stack([right, values]).double().masked_fill(unknown, 0.0)
            sums[:2] += both.sum(1)
        sums[2] += counted.sum()
        rows.add(found, target, present)
    if share:
        sums = sum_over_processes(sums)
    accuracy, value = (sums[:2] / sums[2]).cpu()
    phi, labels, present = rows.joined()
    labelled = objective.counted(labels)
    return Valuation(
        phi,
        labels,
        tuple(module.modalities),
        "",
        accuracy.float() if task == "multiclass" else None,
        present,
        value,
        None if bool(labelled.all()) else labelled,
        predicted=_joined(answers, share) if task == "multiclass" else None,
        class_names=getattr(module, "class_names", None) or names_of_classes(dataset, module.num_classes),
        sample_keys=keys_of_samples(dataset),
    )


def _answers(
    logits: Tensor,  # [n, S, C]
    present: Tensor | None,  # bool [M, n]
) -> Tensor:  # [n]
    """Return the class that all modalities of each sample together predict, -1 where logits hold NaN."""
    if present is None:
        whole = logits[:, -1]
    else:
        rows = torch.arange(len(logits), device=logits.device)
        whole = logits[rows, coalitions.of_present(present)]
    return whole.argmax(1).masked_fill(whole.isnan().any(1), -1)


def _joined(answers: Sequence[Tensor], share: bool) -> Tensor:  # [n] each -> [N]
    """Return the rows of all batches on the CPU, of all processes where each had its share."""
    found = torch.cat(list(answers))
    return (gather_rows(found) if share else found).cpu()


class _Rows:
    """What a pass gives sample by sample: contributions, labels, presence; a process may have no sample.

    Args:
        module: of M modalities.
        dataset: whose samples they are.
        share: several processes have each its share.
    """

    def __init__(self, module: Any, dataset: Any, share: bool) -> None:
        self.share = share
        self.num_modalities, device = len(module.modalities), model_place(module)[0]
        self.phi = [torch.zeros(0, self.num_modalities, dtype=torch.float32, device=device)]
        self.labels: list[Tensor] = []
        self.no_labels = functools.partial(no_labels, module, dataset)
        self.marks = [torch.ones(0, self.num_modalities, dtype=torch.bool, device=device)]
        self.is_told = False

    def add(
        self,
        phi: Sequence[Tensor],  # [n, M] each, of the batch's parts
        labels: Tensor,  # [N] or [N, C]
        present: Tensor | None,  # bool [M, N]
    ) -> None:
        """Take in a batch."""
        self.phi += phi
        self.labels.append(labels)
        self.marks.append(marks_of(present, labels, self.num_modalities))
        self.is_told |= present is not None

    def joined(self) -> tuple[Tensor, Tensor, Tensor | None]:  # [N, M], [N, ...], bool [N, M]
        """Return the rows of all' batches, on the CPU; presence is None where nobody tells of it."""
        found = [torch.cat(parts) for parts in (self.phi, self.labels or [self.no_labels()], self.marks)]
        is_told = self.is_told
        if self.share:
            found, is_told = [gather_rows(rows) for rows in found], any(gather_objects(is_told))
        phi, labels, marks = (rows.cpu() for rows in found)
        return phi, labels, marks if is_told else None


def _encoded(
    module: Any, dataset: Any, reader: Reader, share: bool
) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:  # M x [n, D], [n, ...], bool [M, n]
    """Yield features, labels and presence batch by batch; of several processes, each its share."""
    rank, world_size = rank_and_size() if share else (0, 1)
    for batch in evaluation_batches(module, dataset, reader=reader, rank=rank, world_size=world_size):
        yield module.encode(batch), batch["label"], presence(batch, module.modalities)


@contextlib.contextmanager
def _evaluating(module: nn.Module, dataset: Any, reader: Reader) -> Iterator[None]:
    with fitting_threads(module, dataset, reader.batch_size, reader), evaluating(module):
        yield


def contributions(
    model: Predictor,
    dataset: Any,
    *,
    utility: str | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    none_is_worthless: bool = False,
    share: bool = False,
) -> tuple[Tensor, Tensor | None]:  # [N, M], bool [N, M]
    """Return the contributions of `valuate` and which samples have which modality (None: all have all).

    A sample without label counts as one that has no modality. Additive heads never form the coalitions'
    logits. `none_is_worthless` counts the empty coalition, which
    under "correct" is worth 1 where the bias alone is right, as 0. With `share` all processes of a run take
    part, and each gets the whole.
    """
    module, objective = _checked(model, dataset), objective_of(model)
    reader = reader_of(module) if batch_size is None else replace(reader_of(module), batch_size=batch_size)

    def valued(sound: list[Tensor] | None) -> _Rows:
        rows = _Rows(module, dataset, share)
        for features, labels, present in _encoded(module, dataset, reader, share):
            phi = batch_contributions(
                model, features, labels, present, utility=utility, backend=backend, sound=sound
            )
            if none_is_worthless:
                right = model.fuse(features, coalition=0).argmax(1) == objective.classes(labels)
                players = torch.ones_like(phi) if present is None else present.T.to(phi)
                # v(none) stands in each player's value with the weight -1 / number of players.
                phi = phi + right[:, None] * players / players.sum(1, keepdim=True).clamp(min=1)
            if objective.may_ignore and objective.task == "multiclass":
                counted = objective.counted(labels)
                present = counted.expand(len(features), -1) if present is None else present & counted
            rows.add([phi.float()], labels, present)
        return rows

    with _evaluating(module, dataset, reader):
        phi, _, present = without_waiting(valued).joined()
    return phi, None if present is None or bool(present.all()) else present


Passed = TypeVar("Passed")


def without_waiting(one_pass: Callable[[list[Tensor] | None], Passed]) -> Passed:
    """Return what a pass over a data set gives that looks for NaN and infinite logits at its end alone.

    Args:
        one_pass: gives its argument to `batch_contributions` as `sound`. It is called again, with None, where
            a batch was not sound: rare enough for a second pass.
    """
    sound: list[Tensor] = []
    found = one_pass(sound)
    return one_pass(None) if sound and not bool(sound[0]) else found


def batch_contributions(
    model: Predictor,
    features: Sequence[Tensor],  # M x [N, D]
    labels: Tensor,  # [N] or [N, C]
    present: Tensor | None = None,  # bool [M, N]
    *,
    utility: str | Utility | None = None,
    backend: str = "auto",
    sound: list[Tensor] | None = None,
) -> Tensor:  # [N, M]
    """Return the contributions of one encoded batch.

    Where sums of logits may be NaN, each coalition's logits are looked at, which takes longer. To know, the
    host waits for a GPU; with `sound`, a list, it does not, and whether this and the calls before gave right
    values is the flag in it.
    """
    objective = objective_of(model)
    worth = utilities.chosen(utility, objective)
    if model.additive and present is None and isinstance(worth, str):
        classes = objective.classes(labels)
        # What a sample without label is worth is nobody's concern.
        classes = classes.clamp(min=0) if objective.may_ignore else classes
        partial, bias = model.partial_logits(features), model.bias
        finite = partial.isfinite().all() & bias.isfinite().all()
        if sound is not None and not nobody_waits_for(finite):
            sound[:] = [finite & sound[0] if sound else finite]
            return ops.additive_shapley(partial, classes, bias, utility=worth, backend=backend)
        if bool(finite):
            return ops.additive_shapley(partial, classes, bias, utility=worth, backend=backend)
    every = coalitions.all_of(len(features))
    values = []
    for part in _parts(len(labels), len(every) * model.num_classes):
        logits = model.coalition_logits([h[part] for h in features], every)
        found = _utilities(logits, labels[part], worth, objective, backend)
        if present is not None:
            found = found.gather(1, coalitions.among_present(present[:, part]))
        values.append(ops.shapley_values(found, backend=backend))
    return torch.cat(values) if values else labels.new_zeros(0, len(features), dtype=torch.float32)


def _utilities(
    logits: Tensor,  # [N, S, C]
    target: Tensor,  # [N] or [N, C]
    utility: str | Utility,
    objective: Objective,
    backend: str,
) -> Tensor:  # [N, S]
    """Return what coalitions are worth; one whose logits hold NaN, a class for argmax, is never right."""
    if not isinstance(utility, str):
        return utility(logits, objective.for_functions(target))
    labels = objective.classes(target)
    labels = labels.clamp(min=0) if objective.may_ignore else labels
    values = ops.coalition_utilities(logits, labels, utility=utility, backend=backend)
    return values.masked_fill(logits.isnan().any(-1), 0) if utility in _COUNTING else values


def _parts(
    num_samples: int,
    elements: int,  # held per sample
) -> Iterator[slice]:
    """Yield slices of the samples that keep what is held at a time bounded."""
    rows = max(1, _MAX_ELEMENTS // elements)
    for start in range(0, num_samples, rows):
        yield slice(start, start + rows)


def objective_of(model: Any) -> Objective:
    """Return the objective of a learner; a model has that of classes."""
    return getattr(model, "objective", None) or Objective()


def _checked(model: Predictor, dataset: Any) -> nn.Module:
    """Return the model, which is a module; raise for what cannot be valuated."""
    if not getattr(model, "head_is_trained", True):
        raise ValueError(
            "model must have a trained fusion head, got one whose method predicts without it: "
            "give the learner, such as trainer.learner"
        )
    if not hasattr(model, "coalition_logits"):
        hint = ": trainer.learner is one after fit or restore" if model is None else ""
        if isinstance(model, nn.Module):
            hint = ": MultimodalModel(encoders, ...) takes the parts of yours (docs/guide/your_model.md)"
        raise TypeError(f"model must be a mmfast.MultimodalModel or a learner, got {describe(model)}{hint}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("dataset must hold at least one sample, got none")
    return cast(nn.Module, model)
