"""Batches whose modalities are nests of tensors, or are held for some of the samples only."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from mmfast.models import MLP, MultimodalModel
from mmfast.nests import mapped

N, WORDS, DIM = 4, 5, 3


class Text(nn.Module):
    """A mean of embeddings; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, DIM)

    def forward(self, text):
        self.seen = text
        ids, mask = (text["ids"], text["mask"]) if isinstance(text, dict) else text[:2]
        h = self.words(ids) * mask[..., None]
        return h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def make(fusion="concat"):
    """Return a model of audio and text, and a batch of four samples."""
    torch.manual_seed(0)
    model = MultimodalModel({"audio": MLP(6, DIM, hidden=()), "text": Text()}, DIM, 2, fusion)
    text = {"ids": torch.randint(1, 10, (N, WORDS)), "mask": torch.rand(N, WORDS) > 0.3}
    return model, {"audio": torch.randn(N, 6), "text": text, "label": torch.tensor([0, 1, 1, 0])}


def part(nest, rows):
    return {key: x[rows] for key, x in nest.items()} if isinstance(nest, dict) else nest[rows]


def in_rows(batch, **rows):
    """Return a batch that holds the values of some samples only."""
    found = dict(batch)
    for name, chosen in rows.items():
        chosen = torch.tensor(chosen, dtype=torch.int64)
        found |= {name: part(batch[name], chosen), f"{name}.rows": chosen}
    return found


