"""The loop itself: order, shards, schedule and steps are those of a loop written by hand."""

from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

import mmfast
from mmfast import methods
from mmfast.data import ArrayDataset, reader
from mmfast.data.batches import epoch_shard
from mmfast.methods.presets import PUBLISHED
from mmfast.models import build_model
from mmfast.training.evaluation import evaluate
from mmfast.training.optimization import Optimization
from mmfast.training.probes import probe, probe_answers
from mmfast.training.selection import BestWeights
from support.learners import NUM_CLASSES, bind, make_data


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world"), [(101, 8, 1), (101, 10, 3), (97, 32, 2), (5, 64, 2)]
)
def test_shards_are_the_epoch(num_samples, batch_size, world):
    shards = [
        epoch_shard(num_samples, batch_size, torch.Generator().manual_seed(3), rank=rank, world_size=world)
        for rank in range(world)
    ]
    seen = [i for shard in shards for batch in shard.batches for i in batch]
    assert sorted(seen) == list(range(num_samples))
    for parts in zip(*(shard.batches for shard in shards), strict=True):
        assert all(len(part) > 0 for part in parts)
    for b in range(len(shards[0].batches)):
        sizes = [len(shard.batches[b]) for shard in shards]
        scales = [shard.scales[b] for shard in shards]
        # The mean over processes of scaled means is the mean over the whole batch.
        assert [s * sum(sizes) / world for s in scales] == pytest.approx(sizes)
        assert sum(sizes) >= min(num_samples, 2 * world)


def test_a_batch_too_small_for_batch_norm_joins_the_one_before():
    shard = epoch_shard(17, 8, torch.Generator())
    assert [len(batch) for batch in shard.batches] == [8, 9]
    shards = [epoch_shard(19, 8, torch.Generator(), rank=rank, world_size=2) for rank in (0, 1)]
    assert [[len(batch) for batch in shard.batches] for shard in shards] == [[4, 6], [4, 5]]


def test_epochs_and_seeds_have_orders_of_their_own():
    learner, other = bind("joint", seed=0), bind("joint", seed=1)
    orders = {
        tuple(torch.randperm(20, generator=one.generator(0, e)).tolist())
        for one in (learner, other)
        for e in (0, 1)
    }
    assert len(orders) == 4


def test_joint_training_is_the_loop_by_hand():
    data = make_data(40)
    learner = bind("joint")
    model, twin = learner.model, copy.deepcopy(learner.model)
    settings = Optimization(
        3, 40, optimizer="sgd", lr=0.05, momentum=0.8, weight_decay=0.01, lr_step=1, lr_gamma=0.5
    )
    mmfast.Trainer("joint", optimization=settings, accelerator="cpu").fit(model, data)
    optimizer = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.8, weight_decay=0.01)
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5**epoch
        optimizer.zero_grad()
        F.cross_entropy(twin(data[:]), data.labels).backward()
        optimizer.step()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_adam_decays_weights():
    optimizer = Optimization(weight_decay=0.3, lr=0.02).make_optimizer([torch.nn.Parameter(torch.ones(1))])
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["lr"]) == (0.3, 0.02)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizers_are_fused_where_they_can_be(name):
    settings, fused = Optimization(optimizer=name, weight_decay=0.0), torch.nn.Parameter(torch.ones(3))
    assert settings.make_optimizer([fused]).defaults["fused"] is True
    assert settings.make_optimizer([fused], precision="bf16-mixed").defaults["fused"] is None
    double = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    plain = settings.make_optimizer([{"params": [fused]}, {"params": [double]}])
    assert plain.defaults["fused"] is None
    # A checkpoint of a fused one does not make it so.
    state = plain.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True
    plain.load_state_dict(state)
    assert [group["fused"] for group in plain.param_groups] == [None, None]


def test_parameters_may_have_their_first_gradient_after_others():
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    for name in ("adam", "adamw", "sgd"):
        optimizer = Optimization(optimizer=name, lr=0.1, weight_decay=0.0).make_optimizer([one, other])
        for parameter in (one, other):
            optimizer.zero_grad()
            parameter.grad = torch.ones(2)
            optimizer.step()
    assert (one < 1).all()
    assert (other < 1).all()


