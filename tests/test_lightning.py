"""Methods in Lightning's loop: the trainer's weights and figures, checkpoints, and what it refuses."""

from __future__ import annotations

import logging
import runpy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import mmfast
from mmfast import methods
from mmfast.training.divergence import DivergedError
from support.integrations import (
    AIMS,
    EPOCHS,
    RESUMED,
    SIZE,
    TEST,
    TRAIN,
    VAL,
    Stop,
    assert_same_weights,
    history_of,
    method,
    new_model,
    num_epochs,
    numbers,
    spoilt,
    trained,
)
from support.stems import ROOT

lightning = pytest.importorskip("lightning.pytorch")

from mmfast.integrations.lightning import MethodModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def new_module(name: str, **settings: Any) -> MethodModule:
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "lr": 1e-2} | settings
    return MethodModule(method(name), new_model(), TRAIN, settings.pop("val", VAL), **settings)


def new_trainer(name: str, **options: Any) -> Any:
    given = {"max_epochs": num_epochs(name), "reload_dataloaders_every_n_epochs": 1} | QUIET | options
    return lightning.Trainer(**{"enable_checkpointing": False} | given)


def fitted(name: str, **settings: Any) -> MethodModule:
    module = new_module(name, **settings)
    new_trainer(name).fit(module)
    return module


@pytest.mark.parametrize("name", methods.METHODS)
def test_weights_and_figures_are_those_of_the_trainer(name):
    settings = {"optimizer": "sgd", "lr_step": 2} if name == "joint" else {}
    module, trainer = fitted(name, **settings), trained(name, **settings)
    assert_same_weights(module.learner, trainer.learner)
    assert module.history == history_of(trainer)
    assert module.evaluate(TEST) == trainer.test(trainer.learner.model, TEST)
    assert not module.learner.training
    assert all(parameter.requires_grad for parameter in module.learner.parameters())


@pytest.mark.parametrize("aim", AIMS)
def test_losses_and_selection_are_those_of_the_trainer(aim):
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "lr": 1e-2, **AIMS[aim]}
    expected = mmfast.Trainer("multi-loss", accelerator="cpu", **settings)
    module = new_module("multi-loss", **settings)
    expected.fit(new_model(), TRAIN, VAL)
    trainer = new_trainer("multi-loss")
    trainer.fit(module)
    assert_same_weights(module.learner, expected.learner)
    assert module.history == history_of(expected)
    assert module.evaluate(TEST) == expected.test(expected.learner.model, TEST)
    assert ("val/auroc" in trainer.callback_metrics) == (aim == "own")


def test_numbers_are_predicted_as_by_the_trainer():
    train, val = numbers(TRAIN), numbers(VAL)
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "task": "regression"}
    expected = mmfast.Trainer("ensemble", accelerator="cpu", **settings)
    expected.fit(new_model(1), train, val)
    module, trainer = MethodModule("ensemble", new_model(1), train, val, **settings), new_trainer("ensemble")
    trainer.fit(module)
    assert_same_weights(module.learner, expected.learner)
    assert trainer.callback_metrics["val/m0_r2"] == pytest.approx(
        expected.history[-1]["val"]["modality_r2"]["m0"]
    )
    with pytest.raises(ValueError, match=r"mla needs task='multiclass', as .*, got 'regression'"):
        MethodModule("mla", new_model(1), train, val, **settings)


