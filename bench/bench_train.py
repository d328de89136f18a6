"""A step of every method, and what it does between epochs: against joint training and the published loops.

The peer "joint + passes" is a step of joint training plus the forward passes of encoders that the method
makes beyond it, counted; between epochs it is these passes alone. Ours and the published loop begin at the
same weights, and the check holds our encoders after some steps against theirs.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast import methods
from mmfast.coalitions import SHOWN, members
from mmfast.data import ArrayDataset
from mmfast.data.reader import Reader
from mmfast.methods import Learner, Method
from mmfast.models import MultimodalModel, build_model

from . import published
from .harness import Case, Options, Work

# No picture: what is varied is the method.
SIZE = ""
SHAPES = {"audio": (1, 64, 64), "image": (3, 64, 64)}
QUICK_SHAPES = {"audio": (1, 16, 16), "image": (3, 16, 16)}
NUM_CLASSES, DIM, BATCH = 6, 512, 64
# Samples of the training set that is gone through between epochs; validation has half as many.
TRAIN = 1_024
# Of a batch, so many samples are copies that show one modality only.
COPIES = BATCH // 4

Step = Callable[[Mapping[str, Tensor]], None]


def cases(options: Options) -> Iterator[Case]:
    """Yield steps of the ten methods, the work between epochs of those that have any, and feeding alone."""
    for name in methods.METHODS:
        yield _step(methods.make(name), options)
    for method, between in (
        (methods.SampleValuation(), _sample_valuation),
        (methods.ModalityValuation(), _modality_valuation),
        (methods.DIMML(), _effective_dimensions),
        (methods.DiagnoseRelearn(epochs=tuple(range(1000)), max_times=1000), _diagnosis),
    ):
        yield _between(method, between, options)
    for width in (64,) if options.quick else (64, 512, 4_096):
        yield _feeding(width, options)


def _feeding(width: int, options: Options) -> Case:
    """Return the batches of an epoch of data in memory, against the gathering that they must take."""
    size = 2_000 if options.quick else 20_000
    arrays = {name: torch.randn(size, width) for name in ("audio", "image")}
    data = ArrayDataset(arrays, torch.arange(size) % NUM_CLASSES).to(options.device)
    batches = list(torch.randperm(size).split(BATCH))
    there = [batch.to(options.device) for batch in batches]
    read = functools.partial(Reader().read, data, batches, data.modalities, data.device)

    def ours() -> dict[str, Tensor]:
        for batch in read():
            last = batch
        return last

    def bare() -> None:
        for index in there:
            # One batch is there while the next is made.
            _ = [array.index_select(0, index) for array in data.arrays.values()]

    def check(last: dict[str, Tensor]) -> None:
        for key, value in data[batches[-1]].items():
            assert torch.equal(last[key], value), key

    return Case(
        name=f"{len(batches)} batches of {BATCH} x 2 x {width}",
        size=width,
        panel="",
        ours=ours,
        peers={"index_select": bare},
        check=check,
        work=Work(read=size * 2 * width * 4, written=size * 2 * width * 4),
    )


def _dataset(num_samples: int, options: Options) -> ArrayDataset:
    labels = torch.arange(num_samples) % NUM_CLASSES
    shapes = QUICK_SHAPES if options.quick else SHAPES
    arrays = {
        name: torch.randn(num_samples, *shape) + 0.5 * labels.view(-1, *[1] * len(shape)) / NUM_CLASSES
        for name, shape in shapes.items()
    }
    return ArrayDataset(arrays, labels)


def _batch(dataset: ArrayDataset, indices: slice, options: Options) -> dict[str, Tensor]:
    return {key: value.to(options.device) for key, value in dataset[indices].items()}


def _model(options: Options) -> MultimodalModel:
    model = build_model(QUICK_SHAPES if options.quick else SHAPES, NUM_CLASSES, dim=DIM)
    return model.to(options.device)


def _learner(method: Method, model: MultimodalModel, options: Options) -> Learner:
    learner = method.bind(copy.deepcopy(model)).to(options.device)
    learner.start_stage(learner.stages(50)[0])
    return learner


def _own_loop(learner: Learner, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return a step as mmfast/methods/base.py documents it."""
    optimizer = published.sgd(learner.trainable_parameters())

    def step() -> None:
        for turn in range(learner.steps_per_batch):
            optimizer.zero_grad()
            learner(batch, turn).backward()
            learner.edit_gradients(turn, progress=0.0)
            optimizer.step()

    return step


