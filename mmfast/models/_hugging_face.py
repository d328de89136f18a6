"""Models, tokenizers and processors of transformers: found in a folder or on the Hub, loaded, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmfast.errors import describe, needs_train

# What a name begins with that means a model of transformers.
PREFIX = "hf:"
# What models call their input, and of what it is.
KINDS = {"input_ids": "text", "pixel_values": "image", "input_values": "sound", "input_features": "sound"}
# Settings whose draws leave out layers or patches, also in eval mode, or are numpy's, of which a resumed run
# knows nothing; and the cache of keys and values, which serves generation.
_OFF: dict[str, Any] = {
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "mask_ratio": 0.0,
    "use_cache": False,
}
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LOADERS = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "sound": "AutoFeatureExtractor"}


def is_pretrained(name: object) -> bool:
    """Whether a name means a model of transformers: "hf:<name or folder>"."""
    return isinstance(name, str) and name.startswith(PREFIX)


def load_backbone(source: str, dtype: torch.dtype) -> tuple[Any, bool]:
    """Return the model of a folder or of the Hub, and whether each weight of its pooler was there.

    Of an encoder-decoder it is the encoder. What leaves out layers, sound or patches at random is off.

    Args:
        source: "hf:<name or folder>".
        dtype: of its parameters.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such model, or it cannot be downloaded.
        ValueError: it cannot be loaded, for it needs code of its own, say, or has weights of another model.
    """
    with needs_train(f'encoder "{PREFIX}..."', "hf"):
        from transformers import AutoConfig, AutoModel

    config = _loaded(source, "model", AutoConfig.from_pretrained)
    for name, value in _OFF.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model, found = _loaded(
        source, "model", AutoModel.from_pretrained, config=config, dtype=dtype, output_loading_info=True
    )
    missing = [name for name in found["missing_keys"] if "pooler" not in name]
    # Of few transformers tells in its log, by names.
    if len(missing) > (total := len(model.state_dict())) // 2:
        raise ValueError(
            f"model of {source!r} must be saved with its weights, got none for {len(missing)} of the {total} "
            f"of a {type(model).__name__}"
        )
    has_pooler = len(missing) == len(found["missing_keys"])
    if getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model, has_pooler


def load_processor(source: str, kind: str) -> Any:
    """Return the tokenizer ("text"), image processor ("image") or feature extractor ("sound") of a model.

    Raises:
        ImportError, OSError, ValueError: as `load_backbone`.
    """
    loader = _LOADERS[kind]
    with needs_train(f'encoder "{PREFIX}..."', "hf"):
        import transformers

    folder = Path(_place(source))
    if kind == "text" and folder.is_dir() and not any(map(_is_of_tokenizer, folder.iterdir())):
        # Of nothing transformers makes a tokenizer that knows no word.
        raise FileNotFoundError(
            f"{source!r} must hold a tokenizer, got none: tokenizer.save_pretrained puts it there"
        )
    return _loaded(source, loader.removeprefix("Auto"), getattr(transformers, loader).from_pretrained)


def _is_of_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model"


def _loaded(source: str, what: str, load: Callable[..., Any], **options: Any) -> Any:
    """Return what a function of transformers loads; what it refuses comes as one sentence."""
    place = _place(source)
    try:
        # Without the answer transformers asks on the terminal, and waits.
        return load(place, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        where = "found in its folder" if Path(place).is_dir() else "found here or downloaded"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{what} of {source!r} must be {where}, got from transformers: {reason}") from error


def _place(source: str) -> str:
    """Return the folder or the name on the Hub that a source means; raise for what can be neither."""
    if not is_pretrained(source):
        raise ValueError(f'source must be "{PREFIX}<name or folder>", got {describe(source)}')
    name = source.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source!r} must be the folder of a model, got one without config.json")
        return str(folder)
    if not _REPOSITORY.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"{source!r} must name a folder or a model of the Hub, got no such folder")
    return name
