"""`MethodTrainer`: a method in the loop of Hugging Face's `transformers.Trainer`, transformers 5."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.errors import needs_train

with needs_train("mmfast.integrations.transformers", extra="hf"):
    # Trainer asks for accelerate when it is made, in other words.
    import accelerate  # noqa: F401
    import transformers
    from torchmetrics import Metric
    from transformers.trainer_callback import TrainerCallback
    from transformers.trainer_utils import PredictionOutput
    from transformers.utils import WEIGHTS_NAME

    from mmfast.data.batches import evaluating
    from mmfast.data.reader import Reader
    from mmfast.integrations._arguments import check_arguments, epochs_of_first_stage
    from mmfast.integrations._course import Course
    from mmfast.integrations._figures import flat
    from mmfast.integrations._options import bound
    from mmfast.methods.base import Method
    from mmfast.models import MultimodalModel
    from mmfast.objectives import Loss, Objective
    from mmfast.training.checks import check_data
    from mmfast.training.metrics import Measures
    from mmfast.training.optimization import Optimization
    from mmfast.training.state import load_state, random_state, set_random_state

__all__ = ["MethodTrainer"]

# What of a checkpoint holds the course, beside the files of transformers.
_COURSE = "mmfast_course.pt"


class MethodTrainer(transformers.Trainer):
    """Train a model by a method in the loop of `transformers.Trainer`.

        args = transformers.TrainingArguments("out", num_train_epochs=70, learning_rate=1e-3)
        trainer = MethodTrainer("di-mml", model, args, train, val, data_collator=mmfast.data.pad)
        trainer.train()
        trainer.evaluate(test)

    The model's encoders may be those of transformers, in modules that take what the collator gives of their
    modality, such as token ids and a mask. Data sets give {<modality>: ..., "label": int} samples.

    Stages, resampled epochs, several steps a batch, edited gradients and what a method does between epochs
    are those of `mmfast.Trainer`: of the same seed, and an optimizer of the same settings, the weights are
    the same. Each stage has an optimizer and a schedule of its own, made from `args`. A schedule counts
    batches, as many in an epoch as the data set makes: longer epochs, to which a method adds samples, move it
    no further. After each epoch `eval_dataset` is measured, whatever `eval_strategy` says of reporting it,
    and the best weights of a stage are put back at its end: a run's last checkpoint holds the selected
    weights. `train(resume_from_checkpoint=...)` goes on from any of them, also within an epoch.

    `evaluate` gives `eval_accuracy`, `eval_macro_f1`, `eval_loss`, `eval_<modality>_accuracy` and
    `eval_<modality>_contribution`; `predict` gives logits [N, C].

    Args:
        method: a method of `mmfast.methods`, or its name.
        model: what to train, in place.
        args: as transformers takes them. `num_train_epochs` counts the epochs of all stages: the first gets
            what the others leave. `seed` fixes heads that methods add, order of samples, dropout and the
            methods' draws. Settings of optimizer, schedule, clipping and precision are those of transformers;
            what would change what a method does is refused. Several processes, as torchrun starts them, need
            `ddp_find_unused_parameters=True`.
        train_dataset, eval_dataset: data sets as `mmfast.Trainer.fit` takes them.
        data_collator: from a list of samples to a batch, such as `mmfast.data.pad`; None stacks them.
        task, loss, class_weights, label_smoothing, metrics, select, select_mode: as `mmfast.Trainer` takes
            them.
        options: `callbacks`, `processing_class` and `optimizer_cls_and_kwargs` of transformers.Trainer.

    Attributes:
        learner: the model with what the method adds to it.
        history: one dict an epoch, as that of `mmfast.Trainer`, without seconds.

    Raises:
        TypeError: the method is a class or no method at all, or there is no such option.
        ValueError: an unknown method, data that do not fit the model, too few epochs, or an argument that is
            the method's to decide.
    """

    def __init__(
        self,
        method: Method | str,
        model: MultimodalModel,
        args: transformers.TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any | None = None,
        *,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        task: str = "multiclass",
        loss: Loss | None = None,
        class_weights: Sequence[float] | Tensor | str | None = None,  # [C]
        label_smoothing: float = 0.0,
        metrics: Mapping[str, Metric] | None = None,
        select: str | None = None,
        select_mode: str | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(transformers.Trainer, "_run_epoch"):
            raise ImportError(
                "MethodTrainer needs a transformers whose Trainer runs epochs by themselves, such as 5.24, "
                f"got {transformers.__version__}"
            )
        args = args or transformers.TrainingArguments("tmp_trainer")
        check_arguments(args, options)
        reader = Reader(
            args.dataloader_num_workers,
            data_collator,
            args.per_device_eval_batch_size,
            prefetch=args.dataloader_prefetch_factor or 2,
        )
        objective = Objective(task, loss=loss, class_weights=class_weights, label_smoothing=label_smoothing)
        measures = Measures(objective, metrics, select, select_mode)
        self.learner = bound(
            method,
            model,
            train_dataset,
            eval_dataset,
            reader=reader,
            seed=args.seed,
            objective=objective,
            measures=measures,
        )
        settings = Optimization(
            max_epochs=epochs_of_first_stage(self.learner, args.num_train_epochs),
            batch_size=args.per_device_train_batch_size * args.world_size,
            lr=args.learning_rate,
        )
        self._course = Course(self.learner, train_dataset, eval_dataset, measures=measures, settings=settings)
        self._measured: dict[str, Any] | None = None
        super().__init__(
            model=self.learner, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options
        )
        # The first of all: others see what an epoch has come to.
        self.callback_handler.callbacks.insert(0, _EndOfEpoch(self._end_epoch))

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._course.history

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **options: Any) -> Any:
        """Train all stages, from the beginning or from a checkpoint.

        Raises:
            DivergedError: a loss or a validation sample's logits are NaN or infinite.
            RuntimeError: it has trained already, and gets no checkpoint to go on from.
        """
        course, device = self._course, self.args.device
        if course.is_finished and not resume_from_checkpoint:
            raise RuntimeError(
                f"the trainer has trained for {course.epochs_done} epochs: make a new one, or give the "
                "checkpoint to go on from as resume_from_checkpoint"
            )
        draws = random_state(device)
        course.precision = f"{self.accelerator.mixed_precision}-mixed"
        self.learner.autocast = self.accelerator.autocast
        try:
            course.begin()
            found = super().train(resume_from_checkpoint, *others, **options)
        except BaseException:
            course.abandon()
            raise
        finally:
            self.learner.autocast = contextlib.nullcontext
            set_random_state(draws, device)
        course.finish()
        return found

    # An epoch

    def get_train_dataloader(self) -> Any:
        """Return the batches of the next epoch, or of the rest of one that was stopped within."""
        course = self._course
        # Where all is done, transformers asks for their number alone.
        return [{}] * course.plain_batches if course.is_over else course.batches()

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        course, batches = self._course, self._course.batches()
        left = len(batches) - batches.done
        if left == 0:
            # A checkpoint of the last step.
            self._end_epoch()
            return
        epochs_left = course.num_epochs - course.epochs_done - 1
        # What lies ahead is known anew for each epoch; at `max_steps` transformers ends the run.
        self.state.max_steps = self.state.global_step + left + epochs_left * course.plain_batches
        own = {
            "model": self.model_wrapped,
            "train_dataloader": batches,
            "steps_in_epoch": left,
            "num_update_steps_per_epoch": left,
            # The course has its own place and random state.
            "resume_from_checkpoint": None,
        }
        super()._run_epoch(**given | own)
        self._measured = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:  # scalar
        """Take the steps of a batch, whose last move the loop makes; return the sum of their losses."""
        course, batches, losses = self._course, self._course.batches(), []
        for step in course.steps:
            if step > 0:
                if self.args.max_grad_norm > 0:
                    self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                cast(Any, self.optimizer).step()
                model.zero_grad()
            loss = course.loss(model, inputs, step)
            self.accelerator.backward(loss * batches.scale)
            self.learner.edit_gradients(step, batches.progress)
            losses.append(loss.detach())
        batches.done += 1
        return torch.stack(losses).sum()

    def _end_epoch(self) -> None:
        course = self._course
        entry = course.end_epoch(self.optimizer)
        self._measured = entry.get("val")
        if found := flat(entry["method"], "method"):
            self.log(found)
        if course.epoch == 0:
            self._start_stage()

    # A stage

    def _start_stage(self) -> None:
        """Make the optimizer and the schedule of a stage that was entered."""
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = None
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.create_scheduler(0)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))

    def create_scheduler(self, num_training_steps: int, optimizer: Any | None = None) -> Any:
        """Return the schedule of the current stage, which counts its batches."""
        course = self._course
        made = super().create_scheduler(course.stage.epochs * course.plain_batches, optimizer)
        if isinstance(made, torch.optim.lr_scheduler.LambdaLR):
            self.lr_scheduler = cast(Any, _Paced(made, course))
        return self.lr_scheduler

    # Figures

    def evaluate(
        self, eval_dataset: Any | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the figures of a data set, by default of `eval_dataset`, and log them."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self._measured if dataset is self.eval_dataset else None
        if found is None:
            collate, task = self.learner.reader.collate_fn, self.learner.objective.task
            check_data(self.learner.model, "eval_dataset", dataset, collate_fn=collate, task=task)
            found = self._course.figures(dataset)
        metrics = flat(found, metric_key_prefix, "_")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return logits, labels and figures of a data set; without labels the first alone."""
        logits, labels = [], []
        with self.learner.reader.staying():
            for batch in self.learner.batches(test_dataset):
                with evaluating(self.learner):
                    logits.append(self.learner.predict(batch).float().cpu())
                if "label" in batch:
                    labels.append(batch["label"].cpu())
            metrics = self._course.figures(test_dataset) if labels else {}
        return PredictionOutput(
            predictions=torch.cat(logits).numpy(),
            label_ids=torch.cat(labels).numpy() if labels else None,
            metrics=flat(metrics, metric_key_prefix, "_"),
        )

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # All processes tell of theirs.
        state = self._course.state()
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.learner.state_dict(), folder / WEIGHTS_NAME)
        torch.save(state, folder / _COURSE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        for name in (_COURSE, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"resume_from_checkpoint must be a checkpoint of MethodTrainer, got {folder} "
                    f"without {name}"
                )
        self._course.load_state(torch.load(folder / _COURSE, map_location="cpu", weights_only=True))
        load_state(self.learner, torch.load(folder / WEIGHTS_NAME, map_location="cpu", weights_only=True))

    def _init_training_state(self, *given: Any) -> tuple[int, int]:
        super()._init_training_state(*given)
        return self._course.epochs_done, 0


class _EndOfEpoch(TrainerCallback):
    """Does what comes between epochs, before the loop reports, evaluates and saves."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.end = end

    def on_epoch_end(self, *given: Any, **options: Any) -> None:
        self.end()


class _Paced:
    """A schedule of a stage whose epochs may have more batches than it counts: it moves as far in each.

    Args:
        scheduler: counts `course.plain_batches` an epoch.
        course: where the stage stands.
    """

    def __init__(self, scheduler: torch.optim.lr_scheduler.LambdaLR, course: Course) -> None:
        self.scheduler = scheduler
        self.course = course

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def step(self) -> None:
        """Count a batch, which is done."""
        epoch, counted = self.course.batches(), self.course.plain_batches
        before, after = ((epoch.done - back) * counted // len(epoch) for back in (1, 0))
        for _ in range(after - before):
            self.scheduler.step()
