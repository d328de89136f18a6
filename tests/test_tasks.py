"""Several labels a sample, and numbers: baselines train, are measured as others measure, and are valued."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from sklearn import metrics as sk
from sklearn.datasets import load_diabetes, load_linnerud
from test_objectives import raises
from test_trainer import SMALL, assert_same_state, without_times

import mmfast
from mmfast import methods, utilities
from mmfast.coalitions import features_key
from mmfast.data import ArrayDataset
from mmfast.methods._late_fusion import average_of_labels, average_of_numbers
from mmfast.models import build_model

FREE = [name for name, method in methods.METHODS.items() if not method.needs_classes]
NUM_LABELS = 4


def diabetes(target_form: str = "[N]"):
    """Return train, val and test of the diabetes data: age, sex, weight and pressure; blood serum."""
    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x).float() * 20, torch.tensor(y).float()
    y = (y - y.mean()) / y.std()
    y = y if target_form == "[N]" else torch.stack([y, y * y], 1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = [order[:300], order[300:370], order[370:]]
    return [ArrayDataset({"body": x[i, :4], "blood": x[i, 4:]}, y[i], task="regression") for i in parts]


def labelled(seed: int = 0):
    """Return data whose first two labels show in modality a, the third in b, the last in both."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(300, NUM_LABELS, generator=draw) < 0.4).long()
    noise = torch.randn(2, 300, 8, generator=draw)
    own = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]])
    a, b = (noise[m] + 2 * torch.cat([labels * own[m], labels * own[m]], 1) for m in range(2))
    parts = [slice(0, 180), slice(180, 230), slice(230, 300)]
    return [ArrayDataset({"a": a[i], "b": b[i]}, labels[i], task="multilabel") for i in parts]


DATA = {"regression": diabetes(), "multilabel": labelled(), "regression of two": diabetes("[N, K]")}
PAIRS = [(name, case) for name in FREE for case in DATA]


def fitted(name: str, case: str, **options):
    train, val, test = DATA[case]
    torch.manual_seed(0)
    model = build_model(train.shapes, train.num_classes, dim=16, fusion=options.pop("fusion", "concat"))
    settings = {"max_epochs": 12, "batch_size": 32, "lr": 3e-3, "task": case.split()[0]} | options
    trainer = mmfast.Trainer(methods.make(name, **SMALL.get(name, {})), **settings)
    trainer.fit(model, train, val)
    return trainer, model, test


once = functools.cache(fitted)


def outputs_of(trainer, data):
    """Return the fused outputs and those of each modality on a data set."""
    learner = trainer.learner
    with torch.no_grad():
        features = learner.encode(data[:])
        return learner.fuse(features), learner.own_logits(features)


def test_which_methods_need_classes():
    assert FREE == ["joint", "unimodal", "ensemble", "multi-loss", "frozen-unimodal"]


