"""What an optimizer step is made of: batches added up, gradients clipped, parameters in groups or frozen."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("lightning_fabric")

import torch
from lightning_fabric.plugins.precision import MixedPrecision
from test_trainer import SPLITS, make_model, make_trainer, without_times
from torch import nn

import mmfast
from mmfast.data.batches import epoch_shard
from mmfast.training.checks import check_settings
from mmfast.training.divergence import DivergedError
from mmfast.training.groups import parameter_groups
from mmfast.training.optimization import Optimization

PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1, "accelerator": "cpu"}


def fit(name, *, model=None, train=SPLITS.train, val=SPLITS.val, **options):
    trainer = make_trainer(name, **PLAIN | {"max_epochs": 2} | options)
    trainer.fit(model or make_model(), train, val)
    return trainer


class Noted:
    """Notes what it is told of steps, and the gradients of each."""

    def __init__(self):
        self.entries, self.gradients = [], []

    def on_step_end(self, trainer, learner, entry):
        self.entries.append(entry)
        # Those of another stage are left on what has trained in it.
        trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad and p.grad is not None]
        self.gradients.append({name: p.grad.clone() for name, p in trained})


# Accumulation


@pytest.mark.parametrize("name", ["joint", "mla", "di-mml"])
def test_steps_over_several_batches_are_those_of_a_large_one(name):
    # Of 168 samples, three batches of 32 make one of 96, and the rest, 32, 32 and 8, one of 72.
    noted, parts = Noted(), Noted()
    large = fit(name, batch_size=96, callbacks=[noted])
    fit(name, batch_size=32, accumulate_grad_batches=3, callbacks=[parts])
    assert [entry["step"] for entry in noted.entries] == [entry["step"] for entry in parts.entries]
    # From the second epoch on di-mml contrasts the samples of a batch.
    count = 2 * (1 if name == "di-mml" else 2) * large.learner.steps_per_batch
    for a, b in zip(noted.gradients[:count], parts.gradients[:count], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    for a, b in zip(noted.entries[:count], parts.entries[:count], strict=True):
        torch.testing.assert_close(a["loss"], b["loss"])
    assert [entry["batch"] for entry in parts.entries[:: large.learner.steps_per_batch]][:4] == [2, 5, 2, 5]


def test_batches_of_a_step_count_by_their_samples():
    shard = epoch_shard(168, 32, torch.Generator().manual_seed(0))
    assert shard.groups(4) == [[0, 1, 2, 3], [4, 5]]
    assert shard.weights([4, 5]) == pytest.approx([0.8, 0.2])
    shares = [epoch_shard(10, 5, torch.Generator().manual_seed(0), rank=r, world_size=2) for r in (0, 1)]
    # The mean over processes of the weighted means is the mean over all samples.
    per_sample = [w / len(share.batches[b]) for share in shares for b, w in enumerate(share.weights([0, 1]))]
    assert per_sample == pytest.approx([2 / 10] * 4)


def test_a_loss_that_is_only_looked_at_is_no_batch_of_a_step():
    learner, batch = make_learner("mla"), SPLITS.train[torch.arange(8)]
    learner.eval()
    learner(SPLITS.train[torch.arange(20, 40)], 0)
    learner.train()
    learner(batch, 0)
    expected = learner.model.encode_modality(batch, "a").mean(0).detach()
    torch.testing.assert_close(learner.current, expected)


def test_a_loss_that_is_nan_is_told_by_its_own_batch():
    data = SPLITS.train.subset(range(len(SPLITS.train)))
    first = epoch_shard(len(data), 32, make_learner("mla").generator(0, 0)).batches[4][0]
    data.arrays["a"] = data.arrays["a"].clone()
    data.arrays["a"][first, 0] = torch.nan
    with pytest.raises(DivergedError, match="batch 5 of 6") as found:
        fit("mla", train=data, batch_size=32, accumulate_grad_batches=3)
    assert (found.value.batch, found.value.samples) == (4, [int(first)])


# Clipping


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))


@pytest.mark.parametrize("name", ["mla", "di-mml"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_gradients_are_clipped_to_a_norm(name, precision):
    plain, noted = Noted(), Noted()
    fit(name, callbacks=[plain], precision=precision)
    fit(name, callbacks=[noted], precision=precision, gradient_clip_val=0.3)
    tolerance = 0.02 if precision == "bf16-true" else 1e-5
    before = norm_of(plain.gradients[0])
    assert before > 0.3
    assert float(noted.entries[0]["grad_norm"]) == pytest.approx(before, rel=tolerance)
    for key, grad in noted.gradients[0].items():
        expected = plain.gradients[0][key] * (0.3 / before)
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=1e-6)
    for entry, gradients in zip(noted.entries, noted.gradients, strict=True):
        assert norm_of(gradients) == pytest.approx(min(0.3, float(entry["grad_norm"])), rel=tolerance)


def test_gradients_of_float16_are_clipped_after_their_scaling_is_undone():
    noted = {}
    for scale in (1.0, 2.0**10):
        trainer = make_trainer("mla", **PLAIN, max_epochs=1, gradient_clip_val=0.3)
        noted[scale] = Noted()
        trainer.callbacks.append(noted[scale])
        # Fabric takes bfloat16 in its place on a CPU; the scaling is what counts here.
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.fabric._precision = MixedPrecision("16-mixed", "cpu", scaler)
        trainer.fabric.strategy._precision = trainer.fabric._precision
        trainer.fit(make_model(), SPLITS.train)
    for one, other in zip(noted[1.0].entries, noted[2.0**10].entries, strict=True):
        torch.testing.assert_close(one["grad_norm"], other["grad_norm"], rtol=1e-3, atol=1e-6)
    for gradients in noted[2.0**10].gradients:
        assert norm_of(gradients) <= 0.3 * (1 + 1e-3)


def test_gradients_are_clipped_by_value_after_the_method_has_edited_them():
    noted = Noted()
    trainer = fit("mla", callbacks=[noted], gradient_clip_val=0.01, gradient_clip_algorithm="value")
    largest = [max(float(g.abs().max()) for g in gradients.values()) for gradients in noted.gradients]
    assert max(largest) == pytest.approx(0.01)
    assert "grad_norm" not in noted.entries[0]
    # The projector has seen what it would see without clipping.
    assert not torch.equal(trainer.learner.projector, torch.eye(8))
    edited = []

    class Scaled(type(trainer.learner)):
        def edit_gradients(self, step, progress):
            for p in self.trainable_parameters():
                if p.grad is not None:
                    p.grad.fill_(5.0)
            edited.append(step)

    other = make_trainer("mla", **PLAIN, max_epochs=1, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    noted = Noted()
    other.callbacks.append(noted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(other.method), "learner", Scaled)
        other.fit(make_model(), SPLITS.train)
    assert edited
    assert all(float(g.min()) == float(g.max()) == 1.0 for each in noted.gradients for g in each.values())


# Groups


def make_learner(name: str, model=None, **options):
    learner = mmfast.methods.make(name, **options).bind(model or make_model())
    learner.start_stage(learner.stages(2)[0])
    return learner


class OwnNorm(nn.Module):
    """A norm layer as libraries have their own, with a weight of two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 8))

    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.weight


