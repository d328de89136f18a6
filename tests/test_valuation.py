"""Valuation: exact Shapley values over all coalitions, for every head, number of modalities and chunk."""

from __future__ import annotations

import csv
import itertools
import math

import pytest
import torch

import mmfast
from mmfast import ops, valuation
from mmfast.data import ArrayDataset
from mmfast.models import FUSION_HEADS, build_model
from mmfast.ops.additive_shapley import UTILITIES

NUM_CLASSES = 4


def make(num_modalities: int, fusion: str = "concat", num_samples: int = 23):
    torch.manual_seed(num_modalities)
    data = ArrayDataset(
        {f"m{m}": torch.randn(num_samples, 5) for m in range(num_modalities)},
        torch.arange(num_samples) % NUM_CLASSES,
    )
    return build_model(data.shapes, NUM_CLASSES, dim=8, fusion=fusion).eval(), data


def value(logits: torch.Tensor, label: int, members: int, utility: str) -> float:
    if utility in ("cardinality", "correct"):
        right = float(logits.argmax() == label)
        return members * right if utility == "cardinality" else right
    if utility == "margin":
        others = torch.cat([logits[:label], logits[label + 1 :]])
        return float(logits[label] - others.max())
    probability = logits.softmax(0)[label]
    return float(probability if utility == "probability" else probability.log())


def by_permutations(model, data, utility: str) -> torch.Tensor:
    """Return the mean marginal value over all orders of arrival, as the definition has it."""
    num_modalities = len(model.modalities)
    phi = torch.zeros(len(data), num_modalities)
    with torch.no_grad():
        features = model.encode(data[:])
        for i, label in enumerate(data.labels.tolist()):
            game = {}
            for s in range(2**num_modalities):
                logits = model.fuse([h[i : i + 1] for h in features], coalition=s)[0]
                game[s] = value(logits, label, bin(s).count("1"), utility)
            for order in itertools.permutations(range(num_modalities)):
                s = 0
                for m in order:
                    phi[i, m] += game[s | 1 << m] - game[s]
                    s |= 1 << m
    return phi / math.factorial(num_modalities)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("fusion", FUSION_HEADS)
def test_contributions_are_the_definition(fusion, utility):
    model, data = make(3, fusion)
    expected = by_permutations(model, data, utility)
    found = mmfast.valuate(model, data, utility=utility)
    torch.testing.assert_close(found.contributions, expected, atol=1e-5, rtol=1e-5)
    fast, _ = valuation.contributions(model, data, utility=utility)
    torch.testing.assert_close(fast, expected, atol=1e-5, rtol=1e-5)


def test_coalition_accuracies():
    model, data = make(3, "attention")
    found = mmfast.valuate(model, data)
    for s in range(8):
        accuracy = (model(data[:], coalition=s).argmax(1) == data.labels).float().mean()
        assert float(found.coalition_accuracy[s]) == pytest.approx(float(accuracy))
    assert found.coalition_name(0) == "none"
    assert found.coalition_name(5) == "m0+m2"


@pytest.mark.parametrize("num_modalities", [6, 12])
def test_many_modalities_are_exact(num_modalities):
    model, data = make(num_modalities)
    found = mmfast.valuate(model, data)
    assert found.coalition_accuracy.shape == (2**num_modalities,)
    right = (model(data[:]).argmax(1) == data.labels).float()
    torch.testing.assert_close(found.contributions.sum(1), num_modalities * right, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        valuation.contributions(model, data)[0], found.contributions, atol=1e-4, rtol=0
    )


def test_chunks_change_nothing(monkeypatch):
    model, data = make(4, "gated")
    whole = mmfast.valuate(model, data)
    monkeypatch.setattr(valuation, "_MAX_ELEMENTS", 3 * 16 * NUM_CLASSES)
    parts = mmfast.valuate(model, data, batch_size=7)
    torch.testing.assert_close(parts.contributions, whole.contributions)
    torch.testing.assert_close(parts.coalition_accuracy, whole.coalition_accuracy)


