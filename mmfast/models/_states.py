"""What a model of transformers gives for a sample: whether it can be an encoder, how wide, pooled how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.errors import check_one_of

# No model needs more of a waveform than this for one state.
_MOST_WINDOW = 2**16
POOLINGS = {
    "text": ("mean", "cls", "pooler"),
    "image": ("mean", "cls", "pooler"),
    "sound": ("mean", "pooler"),
}


def choose(source: str, kind: str, pooling: str | None, found: Any, has_pooler: bool) -> tuple[int, str]:
    """Return the width of the pooled states, and what pools them; raise where the model cannot."""
    states, pooled = getattr(found, "last_hidden_state", None), getattr(found, "pooler_output", None)
    if states is None:
        raise ValueError(f"{source!r} must give last_hidden_state, got {', '.join(found) or 'nothing'}")
    if pooling is None:
        pooling = "pooler" if kind == "image" and pooled is not None and has_pooler else "mean"
    check_one_of(f"pooling of {source!r}", pooling, POOLINGS[kind], quoted=True)
    if pooling == "pooler" and (pooled is None or not has_pooler):
        missing = "a model without one" if pooled is None else "none of its weights"
        others = " or ".join(map(repr, POOLINGS[kind][:-1]))
        raise ValueError(f"pooling of {source!r} must be {others} without a trained pooler, got {missing}")
    if pooling == "cls" and states.dim() == 4:
        raise ValueError(f"pooling of {source!r} must be 'mean' or 'pooler' for a map of states, got 'cls'")
    if pooling == "pooler":
        assert pooled is not None
        return pooled.flatten(1).shape[1], pooling
    return states.shape[1 if states.dim() == 4 else -1], pooling


@torch.no_grad()
def probed(backbone: Any, source: str) -> Any:
    """Return what the model makes of one sample of zeros; raise ValueError where it takes none alone."""
    try:
        return backbone.eval()(**{backbone.main_input_name: _example(backbone)})
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source!r} must encode {backbone.main_input_name} alone, got from {type(backbone).__name__}: "
            f"{reason}"
        ) from error


def most_positions(backbone: Any) -> int | None:
    """Return how many positions a model tells apart, None where it does not say."""
    most = getattr(backbone.config, "max_position_embeddings", None)
    for name, module in backbone.named_modules():
        if most is not None and name.endswith("position_embeddings"):
            # RoBERTa and its kin count positions from behind that of padding.
            padding = getattr(module, "padding_idx", None)
            return most if padding is None else most - padding - 1
    return most


def window_of(backbone: Any) -> int:
    """Return how many values of a waveform one state is made of, 1 where the model does not shorten them."""
    shorten = getattr(backbone, "_get_feat_extract_output_lengths", None)
    if backbone.main_input_name != "input_values" or shorten is None:
        return 1
    lengths = shorten(torch.arange(1, _MOST_WINDOW, device="cpu"))
    return int((lengths >= 1).int().argmax()) + 1


def _example(backbone: Any) -> Tensor:
    """Return one sample of zeros that fits a model's configuration."""
    config, name = backbone.config, backbone.main_input_name
    p = next(backbone.parameters())
    if name == "input_ids":
        return torch.zeros(1, 2, dtype=torch.int64, device=p.device)
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape: tuple[int, ...] = (1, getattr(config, "num_channels", 3), height, width)
    elif hasattr(config, "feature_projection_input_dim"):
        shape = (1, 100, config.feature_projection_input_dim)
    elif hasattr(config, "max_source_positions"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
    elif hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        shape = (1, config.max_length, config.num_mel_bins)
    else:
        shape = (1, 16000)
    return torch.zeros(shape, dtype=p.dtype, device=p.device)
