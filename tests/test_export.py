"""Predictions as files of torch.export and ONNX: what they give, without mmfast, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mmfast
from mmfast import export, methods
from mmfast.data import ArrayDataset
from mmfast.models import FUSION_HEADS, build_model
from support.learners import NUM_CLASSES, bind, make_data

KINDS = ("pt2", "onnx")


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    if request.param == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    return tmp_path / "files" / f"model.{request.param}"


def runner(path):
    """Return what runs a file, and its note."""
    if path.suffix == ".pt2":
        note = {"mmfast.json": ""}
        module = torch.export.load(path, extra_files=note).module()
        return module, json.loads(note["mmfast.json"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs, present):
        given = {name: x.numpy() for name, x in {**inputs, "present": present}.items()}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run, json.loads(session.get_modelmeta().custom_metadata_map["mmfast.json"])


def predicted(learner, inputs, present):
    """Return the logits of a learner for what a file is given."""
    marks = {f"{name}__present": present[:, m] for m, name in enumerate(learner.modalities)}
    with torch.no_grad():
        return learner.eval().predict(inputs | marks).float()


# Those that predict in ways of their own, of which each is tried in ONNX, too.
OWN = ("joint", "unimodal", "ensemble", "di-mml", "mla")


@pytest.mark.parametrize("path", ["pt2"], indirect=True)
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name not in OWN])
def test_a_method_predicts_as_in_python(name, path):
    compare(name, path)


@pytest.mark.parametrize("name", OWN)
def test_a_method_with_a_prediction_of_its_own_predicts_as_in_python(name, path):
    compare(name, path)


def compare(name, path):
    learner = bind(name, num_modalities=3, seed=3)
    learner.start_stage(learner.stages(4)[-1])
    if name == "unimodal":
        learner.score.copy_(torch.tensor([0.2, 0.9, 0.4]))
    before = {key: value.clone() for key, value in learner.state_dict().items() if torch.is_tensor(value)}
    assert learner.export(path, make_data(4, 3)[:]) == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert learner.training
    assert all(
        torch.equal(value, before[key]) for key, value in learner.state_dict().items() if key in before
    )
    run, note = runner(path)
    assert note == {
        "modalities": ["m0", "m1", "m2"],
        "classes": None,
        "inputs": ["m0", "m1", "m2", "present"],
        "standardizes": [],
    }
    for size in (1, 2, 8, 33):
        inputs = {f"m{m}": torch.randn(size, 5) for m in range(3)}
        present = (torch.arange(size)[:, None] >> torch.arange(3) & 1) == 0
        # What lies in the place of an absent modality is nothing.
        given = {
            f"m{m}": x.masked_fill(~present[:, m, None], torch.nan) for m, x in enumerate(inputs.values())
        }
        found = run(given, present)
        torch.testing.assert_close(found, predicted(learner, inputs, present), rtol=1e-5, atol=1e-5)


FUSED = [(name, "pt2") for name in FUSION_HEADS if name not in ("concat", "attention")]


@pytest.mark.parametrize(
    ("fusion", "path"), [*FUSED, ("attention", "pt2"), ("attention", "onnx")], indirect=["path"]
)
def test_every_fusion_head(fusion, path):
    check_model({"m0": (4,), "m1": (3,)}, path, fusion=fusion)


def test_every_encoder(path):
    shapes = {"vector": (4,), "sequence": (6, 3), "steps": (4, 2), "image": (1, 8, 8), "video": (2, 1, 8, 8)}
    check_model(shapes, path, encoders={"steps": "gru"})


def check_model(shapes, path, **options):
    torch.manual_seed(0)
    learner = methods.Joint().bind(build_model(shapes, NUM_CLASSES, dim=8, **options))
    example = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    learner.export(path, example)
    run, _ = runner(path)
    inputs = {name: torch.randn(5, *shape) for name, shape in shapes.items()}
    present = torch.rand(5, len(shapes)) < 0.6
    torch.testing.assert_close(
        run(inputs, present), predicted(learner, inputs, present), rtol=1e-4, atol=1e-4
    )


class Text(nn.Module):
    """Words through a layer of attention, averaged where the mask says so."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

    def forward(self, text):
        mask = text["mask"].clone()
        mask[:, 0] = True
        h = self.layer(self.words(text["ids"]), src_key_padding_mask=~mask)
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) * text["by"]["scale"]


