"""What a run makes of each test sample: held against what the trainer, torchmetrics and masks say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")

from lightning_fabric import Fabric

import mmfast
from mmfast.data import ArrayDataset
from mmfast.experiments import outcomes
from mmfast.experiments.outcomes import OUTCOME, Outcome, OutcomeFiles, outcome_of
from mmfast.training.evaluation import evaluate
from mmfast.training.probes import probe
from support.learners import NUM_CLASSES, bind, make_data

FABRIC = Fabric(accelerator="cpu")


def outcome(learner, test, train=None):
    return outcome_of(learner, train or test, test, FABRIC, probe=train is not None)


@pytest.mark.parametrize("method", ["joint", "ensemble", "mla", "di-mml"])
def test_it_says_the_same_as_the_figures_of_the_run(method):
    learner, test = bind(method, 3).eval(), make_data(70, 3, seed=1)
    found, figures = outcome(learner, test, make_data(90, 3)), evaluate(learner, test, FABRIC)
    assert found.correct.mean() == pytest.approx(figures.accuracy)
    assert found.contributions.mean(0) == pytest.approx(list(figures.contribution.values()), abs=1e-6)
    logits = learner.predict(test[:]).detach()
    assert torch.equal(torch.from_numpy(found.predicted), logits.argmax(1))
    assert found.probabilities == pytest.approx(logits.softmax(1).numpy(), abs=1e-6)
    probed = probe(learner, make_data(90, 3), test, FABRIC)
    assert found.figures(learner.modalities)["probe"] == pytest.approx(probed)


def test_gains_add_up_to_the_accuracy_and_are_none_for_what_changes_nothing():
    learner, test = bind("joint", 3).eval(), make_data(70, 3, seed=1)
    with torch.no_grad():
        for parameter in learner.model.encoders["m1"].parameters():
            parameter.zero_()
    found = outcome(learner, test)
    features = learner.encode(test[:])
    bare = learner.fuse(features, coalition=0).argmax(1) == test.labels
    assert found.gains.sum(1) == pytest.approx(found.correct * 1.0 - bare.numpy() * 1.0, abs=1e-6)
    assert found.gains[:, 1] == pytest.approx(0, abs=1e-6)
    # Under the size of a coalition it has part in all that is right.
    assert found.contributions[:, 1].mean() > 0.1


def test_without_a_modality_is_the_coalition_of_the_others():
    learner, test = bind("joint", 3).eval(), make_data(70, 3)
    found, features = outcome(learner, test), learner.encode(test[:])
    for m in range(3):
        logits = learner.fuse(features, coalition=0b111 & ~(1 << m))
        assert found.without[m].tolist() == (logits.argmax(1) == test.labels).tolist()
    told = found.figures(learner.modalities)
    assert told["missing"] == {f"m{m}": pytest.approx(found.without[m].mean()) for m in range(3)}
    assert "probe" not in told


def test_samples_without_a_modality_or_label_count_where_they_have_one():
    full, marks = make_data(60), torch.arange(60) % 3 > 0
    labels = full.labels.clone()
    labels[5] = -100
    test = ArrayDataset(full.arrays, labels, present={"m1": marks})
    learner = bind("joint").eval()
    found = outcome(learner, test, full)
    assert found.labelled.sum() == 59
    assert not found.correct[5]
    assert found.present.tolist() == torch.stack([torch.ones(60).bool(), marks], 1).tolist()
    # One that lacks m1 loses nothing without it.
    lacks = ~marks.numpy() & found.labelled
    assert found.without[1][lacks].tolist() == found.correct[lacks].tolist()
    assert np.isnan(found.contributions[5]).all()
    right = found.probe_of(1)
    assert np.isnan(right).tolist() == (~marks.numpy() | ~found.labelled).tolist()
    assert np.nanmean(right) == pytest.approx(probe(learner, full, test, FABRIC)["m1"])


def test_shares_of_classes_count_as_the_largest():
    hard = make_data(30)
    soft = ArrayDataset(
        hard.arrays, 0.8 * torch.nn.functional.one_hot(hard.labels, NUM_CLASSES) + 0.2 / NUM_CLASSES
    )
    learner = bind("joint").eval()
    assert outcome(learner, soft).labels.tolist() == hard.labels.tolist()


def test_of_many_classes_two_probabilities_are_kept(monkeypatch, tmp_path):
    learner, full = bind("joint").eval(), make_data(40)
    labels = full.labels.clone()
    labels[3] = -100
    test = ArrayDataset(full.arrays, labels)
    whole = outcome(learner, test)
    monkeypatch.setattr(outcomes, "MOST", 40 * NUM_CLASSES - 1)
    outcome(learner, test).save(tmp_path / OUTCOME)
    short = Outcome.load(tmp_path / OUTCOME)
    assert short.probabilities is None
    assert repr(short) == "Outcome(40 samples, many classes)"
    assert short.confidence.tolist() == whole.probabilities.max(1).tolist()
    known = whole.labelled
    of_label = whole.probabilities[np.arange(40), labels.clamp(min=0)]
    assert short.likelihood[known].tolist() == of_label[known].tolist()
    assert np.isnan(short.likelihood).tolist() == (~known).tolist()
    assert short.figures(learner.modalities) == whole.figures(learner.modalities)
    assert whole.confidence is whole.likelihood is None
    for one, other in zip(short.pair(), whole.pair(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_calibration_error_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(4), 500).astype(np.float32)
    labels = draw.integers(0, 4, 500)
    made = Outcome(
        probabilities, probabilities.argmax(1), labels, np.zeros((500, 2)), np.ones((500, 2), bool), None
    )
    expected = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels), 4, 15)
    assert made.calibration_error == pytest.approx(float(expected), abs=1e-6)


def test_logits_that_are_nan_have_no_class_and_infinite_ones_do():
    learner, test = bind("joint").eval(), make_data(6)
    with torch.no_grad():
        learner.model.head.linear.weight[1, 0] = torch.inf
    features = [torch.ones(6, 8), torch.ones(6, 8)]
    learner.encode = lambda batch: features
    found = outcome(learner, test)
    assert found.predicted.tolist() == [1] * 6
    assert found.probabilities[:, 1].tolist() == [1.0] * 6
    features[0][0] = torch.nan
    found = outcome(learner, test)
    assert found.predicted.tolist() == [-1] + [1] * 5
    assert np.isnan(found.probabilities[0]).all()
    assert found.calibration_error is None


def test_it_is_read_as_it_was_written(tmp_path):
    learner, test = bind("joint").eval(), make_data(20)
    found = outcome(learner, test, test)
    found.save(tmp_path / "joint-seed0" / OUTCOME)
    files = OutcomeFiles({("joint", 0): tmp_path / "joint-seed0", ("joint", 1): tmp_path / "joint-seed1"})
    assert list(files) == [("joint", 0)]
    read = files["joint", 0]
    assert vars(read).keys() == vars(found).keys()
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(read, name), value)
    assert files.get(("joint", 1)) is None
    assert ("joint", 1) not in files
    (tmp_path / "joint-seed0" / OUTCOME).write_bytes(b"PK no more")
    with pytest.raises(ValueError, match=r"test\.npz is damaged"):
        files["joint", 0]


def test_other_tasks_have_none():
    trainer = mmfast.Trainer("joint", task="regression", max_epochs=1)
    data = make_data(30)
    numbers = ArrayDataset(data.arrays, torch.randn(30, NUM_CLASSES), task="regression")
    model = mmfast.models.build_model({"m0": (5,), "m1": (5,)}, NUM_CLASSES, dim=8)
    learner = trainer.fit(model, numbers)
    assert outcome(learner, numbers) is None
