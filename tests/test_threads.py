"""Small work gets one thread, by the work alone; torch's own number comes back."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_trainer import SPLITS, make_model, make_trainer
from torch import nn

import mmfast
from mmfast.data import threads
from mmfast.data.reader import Reader
from mmfast.data.threads import fitting_threads

pytestmark = pytest.mark.usefixtures("restored_threads")


class Noting(nn.Linear):
    """Keeps with how many threads it was called."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.seen: set[int] = set()

    def forward(self, x):
        self.seen.add(torch.get_num_threads())
        return super().forward(x)


def make_noting(width: int) -> tuple[mmfast.MultimodalModel, Noting]:
    noting = Noting(6, 8)
    wide = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 8))
    return mmfast.MultimodalModel({"a": noting, "b": wide}, 8, 3), noting


@pytest.mark.parametrize(("width", "expected"), [(8, 1), (20_000, 3)])
def test_work_decides(width, expected):
    torch.set_num_threads(3)
    model, noting = make_noting(width)
    trainer = make_trainer("joint", max_epochs=1, accelerator="cpu")
    # What looks at two samples first has all.
    trainer.fit(model, SPLITS.train, SPLITS.val)
    assert expected in noting.seen
    noting.seen.clear()
    trainer.test(model, SPLITS.test)
    mmfast.valuate(model, SPLITS.test)
    assert noting.seen == {expected, 3}
    assert torch.get_num_threads() == 3


def test_operations_are_those_of_products():
    model, _ = make_noting(8)
    # Two operations a multiplication: 6 x 8, 6 x 8 and 8 x 8 in the encoders, 16 x 3 in the head.
    assert threads._count(model, SPLITS.train, Reader()) == 2 * (48 + 48 + 64 + 48)


def test_the_number_comes_back_after_an_error():
    def fail():
        assert torch.get_num_threads() == 1
        raise RuntimeError("mine")

    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="mine"), fitting_threads(make_model(), SPLITS.train, 8):
        fail()
    assert torch.get_num_threads() == 2


def test_what_cannot_be_counted_keeps_all_threads():
    class Odd(nn.Linear):
        def forward(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a mode")
            return super().forward(x)

    torch.set_num_threads(2)
    model = mmfast.MultimodalModel({"a": Odd(6, 8), "b": nn.Linear(6, 8)}, 8, 3)
    with fitting_threads(model, SPLITS.train, 8):
        assert torch.get_num_threads() == 2