@pytest.mark.parametrize("name", ["frozen-unimodal", "mla", "di-mml"])
def test_precision_is_that_of_the_trainer(name):
    module, expected = new_module(name), trained(name, precision="bf16-mixed")
    new_trainer(name, precision="bf16-mixed").fit(module)
    if name == "di-mml":
        # Its shared head is used twice a step. Lightning casts it each time, so gradients meet in float32.
        losses = [[entry["loss"] for entry in each.history] for each in (module, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
        return
    assert_same_weights(module.learner, expected.learner)
    assert module.history == history_of(expected) != history_of(trained(name))


@pytest.mark.parametrize("name", ["unimodal", "sample-valuation", "di-mml"])
def test_without_validation_the_last_epoch_is_kept(name):
    assert_same_weights(fitted(name, val=None).learner, trained(name, has_val=False).learner)


class StopAfter(lightning.Callback):
    """Fails after so many batches of the run, or after an epoch."""

    def __init__(self, batches: int | None = None, epoch: int | None = None) -> None:
        self.batches, self.epoch, self.seen = batches, epoch, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen == self.batches or trainer.current_epoch - 1 == self.epoch:
            raise Stop
        self.seen += 1


def resumed(
    name: str, folder: Any, stop: StopAfter, settings: dict[str, Any] | None = None, **checkpoint: Any
) -> MethodModule:
    """Return a module that goes on from what another has left behind."""
    keep = lightning.callbacks.ModelCheckpoint(folder, save_last=True, **checkpoint)
    module = new_module(name, **(settings or {}))
    with pytest.raises(Stop):
        new_trainer(name, callbacks=[keep, stop], enable_checkpointing=True).fit(module)
    # What a fit has frozen is free, however it ends.
    assert all(parameter.requires_grad for parameter in module.learner.parameters())
    again = new_module(name, **(settings or {}))
    new_trainer(name).fit(again, ckpt_path=folder / "last.ckpt", weights_only=True)
    return again


@pytest.mark.parametrize("name", RESUMED)
def test_a_fit_goes_on_after_an_epoch(name, tmp_path):
    # Of the methods with two stages the first is over by then.
    epoch = 3 if num_epochs(name) > EPOCHS else 1
    module = resumed(name, tmp_path, StopAfter(epoch=epoch))
    assert_same_weights(module.learner, trained(name).learner)
    assert module.history == history_of(trained(name))


@pytest.mark.parametrize("name", ["joint", "sample-valuation", "di-mml", "mla"])
def test_a_fit_goes_on_within_an_epoch(name, tmp_path):
    steps = new_module(name).learner.steps_per_batch
    stop = StopAfter(batches=9)
    module = resumed(name, tmp_path, stop, every_n_train_steps=4 * steps)
    assert_same_weights(module.learner, trained(name).learner)
    assert module.history == history_of(trained(name))


@pytest.mark.parametrize(("name", "epochs"), [("diagnose-relearn", 2), ("frozen-unimodal", 4)])
def test_a_fit_goes_on_after_the_last_batch_of_an_epoch(name, epochs, tmp_path):
    # Five batches an epoch; what lies between them and the next epoch is still to be done.
    module = resumed(name, tmp_path, StopAfter(batches=5 * epochs + 1), every_n_train_steps=5 * epochs)
    assert_same_weights(module.learner, trained(name).learner)
    assert module.history == history_of(trained(name))


def test_the_last_checkpoint_predicts_with_the_selected_weights(tmp_path):
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    module = new_module("di-mml")
    new_trainer("di-mml", callbacks=[keep], enable_checkpointing=True).fit(module)
    loader = DataLoader(TEST, batch_size=40)
    (expected,) = lightning.Trainer(**QUIET).predict(module, loader)
    (found,) = lightning.Trainer(**QUIET).predict(
        new_module("di-mml"), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert torch.equal(found, expected)
    assert torch.equal(found, trained("di-mml").learner.predict(TEST[:]))


def test_from_the_last_checkpoint_nothing_is_trained(tmp_path):
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    new_trainer("unimodal", callbacks=[keep], enable_checkpointing=True).fit(new_module("unimodal"))
    module = new_module("unimodal")
    new_trainer("unimodal").fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert_same_weights(module.learner, trained("unimodal").learner)
    assert not module.learner.training
    assert module.evaluate(TEST) == trained("unimodal").test(trained("unimodal").learner.model, TEST)


def test_figures_are_logged(tmp_path):
    trainer, module = new_trainer("sample-valuation"), new_module("sample-valuation")
    trainer.fit(module)
    last = module.history[-1]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["loss"] == pytest.approx(last["loss"])
    assert logged["val/accuracy"] == pytest.approx(last["val"]["accuracy"])
    assert logged["val/m1_accuracy"] == pytest.approx(last["val"]["modality_accuracy"]["m1"])
    assert logged["val/m1_contribution"] == pytest.approx(last["val"]["contribution"]["m1"])
    assert logged["method/phi_m0"] == pytest.approx(module.history[-2]["method"]["phi_m0"])


def test_a_fit_draws_from_generators_of_its_own():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module = new_module("joint")
    torch.manual_seed(5)
    new_trainer("joint").fit(module)
    assert torch.equal(torch.rand(3), expected)


def test_early_stopping_keeps_the_best_weights_of_its_stage():
    stopping = lightning.callbacks.EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=1.0)
    module = new_module("frozen-unimodal")
    with pytest.warns(
        UserWarning, match="frozen-unimodal was ended in its stage encoders, before the stage head"
    ):
        new_trainer("frozen-unimodal", callbacks=[stopping]).fit(module)
    assert len(module.history) == 2
    best = max(entry["val"]["modality_accuracy"]["m1"] for entry in module.history)
    assert module.evaluate(VAL).modality_accuracy["m1"] == best


def test_a_failed_prediction_leaves_the_learner_as_it_is():
    module = fitted("joint")
    loader = DataLoader([{"m0": torch.zeros(5), "m1": torch.zeros(7)}])
    with pytest.raises((RuntimeError, ValueError), match=r"m1|shapes"):
        lightning.Trainer(**QUIET).predict(module, loader)
    assert not module.learner.training
    assert module.evaluate(TEST) == trained("joint").test(trained("joint").learner.model, TEST)


def test_a_module_is_fitted_once():
    module = fitted("joint")
    with pytest.raises(
        RuntimeError, match=r"trained for 4 epochs, and the trainer begins after 0: make a new"
    ):
        new_trainer("joint").fit(module)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer = new_trainer("joint")
    trainer.fit(new_module("joint"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="the checkpoint must be of a run with seed 1, got 0"):
        new_trainer("joint").fit(new_module("joint", seed=1), ckpt_path=tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="the checkpoint must be of a run with method unimodal, got joint"):
        new_trainer("unimodal").fit(new_module("unimodal"), ckpt_path=tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del state["mmfast"]
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="ckpt_path must be a checkpoint of a MethodModule"):
        new_trainer("joint").fit(new_module("joint"), ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"max_epochs": 5},
            r"max_epochs of lightning.Trainer must be 6 = 4 \(encoders\) \+ 2 \(head\), .* got 5",
        ),
        (
            {"reload_dataloaders_every_n_epochs": 0},
            "reload_dataloaders_every_n_epochs .* must be 1, .* got 0",
        ),
        (
            {"strategy": "ddp", "devices": 1},
            "strategy of lightning.Trainer must be 'ddp_find_unused_parameters_true', .* DDPStrategy without",
        ),
        (
            {"strategy": "ddp_spawn_find_unused_parameters_true", "devices": 1},
            "strategy of lightning.Trainer must start processes of their own, .* DDPStrategy with 'spawn'",
        ),
    ],
    ids=["epochs", "reload", "ddp", "spawn"],
)
def test_a_trainer_that_does_not_fit_is_named(options, text):
    name = "frozen-unimodal"
    trainer = new_trainer(name, **options)
    module = new_module(name)
    if "strategy" in options:
        # Without its processes.
        module.trainer = trainer
        with pytest.raises(ValueError, match=text):
            module.setup("fit")
    else:
        with pytest.raises(ValueError, match=text):
            trainer.fit(module)


