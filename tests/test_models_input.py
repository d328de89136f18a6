"""What MultimodalModel and build_model say to bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.models import MLP, MultimodalModel, build_model


def make():
    """Return a model of the modalities m0 and m1 and a batch of five samples."""
    model = MultimodalModel({name: MLP(7, 6, hidden=()) for name in ("m0", "m1")}, 6, 4).eval()
    return model, {name: torch.randn(5, 7) for name in model.modalities}


def _call(**changes):
    model, batch = make()
    return model(batch | changes.pop("batch", {}), **changes)


def _fuse(features=None, **changes):
    model, batch = make()
    return model.fuse(model.encode(batch) if features is None else features, **changes)


def _coalitions(coalitions):
    model, batch = make()
    return model.coalition_logits(model.encode(batch), coalitions)


def _model(names=("audio", "image"), dim=4, **changes):
    encoders = {name: nn.Linear(3, 4) for name in names}
    return MultimodalModel(encoders, dim, 2, **changes)


BAD = {
    "both": (lambda: _call(coalition=1, present=torch.ones(2, 5).bool()), ValueError, "exclude each other"),
    "range": (lambda: _call(coalition=4), ValueError, r"coalition must lie in \[0, 2\^M\) = \[0, 4\), got 4"),
    "negative": (lambda: _fuse(coalition=-1), ValueError, r"= \[0, 4\), got -1"),
    "no-int": (lambda: _call(coalition=1.0), TypeError, "coalition must be an int, got float"),
    "bool": (lambda: _call(coalition=True), TypeError, "coalition must be an int, got bool"),
    "present-shape": (
        lambda: _call(present=torch.ones(5, 2).bool()),
        ValueError,
        r"present must have shape \[M, N\] = \[2, 5\], got \[5, 2\]",
    ),
    "present-dtype": (lambda: _fuse(present=torch.ones(2, 5)), TypeError, "dtype bool, got float32"),
    "key-shape": (
        lambda: _call(batch={"m1__present": torch.ones(4).bool()}),
        ValueError,
        r"m1__present must have shape \[N\] = \[5\], got \[4\]",
    ),
    "rank": (
        lambda: _call(batch={"m1": torch.zeros(5, 7, 1)}),
        ValueError,
        r"m1 must have shape \[N, D\] = \[N, 7\], got \[5, 7, 1\]",
    ),
    "samples": (
        lambda: _call(batch={"m1": torch.zeros(4, 7)}),
        ValueError,
        "m1 must hold N = 5 .* m0 does, got 4",
    ),
    "integers": (
        lambda: _call(batch={"m0": torch.zeros(5, 7, dtype=torch.uint8)}),
        TypeError,
        "m0 must have a floating dtype, got uint8",
    ),
    "no-tensor": (lambda: _call(batch={"m0": [1.0]}), TypeError, "m0 must be a torch.Tensor, got list"),
    "missing": (
        lambda: _model()({"imgae": torch.zeros(1, 3), "audio": torch.zeros(1, 3)}),
        ValueError,
        "must hold 'audio', 'image', but 'image' is missing; its keys are 'imgae', 'audio'",
    ),
    "features": (lambda: _fuse([torch.zeros(5, 6)]), ValueError, "features must hold M = 2 tensors, got 1"),
    "feature-rank": (
        lambda: _fuse([torch.zeros(5, 6), torch.zeros(5)]),
        ValueError,
        r"m1 must have shape \[N, D\] = \[N, 6\], got \[5\]",
    ),
    "feature-samples": (
        lambda: _fuse([torch.zeros(5, 6), torch.zeros(4, 6)]),
        ValueError,
        "m1 must hold N = 5 samples as m0 does, got 4",
    ),
    "coalitions-range": (lambda: _coalitions([0, 4]), ValueError, r"coalitions\[1\] must lie in .*, got 4"),
    "coalitions-tensor": (
        lambda: _coalitions(torch.tensor([0, 9])),
        ValueError,
        "coalitions must lie .* got 9",
    ),
    "coalitions-rank": (
        lambda: _coalitions(torch.zeros(1, 2).long()),
        ValueError,
        r"coalitions must have shape \[L\], got \[1, 2\]",
    ),
    "coalitions-dtype": (lambda: _coalitions(torch.zeros(2)), TypeError, "integer dtype, got float32"),
    "encoder-output": (
        lambda: _model(dim={"audio": 4, "image": 5})(
            {"audio": torch.zeros(2, 3), "image": torch.zeros(2, 3)}
        ),
        ValueError,
        r"encoder 'image' must return shape \[N, D\] = \[2, 5\], got \[2, 4\]",
    ),
    "dim-keys": (lambda: _model(dim={"audio": 4}), ValueError, r"keys \['audio', 'image'\], got \['audio'\]"),
    "dim-zero": (lambda: _model(dim=0), ValueError, "dim must be at least 1, got 0"),
    "fusion": (lambda: _model(fusion="concta"), ValueError, "one of 'concat', .*, got 'concta'"),
    "fusion-type": (lambda: _model(fusion=3), TypeError, "fusion must be a str or a FusionHead, got int"),
    "no-modality": (lambda: _model(names=()), ValueError, "encoders must hold M >= 1 modalities"),
    "label": (lambda: _model(names=("label",)), ValueError, "must not be empty, 'label'"),
    "dot": (lambda: _model(names=("a.b",)), ValueError, "got 'a.b'"),
    "attribute": (lambda: _model(names=("values",)), ValueError, "attributes of torch.nn.ModuleDict"),
    "option": (
        lambda: build_model({"a": [3]}, 2, temporal="grru"),
        ValueError,
        "one of 'gru', 'conv', got 'grru'",
    ),
    "shape": (lambda: build_model({"a": []}, 2), ValueError, r"a must have samples \[D\], .*, got \[\]"),
    "size": (lambda: build_model({"a": [0]}, 2), ValueError, r"a: size 0 of \[0\] must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_expected(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()
