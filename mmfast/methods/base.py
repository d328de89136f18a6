"""What a method is: a dataclass of the paper's symbols, and the learner it makes of a model.

A run goes on in another process from `learner.state_dict()`, the optimizer's state and torch's random state:
after `start_stage` comes `learner.load_state_dict(...)`, then a new optimizer and its state; and in an epoch
that was stopped within, after any batch, `resume_epoch` is called in place of `start_epoch`. To predict, a
learner that was just bound and `load_state_dict` are enough: one of several stages enters that of the state.

The trainer, or a user's own loop, drives a learner through these hooks, in this order:

    learner = mmfast.methods.SampleValuation().bind(model, seed=0)
    for stage in learner.stages(max_epochs):
        learner.start_stage(stage)                       # freezes and unfreezes; make the optimizer after it
        optimizer = torch.optim.SGD(learner.trainable_parameters(), lr=1e-2)
        for epoch in range(stage.epochs):
            batches = DataLoader(learner.start_epoch(epoch, train), 16, shuffle=True)
            for b, batch in enumerate(batches):
                for step in range(learner.steps_per_batch):
                    optimizer.zero_grad()
                    learner(batch, step).backward()
                    learner.edit_gradients(step, progress=b / len(batches))
                    optimizer.step()
            learner.end_epoch(epoch, train, val)
            if learner.optimizer_reset_due():
                optimizer.state.clear()
        learner.note_unimodal_accuracy(accuracy_alone)   # {<modality>: on `val`}, which Unimodal answers by
    learner.unfreeze()
    logits = learner.eval().predict(batch)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmfast.data.batches import presence
from mmfast.data.kept import KeptFeatures
from mmfast.data.reader import Reader
from mmfast.data.seeds import mixed
from mmfast.errors import changed, describe, shown
from mmfast.methods._predicting import PredictingModule
from mmfast.methods._state import ResumableModule, Stage
from mmfast.models import MultimodalModel
from mmfast.models._text import count_text, module_text
from mmfast.objectives import Objective


@dataclass(frozen=True)
class Method:
    """Base of the methods; the fields of a subclass are the symbols of its paper."""

    name: ClassVar[str]  # on the command line
    title: ClassVar[str]  # in tables and plots
    needs_validation: ClassVar[bool] = False
    needs_equal_dims: ClassVar[bool] = False
    is_baseline: ClassVar[bool] = False  # a simple one, which published methods are held against
    needs_classes: ClassVar[str] = ""  # why, where the method's mathematics takes no other task
    learner: ClassVar[type[Learner]]

    def bind(self, model: MultimodalModel, *, seed: int = 0, objective: Objective | None = None) -> Learner:
        """Return the learner that trains `model` by this method.

        Args:
            model: what to train.
            seed: fixes every draw the method makes.
            objective: task and loss; None: classes and cross-entropy.

        Raises:
            ValueError: the method needs encoders of equal dimension D and the model's differ; or it needs
                classes and the task has none.
        """
        objective = objective or Objective()
        self.check_task(objective.task)
        if self.needs_equal_dims and len(set(model.dims)) > 1:
            found = ", ".join(f"{m} {d}" for m, d in zip(model.modalities, model.dims, strict=True))
            raise ValueError(
                f"{self.name} needs features of equal dimension D from all encoders, got {found}"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            learner = self.learner(self, model, seed)
        learner.objective = objective
        return learner

    def check_task(self, task: str) -> None:
        """Raise ValueError, with the reason, where the method needs classes and the task has none."""
        if self.needs_classes and task != "multiclass":
            raise ValueError(f"{self.name} needs task='multiclass', as {self.needs_classes}, got {task!r}")

    @classmethod
    def before(cls, num_modalities: int) -> dict[str, Any]:
        """Return fields that runs from before they were there had other values of than today's defaults.

        Args:
            num_modalities: M of the runs.
        """
        return {}

    @property
    def joint_epochs(self) -> float:
        """Epochs in which the method trains as Joint does, to the same weights, before it first acts."""
        return 0

    def config(self) -> dict[str, Any]:
        """Return the fields as plain values, for reports and checkpoints."""
        return asdict(self)


def format_value(value: Any) -> str:
    """Return a value as --set takes it."""
    if isinstance(value, tuple | list):
        return ",".join(map(format_value, value))
    return "none" if value is None else str(value)


def check_numbers(method: Method, **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless each of the method's fields lies in its range, both ends included."""
    for field, (low, high) in ranges.items():
        value = getattr(method, field)
        if not low <= value <= high:
            least = "positive" if low == math.ulp(0.0) else f"at least {low}"
            span = least if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"{field} of {method.name} must be {span}, got {describe(value)}")


