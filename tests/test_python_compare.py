"""A comparison from Python: the runs of the trainer, their table, and what a folder keeps of them."""

from __future__ import annotations

import json

import pytest
import torch
from test_objectives import raises
from test_tasks import DATA, diabetes
from test_trainer import QUICK, SMALL, SPLITS, make_model
from torchmetrics.classification import MulticlassAUROC
from typer.testing import CliRunner

import mmfast
from mmfast import methods
from mmfast.cli.commands import app
from mmfast.models import build_model

PARTS = (SPLITS.train, SPLITS.val, SPLITS.test)
METHODS = ["joint", methods.DIMML(**SMALL["di-mml"]), "mla"]


def model():
    return build_model(SPLITS.shapes, SPLITS.num_classes, dim=8)


def compared(chosen=METHODS, **options):
    return mmfast.compare(chosen, model, *PARTS, **(QUICK | options))


def test_runs_are_those_of_the_trainer():
    found = compared(seeds=2)
    assert [(e["method"], e["seed"]) for e in found.runs] == [
        (name, seed) for name in ("joint", "di-mml", "mla") for seed in (0, 1)
    ]
    trainer, own = mmfast.Trainer("mla", seed=1, **QUICK), make_model(1)
    trainer.fit(own, *PARTS[:2])
    assert found.runs[-1]["metrics"] == trainer.test(own, SPLITS.test).as_dict()
    assert found.figures("accuracy")["mla"][1] == trainer.test(own, SPLITS.test).accuracy
    text = str(found)
    assert "Accuracy     Macro-F1" in text
    assert "Data: samples train 168, val 36, test 36." in text
    assert max(map(len, text.splitlines())) <= 110
    assert repr(found) == "Compared(6 runs of joint, di-mml, mla)"
    with pytest.raises(
        KeyError, match="'auroc' is no figure of the runs, which are accuracy, macro_f1, loss"
    ):
        found.figures("auroc")


def test_what_a_folder_keeps(tmp_path):
    found = compared(["joint", "mla"], out_dir=tmp_path, metrics={"auroc": MulticlassAUROC(3)})
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["metrics"] for run in results["runs"]] == [run["metrics"] for run in found.runs]
    assert "auroc" in results["runs"][0]["metrics"]
    learner = mmfast.load(tmp_path / "runs" / "mla-seed0", model=model())
    predicted = learner.predict(SPLITS.test)
    assert predicted.accuracy == pytest.approx(found.figures("accuracy")["mla"][0])
    seen = []
    options = {"metrics": {"auroc": MulticlassAUROC(3)}, "on_run": seen.append, "out_dir": tmp_path}
    again = compared(["joint", "mla"], resume=True, seeds=2, **options)
    assert [(e["method"], e["seed"]) for e in seen] == [("joint", 1), ("mla", 1)]
    assert again.runs[0]["metrics"] == found.runs[0]["metrics"]
    with raises(f"{tmp_path} holds runs already: give resume=True, overwrite=True or another out_dir"):
        compared(["joint"], out_dir=tmp_path)
    with pytest.raises(ValueError, match="label_smoothing"):
        compared(["joint"], out_dir=tmp_path, resume=True, label_smoothing=0.1)
    anew = compared(["joint"], out_dir=tmp_path, overwrite=True, label_smoothing=0.1)
    assert anew.runs[0]["history"] != found.runs[0]["history"]


def test_other_tasks_have_a_table_of_their_figures():
    train, val, test = diabetes()

    def own():
        return build_model(train.shapes, 1, dim=8)

    found = mmfast.compare("joint, ensemble", own, train, val, test, task="regression", max_epochs=3, seeds=2)
    lines = str(found).splitlines()
    assert lines[0].split() == ["Method", "r2", "mae", "loss"]
    assert lines[1].startswith("Joint ") and " ± " in lines[1]  # noqa: PT018
    assert "Method, modality_r2" in str(found)
    assert "Method, contribution" in str(found)
    with raises("summaries are of task='multiclass', got 'regression'"):
        _ = found.summaries


