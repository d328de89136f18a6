"""Batches of texts, pictures and waveforms by the tokenizers and processors of pretrained models."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmfast.coalitions import present_key, rows_key
from mmfast.data.collate import collate, takes_parts
from mmfast.errors import describe, unknown_modalities
from mmfast.models._hugging_face import KINDS
from mmfast.models.multimodal import MultimodalModel
from mmfast.models.pretrained import PretrainedEncoder

# Tokenizers that know no limit say so by a number beyond any text.
_NO_LIMIT = 2**31


def with_processors(
    processors: Mapping[str, Any] | MultimodalModel,
    *,
    max_length: int | Mapping[str, int] | None = None,
    sampling_rate: int | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
) -> Processors:
    """Return a `collate_fn` that takes texts, pictures and waveforms as they are.

        model = mmfast.models.build_model({"text": "hf:bert-folder", "image": [3, 32, 32]}, num_classes=4)
        trainer = mmfast.Trainer("joint", collate_fn=mmfast.data.with_processors(model, max_length=128))
        trainer.fit(model, [{"text": "a red ball", "image": image, "label": 0}, ...])

    Of a modality with a tokenizer a sample holds a str, with an image processor a PIL picture or an array
    [H, W, C] or [C, H, W], with a feature extractor a mono waveform [t]. The batch holds what the processor
    makes of them, for a `PretrainedEncoder`: {"input_ids", "attention_mask"}, int64 [N, T] each; pixel_values
    [N, C, H, W]; {"input_values", "attention_mask"} or {"input_features", "attention_mask"}. Samples that
    `<modality>__present` marks as absent hold anything there, or nothing: `<modality>.rows`, int64 [n], tells
    of which samples the values are. It goes to workers, started in any way, if the processors do.

    Args:
        processors: modality name -> tokenizer, image processor, feature extractor, a processor that holds
            one, a `PretrainedEncoder`, whose own is loaded, or any function of the list of n values that
            gives what the batch holds of them. Or a model: those of its pretrained encoders.
        max_length: T at which texts are cut; or by modality, in tokens or in values of a waveform. None: the
            tokenizer's own limit, where it has one.
        sampling_rate: of all waveforms, in Hz; a feature extractor for another refuses it. None: that of the
            feature extractor.
        collate_fn: makes the batch of all else, as `mmfast.data.pad`; None: as without a `collate_fn`.

    Texts are split on one core a process: TOKENIZERS_PARALLELISM is set to "false" unless it is set, as
    tokenizers ask where a process has children.

    Raises:
        TypeError, ValueError: no processor, no length of at least 1, a model without pretrained encoders.
        OSError: the folder of a pretrained encoder holds no processor.
    """
    if isinstance(processors, MultimodalModel):
        encoders = processors.encoders.items()
        processors = {name: each for name, each in encoders if isinstance(each, PretrainedEncoder)}
        if not processors:
            raise ValueError("model must have a PretrainedEncoder for its processors to be taken, got none")
    if not isinstance(processors, Mapping):
        raise TypeError(f"processors must map modality names to processors, got {describe(processors)}")
    lengths = max_length if isinstance(max_length, Mapping) else {}
    if unknown := [name for name in lengths if name not in processors]:
        raise unknown_modalities("max_length", ", ".join(unknown), processors)
    for value in (*lengths.values(), *(() if isinstance(max_length, Mapping) else (max_length,))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"max_length must be an integer of at least 1, got {describe(value)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    steps = {}
    for name, processor in processors.items():
        if isinstance(processor, PretrainedEncoder):
            processor = processor.processor()
        kind, processor = _kind_of(name, processor)
        limit = max_length if kind == "text" and not isinstance(max_length, Mapping) else lengths.get(name)
        steps[name] = Step(name, kind, processor, limit, sampling_rate)
    return Processors(steps, collate_fn or collate)


class Step:
    """Makes what a batch holds of one modality from the values of its samples."""

    def __init__(
        self, name: str, kind: str, processor: Any, max_length: int | None, sampling_rate: int | None
    ) -> None:
        self.name, self.kind, self.processor = name, kind, processor
        self.max_length, self.sampling_rate = max_length, sampling_rate

    def __repr__(self) -> str:
        limit = "" if self.max_length is None else f", max_length={self.max_length}"
        return f"{type(self.processor).__name__} for {self.kind}{limit}"

    def __call__(self, values: list[Any]) -> Any:
        """Return a tensor [n, ...], or a dict of such."""
        make = {"text": self._texts, "image": self._images, "sound": self._sounds}.get(self.kind)
        if make is None:
            return self.processor(values)
        found = dict(make(values))
        return next(iter(found.values())) if len(found) == 1 else found

    def _texts(self, texts: list[Any]) -> Mapping[str, Any]:
        for text in texts:
            if not isinstance(text, str):
                raise self._refused("a str", text)
        if self.processor.pad_token is None:
            raise ValueError(
                f"tokenizer of {self.name} must have a pad token, got none: tokenizer.pad_token = "
                "tokenizer.eos_token does, as the mask hides it"
            )
        limit = self.max_length or self.processor.model_max_length
        options = {"truncation": True, "max_length": limit} if limit < _NO_LIMIT else {}
        return self.processor(texts, padding=True, return_attention_mask=True, return_tensors="pt", **options)

    def _images(self, images: list[Any]) -> Mapping[str, Any]:
        # Grey ones and those with transparency have channels that no model was trained on.
        images = [
            each.convert("RGB") if hasattr(each, "convert") and each.mode != "RGB" else each
            for each in images
        ]
        for each in images:
            if not hasattr(each, "convert") and len(getattr(each, "shape", ())) != 3:
                raise self._refused("a picture [H, W, C] or [C, H, W]", each)
        return self.processor(images=images, return_tensors="pt")

    def _sounds(self, waves: list[Any]) -> Mapping[str, Any]:
        arrays = []
        for wave in waves:
            array = wave.numpy() if isinstance(wave, torch.Tensor) else wave
            if not isinstance(array, np.ndarray) or array.ndim != 1:
                raise self._refused("a waveform [t]", wave)
            arrays.append(array[: self.max_length].astype(np.float32))
        rate = self.sampling_rate or self.processor.sampling_rate
        return self.processor(arrays, sampling_rate=rate, return_tensors="pt", **_padding(self.processor))

    def _refused(self, expected: str, got: Any) -> TypeError:
        return TypeError(
            f"{self.name} of a sample must be {expected}, got {describe(got)}: mark samples that lack it by "
            f"{present_key(self.name)!r}"
        )


class Processors:
    """A `collate_fn`: what `with_processors` returns.

    Args:
        steps: by modality, what makes its part of a batch.
        collate_fn: makes the batch of all else.
    """

    def __init__(self, steps: Mapping[str, Step], collate_fn: Callable) -> None:
        self.steps, self.collate_fn = dict(steps), collate_fn
        # The loader hands samples that lack modalities to such a function alone.
        self.takes_parts = takes_parts(collate_fn)

    def __repr__(self) -> str:
        return f"with_processors({', '.join(f'{name}: {step}' for name, step in self.steps.items())})"

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rest = [{key: value for key, value in each.items() if key not in self.steps} for each in samples]
        held: dict[str, list[int]] = {}
        for name in self.steps:
            flag = present_key(name)
            # Without the flag a sample has the modality if it holds its values.
            has = [bool(sample.get(flag, name in sample)) and name in sample for sample in samples]
            is_marked = any(flag in sample for sample in samples)
            if is_marked:
                for sample, kept in zip(samples, rest, strict=True):
                    kept[flag] = sample.get(flag, name in sample)
            if any(has) or is_marked:
                held[name] = [row for row, each in enumerate(has) if each]
        batch = dict(self.collate_fn(rest))
        for name, rows in held.items():
            if rows:
                batch[name] = self.steps[name]([samples[row][name] for row in rows])
            if len(rows) < len(samples):
                batch[rows_key(name)] = torch.tensor(rows, dtype=torch.int64, device="cpu")
            else:
                batch.pop(rows_key(name), None)
        return batch


def _kind_of(name: str, processor: Any) -> tuple[str, Any]:
    """Return what a processor is for, and the part of it that does that; "other" of a function."""
    for part in ("feature_extractor", "image_processor", "tokenizer"):
        if hasattr(processor, part):
            processor = getattr(processor, part)
            break
    inputs = getattr(processor, "model_input_names", None)
    kind = next((KINDS[key] for key in inputs or () if key in KINDS), None)
    if kind is None and inputs is None and callable(processor):
        return "other", processor
    if kind is None:
        raise TypeError(
            f"processor of {name} must be one of transformers' or a function, got {describe(processor)}"
        )
    return kind, processor


def _padding(extractor: Any) -> dict[str, Any]:
    """Return the options by which a feature extractor pads sound and gives a mask, if it does such things."""
    known = inspect.signature(extractor.__call__).parameters
    options = {"return_attention_mask": True} if "return_attention_mask" in known else {}
    # Some give all sound one length, as Whisper's does, and their models take no other.
    pads = "padding" not in known or known["padding"].default
    return options if pads else {**options, "padding": True}