def test_data_loaders_beside_the_module_are_refused():
    loader = DataLoader(TRAIN, batch_size=SIZE)
    with pytest.raises(ValueError, match=r"trainer.fit must be given the module alone, .* got data loaders"):
        new_trainer("joint").fit(new_module("joint"), loader)


@pytest.mark.parametrize("option", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_lightning_refuses_what_is_for_automatic_optimization(option):
    with pytest.raises(lightning.utilities.exceptions.MisconfigurationException, match="manual optimization"):
        new_trainer("joint", **option).fit(new_module("joint"))


def test_gradients_are_clipped_by_a_callback():
    class Clip(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1e-9)

    module = new_module("joint", optimizer="sgd", weight_decay=0)
    before = {key: value.clone() for key, value in module.learner.named_parameters()}
    new_trainer("joint", callbacks=[Clip()]).fit(module)
    for key, value in module.learner.named_parameters():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)


def test_a_dry_run_takes_one_batch():
    trainer, module = new_trainer("di-mml", fast_dev_run=True), new_module("di-mml")
    trainer.fit(module)
    assert len(module.history) == 1


def test_a_loss_that_is_not_finite_names_the_sample():
    module = MethodModule("joint", new_model(), spoilt(7), VAL, max_epochs=EPOCHS)
    with pytest.raises(DivergedError, match="m1 of sample 7") as caught:
        new_trainer("joint").fit(module)
    assert caught.value.samples == [7]


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: new_module("joint", max_epoch=3),
            ValueError,
            "has no setting 'max_epoch'; did you mean max_epochs",
        ),
        (
            lambda: MethodModule(methods.Joint, new_model(), TRAIN),
            TypeError,
            r"method must be an instance, Joint\(\), or a name",
        ),
        (
            lambda: new_module("diagnose-relearn", val=None),
            ValueError,
            "needs a validation split, got val=None",
        ),
        (lambda: new_module("joint", val=[]), ValueError, "val must"),
        (lambda: new_module("joint", batch_size=0), ValueError, "batch_size must be positive, got 0"),
    ],
    ids=["setting", "class", "validation", "empty", "batch"],
)
def test_what_a_module_is_made_of_is_checked(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


OPTIONS: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": "cosine", "warmup_epochs": 1},
    "clipped norm": {"warmup_steps": 7, "gradient_clip_val": 0.5},
    "clipped value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "groups": {"no_decay_norms_and_biases": True, "lr_scale": {"encoders.m0": 0.1}, "weight_decay": 0.1},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("name", ["mla", "di-mml"])
def test_options_of_optimization_are_those_of_the_trainer(name, case):
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "lr": 1e-2, "optimizer": "adamw", **OPTIONS[case]}
    expected = mmfast.Trainer(method(name), accelerator="cpu", **settings)
    expected.fit(new_model(), TRAIN, VAL)
    module = fitted(name, **settings)
    assert_same_weights(module.learner, expected.learner)
    assert module.history == history_of(expected)


