"""Texts, pictures and waveforms as samples: batches by processors, in workers too; training on them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import mmfast
from mmfast.data import with_processors
from mmfast.models import build_model
from support import pretrained

transformers = pretrained.transformers

TEXTS = ["a red ball", "the box", "a blue ball on the box", "green"]


def picture(number):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def sample(number, **others):
    wave = np.sin(np.arange(300 + 50 * (number % 3)) * 0.1 * (1 + number % 2)).astype(np.float32)
    return {"text": TEXTS[number % 4], "image": picture(number), "sound": wave, "label": number % 2} | others


def processors(**options):
    return with_processors(
        {
            "text": pretrained.tokenizer(),
            "image": pretrained.image_processor(),
            "sound": pretrained.feature_extractor(),
        },
        **options,
    )


def test_a_batch_is_what_the_processors_make():
    batch = processors()([sample(number) for number in range(3)])
    assert batch["label"].tolist() == [0, 1, 0]
    tokens = pretrained.tokenizer()(TEXTS[:3], padding=True, return_tensors="pt")
    assert set(batch["text"]) == set(tokens)
    assert torch.equal(batch["text"]["input_ids"], tokens["input_ids"])
    assert batch["text"]["attention_mask"].sum(1).tolist() == [3, 2, 6]
    pixels = pretrained.image_processor()([picture(number) for number in range(3)], return_tensors="pt")
    assert torch.equal(batch["image"], pixels["pixel_values"])
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["sound"]["attention_mask"].sum(1).tolist() == [300, 350, 400]
    assert batch["sound"]["input_values"].shape == (3, 400)


def test_what_a_sample_lacks_is_told_by_rows():
    lacking = {"text": None, "text__present": False}
    batch = processors()([sample(0), sample(1, **lacking), sample(2)])
    assert batch["text__present"].tolist() == [True, False, True]
    assert batch["text.rows"].tolist() == [0, 2]
    assert len(batch["text"]["input_ids"]) == 2
    assert "image.rows" not in batch
    none = processors()([sample(1, **lacking), sample(3, **lacking)])
    assert none["text.rows"].tolist() == []
    assert "text" not in none
    # A sample without the key, as where it was not read, has nothing to be processed.
    part = {key: value for key, value in sample(1).items() if key != "image"}
    batch = processors()([sample(0), part])
    assert batch["image.rows"].tolist() == [0]
    assert "image__present" not in batch


def test_marks_of_some_samples_are_those_of_all():
    batch = processors()([sample(0), sample(1, text__present=True)])
    assert batch["text__present"].tolist() == [True, True]
    assert "text.rows" not in batch


def test_lengths_are_cut():
    batch = processors(max_length={"text": 2, "sound": 320})([sample(0), sample(2)])
    assert batch["text"]["attention_mask"].sum(1).tolist() == [2, 2]
    assert batch["sound"]["attention_mask"].sum(1).tolist() == [300, 320]
    batch = processors(max_length=4)([sample(0), sample(2)])
    assert batch["text"]["attention_mask"].sum(1).tolist() == [3, 4]
    assert batch["sound"]["attention_mask"].sum(1).tolist() == [300, 400]
    limited = pretrained.tokenizer()
    limited.model_max_length = 5
    assert with_processors({"text": limited})([sample(2)])["text"]["input_ids"].shape == (1, 5)


def test_all_else_goes_through_another_collate_fn():
    make = with_processors({"text": pretrained.tokenizer()}, collate_fn=mmfast.data.pad)
    batch = make([{"text": text, "ids": [1] * n, "label": 0} for text, n in (("red", 2), ("the box", 3))])
    assert batch["ids"]["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["text"]["input_ids"].shape == (2, 2)
    assert make.takes_parts
    assert not with_processors({"text": pretrained.tokenizer()}, collate_fn=lambda samples: {}).takes_parts


def test_a_function_is_a_processor():
    make = with_processors({"text": lambda texts: torch.tensor([[float(len(text))] for text in texts])})
    assert make([sample(0), sample(3)])["text"].tolist() == [[10.0], [5.0]]


def test_whisper_keeps_its_own_length():
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    batch = with_processors({"sound": extractor})([sample(0), sample(1)])
    assert batch["sound"]["input_features"].shape == (2, 8, 100)
    assert batch["sound"]["attention_mask"].sum(1).tolist() == [2, 3]


def test_an_extractor_of_spectrograms_keeps_its_own_length():
    extractor = transformers.ASTFeatureExtractor(max_length=16, num_mel_bins=8)
    assert with_processors({"sound": extractor})([sample(0), sample(1)])["sound"].shape == (2, 16, 8)


def test_pictures_of_one_channel_become_those_of_three():
    grey = picture(0).convert("L")
    batch = processors()([sample(0, image=grey), sample(1, image=np.asarray(picture(1)))])
    assert batch["image"].shape == (2, 3, 16, 16)


def test_it_goes_to_other_processes():
    before = processors(max_length=4)
    batch, again = (make([sample(0), sample(2)]) for make in (before, pickle.loads(pickle.dumps(before))))
    assert torch.equal(batch["text"]["input_ids"], again["text"]["input_ids"])
    assert repr(with_processors({"text": pretrained.tokenizer()}, max_length=4)) == (
        "with_processors(text: TokenizersBackend for text, max_length=4)"
    )


@pytest.mark.parametrize(
    ("processors", "options", "error", "expected"),
    [
        ({"text": 3}, {}, TypeError, "processor of text must be one of transformers' or a function, got 3"),
        (3, {}, TypeError, "processors must map modality names to processors, got 3"),
        ({"text": len}, {"max_length": 0}, ValueError, "max_length must be an integer of at least 1, got 0"),
        ({"text": len}, {"max_length": {"sound": 3}}, ValueError, "max_length must name modalities among"),
        (build_model({"text": [3]}, 2), {}, ValueError, "model must have a PretrainedEncoder"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_processor_is_refused(processors, options, error, expected):
    with pytest.raises(error, match=f"^{expected}"):
        with_processors(processors, **options)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("text", None, "text of a sample must be a str, got None: mark .* by 'text__present'"),
        ("image", None, r"image of a sample must be a picture \[H, W, C\] or \[C, H, W\], got None"),
        ("sound", np.zeros((2, 300)), r"sound of a sample must be a waveform \[t\]"),
    ],
)  # fmt: skip
def test_other_values_are_refused(key, value, expected):
    with pytest.raises(TypeError, match=f"^{expected}"):
        processors()([sample(0), sample(1, **{key: value})])


def test_a_tokenizer_without_a_pad_token_is_refused():
    bare = pretrained.tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="tokenizer of text must have a pad token, got none: tokenizer"):
        with_processors({"text": bare})([sample(0)])


def test_another_sampling_rate_is_refused():
    with pytest.raises(ValueError, match="8000"):
        processors(sampling_rate=8000)([sample(0)])


class Samples:
    """Texts whose colour, and pictures whose brightness, tell the label; every fifth lacks its text."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        label = index % 2
        rng = np.random.default_rng(index)
        image = rng.integers(0, 120, (16, 16, 3)) + 120 * label
        text = f"{'a' if index % 3 else 'the'} {'red' if label else 'blue'} ball" + " on" * (index % 4)
        found = {"text": text, "image": Image.fromarray(image.astype(np.uint8)), "label": label}
        return found | ({"text": None, "text__present": False} if index % 5 == 4 else {"text__present": True})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    quiet = {"hidden_dropout_prob": 0.1}
    return {
        "text": pretrained.saved(root / "bert", pretrained.bert, **quiet),
        "image": pretrained.saved(root / "vit", pretrained.vit),
    }