def test_sgd_takes_sparse_gradients():
    table = torch.nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = Optimization(optimizer="sgd", lr=0.5, weight_decay=0.0).make_optimizer(table.parameters())
    table(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    before[[1, 3]] -= 0.5
    torch.testing.assert_close(table.weight.detach(), before)


def test_published_temperatures():
    found = {
        key: (m.temperature, m.fusion_temperature)
        for key, (m, _) in PUBLISHED.items()
        if key.startswith("di-mml")
    }
    assert found == {
        "di-mml/crema-d": (50, 1),
        "di-mml/ave": (10, 3),
        "di-mml/ucf-101": (10, 1),
        "di-mml/modelnet40": (50, 3),
    }


def test_first_stage_is_selected_after_the_contrastive_loss_sets_in():
    learner = bind(methods.DIMML(e0=7))
    assert learner.stages(50)[0].first_selectable == 7
    assert learner.stages(5)[0].first_selectable == 0
    assert learner.selection_scores(0.9, [0.2, 0.4]) == {("",): pytest.approx(0.3)}


def test_encoders_of_separate_runs_are_selected_apart():
    for name in ("unimodal", "ensemble", "frozen-unimodal"):
        scores = bind(name).selection_scores(0.9, [0.2, 0.4])
        assert scores == {
            ("model.encoders.m0.", "own_heads.0."): 0.2,
            ("model.encoders.m1.", "own_heads.1."): 0.4,
        }


def test_accuracy_alone_counts_samples_that_have_the_modality():
    full = make_data(40)
    present = torch.arange(40) < 10
    data = ArrayDataset(full.arrays, full.labels, present={"m1": present})
    learner = bind("multi-loss").eval()
    metrics = evaluate(learner, data, Fabric(accelerator="cpu"))
    own = learner.own_logits(learner.encode(full[:]))[1].argmax(1) == full.labels
    assert metrics.modality_accuracy["m1"] == pytest.approx(float(own[:10].float().mean()))


def test_mla_step_uses_the_epochs_part_and_the_samples_that_are_there():
    full = make_data(20)
    present = torch.arange(20) % 2 == 0
    data = ArrayDataset(full.arrays, full.labels, present={"m0": present})
    learner = bind(methods.MLA(alpha=0.2))
    learner(data[:], 0).backward()
    mean = learner.encode(full[:])[0][present].mean(0).detach()
    torch.testing.assert_close(learner.current, mean)
    learner.edit_gradients(0, 0.5)
    learner.zero_grad()
    learner(data[:], 1).backward()
    learner.edit_gradients(1, 0.5)
    expected = torch.eye(8) - torch.outer(mean, mean) / (0.2 * 0.1**0.5 + mean @ mean)
    torch.testing.assert_close(learner.projector, expected, rtol=1e-4, atol=1e-5)


def test_losses_of_own_heads_count_who_is_there():
    full = make_data(12)
    present = torch.arange(12) < 5
    data = ArrayDataset(full.arrays, full.labels, present={"m1": present})
    learner = bind(methods.MultiLoss(lam=0.25))
    first, second = learner.encode(data[:])
    one = F.cross_entropy(learner.own_heads[0](first), full.labels)
    two = F.cross_entropy(learner.own_heads[1](second[:5]), full.labels[:5])
    fused = F.cross_entropy(learner.model.fuse([first, second]), full.labels)
    torch.testing.assert_close(learner(data[:]), fused + 0.25 * (one + two))


def test_valuation_reads_the_plain_form_of_augmented_data(monkeypatch):
    from mmfast.methods import _resampling

    data = make_data(50)
    data.evaluation = make_data(50, seed=9)
    plain = _resampling.contributions
    for name in ("sample-valuation", "modality-valuation"):
        seen = []

        def watched(learner, dataset, *, seen=seen, **options):
            found = plain(learner, dataset, **options)
            seen.append((len(dataset), options, found[0]))
            return found

        monkeypatch.setattr(_resampling, "contributions", watched)
        learner = bind(methods.make(name, warmup=1, released=True))
        learner.end_epoch(0, data, None)
        size, options, phi = seen[0]
        # Who is drawn twice is valued once.
        drawn = torch.randint(50, (10,), generator=learner.generator(0)).unique()
        assert size == (50 if name == "sample-valuation" else len(drawn))
        assert options == {"utility": "correct", "none_is_worthless": True, "share": True}
        if name == "sample-valuation":
            torch.testing.assert_close(phi, plain(learner, data.evaluation, **options)[0])


def test_diagnosis_measures_purity_of_scaled_features():
    from mmfast import ops
    from mmfast.methods.diagnose_relearn import scale_to_unit

    train, val = make_data(90), make_data(45, seed=1)
    learner = bind(methods.DiagnoseRelearn(epochs=(0,), num_init=3), seed=5)
    features = {id(data): [h.detach() for h in learner.eval().encode(data[:])] for data in (train, val)}
    figures = learner.end_epoch(0, train, val)
    for m in range(2):
        purity = []
        for data in (train, val):
            scaled = scale_to_unit(features[id(data)][m])
            clusters = ops.kmeans(scaled, NUM_CLASSES, num_init=3, seed=5)
            purity.append(ops.cluster_purity(clusters.assignments, data.labels))
        assert figures[f"gap_m{m}"] == pytest.approx(abs(purity[0] - purity[1]))


def test_diagnosis_restores_running_statistics_when_told():
    encoders = {
        name: torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8)) for name in ("m0", "m1")
    }
    for reset in (True, False):
        model = mmfast.MultimodalModel(copy.deepcopy(encoders), 8, NUM_CLASSES)
        learner = methods.DiagnoseRelearn(epochs=(0,), reset_running_stats=reset).bind(model)
        learner.train()
        learner(make_data()[:])
        learner.end_epoch(0, make_data(), make_data(30, seed=1))
        assert bool((model.encoders["m0"][1].running_mean == 0).all()) == reset