def _step(method: Method, options: Options) -> Case:
    model, data = _model(options), _dataset(TRAIN // 4 if options.quick else TRAIN, options)
    learner = _learner(method, model, options)
    batch = _batch(data, slice(0, BATCH), options)
    shown: dict[str, Tensor] = {}
    if isinstance(method, methods.SampleValuation | methods.ModalityValuation):
        coalition = torch.full((BATCH,), 3, device=options.device)
        coalition[:COPIES] = 1 + torch.arange(COPIES, device=options.device) % 2
        batch[SHOWN] = members(coalition, 2)
        shown = {"shown": batch[SHOWN].T.contiguous()}
    if isinstance(method, methods.DIMML):
        learner.start_epoch(method.e0, data)
    twin = _Twin(method, learner)
    theirs = {key: value for key, value in batch.items() if key != SHOWN} | shown
    published_step = twin.step()
    step = _own_loop(learner, batch)
    joint = _own_loop(_learner(methods.Joint(), model, options), batch)
    # Counting takes a step; both loops take it, so that they stay side by side.
    passes = _count(learner, step) - BATCH * len(SHAPES)
    published_step(theirs)
    encoders = twin.model.encoders

    steps = [0]

    def ours() -> None:
        step()
        steps[0] += 1

    @torch.no_grad()
    def check(_: Any) -> None:
        with torch.enable_grad():
            for _ in range(steps[0]):
                published_step(theirs)
        steps[0] = 0
        for (name, found), truth in zip(
            learner.model.encoders.named_parameters(), encoders.parameters(), strict=True
        ):
            error = float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-3))
            assert error <= 1e-4, f"{name} is {error:.1e} off the published loop's after as many steps"

    return Case(
        name=f"{method.name}, step{_passes_text(passes, BATCH)}",
        size=BATCH,
        panel="",
        ours=ours,
        peers={
            "joint + passes": _with_passes(joint, copy.deepcopy(model), [batch], max(0, passes)),
            "published": lambda: published_step(theirs),
        },
        check=check,
        work=Work(0),
        direction="both",
    )


class _Twin:
    """A copy of a learner's model and heads for the published loop."""

    def __init__(self, method: Method, learner: Learner) -> None:
        self.method = method
        self.copied = copy.deepcopy(learner)
        self.model = self.copied.model

    def step(self) -> Step:
        """Return the published loop's step."""
        method, copied = self.method, self.copied
        own_heads: Any = getattr(copied, "own_heads", ())
        shared_head: Any = getattr(copied, "shared_head", None)
        if isinstance(method, methods.MLA):
            return published.mla(self.model, shared_head, method.alpha)
        if isinstance(method, methods.DIMML):
            effective: Any = copied.effective
            return published.di_mml(self.model, own_heads, shared_head, effective, method.temperature)
        if isinstance(method, methods.Unimodal | methods.Ensemble | methods.FrozenUnimodal):
            return published.unimodal(self.model, own_heads)
        return published.joint(self.model, own_heads)


def _count(learner: Learner, call: Callable[[], Any]) -> int:
    """Return how many samples go through an encoder in a call."""
    count = [0]

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        count[0] += len(inputs[0])

    handles = [encoder.register_forward_pre_hook(hook) for encoder in learner.model.encoders.values()]
    call()
    for handle in handles:
        handle.remove()
    return count[0]


def _passes_text(samples: int, batch: int) -> str:
    return f" + {samples / (batch * len(SHAPES)):.2g} passes" if samples > 0 else ""


