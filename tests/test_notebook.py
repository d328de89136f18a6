"""A comparison in a notebook: tables, sentences and pictures come as HTML and PNG, and nothing fails."""

from __future__ import annotations

import base64

import pytest

pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

CELLS = [
    """
import mmfast
splits = mmfast.data.synthetic(140, 2, dims={"a<b>": 4, "image": 4}, unique={"a<b>": 0.3}, seed=0)
found = mmfast.compare(splits, ["joint", "unimodal"], seeds=2, max_epochs=2, dim=4)
""",
    "found",
    "found.table().T",
    "print(found.verdict)",
    "found.plot()",
    "found.plot('modality_accuracy')",
    "found.plot('contributions')",
    # What a notebook defines goes to other processes, too.
    """
def model():
    return mmfast.models.build_model(splits.shapes, splits.num_classes, dim=4)

parts = splits.train, splits.val, splits.test
both = mmfast.compare(parts, ["joint", "unimodal"], model=model, seeds=2, max_epochs=2, jobs=2)
assert both.figures("accuracy") == found.figures("accuracy")
""",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each cell gives, by kind: text/html and others, and under "stdout" what was printed."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    # Away from the clone, whose bare sources would hide what is installed.
    place = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources=place).execute()
    found = []
    for cell in book.cells:
        kinds = {}
        for output in cell.outputs:
            assert output.output_type != "error"
            # What tqdm says of widgets when torchmetrics imports transformers.
            assert output.get("name") != "stderr" or "IProgress" in output.text, output.text
            kinds |= output.get("data", {})
            if output.get("name") == "stdout":
                kinds["stdout"] = output.text
        found.append(kinds)
    return found


def test_the_bar_is_gone_when_all_runs_are_made(outputs):
    assert outputs[0].get("text/html") == ""


def test_several_jobs_find_the_same(outputs):
    # The cell asks for it itself.
    assert outputs[7].get("text/html") == ""


def test_a_comparison_is_a_table_with_sentences(outputs):
    shown = outputs[1]["text/html"]
    assert shown.count("<tr>") >= 3
    assert "Best unimodal" in shown
    assert "Joint training " in shown
    assert "Data: synthetic: 140 samples" in shown
    # Names of modalities are text.
    assert "a&lt;b&gt;" in shown
    assert "a<b>" not in shown
    assert outputs[1]["text/plain"] == "Comparison(4 runs of joint, unimodal)"


def test_its_table_is_one_of_pandas(outputs):
    shown = outputs[2]["text/html"]
    assert "dataframe" in shown
    assert "accuracy_std" in shown
    assert "image__contribution" in shown


def test_its_verdict_is_text(outputs):
    assert "Joint training " in outputs[3]["stdout"]


@pytest.mark.parametrize("cell", [4, 5, 6])
def test_pictures_are_shown(outputs, cell):
    assert base64.b64decode(outputs[cell]["image/png"]).startswith(b"\x89PNG")
