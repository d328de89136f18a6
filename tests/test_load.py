"""Learners read back from the folders of their runs, for predictions alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")

import torch

import mmfast
from mmfast import methods
from mmfast.data import ArrayDataset
from mmfast.experiments.runs import make_run, restore
from mmfast.experiments.setup import Setup
from mmfast.training import checkpoint
from mmfast.training.optimization import Optimization
from support.learners import NUM_CLASSES, bind, make_data


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    rng = np.random.default_rng(0)
    label = np.arange(90) % 3
    path = tmp_path_factory.mktemp("data") / "two.npz"
    np.savez(
        path,
        label=np.array(["cat", "dog", "owl"])[label],
        pose=rng.normal(size=(90, 4, 3)) + label[:, None, None] + 30,
        audio=rng.normal(size=(90, 5)) - label[:, None],
        other=rng.normal(size=(90, 2)),
        audio__present=rng.random(90) > 0.2,
    )
    return path


@pytest.fixture(scope="module")
def folder(npz, tmp_path_factory):
    """Runs of every method as a comparison lays them down, of two of three modalities."""
    out = tmp_path_factory.mktemp("compare")
    chosen, kinds = ("audio", "pose"), {"pose": "gru"}
    splits = mmfast.data.load(npz, modalities=chosen, encoders=kinds)
    setup = Setup(
        str(npz), splits, Optimization(max_epochs=2), 8, accelerator="cpu", modalities=chosen, encoders=kinds
    )
    for name in methods.METHODS:
        options = {"head_epochs": 2} if name in ("di-mml", "frozen-unimodal") else {}
        make_run(setup, methods.make(name, **options), 0, out / "runs" / f"{name}-seed0")
    return out


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_run_of_commands_is_loaded_without_its_data(folder, npz, name):
    run = folder / "runs" / f"{name}-seed0"
    trainer, splits, _ = restore(run, accelerator="cpu")
    for path in (run, run / "model.ckpt", str(run)):
        learner = mmfast.load(path)
        assert not any(module.training for module in learner.modules())
        assert learner.method == trainer.method
        assert (learner.modalities, learner.class_names) == (("audio", "pose"), ("cat", "dog", "owl"))
        assert learner.shapes == {"audio": (5,), "pose": (4, 3)}
    expected = trainer.learner.predict(splits.test)
    assert torch.equal(learner.predict(splits.test).logits, expected.logits)
    assert torch.equal(learner.predict(splits.test[:]), trainer.learner.predict(splits.test[:]))
    raw = mmfast.data.load(npz, standardize=False, modalities=("audio", "pose"))
    assert torch.equal(learner.predict(raw.test).logits, expected.logits)
    assert expected.labels == [learner.class_names[i] for i in expected.predicted]
    assert all(parameter.requires_grad for parameter in learner.parameters())


def test_a_comparison_names_its_runs(folder):
    for path in (folder, folder / "runs"):
        with pytest.raises(
            FileNotFoundError, match=r"give one of them, such as .*di-mml-seed0, beside"
        ) as got:
            mmfast.load(path)
        assert all(f"{name}-seed0" in str(got.value) for name in methods.METHODS)


def test_nothing_and_what_is_unfinished_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        mmfast.load(tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match="holds an unfinished run"):
        mmfast.load(tmp_path)


def make_model():
    torch.manual_seed(1)
    encoders = {name: torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh()) for name in ("m0", "m1")}
    return mmfast.MultimodalModel(encoders, dim=8, num_classes=NUM_CLASSES)


@pytest.fixture(scope="module")
def of_python(tmp_path_factory):
    """The folder of a run of the trainer with a model of one's own, and its learner."""
    out = tmp_path_factory.mktemp("python")
    train = make_data(60)
    train = ArrayDataset(train.arrays, train.labels, class_names=["x", "y", "z"])
    trainer = mmfast.Trainer("mla", max_epochs=2, out_dir=out, accelerator="cpu")
    return out, trainer.fit(make_model(), train, make_data(30, seed=1))


def test_a_run_of_python_needs_its_model_and_knows_its_classes(of_python):
    out, trained = of_python
    with pytest.raises(ValueError, match=r"model must be given, .* mmfast.Trainer with a model of its own"):
        mmfast.load(out)
    learner = mmfast.load(out, model=make_model())
    assert (learner.class_names, learner.scaling) == (("x", "y", "z"), {})
    assert learner.shapes == {"m0": (5,), "m1": (5,)}
    data = make_data(30, seed=2)
    found = learner.predict(data)
    assert torch.equal(found.logits, trained.predict(data).logits)
    assert set(found.labels) <= {"x", "y", "z"}


def test_a_model_that_is_not_that_of_the_run_is_refused(of_python):
    out, _ = of_python
    with pytest.raises(TypeError, match=r"model must be a mmfast\.MultimodalModel, got Linear"):
        mmfast.load(out, model=torch.nn.Linear(2, 2))
    other = mmfast.models.build_model({"m0": (5,), "image": (5,)}, NUM_CLASSES, dim=8)
    with pytest.raises(ValueError, match="must have the modalities of the checkpoint, m0, m1, got m0, image"):
        mmfast.load(out, model=other)
    smaller = mmfast.models.build_model({"m0": (5,), "m1": (5,)}, NUM_CLASSES, dim=4)
    with pytest.raises(ValueError, match="the checkpoint does not fit the model"):
        mmfast.load(out, model=smaller)
    with pytest.raises(ValueError, match="device 'tpu' cannot be used"):
        mmfast.load(out, model=make_model(), device="tpu")