class Pair(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor
    scale: float | None


@pytest.mark.parametrize("kind", [dict, tuple, list, Pair])
def test_an_encoder_gets_the_nest_as_it_is(kind):
    model, batch = make()
    text = batch["text"]
    nest = {
        dict: {**text, "scale": 2.0, "no": None},
        tuple: (text["ids"], text["mask"], {"deep": [text["ids"]]}),
        list: [text["ids"], text["mask"], 3],
        Pair: Pair(text["ids"], text["mask"], None),
    }[kind]
    features = model.encode(batch | {"text": nest})
    assert model.encoders["text"].seen is nest
    torch.testing.assert_close(features[1], model.encoders["text"](text))
    assert model(batch | {"text": nest}).shape == (N, 2)
    with_flags = batch | {"text": nest, "text__present": torch.tensor([True] * 3 + [False])}
    torch.testing.assert_close(model.encode_modality(with_flags, "text")[:3], features[1][:3])
    assert type(model.encoders["text"].seen) is kind


def test_absent_samples_are_zeros_in_every_tensor():
    model, batch = make()
    present = torch.tensor([True, False, True, False])
    text = batch["text"] | {"deep": (torch.full((N, 2), float("nan")),), "size": torch.arange(N) + 1}
    h = model.encode_modality(batch | {"text": text, "text__present": present}, "text")
    seen = model.encoders["text"].seen
    assert not seen["ids"][~present].any()
    assert not seen["mask"][~present].any()
    assert seen["size"].tolist() == [1, 0, 3, 0]
    assert seen["deep"][0][~present].tolist() == [[0, 0], [0, 0]]
    assert torch.equal(seen["ids"][present], text["ids"][present])
    assert h[present].any(1).all()
    assert not h[~present].any()
    h.sum().backward()
    # The embedding of 0, which only absent samples hold, and those of the others.
    grad = model.encoders["text"].words.weight.grad
    assert grad.isfinite().all()
    assert not grad[0].any()


@pytest.mark.parametrize("rows", [[0, 2, 3], [3, 0], [1], list(range(N))], ids=str)
def test_rows_are_encoded_where_they_belong(rows):
    model, batch = make()
    full, absent = model.encode(batch), [i for i in range(N) if i not in rows]
    found = model.encode(in_rows(batch, text=rows))
    torch.testing.assert_close(found[0], full[0])
    torch.testing.assert_close(found[1][rows], full[1][rows])
    assert not found[1][absent].any()
    assert len(model.encoders["text"].seen["ids"]) == len(rows)
    both = model.encode(in_rows(batch, text=rows, audio=[2]))
    torch.testing.assert_close(both[0][2], full[0][2])
    assert not both[0][[0, 1, 3]].any()
    alone = model.encode_modality(in_rows(batch, audio=rows), "audio")
    torch.testing.assert_close(alone[rows], full[0][rows])
    assert not alone[absent].any()
    torch.testing.assert_close(model(in_rows(batch, text=rows)), model.fuse(found))


def test_gradients_of_rows_are_those_of_the_samples_alone():
    model, batch = make()
    rows = torch.tensor([3, 1])
    model(in_rows(batch, text=[3, 1], audio=[0]))[rows].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    present = torch.tensor([[True, False, False, False], [False, True, False, True]])
    model(batch, present=present)[rows].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_rows_and_presence_combine():
    model, batch = make()
    present = torch.tensor([True, True, False, True])
    full = model.encode(batch)[1]
    given = in_rows(batch, text=[3, 2, 0]) | {"text__present": present}
    found = model.encode(given)[1]
    assert not model.encoders["text"].seen["ids"][1].any()
    torch.testing.assert_close(found[[0, 3]], full[[0, 3]])
    assert not found[[1, 2]].any()
    with pytest.raises(ValueError, match=r"text__present must have shape \[N\] = \[4\], got \[3\]"):
        model.encode(given | {"text__present": present[:3]})


@pytest.mark.parametrize("has_values", [True, False])
def test_without_rows_the_encoder_is_not_called(has_values):
    model, batch = make()
    given = in_rows(batch, text=[])
    if not has_values:
        del given["text"]
    features = model.train().encode(given)
    assert features[1].shape == (N, DIM)
    assert not features[1].any()
    assert not hasattr(model.encoders["text"], "seen")
    model(given).sum().backward()
    assert model.encoders["text"].words.weight.grad is None
    assert model.encode_modality(given, "text").shape == (N, DIM)


def test_n_is_told_by_what_the_batch_has():
    model, batch = make()
    given = in_rows(batch, text=[1, 2], audio=[0])
    expected = model(given)
    del given["label"]
    for told in (
        {"audio__present": torch.ones(N, dtype=torch.bool)},
        {"text__present": torch.ones(N, dtype=torch.bool)},
        {"coalition": torch.ones(N, 2, dtype=torch.bool)},
    ):
        torch.testing.assert_close(model(given | told), expected)
    with pytest.raises(
        ValueError, match=r"batch must tell N by 'label', or by the values of all samples of aud"
    ):
        model(given)
    # A modality that is left out tells N, too.
    alone = model.eval()({"audio": batch["audio"], "text.rows": given["text.rows"]}, coalition=0)
    torch.testing.assert_close(alone, model.bias.expand(N, -1))


@pytest.mark.parametrize("coalition", [0b01, 0b10])
def test_what_a_coalition_leaves_out_needs_no_rows(coalition):
    model, batch = make()
    model.eval()
    given = in_rows(batch, text=[0, 3], audio=[1])
    expected = model.fuse(model.encode(given), coalition=coalition)
    torch.testing.assert_close(model(given, coalition=coalition), expected)
    gone = ("text", "audio")[coalition - 1]
    del given[gone]
    torch.testing.assert_close(model(given, coalition=coalition), expected)


def test_one_row_passes_batch_norm():
    encoders = {name: nn.Sequential(nn.Linear(6, DIM), nn.BatchNorm1d(DIM)) for name in ("audio", "image")}
    model, audio = MultimodalModel(encoders, DIM, 2).train(), torch.randn(N, 6)
    given = {"audio": audio, "image": audio[:1], "image.rows": torch.tensor([2])}
    model(given).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model.encode(given)[1][2], encoders["image"][1].bias)
    # As torch does, where it is all there is.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model({"audio": audio[:1], "image": audio[:1]})


