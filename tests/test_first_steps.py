"""What a new user meets first: packages that are missing, files of another kind, a folder one level up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mmfast
from mmfast import data

ROOT = Path(__file__).parents[1]
INSTALL = 'pip install "mmfast[train]"'


def without(packages, program):
    """Run a program where packages are not installed, and return what it prints."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in packages), program]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", ["mmfast.Trainer", "from mmfast import Trainer"])
@pytest.mark.parametrize("package", ["lightning_fabric", "torchmetrics"])
def test_the_trainer_names_the_package_it_needs(package, words):
    program = f"""
import mmfast
try:
    {words}
except ImportError as error:
    print(type(error).__name__, error)
"""
    printed = without([package], program)
    assert printed == f"ImportError mmfast.Trainer needs {package}, which is not installed: {INSTALL}\n"


def test_models_methods_and_valuation_need_no_extra():
    program = """
import mmfast
splits = mmfast.data.synthetic(60, 3)
model = mmfast.models.build_model(splits.shapes, 3)
valuation = mmfast.valuate(model, splits.test)
print(len(valuation.labels), mmfast.methods.Joint().name)
for call in (valuation.to_parquet, valuation.plot):
    try:
        call("never")
    except ImportError as error:
        print(error)
"""
    extra = [
        "lightning_fabric",
        "torchmetrics",
        "sklearn",
        "matplotlib",
        "rich",
        "typer",
        "pyarrow",
        "pandas",
    ]
    counted, parquet, plot = without(extra, program).splitlines()
    assert counted == "9 joint"
    assert parquet == f"to_parquet needs pyarrow, which is not installed: {INSTALL}"
    assert plot.startswith("plot needs ")
    assert plot.endswith(f", which is not installed: {INSTALL}")


def test_a_module_of_our_own_that_is_missing_is_no_matter_of_installing():
    from mmfast.errors import needs_train

    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mmfast\.nothing'"), needs_train("it"):
        import mmfast.nothing  # noqa: F401


def run_advice(text, **given):
    """Run the Python that an error advises."""
    exec(text[text.index("import numpy") :], given)


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_a_table_says_how_to_make_an_npz_of_it(tmp_path, suffix, mark):
    rows = [f"{'cat' if i % 2 else 'dog'}{mark}{i}{mark}{i / 2}" for i in range(40)]
    path = tmp_path / f"my data.{suffix}"
    path.write_text("\n".join([f"label{mark}x{mark}y", *rows]))
    with pytest.raises(ValueError, match=r"got the table .*; name its columns") as caught:
        data.load(path)
    run_advice(str(caught.value))
    splits = data.load(path.with_suffix(".npz"))
    assert splits.class_names == ("cat", "dog")
    assert splits.shapes == {"sensor": (2,)}


def advice_on(path):
    with pytest.raises(ValueError, match="got the table") as caught:
        data.load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "read"),
    [
        ("", "delimiter=',')"),
        ("label,x,y\n", "delimiter=',', skiprows=1)"),
        (",0,1\n", "delimiter=',', skiprows=1)"),
        ("0,1,2\n", "delimiter=',', skiprows=1)"),
        ('"label","x","y"\n', "delimiter=',', skiprows=1, quotechar='\"')"),
        ("# made by hand\n", "delimiter=',')"),
        ("# made by hand\nlabel,x,y\n", "delimiter=',', skiprows=2)"),
        ("label,2015,1999\n", "delimiter=',', skiprows=1)"),
    ],
    ids=["none", "names", "index", "numbers", "quotes", "comment", "comment and names", "label and years"],
)
@pytest.mark.parametrize("labels", [("1", "0"), ("cat", "dog")], ids=["whole", "words"])
def test_a_line_of_names_is_told_from_a_sample(tmp_path, header, read, labels):
    if header.startswith("label,2") and labels[0] == "cat":
        pytest.skip("nothing tells it from a sample")
    path = tmp_path / "x.csv"
    path.write_text(header + "".join(f"{labels[i % 2]},{i / 7:.3f},{i}\n" for i in range(40)))
    text = advice_on(path)
    assert read in text
    assert "here the first the label" in text
    run_advice(text)
    found = np.load(tmp_path / "x.npz")
    assert (found["label"].shape, found["sensor"].shape) == ((40,), (40, 2))


