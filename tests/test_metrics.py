"""Metrics of one's own beside the task's, and selection by any figure."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics as sk
from test_objectives import raises
from test_tasks import DATA, fitted
from test_trainer import SPLITS, make_model, make_trainer
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassRecall,
    MultilabelAUROC,
)
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef

import mmfast
from mmfast import methods
from mmfast.data import ArrayDataset
from mmfast.training import checkpoint

AUROC = {"auroc": MulticlassAUROC(3)}


def probabilities(trainer, data):
    with torch.no_grad():
        return trainer.learner.predict(data[:]).softmax(1)


@pytest.mark.parametrize("name", methods.METHODS)
def test_metrics_are_in_history_and_results(name):
    trainer, model = make_trainer(name, metrics=AUROC), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    found = trainer.test(model, SPLITS.test)
    expected = sk.roc_auc_score(SPLITS.test.labels, probabilities(trainer, SPLITS.test), multi_class="ovr")
    assert found["auroc"] == found.extra["auroc"] == pytest.approx(expected, abs=1e-5)
    assert all("auroc" in entry["val"] for entry in trainer.history)
    assert set(found.as_dict()) == {
        "accuracy",
        "macro_f1",
        "loss",
        "modality_accuracy",
        "contribution",
        "auroc",
    }
    # What was given is a pattern, which no pass has touched.
    assert AUROC["auroc"]._update_count == 0


def test_metrics_of_other_tasks():
    trainer, model, test = fitted("joint", "multilabel", metrics={"auroc": MultilabelAUROC(4)}, max_epochs=2)
    p = trainer.learner.predict(test[:]).sigmoid().detach()
    assert trainer.test(model, test)["auroc"] == pytest.approx(sk.roc_auc_score(test.labels, p), abs=1e-5)
    both = MetricCollection({"mse": MeanSquaredError(), "corr": PearsonCorrCoef()})
    trainer, model, test = fitted("joint", "regression", metrics=both, max_epochs=2)
    found = trainer.test(model, test)
    assert found["mse"] == pytest.approx(found.loss, rel=1e-5)
    assert -1 <= found["corr"] <= 1


def test_metrics_leave_out_what_has_no_label():
    labels = SPLITS.test.labels.clone()
    labels[::2] = -100
    part = ArrayDataset(SPLITS.test.arrays, labels, num_classes=3)
    trainer, model = make_trainer("joint", metrics=AUROC, select="val/auroc"), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    rest = part.subset((labels >= 0).nonzero().flatten())
    for figure in ("auroc", "modality_auroc"):
        assert trainer.test(model, part)[figure] == pytest.approx(trainer.test(model, rest)[figure])


def test_metrics_of_nan_are_nan():
    trainer, model = make_trainer("joint", metrics=AUROC), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    spoilt = ArrayDataset({k: v.clone() for k, v in SPLITS.test.arrays.items()}, SPLITS.test.labels)
    # Beyond the samples that are looked at before.
    spoilt.arrays["a"][9] = torch.nan
    with pytest.warns(UserWarning, match="NaN logits"):
        assert math.isnan(trainer.test(model, spoilt)["auroc"])


SELECTIONS = {
    "val/accuracy": ({}, 1),
    "val/macro_f1": ({}, 1),
    "val/loss": ({}, -1),
    "val/auroc": ({"metrics": AUROC}, 1),
    "loss": ({}, -1),
    "val/recall": ({"metrics": {"recall": MulticlassRecall(3)}, "select_mode": "min"}, -1),
}


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("name", ["joint", "mla", "unimodal", "ensemble", "di-mml"])
def test_the_best_epoch_by_any_figure_is_kept(name, select):
    options, sign = SELECTIONS[select]
    trainer, model = make_trainer(name, select=select, max_epochs=6, lr=2e-2, **options), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    figure = select.removeprefix("val/")
    last = trainer.history[-1]["stage"]
    stage = [entry["val"] for entry in trainer.history if entry["stage"] == last]
    found = trainer.test(model, SPLITS.val).as_dict()
    if name in ("unimodal", "ensemble"):
        # Each modality's encoder and head keep their own best epoch.
        for m, value in found[f"modality_{figure}"].items():
            best = max(sign * entry[f"modality_{figure}"][m] for entry in stage)
            assert sign * value == pytest.approx(best, abs=1e-5)
    else:
        assert sign * found[figure] == pytest.approx(max(sign * v[figure] for v in stage), abs=1e-5)


def test_selection_goes_on_where_it_was(tmp_path):
    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    options = {"select": "val/loss", "max_epochs": 6, "lr": 5e-2}
    whole, model = make_trainer("unimodal", **options), make_model()
    whole.fit(model, SPLITS.train, SPLITS.val)
    with pytest.raises(KeyboardInterrupt):
        make_trainer("unimodal", out_dir=tmp_path, on_epoch=stop, **options).fit(
            make_model(), SPLITS.train, SPLITS.val
        )
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert state["objective"]["select"] == "val/loss"
    again, twin = make_trainer("unimodal", out_dir=tmp_path, **options), make_model()
    again.fit(twin, SPLITS.train, SPLITS.val, resume=True)
    assert again.test(twin, SPLITS.test) == whole.test(model, SPLITS.test)
    with raises("the checkpoint must be of a run with objective {'select': 'val/accuracy', 'select_mode'"):
        make_trainer("unimodal", out_dir=tmp_path, max_epochs=6, lr=5e-2).fit(
            make_model(), SPLITS.train, SPLITS.val, resume=True
        )


@pytest.mark.parametrize(
    ("options", "text", "kind"),
    [
        (
            {"select": "val/acuracy"},
            "select must be one of val/accuracy, val/macro_f1, val/loss, got 'val/acu",
            ValueError,
        ),
        (
            {"select": "train/loss"},
            "select must be one of val/accuracy, val/macro_f1, val/loss, got",
            ValueError,
        ),
        (
            {"select": "val/loss", "select_mode": "most"},
            "select_mode must be one of max, min, got",
            ValueError,
        ),
        (
            {"metrics": {"auroc": MulticlassAUROC}},
            "metrics['auroc'] must be a torchmetrics object, got",
            TypeError,
        ),
        (
            {"metrics": {"loss": MulticlassAUROC(3)}},
            "metrics must not be named accuracy, contribution",
            ValueError,
        ),
        (
            {"metrics": {"matrix": MulticlassConfusionMatrix(3)}, "select": "val/matrix"},
            "select_mode must be max or min for val/matrix, as MulticlassConfusionMatrix does not say",
            ValueError,
        ),
        (
            {"task": "regression", "select": "val/accuracy"},
            "select must be one of val/r2, val/mae, val/loss, got 'val/accuracy'",
            ValueError,
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, text, kind):
    with raises(text, kind):
        mmfast.Trainer("joint", **options)


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (
            MulticlassAUROC(5),
            "metrics['x'] must take probabilities [N, C] and classes [N], C = 3, and",
        ),
        (
            MulticlassRecall(3, average="none"),
            "metrics['x'] must take probabilities [N, C] and classes",
        ),
        (
            PearsonCorrCoef(),
            "metrics['x'] must take probabilities [N, C] and classes [N], C = 3, and",
        ),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_training(metric, text):
    seen = []
    trainer = make_trainer("joint", metrics={"x": metric}, on_epoch=seen.append)
    with raises(text):
        trainer.fit(make_model(), SPLITS.train, SPLITS.val)
    assert not seen


def test_a_figure_that_is_not_there_is_said():
    trainer, model = make_trainer("joint", max_epochs=1), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    with pytest.raises(KeyError, match="'acuracy'; did you mean accuracy"):
        trainer.test(model, SPLITS.test)["acuracy"]


def test_figures_that_select_are_taken_of_each_modality_alone():
    """`modality_<figure>` is there where it is needed, and costs nothing elsewhere."""
    trainer, model, test = fitted("unimodal", "regression", select="val/mae", max_epochs=3)
    found = trainer.test(model, test)
    with torch.no_grad():
        alone = trainer.learner.own_logits(trainer.learner.encode(test[:]))[..., 0]
    errors = [sk.mean_absolute_error(test.labels, each) for each in alone]
    assert list(found["modality_mae"].values()) == pytest.approx(errors, rel=1e-5)
    assert "modality_mae" not in fitted("unimodal", "regression", max_epochs=1)[0].history[0]["val"]
    assert DATA["regression"][2] is test
