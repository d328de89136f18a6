"""The runs of a trial: trained with a setting, scored on validation data alone."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mmfast.experiments.run_setup import RunSetup
from mmfast.experiments.trials import Asked, Search, Trial
from mmfast.files import plain
from mmfast.methods import Method, Stage
from mmfast.ranges import ranges_of
from mmfast.training.divergence import DivergedError
from mmfast.training.evaluation import evaluate
from mmfast.training.optimization import Optimization
from mmfast.training.stopping import Stop, Stopped


def drawn_names(method: Method, fixed: Collection[str] = ()) -> list[str]:
    """Return the names of what is drawn for a method: of Optimization first, then of its own."""
    names = [*ranges_of(Optimization), *ranges_of(method)]
    return [name for name in names if name not in fixed]


def with_settings(
    method: Method, optimization: Optimization, settings: Mapping[str, Any]
) -> tuple[Method, Optimization]:
    """Return a method and settings with some set, by name of either's field."""
    own = {name: value for name, value in settings.items() if name in ranges_of(method)}
    others = {name: value for name, value in settings.items() if name not in own}
    return replace(method, **own), replace(optimization, **others)


class _Pruned(Exception):
    """The trial is ended by the median rule."""


class TrialRuns:
    """Makes the trials of one method: trains them, and scores them on validation data.

    Args:
        setup: data, model and settings, on one device.
        method: as it is given.
        seeds: of a trial's runs.
        fixed: names of what is not drawn.
        on_epoch: called with every epoch's entry of the history.

    Attributes:
        select: the figure that scores, such as "val/accuracy".
        sign: 1.0 where the highest score is the best, -1.0 where the lowest.
        search: which draws the trials.
    """

    def __init__(
        self,
        setup: RunSetup,
        method: Method,
        seeds: Sequence[int],
        fixed: Collection[str],
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.setup, self.method, self.seeds, self.on_epoch = setup, method, list(seeds), on_epoch
        measures = setup.trainer(method, 0, None, loggers=()).measures
        self.select, self.sign = f"val/{measures.selected}", measures.sign
        stages = self._stages(method, setup.optimization)
        self._num_epochs = sum(stage.epochs for stage in stages)
        befores = itertools.accumulate((stage.epochs for stage in stages), initial=0)
        self._before = {stage.name: before for stage, before in zip(stages, befores, strict=False)}
        declared = ranges_of(Optimization) | ranges_of(method)
        names = drawn_names(method, fixed)
        space = {name: declared[name].within(setup.optimization.max_epochs) for name in names}
        of_all = asdict(setup.optimization) | asdict(method)
        self.search = Search(space, {name: of_all[name] for name in names}, self.sign, self._num_epochs)

    def facts(self) -> dict[str, Any]:
        """Return what trials depend on, as plain values."""
        return plain(
            {
                "data": self.setup.fingerprint,
                "configuration": self.setup.configuration,
                "method": self.method.config(),
                "drawn": {name: repr(of) for name, of in self.search.space.items()},
                "seeds": self.seeds,
            }
        )

    def make(self, asked: Asked, stop: Stop) -> Trial:
        """Train with a setting, score it, and return what has become of it."""
        begun, scores = time.perf_counter(), list[float]()
        method, optimization = with_settings(self.method, self.setup.optimization, asked.settings)
        setup, ended = self.setup.with_settings(optimization=optimization), dict[str, Any]()
        try:
            for seed in self.seeds:
                scores.append(self._score(setup, method, seed, scores, asked, stop))
        except _Pruned:
            ended["pruned"] = asked.steps[-1][0]
        except DivergedError as error:
            ended["diverged"] = str(error)
        return asked.ended(scores, seconds=time.perf_counter() - begun, **ended)

    def _score(
        self, setup: RunSetup, method: Method, seed: int, scores: Sequence[float], asked: Asked, stop: Stop
    ) -> float:
        """Train with a seed and return the score of the weights that are selected."""
        best: dict[str, float] = {}
        stages = self._stages(method, setup.optimization)
        first = {stage.name: stage.first_selectable for stage in stages}

        def note(entry: dict[str, Any]) -> None:
            if self.on_epoch is not None:
                self.on_epoch(entry)
            if stop.asked:
                raise Stopped("stopped by SIGTERM: the trial that was under way begins anew")
            stage, epoch = entry["stage"], entry["epoch"]
            if epoch < first[stage]:
                return
            score = trainer.measures.score(entry["val"])[0]
            best[stage] = max(best.get(stage, score), score)
            step = len(scores) * self._num_epochs + self._before[stage] + epoch + 1
            if asked.note(step, statistics.fmean([*scores, self.sign * best[stage]])):
                raise _Pruned

        trainer = setup.trainer(method, seed, None, on_epoch=note, loggers=())
        model = setup.model(seed)
        trainer.launch()
        parts = setup.parts_on(trainer.fabric.device, ("train", "val"))
        learner = trainer.fit(model, parts["train"], parts["val"])
        found = evaluate(learner, parts["val"], trainer.fabric, measures=trainer.measures)
        return self.sign * trainer.measures.score(found.as_dict())[0]

    def _stages(self, method: Method, optimization: Optimization) -> list[Stage]:
        return method.bind(self.setup.model(0)).stages(optimization.max_epochs)
