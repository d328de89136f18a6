"""Per-sample contribution of each modality: exact Shapley values over all coalitions of modalities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast import coalitions, ops
from mmfast.data.batches import evaluating, evaluation_batches, presence
from mmfast.data.samples import check_samples
from mmfast.data.threads import fitting_threads
from mmfast.errors import check_one_of, describe, needs_train
from mmfast.models.predictor import Predictor
from mmfast.ops.additive_shapley import UTILITIES

# Of these, those that ask which class has the largest logit.
_COUNTING = ("cardinality", "correct")
# Logits of all coalitions are held for as many samples at a time as fit in this many elements (64 MB in
# float32).
_MAX_ELEMENTS = 2**24
# Rows of a table that are written at a time.
_ROWS = 2**16


@dataclass(frozen=True)
class Valuation:
    """What each modality contributes to each sample.

    Attributes:
        contributions: [N, M] Shapley values, float32, on the CPU.
        labels: [N] int64.
        modalities: names of the M modalities.
        utility: the value function: "cardinality" (then values of a sample sum to M where it is classified
            right, and below 1 marks a low-contributing modality), "correct", "probability",
            "log_probability" or "margin".
        coalition_accuracy: [S] accuracy with only the modalities of coalition s, bit m of s for modality m.
        present: bool [N, M], which samples have which modality; None where all have all.
    """

    contributions: Tensor  # [N, M]
    labels: Tensor  # [N]
    modalities: tuple[str, ...]
    utility: str
    coalition_accuracy: Tensor  # [S]
    present: Tensor | None = None  # bool [N, M]

    @property
    def means(self) -> dict[str, float]:
        """Mean contribution of each modality over the samples that have it; NaN where none has."""
        found = mean_contributions(self.contributions, self.present)
        return dict(zip(self.modalities, found.tolist(), strict=True))

    def column(self, m: int) -> Tensor:  # [n]
        """Return the contributions of modality m to the samples that have it."""
        phi = self.contributions[:, m]
        return phi if self.present is None else phi[self.present[:, m]]

    def coalition_name(self, coalition: int) -> str:
        """Return a coalition as its members' names: "audio+image"; the empty one is "none"."""
        return coalitions.name(coalition, self.modalities)

    def columns(self) -> dict[str, list]:
        """Return the table one row a sample: its index, label, and each modality's contribution."""
        return {name: column.tolist() for name, column in self._rows(0, len(self.labels)).items()}

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV."""
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._rows(0, 0))
            for start in range(0, len(self.labels), _ROWS):
                columns = self._rows(start, start + _ROWS).values()
                writer.writerows(zip(*(column.tolist() for column in columns), strict=True))

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as Parquet: integers in 64 bits, contributions in float64; row groups of 65,536."""
        with needs_train("to_parquet"):
            import pyarrow
            from pyarrow.parquet import ParquetWriter

        kinds = {torch.int64: pyarrow.int64(), torch.float64: pyarrow.float64()}

        def array(column: Tensor) -> Any:
            # Of numpy's arrays pyarrow asks whether they are pandas's, and imports that for it.
            content = pyarrow.py_buffer(column.contiguous().numpy())
            return pyarrow.Array.from_buffers(kinds[column.dtype], len(column), [None, content])

        schema = pyarrow.schema((name, kinds[column.dtype]) for name, column in self._rows(0, 0).items())
        with ParquetWriter(path, schema) as writer:
            for start in range(0, len(self.labels), _ROWS):
                columns = self._rows(start, start + _ROWS).values()
                batch = [array(column) for column in columns]
                writer.write_batch(pyarrow.RecordBatch.from_arrays(batch, schema=schema))

    def _rows(self, start: int, stop: int) -> dict[str, Tensor]:  # [n] int64 or float64 each
        """Return some rows of the table."""
        labels = self.labels[start:stop].long()
        table = {"sample": torch.arange(start, start + len(labels), device="cpu"), "label": labels}
        for m, name in enumerate(self.modalities):
            table[name] = self.contributions[start:stop, m].double()
        return table

    def plot(self, path: str | Path) -> None:
        """Write a picture: a histogram of contributions per modality."""
        with needs_train("plot"):
            from mmfast.plots import plot_valuation

        plot_valuation(self.contributions, self.present, self.modalities, self.utility, Path(path))