def fitted(folders, method, *, freeze, seed=0, **options):
    torch.manual_seed(seed)
    model = build_model(folders, 2, dim=8, freeze=freeze)
    before = {name: p.clone() for name, p in model.named_parameters()}
    settings = {"max_epochs": 3, "batch_size": 8, "lr": 3e-3}
    trainer = mmfast.Trainer(method, collate_fn=with_processors(model), **{**settings, **options})
    learner = trainer.fit(model, Samples(40), Samples(20))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return trainer, learner, moved


@pytest.mark.parametrize("freeze", [False, True])
def test_training_with_texts_and_pictures(folders, freeze):
    trainer, learner, moved = fitted(folders, "joint", freeze=freeze, max_epochs=4)
    backbones = {name for name in moved if ".backbone." in name}
    assert bool(backbones) is not freeze
    assert {"encoders.text.projection.weight", "encoders.image.projection.weight"} <= moved
    assert trainer.test(learner.model, Samples(30)).accuracy > 0.9
    phi = mmfast.valuate(learner, Samples(10), collate_fn=trainer.reader.collate_fn).contributions
    assert torch.equal(phi[[4, 9], 0], torch.zeros(2))


@pytest.mark.parametrize("method", ["di-mml", "mla", "sample-valuation"])
def test_methods_of_other_steps_train_with_them(folders, method):
    _, learner, moved = fitted(folders, method, freeze=method == "di-mml", max_epochs=2)
    assert any(name.startswith("encoders.text") for name in moved)
    assert not any(p.isnan().any() for p in learner.parameters())


def test_relearning_leaves_what_is_frozen(folders):
    method = mmfast.methods.DiagnoseRelearn(epochs=(0,), num_init=1, reset_running_stats=True)
    trainer, _, moved = fitted(folders, method, freeze=True, max_epochs=2)
    assert not any(".backbone." in name for name in moved)
    assert set(trainer.history[0]["method"]) == {f"{what}_{m}" for what in ("gap", "alpha") for m in folders}


def test_workers_change_no_result(folders):
    here, there = (fitted(folders, "joint", freeze=True, num_workers=n, max_epochs=1)[1] for n in (0, 2))
    for name, value in here.state_dict().items():
        assert torch.equal(value, there.state_dict()[name]), name


def test_a_run_goes_on_from_its_checkpoint(folders, tmp_path):
    whole = fitted(folders, "joint", freeze=False, max_epochs=3)[1]

    def stop(entry):
        if entry["epoch"] == 1:
            raise KeyboardInterrupt

    options = {"freeze": False, "max_epochs": 3, "out_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fitted(folders, "joint", on_epoch=stop, **options)
    model = build_model(folders, 2, dim=8)
    settings = {"max_epochs": 3, "batch_size": 8, "lr": 3e-3, "out_dir": tmp_path}
    trainer = mmfast.Trainer("joint", collate_fn=with_processors(model), **settings)
    trainer.fit(model, Samples(40), Samples(20), resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    again = build_model(folders, 2, dim=8)
    trainer.restore(again)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