@pytest.mark.parametrize(("name", "case"), PAIRS)
class TestFigures:
    def test_are_those_of_scikit_learn(self, name, case):
        trainer, model, test = once(name, case)
        found, (fused, alone) = trainer.test(model, test), outputs_of(trainer, test)
        y = test.labels.numpy()
        if case == "multilabel":
            assert found.micro_f1 == pytest.approx(sk.f1_score(y, fused > 0, average="micro"), abs=1e-6)
            expected = sk.average_precision_score(y, fused.sigmoid(), average="macro")
            assert found.map == pytest.approx(expected, abs=1e-5)
            of_each = [sk.f1_score(y, own > 0, average="micro") for own in alone]
            assert list(found.modality_micro_f1.values()) == pytest.approx(of_each, abs=1e-6)
            assert found.map > 0.5
        else:
            fused, alone = fused.view(*y.shape), alone.view(2, *y.shape)
            assert found.r2 == pytest.approx(sk.r2_score(y, fused), abs=1e-5)
            assert found.mae == pytest.approx(sk.mean_absolute_error(y, fused), rel=1e-5)
            assert found.loss == pytest.approx(sk.mean_squared_error(y, fused), rel=1e-5)
            of_each = [sk.r2_score(y, own) for own in alone]
            assert list(found.modality_r2.values()) == pytest.approx(of_each, abs=1e-5)
            assert found.r2 > 0.1

    def test_contributions_add_up(self, name, case):
        trainer, model, test = once(name, case)
        valuation = mmfast.valuate(trainer.learner, test)
        assert valuation.utility == utilities.DEFAULTS[case.split()[0]]
        whole, none = valuation.coalition_value[-1], valuation.coalition_value[0]
        assert sum(valuation.means.values()) == pytest.approx(float(whole - none), abs=1e-6)
        found = trainer.test(model, test)
        assert found.contribution == pytest.approx(valuation.means, abs=1e-6)
        # Each modality alone is worth what its own error says, where that is how it is taken.
        if trainer.learner.protocol == "masked" or name in ("unimodal", "ensemble"):
            figures = next(v for k, v in found.as_dict().items() if k.startswith("modality_"))
            ranks = sorted(figures, key=figures.get)
            value = dict(zip(figures, valuation.coalition_value[[1, 2]].tolist(), strict=True))
            assert sorted(value, key=value.get) == ranks
        if case == "multilabel":
            return
        errors = -mean_errors(trainer, test)
        torch.testing.assert_close(valuation.coalition_value, errors.double(), rtol=1e-4, atol=1e-5)

    def test_a_run_repeats_and_resumes(self, name, case, tmp_path):
        one, model, test = fitted(name, case, max_epochs=4)

        class Cut(Exception):
            pass

        def stop(entry):
            if entry["epoch"] == 1:
                raise Cut

        with pytest.raises(Cut):
            fitted(name, case, max_epochs=4, out_dir=tmp_path, on_epoch=stop)
        train, val, _ = DATA[case]
        torch.manual_seed(0)
        twin = build_model(train.shapes, train.num_classes, dim=16)
        again = mmfast.Trainer(
            one.method,
            max_epochs=4,
            batch_size=32,
            lr=3e-3,
            task=case.split()[0],
            out_dir=tmp_path,
        )
        again.fit(twin, train, val, resume=True)
        assert_same_state(one.learner, again.learner)
        assert without_times(one.history) == without_times(again.history)
        restored = build_model(train.shapes, train.num_classes, dim=16)
        again.restore(restored)
        assert again.test(restored, test) == one.test(model, test)


def mean_errors(trainer, data):
    learner, y = trainer.learner, data.labels.view(len(data), 1, -1)
    with torch.no_grad():
        every = learner.coalition_logits(learner.encode(data[:]), torch.arange(4))
    return (every - y).square().mean((0, 2))


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name not in FREE])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_methods_of_classes_say_why(name, task):
    train, val, _ = DATA[task]
    model = build_model(train.shapes, train.num_classes, dim=8)
    reason = methods.METHODS[name].needs_classes
    with raises(f"{name} needs task='multiclass', as {reason}, got '{task}'"):
        mmfast.Trainer(name, task=task)
    trainer = mmfast.Trainer("joint", task=task)
    trainer.method = methods.make(name)
    with raises(f"{name} needs task='multiclass', as {reason}, got '{task}'"):
        trainer.fit(model, train, val)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("case", ["regression", "multilabel"])
def test_samples_may_lack_modalities(name, case):
    parts = []
    for part in DATA[case]:
        draw = torch.Generator().manual_seed(len(part))
        present = {m: torch.rand(len(part), generator=draw) < 0.7 for m in part.modalities}
        parts.append(ArrayDataset(part.arrays, part.labels, present=present, task=case))
    train, val, test = parts
    model = build_model(train.shapes, train.num_classes, dim=16)
    trainer = mmfast.Trainer(name, task=case, max_epochs=3)
    trainer.fit(model, train, val)
    found, valuation = trainer.test(model, test), mmfast.valuate(trainer.learner, test)
    assert found.contribution == pytest.approx(valuation.means, abs=1e-6)
    whole = valuation.coalition_value[-1] - valuation.coalition_value[0]
    assert float(valuation.contributions.double().sum(1).mean()) == pytest.approx(float(whole), abs=1e-6)
    nowhere = ArrayDataset(
        test.arrays, test.labels, present={test.modalities[0]: torch.zeros(len(test)).bool()}, task=case
    )
    found = trainer.test(model, nowhere).as_dict()
    alone = next(v for k, v in found.items() if k.startswith("modality_"))
    assert alone[test.modalities[0]] is None
    assert alone[test.modalities[1]] is not None


