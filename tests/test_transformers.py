"""Methods in the loop of transformers: the trainer's weights, text, checkpoints, and what it refuses."""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import mmfast
from mmfast import methods
from mmfast.training.divergence import DivergedError
from support.integrations import (
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

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from mmfast.integrations.transformers import MethodTrainer  # noqa: E402

transformers.logging.set_verbosity_error()

# What makes the trainer's optimizer of those of transformers: by default it clips, and decays no bias.
PLAIN = {
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}
SAME = {"optimizer": "adamw", "weight_decay": 0.0}


def arguments(folder: Any, epochs: float, **options: Any) -> transformers.TrainingArguments:
    given = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": SIZE,
        "per_device_eval_batch_size": 256,
        "learning_rate": 1e-2,
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return transformers.TrainingArguments(str(folder), **given | PLAIN | options)


def new_trainer(
    name: str, folder: Any, *, val: Any = VAL, callbacks: Any = None, **options: Any
) -> MethodTrainer:
    args = arguments(folder, options.pop("epochs", num_epochs(name)), **options)
    return MethodTrainer(method(name), new_model(), args, TRAIN, val, callbacks=callbacks)


@pytest.mark.parametrize("name", methods.METHODS)
def test_weights_and_figures_are_those_of_the_trainer(name, tmp_path):
    trainer, expected = new_trainer(name, tmp_path), trained(name, **SAME)
    trainer.train()
    assert_same_weights(trainer.learner, expected.learner)
    assert trainer.history == history_of(expected)
    figures = expected.test(expected.learner.model, TEST)
    found = trainer.evaluate(TEST, metric_key_prefix="test")
    assert found["test_accuracy"] == figures.accuracy
    assert found["test_m1_accuracy"] == figures.modality_accuracy["m1"]
    assert found["test_m0_contribution"] == figures.contribution["m0"]
    assert not trainer.learner.training
    assert all(parameter.requires_grad for parameter in trainer.learner.parameters())


def test_numbers_are_predicted_as_by_the_trainer(tmp_path):
    train, val = numbers(TRAIN), numbers(VAL)
    loss = nn.HuberLoss(reduction="none")
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "lr": 1e-2, "task": "regression", "loss": loss}
    expected = mmfast.Trainer(method("frozen-unimodal"), accelerator="cpu", **settings, **SAME)
    expected.fit(new_model(1), train, val)
    args = arguments(tmp_path, num_epochs("frozen-unimodal"), eval_strategy="epoch")
    aim = {"task": "regression", "loss": loss}
    trainer = MethodTrainer(method("frozen-unimodal"), new_model(1), args, train, val, **aim)
    trainer.train()
    assert_same_weights(trainer.learner, expected.learner)
    assert trainer.history == history_of(expected)
    logged = [entry["eval_m0_r2"] for entry in trainer.state.log_history if "eval_m0_r2" in entry]
    assert logged == [entry["val"]["modality_r2"]["m0"] for entry in expected.history]
    assert trainer.predict(val).predictions.shape == (40, 1)


# Text as ids and mask, through a transformer

LONGEST = 6


