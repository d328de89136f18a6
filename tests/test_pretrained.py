"""Pretrained encoders: transformers' own features, whatever pads them; poolings; frozen; training."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pathlib
import shutil
import sys

import pytest
import torch
from torch import nn

from mmfast.models import FrameMean, MultimodalModel, PretrainedEncoder, build_model, encoder_for
from support import pretrained

transformers = pretrained.transformers


@functools.cache
def folder_of(make, **options):
    return pretrained.saved(FOLDERS / f"{make.__name__}{next(COUNT)}", make, **options)


@pytest.fixture(autouse=True, scope="module")
def _folders(tmp_path_factory):
    global FOLDERS, COUNT
    FOLDERS, COUNT = tmp_path_factory.mktemp("models"), itertools.count()
    yield
    folder_of.cache_clear()


def theirs(make, **options):
    """Return the model as transformers loads it; of an encoder-decoder the encoder."""
    path = folder_of(make, **options).removeprefix("hf:")
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    return model.get_encoder() if model.config.is_encoder_decoder else model


IDS = torch.tensor([[2, 4, 7, 3], [2, 5, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
TEXT = {"input_ids": IDS, "attention_mask": MASK}


def sound(size=400):
    return torch.randn(2, size, generator=torch.Generator().manual_seed(0))


def images(size=16, frames=()):
    return torch.randn(2, *frames, 3, size, size, generator=torch.Generator().manual_seed(0))


# What the model reads, and what is expected of its output.
FORWARD = {
    "bert": (pretrained.bert, TEXT, lambda out: masked_mean(out.last_hidden_state, MASK)),
    "gpt2": (pretrained.gpt2, TEXT, lambda out: masked_mean(out.last_hidden_state, MASK)),
    "t5": (pretrained.t5, TEXT, lambda out: masked_mean(out.last_hidden_state, MASK)),
    "vit": (pretrained.vit, {"pixel_values": images()}, lambda out: out.pooler_output),
    "convnext": (pretrained.convnext, {"pixel_values": images(32)}, lambda out: out.pooler_output),
    "resnet": (pretrained.resnet, {"pixel_values": images(40)}, lambda out: out.pooler_output[..., 0, 0]),
    "wav2vec2": (pretrained.wav2vec2, {"input_values": sound()}, lambda out: out.last_hidden_state.mean(1)),
    "whisper": (
        pretrained.whisper,
        {
            "input_features": torch.randn(2, 8, 40),
            "attention_mask": (torch.arange(40) < 11).repeat(2, 1).long(),
        },
        # Convolutions of stride 2: of 11 frames the first 6.
        lambda out: out.last_hidden_state[:, :6].mean(1),
    ),
    "wav2vec2-bert": (
        pretrained.wav2vec2_bert,
        {
            "input_features": torch.randn(2, 11, 12),
            "attention_mask": (torch.arange(11) < 7).repeat(2, 1).long(),
        },
        lambda out: out.last_hidden_state[:, :7].mean(1),
    ),
    "ast": (
        pretrained.ast,
        {"input_values": torch.randn(2, 32, 16)},
        lambda out: out.last_hidden_state.mean(1),
    ),
}


def masked_mean(h, mask):
    return torch.stack([row[keep.bool()].mean(0) for row, keep in zip(h, mask, strict=True)])


@pytest.mark.parametrize("name", FORWARD)
def test_features_are_those_of_the_model(name):
    make, inputs, expected = FORWARD[name]
    with torch.no_grad():
        wanted = expected(theirs(make).eval()(**inputs))
        encoder = encoder_for(folder_of(make), dim=None).eval()
        torch.testing.assert_close(encoder(inputs), wanted)
        assert encoder.dim == wanted.shape[1]
        narrow = encoder_for(folder_of(make), dim=5).eval()
        torch.testing.assert_close(narrow(inputs), narrow.projection(wanted))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(pretrained.bert, IDS), (pretrained.vit, images()), (pretrained.wav2vec2, sound())],
    ids=["text", "image", "sound"],
)
def test_a_tensor_alone_is_what_is_not_padded(make, inputs):
    encoder = encoder_for(folder_of(make), 5).eval()
    values = {"values": inputs}
    torch.testing.assert_close(encoder(inputs), encoder(values), rtol=0, atol=0)
    if encoder.kind != "image":
        values["mask"] = torch.ones(inputs.shape, dtype=torch.bool)
        torch.testing.assert_close(encoder(inputs), encoder(values))
        # As a sample that lacks the modality is encoded: all zeros.
        values = {"values": torch.zeros_like(inputs), "mask": torch.zeros(inputs.shape, dtype=torch.bool)}
        torch.testing.assert_close(encoder(values), encoder(torch.zeros_like(inputs)))


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_of_texts_changes_no_feature(pooling, training):
    encoder = encoder_for(
        folder_of(pretrained.bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 5
    )
    encoder = PretrainedEncoder(encoder.source, 5, pooling=pooling).train(training)
    ids, mask = torch.cat([IDS, IDS.new_full((2, 3), 9)], 1), torch.cat([MASK, MASK.new_zeros(2, 3)], 1)
    found = encoder({"values": ids, "mask": mask.bool()})
    torch.testing.assert_close(found[:1], encoder(IDS[:1]))
    torch.testing.assert_close(found[1:], encoder(IDS[1:, :3]))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_padding_of_sound_changes_no_feature(norm):
    """Also where the model normalises over time, padding included: it reads one length at a time."""
    encoder = encoder_for(folder_of(pretrained.wav2vec2, norm=norm), 5).eval()
    waves = [sound(size)[row] for size, row in ((400, 0), (231, 0), (400, 1))]
    padded = nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=7.0)
    mask = torch.arange(400) < torch.tensor([[len(wave)] for wave in waves])
    found = encoder({"input_values": padded, "attention_mask": mask.long()})
    for wave, h in zip(waves, found, strict=True):
        torch.testing.assert_close(encoder(wave[None])[0], h)


def test_cls_is_the_state_of_the_first_token():
    encoder = PretrainedEncoder(folder_of(pretrained.bert), pooling="cls").eval()
    states = theirs(pretrained.bert).eval()(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(encoder(IDS), states[:, 0])
    left = {"input_ids": IDS.roll(1, 1), "attention_mask": MASK.roll(1, 1)}
    # Not those of positions 1 to 3, as the model itself has it of a text that another in the batch pads.
    states = [
        theirs(pretrained.bert).eval()(ids).last_hidden_state for ids in (IDS[:1].roll(1, 1), IDS[1:, :3])
    ]
    torch.testing.assert_close(encoder(left), torch.cat([h[:, 0] for h in states]))


@pytest.mark.parametrize("make", [pretrained.bert, pretrained.gpt2, pretrained.roberta, pretrained.t5])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_before_a_text_changes_no_feature(make, pooling):
    encoder = PretrainedEncoder(folder_of(make), 5, pooling=pooling).eval()
    ids, mask = torch.cat([IDS.new_full((2, 3), 9), IDS], 1), torch.cat([MASK.new_zeros(2, 3), MASK], 1)
    alone = torch.cat([encoder(IDS[:1]), encoder(IDS[1:, :3])])
    torch.testing.assert_close(encoder({"input_ids": ids, "attention_mask": mask}), alone)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_padding_before_sound_changes_no_feature(norm):
    encoder = encoder_for(folder_of(pretrained.wav2vec2, norm=norm), 5).eval()
    waves, mask = sound(400), torch.ones(2, 400, dtype=torch.int64)
    mask[1, :170] = 0
    found = encoder({"input_values": waves, "attention_mask": mask})
    torch.testing.assert_close(found, torch.cat([encoder(waves[:1]), encoder(waves[1:, 170:])]))


def test_sound_below_one_window():
    """A recording so short is read with what pads it; one that nothing pads is refused."""
    for norm in ("layer", "group"):
        encoder = encoder_for(folder_of(pretrained.wav2vec2, norm=norm), 5).eval()
        mask = (torch.arange(400) < torch.tensor([[400], [3]])).long()
        found = encoder({"input_values": sound(400) * mask, "attention_mask": mask})
        assert found.isfinite().all()
        encoder(sound(20))
        with pytest.raises(ValueError, match=r"input must have at least T = 20 values, .*, got 19"):
            encoder(sound(19))


def test_positions_behind_that_of_padding_are_fewer():
    encoder = encoder_for(folder_of(pretrained.roberta), 5).eval()
    encoder(IDS.repeat(1, 5))
    with pytest.raises(ValueError, match="input must have at most T = 22 positions, got 24"):
        encoder(IDS.repeat(1, 6))


def test_a_pooler_without_weights_is_not_taken(tmp_path):
    source = pretrained.saved(tmp_path, pretrained.vit, add_pooling_layer=False)
    encoder = encoder_for(source, None).eval()
    assert encoder.pooling == "mean"
    expected = theirs(pretrained.vit)
    states = encoder.backbone(images()).last_hidden_state
    assert states.shape == expected(images()).last_hidden_state.shape
    torch.testing.assert_close(encoder(images()), states.mean(1))
    assert not any(p.requires_grad for name, p in encoder.named_parameters() if "pooler" in name)
    with pytest.raises(ValueError, match="must be 'mean' or 'cls' without a trained pooler, got none of its"):
        PretrainedEncoder(source, pooling="pooler")


def test_frozen_stays_in_eval_mode_and_has_no_gradient():
    encoder = encoder_for(folder_of(pretrained.bert), 5, freeze=True, dropout=0.5)
    encoder.train()
    assert encoder.training
    assert encoder.dropout.training
    assert not any(module.training for module in encoder.backbone.modules())
    encoder(TEXT).sum().backward()
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == {
        "projection.weight",
        "projection.bias",
    }
    assert all(p.grad is None for p in encoder.backbone.parameters())
    assert encoder.projection.weight.grad.abs().sum() > 0


def test_what_is_not_frozen_trains_in_training_mode():
    encoder = encoder_for(folder_of(pretrained.bert), 5)
    assert all(module.training for module in encoder.modules())
    encoder(TEXT).sum().backward()
    assert all(
        p.grad is not None
        for name, p in encoder.named_parameters()
        if "pooler" not in name and p.requires_grad
    )


def test_sound_is_not_masked_at_random_nor_are_layers_left_out():
    encoder = encoder_for(folder_of(pretrained.wav2vec2), 5)
    config = encoder.backbone.config
    assert (config.apply_spec_augment, config.layerdrop) == (False, 0.0)


def test_no_patches_are_left_out_at_random():
    encoder = encoder_for(folder_of(pretrained.mae), None).eval()
    torch.testing.assert_close(encoder(images()), encoder(images()))


def test_other_precisions_are_cast_on_the_way():
    encoder = PretrainedEncoder(folder_of(pretrained.vit), 5, dtype=torch.bfloat16)
    assert encoder.backbone.embeddings.cls_token.dtype == torch.bfloat16
    assert encoder(images()).dtype == torch.float32
    # By the first parameter a reader tells what to cast a model's input to.
    assert next(encoder.parameters()).dtype == torch.float32
    assert PretrainedEncoder(folder_of(pretrained.vit), 5).backbone.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be float32 where dim is None"):
        PretrainedEncoder(folder_of(pretrained.vit), dtype=torch.bfloat16)


def test_a_shape_may_be_given_beside_the_name():
    image, text = folder_of(pretrained.vit), folder_of(pretrained.bert)
    assert encoder_for([3, 16, 16], 5, encoder=image).source == image
    video = encoder_for([4, 3, 16, 16], 5, encoder=image)
    assert isinstance(video, FrameMean)
    assert video(images(frames=(4,))).shape == (2, 5)
    model = build_model(
        {"text": text, "image": [3, 16, 16], "numbers": [6]}, 3, dim=5, encoders={"image": image}, freeze=True
    )
    assert [type(each).__name__ for each in model.encoders.values()] == ["PretrainedEncoder"] * 2 + ["MLP"]
    assert model.encoders["image"].freeze
    logits = model({"text": TEXT, "image": images(), "numbers": torch.randn(2, 6)})
    assert logits.shape == (2, 3)


REFUSED = {
    "rank": ([6], pretrained.vit, {}, r"pixels must have samples \[C, H, W\] or .* for 'hf:.*, got \[6\]"),
    "no prefix": ("bert", None, {}, "pixels must be the shape of a sample, or .*, got 'bert'"),
    "two names": ("hf:any", "mlp", {}, "pixels must be the shape .* got 'hf:any' and encoder 'mlp'"),
    "frozen": ([6], None, {"freeze": True}, "pixels needs encoder = \"hf:<.*>\" for freeze = True, got None"),
    "pooled": ([6], "mlp", {"pooling": "cls"}, "pixels needs encoder = .* for pooling = 'cls', got 'mlp'"),
    "pooling": (pretrained.vit, None, {"pooling": "max"}, "pooling of 'hf:.*' must be one of 'mean', 'cls'"),
    "map": (pretrained.convnext, None, {"pooling": "cls"}, "pooling of 'hf:.*' must be 'mean' or 'pooler'"),
    "several inputs": (pretrained.clip, None, {}, "'hf:.* which takes input_ids and pixel_values"),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "encoder", "options", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(shape, encoder, options, expected):
    shape, encoder = (folder_of(each) if callable(each) else each for each in (shape, encoder))
    with pytest.raises(ValueError, match=f"^{expected}"):
        encoder_for(shape, 5, encoder=encoder, name="pixels", **options)


def test_a_shape_needs_a_dimension():
    with pytest.raises(TypeError, match="dim must be an int, got NoneType"):
        encoder_for([6], None)


@pytest.mark.parametrize(
    ("make", "value", "error", "expected"),
    [
        (pretrained.bert, IDS.float(), TypeError, "text must have an integer dtype, got float32"),
        (pretrained.bert, IDS[0], ValueError, r"text must have shape \[N, T\], got \[4\]"),
        (pretrained.bert, IDS + 9, ValueError, r"text must hold ids in \[0, V\) = \[0, 12\), got 16"),
        (pretrained.bert, IDS.repeat(1, 7), ValueError, "text must have at most T = 24 positions, got 28"),
        (pretrained.bert, {"values": IDS, "mask": MASK[:, :2]}, ValueError, r"mask of text must have shape"),
        (pretrained.bert, {"ids": IDS}, ValueError, "text must hold 'input_ids' .*, got 'ids', of which"),
        (pretrained.bert, {"mask": MASK}, ValueError, "text must hold 'input_ids' .*, got 'mask'$"),
        (pretrained.vit, images()[:, :1], ValueError, r"text must have shape .* = \[N, 3, H, W\], got"),
        (pretrained.wav2vec2, sound().long(), TypeError, "text must have a floating dtype, got int64"),
    ],
)  # fmt: skip
def test_input_that_does_not_fit_is_refused(make, value, error, expected):
    encoder = encoder_for(folder_of(make), 5)
    model = MultimodalModel({"text": encoder}, 5, 2)
    with pytest.raises(error, match=f"^{expected}"):
        model({"text": value})


@contextlib.contextmanager
def offline():
    """Let nothing be downloaded, whatever transformers was imported with."""
    constants = importlib.import_module("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("hf:{}/nothing", FileNotFoundError, "'hf:.*nothing' must name a folder or a .*, got no such folder"),
        ("hf:./nothing", FileNotFoundError, "'hf:./nothing' must name a folder or a model of the Hub"),
        ("hf:", FileNotFoundError, "'hf:' must name"),
        ("hf:{}", FileNotFoundError, "'hf:.*' must be the folder of a model, got one without config.json"),
        ("hf:mmfast-tests/no-such-model", OSError, "model of 'hf:mm.*' must be found here or .*, got .+"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there(tmp_path, name, error, expected):
    with offline(), pytest.raises(error, match=f"^{expected}") as raised:
        encoder_for(name.format(tmp_path), 5)
    assert "\n" not in str(raised.value)


def test_a_folder_without_weights_or_processor(tmp_path):
    theirs(pretrained.gpt2).config.save_pretrained(tmp_path)
    with pytest.raises(
        OSError, match=r"^model of 'hf:.*' must be found in its folder, got from transformers: [^\n]+$"
    ):
        encoder_for(f"hf:{tmp_path}", 5)
    with pytest.raises(FileNotFoundError, match=r"^'hf:.*' must hold a tokenizer, got none: tokenizer\.save"):
        encoder_for(folder_of(pretrained.gpt2), 5).processor()
    with pytest.raises(OSError, match=r"^ImageProcessor of 'hf:.*' must be found in its folder, got [^\n]+$"):
        encoder_for(folder_of(pretrained.convnext), 5).processor()
    for make in pretrained.PROCESSORS:
        encoder = encoder_for(folder_of(make), 5)
        assert encoder.processor().model_input_names[0] == encoder.backbone.main_input_name


def test_weights_of_another_model_are_refused(tmp_path):
    """Which would leave the encoder as it is drawn."""
    theirs(pretrained.bert).config.save_pretrained(tmp_path)
    other = pathlib.Path(folder_of(pretrained.gpt2).removeprefix("hf:"))
    shutil.copy(other / "model.safetensors", tmp_path)
    expected = r"^model of 'hf:.*' must be saved with its weights, got none for 37 of the 39 of a BertModel$"
    with pytest.raises(ValueError, match=expected):
        encoder_for(f"hf:{tmp_path}", 5)


def test_transformers_is_optional(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = r'^encoder "hf:\.\.\." needs transformers, which is not installed: pip install "mmfast\[hf\]"$'
    with pytest.raises(ImportError, match=expected):
        encoder_for("hf:any", 5)