class Learner(ResumableModule, PredictingModule):
    """A model with what its method adds (heads, projectors, counters), and the hooks that training calls.

    Everything that must survive a restart is a parameter, a buffer, or in `extra_state`, and so in the state
    dict. A learner answers to the same calls as a model (`encode`, `fuse`, `modalities`), so it can be
    valuated like one.
    """

    steps_per_batch: int = 1

    def __init__(self, method: Any, model: MultimodalModel, seed: int) -> None:
        super().__init__()
        self.method = method
        self.model = model
        self.seed = seed
        self.objective = Objective()
        self.stage = Stage("train", 0)
        # How data sets are read in passes of the method's own, and the precision of these: the trainer's.
        self.reader = Reader()
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        # Modules of the model that stay as they are in all stages, by the user's wish for this training.
        self.held: tuple[nn.Module, ...] = ()
        self._kept: dict[int, tuple[Any, KeptFeatures, bool]] = {}
        self.build()
        # What the user froze stays frozen; what a stage freezes is free again after it.
        self._wanted = [p.requires_grad for p in self.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._head_was_trained = model.head_is_trained
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def build(self) -> None:
        """Create what the method adds to the model."""

    def __repr__(self) -> str:
        method = f"{type(self.method).__name__}({shown(changed(self.method))})"
        lines = [f"Learner({method}, seed {self.seed}, stage {self.stage.name!r}"]
        lines += repr(self.model).splitlines()
        for name, module in self.named_children():
            if module is not self.model:
                lines.append(f"{name}: {module_text(module)}, {count_text(module)}")
        return "\n  ".join(lines) + ")"

    # What training calls

    def stages(self, max_epochs: int) -> list[Stage]:
        """Return the stages of a run whose first stage has `max_epochs` epochs."""
        return [Stage("train", max_epochs)]

    def _has_stages(self) -> bool:
        return type(self).stages is not Learner.stages

    def frozen(self) -> Sequence[nn.Module]:
        """Return the modules that the current stage does not train."""
        return ()

    def start_stage(self, stage: Stage) -> None:
        """Enter a stage: set which parameters train, and training mode."""
        self.stage = stage
        self.unfreeze()
        for module in (*self.frozen(), *self.held):
            module.requires_grad_(False)
        self.model.head_is_trained = self.model.head not in self.frozen()
        self.train()

    def train(self, mode: bool = True) -> Learner:
        """Set training mode or eval mode; what is held stays in eval mode, batch norm and dropout with it."""
        super().train(mode)
        for module in self.held:
            module.eval()
        return self

    def unfreeze(self) -> None:
        """Let what stages froze train again, when training is over; what the user froze stays so."""
        self.forget()
        for p, wanted in zip(self.parameters(), self._wanted, strict=True):
            p.requires_grad_(wanted)

    def abandon(self) -> None:
        """Give back all but the weights' values, when training has ended before its end."""
        self.unfreeze()
        self.zero_grad(set_to_none=True)
        self.model.head_is_trained = self._head_was_trained
        # A precision such as bf16-true has changed it.
        if self._dtype is not None and next(self.model.parameters()).dtype != self._dtype:
            self.model.to(self._dtype)
        for module, mode in self._modes:
            module.training = mode

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the current stage trains."""
        return [p for p in self.parameters() if p.requires_grad]

    def start_epoch(self, epoch: int, train: Any) -> Any:
        """Return the data set that this epoch trains on; the base trains on `train` itself."""
        return train

    def forward(
        self,
        batch: Mapping[str, Tensor],  # <modality>: [N, ...], label: [N] or [N, C]
        step: int = 0,
    ) -> Tensor:  # scalar
        """Return the loss of one optimizer step; a batch takes `steps_per_batch` of them.

        Where a step adds up the gradients of several batches, it is called for each of them before
        `edit_gradients`.
        """
        logits = self.model.fuse(self.encode(batch), present=presence(batch, self.modalities))
        return self.loss(logits, batch["label"])

    def loss(
        self,
        logits: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # scalar
        """Return the objective's mean loss: what papers write as the cross-entropy of the logits."""
        return self.objective.mean_loss(logits, target)

    def unimodal_loss(
        self,
        logits: Tensor,  # [M, N, C]
        target: Tensor,  # [N] or [N, C]
        present: Tensor | None = None,  # bool [M, N]
    ) -> Tensor:  # scalar
        """Return the sum over modalities of their mean losses, each over the samples where it is present."""
        return self.objective.mean(self.objective.stacked_losses(logits, target), target, present).sum()

    def edit_gradients(self, step: int, progress: float) -> None:
        """Change gradients between backward and optimizer step; `progress` is b / B of the epoch."""

    def end_epoch(self, epoch: int, train: Any, val: Any | None) -> dict[str, float]:
        """Do what the method does between epochs; return figures for the log."""
        return {}

    def note_unimodal_accuracy(self, unimodal_accuracy: Mapping[str, float | None]) -> bool:
        """Take every modality's accuracy alone; return whether predictions are others for it.

        It is measured on validation data after each epoch and stage, None where no sample has the modality.
        In other tasks than "multiclass" the figure that stands for accuracy: micro-F1, or R2.
        """
        return False

    # The names of these two before: loops may call them, a method that defines one is told.

    def release(self) -> None:
        """Do as `unfreeze`."""
        self.unfreeze()

    def note_own_accuracy(self, unimodal_accuracy: Mapping[str, float | None]) -> bool:
        """Do as `note_unimodal_accuracy`."""
        return self.note_unimodal_accuracy(unimodal_accuracy)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old, new in (("release", "unfreeze"), ("note_own_accuracy", "note_unimodal_accuracy")):
            defined = next(name for parent in cls.__mro__ for name in (new, old) if name in vars(parent))
            if defined == old:
                raise TypeError(f"{cls.__name__}.{old} would never be called: name it {new}")

    @property
    def encodes_once(self) -> bool:
        """Whether encoders stay as they are all through the stage, so that features are kept."""
        return False

    @property
    def takes_kept(self) -> bool:
        """Whether features may be kept, as an `encode` of the learner's own would encode them anew."""
        return type(self).encode is Learner.encode

    def reads_again(self, epoch: int) -> bool:
        """Whether validation data are read once more between this epoch's validation and the next epoch."""
        return type(self).note_unimodal_accuracy is not Learner.note_unimodal_accuracy

    def is_last(self, epoch: int) -> bool:
        """Whether no epoch of the stage follows: what would serve the next one is not worth a pass."""
        return epoch + 1 == self.stage.epochs

    def optimizer_reset_due(self) -> bool:
        """Whether the trainer must drop the optimizer's state before the next epoch."""
        return False

    def selection_scores(
        self, accuracy: float, unimodal_accuracy: Sequence[float | None]
    ) -> dict[tuple[str, ...], float]:
        """Return what model selection maximises: one score for all, or one per separately selected part.

        A part is named by the prefixes of its entries in the state dict; ("",) is the whole.
        """
        return {("",): accuracy}

    def generator(self, *key: int) -> torch.Generator:
        """Return a generator that depends on the seed and `key` alone: a resumed run draws the same."""
        return torch.Generator("cpu").manual_seed(mixed(self.seed, *key))