class Notes(Dataset):
    """Samples of token ids of any length, or none, beside vectors."""

    def __init__(self, num_samples: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(num_samples) % 3
        lengths = torch.randint(1, LONGEST + 1, (num_samples,), generator=draw).tolist()
        self.texts = [
            torch.cat([torch.randint(5, 30, (length - 1,), generator=draw), 1 + label[None]])
            for length, label in zip(lengths, self.labels, strict=True)
        ]
        self.vectors = torch.randn(num_samples, 5, generator=draw) + torch.eye(3, 5)[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        has_text = index % 7 > 0
        return {
            "text": self.texts[index] if has_text else None,
            "text__present": torch.tensor(has_text),
            "vector": self.vectors[index],
            "label": self.labels[index],
        }


class TextEncoder(nn.Module):
    """A transformer with random weights, its outputs averaged over the words."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=LONGEST,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = text["mask"]
        h = self.bert(input_ids=text["values"], attention_mask=mask.long()).last_hidden_state
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


COLLATE = functools.partial(mmfast.data.pad, names=("text",), value=0)


def text_model() -> mmfast.MultimodalModel:
    torch.manual_seed(4)
    return mmfast.MultimodalModel({"text": TextEncoder(), "vector": nn.Linear(5, 8)}, 8, 3)


@pytest.mark.parametrize("name", ["joint", "sample-valuation", "di-mml", "mla"])
def test_text_trains_as_in_the_trainer(name, tmp_path):
    train, val, test = Notes(50, 0), Notes(30, 1), Notes(20, 2)
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "lr": 1e-2, "collate_fn": COLLATE, **SAME}
    expected = mmfast.Trainer(method(name), accelerator="cpu", **settings)
    expected.fit(text_model(), train, val)
    args = arguments(tmp_path, num_epochs(name))
    trainer = MethodTrainer(method(name), text_model(), args, train, val, data_collator=COLLATE)
    trainer.train()
    assert_same_weights(trainer.learner, expected.learner)
    assert trainer.history == history_of(expected)
    found = trainer.predict(test)
    figures = expected.test(expected.learner.model, test)
    assert found.predictions.shape == (20, 3)
    assert found.label_ids.tolist() == test.labels.tolist()
    assert np.mean(found.predictions.argmax(1) == found.label_ids) == figures.accuracy
    assert found.metrics["test_text_accuracy"] == figures.modality_accuracy["text"]


# Checkpoints


class StopAt(transformers.TrainerCallback):
    """Fails at the beginning of a step, counted over the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **others):
        if state.global_step == self.step:
            raise Stop


def resumed(name: str, folder: Path, stop: int, **options: Any) -> MethodTrainer:
    """Return a trainer that goes on from what another has left behind."""
    failed = new_trainer(name, folder, callbacks=[StopAt(stop)], **options)
    with pytest.raises(Stop):
        failed.train()
    # What a run has frozen is free, however it ends.
    assert all(parameter.requires_grad for parameter in failed.learner.parameters())
    again = new_trainer(name, folder, **options)
    again.train(resume_from_checkpoint=True)
    return again


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_after_an_epoch(name, tmp_path):
    # Of the methods with two stages the first is over by then; an epoch has five batches, or more.
    stop = 23 if num_epochs(name) > EPOCHS else 18
    trainer = resumed(name, tmp_path, stop, save_strategy="epoch")
    assert_same_weights(trainer.learner, trained(name, **SAME).learner)
    assert trainer.history == history_of(trained(name, **SAME))


@pytest.mark.parametrize("name", ["joint", "sample-valuation", "di-mml", "mla"])
def test_a_run_goes_on_within_an_epoch(name, tmp_path):
    trainer = resumed(name, tmp_path, 9, save_strategy="steps", save_steps=4)
    assert_same_weights(trainer.learner, trained(name, **SAME).learner)
    assert trainer.history == history_of(trained(name, **SAME))


@pytest.mark.parametrize(("name", "steps"), [("diagnose-relearn", 10), ("frozen-unimodal", 20)])
def test_a_run_goes_on_after_the_last_step_of_an_epoch(name, steps, tmp_path):
    trainer = resumed(name, tmp_path, steps + 1, save_strategy="steps", save_steps=steps)
    assert_same_weights(trainer.learner, trained(name, **SAME).learner)
    assert trainer.history == history_of(trained(name, **SAME))


def test_from_the_last_checkpoint_nothing_is_trained(tmp_path):
    new_trainer("unimodal", tmp_path, save_strategy="epoch").train()
    trainer = new_trainer("unimodal", tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(trainer.learner, trained("unimodal", **SAME).learner)
    assert trainer.history == history_of(trained("unimodal", **SAME))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    new_trainer("joint", tmp_path, save_strategy="epoch").train()
    folder = tmp_path / "checkpoint-20"
    with pytest.raises(ValueError, match="the checkpoint must be of a run with method unimodal, got joint"):
        new_trainer("unimodal", tmp_path).train(resume_from_checkpoint=str(folder))
    (folder / "mmfast_course.pt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must be a checkpoint of MethodTrainer, got .* without mmfast"
    ):
        new_trainer("joint", tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_trainer_trains_once(tmp_path):
    trainer = new_trainer("joint", tmp_path)
    trainer.train()
    with pytest.raises(RuntimeError, match="has trained for 4 epochs: make a new one"):
        trainer.train()


# What transformers does itself


def rates(trainer: MethodTrainer) -> list[float]:
    """Return the learning rates in the log."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("name", ["joint", "sample-valuation", "frozen-unimodal"])
def test_a_schedule_ends_with_its_stage(name, tmp_path):
    options = {"lr_scheduler_type": "linear", "logging_strategy": "epoch"}
    trainer = new_trainer(name, tmp_path, **options)
    trainer.train()
    # Of the last step of each epoch.
    first, second = [0.008, 0.0055, 0.003, 0.0005], [0.006, 0.001]
    assert rates(trainer) == pytest.approx(first + second[: num_epochs(name) - EPOCHS])
    # Copies of samples make epochs longer.
    assert (trainer.state.global_step > 5 * num_epochs(name)) == (name == "sample-valuation")


def test_gradients_are_clipped_at_every_step(tmp_path):
    trainer = new_trainer("mla", tmp_path, max_grad_norm=1e-9, optim="sgd", lr_scheduler_type="constant")
    before = {key: value.clone() for key, value in trainer.learner.named_parameters()}
    trainer.train()
    for key, value in trainer.learner.named_parameters():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)


def test_an_optimizer_of_torch_is_made_for_each_stage(tmp_path):
    expected = trained("di-mml", optimizer="sgd", lr=0.05, weight_decay=0.0)
    trainer = MethodTrainer(
        method("di-mml"),
        new_model(),
        arguments(tmp_path, num_epochs("di-mml")),
        TRAIN,
        VAL,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    )
    trainer.train()
    assert_same_weights(trainer.learner, expected.learner)


def test_figures_are_logged_and_stop_early(tmp_path):
    stopping = transformers.EarlyStoppingCallback(1, early_stopping_threshold=1.0)
    options = {"eval_strategy": "epoch", "metric_for_best_model": "accuracy", "greater_is_better": True}
    trainer = new_trainer("sample-valuation", tmp_path, callbacks=[stopping], **options)
    trainer.train()
    assert len(trainer.history) == 2
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["eval_accuracy"] for entry in logged] == [e["val"]["accuracy"] for e in trainer.history]
    assert logged[0]["eval_m0_contribution"] == trainer.history[0]["val"]["contribution"]["m0"]
    shares = [entry["method/phi_m0"] for entry in trainer.state.log_history if "method/phi_m0" in entry]
    assert shares[0] == trainer.history[0]["method"]["phi_m0"]
    assert trainer.evaluate()["eval_accuracy"] == max(entry["val"]["accuracy"] for entry in trainer.history)


@pytest.mark.parametrize("name", ["di-mml", "mla"])
def test_precision_is_that_of_the_trainer(name, tmp_path):
    # In mixed precision the trainer's optimizer is not fused.
    trainer = new_trainer(name, tmp_path, bf16=True, optim="adamw_torch")
    expected = trained(name, precision="bf16-mixed", **SAME)
    trainer.train()
    assert_same_weights(trainer.learner, expected.learner)
    assert trainer.history == history_of(expected) != history_of(trained(name, **SAME))


def test_a_loss_that_is_not_finite_names_the_sample(tmp_path):
    trainer = MethodTrainer("joint", new_model(), arguments(tmp_path, 2), spoilt(7), VAL)
    with pytest.raises(DivergedError, match="m1 of sample 7") as caught:
        trainer.train()
    assert caught.value.samples == [7]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": 10}, "max_steps must be -1, as stages are counted in epochs, got 10"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1, .* got 2"),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor must be 0.0, as MethodTrainer takes label_smoothing, got 0.1",
        ),
        ({"data_seed": 3}, "data_seed must be None, as the order of samples follows from seed, got 3"),
        ({"torch_compile": True}, "torch_compile must be False"),
        ({"epochs": 2}, "num_train_epochs must be a whole number above 2 of the stage head, .* got 2"),
        ({"epochs": 4.5}, "num_train_epochs must be .* got 4.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_the_method_decides_are_refused(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        new_trainer("frozen-unimodal", tmp_path, **options)


def test_options_are_checked(tmp_path):
    args = arguments(tmp_path, 4)
    with pytest.raises(TypeError, match=r"must get options among callbacks, .*, got compute_metrics"):
        MethodTrainer("joint", new_model(), args, TRAIN, compute_metrics=len)
    with pytest.raises(TypeError, match=r"method must be an instance, Joint\(\), or a name, got the class"):
        MethodTrainer(methods.Joint, new_model(), args, TRAIN)
    with pytest.raises(ValueError, match="diagnose-relearn needs a validation split, got val=None"):
        MethodTrainer("diagnose-relearn", new_model(), args, TRAIN)


def test_the_example(tmp_path, monkeypatch, capsys):
    # It takes its data from the example beside it.
    monkeypatch.syspath_prepend(ROOT / "examples")
    main = runpy.run_path(str(ROOT / "examples" / "train_transformers.py"))["main"]
    metrics = main(method="joint", epochs=4, samples=240, out=tmp_path)
    assert metrics["test_accuracy"] > 0.5
    assert f"accuracy {metrics['test_accuracy']:.2f}; alone: text " in capsys.readouterr().out
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_a_missing_package_is_named():
    program = """
import sys
for package in ("accelerate", "transformers"):
    sys.modules[package] = None
    try:
        import mmfast.integrations.transformers
    except ImportError as error:
        print(error)
    del sys.modules[package]
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    ).stdout.splitlines()
    expected = 'mmfast.integrations.transformers needs {}, which is not installed: pip install "mmfast[hf]"'
    assert found == [expected.format(package) for package in ("accelerate", "transformers")]
