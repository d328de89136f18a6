"""The trainer: reproducible, resumable, selecting on validation data, and plain about what is wrong."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast import methods
from mmfast.data import ArrayDataset, synthetic
from mmfast.methods.presets import PUBLISHED
from mmfast.models import build_model
from mmfast.training import checkpoint

SPLITS = synthetic(num_samples=240, num_classes=3, dims={"a": 6, "b": 6}, unique={"a": 0.3, "b": 0.1}, seed=0)
QUICK = {"max_epochs": 4, "batch_size": 32}
# Settings under which every hook of every method runs within a few epochs.
SMALL = {
    "sample-valuation": {"warmup": 1},
    "modality-valuation": {"warmup": 1},
    "di-mml": {"e0": 1, "head_epochs": 2},
    "frozen-unimodal": {"head_epochs": 2},
    "diagnose-relearn": {"epochs": (1, 2)},
    "mla": {"reset": "never"},
}


def make_model(seed: int = 0, fusion: str = "concat") -> mmfast.MultimodalModel:
    torch.manual_seed(seed)
    return build_model(SPLITS.shapes, SPLITS.num_classes, dim=8, fusion=fusion)


def make_trainer(name: str, **options) -> mmfast.Trainer:
    return mmfast.Trainer(methods.make(name, **SMALL.get(name, {})), **(QUICK | options))


def fitted(name: str, *, resume: bool = False, model_seed: int = 0, **options):
    trainer, model = make_trainer(name, **options), make_model(model_seed)
    trainer.fit(model, SPLITS.train, SPLITS.val, resume=resume)
    return trainer, model


def without_times(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def assert_same_state(one, other):
    """Hold the state dicts of two learners to be the same, bit for bit."""
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for key in states[0]:
        assert checkpoint.digest(states[0][key]) == checkpoint.digest(states[1][key]), key


class Killed(Exception):
    """Ends a run from outside, as no code of the project does."""


@pytest.mark.parametrize("name", methods.METHODS)
def test_same_seed_same_result_and_a_cut_run_ends_the_same(name, tmp_path):
    whole, model = fitted(name, seed=3)
    torch.manual_seed(99)
    again, twin = fitted(name, seed=3)
    assert without_times(whole.history) == without_times(again.history)
    assert_same_state(whole.learner, again.learner)
    assert whole.test(model, SPLITS.test) == again.test(twin, SPLITS.test)

    for cut in range(1, len(whole.history)):
        out = tmp_path / f"cut{cut}"

        def stop(entry, seen=[]):  # noqa: B006  one list per definition is what counts the calls
            seen.append(entry)
            if len(seen) > cut:  # noqa: B023  called within this turn of the loop
                raise Killed

        with pytest.raises(Killed):
            fitted(name, seed=3, out_dir=out, on_epoch=stop)
        # Other initial weights: everything must come from the checkpoint.
        resumed, third = fitted(name, seed=3, out_dir=out, resume=True, model_seed=8)
        assert without_times(resumed.history) == without_times(whole.history)
        assert resumed.test(third, SPLITS.test) == whole.test(model, SPLITS.test)


def test_another_seed_gives_another_result():
    one, two = fitted("joint", seed=0)[0], fitted("joint", seed=1)[0]
    assert one.history[-1]["loss"] != two.history[-1]["loss"]


def test_fit_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = make_model()
    torch.random.set_rng_state(before)
    make_trainer("joint").fit(model, SPLITS.train, SPLITS.val)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_earliest_best_validation_epoch_is_kept():
    trainer, model = fitted("joint", max_epochs=12, lr=0.03)
    best = max(entry["val"]["accuracy"] for entry in trainer.history)
    assert trainer.test(model, SPLITS.val).accuracy == pytest.approx(best)
    assert best > trainer.history[0]["val"]["accuracy"]


def test_without_validation_the_last_epoch_is_kept():
    trainer, model = make_trainer("joint"), make_model()
    trainer.fit(model, SPLITS.train)
    assert "val" not in trainer.history[0]
    again, twin = make_trainer("joint"), make_model()
    again.fit(twin, SPLITS.train)
    assert again.test(twin, SPLITS.test) == trainer.test(model, SPLITS.test)


def test_separate_parts_keep_their_own_best_epoch():
    trainer, model = fitted("unimodal", max_epochs=8, lr=0.03)
    alone = trainer.test(model, SPLITS.val).modality_accuracy
    for name in ("a", "b"):
        best = max(entry["val"]["modality_accuracy"][name] for entry in trainer.history)
        assert alone[name] == pytest.approx(best)


@pytest.mark.parametrize("fusion", ["sum", "gated", "film", "attention"])
@pytest.mark.parametrize("name", ["joint", "sample-valuation", "di-mml"])
def test_every_head_trains(name, fusion):
    trainer, model = make_trainer(name), make_model(fusion=fusion)
    trainer.fit(model, SPLITS.train, SPLITS.val)
    metrics = trainer.test(model, SPLITS.test)
    assert 0 <= metrics.accuracy <= 1
    assert set(metrics.contribution) == {"a", "b"}


def test_training_learns_and_finds_the_neglected_modality():
    splits = synthetic(
        num_samples=1200,
        num_classes=3,
        dims={"a": 6, "b": 6},
        unique={"a": 0.6, "b": 0.1},
        shared=0.2,
        seed=1,
    )
    torch.manual_seed(0)
    model = build_model(splits.shapes, 3, dim=16)
    trainer = mmfast.Trainer("joint", max_epochs=10)
    trainer.fit(model, splits.train, splits.val)
    metrics = trainer.test(model, splits.test)
    assert metrics.accuracy > 0.7
    assert metrics.contribution["a"] > metrics.contribution["b"] + 0.2


def test_samples_may_lack_modalities():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    present = {"b": torch.rand(90, generator=draw) < 0.7}
    arrays = {name: torch.randn(90, 4, generator=draw) + labels[:, None] for name in ("a", "b")}
    data = ArrayDataset(arrays, labels, present=present)
    for name in methods.METHODS:
        torch.manual_seed(0)
        model = build_model(data.shapes, 3, dim=8)
        trainer = make_trainer(name)
        trainer.fit(model, data, data)
        assert all(abs(entry["loss"]) < 100 for entry in trainer.history)
        phi = mmfast.valuate(trainer.learner, data).contributions
        assert phi[~present["b"], 1].abs().max() < 1e-5


def test_restore_gives_the_selected_weights(tmp_path):
    trainer, model = fitted("di-mml", out_dir=tmp_path)
    other, twin = make_trainer("di-mml", out_dir=tmp_path), make_model(seed=7)
    other.restore(twin)
    assert other.test(twin, SPLITS.test) == trainer.test(model, SPLITS.test)


def test_loggers_write(tmp_path):
    fitted("joint", out_dir=tmp_path, loggers=("csv", "tensorboard"))
    assert list(tmp_path.glob("csv/*/metrics.csv"))
    assert list(tmp_path.glob("tensorboard/*/events*"))


def test_published_settings():
    for preset in PUBLISHED:
        trainer = mmfast.Trainer.published(preset)
        assert preset.startswith(trainer.method.name)
    trainer = mmfast.Trainer.published("di-mml/crema-d", max_epochs=3)
    assert (trainer.method.temperature, trainer.optimization.batch_size) == (50, 16)
    assert trainer.optimization.max_epochs == 3


KILLED_RUN = """
import sys, torch, mmfast
sys.path.insert(0, {tests!r})
import test_trainer as t
trainer, model = t.make_trainer("sample-valuation", out_dir={out!r}, max_epochs=400), t.make_model()
trainer.fit(model, t.SPLITS.train, t.SPLITS.val)
"""


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    script = KILLED_RUN.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = checkpoint.load(tmp_path / "last.ckpt")["epoch"] + 1
    assert 0 < done < 400
    epochs = done + 3
    # The killed run's settings differ in max_epochs alone, which the checkpoint is told.
    state = checkpoint.load(tmp_path / "last.ckpt")
    state["optimization"]["max_epochs"] = epochs
    checkpoint.save(tmp_path / "last.ckpt", {key: value for key, value in state.items() if key != "format"})
    resumed, model = fitted("sample-valuation", out_dir=tmp_path, max_epochs=epochs, resume=True)
    whole, twin = fitted("sample-valuation", max_epochs=epochs)
    assert without_times(resumed.history) == without_times(whole.history)
    assert resumed.test(model, SPLITS.test) == whole.test(twin, SPLITS.test)


def broken(name: str, value) -> ArrayDataset:
    data = SPLITS.train.subset(range(len(SPLITS.train)))
    setattr(data, name, value)
    return data


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (SPLITS.train.subset([]), "train must hold at least one sample, got none"),
        (
            ArrayDataset({"a": torch.randn(3, 6)}, [0, 1, 2]),
            "samples of train must have 'b', got 'a', 'label'",
        ),
        (
            broken("labels", SPLITS.train.labels + 1),
            r"labels of train must lie in \[0, C\) = \[0, 3\), got values",
        ),
        (
            SPLITS.train.subset((SPLITS.train.labels != 1).nonzero().flatten()),
            r"train must hold every class of C = 3, got no sample of \[1\]",
        ),
        (
            ArrayDataset({"a": torch.randn(3, 5), "b": torch.randn(3, 6)}, [0, 1, 2]),
            r"a must have shape .*6.*got .*5",
        ),
    ],
    ids=["empty", "missing-modality", "label-range", "absent-class", "feature-size"],
)
def test_bad_data_is_named_before_training(train, text):
    with pytest.raises(ValueError, match=text):
        make_trainer("joint").fit(make_model(), train, SPLITS.val)


def test_a_method_that_needs_validation_says_so():
    with pytest.raises(ValueError, match="diagnose-relearn needs a validation split, got val=None"):
        make_trainer("diagnose-relearn").fit(make_model(), SPLITS.train)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: mmfast.Trainer("joint", max_epoch=3),
            "Trainer has no setting 'max_epoch'; did you mean max_epochs",
        ),
        (lambda: mmfast.Trainer("joint", lr=0), "lr must be positive, got 0"),
        (
            lambda: mmfast.Trainer("joint", optimizer="sdg"),
            "optimizer must be one of adam, adamw, sgd, got 'sdg'",
        ),
        (
            lambda: mmfast.Trainer("joint", loggers=["cvs"], out_dir="x"),
            "loggers must be among csv, tensorboard",
        ),
        (lambda: mmfast.Trainer("joint", loggers=["csv"]), "out_dir must be given to log to csv"),
        (
            lambda: mmfast.Trainer.published("joint/x"),
            "preset must be one of sample-valuation/kinetics-sounds",
        ),
        (lambda: make_trainer("joint").test(make_model(), SPLITS.test), "call fit or restore first"),
    ],
    ids=["setting", "lr", "optimizer", "logger", "logger-dir", "preset", "not-fitted"],
)
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_checkpoints_from_before_an_option_are_resumed(tmp_path):
    options = {"out_dir": tmp_path, "max_epochs": 1}
    fitted("di-mml", **options)
    path = tmp_path / "last.ckpt"
    state = torch.load(path, weights_only=True)
    for name in ("contrast", "bias"):
        del state["config"][name]
    torch.save(state, path)
    fitted("di-mml", **options, resume=True)
    state["config"]["contrast"] = "sigmoid"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"must be of a run with config \{'contrast': 'infonce'\}"):
        fitted("di-mml", **options, resume=True)


def test_a_method_s_class_is_no_method():
    with pytest.raises(TypeError, match=r"method must be an instance, MLA\(\), or a name, got the class"):
        mmfast.Trainer(mmfast.methods.MLA)


def test_checkpoints_refuse_what_they_did_not_write(tmp_path):
    fitted("joint", out_dir=tmp_path)
    path = tmp_path / "last.ckpt"
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="must be of a run with seed 1, got 0"):
        fitted("joint", out_dir=tmp_path, seed=1, resume=True)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last.ckpt is no readable checkpoint \(cut short"):
        fitted("joint", out_dir=tmp_path, resume=True)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="must have checkpoint format 1 or 2, got 99"):
        fitted("joint", out_dir=tmp_path, resume=True)
    # What a failed resume found is left as it was.
    assert checkpoint.load(tmp_path / "model.ckpt")["method"] == "joint"


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_checkpoints_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoint.load(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"value": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"value": lambda: None})
    assert checkpoint.load(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["joint", "mla", "di-mml", "diagnose-relearn"])
def test_precisions(name, precision):
    trainer, model = fitted(name, precision=precision, accelerator="cpu")
    metrics = trainer.test(model, SPLITS.test)
    assert metrics.accuracy > 0.35
    if name == "mla":
        assert trainer.learner.projector.dtype == torch.float32


@pytest.mark.parametrize("name", methods.METHODS)
def test_what_the_user_froze_stays_frozen_and_the_rest_is_free_again(name):
    trainer, model = make_trainer(name), make_model()
    model.encoders["a"].requires_grad_(False)
    before = [p.clone() for p in model.encoders["a"].parameters()]
    trainer.fit(model, SPLITS.train, SPLITS.val)
    after = model.encoders["a"].parameters()
    assert all(torch.equal(x, y.cpu()) for x, y in zip(before, after, strict=True))
    assert not any(p.requires_grad for p in model.encoders["a"].parameters())
    assert all(p.requires_grad for p in [*model.encoders["b"].parameters(), *model.head.parameters()])


def test_a_frozen_stage_leaves_batch_norm_alone():
    encoders = {
        name: torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)) for name in ("a", "b")
    }
    model = mmfast.MultimodalModel(encoders, dim=8, num_classes=3)
    statistics = []

    def remember(entry):
        statistics.append((entry["stage"], encoders["a"][1].running_mean.clone()))

    make_trainer("di-mml", on_epoch=remember).fit(model, SPLITS.train)
    moved = [not torch.equal(x[1], y[1]) for x, y in itertools.pairwise(statistics)]
    stages = [stage for stage, _ in statistics[1:]]
    assert moved == [stage == "encoders" for stage in stages]
    assert "head" in stages


def test_another_data_set_is_no_continuation(tmp_path):
    fitted("joint", out_dir=tmp_path, metadata={"data": "one", "scaling": list(range(999))})
    with pytest.raises(ValueError, match=r"metadata \{'data': 'two'\}, got \{'data': 'one'\}"):
        fitted("joint", out_dir=tmp_path, metadata={"data": "two", "scaling": list(range(998))}, resume=True)


def test_statistics_of_the_data_are_not_printed(tmp_path):
    fitted("joint", out_dir=tmp_path, metadata={"scaling": list(range(999))})
    with pytest.raises(ValueError, match=r"metadata \['scaling'\], got \{'scaling': 'list of 999'\}"):
        fitted("joint", out_dir=tmp_path, metadata={"scaling": list(range(998))}, resume=True)


def test_data_may_move_between_a_run_and_its_continuation(tmp_path):
    one, _ = fitted("joint", out_dir=tmp_path, metadata={"data": "same", "source": "/old/place"})
    other, _ = fitted("joint", out_dir=tmp_path, metadata={"data": "same", "source": "/new"}, resume=True)
    assert one.history == other.history


def test_a_draft_of_a_killed_process_is_cleared_away(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    host = socket.gethostname()
    drafts = [f"last.ckpt.{host}-{process}-0.tmp" for process in (dead.stdout.strip(), os.getppid())]
    for draft in drafts:
        (tmp_path / draft).write_bytes(b"half a checkpoint")
    fitted("joint", out_dir=tmp_path)
    # That of a process that lives is its own.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last.ckpt", drafts[1], "model.ckpt"]


def test_a_finished_run_keeps_only_what_predictions_need(tmp_path):
    trainer, _ = fitted("diagnose-relearn", out_dir=tmp_path)
    extra = checkpoint.load(tmp_path / "last.ckpt")["learner"]["_extra_state"]
    assert set(extra["method"]) == {"theta_0", "buffers_0"}
    kept = checkpoint.load(tmp_path / "model.ckpt")
    assert set(kept["learner"]) == set(trainer.learner.state_dict()) - {"_extra_state"}


def test_the_optimizer_forgets_where_the_method_says_so():
    def losses(**options):
        method = methods.DiagnoseRelearn(lam=0.0, epochs=(1,), **options)
        trainer = mmfast.Trainer(method, **QUICK)
        trainer.fit(make_model(), SPLITS.train, SPLITS.val)
        return [entry["loss"] for entry in trainer.history]

    kept, dropped = losses(), losses(reset_optimizer=True)
    assert kept[:2] == dropped[:2]
    assert kept[2] != dropped[2]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "max_epochs", "lr_step"])
def test_settings_that_are_no_numbers_are_named(name):
    with pytest.raises(TypeError, match=f"^{name} must be a number, got '1e-3'$"):
        mmfast.Trainer("joint", **{name: "1e-3"})
