"""What a LightningModule does for a method, under the name of either package that Lightning comes by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from mmfast.data.reader import Reader
from mmfast.integrations._course import Course
from mmfast.integrations._epoch import EpochBatches
from mmfast.integrations._figures import flat
from mmfast.integrations._options import bound, taken
from mmfast.methods.base import Method
from mmfast.models import MultimodalModel
from mmfast.objectives import Loss, Objective
from mmfast.training.groups import parameter_groups
from mmfast.training.metrics import AnyMetrics, Measures
from mmfast.training.optimization import Optimization
from mmfast.training.schedule import Schedule
from mmfast.training.state import random_state, set_random_state

# Fields of Optimization that it takes.
TAKEN = (
    "max_epochs",
    "batch_size",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "lr_step",
    "lr_gamma",
    "schedule",
    "warmup_epochs",
    "warmup_steps",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "no_decay_norms_and_biases",
    "lr_scale",
)
_INSTEAD = "use Lightning's EarlyStopping, and requires_grad_(False) for what is to stay as it is"
# Under which a checkpoint holds the course.
_KEY = "mmfast"
# Its own attributes are those of a LightningModule, of which package is known below it alone.
_Base: Any = object


class MethodHooks(_Base):
    """Train a model by a method in Lightning's loop: the hooks of a LightningModule.

        module = MethodModule(mmfast.methods.DIMML(), model, train, val, max_epochs=50, lr=1e-3)
        trainer = lightning.Trainer(max_epochs=module.num_epochs, reload_dataloaders_every_n_epochs=1)
        trainer.fit(module)  # no data loaders: the method decides what an epoch trains on
        module.evaluate(test)

    Stages, resampled epochs, several steps a batch, edited gradients and what a method does between epochs
    are those of `mmfast.Trainer`: of the same seed the weights are the same. Optimization is manual, and each
    stage has an optimizer and a schedule of its own. After each epoch `val` is measured and the module keeps
    the best weights of the stage, part by part where the method selects so, and puts them back at its end:
    the last checkpoint of a fit holds the selected weights. ModelCheckpoint is there to resume from
    (`trainer.fit(module, ckpt_path=...)`, also from within an epoch), with `monitor` to keep others besides.

    Logged after each epoch: `loss`, `val/accuracy`, `val/macro_f1`, `val/<modality>_accuracy`,
    `val/<modality>_contribution`, and what the method reports under `method/`.

    Clipping and accumulation of gradients by arguments of lightning.Trainer are for automatic optimization,
    and Lightning refuses them: clip by `gradient_clip_val` of the module. EarlyStopping ends the run, not the
    stage: the best weights of its stage are kept, later stages are left out, and a warning says so. For
    several processes take `strategy="ddp_find_unused_parameters_true"`. `trainer.predict` gives the logits of
    the batches of a loader; figures are those of `evaluate`, which all processes call, as `trainer.validate`
    and `trainer.test` have no steps here.

    Args:
        method: a method of `mmfast.methods`, or its name.
        model: what to train, in place.
        train, val: data sets as `mmfast.Trainer.fit` takes them.
        task, loss, class_weights, label_smoothing, metrics, select, select_mode: as `mmfast.Trainer` takes
            them.
        optimization: `max_epochs` (of the first stage), `batch_size` (over all processes), optimizer,
            schedule, warm-up, clipping and parameter groups; `accumulate_grad_batches`, `patience`, `freeze`
            and `ema_decay` are refused.
        seed: fixes heads that methods add, order of samples, dropout and the methods' draws.
        num_workers, collate_fn, eval_batch_size, pin_memory, prefetch: as `mmfast.Trainer` takes them.
        settings: fields of `optimization` to set on top of it.

    Attributes:
        learner: the model with what the method adds to it.
        history: one dict an epoch, as that of `mmfast.Trainer`, without seconds.
        num_epochs: of all stages.

    Raises:
        TypeError: the method is a class or no method at all.
        ValueError: an unknown method or setting, data that do not fit the model, or a setting that is
            Lightning's own.
    """

    _lightning: ClassVar[Any]  # the package

    def __init__(
        self,
        method: Method | str,
        model: MultimodalModel,
        train: Any,
        val: Any | None = None,
        *,
        task: str = "multiclass",
        loss: Loss | None = None,
        class_weights: Sequence[float] | Tensor | str | None = None,  # [C]
        label_smoothing: float = 0.0,
        metrics: Mapping[str, Metric] | None = None,
        select: str | None = None,
        select_mode: str | None = None,
        optimization: Optimization | None = None,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        eval_batch_size: int = 256,
        pin_memory: bool | str = "auto",
        prefetch: int = 2,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimization = taken("MethodModule", optimization, settings, TAKEN, _INSTEAD)
        reader = Reader(num_workers, collate_fn, eval_batch_size, pin_memory, prefetch)
        objective = Objective(task, loss=loss, class_weights=class_weights, label_smoothing=label_smoothing)
        measures = Measures(objective, metrics, select, select_mode)
        self.learner = bound(
            method,
            model,
            train,
            val,
            reader=reader,
            seed=seed,
            objective=objective,
            measures=measures,
        )
        self._course = Course(self.learner, train, val, measures=measures, settings=self.optimization)
        self._schedule: Schedule | None = None
        self._loaded: dict[str, Any] | None = None
        self._draws: dict[str, Any] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._course.history

    @property
    def num_epochs(self) -> int:
        return self._course.num_epochs

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:  # [N, C]
        """Return the logits the method predicts with."""
        return self.learner.predict(batch)

    def predict_step(
        self, batch: Mapping[str, Tensor], batch_idx: int = 0, dataloader_idx: int = 0
    ) -> Tensor:  # [N, C]
        return self(batch)

    def evaluate(self, dataset: Any) -> AnyMetrics:
        """Return the task's figures on a data set, every modality alone, and its Shapley contribution."""
        return self._course.evaluate(dataset)

    # What Lightning calls

    def setup(self, stage: str) -> None:
        """Check the trainer, and enter the first stage."""
        if stage != "fit":
            return
        self._check_trainer()
        precision = self.trainer.precision_plugin
        self._draws = random_state(self.trainer.strategy.root_device)
        self._course.precision = str(precision.precision)
        self._course.begin()
        self.learner.autocast = precision.forward_context

    def _check_trainer(self) -> None:
        trainer, course = self.trainer, self._course
        if trainer.max_epochs != course.num_epochs and not trainer.fast_dev_run:
            raise ValueError(
                f"max_epochs of lightning.Trainer must be {course.stages_text()}, the epochs of all stages "
                f"of {course.learner.method.name}, got {trainer.max_epochs}"
            )
        if trainer.reload_dataloaders_every_n_epochs != 1 and course.num_epochs > 1:
            raise ValueError(
                "reload_dataloaders_every_n_epochs of lightning.Trainer must be 1, as a method decides anew "
                f"what each epoch trains on, got {trainer.reload_dataloaders_every_n_epochs}"
            )
        self._check_strategy(trainer.strategy)
        if course.settings.batch_size < trainer.world_size:
            raise ValueError(
                f"batch_size must be at least the number of devices = {trainer.world_size}, "
                f"got {course.settings.batch_size}"
            )

    def _check_strategy(self, strategy: Any) -> None:
        strategies, name = self._lightning.strategies, type(strategy).__name__
        if isinstance(strategy, strategies.DDPStrategy):
            if not strategy._ddp_kwargs.get("find_unused_parameters", False):
                raise ValueError(
                    "strategy of lightning.Trainer must be 'ddp_find_unused_parameters_true', as a method's "
                    f"step may leave parts of the learner out, got {name} without find_unused_parameters"
                )
            if strategy._start_method != "popen":
                raise ValueError(
                    "strategy of lightning.Trainer must start processes of their own, as "
                    f"'ddp_find_unused_parameters_true' does, got {name} with {strategy._start_method!r}, "
                    "from which nothing but weights would come back"
                )
        elif not isinstance(strategy, strategies.SingleDeviceStrategy):
            raise ValueError(
                "strategy of lightning.Trainer must be 'auto' on one device, or "
                f"'ddp_find_unused_parameters_true', as methods look into whole parameters, got {name}"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the current stage, whose rates the module's own schedule moves."""
        settings, stage = self.optimization, self._course.stage
        parameters = parameter_groups(self.learner, settings)
        optimizer = settings.make_optimizer(parameters, precision=self._course.precision)
        self._schedule = Schedule(settings, optimizer, stage.epochs)
        if self._loaded is not None:
            self._schedule.load_state_dict(self._loaded)
            self._loaded = None
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients, whose scaling for float16 is undone by then."""
        settings = self.optimization
        if settings.gradient_clip_val is not None:
            kind = settings.gradient_clip_algorithm
            self.clip_gradients(optimizer, settings.gradient_clip_val, kind)

    def configure_callbacks(self) -> Any:
        """Return what gives back what a fit has frozen and seeded, however it fails."""

        def on_exception(callback: Any, trainer: Any, module: Any, exception: BaseException) -> None:
            if self._draws is not None:
                self._course.abandon()
                self._release()

        return [type("Release", (self._lightning.Callback,), {"on_exception": on_exception})()]

    def train_dataloader(self) -> EpochBatches | list[Any]:
        """Return the batches of the next epoch, or of the rest of one; none where all is done."""
        course = self._course
        done = self.trainer.fit_loop.epoch_progress.current.processed
        if course.is_finished or done != course.epochs_done:
            raise RuntimeError(
                f"the module has been trained for {course.epochs_done} epochs, and the trainer begins after "
                f"{done}: make a new module, and to go on give its checkpoint as ckpt_path"
            )
        if not course.is_over and (batches := course.batches()).done == len(batches):
            # A checkpoint of the last batch's end, after which Lightning takes the epoch for done.
            self._end_epoch()
        return [] if course.is_over else course.batches()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take the steps of a batch."""
        course, batches, optimizer = self._course, self._course.batches(), self.optimizers()
        if self.trainer.train_dataloader is not batches:
            raise ValueError(
                "trainer.fit must be given the module alone, as its method decides what an epoch trains on, "
                "got data loaders, too"
            )
        schedule = self._schedule
        assert schedule is not None
        for step in course.steps:
            optimizer.zero_grad()
            loss = course.loss(self.learner, batch, step)
            # Lightning runs all of a training step in its precision; gradients are made in their own.
            with torch.autocast(self.device.type, enabled=False):
                self.manual_backward(loss * batches.scale)
                self.learner.edit_gradients(step, batches.progress)
                optimizer.step()
                schedule.end_step()
        batches.done += 1

    def on_train_epoch_end(self) -> None:
        """Validate, select, and enter the next stage where one is over."""
        entry = self._end_epoch()
        # The same in all processes, of which Lightning wants to be sure.
        together = self.trainer.world_size > 1
        self.log("loss", entry["loss"], prog_bar=True, sync_dist=together)
        found = flat(entry.get("val", {}), "val") | flat(entry["method"], "method")
        self.log_dict(found, sync_dist=together)

    def _end_epoch(self) -> dict[str, Any]:
        course, strategy = self._course, self.trainer.strategy
        assert self._schedule is not None
        self._schedule.end_epoch()
        entry = course.end_epoch(self.optimizers(use_pl_optimizer=False))
        if course.epoch == 0:
            if isinstance(strategy, self._lightning.strategies.DDPStrategy):
                # What trains has changed, and only that is reduced.
                strategy.model = self
                strategy.configure_ddp()
            strategy.setup_optimizers(self.trainer)
        return entry

    def on_train_end(self) -> None:
        """Keep the best weights, and let all train again."""
        self._course.finish()
        self._release()

    def on_fit_end(self) -> None:
        """Do the same where there was nothing to train, as from the last checkpoint."""
        if not self._course.is_finished:
            self.on_train_end()

    def _release(self) -> None:
        """Give what was changed outside the learner back."""
        self.learner.autocast = contextlib.nullcontext
        if self._draws is not None:
            set_random_state(self._draws, self.trainer.strategy.root_device)
            self._draws = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        schedule = None if self._schedule is None else self._schedule.state_dict()
        checkpoint[_KEY] = self._course.state() | {"schedule": schedule}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _KEY not in checkpoint:
            raise ValueError("ckpt_path must be a checkpoint of a MethodModule, got one of another module")
        self._course.load_state(checkpoint[_KEY])
        self._loaded = checkpoint[_KEY]["schedule"]
