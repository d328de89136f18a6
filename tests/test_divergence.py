"""Runs whose numbers are no longer finite: they end, say where and why, and are in no figure."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_trainer import SMALL, SPLITS, make_model, make_trainer
from torch import nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

import mmfast
import mmfast.training.loop
from mmfast import methods
from mmfast.cli.commands import app
from mmfast.data import ArrayDataset, synthetic
from mmfast.experiments import subprocesses
from mmfast.models import build_model
from mmfast.training.divergence import DivergedError, Losses
from mmfast.valuation import contributions

WILD = {"optimizer": "sgd", "lr": 1e30}


class OwnData(Dataset):
    """A user's data set, of which nothing was checked before."""

    def __init__(self, data: ArrayDataset, bad: tuple[int, ...] = (), modality: str = "b") -> None:
        self.data, self.bad, self.modality = data, bad, modality

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        sample = dict(self.data[index])
        if index in self.bad:
            sample[self.modality] = sample[self.modality] * torch.nan
        return sample


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_loss_that_is_not_finite_ends_the_run(name):
    trainer = make_trainer(name, accelerator="cpu", **WILD)
    with pytest.raises(
        DivergedError,
        match=r"so training has diverged: try a lower learning rate than 1e\+30 \(the default is 0.001\)",
    ) as found:
        trainer.fit(make_model(), SPLITS.train, SPLITS.val)
    assert found.value.epoch == 0
    assert found.value.samples == []
    assert trainer.learner is None


def test_the_sample_whose_input_is_to_blame_is_named():
    trainer = make_trainer("joint", accelerator="cpu")
    with pytest.raises(DivergedError) as found:
        trainer.fit(make_model(), OwnData(SPLITS.train, bad=(7,)), SPLITS.val)
    text = str(found.value)
    assert "in epoch 1 of 4, batch " in text
    assert text.endswith("NaN or infinite numbers in the training data: b of sample 7")
    assert found.value.samples == [7]
    assert found.value.batch in range(6)


def test_samples_behind_copies_are_those_of_the_data_set():
    class Late(OwnData):
        def __getitem__(self, index):
            # Once copies are trained on, sample 11 turns bad.
            self.bad = (11,) if len(seen) >= 2 else ()
            return super().__getitem__(index)

    seen: list[dict] = []
    trainer = make_trainer("sample-valuation", accelerator="cpu", on_epoch=seen.append)
    with pytest.raises(DivergedError, match=r"b of sample 11$") as found:
        trainer.fit(make_model(), Late(SPLITS.train), SPLITS.val)
    assert found.value.epoch == 2


def test_a_gradient_that_is_nan_under_a_finite_loss_is_traced_to_its_sample():
    """A loss that passes over NaN, whose gradient does not: the batch after it is the one that shows."""

    class Careless(nn.Linear):
        def forward(self, x):
            return torch.where(x.isnan().any(1, keepdim=True), 0.0, super().forward(x))

    torch.manual_seed(0)
    model = mmfast.MultimodalModel({"a": nn.Linear(6, 8), "b": Careless(6, 8)}, 8, 3)
    with pytest.raises(DivergedError, match=r"b of sample 150$") as found:
        make_trainer("joint", accelerator="cpu").fit(model, OwnData(SPLITS.train, bad=(150,)), SPLITS.val)
    assert found.value.samples == [150]


@pytest.mark.parametrize("name", ["joint", "mla", "di-mml", "unimodal"])
def test_nan_in_place_of_a_modality_that_is_absent_harms_nothing(name):
    class Absent(OwnData):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"b__present": torch.tensor(index not in self.bad)}

    bad = tuple(range(0, len(SPLITS.train), 3))
    trainer, model = make_trainer(name, accelerator="cpu"), make_model()
    trainer.fit(model, Absent(SPLITS.train, bad=bad), SPLITS.val)
    filled, twin = make_trainer(name, accelerator="cpu"), make_model()
    present = torch.ones(len(SPLITS.train), dtype=torch.bool)
    present[list(bad)] = False
    filled.fit(
        twin, ArrayDataset(SPLITS.train.arrays, SPLITS.train.labels, present={"b": present}), SPLITS.val
    )
    assert trainer.test(model, SPLITS.test) == filled.test(twin, SPLITS.test)