def test_a_schedule_goes_on(tmp_path):
    settings = {"schedule": "cosine", "warmup_steps": 8}
    module = resumed("di-mml", tmp_path, StopAfter(batches=9), settings, every_n_train_steps=4)
    assert_same_weights(module.learner, trained("di-mml", **settings).learner)


@pytest.mark.parametrize("option", ["accumulate_grad_batches", "patience"])
def test_settings_that_are_not_taken_are_refused(option):
    with pytest.raises(
        ValueError, match=f"MethodModule does not take {option} of Optimization: use Lightning"
    ):
        new_module("joint", **{option: 2})
    with pytest.raises(ValueError, match="lr_scale must name parameters or modules of the learner, got 'm7'"):
        new_module("joint", lr_scale={"m7": 2.0})


def test_the_older_name_of_the_package_trains_the_same():
    package = pytest.importorskip("pytorch_lightning")
    from mmfast.integrations.pytorch_lightning import MethodModule as Older

    module = Older(method("joint"), new_model(), TRAIN, VAL, max_epochs=EPOCHS, batch_size=SIZE, lr=1e-2)
    options = {"enable_checkpointing": False, "reload_dataloaders_every_n_epochs": 1}
    package.Trainer(max_epochs=EPOCHS, **QUIET, **options).fit(module)
    assert_same_weights(module.learner, trained("joint").learner)


def test_the_example(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "train_lightning.py"))["main"]
    accuracy = main(method="joint", epochs=3, out=tmp_path, resume=False)
    assert accuracy > 0.3
    assert main(method="joint", epochs=3, out=tmp_path, resume=True) == accuracy
    assert capsys.readouterr().out.count(f"accuracy {accuracy:.2f}; alone: audio ") == 2
    assert "val/audio_accuracy" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_a_missing_package_is_named():
    program = "import sys; sys.modules['lightning'] = None; import mmfast.integrations.lightning"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        'lightning needs lightning, which is not installed: pip install "mmfast[lightning]"' in found.stderr
    )


def test_other_data_may_lack_labels_before_a_module_is_fitted():
    labels = TEST.labels.clone()
    labels[::3] = -100
    module = new_module("joint", loss=torch.nn.MultiMarginLoss(reduction="none"))
    some = mmfast.data.ArrayDataset(TEST.arrays, labels)
    kept = TEST.subset([i for i in range(len(TEST)) if i % 3])
    found, expected = (module.evaluate(data).as_dict() for data in (some, kept))
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"])