def test_memory_does_not_grow_with_samples(monkeypatch):
    sizes = []
    model, data = make(5, "concat", num_samples=400)
    coalition_logits = type(model).coalition_logits

    def watched(self, features, coalitions):
        logits = coalition_logits(self, features, coalitions)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(type(model), "coalition_logits", watched)
    monkeypatch.setattr(valuation, "_MAX_ELEMENTS", 1024)
    mmfast.valuate(model, data)
    assert max(sizes) <= 1024
    assert len(sizes) > 40


def test_an_absent_modality_is_no_player():
    model, data = make(3)
    keep = torch.arange(len(data)) % 2 == 0
    partly = ArrayDataset(data.arrays, data.labels, present={"m1": keep})
    found = mmfast.valuate(model, partly).contributions
    assert found[~keep, 1].abs().max() < 1e-6
    torch.testing.assert_close(found[keep], mmfast.valuate(model, data).contributions[keep])
    # Among the two that are left the game is that of two modalities.
    logits = model.coalition_logits(model.encode(data[:]), torch.tensor([1, 4, 5]))
    right = (logits.argmax(-1) == data.labels[:, None]).float()
    first = right[:, 0] / 2 + (2 * right[:, 2] - right[:, 1]) / 2
    torch.testing.assert_close(found[~keep, 0], first[~keep], atol=1e-5, rtol=0)


def test_files(tmp_path):
    model, data = make(2)
    found = mmfast.valuate(model, data)
    found.to_csv(tmp_path / "v.csv")
    rows = list(csv.DictReader((tmp_path / "v.csv").open()))
    assert len(rows) == len(data)
    assert list(rows[0]) == ["sample", "label", "m0", "m1", "prediction", "correct"]
    assert float(rows[3]["m1"]) == pytest.approx(float(found.contributions[3, 1]))
    found.to_parquet(tmp_path / "v.parquet")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["m0"] == pytest.approx(found.contributions[:, 0].tolist())
    found.plot(tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    assert found.means["m0"] == pytest.approx(float(found.contributions[:, 0].mean()))


def test_the_model_is_left_as_it_was():
    model, data = make(2)
    model.train()
    model.encoders["m0"].eval()
    mmfast.valuate(model, data)
    assert model.training
    assert not model.encoders["m0"].training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda model, data: mmfast.valuate(model, data, utility="accuracy"),
            "utility must be one of cardinality, ",
        ),
        (
            lambda model, data: mmfast.valuate(model, data.subset([])),
            "dataset must hold at least one sample, got none",
        ),
        (
            lambda model, data: mmfast.valuate(model, ArrayDataset({"m0": torch.randn(2, 5)}, [0, 1])),
            "samples of dataset must have 'm1', got 'm0', 'label'",
        ),
        (lambda model, data: mmfast.valuate(model, data, backend="gpu"), 'backend must be "auto" or one of'),
    ],
    ids=["utility", "empty", "modality", "backend"],
)
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=text):
        call(*make(2))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_the_empty_coalition_can_count_for_nothing(num_modalities, missing):
    model, data = make(num_modalities)
    if missing:
        gaps = {"m0": torch.arange(len(data)) % 3 > 0, "m1": torch.arange(len(data)) % 4 > 0}
        data = ArrayDataset(data.arrays, data.labels, present=gaps)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([9.0, 0, 0, 0]))
        features, present = model.encode(data[:]), valuation.presence(data[:], model.modalities)
        values = ops.coalition_utilities(
            model.coalition_logits(features, list(range(2**num_modalities))), data.labels, utility="correct"
        )
    assert 0 < values[:, 0].mean() < 1
    values[:, 0] = 0
    if present is not None:
        shown = (present * 2 ** torch.arange(num_modalities)[:, None]).sum(0)
        values = values.gather(1, shown[:, None] & torch.arange(2**num_modalities))
    found, _ = valuation.contributions(model, data, utility="correct", none_is_worthless=True)
    torch.testing.assert_close(found, ops.shapley_values(values))
