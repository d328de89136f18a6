"""Small models of transformers with random weights, saved to folders with tokenizers and processors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing is to be downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "ball", "box", "a", "the", "on"]
_TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
_CONVOLUTIONS = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
}
_POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **_TINY, **options)
    return transformers.BertModel(config)


def roberta() -> Any:
    config = transformers.RobertaConfig(vocab_size=12, max_position_embeddings=24, pad_token_id=1, **_TINY)
    return transformers.RobertaModel(config)


def gpt2() -> Any:
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    config = transformers.GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=24, **ends)
    return transformers.GPT2Model(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5Model(config)


def vit(**options: Any) -> Any:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **_TINY), **options)


def convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1], image_size=32)
    return transformers.ConvNextModel(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1])
    return transformers.ResNetModel(config)


def wav2vec2(norm: str = "layer") -> Any:
    config = transformers.Wav2Vec2Config(feat_extract_norm=norm, **_TINY, **_CONVOLUTIONS, **_POSITIONS)
    return transformers.Wav2Vec2Model(config)


def wav2vec2_bert() -> Any:
    config = transformers.Wav2Vec2BertConfig(feature_projection_input_dim=12, **_TINY)
    return transformers.Wav2Vec2BertModel(config)


def mae() -> Any:
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(image_size=16, patch_size=8, **_TINY))


def whisper() -> Any:
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 20}
    layers = {
        f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=12, d_model=16, max_target_positions=8, **sizes, **layers, **ends
    )
    return transformers.WhisperModel(config)


def ast() -> Any:
    strides = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    config = transformers.ASTConfig(max_length=32, num_mel_bins=16, **_TINY, **strides)
    return transformers.ASTModel(config)


def clip() -> Any:
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    text = {"vocab_size": 12, **_TINY, **ends}
    vision = {"image_size": 16, "patch_size": 8, **_TINY}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def tokenizer() -> Any:
    """Return one that splits at spaces; it says nothing of how long texts may be."""
    known = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    known.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def image_processor() -> Any:
    return transformers.ViTImageProcessor(size={"height": 16, "width": 16})


def feature_extractor() -> Any:
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)


PROCESSORS = {bert: tokenizer, t5: tokenizer, vit: image_processor, wav2vec2: feature_extractor}


def saved(folder: Path, make: Callable[..., Any], **options: Any) -> str:
    """Save a model of random weights, with its processor if there is one; return "hf:<folder>"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(**options)
        for p in model.parameters():
            # Weights that begin at zero would hide what reaches them.
            p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    if make in PROCESSORS:
        PROCESSORS[make]().save_pretrained(folder)
    return f"hf:{folder}"
