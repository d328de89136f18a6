"""The multimodal model: one encoder per modality, one fusion head, any coalition of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.coalitions import contains, is_reserved, members, num_coalitions, present_key, rows_key
from mmfast.errors import check_one_of, dtype_name
from mmfast.models._checks import check_features, check_present, check_size, nobody_waits_for
from mmfast.models._inputs import check_batch, encoded, without_absent
from mmfast.models._text import count_text, module_text
from mmfast.models.encoders import Encoder
from mmfast.models.fusion import FusionHead, fusion_head

# Rows of one head call when coalitions are stacked along the batch: bounds memory, keeps the products large.
_MAX_ROWS = 16384


class MultimodalModel(nn.Module):
    """Encoders whose features are fused into logits, where any subset of the modalities may be absent.

    An absent modality is one whose features are set to zero after its encoder; the head and its bias stay as
    they are. Three ways to say which are absent have this one meaning: `coalition` for a whole batch,
    `present` per sample, and bool arrays `<modality>__present` in the batch itself. They combine: what any of
    them leaves out is absent.

    Args:
        encoders: modality name -> module from that modality's array to [N, D_m]. The order fixes the bits of
            a coalition: bit m of s is set where modality m is present.
        dim: D, the feature dimension of every encoder, or modality name -> D_m.
        num_classes: C.
        fusion: a name of FUSION_HEADS or a FusionHead made for these dimensions.

    Raises:
        TypeError, ValueError: no encoder, a modality name that cannot be used, dimensions for other
            modalities, an unknown head.

    Its repr is a few lines; that of `model.encoders`, or of one of them, shows every layer.
    """

    encoders: nn.ModuleDict
    head: FusionHead
    head_is_trained = True  # methods that predict without the fusion head set it to False

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        dim: int | Mapping[str, int],
        num_classes: int,
        fusion: str | FusionHead = "concat",
    ) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping | nn.ModuleDict):
            raise TypeError(f"encoders must map modality names to modules, got {type(encoders).__name__}")
        if len(encoders) == 0:
            raise ValueError("encoders must hold M >= 1 modalities, got none")
        for name in encoders:
            _check_modality_name(name)
        self.modalities: tuple[str, ...] = tuple(encoders)
        if isinstance(dim, Mapping):
            if set(dim) != set(self.modalities):
                raise ValueError(f"dim must have the keys {sorted(self.modalities)}, got {sorted(dim)}")
            dims = [check_size(f"dim[{name!r}]", dim[name]) for name in self.modalities]
        else:
            dims = [check_size("dim", dim)] * len(self.modalities)
        self.dims: tuple[int, ...] = tuple(dims)
        self.num_classes = check_size("num_classes", num_classes)
        self.encoders = nn.ModuleDict(dict(encoders.items()))
        self.head = fusion_head(fusion, self.dims, self.num_classes)

    def __repr__(self) -> str:
        size = count_text(self)
        lines = [f"MultimodalModel({len(self.modalities)} modalities, {self.num_classes} classes, {size}"]
        for (name, encoder), dim in zip(self.encoders.items(), self.dims, strict=True):
            lines.append(f"{name}: {module_text(encoder)}, D = {dim}, {count_text(encoder)}")
        lines.append(f"fusion: {module_text(self.head)}, {count_text(self.head)}")
        return "\n  ".join(lines) + ")"

    @property
    def additive(self) -> bool:
        """Whether the logits are the bias plus one term per modality, so that `partial_logits` exists."""
        return self.head.additive

    @property
    def bias(self) -> Tensor:  # [C]
        """The head's bias; zeros where the head has none."""
        return self.head.bias

    def encode(
        self,
        batch: Mapping[str, Any],  # modality -> [N, ...], or a nest of such; see `encode`
    ) -> list[Tensor]:  # M tensors [N, D_m]
        """Return each modality's features, zero for samples that lack it.

        The encoder sees zeros in place of what the batch holds for samples that `<modality>__present` marks
        as absent, whatever that is: they count in batch-norm statistics, but reach neither the head nor any
        gradient. In a nest all tensors are zeros there, so a mask may be False throughout; an encoder that
        divides by its sum must give something finite all the same (`mask.sum(1).clamp(min=1)`), for the
        gradient of a NaN is NaN even where the feature is replaced. Rows leave these samples out, as they
        do in the batches that mmfast makes of nests: what has no row is not encoded, and counts in no
        statistics.

        Args:
            batch: by modality name, what its encoder takes: a tensor [N, ...], or a dict, tuple or list of
                such, nested as it likes, which may hold None and numbers, too. Optional keys:
                `<modality>__present`, bool [N]: which samples have it.
                `<modality>.rows`, int64 [n]: the samples, each once, whose values the batch holds, in this
                order; of all others the features are zero. With n = 0 the encoder is not called, and the
                values may be missing. Values on a GPU are not read to check their range.
                N is that of a modality without rows, else of `label`, of `<modality>__present`, or of
                `coalition` (bool [N, M], which modalities a sample shows).

        Raises:
            TypeError, ValueError: a modality is missing from the batch, holds no tensor, one of a shape its
                encoder does not take, or of another number of samples; rows of other samples or another
                dtype; an encoder returns another shape than [N, D_m].
        """
        return self._encode(batch, skip=())

    def encode_modality(
        self,
        batch: Mapping[str, Any],  # modality -> [N, ...], or a nest of such; see `encode`
        name: str,
    ) -> Tensor:  # [N, D_m]
        """Return the features of one modality; the others are not encoded and may be missing from the batch.

        Raises:
            TypeError, ValueError: as `encode`; or `name` is no modality of the model.
        """
        check_one_of("name", name, self.modalities, nearest_first=True)
        num_samples = check_batch(batch, self.modalities, [name])
        return self._encode_one(batch, name, self.dims[self.modalities.index(name)], num_samples)

    def forward(
        self,
        batch: Mapping[str, Any],  # modality -> [N, ...], or a nest of such; see `encode`
        *,
        coalition: int | None = None,
        present: Tensor | None = None,  # bool [M, N]
    ) -> Tensor:  # [N, C]
        """Return the logits of a batch, with the modalities outside the coalition absent.

        Equivalent to:

            logits = model.fuse(model.encode(batch), coalition=coalition, present=present)

        In eval mode a modality outside `coalition` is not encoded and may be missing from the batch. In
        training mode it is, so that each parameter gets a gradient (zero), which data-parallel training waits
        for.

        Args:
            batch: as for `encode`.
            coalition: index s in [0, 2^M); bit m set where modality m is present. None: all are.
            present: bool [M, N], the presence of each modality per sample. Not together with `coalition`.

        Raises:
            TypeError, ValueError: as `encode` and `fuse`.
        """
        skip: tuple[str, ...] = ()
        if coalition is not None:
            _check_one_of(coalition, present)
            coalition = self._check_coalition("coalition", coalition)
            if not self.training:
                skip = tuple(name for m, name in enumerate(self.modalities) if not contains(coalition, m))
        return self.fuse(self._encode(batch, skip=skip), coalition=coalition, present=present)

    def fuse(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
        *,
        coalition: int | None = None,
        present: Tensor | None = None,  # bool [M, N]
    ) -> Tensor:  # [N, C]
        """Return the logits of encoded features, absent modalities' features set to zero.

        Equivalent to:

            kept = [torch.where(present[m, :, None], h, 0) for m, h in enumerate(features)]
            logits = model.head(kept)

        Raises:
            TypeError, ValueError: features of other shapes, a coalition outside [0, 2^M), `present` of
                another shape or dtype, or both given.
        """
        check_features(features, self.modalities, self.dims)
        _check_one_of(coalition, present)
        if coalition is not None:
            coalition = self._check_coalition("coalition", coalition)
            features = [h if contains(coalition, m) else _zeroed(h) for m, h in enumerate(features)]
        elif present is not None:
            check_present("present", present, "M, N", (len(self.dims), features[0].shape[0]))
            features = [h.masked_fill(~present[m, :, None], 0.0) for m, h in enumerate(features)]
        return self.head(features)

    def partial_logits(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [M, N, C]
        """Return each modality's term of the logits: logits of coalition s = bias + sum of the terms in s.

        Raises:
            ValueError: the head is not additive, or the features have other shapes.
        """
        check_features(features, self.modalities, self.dims)
        return self.head.partial_logits(features)

    def coalition_logits(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
        coalitions: Sequence[int] | Tensor,  # [L] indices in [0, 2^M)
    ) -> Tensor:  # [N, L, C]
        """Return the logits under each of the given coalitions.

        Equivalent to:

            logits = torch.stack([model.fuse(features, coalition=s) for s in coalitions], dim=1)

        An additive head adds its partial logits; any other runs on coalitions stacked along the batch, a
        bounded number of rows at a time. Indices in a GPU tensor are not read to check their range: that
        would wait for the device, and bits above M - 1 are ignored there.

        Raises:
            TypeError, ValueError: features of other shapes, coalitions that are no integers, of another rank
                or outside [0, 2^M).
        """
        check_features(features, self.modalities, self.dims)
        member = self._members(coalitions, features[0].device)
        num_samples, num_coalitions = features[0].shape[0], member.shape[0]
        if self.additive:
            partial = self.head.partial_logits(features)
            is_known = not torch.compiler.is_compiling() and nobody_waits_for(partial)
            if is_known and bool(partial.isfinite().all()):
                return self.bias + torch.matmul(member.to(partial.dtype), partial.transpose(0, 1))
            # In a product NaN and infinity would reach coalitions that they are no members of.
            added = (torch.where(member[:, m, None], own[:, None], 0.0) for m, own in enumerate(partial))
            return self.bias + sum(added)
        if num_coalitions == 0 or num_samples == 0:
            return self.bias.new_zeros(num_samples, num_coalitions, self.num_classes)
        logits = []
        for chunk in member.split(max(1, _MAX_ROWS // num_samples)):
            # [N, 1, D_m] against [L, 1] gives every sample under every coalition of the chunk.
            stacked = [
                h[:, None, :].masked_fill(~chunk[:, m, None], 0.0).flatten(0, 1)
                for m, h in enumerate(features)
            ]
            logits.append(self.head(stacked).unflatten(0, (num_samples, -1)))
        return torch.cat(logits, dim=1)

    def _encode(
        self,
        batch: Mapping[str, Any],
        skip: tuple[str, ...],  # modalities whose features are zero whatever the batch holds
    ) -> list[Tensor]:  # M tensors [N, D_m]
        needed = [name for name in self.modalities if name not in skip]
        num_samples = check_batch(batch, self.modalities, needed)
        features = []
        for name, dim in zip(self.modalities, self.dims, strict=True):
            if name in skip:
                features.append(self.bias.new_zeros(num_samples, dim))
                continue
            features.append(self._encode_one(batch, name, dim, num_samples))
        return features

    def _encode_one(
        self, batch: Mapping[str, Any], name: str, dim: int, num_samples: int
    ) -> Tensor:  # [N, D_m]
        encoder, rows, present = self.encoders[name], batch.get(rows_key(name)), None
        count = num_samples if rows is None else rows.shape[0]
        if rows is not None and count == 0:
            return self.bias.new_zeros(num_samples, dim)
        x = batch[name]
        if (key := present_key(name)) in batch:
            present = check_present(key, batch[key], "N", (num_samples,))
            present = present if rows is None else present.index_select(0, rows)
            # NaN, a common filler, would reach weights by a gradient of zero times NaN.
            x = without_absent(x, present)
        if isinstance(encoder, Encoder):
            encoder.check_input(x, name)
        h = encoded(encoder, x, is_part=rows is not None)
        if not isinstance(h, Tensor) or tuple(h.shape) != (count, dim):
            got = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
            letters = "N, D" if rows is None else "n, D"
            raise ValueError(f"encoder {name!r} must return shape [{letters}] = [{count}, {dim}], got {got}")
        if present is not None:
            h = h.masked_fill(~present[:, None], 0.0)
        return h if rows is None else h.new_zeros(num_samples, dim).index_copy(0, rows, h)

    def _check_coalition(self, name: str, value: Any) -> int:
        # int first: torch.compile cannot ask an int it traces as a symbol for __index__.
        if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        index = int(value)
        upper = num_coalitions(len(self.modalities))
        if not 0 <= index < upper:
            raise ValueError(f"{name} must lie in [0, 2^M) = [0, {upper}), got {index}")
        return index

    def _members(
        self,
        coalitions: Sequence[int] | Tensor,  # [L]
        device: torch.device,
    ) -> Tensor:  # bool [L, M]
        if not isinstance(coalitions, Tensor):
            indices = [self._check_coalition(f"coalitions[{i}]", s) for i, s in enumerate(coalitions)]
            # As Python's integers, which hold more than 63 modalities.
            rows = [[contains(s, m) for m in range(len(self.modalities))] for s in indices]
            shape = (len(indices), len(self.modalities))
            return torch.tensor(rows, dtype=torch.bool, device=device).reshape(shape)
        if coalitions.is_floating_point() or coalitions.is_complex() or coalitions.dtype == torch.bool:
            raise TypeError(f"coalitions must have an integer dtype, got {dtype_name(coalitions.dtype)}")
        if coalitions.dim() != 1:
            raise ValueError(f"coalitions must have shape [L], got {list(coalitions.shape)}")
        if coalitions.device.type == "cpu" and coalitions.numel():
            low, high = torch.aminmax(coalitions)
            self._check_coalition("coalitions", int(low))
            self._check_coalition("coalitions", int(high))
        return members(coalitions, len(self.modalities), device)


def _zeroed(
    h: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    # Not zeros_like: the encoder stays in the graph with a zero gradient, also where its features overflowed.
    return h.masked_fill(h.new_ones((), dtype=torch.bool), 0.0)


def _check_one_of(coalition: object, present: object) -> None:
    if coalition is not None and present is not None:
        raise ValueError("coalition and present exclude each other, got both")


def _check_modality_name(name: object) -> None:
    """Raise unless `name` can be a key of a batch, of a ModuleDict and of a state dict."""
    if not isinstance(name, str):
        raise TypeError(f"modality names must be str, got {type(name).__name__}")
    if not name or is_reserved(name):
        raise ValueError(
            "modality names must not be empty, 'label', 'group' or 'split', contain '.' or end in "
            f"'__present', got {name!r}"
        )
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"modality names must not be attributes of torch.nn.ModuleDict, got {name!r}")
