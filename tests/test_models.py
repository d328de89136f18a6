"""MultimodalModel and the fusion heads: coalitions, partial logits, gradients, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmfast.models import FUSION_HEADS, MLP, ConcatHead, FusionHead, MultimodalModel, build_model

NUM_SAMPLES, NUM_CLASSES = 5, 4
HEADS = sorted(FUSION_HEADS)
ADDITIVE = [name for name in HEADS if FUSION_HEADS[name].additive]
INPUT_DIM = 7


def make(fusion: str | FusionHead, num_modalities: int, dims: list[int] | None = None, seed: int = 0):
    """Return a model in eval mode and a batch for it, in float64."""
    torch.manual_seed(seed)
    names = [f"m{m}" for m in range(num_modalities)]
    dims = dims or [6] * num_modalities
    encoders = {name: MLP(INPUT_DIM, dim, hidden=()) for name, dim in zip(names, dims)}
    model = MultimodalModel(encoders, dict(zip(names, dims)), NUM_CLASSES, fusion).double().eval()
    batch = {name: torch.randn(NUM_SAMPLES, INPUT_DIM, dtype=torch.float64) for name in names}
    return model, batch


def zeroed(features, coalition: int):
    return [h if coalition >> m & 1 else torch.zeros_like(h) for m, h in enumerate(features)]


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 6])
@pytest.mark.parametrize("fusion", HEADS)
def test_coalition_equals_zeroed_features_and_presence(fusion, num_modalities):
    model, batch = make(fusion, num_modalities)
    features = model.encode(batch)
    for coalition in range(2**num_modalities):
        expected = model.head(zeroed(features, coalition))
        present = torch.tensor([[bool(coalition >> m & 1)] * NUM_SAMPLES for m in range(num_modalities)])
        in_batch = batch | {f"m{m}__present": present[m] for m in range(num_modalities)}
        torch.testing.assert_close(model.fuse(features, coalition=coalition), expected, rtol=0, atol=0)
        torch.testing.assert_close(model.fuse(features, present=present), expected, rtol=0, atol=0)
        torch.testing.assert_close(model(batch, coalition=coalition), expected)
        torch.testing.assert_close(model(batch, present=present), expected)
        torch.testing.assert_close(model(in_batch), expected)
        torch.testing.assert_close(model.train()(batch, coalition=coalition), expected)
        model.eval()


@pytest.mark.parametrize("dims", [[3], [3, 8], [5, 4, 9]], ids=str)
@pytest.mark.parametrize("fusion", HEADS)
def test_coalition_logits_equal_a_loop(fusion, dims, monkeypatch):
    model, batch = make(fusion, len(dims), dims)
    features = model.encode(batch)
    order = list(range(2 ** len(dims)))[::-1]
    expected = torch.stack([model.fuse(features, coalition=s) for s in order], dim=1)
    torch.testing.assert_close(model.coalition_logits(features, order), expected)
    torch.testing.assert_close(model.coalition_logits(features, torch.tensor(order)), expected)
    # Two coalitions at a time, and one where a single batch is already too large.
    for rows in (2 * NUM_SAMPLES, 1):
        monkeypatch.setattr("mmfast.models.multimodal._MAX_ROWS", rows)
        torch.testing.assert_close(model.coalition_logits(features, order), expected)


@pytest.mark.parametrize("fusion", HEADS)
def test_coalition_logits_without_coalitions_or_samples(fusion):
    model, batch = make(fusion, 2)
    features = model.encode(batch)
    assert model.coalition_logits(features, []).shape == (NUM_SAMPLES, 0, NUM_CLASSES)
    empty = model.encode({name: x[:0] for name, x in batch.items()})
    assert model.coalition_logits(empty, range(4)).shape == (0, 4, NUM_CLASSES)
    assert model.fuse(empty, coalition=1).shape == (0, NUM_CLASSES)
    assert model({name: x[:0] for name, x in batch.items()}).shape == (0, NUM_CLASSES)


@pytest.mark.parametrize("dims", [[3], [3, 8], [6] * 6], ids=str)
@pytest.mark.parametrize("fusion", ADDITIVE)
def test_partial_logits_and_bias_sum_to_the_logits(fusion, dims):
    model, batch = make(fusion, len(dims), dims)
    features = model.encode(batch)
    partial = model.partial_logits(features)
    assert model.additive
    assert partial.shape == (len(dims), NUM_SAMPLES, NUM_CLASSES)
    torch.testing.assert_close(model.bias + partial.sum(0), model(batch))
    torch.testing.assert_close(model.bias.expand(NUM_SAMPLES, -1), model(batch, coalition=0))


@pytest.mark.parametrize("fusion", sorted(set(HEADS) - set(ADDITIVE)))
def test_partial_logits_of_another_head_raise(fusion):
    model, batch = make(fusion, 2)
    assert not model.additive
    assert model.bias.shape == (NUM_CLASSES,)
    name = type(model.head).__name__
    with pytest.raises(ValueError, match=rf"additive fusion head \('concat', 'sum'\), got {name}"):
        model.partial_logits(model.encode(batch))


def test_concat_is_one_linear_layer_over_the_concatenation():
    model, batch = make("concat", 3, [2, 4, 3])
    assert isinstance(model.head.linear, nn.Linear)
    assert model.head.linear.weight.shape == (NUM_CLASSES, 9)
    assert [name for name, _ in model.head.named_parameters()] == ["linear.weight", "linear.bias"]
    torch.testing.assert_close(model(batch), model.head.linear(torch.cat(model.encode(batch), dim=1)))


@pytest.mark.parametrize("fusion", HEADS)
def test_presence_is_per_sample(fusion):
    model, batch = make(fusion, 2)
    present = torch.tensor([[True, True, False, False, True], [True, False, True, False, True]])
    logits = model(batch, present=present)
    features = model.encode(batch)
    for i in range(NUM_SAMPLES):
        coalition = int(present[0, i]) + 2 * int(present[1, i])
        torch.testing.assert_close(logits[i], model.fuse(features, coalition=coalition)[i])
    combined = model(batch | {"m0__present": present[0]}, coalition=2)
    torch.testing.assert_close(combined, model(batch, coalition=2))


@pytest.mark.parametrize("fusion", HEADS)
def test_gradients_reach_every_parameter_and_none_the_absent_encoder(fusion):
    model, batch = make(fusion, 3)
    model.train()(batch).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(any(p.grad.any() for p in encoder.parameters()) for encoder in model.encoders.values())
    present = torch.tensor([True, False, True])[:, None].expand(3, NUM_SAMPLES)
    for absent in ({"coalition": 0b101}, {"present": present}):
        model.zero_grad()
        model(batch, **absent).square().sum().backward()
        assert all(not p.grad.any() for p in model.encoders["m1"].parameters())
        assert all(any(p.grad.any() for p in model.encoders[name].parameters()) for name in ("m0", "m2"))


def test_an_absent_modality_cannot_spoil_the_logits():
    model, batch = make("concat", 2)
    features = model.encode(batch)
    features[1] = torch.full_like(features[1], float("nan"))
    assert model.fuse(features, coalition=1).isfinite().all()
    assert (
        model.fuse(features, present=torch.tensor([[True], [False]]).expand(2, NUM_SAMPLES)).isfinite().all()
    )


@pytest.mark.parametrize("fusion", HEADS)
def test_eval_needs_only_the_coalition_in_the_batch(fusion):
    model, batch = make(fusion, 3)
    only = {"m1": batch["m1"]}
    torch.testing.assert_close(model(only, coalition=0b010), model(batch, coalition=0b010))
    torch.testing.assert_close(model(only, coalition=0), model(batch, coalition=0))
    with pytest.raises(ValueError, match="'m0' is missing"):
        model.train()(only, coalition=0b010)


@pytest.mark.parametrize("fusion", HEADS)
def test_same_seed_same_model_and_state_dict_round_trip(fusion):
    model, batch = make(fusion, 2, seed=3)
    twin, _ = make(fusion, 2, seed=3)
    other, _ = make(fusion, 2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert not torch.equal(model(batch), other(batch))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(batch), other(batch))


@pytest.mark.parametrize("fusion", HEADS)
def test_autocast_bfloat16(fusion):
    model, batch = make(fusion, 3)
    model, batch = model.float(), {name: x.float() for name, x in batch.items()}
    expected = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch)
        coalitions = model.coalition_logits(model.encode(batch), range(8))
        alone = model({"m0": batch["m0"]}, coalition=1)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(coalitions[:, 7].float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(coalitions[:, 1].float(), alone.float(), rtol=0.05, atol=0.05)


def test_compile_fullgraph():
    model, batch = make("concat", 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    present = torch.tensor([[True], [False]]).expand(2, NUM_SAMPLES)
    for keywords in ({}, {"coalition": 1}, {"coalition": 2}, {"present": present}):
        expected = model(batch, **keywords)
        torch.testing.assert_close(compiled(batch, **keywords), expected)
    compiled(batch | {"m0__present": present[0]}).sum().backward()


@pytest.mark.parametrize("fusion", ["sum", "gated", "film", "attention"])
def test_compile_fullgraph_other_heads(fusion):
    model, batch = make(fusion, 3)
    features = [h.detach() for h in model.encode(batch)]
    compiled = torch.compile(model.coalition_logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, range(8)), model.coalition_logits(features, range(8)))


class MeanHead(FusionHead):
    """A head of one's own: no bias, not additive."""

    def __init__(self, dims, num_classes):
        super().__init__(dims, num_classes)
        self.linear = nn.Linear(dims[0], num_classes, bias=False)

    def forward(self, features):
        return self.linear(torch.tanh(torch.stack(list(features)).mean(0)))


