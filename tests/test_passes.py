"""tools/passes: decodes are counted as a data set sees them, beside the least that the algorithms need."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import mmfast
from mmfast import methods
from mmfast.models import build_model
from support.stems import ROOT

TOOL = ROOT / "tools/passes"
SMALL = ["--train", "24", "--val", "12", "--test", "8", "--batch-size", "8", "--decode-ms", "0"]
# Samples that are read to see what is wrong, before anything is trained: of the training data four by checks,
# two by the first pass and two to count a batch's work.
FEW = 8


@pytest.fixture(scope="module")
def tool() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        modules = [importlib.import_module(name) for name in ("decodes", "least", "decode_tables")]
        yield SimpleNamespace(
            **{name: value for m in [*modules, loaded()] for name, value in vars(m).items()}
        )


def loaded() -> ModuleType:
    """Return the program, whose file has no ending, as a module."""
    loader = SourceFileLoader("passes", str(TOOL))
    spec = importlib.util.spec_from_loader("passes", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def ran(tool, tmp_path, name: str, *words: str):
    """Return what the tool finds of a method, and the data sets."""
    options = tool.parse([*SMALL, "--num-workers", "0", *words])
    data = tool.data_sets(options, tmp_path)
    return tool.measured(name, options, data), data


class Counting:
    """A log that counts by itself, too, as long as no two processes read one sample at a time."""

    def __init__(self, log, num_samples: int) -> None:
        self.log = log
        self.places = log.places
        # In this process and in workers, [2, M, N].
        self.seen = torch.zeros(2, 2, num_samples, dtype=torch.int64).share_memory_()

    def note(self, sample: int, modality: int) -> None:
        self.seen[int(torch.utils.data.get_worker_info() is not None), modality, sample] += 1
        self.log.note(sample, modality)

    def read(self) -> np.ndarray:
        return self.log.read()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_are_those_that_the_data_saw(num_workers, tool, tmp_path):
    options = tool.parse([*SMALL, "--num-workers", str(num_workers)])
    data = tool.data_sets(options, tmp_path)
    for part in data.values():
        part.log = Counting(part.log, len(part))
    row = tool.measured("joint", options, data)
    for name, part in data.items():
        counted, seen = row["decodes"][name], part.log.seen
        assert counted["in"] == dict(zip(("main", "workers"), seen.sum((1, 2)).tolist()))
        assert counted["of"] == dict(zip(("a", "b"), seen.sum((0, 2)).tolist()))
        assert counted["times"] == {"fewest": seen.sum(0).min(), "most": seen.sum(0).max()}
    assert (row["decodes"]["train"]["in"]["workers"] > 0) == (num_workers > 0)
    assert (row["workers_started"] > 0) == (num_workers > 0)


def test_a_part_of_a_sample_counts_as_a_part_and_what_is_absent_not_at_all(tool, tmp_path):
    options = tool.parse([*SMALL, "--absent", "0.5", "--no-labels"])
    data = tool.data_sets(options, tmp_path)["train"]
    assert not hasattr(data, "labels")
    a, b = data.presence
    whole, only_b = int((a & b).nonzero()[0]), int((~a).nonzero()[0])
    assert set(data[whole]) == {"a", "b", "a__present", "b__present", "label"}
    assert set(data.get(whole, ("b",))) == {"b", "b__present", "label"}
    assert data[only_b]["a"].eq(0).all()
    assert not data[only_b]["a__present"]
    records = data.log.read()
    assert records["sample"].tolist() == [whole, whole, whole, only_b, only_b]
    assert records["modality"].tolist() == [0, 1, 1, 1, 1]


def history(*copies: int, head: int = 0) -> list[dict]:
    first = [{"stage": "first", "epoch": e, "method": {"copies": float(n)}} for e, n in enumerate(copies)]
    return first + [{"stage": "head", "epoch": epoch} for epoch in range(head)]


# Ten samples to train on and four to validate, of two modalities; four epochs.
BY_HAND = [
    (methods.Joint(), history(0, 0, 0, 0), [20, 20, 20, 20], [8] * 4),
    # Valuated from the second epoch on, but not after the last.
    (methods.SampleValuation(warmup=2), history(0, 5, 7, 9), [20, 20 + 20, 20 + 5 + 20, 20 + 7], [8] * 4),
    (methods.SampleValuation(warmup=0), history(6, 5, 7, 9), [40, 46, 45, 27], [8] * 4),
    # All of validation is there from the validation of the epoch.
    (methods.DiagnoseRelearn(epochs=(3, 1)), history(0, 0, 0, 0), [20, 40, 20, 20], [8] * 4),
    (methods.DiagnoseRelearn(epochs=(0, 1, 2), max_times=2), history(0, 0, 0, 0), [40, 40, 20, 20], [8] * 4),
    (methods.DIMML(e0=3), history(0, 0, 0, 0, head=3), [20, 20, 20, 40, 20, 0, 0], [8, 8, 8, 8, 8, 0, 0]),
    (methods.FrozenUnimodal(), history(0, 0, 0, 0, head=2), [20, 20, 20, 20, 20, 0], [8, 8, 8, 8, 8, 0]),
]


@pytest.mark.parametrize(("method", "epochs", "train", "val"), BY_HAND)
def test_the_least_is_that_counted_by_hand(method, epochs, train, val, tool):
    everyone = torch.ones(2, 10, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    found = tool.least(SimpleNamespace(method=method), epochs, *everyone)
    assert found == list(zip(train, val))


def test_modality_level_valuation_needs_the_samples_it_draws(tool, tmp_path):
    options = tool.parse([*SMALL, "--train", "40"])
    data, ends = tool.data_sets(options, tmp_path), []
    trainer = mmfast.Trainer(
        # Without copies an epoch trains on each sample once: what is read more often was drawn.
        methods.ModalityValuation(alpha=0.0, fraction=0.5, warmup=2),
        max_epochs=3,
        on_epoch=lambda entry: ends.append(len(data["train"].log.read())),
    )
    model = build_model({"a": (tool.DIM,), "b": (tool.DIM,)}, tool.NUM_CLASSES, dim=4)
    learner = trainer.fit(model, data["train"], data["val"])
    samples, times = np.unique(data["train"].log.read()["sample"][ends[0] : ends[1]], return_counts=True)
    drawn = tool.drawn(learner, 1, 40)
    assert 10 < len(drawn) < 20
    # The first sample may be read to see what samples are like.
    assert set(samples[times > 2].tolist()) - {0} == set(drawn.tolist()) - {0}
    needed = tool.least(learner, trainer.history, data["train"].presence, data["val"].presence)
    assert [one.train for one in needed] == [80, 80 + 2 * len(drawn), 80]


@pytest.mark.parametrize("words", [[], ["--absent", "0.3", "--no-labels"], ["--num-workers", "1"]])
@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_decodes_the_least(name, words, tool, tmp_path):
    row, data = ran(tool, tmp_path, name, *words)
    for part in ("train", "val"):
        # And the few samples that are read to see what is wrong.
        made = sum(row["decodes"][part]["in"].values())
        assert 0 <= made - row["least"][part] <= 2 * FEW, part
        assert sum(row["behind"][part].values()) == 0
        if row["workers_started"]:
            assert row["decodes"][part]["in"]["main"] <= 2 * FEW
    # One for each data set, which stays until the end.
    assert row["workers_started"] in (0, 3)
    for epoch in row["epochs"]:
        for part in ("train", "val"):
            assert sum(epoch[part].values()) >= epoch["least"][part]
    for part in ("train", "val"):
        of_epochs = sum(sum(epoch[part].values()) for epoch in [*row["epochs"], row["behind"]])
        assert of_epochs == sum(row["decodes"][part]["in"].values()) == len(data[part].log.read())
        assert sum(epoch["least"][part] for epoch in row["epochs"]) == row["least"][part]


def test_joint_training_reads_each_sample_once_an_epoch(tool, tmp_path):
    row, _ = ran(tool, tmp_path, "joint", "--epochs", "5")
    assert row["least"] == {"train": 5 * 24 * 2, "val": 5 * 12 * 2, "test": 8 * 2}
    made = sum(row["decodes"]["train"]["in"].values())
    assert 0 <= made - row["least"]["train"] <= 2 * FEW


def test_places_name_the_code_that_asked(tool, tmp_path):
    row, _ = ran(tool, tmp_path, "sample-valuation", "--where")
    for part in tool.PARTS:
        counted = row["decodes"][part]
        assert sum(counted["places"].values()) == counted["in"]["main"]
    places = row["decodes"]["train"]["places"]
    assert any("TrainingLoop" in place and count >= 4 * 24 * 2 for place, count in places.items())
    assert any("contributions" in place and count >= 2 * 24 * 2 for place, count in places.items())
    assert row["method"] in "\n".join(tool.by_place([row]))


def test_options_that_trainer_lacks_are_left_out_and_named(tool, monkeypatch):
    options = tool.parse(["--prefetch", "3", "--num-workers", "1"])
    monkeypatch.setattr(tool.mmfast, "Trainer", lambda method, *, num_workers: None)
    assert "This Trainer has no prefetch: left out." in tool.head(options)
    monkeypatch.setattr(tool.mmfast, "Trainer", lambda method, *, num_workers, prefetch: None)
    assert tool.head(options)[1].endswith("num_workers 1, prefetch 3")


@pytest.mark.slow
def test_several_processes_are_counted_one_by_one(tmp_path):
    words = ["--processes", "2", "--methods", "joint", "--num-workers", "1", "--epochs", "3"]
    command = [sys.executable, str(TOOL), *SMALL, *words, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert [(row["method"], row["process"]) for row in rows] == [("joint", 0), ("joint", 1)]
    for row in rows:
        assert row["least"]["train"] == 3 * 24 * 2
        # Half of the training data each, and what is read to see what is wrong.
        assert 0 <= sum(row["decodes"]["train"]["in"].values()) - 3 * 12 * 2 <= 2 * FEW
        assert len(row["epochs"]) == 3
    lines = [line for line in done.stdout.splitlines() if line.startswith("joint")]
    assert [line.split()[1] for line in lines[:2]] == ["0", "1"]