def texts(size: int) -> dict:
    ids = torch.randint(20, (size, 6))
    return {"ids": ids, "mask": torch.rand(size, 6) < 0.7, "by": {"scale": 2.0, "note": None}}


def test_nests_become_inputs_by_name(path):
    torch.manual_seed(0)
    model = mmfast.MultimodalModel({"text": Text(), "a": nn.Linear(5, 8)}, dim=8, num_classes=3)
    learner = methods.Joint().bind(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    learner.export(path, {"text": texts(3), "a": torch.randn(3, 5), "author": ["x"] * 3})
    assert torch.backends.mha.get_fastpath_enabled() == fast
    run, note = runner(path)
    assert note["inputs"] == ["text.ids", "text.mask", "a", "present"]
    text, a = texts(7), torch.randn(7, 5)
    present = torch.rand(7, 2) < 0.6
    found = run({"text.ids": text["ids"], "text.mask": text["mask"], "a": a}, present)
    expected = predicted(learner, {"text": text, "a": a}, present)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_data_sets_as_examples_may_lack_modalities_of_nests(tmp_path):
    model = mmfast.MultimodalModel({"text": Text(), "a": nn.Linear(5, 8)}, dim=8, num_classes=3)
    learner = methods.Joint().bind(model)
    one = {key: value[0] if isinstance(value, torch.Tensor) else value for key, value in texts(1).items()}
    samples = [
        {"text": None, "text__present": False, "a": torch.randn(5)},
        {"text": one | {"by": {"scale": torch.ones(8)}}, "text__present": True, "a": torch.randn(5)},
    ]
    learner.export(tmp_path / "m.pt2", samples)
    with pytest.raises(ValueError, match="example must hold samples with text, as tensors"):
        learner.export(tmp_path / "m.pt2", samples[:1])


def test_a_file_standardises_raw_inputs_and_knows_its_classes(path):
    pytest.importorskip("lightning_fabric")
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    arrays = {
        "a": rng.normal(size=(90, 4)) * 30 + 500 + labels[:, None],
        "clip": rng.normal(size=(90, 5, 3)) * 0.01 - labels[:, None, None],
    }
    arrays["a"][:, 2] = 7
    raw = mmfast.data.Splits.from_arrays(arrays, labels, class_names=["x", "y", "z"], standardize=False)
    scaled = raw.standardize()
    trainer = mmfast.Trainer("joint", max_epochs=1, accelerator="cpu")
    learner = trainer.fit(build_model(raw.shapes, 3, dim=8), scaled.train, scaled.val)
    expected = learner.predict(raw.test).logits
    present = torch.ones(len(raw.test), 2, dtype=torch.bool)
    for standardized, part in ((False, raw.test), (True, scaled.test))[: 1 + (path.suffix == ".pt2")]:
        learner.export(path, standardized=standardized)
        run, note = runner(path)
        torch.testing.assert_close(run(part.arrays, present), expected, rtol=1e-4, atol=1e-4)
        assert note["classes"] == ["x", "y", "z"]
        assert note["standardizes"] == ([] if standardized else ["a", "clip"])
    with pytest.raises(ValueError, match="a must have 4 features or channels"):
        learner.export(path, {"a": torch.randn(2, 5), "clip": torch.randn(2, 5, 3)})


def test_a_file_runs_where_mmfast_is_not_installed(tmp_path):
    # Of its prediction an op of mmfast's own is the end.
    learner = bind("di-mml")
    learner.start_stage(learner.stages(2)[-1])
    learner.export(tmp_path / "m.pt2", make_data(4)[:])
    inputs = {"m0": torch.randn(6, 5), "m1": torch.randn(6, 5)}
    present = torch.tensor([[1, 1], [1, 0], [0, 1]] * 2).bool()
    torch.save((inputs, present), tmp_path / "given.pt")
    program = """
import sys
sys.modules["mmfast"] = None
import torch
inputs, present = torch.load("given.pt")
torch.save(torch.export.load("m.pt2").module()(inputs, present), "logits.pt")
assert not [name for name in dir(torch.ops) if name == "mmfast"]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, predicted(learner, inputs, present), rtol=1e-5, atol=1e-5)


def test_weights_in_half_precision_are_computed_with_in_float32(path):
    learner = bind("joint").to(torch.bfloat16)
    learner.export(path, make_data(4)[:])
    run, _ = runner(path)
    inputs, present = make_data(6)[:], torch.ones(6, 2, dtype=torch.bool)
    found = run({"m0": inputs["m0"], "m1": inputs["m1"]}, present)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, learner.float().eval().predict(inputs), rtol=1e-5, atol=1e-5)
    assert next(bind("joint").parameters()).dtype == torch.float32


# What is refused


def of_encoder(encoder: nn.Module):
    model = mmfast.MultimodalModel({"m0": encoder, "m1": nn.Linear(5, 8)}, dim=8, num_classes=3)
    return methods.Joint().bind(model)


class Waiting(nn.Linear):
    """Asks what its numbers are."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Special(nn.Linear):
    """Uses what ONNX has not."""

    def forward(self, x):
        return super().forward(torch.special.bessel_j0(x))


def test_errors_say_what_was_expected(tmp_path):
    example, learner = make_data(4)[:], bind("joint")
    with pytest.raises(ValueError, match=r"path must be one of \.pt2, \.onnx, got '\.pth'"):
        learner.export(tmp_path / "m.pth", example)
    with pytest.raises(ValueError, match="example must be given, a batch or a data set"):
        learner.export(tmp_path / "m.pt2")
    with pytest.raises(TypeError, match="example must be a batch or a data set, got 3"):
        learner.export(tmp_path / "m.pt2", 3)
    with pytest.raises(ValueError, match="example must hold samples with m1, as tensors, got 'm0'"):
        learner.export(tmp_path / "m.pt2", {"m0": example["m0"]})
    with pytest.raises(ValueError, match="example must hold at least one sample, got none"):
        learner.export(tmp_path / "m.pt2", {key: x[:0] for key, x in example.items()})
    with pytest.raises(ValueError, match=r"the model must be such that torch\.export can follow it: "):
        of_encoder(Waiting(5, 8)).export(tmp_path / "m.pt2", example)
    named = methods.Joint().bind(build_model({"present": (5,)}, 3, dim=4))
    with pytest.raises(ValueError, match="no modality may be called 'present'"):
        named.export(tmp_path / "m.pt2", {"present": torch.randn(2, 5)})
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_onnx_has_not_is_named(tmp_path):
    pytest.importorskip("onnxscript")
    learner = of_encoder(Special(5, 8))
    with pytest.raises(ValueError, match=r"operators that ONNX has, got prims\.bessel_j0, which it has"):
        learner.export(tmp_path / "m.onnx", make_data(4)[:])
    learner.export(tmp_path / "m.pt2", make_data(4)[:])
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    text = rf'export to \.onnx needs {package}, which is not installed: pip install "mmfast\[export\]"'
    with pytest.raises(ImportError, match=text):
        bind("joint").export(tmp_path / "m.onnx", make_data(4)[:])


def test_without_the_runtime_a_file_is_written_and_a_warning_given(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match=r"onnxruntime is not installed, so m\.onnx was not checked"):
        bind("joint").export(tmp_path / "m.onnx", make_data(4)[:])
    assert (tmp_path / "m.onnx").exists()


def test_a_file_that_predicts_otherwise_is_not_written(tmp_path, monkeypatch):
    learner = bind("mla")
    learner.export(tmp_path / "m.pt2", make_data(4)[:])
    before = (tmp_path / "m.pt2").read_bytes()
    # As if an op's plain form gave something else than its kernel.
    table = dict(export.FUNCTIONS["logit_fusion_fwd"])
    real = table["reference"]

    def wrong(logits, present, score, temperature):
        fused, weights = real(logits, present, score, temperature)
        return fused * torch.where(present.all(0)[:, None], 1.0, 1.01), weights

    monkeypatch.setitem(export.FUNCTIONS, "logit_fusion_fwd", table | {"reference": wrong})
    with pytest.raises(ValueError, match=r"must predict as the model does, .* modalities m\d: it is not"):
        learner.export(tmp_path / "m.pt2", make_data(4)[:])
    assert (tmp_path / "m.pt2").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


def test_weights_in_float64_stay(tmp_path):
    learner = bind("joint").double()
    learner.shapes = {"m0": (5,), "m1": (5,)}
    run, _ = runner(learner.export(tmp_path / "m.pt2"))
    inputs = {name: x.double() for name, x in make_data(6).arrays.items()}
    present = torch.ones(6, 2, dtype=torch.bool)
    torch.testing.assert_close(run(inputs, present), predicted(learner, inputs, present))


def test_unlabelled_arrays_are_an_example(tmp_path):
    assert bind("ensemble").export(tmp_path / "m.pt2", ArrayDataset(make_data(4).arrays)).exists()