def changed(out, tmp_path, **changes):
    state = checkpoint.load(out / "model.ckpt")
    state.pop("format")
    checkpoint.save(tmp_path / "model.ckpt", {**state, **changes})
    return tmp_path


def test_a_run_of_before_data_were_noted_takes_them_from_its_command(folder, tmp_path):
    run = folder / "runs" / "joint-seed0"
    state = checkpoint.load(run / "model.ckpt")
    for key in ("format", "data"):
        state.pop(key)
    checkpoint.save(tmp_path / "model.ckpt", state)
    old, new = mmfast.load(tmp_path), mmfast.load(run)
    assert (old.class_names, old.scaling, old.shapes) == (new.class_names, new.scaling, new.shapes)


def test_metadata_of_ones_own_are_no_matter_of_the_learner(of_python, tmp_path):
    state = checkpoint.load(of_python[0] / "model.ckpt")
    for key in ("format", "data"):
        state.pop(key)
    own = {"classes": 10, "shapes": "wide", "modalities": 3}
    checkpoint.save(tmp_path / "model.ckpt", {**state, "metadata": own})
    assert mmfast.load(tmp_path, model=make_model()).class_names is None


def test_a_run_of_another_version_is_named(of_python, tmp_path):
    out, _ = of_python
    newer = changed(out, tmp_path, mmfast="9.1.0", config={"alpha": 0.1, "beta": 2})
    with pytest.raises(
        ValueError, match=r"written by mmfast 9\.1\.0 and does not fit this version.*no option 'beta'"
    ):
        mmfast.load(newer, model=make_model())
    newer = changed(out, tmp_path, mmfast="9.1.0", method="mla2")
    with pytest.raises(ValueError, match=r"written by mmfast 9\.1\.0 .*did you mean mla"):
        mmfast.load(newer, model=make_model())
    mmfast.load(changed(out, tmp_path, mmfast="9.1.0"), model=make_model())
    state = torch.load(out / "model.ckpt", weights_only=True)
    torch.save(state | {"format": 7}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="must have checkpoint format 1 or 2, got 7: another version"):
        mmfast.load(tmp_path, model=make_model())


def test_a_run_in_mixed_precision_predicts_in_it(tmp_path):
    trainer = mmfast.Trainer(
        "joint", max_epochs=1, out_dir=tmp_path, accelerator="cpu", precision="bf16-mixed"
    )
    trainer.fit(make_model(), make_data(30))
    learner = mmfast.load(tmp_path, model=make_model())
    data = make_data(30, seed=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = learner.predict(data[:]).float()
    assert torch.equal(learner.predict(data).logits, expected)


def test_a_learner_of_no_run_knows_nothing_of_data():
    learner = bind("joint")
    assert (learner.class_names, learner.scaling, learner.shapes) == (None, None, None)


def absolute_error(outputs, target):
    return (outputs - target).abs()


TARGETS = {
    "regression": (torch.arange(30) / 30, {}),
    "regression by a loss": (torch.arange(30) / 30, {"loss": absolute_error}),
    "multilabel": (torch.arange(90).view(30, 3) % 2, {}),
    "multiclass": (torch.arange(30) // 3 % 3, {"class_weights": "balanced", "label_smoothing": 0.1}),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_run_is_loaded_with_its_task(tmp_path, case):
    (labels, options), task = TARGETS[case], case.split()[0]
    data = ArrayDataset(make_data(30).arrays, labels[:30], task=task)

    def model():
        return mmfast.models.build_model(data.shapes, data.num_classes, dim=8)

    trainer = mmfast.Trainer(task=task, method="joint", max_epochs=1, out_dir=tmp_path, **options)
    fitted = trainer.fit(model(), data)
    loaded = mmfast.load(tmp_path, model=model(), loss=options.get("loss"))
    one, other = fitted.predict(data), loaded.predict(data)
    assert other.task == task
    assert other.columns() == one.columns()
    values = [
        mmfast.valuate(each, data, utility="negative_loss").coalition_value for each in (fitted, loaded)
    ]
    assert torch.equal(*values)
    restored = model()
    trainer.restore(restored)
    value = mmfast.valuate(trainer.learner, data, utility="negative_loss").coalition_value
    assert torch.equal(value, values[0])


def test_a_loss_of_ones_own_is_asked_for_where_it_is_measured(tmp_path):
    data = ArrayDataset(make_data(30).arrays, torch.arange(30) / 30, task="regression")
    models = [mmfast.models.build_model(data.shapes, 1, dim=8) for _ in range(3)]
    trainer = mmfast.Trainer(
        "joint", task="regression", loss=absolute_error, max_epochs=1, out_dir=tmp_path / "own"
    )
    trainer.fit(models[0], data)
    learner = mmfast.load(tmp_path / "own", model=models[1])
    assert learner.predict(data).contributions.isfinite().all()
    with pytest.raises(ValueError, match=r"must be given to be measured, mmfast.load\(..., loss=absolute_er"):
        mmfast.valuate(learner, data, utility="negative_loss")
    mmfast.Trainer("joint", task="regression", max_epochs=1, out_dir=tmp_path / "plain").fit(models[2], data)
    with pytest.raises(ValueError, match="loss must be None, as the run had none of its own, got function"):
        mmfast.load(tmp_path / "plain", model=models[1], loss=absolute_error)