def test_three_numbers_of_two_modalities():
    """The Linnerud data: 20 samples, exercises as two modalities, three measures of the body to predict."""
    x, y = load_linnerud(return_X_y=True)
    x, y = (torch.tensor((v - v.mean(0)) / v.std(0)).float() for v in (x, y))
    data = ArrayDataset({"pull": x[:, :2], "jump": x[:, 2:]}, y, task="regression")
    model = build_model(data.shapes, 3, dim=8)
    trainer = mmfast.Trainer("multi-loss", task="regression", max_epochs=30, batch_size=10)
    trainer.fit(model, data)
    found = trainer.test(model, data)
    assert found.r2 == pytest.approx(sk.r2_score(y, outputs_of(trainer, data)[0]), abs=1e-5)
    valuation = mmfast.valuate(trainer.learner, data)
    assert list(valuation.columns()) == ["sample", "label[0]", "label[1]", "label[2]", "pull", "jump"]


class TestUtilities:
    def test_f1_of_a_sample(self):
        draw = torch.Generator().manual_seed(0)
        y, z = torch.rand(50, 5, generator=draw) < 0.3, torch.randn(50, 4, 5, generator=draw) - 0.8
        found = utilities.multilabel_f1(z, y.long())
        for s in range(4):
            expected = [
                sk.f1_score(t, p, zero_division=1.0) if p.any() or t.any() else 1.0
                for t, p in zip(y, z[:, s] > 0, strict=True)
            ]
            assert found[:, s].tolist() == pytest.approx(expected, abs=1e-6)
        assert ((y.any(1) == 0) & (z[:, 0] <= 0).all(1)).any(), "no sample without labels"

    def test_a_function_of_ones_own(self):
        trainer, _, test = fitted("joint", "regression")

        def within(outputs, target):
            return (outputs[..., 0] - target[:, None]).abs() < 0.5

        found = mmfast.valuate(trainer.learner, test, utility=within)
        assert found.utility == "within"
        with torch.no_grad():
            every = trainer.learner.coalition_logits(trainer.learner.encode(test[:]), torch.arange(4))
        expected = within(every, test.labels).double().mean(0)
        torch.testing.assert_close(found.coalition_value, expected)
        model = trainer.learner.model
        assert torch.equal(mmfast.valuate(model, test, utility=within).contributions, found.contributions)

    def test_the_loss_of_the_learner(self):
        trainer, model, test = fitted("joint", "multilabel")
        found = mmfast.valuate(trainer.learner, test, utility="negative_loss")
        assert float(found.coalition_value[-1]) == pytest.approx(-trainer.test(model, test).loss, rel=1e-6)

    @pytest.mark.parametrize(
        ("case", "utility", "text"),
        [
            (
                "regression",
                "correct",
                "utility 'correct' is for task='multiclass', the model's is",
            ),
            (
                "multilabel",
                "negative_squared_error",
                "utility 'negative_squared_error' is for task=",
            ),
            ("regression", "r2", "utility must be one of cardinality, correct, probability"),
            (
                "regression",
                lambda z, y: z,
                "utility must return values [N, S] = [72, 4], got Tensor",
            ),
            ("regression", lambda z, y: 1.0, "utility must return values [N, S] = [72, 4], got 1.0"),
        ],
    )
    def test_what_does_not_fit_is_said(self, case, utility, text):
        trainer, _, test = fitted("joint", case, max_epochs=1)
        with raises(text):
            mmfast.valuate(trainer.learner, test, utility=utility)