def test_selection_keeps_the_earliest_of_equal_scores():
    learner, selection = bind("joint"), BestWeights()
    weight = learner.model.head.linear.weight
    for epoch, accuracy in enumerate([0.4, 0.6, 0.6, 0.5]):
        with torch.no_grad():
            weight.fill_(epoch)
        selection.update(learner, accuracy, [0.1, 0.1], epoch)
    selection.restore(learner)
    assert weight.unique().tolist() == [1.0]
    assert selection.parts[("",)]["epoch"] == 1


def test_a_probe_learns_from_the_training_part_only():
    train, learner = make_data(90), bind("joint").eval()
    shifted = ArrayDataset(train.arrays, (train.labels + 1) % NUM_CLASSES)
    fabric = Fabric(accelerator="cpu")
    assert min(probe(learner, train, train, fabric).values()) > 0.6
    assert max(probe(learner, train, shifted, fabric).values()) < 0.3


def test_a_probe_answers_features_that_are_not_finite_wrong():
    train, learner = make_data(90), bind("joint").eval()
    fabric = Fabric(accelerator="cpu")
    # As a data set of the user's own may give them.
    broken = [train[i] | {"m0": torch.full((5,), torch.inf) if i < 9 else train[i]["m0"]} for i in range(90)]
    answers = probe_answers(learner, broken, broken, fabric)
    assert not answers["m0"][:9].any()
    assert answers["m0"][9:].mean() > 0.6
    assert probe(learner, broken, broken, fabric)["m1"] == probe(learner, train, train, fabric)["m1"]
    nothing = [sample | {"m0": torch.full((5,), torch.nan)} for sample in broken]
    assert probe(learner, nothing, train, fabric)["m0"] == 0.0


