"""`mmfast predict`: new data of every form, read and standardised as in training, as a table."""

from __future__ import annotations

import csv
import wave

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

import torch
from typer.testing import CliRunner

import mmfast
from mmfast.cli.commands import app
from mmfast.training import checkpoint

FAST = ["--epochs", "2", "--dim", "8", "--accelerator", "cpu"]
NAMES = np.array(["cat", "dog", "owl"])


def command(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def predict(run, data, *words):
    return command("predict", "--model", run, "--data", data, "--accelerator", "cpu", *words)


def rows_of(path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def arrays(size: int, seed: int) -> dict:
    rng, labels = np.random.default_rng(seed), np.arange(size) % 3
    return {
        "label": NAMES[labels],
        "audio": rng.normal(size=(size, 5)) * 20 + 300 + 40 * labels[:, None],
        "pose": rng.normal(size=(size, 4, 3)) * 0.1 - 0.1 * labels[:, None, None],
        "pose__present": rng.random(size) > 0.2,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def run(folder):
    """A run on two modalities of a file, one of which is taken in another way than its shape says."""
    np.savez(folder / "train.npz", **arrays(120, 0))
    words = ["--data", folder / "train.npz", "--out", folder / "run", "--encoder", "pose=gru", *FAST]
    assert command("train", *words).exit_code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def new(folder):
    np.savez(folder / "new.npz", **arrays(30, 1))
    return folder / "new.npz"


def changed(new, path, *without, **others):
    kept = {key: value for key, value in np.load(new).items() if key not in without}
    np.savez(path, **(kept | others))
    return path


def by_hand(run, data: dict):
    """Return the logits for arrays that are standardised here."""
    learner, size = mmfast.load(run), len(next(iter(data.values())))
    batch = {}
    for name, axis in (("audio", 1), ("pose", 2)):
        mean, inverse = (np.asarray(x) for x in learner.scaling[name])
        assert data[name].shape[axis] == len(mean)
        batch[name] = torch.from_numpy((data[name] - mean) * inverse).float()
        batch[f"{name}__present"] = torch.from_numpy(data.get(f"{name}__present", np.ones(size, bool)))
    with torch.no_grad():
        return learner.predict(batch)


def test_a_file_with_labels(run, new, folder):
    result = predict(run, new)
    assert result.exit_code == 0, result.output
    rows, data = rows_of(run / "predictions-new.csv"), dict(np.load(new))
    logits = by_hand(run, data)
    assert [row["prediction"] for row in rows] == NAMES[logits.argmax(1)].tolist()
    largest = logits.softmax(1).amax(1).tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(largest, abs=1e-5)
    assert [row["row"] for row in rows] == [row["key"] for row in rows] == list(map(str, range(30)))
    assert [row["label"] for row in rows] == data["label"].tolist()
    assert [row["pose__present"] for row in rows] == [str(has) for has in data["pose__present"].tolist()]
    right = sum(row["correct"] == "True" for row in rows)
    assert right == sum(row["label"] == row["prediction"] for row in rows)
    assert f"accuracy {100 * right / 30:.1f}% of 30 samples with a label" in result.stdout
    assert "joint, seed 0, on 30 samples of" in result.stdout
    counted = sum(row["prediction"] == "dog" for row in rows)
    assert next(line for line in result.stdout.splitlines() if line.startswith("dog ")).split()[1] == str(
        counted
    )


def test_a_file_without_labels_as_parquet(run, new, folder):
    from pyarrow.parquet import read_table

    bare = changed(new, folder / "bare.npz", "label")
    result = predict(run, bare, "--out", folder / "out" / "p.parquet", "--eval-batch-size", 7)
    assert result.exit_code == 0, result.output
    table = read_table(folder / "out" / "p.parquet").to_pydict()
    assert table["prediction"] == NAMES[by_hand(run, dict(np.load(new))).argmax(1)].tolist()
    assert not {"label", "correct"} & set(table)
    assert "accuracy" not in result.stdout


def test_a_modality_that_is_missing_counts_as_absent_and_is_told(run, new, folder):
    lacking = changed(new, folder / "lacking.npz", "pose", "pose__present", posture=np.zeros((30, 4)))
    result = predict(run, lacking, "--out", folder / "lacking.csv")
    assert result.exit_code == 0, result.output
    assert "lacking.npz: no sample has pose: it counts as absent in all" in result.stderr
    assert "passed over, as the model does not know them: posture" in result.stderr
    data = dict(np.load(new)) | {"pose__present": np.zeros(30, bool)}
    rows = rows_of(folder / "lacking.csv")
    assert [row["prediction"] for row in rows] == NAMES[by_hand(run, data).argmax(1)].tolist()
    assert {(row["pose__present"], row["pose__prediction"]) for row in rows} == {("False", "")}


@pytest.mark.parametrize("header", ["", "a\n"])
@pytest.mark.parametrize("before", ["", "row 1,"])
def test_a_table_says_how_to_make_new_data_of_it(run, new, tmp_path, header, before):
    found = np.load(new)
    table = np.hstack([found["audio"], found["pose"].reshape(30, -1)])
    path = tmp_path / "new data.csv"
    path.write_text(header + "".join(f"{before}{','.join(map(str, row))}\n" for row in table.tolist()))
    result = predict(run, path, "--out", tmp_path / "p.csv")
    assert result.exit_code == 2
    assert "label" not in result.stderr
    assert "which columns are which of the model's modalities, audio or pose" in result.stderr
    exec(result.stderr[result.stderr.index("import numpy") :])
    result = predict(run, path.with_suffix(".npz"), "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    with np.load(path.with_suffix(".npz")) as made:
        np.testing.assert_allclose(made["pose"], found["pose"])


def test_an_array_says_how_to_make_new_data_of_it(run, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((30, 5)))
    result = predict(run, tmp_path / "x.npy", "--out", tmp_path / "p.csv")
    assert result.exit_code == 2
    assert "label" not in result.stderr
    exec(result.stderr[result.stderr.index("import numpy") :])
    assert predict(run, tmp_path / "x.npz", "--out", tmp_path / "p.csv").exit_code == 0


def test_a_part_of_the_training_data(run, folder):
    result = predict(run, folder / "train.npz", "--split", "test", "--out", folder / "test.csv")
    assert result.exit_code == 0, result.output
    rows, data = rows_of(folder / "test.csv"), dict(np.load(folder / "train.npz"))
    keys = [int(row["key"]) for row in rows]
    assert len(rows) == len(mmfast.data.load(folder / "train.npz").test)
    assert [row["label"] for row in rows] == data["label"][keys].tolist()
    logits = by_hand(run, data)[keys]
    assert [row["prediction"] for row in rows] == NAMES[logits.argmax(1)].tolist()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"audio": np.zeros((30, 6))}, "audio must have samples of shape [5], as in training, got [6]"),
        (
            {"label": np.array(["dogg"] * 30)},
            "labels must be among the model's classes, cat, dog, owl, got 'dogg'; did you mean dog?",
        ),
        ({"label": np.full(30, 0.5)}, "labels must be integers or strings, got float64 with 0.5"),
        (
            {"label": NAMES[[0] * 29]},
            "labels must have shape [N] with N = 30 as audio, pose, pose__present, got [29]",
        ),
        ({"pose__presnt": np.ones(30, bool)}, "got 'pose__presnt'; did you mean pose__present?"),
        ({"audio": np.full((30, 5), np.nan)}, "x.npz: audio must be finite in float32, got 150"),
    ],
    ids=["shape", "class", "kind", "length", "mark", "nan"],
)
def test_files_that_do_not_fit_are_refused(run, new, tmp_path, change, text):
    result = predict(run, changed(new, tmp_path / "x.npz", **change), "--out", tmp_path / "p.csv")
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.startswith("mmfast: ")
    assert not (tmp_path / "p.csv").exists()