def test_a_run_that_diverges_is_one_without_figures():
    found = compared(["joint", "mla"], lr=1e30, max_epochs=2)
    assert all("diverged" in entry for entry in found.runs)
    assert "diverged" in str(found)
    assert found.figures("accuracy") == {"joint": [], "mla": []}


@pytest.mark.parametrize(
    ("arguments", "options", "text", "kind"),
    [
        (
            (METHODS, make_model(), *PARTS),
            {},
            "model must be a function that returns a new model, got",
            TypeError,
        ),
        ((METHODS, lambda: 3, *PARTS), {}, "model must return a mmfast.MultimodalModel, got 3", TypeError),
        (([], model, *PARTS), {}, "methods must name at least one method, got none", ValueError),
        ((["mla", "mla"], model, *PARTS), {}, "methods must be given once each, got mla 2 times", ValueError),
        ((["mlb"], model, *PARTS), {}, "method must be one of joint", ValueError),
        ((METHODS, model, *PARTS), {"seeds": 0}, "seeds must be at least 1, got 0", ValueError),
        (
            (METHODS, model, *PARTS),
            {"seed": 0},
            "seed is the comparison's to give, and no option of it",
            TypeError,
        ),
        ((METHODS, model, *PARTS), {"epochs": 3}, "Trainer has no setting 'epochs'", ValueError),
        (
            (["joint"], model, *DATA["regression"]),
            {"max_epochs": 1},
            "samples of train must have 'a'",
            ValueError,
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(arguments, options, text, kind):
    with raises(text, kind):
        mmfast.compare(*arguments, **options)


def test_the_last_method_is_checked_before_the_first_runs():
    seen = []
    unequal = {"a": torch.nn.Linear(6, 8), "b": torch.nn.Linear(6, 4)}

    def own():
        return mmfast.MultimodalModel(unequal, {"a": 8, "b": 4}, 3)

    with raises("mla needs features of equal dimension D from all encoders, got a 8, b 4"):
        mmfast.compare(["joint", "mla"], own, *PARTS, on_run=seen.append, **QUICK)
    assert not seen


def test_a_model_that_is_no_new_one_is_refused():
    made = model()
    with raises("model must return a new model each time, got one with weights of the one before"):
        mmfast.compare(["joint", "mla"], lambda: made, *PARTS, **QUICK)
    with raises("model must return a new model each time, got one with weights of the one before"):
        mmfast.compare(["joint"], lambda: made, *PARTS, seeds=2, **QUICK)


def test_nothing_else_of_the_program_is_drawn_anew():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compared(["joint"], max_epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_without_validation_data():
    train, _, test = PARTS
    found = mmfast.compare(["joint"], model, train, None, test, **QUICK)
    assert "Data: samples train 168, test 36." in str(found)
    with raises("diagnose-relearn needs a validation split, got val=None"):
        mmfast.compare(["diagnose-relearn"], model, train, None, test, **QUICK)


def test_a_folder_is_of_one_precision(tmp_path):
    compared(["joint"], out_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="precision is 32-true there, bf16-mixed here"):
        compared(["joint", "mla"], out_dir=tmp_path, max_epochs=1, precision="bf16-mixed", resume=True)


def test_numbers_that_diverged_are_told():
    train, val, test = diabetes()
    options = {"task": "regression", "lr": 1e30, "max_epochs": 2}
    found = mmfast.compare(
        ["joint", "ensemble"], lambda: build_model(train.shapes, 1, dim=8), train, val, test, **options
    )
    text = " ".join(str(found).split())
    assert "Diverged, and in no figure: Joint with seed 0; Ensemble with seed 0. The first of them:" in text
    with raises("seeds must be an integer, got 1.5", TypeError):
        compared(["joint"], seeds=1.5)


def test_commands_say_that_a_run_of_a_program_is_for_python(tmp_path):
    compared(["joint"], out_dir=tmp_path, max_epochs=1)
    words = ["predict", "--model", str(tmp_path / "runs" / "joint-seed0"), "--data", "htad"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "is of a program with data or a model of its own" in result.stderr
    assert "mmfast.load(..., model=) takes it" in result.stderr
