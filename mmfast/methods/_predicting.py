"""What of a learner predicts: features, logits under any coalition, passes over data sets, predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from mmfast.coalitions import alone, features_key
from mmfast.data.batches import evaluating, presence
from mmfast.data.kept import KeptFeatures, encode_once
from mmfast.data.reader import Reader, evaluation_batches
from mmfast.data.standardize import Scaling
from mmfast.distributed import rank_and_size
from mmfast.export import export
from mmfast.models import MultimodalModel
from mmfast.objectives import Objective
from mmfast.predictions import Predictions, predict


class PredictingModule(nn.Module):
    """A model and a method's way to predict with it: answers to the same calls as a model.

    A method that predicts otherwise than the model overrides `fuse` and what goes with it.
    """

    model: MultimodalModel
    objective: Objective
    # How data sets are read in passes of its own, and the precision of these.
    reader: Reader
    autocast: Callable[[], Any]
    _kept: dict[int, tuple[Any, KeptFeatures, bool]]

    protocol: ClassVar[str] = "masked"  # how the accuracy of one modality alone is taken
    # What is known of the data it was trained on, by `Trainer.fit` and `mmfast.load`: names of the classes,
    # what features were standardised by ({}: nothing), shapes of a sample. None: not known.
    class_names: tuple[str, ...] | None = None
    scaling: Scaling | None = None
    shapes: dict[str, tuple[int, ...]] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def additive(self) -> bool:
        """Whether the logits of a coalition are the bias plus its members' partial logits."""
        return self.model.additive

    @property
    def bias(self) -> Tensor:  # [C]
        return self.model.bias

    def partial_logits(self, features: Sequence[Tensor]) -> Tensor:  # M x [N, D] -> [M, N, C]
        """Return each modality's addend to the logits; only where `additive`."""
        return self.model.partial_logits(features)

    def encode(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the features of all modalities, M tensors [N, D]; kept ones as they are."""
        keys = [features_key(name) for name in self.modalities]
        return [batch[key] for key in keys] if keys[0] in batch else self.model.encode(batch)

    def fuse(
        self,
        features: Sequence[Tensor],  # M x [N, D]
        *,
        coalition: int | None = None,
        present: Tensor | None = None,  # bool [M, N]
    ) -> Tensor:  # [N, C]
        """Return the method's prediction from the features of the modalities that are present."""
        return self.model.fuse(features, coalition=coalition, present=present)

    def keep(self, dataset: Any, *, whole: bool = False) -> KeptFeatures:
        """Encode a data set once, in eval mode; until `forget` passes over it take its features.

        Args:
            dataset: map-style.
            whole: of several processes each gets the features of all samples, otherwise those of its share.
        """
        _, kept, is_whole = self._kept_of(dataset)
        if kept is None or (whole and not is_whole):
            kept = encode_once(self, dataset, whole=whole)
            self._kept[id(dataset)] = dataset, kept, whole or rank_and_size()[1] == 1
        return kept

    def _kept_of(self, dataset: Any) -> tuple[Any, KeptFeatures | None, bool]:
        found = self._kept.get(id(dataset))
        # A copy of the learner knows other data sets, one of which may lie where that of then did.
        return found if found is not None and found[0] is dataset else (None, None, False)

    def forget(self) -> None:
        """Drop the features that are kept, as encoders are about to change."""
        self._kept.clear()

    def batches(
        self, dataset: Any, batch_size: int | None = None, *, share: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield a data set in order, not augmented, on the learner's device; what is kept is not read again.

        Args:
            dataset: map-style.
            batch_size: None takes the reader's.
            share: of several processes, each takes its own: samples rank, rank + world_size, ...
        """
        rank, world_size = rank_and_size() if share else (0, 1)
        _, kept, is_whole = self._kept_of(dataset)
        if kept is not None and (is_whole or world_size > 1):
            source, shares = kept, is_whole
        else:
            source, shares = dataset, True
        rank, world_size = (rank, world_size) if shares else (0, 1)
        yield from evaluation_batches(self, source, batch_size, rank=rank, world_size=world_size)

    def modality_features(self, dataset: Any, *, share: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (m, features [n, D] in float32, labels [n]) batch by batch, in eval mode without gradients.

        Samples that lack modality m, or a label, are left out of its part. `share` is that of `batches`.
        """
        for batch in self.batches(dataset, share=share):
            with evaluating(self):
                present, features = presence(batch, self.modalities), self.encode(batch)
            labels = self.objective.classes(batch["label"])
            labelled = self.objective.counted(labels) if self.objective.may_ignore else None
            for m, h in enumerate(features):
                kept = [
                    mask for mask in (labelled, None if present is None else present[m]) if mask is not None
                ]
                keep = torch.stack(kept).all(0) if kept else slice(None)
                if len(labels[keep]):
                    yield m, h[keep].float(), labels[keep]

    def own_logits(self, features: Sequence[Tensor]) -> Tensor:  # M x [N, D] -> [M, N, C]
        """Return the unimodal logits, those of every modality alone, by this learner's `protocol`."""
        return torch.stack([self.fuse(features, coalition=alone(m)) for m in range(len(features))])

    def coalition_logits(
        self,
        features: Sequence[Tensor],  # M x [N, D]
        coalitions: Tensor,  # [L] int64
    ) -> Tensor:  # [N, L, C]
        """Return the method's prediction under each of the given coalitions."""
        return self.model.coalition_logits(features, coalitions)

    @overload
    def predict(self, data: Mapping[str, Any]) -> Tensor: ...

    @overload
    def predict(self, data: Any, **options: Any) -> Predictions: ...

    def predict(self, data: Any, **options: Any) -> Tensor | Predictions:
        """Return the logits [N, C] that the method predicts with for a batch; of a data set, `Predictions`.

        Of a batch all goes as it is, gradients and training mode included. A data set is read in order, in
        eval mode, without gradients; its samples may have labels or not. Where the training data were
        standardised by their own statistics, as those of commands are, so are the features of a data set:
        ArrayDataset tells whether they are already.

        Args:
            data: a batch, {<modality>: [N, ...]}, or a data set of {<modality>: [...]} samples.
            options: of a data set, each by its name:

                - `standardized`: whether its features are standardised as those of the training data were; by
                  default as it tells itself.
                - `contributions`: False leaves out what each modality contributes, which takes all 2^M
                  coalitions; by default it is found where there are labels.
                - `batch_size`: samples at a time; by default 256, or what the trainer has.
                - `num_workers`, `collate_fn`, `pin_memory`, `prefetch`: how samples are read, as
                  `mmfast.Trainer` takes them; by default as the trainer reads them.

        Raises:
            TypeError, ValueError: a data set that does not fit the model, was standardised otherwise than the
                training data, or does not tell; or has other classes.
        """
        if not isinstance(data, Mapping):
            return predict(self, data, **options)
        if options:
            raise TypeError(f"of a batch predict takes no options, got {', '.join(options)}")
        return self.fuse(self.encode(data), present=presence(data, self.modalities))

    def export(self, path: str | Path, example: Any | None = None, *, standardized: bool = False) -> Path:
        """Write the prediction to a file that runs without mmfast, and return its path.

            learner.export("model.pt2")
            logits = torch.export.load("model.pt2").module()({"audio": a, "image": x}, present)

        A file of torch.export (`.pt2`) or ONNX (`.onnx`, which takes `pip install "mmfast[export]"`). Its
        inputs are one tensor [N, ...] for each modality, under its name; of a nest one for each of its
        tensors, named `text.ids` or `pair.0`; and `present`, bool [N, M], which samples have which modality:
        what lies in the place of an absent one is not looked at. Its output is `logits`, [N, C] float32. N is
        free, all other sizes are those of the example. Raw inputs are standardised as the training data were,
        where that was done. The file tells modalities, classes and inputs in `mmfast.json`, an extra file of
        `.pt2` and a metadata property of `.onnx`.

        Before it is in its place the file is run, an `.onnx` where onnxruntime is installed, and must give
        the logits of the learner on the CPU, in float32, within 1e-4 of the largest one (of 1 at least), for
        several N and with modalities absent.

        Args:
            path: of the file; it ends in .pt2 or .onnx.
            example: a batch, or a data set, of such samples as the encoders take. May be left out where the
                shapes of the training data are known: of runs of commands, and of an ArrayDataset.
            standardized: the inputs will be standardised already.

        Raises:
            ImportError: a package for ONNX is missing.
            TypeError, ValueError: another ending, no example where one is needed, a model that torch.export
                cannot follow, an operator that ONNX has not, or a file that predicts otherwise.
        """
        return export(self, path, example, standardized=standardized)