@pytest.mark.parametrize(
    ("first", "why", "width"),
    [
        (lambda i: f"{i / 7:.3f}", "holds real numbers", 2),
        (lambda i: i, "seems to number or name the samples", 1),
        (lambda i: f"patient {i}", "seems to number or name the samples", 1),
    ],
    ids=["real", "rows", "names"],
)
def test_a_column_that_is_hardly_the_label_is_not_taken_for_it(tmp_path, first, why, width):
    path = tmp_path / "x.csv"
    path.write_text("".join(f"{first(i)},{i / 3:.3f},{i % 2}\n" for i in range(40)))
    text = advice_on(path)
    assert f"here LABEL, which you replace by that of labels (0 is the first, but it {why})," in text
    with pytest.raises(NameError, match="LABEL"):
        run_advice(text)
    run_advice(text.replace("LABEL", "2"))
    found = np.load(tmp_path / "x.npz")
    assert found["label"].tolist() == ["0", "1"] * 20
    assert found["sensor"].shape == (40, width)


def test_a_table_that_shows_nothing_is_met_with_advice(tmp_path):
    for text in ("", "\n\n", "label,x\n", "1,2", "a;b\nc;0.5\n", "a,b\n" + '"' * 3):
        (tmp_path / "x.csv").write_text(text)
        assert "np.loadtxt" in advice_on(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("a;b\nc;0.5\n")
    assert "delimiter=';'" in advice_on(tmp_path / "x.csv")


def test_an_npy_file_says_how_to_make_an_npz_of_it(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((40, 3)) * np.arange(40)[:, None])
    with pytest.raises(ValueError, match=r"got the single array .*; put it beside its") as caught:
        data.load(path)
    run_advice(str(caught.value), labels=np.arange(40) % 2)
    assert data.load(path.with_suffix(".npz")).shapes == {"sensor": (3,)}


def test_the_command_prints_the_advice_on_one_line_that_runs(tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mmfast.cli.commands import app

    path = tmp_path / "x.csv"
    path.write_text("\n".join(["label,x", *(f"{i % 2},{i}" for i in range(40))]))
    result = CliRunner().invoke(app, ["compare", "--data", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    run_advice(result.stderr)
    assert (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("inside", ["", "runs"])
def test_valuation_of_a_comparison_names_one_of_its_runs(tmp_path, inside):
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mmfast.cli.commands import app

    for run, file in (("joint-seed0", "last.ckpt"), ("mla-seed1", "model.ckpt"), ("notes", "model.ckpt")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / file).touch()
    result = CliRunner().invoke(app, ["valuate", "--model", str(tmp_path / inside)])
    assert result.exit_code == 2
    assert f"give one of them, such as {tmp_path / 'runs' / 'mla-seed1'}" in result.stderr


def test_names_of_other_trainers_are_known():
    with pytest.raises(ValueError, match=r"no setting 'learning_rate'; did you mean lr\?"):
        mmfast.Trainer("joint", learning_rate=0.1)


def test_nothing_fitted_is_said_where_a_model_is_missing():
    with pytest.raises(TypeError, match=r"got None: trainer\.learner is one after fit or restore"):
        mmfast.valuate(None, [])


def test_one_class_is_nothing_to_train():
    model = mmfast.models.build_model({"a": (3,)}, 1, dim=4)
    one = data.ArrayDataset({"a": torch.randn(8, 3)}, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="C = 2 classes at least"):
        mmfast.Trainer("joint", max_epochs=1).fit(model, one)
