"""Train a model by a method; Lightning Fabric gives devices, precision, data parallelism and loggers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torchmetrics import Metric

import mmfast
from mmfast import methods
from mmfast.data.reader import Reader
from mmfast.data.seeds import kept_draws
from mmfast.distributed import check_agreement, max_over_processes
from mmfast.errors import check_one_of
from mmfast.methods.base import Learner, Method
from mmfast.methods.presets import PUBLISHED
from mmfast.models import MultimodalModel
from mmfast.objectives import Loss, Objective
from mmfast.training import checkpoint, launchers, strategies
from mmfast.training.callbacks import Callbacks
from mmfast.training.checks import check_data, check_fits, check_settings, objective_for
from mmfast.training.divergence import check_weights
from mmfast.training.evaluation import evaluate
from mmfast.training.execution import CompiledSteps, deterministic
from mmfast.training.groups import modules_named
from mmfast.training.loop import TrainingLoop
from mmfast.training.metrics import AnyMetrics, Measures
from mmfast.training.optimization import Optimization, with_settings
from mmfast.training.reporting import LOGGERS, epoch_bar, finalizing, flat, make_logger
from mmfast.training.run_folder import LAST, MODEL, alone_in, as_lists, check_same
from mmfast.training.state import data_facts, found_weights, load_trained, note_data, weights_of
from mmfast.training.stopping import Stop, Stopped, listening
from mmfast.training.text import trainer_text
from mmfast.training.writing import Writer


class Trainer:
    """Train a model by a method, select on validation data, test once.

        trainer = mmfast.Trainer(mmfast.methods.DIMML(temperature=10.0), max_epochs=50)
        trainer.fit(model, train, val)
        trainer.test(model, test)

    The same seed gives the same result, bit for bit on the CPU, also after an interruption.

    Args:
        method: a method of `mmfast.methods`, or its name.
        task: "multiclass": one of C classes, labels [N] or probabilities [N, C]; "multilabel": any of C
            labels, 0 and 1 [N, C]; "regression": K numbers, [N] or [N, K], which the model gives as its C
            outputs. Methods whose mathematics needs classes refuse the others.
        loss: a callable of outputs [N, C] in float32 and labels that returns [N], wherever the method has
            the cross-entropy (of several labels the binary one, of numbers the squared error).
        class_weights: "balanced" or [C] numbers, by which the cross-entropy counts the samples of a class.
        label_smoothing: of the cross-entropy.
        metrics: name -> torchmetrics object, measured beside the task's own figures on validation and test
            data: probabilities and labels go in, one number comes out. See `mmfast.training.metrics`.
        select: what model selection looks at: "val/accuracy", "val/loss", "val/<name of a metric>"; None: the
            accuracy, of several labels "val/micro_f1", of numbers "val/r2". Methods that select the parts of
            modalities apart look at the figure of each modality alone.
        select_mode: "max" or "min"; None: as the figure is known to be.
        optimization: settings of optimizer, schedule, batch and epochs.
        seed: fixes heads that methods add, order of samples, dropout and the methods' draws.
        accelerator, devices, precision: as Lightning Fabric takes them. Where torchrun or srun has started
            several processes, one device, the default, means all of theirs.
        num_nodes: machines that train together, of as many devices each. On every one the same program is
            started: by torchrun or srun, whose number of nodes 1, the default, stands for; or by itself, with
            MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment. Checkpoints are written on the first,
            and read on all: `out_dir` must be a folder they share.
        strategy: "auto", "ddp" or a DDPStrategy of Fabric's; parameters are whole in every process.
        out_dir: folder of checkpoints and logs; None writes nothing.
        loggers: "csv" and "tensorboard" (both write under `out_dir`), or Fabric loggers.
        metadata: plain values kept in the checkpoints, for whoever rebuilds the model from them. A run is
            resumed with the same ones, save for "source" and "skip_unreadable", how its data were read.
        progress: show a bar.
        on_epoch: called with every entry of `history`.
        callbacks: objects with some of the methods of `mmfast.training.callbacks.Callback`, called in every
            process.
        compile: let torch.compile make the training steps of encoders and head; weights keep their names, and
            nothing but training steps runs compiled.
        deterministic: let a fit run torch's deterministic algorithms alone, an error where there is none.
        num_workers: processes that read samples, for every pass over a data set; they stay for the whole fit.
            0 reads in this process; data in memory (`ArrayDataset`) always are. Their number changes no
            result: generators of torch, numpy and random are seeded for each batch, wherever it is read.
        collate_fn: from a list of samples to a batch, such as `mmfast.data.pad`; None stacks them. A data set
            that gives batches by itself, such as `ArrayDataset`, has no use for it.
        eval_batch_size: samples of a batch where nothing is trained.
        pin_memory: whether batches lie in pinned memory before they are copied to a GPU; "auto": if there is
            one.
        prefetch: batches that each of `num_workers` reads ahead.
        settings: fields of Optimization, such as `max_epochs` and `lr`, to set on top of `optimization`.

    Attributes:
        learner: the trained model with what the method added to it; set by `fit` and `restore`.
        history: one dict an epoch: stage, epoch, loss, seconds (validation not counted), validation figures
            under "val", and what the method reports.
        should_stop: set to True while `fit` runs, in any process, it ends the stage after the epoch that is
            under way; the best weights are kept, and further stages follow.

    Raises:
        TypeError: the method is a class, not an instance, or `strategy` neither a name nor a strategy.
        ValueError: unknown method or setting; `devices` or `num_nodes` other than a launcher has started
            processes for; several nodes where nothing tells this one of the others; or a strategy that splits
            parameters over processes.
    """

    def __init__(
        self,
        method: Method | str,
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
        accelerator: str = "auto",
        devices: int | str | list[int] = 1,
        num_nodes: int = 1,
        strategy: Any = "auto",
        precision: Any = "32-true",
        out_dir: str | Path | None = None,
        loggers: Sequence[Any] = (),
        metadata: dict[str, Any] | None = None,
        progress: bool = False,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        callbacks: Sequence[Any] = (),
        compile: bool = False,
        deterministic: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        eval_batch_size: int = 256,
        pin_memory: bool | str = "auto",
        prefetch: int = 2,
        **settings: Any,
    ) -> None:
        # First, while nothing else has a name here.
        self._given = {name: value for name, value in locals().items() if name != "self"}
        self.method = methods.chosen(method)
        self.objective = Objective(
            task, loss=loss, class_weights=class_weights, label_smoothing=label_smoothing
        )
        self.method.check_task(self.objective.task)
        self.measures = Measures(self.objective, metrics, select, select_mode)
        self.optimization = with_settings("Trainer", optimization, settings)
        self.seed = seed
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.metadata = metadata or {}
        self.progress = progress
        self.on_epoch = on_epoch
        self._told = Callbacks(callbacks, self)
        self.callbacks = self._told.callbacks
        self.compile = compile
        self.deterministic = deterministic
        self.should_stop = False
        if isinstance(eval_batch_size, int) and eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be an integer of at least 1, got {eval_batch_size}")
        self.reader = Reader(num_workers, collate_fn, eval_batch_size, pin_memory, prefetch)
        self.learner: Learner | None = None
        self.history: list[dict[str, Any]] = []
        devices, num_nodes = launchers.fit(devices, num_nodes)
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategies.fitting(strategy, devices, num_nodes),
            precision=precision,
            loggers=[self._logger(kind) for kind in loggers],
        )

    def __repr__(self) -> str:
        return trainer_text(self, self._given, inspect.signature(Trainer.__init__).parameters)

    @classmethod
    def published(cls, preset: str, **options: Any) -> Trainer:
        """Return a trainer with a paper's settings; `preset`: a key of `mmfast.methods.presets.PUBLISHED`."""
        check_one_of("preset", preset, PUBLISHED)
        method, settings = PUBLISHED[preset]
        return cls(method, optimization=Optimization(**settings), **options)

    def launch(self) -> None:
        """Start the other processes, where there are several and no launcher has; `fit` does it otherwise."""
        launchers.launch(self.fabric)

    def fit(
        self, model: MultimodalModel, train: Any, val: Any | None = None, *, resume: bool = False
    ) -> Learner:
        """Train `model` in place, keep the weights that do best on `val`, and return the learner.

        Args:
            model: what to train.
            train: data set of {<modality>: [...], "label": int} samples.
            val: data set that model selection, and some methods, use; without it the last epoch is kept.
            resume: go on from `out_dir`/last.ckpt if it is there.

        Raises:
            BlockingIOError: another process trains in `out_dir`.
            ValueError: the data do not fit the model, a class is absent from `train`, the method needs a
                validation split, encoders differ in D where they must not, or the checkpoint is of another
                run.
            DivergedError: a loss or a validation sample's logits are NaN or infinite; the error names the
                epoch, the batch, and the samples whose input is to blame or a likely cause.
            OSError: a checkpoint could not be written; the one before is there still.
            Stopped: this process, or another of the run, got SIGTERM. In `out_dir` lies a checkpoint of the
                end of the batch that was under way, or of the epoch if it came after the last batch, and
                `resume` goes on from it to the same weights. Where `fit` is called from the program's main
                thread, with an `out_dir`; a handler of the program's own is called, too, and there again
                afterwards. See `mmfast.training.stopping`.

        A thread writes large checkpoints, from copies on the CPU. However a fit ends, what training froze is
        free again and no gradient is left on the model; where it does not finish, its modules are in the
        modes they were in, and it keeps the weights it had by then.
        """
        objective = self._objective_of(model, train, val)
        self.launch()
        if self.optimization.batch_size < self.fabric.world_size:
            raise ValueError(
                f"batch_size must be at least the number of devices = {self.fabric.world_size}, "
                f"got {self.optimization.batch_size}"
            )
        self._told.check()
        self.should_stop = False
        with torch.random.fork_rng(), kept_draws(), self.reader.staying(), self._algorithms():
            torch.manual_seed(self.seed)
            learner = self.method.bind(model, seed=self.seed, objective=objective)
            learner.reader, learner.autocast = self.reader, self.fabric.autocast
            note_data(learner, train)
            try:
                check_settings(learner, self.optimization, len(train), has_val=val is not None)
                learner.held = modules_named(model, self.optimization.freeze)
                check_weights(learner)
                learner.to(self.fabric.device)
                objective.to(self.fabric.device)
                check_fits(learner, train)
                with self._told.around(learner):
                    is_told_to_stop = self._train(learner, train, val, resume)
                    learner.held = ()
                    learner.unfreeze()
                    learner.zero_grad(set_to_none=True)
                    learner.eval()
                    self.learner = learner
            except BaseException:
                # Ctrl-C, too: the next fit would take what this one froze for the user's wish.
                learner.abandon()
                raise
            finally:
                # A learner is copied and sent about without its trainer's devices.
                learner.held, learner.autocast = (), contextlib.nullcontext
        # Data that come later may have samples without label.
        objective.may_ignore = True
        if is_told_to_stop:
            raise Stopped("stopped by SIGTERM when the fit was finished", rank=self.fabric.global_rank)
        return learner

    def check(
        self, model: MultimodalModel, train: Any, val: Any | None = None, test: Any | None = None
    ) -> None:
        """Raise what `fit` and `test` would have against model and data before any training."""
        objective = self._objective_of(model, train, val)
        if test is not None:
            self._check_test(model, test)
        learner = self.method.bind(model, seed=self.seed, objective=objective)
        learner.reader = self.reader
        check_settings(learner, self.optimization, len(train), has_val=val is not None)
        modules_named(model, self.optimization.freeze)
        check_weights(learner)
        check_fits(learner, train)

    def _objective_of(self, model: MultimodalModel, train: Any, val: Any | None) -> Objective:
        """Return the objective with what it takes from the data, which are checked."""
        return objective_for(
            self.method,
            model,
            train,
            val,
            objective=self.objective,
            measures=self.measures,
            collate_fn=self.reader.collate_fn,
        )

    def _algorithms(self) -> contextlib.AbstractContextManager[None]:
        return deterministic() if self.deterministic else contextlib.nullcontext()

    def _train(self, learner: Learner, train: Any, val: Any | None, resume: bool) -> bool:
        """Make the run and its checkpoints; return whether the process was told to stop too late for that."""
        folder = self._folder
        alone = contextlib.nullcontext() if folder is None else alone_in(folder)
        with listening(wanted=self.out_dir is not None) as stop, alone:
            stop.agree(self.fabric.device)
            try:
                self._run(learner, train, val, self._resumed() if resume else None, stop)
            except Stopped:
                # None ends before the first has written the checkpoint.
                self.fabric.barrier()
                raise
            if folder is not None:
                found = {"learner": weights_of(learner), "data": data_facts(learner)}
                checkpoint.save(folder / MODEL, self._description() | found)
            return stop.due(now=True)

    def _run(
        self, learner: Learner, train: Any, val: Any | None, state: dict[str, Any] | None, stop: Stop
    ) -> None:
        """Train from the beginning, or from where a run stands."""
        self.history = state["history"] if state else []
        check_agreement("epochs done", len(self.history), "out_dir must be a folder that all nodes share")
        path = None if self._folder is None else self._folder / LAST
        num_epochs = sum(stage.epochs for stage in learner.stages(self.optimization.max_epochs))
        bar = epoch_bar(self.method.title, num_epochs, wanted=self.progress and self.fabric.is_global_zero)
        with finalizing(self.fabric.loggers), bar as advance, Writer(path) as writer:

            def record(entry: dict[str, Any]) -> bool:
                self._told.tell("on_epoch_end", learner, entry)
                self._record(entry)
                advance(1)
                return self._asked_to_stop()

            def note_step(entry: dict[str, Any]) -> None:
                self._told.tell("on_step_end", learner, entry)

            advance(len(self.history))
            TrainingLoop(
                learner,
                train,
                val,
                self.fabric,
                self.optimization,
                on_epoch=record,
                on_step=note_step if self._told.has("on_step_end") else None,
                stepping=CompiledSteps(learner.model) if self.compile else contextlib.nullcontext,
                on_state=lambda state: writer.save(state, self._description()),
                stop=stop,
                measures=self.measures,
                history=self.history,
            ).run(state)

    def test(self, model: MultimodalModel, test: Any) -> AnyMetrics:
        """Return the task's figures on `test`, every modality alone, and its Shapley contribution.

        `Metrics` of classes: accuracy and macro-F1; `MultilabelMetrics`, `RegressionMetrics`. Metrics of your
        own are in it by name: `trainer.test(model, test)["auroc"]`.

        Raises:
            ValueError: `model` is not what this trainer has fitted, or the data do not fit it.
        """
        self._check_test(model, test)
        if self.learner is None or self.learner.model is not model:
            raise ValueError(
                "model must be the one this trainer has fitted, got another: call fit or restore first"
            )
        return evaluate(self.learner, test, self.fabric, measures=self.measures)

    def _check_test(self, model: MultimodalModel, test: Any) -> None:
        check_data(model, "test", test, collate_fn=self.reader.collate_fn, task=self.objective.task)

    def restore(self, model: MultimodalModel, path: str | Path | None = None) -> Learner:
        """Load the selected weights of a finished run into `model`; by default from `out_dir`/model.ckpt."""
        state = checkpoint.load(Path(path) if path else self._out("restore") / MODEL)
        check_same(state, self._description(), self.method, "method", "config")
        if (task := state.get("objective", {}).get("task", "multiclass")) != self.objective.task:
            raise ValueError(f"task must be that of the checkpoint, {task!r}, got {self.objective.task!r}")
        learner = self.method.bind(model, seed=self.seed, objective=self._of_finished(model, state))
        learner.reader = self.reader
        load_trained(learner, state, self.optimization.max_epochs)
        learner.to(self.fabric.device)
        self.learner, self.history = learner, state["history"]
        return learner

    def _of_finished(self, model: MultimodalModel, state: dict[str, Any]) -> Objective:
        """Return the objective of a finished run, for which balanced weights are not found anew."""
        given = self.objective
        if isinstance(given.class_weights, str):
            weights = found_weights(state, given.class_weights)
            given = Objective(given.task, class_weights=weights, label_smoothing=given.label_smoothing)
        return given.for_data(None, model.num_classes)

    def _asked_to_stop(self) -> bool:
        """Whether any process wants the stage to end; asked once for each time it is said."""
        mine, self.should_stop = float(self.should_stop), False
        return bool(max_over_processes(torch.tensor(mine, device=self.fabric.device)))

    def _record(self, entry: dict[str, Any]) -> None:
        self.fabric.log_dict(flat(entry), step=len(self.history) - 1)
        if self.on_epoch is not None and self.fabric.is_global_zero:
            self.on_epoch(entry)

    def _description(self) -> dict[str, Any]:
        return {
            "mmfast": mmfast.__version__,
            "method": self.method.name,
            "config": as_lists(self.method.config()),
            "optimization": as_lists(asdict(self.optimization)),
            "objective": self.objective.config() | self.measures.config(),
            "seed": self.seed,
            "metadata": self.metadata,
            "devices": self.fabric.world_size,
            "precision": self.fabric.strategy.precision.precision,
            "history": list(self.history),
        }

    @property
    def _folder(self) -> Path | None:
        """Where this process writes checkpoints; of several processes the first alone does."""
        return self.out_dir if self.fabric.is_global_zero else None

    def _resumed(self) -> dict[str, Any] | None:
        """Return where the run in `out_dir` stands, or None where there is none."""
        path = self._out("resume") / LAST
        if not path.exists():
            return None
        state = checkpoint.load(path)
        check_same(
            state,
            self._description(),
            self.method,
            *("method", "config", "optimization", "objective", "seed", "metadata"),
        )
        return state

    def _out(self, purpose: str) -> Path:
        if self.out_dir is None:
            raise ValueError(f"out_dir must be given to {purpose}, got None")
        return self.out_dir

    def _logger(self, kind: Any) -> Any:
        if not isinstance(kind, str):
            return kind
        if kind not in LOGGERS:
            raise ValueError(f"loggers must be among {', '.join(LOGGERS)}, got {kind!r}")
        return make_logger(kind, self._out(f"log to {kind}"))