def test_a_head_and_encoders_of_ones_own():
    torch.manual_seed(0)
    encoders = {"audio": nn.Linear(3, 6), "image": nn.Sequential(nn.Flatten(), nn.Linear(8, 6))}
    model = MultimodalModel(encoders, 6, NUM_CLASSES, MeanHead([6, 6], NUM_CLASSES))
    batch = {"audio": torch.randn(2, 3), "image": torch.randn(2, 2, 4)}
    features = model.encode(batch)
    assert model.modalities == ("audio", "image")
    assert torch.equal(model.bias, torch.zeros(NUM_CLASSES))
    expected = torch.stack([model.fuse(features, coalition=s) for s in range(4)], dim=1)
    torch.testing.assert_close(model.coalition_logits(features, range(4)), expected)
    with pytest.raises(ValueError, match=r"dims \[6, 6\] and C = 4, got dims \[6, 5\] and C = 4"):
        MultimodalModel(encoders, 6, NUM_CLASSES, ConcatHead([6, 5], NUM_CLASSES))


def test_film_and_attention_follow_their_equations():
    model, batch = make("film", 3, [2, 4, 3])
    h = model.encode(batch)
    scale, shift = model.head.film(h[0]).split([7, 7], dim=1)
    torch.testing.assert_close(model(batch), model.head.linear((1 + scale) * torch.cat(h[1:], 1) + shift))
    model, batch = make("attention", 3, [2, 4, 3])
    tokens = torch.stack([p(h) for p, h in zip(model.head.project, model.encode(batch))], dim=1)
    attention = model.head.attention
    (wq, wk, wv), (bq, bk, bv) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    # Four heads of width one.
    q, k, v = model.head.query[0] @ wq.T + bq, tokens @ wk.T + bk, tokens @ wv.T + bv
    pooled = (torch.softmax(q * k, dim=1) * v).sum(1)
    torch.testing.assert_close(model(batch), model.head.linear(attention.out_proj(pooled)))


def test_gated_follows_its_equation():
    model, batch = make("gated", 2, [5, 3])
    h = model.encode(batch)
    gates = torch.sigmoid(model.head.gate(torch.cat(h, 1))).chunk(2, dim=1)
    hidden = sum(g * torch.tanh(p(x)) for g, p, x in zip(gates, model.head.project, h))
    torch.testing.assert_close(model(batch), model.head.linear(hidden))
    torch.testing.assert_close(model(batch, coalition=0), model.bias.expand(NUM_SAMPLES, -1))


def test_encode_modality_is_that_modality_of_encode() -> None:
    model = build_model({"a": (5,), "b": (3,)}, 4, dim=8).eval()
    batch = {"a": torch.randn(6, 5), "b": torch.randn(6, 3), "b__present": torch.tensor([True, False] * 3)}
    for m, name in enumerate(model.modalities):
        torch.testing.assert_close(model.encode_modality(batch, name), model.encode(batch)[m])
    del batch["a"]
    assert model.encode_modality(batch, "b").shape == (6, 8)
    with pytest.raises(ValueError, match=r"name must be one of 'a', 'b', got 'c'"):
        model.encode_modality(batch, "c")