def _with_passes(
    joint: Callable[[], None], model: MultimodalModel, batches: list[dict[str, Tensor]], samples: int
) -> Callable[[], None]:
    """Return joint training's step followed by forward passes of so many samples, without gradients."""
    model.eval()

    def call() -> None:
        joint()
        left = samples // len(SHAPES)
        with torch.no_grad():
            while left > 0:
                for batch in batches:
                    part = {key: value[:left] for key, value in batch.items()}
                    if left > 0:
                        model.encode(part)
                    left -= len(batch["label"])

    return call


def _between(
    method: Method,
    make: Callable[..., tuple[Callable[[], Any], Callable[[Any], None]]],
    options: Options,
) -> Case:
    size = TRAIN // 4 if options.quick else TRAIN
    data, val = _dataset(size, options), _dataset(size // 2, options)
    learner = _learner(method, _model(options), options)
    batches = [
        [_batch(part, slice(i, i + 256), options) for i in range(0, len(part), 256)] for part in (data, val)
    ]
    twin = copy.deepcopy(learner.model)
    theirs, check = make(learner, twin, batches, data)
    epoch = getattr(method, "e0", 10)

    def ours() -> Any:
        if isinstance(method, methods.DIMML):
            return learner.start_epoch(epoch, data)
        return learner.end_epoch(epoch, data, val)

    samples = _count(learner, ours)
    return Case(
        name=f"{method.name}, between epochs: {samples / (size * len(SHAPES)):.2g} passes",
        size=size,
        panel="",
        ours=ours,
        peers={
            "joint + passes": _with_passes(lambda: None, copy.deepcopy(twin), batches[0], samples),
            "published": theirs,
        },
        check=check,
        work=Work(0),
    )


def _sample_valuation(learner: Any, twin: MultimodalModel, batches: Any, data: Any) -> Any:
    def theirs() -> list[tuple[int, int]]:
        return published.copies(published.valuation(twin, batches[0]))

    def check(_: Any) -> None:
        found = Counter({(i, m): int(learner.copies[i, m]) for i, m in learner.copies.nonzero().tolist()})
        truth = Counter(theirs())
        # Rounding may turn the prediction for a sample between two classes.
        different = ((found - truth) + (truth - found)).total()
        assert different <= 0.01 * truth.total(), f"{different} copies differ from the published loop's"

    return theirs, check


def _modality_valuation(learner: Any, twin: MultimodalModel, batches: Any, data: Any) -> Any:
    draw = learner.generator(10)
    subset = torch.randint(len(data), (int(learner.method.fraction * len(data)),), generator=draw)
    drawn = [{key: value.to(learner.device) for key, value in data[subset].items()}]

    def theirs() -> list[float]:
        values = published.valuation(twin, drawn)
        return [sum(row[m] for row in values) / len(values) for m in range(len(SHAPES))]

    def check(figures: dict[str, float]) -> None:
        for name, phi in zip(SHAPES, theirs(), strict=True):
            assert abs(figures[f"phi_{name}"] - phi) <= 1e-6, f"phi of {name} is not the published loop's"

    return theirs, check


def _effective_dimensions(learner: Any, twin: MultimodalModel, batches: Any, data: Any) -> Any:
    def theirs() -> Tensor:
        return published.effective_dimensions(twin, batches[0])

    def check(_: Any) -> None:
        # Means in another order may move a sample across a midpoint.
        different = int((learner.effective != theirs()).sum())
        assert different <= 0.02 * learner.effective.numel(), f"{different} effective dimensions differ"

    return theirs, check


def _diagnosis(learner: Any, twin: MultimodalModel, batches: Any, data: Any) -> Any:
    lam, num_init, theta_0 = learner.method.lam, learner.method.num_init, dict(learner.theta_0)

    def theirs() -> list[float]:
        return published.diagnose(twin, theta_0, batches, lam, num_init)

    def check(figures: dict[str, float]) -> None:
        # Clusters depend on random starts, so purities agree only roughly.
        for name, gap in zip(SHAPES, theirs(), strict=True):
            assert abs(figures[f"gap_{name}"] - gap) <= 0.1, f"the gap of {name} is not the published loop's"

    return theirs, check