def test_features_of_rows_have_the_dtype_of_the_encoder():
    model = MultimodalModel({name: nn.Linear(6, DIM) for name in ("audio", "image")}, DIM, 2)
    given = {"audio": torch.randn(N, 6), "image": torch.randn(2, 6), "image.rows": torch.tensor([3, 1])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [h.dtype for h in model.encode(given)] == [torch.bfloat16] * 2
        assert model(given).dtype == torch.bfloat16


def test_no_value_is_read_to_encode():
    # On the meta device there are none; on a GPU a look at one would wait for it.
    model, batch = make()
    given = in_rows(batch, text=[0, 3]) | {"text__present": torch.tensor([True, True, True, False])}
    features = model.to("meta").train().encode(mapped(lambda x: x.to("meta"), given))
    assert [h.shape for h in features] == [(N, DIM), (N, DIM)]
    assert all(h.is_meta for h in features)


def test_compile_fullgraph_of_nests_and_rows():
    model, batch = make()
    given = in_rows(batch, text=[0, 3]) | {"text__present": torch.tensor([True, True, True, False])}
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(given), model(given))
    torch.testing.assert_close(compiled(batch), model(batch))


def changed(**changes):
    model, batch = make()
    return model(in_rows(batch, text=[0, 2]) | changes)


def text(**changes):
    model, batch = make()
    return model(batch | {"text": batch["text"] | changes})


BAD = {
    "leaf": (
        lambda: text(mask=torch.ones(3, WORDS)),
        ValueError,
        r"text\['mask'\] must hold N = 4 samples as audio does, got 3",
    ),
    "deep leaf": (
        lambda: text(more=[torch.ones(4), (torch.ones(5),)]),
        ValueError,
        r"text\['more'\]\[1\]\[0\] must hold N = 4 samples as audio does, got 5",
    ),
    "scalar": (
        lambda: text(length=torch.tensor(3)),
        ValueError,
        r"text\['length'\] must have shape \[N, ...\], got a scalar",
    ),
    "string": (
        lambda: text(path=["a", "b", "c", "d"]),
        TypeError,
        r"text\['path'\]\[0\] must be a torch.Tensor, a number or None, got 'a'",
    ),
    "no tensor": (lambda: changed(text={"ids": None}), TypeError, "text must be a torch.Tensor, got dict"),
    "first tells": (
        lambda: make()[0].encode_modality({"text": {"a": torch.ones(2), "b": torch.ones(3)}}, "text"),
        ValueError,
        r"text\['b'\] must hold N = 2 samples as text\['a'\] does, got 3",
    ),
    "rows of values": (
        lambda: changed(**{"text.rows": torch.tensor([1])}),
        ValueError,
        r"text\['ids'\] must hold n = 1 samples as text.rows does, got 2",
    ),
    "rows type": (
        lambda: changed(**{"text.rows": [0, 2]}),
        TypeError,
        "text.rows must be a torch.Tensor, got list",
    ),
    "rows dtype": (
        lambda: changed(**{"text.rows": torch.tensor([0, 2], dtype=torch.int32)}),
        TypeError,
        "text.rows must have dtype int64, got int32",
    ),
    "rows shape": (
        lambda: changed(**{"text.rows": torch.tensor([[0], [2]])}),
        ValueError,
        r"text.rows must have shape \[n\], got \[2, 1\]",
    ),
    "rows range": (
        lambda: changed(**{"text.rows": torch.tensor([0, 4])}),
        ValueError,
        r"text.rows must lie in \[0, N\) = \[0, 4\), got 4",
    ),
    "rows below": (
        lambda: changed(**{"text.rows": torch.tensor([-1, 2])}),
        ValueError,
        r"text.rows must lie in \[0, N\) = \[0, 4\), got -1",
    ),
    "many rows": (
        lambda: changed(**{"text.rows": torch.tensor([0, 1, 2, 3, 0])}),
        ValueError,
        "text.rows must hold at most N = 4 samples, got 5",
    ),
    "values without rows": (
        lambda: make()[0]({"audio": torch.ones(4, 6), "text.rows": torch.tensor([1])}),
        ValueError,
        "batch must hold 'audio', 'text', but 'text' is missing",
    ),
    "encoder of rows": (
        lambda: MultimodalModel({"a": nn.Identity()}, 2, 2)(
            {"a": torch.ones(1, 3), "a.rows": torch.tensor([1]), "label": torch.zeros(2).long()}
        ),
        ValueError,
        r"encoder 'a' must return shape \[n, D\] = \[1, 2\], got \[1, 3\]",
    ),
    "our encoders take tensors": (
        lambda: changed(audio={"values": torch.ones(4, 6)}),
        TypeError,
        "audio must be a torch.Tensor, got dict",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_say_what_was_expected(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()
