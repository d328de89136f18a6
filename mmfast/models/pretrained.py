"""Encoders that were trained elsewhere: models of transformers for text, images and sound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.errors import describe, dtype_name
from mmfast.models._checks import check_dropout, nobody_waits_for
from mmfast.models._hugging_face import KINDS, load_backbone, load_processor
from mmfast.models._states import choose, most_positions, probed, window_of
from mmfast.models.encoders import Encoder

_LETTERS = {"text": "T", "image": "C, H, W", "sound": "T"}
# What `mmfast.data.pad` calls the input and its mask.
_VALUES, _MASK = "values", "mask"
_ATTENTION = "attention_mask"


class PretrainedEncoder(Encoder):
    """A model of transformers, its states pooled to one vector a sample, and a linear layer to `dim`.

        encoder = PretrainedEncoder("hf:google-bert/bert-base-uncased", 64, freeze=True)
        encoder({"input_ids": ids, "attention_mask": mask})  # [N, T] twice -> [N, 64]

    It takes the tensor that the model reads, or a dict of what the model's `forward` takes, as its tokenizer
    or processor gives it: "input_ids" int [N, T] of text, "pixel_values" [N, C, H, W] of images,
    "input_values" [N, T] or "input_features" of sound, with "attention_mask" [N, T] where samples are padded.
    {"values": ..., "mask": ...}, as `mmfast.data.pad` makes it, is the same. A sample whose mask is False
    throughout counts as one that is not padded.

    Of an encoder-decoder (T5, Whisper) it is the encoder alone. Layer drop and the masking of sound or
    patches that some models train with are off, so that no step leaves a layer out and runs go on bit for
    bit.

    Args:
        source: "hf:<name or folder>": a folder that `save_pretrained` wrote, or a name of the Hub.
        dim: D, the number of features; None leaves the linear layer out, and D is the model's own.
        pooling: "mean" over positions, those that the mask leaves out not counted; "cls", the state of the
            first position; "pooler", the model's own `pooler_output`. None: of text and sound "mean"; of
            images "pooler" where the model has one with all its weights, which a classifier's folder has not.
        freeze: the model's weights do not train, and it stays in eval mode; the linear layer does train.
        dropout: dropout before the linear layer in training.
        dtype: of the model's weights; the linear layer is float32.

    Attributes:
        kind: "text", "image" or "sound".
        backbone: the model.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such model here, and it cannot be downloaded.
        ValueError: a model of several inputs or of other ones, one that gives no states, a pooling it lacks.
    """

    backbone: Any  # an nn.Module with transformers' attributes

    def __init__(
        self,
        source: str,
        dim: int | None = None,
        *,
        pooling: str | None = None,
        freeze: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dim is None and dtype != torch.float32:
            raise ValueError(
                "dtype must be float32 where dim is None, for no layer casts the features, "
                f"got {dtype_name(dtype)}"
            )
        backbone, has_pooler = load_backbone(source, dtype)
        kind = KINDS.get(backbone.main_input_name)
        if kind is None:
            raise ValueError(
                f"{source!r} must take {', '.join(KINDS)}, got {type(backbone).__name__}, which takes "
                f"{backbone.main_input_name}"
            )
        takes = tuple(inspect.signature(backbone.forward).parameters)
        if len(inputs := [key for key in takes if key in KINDS]) > 1:
            raise ValueError(
                f"{source!r} must take one of text, images and sound, got {type(backbone).__name__}, which "
                f"takes {' and '.join(inputs)}"
            )
        found = probed(backbone, source)
        width, pooling = choose(source, kind, pooling, found, has_pooler)
        super().__init__(_LETTERS[kind], _sizes(kind, backbone.config), width if dim is None else dim)
        self.source, self.kind, self.pooling, self.freeze = source, kind, pooling, freeze
        # First, for the dtype of a model's input is told by its first parameter.
        self.projection = nn.Identity() if dim is None else nn.Linear(width, dim)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.backbone = backbone
        self._window = window_of(backbone)
        self._takes = takes
        for name, p in backbone.named_parameters():
            # A pooler that is not asked gets no gradient.
            if freeze or (pooling != "pooler" and "pooler" in name):
                p.requires_grad_(False)
        self.train()

    def processor(self) -> Any:
        """Return the model's tokenizer, image processor or feature extractor.

        Raises:
            OSError, ValueError: the folder has none.
        """
        return load_processor(self.source, self.kind)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        super().train(mode)
        if self.freeze:
            # Frozen means batch-norm statistics and dropout too.
            self.backbone.eval()
        return self

    def check_input(self, x: object, name: str = "input") -> None:
        """Raise unless `x` is what the model reads, or a dict of it and of what belongs to it."""
        inputs = self._named(x, name)
        main = inputs[self.backbone.main_input_name]
        if self.kind == "image":
            super().check_input(main, name)
            return
        if not isinstance(main, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {describe(main)}")
        is_text = self.kind == "text"
        if main.dtype == torch.bool or main.is_floating_point() == is_text:
            expected = "an integer" if is_text else "a floating"
            raise TypeError(f"{name} must have {expected} dtype, got {dtype_name(main.dtype)}")
        if main.dim() not in ((2,) if is_text else (2, 3)) or 0 in main.shape[1:]:
            raise ValueError(f"{name} must have shape [N, T], got {list(main.shape)}")
        mask = inputs.get(_ATTENTION)
        if mask is not None and main.dim() == 2 and mask.shape != main.shape:
            raise ValueError(
                f"mask of {name} must have shape [N, T] = {list(main.shape)}, got {list(mask.shape)}"
            )
        if is_text:
            self._check_ids(main, name)
        elif main.dim() == 2 and main.shape[1] < self._window:
            raise ValueError(
                f"{name} must have at least T = {self._window} values, as one state is made of so many, "
                f"got {main.shape[1]}"
            )

    def forward(
        self,
        x: Any,  # [N, T], [N, C, H, W], or a dict of such
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        dtype = next(self.backbone.parameters()).dtype
        inputs = {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in self._named(x, "input").items()
        }
        mask = inputs.get(_ATTENTION)
        if mask is not None:
            mask = mask.bool()
            mask = mask | ~mask.any(1, keepdim=True)
            inputs, mask = _padded_behind(inputs, mask)
            inputs[_ATTENTION] = mask.long()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            h = self._by_length(inputs, mask) if mask is not None and self._sees_padding else None
            h = self._pooled(self.backbone(**inputs), mask) if h is None else h
        h = self.dropout(h)
        return h if isinstance(self.projection, nn.Identity) else self.projection(self._cast(h))

    def extra_repr(self) -> str:
        model = f"{type(self.backbone).__name__} for {self.kind}"
        return f"{self.source!r}, {model}, pooling={self.pooling!r}, freeze={self.freeze}"

    @property
    def _sees_padding(self) -> bool:
        """Whether the model normalises sound over time, padding included, whatever the mask says."""
        return getattr(self.backbone.config, "feat_extract_norm", None) == "group"

    def _by_length(
        self,
        inputs: Mapping[str, Tensor],  # [N, T] each
        mask: Tensor,  # bool [N, T]
    ) -> Tensor:  # [N, D]
        """Return pooled states of samples that the model reads together with those of their length alone."""
        # Below one window of its convolutions it reads nothing.
        name, lengths = self.backbone.main_input_name, mask.sum(1).clamp(min=self._window)
        parts, order = [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            main = inputs[name][rows, :length]
            parts.append(self._pooled(self.backbone(**{name: main}), None))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _pooled(
        self,
        found: Any,
        mask: Tensor | None,  # bool [N, T]
    ) -> Tensor:  # [N, D]
        if self.pooling == "pooler":
            return found.pooler_output.flatten(1)
        h = found.last_hidden_state  # [N, T, D], or [N, D, H, W]
        if h.dim() == 4:
            return h.mean((2, 3))
        if self.pooling == "cls":
            first = torch.zeros_like(h[:, 0, 0], dtype=torch.int64) if mask is None else mask.int().argmax(1)
            return h[torch.arange(len(h), device=h.device), first]
        if mask is None:
            return h.mean(1)
        weights = self._shortened(mask, h.shape[1])[..., None].to(h.dtype)
        return (h * weights).sum(1) / weights.sum(1)

    def _shortened(
        self,
        mask: Tensor,  # bool [N, T]
        size: int,  # T'
    ) -> Tensor:  # bool [N, T']
        """Return the mask of the model's positions, of which convolutions leave fewer than it reads."""
        if mask.shape[1] == size:
            return mask
        shorten = getattr(self.backbone, "_get_feat_extract_output_lengths", None)
        if shorten is None:
            raise ValueError(
                f"mask must have T = {size} positions, as {type(self.backbone).__name__} does not tell how "
                f"it shortens sound, got {mask.shape[1]}"
            )
        lengths = shorten(mask.sum(1)).clamp(min=1)
        return torch.arange(size, device=mask.device) < lengths[:, None]

    def _cast(
        self,
        h: Tensor,  # [N, D]
    ) -> Tensor:  # [N, D]
        return h.to(self.projection.weight.dtype)  # type: ignore[arg-type]

    def _named(self, x: object, name: str) -> dict[str, Any]:
        """Return a modality by the names of the model's arguments."""
        main: str = self.backbone.main_input_name
        if not isinstance(x, Mapping):
            return {main: x}
        inputs = {str(key): value for key, value in x.items()}
        for ours, name_there in ((_VALUES, main), (_MASK, _ATTENTION)):
            if ours in inputs:
                inputs[name_there] = inputs.pop(ours)
        unknown = [repr(key) for key in inputs if key not in self._takes]
        if unknown or main not in inputs:
            takes = f"{main!r}" + (f" and {_ATTENTION!r}" if _ATTENTION in self._takes else "")
            got = ", ".join(map(repr, x)) or "nothing"
            if unknown:
                got += f", of which {type(self.backbone).__name__} takes no {' or '.join(unknown)}"
            raise ValueError(f"{name} must hold {takes}, got {got}")
        return inputs

    def _check_ids(
        self,
        ids: Tensor,  # [N, T]
        name: str,
    ) -> None:
        config = self.backbone.config
        most = most_positions(self.backbone)
        # Positions that turn are counted on beyond what training saw; a table of them has an end.
        if most is not None and 0 < most < ids.shape[1] and not hasattr(config, "rope_parameters"):
            raise ValueError(
                f"{name} must have at most T = {most} positions, got {ids.shape[1]}: max_length of "
                "mmfast.data.with_processors, or of mmfast.data.pad, cuts them"
            )
        size = getattr(self.backbone.get_input_embeddings(), "num_embeddings", None)
        if size is None or not nobody_waits_for(ids) or torch.compiler.is_compiling() or ids.numel() == 0:
            return
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} must hold ids in [0, V) = [0, {size}), got {low if low < 0 else high}: "
                "of another tokenizer?"
            )


def _padded_behind(
    inputs: Mapping[str, Any],
    mask: Tensor,  # bool [N, T]
) -> tuple[dict[str, Any], Tensor]:
    """Return inputs and mask with what is left out before a sample's first position behind its last one.

    Models count positions from the first, or read from there on, whatever the mask says.
    """
    size = mask.shape[1]
    places = (torch.arange(size, device=mask.device) + mask.int().argmax(1, keepdim=True)) % size  # [N, T]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    turned = {
        key: value[rows, places] if isinstance(value, Tensor) and value.shape[:2] == mask.shape else value
        for key, value in inputs.items()
    }
    return turned, mask[rows, places]


def _sizes(kind: str, config: Any) -> tuple[int | None, ...]:
    """Return the sizes that samples must have, None where any will do."""
    return (getattr(config, "num_channels", None), None, None) if kind == "image" else (None,)