class NormedLinear(nn.Linear):
    """A layer that normalises its input is no norm layer."""


def make_normed() -> mmfast.MultimodalModel:
    torch.manual_seed(0)
    encoders = {}
    for name in ("a", "b"):
        encoders[name] = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), NormedLinear(8, 8), OwnNorm())
    return mmfast.MultimodalModel(encoders, 8, 3)


def test_norms_and_biases_do_not_decay():
    learner = make_learner("joint", make_normed())
    settings = Optimization(no_decay_norms_and_biases=True, weight_decay=0.5, optimizer="adamw")
    names = {id(p): name.removeprefix("model.") for name, p in learner.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups(learner, settings)
    }
    decayed = {f"encoders.{m}.{i}.weight" for m in ("a", "b") for i in (0, 2)}
    heads = {name for name in groups[0.5] if name.startswith("head.")}
    assert groups[0.5] - heads == decayed
    assert heads
    assert not any(name.endswith("bias") for name in heads)
    assert groups[0.0] == set(names.values()) - groups[0.5]
    # Without an option there are no groups, and an optimizer's state is that of before.
    assert parameter_groups(learner, Optimization()) == learner.trainable_parameters()


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({"encoders.a": 0.1}, {"encoders.a.0.weight": 0.1, "encoders.b.0.weight": 1.0}),
        ({"encoders": 2, "encoders.a": 0.1}, {"encoders.a.0.weight": 0.1, "encoders.b.0.weight": 2.0}),
        ({"encoders.*.bias": 3}, {"encoders.a.0.weight": 1.0, "encoders.b.2.bias": 3.0}),
        ({"encoders.?.2": 4, "own_heads": 5}, {"encoders.b.2.bias": 4.0, "own_heads.1.weight": 5.0}),
        ({"encoders.a.2.weight": 6}, {"encoders.a.2.weight": 6.0, "encoders.a.2.bias": 1.0}),
    ],
)
def test_rates_are_scaled_by_name(scales, expected):
    learner = make_learner("multi-loss", make_normed())
    groups = parameter_groups(learner, Optimization(lr=0.5, lr_scale=scales))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name.removeprefix("model."): rates[id(p)] for name, p in learner.named_parameters()}
    assert {name: found[name] for name in expected} == {name: 0.5 * f for name, f in expected.items()}