def test_weights_that_are_nan_before_training_are_said_to_be():
    model = make_model()
    with pytest.raises(DivergedError):
        make_trainer("joint", accelerator="cpu", **WILD).fit(model, SPLITS.train, SPLITS.val)
    # Finite, but so large that the first loss is not.
    with pytest.raises(DivergedError, match=r"no step has been taken, so .* build the model anew"):
        make_trainer("joint", accelerator="cpu").fit(model, SPLITS.train, SPLITS.val)
    with torch.no_grad():
        next(model.head.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match=r"model must have finite weights, got .* build it anew"):
        make_trainer("joint", accelerator="cpu").fit(model, SPLITS.train, SPLITS.val)


def test_validation_tells_what_no_loss_has_seen():
    """One step, whose loss is that of finite weights; those after it are not."""
    trainer = make_trainer("joint", max_epochs=1, batch_size=500, accelerator="cpu", **WILD | {"lr": 1e38})
    with pytest.raises(DivergedError, match=r"predictions are NaN.*epoch 1 of 1, validation, for") as found:
        trainer.fit(make_model(), SPLITS.train, SPLITS.val)
    assert found.value.batch is None
    with pytest.raises(
        DivergedError, match=r"NaN or infinite numbers in the validation data: a of samples 13, 15$"
    ):
        make_trainer("joint", accelerator="cpu").fit(
            make_model(), SPLITS.train, OwnData(SPLITS.val, bad=(13, 15), modality="a")
        )


@pytest.mark.parametrize("name", ["joint", "unimodal", "mla", "di-mml"])
def test_a_test_sample_with_nan_logits_is_wrong(name):
    trainer, model = make_trainer(name, accelerator="cpu"), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    # Of class 0 alone, which argmax takes NaN for.
    zeros = SPLITS.test.subset((SPLITS.test.labels == 0).nonzero().flatten())
    # The first samples are looked at before any work.
    everyone = tuple(range(4, len(zeros)))
    broken = OwnData(OwnData(zeros, everyone, "a"), everyone, "b")
    with pytest.warns(
        UserWarning, match=f"{len(zeros) - 4} of {len(zeros)} samples have NaN logits and count as wrong"
    ):
        found = trainer.test(model, broken)
    assert found.accuracy <= 4.01 / len(zeros)
    assert max(found.modality_accuracy.values()) <= 4.01 / len(zeros)
    assert max(found.contribution.values()) <= 8.01 / len(zeros)


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize("utility", ["cardinality", "correct"])
def test_coalitions_with_nan_logits_are_worth_nothing(fusion, utility):
    """Additive heads, whose coalitions' logits are never formed, give what the others give."""
    torch.manual_seed(0)
    model = build_model({"a": (6,), "b": (6,), "c": (6,)}, 3, dim=8, fusion=fusion).eval()
    draw = torch.Generator().manual_seed(1)
    arrays = {name: torch.randn(40, 6, generator=draw) for name in "abc"}
    data = ArrayDataset(arrays, torch.arange(40) % 3)
    broken = OwnData(data, tuple(range(4, 40, 2)))
    found = mmfast.valuate(model, broken, utility=utility)
    phi, _ = contributions(model, broken, utility=utility)
    torch.testing.assert_close(phi, found.contributions)
    # With b, half of the samples are never right: v(S) = 0 for all S that hold it.
    whole = mmfast.valuate(model, data, utility=utility)
    torch.testing.assert_close(phi[1::2], whole.contributions[1::2])
    assert (phi[4::2, 1] <= 1e-6).all()
    everyone = found.coalition_accuracy[-1]
    assert everyone <= 22 / 40


