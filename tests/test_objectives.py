"""Losses and labels of one's own: the same mean as torch's, in every method, and -100 left out of all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_trainer import SMALL, SPLITS, make_model, make_trainer
from torch import nn

import mmfast
from mmfast import methods, valuation
from mmfast.data import ArrayDataset
from mmfast.models import build_model
from mmfast.objectives import IGNORED, Objective
from support.learners import NUM_CLASSES, bind, make_data

WEIGHTS = torch.tensor([0.5, 2.0, 3.0])


def raises(text: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match="^" + "".join("\\" + c if c in "[](){}.*+?^$|" else c for c in text))


def soft_labels(labels):
    return 0.8 * F.one_hot(labels, NUM_CLASSES) + 0.2 / NUM_CLASSES


def with_learner(name: str, objective: Objective | None, **options):
    torch.manual_seed(0)
    model = build_model({"m0": (5,), "m1": (5,)}, NUM_CLASSES, dim=8)
    learner = methods.make(name, **options).bind(model, objective=objective)
    learner.start_stage(learner.stages(4)[0])
    return learner


class TestMean:
    """The mean loss is what `torch.nn.functional.cross_entropy` gives, gradients included."""

    CASES = {  # noqa: RUF012
        "plain": ({}, lambda y: y),
        "weights": ({"class_weights": WEIGHTS}, lambda y: y),
        "smoothing": ({"label_smoothing": 0.1}, lambda y: y),
        "both": ({"class_weights": WEIGHTS, "label_smoothing": 0.1}, lambda y: y),
        "probabilities": ({}, soft_labels),
        "weighted probabilities": ({"class_weights": WEIGHTS, "label_smoothing": 0.2}, soft_labels),
        "left out": ({}, lambda y: torch.where(y == 1, IGNORED, y)),
        "weighted, left out": ({"class_weights": WEIGHTS}, lambda y: torch.where(y == 1, IGNORED, y)),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_equals_torch(self, case):
        options, of = self.CASES[case]
        objective = Objective(**options)
        logits = torch.randn(40, NUM_CLASSES, generator=torch.Generator().manual_seed(1)) * 3
        target = of(torch.arange(40) % NUM_CLASSES)
        x, twin = logits.clone().requires_grad_(), logits.double().requires_grad_()
        mine = objective.mean(objective.losses(x, target), target)
        weight = options.get("class_weights")
        theirs = F.cross_entropy(
            twin,
            target.double() if target.is_floating_point() else target,
            None if weight is None else weight.double(),
            label_smoothing=options.get("label_smoothing", 0.0),
        )
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=0)
        mine.backward(), theirs.backward()
        # A probability near 1, less 1, is off by 6e-8; times a weight of up to 3 over 40 samples.
        torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-5, atol=1e-8)

    def test_over_the_samples_present(self):
        objective, labels = Objective(class_weights=WEIGHTS), torch.tensor([0, 1, 2, IGNORED, 1, 2])
        present = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()
        logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(2))
        found = objective.mean(objective.stacked_losses(logits, labels), labels, present)
        some = [0, 1, 4, 5]
        torch.testing.assert_close(found[0], F.cross_entropy(logits[0, some], labels[some], WEIGHTS))
        # Nothing that counts: a loss of 0, and not 0 / 0.
        assert float(found[1]) == 0

    def test_of_several_labels_and_of_numbers(self):
        outputs = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
        labels, numbers = (outputs > 0.3).long(), torch.randn(7, 3)
        many, real = Objective("multilabel"), Objective("regression")
        torch.testing.assert_close(
            many.mean(many.losses(outputs, labels), labels),
            F.binary_cross_entropy_with_logits(outputs, labels.float()),
        )
        torch.testing.assert_close(
            real.mean(real.losses(outputs, numbers), numbers), F.mse_loss(outputs, numbers)
        )
        one = Objective("regression")
        # A temperature may be -100 degrees.
        cold = torch.tensor([IGNORED, 3, 4])
        expected = F.mse_loss(outputs[:3, 0], cold.float())
        torch.testing.assert_close(one.mean(one.losses(outputs[:3, :1], cold), cold), expected)


class TestOwnLoss:
    @pytest.mark.parametrize("name", methods.METHODS)
    def test_stands_wherever_the_cross_entropy_does(self, name):
        """Of a loss that is nothing no method keeps anything, but for the contrast of di-mml."""
        seen = []

        def nothing(outputs, target):
            seen.append((outputs.dtype, tuple(outputs.shape), tuple(target.shape)))
            return 0 * outputs.sum(1)

        data = make_data()
        learner = with_learner(name, Objective(loss=nothing))
        for step in range(learner.steps_per_batch):
            assert float(learner(data[:], step)) == 0
        assert set(seen) == {(torch.float32, (60, NUM_CLASSES), (60,))}
        for stage in learner.stages(4)[1:]:
            learner.start_stage(stage)
            assert float(learner(learner.start_epoch(0, data)[:], 0)) == 0

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_that_is_the_cross_entropy_changes_nothing(self, name):
        def same(outputs, target):
            return F.cross_entropy(outputs, target, reduction="none")

        data = make_data()
        plain, own = (with_learner(name, objective) for objective in (None, Objective(loss=same)))
        for step in range(plain.steps_per_batch):
            losses = [learner(data[:], step) for learner in (plain, own)]
            torch.testing.assert_close(*losses, rtol=1e-6, atol=0)

    def test_never_sees_a_label_that_is_left_out(self):
        labels = torch.tensor([0, IGNORED, 2, IGNORED])
        logits = torch.randn(4, 3, requires_grad=True)
        objective = Objective(loss=lambda x, y: -x.log_softmax(1).gather(1, y[:, None])[:, 0])
        loss = objective.mean(objective.losses(logits, labels), labels)
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
        loss.backward()
        assert logits.grad[[1, 3]].eq(0).all()
        assert logits.grad[[0, 2]].ne(0).any()

    def test_sees_real_numbers_where_targets_are_no_classes(self):
        huber = nn.HuberLoss(reduction="none")
        objective, outputs = Objective("regression", loss=huber), torch.randn(5, 1)
        torch.testing.assert_close(
            objective.losses(outputs, torch.arange(5)), huber(outputs[:, 0], torch.arange(5.0))
        )

        def weighted(logits, target):
            return F.binary_cross_entropy_with_logits(
                logits, target, reduction="none", pos_weight=torch.tensor([2.0, 3.0])
            ).mean(1)

        logits, target = torch.randn(4, 2), torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
        found = Objective("multilabel", loss=weighted).losses(logits, target)
        torch.testing.assert_close(found, weighted(logits, target.float()))

    def test_may_be_a_module_with_buffers(self):
        class Focal(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("gamma", torch.tensor(2.0))

            def forward(self, outputs, target):
                p = outputs.softmax(1).gather(1, target[:, None])[:, 0]
                return -((1 - p) ** self.gamma) * p.log()

        trainer, model = make_trainer("mla", loss=Focal()), make_model()
        trainer.fit(model, SPLITS.train, SPLITS.val)
        assert trainer.test(model, SPLITS.test).accuracy > 0.5

    @pytest.mark.parametrize(
        ("loss", "text", "kind"),
        [
            (
                nn.CrossEntropyLoss(),
                "loss must return one number a sample, [N] = [32], got a scalar: reduction='none' gives",
                ValueError,
            ),
            (
                lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float(), reduction="none"),
                "loss must return one number a sample, [N] = [32], got [32, 3]",
                ValueError,
            ),
            (lambda x, y: 0.5, "loss must return a tensor [N] = [32], got 0.5", TypeError),
        ],
    )
    def test_that_gives_no_number_a_sample_is_refused(self, loss, text, kind):
        with raises(text, kind):
            make_trainer("joint", loss=loss).fit(make_model(), SPLITS.train, SPLITS.val)

    @pytest.mark.parametrize(
        ("options", "text", "kind"),
        [
            (
                {"loss": nn.MSELoss},
                "loss must be a callable of outputs and targets, got MSELoss: give",
                TypeError,
            ),
            ({"loss": "focal"}, "loss must be a callable of outputs and targets, got 'focal'", TypeError),
            (
                {"task": "multi-class"},
                "task must be one of multiclass, multilabel, regression, got",
                ValueError,
            ),
            (
                {"class_weights": "even"},
                "class_weights must be \"balanced\" or C numbers, got 'even'",
                ValueError,
            ),
            ({"class_weights": {0: 1.0}}, 'class_weights must be "balanced" or C numbers, got', TypeError),
            ({"class_weights": [1, -1, 1]}, "class_weights must be finite and not negative, got", ValueError),
            ({"class_weights": [[1.0]]}, "class_weights must have shape [C], got [1, 1]", ValueError),
            ({"label_smoothing": 1.0}, "label_smoothing must lie in [0, 1), got 1.0", ValueError),
            (
                {"class_weights": [1, 2, 3], "loss": F.cross_entropy},
                "class_weights must not be given with a loss of your own, as it is that of the",
                ValueError,
            ),
            (
                {"label_smoothing": 0.1, "task": "regression"},
                "label_smoothing must not be given with task='regression', as it is that of the",
                ValueError,
            ),
            ({"label_smoothing": "a little"}, "label_smoothing must lie in [0, 1), got", ValueError),
            ({"class_weights": [0, 0]}, "class_weights must not all be 0, got [0, 0]", ValueError),
            ({"metrics": [1]}, "metrics must map names to torchmetrics objects, got [1]", TypeError),
            ({"metrics": {1: 1}}, "metrics must map names to torchmetrics objects, got dict", TypeError),
            ({"select": 3}, "select must be one of val/accuracy, val/macro_f1, val/loss, got 3", ValueError),
            ({"lr_scale": {1: 2}}, "lr_scale must map names to factors, got the name 1", TypeError),
        ],
    )
    def test_what_cannot_be_is_refused_at_once(self, options, text, kind):
        with raises(text, kind):
            mmfast.Trainer("joint", **options)


class TestClassWeights:
    def test_balanced_ones_are_found_from_the_training_set(self):
        labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 5 + [IGNORED] * 5)
        data = ArrayDataset({"a": torch.randn(60, 6), "b": torch.randn(60, 6)}, labels)
        trainer = make_trainer("joint", class_weights="balanced", max_epochs=1)
        learner = trainer.fit(make_model(), data)
        # scikit-learn's "balanced".
        expected = torch.tensor([55 / (3 * 40), 55 / (3 * 10), 55 / (3 * 5)])
        torch.testing.assert_close(learner.objective.class_weights, expected)
        assert trainer._description()["objective"]["class_weights"] == "balanced"

    def test_balanced_ones_of_a_part_are_those_of_the_part(self):
        rows = [i for i, y in enumerate(SPLITS.train.labels.tolist()) if y or i % 2]
        part = torch.utils.data.Subset(torch.utils.data.Subset(SPLITS.train, rows), range(60))
        learner = make_trainer("joint", class_weights="balanced", max_epochs=1).fit(make_model(), part)
        counts = torch.bincount(SPLITS.train.labels[rows[:60]], minlength=3)
        torch.testing.assert_close(learner.objective.class_weights, 60 / (3 * counts.float()))

    def test_of_another_number_of_classes_are_refused(self):
        with raises("class_weights must have shape [C] = [3], got [2]"):
            make_trainer("joint", class_weights=[1, 2]).fit(make_model(), SPLITS.train)

    def test_balanced_ones_need_labels(self):
        class Silent(torch.utils.data.Dataset):
            def __len__(self):
                return len(SPLITS.train)

            def __getitem__(self, index):
                return SPLITS.train[index]

        with raises('class_weights="balanced" needs the labels of all training samples: give the data set'):
            make_trainer("joint", class_weights="balanced").fit(make_model(), Silent())


@pytest.mark.parametrize("name", methods.METHODS)
def test_probabilities_as_labels_train_every_method(name):
    """Of one-hot rows the figures are those of the classes."""
    parts = []
    for part in (SPLITS.train, SPLITS.val, SPLITS.test):
        parts.append(ArrayDataset(part.arrays, F.one_hot(part.labels, 3).float()))
    trainer, model = make_trainer(name, max_epochs=3), make_model()
    trainer.fit(model, *parts[:2])
    plain, twin = make_trainer(name, max_epochs=3), make_model()
    plain.fit(twin, SPLITS.train, SPLITS.val)
    found, expected = (t.test(m, SPLITS.test) for t, m in ((trainer, model), (plain, twin)))
    assert trainer.test(model, parts[2]).accuracy == found.accuracy
    assert found.accuracy == pytest.approx(expected.accuracy, abs=0.1)


class TestLeftOut:
    """A label of -100: the sample counts in no loss and in no figure."""

    @staticmethod
    def with_gaps(data, every: int = 3):
        labels = data.labels.clone()
        labels[::every] = IGNORED
        return ArrayDataset(data.arrays, labels, num_classes=NUM_CLASSES), labels != IGNORED

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_every_method_trains_and_measures_the_rest(self, name):
        train, _ = self.with_gaps(SPLITS.train)
        val, labelled = self.with_gaps(SPLITS.val)
        trainer, model = make_trainer(name), make_model()
        trainer.fit(model, train, val)
        found = trainer.test(model, val)
        rest = trainer.test(model, val.subset(labelled.nonzero().flatten()))
        assert found.accuracy == rest.accuracy
        assert found.macro_f1 == pytest.approx(rest.macro_f1)
        assert found.loss == pytest.approx(rest.loss)
        assert found.modality_accuracy == rest.modality_accuracy
        assert found.contribution == pytest.approx(rest.contribution)

    @pytest.mark.parametrize("name", ["joint", "multi-loss", "ensemble", "mla"])
    def test_the_loss_is_that_of_the_rest(self, name):
        data = make_data()
        gaps, labelled = self.with_gaps(data)
        learner = bind(name)
        few = gaps.subset(labelled.nonzero().flatten())
        for step in range(learner.steps_per_batch):
            whole, part = learner(gaps[:], step), learner(few[:], step)
            torch.testing.assert_close(whole, part, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("fusion", ["concat", "gated"])
    @pytest.mark.parametrize("utility", ["cardinality", "log_probability", "negative_loss"])
    def test_a_valuation_says_nothing_of_them(self, fusion, utility):
        gaps, labelled = self.with_gaps(make_data())
        learner = bind("joint", fusion=fusion).eval()
        found = mmfast.valuate(learner, gaps, utility=utility)
        rest = mmfast.valuate(learner, gaps.subset(labelled.nonzero().flatten()), utility=utility)
        assert found.contributions[~labelled].isnan().all()
        torch.testing.assert_close(found.contributions[labelled], rest.contributions)
        assert found.means == pytest.approx(rest.means)
        torch.testing.assert_close(found.coalition_accuracy, rest.coalition_accuracy)
        torch.testing.assert_close(found.coalition_value, rest.coalition_value)
        assert torch.equal(found.column(1), rest.column(1))
        assert torch.equal(found.labelled, labelled)
        assert rest.labelled is None

    def test_a_utility_of_ones_own_never_sees_them(self):
        def log_probability(logits, labels):
            index = labels[:, None, None].expand(-1, logits.shape[1], 1)
            return logits.log_softmax(2).gather(2, index)[..., 0]

        gaps, _ = self.with_gaps(make_data())
        learner = bind("joint").eval()
        found = mmfast.valuate(learner, gaps, utility=log_probability).contributions
        expected = mmfast.valuate(learner, gaps, utility="log_probability").contributions
        torch.testing.assert_close(found, expected, equal_nan=True)

    def test_a_number_may_be_minus_100(self):
        features = {"m0": torch.randn(4, 5), "m1": torch.randn(4, 5)}
        model = build_model({"m0": (5,), "m1": (5,)}, 1, dim=8)
        for numbers in (torch.tensor([-100.0, 1.0, 2.0, -100.0]), torch.tensor([-100, 1, 2, -100])):
            data = ArrayDataset(features, numbers, task="regression")
            found = mmfast.valuate(model, data, utility="negative_squared_error")
            assert found.labelled is None
            assert found.contributions.isfinite().all()
        data = ArrayDataset(features, torch.tensor([-100.0, 1.0, 2.0, 3.0]), task="regression")
        found = mmfast.valuate(model, data, utility=lambda z, y: -(z[..., 0] - y[:, None]).abs())
        assert found.contributions.isfinite().all()

    def test_no_copies_are_made_of_them(self):
        gaps, labelled = self.with_gaps(make_data())
        learner = bind("sample-valuation").eval()
        phi, present = valuation.contributions(learner, gaps)
        assert torch.equal(present, labelled[:, None].expand(-1, 2))
        learner.end_epoch(5, gaps, None)
        assert learner.copies[~labelled].sum() == 0
        assert phi[labelled].isfinite().all()

    def test_data_without_any_label_are_refused(self):
        empty = ArrayDataset(SPLITS.val.arrays, torch.full((len(SPLITS.val),), IGNORED), num_classes=3)
        with raises("val must hold a sample with a label, got -100 for all"):
            make_trainer("joint").fit(make_model(), SPLITS.train, empty)

    def test_other_negative_labels_are_refused(self):
        with raises("labels must lie in 0 .. C - 1, got -1"):
            ArrayDataset(SPLITS.val.arrays, torch.full((len(SPLITS.val),), -1))


class TestCheckpoints:
    def test_a_run_goes_on_with_its_own_loss_alone(self, tmp_path):
        make_trainer("joint", out_dir=tmp_path, label_smoothing=0.1, max_epochs=2).fit(
            make_model(), SPLITS.train, SPLITS.val
        )
        with raises(
            "the checkpoint must be of a run with objective {'label_smoothing': 0.2}, got {'label_sm"
        ):
            make_trainer("joint", out_dir=tmp_path, label_smoothing=0.2, max_epochs=2).fit(
                make_model(), SPLITS.train, SPLITS.val, resume=True
            )

    def test_one_of_before_goes_on(self, tmp_path, monkeypatch):
        plain = mmfast.Trainer._description
        monkeypatch.setattr(
            mmfast.Trainer,
            "_description",
            lambda self: {k: v for k, v in plain(self).items() if k != "objective"},
        )
        make_trainer("joint", out_dir=tmp_path).fit(make_model(), SPLITS.train, SPLITS.val)
        monkeypatch.undo()
        trainer, model = make_trainer("joint", out_dir=tmp_path), make_model()
        trainer.restore(model)
        trainer.fit(make_model(), SPLITS.train, SPLITS.val, resume=True)
        with raises("task must be that of the checkpoint, 'multiclass', got 'regression'"):
            make_trainer("joint", out_dir=tmp_path, task="regression").restore(model)

    def test_balanced_weights_are_not_asked_for_to_predict(self, tmp_path):
        options = {"class_weights": "balanced", "out_dir": tmp_path}
        trainer, model = make_trainer("mla", **options), make_model()
        trainer.fit(model, SPLITS.train, SPLITS.val)
        again, twin = make_trainer("mla", **options), make_model(1)
        again.restore(twin)
        assert again.test(twin, SPLITS.test).accuracy == trainer.test(model, SPLITS.test).accuracy


def test_settings_of_every_method_are_there():
    # The tests above take methods from METHODS with their defaults, or from here.
    assert set(SMALL) <= set(methods.METHODS)


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        (np.full((4, 3), 0.5), {}, "label 0 must be probabilities that add up to 1, got [0.5, 0.5, 0.5]"),
        (np.full((4, 3), 2), {"task": "multilabel"}, "label 0 must be 0 or 1 for each label, got [2, 2, 2]"),
        (np.zeros(4), {"task": "multilabel"}, "labels must have shape [N, C], got [4]"),
        (np.zeros((4, 1, 1)), {"task": "regression"}, "labels must have shape [N] or [N, K], got [4, 1, 1]"),
        ([0.0, 1.0, np.nan, 2.0], {"task": "regression"}, "label 2 must be finite, got nan"),
        (
            np.zeros((4, 2)),
            {"task": "regression", "num_classes": 3},
            "labels must be a number, or numbers [K]",
        ),
    ],
)
def test_labels_of_arrays_fit_their_task(labels, options, text):
    with raises(text):
        ArrayDataset({"a": np.zeros((4, 2))}, labels, **options)