@pytest.mark.parametrize("name", ["mla", "di-mml"])
def test_scaled_rates_move_less_and_follow_the_schedule(name):
    noted = Noted()
    fit(name, lr_scale={"encoders.a": 0.1}, schedule="cosine", callbacks=[noted], max_epochs=2)
    rates = {tuple(entry["lr"]) for entry in noted.entries if entry["stage"] != "head"}
    first, second = sorted(rates, reverse=True)
    assert sorted(first) == pytest.approx([0.01, 0.1])
    assert sorted(second) == pytest.approx([0.005, 0.05])


def test_a_name_that_fits_nothing_names_the_nearest():
    text = "lr_scale must name parameters or modules of the learner, got 'encoder.a'; did you mean encoders.a"
    with pytest.raises(ValueError, match=re.escape(text)):
        fit("joint", lr_scale={"encoder.a": 0.1})


# Freezing


def make_frozen() -> mmfast.MultimodalModel:
    torch.manual_seed(0)
    encoders = {}
    for name in ("a", "b"):
        encoders[name] = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    return mmfast.MultimodalModel(encoders, 8, 3)


@pytest.mark.parametrize("name", [name for name in mmfast.methods.METHODS if name != "diagnose-relearn"])
def test_what_is_frozen_stays_as_it_is(name):
    model, modes = make_frozen(), []
    before = {key: value.clone() for key, value in model.state_dict().items()}

    class Modes:
        def on_step_end(self, trainer, learner, entry):
            encoders = learner.model.encoders
            modes.append((encoders["a"][1].training, encoders["b"].training, encoders["b"][3].training))

    fit(name, model=model, freeze=("encoders.a", "encoders.b.1"), callbacks=[Modes()])
    after = model.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    held = {key for key in before if key.startswith(("encoders.a.", "encoders.b.1."))}
    assert held <= same
    assert "encoders.b.0.weight" not in same
    heads = {name: (False, False, False)} if name in ("di-mml", "frozen-unimodal") else {}
    assert set(modes) <= {(False, True, True), *heads.values()}
    assert (False, True, True) in modes
    # Free again, for whatever comes next.
    assert all(p.requires_grad for p in model.parameters())