def test_features_of_a_modality_are_those_of_samples_that_have_it():
    full, present = make_data(300), torch.arange(300) % 5 == 0
    learner = bind("joint").eval()
    data = ArrayDataset(full.arrays, full.labels, present={"m1": present})
    found = {0: [], 1: []}
    for m, h, labels in learner.modality_features(data):
        found[m].append((h, labels))
    expected = learner.encode(full[:])
    for m, keep in ((0, slice(None)), (1, present)):
        torch.testing.assert_close(torch.cat([h for h, _ in found[m]]), expected[m][keep])
        assert torch.equal(torch.cat([labels for _, labels in found[m]]), full.labels[keep])


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_pass_of_a_fit_computes_in_the_precision_of_training(name):
    data, val = make_data(60), make_data(30, seed=0)
    torch.manual_seed(0)
    model = build_model(data.shapes, NUM_CLASSES, dim=8)
    seen = []

    def look(module, inputs):
        # Two samples are looked at beforehand, to count what they cost.
        if len(inputs[0]) > 2:
            seen.append((module.training, torch.is_autocast_enabled("cpu")))

    for encoder in model.encoders.values():
        encoder.register_forward_pre_hook(look)
    options = {"warmup": 1} if "valuation" in name else {}
    options |= {"e0": 1, "head_epochs": 2} if name == "di-mml" else {}
    options |= {"epochs": (0,)} if name == "diagnose-relearn" else {}
    trainer = mmfast.Trainer(
        methods.make(name, **options), max_epochs=3, accelerator="cpu", precision="bf16-mixed"
    )
    trainer.fit(model, data, val)
    assert set(seen) == {(True, True), (False, True)}
    # What is copied or sent to another process afterwards takes no trainer along.
    assert copy.deepcopy(trainer.learner).autocast is contextlib.nullcontext


def test_features_in_float64_are_trained_on_as_they_are_evaluated():
    class Own(torch.utils.data.Dataset):
        def __init__(self, dtype):
            self.dtype = dtype

        def __len__(self):
            return 60

        def __getitem__(self, index):
            sample = make_data(60)[index]
            return sample | {name: sample[name].to(self.dtype) for name in ("m0", "m1")}

    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = build_model(make_data().shapes, NUM_CLASSES, dim=8)
        trainer = mmfast.Trainer("joint", max_epochs=2, accelerator="cpu")
        trainer.fit(model, Own(dtype), Own(dtype))
        losses.append([(entry["loss"], entry["val"]["loss"]) for entry in trainer.history])
    assert losses[0] == losses[1]


def test_a_fit_leaves_the_hosts_generators_alone():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before, data = state(), make_data(60)
    model = build_model(data.shapes, NUM_CLASSES, dim=8)
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    mmfast.Trainer("joint", max_epochs=1, accelerator="cpu").fit(model, data)
    assert state() == before


def test_unimodal_answers_by_the_accuracies_of_its_own_epoch():
    data, val = make_data(90), make_data(60, seed=0)
    torch.manual_seed(0)
    model = build_model(data.shapes, NUM_CLASSES, dim=8)
    trainer = mmfast.Trainer("unimodal", max_epochs=4, accelerator="cpu")
    trainer.fit(model, data, val)
    for entry in trainer.history:
        assert entry["val"]["accuracy"] == max(entry["val"]["modality_accuracy"].values())


class _Projecting(methods.base.Learner):
    def encode(self, batch):
        return [2 * h for h in super().encode(batch)]

    def note_unimodal_accuracy(self, unimodal_accuracy):
        return False


class _Warming(methods.base.Learner):
    def stages(self, max_epochs):
        return [methods.base.Stage("nothing", 0), *super().stages(max_epochs)]


@pytest.mark.parametrize("learner", [_Projecting, _Warming])
def test_learners_of_the_users_own(learner, monkeypatch):
    monkeypatch.setattr(methods.Joint, "learner", learner)
    data, trainer = make_data(20), mmfast.Trainer("joint", max_epochs=2, accelerator="cpu", lr=0.1)
    model = build_model(data.shapes, NUM_CLASSES, dim=4)
    trainer.fit(model, data, data)
    best = max(trainer.history, key=lambda entry: entry["val"]["accuracy"])
    assert trainer.test(model, data).loss == pytest.approx(best["val"]["loss"])


def test_one_pool_reads_data_whose_plain_form_is_new_each_time(monkeypatch):
    class Plain(torch.utils.data.Dataset):
        def __init__(self):
            self.samples = make_data(20)

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return self.samples[index]

        @property
        def evaluation(self):
            return Plain()

    made = []
    pool = reader.Pool
    monkeypatch.setattr(reader, "Pool", lambda *words: made.append(words[0].dataset) or pool(*words))
    data = Plain()
    method = methods.ModalityValuation(warmup=1)
    trainer = mmfast.Trainer(method, max_epochs=4, accelerator="cpu", num_workers=1)
    trainer.fit(build_model(data.samples.shapes, NUM_CLASSES, dim=4), data)
    assert made == [data]