def valuate(
    model: Predictor,
    dataset: Any,
    *,
    utility: str = "cardinality",
    batch_size: int = 256,
    backend: str = "auto",
) -> Valuation:
    """Return each modality's contribution to each sample of a data set, exact over all 2^M coalitions.

    A modality outside a coalition has its features set to zero after the encoder. Where a sample lacks a
    modality, the others play without it and it gets 0. Logits are held for a bounded number of samples at a
    time.

    Args:
        model: a MultimodalModel, or a learner as `Trainer.learner`, whose prediction rule is then used.
        dataset: data set of {<modality>: [...], "label": int} samples, such as ArrayDataset.
        utility: "cardinality", "correct", "probability", "log_probability" or "margin".
        batch_size: samples encoded at a time.
        backend: of the ops underneath.

    Raises:
        TypeError, ValueError: unknown utility, a data set that does not fit the model, or a model trained by
            a method that leaves its fusion head untrained: then give the learner.

    Source: Wei et al., "Enhancing multimodal cooperation via sample-level modality valuation", CVPR 2024.
    """
    module = _checked(model, dataset, utility)
    check_samples(model.modalities, model.num_classes, "dataset", dataset)
    every = coalitions.all_of(len(model.modalities))  # [S]
    sizes = coalitions.sizes(len(model.modalities))  # |s|, [S]
    found, labels, shown = [], [], []
    correct = torch.zeros(len(every), dtype=torch.float64, device="cpu")
    with fitting_threads(module, dataset, batch_size), evaluating(module):
        for batch in evaluation_batches(module, dataset, batch_size):
            features, label, present = model.encode(batch), batch["label"], presence(batch, model.modalities)
            for part in _parts(len(label), len(every) * model.num_classes):
                logits = model.coalition_logits([h[part] for h in features], every)  # [n, S, C]
                right = _utilities(logits, label[part], "correct", backend)  # [n, S]
                if utility == "correct":
                    values = right
                elif utility == "cardinality":
                    values = right * sizes.to(right)
                else:
                    values = _utilities(logits, label[part], utility, backend)
                if present is not None:
                    rest = coalitions.among_present(present[:, part])  # v(S) becomes v(S and present)
                    values, right = values.gather(1, rest), right.gather(1, rest)
                found.append(ops.shapley_values(values, backend=backend).float().cpu())
                correct += right.double().sum(0).cpu()
            labels.append(label.cpu())
            if present is not None:
                shown.append(present.T.cpu())
    return Valuation(
        torch.cat(found),
        torch.cat(labels),
        tuple(model.modalities),
        utility,
        (correct / len(dataset)).float(),
        torch.cat(shown) if shown else None,
    )


def contributions(
    model: Predictor,
    dataset: Any,
    *,
    utility: str = "cardinality",
    batch_size: int = 256,
    backend: str = "auto",
    none_is_worthless: bool = False,
) -> tuple[Tensor, Tensor | None]:  # [N, M], bool [N, M]
    """Return the contributions of `valuate` and which samples have which modality (None: all have all).

    Additive heads never form the coalitions' logits. `none_is_worthless` counts the empty coalition, which
    under "correct" is worth 1 where the bias alone is right, as 0.
    """
    module = _checked(model, dataset, utility)
    found, shown = [], []
    with fitting_threads(module, dataset, batch_size), evaluating(module):
        for batch in evaluation_batches(module, dataset, batch_size):
            features, present = model.encode(batch), presence(batch, model.modalities)
            phi = batch_contributions(
                model, features, batch["label"], present, utility=utility, backend=backend
            )
            if none_is_worthless:
                right = model.fuse(features, coalition=0).argmax(1) == batch["label"]
                players = torch.ones_like(phi) if present is None else present.T.to(phi)
                # v(none) stands in each player's value with the weight -1 / number of players.
                phi = phi + right[:, None] * players / players.sum(1, keepdim=True).clamp(min=1)
            found.append(phi)
            if present is not None:
                shown.append(present.T)
    return torch.cat(found).float().cpu(), torch.cat(shown).cpu() if shown else None


def mean_contributions(
    phi: Tensor,  # [N, M]
    present: Tensor | None,  # bool [N, M]
) -> Tensor:  # [M] float64
    """Return the mean contribution of each modality over the samples that have it; NaN where none has."""
    phi = phi.double()
    if present is None:
        return phi.mean(0)
    # A modality that a sample lacks contributes 0 to it, which says nothing of how good it is.
    return (phi * present).sum(0) / present.sum(0)


def batch_contributions(
    model: Predictor,
    features: Sequence[Tensor],  # M x [N, D]
    labels: Tensor,  # [N]
    present: Tensor | None = None,  # bool [M, N]
    *,
    utility: str = "cardinality",
    backend: str = "auto",
) -> Tensor:  # [N, M]
    """Return the contributions of one encoded batch."""
    if model.additive and present is None:
        partial, bias = model.partial_logits(features), model.bias
        # Where sums may be NaN each coalition's logits are looked at.
        if bool(partial.isfinite().all() & bias.isfinite().all()):
            return ops.additive_shapley(partial, labels, bias, utility=utility, backend=backend)
    every = coalitions.all_of(len(features))
    values = []
    for part in _parts(len(labels), len(every) * model.num_classes):
        logits = model.coalition_logits([h[part] for h in features], every)
        utilities = _utilities(logits, labels[part], utility, backend)
        if present is not None:
            utilities = utilities.gather(1, coalitions.among_present(present[:, part]))
        values.append(ops.shapley_values(utilities, backend=backend))
    return torch.cat(values) if values else labels.new_zeros(0, len(features), dtype=torch.float32)


def _utilities(
    logits: Tensor,  # [N, S, C]
    labels: Tensor,  # [N]
    utility: str,
    backend: str,
) -> Tensor:  # [N, S]
    """Return what coalitions are worth; one whose logits hold NaN, a class for argmax, is never right."""
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


def _checked(model: Predictor, dataset: Any, utility: str) -> nn.Module:
    """Return the model, which is a module; raise for what cannot be valuated."""
    if not getattr(model, "head_is_trained", True):
        raise ValueError(
            "model must have a trained fusion head, got one whose method predicts without it: "
            "give the learner, such as trainer.learner"
        )
    check_one_of("utility", utility, UTILITIES)
    if not hasattr(model, "coalition_logits"):
        hint = ": trainer.learner is one after fit or restore" if model is None else ""
        raise TypeError(f"model must be a mmfast.MultimodalModel or a learner, got {describe(model)}{hint}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("dataset must hold at least one sample, got none")
    return cast(nn.Module, model)
