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
    return mmfast.compare(PARTS, chosen, model=model, **({"seeds": 1, "probe": False} | QUICK | options))


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
    assert "Method Accuracy Macro-F1 ECE Cost" in " ".join(text.split())
    assert "Data: samples train 168, val 36, test 36." in text
    assert max(map(len, text.splitlines())) <= 110
    assert repr(found) == "Comparison(6 runs of joint, di-mml, mla)"
    with pytest.raises(
        KeyError, match="'auroc' is no figure of the runs, which are accuracy, macro_f1, loss"
    ):
        found.figures("auroc")


def test_a_method_that_tables_would_leave_out_is_refused(monkeypatch, tmp_path):
    class Own(methods.Joint):
        name = "own"
        title = "My own"

    with raises("methods must be those of mmfast.methods.METHODS, by which tables and tests go, got Own"):
        compared(["joint", Own()])
    with raises(
        "methods must be those of mmfast.methods.METHODS, by which tables and tests go, got Taken: 'joint'"
    ):
        compared([type("Taken", (methods.Joint,), {})()])
    monkeypatch.setitem(methods.METHODS, "own", Own)
    # In other processes, too.
    found = compared(["joint", Own()], jobs=2, out_dir=tmp_path)
    assert list(found.table().index) == ["joint", "own"]
    monkeypatch.delitem(methods.METHODS, "own")
    kept = (tmp_path / "results.json").read_text()
    for is_there in (True, False):
        with pytest.raises(ValueError, match=r" has runs of a method that is not among .*, 'own': name"):
            compared(["joint"], out_dir=tmp_path, resume=True)
        # Nor is it left out where results.json is written anew from the runs beside it.
        assert not is_there or (tmp_path / "results.json").read_text() == kept
        (tmp_path / "results.json").unlink(missing_ok=True)


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

    options = {"task": "regression", "max_epochs": 3, "seeds": 2}
    found = mmfast.compare((train, val, test), "joint, ensemble", model=own, **options)
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
    ("options", "text", "kind"),
    [
        ({"model": make_model()}, "model must be a function that returns a new model, got", TypeError),
        ({"model": lambda: 3}, "model must return a mmfast.MultimodalModel, got 3", TypeError),
        ({"methods": []}, "methods must name at least one method, got none", ValueError),
        ({"methods": 3}, "methods must be a list of methods or their names, got 3", TypeError),
        ({"methods": methods.MLA}, "methods must be a list of methods or their names, got MLA", TypeError),
        (
            {"methods": [methods.MLA]},
            "method must be an instance, MLA(), or a name, got the class",
            TypeError,
        ),
        ({"methods": "mla,mla"}, "methods must be given once each, got mla 2 times", ValueError),
        ({"methods": ["mlb"]}, "method must be one of joint", ValueError),
        ({"seeds": 0}, "seeds must be at least 1, got 0", ValueError),
        ({"seeds": 1.5}, "seeds must be an integer, got 1.5", TypeError),
        (
            {"seed": 0},
            "seed is the comparison's to give, and no option of it: seeds is the number of runs",
            TypeError,
        ),
        ({"epochs": 3}, "mmfast.compare has no setting 'epochs'; did you mean max_epochs?", ValueError),
        ({"metod": 3}, "mmfast.compare has no setting 'metod'; did you mean methods", ValueError),
        ({"data": DATA["regression"], "max_epochs": 1}, "samples of train must have 'a'", ValueError),
        (
            {"model": None},
            "model must be given for data sets of your own, a function that returns a new model, such as "
            "lambda: mmfast.models.build_model(shapes, num_classes), got None",
            ValueError,
        ),
        (
            {"dim": 32},
            "dim must be left out, as the model is given, got 32",
            ValueError,
        ),
        (
            {"modalities": ["a"]},
            "modalities must be left out, as data sets of your own are taken as they are, got ['a']",
            ValueError,
        ),
        (
            {"data": SPLITS, "model": None, "split_seed": 1},
            "split_seed must be left out, as Splits are taken as they are, got 1",
            ValueError,
        ),
        (
            {"data": SPLITS, "model": None, "encoders": {"a": "sequence"}},
            "encoders must be among mlp, conv, gru, cnn, resnet18, as Splits are taken as they are, got "
            "'sequence' for a: mmfast.data.load(..., encoders=) takes it",
            ValueError,
        ),
        (
            {"data": SPLITS, "encoders": {"a": "mlp"}},
            "encoders must not name an encoder, as the model is given, got 'mlp' for a",
            ValueError,
        ),
        ({"data": PARTS[:2]}, "data must be (train, val, test), of which val may be None, got", ValueError),
        (
            {"data": {"train": 1, "valid": 2}},
            "data must have the keys train, val and test, got 'valid'; did you mean val",
            ValueError,
        ),
        ({"data": {"train": PARTS[0]}}, "data must hold a data set for test, got None", ValueError),
        (
            {"data": PARTS[0]},
            'data must be "htad", a FILE.npz, a FOLDER, mmfast.data.Splits, or a tuple',
            TypeError,
        ),
        (
            {"data": "my.npy"},
            "data must be \"htad\", a FILE.npz or a FOLDER, got 'my.npy', not found",
            ValueError,
        ),
        (
            {"resume": True, "overwrite": True, "out_dir": "x"},
            "resume and overwrite exclude each other",
            ValueError,
        ),
        ({"resume": True}, "out_dir must be given to resume, got None", ValueError),
        ({"out_dir": 3}, "out_dir must be a folder, got 3", TypeError),
        ({"modalities": "a,b"}, "modalities must be a list of names, got 'a,b'", TypeError),
        (
            {"encoders": "gru"},
            "encoders must map modalities to encoders, such as {'pose': 'gru'}, got 'gru'",
            TypeError,
        ),
        (
            {"model": mmfast.MultimodalModel},
            "model must be a function that returns a new model, got MultimodalModel",
            TypeError,
        ),
        ({"metadata": {}}, "metadata is the comparison's to give", TypeError),
        ({"progress": "no"}, "progress must be True, False or None, got 'no'", TypeError),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(options, text, kind):
    given = {"data": PARTS, "methods": METHODS, "model": model, "on_run": pytest.fail} | options
    with raises(text, kind):
        mmfast.compare(**given)


def test_the_order_of_arguments_is_told():
    how = "mmfast.compare((train, val, test), methods, model=make_model)"
    for data in (METHODS, ["joint"], "joint, mla", "all", methods.MLA()):
        with raises(f"data must come first and methods after them, got methods: {how}", TypeError):
            mmfast.compare(data, model, *PARTS)
    text = "data must be one argument, and what comes after methods have a name, got 3 arguments without one"
    with raises(f"{text}: {how}", TypeError):
        mmfast.compare(*PARTS, model=model)


def test_the_last_method_is_checked_before_the_first_runs():
    seen = []
    unequal = {"a": torch.nn.Linear(6, 8), "b": torch.nn.Linear(6, 4)}

    def own():
        return mmfast.MultimodalModel(unequal, {"a": 8, "b": 4}, 3)

    with raises("mla needs features of equal dimension D from all encoders, got a 8, b 4"):
        mmfast.compare(PARTS, ["joint", "mla"], model=own, on_run=seen.append, **QUICK)
    assert not seen


def test_a_model_that_is_no_new_one_is_refused():
    made = model()
    with raises("model must return a new model each time, got one with weights of the one before"):
        mmfast.compare(PARTS, ["joint", "mla"], model=lambda: made, seeds=1, **QUICK)
    with raises("model must return a new model each time, got one with weights of the one before"):
        mmfast.compare(PARTS, ["joint"], model=lambda: made, seeds=2, **QUICK)


def test_nothing_else_of_the_program_is_drawn_anew():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compared(["joint"], max_epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_without_validation_data():
    train, _, test = PARTS
    found = mmfast.compare({"train": train, "test": test}, ["joint"], model=model, seeds=1, **QUICK)
    assert "Data: samples train 168, test 36." in str(found)
    with raises("diagnose-relearn needs a validation split, got val=None"):
        mmfast.compare((train, None, test), ["diagnose-relearn"], model=model, **QUICK)


def test_a_folder_is_of_one_precision(tmp_path):
    compared(["joint"], out_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="precision is 32-true there, bf16-mixed here"):
        compared(["joint", "mla"], out_dir=tmp_path, max_epochs=1, precision="bf16-mixed", resume=True)


def test_numbers_that_diverged_are_told():
    train, val, test = diabetes()
    options = {"task": "regression", "lr": 1e30, "max_epochs": 2, "seeds": 1}
    options["model"] = lambda: build_model(train.shapes, 1, dim=8)
    found = mmfast.compare((train, val, test), ["joint", "ensemble"], **options)
    text = " ".join(str(found).split())
    assert "Diverged, and in no figure: Joint with seed 0; Ensemble with seed 0. The first of them:" in text


def test_commands_say_that_a_run_of_a_program_is_for_python(tmp_path):
    compared(["joint"], out_dir=tmp_path, max_epochs=1)
    words = ["predict", "--model", str(tmp_path / "runs" / "joint-seed0"), "--data", "htad"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "is of a program with data or a model of its own" in result.stderr
    assert "mmfast.load(..., model=) takes it" in result.stderr