def test_averages_over_the_modalities_present():
    draw = torch.Generator().manual_seed(0)
    z, present = torch.randn(3, 9, 2, generator=draw) * 3, torch.rand(3, 9, generator=draw) < 0.6
    present[:, 0] = False
    labels, numbers = average_of_labels(z, present), average_of_numbers(z, present)
    for i in range(9):
        own = z[present[:, i], i]
        torch.testing.assert_close(
            labels[i].sigmoid(), own.sigmoid().mean(0) if len(own) else z.new_full((2,), 0.5)
        )
        torch.testing.assert_close(numbers[i], own.mean(0) if len(own) else z.new_zeros(2))
    everyone = torch.ones_like(present)
    torch.testing.assert_close(average_of_labels(z, None), average_of_labels(z, everyone))
    torch.testing.assert_close(average_of_numbers(z, None), average_of_numbers(z, everyone))


@pytest.mark.parametrize("case", ["regression", "multilabel"])
def test_nan_counts_as_wrong_and_is_told(case):
    trainer, model, test = fitted("joint", case, max_epochs=2)
    clean = trainer.test(model, test)
    arrays = {name: x.clone() for name, x in test.arrays.items()}
    spoilt = ArrayDataset(arrays, test.labels, task=case)
    spoilt.arrays[test.modalities[0]][3] = torch.nan
    with pytest.warns(UserWarning, match="1 of 7. samples have NaN logits"):
        found = trainer.test(model, spoilt)
    if case == "multilabel":
        assert found.micro_f1 <= clean.micro_f1
    else:
        assert found.r2 != found.r2


@pytest.mark.parametrize(
    ("case", "label", "text"),
    [
        ("regression", "warm", "label of sample 0 of train must be numbers, got a string"),
        (
            "regression",
            torch.zeros(2),
            "label of sample 0 of train must be a number, or numbers [K] = [1] each",
        ),
        ("regression", float("inf"), "label of sample 0 of train must be finite, got inf"),
        ("regression", None, "label of sample 0 of train must be a number, or numbers [K] = [1], got None"),
        ("multilabel", 3, "label of sample 0 of train must be 0 and 1 for each of C labels, [C] = [4] each"),
        (
            "multilabel",
            [0, 1, 2, 0],
            "label of sample 0 of train must be 0 or 1 for each label, got [0",
        ),
        ("multilabel", [0, 1], "label of sample 0 of train must be 0 and 1 for each of C labels, [C] = [4]"),
    ],
)
def test_labels_that_do_not_fit_the_task(case, label, text):
    data = DATA[case][0]
    samples = [{**data[i], "label": label} for i in range(4)]
    model = build_model(data.shapes, data.num_classes, dim=8)
    with raises(text, TypeError if label is None or isinstance(label, str) else ValueError):
        mmfast.Trainer("joint", task=case).fit(model, samples)


@pytest.mark.parametrize("case", ["regression", "multilabel"])
def test_features_that_are_kept_keep_their_targets(case):
    trainer, _, test = fitted("frozen-unimodal", case, max_epochs=2)
    kept = trainer.learner.keep(test)
    assert torch.equal(kept.labels, test.labels)
    assert features_key(test.modalities[0]) in kept[[0, 1]]
    trainer.learner.forget()
    few = [{**test[i], "label": test.labels[i].tolist()} for i in range(9)]
    assert dataclasses.asdict(trainer.test(trainer.learner.model, few))


def test_a_data_set_says_what_it_holds():
    assert repr(DATA["regression of two"][2]) == "ArrayDataset(72 samples, body [4], blood [6], 2 numbers)"
    assert repr(DATA["multilabel"][2]) == "ArrayDataset(70 samples, a [8], b [8], 4 labels)"
    assert DATA["multilabel"][0].subset([1, 2]).task == "multilabel"