def test_a_fit_that_fails_gives_frozen_modules_back():
    class Failing:
        def on_step_end(self, trainer, learner, entry):
            raise RuntimeError("enough")

    model = make_frozen()
    with pytest.raises(RuntimeError, match="enough"):
        fit("mla", model=model, freeze=("encoders.a",), callbacks=[Failing()])
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("freeze", "text"),
    [
        (
            ("encoders.c",),
            "freeze must name modules of the model, such as encoders.a, got 'encoders.c'; did you",
        ),
        (("encoders", "head"), "freeze must leave something to train in stage 'train' of joint, got"),
    ],
)
def test_what_cannot_be_frozen_says_so(freeze, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fit("joint", freeze=freeze)


def test_a_later_stage_that_would_train_nothing_is_told_at_once():
    told = Noted()
    text = "freeze must leave something to train in stage 'head' of di-mml, got ('head',)"
    with pytest.raises(ValueError, match=re.escape(text)):
        fit("di-mml", freeze=("head",), callbacks=[told])
    assert told.entries == []


# What settings exclude


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gradient_clip_val": 0}, "gradient_clip_val must be positive or None, got 0"),
        ({"gradient_clip_val": "1"}, "gradient_clip_val must be positive or None, got '1'"),
        ({"gradient_clip_val": math.nan}, "gradient_clip_val must be positive or None, got nan"),
        (
            {"gradient_clip_algorithm": "norms"},
            "gradient_clip_algorithm must be one of norm, value, got 'norms'; did you mean norm?",
        ),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be an integer of at least 1, got 0"),
        (
            {"accumulate_grad_batches": 1.5},
            "accumulate_grad_batches must be an integer of at least 1, got 1.5",
        ),
        ({"patience": -1}, "patience must be an integer of at least 0, got -1"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1 or None, got 1.0"),
        ({"ema_decay": -0.5}, "ema_decay must lie between 0 and 1 or None, got -0.5"),
        ({"lr_scale": {"head": 0}}, "lr_scale['head'] must be positive, got 0"),
        (
            {"schedule": "cosin"},
            "schedule must be one of step, cosine, none, got 'cosin'; did you mean cosine?",
        ),
        ({"schedule": "cosine", "lr_step": 3}, "lr_step must be 0 with schedule='cosine', as it is of"),
        (
            {"warmup_epochs": 1, "warmup_steps": 2},
            "warmup_epochs and warmup_steps exclude each other, got 1 and 2",
        ),
        ({"warmup_epochs": 4, "max_epochs": 4}, "warmup_epochs must be below max_epochs = 4, got 4"),
        ({"warmup_steps": -4}, "warmup_steps must be an integer of at least 0, got -4"),
    ],
)
def test_settings_out_of_range_say_so(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        mmfast.Trainer("joint", **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"freeze": "encoders.a"},
            "freeze must be a tuple of names, such as ('encoders.text',), got 'encoders.a'",
        ),
        (
            {"lr_scale": ("head", 2)},
            "lr_scale must map names to factors, such as {'encoders.text': 0.1}, got",
        ),
    ],
)
def test_settings_of_another_type_say_so(settings, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        mmfast.Trainer("joint", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        (
            "di-mml",
            {"warmup_epochs": 2},
            "warmup_epochs must be below the 2 epochs of stage 'head' of di-mml, got 2",
        ),
        (
            "joint",
            {"warmup_steps": 12},
            "warmup_steps must be below the 12 steps of stage 'train' of joint, got 12",
        ),
        (
            "mla",
            {"warmup_steps": 24},
            "warmup_steps must be below the 24 steps of stage 'train' of mla, got 24",
        ),
    ],
)
def test_a_warm_up_longer_than_a_stage_says_so(name, settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(name, batch_size=32, **settings | ({"max_epochs": 4} if name == "di-mml" else {}))


def test_checks_take_what_is_just_short_enough():
    learner = make_learner("mla")
    check_settings(learner, Optimization(max_epochs=2, batch_size=32, warmup_steps=23), 168, has_val=False)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_grad_norm", "gradient_clip_val"),
        ("gradient_accumulation_steps", "accumulate_grad_batches"),
        ("warmup_step", "warmup_steps"),
        ("torch_compile", "compile"),
    ],
)
def test_names_of_other_trainers_are_understood(name, meant):
    with pytest.raises(ValueError, match=f"no setting '{name}'; did you mean {meant}"):
        mmfast.Trainer("joint", **{name: 1})


def test_without_options_there_are_the_results_of_before():
    explicit = {"schedule": "none", "accumulate_grad_batches": 1, "gradient_clip_val": None, "lr_scale": {}}
    for name in ("mla", "di-mml"):
        assert without_times(fit(name).history) == without_times(fit(name, **explicit).history)