def test_sums_of_infinite_logits_are_nan_and_never_right():
    """No addend is NaN, but the sum of the label's is."""
    torch.manual_seed(0)
    model = build_model({"a": (6,), "b": (6,)}, 3, dim=8, fusion="sum").eval()
    data = ArrayDataset({name: torch.randn(20, 6) for name in "ab"}, torch.zeros(20, dtype=torch.int64))
    infinite = torch.full((2, 20, 3), torch.inf)
    infinite[1] = -torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.head), "partial_logits", lambda head, features: infinite[:, : len(features[0])]
        )
        phi, _ = contributions(model, data)
        found = mmfast.valuate(model, data)
    torch.testing.assert_close(phi, found.contributions)
    assert found.coalition_accuracy[-1] == 0


def test_losses_are_kept_and_looked_at():
    losses = Losses(5, torch.device("cpu"), is_alone=True)
    assert [losses.add(torch.tensor(x)) for x in (1.0, 2.0, torch.inf)] == [None, None, 2]
    # Of several processes none stops before all do.
    losses = Losses(5, torch.device("cpu"), is_alone=False)
    assert [losses.add(torch.tensor(x)) for x in (1.0, torch.nan, torch.inf)] == [None] * 3
    assert losses.first_bad() == 1
    assert Losses(3, torch.device("cpu"), is_alone=True).first_bad() is None
    # A large loss is finite, whatever torch's default dtype holds.
    torch.set_default_dtype(torch.float16)
    try:
        losses = Losses(1, torch.device("cpu"), is_alone=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses.add(torch.tensor(1e6)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_looking_at_losses_waits_for_no_gpu():
    losses = Losses(1000, torch.device("cuda"), is_alone=True)
    good, bad = (torch.tensor(x, device="cuda") for x in (1.0, torch.nan))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            assert losses.add(good) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.add(bad) is None
    torch.cuda.synchronize()
    found = [losses.add(good) for _ in range(300)]
    assert {where for where in found if where is not None} == {100}


# What a fit that does not finish leaves of the user's model


class Stopped(BaseException):
    """Ends a run as Ctrl-C does."""


def test_a_fit_that_is_stopped_gives_the_dtype_back():
    def stop(entry):
        raise Stopped

    model = make_model()
    with pytest.raises(Stopped):
        make_trainer("joint", accelerator="cpu", precision="bf16-true", on_epoch=stop).fit(
            model, SPLITS.train, SPLITS.val
        )
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_fit_that_is_stopped_leaves_the_model_as_it_was(name):
    model = make_model()
    model.encoders["b"].eval()
    frozen = next(model.encoders["a"].parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trainer = make_trainer(name, accelerator="cpu")
    total = sum(stage.epochs for stage in trainer.method.bind(make_model()).stages(4))
    for after in {1, total - 1}:
        seen: list[dict] = []

        def stop(entry, seen=seen, after=after):
            seen.append(entry)
            if len(seen) == after:
                raise Stopped

        with pytest.raises(Stopped):
            make_trainer(name, accelerator="cpu", on_epoch=stop).fit(model, SPLITS.train, SPLITS.val)
        assert [p is frozen for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]
        assert [module.training for module in model.modules()] == modes
        assert model.head_is_trained
        assert all(p.grad is None for p in model.parameters())
    # And so the next method trains all of it.
    before = {key: value.clone() for key, value in model.named_parameters()}
    make_trainer("joint", accelerator="cpu").fit(model, SPLITS.train, SPLITS.val)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {key for key, value in model.named_parameters() if value is not frozen}
    assert all(p.grad is None for p in model.parameters())


# Encoders that share weights


def make_shared() -> mmfast.MultimodalModel:
    torch.manual_seed(0)
    trunk = nn.Linear(6, 8)
    encoders = {name: nn.Sequential(trunk, nn.Tanh(), nn.Linear(8, 8)) for name in ("a", "b")}
    return mmfast.MultimodalModel(encoders, 8, 3)


@pytest.mark.parametrize("name", ["unimodal", "ensemble", "frozen-unimodal"])
def test_encoders_that_share_a_layer_are_selected_together(name):
    trainer, model = make_trainer(name, accelerator="cpu", max_epochs=8, lr=0.03), make_shared()
    kept = []
    original = mmfast.training.selection.BestWeights.restore

    def restore(selection, learner):
        kept.append(dict(selection.parts))
        original(selection, learner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmfast.training.selection.BestWeights, "restore", restore)
        trainer.fit(model, SPLITS.train, SPLITS.val)
    (part,) = kept[0]
    assert {"model.encoders.a.", "model.encoders.b."} <= set(part)
    # The mean over modalities is the best there was, and what is measured now.
    stage = [entry for entry in trainer.history if entry["stage"] == trainer.history[0]["stage"]]
    best = max(sum(entry["val"]["modality_accuracy"].values()) / 2 for entry in stage)
    assert kept[0][part]["score"] == pytest.approx(best)
    found = trainer.test(model, SPLITS.val).modality_accuracy
    assert sum(found.values()) / 2 == pytest.approx(best)


def test_what_needs_encoders_of_their_own_says_so():
    with pytest.raises(
        ValueError, match=r"diagnose-relearn needs encoders that share no parameters.*0\.weight in a and b"
    ):
        make_trainer("diagnose-relearn").fit(make_shared(), SPLITS.train, SPLITS.val)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_seed_fixes_the_heads_that_a_method_adds(name):
    method = methods.make(name, **SMALL.get(name, {}))
    one, other, third = (method.bind(make_model(), seed=seed).state_dict() for seed in (0, 0, 1))
    added = [key for key in one if key.startswith(("own_heads", "shared_head"))]
    assert all(torch.equal(one[key], other[key]) for key in added)
    assert not added or not all(torch.equal(one[key], third[key]) for key in added)
    model = make_model()
    before = torch.random.get_rng_state()
    method.bind(model, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


# Comparisons

pytest.importorskip("typer")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    splits = synthetic(140, 3, dims={"a": 6, "b": 4}, unique={"a": 0.3, "b": 0.1})
    parts = [(name, getattr(splits, name)) for name in ("train", "val", "test")]
    arrays = {key: np.concatenate([part.arrays[key].numpy() for _, part in parts]) for key in ("a", "b")}
    path = tmp_path_factory.mktemp("data") / "small.npz"
    split = np.repeat([name for name, _ in parts], [len(part) for _, part in parts])
    np.savez(path, label=np.concatenate([part.labels.numpy() for _, part in parts]), split=split, **arrays)
    return path


FAST = ["--epochs", "2", "--dim", "8", "--batch-size", "32", "--accelerator", "cpu", "--methods", "joint,mla"]


def invoke(npz, out, *words):
    environment = {"COLUMNS": "100"}
    return CliRunner().invoke(
        app, ["compare", "--data", str(npz), "--out", str(out), *FAST, *words], env=environment
    )


def test_a_comparison_without_a_finite_run_is_none(npz, tmp_path):
    result = invoke(npz, tmp_path, "--seeds", "2", "--lr", "1e30", "--optimizer", "sgd")
    assert result.exit_code == 3, result.output
    assert "mla seed 1: diverged, the loss is NaN or infinite in epoch 1 of 2, batch" in result.stdout
    assert "Best accuracy" not in result.stdout
    assert "Diverged, and in no figure: Joint with seeds 0, 1; MLA with seeds 0, 1." in " ".join(
        result.stdout.split()
    )
    assert result.stderr == "mmfast: no run of Joint, MLA has a result\n"
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [set(run) for run in runs] == [{"method", "seed", "config", "diverged", "versions"}] * 4
    # Known, and not made again.
    again = invoke(npz, tmp_path, "--seeds", "2", "--lr", "1e30", "--optimizer", "sgd")
    assert again.exit_code == 3
    assert "4 of 4 runs: already in" in again.stdout


def test_one_diverging_run_is_left_out_of_the_others(npz, tmp_path, monkeypatch):
    from mmfast.experiments import comparison as module

    whole = invoke(npz, tmp_path / "whole", "--seeds", "2")
    assert whole.exit_code == 0
    real = module.make_run

    def run(setup, method, seed, out_dir, **options):
        if (method.name, seed) in diverging:
            raise DivergedError(
                "the loss is NaN or infinite in epoch 2 of 2, batch 1 of 3: why", epoch=1, batch=0
            )
        return real(setup, method, seed, out_dir, **options)

    monkeypatch.setattr(module, "make_run", run)
    diverging = {("mla", 1)}
    result = invoke(npz, tmp_path / "one", "--seeds", "2")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if line.startswith("MLA"))
    first = next(
        run
        for run in json.loads((tmp_path / "whole/results.json").read_text())["runs"]
        if run["method"] == "mla"
    )
    assert row.split()[:5] == ["MLA,", "1", "of", "2", "runs"]
    assert f" {100 * first['metrics']['accuracy']:.1f} " in row
    assert "±" not in row
    assert "Diverged, and in no figure: MLA with seed 1." in " ".join(result.stdout.split())
    diverging = {("mla", 0), ("mla", 1)}
    result = invoke(npz, tmp_path / "all", "--seeds", "2")
    assert result.exit_code == 3
    row = next(line for line in result.stdout.splitlines() if line.startswith("MLA"))
    assert row.split()[:3] == ["MLA", "diverged", "–"]
    assert "Joint" in result.stdout
    assert (tmp_path / "all" / "accuracy.png").exists()
    assert result.stderr == "mmfast: no run of MLA has a result\n"


def test_train_says_so_and_leaves_no_figures(npz, tmp_path):
    words = ["train", "--data", str(npz), "--out", str(tmp_path), "--epochs", "1", "--dim", "8"]
    words += ["--accelerator", "cpu", "--lr", "1e30", "--optimizer", "sgd"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 3
    assert result.stderr.startswith("mmfast: the loss is NaN or infinite in epoch 1 of 1, batch ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "model.ckpt").exists()


def test_a_run_on_several_devices_that_diverges_is_one_without_figures(npz, tmp_path):
    result = invoke(npz, tmp_path, "--seeds", "1", "--lr", "1e30", "--optimizer", "sgd", "--devices", "2")
    assert result.exit_code == 3, result.output
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert all(run["diverged"].startswith("the loss is NaN or infinite in epoch 1 of 2") for run in runs)


@pytest.mark.parametrize("status", [1, 3, -15])
def test_a_run_on_several_devices_has_diverged_if_it_says_so(status, monkeypatch, tmp_path):
    # When one of its processes has ended, Fabric ends the others, whose status is then another.
    text = "the loss is NaN or infinite in epoch 1 of 2, batch 2 of 3: why"
    done = subprocess.CompletedProcess([], status, stderr=f"a warning\nmmfast: {text}\n")
    monkeypatch.setattr(subprocesses, "train_arguments", lambda *_: [])
    monkeypatch.setattr(subprocesses, "run_to_its_end", lambda _: done)
    planned = SimpleNamespace(method=SimpleNamespace(name="joint"), seed=0)
    with pytest.raises(DivergedError, match=f"^{text}$"):
        subprocesses.run_in_subprocess(None, planned, tmp_path)
    if status != 3:
        done.stderr = "mmfast: no such file\n"
        with pytest.raises(RuntimeError, match="joint with seed 0 failed: no such file") as found:
            subprocesses.run_in_subprocess(None, planned, tmp_path)
        assert not isinstance(found.value, DivergedError)