def test_other_words_that_do_not_fit_are_refused(run, new, folder, tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 2)))
    for words, text in (
        ((run, new, "--out", "p.txt"), "ending of out must be one of .csv, .parquet, got '.txt'"),
        ((run, new, "--split", "dev"), "split must be one of train, val, test, got 'dev'"),
        ((run, tmp_path / "other.npz"), "at least one of the model's modalities, audio, pose, got x"),
        ((run, tmp_path / "none.npz"), "data must be"),
        ((run, "htad"), "labels must be among the model's classes, cat, dog, owl, got 'brush_teeth'"),
        ((folder, new), "no checkpoint at"),
        ((run, new, "--accelerator", "cuda"), "accelerator 'cuda' cannot be used"),
    ):
        if "cuda" in text and torch.cuda.is_available():
            continue
        result = predict(*words)
        assert result.exit_code == 2, words
        assert text in result.stderr


def test_a_run_of_python_is_refused(tmp_path, new):
    splits = mmfast.data.synthetic(60, 3)
    trainer = mmfast.Trainer("joint", max_epochs=1, out_dir=tmp_path / "run", accelerator="cpu")
    trainer.fit(mmfast.models.build_model(splits.shapes, 3, dim=4), splits.train)
    result = predict(tmp_path / "run", new)
    assert result.exit_code == 2
    assert (
        "is of a program with data or a model of its own, of which it does not tell source" in result.stderr
    )
    assert "in Python mmfast.load(..., model=) takes it" in result.stderr


# The embedded data, and folders


def test_the_embedded_data_in_their_order(tmp_path):
    pytest.importorskip("multiviewstacking")
    assert command("train", "--out", tmp_path / "run", *FAST).exit_code == 0
    assert predict(tmp_path / "run", "htad", "--out", tmp_path / "p.csv").exit_code == 0
    rows, raw = rows_of(tmp_path / "p.csv"), mmfast.data.load("htad", standardize=False)
    assert [row["key"] for row in rows] == list(map(str, range(1386)))
    found = mmfast.load(tmp_path / "run").predict(raw.test)
    assert [rows[key]["prediction"] for key in found.sample_keys] == found.labels


