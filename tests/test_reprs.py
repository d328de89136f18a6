"""What objects say of themselves: a few lines, with what was chosen, and no elements of tensors."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import torch
from torch import nn

import mmfast
from mmfast import methods, ops
from mmfast.data.batches import Entries
from mmfast.data.reader import Reader
from mmfast.data.splits import Splits
from mmfast.experiments.comparison import ComparisonRunner
from mmfast.experiments.setup import Setup
from mmfast.models import FrameMean, MultimodalModel, SmallCNN, build_model
from mmfast.training.optimization import Optimization
from mmfast.training.text import IN_WORDS
from mmfast.valuation import Valuation


def splits(num_classes=3, **options):
    rng = np.random.default_rng(0)
    arrays = {"audio": rng.standard_normal((60, 4)), "image": rng.standard_normal((60, 1, 5, 5))}
    return Splits.from_arrays(arrays, np.arange(60) % num_classes, name="drawn", **options)


def small_model():
    return build_model({"audio": [4], "image": [1, 5, 5]}, 3, dim=8)


def text(*lines):
    return "\n".join(lines)


def test_splits():
    assert repr(splits(seed=3)) == text(
        "Splits('drawn', audio [4], image [1, 5, 5]",
        "  train 42, val 9, test 9; split 70/15/15%, stratified by class, drawn with seed 3",
        "  3 classes: 0, 1, 2",
        "  standardized by the training part)",
    )
    parts = np.repeat(["train", "val", "test"], 20)
    given = splits(12, split=parts, standardize=False).with_notes(["2 files were left out"])
    assert repr(given) == text(
        "Splits('drawn', audio [4], image [1, 5, 5]",
        "  train 20, val 20, test 20; split as given; 2 files were left out",
        "  12 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...",
        "  not standardized)",
    )


def test_splits_with_a_description_of_ones_own():
    own = splits(seed=3)
    own = Splits(own.train, own.val, own.test, 3, own.class_names, "mine", None, "by hand")
    assert repr(own).splitlines()[1] == "  train 42, val 9, test 9; split as given"


def test_model():
    model = small_model()
    for p in model.encoders["image"].parameters():
        p.requires_grad_(False)
    assert repr(model) == text(
        "MultimodalModel(2 modalities, 3 classes, 26,451 parameters (1,995 trained)",
        "  audio: MLP, D = 8, 1,944 parameters",
        "  image: SmallCNN, D = 8, 24,456 parameters (0 trained)",
        "  fusion: ConcatHead, 51 parameters)",
    )
    # Every layer is there for who asks.
    assert "(0): Linear(in_features=4, out_features=128, bias=True)" in repr(model.encoders)
    assert "(encoders): ModuleDict(" in nn.Module.__repr__(model)


def test_model_of_ones_own_encoders():
    encoders = {"a": nn.Linear(3, 2), "b": FrameMean(SmallCNN(1, 2, channels=(2,))), "c": nn.LazyLinear(2)}
    assert repr(MultimodalModel(encoders, 2, 2, "gated")).splitlines()[1:4] == [
        "  a: Linear(in_features=3, out_features=2, bias=True), D = 2, 8 parameters",
        "  b: FrameMean of SmallCNN, D = 2, 36 parameters",
        "  c: LazyLinear(in_features=0, out_features=2, bias=True), D = 2, 0 parameters",
    ]


def test_trainer():
    assert repr(mmfast.Trainer("joint", accelerator="cpu")) == text(
        "Trainer(Joint()",
        "  max_epochs=50, batch_size=64, optimizer='adam', lr=0.001",
        "  on cpu, precision 32-true, seed 0)",
    )


def test_trainer_with_options(tmp_path):
    options = {"num_workers": 2, "collate_fn": functools.partial(mmfast.data.pad, max_length=9)}
    trainer = mmfast.Trainer(
        methods.DIMML(temperature=5.0, e0=5),
        optimization=Optimization(optimizer="sgd", lr=0.1),
        lr_step=10,
        seed=4,
        accelerator="cpu",
        devices=2,
        precision="bf16-mixed",
        out_dir=tmp_path,
        on_epoch=print,
        **options,
    )
    assert repr(trainer) == text(
        "Trainer(DIMML(temperature=5.0)",
        "  max_epochs=50, batch_size=64, optimizer='sgd', lr=0.1, lr_step=10",
        "  on 2 x cpu, precision bf16-mixed, seed 4",
        f"  out_dir {tmp_path}",
        "  on_epoch=print, num_workers=2, collate_fn=partial(pad, max_length=9))",
    )


def test_every_option_of_a_trainer_is_shown_where_it_is_not_as_by_default():
    """Those to come, too."""
    trainer = mmfast.Trainer("joint", accelerator="cpu")
    for name in set(inspect.signature(mmfast.Trainer).parameters) - set(IN_WORDS):
        trainer._given[name] = torch.zeros(3)
        assert f"{name}=Tensor [3] of float32" in repr(trainer)


def test_learner_and_trainer_after_a_fit():
    data = splits()
    trainer = mmfast.Trainer(methods.MultiLoss(), accelerator="cpu", max_epochs=1)
    learner = trainer.fit(small_model(), data.train, data.val)
    assert repr(learner) == text(
        "Learner(MultiLoss(), seed 0, stage 'train'",
        "  MultimodalModel(2 modalities, 3 classes, 26,451 parameters",
        "    audio: MLP, D = 8, 1,944 parameters",
        "    image: SmallCNN, D = 8, 24,456 parameters",
        "    fusion: ConcatHead, 51 parameters)",
        "  own_heads: UnimodalHeads, 54 parameters)",
    )
    assert repr(trainer).endswith("\n  epochs trained: 1)")
    assert repr(learner.keep(data.test)) == (
        "KeptFeatures(9 samples, audio.features=Tensor [9, 8] of float32, "
        "image.features=Tensor [9, 8] of float32, label=Tensor [9] of int64)"
    )


def test_valuation():
    phi, labels = torch.tensor([[0.5, 1.5], [0.25, 0.0]]), torch.tensor([0, 1])
    found = Valuation(phi, labels, ("a", "b"), "cardinality", torch.ones(4))
    assert repr(found) == "Valuation(2 samples, utility='cardinality', means: a 0.375, b 0.75)"
    present = torch.tensor([[True, False], [True, False]])
    found = Valuation(phi, labels, ("a", "b"), "cardinality", torch.ones(4), present)
    assert repr(found) == "Valuation(2 samples, utility='cardinality', means: a 0.375, b nan)"


def test_what_ops_return():
    features, labels = torch.randn(20, 6), torch.arange(20) % 3
    found = ops.kmeans(features.round(), 3, num_init=1)
    assert repr(found) == (
        "KMeans(centroids=Tensor [3, 6] of float32, assignments=Tensor [20] of int64, "
        f"inertia={found.inertia.item()!r}, num_iter={found.num_iter})"
    )
    assert repr(ops.class_moments(features, labels, 3)) == (
        "ClassMoments(count=Tensor [3] of int64, mean=Tensor [3, 6] of float32, var=Tensor [3, 6] of float32)"
    )
    params = [torch.zeros(3, 1000), torch.zeros(5)]
    assert repr(ops.ReinitPlan(params, [torch.ones_like(p) for p in params])) == (
        "ReinitPlan(2 parameters of 3,005 values, backend='auto')"
    )
    dims = ops.DucDims(torch.eye(2, dtype=torch.bool))
    assert repr(dims) == "DucDims(M=2, D=2, sizes=(0, 1, 1, 0), device=cpu)"


def test_what_reads_data():
    assert repr(Reader()) == "Reader()"
    reader = Reader(2, mmfast.data.pad, batch_size=8)
    assert repr(reader) == "Reader(num_workers=2, collate_fn=pad, batch_size=8)"
    train = splits().train
    assert repr(Entries(train, torch.arange(5))) == "Entries(5 of 42 samples)"
    hidden = Entries(train, torch.arange(5), torch.ones(5, 2, dtype=torch.bool))
    assert repr(hidden) == "Entries(5 of 42 samples, modalities hidden)"


def test_experiments(tmp_path):
    setup = Setup("drawn.npz", splits(seed=3), Optimization(lr=0.1), dim=8)
    comparison = ComparisonRunner(setup, [methods.Joint(), methods.MLA()], 3, tmp_path)
    assert repr(comparison) == text(
        f"ComparisonRunner(joint, mla; 3 seeds, 0 runs done, out {tmp_path}",
        "  Setup('drawn.npz', Optimization(lr=0.1)",
        "    Splits('drawn', audio [4], image [1, 5, 5]",
        "      train 42, val 9, test 9; split 70/15/15%, stratified by class, drawn with seed 3",
        "      3 classes: 0, 1, 2",
        "      standardized by the training part)",
        "    dim=8))",
    )
    assert repr(comparison.results) == f"Results({str(tmp_path)!r}, 0 runs)"