def test_figures_on_the_training_data_are_told_apart(run, new, folder):
    flatter = "these are the data of training, and figures on them flatter the model"
    for words, is_told in (
        ((folder / "train.npz",), True),
        ((folder / "train.npz", "--split", "train"), True),
        ((folder / "train.npz", "--split", "val"), False),
        ((new,), False),
    ):
        result = predict(run, *words, "--out", folder / "p.csv")
        assert result.exit_code == 0, result.output
        assert (flatter in result.stderr) == is_told


def record(path, tone: float, *, rate: int = 8000, seconds: float = 0.2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(round(tone * 1000))
    t = np.arange(round(rate * seconds)) / rate
    sound = 0.4 * np.sin(2 * np.pi * tone * t) + 0.1 * rng.normal(size=len(t))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 20000).astype(np.int16).tobytes())


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of recordings and vectors, a run on it, and where new data go."""
    pytest.importorskip("soundfile")
    path = tmp_path_factory.mktemp("sounds")
    for label, tone in (("high", 2000), ("low", 300)):
        for i in range(14):
            record(path / "data" / label / f"clip{i}.wav", tone + 10 * i)
            np.save(path / "data" / label / f"clip{i}.pose.npy", np.full(3, i + tone, dtype=np.float32))
    assert command("train", "--data", path / "data", "--out", path / "run", *FAST).exit_code == 0
    return path


def test_a_folder_without_classes_is_read_as_in_training(sounds, tmp_path):
    # Longer than any of training, and one without a recording.
    record(tmp_path / "new" / "one.wav", 2000, seconds=0.5)
    record(tmp_path / "new" / "two.wav", 300, seconds=0.1)
    np.save(tmp_path / "new" / "three.pose.npy", np.full(3, 2003.0))
    result = predict(sounds / "run", tmp_path / "new", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    rows = {row["key"]: row for row in rows_of(tmp_path / "p.csv")}
    assert list(rows) == ["one", "three", "two"]
    assert rows["three"]["audio__present"] == "False"
    assert rows["one"]["pose__present"] == "False"
    # Cut to the length of training.
    record(tmp_path / "short" / "one.wav", 2000, seconds=0.5)
    with wave.open(str(tmp_path / "short" / "one.wav"), "rb") as file:
        parameters, content = file.getparams(), file.readframes(1600)
    with wave.open(str(tmp_path / "short" / "one.wav"), "wb") as file:
        file.setparams(parameters)
        file.writeframes(content)
    assert predict(sounds / "run", tmp_path / "short", "--out", tmp_path / "s.csv").exit_code == 0
    (short,) = rows_of(tmp_path / "s.csv")
    assert float(short["probability"]) == pytest.approx(float(rows["one"]["probability"]), abs=1e-6)


def test_folders_of_classes_and_a_part(sounds, tmp_path):
    result = predict(sounds / "run", sounds / "data", "--out", tmp_path / "all.csv")
    assert result.exit_code == 0, result.output
    rows = {row["key"]: row for row in rows_of(tmp_path / "all.csv")}
    assert len(rows) == 28
    assert rows["low/clip3"]["label"] == "low"
    assert "accuracy" in result.stdout
    words = ("--split", "test", "--out", tmp_path / "test.csv")
    assert predict(sounds / "run", sounds / "data", *words).exit_code == 0
    for row in rows_of(tmp_path / "test.csv"):
        assert row["prediction"] == rows[row["key"]]["prediction"]
        assert float(row["probability"]) == pytest.approx(float(rows[row["key"]]["probability"]), abs=1e-5)


def test_folders_that_do_not_fit_are_refused(sounds, tmp_path):
    record(tmp_path / "rate" / "one.wav", 2000, rate=16000)
    record(tmp_path / "class" / "middle" / "one.wav", 800)
    record(tmp_path / "both" / "one.wav", 800)
    record(tmp_path / "both" / "low" / "two.wav", 800)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "a.gaze.npy", np.zeros(3))
    for name, text in (
        ("rate", "has 16000 samples a second, those of training had 8000; resample it"),
        ("class", "labels must be among the model's classes, high, low, got 'middle'"),
        ("both", "got files beside the folders low"),
        ("empty", "no usable file"),
        ("other", "at least one of the model's modalities, audio, pose, got gaze"),
    ):
        result = predict(sounds / "run", tmp_path / name, "--out", tmp_path / "p.csv")
        assert result.exit_code == 2, name
        assert text in " ".join(result.stderr.split())


def test_a_run_of_before_the_rate_was_noted_says_so(sounds, tmp_path):
    state = checkpoint.load(sounds / "run" / "model.ckpt")
    state.pop("format")
    del state["metadata"]["sound"]
    checkpoint.save(tmp_path / "run" / "model.ckpt", state)
    record(tmp_path / "new" / "one.wav", 2000)
    result = predict(tmp_path / "run", tmp_path / "new", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    assert "does not tell the sample rate of its recordings, these have 8000 a second" in result.stderr
